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
from cli import Progress, UserError
from sft import SHARD, completion_logps

PATIENCE = 10  # rounds in a row without a pair before a run ends
ROUNDS_SAMPLED_ONCE = 50  # rounds' worth of answers that --pairs once samples before training
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


# Preference pairs. Each source is a generator: what it yields for every round is this process's part.

class Round(NamedTuple):
    """`pairs`: ids (P, 2, T), the chosen line first, P may be 0. `n_good` and `n_other`: how many
    answers could be chosen, and how many could be rejected."""
    pairs: np.ndarray
    n_good: int
    n_other: int


def judged_round(model, targets, n_answers, prefer, rng):
    """A Round of n_answers of the model to each of the targets, sampled and judged.

    Answers to one target that are right and preferred are paired off with others, one to one; what
    is left over is dropped.
    """
    lines = evaluation.sample(model, np.repeat(targets, n_answers).tolist(), 1.0, rng)
    pairs, n_good = [], 0
    for start in range(0, len(lines), n_answers):
        answers = lines[start:start + n_answers]
        good = [line for line in answers if data.judge(line, prefer).outcome == data.OUTCOMES[0]]
        pairs += zip(good, [line for line in answers if line not in good])
        n_good += len(good)
    flat = [line for pair in pairs for line in pair]
    return Round(data.pad(flat, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN), n_good,
                 len(lines) - n_good)


def online_rounds(policy, n_prompts, n_answers, prefer, rng):
    """Answers sampled afresh for every round, from the policy as it is by then."""
    while True:
        yield judged_round(policy, rng.choice(data.TRAINING, n_prompts), n_answers, prefer, rng)


def once_rounds(reference, n_prompts, n_answers, prefer, rng):
    """Answers sampled once, from the reference; every round takes the next of their pairs, in
    another order each time they have all been seen."""
    targets = rng.choice(data.TRAINING, n_prompts * ROUNDS_SAMPLED_ONCE)
    pairs, n_good, n_other = judged_round(reference, targets, n_answers, prefer, rng)
    while True:
        rng.shuffle(pairs)
        for part in np.array_split(pairs, ROUNDS_SAMPLED_ONCE):
            yield Round(part, n_good, n_other)


def rule_rounds(n_pairs, prefer, rng):
    """Right sums made by rule, the chosen with `prefer` terms, the rejected with another number.

    The recipe of the demo that this project starts from. It does not ask `data.prefers`.
    """
    rng = random.Random(int(rng.integers(2 ** 63)))
    others = [k for k in data.COUNTS if k != prefer]
    while True:
        targets = rng.choices(data.TRAINING, k=n_pairs)
        lines = [data.random_line(target, count, rng) for target in targets
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
    processes before the step: at first policy and reference are one, the loss is log 2. A round
    without pairs is skipped, with 0 "pairs" in its log; after PATIENCE of them in a row training
    ends, if that is because nothing is left to reject, or else raises UserError. It raises one,
    too, when the loss is no longer finite.
    """
    parameters = policy.parameters()
    optimizer = Adam(parameters, lr, betas=(0.9, 0.99))
    skipped = []
    for step, (pairs, n_good, n_other) in zip(range(rounds), source):
        n_pairs, *tally = world.all_reduce([len(pairs), n_good, n_other]).tolist()
        if n_pairs == 0:
            yield {"round": step + 1, "pairs": 0}
            skipped.append(tally)
            if len(skipped) < PATIENCE:
                continue
            n_good, n_other = np.sum(skipped, axis=0)
            if n_good > n_other:
                return
            raise UserError(f"no pairs in {PATIENCE} rounds in a row: of {n_good + n_other:,} answers "
                            f"{n_good:,} were right and preferred; raise --answers or train SFT longer")
        skipped, log = [], {}
        for shard in data.by_length(pairs, SHARD // 2):
            loss, shard_log = loss_and_log(policy, reference, shard, beta)
            weight = len(shard) / n_pairs
            loss = loss * weight
            loss.backward()
            log = {name: log.get(name, 0.0) + weight * value for name, value in shard_log.items()}
        world.all_reduce_gradients(parameters)
        log = dict(zip(LOGGED, world.all_reduce([log.get(name, 0.0) for name in LOGGED]).tolist()))
        if not math.isfinite(log["loss"]):
            raise UserError(f"the loss became {log['loss']} in round {step + 1}; try a lower --lr "
                            f"or --beta")
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, rounds, lr, warmup=10)
        optimizer.step()
        optimizer.zero_grad()
        yield {"round": step + 1, "pairs": n_pairs, **log}


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
    source, history = rounds_of(world, policy, reference, arguments), []
    if world.rank == 0:
        first, eval_pairs = next(source), held_out_pairs(reference, prefer)
        for chosen, rejected in first.pairs[:3]:
            print(f"chosen {data.decode(chosen):{data.MAX_LEN}}  rejected {data.decode(rejected)}")
        source = itertools.chain([first], source)
        history = [{"round": 0, "pairs": 0, **measure(policy, reference, eval_pairs, beta, prefer)}]
    progress = Progress(rounds, "round")
    for row in train(policy, reference, source, rounds, beta, arguments.lr, world):
        if world.rank > 0:
            continue
        if row["round"] % max(1, rounds // MEASUREMENTS) == 0:
            row |= measure(policy, reference, eval_pairs, beta, prefer)
        history.append(row)
        progress.show(row["round"], f"{row['pairs']} pairs" + ("  loss {loss:.3f}  margin "
                      "{rewards/margins:.2f}  accuracy {rewards/accuracies:.2f}".format(**row)
                      if row["pairs"] else ""))
    return policy, reference, history, progress.seconds()


def rounds_of(world, policy, reference, arguments):
    """This process's source of pairs."""
    rng = np.random.default_rng([arguments.seed, world.rank])
    n_prompts = len(world.share(range(arguments.prompts)))
    if arguments.pairs == "rule":
        return rule_rounds(n_prompts, arguments.prefer, rng)
    make_rounds, model = {"once": (once_rounds, reference),
                          "online": (online_rounds, policy)}[arguments.pairs]
    return make_rounds(model, n_prompts, arguments.answers, arguments.prefer, rng)


# The program.

def parse_arguments(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--pairs", choices=["online", "once", "rule"], default="online",
        help="the policy's own answers, judged, sampled afresh for every round; answers sampled "
             "once, from the SFT model; or right sums made by rule")
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="the preferred number of terms")
    add("--rounds", type=cli.count, default=1500, help="rounds of pairs, with one step each")
    add("--prompts", type=cli.count, default=96, help="targets (or, made by rule, pairs) in a round")
    add("--answers", type=cli.several, default=8, help="answers sampled for each target")
    add("--lr", type=cli.positive, default=2e-4, help="peak learning rate of Adam")
    add("--sft", type=Path, default=Path("runs/sft.npz"), help="where policy and reference start")
    add("--seed", type=cli.seed, default=0, help="of the pairs; same seed, same run")
    add("--processes", type=cli.processes, default=2, help="processes that share each round")
    add("--out", type=cli.checkpoint_path, default=Path("runs/dpo.npz"),
        help="the checkpoint to write; a .json and pictures go beside it")
    return parser.parse_args(argv)


def main(argv=None):
    """Train from the SFT checkpoint; write checkpoint, log and pictures; print before and after."""
    arguments = parse_arguments(argv)
    out, prefer = arguments.out, arguments.prefer
    if out.resolve() == arguments.sft.resolve():
        raise UserError("--out would overwrite --sft; choose another name")
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
