"""Stage 2: instruction tuning (Owl1 section 3.2, Owl2 section 3.3).

The data are conversations, with and without images. Owl1 freezes the model and trains LoRA adapters on q_proj and
v_proj of the language model. Owl2 trains everything, lower layers of the vision encoder at lower rates.

On one GPU, on eight, and on two nodes of eight (the last line on both nodes, which must share the folder of --out):

    python train_stage2.py --weights runs/stage1 --data my.json --out runs/stage2 --micro-batch 4 --workers 8
    torchrun --nproc_per_node=8 train_stage2.py --weights runs/stage1 --out runs/stage2 --micro-batch 4 --workers 8 \\
        --mix llava.json:158 vqa.json:83 sharegpt.json:40
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 train_stage2.py ...

Fine-tune the released Owl2 as its own scripts do, with LoRA on every Linear of the decoder, a frozen vision encoder
and padded images (then ask with --fit pad as well):

    torchrun --nproc_per_node=8 train_stage2.py --weights mplug-owl2-llama2-7b --data my.json --out runs/mine \\
        --micro-batch 4 --lora-rank 128 --lora-alpha 256 --lr 1e-4 --min-lr 0 --fit pad

On a card of 12 GB: --quantize int4 --lora-rank 16 --micro-batch 1 trains the adapter on a 4-bit decoder (QLoRA). The
model in OUT is then the 4-bit one with the adapter merged, in 16 bits; OUT/adapter also fits the original model.

Check the data with --check, what is trained and whether it fits with --dry-run; continue a run that stopped with
--resume. With LoRA, OUT/adapter holds the adapter alone in PEFT's format, and OUT the model with the adapter merged.
"""

from command import ArgumentParser, run, user_errors

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import lora
from data.text import Tokenizer
from inference import adapter
from inference.qlora import dequantize_base, quantize_base, quantized_tensors
from inference.quantize import BITS
from model import Owl
from train import train
from training.distributed import init_distributed
from training.options import Recipe, add_training_flags, fraction_below_1, integer, positive_float
from training.plan import dry_run
from training.setup import build_model, build_run, initial_tensors
from weights import save_model

# The papers' hyperparameters. A batch of Owl1 has 128 texts and 128 conversations about images: --mix texts.json:1
# images.json:1. The released scripts differ: Owl1's train 3 epochs with a linear decay to 0, Owl2's freeze the ViT and
# use LoRA.
OWL1 = Recipe(
    steps=2_000,
    warmup=50,
    batch=256,
    lr=2e-5,
    min_lr=1e-6,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=1e-4,
    grad_clip=1.0,
    max_length=1_024,
    image_size=224,
)
OWL2 = Recipe(
    steps=4_800,
    warmup=250,
    batch=256,
    lr=2e-5,
    min_lr=1e-7,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.0,
    grad_clip=1.0,
    max_length=2_048,
    image_size=448,
    vit_lr_decay=0.9,
)
RECIPES = {"owl1": OWL1, "owl2": OWL2}
LORA_RANK = {"owl1": 8, "owl2": 0}  # 0: no adapters, everything is trained
LORA_PRESETS = {  # of --lora-targets: Linears of the decoder; k_proj and v_proj are those of both modalities
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "visual": ("q_proj", "v_proj.multiway.1"),  # queries, and the values of visual tokens
}
LORA_TARGETS = {"owl1": ("q_proj", "v_proj"), "owl2": LORA_PRESETS["all-linear"]}


def choose_trained(
    model: Owl,
    rank: int,
    alpha: float,
    dropout: float,
    train_abstractor: bool,
    freeze_vit: bool = False,
    targets: Sequence[str] | None = None,
) -> None:
    """Trains everything if rank is 0, else adapters on the language model and, if asked, the abstractor.

    targets: names of LORA_PRESETS and of Linears (default: LORA_TARGETS).
    """
    model.requires_grad_(rank == 0)
    model.vit.requires_grad_(rank == 0 and not freeze_vit)
    if rank > 0:
        targets = targets or LORA_TARGETS[model.config.variant]
        names = tuple(name for target in targets for name in LORA_PRESETS.get(target, (target,)))
        lora.inject_lora(model.llama, names, rank, alpha, dropout)
        model.abstractor.requires_grad_(train_abstractor)


def build(args: argparse.Namespace) -> tuple[Owl, Tokenizer, Recipe]:
    """build_model, adds the adapters, and freezes what the stage does not train."""
    model, tokenizer, recipe = build_model(args, RECIPES)
    rank = LORA_RANK[model.config.variant] if args.lora_rank is None else args.lora_rank
    if rank == 0 and (args.quantize or args.lora_targets):
        raise ValueError("--quantize and --lora-targets are for LoRA: give --lora-rank")
    settings = (rank, args.lora_alpha, args.lora_dropout, args.train_abstractor, args.freeze_vit)
    choose_trained(model, *settings, args.lora_targets)
    if args.quantize:
        if args.parallel == "fsdp":
            raise ValueError("--parallel fsdp does not shard quantized weights: leave out one of them")
        args.parallel = "ddp"
        quantize_base(model.llama, BITS[args.quantize])
    return model, tokenizer, recipe


def save_final(model: Owl, out: Path, base: str, dtype: torch.dtype) -> None:
    """Saves the model and, if it has one, the adapter alone.

    base: the model folder that training started from. dtype: of a base that was quantized.
    """
    if any(lora.lora_modules(model)):
        adapter.save_non_lora(model, out / "adapter")
        adapter.save_lora(model, out / "adapter", base)
        dequantize_base(model.llama, dtype)  # changes nothing without --quantize
        lora.merge_lora(model)
    save_model(model, out)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_training_flags(parser)
    parser.add_argument("--freeze-vit", action="store_true", help="do not train the vision encoder (LoRA never does)")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora-rank", type=integer(0, 4_096), help="0: train everything (default: 8 for Owl1, 0 for Owl2)")
    add("--lora-alpha", type=positive_float, default=32.0, help="the adapter is scaled by alpha / rank (default 32)")
    add("--lora-dropout", type=fraction_below_1, default=0.05, help="dropout of the adapter's input (default 0.05)")
    targets = f"{', '.join(LORA_PRESETS)}, or names of Linears (default: Owl1 q_proj v_proj, Owl2 all-linear)"
    add("--lora-targets", nargs="+", metavar="NAME", help=f"what is adapted: {targets}")
    add("--quantize", choices=BITS, help="QLoRA: keep the frozen decoder in 8 or 4 bits, the adapter in full precision")
    add("--train-abstractor", action="store_true", help="train the abstractor too, as in the abstract of Owl1's paper")
    args = parser.parse_args()
    with user_errors():
        dist = init_distributed(args.device, args.precision)
        if args.dry_run is not None:
            sys.exit(dry_run(parser, args, dist, build))
        model, tokenizer, recipe = build(args)
        tensors = initial_tensors(args, model.config)
        if args.quantize:
            tensors = quantized_tensors(tensors, model, dist.device)
        training_run = build_run(args, dist, model, tokenizer=tokenizer, recipe=recipe, tensors=tensors)
    train(training_run, partial(save_final, base=args.weights or "", dtype=dist.dtype))


if __name__ == "__main__":
    run(main)
