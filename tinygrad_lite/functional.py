"""The fused ops a Transformer needs: one node on the tape each, its gradient derived by hand.

An activation is a matrix with one column for each position: (D, N), N = B T, line after line.
B lines of T positions, D features, H heads of width d, V tokens. In each derivation g = dL/dy, L
the loss and y what the op returns.
"""
import numpy as np

from .tensor import Tensor


def embedding(weight, ids):
    """Column ids[n] of weight: (D, V), int (N,) -> (D, N).

    As y = W onehot, dL/dW = g onehot^T: a product, far faster than scattered additions.
    """
    def backward(grad):
        onehot = np.zeros((ids.size, weight.shape[1]), weight.dtype)  # (N, V)
        onehot[np.arange(ids.size), ids] = 1
        return (grad @ onehot,)
    return Tensor(weight.data.take(ids, axis=1), parents=(weight,), backward=backward)


def rms_norm(x, eps=1e-6):
    """y = x / rms(x) for each column, rms(x) = sqrt(mean(x^2) + eps): (D, N) -> (D, N).

    Zhang & Sennrich 2019, Eq. 4, without its learned scale. As d rms / dx_j = x_j / (D rms),
    dy_i / dx_j = (delta_ij - y_i y_j / D) / rms, and so dL/dx = (g - y mean(g y)) / rms.
    """
    rms = np.sqrt(np.einsum("dn,dn->n", x.data, x.data) / len(x.data) + x.dtype.type(eps))  # (N,)
    out = x.data / rms

    def backward(grad):
        return ((grad - out * (np.einsum("dn,dn->n", grad, out) / len(out))) / rms,)
    return Tensor(out, parents=(x,), backward=backward)


def swiglu(gate_up):
    """y = silu(gate) * up of the two halves [gate; up]: (2F, N) -> (F, N).

    Shazeer 2020, Eq. 5 without biases; silu(a) = a s, s = sigmoid(a). As ds/da = s (1 - s),
        dL/dup = g silu(gate)        dL/dgate = g up (s + silu(gate) (1 - s))
    """
    gate, up = np.split(gate_up.data, 2)  # (F, N) each
    sigmoid = 0.5 * np.tanh(0.5 * gate) + 0.5  # is 1 / (1 + exp(-gate)), without its overflow
    silu = gate * sigmoid

    def backward(grad):
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        return (np.concatenate([grad_gate, grad * silu]),)
    return Tensor(silu * up, parents=(gate_up,), backward=backward)


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)): any shape, no overflow for any x.

    d/dx log sigmoid(x) = sigmoid(-x) = exp(log sigmoid(-x)).
    """
    softplus = np.log1p(np.exp(-np.abs(x.data)))  # the same for x and -x
    return Tensor(np.minimum(x.data, 0) - softplus, parents=(x,), backward=lambda grad: (
        grad * np.exp(np.minimum(-x.data, 0) - softplus),))


def token_log_probs(logits, targets):
    """log softmax(logits) at the targets: (V, N), int (N,) -> (N,).

    With logits z and p = softmax(z), log p_k = z_k - log sum_j exp z_j. So
    d(log p_k) / dz_j = delta_jk - p_j. Raises ValueError for targets that are not N integers from
    0 to V - 1.
    """
    targets, (n_tokens, n) = np.asarray(targets), logits.shape
    if not (targets.shape == (n,) and targets.dtype.kind in "iu"
            and ((0 <= targets) & (targets < n_tokens)).all()):
        raise ValueError(f"targets must be {n} integers from 0 to {n_tokens - 1}, "
                         f"not {targets.dtype} {targets.shape}")
    at = targets, np.arange(n)
    shifted = logits.data - logits.data.max(axis=0)  # (V, N)
    exp = np.exp(shifted)
    total = exp.sum(axis=0)  # (N,)

    def backward(grad):
        grad_logits = exp * (-grad / total)
        grad_logits[at] += grad
        return (grad_logits,)
    return Tensor(shifted[at] - np.log(total), parents=(logits,), backward=backward)


def causal_attention(qkv, n_heads, batch, rope_base=10000.0):
    """Rotary causal attention: (3D, N) = [q; k; v], heads one below the other in each -> (D, N).

    Vaswani et al. 2017, Eq. 1, with R_t the rotation of position t (Su et al. 2021, Eq. 34, but
    feature i turns with i + d / 2, as in Llama). For one head and line, Q = (R_i q_i) / sqrt(d),
    K = (R_j k_j) and V are (d, T); j is a key, i a query, `*` elementwise:
        S = K^T Q, -inf where j > i    E = exp(S - max)    s_i = sum over j of E_ji    O = V E / s
    The softmax P = E / s is never formed: E has T rows, O only d. Backward, with G = (dL/dO) / s,
        dL/dV = G E^T     dL/dP = s V^T G     dL/dS = P * (dL/dP - c) = E * (V^T G - G . O), as
        c_i = sum over j of P_ji dL/dP_ji = s_i G_i . O_i,     dL/dQ = K dL/dS     dL/dK = Q dL/dS^T
    and R^T = R^-1 turns these two back.
    """
    length = qkv.shape[1] // batch  # T
    heads = qkv.data.reshape(3, n_heads, -1, batch, length)  # (3, H, d, B, T)
    cos, sin = _rotation(heads.shape[2], range(length), rope_base, qkv.dtype, batch)  # (d/2, N)
    scale = qkv.dtype.type(heads.shape[2] ** -0.5)
    q, k = _rotate(heads[:2], cos, sin)
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, heads[2]))  # (H, B, d, T)
    rows, exp = _score_arrays(n_heads, batch, length, qkv.dtype)  # two views of S, to become E
    np.matmul(k.swapaxes(2, 3), q, out=exp)
    future = np.tril(np.full((length, length), -np.inf, qkv.dtype), -1)  # (T keys, T queries)
    rows += np.tile(future, n_heads * batch)
    rows -= rows.max(axis=0)
    np.exp(rows, out=rows)
    total = rows.sum(axis=0).reshape(n_heads, 1, batch, length)  # s
    out = np.empty(heads.shape[1:], qkv.dtype)  # (H, d, B, T)
    np.matmul(v, exp, out=out.swapaxes(1, 2))
    out /= total

    def backward(grad):
        grad = grad.reshape(out.shape) / total  # G
        dot, grad = np.einsum("hdbt,hdbt->hbt", grad, out), grad.swapaxes(1, 2)
        grad_heads, (grad_rows, grad_scores) = np.empty_like(heads), _score_arrays(
            n_heads, batch, length, qkv.dtype)
        grad_q, grad_k, grad_v = grad_heads.swapaxes(2, 3)  # (H, B, d, T)
        np.matmul(grad, exp.swapaxes(2, 3), out=grad_v)
        np.matmul(v.swapaxes(2, 3), grad, out=grad_scores)
        grad_rows -= dot.reshape(-1)
        grad_rows *= rows  # dL/dS
        np.matmul(k, grad_scores, out=grad_q)
        np.matmul(q, grad_scores.swapaxes(2, 3), out=grad_k)
        grad_q *= scale
        grad_heads[:2] = _rotate(grad_heads[:2], cos, -sin)
        return (grad_heads.reshape(qkv.shape),)
    return Tensor(out.reshape(-1, qkv.shape[1]), parents=(qkv,), backward=backward)


def cached_attention(qkv, n_heads, keys, values, position, rope_base=10000.0):
    """causal_attention for one more position of each line, under no_grad: (3D, B) -> (D, B).

    `keys` and `values`, (max_len, H, d, B), hold those before; this one's are stored at `position`.
    Raises RuntimeError where a gradient is wanted.
    """
    if qkv.requires_grad:
        raise RuntimeError("cached_attention has no gradient; call it under no_grad()")
    heads = qkv.data.reshape(3, n_heads, -1, qkv.shape[1])  # (3, H, d, B)
    cos, sin = _rotation(heads.shape[2], [position], rope_base, qkv.dtype)  # (d/2, 1)
    q, keys[position] = _rotate(heads[:2], cos, sin)
    values[position] = heads[2]
    q *= qkv.dtype.type(heads.shape[2] ** -0.5)
    # All lines and heads in one einsum; products of matrices would be one call for each.
    scores = np.einsum("hdb,jhdb->jhb", q, keys[:position + 1])
    exp = np.exp(scores - scores.max(axis=0))
    out = np.einsum("jhb,jhdb->hdb", exp / exp.sum(axis=0), values[:position + 1])
    return Tensor(out.reshape(-1, qkv.shape[1]))


def _score_arrays(n_heads, batch, length, dtype):
    """A new array (T keys, H B T queries), and a view of it as matrices (H, B, T keys, T queries).

    Keys first, so that softmax works on whole rows: (H, B, T, T) costs a fifth of a step. The 16
    unused numbers keep rows from lying a multiple of 4 kB apart, where they would push each other
    out of the processor's cache: up to a tenth.
    """
    rows = np.empty((length, n_heads * batch * length + 16), dtype)[:, :-16]
    return rows, rows.reshape(length, n_heads, batch, length).transpose(1, 2, 0, 3)


def _rotation(head, positions, base, dtype, times=1):
    """cos and sin of position * base^(-2i / d) in row i, so many times over: (d/2, N) each."""
    angle = np.outer(base ** (-np.arange(0, head, 2) / head), positions)
    return [np.tile(table.astype(dtype), times) for table in (np.cos(angle), np.sin(angle))]


def _rotate(x, cos, sin):
    """Halves (a, b) of each head's features become (a cos - b sin, b cos + a sin), for q and k:
    (2, H, d, ...) -> the same."""
    halves = x.reshape(2, x.shape[1], 2, len(cos), -1)
    a, b = halves[:, :, 0], halves[:, :, 1]  # (2, H, d/2, N)
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=2).reshape(x.shape)
