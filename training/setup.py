"""From a stage's command line to a run that can start.

    flags --build_model--> the model on the meta device (no memory yet), tokenizer, recipe
              | the stage selects what is trained
          --build_run----> data opened, checkpoint found, model sharded if asked and given its first weights

All user errors are found here, before anything slow begins. --check exits from here; training/plan.py has --dry-run.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

import lora
from data.check import check
from data.conversations import Batch, Conversations, SampleSpec, Skipped, collate
from data.mix import BLOCK, BatchSampler, Mixture, parse_mix
from data.text import Tokenizer
from common.files import printable
from model import Owl, OwlConfig
from training import checkpoint
from training.distributed import Dist, barrier
from training.memory import activation_bytes, state_bytes
from training.options import MAX_STEPS, Recipe, make_recipe, set_steps
from training.parallel import LARGE, autocast, blocks, choose_fsdp
from training.parallel import materialize, prepare_blocks, shard, shard_group_size
from training.presets import PRESETS, init_weights, resize
from training.pretrained import resize_position_embeddings
from weights import TOKENIZER_FILES, WEIGHT_FILES, hf_tensors, read_config

MAX_EPOCHS = 20  # passes over a source, above which a run warns

# Flags that may differ when a run resumes: they do not change its result, except for rounding.
NOT_COMPARED = ("out", "resume", "check", "dry_run", "memory", "val", "log_every", "val_every", "save_every", "keep")
NOT_COMPARED += ("keep_best", "tensorboard", "max_skipped", "epochs", "index", "device", "micro_batch", "workers")
NOT_COMPARED += ("parallel", "recompute", "compile")
NOT_COMPARED += ("data", "mix", "image_root")  # paths: the content is compared instead, by its fingerprint


@dataclass
class TrainingRun:
    """Everything that train() needs, already validated by build_run."""

    args: argparse.Namespace
    recipe: Recipe
    dist: Dist
    fsdp: bool
    model: Owl
    data: Mixture
    val_data: Conversations | None
    checkpoint: tuple[Path, dict] | None = None  # to resume from, and its manifest

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.recipe.batch // (self.args.micro_batch * self.dist.world_size)

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @cached_property
    def settings(self) -> dict:
        """The settings that must be equal when the run resumes. Their names are part of the checkpoint format."""
        settings = {name: value for name, value in vars(self.args).items() if name not in NOT_COMPARED}
        settings |= {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self.recipe).items()}
        sources = self.data.sources
        settings |= {"samples": [len(source) for source in sources], "shares": self.data.n_slot}
        return settings | {"precision": str(self.dist.dtype), "content": [source.fingerprint() for source in sources]}


def count_parameters(model: Owl) -> str:
    """A table of the trained and the frozen parameters in each part of the model."""
    lines = []
    for name, part in [*model.named_children(), ("all", model)]:
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in part.parameters() if not p.requires_grad)
        quantized = [m for m in part.modules() if isinstance(m, nn.Linear) and m.weight is None]  # inference/qlora.py
        frozen += sum(m.in_features * m.out_features for m in quantized)
        lines.append(f"  {name:<12}{trained:>16,} trained{frozen:>16,} frozen")
    return "\n".join(lines)


def describe(run: TrainingRun) -> str:
    """The sizes that decide what a run does and how long it takes, and warnings if they look like a mistake."""
    recipe, config = run.recipe, run.model.config
    micro_batches = f"{run.accumulation_steps} micro-batches of {run.args.micro_batch}"
    devices = f" on each of {run.dist.world_size} devices" if run.dist.world_size > 1 else ""
    lines = [
        f"images of {config.image_size} pixels: {config.vit.n_token - 1:,} patches, {config.n_visual_tokens} positions",
        f"samples of at most {recipe.max_length:,} positions, batches of {recipe.batch:,} samples: "
        f"{micro_batches}{devices}",
        f"{recipe.steps:,} steps, the first {recipe.warmup:,} of them warm-up",
    ]
    warnings = []
    for source, n_slot in zip(run.data.sources, run.data.n_slot):
        n_epoch = recipe.steps * recipe.batch * n_slot / BLOCK / len(source)
        rounded = f"{n_epoch:.2g}" if n_epoch < 10 else f"{n_epoch:,.0f}"
        lines.append(f"{rounded} epochs of the {len(source):,} rows of {printable(source.path)}")
        if n_epoch > MAX_EPOCHS:
            advice = "a smaller --batch" if recipe.batch > len(source) else "fewer --epochs or --steps"
            warnings.append(f"warning: {n_epoch:,.0f} passes over {printable(source.path)}: give {advice}")
    if recipe.warmup >= recipe.steps:
        warnings.append(f"warning: the warm-up of {recipe.warmup} steps is longer than the run of {recipe.steps}")
    return "\n".join(lines + warnings)


# --- the model ---------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, papers: dict[str, Recipe]) -> tuple[Owl, Tokenizer, Recipe]:
    """Returns the model without its weights, its tokenizer, and the recipe of its variant. Raises ValueError.

    The model has the shape of --weights, or of --preset with the vocabulary of --tokenizer. It is on the meta device,
    because it takes memory only after the stage has frozen parameters and build_run has sharded it.
    """
    if sys.platform == "win32":
        raise ValueError("training needs Linux or macOS")
    if args.weights:
        config = read_config(args.weights)
        tokenizer = Tokenizer(args.tokenizer or args.weights)
    elif args.preset and args.tokenizer:
        tokenizer = Tokenizer(args.tokenizer)
        config = PRESETS[args.preset]()
        config.llama.vocab_size = tokenizer.vocab_size
    else:
        raise ValueError("give --weights FOLDER, or --preset NAME and --tokenizer PATH to start from random weights")
    if tokenizer.vocab_size > config.llama.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.llama.vocab_size}")
    recipe = make_recipe(args, papers[config.variant], config.image_size)
    resize(config, recipe.image_size or config.image_size)
    config.llama.eos_id = tokenizer.eos_id
    with torch.device("meta"):
        model = Owl(config)
    model.tokenizer_folder = tokenizer.path.parent
    return model, tokenizer, recipe


def initial_tensors(args: argparse.Namespace, config: OwlConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights that a run starts from: those of --weights, or random ones (for small models)."""
    if args.weights:
        yield from resize_position_embeddings(hf_tensors(args.weights, read_config(args.weights)), config)
    else:
        yield from init_weights(Owl(config)).state_dict().items()


# --- the data ----------------------------------------------------------------------------------------


def build_data(
    args: argparse.Namespace, recipe: Recipe, config: OwlConfig, tokenizer: Tokenizer
) -> tuple[Mixture, Conversations | None]:
    """Opens the training data and, with --val, the validation data, which is not cropped."""

    def open_source(path: str, crop_scale: float) -> Conversations:
        sizes = {"max_length": recipe.max_length, "fit": args.fit, "crop_scale": crop_scale}
        spec = SampleSpec.for_model(config, tokenizer, **sizes)
        files = {"image_root": args.image_root, "merge": args.merge_images, "index": args.index}
        return Conversations(path, spec, **files, n_worker=args.workers)

    if (args.data is None) == (args.mix is None):
        raise ValueError("give --data SOURCE, or several with --mix SOURCE:WEIGHT ...")
    parts = [parse_mix(text) for text in args.mix] if args.mix else [(args.data, 1.0)]
    data = Mixture([open_source(path, recipe.crop_scale) for path, _ in parts], [weight for _, weight in parts])
    return data, open_source(args.val, 0.0) if args.val else None


def steps_of_epochs(n_epoch: float, batch: int, data: Mixture) -> int:
    """Steps of n_epoch passes over the data. One pass over a mixture takes as many samples as its sources have rows."""
    steps = math.ceil(n_epoch * sum(map(len, data.sources)) / batch)
    if steps > MAX_STEPS:
        raise ValueError(f"--epochs {n_epoch:g} are {steps:,} steps, more than {MAX_STEPS:,}")
    return steps


def make_sampler(run: TrainingRun, first_step: int = 0) -> BatchSampler:
    """The sampler of this rank's micro-batches, from a step (counted from 0) to the end of the run."""
    return BatchSampler(
        data=run.data,
        steps=range(first_step, run.recipe.steps),
        seed=run.args.seed,
        batch_size=run.recipe.batch,
        micro_batch_size=run.args.micro_batch,
        rank=run.dist.rank,
        world_size=run.dist.world_size,
    )


def check_samples(data: Mixture, model: Owl, dist: Dist) -> None:
    """Warns about unreadable shards and unsuitable data. Raises ValueError if a source's first rows are unusable."""
    n_image = 0
    for source in data.sources:
        for reason in source.broken if dist.is_main else ():
            print(f"warning: {printable(reason)}", file=sys.stderr)
        first = [source[0, index] for index in range(min(len(source), 20))]
        if all(isinstance(sample, Skipped) for sample in first):
            raise ValueError(f"none of the first {len(first)} rows of {source.path} can be used; {first[0].reason}")
        n_image += sum(len(sample.images) for sample in first if not isinstance(sample, Skipped))
    text_trains = any(p.requires_grad for name, p in model.llama.named_parameters() if ".multiway.1." not in name)
    if n_image == 0 and not text_trains and dist.is_main:
        print("warning: the first rows have no images, and text alone trains nothing in this stage", file=sys.stderr)


# --- the run -----------------------------------------------------------------------------------------


def build_run(
    args: argparse.Namespace,
    dist: Dist,
    model: Owl,
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    tensors: Iterable[tuple[str, Tensor]],
) -> TrainingRun:
    """Opens the data, finds a checkpoint to resume from, and gives the model its first weights.

    model: from build_model, after the stage has frozen what it does not train. tensors: the first weights, by name.
    Raises ValueError or OSError for settings or files that cannot be used.
    """
    if args.memory is not None:
        raise ValueError("--memory is for --dry-run")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if args.keep_best and args.val is None:
        raise ValueError("--keep-best needs --val")
    if not args.check:
        check_out(args)
    run = open_run(args, dist, model, tokenizer=tokenizer, recipe=recipe)
    check_batch(run)

    # Blocks are compiled and checkpointed, and the model sharded, while it has no memory.
    prepare_model(run)
    run.fsdp = choose_fsdp(args.parallel, dist, lambda: memory_per_device(run, largest_batch(run)))
    run.checkpoint = find_checkpoint(run)
    run.out.mkdir(parents=True, exist_ok=True)
    if run.fsdp:
        shard(model, dist)
    torch.manual_seed(args.seed)
    materialize(model, chain(tensors, lora.init_lora(model)), dist.device)
    return run


def open_run(
    args: argparse.Namespace, dist: Dist, model: Owl, *, tokenizer: Tokenizer, recipe: Recipe
) -> TrainingRun:
    """Opens and checks the data of a run, whose model is still without memory. Exits after --check."""
    if not dist.is_main:
        barrier(dist)  # waits for rank 0, which may have to index the data
    data, val_data = build_data(args, recipe, model.config, tokenizer)
    if dist.is_main:
        barrier(dist)
    if args.epochs is not None:
        recipe = set_steps(args, recipe, steps_of_epochs(args.epochs, recipe.batch, data))
    if args.check:
        sys.exit(1 if check(data) else 0)
    check_samples(data, model, dist)
    for part, lr in (("vit", recipe.vit_lr), ("abstractor", recipe.abstractor_lr)):
        if lr is not None and not any(p.requires_grad for p in model.get_submodule(part).parameters()):
            raise ValueError(f"--{part}-lr: the {part} is not trained")
    return TrainingRun(args, recipe, dist, False, model.train(), data, val_data)


def check_batch(run: TrainingRun) -> None:
    """Raises ValueError if a batch cannot be divided into micro-batches on all devices."""
    n, micro_batch = run.dist.world_size, run.args.micro_batch
    if run.recipe.batch % (micro_batch * n) != 0:
        sizes = f"{micro_batch} (--micro-batch) x {n} processes"
        raise ValueError(f"--batch {run.recipe.batch} is not a multiple of {sizes}")


def keeps_activations(run: TrainingRun) -> bool:
    """Whether the backward pass finds all activations in memory, instead of recomputing those of each block."""
    if run.args.recompute is not None:
        return not run.args.recompute
    return sum(x.numel() for x in run.model.state_dict().values()) <= LARGE  # quantized weights are buffers


def prepare_model(run: TrainingRun) -> None:
    """Prepares the blocks of a model on the meta device."""
    prepare_blocks(run.model, run.dist, not keeps_activations(run), run.args.compile)


def check_out(args: argparse.Namespace) -> None:
    """Raises ValueError if --out is missing, or if the run would overwrite something that a run did not write.

    A run's folder has weights only beside a checkpoint of their run. Other files, such as a log, do not matter.
    """
    if not args.out:
        raise ValueError("give the run a folder: --out")
    out = Path(args.out)
    for flag in ("weights", "tokenizer", "clip", "vit", "llama"):
        if (path := getattr(args, flag, None)) and out.resolve() == Path(path).resolve():
            raise ValueError(f"--out {out} is also --{flag}: the run would overwrite the model it starts from")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    for name in names & {"metrics.jsonl", "checkpoints", "adapter"}:
        if (out / name).is_symlink():
            raise ValueError(f"{out / name} is a link, and a run writes only into its own folder")
    if others := names & set(WEIGHT_FILES[1:]):
        raise ValueError(f"--out {out} already holds other weights ({min(others)}): choose another folder")
    if any((path / checkpoint.MANIFEST).is_file() for path in checkpoint.newest_first(out / "checkpoints")):
        return  # a run's folder: find_checkpoint compares its settings
    written = {"config.json", "preprocessor_config.json", "adapter", *WEIGHT_FILES, *TOKENIZER_FILES}
    others = {name for name in names if name in written or name.endswith(".safetensors")}
    others |= {name for name in names & {"metrics.jsonl"} if not is_metrics(out / name)}
    if others:
        raise ValueError(f"--out {out} holds {min(others)}, but no checkpoint of a run: choose another folder")


def is_metrics(path: Path) -> bool:
    """Whether this is the metrics.jsonl of a run."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9) in (b"", b'{"step": ')


def find_checkpoint(run: TrainingRun) -> tuple[Path, dict] | None:
    """Returns the checkpoint to resume from and its manifest, or None. Raises ValueError if it is from another run."""
    now = run.settings
    found = checkpoint.find(run.checkpoints, run.dist)
    if found is None:
        return None
    if not run.args.resume:
        raise ValueError(f"{run.out} already holds a run: continue it with --resume, or choose another --out")
    path, manifest = found
    saved = manifest["facts"]["settings"]  # an older one has no "content" and no "shares"
    different = [f"{key}: {saved[key]} then, {now[key]} now" for key in now if key in saved and saved[key] != now[key]]
    is_longer = isinstance(saved.get("steps"), int) and saved["steps"] < now["steps"]
    if is_longer:  # the learning rate follows the longer schedule from here on
        different = [text for text in different if not text.startswith(("steps: ", "warmup: "))]
    if different:
        raise ValueError(f"{path} is from a run with other settings ({'; '.join(different)})")
    if is_longer and run.dist.is_main:
        lengths = f"{saved['steps']} steps then, {now['steps']} now"
        print(f"the run becomes longer ({lengths}), and so does its learning rate schedule", file=sys.stderr)
    return found


def largest_batch(run: TrainingRun) -> Batch:
    """The largest micro-batch of the first steps, of those without rows that are skipped, such as too long ones."""
    sampler, batches = make_sampler(run), []
    for step in range(4):
        for keys in sampler.micro_batches(step):  # from the longest to the shortest
            batches.append(collate([run.data[key] for key in keys]))
            if batches[-1].n_sample == len(keys):
                break
    return max(batches, key=lambda batch: (batch.n_image, batch.n_token))


def memory_per_device(run: TrainingRun, largest: Batch) -> dict[str, float]:
    """Bytes that training needs on each device, by kind. largest: the largest micro-batch of a step.

    run.model is on the meta device; with FSDP it is cast here. --dry-run N: for a node of N devices.
    """
    model, dist, fsdp = run.model, run.dist, run.fsdp
    needed = state_bytes(model)
    cpu_autocast = autocast(replace(dist, device=torch.device("cpu")), fsdp)
    if fsdp:
        n_devices = run.args.dry_run or shard_group_size(dist)
        needed = {kind: n / n_devices for kind, n in needed.items()}
        in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
        rest = sum(p.numel() for p in model.parameters()) - sum(in_blocks)
        # Two blocks at a time, and everything outside blocks: weights, gradients, and gradients in float32 to reduce.
        needed["gathered"] = (2 * max(in_blocks) + rest) * (2 * dist.dtype.itemsize + 4)
        model.to(dist.dtype)
    sizes = (largest.n_image, largest.ids.shape[1], largest.n_supervised)
    accumulate = fsdp or run.recipe.batch != run.args.micro_batch
    needed["activations"] = activation_bytes(model, *sizes, autocast=cpu_autocast, accumulate=accumulate)
    if not accumulate:  # a single micro-batch: gradients appear as activations are freed, and share their peak
        needed["activations"] = max(0.0, needed["activations"] - needed["gradients"])
    return needed
