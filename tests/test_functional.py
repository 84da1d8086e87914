"""The fused ops: gradients, values against plainly written formulas, and what each op promises."""
import math

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import TOLERANCE, leaf, log_softmax, normal, seeds, shapes
from tinygrad_lite import Tensor, functional as F, gradcheck, no_grad

sizes = st.integers(1, 4)


# One call of each op for a batch of B lines of T positions: the function, and the arrays it takes.

def linear_case(rng, batch, length):
    n, m = rng.integers(1, 5, 2)
    return F.linear, [rng.normal(size=(batch, length, n)), rng.normal(size=(n, m))]


def embedding_case(rng, batch, length):
    vocab, width = rng.integers(1, 5, 2)  # few ids, so that most of them repeat
    ids = rng.integers(0, vocab, (batch, length))
    return lambda weight: F.embedding(weight, ids), [rng.normal(size=(vocab, width))]


def rms_norm_case(rng, batch, length):
    width = rng.integers(1, 6)
    return F.rms_norm, [rng.normal(size=(batch, length, width)), rng.normal(size=width)]


def norm_linear_case(rng, batch, length):
    n, m = rng.integers(1, 5, 2)
    return F.norm_linear, [rng.normal(size=(batch, length, n)), rng.normal(size=n),
                           rng.normal(size=(n, m))]


def swiglu_case(rng, batch, length):
    return F.swiglu, [rng.normal(size=(batch, length, 2 * rng.integers(1, 5)))]


def log_sigmoid_case(rng, batch, length):
    return F.log_sigmoid, [3 * rng.normal(size=(batch, length))]


def token_log_probs_case(rng, batch, length):
    vocab = rng.integers(2, 6)
    targets = rng.integers(0, vocab, (batch, length + 1))[:, 1:]  # a view, as in training
    return (lambda logits: F.token_log_probs(logits, targets),
            [rng.normal(size=(batch, length, vocab))])


def causal_attention_case(rng, batch, length):
    heads, head = rng.integers(1, 3), 2 * rng.integers(1, 3)
    return (lambda qkv: F.causal_attention(qkv, heads),
            [rng.normal(size=(batch, length, 3 * heads * head))])


CASES = {case.__name__.removesuffix("_case"): case for case in
         (linear_case, embedding_case, rms_norm_case, norm_linear_case, swiglu_case,
          log_sigmoid_case, token_log_probs_case, causal_attention_case)}
every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

# The same values, laid out differently in memory.
LAYOUTS = {
    "features first": lambda x: np.moveaxis(np.moveaxis(x, -1, 0).copy(), 0, -1),
    "Fortran order": np.asfortranarray,
    "every other element": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
}


def outcome(fn, arrays, grad):
    """The result and the gradients of fn, given the gradient of its result: a list of arrays."""
    inputs = [leaf(array) for array in arrays]
    out = fn(*inputs)
    out.backward(grad)
    return [out.data, *(x.grad for x in inputs)]


def result_shape(fn, arrays):
    return fn(*map(Tensor, arrays)).shape


# What holds for all of them.

@every_op
@given(batch=sizes, length=sizes, seed=seeds)
@example(batch=1, length=1, seed=0)
def test_gradients(case, batch, length, seed):
    fn, arrays = case(np.random.default_rng(seed), batch, length)
    assert gradcheck(fn, *arrays) < TOLERANCE


@every_op
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(batch=sizes, length=sizes, seed=seeds)
def test_memory_layout_does_not_matter(case, layout, batch, length, seed):
    """Nor that of the gradient that arrives; wrong strides would give wrong numbers, no error."""
    fn, arrays = case(np.random.default_rng(seed), batch, length)
    grad = normal(seed, *result_shape(fn, arrays))
    plain = outcome(fn, arrays, grad)
    other = outcome(fn, [layout(array) for array in arrays], layout(grad))
    for a, b in zip(plain, other):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-12)


@every_op
@given(batch=sizes, length=sizes, seed=seeds)
def test_float32_stays_float32_and_agrees_with_float64(case, batch, length, seed):
    """|g32 - g64| <= 1e-4 |g64|, and so for the result."""
    fn, arrays = case(np.random.default_rng(seed), batch, length)
    arrays = [array.astype(np.float32) for array in arrays]
    grad = normal(seed, *result_shape(fn, arrays), dtype=np.float32)
    single = outcome(fn, arrays, grad)
    double = outcome(fn, [array.astype(np.float64) for array in arrays], grad)
    assert {x.dtype for x in single} == {np.dtype(np.float32)}
    assert {x.dtype for x in double} == {np.dtype(np.float64)}
    for a, b in [(single[:1], double[:1]), (single[1:], double[1:])]:
        a, b = (np.concatenate([x.ravel() for x in xs]) for xs in (a, b))
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-7


@every_op
@given(batch=sizes, length=sizes, seed=seeds)
def test_inputs_and_the_arriving_gradient_are_left_alone(case, batch, length, seed):
    """Work in place must stay in the op's own arrays."""
    fn, arrays = case(np.random.default_rng(seed), batch, length)
    grad = normal(seed, *result_shape(fn, arrays))
    kept = [array.copy() for array in (*arrays, grad)]
    outcome(fn, arrays, grad)
    for array, before in zip((*arrays, grad), kept):
        assert np.array_equal(array, before)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case is not embedding_case],
                         ids=[name for name in CASES if name != "embedding"])
@given(batch=st.integers(2, 4), length=sizes, seed=seeds)
def test_lines_do_not_see_each_other(case, batch, length, seed):
    """A change in the last line changes nothing in the lines before it."""
    fn, (x, *others) = case(np.random.default_rng(seed), batch, length)
    changed = x.copy()
    changed[-1] += normal(seed, *x[-1].shape)
    before, after = (fn(*map(Tensor, (first, *others))).data for first in (x, changed))
    assert np.allclose(before[:-1], after[:-1], rtol=1e-12, atol=1e-12)


# linear, embedding, rms_norm, swiglu.

@given(shapes, sizes, sizes, seeds)
def test_linear_is_a_product(lead, n, m, seed):
    x, weight = normal(seed, *lead, n), normal(seed + 1, n, m)
    assert np.allclose(F.linear(Tensor(x), Tensor(weight)).data, x @ weight, rtol=1e-12, atol=1e-12)
    assert gradcheck(F.linear, x, weight) < TOLERANCE


@given(sizes, sizes, sizes, sizes, seeds)
def test_embedding_takes_rows(vocab, width, batch, length, seed):
    rng = np.random.default_rng(seed)
    weight, ids = rng.normal(size=(vocab, width)), rng.integers(0, vocab, (batch, length))
    assert np.array_equal(F.embedding(Tensor(weight), ids).data, weight[ids])


@given(sizes, sizes, seeds)
def test_the_gradient_of_embedding_adds_up_over_repeated_ids(vocab, width, seed):
    rng = np.random.default_rng(seed)
    weight, ids = leaf(rng.normal(size=(vocab, width))), rng.integers(0, vocab, (3, 5))
    grad = rng.normal(size=(3, 5, width))
    F.embedding(weight, ids).backward(grad)
    for i in range(vocab):
        assert np.allclose(weight.grad[i], grad[ids == i].sum(axis=0), rtol=1e-12, atol=1e-12)


@given(sizes, sizes, sizes, st.sampled_from([0.0, 1e-6, 0.1]), seeds)
def test_rms_norm_is_its_formula(batch, length, width, eps, seed):
    x, weight = normal(seed, batch, length, width), normal(seed + 1, width)
    expected = x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True) + eps) * weight
    assert np.allclose(F.rms_norm(Tensor(x), Tensor(weight), eps).data, expected, rtol=1e-12)
    assert gradcheck(lambda x, weight: F.rms_norm(x, weight, 0.1), x, weight) < TOLERANCE


@given(sizes, sizes, sizes, sizes, st.sampled_from([1e-6, 0.1]), seeds)
def test_norm_linear_is_rms_norm_and_linear(batch, length, n, m, eps, seed):
    arrays = [normal(seed, batch, length, n), normal(seed + 1, n), normal(seed + 2, n, m)]
    grad = normal(seed + 3, batch, length, m)
    apart = outcome(lambda x, scale, weight: F.linear(F.rms_norm(x, scale, eps), weight), arrays,
                    grad)
    fused = outcome(lambda *inputs: F.norm_linear(*inputs, eps), arrays, grad)
    for a, b in zip(apart, fused):
        assert np.allclose(a, b, rtol=1e-9, atol=1e-9)


@given(sizes, sizes, st.floats(1e-3, 1e3), seeds)
def test_rms_norm_ignores_the_scale_of_its_input(length, width, scale, seed):
    """norm(c x) = norm(x) for c > 0, so x has no slope along itself: x . dL/dx = 0."""
    x, weight = normal(seed, 1, length, width), normal(seed + 1, width)
    grad = normal(seed + 2, 1, length, width)
    out, grad_x, _ = outcome(lambda x, w: F.rms_norm(x, w, eps=0), [x, weight], grad)
    scaled = F.rms_norm(Tensor(scale * x), Tensor(weight), eps=0).data
    assert np.allclose(scaled, out, rtol=1e-10)
    assert np.allclose((x * grad_x).sum(axis=-1), 0, atol=1e-10)


def test_rms_norm_of_zeros_is_zero():
    out, grad_x, _ = outcome(F.rms_norm, [np.zeros((1, 2, 4)), np.ones(4)], np.ones((1, 2, 4)))
    assert np.array_equal(out, np.zeros((1, 2, 4)))
    assert np.isfinite(grad_x).all()


@given(sizes, sizes, sizes, seeds)
def test_swiglu_is_its_formula(batch, length, width, seed):
    gate, up = normal(seed, batch, length, width), normal(seed + 1, batch, length, width)
    expected = gate / (1 + np.exp(-gate)) * up
    both = Tensor(np.concatenate([gate, up], axis=-1))
    assert np.allclose(F.swiglu(both).data, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", [-1e38, -1e4, -100, 100, 1e4, 1e38])
def test_swiglu_of_huge_gates(gate):
    """silu(a) tends to 0 on the left and to a on the right; its slope to 0 and to 1."""
    with np.errstate(all="raise", under="ignore"):
        out, grad = outcome(F.swiglu, [np.array([[[gate, 1]]], np.float32)],
                            np.ones((1, 1, 1), np.float32))
    assert np.allclose(out, max(gate, 0), rtol=1e-6)
    assert np.allclose(grad[..., 0], gate > 0)


# log_sigmoid.

@given(shapes, seeds)
def test_log_sigmoid_of_any_shape(shape, seed):
    x = 3 * normal(seed, *shape)
    assert np.allclose(F.log_sigmoid(Tensor(x)).data, np.log(1 / (1 + np.exp(-x))), rtol=1e-12)
    assert gradcheck(F.log_sigmoid, x) < TOLERANCE


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(1e4)
@example(-1e4)
@example(1e38)
@example(-1e38)
@example(float(np.finfo(np.float32).max))
@example(float(np.finfo(np.float32).min))
def test_log_sigmoid_of_any_float32(x):
    """Finite, its slope is sigmoid(-x), and log s(x) - log s(-x) = x. No overflow on the way."""
    with np.errstate(all="raise", under="ignore"):
        values, slopes = outcome(F.log_sigmoid, [np.array([x, -x], np.float32)],
                                 np.ones(2, np.float32))
    assert np.isfinite(values).all() and (values <= 0).all()
    assert math.isclose(values[0] - values[1], x, rel_tol=1e-6, abs_tol=1e-6)
    expected = 1 / (1 + math.exp(min(x, 700)))
    assert np.allclose(slopes, [expected, 1 - expected], rtol=1e-6, atol=1e-6)


# token_log_probs.

def all_log_probs(logits):
    """token_log_probs of every token as the target: (B, T, V)."""
    return np.stack([F.token_log_probs(Tensor(logits), np.full(logits.shape[:2], k)).data
                     for k in range(logits.shape[-1])], axis=-1)


vocabs = st.integers(2, 6)


@given(sizes, sizes, vocabs, seeds)
def test_token_log_probs_is_a_log_softmax(batch, length, vocab, seed):
    logits = 3 * normal(seed, batch, length, vocab)
    assert np.allclose(all_log_probs(logits), log_softmax(logits), rtol=1e-12, atol=1e-12)


@given(sizes, sizes, vocabs, seeds)
def test_token_log_probs_takes_each_positions_own_target(batch, length, vocab, seed):
    logits = normal(seed, batch, length, vocab)
    targets = np.random.default_rng(seed).integers(0, vocab, (batch, length))
    result, expected = F.token_log_probs(Tensor(logits), targets).data, log_softmax(logits)
    for b, t in np.ndindex(batch, length):
        assert math.isclose(result[b, t], expected[b, t, targets[b, t]], rel_tol=1e-12)


@given(sizes, vocabs, st.floats(-1e3, 1e3), seeds)
def test_a_constant_added_to_all_logits_changes_nothing(length, vocab, shift, seed):
    logits = normal(seed, 2, length, vocab)
    assert np.allclose(all_log_probs(logits + shift), all_log_probs(logits), atol=1e-9)


@given(sizes, vocabs, st.sampled_from([1, 100, 1e4, 1e38]), seeds)
def test_probabilities_sum_to_one_for_logits_of_any_size(length, vocab, size, seed):
    """In float32: values finite and at most 0, slopes at most 1, no overflow on the way."""
    logits = size * np.random.default_rng(seed).uniform(-1, 1, (2, length, vocab))
    logits = logits.astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        log_probs = all_log_probs(logits)
        _, grad = outcome(lambda x: F.token_log_probs(x, np.zeros((2, length), int)), [logits],
                          np.ones((2, length), np.float32))
    assert np.isfinite(log_probs).all() and (log_probs <= 0).all()
    assert np.allclose(np.exp(log_probs).sum(axis=-1), 1, atol=1e-5)
    assert (np.abs(grad) <= 1).all()


@given(sizes, vocabs, st.sampled_from([0.0, 1.0, -1e4, 1e30]))
def test_equal_logits_are_uniform(length, vocab, value):
    logits = np.full((1, length, vocab), value, np.float32)
    assert np.allclose(all_log_probs(logits), -math.log(vocab), rtol=1e-6)


@given(sizes, vocabs, seeds)
def test_the_gradient_of_a_position_sums_to_zero(length, vocab, seed):
    """Of sum_k (delta_jk - p_j) g: what goes to the target comes from the others."""
    targets = np.random.default_rng(seed).integers(0, vocab, (2, length))
    _, grad = outcome(lambda x: F.token_log_probs(x, targets), [normal(seed, 2, length, vocab)],
                      normal(seed + 1, 2, length))
    assert np.allclose(grad.sum(axis=-1), 0, atol=1e-12)


# causal_attention.

def rotate(x, position, base):
    """RoPE, rotate-half: the pair (x_i, x_{i + d/2}) turned by position * base^(-2i/d)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def naive_attention(qkv, n_heads, base):
    batch, length, width = qkv.shape
    q, k, v = qkv.reshape(batch, length, 3, n_heads, -1).transpose(2, 0, 3, 1, 4)  # (B, H, T, d)
    out = np.empty_like(q)
    for b, h, i in np.ndindex(q.shape[:3]):
        query = rotate(q[b, h, i], i, base)
        scores = [query @ rotate(k[b, h, j], j, base) / math.sqrt(len(query))
                  for j in range(i + 1)]
        weights = np.exp(scores) / np.exp(scores).sum()
        out[b, h, i] = sum(weight * v[b, h, j] for j, weight in enumerate(weights))
    return out.transpose(0, 2, 1, 3).reshape(batch, length, width // 3)


heads = st.integers(1, 3)
head_sizes = st.sampled_from([2, 4, 6])


def random_qkv(seed, batch, length, n_heads, head, dtype=np.float64):
    return normal(seed, batch, length, 3 * n_heads * head, dtype=dtype)


def attend(qkv, n_heads, cache=None, **options):
    if cache:
        return F.cached_attention(Tensor(qkv), n_heads, cache, **options).data
    return F.causal_attention(Tensor(qkv), n_heads, **options).data


@given(sizes, st.integers(1, 6), heads, head_sizes, st.sampled_from([10000.0, 10.0]), seeds)
def test_attention_is_its_formula(batch, length, n_heads, head, base, seed):
    qkv = random_qkv(seed, batch, length, n_heads, head)
    assert np.allclose(attend(qkv, n_heads, rope_base=base), naive_attention(qkv, n_heads, base),
                       rtol=1e-10, atol=1e-12)


@given(st.integers(2, 8), st.data(), heads, head_sizes, seeds)
def test_a_later_token_never_changes_an_earlier_output(length, draw, n_heads, head, seed):
    """Not even in the last bit."""
    at = draw.draw(st.integers(1, length - 1), label="first changed position")
    qkv = random_qkv(seed, 2, length, n_heads, head, np.float32)
    changed = qkv.copy()
    changed[:, at:] = 100 * random_qkv(seed + 1, 2, length - at, n_heads, head, np.float32)
    before, after = attend(qkv, n_heads), attend(changed, n_heads)
    assert np.array_equal(before[:, :at], after[:, :at])
    assert not np.array_equal(before[:, at:], after[:, at:])


@given(st.integers(2, 8), st.data(), heads, head_sizes, seeds)
def test_no_gradient_flows_back_in_time(length, draw, n_heads, head, seed):
    """What earlier outputs are worth gives later tokens a gradient of exactly 0."""
    at = draw.draw(st.integers(1, length - 1), label="first position without a gradient")
    qkv = random_qkv(seed, 2, length, n_heads, head, np.float32)
    grad = normal(seed + 1, 2, length, n_heads * head, dtype=np.float32)
    grad[:, at:] = 0
    _, grad_qkv = outcome(lambda x: F.causal_attention(x, n_heads), [qkv], grad)
    assert not grad_qkv[:, at:].any()
    assert grad_qkv[:, :at].any()


@given(sizes, sizes, heads, head_sizes, seeds)
def test_padding_on_the_right_changes_nothing(length, padding, n_heads, head, seed):
    qkv = random_qkv(seed, 2, length + padding, n_heads, head)
    assert np.allclose(attend(qkv, n_heads)[:, :length], attend(qkv[:, :length], n_heads),
                       rtol=1e-12, atol=1e-12)


@given(sizes, heads, head_sizes, seeds)
def test_a_single_position_attends_to_itself(batch, n_heads, head, seed):
    qkv = random_qkv(seed, batch, 1, n_heads, head)
    assert np.array_equal(attend(qkv, n_heads), qkv[..., 2 * n_heads * head:])


@given(st.integers(2, 8), seeds)
def test_scores_depend_on_the_distance_alone(length, seed):
    """With one query and one key for all positions, S_ij is a function of i - j.

    Values that are unit vectors make the output the attention's probabilities themselves, and then
    log P_ij - log P_ii = S_ij - S_ii, which must be constant along each diagonal.
    """
    head = 8
    qkv = np.empty((1, length, 3 * head))
    qkv[..., :head], qkv[..., head:2 * head] = normal(seed, head), normal(seed + 1, head)
    qkv[..., 2 * head:] = np.eye(length, head)
    probs = attend(qkv, 1)[0, :, :length]  # (T, T): row i over keys j
    assert np.allclose(probs.sum(axis=1), 1)
    for distance in range(1, length):
        difference = np.log(np.diagonal(probs, -distance) / np.diagonal(probs)[distance:])
        assert np.allclose(difference, difference[0], atol=1e-9)
        assert abs(difference[0]) > 1e-12  # positions do count


@given(st.integers(2, 6), heads, head_sizes, seeds)
def test_huge_scores_do_not_overflow(length, n_heads, head, seed):
    """Scores of 1e6 and more: the softmax becomes a choice, and stays finite."""
    qkv = 1e4 * random_qkv(seed, 2, length, n_heads, head, np.float32)
    with np.errstate(all="raise", under="ignore"):
        out, grad = outcome(lambda x: F.causal_attention(x, n_heads), [qkv],
                            np.ones((2, length, n_heads * head), np.float32))
    assert np.isfinite(out).all() and np.isfinite(grad).all()


# KeyValueCache.

@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 2), heads, head_sizes,
       seeds)
def test_attention_piece_by_piece_is_attention_of_the_whole(pieces, room, n_heads, head, seed):
    length = sum(pieces)
    qkv = random_qkv(seed, 2, length, n_heads, head)
    cache = F.KeyValueCache(length + room)
    with no_grad():
        parts = [attend(piece, n_heads, cache=cache)
                 for piece in np.split(qkv, np.cumsum(pieces)[:-1], axis=1)]
    assert cache.length == length
    assert np.allclose(np.concatenate(parts, axis=1), attend(qkv, n_heads), rtol=1e-12, atol=1e-12)


def test_a_cache_takes_scores_of_any_size_line_by_line():
    """One line's scores are near 0, the other's near 1e4: no exp overflows, no line vanishes."""
    qkv = random_qkv(0, 2, 5, 2, 4).astype(np.float32)
    qkv[1] *= 100
    with np.errstate(over="raise", invalid="raise"), no_grad():
        out = attend(qkv, 2, cache=F.KeyValueCache(5))
    assert np.allclose(out, attend(qkv, 2), rtol=1e-4, atol=1e-4)


def test_attention_with_a_cache_has_no_gradient():
    with pytest.raises(RuntimeError, match="no_grad"):
        F.cached_attention(leaf(random_qkv(0, 1, 2, 2, 4)), 2, F.KeyValueCache(3))


def test_a_cache_keeps_the_dtype():
    """Keys in float64 would double the memory and make all that follows float64."""
    cache = F.KeyValueCache(3)
    with no_grad():
        out = attend(random_qkv(0, 1, 2, 2, 4).astype(np.float32), 2, cache=cache)
    assert out.dtype == cache.keys.dtype == cache.values.dtype == np.float32


@given(st.lists(st.booleans(), min_size=1, max_size=5).filter(any), sizes, sizes, seeds)
def test_a_cache_keeps_the_chosen_lines(rows, before, after, seed):
    rows = np.array(rows)
    qkv = random_qkv(seed, len(rows), before + after, 2, 4)
    cache = F.KeyValueCache(before + after)
    with no_grad():
        attend(qkv[:, :before], 2, cache=cache)
        cache.keep(rows)
        rest = attend(qkv[rows, before:], 2, cache=cache)
    assert np.allclose(rest, attend(qkv, 2)[rows, before:], rtol=1e-12, atol=1e-12)
