"""Print the metrics of checkpoints, their answers to a prompt, or where DPO put its credit."""

import json
from pathlib import Path

from tinygrad_lite import functional as F, no_grad
import numpy as np

import cli
import data
from transformer import Transformer

CHUNK = 1024  # prompts decoded together: with more, a pass no longer gets cheaper for each
SAMPLES = 50  # answers sampled for each target
ANSWER_FORMAT = "{mode:7}  {answer:24}  sum {sum!s:4}  {outcome}"  # a row of `answers_to` as text


def sample(model, targets, temperature, rng):
    """One answer to each target: a list of lines as ids, with prompt and end token.

    temperature: 0 decodes greedily, 1 samples from the model's own probabilities with `rng`.

    A line that has filled data.MAX_LEN tokens stops there, without an end token.
    """
    lines = []
    for start in range(0, len(targets), CHUNK):
        prompts = [data.encode(f"{target}=") for target in targets[start : start + CHUNK]]
        max_new_tokens = data.MAX_LEN - min(len(prompt) for prompt in prompts)
        completions = model.generate(prompts, max_new_tokens, temperature, rng)
        for prompt, completion in zip(prompts, completions):
            lines.append((prompt + completion)[: data.MAX_LEN])
    return lines


def metrics(lines, prefer=3):
    """Metrics of a list of answers (ids), as a dict.

    n: the number of answers. Shares of all n are
    exact: the sum is the target; preferred: the terms are as preferred; both: accepted, that is,
        both at once; format: it parses;
    shares: {outcome: share} for each of data.OUTCOMES;
    answers: by number of terms, {"3": {"right": share, "wrong": share}, ...}, without those that
        do not parse.
    mean_abs_error: distance of sum and target, of answers that parse; None if there are none.
    counts: answers by number of terms, {"3": 41, ...}.
    """
    n = len(lines)
    judged = [data.judge(line, prefer) for line in lines]
    parsed = [judgement for judgement in judged if judgement.terms is not None]
    n_terms = [len(judgement.terms) for judgement in parsed]
    n_right_terms = [len(judgement.terms) for judgement in parsed if judgement.exact]
    errors = [abs(judgement.total - judgement.target) for judgement in parsed]

    shares = {}
    for outcome in data.OUTCOMES:
        shares[outcome] = sum(judgement.outcome == outcome for judgement in judged) / n
    counts, answers = {}, {}
    for count in sorted({*data.COUNTS, *n_terms}):
        n_all, n_right = n_terms.count(count), n_right_terms.count(count)
        counts[str(count)] = n_all
        answers[str(count)] = {"right": n_right / n, "wrong": (n_all - n_right) / n}
    return {
        "n": n,
        "both": shares[data.ACCEPTED],
        "exact": sum(judgement.exact for judgement in judged) / n,
        "preferred": sum(judgement.preferred for judgement in judged) / n,
        "format": len(parsed) / n,
        "mean_abs_error": sum(errors) / len(errors) if errors else None,
        "shares": shares,
        "counts": counts,
        "answers": answers,
    }


def evaluate(models, seed=0, prefer=3, samples=SAMPLES, temperature=1.0):
    """Metrics of {name: model}: four rows each, greedy and sampled, held-out targets and all.

    A row is a dict that also says `checkpoint`, `mode` and `targets`.
    """
    rows = []
    modes = [("greedy", 1, 0.0), ("sampled", samples, temperature)]
    for name, model in models.items():
        for mode, n_samples, mode_temperature in modes:
            for which, targets in (("held-out", data.HELD_OUT), ("all", data.TARGETS)):
                rng = data.random_stream(seed, "answers")
                lines = sample(model, np.repeat(targets, n_samples), mode_temperature, rng)
                place = {"checkpoint": name, "mode": mode, "targets": which}
                rows.append(place | metrics(lines, prefer))
    return rows


def table(rows):
    """Rows of `evaluate` as text. The shares of each number of terms are in percent."""
    width = max(len("checkpoint"), *(len(row["checkpoint"]) for row in rows))
    percent_header = "".join(f"{count:>4}" for count in data.COUNTS)
    lines = [
        f"{'checkpoint':{width}}  mode     targets   answers   both  exact  preferred  format"
        f"  error  % with {percent_header} terms"
    ]
    for row in rows:
        error = "-" if row["mean_abs_error"] is None else f"{row['mean_abs_error']:.2f}"
        shares = [row["counts"][str(count)] / row["n"] for count in data.COUNTS]
        percent = "".join(f"{100 * share:4.0f}" for share in shares)
        lines.append(
            f"{row['checkpoint']:{width}}  {row['mode']:7}  {row['targets']:8}  {row['n']:7,}"
            f"  {row['both']:5.3f}  {row['exact']:5.3f}  {row['preferred']:9.3f}"
            f"  {row['format']:6.3f}  {error:>5}         {percent}"
        )
    return "\n".join(lines)


def answers_to(model, target, samples, temperature=1.0, seed=0, prefer=3):
    """The greedy answer to one target, then sampled ones: dicts of mode, answer, sum, outcome."""
    rng = data.random_stream(seed, "answers")
    lines = sample(model, [target], 0.0, rng) + sample(model, [target] * samples, temperature, rng)
    rows = []
    for mode, line in zip(["greedy"] + ["sampled"] * samples, lines):
        judgement = data.judge(line, prefer)
        answer = {"mode": mode, "answer": data.decode(line)}
        rows.append(answer | {"sum": judgement.total, "outcome": judgement.outcome})
    return rows


def credit(policy, reference, line, beta):
    """Where DPO put its credit in an answer (ids): the reward of each of its tokens.

    The reward of an answer is beta (log pi - log pi_ref) (Rafailov et al. 2023, section 4). A
    log-probability is a sum over tokens, so each token has a share of it. Returns a dict with the
    line as text, policy_logp and reference_logp of its completion, the reward, and tokens,
    [(token, reward), ...].
    """
    start = line.index(data.EQUALS)
    policy_logps = completion_token_logps(policy, line)
    reference_logps = completion_token_logps(reference, line)
    rewards = beta * (policy_logps - reference_logps)
    tokens = [data.VOCAB[token] for token in line[start + 1 :]]
    return {
        "line": data.decode(line),
        "policy_logp": float(policy_logps.sum()),
        "reference_logp": float(reference_logps.sum()),
        "reward": float(rewards.sum()),
        "tokens": list(zip(tokens, rewards.tolist())),
    }


def completion_token_logps(model, line):
    """log p(token | tokens before it) of each token after `=`, an array."""
    ids = np.array([line])  # (1, T)
    with no_grad():
        logps = F.token_log_probs(model(ids[:, :-1]), ids[0, 1:]).numpy()  # (T - 1,)
    return logps[line.index(data.EQUALS) :]  # logps[t] is that of token t + 1


def load(path):
    """The model of a checkpoint of this task. UserError, one line, if there is none."""
    path = Path(path)
    if not path.exists():
        raise cli.UserError(
            f"no checkpoint at {path}; "
            "train with python sft.py, then python dpo.py, or name another file"
        )
    model = Transformer.load(path)
    if model.config.vocab_size != len(data.VOCAB):
        raise cli.UserError(f"{path} is of another task: it has other tokens; name another file")
    return model


def line_of_text(text):
    """The ids of a line such as 100=10+70+20, with the end token; ValueError for any other text."""
    line = data.encode(text) + [data.END]
    if data.judge(line).target not in data.TARGETS or len(line) > data.MAX_LEN:
        raise ValueError(f"{text!r} is not an answer")
    return line


def parse_arguments(argv):
    line = cli.flag_type(line_of_text, lambda line: True, "a line such as 100=10+70+20")
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    defaults = [Path("runs/sft.npz"), Path("runs/dpo.npz")]
    written = "what sft.py or dpo.py wrote (default: runs/sft.npz runs/dpo.npz)"
    add("checkpoints", nargs="*", type=Path, default=defaults, help=written)
    add("--prompt", type=cli.whole(5, 100), metavar="TARGET", help="a target to answer")
    add("--samples", type=cli.whole(1), help="for each target (default: 50, or 5 with --prompt)")
    add("--temperature", type=cli.positive, default=1.0, help="of the samples (default: 1)")
    add("--prefer", type=int, choices=data.COUNTS, default=3, help="preferred terms (default: 3)")
    tokens_help = "draw the rewards of one line or two, 100=10+70+20 100=50+50, token by token"
    add("--tokens", type=line, nargs="+", metavar="LINE", help=tokens_help)
    add("--beta", type=cli.positive, default=0.8, help="for --tokens (default: 0.8)")
    add("--seed", type=cli.seed, default=0, help="of the samples (default: 0)")
    add("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.tokens and (len(arguments.tokens) > 2 or len(arguments.checkpoints) != 2):
        parser.error("--tokens takes one or two lines and two checkpoints, the reference first")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    models = {str(path): load(path) for path in arguments.checkpoints}
    if arguments.tokens:
        rows, text = main_tokens(models, arguments)
    elif arguments.prompt:
        rows, text = main_prompt(models, arguments)
    else:
        samples = arguments.samples or SAMPLES
        rows = evaluate(models, arguments.seed, arguments.prefer, samples, arguments.temperature)
        text = table(rows)
    print(json.dumps(rows, indent=2) if arguments.json else text)


def main_prompt(models, arguments):
    """--prompt: answers to one target, as rows and as text."""
    rows = []
    for name, model in models.items():
        samples, temperature = arguments.samples or 5, arguments.temperature
        seed, prefer = arguments.seed, arguments.prefer
        answers = answers_to(model, arguments.prompt, samples, temperature, seed, prefer)
        rows += [{"checkpoint": name} | answer for answer in answers]
    return rows, "\n".join(("{checkpoint}  " + ANSWER_FORMAT).format(**row) for row in rows)


def main_tokens(models, arguments):
    """--tokens: where the credit of answers is, as rows, as text and as a picture."""
    import plots  # here, so that nothing else waits for Matplotlib

    reference, policy = (models[str(path)] for path in arguments.checkpoints)
    picture = arguments.checkpoints[1].with_name("tokens.png")
    cli.output_files(picture)
    rows = [credit(policy, reference, line, arguments.beta) for line in arguments.tokens]
    plots.credit(rows, picture)
    lines = []
    for row in rows:
        lines.append(f"{row['line']}  reward {row['reward']:+.2f}")
        lines.append("  " + "  ".join(f"{token} {reward:+.2f}" for token, reward in row["tokens"]))
    return rows, "\n".join([*lines, f"wrote {picture}"])


if __name__ == "__main__":
    cli.run(main)
