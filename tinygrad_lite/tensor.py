"""Tensor and tape: reverse-mode automatic differentiation of NumPy code.

An op is a plain function: it computes its result with NumPy and ends with
`return Tensor(out, parents=..., backward=backward)`. The nested `backward(grad)` takes the gradient of the
loss with respect to `out` and returns one gradient for each parent (chain rule). Ops never touch `.grad`;
`gradients` below walks the tape once for all of them.
"""
import contextlib
import threading

import numpy as np

_thread = threading.local()


@contextlib.contextmanager
def no_grad():
    """Inside this context nothing is recorded, in this thread: results have requires_grad False."""
    before = getattr(_thread, "recording", True)
    _thread.recording = False
    try:
        yield
    finally:
        _thread.recording = before


class Tensor:
    """An array that remembers how it was computed.

    `data`: ndarray, list or number; float32 and float64 arrays keep their dtype, all else becomes float32.
    `grad`: None, or an array of data's shape and dtype, to which `backward` adds. `parents` and `backward`
    are for ops: the Tensors this one was computed from, and the function that hands its gradient to them.
    """

    __slots__ = ("data", "grad", "requires_grad", "parents", "backward_fn", "__weakref__")
    __array_ufunc__ = None  # ndarray + Tensor: NumPy steps aside and calls Tensor.__radd__

    def __init__(self, data, requires_grad=False, parents=(), backward=None):
        is_float = isinstance(data, (np.ndarray, np.generic)) and data.dtype in (np.float32, np.float64)
        self.data = np.asarray(data) if is_float else np.asarray(data, dtype=np.float32)
        self.grad = None
        if parents and getattr(_thread, "recording", True) and any(p.requires_grad for p in parents):
            self.requires_grad, self.parents, self.backward_fn = True, parents, backward
        else:
            self.requires_grad, self.parents, self.backward_fn = requires_grad, (), None

    def __repr__(self):
        return f"Tensor({self.data}, requires_grad={self.requires_grad})"

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)

    def __len__(self):
        return len(self.data)

    def item(self):
        """The one element as a Python float; ValueError if there are more."""
        return self.data.item()

    def numpy(self):
        """The array itself, not a copy."""
        return self.data

    def detach(self):
        """The same array without its history: gradients stop here."""
        return Tensor(self.data)

    def backward(self, grad=None):
        """Add d(self)/d(leaf), weighted by `grad`, to `.grad` of every leaf that requires a gradient.

        `grad` has self's shape; it may be left out when self has one element. The graph is freed on the
        way. Raises ValueError for a missing or misshapen `grad`, RuntimeError if self records nothing or
        its graph was freed by an earlier call.
        """
        for leaf, leaf_grad in gradients(self, grad).items():
            # A copy, since an op may hand one array to two parents, and clipping scales .grad in place.
            leaf.grad = np.array(leaf_grad) if leaf.grad is None else leaf.grad + leaf_grad

    def __add__(self, other): return add(self, other)
    def __sub__(self, other): return add(self, -_constant(other, self))
    def __mul__(self, other): return multiply(self, other)
    def __truediv__(self, other): return divide(self, other)
    def __matmul__(self, other): return matmul(self, other)
    def __radd__(self, other): return add(other, self)
    def __rsub__(self, other): return add(other, -self)
    def __rmul__(self, other): return multiply(other, self)
    def __rtruediv__(self, other): return divide(other, self)
    def __rmatmul__(self, other): return matmul(other, self)
    def __pow__(self, exponent): return power(self, exponent)
    def __neg__(self): return negative(self)
    def __getitem__(self, index): return take(self, index)
    def exp(self): return exp(self)
    def log(self): return log(self)
    def sum(self, axis=None, keepdims=False): return sum_(self, axis, keepdims)

    def mean(self, axis=None, keepdims=False):
        total = sum_(self, axis, keepdims)
        return total * (total.size / self.size)

    def reshape(self, *shape): return reshape(self, shape[0] if isinstance(shape[0], tuple) else shape)
    def transpose(self, *axes): return transpose(self, axes or tuple(reversed(range(self.ndim))))


# The backward pass.

def gradients(root, grad=None):
    """d(root)/d(leaf), weighted by `grad`, as a dict {leaf Tensor: array}; frees the graph as it goes.

    A node's gradient is complete once every node that used it has reported (Kahn's topological order), so
    count the uses first. Both walks are loops: a chain of 100,000 ops must not overflow Python's stack.
    """
    grad = _initial_grad(root, grad)
    uses, stack = {root: 0}, [root]
    while stack:
        node = stack.pop()
        if node.parents is None:
            raise RuntimeError("this graph was freed by an earlier backward(); compute the loss again first")
        for parent in node.parents:
            if parent.requires_grad:
                if parent not in uses:
                    uses[parent] = 0
                    stack.append(parent)
                uses[parent] += 1

    arrived, summed, leaves, ready = {root: grad}, set(), {}, [root]
    while ready:
        node = ready.pop()
        grad = arrived.pop(node)
        if node.backward_fn is None:
            leaves[node] = grad
            continue
        parents, backward_fn = node.parents, node.backward_fn
        node.parents = node.backward_fn = None  # free what forward saved as soon as it has served
        for parent, parent_grad in zip(parents, backward_fn(grad), strict=True):
            if not parent.requires_grad:
                continue
            if parent_grad.shape != parent.shape or parent_grad.dtype != parent.dtype:
                raise RuntimeError(f"{backward_fn.__qualname__} returned a gradient {parent_grad.dtype}"
                                   f"{parent_grad.shape} for a tensor {parent.dtype}{parent.shape}")
            if parent not in arrived:
                arrived[parent] = parent_grad  # borrowed: it may be a view, or go to two parents
            elif parent not in summed:
                arrived[parent] = arrived[parent] + parent_grad
                summed.add(parent)  # from now on the array is ours alone
            else:
                arrived[parent] += parent_grad
            uses[parent] -= 1
            if uses[parent] == 0:
                ready.append(parent)
    return leaves


def _initial_grad(root, grad):
    if not root.requires_grad:
        raise RuntimeError("backward() on a tensor that does not require a gradient")
    if grad is None:
        if root.size != 1:
            raise ValueError(f"backward() of a tensor of shape {root.shape} needs a gradient of that shape")
        return np.ones(root.shape, root.dtype)
    grad = np.asarray(grad, dtype=root.dtype)
    if grad.shape != root.shape:
        raise ValueError(f"a gradient of shape {grad.shape} for a tensor of shape {root.shape}")
    return grad


# Elementwise ops, with NumPy's broadcasting.

def _constant(value, like):
    """`value` as a Tensor: numbers and arrays take the dtype of the Tensor they meet."""
    if not isinstance(value, Tensor):
        return Tensor(np.asarray(value, dtype=like.dtype))
    if value.dtype != like.dtype:
        raise TypeError(f"a {value.dtype} tensor meets a {like.dtype} tensor; convert one of them first")
    return value


def _pair(a, b):
    a = a if isinstance(a, Tensor) else _constant(a, b)
    return a, _constant(b, a)


def _sum_to(grad, shape):
    """Broadcasting copied an operand of `shape` over new or longer axes; its gradient sums the copies."""
    if grad.shape == shape:
        return grad
    new = grad.ndim - len(shape)
    axes = tuple(range(new)) + tuple(new + i for i, n in enumerate(shape) if n == 1)
    return grad.sum(axis=axes, keepdims=True).reshape(shape)


def add(a, b):
    a, b = _pair(a, b)

    def backward(grad):
        return _sum_to(grad, a.shape), _sum_to(grad, b.shape)
    return Tensor(a.data + b.data, parents=(a, b), backward=backward)


def multiply(a, b):
    a, b = _pair(a, b)

    def backward(grad):
        return _sum_to(grad * b.data, a.shape), _sum_to(grad * a.data, b.shape)
    return Tensor(a.data * b.data, parents=(a, b), backward=backward)


def divide(a, b):
    a, b = _pair(a, b)
    out = a.data / b.data

    def backward(grad):
        grad = grad / b.data
        return _sum_to(grad, a.shape), _sum_to(-grad * out, b.shape)  # d(a/b)/db = -(a/b)/b
    return Tensor(out, parents=(a, b), backward=backward)


def power(a, exponent):
    """a ** exponent, elementwise, for a number as exponent."""
    if not isinstance(exponent, (int, float)):
        raise TypeError(f"the exponent must be a number, not {type(exponent).__name__}")

    def backward(grad):
        slope = exponent * a.data ** (exponent - 1) if exponent else np.zeros_like(a.data)
        return (grad * slope,)
    return Tensor(a.data ** exponent, parents=(a,), backward=backward)


def negative(a):
    return Tensor(-a.data, parents=(a,), backward=lambda grad: (-grad,))


def exp(a):
    out = np.exp(a.data)
    return Tensor(out, parents=(a,), backward=lambda grad: (grad * out,))


def log(a):
    return Tensor(np.log(a.data), parents=(a,), backward=lambda grad: (grad / a.data,))


# Products, reductions and shapes.

def matmul(a, b):
    """a @ b over the last two axes, (..., n, k) @ (..., k, m); the axes before broadcast."""
    a, b = _pair(a, b)
    if a.ndim == 1:
        return (a.reshape(1, -1) @ b)[..., 0, :]
    if b.ndim == 1:
        return (a @ b.reshape(-1, 1))[..., 0]

    def backward(grad):
        return (_sum_to(grad @ b.data.swapaxes(-1, -2), a.shape),
                _sum_to(a.data.swapaxes(-1, -2) @ grad, b.shape))
    return Tensor(a.data @ b.data, parents=(a, b), backward=backward)


def sum_(a, axis=None, keepdims=False):
    def backward(grad):
        if axis is not None and not keepdims:
            grad = np.expand_dims(grad, axis)
        return (np.broadcast_to(grad, a.shape),)
    return Tensor(a.data.sum(axis=axis, keepdims=keepdims), parents=(a,), backward=backward)


def reshape(a, shape):
    return Tensor(a.data.reshape(shape), parents=(a,), backward=lambda grad: (grad.reshape(a.shape),))


def transpose(a, axes):
    """Axis i of the result is axis axes[i] of a."""
    return Tensor(a.data.transpose(axes), parents=(a,),
                  backward=lambda grad: (grad.transpose(np.argsort(axes)),))


def take(a, index):
    """a[index] for any NumPy index; an element taken twice receives both gradients."""
    def backward(grad):
        taken = np.arange(a.size).reshape(a.shape)[index]
        total = np.bincount(taken.ravel(), weights=grad.ravel(), minlength=a.size)
        return (total.reshape(a.shape).astype(a.dtype),)
    return Tensor(a.data[index], parents=(a,), backward=backward)
