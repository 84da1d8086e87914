"""The DPO of dpo.py with TRL's DPOTrainer, on a folder and pairs that this project wrote.

    python examples/to_hugging_face.py runs/sft.npz runs/sft_hf
    python examples/write_pairs.py runs/pairs.jsonl
    python examples/dpo_trl.py runs/sft_hf runs/pairs.jsonl
    python eval.py runs/sft.npz runs/dpo_trl.npz

That is one process: one CPU, or the GPU if there is exactly one. With two processes on one machine
(without --cpu: on its GPUs):

    accelerate launch --cpu --num_machines 1 --num_processes 2 examples/dpo_trl.py \\
        runs/sft_hf runs/pairs.jsonl

On two machines with two processes each, that is four in all: the same command on both, HOST being the
first one's address, with --machine_rank 0 on the first and 1 on the second. Each reads the same folder
and pairs, from a shared disk or a copy; the first one writes the result.

    accelerate launch --cpu --num_machines 2 --num_processes 4 --machine_rank 0 \\
        --main_process_ip HOST --main_process_port 29500 examples/dpo_trl.py \\
        runs/sft_hf runs/pairs.jsonl

--batch-size counts the pairs of all processes together, so that each command trains the same.
"""
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the project's modules
import cli  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is on disk: no look-ups and no telemetry


def parser():
    new = cli._parser("examples/dpo_trl", "Train a Hugging Face folder by DPO with TRL.")
    add = new.add_argument
    add("folder", type=Path, metavar="FOLDER",
        help="what to_hugging_face.py wrote: policy and reference")
    add("pairs", type=Path, metavar="PAIRS", help="what write_pairs.py wrote")
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--epochs", type=cli.count, default=1, help="how often to see each pair")
    add("--batch-size", type=cli.count, default=128, help="pairs in a step, over all processes")
    add("--lr", type=cli.positive, default=4e-4, help="peak learning rate of Adam")
    add("--seed", type=cli.seed, default=0, help="of the order of the pairs")
    add("--out", type=cli.checkpoint_path, default=Path("runs/dpo_trl.npz"),
        help="the checkpoint to write; the folder without .npz goes beside it")
    return new


if __name__ == "__main__":
    cli.PARSERS["dpo_trl"] = parser
    raise SystemExit(cli.main("dpo_trl"))

import data  # noqa: E402
from to_hugging_face import from_hugging_face  # noqa: E402

try:
    import datasets
    import torch
    from transformers import (AutoModelForCausalLM, AutoTokenizer, PrinterCallback,
                              TrainerCallback)
    from trl import DPOConfig, DPOTrainer
except ImportError as missing:
    raise cli.UserError(f"{missing}; pip install -r examples/requirements.txt") from None

COLUMNS = ["prompt", "chosen", "rejected"]


def read_pairs(path):
    """The pairs as a datasets.Dataset. UserError for a file that is not one of write_pairs.py."""
    if not path.is_file():
        raise cli.UserError(f"no pairs at {path}; run python examples/write_pairs.py {path} first")
    try:
        pairs = datasets.load_dataset("json", data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise cli.UserError(f"{path} is no file of JSON lines ({error})") from None
    if not set(COLUMNS) <= set(pairs.column_names):
        raise cli.UserError(f"{path} has the columns {', '.join(pairs.column_names)}; DPO needs "
                            f"{', '.join(COLUMNS)}")
    for i, row in enumerate(pairs.select_columns(COLUMNS)):
        try:
            data.encode("".join(row.values()))
        except (ValueError, TypeError) as error:
            raise cli.UserError(f"{path}, line {i + 1}: {error}") from None
    return pairs


def configuration(folder, beta, lr, batch_size, **more):
    """dpo.py's objective and optimizer in TRL's words. `batch_size` is that of one process."""
    return DPOConfig(**{**dict(
        output_dir=str(folder),
        # dpo_loss: - mean over pairs of log sigmoid(beta h), with log-probabilities summed over tokens
        loss_type=["sigmoid"], beta=beta, label_smoothing=0.0, disable_dropout=True,
        # Adam(betas=(0.9, 0.99)), clip_grad_norm(1.0), cosine_schedule(warmup=10)
        optim="adamw_torch", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8,
        max_grad_norm=1.0, learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=10,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=1,
        # float32 and every activation kept: TRL's defaults are bfloat16 and recomputing
        bf16=False, gradient_checkpointing=False, max_length=data.MAX_LEN,
        logging_steps=8, logging_first_step=True, report_to="none", disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=torch.cuda.is_available()), **more})


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
        if state.is_world_process_zero and "rewards/margins" in logs:
            print(f"step {state.global_step:,}/{state.max_steps:,}  loss {logs['loss']:.3f}  margin "
                  f"{logs['rewards/margins']:.2f}  accuracy {logs['rewards/accuracies']:.2f}",
                  flush=True)


def main(arguments):
    """Train, and write the folder and, brought back from it, the checkpoint."""
    out, processes = arguments.out, int(os.environ.get("WORLD_SIZE", 1))
    if arguments.batch_size % processes:
        raise cli.UserError(f"--batch-size {arguments.batch_size} is not divisible by the number of "
                            f"processes, {processes}")
    from_hugging_face(arguments.folder)  # what cannot be brought back is refused before it is trained
    datasets.disable_progress_bars()
    pairs, folder = read_pairs(arguments.pairs), out.with_suffix("")
    config = configuration(folder, arguments.beta, arguments.lr, arguments.batch_size // processes,
                           num_train_epochs=arguments.epochs, seed=arguments.seed)
    run = trainer(arguments.folder, arguments.folder, pairs, config)
    run.train()
    run.save_model()  # every process takes part, the first one writes
    if run.is_world_process_zero():
        from_hugging_face(folder).save(out)
        print(f"wrote {folder} and {out}; next: python eval.py runs/sft.npz {out}")
