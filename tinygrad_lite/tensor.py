"""Tensor and tape: reverse-mode automatic differentiation of NumPy code.

An op is a plain function: it computes its result with NumPy and ends with
`return Tensor(out, parents=..., backward=backward)`. The nested `backward(grad)` takes the gradient
of the loss with respect to `out` and returns one gradient for each parent (chain rule). Ops never
touch `.grad`; `gradients` at the end walks the tape, the parents and theirs in turn, once for all.
It ends at the leaves, the Tensors that no op made.
"""
import contextlib
import heapq
import itertools
import threading

import numpy as np

_thread = threading.local()
_serial_numbers = itertools.count()


@contextlib.contextmanager
def no_grad():
    """Inside this context nothing is recorded, in this thread: results need no gradient."""
    before = getattr(_thread, "recording", True)
    _thread.recording = False
    try:
        yield
    finally:
        _thread.recording = before


class Tensor:
    """An array that remembers how it was computed.

    `data`: ndarray, list or number; float32 and float64 arrays keep their dtype, all else becomes
    float32. `grad`: None, or an array of data's shape and dtype, to which `backward()` adds.
    `parents` and `backward` are for ops: the Tensors this one was computed from, and the function
    that turns its gradient into theirs.
    """
    __slots__ = ("data", "grad", "requires_grad", "parents", "backward_fn", "serial", "__weakref__")
    __array_ufunc__ = None  # ndarray + Tensor: NumPy steps aside and calls Tensor.__radd__

    def __init__(self, data, requires_grad=False, parents=(), backward=None):
        if isinstance(data, Tensor):
            raise TypeError("data is a Tensor already; .detach() makes one without its history")
        keep = getattr(data, "dtype", None) in (np.float32, np.float64)
        self.data = np.asarray(data) if keep else np.asarray(data, dtype=np.float32)
        recorded = getattr(_thread, "recording", True) and any(p.requires_grad for p in parents)
        self.grad, self.requires_grad = None, requires_grad or recorded
        self.parents, self.backward_fn = (parents, backward) if recorded else ((), None)
        self.serial = next(_serial_numbers)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)

    def __reduce__(self): return Tensor, (self.data, self.requires_grad)  # pickled without history
    def __repr__(self): return f"Tensor({self.data}, requires_grad={self.requires_grad})"
    def item(self): return self.data.item()      # the one element as a Python float
    def numpy(self): return self.data            # the array itself, not a copy
    def detach(self): return Tensor(self.data)   # without its history: gradients stop here

    def backward(self, grad=None):
        """Add d(self)/d(leaf), weighted by `grad`, to `.grad` of every leaf that requires one.

        `grad` has self's shape; it may be left out when self has one element. The graph is freed on
        the way. Raises ValueError for a missing or misshapen `grad`, RuntimeError if nothing was
        recorded or an earlier call has freed the graph.
        """
        for leaf, grad in gradients(self, grad).items():
            if leaf.grad is None:
                leaf.grad = np.array(grad)  # a copy: an op may hand one array to two parents
            else:
                leaf.grad += grad

    # Elementwise ops. Operands broadcast as in NumPy; numbers and arrays are constants.

    def __add__(self, other):
        other = self._operand(other)

        def backward(grad):
            return _sum_to(grad, self.shape), _sum_to(grad, other.shape)
        return Tensor(self.data + other.data, parents=(self, other), backward=backward)

    def __mul__(self, other):
        other = self._operand(other)

        def backward(grad):
            return _sum_to(grad * other.data, self.shape), _sum_to(grad * self.data, other.shape)
        return Tensor(self.data * other.data, parents=(self, other), backward=backward)

    def __truediv__(self, other):
        other = self._operand(other)
        out = self.data / other.data

        def backward(grad):  # d(a / b) / db = -(a / b) / b
            grad = grad / other.data
            return _sum_to(grad, self.shape), _sum_to(-grad * out, other.shape)
        return Tensor(out, parents=(self, other), backward=backward)

    def __pow__(self, exponent):
        if not isinstance(exponent, (int, float)):
            raise TypeError(f"the exponent must be a number, not {type(exponent).__name__}")
        exponent = float(exponent)  # a NumPy float64 would turn float32 into float64

        def backward(grad):
            slope = exponent * self.data ** (exponent - 1) if exponent else np.zeros_like(self.data)
            return (grad * slope,)
        return Tensor(self.data ** exponent, parents=(self,), backward=backward)

    def exp(self):
        out = np.exp(self.data)
        return Tensor(out, parents=(self,), backward=lambda grad: (grad * out,))

    def log(self):
        return Tensor(np.log(self.data), parents=(self,), backward=lambda grad: (grad / self.data,))

    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -self._operand(other)
    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __rsub__(self, other): return -self + other
    def __rtruediv__(self, other): return self._operand(other) / self
    def __rmatmul__(self, other): return self._operand(other) @ self

    def _operand(self, value):
        """`value` as a Tensor: numbers and arrays take the dtype of the Tensor they meet."""
        if not isinstance(value, Tensor):
            return Tensor(np.asarray(value, dtype=self.dtype))
        if value.dtype != self.dtype:
            raise TypeError(f"a {self.dtype} tensor meets a {value.dtype} one; convert one first")
        return value

    # Products, reductions and shapes.

    def __matmul__(self, other):
        """(..., n, k) @ (..., k, m) -> (..., n, m); the axes before the last two broadcast."""
        other = self._operand(other)
        if other.ndim == 1:
            return (self @ other.reshape(-1, 1))[..., 0]
        if self.ndim == 1:
            return (self.reshape(1, -1) @ other)[..., 0, :]

        def backward(grad):
            return (_sum_to(grad @ other.data.swapaxes(-1, -2), self.shape),
                    _sum_to(self.data.swapaxes(-1, -2) @ grad, other.shape))
        return Tensor(self.data @ other.data, parents=(self, other), backward=backward)

    def sum(self, axis=None, keepdims=False):
        def backward(grad):
            if axis is not None and not keepdims:
                grad = np.expand_dims(grad, axis)
            return (np.broadcast_to(grad, self.shape),)
        out = self.data.sum(axis=axis, keepdims=keepdims)
        return Tensor(out, parents=(self,), backward=backward)

    def mean(self, axis=None, keepdims=False):
        total = self.sum(axis, keepdims)
        return total * (total.size / self.size)

    def reshape(self, *shape):
        out = self.data.reshape(*shape)
        return Tensor(out, parents=(self,), backward=lambda grad: (grad.reshape(self.shape),))

    def transpose(self, *axes):
        """Axis i of the result is axis axes[i] of self, as in NumPy and torch's permute; without
        axes, all are reversed."""
        axes = [axis % self.ndim for axis in axes or reversed(range(self.ndim))]
        return Tensor(self.data.transpose(axes), parents=(self,),
                      backward=lambda grad: (grad.transpose(np.argsort(axes)),))

    def __getitem__(self, index):
        """self[index] for any NumPy index; an element taken twice receives both gradients."""
        def backward(grad):
            taken = np.arange(self.size).reshape(self.shape)[index]
            total = np.bincount(taken.ravel(), weights=grad.ravel(), minlength=self.size)
            return (total.reshape(self.shape).astype(self.dtype),)
        return Tensor(self.data[index], parents=(self,), backward=backward)


def _sum_to(grad, shape):
    """Broadcasting copied an operand over new or longer axes; its gradient sums the copies."""
    if grad.shape == shape:
        return grad
    new = grad.ndim - len(shape)
    axes = tuple(range(new)) + tuple(new + i for i, n in enumerate(shape) if n == 1)
    return grad.sum(axis=axes).reshape(shape)


def gradients(root, grad=None):
    """d(root)/d(leaf), weighted by `grad`, as {leaf Tensor: array}; frees the graph as it goes.

    A node is made after its parents. So the newest of the nodes that wait has had all of its
    gradient, and no recursion is needed. Raises as `Tensor.backward` does.
    """
    if not root.requires_grad:
        raise RuntimeError("backward() of a tensor that does not require a gradient")
    grad = np.asarray(np.ones(root.shape) if grad is None and root.size == 1 else grad, root.dtype)
    if grad.shape != root.shape:
        raise ValueError(f"backward() of shape {root.shape} needs a gradient of that shape")
    arrived, owned, leaves = {root: grad}, set(), {}
    waiting = [(-root.serial, root)]  # a heap
    while waiting:
        node = heapq.heappop(waiting)[1]
        grad, parents, backward = arrived.pop(node), node.parents, node.backward_fn
        owned.discard(node)
        if parents is None:
            raise RuntimeError("an earlier backward() has freed this graph; compute it again first")
        if backward is None:
            leaves[node] = grad
            continue
        node.parents = node.backward_fn = None  # free what forward saved once it has served
        node = parent = parent_grad = None  # no reference here: memory falls as the walk goes on
        for parent, parent_grad in zip(parents, backward(grad), strict=True):
            if not parent.requires_grad:
                continue
            dtype, shape = getattr(parent_grad, "dtype", None), np.shape(parent_grad)
            if (dtype, shape) != (parent.dtype, parent.shape):
                raise RuntimeError(f"{backward.__qualname__} returned {dtype} {shape} as the "
                                   f"gradient of a {parent.dtype} tensor of shape {parent.shape}")
            if parent not in arrived:
                arrived[parent] = parent_grad  # borrowed: may be a view, or go to two parents
                heapq.heappush(waiting, (-parent.serial, parent))
            elif parent not in owned:
                arrived[parent] = arrived[parent] + parent_grad
                owned.add(parent)  # from now on the array is ours alone
            else:
                arrived[parent] += parent_grad
    return leaves
