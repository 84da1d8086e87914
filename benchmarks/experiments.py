"""The experiments behind the README's tables and pictures, each from the commands a reader types.

    python benchmarks/experiments.py seeds     five seeds of SFT and DPO, the demo's recipe beside
    python benchmarks/experiments.py lesson    assets/lesson.png: three sources of pairs, two seeds
    python benchmarks/experiments.py beta      assets/beta.png: what beta buys, and what it costs

Each run takes one to two minutes on two cores. What is in runs/experiments/ is not made again, so
`lesson` and `beta` start from the models of `seeds`.
"""
import argparse
import json
import subprocess
import sys
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
DEMO = ["--pairs", "rule", "--rounds", "200", "--lr", "1e-4", "--prompts", "192"]  # its recipe
SOURCES = {"rule": "right sums made by rule", "once": "own answers, sampled once",
           "online": "own answers, sampled afresh"}
BETAS = [0.1, 0.3, 0.8, 3.0]


def run(program, name, *flags):
    """The facts of a training run, trained unless they are there."""
    out = RUNS / f"{name}.npz"
    if not out.with_suffix(".json").exists():
        print(f"training {name}: {program}.py {' '.join(flags)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, ROOT / f"{program}.py", "--out", out, *flags], cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.with_suffix(".json").read_text())


def sft(seed):
    run("sft", f"sft{seed}", "--seed", str(seed))
    return RUNS / f"sft{seed}.npz"


def dpo(seed, name, *flags):
    return run("dpo", f"{name}{seed}", "--seed", str(seed), "--sft", str(sft(seed)), *flags)


def metrics(name, mode="sampled", targets="held-out"):
    """Metrics of a checkpoint, 200 answers to each target, measured unless they are there."""
    path = RUNS / f"{name}-metrics.json"
    if not path.exists():
        command = [sys.executable, ROOT / "eval.py", RUNS / f"{name}.npz", "--samples", "200",
                   "--json"]
        path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (row,) = [row for row in json.loads(path.read_text())
              if (row["mode"], row["targets"]) == (mode, targets)]
    return row


def spread(values, digits=3):
    return (f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to "
            f"{max(values):.{digits}f})")


def seeds(n_seeds):
    """The table of means and ranges over seeds, and what each run's curves did at worst."""
    kinds = {"SFT": "sft", "DPO": "dpo", "DPO, the demo's recipe": "demo"}
    for seed in range(n_seeds):
        dpo(seed, "dpo")
        dpo(seed, "demo", *DEMO)
    keys = {"both": 3, "exact": 3, "preferred": 3, "mean_abs_error": 2}
    for mode, targets in (("sampled", "held-out"), ("greedy", "all")):
        print(f"\n| {mode}, {targets} targets | right and preferred | right sum | preferred | mean "
              f"error |\n|---|---|---|---|---|")
        for title, name in kinds.items():
            rows = [metrics(f"{name}{seed}", mode, targets) for seed in range(n_seeds)]
            cells = [spread([row[key] for row in rows], digits) for key, digits in keys.items()]
            print(f"| {title} | " + " | ".join(cells) + " |")
    print("\nseed  seconds SFT, DPO   loss of 50 rounds: highest, last   accuracy: lowest, last   "
          "held-out loss, accuracy: last   drop")
    for seed in range(n_seeds):
        facts = dpo(seed, "dpo")
        rows = [row for row in facts["history"] if row["pairs"]]
        loss, accuracy = (np.convolve([row[name] for row in rows], np.ones(50) / 50, "valid")
                          for name in ("loss", "rewards/accuracies"))
        measured = [row for row in facts["history"] if "shares" in row]
        both = np.array([row["shares"]["right, preferred"] for row in measured])
        print(f"{seed:4}  {run('sft', f'sft{seed}')['seconds']:7.0f}, {facts['seconds']:3.0f}"
              f"{loss.max():21.2f}, {loss[-1]:.2f}{accuracy.min():26.2f}, {accuracy[-1]:.2f}"
              f"{measured[-1]['eval_loss']:25.2f}, {measured[-1]['eval_rewards/accuracies']:.2f}"
              f"{(np.maximum.accumulate(both) - both).max():15.2f}")


def lesson(n_seeds=2):
    """Where the probability goes, for three sources of pairs, the same number of steps on each."""
    histories = {}
    for seed in range(n_seeds):
        for source in SOURCES:
            name = "dpo" if source == "online" else source
            history = dpo(seed, name, "--pairs", source)["history"]
            histories.setdefault(source, history)  # the picture shows seed 0
            last = [log for log in history if log["pairs"]][-1]
            row = metrics(f"{name}{seed}")
            print(f"{source:6} seed {seed}  " + "loss {loss:.2f}  rewards {rewards/chosen:+.1f} "
                  "{rewards/rejected:+.1f}  accuracy {rewards/accuracies:.2f}".format(**last),
                  " both {both:.3f}  exact {exact:.3f}  preferred {preferred:.3f}".format(**row))
    figure, grid = plots.axes(2, 3, size=(14, 8), sharey="row")
    for i, (source, history) in enumerate(histories.items()):
        plots.stacked_outcomes(grid[i], history, SOURCES[source])
        plots.curves(grid[3 + i], history, {"rewards/chosen": (plots.GREEN, "chosen, "),
                                            "rewards/rejected": (plots.RED, "rejected, ")},
                     ylabel="reward of the pairs (beta x nats)")
    figure.suptitle("the same loss, the same number of steps: what the policy answers depends on "
                    "where the pairs come from")
    plots.save(figure, ROOT / "assets" / "lesson.png")


def divergence(policy, reference):
    """KL(policy || reference) in nats an answer, on the policy's answers to held-out targets."""
    lines = evaluation.sample(policy, data.HELD_OUT * 50, 1.0, np.random.default_rng(0))
    with no_grad():
        logps, reference_logps = (completion_logps(model, data.pad(lines)).numpy()
                                  for model in (policy, reference))
    return float((logps - reference_logps).mean())


def beta():
    """A sweep of beta: the gain, its cost in divergence, and the rounds to nine in ten."""
    points = []
    for value in BETAS:
        name = "dpo" if value == 0.8 else f"beta{value:g}-"
        history = dpo(0, name, "--beta", str(value))["history"]
        row = metrics(f"{name}0")
        rounds = [log["round"] for log in history
                  if log.get("shares", {}).get("right, preferred", 0) >= 0.9]
        points.append((value, row["both"], row["exact"], row["preferred"], divergence(
            *(evaluation.load(path) for path in (RUNS / f"{name}0.npz", sft(0))))))
        print("beta {:<5g} both {:.3f}  exact {:.3f}  preferred {:.3f}  divergence {:.2f} nats"
              .format(*points[-1]), f" 0.9 after round {rounds[0] if rounds else '-'}")
    betas, both, exact, preferred, nats = zip(*points)
    figure, (gain, cost) = plots.axes(1, 2, size=(11, 4), sharex=True)
    for name, values, colour in (("right and preferred", both, plots.GREEN),
                                 ("right sum", exact, plots.BLUE),
                                 ("preferred", preferred, plots.ORANGE)):
        gain.plot(betas, values, "o-", color=colour, label=name)
    cost.plot(betas, nats, "o-", color=plots.RED)
    gain.set(title="the gain", xlabel="beta", ylabel="share of answers to held-out targets")
    cost.set(title="the cost: a larger beta stays closer", xlabel="beta", xscale="log",
             ylabel="KL(policy || reference), nats an answer", ylim=(0, None))
    cost.set_xticks(betas, [f"{value:g}" for value in betas], minor=False)
    cost.minorticks_off()
    plots.legend_below(gain)
    plots.save(figure, ROOT / "assets" / "beta.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["seeds", "lesson", "beta"])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    {"seeds": lambda: seeds(arguments.seeds), "lesson": lesson, "beta": beta
     }[arguments.experiment]()


if __name__ == "__main__":
    main()
