"""From a stage's command line to a run that is ready to go.

    flags --start_model--> the model's shape, on the meta device    the stage then chooses what is trained
          --prepare------> data opened; model sharded if asked, and filled with its first weights; checkpoint read

What a person can get wrong is found here, before anything long begins. --check and --dry-run end here as well.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import lora
from cost import activation_bytes
from data.check import check
from data.conversations import Batch, Conversations, Skipped, collate
from data.image import DEFAULT_FIT, FITS
from data.mix import Mixture, Order, parse_mix
from data.text import Tokenizer
from model import PRESETS, Owl, OwlConfig
from parallel import (
    LARGE,
    PRECISIONS,
    Place,
    blocks,
    choose_fsdp,
    device_memory,
    n_sharing,
    precision,
    ready,
    shard,
    share,
    wait_for_all,
)
from train import Recipe, Run, make_optimizer, report, resume
from watch import N_BEFORE_JUDGING
from weights import WEIGHT_FILES, fill, read_shape, read_weights, resized


# --- the command line --------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that all stages have. Those of the recipe are None unless given."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--preset", choices=sorted(PRESETS), help="the model's shape, when not from --weights")
    g.add_argument("--weights", metavar="FOLDER", help="start from this model folder (official layout)")
    g.add_argument("--tokenizer", metavar="PATH", help="folder of tokenizer.model, or that file (default: --weights)")
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="SOURCE", help="what to train on: .json, .jsonl, or tar shards ('laion/*.tar')")
    g.add_argument(
        "--mix",
        metavar="SOURCE:WEIGHT",
        nargs="+",
        help="several sources instead, and how often samples of each come: llava.json:1 chat.json:0.5 'laion/*.tar':4",
    )
    g.add_argument("--val", metavar="SOURCE", help="what to measure the loss on")
    g.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: file's folder)")
    g.add_argument("--index", metavar="FOLDER", help="where the index of tar shards lies (default: beside the shards)")
    g.add_argument("--merge-images", action="store_true", help="make one conversation of all that are about one image")
    g.add_argument("--fit", choices=FITS, help="how images become squares (default: owl1 stretch, owl2 square)")
    g.add_argument(
        "--max-skipped",
        type=float,
        default=0.1,
        metavar="SHARE",
        help=f"stop when more of the samples are unusable, of at least {N_BEFORE_JUDGING} (default 0.1)",
    )
    g.add_argument("--check", action="store_true", help="go over the data, show a few samples, and stop")
    g = p.add_argument_group("run")
    g.add_argument("--out", metavar="FOLDER", help="the run's folder (required but with --check)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--micro", type=int, default=8, help="samples in one forward pass on one device (default 8)")
    g.add_argument("--workers", type=int, default=0, help="processes beside each rank that load images (default 0)")
    g.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    g.add_argument("--val-every", type=int, default=500, metavar="STEPS")
    g.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    g.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints that stay (default 2)")
    g.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=0,
        metavar="DEVICES",
        help="say what is trained and what memory each device needs, and stop; DEVICES: as if a node had so many",
    )
    g = p.add_argument_group("devices")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    g.add_argument("--precision", choices=PRECISIONS, help="of products and frozen weights (cuda: bf16, else fp32)")
    g.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="copy the model to each device, or shard it (default: shard where over a billion parameters are trained "
        "on several GPUs, else copy)",
    )
    g.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="activation checkpointing: less memory, a third more work (default: for models of over a billion)",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile, block by block: faster after a slow start")
    g = p.add_argument_group("recipe (default: the paper's numbers for this owl and stage)")
    g.add_argument("--steps", type=int)
    g.add_argument("--warmup", type=int, metavar="STEPS")
    g.add_argument("--batch", type=int, help="samples a step, over all devices")
    g.add_argument("--lr", type=float, help="the highest learning rate")
    g.add_argument("--min-lr", type=float, help="the last one, at the end of a cosine")
    g.add_argument("--betas", type=float, nargs=2)
    g.add_argument("--eps", type=float)
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--grad-clip", type=float, help="the gradient's greatest norm")
    g.add_argument("--max-length", type=int, help="longest sample, in positions; turns beyond are left out")
    g.add_argument("--image-size", type=int, help="pixels; position embeddings are interpolated; 0: the model's own")
    g.add_argument("--vit-lr-decay", type=float, help="learning rate factor from one ViT layer to the one below")
    g.add_argument("--crop-scale", type=float, help="random crops of at least this share, and flips; 0: neither")
    return p


def recipe_of(args: argparse.Namespace, papers: Recipe) -> Recipe:
    """The paper's numbers, with those given on the command line in their place. ValueError for impossible ones."""
    numbers = asdict(papers)
    for name in numbers:
        if getattr(args, name) is not None:
            numbers[name] = getattr(args, name)
    numbers["betas"] = tuple(numbers["betas"])
    recipe = Recipe(**numbers)
    for name in ("micro", "workers", "log_every", "val_every", "save_every", "keep", "max_skipped"):
        numbers[name] = getattr(args, name)
    may_be_zero = ("warmup", "min_lr", "weight_decay", "image_size", "crop_scale", "workers", "max_skipped")
    for name, number in numbers.items():
        if name == "betas":
            continue
        if not (number > 0 or number == 0 and name in may_be_zero) or not math.isfinite(number):
            least = "0 or more" if name in may_be_zero else "above 0"
            raise ValueError(f"--{name.replace('_', '-')} must be {least}, not {number}")
    if recipe.crop_scale > 1:
        raise ValueError(f"--crop-scale is a share of the image, at most 1, not {recipe.crop_scale}")
    if args.max_skipped > 1:
        raise ValueError(f"--max-skipped is a share of the samples, at most 1, not {args.max_skipped}")
    return recipe


def fail(error: Exception) -> None:
    """A mistake that a person can mend: one sentence, exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


# --- from the command line to a run -------------------------------------------------------------------


def start_model(args: argparse.Namespace, papers: dict[str, Recipe]) -> tuple[Owl, Tokenizer, Recipe]:
    """The model without its weights, its tokenizer, and the numbers of its owl's paper under those given as flags.

    The model's shape is that of --weights or of --preset, there with the vocabulary of --tokenizer; it is made on the
    meta device, since what is frozen, and how it is sharded, is chosen before there is anything to hold.
    With --check, goes over the data and exits. Raises ValueError or OSError as read_shape and Tokenizer do.
    """
    if args.weights:
        tokenizer = Tokenizer(args.tokenizer or args.weights)
        config = read_shape(args.weights)
    elif args.preset and args.tokenizer:
        tokenizer = Tokenizer(args.tokenizer)
        config = PRESETS[args.preset]()
        config.llama.vocab_size = tokenizer.vocab_size
    else:
        raise ValueError("give --weights FOLDER, or --preset NAME and --tokenizer PATH to start from random weights")
    recipe = recipe_of(args, papers[config.style])
    config.resize(recipe.image_size or config.image_size)
    if args.check:
        sys.exit(1 if check(open_data(args, recipe, config, tokenizer)) else 0)
    with torch.device("meta"):
        model = Owl(config)
    model.tokenizer_folder = tokenizer.path.parent
    return model, tokenizer, recipe


def initial_weights(args: argparse.Namespace, config: OwlConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights that a run starts from, tensor by tensor: those of --weights, or random ones (for small models)."""
    if args.weights:
        yield from resized(read_weights(args.weights, read_shape(args.weights)), config)
    else:
        yield from Owl(config).init_weights().state_dict().items()


def open_data(args: argparse.Namespace, recipe: Recipe, config: OwlConfig, tokenizer: Tokenizer) -> Mixture:
    """The training data of --data or --mix. Raises ValueError or OSError as its sources do."""
    if (args.data is None) == (args.mix is None):
        raise ValueError("give --data SOURCE, or several with --mix SOURCE:WEIGHT ...")
    sources = [parse_mix(text) for text in args.mix] if args.mix else [(args.data, 1.0)]
    return Mixture(
        [open_source(args, path, recipe, config, tokenizer) for path, _ in sources],
        [weight for _, weight in sources],
    )


def open_source(
    args: argparse.Namespace, path: str, recipe: Recipe, config: OwlConfig, tokenizer: Tokenizer
) -> Conversations:
    """One source as this run reads it. Raises ValueError or OSError as Conversations does."""
    return Conversations(
        path,
        tokenizer,
        config.style,
        config.image_words,
        config.image_size,
        min(recipe.max_length, config.llama.context),
        args.fit or DEFAULT_FIT[config.style],
        args.image_root,
        recipe.crop_scale,
        merge=args.merge_images,
        index=args.index,
        n_worker=max(1, args.workers),
    )


def prepare(
    args: argparse.Namespace,
    recipe: Recipe,
    place: Place,
    model: Owl,
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, Tensor]],
) -> Run:
    """Opens the data, gives the model the weights that it starts from or, to resume, the checkpoint's.

    model: on the meta device, frozen as the stage wants it. Raises ValueError or OSError, in one sentence, for
    settings or files that cannot be used.
    """
    model.config.llama.eos_id = tokenizer.eos_id
    if tokenizer.vocab_size > model.config.llama.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.llama.vocab_size}"
        )
    if not place.is_first:
        wait_for_all(place)  # for the first process, which may have to index the data
    data = open_data(args, recipe, model.config, tokenizer)
    as_they_are = replace(recipe, crop_scale=0.0)
    val = open_source(args, args.val, as_they_are, model.config, tokenizer) if args.val else None
    if place.is_first:
        wait_for_all(place)
    for source in data.sources:
        for reason in source.broken if place.is_first else ():
            print(f"warning: {reason}", file=sys.stderr)
        first = [source[0, index] for index in range(min(len(source), 20))]
        if all(isinstance(sample, Skipped) for sample in first):
            raise ValueError(f"none of the first {len(first)} rows of {source.path} can be used; {first[0].reason}")
    if not args.out and args.dry_run is None:
        raise ValueError("give the run a folder: --out")
    if recipe.batch % (args.micro * place.world) != 0:
        raise ValueError(
            f"--batch {recipe.batch} does not divide into micro-batches of {args.micro} on {place.world} processes"
        )
    fsdp = choose_fsdp(args.parallel, model, place)
    recompute = args.recompute
    if recompute is None:
        recompute = sum(p.numel() for p in model.parameters()) > LARGE
    ready(model, place, recompute, args.compile)
    if args.dry_run is not None:
        order = Order(data, args.seed, recipe.batch, args.micro, place.rank, place.world, range(recipe.steps))
        micros = [collate([data[key] for key in keys]) for keys in islice(order, 4)]  # a step's heaviest come first
        once = recipe.batch == args.micro  # the gradients need not be there before the backward pass
        sys.exit(dry_run(model, place, fsdp, args.dry_run or n_sharing(place), micros, once))
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, and should be a folder")
    if args.weights and out.resolve() == Path(args.weights).resolve():
        raise ValueError(f"--out {out} is the folder of --weights: the run would overwrite what it starts from")
    if any((out / name).exists() for name in WEIGHT_FILES[1:]):
        raise ValueError(f"--out {out} already holds other weights: choose another folder")
    found = checkpoint.find(out / "checkpoints", place)
    if found and not args.resume:
        raise ValueError(f"{out} already holds a run: continue it with --resume, or choose another --out")

    if fsdp:
        shard(model, place)
    torch.manual_seed(args.seed)
    fill(model, chain(tensors, lora.initial(model)), place.device, share)
    run = Run(args, recipe, place, fsdp, model.train(), make_optimizer(model, recipe), data, val)
    if found:
        resume(run, *found)
    out.mkdir(parents=True, exist_ok=True)
    return run


def dry_run(model: Owl, place: Place, fsdp: bool, n_device: int, micros: list[Batch], once: bool) -> int:
    """Prints what is trained and what memory each device will need for it. Returns 0 if it fits, 1 if it does not.

    model: on the meta device, readied. n_device: of a node. micros: some micro-batches of the run; the largest counts.
    once: a step is a single micro-batch on a single device.
    """
    bytes_of = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for parameter in model.parameters():
        bytes_of["weights"] += parameter.nbytes
        bytes_of["gradients"] += parameter.nbytes * parameter.requires_grad
        bytes_of["optimizer"] += 2 * parameter.nbytes * parameter.requires_grad
    largest = max(micros, key=lambda batch: (batch.n_image, batch.n_token))
    autocast = precision(replace(place, device=torch.device("cpu")), fsdp)
    if fsdp:
        bytes_of = {kind: n / n_device for kind, n in bytes_of.items()}
        parts = sorted(sum(p.numel() for p in block.parameters()) for block in blocks(model))
        rest = sum(p.numel() for p in model.parameters()) - sum(parts)
        # Of two blocks at a time, and of what is in none: the weights, and gradients, cast to float32 to be averaged.
        bytes_of["gathered"] = (2 * parts[-1] + rest) * (2 * place.dtype.itemsize + 4)
        model.to(place.dtype)
    sizes = (largest.n_image, largest.ids.shape[1], largest.n_supervised)
    accumulate = fsdp or not once
    bytes_of["activations"] = activation_bytes(model.train(), *sizes, autocast, accumulate)
    if not accumulate:  # gradients come as activations go: the two together have one peak
        bytes_of["activations"] -= bytes_of["gradients"]
    there = device_memory(place.device)
    needed = sum(bytes_of.values())
    fits = needed < 0.95 * there  # something is lost between tensors, and to the device's own needs
    if place.is_first:
        print(report(model))
        print(f"memory of each device, for {largest.n_sample} samples of {sizes[1]} positions with {sizes[0]} images:")
        for kind, n in bytes_of.items():
            print(f"  {kind:<12}{n / 1e9:>10.2f} GB")
        verdict = "it should fit" if fits else "it does not fit"
        print(f"  {'all':<12}{needed / 1e9:>10.2f} GB of {there / 1e9:.2f} GB: {verdict}")
    return 0 if fits else 1
