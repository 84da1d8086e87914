"""The DPO of dpo.py with TRL's DPOTrainer, on a folder and pairs that this project wrote.

    python examples/to_hugging_face.py runs/sft.npz runs/sft_hf
    python examples/write_pairs.py runs/pairs.jsonl
    python examples/dpo_trl.py runs/sft_hf runs/pairs.jsonl
    python eval.py runs/sft.npz runs/dpo_trl.npz

That is one process: on the CPU, or on the GPU if there is exactly one. Two processes on one
machine, with a GPU each or on its CPU (--multi_gpu does either; --cpu would start only one):

    accelerate launch --multi_gpu --num_machines 1 --num_processes 2 examples/dpo_trl.py \\
        runs/sft_hf runs/pairs.jsonl

Two machines with two processes each, four in all: the same command on both, HOST being the address
of the first, with --machine_rank 0 on the first and 1 on the second. Each reads the same folder and
pairs, from a shared disk or a copy; the first writes the result.

    accelerate launch --multi_gpu --num_machines 2 --num_processes 4 --machine_rank 0 \\
        --main_process_ip HOST --main_process_port 29500 examples/dpo_trl.py \\
        runs/sft_hf runs/pairs.jsonl

--batch-size counts the pairs of all processes together, so that each command trains the same.
"""
import argparse
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the project's modules
import cli  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is on disk: no look-ups and no telemetry


def parser():
    new = cli._Parser("examples/dpo_trl", "Train a Hugging Face folder by DPO with TRL.")
    add = new.add_argument
    add("folder", type=Path, metavar="FOLDER",
        help="what to_hugging_face.py wrote: where the policy starts")
    add("pairs", type=Path, metavar="PAIRS", help="what write_pairs.py wrote")
    add("--reference", type=Path, metavar="FOLDER", default=argparse.SUPPRESS,
        help="the frozen reference, for further rounds (default: where the policy starts)")
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--epochs", type=cli.count, default=1, help="how often to see each pair")
    add("--batch-size", type=cli.count, default=128, help="pairs in a step, over all processes")
    add("--lr", type=cli.positive, default=4e-4, help="peak learning rate of Adam")
    add("--seed", type=cli.seed, default=0, help="of the order of the pairs")
    add("--out", type=cli.checkpoint_path, default=Path("runs/dpo_trl.npz"),
        help="the checkpoint to write; a folder of this name without .npz goes beside it")
    new.set_defaults(reference=None)
    return new


if __name__ == "__main__":
    cli.PARSERS["dpo_trl"] = parser
    raise SystemExit(cli.main("dpo_trl"))

import json  # noqa: E402
import warnings  # noqa: E402

from to_hugging_face import from_hugging_face  # noqa: E402
import data  # noqa: E402

try:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer
except ImportError as missing:
    raise cli.UserError(f"{missing}; pip install -r examples/requirements.txt") from None

COLUMNS = ["prompt", "chosen", "rejected"]


def pair(line):
    """A line of the file as a row. ValueError if it is no pair of this task."""
    row = json.loads(line)
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in COLUMNS):
        raise ValueError(f"it needs the texts {', '.join(COLUMNS)}")
    data.encode("".join(row[name] for name in COLUMNS))
    return {name: row[name] for name in COLUMNS}


def read_pairs(path):
    """The pairs as a datasets.Dataset. UserError for a file that is not one of write_pairs.py.

    `datasets.load_dataset("json", data_files=path, split="train")` would do, but checks nothing.
    """
    rows = []
    try:
        for line in path.read_text().splitlines():
            rows.append(pair(line))
    except FileNotFoundError:
        raise cli.UserError(f"no pairs at {path}; python examples/write_pairs.py {path} writes "
                            f"some") from None
    except ValueError as error:
        raise cli.UserError(f"{path}, line {len(rows) + 1} is no pair: {error}") from None
    if not rows:
        raise cli.UserError(f"{path} is empty; run python examples/write_pairs.py {path}")
    return datasets.Dataset.from_list(rows)


def configuration(folder, beta, lr, batch_size, **more):
    """dpo.py's objective and optimizer in TRL's words. `batch_size` is that of one process."""
    return DPOConfig(**{**dict(
        output_dir=str(folder),
        # dpo_loss: - mean over pairs of log sigmoid(beta h), log-probabilities summed over tokens
        loss_type=["sigmoid"], beta=beta, label_smoothing=0.0, disable_dropout=True,
        # Adam(betas=(0.9, 0.99)), clip_grad_norm(1.0), cosine_schedule(warmup=10)
        optim="adamw_torch", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8,
        max_grad_norm=1.0, learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=10,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=1,
        # float32 and every activation kept: TRL's defaults are bfloat16 and recomputing
        bf16=False, gradient_checkpointing=False, max_length=data.MAX_LEN,
        logging_steps=8, logging_first_step=True, report_to="none", disable_tqdm=True,
        # one process or several, with or without a GPU each; nothing is saved before the end
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False, save_strategy="no"), **more})


def trainer(policy, reference, pairs, config):
    """TRL's trainer of the model in the folder `policy` against the frozen one in `reference`."""
    model, frozen = (AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
                     for folder in (policy, reference))
    new = DPOTrainer(model=model, ref_model=frozen, args=config, train_dataset=pairs,
                     processing_class=AutoTokenizer.from_pretrained(policy))
    new.remove_callback(PrinterCallback)
    new.add_callback(Lines())
    return new


class Lines(TrainerCallback):
    """One line of text for each log, as dpo.py prints it."""

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "loss" in logs:  # the last log is one of run times
            print(f"step {state.global_step:,}/{state.max_steps:,}  loss {logs['loss']:.3f}  "
                  f"margin {logs['rewards/margins']:.2f}  "
                  f"accuracy {logs['rewards/accuracies']:.2f}", flush=True)


def hush():
    """No progress bars, and no warning of what TRL and transformers have to settle between them."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)


def main(arguments):
    """Train, and write the folder and, brought back from it, the checkpoint."""
    out, processes = arguments.out, int(os.environ.get("WORLD_SIZE", 1))
    if arguments.batch_size % processes:
        raise cli.UserError(f"--batch-size {arguments.batch_size} is not divisible by {processes}, "
                            f"the number of processes")
    reference = arguments.reference or arguments.folder
    for given in (arguments.folder, reference):  # refused before it is trained, not after
        from_hugging_face(given)
    hush()
    pairs, folder = read_pairs(arguments.pairs), out.with_suffix("")
    config = configuration(folder, arguments.beta, arguments.lr, arguments.batch_size // processes,
                           num_train_epochs=arguments.epochs, seed=arguments.seed)
    run = trainer(arguments.folder, reference, pairs, config)
    first = run.is_world_process_zero()
    if first:
        print(f"{len(pairs):,} pairs, {processes} process{'es' * (processes > 1)}", flush=True)
    run.train()
    run.save_model()  # every process takes part, the first one writes
    if first:
        from_hugging_face(folder).save(out)
        print(f"wrote {folder} and {out}; next: python eval.py runs/sft.npz {out}")
