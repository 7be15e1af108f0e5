"""Watching a run: what is printed, what goes to metrics.jsonl, and what had to be skipped.

metrics.jsonl has a JSON object a line: {"step", "loss", "lr", "norm", "tokens_per_s", "images_per_s", "mfu",
"memory_gb", "left_s"} each log interval, {"step", "val_loss"} each validation. plot.py draws it.
"""

import json
import math
import resource
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from cost import peak_flops
from data.conversations import Batch
from parallel import Place, from_all

N_EXAMPLES = 5  # rows named, of each kind that could not be used
N_BEFORE_JUDGING = 100  # samples seen before a run is stopped for its share of bad ones


class Metrics:
    """metrics.jsonl. Lines from after the checkpoint that a run goes on from are dropped: they will come again."""

    def __init__(self, path: Path, start: int, place: Place):
        self.path = path
        self.is_first = place.is_first
        if self.is_first:
            kept = []
            if start > 0 and path.is_file():
                for line in path.read_text().splitlines():
                    try:
                        if json.loads(line)["step"] <= start:
                            kept.append(line + "\n")
                    except (ValueError, KeyError, TypeError):
                        break  # the line that was being written when the run was killed
            part = path.with_name(path.name + ".part")
            part.write_text("".join(kept))
            part.replace(path)

    def write(self, **numbers: float | None) -> None:
        """Adds a line; what is not a number in JSON (nan, inf) becomes null."""
        if self.is_first:
            line = {name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Meter:
    """How fast a run goes, and how well it uses the device: sums over all processes since the last log line."""

    def __init__(self, place: Place, start: int, steps: int):
        self.place = place
        self.steps = steps
        self.peak = peak_flops(place.device)  # of one device; None if it is not known
        self.restart(start)

    def restart(self, step: int) -> None:
        self.step = step
        self.n_token = self.n_image = self.flops = 0.0
        self.time = time.perf_counter()

    def add(self, n_token: float, n_image: float, flops: float) -> None:
        self.n_token += n_token
        self.n_image += n_image
        self.flops += flops

    def read(self, step: int) -> dict[str, float | None]:
        """The interval's numbers; left_s: the seconds that the rest of the run will take at this speed."""
        seconds = time.perf_counter() - self.time
        numbers = {
            "tokens_per_s": self.n_token / seconds,
            "images_per_s": self.n_image / seconds,
            "mfu": self.flops / seconds / (self.peak * self.place.world) if self.peak else None,
            "memory_gb": peak_memory(self.place.device) / 1e9,
            "left_s": seconds / (step - self.step) * (self.steps - step),
        }
        self.restart(step)
        return numbers


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that tensors have taken on a GPU; on a CPU, that the process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def log_line(numbers: dict[str, float | None], steps: int) -> str:
    """One line for a person."""
    line = f"step {numbers['step']}/{steps}  loss {numbers['loss']:.4f}  lr {numbers['lr']:.2e}"
    line += f"  norm {numbers['norm']:.3f}  {numbers['tokens_per_s']:,.0f} tokens/s"
    line += f"  {numbers['images_per_s']:,.1f} images/s"
    if numbers["mfu"] is not None:
        line += f"  MFU {100 * numbers['mfu']:.1f} %"
    return f"{line}  {numbers['memory_gb']:.2f} GB  {timedelta(seconds=round(numbers['left_s']))} left"


class Skips:
    """Rows that could not be used: counted by kind, the first few of each named."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, batch: Batch) -> None:
        for skipped in batch.skipped:
            self.count[skipped.kind] += 1
            examples = self.examples.setdefault(skipped.kind, [])
            if len(examples) < N_EXAMPLES and skipped.reason not in examples:
                examples.append(skipped.reason)
                tqdm.write(f"warning: skipped {skipped.reason} ({skipped.kind})", file=sys.stderr)

    def gather(self, place: Place) -> "Skips":
        """Those of all processes; all together."""
        together = Skips()
        for skips in from_all(place, self):
            together.count += skips.count
            for kind, examples in skips.examples.items():
                known = together.examples.setdefault(kind, [])
                known += [example for example in examples if example not in known][: N_EXAMPLES - len(known)]
        return together

    def summary(self) -> str:
        return ", ".join(f"{number} x {kind}" for kind, number in self.count.most_common())

    def lines(self) -> str:
        """The kinds, with examples, a line each."""
        lines = []
        for kind, number in self.count.most_common():
            lines += [f"  {number} x {kind}, e.g.", *(f"    {example}" for example in self.examples[kind])]
        return "\n".join(lines)
