"""Where DPO puts its credit, and what that makes of the answers; draws assets/credit.png.

The reward of an answer, beta log(pi / pi_ref), is a sum over its tokens. Here it is split in three:
all tokens before the last number, the digits of the last number, and the end token. Runs of 300
rounds on pairs by rule, on answers sampled once and on fresh ones, and the default run of 1,500
rounds, each with three seeds, take about 15 minutes on two cores, the SFT models five more. Stopped
and started again, it resumes.
"""

import lab  # first: it makes the core importable, which must precede NumPy
import numpy as np

import cli
import data
import dpo
import eval as evaluation
import plots

BETA = dpo.parse_arguments([]).beta
RUNS = {
    lab.SHORT_RULE: "rule",
    lab.SHORT_ONCE: "once",
    lab.SHORT_ONLINE: "online",
    lab.ONLINE: "online, 1,500 rounds",
}
KINDS = [  # title, number of terms, how far the sum is too high
    ("right, 2 terms", 2, [0]),
    ("right, 3 terms", 3, [0]),
    ("right, 4 terms", 4, [0]),
    ("right, 5 terms", 5, [0]),
    ("1 to 4 too high, 3 terms", 3, [1, 2, 3, 4]),
    ("1 to 4 too high, 4 terms", 4, [1, 2, 3, 4]),
    ("1 to 4 too high, 5 terms", 5, [1, 2, 3, 4]),
]
LINES = {  # for the picture
    "52=18+29+5": "right, three terms: chosen",
    "52=18+29+4+1": "right, four terms: rejected",
    "52=18+29+4+3": "wrong: in no pair by rule",
    "52=18+29+4+2+2": "wrong: how the policy goes on",
}


def lines_of(n_terms, too_high, n=200):
    """n random lines on held-out targets: a random right sum, its last term raised by one of the
    numbers `too_high`."""
    rng = data.python_random(data.random_stream(0, "answers"))
    lines = []
    while len(lines) < n:
        target = rng.choice(data.HELD_OUT)
        _, terms = data.parse(data.decode(data.random_line(target, n_terms, rng)))
        terms[-1] += rng.choice(too_high)
        if terms[-1] <= 99:
            lines.append(data.line_of(target, terms))
    return lines


def in_three_parts(tokens):
    """The reward of an answer before the last number, on its digits and on the end token, (3,).

    tokens: [(token, reward), ...], see eval.credit.
    """
    rewards = np.array([reward for _, reward in tokens])
    start = max(i for i, (token, _) in enumerate(tokens) if token == "+") + 1  # of the last number
    return np.array([rewards[:start].sum(), rewards[start:-1].sum(), rewards[-1]])


def mean_credit(policy, reference, lines):
    """The mean of in_three_parts over lines, (3,)."""
    credits = [evaluation.credit(policy, reference, line, BETA) for line in lines]
    return np.mean([in_three_parts(one["tokens"]) for one in credits], axis=0)


def measure(options, experiment, seed):
    """{title of a kind: [before, digits, end]} for one run."""
    facts = lab.run(options, experiment, seed)

    def make():
        policy = evaluation.load(lab.dpo_checkpoint(options, experiment, seed))
        reference = evaluation.load(lab.sft_checkpoint(options, seed))
        return {
            title: mean_credit(policy, reference, lines_of(n_terms, too_high)).tolist()
            for title, n_terms, too_high in KINDS
        }

    return lab.kept(options, f"credit-{experiment.name}-seed{seed}", facts["settings"], make)


def print_credit(options):
    """Mean rewards by part of the answer: mean over seeds, and the spread of their sum."""
    print("\n| pairs | answers | before the last number | its digits | end token | reward |")
    print("|---|---|---|---|---|---|")
    for experiment, name in RUNS.items():
        of_seeds = [measure(options, experiment, seed) for seed in range(options.seeds)]
        for title, _, _ in KINDS:
            parts = np.array([credit[title] for credit in of_seeds])  # (seeds, 3)
            cells = [f"{value:+.1f}" for value in parts.mean(axis=0)]
            rewards = parts.sum(axis=1)
            cells.append(f"{rewards.mean():+.1f} ({rewards.min():+.1f} to {rewards.max():+.1f})")
            print(f"| {name} | {title} | {' | '.join(cells)} |")


def print_answers(options):
    """What each run answers: % of all, by number of terms, right and wrong."""
    columns = [f"{count} terms" for count in data.COUNTS]
    print(f"\n| % of answers: right + wrong | {' | '.join(columns)} | other |")
    print("|---|---|---|---|---|---|")
    seeds = range(options.seeds)
    of_runs = {"SFT": [lab.sft_facts(options, seed)["sampled"] for seed in seeds]}
    for experiment, name in RUNS.items():
        of_runs[name] = [lab.run(options, experiment, seed)["sampled"] for seed in seeds]
    for name, of_seeds in of_runs.items():
        cells, other = [], np.full(len(of_seeds), 100.0)
        for count in data.COUNTS:
            shares = [metrics["answers"][str(count)] for metrics in of_seeds]
            right = 100 * np.array([share["right"] for share in shares])
            wrong = 100 * np.array([share["wrong"] for share in shares])
            other -= right + wrong
            cells.append(f"{lab.whole_spread(right)} + {lab.whole_spread(wrong)}")
        print(f"| {name} | {' | '.join(cells)} | {lab.whole_spread(other)} |")


def print_errors(options):
    """How far wrong sums are off, with pairs by rule: % of the wrong sums."""
    shares = []
    for seed in range(options.seeds):
        policy = evaluation.load(lab.dpo_checkpoint(options, lab.SHORT_RULE, seed))
        rng = data.random_stream(0, "answers")
        lines = evaluation.sample(policy, np.repeat(data.HELD_OUT, lab.SAMPLES), 1.0, rng)
        judged = [data.judge(line) for line in lines]
        errors = [one.total - one.target for one in judged if one.outcome == data.WRONG_SUM]
        shares.append(100 * np.mean([1 <= error <= 4 for error in errors]))
    print(f"\nrule: of the wrong sums, 1 to 4 too high: {lab.whole_spread(shares)} %")


def draw(options, path):
    """Four answers token by token, after 300 rounds of pairs by rule and of online pairs."""
    reference = evaluation.load(lab.sft_checkpoint(options, 0))
    policies = [
        evaluation.load(lab.dpo_checkpoint(options, experiment, 0))
        for experiment in (lab.SHORT_RULE, lab.SHORT_ONLINE)
    ]
    with plots.picture(path, len(LINES), 2, (13, 7)) as grid:
        strips = []
        for text in LINES:
            line = evaluation.line_of_text(text)
            for policy in policies:
                strips.append(evaluation.credit(policy, reference, line, BETA))
        scale = max(abs(value) for row in strips for _, value in row["tokens"])
        for i, (ax, row) in enumerate(zip(grid, strips)):
            image = plots.token_strip(ax, row["tokens"], scale)
            title = f"{row['line']}   reward {row['reward']:+.1f}"
            if i % 2 == 0:
                title += f"   ({LINES[row['line']]})"
            if i < 2:
                title = (
                    ("300 rounds of pairs by rule", "300 rounds of online pairs")[i] + "\n" + title
                )
            ax.set_title(title, loc="left", fontsize=12)
        figure = grid[0].figure
        figure.colorbar(image, ax=list(grid), label="reward of a token")
        figure.suptitle("pairs by rule teach the policy to avoid the right sum at its end")


def main(argv=None):
    parser = lab.parser(__doc__, seeds=3)
    lab.add_pictures(parser, "credit.png")
    options = parser.parse_args(argv)
    print_credit(options)
    print_answers(options)
    print_errors(options)
    draw(options, options.pictures / "credit.png")


if __name__ == "__main__":
    cli.run(main)
