"""Gradients of a batch, shard by shard: the parts add up to the whole, whoever computes them."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import leaf, normal, seeds, tiny_model
from tinygrad_lite import Tensor, functional as F, no_grad, value_and_grad

shard_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=6)


def model_loss(model, ids):
    return -F.token_log_probs(model(ids[:, :-1]), ids[:, 1:]).sum()


def shards_of(seed, sizes, vocab_size=7, length=6):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, (size, length)) for size in sizes]


def gradients_of(model, shards, map_fn=map):
    parameters = model.parameters()
    losses = value_and_grad(lambda ids: model_loss(model, ids), parameters, shards, map_fn)
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
def test_any_number_of_threads_gives_the_same_bits(sizes, seed):
    model, shards = tiny_model(seed), shards_of(seed, sizes)
    losses, grads = gradients_of(model, shards)
    assert any(grad.any() for grad in grads)
    for threads in (1, 2, 4):
        with ThreadPoolExecutor(threads) as pool:
            other_losses, others = gradients_of(model, shards, pool.map)
        assert losses == other_losses
        for a, b in zip(grads, others):
            assert a.dtype == b.dtype == np.float32 and np.array_equal(a, b)


def test_a_pool_that_finishes_in_any_order_gives_the_same_bits():
    """What counts is the order of the shards, not which thread is done first."""
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


def test_a_parameter_that_no_shard_uses_gets_none():
    used, unused = leaf([1.0]), leaf([1.0])
    unused.grad = np.ones(1, np.float32)
    value_and_grad(lambda shard: (used * shard).sum(), [used, unused], [2.0, 3.0])
    assert used.grad == 5
    assert unused.grad is None


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


def test_values_and_whatever_else_the_loss_returns_come_in_the_order_of_the_shards():
    x = leaf([2.0])
    plain = value_and_grad(lambda shard: (x * shard).sum(), [x], [1, 2, 3])
    assert plain == [2, 4, 6] and all(type(value) is float for value in plain)
    assert x.grad == 6
    with ThreadPoolExecutor(2) as pool:
        extras = value_and_grad(lambda shard: ((x * shard).sum(), shard, [shard, "note"]), [x],
                                [1, 2, 3], pool.map)
    assert extras == [(2, 1, [1, "note"]), (4, 2, [2, "note"]), (6, 3, [3, "note"])]
    assert x.grad == 6


def test_an_error_in_a_shard_reaches_the_caller():
    x = leaf([1.0])

    def loss(shard):
        if shard == 2:
            raise KeyError(shard)
        return (x * shard).sum()
    with ThreadPoolExecutor(2) as pool, pytest.raises(KeyError):
        value_and_grad(loss, [x], [1, 2, 3], pool.map)


def test_threads_record_although_the_caller_does_not():
    """no_grad is a matter of each thread, and the shards have threads of their own."""
    x = leaf([1.0])
    with no_grad(), ThreadPoolExecutor(1) as pool:
        value_and_grad(lambda shard: (x * shard).sum(), [x], [3.0], pool.map)
    assert x.grad == 3


def test_a_loss_that_depends_on_no_parameter_is_a_mistake():
    with pytest.raises(RuntimeError):
        value_and_grad(lambda shard: Tensor(1.0), [leaf([1.0])], [0])
