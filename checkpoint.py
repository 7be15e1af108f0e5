"""Checkpoints of a run: what it takes to go on as if nothing had happened.

    RUN/checkpoints/step-00000500/
        __0_0.distcp, __1_0.distcp, ...   each process's part of the weights that are trained and of AdamW's moments
        .metadata                         which part of which tensor is where (torch.distributed.checkpoint)
        manifest.json                     the step, the run's settings, the size and SHA-256 of every file, and its own

Frozen weights are not in it: they come from the run's starting point again. A checkpoint is written beside its place,
as step-00000500.part, and renamed when it is whole. One that is damaged all the same (the manifest tells) is passed
over for the one before. It can be read by any number of processes, sharded or not.
"""

import hashlib
import json
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import metadata as descriptions

from parallel import Place, from_all, wait_for_all

MANIFEST = "manifest.json"
STEP = "step-" + "[0-9]" * 8


def save(folder: Path, step: int, facts: dict, tensors: dict[str, Tensor], place: Place, keep: int) -> None:
    """Writes a checkpoint; all processes together.

    facts: a JSON object to come back with `load`. tensors: by name, plain ones (the same on all processes) or DTensors.
    Then only the newest `keep` checkpoints stay.
    """
    done = folder / f"step-{step:08d}"
    part = done.with_suffix(".part")
    if place.is_first:
        for unfinished in folder.glob(f"{STEP}.part"):  # what a kill has left, in writing or in removing
            shutil.rmtree(unfinished)
        part.mkdir(parents=True)
    wait_for_all(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group, where there is none
        dcp.save(tensors, storage_writer=FileSystemWriter(part), no_dist=not dist.is_initialized())
    mine = {path.name: digest(path) for path in part.iterdir() if path.name.startswith(f"__{place.rank}_")}
    sums = from_all(place, mine)
    if place.is_first:
        files = {".metadata": digest(part / ".metadata")}
        for some in sums:
            files |= some
        elsewhere = [name for name in files if not (part / name).is_file()]
        if elsewhere:
            raise OSError(f"{part} lacks {elsewhere[0]}: the run's folder must be one that all nodes share")
        manifest = {"step": step, "facts": facts, "tensors": sorted(tensors), "files": files}
        (part / MANIFEST).write_bytes(seal(manifest))
        shutil.rmtree(done, ignore_errors=True)  # a damaged one that was passed over
        part.replace(done)
        found = newest_first(folder)
        n_damaged = found.index(done)  # later ones: they would not have been passed over otherwise
        for path in found[:n_damaged] + found[n_damaged + keep :]:
            shutil.rmtree(path.replace(path.with_suffix(".part")))  # under another name, lest half of it is found
    wait_for_all(place)


def digest(path: Path) -> list:
    """[size in bytes, SHA-256] of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def seal(manifest: dict) -> bytes:
    """A manifest as its file has it: with its own SHA-256, so that one that has changed is known."""
    own = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": own}, indent=1).encode() + b"\n"


def read_manifest(path: Path) -> dict:
    """A checkpoint's manifest. OSError or ValueError if it is missing or not as it was written."""
    content = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(content)
        del manifest["sha256"]
        whole = seal(manifest) == content
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST} is damaged")
    return manifest


def newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(STEP), reverse=True)


def find(folder: Path, place: Place) -> tuple[Path, dict] | None:
    """The newest checkpoint that is as it was written, and its manifest; None where there is no checkpoint at all.

    All processes together. Warns of each that is passed over; ValueError if all are damaged.
    """
    found = from_all(place, newest_first(folder))[0]  # what the first process sees
    for path in found:
        reason = damage(path, place)
        if reason is None:
            return path, read_manifest(path)
        if place.is_first:
            print(f"warning: the checkpoint {path} is passed over: {reason}", file=sys.stderr)
    if found:
        raise ValueError(f"none of the checkpoints in {folder} can be used; remove the folder to begin anew")
    return None


def damage(path: Path, place: Place) -> str | None:
    """What is wrong with a checkpoint, if anything is. Each process looks at its part of the files."""
    try:
        files = sorted(read_manifest(path)["files"].items())
    except OSError:
        return f"{MANIFEST} cannot be read"
    except ValueError as error:
        return str(error)
    wrong = []
    for name, expected in files[place.rank :: place.world]:
        file = path / Path(name).name
        if not file.is_file() or digest(file) != expected:
            wrong.append(name)
    wrong = sorted(sum(from_all(place, wrong), []))
    return f"{wrong[0]} is missing or damaged" if wrong else None


def load(path: Path, manifest: dict, tensors: dict[str, Tensor]) -> None:
    """Reads a checkpoint into tensors of the names that it was saved under; all processes together.

    ValueError if it has other tensors, or some of other shapes.
    """
    if manifest["tensors"] != sorted(tensors):
        raise ValueError(f"{path} is of a run that trained other parameters")
    try:
        reader = Reader(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (ValueError, dcp.CheckpointException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{path} cannot be read ({reason[:200]})") from None


class Reader(FileSystemReader):
    """torch's reader, but for `.metadata`, which is a pickle: of that only what describes tensors is unpickled."""

    def __init__(self, path: Path):
        """Raises ValueError for a description that cannot be read, or is of anything but tensors in this folder."""
        super().__init__(path)
        try:
            with (path / ".metadata").open("rb") as file:
                self.metadata = MetadataUnpickler(file).load()
            described = list(self.metadata.state_dict_metadata.values())
            names = {part.relative_path for part in self.metadata.storage_data.values()}
        except Exception as error:  # a pickle that is not as it should be may raise whatever it likes
            raise ValueError(f".metadata: {error}") from None
        if not all(type(one) is descriptions.TensorStorageMetadata for one in described):
            raise ValueError(".metadata describes something that is no tensor")
        beside = {file.name for file in path.iterdir()}
        for name in names:
            if name not in beside:
                raise ValueError(f".metadata names a file {name!r}, which is not beside it")

    def read_metadata(self, *args: object, **kwargs: object) -> dcp.Metadata:
        self.metadata.storage_meta = descriptions.StorageMeta(load_id=self.load_id)
        return self.metadata


class MetadataUnpickler(pickle._Unpickler):
    """Knows the names that a description of tensors is made of, and no other: a run may be a stranger's to continue.

    It is pickle's unpickler in Python, since the one in C lets a pickle set attributes of any class or function that
    it can name (BUILD), which is as good as running code; here only the descriptions themselves are filled.
    BytesStorageMetadata is left out: what it describes, torch would unpickle without any limits.
    """

    DESCRIPTIONS = {
        (descriptions.__name__, name)
        for name in ("ChunkStorageMetadata", "TensorStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties")
    } | {(descriptions.__name__, "StorageMeta"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    OTHERS = {
        (descriptions.__name__, "_MEM_FORMAT_ENCODING"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
    }
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in self.DESCRIPTIONS | self.OTHERS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def load_build(self) -> None:
        kind = type(self.stack[-2])
        if (kind.__module__, kind.__name__) not in self.DESCRIPTIONS:
            raise pickle.UnpicklingError(f"it changes a {kind.__name__}, which no checkpoint needs")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
