"""The training loop, shared by all stages.

A stage's script (train_stage1.py, train_stage2.py) makes the model, says what is trained and with which
numbers, and calls `train`. One step:

    a global batch of `batch` samples                          data/mix.py
      | each rank takes its part, in micro-batches of `micro`
    count the supervised tokens over all ranks and micro-batches
      | for each micro-batch: forward, loss = sum over its supervised tokens / that count, backward
      | the gradients are averaged over the ranks (parallel.py), each having multiplied its loss by their number
    clip, step, next learning rate

So the loss is the mean over the step's supervised tokens however the batch is cut up. Everything drawn by
chance is a function of the seed and the step (and, for dropout, of how the batch is cut up): a run that is killed
and resumed goes on as if nothing had happened.

A run's folder: metrics.jsonl (watch.py), checkpoints/ (checkpoint.py), and at the end the model in the official layout.
"""

import argparse
import gc
import math
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from cost import train_flops
from data.conversations import Batch, Conversations, collate
from data.mix import Mixture, Order, loader
from llama import Documents
from model import IGNORE, IMAGE_ID, Owl, OwlConfig
from parallel import Place, collect, precision, total, wait_for_all, whole, with_ddp
from watch import N_BEFORE_JUDGING, Meter, Metrics, Skips, log_line

MAX_BAD_STEPS = 5  # steps in a row without a finite gradient, after which a run gives up


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


@dataclass
class Run:
    """A run that is ready to go: every file has been opened, every setting looked at."""

    args: argparse.Namespace
    recipe: Recipe
    place: Place
    fsdp: bool
    model: Owl
    optimizer: torch.optim.Optimizer
    data: Mixture
    val: Conversations | None
    start: int = 0  # the first step to take
    updates: int = 0  # the optimizer's steps so far: all but those without a finite gradient
    bad_steps: int = 0  # of those without, the last ones in a row

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.recipe.batch // (self.args.micro * self.place.world)


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
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr_scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,  # one kernel, and no temporary copies of all that is trained
    )
    for group in optimizer.param_groups:  # what AdamW would make at its first step: a checkpoint is read into it
        for parameter in group["params"]:
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to min_lr at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


# --- what is kept to resume ----------------------------------------------------------------------------


def settings(run: Run) -> dict:
    """What must be the same for a run to continue as if it had not stopped."""
    free = ("out", "resume", "check", "dry_run", "val", "log_every", "val_every", "save_every", "keep", "max_skipped")
    free += ("device", "micro", "workers", "parallel", "recompute", "compile", "index")  # the same but for rounding
    chosen = {name: value for name, value in vars(run.args).items() if name not in free}
    chosen |= {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(run.recipe).items()}
    samples = [len(source) for source in run.data.sources]
    return chosen | {"precision": str(run.place.dtype), "samples": samples}


def training_state(run: Run) -> dict[str, Tensor]:
    """The weights that are trained and AdamW's two moments of each, by name: the tensors themselves."""
    state = {}
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            moments = run.optimizer.state[parameter]
            state[f"weight.{name}"] = parameter.detach()
            state[f"moment1.{name}"] = moments["exp_avg"]
            state[f"moment2.{name}"] = moments["exp_avg_sq"]
    return state


def save_checkpoint(run: Run, step: int) -> None:
    facts = {"settings": settings(run), "updates": run.updates, "bad_steps": run.bad_steps}
    checkpoint.save(run.out / "checkpoints", step, facts, training_state(run), run.place, run.args.keep)


def resume(run: Run, path: Path, manifest: dict) -> None:
    """Goes on from a checkpoint. ValueError if it is of another run."""
    saved, now = manifest["facts"]["settings"], settings(run)
    different = [f"{key}: {saved.get(key)} then, {now[key]} now" for key in now if saved.get(key) != now[key]]
    if different:
        raise ValueError(f"{path} is of a run with other settings ({'; '.join(different)})")
    checkpoint.load(path, manifest, training_state(run))
    run.start = manifest["step"]
    run.updates = manifest["facts"]["updates"]
    run.bad_steps = manifest["facts"]["bad_steps"]
    for moments in run.optimizer.state.values():
        moments["step"].fill_(run.updates)


# --- the loop ----------------------------------------------------------------------------------------


def loss_of(model: nn.Module, batch: Batch, config: OwlConfig, place: Place) -> Tensor:
    """The mean loss over a batch's supervised tokens."""
    if place.world > 1 and batch.images is None:
        # The others run the vision tower, and wait until this rank has as well: it looks at a blank image.
        batch = with_blank_image(batch, config)
    ids = batch.ids.to(place.device, non_blocking=True)
    labels = batch.labels.to(place.device, non_blocking=True)
    images = None if batch.images is None else batch.images.to(place.device, non_blocking=True)
    documents = Documents(batch.starts.to(place.device, non_blocking=True), batch.longest)
    return model(ids, images, labels, documents)[1]


def with_blank_image(batch: Batch, config: OwlConfig) -> Batch:
    """A text-only batch and, as a sample of its own that nothing attends to or learns from, one black image.

    So every parameter has a gradient on every rank, if a zero one.
    """
    n = config.image_words
    T = batch.ids.shape[1]
    return replace(
        batch,
        ids=torch.cat([batch.ids, torch.full((1, n), IMAGE_ID)], dim=1),
        labels=torch.cat([batch.labels, torch.full((1, n), IGNORE)], dim=1),
        starts=torch.cat([batch.starts, torch.tensor([T + n], dtype=torch.int32)]),
        longest=max(batch.longest, n),
        images=torch.zeros(1, 3, config.image_size, config.image_size),
    )


@torch.no_grad()
def validate(model: nn.Module, data: Conversations, micro: int, config: OwlConfig, place: Place, skips: Skips) -> float:
    """The mean loss over all supervised tokens of a source."""
    model.eval()
    loss_sum = 0.0
    n_token = 0
    for start in range(0, len(data), micro * place.world):  # all ranks take part in all rounds, if with nothing
        mine = range(start + place.rank, min(start + micro * place.world, len(data)), place.world)
        batch = collate([data[0, index] for index in mine])
        skips.add(batch)
        loss_sum += loss_of(model, batch, config, place).item() * batch.n_supervised
        n_token += batch.n_supervised
    model.train()
    loss_sum, n_token = total(place, loss_sum, n_token)
    return loss_sum / max(n_token, 1)


def take_step(run: Run, model: nn.Module, micros: list[Batch], n_supervised: float) -> tuple[float, float]:
    """One step of the optimizer. Without a finite gradient nothing is changed.

    model: what is called: run.model, or DDP around it. micros: this rank's micro-batches. n_supervised: the step's
    supervised tokens, over all ranks. Returns the mean loss over them and the gradient's norm.
    """
    trained = [p for p in run.model.parameters() if p.requires_grad]
    step_loss = torch.zeros((), device=run.place.device)
    for i, batch in enumerate(micros):
        # DDP averages the ranks' gradients once, after the last micro-batch. FSDP, which holds only parts of them, each
        # time within a node, and once between nodes.
        last = i == len(micros) - 1
        if run.fsdp:
            model.set_requires_all_reduce(last)
        with nullcontext() if run.fsdp or run.place.world == 1 or last else model.no_sync():
            with precision(run.place, run.fsdp):
                loss = loss_of(model, batch, run.model.config, run.place)
            loss = loss * (batch.n_supervised / max(n_supervised, 1))
            if loss.requires_grad:  # in stage 1, a single process's batch of text touches nothing that is trained
                (loss * run.place.world).backward()  # averaged over the ranks, this is the sum
        step_loss += loss.detach()
    for parameter in trained:  # AdamW passes over what has no gradient: with several processes all have, if a zero one
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = whole(nn.utils.clip_grad_norm_(trained, run.recipe.grad_clip)).item()
    (loss,) = total(run.place, step_loss.item())
    if math.isfinite(loss) and math.isfinite(norm):
        run.optimizer.step()
        run.updates += 1
        run.bad_steps = 0
    else:
        run.bad_steps += 1
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def train(run: Run, finish: Callable[[Owl, Path], None]) -> None:
    """Trains what requires a gradient, then calls finish(model, out), which saves the model, on the first process."""
    args, recipe, place = run.args, run.recipe, run.place
    say = tqdm.write if place.is_first else (lambda *_, **__: None)
    say(report(run.model), file=sys.stderr)
    if recipe.warmup >= recipe.steps:
        say(f"warning: {recipe.steps} steps end before the warm-up of {recipe.warmup} does", file=sys.stderr)
    model = with_ddp(run.model, place, run.fsdp)
    steps = range(run.start, recipe.steps)
    order = Order(run.data, args.seed, recipe.batch, args.micro, place.rank, place.world, steps)
    batches = loader(run.data, order, args.workers, pin=place.device.type == "cuda")
    metrics = Metrics(run.out / "metrics.jsonl", run.start, place)
    meter = Meter(place, run.start, recipe.steps)
    skips, val_skips = Skips(), Skips()
    n_seen = 0  # samples, usable or not, of all ranks
    signals = []

    def stop_soon(number: int, frame: object) -> None:
        signals.append(number)
        if number == signal.SIGINT:  # twice, it stops at once; SIGTERM may come from a scheduler and from torchrun
            signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, stop_soon) for number in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=recipe.steps, initial=run.start, desc="training", unit="step", disable=not place.is_first)
    done = run.start
    reason = ""  # to stop early

    # ------------------------------------------------------------------------------------------------
    for step in steps:
        rate = learning_rate(step, recipe)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        torch.manual_seed(((args.seed << 32) + step * place.world + place.rank) % 2**63)  # dropout's
        micros = [next(batches) for _ in range(run.accumulate)]
        for batch in micros:
            skips.add(batch)
        n_supervised, n_token, n_image, flops, n_skipped, n_signal = total(
            place,
            sum(b.n_supervised for b in micros),
            sum(b.n_token for b in micros),
            sum(b.n_image for b in micros),
            sum(train_flops(run.model, b.n_image, b.starts.diff().tolist(), b.n_supervised) for b in micros),
            skips.count.total(),
            len(signals),
        )
        loss, norm = take_step(run, model, micros, n_supervised)
        done = step + 1
        meter.add(n_token, n_image, flops)
        n_seen += recipe.batch
        bar.update()

        if run.bad_steps > 0:
            say(f"warning: step {done} is skipped: loss {loss}, gradient norm {norm}", file=sys.stderr)
        if done % args.log_every == 0 or done == recipe.steps:
            numbers = {"step": done, "loss": loss, "lr": rate, "norm": norm, **meter.read(done)}
            metrics.write(**numbers)
            say(log_line(numbers, recipe.steps), file=sys.stderr)
        if run.val is not None and (done % args.val_every == 0 or done == recipe.steps):
            with precision(place, run.fsdp):
                val_loss = validate(model, run.val, args.micro, run.model.config, place, val_skips)
            metrics.write(step=done, val_loss=val_loss)
            say(f"step {done}: validation loss {val_loss:.4f}", file=sys.stderr)
            meter.restart(done)
        if n_signal > 0:
            reason = "it was asked to"
        elif run.bad_steps > 0 and run.bad_steps % MAX_BAD_STEPS == 0:  # a resumed run may try as many more
            reason = f"{MAX_BAD_STEPS} steps in a row had no finite loss and gradient"
        elif n_seen >= N_BEFORE_JUDGING and n_skipped > args.max_skipped * n_seen:
            reason = f"{n_skipped:.0f} of {n_seen} samples could not be used, which is more than --max-skipped allows"
        if done % args.save_every == 0 or done == recipe.steps or reason:
            save_checkpoint(run, done)
        if reason:
            break
    # ------------------------------------------------------------------------------------------------

    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for rows, found in (("rows", skips.gather(place)), ("validation rows", val_skips.gather(place))):
        if found.count:
            say(f"skipped {rows}, each time they came up: {found.summary()}\n{found.lines()}", file=sys.stderr)
    if done == recipe.steps:
        collect(run.model, place)
        if place.is_first:
            finish(run.model.eval(), run.out)
        say(f"the model is in {run.out}", file=sys.stderr)
    else:
        say(f"stopped after step {done} ({reason}): continue with --resume", file=sys.stderr)
    wait_for_all(place)
    if dist.is_initialized():
        # DDP must go first. Were it the last to hold the process group, it would end the group while holding Python's
        # lock, for which the group's own thread may be waiting.
        del model
        gc.collect()
        dist.destroy_process_group()
    if reason:
        sys.exit(128 + (signals or [signal.SIGTERM])[0] if n_signal > 0 else 2)
