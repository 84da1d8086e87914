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
from tinygrad_lite import Adam, clip_grad_norm, cosine_schedule, functional as F, no_grad
import numpy as np

import cli
import data
import dpo
import eval as evaluation

# Where pairs come from: functions of (starts, answers, prefer) that return the make_pairs of a
# training loop. dpo.pairs_maker has three more.


def fresh(pairing, starts, answers, prefer):
    """Pairs of the policy's fresh answers, made by a pairing (below), and none by rule."""
    return functools.partial(
        fresh_pairs, pairing=pairing, starts=starts, answers=answers, prefer=prefer
    )


def fresh_pairs(policy, step, world, rng, pairing, starts, answers, prefer):
    numbers = range(starts[step] + world.rank, starts[step + 1], world.world_size)
    targets = rng.choice(data.TRAINING, len(numbers))
    return sample_pairs(policy, targets, pairing, answers, prefer, rng)


def sample_pairs(policy, targets, pairing, n_answers, prefer, rng):
    """The policy answers each target n_answers times, and a pairing makes pairs: ids (P, 2, T)."""
    answers = evaluation.sample(policy, np.repeat(targets, n_answers), 1.0, rng)
    lines = []
    for start in range(0, len(answers), n_answers):
        for chosen, rejected in pairing(answers[start : start + n_answers], prefer, rng):
            lines += [chosen, rejected]
    return data.pad(lines, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN)


# Pairings: functions of (answers to one target, prefer, rng) that return [(chosen, rejected), ...].


def accepted_over_rejected(answers, prefer, rng):
    """Each accepted answer with a rejected one, as dpo.py pairs them."""
    accepted = [line for line in answers if data.is_accepted(line, prefer)]
    rejected = [line for line in answers if not data.is_accepted(line, prefer)]
    return list(zip(accepted, rejected))


def level(line, prefer):
    """A grade: one point for a right sum, one for the preferred number of terms."""
    judgement = data.judge(line, prefer)
    return int(judgement.exact) + int(judgement.preferred)


def graded(answers, prefer, rng):
    """Any two whose levels differ, the higher one chosen. So a right sum that is not preferred is
    also compared with wrong ones, unless those have the preferred number of terms. Neighbours are
    paired, so no answer is in two pairs."""
    pairs = []
    for first, second in zip(answers[::2], answers[1::2]):
        difference = level(first, prefer) - level(second, prefer)
        if difference != 0:
            pairs.append((first, second) if difference > 0 else (second, first))
    return pairs


def graded_with_noise(answers, prefer, rng):
    """The same with labels drawn by Bradley-Terry, for a reward of 2 a level. A pair that is used
    again keeps its label."""
    pairs = []
    for chosen, rejected in graded(answers, prefer, rng):
        difference = 2 * (level(chosen, prefer) - level(rejected, prefer))
        is_kept = rng.random() < 1 / (1 + np.exp(-difference))
        pairs.append((chosen, rejected) if is_kept else (rejected, chosen))
    return pairs


def best_over_worst(answers, prefer, rng):
    """One pair a target: an answer of the highest level over one of the lowest."""
    by_level = sorted(answers, key=lambda line: level(line, prefer))
    worst, best = by_level[0], by_level[-1]
    return [(best, worst)] if level(best, prefer) > level(worst, prefer) else []


# A policy that has stopped writing an answer is never rewarded for it again: dpo.online_pairs
# without any sums made by rule.
own = functools.partial(fresh, accepted_over_rejected)


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


class FixedPairs:
    """Pairs of answers that the SFT model gives once, before the first step. When all have been
    used, they come again in another order.

    n_targets: how many prompts are answered, drawn from the 76 training targets. A round has as
        many pairs as `starts` says.
    """

    def __init__(self, pairing, starts, answers, prefer, n_targets=9600):
        self.pairing, self.n_targets = pairing, n_targets
        self.starts, self.answers, self.prefer = starts, answers, prefer

    def __call__(self, policy, step, world, rng):
        if step == 0:  # the policy is still the SFT model
            n_targets = len(range(world.rank, self.n_targets, world.world_size))
            targets = rng.choice(data.TRAINING, n_targets)
            self.pairs = sample_pairs(policy, targets, self.pairing, self.answers, self.prefer, rng)
            self.unused = rng.permutation(self.pairs)
        n_pairs = len(
            range(self.starts[step] + world.rank, self.starts[step + 1], world.world_size)
        )
        while 0 < len(self.pairs) and len(self.unused) < n_pairs:
            self.unused = np.concatenate([self.unused, rng.permutation(self.pairs)])
        pairs, self.unused = np.split(self.unused, [n_pairs])
        return pairs


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


def smoothed_loss(chosen, rejected, reference_chosen, reference_rejected, beta, smoothing):
    """Conservative DPO: the label of a pair is right with probability 1 - smoothing only.

    -mean((1 - smoothing) log sigmoid(beta h) + smoothing log sigmoid(-beta h)), with the arguments
    of dpo.dpo_loss (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO").
    It is least at a finite margin, beta h = log((1 - smoothing) / smoothing).
    """
    h = (chosen - rejected) - (reference_chosen - reference_rejected)
    kept, flipped = F.log_sigmoid(beta * h), F.log_sigmoid(-beta * h)
    return -((1 - smoothing) * kept + smoothing * flipped).mean()


def ipo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """IPO: the mean of (h - 1 / (2 beta))^2, with the arguments of dpo.dpo_loss (Azar et al. 2023,
    Eq. 17, whose tau is beta). It is least at a finite h."""
    h = (chosen - rejected) - (reference_chosen - reference_rejected)
    return ((h - 1 / (2 * beta)) ** 2).mean()


# The loop.


def adam(parameters, lr):
    """The optimizer of dpo.train."""
    return Adam(parameters, lr, betas=(0.9, 0.99))


def refresh_reference(policy, reference, step, every):
    """For `update_reference`: every so many rounds, the reference becomes the policy as it is."""
    if step > 0 and step % every == 0:
        parameters = policy.named_parameters()
        for name, parameter in reference.named_parameters().items():
            parameter.data = parameters[name].data.copy()


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
