"""Faults that really happen, in a process of their own: nothing is lost, no traceback is shown."""
import json
import subprocess
import sys

import numpy as np
import pytest

import data
from helpers import flip
from test_cli import ROOT, TINY
from transformer import Config, Transformer

# Runs a program of the project; the named function sends the process Ctrl-C when it is called.
INTERRUPTED = """
import importlib, os, signal, sys
sys.path.insert(0, sys.argv[1])
import tinygrad_lite, cli
module, name = sys.argv[3].split(":")
module = importlib.import_module(module)
function = getattr(module, name)
def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return function(*args, **kwargs)
setattr(module, name, interrupted)
sys.exit(cli.main(sys.argv[2], sys.argv[4:]))
"""


def interrupt(program, place, *flags, code=INTERRUPTED):
    return subprocess.run([sys.executable, "-c", code, ROOT, program, place,
                           *map(str, flags)], capture_output=True, text=True, timeout=60)


@pytest.fixture
def earlier(tmp_path):
    """The checkpoint of an earlier run, and its bytes."""
    path = tmp_path / "earlier.npz"
    Transformer(Config(len(data.VOCAB), 8, 1, 2, 8, data.MAX_LEN)).save(path)
    return path, path.read_bytes()


PLACES = {"making lines": "data:random_lines", "a training step": "sft:clip_grad_norm",
          "sampling": "transformer:_choose", "writing arrays": "numpy:savez",
          "flushing the file": "os:fsync", "just before the file takes its place": "os:replace"}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_ctrl_c_anywhere_in_sft(earlier, place):
    path, content = earlier
    result = interrupt("sft", place, *TINY, "--steps", 3, "--out", path)
    assert result.returncode == 130
    saved = path.read_bytes()
    if saved == content:
        assert result.stderr == f"stopped; {path} is as it was\n"
    else:  # the signal was handled only once the new file had taken its place
        assert place == "os:replace" and result.stderr == f"stopped; {path} is saved\n"
        Transformer.load(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("place", ["dpo:rule_pairs", "dpo:clip_grad_norm", "transformer:_choose",
                                   "numpy:savez"])
def test_ctrl_c_anywhere_in_dpo(earlier, place):
    path, content = earlier
    out = path.with_name("dpo.npz")
    result = interrupt("dpo", place, "--pairs", "rule", "--rounds", 2, "--prompts", 4,
                       "--threads", 1, "--sft", path, "--out", out)
    assert (result.returncode, result.stderr) == (130, f"stopped; {out} was not written\n")
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_ctrl_c_in_eval(earlier):
    path, content = earlier
    result = interrupt("eval", "transformer:_choose", path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "stopped\n")
    assert path.read_bytes() == content


@pytest.mark.parametrize("flags", [["--json"], ["--prompt", 77], ["--help"]])
def test_a_reader_of_eval_that_has_read_enough(earlier, flags):
    path, _ = earlier
    command = " ".join(map(str, [sys.executable, ROOT / "eval.py", path, "--samples", 2, *flags]))
    result = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True,
                            timeout=60)
    assert result.stdout.count("\n") == 1 and result.stderr == ""


def test_a_thousand_flipped_bits(earlier, tmp_path):
    """Each alone: an error of one kind, or weights that are still those that were saved."""
    path, content = earlier
    expected = {name: p.data for name, p in Transformer.load(path).named_parameters().items()}
    damaged, refused = tmp_path / "damaged.npz", 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 1000):
        damaged.write_bytes(flip(content, bit))
        try:
            model = Transformer.load(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            refused += 1
        else:
            for name, p in model.named_parameters().items():
                assert np.array_equal(p.data, expected[name])
    assert refused > 500


def test_a_json_that_cannot_be_written_leaves_checkpoint_and_earlier_json(earlier):
    """Each file is whole: the full disk comes between the checkpoint and its facts."""
    path, _ = earlier
    facts = path.with_suffix(".json")
    facts.write_text('{"an earlier": "run"}')
    code = INTERRUPTED.replace("os.kill(os.getpid(), signal.SIGINT)",
                               "raise OSError(28, 'No space left on device', str(args[0]))")
    result = interrupt("sft", "sft:write_json", *TINY, "--steps", 3, "--out", path, code=code)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.endswith(f"No space left on device; {path} is saved\n")
    Transformer.load(path)
    assert json.loads(facts.read_text()) == {"an earlier": "run"}
