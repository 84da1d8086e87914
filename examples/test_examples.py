"""The folder, the pairs and TRL's two trainers against this project's model, data and objective.

python -m pytest examples      (in an environment with examples/requirements.txt)
"""

import json
import math
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
import online_dpo_trl  # noqa: E402
import sft  # noqa: E402
import to_hugging_face  # noqa: E402
import write_pairs  # noqa: E402
from tinygrad_lite import cosine_schedule  # noqa: E402
from transformer import Config, Transformer  # noqa: E402

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
    new = Transformer(Config(len(data.VOCAB), 16, 2, 2, 32, data.MAX_LEN))
    rng = np.random.default_rng(0)
    for _ in sft.train(new, (data.random_lines(64, rng) for _ in range(200)), 200, 1e-2):
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
    """Checkpoint and folders of the two, {"model.npz": path, "model": path, "policy": path}."""
    at = tmp_path_factory.mktemp("folders")
    model.save(at / "model.npz")
    to_hugging_face.export(policy, at / "policy")
    to_hugging_face.main([str(at / "model.npz"), str(at / "model")])
    return {name: at / name for name in ("model.npz", "model", "policy")}


def same_weights(a, b):
    return a.config == b.config and all(
        (p.data == q.data).all() and p.data.dtype == q.data.dtype and p.data.shape == q.data.shape
        for p, q in zip(a.parameters(), b.parameters())
    )


def check_trained(out, start):
    """The folder and the checkpoint that a script wrote are one model, and not the start."""
    back, folder = evaluation.load(out), out.with_suffix("")
    assert same_weights(back, to_hugging_face.from_hugging_face(folder))
    assert not same_weights(back, to_hugging_face.from_hugging_face(start))
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == data.END


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
    rows = llama.generate(**batch, do_sample=False, max_new_tokens=data.MAX_LEN - 2).tolist()
    theirs = []
    for row, padding in zip(rows, (batch["attention_mask"] == 0).sum(dim=1).tolist()):
        row = row[padding:]
        end = row.index(data.END) + 1 if data.END in row else len(row)
        theirs.append(row[:end][: data.MAX_LEN])
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
    """The norms' scales, too, which are not 1 here."""
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


def written(path, *flags):
    """The rows and columns that write_pairs.py leaves at `path`."""
    write_pairs.main([str(path), *flags])
    rows = datasets.load_dataset("json", data_files=str(path), split="train")
    return list(rows), set(rows.column_names)


def judged(prompt, completion):
    return data.judge(data.encode(prompt + completion) + [data.END])


def test_pairs_by_rule(tmp_path):
    rows, columns = written(tmp_path / "r.jsonl", "--pairs", "rule", "--n", "300", "--prefer", "4")
    assert (len(rows), columns) == (300, {"prompt", "chosen", "rejected"})
    for row in rows:
        chosen, rejected = (judged(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        assert chosen.target in data.TRAINING and row["prompt"] == f"{chosen.target}="
        assert chosen.exact and len(chosen.terms) == 4
        assert rejected.exact and len(rejected.terms) in (2, 3, 5)


def test_sampled_pairs(paths, tmp_path):
    rows, columns = written(
        tmp_path / "s.jsonl", "--n", "20", "--checkpoint", str(paths["model.npz"])
    )
    assert (len(rows), columns) == (20, {"prompt", "chosen", "rejected"})
    for row in rows:
        chosen, rejected = (judged(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        assert chosen.target in data.TRAINING and row["prompt"] == f"{chosen.target}="
        assert chosen.outcome == data.OUTCOMES[0] != rejected.outcome


def test_an_answer_without_an_end_token_makes_no_pair():
    good, open_end = data.encode("5=1+1+3") + [data.END], data.encode("5=" + "1" * 22)
    pairs = data.pad([good, open_end, open_end, good, good, data.encode("5==") + [data.END]])
    assert list(write_pairs.pair_rows(pairs.reshape(3, 2, -1))) == [
        {"prompt": "5=", "chosen": "1+1+3", "rejected": "="}
    ]


def test_sft_lines(tmp_path):
    rows, columns = written(tmp_path / "lines.jsonl", "--sft", "--n", "200")
    assert (len(rows), columns) == (200, {"prompt", "completion"})
    for row in rows:
        line = judged(row["prompt"], row["completion"])
        assert line.exact and line.target in data.TRAINING and len(line.terms) in data.COUNTS


# DPOTrainer beside dpo.py.


def trl_and_pairs(paths, out, n, batch_size, **more):
    """TRL's trainer without shuffling, and the same n pairs as ids (n, 2, T)."""
    pairs = next(dpo.rule_rounds(n, 3, np.random.default_rng(4)))
    rows = datasets.Dataset.from_list(list(write_pairs.pair_rows(pairs)))
    config = dpo_trl.configuration(out / "run", BETA, 2e-3, batch_size, logging_steps=1, **more)
    run = dpo_trl.trainer(paths["policy"], paths["model"], rows, config)
    run._get_train_sampler = torch.utils.data.SequentialSampler  # TRL shuffles otherwise
    return run, pairs


def test_the_first_step_is_ours(policy, model, paths, tmp_path):
    run, pairs = trl_and_pairs(paths, tmp_path, 256, 256, max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    both = np.concatenate([pairs[:, 0], pairs[:, 1]])
    both = both[:, : data.lengths(both).max()]
    np.testing.assert_array_equal(batch["input_ids"], both)  # one end token each, padded alike
    np.testing.assert_array_equal(batch["completion_mask"], data.completion_mask(both))
    run.train()
    ours = dict(zip(dpo.LOGGED, dpo.loss_and_log(policy, model, pairs, BETA)[1]))
    assert abs(ours["rewards/margins"]) > 0.01 and 0.1 < ours["rewards/accuracies"] < 0.9
    for name, value in ours.items():
        assert run.state.log_history[0][name] == pytest.approx(value, rel=0, abs=1e-4), name


def test_ten_steps_are_ours(policy, model, paths, tmp_path):
    """Loss, margin and weights of dpo.train, clipping and all; only TRL's warm-up starts at 0."""
    run, pairs = trl_and_pairs(paths, tmp_path, 160, 16)
    optimizer = run.create_optimizer()
    run.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_schedule(step, 10, 1.0, warmup=10)
    )
    run.train()
    run.save_model()
    trained = Transformer(policy.config)
    for old, new in zip(policy.parameters(), trained.parameters()):
        new.data = old.data.copy()
    ours = list(dpo.train(trained, model, np.split(pairs, 10), 10, BETA, 2e-3))
    names = ["loss", "rewards/margins"]
    theirs = [[row[name] for name in names] for row in run.state.log_history[:10]]
    ours = [[row[name] for name in names] for row in ours]
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert ours[9][0] < ours[0][0] - 0.1  # the ten steps have changed something
    back = to_hugging_face.from_hugging_face(tmp_path / "run")
    for p, q in zip(back.parameters(), trained.parameters()):
        np.testing.assert_allclose(p.data, q.data, rtol=0, atol=1e-5)  # found: 6e-8


def test_the_script_trains_and_writes_both(paths, tmp_path, capsys):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out.npz"
    write_pairs.main([str(pairs), "--pairs", "rule", "--n", "24"])
    dpo_trl.main([str(paths["model"]), str(pairs), "--batch-size", "8", "--out", str(out)])
    check_trained(out, paths["model"])
    assert "24 rows of data, processes: 1\nstep 1/3  loss 0.693" in capsys.readouterr().out


# OnlineDPOTrainer beside dpo.py.


def online(paths, out):
    """The trainer of one step on 512 prompts."""
    config = online_dpo_trl.configuration(out / "run", BETA, 1e-3, 512)
    return online_dpo_trl.trainer(paths["policy"], paths["model"], 512, config)


def sampled_pairs(run):
    """The pairs of the last step as ids (P, 2, T), the right and preferred answer first."""
    prompts, prompt_mask, answers, answer_mask, _ = run.sampled
    lines = [
        torch.cat([prompt[keep], answer[write]]).tolist()
        for prompt, keep, answer, write in zip(
            prompts, prompt_mask.bool(), answers, answer_mask.bool()
        )
    ]
    pairs = []
    for pair in zip(lines[: len(lines) // 2], lines[len(lines) // 2 :]):
        right = [data.judge(line).outcome == data.OUTCOMES[0] for line in pair]
        assert pair[0] == pair[1] or sum(right) == 1
        assert data.decode(pair[0]).split("=")[0] == data.decode(pair[1]).split("=")[0]
        pairs.append(pair if right[0] else pair[::-1])
    length = max(len(line) for line in lines)
    return np.array([data.pad(pair, length) for pair in pairs])


@pytest.mark.parametrize("missing", [0, 3])
def test_a_step_is_ours_on_the_pairs_that_it_samples(missing, policy, model, paths, tmp_path):
    """Also where another process has `missing` pairs more."""
    run = online(paths, tmp_path)
    run.accelerator.gather = lambda x: x if x.is_floating_point() else torch.cat([x, x + missing])
    run.train()
    said = run.generation_config
    assert said.do_sample and (said.temperature, said.top_k, said.top_p) == (1.0, 0, 1.0)
    pairs, log = sampled_pairs(run), run.state.log_history[0]
    n_real = len(pairs) - missing
    assert 3 < n_real < 512 and log["pairs"] == 2 * n_real + missing
    assert (pairs[:n_real, 0] != pairs[:n_real, 1]).any(axis=1).all()
    assert (pairs[n_real:, 0] == pairs[n_real:, 1]).all()
    for name, value in zip(dpo.LOGGED, dpo.loss_and_log(policy, model, pairs, BETA)[1]):
        assert log[name] == pytest.approx(value, rel=0, abs=1e-4), name


def test_answers_that_are_judged_alike_teach_nothing(paths, tmp_path):
    run = online(paths, tmp_path)
    run.reward_funcs = [lambda prompts, **_: [0.0] * len(prompts)]
    run.train()
    log = run.state.log_history[0]
    assert log["pairs"] == 0 and log["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log["grad_norm"] < 1e-6


def test_the_judge_is_ours():
    end, answers = [data.END], ["1+2+3", "3+3", "1+2+4", "1++2"]
    ids = data.pad([data.encode(answer) + end for answer in answers], 20).tolist()
    ids += [data.encode("1+2+3"), data.encode("1+2+3") + [data.PAD] + end]  # not ended, padded
    assert online_dpo_trl.right_and_preferred(["6="] * 6, ids) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_three_steps_of_the_online_script(paths, tmp_path, capsys):
    out = tmp_path / "out.npz"
    online_dpo_trl.main(
        [
            str(paths["model"]),
            "--rounds",
            "3",
            "--prompts",
            "512",
            "--lr",
            "0.01",
            "--out",
            str(out),
        ]
    )
    check_trained(out, paths["model"])
    assert re.search(
        r"1,536 rows of data, processes: 1\nstep 1/3  [1-9]\d* pairs  loss 0.693",
        capsys.readouterr().out,
    )


# Mistakes.


def lines_of(path, *rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def files(model, paths, tmp_path, monkeypatch):
    """What the mistakes are about, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dpo, "PATIENCE", 2)
    os.symlink(paths["model"], "model")
    os.symlink(paths["model.npz"], "model.npz")
    os.symlink("model.npz", "link.jsonl")
    Transformer(model.config).save("untrained.npz")
    to_hugging_face.export(Transformer(model.config), Path("broken"))
    Path("broken/model.safetensors").write_bytes(b"no weights")
    Path("a-file").write_bytes(b"\x00\xff{not json\n")
    Path("empty.jsonl").touch()
    lines_of("null.jsonl", None)
    lines_of("sft.jsonl", {"prompt": "5=", "completion": "2+3"})
    lines_of("letters.jsonl", {"prompt": "5=", "chosen": "two+3", "rejected": "5"})
    lines_of("pairs.jsonl", {"prompt": "5=", "chosen": "1+2+2", "rejected": "2+3"})


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
        ("write_pairs", ". --pairs rule --n 2", "regular file"),
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
        ("online_dpo_trl", "model --out a-file", "ending in .npz"),
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
    assert hint in message and "\n" not in message, message
    assert paths["model.npz"].read_bytes() == before


def test_a_batch_that_does_not_divide_is_refused(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(cli.UserError, match="a batch of 64 does not divide into 3 processes"):
        online_dpo_trl.main(["model", "--prompts", "64"])
