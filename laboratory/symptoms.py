"""The tables of symptoms in laboratory/README.md: what goes wrong in DPO runs, and what helps.

    python laboratory/symptoms.py         all of them
    python laboratory/symptoms.py 4 5     these entries alone

A cell holds one number for each of two seeds. Many runs stand in several tables; each is made
once. All tables take about an hour on two cores, the two SFT models four minutes. Stopped and
started again, it resumes where it left off.

To add a symptom, write a function that prints its table, and name it in SYMPTOMS.
"""

import functools

import lab  # first: it makes the core importable, which must precede NumPy
from lab import ONCE, ONLINE, RULE, Experiment
import numpy as np

import beta
import cli
import data
import loop

ROUGH_FLAGS = "--lr 1.5e-3 --rounds 300"
ONCE_FLAGS, RULE_FLAGS = "--pairs once --rounds 300", "--pairs rule --rounds 300"
SHORT = Experiment("online-300", "--rounds 300")  # these three stand in several tables
SHORT_ONCE = Experiment("once-300", ONCE_FLAGS)
SHORT_RULE = Experiment("rule-300", RULE_FLAGS)

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
    ]
    print_table(options, columns, experiments)


def jumps(options):
    """3. The loss jumps, and margins change their sign"""
    columns = ["highest loss", "lowest accuracy", "negative margins", "exact", "both"]
    no_clip = functools.partial(loop.train, max_norm=None)
    divisor = functools.partial(loop.train, divisor=288)  # half of what a round can have
    experiments = [
        Experiment("rough", ROUGH_FLAGS),
        Experiment("rough-no-clip", ROUGH_FLAGS, "no clip", train=no_clip),
        Experiment("rough-divisor", ROUGH_FLAGS, "divisor", train=divisor),
        SHORT,
        ONLINE,
    ]
    print_table(options, columns, experiments)


def sum_or_mean(options):
    """4. Sum or mean of the log-probabilities"""
    columns = ["margin", "terms", "exact", "both", "divergence"]
    large_beta = "--beta 6.4"  # an answer has about eight tokens: 0.8 times 8
    experiments = [
        SHORT_ONCE,
        Experiment("once-300-mean", ONCE_FLAGS, "mean", train=with_mean),
        Experiment("once-300-mean-beta", f"{ONCE_FLAGS} {large_beta}", "mean", train=with_mean),
        SHORT,
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


def which_beta(options):
    """7. Beta"""
    columns = ["margin", "exact", "both", "divergence", "nine in ten"]
    print_table(options, columns, list(beta.EXPERIMENTS.values()))


def freshness(options):
    """8. Pairs that are more or less fresh"""
    columns = ["loss", "accuracy", "exact", "both", "nine in ten"]
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


SYMPTOMS = {  # by their number in laboratory/README.md; entry 6 there needs no run
    "1": chosen_reward,
    "2": garbage,
    "3": jumps,
    "4": sum_or_mean,
    "5": sft_term,
    "7": which_beta,
    "8": freshness,
}


def print_table(options, columns, experiments):
    """Make the runs that are missing; then print a row for each, a number for each seed."""
    rows = {}
    for experiment in experiments:
        rows[experiment.title] = [
            numbers(lab.run(options, experiment, seed), lab.sft_facts(options, seed))
            for seed in range(options.seeds)
        ]
    print(f"\n| dpo.py | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for title, of_seeds in rows.items():
        cells = [", ".join(as_text(row[name]) for row in of_seeds) for name in columns]
        print(f"| `{title}` | {' | '.join(cells)} |")


def as_text(value):
    return value if isinstance(value, str) else f"{value:.2f}"


def numbers(facts, sft_facts):
    """All that a table can show of a run, {column: number}.

    Numbers of training pairs are means of the last 50 rounds, unless they say highest or lowest.
    """
    sampled = facts["sampled"]
    accuracy = lab.means(facts, "rewards/accuracies")
    n_terms = {int(count): n for count, n in sampled["counts"].items()}
    nine_in_ten = [
        row["round"] for row in lab.measured(facts) if row["shares"][data.ACCEPTED] >= 0.9
    ]
    return {
        "loss": lab.means(facts, "loss")[-1],
        "accuracy": accuracy[-1],
        "chosen": lab.means(facts, "rewards/chosen")[-1],
        "rejected": lab.means(facts, "rewards/rejected")[-1],
        "margin": lab.means(facts, "rewards/margins")[-1],
        "highest loss": lab.logged(facts, "loss").max(initial=0.0),
        "lowest accuracy": accuracy.min(),
        "negative margins": np.mean(lab.logged(facts, "rewards/margins") < 0),
        "held-out chosen": lab.held_out(facts, "rewards/chosen"),
        "held-out accuracy": lab.held_out(facts, "rewards/accuracies"),
        "exact before": sft_facts["sampled"]["exact"],
        "exact": sampled["exact"],
        "both": sampled["both"],
        "terms": sum(count * n for count, n in n_terms.items()) / max(1, sum(n_terms.values())),
        "divergence": facts["divergence"],
        "nine in ten": str(nine_in_ten[0]) if nine_in_ten else "never",
    }


def main(argv=None):
    parser = lab.parser(__doc__, seeds=2)
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
