"""How a model is distributed over processes, and in which precision it trains.

torchrun starts one process per GPU; each trains on its own part of every batch.

    ddp     Each process has the whole model. Gradients are averaged once per step, after the last backward pass.
    fsdp    Each process has a shard of every weight, of its gradient and of its optimizer state (FSDP2, fully_shard).
            A block's weights are gathered just before it runs and freed afterwards; its gradient is averaged and
            sharded as soon as it is complete:

                shard, float32 --cast, all-gather--> block, bfloat16 --forward, backward-->
                gradient, bfloat16 --reduce-scatter in float32--> shard of the gradient, float32

            On several nodes with equally many GPUs, the model is sharded within each node and replicated over the
            nodes (hybrid sharding): weights never cross the network between nodes, gradients do once per step.

Trained weights, their gradients and AdamW's moments are float32; on a GPU, frozen weights and matrix products are
bfloat16. Between the products, fsdp's activations are bfloat16 too; ddp's are float32 where autocast or a trained
weight makes them float32. On a CPU everything is float32.

Order: freeze parameters, prepare_blocks, shard (fsdp), materialize, wrap_ddp (ddp), forward pass in autocast (ddp).
"""

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.device import device_memory
from training.distributed import Dist, all_gather_object, backend_of

LARGE = 1_000_000_000  # parameters; from here on, activation checkpointing is the default
USABLE = 0.95  # of a device's memory; the rest is fragmentation, and the device's own needs


def choose_fsdp(requested: str | None, dist: Dist, bytes_by_kind: Callable[[], dict[str, float]]) -> bool:
    """Returns whether to shard: as requested ("ddp" or "fsdp"), else on several GPUs on which it does not fit.

    bytes_by_kind() returns what a device needs without sharding. All ranks do as rank 0 finds.
    """
    if requested is not None:
        return requested == "fsdp"
    if dist.world_size == 1 or dist.device.type != "cuda":
        return False
    fits = dist.is_main and sum(bytes_by_kind().values()) < USABLE * device_memory(dist.device)
    return not all_gather_object(dist, fits)[0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the transformer blocks of an Owl in the order in which they run."""
    return [*model.vit.blocks, *model.abstractor.layers, *model.llama.layers]


def prepare_blocks(model: nn.Module, dist: Dist, activation_checkpointing: bool, compile: bool) -> None:
    """Prepares a model on the meta device for training, after its parameters were frozen."""
    if compile:
        torch._dynamo.config.optimize_ddp = False  # it would split each compiled block where a bucket of 25 MB ends
        torch._dynamo.config.recompile_limit = 64  # one entry per block of a kind and per mode; 8 are not enough
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dist.dtype)
    for block in blocks(model):
        if compile:
            block.forward = torch.compile(block.forward)
        if activation_checkpointing:  # keeps a block's input only and recomputes the rest in the backward pass
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard_group_size(dist: Dist) -> int:
    """Returns how many processes share one copy of a sharded model: those of a node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size))


def shard(model: nn.Module, dist: Dist) -> None:
    """Shards a model on the meta device over the processes."""
    if not torch.distributed.is_initialized():  # a single process without torchrun
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend_of(dist.device), store=store, rank=0, world_size=1)
    n = shard_group_size(dist)
    if n == dist.world_size:
        mesh = init_device_mesh(dist.device.type, (n,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(dist.device.type, (dist.world_size // n, n), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=dist.dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The rest: embeddings, norms, lm_head. By default the root stays gathered after a forward pass without a backward
    # pass, as in validation; the optimizer and the checkpoint would then see unsharded weights.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def shard_like(tensor: Tensor, target: Tensor) -> Tensor:
    """Returns this process's shard of a full tensor if target is sharded, else the tensor itself."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.dtype), target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def materialize(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], device: str | torch.device) -> None:
    """Gives a model on the meta device its memory, and copies each tensor to its parameter, one at a time.

    Parameters keep their dtypes; of a sharded one, only the part of this process is copied. Raises ValueError if a
    tensor is missing, unexpected or of another shape.
    """
    model.to_empty(device=device)
    targets = model.state_dict()
    wrong = []
    for name, tensor in tensors:
        target = targets.pop(name, None)
        if target is None or tensor.shape != target.shape:
            wrong.append(f"{name} {list(tensor.shape)}")
        else:
            target.copy_(shard_like(tensor, target))
    if wrong or targets:
        raise ValueError(
            f"the weights do not fit the model: {len(targets)} tensors are missing ({', '.join([*targets][:5])}), "
            f"{len(wrong)} are unexpected or of another shape ({', '.join(wrong[:5])})"
        )


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the full tensor of one that may be sharded. All ranks must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrap_ddp(model: nn.Module, dist: Dist, fsdp: bool) -> nn.Module:
    """Wraps a model in DDP if it is replicated over several processes, else returns it."""
    if fsdp or dist.world_size == 1:
        return model
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of cls_token and eos, which are tiny
    # Buffers are equal on all ranks and never change.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def autocast(dist: Dist, fsdp: bool) -> AbstractContextManager:
    """Returns the context of the forward pass: mixed precision, unless FSDP casts by itself."""
    if fsdp or dist.dtype == torch.float32:
        return nullcontext()
    # Without the cache, no copies of the weights are kept between forward pass and recomputation.
    return torch.autocast(dist.device.type, dist.dtype, cache_enabled=False)


@torch.no_grad()
def gather_model_on_rank0(model: nn.Module, dist: Dist) -> None:
    """Gathers a trained model on the CPU of rank 0, tensor by tensor, in dist.dtype (LoRA matrices in their own).

    The parameters of the other ranks become empty. The model cannot be trained afterwards.
    """
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = full_tensor(parameter.detach())
            dtype = full.dtype if ".lora_" in path else dist.dtype
            kept = full.to("cpu", dtype) if dist.is_main else torch.empty(0)
            setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.cpu())
