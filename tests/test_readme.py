"""What the pages say is true: examples, commands, exercises, links."""

import doctest
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import data
import dpo
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


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    text = re.sub("```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall("^#+ (.*)", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@every_page
def test_links_to_a_section_name_a_heading(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        if not target.startswith("https://"):
            linked = page.parent / target if target else page
            assert anchor in anchors(linked), (target, anchor)


# Exercises. Each says in `code` what to replace, by what, and what to run then. Its answer is folded.


def exercises():
    """[(old, new, command), ...]; old and new are None where the source stays as it is."""
    section = README.partition("\n## Try it\n")[2].partition("\n## ")[0]
    found = []
    for text in re.findall(r"^\*\*\d\..*?(?=<details>)", section, re.DOTALL | re.MULTILINE):
        text = " ".join(text.split())
        change = re.search("replace `(.*?)` by `(.*?)`", text)
        command = re.search("`(python .*?)`", text)
        old, new = change.groups() if change else (None, None)
        found.append((old, new, command[1]))
    return found


def test_there_are_exercises():
    assert len(exercises()) >= 4
    assert any(old is not None for old, _, _ in exercises())
    assert README.count("<details>") == len(exercises())  # each has an answer


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


# The loop of the README, as it stands.


def the_loop():
    section = README.partition("\n## The loop\n")[2].partition("\n## ")[0]
    return re.search("```python\n(.*?)```", section, re.DOTALL)[1]


def test_the_loop_is_short():
    statements = [line for line in the_loop().splitlines() if line.strip()]
    assert 20 <= len(statements) <= 25


@pytest.mark.slow
def test_the_loop_improves_the_model(copy_of_the_project):
    (copy_of_the_project / "loop.py").write_text(the_loop(), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "loop.py"],
        cwd=copy_of_the_project,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    shares = [float(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(shares) == 5 and shares[-1] > shares[0] + 0.2, shares


# The table of results, from the figures of eval.py that dpo.py keeps in its log.

ROWS = {  # of the README: those of eval.py
    "after SFT, greedy": ("sft.npz", "greedy"),
    "after SFT, sampled": ("sft.npz", "sampled"),
    "after DPO, greedy": ("dpo.npz", "greedy"),
    "after DPO, sampled": ("dpo.npz", "sampled"),
}
HEADER = (
    "| answers to held-out targets | both | exact | format | mean error | % with 2, 3, 4, 5 terms |"
)
DEFAULT_LOG = ROOT / "runs" / "dpo.json"


def table_of(metrics):
    """The README's table in Markdown, from the rows of eval.evaluate."""
    lines = [HEADER, "|---" * 6 + "|"]
    for title, (name, mode) in ROWS.items():
        (row,) = [
            row
            for row in metrics
            if row["checkpoint"].endswith(name)
            and (row["mode"], row["targets"]) == (mode, "held-out")
        ]
        percent = [f"{100 * row['counts'][str(count)] / row['n']:.0f}" for count in data.COUNTS]
        lines.append(
            "| {} | {both:.3f} | {exact:.3f} | {format:.3f} | {mean_abs_error:.2f} | {} |".format(
                title, ", ".join(percent), **row
            )
        )
    return "\n".join(lines)


def numbers_of(table):
    """The numbers of a table, row by row."""
    rows = table.splitlines()[2:]
    return [[float(number) for number in re.findall(r"\d+\.?\d*", row)] for row in rows]


def test_the_readme_has_the_table_of_results():
    table = README[README.index(HEADER) :].partition("\n\n")[0]
    assert [row.split(" | ")[0] for row in table.splitlines()[2:]] == [f"| {row}" for row in ROWS]
    assert [len(row) for row in numbers_of(table)] == [8] * 4


@pytest.mark.slow
def test_the_table_of_results_is_what_eval_prints():
    """After the README's own command; another processor rounds differently."""
    if not DEFAULT_LOG.exists():
        pytest.skip("python sft.py && python dpo.py --beta 0.8 has not been run here")
    log = json.loads(DEFAULT_LOG.read_text(encoding="utf-8"))
    defaults = vars(dpo.parse_arguments([])) | {"out": "runs/dpo.npz", "sft": "runs/sft.npz"}
    if log["settings"] != defaults:
        pytest.skip("runs/dpo.npz is of other settings than the README's")
    table = README[README.index(HEADER) :].partition("\n\n")[0]
    in_readme, rebuilt = numbers_of(table), numbers_of(table_of(log["metrics"]))
    for shown, measured, title in zip(in_readme, rebuilt, ROWS):
        # Greedy answers of the SFT model are 20, and one token more or less decides each.
        loose = title == "after SFT, greedy"
        for column, (a, b) in enumerate(zip(shown, measured)):
            tolerance = (0.5 if loose else 0.05) if column < 4 else (50 if loose else 5)
            assert abs(a - b) <= tolerance, (title, column, a, b)
