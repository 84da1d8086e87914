"""How quick is sampling, with the key/value cache, without it, and in Hugging Face transformers?

    python benchmarks/sample.py --prompts 64 --new-tokens 16 --rounds 2

All continue the same prompts such as `42=` with the same untrained weights, greedily and without an
end token. `cache` is Transformer.generate; `no_cache` runs the model on all tokens again for every
new one; `hugging_face` is LlamaForCausalLM.generate with its own cache. Each gets the better of one
process or thread and one for each core.
"""

from common import CORES, SIZES, new_model, new_parser, run, time_calls
import cli
from tinygrad_lite import no_grad
import numpy as np
import data


# The three ways to decode: each gives a function from prompts, lists of ids, to the new ids.


def cache(model, new_tokens, threads):
    return lambda prompts: model.generate(prompts, new_tokens, end=None)


def no_cache(model, new_tokens, threads):
    def decode(prompts):
        ids = np.array(prompts)  # (B, T)
        for _ in range(new_tokens):
            with no_grad():
                logits = model(ids).data.reshape(-1, *ids.shape)[..., -1]  # (V, B)
            ids = np.column_stack([ids, logits.argmax(axis=0)])
        return ids[:, -new_tokens:]

    return decode


def hugging_face(model, new_tokens, threads):
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM
    from to_hugging_face import llama_config, llama_weights

    torch.set_num_threads(threads)
    llama = LlamaForCausalLM(llama_config(model.config)).eval()
    llama.load_state_dict({name: torch.tensor(w) for name, w in llama_weights(model).items()})
    llama.generation_config = GenerationConfig(pad_token_id=data.PAD)  # without an end token

    def decode(prompts):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return llama.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=new_tokens,
            )[:, ids.shape[1] :]

    return decode


CONTESTANTS = {
    "cache": (cache, [(1, 1), (CORES, 1)]),
    "no_cache": (no_cache, [(1, 1), (CORES, 1)]),
    "hugging_face": (hugging_face, [(1, 1), (1, CORES)]),
}


def work(world, way, threads, n_prompts, arguments):
    """One turn of one contestant: its first answers, and the time of every run."""
    targets = [10 + i % 90 for i in range(n_prompts)]  # Hugging Face would pad shorter prompts
    prompts = [data.encode(f"{target}=") for target in targets]
    decode = way(new_model(SIZES["default"]), arguments.new_tokens, threads)

    def answer():
        """The answers of all processes, each of its share of the prompts."""
        answers = np.zeros((n_prompts, arguments.new_tokens), int)
        if world.rank < n_prompts:
            answers[world.rank :: world.world_size] = decode(world.share(prompts))
        return world.all_reduce(answers)

    return {
        "check": answer()[:64].tolist(),
        "times": time_calls(answer, world, 3, arguments.seconds),
    }


def report(n_prompts, scores, arguments):
    """Answers and new tokens per second, and the share of answers that are those of `cache`."""

    def figures(of):
        return {name: score and round(of(score), 3) for name, score in scores.items()}

    n, own = arguments.new_tokens, scores["cache"].check
    same = figures(lambda score: sum(map(list.__eq__, score.check, own)) / len(own))
    record = {
        "prompts": n_prompts,
        "new_tokens": n,
        "answers_per_second": figures(lambda score: 1000 * n_prompts / score.median),
        "tokens_per_second": figures(lambda score: 1000 * n_prompts * n / score.median),
        "same_answers": same,
    }
    title = f"{n_prompts:,} prompts, {n} new tokens each; the same answers: {same}"
    return record, title, n_prompts, "answers"


def main():
    parser = new_parser("Time sampling here and in transformers.")
    parser.add_argument(
        "--prompts",
        default="1,64,1024",
        help="how many at once, one or more",
        type=lambda text: [cli.whole(1)(part) for part in text.split(",")],
    )
    parser.add_argument("--new-tokens", type=cli.whole(1), default=16, help="tokens of each answer")
    parser.add_argument("--seconds", type=cli.positive, default=2.0, help="timed seconds in a turn")
    run(parser, "prompts", CONTESTANTS, work, report)


if __name__ == "__main__":
    cli.run(main)
