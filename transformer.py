"""A decoder-only Transformer of the Llama family: model, sampling and checkpoints."""

import dataclasses
import json

from tinygrad_lite import Tensor, functional as F, no_grad
import numpy as np

import data
from cli import UserError, atomic_write

# COLUMNS ARE POSITIONS. In most libraries the activations of one token are a row. Here, as in
# mathematics books, they are a column, and a layer is W @ x. Two lines of three tokens each, with
# four features (D = 4, N = 6), are the matrix
#
#                  line 1                line 2
#            1      0      0        5      2      =
#   x =  [  x_11   x_12   x_13     x_14   x_15   x_16  ]   feature 1
#        [  x_21   x_22   x_23     x_24   x_25   x_26  ]   feature 2
#        [  x_31   x_32   x_33     x_34   x_35   x_36  ]   feature 3      shape (D, N)
#        [  x_41   x_42   x_43     x_44   x_45   x_46  ]   feature 4
#
# Every layer but attention treats each column alone, so the lines simply lie side by side. It is
# also the faster way in NumPy: sums over features then add long rows. Letters in shapes: B lines of
# T tokens, N = B T positions, D features (d_model), F hidden features (d_hidden), V tokens.


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model. Raises UserError (a ValueError) if they do not fit together."""

    vocab_size: int
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    d_hidden: int = 96

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.d_model % (2 * self.n_heads):
            # Each head has d_model / n_heads features, and rotary positions turn pairs of them.
            raise UserError(f"d_model must be a multiple of 2 n_heads = {2 * self.n_heads}")


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order of a checkpoint.

    Matrices are (outputs, inputs). Three matrices lie one below the other in qkv = [q; k; v], and
    two in gate_up = [gate; up].
    """
    d_model, d_hidden, vocab_size = config.d_model, config.d_hidden, config.vocab_size
    shapes = {"embedding": (d_model, vocab_size)}
    for i in range(config.n_layers):
        shapes[f"blocks.{i}.attention_norm"] = (d_model,)
        shapes[f"blocks.{i}.qkv"] = (3 * d_model, d_model)
        shapes[f"blocks.{i}.attention_out"] = (d_model, d_model)
        shapes[f"blocks.{i}.mlp_norm"] = (d_model,)
        shapes[f"blocks.{i}.gate_up"] = (2 * d_hidden, d_model)
        shapes[f"blocks.{i}.down"] = (d_model, d_hidden)
    shapes["norm"] = (d_model,)
    shapes["head"] = (vocab_size, d_model)
    return shapes


def initial_array(name, shape, config, rng):
    """A new parameter, float32."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)  # the scales of norms
    n_inputs = shape[1]
    std = 1.0 if name == "embedding" else n_inputs**-0.5  # keeps activations near 1
    if name.endswith(("attention_out", "down")):
        # What is added to the residual stream starts smaller, because 2 n_layers of these add up
        # (Radford et al. 2019, section 2.3).
        std /= (2 * config.n_layers) ** 0.5
    return rng.normal(0, std, shape).astype(np.float32)


class Transformer:
    """x += attention(norm(x)); x += mlp(norm(x)) in each block; then logits = head(norm(x)).

    As in Hugging Face's Llama: RMSNorm (eps 1e-6), rotary positions (base 10,000), SwiGLU, no
    biases, an untied head. The same seed gives the same initial weights.
    """

    def __init__(self, config, seed=0):
        self.config = config
        rng = np.random.default_rng(seed)
        self._parameters = {
            name: Tensor(initial_array(name, shape, config, rng), requires_grad=True)
            for name, shape in parameter_shapes(config).items()
        }

    def named_parameters(self):
        """{name: Tensor}, as in a checkpoint."""
        return dict(self._parameters)

    def parameters(self):
        return list(self._parameters.values())

    def __call__(self, ids):
        """Logits of the next token at every position: int (B, T) -> (V, B T), line after line.

        Raises ValueError unless ids are integers (B, T) within the vocabulary.
        """
        ids = np.asarray(ids)
        vocab_size, n_heads = self.config.vocab_size, self.config.n_heads
        is_integer = ids.dtype.kind in "iu"
        if (
            not (is_integer and ids.ndim == 2 and ids.size)
            or ids.min() < 0
            or ids.max() >= vocab_size
        ):
            raise ValueError(
                f"ids must be integers (B, T) in 0 ... {vocab_size - 1}, "
                f"not {ids.dtype} {ids.shape}"
            )

        def attention(qkv, layer):
            return F.causal_attention(qkv, n_heads, batch=len(ids))

        return self._logits(ids.ravel(), attention)

    def _logits(self, ids, attention):
        """int (N,) -> (V, N), with attention(qkv, layer): (3D, N) -> (D, N)."""
        p = self._parameters
        x = F.embedding(p["embedding"], ids)  # (D, N)
        for i in range(self.config.n_layers):
            block = f"blocks.{i}."
            # A norm ends with a learned scale for each feature, diag(s) x. It is applied to the
            # matrix that follows instead: W (diag(s) x) = (W diag(s)) x = (W * s) x.
            qkv = (p[block + "qkv"] * p[block + "attention_norm"]) @ F.rms_norm(x)  # (3D, N)
            x = x + p[block + "attention_out"] @ attention(qkv, i)  # (D, N)
            gate_up = (p[block + "gate_up"] * p[block + "mlp_norm"]) @ F.rms_norm(x)  # (2F, N)
            x = x + p[block + "down"] @ F.swiglu(gate_up)  # (D, N)
        return (p["head"] * p["norm"]) @ F.rms_norm(x)  # (V, N)

    def generate(self, prompts, max_new_tokens, temperature=0.0, rng=None, end=data.END):
        """Continue each prompt: lists of ids -> lists of the new ids, ended by `end` if reached.

        temperature: 0 takes the likeliest token each time; above 0, tokens are sampled from
            softmax(logits / temperature) with `rng`, a NumPy Generator.

        Raises ValueError for an empty prompt, or a temperature that does not fit.
        """
        if not temperature >= 0 or (temperature > 0 and rng is None):
            raise ValueError(f"temperature must be 0, or above 0 with an rng; it is {temperature}")
        if len(prompts) == 0 or max_new_tokens < 1:
            return [[] for _ in prompts]
        starts = np.array([len(prompt) for prompt in prompts])  # (B,)
        if starts.min() < 1:
            raise ValueError("a prompt needs at least one token")
        # Where each line stops, one past its last token: (B,). It is lowered once a line has ended.
        stops = starts + max_new_tokens
        ids = np.zeros((len(prompts), stops.max()), int)  # (B, T), to be filled column by column
        for line, prompt in zip(ids, prompts):
            line[: len(prompt)] = prompt
        keys, values = self._empty_cache(ids.shape)  # filled up to `position`

        for position in range(stops.max() - 1):

            def attention(qkv, layer):
                cache = keys[layer], values[layer]
                return F.cached_attention(qkv, self.config.n_heads, *cache, position)

            t = position + 1  # a column of ids is read, the next one is written
            with no_grad():
                logits = self._logits(ids[:, position], attention).data  # (V, B)
            new = choose_tokens(logits, temperature, rng)  # (B,)
            # Not in lines whose prompt reaches beyond t, nor in finished ones, which go on with 0s.
            is_writing = (starts <= t) & (t < stops)
            ids[is_writing, t] = new[is_writing]
            stops[is_writing & (new == end)] = t + 1
            if (stops <= t + 1).all():
                break
        return [line[start:stop].tolist() for line, start, stop in zip(ids, starts, stops)]

    def _empty_cache(self, shape):
        """Keys and values of B lines of T positions, (n_layers, T, H, d, B) each."""
        batch, length = shape
        n_heads, d = self.config.n_heads, self.config.d_model // self.config.n_heads
        dtype = self._parameters["head"].dtype
        return np.empty((2, self.config.n_layers, length, n_heads, d, batch), dtype)

    def save(self, path):
        """Write config and weights as .npz. An older file stays until the new one is complete.

        Raises UserError (a ValueError), and writes nothing, if weights are infinite or NaN.
        """
        arrays = {name: parameter.data for name, parameter in self._parameters.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise UserError(f"{path} was not written: infinite or NaN weights; try a lower --lr")
        with atomic_write(path) as file:
            np.savez(file, config=json.dumps(dataclasses.asdict(self.config)), **arrays)

    @classmethod
    def load(cls, path):
        """The model of a checkpoint. OSError if it cannot be read, UserError if it is damaged."""
        with open(path, "rb") as file:
            try:
                archive = np.load(file)  # which refuses to run pickled code
                model = cls(Config(**json.loads(archive["config"].item())))
                parameters = model.named_parameters()
                if set(archive.files) != {"config", *parameters}:
                    raise ValueError("its arrays are not those of its config")
                for name, parameter in parameters.items():
                    array = archive[name]
                    if array.shape != parameter.shape or array.dtype.kind != "f":
                        raise ValueError(f"{name} is {array.dtype} {array.shape}")
                    parameter.data = array.astype(np.float32)
                    if not np.isfinite(parameter.data).all():
                        raise ValueError(f"{name} is not finite")
            except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
                raise UserError(
                    f"{path} is not a checkpoint of this project, or it is damaged ({error}); "
                    "train it again, or name another file"
                ) from error
        return model


def choose_tokens(logits, temperature, rng):
    """One token id for each column: (V, B) -> (B,)."""
    if temperature == 0:
        return logits.argmax(axis=0)
    scaled = (logits.astype(np.float64) - logits.max(axis=0)) / temperature  # at most 0
    cumulative = np.cumsum(np.exp(scaled), axis=0)  # (V, B)
    # A uniform number between 0 and the total falls into token k's interval with probability p_k.
    # Count the intervals that end before it.
    uniform = rng.random(logits.shape[1]) * cumulative[-1]  # (B,)
    return (cumulative <= uniform).sum(axis=0)
