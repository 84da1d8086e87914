"""Faults that really happen, in a process of their own: nothing is lost, no traceback is shown."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import MAINS, ROOT, RUNS, save_model
from transformer import Config, Transformer

# A program of the project, made small; SETUP says what happens to it.
SCRIPT = """
import multiprocessing, os, resource, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import tinygrad_lite, cli, data, dpo, eval as evaluation, numpy, sft, transformer
sft.excess_nats, data.HELD_OUT = lambda *_: 0.0, [52, 96]
evaluation.evaluate.__defaults__ = 0, 3, 1, 1.0
def before(module, name, action):
    function = getattr(module, name)
    setattr(module, name, lambda *args, **options: (action(), function(*args, **options))[1])
press = lambda: os.kill(os.getpid(), signal.SIGINT)
die = lambda: multiprocessing.parent_process() and os.kill(os.getpid(), signal.SIGKILL)
program = sys.argv[0] = sys.argv.pop(1)
main = {"sft": sft, "dpo": dpo, "eval": evaluation}[program].main
SETUP
cli.run(main)
"""


OUT = os.fsdecode(b"caf\xe9.npz" if sys.platform == "linux" else "caf\u00e9.npz".encode())


def command(program, setup="", *flags):
    files = [OUT] if program == "eval" else ["--out", OUT]
    return [
        sys.executable,
        "-c",
        SCRIPT.replace("SETUP", setup),
        str(ROOT),
        program,
        *RUNS[program],
        *files,
        *map(str, flags),
    ]


def script(program, setup="", *flags, redirect=""):
    """Its exit code and standard error; `redirect` is of standard output, as bash reads it."""
    result = subprocess.run(
        [
            "bash",
            "-c",
            f'"$@" {redirect}; exit ${{PIPESTATUS[0]}}',
            "bash",
            *command(program, setup, *flags),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.returncode, result.stderr


@pytest.fixture(autouse=True)
def earlier(monkeypatch, tmp_path):
    """A folder with a checkpoint to start from, and the result of an earlier run, under a name that
    is not UTF-8; a terminal that shows ASCII, the environment of a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    save_model("sft.npz")
    return open(save_model(OUT), "rb").read()


def assert_whole(earlier):
    assert not [name for name in os.listdir() if name.endswith(".part")]
    assert open(OUT, "rb").read() == earlier or Transformer.load(OUT)


@pytest.mark.parametrize(
    "program, setup, flags, redirect, code, line",
    [
        ("sft", "", [], "", 0, ""),
        ("dpo", "", [], "", 0, ""),
        ("eval", "", [], "", 0, ""),
        ("eval", "", ["--tokens", "9=4+5"], "", 0, ""),
        ("sft", "", [], ">&-", 0, ""),
        ("sft", "", ["--help"], "|true", 1, ""),
        ("dpo", "", [], "|true", 1, ""),
        ("eval", "", ["--json"], "|head -1", 1, ""),
        ("eval", "", ["."], "", 2, r"\[Errno 21\] Is a directory: '\.'"),
        ("sft", "", [], ">/dev/full", 2, ".*No space left on device"),
        ("eval", "", [], ">/dev/full", 2, ".*No space left on device"),
        ("eval", "", ["none.npz"], "", 2, "no checkpoint at none.npz;"),
        ("sft", "", ["--steps", "x"], "", 2, "argument --steps: .*'x'; see python sft --help"),
        (
            "eval",
            "before(evaluation, 'table', lambda: bytearray(1 << 60))",
            [],
            "",
            2,
            "not enough",
        ),
        ("sft", "before(sft, 'Adam', die)", ["--processes=2"], "", 2, "process 1 of 2.*killed"),
        ("dpo", "before(dpo, 'Adam', die)", ["--processes=3"], "", 2, "process . of 3.*killed"),
        (
            "sft",
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "  # a full disk, as it were
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
            [],
            "",
            2,
            ".*File too large",
        ),
    ],
)
def test_a_mistake_or_mishap_is_one_line(earlier, program, setup, flags, redirect, code, line):
    """All else runs through; output that nobody reads to its end stops it quietly."""
    setup = f"multiprocessing.set_start_method('fork'); {setup}"
    found, error = script(program, setup, *flags, redirect=redirect)
    assert re.fullmatch(f"{program}: {line}.*\n" if line else "", error), error
    assert found == code or "|" in redirect and found == 0  # read by then
    assert code == 0 or open(OUT, "rb").read() == earlier and len(os.listdir()) == 2


@pytest.mark.parametrize("program", MAINS)
def test_help_is_quick_and_waits_for_no_matplotlib(program):
    code = (
        "import sys, runpy; sys.modules['matplotlib'] = None; sys.path[0] = sys.argv.pop(1); "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-c", code, ROOT, ROOT / f"{program}.py", "--help"],
        capture_output=True,
        text=True,
    )
    seconds = sum(os.times()[2:4]) - sum(before[2:4])  # of a processor: others may be busy
    assert (result.returncode, result.stderr) == (0, "") and seconds < 1.5
    assert "usage: " in result.stdout and not re.search("None|PosixPath|SUPPRESS", result.stdout)


@pytest.mark.parametrize(
    "program, processes, setup",
    [
        ("sft", 1, "before(data, 'random_lines', press)"),
        ("sft", 2, "before(numpy, 'savez', press)"),
        ("sft", 2, "before(sft, 'clip_grad_norm', press)"),
        ("sft", 1, "before(os, 'replace', press)"),
        ("sft", 1, "before(cli.Path, 'unlink', press)"),
        (
            "dpo",
            2,
            "sys.addaudithook(lambda event, args: 'matplotlib' in str(args[:1]) and press())",
        ),
        ("dpo", 2, "before(dpo, 'clip_grad_norm', press)"),
        *[(program, 2, "before(transformer, '_choose', press)") for program in ("dpo", "eval")],
    ],
)
def test_ctrl_c_in_the_middle(earlier, program, processes, setup):
    flags = ["--processes", processes] * (program != "eval")
    assert script(program, setup, *flags) == (130, "stopped\n")
    assert_whole(earlier)


def press_after(seconds, program, method, processes):
    """Ctrl-C for the whole group, as from a terminal, so long after the program has begun; its exit
    code and standard error. Waits until no process holds the pipes any more."""
    setup = (
        f"multiprocessing.set_start_method({method!r}); run = main\n"
        "def main():\n    print('begun', flush=True); run()"
    )
    process = subprocess.Popen(
        command(program, setup, *["--processes", processes] * (program != "eval")),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize("presses", [1, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "program, method, processes",
    [
        ("sft", "fork", 2),
        ("sft", "spawn", 3),
        ("dpo", "fork", 3),
        ("dpo", "spawn", 2),
        ("eval", "fork", 1),
        ("eval", "spawn", 1),
    ],
)
def test_ctrl_c_at_any_moment(earlier, program, method, processes, presses):
    for seconds in np.random.default_rng().uniform(0, 0.5 if presses == 1 else 1, presses):
        code, error = press_after(seconds, program, method, processes)
        assert (code, error) in [(130, "stopped\n"), (0, "")], (seconds, code, error)  # too late
        assert_whole(earlier)


@pytest.mark.slow
def test_killed_a_hundred_times_while_two_runs_save_to_one_path():
    setup = (
        "model = transformer.Transformer(transformer.Config(14))\n"
        "while True: model.save(sys.argv[-1]); print(flush=True)"
    )
    for seconds in np.random.default_rng(0).uniform(0, 0.02, 50):
        savers = [subprocess.Popen(command("sft", setup), stdout=subprocess.PIPE) for _ in range(2)]
        for saver in savers:
            saver.stdout.readline()
        time.sleep(seconds)
        for saver in savers:
            saver.kill()
            saver.communicate()
        assert Transformer.load(OUT).config == Config(14)


@pytest.mark.parametrize("program", ["benchmarks/train_step.py", "benchmarks/sample.py"])
def test_a_bad_flag_of_a_benchmark_costs_one_line(program):
    result = subprocess.run(
        [sys.executable, program, "--rounds", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"see python {program} --help" in result.stderr
