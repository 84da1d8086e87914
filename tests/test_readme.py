"""What the pages say is true: examples, commands, exercises, line counts, links."""

import ast
import doctest
import os
import re
import shlex
import subprocess
import sys

import pytest

from helpers import ROOT

README, LABORATORY = ((ROOT / page).read_text() for page in ("README.md", "LABORATORY.md"))
PAGES = [
    path for path in ROOT.rglob("*.md") if not {".venv", ".pytest_cache", "runs"} & set(path.parts)
]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]


@pytest.mark.parametrize("page, n", [("README.md", 15), ("LABORATORY.md", 5)])
def test_examples_print_what_they_say(page, n):
    result = doctest.testfile(str(ROOT / page), module_relative=False)
    assert result.attempted >= n and result.failed == 0


def commands(page):
    """[(program, flags), ...] of `python PROGRAM FLAGS` in text and in blocks."""
    found = re.findall(r"python ((?:benchmarks/|examples/)?\w+\.py)([^`&\n(<]*)", page)
    return list(dict.fromkeys((program, flags.strip()) for program, flags in found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_files_and_links_lead_somewhere(page):
    text = page.read_text()
    for program, _ in commands(text):
        assert (ROOT / program).is_file(), program
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


# What makes a command short: few steps, but enough for answers to make pairs; all else as written.
SHORT = {
    "sft.py": "--steps 3000",
    "dpo.py": "--rounds 3 --prompts 24 --answers 8",
    "benchmarks/train_step.py": "--sizes default --rounds 1 --steps 2",
    "benchmarks/sample.py": "--prompts 8 --rounds 1",
    "benchmarks/experiments.py": "--help",
}


def exercises():
    """[(old, new, command), ...] of the folded answers; old and new are "" if nothing changes."""
    found = []
    for answer in re.findall(r"<details>(.*)</details>", README):
        *change, command = re.findall(r"<code>(.*?)</code>", answer)
        found.append((*(change or ("", "")), command))
    return found


def run(folder, command):
    program, *flags = shlex.split(command)[1:]
    command = [sys.executable, program, *flags, *SHORT.get(program, "").split()]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "Traceback" not in result.stderr, (command, result.stderr)
    return result.stdout


def test_every_exercise_has_an_answer_that_fits_the_source():
    assert len(exercises()) == 5
    for old, _, command in exercises():
        assert not old or sum(path.read_text().count(old) for path in ROOT.glob("*.py")) == 1, old
        assert command.startswith("python dpo.py")


@pytest.fixture
def experiments(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import experiments

    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    return experiments


def test_the_laboratory_shows_the_changes_and_the_runs_that_it_makes(experiments):
    for old, new in experiments.CHANGES.values():
        assert (ROOT / "dpo.py").read_text().count(old) == 1 <= LABORATORY.count(f"`{old}`")
        assert new == "pass" or f"`{new}`" in LABORATORY
    for columns, runs in experiments.LABORATORY.values():
        assert "| dpo.py | " + " | ".join(columns) + " |" in LABORATORY
        for flags in runs:
            assert f"| `{flags or '(defaults)'}` | " in LABORATORY


@pytest.mark.slow
def test_the_laboratory_runs(experiments, monkeypatch, tmp_path, capsys):
    experiments.run("sft", "sft0", "--steps", "3000")
    start = experiments.run
    monkeypatch.setattr(
        experiments,
        "run",
        lambda program, name, *flags, change=None: start(
            program, name, *flags, *SHORT["dpo.py"].split(), change=change
        ),
    )
    experiments.laboratory(1)
    rows = re.findall(r"^\| `.*\|$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == sum(len(runs) for _, runs in experiments.LABORATORY.values())


@pytest.mark.slow
def test_every_command_and_exercise_runs(experiments, tmp_path):
    experiments.copy_programs(tmp_path)
    run(tmp_path, "python sft.py")  # a checkpoint to start from
    run(tmp_path, "python dpo.py")
    for program, flags in dict.fromkeys(commands(README) + commands(LABORATORY)):
        if not program.startswith("benchmarks"):
            run(tmp_path, f"python {program} {flags}")
    for program in (
        "benchmarks/train_step.py",
        "benchmarks/sample.py",
        "benchmarks/experiments.py",
    ):
        run(ROOT, f"python {program}")
    for old, new, command in exercises():
        before = {path: path.read_text() for path in tmp_path.glob("*.py")}
        for path, text in before.items() if old else ():
            path.write_text(text.replace(old, new))
        run(tmp_path, command)
        for path, text in before.items():
            path.write_text(text)


def test_line_counts():
    told = {
        name: int(number.replace(",", ""))
        for name, number in re.findall(
            r"^\| \[?([\w/.]+)\]?(?:\([\w/.]+\))? \| ([\d,]+) \|", README, re.MULTILINE
        )
    }
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in SOURCES
        if path.parent == ROOT or path.parent.name == "tinygrad_lite"
    }
    assert told == {
        **{name: n for name, n in counts.items() if "__init__" not in name},
        "all": sum(counts.values()),
    }


def test_no_line_is_over_100_columns_and_no_function_over_45_lines():
    for path in SOURCES:
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 100, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, (path, node.name)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230
    assert os.path.getsize(ROOT / "assets" / "dpo-training.png") < 500_000
