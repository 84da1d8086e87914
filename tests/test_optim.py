"""Adam against the paper's formulas, gradient clipping, and the learning-rate schedule."""
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from helpers import leaf, normal, seeds, shapes
from tinygrad_lite import Adam, clip_grad_norm, cosine_schedule

several_shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3), min_size=1,
                          max_size=4)
betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.99, 0.999]))
learning_rates = st.sampled_from([1e-4, 1e-2, 1.0])


def leaves(seed, shapes, dtype=np.float64):
    return [leaf(normal(seed + i, *shape, dtype=dtype)) for i, shape in enumerate(shapes)]


def give_gradients(parameters, seed, scale=1.0):
    for i, p in enumerate(parameters):
        p.grad = np.asarray(scale * normal(seed + i, *p.shape), dtype=p.dtype)


# Adam.

def adam_by_hand(theta, grads, lr, beta1, beta2, eps):
    """Algorithm 1 of Kingma & Ba 2015 for one number, line by line."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1 ** t)
        v_hat = v / (1 - beta2 ** t)
        theta = theta - lr * m_hat / (math.sqrt(v_hat) + eps)
    return theta


@given(several_shapes, betas, learning_rates, st.sampled_from([1e-8, 0.1]), st.integers(1, 6),
       seeds)
def test_adam_is_its_algorithm(shapes, betas, lr, eps, steps, seed):
    parameters = leaves(seed, shapes)
    before = [p.data.copy() for p in parameters]
    optimizer = Adam(parameters, lr, betas, eps)
    history = []
    for step in range(steps):
        give_gradients(parameters, seed + 100 * step)
        history.append([p.grad.copy() for p in parameters])
        optimizer.step()
    for i, p in enumerate(parameters):
        for index in np.ndindex(p.shape):
            expected = adam_by_hand(before[i][index], [grads[i][index] for grads in history],
                                    lr, *betas, eps)
            assert math.isclose(p.data[index], expected, rel_tol=1e-10, abs_tol=1e-10)


@given(several_shapes, st.integers(1, 4), st.data(), seeds)
def test_no_gradient_counts_as_a_gradient_of_zero(shapes, steps, draw, seed):
    """The moments of that parameter go on fading, and go on moving it."""
    a, b = leaves(seed, shapes), leaves(seed, shapes)
    optimizers = Adam(a), Adam(b)
    for step in range(steps):
        give_gradients(a, seed + 100 * step)
        give_gradients(b, seed + 100 * step)
        missing = draw.draw(st.integers(0, len(shapes) - 1), label="missing gradient")
        a[missing].grad, b[missing].grad = None, np.zeros(shapes[missing])
        for optimizer in optimizers:
            optimizer.step()
    for x, y in zip(a, b):
        assert np.array_equal(x.data, y.data)


@given(shapes, learning_rates, betas, seeds)
def test_the_first_step_is_as_long_as_the_learning_rate(shape, lr, betas, seed):
    """Bias correction: m_hat = g and v_hat = g^2, so theta moves by lr g / |g| when eps is 0."""
    x, grad = leaf(np.zeros(shape)), normal(seed, *shape)
    x.grad = grad.copy()
    Adam([x], lr, betas, eps=0).step()
    assert np.allclose(x.data, -lr * np.sign(grad), rtol=1e-12)


@given(several_shapes, st.floats(1e-6, 1e6), st.integers(1, 5), seeds)
def test_the_scale_of_the_gradients_does_not_matter(shapes, scale, steps, seed):
    """m_hat / sqrt(v_hat) of c g is that of g, for c > 0 and eps = 0."""
    a, b = leaves(seed, shapes), leaves(seed, shapes)
    for parameters, factor in [(a, 1.0), (b, scale)]:
        optimizer = Adam(parameters, eps=0)
        for step in range(steps):
            give_gradients(parameters, seed + 100 * step, factor)
            optimizer.step()
    for x, y in zip(a, b):
        assert np.allclose(x.data, y.data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adam_keeps_the_dtype_and_the_gradients(dtype):
    parameters = leaves(0, [(3, 2), (4,)], dtype)
    optimizer = Adam(parameters)
    for step in range(3):
        give_gradients(parameters, step)
        grads = [p.grad.copy() for p in parameters]
        optimizer.step()
        for p, grad in zip(parameters, grads):
            assert p.dtype == dtype and np.array_equal(p.grad, grad)
    # The moments, too: in float64 they would take twice the memory and the time.
    assert optimizer.mean.dtype == optimizer.square.dtype == dtype


def test_the_defaults_are_those_the_paper_recommends():
    x, y = (leaf(normal(0, 3)) for _ in range(2))
    default, paper = Adam([x]), Adam([y], lr=0.001, betas=(0.9, 0.999), eps=1e-8)
    for step in range(3):
        for p, optimizer in [(x, default), (y, paper)]:
            p.grad = normal(step, 3)
            optimizer.step()
    assert np.array_equal(x.data, y.data)


def test_adam_follows_a_changed_learning_rate():
    x = leaf([1.0])
    optimizer = Adam([x], lr=1.0)
    optimizer.lr = 0.0
    x.grad = np.ones(1, np.float32)
    optimizer.step()
    assert x.item() == 1


def test_zero_grad_forgets():
    parameters = leaves(0, [(2,), (3, 1)])
    give_gradients(parameters, 0)
    Adam(parameters).zero_grad()
    assert all(p.grad is None for p in parameters)


def test_adam_finds_the_bottom_of_a_bowl():
    """Minimise sum (x - target)^2."""
    x, target = leaf(normal(0, 4)), normal(1, 4)
    optimizer = Adam([x], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        ((x - target) ** 2).sum().backward()
        optimizer.step()
    assert np.allclose(x.data, target, atol=1e-2)


# Clipping.

def norm(arrays):
    return math.sqrt(math.fsum(float(g) ** 2 for array in arrays for g in array.flat))


@given(several_shapes, st.floats(1e-3, 1e3), seeds)
def test_clipping_keeps_the_direction_and_bounds_the_norm(shapes, max_norm, seed):
    parameters = leaves(seed, shapes)
    give_gradients(parameters, seed)
    before = [p.grad.copy() for p in parameters]
    returned = clip_grad_norm(parameters, max_norm)
    assert math.isclose(returned, norm(before), rel_tol=1e-12)
    factor = min(1.0, max_norm / norm(before))
    for p, grad in zip(parameters, before):
        assert np.allclose(p.grad, factor * grad, rtol=1e-12)
    assert math.isclose(norm(p.grad for p in parameters), min(returned, max_norm), rel_tol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(several_shapes, seeds)
def test_clipping_leaves_small_gradients_alone_to_the_bit(dtype, shapes, seed):
    parameters = leaves(seed, shapes, dtype)
    give_gradients(parameters, seed)
    before = [p.grad.copy() for p in parameters]
    returned = clip_grad_norm(parameters, 1.001 * norm(before))
    assert math.isclose(returned, norm(before), rel_tol=1e-5)
    for p, grad in zip(parameters, before):
        assert np.array_equal(p.grad, grad) and p.grad.dtype == dtype


def test_clipping_of_gradients_whose_square_is_beyond_float32():
    """In float32 the sum of squares would be infinite, and what is scaled by 1 / inf is lost."""
    a = leaf(np.zeros(2, np.float32))
    a.grad = np.array([3e25, -4e25], np.float32)
    assert math.isclose(clip_grad_norm([a], 1.0), 5e25, rel_tol=1e-6)
    assert np.allclose(a.grad, [0.6, -0.8])


def test_clipping_skips_what_has_no_gradient():
    a, b = leaves(0, [(2,), (3,)])
    a.grad = np.array([3.0, 4.0])
    assert clip_grad_norm([a, b], 1.0) == 5
    assert np.allclose(a.grad, [0.6, 0.8]) and b.grad is None


def test_clipping_of_zeros():
    a, = leaves(0, [(2,)])
    a.grad = np.zeros(2)
    assert clip_grad_norm([a], 1.0) == 0
    assert np.array_equal(a.grad, [0, 0])


def test_clipping_reaches_a_single_number_used_by_two_backward_calls():
    """Its gradient must be an array: a NumPy scalar would be scaled in a copy that nobody keeps."""
    x = leaf(2.0)
    for _ in range(2):
        (x * 3).backward()
    clip_grad_norm([x], 1.0)
    assert x.grad == 1


# The schedule.

schedules = st.tuples(st.integers(1, 500), st.floats(1e-5, 10), st.integers(0, 500)).filter(
    lambda schedule: schedule[2] < schedule[0])  # total, peak, warmup


def rates(total, peak, warmup):
    return [cosine_schedule(step, total, peak, warmup) for step in range(total)]


@given(schedules)
def test_warmup_is_a_straight_line_to_the_peak(schedule):
    total, peak, warmup = schedule
    lr = rates(*schedule)
    assert np.allclose(lr[:warmup], peak * np.arange(1, warmup + 1) / max(1, warmup))
    assert math.isclose(lr[warmup], peak)
    assert math.isclose(max(lr), peak)


@given(schedules)
def test_after_the_warmup_the_rate_falls_along_a_half_cosine(schedule):
    """peak (1 + cos a) / 2 = peak cos^2(a / 2), where a goes from 0 towards pi."""
    total, peak, warmup = schedule
    lr = rates(*schedule)[warmup:]
    assert all(a > b for a, b in zip(lr, lr[1:]))
    assert 0 < lr[-1] and min(lr) == lr[-1]
    half_angles = np.linspace(0, math.pi / 2, total - warmup, endpoint=False)
    assert np.allclose(lr, peak * np.cos(half_angles) ** 2, rtol=1e-9)


@given(st.integers(50, 1000), st.floats(1e-5, 10))
def test_the_rate_ends_near_zero(total, peak):
    """One step before the end: peak (1 - cos(pi / n)) / 2 < peak (pi / n)^2 / 4."""
    assert cosine_schedule(total - 1, total, peak, 0) < peak * (math.pi / total) ** 2 / 4
    assert abs(cosine_schedule(total, total, peak, 0)) < 1e-12 * peak


# Weight decay.

@given(learning_rates, st.floats(0, 0.5), seeds)
def test_weight_decay_shrinks_matrices_alone_and_apart_from_the_gradient(lr, decay, seed):
    """theta <- theta - lr (decay theta + update): the update is that of Adam without decay."""
    shapes = [(2, 3), (3,)]
    plain, decayed = leaves(seed, shapes), leaves(seed, shapes)
    before = [p.data.copy() for p in plain]
    for parameters, weight_decay in ((plain, 0.0), (decayed, decay)):
        give_gradients(parameters, seed + 7)
        Adam(parameters, lr, weight_decay=weight_decay).step()
    shrunk = -lr * decay * before[0]
    np.testing.assert_allclose(decayed[0].data - plain[0].data, shrunk, atol=1e-12)
    np.testing.assert_array_equal(decayed[1].data, plain[1].data)
