"""Reads and writes the official checkpoints, and the starting points of stage 1.

A model folder, as it lies on the hub:

    config.json                        its model_type says which owl it is
    model.safetensors                  the weights: one file,
    model-00001-of-00002.safetensors     or shards that model.safetensors.index.json lists;
    pytorch_model.bin, ...               the same as pickles, of which only tensors are read
    tokenizer.model                    LLaMA's SentencePiece model (data/text.py reads it)

Loading is a stream of (name, tensor): the model is made without memory (on torch's
meta device), each file is memory-mapped, and each tensor is copied once, into the
dtype and to the device of its place. So there is one copy of the model in memory, and
where several processes share a model, each holds no more than its part. Every key of
every file is either used or named in an error.

The names of the language model's parts are the hub's own. Those of the vision tower
and the abstractor are ours; the tables below say what they are called officially.
"""

import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from abstractor import Abstractor, AbstractorConfig, sincos_1d, sincos_2d
from data.image import CLIP_MEAN, CLIP_STD
from llama import LlamaConfig
from lora import LoRALinear
from model import Owl, OwlConfig, init_weights
from quantize import BITS, GROUP, bits_of, encoded, is_packed, is_quantized
from quantize import quantize as quantize_linears
from vit import ViTConfig, resize_positions

# Our name in vit.py: the official name below the vision tower's prefix. {i} is the layer.
VIT_NAMES = {
    "cls_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embedding",
    "patch_embed": "embeddings.patch_embed",
    "pre_norm": "embeddings.pre_layernorm",
    "blocks.{i}.norm1": "encoder.layers.{i}.input_layernorm",
    "blocks.{i}.attn.qkv": "encoder.layers.{i}.self_attn.query_key_value",
    "blocks.{i}.attn.proj": "encoder.layers.{i}.self_attn.dense",
    "blocks.{i}.norm2": "encoder.layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
    "post_norm": "post_layernorm",
}
# Our name in abstractor.py: the official name below the abstractor's prefix.
ABSTRACTOR_NAMES = {
    "queries": "query_embeds",
    "layers.{i}.norm_q": "encoder.layers.{i}.crossattention.norm1",
    "layers.{i}.norm_k": "encoder.layers.{i}.crossattention.normk",
    "layers.{i}.attn.q": "encoder.layers.{i}.crossattention.attention.query",
    "layers.{i}.attn.k": "encoder.layers.{i}.crossattention.attention.key",
    "layers.{i}.attn.v": "encoder.layers.{i}.crossattention.attention.value",
    "layers.{i}.attn.q_pos": "encoder.layers.{i}.crossattention.attention.q_pos_embed",
    "layers.{i}.attn.k_pos": "encoder.layers.{i}.crossattention.attention.k_pos_embed",
    "layers.{i}.attn.out": "encoder.layers.{i}.crossattention.output.out_proj",
    "layers.{i}.norm_mlp": "encoder.layers.{i}.crossattention.output.norm2",
    "layers.{i}.mlp.w1": "encoder.layers.{i}.crossattention.output.mlp.w1",
    "layers.{i}.mlp.w2": "encoder.layers.{i}.crossattention.output.mlp.w2",
    "layers.{i}.mlp.w3": "encoder.layers.{i}.crossattention.output.mlp.w3",
    "layers.{i}.mlp.norm": "encoder.layers.{i}.crossattention.output.mlp.ffn_ln",
    "fc": "visual_fc",
    "eos": "vit_eos",
}
# Where the parts stand in each owl's checkpoint.
PREFIXES = {
    "owl1": {
        "vit": "vision_model.",
        "abstractor": "abstractor.",
        "llama": "language_model.model.",
        "llama.lm_head": "language_model.",
        "abstractor.queries": "query_tokens",
    },
    "owl2": {
        "vit": "model.vision_model.",
        "abstractor": "model.visual_abstractor.",
        "llama": "model.",
        "llama.lm_head": "",
        "abstractor.queries": "model.visual_abstractor.query_embeds",
    },
}
# CLIP's names for the vision tower; its q, k and v are three Linears, joined in `read_clip`.
CLIP_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "patch_embed": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",  # spelt so
    "blocks.{i}.norm1": "encoder.layers.{i}.layer_norm1",
    "blocks.{i}.attn.proj": "encoder.layers.{i}.self_attn.out_proj",
    "blocks.{i}.norm2": "encoder.layers.{i}.layer_norm2",
    "blocks.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
    "post_norm": "post_layernorm",
}
CLIP_UNUSED = (
    "text_model.",
    "text_projection",
    "visual_projection",
    "logit_scale",
    "vision_model.embeddings.position_ids",
)
ROTARY = re.compile(r"(^|\.)layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")  # computed, never read

MODEL_TYPES = {"mplug-owl": "owl1", "mplug_owl2": "owl2"}
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
COPIED_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SHARD_BYTES = 5_000_000_000


# --- names -----------------------------------------------------------------------------------------


def official_name(name: str, style: str) -> str:
    """What our parameter or module `name` is called in the released checkpoints of that style."""
    prefixes = PREFIXES[style]
    part, rest = name.split(".", 1)
    if name == "abstractor.queries":
        return prefixes[name]
    if part == "vit":
        return prefixes[part] + _rename(rest, VIT_NAMES)
    if part == "abstractor":
        return prefixes[part] + _rename(rest, ABSTRACTOR_NAMES)
    if rest.startswith("lm_head"):
        return prefixes["llama.lm_head"] + rest
    return prefixes[part] + rest


def _rename(name: str, table: dict[str, str]) -> str:
    """Looks a name up in a table, setting its layer number and its `.weight` or `.bias` aside."""
    stem, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        stem, dot, leaf = name, "", ""
    layer = re.search(r"\.(\d+)\.", stem)
    if layer is None:
        return table[stem] + dot + leaf
    stem = stem.replace(layer[0], ".{i}.", 1)
    return table[stem].replace("{i}", layer[1]) + dot + leaf


def official_state(model: Owl) -> dict[str, Tensor]:
    """The model's parameters and position buffers (not copies) under the released checkpoints' names.

    An adapter's own matrices are not part of it (lora.save writes them).
    """
    style = model.config.style
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" not in name:
            state[official_name(name, style)] = tensor
    return state


# --- files -----------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """Reads a JSON object; ValueError in one sentence if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def weight_map(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files of a model folder; for shards the keys that the index places in each.

    Raises FileNotFoundError if there are none, ValueError for an index that points outside the folder.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            break
    else:
        raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}")
    if not name.endswith(".index.json"):
        return {path: None}
    shards = {}
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path} has no weight_map")
    for key, shard in index.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".bin", ".safetensors")):
            raise ValueError(f"{path} names a shard {shard!r}: only weight files beside it are read")
        shards.setdefault(folder / shard, []).append(key)
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, though {path.name} lists it")
    return shards


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-maps one weight file; nothing but tensors is ever unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only files of torch's zip format can be mapped; older ones are read whole.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch.load fails in many ways on files that are cut or something else
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path} cannot be read, it seems truncated or corrupt ({reason})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()
    ):
        raise ValueError(f"{path} should hold a dictionary of tensors and nothing else")
    return tensors


def read_folder(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Yields (file, key, memory-mapped tensor) for all weights of a folder, a file at a time, with a progress bar."""
    shards = weight_map(folder)
    size = sum(path.stat().st_size for path in shards)
    bar = tqdm(total=size, desc=f"loading {folder.name}", unit="B", unit_scale=True, disable=None, leave=False)
    seen = set()
    with bar:
        for path, keys in shards.items():
            tensors = read_tensors(path)
            for key in keys or ():
                if key not in tensors:
                    raise ValueError(f"{path} has no tensor {key}, though the index places it there")
            for key in list(tensors):
                if key in seen:
                    raise ValueError(f"{path} has the tensor {key}, and so has another shard")
                seen.add(key)
                tensor = tensors.pop(key)
                yield path, key, tensor
                bar.update(tensor.nbytes)


# --- config.json -----------------------------------------------------------------------------------


def read_config(folder: Path) -> OwlConfig:
    """Reads an owl's config.json.

    Raises FileNotFoundError or ValueError, in one sentence, for anything that is not an mPLUG-Owl or
    mPLUG-Owl2 that this code can run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    content = read_json(path)
    style = MODEL_TYPES.get(str(content.get("model_type")))
    if style is None:
        raise ValueError(
            f"{path} is of model_type {content.get('model_type')!r}; known are {' and '.join(MODEL_TYPES)}"
        )
    try:
        return parse_config(content, style)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(content: dict, style: str) -> OwlConfig:
    """Turns the content of a config.json into a configuration. What it does not say is as in the 7B models."""
    if style == "owl1":
        vit = _section(content, "vision_config")
        abstractor = _section(content, "visual_abstractor_config")
        llama = _section(content, "text_config")
        n_query = _number(content, "num_query_tokens", 64)
        image_size = _number(vit, "image_size", 224)
    else:
        visual = _section(content, "visual_config")
        vit = _section(visual, "visual_model")
        abstractor = _section(visual, "visual_abstractor")
        llama = content
        n_query = _number(abstractor, "num_learnable_queries", 64)
        image_size = _number(vit, "image_size", 448)
    _expect(vit, "hidden_act", "quick_gelu")
    _expect(vit, "use_cls_token", True)
    _expect(vit, "use_post_layernorm", True)
    _expect(llama, "hidden_act", "silu")
    _expect(llama, "attention_bias", False)
    _expect(llama, "rope_scaling", None)
    _expect(llama, "tie_word_embeddings", False)
    n_head = _number(llama, "num_attention_heads", 32)
    config = OwlConfig(
        style=style,
        vit=ViTConfig(
            image_size=image_size,
            patch_size=_number(vit, "patch_size", 14),
            n_layer=_number(vit, "num_hidden_layers", 24),
            n_head=_number(vit, "num_attention_heads", 16),
            n_embd=_number(vit, "hidden_size", 1024),
            n_mlp=_number(vit, "intermediate_size", 4096),
            norm_eps=_number(vit, "layer_norm_eps", 1e-6),
        ),
        abstractor=AbstractorConfig(
            n_query=n_query,
            n_layer=_number(abstractor, "num_hidden_layers", 6),
            n_head=_number(abstractor, "num_attention_heads", 16),
            n_embd=_number(abstractor, "hidden_size", 1024),
            n_mlp=_number(abstractor, "intermediate_size", 2816),
            n_out=_number(llama, "hidden_size", 4096),
            norm_eps=_number(abstractor, "layer_norm_eps", 1e-6),
            dropout=float(abstractor.get("attention_probs_dropout_prob", 0.1 if style == "owl1" else 0.0)),
        ),
        llama=LlamaConfig(
            vocab_size=_number(llama, "vocab_size", 32000),
            context=_number(llama, "max_position_embeddings", 2048),
            n_layer=_number(llama, "num_hidden_layers", 32),
            n_head=n_head,
            n_kv_head=_number(llama, "num_key_value_heads", n_head),
            n_embd=_number(llama, "hidden_size", 4096),
            n_mlp=_number(llama, "intermediate_size", 11008),
            norm_eps=_number(llama, "rms_norm_eps", 1e-6),
            rope_theta=_number(llama, "rope_theta", 10000.0),
            adaptive=style == "owl2" and content.get("modality_adaptive") is not False,  # our key: to do without
            bos_id=_number(llama, "bos_token_id", 1, least=0),
            eos_id=_number(llama, "eos_token_id", 2, least=0),
        ),
    )
    if style == "owl2":
        config.abstractor.grid_size = config.vit.grid_size
    for part in (config.vit, config.abstractor, config.llama):
        if part.n_embd % part.n_head != 0:
            raise ValueError(f"a width of {part.n_embd} does not divide into {part.n_head} heads")
    if config.llama.head_dim % 2 != 0:
        raise ValueError(f"heads of {config.llama.head_dim} numbers cannot be rotated in pairs")
    if style == "owl2" and config.abstractor.n_embd % 4 != 0:
        raise ValueError(f"position codes need a width that is a multiple of 4, not {config.abstractor.n_embd}")
    if not 0 <= config.abstractor.dropout < 1:
        raise ValueError(f"attention_probs_dropout_prob should be from 0 to 1, not {config.abstractor.dropout}")
    if config.llama.n_head % config.llama.n_kv_head != 0:
        raise ValueError(f"{config.llama.n_head} heads do not share {config.llama.n_kv_head} key/value heads evenly")
    if config.vit.n_embd != config.abstractor.n_embd:
        raise ValueError(
            f"the vision tower ({config.vit.n_embd}) and the abstractor ({config.abstractor.n_embd}) differ in width"
        )
    return config


def read_quantization(folder: Path) -> str | None:
    """What a folder's weights are quantised to, a name of quantize.BITS; None if they are not.

    Raises FileNotFoundError or ValueError, in one sentence, for a config.json that read_config refuses, and for a
    quantisation that is none of ours.
    """
    read_config(folder)
    path = folder / "config.json"
    given = read_json(path).get("quantization")
    if given is None:
        return None
    for name, bits in BITS.items():
        if given == {"bits": bits, "group": GROUP}:
            return name
    known = " or ".join(json.dumps({"bits": bits, "group": GROUP}) for bits in BITS.values())
    raise ValueError(f"{path}: quantization should be {known}, not {json.dumps(given)[:200]}")


def _section(content: dict, key: str) -> dict:
    """A section of a config; one that is not there is empty."""
    section = content.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"{key} should be an object, not {section!r}")
    return section


def _number(section: dict, key: str, default: float, least: float | None = None) -> float:
    """A number from a config section, positive unless `least` says otherwise; whole where the default is."""
    value = section.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, type(default))) or not 0 <= value < 2**31:
        raise ValueError(f"{key} should be a positive number, not {value!r}")
    if value == 0 and least != 0:
        raise ValueError(f"{key} should be a positive number, not 0")
    return value


def _expect(section: dict, key: str, only: object) -> None:
    if section.get(key, only) not in (only, None):
        raise ValueError(f"{key} is {section[key]!r}; only {only!r} is supported")


def official_config(model: Owl) -> dict:
    """The config.json that the released code wants for this model."""
    config = model.config
    vit = {
        "model_type": "mplug_owl_vision_model",
        "image_size": config.vit.image_size,
        "patch_size": config.vit.patch_size,
        "num_hidden_layers": config.vit.n_layer,
        "num_attention_heads": config.vit.n_head,
        "hidden_size": config.vit.n_embd,
        "intermediate_size": config.vit.n_mlp,
        "layer_norm_eps": config.vit.norm_eps,
        "hidden_act": "quick_gelu",
        "num_channels": 3,
        "use_flash_attn": False,
    }
    abstractor = {
        "model_type": "mplug_owl_visual_abstract",
        "num_hidden_layers": config.abstractor.n_layer,
        "num_attention_heads": config.abstractor.n_head,
        "hidden_size": config.abstractor.n_embd,
        "encoder_hidden_size": config.vit.n_embd,
        "intermediate_size": config.abstractor.n_mlp,
        "layer_norm_eps": config.abstractor.norm_eps,
        "attention_probs_dropout_prob": config.abstractor.dropout,
    }
    llama = {
        "vocab_size": config.llama.vocab_size,
        "max_position_embeddings": config.llama.context,
        "num_hidden_layers": config.llama.n_layer,
        "num_attention_heads": config.llama.n_head,
        "num_key_value_heads": config.llama.n_kv_head,
        "hidden_size": config.llama.n_embd,
        "intermediate_size": config.llama.n_mlp,
        "rms_norm_eps": config.llama.norm_eps,
        "rope_theta": config.llama.rope_theta,
        "bos_token_id": config.llama.bos_id,
        "eos_token_id": config.llama.eos_id,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    dtype = str(model.llama.embed_tokens.weight.dtype).removeprefix("torch.")
    if config.style == "owl1":
        return {
            "architectures": ["MplugOwlForConditionalGeneration"],
            "model_type": "mplug-owl",
            "num_query_tokens": config.n_query,
            "torch_dtype": dtype,
            "vision_config": vit,
            "visual_abstractor_config": abstractor,
            "text_config": {"model_type": "llama"} | llama,
        }
    vit |= {"use_cls_token": True, "use_post_layernorm": True}
    abstractor |= {
        "grid_size": config.abstractor.grid_size,
        "num_learnable_queries": config.n_query,
        "use_cls_token": True,
        "add_v2t_pos_emb": False,
    }
    if not config.llama.adaptive:
        llama["modality_adaptive"] = False  # the released code has no such models, and does not know the key
    return llama | {
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "model_type": "mplug_owl2",
        "attention_bias": False,
        "rope_scaling": None,
        "torch_dtype": dtype,
        "visual_config": {"visual_model": vit, "visual_abstractor": abstractor},
    }


def official_preprocessor(model: Owl) -> dict:
    """The preprocessor_config.json that Owl2's released code wants: CLIP's, at the model's image size."""
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": model.config.image_size,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": model.config.image_size,
        "do_normalize": True,
        "image_mean": CLIP_MEAN.flatten().tolist(),
        "image_std": CLIP_STD.flatten().tolist(),
    }


# --- load and save ---------------------------------------------------------------------------------


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
) -> Owl:
    """Loads an official checkpoint folder, Owl1 or Owl2, in evaluation mode.

    quantize: "int8" or "int4", to quantise the language model's Linears, each as it is read (quantize.py). A folder
    that was saved quantised is loaded as it is.
    Raises FileNotFoundError or ValueError, in one sentence, for a folder that is not one, a file that cannot
    be read, a key that the model does not have, and a tensor that is missing or of another shape; and for
    quantised weights in float16, or quantised to something else than was asked for.
    """
    folder = Path(folder)
    config = read_shape(folder)
    saved = read_quantization(folder)
    if quantize is not None and quantize not in BITS:
        raise ValueError(f"weights are quantised to {' or '.join(BITS)}, not {quantize!r}")
    if saved is not None and quantize not in (None, saved):
        raise ValueError(f"{folder} is quantised to {saved} already, and cannot be to {quantize}")
    kind = saved or quantize
    if kind is not None and dtype == torch.float16:
        raise ValueError("quantised weights compute in bfloat16 or float32, not in float16, whose range is too small")
    with torch.device("meta"):
        model = Owl(config).to(dtype)
    tensors = read_weights(folder, config, saved)
    if kind is not None:
        quantize_linears(model.llama, BITS[kind])
    if saved is None:
        tensors = encoded(tensors, model, device)
    fill(model, tensors, device)
    model.tokenizer_folder = folder
    return model.eval()


def read_shape(folder: str | Path) -> OwlConfig:
    """A model folder's configuration, as read_config has it, corrected by the weights that lie there.

    Some Owl1 config files give the abstractor's MLP as 4096 wide while the weights are 2816: trust the weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    probe = official_name("abstractor.layers.0.mlp.w1.weight", config.style)
    try:
        files = weight_map(folder)
    except FileNotFoundError:
        return config  # no weights yet: who wants to read them will be told
    for path, keys in files.items():
        if keys is None or probe in keys:
            tensor = read_tensors(path).get(probe)
            if tensor is not None and tensor.dim() == 2:
                config.abstractor.n_mlp = tensor.shape[0]
    return config


def read_weights(
    folder: str | Path, config: OwlConfig, quantized: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for the whole model in a folder, one memory-mapped tensor at a time.

    config: the folder's own, from read_shape. quantized: what read_quantization says of it; who does not say so gets
    a ValueError for a quantised one. Raises as load_model does, the last of it at the end.
    """
    folder = Path(folder)
    if read_quantization(folder) != quantized:
        raise ValueError(f"{folder} is quantised, and training starts from weights that are not")
    with torch.device("meta"):
        model = Owl(config)
    if quantized is not None:
        quantize_linears(model.llama, BITS[quantized])
    expected = model.state_dict()
    ours = {official_name(name, config.style): name for name in expected}
    unknown = []
    for path, key, tensor in read_folder(folder):
        if ROTARY.search(key):
            continue
        name = ours.get(key)
        if name is None:
            unknown.append(f"{path.name}: {key}")
            continue
        target = expected.pop(name)
        _check_shape(path, key, tensor, target)
        # Codes are whole numbers, and nothing else is.
        if tensor.dtype != target.dtype and not (tensor.is_floating_point() and target.is_floating_point()):
            raise ValueError(f"{path}: {key} is of {tensor.dtype}, but the model's is of {target.dtype}")
        if name.endswith(".scale") and not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} has numbers that are not finite")
        yield name, tensor
    _refuse_unknown(folder, unknown)
    for name in list(expected):
        if name.endswith((".q_pos", ".k_pos")):  # computed where the files lack them
            yield name, position_codes(config.abstractor, name)
            del expected[name]
    if expected:
        name, tensor = next(iter(expected.items()))
        more = f" (and {len(expected) - 1} more)" if len(expected) > 1 else ""
        raise ValueError(f"{folder} lacks {official_name(name, config.style)}, of shape {list(tensor.shape)}{more}")


def resized(tensors: Iterable[tuple[str, Tensor]], config: OwlConfig) -> Iterator[tuple[str, Tensor]]:
    """The same tensors for a model that sees images of config's size: positions interpolated, codes computed anew.

    Owl2's stage 1 runs at 224 pixels, its stage 2 at 448. At the size that the tensors are for, nothing changes.
    """
    for name, tensor in tensors:
        if name == "vit.position_embedding":
            tensor = resize_positions(tensor, config.vit.n_token)
        if name.endswith(".k_pos") and tensor.shape[0] != config.vit.n_token:
            tensor = position_codes(config.abstractor, name)
        yield name, tensor


@torch.no_grad()
def fill(
    model: Owl,
    tensors: Iterable[tuple[str, Tensor]],
    device: str | torch.device,
    part: Callable[[Tensor, Tensor], Tensor] = lambda tensor, target: tensor,
) -> None:
    """Gives a model made without memory (on the meta device) its memory, and copies each tensor to its place.

    The parameters keep their dtypes. part(tensor, target): what of the tensor goes there; where several processes
    share a model, only this one's share (parallel.share).
    """
    model.to_empty(device=device)
    targets = model.state_dict()
    for name, tensor in tensors:
        target = targets.pop(name)
        target.copy_(part(tensor, target))
    if targets:
        raise ValueError(f"nothing was read for {next(iter(targets))}")


def load_non_lora(model: Owl, folder: str | Path) -> None:
    """Loads what an official LoRA run trained beside its adapter, if the adapter's folder holds such a file.

    non_lora_trainables.bin has base weights under PEFT's names, `base_model.model.` and the official name. Load it
    before the adapter. Raises ValueError as load_model does, and for a model that is quantised.
    """
    if is_quantized(model):
        raise ValueError("an adapter cannot be merged into quantised weights: merge first, then quantise")
    path = Path(folder) / "non_lora_trainables.bin"
    if not path.is_file():
        return
    state = official_state(model)
    for key, tensor in read_tensors(path).items():
        name = key.removeprefix("base_model.model.")
        if name not in state:
            raise ValueError(f"{path} has a tensor {key}, which the model does not")
        _check_shape(path, key, tensor, state[name])
        state[name].data.copy_(tensor)


def save_non_lora(model: Owl, folder: str | Path) -> None:
    """Writes what was trained beside an adapter as load_non_lora reads it; nothing, if nothing was."""
    trained = {}
    for name, tensor in official_state(model).items():
        if tensor.requires_grad:
            trained[f"base_model.model.{name}"] = tensor.detach()
    if trained:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / "non_lora_trainables.bin"
        torch.save(trained, path.with_name(path.name + ".part"))
        path.with_name(path.name + ".part").replace(path)


def position_codes(config: AbstractorConfig, name: str) -> Tensor:
    """The fixed position codes that the buffer `name` (.q_pos or .k_pos) holds."""
    if name.endswith(".q_pos"):
        return sincos_1d(torch.arange(config.n_query), config.n_embd)
    return sincos_2d(config.grid_size, config.n_embd)


def _check_shape(path: Path, key: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{path}: {key} has shape {list(tensor.shape)}, but the model's is {list(expected.shape)}"
        )


def _refuse_unknown(folder: Path, unknown: list[str]) -> None:
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"{folder} has tensors that the model does not: {', '.join(unknown[:5])}{more}")


def save_model(model: Owl, folder: str | Path) -> None:
    """Writes a model folder in the official layout: sharded safetensors, index, config.json, tokenizer files.

    The tokenizer files are those of model.tokenizer_folder, by default where the model was loaded from. Each file
    is written beside its place and then moved there. A quantised model is saved as it is: its codes as NAME.weight,
    with NAME.scale, and in config.json what they are. Raises ValueError if an adapter is not merged, if 4-bit
    weights have been used on CUDA, or if the folder holds weights under other names, which readers would mix up
    with these.
    """
    folder = Path(folder)
    if any(isinstance(module, LoRALinear) and not module.merged for module in model.modules()):
        raise ValueError("merge the adapter first (lora.merge), or save it alone (lora.save)")
    if is_packed(model):
        raise ValueError("4-bit weights cannot be saved once they have been used on CUDA: save the model before")
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in WEIGHT_FILES[1:] if (folder / name).exists()]
    if others:
        raise ValueError(f"{folder} already holds other weights ({', '.join(others)}): save to another folder")
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in official_state(model).items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        room -= size
        shards[-1][key] = tensor.detach().contiguous()
    index = {}
    total = 0
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / f"{name}.part", metadata={"format": "pt"})
        (folder / f"{name}.part").chmod(0o644)  # save_file lets nobody else read it
        (folder / f"{name}.part").replace(folder / name)
        index |= {key: name for key in shard}
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    source = model.tokenizer_folder
    if source is not None and source.resolve() != folder.resolve():
        for name in COPIED_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / f"{name}.part")
                (folder / f"{name}.part").replace(folder / name)
    write_json(folder / "preprocessor_config.json", official_preprocessor(model))
    config = official_config(model)
    if is_quantized(model):
        config["quantization"] = {"bits": bits_of(model), "group": GROUP}
    write_json(folder / "config.json", config)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file beside its place and moves it there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


# --- the starting points of stage 1 ------------------------------------------------------------------


def start_from(config: OwlConfig, clip: str | Path, llama: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for an owl that begins with CLIP's vision tower and a LLaMA; the abstractor is random.

    clip: a folder like openai/clip-vit-large-patch14. llama: a folder like huggyllama/llama-7b (Owl1) or
    meta-llama/Llama-2-7b-hf (Owl2). The image halves of the modality-adaptive module start as copies of
    the text halves. CLIP's position embeddings are interpolated to the configured image size. Only tensors are
    read: epsilons, rope_theta and context are the configuration's (1e-6 as in the released Owl2, where Llama 2's
    own config says 1e-5).
    Raises as load_model does.
    """
    with torch.device("meta"):
        expected = Owl(config).state_dict()
    abstractor = Abstractor(config.abstractor)
    init_weights(abstractor)
    for name, tensor in abstractor.state_dict().items():
        yield f"abstractor.{name}", tensor
    yield from read_clip(Path(clip), config.vit, expected)
    yield from read_llama(Path(llama), expected)


class Parts:
    """The tensors of a folder, to be taken out one by one; what is never taken is an error."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found = {key: (path, tensor) for path, key, tensor in read_folder(folder) if not ROTARY.search(key)}

    def take(self, key: str, shape: torch.Size | None = None) -> Tensor:
        """Takes a tensor out. ValueError if it is not there or, where a shape is given, of another."""
        if key not in self.found:
            raise ValueError(f"{self.folder} has no tensor {key}")
        path, tensor = self.found.pop(key)
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}, but the model's is {list(shape)}")
        return tensor

    def finish(self) -> None:
        _refuse_unknown(self.folder, [f"{path.name}: {key}" for key, (path, _) in self.found.items()])


def read_clip(folder: Path, config: ViTConfig, expected: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """CLIP's vision tower under our names; the text tower is passed over."""
    parts = Parts(folder)
    for key in list(parts.found):
        if key.startswith(CLIP_UNUSED):
            parts.take(key)
    for name, tensor in expected.items():
        if not name.startswith("vit."):
            continue
        if ".qkv." in name:
            # Three Linears become one, laid out head by head as vit.py reads it: [n_head, 3, head_dim, ...].
            layer, leaf = name.split(".")[2], name.split(".")[-1]
            prefix = f"vision_model.encoder.layers.{layer}.self_attn"
            shape = tensor.chunk(3)[0].shape
            q, k, v = (parts.take(f"{prefix}.{x}_proj.{leaf}", shape) for x in "qkv")
            heads = [x.reshape(config.n_head, 1, -1, *x.shape[1:]) for x in (q, k, v)]
            value = torch.cat(heads, dim=1).reshape(tensor.shape)
        else:
            key = "vision_model." + _rename(name.removeprefix("vit."), CLIP_NAMES)
            if name == "vit.cls_token":
                value = parts.take(key, tensor[0, 0].shape)[None, None]
            elif name == "vit.position_embedding":
                table = parts.take(key)
                rows = table.shape[0] if table.dim() == 2 else 0
                if rows < 2 or math.isqrt(rows - 1) ** 2 != rows - 1 or table.shape[1] != config.n_embd:
                    raise ValueError(
                        f"{folder}: {key} has shape {list(table.shape)}, not [1 + a square number, {config.n_embd}]"
                    )
                value = resize_positions(table[None], config.n_token)
            else:
                value = parts.take(key, tensor.shape)
        yield name, value
    parts.finish()


def read_llama(folder: Path, expected: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A plain LLaMA under our names; both halves of the modality-adaptive module get the one weight there is."""
    parts = Parts(folder)
    for name, tensor in expected.items():
        if not name.startswith("llama.") or ".multiway.1." in name:
            continue
        key = name.removeprefix("llama.").replace(".multiway.0.", ".")
        if not key.startswith("lm_head."):
            key = "model." + key
        value = parts.take(key, tensor.shape)
        yield name, value
        if ".multiway.0." in name:
            yield name.replace(".multiway.0.", ".multiway.1."), value
    parts.finish()
