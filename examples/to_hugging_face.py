"""A checkpoint of this project as a folder of Hugging Face transformers, and such a folder back.

    python examples/to_hugging_face.py runs/sft.npz runs/sft_hf

`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load the folder: a
LlamaForCausalLM with the same weights, and a tokenizer that encodes and decodes as data.py does.
"""
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the project's modules
import cli  # noqa: E402


def parser():
    new = cli._Parser("examples/to_hugging_face", "Write a checkpoint as a Hugging Face folder.")
    new.add_argument("checkpoint", type=Path, metavar="CHECKPOINT",
                     help="what sft.py or dpo.py wrote")
    new.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write")
    return new


if __name__ == "__main__":
    cli.PARSERS["to_hugging_face"] = parser
    raise SystemExit(cli.main("to_hugging_face"))

import tinygrad_lite  # noqa: E402, F401  before NumPy, for the number of BLAS threads
import numpy as np  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
from transformer import Config, Transformer, parameter_shapes  # noqa: E402

try:
    from safetensors.numpy import load_file, save_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
except ImportError as missing:
    raise cli.UserError(f"{missing}; pip install -r examples/requirements.txt") from None


def their_names(name):
    """The names of our weight in a LlamaForCausalLM: of all that lie side by side in ours."""
    outside = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    inside = {"attention_norm": ["input_layernorm"], "mlp_norm": ["post_attention_layernorm"],
              "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
              "attention_out": ["self_attn.o_proj"],
              "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}
    if name in outside:
        return [outside[name] + ".weight"]
    _, i, part = name.split(".")  # blocks.{i}.{part}
    return [f"model.layers.{i}.{theirs}.weight" for theirs in inside[part]]


def turned(name, array):
    """Theirs from ours, or back: a matrix is (outputs, inputs) in torch, (inputs, outputs) here."""
    return np.ascontiguousarray(array if name == "embedding" else array.T)


def llama_weights(model):
    """{their name: array}, transposed and split."""
    weights = {}
    for name, parameter in model.named_parameters().items():
        theirs = their_names(name)
        for their_name, piece in zip(theirs, np.split(parameter.data, len(theirs), axis=-1)):
            weights[their_name] = turned(name, piece)
    return weights


def llama_config(config):
    """The LlamaConfig of our Config: every default that our model relies on is spelled out."""
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_hidden,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads, max_position_embeddings=config.max_len,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=data.END, pad_token_id=data.PAD,
        architectures=["LlamaForCausalLM"], dtype="float32")


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
        tokenizer_object=words, eos_token=end, pad_token=pad, padding_side="left",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"])


def export(model, folder):
    """Write config.json, model.safetensors and the tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    llama_config(model.config).save_pretrained(folder)
    save_file(llama_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)


def from_hugging_face(folder):
    """The Transformer of such a folder, also of a trained one. UserError if it is none."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise cli.UserError(f"no {name} in {folder}; write it with examples/to_hugging_face.py")
    try:
        llama = LlamaConfig.from_pretrained(folder)
        model = Transformer(Config(llama.vocab_size, llama.hidden_size, llama.num_hidden_layers,
                                   llama.num_attention_heads, llama.intermediate_size,
                                   llama.max_position_embeddings))
        expected = llama_config(model.config)
        for name in ("rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings",
                     "num_key_value_heads"):  # what our model cannot do otherwise
            if getattr(llama, name) != getattr(expected, name):
                raise ValueError(f"{name} is {getattr(llama, name)}")
        weights = load_file(folder / "model.safetensors")
        for name, parameter in model.named_parameters().items():
            pieces = [turned(name, weights[theirs]) for theirs in their_names(name)]
            array = np.concatenate(pieces, axis=-1)
            if array.shape != parameter.shape or array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype}{array.shape}")
            parameter.data = array
    except Exception as error:  # what transformers and safetensors raise is not theirs alone
        raise cli.UserError(f"{folder} is not what examples/to_hugging_face.py writes "
                            f"({type(error).__name__}: {error})") from None
    return model


def main(arguments):
    export(evaluation.load(arguments.checkpoint), arguments.folder)
    print(f"wrote {arguments.folder}; next: python examples/write_pairs.py runs/pairs.jsonl")
