"""SFT: teach a Transformer, from scratch, to write numbers that sum to a target."""

import argparse
import functools
import math
import time

import tinygrad_lite.functional as F
from tinygrad_lite import AdEMAMix, clip_grad_norm, cosine_schedule, launch, no_grad

import numpy as np

import cli
import data
import eval as evaluation
from transformer import Config, Transformer

LINES_AT_ONCE = 64  # through the model: with more, what it keeps does not fit the CPU's cache


def completion_logps(model, ids):
    """log p(completion | prompt) of each line: int (B, T) -> (B,).

    The sum of log p(token | tokens before it) over the tokens after `=`, end token included.
    """
    logits = model(ids[:, :-1])  # (V, B (T - 1)); those at position t are about token t + 1
    token_logps = F.token_log_probs(logits, ids[:, 1:].ravel())  # (B (T - 1),)
    mask = data.completion_mask(ids)[:, 1:]  # (B, T - 1)
    return (token_logps.reshape(*mask.shape) * mask).sum(axis=1)


def sft_loss(model, ids):
    """Mean of -log p(token | tokens before it) over completion tokens: int (B, T) -> scalar.

    Raises ValueError if there is no completion token.
    """
    n_tokens = data.completion_mask(ids).sum()
    if n_tokens == 0:
        raise ValueError("the lines have no completion: no token after an equals sign")
    return -completion_logps(model, ids).sum() / n_tokens


@np.errstate(all="ignore")  # no warnings of overflow: the check of the loss reports it
def train(world, model, report, steps, batch_size, lr, seed):
    """The SFT loop, which every process of `world` runs. Trains model in place on rank 0.

    report(step, loss) is called on rank 0 after each step. Returns the loss of each step. Raises
    UserError when the loss is no longer finite.
    """
    rng = data.random_stream(seed, "SFT lines")  # the same in every process, and so are the lines
    parameters = model.parameters()
    # Without weight decay, the answers to some held-out targets never become right.
    optimizer = AdEMAMix(parameters, lr, weight_decay=0.15)
    losses = []
    for step in range(steps):
        # Batches grow from a third to all: early on, a few lines already show the way down.
        n_lines = math.ceil(batch_size * (1 + 2 * step / steps) / 3)
        ids = data.random_lines(n_lines, rng)  # (B, T)
        n_tokens = data.completion_mask(ids).sum()
        n_parts = world.world_size * math.ceil(n_lines / world.world_size / LINES_AT_ONCE)

        # 1. Each process takes its parts of the batch. A part's loss is weighted by its share of
        #    the tokens, so the losses, and the gradients, of all parts add up to the batch's.
        loss = 0.0
        for part in data.by_length(ids, n_parts)[world.rank :: world.world_size]:
            part_loss = sft_loss(model, part) * (data.completion_mask(part).sum() / n_tokens)
            part_loss.backward()
            loss += part_loss.item()
        loss = float(world.all_reduce(loss))
        if not math.isfinite(loss):
            raise cli.UserError(f"the loss is {loss} at step {step + 1}; try a lower --lr")
        world.all_reduce_gradients(parameters)

        # 2. One step down the gradient.
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, steps, lr, warmup=min(100, steps // 10 + 1))
        # A slow mean of the gradients reaches the same loss in half the steps. Its weight is
        # ramped up, because at full weight from the start training diverges.
        optimizer.alpha = 16 * step / steps
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if world.rank == 0:
            report(step + 1, loss)
    return losses


def show(step, loss, progress):
    """What a run prints on the way."""
    done = step / progress.total
    seconds = 0.7 * done + 0.3 * done**2  # as a share: steps get slower as batches grow
    progress.show(step, seconds, f"loss {loss:.3f}")


def excess_nats(model, targets, n=4000):
    """An estimate of KL(rule || model), in nats a line, for lines of these targets.

    The rule is what makes SFT's lines: it draws one of four numbers of terms k, then one of
    binomial(m - 1, k - 1) splits of the target m. The estimate is the mean of log p_rule - log
    p_model over n lines drawn by the rule. A perfect model has 0.
    """
    ids = data.random_lines(n, data.random_stream(0, "excess"), targets)
    excess = 0.0
    for part in data.by_length(ids, n_parts=math.ceil(n / 256)):
        with no_grad():
            excess -= float(completion_logps(model, part).numpy().sum())
        for line in part:
            target, terms = data.parse(data.decode(line))
            excess -= math.log(len(data.COUNTS) * math.comb(target - 1, len(terms) - 1))
    return excess / n


def parse_arguments(argv):
    formatter = argparse.ArgumentDefaultsHelpFormatter  # --help shows every default
    parser = cli.Parser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--steps", type=cli.whole(1), default=8_000, help="training steps")
    add("--batch-size", type=cli.whole(1), default=128, help="lines in the last step")
    add("--lr", type=cli.positive, default=8e-3, help="peak learning rate")
    add("--d-model", type=cli.whole(1), default=32, help="width of the residual stream")
    add("--n-layers", type=cli.whole(1), default=2, help="number of blocks")
    add("--n-heads", type=cli.whole(1), default=4, help="attention heads of each block")
    add("--d-hidden", type=cli.whole(1), default=96, help="hidden width of the MLP")
    add("--seed", type=cli.seed, default=0, help="repeats a run with the same --processes")
    add("--processes", type=cli.whole(1, 64), default=2, help="processes that share the work")
    add("--out", type=cli.checkpoint_path, default="runs/sft.npz", help="checkpoint, log beside it")
    return parser.parse_args(argv)


def main(argv=None):
    """Train from scratch; write checkpoint and log; print metrics and excess."""
    arguments = parse_arguments(argv)
    steps, batch_size = arguments.steps, arguments.batch_size
    lr, seed = arguments.lr, arguments.seed
    config = Config(
        vocab_size=len(data.VOCAB),
        d_model=arguments.d_model,
        n_layers=arguments.n_layers,
        n_heads=arguments.n_heads,
        d_hidden=arguments.d_hidden,
    )
    out, log = cli.output_files(arguments.out, ".json")
    wrote = "replaced" if out.exists() else "wrote"
    model = Transformer(config, seed)

    started = time.perf_counter()
    progress = cli.Progress("step", steps)
    report = functools.partial(show, progress=progress)
    losses = launch(arguments.processes, train, model, report, steps, batch_size, lr, seed)
    seconds = time.perf_counter() - started
    progress.end()

    model.save(out)
    rows = evaluation.evaluate({str(out): model})
    excess = {
        "trained": excess_nats(model, data.TRAINING),
        "held-out": excess_nats(model, data.HELD_OUT),
    }
    facts = {
        "settings": vars(arguments),
        "seconds": seconds,
        "metrics": rows,
        "excess_nats": excess,
        "history": {"loss": losses},
    }
    cli.write_json(log, facts)
    print(f"\n{evaluation.table(rows)}\n")
    print(
        f"excess over the rule, nats a line: {excess['trained']:.2f} on trained targets, "
        f"{excess['held-out']:.2f} on held-out ones\n"
    )
    print(f"{wrote} {out}; next: python dpo.py --beta 0.8 --sft {out}")


if __name__ == "__main__":
    cli.run(main)
