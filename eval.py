"""Print the metrics of checkpoints, their answers to a prompt, or where DPO put its credit."""
import argparse
import json
from pathlib import Path

from tinygrad_lite import functional as F, no_grad
import numpy as np

import cli
import data
from transformer import Transformer

CHUNK = 512  # prompts decoded together: more do not fit the processor's cache
ANSWERS = 50  # sampled for each target
ANSWER = "{mode:7}  {answer:24}  sum {sum!s:4}  {outcome}"  # a row of `answers_to` as text


def sample(model, targets, temperature, rng):
    """One answer to each target, greedy at temperature 0: a list of lines as ids, with prompt and
    end token. A line that has filled data.MAX_LEN stops without one."""
    lines = []
    for start in range(0, len(targets), CHUNK):
        prompts = [data.encode(f"{target}=") for target in targets[start:start + CHUNK]]
        answers = model.generate(prompts, data.MAX_LEN - min(map(len, prompts)), temperature, rng)
        lines += [(prompt + new)[:data.MAX_LEN] for prompt, new in zip(prompts, answers)]
    return lines


def metrics(lines, prefer=3):
    """What a list of answers (ids) is worth, as a dict. Shares of all `n` answers: `exact` (the sum
    is the target), `preferred` (data.prefers the terms), `both`, `format` (it parses), `shares` (of
    each of data.OUTCOMES). Of those that parse: `mean_abs_error` of the sum, None if there are
    none, and `counts` by number of terms, as {"3": 41}."""
    judged, n = [data.judge(line, prefer) for line in lines], len(lines)
    sizes = [len(j.terms) for j in judged if j.terms]
    errors = [abs(j.total - j.target) for j in judged if j.terms]
    shares = {outcome: sum(j.outcome == outcome for j in judged) / n for outcome in data.OUTCOMES}
    return {"n": n, "both": shares["right, preferred"], "exact": sum(j.exact for j in judged) / n,
            "preferred": sum(j.preferred for j in judged) / n, "format": len(sizes) / n,
            "mean_abs_error": sum(errors) / len(errors) if errors else None, "shares": shares,
            "counts": {str(k): sizes.count(k) for k in sorted({*data.COUNTS, *sizes})}}


def evaluate(models, seed=0, prefer=3, answers=ANSWERS, temperature=1.0):
    """Metrics of {name: model}: four rows each, greedy and sampled, on the held-out targets and on
    all; a row is a dict that also says `checkpoint`, `mode` and `targets`."""
    rows = []
    for name, model in models.items():
        for mode, repeat, scale in (("greedy", 1, 0.0), ("sampled", answers, temperature)):
            for which, targets in (("held-out", data.HELD_OUT), ("all", data.TARGETS)):
                rng = np.random.default_rng(seed)
                lines = sample(model, np.repeat(targets, repeat), scale, rng)
                rows.append({"checkpoint": name, "mode": mode, "targets": which,
                             **metrics(lines, prefer)})
    return rows


def table(rows):
    """Rows of `evaluate` as text; shares of term counts in percent."""
    width = max(len("checkpoint"), *(len(row["checkpoint"]) for row in rows))
    lines = [f"{'checkpoint':{width}}  mode     targets   answers   both  exact  preferred  format"
             f"  error  % with " + "".join(f"{k:>4}" for k in data.COUNTS) + " terms"]
    layout = ("{checkpoint:{width}}  {mode:7}  {targets:8}  {n:7,}  {both:5.3f}  {exact:5.3f}  "
              "{preferred:9.3f}  {format:6.3f}  {:>5}         {}")
    for row in rows:
        error = "-" if row["mean_abs_error"] is None else f"{row['mean_abs_error']:.2f}"
        percent = "".join(f"{100 * row['counts'][str(k)] / row['n']:4.0f}" for k in data.COUNTS)
        lines.append(layout.format(error, percent, width=width, **row))
    return "\n".join(lines)


def answers_to(model, target, samples, temperature=1.0, seed=0, prefer=3):
    """The greedy answer to one target, then sampled ones: dicts of mode, answer, sum, outcome."""
    rng = np.random.default_rng(seed)
    lines = sample(model, [target], 0.0, rng) + sample(model, [target] * samples, temperature, rng)
    judged = [data.judge(line, prefer) for line in lines]
    return [{"mode": mode, "answer": data.decode(line), "sum": j.total, "outcome": j.outcome}
            for mode, line, j in zip(["greedy", *samples * ["sampled"]], lines, judged)]


def credit(policy, reference, line, beta):
    """Where DPO put its credit in an answer (ids): a dict of the line as text, both models'
    log-probabilities of its completion, its reward, and its tokens, [(token, reward), ...]. The
    reward of a token is beta (log pi - log pi_ref); they add up to the reward of the answer."""
    ids, start = np.array([line]), line.index(data.EQUALS)
    with no_grad():
        logps, reference_logps = (F.token_log_probs(model(ids[:, :-1]), ids[0, 1:]).numpy()[start:]
                                  for model in (policy, reference))
    rewards = beta * (logps - reference_logps)
    tokens = [data.VOCAB[token] for token in line[start + 1:]]
    return {"line": data.decode(line), "policy_logp": float(logps.sum()),
            "reference_logp": float(reference_logps.sum()), "reward": float(rewards.sum()),
            "tokens": list(zip(tokens, rewards.tolist()))}


def load(path):
    """The model of a checkpoint of this task. UserError, one line, if there is none."""
    if not path.exists():
        raise cli.UserError(f"no checkpoint at {path}; python sft.py writes one in two minutes")
    model = Transformer.load(path)
    if model.config.vocab_size != len(data.VOCAB):
        raise cli.UserError(f"{path} is not of this task, it has other tokens; name another file")
    return model


def parse_arguments(argv):
    line_ids = cli.flag_type(
        lambda text: data.encode(text) + [data.END],
        lambda ids: data.judge(ids).target in data.TARGETS and len(ids) <= data.MAX_LEN,
        "a line such as 100=10+70+20")
    parser = cli.Parser(__doc__)
    parser.formatter_class = argparse.HelpFormatter  # or --help would say "(default: None)"
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, default=[Path("runs/sft.npz"), Path("runs/dpo.npz")],
        help="what sft.py or dpo.py wrote (default: runs/sft.npz runs/dpo.npz)")
    add("--prompt", type=cli.whole(5, 100), metavar="TARGET", help="a target to answer")
    add("--samples", type=cli.whole(1), help="for each target (default: 50, or 5 with --prompt)")
    add("--temperature", type=cli.positive, default=1.0, help="of the samples (default: 1)")
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="preferred terms (default: 3)")
    add("--tokens", type=line_ids, nargs="+", metavar="LINE",
        help="draw the rewards of one line or two, 100=10+70+20 100=50+50, token by token")
    add("--beta", type=cli.positive, default=0.8, help="for --tokens (default: 0.8)")
    add("--seed", type=cli.whole(0, 2 ** 63 - 1), default=0, help="of the samples (default: 0)")
    add("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.tokens and (len(arguments.tokens) > 2 or len(arguments.checkpoints) != 2):
        parser.error("--tokens takes one or two lines and two checkpoints, the reference first")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    seed, prefer, temperature = arguments.seed, arguments.prefer, arguments.temperature
    models = {str(path): load(path) for path in arguments.checkpoints}
    if arguments.tokens:
        import plots  # here, so that nothing else waits for matplotlib
        reference, policy = (models[str(path)] for path in arguments.checkpoints)
        picture = arguments.checkpoints[1].with_name("tokens.png")
        cli.outputs(picture)
        rows = [credit(policy, reference, line, arguments.beta) for line in arguments.tokens]
        plots.credit(rows, picture)
        text = "\n".join("{line}  reward {reward:+.2f}\n  ".format(**row) + "  ".join(
            f"{token} {reward:+.2f}" for token, reward in row["tokens"]) for row in rows)
        text += f"\nwrote {picture}"
    elif arguments.prompt:
        rows = [{"checkpoint": name, **row} for name, model in models.items() for row in answers_to(
            model, arguments.prompt, arguments.samples or 5, temperature, seed, prefer)]
        text = "\n".join(("{checkpoint}  " + ANSWER).format(**row) for row in rows)
    else:
        rows = evaluate(models, seed, prefer, arguments.samples or ANSWERS, temperature)
        text = table(rows)
    print(json.dumps(rows, indent=2) if arguments.json else text)


if __name__ == "__main__":
    cli.run(main)
