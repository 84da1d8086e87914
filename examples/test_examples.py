"""The folder, the pairs and TRL's DPO against this project's model, data and objective.

    python -m pytest examples      (in an environment with examples/requirements.txt)
"""
import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import tinygrad_lite  # noqa: E402, F401  before NumPy, for the number of BLAS threads

os.environ["HF_HUB_OFFLINE"] = "1"
for package in ("torch", "transformers", "trl", "safetensors", "datasets"):
    pytest.importorskip(package, reason=f"{package} of examples/requirements.txt is not installed")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import cli  # noqa: E402
import data  # noqa: E402
import dpo  # noqa: E402
import dpo_trl  # noqa: E402
import eval as evaluation  # noqa: E402
import sft  # noqa: E402
import to_hugging_face  # noqa: E402
import write_pairs  # noqa: E402
from tinygrad_lite import Adam, no_grad  # noqa: E402
from transformer import Config, Transformer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
BETA = 0.8
torch.set_num_threads(1)
dpo_trl.hush()


@pytest.fixture(scope="module", autouse=True)
def caches_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        for module in (to_hugging_face, write_pairs, dpo_trl):
            patch.setitem(cli.PARSERS, module.__name__, module.parser)
        yield


@pytest.fixture(scope="module")
def model():
    """A small model, trained for long enough that some of its sums are right."""
    new = Transformer(Config(len(data.VOCAB), 16, 2, 2, 32, data.MAX_LEN))
    for _ in sft.train(new, 200, 64, 1e-2, np.random.default_rng(0), map):
        pass
    return new


@pytest.fixture(scope="module")
def policy(model):
    """The model with every weight moved, so that policy and reference differ."""
    new, rng = Transformer(model.config), np.random.default_rng(1)
    for old, parameter in zip(model.parameters(), new.parameters()):
        moved = old.data + 0.1 * old.data.std() * rng.standard_normal(old.shape)
        parameter.data = (moved + 0.02 * rng.standard_normal(old.shape)).astype(np.float32)
    return new


@pytest.fixture(scope="module")
def paths(model, policy, tmp_path_factory):
    """Checkpoints and folders of the two, {"model.npz": path, "model": path, "policy": path}."""
    at = tmp_path_factory.mktemp("folders")
    model.save(at / "model.npz")
    to_hugging_face.export(policy, at / "policy")
    assert cli.main("to_hugging_face", [str(at / "model.npz"), str(at / "model")]) == 0
    return {name: at / name for name in ("model.npz", "model", "policy")}


def same_weights(a, b):
    return a.config == b.config and all(
        (p.data == q.data).all() and p.data.dtype == q.data.dtype and p.data.shape == q.data.shape
        for p, q in zip(a.parameters(), b.parameters()))


# The folder.

def test_logits_agree(policy, paths):
    ids = data.random_lines(64, np.random.default_rng(2), data.TARGETS)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(paths["policy"])(torch.tensor(ids)).logits
    np.testing.assert_allclose(theirs.numpy(), policy(ids).numpy(), rtol=0, atol=1e-4)


def test_greedy_answers_are_the_same_token_for_token(model, paths):
    tokens = AutoTokenizer.from_pretrained(paths["model"])
    llama = AutoModelForCausalLM.from_pretrained(paths["model"])
    batch = tokens([f"{target}=" for target in data.TARGETS], padding=True, return_tensors="pt")
    rows = llama.generate(**batch, do_sample=False, max_new_tokens=data.MAX_LEN - 2).tolist()
    theirs = []
    for row, padding in zip(rows, (batch["attention_mask"] == 0).sum(dim=1).tolist()):
        row = row[padding:]
        end = row.index(data.END) + 1 if data.END in row else len(row)
        theirs.append(row[:end][:data.MAX_LEN])
    assert theirs == evaluation.sample(model, list(data.TARGETS), 0.0, np.random.default_rng(0))


def test_the_tokenizer_is_data_py(paths):
    tokens = AutoTokenizer.from_pretrained(paths["model"])
    assert (tokens.eos_token_id, tokens.pad_token_id) == (data.END, data.PAD)
    assert tokens.bos_token_id is None
    assert len(tokens) == len(data.VOCAB)
    assert tokens.convert_ids_to_tokens(range(len(data.VOCAB))) == data.VOCAB
    for ids in data.random_lines(200, np.random.default_rng(3), data.TARGETS):
        text = data.decode(ids)
        assert tokens(text)["input_ids"] == data.encode(text)
        assert tokens.decode(data.encode(text)) == text
        assert tokens.decode(ids, skip_special_tokens=True) == text
        assert tokens(text + tokens.eos_token)["input_ids"] == data.encode(text) + [data.END]
    assert tokens("")["input_ids"] == []


@pytest.mark.parametrize("text", ["5 = 2+3", "x", "\n", "5=2+3\u00e9", "<unk>"])
def test_the_tokenizer_refuses_what_data_py_refuses(text, paths):
    tokens = AutoTokenizer.from_pretrained(paths["model"])
    with pytest.raises(ValueError):
        data.encode(text)
    with pytest.raises(Exception, match="vocabulary"):
        tokens(text)


def test_a_folder_comes_back_to_the_bit(policy, paths, tmp_path):
    llama = AutoModelForCausalLM.from_pretrained(paths["policy"])
    llama.save_pretrained(tmp_path / "again")  # as transformers writes it
    for folder in (paths["policy"], tmp_path / "again"):
        to_hugging_face.from_hugging_face(folder).save(tmp_path / "back.npz")
        assert same_weights(evaluation.load(tmp_path / "back.npz"), policy)


@pytest.mark.parametrize("field, value", [
    ("rms_norm_eps", 1e-5), ("hidden_act", "gelu"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0})])
def test_a_folder_that_our_model_cannot_be_is_refused(field, value, paths, tmp_path):
    llama = AutoModelForCausalLM.from_pretrained(paths["policy"])
    setattr(llama.config, field, value)
    llama.save_pretrained(tmp_path / "other")
    with pytest.raises(cli.UserError, match=field):
        to_hugging_face.from_hugging_face(tmp_path / "other")


# The pairs.

def load(path):
    return datasets.load_dataset("json", data_files=str(path), split="train")


def judged(prompt, completion):
    """(target, sum, number of terms) of an answer, or None if it does not parse."""
    parsed = data.parse(prompt + completion)
    return parsed and (parsed[0], sum(parsed[1]), len(parsed[1]))


def test_pairs_by_rule(tmp_path):
    path = tmp_path / "rule.jsonl"
    flags = [str(path), "--pairs", "rule", "--n", "300", "--prefer", "4"]
    assert cli.main("write_pairs", flags) == 0
    rows = load(path)
    assert (len(rows), set(rows.column_names)) == (300, {"prompt", "chosen", "rejected"})
    for row in rows:
        target = int(row["prompt"][:-1])
        assert target in data.TRAINING and row["prompt"] == f"{target}="
        assert judged(row["prompt"], row["chosen"]) == (target, target, 4)
        total, terms = judged(row["prompt"], row["rejected"])[1:]
        assert total == target and terms in (2, 3, 5)


def test_sampled_pairs(paths, tmp_path):
    path = tmp_path / "sampled.jsonl"
    assert cli.main("write_pairs", [str(path), "--n", "20", "--threads", "1",
                                    "--checkpoint", str(paths["model.npz"])]) == 0
    rows = load(path)
    assert (len(rows), set(rows.column_names)) == (20, {"prompt", "chosen", "rejected"})
    for row in rows:
        target = int(row["prompt"][:-1])
        assert target in data.TRAINING and row["prompt"] == f"{target}="
        assert judged(row["prompt"], row["chosen"]) == (target, target, 3)
        assert judged(row["prompt"], row["rejected"]) != (target, target, 3)


def test_an_answer_without_an_end_token_makes_no_pair():
    good, open_end = data.encode("5=1+1+3") + [data.END], data.encode("5=" + "1" * 22)
    both = data.pad([good, good, open_end, data.encode("5==") + [data.END]])
    assert list(write_pairs.pair_rows(both[:2], both[2:])) == [
        {"prompt": "5=", "chosen": "1+1+3", "rejected": "="}]


def test_sft_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert cli.main("write_pairs", [str(path), "--sft", "--n", "200"]) == 0
    rows = load(path)
    assert (len(rows), set(rows.column_names)) == (200, {"prompt", "completion"})
    for row in rows:
        target, total, terms = judged(row["prompt"], row["completion"])
        assert total == target in data.TRAINING and terms in range(2, 6)


# TRL's DPO beside ours.

def trl_and_pairs(paths, out, n, batch_size, lr, **more):
    """TRL's trainer without clipping, schedule or shuffling, and the same n pairs as our ids."""
    chosen, rejected = dpo.rule_pairs(n, 3, np.random.default_rng(4))
    write_pairs.write(out / "pairs.jsonl", write_pairs.pair_rows(chosen, rejected))
    config = dpo_trl.configuration(
        out / "run", BETA, lr, batch_size, adam_beta2=0.999, max_grad_norm=0.0,
        lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, **more)
    pairs = dpo_trl.read_pairs(out / "pairs.jsonl")
    run = dpo_trl.trainer(paths["policy"], paths["model"], pairs, config)
    run._get_train_sampler = torch.utils.data.SequentialSampler  # TRL shuffles otherwise
    return run, chosen, rejected


def our_logs(policy, reference, chosen, rejected):
    """(loss, a Tensor; {name: value} as dpo.py logs them) of a batch of pairs."""
    with no_grad():
        frozen = [sft.completion_logps(reference, ids) for ids in (chosen, rejected)]
    logps = [sft.completion_logps(policy, ids) for ids in (chosen, rejected)]
    loss = dpo.dpo_loss(*logps, *frozen, BETA)
    return loss, dpo.rewards(*(t.numpy() for t in logps + frozen), BETA)


def test_the_first_step_is_ours(policy, model, paths, tmp_path):
    run, chosen, rejected = trl_and_pairs(paths, tmp_path, 256, 256, 1e-3, max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    both = np.concatenate([chosen, rejected])
    np.testing.assert_array_equal(batch["input_ids"], both)  # one end token each, padded alike
    np.testing.assert_array_equal(batch["completion_mask"], data.completion_mask(both))
    run.train()
    theirs = run.state.log_history[0]
    loss, ours = our_logs(policy, model, chosen, rejected)
    assert abs(ours["rewards/margins"]) > 0.01 and 0.1 < ours["rewards/accuracies"] < 0.9
    for name, value in {"loss": loss.item(), **ours}.items():
        assert theirs[name] == pytest.approx(value, rel=0, abs=1e-4), name


def test_ten_steps_of_adam_are_ours(policy, model, paths, tmp_path):
    run, chosen, rejected = trl_and_pairs(paths, tmp_path, 160, 16, 2e-3, num_train_epochs=1)
    run.train()
    run.save_model()
    trained = Transformer(policy.config)
    for old, new in zip(policy.parameters(), trained.parameters()):
        new.data = old.data.copy()
    optimizer, ours = Adam(trained.parameters(), 2e-3, betas=(0.9, 0.999), eps=1e-8), []
    for start in range(0, 160, 16):
        batch = [ids[start:start + 16] for ids in (chosen, rejected)]
        loss, logs = our_logs(trained, model, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.append([loss.item(), logs["rewards/margins"]])
    theirs = [[row["loss"], row["rewards/margins"]] for row in run.state.log_history[:10]]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)  # found: 1e-6
    assert ours[9][0] < ours[0][0] - 0.1  # the ten steps have changed something
    back = to_hugging_face.from_hugging_face(tmp_path / "run")
    for p, q in zip(back.parameters(), trained.parameters()):
        np.testing.assert_allclose(p.data, q.data, rtol=0, atol=1e-3)


def test_the_script_trains_and_writes_both(paths, tmp_path, capsys):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out.npz"
    made = dpo.rule_pairs(16, 3, np.random.default_rng(5))
    write_pairs.write(pairs, write_pairs.pair_rows(*made))
    flags = [str(pairs), "--batch-size", "8", "--out", str(out), "--reference", str(paths["model"])]
    for start in (paths["model"], tmp_path / "out"):  # the second round reads where it writes
        assert cli.main("dpo_trl", [str(start), *flags]) == 0
        back = evaluation.load(out)
        assert same_weights(back, to_hugging_face.from_hugging_face(tmp_path / "out"))
        assert not same_weights(back, to_hugging_face.from_hugging_face(paths["model"]))
        assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == data.END
    assert re.search(r"step 1/2  loss 0\.693", capsys.readouterr().out)


# Mistakes.

def lines_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("arguments", [
    "to_hugging_face absent.npz folder",
    "to_hugging_face model.npz a-file",
    "to_hugging_face model.npz",
    "write_pairs out.jsonl --checkpoint absent.npz",
    "write_pairs out.jsonl --sft --pairs rule",
    "write_pairs out.jsonl --n 0",
    "write_pairs out.jsonl --n 2 --checkpoint untrained.npz",
    "write_pairs . --pairs rule --n 2",
    "dpo_trl absent pairs.jsonl",
    "dpo_trl broken pairs.jsonl",
    "dpo_trl model absent.jsonl",
    "dpo_trl model sft.jsonl",
    "dpo_trl model letters.jsonl",
    "dpo_trl model a-file",
    "dpo_trl model empty.jsonl",
    "dpo_trl model null.jsonl",
    "dpo_trl model .",
    "dpo_trl model pairs.jsonl --beta 0",
    "dpo_trl model pairs.jsonl --reference absent",
])
def test_a_mistake_is_one_line(arguments, model, paths, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dpo, "PATIENCE", 2)
    os.symlink(paths["model"], "model")
    os.symlink(paths["model.npz"], "model.npz")
    Transformer(model.config).save("untrained.npz")
    to_hugging_face.export(Transformer(model.config), "broken")
    Path("broken/model.safetensors").write_bytes(b"no weights")
    Path("a-file").write_bytes(b"\x00\xff{not json\n")
    Path("empty.jsonl").touch()
    lines_of(Path("null.jsonl"), None)
    lines_of(Path("sft.jsonl"), {"prompt": "5=", "completion": "2+3"})
    lines_of(Path("letters.jsonl"), {"prompt": "5=", "chosen": "two+3", "rejected": "5"})
    lines_of(Path("pairs.jsonl"), {"prompt": "5=", "chosen": "1+2+2", "rejected": "2+3"})
    program, *flags = arguments.split()
    try:
        code = cli.main(program, flags)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and len(said) == 1 and program in said[0], said
