"""Tar shards, as img2dataset and WebDataset write them: their samples by number, without unpacking anything.

A tar is blocks of 512 bytes: of each member a header (name, size), then its content, filled up to whole blocks; zeros
mark the end. A sample is consecutive members of one key, which is the path up to the first dot of its last part:

    00017.tar   000170042.jpg | content ... | 000170042.json | content | 000170042.txt | content | 000170043.jpg | ...
                ^ header: one block           ^                          ^                         ^
                |                                                                                  |
    index     4 bytes: in which block a sample's first header lies                               4 bytes

The index is built once, from the headers alone, and stays on the disk:

    i --bisect--> shard --index--> block --open, seek, read until the key changes--> {"jpg": bytes, "json": bytes, ...}

It is one file in a folder `owlet-index` beside the shards, 1.6 GB for LAION's 400 million samples: all their blocks in
a row as uint32 (2^32 blocks are 2 TiB a shard), then as JSON what each shard was when it was scanned (name, size, time
of change, number of samples, what is wrong), then the JSON's length in 8 bytes. A shard that is new or has changed
since is scanned again when the index is opened, the others are not. To build it ahead of a run:

    python data/shards.py 'laion/*.tar' --workers 16                     # into laion/owlet-index
    python data/shards.py 'laion/*.tar' --workers 16 --index elsewhere   # where laion cannot be written to

It exits with 0; with 1 if shards are broken, which it names; with 2 after a mistake.

Why not the standard library's tarfile: it takes a damaged header for the end of the archive and says nothing, lets a
global header change members far behind it, which a read from the middle does not see, and is several times slower.
"""

import argparse
import glob
import hashlib
import json
import os
import secrets
import signal
import stat
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, suppress
from multiprocessing import Pool
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

BLOCK = 512
MAX_SHARD = 2**32 * BLOCK  # bytes: what a uint32 can point into
MAX_SAMPLE = 2**28  # bytes, headers included: nobody's image and caption, and no reason to fill the memory
MAX_NAME = 2**20  # bytes, of an extended header
MAX_REST = 2**20  # bytes after the end mark: tar fills up to 10 KiB

REGULAR = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever size they have
EXTENDED = (b"L", b"x", b"X")  # the name, and perhaps the size, of the member that follows: GNU's, POSIX's, Solaris'
PASSED_OVER = (b"K", b"g")  # what a link that follows points to; notes on all members

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd

Offsets = np.ndarray  # [n] little-endian uint32, in blocks
State = tuple[str, int, int]  # a shard: name below the root, size in bytes, time of change in ns


class Broken(Exception):
    """Why a shard, or a sample, cannot be read: a clause to stand behind its name."""


# ----------------------------------------------------------------------------------------------------------------------
# From a tar to its members


def members(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes, int, int]]:
    """Goes over the headers of a tar from byte `start` on.

    Yields a regular file's (byte of its first header, name, byte of its content, size in bytes); the content may lie
    past the end of a shard that is cut. Raises Broken at a damaged header, or where the shard ends without an end mark.
    Else the file stands behind the first block of the mark.
    """
    at = first = start
    fields: dict[bytes, bytes] = {}  # from extended headers, for the member that follows
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return
        try:
            kind, name, size = parse_header(header)
            if kind in EXTENDED and size <= MAX_NAME:
                text = file.read(size)
                if len(text) == size:  # else it is cut, which the next header will show
                    fields |= {b"path": text.partition(b"\0")[0]} if kind == b"L" else pax_fields(text)
            elif fields and kind not in PASSED_OVER:
                name = fields.get(b"path", name)
                size = int(fields.get(b"size", size))
            if kind in WITHOUT_CONTENT:
                size = 0
            if not 0 <= size <= (MAX_NAME if kind in EXTENDED else MAX_SHARD):
                raise ValueError("no size")
        except ValueError:
            raise Broken(whats_wrong(header, at)) from None
        content = at + BLOCK
        at = content + -(-size // BLOCK) * BLOCK
        if kind in EXTENDED or kind in PASSED_OVER:
            continue  # the member that it is about begins here
        if kind == b"S" or b"GNU.sparse" in fields:
            raise Broken("it holds a file with holes (a sparse one), which is not supported")
        if kind in REGULAR and not name.endswith(b"/"):
            yield first, name, content, size
        first = at
        fields = {}


def parse_header(header: bytes) -> tuple[bytes, bytes, int]:
    """A header's kind (one byte), name and size. Raises ValueError if it is damaged."""
    # The checksum is the sum of all bytes, its own taken for blanks.
    if len(header) < BLOCK or number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError("no header")
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return header[156:157], name, number(header[124:136])


def whats_wrong(header: bytes, at: int) -> str:
    if at == 0 and header.startswith(COMPRESSED):
        return "it is compressed, and random access needs a plain tar"
    if at == 0:
        return "it is not a tar" if header else "it is empty"
    if len(header) < BLOCK:
        return f"it is cut, for at byte {at:,} there is neither a member nor an end mark"
    return f"its header at byte {at:,} is damaged"


def number(field: bytes) -> int:
    """A number in a header: octal digits, or (a size of 8 GiB and more) the bytes themselves. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def pax_fields(text: bytes) -> dict[bytes, bytes]:
    """What we need of an extended header's records "LENGTH KEY=VALUE\\n", the length being the whole record's."""
    fields = {}
    at = 0
    while at < len(text) and text[at]:
        blank = text.index(b" ", at, at + 8)
        end = at + int(text[at:blank])
        if not blank < end <= len(text):
            raise ValueError("a record of a wrong length")
        key, _, value = text[blank + 1 : end - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            key = b"GNU.sparse"
        if key in (b"path", b"size", b"GNU.sparse"):
            fields[key] = value
        at = end
    return fields


# ----------------------------------------------------------------------------------------------------------------------
# From members to samples


def key_and_extension(name: bytes) -> tuple[bytes, bytes]:
    """b"a/1.seg.PNG" -> b"a/1", b"seg.png". Without a dot, or with one in front, it is of no sample: b"", b""."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    if not stem or not extension:
        return b"", b""
    return folder + slash + stem, extension.lower()


def read_sample(file: BinaryIO, start: int) -> dict[str, bytes]:
    """The sample whose first header is at byte `start`: extension -> content. Raises Broken."""
    sample: dict[str, bytes] = {}
    key = b""
    for _, name, content, size in members(file, start):
        its_key, extension = key_and_extension(name)
        if not its_key:
            continue
        if key and its_key != key:
            break
        key = its_key
        if content + size - start > MAX_SAMPLE:
            raise Broken(f"it is longer than {MAX_SAMPLE:,} bytes")
        extension = extension.decode(errors="replace")
        if extension in sample:
            raise Broken(f"it has two members .{extension}")
        file.seek(content)
        data = file.read(size)
        if len(data) < size:
            raise Broken(f"its member .{extension} is cut")
        sample[extension] = data
    if not sample:
        raise Broken("no sample begins where the index has one")
    return sample


def scan(path: str) -> tuple[Offsets, int, int, str]:
    """Finds the samples of a shard: (offsets, bytes of the shard, its time of change in ns, what is wrong or "").

    The bytes are -1 if the system would not let us read: that may be otherwise the next time, without a change.
    """
    starts: list[int] = []
    size, mtime = -1, 0
    reason = ""
    last = b""
    try:
        status = os.stat(path)
        size, mtime = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            raise Broken("it is not a file")  # opening a pipe would wait for ever
        if size > MAX_SHARD:
            raise Broken("it is longer than 2 TiB")
        with open(path, "rb") as file:
            for first, name, _, _ in members(file, 0):
                key, _ = key_and_extension(name)
                if key and key != last:
                    last = key
                    starts.append(first // BLOCK)
            rest = file.read(MAX_REST + 1)
        if len(rest) > MAX_REST or any(rest):
            reason = "it goes on after its end mark (several tars in a row?)"
    except Broken as error:
        reason = str(error)
        starts = starts[:-1]  # what is missing may belong to this sample
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
        starts = starts[:-1]
        size = -1
    return np.array(starts, dtype="<u4"), size, mtime, reason


def scan_all(paths: list[str], n_worker: int) -> Iterator[tuple[Offsets, int, int, str]]:
    """`scan` of each, in order, by n_worker processes (up to 1: by this one)."""
    if n_worker <= 1 or len(paths) <= 1:
        yield from map(scan, paths)
        return
    with Pool(min(n_worker, len(paths)), leave_signals) as pool:
        yield from pool.imap(scan, paths)


def leave_signals() -> None:
    """Ctrl-C reaches all processes, and the first alone answers it: it ends the others, with SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------------------------
# The index


class Index:
    """An open index file. A block is read when it is asked for, from the system's cache, which processes share.

    names [n_shard] bytes; sizes, mtimes, ends [n_shard] int64, where ends[s] is the number of samples up to and with
    shard s; reasons: name -> what is wrong with a shard; n_sample; n_byte of the file.
    """

    def __init__(self, file: BinaryIO):
        """Raises ValueError if this is no index, or a damaged one."""
        try:
            self.n_byte = file.seek(0, os.SEEK_END)
            file.seek(max(self.n_byte - 8, 0))
            n_offset_byte = self.n_byte - 8 - int.from_bytes(file.read(), "little")
            if n_offset_byte < 0:
                raise ValueError("it is cut")
            file.seek(n_offset_byte)
            table = json.loads(file.read()[:-8])
            self.names = np.array([os.fsencode(name) for name in table["names"]])
            self.sizes = np.array(table["sizes"], dtype=np.int64)
            self.mtimes = np.array(table["mtimes"], dtype=np.int64)
            counts = np.array(table["counts"], dtype=np.int64)
            self.ends = np.cumsum(counts)
            self.reasons = {str(name): str(reason) for name, reason in table["reasons"].items()}
            if not self.names.shape == self.sizes.shape == self.mtimes.shape == counts.shape:
                raise ValueError("its columns differ in length")
            if counts.min() < 0 or counts.max() > n_offset_byte or 4 * self.ends[-1] != n_offset_byte:
                raise ValueError("its numbers of samples do not add up to its length")
        except Exception as error:  # which one depends on where the file is damaged
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        self.n_sample = n_offset_byte // 4
        # Read with pread, which has no position that forked processes could move under one another. A memory map would
        # do as well, but each look-up maps the 64 kB around it: soon the process seems to use the whole file's size.
        self.fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.fd)

    def place(self, i: int) -> tuple[int, int]:
        """(shard, byte of its first header) of sample i."""
        block = np.frombuffer(os.pread(self.fd, 4, 4 * i), "<u4", 1)
        return self.shard(i)[0], int(block[0]) * BLOCK

    def shard(self, i: int) -> tuple[int, int]:
        """(shard, number in the shard) of sample i."""
        shard = int(np.searchsorted(self.ends, i, side="right"))  # "right": past shards without a sample
        return shard, i - self.start(shard)

    def start(self, shard: int) -> int:
        """The number of a shard's first sample."""
        return int(self.ends[shard - 1]) if shard else 0

    def count(self, shard: int) -> int:
        return int(self.ends[shard]) - self.start(shard)

    def offsets(self, shard: int) -> Offsets:
        return np.frombuffer(os.pread(self.fd, 4 * self.count(shard), 4 * self.start(shard)), "<u4")

    def describes(self, states: list[State]) -> bool:
        """Whether these are the shards of the index, and unchanged."""
        names, sizes, mtimes = zip(*states)
        return (
            np.array_equal(self.names, np.array([os.fsencode(name) for name in names]))
            and np.array_equal(self.sizes, sizes)
            and np.array_equal(self.mtimes, mtimes)
        )


def read_index(path: Path) -> Index | None:
    """None if there is no index, or a damaged one: that is said on stderr. Raises ValueError if it is not readable."""
    try:
        with open(path, "rb") as file:
            return Index(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"Cannot read the index {path}: {error.strerror}") from None
    except ValueError as error:
        print(f"warning: the index {path} is damaged ({error}); it is built anew", file=sys.stderr)
        return None


def write_index(path: Path, root: Path, states: list[State], old: Index | None, n_worker: int) -> Index:
    """Writes the index of these shards, scanning those that `old` does not know. Raises ValueError."""
    known = {}
    if old is not None:
        names = map(os.fsdecode, old.names.tolist())
        known = {state: shard for shard, state in enumerate(zip(names, old.sizes.tolist(), old.mtimes.tolist()))}
    new = [os.path.join(root, state[0]) for state in states if state not in known]
    table: dict = {"names": [], "sizes": [], "mtimes": [], "counts": [], "reasons": {}}
    # Written beside, under a name that no other process on any machine has, and then renamed.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "x+b") as file, closing(scan_all(new, n_worker)) as scans:
            progress = iter(tqdm(scans, "indexing", len(new), unit="shard", disable=None if new else True))
            for state in states:
                name, size, mtime = state
                if state in known:
                    offsets = old.offsets(known[state])
                    reason = old.reasons.get(name, "")
                else:
                    offsets, size, mtime, reason = next(progress)
                file.write(offsets.tobytes())
                table["names"].append(name)
                table["sizes"].append(size)
                table["mtimes"].append(mtime)
                table["counts"].append(len(offsets))
                if reason:
                    table["reasons"][name] = reason
            next(progress, None)  # closes the bar
            text = json.dumps(table).encode()
            file.write(text + len(text).to_bytes(8, "little"))
            file.flush()
            index = Index(file)
        os.replace(unfinished, path)
    except OSError as error:
        raise ValueError(
            f"Cannot write the index {path} ({error.strerror}): name a folder for it that can be written to (--index)"
        ) from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return index


# ----------------------------------------------------------------------------------------------------------------------
# Samples by number


class Shards:
    """The samples of tar shards, by number: the shards in the order of their names, each from its beginning.

    A shard is opened for each read and closed again, so forked processes may share this.
    """

    def __init__(self, pattern: str, index: str | Path | None = None, n_worker: int = 1):
        """Opens the index, and first scans, with n_worker processes, the shards that are not in it as they are now.

        pattern: such as "laion/*.tar", or one file. index: the folder that holds the index, by default `owlet-index`
        beside the shards. Raises FileNotFoundError if no shard matches, ValueError if none holds a sample or the index
        cannot be written.
        """
        if n_worker < 0:
            raise ValueError(f"{n_worker} processes cannot scan")
        pattern = os.fspath(pattern)
        self.root, states = find(pattern)
        folder = Path(index) if index else self.root / "owlet-index"
        # A folder's patterns have an index each. One beside its shards remains theirs when all move together.
        purpose = os.path.abspath(pattern) if index else str(Path(pattern).relative_to(self.root))
        path = folder / f"{hashlib.sha256(os.fsencode(purpose)).hexdigest()[:16]}.index"
        self.index = read_index(path)
        if self.index is None or not self.index.describes(states):
            self.index = write_index(path, self.root, states, self.index, n_worker)

        # One sentence for each shard that could not be read to its end: what came before is indexed, the rest is not.
        self.broken: list[str] = []
        for shard, name in enumerate(map(os.fsdecode, self.index.names.tolist())):
            if name in self.index.reasons:
                n_sample = self.index.count(shard)
                rest = f"only its first {n_sample:,} samples are used" if n_sample else "nothing of it is used"
                self.broken.append(f"{name}: {self.index.reasons[name]}; {rest}")
        if len(self) == 0:
            first = f"; {self.broken[0]}" if self.broken else ""
            raise ValueError(f"No shard that matches {pattern} holds a sample{first}")

    def __len__(self) -> int:
        return self.index.n_sample

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """A sample: extension (lower case, without the dot) -> content.

        Raises ValueError if its shard has changed or gone since the index was opened, or cannot be read there.
        """
        name = self.name(i)
        try:
            shard, start = self.index.place(i)
            path = os.path.join(self.root, os.fsdecode(self.index.names[shard]))
            status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) != (self.index.sizes[shard], self.index.mtimes[shard]):
                raise Broken("the shard has changed since it was indexed")
            with open(path, "rb") as file:
                return read_sample(file, start)
        except Broken as error:
            raise ValueError(f"{name}: {error}") from None
        except OSError as error:
            raise ValueError(f"{name}: the shard cannot be read ({error.strerror})") from None

    def name(self, i: int) -> str:
        """Such as "00017.tar, sample 123", counted from 0. Opens nothing."""
        if not 0 <= i < len(self):
            raise IndexError(f"there is no sample {i}: there are {len(self):,}")
        shard, number = self.index.shard(i)
        return f"{os.fsdecode(self.index.names[shard])}, sample {number}"


def find(pattern: str) -> tuple[Path, list[State]]:
    """The folder that a pattern begins with, and the shards below it, sorted by name. Raises FileNotFoundError."""
    path = Path(pattern)
    if path.is_file():
        return path.parent, [state_of(path.parent, path.name)]
    root = path
    while glob.escape(str(root)) != str(root):  # it has a wildcard
        root = root.parent
    names = sorted(glob.glob(str(path.relative_to(root)), root_dir=root)) if root != path else []
    states = [state for state in (state_of(root, name) for name in names) if state]
    if not states:
        raise FileNotFoundError(f"there is no shard {pattern} (a tar, or a pattern in quotes such as 'laion/*.tar')")
    return root, states


def state_of(root: Path, name: str) -> State | None:
    """None: a folder."""
    try:
        status = os.stat(os.path.join(root, name))
    except OSError:
        return name, -1, 0  # a link to nowhere: scanning it will say so
    return None if stat.S_ISDIR(status.st_mode) else (name, status.st_size, status.st_mtime_ns)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="a pattern, in quotes: 'laion/*.tar'")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="default: owlet-index, beside the shards")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's Ctrl-C
    start = time.perf_counter()
    try:
        shards = Shards(args.shards, args.index, args.workers)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no index was written", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - start
    print(
        f"{len(shards.index.names):,} shards, {len(shards):,} samples, "
        f"an index of {shards.index.n_byte / 1e9:.3f} GB, in {seconds:.1f} s"
    )
    for sentence in shards.broken:
        print(f"  {sentence}")
    if shards.broken:
        print(f"{len(shards.broken):,} of them cannot be used whole")
    return 1 if shards.broken else 0


if __name__ == "__main__":
    sys.exit(main())
