"""The theorem behind DPO, checked on a list of answers that can be enumerated; and what it leaves
open. Draws assets/theorem.png.

The list holds all right sums of one target with two to five terms, 255 for the target 10. Each has
a known reward. Labels follow Bradley-Terry: of two answers, a is preferred to b with probability
sigmoid(r(a) - r(b)). The SFT model, as policy and reference, is trained on the expected DPO loss
over all pairs of the list, so there is no sampling noise. Where this loss is least, the rewards
that DPO has learned, beta log(pi / pi_ref), differ from the known ones by a constant only, and the
policy on the list is pi* = pi_ref exp(r / beta) / Z (Rafailov et al. 2023, section 4, theorem 1).

    python laboratory/theorem.py               in less than a minute
    python laboratory/theorem.py --variants    other lists, labels and rates, three seeds
"""

import copy
import dataclasses
import json
from pathlib import Path

import lab  # first: it makes the core importable, which must precede NumPy
from tinygrad_lite import World, functional as F, no_grad
import numpy as np

import cli
import data
import eval as evaluation
import loop
import plots
from sft import completion_logps

LR = 1e-3
VARIANT_RATES = (2e-4, 5e-4, 1e-3)


@dataclasses.dataclass(frozen=True)
class Listed:
    """Answers to one target, the reward of each, and how pairs of them are labelled."""

    ids: np.ndarray  # (N, T)
    rewards: np.ndarray  # (N,)
    has_three_terms: np.ndarray  # (N,) bool
    sure: bool = False  # the larger reward always wins, instead of by Bradley-Terry

    def preferred(self):
        """The probability that answer a is preferred to answer b: (N, N).

        With sure labels, answers of equal reward are not compared at all.
        """
        difference = self.rewards[:, None] - self.rewards[None, :]
        if self.sure:
            return (difference > 0).astype(float)
        return 1 / (1 + np.exp(-difference))


def list_answers(target, reward, with_wrong_sums=False, sure=False):
    """All right sums of the target: three terms have the reward, all others 0. With wrong sums,
    those one too low and one too high as well; they have `reward` less than right ones."""
    lines, rewards, has_three_terms = [], [], []
    totals = [target, target - 1, target + 1] if with_wrong_sums else [target]
    for total in totals:
        for line in lab.right_sums(target, total=total):
            is_three = len(data.judge(line).terms) == 3
            lines.append(line)
            rewards.append(reward * (int(is_three) - int(total != target)))
            has_three_terms.append(is_three)
    return Listed(data.pad(lines), np.array(rewards), np.array(has_three_terms), sure)


@dataclasses.dataclass(frozen=True)
class ExpectedLoss:
    """The objective for loop.train: the DPO loss of all pairs of the list at once.

    dpo.dpo_loss is a mean over pairs that were drawn. This is the mean that such pairs have in the
    long run: answers a and b are drawn from the reference, and the judge prefers a to b with the
    probability preferred[a, b].
    """

    preferred: np.ndarray  # (N, N)
    has_three_terms: np.ndarray  # (N,) bool

    logged = ("loss", "listed", "share")

    def __call__(self, policy, reference, ids, beta):
        logps = completion_logps(policy, ids)  # (N,)
        with no_grad():
            reference_logps = completion_logps(reference, ids)
        log_ratios = logps - reference_logps
        h = log_ratios.reshape(-1, 1) - log_ratios.reshape(1, -1)  # (N, N): a chosen, b rejected
        p_ref = np.exp(reference_logps.numpy())
        weights = p_ref[:, None] * p_ref[None, :] * self.preferred  # (N, N)
        loss = -(F.log_sigmoid(beta * h) * (weights / weights.sum())).sum()
        return loss, {"loss": loss.item()} | on_the_list(logps.numpy(), self.has_three_terms)


def on_the_list(logps, has_three_terms):
    """The total probability of the listed answers, and the share of three terms among them."""
    p = np.exp(logps.astype(np.float64))
    return {"listed": float(p.sum()), "share": float(p[has_three_terms].sum() / p.sum())}


def ignore(row, policy, pairs):
    """Nothing to report on the way: the objective logs all that is of interest."""


def check(reference, listed, beta, lr, steps):
    """Train a copy of the reference; compare what it has learned with the theorem.

    Returns a dict: slope and correlation of the learned rewards against the known ones, each answer
    weighted by its probability under the reference; `share` of three terms among the listed answers
    after training, and what pi* says, `predicted`; listed_before and listed_after, the total
    probability of the listed answers; and the arrays of the picture.
    """
    policy = copy.deepcopy(reference)

    def make_pairs(policy, step, world, rng):
        return listed.ids  # the objective makes the pairs

    objective = ExpectedLoss(listed.preferred(), listed.has_three_terms)
    history = loop.train(
        World(), policy, reference, make_pairs, ignore, steps, beta, lr, 0, objective=objective
    )
    with no_grad():
        logps = completion_logps(policy, listed.ids).numpy()
        reference_logps = completion_logps(reference, listed.ids).numpy()
    p_ref = np.exp(reference_logps.astype(np.float64))
    best = p_ref * np.exp(listed.rewards / beta)  # pi*, times Z
    learned = beta * (logps - reference_logps)  # (N,)
    slope, correlation = line_through(listed.rewards, learned, p_ref)
    after = on_the_list(logps, listed.has_three_terms)
    return {
        "slope": slope,
        "correlation": correlation,
        "share": after["share"],
        "predicted": float(best[listed.has_three_terms].sum() / best.sum()),
        "listed_before": float(p_ref.sum()),
        "listed_after": after["listed"],
        "learned": learned.tolist(),
        "history": history[1:] + [{"round": steps + 1, **after}],
        "policy": policy,
    }


def line_through(x, y, weights):
    """Slope and correlation of y against x, with a weight for each point."""
    weights = weights / weights.sum()
    x = x - (weights * x).sum()
    y = y - (weights * y).sum()
    slope = (weights * x * y).sum() / (weights * x * x).sum()
    spread_x, spread_y = (np.sqrt((weights * z * z).sum()) for z in (x, y))
    return float(slope), float((weights * x * y).sum() / (spread_x * spread_y))


# What is printed and drawn.

NUMBERS = ("slope", "correlation", "share", "predicted", "listed_before", "listed_after")


def describe(options, listed, result):
    """The result as text."""
    rng = data.random_stream(0, "answers")
    lines = evaluation.sample(result["policy"], [options.target] * 1000, 1.0, rng)
    shares = evaluation.metrics(lines)["shares"]
    before = result["history"][0]["share"]
    return "\n".join(
        [
            f"{len(listed.ids)} right sums of {options.target}; reward {options.reward:g} for "
            f"three terms, else 0; beta {options.beta:g}; {options.steps} steps",
            "learned against known reward: slope {slope:.3f}, correlation {correlation:.3f}".format(
                **result
            ),
            f"three terms among the listed: {before:.3f} before, "
            "{share:.3f} after; pi* says {predicted:.3f}".format(**result),
            "total probability of the listed: "
            "{listed_before:.3f} before, {listed_after:.3f} after".format(**result),
            f"of 1,000 answers to {options.target} afterwards: "
            + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()),
        ]
    )


def draw(listed, result, path):
    """Learned against known reward; over the steps, the order on the list and its total."""
    with plots.picture(path, 1, 2, (12, 5)) as (rewards, steps):
        rng = np.random.default_rng(0)
        learned = np.array(result["learned"])
        learned -= learned[~listed.has_three_terms].mean()  # the theorem leaves a constant open
        for three, label, colour in (
            (False, "other terms", plots.BLUE),
            (True, "three terms", plots.GREEN),
        ):
            chosen = listed.has_three_terms == three
            known = listed.rewards[chosen] + rng.uniform(-0.06, 0.06, chosen.sum())
            rewards.plot(known, learned[chosen], ".", color=colour, alpha=0.5, label=label)
        ends = np.array([listed.rewards.min() - 0.3, listed.rewards.max() + 0.3])
        rewards.plot(ends, ends, color="black", linewidth=1, label="slope 1")
        rewards.set(
            title="DPO learns the known rewards,",
            xlabel="known reward (spread sideways)",
            ylabel="beta log(pi / pi_ref) + constant",
        )
        history = result["history"]
        x = [row["round"] - 1 for row in history]
        steps.plot(x, [row["share"] for row in history], color=plots.GREEN,
                   label="three terms, of listed")  # fmt: skip
        steps.axhline(result["predicted"], color="black", linestyle=":", label="three terms, pi*")
        steps.plot(x, [row["listed"] for row in history], color=plots.RED,
                   label="all listed")  # fmt: skip
        steps.set(
            title="but probability leaves the list",
            xlabel="step",
            ylabel="share of three terms; probability",
            ylim=(0, 1),
        )
        for ax in (rewards, steps):
            ax.legend(**plots.BELOW)


def variants(options):
    """Print how much of the probability stays on the list, for other lists, labels and rates."""
    print("| list | labels | rate | slope | three terms, pi* | total before | total after |")
    print("|---|---|---|---|---|---|---|")
    for with_wrong_sums, sure in ((False, False), (True, False), (False, True), (True, True)):
        listed = list_answers(options.target, options.reward, with_wrong_sums, sure)
        for lr in VARIANT_RATES:
            name = f"theorem-{options.target}-{with_wrong_sums:d}{sure:d}-{lr:g}"
            results = [variant(options, name, seed, listed, lr) for seed in range(options.seeds)]

            def spread(key, digits=2):
                return lab.spread([result[key] for result in results], digits)

            cells = [
                "right sums, and off by one" if with_wrong_sums else "right sums",
                "sure" if sure else "Bradley-Terry",
                f"{lr:g}",
                spread("slope"),
                spread("share") + ("" if sure else f", {results[0]['predicted']:.2f}"),
                spread("listed_before"),
                spread("listed_after"),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def variant(options, name, seed, listed, lr):
    """The numbers of one run, kept as the runs of DPO are."""
    settings = {name: getattr(options, name) for name in ("beta", "reward", "steps", "sft_steps")}
    lab.sft_facts(options, seed)

    def make():
        reference = evaluation.load(lab.sft_checkpoint(options, seed))
        result = check(reference, listed, options.beta, lr, options.steps)
        return {name: result[name] for name in NUMBERS}

    return lab.kept(options, f"{name}-seed{seed}", settings, make)


def main(argv=None):
    parser = lab.parser(__doc__, seeds=3)
    add = parser.add_argument
    add("--sft", type=Path, default=lab.SFT_PY, help="policy and reference (default: %(default)s)")
    add("--target", type=cli.whole(5, 14), default=10, help="of the sums (default: 10)")
    add("--beta", type=cli.positive, default=0.8, help="default: 0.8")
    add("--reward", type=cli.positive, default=2.0, help="of three terms (default: 2)")
    add("--steps", type=cli.whole(1), default=400, help="of gradient descent (default: 400)")
    add("--json", action="store_true", help="print the numbers as JSON, draw nothing")
    add("--variants", action="store_true", help="other lists, labels and rates, in some minutes")
    lab.add_pictures(parser, "theorem.png")
    options = parser.parse_args(argv)
    if options.variants:
        variants(options)
        return
    reference = evaluation.load(options.sft)
    listed = list_answers(options.target, options.reward)
    result = check(reference, listed, options.beta, LR, options.steps)
    if options.json:
        print(json.dumps({name: result[name] for name in NUMBERS}, indent=2))
        return
    print(describe(options, listed, result))
    draw(listed, result, options.pictures / "theorem.png")


if __name__ == "__main__":
    cli.run(main)
