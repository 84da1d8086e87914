"""Gradients of one batch, computed shard by shard on all cores."""
import ctypes
import sys

import numpy as np

from .tensor import gradients

if sys.platform == "linux":
    # glibc gives freed arrays back to the system at once, and every next one costs page faults: a third of a
    # training step. M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) tell it to keep up to 256 MB at hand.
    _libc = ctypes.CDLL(None)
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(-1, 2 ** 28)
        _libc.mallopt(-3, 2 ** 25)


def value_and_grad(loss_fn, parameters, shards, map_fn=map):
    """Set `.grad` of every parameter to the gradient of the sum of loss_fn(shard) over shards.

    `loss_fn(shard)` returns a one-element Tensor, or a tuple of it and anything else. Returned is the list
    of what it returned for each shard, the Tensor as a float. Pass an executor's `map` as `map_fn` to use
    its threads: each shard has a tape of its own, and NumPy lets go of Python's lock inside its loops.
    The sum runs in the order of `shards`, so the result is the same to the bit for any number of threads.
    """
    def one_shard(shard):
        result = loss_fn(shard)
        loss, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        value = loss.item()
        grads = gradients(loss)
        return (value if rest is None else (value, *rest)), [grads.get(p) for p in parameters]

    values, totals = [], [None] * len(parameters)
    for value, grads in map_fn(one_shard, shards):
        values.append(value)
        totals = [_add(total, grad) for total, grad in zip(totals, grads)]
    for parameter, total in zip(parameters, totals):
        parameter.grad = total
    return values


def _add(total, grad):
    if grad is None or total is None:
        return total if grad is None else np.array(grad)  # a copy: grad may share memory with another
    total += grad
    return total
