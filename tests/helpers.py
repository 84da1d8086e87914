"""What several test files use: random arrays, tiny models, answers as ids, the programs."""

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

# The programs, each with flags for a run that takes about a second.
TINY = "--d-model 8 --n-layers 1 --n-heads 2 --d-hidden 8 --batch-size 4 --processes 1".split()
RULE = "--pairs rule --prompts 4 --rounds 3 --processes 1".split()
MAINS = {"sft": sft.main, "dpo": dpo.main, "eval": evaluation.main}
RUNS = {
    "sft": [*TINY, "--steps", "3"],
    "dpo": ["--sft", "sft.npz", *RULE],
    "eval": ["sft.npz"],
}

# Gradients are checked in float64, where a correct one passes gradcheck with an error of about
# 1e-9. A wrong one misses by far more than this.
TOLERANCE = 1e-6

# Strategies: what hypothesis draws.
seeds = st.integers(0, 2**32 - 1)
term_lists = st.lists(st.integers(1, 99), min_size=1, max_size=6)
right_sums = term_lists.map(lambda terms: (sum(terms), terms))
sums = right_sums | st.tuples(st.integers(0, 999), term_lists)  # (target, terms), right or wrong


# Arrays and Tensors.


def normal(seed, *shape, dtype=np.float64):
    """Standard normal numbers."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal(shape), dtype)


def positive(seed, *shape):
    """Numbers from 0.5 to 2, where 1 / x, log x and x ** p are smooth."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.uniform(0.5, 2, shape))


# The same numbers, elsewhere in memory.
LAYOUTS = {
    "columns first": np.asfortranarray,
    "backwards": lambda array: array[..., ::-1].copy()[..., ::-1],
    "every second": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
}


def leaf(data):
    """A Tensor that receives a gradient."""
    return Tensor(data, requires_grad=True)


def log_softmax(logits):
    """Over axis 0."""
    return logits - np.logaddexp.reduce(logits, axis=0)


def tape(root):
    """The set of every Tensor that `root` was computed from, with `root` itself."""
    nodes = set()
    to_visit = [root]
    while to_visit:
        node = to_visit.pop()
        if node not in nodes:
            nodes.add(node)
            to_visit.extend(node.parents)
    return nodes


def hand_out_read_only_gradients(root):
    """Make backward() of `root` give each op a gradient that it cannot write into.

    An op that writes into it anyway raises ValueError.
    """
    for node in tape(root):
        if node.backward_fn is not None:
            node.backward_fn = _with_read_only_gradient(node.backward_fn)


def _with_read_only_gradient(backward):
    def backward_of_read_only(grad):
        return backward(np.broadcast_to(grad, grad.shape))  # a view that is read-only

    return backward_of_read_only


# Models.


def tiny_model(seed=0, dtype=np.float32, vocab_size=7, n_layers=2):
    """A whole model of some 900 parameters; in float64, rounding cannot blur a comparison."""
    config = Config(vocab_size, d_model=8, n_layers=n_layers, n_heads=2, d_hidden=6)
    model = Transformer(config, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def model_of_the_task(seed=0, dtype=np.float32):
    """A tiny model with the vocabulary of the task."""
    return tiny_model(seed, dtype, vocab_size=len(data.VOCAB))


def weights(model):
    """All parameters, one after the other, as one vector."""
    return np.concatenate([parameter.data.ravel() for parameter in model.parameters()])


def save_model(path, vocab_size=len(data.VOCAB), seed=0):
    """Write the checkpoint of a tiny untrained model; return its path."""
    config = Config(vocab_size, d_model=8, n_layers=1, n_heads=2, d_hidden=8)
    Transformer(config, seed).save(path)
    return path


# Lines of the task.


def text_of(target, terms):
    """(10, [2, 8]) -> "10=2+8"."""
    return f"{target}={'+'.join(map(str, terms))}"


def answer(target, terms):
    """A line as ids, with its end token."""
    return data.encode(text_of(target, terms)) + [data.END]


def read(ids):
    """(target, terms) of a line of ids; None if it does not parse."""
    return data.parse(data.decode(ids))


def random_batch(seed, n=40, targets=data.TRAINING):
    """n lines as SFT makes them: ids (n, T)."""
    return data.random_lines(n, np.random.default_rng(seed), targets)


# The programs and their parts.


def ignore(*arguments):
    """A `report` for training loops whose progress is of no interest. It can be pickled."""


def run(program, *flags, timeout=60, **options):
    """A program of the project in a process of its own: returncode, stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, ROOT / f"{program}.py", *map(str, flags)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        **options,
    )


# The files of the project.


def is_ours(path):
    """Whether a file below ROOT belongs to the project, not to a virtual environment or a run."""
    folders = path.relative_to(ROOT).parts[:-1]
    return not any(folder.startswith(".") or folder in ("runs", "mutants") for folder in folders)
