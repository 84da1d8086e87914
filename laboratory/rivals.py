"""What else would do the job? Online DPO beside methods that need a judge but no pairs; draws
assets/rivals.png.

Every method asks the policy as it is now, 96 targets a round, eight answers each, and every answer
is judged: 230,400 in 300 rounds. They differ in what they do with the judgements:

SFT on accepted     one step of SFT on the accepted answers: expert iteration with one step a round.
REINFORCE           an answer's advantage is its reward (1 accepted, 0 rejected) minus the mean
                    reward of the eight; the loss is -(advantage * log-probability), averaged over
                    all answers (Williams 1992).
... KL penalty      the same, with 0.1 log(pi / pi_ref) taken off each reward.
GRPO's advantage    REINFORCE's, divided by the standard deviation of the eight rewards (Shao et al.
                    2024, section 4.1.2; without its clipping and its KL term).
online DPO          accepted answers over rejected ones, at four betas.

Every method is run at three rates with the first seed; the rate with the largest share of accepted
answers to held-out targets at the end is then used for all seeds. In all some 20 minutes on two
cores, the SFT models five more. Stopped and started again, it resumes.
"""

import dataclasses
import functools

import lab  # first: it makes the core importable, which must precede NumPy
import numpy as np

import cli
import data
import eval as evaluation
import loop
import plots
from sft import completion_logps
from tinygrad_lite import no_grad

PROMPTS, ANSWERS = 96, 8
RATES = (2e-4, 4e-4, 8e-4)
FLAGS = f"--rounds 300 --prompts {PROMPTS} --answers {ANSWERS}"
JUDGED = 300 * PROMPTS * ANSWERS


# What the methods learn from: [(line, weight), ...] in the place of pairs.


def judged_groups(policy, step, world, rng, starts, answers, prefer):
    """The policy's answers to this process's targets of a round, and their rewards:
    [(lines, rewards (answers,)), ...]."""
    numbers = range(starts[step] + world.rank, starts[step + 1], world.world_size)
    targets = rng.choice(data.TRAINING, len(numbers))
    lines = evaluation.sample(policy, np.repeat(targets, answers), 1.0, rng)
    groups = []
    for start in range(0, len(lines), answers):
        group = lines[start : start + answers]
        rewards = np.array([float(data.is_accepted(line, prefer)) for line in group])
        groups.append((group, rewards))
    return groups


def accepted_answers(*arguments, **settings):
    """SFT on accepted: the accepted answers, each with weight 1."""
    answers = []
    for group, rewards in judged_groups(*arguments, **settings):
        answers += [(line, 1.0) for line, reward in zip(group, rewards) if reward > 0]
    return answers


def with_advantages(*arguments, divide_by_std, **settings):
    """Every answer, weighted by its advantage. A group with equal rewards has none, and is left
    out: its gradient is 0."""
    answers = []
    for group, rewards in judged_groups(*arguments, **settings):
        advantages = rewards - rewards.mean()
        if divide_by_std:
            advantages /= rewards.std() + 1e-6
        if rewards.std() > 0:
            answers += list(zip(group, advantages))
    return answers


def with_rewards(*arguments, **settings):
    """Every answer with its reward, group after group, for an objective that needs all of them."""
    answers = []
    for group, rewards in judged_groups(*arguments, **settings):
        answers += list(zip(group, rewards))
    return answers


def source(answers_of, **settings):
    """A source for lab.Experiment: a function of (starts, answers, prefer)."""
    return functools.partial(make_source, answers_of, settings)


def make_source(answers_of, settings, starts, answers, prefer):
    return functools.partial(answers_of, starts=starts, answers=answers, prefer=prefer, **settings)


@dataclasses.dataclass(frozen=True)
class WeightedAnswers:
    """The objective for loop.train: the mean over answers of -(weight * log-probability)."""

    logged = ("loss",)

    def __call__(self, policy, reference, weighted, beta):
        lines, weights = zip(*weighted)
        logps = completion_logps(policy, data.pad(lines))  # (N,)
        loss = -(logps * np.array(weights)).mean()
        return loss, {"loss": loss.item()}


@dataclasses.dataclass(frozen=True)
class PenalisedReinforce:
    """The objective for REINFORCE with a KL penalty. The reward of an answer is the judge's minus
    penalty * log(pi / pi_ref), whose mean over the policy's answers is its KL divergence."""

    penalty: float

    logged = ("loss",)

    def __call__(self, policy, reference, rewarded, beta):
        lines, rewards = zip(*rewarded)
        ids = data.pad(lines)
        logps = completion_logps(policy, ids)  # (N,)
        with no_grad():
            reference_logps = completion_logps(reference, ids).numpy()
        penalised = np.array(rewards) - self.penalty * (logps.numpy() - reference_logps)
        groups = penalised.reshape(-1, ANSWERS)
        advantages = (groups - groups.mean(axis=1, keepdims=True)).ravel()
        loss = -(logps * advantages).mean()
        return loss, {"loss": loss.item()}


# The runs.

weighted = functools.partial(loop.train, objective=WeightedAnswers())
# The mean is over all answers of a round, also over those with advantage 0, which are left out.
weighted_mean_of_all = functools.partial(weighted, divisor=PROMPTS * ANSWERS)

METHODS = {  # title: (short name, flags, training loop, source)
    "SFT on accepted": ("expert", "", weighted, source(accepted_answers)),
    "REINFORCE": (
        "reinforce",
        "",
        weighted_mean_of_all,
        source(with_advantages, divide_by_std=False),
    ),
    "REINFORCE, KL penalty": (
        "reinforce-kl",
        "",
        functools.partial(loop.train, objective=PenalisedReinforce(0.1)),
        source(with_rewards),
    ),
    "GRPO's advantage": (
        "grpo",
        "",
        weighted_mean_of_all,
        source(with_advantages, divide_by_std=True),
    ),
    "DPO, beta 0.05": ("dpo-0.05", "--beta 0.05", loop.train, loop.own),
    "DPO, beta 0.2": ("dpo-0.2", "--beta 0.2", loop.train, loop.own),
    "DPO, beta 0.8": ("dpo-0.8", "--beta 0.8", loop.train, loop.own),
    "DPO, beta 2": ("dpo-2", "--beta 2", loop.train, loop.own),
}


def experiment(title, rate):
    name, flags, train, pairs = METHODS[title]
    return lab.Experiment(
        f"rivals-{name}-{rate:g}",
        f"{FLAGS} --lr {rate:g} {flags}".strip(),
        title,
        train=train,
        pairs=pairs,
        starts=lab.rounds_of_one_size,
        report=lab.Report,
    )


def best_rate(options, title):
    """The rate with the largest share of accepted answers at the end, with the first seed."""

    def both(rate):
        return lab.run(options, experiment(title, rate), 0)["sampled"]["both"]

    return max(RATES, key=both)


# What is printed and drawn.


def print_rates(options):
    print("\n| both, seed 0 | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " |")
    print("|---" * (1 + len(RATES)) + "|")
    for title in METHODS:
        runs = [lab.run(options, experiment(title, rate), 0) for rate in RATES]
        cells = [f"{facts['sampled']['both']:.3f}" for facts in runs]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def print_table(runs, sft):
    print("\n| method, at its best rate | both | exact | divergence | distinct of 150 |")
    print("|---|---|---|---|---|")
    for title, of_seeds in runs.items():
        both, exact = (
            lab.spread([facts["sampled"][name] for facts in of_seeds], 3)
            for name in ("both", "exact")
        )
        divergence = lab.spread([facts["divergence"] for facts in of_seeds], 2)
        print(f"| {title} | {both} | {exact} | {divergence} | {lab.distinct_spread(of_seeds)} |")
    both, exact = (lab.spread([facts["sampled"][name] for facts in sft], 3)
                   for name in ("both", "exact"))  # fmt: skip
    print(f"| (SFT, before) | {both} | {exact} | 0 | {lab.distinct_spread(sft)} |")


def draw(runs, probabilities, path):
    """`both` against divergence over each run (mean over seeds), and the least divergence."""
    colours = [
        plots.RED,
        plots.ORANGE,
        "#882255",
        "#CC79A7",
        "#56B4E9",
        plots.BLUE,
        plots.GREEN,
        "black",
    ]
    with plots.picture(path, 1, 1, (8, 5.2)) as (ax,):
        for (title, of_seeds), colour in zip(runs.items(), colours):
            both = [[row["shares"][data.ACCEPTED] for row in lab.measured(facts)]
                    for facts in of_seeds]  # fmt: skip
            nats = [[row["divergence"] for row in lab.measured(facts)] for facts in of_seeds]
            n = min(map(len, both))  # a run may end early
            x, y = (np.mean([line[:n] for line in lines], axis=0) for lines in (nats, both))
            style = "-" if title.startswith("DPO") else "--"
            ax.plot(x, y, style, color=colour, label=title.partition(" (")[0])
            ax.plot(x[-1], y[-1], "o", color=colour)
        shares = np.linspace(0.3, 1, 71)
        least = [np.mean([lab.floor(p, share) for p in probabilities]) for share in shares]
        ax.plot(least, shares, color=plots.GREY, linewidth=4, alpha=0.6, label="the least possible")
        ax.set(
            title="how far each method moves for what it gains",
            xlabel="KL(policy || reference), nats an answer (300 rounds; a dot is the end)",
            ylabel="share right and preferred",
            xlim=(0, None),
            ylim=(0, 1.02),
        )
        ax.legend(**plots.BELOW | {"ncols": 3})


def main(argv=None):
    parser = lab.parser(__doc__, seeds=3)
    lab.add_pictures(parser, "rivals.png")
    options = parser.parse_args(argv)
    seeds = range(options.seeds)
    print(f"judged answers of each run: {JUDGED:,}")
    print_rates(options)
    runs = {}
    for title in METHODS:
        rate = best_rate(options, title)
        best = experiment(title, rate)
        runs[f"{title} (rate {rate:g})"] = [lab.run(options, best, seed) for seed in seeds]
    sft = [lab.sft_facts(options, seed) for seed in seeds]
    print_table(runs, sft)
    probabilities = [
        lab.accepted_probabilities(evaluation.load(lab.sft_checkpoint(options, seed)))
        for seed in seeds
    ]
    floors = [lab.floor(p, share=1.0) for p in probabilities]
    print(
        f"\nleast divergence of a policy that gives only accepted answers: {lab.spread(floors, 2)}"
    )
    draw(runs, probabilities, options.pictures / "rivals.png")


if __name__ == "__main__":
    cli.run(main)
