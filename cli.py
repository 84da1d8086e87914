"""What the programs share: one-line errors, flags, progress, files that are never half-written."""
import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import tinygrad_lite  # noqa: F401  before NumPy, for the number of BLAS threads
import numpy as np

_unfinished = set()  # files that are being written


class UserError(ValueError):
    """A mistake that one line can explain: printed on stderr, exit code 2, no traceback."""


def run(main):
    """Run a program's main() and exit: 0, or 2 after one line about a mistake, 130 after Ctrl-C, 1
    when nobody reads standard output to its end."""
    signal.signal(signal.SIGINT, _stop)
    os.environ.pop("MPLBACKEND", None)  # a notebook's; pictures go to files
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it is None after `>&-`
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold anything
    np.seterr(all="ignore")  # the loops look at the loss
    code = 0
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # also after --help
    except BrokenPipeError:  # `| head -1` has read enough
        code = 1
    except (UserError, OSError, MemoryError) as error:
        full = isinstance(error, MemoryError)
        code, message = 2, "not enough memory; choose smaller sizes" if full else str(error)
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    if code:  # what could not be printed must not be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C would kill Python on its way out
    sys.exit(code)


def _stop(*_):
    """Ctrl-C ends the program at once; an exception could get lost in a callback, or abort C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for process in multiprocessing.active_children():
        process.kill()
    for part in filter(os.path.exists, list(_unfinished)):  # False, too, if the name is too long
        part.unlink(missing_ok=True)
    os.write(2, b"stopped\n")
    os._exit(130)


class Parser(argparse.ArgumentParser):
    """argparse, with every default in --help, and UserError for a mistake."""
    def __init__(self, description):
        super().__init__(sys.argv[0], description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def flag_type(convert, fits, wanted):
    """The type of a flag: convert(text), which raises ValueError or gives a value that `fits`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text[:50]!r}")
    return parse


def whole(low, high=2 ** 31):
    return flag_type(int, lambda n: low <= n <= high, f"a whole number from {low} to {high}")


positive = flag_type(float, lambda x: 0 < x < 1e30, "above 0 and below 1e30")
checkpoint_path = flag_type(Path, lambda path: path.suffix == ".npz", "a file name ending in .npz")


def show_progress(unit, done, total, started, text):
    """Print how far a run is that began at perf_counter() `started`, and the seconds left."""
    left = (time.perf_counter() - started) / done * (total - done)
    print(f"{unit} {done:,}/{total:,}  {text}  {left:.0f} s left", flush=True)


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that takes its place at `path` only once it is complete."""
    path = Path(os.path.realpath(path))  # a symbolic link stays, and leads to the new file
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    _unfinished.add(part)
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        _unfinished.discard(part)


def write_json(path, **facts):
    """`facts` as a JSON file; paths become text."""
    with atomic_write(path) as file:
        file.write(json.dumps(facts, indent=1, default=os.fspath).encode())


def outputs(path, *endings):
    """The files with these endings beside `path`, runs/dpo.npz -> runs/dpo-dist.png. Raises
    UserError where one of them, or `path`, cannot be written: before minutes of training."""
    files = [path, *(path.with_name(path.stem + ending) for ending in endings)]
    for file in files:
        try:
            if file.exists() and not file.is_file():
                raise UserError(f"{file} is not a regular file; choose another name")
            with contextlib.suppress(LookupError), atomic_write(file):
                raise LookupError  # begun as it will be later, and given up
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}; choose another name") from None
    return files[1:]
