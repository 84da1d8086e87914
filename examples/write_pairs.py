"""Write preference pairs, or SFT lines, as JSON lines with the columns TRL asks for."""

# ruff: noqa: E402  the project's modules can be imported only after the path is set

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules

from tinygrad_lite import World  # before NumPy, see there
import numpy as np

import cli
import data
import dpo
import eval as evaluation

PROMPTS, ANSWERS = 128, 8  # targets in a round of sampling, and answers to each
PATIENCE = 10  # rounds in a row without a pair after which sampling gives up


def split_at_equals(line):
    """A line (ids) as two texts: the prompt with its `=`, and the completion."""
    target, completion = data.decode(line).split("=", maxsplit=1)
    return f"{target}=", completion


def pair_rows(pairs):
    """Pairs, ids (P, 2, T), as rows of the file.

    A pair is left out if an answer has no end token, because it ran to data.MAX_LEN: TRL would add
    the token.
    """
    rows = []
    for chosen, rejected in pairs:
        if data.END in chosen and data.END in rejected:
            prompt, chosen_completion = split_at_equals(chosen)
            _, rejected_completion = split_at_equals(rejected)
            row = {"prompt": prompt, "chosen": chosen_completion, "rejected": rejected_completion}
            rows.append(row)
    return rows


def sft_rows(lines):
    """Lines (N, T) as rows of the file."""
    rows = []
    for line in lines:
        prompt, completion = split_at_equals(line)
        rows.append({"prompt": prompt, "completion": completion})
    return rows


def sampled_rows(model, n, prefer, rng):
    """n pairs of the model's own answers, from as many rounds of sampling as that takes."""
    rows = []
    rounds_without_pairs = 0
    while len(rows) < n:
        targets = rng.choice(data.TRAINING, PROMPTS)
        judged = dpo.sample_and_judge(model, targets, ANSWERS, prefer, rng)
        new_rows = pair_rows(dpo.pair_up(judged))
        rows += new_rows
        rounds_without_pairs = 0 if new_rows else rounds_without_pairs + 1
        if rounds_without_pairs == PATIENCE:
            n_answers = PROMPTS * ANSWERS
            raise cli.UserError(
                f"no pair in {PATIENCE} rounds of {n_answers:,} answers; train SFT longer"
            )
    return rows[:n]


def parse_arguments(argv):
    formatter = argparse.ArgumentDefaultsHelpFormatter  # --help shows every default
    parser = cli.Parser(prog=sys.argv[0], description=__doc__, formatter_class=formatter)
    parser.add_argument("out", type=Path, metavar="FILE", help="the file of JSON lines to write")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--pairs", choices=["sampled", "rule"], default="sampled",
        help="answers sampled from --checkpoint, judged; or right sums made by rule")  # fmt: skip
    kind.add_argument("--sft", action="store_true", help="write SFT lines instead of pairs")
    add = parser.add_argument
    add("--n", type=cli.whole(1), default=1024, help="pairs or lines to write")
    add("--checkpoint", type=Path, default=Path("runs/sft.npz"), help="the model to sample from")
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="the preferred number of terms")
    add("--seed", type=cli.seed, default=0, help="repeats a file")
    return parser.parse_args(argv)


def main(argv=None):
    """Write the file, once it is complete."""
    arguments = parse_arguments(argv)
    out, n, prefer = arguments.out, arguments.n, arguments.prefer
    target = out.resolve()  # where a symbolic link leads
    if target.suffix == ".npz" or target == arguments.checkpoint.resolve():
        raise cli.UserError(f"{out} is or could be a checkpoint; name a .jsonl file to write")
    if target.is_dir():
        raise cli.UserError(f"{out} is a folder; name a .jsonl file to write")
    cli.output_files(out)

    rng = np.random.default_rng(arguments.seed)
    if arguments.sft:
        rows = sft_rows(data.random_lines(n, rng))
    elif arguments.pairs == "rule":
        # These pairs depend neither on a policy nor on the step.
        rows = pair_rows(dpo.rule_pairs(None, 0, World(), rng, starts=[0, n], prefer=prefer))
    else:
        rows = sampled_rows(evaluation.load(arguments.checkpoint), n, prefer, rng)

    with cli.atomic_write(out) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
    print(f"wrote {len(rows):,} rows to {out}, the first: {json.dumps(rows[0])}")


if __name__ == "__main__":
    cli.run(main)
