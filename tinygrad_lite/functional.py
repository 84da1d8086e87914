"""The fused ops a Transformer needs: one node on the tape each, its gradient derived by hand.

Shapes are the usual (..., D). In memory, though, results lie features first: a (D, N) matrix with
one column for each of the N = B T positions. Sums over features, halves of features and factors for
each position are then long contiguous rows, which NumPy works through several times as fast as
through short ones. The formulas are in columns, too: y = W^T x.
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

    Zhang & Sennrich 2019, Eq. 4. Let n = x / rms and g = dL/dy w, where y = n w. Since
    d rms / dx_j = x_j / (D rms), dn_i / dx_j = (delta_ij - n_i n_j / D) / rms. Therefore
        dL/dx = (g - n mean(g n)) / rms        dL/dw = sum over positions of dL/dy n
    """
    columns, scale = _columns(x.data), weight.data[:, None]  # (D, N), (D, 1)
    size = len(columns)
    inverse_rms = 1 / np.sqrt(np.einsum("dn,dn->n", columns, columns) / size + eps)  # (N,)
    normed = columns * inverse_rms

    def backward(grad):
        grad = _columns(grad)
        grad_weight = np.einsum("dn,dn->d", grad, normed)
        grad_x = grad * scale
        grad_x -= normed * (np.einsum("dn,dn->n", grad_x, normed) / size)
        grad_x *= inverse_rms
        return _from_columns(grad_x, x.shape), grad_weight
    out = _from_columns(normed * scale, x.shape)
    return Tensor(out, parents=(x, weight), backward=backward)


def swiglu(gate_up):
    """silu(gate) * up of the two halves [gate | up] of the last axis: (..., 2F) -> (..., F).

    Shazeer 2020, Eq. 6, with silu(a) = a s and s = sigmoid(a). As ds/da = s (1 - s), and g = dL/dy,
        dL/dup = g silu(gate)        dL/dgate = g up (s + silu(gate) (1 - s))
    """
    columns = _columns(gate_up.data)  # (2F, N)
    size = len(columns) // 2
    gate, up = columns[:size], columns[size:]
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid

    def backward(grad):
        grad, out = _columns(grad), np.empty_like(columns)
        grad_gate, grad_up = out[:size], out[size:]
        np.multiply(grad, silu, out=grad_up)
        np.subtract(1, sigmoid, out=grad_gate)
        grad_gate *= silu
        grad_gate += sigmoid
        grad_gate *= up
        grad_gate *= grad
        return (_from_columns(out, gate_up.shape),)
    out = _from_columns(silu * up, (*gate_up.shape[:-1], size))
    return Tensor(out, parents=(gate_up,), backward=backward)


def _sigmoid(x):
    """1 / (1 + exp(-x)) as (1 + tanh(x / 2)) / 2, which cannot overflow."""
    out = x * 0.5
    np.tanh(out, out=out)
    out += 1
    out *= 0.5
    return out


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)): any shape, finite for finite x.

    d/dx = sigmoid(-x), and log sigmoid(-x) = log sigmoid(x) - x.
    """
    out = np.minimum(x.data, 0) - np.log1p(np.exp(-np.abs(x.data)))
    return Tensor(out, parents=(x,), backward=lambda grad: (grad * np.exp(out - x.data),))


def token_log_probs(logits, targets):
    """log softmax(logits) at the targets: (B, T, V), int (B, T) -> (B, T).

    log p_k = z_k - log sum_j exp z_j, so d(log p_k)/dz_j = delta_jk - p_j.
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


def causal_attention(qkv, n_heads, rope_base=10000.0, cache=None):
    """Rotary causal attention: (B, T, 3D) = [q | k | v], heads side by side in each -> (B, T, D).

    Vaswani et al. 2017, Eq. 1, with R_t the rotation of position t (Su et al. 2021, Eq. 34, but
    feature i turns with i + d / 2). For one head of width d and j <= i, `*` elementwise:
        S_ij = (R_i q_i) . (R_j k_j) / sqrt(d)        P = softmax of S over j        O = P V
    Backward, with G = dL/dO:
        dL/dV = P^T G        dL/dP = G V^T        dL/dS = P * (dL/dP - sum over j of P * dL/dP)
        dL/d(Rq) = dL/dS (Rk) / sqrt(d)           dL/d(Rk) = dL/dS^T (Rq) / sqrt(d)
    and R^T = R^-1 turns these back. `cache`, a KeyValueCache of earlier positions, is for no_grad.
    """
    batch, length, width = qkv.shape  # B, T, 3D
    head, past = width // 3 // n_heads, cache.length if cache else 0
    heads = _columns(qkv.data).reshape(3, n_heads, head, batch, length)  # (3, H, d, B, T)
    cos, sin = _rope_tables(head // 2, past, batch, length, rope_base, qkv.dtype)
    rotated = _rotate(heads[:2], cos, sin)
    rotated[0] *= 1 / math.sqrt(head)  # on q, which is smaller than S
    q, k, v = (_matrices(x) for x in (*rotated, heads[2]))  # (B, H, T, d) each
    if cache:
        k, v = cache.extend(k, v)  # (B, H, past + T, d)
    probs = np.empty((past + length, batch, n_heads, length), qkv.dtype)  # keys first: long rows
    np.matmul(q, k.swapaxes(-1, -2), out=_keys_last(probs))
    if length > 1:
        probs += _causal_mask(past, length, batch * n_heads, qkv.dtype).reshape(probs.shape)
    probs -= probs.max(axis=0)
    np.exp(probs, out=probs)
    probs /= probs.sum(axis=0)
    out = np.empty((n_heads, head, batch, length), qkv.dtype)
    np.matmul(_keys_last(probs), v, out=_matrices(out))

    def backward(grad):
        grad = _matrices(_columns(grad).reshape(out.shape))  # (B, H, T, d)
        grad_heads, grad_rotated = np.empty_like(heads), np.empty_like(rotated)
        grad_scores = np.empty_like(probs)
        np.matmul(_keys_last(probs).swapaxes(-1, -2), grad, out=_matrices(grad_heads[2]))
        np.matmul(grad, v.swapaxes(-1, -2), out=_keys_last(grad_scores))  # dL/dP, to become dL/dS
        grad_scores -= (probs * grad_scores).sum(axis=0)
        grad_scores *= probs
        np.matmul(_keys_last(grad_scores), k, out=_matrices(grad_rotated[0]))
        np.matmul(_keys_last(grad_scores).swapaxes(-1, -2), q, out=_matrices(grad_rotated[1]))
        grad_rotated[0] *= 1 / math.sqrt(head)
        grad_heads[:2] = _rotate(grad_rotated, cos, -sin)
        return (_from_columns(grad_heads, qkv.shape),)
    shaped = _from_columns(out, (batch, length, width // 3))
    return Tensor(shaped, parents=(qkv,), backward=backward)


def _matrices(x):
    """(H, d, B, T) as a view (B, H, T, d)."""
    return x.transpose(2, 0, 3, 1)


def _keys_last(scores):
    """(keys, B, H, T) as a view (B, H, T, keys)."""
    return scores.transpose(1, 2, 3, 0)


@lru_cache(maxsize=64)
def _causal_mask(past, length, rows, dtype):
    """-inf where key j lies after query i, j > past + i, else 0: (past + T, rows T)."""
    return np.tile(np.tril(np.full((past + length, length), -np.inf, dtype), -1 - past), rows)


@lru_cache(maxsize=64)
def _rope_tables(half, past, batch, length, base, dtype):
    """cos and sin of position * base^(-i / half) in row i, for every position: (half, B T) each."""
    frequency = base ** (-np.arange(half) / half)
    angle = frequency[:, None, None] * np.arange(past, past + length)  # (half, 1, T)
    return [np.broadcast_to(table.astype(dtype), (half, batch, length)).reshape(half, -1)
            for table in (np.cos(angle), np.sin(angle))]


def _rotate(x, cos, sin):
    """Halves (a, b) of each head become (a cos - b sin, b cos + a sin): (2, H, d, B, T) -> same."""
    halves = x.reshape(*x.shape[:2], 2, *cos.shape)  # (2, H, 2, d/2, B T)
    a, b = halves[:, :, 0], halves[:, :, 1]
    out = np.empty_like(halves)
    np.subtract(a * cos, b * sin, out=out[:, :, 0])
    np.add(b * cos, a * sin, out=out[:, :, 1])
    return out.reshape(x.shape)


class KeyValueCache:
    """The rotated keys and the values of the positions one attention layer has seen.

    `keys` and `values` have shape (B, H, max_len, d); the first `length` positions are filled.
    """

    def __init__(self, max_len):
        self.max_len, self.length, self.keys, self.values = max_len, 0, None, None

    def extend(self, k, v):
        """Store k and v (B, H, T, d) behind what is there; return all: (B, H, length, d) each."""
        if self.keys is None:
            batch, heads, _, head = k.shape
            self.keys, self.values = np.empty((2, batch, heads, self.max_len, head), k.dtype)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start:self.length] = k
        self.values[:, :, start:self.length] = v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def keep(self, rows):
        """Drop all lines but those at `rows`, a boolean (B,)."""
        self.keys, self.values = self.keys[rows], self.values[rows]
