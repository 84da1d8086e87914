"""What the benchmarks share: sizes, processes that take turns, a table."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "examples")]

from cli import Parser, whole  # noqa: E402
from tinygrad_lite import launch  # noqa: E402
from transformer import Config, Transformer  # noqa: E402

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
VOCABULARY = 14
Size = namedtuple("Size", "lines tokens d_model n_layers n_heads d_hidden")
# "default" is the first edition's, so that figures compare; "demo" is the demo's.
SIZES = {
    "default": Size(128, 18, 32, 3, 4, 64),
    "demo": Size(256, 24, 64, 4, 8, 128),
    "wide": Size(256, 20, 128, 2, 4, 512),
}
Score = namedtuple("Score", "median workers check")  # ms, processes or threads, what it computed


def new_model(size):
    """A new Transformer, always with the same weights."""
    return Transformer(Config(VOCABULARY, size.d_model, size.n_layers, size.n_heads, size.d_hidden))


def time_calls(function, world, calls, seconds=0.0):
    """Milliseconds of each call: of so many, and more until they fill so many seconds, by a sum
    over processes, so that all of them make the same number of calls."""
    times = []
    while len(times) < calls or world.all_reduce(sum(times)) < 1000 * seconds * world.world_size:
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


def new_parser(description):
    """The flags that the benchmarks share; the hidden one starts one turn of one contestant."""
    parser = Parser(description)
    parser.add_argument("--rounds", type=whole(1), default=5, help="turns of each contestant")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # name, processes, threads
    return parser


def run(parser, flag, contestants, work, report):
    """Print report(case, {name: Score}, arguments) = (JSON record, title, n, unit) of each case in
    `flag`. `contestants`: {name: (function, [(processes, threads), ...])}; a turn of one prints
    work(world, function, threads, case, arguments)."""
    arguments, records = parser.parse_args(), []
    cases = getattr(arguments, flag)
    try:
        if arguments.worker:
            name, processes, threads = arguments.worker
            print(
                json.dumps(
                    launch(
                        int(processes),
                        work,
                        contestants[name][0],
                        int(threads),
                        cases[0],
                        arguments,
                    )
                )
            )
            return
        for case in cases:
            scores = take_turns(contestants, [f"--{flag}", str(case)], arguments.rounds)
            record, *table = report(case, scores, arguments)
            records.append(record)
            if not arguments.json:
                print_table(scores, *table)
        if arguments.json:
            print(json.dumps(records, indent=2))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def take_turns(contestants, flags, rounds):
    """{name: Score} of each contestant's quickest way, by the median over all turns; None for what
    does not work here. Each turn is a process of its own: in one, idle threads of a library would
    spin while the other works. Turns spread what else the machine does over all."""
    environment = {key: value for key, value in os.environ.items() if "_NUM_THREADS" not in key}
    turns = {(name, *way): [] for name, (_, ways) in contestants.items() for way in ways}
    for turn in range(rounds):
        for key in list(turns)[:: -1 if turn % 2 else 1]:  # not always the same predecessor
            name, processes, threads = map(str, key)
            environment["OPENBLAS_NUM_THREADS"] = environment["VECLIB_MAXIMUM_THREADS"] = threads
            done = subprocess.run(
                [sys.executable, *sys.argv, *flags, "--worker", name, processes, threads],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                print(f"{name}, {processes} x {threads}: left out, {reason}", file=sys.stderr)
                del turns[key]
            else:
                turns[key].append(json.loads(done.stdout.splitlines()[-1]))
                ms = statistics.median(turns[key][-1]["times"])
                print(
                    f"turn {turn + 1}/{rounds}  {name}, {processes} x {threads}: {ms:.1f} ms",
                    file=sys.stderr,
                )
    scores = dict.fromkeys(contestants)
    for (name, *way), results in turns.items():
        median = statistics.median([ms for result in results for ms in result["times"]])
        score = Score(median, max(way), results[0]["check"])
        scores[name] = min(score, scores[name] or score)
    if not scores[next(iter(contestants))]:
        sys.exit("the engine itself does not work; nothing to compare with")
    return scores


def print_table(scores, title, n, unit):
    """A row for each contestant: its ratio to the first, and n units in each call."""
    first = next(iter(scores))
    print(f"\n{title}\n{'':20}processes or threads  median ms  {f'x {first}':>8}  {unit:>9}/s")
    for name, (median, workers, _) in ((name, s) for name, s in scores.items() if s):
        print(
            f"{name:20}{workers:>20}  {median:9.1f}  {median / scores[first].median:8.2f}  "
            f"{1000 * n / median:11,.0f}"
        )
