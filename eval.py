"""The metrics: how often an answer parses, sums to its target, and has the preferred number of terms."""
if __name__ == "__main__":  # flags first: --help and mistakes are answered before NumPy loads
    import cli
    raise SystemExit(cli.main("eval"))

import json
from concurrent.futures import ThreadPoolExecutor

import tinygrad_lite  # noqa: F401  before NumPy, for the number of BLAS threads
import numpy as np

import data
from cli import UserError
from transformer import Transformer

CHUNK = 512  # prompts decoded together; fixed, so that answers do not depend on the number of threads
ANSWERS = 50  # sampled for each target
EXAMPLES = [96, 52, 13]  # held-out targets whose answers a run shows


def sample(model, targets, temperature, rng, map_fn=map):
    """One answer for each target: a list of lines as ids, prompt and end token included.

    Greedy at temperature 0. An answer that has filled data.MAX_LEN ends without an end token.
    """
    chunks = [targets[i:i + CHUNK] for i in range(0, len(targets), CHUNK)]

    def answer(chunk, rng):
        prompts = [data.prompt(target) for target in chunk]
        room = data.MAX_LEN - min(map(len, prompts))
        return [(line + new)[:data.MAX_LEN] for line, new in
                zip(prompts, model.generate(prompts, room, temperature, rng, end=data.END))]
    return [line for lines in map_fn(answer, chunks, rng.spawn(len(chunks))) for line in lines]


def metrics(lines, prefer=3):
    """What a list of answers (ids) is worth, as a dict.

    `mean_abs_error` of the sum, over the answers that parse (None if none does); `exact`, `format` and
    `preferred`, the shares of all answers that sum to the target, parse, and have `prefer` terms; `counts`,
    {number of terms: answers} over the answers that parse; `n`, the number of answers.
    """
    parsed = [pair for pair in map(data.read, lines) if pair]
    errors = [abs(sum(terms) - target) for target, terms in parsed]
    counts = np.bincount([len(terms) for _, terms in parsed], minlength=data.MAX_TERMS + 1)
    n = max(1, len(lines))
    return {"n": len(lines), "mean_abs_error": float(np.mean(errors)) if errors else None,
            "exact": errors.count(0) / n, "format": len(parsed) / n, "preferred": int(counts[prefer]) / n,
            "counts": {str(k): int(c) for k, c in enumerate(counts) if c or 2 <= k <= data.MAX_TERMS}}


def evaluate(model, seed, prefer=3, map_fn=map, answers=ANSWERS, temperature=1.0):
    """The metrics of a model, a list of four dicts: greedy and sampled, on held-out and on all targets."""
    rows = []
    for mode in ("greedy", "sampled"):
        for name, targets in (("held-out", data.HELD_OUT), ("all", list(data.TARGETS))):
            rng = np.random.default_rng(seed)
            repeated = [t for t in targets for _ in range(answers if mode == "sampled" else 1)]
            lines = sample(model, repeated, temperature if mode == "sampled" else 0.0, rng, map_fn)
            rows.append({"mode": mode, "targets": name, **metrics(lines, prefer)})
    return rows


def table(rows, prefer=3):
    """Rows of `evaluate`, each with its `checkpoint`, as text."""
    terms = range(data.MIN_TERMS, data.MAX_TERMS + 1)
    width = max(len(row["checkpoint"]) for row in rows)
    lines = [f"{'checkpoint':{width}}  mode     targets   answers  error  exact  format  {prefer} terms  "
             + "  ".join(f"{k:>3}" for k in terms) + "  terms (%)"]
    for row in rows:
        error = "    -" if row["mean_abs_error"] is None else f"{row['mean_abs_error']:5.2f}"
        shares = "  ".join(f"{100 * row['counts'].get(str(k), 0) / row['n']:3.0f}" for k in terms)
        lines.append(f"{row['checkpoint']:{width}}  {row['mode']:7}  {row['targets']:8}  {row['n']:7,}  {error}  "
                     f"{row['exact']:5.3f}  {row['format']:6.3f}  {row['preferred']:7.3f}  {shares}")
    return "\n".join(lines)


def load(path):
    """The model of a checkpoint of this task; UserError with one line if there is none."""
    try:
        model = Transformer.load(path)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; run python sft.py first") from None
    except ValueError as error:
        raise UserError(f"{error}; train it again, or name another file") from None
    if model.config.vocab_size != len(data.VOCAB):
        raise UserError(f"{path} has a vocabulary of {model.config.vocab_size} tokens, this task has "
                        f"{len(data.VOCAB)}; name a checkpoint of this task")
    return model


def answers_to(model, prompt, samples, temperature, seed):
    """The greedy answer to one target, then `samples` at `temperature`, as dicts: mode, answer, sum, right."""
    rng = np.random.default_rng(seed)
    lines = sample(model, [prompt], 0.0, rng) + sample(model, [prompt] * samples, temperature, rng)
    rows = []
    for i, line in enumerate(lines):
        parsed = data.read(line)
        total = sum(parsed[1]) if parsed else None
        rows.append({"mode": "sampled" if i else "greedy", "answer": data.decode(line), "sum": total,
                     "right": total == prompt})
    return rows


def shown(row):
    """One of `answers_to` as a line of text: the answer, its sum, and a mark for right or wrong."""
    total = "no sum" if row["sum"] is None else f"sum {row['sum']}"
    return f"{row['mode']:7}  {row['answer']:24}  {total:8}  {'right' if row['right'] else 'wrong'}"


def main(arguments):
    """Print the metrics of every checkpoint, or its answers to one prompt."""
    models = {str(path): load(path) for path in arguments.checkpoints}
    samples, temperature, rows = arguments.samples, arguments.temperature, []
    with ThreadPoolExecutor(arguments.threads) as pool:
        for path, model in models.items():
            if arguments.prompt is None:
                found = evaluate(model, arguments.seed, arguments.prefer, pool.map, samples or ANSWERS, temperature)
            else:
                found = answers_to(model, arguments.prompt, samples or 5, temperature, arguments.seed)
            rows += [{"checkpoint": path, **row} for row in found]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif arguments.prompt is None:
        print(table(rows, arguments.prefer))
    else:
        width = max(map(len, models))
        print("\n".join(f"{row['checkpoint']:{width}}  {shown(row)}" for row in rows))
