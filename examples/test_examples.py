"""The folder, the pairs and TRL's two trainers against this project's model, data and objective.

python -m pytest examples      (in an environment with examples/requirements.txt)
"""

# ruff: noqa: E402  the project's modules can be imported only after the path is set

import copy
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"
from tinygrad_lite import World, cosine_schedule, no_grad  # before NumPy, see there

for package in ("torch", "transformers", "trl", "safetensors", "datasets"):
    pytest.importorskip(package, reason=f"{package} of examples/requirements.txt is not installed")

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cli
import data
import dpo
import dpo_trl
import eval as evaluation
import online_dpo_trl
import sft
import to_hugging_face
import write_pairs
from transformer import Config, Transformer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
BETA = 0.8
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def caches_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model():
    """A small model, trained for long enough that some of its sums are right."""
    config = Config(len(data.VOCAB), d_model=16, n_layers=2, n_heads=2, d_hidden=32)
    new = Transformer(config)
    sft.train(World(), new, report_nothing, steps=400, batch_size=64, lr=1e-2, seed=0)
    return new


def report_nothing(*_):
    pass


@pytest.fixture(scope="module")
def policy(model):
    """The model with every weight moved, so that policy and reference differ."""
    rng = np.random.default_rng(1)
    new = Transformer(model.config)
    for old, parameter in zip(model.parameters(), new.parameters()):
        noise = 0.1 * old.data.std() * rng.standard_normal(old.shape)
        noise += 0.02 * rng.standard_normal(old.shape)  # the scales of norms may have no spread
        parameter.data = (old.data + noise).astype(np.float32)
    return new


@pytest.fixture(scope="module")
def paths(model, policy, tmp_path_factory):
    """Checkpoint and folders of the two, {"model.npz": path, "model": path, "policy": path}."""
    folder = tmp_path_factory.mktemp("folders")
    model.save(folder / "model.npz")
    to_hugging_face.export(policy, folder / "policy")
    to_hugging_face.main([str(folder / "model.npz"), str(folder / "model")])
    return {name: folder / name for name in ("model.npz", "model", "policy")}


def same_weights(a, b):
    """Whether two models have the same config and, to the bit, the same weights."""
    if a.config != b.config:
        return False
    for p, q in zip(a.parameters(), b.parameters()):
        if p.shape != q.shape or p.dtype != q.dtype or (p.data != q.data).any():
            return False
    return True


def check_trained(out, start):
    """The folder and the checkpoint that a script wrote are one model, and not the start."""
    folder = out.with_suffix("")
    trained = evaluation.load(out)
    assert same_weights(trained, to_hugging_face.from_hugging_face(folder))
    assert not same_weights(trained, to_hugging_face.from_hugging_face(start))
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == data.END


def pair_metrics(policy, reference, pairs):
    """What dpo.py logs of pairs, ids (P, 2, T)."""
    with no_grad():
        policy_logps = dpo.pair_logps(policy, pairs)
        reference_logps = dpo.pair_logps(reference, pairs)
    return dpo.pair_metrics(*policy_logps, *reference_logps, BETA)


def check_log(log, expected):
    """TRL has logged the same values under the same names."""
    for name, value in expected.items():
        assert log[name] == pytest.approx(value, rel=0, abs=1e-4), name


def rule_pairs(n, seed):
    """n pairs by rule, ids (n, 2, T)."""
    rng = np.random.default_rng(seed)
    return dpo.rule_pairs(None, 0, World(), rng, starts=[0, n], prefer=3)


# The folder.


def test_logits_agree(policy, paths):
    ids = data.random_lines(64, np.random.default_rng(2), data.TARGETS)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(paths["policy"])(torch.tensor(ids)).logits
    ours = policy(ids).numpy().T.reshape(theirs.shape)  # (V, B T) -> (B, T, V)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=0, atol=1e-4)


def test_greedy_answers_are_the_same_token_for_token(model, paths):
    tokens = AutoTokenizer.from_pretrained(paths["model"])
    llama = AutoModelForCausalLM.from_pretrained(paths["model"])
    batch = tokens([f"{target}=" for target in data.TARGETS], padding=True, return_tensors="pt")
    rows = llama.generate(**batch, do_sample=False, max_new_tokens=data.MAX_LEN - 2)
    theirs = []
    for row, mask in zip(rows.tolist(), batch["attention_mask"]):
        n_padding = int((mask == 0).sum())  # on the left
        line = row[n_padding:]
        if data.END in line:
            line = line[: line.index(data.END) + 1]
        theirs.append(line[: data.MAX_LEN])
    ours = evaluation.sample(model, data.TARGETS, temperature=0.0, rng=None)
    assert theirs == ours


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
    """This includes the scales of norms, which are not 1 here."""
    llama = AutoModelForCausalLM.from_pretrained(paths["policy"])
    llama.save_pretrained(tmp_path / "again")  # as transformers writes it
    for folder in (paths["policy"], tmp_path / "again"):
        to_hugging_face.from_hugging_face(folder).save(tmp_path / "back.npz")
        assert same_weights(evaluation.load(tmp_path / "back.npz"), policy)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
    ],
)
def test_a_folder_that_our_model_cannot_be_is_refused(field, value, paths, tmp_path):
    llama = AutoModelForCausalLM.from_pretrained(paths["policy"])
    setattr(llama.config, field, value)
    llama.save_pretrained(tmp_path / "other")
    with pytest.raises(cli.UserError, match=field):
        to_hugging_face.from_hugging_face(tmp_path / "other")


# The pairs.


def write(path, *flags):
    """Run write_pairs.py; read rows and columns of its file the way TRL would."""
    write_pairs.main([str(path), *flags])
    rows = datasets.load_dataset("json", data_files=str(path), split="train")
    return list(rows), set(rows.column_names)


def judge_text(prompt, completion, prefer=3):
    return data.judge(data.encode(prompt + completion) + [data.END], prefer)


def judge_row(row, prefer=3):
    """Judgements of the two answers in a row of the file; its target must be a training target."""
    chosen = judge_text(row["prompt"], row["chosen"], prefer)
    rejected = judge_text(row["prompt"], row["rejected"], prefer)
    assert row["prompt"] == f"{chosen.target}="
    assert chosen.target in data.TRAINING
    return chosen, rejected


def test_pairs_by_rule(tmp_path):
    flags = ["--pairs", "rule", "--n", "300", "--prefer", "4"]
    rows, columns = write(tmp_path / "rule.jsonl", *flags)
    assert len(rows) == 300
    assert columns == {"prompt", "chosen", "rejected"}
    for row in rows:
        chosen, rejected = judge_row(row, prefer=4)
        assert chosen.outcome == data.ACCEPTED
        assert rejected.exact and len(rejected.terms) in (2, 3, 5)


def test_sampled_pairs(paths, tmp_path):
    flags = ["--n", "20", "--checkpoint", str(paths["model.npz"])]
    rows, columns = write(tmp_path / "sampled.jsonl", *flags)
    assert len(rows) == 20
    assert columns == {"prompt", "chosen", "rejected"}
    for row in rows:
        chosen, rejected = judge_row(row)
        assert chosen.outcome == data.ACCEPTED
        assert rejected.outcome != data.ACCEPTED


def test_an_answer_without_an_end_token_makes_no_pair():
    accepted = data.encode("5=1+1+3") + [data.END]
    unfinished = data.encode("5=" + "1" * 22)
    unreadable = data.encode("5==") + [data.END]
    pairs = [[accepted, unfinished], [unfinished, accepted], [accepted, unreadable]]
    ids = np.array([data.pad(pair, data.MAX_LEN) for pair in pairs])
    rows = write_pairs.pair_rows(ids)
    assert rows == [{"prompt": "5=", "chosen": "1+1+3", "rejected": "="}]


def test_sft_lines(tmp_path):
    rows, columns = write(tmp_path / "lines.jsonl", "--sft", "--n", "200")
    assert len(rows) == 200
    assert columns == {"prompt", "completion"}
    for row in rows:
        line = judge_text(row["prompt"], row["completion"])
        assert line.exact
        assert line.target in data.TRAINING
        assert len(line.terms) in data.COUNTS


# DPOTrainer beside dpo.py.


def trl_and_pairs(paths, out, n, batch_size, **more):
    """TRL's trainer without shuffling, and the same n pairs as ids (n, 2, T)."""
    pairs = rule_pairs(n, seed=4)
    rows = datasets.Dataset.from_list(write_pairs.pair_rows(pairs))
    config = dpo_trl.configuration(out / "run", BETA, 2e-3, batch_size, logging_steps=1, **more)
    run = dpo_trl.trainer(paths["policy"], paths["model"], rows, config)
    run._get_train_sampler = torch.utils.data.SequentialSampler  # TRL shuffles otherwise
    return run, pairs


def test_the_first_step_is_ours(policy, model, paths, tmp_path):
    run, pairs = trl_and_pairs(paths, tmp_path, n=256, batch_size=256, max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    lines = np.concatenate([pairs[:, 0], pairs[:, 1]])  # chosen, then rejected
    lines = lines[:, : data.lengths(lines).max()]
    np.testing.assert_array_equal(batch["input_ids"], lines)  # one end token each, same padding
    np.testing.assert_array_equal(batch["completion_mask"], data.completion_mask(lines))
    run.train()
    ours = pair_metrics(policy, model, pairs)
    assert abs(ours["rewards/margins"]) > 0.01
    assert 0.1 < ours["rewards/accuracies"] < 0.9
    check_log(run.state.log_history[0], ours)


def test_ten_steps_are_ours(policy, model, paths, tmp_path):
    """Loss, margin and weights of dpo.train, with clipping; only TRL's warm-up starts at 0."""
    run, pairs = trl_and_pairs(paths, tmp_path, n=160, batch_size=16)
    optimizer = run.create_optimizer()
    run.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_schedule(step, 10, 1.0, warmup=10)
    )
    run.train()
    run.save_model()

    batches = np.split(pairs, 10)

    def next_batch(policy, step, world, rng):
        return batches[step]

    trained = copy.deepcopy(policy)
    history = dpo.train(
        World(), trained, model, next_batch, report_nothing, rounds=10, beta=BETA, lr=2e-3, seed=0
    )
    ours = history[1:]  # without the row from before the first step
    theirs = run.state.log_history[:10]
    for name in ("loss", "rewards/margins"):
        our_values = [row[name] for row in ours]
        their_values = [row[name] for row in theirs]
        np.testing.assert_allclose(their_values, our_values, rtol=0, atol=1e-5)
    before, after = (pair_metrics(each, model, pairs)["loss"] for each in (policy, trained))
    assert after < before - 0.05  # the ten steps have changed something
    their_model = to_hugging_face.from_hugging_face(tmp_path / "run")
    for p, q in zip(their_model.parameters(), trained.parameters()):
        np.testing.assert_allclose(p.data, q.data, rtol=0, atol=1e-5)  # found: 6e-8


def test_the_script_trains_and_writes_both(paths, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    out = tmp_path / "out.npz"
    write_pairs.main([str(pairs), "--pairs", "rule", "--n", "24"])
    dpo_trl.main([str(paths["model"]), str(pairs), "--batch-size", "8", "--out", str(out)])
    check_trained(out, paths["model"])
    assert "24 rows of data, processes: 1\nstep 1/3  loss 0.693" in capsys.readouterr().out


# OnlineDPOTrainer beside dpo.py.


def online(paths, out):
    """The trainer of one step on 2,048 prompts."""
    config = online_dpo_trl.configuration(out / "run", BETA, 1e-3, 2048)
    return online_dpo_trl.trainer(paths["policy"], paths["model"], 2048, config)


def sampled_pairs(run):
    """The pairs of the last step as ids (P, 2, T), the accepted answer first.

    The two answers must be to one prompt, and exactly one of them accepted; or, for a missing pair,
    they must be the same.
    """
    prompts, prompt_masks, answers, answer_masks, _ = run.sampled
    lines = []
    for prompt, prompt_mask, answer, answer_mask in zip(
        prompts, prompt_masks.bool(), answers, answer_masks.bool()
    ):
        lines.append(torch.cat([prompt[prompt_mask], answer[answer_mask]]).tolist())
    n = len(lines) // 2  # the first answers, then the second ones
    pairs = []
    for first, second in zip(lines[:n], lines[n:]):
        assert first[: first.index(data.EQUALS)] == second[: second.index(data.EQUALS)]
        if data.is_accepted(first):
            pair = [first, second]
        else:
            pair = [second, first]
        if first != second:
            assert data.is_accepted(pair[0]) and not data.is_accepted(pair[1])
        pairs.append(data.pad(pair, data.MAX_LEN))
    return np.array(pairs)


@pytest.mark.parametrize("missing", [0, 3])
def test_a_step_is_ours_on_the_pairs_that_it_samples(missing, policy, model, paths, tmp_path):
    """Also where another process has `missing` pairs more."""
    run = online(paths, tmp_path)

    def gather(x):
        if x.is_floating_point():
            return x
        return torch.cat([x, x + missing])  # the numbers of pairs of two processes

    run.accelerator.gather = gather
    run.train()
    sampling = run.generation_config
    assert sampling.do_sample
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    pairs = sampled_pairs(run)
    log = run.state.log_history[0]
    n_real = len(pairs) - missing
    assert 3 < n_real < 2048
    assert log["pairs"] == 2 * n_real + missing
    differs = (pairs[:, 0] != pairs[:, 1]).any(axis=1)
    assert differs[:n_real].all()
    assert not differs[n_real:].any()
    expected = pair_metrics(policy, model, pairs)
    if missing:  # whether an answer has a higher reward than itself is decided by rounding
        del expected["rewards/accuracies"]
    check_log(log, expected)


def test_answers_that_are_judged_alike_teach_nothing(paths, tmp_path):
    run = online(paths, tmp_path)

    def reject_all(prompts, **_):
        return [0.0] * len(prompts)

    run.reward_funcs = [reject_all]
    run.train()
    log = run.state.log_history[0]
    assert log["pairs"] == 0
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log["grad_norm"] < 1e-6


def test_the_judge_is_ours():
    rewards = {
        "1+2+3": 1.0,
        "3+3": 0.0,  # not preferred
        "1+2+4": 0.0,  # a wrong sum
        "1++2": 0.0,  # does not parse
    }
    completions = [data.encode(answer) + [data.END] for answer in rewards]
    completions.append(data.encode("1+2+3"))  # without an end token
    completions.append(data.encode("1+2+3") + [data.PAD, data.END])  # with a pad token inside
    ids = data.pad(completions, 20).tolist()
    found = online_dpo_trl.right_and_preferred(["6="] * len(ids), ids)
    assert found == [*rewards.values(), 0.0, 0.0]


def test_three_steps_of_the_online_script(paths, tmp_path, capsys):
    out = tmp_path / "out.npz"
    flags = ["--rounds", "3", "--prompts", "512", "--lr", "0.01", "--out", str(out)]
    online_dpo_trl.main([str(paths["model"]), *flags])
    check_trained(out, paths["model"])
    assert re.search(
        r"1,536 rows of data, processes: 1\nstep 1/3  [1-9]\d* pairs  loss 0.693",
        capsys.readouterr().out,
    )


# Mistakes.


@pytest.fixture
def files(model, paths, tmp_path, monkeypatch):
    """What the mistakes are about, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(write_pairs, "PATIENCE", 2)
    os.symlink(paths["model"], "model")
    os.symlink(paths["model.npz"], "model.npz")
    os.symlink("model.npz", "link.jsonl")
    Transformer(model.config).save(Path("untrained.npz"))
    to_hugging_face.export(model, Path("broken"))
    Path("broken/model.safetensors").write_bytes(b"no weights")
    Path("a-file").write_bytes(b"\x00\xff{not json\n")
    Path("empty.jsonl").touch()
    contents = {
        "null.jsonl": None,
        "sft.jsonl": {"prompt": "5=", "completion": "2+3"},
        "letters.jsonl": {"prompt": "5=", "chosen": "two+3", "rejected": "5"},
        "pairs.jsonl": {"prompt": "5=", "chosen": "1+2+2", "rejected": "2+3"},
    }
    for name, row in contents.items():
        Path(name).write_text(json.dumps(row) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "script, flags, hint",
    [
        ("to_hugging_face", "absent.npz folder", "absent.npz"),
        ("to_hugging_face", "model.npz a-file", "exists"),
        ("to_hugging_face", "model.npz", "FOLDER"),
        ("write_pairs", "out.jsonl --checkpoint absent.npz", "absent.npz"),
        ("write_pairs", "out.jsonl --sft --pairs rule", "not allowed"),
        ("write_pairs", "out.jsonl --n 0", "from 1"),
        ("write_pairs", "out.jsonl --n 2 --checkpoint untrained.npz", "no pair in 2 rounds"),
        ("write_pairs", ". --pairs rule --n 2", "is a folder"),
        ("write_pairs", "model.npz --checkpoint model.npz", "name a .jsonl"),
        ("write_pairs", "link.jsonl --pairs rule", "name a .jsonl"),
        ("write_pairs", "pairs.jsonl --checkpoint pairs.jsonl", "name a .jsonl"),
        ("dpo_trl", "absent pairs.jsonl", "no config.json in absent"),
        ("dpo_trl", "broken pairs.jsonl", "SafetensorError"),
        ("dpo_trl", "model absent.jsonl", "absent.jsonl"),
        ("dpo_trl", "model sft.jsonl", "needs the texts"),
        ("dpo_trl", "model letters.jsonl", "not in the vocabulary"),
        ("dpo_trl", "model a-file", "line 1 is no pair"),
        ("dpo_trl", "model empty.jsonl", "is empty"),
        ("dpo_trl", "model null.jsonl", "needs the texts"),
        ("dpo_trl", "model .", "directory"),
        ("dpo_trl", "model pairs.jsonl --beta 0", "above 0"),
        ("dpo_trl", "model pairs.jsonl --out model.npz", "overwrite model"),
        ("online_dpo_trl", "broken", "SafetensorError"),
        ("online_dpo_trl", "model --out a-file", "a .npz file"),
        ("online_dpo_trl", "model --out model.npz", "overwrite model"),
    ],
)
def test_a_mistake_is_one_line(script, flags, hint, files, paths, capsys):
    before = paths["model.npz"].read_bytes()
    try:
        sys.modules[script].main(flags.split())
        pytest.fail("no mistake")
    except SystemExit as stop:  # argparse has printed its line
        assert stop.code == 2
        message = capsys.readouterr().err.rstrip("\n")
    except (cli.UserError, OSError) as error:  # cli.run makes one line of it
        message = str(error)
    assert hint in message
    assert "\n" not in message
    assert paths["model.npz"].read_bytes() == before


def test_a_batch_that_does_not_divide_is_refused(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(cli.UserError, match="a batch of 64 does not divide into 3 processes"):
        online_dpo_trl.main(["model", "--prompts", "64"])
