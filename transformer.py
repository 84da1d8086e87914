"""A decoder-only Transformer of the Llama family: model, sampling and checkpoints."""
import dataclasses
import io
import json
import os
import zipfile

from tinygrad_lite import Tensor, functional as F, no_grad
import numpy as np

import data
from cli import UserError, atomic_write


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model. Raises UserError, a ValueError, where they do not fit together."""
    vocab_size: int
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    d_hidden: int = 96
    max_len: int = 24  # tokens of a line; recorded only: rotary positions do not need it

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.d_model % (2 * self.n_heads):
            raise UserError(f"d_model must be a multiple of 2 n_heads = {2 * self.n_heads}")


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order of a checkpoint. Matrices are (outputs,
    inputs), used as W @ x; qkv = [q; k; v] and gate_up = [gate; up] lie one below the other."""
    d, f, v, n = config.d_model, config.d_hidden, config.vocab_size, config.n_layers
    block = {"attention_norm": (d,), "qkv": (3 * d, d), "attention_out": (d, d),
             "mlp_norm": (d,), "gate_up": (2 * f, d), "down": (d, f)}
    blocks = {f"blocks.{i}.{name}": shape for i in range(n) for name, shape in block.items()}
    return {"embedding": (d, v), **blocks, "norm": (d,), "head": (v, d)}


class Transformer:
    """x += attention(norm(x)); x += mlp(norm(x)) in each block, logits = head(norm(x)). Llama's:
    RMSNorm (eps 1e-6), rotary positions (base 10,000), SwiGLU, no biases, an untied head. A norm's
    learned scale multiplies the columns of the matrix after it: W (s x) = (W s) x."""

    def __init__(self, config, seed=0):
        self.config = config
        rng = np.random.default_rng(seed)
        self._parameters = {}
        for name, shape in parameter_shapes(config).items():
            # Variance 1 / inputs keeps activations near 1. What is added to the residual stream
            # starts smaller, as 2 n_layers of these add up (Radford et al. 2019, section 2.3).
            std = 1.0 if name == "embedding" else shape[-1] ** -0.5
            if name.endswith(("attention_out", "down")):
                std /= (2 * config.n_layers) ** 0.5
            array = np.ones(shape) if len(shape) == 1 else rng.normal(0, std, shape)
            self._parameters[name] = Tensor(array.astype(np.float32), requires_grad=True)

    def named_parameters(self): return dict(self._parameters)  # {name: Tensor}, as in a checkpoint
    def parameters(self): return list(self._parameters.values())

    def __call__(self, ids):
        """Logits of the next token at every position: int (B, T) -> (V, B T), line after line.
        Raises ValueError for ids that are not integers (B, T) within the vocabulary."""
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
            b = f"blocks.{i}."
            h = attention((p[b + "qkv"] * p[b + "attention_norm"]) @ F.rms_norm(x), i)  # (D, N)
            x = x + p[b + "attention_out"] @ h
            h = F.swiglu((p[b + "gate_up"] * p[b + "mlp_norm"]) @ F.rms_norm(x))  # (F, N)
            x = x + p[b + "down"] @ h
        return (p["head"] * p["norm"]) @ F.rms_norm(x)

    def generate(self, prompts, max_new_tokens, temperature=0.0, rng=None, end=data.END):
        """Continue prompts: lists of ids -> lists of the new ids, with the end token if reached.
        Greedy at temperature 0, else sampled from softmax(logits / temperature) with `rng`, a NumPy
        Generator. All rows advance together, a column a step; one with a longer prompt is still fed
        it while others write: no padding is read. ValueError for an empty prompt or without rng."""
        if not temperature >= 0 or temperature and rng is None:
            raise ValueError(f"temperature {temperature} must be 0, or above 0 and come with rng")
        if len(prompts) == 0 or max_new_tokens < 1:
            return [[] for _ in prompts]
        starts = np.array([len(ids) for ids in prompts])
        if starts.min() < 1:
            raise ValueError("a prompt needs at least one token")
        stops = starts + max_new_tokens  # (B,): lowered to where a row ends
        text, c = data.pad(prompts, stops.max()), self.config  # (B, total)
        going = np.arange(len(prompts))  # the rows that are not finished
        cache = np.empty((2, c.n_layers, stops.max(), c.n_heads, c.d_model // c.n_heads,
                          going.size), self._parameters["head"].dtype)  # keys and values
        for column in range(1, stops.max()):
            with no_grad():  # the position before `column`, after those whose keys are kept
                logits = self._logits(text[going, column - 1], lambda qkv, i: F.cached_attention(
                    qkv, c.n_heads, *cache[:, i], column - 1)).data  # (V, B)
            new, writes = _choose(logits, temperature, rng), starts[going] <= column
            text[going[writes], column] = new[writes]
            stops[going[writes & (new == end)]] = column + 1
            stay = stops[going] > column + 1
            if not stay.all():  # finished rows leave the batch
                going = going[stay]
                # To move what is not filled yet, or to index instead, costs a tenth of the time.
                filled = cache[:, :, :column].compress(stay, axis=-1)
                cache = cache[..., :going.size]
                cache[:, :, :column] = filled
            if not going.size:
                break
        return [row[start:stop].tolist() for row, start, stop in zip(text, starts, stops)]

    def save(self, path):
        """Write weights and config as .npz; what is there stays until the new file is complete.
        Raises UserError, a ValueError, and writes nothing, for weights that are not finite."""
        arrays = {name: parameter.data for name, parameter in self._parameters.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise UserError(f"{path} was not written: infinite or NaN weights; try a lower --lr")
        with atomic_write(path) as file:
            np.savez(file, config=json.dumps(vars(self.config), default=int), **arrays)

    @classmethod
    def load(cls, path):
        """The model of a checkpoint. Raises OSError where it cannot be read, else UserError."""
        with open(path, "rb") as file:
            try:
                config, arrays = _read_checkpoint(file)
            except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
                raise UserError(f"{path} is no checkpoint, or damaged ({error}); train it again "
                                f"with python sft.py, or name another file") from error
        model = cls(config)
        for name, parameter in model._parameters.items():
            parameter.data = arrays[name]
        return model


def _read_checkpoint(file):
    """Config and {name: array}. Raises any kind of exception unless the file is what `save` writes.
    The bytes are read before an array is made: a damaged header could ask for any memory."""
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        if sum(m.file_size for m in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise ValueError("it is compressed, or shorter than it says")
        for name in archive.namelist():
            member = io.BytesIO(archive.read(name))
            np.lib.format.read_magic(member)  # 1.0, what np.savez writes
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
            array = np.frombuffer(member.read(), dtype)  # refuses what pickle would have to read
            arrays[name.removesuffix(".npy")] = array.reshape(shape, order="CF"[is_fortran])
    config = Config(**(fields := json.loads(arrays.pop("config").item())))
    if vars(config) != fields or 6 * config.n_layers + 3 != len(arrays):  # before a list is made
        raise ValueError("its config is not whole, or not that of its arrays")
    for name, shape in parameter_shapes(config).items():
        array = arrays[name]
        if array.shape == shape[::-1] != shape:
            raise ValueError(f"it is of the first edition, whose {name} lies transposed")
        arrays[name] = array.astype(np.float32, order="C")
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is no array of finite floats of shape {shape}")
    return config, arrays


def _choose(logits, temperature, rng):
    """One token id for each column: (V, B) -> (B,)."""
    if not temperature:
        return logits.argmax(axis=0)
    scaled = (logits.astype(np.float64) - logits.max(axis=0)) / temperature
    cumulative = np.cumsum(np.exp(scaled), axis=0)  # (V, B)
    return (cumulative <= rng.random(logits.shape[1]) * cumulative[-1]).sum(axis=0)
