"""What an experiment can change in a DPO run: where its pairs come from, its loss, its loop.

An experiment that only needs other pairs calls dpo.train with another make_pairs. Everything else
calls `train` below, the same loop with parts that can be exchanged. With none of them exchanged, it
takes the same steps as dpo.train.
"""

import dataclasses
import functools
import math
from typing import Callable

import lab  # noqa: F401  first: it makes the core importable
from tinygrad_lite import Adam, clip_grad_norm, cosine_schedule, no_grad
import numpy as np

import cli
import data
import dpo

# Where pairs come from: functions of (starts, answers, prefer) that return the make_pairs of a
# training loop. dpo.pairs_maker has three more.


def own(starts, answers, prefer):
    """Pairs of the policy's fresh answers alone: dpo.online_pairs without any sums made by rule.

    A policy that has stopped writing an answer is never rewarded for it again.
    """
    return functools.partial(own_pairs, starts=starts, answers=answers, prefer=prefer)


def own_pairs(policy, step, world, rng, starts, answers, prefer):
    numbers = range(starts[step] + world.rank, starts[step + 1], world.world_size)
    n_targets = len(numbers)  # of this process
    targets = rng.choice(data.TRAINING, n_targets)
    return dpo.pair_up(dpo.sample_and_judge(policy, targets, answers, prefer, rng))


class FreshEvery:
    """Pairs of the policy's answers, sampled every `fresh_every` rounds and reused until then.

    One draw makes min(fresh_every, 50) rounds of pairs. They come again, in another order, until
    fresh_every rounds are over. FreshEvery(1, ...) is online DPO.
    """

    def __init__(self, fresh_every, starts, answers, prefer):
        self.fresh_every = fresh_every
        self.n_rounds = min(fresh_every, 50)
        self.starts, self.answers, self.prefer = starts, answers, prefer

    def __call__(self, policy, step, world, rng):
        since_draw = step % self.fresh_every
        if since_draw == 0:
            last = min(step + self.n_rounds, len(self.starts) - 1)
            span = [self.starts[step], self.starts[last]]  # as if these rounds were one
            self.pairs = dpo.online_pairs(policy, 0, world, rng, span, self.answers, self.prefer)
        if since_draw % self.n_rounds == 0:
            self.rounds = np.array_split(rng.permutation(self.pairs), self.n_rounds)
        return self.rounds[since_draw % self.n_rounds]


# The loss.


def mean_logps(logps, lines):
    """Log-probabilities averaged over the tokens of each completion instead of summed.

    logps: sums, (P,). lines: ids (P, T). Returns (P,).
    """
    return logps / data.completion_mask(lines).sum(axis=1)


def sft_term(chosen_logps, pairs):
    """The SFT loss of chosen answers: the mean over pairs of -(log-probability / its tokens).

    Pang et al. 2024, Eq. 1, adds it to the DPO loss. chosen_logps: sums over tokens, (P,).
    pairs: ids (P, 2, T). Returns a scalar Tensor.
    """
    return -mean_logps(chosen_logps, pairs[:, 0]).mean()


@dataclasses.dataclass(frozen=True)
class PairObjective:
    """What `train` minimises, averaged over pairs, and what it logs. By default, DPO's.

    loss(chosen, rejected, reference_chosen, reference_rejected, beta): a scalar Tensor from the
        log-probabilities of P pairs, four arrays (P,), as dpo.dpo_loss is.
    average_logps: whether log-probabilities are averaged over tokens before the loss sees them.
    sft_weight: the weight of sft_term, which is added to the loss.
    """

    loss: Callable = dpo.dpo_loss
    average_logps: bool = False
    sft_weight: float = 0.0

    logged = dpo.LOGGED  # the names of the log

    def __call__(self, policy, reference, pairs, beta):
        """The loss of P pairs, ids (P, 2, T), and the log, {name: mean over pairs}."""
        chosen, rejected = dpo.pair_logps(policy, pairs)  # (P,) each
        with no_grad():
            reference_chosen, reference_rejected = dpo.pair_logps(reference, pairs)
        added = self.sft_weight * sft_term(chosen, pairs) if self.sft_weight > 0 else None
        if self.average_logps:
            chosen_lines, rejected_lines = pairs[:, 0], pairs[:, 1]
            chosen = mean_logps(chosen, chosen_lines)
            rejected = mean_logps(rejected, rejected_lines)
            with no_grad():
                reference_chosen = mean_logps(reference_chosen, chosen_lines)
                reference_rejected = mean_logps(reference_rejected, rejected_lines)
        loss = self.loss(chosen, rejected, reference_chosen, reference_rejected, beta)
        if added is not None:
            loss = loss + added
        log = dpo.pair_metrics(chosen, rejected, reference_chosen, reference_rejected, beta)
        log["loss"] = loss.item()
        return loss, log


# The loop.


def adam(parameters, lr):
    """The optimizer of dpo.train."""
    return Adam(parameters, lr, betas=(0.9, 0.99))


def reached(row, share):
    """For `stop`: whether the policy's answers to held-out targets, if they were measured in this
    round, are right and preferred at least this often."""
    return row.get("shares", {}).get(data.ACCEPTED, 0.0) >= share


@np.errstate(all="ignore")  # no warnings of overflow: the check of the loss reports it
def train(
    world,
    policy,
    reference,
    make_pairs,
    report,
    rounds,
    beta,
    lr,
    seed,
    *,
    objective=PairObjective(),
    make_optimizer=adam,
    max_norm=1.0,
    divisor=None,
    update_reference=None,
    stop=None,
):
    """dpo.train with parts that an experiment can exchange. Trains policy in place on rank 0.

    The arguments before the star, and the history it returns, are those of dpo.train. The others
    are exchanged by handing, for example, functools.partial(train, max_norm=None) to `launch`.

    objective(policy, reference, pairs, beta): returns the loss, a mean over this process's pairs,
        and the log, {name: mean}. Its attribute `logged` lists the names of the log, `loss` among
        them. `pairs` is whatever make_pairs has returned; an objective for other things than pairs
        comes with its own make_pairs, and counts what len() counts.
    make_optimizer(parameters, lr): an optimizer such as Adam.
    max_norm: gradients are clipped to this norm; None for no clipping.
    divisor: the losses of all pairs are summed and divided by this number instead of the number of
        pairs, so a round with few pairs has a small gradient. (Adam undoes part of that.)
    update_reference(policy, reference, step): called in every process before each round; it may
        change the reference in place.
    stop(row): asked on rank 0 after each round's report; True ends training in all processes.
    """
    rng = data.random_stream(seed, "DPO pairs", world.rank)
    parameters = policy.parameters()
    optimizer = make_optimizer(parameters, lr)
    history = [{"round": 0, "pairs": 0}]
    rounds_without_pairs = 0
    if world.rank == 0:
        report(history[0], policy, None)

    for step in range(rounds):
        # 1. Pairs, as in dpo.train.
        if update_reference is not None:
            update_reference(policy, reference, step)
        pairs = make_pairs(policy, step, world, rng)
        n_pairs = int(world.all_reduce(len(pairs)))  # of all processes
        row = {"round": step + 1, "pairs": n_pairs}

        if n_pairs > 0:
            # 2. The objective and its gradient, summed over all processes.
            log = dict.fromkeys(objective.logged, 0.0)
            if len(pairs) > 0:  # a process that found none takes part below with zeros
                loss, log = objective(policy, reference, pairs, beta)
                (loss * (len(pairs) / (divisor or n_pairs))).backward()
            world.all_reduce_gradients(parameters)
            share = len(pairs) / n_pairs
            means = world.all_reduce([share * log[name] for name in objective.logged])
            row |= zip(objective.logged, means.tolist())
            if not math.isfinite(row["loss"]):
                raise cli.UserError(f"loss {row['loss']} in round {step + 1}; try a lower rate")

            # 3. One step down the gradient.
            if max_norm is not None:
                clip_grad_norm(parameters, max_norm)
            optimizer.lr = cosine_schedule(step, rounds, lr, warmup=10)
            optimizer.step()
            optimizer.zero_grad()

        history.append(row)
        if world.rank == 0:
            report(row, policy, pairs)
        rounds_without_pairs = 0 if n_pairs > 0 else rounds_without_pairs + 1
        if rounds_without_pairs == dpo.PATIENCE:
            break
        # Only rank 0 has measured the policy, so it decides, and tells the others.
        if stop is not None:
            wants_to_stop = world.rank == 0 and stop(row)
            if world.all_reduce(int(wants_to_stop)) > 0:
                break
    return history
