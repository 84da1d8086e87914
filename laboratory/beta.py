"""What beta does, compared at equal success; draws assets/beta.png.

After an equal number of rounds, a small beta has learned more and moved further, so the two effects
are mixed up. Here every run stops when nine in ten answers to held-out targets are right and have
three terms, or after 1,500 rounds. Then: how many rounds did that take, how far has the policy
moved, and how many different answers does it still give? Five betas with three seeds take about 30
minutes on two cores, the SFT models five more. Stopped and started again, it resumes.
"""

import functools

import lab  # first: it makes the core importable, which must precede NumPy
import numpy as np

import cli
import data
import eval as evaluation
import loop
import plots

BETAS = (0.05, 0.2, 0.8, 1.6, 3.0)
SHARE = 0.9
until_nine_in_ten = functools.partial(loop.train, stop=functools.partial(loop.reached, share=SHARE))


def experiment(beta):
    return lab.Experiment(
        f"beta-{beta:g}",
        f"--beta {beta:g}",
        "until nine in ten",
        train=until_nine_in_ten,
        report=functools.partial(lab.Report, times=300),  # every fifth round
    )


def has_reached(facts):
    return loop.reached(facts["history"][-1], SHARE)


def print_table(runs, sft):
    print("\n| beta | nine in ten after | both | exact | divergence | distinct of 150 |")
    print("|---|---|---|---|---|---|")
    for beta, of_seeds in runs.items():
        rounds = [
            f"{facts['history'][-1]['round']:,}" if has_reached(facts) else "never"
            for facts in of_seeds
        ]
        both, exact = (
            lab.spread([facts["sampled"][name] for facts in of_seeds], 3)
            for name in ("both", "exact")
        )
        divergence = lab.spread([facts["divergence"] for facts in of_seeds], 2)
        cells = [
            f"{beta:g}",
            " / ".join(rounds),
            both,
            exact,
            divergence,
            lab.distinct_spread(of_seeds),
        ]
        print(f"| {' | '.join(cells)} |")
    print(f"| (SFT, before) | | | | 0 | {lab.distinct_spread(sft)} |")


def check_statement(options, target=52, n=4000):
    """What the mean reward of chosen answers is, exactly, and as it is measured.

    Let a be the accepted answers to one prompt, P(a) their total probability, and pi(y | a) =
    pi(y) / P_pi(a) the policy among them. For an accepted y,

        log(pi(y) / pi_ref(y)) = log(P_pi(a) / P_ref(a)) + log(pi(y | a) / pi_ref(y | a)).

    The mean over the policy's own accepted answers, y ~ pi(. | a), is therefore

        beta [log(P_pi(a) / P_ref(a)) + KL(pi(. | a) || pi_ref(. | a))],

    and over the reference's accepted answers, y ~ pi_ref(. | a),

        beta [log(P_pi(a) / P_ref(a)) - KL(pi_ref(. | a) || pi(. | a))].

    Both KL divergences are 0 if DPO leaves the accepted answers in their old proportions, and grow
    when some of them take the place of others.
    """
    facts = lab.run(options, lab.ONLINE, 0)
    beta = facts["settings"]["beta"]
    reference = evaluation.load(lab.sft_checkpoint(options, 0))
    policy = evaluation.load(lab.dpo_checkpoint(options, lab.ONLINE, 0))

    def logps(model, lines):
        return lab.logps(model, lines).astype(np.float64)

    accepted = lab.right_sums(target, [3])
    policy_logps, reference_logps = logps(policy, accepted), logps(reference, accepted)
    p_policy, p_reference = np.exp(policy_logps).sum(), np.exp(reference_logps).sum()
    gain = np.log(p_policy / p_reference)
    log_ratio = policy_logps - reference_logps - gain  # of pi(y | a) and pi_ref(y | a)
    kl_policy = (np.exp(policy_logps) / p_policy * log_ratio).sum()
    kl_reference = (np.exp(reference_logps) / p_reference * -log_ratio).sum()

    print(
        f"\nchosen rewards for {target}, online run, seed 0: accepted answers have probability "
        f"{p_reference:.3f} under the reference and {p_policy:.3f} under the policy"
    )
    for model, whose, exact in (
        (policy, "the policy's own", beta * (gain + kl_policy)),
        (reference, "the reference's", beta * (gain - kl_reference)),
    ):
        lines = evaluation.sample(model, [target] * n, 1.0, data.random_stream(0, "answers"))
        lines = [line for line in lines if data.is_accepted(line)]
        rewards = beta * (logps(policy, lines) - logps(reference, lines))
        error = rewards.std() / np.sqrt(len(lines))
        print(
            f"{whose} accepted answers: mean reward {rewards.mean():+.2f} "
            f"(standard error {error:.2f}), exactly {exact:+.2f}"
        )
    print(
        f"of which beta log(P_pi / P_ref) is {beta * gain:+.2f}, and changed proportions, beta KL, "
        f"{beta * kl_policy:+.2f} and {-beta * kl_reference:+.2f}"
    )


def draw(runs, floors, path):
    """Rounds, divergence and variety of each beta, at nine in ten."""
    with plots.picture(path, 1, 3, (13, 4.2), sharex=True) as (rounds, nats, variety):
        for beta, of_seeds in runs.items():
            for facts in of_seeds:
                reached = has_reached(facts)
                style = dict(color=plots.BLUE, markerfacecolor=None if reached else "white")
                rounds.plot(beta, facts["history"][-1]["round"], "o", **style)
                nats.plot(beta, facts["divergence"], "o", **style)
                if facts["distinct"] is not None:
                    variety.plot(beta, facts["distinct"], "o", **style)
        nats.axhline(np.mean(floors), color=plots.GREY, linewidth=3)
        nats.text(min(runs), np.mean(floors), "the least possible", va="top", color="#555555")
        nats.figure.suptitle(
            "each run stopped at nine in ten (hollow: not reached within 1,500 rounds)"
        )
        rounds.set(title="a larger beta is slower,", ylabel="rounds until nine in ten",
                   ylim=(0, None))  # fmt: skip
        nats.set(title="moves less far", ylim=(0, None),
                 ylabel="KL(policy || reference), nats an answer")  # fmt: skip
        variety.set(title="and keeps more variety", ylim=(0, 150),
                    ylabel="distinct of 150 accepted answers")  # fmt: skip
        for ax in (rounds, nats, variety):
            ax.set(xlabel="beta (logarithmic)", xscale="log")
            ax.set_xticks(list(runs), [f"{beta:g}" for beta in runs], minor=False)
            ax.minorticks_off()


def main(argv=None):
    parser = lab.parser(__doc__, seeds=3)
    lab.add_pictures(parser, "beta.png")
    options = parser.parse_args(argv)
    seeds = range(options.seeds)
    runs = {}
    for beta in BETAS:
        runs[beta] = [lab.run(options, experiment(beta), seed) for seed in seeds]
    print_table(runs, [lab.sft_facts(options, seed) for seed in seeds])
    references = [evaluation.load(lab.sft_checkpoint(options, seed)) for seed in seeds]
    floors = [lab.floor(lab.accepted_probabilities(one), SHARE) for one in references]
    print(f"\nleast divergence of a policy with {SHARE:.0%} accepted: {lab.spread(floors, 2)}")
    check_statement(options)
    draw(runs, floors, options.pictures / "beta.png")


if __name__ == "__main__":
    cli.run(main)
