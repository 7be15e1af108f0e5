"""Loads a model for inference: selects device and dtype, merges a LoRA adapter, quantizes."""

from pathlib import Path

import torch

from common.device import cpu_has_bfloat16, device_memory, disable_tf32
from inference.adapter import load_adapter
from inference.fast_decode import use_column_major_weights
from inference.quantize import BITS, load_quantized, quantize, read_quantization
from lora import merge_lora
from model import Owl, OwlConfig
from weights import load_model, read_config


def select_device(name: str) -> torch.device:
    """Returns the device with that name; for "auto" the first of cuda, mps and cpu. Raises ValueError if unusable."""
    disable_tf32()
    if name == "auto":
        backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((name for name, backend in backends.items() if backend.is_available()), "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):  # which one depends on how torch was built
        raise ValueError(f"there is no device {name!r} here that torch can use") from None


def select_dtype(name: str, device: torch.device, config: OwlConfig, is_quantized: bool) -> torch.dtype:
    """Returns the dtype with that name; for "auto" the one that suits the device and its memory."""
    if name != "auto":
        return getattr(torch, name)
    # Not float16: the models were trained in bfloat16, and squares of a few activations overflow float16.
    if device.type != "cpu" or is_quantized or cpu_has_bfloat16():
        return torch.bfloat16
    with torch.device("meta"):
        n_parameter = sum(parameter.numel() for parameter in Owl(config).parameters())
    # A quarter of the memory is left for the KV cache, activations and other programs.
    return torch.float32 if 4 * n_parameter < 0.75 * device_memory(device) else torch.bfloat16


def load_with_adapter(
    folder: Path, adapter: Path | None, device: torch.device, dtype: torch.dtype, to: str | None = None
) -> Owl:
    """Loads a model, merges an adapter into it if one is given, and quantizes it to "int8" or "int4" if asked."""
    if adapter is None:
        return load_quantized(folder, device, dtype, to)
    if read_quantization(folder) is not None:
        raise ValueError(f"{folder} is quantized; an adapter needs the unquantized weights, and --quantize if wanted")
    model = load_model(folder, device, dtype)
    load_adapter(model, adapter)
    merge_lora(model)
    if to is not None:
        quantize(model.llama, BITS[to])
    return model


def load_for_inference(
    folder: Path,
    *,
    adapter: Path | None,
    quantize_to: str | None,
    device: str,
    dtype: str,
    model: Owl | None = None,
) -> tuple[Owl, torch.device, torch.dtype]:
    """Loads a model, merges an adapter into it and quantizes it, in this order. Returns (model, device, dtype).

    device: a torch device or "auto". dtype: "float32", "bfloat16", "float16" or "auto". quantize_to: "int8" or "int4".
    model: one to use instead of the folder's, without an adapter (training/restore.py has those of checkpoints).
    Raises ValueError or OSError if a file cannot be read or the model does not fit the device's memory.
    """
    config = read_config(folder) if model is None else model.config
    target = select_device(device)
    saved = read_quantization(folder) if model is None else None
    precision = select_dtype(dtype, target, config, bool(quantize_to or saved))
    try:
        if model is None:
            model = load_with_adapter(folder, adapter, target, precision, quantize_to)
        else:
            model.to(target, precision)
            if quantize_to is not None:
                quantize(model.llama, BITS[quantize_to])
    except torch.OutOfMemoryError:
        raise ValueError(f"{folder} does not fit the memory of {target} in {precision}") from None
    use_column_major_weights(model.llama)
    return model, target, precision
