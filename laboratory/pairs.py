"""Which pairs, when no fresh ones can be had? Ten ways to use the same fixed answers.

The SFT model answers 9,600 prompts eight times each, once (76 targets, each drawn some 126 times).
Every run takes 600 steps of 128 pairs of these answers, and differs in how they are paired,
labelled or scored. Three seeds of ten runs take about 15 minutes on two cores, the SFT models five
more. Stopped and started again, it resumes.
"""

import functools

import lab  # first: it makes the core importable
import cli
import loop

FLAGS = "--rounds 600 --prompts 128"  # a round has as many pairs as --prompts says
SMOOTHING = 0.2


def experiment(name, title, pairing, flags="", **objective):
    return lab.Experiment(
        f"pairs-{name}",
        f"{FLAGS} {flags}".strip(),
        title,
        train=functools.partial(loop.train, objective=loop.PairObjective(**objective)),
        pairs=functools.partial(loop.FixedPairs, pairing),
        starts=lab.rounds_of_one_size,
    )


smoothed = functools.partial(loop.smoothed_loss, smoothing=SMOOTHING)
EXPERIMENTS = [
    experiment("accepted", "accepted over rejected", loop.accepted_over_rejected),
    experiment(
        "accepted-smoothed",
        f"accepted over rejected, label smoothing {SMOOTHING:g}",
        loop.accepted_over_rejected,
        loss=smoothed,
    ),
    experiment(
        "accepted-ipo",
        "accepted over rejected, IPO with beta 0.15",
        loop.accepted_over_rejected,
        "--beta 0.15",
        loss=loop.ipo_loss,
    ),
    experiment(
        "accepted-sft",
        "accepted over rejected, SFT term 10",
        loop.accepted_over_rejected,
        sft_weight=10.0,
    ),
    experiment("graded", "graded", loop.graded),
    experiment(
        "graded-smoothed", f"graded, label smoothing {SMOOTHING:g}", loop.graded, loss=smoothed
    ),
    experiment("graded-noise", "graded, noisy labels", loop.graded_with_noise),
    experiment(
        "graded-ipo", "graded, IPO with beta 0.15", loop.graded, "--beta 0.15", loss=loop.ipo_loss
    ),
    experiment("graded-sft", "graded, SFT term 10", loop.graded, sft_weight=10.0),
    experiment(
        "graded-smoothed-sft",
        f"graded, label smoothing {SMOOTHING:g}, SFT term 10",
        loop.graded,
        loss=smoothed,
        sft_weight=10.0,
    ),
]


def main(argv=None):
    options = lab.parser(__doc__, seeds=3).parse_args(argv)
    seeds = range(options.seeds)
    print("\n| pairs of the same fixed answers | exact | both | preferred | divergence |")
    print("|---|---|---|---|---|")
    before = [lab.sft_facts(options, seed)["sampled"] for seed in seeds]
    print_row("(SFT, before)", before, [0.0] * options.seeds)
    for one in EXPERIMENTS:
        runs = [lab.run(options, one, seed) for seed in seeds]
        divergences = [facts["divergence"] for facts in runs]
        print_row(one.change, [facts["sampled"] for facts in runs], divergences)


def print_row(title, of_seeds, divergences):
    cells = [
        lab.spread([metrics[name] for metrics in of_seeds], 2)
        for name in ("exact", "both", "preferred")
    ]
    print(f"| {title} | {' | '.join(cells)} | {lab.spread(divergences, 1)} |", flush=True)


if __name__ == "__main__":
    cli.run(main)
