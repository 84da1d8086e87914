"""Command lines: a mistake costs one line and nothing on disk; a checkpoint is always whole."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import cli
import data
from transformer import Config, Transformer

ROOT = Path(cli.__file__).parent
TINY = ["--d-model", "8", "--n-layers", "1", "--n-heads", "2", "--d-hidden", "8",
        "--batch-size", "4", "--threads", "1"]


def run(program, *flags, timeout=60, **options):
    return subprocess.run([sys.executable, ROOT / f"{program}.py", *map(str, flags)],
                          capture_output=True, text=True, timeout=timeout, **options)


def start(program, *flags, **options):
    return subprocess.Popen([sys.executable, ROOT / f"{program}.py", *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def one_line(capsys, program, *flags):
    """The one line on stderr of a call that ends with exit code 2."""
    try:
        code = cli.main(program, [str(flag) for flag in flags])
    except SystemExit as stop:  # argparse stops this way
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def tiny_sft(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "sft.npz"
    Transformer(Config(len(data.VOCAB), 8, 1, 2, 8, data.MAX_LEN)).save(path)
    return path


@pytest.mark.parametrize("flags, hint", [
    (["--nonsense"], "--nonsense"), (["--steps", "0"], "at least 1"),
    (["--steps", "-3"], "at least 1"),
    (["--steps", "1.5"], "at least 1"), (["--threads", "65"], "from 1 to 64"),
    (["--lr", "0"], "above 0"), (["--lr", "nan"], "above 0"),
    (["--lr", "inf"], "above 0"), (["--seed", "-1"], "at least 0"), (["--out", "x.txt"], ".npz"),
    (["--d-model", "50", "--n-heads", "4"], "50 is not divisible by 2 n_heads = 8"),
    (["--d-model", "12", "--n-heads", "4"], "12 is not divisible by 2 n_heads = 8")])
def test_sft_refuses_bad_flags(capsys, tmp_path, monkeypatch, flags, hint):
    monkeypatch.chdir(tmp_path)
    assert hint in one_line(capsys, "sft", *flags)


@pytest.mark.parametrize("flags, hint", [
    (["--beta", "0"], "above 0"), (["--beta", "-1"], "above 0"), (["--beta", "nan"], "above 0"),
    (["--beta", "inf"], "above 0"), (["--prefer", "7"], "--prefer"),
    (["--pairs", "best"], "--pairs"),
    ([], "no SFT checkpoint at runs/sft.npz; run python sft.py first")])
def test_dpo_refuses_bad_flags_and_a_missing_checkpoint(capsys, tmp_path, monkeypatch, flags, hint):
    monkeypatch.chdir(tmp_path)
    assert hint in one_line(capsys, "dpo", *flags)


@pytest.mark.parametrize("flags, hint", [
    (["missing.npz"], "missing.npz"), (["--prompt", "4"], "from 5 to 100"),
    (["--prompt", "101"], "from 5 to 100"), (["--prompt", "ten"], "from 5 to 100"),
    (["--samples", "0"], "at least 1"), (["--temperature", "0"], "above 0"),
    (["--tokens", "100"], "100=10+70+20"), (["--tokens", "3=1+2"], "100=10+70+20"),
    (["a.npz", "--tokens", "100=10+70+20"], "two checkpoints")])
def test_eval_refuses_bad_flags(capsys, tmp_path, monkeypatch, flags, hint):
    monkeypatch.chdir(tmp_path)
    assert hint in one_line(capsys, "eval", *flags)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "other vocabulary"])
def test_a_damaged_checkpoint_is_one_line_and_the_old_result_stays(capsys, tmp_path, tiny_sft,
                                                                   damage):
    bad, out = tmp_path / "bad.npz", tmp_path / "dpo.npz"
    out.write_bytes(b"an earlier result")
    if damage == "other vocabulary":
        Transformer(Config(30, 8, 1, 2, 8)).save(bad)
    else:
        half = tiny_sft.read_bytes()[:tiny_sft.stat().st_size // 2]
        bad.write_bytes({"empty": b"", "text": b"hello", "truncated": half}[damage])
    assert "bad.npz" in one_line(capsys, "dpo", "--sft", bad, "--out", out)
    assert "bad.npz" in one_line(capsys, "eval", bad)
    assert out.read_bytes() == b"an earlier result"


def test_dpo_does_not_overwrite_its_own_reference(capsys, tiny_sft):
    content = tiny_sft.read_bytes()
    assert "--out" in one_line(capsys, "dpo", "--sft", tiny_sft, "--out", tiny_sft)
    assert tiny_sft.read_bytes() == content


def test_an_unwritable_place_is_refused_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "file" in one_line(capsys, "sft", *TINY, "--out", tmp_path / "file" / "sft.npz")


def test_a_run_that_diverges_says_where_and_leaves_the_old_result(capsys, tmp_path):
    out = tmp_path / "sft.npz"
    out.write_bytes(b"an earlier result")
    with np.errstate(all="ignore"):
        error = one_line(capsys, "sft", *TINY, "--steps", "200", "--lr", "1e30", "--out", out)
    assert "at step" in error and "--lr" in error
    assert out.read_bytes() == b"an earlier result"


def test_sft_dpo_eval_end_to_end(capsys, tmp_path):
    """What the programs write is there, says the same as what they print, and is reproducible."""
    sft, dpo = tmp_path / "sft.npz", tmp_path / "dpo.npz"
    assert cli.main("sft", [*TINY, "--steps", "30", "--out", str(sft)]) == 0
    printed = capsys.readouterr().out
    assert "step 30/30" in printed and "held-out" in printed and "next: python dpo.py" in printed
    facts = json.loads(sft.with_suffix(".json").read_text())
    assert len(facts["history"]["loss"]) == 30 and facts["settings"]["seed"] == 0
    rule = ["--pairs", "rule", "--prompts", "8", "--rounds", "3", "--threads", "1"]
    assert cli.main("dpo", ["--sft", str(sft), "--out", str(dpo), *rule]) == 0
    facts = json.loads(dpo.with_suffix(".json").read_text())
    assert set(facts["history"][0]) == {"round", "pairs", "masses"}  # before the first step
    assert {"loss", "rewards/margins", "logps/chosen", "masses"} <= set(facts["history"][1])
    assert {path.name for path in tmp_path.iterdir()} == {
        "sft.npz", "sft.json", "sft-loss.png", "sft-dist.png",
        "dpo.npz", "dpo.json", "dpo-dist.png", "dpo-training.png"}
    capsys.readouterr()
    assert cli.main("eval", [str(sft), str(dpo), "--json", "--samples", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["targets"]) for row in rows[:4]] == [
        ("greedy", "held-out"), ("greedy", "all"), ("sampled", "held-out"), ("sampled", "all")]
    assert all(set(row) == {"checkpoint", "mode", "targets", "n", "mean_abs_error", "exact",
                            "format", "preferred", "counts"} for row in rows)
    assert rows[0]["n"] == 20 and rows[1]["n"] == 96 and rows[2]["n"] == 40
    assert cli.main("eval", [str(dpo), "--prompt", "77", "--samples", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert cli.main("eval", [str(sft), str(dpo), "--tokens", "100=10+70+20"]) == 0
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main("eval", [str(sft), str(sft), "--tokens", "100=10+70+20", "100=9+91"]) == 0
    assert capsys.readouterr().out.count("reward +0.00\n") == 2  # of a model against itself


@pytest.mark.parametrize("program", ["sft", "dpo", "eval"])
def test_help_is_quick_and_explains_every_flag(program):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(program, "--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    loaded = run(program, "--help", env={**os.environ, "PYTHONVERBOSE": "1"}).stderr
    assert "import 'numpy'" not in loaded and "import 'matplotlib'" not in loaded
    for action in cli.PARSERS[program]()._actions:
        assert action.help
    explained = cli.PARSERS[program]().format_help()
    assert "None" not in explained and "PosixPath" not in explained


def test_ctrl_c_keeps_the_earlier_checkpoint(tmp_path):
    out = tmp_path / "sft.npz"
    out.write_bytes(b"an earlier result")
    process = start("sft", *TINY, "--steps", "1000000", "--out", out)
    assert "parameters" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error == f"stopped; {out} is as it was\n"
    assert [path.name for path in tmp_path.iterdir()] == ["sft.npz"]
    assert out.read_bytes() == b"an earlier result"


def test_a_reader_that_has_read_enough_stops_the_run_quietly(tmp_path):
    process = start("sft", *TINY, "--steps", "1000000", "--out", tmp_path / "sft.npz")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""


def test_a_full_disk_while_saving_keeps_the_earlier_checkpoint(tmp_path):
    out = tmp_path / "sft.npz"
    out.write_bytes(b"an earlier result")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as for a full disk: an error, not a signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    result = run("sft", *TINY, "--steps", "3", "--out", out, preexec_fn=limit)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert out.read_bytes() == b"an earlier result"
    assert [path.name for path in tmp_path.iterdir()] == ["sft.npz"]


SAVE_FOR_EVER = """
import sys; sys.path.insert(0, sys.argv[1])
from transformer import Config, Transformer
models = [Transformer(Config(14, 8, 1, 2, 8), seed) for seed in (1, 2)]
while True:
    for model in models:
        model.save(sys.argv[2])
        print(flush=True)
"""


def test_killed_while_saving_the_checkpoint_is_the_old_or_the_new_one_whole(tmp_path):
    path = tmp_path / "model.npz"
    expected = {Transformer(Config(14, 8, 1, 2, 8), seed).named_parameters()["head"].data.tobytes()
                for seed in (1, 2)}
    rng = np.random.default_rng(0)
    for _ in range(8):
        saver = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, ROOT, path],
                                 stdout=subprocess.PIPE)
        saver.stdout.readline()
        time.sleep(rng.uniform(0, 0.02))
        saver.kill()
        saver.communicate()
        assert Transformer.load(path).named_parameters()["head"].data.tobytes() in expected


@pytest.mark.slow
def test_killed_a_hundred_times_while_saving(tmp_path):
    for i in range(13):
        (tmp_path / str(i)).mkdir()
        test_killed_while_saving_the_checkpoint_is_the_old_or_the_new_one_whole(tmp_path / str(i))


def test_two_runs_that_write_to_one_path_leave_one_whole_checkpoint(tmp_path):
    path = tmp_path / "model.npz"
    savers = [subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, ROOT, path],
                               stdout=subprocess.PIPE) for _ in range(2)]
    for saver in savers:
        saver.stdout.readline()
    for _ in range(20):
        Transformer.load(path)
    for saver in savers:
        saver.kill()
        saver.communicate()


words = st.sampled_from(["--steps", "--lr", "--beta", "--seed", "--prefer", "--samples", "--prompt",
                         "--temperature", "--rounds", "--json", "--pairs", "--tokens", "--out",
                         "rule", "0", "-1", "3", "1e-3", "nan", "100=1+99", "runs/none.npz"])


@settings(max_examples=60)
@given(st.sampled_from(["sft", "dpo", "eval"]), st.lists(words | st.text(max_size=5), max_size=4))
def test_any_command_line_ends_with_0_or_with_one_line_and_2(program, flags):
    """Only the parsing of it: what is valid would train for minutes."""
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop
    read, write = os.pipe()
    saved = sys.stderr, sys.stdout, cli.importlib.import_module
    sys.stderr, sys.stdout = open(write, "w"), open(os.devnull, "w")
    cli.importlib.import_module = stop
    try:
        code = cli.main(program, flags)
    except SystemExit as ended:
        code = ended.code
    except Stop:
        code = 0
    finally:
        sys.stderr.close()
        sys.stdout.close()
        sys.stderr, sys.stdout, cli.importlib.import_module = saved
    with open(read, errors="replace") as pipe:
        error = pipe.read()
    assert code in (0, None) or (code == 2 and error.count("\n") == 1 and "Traceback" not in error)
