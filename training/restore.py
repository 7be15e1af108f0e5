"""From a checkpoint, which holds training state, to the model that it was saved from.

    RUN/checkpoints/step-N/manifest.json   settings of the run: --weights, image size, alpha of the adapter, precision
      | restore_model
    base weights (those that the run started from) + trained parameters  -->  Owl on the CPU, an adapter still apart

A single process reads any checkpoint, also one that FSDP wrote on many devices, and only its weights, not AdamW's
moments. The model equals the one that the run would have written after this step, to the bit.
"""

from argparse import Namespace
from itertools import chain
from pathlib import Path

import torch

from data.text import Tokenizer
from lora import init_lora, inject_lora
from model import Owl
from training import checkpoint
from training.distributed import PRECISIONS, Dist
from training.parallel import gather_model_on_rank0, materialize, prepare_blocks
from training.presets import resize
from training.safe_metadata import SafeReader
from training.setup import initial_tensors
from weights import read_config

WEIGHT = "weight."  # prefix of a checkpoint's trained parameters; training_state has it


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint (or what is left of one) instead of a model."""
    return (Path(folder) / checkpoint.MANIFEST).is_file()


def restore_model(path: str | Path, weights: str | None = None) -> tuple[Owl, str, torch.dtype]:
    """Returns the model of a checkpoint, in evaluation mode on the CPU, the folder of its base weights, and its dtype.

    weights: that folder, if it is no longer where the run found it. Raises ValueError or OSError if the checkpoint is
    damaged, or if the run did not start from a model folder.
    """
    path = Path(path)
    cpu = Dist(0, 1, torch.device("cpu"), torch.float32)
    if (damage := checkpoint.find_damage(path, cpu)) is not None:
        raise ValueError(f"the checkpoint {path} cannot be used: {damage}")
    manifest = checkpoint.read_manifest(path)
    settings = manifest["facts"]["settings"]
    precision = {str(dtype): dtype for dtype in PRECISIONS.values()}.get(settings.get("precision"))
    if not isinstance(settings.get("weights"), str) or precision is None or "freeze_vit" not in settings:
        raise ValueError(f"{path} is of a run that did not start from --weights, whose start is not stored: resume it")
    if settings.get("quantize"):
        raise ValueError(f"{path} is of a run with --quantize, whose base is not stored: resume it instead")
    base = weights or settings["weights"]
    if not Path(base).is_dir():
        raise FileNotFoundError(
            f"{path} has only what was trained, and the rest, {base}, is not here: "
            f"python -m tools.export --checkpoint {path} --weights FOLDER --out MODEL"
        )

    # The model as build_run prepares it: trained parameters in float32, the others in the precision of the run.
    config = read_config(base)
    resize(config, int(settings["image_size"]) or config.image_size)
    tokenizer = Tokenizer(settings.get("tokenizer") or base)
    config.llama.eos_id = tokenizer.eos_id
    with torch.device("meta"):
        model = Owl(config)
    trained = {name.removeprefix(WEIGHT) for name in manifest["tensors"] if name.startswith(WEIGHT)}
    adapted = sorted(name.removesuffix(".lora_A.weight") for name in trained if name.endswith(".lora_A.weight"))
    if adapted:
        rank = SafeReader(path).metadata.state_dict_metadata[f"{WEIGHT}{adapted[0]}.lora_A.weight"].size[0]
        inject_lora(model, tuple(adapted), rank, settings["lora_alpha"], settings["lora_dropout"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    cpu.dtype = precision
    prepare_blocks(model, cpu, activation_checkpointing=False, compile=False)
    args = Namespace(weights=base)
    materialize(model, chain(initial_tensors(args, config), init_lora(model)), "cpu")

    parameters = {f"{WEIGHT}{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != {WEIGHT + name for name in trained}:
        raise ValueError(f"{path} does not fit {base}: it has other parameters")
    checkpoint.read_tensors(path, parameters)
    gather_model_on_rank0(model, cpu)
    model.tokenizer_folder = tokenizer.path.parent
    return model.eval(), base, precision
