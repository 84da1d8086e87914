"""Preference pairs, or SFT lines, as JSON lines with the columns TRL asks for.

    python examples/write_pairs.py runs/pairs.jsonl                     # sampled from runs/sft.npz
    python examples/write_pairs.py runs/pairs.jsonl --pairs rule
    python examples/write_pairs.py runs/lines.jsonl --sft

A pair is {"prompt": "100=", "chosen": "50+30+20", "rejected": "50+50"}, an SFT line
{"prompt": "100=", "completion": "50+50"}. TRL ends every completion with the end token by itself.
"""
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the project's modules
import cli  # noqa: E402


def parser():
    new = cli._Parser("examples/write_pairs", "Write preference pairs or SFT lines for TRL.")
    new.add_argument("out", type=Path, metavar="FILE", help="the file of JSON lines to write")
    what = new.add_mutually_exclusive_group()
    what.add_argument("--pairs", choices=["sampled", "rule"], default="sampled",
                      help="answers sampled from --checkpoint, judged; or right sums made by rule")
    what.add_argument("--sft", action="store_true", help="write SFT lines instead of pairs")
    new.add_argument("--n", type=cli.count, default=1024, help="pairs or lines to write")
    new.add_argument("--checkpoint", type=Path, default=Path("runs/sft.npz"),
                     help="the model that is sampled from")
    new.add_argument("--prefer", type=int, choices=range(2, 6), default=3,
                     help="the preferred number of terms")
    new.add_common("all that is random")
    return new


if __name__ == "__main__":
    cli.PARSERS["write_pairs"] = parser
    raise SystemExit(cli.main("write_pairs"))

import json  # noqa: E402

from tinygrad_lite import parallel_map  # noqa: E402  before NumPy, for its BLAS threads
import numpy as np  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import eval as evaluation  # noqa: E402
from transformer import atomic_write  # noqa: E402

PROMPTS, ANSWERS = 128, 8  # of a round of sampling, as in dpo.py


def split(line):
    """Ids as two texts: the prompt up to its `=`, and what the model is to write after it."""
    head, equals, completion = data.decode(line).partition("=")
    return head + equals, completion


def has_ended(line):
    return data.END in line


def pair_rows(chosen, rejected):
    """Pairs of lines (pairs, T) as rows of the file.

    Those where an answer has no end token (it ran to data.MAX_LEN) are left out: TRL would add one.
    """
    for good, bad in zip(chosen, rejected):
        if has_ended(good) and has_ended(bad):
            prompt, completion = split(good)
            yield {"prompt": prompt, "chosen": completion, "rejected": split(bad)[1]}


def sft_rows(lines):
    """Lines (N, T) as rows of the file."""
    for line in lines:
        yield dict(zip(("prompt", "completion"), split(line)))


def sampled_rows(model, n, prefer, rng, map_fn):
    """n pairs of the model's own answers, from as many rounds of sampling as that takes."""
    rows, without = [], 0
    while len(rows) < n:
        pairs = dpo.sampled_pairs(model, PROMPTS, ANSWERS, prefer, rng, map_fn)
        new = list(pair_rows(*pairs)) if pairs else []
        without = 0 if new else without + 1
        if without == dpo.PATIENCE:
            raise cli.UserError(f"no prompt had both a preferred and another answer in {without} "
                                f"rounds in a row; train a better SFT model")
        rows += new
    return rows[:n]


def write(path, rows):
    """Rows as JSON lines; an earlier file stays whole until the end."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def main(arguments):
    out, n, prefer = arguments.out, arguments.n, arguments.prefer
    rng = np.random.default_rng(arguments.seed)
    if arguments.sft:
        rows = list(sft_rows(data.random_lines(n, rng)))
    elif arguments.pairs == "rule":
        rows = list(pair_rows(*dpo.rule_pairs(n, prefer, rng)))
    else:
        model = evaluation.load(arguments.checkpoint)
        with parallel_map(arguments.threads) as map_fn:
            rows = sampled_rows(model, n, prefer, rng, map_fn)
    write(out, rows)
    print(f"wrote {len(rows):,} rows to {out}, the first: {json.dumps(rows[0])}")
