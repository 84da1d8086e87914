"""Gradients of a batch, shard by shard: the parts add up to the whole, whoever computes them."""
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import leaf, normal, seeds, tiny_model
from test_cli import ROOT, TINY
from tinygrad_lite import Tensor, functional as F, parallel_map, value_and_grad

shard_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=6)


def model_loss(model, ids):
    return -F.token_log_probs(model(ids[:, :-1]), ids[:, 1:]).sum()


def shards_of(seed, sizes, vocab_size=7, length=6):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, (size, length)) for size in sizes]


def gradients_of(model, shards, map_fn=map):
    parameters = model.parameters()
    losses = value_and_grad(partial(model_loss, model), parameters, shards, map_fn)
    return losses, [p.grad for p in parameters]


@given(shard_sizes, seeds)
def test_shards_add_up_to_the_batch(sizes, seed):
    model, shards = tiny_model(seed, np.float64), shards_of(seed, sizes)
    losses, grads = gradients_of(model, shards)
    for p in model.parameters():
        p.grad = None
    whole = model_loss(model, np.concatenate(shards))
    total = whole.item()
    whole.backward()
    assert np.isclose(sum(losses), total, rtol=1e-12)
    for p, grad in zip(model.parameters(), grads):
        assert np.allclose(grad, p.grad, rtol=1e-9, atol=1e-9)


@given(shard_sizes, seeds)
def test_any_number_of_processes_gives_the_same_bits(map_fn, sizes, seed):
    model, shards = tiny_model(seed), shards_of(seed, sizes)
    losses, grads = gradients_of(model, shards)
    assert any(grad.any() for grad in grads)
    other_losses, others = gradients_of(model, shards, map_fn)
    assert losses == other_losses
    for a, b in zip(grads, others):
        assert a.dtype == b.dtype == np.float32 and np.array_equal(a, b)


def test_the_processes_see_weights_that_changed_since_they_started(map_fn):
    model, shards = tiny_model(), shards_of(0, [2, 2, 2])
    before, _ = gradients_of(model, shards, map_fn)
    for p in model.parameters():
        p.data *= 1.5
    after, _ = gradients_of(model, shards, map_fn)
    assert before != after == gradients_of(model, shards)[0]


def test_a_pool_that_finishes_in_any_order_gives_the_same_bits():
    """What counts is the order of the shards, not which process is done first."""
    model, shards = tiny_model(), shards_of(0, [3, 1, 4, 2, 2])

    def backwards(fn, items):
        return reversed([fn(item) for item in reversed(list(items))])
    losses, grads = gradients_of(model, shards)
    other_losses, others = gradients_of(model, shards, backwards)
    assert losses == other_losses
    assert all(np.array_equal(a, b) for a, b in zip(grads, others))


def test_gradients_are_set_not_added():
    """A second call, with what the first one left in .grad, gives the same."""
    model, shards = tiny_model(), shards_of(0, [2, 3])
    _, first = gradients_of(model, shards)
    _, second = gradients_of(model, shards)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


def test_a_parameter_that_no_shard_uses_gets_zeros():
    used, unused = leaf([1.0]), leaf([[1.0, 2.0]])
    unused.grad = np.ones((1, 2), np.float32)
    value_and_grad(lambda shard: (used * shard).sum(), [used, unused], [2.0, 3.0])
    assert used.grad == 5
    assert unused.grad.tolist() == [[0.0, 0.0]] and unused.grad.dtype == np.float32


@pytest.mark.parametrize("users", [[0], [1], [2], [0, 2], [1, 2]])
def test_a_parameter_that_some_shards_use(users):
    always, sometimes = leaf([1.0]), leaf([1.0])

    def loss(shard):
        return (always + sometimes if shard in users else always * 1).sum()
    value_and_grad(loss, [always, sometimes], range(3))
    assert always.grad == 3
    assert sometimes.grad == len(users)


@pytest.mark.parametrize("n_shards", [1, 2, 3])
def test_gradients_of_two_parameters_share_no_memory(n_shards):
    """a + b hands one array to both; clipping then scales .grad in place."""
    a, b = leaf(normal(0, 3)), leaf(normal(1, 3))
    value_and_grad(lambda shard: (a + b).sum(), [a, b], range(n_shards))
    a.grad *= 7
    assert np.array_equal(b.grad, np.full(3, n_shards))


def test_a_gradient_can_be_scaled_in_place():
    """sum's gradient is a read-only broadcast view; .grad must be an array of its own."""
    x = leaf(normal(0, 3))
    value_and_grad(lambda shard: x.sum(), [x], [0])
    x.grad *= 2
    assert np.array_equal(x.grad, [2, 2, 2])


def loss_and_notes(x, shard):
    return (x * shard).sum(), shard, [shard, "note"]


def test_values_and_whatever_else_the_loss_returns_come_in_the_order_of_the_shards(map_fn):
    x = leaf([2.0])
    plain = value_and_grad(lambda shard: (x * shard).sum(), [x], [1, 2, 3])
    assert plain == [2, 4, 6] and all(type(value) is float for value in plain)
    assert x.grad == 6
    extras = value_and_grad(partial(loss_and_notes, x), [x], [1, 2, 3], map_fn)
    assert extras == [(2, 1, [1, "note"]), (4, 2, [2, "note"]), (6, 3, [3, "note"])]
    assert x.grad == 6


def test_a_loss_that_depends_on_no_parameter_is_a_mistake():
    with pytest.raises(RuntimeError):
        value_and_grad(lambda shard: Tensor(1.0), [leaf([1.0])], [0])


# parallel_map.

def product(a, b):
    if b == 0:
        raise KeyError("a zero")
    return a * b


@given(st.lists(st.integers(1, 9), max_size=9))
def test_the_parallel_map_is_map(map_fn, numbers):
    """Also for fewer items than processes, and none; the shorter iterable counts, as in map."""
    assert list(map_fn(product, numbers, range(1, 99))) == list(map(product, numbers, range(1, 99)))


@pytest.mark.parametrize("zero", range(5))
def test_an_error_in_any_process_reaches_the_caller_and_the_next_call_works(map_fn, zero):
    with pytest.raises(KeyError, match="a zero"):
        map_fn(product, [1] * 5, [int(i != zero) for i in range(5)])
    assert map_fn(product, [1, 2, 3, 4, 5], [2] * 5) == [2, 4, 6, 8, 10]


def test_the_work_is_spread_over_processes():
    with parallel_map(3) as map_fn:
        ids = map_fn(process_id, range(6))
        assert ids[:3] == ids[3:] and len(set(ids)) == 3 and ids[0] == os.getpid()
        assert all(is_running(i) for i in ids)
    assert [is_running(i) for i in ids[:3]] == [True, False, False]


def process_id(_):
    return os.getpid()


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_process_is_an_error_and_no_wait():
    with parallel_map(2) as map_fn:
        os.kill(map_fn(process_id, range(2))[1], signal.SIGKILL)
        with pytest.raises(MemoryError, match="a worker process was killed"):
            map_fn(process_id, range(2))


class Unpicklable:
    def __reduce__(self):
        raise TypeError("stays here")


def test_what_is_under_way_after_a_failed_call_never_answers_a_later_one():
    with parallel_map(3) as map_fn:
        with pytest.raises(TypeError, match="stays here"):
            map_fn(product, [1, 2, Unpicklable()], [1, 1, 1])
        with pytest.raises(OSError, match="closed"):
            map_fn(product, [1, 2, 3], [1, 1, 1])


START = """
import sys
sys.path[:0] = sys.argv[1:3]
import time
from test_parallel import process_id
from tinygrad_lite import parallel_map
with parallel_map(3) as map_fn:
    print(*map_fn(process_id, range(3)), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_started_it(kind):
    parent = subprocess.Popen([sys.executable, "-c", START, ROOT, ROOT / "tests"],
                              stdout=subprocess.PIPE, text=True)
    with parent.stdout:
        processes = [int(word) for word in parent.stdout.readline().split()]
    assert len(set(processes)) == 3
    parent.send_signal(kind)
    parent.wait(timeout=10)
    end = time.monotonic() + 10
    while any(map(is_running, processes)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_running, processes))


STARTED_AS = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import cli
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    sys.exit(cli.main("sft", sys.argv[3:]))
"""


def test_processes_that_inherit_nothing_give_the_same_weights(tmp_path):
    """As on macOS, where a worker starts from a fresh Python."""
    script = tmp_path / "with_spawn.py"
    script.write_text(STARTED_AS)
    flags = [*TINY[:-2], "--batch-size", "128", "--steps", "3"]
    for command in ([script, ROOT, "spawn", *flags, "--threads", "2",
                     "--out", tmp_path / "spawned.npz"],
                    [ROOT / "sft.py", *flags, "--threads", "1", "--out", tmp_path / "alone.npz"]):
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=60)
    assert (tmp_path / "spawned.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()


@pytest.mark.parametrize("start, wait", [("fork", 0.0), ("fork", 0.002), ("fork", 0.004),
                                         ("fork", 0.006), ("fork", 0.5), ("spawn", 0.0),
                                         ("spawn", 0.1), ("spawn", 0.2), ("spawn", 1.0)])
def test_ctrl_c_in_a_terminal_prints_one_line(tmp_path, start, wait):
    """A terminal sends it to all processes of the run at once; the first ones start just then."""
    out, script = tmp_path / "sft.npz", tmp_path / "program.py"
    script.write_text(STARTED_AS)
    run = subprocess.Popen([sys.executable, script, ROOT, start, *TINY[:-2], "--threads", "3",
                            "--batch-size", "256", "--steps", "100000", "--out", out],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    run.stdout.readline()
    time.sleep(wait)
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=20)[1] == f"stopped; {out} was not written\n"
    assert run.returncode == 130
