"""DPO: teach a trained Transformer a preference, by default for sums of exactly three terms."""

import argparse
import copy
import functools
import math
import time
from pathlib import Path

import tinygrad_lite.functional as F
from tinygrad_lite import Adam, clip_grad_norm, cosine_schedule, launch, no_grad
import numpy as np

import cli
import data
import eval as evaluation
from sft import completion_logps

PATIENCE = 10  # rounds in a row without a pair after which training ends
BY_RULE_EVERY = 48  # for every 48th target, sums made by rule replace the accepted answers
LOGGED = (  # means over the pairs of a round, named as in Hugging Face's TRL
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
):
    """L = -mean(log sigmoid(beta h)) over P pairs: log-probabilities, (P,) each -> scalar Tensor.

    Rafailov et al. 2023, Eq. 7. With y_w the chosen and y_l the rejected completion of prompt x,

        h = log(pi(y_w | x) / pi_ref(y_w | x)) - log(pi(y_l | x) / pi_ref(y_l | x))

    where pi is the policy, pi_ref the frozen reference, and a log-probability sums over tokens.
    Regrouped, h = (policy chosen - policy rejected) - (reference chosen - reference rejected).
    The gradient should flow to the policy alone: pass the reference's log-probabilities as arrays,
    or as Tensors made under no_grad. dL/d(chosen) = -beta sigmoid(-beta h) / P, and dL/d(rejected)
    is its negative. Raises ValueError if the shapes differ.
    """
    if not (
        policy_chosen_logps.shape
        == policy_rejected_logps.shape
        == reference_chosen_logps.shape
        == reference_rejected_logps.shape
    ):
        raise ValueError("the four log-probabilities must have one shape, (P,)")
    policy_log_ratio = policy_chosen_logps - policy_rejected_logps
    reference_log_ratio = reference_chosen_logps - reference_rejected_logps
    h = policy_log_ratio - reference_log_ratio
    return -F.log_sigmoid(beta * h).mean()


# Where pairs come from. A line is a prompt, its completion and the end token, as ids, such as
# 100=10+70+20<end>. A pair is two lines that answer the same prompt, the chosen one first: (2, T).
# The judge is data.judge: a program, not a model.


def sample_and_judge(policy, targets, n_answers, prefer, rng):
    """The policy answers each target n_answers times; the judge accepts or rejects each answer.

    Returns two lists of lines (ids) for each target: [(accepted, rejected), ...].
    """
    answers = evaluation.sample(policy, np.repeat(targets, n_answers), temperature=1.0, rng=rng)
    judged = []
    for start in range(0, len(answers), n_answers):
        accepted, rejected = [], []
        for line in answers[start : start + n_answers]:
            if data.is_accepted(line, prefer):
                accepted.append(line)
            else:
                rejected.append(line)
        judged.append((accepted, rejected))
    return judged


def pair_up(judged):
    """Pair each accepted answer with a rejected one to the same target: ids (P, 2, T), P may be 0.

    What is left over, because a target has more of one kind, is dropped.
    """
    lines = []
    for accepted, rejected in judged:
        for chosen_line, rejected_line in zip(accepted, rejected):
            lines += [chosen_line, rejected_line]
    return data.pad(lines, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN)


def accepted_by_rule(target, n, prefer, rng):
    """Of n random right sums, made as SFT's lines are, those that the judge accepts.

    (Sums of `prefer` terms would not do: data.prefers may have been changed.)
    """
    rng = data.python_random(rng)
    lines = [data.random_line(target, rng.choice(data.COUNTS), rng) for _ in range(n)]
    return [line for line in lines if data.is_accepted(line, prefer)]


def round_starts(rounds, prompts):
    """The number of the first target of each round, and of the one after the last: (rounds + 1,).

    The targets of a run are numbered through all rounds and processes. Rounds grow in a straight
    line, from a third of `prompts` to all: early on, a few answers show many mistakes, and later
    mistakes get rare.
    """
    sizes = np.ceil(prompts * np.linspace(1 / 3, 1, rounds)).astype(int)
    return np.concatenate([[0], np.cumsum(sizes)])


def online_pairs(policy, step, world, rng, starts, answers, prefer):
    """--pairs online: this process's pairs of a round, from the answers of the policy as it is now.

    starts: see round_starts; answers: sampled for each target.

    For every 48th target, sums made by rule replace the accepted answers: otherwise an answer the
    policy has stopped writing could never be chosen again, and its answers would lose variety.
    """
    # The targets of the round are dealt to the processes in turn; these are the numbers of ours.
    numbers = range(starts[step] + world.rank, starts[step + 1], world.world_size)
    targets = rng.choice(data.TRAINING, len(numbers))
    judged = sample_and_judge(policy, targets, answers, prefer, rng)
    # Where the judge accepts nothing at all, nothing is added by rule either. Without pairs the run
    # then ends: the model has not learned the task.
    any_accepted = any(accepted for accepted, _ in judged)
    for i, number in enumerate(numbers):
        if any_accepted and number % BY_RULE_EVERY == 0:
            _, rejected = judged[i]
            judged[i] = accepted_by_rule(int(targets[i]), answers, prefer, rng), rejected
    return pair_up(judged)


class OncePairs:
    """--pairs once: pairs as --pairs online makes them, but of the answers of the SFT model alone,
    sampled before the first step. When all have been used, they come again in another order."""

    n_targets = 9600

    def __init__(self, starts, answers, prefer):
        self.starts, self.answers, self.prefer = starts, answers, prefer

    def __call__(self, policy, step, world, rng):
        if step == 0:  # the policy is still the SFT model
            starts = [0, self.n_targets]
            self.pairs = online_pairs(policy, 0, world, rng, starts, self.answers, self.prefer)
            self.unused = rng.permutation(self.pairs)
        # As many as that number of targets has on average, counted from the start of the run.
        pairs_per_target = len(self.pairs) / self.n_targets
        start = round(pairs_per_target * self.starts[step])
        end = round(pairs_per_target * self.starts[step + 1])
        while len(self.unused) < end - start:
            self.unused = np.concatenate([self.unused, rng.permutation(self.pairs)])
        pairs, self.unused = np.split(self.unused, [end - start])
        return pairs


def rule_pairs(policy, step, world, rng, starts, prefer):
    """--pairs rule: right sums made by rule, chosen with `prefer` terms, rejected with another
    number: the recipe of the demo this project began with. Neither policy nor judge is asked."""
    rng = data.python_random(rng)
    other_counts = [count for count in data.COUNTS if count != prefer]
    lines = []
    for _ in range(starts[step] + world.rank, starts[step + 1], world.world_size):
        target = rng.choice(data.TRAINING)
        lines.append(data.random_line(target, prefer, rng))
        lines.append(data.random_line(target, rng.choice(other_counts), rng))
    return data.pad(lines, data.MAX_LEN).reshape(-1, 2, data.MAX_LEN)


# Training.


def pair_logps(model, pairs):
    """log p(completion | prompt) of chosen and rejected lines: ids (P, 2, T) -> (P,) each."""
    lines = pairs.reshape(-1, pairs.shape[-1])  # (2P, T): chosen, rejected, chosen, ...
    lines = lines[:, : data.lengths(lines).max()]  # without the padding that all of them share
    logps = completion_logps(model, lines)
    return logps[::2], logps[1::2]


def pair_metrics(chosen, rejected, reference_chosen, reference_rejected, beta):
    """What a run logs of P pairs, from four Tensors (P,): a dict of means with the names LOGGED.

    A reward is beta log(pi / pi_ref) (Rafailov et al. 2023, section 4).
    """
    with no_grad():
        loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
        chosen_rewards = (beta * (chosen - reference_chosen)).numpy()  # (P,)
        rejected_rewards = (beta * (rejected - reference_rejected)).numpy()
    return {
        "loss": loss.item(),
        "rewards/chosen": float(chosen_rewards.mean()),
        "rewards/rejected": float(rejected_rewards.mean()),
        "rewards/margins": float((chosen_rewards - rejected_rewards).mean()),
        "rewards/accuracies": float((chosen_rewards > rejected_rewards).mean()),
        "logps/chosen": float(chosen.numpy().mean()),
        "logps/rejected": float(rejected.numpy().mean()),
    }


@np.errstate(all="ignore")  # no warnings of overflow: the check of the loss reports it
def train(world, policy, reference, make_pairs, report, rounds, beta, lr, seed):
    """The DPO loop. Every process of `world` runs it on a copy of policy, and all copies take the
    same steps. Rank 0 works on the caller's policy itself, so that one is trained in place.

    make_pairs(policy, step, world, rng): this process's pairs of a round, ids (P, 2, T).
    report(row, policy, pairs): called on rank 0 before the first step and after each, with that
        round's row of the history: its number, the pairs of all processes and, if there are any,
        their pair_metrics, taken before the step. It may add to the row. `pairs` are rank 0's.

    Returns the history. Training ends early after PATIENCE rounds in a row without a pair. Raises
    UserError when the loss is no longer finite.
    """
    rng = data.random_stream(seed, "DPO pairs", world.rank)
    parameters = policy.parameters()
    optimizer = Adam(parameters, lr, betas=(0.9, 0.99))
    history = [{"round": 0, "pairs": 0}]
    rounds_without_pairs = 0
    if world.rank == 0:
        report(history[0], policy, None)

    for step in range(rounds):
        # 1. The policy, as it is now, answers. The judge accepts or rejects; accepted answers are
        #    paired with rejected ones. (That is --pairs online; see pairs_maker for the others.)
        pairs = make_pairs(policy, step, world, rng)  # (P, 2, T): chosen, rejected
        n_pairs = int(world.all_reduce(len(pairs)))  # of all processes
        row = {"round": step + 1, "pairs": n_pairs}

        if n_pairs > 0:
            share = len(pairs) / n_pairs  # this process's share of the pairs
            log = dict.fromkeys(LOGGED, 0.0)
            if len(pairs) > 0:  # a process that found none takes part below with zeros
                # 2. Both models score both answers. Only the policy's scores carry a gradient.
                chosen, rejected = pair_logps(policy, pairs)  # (P,) each
                with no_grad():
                    reference_chosen, reference_rejected = pair_logps(reference, pairs)
                # 3. The loss, and its gradient for every weight of the policy. The sum over all
                #    processes, each weighted by its share, is the mean over all pairs.
                loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
                (loss * share).backward()
                log = pair_metrics(chosen, rejected, reference_chosen, reference_rejected, beta)
            world.all_reduce_gradients(parameters)
            means = world.all_reduce([share * log[name] for name in LOGGED])
            row |= zip(LOGGED, means.tolist())
            if not math.isfinite(row["loss"]):
                raise cli.UserError(f"loss {row['loss']} in round {step + 1}; try a lower --lr")

            # 4. One step down the gradient.
            clip_grad_norm(parameters, 1.0)
            optimizer.lr = cosine_schedule(step, rounds, lr, warmup=10)
            optimizer.step()
            optimizer.zero_grad()

        history.append(row)
        if world.rank == 0:
            report(row, policy, pairs)
        rounds_without_pairs = 0 if n_pairs > 0 else rounds_without_pairs + 1
        if rounds_without_pairs == PATIENCE:
            break
    return history


# The program: what it measures, its flags, what it writes.


class Report:
    """What a run measures, before the first round and 40 times on the way, and prints."""

    def __init__(self, reference, rounds, beta, prefer):
        self.reference, self.rounds, self.beta, self.prefer = reference, rounds, beta, prefer
        self.held_out_pairs = held_out_pairs(reference, prefer)
        self.progress = cli.Progress("round", self.rounds)

    def __call__(self, row, policy, pairs):
        number = row["round"]
        if number == 0 or cli.is_due(number, self.rounds, times=40):
            row |= measure(policy, self.reference, self.held_out_pairs, self.beta, self.prefer)
        if number == 0:
            return
        if number == 1:
            for chosen_line, rejected_line in pairs[:3]:
                text = f"chosen {data.decode(chosen_line):24} rejected {data.decode(rejected_line)}"
                print(text)
        text = f"pairs {row['pairs']}"
        if row["pairs"]:
            text += (
                f"  loss {row['loss']:.2f}  rewards/margins {row['rewards/margins']:.2f}"
                f"  rewards/accuracies {row['rewards/accuracies']:.2f}"
            )

        def example():
            target = data.HELD_OUT[row["pairs"] % len(data.HELD_OUT)]  # any will do
            answer = evaluation.answers_to(policy, target, 1, seed=number, prefer=self.prefer)[1]
            return f"{answer['answer']}  {answer['outcome']}"

        # Rounds take about the same time each: their targets grow, but their pairs get fewer.
        self.progress.show(number, number / self.rounds, text, example)


def held_out_pairs(reference, prefer):
    """Up to ten pairs of the reference's own answers to each held-out target: ids (P, 2, T).

    160 answers to a target are enough for ten pairs unless the reference is nearly untrained.
    """
    rng = data.random_stream(0, "held-out pairs")
    pairs = []
    for target in data.HELD_OUT:
        judged = sample_and_judge(reference, [target] * 20, 8, prefer, rng)
        pairs.append(pair_up(judged)[:10])
    return np.concatenate(pairs)


def measure(policy, reference, pairs, beta, prefer):
    """Metrics on held-out targets, for the history.

    On the fixed `pairs`: pair_metrics, with `eval_` before each name. On 20 fresh answers to each
    target: `shares` and `answers` of eval.metrics. The random numbers are the same in every call,
    so only the policy makes a difference.
    """
    row = {}
    if len(pairs) > 0:
        with no_grad():
            chosen, rejected = pair_logps(policy, pairs)
            reference_chosen, reference_rejected = pair_logps(reference, pairs)
        log = pair_metrics(chosen, rejected, reference_chosen, reference_rejected, beta)
        row = {f"eval_{name}": value for name, value in log.items()}
    rng = data.random_stream(0, "answers")
    lines = evaluation.sample(policy, data.HELD_OUT * 20, 1.0, rng)
    metrics = evaluation.metrics(lines, prefer)
    return row | {"shares": metrics["shares"], "answers": metrics["answers"]}


def pairs_maker(pairs, starts, answers, prefer):
    """The function that makes a round's pairs, by the name that --pairs gives it."""
    if pairs == "online":
        return functools.partial(online_pairs, starts=starts, answers=answers, prefer=prefer)
    if pairs == "once":
        return OncePairs(starts, answers, prefer)
    return functools.partial(rule_pairs, starts=starts, prefer=prefer)


def parse_arguments(argv):
    formatter = argparse.ArgumentDefaultsHelpFormatter  # --help shows every default
    parser = cli.Parser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    pairs_help = "the policy's fresh answers, the SFT model's (sampled once), or sums made by rule"
    add("--pairs", choices=["online", "once", "rule"], default="online", help=pairs_help)
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="the preferred number of terms")
    add("--rounds", type=cli.whole(1), default=1500, help="rounds of pairs, with one step each")
    add(
        "--prompts",
        type=cli.whole(1),
        default=160,
        help="targets (pairs by rule) in the last round",
    )
    add("--answers", type=cli.whole(2), default=8, help="answers sampled for each target")
    add("--lr", type=cli.positive, default=2e-4, help="peak learning rate of Adam")
    add("--sft", type=Path, default=Path("runs/sft.npz"), help="where policy and reference start")
    add("--seed", type=cli.seed, default=0, help="repeats a run with the same --processes")
    add("--processes", type=cli.whole(1, 64), default=2, help="processes that share the work")
    add("--out", type=cli.checkpoint_path, default="runs/dpo.npz", help="checkpoint, log beside it")
    return parser.parse_args(argv)


def main(argv=None):
    """Train from the SFT checkpoint; write checkpoint, log and pictures; print before and after."""
    arguments = parse_arguments(argv)
    beta, prefer, rounds = arguments.beta, arguments.prefer, arguments.rounds
    if arguments.out.resolve() == arguments.sft.resolve():
        raise cli.UserError("--out would overwrite --sft; choose another name")
    out, log, dist, training = cli.output_files(
        arguments.out, ".json", "-dist.png", "-training.png"
    )
    wrote = "replaced" if out.exists() else "wrote"
    reference = evaluation.load(arguments.sft)  # frozen: no optimizer gets its weights
    policy = copy.deepcopy(reference)  # equal to the reference until the first step
    starts = round_starts(rounds, arguments.prompts)
    make_pairs = pairs_maker(arguments.pairs, starts, arguments.answers, prefer)
    report = Report(reference, rounds, beta, prefer)

    started = time.perf_counter()
    settings = (rounds, beta, arguments.lr, arguments.seed)
    history = launch(arguments.processes, train, policy, reference, make_pairs, report, *settings)
    seconds = time.perf_counter() - started
    report.progress.end()

    rows = evaluation.evaluate({str(arguments.sft): reference, str(out): policy}, prefer=prefer)
    if not any(row["pairs"] for row in history[-PATIENCE:]):
        # Does the judge reject everything or accept everything? The last row is of the policy's
        # sampled answers to all targets.
        if rows[-1]["both"] < 0.5:
            raise cli.UserError(
                "too few accepted answers; lower --lr, raise --answers or train SFT longer"
            )
        print(f"nothing left to reject: training ended after round {history[-1]['round']:,}")
    facts = {"settings": vars(arguments), "seconds": seconds, "metrics": rows, "history": history}
    policy.save(out)
    cli.write_json(log, facts)
    print(f"\n{evaluation.table(rows)}\n")
    for target in (96, 52, 13):  # held out
        for name, model in (("SFT", reference), ("DPO", policy)):
            greedy = evaluation.answers_to(model, target, samples=0, prefer=prefer)[0]
            print(name, evaluation.ANSWER_FORMAT.format(**greedy))
    draw(rows, dist, history, training)
    print(f"{wrote} {out} and {log}; try: python eval.py {out} --prompt 100")


def draw(rows, dist, history, training):
    """The two pictures. The run is saved by now, and no picture is worth a traceback."""
    try:
        import plots  # here, so that --help need not wait for Matplotlib

        plots.distribution(rows, dist)
        plots.dpo_training(history, training)
        print(f"\nwrote {dist} and {training}")
    except Exception as error:
        message = " ".join(str(error).split())  # in one line
        print(f"the run is saved, but not its pictures: {message}")


if __name__ == "__main__":
    cli.run(main)
