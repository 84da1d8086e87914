"""The fused ops: gradients, values against plainly written formulas, and what each op promises."""

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import (
    LAYOUTS,
    TOLERANCE,
    hand_out_read_only_gradients,
    leaf,
    log_softmax,
    normal,
    seeds,
)
from tinygrad_lite import Tensor, functional as F, gradcheck, no_grad

sizes = st.integers(1, 4)
head_counts = st.integers(1, 3)
head_sizes = st.sampled_from([2, 4, 6])
rope_bases = st.sampled_from([10.0, 10000.0])


# Every op.


def embedding_case(rng, batch, length):
    n_tokens, width = rng.integers(1, 5, 2)
    ids = rng.integers(0, n_tokens, 2 * batch * length)[::2]  # a view, as in training
    return lambda x: F.embedding(x, ids), rng.normal(size=(width, n_tokens))


def rms_norm_case(rng, batch, length):
    width = rng.integers(2, 6)
    return F.rms_norm, rng.normal(size=(width, batch * length))


def swiglu_case(rng, batch, length):
    width = rng.integers(1, 5)
    return F.swiglu, rng.normal(size=(2 * width, batch * length))


def log_sigmoid_case(rng, batch, length):
    width = rng.integers(1, 5)
    return F.log_sigmoid, 3 * rng.normal(size=(width, batch * length))


def token_log_probs_case(rng, batch, length):
    n_tokens = rng.integers(1, 5)
    targets = rng.integers(0, n_tokens, 2 * batch * length)[::2]
    logits = 3 * rng.normal(size=(n_tokens, batch * length))
    return lambda x: F.token_log_probs(x, targets), logits


def causal_attention_case(rng, batch, length):
    n_heads, half_head = rng.integers(1, 4, 2)
    qkv = rng.normal(size=(3 * n_heads * 2 * half_head, batch * length))
    return lambda x: F.causal_attention(x, n_heads, batch), qkv


# Each makes a function of one Tensor, and an array for it, for `batch` lines of `length` positions.
CASES = {
    "embedding": embedding_case,
    "rms_norm": rms_norm_case,
    "swiglu": swiglu_case,
    "log_sigmoid": log_sigmoid_case,
    "token_log_probs": token_log_probs_case,
    "causal_attention": causal_attention_case,
}
every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_op_on_lines = pytest.mark.parametrize(  # embedding takes a matrix of weights instead
    "case", [case for name, case in CASES.items() if name != "embedding"]
)


def result_and_gradient(op, array, grad):
    """op(array), and the gradient of its input given that of its result."""
    x = leaf(array)
    out = op(x)
    out.backward(grad)
    return out.data, x.grad


@every_op
@given(batch=sizes, length=sizes, seed=seeds)
@example(batch=1, length=1, seed=0)
def test_op_has_the_right_gradient(case, batch, length, seed):
    op, array = case(np.random.default_rng(seed), batch, length)
    assert gradcheck(op, array) < TOLERANCE


@every_op
@given(batch=sizes, length=sizes, seed=seeds)
def test_op_works_in_any_memory_layout(case, batch, length, seed):
    """Wrong strides would give wrong numbers and no error."""
    op, array = case(np.random.default_rng(seed), batch, length)
    grad = normal(seed, *op(Tensor(array)).shape)
    plain_out, plain_grad = result_and_gradient(op, array, grad)
    for layout in LAYOUTS.values():
        out, array_grad = result_and_gradient(op, layout(array), layout(grad))
        assert np.allclose(out, plain_out, rtol=1e-12, atol=1e-12)
        assert np.allclose(array_grad, plain_grad, rtol=1e-12, atol=1e-12)


@every_op
@given(batch=sizes, length=sizes, seed=seeds)
def test_op_does_not_write_into_what_it_is_given(case, batch, length, seed):
    """Another op may hold the same array, be it of data or of gradients."""
    op, array = case(np.random.default_rng(seed), batch, length)
    array.setflags(write=False)
    loss = op(leaf(array)).sum()
    hand_out_read_only_gradients(loss)
    loss.backward()


@every_op
@given(batch=sizes, length=sizes, seed=seeds)
def test_op_keeps_float32_and_is_accurate_in_it(case, batch, length, seed):
    op, array = case(np.random.default_rng(seed), batch, length)
    grad = normal(seed, *op(Tensor(array)).shape)
    doubles = result_and_gradient(op, array, grad)
    singles = result_and_gradient(op, array.astype(np.float32), grad.astype(np.float32))
    for single, double in zip(singles, doubles):
        assert single.dtype == np.float32
        assert double.dtype == np.float64
        error = np.linalg.norm(single - double)
        assert error <= 1e-4 * (1 + np.linalg.norm(double))


@every_op_on_lines
@given(batch=sizes, length=sizes, seed=seeds)
def test_lines_do_not_see_each_other(case, batch, length, seed):
    """Another last line changes nothing in those before."""
    op, array = case(np.random.default_rng(seed), batch, length)
    changed = array.copy()
    changed[:, -length:] += 1
    before, after = op(Tensor(array)).data, op(Tensor(changed)).data
    assert np.allclose(before[..., :-length], after[..., :-length], rtol=1e-12, atol=1e-12)


# embedding, rms_norm, swiglu, log_sigmoid.


@given(width=sizes, n_tokens=sizes, seed=seeds)
def test_embedding_takes_columns(width, n_tokens, seed):
    weight = normal(seed, width, n_tokens)
    ids = np.random.default_rng(seed).integers(0, n_tokens, 5)
    assert np.array_equal(F.embedding(Tensor(weight), ids).data, weight[:, ids])


@given(width=sizes, n=sizes, eps=st.sampled_from([0.0, 1e-6, 0.1]), seed=seeds)
def test_rms_norm_is_its_formula(width, n, eps, seed):
    x = normal(seed, width, n)
    expected = x / np.sqrt((x**2).mean(axis=0) + eps)
    assert np.allclose(F.rms_norm(Tensor(x), eps).data, expected, rtol=1e-12)


@given(width=sizes, n=sizes, seed=seeds)
def test_the_gradient_of_rms_norm_takes_eps_into_account(width, n, seed):
    assert gradcheck(lambda x: F.rms_norm(x, eps=0.1), normal(seed, width, n)) < TOLERANCE


def test_rms_norm_does_not_blow_up_small_numbers():
    """The default eps is 1e-6, so numbers far below 1e-3 stay small."""
    out = F.rms_norm(Tensor(np.full((4, 1), 1e-5))).data
    assert np.allclose(out, 1e-5 / np.sqrt(1e-10 + 1e-6), rtol=1e-12)


@given(width=sizes, n=sizes, seed=seeds)
def test_swiglu_is_its_formula(width, n, seed):
    gate, up = normal(seed, width, n), normal(seed + 1, width, n)
    out = F.swiglu(Tensor(np.concatenate([gate, up]))).data
    assert np.allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-10)


any_float32 = st.floats(width=32, allow_nan=False)


@given(x=any_float32)
@example(x=1e4)
@example(x=1e38)
@example(x=-1e38)
@example(x=np.inf)
@example(x=-np.inf)
def test_log_sigmoid_of_any_float32(x):
    """Value -log(1 + exp(-x)) and slope sigmoid(-x), without an overflow or a NaN on the way."""
    value = -np.logaddexp(0, -np.float64(x))
    slope = np.exp(-np.logaddexp(0, np.float64(x)))
    with np.errstate(all="raise", under="ignore"):
        out, grad = result_and_gradient(F.log_sigmoid, np.float32(x), np.float32(1))
    assert np.allclose(out, value, rtol=1e-5, atol=1e-30)
    assert np.allclose(grad, slope, rtol=1e-5, atol=1e-30)


@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(x=1e4)
@example(x=1e38)
@example(x=-1e38)
def test_swiglu_of_any_float32(x):
    """Value and slope of silu(x) * 1, without an overflow or a NaN on the way."""
    sigmoid = np.exp(-np.logaddexp(0, -np.float64(x)))
    silu = x * sigmoid
    gate_up = np.array([[x], [1.0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        out, grad = result_and_gradient(F.swiglu, gate_up, np.ones((1, 1), np.float32))
    assert np.allclose(out, silu, rtol=1e-5, atol=1e-5)
    assert np.allclose(grad[0], sigmoid + silu * (1 - sigmoid), rtol=1e-5, atol=1e-5)
    assert np.allclose(grad[1], silu, rtol=1e-5, atol=1e-5)


# token_log_probs.


@given(
    n=sizes,
    n_tokens=st.integers(1, 6),
    size=st.sampled_from([0, 1, 100, 1e4, 1e38]),
    shift=st.floats(-1e3, 1e3),
    seed=seeds,
)
def test_token_log_probs_is_a_log_softmax_of_logits_of_any_size(n, n_tokens, size, shift, seed):
    """In float32, without an overflow on the way; no log-probability is above 0."""
    rng = np.random.default_rng(seed)
    logits = (size * rng.uniform(-1, 1, (n_tokens, n)) + shift).astype(np.float32)
    expected = log_softmax(logits.astype(np.float64))
    targets = rng.integers(0, n_tokens, n)

    def op(x):
        return F.token_log_probs(x, targets)

    with np.errstate(all="raise", under="ignore"):
        out, grad = result_and_gradient(op, logits, np.ones(n, np.float32))
    assert np.allclose(out, expected[targets, range(n)], rtol=1e-5, atol=1e-5)
    assert (out <= 0).all()
    assert (np.abs(grad) <= 1).all()


@given(n_tokens=st.integers(1, 6), seed=seeds)
def test_the_probabilities_of_all_tokens_add_up_to_one(n_tokens, seed):
    logits = Tensor(normal(seed, n_tokens, 1))
    log_probs = [F.token_log_probs(logits, [token]).item() for token in range(n_tokens)]
    assert np.exp(log_probs).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "targets",
    [
        [0, 1, 2, 3, -1, 0],
        [0, 1, 2, 3, 4, 0],
        0,
        np.zeros((2, 3), int),
        np.zeros((6, 1), int),
        np.zeros((1, 6), int),
        np.zeros(5, int),
        np.zeros(7, int),
        np.zeros(6),
        np.zeros(6, bool),
    ],
    ids=repr,
)
def test_targets_that_are_no_tokens(targets):
    """NumPy would count -1 from the end, and broadcast (6, 1) to (6, 6)."""
    with pytest.raises(ValueError, match="targets must be 6 integers from 0 to 3"):
        F.token_log_probs(Tensor(np.ones((4, 6))), targets)


@pytest.mark.parametrize("targets", [[0, 3], np.array([0, 3], np.uint8)], ids=repr)
def test_targets_may_be_any_integers(targets):
    assert F.token_log_probs(Tensor(np.ones((4, 2))), targets).shape == (2,)


# Attention.


def rotate_textbook(x, positions, base):
    """Su et al. 2021, Eq. 34: (T, d) -> (T, d), in ordinary ops."""
    d = x.shape[1]
    angles = np.outer(positions, base ** (-2 * np.arange(d // 2) / d))  # (T, d/2)
    cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)  # (T, d)
    # x @ quarter_turn is (-b, a) for x = (a, b), where a and b are halves of the features.
    quarter_turn = np.kron([[0, 1], [-1, 0]], np.eye(d // 2))
    return x * cos + (x @ quarter_turn) * sin


def attention_textbook(q, k, v, base):
    """Vaswani et al. 2017, Eq. 1, one head of one line, positions as rows, in ordinary ops."""
    length, d = q.shape
    q = rotate_textbook(q, range(length), base)
    k = rotate_textbook(k, range(length), base)
    mask = np.triu(np.full((length, length), -np.inf), 1)  # (T queries, T keys)
    exp = (q @ k.transpose() / np.sqrt(d) + mask).exp()
    return exp / exp.sum(axis=1, keepdims=True) @ v


@given(
    batch=sizes,
    length=st.integers(1, 9),
    n_heads=head_counts,
    d=head_sizes,
    base=rope_bases,
    size=st.sampled_from([0.1, 1, 5]),  # from nearly equal weights to almost a single key
    seed=seeds,
)
def test_attention_and_its_gradient_are_the_textbooks(batch, length, n_heads, d, base, size, seed):
    qkv = size * normal(seed, 3, n_heads, d, batch, length)
    grad = normal(seed + 1, n_heads, d, batch, length)
    width, n = n_heads * d, batch * length

    expected, expected_grad = np.empty_like(grad), np.empty_like(qkv)
    for head, line in np.ndindex(n_heads, batch):
        q, k, v = (leaf(x[head, :, line].T) for x in qkv)  # (T, d) each
        out = attention_textbook(q, k, v, base)
        out.backward(grad[head, :, line].T)
        expected[head, :, line] = out.data.T
        for x_grad, x in zip(expected_grad, (q, k, v)):
            x_grad[head, :, line] = x.grad.T

    def fused(x):
        return F.causal_attention(x, n_heads, batch, base)

    out, qkv_grad = result_and_gradient(fused, qkv.reshape(3 * width, n), grad.reshape(width, n))
    tolerance = {"rtol": 1e-9, "atol": 1e-11 * size}
    assert np.allclose(out.ravel(), expected.ravel(), **tolerance)
    assert np.allclose(qkv_grad.ravel(), expected_grad.ravel(), **tolerance)


def test_the_rotary_base_is_ten_thousand():
    qkv = Tensor(normal(0, 12, 5))
    default = F.causal_attention(qkv, 1, 1)
    assert np.array_equal(default.data, F.causal_attention(qkv, 1, 1, 10000.0).data)
    assert not np.allclose(default.data, F.causal_attention(qkv, 1, 1, 1000.0).data)


def with_other_ending(array, start, seed):
    """`array` with very large other numbers in the columns from `start` on."""
    changed = array.copy()
    changed[:, start:] = 1e4 * normal(seed, len(array), array.shape[1] - start)
    return changed


some_qkv = {"length": st.integers(2, 8), "n_heads": head_counts, "d": head_sizes, "seed": seeds}


@given(draw=st.data(), **some_qkv)
def test_a_later_token_changes_no_earlier_output(draw, length, n_heads, d, seed):
    """However large its scores are: so padding on the right changes nothing."""
    start = draw.draw(st.integers(1, length - 1), label="first changed position")
    qkv = normal(seed, 3 * n_heads * d, length, dtype=np.float32)
    changed = with_other_ending(qkv, start, seed)
    with np.errstate(all="raise", under="ignore"):
        before = F.causal_attention(Tensor(qkv), n_heads, 1).data
        after = F.causal_attention(Tensor(changed), n_heads, 1).data
    assert np.array_equal(before[:, :start], after[:, :start])
    assert not np.array_equal(before[:, start:], after[:, start:])
    assert np.isfinite(after).all()
    shorter = F.causal_attention(Tensor(qkv[:, :start]), n_heads, 1).data
    assert np.allclose(before[:, :start], shorter, rtol=1e-5, atol=1e-6)


@given(draw=st.data(), **some_qkv)
def test_a_later_token_gets_no_gradient_from_an_earlier_output(draw, length, n_heads, d, seed):
    """It is exactly 0, and what the earlier tokens get does not depend on the later ones."""
    start = draw.draw(st.integers(1, length - 1), label="first changed position")
    qkv = normal(seed, 3 * n_heads * d, length, dtype=np.float32)
    grad = normal(seed + 1, n_heads * d, length, dtype=np.float32)
    grad[:, start:] = 0

    def attention(x):
        return F.causal_attention(x, n_heads, 1)

    _, qkv_grad = result_and_gradient(attention, qkv, grad)
    _, changed_grad = result_and_gradient(attention, with_other_ending(qkv, start, seed), grad)
    assert qkv_grad[:, :start].any()
    assert not qkv_grad[:, start:].any()
    assert np.array_equal(qkv_grad, changed_grad)


@given(length=st.integers(2, 8), seed=seeds)
def test_scores_depend_on_the_distance_alone(length, seed):
    """With one query and one key at all positions, a score S_ij is a function of i - j.

    Values that are unit vectors make the output the attention weights themselves, and
    log P_ij - log P_ii = S_ij - S_ii.
    """
    q = np.tile(normal(seed, 8, 1), length)
    k = np.tile(normal(seed + 1, 8, 1), length)
    v = np.eye(8, length)
    out = F.causal_attention(Tensor(np.concatenate([q, k, v])), 1, 1).data
    weights = out[:length].T  # (T queries, T keys)
    assert np.allclose(weights.sum(axis=1), 1)
    for distance in range(1, length):
        at_distance = np.diagonal(weights, -distance)
        at_itself = np.diagonal(weights)[distance:]
        score_difference = np.log(at_distance / at_itself)
        assert np.allclose(score_difference, score_difference[0], atol=1e-9)
        assert abs(score_difference[0]) > 1e-12  # positions do count


@given(
    batch=sizes,
    length=st.integers(1, 6),
    n_heads=head_counts,
    d=head_sizes,
    base=rope_bases,
    seed=seeds,
)
def test_cached_attention_is_attention_position_by_position(batch, length, n_heads, d, base, seed):
    """Lines with scores near 0 and near 1e4 side by side: no exp overflows, and none vanishes."""
    qkv = normal(seed, 3 * n_heads * d, batch, length)
    qkv[:, 0] *= 100
    keys = np.full((length + 1, n_heads, d, batch), np.nan)  # longer than the lines
    values = keys.copy()
    columns = []
    with np.errstate(over="raise", invalid="raise"), no_grad():
        for t in range(length):
            column = F.cached_attention(Tensor(qkv[..., t]), n_heads, keys, values, t, base)
            columns.append(column.data)
    whole = F.causal_attention(Tensor(qkv.reshape(len(qkv), -1)), n_heads, batch, base).data
    cached = np.stack(columns, axis=-1).reshape(whole.shape)
    assert np.allclose(cached, whole, rtol=1e-9, atol=1e-9)


def test_cached_attention_has_the_same_rotary_base():
    qkv = normal(0, 12, 2)
    keys, values = np.empty((2, 2, 1, 4, 1))
    for t in range(2):
        last = F.cached_attention(Tensor(qkv[:, t : t + 1]), 1, keys, values, t).data
    assert np.allclose(last[:, 0], F.causal_attention(Tensor(qkv), 1, 1).data[:, 1])


def test_cached_attention_keeps_float32():
    qkv = Tensor(normal(0, 12, 3, dtype=np.float32))
    keys, values = np.empty((2, 1, 2, 2, 3), np.float32)
    assert F.cached_attention(qkv, 2, keys, values, 0).dtype == np.float32


def test_cached_attention_refuses_what_needs_a_gradient():
    keys, values = np.empty((2, 1, 2, 2, 3))
    with pytest.raises(RuntimeError, match="no_grad"):
        F.cached_attention(leaf(normal(0, 12, 3)), 2, keys, values, 0)
