"""What the README says is true: its examples, its commands, its line counts."""
import doctest
import re
import shlex
from pathlib import Path

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


def test_line_counts():
    rows = re.findall(r"^\| \[?([\w/.]+\.py)\]?(?:\([^)]*\))? \| (\d+) \|", README, re.MULTILINE)
    sources = [*ROOT.glob("*.py"), *ROOT.glob("tinygrad_lite/*.py")]
    counts = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    counts.pop("tinygrad_lite/__init__.py")
    assert {name: int(lines) for name, lines in rows} == counts


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_no_line_is_over_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"
