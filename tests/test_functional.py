"""The fused ops: gradients, values against plainly written formulas, and what each op promises."""

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import LAYOUTS, TOLERANCE, leaf, log_softmax, normal, read_only_gradients, seeds
from tinygrad_lite import Tensor, functional as F, gradcheck, no_grad

sizes, n_tokens, heads = st.integers(1, 4), st.integers(2, 6), st.integers(1, 3)
head_sizes, bases = st.sampled_from([2, 4, 6]), st.sampled_from([10.0, 1e4])


def cases(seed, batch, length):
    """{name: (one call of an op, the array it takes)} for `batch` lines of `length` positions."""
    rng, n = np.random.default_rng(seed), batch * length
    width, vocab, n_heads, half = rng.integers(1, 5, 4)
    ids = rng.integers(0, vocab, 2 * n)[::2]  # few different ones, and a view, as in training
    return {
        "embedding": (lambda x: F.embedding(x, ids), rng.normal(size=(width, vocab))),
        "rms_norm": (F.rms_norm, rng.normal(size=(width + 1, n))),
        "swiglu": (F.swiglu, rng.normal(size=(2 * width, n))),
        "log_sigmoid": (F.log_sigmoid, 3 * rng.normal(size=(width, n))),
        "token_log_probs": (lambda x: F.token_log_probs(x, ids), 3 * rng.normal(size=(vocab, n))),
        "causal_attention": (
            lambda x: F.causal_attention(x, n_heads, batch),
            rng.normal(size=(6 * n_heads * half, n)),
        ),
    }


def outcome(fn, array, grad):
    """The result and the gradient of fn, given that of its result; neither may be written to."""
    x = leaf(array)
    x.data.setflags(write=False)
    out = read_only_gradients(fn(x))
    out.backward(grad)
    return out.data, x.grad


@pytest.mark.parametrize("op", cases(0, 1, 1))
@given(batch=sizes, length=sizes, seed=seeds)
@example(batch=1, length=1, seed=0)
def test_every_op_in_any_memory_layout_in_float32_and_line_by_line(op, batch, length, seed):
    """Wrong strides would give wrong numbers and no error. What an op is given it leaves alone."""
    fn, array = cases(seed, batch, length)[op]
    assert gradcheck(fn, array) < TOLERANCE
    grad = normal(seed, *fn(Tensor(array)).shape)
    plain = outcome(fn, array, grad)
    for layout in LAYOUTS:
        for a, b in zip(plain, outcome(fn, layout(array), layout(grad))):
            assert np.allclose(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(outcome(fn, array.astype(np.float32), grad), plain):
        assert (a.dtype, b.dtype) == (np.float32, np.float64)
        assert np.linalg.norm(a - b) <= 1e-4 * (1 + np.linalg.norm(b))
    changed = array + (op != "embedding") * (np.arange(array.shape[1]) >= (batch - 1) * length)
    after = fn(Tensor(changed)).data  # another last line
    assert np.allclose(plain[0][..., :-length], after[..., :-length], rtol=1e-12, atol=1e-12)


@given(sizes, sizes, st.sampled_from([0.0, 1e-6, 0.1]), st.sampled_from([1, 1e-6]), seeds)
def test_embedding_rms_norm_and_swiglu_are_their_formulas(width, n, eps, size, seed):
    """rms_norm's default eps is 1e-6: numbers below 1e-3 are not blown up to 1."""
    x, ids = size * normal(seed, 2 * width, n), np.random.default_rng(seed).integers(0, n, 5)
    assert np.array_equal(F.embedding(Tensor(x), ids).data, x[:, ids])
    normed = F.rms_norm(Tensor(x), *([eps] if eps != 1e-6 else []))
    assert np.allclose(normed.data, x / np.sqrt((x**2).mean(axis=0) + eps), rtol=1e-12)
    assert gradcheck(lambda x: F.rms_norm(x, 0.1), x) < TOLERANCE
    gate, up = np.split(x, 2)
    assert np.allclose(F.swiglu(Tensor(x)).data, gate / (1 + np.exp(-gate)) * up, rtol=1e-10)


@given(st.floats(width=32, allow_nan=False))
@example(1e4)
@example(1e38)
@example(np.inf)
def test_log_sigmoid_and_swiglu_of_any_float32(x):
    """Slopes, too, sigmoid(-x) and s + silu(x) (1 - s). No overflow and no NaN on the way."""
    x = np.array([x, -x], np.float32)
    log_s, log_1_s = (-np.logaddexp(0, sign * x.astype(float)) for sign in (-1, 1))
    with np.errstate(all="raise", under="ignore"):
        values, slopes = outcome(F.log_sigmoid, x, np.ones(2))
        assert np.allclose(values, log_s, rtol=1e-5, atol=1e-30)
        assert np.allclose(slopes, np.exp(log_1_s), rtol=1e-5, atol=1e-30)
        if np.isfinite(x).all():
            out, grad = outcome(F.swiglu, np.stack([x, np.ones(2, np.float32)]), np.ones((1, 2)))
            s, silu = np.exp(log_s), x * np.exp(log_s)
            assert np.allclose(out, silu, rtol=1e-5, atol=1e-5)
            assert np.allclose(grad, [s + silu * (1 - s), silu], rtol=1e-5, atol=1e-5)


@given(sizes, n_tokens, st.sampled_from([0, 1, 100, 1e4, 1e38]), st.floats(-1e3, 1e3), seeds)
def test_token_log_probs_is_a_log_softmax_for_logits_of_any_size(n, vocab, size, shift, seed):
    """In float32, at each position's own target; no overflow on the way, slopes at most 1."""
    rng = np.random.default_rng(seed)
    logits = (size * rng.uniform(-1, 1, (vocab, n)) + shift).astype(np.float32)
    expected = log_softmax(logits.astype(float))
    for targets in (*np.full((n, vocab), range(vocab)).T, rng.integers(0, vocab, n)):
        with np.errstate(all="raise", under="ignore"):
            values, grad = outcome(lambda x: F.token_log_probs(x, targets), logits, np.ones(n))
        assert np.allclose(values, expected[targets, range(n)], rtol=1e-5, atol=1e-5)
        assert (values <= 0).all() and (np.abs(grad) <= 1).all()


@pytest.mark.parametrize(
    "targets",
    [
        [0, 1, 2, 3, -1, 0],
        [0, 1, 2, 3, 4, 0],
        0,
        *(np.zeros(shape, int) for shape in [(2, 3), (3, 2), (6, 1), (1, 6), 5, 7]),
        np.zeros(6),
        np.zeros(6, bool),
    ],
    ids=repr,
)
def test_targets_that_are_no_tokens(targets):
    """NumPy would count -1 from the end and broadcast (6, 1) to (6, 6)."""
    with pytest.raises(ValueError, match="targets must be 6 integers from 0 to 3"):
        F.token_log_probs(Tensor(np.ones((4, 6))), targets)


def textbook(qkv, n_heads, batch, base, grad):
    """Vaswani et al. 2017, Eq. 1, for one head of one line after the other, in ordinary ops: the
    result and the gradient of qkv."""
    qkv, out = leaf(qkv), np.empty(grad.shape)
    width, length = len(grad), grad.shape[1] // batch
    d = width // n_heads
    angles = np.arange(length)[:, None] * base ** (-2 * np.arange(d // 2) / d)
    cos, sin = (np.tile(table, 2) for table in (np.cos(angles), np.sin(angles)))  # (T, d)
    quarter_turn = np.kron([[0, 1], [-1, 0]], np.eye(d // 2))  # (a, b) -> (-b, a), halves of d
    mask = np.triu(np.full((length, length), -np.inf), 1)  # (T queries, T keys)
    for h, b in np.ndindex(n_heads, batch):
        rows, columns = slice(h * d, (h + 1) * d), slice(b * length, (b + 1) * length)
        q, k, v = (qkv[i * width : (i + 1) * width][rows, columns].transpose() for i in range(3))
        q, k = (x * cos + (x @ quarter_turn) * sin for x in (q, k))
        exp = (q @ k.transpose() / np.sqrt(d) + mask).exp()
        result = (exp / exp.sum(axis=1, keepdims=True) @ v).transpose()
        out[rows, columns] = result.data
        result.backward(grad[rows, columns])
    return out, qkv.grad


@given(sizes, st.integers(1, 9), heads, head_sizes, bases, st.sampled_from([0.1, 1, 5]), seeds)
def test_attention_and_its_gradient_are_the_textbooks(batch, length, n_heads, d, base, size, seed):
    """From nearly equal weights to ones that choose a single key. The default base is 1e4."""
    qkv = size * normal(seed, 3 * n_heads * d, batch * length)
    grad = normal(seed + 1, n_heads * d, batch * length)
    options = [base] if base != 1e4 else []
    fused = outcome(lambda x: F.causal_attention(x, n_heads, batch, *options), qkv, grad)
    for a, b in zip(fused, textbook(qkv, n_heads, batch, base, grad)):
        assert np.allclose(a, b, rtol=1e-9, atol=1e-11 * size)


@given(st.integers(2, 8), st.data(), heads, head_sizes, seeds)
def test_nothing_flows_against_time(length, draw, n_heads, d, seed):
    """A later token changes no earlier output, however large its scores are, and gets a gradient of
    exactly 0 from it. So padding on the right changes nothing."""
    at = draw.draw(st.integers(1, length - 1), label="first changed position")
    qkv = normal(seed, 3 * n_heads * d, length, dtype=np.float32)
    changed, grad = qkv.copy(), normal(seed + 1, n_heads * d, length)
    changed[:, at:], grad[:, at:] = 1e4 * normal(seed + 2, len(qkv), length - at), 0
    with np.errstate(all="raise", under="ignore"):
        (before, grad_qkv), (after, grad_changed) = (
            outcome(lambda x: F.causal_attention(x, n_heads, 1), x, grad) for x in (qkv, changed)
        )
    assert np.array_equal(before[:, :at], after[:, :at]) and np.isfinite(after).all()
    assert not np.array_equal(before[:, at:], after[:, at:])
    assert np.array_equal(grad_qkv, grad_changed)
    assert not grad_qkv[:, at:].any() and grad_qkv[:, :at].any()
    shorter = F.causal_attention(Tensor(qkv[:, :at]), n_heads, 1).data
    assert np.allclose(before[:, :at], shorter, rtol=1e-5, atol=1e-6)


@given(st.integers(2, 8), seeds)
def test_scores_depend_on_the_distance_alone(length, seed):
    """One query and one key for all positions: S_ij is a function of i - j. Values that are unit
    vectors make the output the probabilities themselves: log P_ij - log P_ii = S_ij - S_ii."""
    q, k = (np.tile(normal(seed + i, 8, 1), length) for i in range(2))
    qkv = Tensor(np.concatenate([q, k, np.eye(8, length)]))
    probs = F.causal_attention(qkv, 1, 1).data[:length].T  # query i, key j
    assert np.allclose(probs.sum(axis=1), 1)
    for distance in range(1, length):
        difference = np.log(np.diagonal(probs, -distance) / np.diagonal(probs)[distance:])
        assert np.allclose(difference, difference[0], atol=1e-9)
        assert abs(difference[0]) > 1e-12  # positions do count


@given(sizes, st.integers(1, 6), heads, head_sizes, bases, seeds)
def test_cached_attention_is_attention_position_by_position(batch, length, n_heads, d, base, seed):
    """Lines whose scores are near 0 and near 1e4 side by side: no exp overflows, none vanishes."""
    qkv, options = normal(seed, 3 * n_heads * d, batch, length), [base] if base != 1e4 else []
    qkv[:, 0] *= 100
    keys, values = np.full((2, length + 1, n_heads, d, batch), np.nan)
    with np.errstate(over="raise", invalid="raise"), no_grad():
        parts = [
            F.cached_attention(Tensor(qkv[..., t]), n_heads, keys, values, t, *options).data
            for t in range(length)
        ]
    whole = F.causal_attention(Tensor(qkv.reshape(len(qkv), -1)), n_heads, batch, base).data
    assert np.allclose(np.stack(parts, axis=-1).reshape(whole.shape), whole, rtol=1e-9, atol=1e-9)
    single = [x.astype(np.float32) for x in (qkv[..., 0], keys, values)]
    assert F.cached_attention(Tensor(single[0]), n_heads, *single[1:], 0).dtype == np.float32
    with pytest.raises(RuntimeError, match="no_grad"):
        F.cached_attention(leaf(single[0]), n_heads, *single[1:], 0)
