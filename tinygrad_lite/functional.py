"""The ops a Transformer needs, each a single node on the tape with a gradient derived by hand.

Activations are matrices with one column for each position: (features, N), where N = B T positions
are those of B lines of T tokens, line after line. Further letters: D features of the residual
stream, H heads of d = D / H features, F hidden features, V tokens in the vocabulary.
In every `backward`, `grad` is dL/d(out), L being the loss.
"""

import numpy as np

from .tensor import Tensor


def embedding(weight, ids):
    """Column ids[n] of weight, for each position n: (D, V), int (N,) -> (D, N)."""
    out = weight.data.take(ids, axis=1)

    def backward(grad):
        # out = weight @ onehot, so dL/d(weight) = grad @ onehot.T. As a matrix product this is much
        # faster than adding the columns of grad one by one.
        onehot_rows = np.eye(weight.shape[1], dtype=weight.dtype).take(ids, axis=0)  # (N, V)
        return (grad @ onehot_rows,)

    return Tensor(out, parents=(weight,), backward=backward)


def rms_norm(x, eps=1e-6):
    """Each column divided by its root mean square, sqrt(mean(x^2) + eps): (D, N) -> (D, N).

    Zhang & Sennrich 2019, Eq. 4, with eps added as Llama does, and without the learned scale, which
    the model multiplies into the next matrix.
    """
    rms = np.sqrt(_mean_of_product(x.data, x.data) + eps)  # (N,)
    out = x.data / rms

    def backward(grad):
        # For one column, with out_i = x_i / rms, and delta_ij = 1 if i = j and else 0:
        #   d(rms)/dx_j   = x_j / (D rms) = out_j / D
        #   d(out_i)/dx_j = delta_ij / rms - (x_i / rms^2) d(rms)/dx_j
        #                 = (delta_ij - out_i out_j / D) / rms
        # and dL/dx_j is the sum over i of grad_i d(out_i)/dx_j.
        return ((grad - out * _mean_of_product(grad, out)) / rms,)

    return Tensor(out, parents=(x,), backward=backward)


def _mean_of_product(a, b):
    """The mean of a * b over each column: (D, N), (D, N) -> (N,)."""
    return np.einsum("dn,dn->n", a, b) / len(a)  # quicker than (a * b).mean(axis=0)


def swiglu(gate_up):
    """silu(gate) * up, where silu(a) = a sigmoid(a): (2F, N) = [gate; up] -> (F, N).

    Shazeer 2020, Eq. 5, with beta = 1 and without biases.
    """
    gate, up = np.split(gate_up.data, 2)  # (F, N) each
    sigmoid = 0.5 * np.tanh(0.5 * gate) + 0.5  # 1 / (1 + exp(-gate)), but exp would overflow
    silu = gate * sigmoid
    out = silu * up

    def backward(grad):
        # d sigmoid / d gate = sigmoid (1 - sigmoid), so by the product rule
        # d silu / d gate = sigmoid + gate sigmoid (1 - sigmoid) = sigmoid + silu (1 - sigmoid).
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        grad_up = grad * silu
        return (np.concatenate([grad_gate, grad_up]),)

    return Tensor(out, parents=(gate_up,), backward=backward)


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))), elementwise, without overflow for any x."""
    # For x >= 0 it is -log(1 + exp(-x)), for x < 0 it is x - log(1 + exp(x)). In one formula:
    out = np.minimum(x.data, 0) - np.log1p(np.exp(-np.abs(x.data)))

    def backward(grad):
        # The slope is 1 - sigmoid(x) = sigmoid(-x) = exp(log_sigmoid(-x)): as above, with -x for x.
        log_slope = np.minimum(-x.data, 0) - np.log1p(np.exp(-np.abs(x.data)))
        return (grad * np.exp(log_slope),)

    return Tensor(out, parents=(x,), backward=backward)


def token_log_probs(logits, targets):
    """log softmax(logits) at each position's target token: (V, N), int (N,) -> (N,).

    Raises ValueError unless targets are N integers from 0 to V - 1.
    """
    targets = np.asarray(targets)
    vocab_size, n = logits.shape
    is_integer = targets.dtype.kind in "iu"
    if targets.shape != (n,) or not is_integer or ((targets < 0) | (targets >= vocab_size)).any():
        raise ValueError(f"targets must be {n} integers from 0 to {vocab_size - 1}")
    # The softmax does not change if a constant is subtracted from a column of logits; subtracting
    # the largest keeps exp from overflowing.
    shifted = logits.data - logits.data.max(axis=0)  # (V, N)
    exp = np.exp(shifted)
    total = exp.sum(axis=0)  # (N,)
    at_target = targets, np.arange(n)
    out = shifted[at_target] - np.log(total)

    def backward(grad):
        # With z the logits of a column and k its target, log p_k = z_k - log sum_i exp(z_i), so
        # d(log p_k)/dz_j = delta_jk - p_j, where delta_jk = 1 if j = k and else 0, and
        # p_j = exp(z_j) / sum_i exp(z_i). The shift cancels in it: p = exp / total.
        grad_logits = -exp * (grad / total)  # - p_j grad
        grad_logits[at_target] += grad  # delta_jk grad
        return (grad_logits,)

    return Tensor(out, parents=(logits,), backward=backward)


def causal_attention(qkv, n_heads, batch, rope_base=10000.0):
    """Causal attention with rotary positions: (3D, N) = [q; k; v] -> (D, N).

    qkv: each of q, k and v holds its heads one below the other.
    batch: the number of lines B; N must be a multiple of it, and a line does not see another.

    Vaswani et al. 2017, Eq. 1, transposed, because positions are columns here. Rotary positions are
    those of Su et al. 2021, Eq. 34, except that feature f is paired with feature f + d/2, as in
    Hugging Face's Llama; the paper pairs neighbours. For one head of one line, with i a query's
    column, j and k columns of keys, and R_t the rotation of position t:

        Q_i  = R_i q_i / sqrt(d)                    `q`, (d, T)
        K_j  = R_j k_j                              `k`, (d, T);  V is `v`
        S_ji = K_j . Q_i, or -inf where j > i       `scores` = k.T @ q, (T keys, T queries)
        P_ji = exp(S_ji) / sum_k exp(S_ki)          `weights`: a softmax of each column
        O_i  = sum_j P_ji V_j                       `out` = v @ weights, (d, T)

    The gradient, given G = dL/dO (`grad_out`):

        O = V P is a matrix product, so dL/dV = G P^T and dL/dP = V^T G.

        In the softmax, every P_ji of a column depends on every S_ki of that column:
            dP_ji/dS_ki = P_ji (delta_jk - P_ki),  where delta_jk = 1 if j = k and else 0.
        S_ki therefore gets a share from each j, and the chain rule sums over j:
            dL/dS_ki = sum_j dL/dP_ji P_ji (delta_jk - P_ki)
                     = P_ki dL/dP_ki - P_ki sum_j P_ji dL/dP_ji
                     = P_ki (dL/dP_ki - c_i),  where c_i = sum_j P_ji dL/dP_ji.

        S = K^T Q, so dL/dQ = K dL/dS and dL/dK = Q (dL/dS)^T.

        A rotation is undone by its transpose, so dL/dq_i = R_i^T (dL/dQ)_i / sqrt(d) and
        dL/dk_j = R_j^T (dL/dK)_j; R^T rotates by the negative angle.

    Two steps need no gradient of their own. Before exp, the code subtracts the largest score m_i of
    column i, to avoid overflow. This divides numerator and denominator of P_ji by the same factor
    exp(m_i), so neither P nor its gradient changes. And a masked score, j > i, has the weight
    P_ji = exp(-inf) / ... = 0. Its gradient has the factor P_ji, so backward needs no mask.
    """
    n = qkv.shape[1]
    length = n // batch  # T
    q, k, v = qkv.data.reshape(3, n_heads, -1, n)  # (H, d, N) each
    by_line = (n_heads, -1, batch, length)  # (H, d, B, T); swapaxes then gives (H, B, d, T)
    cos, sin = np.tile(
        _rotation(q.shape[1], range(length), rope_base, qkv.dtype), batch
    )  # (d/2, N)
    scale = q.shape[1] ** -0.5
    q = (_rotate(q, cos, sin) * scale).reshape(by_line).swapaxes(1, 2)  # (H, B, d, T)
    k = _rotate(k, cos, sin).reshape(by_line).swapaxes(1, 2)
    v = v.reshape(by_line).swapaxes(1, 2)

    scores = _dot_products(k, q)  # (T keys, H, B, T queries)
    for key in range(1, length):
        scores[key, :, :, :key] = -np.inf  # queries before this key do not see it
    scores -= scores.max(axis=0)
    weights = np.exp(scores)
    weights /= weights.sum(axis=0)
    p = _as_matrices(weights)  # P: a view, (H, B, T keys, T queries)
    out = (v @ p).swapaxes(1, 2)  # (H, d, B, T)

    def backward(grad):
        grad_out = grad.reshape(by_line).swapaxes(1, 2)  # (H, B, d, T)
        grad_weights = _dot_products(v, grad_out)  # (T keys, H, B, T queries)
        c = (weights * grad_weights).sum(axis=0)  # (H, B, T queries)
        grad_scores = _as_matrices(weights * (grad_weights - c))  # (H, B, T keys, T queries)
        grad_q = (k @ grad_scores).swapaxes(1, 2).reshape(n_heads, -1, n)  # (H, d, N)
        grad_k = (q @ grad_scores.mT).swapaxes(1, 2).reshape(n_heads, -1, n)
        grad_v = (grad_out @ p.mT).swapaxes(1, 2).reshape(n_heads, -1, n)
        grad_q = _rotate(grad_q, cos, -sin) * scale
        grad_k = _rotate(grad_k, cos, -sin)
        return (np.concatenate([grad_q, grad_k, grad_v]).reshape(qkv.shape),)

    return Tensor(out.reshape(-1, n), parents=(qkv,), backward=backward)


def cached_attention(qkv, n_heads, keys, values, position, rope_base=10000.0):
    """causal_attention for the next position of every line: (3D, B) = [q; k; v] -> (D, B).

    keys, values: the cache, (max_len, H, d, B) each. Positions before `position` are filled; this
        call fills `position`.

    It has no gradient: call it under no_grad(), or it raises RuntimeError.
    """
    if qkv.requires_grad:
        raise RuntimeError("cached_attention has no gradient; call it under no_grad()")
    q, k, v = qkv.data.reshape(3, n_heads, -1, qkv.shape[1])  # (H, d, B) each
    cos, sin = _rotation(q.shape[1], [position], rope_base, qkv.dtype)  # (d/2, 1)
    q = _rotate(q, cos, sin) * q.shape[1] ** -0.5
    keys[position] = _rotate(k, cos, sin)
    values[position] = v
    # One einsum for all lines and heads: matrix products would be one small call for each.
    scores = np.einsum("hdb,thdb->thb", q, keys[: position + 1])  # (T keys, H, B)
    weights = np.exp(scores - scores.max(axis=0))
    weights /= weights.sum(axis=0)
    out = np.einsum("thb,thdb->hdb", weights, values[: position + 1])  # (H, d, B)
    return Tensor(out.reshape(-1, qkv.shape[1]))


def _dot_products(a, b):
    """a.T @ b for every head and line, keys first: (H, B, d, T) twice -> (T keys, H, B, T queries).

    The softmax adds up over keys. With these as the first axis it adds whole rows of H B T numbers,
    which is much faster than to add up each column of many small matrices.
    """
    n_heads, batch, _, length = b.shape
    products = np.empty((length, n_heads, batch, length), b.dtype)
    np.matmul(a.mT, b, out=_as_matrices(products))
    return products


def _as_matrices(products):
    """A view, for matrix products: (T keys, H, B, T queries) -> (H, B, T keys, T queries)."""
    return products.transpose(1, 2, 0, 3)


def _rotation(d, positions, base, dtype):
    """cos and sin of the angles t base^(-2f / d), at position t and feature f: (2, d/2, T)."""
    angles = np.outer(base ** (-2 * np.arange(d // 2) / d), positions)
    return np.array([np.cos(angles), np.sin(angles)], dtype)


def _rotate(x, cos, sin):
    """Turn each pair of features (f, f + d/2) by its angle: (H, d, N) -> (H, d, N)."""
    a, b = np.split(x, 2, axis=1)  # (H, d/2, N) each
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
