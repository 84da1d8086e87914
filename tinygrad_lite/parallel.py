"""Gradients of one batch, computed shard by shard on all cores."""
import ctypes
import sys

import numpy as np

from .tensor import gradients

if sys.platform == "linux":
    # glibc hands freed arrays back to the system, and the next ones cost page faults: a third of a
    # training step. M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) tell it to keep 256 MB at hand.
    _libc = ctypes.CDLL(None)
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(-1, 2 ** 28)
        _libc.mallopt(-3, 2 ** 25)


def value_and_grad(loss_fn, parameters, shards, map_fn=map):
    """Set `.grad` of every parameter to the gradient of the sum of loss_fn(shard) over shards.

    `loss_fn(shard)` returns a one-element Tensor, or a tuple of it and anything else; what it
    returned is listed for each shard, the Tensor as a float. Pass an executor's `map` as `map_fn`
    to use its threads: each shard has its own tape, and NumPy drops Python's lock inside its loops.
    The sum runs in the order of `shards`: the same to the bit for any number of threads.
    """
    def one_shard(shard):
        result = loss_fn(shard)
        loss, *rest = result if isinstance(result, tuple) else (result,)
        value, grads = loss.item(), gradients(loss)
        return (value, *rest) if rest else value, [grads.get(p) for p in parameters]

    values, totals = [], [None] * len(parameters)
    for value, grads in map_fn(one_shard, shards):
        values.append(value)
        totals = [_add(total, grad) for total, grad in zip(totals, grads)]
    for parameter, total in zip(parameters, totals):
        parameter.grad = total
    return values


def _add(total, grad):
    if grad is None or total is None:
        return total if grad is None else np.array(grad)  # a copy: it may share memory
    total += grad
    return total
