"""How much of a result is luck: SFT, DPO and the original demo's recipe with five seeds.

Prints the README's table of results (mean, lowest and highest over seeds, 200 sampled answers to
each held-out target), and for each run of dpo.py how calm its training was. Five SFT models, five
runs of 1,500 rounds and five of 200 take about 25 minutes on two cores. Stopped and started again,
it resumes where it left off.
"""

import lab  # first: it makes the core importable, which must precede NumPy
import numpy as np

import cli
import data


# The recipe of the demo this project began with. All of it is written out, because dpo.py's
# defaults may change, and this must not.
DEMO_FLAGS = "--pairs rule --rounds 200 --lr 1e-4 --prompts 192"
DEMO = lab.Experiment("demo", DEMO_FLAGS, starts=lab.rounds_of_one_size)

COLUMNS = {"both": 3, "exact": 3, "preferred": 3, "mean_abs_error": 2}  # with their digits


def results(options):
    """Print the README's table of results."""
    seeds = range(options.seeds)
    sft = [lab.sft_facts(options, seed) for seed in seeds]
    online = [lab.run(options, lab.ONLINE, seed) for seed in seeds]
    demo = [lab.run(options, DEMO, seed) for seed in seeds]
    print("\n| | answers | both | exact | preferred | mean error |")
    print("|---|---|---|---|---|---|")
    print_results("SFT", "sampled, held-out", [facts["sampled"] for facts in sft])
    print_results("DPO", "sampled, held-out", [facts["sampled"] for facts in online])
    print_results("DPO", "greedy, all", [facts["greedy"] for facts in online])
    sampled = [facts["sampled"] for facts in demo]
    print_results("DPO, the demo's recipe", "sampled, held-out", sampled)


def print_results(title, answers, rows):
    """Print one line of the table from the metrics of each seed."""
    cells = [title, answers]
    for name, digits in COLUMNS.items():
        values = [row[name] for row in rows if row[name] is not None]  # no answer may parse
        cells.append(lab.spread(values, digits) if values else "-")
    print(f"| {' | '.join(cells)} |")


def calmness(options):
    """Print, for each seed, what the curves of a run did at worst and where they ended."""
    print(
        "\nseed  seconds SFT, DPO   loss of 50 rounds: highest, last   accuracy: lowest, last   "
        "held-out loss, accuracy: last   drop"
    )
    for seed in range(options.seeds):
        sft, dpo = lab.sft_facts(options, seed), lab.run(options, lab.ONLINE, seed)
        loss, accuracy = lab.means(dpo, "loss"), lab.means(dpo, "rewards/accuracies")
        both = np.array([row["shares"][data.ACCEPTED] for row in lab.measured(dpo)])
        drop = (np.maximum.accumulate(both) - both).max()  # below the best share so far
        print(
            f"{seed:4}  {sft['seconds']:7.0f}, {dpo['seconds']:3.0f}"
            f"{loss.max():21.2f}, {loss[-1]:.2f}{accuracy.min():26.2f}, {accuracy[-1]:.2f}"
            f"{lab.held_out(dpo, 'loss'):25.2f}, {lab.held_out(dpo, 'rewards/accuracies'):.2f}"
            f"{drop:15.2f}"
        )


def main(argv=None):
    options = lab.parser(__doc__, seeds=5).parse_args(argv)
    results(options)
    calmness(options)


if __name__ == "__main__":
    cli.run(main)
