"""SFT and DPO at small scale: within seconds a tiny model learns the task and a preference."""

import copy

import numpy as np
import pytest

import data
import dpo
import eval as evaluation
import sft
from helpers import weights
from tinygrad_lite import World
from transformer import Config, Transformer

PREFER = 2  # terms


def no_report(*arguments):
    """A report that does nothing, for SFT and for DPO."""


@pytest.fixture(scope="module")
def trained():
    """A model after SFT, the losses of that, the policy after DPO, and the history of that."""
    config = Config(len(data.VOCAB), d_model=32, n_layers=2, n_heads=2, d_hidden=64)
    model = Transformer(config)
    losses = sft.train(World(), model, no_report, steps=300, batch_size=128, lr=1e-2, seed=0)

    policy = copy.deepcopy(model)
    make_pairs = dpo.pairs_maker("online", dpo.round_starts(50, 48), answers=8, prefer=PREFER)
    history = dpo.train(
        World(), policy, model, make_pairs, no_report, rounds=50, beta=0.8, lr=1e-3, seed=0
    )
    return model, losses, policy, history


def test_sft_learns_more_than_which_token_follows_which(trained):
    _, losses, _, _ = trained
    # Whoever knows only how often each token follows each other one pays 1.77 nats a token.
    assert losses[0] > 1.77
    assert np.mean(losses[-20:]) < 1.6


def test_dpo_learns_to_order_pairs_that_it_has_not_seen(trained):
    model, _, policy, _ = trained
    rng = np.random.default_rng(1)
    pairs = dpo.rule_pairs(None, 0, World(), rng, starts=[0, 100], prefer=PREFER)
    logps = [*dpo.pair_logps(policy, pairs), *dpo.pair_logps(model, pairs)]
    found = dpo.pair_metrics(*logps, beta=0.8)
    assert found["loss"] < 0.6
    assert found["rewards/margins"] > 0.5
    assert found["rewards/accuracies"] > 0.7


def test_most_rounds_find_pairs(trained):
    history = trained[3]
    assert sum(row["pairs"] > 0 for row in history) > 20


def test_dpo_teaches_the_preference_and_keeps_the_format(trained):
    model, _, policy, _ = trained
    before, after = (
        evaluation.metrics(
            evaluation.sample(each, data.HELD_OUT * 20, 1.0, np.random.default_rng(2)), PREFER
        )
        for each in (model, policy)
    )
    assert after["preferred"] > before["preferred"] + 0.25
    assert after["format"] > 0.9


def test_a_trained_model_is_the_same_after_saving_and_loading(trained, tmp_path):
    policy = trained[2]
    policy.save(tmp_path / "dpo.npz")
    loaded = evaluation.load(tmp_path / "dpo.npz")
    assert np.array_equal(weights(loaded), weights(policy))
