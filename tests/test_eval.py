"""Sampling, the metrics against their definitions, the table, answers to a prompt, credit."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

import cli
import data
import eval as evaluation
from helpers import answer, model_of_the_task, save_model, seeds, sums, text_of
from sft import completion_logps

# Sampling.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_answers_every_target_in_its_place(monkeypatch, temperature):
    monkeypatch.setattr(evaluation, "CHUNK", 7)  # so that there are many chunks
    targets = [5, 100, 42] * 10
    rng = np.random.default_rng(0)
    lines = evaluation.sample(model_of_the_task(), targets, temperature, rng)
    assert len(lines) == len(targets)
    for target, line in zip(targets, lines):
        prompt = data.encode(f"{target}=")
        assert line[: len(prompt)] == prompt and len(line) > len(prompt)


def test_an_answer_stops_at_its_end_token_or_at_the_longest_length():
    targets = list(data.TARGETS) * 3
    lines = evaluation.sample(model_of_the_task(), targets, 1.0, np.random.default_rng(0))
    assert any(len(line) == data.MAX_LEN for line in lines)
    for line in lines:
        assert len(line) <= data.MAX_LEN
        assert line[-1] == data.END or len(line) == data.MAX_LEN
        assert data.END not in line[:-1]


def test_a_greedy_sample_is_the_likeliest_continuation():
    model = model_of_the_task()
    prompt = data.encode("5=")
    completion = model.generate([prompt], data.MAX_LEN - len(prompt))[0]
    assert evaluation.sample(model, [5], 0.0, None) == [prompt + completion]


def test_every_chunk_draws_random_numbers_of_its_own(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 30)
    rng = np.random.default_rng(0)
    lines = evaluation.sample(model_of_the_task(), [42] * 60, 1.0, rng)
    assert lines[:30] != lines[30:]


# Metrics.

answers_and_their_ends = st.lists(st.tuples(sums, st.booleans()), min_size=1, max_size=12)


@given(answers_and_their_ends, st.integers(2, 5))
def test_the_shares_are_their_definitions(answers, prefer):
    """An answer without an end token does not parse."""
    lines = [answer(*line) if has_end else answer(*line)[:-1] for line, has_end in answers]
    parsed = [line for line, has_end in answers if has_end]
    right = [terms for target, terms in parsed if sum(terms) == target]
    preferred = [terms for _, terms in parsed if len(terms) == prefer]
    both = [terms for terms in right if len(terms) == prefer]
    n = len(lines)

    found = evaluation.metrics(lines, prefer)
    assert found["n"] == n
    assert found["format"] == len(parsed) / n
    assert found["exact"] == len(right) / n
    assert found["preferred"] == len(preferred) / n
    assert found["both"] == len(both) / n
    assert found["shares"] == {
        "right, preferred": len(both) / n,
        "right, not preferred": (len(right) - len(both)) / n,
        "wrong sum": (len(parsed) - len(right)) / n,
        "does not parse": (n - len(parsed)) / n,
    }


@given(answers_and_their_ends)
def test_answers_are_counted_by_their_number_of_terms(answers):
    lines = [answer(*line) if has_end else answer(*line)[:-1] for line, has_end in answers]
    sizes = [len(terms) for (_, terms), has_end in answers if has_end]
    expected = {str(count): sizes.count(count) for count in {2, 3, 4, 5, *sizes}}
    assert evaluation.metrics(lines)["counts"] == expected


def test_right_and_wrong_answers_by_their_number_of_terms():
    lines = [
        answer(7, [3, 4]),
        answer(7, [3, 5]),
        answer(7, [4, 5]),
        answer(7, [1, 2, 4]),
        answer(7, [7]),
        answer(7, [3, 4])[:-1],  # does not parse, and so is left out
        answer(7, []),
        answer(7, [1, 1, 1, 1, 1, 1]),
    ]
    assert evaluation.metrics(lines)["answers"] == {
        "1": {"right": 1 / 8, "wrong": 0},
        "2": {"right": 1 / 8, "wrong": 2 / 8},
        "3": {"right": 1 / 8, "wrong": 0},
        "4": {"right": 0, "wrong": 0},
        "5": {"right": 0, "wrong": 0},
        "6": {"right": 0, "wrong": 1 / 8},
    }


@given(st.lists(sums, min_size=1, max_size=12))
def test_the_error_is_the_mean_distance_from_the_target(answers):
    lines = [answer(*line) for line in answers] + [[data.END]]
    errors = [abs(sum(terms) - target) for target, terms in answers]
    assert evaluation.metrics(lines)["mean_abs_error"] == pytest.approx(np.mean(errors))


def test_where_nothing_parses_there_is_no_error():
    assert evaluation.metrics([[data.END]])["mean_abs_error"] is None


# Evaluation and its table.


def test_an_evaluation_has_four_rows_for_each_model_in_their_order():
    models = {"a": model_of_the_task(0), "b": model_of_the_task(1)}
    rows = evaluation.evaluate(models, samples=2)
    modes_and_targets = [
        ("greedy", "held-out"),
        ("greedy", "all"),
        ("sampled", "held-out"),
        ("sampled", "all"),
    ]
    expected = [(name, *place) for name in "ab" for place in modes_and_targets]
    assert [(row["checkpoint"], row["mode"], row["targets"]) for row in rows] == expected
    assert [row["n"] for row in rows] == [20, 96, 40, 192] * 2


def test_a_row_of_an_evaluation_holds_the_metrics_of_its_sample():
    model = model_of_the_task()
    row = evaluation.evaluate({"": model}, seed=3, prefer=2, samples=4, temperature=0.5)[2]
    targets = np.repeat(data.HELD_OUT, 4)
    lines = evaluation.sample(model, targets, 0.5, data.random_stream(3, "answers"))
    expected = evaluation.metrics(lines, prefer=2)
    assert {name: row[name] for name in expected} == expected


def test_an_evaluation_takes_fifty_answers_of_temperature_1_unless_told_otherwise(monkeypatch):
    asked = []

    def sample(model, targets, temperature, rng):
        asked.append((len(targets), temperature))
        return [answer(target, [1, 1, 1]) for target in targets]

    monkeypatch.setattr(evaluation, "sample", sample)
    rows = evaluation.evaluate({"": None})
    assert asked == [(20, 0), (96, 0), (20 * 50, 1), (96 * 50, 1)]
    assert [row["preferred"] for row in rows] == [1, 1, 1, 1]  # three terms


ROW = {
    "checkpoint": "a",
    "mode": "greedy",
    "targets": "all",
    "n": 1200,
    "both": 0.125,
    "mean_abs_error": 1.234,
    "exact": 0.5,
    "format": 0.75,
    "preferred": 0.25,
    "counts": {"1": 60, "2": 120, "3": 300, "4": 240, "5": 180},
}


def test_the_table_says_what_the_rows_say():
    header, line = evaluation.table([ROW]).splitlines()
    expected = "a greedy all 1,200 0.125 0.500 0.250 0.750 1.23 10 25 20 15"
    assert line.split() == expected.split()


@pytest.mark.parametrize("name, value", [("both", "0.125"), ("error", "1.23"), ("  3", " 25")])
def test_the_columns_of_the_table_line_up(name, value):
    header, line = evaluation.table([ROW]).splitlines()
    assert header.rindex(name) + len(name) == line.rindex(value) + len(value)


def test_the_table_shows_that_there_is_no_error():
    line = evaluation.table([ROW | {"mean_abs_error": None}]).splitlines()[1]
    assert line.split()[8] == "-"


# Answers to a prompt.


def test_the_first_answer_to_a_prompt_is_the_greedy_one():
    model = model_of_the_task()
    rows = evaluation.answers_to(model, 42, samples=3)
    assert [row["mode"] for row in rows] == ["greedy", "sampled", "sampled", "sampled"]
    greedy = evaluation.sample(model, [42], 0.0, None)[0]
    assert rows[0]["answer"] == data.decode(greedy)


def test_answers_to_a_prompt_repeat_with_their_seed():
    model = model_of_the_task()
    rows = evaluation.answers_to(model, 42, 3, seed=1)
    assert rows == evaluation.answers_to(model, 42, 3, seed=1)
    assert rows != evaluation.answers_to(model, 42, 3, seed=2)


@pytest.mark.parametrize(
    "terms, prefer, total, outcome",
    [
        ([40, 2], 3, 42, "right, not preferred"),
        ([40, 2], 2, 42, "right, preferred"),
        ([40, 3], 3, 43, "wrong sum"),
        ([], 3, None, "does not parse"),
    ],
)
def test_an_answer_to_a_prompt_comes_with_sum_and_outcome(
    monkeypatch, terms, prefer, total, outcome
):
    monkeypatch.setattr(evaluation, "sample", lambda model, *rest: [answer(42, terms)])
    row = evaluation.answers_to(None, 42, samples=0, prefer=prefer)[0]
    text = text_of(42, terms)
    assert row == {"mode": "greedy", "answer": text, "sum": total, "outcome": outcome}
    line = evaluation.ANSWER_FORMAT.format(**row)
    assert line.split() == f"greedy {text} sum {total} {outcome}".split()


# Credit by token.


@given(sums, st.floats(0.1, 3), seeds)
def test_the_credit_of_the_tokens_adds_up_to_the_reward(line, beta, seed):
    ids = answer(*line)
    policy, reference = model_of_the_task(seed), model_of_the_task(seed + 1)
    policy_logp = completion_logps(policy, np.array([ids])).item()
    reference_logp = completion_logps(reference, np.array([ids])).item()

    found = evaluation.credit(policy, reference, ids, beta)
    assert found["line"] == text_of(*line)
    assert found["policy_logp"] == pytest.approx(policy_logp, abs=1e-4)
    assert found["reference_logp"] == pytest.approx(reference_logp, abs=1e-4)
    assert found["reward"] == pytest.approx(beta * (policy_logp - reference_logp), abs=1e-4)
    total = sum(reward for _, reward in found["tokens"])
    assert total == pytest.approx(found["reward"], abs=1e-4)


def test_credit_is_given_to_every_token_of_the_completion():
    model = model_of_the_task()
    found = evaluation.credit(model, model, answer(52, [18, 34]), beta=0.8)
    assert [token for token, _ in found["tokens"]] == ["1", "8", "+", "3", "4", "<end>"]


def test_the_credit_of_a_token_depends_on_nothing_that_comes_after_it():
    policy, reference = model_of_the_task(0), model_of_the_task(1)
    short = evaluation.credit(policy, reference, answer(52, [18, 34]), beta=0.8)
    long = evaluation.credit(policy, reference, answer(52, [18, 34, 7]), beta=0.8)
    for (token, reward), (same_token, same_reward) in zip(short["tokens"][:5], long["tokens"]):
        assert token == same_token and reward == pytest.approx(same_reward, abs=1e-4)


# Loading.


def test_a_checkpoint_that_is_missing_is_named(tmp_path):
    with pytest.raises(cli.UserError, match="no checkpoint at .*none.npz; .*python sft.py"):
        evaluation.load(tmp_path / "none.npz")


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    path = save_model(tmp_path / "other.npz", vocab_size=30)
    with pytest.raises(cli.UserError, match="other.npz is of another task"):
        evaluation.load(path)
