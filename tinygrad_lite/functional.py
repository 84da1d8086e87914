"""The fused ops a Transformer needs: one node on the tape each, with the gradient derived by hand."""
import math
from functools import lru_cache

import numpy as np

from .tensor import Tensor


def linear(x, weight):
    """x @ weight: (..., n), (n, m) -> (..., m).

    With y = x W over N rows: dL/dx = dL/dy W^T and dL/dW = x^T dL/dy.
    """
    rows = x.data.reshape(-1, weight.shape[0])  # (N, n): one large product, not one for each line

    def backward(grad):
        grad = grad.reshape(-1, weight.shape[1])  # (N, m)
        return (grad @ weight.data.T).reshape(x.shape), rows.T @ grad
    out = rows @ weight.data
    return Tensor(out.reshape(*x.shape[:-1], -1), parents=(x, weight), backward=backward)


def embedding(weight, ids):
    """Row ids[b, t] of weight: (V, D), int (B, T) -> (B, T, D).

    As y = onehot(ids) W, dL/dW = onehot(ids)^T dL/dy: a product, twenty times as fast as scattered adds.
    """
    def backward(grad):
        onehot = np.zeros((ids.size, weight.shape[0]), weight.dtype)  # (N, V)
        onehot[np.arange(ids.size), ids.ravel()] = 1
        return (onehot.T @ grad.reshape(ids.size, -1),)
    return Tensor(weight.data[ids], parents=(weight,), backward=backward)


def rms_norm(x, weight, eps=1e-6):
    """x / rms(x) * weight over the last axis, rms(x) = sqrt(mean(x^2) + eps): (..., D), (D,) -> (..., D).

    Zhang & Sennrich 2019, Eq. 4. Backward: let n = x / rms, y = n w, g = dL/dy * w. Since
    d rms / dx_j = x_j / (D rms), dn_i/dx_j = (delta_ij - n_i n_j / D) / rms, so
        dL/dx = (g - n * mean(g n)) / rms        dL/dw = sum over rows of dL/dy * n
    """
    size = x.shape[-1]
    rows = x.data.reshape(-1, size)  # (N, D)
    inverse_rms = 1 / np.sqrt(np.einsum("nd,nd->n", rows, rows)[:, None] / size + eps)  # (N, 1)
    normed = rows * inverse_rms

    def backward(grad):
        grad = grad.reshape(-1, size)
        grad_weight = np.einsum("nd,nd->d", grad, normed)
        grad_x = grad * weight.data
        grad_x -= normed * (np.einsum("nd,nd->n", grad_x, normed)[:, None] / size)
        grad_x *= inverse_rms
        return grad_x.reshape(x.shape), grad_weight
    return Tensor((normed * weight.data).reshape(x.shape), parents=(x, weight), backward=backward)


def swiglu(gate_up):
    """silu(gate) * up of the two halves [gate | up] of the last axis: (..., 2F) -> (..., F).

    Shazeer 2020, Eq. 6, with silu(a) = a s(a) and s = sigmoid. As ds/da = s (1 - s),
        dL/dup = g silu(gate)        dL/dgate = g up s (1 + gate (1 - s))
    """
    size = gate_up.shape[-1] // 2
    gate, up = gate_up.data[..., :size], gate_up.data[..., size:]
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid

    def backward(grad):
        out = np.empty_like(gate_up.data)
        grad_gate, grad_up = out[..., :size], out[..., size:]
        np.multiply(grad, silu, out=grad_up)
        np.subtract(1, sigmoid, out=grad_gate)
        grad_gate *= silu
        grad_gate += sigmoid  # s + gate s (1 - s)
        grad_gate *= up
        grad_gate *= grad
        return (out,)
    return Tensor(silu * up, parents=(gate_up,), backward=backward)


def _sigmoid(x):
    """1 / (1 + exp(-x)) as (1 + tanh(x / 2)) / 2, which cannot overflow."""
    out = np.tanh(x * 0.5)
    out += 1
    out *= 0.5
    return out


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)): any shape, finite for any finite x.

    d/dx = sigmoid(-x).
    """
    def backward(grad):
        return (grad * _sigmoid(-x.data),)
    out = np.minimum(x.data, 0) - np.log1p(np.exp(-np.abs(x.data)))
    return Tensor(out, parents=(x,), backward=backward)


def token_log_probs(logits, targets):
    """log softmax(logits) at the targets: (B, T, V), int (B, T) -> (B, T).

    log p_k = z_k - log sum_j exp z_j, so d(log p_k)/dz_j = delta_jk - p_j.
    """
    vocab = logits.shape[-1]
    targets, at = targets.ravel(), np.arange(targets.size)
    shifted = logits.data.reshape(-1, vocab)  # (N, V)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    probs = np.exp(shifted)
    total = probs.sum(axis=1, keepdims=True)  # (N, 1)
    probs /= total
    out = shifted[at, targets] - np.log(total[:, 0])

    def backward(grad):
        grad = grad.reshape(-1, 1)
        grad_logits = probs * -grad
        grad_logits[at, targets] += grad[:, 0]
        return (grad_logits.reshape(logits.shape),)
    return Tensor(out.reshape(logits.shape[:-1]), parents=(logits,), backward=backward)


def causal_attention(qkv, n_heads, rope_base=10000.0, cache=None):
    """Rotary causal self-attention: (B, T, 3D) = [q | k | v], heads side by side in each -> (B, T, D).

    For one head, with R_t the rotation of position t (Su et al. 2021, Eq. 34) and d its width:
        S_ij = (R_i q_i) . (R_j k_j) / sqrt(d) for j <= i        P = softmax over j of S        O = P V
    Vaswani et al. 2017, Eq. 1. Backward, with G = dL/dO:
        dL/dV = P^T G                                 dL/dP = G V^T
        dL/dS = P * (dL/dP - rowsum(P * dL/dP))       softmax, as in token_log_probs, for each row
        dL/d(Rq) = dL/dS K / sqrt(d)                  dL/d(Rk) = dL/dS^T Q / sqrt(d), then R^T = R^-1 undoes R

    `cache`, a KeyValueCache, prepends the keys and values of earlier positions, and stores these; use it
    inside no_grad.
    """
    batch, length, width = qkv.shape
    head = width // 3 // n_heads
    past = cache.length if cache else 0
    cos, low, high = _rope_tables(past, length, n_heads, head, rope_base, qkv.dtype)
    rotated = _rotate(qkv.data, head // 2, cos, low, high)  # (B, T, 3D), v unchanged
    q, k, v = rotated.reshape(batch, length, 3, n_heads, head).transpose(2, 0, 3, 1, 4)  # (B, H, T, d) each
    if cache:
        k, v = cache.extend(k, v)  # (B, H, past + T, d)
    probs = q @ k.swapaxes(-1, -2)  # (B, H, T, past + T): 1 / sqrt(d) is in q's table
    if length > 1:
        probs += _causal_mask(length, past, qkv.dtype)
    probs -= probs.max(axis=-1, keepdims=True)
    np.exp(probs, out=probs)
    probs /= probs.sum(axis=-1, keepdims=True)
    out = np.empty((batch, length, n_heads, head), qkv.dtype)
    np.matmul(probs, v, out=out.transpose(0, 2, 1, 3))

    def backward(grad):
        grad = grad.reshape(batch, length, n_heads, head).transpose(0, 2, 1, 3)  # (B, H, T, d)
        grad_qkv = np.empty((batch, length, 3, n_heads, head), qkv.dtype)
        grad_q, grad_k, grad_v = grad_qkv.transpose(2, 0, 3, 1, 4)  # views
        np.matmul(probs.swapaxes(-1, -2), grad, out=grad_v)
        grad_scores = grad @ v.swapaxes(-1, -2)  # (B, H, T, T): dL/dP, then dL/dS in place
        grad_scores -= np.einsum("bhij,bhij->bhi", probs, grad_scores)[..., None]
        grad_scores *= probs
        np.matmul(grad_scores, k, out=grad_q)
        np.matmul(grad_scores.swapaxes(-1, -2), q, out=grad_k)
        return (_rotate(grad_qkv.reshape(qkv.shape), head // 2, cos, -low, -high),)  # R^T: sines negated
    return Tensor(out.reshape(batch, length, width // 3), parents=(qkv,), backward=backward)


class KeyValueCache:
    """The rotated keys and the values of the positions one attention layer has seen.

    `keys` and `values` have shape (B, H, max_len, d); the first `length` positions are filled.
    """

    def __init__(self, max_len):
        self.max_len, self.length, self.keys, self.values = max_len, 0, None, None

    def extend(self, k, v):
        """Store k and v (B, H, T, d) behind what is there; return all of it (B, H, length, d) each."""
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


@lru_cache(maxsize=64)
def _causal_mask(length, past, dtype):
    """0 where query i may see key j <= past + i, -inf elsewhere: (T, past + T)."""
    return np.triu(np.full((length, past + length), -np.inf, dtype), 1 + past)


@lru_cache(maxsize=256)
def _rope_tables(past, length, n_heads, head, base, dtype):
    """Cosines and sines for `_rotate`, (T, 3D): q's scaled by 1/sqrt(d), k's plain, v's the identity."""
    half = head // 2
    frequency = base ** (-np.arange(half) / half)  # (d/2,)
    angle = np.arange(past, past + length)[:, None] * frequency  # (T, d/2)
    zero = np.zeros_like(angle)
    cos, low, high = (np.concatenate(pair, axis=1) for pair in [
        (np.cos(angle), np.cos(angle)), (-np.sin(angle), zero), (zero, np.sin(angle))])  # (T, d) each
    identity = np.ones_like(cos), np.zeros_like(cos), np.zeros_like(cos)
    scale = 1 / math.sqrt(head)
    return tuple(
        np.concatenate([np.tile(table * scale, n_heads), np.tile(table, n_heads), np.tile(same, n_heads)],
                       axis=1).astype(dtype)
        for table, same in zip((cos, low, high), identity))


def _rotate(x, half, cos, low, high):
    """Rotary position embedding of the halves (a, b) of every head: (a cos - b sin, b cos + a sin).

    a's partner lies `half` columns to the right and b's `half` to the left. So instead of cutting x
    (B, T, 3D) into narrow halves, which NumPy is slow at, multiply whole rows shifted by `half`: `low` is
    -sin under every a and 0 under every b, `high` is sin under every b and 0 under every a.
    """
    out = x * cos
    out[..., :-half] += x[..., half:] * low[:, :-half]
    out[..., half:] += x[..., :-half] * high[:, half:]
    return out
