"""A decoder-only Transformer of the Llama family: model, sampling and checkpoints."""
import dataclasses
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tinygrad_lite import Tensor, functional as F, no_grad
import numpy as np

import data


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model. Raises ValueError for sizes that do not fit together."""
    vocab_size: int
    d_model: int = 32
    n_layers: int = 3
    n_heads: int = 4
    d_hidden: int = 64
    max_len: int = 24  # tokens of a line; noted with the weights, rotary positions do not need it

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} is not divisible by 2 n_heads = "
                             f"{2 * self.n_heads}; rotary positions turn pairs of features")


class Transformer:
    """x += attention(norm(x)); x += mlp(norm(x)) in each block, logits = head(norm(x)).

    Llama's: RMSNorm, rotary positions, SwiGLU, no biases, an untied head.
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
                std = 1.0 if name == "embedding" else shape[0] ** -0.5
                if name.endswith(("attention_out", "down")):
                    std /= (2 * config.n_layers) ** 0.5
                array = rng.normal(0, std, shape).astype(np.float32)
            self._parameters[name] = Tensor(array, requires_grad=True)

    def named_parameters(self):
        """{name: Tensor} in the order of a checkpoint."""
        return dict(self._parameters)

    def parameters(self):
        return list(self._parameters.values())

    def __call__(self, ids, caches=None):
        """Logits of the next token at every position: int (B, T) -> (B, T, V).

        `caches`, one KeyValueCache a layer, stand for the positions before these ids. Raises
        ValueError for ids that are not integers (B, T) within the vocabulary.
        """
        ids, config, p = np.asarray(ids), self.config, self._parameters
        if not (ids.ndim == 2 and ids.size and ids.dtype.kind in "iu"
                and 0 <= ids.min() and ids.max() < config.vocab_size):
            raise ValueError(f"ids must be integers (B, T) in 0 ... {config.vocab_size - 1}, "
                             f"not {ids.dtype} {ids.shape}")
        x = F.embedding(p["embedding"], ids)  # (B, T, D)
        for i in range(config.n_layers):
            block = f"blocks.{i}."
            h = F.norm_linear(x, p[block + "attention_norm"], p[block + "qkv"])
            h = (F.cached_attention(h, config.n_heads, caches[i]) if caches else
                 F.causal_attention(h, config.n_heads))
            x = x + F.linear(h, p[block + "attention_out"])
            h = F.swiglu(F.norm_linear(x, p[block + "mlp_norm"], p[block + "gate_up"]))  # (B, T, F)
            x = x + F.linear(h, p[block + "down"])
        return F.linear(F.rms_norm(x, p["norm"]), p["head"])

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
        lengths = np.array([len(ids) for ids in prompts])
        if lengths.min() < 1:
            raise ValueError("a prompt needs at least one token")
        total = lengths.max() + max_new_tokens
        text = np.pad(data.pad(prompts), [(0, 0), (0, max_new_tokens)])  # (B, total)
        stops = lengths + max_new_tokens  # (B,): lowered to where a row ends
        caches = [F.KeyValueCache(total) for _ in range(self.config.n_layers)]
        live, fed = np.arange(len(prompts)), 0  # the rows still going; the columns in the caches
        for column in range(lengths.min(), total):
            with no_grad():
                logits = self(text[live, fed:column], caches).data[:, -1]  # (live, V)
            fed = column
            writing = column >= lengths[live]
            new = _choose(logits, temperature, rng)
            text[live[writing], column] = new[writing]
            stops[live[writing & (new == end)]] = column + 1
            going = stops[live] > column + 1
            if not going.any():
                break
            if not going.all():  # finished rows leave the batch
                live = live[going]
                for cache in caches:
                    cache.keep(going)
        return [row[length:stop].tolist() for row, length, stop in zip(text, lengths, stops)]

    def save(self, path):
        """Write weights and config as .npz; an earlier file stays whole until the new one is."""
        arrays = {name: parameter.data for name, parameter in self._parameters.items()}
        with atomic_write(path) as file:
            np.savez(file, config=json.dumps(dataclasses.asdict(self.config)), **arrays)

    @classmethod
    def load(cls, path):
        """The model of a checkpoint. Raises FileNotFoundError, or ValueError for a damaged file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        try:
            with np.load(path, allow_pickle=False) as archive:  # a pickle could run code
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
            raise ValueError(f"{path} is not a whole checkpoint") from error
        try:
            fields = json.loads(arrays.pop("config").item())
            config = Config(**{f.name: fields[f.name] for f in dataclasses.fields(Config)})
        except Exception as error:  # it may hold anything
            raise ValueError(f"{path} has no valid config ({error})") from error
        # Compared before anything of the sizes in `config` is allocated: they may be damaged, too.
        if 6 * config.n_layers + 3 != len(arrays):
            raise ValueError(f"{path} holds {len(arrays)} arrays, not those of its config")
        for name, shape in parameter_shapes(config).items():
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype.kind != "f":
                found = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise ValueError(f"{path}: {name} should be float32 {shape}, found {found}")
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
                arrays[name] = array.astype(np.float32)
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity")
        model = cls(config)
        for name, parameter in model._parameters.items():
            parameter.data = arrays[name]
        return model


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order of a checkpoint.

    Matrices are (inputs, outputs), used as x @ W; qkv = [q | k | v] and gate_up = [gate | up] side
    by side. RMSNorm's eps is 1e-6, the rotary base 10,000: the defaults of `functional`.
    """
    d, f, v = config.d_model, config.d_hidden, config.vocab_size
    block = {"attention_norm": (d,), "qkv": (d, 3 * d), "attention_out": (d, d),
             "mlp_norm": (d,), "gate_up": (d, 2 * f), "down": (f, d)}
    blocks = {f"blocks.{i}.{name}": shape
              for i in range(config.n_layers) for name, shape in block.items()}
    return {"embedding": (v, d), **blocks, "norm": (d,), "head": (d, v)}


def _choose(logits, temperature, rng):
    """One token id for each row: (B, V) -> (B,)."""
    if not temperature:
        return logits.argmax(axis=1)
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is as good
        scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    cumulative = np.cumsum(np.exp(scaled), axis=1)  # (B, V)
    draw = rng.random((len(logits), 1)) * cumulative[:, -1:]
    return (cumulative <= draw).sum(axis=1)


@contextmanager
def atomic_write(path):
    """A binary file that takes its place at `path` only once it is whole and on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def write_json(path, facts):
    """`facts` as a JSON file, whole or not at all; paths become text."""
    with atomic_write(path) as file:
        file.write(json.dumps(facts, indent=1, default=os.fspath).encode())
