"""The programs, called in this process: what they write and print; a mistake costs one line."""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

import cli
import data
import dpo
import eval as evaluation
import plots
import sft
from helpers import MAINS, RULE, RUNS, TINY, save_model
from tinygrad_lite import World
from transformer import Transformer


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Programs that take no second and draw nothing, in a folder with a checkpoint and a result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "excess_nats", lambda *_: 0.0)
    monkeypatch.setattr(data, "HELD_OUT", [52, 96])
    monkeypatch.setattr(plots.Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(evaluation.evaluate, "__defaults__", (0, 3, 1, 1.0))
    save_model("sft.npz")
    Path("out.npz").write_text("an earlier result")


def nothing_written():
    return Path("out.npz").read_bytes() == b"an earlier result" and set(os.listdir()) <= {
        "sft.npz",
        "out.npz",
        "odd.npz",
        "odd.json",
        "locked",
    }


def message_of(program, *flags):
    """What cli.run would print, None if all went well."""
    try:
        with np.errstate(all="ignore"):
            MAINS[program]([str(flag) for flag in flags])
    except (cli.UserError, OSError) as error:
        return str(error)
    except SystemExit as stop:  # --help
        assert stop.code == 0


@pytest.mark.parametrize(
    "program, flags, hint",
    [
        ("sft", "--nonsense", "--nonsense"),
        ("sft", "--step 3", "--step"),
        ("sft", "--steps 1.5", "from 1"),
        ("sft", "--lr nan", "above 0"),
        ("sft", "--out x", ".npz"),
        ("sft", "--processes 65", "from 1 to 64"),
        ("sft", "--out out.npz --d-model 9", "multiple"),
        ("sft", "--seed 9223372036854775808", "from 0 to 9223372036854775807"),
        ("dpo", "--beta 1e39", "below 1e30"),
        ("dpo", "--prefer 7", "--prefer"),
        ("dpo", "--pairs best", "--pairs"),
        ("dpo", "--answers 1", "from 2"),
        ("dpo", "--sft x/../sft.npz --out sft.npz", "overwrite"),
        ("dpo", "--out x.npz", r"runs/sft.npz; python sft.py writes one in .* minutes"),
        ("eval", "missing.npz", "missing.npz"),
        ("eval", "--prompt 4", "from 5 to 100"),
        ("eval", "--samples 0", "from 1"),
        ("eval", "--temperature 0", "above 0"),
        ("eval", "--tokens 3=1+2", "100=10"),
        ("eval", "sft.npz --tokens 9=4+5", "two checkpoints"),
        ("eval", "--tokens 9=4+5 8=4+4 7=3+4", "one or two lines"),
    ],
)
def test_a_bad_flag_is_one_line(capsys, program, flags, hint):
    message = message_of(program, *flags.split())
    assert re.search(hint, message) and "\n" not in message and nothing_written()
    assert capsys.readouterr() == ("", "")


def test_the_programs_write_what_they_say(capsys):
    """Into a folder that is not there yet, under a name that TeX would read as mathematics."""
    for folder in "a", "b":
        model, policy = (f"{folder}/{name}_$5_vs_$10.npz" for name in ("cost", "dpo"))
        assert message_of("sft", *TINY, "--steps", 6, "--processes", 2, "--out", model) is None
        assert message_of("dpo", "--sft", model, "--out", policy, *RULE, "--seed", 3) is None
    printed = capsys.readouterr().out
    assert "step 6/6" in printed and f"next: python dpo.py --beta 0.8 --sft {model}" in printed
    assert "round 3/3" in printed and "DPO greedy   96=" in printed
    files = {path.name.replace("_$5_vs_$10", ""): path for path in Path("a").iterdir()}
    assert set(files) == {
        "cost.npz",
        "cost.json",
        "dpo.npz",
        "dpo.json",
        "dpo-dist.png",
        "dpo-training.png",
    }
    for path in files["cost.npz"], files["dpo.npz"]:  # the same seed, the same bytes
        assert path.read_bytes() == (Path("b") / path.name).read_bytes()
    facts, log = (json.loads(files[name].read_text()) for name in ("cost.json", "dpo.json"))
    assert len(facts["history"]["loss"]) == 6 and len(facts["metrics"]) * 2 == len(log["metrics"])
    assert set(facts["excess_nats"]) == {"trained", "held-out"} and log["settings"]["seed"] == 3
    assert [row["pairs"] for row in log["history"]] == [0, 4, 4, 4]
    assert {"loss", "logps/chosen", "shares"} <= set(log["history"][1])
    assert log["history"][3]["rewards/margins"] != 0  # the reference stays behind


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_a_symbolic_link_is_followed_and_the_umask_respected(mask):
    os.mkdir("folder")
    os.symlink("folder/model.npz", "link.npz")
    before = os.umask(mask)
    try:
        assert message_of("sft", *RUNS["sft"], "--out", "link.npz") is None
    finally:
        os.umask(before)
    for name in "folder/model.npz", "link.json":
        assert os.stat(name).st_mode & 0o777 == 0o666 & ~mask
    assert os.path.islink("link.npz") and Transformer.load("link.npz")


def test_eval_prints_a_table_answers_credit_and_json(capsys, monkeypatch):
    def printed(*flags):
        assert message_of("eval", *flags) is None
        return capsys.readouterr().out

    rows = json.loads(printed("sft.npz", "--json", "--samples", 2))
    assert [row["n"] for row in rows] == [2, 96, 4, 192]
    assert printed("sft.npz", "--samples", 2) == evaluation.table(rows) + "\n"
    other = json.loads(printed("sft.npz", "--json", "--samples", 9, "--prefer", 2, "--seed", 1))[3]
    assert other["preferred"] == other["counts"]["2"] / (9 * 96) > 0
    assert printed("sft.npz", "--prompt", 77).count("\n") == 1 + 5
    monkeypatch.setattr(evaluation, "answers_to", lambda model, *rest: [{"asked": rest}])
    flags = ["--samples", 3, "--json", "--temperature", 0.5, "--seed", 1, "--prefer", 2]
    monkeypatch.setattr(evaluation, "ANSWER", "")
    assert json.loads(printed("sft.npz", "--prompt", 77, *flags)) == [
        {"checkpoint": "sft.npz", "asked": [77, 3, 0.5, 1, 2]}
    ]
    models = [Transformer.load(save_model("other.npz", seed=1)), Transformer.load("sft.npz")]
    lines = "100=10+70+20", "100=9+91"
    rows = [evaluation.credit(*models, data.encode(line) + [data.END], 0.5) for line in lines]
    text = printed("sft.npz", "other.npz", "--json", "--beta", 0.5, "--tokens", *lines)
    assert json.loads(text) == json.loads(json.dumps(rows)) and Path("tokens.png").exists()
    text = printed("sft.npz", "sft.npz", "--tokens", *lines)  # a model against itself
    assert text.count("reward +0.00\n") == 2 and text.splitlines()[2].startswith("100=9+91")


def test_every_round_that_is_shown_has_a_line_of_its_own(capsys, monkeypatch):
    """One without pairs, too; with the seconds left, here ten for each round."""
    clock, make, sizes = iter([0, 10, 20, 30, 40, 50]), dpo.rule_rounds, iter([4, 0, 0, 4])
    monkeypatch.setattr(
        dpo, "rule_rounds", lambda *rest: (pairs[: next(sizes)] for pairs in make(*rest))
    )
    monkeypatch.setattr(cli.time, "perf_counter", lambda: next(clock))
    dpo.train_policy(World(), dpo.parse_arguments([*RUNS["dpo"], "--rounds", "4"]))
    monkeypatch.undo()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round")]
    for line, i, n in zip(lines, (1, 2, 3, 4), (4, 0, 0, 4), strict=True):
        numbers = r"(  loss [0-9.]+(  rewards/[a-z]+ -?[0-9.]+){2})?"
        assert re.fullmatch(rf"round {i}/4  pairs {n}{numbers}  {40 - 10 * i} s left", line)


@pytest.mark.parametrize("rounds", [3, 40, 42, 99, 500])
def test_a_run_is_measured_and_shown_forty_times_and_at_its_end(capsys, monkeypatch, rounds):
    monkeypatch.setattr(dpo, "measure", lambda *_: {"shares": {}})
    monkeypatch.setattr(
        dpo, "train", lambda *_: ({"round": i + 1, "pairs": 0} for i in range(rounds))
    )
    arguments = dpo.parse_arguments([*RUNS["dpo"], "--rounds", str(rounds)])
    history = dpo.train_policy(World(), arguments)[2]
    measured = [row["round"] for row in history if "shares" in row]
    shown = [
        int(i.replace(",", ""))
        for i in re.findall("^round (.*)/", capsys.readouterr().out, re.MULTILINE)
    ]
    assert shown == sorted({1, *measured[1:]})
    assert measured[0] == 0 and measured[-1] == rounds and len(measured) == 1 + min(40, rounds)
    assert np.ptp(np.diff(measured)) <= 1  # evenly


@pytest.mark.parametrize("damage", ["truncated", "first edition", "another task", "unreadable"])
def test_a_checkpoint_that_cannot_be_used_is_one_line_with_its_name(damage):
    save_model("odd.npz", 30 if damage == "another task" else len(data.VOCAB))
    if damage == "truncated":
        os.truncate("odd.npz", 2000)
    elif damage == "first edition":
        with np.load("sft.npz") as archive:
            np.savez("odd.npz", **{name: array.T for name, array in archive.items()})
    elif damage == "unreadable":
        os.chmod("odd.npz", 0)
        if os.access("odd.npz", os.R_OK):
            pytest.skip("root may read anything")
    for flags in ["dpo", "--sft", "odd.npz", "--out", "out.npz"], ["eval", "odd.npz"]:
        message = message_of(*flags)
        assert "odd.npz" in message and "\n" not in message and nothing_written()
        assert ("damaged" in message) == (damage in ("truncated", "first edition"))
        assert ("first edition" in message) == (damage == "first edition")


@pytest.mark.parametrize("program", ["sft", "dpo"])
@pytest.mark.parametrize(
    "out, prepare",
    [
        (300 * "x" + ".npz", ""),
        (250 * "x" + ".npz", ""),
        ("sft.npz/x.npz", ""),
        ("odd.npz", "os.symlink(os.devnull, 'odd.npz')"),
        ("odd.npz", "os.mkfifo('odd.npz')"),
        ("odd.npz", "os.mkdir('odd.json')"),
        ("locked/x.npz", "os.mkdir('locked', 0o500)"),
    ],
    ids=["long", "long beside it", "below a file", "device", "pipe", "folder", "read-only"],
)
def test_where_saving_would_fail_nothing_is_trained(monkeypatch, program, out, prepare):
    monkeypatch.setattr(cli, "show_progress", None)  # training would fail
    exec(prepare)
    if out == "locked/x.npz" and os.access("locked", os.W_OK):
        pytest.skip("root may write anywhere")
    message = message_of(program, *RUNS[program], "--out", out)
    assert "choose another name" in message and "\n" not in message and nothing_written()


@pytest.mark.parametrize(
    "step, says", [(0, "loss is nan (at step|in round) 2"), (2, "out.npz.* infinite")]
)
@pytest.mark.parametrize("module", [sft, dpo])
def test_a_loss_or_weights_that_are_not_finite_end_the_run(monkeypatch, module, step, says):
    """The last of three steps can spoil the weights: the loss that is looked at comes before it."""
    monkeypatch.setattr(module, "cosine_schedule", lambda i, *_, **__: np.inf if i == step else 0.0)
    message = message_of(module.__name__, *RUNS[module.__name__], "--out", "out.npz")
    assert re.search(f"{says}.*lower --lr", message) and nothing_written()


@pytest.mark.parametrize(
    "rounds, both, says",
    [
        (3, 0, "too few good answers.*--answers"),
        (50, 0, "too few good answers.*--answers"),
        (50, 1, "nothing left to reject: .*after round 10\n"),
    ],
)
def test_a_run_without_a_pair_writes_only_if_all_is_well(capsys, monkeypatch, rounds, both, says):
    metrics = evaluation.metrics
    monkeypatch.setattr(evaluation, "metrics", lambda *rest: metrics(*rest) | {"both": both})
    message = message_of(
        "dpo", "--sft", "sft.npz", *RULE[2:], "--answers", 2, "--rounds", rounds, "--out", "out.npz"
    )
    assert re.search(says, message or capsys.readouterr().out) and nothing_written() == (not both)


VALUES = [
    "0",
    "1",
    "2",
    "3",
    "5",
    "8",
    "-1",
    "x",
    "nan",
    "0.5",
    "9e29",
    "1e-30",
    "9=4+5",
    "rule",
    "once",
    "online",
    "none.npz",
    "out.npz",
    "new/\u00e9 $x$.npz",
    ".npz",
    "x/",
    "--json",
]


@pytest.mark.parametrize("n", [5, pytest.param(67, marks=pytest.mark.slow)])
def test_any_command_line_runs_through_or_ends_with_one_line(capsys, n):
    rng, ends = random.Random(n), []
    for program in n * list(MAINS):
        assert message_of(program, "--help") is None
        flags = set(re.findall("--[a-z-]+", capsys.readouterr().out)) - {"--help"}
        flags = rng.sample(sorted(flags), rng.randrange(3))
        flags = RUNS[program] + [text for flag in flags for text in (flag, rng.choice(VALUES))]
        message = message_of(program, *flags)
        assert "\n" not in (message or "") and capsys.readouterr().err == "", flags
        ends.append(message)
    assert None in ends and any("see python" in end for end in ends if end)
    assert not list(Path().rglob("*.part"))
