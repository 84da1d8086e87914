"""Finite differences against backward()."""
import numpy as np

from .tensor import Tensor, no_grad


def gradcheck(fn, *arrays, step=1e-6):
    """The largest error |a - b| / max(1, |a|, |b|) of any element, in float64: a from backward(),
    b = (f(x + step) - f(x - step)) / (2 step), itself off by about 1e-9. `fn` takes a Tensor for
    each array and returns one; f sums its elements, by random weights, so that no errors cancel."""
    inputs = [Tensor(np.array(array, dtype=np.float64), requires_grad=True) for array in arrays]
    out = fn(*inputs)
    weights = np.random.default_rng(0).standard_normal(out.shape)
    out.backward(weights)
    worst = 0.0
    for tensor in inputs:
        grad = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        for index, x in np.ndenumerate(tensor.data.copy()):
            def f(value):
                tensor.data[index] = value
                with no_grad():
                    return (fn(*inputs).data * weights).sum()
            a, b = grad[index], (f(x + step) - f(x - step)) / (2 * step)
            tensor.data[index] = x
            worst = np.maximum(worst, abs(a - b) / max(1.0, abs(a), abs(b)))  # keeps a NaN
    return float(worst)
