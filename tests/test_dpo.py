"""The DPO objective, line by line (Rafailov et al. 2023); where pairs come from; training."""

import functools
import itertools
import math
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, strategies as st

import cli
import data
import dpo
import tinygrad_lite.functional as F
from helpers import (
    TOLERANCE,
    answer,
    leaf,
    model_of_the_task,
    normal,
    read,
    seeds,
    text_of,
    weights,
)
from sft import completion_logps
from tinygrad_lite import Tensor, World, gradcheck, launch, no_grad

# The loss, as a function of four arrays of log-probabilities (P,), for P pairs: chosen and
# rejected under the policy, chosen and rejected under the reference.

four_numbers = st.tuples(*[st.floats(-50, 0, width=32)] * 4)
four_logps = st.lists(four_numbers, min_size=1, max_size=6).map(lambda rows: list(np.array(rows).T))
betas = st.floats(0.05, 3)


def log_ratio_difference(chosen, rejected, reference_chosen, reference_rejected):
    """h of the paper: how much further the policy prefers the chosen answer than the reference."""
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def loss_of(arrays, beta):
    return loss_and_slopes(arrays, beta)[0]


def loss_and_slopes(arrays, beta):
    """The loss and its gradients for the policy's log-probabilities, chosen and rejected."""
    chosen, rejected = leaf(arrays[0]), leaf(arrays[1])
    loss = dpo.dpo_loss(chosen, rejected, arrays[2], arrays[3], beta)
    loss.backward()
    return loss.item(), chosen.grad, rejected.grad


@given(four_logps, betas)
def test_the_loss_is_that_of_the_paper(arrays, beta):
    """- log sigmoid(beta h) = log(1 + exp(-beta h)), on average."""
    h = log_ratio_difference(*arrays)
    assert loss_of(arrays, beta) == pytest.approx(np.mean(np.logaddexp(0, -beta * h)))


@given(four_logps, betas)
def test_the_slope_of_a_pair_is_minus_beta_sigmoid_of_minus_beta_h(arrays, beta):
    h = log_ratio_difference(*arrays)
    _, d_chosen, _ = loss_and_slopes(arrays, beta)
    sigmoid = np.exp(-np.logaddexp(0, beta * h))  # of -beta h
    np.testing.assert_allclose(d_chosen, -beta * sigmoid / h.size, atol=1e-15)


@given(four_logps, betas)
def test_the_slopes_of_chosen_and_rejected_are_opposite(arrays, beta):
    _, d_chosen, d_rejected = loss_and_slopes(arrays, beta)
    np.testing.assert_array_equal(d_chosen, -d_rejected)


@given(four_logps, betas)
def test_finite_differences_of_the_loss(arrays, beta):
    def loss(chosen, rejected):
        return dpo.dpo_loss(chosen, rejected, arrays[2], arrays[3], beta)

    assert gradcheck(loss, arrays[0], arrays[1]) < TOLERANCE


@given(four_logps, betas)
def test_where_policy_and_reference_agree_the_loss_is_ln_2(arrays, beta):
    chosen, rejected = arrays[:2]
    loss, d_chosen, _ = loss_and_slopes([chosen, rejected, chosen, rejected], beta)
    assert loss == pytest.approx(math.log(2))
    np.testing.assert_allclose(d_chosen, -beta / 2 / chosen.size)


@given(four_logps, betas)
def test_swapping_chosen_and_rejected_changes_the_loss_by_beta_h(arrays, beta):
    """L(h) - L(-h) = -beta h, on average."""
    chosen, rejected, reference_chosen, reference_rejected = arrays
    swapped = [rejected, chosen, reference_rejected, reference_chosen]
    h = log_ratio_difference(*arrays)
    difference = loss_of(arrays, beta) - loss_of(swapped, beta)
    assert difference == pytest.approx(-beta * h.mean(), abs=1e-9)


@given(four_logps, betas, seeds)
def test_a_constant_of_a_model_and_a_prompt_cancels(arrays, beta, seed):
    """What is added to both answers of a pair, under the policy or under the reference."""
    chosen, rejected, reference_chosen, reference_rejected = arrays
    a, b = 20 * normal(seed, 2, chosen.size)
    moved = [chosen + a, rejected + a, reference_chosen + b, reference_rejected + b]
    for before, after in zip(loss_and_slopes(arrays, beta), loss_and_slopes(moved, beta)):
        np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)


@given(four_logps, betas, st.floats(0.01, 10))
def test_the_loss_falls_where_chosen_gains_on_rejected(arrays, beta, gain):
    chosen, rejected, reference_chosen, reference_rejected = arrays
    loss = loss_of(arrays, beta)
    assert loss_of([chosen + gain, rejected, reference_chosen, reference_rejected], beta) < loss
    assert loss_of([chosen, rejected - gain, reference_chosen, reference_rejected], beta) < loss


@given(four_logps, betas)
def test_beta_only_scales_the_log_probabilities(arrays, beta):
    scaled = [beta * array for array in arrays]
    assert loss_of(arrays, beta) == pytest.approx(loss_of(scaled, 1.0))


@pytest.mark.parametrize("h", [1e4, -1e4, 3e38, -3e38])
def test_extreme_margins_stay_finite_in_float32(h):
    chosen, zero = leaf(np.array([h], np.float32)), np.zeros(1, np.float32)
    loss = dpo.dpo_loss(chosen, Tensor(zero), zero, zero, 1.0)
    loss.backward()
    assert loss.dtype == np.float32
    assert loss.item() == pytest.approx(max(-h, 0))
    assert chosen.grad == (-1 if h < 0 else 0)


@pytest.mark.parametrize("odd_shape", [(3, 1), 1])
@pytest.mark.parametrize("odd_one", range(4))
def test_log_probabilities_of_unlike_shapes_are_refused(odd_one, odd_shape):
    """They would broadcast, and the mean would be over pairs that do not exist."""
    shapes = [3, 3, 3, 3]
    shapes[odd_one] = odd_shape
    with pytest.raises(ValueError, match="one shape"):
        dpo.dpo_loss(*[Tensor(np.zeros(shape)) for shape in shapes], 0.8)


def test_the_reference_gets_no_gradient():
    four = [leaf(normal(i, 3)) for i in range(2)] + [Tensor(normal(i, 3)) for i in (2, 3)]
    dpo.dpo_loss(*four, 0.8).backward()
    assert [logps.grad is None for logps in four] == [False, False, True, True]


# The loss through the model, in float64.

MODEL, REFERENCE = model_of_the_task(0, np.float64), model_of_the_task(1, np.float64)
PAIRS = data.pad(
    [
        answer(12, [3, 4, 5]),
        answer(12, [6, 6]),
        answer(100, [10, 70, 20]),
        answer(100, [97, 1, 1, 1]),
    ]
).reshape(2, 2, -1)
NO_PAIRS = np.empty((0, 2, data.MAX_LEN), int)
PADDED = np.pad(PAIRS, ((0, 0), (0, 0), (0, 4)), constant_values=data.PAD)


def loss_of_pairs(pairs, pair_logps=dpo.pair_logps):
    chosen, rejected = pair_logps(MODEL, pairs)
    with no_grad():
        reference_chosen, reference_rejected = pair_logps(REFERENCE, pairs)
    return dpo.dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.8)


def loss_and_gradients(pairs, pair_logps=dpo.pair_logps):
    """The loss, and its gradient for all weights of MODEL as one vector."""
    for parameter in MODEL.parameters():
        parameter.grad = None
    loss = loss_of_pairs(pairs, pair_logps)
    loss.backward()
    gradients = [parameter.grad.ravel() for parameter in MODEL.parameters()]
    return loss.item(), np.concatenate(gradients)


def assert_same_loss_and_gradients(first, second):
    assert first[0] == pytest.approx(second[0], abs=1e-12)
    np.testing.assert_allclose(first[1], second[1], atol=1e-12)


def test_padding_changes_nothing():
    assert_same_loss_and_gradients(loss_and_gradients(PAIRS), loss_and_gradients(PADDED))


def test_the_order_of_pairs_changes_nothing():
    assert_same_loss_and_gradients(loss_and_gradients(PAIRS), loss_and_gradients(PAIRS[::-1]))


def test_chosen_and_rejected_may_go_through_the_model_together_or_apart():
    def one_after_the_other(model, pairs):
        return completion_logps(model, pairs[:, 0]), completion_logps(model, pairs[:, 1])

    assert_same_loss_and_gradients(
        loss_and_gradients(PAIRS), loss_and_gradients(PAIRS, one_after_the_other)
    )


def test_a_prefix_that_both_answers_share_cancels():
    pairs = data.pad([answer(52, [10, 20, 22]), answer(52, [10, 20, 1, 21])])[None]

    def logps_after_the_prefix(model, pairs):
        ids = pairs[0]
        mask = data.completion_mask(ids)
        mask[:, : len("52=10+20+")] = False
        logps = F.token_log_probs(model(ids[:, :-1]), ids[:, 1:].ravel()).reshape(2, -1)
        logps = (logps * mask[:, 1:]).sum(axis=1)
        return logps[:1], logps[1:]

    assert_same_loss_and_gradients(
        loss_and_gradients(pairs), loss_and_gradients(pairs, logps_after_the_prefix)
    )


def test_finite_differences_through_the_whole_model():
    """Four weights of each parameter: by backward(), and from the loss on either side."""
    loss_and_gradients(PAIRS)
    rng = np.random.default_rng(0)
    for parameter in MODEL.parameters():
        for flat_index in rng.choice(parameter.size, min(4, parameter.size), replace=False):
            index = np.unravel_index(flat_index, parameter.shape)
            before = parameter.data[index]
            parameter.data[index] = before + 1e-6
            above = loss_of_pairs(PAIRS).item()
            parameter.data[index] = before - 1e-6
            below = loss_of_pairs(PAIRS).item()
            parameter.data[index] = before
            slope = (above - below) / 2e-6
            assert slope == pytest.approx(parameter.grad[index], abs=1e-8, rel=1e-5)


def test_the_weights_of_the_reference_get_no_gradient():
    loss_and_gradients(PAIRS)
    assert all(parameter.grad is None for parameter in REFERENCE.parameters())


def test_prompt_and_padding_get_exactly_no_gradient():
    logits = leaf(normal(0, len(data.VOCAB), PAIRS[..., 1:].size))
    chosen, rejected = dpo.pair_logps(lambda ids: logits, PAIRS)
    zeros = np.zeros(2)
    dpo.dpo_loss(chosen, rejected, zeros, zeros, 0.8).backward()
    gradients = np.abs(logits.grad).sum(axis=0).reshape(4, -1)  # of each position of each line
    for line, grad in zip(PAIRS.reshape(4, -1), gradients):
        text = data.decode(line)
        predicts_first_digit, predicts_end = text.index("="), len(text) - 1
        assert not grad[:predicts_first_digit].any()
        assert (grad[predicts_first_digit : predicts_end + 1] > 0).all()
        assert not grad[predicts_end + 1 :].any()


# What is logged.


def metrics_of(arrays, beta=0.8):
    return dpo.pair_metrics(*map(Tensor, arrays), beta)


@given(four_logps, betas)
def test_the_logged_names_mean_what_the_field_means(arrays, beta):
    """A reward is beta log(pi / pi_ref); the margin is beta h."""
    chosen, rejected, reference_chosen, reference_rejected = arrays
    chosen_rewards = beta * (chosen - reference_chosen)
    rejected_rewards = beta * (rejected - reference_rejected)
    expected = {
        "loss": loss_of(arrays, beta),
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": beta * log_ratio_difference(*arrays).mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    assert metrics_of(arrays, beta) == pytest.approx(expected, abs=1e-9)
    assert list(expected) == list(dpo.LOGGED)


def test_a_tie_is_no_success():
    """At the start all rewards are 0: the accuracy is 0, not 1."""
    logps = np.array([-3.0, -5.0])
    assert metrics_of([logps, logps, logps, logps])["rewards/accuracies"] == 0


# Where pairs come from.


class Scripted:
    """Stands in for a model: its answers go round a fixed list, each made from the target."""

    def __init__(self, *answers):
        self.answers = itertools.cycle(answers)
        self.asked = []  # the target of every answer so far

    def generate(self, prompts, max_new_tokens, temperature, rng):
        assert temperature == 1  # the probabilities that the loss compares
        completions = []
        for prompt in prompts:
            target = int(data.decode(prompt).removesuffix("="))
            self.asked.append(target)
            make_answer = next(self.answers)
            completions.append(data.encode(make_answer(target)) + [data.END])
        return completions


def three_terms(target):
    return f"1+1+{target - 2}"


def three_other_terms(target):
    return f"2+1+{target - 3}"


def two_terms(target):
    return f"1+{target - 1}"


def wrong_sum(target):
    return f"1+1+{target - 1}"


def no_sum(target):
    return "1++1="


def texts(pairs):
    return [(data.decode(chosen), data.decode(rejected)) for chosen, rejected in pairs]


def sampled_pairs(model, targets, n_answers, prefer=3):
    rng = np.random.default_rng(0)
    return dpo.pair_up(dpo.sample_and_judge(model, targets, n_answers, prefer, rng))


def test_accepted_answers_are_paired_with_rejected_ones_to_the_same_target():
    model = Scripted(three_terms, two_terms, wrong_sum, no_sum, three_other_terms)
    assert texts(sampled_pairs(model, [50, 60], n_answers=5)) == [
        ("50=1+1+48", "50=1+49"),
        ("50=2+1+47", "50=1+1+49"),
        ("60=1+1+58", "60=1+59"),
        ("60=2+1+57", "60=1+1+59"),
    ]


def test_what_is_accepted_follows_the_preferred_number_of_terms():
    model = Scripted(three_terms, two_terms)
    assert texts(sampled_pairs(model, [50], 2, prefer=2)) == [("50=1+49", "50=1+1+48")]


@pytest.mark.parametrize("answers", [(three_terms,), (two_terms, wrong_sum, no_sum)])
def test_answers_of_one_kind_make_no_pair(answers):
    pairs = sampled_pairs(Scripted(*answers), [50, 60], n_answers=3)
    assert pairs.shape == (0, 2, data.MAX_LEN)


def test_every_target_is_answered_as_often_as_asked():
    model = Scripted(three_terms)
    sampled_pairs(model, [50, 60], n_answers=6)
    assert model.asked == [50] * 6 + [60] * 6


def test_answers_by_rule_are_accepted_and_vary():
    lines = dpo.accepted_by_rule(60, 40, 3, np.random.default_rng(0))
    assert 4 <= len(lines) <= 18  # about a quarter of the rule's lines have three terms
    for line in lines:
        target, terms = read(line)
        assert target == 60 == sum(terms) and len(terms) == 3
    assert len({tuple(line) for line in lines}) > 3


# The sizes of the rounds.


@given(st.integers(1, 300), st.integers(1, 500))
def test_the_rounds_of_a_run_follow_each_other_from_target_0_and_none_is_empty(rounds, prompts):
    starts = dpo.round_starts(rounds, prompts)
    assert len(starts) == rounds + 1 and starts[0] == 0
    sizes = np.diff(starts)
    assert sizes.min() >= 1 and sizes.max() <= prompts


def test_the_first_round_has_a_third_of_the_targets_of_the_last_one():
    for prompts in 6, 60, 192:
        sizes = np.diff(dpo.round_starts(50, prompts))
        assert sizes[0] == prompts / 3 and sizes[-1] == prompts


@given(st.integers(2, 300), st.integers(1, 500))
def test_rounds_grow_in_a_straight_line(rounds, prompts):
    """Save for rounding up."""
    sizes = np.diff(dpo.round_starts(rounds, prompts))
    line = [prompts / 3 + prompts * 2 / 3 * step / (rounds - 1) for step in range(rounds)]
    assert (np.abs(sizes - np.array(line) - 0.5) <= 0.5 + 1e-9).all()


# Runs of which the first rounds have fewer targets than there are processes, and longer ones.
GROWING = [dpo.round_starts(rounds, prompts) for rounds, prompts in [(100, 1), (30, 8), (7, 192)]]


def pairs_of_a_process(model, step, world, starts, answers=2):
    rng = np.random.default_rng(0)
    return dpo.online_pairs(model, step, world, rng, starts, answers, prefer=3)


MARK = answer(7, [1, 2, 4])  # stands for an answer that was made by rule


def numbers_by_rule(monkeypatch, starts, world_size):
    """The numbers of a run's targets whose accepted answers are made by rule.

    The targets of a round are dealt to the processes like cards. Here each target makes one pair,
    and where its chosen line was made by rule, that is MARK.
    """
    monkeypatch.setattr(dpo, "accepted_by_rule", lambda target, n, prefer, rng: [MARK])
    found = []
    for step in range(len(starts) - 1):
        for rank in range(world_size):
            model = Scripted(three_terms, two_terms)
            pairs = pairs_of_a_process(model, step, World(rank, world_size), starts)
            for i, (chosen, _) in enumerate(pairs):
                if data.decode(chosen) == data.decode(MARK):
                    found.append(starts[step] + rank + i * world_size)
    return sorted(found)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("starts", [*GROWING, range(0, 132, 33)])
def test_every_48th_target_of_a_run_takes_its_accepted_answers_by_rule(
    monkeypatch, starts, world_size
):
    """Whatever the number of processes and of targets in each round."""
    found = numbers_by_rule(monkeypatch, starts, world_size)
    assert found == list(range(0, starts[-1], dpo.BY_RULE_EVERY))


@pytest.mark.parametrize("starts", GROWING)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_targets_of_a_round_are_shared_by_the_processes(starts, world_size):
    for step, size in enumerate(np.diff(starts)):
        n_asked = []
        for rank in range(world_size):
            model = Scripted(three_terms)
            pairs_of_a_process(model, step, World(rank, world_size), starts, answers=2)
            n_asked.append(len(model.asked) // 2)
        assert sum(n_asked) == size
        assert max(n_asked) - min(n_asked) <= 1


def test_answers_by_rule_are_paired_with_the_rejected_ones_of_the_policy():
    pairs = pairs_of_a_process(Scripted(three_terms, two_terms), 0, World(), [0, 32], answers=40)
    model_made = [pair for pair in texts(pairs) if "=1+1+" in pair[0]]
    rule_made = [pair for pair in texts(pairs) if "=1+1+" not in pair[0]]
    assert len(model_made) == 31 * 20  # of every target but the first
    assert 3 <= len(rule_made) <= 18
    for chosen, rejected in rule_made:
        target, _ = data.parse(chosen)
        assert rejected == text_of(target, [1, target - 1])


def test_a_policy_without_an_accepted_answer_gets_none_by_rule():
    """It has not learned the task; the run should end rather than go on with the rule's answers."""
    assert len(pairs_of_a_process(Scripted(two_terms, wrong_sum), 0, World(), [0, 64])) == 0


def test_online_pairs_come_from_fresh_answers_in_every_round():
    model, rng = Scripted(three_terms, two_terms), np.random.default_rng(0)
    for step in range(3):
        dpo.online_pairs(model, step, World(), rng, starts=[0, 16, 32, 48], answers=2, prefer=3)
    rounds = [model.asked[:32], model.asked[32:64], model.asked[64:]]
    assert len(rounds[2]) == 32
    assert rounds[0] != rounds[1] and rounds[1] != rounds[2]


def test_online_pairs_are_of_training_targets():
    model = Scripted(three_terms)
    pairs_of_a_process(model, 0, World(), [0, 500])
    assert set(model.asked) <= set(data.TRAINING)


@pytest.mark.parametrize("world_size", [1, 3])
def test_pairs_once_are_all_sampled_before_the_first_step(monkeypatch, world_size):
    monkeypatch.setattr(dpo.OncePairs, "n_targets", 40)
    n_asked = 0
    for rank in range(world_size):
        model, rng = Scripted(three_terms, two_terms), np.random.default_rng(0)
        make_pairs = dpo.OncePairs(dpo.round_starts(9, 30), answers=2, prefer=3)
        make_pairs(model, 0, World(rank, world_size), rng)
        asked_before_the_first_step = list(model.asked)
        for step in range(1, 9):
            make_pairs(model, step, World(rank, world_size), rng)
        assert model.asked == asked_before_the_first_step
        n_asked += len(model.asked)
    assert n_asked == 40 * 2


def rounds_of_pairs_once(monkeypatch, starts):
    """The pairs of each round of a run. The answers of the SFT model to 240 targets have made three
    pairs each, and a number from 0 to 719 stands for a pair."""
    monkeypatch.setattr(dpo.OncePairs, "n_targets", 240)
    monkeypatch.setattr(dpo, "online_pairs", lambda *_: np.arange(3 * 240))
    make_pairs, rng = dpo.OncePairs(starts, answers=6, prefer=3), np.random.default_rng(0)
    return [make_pairs(None, step, World(), rng) for step in range(len(starts) - 1)]


def test_a_round_of_pairs_once_has_its_share_of_them(monkeypatch):
    starts = dpo.round_starts(60, 48)
    sizes = [len(pairs) for pairs in rounds_of_pairs_once(monkeypatch, starts)]
    np.testing.assert_array_equal(sizes, 3 * np.diff(starts))


def test_pairs_once_do_not_come_again_before_the_others_are_used(monkeypatch):
    rounds = rounds_of_pairs_once(monkeypatch, dpo.round_starts(60, 48))
    used = np.concatenate(rounds).tolist()
    first_that_comes_again = next(i for i, pair in enumerate(used) if pair in used[:i])
    assert first_that_comes_again == 3 * 240


def test_when_all_pairs_once_are_used_they_come_again_in_another_order(monkeypatch):
    rounds = rounds_of_pairs_once(monkeypatch, range(0, 481, 8))  # enough for two times
    first, second = np.concatenate(rounds[:30]).tolist(), np.concatenate(rounds[30:]).tolist()
    assert sorted(first) == sorted(second) == list(range(3 * 240))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("starts", GROWING)
@pytest.mark.parametrize("world_size", [1, 3])
def test_pairs_by_rule_are_as_many_as_a_round_has_targets(starts, world_size):
    rng = np.random.default_rng(0)
    for step, size in enumerate(np.diff(starts)):
        n_pairs = [
            len(dpo.rule_pairs(None, step, World(rank, world_size), rng, starts, prefer=3))
            for rank in range(world_size)
        ]
        assert sum(n_pairs) == size


@given(st.integers(2, 5), seeds)
def test_pairs_by_rule_are_right_sums_that_differ_in_their_number_of_terms(prefer, seed):
    rng = np.random.default_rng(seed)
    pairs = dpo.rule_pairs(None, 0, World(), rng, starts=[0, 20], prefer=prefer)
    assert pairs.shape == (20, 2, data.MAX_LEN)
    for chosen_line, rejected_line in pairs:
        target, chosen = read(chosen_line)
        same_target, rejected = read(rejected_line)
        assert target == same_target and target in data.TRAINING
        assert sum(chosen) == sum(rejected) == target
        assert len(chosen) == prefer != len(rejected)


def test_rejected_answers_by_rule_have_every_other_number_of_terms():
    rng = np.random.default_rng(0)
    pairs = dpo.rule_pairs(None, 0, World(), rng, starts=[0, 200], prefer=3)
    assert {len(read(line)[1]) for line in pairs[:, 1]} == {2, 4, 5}


@pytest.mark.parametrize("prompts, sizes", [(7, [3, 2, 2]), (2, [1, 1, 0])])
def test_pairs_by_rule_are_shared_by_the_processes(prompts, sizes):
    rng = np.random.default_rng(0)
    for rank, size in enumerate(sizes):
        pairs = dpo.rule_pairs(None, 0, World(rank, 3), rng, starts=[0, prompts], prefer=3)
        assert len(pairs) == size


@pytest.mark.parametrize("name", ["online", "once", "rule"])
def test_each_source_of_pairs_has_its_name(monkeypatch, name):
    monkeypatch.setattr(dpo.OncePairs, "n_targets", 40)
    make_pairs = dpo.pairs_maker(name, starts=[0, 4], answers=2, prefer=2)
    model = Scripted(three_terms, two_terms)
    pairs = make_pairs(model, 0, World(), np.random.default_rng(0))
    assert len(pairs) > 0
    assert len(model.asked) == {"online": 4 * 2, "once": 40 * 2, "rule": 0}[name]
    assert {len(read(chosen)[1]) for chosen in pairs[:, 0]} == {2}


# What is measured on held-out targets.


def test_twenty_answers_to_each_held_out_target_are_measured():
    model = Scripted(three_terms, two_terms, wrong_sum, no_sum, two_terms)
    row = dpo.measure(model, None, NO_PAIRS, 0.8, 3)
    assert sorted(model.asked) == sorted(data.HELD_OUT * 20)
    assert row == {
        "shares": {
            "right, preferred": 0.2,
            "right, not preferred": 0.4,
            "wrong sum": 0.2,
            "does not parse": 0.2,
        },
        "answers": {
            "2": {"right": 0.4, "wrong": 0},
            "3": {"right": 0.2, "wrong": 0.2},
            "4": {"right": 0, "wrong": 0},
            "5": {"right": 0, "wrong": 0},
        },
    }


def test_fixed_pairs_are_measured_under_the_names_of_the_training_pairs():
    row = dpo.measure(MODEL, REFERENCE, PAIRS, 0.8, 3)
    logps = [*dpo.pair_logps(MODEL, PAIRS), *dpo.pair_logps(REFERENCE, PAIRS)]
    for name, value in metrics_of([logp.data for logp in logps]).items():
        assert row[f"eval_{name}"] == pytest.approx(value)
    assert set(row) == {"shares", "answers", *[f"eval_{name}" for name in dpo.LOGGED]}


def test_a_measurement_repeats():
    """Its random numbers are always the same, so what changes in a run is the policy."""
    first, second = (dpo.measure(MODEL, REFERENCE, PAIRS, 0.8, 3) for _ in range(2))
    assert first == second


def test_there_are_ten_held_out_pairs_to_each_held_out_target():
    pairs = dpo.held_out_pairs(Scripted(three_terms, two_terms), prefer=3)
    targets = [read(chosen)[0] for chosen in pairs[:, 0]]
    assert targets == list(np.repeat(data.HELD_OUT, 10))


# Training.


def no_report(row, policy, pairs):
    """A report that does nothing."""


def fixed_pairs(policy, step, world, rng, rounds=(PAIRS,)):
    """A source of pairs: `rounds`, again and again."""
    return rounds[step % len(rounds)]


def train(make_pairs=fixed_pairs, rounds=3, report=no_report, policy=None, lr=1e-3):
    """A run in this process: its history."""
    policy = model_of_the_task() if policy is None else policy
    reference = model_of_the_task()
    return dpo.train(World(), policy, reference, make_pairs, report, rounds, 0.8, lr, seed=0)


def test_training_starts_at_ln_2():
    """Policy and reference are the same model, so every margin is 0."""
    first = train()[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0


def test_the_margin_rises_and_the_loss_falls():
    history = train(rounds=12)[1:]
    assert (np.diff([row["rewards/margins"] for row in history]) > 0).all()
    assert (np.diff([row["loss"] for row in history]) < 0).all()


def test_the_history_has_a_row_for_each_round_and_one_from_before():
    history = train(rounds=2)
    assert history[0] == {"round": 0, "pairs": 0}
    assert [(row["round"], row["pairs"]) for row in history[1:]] == [(1, 2), (2, 2)]
    assert all(list(row) == ["round", "pairs", *dpo.LOGGED] for row in history[1:])


def test_the_policy_is_trained_in_place_and_the_reference_left_alone():
    policy, reference = model_of_the_task(), model_of_the_task()
    before = weights(reference)
    dpo.train(World(), policy, reference, fixed_pairs, no_report, 3, 0.8, 1e-3, 0)
    assert np.array_equal(weights(reference), before)
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert (weights(policy) != before).mean() > 0.9


def test_the_learning_rate_rises_for_ten_rounds_and_falls_to_almost_nothing(monkeypatch):
    rates = []
    step = dpo.Adam.step

    def record_and_step(optimizer):
        rates.append(optimizer.lr)
        step(optimizer)

    monkeypatch.setattr(dpo.Adam, "step", record_and_step)
    train(rounds=30, lr=0.01)
    np.testing.assert_allclose(rates[:10], np.linspace(0.001, 0.01, 10))
    assert (np.diff(rates[10:]) < 0).all() and rates[-1] < 0.001


def test_gradients_are_clipped(monkeypatch):
    """To a joint norm of 1, over all parameters."""
    norms = []
    step = dpo.Adam.step

    def record_and_step(optimizer):
        squares = sum(np.square(parameter.grad).sum() for parameter in optimizer.parameters)
        norms.append(math.sqrt(squares))
        step(optimizer)

    monkeypatch.setattr(dpo.Adam, "step", record_and_step)
    train()
    np.testing.assert_allclose(norms, 1, rtol=1e-4)


def test_rounds_without_pairs_are_skipped():
    history = train(functools.partial(fixed_pairs, rounds=[NO_PAIRS, PAIRS, NO_PAIRS]))
    assert [row["pairs"] for row in history] == [0, 0, 2, 0]
    assert history[1] == {"round": 1, "pairs": 0}
    assert history[2]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # no step before it


def test_a_round_without_pairs_moves_no_weight():
    policy = model_of_the_task()
    train(functools.partial(fixed_pairs, rounds=[NO_PAIRS]), policy=policy)
    assert np.array_equal(weights(policy), weights(model_of_the_task()))


def test_ten_rounds_in_a_row_without_a_pair_end_training():
    almost = [NO_PAIRS] * (dpo.PATIENCE - 1)
    rounds = [*almost, PAIRS, *almost, NO_PAIRS, PAIRS]
    history = train(functools.partial(fixed_pairs, rounds=rounds), rounds=99)
    assert [row["pairs"] for row in history[1:]] == [0] * 9 + [2] + [0] * 10


def test_a_loss_that_is_not_finite_ends_training_with_advice():
    policy = model_of_the_task()
    policy.parameters()[0].data[:] = np.nan
    with pytest.raises(cli.UserError, match="loss nan in round 1; try a lower --lr"):
        train(policy=policy)


class Recorder:
    """A report that keeps what it hears, and adds a note to every row."""

    def __init__(self):
        self.rows, self.weights, self.pairs = [], [], []

    def __call__(self, row, policy, pairs):
        assert multiprocessing.parent_process() is None  # this is rank 0
        row["note"] = f"after round {row['round']}"
        self.rows.append(row)
        self.weights.append(weights(policy))
        self.pairs.append(pairs)


def test_the_report_hears_of_the_time_before_the_first_step_and_of_every_round():
    policy, report = model_of_the_task(), Recorder()
    history = train(rounds=2, report=report, policy=policy)
    assert report.rows == history
    assert np.array_equal(report.weights[0], weights(model_of_the_task()))
    assert not np.array_equal(report.weights[1], report.weights[2])
    assert np.array_equal(report.weights[2], weights(policy))
    assert report.pairs[0] is None
    assert np.array_equal(report.pairs[1:], [PAIRS, PAIRS])


def test_what_the_report_adds_to_a_row_is_in_the_history():
    history = train(rounds=2, report=Recorder())
    assert [row["note"] for row in history] == ["after round 0", "after round 1", "after round 2"]


# Several processes. Each finds some of the pairs of a round, in one of them none: round 1 leaves
# the last process without pairs, round 2 rank 0, and in round 3 nobody finds one.

MANY_PAIRS = dpo.rule_pairs(None, 0, World(), np.random.default_rng(0), [0, 70], prefer=3)
DEALT = [
    [MANY_PAIRS[:30], MANY_PAIRS[30:], NO_PAIRS],
    [NO_PAIRS, MANY_PAIRS[:1], MANY_PAIRS[1:]],
    [NO_PAIRS, NO_PAIRS, NO_PAIRS],
]


def dealt_pairs(policy, step, world, rng):
    """This process's part of DEALT; in a process alone, all parts of the round."""
    if world.world_size == 1:
        return np.concatenate(DEALT[step])
    return DEALT[step][world.rank]


def train_and_compare(world, policy, report):
    """What every process runs: training, then a look at whether all have the same weights."""
    reference = model_of_the_task()
    history = dpo.train(world, policy, reference, dealt_pairs, report, 3, 0.8, 1e-3, 0)
    mine = np.zeros((world.world_size, weights(policy).size))
    mine[world.rank] = weights(policy)
    of_all = world.all_reduce(mine)
    assert (of_all == of_all[0]).all()
    return history


@pytest.fixture(scope="module")
def three_processes():
    """A run in three processes: policy, report and history."""
    policy, report = model_of_the_task(), Recorder()
    history = launch(3, train_and_compare, policy, report)
    return policy, report, history


def test_a_process_without_a_pair_changes_nothing_in_the_result(three_processes):
    """It takes part with zeros: three processes train as one with all pairs does."""
    policy, _, history = three_processes
    policy_of_one = model_of_the_task()
    history_of_one = train(dealt_pairs, policy=policy_of_one, report=Recorder())
    assert [row["pairs"] for row in history] == [0, 70, 70, 0]
    for row, row_of_one in zip(history, history_of_one, strict=True):
        assert row.pop("note") == row_of_one.pop("note")
        assert row == pytest.approx(row_of_one, abs=1e-4)
    np.testing.assert_allclose(weights(policy), weights(policy_of_one), atol=1e-5)


def test_only_rank_0_reports(three_processes):
    """In another process Recorder would have raised."""
    _, report, history = three_processes
    assert report.rows == history and len(report.rows) == 4


def pairs_that_compare_random_numbers(policy, step, world, rng):
    """A source of pairs that looks at the next random number of every process."""
    numbers = np.zeros(world.world_size)
    numbers[world.rank] = rng.random()
    numbers = world.all_reduce(numbers)
    assert len(set(numbers)) == world.world_size
    assert data.random_stream(0, "SFT lines").random() not in numbers
    assert np.random.default_rng(0).random() not in numbers
    return PAIRS


def test_every_process_makes_its_pairs_from_random_numbers_of_its_own():
    """They are not those of SFT's lines either, nor those of the initial weights."""
    model, make_pairs = model_of_the_task(), pairs_that_compare_random_numbers
    launch(2, dpo.train, model, model_of_the_task(), make_pairs, no_report, 1, 0.8, 1e-3, 0)
