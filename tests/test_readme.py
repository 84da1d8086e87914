"""What the README says is true: its examples, its commands, its line counts."""
import ast
import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cli

ROOT = Path(cli.__file__).parent
README = (ROOT / "README.md").read_text()


def test_examples_print_what_they_say():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 10 and result.failed == 0


def test_every_command_is_one_its_program_takes():
    commands = re.findall(r"python (sft|dpo|eval)\.py([^`&\n(]*)", README)
    assert len(commands) >= 6
    for program, flags in commands:
        cli.PARSERS[program]().parse_args(shlex.split(flags))


def test_commands_of_other_programs_name_files_that_are_there():
    for name in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", README):
        assert (ROOT / name).is_file(), name


# What makes a command of the README short: fewer steps, the same everything else.
SHORT = {"sft.py": "--steps 30", "dpo.py": "--rounds 2 --prompts 16 --answers 2",
         "benchmarks/train_step.py": "--sizes default --rounds 1 --steps 2",
         "benchmarks/sample.py": "--prompts 8 --rounds 1", "benchmarks/scaling.py": "--help",
         "benchmarks/profile_step.py": "--steps 2", "benchmarks/experiments.py": "--help"}


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """As written, but for SHORT; in the order of the main command, then of the README."""
    found = re.findall(r"python ((?:benchmarks/)?\w+\.py)([^`&\n(]*)", README)
    commands = [("sft.py", ""), ("dpo.py", " --pairs rule"), *found]
    for program, flags in dict.fromkeys(commands):
        command = [sys.executable, ROOT / program, *shlex.split(flags),
                   *SHORT.get(program, "").split()]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (command, result.stderr)
        assert result.stdout and "Traceback" not in result.stderr, (command, result.stderr)


def line_counts(path):
    """All lines of a file, and those that are neither blank nor comment nor docstring."""
    source = path.read_text()
    lines, documentation = source.splitlines(), set()
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return np.array([len(lines), sum(number not in documentation and not re.match(r"\s*(#|$)", line)
                                     for number, line in enumerate(lines, 1))])


def test_line_counts():
    rows = re.findall(r"^\| (?:\[([\w/.]+)\]\(\1\)|([\w, `/]+)) \| ([\d,]+) \| ([\d,]+) \|",
                      README, re.MULTILINE)
    told = {link or text: [int(n.replace(",", "")) for n in numbers]
            for link, text, *numbers in rows}
    engine = {path: line_counts(path) for path in ROOT.glob("tinygrad_lite/*.py")}
    counts = engine | {path: line_counts(path) for path in ROOT.glob("*.py")}
    expected = {str(path.relative_to(ROOT)): list(pair) for path, pair in counts.items()
                if path.name != "__init__.py"}
    assert told == expected | {"the engine, `tinygrad_lite/`": list(sum(engine.values())),
                               "all": list(sum(counts.values()))}


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_no_line_is_over_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"
