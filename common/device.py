"""Limits of the machine: the memory of a device, bfloat16, full-precision float32, and numbers that are not finite."""

import os

import torch
from torch import Tensor, nn


def device_memory(device: torch.device) -> int:
    """Returns the total memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return 16 * 2**30  # a guess, small enough that a 7B model is loaded in bfloat16
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_has_bfloat16() -> bool:
    """Returns whether this CPU has instructions for bfloat16 (AVX-512 BF16; AMX includes it), or emulates it slowly."""
    return torch.cpu._is_avx512_bf16_supported()


def disable_tf32() -> None:
    """Makes CUDA compute float32 in float32.

    By default cuDNN's convolutions round their inputs to TF32, with 10 bits of mantissa, and choose the algorithm by
    the batch size; TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some containers set, does it in matrix products too.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def not_finite(model: nn.Module, images: Tensor | None) -> ValueError:
    """Returns an error that says what is NaN or infinite in an Owl: weights, visual tokens or only the logits.

    images: as in Owl.embed. Takes a pass over all weights, so call it only after a non-finite value was found.
    """
    tensors = {f"the weights {name}": x for name, x in model.state_dict().items() if x.is_floating_point()}
    if images is not None:
        tensors["the visual tokens"] = images if images.ndim == 3 else model.encode_images(images)
    name = next((name for name, x in tensors.items() if not x.isfinite().all()), "the logits")
    dtype = model.llama.embed_tokens.weight.dtype
    advice = ": try bfloat16 or float32" if dtype == torch.float16 else ""  # the others have the range of the weights
    return ValueError(f"{name} are not finite in {dtype}{advice}")
