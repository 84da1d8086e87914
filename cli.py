"""What the programs share: one-line errors, flags, progress, files that are never half-written."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path


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
    for stream, text in (sys.stdout, ""), (sys.stderr, message):
        try:
            print(text, end="\n" if text else "", file=stream, flush=True)
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


def show_progress(unit, done, total, started, text):
    """Print how far a run is that began at perf_counter() `started`, and the seconds left."""
    left = (time.perf_counter() - started) / done * (total - done)
    print(f"{unit} {done:,}/{total:,}  {text}  {left:.0f} s left", flush=True)


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
