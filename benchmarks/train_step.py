"""One training step, in this engine, in PyTorch and in JAX: which is quickest?

    python benchmarks/train_step.py --sizes default --rounds 2

A step is forward, backward, clipping to norm 1 and Adam, in float32 on all cores, for the same
weights and batch; the losses of the first steps must agree to 1e-4. PyTorch (fused Adam,
scaled_dot_product_attention) gets the better of one thread and one for each core, JAX one jitted
step on donated buffers. `products` are the step's matrix products alone, in the engine's layout;
`real_sorted` is sft.train itself, on lines of the task, which are shorter.
"""

import argparse
import itertools
from functools import partial

from common import CORES, SIZES, VOCABULARY, new_model, new_parser, run, time_calls
import cli
import data
from tinygrad_lite import Adam, clip_grad_norm, functional as F
import numpy as np
import sft

LEARNING_RATE, BETAS, EPS, MAX_NORM = 1e-3, (0.9, 0.99), 1e-8, 1.0


def random_ids(size):
    return np.random.default_rng(0).integers(0, VOCABULARY, (size.lines, size.tokens + 1))


def numpy_step(world, size, threads):
    """As sft.train: a function that makes a step and returns the loss, here of every token."""
    model, shards = new_model(size), np.array_split(random_ids(size), size.lines // sft.SHARD)
    parameters = model.parameters()
    optimizer = Adam(parameters, LEARNING_RATE, BETAS, EPS)

    def step():
        batch_loss = 0.0
        for ids in world.share(shards):
            logps = F.token_log_probs(model(ids[:, :-1]), ids[:, 1:].ravel())
            loss = -logps.sum() / (size.lines * size.tokens)
            loss.backward()
            batch_loss += loss.item()
        batch_loss = world.all_reduce_gradients(parameters, batch_loss).item()
        clip_grad_norm(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return batch_loss

    return step


def real_step(world, size, threads):
    rng = np.random.default_rng(0)
    batches = (data.random_lines(size.lines, rng) for _ in itertools.count())
    return partial(next, sft.train(new_model(size), batches, 10**6, LEARNING_RATE, world))


def products_step(world, size, threads):
    """A layer makes W x, W^T g and g x^T; attention K^T Q, Q S and K S^T, twice, for each line and
    head. The embedding's gradient is no product by nature, and left out."""
    rng, d, hidden, products = np.random.default_rng(0), size.d_model, size.d_hidden, []
    layers = [(3 * d, d), (d, d), (2 * hidden, d), (d, hidden)] * size.n_layers + [(VOCABULARY, d)]
    array = partial(rng.standard_normal, dtype=np.float32)
    n, head = sft.SHARD * size.tokens, d // size.n_heads
    for _ in world.share(range(size.lines // sft.SHARD)):
        for outputs, inputs in layers:
            weight, x, grad = array((outputs, inputs)), array((inputs, n)), array((outputs, n))
            products += [(weight, x), (weight.T, grad), (grad, x.T)]
        for _ in range(size.n_layers):  # (H, B, ..., T), as in functional.causal_attention
            q, k = array((2, size.n_heads, head, sft.SHARD, size.tokens)).swapaxes(2, 3)
            s = array((size.tokens, size.n_heads, sft.SHARD, size.tokens)).transpose(1, 2, 0, 3)
            products += 2 * [(k.swapaxes(2, 3), q), (q, s), (k, s.swapaxes(2, 3))]
    products = [(a, b, a @ b) for a, b in products]

    def step():
        for a, b, out in products:
            np.matmul(a, b, out=out)
        return float(world.all_reduce(0.0))  # waits for all

    return step


def torch_step(world, size, threads, compiled=False):
    import torch

    torch.set_num_threads(threads)
    ids = torch.from_numpy(random_ids(size))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)
    weights = {
        name: torch.tensor(p.data.T.copy() if name == "embedding" else p.data, requires_grad=True)
        for name, p in new_model(size).named_parameters().items()
    }
    parameters, loss_fn = list(weights.values()), torch_loss(size, weights)
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, BETAS, EPS, fused=True)
    loss_fn = torch.compile(loss_fn) if compiled else loss_fn

    def step():
        optimizer.zero_grad()
        loss = loss_fn(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        return loss.item()

    return step


def torch_loss(size, p):
    """The loss as a function of ids (B, T) and targets (B T,)."""
    import torch
    import torch.nn.functional as TF

    width, half = (size.d_model,), size.d_model // size.n_heads // 2
    cos, sin = map(torch.from_numpy, rotary_tables(size))  # (T, d)

    def attention(qkv):
        heads = qkv.view(*qkv.shape[:2], 3, size.n_heads, -1).permute(2, 0, 3, 1, 4)
        qk = heads[:2]  # (2, B, H, T, d)
        q, k = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
        out = TF.scaled_dot_product_attention(q, k, heads[2], is_causal=True)
        return out.transpose(1, 2).flatten(2)

    def loss(ids, targets):
        x = TF.embedding(ids, p["embedding"])
        for i in range(size.n_layers):
            b = f"blocks.{i}."
            h = TF.rms_norm(x, width, p[b + "attention_norm"], 1e-6)
            x = x + TF.linear(attention(TF.linear(h, p[b + "qkv"])), p[b + "attention_out"])
            h = TF.rms_norm(x, width, p[b + "mlp_norm"], 1e-6)
            gate, up = TF.linear(h, p[b + "gate_up"]).chunk(2, -1)
            x = x + TF.linear(TF.silu(gate) * up, p[b + "down"])
        logits = TF.linear(TF.rms_norm(x, width, p["norm"], 1e-6), p["head"])
        return TF.cross_entropy(logits.flatten(0, 1), targets)

    return loss


def rotary_tables(size):
    """(T, d) each: rotated x = x cos + (x with its halves swapped) sin."""
    half = size.d_model // size.n_heads // 2
    angle = np.arange(size.tokens)[:, None] * 10000.0 ** (-np.arange(half) / half)  # (T, d/2)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return np.hstack([cos, cos]), np.hstack([-sin, sin])


def jax_step(world, size, threads):
    import jax
    import jax.numpy as jnp

    weights = {
        name: jnp.array(p.data.T.copy())  # (inputs, outputs), for x @ W
        for name, p in new_model(size).named_parameters().items()
    }
    mean, square = (jax.tree.map(jnp.zeros_like, weights) for _ in range(2))
    state, ids = [weights, mean, square, jnp.zeros((), jnp.int32)], jnp.array(random_ids(size))
    loss_and_grad = jax.value_and_grad(jax_loss(size))

    @partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def update(weights, mean, square, steps, ids):
        loss, grads = loss_and_grad(weights, ids)
        norm = jnp.sqrt(sum(jnp.vdot(grad, grad) for grad in grads.values()))
        scale, steps = jnp.minimum(1.0, MAX_NORM / norm), steps + 1
        for name, grad in grads.items():
            grad = grad * scale
            mean[name] = BETAS[0] * mean[name] + (1 - BETAS[0]) * grad
            square[name] = BETAS[1] * square[name] + (1 - BETAS[1]) * grad * grad
            root = jnp.sqrt(square[name] / (1 - BETAS[1] ** steps))
            weights[name] -= LEARNING_RATE / (1 - BETAS[0] ** steps) * mean[name] / (root + EPS)
        return loss, (weights, mean, square, steps)

    def step():
        loss, state[:] = jax.block_until_ready(update(*state, ids))
        return float(loss)

    return step


def jax_loss(size):
    """The loss as a function of weights and ids (B, T + 1)."""
    import jax
    import jax.numpy as jnp

    half = size.d_model // size.n_heads // 2
    cos, sin = (table[:, None] for table in rotary_tables(size))  # (T, 1, d)
    hidden_later = jnp.triu(jnp.full((size.tokens, size.tokens), -jnp.inf), 1)

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight

    def attention(qkv):
        heads = qkv.reshape(*qkv.shape[:2], 3, size.n_heads, -1)  # (B, T, 3, H, d)
        q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        q, k = (x * cos + jnp.roll(x, half, axis=-1) * sin for x in (q, k))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * (2 * half) ** -0.5, k) + hidden_later
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return out.reshape(*qkv.shape[:2], -1)

    def loss(p, ids):
        x = p["embedding"][ids[:, :-1]]
        for i in range(size.n_layers):
            b = f"blocks.{i}."
            h = norm(x, p[b + "attention_norm"])
            x = x + attention(h @ p[b + "qkv"]) @ p[b + "attention_out"]
            gate, up = jnp.split(norm(x, p[b + "mlp_norm"]) @ p[b + "gate_up"], 2, axis=-1)
            x = x + (jax.nn.silu(gate) * up) @ p[b + "down"]
        logps = jax.nn.log_softmax(norm(x, p["norm"]) @ p["head"])
        return -jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1).mean()

    return loss


CONTESTANTS = {  # name: (step, [(processes, threads), ...])
    "numpy": (numpy_step, [(CORES, 1)]),
    "numpy_1_thread": (numpy_step, [(1, 1)]),
    "torch_eager": (torch_step, [(1, 1), (1, CORES)]),
    "torch_compile": (partial(torch_step, compiled=True), [(1, 1), (1, CORES)]),
    "jax": (jax_step, [(1, CORES)]),
    "products": (products_step, [(CORES, 1)]),
    "real_sorted": (real_step, [(CORES, 1)]),
}


def work(world, new_step, threads, size, arguments):
    """One turn of one contestant: the losses of the first steps, and the times of later ones."""
    step = new_step(world, SIZES[size], threads)
    return {"check": [step() for _ in range(10)], "times": time_calls(step, world, arguments.steps)}


def report(name, scores, arguments):
    """The median milliseconds of each. Exits unless the losses of all libraries agree."""
    size, own = SIZES[name], scores["numpy"].check
    for library in ("numpy_1_thread", "torch_eager", "torch_compile", "jax"):
        found = scores[library].check if scores[library] else own
        if not np.allclose(found, own, rtol=1e-4, atol=0):
            raise SystemExit(f"{library} does not do the same step: losses {found}, not {own}")
    medians = {step: score and round(score.median, 3) for step, score in scores.items()}
    title = ", ".join(f"{key} {value}" for key, value in size._asdict().items())
    return {"size": size._asdict(), **medians}, f"{name}: {title}", size.lines, "lines"


def size_names(text):
    names = text.split(",")
    if not set(names) <= set(SIZES):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(SIZES)}, not {text!r}")
    return names


def main():
    parser = new_parser("Time one training step here, in PyTorch and in JAX.")
    parser.add_argument("--sizes", type=size_names, default=",".join(SIZES), help="some of these")
    parser.add_argument("--steps", type=cli.whole(1), default=60, help="timed steps in a turn")
    run(parser, "sizes", CONTESTANTS, work, report)


if __name__ == "__main__":
    cli.run(main)
