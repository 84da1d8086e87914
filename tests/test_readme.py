"""What the pages say is true: examples, commands, exercises, links."""

import doctest
import html
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, is_ours

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [path for path in ROOT.rglob("*.md") if is_ours(path)]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@every_page
def test_examples_print_what_they_say(page):
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.failed == 0


def test_the_readme_has_examples():
    parser = doctest.DocTestParser()
    assert len(parser.get_examples(README)) >= 10


# Commands and links.


def commands(text):
    """[(program, flags), ...] of each `python PROGRAM FLAGS` in a page, once."""
    found = re.findall(r"python3? ((?:\w+/)?\w+\.py)([^`&\n(<]*)", text)
    return list(dict.fromkeys((program, flags.strip()) for program, flags in found))


@every_page
def test_commands_name_programs_that_exist(page):
    for program, _ in commands(page.read_text(encoding="utf-8")):
        assert (ROOT / program).is_file(), program


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        is_elsewhere = target.startswith("https://")
        assert is_elsewhere or (page.parent / target).exists(), target


# Exercises. Each is folded, and says in <code> what to replace, by what, and what to run then.


def exercises():
    """[(old, new, command), ...]; old and new are None where the source stays as it is."""
    found = []
    for text in re.findall("<details>(.*?)</details>", README, re.DOTALL):
        text = html.unescape(text)
        change = re.search("<code>(.*?)</code> (?:by|with) <code>(.*?)</code>", text, re.DOTALL)
        command = re.search("<code>(python .*?)</code>", text, re.DOTALL)
        if command is not None:
            old, new = change.groups() if change else (None, None)
            found.append((old, new, command[1]))
    return found


def test_there_are_exercises():
    assert len(exercises()) >= 3
    assert any(old is not None for old, _, _ in exercises())


@pytest.mark.parametrize("old, new, command", exercises())
def test_the_change_of_an_exercise_fits_the_source_once(old, new, command):
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    if old is not None:
        assert sum(source.count(old) for source in sources) == 1, old
        assert new != old


# Every command and exercise, at a size that takes seconds: few steps, but enough for a model whose
# answers make pairs. All else is as written, and flags that come later count.

REDUCED = {
    "sft.py": ["--steps", "3000"],
    "dpo.py": ["--rounds", "3", "--prompts", "24", "--answers", "8"],
    "eval.py": [],
    "benchmarks/train_step.py": ["--sizes", "default", "--rounds", "1", "--steps", "2"],
    "benchmarks/sample.py": ["--prompts", "8", "--rounds", "1"],
}
AT_LEAST_START = ["--help"]  # the experiments of the laboratory have tests of their own


def run(folder, command):
    program, *flags = shlex.split(command)[1:]
    command = [sys.executable, program, *flags, *REDUCED.get(program, AT_LEAST_START)]
    result = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0 and "Traceback" not in result.stderr, (command, result.stderr)


@pytest.fixture(scope="module")
def copy_of_the_project(tmp_path_factory):
    """A copy with a short run of SFT and DPO, since most commands need their checkpoints."""
    folder = tmp_path_factory.mktemp("project") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "mutants"))
    run(folder, "python sft.py")
    run(folder, "python dpo.py")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("program, flags", commands(README))
def test_a_command_of_the_readme_runs(copy_of_the_project, program, flags):
    run(copy_of_the_project, f"python {program} {flags}")


@pytest.mark.slow
@pytest.mark.parametrize("old, new, command", exercises())
def test_an_exercise_runs(copy_of_the_project, old, new, command):
    before = {path: path.read_text(encoding="utf-8") for path in copy_of_the_project.glob("*.py")}
    try:
        if old is not None:
            for path, source in before.items():
                path.write_text(source.replace(old, new), encoding="utf-8")
        run(copy_of_the_project, command)
    finally:
        for path, source in before.items():
            path.write_text(source, encoding="utf-8")
