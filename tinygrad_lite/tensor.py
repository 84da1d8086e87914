"""Tensor and tape: reverse-mode automatic differentiation of NumPy code.

An op computes `out` with NumPy and returns Tensor(out, parents=..., backward=...). That function
turns dL/d(out), L the loss, into dL/d(parent) for each parent: the chain rule. It never writes into
what it is given, which another op may hold, too."""
import contextlib
import contextvars
import heapq
import itertools
import numbers

import numpy as np

_recording = contextvars.ContextVar("recording", default=True)
_serial_numbers = itertools.count()


@contextlib.contextmanager
def no_grad():
    """A context in which this thread records nothing: results need no gradient."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Tensor:
    """An array that remembers how it was computed. `data`: ndarray, list or number. NumPy's float64
    stays, other real numbers become float32, TypeError for all else. It is not copied: changed in
    place before backward(), it makes gradients wrong, silently. `grad`: None, or an array like data
    to which backward() adds. Operands broadcast as in NumPy; all but Tensors are constants."""
    __array_ufunc__ = None  # ndarray + Tensor: NumPy steps aside and calls Tensor.__radd__

    def __init__(self, data, requires_grad=False, parents=(), backward=None):
        recorded = _recording.get() and any(p.requires_grad for p in parents)
        self.data, self.grad, self.requires_grad = _array(data), None, requires_grad or recorded
        self.parents, self.backward_fn = (parents, backward) if recorded else ((), None)
        self.serial = next(_serial_numbers)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    def item(self): return self.data.item()      # the one element as a Python float
    def numpy(self): return self.data            # the array itself, not a copy
    def detach(self): return Tensor(self.data)   # without its history: gradients stop here
    def __repr__(self): return f"Tensor({self.data}, requires_grad={self.requires_grad})"

    def backward(self, grad=None):
        """Add d(self)/d(leaf), weighted by `grad`, to `.grad` of every leaf, a Tensor that requires
        a gradient and that no op made; free the graph on the way. `grad` has self's shape; for one
        element it may be left out. Raises ValueError if it is missing or misshapen, RuntimeError if
        nothing was recorded or an earlier call has freed the graph."""
        if not self.requires_grad:
            raise RuntimeError("backward() of a tensor that does not require a gradient")
        grad = np.ones(self.shape) if grad is None and self.size == 1 else grad
        if np.shape(grad) != self.shape:
            raise ValueError(f"backward() of shape {self.shape} needs a gradient of that shape")
        grads, queue = {self: np.asarray(grad, self.dtype)}, [(-self.serial, self)]
        while queue:
            _, node = heapq.heappop(queue)  # the newest: what uses it, which is newer, is done
            grad, parents, backward = grads.pop(node), node.parents, node.backward_fn
            if parents is None:
                raise RuntimeError("an earlier backward() has freed this graph; compute it again")
            if backward is None:  # a leaf; a copy, as an op may give one array to two
                node.grad = np.array(grad) if node.grad is None else np.asarray(node.grad + grad)
                continue
            node.parents = node.backward_fn = None  # free what the forward pass saved
            for parent, new in zip(parents, backward(grad), strict=True):
                if not parent.requires_grad:
                    continue
                if (getattr(new, "dtype", None), np.shape(new)) != (parent.dtype, parent.shape):
                    raise RuntimeError(f"{backward.__qualname__} returned a wrong gradient for a "
                                       f"{parent.dtype} tensor of shape {parent.shape}: {new!r}")
                if parent not in grads:
                    heapq.heappush(queue, (-parent.serial, parent))
                grads[parent] = grads[parent] + new if parent in grads else new

    def _operand(self, value):
        """`value` as a Tensor: numbers and arrays take the dtype of the Tensor they meet."""
        if isinstance(value, Tensor) and value.dtype != self.dtype:
            raise TypeError(f"a {self.dtype} tensor meets a {value.dtype} one; convert one first")
        return value if isinstance(value, Tensor) else Tensor(_array(value, self.dtype))

    def __add__(self, other):
        a, b = self, self._operand(other)
        return _op(a.data + b.data, (a, b), lambda grad: (grad, grad))

    def __mul__(self, other):
        a, b = self, self._operand(other)
        return _op(a.data * b.data, (a, b), lambda grad: (grad * b.data, grad * a.data))

    def __pow__(self, exponent):
        if not isinstance(exponent, numbers.Real):
            raise TypeError(f"the exponent must be a number, not {type(exponent)}")
        n = float(exponent)  # a NumPy float64 would turn float32 into float64
        return _op(self.data ** n, (self,), lambda grad: (
            grad * n * self.data ** (n - 1) if n else np.zeros_like(grad),))

    def exp(self): return _op(out := np.exp(self.data), (self,), lambda grad: (grad * out,))
    def log(self): return _op(np.log(self.data), (self,), lambda grad: (grad / self.data,))
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -self._operand(other)
    def __truediv__(self, other): return self * self._operand(other) ** -1.0
    __radd__, __rmul__ = __add__, __mul__
    def __rsub__(self, other): return -self + other
    def __rtruediv__(self, other): return self ** -1.0 * other
    def __rmatmul__(self, other): return self._operand(other) @ self

    def __matmul__(self, other):
        """(..., n, k) @ (..., k, m) -> (..., n, m); the axes before the last two broadcast."""
        a, b = self, self._operand(other)
        if b.ndim == 1:
            return (a @ b.reshape(-1, 1))[..., 0]
        if a.ndim == 1:
            return (a.reshape(1, -1) @ b)[..., 0, :]
        return _op(a.data @ b.data, (a, b), lambda grad: (grad @ b.data.mT, a.data.mT @ grad))

    def sum(self, axis=None, keepdims=False):
        out = self.data.sum(axis, keepdims=True)
        return _op(out if keepdims else out.squeeze(axis), (self,), lambda grad: (
            np.broadcast_to(grad.reshape(out.shape), self.shape),))

    def mean(self, axis=None, keepdims=False):
        total = self.sum(axis, keepdims)
        return total * (total.size / self.size)

    def reshape(self, *shape):
        return _op(self.data.reshape(*shape), (self,), lambda grad: (grad.reshape(self.shape),))

    def transpose(self, *axes):
        out = self.data.transpose(axes or None)
        inverse = np.argsort(np.mod(axes, self.ndim)) if axes else None
        return _op(out, (self,), lambda grad: (grad.transpose(inverse),))

    def __getitem__(self, index):
        """self[index] for any NumPy index; an element taken twice receives both gradients."""
        def backward(grad):
            total = np.zeros_like(self.data)
            np.add.at(total, index, grad)
            return (total,)
        return _op(self.data[index], (self,), backward)


def _array(data, dtype=None):
    """`data` as an array of `dtype`: if None, of float64 for such an array, else of float32."""
    array = np.asarray(data)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"expected real numbers, as array, list or number, not {type(data)}")
    keep = array.dtype == np.float64 and isinstance(data, (np.ndarray, np.generic))
    return array.astype(dtype or (np.float64 if keep else np.float32), copy=False)


def _op(out, parents, backward):
    """An op's Tensor. Broadcasting copies a parent over new or longer axes; gradients add up."""
    def sum_to(shape, grad):
        if grad.shape == shape:
            return grad
        padded = (1,) * (grad.ndim - len(shape)) + shape
        axes = tuple(i for i, n in enumerate(padded) if n != grad.shape[i])
        return grad.sum(axis=axes).reshape(shape)
    return Tensor(out, parents=parents, backward=lambda grad: [
        sum_to(parent.shape, g) for parent, g in zip(parents, backward(grad))])
