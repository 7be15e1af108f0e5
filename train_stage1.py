"""Stage 1: the owl learns to see (Owl1 section 3.2, Owl2 section 3.3).

From pairs of images and captions. The language model stays frozen, so that it forgets nothing; the
vision tower and the abstractor learn to speak to it. In Owl2 the image half of the modality-adaptive
module (its K/V projections and norms for image words) is trained as well.

From CLIP's and LLaMA's weights, on one device or on eight:

    python train_stage1.py --preset owl2-7b --clip clip-vit-large-patch14 --llama Llama-2-7b-hf \\
        --data captions.json --out runs/stage1
    torchrun --nproc_per_node=8 train_stage1.py --preset owl2-7b --clip ... --llama ... \\
        --data captions.json --out runs/stage1 --workers 8

--weights FOLDER starts from a model instead (the tiny owl does, with numbers of its own: see the Makefile).

Look at the data first with --check; continue a run that stopped with --resume.
"""

import torch

from data.text import Tokenizer
from model import PRESETS, Owl
from train import Recipe, check_if_asked, fail, parser, prepare, recipe_of, start_model, start_process, train
from weights import save_model, start_from

# The papers' numbers (Owl1 section 3.2, Owl2 section 3.3 and its appendix).
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


def choose_trained(model: Owl) -> None:
    """Trains the vision tower, the abstractor and, in Owl2, the image half of the modality-adaptive module."""
    model.requires_grad_(True)
    for name, parameter in model.llama.named_parameters():
        parameter.requires_grad_(".multiway.1." in name)


def main() -> None:
    p = parser(__doc__)
    g = p.add_argument_group("starting from parts (with --preset)")
    g.add_argument("--clip", metavar="FOLDER", help="openai/clip-vit-large-patch14, as safetensors")
    g.add_argument("--llama", metavar="FOLDER", help="huggyllama/llama-7b for Owl1, meta-llama/Llama-2-7b-hf for Owl2")
    args = p.parse_args()
    try:
        place = start_process(args.device)
        if args.clip or args.llama:
            if not (args.preset and args.clip and args.llama) or args.weights:
                raise ValueError("--clip, --llama and --preset go together, and without --weights")
            config = PRESETS[args.preset]()
            recipe = recipe_of(args, RECIPES[config.style])
            config.resize(recipe.image_size or config.image_size)
            tokenizer = Tokenizer(args.tokenizer or args.llama)
            check_if_asked(args, recipe, config, tokenizer)
            torch.manual_seed(args.seed)
            model = start_from(config, args.clip, args.llama)
            model.tokenizer_folder = tokenizer.path.parent
        else:
            model, tokenizer, recipe = start_model(args, RECIPES, place)
        choose_trained(model)
        run = prepare(args, recipe, place, model, tokenizer)
    except (ValueError, OSError) as error:
        fail(error)
    train(run, save_model)


if __name__ == "__main__":
    main()
