"""The metrics against their definitions; sampling for them; the table; credit by token."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

import data
import eval as evaluation
from helpers import answer, model_of_the_task as model, seeds, sums, text_of
from sft import completion_logps


@given(st.lists(st.tuples(sums, st.booleans()), min_size=1, max_size=12), st.integers(2, 5))
def test_the_metrics_are_their_definitions(answers, prefer):
    lines = [answer(*line)[: None if ended else -1] for line, ended in answers]
    parsed = [line for line, ended in answers if ended]
    n, sizes = len(answers), [len(terms) for _, terms in parsed]
    right = [len(terms) for target, terms in parsed if sum(terms) == target]
    errors = [abs(sum(terms) - target) for target, terms in parsed]
    assert evaluation.metrics(lines, prefer) == {
        "n": n,
        "format": len(parsed) / n,
        "exact": len(right) / n,
        "preferred": sizes.count(prefer) / n,
        "both": right.count(prefer) / n,
        "mean_abs_error": np.mean(errors) if errors else None,
        "counts": {str(k): sizes.count(k) for k in {2, 3, 4, 5, *sizes}},
        "shares": dict(
            zip(
                data.OUTCOMES,
                (
                    right.count(prefer) / n,
                    (len(right) - right.count(prefer)) / n,
                    (len(parsed) - len(right)) / n,
                    (n - len(parsed)) / n,
                ),
            )
        ),
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_answers_every_target_in_its_place(temperature):
    targets = [5, 100, 42] * 200  # more than one chunk
    lines = evaluation.sample(model(), targets, temperature, np.random.default_rng(0))
    for target, line in zip(targets, lines, strict=True):
        prompt = data.encode(f"{target}=")
        assert line[: len(prompt)] == prompt and len(prompt) < len(line) <= data.MAX_LEN
        assert line[-1] == data.END or len(line) == data.MAX_LEN
    if temperature == 0:
        assert lines[0] == [5, data.EQUALS] + model().generate([[5, data.EQUALS]], 22)[0]
    n = evaluation.CHUNK // 3 * 3  # every chunk draws its own numbers
    assert (lines[: 600 - n] == lines[n:]) == (temperature == 0)


def test_the_rows_of_an_evaluation(monkeypatch):
    rows = evaluation.evaluate({"a": model(0), "b": model(1)}, 3, 2, 4, 0.5)
    places = [(mode, which) for mode in ("greedy", "sampled") for which in ("held-out", "all")]
    assert [(row["checkpoint"], row["mode"], row["targets"]) for row in rows] == [
        (name, *place) for name in "ab" for place in places
    ]
    lines = evaluation.sample(
        model(1), np.repeat(data.HELD_OUT, 4).tolist(), 0.5, np.random.default_rng(3)
    )
    assert rows[6] == {**rows[6], **evaluation.metrics(lines, 2)}
    asked = []
    monkeypatch.setattr(
        evaluation,
        "sample",
        lambda _, targets, *temperature_and_rng: (
            asked.append((len(targets), *temperature_and_rng))
            or [answer(target, [1, 1, 1]) for target in targets]
        ),
    )
    assert [row["preferred"] for row in evaluation.evaluate({"": None})] == [1] * 4
    assert [(n, t) for n, t, _ in asked] == [(20, 0), (96, 0), (1000, 1), (4800, 1)]
    assert {rng.random() for *_, rng in asked} == {np.random.default_rng(0).random()}


def test_the_table_says_what_the_rows_say():
    row = {
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
    header, first, second = evaluation.table([row, {**row, "mean_abs_error": None}]).splitlines()
    assert first.split() == "a greedy all 1,200 0.125 0.500 0.250 0.750 1.23 10 25 20 15".split()
    assert second.split()[8] == "-"
    for name, value in ("both", "0.125"), ("error", "1.23"), ("  3", " 25"):  # columns line up
        assert header.rindex(name) + len(name) == first.rindex(value) + len(value)


def test_answers_to_a_prompt_the_greedy_one_first(monkeypatch):
    rows = evaluation.answers_to(model(), 42, 3, 0.5, seed=1)
    assert [row["mode"] for row in rows] == ["greedy", "sampled", "sampled", "sampled"]
    assert rows[0]["answer"] == data.decode(evaluation.sample(model(), [42], 0.0, None)[0])
    assert rows == evaluation.answers_to(model(), 42, 3, 0.5, 1, 3)
    assert rows != evaluation.answers_to(model(), 42, 3, 0.5, seed=2)
    assert evaluation.answers_to(model(), 42, 9) == evaluation.answers_to(model(), 42, 9, 1.0, 0)
    for terms, prefer, total, outcome in (
        ([40, 2], 3, 42, "right, not preferred"),
        ([40, 2], 2, 42, "right, preferred"),
        ([40, 3], 3, 43, "wrong sum"),
        ([], 3, None, "does not parse"),
    ):
        monkeypatch.setattr(evaluation, "sample", lambda model, targets, *_: [answer(42, terms)])
        row, text = evaluation.answers_to(None, 42, 1, prefer=prefer)[0], text_of(42, terms)
        assert row == {"mode": "greedy", "answer": text, "sum": total, "outcome": outcome}
        line = evaluation.ANSWER.format(**row)
        assert line.split() == f"greedy {text} sum {total} {outcome}".split()


@given(sums, st.floats(0.1, 3), seeds)
def test_credit_is_one_number_for_each_token_and_adds_up_to_the_reward(line, beta, seed):
    ids, models = answer(*line), [model(seed), model(seed + 1)]
    found = evaluation.credit(*models, ids, beta)
    policy, reference = (completion_logps(m, np.array([ids])).item() for m in models)
    assert [token for token, _ in found["tokens"]] == [*text_of("", line[1])[1:], "<end>"]
    total = sum(value for _, value in found.pop("tokens"))
    reward = pytest.approx(beta * (policy - reference), abs=1e-4)
    assert total == reward and found == {
        "line": text_of(*line),
        "policy_logp": pytest.approx(policy, abs=1e-4),
        "reference_logp": pytest.approx(reference, abs=1e-4),
        "reward": reward,
    }
