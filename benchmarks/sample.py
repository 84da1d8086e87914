"""How quick is sampling, with the key/value cache, without it, and in Hugging Face transformers?

    python benchmarks/sample.py --prompts 64 --new-tokens 16 --rounds 2

All continue the same prompts such as `42=` with the same untrained weights, greedily and without an
end token. `cache` is Transformer.generate. `no_cache` runs the model on all tokens again for every
new one. `hugging_face` is LlamaForCausalLM.generate with its own cache. For each, the better of one
process or thread and one for each core counts.
"""

import time

from common import CORES, SIZES, Contestant, new_model, new_parser, run, time_call
from tinygrad_lite import no_grad
import numpy as np

import cli
import data

N_CHECKED = 64  # answers of each contestant that are compared
LEAST_CALLS = 3  # timed in a turn, and more of them until --seconds are over


# The three ways to decode. Each gives a function from prompts (lists of ids, all of one length) to
# the new ids.


def cache(model, new_tokens, threads):
    def decode(prompts):
        return model.generate(prompts, new_tokens, end=None)

    return decode


def no_cache(model, new_tokens, threads):
    def decode(prompts):
        ids = np.array(prompts)  # (B, T)
        for _ in range(new_tokens):
            with no_grad():
                logits = model(ids).numpy()  # (V, B T)
            last_logits = logits.reshape(-1, *ids.shape)[:, :, -1]  # (V, B)
            ids = np.column_stack([ids, last_logits.argmax(axis=0)])
        return ids[:, -new_tokens:]

    return decode


def hugging_face(model, new_tokens, threads):
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    from to_hugging_face import llama_config, llama_weights

    torch.set_num_threads(threads)
    llama = LlamaForCausalLM(llama_config(model.config)).eval()
    weights = {name: torch.tensor(array) for name, array in llama_weights(model).items()}
    llama.load_state_dict(weights)
    llama.generation_config = GenerationConfig(pad_token_id=data.PAD)  # without an end token

    def decode(prompts):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            lines = llama.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=new_tokens,
            )
        return lines[:, ids.shape[1] :]

    return decode


CONTESTANTS = {
    "cache": Contestant(cache, [(1, 1), (CORES, 1)]),
    "no_cache": Contestant(no_cache, [(1, 1), (CORES, 1)]),
    "hugging_face": Contestant(hugging_face, [(1, 1), (1, CORES)]),
}


def work(world, contestant, threads, n_prompts, arguments):
    """One turn of one contestant: its first answers, and the time of every call."""
    # All targets have two digits: Hugging Face would pad shorter prompts.
    prompts = [data.encode(f"{10 + i % 90}=") for i in range(n_prompts)]
    own_prompts = prompts[world.rank :: world.world_size]
    decode = contestant(new_model(SIZES["default"]), arguments.new_tokens, threads)

    def answer():
        """The answers of all processes, each to its own prompts: (n_prompts, new_tokens)."""
        answers = np.zeros((n_prompts, arguments.new_tokens), int)
        if own_prompts:
            answers[world.rank :: world.world_size] = decode(own_prompts)
        return world.all_reduce(answers)

    first_answers = answer()[:N_CHECKED].tolist()
    times = []
    is_enough = False
    started = time.perf_counter()
    while not is_enough:
        times.append(time_call(answer))
        seconds = time.perf_counter() - started
        is_over = len(times) >= LEAST_CALLS and seconds >= arguments.seconds
        # The clocks of processes differ, but all must make the same number of calls.
        is_enough = world.all_reduce(int(is_over)) > 0
    return {"check": first_answers, "times": times}


def report(n_prompts, scores, arguments):
    """Answers and new tokens per second, and the share of answers that are those of `cache`."""
    new_tokens = arguments.new_tokens
    expected = scores["cache"].check
    per_second = dict.fromkeys(scores)  # None for a contestant that does not work here
    tokens_per_second = dict.fromkeys(scores)
    same = dict.fromkeys(scores)
    for name, score in scores.items():
        if score is not None:
            per_second[name] = round(1000 * n_prompts / score.median, 3)
            tokens_per_second[name] = round(1000 * n_prompts * new_tokens / score.median, 3)
            n_same = sum(found == answer for found, answer in zip(score.check, expected))
            same[name] = round(n_same / len(expected), 3)
    record = {
        "prompts": n_prompts,
        "new_tokens": new_tokens,
        "answers_per_second": per_second,
        "tokens_per_second": tokens_per_second,
        "same_answers": same,
    }
    title = f"{n_prompts:,} prompts, {new_tokens} new tokens each; the same answers: {same}"
    return record, title, n_prompts, "answers"


def numbers_of_prompts(text):
    """The type of --prompts."""
    number = cli.whole(1)
    return [number(part) for part in text.split(",")]


def main():
    parser = new_parser("Time sampling here and in transformers.")
    add = parser.add_argument
    add("--prompts", type=numbers_of_prompts, default="1,64,1024",
        help="how many at once, one number or more")  # fmt: skip
    add("--new-tokens", type=cli.whole(1), default=16, help="tokens of each answer")
    add("--seconds", type=cli.positive, default=2.0, help="timed seconds in a turn")
    run(parser, "prompts", CONTESTANTS, work, report)


if __name__ == "__main__":
    cli.run(main)
