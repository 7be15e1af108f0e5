"""Stage 0: a language model from nothing but text. Only for the tiny presets.

Both papers begin with a LLaMA that reads and writes already, and stage 1 freezes it. There is no
LLaMA of two million parameters to begin with, so the tiny owls first train their own, on text
alone: the vision tower and the abstractor keep their random weights, untouched. At the end the
image halves of the modality-adaptive module become copies of the text halves, as when an Owl2
begins with LLaMA's own weights.

    python train_stage0.py --preset tiny-owl2 --tokenizer data/easy_vqa/tokenizer.model \\
        --data data/easy_vqa/text.json --val data/easy_vqa/text_val.json --out runs/stage0

For the 7B presets begin with stage 1, from CLIP's and LLaMA's weights.
"""

from pathlib import Path

import torch

from data.text import Tokenizer
from llama import AdaptiveLinear, AdaptiveRMSNorm
from model import PRESETS, Owl
from train import Recipe, fail, parser, prepare, recipe_of, start_process, train
from weights import save_model

RECIPE = Recipe(
    steps=400,
    warmup=40,
    batch=64,
    lr=3e-3,
    min_lr=1e-4,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.05,
    grad_clip=1.0,
    max_length=512,
    image_size=0,
)


def main() -> None:
    args = parser(__doc__).parse_args()
    try:
        if not args.preset or not args.preset.startswith("tiny") or not args.tokenizer:
            raise ValueError("stage 0 takes --preset tiny-owl1 or tiny-owl2, and --tokenizer")
        recipe = recipe_of(args, RECIPE)
        place = start_process(args.device)
        tokenizer = Tokenizer(args.tokenizer)
        config = PRESETS[args.preset]()
        config.llama.vocab_size = tokenizer.vocab_size
        torch.manual_seed(args.seed)
        model = Owl(config).init_weights()
        model.tokenizer_folder = tokenizer.path.parent
        model.requires_grad_(False)
        model.llama.requires_grad_(True)
        for module in model.modules():  # text never reaches the image halves
            if isinstance(module, (AdaptiveLinear, AdaptiveRMSNorm)):
                module.multiway[1].requires_grad_(False)
        run = prepare(args, recipe, place, model, tokenizer)
    except (ValueError, OSError) as error:
        fail(error)
    train(run, finish)


def finish(model: Owl, out: Path) -> None:
    for module in model.modules():
        if isinstance(module, (AdaptiveLinear, AdaptiveRMSNorm)):
            text, image = module.multiway
            image.load_state_dict(text.state_dict())
    save_model(model, out)


if __name__ == "__main__":
    main()
