"""Loads and saves model folders in the Hugging Face layout of the released weights. Files may be links (hub caches).

    config.json                     sizes of the parts; its model_type says whether it is an Owl1 or an Owl2
    model.safetensors               the weights: one file, or shards that model.safetensors.index.json lists,
    pytorch_model.bin                 or the same as pickles; one that holds anything but tensors is refused
    tokenizer.model                 LLaMA's SentencePiece model, or tokenizer.json (data/text.py reads it)

    load_model:  config.json --read_config--> OwlConfig --> Owl on the meta device (shapes without memory)
                 weight files --hf_tensors--> (our name, memory-mapped tensor) --assign_tensors--> the Owl's parameters
    save_model:  the Owl --hf_state_dict--> shards of 5 GB and their index; --hf_config--> config.json

A mapped tensor takes no memory until it is read, so loading needs memory for one copy of the model, in its dtype.
Weights are the result of training; a checkpoint (training/checkpoint.py) is the state of a run that can continue.
"""

import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from abstractor import AbstractorConfig
from common.files import check_file, read_json, reading, write_json, writing
from llama import LlamaConfig
from model import Owl, OwlConfig
from vit import CLIP_MEAN, CLIP_STD, ViTConfig

# The decoder's modules have Hugging Face's names. Tables translate those of the vision encoder and the abstractor.
PREFIXES = {  # our prefix: Hugging Face's; the first match is used
    "vit.": {"owl1": "vision_model.", "owl2": "model.vision_model."},
    "abstractor.queries": {"owl1": "query_tokens", "owl2": "model.visual_abstractor.query_embeds"},
    "abstractor.": {"owl1": "abstractor.", "owl2": "model.visual_abstractor."},
    "llama.lm_head": {"owl1": "language_model.lm_head", "owl2": "lm_head"},
    "llama.": {"owl1": "language_model.model.", "owl2": "model."},
}
VIT_NAMES = {  # substrings of our names in vit.py: Hugging Face's, replaced in this order
    "cls_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embedding",
    "patch_embed": "embeddings.patch_embed",
    "pre_norm": "embeddings.pre_layernorm",
    "post_norm": "post_layernorm",
    "blocks.": "encoder.layers.",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.qkv": "self_attn.query_key_value",
    "attn.proj": "self_attn.dense",
}
ABSTRACTOR_NAMES = {  # the same for abstractor.py
    "layers.": "encoder.layers.",
    "norm_q": "crossattention.norm1",
    "norm_k": "crossattention.normk",
    "norm_mlp": "crossattention.output.norm2",
    "attn.q_pos": "crossattention.attention.q_pos_embed",
    "attn.k_pos": "crossattention.attention.k_pos_embed",
    "attn.q": "crossattention.attention.query",
    "attn.k": "crossattention.attention.key",
    "attn.v": "crossattention.attention.value",
    "attn.out": "crossattention.output.out_proj",
    "mlp.norm": "crossattention.output.mlp.ffn_ln",
    "mlp.w": "crossattention.output.mlp.w",
    "fc": "visual_fc",
    "eos": "vit_eos",
}


def hf_name(name: str, variant: str) -> str:
    """Returns the Hugging Face name of our parameter or module `name`."""
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    table = {"vit.": VIT_NAMES, "abstractor.": ABSTRACTOR_NAMES}.get(prefix, {})
    return PREFIXES[prefix][variant] + translate(name.removeprefix(prefix), table)


def translate(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def hf_state_dict(model: Owl) -> dict[str, Tensor]:
    """Returns the parameters and position buffers (not copies) by Hugging Face name, without an adapter's matrices."""
    state = model.state_dict(keep_vars=True)
    return {hf_name(name, model.config.variant): tensor for name, tensor in state.items() if ".lora_" not in name}


# The first that exists is read.
WEIGHT_FILES = [stem + end for stem in ("model.safetensors", "pytorch_model.bin") for end in (".index.json", "")]
RELEASED = {  # config.json entries that tell the variants apart
    "owl1": {"architectures": ["MplugOwlForConditionalGeneration"], "model_type": "mplug-owl"},
    "owl2": {"architectures": ["MPLUGOwl2LlamaForCausalLM"], "model_type": "mplug_owl2"},
}
SECTIONS = {  # where config.json describes the vision encoder, the abstractor and the decoder
    "owl1": (["vision_config"], ["visual_abstractor_config"], ["text_config"]),
    "owl2": (["visual_config", "visual_model"], ["visual_config", "visual_abstractor"], []),
}
CONFIG_KEYS = {  # our config field: the key in its section
    "image_size": "image_size", "patch_size": "patch_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "n_mlp": "intermediate_size", "vocab_size": "vocab_size", "context": "max_position_embeddings",
    "rope_theta": "rope_theta", "bos_id": "bos_token_id", "eos_id": "eos_token_id",
    "n_query": "num_learnable_queries", "dropout": "attention_probs_dropout_prob", "norm_eps": "layer_norm_eps",
}  # fmt: skip
KEYS = {ViTConfig: CONFIG_KEYS, AbstractorConfig: CONFIG_KEYS, LlamaConfig: CONFIG_KEYS | {"norm_eps": "rms_norm_eps"}}
# Keys without a field, and the only value that the code implements.
VIT_VALUES = {"hidden_act": "quick_gelu", "use_cls_token": True, "use_post_layernorm": True}
LLAMA_VALUES = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None}


def read_config(folder: str | Path) -> OwlConfig:
    """Reads the configuration of a model folder. What config.json leaves out is as in the released 7B models."""
    path = Path(folder) / "config.json"
    has_weights = any((path.parent / name).is_file() for name in WEIGHT_FILES)
    if not has_weights and (path.parent / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is an adapter, not a model: use --weights BASE --adapter {folder}")
    hf = read_json(path)
    with reading(path):
        config = config_from_hf(hf)
    if has_weights:  # --check reads only the configuration
        shapes = {key: list(x.shape) for file in weight_files(path.parent) for key, x in read_tensors(file).items()}
        with reading(path):
            fit_to_weights(config, shapes)
    return config


def fit_to_weights(config: OwlConfig, shapes: dict[str, list[int]]) -> None:
    """Checks the sizes of config.json before a model is built from them. shapes: of the weights, by their names."""
    vit, abstractor, llama = config.vit, config.abstractor, config.llama
    assert vit.n_layer + abstractor.n_layer + llama.n_layer < len(shapes), "it has more layers than the weights"
    for name, shape in {
        "vit.patch_embed.weight": [vit.n_embd, 3, vit.patch_size, vit.patch_size],
        "vit.position_embedding": [1, vit.n_token, vit.n_embd],
        "abstractor.queries": [1, abstractor.n_query, vit.n_embd],
        "llama.embed_tokens.weight": [llama.vocab_size, llama.n_embd],
    }.items():
        key = hf_name(name, config.variant)
        found = shapes.get(key, shape if name == "abstractor.queries" else None)  # experiments/patches.py has none
        assert found == shape, f"its sizes give {key} the shape {shape}, the weights {found}"
    # Some Owl1 files give the abstractor's MLP a width of 4096 where the weights have 2816: the weights decide.
    abstractor.n_mlp = shapes.get(hf_name("abstractor.layers.0.mlp.w1.weight", config.variant), [abstractor.n_mlp])[0]


def config_from_hf(hf: dict) -> OwlConfig:
    """Turns the content of a config.json into a configuration."""
    variant = next((name for name, entries in RELEASED.items() if hf.get("model_type") == entries["model_type"]), None)
    if variant is None:
        raise ValueError(f"its model_type is {hf.get('model_type')!r}, which is neither Owl1's nor Owl2's")
    vision, resampler, text = (reduce(lambda hf, key: hf.get(key, {}), path, hf) for path in SECTIONS[variant])
    text = text | (text.get("rope_parameters") or {})  # where transformers 5 writes rope_theta and rope_type
    for section, values in ((vision, VIT_VALUES), (text, LLAMA_VALUES | {"rope_type": "default"})):
        for key, value in values.items():
            if section.get(key) not in (value, None):
                raise ValueError(f"{key} {section[key]!r} is not supported, only {value!r}")

    is_owl2 = variant == "owl2"
    vit = part_from_hf(ViTConfig, vision, image_size=448 if is_owl2 else 224)
    llama = part_from_hf(LlamaConfig, text, n_kv_head=text.get("num_attention_heads"))
    llama.tied = text.get("tie_word_embeddings") is True
    defaults = {"n_query": hf.get("num_query_tokens"), "n_out": llama.n_embd, "dropout": 0.0 if is_owl2 else 0.1}
    abstractor = part_from_hf(AbstractorConfig, resampler, **defaults)
    if is_owl2:
        abstractor.grid_size = vit.grid_size
        llama.adaptive = text.get("modality_adaptive") is not False  # our own key, for models without the module
    for part in (vit, abstractor, llama):
        assert part.n_embd % part.n_head == 0, "hidden_size is not a multiple of num_attention_heads"
    assert vit.n_embd == abstractor.n_embd, "the hidden_size of vision encoder and abstractor differ"
    assert abstractor.n_embd % 4 == 0 or not is_owl2, "the abstractor's hidden_size is not a multiple of 4"
    assert abstractor.n_query < 100_000, "num_learnable_queries is not below 100,000"
    assert abstractor.dropout < 1, "attention_probs_dropout_prob is not below 1"
    assert llama.n_head % llama.n_kv_head == 0, "num_attention_heads is not a multiple of num_key_value_heads"
    assert llama.head_dim % 2 == 0, "the decoder's head size is odd"
    return OwlConfig(variant, vit, abstractor, llama)


def part_from_hf(part: type, section: dict, **defaults: object) -> ViTConfig | AbstractorConfig | LlamaConfig:
    """Builds the config dataclass `part` from a section of config.json. defaults: where they are not the class's."""
    values = defaults | {name: section[key] for name, key in KEYS[part].items() if section.get(key) is not None}
    values = {field.name: values[field.name] for field in fields(part) if values.get(field.name) is not None}
    for name, value in values.items():
        if name == "eos_id" and isinstance(value, list) and value:  # of several end tokens only the first is used
            values[name] = value = value[0]
        least = 0 if name in ("bos_id", "eos_id", "dropout") else 1e-30
        types = (int, type(getattr(part, name)))
        if isinstance(value, bool) or not isinstance(value, types) or not least <= value < 2**31:
            raise ValueError(f"{KEYS[part][name]} is {value!r}, not a positive number")
    return part(**values)


def hf_config(model: Owl) -> dict:
    """Returns the config.json that the released code needs for this model."""
    config = model.config
    hf = {"torch_dtype": str(model.llama.embed_tokens.weight.dtype).removeprefix("torch.")}
    extras = (
        VIT_VALUES | {"model_type": "mplug_owl_vision_model", "num_channels": 3, "use_flash_attn": False},
        {"model_type": "mplug_owl_visual_abstract", "encoder_hidden_size": config.vit.n_embd},
        LLAMA_VALUES | {"model_type": "llama", "pad_token_id": 0, "tie_word_embeddings": config.llama.tied},
    )
    for part, path, extra in zip((config.vit, config.abstractor, config.llama), SECTIONS[config.variant], extras):
        section = reduce(lambda hf, key: hf.setdefault(key, {}), path, hf)
        section |= {key: getattr(part, name) for name, key in KEYS[type(part)].items() if hasattr(part, name)} | extra
    if config.variant == "owl1":
        hf["num_query_tokens"] = hf["visual_abstractor_config"].pop("num_learnable_queries")
    else:
        abstractor = hf["visual_config"]["visual_abstractor"]
        abstractor |= {"grid_size": config.abstractor.grid_size, "use_cls_token": True, "add_v2t_pos_emb": False}
        if not config.llama.adaptive:
            hf["modality_adaptive"] = False
    return hf | RELEASED[config.variant]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-maps one weight file. Nothing but tensors is unpickled."""
    with reading(path):
        check_file(path)
        if path.suffix == ".safetensors":
            with path.open("rb") as file:  # of a 7B model, 100,000; a million tensors take minutes to map
                assert int.from_bytes(file.read(8), "little") < 4_000_000, "its header is too large"
            return load_file(path)
        # torch can map files of its zip format; it reads older ones whole.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        for key, x in tensors.items():
            plain = isinstance(x, Tensor) and x.layout == torch.strided and x.is_cpu and not x.is_nested
            if not (plain and isinstance(key, str) and not x.is_quantized and x.nbytes <= x.untyped_storage().nbytes()):
                raise ValueError(f"{key!r} is not the name of a plain tensor")
        return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with writing(path) as part:
        mode = part.stat().st_mode
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, part, {"format": "pt"})
        part.chmod(mode)  # save_file makes it readable by its owner only


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """Returns the weight files of a folder, each with the keys that the index lists for it (none without an index)."""
    problem = f"none of {', '.join(WEIGHT_FILES)}"
    for first in (folder / name for name in WEIGHT_FILES if (folder / name).is_file()):
        files, index = {first: []}, {"weight_map": {}}
        if first.suffix == ".json":
            files, index = {}, read_json(first)
        with reading(first):
            for key, name in index["weight_map"].items():
                if Path(name).name != name or not name.endswith((".bin", ".safetensors")):
                    raise ValueError(f"{name!r} is not a weight file beside it")
                files.setdefault(folder / name, []).append(key)
        if not (missing := [path.name for path in files if not path.is_file()]):
            return files
        problem = f"{first.name} lists {', '.join(missing[:20])}, missing here"
        if len(missing) < len(files):  # an incomplete download; an index alone may lie beside other weights
            break
    raise FileNotFoundError(f"{folder} has no weights: {problem}")


def folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, memory-mapped tensor) for all weights of a folder. One file is mapped at a time."""
    seen = set()
    for path, keys in weight_files(folder).items():
        tensors = read_tensors(path)
        if wrong := [key for key in keys if key not in tensors] + [key for key in tensors if key in seen]:
            raise ValueError(f"{path} lacks tensors of the index or repeats those of another file: {wrong[:5]}")
        seen |= tensors.keys()
        for key in list(tensors):
            tensor = tensors.pop(key).detach()
            if not key.endswith(".rotary_emb.inv_freq"):  # in some files; llama.py computes it
                yield key, tensor


def hf_tensors(folder: str | Path, config: OwlConfig, quantized: Owl | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, memory-mapped tensor) for the whole model. Unexpected tensors keep their Hugging Face names.

    config: read_config(folder). quantized: the model, for a folder that inference/quantize.py saved.
    """
    folder = Path(folder)
    if quantized is None and read_json(folder / "config.json").get("quantization"):
        raise ValueError(f"{folder} is quantized: use load_quantized, or train from the weights that it was made from")
    with torch.device("meta"):
        state = (quantized or Owl(config)).state_dict()
    names = {hf_name(name, config.variant): name for name in state}
    for key, tensor in tqdm(folder_tensors(folder), "loading", len(names), leave=False, unit="tensor", disable=None):
        name = names.get(key, key)
        target = state.pop(name, tensor)
        if tensor.is_floating_point() != target.is_floating_point():
            raise ValueError(f"{folder}: {name} has the dtype {tensor.dtype}, not {target.dtype}")
        yield name, tensor
    # Some files leave out the fixed position embeddings. The model computes them, even on the meta device.
    yield from ((name, tensor) for name, tensor in state.items() if not tensor.is_meta)


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Owl:
    """Loads a model folder, in evaluation mode. inference.quantize.load_quantized loads quantized ones.

    Raises FileNotFoundError, or ValueError for files that cannot be read or do not fit each other.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Owl(config).to(dtype)
    assign_tensors(model, hf_tensors(folder, config), device, Path(folder))
    return model.eval()


@torch.no_grad()
def assign_tensors(model: Owl, tensors: Iterable[tuple[str, Tensor]], device: str | torch.device, folder: Path) -> None:
    """Gives a model on the meta device its weights, in the dtypes that it has. folder: where they come from."""
    targets = model.state_dict()
    state = {}
    for name, tensor in tensors:
        if name in targets and targets[name].shape == tensor.shape:  # load_state_dict refuses the others
            # Copy even if nothing changes: training must not write to the file, and the file may be overwritten.
            tensor = tensor.to(device, targets[name].dtype, copy=True, memory_format=torch.contiguous_format)
        state[name] = tensor
    with reading(folder):
        model.load_state_dict(state, assign=True)  # strict: lists all missing, unexpected and misshapen tensors
    model.tokenizer_folder = folder


SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("generation_config.json",)


def save_model(model: Owl, folder: str | Path, extra: dict = {}) -> None:
    """Writes a model folder: safetensors shards, index, config.json, and the files of model.tokenizer_folder.

    extra: more entries for config.json. Raises ValueError if an adapter is not merged, or if the folder holds weights
    under other names, which readers would take for these.
    """
    folder = Path(folder)
    state = hf_state_dict(model)
    if not extra and not all(tensor.is_floating_point() for tensor in state.values()):
        raise ValueError("the model is quantized: use inference.quantize.save_quantized")
    if not all(getattr(module, "merged", True) for module in model.modules()):
        raise ValueError("merge the adapter first (lora.merge_lora), or save it alone (inference.adapter.save_lora)")
    if others := [name for name in WEIGHT_FILES[1:] if (folder / name).exists()]:
        raise ValueError(f"{folder} already holds other weights ({', '.join(others)}): save to another folder")
    folder.mkdir(parents=True, exist_ok=True)

    # Split the tensors into shards of at most SHARD_BYTES.
    shard_of, n_bytes, n_shards = {}, 0, 1
    for key, tensor in state.items():
        n_bytes += tensor.nbytes
        if n_bytes > SHARD_BYTES and shard_of:
            n_bytes = tensor.nbytes
            n_shards += 1
        shard_of[key] = n_shards
    index = {key: f"model-{i:05d}-of-{n_shards:05d}.safetensors" for key, i in shard_of.items()}
    for name in sorted(set(index.values())):
        write_tensors(folder / name, {key: state[key] for key in index if index[key] == name})

    # The other files, last the index.
    for name in TOKENIZER_FILES if model.tokenizer_folder is not None else ():
        source = model.tokenizer_folder / name
        if source.is_file() and source.resolve() != (folder / name).resolve():
            with writing(folder / name) as part:
                shutil.copyfile(source, part)
    size = model.config.image_size
    preprocessor = {  # CLIP's, for the released Owl2 code
        "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": size, "resample": 3,
        "do_center_crop": True, "crop_size": size, "do_normalize": True,
        "image_mean": CLIP_MEAN.flatten().tolist(), "image_std": CLIP_STD.flatten().tolist(),
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_json(folder / "config.json", hf_config(model) | extra)
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
