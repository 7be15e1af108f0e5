"""Trains the language model of a tiny preset from random weights, on text alone.

Both papers start from a pretrained LLaMA, which stage 1 freezes. There is none of two million parameters, so the tiny
models train their own: the vision encoder and the abstractor keep their random weights. At the end the visual half of
the modality-adaptive module becomes a copy of the text half, as when an Owl2 starts from LLaMA's weights.

    python -m tools.train_language --preset tiny-owl2 --tokenizer data/easy_vqa/tokenizer.model --micro-batch 32 \\
        --data data/easy_vqa/text.json --val data/easy_vqa/text_val.json --out runs/stage0

For the 7B presets begin with stage 1, from CLIP's and LLaMA's weights.
"""

from command import ArgumentParser, run, user_errors

from pathlib import Path

import argparse
import sys

from data.text import Tokenizer
from llama import AdaptiveLinear, AdaptiveRMSNorm
from model import Owl
from train import train
from training.distributed import init_distributed
from training.options import Recipe, add_training_flags
from training.plan import dry_run
from training.setup import build_model, build_run, initial_tensors
from weights import save_model

# Found by trial: the papers have no such stage.
RECIPE = Recipe(
    steps=700,
    warmup=50,
    batch=32,
    lr=1.5e-3,
    min_lr=1e-4,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.05,
    grad_clip=1.0,
    max_length=512,
    image_size=0,
)


def choose_trained(model: Owl) -> None:
    """Trains the language model, except the visual half of the modality-adaptive module, which text does not use."""
    model.requires_grad_(False)
    for name, parameter in model.llama.named_parameters():
        parameter.requires_grad_(".multiway.1." not in name)


def build(args: argparse.Namespace) -> tuple[Owl, Tokenizer, Recipe]:
    """build_model, and freezes all but the language model."""
    model, tokenizer, recipe = build_model(args, {"owl1": RECIPE, "owl2": RECIPE})
    choose_trained(model)
    return model, tokenizer, recipe


def save_final(model: Owl, out: Path) -> None:
    """Copies the text half of the modality-adaptive module to the visual half, and saves the model."""
    for module in model.modules():
        if isinstance(module, (AdaptiveLinear, AdaptiveRMSNorm)):
            text, visual = module.multiway
            visual.load_state_dict(text.state_dict())
    save_model(model, out)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_training_flags(parser)
    args = parser.parse_args()
    with user_errors():
        if args.weights or not (args.preset or "").startswith("tiny"):
            raise ValueError("this is for the tiny presets, from random weights: give --preset and --tokenizer")
        dist = init_distributed(args.device, args.precision)
        if args.dry_run is not None:
            sys.exit(dry_run(parser, args, dist, build))
        model, tokenizer, recipe = build(args)
        tensors = initial_tensors(args, model.config)
        training_run = build_run(args, dist, model, tokenizer=tokenizer, recipe=recipe, tensors=tensors)
    train(training_run, save_final)


if __name__ == "__main__":
    run(main)
