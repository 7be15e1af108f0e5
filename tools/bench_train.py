"""Speed of the training step, with random weights and without data loading.

    python -m tools.bench_train                                 the benchmark set of this device
    python -m tools.bench_train --preset mid-owl2 --stage 2 --freeze-vit --micro-batch 2 --length 256
    torchrun --nproc_per_node=8 -m tools.bench_train --preset owl2-7b --stage 2 --recompute

Each step trains on the same random micro-batch; a sample has one image and --length text tokens, half of them
supervised. The table shows for the median step: milliseconds, tokens/s and images/s over all devices, MFU (model FLOPs
utilization: FLOPs of the step, without recomputation, per second as a share of the device's peak; training/flops.py),
peak memory (of tensors on CUDA, of the whole process on a CPU), and the memory that --dry-run would predict.
"""

import argparse
import gc
from dataclasses import replace
from statistics import median

import torch

import train_stage1
import train_stage2
from command import run, user_errors
from data.conversations import Batch, collate
from inference.qlora import quantize_base
from inference.quantize import BITS, QuantizedLinear
from model import Owl
from tools import benchmark
from train import clip_grad_norm, compute_loss
from training.distributed import Dist, all_reduce_sum, init_distributed
from training.flops import peak_flops, train_flops
from training.monitor import peak_memory
from training.optimizer import make_optimizer
from training.options import nonnegative_int, positive_int
from training.memory import activation_bytes, state_bytes
from training.parallel import autocast, choose_fsdp, prepare_blocks, shard, wrap_ddp
from training.presets import PRESETS, resize

LARGE = {"preset": "owl2-7b", "recompute": True}
BENCHMARK_SETS = {  # arguments of each row without --preset
    "cpu": [
        {"preset": "mid-owl2", "stage": 1},
        {"preset": "mid-owl2", "stage": 2},
        {"preset": "mid-owl2", "stage": 2, "freeze_vit": True},
        {"preset": "mid-owl2", "stage": 2, "lora_rank": 16},
    ],
    "cuda": [
        LARGE | {"stage": 1, "micro_batch": 64, "length": 64},
        LARGE | {"stage": 2, "micro_batch": 8, "length": 1983, "lora_rank": 128},
        LARGE | {"stage": 2, "micro_batch": 4, "length": 1983},
    ],
}
HEADER = f"{'what':<44}{'ms/step':>9}{'tokens/s':>10}{'images/s':>10}{'MFU':>9}{'memory':>10}{'predicted':>11}"


def parse_args() -> argparse.Namespace:
    p = benchmark.make_parser("bench_train", __doc__, length=256)
    p.add_argument("--stage", type=int, choices=(1, 2), default=2)
    p.add_argument("--lora-rank", type=nonnegative_int, default=0, help="of stage 2; 0: no adapters (default)")
    p.add_argument("--quantize", choices=BITS, help="QLoRA, with --lora-rank")
    p.add_argument("--freeze-vit", action="store_true")
    p.add_argument("--micro-batch", "--micro", type=positive_int, default=2, help="samples per device (default 2)")
    p.add_argument("--steps", type=positive_int, default=5, help="measured steps, after a warm-up step (default 5)")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), help="as in training")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing")
    p.add_argument("--compile", action="store_true", help="torch.compile, as in training")
    return p.parse_args()


def prepare_training(args: argparse.Namespace, dist: Dist) -> tuple[Owl, torch.optim.Optimizer, bool]:
    """A model with random weights as the stage trains it, its optimizer, and whether it is sharded (FSDP)."""
    config = PRESETS[args.preset]()
    recipe = (train_stage1, train_stage2)[args.stage - 1].RECIPES[config.variant]
    resize(config, min(recipe.image_size, config.image_size))
    with torch.device("meta"):
        model = Owl(config)
    if args.stage == 1:
        train_stage1.choose_trained(model, args.freeze_vit)
    else:
        train_stage2.choose_trained(model, args.lora_rank, 2.0 * args.lora_rank, 0.05, False, args.freeze_vit)
    if args.quantize:
        quantize_base(model.llama, BITS[args.quantize])
    prepare_blocks(model, dist, args.recompute, args.compile)
    fsdp = choose_fsdp(args.parallel, dist, lambda: state_bytes(model))
    if fsdp:
        shard(model, dist)
    model.to_empty(device=dist.device)
    benchmark.randomize(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.set_weight(torch.randn(module.out_features, module.in_features, device=dist.device) * 0.02)
    return model.train(), make_optimizer(model, recipe), fsdp


def predicted_bytes(model: Owl, batch: Batch, dist: Dist) -> float:
    """The memory of a step with one micro-batch and without sharding, as in training.setup.memory_per_device."""
    needed = state_bytes(model)
    in_forward = autocast(replace(dist, device=torch.device("cpu")), fsdp=False)
    sizes = (batch.n_image, batch.n_token, batch.n_supervised)
    activations = activation_bytes(model, *sizes, autocast=in_forward, accumulate=False)
    return sum(needed.values()) + max(0.0, activations - needed["gradients"])


def measure_steps(args: argparse.Namespace, dist: Dist) -> str:
    """Returns a row of the table."""
    gc.collect()
    benchmark.reset_peak_memory(dist.device)
    model, optimizer, fsdp = prepare_training(args, dist)
    wrapped = wrap_ddp(model, dist, fsdp)
    generator = torch.Generator().manual_seed(dist.rank)
    batch = collate([benchmark.random_sample(model.config, args.length, generator) for _ in range(args.micro_batch)])
    flops = train_flops(model, batch.n_image, batch.cu_seqlens.diff().tolist(), batch.n_supervised)
    sizes = (batch.n_supervised, batch.n_token, batch.n_image, flops)
    n_supervised, n_token, n_image, flops = all_reduce_sum(dist, *sizes)

    # The step of train.py, with one micro-batch.
    seconds = []
    for step in range(1 + args.steps):
        start = benchmark.synchronized_time(dist.device)
        with autocast(dist, fsdp):
            loss = compute_loss(wrapped, batch, dist)
        (loss * (batch.n_supervised / n_supervised * dist.world_size)).backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(benchmark.synchronized_time(dist.device) - start)
        if step == 0 and dist.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    typical = median(seconds[1:])
    peak = peak_flops(dist.device)
    mfu = f"{100 * flops / typical / (peak * dist.world_size):.1f} %" if peak else "-"
    memory = peak_memory(dist.device) / 1e9
    what = f"{args.preset} stage {args.stage}, {args.micro_batch} x ({args.length} + image)"
    what += (f", LoRA {args.lora_rank}" if args.lora_rank else "")
    what += (f", {args.quantize}" if args.quantize else "") + (", ViT frozen" if args.freeze_vit else "")
    rates = f"{n_token / typical:>10,.0f}{n_image / typical:>10.1f}"
    predicted = "-" if fsdp else f"{predicted_bytes(model, batch, dist) / 1e9:.1f} GB"
    return f"{what:<44}{1000 * typical:>9.0f}{rates}{mfu:>9}{memory:>7.1f} GB{predicted:>11}"


def main() -> None:
    args = parse_args()
    with user_errors():
        if args.lora_rank > 0 and args.stage == 1:
            raise ValueError("--lora-rank is for --stage 2")
        if args.quantize and args.lora_rank == 0:
            raise ValueError("--quantize needs --lora-rank")
        dist = init_distributed(args.device, args.precision)
    if dist.is_main:
        benchmark.print_environment(dist)
        print(HEADER)
    rows = [{}] if args.preset else BENCHMARK_SETS["cpu" if dist.device.type == "cpu" else "cuda"]
    for changes in rows:
        row = argparse.Namespace(**vars(args) | changes)
        try:
            line = measure_steps(row, dist)
        except torch.cuda.OutOfMemoryError:
            line = f"{row.preset} stage {row.stage}: does not fit this device's memory"
        if dist.is_main:
            print(line, flush=True)


if __name__ == "__main__":
    run(main)
