"""Write a checkpoint of this project as a folder of Hugging Face transformers."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules
import cli  # noqa: E402  before NumPy, for the number of BLAS threads
import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
from transformer import Config, Transformer  # noqa: E402

OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
IN_A_BLOCK = {
    "attention_norm": ["input_layernorm"],
    "mlp_norm": ["post_attention_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention_out": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def their_names(name):
    """The names of our weight in a LlamaForCausalLM: of all that lie one below the other in it."""
    if name in OUTSIDE:
        return [f"{OUTSIDE[name]}.weight"]
    _, i, part = name.split(".")  # blocks.{i}.{part}
    return [f"model.layers.{i}.{theirs}.weight" for theirs in IN_A_BLOCK[part]]


def llama_weights(model):
    """{their name: array}: ours, split; the embedding alone lies transposed here."""
    weights = {}
    for name, parameter in model.named_parameters().items():
        array = parameter.data.T if name == "embedding" else parameter.data
        names = their_names(name)
        weights |= zip(names, map(np.ascontiguousarray, np.split(array, len(names))))
    return weights


def llama_config(config):
    """The LlamaConfig of our Config: every default that our model relies on is spelled out."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_hidden,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        max_position_embeddings=config.max_len,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=data.END,
        pad_token_id=data.PAD,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def tokenizer():
    """data.encode and data.decode as a fast tokenizer: one token a character, none added unasked.

    A character that data.py does not know raises an exception here, too. Padding goes on the left,
    for `generate` on prompts of unlike length; TRL pads on the right what it trains on, anyway.
    """
    end, pad = data.VOCAB[data.END], data.VOCAB[data.PAD]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(data.VOCAB)}))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()  # joined without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def export(model, folder):
    """Write config.json, model.safetensors and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    llama_config(model.config).save_pretrained(folder)
    save_file(llama_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)


def from_hugging_face(folder):
    """The Transformer of such a folder, also of a trained one. UserError if it is none."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise cli.UserError(f"no {name} in {folder}; write it with examples/to_hugging_face.py")
    try:
        llama = LlamaConfig.from_pretrained(folder)
        model = Transformer(
            Config(
                llama.vocab_size,
                llama.hidden_size,
                llama.num_hidden_layers,
                llama.num_attention_heads,
                llama.intermediate_size,
                llama.max_position_embeddings,
            )
        )
        expected = llama_config(model.config)
        for name in (
            "rms_norm_eps",
            "rope_parameters",
            "hidden_act",
            "tie_word_embeddings",
            "num_key_value_heads",
        ):  # what our model cannot do otherwise
            if getattr(llama, name) != getattr(expected, name):
                raise ValueError(f"{name} is {getattr(llama, name)}")
        weights = load_file(folder / "model.safetensors")
        for name, parameter in model.named_parameters().items():
            array = np.concatenate([weights[theirs] for theirs in their_names(name)])
            array = np.ascontiguousarray(array.T if name == "embedding" else array)
            if array.shape != parameter.shape or array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype}{array.shape}")
            parameter.data = array
    except Exception as error:  # what transformers and safetensors raise is not theirs alone
        raise cli.UserError(
            f"{folder} is not what examples/to_hugging_face.py writes "
            f"({type(error).__name__}: {error})"
        ) from None
    return model


def parse_arguments(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="what sft.py or dpo.py wrote"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    """Write the folder, for AutoModelForCausalLM and AutoTokenizer.from_pretrained."""
    arguments = parse_arguments(argv)
    export(evaluation.load(arguments.checkpoint), arguments.folder)
    print(f"wrote {arguments.folder}; next: examples/online_dpo_trl.py {arguments.folder}")


if __name__ == "__main__":
    cli.run(main)
