"""Tensor: values and gradients of every op, what backward() promises, and Python's protocols."""

import copy
import operator
import pickle
import weakref

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from helpers import (
    LAYOUTS,
    TOLERANCE,
    hand_out_read_only_gradients,
    leaf,
    normal,
    positive,
    seeds,
    tape,
)
from tinygrad_lite import Tensor, gradcheck, no_grad

ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def exp(x):
    return x.exp() if isinstance(x, Tensor) else np.exp(x)


def log(x):
    return x.log() if isinstance(x, Tensor) else np.log(x)


# Functions of a single x, which is a 2 x 2 Tensor or a 2 x 2 array: what NumPy makes of the array
# is what a Tensor should make of it. Those of the first table also take an x of shape ().
ANY_SHAPE = {
    "x + 1": lambda x: x + 1,
    "1 - x": lambda x: 1 - x,
    "x * np.float64(3)": lambda x: x * np.float64(3),
    "np.float64(3) * x": lambda x: np.float64(3) * x,
    "np.int64(2) / x": lambda x: np.int64(2) / x,
    "2 / x": lambda x: 2 / x,
    "x / 3": lambda x: x / 3,
    "x / x": lambda x: x / x,
    "x * x - x": lambda x: x * x - x,
    "-x": lambda x: -x,
    "x * array": lambda x: x * np.array([1, 2]),
    "array - x": lambda x: np.array([1.0, 2]) - x,
    "x / array": lambda x: x / np.array([[1.5], [3]]),
    "array / x": lambda x: np.array([1.5, 3]) / x,
    "x * list": lambda x: x * [True, False],
    "x ** 3": lambda x: x**3,
    "x ** 0": lambda x: x**0,
    "x ** -0.5": lambda x: x**-0.5,
    "negative ** -3": lambda x: (-x) ** -3,
    "negative ** 2": lambda x: (-x) ** 2,
    "x ** np.int64(2)": lambda x: x ** np.int64(2),
    "x ** np.float64(2)": lambda x: x ** np.float64(2),
    "0 ** 0": lambda x: (x * [[0, 1], [1, 1]]) ** 0,  # where inf * 0 may lurk
    "0 ** 1": lambda x: (x * [[0, 1], [1, 1]]) ** 1,
    "0 ** 2": lambda x: (x * [[0, 1], [1, 1]]) ** 2,
    "exp": exp,
    "log": log,
    "x used three times": lambda x: x + exp(x) + log(x),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "reshape": lambda x: x.reshape(1, -1),
    "transpose": lambda x: x.transpose(),
}
ALL_OPS = {
    **ANY_SHAPE,
    "x @ x": lambda x: x @ x,
    "x @ array": lambda x: x @ np.array([[1, 2], [3, 4]]),
    "array @ x": lambda x: np.array([[1.0, 2], [3, 4]]) @ x,
    "x @ list": lambda x: x @ [1, 2],
    "sum over an axis": lambda x: x.sum(axis=0),
    "mean over an axis": lambda x: x.mean(axis=1, keepdims=True),
    "index": lambda x: x[0, 1],
    "index twice": lambda x: x[[0, 0, 1]],
}
every_op = pytest.mark.parametrize("op", ALL_OPS.values(), ids=ALL_OPS)
every_op_of_any_shape = pytest.mark.parametrize("op", ANY_SHAPE.values(), ids=ANY_SHAPE)


def check(op, *arrays):
    """`op` of Tensors gives what NumPy gives, shape included, and its gradient is right."""
    out = op(*(Tensor(array) for array in arrays))
    expected = op(*arrays)
    assert out.shape == np.shape(expected)
    assert np.allclose(out.data, expected, rtol=1e-14, atol=1e-14)
    assert gradcheck(op, *arrays) < TOLERANCE


# The judge of all this is gradcheck, so it is tested first.


def scaled(x, slope, claimed):
    """slope * x, with a backward that claims another slope."""

    def backward(grad):
        return (grad * claimed,)

    return Tensor(slope * x.data, parents=(x,), backward=backward)


def test_gradcheck_accepts_a_correct_gradient():
    assert gradcheck(lambda x: scaled(x, 2.0, claimed=2.0), positive(0, 50)) < TOLERANCE


def test_gradcheck_sees_a_wrong_sign():
    assert gradcheck(lambda x: scaled(x, 2.0, claimed=-2.0), positive(0, 50)) > 0.5


def test_gradcheck_sees_a_small_error_in_one_of_many_elements():
    claimed = np.full(50, 2.0)
    claimed[-1] += 1e-4
    assert gradcheck(lambda x: scaled(x, 2.0, claimed), positive(0, 50)) > TOLERANCE


def test_gradcheck_sees_a_gradient_that_is_not_a_number():
    claimed = np.full(50, 2.0)
    claimed[7] = np.nan
    assert np.isnan(gradcheck(lambda x: scaled(x, 2.0, claimed), positive(0, 50)))


def test_gradcheck_sees_errors_that_cancel_in_a_sum():
    claimed = np.array([1.0, 3.0])  # should be 2 and 2; the sum over both elements is right

    def op(x):
        return scaled(x.reshape(1, 1) * [[1.0, 1.0]], 2.0, claimed)

    assert gradcheck(op, np.array(0.5)) > 0.1


def test_gradcheck_sees_a_gradient_that_is_missing():
    x = positive(0, 5)
    assert gradcheck(lambda x, cut: x * cut.detach(), x, x) > 0.5


def test_gradcheck_accepts_an_input_that_is_not_used():
    x = positive(0, 5)
    assert gradcheck(lambda x, unused: x * x, x, x) < TOLERANCE


@pytest.mark.parametrize("dtype", [int, np.float32])
def test_gradcheck_measures_in_float64(dtype):
    """In float32 a step of 1e-6 would drown in rounding errors, and integers have no such step."""
    assert gradcheck(lambda x: x**3, np.arange(1, 4, dtype=dtype)) < TOLERANCE


@pytest.mark.parametrize("size", [1e4, 1e8, 1e12])
def test_gradcheck_is_as_accurate_for_large_inputs(size):
    """Its step grows with x: a step of 1e-6 is hardly a change to 1e8, and none at all to 1e12."""
    x = size * positive(0, 5)
    assert gradcheck(lambda x: size * (x / size) ** 3, x) < 1e-8  # its slopes are near 1
    assert gradcheck(lambda x: scaled(x, 1.0, claimed=1.001), x) > 1e-5


@pytest.mark.parametrize("found, true", [(1000.0, 1.0), (1.0, 1000.0), (0.1, 0.3), (-2.0, 3.0)])
def test_gradcheck_returns_the_error_that_it_defines(found, true):
    """|a - b| / max(1, |a|, |b|): absolute for small slopes, relative for large ones."""
    weight = abs(np.random.default_rng(0).standard_normal(()))  # gradcheck's, for the one element
    a, b = weight * found, weight * true
    expected = abs(a - b) / max(1, abs(a), abs(b))
    error = gradcheck(lambda x: scaled(x, true, claimed=found), np.array(0.5))
    assert error == pytest.approx(expected, rel=1e-6)


# Every op.


@every_op
def test_op_is_numpys_and_has_the_right_gradient(op):
    check(op, positive(0, 2, 2))


@every_op_of_any_shape
def test_op_of_a_single_number(op):
    check(op, positive(0))


@every_op
def test_op_works_in_any_memory_layout(op):
    """Wrong strides would give wrong numbers and no error."""
    array = positive(0, 2, 2)
    plain = leaf(array)
    out = op(plain)
    grad = normal(1, *out.shape)
    out.backward(grad)
    for layout in LAYOUTS.values():
        x = leaf(layout(array))
        op(x).backward(layout(grad) if grad.ndim > 0 else grad)
        assert np.allclose(x.grad, plain.grad, rtol=1e-13)


@every_op
def test_op_does_not_write_into_what_it_is_given(op):
    """Another op may hold the same array, be it of data or of gradients."""
    array = positive(0, 2, 2)
    array.setflags(write=False)
    loss = op(leaf(array)).sum()
    hand_out_read_only_gradients(loss)
    loss.backward()


@every_op
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_op_keeps_the_dtype(op, dtype):
    x = leaf(positive(0, 2, 2).astype(dtype))
    out = op(x)
    out.sum().backward()
    assert out.dtype == dtype
    assert x.grad.dtype == dtype


@every_op_of_any_shape
def test_op_of_a_single_number_keeps_float32(op):
    """NumPy turns an array of shape () into a scalar wherever it can; a Tensor holds an array."""
    x = leaf(positive(0).astype(np.float32))
    out = op(x)
    out.sum().backward()
    assert isinstance(out.data, np.ndarray)
    assert isinstance(x.grad, np.ndarray)
    assert out.dtype == np.float32
    assert x.grad.dtype == np.float32


def watch(tensors):
    """Weak references to the Tensors and to their arrays."""
    return [weakref.ref(thing) for tensor in tensors for thing in (tensor, tensor.data)]


def alive(references):
    return [reference() for reference in references if reference() is not None]


@every_op
def test_backward_frees_the_graph(op):
    """At once, because nothing in it is a cycle that only the garbage collector would find."""
    x = leaf(positive(0, 2, 2))
    loss = (op(x) * 2).sum()
    inner_nodes = watch(tape(loss) - {x, loss})
    assert len(inner_nodes) >= 4
    loss.backward()
    assert alive(inner_nodes) == []


@every_op
def test_a_graph_without_backward_is_freed_when_it_is_dropped(op):
    x = leaf(positive(0, 2, 2))
    loss = (op(x) * 2).sum()
    nodes = watch(tape(loss) - {x})
    assert len(nodes) >= 6
    del loss
    assert alive(nodes) == []


# All shapes.

two_shapes_that_broadcast = hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3)


@pytest.mark.parametrize("op", ARITHMETIC.values(), ids=ARITHMETIC)
@given(shapes=two_shapes_that_broadcast, seed=seeds)
def test_arithmetic_broadcasts_on_either_side(op, shapes, seed):
    a = positive(seed, *shapes.input_shapes[0])
    b = positive(seed + 1, *shapes.input_shapes[1])
    check(op, a, b)
    check(lambda x: op(x, b), a)
    check(lambda x: op(a, x), b)


@given(
    stacks=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=2),
    n=st.integers(1, 3),
    k=st.integers(1, 3),
    m=st.integers(1, 3),
    a_is_vector=st.booleans(),
    b_is_vector=st.booleans(),
    seed=seeds,
)
def test_matmul_of_matrices_stacks_of_matrices_and_vectors(
    stacks, n, k, m, a_is_vector, b_is_vector, seed
):
    a_shape = (k,) if a_is_vector else (*stacks.input_shapes[0], n, k)
    b_shape = (k,) if b_is_vector else (*stacks.input_shapes[1], k, m)
    check(operator.matmul, normal(seed, *a_shape), normal(seed + 1, *b_shape))


shapes = hnp.array_shapes(
    max_dims=3, max_side=3
)  # equal sides, which hide mistakes, are among them


@given(draw=st.data(), shape=shapes, keepdims=st.booleans(), seed=seeds)
def test_sum_and_mean_over_any_axes(draw, shape, keepdims, seed):
    """No axis, one, or several; they may count from the end."""
    ndim = len(shape)
    any_axes = st.none() | st.integers(-ndim, ndim - 1) | hnp.valid_tuple_axes(ndim)
    axis = draw.draw(any_axes, label="axis")
    x = normal(seed, *shape)
    check(lambda x: x.sum(axis=axis, keepdims=keepdims), x)
    check(lambda x: x.mean(axis=axis, keepdims=keepdims), x)


@given(draw=st.data(), shape=shapes, seed=seeds)
def test_reshape(draw, shape, seed):
    new_shape = tuple(draw.draw(st.permutations(shape), label="new shape"))
    x = normal(seed, *shape)
    check(lambda x: x.reshape(new_shape), x)
    check(lambda x: x.reshape(*new_shape, 1), x)
    check(lambda x: x.reshape(-1), x)


@given(draw=st.data(), shape=shapes, seed=seeds)
def test_transpose(draw, shape, seed):
    """Axes may count from the end."""
    ndim = len(shape)
    axes = draw.draw(st.permutations(range(ndim)), label="axes")
    from_end = draw.draw(st.lists(st.booleans(), min_size=ndim, max_size=ndim))
    axes = [axis - ndim if negative else axis for axis, negative in zip(axes, from_end)]
    x = normal(seed, *shape)
    check(lambda x: x.transpose(*axes), x)
    check(lambda x: x.transpose(), x)


@given(draw=st.data(), shape=shapes, seed=seeds)
def test_any_numpy_index(draw, shape, seed):
    """Slices, new axes, arrays that take an element many times, masks."""
    any_index = (
        hnp.basic_indices(shape, allow_newaxis=True)
        | hnp.integer_array_indices(shape)
        | hnp.arrays(bool, shape)
    )
    index = draw.draw(any_index, label="index")
    check(lambda x: x[index], normal(seed, *shape))


graph_steps = st.lists(
    st.tuples(st.sampled_from("+-*"), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=7,
)


@given(steps=graph_steps, seed=seeds)
def test_any_graph(steps, seed):
    """Each step joins two earlier results, so graphs share nodes in every possible way."""

    def graph(a, b):
        nodes = [a, b]
        for op, i, j in steps:
            left, right = nodes[i % len(nodes)], nodes[j % len(nodes)]
            nodes.append(ARITHMETIC[op](left, right))
        return nodes[-1]

    check(graph, normal(seed, 2) / 4, normal(seed + 1, 2) / 4)


# Empty arrays, and numbers near the limits of float32.

EMPTY_OPS = {
    "sum": lambda x: x.sum(),
    "sum over the empty axis": lambda x: x.sum(axis=0),
    "sum over the other axis": lambda x: x.sum(axis=1),
    "mean over the other axis": lambda x: x.mean(axis=1, keepdims=True),
    "x + 1": lambda x: x + 1,
    "x * array": lambda x: x * np.ones(3),
    "x - x": lambda x: x - x,
    "array / x": lambda x: np.ones((1, 3)) / x,
    "x ** 2": lambda x: x**2,
    "exp and log": lambda x: log(exp(x)),
    "matmul to (0, 2)": lambda x: x @ np.ones((3, 2)),
    "matmul to (3, 3)": lambda x: x.transpose() @ x,
    "matmul with a vector": lambda x: x @ np.ones(3),
    "matmul of empty vectors": lambda x: x[:, 0] @ np.ones(0),
    "reshape": lambda x: x.reshape(3, 0),
    "transpose": lambda x: x.transpose(1, 0),
    "index": lambda x: x[:, 1],
    "index with nothing": lambda x: x[np.zeros(0, int)],
}


@pytest.mark.parametrize("op", EMPTY_OPS.values(), ids=EMPTY_OPS)
def test_op_of_an_empty_array_is_numpys_too(op):
    array = np.zeros((0, 3))
    check(op, array)
    x = leaf(array)
    op(x).sum().backward()
    assert x.grad.shape == (0, 3)


def test_an_empty_array_gives_its_broadcast_partner_a_gradient_of_zero():
    x, partner = leaf(np.zeros((0, 3))), leaf(np.ones((1, 3)))
    (x * partner).sum().backward()
    assert partner.grad.tolist() == [[0, 0, 0]]


def test_the_empty_product_gives_zeros_forward_and_backward():
    """(2, 0) @ (0, 3) is a (2, 3) matrix of zeros: each element is a sum of no products."""
    a, b = leaf(np.ones((2, 0))), leaf(np.ones((0, 3)))
    out = a @ b
    assert np.array_equal(out.data, np.zeros((2, 3)))
    out.sum().backward()
    assert a.grad.shape == (2, 0)
    assert b.grad.shape == (0, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("axis", [None, 0])
def test_the_mean_of_no_elements_is_nan(axis):
    x = leaf(np.zeros((0, 3)))
    mean = x.mean(axis=axis)
    assert mean.shape == np.mean(x.data, axis=axis).shape
    assert np.isnan(mean.data).all()
    mean.sum().backward()
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("size, slope", [(1e-20, -1e20), (1e23, -1e-23)])
def test_the_slope_of_a_quotient_does_not_pass_through_the_square(size, slope):
    """d(a / b) / db = -a / b^2, and in float32 neither 1e-40 nor 1e46 can be stored faithfully."""
    a, b = leaf(size), leaf(size)
    (a / b).backward()
    assert a.grad == pytest.approx(1 / size, rel=1e-6)
    assert b.grad == pytest.approx(slope, rel=1e-6)


def test_zero_by_a_tiny_number_has_a_slope_of_zero():
    a, b = leaf(0.0), leaf(1e-30)
    (a / b).backward()
    assert b.grad == 0


def test_a_number_by_itself_is_one_even_if_its_inverse_overflows():
    a, b = leaf(1e-39), leaf(1e-39)
    assert (a / b).item() == 1


# What backward() promises.


@given(shape=hnp.array_shapes(min_dims=0, max_dims=3, max_side=3), seed=seeds)
def test_backward_adds_to_grad(shape, seed):
    x = leaf(normal(seed, *shape))
    first, second = normal(seed + 1, *shape), normal(seed + 2, *shape)
    (x * first).sum().backward()
    assert np.allclose(x.grad, first, rtol=1e-14)
    (x * second).sum().backward()
    assert np.allclose(x.grad, first + second, rtol=1e-14)
    assert x.grad.shape == shape
    assert isinstance(x.grad, np.ndarray)  # a NumPy scalar could not be scaled in place


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_backward_of_a_single_element_needs_no_gradient(shape):
    x = leaf(np.full(shape, 3.0))
    (x * x).backward()
    assert np.array_equal(x.grad, np.full(shape, 6.0))


def test_only_leaves_that_require_a_gradient_get_one():
    a, constant = leaf([1.0, 2.0]), Tensor([3.0, 4.0])
    product = a * constant
    product.backward([1.0, 1.0])
    assert a.grad.tolist() == [3, 4]
    assert constant.grad is None
    assert product.grad is None


def test_no_gradient_flows_through_detach():
    x = leaf([1.0, 2.0])
    cut = (x * x).detach()
    (x * cut).sum().backward()
    assert x.grad.tolist() == [1, 4]
    assert cut.grad is None
    assert x.detach().data is x.data


def test_two_leaves_share_no_gradient_array():
    """a + b hands one array to both, the caller's. What happens to a.grad must not reach b's."""
    a, b = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    grad = np.ones(2, np.float32)
    (a + b).backward(grad)
    a.grad *= 7
    assert b.grad.tolist() == [1, 1]
    assert grad.tolist() == [1, 1]


def test_backward_of_a_leaf_adds_the_given_gradient():
    x = leaf([1.0, 2.0])
    x.backward([3.0, 4.0])
    x.backward([1.0, 1.0])
    assert x.grad.tolist() == [4, 5]


def test_backward_through_a_hundred_thousand_ops():
    """Deeper than any recursion could go."""
    x = leaf(3.0)
    y = x
    for _ in range(100_000):
        y = y.reshape(())
    y.backward()
    assert x.grad == 1


def test_a_chain_of_a_hundred_thousand_ops_can_be_dropped():
    """Python frees it from the end to the start, which must not overflow the stack either."""
    x = leaf(3.0)
    for _ in range(100_000):
        x = x.reshape(())
    del x


def test_memory_falls_while_backward_runs():
    """When the gradient reaches a node, the nodes after it are gone already, arrays and all."""
    still_there = []

    def backward(grad):
        still_there.extend(alive(later_nodes))
        return (grad,)

    x = leaf(positive(0, 2, 2))
    y = Tensor(x.data.copy(), parents=(x,), backward=backward)
    loss = (y.exp() * 2).log().sum()
    later_nodes = watch(tape(loss) - {x, y, loss})
    del y
    assert len(alive(later_nodes)) >= 6
    loss.backward()
    assert still_there == []


def test_a_second_backward_through_a_freed_graph_is_an_error():
    x = leaf([1.0, 2.0])
    shared = x * x
    first, second = shared.sum(), (shared + x).sum()
    first.backward()
    for loss in (first, second):
        with pytest.raises(RuntimeError, match="an earlier backward.. has freed this graph"):
            loss.backward()
    assert x.grad.tolist() == [2, 4]  # from the first alone


@pytest.mark.parametrize("grad", [None, 1.0, *map(np.ones, [1, 3, (2, 1), (1, 2)])], ids=repr)
def test_backward_needs_a_gradient_of_its_own_shape(grad):
    x = leaf([1.0, 2.0])
    with pytest.raises(ValueError, match=r"backward\(\) of shape \(2,\)"):
        (x * 2).backward(grad)
    assert x.grad is None


def test_backward_of_a_constant_is_an_error():
    with pytest.raises(RuntimeError, match="does not require a gradient"):
        (Tensor(2.0) * 3).backward()


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        1.0,
        np.float32(1),
        np.ones(2),
        np.ones(2, int),
        np.ones((1, 2), np.float32),
        np.ones((2, 1), np.float32),
        np.ones(1, np.float32),
        np.ones(3, np.float32),
    ],
    ids=repr,
)
def test_an_op_that_returns_a_wrong_gradient_is_named(wrong):
    """NumPy would broadcast it, or let it turn a whole model into float64, and say nothing."""

    def careless(grad):
        return (wrong,)

    x = leaf([1.0, 2.0])
    out = Tensor(x.data, parents=(x,), backward=careless)
    with pytest.raises(RuntimeError, match=r"careless returned .*float32 .*\(2,\)"):
        out.sum().backward()
    assert x.grad is None


def test_an_op_must_return_a_gradient_for_each_parent():
    x = leaf([1.0, 2.0])
    out = Tensor(x.data, parents=(x, x), backward=lambda grad: (grad,))
    with pytest.raises(ValueError):
        out.sum().backward()


# What a Tensor is made of.


@pytest.mark.parametrize(
    "data",
    [
        1,
        1.5,
        True,
        [1, 2],
        [[1.5], [2]],
        np.arange(3),
        np.int64(3),
        np.array([True]),
        np.float16(0.5),
        np.array([1.5], ">f4"),
    ],
    ids=repr,
)
def test_numbers_of_any_other_type_become_float32(data):
    x = Tensor(data)
    assert x.dtype == np.float32
    assert np.array_equal(x.data, data)
    assert not x.requires_grad


@pytest.mark.parametrize("data", [np.array([1.5, 2]), np.float64(1.5)], ids=repr)
def test_float64_stays_float64(data):
    assert Tensor(data).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_tensor_holds_the_array_itself_and_tells_what_it_tells(shape, dtype):
    array = normal(0, *shape, dtype=dtype)
    x = Tensor(array)
    assert x.data is array
    assert x.numpy() is array
    assert (x.shape, x.dtype, x.ndim, x.size) == (shape, dtype, array.ndim, array.size)


def test_item_is_a_python_number():
    item = Tensor([[1.5]]).item()
    assert type(item) is float
    assert item == 1.5


def test_repr_shows_the_numbers_and_whether_they_require_a_gradient():
    assert repr(leaf([1.0, 2.5])) == "Tensor([1.  2.5], requires_grad=True)"


@pytest.mark.parametrize(
    "data",
    ["3.5", ["3.5"], None, 1j, np.ones(2, complex), b"3", [object()], 10**30, Tensor(1.0)],
    ids=repr,
)
def test_what_is_no_real_number_is_no_tensor(data):
    with pytest.raises(TypeError, match="expected real numbers"):
        Tensor(data)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x * None,
        lambda x: None + x,
        lambda x: x - "text",
        lambda x: 1j * x,
        lambda x: x / [None],
        lambda x: x @ ["1", "2"],
    ],
)
def test_what_is_no_real_number_is_no_operand(mistake):
    with pytest.raises(TypeError, match="expected real numbers"):
        mistake(leaf(np.eye(2)))


@pytest.mark.parametrize("exponent", [leaf(2.0), None, "2", 2j, np.array([2.0])], ids=repr)
def test_an_exponent_is_a_number(exponent):
    with pytest.raises(TypeError, match="the exponent must be a number"):
        leaf(np.eye(2)) ** exponent


@pytest.mark.parametrize("op", [*ARITHMETIC.values(), operator.matmul], ids=[*ARITHMETIC, "@"])
def test_float32_and_float64_tensors_do_not_mix(op):
    """Silently, a single float64 tensor would turn a whole model into float64."""
    single, double = leaf(np.eye(2, dtype=np.float32)), leaf(np.eye(2))
    for a, b in ((single, double), (double, single)):
        with pytest.raises(TypeError, match="convert one first"):
            op(a, b)


@pytest.mark.parametrize("axes", [(0, 2), (0, -3), (0, 0), (0,), (0, 1, 2)])
def test_transpose_needs_every_axis_once(axes):
    with pytest.raises(ValueError, match="ax[ei]s"):
        leaf(np.eye(2)).transpose(*axes)


# no_grad.


def test_no_grad_records_nothing():
    x = leaf([1.0, 2.0])
    with no_grad():
        results = [x * 2, x.sum(), x[0], x.reshape(2, 1)]
    for result in results:
        assert not result.requires_grad
        assert result.parents == ()
        assert result.backward_fn is None


def test_a_leaf_made_under_no_grad_requires_a_gradient_as_told():
    with no_grad():
        x = leaf([1.0, 2.0])
    (x * 3).sum().backward()
    assert x.grad.tolist() == [3, 3]


def test_no_grad_nests():
    x = leaf([1.0, 2.0])
    with no_grad():
        with no_grad():
            pass
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_no_grad_ends_with_an_exception():
    x = leaf([1.0, 2.0])
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * 2).requires_grad


# Python's protocols.


@pytest.mark.parametrize("number, truth", [(0.0, False), (-0.0, False), (2.0, True)])
def test_bool(number, truth):
    assert bool(Tensor(number)) is truth


def test_bool_of_several_numbers_is_an_error():
    with pytest.raises(ValueError, match="ambiguous"):
        bool(Tensor([1.0, 2.0]))


def test_len_and_iteration_go_along_the_first_axis():
    x = leaf([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert len(x) == 3
    assert [row.numpy().tolist() for row in x] == [[1, 2], [3, 4], [5, 6]]


def test_iteration_keeps_the_gradient():
    x = leaf([1.0, 2.0, 3.0])
    first, second, third = x
    (first * 10 + third * 30).backward()
    assert x.grad.tolist() == [10, 0, 30]


def test_a_single_number_has_no_len_and_cannot_be_iterated():
    with pytest.raises(TypeError):
        len(Tensor(5.0))
    with pytest.raises(TypeError):
        iter(Tensor(5.0))
    with pytest.raises(TypeError):
        sum(Tensor(5.0))


def test_in_looks_at_the_numbers():
    assert 3.0 in Tensor([3.0])
    assert 4.0 not in Tensor([3.0])
    assert 3.0 in Tensor([[1.0, 2.0], [3.0, 4.0]])


def test_equality_is_elementwise():
    x, y = Tensor([1.0, 2.0]), Tensor([1.0, 3.0])
    assert (x == y).tolist() == [True, False]
    assert (x != y).tolist() == [False, True]
    assert (x == [1.0, 3.0]).tolist() == [True, False]
    assert (x != 1).tolist() == [False, True]
    assert (Tensor(2.0) == 2) and not (Tensor(2.0) != 2)


def test_a_tensor_is_a_key_by_identity():
    x, equal = Tensor([1.0, 2.0]), Tensor([1.0, 2.0])
    assert len({x, equal, x}) == 2
    assert {x: "x", equal: "equal"}[x] == "x"


# Copies.


def test_a_deep_copy_is_a_leaf_of_its_own():
    x = leaf([1.0, 2.0])
    copied = copy.deepcopy(x)
    (x * copied).sum().backward()
    assert x.grad.tolist() == [1, 2]
    assert copied.grad.tolist() == [1, 2]
    copied.data[0] = 7
    assert x.data.tolist() == [1, 2]


def copy_by_pickle(x):
    return pickle.loads(pickle.dumps(x))


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": copy_by_pickle}
every_way_to_copy = pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)


@every_way_to_copy
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("grad", [None, np.array([3.0, 4.0])], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_copied_leaf_comes_back_equal(copy_of, requires_grad, grad, dtype):
    x = Tensor(np.array([1.0, 2.0], dtype), requires_grad)
    x.grad = grad
    copied = copy_of(x)
    assert copied is not x
    assert np.array_equal(copied.data, x.data)
    assert copied.dtype == dtype
    assert copied.requires_grad is requires_grad
    assert np.array_equal(copied.grad, grad)


@every_way_to_copy
def test_a_result_cannot_be_copied(copy_of):
    """Its parents would be copied with it, and the leaves themselves would get no gradient."""
    with pytest.raises(TypeError, match="^only a leaf Tensor can be copied or pickled; .*$"):
        copy_of(leaf([1.0, 2.0]) * 2)


@every_way_to_copy
def test_a_result_cannot_be_copied_after_backward_either(copy_of):
    loss = (leaf([1.0, 2.0]) * 2).sum()
    loss.backward()
    with pytest.raises(TypeError, match="only a leaf Tensor can be copied or pickled"):
        copy_of(loss)


@every_way_to_copy
def test_a_detached_result_can_be_copied(copy_of):
    result = leaf([1.0, 2.0]) * 2
    assert copy_of(result.detach()).numpy().tolist() == [2, 4]
