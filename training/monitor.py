"""Observes a run: metrics.jsonl, progress bar, throughput, skipped samples, and the reasons to stop early.

metrics.jsonl has one JSON object per line: {"step", "loss", "lr", "norm", "tokens_per_s", "images_per_s", "mfu",
"memory_gb", "left_s"} every --log-every steps, {"step", "val_loss"} at each validation. tools/plot.py plots it. With
--tensorboard the same numbers go to TensorBoard's event files beside it.
"""

import json
import math
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from data.conversations import Batch
from common.files import printable, writing
from training.distributed import Dist, all_gather_object, all_reduce_sum
from training.flops import FlopCounter, peak_flops
from training.options import MIN_SAMPLES
from training.setup import TrainingRun

MAX_NONFINITE_STEPS = 5  # consecutive steps with a non-finite loss or gradient after which a run stops
MAX_WAIT = 10  # seconds for which a step that a signal ends may still wait for a batch
MAX_EXAMPLES = 5  # skipped rows that are named, of each kind


class Monitor:
    """Keeps the counters of a run and reports them.

    `update` is called by all ranks after each step and sums the counters over them, so `stop_reason` is the same on
    all ranks. From construction to `close`, SIGTERM and SIGINT (Ctrl-C) end the run after the current step; a second
    Ctrl-C ends it at once.
    """

    def __init__(self, run: TrainingRun, start: int):
        self.run = run
        self.dist = run.dist
        self.step = start  # steps done
        self.stop_reason = ""
        metadata = run.checkpoint[1]["facts"] if run.checkpoint else {}
        self.optimizer_steps = metadata.get("updates", 0)  # steps with a finite loss and gradient
        self.nonfinite_steps = metadata.get("bad_steps", 0)  # consecutive steps without, up to the last one
        self.best_step, self.best_loss = best_of(metadata)  # of the validations
        self.skipped, self.skipped_val = SkippedSamples(), SkippedSamples()
        self.n_samples = self.n_skipped = 0  # of this process's lifetime, over all ranks
        self.flop_counter = FlopCounter(run.model)
        self.peak_flops = peak_flops(self.dist.device)  # of one device; None if unknown
        self.restart_interval()
        self.metrics = run.out / "metrics.jsonl"
        if self.dist.is_main:
            truncate_metrics(self.metrics, start)
        self.tensorboard = None
        if run.args.tensorboard and self.dist.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(run.out, purge_step=start + 1)  # hides what a resumed run does again
        self.signals: list[int] = []
        self.signal_time = 0.0  # of the first one
        self.n_signals = 0  # over all ranks
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        steps = run.recipe.steps
        # None: no bar unless standard error is a terminal, so that a log file has whole lines only.
        disable = None if self.dist.is_main else True
        self.bar = tqdm(total=steps, initial=start, desc="training", unit="step", disable=disable)

    def on_signal(self, number: int, frame: object) -> None:
        self.signal_time = self.signal_time if self.signals else time.monotonic()
        self.signals.append(number)
        if number == signal.SIGINT:  # not for SIGTERM, which a scheduler and torchrun may both send
            signal.signal(number, self.handlers[number])

    def on_wait(self) -> None:
        """Ends the process if a signal came MAX_WAIT seconds ago and its step still waits for a batch."""
        if self.signals and time.monotonic() - self.signal_time > MAX_WAIT:
            self.print_status(f"no batch has come for {MAX_WAIT} s: continue with --resume from the last checkpoint")
            sys.exit(128 + self.signals[0])

    def update(self, micro_batches: list[Batch], *, loss: float, norm: float, lr: float) -> None:
        """Counts a step: this rank's micro-batches, and the loss and gradient norm over all ranks."""
        count_flops = self.flop_counter.count
        for batch in micro_batches:
            self.skipped.add(batch)
        n_tokens, n_images, flops, self.n_skipped, self.n_signals = all_reduce_sum(
            self.dist,
            sum(batch.n_token for batch in micro_batches),
            sum(batch.n_image for batch in micro_batches),
            sum(count_flops(b.n_image, b.cu_seqlens.diff().tolist(), b.n_supervised) for b in micro_batches),
            self.skipped.count.total(),
            len(self.signals),
        )
        self.step += 1
        self.bar.update()
        self.numbers = {"step": self.step, "loss": loss, "lr": lr, "norm": norm}
        self.n_tokens += n_tokens
        self.n_images += n_images
        self.flops += flops
        self.n_samples += self.run.recipe.batch
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer_steps += 1
            self.nonfinite_steps = 0
        else:
            self.nonfinite_steps += 1
            self.print_status(f"warning: step {self.step} is skipped: loss {loss}, gradient norm {norm}")
        self.stop_reason = self.find_stop_reason()

    def metadata(self) -> dict:
        """What a checkpoint stores besides tensors. The names are part of the checkpoint format."""
        counters = {"updates": self.optimizer_steps, "bad_steps": self.nonfinite_steps}
        return {"settings": self.run.settings, **counters, "best": [self.best_step, self.best_loss]}

    def find_stop_reason(self) -> str:
        """Why the run should stop after this step; empty if it should not."""
        if self.n_signals > 0:
            return "it received a signal"
        if self.nonfinite_steps > 0 and self.nonfinite_steps % MAX_NONFINITE_STEPS == 0:  # resumed, it may try as many
            return f"{MAX_NONFINITE_STEPS} consecutive steps had no finite loss and gradient"
        if self.n_samples >= MIN_SAMPLES and self.n_skipped > self.run.args.max_skipped * self.n_samples:
            return f"{self.n_skipped:.0f} of {self.n_samples} samples were skipped, which exceeds --max-skipped"
        return ""

    @property
    def exit_code(self) -> int:
        """0, or if the run stopped early: 128 + the signal's number as in a shell, 2 for any other reason."""
        if self.n_signals > 0:
            return 128 + (self.signals or [signal.SIGTERM])[0]  # this rank may have received none itself
        return 2 if self.stop_reason or self.has_failed else 0

    @property
    def has_failed(self) -> bool:
        """Whether the run reached its end, but its last steps, or its only one, had no finite loss and gradient."""
        n_steps = self.run.recipe.steps
        return self.step == n_steps and self.nonfinite_steps >= min(2, n_steps)

    def restart_interval(self) -> None:
        """Starts a new interval, over which throughput is measured."""
        self.interval_start = self.step
        self.n_tokens = self.n_images = self.flops = 0.0
        self.time = time.perf_counter()

    def log(self) -> None:
        """Writes and prints the numbers of the last step and the throughput since the interval began."""
        seconds = time.perf_counter() - self.time
        n_steps = self.run.recipe.steps
        available = self.peak_flops * self.dist.world_size * seconds if self.peak_flops else None
        numbers = self.numbers | {
            "tokens_per_s": self.n_tokens / seconds,
            "images_per_s": self.n_images / seconds,
            "mfu": self.flops / available if available else None,
            "memory_gb": peak_memory(self.dist.device) / 1e9,
            "left_s": seconds / (self.step - self.interval_start) * (n_steps - self.step),
        }
        self.write_metrics(numbers)
        mfu = f"  MFU {100 * numbers['mfu']:.1f} %" if numbers["mfu"] is not None else ""
        self.print_status(
            f"step {self.step}/{n_steps}  loss {numbers['loss']:.4f}  lr {numbers['lr']:.2e}"
            f"  norm {numbers['norm']:.3f}  {numbers['tokens_per_s']:,.0f} tokens/s"
            f"  {numbers['images_per_s']:,.1f} images/s{mfu}  {numbers['memory_gb']:.2f} GB"
            f"  {timedelta(seconds=round(numbers['left_s']))} left"
        )
        self.restart_interval()

    def log_val_loss(self, val_loss: float) -> None:
        if math.isfinite(val_loss) and (self.best_loss is None or val_loss < self.best_loss):
            self.best_step, self.best_loss = self.step, val_loss
        self.write_metrics({"step": self.step, "val_loss": val_loss})
        self.print_status(f"step {self.step}: validation loss {val_loss:.4f}")
        self.restart_interval()

    def write_metrics(self, numbers: dict[str, float | None]) -> None:
        """Appends a line to metrics.jsonl. nan and inf, which JSON does not have, become null."""
        if self.dist.is_main:
            line = {name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for name in numbers.keys() - {"step"}:
                if numbers[name] is not None:
                    self.tensorboard.add_scalar(name, numbers[name], numbers["step"])

    def print_status(self, message: str) -> None:
        """Prints a message on rank 0, to standard error, above the progress bar."""
        if self.dist.is_main:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Restores the signal handlers and reports the skipped rows of all ranks."""
        self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for rows, skipped in (("rows", self.skipped), ("validation rows", self.skipped_val)):
            found = skipped.gather(self.dist)
            if found.count:
                self.print_status(f"skipped {rows}, counted each time:\n{found.report()}")


def best_of(metadata: dict) -> tuple[int, float | None]:
    """The step of the lowest validation loss so far, and the loss: (0, None) before the first validation."""
    match metadata.get("best"):
        case [int(step), float(loss)] if step > 0:
            return step, loss
    return 0, None


def truncate_metrics(path: Path, step: int) -> None:
    """Starts metrics.jsonl: keeps the lines up to the step from which a run resumes, and drops the rest."""
    kept = []
    if step > 0 and path.is_file():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written when the run was killed
    for left in path.parent.glob(f"{path.name}.*"):  # by a process that was killed here
        left.unlink()
    with writing(path) as part:
        part.write_text("".join(kept))


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class SkippedSamples:
    """Rows that could not be used: their number by kind, and examples of each kind."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, batch: Batch) -> None:
        """Counts a batch's skipped rows, and warns about the first MAX_EXAMPLES of each kind."""
        for row in batch.skipped:
            self.count[row.kind] += 1
            examples = self.examples.setdefault(row.kind, [])
            if len(examples) < MAX_EXAMPLES and row.reason not in examples:
                examples.append(row.reason)
                tqdm.write(f"warning: skipped {printable(row.reason)} ({row.kind})", file=sys.stderr)

    def gather(self, dist: Dist) -> "SkippedSamples":
        """Those of all ranks. All ranks call it together."""
        merged = SkippedSamples()
        for skipped in all_gather_object(dist, self):
            merged.count += skipped.count
            for kind, examples in skipped.examples.items():
                present = merged.examples.setdefault(kind, [])
                present += [example for example in examples if example not in present][: MAX_EXAMPLES - len(present)]
        return merged

    def report(self) -> str:
        """The kinds and their examples, one per line."""
        lines = []
        for kind, number in self.count.most_common():
            lines += [f"  {number} x {kind}, e.g.", *(f"    {printable(example)}" for example in self.examples[kind])]
        return "\n".join(lines)
