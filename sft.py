"""SFT: teach a Transformer, from scratch, to write numbers that sum to a target."""
if __name__ == "__main__":  # flags first: --help and mistakes are answered before NumPy loads
    import cli
    raise SystemExit(cli.main("sft"))

import math
from functools import partial

import tinygrad_lite.functional as F
from tinygrad_lite import Adam, clip_grad_norm, cosine_schedule, parallel_map, value_and_grad
import numpy as np

import data
import eval as evaluation
import plots
from cli import Progress, UserError
from transformer import Config, Transformer, write_json

SHARD = 64  # lines on one tape: fewer cost more calls, more leave the processor's cache


def completion_logps(model, ids):
    """log p(completion | prompt) of each line: int (B, T) -> (B,).

    The sum of log p(token | tokens before it) over the tokens after `=`, the end token included.
    """
    token_logps = F.token_log_probs(model(ids[:, :-1]), ids[:, 1:])  # (B, T - 1), of the next token
    return (token_logps * data.completion_mask(ids)[:, 1:]).sum(axis=1)


def sft_loss(model, ids, n_tokens=None):
    """- mean over completion tokens of log p(token | prefix): int (B, T) -> scalar Tensor.

    A shard of a larger batch passes the number of completion tokens of the whole batch, `n_tokens`:
    the losses of the shards then add up to that of the batch.
    """
    return -completion_logps(model, ids).sum() / (n_tokens or data.completion_mask(ids).sum())


def train(model, steps, batch_size, lr, rng, map_fn=map):
    """The SFT loop: trains `model` in place, yields (step, loss, learning rate) after each step.

    Raises UserError if the loss is no longer finite.
    """
    parameters = model.parameters()
    # Without weight decay some targets that were never trained on stay wrong for good.
    optimizer = Adam(parameters, lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        ids = data.random_lines(batch_size, rng)  # (B, T)
        n_tokens = int(data.completion_mask(ids).sum())
        shards = [shard for (shard,) in data.by_length(ids, size=SHARD)]
        loss_fn = partial(sft_loss, model, n_tokens=n_tokens)
        loss = math.fsum(value_and_grad(loss_fn, parameters, shards, map_fn))
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} at step {step + 1}; try a lower --lr")
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, steps, lr, warmup=min(100, steps // 10 + 1))
        optimizer.step()
        yield step + 1, loss, optimizer.lr


def main(arguments):
    """Train from scratch, show metrics and some answers, write checkpoint, facts and pictures."""
    out, steps, batch_size = arguments.out, arguments.steps, arguments.batch_size
    try:
        config = Config(len(data.VOCAB), arguments.d_model, arguments.n_layers, arguments.n_heads,
                        arguments.d_hidden, data.MAX_LEN)
    except ValueError as error:
        raise UserError(error) from None
    model = Transformer(config, arguments.seed)
    size = sum(p.size for p in model.parameters())
    print(f"{size:,} parameters, {steps * batch_size:,} lines to learn from")
    rng = np.random.default_rng([arguments.seed, 1])  # a stream of its own, beside the weights'
    with parallel_map(arguments.threads) as map_fn:
        progress, losses = Progress(steps, "step"), []
        for step, loss, lr in train(model, steps, batch_size, arguments.lr, rng, map_fn):
            losses.append(loss)
            speed = step * batch_size / progress.seconds()
            progress.show(step, f"loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} lines/s")
        seconds = progress.seconds()
        rows = [{"checkpoint": str(out), **row} for row in
                evaluation.evaluate(model, seed=0, map_fn=map_fn)]
    model.save(out)
    write_json(out.with_suffix(".json"), {"settings": vars(arguments), "seconds": seconds,
                                          "history": {"loss": losses}, "metrics": rows})
    plots.sft_loss(losses, out.with_name(f"{out.stem}-loss.png"))
    plots.distribution(rows, out.with_name(f"{out.stem}-dist.png"))
    print(f"\n{evaluation.table(rows)}\n")
    for target in evaluation.EXAMPLES:
        print(evaluation.shown(evaluation.answers_to(model, target, 0)[0]))
    print(f"\nwrote {out}; next: python dpo.py --beta 0.8 --sft {out}")
