"""One program in several processes: sums, gradients and weights to the bit; errors and deaths."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data
import sft
from cli import UserError
from helpers import ROOT, leaf, normal, tiny_model
from tinygrad_lite import World, launch, parallel

MODEL = tiny_model(0, np.float64, len(data.VOCAB))  # which a loss uses without being given it
LINES = data.random_lines(100, np.random.default_rng(0))  # two shards


# What processes run stands at the top of a module: where they start afresh, they import it.
def reduce_arrays(world):
    """How many arrays have not been added up in rank order anywhere, and the number of ranks."""

    def contribution(rank, shape, dtype):
        return (10.0 ** (3 * rank) * normal([rank, *shape], *shape)).astype(dtype).T

    shapes = (), (1,), (2, 3), (parallel.CHUNK // 4 + 1,), (5, parallel.CHUNK // 8)
    cases = list(itertools.product(shapes, (np.float32, np.float64, np.int64)))
    totals, wrong = [world.all_reduce(contribution(world.rank, *case)) for case in cases], 0
    for case, total in zip(cases, totals):
        first, *others = (contribution(rank, *case) for rank in range(world.world_size))
        expected = sum(others, start=first)
        wrong += total.dtype != case[1] or not np.array_equal(total, expected)
    return world.all_reduce([wrong, 1]).tolist()


def read_late(world):
    """How many sums are wrong anywhere, where processes read them one after the other."""
    wait_for_all = world.wait_for_all
    world.wait_for_all = lambda: (wait_for_all(), time.sleep(0.01 * world.rank))
    sums = [float(world.all_reduce(float(i))) for i in range(10)]
    return int(world.all_reduce(sum(total != world.world_size * i for i, total in enumerate(sums))))


def gradients(world):
    """Of MODEL's loss and of a parameter nobody uses."""
    parameters = [*MODEL.parameters(), leaf([[1.0]])]
    for p in parameters:
        p.grad = None
    for shard in world.share(data.by_length(LINES, sft.SHARD)):
        sft.sft_loss(MODEL, shard, data.completion_mask(LINES).sum()).backward()
    world.all_reduce_gradients(parameters)
    return [p.grad for p in parameters]


def trained(world, steps):
    """Weights and losses of a run, and how many of their bytes and of other settings differ."""
    model, rng = tiny_model(0, vocab_size=len(data.VOCAB), n_layers=1), np.random.default_rng(0)
    batches = (data.random_lines(150, rng) for _ in range(steps))
    losses = list(sft.train(model, batches, steps, 1e-2, world))
    weights = np.concatenate([p.data.ravel() for p in model.parameters()])
    facts = np.append(weights.view(np.uint8), np.geterr()["under"] == "raise").astype(int)
    different = world.all_reduce(facts) != world.world_size * facts
    return weights.tolist(), losses, int(world.all_reduce(different.sum()))


def go_on(world, rank=None, error=None, wait=True):
    """For ever; but `rank` raises an error soon, or is killed."""
    os.write(1, f"{world.rank} {os.getpid()}\n".encode())
    for step in itertools.count() if wait or world.rank == rank else ():
        if (world.rank, step) == (rank, 3 if wait else 0):
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGKILL)
        world.all_reduce(np.ones(3))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums_and_gradients(world_size):
    """In rank order, also of arrays larger than the shared memory and of any type. The gradients of
    the shards add up to the batch's; with three processes one has no shard."""
    assert launch(world_size, reduce_arrays) == [0, world_size]
    assert launch(world_size, read_late) == 0
    model = tiny_model(0, np.float64, len(data.VOCAB))
    sft.sft_loss(model, LINES).backward()
    *grads, unused = launch(world_size, gradients)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad.any() and np.allclose(grad, p.grad, rtol=1e-9, atol=1e-12)
    assert unused.tolist() == [[0.0]]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_process_holds_the_same_weights_to_the_bit(world_size, steps):
    weights, losses, different = launch(world_size, trained, steps)
    assert different == 0 and losses[-1] < losses[0]
    assert (weights, losses, 0) == launch(world_size, trained, steps)  # and so does the next run
    assert np.allclose(losses[:20], trained(World(), steps)[1][:20], rtol=1e-4)


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.setattr(multiprocessing, "RawArray", None)
    monkeypatch.setattr(multiprocessing, "Process", None)
    world = launch(1, lambda world, x: world, "x")
    assert (world.rank, world.world_size, world.share([1, 2, 3])) == (0, 1, [1, 2, 3])
    assert world.all_reduce([1.5, 2]).tolist() == [1.5, 2]


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a zero"),
        UserError("no"),
        MemoryError("much"),
        None,
        EOFError("empty"),
        BrokenPipeError(32, "closed"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "rank, world_size, wait",
    [(1, 2, True), (1, 2, False), (1, 3, True), (2, 3, True), (2, 3, False)],
)
def test_an_error_in_any_process_or_its_death_ends_all(error, rank, world_size, wait):
    """At once, whether the others wait for it or are done."""
    start = time.monotonic()
    with pytest.raises(type(error) if error else ChildProcessError) as caught:
        launch(world_size, go_on, rank, error, wait)
    assert time.monotonic() - start < 5 and multiprocessing.active_children() == []
    assert caught.value.args == error.args if error else f"process {rank} of" in str(caught.value)
    assert error is None or "in go_on\n    raise error\n" in str(caught.value.__cause__)


def test_an_error_or_ctrl_c_in_rank_0_ends_all(monkeypatch):
    """While processes start, Ctrl-C waits until all are there, or one might be missed."""

    def interrupted(process):
        os.kill(os.getpid(), signal.SIGINT)
        start(process)
        started.append(process)

    with pytest.raises(KeyError, match="a zero"):
        launch(2, go_on, 0, KeyError("a zero"))
    started, start = [], multiprocessing.Process.start
    monkeypatch.setattr(multiprocessing.Process, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(3, go_on)
    assert [process.is_alive() for process in started] == [False, False]
    assert multiprocessing.active_children() == []


def run_script(folder, *arguments):
    (folder / "script.py").write_text(f"""
import multiprocessing, os, signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
for name in sys.argv[3:]:
    exec("del " + name)
import test_parallel
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    test_parallel.np.seterr(under="raise")
    print(test_parallel.launch(2, *eval(sys.argv[2], vars(test_parallel))))
""")
    return subprocess.Popen(
        [sys.executable, folder / "script.py", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    "method, missing",
    [
        ("spawn", []),
        ("forkserver", []),
        (
            "spawn",
            [
                "os.fork",
                "os.killpg",
                "os.setsid",
                "os.getuid",
                "signal.pthread_sigmask",
                "signal.alarm",
            ],
        ),
    ],
)
def test_processes_that_inherit_nothing(tmp_path, method, missing):
    """As on macOS, from Python 3.14 on, and on Windows; the NumPy error settings go along."""
    script = run_script(tmp_path, method, "trained, 5", *missing)
    assert script.communicate(timeout=60) == (f"{launch(2, trained, 5)}\n", "")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_rank_0(tmp_path, kind):
    """Each holds standard error open until it ends. Ctrl-C is for rank 0 alone."""
    script = run_script(tmp_path, multiprocessing.get_start_method(), "go_on,")
    pids = dict(map(int, script.stdout.readline().split()) for _ in range(2))
    os.kill(pids[1], signal.SIGINT)
    os.kill(pids[0], kind)
    error = script.communicate(timeout=5)[1]
    assert "process 0 of 2 was killed" in error and error.count("\n") == 1
