"""Write a checkpoint of this project as a folder of Hugging Face transformers."""

# ruff: noqa: E402  the project's modules can be imported only after the path is set

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules

import data  # before NumPy, because it imports tinygrad_lite: see there
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import cli
import eval as evaluation
from transformer import Config, Transformer

# The names of our weights in a LlamaForCausalLM. Where a matrix of ours is several of theirs, one
# below the other, all of them are named.
OUTSIDE_BLOCKS = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
IN_A_BLOCK = {
    "attention_norm": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention_out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def their_names(name):
    """The names in a LlamaForCausalLM of the weights that our weight `name` consists of: a list."""
    if name in OUTSIDE_BLOCKS:
        return [f"{OUTSIDE_BLOCKS[name]}.weight"]
    _, i, part = name.split(".")  # blocks.{i}.{part}
    return [f"model.layers.{i}.{their_part}.weight" for their_part in IN_A_BLOCK[part]]


def llama_weights(model):
    """All weights of our model as {their name: array}."""
    weights = {}
    for name, parameter in model.named_parameters().items():
        array = parameter.data  # (outputs, inputs), as in PyTorch
        if name == "embedding":
            array = array.T  # ours has a column for each token, theirs a row
        names = their_names(name)
        for their_name, part in zip(names, np.split(array, len(names))):
            weights[their_name] = np.ascontiguousarray(part)
    return weights


def our_weight(name, weights):
    """Our weight `name` from theirs, {their name: array}: the inverse of llama_weights."""
    array = np.concatenate([weights[their_name] for their_name in their_names(name)])
    if name == "embedding":
        array = array.T
    return np.ascontiguousarray(array)


def llama_config(config):
    """The LlamaConfig of our Config. It spells out every default that our model relies on."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_hidden,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        max_position_embeddings=data.MAX_LEN,
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
    """data.encode and data.decode as a fast tokenizer: one token a character, no others added.

    Like data.encode, it raises an exception for an unknown character. It pads on the left, which
    `generate` needs for prompts of different lengths. (In training, TRL pads on the right anyway.)
    """
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(data.VOCAB)}))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()  # joins tokens without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=data.VOCAB[data.END],
        pad_token=data.VOCAB[data.PAD],
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
    """The Transformer in a folder that `export` or a trainer wrote. UserError if there is none."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise cli.UserError(f"no {name} in {folder}; write it with examples/to_hugging_face.py")
    try:
        return _read_folder(folder)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise cli.UserError(
            f"{folder} is not what examples/to_hugging_face.py writes "
            f"({type(error).__name__}: {error})"
        ) from None


def _read_folder(folder):
    llama = LlamaConfig.from_pretrained(folder)
    config = Config(
        vocab_size=llama.vocab_size,
        d_model=llama.hidden_size,
        n_layers=llama.num_hidden_layers,
        n_heads=llama.num_attention_heads,
        d_hidden=llama.intermediate_size,
    )
    expected = llama_config(config)
    for name in (  # what our model cannot do in another way
        "rms_norm_eps",
        "rope_parameters",
        "hidden_act",
        "tie_word_embeddings",
        "num_key_value_heads",
    ):
        value = getattr(llama, name)
        if value != getattr(expected, name):
            raise ValueError(f"{name} is {value}")

    weights = load_file(folder / "model.safetensors")
    model = Transformer(config)
    for name, parameter in model.named_parameters().items():
        array = our_weight(name, weights)
        if array.shape != parameter.shape or array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
        parameter.data = array
    return model


def parse_arguments(argv):
    parser = cli.Parser(prog=sys.argv[0], description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="what sft.py or dpo.py wrote")
    add("folder", type=Path, metavar="FOLDER", help="the folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    """Write the folder, for AutoModelForCausalLM and AutoTokenizer.from_pretrained."""
    arguments = parse_arguments(argv)
    export(evaluation.load(arguments.checkpoint), arguments.folder)
    print(f"wrote {arguments.folder}; next: examples/online_dpo_trl.py {arguments.folder}")


if __name__ == "__main__":
    cli.run(main)
