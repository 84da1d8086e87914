"""SFT: teach a Transformer, from scratch, to write numbers that sum to a target."""
import math
import time

import tinygrad_lite.functional as F
from tinygrad_lite import Adam, World, clip_grad_norm, cosine_schedule, launch, no_grad
import numpy as np

import cli
import data
import eval as evaluation
from transformer import Config, Transformer

SHARD = 64  # lines on one tape: fewer mean more calls, more do not fit the processor's cache


def completion_logps(model, ids):
    """log p(completion | prompt) of each line: int (B, T) -> (B,). The sum of log p(token | tokens
    before it) over the tokens after `=`, the end token included."""
    token_logps = F.token_log_probs(model(ids[:, :-1]), ids[:, 1:].ravel())  # (B (T - 1),)
    mask = data.completion_mask(ids)[:, 1:]  # (B, T - 1)
    return (token_logps.reshape(*mask.shape) * mask).sum(axis=1)


def sft_loss(model, ids, n_tokens=None):
    """- mean over completion tokens of log p(token | tokens before it): int (B, T) -> scalar. With
    `n_tokens`, the completion tokens of a whole batch, losses of its shards add up to its loss."""
    return -completion_logps(model, ids).sum() / (n_tokens or data.completion_mask(ids).sum())


def excess_nats(model, targets, rng, n=4000):
    """KL(rule || model) in nats a line, from n lines of these targets: how much less likely the
    model makes them than the rule that makes them; 0 for a perfect model. The rule draws one of
    four counts k, then one of binomial(m - 1, k - 1) splits of the target m."""
    excess = 0.0
    for ids in data.by_length(data.random_lines(n, rng, targets), 4 * SHARD):
        with no_grad():
            excess -= float(completion_logps(model, ids).numpy().sum())
        for target, terms in map(data.parse, map(data.decode, ids)):
            excess -= math.log(4 * math.comb(target - 1, len(terms) - 1))
    return excess / n


def train(model, batches, steps, lr, world=World()):
    """The SFT loop: trains `model` in place on `batches` of lines, int (B, T), the same in every
    process of `world`. Yields each step's loss. Raises UserError when it is no longer finite."""
    parameters = model.parameters()
    # Without weight decay some targets that were never trained on stay wrong for good.
    optimizer = Adam(parameters, lr, weight_decay=0.15)
    for step, ids in zip(range(steps), batches):
        n_tokens, batch_loss = data.completion_mask(ids).sum(), 0.0
        for shard in world.share(data.by_length(ids, SHARD)):
            loss = sft_loss(model, shard, n_tokens)
            loss.backward()
            batch_loss += loss.item()
        batch_loss = world.all_reduce_gradients(parameters, batch_loss).item()
        if not math.isfinite(batch_loss):
            raise cli.UserError(f"the loss is {batch_loss} at step {step + 1}; try a lower --lr")
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, steps, lr, warmup=min(100, steps // 10 + 1))
        # With a slow mean of the gradients half the steps do; at full weight at once, it does harm.
        optimizer.alpha = 16 * step / steps
        optimizer.step()
        optimizer.zero_grad()
        yield batch_loss


def train_new_model(world, config, arguments):
    """What every process runs: a new model, trained. Returns it, the losses and the seconds."""
    model, losses = Transformer(config, arguments.seed), []
    rng = np.random.default_rng([arguments.seed, 1])  # a stream of its own, beside the weights'
    batches = (data.random_lines(arguments.batch_size, rng) for _ in range(arguments.steps))
    started = time.perf_counter()
    for loss in train(model, batches, arguments.steps, arguments.lr, world):
        losses.append(loss)
        if world.rank == 0 and 40 * len(losses) % arguments.steps < 40:  # 40 times in a run
            cli.show_progress("step", len(losses), arguments.steps, started, f"loss {loss:.3f}")
    return model, losses, time.perf_counter() - started


def parse_arguments(argv):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--steps", type=cli.whole(1), default=7_000, help="training steps")
    add("--batch-size", type=cli.whole(1), default=128, help="lines in a step")
    add("--lr", type=cli.positive, default=8e-3, help="peak learning rate of Adam")
    add("--d-model", type=cli.whole(1), default=32, help="width of the residual stream")
    add("--n-layers", type=cli.whole(1), default=2, help="number of blocks")
    add("--n-heads", type=cli.whole(1), default=4, help="attention heads of each block")
    add("--d-hidden", type=cli.whole(1), default=96, help="hidden width of the MLP")
    add("--seed", type=cli.whole(0, 2 ** 63 - 1), default=0, help="the same seed, the same run")
    add("--processes", type=cli.whole(1, 64), default=2, help="processes that share the work")
    add("--out", type=cli.checkpoint_path, default="runs/sft.npz", help="checkpoint, log beside it")
    return parser.parse_args(argv)


def main(argv=None):
    """Train from scratch; write checkpoint and log; print metrics and excess."""
    arguments = parse_arguments(argv)
    config = Config(len(data.VOCAB), arguments.d_model, arguments.n_layers, arguments.n_heads,
                    arguments.d_hidden, data.MAX_LEN)
    (log,) = cli.outputs(arguments.out, ".json")
    model, losses, seconds = launch(arguments.processes, train_new_model, config, arguments)

    model.save(arguments.out)
    rows = evaluation.evaluate({str(arguments.out): model})
    excess = {name: excess_nats(model, targets, np.random.default_rng(0)) for name, targets in
              (("trained", data.TRAINING), ("held-out", data.HELD_OUT))}
    cli.write_json(log, settings=vars(arguments), seconds=seconds, metrics=rows,
                   excess_nats=excess, history={"loss": losses})
    print(f"\n{evaluation.table(rows)}\n")
    print("excess over the rule, nats a line: {trained:.2f} on trained targets, {held-out:.2f} on "
          "held-out ones\n".format(**excess))
    print(f"wrote {arguments.out}; next: python dpo.py --beta 0.8 --sft {arguments.out}")


if __name__ == "__main__":
    cli.run(main)
