"""The training loop, shared by all stages.

A stage's script (train_stage1.py, train_stage2.py) makes the model, says what is trained and with which
numbers, and calls `train`. One step:

    a global batch of `batch` samples
      | each rank takes its part, in micro-batches of `micro`
    count the supervised tokens over all ranks and micro-batches
      | for each micro-batch: forward, loss = sum over its supervised tokens / that count, backward
      | (gradients are exchanged once, at the last)
    clip, step, next learning rate

So the loss is the mean over the step's supervised tokens however the batch is cut up. Everything drawn by
chance is a function of the seed and the step (and, for dropout, of how the batch is cut up): a run that is killed
and resumed goes on as if nothing had happened.

A run's folder: metrics.jsonl (a line a logged step), checkpoint.pt (what it takes to resume), and at the end the
model in the official layout.
"""

import argparse
import json
import math
import os
import pickle
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.check import check
from data.conversations import Batch, Conversations, Order, Skipped, collate, loader
from data.image import DEFAULT_FIT, FITS
from data.text import Tokenizer
from model import PRESETS, Owl, OwlConfig
from weights import WEIGHT_FILES, load_model, read_config, resize_images


@dataclass
class Recipe:
    """The numbers of a stage. Steps are optimizer steps, lengths are positions, rates are AdamW's."""

    steps: int
    warmup: int
    batch: int  # samples a step, over all ranks
    lr: float
    min_lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float  # the gradient's greatest norm
    max_length: int
    image_size: int  # 0: the model's own
    vit_lr_decay: float = 1.0  # the learning rate's factor from one ViT layer to the one below
    crop_scale: float = 0.0  # random crops of at least this share of the image, and flips; 0: neither


# --- the command line --------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that all stages have. Those of the recipe are None unless given."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--preset", choices=sorted(PRESETS), help="the model's shape, when not from --weights")
    g.add_argument("--weights", metavar="FOLDER", help="start from this model folder (official layout)")
    g.add_argument("--tokenizer", metavar="PATH", help="folder of tokenizer.model, or that file (default: --weights)")
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="FILE", required=True, help="conversations to train on (.json or .jsonl)")
    g.add_argument("--val", metavar="FILE", help="conversations to measure the loss on")
    g.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: FILE's folder)")
    g.add_argument("--fit", choices=FITS, help="how images become squares (default: owl1 stretch, owl2 square)")
    g.add_argument("--check", action="store_true", help="go over the data, show a few samples, and stop")
    g = p.add_argument_group("run")
    g.add_argument("--out", metavar="FOLDER", help="the run's folder (required but with --check)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--micro", type=int, default=8, help="samples in one forward pass on one device (default 8)")
    g.add_argument("--workers", type=int, default=0, help="processes beside each rank that load images (default 0)")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    g.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    g.add_argument("--val-every", type=int, default=500, metavar="STEPS")
    g.add_argument("--save-every", type=int, default=500, metavar="STEPS")
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
    for name in ("micro", "workers", "log_every", "val_every", "save_every"):
        numbers[name] = getattr(args, name)
    may_be_zero = ("warmup", "min_lr", "weight_decay", "image_size", "crop_scale", "workers")
    for name, number in numbers.items():
        if name == "betas":
            continue
        if not (number > 0 or number == 0 and name in may_be_zero) or not math.isfinite(number):
            least = "0 or more" if name in may_be_zero else "above 0"
            raise ValueError(f"--{name.replace('_', '-')} must be {least}, not {number}")
    if recipe.crop_scale > 1:
        raise ValueError(f"--crop-scale is a share of the image, at most 1, not {recipe.crop_scale}")
    return recipe


def fail(error: Exception) -> None:
    """A mistake that a person can mend: one sentence, exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


# --- processes ---------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where this process runs."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_process(device_name: str | None) -> Place:
    """Joins the other processes, if torchrun started several. ValueError if the device is not there."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no usable CUDA device")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device that torch knows") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0][:200]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        # The others wait while the first process writes a checkpoint: of a 7B, that takes a while.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return Place(rank, world, device)


def total(place: Place, *numbers: float) -> list[float]:
    """The sums of some numbers over all processes."""
    if place.world == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=place.device)
    dist.all_reduce(sums)
    return sums.tolist()


def start_model(
    args: argparse.Namespace, papers: dict[str, Recipe], place: Place
) -> tuple[Owl, Tokenizer, Recipe]:
    """The model, its tokenizer, and the numbers of its owl's paper under those given as flags.

    The model is that of --weights, or a --preset with random weights and the vocabulary of --tokenizer.
    Raises ValueError or OSError as load_model and Tokenizer do.
    """
    torch.manual_seed(args.seed)
    if args.weights:
        tokenizer = Tokenizer(args.tokenizer or args.weights)
        config = read_config(args.weights)
        recipe = recipe_of(args, papers[config.style])
        config.resize(recipe.image_size or config.image_size)
        check_if_asked(args, recipe, config, tokenizer)
        model = load_model(args.weights, place.device)
        resize_images(model, config.image_size)
    elif args.preset and args.tokenizer:
        tokenizer = Tokenizer(args.tokenizer)
        config = PRESETS[args.preset]()
        config.llama.vocab_size = tokenizer.vocab_size
        recipe = recipe_of(args, papers[config.style])
        config.resize(recipe.image_size or config.image_size)
        check_if_asked(args, recipe, config, tokenizer)
        model = Owl(config).init_weights()
    else:
        raise ValueError("give --weights FOLDER, or --preset NAME and --tokenizer PATH to start from random weights")
    model.tokenizer_folder = tokenizer.path.parent
    return model, tokenizer, recipe


def open_data(
    args: argparse.Namespace, path: str, crop_scale: float, recipe: Recipe, config: OwlConfig, tokenizer: Tokenizer
) -> Conversations:
    """A data file as this run reads it. Raises ValueError or OSError as Conversations does."""
    return Conversations(
        path,
        tokenizer,
        config.style,
        config.image_words,
        config.image_size,
        min(recipe.max_length, config.llama.context),
        args.fit or DEFAULT_FIT[config.style],
        args.image_root,
        crop_scale,
    )


def check_if_asked(args: argparse.Namespace, recipe: Recipe, config: OwlConfig, tokenizer: Tokenizer) -> None:
    """With --check, goes over the data and exits: before any weights are read, since that may take long."""
    if args.check:
        sys.exit(1 if check(open_data(args, args.data, recipe.crop_scale, recipe, config, tokenizer)) else 0)


# --- what is trained ---------------------------------------------------------------------------------


def report(model: Owl) -> str:
    """How much of each part of the model is trained, and how much is frozen."""
    lines = []
    for name, part in [*model.named_children(), ("all", model)]:
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in part.parameters() if not p.requires_grad)
        lines.append(f"  {name:<12}{trained:>16,} trained{frozen:>16,} frozen")
    return "\n".join(lines)


def vit_depth(name: str, n_layer: int) -> int:
    """The power of vit_lr_decay for a parameter: 1 in the ViT's top block, n_layer in its lowest, n_layer + 1 for
    its embeddings; 0 outside the ViT and for its last norm."""
    if name.startswith("vit.blocks."):
        return n_layer - int(name.split(".")[2])
    if name.startswith("vit.") and not name.startswith("vit.post_norm"):
        return n_layer + 1
    return 0


def make_optimizer(model: Owl, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over what is trained: no weight decay for norms and biases, lower rates deeper in the ViT."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = recipe.vit_lr_decay ** vit_depth(name, model.config.vit.n_layer)
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr_scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
    )


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to min_lr at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


# --- checkpoints -------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, recipe: Recipe) -> dict:
    """What must be the same for a run to continue as if it had not stopped."""
    free = ("out", "resume", "check", "val", "device", "micro", "workers", "log_every", "val_every", "save_every")
    run = {name: value for name, value in vars(args).items() if name not in free}
    return run | {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(recipe).items()}


def save_checkpoint(run: "Run", step: int) -> None:
    """Writes what is trained, beside its place first. Frozen weights come from the run's starting point again."""
    state = {
        "step": step,
        "settings": json.dumps(settings(run.args, run.recipe)),
        "model": {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad},
        "optimizer": run.optimizer.state_dict(),
    }
    part = run.checkpoint.with_name("checkpoint.pt.part")
    torch.save(state, part)
    part.replace(run.checkpoint)


def load_checkpoint(path: Path, model: Owl, optimizer: torch.optim.Optimizer, run: dict) -> int:
    """Restores a checkpoint and returns the next step. ValueError if it is corrupt or of another run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state["settings"])
        weights, moments, step = state["model"], state["optimizer"], state["step"]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]})") from None
    different = [f"{key}: {saved.get(key)} then, {run[key]} now" for key in run if saved.get(key) != run[key]]
    if different:
        raise ValueError(f"{path} is of a run with other settings ({'; '.join(different)})")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained.keys() != weights.keys():
        raise ValueError(f"{path} is of a run that trained other parameters")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(moments)
    return step


class Metrics:
    """metrics.jsonl: a JSON object a line. Lines from after the checkpoint are dropped: they will come again."""

    def __init__(self, path: Path, start: int, is_first: bool):
        self.path = path
        self.is_first = is_first
        if is_first:
            kept = []
            if start > 0 and path.is_file():
                for line in path.read_text().splitlines():
                    try:
                        if json.loads(line)["step"] <= start:
                            kept.append(line + "\n")
                    except (ValueError, KeyError):
                        break  # the line that was being written when the run was killed
            path.write_text("".join(kept))

    def write(self, **numbers: float) -> None:
        if self.is_first:
            with self.path.open("a") as file:
                file.write(json.dumps(numbers) + "\n")


class Skips:
    """Rows that could not be used: counted by kind, the first few of each named."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        for skipped in batch.skipped:
            self.count[skipped.kind] += 1
            if self.count[skipped.kind] <= 5:
                tqdm.write(f"warning: skipped {skipped.reason} ({skipped.kind})", file=sys.stderr)

    def summary(self) -> str:
        return ", ".join(f"{number} x {kind}" for kind, number in self.count.most_common())


# --- the loop ----------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: Owl, data: Conversations, micro: int, place: Place, skips: Skips) -> float:
    """The mean loss over all supervised tokens of a data file."""
    model.eval()
    loss_sum = 0.0
    n_token = 0
    mine = range(place.rank, len(data), place.world)
    for start in range(0, len(mine), micro):
        batch = collate([data[0, index] for index in mine[start : start + micro]])
        skips.add(batch)
        with mixed_precision(place):
            loss = forward(Loss(model), batch, place)
        loss_sum += loss.item() * batch.n_supervised
        n_token += batch.n_supervised
    model.train()
    loss_sum, n_token = total(place, loss_sum, n_token)
    return loss_sum / max(n_token, 1)


def mixed_precision(place: Place) -> torch.autocast:
    """bfloat16 for the matrix products on CUDA; weights, norms and the loss stay in float32."""
    return torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=place.device.type == "cuda")


def forward(loss_of: nn.Module, batch: Batch, place: Place) -> Tensor:
    """The mean loss over a batch's supervised tokens."""
    ids = batch.ids.to(place.device, non_blocking=True)
    labels = batch.labels.to(place.device, non_blocking=True)
    images = None if batch.images is None else batch.images.to(place.device, non_blocking=True)
    return loss_of(ids, images, labels)


class Loss(nn.Module):
    """The model's loss, as a module of its own for DDP to wrap.

    In stage 1 a batch of pure text meets nothing that is trained. Its loss has no gradient, but backward must run,
    since the other ranks wait for this one's: a parameter times zero gives it one.
    """

    def __init__(self, model: Owl):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, images: Tensor | None, labels: Tensor) -> Tensor:
        loss = self.model(ids, images, labels)[1]
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss = loss + 0.0 * next(p for p in self.model.parameters() if p.requires_grad).sum()
        return loss


@dataclass
class Run:
    """A run that is ready to go: every file has been opened, every setting looked at."""

    args: argparse.Namespace
    recipe: Recipe
    place: Place
    model: Owl
    optimizer: torch.optim.Optimizer
    data: Conversations
    val: Conversations | None
    start: int  # the first step to take

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.recipe.batch // (self.args.micro * self.place.world)


def prepare(args: argparse.Namespace, recipe: Recipe, place: Place, model: Owl, tokenizer: Tokenizer) -> Run:
    """Opens the data and, to resume, the checkpoint.

    Raises ValueError or OSError, in one sentence, for settings or files that cannot be used.
    """
    model.config.llama.eos_id = tokenizer.eos_id
    if tokenizer.vocab_size > model.config.llama.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.llama.vocab_size}"
        )
    data = open_data(args, args.data, recipe.crop_scale, recipe, model.config, tokenizer)
    val = open_data(args, args.val, 0.0, recipe, model.config, tokenizer) if args.val else None
    first = [data[0, index] for index in range(min(len(data), 20))]
    if all(isinstance(sample, Skipped) for sample in first):
        raise ValueError(f"none of the first {len(first)} rows of {args.data} can be used; {first[0].reason}")
    if not args.out:
        raise ValueError("give the run a folder: --out")
    if recipe.batch % (args.micro * place.world) != 0:
        raise ValueError(
            f"--batch {recipe.batch} does not divide into micro-batches of {args.micro} on {place.world} processes"
        )
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, and should be a folder")
    if args.weights and out.resolve() == Path(args.weights).resolve():
        raise ValueError(f"--out {out} is the folder of --weights: the run would overwrite what it starts from")
    if any((out / name).exists() for name in WEIGHT_FILES[1:]):
        raise ValueError(f"--out {out} already holds other weights: choose another folder")
    model.to(place.device).train()
    optimizer = make_optimizer(model, recipe)
    run = Run(args, recipe, place, model, optimizer, data, val, start=0)
    if run.checkpoint.exists():
        if not args.resume:
            raise ValueError(f"{run.out} already holds a run: continue it with --resume, or choose another --out")
        run.start = load_checkpoint(run.checkpoint, model, optimizer, settings(args, recipe))
    out.mkdir(parents=True, exist_ok=True)
    return run


def take_step(
    run: Run, loss_of: nn.Module, trained: list[nn.Parameter], micros: list[Batch], n_supervised: float
) -> tuple[Tensor, Tensor]:
    """One step of the optimizer over this rank's micro-batches.

    n_supervised: the step's supervised tokens, over all ranks. Returns this rank's share of the mean loss over
    them, and the gradient's norm.
    """
    step_loss = torch.zeros((), device=run.place.device)
    for i, batch in enumerate(micros):
        exchange = run.place.world == 1 or i == len(micros) - 1  # gradients meet once, after the last
        with nullcontext() if exchange else loss_of.no_sync():
            with mixed_precision(run.place):
                loss = forward(loss_of, batch, run.place)
            loss = loss * (batch.n_supervised / max(n_supervised, 1))
            (loss * run.place.world).backward()  # DDP averages over the ranks; times their number is the sum
        step_loss += loss.detach()
    for parameter in trained:  # one that no sample used counts as zero, however many processes there are
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.clip_grad_norm_(trained, run.recipe.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return step_loss, norm


def train(run: Run, finish: Callable[[Owl, Path], None]) -> None:
    """Trains what requires a gradient, then calls finish(model, out), which saves the model."""
    args, recipe, place, model = run.args, run.recipe, run.place, run.model
    if place.is_first:
        print(report(model), file=sys.stderr)
        if recipe.warmup >= recipe.steps:
            print(f"warning: {recipe.steps} steps end before the warm-up of {recipe.warmup} does", file=sys.stderr)
    loss_of = Loss(model)
    if place.world > 1:
        # A rank whose samples are all text uses no vision parameter: DDP has to look which were used.
        loss_of = DistributedDataParallel(loss_of, find_unused_parameters=True)

    trained = [p for p in model.parameters() if p.requires_grad]
    steps = range(run.start, recipe.steps)
    order = Order(len(run.data), args.seed, recipe.batch, args.micro, place.rank, place.world, steps)
    batches = loader(run.data, order, args.workers, pin=place.device.type == "cuda")
    metrics = Metrics(run.out / "metrics.jsonl", run.start, place.is_first)
    skips = Skips()
    val_skips = Skips()
    stopping = []

    def stop_soon(number: int, frame: object) -> None:
        stopping.append(number)
        signal.signal(number, handlers[number])  # asked twice, a process stops at once

    handlers = {number: signal.signal(number, stop_soon) for number in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=recipe.steps, initial=run.start, desc="training", unit="step", disable=not place.is_first)
    log_tokens = 0  # since the last logged step
    log_time = time.perf_counter()
    done = run.start
    stop = False

    for step in steps:
        rate = learning_rate(step, recipe)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        torch.manual_seed(((args.seed << 32) + step * place.world + place.rank) % 2**63)  # dropout's
        micros = [next(batches) for _ in range(run.accumulate)]
        n_supervised, n_token, n_stopping = total(
            place, sum(b.n_supervised for b in micros), sum(b.n_token for b in micros), len(stopping)
        )
        stop = n_stopping > 0
        for batch in micros:
            skips.add(batch)
        loss, norm = take_step(run, loss_of, trained, micros, n_supervised)

        log_tokens += n_token
        done = step + 1
        bar.update()
        if done % args.log_every == 0 or done == recipe.steps:
            (mean_loss,) = total(place, loss.item())  # over this step's tokens, of all ranks
            speed = log_tokens / (time.perf_counter() - log_time)
            metrics.write(step=done, loss=mean_loss, lr=rate, norm=norm.item(), tokens_per_s=speed)
            bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{rate:.2e}", tokens_s=f"{speed:,.0f}")
            log_tokens = 0
            log_time = time.perf_counter()
        if run.val is not None and (done % args.val_every == 0 or done == recipe.steps):
            val_loss = validate(model, run.val, args.micro, place, val_skips)
            metrics.write(step=done, val_loss=val_loss)
            if place.is_first:
                tqdm.write(f"step {done}: validation loss {val_loss:.4f}", file=sys.stderr)
            log_time = time.perf_counter()
        if place.is_first and (done % args.save_every == 0 or done == recipe.steps or stop):
            save_checkpoint(run, done)
        if stop:
            break

    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for rows, found in (("rows", skips), ("validation rows", val_skips)):
        if found.count:
            print(f"rank {place.rank} skipped {rows}, each time they came up: {found.summary()}", file=sys.stderr)
    if done < recipe.steps:
        if place.is_first:
            print(f"stopped after step {done}: continue with --resume", file=sys.stderr)
    elif place.is_first:
        finish(model.eval(), run.out)
        print(f"the model is in {run.out}", file=sys.stderr)
    if place.world > 1:
        dist.barrier()
        dist.destroy_process_group()
