"""How a model is spread over processes, and in which precision it is trained.

torchrun starts one process a GPU; each trains on its own part of every batch.

    ddp     each process holds the whole model; gradients are averaged once a step, after the last backward pass.
    fsdp    each process holds a part of every weight, of its gradient and of its optimizer state
            (PyTorch's fully_shard, FSDP2). A block's weights are gathered from all processes just before it
            runs, and dropped after; its gradient is averaged and cut up as soon as it is there:

                my part of a block, float32 --cast, all-gather--> the block, bfloat16 --forward, backward-->
                its gradient, bfloat16 --reduce-scatter in float32--> my part of the gradient, float32

            On several nodes (of as many GPUs each) the parts are those of one node, and the nodes are copies of
            each other (hybrid sharding): what is gathered never crosses the slow wires between nodes, only
            gradients do, once a step.

In both, matrix products are in bfloat16 on a GPU, while the weights that are trained, their gradients and AdamW's
moments are float32; frozen weights are kept in bfloat16. Between the products, fsdp's activations are bfloat16 too;
ddp's are float32 where autocast or a trained weight makes them so. On a CPU all is float32.
"""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
LARGE = 1_000_000_000  # parameters from which on it is worth sharding what is trained, and recomputing activations


@dataclass
class Place:
    """Where this process runs, and how it computes."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of matrix products and of frozen weights

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_process(device_name: str | None, precision: str | None = None) -> Place:
    """Joins the other processes, if torchrun started several. ValueError if the device is not there.

    precision: "bf16", "fp32" or, for the device's own, None.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if world > 1 and ":" in name:
        raise ValueError(f"--device {name}: several processes cannot share one device; say --device cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no usable CUDA device")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device that torch knows") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason[:200]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # The others wait while the first process writes the model: of a 7B, that takes a while.
        own = device if device.type == "cuda" else None
        dist.init_process_group(backend_of(device), timeout=timedelta(hours=2), device_id=own)
    return Place(rank, world, device, PRECISIONS[precision or ("bf16" if device.type == "cuda" else "fp32")])


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def total(place: Place, *numbers: float) -> list[float]:
    """The sums of some numbers over all processes."""
    if place.world == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=place.device)
    dist.all_reduce(sums)
    return sums.tolist()


def from_all(place: Place, mine: object) -> list:
    """What each process has to tell, in the order of their ranks."""
    everyone = [mine]
    if place.world > 1:
        everyone = [None] * place.world
        dist.all_gather_object(everyone, mine)
    return everyone


def wait_for_all(place: Place) -> None:
    if place.world > 1:
        dist.barrier()


def choose_fsdp(asked: str | None, model: nn.Module, place: Place) -> bool:
    """Whether to shard: as asked ("ddp" or "fsdp"), by default where much is trained on several GPUs."""
    if asked is not None:
        return asked == "fsdp"
    return place.world > 1 and place.device.type == "cuda" and n_trained(model) > LARGE


def n_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def device_memory(device: torch.device) -> int:
    """The bytes that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of an Owl, in the order in which they run."""
    return [*model.vit.blocks, *model.abstractor.layers, *model.llama.layers]


def ready(model: nn.Module, place: Place, recompute: bool, compile: bool) -> None:
    """Readies a model that has no memory yet (on the meta device) for training; what is frozen has been chosen.

    recompute: keep of each block's activations only its input, and compute the block again in the backward pass.
    compile: torch.compile, block by block.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else place.dtype)
    for block in blocks(model):
        if compile:
            block.forward = torch.compile(block.forward)
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def n_sharing(place: Place) -> int:
    """How many processes share one copy of a sharded model: those of a node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", place.world))


def shard(model: nn.Module, place: Place) -> None:
    """Shards a model that has no memory yet (on the meta device) over the processes."""
    if not dist.is_initialized():  # a single process, without torchrun
        dist.init_process_group(backend_of(place.device), store=dist.HashStore(), rank=0, world_size=1)
    n = n_sharing(place)
    sizes, names = ((n,), ("shard",)) if n == place.world else ((place.world // n, n), ("copy", "shard"))
    mesh = init_device_mesh(place.device.type, sizes, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=place.dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # All else: embeddings, lm_head. By default the outermost module stays gathered after a forward pass without a
    # backward one, as in validation; the optimizer and the checkpoint would then find whole weights.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def share(tensor: Tensor, target: Tensor) -> Tensor:
    """What of a tensor this process keeps: its part where `target`, the place for it, is sharded; else all of it."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.dtype), target.device_mesh, target.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. All processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def with_ddp(model: nn.Module, place: Place, fsdp: bool) -> nn.Module:
    """The model itself or, where it is copied to several processes, DDP around it."""
    if fsdp or place.world == 1:
        return model
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of cls_token and eos, which are tiny
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def precision(place: Place, fsdp: bool) -> AbstractContextManager:
    """Casts to the place's precision as the model runs; sharded models do so by themselves."""
    if fsdp or place.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(place.device.type, place.dtype, cache_enabled=False)  # no copies kept of what is recomputed


@torch.no_grad()
def collect(model: nn.Module, place: Place) -> None:
    """Brings a trained model together on the first process, on its CPU, in the dtype that it computes in.

    Tensor by tensor, and the other processes keep nothing. An adapter's small matrices stay as exact as they are.
    The model cannot be trained after it.
    """
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = whole(parameter.detach())
            dtype = full.dtype if ".lora_" in path else place.dtype
            kept = full.to("cpu", dtype) if place.is_first else torch.empty(0)
            setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.cpu())
