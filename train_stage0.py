"""Stage 0: a language model from nothing but text. Only for the tiny presets.

Both papers begin with a LLaMA that reads and writes already, and stage 1 freezes it. There is no
LLaMA of two million parameters to begin with, so the tiny owls first train their own, on text
alone: the vision tower and the abstractor keep their random weights, untouched. At the end the
image halves of the modality-adaptive module become copies of the text halves, as when an Owl2
begins with LLaMA's own weights.

    python train_stage0.py --preset tiny-owl2 --tokenizer data/easy_vqa/tokenizer.model --micro 32 \\
        --data data/easy_vqa/text.json --val data/easy_vqa/text_val.json --out runs/stage0

For the 7B presets begin with stage 1, from CLIP's and LLaMA's weights.
"""

from pathlib import Path

from llama import AdaptiveLinear, AdaptiveRMSNorm
from launch import fail, initial_weights, parser, prepare, start_model
from model import Owl
from parallel import start_process
from train import Recipe, train
from weights import save_model

# Ours, found by trial; the papers have no such stage.
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
    """Trains the language model, but for the image halves of the modality-adaptive module: text never meets them."""
    model.requires_grad_(False)
    for name, parameter in model.llama.named_parameters():
        parameter.requires_grad_(".multiway.1." not in name)


def main() -> None:
    args = parser(__doc__).parse_args()
    try:
        if args.weights or not (args.preset or "").startswith("tiny"):
            raise ValueError("stage 0 is for the tiny presets, from random weights: give --preset and --tokenizer")
        place = start_process(args.device, args.precision)
        model, tokenizer, recipe = start_model(args, {"owl1": RECIPE, "owl2": RECIPE})
        choose_trained(model)
        run = prepare(args, recipe, place, model, tokenizer, initial_weights(args, model.config))
    except (ValueError, OSError) as error:
        fail(error)
    train(run, finish)


def finish(model: Owl, out: Path) -> None:
    """Begins the image halves as copies of the text halves, and saves the model."""
    for module in model.modules():
        if isinstance(module, (AdaptiveLinear, AdaptiveRMSNorm)):
            text, image = module.multiway
            image.load_state_dict(text.state_dict())
    save_model(model, out)


if __name__ == "__main__":
    main()
