"""The SFT objective: which tokens count, how shards add up; and that the seed makes the run."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

import data
import sft
from helpers import leaf, log_softmax, normal, seeds, tiny_model
from tinygrad_lite import Adam

VOCAB = len(data.VOCAB)
batch_sizes = st.integers(1, 12)


def random_batch(seed, n):
    return data.random_lines(n, np.random.default_rng(seed))


def model_of_the_task(seed, dtype=np.float32):
    return tiny_model(seed, dtype, vocab_size=VOCAB, n_layers=1)


def logits_for(seed, ids):
    """Logits, a leaf, for all tokens of ids but the last."""
    return leaf(normal(seed, len(ids), ids.shape[1] - 1, VOCAB))


def completion_log_probs(logits, ids):
    """log p(token | prefix) of every completion token, line by line: the definition, as a loop."""
    lines = []
    for row, line in zip(log_softmax(logits), ids.tolist()):
        start, end = line.index(data.EQUALS) + 1, line.index(data.END)
        lines.append([row[t - 1, line[t]] for t in range(start, end + 1)])
    return lines


# The objective. A function that ignores ids and returns fixed logits is a model, too.

@given(batch_sizes, seeds)
def test_the_loss_is_minus_the_mean_over_completion_tokens(n, seed):
    ids = random_batch(seed, n)
    logits = logits_for(seed, ids)
    expected = -np.mean(np.concatenate(completion_log_probs(logits.data, ids)))
    assert np.isclose(sft.sft_loss(lambda ids: logits, ids).item(), expected, rtol=1e-12)


@given(batch_sizes, seeds)
def test_the_log_probability_of_a_completion_is_the_sum_over_its_tokens(n, seed):
    ids = random_batch(seed, n)
    logits = logits_for(seed, ids)
    expected = [sum(line) for line in completion_log_probs(logits.data, ids)]
    assert np.allclose(sft.completion_logps(lambda ids: logits, ids).data, expected, rtol=1e-12)


@given(batch_sizes, seeds)
def test_the_model_sees_the_tokens_before_each_one(n, seed):
    ids, seen = random_batch(seed, n), []

    def model(prefix):
        seen.append(prefix)
        return logits_for(seed, ids)
    sft.sft_loss(model, ids)
    assert len(seen) == 1 and np.array_equal(seen[0], ids[:, :-1])


@given(batch_sizes, seeds)
def test_prompts_and_padding_get_a_gradient_of_exactly_zero(n, seed):
    """With respect to the logits; a completion token pulls its own logit up by (1 - p) / tokens."""
    ids = random_batch(seed, n)
    logits = logits_for(seed, ids)
    sft.sft_loss(lambda ids: logits, ids).backward()
    counts = np.zeros(logits.shape[:2], bool)
    for row, line in zip(counts, ids.tolist()):
        row[line.index(data.EQUALS):line.index(data.END)] = True  # logits t predict token t + 1
    assert not logits.grad[~counts].any()
    targets = ids[:, 1:][counts]
    pulls = logits.grad[counts][np.arange(len(targets)), targets]
    probs = np.exp(log_softmax(logits.data))[counts][np.arange(len(targets)), targets]
    assert np.allclose(pulls, -(1 - probs) / counts.sum(), rtol=1e-9)


@given(batch_sizes, st.integers(1, 5), seeds)
def test_more_padding_changes_nothing(n, extra, seed):
    model, ids = model_of_the_task(seed, np.float64), random_batch(seed, n)
    longer = np.pad(ids, ((0, 0), (0, extra)), constant_values=data.PAD)
    a, b = (sft.sft_loss(model, batch).item() for batch in (ids, longer))
    assert np.isclose(a, b, rtol=1e-10)


@given(batch_sizes, st.integers(1, 5), seeds)
def test_the_losses_and_gradients_of_shards_add_up_to_the_batchs(n, size, seed):
    """Each shard is weighted by its completion tokens, not by its lines."""
    model, ids = model_of_the_task(seed, np.float64), random_batch(seed, n)
    n_tokens = int(data.completion_mask(ids).sum())
    shards = [sft.sft_loss(model, shard, n_tokens) for shard, in data.by_length(ids, size=size)]
    whole = sft.sft_loss(model, ids)
    assert np.isclose(sum(loss.item() for loss in shards), whole.item(), rtol=1e-10)
    for loss in shards:
        loss.backward()
    summed = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    whole.backward()
    for p, grad in zip(model.parameters(), summed):
        assert np.allclose(p.grad, grad, rtol=1e-8, atol=1e-10)


def test_uniform_predictions_cost_the_log_of_the_vocabulary():
    ids = random_batch(0, 5)
    logits = leaf(np.zeros((5, ids.shape[1] - 1, VOCAB)))
    assert np.isclose(sft.sft_loss(lambda ids: logits, ids).item(), np.log(VOCAB), rtol=1e-12)


# Training.

def trained(seed, map_fn=map, steps=5):
    """The weights and what was reported after a few steps; 200 lines make several shards."""
    model = model_of_the_task(seed)
    report = list(sft.train(model, steps, 200, 1e-2, np.random.default_rng(seed), map_fn))
    return [p.data for p in model.parameters()], report


def test_one_seed_gives_the_same_weights_to_the_bit_for_any_number_of_processes(map_fn):
    weights, report = trained(0)
    others, other_report = trained(0, map_fn)
    assert report == other_report
    for a, b in zip(weights, others):
        assert a.dtype == b.dtype == np.float32 and np.array_equal(a, b)


def test_another_seed_gives_other_weights():
    assert not any(np.array_equal(a, b) for a, b in zip(trained(0)[0], trained(1)[0]))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_training_reports_every_step(steps):
    _, report = trained(0, steps=steps)
    assert [step for step, *_ in report] == list(range(1, steps + 1))
    assert all(np.isfinite(loss) and loss > 0 for _, loss, *_ in report)


def test_the_first_loss_reported_is_that_of_the_first_batch():
    """Of the whole batch: means of its shards must be weighted before they are added."""
    _, ((_, loss, *_),) = trained(0, steps=1)
    assert np.isclose(loss, sft.sft_loss(model_of_the_task(0), random_batch(0, 200)).item())


def test_training_moves_every_parameter():
    before = [p.data for p in model_of_the_task(0).parameters()]
    for a, b in zip(before, trained(0, steps=1)[0]):
        assert not np.array_equal(a, b)


def test_the_loss_falls_in_training():
    """From the log of the vocabulary, 2.6, towards what lines of random terms cost at least."""
    losses = [loss for _, loss, *_ in trained(0, steps=60)[1]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_a_batch_can_be_learned_by_heart():
    """Eight lines of eight targets leave nothing to chance: their loss can go to 0."""
    lines = [f"{target}={target - 3}+3" for target in range(10, 90, 10)]
    ids = data.pad([[*data.encode(line), data.END] for line in lines])
    model = tiny_model(0, vocab_size=VOCAB)
    optimizer = Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = sft.sft_loss(model, ids)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 < losses[0]
    answers = model.generate([data.encode(line[:3]) for line in lines], 10, end=data.END)
    assert [data.decode(answer) for answer in answers] == [line[3:] for line in lines]
