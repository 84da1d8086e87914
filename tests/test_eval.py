"""The metrics against their definitions; sampling for them; credit by token."""
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import cli
import data
import eval as evaluation
import plots
from helpers import seeds
from sft import completion_logps
from transformer import Config, Transformer


def model(seed=0):
    return Transformer(Config(len(data.VOCAB), 8, 1, 2, 8, data.MAX_LEN), seed)


def answer(target, terms, ended=True):
    return data.prompt(target) + data.encode("+".join(map(str, terms))) + [data.END] * ended


term_lists = st.lists(st.integers(0, 99), min_size=1, max_size=7)
answers = (st.tuples(st.integers(5, 100), term_lists, st.booleans())
           | term_lists.map(lambda terms: (sum(terms), terms, True)))  # right ones


@given(st.lists(answers, min_size=1, max_size=12), st.integers(2, 5))
def test_the_metrics_are_their_definitions(several, prefer):
    found = evaluation.metrics([answer(*one) for one in several], prefer)
    parsed = [(target, terms) for target, terms, ended in several if ended]
    n = len(several)
    assert found["n"] == n
    assert found["format"] == len(parsed) / n
    assert found["exact"] == sum(sum(terms) == target for target, terms in parsed) / n
    assert found["preferred"] == sum(len(terms) == prefer for _, terms in parsed) / n
    errors = [abs(sum(terms) - target) for target, terms in parsed]
    assert found["mean_abs_error"] == (np.mean(errors) if errors else None)
    sizes = [len(terms) for _, terms in parsed]
    assert found["counts"] == {str(k): sizes.count(k) for k in {2, 3, 4, 5, *sizes}}
    assert sum(found["counts"].values()) == len(parsed)


@given(st.lists(answers, min_size=1, max_size=8), st.data())
def test_the_order_of_the_answers_does_not_matter(several, draw):
    lines = [answer(*one) for one in several]
    shuffled = draw.draw(st.permutations(lines))
    assert evaluation.metrics(lines) == evaluation.metrics(shuffled)


def test_three_terms_are_preferred_unless_another_number_is_named():
    lines = [answer(10, [5, 5]), answer(10, [3, 3, 4]), answer(10, [1, 9])]
    assert evaluation.metrics(lines)["preferred"] == 1 / 3
    assert evaluation.metrics(lines, 2)["preferred"] == 2 / 3


@given(st.lists(answers, min_size=1, max_size=12), st.integers(2, 5))
def test_the_kinds_of_answers_are_what_the_metrics_count(several, prefer):
    lines = [answer(*one) for one in several]
    kinds = [evaluation.kind(line, prefer) for line in lines]
    found, n = evaluation.metrics(lines, prefer), len(lines)
    assert set(kinds) <= set(plots.KINDS)
    assert kinds.count("does not parse") == n - sum(found["counts"].values())
    right = [line for line, kind in zip(lines, kinds) if kind.startswith("right")]
    assert len(right) / n == found["exact"]
    if right:
        liked = kinds.count("right, preferred") / len(right)
        assert liked == evaluation.metrics(right, prefer)["preferred"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_answers_every_target_in_its_place(temperature):
    targets = [5, 100, 42] * 100  # more than one chunk
    lines = evaluation.sample(model(), targets, temperature, np.random.default_rng(0))
    assert len(lines) == len(targets)
    for target, line in zip(targets, lines):
        prompt = data.prompt(target)
        assert line[:len(prompt)] == prompt and len(line) > len(prompt)
        assert (data.END in line) == (line[-1] == data.END)
        assert line[-1] == data.END or len(line) == data.MAX_LEN


@given(seeds)
def test_the_number_of_processes_does_not_change_a_sample(map_fn, seed):
    targets = [7, 77, 100] * (evaluation.CHUNK // 2)
    alone = evaluation.sample(model(), targets, 1.0, np.random.default_rng(seed))
    assert evaluation.sample(model(), targets, 1.0, np.random.default_rng(seed), map_fn) == alone
    chunk = evaluation.CHUNK  # nor do two chunks get the same random numbers
    assert alone[:chunk // 3 * 3] != (alone[chunk:] * 3)[:chunk // 3 * 3]


def test_a_greedy_sample_is_what_the_model_generates():
    targets = [5, 50, 100]
    lines = evaluation.sample(model(), targets, 0.0, np.random.default_rng(0))
    for target, line in zip(targets, lines):
        prompt = data.prompt(target)
        new, = model().generate([prompt], data.MAX_LEN - len(prompt))
        assert line == prompt + new


def test_the_rows_of_an_evaluation():
    rows = evaluation.evaluate(model(), seed=3, prefer=2, answers=4)
    assert [(row["mode"], row["targets"], row["n"]) for row in rows] == [
        ("greedy", "held-out", 20), ("greedy", "all", 96),
        ("sampled", "held-out", 80), ("sampled", "all", 384)]
    targets = [target for target in data.HELD_OUT for _ in range(4)]
    lines = evaluation.sample(model(), targets, 1.0, np.random.default_rng(3))
    assert rows[2] == {"mode": "sampled", "targets": "held-out", **evaluation.metrics(lines, 2)}
    greedy = evaluation.sample(model(), data.HELD_OUT, 0.0, np.random.default_rng(3))
    assert rows[0] == {"mode": "greedy", "targets": "held-out", **evaluation.metrics(greedy, 2)}


def test_what_an_evaluation_asks_for(monkeypatch):
    """50 answers at temperature 1, three terms preferred, on the pool that is given."""
    asked, pool = [], object()

    def sample(model, targets, temperature, rng, map_fn):
        asked.append((len(targets), temperature, map_fn))
        return [answer(target, [1, 1, target - 2]) for target in targets]
    monkeypatch.setattr(evaluation, "sample", sample)
    rows = evaluation.evaluate(None, 0, map_fn=pool)
    assert asked == [(20, 0.0, pool), (96, 0.0, pool), (1000, 1.0, pool), (4800, 1.0, pool)]
    assert [row["preferred"] for row in rows] == [1, 1, 1, 1]
    assert evaluation.evaluate(None, 0, 2, pool)[0]["preferred"] == 0
    evaluation.evaluate(None, 0, answers=3, temperature=0.5)
    assert asked[-1][:2] == (288, 0.5)


def test_the_table_says_what_the_rows_say():
    row = {"checkpoint": "a.npz", "mode": "greedy", "targets": "all", "n": 1200,
           "mean_abs_error": 1.234, "exact": 0.5, "format": 0.75, "preferred": 0.25,
           "counts": {"1": 60, "2": 120, "3": 300, "4": 240, "5": 180}}
    header, first, second = evaluation.table([row, {**row, "mean_abs_error": None}]).splitlines()
    assert first.split() == ["a.npz", "greedy", "all", "1,200", "1.23", "0.500", "0.750", "0.250",
                             "10", "25", "20", "15"]
    assert second.split()[4] == "-"
    assert header.index("mode") == first.index("greedy")  # the columns line up
    assert header.index("preferred") + len("preferred") == first.index("0.250") + len("0.250")


def test_answers_to_a_prompt_the_greedy_one_first():
    rows = evaluation.answers_to(model(), 42, samples=3, seed=1)
    assert [row["mode"] for row in rows] == ["greedy", "sampled", "sampled", "sampled"]
    greedy, = evaluation.sample(model(), [42], 0.0, np.random.default_rng(0))
    assert rows[0]["answer"] == data.decode(greedy)
    assert all(row["answer"].startswith("42=") for row in rows)
    assert rows == evaluation.answers_to(model(), 42, samples=3, seed=1)
    assert rows != evaluation.answers_to(model(), 42, samples=3, seed=2)
    assert evaluation.answers_to(model(), 42, 9) == evaluation.answers_to(model(), 42, 9, 1.0, 0)


@pytest.mark.parametrize("terms, ended, total, right", [
    ([40, 2], True, 42, True), ([40, 3], True, 43, False), ([40, 2], False, None, False)])
def test_an_answer_is_shown_with_its_sum_and_a_mark(monkeypatch, terms, ended, total, right):
    line = answer(42, terms, ended)
    monkeypatch.setattr(evaluation, "sample", lambda model, targets, *rest: [line] * len(targets))
    row = evaluation.answers_to(None, 42, 1)[0]
    assert (row["sum"], row["right"]) == (total, right)
    shown = evaluation.shown(row)
    assert data.decode(answer(42, terms)) in shown
    assert shown.split()[-1] == ("right" if right else "wrong")
    assert (f"sum {total}" if total else "no sum") in shown


@given(st.integers(5, 100), st.lists(st.integers(0, 99), min_size=1, max_size=4),
       st.floats(0.1, 3), seeds)
def test_credit_adds_up_to_the_reward(target, terms, beta, seed):
    """beta (log pi - log pi_ref) of the completion, and one number for each of its tokens."""
    line = answer(target, terms)
    policy, reference = model(seed), model(seed + 1)
    tokens = evaluation.credit(policy, reference, line, beta)
    completion = line[len(data.prompt(target)):]
    assert [token for token, _ in tokens] == [data.VOCAB[i] for i in completion]
    logps, reference_logps = (completion_logps(m, np.array([line])).item()
                              for m in (policy, reference))
    assert sum(value for _, value in tokens) == pytest.approx(beta * (logps - reference_logps),
                                                              abs=1e-4)


def test_what_load_says(tmp_path):
    for name, program in (("sft.npz", "sft"), ("dpo.npz", "dpo"), ("other.npz", "sft")):
        with pytest.raises(cli.UserError, match=f"no {program.upper()} checkpoint at .*{name}; "
                                                f"run python {program}.py first"):
            evaluation.load(tmp_path / name)
    (tmp_path / "bad.npz").write_text("?")
    with pytest.raises(cli.UserError, match="bad.npz.*train it again"):
        evaluation.load(tmp_path / "bad.npz")
    Transformer(Config(30, 8, 1, 2, 8)).save(tmp_path / "wide.npz")
    with pytest.raises(cli.UserError, match="30 tokens.*14"):
        evaluation.load(tmp_path / "wide.npz")
    model(5).save(tmp_path / "good.npz")
    loaded = evaluation.load(Path(tmp_path / "good.npz"))
    assert np.array_equal(loaded.named_parameters()["head"].data,
                          model(5).named_parameters()["head"].data)
