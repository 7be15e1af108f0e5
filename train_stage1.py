"""Stage 1: align the vision encoder and the abstractor with the language model (Owl1 section 3.2, Owl2 section 3.3).

The data are images with captions. The language model is frozen, so that it forgets nothing. The vision encoder and the
abstractor are trained, in Owl2 also the visual half of the modality-adaptive module: the norms and K/V projections of
visual tokens.

From CLIP's and LLaMA's weights, on one GPU, on eight, and on two nodes of eight (the last line on both nodes):

    python train_stage1.py --preset owl2-7b --clip clip-vit-large-patch14 --llama Llama-2-7b-hf \\
        --data 'laion/*.tar' --out runs/stage1 --micro-batch 32 --workers 8
    torchrun --nproc_per_node=8 train_stage1.py --preset owl2-7b --clip ... --llama ... \\
        --mix 'laion/*.tar':4 coco.json:1 --out runs/stage1 --micro-batch 32 --workers 8
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 train_stage1.py ...

(Both nodes must share the folder of --out.) --weights FOLDER starts from a model instead. A JSON file of captions
works as well as tar shards. Check the data with --check, what is trained and whether it fits with --dry-run; continue
a run that stopped with --resume.
"""

from command import ArgumentParser, run, user_errors

import argparse
import sys

from data.text import Tokenizer
from model import Owl
from train import train
from training.distributed import init_distributed
from training.options import Recipe, add_training_flags
from training.plan import dry_run
from training.pretrained import pretrained_tensors
from training.setup import build_model, build_run, initial_tensors
from weights import save_model

# The papers' hyperparameters (Owl1 section 3.2, Owl2 section 3.3 and its appendix).
OWL1 = Recipe(
    steps=50_000,
    warmup=2_000,
    batch=4_096,
    lr=1e-4,
    min_lr=0.0,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.1,
    grad_clip=1.0,
    max_length=512,
    image_size=224,
    crop_scale=0.5,
)
OWL2 = Recipe(
    steps=42_500,
    warmup=1_000,
    batch=8_192,
    lr=1e-4,
    min_lr=1e-6,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.05,
    grad_clip=1.0,
    max_length=256,
    image_size=224,
    vit_lr_decay=0.9,
    crop_scale=0.5,
)
RECIPES = {"owl1": OWL1, "owl2": OWL2}


def choose_trained(model: Owl, freeze_vit: bool = False) -> None:
    """Freezes all but the vision encoder, the abstractor and the visual half of the modality-adaptive module."""
    model.requires_grad_(True)
    model.vit.requires_grad_(not freeze_vit)
    for name, parameter in model.llama.named_parameters():
        parameter.requires_grad_(".multiway.1." in name)


def build(args: argparse.Namespace) -> tuple[Owl, Tokenizer, Recipe]:
    """build_model, and freezes what the stage does not train."""
    model, tokenizer, recipe = build_model(args, RECIPES)
    choose_trained(model, args.freeze_vit)
    return model, tokenizer, recipe


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_training_flags(parser)
    parser.add_argument("--freeze-vit", action="store_true", help="do not train the vision encoder")
    add = parser.add_argument_group("pretrained parts (with --preset)").add_argument
    add("--clip", metavar="FOLDER", help="openai/clip-vit-large-patch14, as safetensors")
    add("--vision", metavar="FOLDER", help="instead of --clip: an Owl, whose vision encoder and abstractor are taken")
    add("--llama", metavar="FOLDER", help="huggyllama/llama-7b for Owl1, meta-llama/Llama-2-7b-hf for Owl2")
    args = parser.parse_args()
    with user_errors():
        dist = init_distributed(args.device, args.precision)
        starts = [args.llama, args.clip or args.vision]
        if any(starts) and (not all(starts) or not args.preset or args.weights or (args.clip and args.vision)):
            raise ValueError("--llama, --preset and one of --clip and --vision go together, and without --weights")
        args.tokenizer = args.tokenizer or args.llama
        if args.dry_run is not None:
            sys.exit(dry_run(parser, args, dist, build))
        model, tokenizer, recipe = build(args)
        if args.llama:
            tensors = pretrained_tensors(model.config, args.clip, args.llama, args.vision)
        else:
            tensors = initial_tensors(args, model.config)
        training_run = build_run(args, dist, model, tokenizer=tokenizer, recipe=recipe, tensors=tensors)
    train(training_run, save_model)


if __name__ == "__main__":
    run(main)
