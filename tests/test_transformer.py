"""The model as a whole: gradients, causality, sampling, and checkpoints good and bad."""
import dataclasses
import io
import json
import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import flip, log_softmax, seeds, tape, tiny_model
from tinygrad_lite import Tensor, functional as F, no_grad
from transformer import Config, Transformer, write_json

VOCAB = 7  # of the tiny model
tokens = st.integers(0, VOCAB - 1)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=5)
sizes = st.integers(1, 5)


def random_ids(seed, batch, length):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def logits_of(model, ids):
    with no_grad():
        return model(np.asarray(ids)).data


# The forward and the backward pass.

@given(seeds)
def test_the_gradient_of_every_parameter(seed):
    """Finite differences in float64 at three elements of each parameter of a two-layer model."""
    model, ids = tiny_model(seed, np.float64), random_ids(seed, 2, 5)
    rng = np.random.default_rng(seed)

    def loss():
        return -F.token_log_probs(model(ids[:, :-1]), ids[:, 1:]).mean()
    loss().backward()
    step = 1e-5
    for name, p in model.named_parameters().items():
        for _ in range(3):
            at = tuple(rng.integers(0, p.shape))
            before = p.data[at]
            values = []
            for moved in (before + step, before - step):
                p.data[at] = moved
                values.append(loss().item())
            p.data[at] = before
            slope = (values[0] - values[1]) / (2 * step)
            assert abs(p.grad[at] - slope) < 1e-7, (name, at)


def test_a_training_step_is_float32_throughout():
    """Every node of the tape, what each keeps for its backward pass, and every gradient."""
    model, ids = tiny_model(), random_ids(0, 3, 6)
    loss = -F.token_log_probs(model(ids[:, :-1]), ids[:, 1:]).mean()
    nodes = tape(loss)
    assert len(nodes) > 30
    assert {node.dtype for node in nodes} == {np.dtype(np.float32)}
    cells = [cell.cell_contents for node in nodes if node.backward_fn
             for cell in node.backward_fn.__closure__]
    kept = [array for array in cells if isinstance(array, np.ndarray) and array.dtype.kind == "f"]
    assert len(kept) > 20
    assert {array.dtype for array in kept} == {np.dtype(np.float32)}
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}


def naive_logits(model, ids):
    """The formula x += attention(norm(x)); x += mlp(norm(x)), on plain arrays."""
    p = {name: parameter.data for name, parameter in model.named_parameters().items()}

    def norm(x, weight):
        return x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True) + 1e-6) * weight
    x = p["embedding"][ids]
    for i in range(model.config.n_layers):
        b = f"blocks.{i}."
        with no_grad():
            qkv = Tensor(norm(x, p[b + "attention_norm"]) @ p[b + "qkv"])
            attended = F.causal_attention(qkv, model.config.n_heads, rope_base=10000.0).data
        x = x + attended @ p[b + "attention_out"]
        gate, up = np.split(norm(x, p[b + "mlp_norm"]) @ p[b + "gate_up"], 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p[b + "down"]
    return norm(x, p["norm"]) @ p["head"]


@given(sizes, sizes, st.integers(1, 3), seeds)
def test_the_model_is_its_formula(batch, length, n_layers, seed):
    model, ids = tiny_model(seed, np.float64, n_layers=n_layers), random_ids(seed, batch, length)
    for name, p in model.named_parameters().items():
        if p.ndim == 1:  # norms start at 1, where leaving one out would not show
            p.data = np.random.default_rng(seed).uniform(0.5, 2, p.shape)
    assert np.allclose(logits_of(model, ids), naive_logits(model, ids), rtol=1e-9, atol=1e-9)


@given(st.integers(2, 8), st.data(), seeds)
def test_logits_do_not_see_the_future(length, draw, seed):
    model, ids = tiny_model(seed), random_ids(seed, 3, length)
    at = draw.draw(st.integers(1, length - 1), label="first changed position")
    changed = ids.copy()
    changed[:, at:] = (ids[:, at:] + 1) % VOCAB
    before, after = logits_of(model, ids), logits_of(model, changed)
    assert np.array_equal(before[:, :at], after[:, :at])
    assert not np.allclose(before[:, at:], after[:, at:])


@given(sizes, sizes, seeds)
def test_padding_on_the_right_changes_nothing(length, padding, seed):
    model, ids = tiny_model(seed, np.float64), random_ids(seed, 3, length + padding)
    assert np.allclose(logits_of(model, ids)[:, :length], logits_of(model, ids[:, :length]),
                       rtol=1e-10, atol=1e-10)


@given(sizes, seeds)
def test_lines_do_not_see_each_other(length, seed):
    model, ids = tiny_model(seed, np.float64), random_ids(seed, 4, length)
    together = logits_of(model, ids)
    for line, logits in zip(ids, together):
        assert np.allclose(logits_of(model, line[None])[0], logits, rtol=1e-10, atol=1e-10)


def test_positions_count():
    """Without positions a model could not tell 0 1 from 1 0 after the first token."""
    logits = logits_of(tiny_model(), [[0, 1, 2], [1, 0, 2]])
    assert not np.allclose(logits[0, 2], logits[1, 2], atol=1e-3)


@pytest.mark.parametrize("ids", [[0, 1], 3, [[[0]]], [[0.0, 1.0]], [[True]], [["0"]], [[]], [],
                                 [[VOCAB]], [[-1]], [[0, 1, 10 ** 12]]], ids=str)
def test_ids_that_are_no_ids(ids):
    """A negative id would quietly take a row from the end of the embedding."""
    with pytest.raises(ValueError, match="ids"):
        tiny_model()(np.array(ids))


def test_ids_beyond_the_vocabulary_are_told_its_range():
    with pytest.raises(ValueError, match=f"0 ... {VOCAB - 1}, not int64"):
        tiny_model()(np.array([[VOCAB]]))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_ids_of_any_integer_type(dtype):
    ids = random_ids(0, 2, 3)
    assert np.array_equal(logits_of(tiny_model(), ids.astype(dtype)), logits_of(tiny_model(), ids))


# Parameters.

configs = st.builds(lambda v, heads, half, layers, f: Config(v, 2 * heads * half, layers, heads, f),
                    st.integers(1, 9), sizes, sizes, st.integers(1, 3), sizes)


@given(configs)
def test_names_order_and_shapes_of_the_parameters(config):
    v, d, f = config.vocab_size, config.d_model, config.d_hidden
    expected = [("embedding", (v, d))]
    for i in range(config.n_layers):
        expected += [(f"blocks.{i}.attention_norm", (d,)), (f"blocks.{i}.qkv", (d, 3 * d)),
                     (f"blocks.{i}.attention_out", (d, d)), (f"blocks.{i}.mlp_norm", (d,)),
                     (f"blocks.{i}.gate_up", (d, 2 * f)), (f"blocks.{i}.down", (f, d))]
    expected += [("norm", (d,)), ("head", (d, v))]
    model = Transformer(config)
    named = model.named_parameters()
    assert [(name, p.shape) for name, p in named.items()] == expected
    assert model.parameters() == list(named.values())
    assert all(p.requires_grad and p.dtype == np.float32 for p in model.parameters())


def weights(model):
    return {name: p.data for name, p in model.named_parameters().items()}


def same(a, b):
    """Equal to the bit, dtypes included."""
    a, b = weights(a), weights(b)
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


@given(seeds, seeds)
def test_the_seed_makes_the_weights(seed, other):
    assert same(tiny_model(seed), tiny_model(seed))
    if seed != other:
        a, b = weights(tiny_model(seed)), weights(tiny_model(other))
        assert not any(np.array_equal(a[name], b[name]) for name in a if a[name].ndim == 2)


def test_the_default_seed_is_0():
    assert same(Transformer(Config(**GOOD)), Transformer(Config(**GOOD), seed=0))


def test_activations_start_near_one():
    """Logits of a new model neither vanish nor explode, however deep it is."""
    for n_layers in (1, 8):
        model = Transformer(Config(50, 32, n_layers, 4, 64))
        logits = logits_of(model, np.random.default_rng(0).integers(0, 50, (8, 16)))
        assert 0.5 < logits.std() < 2


def test_weights_start_at_the_inverse_root_of_their_inputs():
    """And smaller by sqrt(2 n_layers) where 2 n_layers results add up in the residual stream."""
    model = Transformer(Config(50, 32, 4, 4, 64))
    for name, p in model.named_parameters().items():
        if p.ndim == 2 and name != "embedding":
            added = name.endswith(("attention_out", "down"))
            expected = p.shape[0] ** -0.5 / (8 ** 0.5 if added else 1)
            assert abs(p.data.std() / expected - 1) < 0.15, name
    assert abs(model.named_parameters()["embedding"].data.std() - 1) < 0.15


# Config.

GOOD = {"vocab_size": 7, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_hidden": 6, "max_len": 16}


@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, "8", True, None, float("nan")])
@pytest.mark.parametrize("field", GOOD)
def test_sizes_must_be_whole_numbers_of_at_least_one(field, value):
    with pytest.raises(ValueError, match=field):
        Config(**{**GOOD, field: value})


@given(st.integers(1, 40), st.integers(1, 12))
def test_heads_must_divide_the_width_into_even_parts(d_model, n_heads):
    fits = d_model % (2 * n_heads) == 0
    try:
        Config(**{**GOOD, "d_model": d_model, "n_heads": n_heads})
    except ValueError as error:
        assert not fits
        assert f"d_model {d_model} is not divisible by 2 n_heads = {2 * n_heads}" in str(error)
    else:
        assert fits


def test_config_is_a_constant():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**GOOD).d_model = 16


# Generation.

def naive_greedy(model, prompt, max_new_tokens, end=None):
    """Argmax of the last logits, again and again, each time over the whole text."""
    text = list(prompt)
    while len(text) < len(prompt) + max_new_tokens:
        text.append(int(logits_of(model, [text])[0, -1].argmax()))
        if text[-1] == end:
            break
    return text[len(prompt):]


@given(prompts, sizes, st.none() | tokens, seeds)
def test_greedy_generation_is_argmax_decoding_without_the_cache(prompts, count, end, seed):
    """In float64, so that rounding cannot turn a near tie."""
    model = tiny_model(seed, np.float64)
    expected = [naive_greedy(model, prompt, count, end) for prompt in prompts]
    assert model.generate(prompts, count, end=end) == expected


@given(prompts, sizes, st.none() | tokens, seeds)
def test_a_greedy_answer_does_not_depend_on_its_batch(prompts, count, end, seed):
    model = tiny_model(seed, np.float64)
    alone = [model.generate([prompt], count, end=end)[0] for prompt in prompts]
    assert model.generate(prompts, count, end=end) == alone
    assert model.generate(prompts[::-1], count, end=end) == alone[::-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@given(prompts, st.integers(1, 12), tokens, seeds)
def test_an_answer_ends_at_the_end_token_or_is_full(temperature, prompts, count, end, seed):
    model, rng = tiny_model(), np.random.default_rng(seed)
    for answer in model.generate(prompts, count, temperature, rng, end=end):
        assert end not in answer[:-1]
        assert answer[-1] == end if len(answer) < count else len(answer) == count
        assert all(type(token) is int and 0 <= token < VOCAB for token in answer)


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 1e-300])
@given(prompts, seeds)
def test_sampling_at_a_tiny_temperature_is_greedy(temperature, prompts, seed):
    """In float32 a logit over 1e-40 is infinite and 1e-300 is 0; neither may turn into NaN."""
    model = tiny_model()
    sampled = model.generate(prompts, 4, temperature, np.random.default_rng(seed))
    assert sampled == model.generate(prompts, 4)


@given(st.lists(tokens, min_size=1, max_size=4), st.sampled_from([0.5, 1.0, 2.0]), seeds)
def test_tokens_are_sampled_as_often_as_the_softmax_says(prompt, temperature, seed):
    """A count of n p is off by more than 6 sqrt(n p) + 12 once in 10^7 (Bernstein)."""
    model, n = tiny_model(), 3000
    answers = model.generate([prompt] * n, 1, temperature, np.random.default_rng(seed))
    counts = np.bincount(np.ravel(answers), minlength=VOCAB)
    logits = logits_of(model, [prompt])[0, -1].astype(float)
    expected = n * np.exp(log_softmax(logits / temperature))
    assert (abs(counts - expected) < 6 * np.sqrt(expected) + 12).all()


def test_later_tokens_are_sampled_given_the_earlier_ones():
    """p(a, b | prompt) = p(a | prompt) p(b | prompt, a): 49 pairs, 48 degrees of freedom."""
    model, n, prompt = tiny_model(), 20_000, [1, 2]
    answers = np.array(model.generate([prompt] * n, 2, 1.0, np.random.default_rng(0)))
    counts = np.bincount(VOCAB * answers[:, 0] + answers[:, 1], minlength=VOCAB ** 2)
    first = np.exp(log_softmax(logits_of(model, [prompt])[0, -1]))
    longer = [[*prompt, a] for a in range(VOCAB)]
    second = np.exp(log_softmax(logits_of(model, longer)[:, -1]))
    expected = (n * first[:, None] * second).ravel()
    assert ((counts - expected) ** 2 / expected).sum() < 130


@given(prompts, seeds)
def test_one_seed_gives_one_sample(prompts, seed):
    model = tiny_model()
    a, b = (model.generate(prompts, 5, 1.0, np.random.default_rng(seed)) for _ in range(2))
    assert a == b


def test_sampling_needs_a_generator():
    with pytest.raises(ValueError, match="rng"):
        tiny_model().generate([[1]], 1, temperature=1.0)


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_a_temperature_is_not_negative(temperature):
    with pytest.raises(ValueError, match=f"temperature {temperature} must be 0"):
        tiny_model().generate([[1]], 1, temperature, np.random.default_rng(0))


def test_generation_of_nothing():
    assert tiny_model().generate([], 3) == []
    assert tiny_model().generate([[1], [2, 3]], 0) == [[], []]
    with pytest.raises(ValueError, match="prompt"):
        tiny_model().generate([[1], []], 3)


def test_generation_records_nothing_and_changes_nothing():
    model, prompts = tiny_model(), [[1, 2], [3]]
    before = {name: data.copy() for name, data in weights(model).items()}
    model.generate(prompts, 3)
    assert prompts == [[1, 2], [3]]
    assert all(np.array_equal(before[name], data) for name, data in weights(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert model([[1]]).requires_grad  # no_grad has ended


# Checkpoints.

@given(configs, seeds)
def test_a_checkpoint_gives_back_every_bit(tmp_path_factory, config, seed):
    path = tmp_path_factory.mktemp("round") / "model.npz"
    model = Transformer(config, seed=seed)
    model.save(path)
    loaded = Transformer.load(path)
    assert same(model, loaded) and loaded.config == config
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_checkpoint_is_an_npz_of_the_parameters_and_a_json_config(tmp_path):
    model = tiny_model()
    model.save(tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {*model.named_parameters(), "config"}
        assert all(np.array_equal(archive[name], data) for name, data in weights(model).items())
        assert json.loads(archive["config"].item()) == dataclasses.asdict(model.config)


def test_saving_makes_the_directory_and_leaves_nothing_but_the_checkpoint(tmp_path):
    path = tmp_path / "new" / "model.npz"
    for seed in (0, 1):  # the second one replaces the first
        tiny_model(seed).save(path)
        assert same(Transformer.load(path), tiny_model(seed))
        assert os.listdir(path.parent) == ["model.npz"]


def test_a_save_that_fails_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    tiny_model(0).save(path)

    def half_written(file, **arrays):
        file.write(b"PK")
        raise OSError("disk full")
    monkeypatch.setattr(np, "savez", half_written)
    with pytest.raises(OSError, match="disk full"):
        tiny_model(1).save(path)
    assert same(Transformer.load(path), tiny_model(0))
    assert os.listdir(tmp_path) == ["model.npz"]


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        Transformer.load(tmp_path / "nothing.npz")
    with pytest.raises(FileNotFoundError):
        Transformer.load(tmp_path)  # a directory


@pytest.fixture(scope="module")
def checkpoint():
    """A model and the bytes of its checkpoint; NumPy reads arrays above 4 kB piece by piece."""
    model = Transformer(Config(vocab_size=5, d_model=24, n_layers=1, n_heads=2, d_hidden=4))
    file = io.BytesIO()
    np.savez(file, config=np.array(json.dumps(dataclasses.asdict(model.config))), **weights(model))
    return model, file.getvalue()


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a model from the bytes of a checkpoint."""
    path = tmp_path_factory.mktemp("bytes") / "model.npz"

    def load_bytes(content):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's on odd headers, Python's on duplicate names
            return Transformer.load(path)
    return load_bytes


def test_the_whole_checkpoint_loads(checkpoint, load):
    model, content = checkpoint
    assert same(load(content), model)


def test_a_truncated_checkpoint_is_refused(checkpoint, load):
    _, content = checkpoint
    for length in range(0, len(content), 64):
        with pytest.raises(ValueError, match="model.npz"):
            load(content[:length])


def refused_or_harmless(load, model, content):
    """No other exception, and never other weights than those that were saved."""
    try:
        return same(load(content), model)
    except ValueError as error:
        return "model.npz" in str(error)


@given(st.data())
def test_flipped_bits_are_refused_unless_they_do_not_matter(checkpoint, load, draw):
    model, content = checkpoint
    bits = draw.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=3))
    for bit in bits:
        content = flip(content, bit)
    assert refused_or_harmless(load, model, content)


def test_any_flipped_bit_in_the_header_of_an_array(checkpoint, load):
    """Headers are Python literals, which NumPy parses before the zip file's checksum is checked."""
    model, content = checkpoint
    start = content.index(b"{'descr'", content.index(b"blocks.0.qkv.npy"))
    end = content.index(b"}", start) + 1
    for bit in range(8 * start, 8 * end):
        assert refused_or_harmless(load, model, flip(content, bit))


@given(st.binary(max_size=200))
def test_any_other_file_is_refused(load, content):
    with pytest.raises(ValueError, match="model.npz"):
        load(content)


def test_files_of_other_kinds_are_refused(load):
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    np.savez(archive)
    for content in (array.getvalue(), archive.getvalue(), pickle.dumps({"config": 1}), b"{}"):
        with pytest.raises(ValueError, match="model.npz"):
            load(content)


class Trap:
    """What a pickle may do on loading: anything."""
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


@pytest.fixture
def load_changed(checkpoint, load):
    """Load a checkpoint with some arrays replaced, or left out for None."""
    model, _ = checkpoint
    config = dataclasses.asdict(model.config)

    def load_arrays(config=json.dumps(config), **changes):
        arrays = {"config": np.array(config), **weights(model), **changes}
        file = io.BytesIO()
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
        return load(file.getvalue())
    assert same(load_arrays(), model)
    return load_arrays


def test_pickles_are_not_opened(load_changed):
    trap = np.array([Trap()], dtype=object)
    for changes in ({"norm": trap}, {"extra": trap}):
        with pytest.raises(ValueError, match="model.npz"):
            load_changed(**changes)
    with pytest.raises(ValueError, match="model.npz"):
        load_changed(config=trap)
    assert not Trap.sprung


@pytest.mark.parametrize("array", [None, np.ones(23), np.ones((24, 1)), np.ones((1, 24)),
                                   np.float32(1), np.ones(24, int), np.ones(24, complex),
                                   np.array(["1"] * 24), np.full(24, np.nan), np.full(24, np.inf),
                                   np.r_[np.ones(23), -np.inf], np.full(24, 1e300)],
                         ids=["missing", "short", "column", "row", "0-d", "int", "complex", "text",
                              "NaN", "infinite", "one infinite", "infinite in float32"])
def test_an_array_that_is_not_the_models(load_changed, array):
    found = f"{array.dtype} {array.shape}" if array is not None else "holds"
    if array is not None and array.dtype.kind == "f" and array.shape == (24,):
        found = "norm holds NaN or infinity"
    with pytest.raises(ValueError, match=f"model.npz.*{re.escape(found)}"):
        load_changed(norm=array)


def test_an_array_of_another_name(load_changed):
    with pytest.raises(ValueError, match="norm should be float32 .24,., found nothing"):
        load_changed(norm=None, gain=np.ones(24, np.float32))


@pytest.mark.parametrize("name", ["extra", "blocks.1.qkv"])
def test_an_array_too_many(load_changed, name):
    """A model of two blocks whose config says one is not to be cut in half quietly."""
    with pytest.raises(ValueError, match="model.npz"):
        load_changed(**{name: np.ones((24, 72), np.float32)})


CHANGED_CONFIGS = {
    **{f"no {field}": {field: None} for field in GOOD},
    "another width": {"d_model": 48}, "another depth": {"n_layers": 2}, "no depth": {"n_layers": 0},
    "a negative width": {"d_model": -24}, "a fraction": {"d_model": 24.0},
    "text": {"d_model": "24"},
    "heads that do not divide": {"n_heads": 5}, "odd heads": {"n_heads": 8},
    "another vocabulary": {"vocab_size": 6}, "another hidden width": {"d_hidden": 8},
    "more than any memory": {"d_hidden": 10 ** 15},
}


@pytest.mark.parametrize("changes", CHANGED_CONFIGS.values(), ids=CHANGED_CONFIGS)
def test_a_config_that_is_not_the_models(checkpoint, load_changed, changes):
    fields = {**dataclasses.asdict(checkpoint[0].config), **changes}
    fields = {field: value for field, value in fields.items() if value is not None}
    with pytest.raises(ValueError, match="model.npz"):
        load_changed(config=json.dumps(fields))


@pytest.mark.parametrize("config", ["", "{", "null", "[]", "3", '"text"', "[" * 100_000,
                                    np.array([1.0]), np.array(["{}", "{}"]), np.array(b"\xff")],
                         ids=["empty", "cut", "null", "list", "number", "text", "deep", "array",
                              "two", "bytes"])
def test_a_config_that_is_no_config(load_changed, config):
    with pytest.raises(ValueError, match="model.npz"):
        load_changed(config=config)


def test_a_missing_config(checkpoint, load):
    file = io.BytesIO()
    np.savez(file, **weights(checkpoint[0]))
    with pytest.raises(ValueError, match="model.npz.*config"):
        load(file.getvalue())


def test_facts_beside_the_sizes_are_welcome(checkpoint, load_changed):
    model, _ = checkpoint
    facts = json.dumps({**dataclasses.asdict(model.config), "steps": 3, "note": "ü"})
    assert same(load_changed(config=facts), model)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_weights_of_another_float_type_become_float32(load_changed, dtype):
    norm = np.linspace(0, 1, 24).astype(dtype)
    loaded = load_changed(norm=norm).named_parameters()["norm"].data
    assert loaded.dtype == np.float32 and np.array_equal(loaded, norm.astype(np.float32))


def test_json_is_written_whole_and_readable(tmp_path):
    facts = {"loss": [1.5, 2.0], "note": "ü", "none": None}
    write_json(tmp_path / "runs" / "facts.json", facts)
    assert json.loads((tmp_path / "runs" / "facts.json").read_text(encoding="utf-8")) == facts
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["facts.json"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "runs" / "facts.json", {"a set": {1}})
    assert json.loads((tmp_path / "runs" / "facts.json").read_text(encoding="utf-8")) == facts
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["facts.json"]


def test_a_path_is_text_in_json(tmp_path):
    write_json(tmp_path / "facts.json", {"out": Path("runs/sft.npz")})
    assert json.loads((tmp_path / "facts.json").read_text()) == {"out": str(Path("runs/sft.npz"))}
