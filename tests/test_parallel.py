"""One program in several processes: sums, gradients and weights to the bit; errors and deaths."""

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data
import sft
from cli import UserError
from helpers import ROOT, ignore, leaf, model_of_the_task, normal, random_batch, weights
from tinygrad_lite import World, launch

# What the processes run stands at the top of this module, because they import it. An assert in one
# of them fails the test: launch raises here what any process raises.


@pytest.fixture(autouse=True)
def nothing_hangs_and_no_process_is_left():
    """A test that waits for ever fails after half a minute."""

    def give_up(number, frame):
        raise TimeoutError("this test hangs")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    left = multiprocessing.active_children()
    for process in left:
        process.kill()  # or Python would wait for it at the end of the tests
    assert left == []


# Sums.


def check_sums(world):
    """Rank 0 adds up in rank order, and every process gets the same bits."""
    shapes = [(), (1,), (2, 3), (0, 3), (300_000,)]  # the last one does not fit a pipe's buffer
    dtypes = [np.float32, np.float64, np.int64]

    def contribution(rank, shape, dtype):
        """Numbers of different sizes, so that another order would round differently."""
        return (10.0 ** (3 * rank) * normal([rank, *shape], *shape)).astype(dtype).T

    for shape, dtype in itertools.product(shapes, dtypes):
        expected = contribution(0, shape, dtype)
        for rank in range(1, world.world_size):
            expected = expected + contribution(rank, shape, dtype)
        total = world.all_reduce(contribution(world.rank, shape, dtype))
        assert total.dtype == dtype
        assert np.array_equal(total, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums(world_size):
    launch(world_size, check_sums)


def check_sums_of_numbers_and_lists(world):
    assert world.all_reduce(1.5) == 1.5 * world.world_size
    assert world.all_reduce([1, 2]).tolist() == [world.world_size, 2 * world.world_size]


def test_numbers_and_lists_add_up_too():
    launch(2, check_sums_of_numbers_and_lists)


def check_missing_gradients(world):
    everywhere, only_here, only_there, nowhere = (leaf([1.0, 2.0]) for _ in range(4))
    scalar = leaf(1.0)
    everywhere.grad = np.array([1, 10], np.float32)
    scalar.grad = np.array(3, np.float32)
    if world.rank == 0:
        only_here.grad = np.array([2, 20], np.float32)
    else:
        only_there.grad = np.array([3, 30], np.float32)
    world.all_reduce_gradients([everywhere, only_here, only_there, nowhere, scalar])
    assert everywhere.grad.tolist() == [2, 20]
    assert only_here.grad.tolist() == [2, 20]
    assert only_there.grad.tolist() == [3, 30]
    assert nowhere.grad is None
    assert scalar.grad == 6
    for p in (everywhere, only_here, only_there, scalar):
        assert isinstance(p.grad, np.ndarray)  # which clip_grad_norm scales in place
        assert p.grad.dtype == np.float32


def test_a_missing_gradient_counts_as_zero_unless_it_is_missing_everywhere():
    launch(2, check_missing_gradients)


def gradients_of_two_parts(world, model, lines):
    """Each process takes its parts of the lines; with three processes, one has none."""
    n_tokens = data.completion_mask(lines).sum()
    for part in data.by_length(lines, 2)[world.rank :: world.world_size]:
        share = data.completion_mask(part).sum() / n_tokens
        (sft.sft_loss(model, part) * share).backward()
    world.all_reduce_gradients(model.parameters())
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_gradients_of_parts_add_up_to_that_of_the_batch(world_size):
    model, lines = model_of_the_task(dtype=np.float64), random_batch(0, 100)
    sft.sft_loss(model, lines).backward()
    expected = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    found = launch(world_size, gradients_of_two_parts, model, lines)
    for grad, expected_grad in zip(found, expected, strict=True):
        assert expected_grad.any()
        assert np.allclose(grad, expected_grad, rtol=1e-9, atol=1e-12)


# Training.


def train(world, model):
    """Ten steps of SFT; every process ends with the same weights. Returns the losses."""
    losses = sft.train(world, model, ignore, steps=10, batch_size=30, lr=1e-2, seed=0)
    mine = weights(model)
    only_rank_0_contributes = mine if world.rank == 0 else np.zeros_like(mine)
    assert np.array_equal(world.all_reduce(only_rank_0_contributes), mine)
    return losses


@functools.cache
def trained(world_size):
    """Losses and weights of a run."""
    model = model_of_the_task()
    losses = launch(world_size, train, model)
    return losses, weights(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_process_holds_the_same_weights(world_size):
    trained(world_size)  # where `train` checks it


def test_the_callers_model_is_trained_in_place():
    losses, weights_after = trained(2)
    assert losses[-1] < losses[0]
    assert not np.array_equal(weights_after, weights(model_of_the_task()))


def test_a_run_can_be_repeated_to_the_bit():
    losses, weights_after = trained(2)
    trained.cache_clear()
    losses_again, weights_again = trained(2)
    assert losses == losses_again
    assert np.array_equal(weights_after, weights_again)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_work_and_do_not_change_it(world_size):
    """One process alone sees the same losses, up to rounding."""
    assert np.allclose(trained(world_size)[0], trained(1)[0], rtol=1e-4)


def test_one_process_starts_nothing(monkeypatch):
    """So nothing is pickled either, and any function will do."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", None)
    world, argument = launch(1, lambda world, argument: (world, argument), "argument")
    assert (world.rank, world.world_size) == (0, 1)
    assert argument == "argument"


def test_a_world_of_one_needs_no_launch():
    world = World()
    assert (world.rank, world.world_size) == (0, 1)
    assert world.all_reduce([1.5, 2]).tolist() == [1.5, 2]


# Errors.


def fail(world, failing_rank, error, failing_step):
    """Add up numbers for ever; but one process raises an error at some step."""
    for step in itertools.count():
        if world.rank == failing_rank and step == failing_step:
            raise error
        world.all_reduce(step)


def fail_without_a_word(world, failing_rank, error):
    """One process raises an error; the others are done at once."""
    if world.rank == failing_rank:
        raise error


@pytest.mark.parametrize(
    "rank, world_size, step", [(0, 2, 3), (1, 2, 0), (1, 2, 3), (1, 3, 3), (2, 3, 0), (2, 3, 3)]
)
def test_an_error_in_any_process_ends_all(rank, world_size, step):
    with pytest.raises(KeyError, match="a zero"):
        launch(world_size, fail, rank, KeyError("a zero"), step)


@pytest.mark.parametrize("rank, world_size", [(0, 2), (1, 2), (2, 3)])
def test_an_error_of_a_process_that_nobody_waits_for(rank, world_size):
    with pytest.raises(KeyError, match="a zero"):
        launch(world_size, fail_without_a_word, rank, KeyError("a zero"))


@pytest.mark.parametrize(
    "error",
    [UserError("no"), MemoryError("much"), EOFError("empty"), BrokenPipeError(32, "closed")],
    ids=repr,
)
def test_the_error_itself_arrives(error):
    """Even one of those that a broken pipe would raise."""
    with pytest.raises(type(error)) as caught:
        launch(2, fail, 1, error, 3)
    assert caught.value.args == error.args


def test_an_error_comes_with_the_traceback_of_its_process():
    with pytest.raises(KeyError) as caught:
        launch(2, fail_without_a_word, 1, KeyError("a zero"))
    remote_traceback = str(caught.value.__cause__)
    assert "in fail_without_a_word\n    raise error\n" in remote_traceback


def fail_while_another_works(world):
    world.all_reduce(0)
    if world.rank == 1:
        time.sleep(3600)
    raise KeyError("a zero")


def test_an_error_does_not_wait_for_processes_that_are_at_work():
    with pytest.raises(KeyError, match="a zero"):
        launch(2, fail_while_another_works)


def test_a_function_that_cannot_be_imported_is_an_error():
    with pytest.raises((AttributeError, pickle.PicklingError)):
        launch(2, lambda world: None)


# Deaths.


def die(world, dying_rank):
    """Add up numbers for ever; but one process, unless dying_rank is None, is killed."""
    for step in itertools.count():
        if world.rank == dying_rank and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        world.all_reduce(step)


@pytest.mark.parametrize("rank, world_size", [(1, 2), (2, 3)])
def test_a_killed_process_ends_all(rank, world_size):
    with pytest.raises((EOFError, ConnectionResetError)):
        launch(world_size, die, rank)


def die_between_sending_and_receiving(world):
    if world.rank == 1:
        world.pipes[0].send({"array": np.ones(3)})
        os.kill(os.getpid(), signal.SIGKILL)
    while multiprocessing.active_children():
        time.sleep(0.01)  # until rank 1 is dead
    assert world.all_reduce(np.ones(3)).tolist() == [2, 2, 2]


def test_a_process_that_is_killed_while_it_waits_for_a_sum():
    """Not BrokenPipeError, which would look as if nobody read the output of the program."""
    with pytest.raises((EOFError, ConnectionResetError)):
        launch(2, die_between_sending_and_receiving)


def interrupt(world, rank):
    """What Ctrl-C sends, to one process."""
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGINT)
    world.all_reduce(0)
    return "done"


def test_ctrl_c_stops_rank_0_which_ends_the_others():
    with pytest.raises(KeyboardInterrupt):
        launch(2, interrupt, 0)


def test_the_others_ignore_ctrl_c():
    assert launch(2, interrupt, 1) == "done"


def interrupted_start(process, start=multiprocessing.process.BaseProcess.start):
    """Ctrl-C comes just before a process starts."""
    os.kill(os.getpid(), signal.SIGINT)
    start(process)


def test_ctrl_c_while_processes_start_stops_the_run(monkeypatch):
    """It waits until all have started: one that was just about to start might be missed."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        launch(3, die, None)  # which goes on for ever


def response_to_ctrl_c():
    """The handler, and whether it has to wait."""
    return signal.getsignal(signal.SIGINT), signal.SIGINT in signal.pthread_sigmask(
        signal.SIG_BLOCK, []
    )


def test_ctrl_c_works_as_before_during_a_run_and_after_it():
    before = response_to_ctrl_c()
    assert launch(2, response_on_rank_0) == before
    assert response_to_ctrl_c() == before


def response_on_rank_0(world):
    return response_to_ctrl_c()


def test_ctrl_c_works_as_before_after_an_error():
    before = response_to_ctrl_c()
    with pytest.raises(KeyError):
        launch(2, fail_without_a_word, 0, KeyError("a zero"))
    assert response_to_ctrl_c() == before


def test_ctrl_c_works_as_before_if_no_process_can_be_started(monkeypatch):
    def start(process):
        raise OSError("not enough memory")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    before = response_to_ctrl_c()
    with pytest.raises(OSError, match="not enough memory"):
        launch(2, ignore)
    assert response_to_ctrl_c() == before


def start_script(folder, text):
    """A Python program in a process of its own."""
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


SCRIPT_WITH_CTRL_C = """
from test_parallel import interrupt, launch

if __name__ == "__main__":
    print(launch(2, interrupt, 1))
"""


def test_the_others_ignore_ctrl_c_in_the_first_run_of_a_program_too(tmp_path):
    """With the first process, Python starts a helper of its own, which changes signals."""
    script = start_script(tmp_path, SCRIPT_WITH_CTRL_C)
    assert script.communicate(timeout=30) == ("done\n", "")


SCRIPT_WITHOUT_A_GUARD = """
from test_parallel import ignore, launch, np

launch(2, ignore, np.zeros(1_000_000))
"""


def test_a_process_that_dies_at_its_start(tmp_path):
    """Without `if __name__ == "__main__"`, the other process would start a run of its own, which
    Python refuses. Rank 0 must not wait to send it arguments that do not fit into the pipe."""
    script = start_script(tmp_path, SCRIPT_WITHOUT_A_GUARD)
    output, error = script.communicate(timeout=30)
    assert script.returncode == 1
    assert "An attempt has been made to start a new process" in error
    last_line = error.splitlines()[-1]
    assert last_line.startswith(("EOFError", "ConnectionResetError"))


def go_on_for_ever(world):
    os.write(1, f"{world.rank} {os.getpid()}\n".encode())
    while True:
        world.all_reduce(np.ones(3))


ENDLESS_SCRIPT = """
from test_parallel import go_on_for_ever, launch

if __name__ == "__main__":
    launch(3, go_on_for_ever)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_rank_0(tmp_path, number):
    """They end within seconds and print nothing. Each holds the pipes open until it has ended."""
    script = start_script(tmp_path, ENDLESS_SCRIPT)
    pids = {}
    for _ in range(3):
        rank, pid = script.stdout.readline().split()
        pids[int(rank)] = int(pid)
    os.kill(pids[0], number)
    assert script.communicate(timeout=20) == ("", "")
