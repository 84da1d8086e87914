"""A decoder-only Transformer of the Llama family: model, sampling and checkpoints."""
import dataclasses
import json
import os
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tinygrad_lite import Tensor, functional as F, no_grad


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model. Raises ValueError for sizes that do not fit together."""
    vocab_size: int
    d_model: int = 48
    n_layers: int = 3
    n_heads: int = 4
    d_hidden: int = 96
    max_len: int = 24

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        if self.d_model // self.n_heads % 2:
            raise ValueError(f"d_model / n_heads is {self.d_model // self.n_heads}, an odd head size; rotary "
                             f"positions turn pairs, so make it even")


class Transformer:
    """x += attention(norm(x)); x += mlp(norm(x)) in each block, no biases, rotary positions, untied head."""

    def __init__(self, config, seed=0):
        self.config = config
        rng = np.random.default_rng(seed)
        self._parameters = {}
        for name, shape in parameter_shapes(config).items():
            if len(shape) == 1:
                data = np.ones(shape, np.float32)
            else:
                # Variance 1 / inputs keeps activations near 1; what is added to the residual stream starts
                # smaller, since 2 n_layers of them add up (Radford et al. 2019, section 2.3).
                std = 1.0 if name == "embedding" else shape[0] ** -0.5
                if name.endswith(("attention_out", "down")):
                    std /= (2 * config.n_layers) ** 0.5
                data = rng.normal(0, std, shape).astype(np.float32)
            self._parameters[name] = Tensor(data, requires_grad=True)

    def named_parameters(self):
        """{name: Tensor} in the order of a checkpoint."""
        return dict(self._parameters)

    def parameters(self):
        return list(self._parameters.values())

    def __call__(self, ids, caches=None):
        """Logits of the next token at every position: int (B, T) -> (B, T, V).

        `caches`, one KeyValueCache a layer, stand for the positions before these ids. Raises ValueError for
        ids that are not an integer array (B, T) of ids in the vocabulary.
        """
        ids = self._checked(ids)
        config, p = self.config, self._parameters
        x = F.embedding(p["embedding"], ids)  # (B, T, D)
        for i in range(config.n_layers):
            block = f"blocks.{i}."
            cache = caches[i] if caches else None
            h = F.rms_norm(x, p[block + "attention_norm"])
            h = F.causal_attention(F.linear(h, p[block + "qkv"]), config.n_heads, cache=cache)
            x = x + F.linear(h, p[block + "attention_out"])
            h = F.rms_norm(x, p[block + "mlp_norm"])
            h = F.swiglu(F.linear(h, p[block + "gate_up"]))  # (B, T, F)
            x = x + F.linear(h, p[block + "down"])
        return F.linear(F.rms_norm(x, p["norm"]), p["head"])

    def _checked(self, ids):
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
            raise ValueError(f"ids must be integers of shape (B, T), not {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"ids must be in 0 ... {self.config.vocab_size - 1}")
        return ids

    def generate(self, prompts, max_new_tokens, temperature=0.0, rng=None, end=None):
        """Continue each prompt: lists of ids -> lists of ids, the new tokens only, with the end token.

        Greedy at temperature 0, otherwise sampled from softmax(logits / temperature) with `rng`. A row stops
        at `end` or after max_new_tokens. All rows advance together, one column a step; a row whose prompt
        is longer is still fed its prompt while others already write, so nothing is padded.
        """
        if temperature and rng is None:
            raise ValueError("sampling at a temperature needs rng, a numpy Generator")
        lengths = np.array([len(ids) for ids in prompts])
        if len(prompts) == 0 or max_new_tokens < 1:
            return [[] for _ in prompts]
        if lengths.min() < 1:
            raise ValueError("a prompt needs at least one token")
        total = lengths.max() + max_new_tokens
        text = np.zeros((len(prompts), total), dtype=np.int64)  # (B, prompt + new)
        for row, ids in zip(text, prompts):
            row[:len(ids)] = ids
        stops = lengths + max_new_tokens  # (B,), lowered to where a row ends
        caches = [F.KeyValueCache(total) for _ in range(self.config.n_layers)]
        live, fed = np.arange(len(prompts)), 0  # rows still writing; columns in the caches
        for column in range(lengths.min(), total):
            with no_grad():
                logits = self(text[live, fed:column], caches).data[:, -1]  # (live, V)
            fed = column
            writing = column >= lengths[live]
            new = _choose(logits, temperature, rng)
            text[live[writing], column] = new[writing]
            if end is not None:
                ended = live[writing & (new == end)]
                stops[ended] = column + 1
            going = stops[live] > column + 1
            if not going.all():
                live = live[going]
                if not live.size:
                    break
                for cache in caches:
                    cache.keep(going)
        return [row[length:stop].tolist() for row, length, stop in zip(text, lengths, stops)]

    def save(self, path, **extra):
        """Write an .npz checkpoint of weights, config and `extra` facts; an earlier file stays whole until the end."""
        config = json.dumps({**dataclasses.asdict(self.config), **extra})
        with atomic_write(path) as file:
            np.savez(file, config=np.array(config), **{n: p.data for n, p in self._parameters.items()})

    @classmethod
    def load(cls, path):
        """The model of a checkpoint. Raises FileNotFoundError, or ValueError for a file that is no whole checkpoint."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        try:
            with np.load(path, allow_pickle=False) as archive:  # a pickle could run code
                arrays = {name: archive[name] for name in archive.files}
            fields = json.loads(arrays.pop("config").item())
            names = [field.name for field in dataclasses.fields(Config)]
            model = cls(Config(**{name: fields[name] for name in names}))
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile,
                zipfile.zlib.error, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path} is not a whole checkpoint ({error})") from error
        for name, parameter in model.named_parameters().items():
            array = arrays.get(name)
            if array is None or array.shape != parameter.shape or array.dtype.kind != "f":
                found = "nothing" if array is None else f"{array.dtype}{array.shape}"
                raise ValueError(f"{path}: {name} should be float32{parameter.shape}, found {found}")
            if not np.isfinite(array).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity")
            parameter.data = array.astype(np.float32)
        return model


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order of a checkpoint."""
    d, f, v = config.d_model, config.d_hidden, config.vocab_size
    block = {"attention_norm": (d,), "qkv": (d, 3 * d), "attention_out": (d, d),
             "mlp_norm": (d,), "gate_up": (d, 2 * f), "down": (f, d)}
    return {"embedding": (v, d),
            **{f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()},
            "norm": (d,), "head": (d, v)}


def _choose(logits, temperature, rng):
    """One token id for each row: (B, V) -> (B,)."""
    if not temperature:
        return logits.argmax(axis=1)
    scaled = logits / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    cumulative = np.cumsum(np.exp(scaled, dtype=np.float64), axis=1)  # (B, V)
    draw = rng.random((len(logits), 1)) * cumulative[:, -1:]
    return (cumulative <= draw).sum(axis=1)


@contextmanager
def atomic_write(path):
    """A binary file that takes its place at `path` only once it is whole and on disk, whatever happens before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, facts):
    """`facts` as a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(facts, indent=1).encode())
