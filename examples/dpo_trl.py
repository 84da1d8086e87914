"""DPO on a file of preference pairs, with TRL's DPOTrainer."""

# ruff: noqa: E402  the project's modules can be imported only after the path is set

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are on disk: no look-ups, no telemetry

import data  # before NumPy, because it imports tinygrad_lite: see there
import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

import cli
from to_hugging_face import from_hugging_face

COLUMNS = ["prompt", "chosen", "rejected"]
SETTINGS = {  # what dpo.py does, for both trainers
    # Adam(betas=(0.9, 0.99)), clip_grad_norm(1.0), cosine_schedule(warmup=10)
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "logging_first_step": True,
    # float32, and every activation kept; TRL's defaults are bfloat16 and recomputing
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
    "max_length": data.MAX_LEN,
    # one process or several, with or without a GPU each; nothing is saved before the end
    "use_cpu": not torch.cuda.is_available(),
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


# The trainer.


def configuration(folder, beta, lr, batch_size, **more):
    """dpo.py's objective and optimizer in TRL's words. `batch_size` is that of one process."""
    settings = SETTINGS | {
        "output_dir": str(folder),
        "learning_rate": lr,
        "logging_steps": 8,
        "per_device_train_batch_size": batch_size,
        # dpo_loss: - mean over pairs of log sigmoid(beta h), where log-probabilities are summed
        # over tokens
        "loss_type": ["sigmoid"],
        "beta": beta,
        "label_smoothing": 0.0,
    }
    return DPOConfig(**(settings | more))


def trainer(policy, reference, pairs, config):
    """TRL's trainer of the model in the folder `policy` against the frozen one in `reference`."""
    return DPOTrainer(
        model=load(policy),
        ref_model=load(reference),
        args=config,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(policy),
    )


def load(folder):
    """The model in a folder, as a torch.nn.Module."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


# The pairs.


def read_pair(text):
    """A line of the file as a row. ValueError if it is no pair of this task."""
    row = json.loads(text)
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in COLUMNS):
        raise ValueError(f"it needs the texts {', '.join(COLUMNS)}")
    for name in COLUMNS:
        data.encode(row[name])  # raises ValueError for unknown characters
    return {name: row[name] for name in COLUMNS}


def read_pairs(path):
    """The pairs as a datasets.Dataset. UserError for a file that is not one of write_pairs.py.

    `datasets.load_dataset("json", data_files=path, split="train")` would read the file, too, but it
    would check nothing.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise cli.UserError(
            f"no pairs at {path}; python examples/write_pairs.py {path} writes some"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(read_pair(line.decode("utf-8")))
        except ValueError as error:
            raise cli.UserError(f"{path}, line {number} is no pair: {error}") from None
    if not rows:
        raise cli.UserError(f"{path} is empty; run python examples/write_pairs.py {path}")
    return datasets.Dataset.from_list(rows)


# What both programs do before and after training.


class Lines(TrainerCallback):
    """One line of text for each log, as dpo.py prints it."""

    def on_log(self, args, state, control, logs=None, **_):
        is_of_training = "loss" in logs  # the last log of a run is about its duration
        if not state.is_world_process_zero or not is_of_training:
            return
        text = f"step {state.global_step:,}/{state.max_steps:,}  "
        if "pairs" in logs:  # of OnlineTrainer
            text += f"{logs['pairs']:.0f} pairs  "
        text += (
            f"loss {logs['loss']:.3f}  margin {logs['rewards/margins']:.2f}  "
            f"accuracy {logs['rewards/accuracies']:.2f}"
        )
        print(text, flush=True)


def prepare(start, out, batch_size):
    """Check the flags, before minutes of training, and silence what is not for the reader.

    Returns the folder to write and this process's part of a batch.
    """
    from_hugging_face(start)
    cli.output_files(out)
    folder = out.with_suffix("")
    if folder.resolve() == start.resolve():
        raise cli.UserError(f"--out would overwrite {start}; choose another name")
    folder.mkdir(exist_ok=True)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by `accelerate launch`
    if batch_size % processes:
        raise cli.UserError(f"a batch of {batch_size} does not divide into {processes} processes")

    torch.set_num_threads(1)  # on matrices as small as ours, threads would wait for each other
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)
    return folder, batch_size // processes


def train_and_save(run, out):
    """Train, then write the model twice: as a folder, and as a checkpoint of this project."""
    run.remove_callback(PrinterCallback)
    run.add_callback(Lines())
    is_first_process = run.is_world_process_zero()
    if is_first_process:
        n_rows, processes = len(run.train_dataset), run.args.world_size
        print(f"{n_rows:,} rows of data, processes: {processes}", flush=True)
    run.train()
    run.save_model()  # every process takes part; the first one writes
    if is_first_process:
        folder = Path(run.args.output_dir)
        from_hugging_face(folder).save(out)
        print(f"wrote {folder} and {out}; next: python eval.py runs/sft.npz {out}")


# The program.


def parse_arguments(argv):
    formatter = argparse.ArgumentDefaultsHelpFormatter  # --help shows every default
    parser = cli.Parser(prog=sys.argv[0], description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER",
        help="what to_hugging_face.py wrote: where policy and reference start")  # fmt: skip
    add("pairs", type=Path, metavar="PAIRS", help="what write_pairs.py wrote")
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--epochs", type=cli.whole(1), default=1, help="how often to see each pair")
    add("--batch-size", type=cli.whole(1), default=128, help="pairs in a step, of all processes")
    add("--lr", type=cli.positive, default=4e-4, help="peak learning rate of Adam")
    add("--seed", type=cli.whole(0), default=0, help="of the order of the pairs")
    add("--out", type=cli.checkpoint_path, default="runs/dpo_trl.npz",
        help="checkpoint to write, with a folder of the same name beside it")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    """Train on the file of pairs."""
    arguments = parse_arguments(argv)
    start = arguments.folder
    pairs = read_pairs(arguments.pairs)
    folder, batch_size = prepare(start, arguments.out, arguments.batch_size)
    config = configuration(
        folder,
        arguments.beta,
        arguments.lr,
        batch_size,
        num_train_epochs=arguments.epochs,
        seed=arguments.seed,
    )
    train_and_save(trainer(start, start, pairs, config), arguments.out)


if __name__ == "__main__":
    cli.run(main)
