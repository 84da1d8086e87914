"""How quick is sampling, with the key/value cache, without it, and in Hugging Face transformers?

    python benchmarks/sample.py
    python benchmarks/sample.py --prompts 64 --new-tokens 16 --rounds 2

All continue the same prompts such as `42=` with the same untrained weights, greedily and without an
end token, so that each answer has the same number of new tokens; the share of equal answers is
printed. `cache` is Transformer.generate; `no_cache` runs the model on all tokens again for every
new one, as below; `hugging_face` is LlamaForCausalLM.generate with its own cache. Each runs alone
in a process of its own, with one thread and with one for each core (this engine gives each of as
many processes its share of the prompts), the contestants take turns, and the better median of the
two counts. Hugging Face is left out where torch or transformers is not installed.
"""
import argparse
import json
from functools import partial

from common import (CORES, SIZES, Contestant, best_scores, finish, mapper, print_table, run_worker,
                    take_turns, time_calls)
from cli import count

NAMES = ("cache", "no_cache", "hugging_face")
CONTESTANTS = [Contestant(name, threads) for name in NAMES for threads in sorted({1, CORES})]
COMPARED = 64  # answers that a worker hands back


def new_model(prompt_tokens, new_tokens):
    """A new Transformer of the default size, always with the same weights."""
    import data
    from transformer import Config, Transformer
    size = SIZES["default"]
    return Transformer(Config(len(data.VOCAB), size.d_model, size.n_layers, size.n_heads,
                              size.d_hidden, max_len=prompt_tokens + new_tokens))


def make_prompts(n):
    """n prompts of three tokens: Hugging Face would have to pad prompts of unlike length."""
    import data
    targets = [target for target in data.TARGETS if 10 <= target <= 99]
    return [data.prompt(targets[i % len(targets)]) for i in range(n)]


# The three ways to decode: each returns a function that returns the answers, lists of new ids.

def cache(model, prompts, new_tokens, threads, map_fn):
    return in_parts(prompts, threads, map_fn, partial(generate, model, new_tokens))


def generate(model, new_tokens, prompts):
    return model.generate(prompts, new_tokens, end=None)


def no_cache(model, prompts, new_tokens, threads, map_fn):
    return in_parts(prompts, threads, map_fn, partial(generate_without_cache, model, new_tokens))


def generate_without_cache(model, new_tokens, prompts):
    import numpy as np
    from tinygrad_lite import no_grad
    ids = np.array(prompts)  # (B, T)
    for _ in range(new_tokens):
        with no_grad():
            logits = model(ids).data[:, -1]
        ids = np.concatenate([ids, logits.argmax(axis=1)[:, None]], axis=1)
    return ids[:, -new_tokens:].tolist()


def in_parts(prompts, threads, map_fn, decode):
    """decode(prompts), in as many parts of equal size as there are threads."""
    size = -(-len(prompts) // threads)
    parts = [prompts[i:i + size] for i in range(0, len(prompts), size)]
    return lambda: [answer for answers in map_fn(decode, parts) for answer in answers]


def hugging_face(model, prompts, new_tokens, threads, map_fn):
    import torch
    torch.set_num_threads(threads)
    llama, ids = as_llama(model), torch.tensor(prompts)
    mask = torch.ones_like(ids)

    def decode():
        with torch.inference_mode():
            out = llama.generate(ids, attention_mask=mask, do_sample=False, use_cache=True,
                                 min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        return out[:, -new_tokens:].tolist()
    return decode


def as_llama(model):
    """The LlamaForCausalLM of the same weights; PyTorch's linear layers store them transposed."""
    import numpy as np
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    c, p = model.config, {name: p.data for name, p in model.named_parameters().items()}
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_hidden,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_heads,
        max_position_embeddings=c.max_len, rms_norm_eps=1e-6, tie_word_embeddings=False))
    state = {"model.embed_tokens.weight": p["embedding"], "model.norm.weight": p["norm"],
             "lm_head.weight": p["head"].T}
    for i in range(c.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = np.split(p[ours + "qkv"].T, 3)
        gate, up = np.split(p[ours + "gate_up"].T, 2)
        state |= {f"{theirs}self_attn.{name}_proj.weight": array for name, array in
                  zip("qkvo", (q, k, v, p[ours + "attention_out"].T))}
        state |= {f"{theirs}mlp.{name}_proj.weight": array for name, array in
                  zip(("gate", "up", "down"), (gate, up, p[ours + "down"].T))}
        state[theirs + "input_layernorm.weight"] = p[ours + "attention_norm"]
        state[theirs + "post_attention_layernorm.weight"] = p[ours + "mlp_norm"]
    llama.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    llama.generation_config = GenerationConfig(pad_token_id=0)  # no end token: nothing ends early
    return llama.eval()


# The comparison.

def work(name, n_prompts, new_tokens, threads, seconds):
    """One turn of one contestant: its first answers, and the time of every run."""
    prompts = make_prompts(n_prompts)
    model = new_model(len(prompts[0]), new_tokens)
    with mapper(name, threads) as map_fn:
        decode = {"cache": cache, "no_cache": no_cache, "hugging_face": hugging_face}[name](
            model, prompts, new_tokens, threads, map_fn)
        answers = decode()
        if {len(answer) for answer in answers} != {new_tokens}:
            raise ValueError(f"{name} did not write {new_tokens} new tokens for every prompt")
        times = time_calls(decode, calls=3, seconds=seconds)
    return {"answers": answers[:COMPARED], "times": times}


def compare(n_prompts, arguments):
    """For so many prompts, {name: Score} and {name: share of answers that equal those of cache}."""
    flags = ["--prompts", str(n_prompts), "--new-tokens", str(arguments.new_tokens),
             "--seconds", str(arguments.seconds)]
    results = take_turns(__file__, CONTESTANTS, flags, arguments.rounds)
    answers = {contestant.name: turns[0]["answers"] for contestant, turns in results.items()}
    if "cache" not in answers:
        raise SystemExit("Transformer.generate itself does not work; nothing to compare with")
    own = answers["cache"]
    shares = {name: sum(map(list.__eq__, found, own)) / len(own) for name, found in answers.items()}
    return best_scores(results), shares


def as_json(n_prompts, new_tokens, scores, shares):
    """Medians as answers and new tokens per second; None for what is not installed."""
    per_second = {name: 1000 * n_prompts / score.median for name, score in scores.items()}
    return {"prompts": n_prompts, "new_tokens": new_tokens,
            "answers_per_second": {name: round(per_second[name], 1) if name in scores else None
                                   for name in NAMES},
            "tokens_per_second": {name: round(per_second[name] * new_tokens, 1)
                                  if name in scores else None for name in NAMES},
            "same_answers": {name: shares.get(name) for name in NAMES}}


def print_scores(record, scores):
    print(f"\n{record['prompts']:,} prompts, {record['new_tokens']} new tokens each")
    own = record["answers_per_second"]["cache"]
    rows = [(name, score.threads, f"{score.median:.1f}", f"{score.low:.1f}-{score.high:.1f}",
             f"{record['answers_per_second'][name]:,.1f}",
             f"{record['tokens_per_second'][name]:,.0f}",
             f"{own / record['answers_per_second'][name]:.2f}",
             f"{100 * record['same_answers'][name]:.0f} %") for name, score in scores.items()]
    print_table(("", "threads", "median ms", "turns", "answers/s", "tokens/s", "slower than cache",
                 "same answers"), rows)


def counts(text):
    return [count(part) for part in text.split(",")]


def parse_arguments():
    parser = argparse.ArgumentParser(description="Time sampling here and in transformers.")
    add = parser.add_argument
    add("--prompts", type=counts, default=[1, 64, 1024], help="how many at once; default 1,64,1024")
    add("--new-tokens", type=count, default=16, help="tokens of each answer; default 16")
    add("--rounds", type=count, default=5, help="turns of each contestant; default 5")
    add("--seconds", type=float, default=2.0, help="timed seconds in a turn; default 2")
    add("--json", action="store_true", help="print answers and tokens per second as JSON")
    for flag, kind in (("--worker", str), ("--threads", count)):
        add(flag, type=kind, help=argparse.SUPPRESS)  # how this script starts itself for one turn
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.worker:
        run_worker(work, arguments.worker, arguments.prompts[0], arguments.new_tokens,
                   arguments.threads, arguments.seconds)
        return
    records = []
    for n_prompts in arguments.prompts:
        scores, shares = compare(n_prompts, arguments)
        records.append(as_json(n_prompts, arguments.new_tokens, scores, shares))
        if not arguments.json:
            print_scores(records[-1], scores)
    if arguments.json:
        print(json.dumps(records, indent=2))


if __name__ == "__main__":
    finish(main)
