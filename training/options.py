"""Command-line flags that the training stages share, and Recipe: the hyperparameters of a stage.

The flags of a recipe are generated from the fields of Recipe. A flag that is not given keeps the paper's number, with
two exceptions: the image size is the model's own (default_image_size), and the warm-up is the paper's share of the
steps (set_steps).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from data.image import FITS
from training.distributed import PRECISIONS
from training.presets import PRESETS

MIN_SAMPLES = 100  # --max-skipped applies from this number of samples on
MAX_STEPS = 99_999_999  # a checkpoint's name has eight digits of its step
STAGE_1_SIZE = 224  # pixels of the images of stage 1 in both papers


def number(kind: type, is_valid: Callable[[float], bool], rule: str) -> Callable[[str], Any]:
    """Returns an argparse type for numbers of this kind that satisfy the rule. All comparisons with nan are false."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it if the text is not a number
    return parse


def integer(low: int, high: int = MAX_STEPS) -> Callable[[str], int]:
    """An argparse type for integers from low to high."""
    return number(int, lambda x: low <= x <= high, f"from {low:,} to {high:,}")


positive_int = integer(1)
nonnegative_int = integer(0)
positive_float = number(float, lambda x: 0 < x < math.inf, "above 0")
nonnegative_float = number(float, lambda x: 0 <= x < math.inf, "0 or more")
fraction = number(float, lambda x: 0 <= x <= 1, "from 0 to 1")
fraction_below_1 = number(float, lambda x: 0 <= x < 1, "from 0 to below 1")


def setting(kind: Callable[[str], Any], help: str | None = None, default: Any = MISSING, **options: Any) -> Any:
    """A field of Recipe. kind, help and options are add_argument's for its flag; default is the field's."""
    return field(default=default, metadata={"type": kind, "help": help, **options})


@dataclass
class Recipe:
    """Hyperparameters of a stage. A step is one optimizer step; lengths are in tokens; rates are AdamW's."""

    steps: int = setting(positive_int)
    warmup: int = setting(
        nonnegative_int, "linear warm-up of the rate (default: the paper's share of the steps)", metavar="STEPS"
    )
    batch: int = setting(integer(1, 1_000_000), "samples per step, over all devices")
    lr: float = setting(positive_float, "peak learning rate")
    min_lr: float = setting(nonnegative_float, "learning rate of the last step, at the end of a cosine")
    betas: tuple[float, float] = setting(fraction_below_1, "of AdamW", nargs=2)
    eps: float = setting(positive_float, "of AdamW")
    weight_decay: float = setting(nonnegative_float, "of AdamW; norms and biases have none")
    grad_clip: float = setting(positive_float, "maximum norm of the gradient")
    max_length: int = setting(positive_int, "maximum tokens of a sample; turns beyond it are dropped")
    image_size: int = setting(
        integer(0, 4_096),
        "pixels; position embeddings are interpolated (default, and 0: as in the weights; but Owl2's stage 2 goes from "
        "224 to 448)",
    )
    vit_lr_decay: float = setting(positive_float, "learning rate factor from one ViT layer to the one below", 1.0)
    vit_lr: float | None = setting(positive_float, "peak learning rate of the vision encoder (default: --lr)", None)
    abstractor_lr: float | None = setting(positive_float, "peak learning rate of the abstractor (default: --lr)", None)
    crop_scale: float = setting(fraction, "random crops of at least this share of the image, and flips; 0: off", 0.0)


def make_recipe(args: argparse.Namespace, paper: Recipe, image_size: int) -> Recipe:
    """The paper's recipe with the hyperparameters that the command line gives. image_size: the model's own."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None}
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    steps = given.pop("steps", paper.steps)
    default = {"image_size": default_image_size(image_size, paper.image_size, is_new=args.weights is None)}
    return set_steps(args, replace(paper, **default | given), steps)


def default_image_size(own: int, paper: int, is_new: bool) -> int:
    """The image size of a run without --image-size: the model's own, except for the papers' two sizes.

    A new model (--preset) begins stage 1 with the paper's 224 pixels, unless its own size is smaller. From weights of
    224 pixels, stage 2 of Owl2 goes to the paper's 448.
    """
    if is_new:
        return min(own, paper)
    return max(own, paper) if own == STAGE_1_SIZE else own


def set_steps(args: argparse.Namespace, recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps. Without --warmup, the warm-up keeps its share of them."""
    warmup = recipe.warmup if args.warmup is not None else round(recipe.warmup * steps / recipe.steps)
    return replace(recipe, steps=steps, warmup=warmup)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that all stages share. Those of the recipe are None unless given."""
    add_data_flags(parser)
    add_run_flags(parser)
    group = parser.add_argument_group("recipe (default: the paper's numbers for this model and stage)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--epochs", type=positive_float, metavar="N", help="passes over the data, instead of --steps")
    for f in fields(Recipe):
        target = either if f.name == "steps" else group
        target.add_argument(f"--{f.name.replace('_', '-')}", **f.metadata)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model is trained on which data."""
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=sorted(PRESETS), help="size of the model, without --weights")
    add("--weights", metavar="FOLDER", help="start from this model folder (Hugging Face layout)")
    add("--tokenizer", metavar="PATH", help="tokenizer.model, tokenizer.json or its folder (default: --weights)")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="SOURCE", help="training data: .json, .jsonl, or tar shards ('laion/*.tar')")
    add(
        "--mix",
        metavar="SOURCE:WEIGHT",
        nargs="+",
        help="several sources instead, and how often each is sampled: llava.json:1 chat.json:0.5 'laion/*.tar':4",
    )
    add("--val", metavar="SOURCE", help="validation data")
    add("--image-root", metavar="FOLDER", help="image paths are relative to it (default: the data file's folder)")
    add("--index", metavar="FOLDER", help="folder for the index of tar shards (default: the shards' folder)")
    add("--merge-images", action="store_true", help="merge the conversations about the same image into one")
    add("--fit", choices=FITS, help="how images become squares (default: owl1 stretch, owl2 square)")
    add(
        "--max-skipped",
        type=fraction,
        default=0.1,
        metavar="SHARE",
        help=f"stop if more of the samples are unusable, after at least {MIN_SAMPLES} (default 0.1)",
    )
    add("--check", action="store_true", help="read all data, show a few samples, and exit")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the run and of the devices it uses."""
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER", help="folder of the run (required except with --check and --dry-run)")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--seed", type=integer(-(2**63), 2**63 - 1), default=0)
    add(
        "--micro-batch",
        "--micro",
        type=integer(1, 1_000_000),
        default=8,
        metavar="N",
        help="samples in one forward pass on one device (default 8)",
    )
    add("--workers", type=integer(0, 1_000), default=0, help="data-loading processes per rank (default 0)")
    add("--log-every", type=positive_int, default=10, metavar="STEPS")
    add("--tensorboard", action="store_true", help="log to TensorBoard too (pip install tensorboard)")
    add("--val-every", type=positive_int, default=500, metavar="STEPS")
    add("--save-every", type=positive_int, default=500, metavar="STEPS")
    add("--keep", type=positive_int, default=2, metavar="N", help="number of checkpoints to keep (default 2)")
    add("--keep-best", action="store_true", help="keep the checkpoint of the lowest validation loss, too (with --val)")
    add(
        "--dry-run",
        type=integer(0, 100_000),
        nargs="?",
        const=0,
        metavar="DEVICES",
        help="plan the run (what is trained, memory, length, command), and exit; DEVICES: per node, if not this run's",
    )
    add(
        "--memory",
        type=positive_float,
        metavar="GB",
        help="with --dry-run: plan for cards of this size, in bf16, instead of for this machine",
    )

    add = parser.add_argument_group("devices").add_argument
    add("--device", help="cuda, cpu, ... (default: cuda if available)")
    add("--precision", choices=PRECISIONS, help="of matrix products and frozen weights (default: cuda bf16, else fp32)")
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="copy the model to each device, or shard it (default: shard if each of several GPUs is too small)",
    )
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="activation checkpointing: less memory, a third more compute (default: for models of over a billion)",
    )
    add("--compile", action="store_true", help="torch.compile each block: faster after a slow start")


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The words of a command line that gives these values, without defaults and without the flags of a dry run."""
    words: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or action.dest in ("dry_run", "memory"):
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words.append(action.option_strings[-1 if value is False else 0])  # --no-recompute is the last
        words += [str(x) for x in values if not isinstance(x, bool)]
    return words
