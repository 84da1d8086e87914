"""DPO: teach a trained Transformer a preference, such as exactly three numbers, and keep its sums right."""
if __name__ == "__main__":  # flags first: --help and mistakes are answered before NumPy loads
    import cli
    raise SystemExit(cli.main("dpo"))

import math
from concurrent.futures import ThreadPoolExecutor

import tinygrad_lite.functional as F
from tinygrad_lite import Adam, clip_grad_norm, cosine_schedule, no_grad, value_and_grad
import numpy as np

import data
import eval as evaluation
import plots
from cli import Progress, UserError, settings
from sft import SHARD, completion_logps
from transformer import write_json

PATIENCE = 10  # rounds in a row without a pair before a run gives up


# The objective.

def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """- mean over pairs of log sigmoid(beta h): four times (pairs,) -> scalar Tensor.

    Rafailov et al. 2023, Eq. 7. With y_w the chosen and y_l the rejected completion of a prompt x,
        h = log pi(y_w | x) / pi_ref(y_w | x) - log pi(y_l | x) / pi_ref(y_l | x)
    where pi is the policy, pi_ref the frozen reference, and each log-probability a sum over tokens. Gradients
    flow to the policy's: dL/d(chosen) = - beta sigmoid(-beta h) / pairs = - dL/d(rejected).
    """
    h = (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)
    return -F.log_sigmoid(beta * h).mean()


# Preference pairs: chosen and rejected lines (pairs, T) each, ids padded to one length.

def prefers(line, prefer):
    """The preference itself: does an answer (ids) parse, sum to its target and have `prefer` terms?

    To teach another preference, change this function.
    """
    parsed = data.read(line)
    return parsed is not None and sum(parsed[1]) == parsed[0] and len(parsed[1]) == prefer


def rule_pairs(n, prefer, rng):
    """n pairs made by rule: both sums are right, the chosen one has `prefer` terms, the rejected one another count."""
    targets = rng.choice(data.TRAINING, n)
    others = [k for k in range(data.MIN_TERMS, data.MAX_TERMS + 1) if k != prefer]
    counts = np.concatenate([np.full(n, prefer), rng.choice(others, n)])
    both = np.tile(targets, 2)
    lines = data.encode_lines(both, data.random_terms(both, counts, rng))
    return lines[:n], lines[n:]


def sampled_pairs(model, prompts, answers, prefer, rng, map_fn):
    """The model's own answers to training targets, judged by `prefers`, preferred and other answers paired off.

    `prompts` targets with `answers` each; a target whose answers are all of one kind gives no pair. None if
    no target gives any.
    """
    targets = [int(t) for t in rng.choice(data.TRAINING, prompts, replace=prompts > len(data.TRAINING))]
    lines = evaluation.sample(model, [t for t in targets for _ in range(answers)], 1.0, rng, map_fn)
    chosen, rejected = [], []
    for start in range(0, len(lines), answers):
        own = lines[start:start + answers]
        good = [line for line in own if prefers(line, prefer)]
        bad = [line for line in own if not prefers(line, prefer) and data.PAD not in line]
        for c, r in zip(good, bad):
            chosen.append(c)
            rejected.append(r)
    if not chosen:
        return None
    both = data.pad(chosen + rejected)
    return both[:len(chosen)], both[len(chosen):]


# Training.

def pair_logps(model, pairs):
    """Log-probabilities of chosen and rejected completions, in one forward: (P, T) twice -> (P,) twice."""
    logps = completion_logps(model, np.concatenate(pairs))
    return logps[:len(pairs[0])], logps[len(pairs[0]):]


def train(model, reference, make_pairs, rounds, beta, lr, map_fn):
    """The DPO loop: each round asks `make_pairs()` for pairs and takes one step. Yields the round's log, a dict.

    `reference` is only read. A round without a pair is skipped, with "pairs" 0 in its log.
    """
    parameters = model.parameters()
    optimizer = Adam(parameters, lr, betas=(0.9, 0.99))
    without = 0
    for step in range(rounds):
        pairs = make_pairs()
        without = without + 1 if pairs is None else 0
        if without == PATIENCE:
            raise UserError(f"no prompt had both a preferred and another answer in {PATIENCE} rounds in a row; "
                            f"train a better SFT model, or ask for more --answers")
        if pairs is None:
            yield {"round": step + 1, "pairs": 0}
            continue

        n_pairs = len(pairs[0])

        def shard_loss(shard):
            with no_grad():
                reference_logps = pair_logps(reference, *shard)
            policy_logps = pair_logps(model, *shard)
            loss = dpo_loss(*policy_logps, *reference_logps, beta) * (len(shard[0]) / n_pairs)
            return loss, [logps.numpy() for logps in (*policy_logps, *reference_logps)]

        results = value_and_grad(shard_loss, parameters, data.by_length(*pairs, size=SHARD // 2), map_fn)
        loss = math.fsum(loss for loss, _ in results)
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} in round {step + 1}; try a lower --lr than {lr:g}")
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, rounds, lr, warmup=10)
        optimizer.step()
        yield {"round": step + 1, "pairs": n_pairs, "loss": loss,
               **rewards(*np.concatenate([logps for _, logps in results], axis=1), beta)}


def pair_logps(model, chosen, rejected):
    """Log-probabilities of chosen and rejected completions, in one forward: ids (P, T) each -> (P,) each."""
    logps = completion_logps(model, np.concatenate([chosen, rejected]))
    return logps[:len(chosen)], logps[len(chosen):]


def rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """What a DPO run logs, from the log-probabilities (pairs,): means of beta log pi / pi_ref and of log pi."""
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return {name: float(np.mean(values)) for name, values in {
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected, "logps/chosen": policy_chosen,
        "logps/rejected": policy_rejected}.items()}


def masses(model, prefer, rng, map_fn, answers=20):
    """Where the probability lies: shares of answers to held-out targets, sampled at temperature 1, by kind."""
    lines = evaluation.sample(model, data.HELD_OUT * answers, 1.0, rng, map_fn)
    kinds = dict.fromkeys(("right, preferred", "right, other count", "wrong sum", "does not parse"), 0)
    for line in lines:
        parsed = data.read(line)
        if parsed is None:
            kinds["does not parse"] += 1
        elif sum(parsed[1]) != parsed[0]:
            kinds["wrong sum"] += 1
        else:
            kinds["right, preferred" if prefers(line, prefer) else "right, other count"] += 1
    return {kind: count / len(lines) for kind, count in kinds.items()}


def main(arguments):
    """Train from the SFT checkpoint, show before and after, and write checkpoint, facts and pictures."""
    out, prefer = arguments.out, arguments.prefer
    reference, model = evaluation.load(arguments.sft), evaluation.load(arguments.sft)
    rng = np.random.default_rng(arguments.seed)
    with ThreadPoolExecutor(arguments.threads) as pool:
        def make_pairs():
            if arguments.pairs == "rule":
                return rule_pairs(arguments.prompts, prefer, rng)
            return sampled_pairs(model, arguments.prompts, arguments.answers, prefer, rng, pool.map)

        progress, history = Progress(arguments.rounds), []
        measure = max(1, arguments.rounds // 40)
        for row in train(model, reference, make_pairs, arguments.rounds, arguments.beta, arguments.lr, pool.map):
            if row["round"] % measure == 0:
                row["masses"] = masses(model, prefer, np.random.default_rng(0), pool.map)
            history.append(row)
            if row["pairs"] == 0:
                print(f"round {row['round']}: no prompt had both a preferred and another answer; skipped")
            else:
                progress.show(row["round"], f"loss {row['loss']:.3f}  margin {row['rewards/margins']:.2f}  "
                                            f"accuracy {row['rewards/accuracies']:.2f}  pairs {row['pairs']}")
        seconds = progress.seconds()
        before, after = (evaluation.evaluate(m, 0, prefer, pool.map) for m in (reference, model))
    rows = [{"checkpoint": name, **row} for name, results in (("SFT", before), ("DPO", after)) for row in results]
    model.save(out, prefer=prefer)
    write_json(out.with_suffix(".json"), {"settings": settings(arguments), "seconds": seconds,
                                          "history": history, "metrics": rows})
    plots.distribution(rows, out.with_name(f"{out.stem}-dist.png"), prefer)
    plots.dpo_training(history, out.with_name(f"{out.stem}-training.png"))
    print(f"\n{evaluation.table(rows, prefer)}\n")
    for target in evaluation.EXAMPLES:
        for name, m in (("SFT", reference), ("DPO", model)):
            print(name, evaluation.shown(evaluation.answers_to(m, target, 0, 1.0, 0)[0]))
    print(f"\nwrote {out}; now try: python eval.py {out} --prompt 100")
