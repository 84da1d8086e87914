"""What the benchmarks share: sizes, the turns of contestants, a table."""

# ruff: noqa: E402  the project's modules can be imported only after the path is set

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "examples")]  # the project's modules

from tinygrad_lite import launch  # before NumPy, see there
from cli import Parser, UserError, whole
from data import VOCAB
from transformer import Config, Transformer

if hasattr(os, "sched_getaffinity"):
    CORES = len(os.sched_getaffinity(0))  # those that this process may use
else:
    CORES = os.cpu_count() or 1


class Size(NamedTuple):
    """Sizes of a batch and of a model."""

    lines: int
    tokens: int
    d_model: int
    n_layers: int
    n_heads: int
    d_hidden: int


SIZES = {
    "default": Size(128, 18, 32, 2, 4, 96),  # what sft.py trains
    "demo": Size(256, 24, 64, 4, 8, 128),  # this one and the next are larger
    "wide": Size(256, 20, 128, 2, 4, 512),
}


class Contestant(NamedTuple):
    """One of the programs that are compared, and the ways to run it: the quickest way counts."""

    function: Callable  # what it takes is up to the benchmark
    ways: list  # of (processes, threads in each)


class Score(NamedTuple):
    """What came out of a contestant's turns."""

    median: float  # milliseconds of a call
    workers: int  # processes or threads
    check: list  # what it computed, to compare with the others


def new_model(size):
    """A new Transformer, always with the same weights."""
    config = Config(
        vocab_size=len(VOCAB),
        d_model=size.d_model,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        d_hidden=size.d_hidden,
    )
    return Transformer(config, seed=0)


def time_call(function):
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def new_parser(description):
    """The flags that the benchmarks share. The hidden one starts one turn of one contestant."""
    formatter = argparse.ArgumentDefaultsHelpFormatter  # --help shows every default
    parser = Parser(prog=sys.argv[0], description=description, formatter_class=formatter)
    add = parser.add_argument
    add("--rounds", type=whole(1), default=5, help="turns of each contestant")
    add("--json", action="store_true", help="print the figures as JSON")
    add("--worker", nargs=3, help=argparse.SUPPRESS)  # name, processes, threads
    return parser


def run(parser, flag, contestants, work, report):
    """A benchmark's main program: a table, or with --json a record, of each case.

    flag: the flag, without dashes, whose value is the list of cases.
    contestants: {name: Contestant}; all others are compared with the first.
    work(world, function, threads, case, arguments): one turn of a contestant's function, in every
        process of `world`. Returns {"times": milliseconds of each call, "check": a list}.
    report(case, {name: Score}, arguments): the record as a dict, and what print_table needs: the
        table's title, the number of units in a call, and the unit's name.
    """
    arguments = parser.parse_args()
    cases = getattr(arguments, flag)
    if arguments.worker:
        name, processes, threads = arguments.worker
        function = contestants[name].function
        result = launch(int(processes), work, function, int(threads), cases[0], arguments)
        print(json.dumps(result))
        return
    records = []
    for case in cases:
        scores = take_turns(contestants, [f"--{flag}", str(case)], arguments.rounds)
        record, title, n, unit = report(case, scores, arguments)
        records.append(record)
        if not arguments.json:
            print_table(scores, title, n, unit)
    if arguments.json:
        print(json.dumps(records, indent=2))


def take_turns(contestants, flags, rounds):
    """{name: Score} of each contestant's quickest way, or None if no way works here.

    Each turn is a process of its own, because idle threads of one library would spin while another
    one works. Turns alternate, so that whatever else the machine does affects all contestants.
    """
    turns = {}  # {(name, processes, threads): what `work` has returned in each turn}
    for name, contestant in contestants.items():
        for processes, threads in contestant.ways:
            turns[name, processes, threads] = []
    for turn in range(rounds):
        order = list(turns)
        if turn % 2 == 1:
            order.reverse()  # so that the predecessor is not always the same
        for name, processes, threads in order:
            label = f"{name}, {processes} x {threads}"
            result, reason = take_turn(name, processes, threads, flags)
            if result is None:
                print(f"{label}: left out, {reason}", file=sys.stderr)
                del turns[name, processes, threads]
            else:
                turns[name, processes, threads].append(result)
                median = statistics.median(result["times"])
                print(f"turn {turn + 1}/{rounds}  {label}: {median:.1f} ms", file=sys.stderr)

    scores = dict.fromkeys(contestants)
    for (name, processes, threads), results in turns.items():
        times = [ms for result in results for ms in result["times"]]
        score = Score(statistics.median(times), max(processes, threads), results[0]["check"])
        if scores[name] is None or score.median < scores[name].median:
            scores[name] = score
    if next(iter(scores.values())) is None:
        raise UserError("the engine itself does not work; nothing to compare with")
    return scores


def take_turn(name, processes, threads, flags):
    """One turn in a new process: (what `work` returned, None), or (None, why it failed)."""
    environment = {key: value for key, value in os.environ.items() if "_NUM_THREADS" not in key}
    environment["OPENBLAS_NUM_THREADS"] = str(threads)
    environment["VECLIB_MAXIMUM_THREADS"] = str(threads)  # macOS
    worker = ["--worker", name, str(processes), str(threads)]
    done = subprocess.run(
        [sys.executable, *sys.argv, *flags, *worker],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), None
    lines = done.stderr.strip().splitlines()
    return None, lines[-1] if lines else f"exit code {done.returncode}"


def print_table(scores, title, n, unit):
    """A row for each contestant: its time, the ratio to the first one's, and units in a second."""
    first = next(iter(scores))
    ratio_header, unit_header = f"x {first}", f"{unit}/s"
    print(f"\n{title}")
    print(f"{'':20}processes or threads  median ms  {ratio_header:>8}  {unit_header:>11}")
    for name, score in scores.items():
        if score is not None:
            ratio = score.median / scores[first].median
            print(
                f"{name:20}{score.workers:>20}  {score.median:9.1f}  {ratio:8.2f}  "
                f"{1000 * n / score.median:11,.0f}"
            )
