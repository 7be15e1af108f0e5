"""Adapter folders in PEFT's layout, as the released code writes and reads them.

    adapter_config.json          rank, alpha, dropout and the adapted modules
    adapter_model.safetensors    base_model.model.NAME.lora_A.weight and .lora_B.weight; NAME: Hugging Face's
                                 (or adapter_model.bin)
    non_lora_trainables.bin      base_model.model.NAME: weights that were trained beside the adapter, if there are any
"""

from pathlib import Path

import torch
from torch import nn

from common.files import read_json, reading, write_json, writing
from lora import inject_lora, lora_modules
from model import Owl
from weights import hf_name, hf_state_dict, read_tensors, write_tensors

PREFIX = "base_model.model."
UNSUPPORTED = (  # what the update depends on beside rank and alpha; PEFT writes null, false or {} where it is not used
    "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# Initializations that leave the base weights as they are. Others (pissa, olora, corda, loftq, ...) move a part of them
# into the adapter, which is right only on top of what remains.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def save_lora(model: Owl, folder: str | Path, base: str = "") -> None:
    """Writes the adapter alone, in PEFT's files. base: the folder or hub name of the model that it was trained on."""
    modules = {hf_name(name, model.config.variant): module for name, module in lora_modules(model)}
    if not modules:
        raise ValueError("the model has no adapter to save")
    tensors = {}
    for name, module in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.weight
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.weight
    first = next(iter(modules.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)


@torch.no_grad()
def load_lora(model: Owl, folder: str | Path) -> None:
    """Injects the adapter that PEFT's files describe (adapter_model.safetensors or .bin) and loads its matrices.

    Raises FileNotFoundError or ValueError if a file is missing or corrupt, does not fit the model, or holds another
    kind of adapter than plain LoRA; the model is then as it was.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    config = read_json(path)
    with reading(path):
        rank, alpha, dropout = int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout", 0))
        plain = {"peft_type": "LORA", "bias": "none"}
        unsupported = [key for key in UNSUPPORTED if config.get(key)]
        unsupported += [key for key, value in plain.items() if config.get(key, value) != value]
        if unsupported:
            named = ", ".join(f"{key} {config[key]!r}" for key in unsupported)
            raise ValueError(f"{named} is not supported, only plain LoRA: merge the adapter with PEFT")
        if (init := config.get("init_lora_weights")) not in INITIALIZATIONS:
            raise ValueError(
                f"init_lora_weights {init!r} has changed the base weights: convert the adapter with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it with PEFT"
            )
        if not (1 <= rank < 2**31 and 0 < alpha < 1e6 and 0 <= dropout < 1):  # NaN is none of these
            raise ValueError(f"r {rank}, lora_alpha {alpha} or lora_dropout {dropout} is out of range")
        if config.get("use_rslora"):  # it divides by the root of the rank
            alpha *= rank**0.5

    # The Linears that the file names, and the shapes that their matrices must have.
    paths = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    path = next((path for path in paths if path.is_file()), paths[0])
    tensors = read_tensors(path)
    names, shapes = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key = PREFIX + hf_name(name, model.config.variant)
            pair = {f"{key}.lora_A.weight": (rank, module.in_features)}
            pair[f"{key}.lora_B.weight"] = (module.out_features, rank)
            if not tensors.keys().isdisjoint(pair):
                names[key] = name
                shapes |= pair
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != shapes or not found:
        wrong = [f"{key} {found.get(key)}" for key in found.keys() | shapes if found.get(key) != shapes.get(key)]
        raise ValueError(f"{path} does not fit the model: {', '.join(sorted(wrong)[:5])}")

    inject_lora(model, tuple(names.values()), rank, alpha, dropout)
    for key, name in names.items():
        module = model.get_submodule(name)
        module.lora_A.weight.copy_(tensors[f"{key}.lora_A.weight"])
        module.lora_B.weight.copy_(tensors[f"{key}.lora_B.weight"])


def save_non_lora(model: Owl, folder: str | Path) -> None:
    """Writes the weights that were trained beside an adapter, under PEFT's names; no file if there are none."""
    trained = {f"{PREFIX}{key}": x.detach() for key, x in hf_state_dict(model).items() if x.requires_grad}
    path = Path(folder) / "non_lora_trainables.bin"
    path.unlink(missing_ok=True)  # of an earlier adapter
    if trained:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as part:
            torch.save(trained, part)


@torch.no_grad()
def load_non_lora(model: Owl, folder: str | Path) -> None:
    """Loads what save_non_lora or a released LoRA run wrote, if the file is there. Call it before merge_lora, whose result it would overwrite."""
    path = Path(folder) / "non_lora_trainables.bin"
    if path.is_file():
        state = hf_state_dict(model)
        tensors = read_tensors(path)
        with reading(path):
            for key, tensor in tensors.items():
                if key.endswith(".rotary_emb.inv_freq"):  # as in folder_tensors
                    continue
                target = state[key.removeprefix(PREFIX)]
                if target.shape != tensor.shape or not target.is_floating_point():  # not into quantized weights
                    raise ValueError(f"{key} {list(tensor.shape)} does not fit {list(target.shape)} in {target.dtype}")
                target.copy_(tensor)
