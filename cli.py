"""The command lines of sft.py, dpo.py and eval.py: flags, progress, and what a mistake or Ctrl-C prints.

Nothing here imports NumPy, so that --help and a mistyped flag are answered at once.
"""
import argparse
import importlib
import math
import os
import sys
import time
from pathlib import Path


class UserError(Exception):
    """A mistake that one line can explain: printed on stderr, exit code 2, no traceback."""


def main(program, argv=None):
    """Run program.main with its parsed flags; return the exit code: 0, 2 for a mistake, 130 for Ctrl-C."""
    arguments = PARSERS[program]().parse_args(argv)
    out = getattr(arguments, "out", None)
    before = _modified(out)
    try:
        importlib.import_module(program).main(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        state = "" if out is None else f"; {out} " + ("is as it was" if before == _modified(out) else "is saved")
        return _fail(f"stopped{state}", 130)
    except BrokenPipeError:  # `| head -1` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        return _fail(f"{program}.py: {error}", 2)
    except MemoryError:
        return _fail(f"{program}.py: not enough memory; choose smaller sizes", 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{program}.py: {where}{error.strerror or error}", 2)


def _fail(message, code):
    print(" ".join(message.split()), file=sys.stderr)
    return code


def _modified(path):
    try:
        return None if path is None else os.stat(path).st_mtime_ns
    except OSError:
        return None


class _Parser(argparse.ArgumentParser):
    """argparse with its messages on one line."""

    def error(self, message):
        raise SystemExit(_fail(f"{self.prog}: {message}; see python {self.prog} --help", 2))


def _parser(program, description):
    return _Parser(prog=f"{program}.py", description=description, allow_abbrev=False,
                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def count(text):
    """A whole number of at least 1."""
    return _number(text, int, lambda n: 1 <= n < 2 ** 31, "a whole number of at least 1")


def seed(text):
    return _number(text, int, lambda n: 0 <= n < 2 ** 63, "a whole number of at least 0")


def positive(text):
    """A finite number above 0."""
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def _number(text, kind, valid, meaning):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"must be {meaning}, not {text!r}")
    return value


def checkpoint_path(text):
    if Path(text).suffix != ".npz" or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file name ending in .npz, not {text!r}")
    return Path(text)


def target(text):
    return _number(text, int, lambda n: 5 <= n <= 100, "a whole number from 5 to 100")


def _seed_and_threads(parser, purpose):
    parser.add_argument("--seed", type=seed, default=0, help=purpose)
    parser.add_argument("--threads", type=count, default=min(8, os.cpu_count() or 1),
                        help="cores to use; the result does not depend on it")


def _common(parser, out):
    _seed_and_threads(parser, "of all that is random; the same seed gives the same run")
    parser.add_argument("--out", type=checkpoint_path, default=out,
                        help="the checkpoint to write; a .json and pictures go beside it")


def sft_parser():
    parser = _parser("sft", "Train a Transformer from scratch to write sums (supervised fine-tuning).")
    add = parser.add_argument
    add("--steps", type=count, default=16000, help="training steps")
    add("--batch-size", type=count, default=128, help="lines in a step")
    add("--lr", type=positive, default=8e-3, help="peak learning rate of Adam")
    add("--d-model", type=count, default=48, help="width of the residual stream")
    add("--n-layers", type=count, default=3, help="number of blocks")
    add("--n-heads", type=count, default=4, help="attention heads; must divide --d-model")
    add("--d-hidden", type=count, default=96, help="hidden width of the MLP")
    _common(parser, Path("runs/sft.npz"))
    return parser


def dpo_parser():
    parser = _parser("dpo", "Teach a trained model a preference by Direct Preference Optimization.")
    add = parser.add_argument
    add("--beta", type=positive, default=0.8, help="how strongly to hold on to the reference (the paper's beta)")
    add("--pairs", choices=["sampled", "rule"], default="sampled",
        help="the model's own answers, judged; or correct sums made by rule, which ruins the model")
    add("--prefer", type=int, choices=range(2, 6), default=3, help="the preferred number of terms")
    add("--rounds", type=count, default=300, help="rounds of pairs, with one training step each")
    add("--prompts", type=count, default=128, help="targets drawn in a round (with --pairs rule: pairs)")
    add("--answers", type=count, default=8, help="answers sampled for each target")
    add("--lr", type=positive, default=4e-4, help="peak learning rate of Adam")
    add("--sft", type=Path, default=Path("runs/sft.npz"), help="the checkpoint to start from: policy and reference")
    _common(parser, Path("runs/dpo.npz"))
    return parser


def eval_parser():
    parser = _parser("eval", "Print the metrics of checkpoints, or their answers to a prompt.")
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, default=[Path("runs/sft.npz"), Path("runs/dpo.npz")],
        metavar="CHECKPOINT", help="what sft.py or dpo.py wrote")
    add("--prompt", type=target, metavar="TARGET", help="answer this target, 5 to 100, instead of measuring")
    add("--samples", type=count, help="answers sampled for each target (default: 50, with --prompt 5)")
    add("--temperature", type=positive, default=1.0, help="of the sampled answers")
    add("--prefer", type=int, choices=range(2, 6), default=3, help="the number of terms to count as preferred")
    add("--json", action="store_true", help="print the same as JSON")
    _seed_and_threads(parser, "of the sampled answers")
    return parser


PARSERS = {"sft": sft_parser, "dpo": dpo_parser, "eval": eval_parser}


def settings(arguments):
    """The flags as a dict for JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}


class Progress:
    """One line that tells how a run goes: in place on a terminal, every few seconds elsewhere."""

    def __init__(self, total, every=5.0):
        self.total, self.started = total, time.perf_counter()
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else every
        self.printed = 0.0

    def seconds(self):
        return time.perf_counter() - self.started

    def show(self, done, text):
        """Print `text` and the time left after `done` steps, if it is time to, or the end."""
        now = self.seconds()
        if now - self.printed < self.every and done < self.total:
            return
        self.printed = now
        left = now / done * (self.total - done)
        line = f"step {done:,}/{self.total:,}  {text}  {int(left) // 60}:{int(left) % 60:02d} left"
        if self.terminal:
            print(f"\r\x1b[K{line}", end="\n" if done == self.total else "", flush=True)
        else:
            print(line, flush=True)
