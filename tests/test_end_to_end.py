"""SFT and DPO at small scale: within seconds a tiny model learns the task and a preference."""

import numpy as np

import data
import dpo
import eval as evaluation
import sft
from helpers import weights
from transformer import Config, Transformer


def test_sft_learns_the_task_and_dpo_to_prefer_two_terms(tmp_path):
    model = Transformer(Config(len(data.VOCAB), 32, 2, 2, 64, data.MAX_LEN))
    rng = np.random.default_rng(0)
    batches = (data.random_lines(64, rng) for _ in range(300))
    losses = list(sft.train(model, batches, 300, 1e-2))
    # Who knows no more than how often each token follows each other one pays 1.77 nats a token.
    assert np.mean(losses[-20:]) < 1.6 < 1.77 < losses[0]
    model.save(tmp_path / "sft.npz")
    policy, reference = (Transformer.load(tmp_path / "sft.npz") for _ in range(2))
    rounds = dpo.sampled_rounds(policy, 32, 8, 2, rng)
    logs = [log for log in dpo.train(policy, reference, rounds, 40, 0.8, 1e-3) if log["pairs"]]
    assert logs[0]["rewards/margins"] == 0 and len(logs) > 20
    log = dpo.loss_and_log(policy, reference, next(dpo.rule_rounds(100, 2, rng)), 0.8)[1]
    log = dict(zip(dpo.LOGGED, log))
    assert log["loss"] < 0.6 and log["rewards/margins"] > 0.5 and log["rewards/accuracies"] > 0.7
    before, after = (
        evaluation.metrics(evaluation.sample(m, data.HELD_OUT * 20, 1.0, rng), 2)
        for m in (reference, policy)
    )
    assert after["preferred"] > before["preferred"] + 0.25 and after["format"] > 0.9
    assert np.array_equal(weights(reference), weights(model))
