"""One training step, in this engine, in PyTorch and in JAX: which is quickest?

    python benchmarks/train_step.py                            all sizes, about half an hour
    python benchmarks/train_step.py --sizes default --rounds 2

A step is forward, backward, clipping to norm 1 and Adam, in float32 on all cores, for one model
with one set of weights and one batch. Before anything is compared, the losses of the first steps
must agree to 1e-4. Each library runs alone, in processes of its own (this engine's "threads" in the
table are processes), they take turns, and the median over all turns counts. PyTorch (fused Adam,
scaled_dot_product_attention) is given the better of one thread and one for each core, eager and
compiled; JAX runs one jitted step on donated buffers.

`products` are the step's matrix products alone, the floor for code that calls NumPy's BLAS: each in
the layout that proves quickest on the spot, in the engine's shards, with threads. The rows of real
lines train on lines made anew for each step, in shards of like length as sft.py does, or all padded
to the longest line. PyTorch and JAX are left out where they are not installed.
"""
import argparse
import itertools
import json
import math
from functools import partial

from common import (BETAS, CORES, EPS, LEARNING_RATE, MAX_NORM, SIZES, VOCABULARY, Contestant,
                    best_scores, describe, engine_step, finish, mapper, model_and_batch,
                    print_table, run_worker, take_turns, time_calls)
from cli import count

WARM_UP = 10
CONTESTANTS = [Contestant("numpy", CORES),
               Contestant("numpy_1_thread", 1),
               Contestant("numpy_blas_threads", 1, blas_threads=CORES),
               *[Contestant(name, threads) for name in ("torch_eager", "torch_compile")
                 for threads in sorted({1, CORES})],
               Contestant("jax", CORES),
               Contestant("products", CORES),
               Contestant("real_sorted", CORES),
               Contestant("real_padded", CORES)]


# This engine.

def numpy_step(size, threads, map_fn):
    import sft
    return engine_step(size, sft.SHARD, map_fn)


def real_sorted_step(size, threads, map_fn):
    import data
    import sft
    return real_step(size, map_fn,
                     lambda ids: [ids for ids, in data.by_length(ids, size=sft.SHARD)])


def real_padded_step(size, threads, map_fn):
    import numpy as np
    import sft
    return real_step(size, map_fn,
                     lambda ids: np.split(ids, range(sft.SHARD, len(ids), sft.SHARD)))


def real_step(size, map_fn, cut):
    """As sft.train: new lines for each step, `cut` into shards."""
    import numpy as np
    import data
    import sft
    from tinygrad_lite import Adam, clip_grad_norm, value_and_grad
    model, _ = model_and_batch(size)
    parameters, rng = model.parameters(), np.random.default_rng(0)
    optimizer = Adam(parameters, LEARNING_RATE, BETAS, EPS)

    def step():
        ids = data.random_lines(size.lines, rng)
        n_tokens = int(data.completion_mask(ids).sum())
        loss = partial(sft.sft_loss, model, n_tokens=n_tokens)
        losses = value_and_grad(loss, parameters, cut(ids), map_fn)
        clip_grad_norm(parameters, MAX_NORM)
        optimizer.step()
        return math.fsum(losses)
    return step


# The matrix products alone.

def products_step(size, threads, map_fn):
    """Every product of a step's forward and backward, into arrays that are there already."""
    import numpy as np
    import sft
    layouts, shards = {}, []
    for first in range(0, size.lines, sft.SHARD):
        lines = min(sft.SHARD, size.lines - first)
        shapes = product_shapes(size, lines)
        layouts |= {shape: quickest_layout(*shape) for shape in shapes if shape not in layouts}
        shards.append([operands(*shape, layouts[shape]) for shape in shapes])

    def run(shard):
        for a, b, out in shard:
            np.matmul(a, b, out=out)

    def step():
        for _ in map_fn(run, shards):
            pass
        return 0.0
    return step


def product_shapes(size, lines):
    """(how many, n, k, m) of each product (n, k) @ (k, m), in order; linear layers come as one.

    With N positions a layer of weight (i, o) makes W^T x, W dy and dy x^T, in columns. For each
    line and head attention makes S = Q K^T and O = P V, then P^T dO, dO V^T, dS K and dS^T Q. The
    embedding's gradient is no product by nature, and left out.
    """
    d, hidden, tokens = size.d_model, size.d_hidden, size.tokens
    positions, head = lines * tokens, d // size.n_heads

    def linear(i, o):
        return [(1, o, i, positions), (1, i, o, positions), (1, o, positions, i)]

    each = lines * size.n_heads
    scores, values = (each, tokens, head, tokens), (each, tokens, tokens, head)
    attention = [scores, values, values, scores, values, values]
    block = [*linear(d, 3 * d), *attention, *linear(d, d), *linear(d, 2 * hidden),
             *linear(hidden, d)]
    return block * size.n_layers + linear(d, VOCABULARY)


def operands(times, n, k, m, layout):
    """Arrays a (n, k), b (k, m) and out (n, m), each row by row ("C") or column by column ("F")."""
    import numpy as np
    rng = np.random.default_rng(0)
    arrays = []
    for (rows, columns), order in zip([(n, k), (k, m), (n, m)], layout):
        shape = (rows, columns) if order == "C" else (columns, rows)
        array = rng.standard_normal((times, *shape), np.float32)
        array = array if order == "C" else array.swapaxes(1, 2)
        arrays.append(array[0] if times == 1 else array)
    return arrays


def quickest_layout(times, n, k, m):
    """The layout of the two factors and the product that takes the least time, of all eight."""
    import numpy as np

    def milliseconds(layout):
        a, b, out = operands(times, n, k, m, layout)
        return min(time_calls(lambda: np.matmul(a, b, out=out), calls=7))
    return min(itertools.product("CF", repeat=3), key=milliseconds)


# PyTorch.

def torch_eager_step(size, threads, map_fn):
    return torch_step(size, threads, torch_loss)


def torch_compile_step(size, threads, map_fn):
    import torch
    return torch_step(size, threads, lambda *arguments: torch.compile(torch_loss(*arguments, True)))


def torch_step(size, threads, make_loss):
    import torch
    torch.set_num_threads(threads)
    model, ids = model_and_batch(size)
    ids = torch.from_numpy(ids)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)
    weights = {name: torch.from_numpy(p.data) for name, p in model.named_parameters().items()}
    for name, weight in weights.items():
        if weight.ndim == 2 and name != "embedding":
            weight = weight.T  # PyTorch's linear layers store (outputs, inputs)
        weights[name] = weight.clone(memory_format=torch.contiguous_format).requires_grad_()
    parameters = list(weights.values())
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, BETAS, EPS, fused=True)
    loss_fn = make_loss(size, weights)

    def step():
        optimizer.zero_grad()
        loss = loss_fn(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        return loss.item()
    return step


def torch_loss(size, p, compiled=False):
    """The loss as a function of ids (B, T) and targets (B T,).

    Rotary positions as each likes them best: eager in few calls, the compiler from slices.
    """
    import torch
    import torch.nn.functional as TF
    width, half = (size.d_model,), size.d_model // size.n_heads // 2
    cos, sin = (torch.from_numpy(table) for table in rotary_tables(size))  # (T, d)

    def attention(qkv):
        heads = qkv.view(*qkv.shape[:2], 3, size.n_heads, -1)
        heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, H, T, d)
        qk = heads[:2]
        if compiled:
            (a, b), c, s = qk.chunk(2, -1), cos[:, :half], sin[:, half:]
            q, k = torch.cat((a * c - b * s, b * c + a * s), -1)
        else:
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
    import numpy as np
    half = size.d_model // size.n_heads // 2
    angle = np.arange(size.tokens)[:, None] * 10000.0 ** (-np.arange(half) / half)  # (T, d/2)
    cos, sin = np.cos(angle), np.sin(angle)
    return (np.concatenate([cos, cos], axis=1).astype(np.float32),
            np.concatenate([-sin, sin], axis=1).astype(np.float32))


# JAX.

def jax_step(size, threads, map_fn):
    import jax
    import jax.numpy as jnp
    model, ids = model_and_batch(size)
    state = [{name: jnp.array(p.data) for name, p in model.named_parameters().items()}]
    state += [jax.tree.map(jnp.zeros_like, state[0]) for _ in range(2)]  # Adam's two moments
    state += [jnp.zeros((), jnp.int32)]  # its count of steps
    loss_and_grad = jax.value_and_grad(jax_loss(size))

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

    compiled, ids = jax.jit(update, donate_argnums=(0, 1, 2, 3)), jnp.array(ids)

    def step():
        loss, state[:] = compiled(*state, ids)
        jax.block_until_ready(state)
        return float(loss)
    return step


def jax_loss(size):
    """The loss as a function of weights and ids (B, T + 1)."""
    import jax
    import jax.numpy as jnp
    d, half = size.d_model, size.d_model // size.n_heads // 2
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
        return out.reshape(*qkv.shape[:2], d)

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


# The comparison.

STEPS = {"numpy": numpy_step, "numpy_1_thread": numpy_step, "numpy_blas_threads": numpy_step,
         "torch_eager": torch_eager_step, "torch_compile": torch_compile_step, "jax": jax_step,
         "products": products_step, "real_sorted": real_sorted_step,
         "real_padded": real_padded_step}
REAL = {"real_sorted": "real lines, sorted by length", "real_padded": "real lines, all padded"}


def work(name, size, threads, steps):
    """One turn of one contestant: the losses of the first steps, and the times of later ones."""
    with mapper(name, threads) as map_fn:
        step = STEPS[name](size, threads, map_fn)
        losses = [step() for _ in range(WARM_UP)]
        return {"losses": losses, "times": time_calls(step, calls=steps)}


def check_losses(results):
    """Exit unless every library's first losses are the engine's, to 1e-4."""
    losses = {contestant.name: turns[0]["losses"] for contestant, turns in results.items()}
    if "numpy" not in losses:
        raise SystemExit("the engine's own step does not work; nothing to compare with")
    for name, own in losses.items():
        if name == "products" or name in REAL:
            continue
        error = max(abs(a - b) / abs(b) for a, b in zip(own, losses["numpy"]))
        if not error < 1e-4:
            raise SystemExit(f"{name} does not do the same step: its losses are {own}, the "
                             f"engine's {losses['numpy']}")


def compare(name, rounds, steps):
    """The scores at one size, by contestant."""
    results = take_turns(__file__, CONTESTANTS, ["--size", name, "--steps", str(steps)], rounds)
    check_losses(results)
    return best_scores(results)


def as_json(size, scores):
    """Median milliseconds by contestant; None for what is not installed."""
    return {"size": size._asdict(),
            **{name: round(scores[name].median, 3) if name in scores else None for name in STEPS}}


def print_scores(name, size, scores):
    print(f"\n{name}: {describe(size)}")
    rows = []
    for label, score in scores.items():
        ratio = f"{score.median / scores['numpy'].median:.2f}"
        if label in REAL:  # shorter lines, so no step to compare with
            label, ratio = REAL[label], ""
        rows.append((label, score.threads, f"{score.median:.1f}",
                     f"{score.low:.1f}-{score.high:.1f}", ratio,
                     f"{1000 * size.lines / score.median:,.0f}"))
    print_table(("", "threads", "median ms", "turns", "x numpy", "lines/s"), rows)


def size_names(text):
    names = text.split(",")
    if not set(names) <= set(SIZES):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(SIZES)}, not {text!r}")
    return names


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Time one training step here, in PyTorch and in JAX.")
    add = parser.add_argument
    add("--sizes", type=size_names, default=list(SIZES),
        help=f"some of {','.join(SIZES)}; default: all")
    add("--rounds", type=count, default=5, help="turns of each library; default 5")
    add("--steps", type=count, default=60, help="timed steps in a turn; default 60")
    add("--json", action="store_true", help="print the medians as JSON, in milliseconds")
    for flag, kind in (("--worker", str), ("--size", str), ("--threads", count)):
        add(flag, type=kind, help=argparse.SUPPRESS)  # how this script starts itself for one turn
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.worker:
        run_worker(work, arguments.worker, SIZES[arguments.size], arguments.threads,
                   arguments.steps)
        return
    records = []
    for name in arguments.sizes:
        scores = compare(name, arguments.rounds, arguments.steps)
        records.append(as_json(SIZES[name], scores))
        if not arguments.json:
            print_scores(name, SIZES[name], scores)
    if arguments.json:
        print(json.dumps(records, indent=2))


if __name__ == "__main__":
    finish(main)
