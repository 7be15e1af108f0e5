"""Checkpoints: the training state of a run. --resume continues a run from it.

    RUN/checkpoints/step-00000500/
        __0_0.distcp, __1_0.distcp, ...   each rank's shards of the trained parameters and of AdamW's moments
        .metadata                         which shard of which tensor is in which file (torch.distributed.checkpoint)
        manifest.json                     step, settings of the run, size and SHA-256 of every file and of itself

A checkpoint is not what load_model reads. It holds the trained parameters, AdamW's moments and the step, and any
number of ranks can resume from it, sharded or not: bit for bit on as many ranks, else up to rounding. Frozen
parameters come from --weights again. Weights are the whole model in the Hugging Face layout, which a run writes to its
own folder at the end: load_model reads those.

A checkpoint is written as step-00000500.part and renamed when it is complete. If one is damaged nevertheless (its
checksums tell), `find` skips it with a warning and returns the one before.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from common.files import MAX_JSON, is_full, printable, read_bytes, reading
from training.distributed import Dist, all_gather_object, barrier
from training.safe_metadata import SafeReader

MANIFEST = "manifest.json"
STEP = "step-" + "[0-9]" * 8


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained parameters and AdamW's two moments of each, by name: the tensors themselves, not copies."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            state[f"weight.{name}"] = parameter.detach()
            state[f"moment1.{name}"] = moments["exp_avg"]
            state[f"moment2.{name}"] = moments["exp_avg_sq"]
    return state


class HashingStream:
    """A file to write, and the SHA-256 of what was written: a checkpoint of a 7B is not read back for it."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.n_byte = 0

    def write(self, data: bytes) -> int:
        data = memoryview(data).cast("B")
        self.sha256.update(data)
        self.n_byte += len(data)
        self.file.write(data)
        return len(data)

    def __getattr__(self, name: str) -> object:  # tell, flush, fileno, ...
        return getattr(self.file, name)


class HashingFileSystem(FileSystem):
    """torch's access to files. checksums: [size, SHA-256] of each written file, by name."""

    def __init__(self) -> None:
        self.checksums: dict[str, list] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:
        with super().create_stream(path, mode) as file:
            stream = HashingStream(file)
            yield stream
        self.checksums[Path(path).name] = [stream.n_byte, stream.sha256.hexdigest()]


def save(
    folder: Path, step: int, metadata: dict, tensors: dict[str, Tensor], *, dist: Dist, keep: int, best: int | None = None
) -> None:
    """Writes a checkpoint, then removes all but the newest `keep` and that of step `best`. All ranks call it together.

    metadata: a JSON object, stored in the manifest. tensors: plain ones (equal on all ranks) or DTensors.
    Raises OSError, for a full disk too.
    """
    final = folder / f"step-{step:08d}"
    part = final.with_suffix(".part")
    if dist.is_main:
        for unfinished in folder.glob(f"{STEP}.part"):  # left by a process that was killed in save
            remove(unfinished)
        part.mkdir(parents=True)
    barrier(dist)
    writer = FileSystemWriter(part)
    writer.fs = HashingFileSystem()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns if there is no process group
            dcp.save(tensors, storage_writer=writer, no_dist=not torch.distributed.is_initialized())
    except (dcp.CheckpointException, RuntimeError) as error:  # of a rank; torch's zip writer hides the system's error
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        if is_full(folder) or (isinstance(cause, OSError) and cause.errno == errno.ENOSPC):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part)) from None
        raise cause from None

    own = {name: found for name, found in writer.fs.checksums.items() if name.startswith(f"__{dist.rank}_")}
    checksums = all_gather_object(dist, own)
    if dist.is_main:
        files = {".metadata": checksum(part / ".metadata")}
        for some in checksums:
            files |= some
        missing = [name for name in files if not (part / name).is_file()]
        if missing:
            raise OSError(f"{part} lacks {missing[0]}: all nodes must share the run's folder")
        manifest = {"step": step, "facts": metadata, "tensors": sorted(tensors), "files": files}
        (part / MANIFEST).write_bytes(encode_manifest(manifest))
        remove(final)  # a damaged one of the same step, which find had skipped
        part.replace(final)
        remove_old(folder, final, keep, best)
    barrier(dist)


def remove_old(folder: Path, newest: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints except `newest`, the keep - 1 before it, and that of step `best`.

    Later ones are damaged: find skipped them.
    """
    found = newest_first(folder)
    n_damaged = found.index(newest)
    for path in found[:n_damaged] + found[n_damaged + keep :]:
        if best is not None and path.name == f"step-{best:08d}":
            continue
        remove(path.replace(path.with_suffix(".part")))  # renamed first, so that no half of it is found


def remove(path: Path) -> None:
    """Removes a folder if there is one; of a link, the link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def checksum(path: Path) -> list:
    """[size in bytes, SHA-256] of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def encode_manifest(manifest: dict) -> bytes:
    """The content of manifest.json: the manifest and its own SHA-256."""
    own = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": own}, indent=1).encode() + b"\n"


def read_manifest(path: Path) -> dict:
    """Reads a checkpoint's manifest. Raises OSError if it is missing, ValueError if it is damaged or impossible."""
    try:
        content = read_bytes(path / MANIFEST, MAX_JSON)
        manifest = json.loads(content)
        del manifest["sha256"]
        is_intact = encode_manifest(manifest) == content and is_possible(manifest)
        is_intact = is_intact and path.name == f"step-{manifest['step']:08d}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_intact = False  # missing entries, or of other types
    if not is_intact:
        raise ValueError(f"{MANIFEST} is damaged")
    return manifest


def is_possible(manifest: dict) -> bool:
    """Whether a manifest has what `save` and Monitor.metadata write. May raise KeyError, TypeError or ValueError."""
    step, facts, files = manifest["step"], manifest["facts"], manifest["files"]
    counts = [step, facts["updates"], facts["bad_steps"], *(size for size, _ in files.values())]
    return (
        all(type(n) is int and n >= 0 for n in counts)
        and facts["updates"] + facts["bad_steps"] <= step
        and isinstance(facts["settings"], dict)
        and all(isinstance(name, str) for name in manifest["tensors"])
        and ".metadata" in files
        and all(name == Path(name).name for name in files)
    )


def newest_first(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, which may not exist."""
    return sorted(folder.glob(STEP), reverse=True)


def find(folder: Path, dist: Dist) -> tuple[Path, dict] | None:
    """Returns the newest intact checkpoint and its manifest, or None if there is no checkpoint at all.

    All ranks call it together. Warns about each checkpoint it skips. Raises ValueError if all are damaged.
    """
    found = all_gather_object(dist, newest_first(folder))[0]  # those that rank 0 sees
    for path in found:
        damage = find_damage(path, dist)
        if damage is None:
            return path, read_manifest(path)
        if dist.is_main:
            print(f"warning: the checkpoint {printable(path)} is skipped: {printable(damage)}", file=sys.stderr)
    if found:
        raise ValueError(f"none of the checkpoints in {folder} can be used; remove the folder to start again")
    return None


def find_damage(path: Path, dist: Dist) -> str | None:
    """Verifies a checkpoint's files. Returns what is wrong, or None. Each rank verifies a part of the files."""
    try:
        files, problem = sorted(read_manifest(path)["files"].items()), None
    except OSError:
        problem = f"{MANIFEST} cannot be read"
    except ValueError as error:
        problem = str(error)
    if problems := list(filter(None, all_gather_object(dist, problem))):  # perhaps only on one node
        return problems[0]
    own = files[dist.rank :: dist.world_size]
    checks = (  # the sizes of all files, then their content, which may take minutes
        lambda file, expected: file.is_file() and file.stat().st_size == expected[0],
        lambda file, expected: checksum(file) == expected,
    )
    for is_right in checks:
        wrong = [name for name, expected in own if not is_right(path / name, expected)]
        wrong = sorted(sum(all_gather_object(dist, wrong), []))
        if wrong:
            return f"{wrong[0]} is missing or damaged"
    return None


def load(path: Path, manifest: dict, tensors: dict[str, Tensor]) -> None:
    """Reads a checkpoint into tensors. All ranks call it together.

    Raises ValueError if the checkpoint has other names or shapes, or cannot be read.
    """
    if manifest["tensors"] != sorted(tensors):
        raise ValueError(f"{path} is from a run that trained other parameters")
    read_tensors(path, tensors)


def read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Reads some of a checkpoint's tensors, by name. Raises ValueError if one is missing or of another shape."""
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            dcp.load(tensors, storage_reader=SafeReader(path), no_dist=not torch.distributed.is_initialized())
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None  # the error of the first rank that failed


def resume(path: Path, manifest: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads a checkpoint into the trained parameters and into AdamW. Raises ValueError as `load` does."""
    load(path, manifest, training_state(model, optimizer))
    for state in optimizer.state.values():
        state["step"].fill_(manifest["facts"]["updates"])
