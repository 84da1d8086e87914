"""DPO: teach a trained Transformer a preference, exactly three numbers, and keep its sums right."""
import itertools
import math
import random
from pathlib import Path
from typing import NamedTuple

import tinygrad_lite.functional as F
from tinygrad_lite import Adam, World, clip_grad_norm, cosine_schedule, launch, no_grad
import numpy as np

import cli
import data
import eval as evaluation
from sft import SHARD, completion_logps

PATIENCE = 10  # rounds in a row without a pair before a run ends
MEASUREMENTS = 40  # of the held-out targets, during a run
LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
          "logps/chosen", "logps/rejected")  # TRL's names


# The objective.

def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps, beta):
    """- mean over pairs of log sigmoid(beta h): four times (pairs,) -> scalar Tensor.

    Rafailov et al. 2023, Eq. 7. With y_w the chosen and y_l the rejected completion of prompt x,
        h = log(pi(y_w | x) / pi_ref(y_w | x)) - log(pi(y_l | x) / pi_ref(y_l | x))
    where pi is the policy, pi_ref the frozen reference, and a log-probability sums over tokens.
    Regrouped, h = (policy chosen - policy rejected) - (reference chosen - reference rejected). The
    gradient flows to the policy: dL/d(chosen) = - beta sigmoid(-beta h) / pairs = - dL/d(rejected);
    the reference's are arrays, or Tensors made under no_grad. Raises ValueError for unlike shapes.
    """
    if len({logps.shape for logps in (policy_chosen_logps, policy_rejected_logps,
                                      reference_chosen_logps, reference_rejected_logps)}) > 1:
        raise ValueError("the four log-probabilities must have one shape, (pairs,)")
    policy_log_ratio = policy_chosen_logps - policy_rejected_logps
    reference_log_ratio = reference_chosen_logps - reference_rejected_logps
    h = policy_log_ratio - reference_log_ratio
    return -F.log_sigmoid(beta * h).mean()


def pair_logps(model, pairs):
    """log p(completion | prompt) of chosen and rejected, in one forward: ids (P, 2, T) -> (P,)
    each."""
    logps = completion_logps(model, pairs.reshape(-1, pairs.shape[-1]))  # chosen, rejected, ...
    return logps[::2], logps[1::2]


def rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """What a DPO run logs of log-probabilities (pairs,), under TRL's names; means over pairs.

    A reward is beta log(pi / pi_ref) (Rafailov et al. 2023, section 4).
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    columns = {"rewards/chosen": chosen, "rewards/rejected": rejected,
               "rewards/margins": chosen - rejected, "rewards/accuracies": chosen > rejected,
               "logps/chosen": policy_chosen, "logps/rejected": policy_rejected}
    return {name: float(np.mean(values)) for name, values in columns.items()}


# Preference pairs. A source of them is a generator of one Round after the other, in every process
# its own part.

class Round(NamedTuple):
    """`pairs`: ids (P, 2, T), the chosen line first; P may be 0. `n_good` and `n_other`: of the
    answers they come from, those that could be chosen and those that could be rejected."""
    pairs: np.ndarray
    n_good: int
    n_other: int


def judged_round(model, targets, n_answers, prefer, rng):
    """A Round of n_answers of the model to each of the targets, sampled and judged.

    Answers to one target that are right and preferred are paired off with others, one to one; what
    is left over is dropped.
    """
    lines = evaluation.sample(model, np.repeat(targets, n_answers).tolist(), 1.0, rng)
    paired, n_good = [], 0
    for start in range(0, len(lines), n_answers):
        answers = lines[start:start + n_answers]
        good = [line for line in answers if data.judge(line, prefer).outcome == data.OUTCOMES[0]]
        others = [line for line in answers if line not in good]
        for chosen, rejected in zip(good, others):
            paired += [chosen, rejected]
        n_good += len(good)
    pairs = data.pad(paired, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN)
    return Round(pairs, n_good, len(lines) - n_good)


def online_rounds(policy, n_prompts, n_answers, prefer, rng):
    """Answers sampled afresh for every round, from the policy as it is by then."""
    while True:
        yield judged_round(policy, rng.choice(data.TRAINING, n_prompts), n_answers, prefer, rng)


def once_rounds(reference, n_prompts, n_answers, prefer, rng):
    """Answers sampled once, from the reference, for 50 rounds, which come again and again, their
    pairs in another order each time."""
    targets = rng.choice(data.TRAINING, 50 * n_prompts)
    pairs, n_good, n_other = judged_round(reference, targets, n_answers, prefer, rng)
    while True:
        rng.shuffle(pairs)
        for part in np.array_split(pairs, 50):
            yield Round(part, n_good, n_other)


def rule_rounds(n_pairs, prefer, rng):
    """Right sums made by rule, the chosen with `prefer` terms, the rejected with another number.

    The recipe of the demo that this project starts from. It does not ask `data.prefers`.
    """
    rng = random.Random(int(rng.integers(2 ** 63)))
    others = [k for k in data.COUNTS if k != prefer]
    while True:
        lines = [data.random_line(target, count, rng)
                 for target in rng.choices(data.TRAINING, k=n_pairs)
                 for count in (prefer, rng.choice(others))]
        yield Round(data.pad(lines, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN), n_pairs, n_pairs)


# Training.

def loss_and_log(policy, reference, pairs, beta):
    """`dpo_loss` of pairs, ids (P, 2, T), and what a run logs of them."""
    policy_logps = pair_logps(policy, pairs)
    with no_grad():
        reference_logps = pair_logps(reference, pairs)
    loss = dpo_loss(*policy_logps, *reference_logps, beta)
    numbers = (logps.numpy() for logps in (*policy_logps, *reference_logps))
    return loss, {"loss": loss.item(), **rewards(*numbers, beta)}


def train(policy, reference, source, rounds, beta, lr, world=World()):
    """The DPO loop, in every process of `world`: one step for each Round of `source`. Yields logs.

    Trains `policy` in place; `reference` is only read. A log is a dict about the pairs of all
    processes before the step: at first policy and reference are one, the loss is ln 2. A round
    without pairs is skipped, with 0 "pairs" in its log. After PATIENCE of them in a row training
    ends, if nothing is left to reject; if nothing could be chosen, that is a UserError. So is a
    loss that is no longer finite.
    """
    parameters = policy.parameters()
    optimizer = Adam(parameters, lr, betas=(0.9, 0.99))
    skipped = []
    for step, (pairs, n_good, n_other) in zip(range(rounds), source):
        n_pairs, n_good, n_other = world.all_reduce([len(pairs), n_good, n_other]).tolist()
        if n_pairs == 0:
            yield {"round": step + 1, "pairs": 0}
            skipped.append((n_good, n_other))
            if len(skipped) == PATIENCE:
                return check_nothing_left(skipped)
            continue
        skipped, log = [], np.zeros(len(LOGGED))
        for shard in data.by_length(pairs, SHARD // 2):
            loss, shard_log = loss_and_log(policy, reference, shard, beta)
            weight = len(shard) / n_pairs
            loss = loss * weight
            loss.backward()
            log += weight * np.array(list(shard_log.values()))
        world.all_reduce_gradients(parameters)
        log = dict(zip(LOGGED, world.all_reduce(log).tolist()))
        if not math.isfinite(log["loss"]):
            raise cli.UserError(f"the loss is {log['loss']} in round {step + 1}; try a lower --lr "
                                f"or --beta")
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, rounds, lr, warmup=10)
        optimizer.step()
        optimizer.zero_grad()
        yield {"round": step + 1, "pairs": n_pairs, **log}


def check_nothing_left(skipped):
    """UserError unless most answers of these rounds without pairs were right and preferred."""
    n_good, n_other = np.sum(skipped, axis=0)
    if n_good <= n_other:
        raise cli.UserError(
            f"no pair in {PATIENCE} rounds in a row: {n_good:,} of {n_good + n_other:,} answers "
            f"were right and preferred; ask for more --answers, or train SFT longer")


def held_out_pairs(reference, prefer):
    """At most 200 pairs of the reference's answers to held-out targets, always the same."""
    rng = np.random.default_rng(0)
    return judged_round(reference, data.HELD_OUT * 10, 8, prefer, rng).pairs[:200]


def measure(policy, reference, pairs, beta, prefer):
    """What a run logs of held-out targets: of fixed pairs, under TRL's names, and the shares of
    what the policy answers."""
    with no_grad():
        log = loss_and_log(policy, reference, pairs, beta)[1] if len(pairs) else {}
    # Always with the same random numbers: what changes from call to call is the policy.
    lines = evaluation.sample(policy, data.HELD_OUT * 20, 1.0, np.random.default_rng(0))
    return {**{f"eval_{name}": value for name, value in log.items()},
            "shares": evaluation.outcome_shares(lines, prefer)}


def train_policy(world, arguments):
    """What every process runs: from the SFT checkpoint to a trained policy. Returns policy,
    reference, history and seconds."""
    reference, policy = evaluation.load(arguments.sft), evaluation.load(arguments.sft)
    beta, prefer, rounds = arguments.beta, arguments.prefer, arguments.rounds
    rng = np.random.default_rng([arguments.seed, world.rank])
    part = len(world.share(range(arguments.prompts)))  # prompts of this process
    source = {"online": lambda: online_rounds(policy, part, arguments.answers, prefer, rng),
              "once": lambda: once_rounds(reference, part, arguments.answers, prefer, rng),
              "rule": lambda: rule_rounds(part, prefer, rng)}[arguments.pairs]()
    history, progress = [], cli.Progress(rounds, "round")
    if world.rank == 0:
        first, fixed_pairs = next(source), held_out_pairs(reference, prefer)
        source = itertools.chain([first], source)
        for chosen, rejected in first.pairs[:3]:
            print(f"chosen {data.decode(chosen):{data.MAX_LEN}} rejected {data.decode(rejected)}")
        history.append({"round": 0, "pairs": 0,
                        **measure(policy, reference, fixed_pairs, beta, prefer)})
    for row in train(policy, reference, source, rounds, beta, arguments.lr, world):
        if world.rank == 0:
            if row["round"] % max(1, rounds // MEASUREMENTS) == 0:
                row |= measure(policy, reference, fixed_pairs, beta, prefer)
            history.append(row)
            progress.show(row["round"], progress_text(row))
    return policy, reference, history, progress.seconds()


def progress_text(row):
    """A round's log as text."""
    if row["pairs"] == 0:
        return "no pairs"
    return (f"{row['pairs']:3} pairs  loss {row['loss']:.3f}  margin {row['rewards/margins']:.2f}  "
            f"accuracy {row['rewards/accuracies']:.2f}")


# The program.

def parse_arguments(argv):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--pairs", choices=["online", "once", "rule"], default="online",
        help="the policy's own answers, judged, sampled afresh for every round; answers sampled "
             "once, from the SFT model; or right sums made by rule")
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="the preferred number of terms")
    add("--rounds", type=cli.whole(1), default=1500, help="rounds of pairs, with one step each")
    add("--prompts", type=cli.whole(1), default=96, help="targets (by rule: pairs) in a round")
    add("--answers", type=cli.whole(2), default=8, help="answers sampled for each target")
    add("--lr", type=cli.positive, default=2e-4, help="peak learning rate of Adam")
    add("--sft", type=Path, default=Path("runs/sft.npz"), help="where policy and reference start")
    add("--seed", type=cli.whole(0, 2 ** 63 - 1), default=0, help="of the pairs")
    add("--processes", type=cli.whole(1, 64), default=2, help="processes that share each round")
    add("--out", type=cli.checkpoint_path, default=Path("runs/dpo.npz"),
        help="the checkpoint to write; a .json and pictures go beside it")
    return parser.parse_args(argv)


def main(argv=None):
    """Train from the SFT checkpoint; write checkpoint, log and pictures; print before and after."""
    arguments = parse_arguments(argv)
    out, prefer = arguments.out, arguments.prefer
    if out.resolve() == arguments.sft.resolve():
        raise cli.UserError("--out would overwrite --sft; choose another name")
    log, terms_picture, training_picture = cli.outputs(out, ".json", "-dist.png", "-training.png")
    evaluation.load(arguments.sft)  # a mistake is told before processes start
    policy, reference, history, seconds = launch(arguments.processes, train_policy, arguments)
    if history[-1]["round"] < arguments.rounds:
        print(f"nothing left to reject: training ended after round {history[-1]['round']:,}")

    evaluation.save(policy, out)
    import plots  # here, so that --help need not wait for matplotlib
    models = {str(arguments.sft): reference, str(out): policy}
    rows = evaluation.evaluate(models, prefer=prefer)
    cli.write_json(log, {"settings": vars(arguments), "seconds": seconds, "history": history,
                         "metrics": rows})
    plots.distribution(rows, terms_picture, prefer)
    plots.dpo_training(history, training_picture)
    print(f"\n{evaluation.table(rows)}\n")
    for target in evaluation.EXAMPLES:
        for name, model in (("SFT", reference), ("DPO", policy)):
            print(name, evaluation.answer_line(evaluation.answers_to(model, target, 0)[0]))
    print(f"\nwrote {out}; now try: python eval.py {out} --prompt 100")


if __name__ == "__main__":
    cli.run(main)
