"""The SFT objective: which tokens count and how parts add up; the excess; training."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

import cli
import data
import sft
from helpers import (
    answer,
    leaf,
    log_softmax,
    model_of_the_task,
    normal,
    random_batch,
    read,
    seeds,
    text_of,
    weights,
)
from tinygrad_lite import Tensor, World, launch

VOCAB = len(data.VOCAB)
batch_sizes = st.integers(1, 12)

# The objective. A function that returns given logits, whatever it is asked, serves as a model.


def random_logits(seed, ids):
    """Logits for every position of ids (B, T) but the last: a leaf (V, B (T - 1))."""
    return leaf(normal(seed, VOCAB, ids[:, 1:].size))


def predictions(ids):
    """Which column of the logits predicts which completion token: for each line of ids (B, T), a
    list of (column, token)."""
    lines = []
    for i, line in enumerate(ids.tolist()):
        first_column = i * (len(line) - 1)
        completion = range(line.index(data.EQUALS) + 1, line.index(data.END) + 1)
        lines.append([(first_column + t - 1, line[t]) for t in completion])
    return lines


@given(batch_sizes, seeds)
def test_the_log_probability_of_a_completion_is_the_sum_over_its_tokens(n, seed):
    ids = random_batch(seed, n)
    logits = random_logits(seed, ids)
    logps = log_softmax(logits.data)
    expected = [sum(logps[token, column] for column, token in line) for line in predictions(ids)]
    np.testing.assert_allclose(sft.completion_logps(lambda _: logits, ids).data, expected)


@given(batch_sizes, seeds)
def test_the_loss_is_the_mean_over_all_completion_tokens(n, seed):
    ids = random_batch(seed, n)
    logits = random_logits(seed, ids)
    logps = log_softmax(logits.data)
    of_tokens = [logps[token, column] for line in predictions(ids) for column, token in line]
    assert sft.sft_loss(lambda _: logits, ids).item() == pytest.approx(-np.mean(of_tokens))


@given(batch_sizes, seeds)
def test_every_completion_token_pulls_its_own_logit_up_by_1_minus_p(n, seed):
    """So does the end token: otherwise a model would not learn to stop."""
    ids = random_batch(seed, n)
    logits = random_logits(seed, ids)
    sft.sft_loss(lambda _: logits, ids).backward()
    probabilities = np.exp(log_softmax(logits.data))
    all_predictions = sum(predictions(ids), [])
    for column, token in all_predictions:
        expected = (probabilities[token, column] - 1) / len(all_predictions)
        assert logits.grad[token, column] == pytest.approx(expected, abs=1e-12)


@given(batch_sizes, seeds)
def test_prompt_and_padding_get_exactly_no_gradient(n, seed):
    ids = random_batch(seed, n)
    logits = random_logits(seed, ids)
    sft.sft_loss(lambda _: logits, ids).backward()
    columns = [column for line in predictions(ids) for column, _ in line]
    others = np.delete(logits.grad, columns, axis=1)
    assert not others.any()


def test_the_model_reads_every_token_but_the_last():
    ids = random_batch(0, 3)
    seen = []

    def model(inputs):
        seen.append(inputs)
        return random_logits(0, ids)

    sft.completion_logps(model, ids)
    assert np.array_equal(seen, [ids[:, :-1]])


@given(batch_sizes, st.integers(1, 5), seeds)
def test_padding_changes_nothing(n, width, seed):
    model, ids = model_of_the_task(seed, np.float64), random_batch(seed, n)
    padded = np.pad(ids, ((0, 0), (0, width)), constant_values=data.PAD)
    loss = sft.sft_loss(model, ids)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    loss_of_padded = sft.sft_loss(model, padded)
    loss_of_padded.backward()
    assert loss_of_padded.item() == pytest.approx(loss.item())
    for parameter, grad in zip(model.parameters(), gradients):
        np.testing.assert_allclose(parameter.grad, grad, atol=1e-9)


@pytest.mark.parametrize("text", ["12", "12=", "+"])
def test_lines_without_a_completion_are_refused_and_told_why(text):
    """The mean of no tokens would be NaN, and a run would end with a loss that explains nothing."""
    ids = np.array([data.encode(text)])
    with pytest.raises(ValueError, match="no completion: no token after an equals sign"):
        sft.sft_loss(model_of_the_task(), ids)


# The excess.


def rule_model(targets):
    """The rule that makes the lines, as a model: the logits of a token are its log-probability
    after the tokens before it, taken over all lines of these targets."""
    mass = {}  # {prefix: probability that a line begins with it}
    for target, count in itertools.product(targets, data.COUNTS):
        cuts = list(itertools.combinations(range(1, target), count - 1))
        for places in cuts:
            terms = np.diff([0, *places, target]).tolist()
            line = tuple(answer(target, terms))
            for length in range(len(line) + 1):
                prefix = line[:length]
                mass[prefix] = mass.get(prefix, 0) + 1 / len(data.COUNTS) / len(cuts)

    def model(ids):
        columns = []
        for row in ids.tolist():
            for t in range(len(row)):
                prefix = tuple(row[: t + 1])
                joint = [mass.get((*prefix, token), 0) for token in range(VOCAB)]
                columns.append(np.maximum(joint, 1e-99) / mass.get(prefix, 1))
        return Tensor(np.log(columns).T)

    return model


def test_a_model_that_is_the_rule_has_no_excess():
    targets = [5, 7, 12]
    assert sft.excess_nats(rule_model(targets), targets, n=200) == pytest.approx(0, abs=1e-9)


def test_the_excess_of_a_guesser_is_its_divergence_from_the_rule():
    targets, n = [5, 7, 12], 300  # more lines than go through the model at once

    def guesser(ids):
        return Tensor(np.zeros((VOCAB, ids.size)))

    of_lines = []
    for target, terms in map(read, data.random_lines(n, data.random_stream(0, "excess"), targets)):
        n_tokens = len(text_of("", terms).removeprefix("=")) + 1
        n_ways = len(data.COUNTS) * math.comb(target - 1, len(terms) - 1)
        of_lines.append(n_tokens * math.log(VOCAB) - math.log(n_ways))
    assert sft.excess_nats(guesser, targets, n) == pytest.approx(np.mean(of_lines))


# Training.


def silent(step, loss):
    """A report that says nothing."""


def train(seed=0, steps=5, batch_size=200, lr=1e-2, report=silent):
    """A run in this process: the trained weights, and its losses. Its last batch makes 3 parts."""
    model = model_of_the_task(seed)
    losses = sft.train(World(), model, report, steps, batch_size, lr, seed)
    return weights(model), losses


def batches_and_losses(monkeypatch, steps, batch_size):
    """The lines of each step of a run, and its losses."""
    batches = []
    random_lines = data.random_lines

    def make_and_record(n, rng):
        batches.append(random_lines(n, rng))
        return batches[-1]

    with monkeypatch.context() as patch:
        patch.setattr(data, "random_lines", make_and_record)
        _, losses = train(steps=steps, batch_size=batch_size)
    return batches, losses


def test_the_first_loss_is_that_of_the_first_batch(monkeypatch):
    """Weighted by their tokens, the losses of the parts add up to the loss of the whole."""
    batches, losses = batches_and_losses(monkeypatch, steps=2, batch_size=600)
    n_lines = len(batches[0])
    assert n_lines > 2 * sft.LINES_AT_ONCE  # so there are several parts
    ids = data.random_lines(n_lines, data.random_stream(0, "SFT lines"))
    assert np.array_equal(batches[0], ids)
    expected = sft.sft_loss(model_of_the_task(0), ids).item()
    assert losses[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [16, 15, 50])
def test_batches_grow_in_a_straight_line_from_a_fraction_to_the_batch_size(monkeypatch, batch_size):
    batches, _ = batches_and_losses(monkeypatch, steps=60, batch_size=batch_size)
    sizes = [len(ids) for ids in batches]
    assert batch_size / 5 < sizes[0] < batch_size / 2 and sizes[-1] == batch_size
    assert np.abs(sizes - np.linspace(sizes[0], batch_size, 60)).max() < 1


def test_a_batch_has_at_least_one_line(monkeypatch):
    batches, _ = batches_and_losses(monkeypatch, steps=3, batch_size=1)
    assert [len(ids) for ids in batches] == [1, 1, 1]


def test_the_same_seed_gives_the_same_weights():
    first, second = train(), train()
    assert np.array_equal(first[0], second[0]) and first[1] == second[1]


def test_another_seed_gives_other_lines():
    model, other = model_of_the_task(0), model_of_the_task(0)
    losses = sft.train(World(), model, silent, 2, 40, 1e-2, seed=0)
    assert losses != sft.train(World(), other, silent, 2, 40, 1e-2, seed=1)


def test_every_weight_is_trained_in_place_and_stays_float32():
    trained, _ = train()
    assert (trained != weights(model_of_the_task(0))).all()
    assert trained.dtype == np.float32


def test_the_number_of_lines_at_once_changes_nothing(monkeypatch):
    trained, losses = train()
    monkeypatch.setattr(sft, "LINES_AT_ONCE", 1000)
    whole, losses_of_whole = train()
    np.testing.assert_allclose(trained, whole, atol=1e-3)
    np.testing.assert_allclose(losses, losses_of_whole, rtol=1e-4)


def train_and_compare(world, model, n_lines):
    """What every process runs: training, then a look at whether all have the same weights."""
    losses = sft.train(world, model, silent, 5, n_lines, 1e-2, 0)
    mine = weights(model)
    mean = world.all_reduce(mine) / world.world_size
    assert np.array_equal(mine, mean)  # exact: the sum of two equal numbers, halved
    return losses


@pytest.mark.parametrize("n_lines", [200, 1], ids=["many lines", "fewer lines than processes"])
def test_two_processes_train_as_one_does(n_lines):
    model = model_of_the_task(0)
    losses = launch(2, train_and_compare, model, n_lines)
    trained, losses_of_one = train(batch_size=n_lines)
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-4)
    np.testing.assert_allclose(weights(model), trained, atol=1e-3)


def test_the_report_hears_of_every_step_and_its_loss():
    heard = []
    _, losses = train(steps=4, report=lambda step, loss: heard.append((step, loss)))
    assert heard == list(zip([1, 2, 3, 4], losses))


@pytest.fixture
def schedule(monkeypatch):
    """Learning rate and weight of the slow mean in each of 20 steps, with a peak rate of 0.6."""
    seen = []
    step = sft.AdEMAMix.step

    def record_and_step(optimizer):
        seen.append((optimizer.lr, optimizer.alpha))
        step(optimizer)

    monkeypatch.setattr(sft.AdEMAMix, "step", record_and_step)
    train(steps=20, batch_size=2, lr=0.6)
    rates, alphas = zip(*seen)
    return rates, alphas


def test_the_learning_rate_rises_to_its_peak_and_falls_to_almost_nothing(schedule):
    rates, _ = schedule
    assert len(rates) == 20
    np.testing.assert_allclose(rates[:3], [0.2, 0.4, 0.6])
    assert (np.diff(rates[3:]) < 0).all() and rates[-1] < 0.01


def test_the_slow_mean_counts_more_from_step_to_step(schedule):
    _, alphas = schedule
    np.testing.assert_allclose(alphas, np.linspace(0, 16, 20, endpoint=False))


def test_a_line_of_progress_tells_the_step_and_the_loss(capsys):
    progress = cli.Progress("step", 2)
    sft.show(1, 2.5, progress)
    sft.show(2, 1.25, progress)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/2  loss 2.500  ")
    assert last == "step 2/2  loss 1.250  0 s left"
