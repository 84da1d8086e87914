"""Where does the time of the engine's training step go?

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --size demo --steps 50

Every op of the engine is wrapped in a clock for the length of the run, its forward and its backward
function apart, and so are clipping, Adam and the walk over the tape. One thread, so that nothing
overlaps, and its processor time, which other programs lengthen least: means over the steps, so
that the parts add up. Below the table stands what the step's matrix products take alone, the floor
of benchmarks/train_step.py. (Not named profile.py: that would hide Python's own module of this name
from cProfile, and from PyTorch, which imports it.)
"""
import argparse
import functools
import inspect
import os
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from unittest import mock

from common import SIZES, describe, engine_step, finish, print_table
from cli import count

# The methods that make a node of their own.
TENSOR_OPS = ("__add__", "__mul__", "__truediv__", "__pow__", "__matmul__", "__getitem__", "exp",
              "log", "sum", "reshape", "transpose")
WARM_UP = 5


def timed(function, name, clock):
    """`function`, adding the milliseconds of each call to clock[name]; a Tensor's backward, too."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.thread_time()
        out = function(*args, **kwargs)
        clock[name] += 1000 * (time.thread_time() - start)
        if getattr(out, "backward_fn", None):
            out.backward_fn = timed(out.backward_fn, f"{name} backward", clock)
        return out
    return wrapper


@contextmanager
def clocks(clock):
    """While inside, the engine's ops, tape, clipping and Adam report to `clock`."""
    import tinygrad_lite
    from tinygrad_lite import Adam, Tensor, functional, parallel
    fused = [name for name, op in inspect.getmembers(functional, inspect.isfunction)
             if op.__module__ == functional.__name__ and not name.startswith("_")]
    places = [(functional, name) for name in fused] + [(Tensor, name) for name in TENSOR_OPS]
    places += [(parallel, "gradients"), (tinygrad_lite, "clip_grad_norm"), (Adam, "step")]
    with ExitStack() as stack:
        for place, name in places:
            wrapper = timed(getattr(place, name), name.strip("_"), clock)
            stack.enter_context(mock.patch.object(place, name, wrapper))
        yield


def profile(size, shard, steps):
    """{name: mean milliseconds in a step}, the step itself as "total"."""
    clock = defaultdict(float)
    with clocks(clock):
        return means(engine_step(size, shard, map), "total", clock, steps)


def means(step, name, clock, steps):
    """What `clock` holds for one step, the step itself under `name`."""
    for _ in range(WARM_UP):
        step()
    clock.clear()
    step = timed(step, name, clock)
    for _ in range(steps):
        step()
    return {name: milliseconds / steps for name, milliseconds in clock.items()}


def rows_of(clock):
    """(name, forward ms, backward ms) of each part of the step, the dearest first; they add up."""
    ops = [name for name in clock if f"{name} backward" in clock]
    rows = [(name, clock[name], clock[f"{name} backward"]) for name in ops]
    backward = sum(row[2] for row in rows)
    rows += [("walk over the tape", 0.0, clock["gradients"] - backward),
             ("clip_grad_norm", 0.0, clock["clip_grad_norm"]), ("Adam", 0.0, clock["step"])]
    rest = clock["total"] - sum(forward + backward for _, forward, backward in rows)
    rows.append(("rest: shards' sums, model code", 0.0, rest))
    return sorted(rows, key=lambda row: -row[1] - row[2])


def print_profile(size, shard, steps):
    from train_step import products_step
    clock = profile(size, shard, steps)
    total = clock["total"]
    rows = [(name, f"{forward:.2f}" if forward else "", f"{backward:.2f}",
             f"{100 * (forward + backward) / total:.1f}")
            for name, forward, backward in rows_of(clock)]
    products = means(products_step(size, 1, map), "products", defaultdict(float), steps)["products"]
    print(f"{describe(size)}, shards of {shard} lines, one thread")
    print_table(("", "forward ms", "backward ms", "%"), [
        *rows, ("step", "", f"{total:.2f}", "100.0"),
        ("its matrix products alone", "", f"{products:.2f}", f"{100 * products / total:.1f}")])


def main():
    parser = argparse.ArgumentParser(description="Where the time of a step goes, op by op.")
    add = parser.add_argument
    add("--size", choices=SIZES, default="default", help="of benchmarks/train_step.py")
    add("--shard", type=count, help="lines in a shard; default: as sft.py")
    add("--steps", type=count, default=100, help="timed steps; default 100")
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported
    import sft
    print_profile(SIZES[arguments.size], arguments.shard or sft.SHARD, arguments.steps)


if __name__ == "__main__":
    finish(main)
