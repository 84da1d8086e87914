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
import lab
import loop
import seeds
import sources
import symptoms
import cli
import data
import dpo
import sft
from seeds import rounds_of_one_size
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


def test_own_pairs_hold_no_answer_made_by_rule(monkeypatch):
    asked = []

    def sample_and_judge(policy, targets, n_answers, prefer, rng):
        asked.append(len(targets))
        return [([line("9=4+4+1")], [line("9=4+5")]) for _ in targets]

    monkeypatch.setattr(dpo, "sample_and_judge", sample_and_judge)
    make_pairs = loop.own(starts=[0, 7, 40], answers=8, prefer=3)
    for rank in range(2):
        pairs = make_pairs(None, 1, World(rank, 2), np.random.default_rng(0))
        assert {data.decode(chosen) for chosen, _ in pairs} == {"9=4+4+1"}
    assert asked == [17, 16]


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
    """[(columns, experiments), ...] of all symptoms."""
    found = []
    monkeypatch.setattr(symptoms, "print_table", lambda options, *table: found.append(table))
    for symptom in symptoms.SYMPTOMS.values():
        symptom(None)
    return found


def test_the_page_shows_the_tables_that_symptoms_prints(monkeypatch):
    found = tables(monkeypatch)
    assert len(found) == 7
    for columns, experiments in found:
        assert f"| dpo.py | {' | '.join(columns)} |" in PAGE
        for experiment in experiments:
            assert f"| `{experiment.title}` |" in PAGE, experiment.title
    # A name stands for one experiment, and so does a title.
    experiments = [experiment for _, experiments in found for experiment in experiments]
    assert len({one.name for one in experiments}) == len({one.title for one in experiments})


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
    program.main(flags)
    first = capsys.readouterr().out
    program.main(flags)
    again = capsys.readouterr().out
    assert "round 3/3" not in again and first.endswith(again[-200:])
    return again


@pytest.mark.slow
def test_seeds_runs(folder, capsys):
    out = run(seeds, folder, capsys)
    assert "| DPO, the demo's recipe | sampled, held-out | " in out
    assert out.count("\n| ") == 5 and "\n   0  " in out


@pytest.mark.slow
def test_symptoms_runs(folder, capsys, monkeypatch):
    out = run(symptoms, folder, capsys, "--processes", "1")
    rows = [row for row in out.splitlines() if row.startswith("| `")]
    assert len(rows) == sum(len(experiments) for _, experiments in tables(monkeypatch))
    assert len({row.count("|") for row in rows}) > 1 and "nan" not in out


@pytest.mark.slow
@pytest.mark.parametrize("program, picture", [(beta, "beta.png"), (sources, "lesson.png")])
def test_programs_with_a_picture_run(program, picture, folder, capsys):
    flags = ["--processes", "1", "--pictures", str(folder)]
    out = run(program, folder, capsys, *flags)
    assert "both 0." in out and (folder / picture).stat().st_size > 10_000
