"""How cost grows with images, text length, batch, queries and data rows, and where it stops being linear.

    python -m tools.scaling                          all tables, ten minutes on one core
    python -m tools.scaling --only text queries      some of them

Each of the first four tables varies one size of a model with random weights, and shows

    vision encoder ... prefill    median time; prefill is the decoder's part of a prompt, without lm_head
    decoding step                 of the token after the prompt, lm_head included
    training                      forward and backward pass of a packed micro-batch, half of its text supervised:
                                  time, memory besides weights and gradients (computed as by --dry-run,
                                  training/memory.py), FLOPs (training/flops.py), and those of Owl2-7B

The last tables open data sources of --rows rows, a tenth and a hundredth of them, each in a new process. The cost of
10^9 rows is computed from the growth between the last two.

The exponent in parentheses is log(cost ratio) / log(size ratio) of a row and the row before: 1 is linear. It is bold
outside 0.9 to 1.1. Times on a CPU are CPU times of the process, summed over its threads: what else the machine computes
does not count, and neither does waiting for a disk.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from command import ArgumentParser, run, user_errors
from data.conversations import collate
from data.mix import Mixture
from data.shards import BLOCK, Index, Shards
from data.sources import FileRows
from llama import Modality
from model import IMAGE_TOKEN_ID, Owl
from tools import benchmark
from train import compute_loss
from training.distributed import PRECISIONS, Dist, init_distributed
from training.flops import train_flops
from training.memory import activation_bytes
from training.monitor import peak_memory
from training.options import number, positive_int
from training.parallel import autocast
from training.presets import PRESETS

LINEAR = (0.9, 1.1)  # exponents that count as linear
GROWS = 0.5  # a smaller exponent is a constant and noise
N_TEXT = 64  # text tokens of a sample where the text is not what varies
SHARD = 10_000  # rows of a tar shard, as img2dataset writes them
COMPUTED = 10**9  # rows whose cost is computed from the measured ones


class Sizes(NamedTuple):
    """A batch of equal samples."""

    n_image: int = 1  # per sample
    n_text: int = N_TEXT  # text tokens per sample
    batch: int = 1  # samples
    n_query: int = 0  # per image; 0: the preset's


class Axis(NamedTuple):
    """What a table varies. field: of Sizes. stages: the columns (STAGES)."""

    title: str
    field: str
    values: tuple[int, ...]
    base: Sizes
    stages: tuple[str, ...]


STAGES = ("vision encoder", "abstractor", "prefill", "decoding step", "training")
AXES = {
    "images": Axis("images per sample", "n_image", (1, 2, 4, 8, 16), Sizes(), STAGES),
    "text": Axis("text tokens", "n_text", tuple(2**i for i in range(6, 13)), Sizes(n_image=0), STAGES[2:]),
    "batch": Axis("samples", "batch", (1, 2, 4, 8), Sizes(), STAGES[2:]),
    "queries": Axis("queries per image", "n_query", tuple(2**i for i in range(4, 11)), Sizes(), STAGES[1:]),
}
ROWS = "rows"


def parse_args() -> argparse.Namespace:
    p = ArgumentParser(prog="python -m tools.scaling", description=__doc__)
    p.add_argument("--only", nargs="+", choices=[*AXES, ROWS], default=[*AXES, ROWS], help="default: all")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    p.add_argument("--precision", choices=PRECISIONS, help="default: cuda bf16, cpu fp32")
    p.add_argument("--preset", choices=sorted(PRESETS), default="mid-owl2", help="default: %(default)s")
    p.add_argument("--rounds", type=positive_int, default=3, help="after a warm-up round (default: %(default)s)")
    at_least = number(int, lambda x: x >= 100, "100 or more")
    p.add_argument("--rows", type=at_least, default=10**6, help="most data rows that are measured (default: 10^6)")
    return p.parse_args()


# --- exponents and tables ----------------------------------------------------------------------------


def exponents(sizes: Sequence[float], costs: Sequence[float]) -> list[float]:
    """The local exponent between neighboring sizes, len(sizes) - 1 of them; NaN next to a cost of 0."""
    pairs = zip(zip(sizes, costs), zip(sizes[1:], costs[1:]))
    return [math.log(d / c) / math.log(b / a) if c > 0 and d > 0 else math.nan for (a, c), (b, d) in pairs]


def is_linear(exponent: float) -> bool:
    return LINEAR[0] <= round(exponent, 2) <= LINEAR[1]


def linear_range(sizes: Sequence[int], costs: Sequence[float]) -> str:
    """Says between which sizes a cost is linear: the longest run of linear exponents, the last of equal ones."""
    best, start = (0, 0), 0
    for end, exponent in enumerate(exponents(sizes, costs), start=1):
        if not is_linear(exponent):
            start = end
        elif end - start >= best[1] - best[0]:
            best = (start, end)
    return "nowhere linear" if best[0] == best[1] else f"linear from {sizes[best[0]]:,} to {sizes[best[1]]:,}"


def format_table(title: str, sizes: Sequence[int], columns: dict[str, list[float]]) -> str:
    """A markdown table with a row for each size, and below it where each column is linear."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    found = {name: [math.nan, *exponents(sizes, costs)] for name, costs in columns.items()}
    for i, size in enumerate(sizes):
        cells = [format_cell(costs[i], found[name][i]) for name, costs in columns.items()]
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {linear_range(sizes, costs)}" for name, costs in columns.items())]
    return "\n".join(lines)


def format_cell(cost: float, exponent: float) -> str:
    text = f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
    if math.isnan(exponent):
        return text
    return f"{text} ({exponent:.2f})" if is_linear(exponent) else f"{text} (**{exponent:.2f}**)"


# --- the model ---------------------------------------------------------------------------------------


def create_model(preset: str, device: torch.device, dtype: torch.dtype) -> Owl:
    """A model with random weights, all of them trained."""
    with torch.device("meta"):
        model = Owl(PRESETS[preset]()).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    benchmark.randomize(model)
    return model.train()


def set_queries(model: Owl, n_query: int) -> None:
    """Replaces the abstractor's queries by n_query random ones."""
    abstractor = model.abstractor
    if n_query in (0, abstractor.config.n_query):
        return
    abstractor.config.n_query = n_query
    queries = torch.randn(1, n_query, abstractor.config.n_embd).to(abstractor.queries)
    abstractor.queries = nn.Parameter(queries)
    for layer in abstractor.layers:
        if layer.attn.has_positions:
            layer.attn.q_pos = torch.randn_like(queries[0])


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this process, on another device the time once it has finished its work."""
    return time.process_time() if device.type == "cpu" else benchmark.synchronized_time(device)


def stage_calls(model: Owl, sizes: Sizes, dist: Dist) -> dict[str, Callable[[], float]]:
    """For each stage, a function that runs it once and returns the seconds. Other sizes may share the model."""
    config, llama, device = model.config, model.llama, dist.device
    set_queries(model, sizes.n_query)
    generator = torch.Generator().manual_seed(0)
    samples = [benchmark.random_sample(config, sizes.n_text, generator, sizes.n_image) for _ in range(sizes.batch)]
    batch = collate(samples)
    n_image, length = sizes.batch * sizes.n_image, len(samples[0].ids)

    images = torch.randn(n_image, 3, config.image_size, config.image_size, device=device, dtype=dist.dtype)
    features = torch.randn(n_image, config.vit.n_token, config.vit.n_embd, device=device, dtype=dist.dtype)
    x = torch.randn(sizes.batch, length, config.llama.n_embd, device=device, dtype=dist.dtype)
    is_image = torch.tensor([sample.ids for sample in samples], device=device) == IMAGE_TOKEN_ID
    modality = Modality.from_mask(is_image, n_image * config.n_visual_tokens) if n_image else None
    cache = llama.make_cache(sizes.batch, length + 1)  # the prompt's keys and values are zeros
    cache.lengths.fill_(length)

    def train() -> None:
        with torch.enable_grad():
            compute_loss(model, batch, dist).backward()

    calls = {
        "vision encoder": lambda: model.vit(images),
        "abstractor": lambda: model.abstractor(features),
        "prefill": lambda: benchmark.run_prefill(llama, x, modality),
        "decoding step": lambda: llama.lm_head(llama(x[:, :1], None, cache)),
        "training": train,
    }

    @torch.no_grad()
    def timed(call: Callable[[], object]) -> float:
        set_queries(model, sizes.n_query)
        start = clock(device)
        call()
        return clock(device) - start

    return {stage: partial(timed, call) for stage, call in calls.items()}


def training_flops(model: Owl, sizes: Sizes) -> float:
    """FLOPs of the training pass of a model on any device."""
    set_queries(model, sizes.n_query)
    length = sizes.n_image * model.config.n_visual_tokens + sizes.n_text
    return train_flops(model, sizes.batch * sizes.n_image, [length] * sizes.batch, sizes.batch * (sizes.n_text // 2))


def training_memory(model: Owl, sizes: Sizes, dist: Dist) -> int:
    """Bytes that the training pass needs besides weights and gradients."""
    set_queries(model, sizes.n_query)
    length = sizes.n_image * model.config.n_visual_tokens + sizes.n_text
    numbers = (sizes.batch * sizes.n_image, sizes.batch * length, sizes.batch * (sizes.n_text // 2))
    return activation_bytes(model, *numbers, autocast=autocast(dist, False))


def measure_axis(axis: Axis, model: Owl, large: Owl, dist: Dist, args: argparse.Namespace) -> str:
    """Returns the table of an axis. large: Owl2-7B on the meta device, whose FLOPs are counted."""
    points = [axis.base._replace(**{axis.field: value}) for value in axis.values]
    columns: dict[str, list[float]] = {}
    calls = [stage_calls(model, point, dist) for point in points]
    with tqdm(total=len(points) * (1 + args.rounds) * len(axis.stages), desc=axis.title, disable=None) as bar:

        def counted(call: Callable[[], float]) -> float:
            seconds = call()
            bar.update()
            return seconds

        for stage in axis.stages:
            by_size = {str(i): partial(counted, calls[i][stage]) for i in range(len(points))}
            medians = benchmark.interleaved_medians(by_size, args.rounds)
            columns[f"{stage}, ms"] = [1000 * seconds for seconds in medians.values()]
    columns["training, MB"] = [training_memory(model, point, dist) / 1e6 for point in points]
    columns["training, GFLOP"] = [training_flops(model, point) / 1e9 for point in points]
    columns["Owl2-7B, TFLOP"] = [training_flops(large, point) / 1e12 for point in points]
    return format_table(axis.title, axis.values, columns)


# --- data rows ---------------------------------------------------------------------------------------


def write_shard(path: Path, n_row: int) -> None:
    """Writes a tar of n_row captioned images as img2dataset does. The contents are holes, which take no space."""
    with open(path, "xb") as file:
        for i in range(n_row):
            for extension, size in (("jpg", 24_000), ("json", 400), ("txt", 60)):
                member = tarfile.TarInfo(f"{i:09}.{extension}")
                member.size = size
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                file.seek(-(-size // BLOCK) * BLOCK, os.SEEK_CUR)
        file.write(bytes(2 * BLOCK))


def write_shards(folder: Path, n_row: int, per_shard: int) -> None:
    """Shards with n_row rows in total; all are links to the first, except a shorter last one."""
    n_full, rest = divmod(n_row, per_shard)
    folder.mkdir()
    for shard in range(n_full):
        if shard == 0:
            write_shard(folder / "00000.tar", per_shard)
        else:
            os.link(folder / "00000.tar", folder / f"{shard:05}.tar")
    if rest:
        write_shard(folder / f"{n_full:05}.tar", rest)


def write_rows(path: Path, n_row: int) -> None:
    """A JSON list, or lines, of conversations; two rows have the same image."""
    with open(path, "x", encoding="utf-8") as file:
        is_list = path.suffix == ".json"
        for i in range(n_row):
            turns = [("human", f"<image>\nWhat is in picture {i // 2}?"), ("gpt", "A dog on a beach, beside a ball.")]
            row = {"id": str(i), "image": f"coco/train2017/{i // 2:012}.jpg"}
            row["conversations"] = [{"from": speaker, "value": text} for speaker, text in turns]
            file.write(("[" if i == 0 else ",\n") * is_list + json.dumps(row) + "\n" * (not is_list))
        file.write("]" * is_list)


def write_hollow_index(path: Path, n_row: int) -> None:
    """An index file of n_row rows whose blocks are a hole: it opens as a real one does, but has no samples."""
    n_shard = n_row // SHARD
    table = {"names": [f"{i:06}.tar" for i in range(n_shard)], "sizes": [3 * 10**8] * n_shard, "reasons": {}}
    table |= {"mtimes": [1_700_000_000_000_000_000 + i for i in range(n_shard)], "counts": [SHARD] * n_shard}
    text = json.dumps(table).encode()
    with open(path, "xb") as file:
        file.seek(4 * n_row)
        file.write(text + len(text).to_bytes(8, "little"))


def peak_bytes() -> int:
    """Peak memory of this process. (On Linux, training.monitor.peak_memory includes that of the process before it.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory(torch.device("cpu"))
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])


def time_and_memory(call: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Seconds of a call, and by how many MB its peak memory exceeds the memory in use before it."""
    benchmark.reset_peak_memory(torch.device("cpu"))
    before, start = peak_bytes(), time.process_time()
    call(*arguments)
    return time.process_time() - start, (peak_bytes() - before) / 1e6


def in_new_process(function: Callable, *arguments: object) -> object:
    """Calls a function in a new process, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def microseconds_per_row(source: Shards | FileRows | range, n: int = 1000) -> float:
    """Of drawing a random sample's number from the mixture and reading its row."""
    mixture = Mixture([source], [1.0])
    positions = random.Random(0).choices(range(10 * len(source)), k=n)
    start = time.process_time()
    for position in positions:
        _, _, index = mixture.key(position, seed=0)
        source[index]
    return 1e6 * (time.process_time() - start) / n


def read_from(open_source: Callable[..., Shards | FileRows], *arguments: object) -> float:
    return microseconds_per_row(open_source(*arguments))


def measure_tar(folder: Path, n_row: int) -> dict[str, float]:
    folder = folder / f"tar-{n_row}"
    write_shards(folder, n_row, SHARD)
    pattern = str(folder / "*.tar")
    build, build_memory = in_new_process(time_and_memory, Shards, pattern)
    (index,) = (folder / "owlet-index").iterdir()
    opened, opened_memory = in_new_process(time_and_memory, Shards, pattern)
    return {
        "build, s": build,
        "build, MB of memory": build_memory,
        "index, MB on disk": index.stat().st_size / 1e6,
        "open, s": opened,
        "open, MB of memory": opened_memory,
        "read a row, us": in_new_process(read_from, Shards, pattern),
    }


def measure_json(folder: Path, n_row: int, suffix: str) -> dict[str, float]:
    path = folder / f"{n_row}{suffix}"
    write_rows(path, n_row)
    opened, memory = in_new_process(time_and_memory, FileRows, path, False)
    merged, merged_memory = in_new_process(time_and_memory, FileRows, path, True)
    return {
        "file, MB": path.stat().st_size / 1e6,
        "open, s": opened,
        "open, MB of memory": memory,
        "merge images, s": merged,
        "merge images, MB of memory": merged_memory,
        "read a row, us": in_new_process(read_from, FileRows, path, False),
    }


def add_computed(sizes: list[int], columns: dict[str, list[float]]) -> str:
    """A table row for COMPUTED rows: costs that grow go on as between the last two sizes; the others are left empty."""
    cells = []
    for costs in columns.values():
        slope = (costs[-1] - costs[-2]) / (sizes[-1] - sizes[-2])
        grows = exponents(sizes, costs)[-1] > GROWS
        cells.append(f"{costs[-1] + slope * (COMPUTED - sizes[-1]):,.0f}" if grows else "")
    return f"| {COMPUTED:,}, computed | {' | '.join(cells)} |"


def measure_rows(args: argparse.Namespace) -> str:
    sizes = [args.rows // 100, args.rows // 10, args.rows]
    tables = []
    with tempfile.TemporaryDirectory() as name, tqdm(total=9, desc="data rows", disable=None, leave=False) as bar:
        folder = Path(name)
        kinds = {
            "tar shards": measure_tar,
            ".jsonl": partial(measure_json, suffix=".jsonl"),
            ".json": partial(measure_json, suffix=".json"),
        }
        for kind, measure in kinds.items():
            rows = []
            for n_row in sizes:
                rows.append(measure(folder, n_row))
                bar.update()
            columns = {column: [row[column] for row in rows] for column in rows[0]}
            table, _, ranges = format_table(f"rows, {kind}", sizes, columns).partition("\n\n")
            tables.append(f"{table}\n{add_computed(sizes, columns)}\n\n{ranges}")
        write_hollow_index(folder / "hollow.index", COMPUTED)
        seconds, memory = in_new_process(time_and_memory, Index, folder / "hollow.index")
    drawing = microseconds_per_row(range(COMPUTED))
    tables.append(
        f"An index file of {COMPUTED:,} rows in {COMPUTED // SHARD:,} shards opens in {seconds:.2f} s with "
        f"{memory:.0f} MB of memory; drawing one of {COMPUTED:,} rows takes {drawing:.0f} us."
    )
    return "\n\n".join(tables)


def main() -> None:
    args = parse_args()
    with user_errors():
        dist = init_distributed(args.device, args.precision)
        benchmark.print_environment(dist)
        axes = [name for name in AXES if name in args.only]
        if axes:
            with torch.device("meta"):
                large = Owl(PRESETS["owl2-7b"]())
            model = create_model(args.preset, dist.device, dist.dtype)
        for name in axes:
            axis = AXES[name]
            print(f"## {name}\n\n{measure_axis(axis, model, large, dist, args)}\n", flush=True)
        if ROWS in args.only:
            print(f"## data rows\n\n{measure_rows(args)}", flush=True)


if __name__ == "__main__":
    run(main)
