"""The DPO objective, each test a line of mathematics (Rafailov et al. 2023); pairs; training."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

import data
import dpo
import tinygrad_lite.functional as F
from helpers import TOLERANCE, answer, leaf, model_of_the_task, normal, read, seeds, weights
from sft import completion_logps
from tinygrad_lite import Tensor, World, gradcheck, launch

# Four float64 arrays (pairs,): policy chosen and rejected, reference chosen and rejected.
four_logps = st.lists(st.tuples(*[st.floats(-50, 0, width=32)] * 4), min_size=1, max_size=6).map(
    lambda rows: list(np.array(rows).T)
)
betas = st.floats(0.05, 3)


def margin(chosen, rejected, reference_chosen, reference_rejected):
    """h of the paper: how much further the policy prefers the chosen answer than the reference."""
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def loss_and_slopes(arrays, beta):
    """The loss and its gradients for the policy's log-probabilities."""
    chosen, rejected = map(leaf, arrays[:2])
    loss = dpo.dpo_loss(chosen, rejected, *arrays[2:], beta)
    loss.backward()
    return loss.item(), chosen.grad, rejected.grad


@given(four_logps, betas)
def test_loss_and_slopes_are_those_of_the_paper(arrays, beta):
    """log(1 + e^(-beta h)) on average; slopes that are opposite, and sum to zero in each pair."""
    h = margin(*arrays)
    loss, d_chosen, d_rejected = loss_and_slopes(arrays, beta)
    assert loss == pytest.approx(np.mean(np.logaddexp(0, -beta * h)))
    slope = -beta * np.exp(-np.logaddexp(0, beta * h)) / h.size
    np.testing.assert_allclose(d_chosen, slope, atol=1e-15)
    np.testing.assert_array_equal(d_chosen + d_rejected, 0)
    loss, d_chosen, _ = loss_and_slopes(arrays[:2] * 2, beta)  # policy equal to reference
    assert loss == pytest.approx(math.log(2))
    np.testing.assert_allclose(d_chosen, -beta / 2 / h.size)
    assert (
        gradcheck(lambda *policy: dpo.dpo_loss(*policy, *arrays[2:], beta), *arrays[:2]) < TOLERANCE
    )


@given(four_logps, betas, seeds, st.floats(0.01, 10))
def test_symmetries_of_the_loss(arrays, beta, seed, gain):
    c, r, ref_c, ref_r = arrays
    loss, *slopes = loss_and_slopes(arrays, beta)
    swapped = loss_and_slopes([r, c, ref_r, ref_c], beta)[0]  # L(h) - L(-h) = -beta h, on average
    assert loss - swapped == pytest.approx(-beta * margin(*arrays).mean(), abs=1e-9)
    # A constant of each pair, added to both terms of the policy or of the reference, cancels.
    a, b = 20 * normal(seed, 2, c.size)
    moved, *moved_slopes = loss_and_slopes([c + a, r + a, ref_c + b, ref_r + b], beta)
    assert moved == pytest.approx(loss, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(moved_slopes, slopes, rtol=1e-9, atol=1e-12)
    # The loss falls as chosen gains on rejected; beta only scales the margin.
    assert loss_and_slopes([c + gain, r, ref_c, ref_r], beta)[0] < loss
    assert loss_and_slopes([c, r - gain, ref_c, ref_r], beta)[0] < loss
    assert loss == pytest.approx(loss_and_slopes([beta * x for x in arrays], 1.0)[0])


@pytest.mark.parametrize("h", [1e4, -1e4, 3e38, -3e38])
def test_extreme_margins_stay_finite_in_float32(h):
    chosen, zero = leaf(np.array([h], np.float32)), np.zeros(1, np.float32)
    loss = dpo.dpo_loss(chosen, Tensor(zero), zero, zero, 1.0)
    loss.backward()
    assert loss.dtype == np.float32 and loss.item() == pytest.approx(max(-h, 0))
    assert chosen.grad == (-1 if h < 0 else 0)


@pytest.mark.parametrize("at", range(4))
def test_log_probabilities_of_unlike_shapes_are_refused(at):
    arrays = [Tensor(np.zeros([(3, 1), 1][at % 2] if i == at else 3)) for i in range(4)]
    with pytest.raises(ValueError, match="one shape"):
        dpo.dpo_loss(*arrays, 0.8)


MODEL, REFERENCE = model_of_the_task(0, np.float64), model_of_the_task(1, np.float64)
PAIRS = data.pad(
    [
        answer(12, [3, 4, 5]),
        answer(12, [6, 6]),
        answer(100, [10, 70, 20]),
        answer(100, [97, 1, 1, 1]),
    ]
).reshape(2, 2, -1)
PADDED = np.pad(PAIRS, ((0, 0), (0, 0), (0, 4)), constant_values=data.PAD)
PREFIXED = data.pad([answer(52, [10, 20, 22]), answer(52, [10, 20, 1, 21])])[None]


def loss_and_gradients(pairs, logps=dpo.pair_logps):
    for p in MODEL.parameters():
        p.grad = None
    loss = dpo.dpo_loss(*logps(MODEL, pairs), *[x.data for x in logps(REFERENCE, pairs)], 0.8)
    loss.backward()
    return loss.item(), np.concatenate([p.grad.ravel() for p in MODEL.parameters()])


def after_the_prefix(model, pairs):
    ids, mask = pairs[0], data.completion_mask(pairs[0])
    mask[:, : len("52=10+20+")] = False
    logps = F.token_log_probs(model(ids[:, :-1]), ids[:, 1:].ravel()).reshape(2, -1)
    logps = (logps * mask[:, 1:]).sum(axis=1)
    return logps[:1], logps[1:]


@pytest.mark.parametrize(
    "pairs, others, logps",
    [
        (PAIRS, PADDED, dpo.pair_logps),
        (PAIRS, PAIRS[::-1], dpo.pair_logps),
        (PAIRS, PAIRS, lambda model, pairs: [completion_logps(model, pairs[:, i]) for i in (0, 1)]),
        (PREFIXED, PREFIXED, after_the_prefix),
    ],
    ids=["padding", "order", "two forwards", "prefix"],
)
def test_what_changes_neither_loss_nor_gradient(pairs, others, logps):
    """Chosen and rejected are told apart by their place; a prefix they share cancels."""
    for a, b in zip(loss_and_gradients(pairs), loss_and_gradients(others, logps)):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_finite_differences_through_the_whole_model():
    loss_and_gradients(PAIRS)
    rng = np.random.default_rng(0)
    for p, grad in [(p, p.grad) for p in MODEL.parameters()]:
        for flat in rng.choice(p.size, min(4, p.size), replace=False):
            index, before, values = np.unravel_index(flat, p.shape), p.data.flat[flat], []
            for p.data[index] in before + 1e-6, before - 1e-6, before:
                values.append(dpo.loss_and_log(MODEL, REFERENCE, PAIRS, 0.8)[0].item())
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(grad[index], abs=1e-8, rel=1e-5)
    assert all(p.grad is None for p in REFERENCE.parameters())


def test_prompt_and_padding_get_exactly_no_gradient():
    logits = leaf(normal(0, len(data.VOCAB), PADDED[..., 1:].size))
    dpo.dpo_loss(*dpo.pair_logps(lambda _: logits, PADDED), *np.zeros((2, 2)), 0.8).backward()
    for line, grad in zip(PADDED.reshape(4, -1), np.abs(logits.grad).sum(axis=0).reshape(4, -1)):
        text = data.decode(line)
        first, last = text.index("="), len(text)  # these predict the first digit, the end token
        assert (grad[first:last] > 0).all() and not grad[:first].any() and not grad[last:].any()


@given(four_logps, betas)
def test_logged_names_mean_what_the_field_means(arrays, beta):
    """A reward is beta log(pi / pi_ref), the margin is beta h; a tie is no success."""

    def log(*arrays):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpo, "pair_logps", lambda logps, pairs: logps)
            c, r, *reference = map(Tensor, arrays)
            return dict(
                zip(dpo.LOGGED, dpo.loss_and_log((c, r), reference, [], beta)[1], strict=True)
            )

    c, r, ref_c, ref_r = arrays
    chosen, rejected = beta * (c - ref_c), beta * (r - ref_r)
    assert log(*arrays) == pytest.approx(
        {
            "loss": dpo.dpo_loss(*map(Tensor, arrays), beta).item(),
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": beta * margin(*arrays).mean(),
            "rewards/accuracies": sum(chosen > rejected) / c.size,
            "logps/chosen": c.mean(),
            "logps/rejected": r.mean(),
        },
        abs=1e-9,
    )
    assert log(c, c, ref_c, ref_c)["rewards/accuracies"] == 0


class Scripted:
    """Stands in for a model: its answers go round a fixed list, each made from the target."""

    def __init__(self, *answers):
        self.answers, self.asked = itertools.cycle(answers), []

    def generate(self, prompts, max_new_tokens, temperature, rng):
        targets = [int(data.decode(prompt)[:-1]) for prompt in prompts]
        self.asked += targets
        assert temperature == 1  # the probabilities that the loss compares
        return [data.encode(next(self.answers)(t)) + [data.END] for t in targets]


RIGHT, OTHER, WRONG, BROKEN, AGAIN = (
    lambda t: f"1+1+{t - 2}",
    lambda t: f"1+{t - 1}",
    lambda t: f"1+1+{t - 1}",
    lambda t: "1++1=",
    lambda t: f"2+1+{t - 3}",
)


def texts(pairs):
    return [(data.decode(chosen), data.decode(rejected)) for chosen, rejected in pairs]


@pytest.mark.parametrize(
    "prefer, paired",
    [(2, [(OTHER, RIGHT)]), (4, []), (3, [(RIGHT, OTHER), (AGAIN, WRONG), (AGAIN, BROKEN)])],
)
def test_right_preferred_answers_are_paired_with_others_of_their_target(prefer, paired):
    model, rng = Scripted(RIGHT, OTHER, WRONG, BROKEN, AGAIN, AGAIN), np.random.default_rng(0)
    pairs = dpo.judged_pairs(model, [50, 60], 6, prefer, rng)
    assert texts(pairs) == [
        (f"{t}={chosen(t)}", f"{t}={rejected(t)}") for t in (50, 60) for chosen, rejected in paired
    ]
    assert pairs.shape[1:] == (2, data.MAX_LEN) and model.asked == [50] * 6 + [60] * 6
    assert len(dpo.judged_pairs(Scripted(RIGHT), [50, 60], 5, 3, rng)) == 0


def test_the_first_targets_take_their_good_answers_from_lines_made_by_rule():
    model = Scripted(RIGHT, OTHER)
    pairs = dpo.judged_pairs(model, [60, 50, 40], 40, 3, np.random.default_rng(0), n_by_rule=1)
    by_rule, own = pairs[:-40], pairs[-40:]  # of 40 lines by rule about ten have three terms
    assert 4 <= len(by_rule) <= 18
    chosen = [data.judge(data.encode(line) + [data.END]) for line, _ in texts(by_rule)]
    assert {(j.target, j.outcome) for j in chosen} == {(60, "right, preferred")}
    assert len({tuple(j.terms) for j in chosen}) > 3 and RIGHT(60) not in dict(texts(by_rule))
    assert {rejected for _, rejected in texts(by_rule)} == {f"60={OTHER(60)}"}
    assert texts(own) == [
        (f"{t}={RIGHT(t)}", f"{t}={OTHER(t)}") for t in (50, 40) for _ in range(20)
    ]
    hopeless = Scripted(OTHER, WRONG)
    assert not len(dpo.judged_pairs(hopeless, [60], 40, 3, np.random.default_rng(0), n_by_rule=1))


def test_online_rounds_are_sampled_afresh_and_once_rounds_come_again():
    rng = np.random.default_rng(0)
    online, once = Scripted(RIGHT, OTHER), Scripted(RIGHT, OTHER)
    for i, pairs in zip((1, 2, 3), dpo.sampled_rounds(online, 64, 2, 3, rng)):
        assert len(online.asked) == 64 * 2 * i
        assert sum("=1+1+" in chosen for chosen, _ in texts(pairs)) == 62  # two of 64 by rule
    assert online.asked[:128] != online.asked[128:256]
    some = Scripted(RIGHT, OTHER)
    for i, _ in zip(range(181), dpo.sampled_rounds(some, 4, 2, 3, rng, fresh_every=60)):
        assert len(some.asked) == (i // 60 + 1) * 50 * 4 * 2
    rounds = dpo.sampled_rounds(once, 4, 2, 3, rng, fresh_every=1000)
    parts = [texts(next(rounds)) for _ in range(100)]
    assert len(once.asked) == 50 * 4 * 2 and {*map(len, parts)} <= {3, 4}  # as online
    first, again = sum(parts[:50], []), sum(parts[50:], [])
    assert sum("=1+1+" in chosen for chosen, _ in first) == 193  # 7 of 200 by rule
    assert sorted(first) == sorted(again) and first != again  # in another order
    assert not {*online.asked, *once.asked} & {*data.HELD_OUT}


@given(st.integers(2, 5), seeds)
def test_pairs_made_by_rule_are_right_sums_that_differ_in_their_count(prefer, seed):
    pairs = next(dpo.rule_rounds(200, prefer, np.random.default_rng(seed)))
    for (target, chosen), (same, rejected) in [map(read, pair) for pair in pairs]:
        assert sum(chosen) == target == same == sum(rejected) and target not in data.HELD_OUT
        assert len(chosen) == prefer
    counts = [len(read(line)[1]) for line in pairs[:, 1]]
    assert {*counts} == {2, 3, 4, 5} - {prefer} and len(counts) == 200


def test_what_is_measured_on_held_out_targets():
    model = Scripted(RIGHT, OTHER, WRONG, BROKEN, OTHER)
    assert dpo.measure(model, None, [], 0.8, 3) == {
        "shares": dict(zip(data.OUTCOMES, (0.2, 0.4, 0.2, 0.2)))
    }
    assert sorted(model.asked) == sorted(data.HELD_OUT * 20)
    first, second = (dpo.measure(MODEL, REFERENCE, PAIRS, 0.8, 3) for _ in range(2))
    log = zip(dpo.LOGGED, dpo.loss_and_log(MODEL, REFERENCE, PAIRS, 0.8)[1])
    assert (
        first
        == second
        == {**{f"eval_{name}": value for name, value in log}, "shares": first["shares"]}
    )  # what can change is the policy


def train(pairs=PAIRS, rounds=3, world=World(), **options):
    """A run from one model: its logs, and the weights of policy and reference."""
    policy, reference = model_of_the_task(), model_of_the_task()
    options = {"source": itertools.repeat(pairs), "beta": 0.8, "lr": 1e-3, **options}
    logs = list(dpo.train(policy, reference, rounds=rounds, world=world, **options))
    assert all(p.grad is None for p in reference.parameters())
    return logs, weights(policy), weights(reference)


def test_training_starts_at_ln_2_raises_the_margin_and_leaves_the_reference_alone():
    logs, policy, reference = train(rounds=12)
    assert [(log["round"], log["pairs"]) for log in logs] == [(i, 2) for i in range(1, 13)]
    margins = [log["rewards/margins"] for log in logs]
    assert margins[0] == 0 and (np.diff(margins) > 0).all()
    assert logs[-1]["loss"] < logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert list(logs[0])[2:] == list(dpo.LOGGED) and (policy != reference).mean() > 0.9
    assert np.array_equal(reference, weights(model_of_the_task()))


def train_on_many(world=World()):
    """70 pairs, several shards; of three processes the last has none of them."""
    pairs = next(dpo.rule_rounds(70, 3, np.random.default_rng(0)))
    part = {1: [pairs], 3: [pairs[:30], pairs[30:], pairs[:0]]}[world.world_size][world.rank]
    return train(part, world=world)


def test_the_number_of_shards_and_processes_changes_nothing(monkeypatch):
    runs = [train_on_many(), launch(3, train_on_many)]
    monkeypatch.setattr(dpo, "SHARD", 1000)
    logs, policy, _ = train_on_many()
    for other_logs, others, _ in runs:
        assert all(log == pytest.approx(other, abs=1e-4) for log, other in zip(logs, other_logs))
        assert np.allclose(policy, others, atol=1e-5) and other_logs[0]["pairs"] == 70


def test_rounds_without_pairs_are_skipped_and_after_many_of_them_training_ends():
    nine = [PAIRS[:0]] * (dpo.PATIENCE - 1)
    logs, policy, reference = train(source=[*nine, PAIRS, *nine, PAIRS[:0], PAIRS], rounds=99)
    assert [log["pairs"] for log in logs] == [0] * 9 + [2] + [0] * 10
    assert logs[0] == {"round": 1, "pairs": 0} and (policy != reference).any()
    assert np.array_equal(*train(source=nine, rounds=99)[1:])
