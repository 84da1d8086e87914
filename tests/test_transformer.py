"""The model as a whole: gradients, sampling, and checkpoints good and bad."""

import dataclasses
import io
import json
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import data
import sft
from helpers import flip, log_softmax, read_only_gradients, seeds, tape, tiny_model
from tinygrad_lite import Tensor, functional as F
from transformer import Config, Transformer

pytestmark = pytest.mark.filterwarnings("ignore")  # on odd headers, overflow, duplicate names
VOCAB = 7  # of the tiny model
GOOD = {"vocab_size": 7, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_hidden": 6, "max_len": 16}
tokens, sizes = st.integers(0, VOCAB - 1), st.integers(1, 5)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=5)


def same(a, b):
    """Equal to the bit, dtypes and order included."""
    return a.config == b.config and all(
        x == y and p.requires_grad and p.dtype == q.dtype and np.array_equal(p.data, q.data)
        for (x, p), (y, q) in zip(*(m.named_parameters().items() for m in (a, b)), strict=True)
    )


@given(seeds)
@settings(max_examples=5)
def test_the_gradient_of_every_parameter(seed):
    """Finite differences in float64 at three elements of each parameter of a two-layer model."""

    def loss():
        return -F.token_log_probs(model(ids[:, :-1]), ids[:, 1:].ravel()).mean()

    model, rng, step = tiny_model(seed, np.float64), np.random.default_rng(seed), 1e-5
    ids = rng.integers(0, VOCAB, (2, 5))
    read_only_gradients(loss()).backward()
    for name, p in model.named_parameters().items():
        for at in zip(*(rng.integers(0, n, 3) for n in p.shape)):
            x, values = p.data[at], []
            for p.data[at] in (x + step, x - step, x):
                values.append(loss().item())
            assert abs(p.grad[at] - (values[0] - values[1]) / (2 * step)) < 1e-7, (name, at)


def test_a_training_step_is_float32_throughout():
    """Every node of the tape, what each keeps for its backward pass, and every gradient."""
    model = tiny_model(vocab_size=len(data.VOCAB))
    loss = sft.sft_loss(model, data.random_lines(3, np.random.default_rng(0)))
    nodes = tape(loss)
    kept = [
        cell.cell_contents
        for node in nodes
        if node.backward_fn
        for cell in node.backward_fn.__closure__
    ]
    kept = [x for x in kept if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    loss.backward()
    kept += [*nodes, *(p.grad for p in model.parameters())]
    assert len(kept) > 60 and {x.dtype for x in kept} == {np.dtype(np.float32)}


@given(sizes, sizes, st.integers(1, 3), seeds)
def test_the_model_is_its_formula(batch, length, n_layers, seed):
    """x += attention(norm(x)); x += mlp(norm(x)), on plain arrays; scales that are not 1."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=0) + 1e-6) * scale[:, None]

    model, rng = tiny_model(seed, np.float64, n_layers=n_layers), np.random.default_rng(seed)
    p = {name: parameter.data for name, parameter in model.named_parameters().items()}
    ids = rng.integers(0, VOCAB, (batch, length))
    for array in p.values():
        array += 0.5 * (array.ndim == 1) * rng.random(array.shape)
    x = p["embedding"][:, ids.ravel()]
    for b in (f"blocks.{i}." for i in range(n_layers)):
        qkv = Tensor(p[b + "qkv"] @ norm(x, p[b + "attention_norm"]))
        x = x + p[b + "attention_out"] @ F.causal_attention(qkv, 2, batch, rope_base=10000.0).data
        gate, up = np.split(p[b + "gate_up"] @ norm(x, p[b + "mlp_norm"]), 2)
        x = x + p[b + "down"] @ (gate / (1 + np.exp(-gate)) * up)
    assert model(ids).shape == (VOCAB, batch * length)
    assert np.allclose(model(ids).data, p["head"] @ norm(x, p["norm"]), rtol=1e-9, atol=1e-9)


def test_parameters_are_in_order_start_as_they_should_and_come_from_the_seed():
    """Variance 1 / inputs, smaller where 2 n_layers results add up in the residual stream."""
    v, d, f, n = 50, 32, 64, 4
    block = {
        "attention_norm": ((d,), 0),
        "qkv": ((3 * d, d), d**-0.5),
        "attention_out": ((d, d), (2 * n * d) ** -0.5),
        "mlp_norm": ((d,), 0),
        "gate_up": ((2 * f, d), d**-0.5),
        "down": ((d, f), (2 * n * f) ** -0.5),
    }
    expected = {
        "embedding": ((d, v), 1),
        **{f"blocks.{i}.{name}": facts for i in range(n) for name, facts in block.items()},
        "norm": ((d,), 0),
        "head": ((v, d), d**-0.5),
    }
    model, again, other = (Transformer(Config(v, d, n, 4, f), *seed) for seed in ([], [0], [1]))
    assert list(model.named_parameters().items()) == list(zip(expected, model.parameters()))
    for p, q, (shape, std) in zip(model.parameters(), other.parameters(), expected.values()):
        assert p.requires_grad and p.dtype == np.float32 and p.shape == shape
        assert abs(p.data.std() - std) <= 0.15 * std and (std or (p.data == 1).all())
        assert std == 0 or not np.array_equal(p.data, q.data)
    assert same(model, again)


def test_config_is_a_constant_of_whole_numbers_that_fit_together():
    for field in GOOD:
        for value in (0, -1, 1.5, 8.0, "8", True, None, float("nan")):
            with pytest.raises(ValueError, match=f"{field} must be a whole number"):
                Config(**{**GOOD, field: value})
    for d_model, n_heads in np.argwhere(np.arange(17)[:, None] % np.arange(2, 17, 2)) + [0, 1]:
        with pytest.raises(ValueError, match=f"d_model .* 2 n_heads = {2 * n_heads}$"):
            Config(**{**GOOD, "d_model": d_model, "n_heads": n_heads})
    config = Config(*map(np.int64, GOOD.values()))
    assert config == Config(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 16


@given(prompts, st.integers(1, 8), st.none() | tokens, seeds)
def test_generation_is_decoding_without_the_cache(prompts, count, end, seed):
    """So no answer depends on its batch. In float64, where rounding cannot turn a near tie."""
    model, expected, before = tiny_model(seed, np.float64), [], [*map(list, prompts)]
    for prompt in prompts:
        answer = []
        while len(answer) < count and answer[-1:] != [end]:
            answer.append(model([prompt + answer]).data[:, -1].argmax())
        expected.append(answer)
    assert model.generate(prompts, count, end=end) == expected
    assert model.generate(prompts[::-1], count, end=end) == expected[::-1]
    answers, again = (
        model.generate(prompts, count, 1.0, np.random.default_rng(seed), end) for _ in range(2)
    )
    assert answers == again and len(answers) == len(prompts)
    for answer in answers:
        assert end not in answer[:-1] and (len(answer) == count or answer[-1] == end)
        assert 0 < len(answer) <= count and all(type(i) is int and 0 <= i < VOCAB for i in answer)
    assert prompts == before and same(model, tiny_model(seed, np.float64))
    assert all(p.grad is None for p in model.parameters()) and model([[1]]).requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_sampled_as_often_as_the_softmax_says(temperature):
    """p(a, b | prompt) = p(a | prompt) p(b | prompt, a): 49 pairs, 48 degrees of freedom."""
    model, n, prompt = tiny_model(), 20_000, [1, 2]
    answers = np.array(model.generate([prompt] * n, 2, temperature, np.random.default_rng(0)))
    counts = np.bincount(VOCAB * answers[:, 0] + answers[:, 1], minlength=VOCAB**2)
    logits = model([[*prompt, a] for a in range(VOCAB)]).data.reshape(VOCAB, VOCAB, 3) / temperature
    first, second = np.exp(log_softmax(logits[:, 0, 1])), np.exp(log_softmax(logits[:, :, 2])).T
    expected = (n * first[:, None] * second).ravel()
    assert ((counts - expected) ** 2 / expected).sum() < 130


def test_what_cannot_be_read_or_generated():
    """A negative id would quietly take a column from the end of the embedding. In float32 a logit
    over 1e-40 is infinite and 1e-300 is 0; neither may turn into NaN."""
    model, rng, prompts = tiny_model(), np.random.default_rng(0), [[1, 2], [3], [6, 5, 4]]
    for ids in (
        [0, 1],
        3,
        [[[0]]],
        [[0.0, 1.0]],
        [[True]],
        [["0"]],
        [[]],
        [],
        [[VOCAB]],
        [[-1]],
        [[0, 1, 10**12]],
    ):
        with pytest.raises(ValueError, match=f"ids must be integers .* in 0 ... {VOCAB - 1}"):
            model(np.array(ids))
    for temperature in (1e-9, 1e-40, 1e-300):
        assert model.generate(prompts, 4, temperature, rng) == model.generate(prompts, 4)
    assert model.generate([], 3) == [] and model.generate([[1], [2, 3]], 0) == [[], []]
    with pytest.raises(ValueError, match="prompt"):
        model.generate([[1], []], 3)
    for temperature, rng in [(1.0, None), (-1.0, rng), (float("nan"), rng)]:
        with pytest.raises(ValueError, match=f"temperature {temperature} must be 0, .*rng"):
            model.generate([[1]], 1, temperature, rng)


def test_a_checkpoint_is_an_npz_and_gives_back_every_bit(tmp_path):
    path = tmp_path / "new" / "model.npz"
    for config in Config(**GOOD), Config(*map(np.int64, (1, 2, 2, 1, 1, 1))):  # replaces the first
        model = Transformer(config, seed=3)
        model.save(path)
        loaded = Transformer.load(path)
        assert same(loaded, model) and [*path.parent.iterdir()] == [path]
        with np.load(path, allow_pickle=False) as archive:
            assert archive.files == ["config", *model.named_parameters()]
            assert json.loads(archive["config"].item()) == dataclasses.asdict(config)
    for model.parameters()[1].data[0] in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="model.npz.* not"):
            model.save(path)
    assert same(Transformer.load(path), loaded)
    for missing in (path.parent, path.parent / "nothing.npz"):
        with pytest.raises(OSError):
            Transformer.load(missing)


MODEL = Transformer(Config(vocab_size=5, d_model=24, n_layers=1, n_heads=2, d_hidden=4))
WEIGHTS = {name: parameter.data for name, parameter in MODEL.named_parameters().items()}
CONFIG, ONES = dataclasses.asdict(MODEL.config), np.ones(24, np.float32)


class Trap:
    """What a pickle may do on loading: anything."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def npy(array, promised=None):
    """The bytes of a .npy file, whose header may promise another shape."""
    file, array = io.BytesIO(), np.asarray(array)
    np.save(file, array)
    old, new = (f"{shape}, }}".encode() for shape in (array.shape, promised or array.shape))
    return file.getvalue().replace(old + b" " * (len(new) - len(old)), new)


def checkpoint(config=json.dumps(CONFIG), **changes):
    """MODEL's checkpoint with other members, arrays or the bytes of .npy files, or without."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"config": config, **WEIGHTS, **changes}.items():
            if content is not None:
                archive.writestr(f"{name}.npy", content if type(content) is bytes else npy(content))
    return file.getvalue()


@pytest.mark.parametrize("n", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_unless_it_does_not_matter(tmp_path, n):
    """Cut short, pieces exchanged, a bit flipped: one exception, or the weights that were saved."""
    refused, rng, path = 0, np.random.default_rng(0), tmp_path / "model.npz"
    for _ in range(n):
        content, kind = bytearray(checkpoint()), rng.integers(6)
        a, b = sorted(rng.integers(0, len(content), 2).tolist())
        if kind == 0:
            del content[b:]
        elif kind == 1:
            content[a : a + b % 200], content[b : b + 40] = (
                content[b : b + 40],
                content[a : a + b % 200],
            )
        else:
            place = [a, content.find(b"NUMPY", a) + rng.integers(-60, 120), -1 - a % 999][kind % 3]
            content = flip(content, int(8 * (place % len(content)) + rng.integers(8)))
        try:
            path.write_bytes(content)
            assert same(Transformer.load(path), MODEL)
        except ValueError as error:
            assert "model.npz" in str(error)
            refused += 1
    assert 0.5 * n < refused < n


@pytest.mark.parametrize(
    "content",
    [
        *(
            checkpoint(norm=norm)
            for norm in (
                None,
                ONES[1:],
                ONES[:, None],
                1.0,
                np.ones(24, int),
                np.ones(24, complex),
                ["1"] * 24,
                ONES * np.nan,
                np.r_[ONES[1:], -np.inf],
                np.full(24, 1e300),
                b"something else",
                b"",
                npy(ONES, (10**9,)),
                npy(ONES[1:], (24,)),
                WEIGHTS["head"],
                [Trap()],
            )
        ),
        checkpoint(extra=ONES),
        checkpoint(extra=[Trap()]),
        checkpoint(norm=None, gain=ONES),
        checkpoint(**{"blocks.1.qkv": np.ones((72, 24), np.float32)}),
        checkpoint(json.dumps({name: CONFIG[name] for name in CONFIG if name != "n_heads"})),
        *map(
            checkpoint,
            (
                None,
                b"{}",
                "",
                "{",
                "null",
                "[]",
                "3",
                '"text"',
                "[" * 100_000,
                np.ones(1),
                ["{}", "{}"],
                b"\xff",
                npy(["{}"], (10**9,)),
                Trap(),
                npy("{}").replace(b"U2'", b"U9000000'").replace(b" " * 7 + b"\n", b" \n"),
            ),
        ),
        *(
            checkpoint(json.dumps({**CONFIG, name: value}))
            for name, value in (
                ("d_model", 48),
                ("n_layers", 2),
                ("n_layers", 0),
                ("n_layers", 10**12),
                ("d_model", -24),
                ("d_model", 24.0),
                ("d_model", "24"),
                ("n_heads", 5),
                ("vocab_size", 6),
                ("max_len", None),
                ("d_hidden", 10**15),
            )
        ),
        checkpoint(
            json.dumps({**CONFIG, "d_hidden": 2**18}),
            **{
                "blocks.0.gate_up": npy(ONES[:1, None], (2**19, 24)),
                "blocks.0.down": npy(ONES[:1, None], (24, 2**18)),
            },
        ),
        npy([Trap()]),
        pickle.dumps(Trap()),
        npy(ONES),
        b"",
        b"{}",
        b"PK\x03\x04",
    ],
)
def test_a_file_that_is_not_the_models(tmp_path, content):
    """Refused before anything is run, or memory asked for that the file cannot fill."""
    (tmp_path / "model.npz").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="model.npz"):
        Transformer.load(tmp_path / "model.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000 and not Trap.sprung


def test_other_float_types_are_welcome_and_the_first_edition_is_named(tmp_path):
    """Whose matrices, those of positions in rows, are transposed."""
    path = tmp_path / "model.npz"
    for dtype in (np.float16, np.float64, ">f4"):
        path.write_bytes(checkpoint(norm=ONES.astype(dtype)))
        assert same(Transformer.load(path), MODEL)
    path.write_bytes(checkpoint(**{name: p.T for name, p in WEIGHTS.items()}))
    with pytest.raises(ValueError, match="model.npz.*first edition"):
        Transformer.load(path)
