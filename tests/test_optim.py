"""Adam and AdEMAMix against the papers' formulas, gradient clipping, and the learning rate."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import data
import dpo
import sft
from helpers import ignore, leaf, model_of_the_task, normal, seeds, weights
from tinygrad_lite import AdEMAMix, Adam, World, clip_grad_norm, cosine_schedule, launch

dtypes = st.sampled_from([np.float32, np.float64])
any_shape = hnp.array_shapes(min_dims=0, max_side=3)
several_shapes = st.lists(any_shape, min_size=1, max_size=4)


def adam_by_hand(theta, grads, lr, betas, eps, decay, alphas, beta3):
    """The parameter after a step with each of `grads` and its alpha.

    Kingma & Ba 2015, Algorithm 1, line by line, with the weight decay of Loshchilov & Hutter 2019,
    Algorithm 2, and the slow mean of Pagliardini et al. 2025, section 3. With alpha 0 it is Adam.
    """
    beta1, beta2 = betas
    m, v, slow = 0.0, 0.0, 0.0
    for t, (g, alpha) in enumerate(zip(grads, alphas), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        slow = beta3 * slow + (1 - beta3) * g
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        theta = theta - lr * ((m_hat + alpha * slow) / (np.sqrt(v_hat) + eps) + decay * theta)
    return theta


def as_close_as(dtype):
    tolerance = 1e-10 if dtype == np.float64 else 1e-3
    return {"rtol": tolerance, "atol": tolerance}


hyperparameters = {
    "lr": st.sampled_from([1e-4, 1e-2, 1.0]),
    "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.99, 0.999])),
    "eps": st.sampled_from([1e-8, 0.1]),
    "decay": st.sampled_from([0, 0.1]),
}


@given(dtype=dtypes, shape=any_shape, n_steps=st.integers(1, 6), seed=seeds, **hyperparameters)
def test_adam_is_its_algorithm(dtype, shape, n_steps, seed, lr, betas, eps, decay):
    p = leaf(normal(seed, *shape, dtype=dtype))
    grads = [normal([seed, step], *shape, dtype=dtype) for step in range(n_steps)]
    decay_here = decay if p.ndim > 1 else 0  # matrices shrink, vectors do not
    no_alphas = [0.0] * n_steps
    expected = adam_by_hand(p.data.astype(float), grads, lr, betas, eps, decay_here, no_alphas, 0.5)

    optimizer = Adam([p], lr, betas, eps, decay)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    assert p.dtype == dtype
    assert np.allclose(p.data, expected, **as_close_as(dtype))


@given(
    dtype=dtypes,
    shape=any_shape,
    alphas=st.lists(st.sampled_from([0.0, 1.0, 16.0]), min_size=1, max_size=6),
    beta3=st.sampled_from([0.5, 0.995]),
    seed=seeds,
    **hyperparameters,
)
def test_ademamix_is_its_algorithm(dtype, shape, alphas, beta3, seed, lr, betas, eps, decay):
    """alpha may change from step to step."""
    p = leaf(normal(seed, *shape, dtype=dtype))
    grads = [normal([seed, step], *shape, dtype=dtype) for step in range(len(alphas))]
    decay_here = decay if p.ndim > 1 else 0
    expected = adam_by_hand(p.data.astype(float), grads, lr, betas, eps, decay_here, alphas, beta3)

    optimizer = AdEMAMix([p], lr, betas, eps, decay, beta3=beta3)
    for grad, alpha in zip(grads, alphas):
        p.grad = grad
        optimizer.alpha = alpha
        optimizer.step()
    assert p.dtype == dtype
    assert np.allclose(p.data, expected, **as_close_as(dtype))


@given(shape=any_shape, seed=seeds)
def test_ademamix_starts_as_adam(shape, seed):
    """alpha is 0 at first."""
    p, q = leaf(normal(seed, *shape)), leaf(normal(seed, *shape))
    adam, ademamix = Adam([p]), AdEMAMix([q])
    for step in range(3):
        p.grad = q.grad = normal([seed, step], *shape)
        adam.step()
        ademamix.step()
    assert np.array_equal(p.data, q.data)


def test_the_defaults_are_those_of_the_papers():
    """Adam's from section 2 of Kingma & Ba. The slow mean of AdEMAMix forgets sooner than in the
    paper (0.9999), because a run has a few thousand steps and not a million."""
    optimizer = AdEMAMix([leaf(1.0)])
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (1e-3, (0.9, 0.999), 1e-8)
    assert optimizer.weight_decay == 0
    assert optimizer.alpha == 0
    assert optimizer.beta3 == 0.995


every_optimizer = pytest.mark.parametrize("optimizer_class", [Adam, AdEMAMix])


@every_optimizer
def test_the_rate_may_change_from_step_to_step(optimizer_class):
    """With a gradient that is always the same, a step is lr, up to eps."""
    p = leaf(np.array(0.0))
    optimizer = optimizer_class([p], lr=7.0)
    expected = 0.0
    for lr in (0.1, 0.5, 0.0):
        p.grad = np.array(1.0)
        optimizer.lr = lr
        optimizer.step()
        expected -= lr
        assert p.data == pytest.approx(expected)


@every_optimizer
@given(dtype=dtypes, shape=any_shape, seed=seeds)
def test_a_step_leaves_the_gradient_alone(optimizer_class, dtype, shape, seed):
    grad = normal(seed, *shape, dtype=dtype)
    p = leaf(normal(seed + 1, *shape, dtype=dtype))
    p.grad = grad.copy()
    optimizer_class([p], weight_decay=0.1).step()
    assert np.array_equal(p.grad, grad)


@every_optimizer
@given(shape=any_shape, seed=seeds)
def test_the_state_of_a_float32_parameter_is_float32(optimizer_class, shape, seed):
    p = leaf(normal(seed, *shape, dtype=np.float32))
    optimizer = optimizer_class([p], weight_decay=0.1)
    for _ in range(2):
        p.grad = np.ones(shape, np.float32)
        optimizer.step()
    state = [*optimizer.mean, *optimizer.square, *getattr(optimizer, "slow_mean", [])]
    assert {array.dtype for array in [p.data, *state]} == {np.dtype(np.float32)}


@every_optimizer
def test_zero_grad(optimizer_class):
    p, q = leaf([1.0]), leaf([2.0])
    p.grad = np.ones(1, np.float32)
    optimizer_class([p, q]).zero_grad()
    assert p.grad is None
    assert q.grad is None


@pytest.mark.parametrize(
    "parameters",
    [
        leaf([1.0, 2.0]),
        (leaf([1.0]) for _ in range(2)),
        None,
        {"x": leaf([1.0])},
        [np.ones(2)],
        [leaf([1.0]), None],
    ],
    ids=["Tensor", "generator", "None", "dict", "list of arrays", "list with None"],
)
def test_parameters_are_a_list_of_tensors(parameters):
    """The slices of a Tensor would be trained, and a generator is empty the second time."""
    with pytest.raises(TypeError, match="parameters must be a list of Tensors"):
        Adam(parameters)


# A parameter without a gradient.


@every_optimizer
def test_a_parameter_without_a_gradient_is_not_moved_by_momentum_or_weight_decay(optimizer_class):
    p = leaf(normal(0, 2, 2))
    optimizer = optimizer_class([p], weight_decay=0.1)
    optimizer.alpha = 1.0
    p.grad = normal(1, 2, 2)
    optimizer.step()
    after_one_step = p.data.copy()
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step()
    assert np.array_equal(p.data, after_one_step)


@every_optimizer
def test_every_parameter_counts_its_own_steps(optimizer_class):
    """A parameter that misses some steps moves as if these had never been."""
    always, sometimes, alone = (leaf(normal(0, 2, 2)) for _ in range(3))
    both, single = optimizer_class([always, sometimes]), optimizer_class([alone])
    both.alpha = single.alpha = 1.0
    for step in range(6):
        grad = normal([1, step], 2, 2)
        always.grad, sometimes.grad = grad, None
        if step in (2, 3, 5):
            sometimes.grad = alone.grad = grad
            single.step()
        both.step()
    assert np.array_equal(sometimes.data, alone.data)
    assert not np.array_equal(sometimes.data, always.data)


def test_a_frozen_head_stays_as_it_is_in_sft():
    """With one process. The rest of the model learns."""
    model = model_of_the_task()
    head = model.named_parameters()["head"]
    head.requires_grad = False
    head_before, weights_before = head.data.copy(), weights(model)
    sft.train(World(), model, ignore, steps=20, batch_size=8, lr=1e-2, seed=0)
    assert np.array_equal(head.data, head_before)
    assert not np.array_equal(weights(model), weights_before)


def random_pairs(policy, step, world, rng):
    """Four pairs of random lines, ids (4, 2, T)."""
    return data.random_lines(8, rng).reshape(4, 2, -1)


def test_a_frozen_head_stays_as_it_is_in_dpo():
    """With two processes, which add up their gradients."""
    policy, reference = model_of_the_task(seed=0), model_of_the_task(seed=0)
    head = policy.named_parameters()["head"]
    head.requires_grad = False
    rounds, beta, lr, seed = 20, 0.8, 1e-2, 0
    launch(2, dpo.train, policy, reference, random_pairs, ignore, rounds, beta, lr, seed)
    assert np.array_equal(head.data, reference.named_parameters()["head"].data)
    assert not np.array_equal(weights(policy), weights(reference))


# Clipping and schedule.


def joint_norm(grads):
    return math.sqrt(math.fsum(float(element) ** 2 for grad in grads for element in grad.flat))


@given(
    dtype=dtypes,
    shapes=several_shapes,
    max_norm=st.floats(1e-3, 1e3),
    size=st.sampled_from([0, 1, 1e25]),  # the square of 1e25 is beyond float32
    seed=seeds,
)
def test_clipping_keeps_the_direction_and_bounds_the_norm(dtype, shapes, max_norm, size, seed):
    parameters = [leaf(np.zeros(shape, dtype)) for shape in shapes]
    before = [np.asarray(size * normal(seed, *shape), dtype) for shape in shapes]
    for p, grad in zip(parameters, before):
        p.grad = grad.copy()
    norm = joint_norm(before)
    assert math.isclose(clip_grad_norm(parameters, max_norm), norm, rel_tol=1e-6)
    for p, grad in zip(parameters, before):
        assert p.grad.dtype == dtype
        if norm > max_norm:
            assert np.allclose(p.grad, grad * (max_norm / norm), rtol=1e-5, atol=0)
        else:
            assert np.array_equal(p.grad, grad)


def test_clipping_ignores_parameters_without_a_gradient():
    p, without = leaf([3.0, 4.0]), leaf([1.0])
    p.grad = p.data.copy()
    assert clip_grad_norm([p, without], max_norm=1) == 5
    assert np.allclose(p.grad, [0.6, 0.8])
    assert without.grad is None


def test_clipping_without_any_gradient():
    assert clip_grad_norm([leaf([1.0])], max_norm=1) == 0


schedules = {
    "total": st.integers(1, 500),
    "warmup": st.integers(0, 499),
    "peak": st.floats(1e-5, 10),
}


@given(**schedules)
def test_the_rate_climbs_in_a_line_to_its_peak(total, warmup, peak):
    rates = [cosine_schedule(step, total, peak, warmup) for step in range(warmup)]
    assert np.allclose(rates, peak * np.arange(1, warmup + 1) / max(1, warmup))


@given(**schedules)
def test_the_rate_falls_along_a_half_cosine_to_zero(total, warmup, peak):
    """peak (1 + cos a) / 2 = peak cos^2(a / 2), where a goes from 0 to pi."""
    warmup %= total
    rates = [cosine_schedule(step, total, peak, warmup) for step in range(warmup, total + 1)]
    half_angles = np.linspace(0, math.pi / 2, total - warmup + 1)
    assert np.allclose(rates, peak * np.cos(half_angles) ** 2, rtol=1e-9, atol=1e-12 * peak)


def test_a_schedule_that_is_all_warmup():
    assert cosine_schedule(step=9, total=10, peak=2.0, warmup=10) == 2.0
    assert cosine_schedule(step=10, total=10, peak=2.0, warmup=10) == 2.0
