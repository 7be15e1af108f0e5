"""Tar shards as img2dataset and WebDataset write them: random access to their samples, without unpacking.

A sample is a run of consecutive members with the same key, which is the path up to the first dot of the base name:

    00017.tar   000170042.jpg | content ... | 000170042.json | content | 000170042.txt | content | 000170043.jpg | ...
                ^ header: one block of 512 bytes                                                  ^
    index       4 bytes: the block of a sample's first header                                     4 bytes

    scan    shard --read_members--> members --split_name--> samples: the block of each one's first header
    index   scans --write_index--> index file --Index.locate--> sample number -> shard, byte
    read    byte --read_sample--> {"jpg": bytes, "json": bytes, ...}, the members until the key changes

The index is one file in the folder owlet-index beside the shards, 1.6 GB for the 400 million samples of LAION: the
blocks of all samples as uint32 (2^32 blocks are 2 TiB per shard), then as JSON the state of each shard when it was
scanned (name, size, modification time, number of samples, what is wrong), then the length of the JSON in 8 bytes.
When it is opened, shards that are new or have changed are scanned again. To build it before a run:

    python -m data.shards 'laion/*.tar' --workers 16                     # into laion/owlet-index
    python -m data.shards 'laion/*.tar' --workers 16 --index elsewhere   # if laion is not writable
    python -m data.shards 'laion/{00000..41407}.tar'                     # WebDataset's pattern; each must exist

One core scans about 16,000 members per second. Exit code: 0; 1 if shards are broken, which are listed; 2 for an error.
"""

import glob
import hashlib
import json
import os
import re
import secrets
import signal
import sys
import tarfile
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, suppress
from multiprocessing import Pool
from pathlib import Path
from typing import BinaryIO, NamedTuple

if __name__ == "__main__":
    import command  # noqa: F401  reports missing packages before they are imported

import numpy as np
from tqdm import tqdm

from common.files import check_file, printable

BLOCK = tarfile.BLOCKSIZE
MAX_SHARD = 2**32 * BLOCK  # bytes: what a uint32 can address
MAX_SAMPLE = 2**28  # bytes, headers included, so that a wrong one does not fill the memory
MAX_HEADER = 2**16  # bytes of an extended header, which holds the name of a member
MAX_PADDING = 2**20  # bytes after the end marker: tar pads to 10 KiB
EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")  # numbers of shards: {00000..00331}
MAX_SHARDS = 1_000_000  # of one pattern

State = tuple[str, int, int]  # a shard, to notice changes: name below the root, bytes, modification time in ns


class Broken(ValueError):
    """Why a shard or a sample cannot be read. The message continues its name."""


class Scan(NamedTuple):
    """The samples of a shard. reason: why the rest of the shard cannot be used, or ""."""

    blocks: np.ndarray  # [n] little-endian uint32: block of each sample's first header
    size: int  # bytes; -1 if the system could not read the shard, so that it is scanned again the next time
    mtime: int
    reason: str


# --- scan --------------------------------------------------------------------------------------------


class Member(tarfile.TarInfo):
    """A member's header. Two kinds of headers are not left to tarfile."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile lets subclasses override it
        if self.type == tarfile.XGLTYPE:
            self.type = b"?"  # skipped: a read from the middle of the shard does not see a global header
        if self.type in EXTENDED and not 0 <= self.size <= MAX_HEADER:
            raise tarfile.HeaderError("tarfile would read this size into memory")
        return super()._proc_member(archive)


def read_members(file: BinaryIO, start: int) -> Iterator[Member]:
    """Yields the regular files of a tar from the header at byte `start` on; the content of the last may be cut.

    Afterwards the file is positioned after the first block of the end marker. Raises Broken at a damaged header,
    where tarfile would stop without an error, and if the end marker is missing.
    """
    at = start  # where the next header should be
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file, tarinfo=Member, encoding="utf-8")
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep all of them
            if not 0 <= member.size <= MAX_SHARD or member.issparse():
                break
            at = archive.offset
            if member.isreg():
                yield member
    except OSError:
        raise
    except Exception:  # tarfile raises errors of many types for a damaged header
        pass

    file.seek(at)
    header = file.read(BLOCK)
    if header != bytes(BLOCK):
        reason = "its header is damaged or of a sparse file" if len(header) == BLOCK else "it is cut"
        raise Broken(f"{reason}, at byte {at:,}" if at else "it is not a plain, uncompressed tar")


def split_name(name: str) -> tuple[str, str]:
    """Splits "a/1.seg.PNG" into key "a/1" and extension "seg.png". Both are "" for a name that is of no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")


def scan(path: str) -> Scan:
    """Finds the samples of a shard; if it is broken, those before the damage."""
    starts: list[int] = []
    size, mtime, reason, last = -1, 0, "", ""
    try:
        status = os.stat(path)
        size, mtime = status.st_size, status.st_mtime_ns
        try:
            check_file(path, MAX_SHARD)
        except ValueError as error:
            raise Broken(str(error)) from None
        with open(path, "rb") as file:
            for member in read_members(file, 0):
                key, _ = split_name(member.name)
                if key and key != last:
                    last = key
                    starts.append(member.offset // BLOCK)
            padding = file.read(MAX_PADDING + 1)
        if len(padding) > MAX_PADDING or any(padding):
            reason = "it continues after its end marker (several concatenated tars?)"
    except (Broken, OSError) as error:
        starts = starts[:-1]  # members of the last sample may be missing
        reason = str(error)
        if isinstance(error, OSError):
            size, reason = -1, f"it cannot be read ({error.strerror})"
    return Scan(np.array(starts, dtype="<u4"), size, mtime, reason)


def scan_all(paths: list[str], n_worker: int) -> Iterator[Scan]:
    """Scans shards in order, in n_worker processes (up to 1: in this one)."""
    if n_worker <= 1 or len(paths) <= 1:
        yield from map(scan, paths)
        return
    with Pool(min(n_worker, len(paths)), _ignore_ctrl_c) as pool:
        yield from pool.imap(scan, paths)
        pool.close()
        pool.join()  # the workers end by themselves: one that is just starting could miss a signal to end


def _ignore_ctrl_c() -> None:
    """Ctrl-C reaches all processes. Only the main one handles it, and ends the others with SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# --- index -------------------------------------------------------------------------------------------


class Index:
    """An open index file.

    states: each shard when it was scanned. counts, starts: [n_shard] int64, its number of samples and the number of
    its first one. reasons: name -> what is wrong with a shard. Raises errors of many types for a damaged file.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.n_byte = file.seek(0, os.SEEK_END)
            file.seek(self.n_byte - 8)
            n_block_byte = self.n_byte - 8 - int.from_bytes(file.read(), "little")
            file.seek(n_block_byte)
            table = json.loads(file.read()[:-8])
            columns = [table[name] for name in ("names", "sizes", "mtimes", "counts")]
            self.states: list[State] = [row[:3] for row in zip(*columns, strict=True)]
            self.n_sample = n_block_byte // 4
            self.counts = np.array(table["counts"], dtype=np.int64)
            self.starts = np.cumsum(self.counts) - self.counts
            self.reasons = dict(table["reasons"])
            if self.counts.min() < 0 or self.counts.max() > n_block_byte or 4 * self.counts.sum() != n_block_byte:
                raise ValueError("its numbers of samples do not match its length")
            # pread has no file position that forked processes would share. A memory map would count as memory in use,
            # up to the whole file, because each access maps 64 kB around it.
            self.fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.fd)

    def locate(self, i: int) -> tuple[int, int, int]:
        """The shard of sample i, its number in the shard, and the byte of its first header."""
        if not 0 <= i < self.n_sample:
            raise IndexError(f"there is no sample {i} of {self.n_sample:,}")
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1  # the last one: skips shards without samples
        return shard, i - int(self.starts[shard]), int(self._read_blocks(i, 1)[0]) * BLOCK

    def scan_of(self, shard: int) -> Scan:
        """The scan that a shard was indexed from."""
        name, size, mtime = self.states[shard]
        blocks = self._read_blocks(int(self.starts[shard]), int(self.counts[shard]))
        return Scan(blocks, size, mtime, self.reasons.get(name, ""))

    def _read_blocks(self, first: int, n: int) -> np.ndarray:
        return np.frombuffer(os.pread(self.fd, 4 * n, 4 * first), "<u4")


def read_index(path: Path) -> Index | None:
    """Opens an index. Returns None if there is none, or a damaged one, with a warning."""
    if not path.is_file():
        return None
    try:
        return Index(path)
    except Exception as error:  # of many types, depending on where the file is damaged
        print(f"warning: the index {path} is damaged ({type(error).__name__}); it is built again", file=sys.stderr)
        return None


def write_index(path: Path, root: Path, states: list[State], old: Index | None, n_worker: int) -> Index:
    """Writes the index of these shards and opens it. Only shards that `old` does not have are scanned."""
    done = {state: shard for shard, state in enumerate(old.states)} if old else {}
    new = [os.path.join(root, state[0]) for state in states if state not in done]
    rows, reasons = [], {}
    # Written under a name that no other process on any machine has, then renamed.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "xb") as file, closing(scan_all(new, n_worker)) as scans:
            bar = iter(tqdm(scans, "indexing", len(new), unit="shard", disable=None if new else True))
            for state in states:
                blocks, size, mtime, reason = old.scan_of(done[state]) if state in done else next(bar)
                file.write(blocks.tobytes())
                rows.append((state[0], size, mtime, len(blocks)))
                if reason:
                    reasons[state[0]] = reason
            next(bar, None)  # closes the progress bar
            columns = dict(zip(("names", "sizes", "mtimes", "counts"), zip(*rows)))
            table = json.dumps(columns | {"reasons": reasons}).encode()
            file.write(table + len(table).to_bytes(8, "little"))
        index = Index(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise ValueError(f"the index {path} cannot be written ({error.strerror}): see --index") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return index


# --- read --------------------------------------------------------------------------------------------


class Shards:
    """The samples of tar shards, by number: the shards in the order of their names, each from its beginning.

    pattern: such as "laion/*.tar", or one file. index: folder of the index (default: owlet-index beside the shards),
    which is built where it is missing or out of date, in n_worker processes. broken: one message for each shard that
    is not readable to its end. A shard is opened for each read, so forked processes may share this object.
    Raises FileNotFoundError if no shard matches, ValueError if none has a sample or the index cannot be written.
    """

    def __init__(self, pattern: str, index: str | Path | None = None, n_worker: int = 1):
        self.root, states = find_shards(pattern)
        folder = Path(index) if index else self.root / "owlet-index"
        # Each pattern has its own index. Beside the shards, the relative pattern names it, so that it moves with them.
        purpose = os.path.abspath(pattern) if index else str(Path(pattern).relative_to(self.root))
        path = folder / f"{hashlib.sha256(os.fsencode(purpose)).hexdigest()[:16]}.index"
        self.index = read_index(path)
        if self.index is None or self.index.states != states:
            self.index = write_index(path, self.root, states, self.index, n_worker)
        self.broken = [
            f"{printable(name)}: {printable(self.index.reasons[name])}; only its first {n:,} samples are used"
            for (name, _, _), n in zip(self.index.states, self.index.counts)
            if name in self.index.reasons
        ]
        if len(self) == 0:
            raise ValueError("; ".join([f"no shard that matches {pattern} has a sample", *self.broken[:1]]))

    def __len__(self) -> int:
        return self.index.n_sample

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """Reads a sample: extension (lower case, without the dot) -> content.

        Raises Broken or OSError if its shard has changed since it was indexed, or cannot be read there.
        """
        shard, _, start = self.index.locate(i)
        name, *indexed = self.index.states[shard]
        path = os.path.join(self.root, name)
        status = os.stat(path)
        if indexed != [status.st_size, status.st_mtime_ns]:
            raise Broken("the shard has changed since it was indexed")
        with open(path, "rb") as file:
            return read_sample(file, start)

    def name(self, i: int) -> str:
        """Such as "00017.tar, sample 123", counted from 0."""
        shard, number, _ = self.index.locate(i)
        return f"{self.index.states[shard][0]}, sample {number}"


def read_sample(file: BinaryIO, start: int) -> dict[str, bytes]:
    """Reads the sample whose first header is at byte `start`: extension -> content. Raises Broken."""
    sample: dict[str, bytes] = {}
    key = ""
    for member in read_members(file, start):
        member_key, extension = split_name(member.name)
        if not member_key:
            continue
        if key and member_key != key:
            break
        key = member_key
        if member.offset_data + member.size - start > MAX_SAMPLE or extension in sample:
            raise Broken(f"it is longer than {MAX_SAMPLE:,} bytes, or has two members .{extension}")
        file.seek(member.offset_data)
        sample[extension] = file.read(member.size)
        if len(sample[extension]) < member.size:
            raise Broken(f"its member .{extension} is cut")
    if not sample:
        raise Broken("the index has a sample where none begins")
    return sample


def is_pattern(path: str) -> bool:
    """Whether a path has a wildcard or a range of numbers and is not the name of a file."""
    return bool(re.search(r"[*?[]", path) or BRACES.search(path)) and not os.path.isfile(path)


def expand_braces(pattern: str) -> list[str]:
    """Writes out ranges of numbers: "{08..10}.tar" -> "08.tar", "09.tar", "10.tar". Raises ValueError."""
    patterns = [pattern]
    while found := BRACES.search(patterns[0]):
        first, last = (int(number[:18]) for number in found.groups())
        if not 0 < (last - first + 1) * len(patterns) <= MAX_SHARDS:
            raise ValueError(f"{pattern} is a range of no or more than {MAX_SHARDS:,} shards")
        width = len(found[1])
        patterns = [BRACES.sub(f"{n:0{width}}", text, count=1) for text in patterns for n in range(first, last + 1)]
    return patterns


def find_shards(pattern: str) -> tuple[Path, list[State]]:
    """The folder that a pattern begins with, and the shards that match, sorted by name. Raises FileNotFoundError.

    A shard of a range that does not exist is among them; its scan says so.
    """
    root = path = Path(pattern)
    if path.is_file():
        return path.parent, [read_state(path.parent, path.name)]
    while is_pattern(str(root)):
        root = root.parent
    names: set[str] = set()
    for part in expand_braces(str(path.relative_to(root))) if root != path else []:
        names |= set(glob.glob(part, root_dir=root)) if glob.escape(part) != part else {part}
    states = [read_state(root, name) for name in sorted(names) if not (root / name).is_dir()]
    if not states:
        raise FileNotFoundError(f"there is no shard {pattern} (a tar, or a pattern in quotes such as 'laion/*.tar')")
    return root, states


def read_state(root: Path, name: str) -> State:
    try:
        status = os.stat(os.path.join(root, name))
    except OSError:
        return name, -1, 0  # such as a dangling link; the scan says what is wrong
    return name, status.st_size, status.st_mtime_ns


# --- command -----------------------------------------------------------------------------------------


def main() -> None:
    from command import ArgumentParser, user_errors

    parser = ArgumentParser(prog="python -m data.shards", description=__doc__)
    parser.add_argument("shards", help="a tar, or a pattern in quotes: 'laion/*.tar'")
    parser.add_argument("--workers", type=int, default=1, help="processes that scan (default: %(default)s)")
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="default: owlet-index beside the shards")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's signal ends the workers as Ctrl-C does
    start = time.perf_counter()
    with user_errors():
        shards = Shards(args.shards, args.index, args.workers)
    n_shard, size = len(shards.index.states), shards.index.n_byte / 1e9
    seconds = time.perf_counter() - start
    print(f"{n_shard:,} shards, {len(shards):,} samples, an index of {size:.3f} GB, in {seconds:.1f} s")
    if shards.broken:
        print(f"{len(shards.broken):,} of them cannot be used whole:", *shards.broken, sep="\n  ")
        sys.exit(1)


if __name__ == "__main__":
    from command import run

    run(main)
