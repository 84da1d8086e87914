"""What the programs share: one-line errors, flags, progress, files that are never half-written."""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path


CLEAR = "\r\x1b[K"  # moves a terminal to the start of its line, and erases that


class UserError(ValueError):
    """A mistake that one line can explain. `run` prints that line, without a traceback."""


def run(main):
    """Run a program's main(). Exit with 2 after one line about a mistake, with 130 after Ctrl-C,
    and with 1 when nobody reads the output any more (as in `| head -1`)."""
    try:
        main()
        print(end="", flush=True)  # so that an error of the last write is caught here
        return
    except BrokenPipeError:
        code, message = 1, ""
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except (EOFError, ConnectionResetError):  # from parallel.py
        code, message = 2, "another process of this run was killed; was there too little memory?"
    except (UserError, OSError, MemoryError) as error:
        text = " ".join(str(error).split()) or "not enough memory"
        code, message = 2, f"{Path(sys.argv[0]).name}: {text}"
    # If a stream cannot be written, Python would try again as it exits, complain, and change the
    # exit code: so what is left in the stream goes nowhere.
    clear = CLEAR if is_terminal(sys.stdout) else ""
    for stream, text in (sys.stdout, clear), (sys.stderr, f"{message}\n" if message else ""):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse, with UserError for a mistake."""

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def flag_type(convert, fits, wanted):
    """The type of a flag: convert(text), if that gives a value that `fits`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = convert(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text[:50]!r}")

    return parse


def whole(low, high=2**31):
    return flag_type(int, lambda n: low <= n <= high, f"a whole number from {low} to {high}")


positive = flag_type(float, lambda x: 0 < x < 1e30, "above 0 and below 1e30")
seed = whole(0, 2**63 - 1)
checkpoint_path = flag_type(Path, lambda p: p.suffix == ".npz" and not p.is_dir(), "a .npz file")


class Progress:
    """Says how far a run is, and how many seconds are left.

    On a terminal this is a bar that is updated in place; a line stays for each tenth of the run.
    Elsewhere, in a file or a notebook, it is forty plain lines, the first one after two seconds.
    """

    def __init__(self, unit, total):
        self.unit, self.total = unit, total
        self.on_terminal = is_terminal(sys.stdout)
        self.start = None  # seconds and fraction of the first report: what came before is no guide
        self.next_line = None  # in seconds

    def show(self, done, fraction, text, example=lambda: ""):
        """Report after each of `total` steps: `fraction` of the work is done.

        text: the latest numbers. example(): more text for the lines that stay on a terminal.
        """
        now = time.perf_counter()
        if self.start is None:
            self.start = now, fraction
            self.next_line = now + (1 if self.on_terminal else 2)
        seconds, work = now - self.start[0], fraction - self.start[1]
        left = f"{seconds / work * (1 - fraction):.0f}" if work else "?"
        place = f"{self.unit} {done:,}/{self.total:,}"
        if not self.on_terminal:
            if now > self.next_line or is_due(done, self.total, times=40):
                self.next_line = math.inf
                print(f"{place}  {text}  {left} s left", flush=True)
            return
        if is_due(done, self.total, times=10):
            print(f"{CLEAR}{place}  {text}  {example()}", flush=True)
        if now > self.next_line:
            self.next_line = now + 0.1
            bar = "#" * round(20 * fraction)
            print(f"{CLEAR}{place}  [{bar:.<20}]  {left} s left", end="", flush=True)

    def end(self):
        """Clear the bar: a run may end before its last step."""
        if self.on_terminal:
            print(CLEAR, end="", flush=True)


def is_terminal(stream):
    return hasattr(stream, "isatty") and stream.isatty()


def is_due(done, total, times):
    """Whether to report after step `done`: so many times in a run, the last time at its end."""
    return done * times // total > (done - 1) * times // total


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that takes its place at `path` only once it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        if path.exists():
            shutil.copymode(path, part)  # who may read it stays as it was
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, facts):
    """A dict as a JSON file; paths in it become text."""
    with atomic_write(path) as file:
        file.write(json.dumps(facts, indent=1, default=os.fspath).encode())


def output_files(path, *endings):
    """`path` and the files with these endings beside it: runs/dpo.npz -> runs/dpo-dist.png.

    Raises UserError if they cannot be written, before minutes of training.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another name") from None
    return [path, *(path.with_name(path.stem + ending) for ending in endings)]
