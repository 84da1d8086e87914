"""How do the time and the memory of one training step grow with batch, length, width and depth?

    python benchmarks/scaling.py               prints a table and draws assets/scaling.png
    python benchmarks/scaling.py --steady      does memory grow over 2,000 steps?

One size grows, the others stay. The step is the engine's (forward, backward, clipping, Adam) on one
thread; the whole batch is one shard but in the last series, which cuts it as sft.py does. `kept` is
what the tape holds when forward is done, the activations; `peak` is the most the step holds at once
beyond weights and Adam's moments, both as tracemalloc counts them. A peak well above `kept` would
mean that backward does not free what has served. `x` is the growth over the row above.
"""
import argparse
import os
import statistics
import sys
import tracemalloc
from pathlib import Path

from common import (ROOT, Size, describe, engine_step, finish, model_and_batch, print_table,
                    shard_loss, time_calls)
from cli import count

BASE = Size(lines=32, tokens=32, d_model=64, n_layers=2, n_heads=4, d_hidden=128)
SERIES = {"batch (lines)": [8, 16, 32, 64, 128, 256],
          "length (tokens)": [8, 16, 32, 64, 128, 256],
          "width": [16, 32, 64, 128, 256, 512],
          "depth (layers)": [1, 2, 4, 8, 16, 32],
          "batch, in shards": [32, 64, 128, 256, 512, 1024]}
STEADY_SIZE, STEADY_START = Size(64, 18, 32, 2, 4, 64), 100


def grown(series, value):
    """BASE with one size set to value; the hidden width stays twice the width."""
    field = dict(zip(SERIES, ("lines", "tokens", "d_model", "n_layers", "lines")))[series]
    size = BASE._replace(**{field: value})
    return size._replace(d_hidden=2 * size.d_model)


def measure(size, shard, seconds):
    """(milliseconds of a step, bytes the tape keeps after forward, peak bytes of the step)."""
    step = engine_step(size, shard, map)
    step()
    milliseconds = statistics.median(time_calls(step, calls=5, seconds=seconds))
    tracemalloc.start()
    try:
        kept = kept_by_forward(size, shard)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        step()
        return milliseconds, kept, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def kept_by_forward(size, shard):
    model, ids = model_and_batch(size)
    before, _ = tracemalloc.get_traced_memory()
    loss = shard_loss(model, size.lines * size.tokens, ids[:shard])
    kept = tracemalloc.get_traced_memory()[0] - before
    del loss
    return kept


def measure_series(series, seconds):
    """[(value, milliseconds, kept, peak)] of one series."""
    import sft
    rows = []
    for value in SERIES[series]:
        size = grown(series, value)
        shard = sft.SHARD if series == "batch, in shards" else size.lines
        rows.append((value, *measure(size, shard, seconds)))
        print(f"{series} {value}: {rows[-1][1]:.1f} ms", file=sys.stderr)
    return rows


def print_growth(results):
    rows = []
    for series, measured in results.items():
        previous = [None] + [milliseconds for _, milliseconds, _, _ in measured]
        for before, (value, milliseconds, kept, peak) in zip(previous, measured):
            growth = f"{milliseconds / before:.2f}" if before else ""
            rows.append((series, value, f"{milliseconds:.2f}", growth, f"{kept / 1e6:.2f}",
                         f"{peak / 1e6:.2f}", f"{peak / kept:.2f}"))
    print_table(("", "size", "ms", "x", "kept MB", "peak MB", "peak / kept"), rows)


def draw(results, path):
    """Time in the upper row, memory in the lower one; the dashed line grows as the size does."""
    from matplotlib.figure import Figure
    from plots import BLUE, GREY, ORANGE
    figure = Figure(figsize=(3.2 * len(results), 5.6), dpi=120, layout="constrained",
                    facecolor="white")  # opaque: reads the same on light and dark pages
    axes = figure.subplots(2, len(results), sharey="row", sharex="col")
    for column, (series, rows) in zip(axes.T, results.items()):
        values, milliseconds, kept, peak = zip(*rows)
        lines = [(column[0], milliseconds, BLUE, "one step"),
                 (column[1], [n / 1e6 for n in peak], ORANGE, "peak of the step"),
                 (column[1], [n / 1e6 for n in kept], BLUE, "kept for backward")]
        for ax, heights, color, label in lines:
            ax.plot(values, heights, color=color, marker="o", markersize=4, label=label)
        for ax, (_, heights, _, _) in zip(column, (lines[0], lines[2])):
            ax.plot(values, [heights[0] * value / values[0] for value in values], color=GREY,
                    linestyle="--", linewidth=1, label="in proportion", zorder=0)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(values, [f"{value:,}" for value in values])
            ax.grid(color="#e5e5e5", linewidth=0.8)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel(series)
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("megabytes")
    for ax in axes[:, 0]:
        ax.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def print_steady(steps):
    """The peak of resident memory after some and after many steps, in shards and processes."""
    from tinygrad_lite import parallel_map
    with parallel_map(2) as map_fn:
        step = engine_step(STEADY_SIZE, STEADY_SIZE.lines // 4, map_fn)
        rows = []
        for done, until in ((0, min(STEADY_START, steps)), (STEADY_START, steps)):
            for _ in range(done, until):
                step()
            rows.append((f"after {until:,} steps", f"{peak_resident():.1f}"))
    print(f"peak resident memory, {describe(STEADY_SIZE)}")
    print_table(("", "MB"), rows)


def peak_resident():
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def parse_arguments():
    parser = argparse.ArgumentParser(description="How time and memory of a training step grow.")
    add = parser.add_argument
    add("--seconds", type=float, default=1.0, help="time spent on each size, at least; default 1")
    add("--out", type=Path, default=ROOT / "assets" / "scaling.png",
        help="the picture to draw; default assets/scaling.png")
    add("--steady", type=count, nargs="?", const=2000, metavar="N",
        help="instead print peak memory after 100 and after N (2000) steps of a small model")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if arguments.steady:
        print_steady(arguments.steady)
        return
    print(f"base: {describe(BASE)}")
    results = {series: measure_series(series, arguments.seconds) for series in SERIES}
    print_growth(results)
    draw(results, arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    finish(main)
