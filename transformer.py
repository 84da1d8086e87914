"""A decoder-only Transformer of the Llama family: model, sampling and checkpoints."""
import dataclasses
import json
import math
import numbers
import os

from tinygrad_lite import Tensor, functional as F, no_grad
import numpy as np

import data
from cli import UserError, atomic_write


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model. Raises UserError, a ValueError, where they do not fit together."""
    vocab_size: int
    d_model: int = 32
    n_layers: int = 3
    n_heads: int = 8
    d_hidden: int = 64
    max_len: int = 24  # tokens of a line; for the record, rotary positions do not need it

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
            object.__setattr__(self, name, int(value))  # a NumPy integer is no JSON
        if self.d_model % (2 * self.n_heads):
            raise UserError(f"d_model {self.d_model} is not divisible by 2 n_heads = "
                            f"{2 * self.n_heads}; rotary positions turn pairs of features")


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order of a checkpoint.

    Matrices are (outputs, inputs), used as W @ x; qkv = [q; k; v] and gate_up = [gate; up] lie one
    below the other. RMSNorm's eps is 1e-6, the rotary base 10,000: the defaults of `functional`.
    """
    d, f, v = config.d_model, config.d_hidden, config.vocab_size
    block = {"attention_norm": (d,), "qkv": (3 * d, d), "attention_out": (d, d),
             "mlp_norm": (d,), "gate_up": (2 * f, d), "down": (d, f)}
    blocks = {f"blocks.{i}.{name}": shape
              for i in range(config.n_layers) for name, shape in block.items()}
    return {"embedding": (d, v), **blocks, "norm": (d,), "head": (v, d)}


class Transformer:
    """x += attention(norm(x)); x += mlp(norm(x)) in each block, logits = head(norm(x)).

    Llama's: RMSNorm, rotary positions, SwiGLU, no biases, an untied head. A norm's learned scale
    multiplies the columns of the matrix that follows it: W (s x) = (W s) x.
    """

    def __init__(self, config, seed=0):
        self.config = config
        rng = np.random.default_rng(seed)
        self._parameters = {}
        for name, shape in parameter_shapes(config).items():
            if len(shape) == 1:
                array = np.ones(shape, np.float32)
            else:
                # Variance 1 / inputs keeps activations near 1. What is added to the residual stream
                # starts smaller, as 2 n_layers of these add up (Radford et al. 2019, section 2.3).
                std = 1.0 if name == "embedding" else shape[1] ** -0.5
                if name.endswith(("attention_out", "down")):
                    std /= (2 * config.n_layers) ** 0.5
                array = rng.normal(0, std, shape).astype(np.float32)
            self._parameters[name] = Tensor(array, requires_grad=True)

    def named_parameters(self):
        """{name: Tensor} in the order of a checkpoint."""
        return dict(self._parameters)

    def parameters(self):
        return list(self._parameters.values())

    def __call__(self, ids):
        """Logits of the next token at every position: int (B, T) -> (V, B T), line after line.

        Raises ValueError for ids that are not integers (B, T) within the vocabulary.
        """
        ids, config = np.asarray(ids), self.config
        if not (ids.ndim == 2 and ids.size and ids.dtype.kind in "iu"
                and 0 <= ids.min() and ids.max() < config.vocab_size):
            raise ValueError(f"ids must be integers (B, T) in 0 ... {config.vocab_size - 1}, "
                             f"not {ids.dtype} {ids.shape}")
        return self._logits(ids.ravel(), lambda qkv, layer: F.causal_attention(
            qkv, config.n_heads, batch=len(ids)))

    def _logits(self, ids, attention):
        """int (N,) -> (V, N), with attention(qkv, layer), (3D, N) -> (D, N)."""
        p = self._parameters
        x = F.embedding(p["embedding"], ids)  # (D, N)
        for i in range(self.config.n_layers):
            attention_norm, qkv, attention_out, mlp_norm, gate_up, down = (
                p[f"blocks.{i}.{name}"] for name in
                ("attention_norm", "qkv", "attention_out", "mlp_norm", "gate_up", "down"))
            h = attention((qkv * attention_norm) @ F.rms_norm(x), i)  # (D, N)
            x = x + attention_out @ h
            h = F.swiglu((gate_up * mlp_norm) @ F.rms_norm(x))  # (F, N)
            x = x + down @ h
        return (p["head"] * p["norm"]) @ F.rms_norm(x)

    def generate(self, prompts, max_new_tokens, temperature=0.0, rng=None, end=data.END):
        """Continue prompts: lists of ids -> lists of the new ids, with the end token if reached.

        Greedy at temperature 0, else sampled from softmax(logits / temperature) with `rng`, a NumPy
        Generator; a row stops at `end` or after max_new_tokens. All rows advance together, a column
        a step. A row with a longer prompt is still fed it while others write: no padding is read.
        """
        if not temperature >= 0 or temperature and rng is None:
            raise ValueError(f"temperature {temperature} must be 0, or above 0 and come with rng")
        if len(prompts) == 0 or max_new_tokens < 1:
            return [[] for _ in prompts]
        starts = np.array([len(ids) for ids in prompts])
        if starts.min() < 1:
            raise ValueError("a prompt needs at least one token")
        stops = starts + max_new_tokens  # (B,): lowered to where a row ends
        text, c = data.pad(prompts, stops.max()), self.config  # (B, total)
        keys, values = np.empty((2, c.n_layers, stops.max(), c.n_heads, c.d_model // c.n_heads,
                                 len(prompts)), self._parameters["head"].dtype)
        going = np.arange(len(prompts))  # the rows that are not finished
        for column in range(1, stops.max()):
            with no_grad():  # the position before `column`, after those whose keys are kept
                logits = self._logits(text[going, column - 1], lambda qkv, i: F.cached_attention(
                    qkv, c.n_heads, keys[i], values[i], column - 1)).data  # (V, B)
            new, writes = _choose(logits, temperature, rng), starts[going] <= column
            text[going[writes], column] = new[writes]
            stops[going[writes & (new == end)]] = column + 1
            stay = stops[going] > column + 1
            if not stay.all():  # finished rows leave the batch
                going = going[stay]  # `compress`: indexing doubles the time of 1,024 rows
                keys, values = keys.compress(stay, axis=-1), values.compress(stay, axis=-1)
            if not going.size:
                break
        return [row[start:stop].tolist() for row, start, stop in zip(text, starts, stops)]

    def save(self, path):
        """Write weights and config as .npz; what is there stays until the new file is complete.

        Raises UserError, a ValueError, and writes nothing, for weights that are not finite.
        """
        arrays = {name: parameter.data for name, parameter in self._parameters.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise UserError(f"{path} was not written, some weights are infinite; try a lower --lr")
        with atomic_write(path) as file:
            np.savez(file, config=json.dumps(dataclasses.asdict(self.config)), **arrays)

    @classmethod
    def load(cls, path):
        """The model of a checkpoint. Raises OSError for a file that cannot be read, UserError, a
        ValueError, for one that is no checkpoint of this edition."""
        with open(path, "rb") as file:
            try:
                with np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
                    model = cls(_checked_config(archive))
                    for name, parameter in model._parameters.items():
                        parameter.data = np.ascontiguousarray(archive[name], np.float32)
                        if not np.isfinite(parameter.data).all():
                            raise ValueError(f"{name} holds NaN or infinity")
            except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
                raise UserError(f"{path} is no checkpoint, or damaged ({error}); train it again "
                                f"with python sft.py, or name another file") from error
        return model


def _checked_config(archive):
    """The Config of a checkpoint. Raises ValueError unless the arrays are those of its sizes. Only
    headers are read, and compared with the file's size: a damaged one could ask for any memory."""
    shape, dtype = _header(archive, "config")
    if shape or dtype.itemsize > 10_000:
        raise ValueError(f"its config is no text: {dtype} {shape}")
    n_bytes = 0
    fields = json.loads(archive["config"].item())
    config = Config(**{field.name: fields[field.name] for field in dataclasses.fields(Config)})
    if 6 * config.n_layers + 3 != len(archive.files) - 1:  # before a list of them is made
        raise ValueError(f"it holds {len(archive.files) - 1} arrays, not those of its config")
    for name, shape in parameter_shapes(config).items():
        found, dtype = _header(archive, name)
        if found == shape[::-1] != shape:
            raise ValueError(f"it is of the first edition, whose {name} lies transposed")
        if found != shape or dtype.kind != "f":
            raise ValueError(f"{name} should be float32 {shape}, found {dtype} {found}")
        n_bytes += math.prod(shape) * dtype.itemsize
    if n_bytes > os.fstat(archive.zip.fp.fileno()).st_size:
        raise ValueError("it is shorter than its headers say")
    return config


def _header(archive, name):
    """Shape and dtype of an array that is not read yet."""
    with archive.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, _, dtype = read_header(member)
        return shape, dtype


def _choose(logits, temperature, rng):
    """One token id for each column: (V, B) -> (B,)."""
    if not temperature:
        return logits.argmax(axis=0)
    scaled = (logits.astype(np.float64) - logits.max(axis=0)) / temperature
    cumulative = np.cumsum(np.exp(scaled), axis=0)  # (V, B)
    return (cumulative <= rng.random(logits.shape[1]) * cumulative[-1]).sum(axis=0)
