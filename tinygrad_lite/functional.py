"""The fused ops a Transformer needs: one node on the tape each, its gradient derived by hand.

Activations are matrices with a column for each of N = B T positions, line after line: B lines of T
positions, D features, H heads of width d, F hidden features, V tokens. g is dL/d(result)."""
import numpy as np

from .tensor import Tensor


def embedding(weight, ids):
    """Column ids[n] of weight: (D, V), int (N,) -> (D, N)."""
    # It is W onehot, so dL/dW = g onehot^T: a product, far faster than scattered additions.
    return Tensor(weight.data.take(ids, axis=1), parents=(weight,), backward=lambda grad: (
        grad @ np.eye(weight.shape[1], dtype=weight.dtype).take(ids, axis=0),))  # (D, N) @ (N, V)


def rms_norm(x, eps=1e-6):
    """y = x / rms(x) for each column, rms(x) = sqrt(mean(x^2) + eps): (D, N) -> (D, N).
    Zhang & Sennrich 2019, Eq. 4, without its learned scale."""
    def mean(a, b): return np.einsum("dn,dn->n", a, b) / len(a)  # of a * b, never formed: (N,)
    rms = np.sqrt(mean(x.data, x.data) + eps)
    y = x.data / rms
    # d rms / dx_j = x_j / (D rms), so dy_i / dx_j = (delta_ij - y_i y_j / D) / rms; times g_i, sum.
    return Tensor(y, parents=(x,), backward=lambda grad: ((grad - y * mean(grad, y)) / rms,))


def swiglu(gate_up):
    """silu(gate) * up of the halves [gate; up], silu(a) = a sigmoid(a): (2F, N) -> (F, N).
    Shazeer 2020, Eq. 5 without biases."""
    gate, up = np.split(gate_up.data, 2)  # (F, N) each
    s = 0.5 * np.tanh(0.5 * gate) + 0.5  # sigmoid 1 / (1 + exp(-gate)), without its overflow
    silu = gate * s
    # As ds/dgate = s (1 - s), dL/dgate = g up (s + silu (1 - s)); dL/dup = g silu.
    return Tensor(silu * up, parents=(gate_up,), backward=lambda grad: (
        np.concatenate([grad * up * (s + silu * (1 - s)), grad * silu]),))


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)): any shape, no overflow for any x."""
    tail = np.log1p(np.exp(-np.abs(x.data)))  # log(1 + exp(-|x|)), the same for x and -x
    return Tensor(np.minimum(x.data, 0) - tail, parents=(x,), backward=lambda grad: (
        grad * np.exp(np.minimum(-x.data, 0) - tail),))  # g sigmoid(-x) = g exp(log_sigmoid(-x))


def token_log_probs(logits, targets):
    """log softmax(logits) at the targets: (V, N), int (N,) -> (N,). Raises ValueError for targets
    that are not N integers from 0 to V - 1."""
    targets, (n_tokens, n) = np.asarray(targets), logits.shape
    if (targets.shape != (n,) or targets.dtype.kind not in "iu"
            or not ((0 <= targets) & (targets < n_tokens)).all()):
        raise ValueError(f"targets must be {n} integers from 0 to {n_tokens - 1}")
    at = targets, np.arange(n)
    shifted = logits.data - logits.data.max(axis=0)  # (V, N)
    exp = np.exp(shifted)
    total = exp.sum(axis=0)  # (N,)

    def backward(grad):  # with logits z, log p_k = z_k - log sum_j exp z_j:
        grad_logits = exp * (-grad / total)  # d(log p_k) / dz_j = delta_jk - p_j
        grad_logits[at] += grad
        return (grad_logits,)
    return Tensor(shifted[at] - np.log(total), parents=(logits,), backward=backward)


def causal_attention(qkv, n_heads, batch, rope_base=10000.0):
    """Rotary causal attention: (3D, N) = [q; k; v], heads one below the other in each -> (D, N).

    Each position averages the values v of itself and those before it, by a softmax of q . k
    (Vaswani et al. 2017, Eq. 1, transposed: positions are columns). R_t turns features f and
    f + d/2 of a head by the angle t base^(-2f / d), t = 0 ... T - 1 (Su et al. 2021, Eq. 34, in
    Llama's order). For one head and line V is (d, T), like Q = (R_i q_i) / d^(1/4) and
    K = (R_j k_j) / d^(1/4): so K^T Q has Eq. 1's 1 / sqrt(d). i is a query, a column; j is a key;
    s, c and G . O hold a number for each query; `*` is elementwise.
        S = K^T Q, -inf where j > i   E_ji = exp(S_ji - max_j S_ji)   s_i = sum_j E_ji   O = V E / s
    The softmax P = E / s is never formed: E has T rows, O only d. Backward, with G = (dL/dO) / s:
        dL/dV = G E^T    dL/dQ = K dL/dS    dL/dK = Q dL/dS^T    dL/dP = s V^T G
    and as dP_ji / dS_ki = P_ji (delta_jk - P_ki) and O_i = sum_j P_ji V_j,
        dL/dS = P * (dL/dP - c) = E * (V^T G - G . O),  c_i = sum_j P_ji dL/dP_ji = s_i G_i . O_i
        dL/dq_i = R_i^T (dL/dQ)_i / d^(1/4), likewise for k."""
    length = qkv.shape[1] // batch  # T
    heads = qkv.data.reshape(3, n_heads, -1, batch, length)  # (3, H, d, B, T)
    cos, sin = np.tile(_rotation(heads.shape[2], range(length), rope_base, qkv.dtype), batch)
    q, k = _rotate(heads[:2], cos, sin).swapaxes(2, 3)  # (H, B, d, T)
    v = heads[2].swapaxes(1, 2)
    scores, rows = _products(k, q)  # one array, twice: S, then E
    for j in range(1, length):
        rows[j].reshape(-1, length)[:, :j] = -np.inf  # S_ji of the queries i before j
    rows -= rows.max(axis=0)
    np.exp(rows, out=rows)
    total = rows.sum(axis=0).reshape(n_heads, 1, batch, -1)  # s
    out = np.divide((v @ scores).swapaxes(1, 2), total, order="C")  # (H, d, B, T)

    def backward(grad):
        grad = grad.reshape(out.shape) / total  # G
        dot, grad = np.einsum("hdbt,hdbt->hbt", grad, out), grad.swapaxes(1, 2)
        grad_scores, grad_rows = _products(v, grad)  # one array: V^T G, then dL/dS
        grad_rows -= dot.ravel()
        grad_rows *= rows
        grads = np.empty(heads.shape, qkv.dtype)  # (3, H, d, B, T)
        factors = (k, grad_scores), (q, grad_scores.mT), (grad, scores.mT)
        for (a, b), product in zip(factors, grads.swapaxes(2, 3)):
            np.matmul(a, b, out=product)  # where it belongs, not copied: 4 % of a step
        grads[:2] = _rotate(grads[:2], cos, -sin)  # (2, H, d, B, T); R^T, both hold 1 / d^(1/4)
        return (grads.reshape(qkv.shape),)
    return Tensor(out.reshape(-1, qkv.shape[1]), parents=(qkv,), backward=backward)


def cached_attention(qkv, n_heads, keys, values, position, rope_base=10000.0):
    """causal_attention for one more position of each line: (3D, B) -> (D, B). `keys` and `values`,
    (max_len, H, d, B), hold those before, and get its own. Raises RuntimeError outside no_grad."""
    if qkv.requires_grad:
        raise RuntimeError("cached_attention has no gradient; call it under no_grad()")
    heads = qkv.data.reshape(3, n_heads, -1, qkv.shape[1])  # (3, H, d, B)
    cos, sin = _rotation(heads.shape[2], (position,), rope_base, qkv.dtype)
    q, keys[position] = _rotate(heads[:2], cos, sin)
    values[position] = heads[2]
    # All lines and heads in one einsum; products of matrices would be one call for each.
    scores = np.einsum("hdb,jhdb->jhb", q, keys[:position + 1])
    exp = np.exp(scores - scores.max(axis=0))
    out = np.einsum("jhb,jhdb->hdb", exp / exp.sum(axis=0), values[:position + 1])
    return Tensor(out.reshape(-1, qkv.shape[1]))


def _products(k, q):
    """K^T Q of (H, B, d, T): (H, B, T keys, T queries), and the same memory as (T keys, H B T)."""
    # One call for all heads and lines, on long rows, saves a fifth of a step. 16 unused numbers
    # keep rows from lying a multiple of 4 kB apart, where they would push each other out of cache.
    n_heads, batch, _, length = q.shape
    rows = np.empty((length, n_heads * batch * length + 16), q.dtype)[:, :-16]
    scores = rows.reshape(length, n_heads, batch, length).transpose(1, 2, 0, 3)
    return np.matmul(k.mT, q, out=scores), rows


def _rotation(d, positions, base, dtype):
    """cos and sin, over d^(1/4), of the angles t base^(-2i / d) at positions t: (2, d/2, T)."""
    angles = np.outer(base ** (-np.arange(0, d, 2) / d), positions)
    return (np.array([np.cos(angles), np.sin(angles)]) * d ** -0.25).astype(dtype)


def _rotate(x, cos, sin):
    """Halves (a, b) of a head, of q or k, become (a cos - b sin, b cos + a sin): (2, H, d, ...)."""
    halves = x.reshape(2, x.shape[1], 2, len(cos), -1)  # (2, H, 2, d/2, N)
    return (halves * cos + halves[:, :, ::-1] * np.stack([-sin, sin])).reshape(x.shape)
