"""What the policy answers, for three sources of pairs: assets/lesson.png and assets/dpo.gif.

The same loss and the same number of steps on right sums made by rule, on the SFT model's answers
sampled once, and on the policy's answers sampled before every step. Prints, for each, the rewards
at the end and what the policy then answers to held-out targets. The animation shows two runs of 300
rounds. Nine runs and three SFT models take about 20 minutes on two cores, the two short runs one
more. Stopped and started again, it resumes where it left off.
"""

import lab  # first: it makes the core importable
import cli
import plots

SOURCES = {  # experiment: title of its panel
    lab.RULE: "right sums made by rule",
    lab.ONCE: "own answers, sampled once",
    lab.ONLINE: "own answers, always fresh",
}


def line(experiment, seed, facts):
    """What a run ended with, as text. Loss, rewards and accuracy are means of 50 rounds."""
    loss, chosen, rejected, accuracy = (
        lab.means(facts, name)[-1]
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
    )
    return (
        f"{experiment.name:6} seed {seed}  loss {loss:.2f}  rewards {chosen:+.1f} {rejected:+.1f}"
        f"  accuracy {accuracy:.2f}"
        + "  both {both:.3f}  exact {exact:.3f}  preferred {preferred:.3f}".format(
            **facts["sampled"]
        )
    )


def draw(histories, path):
    """{title: history}: what the policy answers, above the rewards of its pairs."""
    with plots.picture(path, 2, 3, (14, 8), sharey="row") as grid:
        for i, (title, history) in enumerate(histories.items()):
            plots.stacked_outcomes(grid[i], history, title)
            plots.curves(
                grid[3 + i], history, plots.REWARDS, ylabel="reward of the pairs (beta x nats)"
            )
        for i, ax in enumerate(grid):  # one legend and one label serve a row
            if i % 3 != 1:
                ax.get_legend().remove()
            if i % 3 != 0:
                ax.set_ylabel("")
        grid[0].figure.suptitle(
            "the same loss, the same number of steps: what the policy answers "
            "depends on where the pairs come from"
        )


def main(argv=None):
    parser = lab.parser(__doc__, seeds=3)
    lab.add_pictures(parser, "lesson.png and dpo.gif")
    options = parser.parse_args(argv)
    runs = {}
    for seed in range(options.seeds):
        for experiment in SOURCES:
            runs[experiment, seed] = lab.run(options, experiment, seed)
    print()
    for (experiment, seed), facts in runs.items():
        print(line(experiment, seed, facts))
    histories = {title: runs[experiment, 0]["history"] for experiment, title in SOURCES.items()}
    draw(histories, options.pictures / "lesson.png")
    short = {
        "pairs by rule": lab.run(options, lab.SHORT_RULE, 0)["history"],
        "pairs of the policy's fresh answers": lab.run(options, lab.SHORT_ONLINE, 0)["history"],
    }
    plots.animation(short, options.pictures / "dpo.gif")


if __name__ == "__main__":
    cli.run(main)
