"""The tape: every op's gradient against finite differences, and what `backward` promises."""

import operator
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from helpers import LAYOUTS, TOLERANCE, leaf, normal, positive, read_only_gradients, seeds, tape
from tinygrad_lite import Tensor, gradcheck, no_grad

ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
# All that a Tensor can do: what any x takes, and (OPS) what takes a matrix.
ELEMENTWISE = [
    "x + 1",
    "1 - x",
    "x * np.float64(3)",
    "np.float64(3) * x",
    "np.int64(2) / x",
    "2 / x",
    "x / 3",
    "x / x",
    "x * x - x",
    "-x",
    "x * np.array([1, 2])",
    "np.array([1.0, 2]) - x",
    "x / np.array([[1.5], [3]])",
    "np.array([1.5, 3]) / x",
    "x * [True, False]",
    "x ** 3",
    "x ** 0",
    "x ** -0.5",
    "(-x) ** -3",
    "(-x) ** 2",
    "x ** np.int64(2)",
    "x ** np.float64(2)",
    "exp(x)",
    "log(x)",
    "x + exp(x) + log(x)",
    "x.sum()",
    "x.mean()",
    "x.reshape(1, -1)",
    "x.transpose()",
    *(f"(x * [[0, 1], [1, 1]]) ** {n}" for n in (0, 1, 2)),
]  # where 0 / 0 may lurk
OPS = [
    *ELEMENTWISE,
    "x @ x",
    "x @ np.array([[1, 2], [3, 4]])",
    "np.array([[1.0, 2], [3, 4]]) @ x",
    "x @ [1, 2]",
    "x.sum(axis=0)",
    "x.mean(axis=1, keepdims=True)",
    "x[0, 1]",
    "x[[0, 0, 1]]",
]


def call(op, x):
    """`op` of a Tensor or an array."""
    home = Tensor if isinstance(x, Tensor) else np
    return eval(op, {"np": np, "Tensor": Tensor, "x": x, "exp": home.exp, "log": home.log})


def check(op, *arrays):
    """`op` of Tensors gives what NumPy gives, shape and all, and its gradient is right."""
    out, expected = op(*map(Tensor, arrays)), op(*arrays)
    assert out.shape == np.shape(expected)
    assert np.allclose(out.data, expected, rtol=1e-14, atol=1e-14)
    assert gradcheck(op, *arrays) < TOLERANCE


def watch(tensors):
    """A function that returns those of the Tensors and of their arrays that are still there."""
    refs = [weakref.ref(x) for tensor in tensors for x in (tensor, tensor.data)]
    assert len(refs) >= 4
    return lambda: [ref() for ref in refs if ref() is not None]


def test_gradcheck_sees_wrong_gradients_and_nothing_else():
    def scaled(x, slope, claimed):
        return Tensor(slope * x.data, parents=(x,), backward=lambda grad: (grad * claimed,))

    x, almost = positive(0, 50), np.full(50, 2.0)
    almost[-1] += 1e-4
    assert gradcheck(lambda x: scaled(x, 2.0, 2.0), x) < TOLERANCE
    assert gradcheck(lambda x: scaled(x, 2.0, -2.0), x) > 0.5
    assert gradcheck(lambda x: scaled(x, 2.0, almost), x) > TOLERANCE  # one of many elements
    assert np.isnan(gradcheck(lambda x: scaled(x, 2.0, np.nan), x))
    assert gradcheck(lambda x, unused: x * x, x, x) < TOLERANCE
    assert gradcheck(lambda x, cut: x * cut.detach(), x, x) > 0.5  # a gradient is missing
    for dtype in (int, np.float32):  # in which a step of 1e-6 would drown
        assert gradcheck(lambda x: x**3, np.arange(1, 4, dtype=dtype)) < TOLERANCE
    weight = abs(np.random.default_rng(0).standard_normal(()))  # of the one element
    for found, true in [(1000.0, 1.0), (1.0, 1000.0), (0.1, 0.3), (-2.0, 3.0)]:
        a, b = weight * found, weight * true
        assert gradcheck(lambda x: scaled(x, true, found), np.array(0.5)) == pytest.approx(
            abs(a - b) / max(1, abs(a), abs(b)), rel=1e-6
        )


@pytest.mark.parametrize("op", OPS)
def test_every_op_in_any_memory_layout_keeps_the_dtype_and_is_freed(op):
    """It leaves alone what it is given, and is no cycle that only the garbage collector frees."""
    array = positive(0, 2, 2)
    check(lambda x: call(op, x), array)
    array.setflags(write=False)
    plain, grad = leaf(array), normal(1, *np.shape(call(op, array)))
    call(op, plain).backward(grad)
    for layout in LAYOUTS:
        x = leaf(layout(array))
        read_only_gradients(call(op, x)).backward(layout(grad) if grad.ndim else grad)
        assert np.allclose(x.grad, plain.grad, rtol=1e-13)
    for single in (array, array[0, 0]) if op in ELEMENTWISE else (array,):
        x = leaf(single.astype(np.float32))
        out = call(op, x)
        out.sum().backward()
        assert out.dtype == x.grad.dtype == np.float32 and plain.grad.dtype == np.float64
    first, second = (call(op, plain) * 2).sum(), (call(op, plain) * 2).sum()
    alive = watch((tape(first) | tape(second)) - {plain, first})
    first.backward()
    del second
    assert not alive()  # with backward or without; nothing but the root is kept


@pytest.mark.parametrize("op", ARITHMETIC.values(), ids=ARITHMETIC)
@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3), seeds)
def test_arithmetic_broadcasts_on_either_side(op, broadcast, seed):
    a, b = (positive(seed + i, *shape) for i, shape in enumerate(broadcast.input_shapes))
    check(op, a, b)
    check(lambda x: op(x, b), a)
    check(lambda x: op(a, x), b)


@given(
    hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=2),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_matmul_of_matrices_stacks_of_them_and_vectors(batch, sizes, row, column, seed):
    n, k, m = sizes
    a = normal(seed, *(() if row else (*batch.input_shapes[0], n)), k)
    b = normal(seed + 1, *((k,) if column else (*batch.input_shapes[1], k, m)))
    check(operator.matmul, a, b)


@given(st.data(), hnp.array_shapes(max_dims=3, max_side=3), st.booleans(), seeds)
def test_sums_shapes_and_indices(draw, shape, keepdims, seed):
    """Axes may count from the end, indices take elements many times, equal sides hide mistakes."""
    x, n = normal(seed, *shape), len(shape)
    axis = draw.draw(hnp.valid_tuple_axes(n) | st.none() | st.integers(-n, n - 1), label="axis")
    new = tuple(draw.draw(st.permutations(shape), label="new shape"))
    axes = [axis - n * draw.draw(st.booleans()) for axis in draw.draw(st.permutations(range(n)))]
    index = draw.draw(
        hnp.basic_indices(shape, allow_newaxis=True)
        | hnp.integer_array_indices(shape)
        | hnp.arrays(bool, shape),
        label="index",
    )
    for op in (
        lambda x: x.sum(axis=axis, keepdims=keepdims),
        lambda x: x.reshape(new),
        lambda x: x.mean(axis=axis, keepdims=keepdims),
        lambda x: x.reshape(-1),
        lambda x: x.reshape(*new, 1),
        lambda x: x.transpose(),
        lambda x: x.transpose(*axes),
        lambda x: x[index],
    ):
        check(op, x)


@given(
    st.lists(
        st.tuples(st.sampled_from("+-*"), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=7,
    ),
    seeds,
)
def test_any_graph(steps, seed):
    """Each step joins two earlier results, so graphs share nodes in every possible way."""

    def graph(*nodes):
        for op, i, j in steps:
            nodes += (ARITHMETIC[op](nodes[i % len(nodes)], nodes[j % len(nodes)]),)
        return nodes[-1]

    check(graph, normal(seed, 2) / 4, normal(seed + 1, 2) / 4)


def test_a_hundred_thousand_ops_in_a_row():
    """Deeper than any recursion; dropping such a chain must not overflow the stack either."""
    x = y = leaf(3.0)
    for _ in range(100_000):
        y = y.reshape(())
    y.backward()
    assert x.grad == 1
    for _ in range(100_000):
        x = Tensor(x.data, parents=(x,), backward=lambda grad: (grad,))
    del x


def test_memory_falls_while_backward_runs():
    """When the gradient reaches a node, the nodes after it, arrays and all, are gone already."""
    x, left = leaf(positive(0, 2, 2)), []
    y = Tensor(x.data.copy(), parents=(x,), backward=lambda grad: left.append(alive()) or (grad,))
    loss = (y.exp() * 2).log().sum()
    alive = watch(tape(loss) - {x, y, loss})
    del y
    loss.backward()
    assert left == [[]]


@given(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3), seeds)
def test_backward_adds_to_grad(shape, seed):
    """Which is an array: nothing could scale a NumPy scalar in place. One element needs no grad."""
    x, a, b = leaf(normal(seed, *shape)), normal(seed + 1, *shape), normal(seed + 2, *shape)
    for constant, total in ((a, a), (b, a + b)):
        y = x * constant
        y.backward() if y.size == 1 else y.sum().backward()
        assert isinstance(x.grad, np.ndarray) and (x.grad.dtype, x.grad.shape) == (x.dtype, shape)
        assert np.allclose(x.grad, total, rtol=1e-14)


def test_only_leaves_get_a_gradient_and_share_no_memory():
    """a + b hands one array to both, the caller's; what a gets later must not reach b."""
    a, b, constant, grad = leaf(normal(0, 3)), leaf(normal(1, 3)), Tensor(normal(2, 3)), np.ones(3)
    cut = (a * b).detach()  # a constant, too
    y = (a + b) + a * constant + b * cut
    y.backward(grad)
    assert np.allclose(a.grad, 1 + constant.data) and np.allclose(b.grad, 1 + a.data * b.data)
    assert constant.grad is None and cut.grad is None and y.grad is None
    a.grad = b.grad = None
    (a + b).backward(grad)
    a.grad *= 7
    assert np.array_equal(b.grad, [1, 1, 1]) and np.array_equal(grad, [1, 1, 1])
    a.backward(grad)
    assert np.array_equal(a.grad, [8, 8, 8]) and a.detach().data is a.data


def test_a_backward_that_fails_changes_nothing():
    """NumPy would broadcast or upcast a wrong gradient, and a whole model become float64."""

    def careless(grad):
        return (wrong,)

    x = leaf([1.0, 2.0])
    shared = x * x
    first, second = shared.sum(), (shared + x).sum()
    first.backward()
    for loss in (first, second):
        with pytest.raises(RuntimeError, match="freed"):
            loss.backward()
    for grad in (None, 1.0, *map(np.ones, [1, 3, (2, 1), (1, 2)])):
        with pytest.raises(ValueError, match="shape"):
            (x * 2).backward(grad)
    for wrong in (
        None,
        1.0,
        np.float32(1),
        np.ones(2),
        np.ones(2, int),
        *(np.ones(shape, np.float32) for shape in [(1, 2), (2, 1), 1, 3]),
    ):
        with pytest.raises(RuntimeError, match=r"careless returned .*float32 .*\(2,\)"):
            Tensor(x.data, parents=(x,), backward=careless).sum().backward()
    with pytest.raises(ValueError):  # one gradient for each parent
        Tensor(x.data, parents=(x, x), backward=lambda grad: (grad,)).sum().backward()
    assert np.array_equal(x.grad, [2, 4])


@pytest.mark.parametrize(
    "mistake",
    [
        "Tensor('3.5')",
        "Tensor(['3.5'])",
        "Tensor(None)",
        "Tensor(1j)",
        "Tensor(np.ones(2, complex))",
        "Tensor(b'3')",
        "Tensor([object()])",
        "Tensor(10 ** 30)",
        "Tensor(x)",
        "x * None",
        "None + x",
        "x - 'text'",
        "1j * x",
        "x / [None]",
        "x @ ['1', '2']",
        "x ** x",
        "x ** None",
        "x ** '2'",
        "x ** 2j",
        "x ** np.array([2.0])",
        *(
            f"{a} {op} {b}"
            for op in "+-*/@"
            for a, b in [("x", "Tensor(np.eye(2))"), ("Tensor(np.eye(2))", "x")]
        ),
        "x.transpose(0, 2)",
        "x.transpose(0, -3)",
        "x.transpose(0, 0)",
        "x.transpose(0)",
        "x.transpose(0, 1, 2)",
    ],
)
def test_what_is_no_real_number_of_another_precision_or_no_order_of_axes(mistake):
    """float32 and float64 tensors do not mix: silently, that would make a whole model float64."""
    with pytest.raises(
        ValueError if "transpose" in mistake else TypeError,
        match="real numbers|must be a number|convert one first|ax[ie]s",
    ):
        call(mistake, leaf(np.eye(2, dtype=np.float32)))


def test_no_grad_records_nothing_nests_and_concerns_its_own_thread_alone():
    x = leaf([1.0, 2.0])
    with no_grad():
        with pytest.raises(KeyError), no_grad():
            raise KeyError
        for y in (x * 2, x.sum(), x[0], x.reshape(2, 1)):
            assert not y.requires_grad and y.parents == ()
            with pytest.raises(RuntimeError, match="does not require"):
                y.backward(np.ones(y.shape))
    with ThreadPoolExecutor(max_workers=1) as thread:
        entered = no_grad()
        thread.submit(entered.__enter__).result()
        assert (x * 2).requires_grad
        thread.submit(entered.__exit__, None, None, None).result()


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
)
def test_a_tensor_tells_what_its_array_tells(data):
    """float32 and float64 arrays are kept as they are, all else becomes float32."""
    x = Tensor(data)
    assert x.dtype == np.float32 and np.array_equal(x.data, data) and not x.requires_grad
    for a in (x.data, x.data.astype(np.float64)):
        x = Tensor(a)
        assert x.numpy() is x.data is a
        assert (x.shape, x.dtype, x.ndim, x.size) == (a.shape, a.dtype, a.ndim, a.size)
        assert repr(x).startswith("Tensor(") and (x.size > 1 or type(x.item()) is float)
