"""What the benchmarks share: sizes, the engine's training step, processes that take turns, tables.

Only the standard library is imported here. A process that is to be timed imports NumPy once its
environment is set, since OpenBLAS reads its number of threads when it loads.
"""
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))  # the project's modules, from wherever the script is started

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
VOCABULARY = 14
LEARNING_RATE, BETAS, EPS, MAX_NORM = 1e-3, (0.9, 0.99), 1e-8, 1.0
Size = namedtuple("Size", "lines tokens d_model n_layers n_heads d_hidden")
SIZES = {"default": Size(128, 18, 32, 3, 4, 64),
         "demo": Size(256, 24, 64, 4, 8, 128),
         "wide": Size(256, 20, 128, 2, 4, 512)}


def describe(size):
    return (f"{size.lines} lines x {size.tokens} tokens, d {size.d_model}, {size.n_layers} layers, "
            f"{size.n_heads} heads, hidden {size.d_hidden}")


# The step.

def model_and_batch(size):
    """A new Transformer, always with the same weights, and random ids (lines, tokens + 1)."""
    import numpy as np
    from transformer import Config, Transformer
    config = Config(VOCABULARY, size.d_model, size.n_layers, size.n_heads, size.d_hidden,
                    max_len=size.tokens + 1)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (size.lines, size.tokens + 1))
    return Transformer(config, seed=0), ids


def engine_step(size, shard, map_fn):
    """The engine's training step, as in sft.train but on one batch: a function, gives the loss."""
    import numpy as np
    from tinygrad_lite import Adam, clip_grad_norm, value_and_grad
    model, ids = model_and_batch(size)
    parameters = model.parameters()
    optimizer = Adam(parameters, LEARNING_RATE, BETAS, EPS)
    shards = np.split(ids, range(shard, len(ids), shard))
    loss = partial(shard_loss, model, size.lines * size.tokens)

    def step():
        losses = value_and_grad(loss, parameters, shards, map_fn)
        clip_grad_norm(parameters, MAX_NORM)
        optimizer.step()
        return math.fsum(losses)
    return step


def shard_loss(model, n_tokens, ids):
    """A shard's part of the mean of - log p(token | tokens before it) over n_tokens."""
    from tinygrad_lite import functional as F
    return -F.token_log_probs(model(ids[:, :-1]), ids[:, 1:]).sum() / n_tokens


@contextmanager
def mapper(name, threads):
    """The engine's map over as many processes; over threads for the products, whose arrays would
    have to travel; just `map` for a library that has threads of its own."""
    from tinygrad_lite import parallel_map
    if threads == 1 or name.startswith(("torch", "jax", "hugging")):
        yield map
    elif name == "products":
        with ThreadPoolExecutor(threads) as pool:
            yield pool.map
    else:
        with parallel_map(threads) as map_fn:
            yield map_fn


def time_calls(function, calls=0, seconds=0.0):
    """Milliseconds of each call: of so many calls, or of as many as fill so many seconds."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < calls or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


# Processes that take turns.

class Contestant(namedtuple("Contestant", "name threads blas_threads", defaults=(1,))):
    """One way to do the work: `threads` of its own (processes, in this engine's case), each with
    `blas_threads` of NumPy's BLAS."""


def take_turns(script, contestants, flags, rounds):
    """Run each contestant alone in a process of its own, one after the other, `rounds` times over.

    Two libraries in one process would slow each other down: idle threads of one spin while the
    other works. Turns spread whatever else the machine does over all. Returns {contestant: [result
    of each turn]} without those that do not work here, after a message about them on stderr.
    """
    results, reasons = {contestant: [] for contestant in contestants}, set()
    for turn in range(rounds):
        for contestant in contestants[::-1 if turn % 2 else 1]:  # not always the same predecessor
            if contestant not in results:
                continue
            result = _run_alone(script, contestant, flags)
            if "left_out" in result:
                del results[contestant]
                if result["left_out"] not in reasons:
                    print(f"{result['left_out']}: left out", file=sys.stderr)
                reasons.add(result["left_out"])
                continue
            results[contestant].append(result)
            print(f"turn {turn + 1}/{rounds}  {contestant.name}, threads {contestant.threads}: "
                  f"{statistics.median(result['times']):.1f} ms", file=sys.stderr)
    return results


def _run_alone(script, contestant, flags):
    """What one worker process prints as JSON: its times, or why it is left out."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.endswith("_NUM_THREADS")}
    environment["OPENBLAS_NUM_THREADS"] = str(contestant.blas_threads)
    command = [sys.executable, script, "--worker", contestant.name,
               "--threads", str(contestant.threads), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"left_out": f"{contestant.name} failed ({reason})"}
    return json.loads(done.stdout.splitlines()[-1])


def run_worker(work, name, *arguments):
    """The worker's side: print work(...)'s result as JSON, or which package is missing."""
    try:
        print(json.dumps(work(name, *arguments)))
    except ModuleNotFoundError as error:
        print(json.dumps({"left_out": f"{error.name} is not installed"}))


Score = namedtuple("Score", "median low high threads")  # low and high: of the medians of turns


def best_scores(results):
    """{name: Score} of each name's quickest number of threads, by the median over all its turns."""
    scores = {}
    for contestant, turns in results.items():
        medians = [statistics.median(turn["times"]) for turn in turns]
        median = statistics.median([ms for turn in turns for ms in turn["times"]])
        score = Score(median, min(medians), max(medians), contestant.threads)
        if contestant.name not in scores or median < scores[contestant.name].median:
            scores[contestant.name] = score
    return scores


def finish(main):
    """Run a script's main; Ctrl-C ends it with one line and exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def print_table(header, rows):
    """Columns as wide as their widest cell: the first left-aligned, the others right-aligned."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
