"""Tensor: reverse-mode automatic differentiation of NumPy code.

Every op follows one pattern. It computes its result `out` with NumPy and returns
`Tensor(out, parents=..., backward=...)`. The parents are the Tensors that `out` was computed from.
`backward` applies the chain rule: with L the loss, it takes dL/d(out) and returns dL/d(parent) for
each parent. It must not write into the array it is given, because another op may hold the same one.
"""

import contextlib
import numbers

import numpy as np

_recording = True  # False inside no_grad()


@contextlib.contextmanager
def no_grad():
    """A context in which ops are not recorded: their results do not require a gradient."""
    global _recording
    before = _recording
    _recording = False
    try:
        yield
    finally:
        _recording = before


class Tensor:
    """An array that remembers how it was computed.

    data: an ndarray, list or number. A float64 array or NumPy scalar stays float64; any other real
        numbers become float32. TypeError for anything else. An array that keeps its dtype is not
        copied. It must not be changed in place between the forward pass and backward().
    grad: None, or an array of data's shape and dtype, to which backward() adds.
    requires_grad: True for a leaf that should receive a gradient, and for all computed from it.

    Operands broadcast as in NumPy. Numbers, lists and arrays among them are constants, and take the
    dtype of the Tensor. Two Tensors must have the same dtype (TypeError): otherwise one float64
    Tensor would turn everything computed from it into float64.
    """

    __array_ufunc__ = None  # makes ndarray + Tensor call Tensor.__radd__

    def __init__(self, data, requires_grad=False, parents=(), backward=None):
        self.data = _to_array(data)
        self.grad = None
        self.requires_grad = requires_grad
        self.parents = ()
        self.backward_fn = None
        if _recording and any(parent.requires_grad for parent in parents):
            self.requires_grad = True
            self.parents = parents
            self.backward_fn = backward

    @property
    def shape(self):
        return self.data.shape

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def ndim(self):
        return self.data.ndim

    @property
    def size(self):
        return self.data.size

    def numpy(self):
        """The array itself, not a copy."""
        return self.data

    def item(self):
        """The only element, as a Python number."""
        return self.data.item()

    def detach(self):
        """The same array without its history: no gradient flows through it."""
        return Tensor(self.data)

    def __repr__(self):
        return f"Tensor({self.data}, requires_grad={self.requires_grad})"

    def backward(self, grad=None):
        """Add dL/d(leaf) to `.grad` of every leaf that self was computed from and that requires it.

        grad: dL/d(self), of self's shape. It may be left out if self has a single element; then
            L is self, and it is 1.

        The graph is freed on the way, so that memory falls as the pass proceeds. Raises
        RuntimeError if self does not require a gradient, or an earlier call has freed its graph,
        and ValueError if `grad` is missing or has another shape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() of a tensor that does not require a gradient")
        if grad is None and self.size == 1:
            grad = np.ones(self.shape)
        if np.shape(grad) != self.shape:
            raise ValueError(f"backward() of shape {self.shape} needs a gradient of that shape")

        nodes = _parents_first(self)
        grads = {self: np.asarray(grad, self.dtype)}  # dL/d(node), complete once its turn comes
        while nodes:
            node = nodes.pop()  # all that was computed from it has had its turn
            grad = grads.pop(node)
            if node.backward_fn is None:  # a leaf
                # Copy, because the op may have given the same array to two parents.
                node.grad = np.array(grad) if node.grad is None else np.asarray(node.grad + grad)
                continue
            parents, backward = node.parents, node.backward_fn
            node.parents = node.backward_fn = None  # free what the forward pass has kept
            for parent, parent_grad in zip(parents, backward(grad), strict=True):
                if not parent.requires_grad:
                    continue
                _check_gradient(parent_grad, parent, backward)
                if parent in grads:  # used by several ops: their gradients add up
                    parent_grad = grads[parent] + parent_grad
                grads[parent] = parent_grad

    # The ops.

    def __add__(self, other):
        a, b = self, self._operand(other)
        out = a.data + b.data

        def backward(grad):
            return _sum_to(grad, a.shape), _sum_to(grad, b.shape)

        return Tensor(out, parents=(a, b), backward=backward)

    def __mul__(self, other):
        a, b = self, self._operand(other)
        out = a.data * b.data

        def backward(grad):
            return _sum_to(grad * b.data, a.shape), _sum_to(grad * a.data, b.shape)

        return Tensor(out, parents=(a, b), backward=backward)

    def __truediv__(self, other):
        a, b = self, self._operand(other)
        out = a.data / b.data

        def backward(grad):
            # d(a/b)/db is -a / b^2. Written as -(1/b) (a/b), it does not overflow where b^2 does.
            grad_a = grad / b.data
            grad_b = -grad_a * out
            return _sum_to(grad_a, a.shape), _sum_to(grad_b, b.shape)

        return Tensor(out, parents=(a, b), backward=backward)

    def __pow__(self, exponent):
        if not isinstance(exponent, numbers.Real):
            raise TypeError(f"the exponent must be a number, not {type(exponent)}")
        n = float(exponent)  # a NumPy float64 would turn float32 into float64
        out = self.data**n

        def backward(grad):
            if n == 0:  # the formula below would give 0 * inf at x = 0
                return (np.zeros_like(grad),)
            return (grad * n * self.data ** (n - 1),)

        return Tensor(out, parents=(self,), backward=backward)

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -self._operand(other)

    def __radd__(self, other):
        return self + other

    def __rmul__(self, other):
        return self * other

    def __rsub__(self, other):
        return self._operand(other) - self

    def __rtruediv__(self, other):
        return self._operand(other) / self

    def __rmatmul__(self, other):
        return self._operand(other) @ self

    def __matmul__(self, other):
        """(..., n, k) @ (..., k, m) -> (..., n, m); axes before the last two broadcast."""
        a, b = self, self._operand(other)
        if b.ndim == 1:
            return (a @ b.reshape(-1, 1))[..., 0]
        if a.ndim == 1:
            return (a.reshape(1, -1) @ b)[..., 0, :]
        out = a.data @ b.data

        def backward(grad):
            grad_a = grad @ b.data.mT  # (..., n, m) @ (..., m, k)
            grad_b = a.data.mT @ grad  # (..., k, n) @ (..., n, m)
            return _sum_to(grad_a, a.shape), _sum_to(grad_b, b.shape)

        return Tensor(out, parents=(a, b), backward=backward)

    def exp(self):
        out = np.exp(self.data)

        def backward(grad):
            return (grad * out,)

        return Tensor(out, parents=(self,), backward=backward)

    def log(self):
        out = np.log(self.data)

        def backward(grad):
            return (grad / self.data,)

        return Tensor(out, parents=(self,), backward=backward)

    def sum(self, axis=None, keepdims=False):
        """axis: None for all, an int or a tuple of ints."""
        kept = self.data.sum(axis, keepdims=True)  # summed axes have length 1
        out = kept if keepdims else kept.squeeze(axis)

        def backward(grad):
            return (np.broadcast_to(grad.reshape(kept.shape), self.shape),)

        return Tensor(out, parents=(self,), backward=backward)

    def mean(self, axis=None, keepdims=False):
        """As sum. The mean of no elements is NaN, as in NumPy."""
        total = self.sum(axis, keepdims)
        n_summed = self.size / max(1, total.size)
        return total / n_summed

    def reshape(self, *shape):
        out = self.data.reshape(*shape)

        def backward(grad):
            return (grad.reshape(self.shape),)

        return Tensor(out, parents=(self,), backward=backward)

    def transpose(self, *axes):
        """Axis i of the result is axis axes[i] of self; without axes, their order is reversed."""
        out = self.data.transpose(axes or None)

        def backward(grad):
            if not axes:
                return (grad.transpose(),)
            inverse = np.argsort([axis % self.ndim for axis in axes])
            return (grad.transpose(inverse),)

        return Tensor(out, parents=(self,), backward=backward)

    def __getitem__(self, index):
        """self[index] for any NumPy index. An element taken twice receives both gradients."""
        out = self.data[index]

        def backward(grad):
            total = np.zeros_like(self.data)
            np.add.at(total, index, grad)
            return (total,)

        return Tensor(out, parents=(self,), backward=backward)

    def _operand(self, value):
        """`value` as a Tensor of self's dtype."""
        if not isinstance(value, Tensor):
            return Tensor(_to_array(value, self.dtype))
        if value.dtype != self.dtype:
            raise TypeError(
                f"cannot combine {self.dtype} and {value.dtype} Tensors; convert one first"
            )
        return value

    # Python's protocols answer as the array does. Without these methods, Python would make up its
    # own answers: bool(Tensor(0.0)) would be True, and sum(Tensor(5.0)) would be 0.

    def __bool__(self):
        return bool(self.data)

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __contains__(self, value):
        return value in self.data

    def __eq__(self, other):
        return self.data == (other.data if isinstance(other, Tensor) else other)

    def __ne__(self, other):
        return self.data != (other.data if isinstance(other, Tensor) else other)

    __hash__ = object.__hash__  # a Tensor is a key by identity, not by its numbers

    def __getstate__(self):
        """The state for copy.deepcopy and pickle. Only leaves can be copied: a copied result would
        point to copied leaves, and the original ones would get no gradient."""
        if self.parents != ():
            raise TypeError("only a leaf Tensor can be copied or pickled; call detach() first")
        return self.__dict__


def _to_array(data, dtype=None):
    """`data` as an array of `dtype`; if None, float64 arrays stay and all else becomes float32."""
    array = np.asarray(data)
    if array.dtype.kind not in "fiub":  # floats, integers, unsigned integers, booleans
        raise TypeError(f"expected real numbers, as array, list or number, not {type(data)}")
    if dtype is None:
        is_float64 = array.dtype == np.float64 and isinstance(data, (np.ndarray, np.generic))
        dtype = np.float64 if is_float64 else np.float32
    return array.astype(dtype, copy=False)


def _parents_first(root):
    """Every node that requires a gradient and that root was computed from, each after its parents.

    This is a depth-first search. It keeps its own stack, because a graph may be deeper than
    Python's recursion limit.
    """
    nodes, seen = [], set()
    stack = [(root, False)]
    while stack:
        node, parents_are_listed = stack.pop()
        if parents_are_listed:
            nodes.append(node)
        elif node not in seen:
            if node.parents is None:
                raise RuntimeError("an earlier backward() has freed this graph; compute it again")
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents if parent.requires_grad)
    return nodes


def _sum_to(grad, shape):
    """Undo broadcasting: sum `grad` over the axes along which an array of `shape` was repeated."""
    if grad.shape == shape:
        return grad
    n_new = grad.ndim - len(shape)  # axes that broadcasting has put in front
    repeated = tuple(n_new + i for i, n in enumerate(shape) if n == 1)
    return grad.sum(axis=(*range(n_new), *repeated)).reshape(shape)


def _check_gradient(grad, parent, backward):
    """RuntimeError unless `grad` has parent's shape and dtype: NumPy would silently broadcast or
    upcast it."""
    dtype, shape = getattr(grad, "dtype", None), np.shape(grad)
    if dtype != parent.dtype or shape != parent.shape:
        raise RuntimeError(
            f"{backward.__qualname__} returned a wrong gradient for a {parent.dtype} tensor "
            f"of shape {parent.shape}: {grad!r}"
        )
