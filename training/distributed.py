"""The processes of a run, one per device, and the collectives that they call together.

    torchrun --nproc_per_node=8 train_stage2.py ...    sets RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE
        | init_distributed
    Dist(rank, world_size, device, dtype)              passed to everything that depends on them
        | all_reduce_sum, all_gather_object, barrier   without torchrun, these return at once

`dist` is always a Dist; the module torch.distributed is spelled in full.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from common.device import disable_tf32

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Dist:
    """Rank and device of this process, and the precision in which it computes."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products and of frozen weights

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_distributed(device_name: str | None, precision: str | None = None) -> Dist:
    """Selects the device and joins the other processes if torchrun started several.

    device_name: as in torch.device; None for CUDA if there is any, else the CPU. precision: "bf16", "fp32", or None
    for bf16 on CUDA and fp32 elsewhere. Raises ValueError if the device cannot be used.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    name = device_name if device_name is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if world_size > 1 and ":" in name:
        raise ValueError(f"--device {name}: several processes cannot share one device; use --device cuda")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"

    disable_tf32()
    # A device that does not exist or has no driver fails here, in one of several ways, and not later in the run.
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason[:200]}") from None

    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    if world_size > 1 and not torch.distributed.is_initialized():
        # The timeout is long because all ranks wait while rank 0 writes the model, which takes minutes for a 7B.
        torch.distributed.init_process_group(
            backend_of(device), timeout=timedelta(hours=2), device_id=device if is_cuda else None
        )
    dtype = PRECISIONS[precision or ("bf16" if is_cuda else "fp32")]
    # The setting holds for CPUs too, whose flash attention has a backward pass 3 times as slow as products in bfloat16.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu" or dtype != torch.bfloat16)
    return Dist(rank, world_size, device, dtype)


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def all_reduce_sum(dist: Dist, *numbers: float) -> list[float]:
    """Sums each number over all ranks, in float64."""
    if dist.world_size == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=dist.device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def all_gather_object(dist: Dist, value: object) -> list:
    """Returns the values of all ranks, in the order of the ranks. They are pickled on the way."""
    if dist.world_size == 1:
        return [value]
    values = [None] * dist.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def barrier(dist: Dist) -> None:
    """Waits until all ranks are here."""
    if dist.world_size > 1:
        torch.distributed.barrier()
