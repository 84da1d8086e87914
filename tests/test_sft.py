"""The SFT objective: which tokens count, how shards add up, how far from the rule; training."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

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
    weights,
)
from tinygrad_lite import Tensor, World, launch

VOCAB = len(data.VOCAB)
batch_sizes = st.integers(1, 12)


def predicting(ids):
    """The columns of the logits that predict a completion token, line by line, and the tokens."""
    columns, targets = [], []
    for i, line in enumerate(ids.tolist()):
        at = range(line.index(data.EQUALS) + 1, line.index(data.END) + 1)
        columns.append([i * (len(line) - 1) + t - 1 for t in at])
        targets.append([line[t] for t in at])
    return columns, targets


@given(batch_sizes, seeds)
def test_loss_and_gradient_are_the_plain_formula(n, seed):
    """Of each completion token's log p(token | tokens before it), the end token's too: it pulls its
    own logit up by (1 - p) / tokens. Prompts and padding get a gradient of exactly zero."""
    ids, seen = random_batch(seed, n), []
    logits = leaf(normal(seed, VOCAB, ids[:, 1:].size))  # a function that returns them is a model
    model = lambda prefix: seen.append(prefix) or logits  # noqa: E731
    columns, targets = predicting(ids)
    logps = [log_softmax(logits.data)[rows] for rows in zip(targets, columns)]
    assert np.allclose(sft.completion_logps(model, ids).data, [row.sum() for row in logps])
    loss, logps = sft.sft_loss(model, ids), np.concatenate(logps)
    assert np.isclose(loss.item(), -logps.mean())
    loss.backward()
    columns, targets = sum(columns, []), sum(targets, [])
    assert not np.delete(logits.grad, columns, axis=1).any()
    assert np.allclose(logits.grad[targets, columns], (np.exp(logps) - 1) / len(columns))
    assert all(np.array_equal(prefix, ids[:, :-1]) for prefix in seen)


@given(batch_sizes, st.integers(1, 5), seeds)
def test_shards_add_up_to_the_loss_and_gradient_of_the_batch_however_padded(n, size, seed):
    """Each shard is weighted by its completion tokens, not by its lines."""
    model, ids = model_of_the_task(seed, np.float64), random_batch(seed, n)
    loss = sft.sft_loss(model, np.pad(ids, ((0, 0), (0, size)), constant_values=data.PAD))
    loss.backward()
    left = loss.item()
    for shard in data.by_length(ids, size):
        loss = -sft.sft_loss(model, shard, data.completion_mask(ids).sum())
        loss.backward()  # takes away what the whole batch has added
        left += loss.item()
    assert abs(left) < 1e-9 and all(np.abs(p.grad).max() < 1e-9 for p in model.parameters())


def rule_model(targets):
    """The rule itself as a model: the log-probability of each next token, over all its lines."""
    mass = {}
    for target, count in itertools.product(targets, data.COUNTS):
        for cuts in itertools.combinations(range(1, target), count - 1):
            line = answer(target, np.diff([0, *cuts, target]).tolist())
            for prefix in itertools.accumulate([()] + [(token,) for token in line]):
                mass[prefix] = mass.get(prefix, 0) + 1 / 4 / math.comb(target - 1, count - 1)

    def model(ids):
        before = [tuple(row[: t + 1]) for row in ids.tolist() for t in range(len(row))]
        return Tensor(
            np.log(
                [
                    [
                        max(mass.get((*prefix, token), 0) / mass.get(prefix, 1), 1e-99)
                        for prefix in before
                    ]
                    for token in range(VOCAB)
                ]
            )
        )

    return model


def test_a_model_that_is_the_rule_has_no_excess_and_a_guesser_has_its_divergence():
    targets, rng = [5, 7, 12], np.random.default_rng
    assert abs(sft.excess_nats(rule_model(targets), targets, rng(0), 200)) < 1e-9
    lines = [read(row) for row in data.random_lines(70, rng(1), targets)]
    expected = np.mean(
        [
            len(answer("", terms)[1:]) * math.log(VOCAB)
            - math.log(4 * math.comb(n - 1, len(terms) - 1))
            for n, terms in lines
        ]
    )
    guesser = lambda ids: leaf(np.zeros((VOCAB, ids.size)))  # noqa: E731
    assert sft.excess_nats(guesser, targets, rng(1), 70) == pytest.approx(expected)


def train(world=World(), seed=0, steps=5):  # batches of 200 lines make several shards
    model, batches = model_of_the_task(seed), (random_batch(seed + i, 200) for i in range(steps))
    losses = list(sft.train(model, batches, steps, 1e-2, world))
    mine = np.arange(world.world_size)[:, None] == world.rank
    return world.all_reduce(np.where(mine, weights(model), 0)), losses


def test_one_seed_gives_the_same_weights_another_others_and_two_processes_like_ones():
    (trained, losses), (again, same), (others, _) = train(), train(), train(seed=1)
    assert np.array_equal(trained, again) and losses == same and trained.dtype == np.float32
    model = model_of_the_task()
    assert (trained != others).mean() > 0.9 and (trained != weights(model)).all()
    assert np.isclose(losses[0], sft.sft_loss(model, random_batch(0, 200)).item())
    rows, same = launch(2, train)
    assert np.array_equal(rows[0], rows[1])
    assert np.allclose(rows[0], trained, atol=1e-3) and np.allclose(losses, same, rtol=1e-4)


def test_the_rate_rises_and_falls_to_nothing_while_the_slow_mean_counts_ever_more(monkeypatch):
    seen, step = [], sft.Adam.step
    monkeypatch.setattr(
        sft.Adam, "step", lambda self: (seen.append((self.lr, self.alpha)), step(self))
    )
    losses = list(sft.train(model_of_the_task(), [random_batch(0, 2)] * 30, 20, 0.6))
    rates, alphas = np.transpose(seen)
    assert np.allclose(rates[:3], [0.2, 0.4, 0.6]) and len(rates) == len(losses) == 20
    assert rates[-1] < 0.01 and (np.diff(rates[3:]) < 0).all()
    assert np.allclose(alphas, np.linspace(0, 16, 20, endpoint=False))
