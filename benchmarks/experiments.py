"""The experiments behind the README's tables and pictures, each from the commands a reader types.

    python benchmarks/experiments.py seeds        five seeds, the demo's recipe beside
    python benchmarks/experiments.py lesson       assets/lesson.png: three sources of pairs
    python benchmarks/experiments.py beta         assets/beta.png: what beta buys, what it costs
    python benchmarks/experiments.py laboratory   the tables of LABORATORY.md, two seeds of each run

Each run takes a few minutes on two cores. What is in runs/experiments/ is not made again, so
all start from the SFT models of `seeds`.
"""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import data  # noqa: E402
import plots  # noqa: E402
from sft import completion_logps  # noqa: E402
from tinygrad_lite import no_grad  # noqa: E402
import numpy as np  # noqa: E402

RUNS = ROOT / "runs" / "experiments"
DEMO = "--pairs rule --rounds 200 --lr 1e-4 --prompts 192"  # its recipe
SOURCES = {
    "rule": "right sums made by rule",
    "once": "own answers, sampled once",
    "online": "own answers, sampled afresh",
}
BETAS = [0.05, 0.3, 0.8, 3.0]
CHANGES = {  # of a line of dpo.py, which some runs of the laboratory make: old, new
    "mean": (
        "logps = completion_logps(model, lines)",
        "logps = completion_logps(model, lines) / data.completion_mask(lines).sum(axis=1)",
    ),
    "no clip": ("clip_grad_norm(parameters, 1.0)", "pass"),
    "divisor": ("loss = loss * (len(shard) / n_pairs)", "loss = loss * (len(shard) / 384)"),
    "own": ("n_by_rule = -(-len(targets) // 32)", "n_by_rule = 0"),
}
LABORATORY = {  # section: the numbers it shows and its runs, flags and a change
    "1. The chosen reward": (
        [
            "loss",
            "chosen",
            "rejected",
            "held-out chosen",
            "held-out accuracy",
            "exact",
            "divergence",
        ],
        ["--pairs rule", "--pairs once", "--rounds 1500, own", ""],
    ),
    "2. Loss 0, accuracy 1": (
        ["loss", "accuracy", "held-out accuracy", "exact before", "exact", "both"],
        [
            "--pairs once",
            "--pairs once --rounds 50",
            "--pairs once --rounds 300 --lr 4e-5",
            "--pairs once --rounds 300 --beta 3",
            "--pairs rule",
            "",
        ],
    ),
    "3. The rate": (
        ["highest loss", "lowest accuracy", "negative margins", "exact", "both"],
        [
            *(f"--lr 1.5e-3 --rounds 300{change}" for change in ("", ", no clip", ", divisor")),
            "--rounds 300",
            "",
        ],
    ),
    "4. Sum or mean": (
        ["margin", "terms", "exact", "both", "divergence"],
        [
            f"{pairs}--rounds 300{rest}"
            for pairs in ("--pairs once ", "")
            for rest in ("", ", mean", " --beta 6.4, mean")
        ],
    ),
    "5. An SFT term": (
        ["chosen", "rejected", "exact", "both", "divergence"],
        [
            f"--pairs {pairs} --rounds 300{rest}"
            for pairs in ("rule", "once")
            for rest in ("", " --sft-weight 0.1", " --sft-weight 1", " --sft-weight 10")
        ],
    ),
    "7. Beta": (
        ["margin", "exact", "both", "divergence", "nine in ten"],
        [f"--beta {value:g}" if value != 0.8 else "" for value in BETAS],
    ),
    "8. Fresh pairs": (
        ["loss", "accuracy", "exact", "both", "nine in ten"],
        ["--pairs rule", "--pairs once", "--fresh-every 100", "--fresh-every 10", ""],
    ),
}


def copy_programs(folder):
    """All that the programs need, in another folder, where it may be changed."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tinygrad_lite/*.py")]:
        copy = Path(folder, path.relative_to(ROOT))
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)


def run(program, name, *flags, change=None):
    """The facts of a training run, trained unless they are there."""
    out = RUNS / f"{name}.npz"
    if not out.with_suffix(".json").exists():
        print(f"training {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as copy:
            if change:
                copy_programs(copy)
                script = Path(copy, "dpo.py")
                script.write_text(script.read_text().replace(*CHANGES[change]))
            subprocess.run(
                [sys.executable, f"{program}.py", "--out", out, *flags],
                check=True,
                cwd=copy if change else ROOT,
                stdout=subprocess.DEVNULL,
            )
    return json.loads(out.with_suffix(".json").read_text())


def sft(seed):
    """The facts of a run of sft.py."""
    return run("sft", f"sft{seed}", "--seed", str(seed))


def sft_path(seed):
    sft(seed)
    return RUNS / f"sft{seed}.npz"


def name_of(seed, flags):
    """The name of the files of a run of dpo.py."""
    return "-".join(["dpo", *re.findall(r"[\w.]+", flags), f"seed{seed}"])


def dpo(seed, flags=""):
    """The facts of a run of dpo.py; `flags` may end with a comma and one of CHANGES."""
    options, _, change = flags.partition(", ")
    return run(
        "dpo",
        name_of(seed, flags),
        "--seed",
        str(seed),
        "--sft",
        sft_path(seed),
        *options.split(),
        change=change,
    )


def metrics(name, mode="sampled", targets="held-out"):
    """Metrics of a checkpoint, 200 answers to each target, measured unless they are there."""
    path = RUNS / f"{name}-metrics.json"
    if not path.exists():
        command = [
            sys.executable,
            ROOT / "eval.py",
            RUNS / f"{name}.npz",
            "--samples",
            "200",
            "--json",
        ]
        path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (row,) = [
        row
        for row in json.loads(path.read_text())
        if (row["mode"], row["targets"]) == (mode, targets)
    ]
    return row


def means(facts, name, window):
    """A number of a run's log: means over `window` rounds in a row."""
    values = [row[name] for row in facts["history"] if row["pairs"]]
    return np.convolve(values, np.ones(window) / window, "valid")


def spread(values, digits=3):
    return (
        f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to "
        f"{max(values):.{digits}f})"
    )


def seeds(n_seeds):
    """The table of means and ranges over seeds, and what each run's curves did at worst."""
    kinds = {
        "SFT": lambda seed: sft_path(seed).stem,
        "DPO": lambda seed: name_of(seed, ""),
        "DPO, the demo's recipe": lambda seed: name_of(seed, DEMO),
    }
    for seed in range(n_seeds):
        dpo(seed)
        dpo(seed, DEMO)
    keys = {"both": 3, "exact": 3, "preferred": 3, "mean_abs_error": 2}
    for mode, targets in (("sampled", "held-out"), ("greedy", "all")):
        print(
            f"\n| {mode}, {targets} targets | right and preferred | right sum | preferred | mean "
            f"error |\n|---|---|---|---|---|"
        )
        for title, name in kinds.items():
            rows = [metrics(name(seed), mode, targets) for seed in range(n_seeds)]
            cells = [spread([row[key] for row in rows], digits) for key, digits in keys.items()]
            print(f"| {title} | " + " | ".join(cells) + " |")
    print(
        "\nseed  seconds SFT, DPO   loss of 50 rounds: highest, last   accuracy: lowest, last   "
        "held-out loss, accuracy: last   drop"
    )
    for seed in range(n_seeds):
        facts = dpo(seed)
        loss, accuracy = (means(facts, name, 50) for name in ("loss", "rewards/accuracies"))
        measured = [row for row in facts["history"] if "shares" in row]
        both = np.array([row["shares"]["right, preferred"] for row in measured])
        print(
            f"{seed:4}  {sft(seed)['seconds']:7.0f}, {facts['seconds']:3.0f}"
            f"{loss.max():21.2f}, {loss[-1]:.2f}{accuracy.min():26.2f}, {accuracy[-1]:.2f}"
            f"{measured[-1]['eval_loss']:25.2f}, {measured[-1]['eval_rewards/accuracies']:.2f}"
            f"{(np.maximum.accumulate(both) - both).max():15.2f}"
        )


def lesson(n_seeds=2):
    """Where the probability goes, for three sources of pairs, the same number of steps on each."""
    histories = {}
    for seed in range(n_seeds):
        for source in SOURCES:
            flags = "" if source == "online" else f"--pairs {source}"
            facts = dpo(seed, flags)
            histories.setdefault(source, facts["history"])  # the picture shows seed 0
            last = {
                name: means(facts, name, 50)[-1]
                for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
            }
            row = metrics(name_of(seed, flags))
            print(
                f"{source:6} seed {seed}  "
                + "loss {loss:.2f}  rewards {rewards/chosen:+.1f} "
                "{rewards/rejected:+.1f}  accuracy {rewards/accuracies:.2f}".format(**last),
                " both {both:.3f}  exact {exact:.3f}  preferred {preferred:.3f}".format(**row),
            )
    with plots.picture(ROOT / "assets" / "lesson.png", 2, 3, (14, 8), sharey="row") as grid:
        for i, (source, history) in enumerate(histories.items()):
            plots.stacked_outcomes(grid[i], history, SOURCES[source])
            plots.curves(
                grid[3 + i], history, plots.REWARDS, ylabel="reward of the pairs (beta x nats)"
            )
        grid[0].figure.suptitle(
            "the same loss, the same number of steps: what the policy answers "
            "depends on where the pairs come from"
        )


def divergence(policy, reference):
    """KL(policy || reference) in nats an answer, on the policy's answers to held-out targets."""
    lines = evaluation.sample(policy, data.HELD_OUT * 50, 1.0, np.random.default_rng(0))
    with no_grad():
        logps, reference_logps = (
            completion_logps(model, data.pad(lines)).numpy() for model in (policy, reference)
        )
    return float((logps - reference_logps).mean())


@functools.cache  # some runs stand in several tables
def numbers(seed, flags):
    """What the laboratory's tables show of a run. Answers: 50 to each held-out target."""
    facts = dpo(seed, flags)
    _, _, before, _, _, _, row, _ = facts["metrics"]  # SFT and DPO: sampled, held-out
    history = facts["history"]
    held_out = [log for log in history if "eval_loss" in log][-1]
    logs = {
        name: means(facts, key, 50)
        for name, key in (
            ("loss", "loss"),
            ("accuracy", "rewards/accuracies"),
            ("chosen", "rewards/chosen"),
            ("rejected", "rewards/rejected"),
            ("margin", "rewards/margins"),
        )
    }
    nine = [
        log["round"] for log in history if log.get("shares", {}).get("right, preferred", 0) >= 0.9
    ]
    terms = {int(k): n for k, n in row["counts"].items()}
    return {
        **{name: values[-1] for name, values in logs.items()},
        **row,
        "exact before": before["exact"],
        "held-out chosen": held_out["eval_rewards/chosen"],
        "held-out accuracy": held_out["eval_rewards/accuracies"],
        "highest loss": means(facts, "loss", 1).max(),
        "lowest accuracy": logs["accuracy"].min(),
        "negative margins": np.mean(means(facts, "rewards/margins", 1) < 0),
        "terms": sum(k * n for k, n in terms.items()) / max(1, sum(terms.values())),
        "divergence": divergence(
            evaluation.load(RUNS / f"{name_of(seed, flags)}.npz"), evaluation.load(sft_path(seed))
        ),
        "nine in ten": str(nine[0]) if nine else "never",
    }


def laboratory(n_seeds=2):
    """The tables of LABORATORY.md; a cell holds a number for each seed."""
    for title, (columns, runs) in LABORATORY.items():
        print(
            f"\n{title}\n\n| dpo.py | " + " | ".join(columns) + " |\n" + "|---" * len(columns),
            end="|---|\n",
        )
        for flags in runs:
            rows = [numbers(seed, flags) for seed in range(n_seeds)]
            cells = [
                ", ".join(
                    row[name] if name == "nine in ten" else f"{row[name]:.2f}" for row in rows
                )
                for name in columns
            ]
            print(f"| `{flags or '(defaults)'}` | " + " | ".join(cells) + " |", flush=True)


def beta():
    """A sweep of beta: the gain, and its cost in divergence."""
    points = []
    for value in BETAS:
        flags = "" if value == 0.8 else f"--beta {value:g}"
        nats = numbers(0, flags)["divergence"]
        row = metrics(name_of(0, flags))
        points.append((value, row["both"], row["exact"], row["preferred"], nats))
        print(
            "beta {:<5g} both {:.3f}  exact {:.3f}  preferred {:.3f}  divergence {:.2f} nats".format(
                *points[-1]
            )
        )
    betas, both, exact, preferred, nats = zip(*points)
    with plots.picture(ROOT / "assets" / "beta.png", 1, 2, (11, 4), sharex=True) as (gain, cost):
        for name, values, colour in (
            ("right and preferred", both, plots.GREEN),
            ("right sum", exact, plots.BLUE),
            ("preferred", preferred, plots.ORANGE),
        ):
            gain.plot(betas, values, "o-", color=colour, label=name)
        cost.plot(betas, nats, "o-", color=plots.RED)
        gain.set(title="the gain", xlabel="beta", ylabel="share of answers to held-out targets")
        cost.set(
            title="the cost: a larger beta stays closer",
            xlabel="beta",
            xscale="log",
            ylabel="KL(policy || reference), nats an answer",
            ylim=(0, None),
        )
        cost.set_xticks(betas, [f"{value:g}" for value in betas], minor=False)
        cost.minorticks_off()
        gain.legend(**plots.BELOW)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=["seeds", "lesson", "beta", "laboratory"])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    {
        "seeds": lambda: seeds(arguments.seeds),
        "lesson": lesson,
        "beta": beta,
        "laboratory": laboratory,
    }[arguments.experiment]()


if __name__ == "__main__":
    main()
