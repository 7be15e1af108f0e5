"""Adapter folders in PEFT's layout, as PEFT and the released code write them.

    adapter_config.json          rank, alpha, dropout and the adapted modules
    adapter_model.safetensors    base_model.model.NAME.lora_A.weight and .lora_B.weight; NAME: Hugging Face's
                                 (or adapter_model.bin; or pytorch_model.bin, the whole state of a training run)
    non_lora_trainables.bin      base_model.model.NAME: weights that were trained beside the adapter, if there are any

What an adapter may have beside lora_A and lora_B, and what loading does with it:

    rank_pattern, alpha_pattern  other values for some modules          kept in each LoRALinear
    use_rslora                   scale alpha / sqrt(rank)               kept as alpha * sqrt(rank), divided by the rank
    use_dora                     lora_magnitude_vector                  a DoRALinear (inference/dora.py)
    lora_bias                    lora_B.bias                            times the scale, added to the Linear's bias
    bias, modules_to_save        other weights of the model, trained    replace the model's

Everything else that would change the result is refused by name.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import read_json, reading, write_json, writing
from inference.dora import DoRALinear
from lora import LoRALinear, lora_modules
from model import Owl
from weights import hf_name, hf_state_dict, read_tensors, write_tensors

PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")  # the first that exists is read
OWL1_CONFIG = {"r": 8, "lora_alpha": 32}  # of Owl1's released script, which saves pytorch_model.bin alone
UNSUPPORTED = (  # PEFT writes null, false or {} where it is not used
    "fan_in_fan_out", "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
SUPPORTED_VALUES = {"peft_type": ("LORA",), "bias": ("none", "all", "lora_only")}
# Initializations that leave the base weights as they are. Others (pissa, olora, corda, loftq, ...) move a part of them
# into the adapter, which is right only on top of what remains.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


# --- saving ------------------------------------------------------------------------------------------


def save_lora(model: Owl, folder: str | Path, base: str = "") -> None:
    """Writes the adapter alone, in PEFT's files. base: the folder or hub name of the model that it was trained on."""
    modules = {hf_name(name, model.config.variant): module for name, module in lora_modules(model)}
    if not modules:
        raise ValueError("the model has no adapter to save")
    tensors = {}
    for name, module in modules.items():
        adapter = {leaf: tensor for leaf, tensor in module.named_parameters() if leaf.startswith("lora_")}
        tensors |= {f"{PREFIX}{name}.{leaf}": tensor for leaf, tensor in adapter.items()}
    first = next(iter(modules.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {name: module.rank for name, module in modules.items() if module.rank != first.rank},
        "alpha_pattern": {name: module.alpha for name, module in modules.items() if module.alpha != first.alpha},
        "use_dora": isinstance(first, DoRALinear),
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)


def save_non_lora(model: Owl, folder: str | Path) -> None:
    """Writes the weights that were trained beside an adapter, under PEFT's names; no file if there are none."""
    trained = {f"{PREFIX}{key}": x.detach() for key, x in hf_state_dict(model).items() if x.requires_grad}
    path = Path(folder) / "non_lora_trainables.bin"
    path.unlink(missing_ok=True)  # of an earlier adapter
    if trained:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as part:
            torch.save(trained, part)


# --- loading -----------------------------------------------------------------------------------------


def load_adapter(model: Owl, folder: str | Path) -> None:
    """Loads everything that an adapter folder holds into its base model. lora.merge_lora then merges it."""
    load_non_lora(model, folder)
    load_lora(model, folder)


@torch.no_grad()
def load_lora(model: Owl, folder: str | Path) -> None:
    """Injects the adapter that PEFT's files describe, and loads its matrices and what else was trained.

    Raises FileNotFoundError or ValueError if a file is missing or corrupt, does not fit the model, or holds another
    kind of adapter; the model is then as it was.
    """
    folder = Path(folder)
    if any(lora_modules(model)):
        raise ValueError("the model already has an adapter: load the model again")
    path = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    config_path = folder / "adapter_config.json"
    is_owl1_run = model.config.variant == "owl1" and path.name == "pytorch_model.bin" and not config_path.exists()
    config = OWL1_CONFIG if is_owl1_run else read_json(config_path)
    with reading(config_path):
        check_config(config)
    tensors = read_plain(path)

    # The Linears that the file adapts, and the shapes that their tensors must have.
    linears = {hf_name(name, model.config.variant): name for name, x in model.named_modules() if type(x) is nn.Linear}
    names = {key: name for key, name in linears.items() if {f"{key}.lora_{x}.weight" for x in "AB"} & tensors.keys()}
    adapters, shapes = {}, {}
    for key, name in names.items():
        linear = model.get_submodule(name)
        with reading(config_path):
            rank, alpha = rank_and_alpha(config, key)
        adapters[key] = (linear, rank, alpha, float(config.get("lora_dropout", 0)))
        shapes |= {f"{key}.lora_A.weight": (rank, linear.in_features)}
        shapes |= {f"{key}.lora_B.weight": (linear.out_features, rank)}
        if config.get("use_dora"):
            shapes |= {f"{key}.lora_magnitude_vector": (linear.out_features,)}
        if config.get("lora_bias"):
            if linear.bias is None:
                raise ValueError(f"{config_path}: lora_bias is not supported for {key}, which has no bias to add it to")
            shapes |= {f"{key}.lora_B.bias": (linear.out_features,)}

    # Other weights of the model, which replace it: those that are in the file, and those that must be there.
    state = {key: tensor for key, tensor in hf_state_dict(model).items() if tensor.is_floating_point()}
    with reading(config_path):
        others = {key: tensor for key, tensor in state.items() if key in tensors or must_be_saved(config, key, names)}
    shapes |= {key: tuple(tensor.shape) for key, tensor in others.items()}

    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != shapes or not names:
        wrong = [f"{key} {found.get(key)}" for key in found.keys() | shapes if found.get(key) != shapes.get(key)]
        raise ValueError(f"{path} does not fit the model: {', '.join(sorted(wrong)[:5]) or 'it has no adapter'}")

    model.requires_grad_(False)
    for key, target in others.items():
        target.copy_(tensors[key])
    for key, parts in adapters.items():
        module = (DoRALinear if config.get("use_dora") else LoRALinear)(*parts)
        for leaf, parameter in module.named_parameters():
            if leaf.startswith("lora_"):
                parameter.copy_(tensors[f"{key}.{leaf}"])
        if config.get("lora_bias"):
            module.bias += module.scale * tensors[f"{key}.lora_B.bias"]
        model.set_submodule(names[key], module)


@torch.no_grad()
def load_non_lora(model: Owl, folder: str | Path) -> None:
    """Loads what save_non_lora or a released LoRA run wrote, if the file is there; before merge_lora."""
    path = Path(folder) / "non_lora_trainables.bin"
    if path.is_file():
        state = hf_state_dict(model)
        tensors = read_plain(path)
        with reading(path):
            for key, tensor in tensors.items():
                target = state[key]
                if target.shape != tensor.shape or not target.is_floating_point():  # not into quantized weights
                    raise ValueError(f"{key} {list(tensor.shape)} does not fit {list(target.shape)} in {target.dtype}")
                target.copy_(tensor)


def read_plain(path: Path) -> dict[str, Tensor]:
    """Reads a file of PEFT's under the model's own Hugging Face names.

    Trainers save PEFT's state as it is in memory, with parts in its names that PEFT's own files lack:

        base_model.model.N.base_layer.weight           N.weight
        base_model.model.N.lora_A.default.weight       N.lora_A.weight
        base_model.model.M.modules_to_save.default.weight   M.weight
        base_model.model.M.original_module.weight      not used
    """
    tensors = {}
    for key, tensor in read_tensors(path).items():
        name = key.removeprefix(PREFIX)
        if ".original_module." in name or name.endswith(".rotary_emb.inv_freq"):  # as in weights.folder_tensors
            continue
        name = re.sub(r"\.(default|base_layer|modules_to_save)(?=\.|$)", "", name)
        name = re.sub(r"(?<=\.lora_magnitude_vector)\.weight$", "", name)
        if name in tensors:
            raise ValueError(f"{path} has two tensors for {name}")
        tensors[name] = tensor
    return tensors


def check_config(config: dict) -> None:
    """Raises ValueError if an adapter_config.json describes what load_lora would not do right."""
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    unsupported += [key for key, values in SUPPORTED_VALUES.items() if config.get(key, values[0]) not in values]
    if config.get("use_dora") and config.get("lora_bias"):
        unsupported += ["use_dora", "lora_bias"]  # PEFT has no such adapters
    if unsupported:
        named = ", ".join(f"{key} {config[key]!r}" for key in unsupported)
        raise ValueError(f"{named} is not supported: merge the adapter with PEFT")
    if (init := config.get("init_lora_weights")) not in INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights {init!r} has changed the base weights: convert the adapter with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it with PEFT"
        )
    if not 0 <= float(config.get("lora_dropout", 0)) < 1:
        raise ValueError(f"lora_dropout {config['lora_dropout']} is out of range")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            # Regular expressions of strangers: one that repeats a group, or repeats often, can take forever.
            if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > 2:
                raise ValueError(f"{key} {pattern!r} is too complex: write the modules' names")
    rank_and_alpha(config, "")


def rank_and_alpha(config: dict, name: str) -> tuple[int, float]:
    """Returns rank and alpha of a module, whose scale alpha / rank is PEFT's. name: Hugging Face's."""
    rank = int(find_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(find_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    if not (1 <= rank < 2**31 and 0 < alpha < 1e6):  # NaN is none of these
        raise ValueError(f"r {rank} or lora_alpha {alpha} is out of range")
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha


def find_pattern(patterns: dict | None, name: str, default: float) -> float:
    """Returns the value of the first pattern, a regular expression, that matches a module's name or its last parts."""
    matching = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, default)


def must_be_saved(config: dict, key: str, adapted: dict[str, str]) -> bool:
    """Whether PEFT saves this weight of the model beside the adapter of the modules `adapted`."""
    is_bias = key.endswith(".bias")
    if config.get("bias") == "all" and is_bias or config.get("bias") == "lora_only" and is_bias and key[:-5] in adapted:
        return True
    return any(f".{module}." in f".{key}" for module in config.get("modules_to_save") or ())
