"""The training loop that all stages share.

A stage's command (train_stage1.py, train_stage2.py) builds the model, selects the parameters to train and calls
`train`. One step:

    global batch of recipe.batch samples                                   data/mix.py
      | split over the ranks, and on each rank into micro-batches
    n_supervised tokens in the whole step                                  all_reduce_sum
      | each micro-batch: forward, backward of world_size * sum over its supervised tokens / n_supervised
    gradients, averaged over the ranks (world_size cancels)                DDP or FSDP (training/parallel.py)
      | clip the norm, AdamW
    updated parameters

So the loss is the mean over all supervised tokens of the step, however the batch is split. Random numbers depend only
on the seed and the step (dropout also on how the batch is split), so a resumed run repeats the same steps bit for bit.

The CPU queues operations ahead of the device. In a step it waits for the device in all_reduce_sum (several ranks), in
loss.item() after the last backward pass, and in the gradient norm's .item(), which decides whether to update.

A run's folder holds metrics.jsonl (training/monitor.py), checkpoints/ (training/checkpoint.py) and, at the end, the
weights in the Hugging Face layout.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from command import user_errors
from data.conversations import Batch, Conversations, collate
from data.mix import load_batches
from common.files import printable
from llama import PackedSequences
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, Owl, OwlConfig
from training import checkpoint
from training.distributed import Dist, all_reduce_sum, barrier
from training.monitor import Monitor, SkippedSamples
from training.optimizer import learning_rate, make_optimizer, set_learning_rate
from training.parallel import autocast, full_tensor, gather_model_on_rank0, wrap_ddp
from training.setup import TrainingRun, count_parameters, describe, make_sampler

# --- loss and gradients ------------------------------------------------------------------------------


def compute_loss(model: nn.Module, batch: Batch, dist: Dist) -> Tensor:
    """Mean loss over the supervised tokens of a batch. model: an Owl, or DDP around it."""
    config = model.module.config if isinstance(model, DistributedDataParallel) else model.config
    if dist.world_size > 1 and batch.images is None:
        batch = add_blank_image(batch, config)
    n_placeholder = int((batch.ids == IMAGE_TOKEN_ID).sum())  # on the CPU
    tensors = (batch.ids, batch.images, batch.labels, batch.cu_seqlens, batch.supervised)
    ids, images, labels, cu_seqlens, supervised = (
        None if tensor is None else tensor.to(dist.device, non_blocking=True) for tensor in tensors
    )
    packed = PackedSequences(cu_seqlens, batch.max_seqlen, n_placeholder, supervised)
    return model(ids, images, labels, packed)[1]


def add_blank_image(batch: Batch, config: OwlConfig) -> Batch:
    """Appends a blank image to a text-only batch, as a sample that no other attends to, without supervised tokens.

    DDP and FSDP wait until all ranks have run the vision encoder. This gives its parameters zero gradients.
    """
    n = config.n_visual_tokens
    T = batch.ids.shape[1]
    return replace(
        batch,
        ids=torch.cat([batch.ids, torch.full((1, n), IMAGE_TOKEN_ID)], dim=1),
        labels=torch.cat([batch.labels, torch.full((1, n), IGNORE_INDEX)], dim=1),
        cu_seqlens=torch.cat([batch.cu_seqlens, torch.tensor([T + n], dtype=torch.int32)]),
        max_seqlen=max(batch.max_seqlen, n),
        images=torch.zeros(1, 3, config.image_size, config.image_size),
    )


@torch.no_grad()
def evaluate_loss(
    model: nn.Module, data: Conversations, micro_batch: int, dist: Dist, *, skipped: SkippedSamples
) -> float:
    """Mean loss over all supervised tokens of a source, in evaluation mode. Adds its unusable rows to `skipped`."""
    model.eval()
    loss_sum = 0.0
    n_supervised = 0
    for start in range(0, len(data), micro_batch * dist.world_size):  # all ranks run each round
        own = range(start + dist.rank, min(start + micro_batch * dist.world_size, len(data)), dist.world_size)
        batch = collate([data[0, index] for index in own])
        skipped.add(batch)
        loss_sum += compute_loss(model, batch, dist).item() * batch.n_supervised
        n_supervised += batch.n_supervised
    model.train()
    loss_sum, n_supervised = all_reduce_sum(dist, loss_sum, n_supervised)
    return loss_sum / max(n_supervised, 1)


def gradient_sync(model: nn.Module, fsdp: bool, is_last: bool) -> AbstractContextManager:
    """Context of a micro-batch in which ranks reduce gradients only if it is the step's last.

    FSDP, whose ranks hold only shards, reduces within a node each time, and between nodes in the last one.
    """
    if fsdp:
        model.set_requires_all_reduce(is_last)
    elif isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scales the gradients to a total norm of at most max_norm. Returns the norm before; waits for the device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # On one rank, a step without images gives the vision encoder no gradients. AdamW would skip it, but several ranks
    # have zero gradients there (add_blank_image): the same step must give the same result.
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return full_tensor(nn.utils.clip_grad_norm_(trained, max_norm)).item()


# --- the loop ----------------------------------------------------------------------------------------


def train(run: TrainingRun, save_final: Callable[[Owl, Path], None]) -> None:
    """Trains run.model up to step recipe.steps; rank 0 then calls save_final(model, out).

    Exits with 128 + signal after SIGTERM or SIGINT, with 2 if the run gives up; both leave a checkpoint. User errors,
    such as a full disk, exit with 2.
    """
    with user_errors():
        monitor = train_and_save(run, save_final)
    shut_down(run.dist)
    if monitor.exit_code:
        sys.exit(monitor.exit_code)


def train_and_save(run: TrainingRun, save_final: Callable[[Owl, Path], None]) -> Monitor:
    """Trains as `train` does, without its exit. Returns the monitor, which has the exit code."""
    args, recipe, dist = run.args, run.recipe, run.dist
    optimizer = make_optimizer(run.model, recipe)
    if run.checkpoint:
        checkpoint.resume(*run.checkpoint, run.model, optimizer)
    start = run.checkpoint[1]["step"] if run.checkpoint else 0
    is_cuda = dist.device.type == "cuda"
    monitor = Monitor(run, start)
    options = {"n_worker": args.workers, "pin_memory": is_cuda, "on_wait": monitor.on_wait}
    batches = load_batches(run.data, make_sampler(run, start), **options)
    monitor.print_status(describe(run))
    monitor.print_status(count_parameters(run.model))

    try:
        train_steps(run, optimizer, batches, monitor)
    finally:
        monitor.bar.close()  # an error begins on a line of its own

    monitor.close()
    if monitor.has_failed:
        n = monitor.nonfinite_steps
        monitor.print_status(f"error: no model is written: the last {n} steps had no finite loss and gradient")
    elif monitor.step == recipe.steps:
        gather_model_on_rank0(run.model, dist)
        if dist.is_main:
            save_final(run.model.eval(), run.out)
        monitor.print_status(f"the model is in {printable(run.out)}")
        if args.keep_best and monitor.best_step not in (0, monitor.step):
            path = run.checkpoints / f"step-{monitor.best_step:08d}"
            monitor.print_status(
                f"the validation loss was lowest ({monitor.best_loss:.4f}) after step {monitor.best_step}: "
                f"python -m tools.export --checkpoint {printable(path)} --out FOLDER"
            )
    else:
        reason = monitor.stop_reason
        monitor.print_status(f"stopped after step {monitor.step} ({reason}): continue with --resume")
    return monitor


def train_steps(
    run: TrainingRun, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], monitor: Monitor
) -> None:
    """Trains from step monitor.step + 1 to recipe.steps, or until there is a reason to stop early."""
    args, recipe, dist = run.args, run.recipe, run.dist
    model = wrap_ddp(run.model, dist, run.fsdp)
    for step in range(monitor.step + 1, recipe.steps + 1):
        # Learning rate and dropout's seed are functions of the step, so that a resumed run repeats them.
        lr = learning_rate(step, recipe)
        set_learning_rate(optimizer, lr)
        seed_dropout(args.seed, step, dist)

        # The loss is the mean over the supervised tokens of all micro-batches on all ranks.
        micro_batches = [next(batches) for _ in range(run.accumulation_steps)]
        (n_supervised,) = all_reduce_sum(dist, sum(batch.n_supervised for batch in micro_batches))

        # Forward and backward. Gradients are averaged over the ranks; world_size turns the average into a sum.
        loss = torch.zeros((), device=dist.device)
        for i, batch in enumerate(micro_batches):
            with gradient_sync(model, run.fsdp, is_last=i == len(micro_batches) - 1):
                with autocast(dist, run.fsdp):
                    micro_loss = compute_loss(model, batch, dist)
                micro_loss = micro_loss * (batch.n_supervised / max(n_supervised, 1))
                if micro_loss.requires_grad:  # not in stage 1 on one rank, for a batch without images
                    (micro_loss * dist.world_size).backward()
            loss += micro_loss.detach()
        (loss,) = all_reduce_sum(dist, loss.item())  # waits for the device

        # Clip and update. A step with a non-finite loss or gradient changes nothing.
        grad_norm = clip_grad_norm(run.model, recipe.grad_clip)  # waits for the device
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Log, validate, save.
        is_last = step == recipe.steps
        monitor.update(micro_batches, loss=loss, norm=grad_norm, lr=lr)
        if step % args.log_every == 0 or is_last:
            monitor.log()
        if run.val_data is not None and (step % args.val_every == 0 or is_last):
            with autocast(dist, run.fsdp):
                val_loss = evaluate_loss(model, run.val_data, args.micro_batch, dist, skipped=monitor.skipped_val)
            monitor.log_val_loss(val_loss)
        is_best = args.keep_best and monitor.best_step == step
        if step % args.save_every == 0 or is_last or is_best or monitor.stop_reason:
            tensors = checkpoint.training_state(run.model, optimizer)
            kept = {"keep": args.keep, "best": monitor.best_step if args.keep_best else None}
            checkpoint.save(run.checkpoints, step, monitor.metadata(), tensors, dist=dist, **kept)
            monitor.restart_interval()  # writing does not count as training
        if monitor.stop_reason:
            break


def seed_dropout(seed: int, step: int, dist: Dist) -> None:
    """Seeds torch's generators, which only dropout uses, differently in each step and on each rank."""
    torch.manual_seed(((seed << 32) + (step - 1) * dist.world_size + dist.rank) % 2**63)


def shut_down(dist: Dist) -> None:
    """Ends the process group, once rank 0 has saved the model. No DDP may be referenced any more."""
    barrier(dist)
    if torch.distributed.is_initialized():
        # DDP must be freed first. If it held the last reference to the process group, it would end the group while
        # holding Python's lock, for which the group's own thread may be waiting.
        gc.collect()
        torch.distributed.destroy_process_group()
