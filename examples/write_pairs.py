"""Write preference pairs, or SFT lines, as JSON lines with the columns TRL asks for."""

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules
import cli  # noqa: E402  before NumPy, for the number of BLAS threads
import numpy as np  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import eval as evaluation  # noqa: E402

PROMPTS, ANSWERS = 128, 8  # of a round of sampling


def split(line):
    """Ids as two texts: the prompt up to its `=`, and what the model is to write after it."""
    head, equals, completion = data.decode(line).partition("=")
    return head + equals, completion


def pair_rows(pairs):
    """Pairs, ids (P, 2, T), as rows of the file.

    Those where an answer has no end token (it ran to data.MAX_LEN) are left out: TRL would add one.
    """
    for chosen, rejected in pairs:
        if data.END in chosen and data.END in rejected:
            prompt, completion = split(chosen)
            yield {"prompt": prompt, "chosen": completion, "rejected": split(rejected)[1]}


def sft_rows(lines):
    """Lines (N, T) as rows of the file."""
    for line in lines:
        yield dict(zip(("prompt", "completion"), split(line)))


def sampled_rows(model, n, prefer, rng):
    """n pairs of the model's own answers, from as many rounds of sampling as that takes."""
    rows, empty = [], 0
    while len(rows) < n:
        targets = rng.choice(data.TRAINING, PROMPTS)
        new = list(pair_rows(dpo.judged_pairs(model, targets, ANSWERS, prefer, rng)))
        rows, empty = rows + new, 0 if new else empty + 1
        if empty == dpo.PATIENCE:
            raise cli.UserError(
                f"no pair in {empty} rounds of {PROMPTS * ANSWERS:,} answers; train SFT longer"
            )
    return rows[:n]


def parse_arguments(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="FILE", help="the file of JSON lines to write")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--pairs",
        choices=["sampled", "rule"],
        default="sampled",
        help="answers sampled from --checkpoint, judged; or right sums made by rule",
    )
    what.add_argument("--sft", action="store_true", help="write SFT lines instead of pairs")
    add = parser.add_argument
    add("--n", type=cli.whole(1), default=1024, help="pairs or lines to write")
    add(
        "--checkpoint",
        type=Path,
        default=Path("runs/sft.npz"),
        help="the model that is sampled from",
    )
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="the preferred number of terms")
    add("--seed", type=cli.whole(0, 2**63 - 1), default=0, help="of all that is random")
    return parser.parse_args(argv)


def main(argv=None):
    """Write the file, once it is complete."""
    arguments = parse_arguments(argv)
    out, n, prefer = arguments.out, arguments.n, arguments.prefer
    target = out.resolve()
    if target.suffix == ".npz" or target == arguments.checkpoint.resolve():
        raise cli.UserError(f"{out} is or could be a checkpoint; name a .jsonl file to write")
    cli.outputs(out)
    rng = np.random.default_rng(arguments.seed)
    if arguments.sft:
        rows = list(sft_rows(data.random_lines(n, rng)))
    elif arguments.pairs == "rule":
        rows = list(pair_rows(next(dpo.rule_rounds(n, prefer, rng))))
    else:
        rows = sampled_rows(evaluation.load(arguments.checkpoint), n, prefer, rng)
    with cli.atomic_write(out) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    print(f"wrote {len(rows):,} rows to {out}, the first: {json.dumps(rows[0])}")


if __name__ == "__main__":
    cli.run(main)
