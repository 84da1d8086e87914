"""Finite differences against backward()."""
import numpy as np

from .tensor import Tensor, no_grad


def gradcheck(fn, *arrays, step=1e-6):
    """The largest error between backward() and central differences of fn, in float64.

    `fn` takes a Tensor for each array and returns one, whose elements are weighted by fixed random
    numbers, so that errors cannot cancel. The error of an element is |a - b| / max(1, |a|, |b|),
    a from backward() and b = (f(x + step) - f(x - step)) / (2 step), itself off by about 1e-9.
    """
    inputs = [Tensor(np.array(array, dtype=np.float64), requires_grad=True) for array in arrays]
    out = fn(*inputs)
    weights = np.random.default_rng(0).standard_normal(out.shape)
    out.backward(weights)
    worst = 0.0
    for tensor in inputs:
        analytic = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        for index in np.ndindex(tensor.shape):
            x, a, values = float(tensor.data[index]), analytic[index], []
            for tensor.data[index] in (x + step, x - step):
                with no_grad():
                    values.append((fn(*inputs).data * weights).sum())
            tensor.data[index] = x
            b = (values[0] - values[1]) / (2 * step)
            # np.maximum, unlike max(), keeps a NaN
            worst = np.maximum(worst, abs(a - b) / max(1.0, abs(a), abs(b)))
    return float(worst)
