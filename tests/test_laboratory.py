"""The laboratory: what its loop changes, in plain numbers; every program, at reduced size."""

import functools
import json
import math
import sys

import numpy as np
import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "laboratory"))
import beta
import credit
import lab
import loop
import pairs
import rivals
import seeds
import sources
import symptoms
import theorem
import cli
import data
import dpo
import sft
from lab import rounds_of_one_size
from tinygrad_lite import AdEMAMix, Tensor, World, launch
from transformer import Config, Transformer

PAGE = (ROOT / "laboratory" / "README.md").read_text(encoding="utf-8")
SETTINGS = (0.8, 1e-2, 0)  # beta, learning rate, seed


def line(text):
    return data.encode(text) + [data.END]


def pairs_of(*texts):
    """Pairs of lines as ids (P, 2, T): chosen, rejected, chosen, ..."""
    return data.pad([line(text) for text in texts], data.MAX_LEN).reshape(-1, 2, data.MAX_LEN)


# The loss.

PAIRS = pairs_of("9=4+5", "9=9", "52=18+34", "52=18+29+4+1")
N_TOKENS = [[4, 2], [6, 10]]  # of the four completions, with their end tokens


class ByToken:
    """A model that gives each token one log-probability, whatever stands before it."""

    def __init__(self, logps):
        self.logps = np.log(np.exp(logps) / np.exp(logps).sum())  # (V,)

    def __call__(self, ids):
        return Tensor(np.repeat(self.logps[:, None], ids.size, axis=1))  # (V, B T)

    def score(self, text):
        return sum(self.logps[token] for token in line(text)[line(text).index(data.EQUALS) + 1 :])


UNIFORM = ByToken(np.zeros(len(data.VOCAB)))
UNEVEN = ByToken(np.linspace(-3.0, 0.0, len(data.VOCAB)))


def test_log_probabilities_are_divided_by_the_number_of_completion_tokens():
    np.testing.assert_array_equal(
        loop.mean_logps(np.array([-2.0, -9.0]), PAIRS[:, 0]), [-0.5, -1.5]
    )
    np.testing.assert_array_equal(loop.mean_logps(np.array([-2.0, -9.0]), PAIRS[:, 1]), [-1, -0.9])


def test_the_sft_term_is_the_mean_over_pairs_of_nats_for_each_token():
    chosen = Tensor(np.array([-2.0, -9.0]), requires_grad=True)
    term = loop.sft_term(chosen, PAIRS)
    term.backward()
    assert term.item() == 1.0  # (2 / 4 + 9 / 6) / 2
    np.testing.assert_allclose(chosen.grad, [-1 / 8, -1 / 12])
    # For a policy that thinks all 14 tokens equally likely, each token costs log 14.
    for weight in 0.0, 0.1, 10.0:
        objective = loop.PairObjective(sft_weight=weight)
        loss, log = objective(UNIFORM, UNIFORM, PAIRS, beta=0.8)
        assert loss.item() == pytest.approx(math.log(2) + weight * math.log(14))
        assert log["loss"] == loss.item()


def test_a_mean_instead_of_a_sum_in_the_loss():
    chosen = np.array([UNEVEN.score("9=4+5"), UNEVEN.score("52=18+34")])
    rejected = np.array([UNEVEN.score("9=9"), UNEVEN.score("52=18+29+4+1")])
    # The reference is uniform: -log 14 for each token, so it adds nothing to a mean.
    sums = (chosen + [4 * math.log(14), 6 * math.log(14)]) - (
        rejected + [2 * math.log(14), 10 * math.log(14)]
    )
    means = chosen / [4, 6] - rejected / [2, 10]
    for average_logps, h in (False, sums), (True, means):
        objective = loop.PairObjective(average_logps=average_logps)
        loss, log = objective(UNEVEN, UNIFORM, PAIRS, beta=0.8)
        assert loss.item() == pytest.approx(np.log(1 + np.exp(-0.8 * h)).mean())
        assert log["rewards/margins"] == pytest.approx(0.8 * h.mean())
        # The SFT term is about tokens either way.
        objective = loop.PairObjective(average_logps=average_logps, sft_weight=1.0)
        with_term, _ = objective(UNEVEN, UNIFORM, PAIRS, beta=0.8)
        assert with_term.item() - loss.item() == pytest.approx(-(chosen / [4, 6]).mean())


def test_any_loss_of_the_four_log_probabilities():
    objective = loop.PairObjective(loss=lambda chosen, *rest: -chosen.mean())
    loss, _ = objective(UNIFORM, UNIFORM, PAIRS, beta=0.8)
    assert loss.item() == pytest.approx(5 * math.log(14))  # four tokens and six


# The loop.


def tiny_model(seed=0):
    return Transformer(Config(len(data.VOCAB), d_model=8, n_layers=1, n_heads=2, d_hidden=8), seed)


def weights(model):
    return np.concatenate([parameter.data.ravel() for parameter in model.parameters()])


def say_nothing(row, policy, pairs):
    pass


def by_rule(policy, step, world, rng):
    starts = range(0, 61, 6)  # six pairs in each of ten rounds
    return dpo.rule_pairs(policy, step, world, rng, starts, prefer=3)


def history_and_weights(world, train, rounds=4, make_pairs=by_rule, reference=None):
    policy, reference = tiny_model(), reference or tiny_model()
    history = train(world, policy, reference, make_pairs, say_nothing, rounds, *SETTINGS)
    return history, weights(policy)


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_a_change_the_loop_takes_the_steps_of_dpo(world_size):
    history, after = launch(world_size, history_and_weights, dpo.train)
    same_history, same = launch(world_size, history_and_weights, loop.train)
    assert same_history == history and len(history) == 5
    np.testing.assert_array_equal(same, after)


def no_pairs(policy, step, world, rng):
    return np.empty((0, 2, data.MAX_LEN), int)


def test_without_pairs_the_loop_ends_as_that_of_dpo_does():
    history, _ = history_and_weights(World(), dpo.train, 20, no_pairs)
    assert history_and_weights(World(), loop.train, 20, no_pairs)[0] == history
    assert len(history) == 1 + dpo.PATIENCE


class Plain:
    """Gradient descent: a step that shows the size of its gradient."""

    def __init__(self, parameters, lr):
        self.parameters = parameters

    def step(self):
        for parameter in self.parameters:
            parameter.data -= parameter.grad

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


def first_step(**changes):
    train = functools.partial(loop.train, make_optimizer=Plain, **changes)
    _, after = history_and_weights(World(), train, rounds=1)
    return after - weights(tiny_model())


def test_clipping_and_the_divisor_change_the_size_of_a_step():
    step = first_step(max_norm=None)
    norm = np.linalg.norm(step)
    np.testing.assert_allclose(first_step(max_norm=norm / 2), step / 2, rtol=1e-3, atol=1e-6)
    smaller = first_step(max_norm=None, divisor=24)  # of six pairs: a quarter of their mean
    np.testing.assert_allclose(smaller, step / 4, rtol=1e-3, atol=1e-6)


def follow(policy, reference, step):
    for old, new in zip(reference.parameters(), policy.parameters()):
        old.data[...] = new.data


def test_a_reference_that_follows_the_policy_and_another_optimizer():
    train = functools.partial(loop.train, update_reference=follow, make_optimizer=AdEMAMix)
    reference = tiny_model()
    history, _ = history_and_weights(World(), train, reference=reference)
    assert [row["loss"] for row in history[1:]] == pytest.approx([math.log(2)] * 4)
    assert not np.array_equal(weights(reference), weights(tiny_model()))


def told(row, policy, pairs):
    """A report that finds more right and preferred answers from round to round."""
    row["shares"] = {data.ACCEPTED: row["round"] / 10}


def until_four_in_ten(world):
    """[last round, 1] of a run of ten rounds that is to stop at a share of 0.4, summed over
    processes: a process that goes on would answer with something else."""
    train = functools.partial(loop.train, stop=functools.partial(loop.reached, share=0.4))
    history = train(world, tiny_model(), tiny_model(), by_rule, told, 10, *SETTINGS)
    return world.all_reduce([history[-1]["round"], 1]).tolist()


def test_all_processes_stop_when_rank_0_says_so():
    assert launch(1, until_four_in_ten) == [4, 1]
    assert launch(2, until_four_in_ten) == [8, 2]
    assert not loop.reached({"round": 1}, share=0.4)  # a round that was not measured


# Pairs.


def test_pairs_are_drawn_every_so_often_and_all_used_in_between(monkeypatch):
    draws = []

    def online_pairs(policy, step, world, rng, starts, answers, prefer):
        draws.append([starts[step], starts[step + 1]])
        return np.arange(*draws[-1])  # the number of a target stands for a pair

    monkeypatch.setattr(dpo, "online_pairs", online_pairs)
    rng = np.random.default_rng(0)
    make_pairs = loop.FreshEvery(3, starts=range(0, 37, 4), answers=8, prefer=3)
    rounds = [make_pairs(None, step, World(), rng) for step in range(9)]
    assert draws == [[0, 12], [12, 24], [24, 36]]
    for draw in range(3):
        used = np.concatenate(rounds[3 * draw : 3 * draw + 3])
        assert sorted(used) == list(range(*draws[draw]))

    # Every hundred rounds: fifty rounds of pairs, which come twice, and in another order.
    draws.clear()
    make_pairs = loop.FreshEvery(100, starts=range(0, 601, 4), answers=8, prefer=3)
    rounds = [make_pairs(None, step, World(), rng) for step in range(101)]
    assert draws == [[0, 200], [400, 600]]
    first, again = np.concatenate(rounds[:50]), np.concatenate(rounds[50:100])
    assert sorted(first) == sorted(again) == list(range(200)) and list(first) != list(again)
    # Every round: as many as the round has targets, as in online DPO.
    draws.clear()
    starts = dpo.round_starts(9, 30)
    make_pairs = loop.FreshEvery(1, starts, answers=8, prefer=3)
    sizes = [len(make_pairs(None, step, World(), rng)) for step in range(9)]
    assert sizes == np.diff(starts).tolist()
    assert draws == [[start, end] for start, end in zip(starts, starts[1:])]


ANSWERS = {  # level: answers to 9
    2: "9=4+4+1",
    1: "9=4+5",
    0: "9=4+4",
}


def paired(pairing, levels):
    """[(chosen level, rejected level), ...] of answers with these levels."""
    answers = [line(ANSWERS[one]) for one in levels]
    rng = np.random.default_rng(0)
    level_of = {text: one for one, text in ANSWERS.items()}
    return [
        (level_of[data.decode(chosen)], level_of[data.decode(rejected)])
        for chosen, rejected in pairing(answers, 3, rng)
    ]


def test_how_answers_to_one_target_are_paired():
    assert [loop.level(line(text), 3) for text in ANSWERS.values()] == [2, 1, 0]
    assert loop.level(line("9=4+4+2"), 3) == 1  # wrong, with three terms
    for pairing, expected in (
        (loop.accepted_over_rejected, [(2, 0), (2, 1), (2, 1)]),
        (loop.graded, [(1, 0), (2, 1)]),
        (loop.best_over_worst, [(2, 0)]),
    ):
        assert paired(pairing, [0, 1, 2, 2, 2, 1]) == expected
        assert paired(pairing, [2, 2, 2, 2]) == []


def test_noisy_labels_are_those_of_bradley_terry():
    """Two levels of 2 each apart: sigmoid(2) one level apart, sigmoid(4) two."""
    for levels, difference in ([1, 0], 2), ([0, 2], 4):
        pairs = paired(loop.graded_with_noise, levels * 4000)
        higher = (max(levels), min(levels))
        assert set(pairs) == {higher, higher[::-1]}
        share = pairs.count(higher) / len(pairs)
        assert abs(share - 1 / (1 + math.exp(-difference))) < 0.025  # five standard errors or more


def test_fresh_pairs_are_all_of_the_policys_own_answers(monkeypatch):
    asked = []

    def sample(policy, targets, temperature, rng):
        asked.append(len(targets))
        return [line("9=4+4+1" if i % 2 else "9=4+5") for i in range(len(targets))]

    monkeypatch.setattr(loop.evaluation, "sample", sample)
    make_pairs = loop.own(starts=[0, 7, 40], answers=8, prefer=3)
    for rank in range(2):
        pairs = make_pairs(None, 1, World(rank, 2), np.random.default_rng(0))
        assert pairs.shape == (4 * asked[-1] / 8, 2, data.MAX_LEN)
        assert {data.decode(chosen) for chosen, _ in pairs} == {"9=4+4+1"}
    assert asked == [17 * 8, 16 * 8]


def test_fixed_pairs_are_sampled_once_and_come_again_when_all_are_used(monkeypatch):
    draws = []

    def sample_pairs(policy, targets, pairing, n_answers, prefer, rng):
        draws.append(len(targets))
        return np.arange(10)  # a number stands for a pair

    monkeypatch.setattr(loop, "sample_pairs", sample_pairs)
    starts = [0, 8, 16, 24]
    for rank in range(2):
        make_pairs = loop.FixedPairs(None, starts, answers=8, prefer=3, n_targets=31)
        rng = np.random.default_rng(rank)
        rounds = [make_pairs(None, step, World(rank, 2), rng) for step in range(3)]
        used = np.concatenate(rounds)
        assert len(used) == 12 and set(used) == set(range(10))
        assert sorted(used[:10]) == list(range(10)) != list(used[:10])
    assert draws == [16, 15]


# Losses that are least at a finite margin.


@pytest.mark.parametrize(
    "loss, at",
    [
        (functools.partial(loop.smoothed_loss, smoothing=0.2), math.log(0.8 / 0.2) / 0.5),
        (loop.ipo_loss, 1 / (2 * 0.5)),
    ],
)
def test_a_loss_that_is_least_at_a_finite_margin(loss, at):
    def slope(h):
        chosen = Tensor(np.array([h]), requires_grad=True)
        loss(chosen, *np.zeros((3, 1)), beta=0.5).backward()
        return chosen.grad[0]

    assert slope(at - 0.1) < -1e-3 and slope(at + 0.1) > 1e-3
    assert slope(at) == pytest.approx(0, abs=1e-9)


def test_without_smoothing_the_loss_is_that_of_dpo():
    arguments = np.random.default_rng(0).normal(size=(4, 5))
    loss = loop.smoothed_loss(*map(Tensor, arguments), beta=0.8, smoothing=0.0)
    assert loss.item() == pytest.approx(dpo.dpo_loss(*map(Tensor, arguments), beta=0.8).item())


def test_a_refreshed_reference_is_the_policy_of_that_round():
    policy, reference = tiny_model(1), tiny_model(0)
    for step in 0, 1, 2:
        loop.refresh_reference(policy, reference, step, every=3)
        assert not np.array_equal(weights(reference), weights(policy))
    loop.refresh_reference(policy, reference, 3, every=3)
    np.testing.assert_array_equal(weights(reference), weights(policy))
    policy.parameters()[0].data += 1  # which must not move the reference
    assert not np.array_equal(weights(reference), weights(policy))


# The theorem, the credit, the floor, the rivals.


def test_the_list_holds_all_right_sums_and_their_rewards():
    listed = theorem.list_answers(10, reward=2.0)
    texts = [data.decode(ids) for ids in listed.ids]
    assert len(set(texts)) == 255
    for text, reward in zip(texts, listed.rewards):
        target, terms = data.parse(text)
        assert target == sum(terms) == 10 and 2 <= len(terms) <= 5
        assert reward == (2.0 if len(terms) == 3 else 0.0)
    more = theorem.list_answers(10, reward=2.0, with_wrong_sums=True)
    judged = [data.judge([*data.encode(data.decode(ids)), data.END]) for ids in more.ids]
    assert {one.total for one in judged} == {9, 10, 11}
    for one, reward in zip(judged, more.rewards):
        assert reward == 2.0 * (len(one.terms) == 3) - 2.0 * (one.total != 10)


def test_labels_are_those_of_bradley_terry_or_sure():
    listed = theorem.list_answers(5, reward=2.0)
    preferred = listed.preferred()
    np.testing.assert_allclose(preferred + preferred.T, 1)
    a, b = listed.has_three_terms.argmax(), (~listed.has_three_terms).argmax()
    assert preferred[a, b] == pytest.approx(1 / (1 + math.exp(-2)))
    sure = theorem.list_answers(5, reward=2.0, sure=True).preferred()
    assert sure[a, b] == 1 and sure[b, a] == sure[a, a] == 0


def test_the_expected_loss_is_the_mean_of_many_drawn_pairs():
    listed = theorem.list_answers(6, reward=2.0)
    policy, reference = tiny_model(1), tiny_model(0)
    objective = theorem.ExpectedLoss(listed.preferred(), listed.has_three_terms)
    loss, log = objective(policy, reference, listed.ids, beta=0.8)

    rng = np.random.default_rng(0)
    logps = sft.completion_logps(policy, listed.ids).numpy()
    reference_logps = sft.completion_logps(reference, listed.ids).numpy()
    p_ref = np.exp(reference_logps.astype(np.float64))
    first, second = rng.choice(len(p_ref), size=(2, 200_000), p=p_ref / p_ref.sum())
    wins = rng.random(200_000) < listed.preferred()[first, second]
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    drawn = dpo.dpo_loss(
        *(Tensor(logps[one]) for one in (chosen, rejected)),
        *(Tensor(reference_logps[one]) for one in (chosen, rejected)),
        beta=0.8,
    )
    assert loss.item() == pytest.approx(drawn.item(), abs=0.01)
    assert log["listed"] == pytest.approx(np.exp(logps.astype(np.float64)).sum())


def test_slope_and_correlation_are_weighted():
    x, y = np.array([0.0, 0.0, 2.0]), np.array([1.0, 1.0, 7.0])
    assert theorem.line_through(x, y, np.array([1.0, 2.0, 5.0])) == pytest.approx((3.0, 1.0))
    # A point without weight does not count.
    outlier = theorem.line_through(np.append(x, 9.0), np.append(y, -9.0), np.array([1, 2, 5, 0]))
    assert outlier == pytest.approx((3.0, 1.0))


def test_credit_is_split_at_the_last_number():
    tokens = list(zip([*"18+29+41", "<end>"], [1.0, 2, 4, 8, 16, 32, 64, 128, 256]))
    np.testing.assert_array_equal(credit.in_three_parts(tokens), [63, 192, 256])


def test_lines_for_the_credit_are_as_far_off_as_they_should_be():
    for _, n_terms, too_high in credit.KINDS:
        judged = [data.judge(line) for line in credit.lines_of(n_terms, too_high)]
        assert {len(one.terms) for one in judged} == {n_terms}
        assert {one.total - one.target for one in judged} == set(too_high)
        assert {one.target for one in judged} <= set(data.HELD_OUT)


def divergence_of_coins(a, p):
    return np.mean(a * np.log(a / p) + (1 - a) * np.log((1 - a) / (1 - p)))


def test_the_floor_is_the_least_divergence():
    p = np.linspace(0.1, 0.4, 20)
    assert lab.floor(p, share=1.0) == pytest.approx(-np.log(p).mean())
    assert lab.floor(p, share=p.mean()) == pytest.approx(0, abs=1e-9)
    floor = lab.floor(p, share=0.6)
    assert floor < divergence_of_coins(np.full(20, 0.6), p)  # the same share for every target
    # The best shares, moved in any direction that keeps their mean, diverge more.
    rng = np.random.default_rng(0)
    shares = 1 / (1 + np.exp(-1.7) * (1 - p) / p)
    floor = lab.floor(p, share=shares.mean())
    assert floor == pytest.approx(divergence_of_coins(shares, p))
    for _ in range(20):
        move = rng.normal(size=20)
        assert divergence_of_coins(shares + 0.01 * (move - move.mean()), p) > floor


def test_advantages_of_a_group_sum_to_zero(monkeypatch):
    answers = ["9=4+4+1", "9=4+5", "9=4+5", "9=4+5"]
    groups = [[line(text) for text in answers], [line("9=4+5")] * 4]

    def sample(policy, targets, temperature, rng):
        return sum(groups, [])

    monkeypatch.setattr(rivals.evaluation, "sample", sample)
    arguments = (None, 0, World(), np.random.default_rng(0))
    settings = {"starts": [0, 2], "answers": 4, "prefer": 3}
    accepted = rivals.accepted_answers(*arguments, **settings)
    assert [(data.decode(ids), weight) for ids, weight in accepted] == [("9=4+4+1", 1.0)]
    for divide_by_std, first in (False, 0.75), (True, 0.75 / math.sqrt(3 / 16)):
        weighted = rivals.with_advantages(*arguments, divide_by_std=divide_by_std, **settings)
        assert len(weighted) == 4  # the group of equal rewards is left out
        assert [weight for _, weight in weighted] == pytest.approx([first, *[-first / 3] * 3], 1e-4)


def test_a_penalty_takes_the_log_ratio_off_the_reward():
    answers = ["9=4+4+1", "9=4+5", "9=9", "9=4+5"] * 2  # one group of eight
    rewards = [1.0, 0.0, 0.0, 0.0] * 2
    policy, reference = tiny_model(1), tiny_model(0)
    ids = data.pad([line(text) for text in answers])
    logps, reference_logps = (
        sft.completion_logps(model, ids).numpy() for model in (policy, reference)
    )
    for penalty in 0.0, 0.5:
        penalised = np.array(rewards) - penalty * (logps - reference_logps)
        expected = -((penalised - penalised.mean()) * logps).mean()
        rewarded = list(zip([line(text) for text in answers], rewards))
        loss, _ = rivals.PenalisedReinforce(penalty)(policy, reference, rewarded, beta=0.8)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_objective_of_rivals_is_the_weighted_mean():
    weighted = [(line("9=4+5"), 1.0), (line("9=9"), -0.5)]
    loss, log = rivals.WeightedAnswers()(UNIFORM, UNIFORM, weighted, beta=0.8)
    assert loss.item() == pytest.approx((4 - 0.5 * 2) / 2 * math.log(14)) == log["loss"]


# Runs that are kept, and the page.


def options_for(folder, *flags, seeds=1):
    return lab.parser("", seeds).parse_args(["--folder", str(folder), "--processes", "1", *flags])


SMALL = ["--rounds", "3", "--prompts", "16"]


def save_sft(folder):
    """A model that has learned nothing, as if sft.py had trained it."""
    tiny_model().save(folder / "sft-seed0.npz")
    facts = {"settings": {"steps": sft.parse_arguments([]).steps}, "seconds": 1.0}
    cli.write_json(folder / "sft-seed0.json", facts)


def test_a_run_that_is_there_is_read_and_one_with_other_settings_is_not_mistaken_for_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lab, "SAMPLES", 2)
    save_sft(tmp_path)
    options = options_for(tmp_path, *SMALL)
    experiment = lab.Experiment("name", "--pairs rule", "no clip", loop.train)
    facts = lab.run(options, experiment, seed=0)
    assert len(facts["history"]) == 4 and facts["sampled"]["n"] == 40
    assert facts["greedy"]["n"] == 96 and np.isfinite(facts["divergence"])

    with monkeypatch.context() as patch:
        patch.setattr(lab, "train", None)  # a second run would fail
        assert lab.run(options, experiment, seed=0) == json.loads(json.dumps(facts))
        no_clip = functools.partial(loop.train, max_norm=None)
        for other in (
            lab.Experiment("name", "--pairs rule --beta 3", "", loop.train),
            lab.Experiment("name", "--pairs rule", "", no_clip),
            lab.Experiment("name", "--pairs rule", "", loop.train, loop.own),
            lab.Experiment("name", "--pairs rule", "", loop.train, None, rounds_of_one_size),
        ):
            with pytest.raises(cli.UserError, match="other settings"):
                lab.run(options, other, seed=0)
        with pytest.raises(cli.UserError, match="rounds"):
            lab.run(options_for(tmp_path, "--prompts", "16"), experiment, seed=0)
        with pytest.raises(cli.UserError, match="sft-steps"):
            lab.sft_facts(options_for(tmp_path, "--sft-steps", "5"), seed=0)

    (tmp_path / "name-seed0.npz").unlink()  # half a run is none
    assert lab.run(options, experiment, seed=0)["history"] == facts["history"]


def test_a_run_has_rounds_as_large_as_its_experiment_says(tmp_path, monkeypatch):
    """Those of the demo are of one size, as they were when this project began."""
    monkeypatch.setattr(lab, "SAMPLES", 2)
    save_sft(tmp_path)
    assert seeds.DEMO.starts is rounds_of_one_size
    for name, starts, sizes in (
        ("demo", rounds_of_one_size, [16, 16, 16]),
        ("grows", dpo.round_starts, np.diff(dpo.round_starts(3, 16)).tolist()),
    ):
        experiment = lab.Experiment(name, "--pairs rule", starts=starts)
        history = lab.run(options_for(tmp_path, *SMALL), experiment, seed=0)["history"]
        assert [row["pairs"] for row in history] == [0, *sizes]


def test_the_model_of_sft_py_is_taken_if_it_has_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "SAMPLES", 2)
    flags = ["--steps", "3", "--d-model", "8", "--n-layers", "1", "--processes", "1"]
    sft.main([*flags, "--batch-size", "4"])
    settings = lab.read_facts(lab.SFT_PY)["settings"]
    same = vars(sft.parse_arguments([*flags, "--batch-size", "4", "--out", "other.npz"]))
    assert lab.is_run_of_sft_py(same | {"processes": 2})
    for name in "seed", "steps", "batch_size", "lr":
        assert not lab.is_run_of_sft_py(same | {name: settings[name] + 1})

    monkeypatch.setattr(lab, "is_run_of_sft_py", lambda settings: True)
    options = options_for(tmp_path / "runs", "--sft-steps", "3")
    facts = lab.sft_facts(options, seed=0)
    assert facts["sampled"]["n"] == 40 and facts["settings"]["d_model"] == 8
    taken, written = lab.sft_checkpoint(options, 0).read_bytes(), lab.SFT_PY.read_bytes()
    assert taken == written


def test_work_without_a_checkpoint_is_kept_by_its_settings(tmp_path):
    options = options_for(tmp_path)
    made = []

    def make():
        made.append("made")
        return {"number": 7}

    for _ in range(2):
        facts = lab.kept(options, "name", {"steps": 3}, make)
        assert facts == {"settings": {"steps": 3}, "number": 7} and made == ["made"]
    with pytest.raises(cli.UserError, match="other settings .steps."):
        lab.kept(options, "name", {"steps": 4}, make)


def test_settings_tell_apart_what_a_run_changes():
    def settings(experiment):
        options = options_for("nowhere")
        return lab.settings_of(options, experiment, lab.dpo_arguments(options, experiment, 0))

    weak, strong = (
        lab.Experiment("a", train=symptoms.with_sft_term(weight)) for weight in (0.1, 1.0)
    )
    often, seldom = (
        lab.Experiment("a", pairs=functools.partial(loop.FreshEvery, n)) for n in (10, 100)
    )
    even = lab.Experiment("a", starts=rounds_of_one_size)
    all_settings = [
        settings(experiment) for experiment in (lab.ONLINE, weak, strong, often, seldom, even)
    ]
    texts = {json.dumps(one) for one in all_settings}
    assert len(texts) == 6 and not any(" at 0x" in text for text in texts)
    for one in all_settings:
        assert json.loads(json.dumps(one)) == one  # as it is when it is read again


def tables(monkeypatch):
    """[(columns, titles), ...] of all symptoms, and all their experiments."""
    found, experiments = [], []

    def record(options, experiment, columns):
        experiments.append(experiment)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(symptoms, "of_seeds", record)
        patch.setattr(symptoms, "print_rows", lambda *table: found.append(table))
        for symptom in symptoms.SYMPTOMS.values():
            symptom(options_for("nowhere"))
    return [(columns, list(rows)) for columns, rows in found], experiments


def label(title):
    """How symptoms.print_rows calls a row."""
    flags, _, change = title.partition(", ")
    code = flags if flags == "(defaults)" else f"`{flags}`"
    return f"{code}, {change}" if change else code


def test_the_page_shows_the_tables_that_the_programs_print(monkeypatch):
    found, experiments = tables(monkeypatch)
    assert len(found) == len(symptoms.SYMPTOMS) == 12
    for columns, titles in found:
        assert f"| dpo.py | {' | '.join(columns)} |" in PAGE
        for title in titles:
            assert f"\n| {label(title)} |" in PAGE, title
    # A name stands for one experiment, and so does a title.
    assert len({one.name for one in experiments}) == len({one.title for one in experiments})

    for experiment in pairs.EXPERIMENTS:
        assert f"\n| {experiment.change} |" in PAGE
    for title in rivals.METHODS:
        assert f"\n| {title} (rate " in PAGE and f"\n| {title} | 0." in PAGE
    for beta_value in beta.BETAS:
        assert f"\n| {beta_value:g} |" in PAGE
    for name in credit.RUNS.values():
        for title, _, _ in credit.KINDS:
            assert f"\n| {name} | {title} |" in PAGE


def test_a_symptom_that_is_not_there_is_one_line():
    with pytest.raises(cli.UserError, match="no entry '6'"):
        symptoms.main(["6"])


# Every program, from an SFT model that is trained briefly, to a table or a picture.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("laboratory")


def run(program, folder, capsys, *flags):
    """What a program prints at reduced size, once when it runs and once when all runs are there."""
    flags = ["--folder", str(folder), *SMALL, "--sft-steps", "1500", "--seeds", "1", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "SAMPLES", 10)
        patch.setattr(lab, "MANY_SAMPLES", 160)
        program.main(flags)
        first = capsys.readouterr().out
        program.main(flags)
        again = capsys.readouterr().out
    assert "round 3/3" not in again and first.splitlines()[-1] == again.splitlines()[-1]
    return again


@pytest.mark.slow
def test_seeds_runs(folder, capsys):
    out = run(seeds, folder, capsys)
    assert "| DPO, the demo's recipe | sampled, held-out | " in out
    assert out.count("\n| ") == 5 and "\n   0  " in out


@pytest.mark.slow
def test_symptoms_runs(folder, capsys, monkeypatch):
    out = run(symptoms, folder, capsys, "--processes", "1")
    rows = [row for row in out.splitlines() if row.startswith(("| `", "| (defaults)"))]
    assert len(rows) == sum(len(titles) for _, titles in tables(monkeypatch)[0])
    assert len({row.count("|") for row in rows}) > 1 and "nan" not in out


@pytest.mark.slow
def test_pairs_runs(folder, capsys):
    out = run(pairs, folder, capsys, "--processes", "1")
    assert out.count("\n| ") == 2 + len(pairs.EXPERIMENTS) and "nan" not in out


@pytest.mark.slow
def test_the_theorem_holds_and_its_numbers_are_those_of_the_contract(folder, capsys):
    """On a model that is trained briefly, for a target with few sums."""
    lab.sft_facts(options_for(folder, "--sft-steps", "1500"), seed=0)
    flags = ["--sft", str(folder / "sft-seed0.npz"), "--target", "6", "--beta", "1"]
    capsys.readouterr()
    theorem.main([*flags, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == list(theorem.NUMBERS)
    assert abs(result["slope"] - 1) < 0.05 and result["correlation"] > 0.98
    assert abs(result["share"] - result["predicted"]) < 0.02

    theorem.main([*flags, "--pictures", str(folder)])
    assert "total probability of the listed" in capsys.readouterr().out
    assert (folder / "theorem.png").stat().st_size > 10_000
    out = run(theorem, folder, capsys, "--variants", "--target", "5", "--steps", "3")
    assert out.count("\n| ") == 12 and "nan" not in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, picture",
    [
        (beta, "beta.png"),
        (credit, "credit.png"),
        (rivals, "rivals.png"),
        (sources, "lesson.png"),
    ],
)
def test_programs_with_a_picture_run(program, picture, folder, capsys):
    flags = ["--processes", "1", "--pictures", str(folder)]
    out = run(program, folder, capsys, *flags)
    assert "0." in out and (folder / picture).stat().st_size > 10_000
