"""Compare backward() with finite differences."""

import numpy as np

from .tensor import Tensor, no_grad


def gradcheck(fn, *arrays, step=1e-6):
    """The largest error of the gradient of `fn` at `arrays`, over all elements, in float64.

    fn takes a Tensor for each array and returns one. To have a single number f to differentiate,
    the elements of the result are summed with random weights, so that errors do not cancel by
    chance. Each element x is moved to x + dx and x - dx, where dx = step * max(1, |x|), and

        a = df/dx by backward(),   b = (f(x + dx) - f(x - dx)) / (2 dx)

    are compared: the error is |a - b| / max(1, |a|, |b|). With a correct gradient it is about
    1e-9, the rounding error of b.
    """
    inputs = [Tensor(np.array(array, dtype=np.float64), requires_grad=True) for array in arrays]
    out = fn(*inputs)
    weights = np.random.default_rng(0).standard_normal(out.shape)
    out.backward(weights)

    def f():
        with no_grad():
            return (fn(*inputs).data * weights).sum()

    worst = 0.0
    for tensor in inputs:
        grad = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        for index in np.ndindex(tensor.shape):
            x = tensor.data[index]
            above = x + step * max(1.0, abs(x))
            below = x - step * max(1.0, abs(x))
            tensor.data[index] = above
            f_above = f()
            tensor.data[index] = below
            f_below = f()
            tensor.data[index] = x
            a, b = grad[index], (f_above - f_below) / (above - below)
            error = abs(a - b) / max(1.0, abs(a), abs(b))
            worst = np.maximum(worst, error)  # unlike max(), it keeps a NaN
    return float(worst)
