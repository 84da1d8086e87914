"""The tables of symptoms in laboratory/README.md: what goes wrong in DPO runs, and what helps.

    python laboratory/symptoms.py         all of them
    python laboratory/symptoms.py 4 5     these entries alone

A cell holds one number for each of three seeds. Many runs stand in several tables; each is made
once. All tables take about an hour and a half on two cores, the SFT models five minutes. Stopped
and started again, it resumes where it left off.

To add a symptom, write a function that prints its table, and name it in SYMPTOMS.
"""

import argparse
import functools

import lab  # first: it makes the core importable, which must precede NumPy
from lab import ONCE, ONLINE, RULE, SHORT_ONCE, SHORT_ONLINE, SHORT_RULE, Experiment
import numpy as np

import cli
import credit
import data
import dpo
import loop

ROUGH_FLAGS = "--lr 1.5e-3 --rounds 300"
ONCE_FLAGS = "--pairs once --rounds 300"
TWO_FLAGS = "--pairs rule --prefer 2"
FIVE_FLAGS = "--pairs rule --prefer 5 --rounds 300"

with_mean = functools.partial(loop.train, objective=loop.PairObjective(average_logps=True))


def with_sft_term(weight):
    """The training loop with an SFT term of this weight."""
    return functools.partial(loop.train, objective=loop.PairObjective(sft_weight=weight))


# One function for each symptom. The first line of its docstring is the table's title.


def chosen_reward(options):
    """1. The loss falls, and the chosen reward falls too"""
    columns = ["loss", "chosen", "rejected"]
    columns += ["held-out chosen", "held-out accuracy", "exact", "divergence"]
    print_table(
        options, columns, [RULE, ONCE, Experiment("own", "", "own", pairs=loop.own), ONLINE]
    )


def garbage(options):
    """2. Loss 0, accuracy 1, and the answers are garbage"""
    columns = ["loss", "accuracy", "held-out accuracy", "exact before", "exact", "both"]
    experiments = [
        ONCE,
        Experiment("once-50", "--pairs once --rounds 50"),
        Experiment("once-300-lr", f"{ONCE_FLAGS} --lr 4e-5"),
        Experiment("once-300-beta", f"{ONCE_FLAGS} --beta 3"),
        RULE,
        ONLINE,
        Experiment("online-50", "--rounds 50"),
    ]
    print_table(options, columns, experiments)


def jumps(options):
    """3. The loss jumps, and margins change their sign"""
    columns = ["highest loss", "lowest accuracy", "negative margins", "exact", "both"]
    no_clip = functools.partial(loop.train, max_norm=None)
    divisor = functools.partial(loop.train, divisor=320)  # half of what a round can have
    experiments = [
        Experiment("rough", ROUGH_FLAGS),
        Experiment("rough-no-clip", ROUGH_FLAGS, "no clip", train=no_clip),
        Experiment("rough-divisor", ROUGH_FLAGS, "divisor", train=divisor),
        SHORT_ONLINE,
        ONLINE,
    ]
    print_table(options, columns, experiments)


def sum_or_mean(options):
    """4. Sum or mean of the log-probabilities"""
    columns = ["margin", "end token", "terms", "exact", "both", "divergence"]
    large_beta = "--beta 6.4"  # an answer has about eight tokens: 0.8 times 8
    experiments = [
        SHORT_ONCE,
        Experiment("once-300-mean", ONCE_FLAGS, "mean", train=with_mean),
        Experiment("once-300-mean-beta", f"{ONCE_FLAGS} {large_beta}", "mean", train=with_mean),
        SHORT_ONLINE,
        Experiment("online-300-mean", "--rounds 300", "mean", train=with_mean),
        Experiment("online-300-mean-beta", f"--rounds 300 {large_beta}", "mean", train=with_mean),
    ]
    print_table(options, columns, experiments)


def sft_term(options):
    """5. An added SFT term"""
    columns = ["chosen", "rejected", "exact", "both", "divergence"]
    experiments = []
    for plain in SHORT_RULE, SHORT_ONCE:
        experiments.append(plain)
        for weight in 0.1, 1.0, 10.0:
            name, change = f"{plain.name}-sft-{weight:g}", f"SFT term {weight:g}"
            experiments.append(Experiment(name, plain.flags, change, train=with_sft_term(weight)))
    print_table(options, columns, experiments)


def freshness(options):
    """8. Pairs that are more or less fresh"""
    columns = ["judged answers", "loss", "accuracy", "exact", "both", "nine in ten"]
    hundred = functools.partial(loop.FreshEvery, 100)
    ten = functools.partial(loop.FreshEvery, 10)
    experiments = [
        RULE,
        ONCE,
        Experiment("fresh-100", "", "fresh every 100", pairs=hundred),
        Experiment("fresh-10", "", "fresh every 10", pairs=ten),
        ONLINE,
    ]
    print_table(options, columns, experiments)


def length(options):
    """9. Loss, accuracy and margin are fine, but the number of terms does not change"""
    columns = ["accuracy", "margin", "two terms before", "two terms", "exact before", "exact"]
    experiments = [
        Experiment("two-slow", f"{TWO_FLAGS} --lr 2e-5 --rounds 100"),
        Experiment("two", f"{TWO_FLAGS} --rounds 300"),
        Experiment("two-online", "--prefer 2 --rounds 300"),
    ]
    print_table(options, columns, experiments)


def evaluation_loss(options):
    """10. The loss on held-out pairs rises while the training loss falls"""
    columns = ["loss", "lowest held-out loss", "held-out loss", "held-out accuracy", "exact"]
    flags = "--rounds 300 --prompts 128"
    experiments = []
    for n_targets in (20, 300, 9600):
        pairs = functools.partial(loop.FixedPairs, loop.accepted_over_rejected, n_targets=n_targets)
        experiments.append(
            Experiment(
                f"fixed-{n_targets}",
                flags,
                f"pairs of {8 * n_targets:,} answers",
                pairs=pairs,
                starts=lab.rounds_of_one_size,
            )
        )
    print_table(options, columns, experiments)


def never_stops(options):
    """11. Answers that never stop, or are corrupted"""
    columns = ["more than five terms", "does not parse", "never ends", "exact", "both"]
    experiments = [
        Experiment("five", FIVE_FLAGS),
        Experiment("five-lr", f"{FIVE_FLAGS} --lr 2e-5"),
        Experiment("five-beta", f"{FIVE_FLAGS} --beta 3"),
        Experiment("five-sft", FIVE_FLAGS, "SFT term 10", train=with_sft_term(10.0)),
        Experiment("five-online", "--prefer 5 --rounds 300"),
    ]
    print_table(options, columns, experiments)


def refreshed_reference(options):
    """13. A reference that is refreshed"""
    columns = ["exact", "both", "divergence", "distinct"]

    def every(n):
        refresh = functools.partial(loop.refresh_reference, every=n)
        return functools.partial(loop.train, update_reference=refresh)

    experiments = [
        SHORT_ONLINE,
        Experiment("refresh-50", "--rounds 300", "new reference every 50", train=every(50)),
        Experiment("online-300-0.2", "--rounds 300 --beta 0.2"),
    ]
    print_table(options, columns, experiments)


def which_answers(options):
    """14. Which answers to pair"""
    columns = ["pairs a round", "exact", "both", "divergence", "distinct"]
    best = functools.partial(loop.fresh, loop.best_over_worst)
    graded = functools.partial(loop.fresh, loop.graded)
    experiments = [
        Experiment("own-300", "--rounds 300", "accepted over rejected", pairs=loop.own),
        Experiment("best-300", "--rounds 300", "best over worst", pairs=best),
        Experiment("graded-300", "--rounds 300", "graded", pairs=graded),
    ]
    print_table(options, columns, experiments)


def sft_first(options):
    """15. SFT first?"""
    columns = ["exact before", "pairs found", "exact", "both"]
    rows = {}
    for steps in (300, 1000, 3000):
        shorter = argparse.Namespace(**vars(options))
        shorter.sft_steps = min(steps, options.sft_steps)
        shorter.folder = options.folder / f"sft-{steps}"  # its SFT models, and what starts there
        change = f"after {steps:,} SFT steps"
        experiment = Experiment(f"after-{steps}", "--rounds 300", change)
        rows[experiment.title] = of_seeds(shorter, experiment, columns)
    rows[SHORT_ONLINE.title] = of_seeds(options, SHORT_ONLINE, columns)
    print_rows(columns, rows)


SYMPTOMS = {  # by their number in laboratory/README.md; 6, 7 and 12 have no table here
    "1": chosen_reward,
    "2": garbage,
    "3": jumps,
    "4": sum_or_mean,
    "5": sft_term,
    "8": freshness,
    "9": length,
    "10": evaluation_loss,
    "11": never_stops,
    "13": refreshed_reference,
    "14": which_answers,
    "15": sft_first,
}


def print_table(options, columns, experiments):
    """Make the runs that are missing; then print a row for each, a number for each seed."""
    rows = {one.title: of_seeds(options, one, columns) for one in experiments}
    print_rows(columns, rows)


def of_seeds(options, experiment, columns):
    """The numbers of one experiment, a dict for each seed."""
    return [numbers(options, experiment, seed, columns) for seed in range(options.seeds)]


def print_rows(columns, rows):
    """Print {title: [{column: number} of each seed]} in Markdown."""
    print(f"\n| dpo.py | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for title, seeds in rows.items():
        cells = [", ".join(as_text(row[name]) for row in seeds) for name in columns]
        flags, _, change = title.partition(", ")
        label = f"`{flags}`, {change}" if change else f"`{flags}`"
        if flags == "(defaults)":
            label = label.replace("`", "")  # it is no flag
        print(f"| {label} | {' | '.join(cells)} |")


def as_text(value):
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def numbers(options, experiment, seed, columns):
    """What a table can show of a run, {column: number}, for these columns.

    Numbers of training pairs are means of the last 50 rounds, unless they say highest or lowest.
    """
    before = lab.sft_facts(options, seed)["sampled"]
    facts = lab.run(options, experiment, seed)
    after = facts["sampled"]
    functions = {
        "loss": lambda: lab.means(facts, "loss")[-1],
        "accuracy": lambda: lab.means(facts, "rewards/accuracies")[-1],
        "chosen": lambda: lab.means(facts, "rewards/chosen")[-1],
        "rejected": lambda: lab.means(facts, "rewards/rejected")[-1],
        "margin": lambda: lab.means(facts, "rewards/margins")[-1],
        "highest loss": lambda: lab.logged(facts, "loss").max(initial=0.0),
        "lowest accuracy": lambda: lab.means(facts, "rewards/accuracies").min(),
        "negative margins": lambda: np.mean(lab.logged(facts, "rewards/margins") < 0),
        "pairs a round": lambda: np.mean([row["pairs"] for row in facts["history"][1:]]),
        "pairs found": lambda: sum(row["pairs"] for row in facts["history"]),
        "judged answers": lambda: judged_answers(options, experiment),
        "held-out chosen": lambda: lab.held_out(facts, "rewards/chosen"),
        "held-out accuracy": lambda: lab.held_out(facts, "rewards/accuracies"),
        "held-out loss": lambda: lab.held_out(facts, "loss"),
        "lowest held-out loss": lambda: min(row["eval_loss"] for row in lab.measured(facts)),
        "end token": lambda: end_token(options, experiment, seed),
        "exact before": lambda: before["exact"],
        "exact": lambda: after["exact"],
        "both": lambda: after["both"],
        "two terms before": lambda: before["counts"]["2"] / before["n"],
        "two terms": lambda: after["counts"]["2"] / after["n"],
        "more than five terms": lambda: more_terms_than(5, after),
        "does not parse": lambda: after["shares"][data.UNREADABLE],
        "never ends": lambda: after["endless"],
        "terms": lambda: mean_terms(after["counts"]),
        "divergence": lambda: facts["divergence"],
        "distinct": lambda: "-" if facts["distinct"] is None else f"{facts['distinct']:.0f}",
        "nine in ten": lambda: nine_in_ten(facts),
    }
    row = {name: functions[name]() for name in columns}
    return {name: float(value) if isinstance(value, np.floating) else value
            for name, value in row.items()}  # fmt: skip


def mean_terms(counts):
    """The mean number of terms of answers that parse, from {"3": number of answers, ...}."""
    n_terms = {int(count): n for count, n in counts.items()}
    return sum(count * n for count, n in n_terms.items()) / max(1, sum(n_terms.values()))


def more_terms_than(most, metrics):
    """The share of answers with more terms than `most`, which SFT's lines never have."""
    n_more = sum(n for count, n in metrics["counts"].items() if int(count) > most)
    return n_more / metrics["n"]


def nine_in_ten(facts):
    """The first measured round after which nine in ten answers are accepted, as text."""
    rounds = [row["round"] for row in lab.measured(facts) if loop.reached(row, 0.9)]
    return str(rounds[0]) if rounds else "never"


def end_token(options, experiment, seed):
    """log(pi / pi_ref) of the end token of right sums of four terms, in nats."""
    before, digits, end = credit.measure(options, experiment, seed)["right, 4 terms"]
    return end / credit.BETA


def judged_answers(options, experiment):
    """How many answers the judge had to see in a run."""
    arguments = lab.dpo_arguments(options, experiment, 0)
    starts = experiment.starts(arguments.rounds, arguments.prompts)
    if experiment == RULE:
        return 0
    if experiment == ONCE:
        return dpo.OncePairs.n_targets * arguments.answers
    n_targets = starts[-1]
    if experiment.pairs is not None:  # FreshEvery answers the targets of some rounds only
        every = experiment.pairs.args[0]
        draws = [(step, min(step + min(every, 50), arguments.rounds))
                 for step in range(0, arguments.rounds, every)]  # fmt: skip
        n_targets = sum(starts[last] - starts[first] for first, last in draws)
    return int(n_targets) * arguments.answers


def main(argv=None):
    parser = lab.parser(__doc__, seeds=3)
    parser.add_argument("entries", nargs="*", metavar="ENTRY",
                        help=f"of {' '.join(SYMPTOMS)} (default: all)")  # fmt: skip
    options = parser.parse_args(argv)
    for entry in options.entries:
        if entry not in SYMPTOMS:
            parser.error(f"no entry {entry!r}; there are {', '.join(SYMPTOMS)}")
    for entry in options.entries or SYMPTOMS:
        print(f"\n{SYMPTOMS[entry].__doc__.splitlines()[0]}")
        SYMPTOMS[entry](options)


if __name__ == "__main__":
    cli.run(main)
