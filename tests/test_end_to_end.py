"""SFT and DPO at small scale: within seconds a tiny model learns the task and the preference."""
import numpy as np

import data
import dpo
import eval as evaluation
import sft
from transformer import Config, Transformer


def bigram_entropy(ids):
    """Nats a token of a guesser who knows how often each token follows each other one."""
    mask = data.completion_mask(ids)[:, 1:]
    counts = np.zeros((len(data.VOCAB), len(data.VOCAB)))
    np.add.at(counts, (ids[:, :-1][mask], ids[:, 1:][mask]), 1)
    seen = counts > 0
    conditional = (counts / counts.sum(axis=1, keepdims=True).clip(1))[seen]
    return -(counts[seen] * np.log(conditional)).sum() / counts.sum()


def test_sft_learns_the_task_and_dpo_the_preference(tmp_path):
    model = Transformer(Config(len(data.VOCAB), 32, 2, 2, 64, data.MAX_LEN))
    losses = [loss for _, loss, _ in sft.train(model, 400, 64, 1e-2, np.random.default_rng(0))]
    guess = bigram_entropy(data.random_lines(10_000, np.random.default_rng(1)))
    assert np.mean(losses[-20:]) < 0.9 * guess < guess < losses[0]

    model.save(tmp_path / "sft.npz")
    reference = Transformer.load(tmp_path / "sft.npz")
    before = {name: p.data.tobytes() for name, p in reference.named_parameters().items()}
    rng, earlier = np.random.default_rng(2), {}

    def make_pairs():
        return dpo.sampled_pairs(model, 64, 8, 3, rng, map, earlier)
    rows = dpo.train(model, reference, make_pairs, 60, 0.8, 1e-3)
    history = [row for row in rows if row["pairs"]]
    assert history[0]["rewards/margins"] == 0  # policy and reference are one at first
    assert np.mean([row["rewards/margins"] for row in history[-20:]]) > 0.1
    after = {name: p.data.tobytes() for name, p in reference.named_parameters().items()}
    assert after == before

    targets = data.HELD_OUT * 20
    sft_row, dpo_row = (evaluation.metrics(evaluation.sample(m, targets, 1.0, rng))
                        for m in (reference, model))
    assert dpo_row["preferred"] > sft_row["preferred"] + 0.15
    assert dpo_row["format"] > 0.98
