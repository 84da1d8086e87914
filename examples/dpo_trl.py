"""DPO on a file of preference pairs, with TRL's DPOTrainer."""

import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is on disk: no look-ups and no telemetry
import cli  # noqa: E402  before NumPy, for the number of BLAS threads
import datasets  # noqa: E402
import torch  # noqa: E402
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,  # noqa: E402
    TrainerCallback,
)
from transformers.utils import logging  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

import data  # noqa: E402
from to_hugging_face import from_hugging_face  # noqa: E402

COLUMNS = ["prompt", "chosen", "rejected"]
SETTINGS = dict(  # what dpo.py does, for both trainers
    # Adam(betas=(0.9, 0.99)), clip_grad_norm(1.0), cosine_schedule(warmup=10)
    optim="adamw_torch",
    weight_decay=0.0,
    adam_beta1=0.9,
    adam_beta2=0.99,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    gradient_accumulation_steps=1,
    num_train_epochs=1,
    logging_first_step=True,
    # float32 and every activation kept: TRL's defaults are bfloat16 and recomputing
    bf16=False,
    gradient_checkpointing=False,
    disable_dropout=True,
    max_length=data.MAX_LEN,
    # one process or several, with or without a GPU each; nothing is saved before the end
    use_cpu=not torch.cuda.is_available(),
    dataloader_pin_memory=torch.cuda.is_available(),
    ddp_find_unused_parameters=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


# The trainer.


def configuration(folder, beta, lr, batch_size, **more):
    """dpo.py's objective and optimizer in TRL's words. `batch_size` is that of one process."""
    return DPOConfig(
        **{
            **SETTINGS,
            "output_dir": str(folder),
            "learning_rate": lr,
            "logging_steps": 8,
            "per_device_train_batch_size": batch_size,
            # dpo_loss: - mean over pairs of log sigmoid(beta h), log-probabilities summed over tokens
            "loss_type": ["sigmoid"],
            "beta": beta,
            "label_smoothing": 0.0,
            **more,
        }
    )


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
    """A model as torch.nn.Module."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


# The pairs.


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
        raise cli.UserError(
            f"no pairs at {path}; python examples/write_pairs.py {path} writes some"
        ) from None
    except ValueError as error:
        raise cli.UserError(f"{path}, line {len(rows) + 1} is no pair: {error}") from None
    if not rows:
        raise cli.UserError(f"{path} is empty; run python examples/write_pairs.py {path}")
    return datasets.Dataset.from_list(rows)


# What both programs do around their trainers.


class Lines(TrainerCallback):
    """One line of text for each log, as dpo.py prints it."""

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "loss" in logs:  # the last log is one of run times
            pairs = f"{logs['pairs']:.0f} pairs  " if "pairs" in logs else ""
            print(
                f"step {state.global_step:,}/{state.max_steps:,}  {pairs}loss {logs['loss']:.3f}"
                f"  margin {logs['rewards/margins']:.2f}  "
                f"accuracy {logs['rewards/accuracies']:.2f}",
                flush=True,
            )


def prepare(start, out, batch_size):
    """Tell a mistake before minutes of training, silence what is not for the reader, and return the
    folder to write and this process's part of a batch."""
    from_hugging_face(start)
    cli.outputs(out)
    folder, processes = out.with_suffix(""), int(os.environ.get("WORLD_SIZE", 1))
    if folder.resolve() == start.resolve():
        raise cli.UserError(f"--out would overwrite {start}; choose another name")
    folder.mkdir(exist_ok=True)
    if batch_size % processes:
        raise cli.UserError(f"a batch of {batch_size} does not divide into {processes} processes")
    torch.set_num_threads(1)  # in matrices as small as ours, two would wait for each other
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)
    return folder, batch_size // processes


def train_and_save(run, out):
    """Train, and write the folder and, brought back from it, the checkpoint."""
    run.remove_callback(PrinterCallback)
    run.add_callback(Lines())
    if run.is_world_process_zero():
        print(
            f"{len(run.train_dataset):,} rows of data, processes: {run.args.world_size}", flush=True
        )
    run.train()
    run.save_model()  # every process takes part, the first one writes
    if run.is_world_process_zero():
        from_hugging_face(Path(run.args.output_dir)).save(out)
        print(f"wrote {run.args.output_dir} and {out}; next: python eval.py runs/sft.npz {out}")


# The program.


def parse_arguments(argv):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="what to_hugging_face.py wrote: where policy and reference start",
    )
    add("pairs", type=Path, metavar="PAIRS", help="what write_pairs.py wrote")
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--epochs", type=cli.whole(1), default=1, help="how often to see each pair")
    add("--batch-size", type=cli.whole(1), default=128, help="pairs in a step, of all processes")
    add("--lr", type=cli.positive, default=4e-4, help="peak learning rate of Adam")
    add("--seed", type=cli.whole(0), default=0, help="of the order of the pairs")
    add(
        "--out",
        type=cli.checkpoint_path,
        default=Path("runs/dpo_trl.npz"),
        help="the checkpoint to write; a folder of this name without .npz goes beside it",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Train on the file of pairs."""
    arguments = parse_arguments(argv)
    start, pairs = arguments.folder, read_pairs(arguments.pairs)
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
