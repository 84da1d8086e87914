"""Faults that really happen, in a process of their own: nothing is lost, no traceback is shown."""

import ast
import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import MAINS, ROOT, RUNS, is_ours, save_model
from transformer import Transformer

# A program of the project whose first argument is what goes wrong: code that can change anything
# in this process, but not in those that it starts.
SCRIPT = """
import os, sys
sys.path.insert(0, os.environ["PROJECT"])
import signal, time, tinygrad_lite, cli, data, dpo, eval as evaluation, numpy, sft, transformer

def before(module, name, action):
    "Call `action` whenever module.name is about to be called."
    function = getattr(module, name)

    def changed(*arguments, **options):
        action()
        return function(*arguments, **options)

    setattr(module, name, changed)

def press():
    "Ctrl-C, which a terminal sends to all processes of a program. The others hear of it first."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.killpg(0, signal.SIGINT)
    time.sleep(0.3)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)

exec(sys.argv.pop(1))
program = sys.argv[0] = sys.argv.pop(1)
cli.run({"sft": sft.main, "dpo": dpo.main, "eval": evaluation.main}[program])
"""


@pytest.fixture(autouse=True)
def earlier(monkeypatch, tmp_path):
    """A folder with a checkpoint to start from, and the content of the result of an earlier run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROJECT", str(ROOT))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    save_model(Path("sft.npz"))
    return save_model(Path("out.npz"), seed=1).read_bytes()


def command_of(program, fault="", *flags):
    """The command for a small run of a program."""
    files = [] if program == "eval" else ["--out", "out.npz"]
    return [sys.executable, "-c", SCRIPT, fault, program, *RUNS[program], *files, *flags]


def start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        command, stdout=stdout, stderr=stderr, encoding="utf-8", start_new_session=True
    )


def end_of(process):
    """The exit code of a program and what it wrote to standard error.

    Every process that it has started holds the same pipes, and communicate() returns only when
    nobody holds them any more: so no process is left.
    """
    try:
        _, error = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, error


def assert_nothing_lost(earlier):
    assert Path("out.npz").read_bytes() == earlier
    assert set(os.listdir()) == {"sft.npz", "out.npz"}


@contextlib.contextmanager
def reader_that_has_ended():
    """A pipe that nobody reads, as in `| true`: the end to write into."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


# Ctrl-C.

WHILE_EVAL_SAMPLES = "eval", "before(transformer, 'choose_tokens', press)"


@pytest.mark.parametrize(
    "program, fault",
    [
        ("sft", "before(sft, 'clip_grad_norm', press)"),
        ("dpo", "before(dpo, 'clip_grad_norm', press)"),
        # From the first measurement on: what is sampled earlier is sampled by one process alone.
        ("dpo", "before(dpo, 'measure', lambda: before(transformer, 'choose_tokens', press))"),
    ],
    ids=["in SFT", "in DPO", "while DPO samples"],
)
def test_ctrl_c_stops_both_processes_and_leaves_the_old_checkpoint(earlier, program, fault):
    command = command_of(program, fault, "--processes", "2")
    assert end_of(start(command)) == (130, "stopped\n")
    assert_nothing_lost(earlier)


@pytest.mark.parametrize("module, name", [("numpy", "savez"), ("os", "replace")])
def test_ctrl_c_while_a_checkpoint_is_written_leaves_the_old_one(earlier, module, name):
    """Before its first byte, and when all that is left is to take the place of the old one."""
    command = command_of("sft", f"before({module}, {name!r}, press)")
    assert end_of(start(command)) == (130, "stopped\n")
    assert_nothing_lost(earlier)


def test_ctrl_c_while_eval_samples(earlier):
    assert end_of(start(command_of(*WHILE_EVAL_SAMPLES))) == (130, "stopped\n")
    assert_nothing_lost(earlier)


def test_ctrl_c_while_pictures_are_drawn_leaves_the_new_checkpoint(earlier):
    fault = "sys.addaudithook(lambda event, args: 'matplotlib' in str(args[:1]) and press())"
    assert end_of(start(command_of("dpo", fault))) == (130, "stopped\n")
    assert Path("out.npz").read_bytes() != earlier and Transformer.load("out.npz")
    assert set(os.listdir()) == {"sft.npz", "out.npz", "out.json"}


# The program itself, without any change.
LONG_RUN = [sys.executable, ROOT / "dpo.py", *RUNS["dpo"], "--out", "out.npz"]
LONG_RUN += ["--rounds", "1000000", "--processes", "2"]


def test_ctrl_c_after_the_first_line_of_progress(earlier):
    process = start(LONG_RUN)
    for line in process.stdout:
        if re.match("round [0-9,]+/1,000,000  ", line):
            break
    os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (130, "stopped\n")
    assert_nothing_lost(earlier)


def test_ctrl_c_on_a_terminal_takes_the_bar_away(earlier):
    our_end, its_end = pty.openpty()
    process = start(LONG_RUN, stdout=its_end)
    os.close(its_end)
    written = b""
    while b"s left" not in written:
        written += os.read(our_end, 1000)
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(OSError):  # which may mean that nobody writes any more
        while more := os.read(our_end, 1000):
            written += more
    os.close(our_end)
    assert end_of(process) == (130, "stopped\n")
    *_, bar, rest = written.decode().split("\r\x1b[K")
    assert re.fullmatch(r"round [0-9,]+/1,000,000  \[\.{20}\]  [0-9]+ s left", bar)
    assert rest == ""
    assert_nothing_lost(earlier)


def test_ctrl_c_where_standard_error_is_closed():
    """As in `2>&-`."""
    command = command_of(*WHILE_EVAL_SAMPLES)
    process = start(["bash", "-c", 'exec "$@" 2>&-', "bash", *command])
    assert end_of(process) == (130, "")


def test_ctrl_c_where_nobody_reads_standard_error():
    """As in `2>&1 | true`."""
    command = command_of(*WHILE_EVAL_SAMPLES)
    with reader_that_has_ended() as pipe:
        assert end_of(start(command, stdout=pipe, stderr=pipe)) == (130, None)


# Output that cannot be written, or is not read to its end.


@pytest.mark.parametrize("program", MAINS)
def test_output_that_nobody_reads_ends_a_program_quietly(earlier, program):
    with reader_that_has_ended() as pipe:
        assert end_of(start(command_of(program), stdout=pipe)) == (1, "")
    assert_nothing_lost(earlier)


def test_output_that_is_read_in_part_shows_no_traceback():
    command = command_of("eval", "", "--json")
    process = start(["bash", "-c", 'set -o pipefail; "$@" | head -1', "bash", *command])
    code, error = end_of(process)
    assert error == "" and code in (0, 1)  # 0 if all was written before `head` ended


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        code, error = end_of(start(command_of("eval"), stdout=full))
    assert code == 2 and re.fullmatch("eval: .*No space left on device\n", error)


def test_a_full_disk_while_saving_is_one_line_and_leaves_the_old_checkpoint(earlier):
    """Here a file may not grow beyond a thousand bytes."""
    fault = (
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    )
    code, error = end_of(start(command_of("sft", fault)))
    assert code == 2 and re.fullmatch("sft: .*File too large\n", error)
    assert_nothing_lost(earlier)


def test_a_folder_for_a_checkpoint_is_one_line():
    code, error = end_of(start([sys.executable, ROOT / "eval.py", "."]))
    assert code == 2 and re.fullmatch(r"eval.py: .*Is a directory: '\.'\n", error)


# Text files are UTF-8, whatever the locale says.

PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII


def opens_text_in_an_encoding_of_the_locale(call):
    """Whether a call, a node of a syntax tree, is open(), read_text() or write_text() without an
    encoding. Binary modes are excepted, and os.open()."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    if name not in ("open", "read_text", "write_text") or ast.unparse(function) == "os.open":
        return False
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    texts = [node.value for node in arguments if isinstance(node, ast.Constant)]
    return not any(re.fullmatch("[rwxa]b[+]?", str(text)) for text in texts)


def test_every_text_file_is_opened_as_utf_8():
    found = []
    for path in filter(is_ours, ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text_in_an_encoding_of_the_locale(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_the_tests_that_read_the_pages_are_collected_in_an_ascii_locale():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "tests/test_readme.py"],
        cwd=ROOT,
        env=os.environ | PLAIN,
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout


def test_a_run_in_an_ascii_locale(monkeypatch):
    """From start to end, with file names that are not ASCII and real pictures."""
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    os.rename("sft.npz", "\u00e9.npz")
    flags = ["--sft", "\u00e9.npz", "--out", "new/\u00e9.npz"]
    few_targets = "data.HELD_OUT = [52, 96]"
    assert end_of(start(command_of("dpo", few_targets, *flags))) == (0, "")
    names = {"\u00e9.npz", "\u00e9.json", "\u00e9-dist.png", "\u00e9-training.png"}
    assert set(os.listdir("new")) == names


# Starting.


def test_a_program_that_a_notebook_starts_draws_its_pictures(monkeypatch):
    """A notebook tells all programs to draw with a backend that need not be installed for them."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    command = [sys.executable, ROOT / "eval.py", "sft.npz", "out.npz", "--tokens", "9=4+5"]
    assert end_of(start(command)) == (0, "")
    assert Path("tokens.png").exists()


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
        encoding="utf-8",
    )
    after = os.times()
    seconds_of_cpu = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    assert (result.returncode, result.stderr) == (0, "") and seconds_of_cpu < 1.5
    assert "usage: " in result.stdout
    assert not re.search("None|PosixPath|SUPPRESS", result.stdout)


TOO_OLD = r"tinygrad_lite needs Python 3\.10 or later; this is 3\.9\.[0-9]+\n"


def has_python(command, version):
    """Whether there is a command of this name that runs this version of Python."""
    if shutil.which(command) is None:
        return False
    return version in subprocess.run([command, "--version"], capture_output=True).stdout.decode()


@pytest.mark.skipif(not has_python("python3.9", "Python 3.9."), reason="there is no Python 3.9")
@pytest.mark.parametrize("program", MAINS)
def test_an_old_python_is_told_which_one_is_needed(program):
    code, error = end_of(start(["python3.9", ROOT / f"{program}.py"]))
    assert code == 1 and re.fullmatch(TOO_OLD, error)


def test_a_python_that_seems_old_is_told_which_one_is_needed():
    code = (
        "import sys; sys.version_info, sys.version = (3, 9, 18), '3.9.18 (main)'; "
        "sys.path.insert(0, sys.argv[1]); import tinygrad_lite"
    )
    code, error = end_of(start([sys.executable, "-c", code, ROOT]))
    assert code == 1 and re.fullmatch(TOO_OLD, error)


# Others that are killed.


@pytest.mark.slow
def test_killed_a_hundred_times_while_two_runs_save_to_one_path():
    """Whatever the moment, the file at that path is whole."""
    fault = (
        "model = transformer.Transformer(transformer.Config(14)); path = cli.Path('out.npz')\n"
        "while True: model.save(path); print(flush=True)"
    )
    for i in range(50):
        savers = [start(command_of("sft", fault)) for _ in range(2)]
        for saver in savers:
            for _ in range(i):
                saver.stdout.readline()
        for saver in savers:
            saver.kill()
            saver.communicate()
        assert Transformer.load("out.npz")


@pytest.mark.parametrize("program", ["benchmarks/train_step.py", "benchmarks/sample.py"])
def test_a_bad_flag_of_a_benchmark_costs_one_line(program):
    result = subprocess.run(
        [sys.executable, program, "--rounds", "x"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"see python {program} --help" in result.stderr
