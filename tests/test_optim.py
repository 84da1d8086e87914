"""Adam against the papers' formulas, gradient clipping, and the learning-rate schedule."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from helpers import leaf, normal, seeds
from tinygrad_lite import Adam, clip_grad_norm, cosine_schedule

several_shapes = st.lists(hnp.array_shapes(min_dims=0, max_side=3), min_size=1, max_size=4)
dtypes = st.sampled_from([np.float32, np.float64])


def adam_by_hand(theta, grads, lr, beta1, beta2, eps, decay, alphas, beta3):
    """Kingma & Ba 2015, Algorithm 1, line by line, Loshchilov & Hutter 2019, Algorithm 2, and
    Pagliardini et al. 2025, section 3, with an alpha for each step."""
    m = s = v = 0.0
    for t, (g, alpha) in enumerate(zip(grads, alphas), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        s = beta3 * s + (1 - beta3) * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - lr * ((m_hat + alpha * s) / (np.sqrt(v_hat) + eps) + decay * theta)
    return theta


@given(
    dtypes,
    several_shapes,
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.5, 0.99, 0.999]),
    st.sampled_from([1e-8, 0.1]),
    st.sampled_from([0, 0.1]),
    st.lists(st.sampled_from([0.0, 1.0, 16.0]), min_size=1, max_size=6),
    st.sampled_from([0.5, 0.995]),
    st.data(),
    seeds,
)
def test_adam_is_its_algorithm(
    dtype, shapes, lr, beta1, beta2, eps, decay, alphas, beta3, draw, seed
):
    """No gradient counts as zero; weights decay in matrices alone; gradients are left alone."""
    parameters = [leaf(normal(seed + i, *shape, dtype=dtype)) for i, shape in enumerate(shapes)]
    before = [p.data.astype(np.float64) for p in parameters]
    tolerance = 1e-10 if dtype == np.float64 else 1e-3
    optimizer = Adam(parameters, 7.0, (beta1, beta2), eps, decay, beta3=beta3)
    history = []
    for step, alpha in enumerate(alphas):
        grads = [normal([seed, step, i], *shape, dtype=dtype) for i, shape in enumerate(shapes)]
        missing = draw.draw(st.integers(0, len(shapes) - 1), label="missing gradient")
        for i, p in enumerate(parameters):
            p.grad = grads[i].copy() if i != missing else None
        grads[missing][...], optimizer.lr, optimizer.alpha = 0, lr, alpha  # may change any time
        optimizer.step()
        history.append(grads)
        assert all(p.grad is None or np.array_equal(p.grad, g) for p, g in zip(parameters, grads))
    for p, theta, grads in zip(parameters, before, zip(*history)):
        moments = optimizer.mean + optimizer.slow_mean + optimizer.square
        assert {x.dtype for x in moments} == {p.dtype} == {np.dtype(dtype)}
        expected = adam_by_hand(
            theta, grads, lr, beta1, beta2, eps, decay if p.ndim > 1 else 0, alphas, beta3
        )
        assert np.allclose(p.data, expected, **dict.fromkeys(("rtol", "atol"), tolerance))
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)
    paper = Adam(parameters)
    assert (paper.lr, *paper.betas, paper.eps) == (1e-3, 0.9, 0.999, 1e-8)
    assert paper.weight_decay == paper.alpha == 0


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
)
def test_parameters_are_a_list_of_tensors(parameters):
    """A Tensor is iterable, its slices would be trained; a generator is empty the second time."""
    with pytest.raises(TypeError, match="parameters must be a list of Tensors"):
        Adam(parameters)


@given(dtypes, several_shapes, st.floats(1e-3, 1e3), st.sampled_from([0, 1, 1e25]), seeds)
def test_clipping_keeps_the_direction_and_bounds_the_norm(dtype, shapes, max_norm, size, seed):
    """Small gradients are left alone to the bit; the square of large ones is beyond float32."""
    parameters = [leaf(np.zeros(shape, dtype)) for shape in [*shapes, ()]]
    before = [np.asarray(size * normal(seed, *shape), dtype) for shape in shapes]
    for p, grad in zip(parameters, before):  # the last one has none
        p.grad = grad.copy()
    norm = math.sqrt(math.fsum(float(g) ** 2 for grad in before for g in grad.flat))
    assert math.isclose(clip_grad_norm(parameters, max_norm), norm, rel_tol=1e-6)
    for p, grad in zip(parameters, before):
        factor = max_norm / norm if norm > max_norm else 1
        assert p.grad.dtype == dtype and np.allclose(p.grad, factor * grad, rtol=1e-5, atol=0)
        assert factor < 1 or np.array_equal(p.grad, grad)
    assert parameters[-1].grad is None


@given(st.integers(1, 500), st.floats(1e-5, 10), st.integers(0, 499))
def test_the_rate_climbs_in_a_line_and_falls_along_a_half_cosine_to_zero(total, peak, warmup):
    """peak (1 + cos a) / 2 = peak cos^2(a / 2), where a goes from 0 to pi."""
    warmup %= total
    lr = [cosine_schedule(step, total, peak, warmup) for step in range(total + 1)]
    assert np.allclose(lr[:warmup], peak * np.arange(1, warmup + 1) / max(1, warmup))
    half_angles = np.linspace(0, math.pi / 2, total - warmup + 1)
    assert np.allclose(lr[warmup:], peak * np.cos(half_angles) ** 2, rtol=1e-9, atol=1e-12 * peak)
