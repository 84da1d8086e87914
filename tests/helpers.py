"""What the tests share: strategies, random arrays, a tiny model, and a walk over the tape."""
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_lite import Tensor
from transformer import Config, Transformer

TOLERANCE = 1e-6  # of gradcheck: central differences in float64 are good to about 1e-9

seeds = st.integers(0, 2 ** 32 - 1)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, max_side=3)


def normal(seed, *shape, dtype=np.float64):
    """Standard normal numbers."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def positive(seed, *shape):
    """Numbers from 0.5 to 2, where 1 / x, log x and x ** p are smooth."""
    return np.asarray(np.random.default_rng(seed).uniform(0.5, 2, shape))


def leaf(data):
    return Tensor(data, requires_grad=True)


def log_softmax(logits):
    """The plain formula, good for logits near 0."""
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def tape(root):
    """Every Tensor that `root` was computed from, and `root` itself."""
    seen, stack = {root}, [root]
    while stack:
        new = set(stack.pop().parents) - seen
        seen |= new
        stack += new
    return seen


def tiny_model(seed=0, dtype=np.float32, vocab_size=7, n_layers=2):
    """A whole model of some 900 parameters; in float64, rounding cannot blur a comparison."""
    model = Transformer(Config(vocab_size, d_model=8, n_layers=n_layers, n_heads=2, d_hidden=6,
                               max_len=16), seed=seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def flip(content, bit):
    """`content`, bytes, with one bit flipped."""
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)
