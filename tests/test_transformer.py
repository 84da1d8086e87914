"""The model as a whole: gradients, sampling, and checkpoints good and bad."""

import dataclasses
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import data
import sft
from helpers import (
    hand_out_read_only_gradients,
    log_softmax,
    model_of_the_task,
    random_batch,
    seeds,
    tape,
    tiny_model,
)
from tinygrad_lite import Tensor, functional as F
from transformer import Config, Transformer

VOCAB_SIZE = 7  # of the tiny model
SIZES = {"vocab_size": 7, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_hidden": 6}
sizes = st.integers(1, 5)


def same(a, b):
    """Whether two models are equal to the bit, dtypes and order of parameters included."""
    a_parameters, b_parameters = a.named_parameters(), b.named_parameters()
    if a.config != b.config or list(a_parameters) != list(b_parameters):
        return False
    for p, q in zip(a_parameters.values(), b_parameters.values()):
        if p.dtype != q.dtype or not np.array_equal(p.data, q.data):
            return False
    return True


# The forward and the backward pass.


@given(seed=seeds)
@settings(max_examples=5)
def test_the_gradient_of_every_parameter(seed):
    """Finite differences in float64 at three elements of each parameter of a two-layer model."""
    model = tiny_model(seed, np.float64)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB_SIZE, (2, 5))

    def loss():
        return -F.token_log_probs(model(ids[:, :-1]), ids[:, 1:].ravel()).mean()

    loss().backward()
    step = 1e-5
    for name, p in model.named_parameters().items():
        for _ in range(3):
            at = tuple(rng.integers(0, p.shape))
            x = p.data[at]
            p.data[at] = x + step
            loss_above = loss().item()
            p.data[at] = x - step
            loss_below = loss().item()
            p.data[at] = x
            measured = (loss_above - loss_below) / (2 * step)
            assert abs(p.grad[at] - measured) < 1e-7, (name, at)


def test_no_op_of_the_model_writes_into_the_gradient_it_is_given():
    loss = sft.sft_loss(model_of_the_task(), random_batch(0, 3))
    hand_out_read_only_gradients(loss)
    loss.backward()


def test_a_training_step_is_float32_throughout():
    """Every node of the tape, what each keeps for its backward pass, and every gradient."""
    model = model_of_the_task()
    loss = sft.sft_loss(model, random_batch(0, 3))
    dtypes = []
    for node in tape(loss):
        dtypes.append(node.dtype)
        if node.backward_fn is not None:
            for cell in node.backward_fn.__closure__:
                kept = cell.cell_contents
                if isinstance(kept, np.ndarray) and kept.dtype.kind == "f":
                    dtypes.append(kept.dtype)
    loss.backward()
    dtypes += [p.grad.dtype for p in model.parameters()]
    assert len(dtypes) > 60
    assert set(dtypes) == {np.dtype(np.float32)}


@given(batch=sizes, length=sizes, n_layers=st.integers(1, 3), seed=seeds)
def test_the_model_is_its_formula(batch, length, n_layers, seed):
    """x += attention(norm(x)); x += mlp(norm(x)), on plain arrays, with scales that are not 1."""
    model = tiny_model(seed, np.float64, n_layers=n_layers)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB_SIZE, (batch, length))
    p = {name: parameter.data for name, parameter in model.named_parameters().items()}
    for array in p.values():
        if array.ndim == 1:
            array += 0.5 * rng.random(array.shape)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=0) + 1e-6) * scale[:, None]

    def attention(qkv):
        return F.causal_attention(Tensor(qkv), n_heads=2, batch=batch, rope_base=10000.0).data

    x = p["embedding"][:, ids.ravel()]
    for i in range(n_layers):
        block = f"blocks.{i}."
        qkv = p[block + "qkv"] @ norm(x, p[block + "attention_norm"])
        x = x + p[block + "attention_out"] @ attention(qkv)
        gate, up = np.split(p[block + "gate_up"] @ norm(x, p[block + "mlp_norm"]), 2)
        x = x + p[block + "down"] @ (gate / (1 + np.exp(-gate)) * up)
    logits = p["head"] @ norm(x, p["norm"])

    assert model(ids).shape == (VOCAB_SIZE, batch * length)
    assert np.allclose(model(ids).data, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "ids",
    [
        [0, 1],
        3,
        [[[0]]],
        [[0.0, 1.0]],
        [[True]],
        [["0"]],
        [],
        np.zeros((1, 0), int),
        np.zeros((0, 3), int),
        [[VOCAB_SIZE]],
        [[-1]],
        [[0, 1, 10**12]],
    ],
    ids=repr,
)
def test_ids_are_a_batch_of_tokens(ids):
    """A negative id would quietly take a column from the end of the embedding."""
    with pytest.raises(ValueError, match="ids must be integers .* in 0 ... 6"):
        tiny_model()(ids)


# Parameters.


def test_parameters_are_in_order_and_start_as_they_should():
    """Variance 1 / inputs, smaller where 2 n_layers results add up in the residual stream."""
    vocab_size, d, f, n_layers = 50, 32, 64, 4
    expected = {"embedding": ((d, vocab_size), 1.0)}  # shape and standard deviation
    for i in range(n_layers):
        expected[f"blocks.{i}.attention_norm"] = (d,), None  # all ones
        expected[f"blocks.{i}.qkv"] = (3 * d, d), d**-0.5
        expected[f"blocks.{i}.attention_out"] = (d, d), (2 * n_layers * d) ** -0.5
        expected[f"blocks.{i}.mlp_norm"] = (d,), None
        expected[f"blocks.{i}.gate_up"] = (2 * f, d), d**-0.5
        expected[f"blocks.{i}.down"] = (d, f), (2 * n_layers * f) ** -0.5
    expected["norm"] = (d,), None
    expected["head"] = (vocab_size, d), d**-0.5

    model = Transformer(Config(vocab_size, d, n_layers, n_heads=4, d_hidden=f))
    named = model.named_parameters()
    assert list(named) == list(expected)
    for name, (shape, std) in expected.items():
        p = named[name]
        assert p.requires_grad
        assert p.dtype == np.float32
        assert p.shape == shape
        if std is None:
            assert (p.data == 1).all()
        else:
            assert abs(p.data.mean()) < 0.1 * std
            assert p.data.std() == pytest.approx(std, rel=0.15)


def test_parameters_lists_the_named_parameters():
    model = tiny_model()
    for p, named in zip(model.parameters(), model.named_parameters().values(), strict=True):
        assert p is named


def test_weights_come_from_the_seed():
    config = Config(**SIZES)
    assert same(Transformer(config), Transformer(config, seed=0))
    first, second = Transformer(config, seed=0), Transformer(config, seed=1)
    for p, q in zip(first.parameters(), second.parameters()):
        if p.ndim == 2:
            assert not np.array_equal(p.data, q.data)


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, "8", None, float("nan")], ids=repr)
def test_a_size_is_a_whole_number(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be a whole number of at least 1"):
        Config(**{**SIZES, field: value})


@pytest.mark.parametrize("d_model, n_heads", [(8, 3), (4, 4), (6, 2), (9, 1)])
def test_every_head_has_an_even_number_of_features(d_model, n_heads):
    with pytest.raises(
        ValueError, match=f"d_model must be a multiple of 2 n_heads = {2 * n_heads}"
    ):
        Config(**{**SIZES, "d_model": d_model, "n_heads": n_heads})


@pytest.mark.parametrize("d_model, n_heads", [(2, 1), (8, 4), (12, 3)])
def test_sizes_that_fit_together(d_model, n_heads):
    config = Config(**{**SIZES, "d_model": d_model, "n_heads": n_heads})
    assert Transformer(config)([[0, 1]]).shape == (VOCAB_SIZE, 2)


def test_a_config_is_a_constant():
    config = Config(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 16


# Generation. In float64, rounding cannot decide between two tokens that are nearly equally likely.


def greedy_without_cache(model, prompt, count, end):
    """The likeliest token each time, from a whole forward pass over all tokens so far."""
    answer = []
    while len(answer) < count:
        logits = model([prompt + answer]).data  # (V, T)
        token = int(logits[:, -1].argmax())
        answer.append(token)
        if token == end:
            break
    return answer


token_ids = st.integers(0, len(data.VOCAB) - 1)
several_prompts = st.lists(st.lists(token_ids, min_size=1, max_size=6), min_size=1, max_size=5)
generations = {
    "prompts": several_prompts,
    "count": st.integers(1, 8),
    "end": st.none() | token_ids,
    "seed": seeds,
}


@given(**generations)
def test_greedy_generation_is_decoding_without_the_cache(prompts, count, end, seed):
    """So no answer depends on its batch either."""
    model = model_of_the_task(seed, np.float64)
    expected = [greedy_without_cache(model, prompt, count, end) for prompt in prompts]
    assert model.generate(prompts, count, end=end) == expected
    assert model.generate(prompts[::-1], count, end=end) == expected[::-1]


@given(**generations)
def test_sampled_answers_end_at_the_end_token_or_are_full(prompts, count, end, seed):
    model = model_of_the_task(seed, np.float64)
    answers = model.generate(prompts, count, 1.0, np.random.default_rng(seed), end)
    assert len(answers) == len(prompts)
    for answer in answers:
        assert end not in answer[:-1]
        assert len(answer) == count or answer[-1] == end
        assert 1 <= len(answer) <= count
        assert all(type(token) is int and 0 <= token < len(data.VOCAB) for token in answer)


@given(**generations)
def test_the_same_random_numbers_give_the_same_answers(prompts, count, end, seed):
    model = model_of_the_task(seed, np.float64)
    answers = model.generate(prompts, count, 1.0, np.random.default_rng(seed), end)
    again = model.generate(prompts, count, 1.0, np.random.default_rng(seed), end)
    assert answers == again


def test_generation_changes_nothing():
    model, prompts = model_of_the_task(), [[1, 2], [3]]
    model.generate(prompts, 4, 1.0, np.random.default_rng(0))
    assert prompts == [[1, 2], [3]]
    assert same(model, model_of_the_task())
    assert model([[1]]).requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_sampled_as_often_as_the_softmax_says(temperature):
    """Pairs of tokens a, b, where p(a, b | prompt) = p(a | prompt) p(b | prompt, a).

    There are 49 pairs, so the chi-square statistic has 48 degrees of freedom: below 130 for all
    but one in 10^9 seeds.
    """
    model, n, prompt = tiny_model(), 20_000, [1, 2]
    answers = np.array(model.generate([prompt] * n, 2, temperature, np.random.default_rng(0)))
    counts = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(counts, (answers[:, 0], answers[:, 1]), 1)

    expected = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    for a in range(VOCAB_SIZE):
        log_probs = log_softmax(model([[*prompt, a]]).data / temperature)  # (V, 3)
        expected[a] = n * np.exp(log_probs[a, 1] + log_probs[:, 2])
    assert ((counts - expected) ** 2 / expected).sum() < 130


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 1e-300])
def test_a_temperature_close_to_zero_is_greedy(temperature):
    """In float32, a logit over 1e-40 is infinite and 1e-300 is 0; neither may turn into NaN."""
    model, prompts = model_of_the_task(), [[1, 2], [3], [6, 5, 4]]
    sampled = model.generate(prompts, 4, temperature, np.random.default_rng(0))
    assert sampled == model.generate(prompts, 4)


def test_generation_with_a_vocabulary_that_has_no_pad_token():
    model, prompts = tiny_model(dtype=np.float64), [[1, 2], [3], [6, 5, 4]]
    expected = [greedy_without_cache(model, prompt, 4, end=None) for prompt in prompts]
    assert model.generate(prompts, 4, end=None) == expected


def test_no_prompts_or_no_new_tokens():
    model = tiny_model()
    assert model.generate([], 3) == []
    assert model.generate([[1], [2, 3]], 0) == [[], []]


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        tiny_model().generate([[1], []], 3)


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_a_temperature_is_at_least_zero(temperature):
    with pytest.raises(ValueError, match=f"temperature must be .* it is {temperature}"):
        tiny_model().generate([[1]], 1, temperature, np.random.default_rng(0))


def test_sampling_needs_random_numbers():
    with pytest.raises(ValueError, match="temperature must be 0, or above 0 with an rng"):
        tiny_model().generate([[1]], 1, 1.0)


# Checkpoints.


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    path = tmp_path / "new folder" / "model.npz"
    model = Transformer(Config(**SIZES), seed=3)
    model.save(path)
    loaded = Transformer.load(path)
    assert same(loaded, model)
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_checkpoint_is_an_npz_file_with_the_config_as_json(tmp_path):
    path = tmp_path / "model.npz"
    model = Transformer(Config(**SIZES))
    model.save(path)
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["config", *model.named_parameters()]
        assert json.loads(archive["config"].item()) == SIZES
        assert np.array_equal(
            archive["blocks.0.qkv"], model.named_parameters()["blocks.0.qkv"].data
        )


def test_saving_replaces_an_older_checkpoint(tmp_path):
    path = tmp_path / "model.npz"
    Transformer(Config(**SIZES), seed=0).save(path)
    newer = Transformer(Config(**SIZES), seed=1)
    newer.save(path)
    assert same(Transformer.load(path), newer)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, number):
    """The older checkpoint stays."""
    path = tmp_path / "model.npz"
    model = Transformer(Config(**SIZES))
    model.save(path)
    broken = Transformer(Config(**SIZES))
    broken.parameters()[1].data[0] = number
    with pytest.raises(ValueError, match="model.npz was not written: infinite or NaN weights"):
        broken.save(path)
    assert same(Transformer.load(path), model)


@pytest.mark.parametrize("name", [".", "nothing.npz"])
def test_what_cannot_be_opened_is_an_os_error(tmp_path, name):
    with pytest.raises(OSError):
        Transformer.load(tmp_path / name)


MODEL = Transformer(Config(**SIZES))
WEIGHTS = {name: p.data for name, p in MODEL.named_parameters().items()}
NORM = np.ones(8, np.float32)  # a parameter, as it should be


class Trap:
    """What a pickle may do when it is loaded: anything."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def checkpoint(config=json.dumps(SIZES), **changes):
    """The bytes of MODEL's checkpoint, with arrays changed or added, or left out where None."""
    arrays = {"config": config, **WEIGHTS, **changes}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def checkpoint_with_text(text):
    """A checkpoint whose array `norm` is not an array, but some text."""
    file = io.BytesIO(checkpoint(norm=None))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("norm.npy", text)
    return file.getvalue()


def load_bytes(tmp_path, content):
    path = tmp_path / "model.npz"
    path.write_bytes(content)
    return Transformer.load(path)


def test_the_checkpoint_that_the_next_tests_damage_is_a_good_one(tmp_path):
    assert same(load_bytes(tmp_path, checkpoint()), MODEL)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_weights_of_other_float_types_become_float32(tmp_path, dtype):
    content = checkpoint(norm=NORM.astype(dtype))
    assert same(load_bytes(tmp_path, content), MODEL)


BAD_CHECKPOINTS = {
    # Files that are something else.
    "empty": b"",
    "text": b"{}",
    "the start of a zip file": b"PK\x03\x04",
    "a pickle": pickle.dumps(Trap()),
    "cut in half": checkpoint()[: len(checkpoint()) // 2],
    # One of the arrays.
    "array missing": checkpoint(norm=None),
    "array too many": checkpoint(extra=NORM),
    "array of another name": checkpoint(norm=None, gain=NORM),
    "array that is text": checkpoint_with_text(b"something else"),
    "array of pickled objects": checkpoint(norm=np.array([Trap()] * 8)),
    "shorter": checkpoint(norm=NORM[1:]),
    "two axes": checkpoint(norm=NORM[:, None]),
    "no axes": checkpoint(norm=np.float32(1)),
    "transposed": checkpoint(**{"blocks.0.qkv": WEIGHTS["blocks.0.qkv"].T}),
    "integers": checkpoint(norm=NORM.astype(int)),
    "complex numbers": checkpoint(norm=NORM.astype(complex)),
    "strings": checkpoint(norm=np.array(["1"] * 8)),
    "NaN": checkpoint(norm=NORM * np.nan),
    "infinite": checkpoint(norm=NORM * -np.inf),
    # Its config.
    "no config": checkpoint(config=None),
    "config that is an array": checkpoint(config=NORM),
    "config that is a pickle": checkpoint(config=np.array(Trap())),
    "config that is empty": checkpoint(config=""),
    "config that is no JSON": checkpoint(config="{"),
    "config that is null": checkpoint(config="null"),
    "config that is a list": checkpoint(config="[]"),
    "config without d_model": checkpoint(config=json.dumps({"vocab_size": 7})),
    "config with another field": checkpoint(config=json.dumps({**SIZES, "d_head": 4})),
    "config of more layers": checkpoint(config=json.dumps({**SIZES, "n_layers": 2})),
    "config of no layers": checkpoint(config=json.dumps({**SIZES, "n_layers": 0})),
    "config of another width": checkpoint(config=json.dumps({**SIZES, "d_model": 16})),
    "config of other tokens": checkpoint(config=json.dumps({**SIZES, "vocab_size": 8})),
    "config of heads that do not fit": checkpoint(config=json.dumps({**SIZES, "n_heads": 3})),
    "config with text": checkpoint(config=json.dumps({**SIZES, "d_model": "8"})),
}


@pytest.mark.parametrize("content", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_in_one_line(tmp_path, content):
    """And nothing that is pickled in it is run."""
    with pytest.raises(ValueError, match="model.npz is not a checkpoint of this project"):
        load_bytes(tmp_path, content)
    assert not Trap.sprung


@given(seed=seeds)
def test_a_damaged_checkpoint_is_refused_or_gives_the_same_weights(tmp_path_factory, seed):
    """One bit is flipped somewhere. Not every bit of a zip file matters."""
    rng = np.random.default_rng(seed)
    content = bytearray(checkpoint())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    try:
        loaded = load_bytes(tmp_path_factory.mktemp("damaged"), content)
    except ValueError:
        return
    assert same(loaded, MODEL)
