"""Finite differences against backward()."""
import numpy as np

from .tensor import Tensor, no_grad


def gradcheck(fn, *arrays, step=1e-6):
    """The largest error between backward() and central differences of fn, in float64.

    `fn` takes one Tensor for each array and returns a Tensor of any shape. Its elements are weighted by
    fixed random numbers, so that errors cannot cancel. The error of an element is |a - b| / max(1, |a|, |b|)
    with a from backward() and b = (f(x + step) - f(x - step)) / (2 step), whose own error is about 1e-9
    where values and slopes are near 1.
    """
    inputs = [Tensor(np.array(array, dtype=np.float64), requires_grad=True) for array in arrays]
    out = fn(*inputs)
    weights = np.random.default_rng(0).standard_normal(out.shape)
    out.backward(weights)

    def value():
        with no_grad():
            return float((fn(*inputs).data * weights).sum())

    worst = 0.0
    for tensor in inputs:
        analytic = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        for index in np.ndindex(tensor.shape):
            before = tensor.data[index]
            tensor.data[index] = before + step
            above = value()
            tensor.data[index] = before - step
            below = value()
            tensor.data[index] = before
            a, b = analytic[index], (above - below) / (2 * step)
            worst = max(worst, abs(a - b) / max(1.0, abs(a), abs(b)))
    return worst
