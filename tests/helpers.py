"""What the tests share: strategies, random arrays, tiny models, answers, the tape, programs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

import data
import dpo
import eval as evaluation
import sft
from tinygrad_lite import Tensor
from transformer import Config, Transformer

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-6  # of gradcheck: central differences in float64 are good to about 1e-9
TINY = [
    "--d-model",
    "8",
    "--n-layers",
    "1",
    "--n-heads",
    "2",
    "--d-hidden",
    "8",
    "--batch-size",
    "4",
    "--processes",
    "1",
]  # an sft run that takes a second
MAINS = {"sft": sft.main, "dpo": dpo.main, "eval": evaluation.main}
RULE = ["--pairs", "rule", "--prompts", "4", "--rounds", "3", "--processes", "1"]
RUNS = {"sft": [*TINY, "--steps", "3"], "dpo": ["--sft", "sft.npz", *RULE], "eval": ["sft.npz"]}
LAYOUTS = [
    np.asfortranarray,
    lambda x: x[..., ::-1].copy()[..., ::-1],
    lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
]  # the same numbers, elsewhere in memory
seeds = st.integers(0, 2**32 - 1)
term_lists = st.lists(st.integers(1, 99), min_size=1, max_size=6)
sums = st.tuples(st.integers(0, 999), term_lists) | term_lists.map(lambda t: (sum(t), t))


def normal(seed, *shape, dtype=np.float64):
    """Standard normal numbers."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def positive(seed, *shape):
    """Numbers from 0.5 to 2, where 1 / x, log x and x ** p are smooth."""
    return np.asarray(np.random.default_rng(seed).uniform(0.5, 2, shape))


def leaf(data):
    return Tensor(data, requires_grad=True)


def log_softmax(logits):
    """Over axis 0."""
    return logits - np.logaddexp.reduce(logits, axis=0)


def tape(root):
    """Every Tensor that `root` was computed from, and `root` itself."""
    nodes = [root]
    for node in nodes:  # which grows
        nodes += set(node.parents) - set(nodes)
    return set(nodes)


def read_only_gradients(root):
    """`root`, each op of which will be handed gradients that it cannot write into."""
    for node in tape(root):

        def backward(grad, inner=node.backward_fn):
            return inner(np.broadcast_to(grad, np.shape(grad)))  # a read-only view

        node.backward_fn = node.backward_fn and backward
    return root


def tiny_model(seed=0, dtype=np.float32, vocab_size=7, n_layers=2):
    """A whole model of some 900 parameters; in float64, rounding cannot blur a comparison."""
    model = Transformer(
        Config(vocab_size, d_model=8, n_layers=n_layers, n_heads=2, d_hidden=6, max_len=16),
        seed=seed,
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def model_of_the_task(seed=0, dtype=np.float32):
    return tiny_model(seed, dtype, vocab_size=len(data.VOCAB))


def weights(model):
    return np.concatenate([p.data.ravel() for p in model.parameters()])


def save_model(path, vocab_size=len(data.VOCAB), seed=0):
    Transformer(Config(vocab_size, 8, 1, 2, 8, data.MAX_LEN), seed).save(path)
    return path


def text_of(target, terms):
    return f"{target}={'+'.join(map(str, terms))}"


def answer(target, terms):
    """A line as ids, with its end token."""
    return data.encode(text_of(target, terms)) + [data.END]


def read(ids):
    return data.parse(data.decode(ids))


def random_batch(seed, n=40, *targets):
    return data.random_lines(n, np.random.default_rng(seed), *targets)


def flip(content, bit):
    """`content`, bytes, with one bit flipped."""
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def run(program, *flags, timeout=60, **options):
    """A program of the project in a process of its own: returncode, stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, ROOT / f"{program}.py", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )
