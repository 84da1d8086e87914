"""The metrics: does an answer parse, sum to its target, and have the preferred number of terms?"""
if __name__ == "__main__":  # flags first: --help and mistakes are answered before NumPy loads
    import cli
    raise SystemExit(cli.main("eval"))

import json
from functools import partial

import tinygrad_lite.functional as F
from tinygrad_lite import no_grad, parallel_map
import numpy as np

import data
import plots
from cli import UserError
from transformer import Transformer

CHUNK = 256  # prompts decoded together; fixed, so that --threads does not change the answers
ANSWERS = 50  # sampled for each target
EXAMPLES = [96, 52, 13]  # held-out targets whose answers a run shows


def sample(model, targets, temperature, rng, map_fn=map):
    """One answer for each target: a list of lines as ids, with prompt and end token.

    Greedy at temperature 0. A line that has filled data.MAX_LEN stops without an end token.
    """
    chunks = [targets[i:i + CHUNK] for i in range(0, len(targets), CHUNK)]
    answered = map_fn(partial(_answers, model, temperature), chunks, rng.spawn(len(chunks)))
    return [line for lines in answered for line in lines]


def _answers(model, temperature, targets, rng):
    prompts = [data.prompt(target) for target in targets]
    room = data.MAX_LEN - min(map(len, prompts))
    answers = model.generate(prompts, room, temperature, rng)
    return [(prompt + new)[:data.MAX_LEN] for prompt, new in zip(prompts, answers)]


def metrics(lines, prefer=3):
    """What a list of answers (ids) is worth, as a dict.

    `mean_abs_error` of the sum, over the answers that parse (None if none does). `exact`, `format`
    and `preferred`: the shares of all answers that sum to the target, that parse, and whose terms,
    whatever their sum, `data.prefers`. `counts`: answers that parse, by their number of terms, as
    {"3": 41}. `n`: all answers.
    """
    parsed = [pair for pair in map(data.read, lines) if pair]
    errors = [abs(sum(terms) - target) for target, terms in parsed]
    sizes = [len(terms) for _, terms in parsed]
    counts = {str(k): sizes.count(k) for k in sorted({*data.COUNTS, *sizes})}
    n = len(lines)
    return {"n": n, "mean_abs_error": sum(errors) / len(errors) if errors else None,
            "exact": errors.count(0) / n, "format": len(parsed) / n,
            "preferred": sum(data.prefers(terms, prefer) for _, terms in parsed) / n,
            "counts": counts}


def kind(line, prefer):
    """Which of `plots.KINDS` an answer (ids) is. DPO may choose the "right, preferred" ones."""
    parsed = data.read(line)
    if parsed is None:
        return "does not parse"
    target, terms = parsed
    if sum(terms) != target:
        return "wrong sum"
    return "right, preferred" if data.prefers(terms, prefer) else "right, other"


def evaluate(model, seed, prefer=3, map_fn=map, answers=ANSWERS, temperature=1.0):
    """Four rows of metrics: greedy and sampled, on the held-out targets and on all."""
    rows = []
    for mode, repeat, heat in (("greedy", 1, 0.0), ("sampled", answers, temperature)):
        for name, targets in (("held-out", data.HELD_OUT), ("all", data.TARGETS)):
            repeated = [target for target in targets for _ in range(repeat)]
            lines = sample(model, repeated, heat, np.random.default_rng(seed), map_fn)
            rows.append({"mode": mode, "targets": name, **metrics(lines, prefer)})
    return rows


def table(rows, prefer=3):
    """Rows of `evaluate`, each with its `checkpoint`, as text; shares of term counts in percent."""
    width = max(len("checkpoint"), *(len(row["checkpoint"]) for row in rows))
    lines = [f"{'checkpoint':{width}}  mode     targets   answers  error  exact  format  preferred"
             f"   % with " + "".join(f"{k:>4}" for k in data.COUNTS) + " terms"]
    for row in rows:
        error = plots.shortened(row["mean_abs_error"])
        shares = "".join(f"{100 * row['counts'][str(k)] / row['n']:4.0f}" for k in data.COUNTS)
        lines.append(f"{row['checkpoint']:{width}}  {row['mode']:7}  {row['targets']:8}  "
                     f"{row['n']:7,}  {error:>5}  {row['exact']:5.3f}  {row['format']:6.3f}  "
                     f"{row['preferred']:9.3f}          {shares}")
    return "\n".join(lines)


def answers_to(model, prompt, samples, temperature=1.0, seed=0):
    """The greedy answer to one target, then sampled ones: dicts of mode, answer, sum and right."""
    rng = np.random.default_rng(seed)
    lines = sample(model, [prompt], 0.0, rng) + sample(model, [prompt] * samples, temperature, rng)
    rows = []
    for i, line in enumerate(lines):
        parsed = data.read(line)
        total = sum(parsed[1]) if parsed else None
        rows.append({"mode": "sampled" if i else "greedy", "answer": data.decode(line),
                     "sum": total, "right": total == prompt})
    return rows


def shown(row):
    """One of `answers_to` as text: the answer, its sum, and a mark for right or wrong."""
    total = "no sum" if row["sum"] is None else f"sum {row['sum']}"
    mark = "right" if row["right"] else "wrong"
    return f"{row['mode']:7}  {row['answer']:{data.MAX_LEN}}  {total:8}  {mark}"


def credit(policy, reference, line, beta):
    """beta (log pi - log pi_ref) of each token of a line's completion: [(token, value), ...].

    Their sum is the line's DPO reward: this is where DPO puts its credit.
    """
    ids = np.array([line])
    with no_grad():
        logps, reference_logps = (F.token_log_probs(m(ids[:, :-1]), ids[:, 1:]).numpy()[0]
                                  for m in (policy, reference))
    values = beta * (logps - reference_logps)
    start = line.index(data.EQUALS) + 1
    return [(data.VOCAB[token], float(value)) for token, value in
            zip(line[start:], values[start - 1:])]


def load(path):
    """The model of a checkpoint of this task; UserError with one line if there is none."""
    try:
        model = Transformer.load(path)
    except FileNotFoundError:
        program = "dpo" if path.name == "dpo.npz" else "sft"
        raise UserError(f"no {program.upper()} checkpoint at {path}; run python {program}.py first"
                        ) from None
    except ValueError as error:
        raise UserError(f"{error}; train it again, or name another file") from None
    if model.config.vocab_size != len(data.VOCAB):
        raise UserError(f"{path} knows {model.config.vocab_size} tokens, this task has "
                        f"{len(data.VOCAB)}; name a checkpoint of this task")
    return model


def show_credit(models, lines, arguments):
    """Print and draw `credit` for a chosen and a rejected line."""
    (_, reference), (_, policy) = models
    if len(lines) == 1:  # the rejected one: what the reference says instead
        rng, (target, _) = np.random.default_rng(arguments.seed), data.read(lines[0])
        answers = sample(reference, [target] * ANSWERS, 1.0, rng)
        lines.append(next((line for line in answers
                           if kind(line, arguments.prefer) != "right, preferred"), answers[0]))
    rows = [(data.decode(line), credit(policy, reference, line, arguments.beta)) for line in lines]
    for text, tokens in rows:
        print(f"{text}  reward {sum(value for _, value in tokens):+.2f}\n  " +
              "  ".join(f"{token} {value:+.2f}" for token, value in tokens))
    out = arguments.checkpoints[1].with_name("tokens.png")
    plots.credit(rows, arguments.beta, out)
    print(f"wrote {out}")


def main(arguments):
    """Print the metrics of every checkpoint, its answers to a prompt, or its credit by token."""
    if arguments.tokens and len(arguments.checkpoints) != 2:
        raise UserError("--tokens compares two checkpoints, reference first; name both or none")
    models = [(str(path), load(path)) for path in arguments.checkpoints]
    if arguments.tokens:
        lines = [data.encode(text) + [data.END] for text in arguments.tokens]
        return show_credit(models, lines, arguments)
    samples, temperature, rows = arguments.samples, arguments.temperature, []
    with parallel_map(arguments.threads) as map_fn:
        for path, model in models:
            if arguments.prompt is None:
                found = evaluate(model, arguments.seed, arguments.prefer, map_fn,
                                 samples or ANSWERS, temperature)
            else:
                found = answers_to(model, arguments.prompt, samples or 5, temperature,
                                   arguments.seed)
            rows += [{"checkpoint": path, **row} for row in found]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif arguments.prompt is None:
        print(table(rows, arguments.prefer))
    else:
        width = max(len(path) for path, _ in models)
        print("\n".join(f"{row['checkpoint']:{width}}  {shown(row)}" for row in rows))
