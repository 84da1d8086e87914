"""The programs, called in this process: what they write and print; a mistake costs one line."""

import contextlib
import io
import json
import os
import random
import re
import runpy
import signal
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

import cli
import data
import dpo
import eval as evaluation
import plots
import sft
from helpers import MAINS, ROOT, RULE, RUNS, TINY, save_model
from tinygrad_lite import World
from transformer import Transformer

EARLIER = b"an earlier result"


evaluate = evaluation.evaluate  # as it is before `folder` changes it


def evaluate_briefly(models, seed=0, prefer=3, samples=1, temperature=1.0):
    """The same with one answer to each target, unless told otherwise."""
    return evaluate(models, seed, prefer, samples, temperature)


def draw_nothing(numbers, path):
    """A picture that is empty."""
    path.touch()


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A folder with a checkpoint to start from and an earlier result, in which programs take a
    fraction of a second: two held-out targets, few answers, and nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "HELD_OUT", [52, 96])
    monkeypatch.setattr(evaluation, "evaluate", evaluate_briefly)
    monkeypatch.setattr(sft, "excess_nats", lambda model, targets: 0.0)
    for name in ("distribution", "dpo_training", "credit"):
        monkeypatch.setattr(plots, name, draw_nothing)
    save_model(Path("sft.npz"))
    Path("out.npz").write_bytes(EARLIER)


def assert_nothing_written(*others):
    assert set(os.listdir()) == {"sft.npz", "out.npz", *others}
    assert Path("out.npz").read_bytes() == EARLIER


def run_main(program, *flags):
    """Run a program's main() in this process."""
    MAINS[program]([str(flag) for flag in flags])


def message_of(program, *flags):
    """The one line that cli.run would print about a mistake."""
    with pytest.raises((cli.UserError, OSError)) as mistake:
        run_main(program, *flags)
    message = str(mistake.value)
    assert "\n" not in message
    return message


# Mistakes.


@pytest.mark.parametrize(
    "program, flags, hint",
    [
        ("sft", "--nonsense", "--nonsense"),
        ("sft", "--steps", "--steps"),
        ("sft", "--steps 1.5", "from 1"),
        ("sft", "--lr nan", "above 0"),
        ("sft", "--out x", "a .npz file"),
        ("sft", "--out .npz", "a .npz file"),
        ("sft", "--processes 65", "from 1 to 64"),
        ("sft", "--out out.npz --d-model 9", "multiple"),
        ("sft", "--seed 9223372036854775808", "from 0 to 9223372036854775807"),
        ("dpo", "--beta 0", "--beta: must be above 0 and below 1e30, not '0'"),
        ("dpo", "--beta 1e39", "below 1e30"),
        ("dpo", "--prefer 7", "--prefer"),
        ("dpo", "--pairs best", "--pairs"),
        ("dpo", "--answers 1", "from 2"),
        ("dpo", "--sft sft.npz --out sft.npz", "--out would overwrite --sft"),
        ("dpo", "--sft x/../sft.npz --out sft.npz", "--out would overwrite --sft"),
        ("dpo", "--out x.npz", "no checkpoint at runs/sft.npz; train with python sft.py"),
        ("eval", "missing.npz", "missing.npz"),
        ("eval", "--prompt 4", "from 5 to 100"),
        ("eval", "--samples 0", "from 1"),
        ("eval", "--temperature 0", "above 0"),
        ("eval", "--tokens 3=1+2", "100=10"),
        ("eval", "sft.npz --tokens 9=4+5", "two checkpoints"),
        ("eval", "--tokens 9=4+5 8=4+4 7=3+4", "one or two lines"),
    ],
)
def test_a_bad_flag_is_one_line_and_nothing_is_lost(capsys, program, flags, hint):
    assert hint in message_of(program, *flags.split())
    assert capsys.readouterr() == ("", "")
    assert_nothing_written()


def no_checkpoint():
    Path("odd.npz").write_text("no checkpoint", encoding="utf-8")


def truncated():
    save_model(Path("odd.npz"))
    os.truncate("odd.npz", 2000)


def of_the_first_edition():
    """Its matrices lay the other way round."""
    with np.load("sft.npz") as archive:
        arrays = {name: archive[name].T for name in archive.files}
    np.savez("odd.npz", **arrays)


def not_finite():
    with np.load("sft.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["head"][0, 0] = np.nan
    np.savez("odd.npz", **arrays)


@pytest.mark.parametrize("make", [no_checkpoint, truncated, of_the_first_edition, not_finite])
@pytest.mark.parametrize(
    "command", [["dpo", "--sft", "odd.npz", "--out", "out.npz"], ["eval", "odd.npz"]]
)
def test_a_damaged_checkpoint_is_one_line_with_its_name(make, command):
    make()
    message = message_of(*command)
    assert message.startswith("odd.npz is not a checkpoint") and "damaged" in message
    assert message.endswith("train it again, or name another file")
    assert_nothing_written("odd.npz")


@pytest.mark.parametrize(
    "command", [["dpo", "--sft", "odd.npz", "--out", "out.npz"], ["eval", "odd.npz"]]
)
def test_a_checkpoint_of_another_task_is_one_line_with_its_name(command):
    save_model(Path("odd.npz"), vocab_size=30)
    assert message_of(*command).startswith("odd.npz is of another task")
    assert_nothing_written("odd.npz")


@pytest.mark.parametrize("program", ["sft", "dpo"])
@pytest.mark.parametrize("out", ["sft.npz/x.npz", "/proc/x/y.npz"])
def test_where_saving_would_fail_nothing_is_trained(monkeypatch, program, out):
    """Below a regular file, and where the system makes no folder."""
    monkeypatch.setattr(cli, "Progress", None)  # training would fail
    message = message_of(program, *RUNS[program], "--out", out)
    assert message.startswith(f"cannot write {out}: ")
    assert message.endswith("; choose another name")
    assert_nothing_written()


def test_a_folder_cannot_take_the_name_of_a_checkpoint():
    os.mkdir("folder.npz")
    assert "a .npz file, not 'folder.npz'" in message_of("sft", "--out", "folder.npz")


def test_where_the_user_may_not_write_nothing_is_trained(monkeypatch):
    monkeypatch.setattr(cli, "Progress", None)
    os.mkdir("locked", 0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("root may write anywhere")
    message = message_of("sft", *RUNS["sft"], "--out", "locked/x.npz")
    assert "Permission denied; choose another name" in message


def spoil_step(monkeypatch, program, number):
    """Make one step of a run infinitely large."""
    module = {"sft": sft, "dpo": dpo}[program]

    def schedule(step, *_, **__):
        return np.inf if step == number else 0.0

    monkeypatch.setattr(module, "cosine_schedule", schedule)


@pytest.mark.parametrize("program, place", [("sft", "at step 2"), ("dpo", "in round 2")])
def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch, program, place):
    spoil_step(monkeypatch, program, 0)
    message = message_of(program, *RUNS[program], "--out", "out.npz")
    assert "loss" in message and "nan" in message
    assert message.endswith(f"{place}; try a lower --lr")
    assert_nothing_written()


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_weights_that_are_not_finite_are_not_written(monkeypatch, program):
    """The last step can spoil them: every loss that is looked at comes before it."""
    spoil_step(monkeypatch, program, 2)
    with np.errstate(all="ignore"):  # what follows evaluates the spoilt weights
        message = message_of(program, *RUNS[program], "--out", "out.npz")
    assert message == "out.npz was not written: infinite or NaN weights; try a lower --lr"
    assert_nothing_written()


# What a run writes and prints.


@pytest.fixture
def both_runs(capsys):
    """A run of sft.py and one of dpo.py into a new folder; what they printed."""
    run_main("sft", *TINY, "--steps", 6, "--out", "new/sft.npz")
    run_main("dpo", "--sft", "new/sft.npz", "--out", "new/dpo.npz", *RULE, "--seed", 3)
    return capsys.readouterr().out


def log_of(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_the_programs_write_checkpoints_logs_and_pictures(both_runs):
    assert set(os.listdir("new")) == {
        "sft.npz",
        "sft.json",
        "dpo.npz",
        "dpo.json",
        "dpo-dist.png",
        "dpo-training.png",
    }


def test_the_programs_say_what_they_do_and_what_comes_next(both_runs):
    for text in (
        "step 6/6",
        "wrote new/sft.npz; next: python dpo.py --beta 0.8 --sft new/sft.npz",
        "round 3/3",
        "DPO greedy   96=",
        "wrote new/dpo.npz and new/dpo.json; try: python eval.py new/dpo.npz",
    ):
        assert text in both_runs


def test_the_log_of_sft(both_runs):
    facts = log_of("new/sft.json")
    assert set(facts) == {"settings", "seconds", "metrics", "excess_nats", "history"}
    assert len(facts["history"]["loss"]) == 6
    assert len(facts["metrics"]) == 4
    assert set(facts["excess_nats"]) == {"trained", "held-out"}


def test_the_log_of_dpo(both_runs):
    facts = log_of("new/dpo.json")
    assert set(facts) == {"settings", "seconds", "metrics", "history"}
    assert facts["settings"]["seed"] == 3 and facts["settings"]["out"] == "new/dpo.npz"
    assert len(facts["metrics"]) == 8  # before and after
    assert [row["pairs"] for row in facts["history"]] == [0, *np.diff(dpo.round_starts(3, 4))]


def test_the_history_in_the_log_of_dpo(both_runs):
    for row in log_of("new/dpo.json")["history"]:
        assert {"round", "pairs", "shares", "answers"} <= set(row)
        assert set(row["shares"]) == set(data.OUTCOMES)
        assert set(row["answers"]["3"]) == {"right", "wrong"}
        assert set(dpo.LOGGED) <= set(row) or row["round"] == 0


def test_the_same_seed_writes_the_same_bytes():
    for name in "first", "second":
        run_main("sft", *RUNS["sft"], "--out", f"{name}/sft.npz")
        run_main("dpo", "--sft", f"{name}/sft.npz", *RULE, "--out", f"{name}/dpo.npz")
    for checkpoint in "sft.npz", "dpo.npz":
        assert Path("first", checkpoint).read_bytes() == Path("second", checkpoint).read_bytes()


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_training_over_an_earlier_checkpoint_says_so(capsys, program):
    run_main(program, *RUNS[program], "--out", "new.npz")
    assert "wrote new.npz" in capsys.readouterr().out
    run_main(program, *RUNS[program], "--out", "new.npz")
    printed = capsys.readouterr().out
    assert "replaced new.npz" in printed and "wrote new.npz" not in printed


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_who_may_read_a_file_stays_as_it_was(program):
    os.chmod("out.npz", 0o600)
    run_main(program, *RUNS[program], "--out", "out.npz")
    assert stat.S_IMODE(os.stat("out.npz").st_mode) == 0o600
    assert Transformer.load("out.npz")


@pytest.mark.parametrize("where", ["distribution", "dpo_training"])
def test_a_run_ends_well_although_its_pictures_fail(monkeypatch, capsys, where):
    def fail(*_):
        raise RuntimeError("no LaTeX:\nmany lines\nof its log")

    monkeypatch.setattr(plots, where, fail)
    run_main("dpo", *RUNS["dpo"], "--out", "out.npz")
    assert Transformer.load("out.npz") and log_of("out.json")["history"]
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines.count("the run is saved, but not its pictures: no LaTeX: many lines of its log") == 1
    )
    assert "many lines" not in lines


def test_a_file_keeps_its_old_content_until_the_new_one_is_complete():
    with pytest.raises(RuntimeError):
        with cli.atomic_write(Path("out.npz")) as file:
            file.write(b"half of the new")
            raise RuntimeError
    assert_nothing_written()


# Progress.


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self):
        self.now = 1000.0  # in seconds

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cli.time, "perf_counter", clock)
    return clock


def show_steps(clock, total, seconds_per_step, steps=None):
    """Show the first `steps` of a run, by default all of them. Returns their examples."""
    progress = cli.Progress("step", total)
    examples = []

    def example():
        examples.append(f"{len(examples) + 1}=1+{len(examples)}")
        return examples[-1]

    for step in range(1, (steps or total) + 1):
        clock.now += seconds_per_step
        progress.show(step, step / total, f"loss {step}.5", example)
    if steps is None:
        progress.end()
    return examples


def steps_shown(capsys):
    """The numbers of the steps that have a line."""
    numbers = re.findall("^step ([0-9,]+)/", capsys.readouterr().out, re.MULTILINE)
    return [int(number.replace(",", "")) for number in numbers]


@pytest.mark.parametrize("total", [1, 39, 40, 41, 99, 7000])
def test_progress_is_forty_lines_and_the_last_is_the_last_step(capsys, clock, total):
    """In a file or a notebook; a shorter run has a line for each step."""
    show_steps(clock, total, seconds_per_step=0.001)
    shown = steps_shown(capsys)
    assert len(shown) == min(40, total) and shown[-1] == total
    gaps = np.diff([0, *shown])
    assert max(gaps) - min(gaps) <= 1  # evenly


def test_the_first_line_comes_after_two_seconds(capsys, clock):
    """Even though each of the forty takes fifty."""
    show_steps(clock, 4000, seconds_per_step=0.5)
    first, *others = steps_shown(capsys)
    assert 2 < (first - 1) * 0.5 <= 2.5
    assert others == list(range(100, 4001, 100))


def test_the_seconds_left_are_those_that_the_rest_of_the_work_takes(capsys, clock):
    """Here later steps are more work, and starting takes a minute."""
    progress = cli.Progress("step", 100)
    expected = []
    for step in range(1, 101):
        fraction = (step / 100) ** 2
        clock.now = 1060 + 500 * fraction
        progress.show(step, fraction, "")
        if output := capsys.readouterr().out:
            expected.append(500 * (1 - fraction))
            assert float(re.search("([0-9]+) s left\n$", output)[1]) == pytest.approx(
                expected[-1], abs=0.51
            )
    assert len(expected) >= 40 and expected[-1] == 0


# Progress on a terminal.


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self):
        return True

    def lines(self):
        """What can be read on it. A carriage return goes to the start of the line, and the code
        that ends with K erases what follows on the line."""
        lines = []
        for written in self.getvalue().split("\n"):
            line, column = "", 0
            for part in re.split("(\r|\x1b\\[K)", written):
                if part == "\r":
                    column = 0
                elif part == "\x1b[K":
                    line = line[:column]
                else:
                    line = line[:column] + part + line[column + len(part) :]
                    column += len(part)
            lines.append(line)
        return lines


BAR = r"step [0-9,]+/[0-9,]+  \[#*\.*\]  [0-9]+ s left"


def test_on_a_terminal_a_line_stays_for_each_tenth_of_a_run_and_nothing_else(clock):
    with contextlib.redirect_stdout(Terminal()) as terminal:
        examples = show_steps(clock, 50, seconds_per_step=1)
    assert len(examples) == 10
    tenths = range(5, 51, 5)
    expected = [f"step {n}/50  loss {n}.5  {text}" for n, text in zip(tenths, examples)]
    assert terminal.lines() == [*expected, ""]


def test_on_a_terminal_a_bar_is_updated_in_place(clock):
    with contextlib.redirect_stdout(Terminal()) as terminal:
        show_steps(clock, 50, seconds_per_step=1, steps=7)
    assert terminal.lines() == [
        "step 5/50  loss 5.5  1=1+0",
        "step 7/50  [###.................]  43 s left",
    ]


def test_a_bar_leaves_nothing_of_a_longer_one(clock):
    with contextlib.redirect_stdout(Terminal()) as terminal:
        show_steps(clock, 2000, seconds_per_step=1, steps=199)
    longer = "step 3/2,000  [....................]  1997 s left"
    assert longer in terminal.getvalue()
    clock.now += 1
    with contextlib.redirect_stdout(terminal):
        show_steps(clock, 50, seconds_per_step=1, steps=4)
    assert terminal.lines() == ["step 4/50  [##..................]  46 s left"]


def test_a_bar_appears_after_a_second_and_moves_ten_times_a_second(clock):
    with contextlib.redirect_stdout(Terminal()) as terminal:
        show_steps(clock, 100_000, seconds_per_step=0.001, steps=900)
        assert terminal.getvalue() == ""
        show_steps(clock, 100_000, seconds_per_step=0.001, steps=5000)
    assert 35 <= len(re.findall(BAR, terminal.getvalue())) <= 41


@pytest.mark.parametrize(
    "error, code", [(KeyboardInterrupt(), 130), (cli.UserError("the loss is nan"), 2)]
)
def test_whatever_ends_a_program_on_a_terminal_takes_the_bar_away(clock, error, code):
    def main():
        show_steps(clock, 50, seconds_per_step=1, steps=7)
        assert re.fullmatch(BAR, terminal.lines()[-1])
        raise error

    with contextlib.redirect_stdout(Terminal()) as terminal, pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == code
    assert terminal.lines() == ["step 5/50  loss 5.5  1=1+0", ""]


def test_on_a_terminal_the_lines_of_sft_tell_the_loss():
    with contextlib.redirect_stdout(Terminal()) as terminal:
        run_main("sft", *RUNS["sft"], "--out", "out.npz")
    for step, line in enumerate(terminal.lines()[:3], 1):
        assert re.fullmatch(rf"step {step}/3  loss [0-9]\.[0-9]{{3}} *", line)


def test_on_a_terminal_the_lines_of_dpo_tell_the_loss_and_an_answer_to_a_held_out_target():
    with contextlib.redirect_stdout(Terminal()) as terminal:
        run_main("dpo", *RUNS["dpo"], "--out", "out.npz")
    lines = [line for line in terminal.lines() if line.startswith("round ")]
    assert len(lines) == 3
    for line in lines:
        numbers, example = line.split("  rewards/accuracies ")
        assert re.fullmatch(r"round [1-3]/3  pairs [1-4]  loss 0\.[0-9]+  .*", numbers)
        _, answer, outcome = example.split("  ")
        assert re.match("(52|96)=", answer) and outcome in data.OUTCOMES


# What DPO measures and shows.


def report(rounds):
    """The report of a run that measures nothing."""
    return dpo.Report(None, rounds, beta=0.8, prefer=3)


@pytest.fixture
def measure_nothing(monkeypatch):
    monkeypatch.setattr(dpo, "held_out_pairs", lambda *_: [])
    monkeypatch.setattr(dpo, "measure", lambda *_: {"shares": {}})


@pytest.mark.parametrize("rounds", [1, 3, 40, 42, 99, 500])
def test_a_run_is_measured_before_the_first_round_then_forty_times(measure_nothing, rounds):
    show = report(rounds)
    measured = []
    for number in range(rounds + 1):
        row = {"round": number, "pairs": 0}
        show(row, None, [])
        if "shares" in row:
            measured.append(number)
    assert measured[0] == 0 and measured[-1] == rounds
    assert len(measured) == 1 + min(40, rounds)
    gaps = np.diff(measured)
    assert max(gaps) - min(gaps) <= 1  # evenly


def test_a_line_of_progress_tells_pairs_loss_and_the_seconds_left(measure_nothing, clock, capsys):
    show = report(rounds=4)
    show({"round": 1, "pairs": 0}, None, [])
    clock.now += 10
    row = {"round": 2, "pairs": 7, "loss": 0.51}
    show(row | {"rewards/margins": 1.25, "rewards/accuracies": 0.8}, None, [])
    clock.now += 10
    show({"round": 3, "pairs": 0}, None, [])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "round 2/4  pairs 7  loss 0.51  rewards/margins 1.25  rewards/accuracies 0.80  20 s left",
        "round 3/4  pairs 0  10 s left",
    ]


def test_the_first_round_shows_three_of_its_pairs(measure_nothing, capsys):
    rng = np.random.default_rng(0)
    pairs = dpo.rule_pairs(None, 0, World(), rng, starts=[0, 5], prefer=3)
    report(rounds=50)({"round": 1, "pairs": 0}, None, pairs)
    shown = [
        re.fullmatch("chosen ([0-9=+]+) +rejected ([0-9=+]+)", line).groups()
        for line in capsys.readouterr().out.splitlines()
    ]
    expected = [(data.decode(chosen), data.decode(rejected)) for chosen, rejected in pairs]
    assert shown == expected[:3]


# Runs without a pair.

TWO_ANSWERS = ["--sft", "sft.npz", *RULE[2:], "--answers", 2]  # of a model that makes no right sums


@pytest.mark.parametrize("rounds", [3, 50])
def test_a_model_without_accepted_answers_ends_in_advice(rounds):
    message = message_of("dpo", *TWO_ANSWERS, "--rounds", rounds, "--out", "out.npz")
    advice = "lower --lr, raise --answers or train SFT longer"
    assert message == f"too few accepted answers; {advice}"
    assert_nothing_written()


def test_a_model_without_rejected_answers_has_nothing_left_to_learn(monkeypatch, capsys):
    metrics = evaluation.metrics
    monkeypatch.setattr(evaluation, "metrics", lambda *rest: metrics(*rest) | {"both": 1})
    run_main("dpo", *TWO_ANSWERS, "--rounds", 50, "--out", "out.npz")
    assert "nothing left to reject: training ended after round 10\n" in capsys.readouterr().out
    assert Transformer.load("out.npz")


# eval.py.


def printed_by_eval(capsys, *flags):
    run_main("eval", *flags)
    return capsys.readouterr().out


def test_eval_prints_the_table_of_its_rows(capsys):
    rows = json.loads(printed_by_eval(capsys, "sft.npz", "--json", "--samples", 2))
    assert [row["n"] for row in rows] == [2, 96, 4, 192]
    assert printed_by_eval(capsys, "sft.npz", "--samples", 2) == evaluation.table(rows) + "\n"


def test_eval_hears_of_preference_temperature_and_seed(capsys):
    flags = ["--samples", 9, "--prefer", 2, "--seed", 1, "--temperature", 0.5]
    rows = json.loads(printed_by_eval(capsys, "sft.npz", "--json", *flags))
    models = {"sft.npz": Transformer.load("sft.npz")}
    assert rows == evaluation.evaluate(models, seed=1, prefer=2, samples=9, temperature=0.5)


def test_eval_prints_a_greedy_answer_to_a_prompt_and_five_sampled_ones(capsys):
    lines = printed_by_eval(capsys, "sft.npz", "--prompt", 77).splitlines()
    assert [line.split()[1] for line in lines] == ["greedy", *["sampled"] * 5]


def test_eval_answers_a_prompt_as_json(capsys):
    flags = ["--samples", 3, "--temperature", 0.5, "--seed", 1, "--prefer", 2]
    rows = json.loads(printed_by_eval(capsys, "sft.npz", "--prompt", 77, "--json", *flags))
    answers = evaluation.answers_to(Transformer.load("sft.npz"), 77, 3, 0.5, seed=1, prefer=2)
    assert rows == [{"checkpoint": "sft.npz"} | answer for answer in answers]


LINES = ["100=10+70+20", "100=9+91"]


def test_eval_prints_and_draws_the_credit_of_tokens(capsys):
    save_model(Path("other.npz"), seed=1)
    models = Transformer.load("other.npz"), Transformer.load("sft.npz")
    rows = [evaluation.credit(*models, evaluation.line_of_text(line), 0.5) for line in LINES]
    flags = ["sft.npz", "other.npz", "--beta", 0.5, "--tokens", *LINES]
    assert json.loads(printed_by_eval(capsys, *flags, "--json")) == json.loads(json.dumps(rows))
    assert Path("tokens.png").exists()


def test_a_model_has_no_reward_over_itself(capsys):
    lines = printed_by_eval(capsys, "sft.npz", "sft.npz", "--tokens", *LINES).splitlines()
    assert [line for line in lines if "reward" in line] == [
        "100=10+70+20  reward +0.00",
        "100=9+91  reward +0.00",
    ]
    assert lines[-1] == "wrote tokens.png"


# A program inside another Python, such as IDLE or a notebook, whose standard output is an object
# that can only be written to.


class Stream:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def state_of_this_process():
    """What a program should leave as it is, since the host goes on after it."""
    return {
        "handler of Ctrl-C": signal.getsignal(signal.SIGINT),
        "floating-point errors": np.geterr(),
        "environment": dict(os.environ),
        "files": [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (0, 1, 2)],
    }


@contextlib.contextmanager
def host():
    """Such a Python: its standard output and standard error. It should be left as it was."""
    before = state_of_this_process()
    with contextlib.redirect_stdout(Stream()) as out, contextlib.redirect_stderr(Stream()) as error:
        yield out, error
    assert state_of_this_process() == before


def test_a_program_runs_in_a_host_and_returns():
    with host() as (out, error):
        cli.run(lambda: run_main("eval", "sft.npz", "--prompt", 52))
    assert out.text.count("52=") == 6 and error.text == ""


def test_training_runs_in_a_host_and_returns():
    with host() as (out, error):
        cli.run(lambda: run_main("sft", *RUNS["sft"], "--out", "out.npz"))
    assert "replaced out.npz" in out.text and error.text == ""


def test_a_mistake_in_a_host_is_one_line_and_exit_code_2():
    with host() as (out, error), pytest.raises(SystemExit) as end:
        cli.run(lambda: run_main("eval", "none.npz"))
    assert end.value.code == 2 and out.text == ""
    assert error.text.count("\n") == 1 and "no checkpoint at none.npz" in error.text


KILLED = "another process of this run was killed; was there too little memory?"


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (cli.UserError("a mistake"), 2, "sft.py: a mistake"),
        (OSError("a mishap\nof two lines"), 2, "sft.py: a mishap of two lines"),
        (MemoryError(), 2, "sft.py: not enough memory"),
        (EOFError(), 2, KILLED),
        (ConnectionResetError(), 2, KILLED),
    ],
)
def test_whatever_ends_a_program_has_a_line_and_an_exit_code(monkeypatch, error, code, line):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/sft.py"])
    with host() as (out, errors), pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == code
    assert out.text == "" and errors.text == f"{line}\n"


def test_an_error_of_the_program_itself_keeps_its_traceback():
    def main():
        raise ValueError("a bug")

    with host(), pytest.raises(ValueError):
        cli.run(main)


def test_a_program_can_be_run_by_its_path(monkeypatch):
    """As `%run eval.py` does in a notebook."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "sft.npz", "--prompt", "52"])
    with host() as (out, error):
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert out.text.count("52=") == 6 and error.text == ""


# Any command line.

VALUES = """
    0 1 2 3 5 8 -1 x nan 0.5 9e29 1e-30 9=4+5 rule once online none.npz out.npz .npz x/ --json
""".split()


@pytest.mark.parametrize("n", [3, pytest.param(67, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("error")
def test_any_command_line_runs_through_or_ends_with_one_line(capsys, n):
    rng = random.Random(n)
    for program in n * list(MAINS):
        with pytest.raises(SystemExit):
            run_main(program, "--help")
        flags = sorted(set(re.findall("--[a-z-]+", capsys.readouterr().out)) - {"--help"})
        command = list(RUNS[program])
        for flag in rng.sample(flags, rng.randrange(3)):
            command += [flag, rng.choice([*VALUES, "new/\u00e9 $x$.npz"])]
        try:
            run_main(program, *command)
        except (cli.UserError, OSError) as mistake:
            assert "\n" not in str(mistake), command
        assert capsys.readouterr().err == "", command
    assert not list(Path().rglob("*.part"))
