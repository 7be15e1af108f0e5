"""Reads a checkpoint's .metadata without running what it contains: a run to resume may come from a stranger.

torch.distributed.checkpoint describes its tensors in a pickle, `.metadata`, and unpickles it without limits. SafeReader
unpickles only the classes of such a description, and accepts only tensors in files of the checkpoint's own folder.
"""

import io
import math
import pickle
from pathlib import Path, PurePath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata

from common.files import read_bytes

MAX_METADATA = 32_000_000  # bytes; a 7B on eight processes has about 5,000,000


class SafeReader(FileSystemReader):
    """torch's reader of checkpoints with a restricted unpickler. Raises ValueError for metadata it does not accept."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.metadata = MetadataUnpickler(io.BytesIO(read_bytes(folder / ".metadata", MAX_METADATA))).load()

        # torch would unpickle an entry that is not a tensor without limits, and would follow any path.
        entries = self.metadata.state_dict_metadata.values()
        paths = {stored.relative_path for stored in self.metadata.storage_data.values()}
        outside = paths - {file.name for file in folder.iterdir()}
        if outside or any(type(entry) is not dcp_metadata.TensorStorageMetadata for entry in entries):
            raise ValueError(f".metadata describes objects that are not tensors, or other files: {sorted(outside)}")
        # torch would leave any part of a tensor that no chunk covers unchanged.
        for name, entry in self.metadata.state_dict_metadata.items():
            inside = all(
                0 <= start <= start + n <= size
                for chunk in entry.chunks
                for start, n, size in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            indices = {dcp_metadata.MetadataIndex(name, chunk.offsets) for chunk in entry.chunks}
            n_element = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if not inside or indices - set(self.metadata.storage_data) or n_element != math.prod(entry.size):
                raise ValueError(f".metadata does not describe all of {name}")

    def read_metadata(self, *args: object, **kwargs: object) -> dcp.Metadata:
        self.metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return self.metadata


class MetadataUnpickler(pickle._Unpickler):
    """Unpickles only the classes that describe tensors. Raises ValueError for any other name.

    This is pickle's unpickler in Python: the C version lets a pickle set attributes of any class or function that it
    can name (the BUILD opcode), which amounts to running code. BYTEARRAY8 is excluded, as it would reserve any number
    of bytes, and BytesStorageMetadata, because torch would unpickle the bytes that it describes without limits.
    """

    DESCRIPTIONS = {
        (dcp_metadata.__name__, name)
        for name in ("ChunkStorageMetadata", "TensorStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties")
    } | {(dcp_metadata.__name__, "StorageMeta"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    OTHERS = {
        (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
    }
    # Python 3.13 writes pathlib._local, which other versions do not have, as they do not have the other system's class.
    PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in self.PATHS:
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.DESCRIPTIONS | self.OTHERS:
            raise ValueError(f".metadata refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def load_build(self) -> None:
        kind = type(self.stack[-2])
        if (kind.__module__, kind.__name__) not in self.DESCRIPTIONS:
            raise ValueError(f".metadata modifies a {kind.__name__}, which no checkpoint needs")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
    del dispatch[pickle.BYTEARRAY8[0]]
