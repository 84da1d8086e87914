"""Gradients of one batch, computed shard by shard, in several processes at once."""
import contextlib
import ctypes
import multiprocessing.resource_tracker
import signal
from functools import partial

import numpy as np

from .tensor import gradients

_libc = ctypes.CDLL(None)
if hasattr(_libc, "mallopt"):
    # glibc hands freed arrays back to the system, and the next ones cost page faults: a third of a
    # training step. M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) tell it to keep 256 MB at hand.
    _libc.mallopt(-1, 2 ** 28)
    _libc.mallopt(-3, 2 ** 25)


def value_and_grad(loss_fn, parameters, shards, map_fn=map):
    """Set `.grad` of every parameter to the gradient of the sum of loss_fn(shard) over shards.

    It is zero for a parameter that no shard uses. `loss_fn(shard)` returns a one-element Tensor, or
    a tuple of it and anything else; what it returned is listed for each shard, the Tensor as a
    float. `map_fn` may be that of `parallel_map`: the sum runs in the order of `shards`, the same
    to the bit for any number of processes.
    """
    values, total = [], 0.0
    for value, grad in map_fn(partial(_one_shard, loss_fn, parameters), shards):
        values.append(value)
        total += grad
    for p, piece in zip(parameters, np.split(total, np.cumsum([p.size for p in parameters]))):
        p.grad = piece.reshape(p.shape)
    return values


def _one_shard(loss_fn, parameters, shard):
    """What the loss returned, and all gradients in one vector: many arrays would travel slower."""
    result = loss_fn(shard)
    loss, *rest = result if isinstance(result, tuple) else (result,)
    value, grads = loss.item(), gradients(loss)
    vector = np.concatenate([grads.get(p, np.zeros_like(p.data)).ravel() for p in parameters])
    return (value, *rest) if rest else value, vector


@contextlib.contextmanager
def parallel_map(n):
    """`with parallel_map(n) as map_fn`: a `map` that spreads its items over n processes.

    This process is one of them. Not threads: an op takes some 20 microseconds here, and a thread
    would wait as long for Python's lock after each. Function, items and results go through pipes,
    pickled: half a millisecond for a small model. So the function must be defined at the top of a
    module, and be given its model as an argument (functools.partial) to see its newest weights; a
    script needs `if __name__ == "__main__"` where processes start afresh (macOS).
    `map_fn` raises what the function raises, and MemoryError if a process was killed; it cannot be
    used again after that. Linux and macOS.
    """
    workers = []
    # Ctrl-C waits until all are started; they inherit that, and never see it. Where they start
    # afresh, a tracker of resources starts with them and would let it through: so it starts first.
    if multiprocessing.get_start_method() != "fork":
        multiprocessing.resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(n - 1):
            pipe, their_end = multiprocessing.Pipe()
            worker = multiprocessing.Process(target=_serve, args=(their_end, pipe), daemon=True)
            worker.start()
            their_end.close()
            workers.append((worker, pipe))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield partial(_map, [pipe for _, pipe in workers])
    finally:
        for worker, pipe in reversed(workers):  # later ones hold copies of the earlier ones' pipes
            pipe.close()
            worker.terminate()
            worker.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _map(pipes, function, *iterables):
    """[function(*items) for items in zip(*iterables)], every nth of them here, n = 1 + pipes."""
    items, n = list(zip(*iterables)), 1 + len(pipes)
    busy = pipes[:max(0, len(items) - 1)]
    try:
        for i, pipe in enumerate(busy, start=1):
            pipe.send((function, items[i::n]))
        answers = [_attempt(function, items[::n]), *(pipe.recv() for pipe in busy)]
    except BaseException as error:
        for pipe in pipes:  # what is still under way must not pass for the answer to a later call
            pipe.close()
        if isinstance(error, (EOFError, ConnectionError)):
            raise MemoryError("a worker process was killed") from None
        raise
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return [answers[i % n][i // n] for i in range(len(items))]


def _attempt(function, items):
    """The results, or the exception that stopped them."""
    try:
        return [function(*item) for item in items]
    except Exception as error:
        return error


def _serve(pipe, parent_end):
    """A worker's life: it ends when the parent's end of its pipe closes, by whatever happens."""
    parent_end.close()  # inherited; held open, it would keep this worker waiting for itself
    with contextlib.suppress(EOFError, ConnectionError), np.errstate(all="ignore"):
        while True:
            pipe.send(_attempt(*pipe.recv()))
