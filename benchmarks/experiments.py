"""The experiments behind the README's tables and pictures, each from the commands a reader types.

    python benchmarks/experiments.py seeds     five seeds of SFT and DPO, --pairs rule beside them
    python benchmarks/experiments.py lesson    assets/lesson.png: rule pairs beside sampled pairs
    python benchmarks/experiments.py beta      assets/beta.png: a sweep of beta from 0.1 to 3

`seeds` takes about eight minutes a seed, one on each core; `lesson` and `beta` start from what it
wrote. A run that is there already is not made again.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = ROOT / "runs" / "experiments"
BETAS = [0.1, 0.3, 0.8, 3.0]
RULE = ["--pairs", "rule", "--rounds", "200", "--lr", "1e-4"]  # as many steps as the demo, its rate


def run(program, out, *flags):
    """One training run on one core, unless its facts are there; returns them."""
    path = RUNS / f"{out}.npz"
    if not path.with_suffix(".json").exists():
        subprocess.run([sys.executable, f"{program}.py", "--threads", "1", "--out", path, *flags],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.with_suffix(".json").read_text())


def one_seed(seed, rule=True):
    """SFT, DPO and, from the same SFT, DPO on rule pairs."""
    sft = RUNS / f"sft{seed}.npz"
    facts = {"SFT": run("sft", f"sft{seed}", "--seed", str(seed)),
             "DPO": run("dpo", f"dpo{seed}", "--seed", str(seed), "--sft", sft)}
    if rule:
        facts["DPO, rule pairs"] = run("dpo", f"rule{seed}", "--seed", str(seed), "--sft", sft,
                                       *RULE)
    return facts


def row(facts, mode, targets):
    """The metrics of the trained model: a DPO run's facts hold those of its start, too."""
    return [r for r in facts["metrics"] if (r["mode"], r["targets"]) == (mode, targets)][-1]


def seeds(arguments):
    """The table of means and ranges over seeds."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(one_seed, range(arguments.seeds)))
    print(f"mean (lowest to highest) of {len(found)} seeds\n")
    print("| | answers | mean error | exact | format | three terms |\n|---|---|---|---|---|---|")
    for name in found[0]:
        for mode, targets in (("greedy", "all"), ("greedy", "held-out"), ("sampled", "held-out")):
            rows = [row(facts[name], mode, targets) for facts in found]
            cells = [spread([r[key] for r in rows])
                     for key in ("mean_abs_error", "exact", "format", "preferred")]
            print(f"| {name} | {mode}, {targets} | " + " | ".join(cells) + " |")
        print(f"| {name} | seconds, on one core | "
              f"{spread([facts[name]['seconds'] for facts in found], 0)} | | | |")


def spread(values, digits=3):
    import plots
    mean, low, high = (plots.shortened(value, digits) for value in
                       (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def lesson(arguments):
    """Where the probability goes, under rule pairs and under sampled pairs."""
    facts = one_seed(0)
    runs = {"rule pairs": facts["DPO, rule pairs"]["history"],
            "sampled pairs": facts["DPO"]["history"]}
    for title, history in runs.items():
        for when, log in (("first", history[1]), ("last", history[-1])):
            shown = {key: round(log[key], 2) for key in ("loss", "logps/chosen", "logps/rejected")}
            print(f"{title}, {when} round: {shown}")
        measured = [log for log in history if "masses" in log]
        print(f"{title}, answers at the start: {measured[0]['masses']}\n"
              f"{title}, answers at the end:   {measured[-1]['masses']}")
    draw_lesson(runs, ROOT / "assets" / "lesson.png")


def draw_lesson(runs, path):
    """What DPO does to the answers, for each of {title: history}: kinds of answers, and logps."""
    import plots
    figure, grid = plots.axes(2, len(runs), size=(5.6 * len(runs), 7), sharey="row")
    for i, (title, history) in enumerate(runs.items()):
        plots.answer_kinds(grid[i], history, title)
        plots.lines(grid[len(runs) + i], history, {"logps/chosen": plots.GREEN,
                                                   "logps/rejected": plots.RED},
                    "log-probability of a completion")
    plots.save(figure, path)


def beta(arguments):
    """Preferred and exact answers against the divergence from the reference, for several betas."""
    one_seed(0, rule=False)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        points = list(pool.map(partial(point, RUNS / "sft0.npz"), BETAS))
    for p in points:
        print("  ".join(f"{name} {value:.3f}" for name, value in p.items()))
    draw_sweep(points, ROOT / "assets" / "beta.png")


def point(sft, beta):
    """One DPO run: metrics on held-out targets, and KL(policy || reference) on their answers."""
    import numpy as np
    import data
    import eval as evaluation
    from sft import completion_logps
    from tinygrad_lite import no_grad
    name = "dpo0" if beta == 0.8 else f"beta{beta:g}"
    facts = run("dpo", name, "--seed", "0", "--sft", sft, "--beta", str(beta))
    policy, reference = evaluation.load(RUNS / f"{name}.npz"), evaluation.load(sft)
    lines = data.pad(evaluation.sample(policy, data.HELD_OUT * 50, 1.0, np.random.default_rng(0)))
    with no_grad():
        logps, reference_logps = (completion_logps(m, lines).numpy() for m in (policy, reference))
    metrics = row(facts, "sampled", "held-out")
    return {"beta": beta, "divergence": float((logps - reference_logps).mean()),
            "preferred": metrics["preferred"], "exact": metrics["exact"]}


def draw_sweep(points, path):
    """One place on each curve for each of `points`, labelled with its beta."""
    import plots
    figure, (ax,) = plots.axes()
    points = sorted(points, key=lambda point: point["divergence"])
    for name, colour in (("preferred", plots.ORANGE), ("exact", plots.BLUE)):
        ax.plot([p["divergence"] for p in points], [p[name] for p in points], "o-", color=colour,
                label=name)
    for p in points:
        ax.annotate(f"{p['beta']:g}", (p["divergence"], min(p["preferred"], p["exact"])),
                    textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)
    ax.margins(0.08, 0.15)  # room for the labels
    ax.set(xlabel="KL(policy || reference), nats per answer", ylabel="share of sampled answers",
           title="held-out targets, labelled by beta")
    ax.legend(frameon=False)
    plots.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["seeds", "lesson", "beta"])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    arguments = parser.parse_args()
    {"seeds": seeds, "lesson": lesson, "beta": beta}[arguments.experiment](arguments)


if __name__ == "__main__":
    main()
