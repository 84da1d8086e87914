"""DPO: teach a trained Transformer a preference, by default exactly three numbers."""
import itertools
import random
import time
from pathlib import Path

import tinygrad_lite.functional as F
from tinygrad_lite import Adam, World, clip_grad_norm, cosine_schedule, launch, no_grad
import numpy as np

import cli
import data
import eval as evaluation
from sft import SHARD, completion_logps

PATIENCE = 10  # rounds in a row without a pair after which training ends
LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
          "logps/chosen", "logps/rejected")  # the names that Hugging Face's TRL uses
SHOWN = ("pairs", "loss", "rewards/margins", "rewards/accuracies")  # while it runs


def dpo_loss(policy_chosen_logps, policy_rejected_logps,
             reference_chosen_logps, reference_rejected_logps, beta):
    """- mean over pairs of log sigmoid(beta h): four arrays (P,), for P pairs -> scalar Tensor.

    Rafailov et al. 2023, Eq. 7. With y_w the chosen and y_l the rejected completion of prompt x,
        h = log(pi(y_w | x) / pi_ref(y_w | x)) - log(pi(y_l | x) / pi_ref(y_l | x))
    where pi is the policy, pi_ref the frozen reference, and a log-probability sums over tokens.
    Regrouped, h = (policy chosen - policy rejected) - (reference chosen - reference rejected). The
    gradient flows to the policy: dL/d(chosen) = - beta sigmoid(-beta h) / P = - dL/d(rejected); the
    reference's are arrays, or Tensors made under no_grad. Raises ValueError for unlike shapes."""
    if not (policy_chosen_logps.shape == policy_rejected_logps.shape
            == reference_chosen_logps.shape == reference_rejected_logps.shape):
        raise ValueError("the four log-probabilities must have one shape, (P,)")
    policy_log_ratio = policy_chosen_logps - policy_rejected_logps
    reference_log_ratio = reference_chosen_logps - reference_rejected_logps
    h = policy_log_ratio - reference_log_ratio
    return -F.log_sigmoid(beta * h).mean()


def pair_logps(model, pairs):
    """log p(completion | prompt) of chosen and rejected lines: ids (P, 2, T) -> (P,) each."""
    lines = pairs.reshape(-1, pairs.shape[-1])  # (2P, T): chosen, rejected, chosen, ...
    logps = completion_logps(model, lines)
    return logps[::2], logps[1::2]


def loss_and_log(policy, reference, pairs, beta, sft_weight=0.0):
    """dpo_loss of pairs, ids (P, 2, T), plus sft_weight times the SFT loss of the chosen answers
    (Pang et al. 2024, Eq. 1); and what a run logs, means over pairs in the order of LOGGED. A
    reward is beta log(pi / pi_ref) (Rafailov et al. 2023, section 4)."""
    chosen, rejected = pair_logps(policy, pairs)
    with no_grad():
        reference_chosen, reference_rejected = pair_logps(reference, pairs)
    loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
    if sft_weight:
        n_tokens = data.completion_mask(pairs[:, 0]).sum(axis=1)  # (P,)
        loss = loss - sft_weight * (chosen / n_tokens).mean()
    chosen_rewards = (beta * (chosen - reference_chosen)).numpy()  # (P,)
    rejected_rewards = (beta * (rejected - reference_rejected)).numpy()
    return loss, np.array([np.mean(values) for values in (
        loss.numpy(), chosen_rewards, rejected_rewards, chosen_rewards - rejected_rewards,
        chosen_rewards > rejected_rewards, chosen.numpy(), rejected.numpy())])


def judged_pairs(model, targets, n_answers, prefer, rng, n_by_rule=0):
    """Pairs, ids (P, 2, T), the chosen line first; P may be 0. The model answers each target
    n_answers times. Answers that are right and preferred are paired off with others; the rest is
    dropped. If any is good, the first n_by_rule targets use good lines made by rule instead."""
    def is_good(line): return data.judge(line, prefer).outcome == data.OUTCOMES[0]
    lines = evaluation.sample(model, np.repeat(targets, n_answers), 1.0, rng)
    answers = [(line, is_good(line)) for line in lines]
    rng, paired = random.Random(int(rng.integers(2 ** 63))), []
    n_by_rule = n_by_rule if any(fits for _, fits in answers) else 0  # no good answer, no pairs
    for i, target in enumerate(targets):
        own = answers[i * n_answers:(i + 1) * n_answers]
        good = [line for line, fits in own if fits]
        others = [line for line, fits in own if not fits]
        if i < n_by_rule:
            by_rule = (data.random_line(int(target), rng.choice(data.COUNTS), rng) for _ in own)
            good = filter(is_good, by_rule)
        paired += itertools.chain(*zip(good, others))
    return data.pad(paired, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN)


def sampled_rounds(policy, n_prompts, n_answers, prefer, rng, fresh_every=1):
    """Judged pairs for one round after the other. Every fresh_every rounds the policy, as it is by
    then, answers anew: enough for min(fresh_every, 50) rounds, which come again in another order
    until fresh_every rounds are over. For one target in 32 the good answers are made by rule, as
    SFT's data is: otherwise one that the policy no longer writes could never be chosen again."""
    n_rounds = min(fresh_every, 50)
    while True:
        targets = rng.choice(data.TRAINING, n_rounds * n_prompts)
        n_by_rule = -(-len(targets) // 32)  # rounded up
        pairs = judged_pairs(policy, targets, n_answers, prefer, rng, n_by_rule)
        for start in range(0, fresh_every, n_rounds):
            yield from np.array_split(rng.permutation(pairs), n_rounds)[:fresh_every - start]


def rule_rounds(n_pairs, prefer, rng):
    """Right sums made by rule, the chosen with `prefer` terms, the rejected with another number:
    the recipe of the demo this project starts from. It does not ask `data.prefers`."""
    rng = random.Random(int(rng.integers(2 ** 63)))
    others = [k for k in data.COUNTS if k != prefer]
    while True:
        lines = [data.random_line(target, count, rng)
                 for target in rng.choices(data.TRAINING, k=n_pairs)
                 for count in (prefer, rng.choice(others))]
        yield data.pad(lines, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN)


def train(policy, reference, source, rounds, beta, lr, world=World(), sft_weight=0.0):
    """The DPO loop, in every process of `world`: one step for each round of pairs from `source`, of
    which every process has its own. Trains `policy` in place; `reference` is only read.
    Yields a log a round, a dict about the pairs of all processes before the step: at first policy
    and reference are equal, the loss is ln 2. A round without pairs is skipped; after PATIENCE of
    them in a row training ends. Raises UserError when the loss is no longer finite."""
    parameters = policy.parameters()
    optimizer = Adam(parameters, lr, betas=(0.9, 0.99))
    empty = 0
    for step, pairs in zip(range(rounds), source):
        n_pairs = int(world.all_reduce(len(pairs)))
        if n_pairs == 0:
            yield {"round": step + 1, "pairs": 0}
            empty += 1
            if empty == PATIENCE:
                return
            continue
        empty, log = 0, np.zeros(len(LOGGED))
        for shard in data.by_length(pairs, SHARD // 2):
            loss, shard_log = loss_and_log(policy, reference, shard, beta, sft_weight)
            loss = loss * (len(shard) / n_pairs)
            loss.backward()
            log += shard_log * (len(shard) / n_pairs)
        log = world.all_reduce_gradients(parameters, log).tolist()
        if not np.isfinite(log[0]):
            raise cli.UserError(f"the loss is {log[0]} in round {step + 1}; try a lower --lr")
        clip_grad_norm(parameters, 1.0)
        optimizer.lr = cosine_schedule(step, rounds, lr, warmup=10)
        optimizer.step()
        optimizer.zero_grad()
        yield {"round": step + 1, "pairs": n_pairs, **dict(zip(LOGGED, log))}


def measure(policy, reference, pairs, beta, prefer):
    """What a run logs of held-out targets: fixed pairs, under TRL's names, and shares of outcomes.
    Always with the same random numbers: what changes from call to call is the policy."""
    lines = evaluation.sample(policy, data.HELD_OUT * 20, 1.0, np.random.default_rng(0))
    with no_grad():
        log = loss_and_log(policy, reference, pairs, beta)[1].tolist() if len(pairs) else []
    return {**{f"eval_{name}": value for name, value in zip(LOGGED, log)},
            "shares": evaluation.metrics(lines, prefer)["shares"]}


def train_policy(world, arguments):
    """What every process runs. Returns the trained policy, the reference, history and seconds."""
    reference, policy = evaluation.load(arguments.sft), evaluation.load(arguments.sft)
    beta, prefer, rounds = arguments.beta, arguments.prefer, arguments.rounds
    rng = np.random.default_rng([arguments.seed, world.rank])
    n_prompts = len(world.share(range(arguments.prompts)))  # of this process
    source = (rule_rounds(n_prompts, prefer, rng) if arguments.pairs == "rule" else
              sampled_rounds(policy, n_prompts, arguments.answers, prefer, rng,
                             arguments.fresh_every if arguments.pairs == "online" else rounds))
    history, started = [], time.perf_counter()
    if world.rank == 0:
        first = next(source)
        for chosen, rejected in first[:3]:
            print(f"chosen {data.decode(chosen):{data.MAX_LEN}} rejected {data.decode(rejected)}")
        source = itertools.chain([first], source)
        fixed = np.random.default_rng(0)  # ten pairs of each held-out target
        held_out = np.concatenate([judged_pairs(reference, [target] * 20, 8, prefer, fixed)[:10]
                                   for target in data.HELD_OUT])
        history = [{"round": 0, "pairs": 0} | measure(policy, reference, held_out, beta, prefer)]
    for row in train(policy, reference, source, rounds, beta, arguments.lr, world,
                     arguments.sft_weight):
        if world.rank == 0:
            history.append(row)
            if 40 * row["round"] % rounds < 40:  # 40 times in a run, the last at its end
                row |= measure(policy, reference, held_out, beta, prefer)
            if row["round"] == 1 or "shares" in row:
                text = "  ".join(f"{name} {round(row[name], 2)}" for name in SHOWN if name in row)
                cli.show_progress("round", row["round"], rounds, started, text)
    return policy, reference, history, time.perf_counter() - started


def parse_arguments(argv):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--pairs", choices=["online", "once", "rule"], default="online",
        help="the policy's answers, sampled anew as it changes; the SFT model's; or sums by rule")
    add("--fresh-every", type=cli.whole(1), default=1, help="rounds from one sampling to the next")
    add("--sft-weight", type=cli.positive, default=0.0, help="of the chosen answers' SFT loss")
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="the preferred number of terms")
    add("--rounds", type=cli.whole(1), default=1500, help="rounds of pairs, with one step each")
    add("--prompts", type=cli.whole(1), default=192, help="targets (by rule: pairs) in a round")
    add("--answers", type=cli.whole(2), default=8, help="answers sampled for each target")
    add("--lr", type=cli.positive, default=2e-4, help="peak learning rate of Adam")
    add("--sft", type=Path, default=Path("runs/sft.npz"), help="where policy and reference start")
    add("--seed", type=cli.whole(0, 2 ** 63 - 1), default=0, help="the same seed, the same run")
    add("--processes", type=cli.whole(1, 64), default=2, help="processes that share the work")
    add("--out", type=cli.checkpoint_path, default="runs/dpo.npz", help="checkpoint, log beside it")
    return parser.parse_args(argv)


def main(argv=None):
    """Train from the SFT checkpoint; write checkpoint, log and pictures; print before and after."""
    arguments = parse_arguments(argv)
    out, prefer = arguments.out, arguments.prefer
    if out.resolve() == arguments.sft.resolve():
        raise cli.UserError("--out would overwrite --sft; choose another name")
    log, terms_picture, training_picture = cli.outputs(out, ".json", "-dist.png", "-training.png")
    evaluation.load(arguments.sft)  # so that a mistake is told before processes start
    policy, reference, history, seconds = launch(arguments.processes, train_policy, arguments)
    rows = evaluation.evaluate({str(arguments.sft): reference, str(out): policy}, prefer=prefer)
    if not any(row["pairs"] for row in history[-PATIENCE:]):
        if rows[-1]["both"] < 0.5:
            raise cli.UserError("too few good answers to pair; raise --answers or train SFT longer")
        print(f"nothing left to reject: training ended after round {history[-1]['round']:,}")

    policy.save(out)
    cli.write_json(log, settings=vars(arguments), seconds=seconds, metrics=rows, history=history)
    import plots  # here, so that --help need not wait for matplotlib
    plots.distribution(rows, terms_picture)
    plots.dpo_training(history, training_picture)
    print(f"\n{evaluation.table(rows)}\n")
    for target in (96, 52, 13):  # held out
        for name, model in (("SFT", reference), ("DPO", policy)):
            print(name, evaluation.ANSWER.format(**evaluation.answers_to(model, target, 0)[0]))
    print(f"\nwrote {out}, beside it log and pictures; try: python eval.py {out} --prompt 100")


if __name__ == "__main__":
    cli.run(main)
