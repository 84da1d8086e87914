"""The tape: every op's gradient against finite differences, and what `backward` promises."""
import gc
import math
import operator
import pickle
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from helpers import TOLERANCE, leaf, normal, positive, seeds, shapes, tape
from tinygrad_lite import Tensor, gradcheck, no_grad

ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
arithmetic = pytest.mark.parametrize("op", ARITHMETIC.values(), ids=ARITHMETIC)

# One call of everything a Tensor can do, for a positive x of shape (2, 2).
OPS = {
    "x + 1": lambda x: x + 1,
    "1 - x": lambda x: 1 - x,
    "x - ndarray": lambda x: x - np.array([1.0, 2.0]),
    "ndarray * x": lambda x: np.array([1.0, 2.0]) * x,
    "x * np.float64": lambda x: x * np.float64(3),
    "np.float64 * x": lambda x: np.float64(3) * x,
    "x * int array": lambda x: x * np.array([1, 2]),
    "x * bool array": lambda x: x * np.array([True, False]),
    "x / x": lambda x: x / x,
    "2 / x": lambda x: 2 / x,
    "-x": lambda x: -x,
    "x ** 3": lambda x: x ** 3,
    "x ** -0.5": lambda x: x ** -0.5,
    "x ** 0": lambda x: x ** 0,
    "x ** np.float64": lambda x: x ** np.float64(2),
    "x @ x": lambda x: x @ x,
    "x @ ndarray": lambda x: x @ np.eye(2),
    "ndarray @ x": lambda x: np.eye(2) @ x,
    "sum": lambda x: x.sum(),
    "sum of an axis": lambda x: x.sum(axis=0),
    "mean": lambda x: x.mean(),
    "mean of an axis": lambda x: x.mean(axis=1, keepdims=True),
    "reshape": lambda x: x.reshape(1, -1),
    "transpose": lambda x: x.transpose(),
    "one element": lambda x: x[0, 1],
    "rows": lambda x: x[[0, 0, 1]],
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
}
SCALAR_OPS = {name: op for name, op in OPS.items()  # those that take a single number, too
              if not any(word in name for word in ("@", "axis", "element", "rows"))}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


# The instrument itself.

def test_gradcheck_sees_a_wrong_sign():
    def wrong_square(x):
        return Tensor(x.data ** 2, parents=(x,), backward=lambda grad: (-2 * x.data * grad,))
    assert gradcheck(lambda x: x * x, positive(0, 3)) < TOLERANCE
    assert gradcheck(wrong_square, positive(0, 3)) > 0.5


def test_gradcheck_sees_one_wrong_element_among_many():
    def almost_twice(x):
        slope = np.full(x.shape, 2.0)
        slope[-1] += 1e-4
        return Tensor(2 * x.data, parents=(x,), backward=lambda grad: (grad * slope,))
    assert gradcheck(almost_twice, positive(0, 50)) > TOLERANCE


@pytest.mark.parametrize("dtype", [int, np.float32])
def test_gradcheck_works_in_float64_whatever_it_is_given(dtype):
    """A step of 1e-6 drowns in the rounding of float32."""
    seen = []

    def cube(x):
        seen.append(x.dtype)
        return x * x * x
    assert gradcheck(cube, np.array([1, 2, 3], dtype)) < TOLERANCE
    assert set(seen) == {np.dtype(np.float64)}


@pytest.mark.parametrize("found, true", [(1000.0, 1.0), (1.0, 1000.0), (0.1, 0.3), (-2.0, 3.0)])
def test_the_error_is_absolute_below_1_and_relative_above(found, true):
    def linear(x):
        return Tensor(true * x.data, parents=(x,), backward=lambda grad: (found * grad,))
    weight = abs(np.random.default_rng(0).standard_normal(()))  # of the one element
    a, b = weight * found, weight * true
    assert gradcheck(linear, np.array(0.5)) == pytest.approx(
        abs(a - b) / max(1, abs(a), abs(b)), rel=1e-6)


def test_gradcheck_gives_one_answer():
    x = normal(0, 20)
    assert len({gradcheck(lambda x: (x * x + 1).log(), x) for _ in range(3)}) == 1


# Values and gradients of every op.

@arithmetic
@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3), seeds)
def test_arithmetic_broadcasts_on_either_side(op, broadcast, seed):
    a, b = (positive(seed + i, *shape) for i, shape in enumerate(broadcast.input_shapes))
    assert np.array_equal(op(Tensor(a), Tensor(b)).data, op(a, b))
    assert gradcheck(op, a, b) < TOLERANCE


@arithmetic
@pytest.mark.parametrize("constant", [3, 1.5, np.float64(1.5), np.array(2), np.array([[1.5], [3]])],
                         ids=["int", "float", "np.float64", "0-d array", "array"])
@given(shape=st.sampled_from([(), (1,), (3,), (2, 1), (1, 3), (2, 3), (2, 2, 1)]), seed=seeds)
def test_arithmetic_with_a_constant_on_either_side(op, constant, shape, seed):
    x = positive(seed, *shape)
    assert np.array_equal(op(Tensor(x), constant).data, op(x, constant))
    assert np.array_equal(op(constant, Tensor(x)).data, op(constant, x))
    assert gradcheck(lambda x: op(x, constant), x) < TOLERANCE
    assert gradcheck(lambda x: op(constant, x), x) < TOLERANCE


@given(shapes, seeds)
def test_one_tensor_used_in_many_places(shape, seed):
    assert gradcheck(lambda x: x * x + x / (x * x + 2) - x, normal(seed, *shape)) < TOLERANCE


@given(shapes, seeds)
def test_negative_exp_and_log(shape, seed):
    x = positive(seed, *shape)
    for op, expected in [(operator.neg, -x), (Tensor.exp, np.exp(x)), (Tensor.log, np.log(x))]:
        assert np.array_equal(op(Tensor(x)).data, expected)
        assert gradcheck(op, x) < TOLERANCE


@given(shapes, st.sampled_from([-2, -1, 0, 1, 2, 3, -1.5, 0.5, 2.0]), st.booleans(), seeds)
def test_power(shape, exponent, below_zero, seed):
    x = positive(seed, *shape)
    if below_zero and exponent == int(exponent):
        x = -x
    assert np.array_equal((Tensor(x) ** exponent).data, x ** exponent)
    assert gradcheck(lambda x: x ** exponent, x) < TOLERANCE


@pytest.mark.parametrize("exponent, slope", [(0, 0), (0.0, 0), (1, 1), (2, 0)])
def test_power_at_zero(exponent, slope):
    """The rule p x^(p - 1) is 0 times infinity for p = 0, where x^0 = 1 has slope 0."""
    x = leaf([0.0])
    with np.errstate(all="raise"):
        y = x ** exponent
        y.backward()
    assert y.item() == 0.0 ** exponent
    assert x.grad == slope


@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=2),
       st.tuples(*[st.integers(1, 3)] * 3), seeds)
def test_matmul_broadcasts_the_axes_before_the_last_two(batch, sizes, seed):
    n, k, m = sizes
    a = normal(seed, *batch.input_shapes[0], n, k)
    b = normal(seed + 1, *batch.input_shapes[1], k, m)
    assert np.array_equal((Tensor(a) @ Tensor(b)).data, a @ b)
    assert gradcheck(operator.matmul, a, b) < TOLERANCE
    assert gradcheck(lambda x: x @ b, a) < TOLERANCE
    assert gradcheck(lambda x: a @ x, b) < TOLERANCE


@pytest.mark.parametrize("a_shape, b_shape", [((3,), (3,)), ((3,), (3, 2)), ((2, 3), (3,)),
                                              ((3,), (4, 3, 2)), ((4, 2, 3), (3,))])
def test_matmul_of_vectors(a_shape, b_shape):
    a, b = normal(0, *a_shape), normal(1, *b_shape)
    assert np.allclose((Tensor(a) @ Tensor(b)).data, a @ b, rtol=1e-14)
    assert (Tensor(a) @ Tensor(b)).shape == (a @ b).shape
    assert gradcheck(operator.matmul, a, b) < TOLERANCE


@given(st.data(), shapes, st.booleans(), seeds)
def test_sum_and_mean(draw, shape, keepdims, seed):
    axes = hnp.valid_tuple_axes(len(shape))
    if shape:
        axes |= st.none() | st.integers(-len(shape), len(shape) - 1)
    axis = draw.draw(axes, label="axis")
    x = normal(seed, *shape)
    for op in ("sum", "mean"):
        def reduce(x):
            return getattr(x, op)(axis=axis, keepdims=keepdims)
        assert reduce(Tensor(x)).shape == reduce(x).shape
        assert np.allclose(reduce(Tensor(x)).data, reduce(x), rtol=1e-14, atol=1e-14)
        assert gradcheck(reduce, x) < TOLERANCE
        assert getattr(Tensor(x), op)().shape == ()


@given(st.data(), shapes, seeds)
def test_reshape(draw, shape, seed):
    x = normal(seed, *shape)
    new = tuple(draw.draw(st.permutations(shape), label="new shape"))
    weight = normal(seed + 1, x.size)  # tells elements apart, so that a mixed-up order shows
    for to in [(new,), new or ((),), (-1,), (1, -1)]:
        assert np.array_equal(Tensor(x).reshape(*to).data, x.reshape(*to))
        assert gradcheck(lambda x: (x.reshape(*to).reshape(-1) * weight), x) < TOLERANCE
        assert gradcheck(lambda x: x.reshape(*to), x) < TOLERANCE


@given(st.data(), hnp.array_shapes(max_dims=4, max_side=2), seeds)
def test_transpose(draw, shape, seed):
    """Axes may be counted from the end; equal sides let no shape check catch a wrong inverse."""
    x, ndim = normal(seed, *shape), len(shape)
    order = draw.draw(st.permutations(range(ndim)), label="order")
    axes = [axis - ndim * draw.draw(st.booleans(), label="from the end") for axis in order]
    assert np.array_equal(Tensor(x).transpose(*axes).data, x.transpose(axes))
    assert np.array_equal(Tensor(x).transpose().data, x.T)
    assert gradcheck(lambda x: x.transpose(*axes), x) < TOLERANCE
    assert gradcheck(lambda x: x.transpose(), x) < TOLERANCE


@given(st.data(), hnp.array_shapes(max_dims=3, max_side=3), seeds)
def test_index(draw, shape, seed):
    """Slices of any step, new axes, masks, and fancy indices that take an element many times."""
    x = normal(seed, *shape)
    index = draw.draw(hnp.basic_indices(shape, allow_newaxis=True)
                      | hnp.integer_array_indices(shape) | hnp.arrays(bool, shape), label="index")
    assert np.array_equal(Tensor(x)[index].data, x[index])
    assert gradcheck(lambda x: x[index], x) < TOLERANCE


@pytest.mark.parametrize("index", [[0, 0, 0], ([0, 0, 1], [1, 1, 2]), np.s_[::-1], np.s_[:, ::-2],
                                   np.s_[..., -1], (slice(None), [2, 2, 0, 2])], ids=str)
def test_index_gives_an_element_one_gradient_for_each_time_it_is_taken(index):
    x = leaf(normal(0, 2, 3))
    x[index].sum().backward()
    times = np.zeros((2, 3))
    np.add.at(times, index, 1)
    assert np.array_equal(x.grad, times)


# Graphs.

def test_diamond():
    """L = y^2 + y with y = 2 x: dL/dx = (2 y + 1) 2 = 8 x + 2."""
    x = leaf(normal(0, 5))
    y = x * 2
    (y * y + y).sum().backward()
    assert np.allclose(x.grad, 8 * x.data + 2, rtol=1e-14)


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9), st.integers(0, 9)),
                min_size=1, max_size=7), seeds)
def test_any_graph(steps, seed):
    """Each step joins two earlier results, so graphs share nodes in every possible way."""
    def graph(x, y):
        nodes = [x, y]
        for op, i, j in steps:
            nodes.append(ARITHMETIC[op](nodes[i % len(nodes)], nodes[j % len(nodes)]))
        return nodes[-1]
    assert gradcheck(graph, normal(seed, 2) / 4, normal(seed + 1, 2) / 4) < TOLERANCE


def test_a_thousand_uses():
    x = leaf([1.0, 2.0])
    sum(x for _ in range(1000)).backward(np.ones(2))
    assert np.array_equal(x.grad, [1000, 1000])


def test_a_thousand_times_the_same_parent_of_one_op():
    x = leaf([1.0, 2.0])
    many = Tensor(1000 * x.data, parents=(x,) * 1000, backward=lambda grad: (grad,) * 1000)
    many.backward(np.ones(2))
    assert np.array_equal(x.grad, [1000, 1000])


def test_a_hundred_thousand_ops_in_a_row():
    """Deeper than any recursion; dropping such a chain must not overflow the stack either."""
    for backward in (True, False):
        x = leaf(3.0)
        y = x
        for _ in range(100_000):
            y = y.reshape(())
        if backward:
            y.backward()
            assert x.grad == 1
        del y


# What backward does to .grad.

@given(shapes, seeds)
def test_two_backward_calls_add_up(shape, seed):
    x, a, b = leaf(normal(seed, *shape)), normal(seed + 1, *shape), normal(seed + 2, *shape)
    (x * a).sum().backward()
    (x * b).sum().backward()
    assert isinstance(x.grad, np.ndarray)  # not a NumPy scalar, which nothing can scale in place
    assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
    assert np.allclose(x.grad, a + b, rtol=1e-14)


def test_backward_of_a_leaf():
    x = leaf([1.0, 2.0])
    x.backward([3.0, 4.0])
    assert np.array_equal(x.grad, [3, 4])


def test_the_gradient_defaults_to_one_for_one_element():
    for shape in [(), (1,), (1, 1, 1)]:
        x = leaf(np.full(shape, 2.0))
        (x * x).backward()
        assert np.array_equal(x.grad, np.full(shape, 4.0))


def test_gradients_of_two_parents_share_no_memory():
    a, b = leaf(normal(0, 3)), leaf(normal(1, 3))
    (a + b).backward(np.ones(3))
    a.grad *= 7
    assert np.array_equal(b.grad, np.ones(3))


def test_a_gradient_handed_to_two_parents_is_not_added_to_in_place():
    """a + b hands one array to both; what a gets later must not reach b."""
    a, b = leaf(normal(0, 3)), leaf(normal(1, 3))
    ((a + b) + a + a).backward(np.ones(3))
    assert np.array_equal(a.grad, [3, 3, 3])
    assert np.array_equal(b.grad, [1, 1, 1])


@pytest.mark.parametrize("fn", [lambda x: x, lambda x: x + x + x + x, lambda x: x.reshape(3, 1),
                                lambda x: x[:], lambda x: (x + 0).transpose()])
def test_the_callers_array_is_neither_kept_nor_changed(fn):
    x = leaf(normal(0, 3))
    y = fn(x)
    grad = np.ones(y.shape)
    y.backward(grad)
    x.grad[...] = 7
    assert np.array_equal(grad, np.ones(y.shape))


def test_only_leaves_that_require_a_gradient_get_one():
    x, constant = leaf([1.0]), Tensor([2.0])
    y = x * constant
    (y * y).backward()
    assert constant.grad is None and y.grad is None
    assert x.grad == 8


# Mistakes.

def test_backward_twice_through_one_graph():
    x = leaf([1.0, 2.0])
    loss = (x * x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="freed"):
        loss.backward()
    assert np.array_equal(x.grad, [2, 4])  # the second call changed nothing


def test_backward_through_a_part_that_another_backward_freed():
    x = leaf([1.0, 2.0])
    shared = x * x
    first, second = shared.sum(), (shared + x).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="freed"):
        second.backward()
    assert np.array_equal(x.grad, [2, 4])


def test_a_gradient_is_required_unless_there_is_one_element():
    x = leaf([1.0, 2.0])
    with pytest.raises(ValueError, match="shape"):
        (x * 2).backward()
    assert x.grad is None


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 2)])
def test_a_gradient_of_another_shape(shape):
    x = leaf([1.0, 2.0])
    with pytest.raises(ValueError, match="shape"):
        (x * 2).backward(np.ones(shape))
    assert x.grad is None


@pytest.mark.parametrize("wrong, found", [
    (None, "None"), (np.ones((1, 2), np.float32), r"float32 \(1, 2\)"),
    (np.ones(3, np.float32), r"float32 \(3,\)"), (np.ones(2), r"float64 \(2,\)")])
def test_an_op_that_returns_no_gradient_of_its_parent_is_named(wrong, found):
    """A float64 gradient or one that broadcasts would spread without a word."""
    def careless(x):
        def backward_of_careless(grad):
            return (wrong,)
        return Tensor(x.data.copy(), parents=(x,), backward=backward_of_careless)
    x = leaf([1.0, 2.0])
    with pytest.raises(RuntimeError, match=f"backward_of_careless returned {found}.*float32 .*2,"):
        careless(x).sum().backward()
    assert x.grad is None


def test_a_tensor_is_no_data():
    with pytest.raises(TypeError, match="detach"):
        Tensor(Tensor([1.0]))


def test_backward_of_what_records_nothing():
    with pytest.raises(RuntimeError, match="does not require"):
        (Tensor([1.0]) * 2).backward()


@pytest.mark.parametrize("op", [*ARITHMETIC.values(), operator.matmul])
def test_float32_and_float64_tensors_do_not_mix(op):
    """Silently they would make float64 of a whole model."""
    single, double = Tensor(np.eye(2, dtype=np.float32)), Tensor(np.eye(2))
    with pytest.raises(TypeError, match="float"):
        op(single, double)
    with pytest.raises(TypeError, match="float"):
        op(double, single)


def test_an_exponent_must_be_a_number():
    for exponent in (Tensor([2.0]), np.array([2.0]), "2"):
        with pytest.raises(TypeError, match=f"exponent.*{type(exponent).__name__}"):
            Tensor([1.0]) ** exponent


@pytest.mark.parametrize("bad", [np.ones((2, 1), np.float32), np.ones(3, np.float32),
                                 np.ones((), np.float32), np.ones(2, np.float64), np.ones(2, int)],
                         ids=["extra axis", "longer", "0-d", "float64", "int"])
def test_an_op_that_returns_a_misfit_is_refused(bad):
    """NumPy would broadcast or upcast it without a word."""
    x = leaf(np.ones(2, np.float32))
    y = Tensor(x.data, parents=(x,), backward=lambda grad: (bad,))
    with pytest.raises(RuntimeError, match="gradient"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_op_must_return_one_gradient_for_each_parent(count):
    a, b = leaf([1.0]), leaf([1.0])
    y = Tensor([1.0], parents=(a, b), backward=lambda grad: (grad,) * count)
    with pytest.raises(ValueError):
        y.backward()
    assert a.grad is None and b.grad is None


# no_grad.

def test_no_grad_records_nothing():
    x = leaf([1.0, 2.0])
    with no_grad():
        for op in (lambda: x * 2, lambda: x.sum(), lambda: x[0], lambda: x.reshape(2, 1)):
            assert not op().requires_grad and op().parents == ()
    assert (x * 2).requires_grad


def test_no_grad_nests_and_survives_an_exception():
    x = leaf([1.0])
    with no_grad():
        with pytest.raises(KeyError), no_grad():
            raise KeyError
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_no_grad_concerns_its_own_thread_alone():
    x, recorded = leaf([1.0]), {}
    entered, leave = threading.Event(), threading.Event()

    def note(name):
        recorded[name] = (x * 2).requires_grad

    def quiet():
        with no_grad():
            entered.set()
            leave.wait(60)
            note("inside no_grad")

    thread = threading.Thread(target=quiet)
    thread.start()
    entered.wait(60)
    note("while another thread is inside")
    leave.set()
    thread.join()
    with no_grad():
        thread = threading.Thread(target=note, args=["in a thread started inside"])
        thread.start()
        thread.join()
    assert recorded == {"inside no_grad": False, "while another thread is inside": True,
                        "in a thread started inside": True}


# Memory.

def watch(tensors):
    """Weak references to Tensors and to their arrays."""
    return [weakref.ref(x) for tensor in tensors for x in (tensor, tensor.data)]


@pytest.fixture
def no_garbage_collector():
    gc.disable()
    yield
    gc.enable()


@every_op
@pytest.mark.parametrize("backward", [True, False])
def test_a_graph_is_freed_without_the_garbage_collector(op, backward, no_garbage_collector):
    """A cycle would keep every step's activations until the collector happens to run."""
    x = leaf(positive(0, 2, 2))
    loss = (op(x) * 2).sum()
    watched = watch(tape(loss) - {x})
    if backward:
        loss.backward()
        x.grad = None
    del loss
    assert len(watched) >= 4
    assert [ref for ref in watched if ref() is not None] == []


def test_backward_keeps_nothing_but_the_root(no_garbage_collector):
    x = leaf(positive(0, 2, 2))
    loss = (x.exp() * x).log().sum()
    watched = watch(tape(loss) - {x, loss})
    loss.backward()
    assert len(watched) >= 6
    assert [ref for ref in watched if ref() is not None] == []


def test_memory_falls_while_backward_runs(no_garbage_collector):
    """When the gradient reaches a node, the nodes after it, arrays and all, are gone already."""
    x, later, alive = leaf(positive(0, 2, 2)), [], []

    def identity(x):
        def backward(grad):
            alive.extend(ref for ref in later if ref() is not None)
            return (grad,)
        return Tensor(x.data.copy(), parents=(x,), backward=backward)

    y = identity(x)
    z = y.exp()
    loss = (z * z).sum()
    later += watch(tape(loss) - {x, y, loss})
    del y, z
    loss.backward()
    assert len(later) == 4
    assert alive == []


def test_of_many_branches_one_at_a_time_holds_gradients(no_garbage_collector):
    """Level by level, each of the branches would keep one."""
    made, alive = [], []

    def identity(x):
        def backward(grad):
            alive.append(sum(ref() is not None for ref in made))
            new = grad.copy()
            made.append(weakref.ref(new))
            return (new,)
        return Tensor(x.data.copy(), parents=(x,), backward=backward)

    x, total = leaf(positive(0, 2, 2)), 0.0
    for _ in range(20):
        total = total + identity(identity(x))
    total.sum().backward()
    assert len(made) == 40 and max(alive) <= 3
    assert np.array_equal(x.grad, np.full((2, 2), 20))


# Dtypes.

@every_op
@both_dtypes
def test_every_op_keeps_the_dtype(op, dtype):
    """Forward and backward: one stray float64 scalar would make a float32 model half as fast."""
    x = leaf(positive(0, 2, 2).astype(dtype))
    y = op(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("op", SCALAR_OPS.values(), ids=SCALAR_OPS)
@both_dtypes
def test_every_op_keeps_the_dtype_of_a_single_number(op, dtype):
    """NumPy turns 0-d arrays into scalars, with casting rules of their own."""
    x = leaf(np.array(1.5, dtype))
    y = op(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("data", [1, 1.5, True, [1, 2], [1.5, 2.5], [[1], [2]], np.arange(3),
                                  np.array([True]), np.int64(3), np.float16(0.5),
                                  np.array([1.5], ">f4")], ids=repr)
def test_all_but_floats_become_float32(data):
    assert Tensor(data).dtype == np.float32
    assert np.array_equal(Tensor(data).data, data)


@both_dtypes
def test_float_arrays_keep_their_dtype_and_their_memory(dtype):
    data = np.ones(3, dtype)
    assert Tensor(data).data is data
    assert Tensor(dtype(0.5)).dtype == dtype


# The rest.

@given(shapes, seeds)
def test_a_tensor_tells_what_its_array_tells(shape, seed):
    data = normal(seed, *shape)
    x = Tensor(data)
    assert (x.shape, x.ndim, x.size, x.dtype) == (data.shape, data.ndim, data.size, data.dtype)
    assert x.numpy() is x.data
    assert repr(x)


def test_detach_stops_the_gradient():
    """d(x * const)/dx = const, even where the constant was made from x."""
    x = leaf(normal(0, 3))
    y = (x * x).detach()
    assert not y.requires_grad
    (x * y).sum().backward()
    assert np.allclose(x.grad, x.data ** 2, rtol=1e-14)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tensor_travels_to_another_process_without_history_and_gradient(dtype, requires_grad):
    x = Tensor(normal(0, 2, 3, dtype=dtype), requires_grad)
    y = (x * 2).sum()
    if requires_grad:
        y.backward()
    there, total = pickle.loads(pickle.dumps((x, y)))
    assert there.dtype == dtype and np.array_equal(there.data, x.data)
    assert there.requires_grad == requires_grad and there.grad is None
    assert total.item() == y.item() and total.parents == ()


def test_detach_shares_memory():
    x = leaf(normal(0, 3))
    assert np.shares_memory(x.detach().data, x.data)


def test_item():
    for data in (2.5, [2.5], [[2.5]]):
        assert type(Tensor(data).item()) is float
        assert math.isclose(Tensor(data).item(), 2.5)
    with pytest.raises(ValueError):
        Tensor([1.0, 2.0]).item()
