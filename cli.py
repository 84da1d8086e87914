"""The command lines of sft.py, dpo.py and eval.py: flags, progress, and what a mistake prints.

Nothing here imports NumPy, so that --help and a mistyped flag are answered at once.
"""
import argparse
import contextlib
import importlib
import math
import os
import re
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path


class UserError(Exception):
    """A mistake that one line can explain: printed on stderr, exit code 2, no traceback."""


def main(program, argv=None):
    """Run program.main with its flags; return the exit code.

    0, or 2 for a mistake, 130 for Ctrl-C, 1 when nobody reads standard output any more.
    """
    out, before = None, None
    try:
        arguments = PARSERS[program]().parse_args(argv)
        out = getattr(arguments, "out", None)
        before = _modified(out)
        if out:  # fail before minutes of training, not after them
            out.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(out.parent, os.W_OK):
                raise UserError(f"cannot write to {out.parent}; choose another --out")
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of an overflow: the loops say so
        importlib.import_module(program).main(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut this short
        state = ("is saved" if before != _modified(out) else
                 "is as it was" if before else "was not written")
        print(end="\n" * sys.stdout.isatty())  # after the progress line
        return _fail(f"stopped; {out} {state}" if out else "stopped", 130)
    except BrokenPipeError:  # `| head -1` has read enough; nothing may be printed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        return _fail(f"{program}.py: {error}", 2)
    except MemoryError:
        return _fail(f"{program}.py: not enough memory; choose smaller sizes", 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        state = "nothing was overwritten" if before == _modified(out) else f"{out} is saved"
        return _fail(f"{program}.py: {where}{error.strerror or error}; {state}", 2)


def _fail(message, code):
    print(" ".join(message.split()), file=sys.stderr)
    return code


def _modified(path):
    return path.stat().st_mtime_ns if path and path.exists() else None


# What a flag may be.

def _number(kind, valid, meaning, text):
    with contextlib.suppress(ValueError):
        value = kind(text)
        if valid(value):
            return value
    raise argparse.ArgumentTypeError(f"must be {meaning}, not {text!r}")


count = partial(_number, int, lambda n: 1 <= n < 2 ** 31, "a whole number of at least 1")
processes = partial(_number, int, lambda n: 1 <= n <= 64, "a whole number from 1 to 64")
seed = partial(_number, int, lambda n: 0 <= n < 2 ** 63, "a whole number of at least 0")
target = partial(_number, int, lambda n: 5 <= n <= 100, "a whole number from 5 to 100")
positive = partial(_number, float, lambda x: 0 < x < math.inf, "a finite number above 0")


def checkpoint_path(text):
    if Path(text).suffix != ".npz" or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file name ending in .npz, not {text!r}")
    return Path(text)


def sum_line(text):
    match = re.fullmatch(r"([0-9]{1,3})=[0-9]+(\+[0-9]+)*", text)
    if not match or len(text) > 23 or not 5 <= int(match[1]) <= 100:
        raise argparse.ArgumentTypeError(f"must be a line such as 100=10+70+20, not {text!r}")
    return text


# The flags.

class _Parser(argparse.ArgumentParser):
    """argparse, with every default in --help and every message on one line."""

    def __init__(self, program, description):
        super().__init__(prog=f"{program}.py", description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        sys.exit(_fail(f"{self.prog}: {message}; see python {self.prog} --help", 2))

    def add_common(self, seed_of, out=None):
        add = self.add_argument
        add("--seed", type=seed, default=0, help=f"of {seed_of}; the same seed, the same run")
        add("--threads", type=processes, default=min(4, os.cpu_count() or 1),
            help="processes to compute in, best one a core; the result does not depend on it")
        if out:
            add("--out", type=checkpoint_path, default=Path(out),
                help="the checkpoint to write; a .json and pictures go beside it")


def sft_parser():
    parser = _Parser("sft", "Train a Transformer from scratch to write sums.")
    add = parser.add_argument
    add("--steps", type=count, default=20000, help="training steps")
    add("--batch-size", type=count, default=128, help="lines in a step")
    add("--lr", type=positive, default=8e-3, help="peak learning rate of Adam")
    add("--d-model", type=count, default=32, help="width of the residual stream")
    add("--n-layers", type=count, default=3, help="number of blocks")
    add("--n-heads", type=count, default=4, help="attention heads; must divide --d-model")
    add("--d-hidden", type=count, default=64, help="hidden width of the MLP")
    parser.add_common("weights and lines", "runs/sft.npz")
    return parser


def dpo_parser():
    parser = _Parser("dpo", "Teach a trained model a preference by Direct Preference Optimization.")
    add = parser.add_argument
    add("--beta", type=positive, default=0.8, help="how strongly to hold on to the reference")
    add("--pairs", choices=["sampled", "rule"], default="sampled",
        help="the model's own answers, judged; or right sums made by rule, which ruin the model")
    add("--prefer", type=int, choices=range(2, 6), default=3, help="the preferred number of terms")
    add("--rounds", type=count, default=600, help="rounds of new pairs, with one step each")
    add("--prompts", type=count, default=192, help="targets (or, made by rule, pairs) in a round")
    add("--answers", type=count, default=8, help="answers sampled for each target")
    add("--lr", type=positive, default=7e-4, help="peak learning rate of Adam")
    add("--sft", type=Path, default=Path("runs/sft.npz"), help="where policy and reference start")
    parser.add_common("pairs", "runs/dpo.npz")
    return parser


def eval_parser():
    parser = _Parser("eval", "Print metrics of checkpoints, answers to a prompt, or DPO's credit.")
    defaults = [Path("runs/sft.npz"), Path("runs/dpo.npz")]  # set first, or --help would show them
    parser.set_defaults(checkpoints=defaults, prompt=None, samples=None, tokens=None)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", default=argparse.SUPPRESS,
        help="what sft.py or dpo.py wrote (default: runs/sft.npz runs/dpo.npz)")
    add("--prompt", type=target, metavar="TARGET", default=argparse.SUPPRESS,
        help="answer this target, 5 to 100, instead of measuring")
    add("--samples", type=count, default=argparse.SUPPRESS,
        help="answers sampled for each target (default: 50, or 5 with --prompt)")
    add("--temperature", type=positive, default=1.0, help="of the sampled answers")
    add("--prefer", type=int, choices=range(2, 6), default=3, help="the preferred number of terms")
    add("--tokens", type=sum_line, nargs="+", metavar="LINE", default=argparse.SUPPRESS,
        help="draw beta (log pi - log pi_ref) of each token of this line, 100=10+70+20, and of "
             "another: a second one given here, or what the reference answers instead; tokens.png "
             "goes beside the second checkpoint; checkpoints come before this flag")
    add("--beta", type=positive, default=0.8, help="for --tokens")
    add("--json", action="store_true", help="print metrics or answers as JSON")
    parser.add_common("the sampled answers")
    return parser


PARSERS = {"sft": sft_parser, "dpo": dpo_parser, "eval": eval_parser}


class Progress:
    """One line that tells how a run goes: in place on a terminal, every few seconds elsewhere."""

    def __init__(self, total, unit):
        self.total, self.unit, self.started, self.next = total, unit, time.perf_counter(), 0.0
        self.terminal = sys.stdout.isatty()

    def seconds(self):
        return time.perf_counter() - self.started

    def show(self, done, text):
        """Print `text` and the time left after `done` of the total, if it is time to."""
        now = self.seconds()
        if now < self.next and done < self.total:
            return
        self.next = now + (0.2 if self.terminal else 5.0)
        left = int(now / done * (self.total - done))
        line = f"{self.unit} {done:,}/{self.total:,}  {text}  {left // 60}:{left % 60:02d} left"
        stay = self.terminal and done < self.total
        print("\r\x1b[K" * self.terminal + line, end="" if stay else "\n", flush=True)
