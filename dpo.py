"""DPO: teach a trained Transformer a preference, exactly three numbers, and keep its sums right."""
if __name__ == "__main__":  # flags first: --help and mistakes are answered before NumPy loads
    import cli
    raise SystemExit(cli.main("dpo"))

import math
from functools import partial

import tinygrad_lite.functional as F
from tinygrad_lite import (Adam, clip_grad_norm, cosine_schedule, no_grad, parallel_map,
                           value_and_grad)
import numpy as np

import data
import eval as evaluation
import plots
from cli import Progress, UserError
from sft import SHARD, completion_logps
from transformer import write_json

PATIENCE = 10  # rounds in a row without a pair before a run gives up


# The objective.

def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps, beta):
    """- mean over pairs of log sigmoid(beta h): four times (pairs,) -> scalar Tensor.

    Rafailov et al. 2023, Eq. 7. With y_w the chosen and y_l the rejected completion of prompt x,
        h = log(pi(y_w | x) / pi_ref(y_w | x)) - log(pi(y_l | x) / pi_ref(y_l | x))
    where pi is the policy, pi_ref the frozen reference, and a log-probability sums over tokens.
    Regrouped, h = (policy chosen - policy rejected) - (reference chosen - reference rejected). The
    gradient flows to the policy: dL/d(chosen) = - beta sigmoid(-beta h) / pairs = - dL/d(rejected);
    the reference's are arrays, or Tensors made under no_grad.
    """
    policy_log_ratio = policy_chosen_logps - policy_rejected_logps
    reference_log_ratio = reference_chosen_logps - reference_rejected_logps
    h = policy_log_ratio - reference_log_ratio
    return -F.log_sigmoid(beta * h).mean()


def pair_logps(model, chosen, rejected):
    """log p(completion | prompt) of both, in one forward: ids (P, T) each -> (P,) each."""
    logps = completion_logps(model, np.concatenate([chosen, rejected]))
    return logps[:len(chosen)], logps[len(chosen):]


def pairs_loss(model, reference, beta, n_pairs, pairs):
    """The share of `pairs`, (chosen, rejected), in the mean loss of `n_pairs`, and their logps.

    Those are policy chosen, policy rejected, reference chosen, reference rejected: (pairs,) each.
    """
    policy_logps = pair_logps(model, *pairs)
    with no_grad():
        reference_logps = pair_logps(reference, *pairs)
    loss = dpo_loss(*policy_logps, *reference_logps, beta) * (len(pairs[0]) / n_pairs)
    return loss, [logps.numpy() for logps in (*policy_logps, *reference_logps)]


def rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """What a DPO run logs of log-probabilities (pairs,), under the names the field uses.

    A reward is beta log(pi / pi_ref) (Rafailov et al. 2023, section 4); all are means over pairs.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    columns = {"rewards/chosen": chosen, "rewards/rejected": rejected,
               "rewards/margins": chosen - rejected, "rewards/accuracies": chosen > rejected,
               "logps/chosen": policy_chosen, "logps/rejected": policy_rejected}
    return {name: float(np.mean(values)) for name, values in columns.items()}


# Preference pairs: chosen and rejected lines, ids (pairs, T) each, padded to one length.

def rule_pairs(n, prefer, rng):
    """n pairs of right sums made by rule, the chosen with `prefer` terms, the rejected without.

    The demo's recipe, for a preferred number of terms only: it does not ask `data.prefers`.
    """
    targets = np.tile(rng.choice(data.TRAINING, n), 2)
    others = [k for k in data.COUNTS if k != prefer]
    counts = np.concatenate([np.full(n, prefer), rng.choice(others, n)])
    lines = data.encode_lines(targets, data.random_terms(targets, counts, rng))
    return lines[:n], lines[n:]


def sampled_pairs(model, n_prompts, n_answers, prefer, rng, map_fn=map, earlier=None):
    """Pairs of the model's own answers: n_answers to each of n_prompts training targets, judged.

    For each prompt, answers that may be chosen are paired off with others, one to one; what is left
    over is dropped. Where none may be chosen, one given earlier is: a target that the policy has
    lost would never come back otherwise. `earlier`, {target: [line]}, is kept up to date. None if
    there are no pairs.
    """
    earlier = {} if earlier is None else earlier
    targets = np.repeat(rng.choice(data.TRAINING, n_prompts), n_answers).tolist()
    lines, pairs = evaluation.sample(model, targets, 1.0, rng, map_fn), []
    for start in range(0, len(lines), n_answers):
        target, own = targets[start], lines[start:start + n_answers]
        good = [line for line in own if evaluation.kind(line, prefer) == "right, preferred"]
        others = [line for line in own if line not in good]
        earlier[target] = good[:1] or earlier.get(target, [])
        pairs += zip(good or earlier[target], others)
    if not pairs:
        return None
    chosen, rejected = zip(*pairs)
    return np.split(data.pad(chosen + rejected), 2)


# Training.

def train(model, reference, make_pairs, rounds, beta, lr, map_fn=map):
    """The DPO loop: a round asks make_pairs() for pairs and takes one step. Yields logs, as dicts.

    Trains `model` in place; `reference` is only read. A log tells of the pairs before the step: at
    first policy and reference are one, the loss is log 2. A round without pairs is skipped, with 0
    "pairs" in its log. Raises UserError if that goes on, or if the loss is no longer finite.
    """
    parameters = model.parameters()
    optimizer = Adam(parameters, lr, betas=(0.9, 0.99))
    empty = 0
    for step in range(rounds):
        pairs = make_pairs()
        if pairs is None:
            empty += 1
            if empty == PATIENCE:
                raise UserError(f"in {PATIENCE} rounds in a row no target had both a preferred and "
                                f"another answer; ask for more --answers or train SFT longer")
            yield {"round": step + 1, "pairs": 0}
            continue
        empty, n_pairs = 0, len(pairs[0])
        shards = data.by_length(*pairs, size=SHARD // 2)
        loss_fn = partial(pairs_loss, model, reference, beta, n_pairs)
        losses, logps = zip(*value_and_grad(loss_fn, parameters, shards, map_fn))
        loss = math.fsum(losses)
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} in round {step + 1}; try a lower --lr")
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, rounds, lr, warmup=10)
        optimizer.step()
        yield {"round": step + 1, "pairs": n_pairs, "loss": loss,
               **rewards(*np.concatenate(logps, axis=1), beta)}


def masses(model, prefer, map_fn=map, answers=20):
    """Where the probability lies: the kinds of answers to held-out targets, in shares.

    Always with the same random numbers, so that what changes from call to call is the model.
    """
    rng = np.random.default_rng(0)
    lines = evaluation.sample(model, data.HELD_OUT * answers, 1.0, rng, map_fn)
    kinds = [evaluation.kind(line, prefer) for line in lines]
    return {kind: kinds.count(kind) / len(kinds) for kind in plots.KINDS}


def main(arguments):
    """Train from the SFT checkpoint, show before and after, write checkpoint and pictures."""
    out, prefer, rounds = arguments.out, arguments.prefer, arguments.rounds
    if out.resolve() == arguments.sft.resolve():
        raise UserError("--out would overwrite --sft; choose another name")
    reference, model = evaluation.load(arguments.sft), evaluation.load(arguments.sft)
    rng = np.random.default_rng(arguments.seed)
    with parallel_map(arguments.threads) as map_fn:
        if arguments.pairs == "rule":
            make_pairs = partial(rule_pairs, arguments.prompts, prefer, rng)
        else:
            make_pairs = partial(sampled_pairs, model, arguments.prompts, arguments.answers, prefer,
                                 rng, map_fn, earlier={})
        history = [{"round": 0, "pairs": 0, "masses": masses(model, prefer, map_fn)}]
        progress = Progress(rounds, "round")
        for row in train(model, reference, make_pairs, rounds, arguments.beta, arguments.lr,
                         map_fn):
            if row["round"] % max(1, rounds // 40) == 0:
                row["masses"] = masses(model, prefer, map_fn)
            history.append(row)
            if row["pairs"] == 0:
                print(f"round {row['round']} skipped: no target had a preferred and another answer")
                continue
            progress.show(row["round"], f"loss {row['loss']:.3f}  pairs {row['pairs']}  margin "
                          f"{row['rewards/margins']:.2f}  accuracy {row['rewards/accuracies']:.2f}")
        seconds = progress.seconds()
        rows = [{"checkpoint": name, **row} for name, m in (("SFT", reference), ("DPO", model))
                for row in evaluation.evaluate(m, 0, prefer, map_fn)]
    model.save(out)
    write_json(out.with_suffix(".json"), {"settings": vars(arguments), "seconds": seconds,
                                          "history": history, "metrics": rows})
    plots.distribution(rows, out.with_name(f"{out.stem}-dist.png"), prefer)
    plots.dpo_training(history, out.with_name(f"{out.stem}-training.png"))
    print(f"\n{evaluation.table(rows, prefer)}\n")
    for target in evaluation.EXAMPLES:
        for name, m in (("SFT", reference), ("DPO", model)):
            print(f"{name}  {evaluation.shown(evaluation.answers_to(m, target, 0)[0])}")
    print(f"\nwrote {out}; now try: python eval.py {out} --prompt 100")
