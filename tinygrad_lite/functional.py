"""The fused ops a Transformer needs: one node on the tape each, its gradient derived by hand.

Shapes are the usual (..., D). In memory, though, results lie features first: a (D, N) matrix with
one column for each of the N = B T positions. Sums over features, halves of features and factors for
each position are then long contiguous rows, which NumPy works through several times as fast as
through short ones. The formulas are in columns, too (y = W^T x), but for attention's, in rows.
"""
import math
from functools import lru_cache

import numpy as np

from .tensor import Tensor


def _columns(array):
    """(..., D) as (D, N): a view of whatever lies features first, else a copy."""
    return array.transpose(-1, *range(array.ndim - 1)).reshape(array.shape[-1], -1)


def _from_columns(columns, shape):
    """The inverse of `_columns`: (D, N), or D and N cut finer, as a view of the shape (..., D)."""
    return columns.reshape(shape[-1], *shape[:-1]).transpose(*range(1, len(shape)), 0)


def linear(x, weight):
    """x @ weight: (..., n), (n, m) -> (..., m).

    In columns y = W^T x, so dL/dx = W dL/dy and dL/dW = x (dL/dy)^T.
    """
    columns = _columns(x.data)  # (n, N): one large product, not one for each line

    def backward(grad):
        grad = _columns(grad)  # (m, N)
        return _from_columns(weight.data @ grad, x.shape), (grad @ columns.T).T
    out = _from_columns(weight.data.T @ columns, (*x.shape[:-1], weight.shape[1]))
    return Tensor(out, parents=(x, weight), backward=backward)


def embedding(weight, ids):
    """Row ids[b, t] of weight: (V, D), int (B, T) -> (B, T, D).

    As y = W^T onehot, dL/dW = onehot (dL/dy)^T: a product, far faster than scattered additions.
    """
    def backward(grad):
        onehot = np.zeros((weight.shape[0], ids.size), weight.dtype)  # (V, N)
        onehot[ids.ravel(), np.arange(ids.size)] = 1
        return (onehot @ _columns(grad).T,)
    out = weight.data.T.take(ids, axis=1)  # (D, B, T)
    return Tensor(out.transpose(1, 2, 0), parents=(weight,), backward=backward)


def rms_norm(x, weight, eps=1e-6):
    """x / rms(x) * weight over the last axis, rms(x) = sqrt(mean(x^2) + eps): (..., D) -> (..., D).

    Zhang & Sennrich 2019, Eq. 4. Let n = x / rms and g = dL/dy s, where y = n s (s: weight). As
    d rms / dx_j = x_j / (D rms), dn_i / dx_j = (delta_ij - n_i n_j / D) / rms. Therefore
        dL/dx = (g - n mean(g n)) / rms        dL/ds = sum over positions of dL/dy n
    """
    scale = weight.data[:, None]  # s: (D, 1)
    normed, inverse_rms = _normed(_columns(x.data), eps)  # n: (D, N), 1 / rms: (N,)

    def backward(grad):
        grad = _columns(grad)
        grad_x = _normed_backward(grad * scale, normed, inverse_rms)
        return _from_columns(grad_x, x.shape), np.einsum("dn,dn->d", grad, normed)
    out = _from_columns(normed * scale, x.shape)
    return Tensor(out, parents=(x, weight), backward=backward)


def norm_linear(x, scale, weight, eps=1e-6):
    """linear(rms_norm(x, scale), weight) with three passes less over (D, N): (..., D) -> (..., m).

    In columns W^T (s n) = M^T n with M_ij = s_i W_ij: the scale goes into the small matrix. Then
        dL/dM = n (dL/dy)^T      dL/dW_ij = s_i dL/dM_ij      dL/ds_i = sum over j of W_ij dL/dM_ij
    and dL/dx is that of rms_norm with g = M dL/dy.
    """
    normed, inverse_rms = _normed(_columns(x.data), eps)  # n: (D, N), 1 / rms: (N,)
    scaled = scale.data[:, None] * weight.data  # M

    def backward(grad):
        grad = _columns(grad)  # (m, N)
        grad_scaled = (grad @ normed.T).T
        grad_x = _normed_backward(scaled @ grad, normed, inverse_rms)
        return (_from_columns(grad_x, x.shape), (weight.data * grad_scaled).sum(axis=1),
                scale.data[:, None] * grad_scaled)
    out = _from_columns(scaled.T @ normed, (*x.shape[:-1], weight.shape[1]))
    return Tensor(out, parents=(x, scale, weight), backward=backward)


def _normed(columns, eps):
    """x / rms(x) and 1 / rms(x) of columns (D, N)."""
    inverse_rms = 1 / np.sqrt(np.einsum("dn,dn->n", columns, columns) / len(columns) + eps)
    return columns * inverse_rms, inverse_rms


def _normed_backward(grad, normed, inverse_rms):
    """From g to (g - n mean(g n)) / rms, in g's array."""
    grad -= normed * (np.einsum("dn,dn->n", grad, normed) / len(grad))
    grad *= inverse_rms
    return grad


def swiglu(gate_up):
    """silu(gate) * up of the two halves [gate | up] of the last axis: (..., 2F) -> (..., F).

    Shazeer 2020, Eq. 5 without biases; silu(a) = a s, s = sigmoid(a). As ds/da = s (1 - s), and
    with g = dL/dy,
        dL/dup = g silu(gate)        dL/dgate = g up (s + silu(gate) (1 - s))
    """
    gate, up = np.split(_columns(gate_up.data), 2)  # (F, N) each
    sigmoid = 0.5 * np.tanh(0.5 * gate) + 0.5  # is 1 / (1 + exp(-gate)), without its overflow
    silu = gate * sigmoid

    def backward(grad):
        grad, out = _columns(grad), np.empty((2, *gate.shape), gate.dtype)
        np.multiply(((1 - sigmoid) * silu + sigmoid) * up, grad, out=out[0])
        np.multiply(grad, silu, out=out[1])
        return (_from_columns(out, gate_up.shape),)
    out = _from_columns(silu * up, (*gate_up.shape[:-1], len(up)))
    return Tensor(out, parents=(gate_up,), backward=backward)


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)): any shape, finite for finite x.

    d/dx = sigmoid(-x), and log sigmoid(-x) = log sigmoid(x) - x.
    """
    out = np.minimum(x.data, 0) - np.log1p(np.exp(-np.abs(x.data)))
    return Tensor(out, parents=(x,), backward=lambda grad: (grad * np.exp(out - x.data),))


def token_log_probs(logits, targets):
    """log softmax(logits) at the targets: (B, T, V), int (B, T) -> (B, T).

    With logits z and p = softmax(z), log p_k = z_k - log sum_j exp z_j. So
    d(log p_k)/dz_j = delta_jk - p_j.
    """
    columns, at = _columns(logits.data), (targets.ravel(), np.arange(targets.size))  # (V, N)
    shifted = columns - columns.max(axis=0)
    probs = np.exp(shifted)
    total = probs.sum(axis=0)  # (N,)
    probs /= total

    def backward(grad):
        grad = grad.reshape(-1)  # (N,)
        grad_logits = probs * -grad
        grad_logits[at] += grad
        return (_from_columns(grad_logits, logits.shape),)
    out = (shifted[at] - np.log(total)).reshape(targets.shape)
    return Tensor(out, parents=(logits,), backward=backward)


def causal_attention(qkv, n_heads, rope_base=10000.0):
    """Rotary causal attention: (B, T, 3D) = [q | k | v], heads side by side in each -> (B, T, D).

    Vaswani et al. 2017, Eq. 1, with R_t the rotation of position t (Su et al. 2021, Eq. 34, but
    feature i turns with i + d / 2). For one head of width d and j <= i, `*` elementwise:
        S_ij = (R_i q_i) . (R_j k_j) / sqrt(d)   E = exp(S - max)   s_i = sum_j E_ij   O = E V / s
    The softmax P = E / s is never formed: E has T columns, O only d. Backward, with G = dL/dO:
        dL/dV = E^T (G / s)      dL/dP = G V^T      dL/dS = P * (dL/dP - c), c_i = sum_j (P * dL/dP)
        c_i = sum_j P_ij G_i . v_j = G_i . O_i      so dL/dS = E * ((G / s) V^T - (G / s) . O)
        dL/d(Rq) = dL/dS (Rk) / sqrt(d)             dL/d(Rk) = dL/dS^T (Rq) / sqrt(d)
    and R^T = R^-1 turns these back.
    """
    batch, length, width = qkv.shape  # B, T, 3D
    head = width // 3 // n_heads  # d
    heads = _columns(qkv.data).reshape(3, n_heads, head, batch, length)  # (3, H, d, B, T)
    cos, sin = _rope_tables(head, 0, batch, length, rope_base, qkv.dtype)  # q's hold 1 / sqrt(d)
    rotated = _rotate(heads[:2], cos, sin)
    q, k, v = (_matrices(x) for x in (*rotated, heads[2]))  # (H, B, T, d) each
    scores, score_matrices = _score_arrays(n_heads, batch, length, qkv.dtype)  # S, to become E
    np.matmul(q, k.swapaxes(-1, -2), out=score_matrices)
    scores += _causal_mask(length, n_heads * batch, qkv.dtype)
    scores -= scores.max(axis=0)
    np.exp(scores, out=scores)
    total = scores.sum(axis=0).reshape(n_heads, 1, batch, length)  # s
    out = np.empty((n_heads, head, batch, length), qkv.dtype)
    np.matmul(score_matrices, v, out=_matrices(out))
    out /= total

    def backward(grad):
        grad = _columns(grad).reshape(out.shape) / total  # G / s
        grad_heads, grad_rotated = np.empty_like(heads), np.empty_like(rotated)
        grad_scores, grad_matrices = _score_arrays(n_heads, batch, length, qkv.dtype)  # dL/dS
        np.matmul(score_matrices.swapaxes(-1, -2), _matrices(grad), out=_matrices(grad_heads[2]))
        np.matmul(_matrices(grad), v.swapaxes(-1, -2), out=grad_matrices)
        grad_scores -= np.einsum("hdbt,hdbt->hbt", grad, out).reshape(-1)
        grad_scores *= scores
        np.matmul(grad_matrices, k, out=_matrices(grad_rotated[0]))
        np.matmul(grad_matrices.swapaxes(-1, -2), q, out=_matrices(grad_rotated[1]))
        grad_heads[:2] = _rotate(grad_rotated, cos, -sin)
        return (_from_columns(grad_heads, qkv.shape),)
    return Tensor(_from_columns(out, (batch, length, -1)), parents=(qkv,), backward=backward)


def cached_attention(qkv, n_heads, cache, rope_base=10000.0):
    """causal_attention for positions that follow those in `cache`, a KeyValueCache, under no_grad.

    One query at a time. Its scores are one einsum over all lines and heads; as products of matrices
    they would be a call for each line and head. Raises RuntimeError where a gradient is wanted.
    """
    if qkv.requires_grad:
        raise RuntimeError("cached_attention has no gradient; call it under no_grad()")
    batch, length, width = qkv.shape
    head = width // 3 // n_heads
    heads = _columns(qkv.data).reshape(3, n_heads, head, batch, length)
    q, k = _rotate(heads[:2], *_rope_tables(head, cache.length, batch, length, rope_base,
                                            qkv.dtype))
    out = np.empty((n_heads, head, batch, length), qkv.dtype)
    for t in range(length):
        keys, values = cache.extend(k[..., t], heads[2, ..., t])  # (j, H, d, B): to this position
        weights = np.einsum("hdb,jhdb->jhb", q[..., t], keys)
        weights -= weights.max(axis=0)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=0)
        out[..., t] = np.einsum("jhb,jhdb->hdb", weights, values)
    return Tensor(_from_columns(out, (batch, length, -1)))


def _matrices(x):
    """(H, d, B, T) as a view (H, B, T, d)."""
    return x.transpose(0, 2, 3, 1)


def _score_arrays(n_heads, batch, length, dtype):
    """A new array (T keys, H B T queries), and a view of it (H, B, T, T) with the keys last.

    Softmax then sums whole rows. 16 unused numbers keep these apart: rows at a distance of exactly
    some 4 kB would push each other out of the processor's cache.
    """
    rows = np.empty((length, n_heads * batch * length + 16), dtype)[:, :-16]
    return rows, rows.reshape(length, n_heads, batch, length).transpose(1, 2, 3, 0)


@lru_cache(maxsize=64)
def _causal_mask(length, times, dtype):
    """-inf where key j lies after query i, j > i, else 0, side by side: (T, times T)."""
    return np.tile(np.tril(np.full((length, length), -np.inf, dtype), -1), times)


@lru_cache(maxsize=64)
def _rope_tables(head, past, batch, length, base, dtype):
    """cos and sin of position * base^(-2i / d) in row i, for every position: (2, 1, d/2, B T) each.

    The first of the two, for q, is divided by sqrt(d): it costs nothing here.
    """
    frequencies = base ** (-np.arange(0, head, 2) / head)
    angle = frequencies[:, None] * np.arange(past, past + length)  # (d/2, T)
    scale = np.array([1 / math.sqrt(head), 1.0]).reshape(2, 1, 1, 1)
    return [np.tile((scale * table).astype(dtype), batch)
            for table in (np.cos(angle), np.sin(angle))]


def _rotate(x, cos, sin):
    """Halves (a, b) of each head become (a cos - b sin, b cos + a sin): (2, H, d, B, T) -> same."""
    halves = x.reshape(*x.shape[:2], 2, *cos.shape[2:])  # (2, H, 2, d/2, B T)
    a, b = halves[:, :, 0], halves[:, :, 1]
    out = np.empty_like(halves)
    np.subtract(a * cos, b * sin, out=out[:, :, 0])
    np.add(b * cos, a * sin, out=out[:, :, 1])
    return out.reshape(x.shape)


class KeyValueCache:
    """The rotated keys and the values of the positions one attention layer has seen.

    `keys` and `values` have shape (max_len, H, d, B); the first `length` positions are filled.
    """

    def __init__(self, max_len):
        self.max_len, self.length, self.keys, self.values = max_len, 0, None, None

    def extend(self, key, value):
        """Store a position's key and value (H, d, B); return all so far: (length, H, d, B) each."""
        if self.keys is None:
            self.keys, self.values = np.empty((2, self.max_len, *key.shape), key.dtype)
        self.keys[self.length], self.values[self.length] = key, value
        self.length += 1
        return self.keys[:self.length], self.values[:self.length]

    def keep(self, rows):
        """Drop all lines but those at `rows`, a boolean (B,)."""
        self.keys, self.values = self.keys[..., rows], self.values[..., rows]
