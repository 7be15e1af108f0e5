"""--dry-run: plans a run without starting it. Nothing is written, and no weights are read.

    flags --build--> the model on the meta device --memory_per_device--> bytes on each device
      ^                                                                    | too many
      +------------ the next of `alternatives`, which need less <----------+

It prints what is trained, the memory of a device, the length of the run, the disk space, and the command that starts
it. The device is this machine's, or with --memory GB any card of that size (10^9 bytes), in bfloat16.
"""

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from common.device import device_memory
from data.conversations import Batch, collate
from data.text import Tokenizer
from lora import lora_modules
from model import Owl
from training.distributed import PRECISIONS, Dist
from training.flops import peak_flops, train_flops
from training.memory import state_bytes
from training.options import Recipe, command_line
from training.parallel import USABLE
from training.setup import TrainingRun, check_batch, count_parameters, describe, keeps_activations, largest_batch
from training.setup import memory_per_device, open_run, prepare_model

Build = Callable[[argparse.Namespace], tuple[Owl, Tokenizer, Recipe]]

N_SAMPLE = 64  # samples from which the tokens of a run are estimated
ASSUMED_MFU = 0.4  # share of a device's peak FLOP/s, for the hours of a run: an assumption, and printed as such
LORA_RANKS = (64, 16, 8)
CARDS = (2, 4, 8, 16)  # of one node


def dry_run(parser: argparse.ArgumentParser, args: argparse.Namespace, dist: Dist, build: Build) -> int:
    """Prints the plan of a run. Returns 0 if it fits the device's memory, 1 if not.

    build: returns the model that the stage trains with these flags, frozen parameters included, its tokenizer and its
    recipe. Raises ValueError or OSError as build_run does.
    """
    if args.memory is not None:
        dist = replace(dist, device=torch.device("cpu"), dtype=PRECISIONS[args.precision or "bf16"])
    available = device_memory(dist.device) if args.memory is None else 1e9 * args.memory
    model, tokenizer, recipe = build(args)
    run = open_run(args, dist, model, tokenizer=tokenizer, recipe=recipe)
    if not dist.is_main:
        return 0
    run.dist = replace(dist, world_size=args.dry_run or dist.world_size)
    check_batch(run)

    largest = largest_batch(run)
    needed = measure(run, largest, available)
    fits = sum(needed.values()) < USABLE * available
    print(describe(run), count_parameters(run.model), sep="\n")
    print_memory(largest, needed, available)
    if not fits:
        found = first_that_fits(run, build, available)
        if found is None:
            print("none of these fits")
            return 1
        run = found
    print_length(run)
    print(f"start it with{'' if fits else ' the first settings that fit'}:\n  {start_command(parser, run)}")
    return 0 if fits else 1


def measure(run: TrainingRun, largest: Batch, available: float) -> dict[str, float]:
    """Returns the bytes that each device needs, by kind, and decides on FSDP as a run would on cards of that size."""
    prepare_model(run)
    run.fsdp = run.args.parallel == "fsdp"
    needed = memory_per_device(run, largest)
    is_gpu = run.args.memory is not None or run.dist.device.type == "cuda"
    if run.args.parallel is None and is_gpu and run.dist.world_size > 1 and sum(needed.values()) >= USABLE * available:
        run.fsdp = True
        needed = memory_per_device(run, largest)
    return needed


def first_that_fits(run: TrainingRun, build: Build, available: float) -> TrainingRun | None:
    """Tries the alternatives, prints what each needs, and returns the run with the first that fits, or None."""
    for changes in alternatives(run):
        args = argparse.Namespace(**vars(run.args) | changes)
        model, _, recipe = build(args)
        dist = replace(run.dist, world_size=changes.get("dry_run", run.dist.world_size))
        recipe = replace(recipe, steps=run.recipe.steps, warmup=run.recipe.warmup)
        tried = TrainingRun(args, recipe, dist, False, model.train(), run.data, None)
        total = sum(measure(tried, largest_batch(tried), available).values())
        changed = {name.replace("_", "-"): value for name, value in changes.items() if value and name != "dry_run"}
        flags = " ".join(f"--{name} {value}" for name, value in changed.items())
        devices = f" on {changes['dry_run']} devices" if "dry_run" in changes else ""
        print(f"  with {flags.replace(' True', '')}{devices}: {total / 1e9:.2f} GB")
        if total < USABLE * available:
            return tried
    return None


def alternatives(run: TrainingRun) -> Iterator[dict[str, object]]:
    """Yields changed flags that need less memory. The first do not change the result; the last needs more devices."""
    args, n_devices = run.args, run.dist.world_size
    changes: dict[str, object] = {}
    if args.micro_batch > 1:
        changes["micro_batch"] = 1
        yield dict(changes)
    if keeps_activations(run):
        changes["recompute"] = True
        yield dict(changes)
    can_shard = getattr(args, "quantize", None) is None  # quantized weights cannot be sharded
    if n_devices > 1 and can_shard and not run.fsdp:
        yield changes | {"parallel": "fsdp"}
    same_result = dict(changes)

    if "lora_rank" in args:  # stage 2
        rank = next((module.rank for _, module in lora_modules(run.model)), 0)
        if rank == 0:  # the rates of the released scripts for LoRA, not those for training everything
            changes |= {name: rate for name, rate in (("lr", 1e-4), ("min_lr", 0.0)) if getattr(args, name) is None}
            changes |= {"vit_lr": None} if args.vit_lr else {}
            changes |= {"abstractor_lr": None} if args.abstractor_lr and not args.train_abstractor else {}
        for lower in (r for r in LORA_RANKS if rank == 0 or r < rank):
            alpha = args.lora_alpha * lower / rank if rank > 0 else 2.0 * lower
            changes |= {"lora_rank": lower, "lora_alpha": alpha}
            yield dict(changes)
        if args.quantize is None and args.parallel != "fsdp":
            for bits in ("int8", "int4"):
                yield changes | {"quantize": bits}

    for n in CARDS if can_shard else ():
        if n > n_devices and run.recipe.batch % n == 0:
            yield same_result | {"parallel": "fsdp", "dry_run": n}


# --- what is printed ---------------------------------------------------------------------------------


def print_memory(largest: Batch, needed: dict[str, float], available: float) -> None:
    n_tokens = largest.ids.shape[1]
    print(f"memory per device, for {largest.n_sample} samples of {n_tokens} tokens with {largest.n_image} images:")
    for kind, n in needed.items():
        print(f"  {kind:<12}{n / 1e9:>10.2f} GB")
    total = sum(needed.values())
    verdict = "it should fit" if total < USABLE * available else "it does not fit"
    print(f"  {'all':<12}{total / 1e9:>10.2f} GB of {available / 1e9:.2f} GB: {verdict}")


def print_length(run: TrainingRun) -> None:
    """Prints the tokens and FLOPs of the run, estimated from its first samples, hours if known, and disk space."""
    recipe, world_size = run.recipe, run.dist.world_size
    batch = collate([run.data[run.data.key(position, run.args.seed)] for position in range(N_SAMPLE)])
    n_samples = recipe.steps * recipe.batch
    flops = train_flops(run.model, batch.n_image, batch.cu_seqlens.diff().tolist(), batch.n_supervised)
    flops *= n_samples / N_SAMPLE
    n_tokens, n_images = (n_samples * n / N_SAMPLE for n in (batch.n_token, batch.n_image))
    print(f"the run: about {n_tokens:,.0f} tokens and {n_images:,.0f} images, {flops:.1e} FLOPs")
    peak = peak_flops(run.dist.device) if run.args.memory is None else None
    if peak is not None:
        hours = flops / (ASSUMED_MFU * peak * world_size) / 3600
        print(f"time: {hours:,.1f} hours, assuming {100 * ASSUMED_MFU:.0f} % of the devices' {peak:.3g} FLOP/s each")

    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    checkpoint = 12 * trained / 1e9  # float32 weights and AdamW's two moments
    n_checkpoint = run.args.keep + 1 + run.args.keep_best  # one more while it is written
    with torch.device("meta"):
        merged = Owl(run.model.config)  # what is saved has no adapter, and is not quantized
    saved = sum(p.numel() for p in merged.parameters()) * run.dist.dtype.itemsize / 1e9
    total = n_checkpoint * checkpoint + saved
    print(f"disk: {total:.2f} GB: the model {saved:.2f} GB, {n_checkpoint} checkpoints of {checkpoint:.2f} GB each")


def start_command(parser: argparse.ArgumentParser, run: TrainingRun) -> str:
    """The command line of the planned run."""
    n = run.dist.world_size
    launcher = ["python"] if n == 1 else ["torchrun", f"--nproc_per_node={n}"]
    args = argparse.Namespace(**vars(run.args) | {"out": run.args.out or "runs/new"})
    return shlex.join([*launcher, parser.prog, *command_line(parser, args)])
