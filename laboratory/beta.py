"""What beta buys and what it costs: DPO with four betas, and the picture assets/beta.png.

For each beta, the share of right and preferred answers to held-out targets, and how far the policy
has moved from the SFT model, KL(policy || reference). Four runs of 1,500 rounds take about 12
minutes on two cores, the SFT model two more. Stopped and started again, it resumes where it left
off.
"""

from pathlib import Path

import lab  # first: it makes the core importable, which must precede NumPy
import numpy as np

import cli
import plots

EXPERIMENTS = {  # by beta
    0.05: lab.Experiment("beta-0.05", "--beta 0.05"),
    0.3: lab.Experiment("beta-0.3", "--beta 0.3"),
    0.8: lab.ONLINE,
    3.0: lab.Experiment("beta-3", "--beta 3"),
}
NUMBERS = ("both", "exact", "preferred", "divergence")


def sweep(options):
    """{beta: {name: mean over seeds}} of NUMBERS."""
    points = {}
    for beta, experiment in EXPERIMENTS.items():
        runs = [lab.run(options, experiment, seed) for seed in range(options.seeds)]
        rows = [facts["sampled"] | {"divergence": facts["divergence"]} for facts in runs]
        points[beta] = {name: np.mean([row[name] for row in rows]) for name in NUMBERS}
    return points


def draw(points, path):
    """The gain and the cost of each beta, side by side."""
    betas = list(points)
    with plots.picture(path, 1, 2, (11, 4), sharex=True) as (gain, cost):
        for name, label, colour in (
            ("both", "right and preferred", plots.GREEN),
            ("exact", "right sum", plots.BLUE),
            ("preferred", "preferred", plots.ORANGE),
        ):
            values = [point[name] for point in points.values()]
            gain.plot(betas, values, "o-", color=colour, label=label)
        nats = [point["divergence"] for point in points.values()]
        cost.plot(betas, nats, "o-", color=plots.RED)
        gain.set(title="the gain", xlabel="beta", ylabel="share of answers to held-out targets")
        cost.set(
            title="the cost: a larger beta stays closer",
            xlabel="beta",
            xscale="log",
            ylabel="KL(policy || reference), nats an answer",
            ylim=(0, None),
        )
        cost.set_xticks(betas, [f"{beta:g}" for beta in betas], minor=False)
        cost.minorticks_off()
        gain.legend(**plots.BELOW)


def main(argv=None):
    parser = lab.parser(__doc__, seeds=1)
    parser.add_argument("--pictures", type=Path, default=Path("assets"), metavar="FOLDER",
                        help="where to draw beta.png (default: assets)")  # fmt: skip
    options = parser.parse_args(argv)
    points = sweep(options)
    print()
    for beta, point in points.items():
        print(
            f"beta {beta:<5g}"
            + " both {both:.3f}  exact {exact:.3f}  preferred {preferred:.3f}".format(**point)
            + f"  divergence {point['divergence']:.2f} nats"
        )
    draw(points, options.pictures / "beta.png")


if __name__ == "__main__":
    cli.run(main)
