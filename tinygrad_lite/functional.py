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
        mean = np.einsum("dn,dn->n", grad, out) / len(out)
        return ((grad - out * mean) / rms,)
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

    def backward(grad):
        return (grad * np.exp(np.minimum(-x.data, 0) - softplus),)
    return Tensor(np.minimum(x.data, 0) - softplus, parents=(x,), backward=backward)


def token_log_probs(logits, targets):
    """log softmax(logits) at the targets: (V, N), int (N,) -> (N,).

    With logits z and p = softmax(z), log p_k = z_k - log sum_j exp z_j. So
    d(log p_k) / dz_j = delta_jk - p_j. Raises ValueError for targets that are not integers (N,)
    from 0 to V - 1.
    """
    targets, (n_tokens, n) = np.asarray(targets), logits.shape
    if not (targets.shape == (n,) and targets.dtype.kind in "iu"
            and (n == 0 or 0 <= targets.min() and targets.max() < n_tokens)):
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
    feature i turns with i + d / 2, as in Llama). For one head and line, Q, K, V (d, T) and `*`
    elementwise, key j and query i:
        S_ji = (R_j k_j) . (R_i q_i) / sqrt(d), -inf for j > i     E = exp(S - max)
        s_i = sum over j of E_ji                                   O = V E / s
    The softmax P = E / s is never formed: E has T rows, O only d. Backward, with G = (dL/dO) / s:
        dL/dV = G E^T        dL/dP / s = V^T G        dL/dS = P * (dL/dP - c)
        c_i = sum over j of P_ji dL/dP_ji = s_i G_i . O_i,     so dL/dS = E * (V^T G - G . O)
        dL/d(RQ) = (RK) dL/dS / sqrt(d)               dL/d(RK) = (RQ) (dL/dS)^T / sqrt(d)
    and R^T = R^-1 turns these two back.
    """
    length = qkv.shape[1] // batch  # T
    heads = qkv.data.reshape(3, n_heads, -1, batch, length)  # (3, H, d, B, T)
    cos, sin = _rotation(heads.shape[2], np.arange(length), rope_base, qkv.dtype)
    cos, sin = np.tile(cos, batch), np.tile(sin, batch)  # (d/2, B T)
    scale = qkv.dtype.type(heads.shape[2] ** -0.5)
    q, k = _rotate(heads[:2], cos, sin)
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, heads[2]))  # (H, B, d, T) each
    scores, exp = _score_arrays(n_heads, batch, length, qkv.dtype)  # two views of S, to become E
    np.matmul(k.swapaxes(-1, -2), q, out=exp)
    future = np.tril(np.full((length, length), -np.inf, qkv.dtype), -1)  # (T keys, T queries)
    scores += np.tile(future, n_heads * batch)
    scores -= scores.max(axis=0)
    np.exp(scores, out=scores)
    total = scores.sum(axis=0).reshape(n_heads, 1, batch, length)  # s
    out = np.empty(heads.shape[1:], qkv.dtype)  # (H, d, B, T)
    np.matmul(v, exp, out=out.swapaxes(1, 2))
    out /= total

    def backward(grad):
        grad = grad.reshape(out.shape) / total  # G
        dot = np.einsum("hdbt,hdbt->hbt", grad, out).reshape(-1)  # G . O
        grad, grad_qkv = grad.swapaxes(1, 2), np.empty_like(heads)
        grad_q, grad_k, grad_v = grad_qkv.swapaxes(2, 3)
        grad_scores, grad_exp = _score_arrays(n_heads, batch, length, qkv.dtype)
        np.matmul(grad, exp.swapaxes(-1, -2), out=grad_v)
        np.matmul(v.swapaxes(-1, -2), grad, out=grad_exp)
        grad_scores -= dot
        grad_scores *= scores  # dL/dS
        np.matmul(k, grad_exp, out=grad_q)
        np.matmul(q, grad_exp.swapaxes(-1, -2), out=grad_k)
        grad_q *= scale
        grad_qkv[:2] = _rotate(grad_qkv[:2], cos, -sin)
        return (grad_qkv.reshape(qkv.shape),)
    return Tensor(out.reshape(-1, qkv.shape[1]), parents=(qkv,), backward=backward)


def cached_attention(qkv, n_heads, keys, values, position, rope_base=10000.0):
    """causal_attention for the next position of each line, under no_grad: (3D, B) -> (D, B).

    `keys` and `values`, (max_len, H, d, B) each, hold those of the positions before; this one's
    are stored at `position`. Raises RuntimeError where a gradient is wanted.
    """
    if qkv.requires_grad:
        raise RuntimeError("cached_attention has no gradient; call it under no_grad()")
    heads = qkv.data.reshape(3, n_heads, -1, qkv.shape[1])  # (3, H, d, B)
    cos, sin = _rotation(heads.shape[2], np.array([position]), rope_base, qkv.dtype)  # (d/2, 1)
    q, keys[position] = _rotate(heads[:2], cos, sin)
    values[position] = heads[2]
    keys, values = keys[:position + 1], values[:position + 1]
    # All lines and heads in one einsum; products of matrices would be one call for each.
    scores = np.einsum("hdb,jhdb->jhb", q * qkv.dtype.type(heads.shape[2] ** -0.5), keys)
    exp = np.exp(scores - scores.max(axis=0))
    out = np.einsum("jhb,jhdb->hdb", exp / exp.sum(axis=0), values)
    return Tensor(out.reshape(-1, qkv.shape[1]))


def _score_arrays(n_heads, batch, length, dtype):
    """A new array (T keys, H B T queries), and a view of it as matrices (H, B, T keys, T queries).

    Keys come first so that softmax works on whole rows: (H, B, T, T) costs a fifth of a step. The
    16 unused numbers keep rows from lying a multiple of 4 kB apart, where they would push each
    other out of the processor's cache: another tenth.
    """
    rows = np.empty((length, n_heads * batch * length + 16), dtype)[:, :-16]
    return rows, rows.reshape(length, n_heads, batch, length).transpose(1, 2, 0, 3)


def _rotation(head, positions, base, dtype):
    """cos and sin of position * base^(-2i / d) in row i: (d/2, len(positions)) each."""
    angle = base ** (-np.arange(0, head, 2) / head)[:, None] * positions
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def _rotate(x, cos, sin):
    """Halves (a, b) of each head's features become (a cos - b sin, b cos + a sin):
    (2, H, d, ...), for q and k -> the same."""
    halves = x.reshape(2, x.shape[1], 2, *cos.shape[:1], -1)  # (2, H, 2, d/2, N)
    a, b = halves[:, :, 0], halves[:, :, 1]
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=2).reshape(x.shape)
