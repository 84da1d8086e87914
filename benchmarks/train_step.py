"""One training step, in this engine, in PyTorch and in JAX: which is quickest?

    python benchmarks/train_step.py --sizes default --rounds 2

A step is forward, backward, clipping to norm 1 and Adam, in float32 on all cores, with the same
weights and the same batch; the losses of the first steps must agree to 1e-4. For PyTorch (fused
Adam, scaled_dot_product_attention) the better of one thread and one for each core counts. JAX makes
one jitted step on donated buffers. `products` are the step's matrix products alone, in the engine's
layout. `real_sorted` is sft.train itself, on lines of the task, most of which are shorter.
"""

import argparse
import math
import time
from functools import partial

from common import CORES, SIZES, Contestant, new_model, new_parser, run, time_call
from tinygrad_lite import Adam, clip_grad_norm, functional as F
import numpy as np

import cli
import data
import sft

LEARNING_RATE, BETAS, EPS, MAX_NORM = 1e-3, (0.9, 0.99), 1e-8, 1.0
N_FIRST = 10  # steps that are not timed, and whose losses must agree
VOCABULARY = len(data.VOCAB)


def random_ids(size):
    """Inputs and, one position later, targets: (B, T + 1)."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (size.lines, size.tokens + 1))


# Each of these gives what `work` returns: the losses of the first steps and the milliseconds of
# n_steps later ones. All but real_sorted do so through `measure`.


def measure(step, n_steps):
    """The losses of step(), N_FIRST times, and the milliseconds of n_steps more calls."""
    losses = [step() for _ in range(N_FIRST)]
    times = [time_call(step) for _ in range(n_steps)]
    return {"check": losses, "times": times}


def own_parts(world, ids):
    """This process's parts of a batch, of equal size, divided as in sft.train."""
    n_parts = world.world_size * math.ceil(len(ids) / world.world_size / sft.LINES_AT_ONCE)
    parts = np.array_split(ids, n_parts)[world.rank :: world.world_size]
    return [part for part in parts if len(part) > 0]


def numpy_engine(world, size, threads, n_steps):
    """A step of sft.train, except that it has Adam, and a batch whose every token counts."""
    model = new_model(size)
    parameters = model.parameters()
    optimizer = Adam(parameters, LEARNING_RATE, BETAS, EPS)
    parts = own_parts(world, random_ids(size))

    def step():
        loss = 0.0
        for ids in parts:
            logps = F.token_log_probs(model(ids[:, :-1]), ids[:, 1:].ravel())
            part_loss = -logps.sum() / (size.lines * size.tokens)
            part_loss.backward()
            loss += part_loss.item()
        loss = float(world.all_reduce(loss))
        world.all_reduce_gradients(parameters)
        clip_grad_norm(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return measure(step, n_steps)


def real_sorted(world, size, threads, n_steps):
    """sft.train, timed from report to report: a step, and the making of its lines."""
    moments = []

    def report(step, loss):  # called on rank 0 alone, whose result counts
        moments.append(time.perf_counter())

    n_all = N_FIRST + n_steps
    losses = sft.train(world, new_model(size), report, n_all, size.lines, lr=LEARNING_RATE, seed=0)
    times = 1000 * np.diff(moments)[N_FIRST - 1 :]
    return {"check": losses[:N_FIRST], "times": times.tolist()}


def products(world, size, threads, n_steps):
    """The matrix products of a step: of each layer, and of attention for each line and head.

    The embedding's gradient is left out, because it need not be a product.
    """
    d, hidden, head = size.d_model, size.d_hidden, size.d_model // size.n_heads
    layers = [(3 * d, d), (d, d), (2 * hidden, d), (d, hidden)] * size.n_layers
    layers.append((VOCABULARY, d))  # the head
    rng = np.random.default_rng(0)
    array = partial(rng.standard_normal, dtype=np.float32)

    pairs = []  # of factors
    for part in own_parts(world, random_ids(size)):
        n_lines = len(part)
        n = n_lines * size.tokens
        for outputs, inputs in layers:
            weight, x, grad = array((outputs, inputs)), array((inputs, n)), array((outputs, n))
            pairs += [
                (weight, x),  # forward
                (weight.T, grad),  # the gradient of x
                (grad, x.T),  # the gradient of the weight
            ]
        for _ in range(size.n_layers):
            # As in functional.causal_attention: (H, B, d, T), where q and k are views.
            q, k = array((2, size.n_heads, head, n_lines, size.tokens)).swapaxes(2, 3)
            scores = array((size.tokens, size.n_heads, n_lines, size.tokens))  # keys first
            p = scores.transpose(1, 2, 0, 3)  # (H, B, T keys, T queries)
            pairs += [
                (k.swapaxes(2, 3), q),  # scores
                (k, p),  # output
                (k.swapaxes(2, 3), q),  # the gradient of the weights
                (k, p),  # of q
                (q, p.swapaxes(2, 3)),  # of k
                (q, p.swapaxes(2, 3)),  # of v
            ]
    outs = [a @ b for a, b in pairs]

    def step():
        for (a, b), out in zip(pairs, outs):
            np.matmul(a, b, out=out)
        return float(world.all_reduce(0.0))  # waits for all processes

    return measure(step, n_steps)


def torch_model(world, size, threads, n_steps, compiled=False):
    import torch

    torch.set_num_threads(threads)
    ids = torch.from_numpy(random_ids(size))
    inputs = ids[:, :-1].contiguous()  # (B, T)
    targets = ids[:, 1:].reshape(-1)  # (B T,)
    weights = {}
    for name, parameter in new_model(size).named_parameters().items():
        array = parameter.data
        if name == "embedding":
            array = array.T.copy()  # ours has a column for each token, theirs a row
        weights[name] = torch.tensor(array, requires_grad=True)
    parameters = list(weights.values())
    loss_function = torch_loss(size, weights)
    if compiled:
        loss_function = torch.compile(loss_function)
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, BETAS, EPS, fused=True)

    def step():
        optimizer.zero_grad()
        loss = loss_function(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        return loss.item()

    return measure(step, n_steps)


def torch_loss(size, p):
    """The loss as a function of ids (B, T) and targets (B T,)."""
    import torch
    import torch.nn.functional as TF

    width = (size.d_model,)
    half = size.d_model // size.n_heads // 2
    cos, sin = (torch.from_numpy(table) for table in rotary_tables(size))  # (T, d) each

    def attention(qkv):
        heads = qkv.view(*qkv.shape[:2], 3, size.n_heads, -1).permute(2, 0, 3, 1, 4)
        qk, v = heads[:2], heads[2]  # (2, B, H, T, d) and (B, H, T, d)
        q, k = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
        out = TF.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)  # (B, T, D)

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


def jax_model(world, size, threads, n_steps):
    import jax
    import jax.numpy as jnp

    weights = {}
    for name, parameter in new_model(size).named_parameters().items():
        weights[name] = jnp.array(parameter.data.T.copy())  # (inputs, outputs), for x @ W
    mean = jax.tree.map(jnp.zeros_like, weights)
    square = jax.tree.map(jnp.zeros_like, weights)
    n_updates = jnp.zeros((), jnp.int32)
    ids = jnp.array(random_ids(size))
    loss_and_grad = jax.value_and_grad(jax_loss(size))

    @partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def update(weights, mean, square, n_updates, ids):
        loss, grads = loss_and_grad(weights, ids)
        norm = jnp.sqrt(sum(jnp.vdot(grad, grad) for grad in grads.values()))
        scale = jnp.minimum(1.0, MAX_NORM / norm)
        n_updates = n_updates + 1
        beta1, beta2 = BETAS
        for name, grad in grads.items():
            grad = grad * scale
            mean[name] = beta1 * mean[name] + (1 - beta1) * grad
            square[name] = beta2 * square[name] + (1 - beta2) * grad * grad
            mean_hat = mean[name] / (1 - beta1**n_updates)
            square_hat = square[name] / (1 - beta2**n_updates)
            weights[name] -= LEARNING_RATE * mean_hat / (jnp.sqrt(square_hat) + EPS)
        return loss, weights, mean, square, n_updates

    state = weights, mean, square, n_updates

    def step():
        nonlocal state
        loss, *state = jax.block_until_ready(update(*state, ids))
        return float(loss)

    return measure(step, n_steps)


def jax_loss(size):
    """The loss as a function of weights and ids (B, T + 1)."""
    import jax
    import jax.numpy as jnp

    half = size.d_model // size.n_heads // 2
    cos, sin = (table[:, None] for table in rotary_tables(size))  # (T, 1, d) each
    hidden_later = jnp.triu(jnp.full((size.tokens, size.tokens), -jnp.inf), 1)

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight

    def attention(qkv):
        heads = qkv.reshape(*qkv.shape[:2], 3, size.n_heads, -1)  # (B, T, 3, H, d)
        q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]  # (B, T, H, d) each
        q = q * cos + jnp.roll(q, half, axis=-1) * sin
        k = k * cos + jnp.roll(k, half, axis=-1) * sin
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


CONTESTANTS = {
    "numpy": Contestant(numpy_engine, [(CORES, 1)]),
    "numpy_1_thread": Contestant(numpy_engine, [(1, 1)]),
    "torch_eager": Contestant(torch_model, [(1, 1), (1, CORES)]),
    "torch_compile": Contestant(partial(torch_model, compiled=True), [(1, 1), (1, CORES)]),
    "jax": Contestant(jax_model, [(1, CORES)]),
    "products": Contestant(products, [(CORES, 1)]),
    "real_sorted": Contestant(real_sorted, [(CORES, 1)]),
}
SAME_STEP = ["numpy_1_thread", "torch_eager", "torch_compile", "jax"]  # as `numpy`


def work(world, contestant, threads, size, arguments):
    """One turn of one contestant."""
    return contestant(world, SIZES[size], threads, arguments.steps)


def report(name, scores, arguments):
    """The median milliseconds of each. Raises UserError unless all compute the same losses."""
    size = SIZES[name]
    losses = scores["numpy"].check
    for library in SAME_STEP:
        if scores[library] is not None:
            found = scores[library].check
            if not np.allclose(found, losses, rtol=1e-4, atol=0):
                raise cli.UserError(
                    f"{library} does not do the same step: losses {found}, not {losses}"
                )
    record = {"size": size._asdict()}
    for contestant, score in scores.items():
        record[contestant] = None if score is None else round(score.median, 3)
    sizes = ", ".join(f"{key} {value}" for key, value in size._asdict().items())
    return record, f"{name}: {sizes}", size.lines, "lines"


def size_names(text):
    """The type of --sizes."""
    names = text.split(",")
    for name in names:
        if name not in SIZES:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(SIZES)}, not {text!r}")
    return names


def main():
    parser = new_parser("Time one training step here, in PyTorch and in JAX.")
    add = parser.add_argument
    add("--sizes", type=size_names, default=",".join(SIZES), help="some of these")
    add("--steps", type=cli.whole(1), default=60, help="timed steps in a turn")
    run(parser, "sizes", CONTESTANTS, work, report)


if __name__ == "__main__":
    cli.run(main)
