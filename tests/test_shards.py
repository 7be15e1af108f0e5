"""Tar shards: what a sample is, reading it back, damaged shards, the index, and the size of LAION."""

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from conftest import ROOT, write_tar
from data import shards as module
from data.shards import BLOCK, Broken, Index, Shards, expand_braces, read_members, read_sample, scan

Members = list[tuple[str, bytes]]


def pairs(first: int, n: int) -> Members:
    """Samples as img2dataset writes them, with contents of various lengths, whole blocks among them."""
    members = []
    for i in range(first, first + n):
        members.append((f"{i:09}.jpg", bytes([i % 256]) * (i * 128)))
        members.append((f"{i:09}.txt", f"caption {i}".encode()))
        members.append((f"{i:09}.json", json.dumps({"key": i}).encode()))
    return members


def sample(i: int) -> dict[str, bytes]:
    return {name.partition(".")[2]: content for name, content in pairs(i, 1)}


def header(kind: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    """A member of any type and any size field, with its content."""
    member = tarfile.TarInfo("x")
    member.type = kind
    member.size = len(content) if size is None else size
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards with 5, 1 and 4 samples; sample(i) is number i of all."""
    for name, first, n in (("0.tar", 0, 5), ("1.tar", 5, 1), ("2.tar", 6, 4)):
        write_tar(tmp_path / name, pairs(first, n))
    return tmp_path


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """The names of the shards that are scanned in this process."""
    names = []
    monkeypatch.setattr(module, "scan", lambda path: names.append(os.path.basename(path)) or scan(path))
    return names


def index_file(folder: Path) -> Path:
    (path,) = (folder / "owlet-index").iterdir()
    return path


def read_all(pattern: str | Path) -> list[dict[str, bytes]]:
    shards = Shards(str(pattern))
    assert shards.broken == []
    return list(shards)


# --- samples -----------------------------------------------------------------------------------------


def test_every_sample_is_read_as_it_was_written(folder):
    shards = Shards(f"{folder}/*.tar", n_worker=2)
    assert len(shards) == 10 and shards.broken == []
    order = random.Random(0).choices(range(10), k=30)
    assert [shards[np.int64(i)] for i in order] == [sample(i) for i in order]
    assert list(DataLoader(shards, sampler=order, batch_size=None, num_workers=2)) == [sample(i) for i in order]
    assert [shards.name(i) for i in (0, 4, 5)] == ["0.tar, sample 0", "0.tar, sample 4", "1.tar, sample 0"]
    for i in (-1, 10):
        with pytest.raises(IndexError):
            shards[i]


def test_one_file_and_shards_in_folders(folder):
    for name, first, n in (("a", 20, 5), ("b[1]", 50, 2)):
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", pairs(first, n))
    shards = Shards(f"{folder}/*/*.tar")
    assert [shards.name(i) for i in (0, 6)] == ["a/0.tar, sample 0", "b[1]/0.tar, sample 1"]
    assert shards[6] == sample(51)
    assert Shards(str(folder / "b[1]" / "0.tar"))[1] == sample(51)  # a file, although its name could be a pattern


def test_the_key_ends_at_the_first_dot_of_the_base_name(tmp_path):
    members = [("a.b/1.seg.PNG", b"1"), ("a.b/1.TXT", b"2"), ("a.c/1.txt", b"3"), ("1.jpg", b"4"), ("README", b"none")]
    members += [(".hidden.txt", b"none"), ("1.txt", b""), ("2.jpg", b"5"), ("1.jpg", b"6")]
    samples = [{"seg.png": b"1", "txt": b"2"}, {"txt": b"3"}, {"jpg": b"4", "txt": b""}, {"jpg": b"5"}, {"jpg": b"6"}]
    assert read_all(write_tar(tmp_path / "x.tar", members)) == samples


@pytest.mark.parametrize("format", (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
def test_members_are_found_from_the_middle_as_from_the_beginning(tmp_path, format):
    """In shards with long names, names in Unicode, a global header, links to long names, and other types."""
    rng = random.Random(format)
    types = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
    notes = {"comment": "x" * 1500, "path": "wrong.jpg"} if format == tarfile.PAX_FORMAT else {}
    path = tmp_path / "x.tar"
    expected = []
    with tarfile.open(path, "w", format=format, pax_headers=notes) as tar:
        for i in range(60):
            folders = "/".join("ordner-ü" * rng.randrange(1, 4) for _ in range(rng.randrange(4)))
            member = tarfile.TarInfo(f"{folders}/{i}{'0' * rng.randrange(60)}.jpg")
            member.type = rng.choice(types)
            member.linkname = "l" * rng.randrange(1, 100 if format == tarfile.USTAR_FORMAT else 300)
            member.mtime = rng.random() * 1e9  # pax writes an extended header for a fraction
            content = rng.randbytes(rng.choice((0, 1, 511, 512, 513, 5000))) if member.isreg() else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            if member.isreg():
                expected.append((member.name, content))
    with open(path, "rb") as file:
        found = list(read_members(file, 0))
        assert [(m.name, m.size) for m in found] == [(name, len(content)) for name, content in expected]
        for m in found:
            again = next(read_members(file, m.offset))
            assert (again.name, again.offset_data, again.size) == (m.name, m.offset_data, m.size)
    assert [content for s in read_all(path) for content in s.values()] == [content for _, content in expected]


def test_samples_that_are_not_read(tmp_path, monkeypatch):
    """Two members with one extension, and more bytes than the limit."""
    monkeypatch.setattr(module, "MAX_SAMPLE", 5000)
    members = [("1.jpg", b""), ("1.JPG", b""), ("2.jpg", bytes(4000)), ("3.jpg", bytes(4000)), ("3.txt", bytes(1000))]
    shards = Shards(str(write_tar(tmp_path / "x.tar", members)))
    assert shards[1] == {"jpg": bytes(4000)}
    for i in (0, 2):
        with pytest.raises(Broken):
            shards[i]


# --- damage ------------------------------------------------------------------------------------------


def test_a_shard_cut_anywhere_is_reported_and_gives_the_samples_before(tmp_path):
    path = write_tar(tmp_path / "x.tar", pairs(0, 4))
    whole = path.read_bytes()
    with open(path, "rb") as file:
        starts = [m.offset for m in read_members(file, 0) if m.name.endswith(".jpg")]
        end = file.tell() - BLOCK
    for n_byte in [*range(1, end, 197), *starts[1:], end]:
        path.write_bytes(whole[:n_byte])
        found = scan(str(path))
        assert found.size == n_byte and found.reason
        # The sample with the cut is not indexed; one that ends at the cut may lack members.
        n_whole = max(sum(start + BLOCK <= n_byte for start in starts) - 1, 0)
        assert (found.blocks * BLOCK).tolist() == starts[:n_whole]
        with open(path, "rb") as file:
            assert [read_sample(file, start) for start in starts[:n_whole]] == [sample(i) for i in range(n_whole)]
    path.write_bytes(whole[: end + BLOCK])  # one block of zeros is an end marker
    assert scan(str(path)).reason == ""
    path.write_bytes(whole[: starts[2] + BLOCK])
    write_tar(tmp_path / "y.tar", pairs(20, 1))
    shards = Shards(f"{tmp_path}/*.tar")
    assert len(shards) == 3 and shards[2] == sample(20)
    (message,) = shards.broken
    assert message.startswith("x.tar: ") and "cut" in message


def test_no_damaged_byte_of_a_header_goes_unnoticed(tmp_path):
    path = write_tar(tmp_path / "x.tar", pairs(0, 3))
    whole = path.read_bytes()
    with open(path, "rb") as file:
        content = {m.offset_data + i for m in read_members(file, 0) for i in range(-(-m.size // BLOCK) * BLOCK)}
        end = file.tell() - BLOCK
    rng = random.Random(0)
    for at in rng.choices(range(end + 2 * BLOCK), k=150):
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = scan(str(path))
        if at in content:
            assert found.reason == "" and len(found.blocks) == 3
        elif at % BLOCK not in range(148, 156):  # spaces and zeros around the digits of the checksum are equal
            assert found.reason, at


HOSTILE = {
    "a record without a length": header(b"x", b"0 path=1.jpg\n"),
    "back to itself": header(b"x", b"17 size=-1000000\n"),
    "a size beyond any file": header(b"x", b"30 size=9999999999999999999999\n"),
    "a sparse file": header(b"S"),
    "a sparse file in pax": header(b"x", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + header(b"0", b"zero\n"),
    "a name of 8 GiB": header(b"L", size=2**33 - 1),
    "a global header of 8 GiB": header(b"g", size=2**33 - 1),
    "a negative size": header(b"0", size=-BLOCK),
    "a negative size of an unknown type": header(b"Z", size=-BLOCK),
    "a negative size of a name": header(b"L", size=-BLOCK),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_reported(tmp_path, case):
    path = write_tar(tmp_path / "x.tar", pairs(0, 2))
    tail = path.read_bytes()
    with open(path, "rb") as file:
        assert len(list(read_members(file, 0))) == 6
        end = file.tell() - BLOCK
    path.write_bytes(tail[:end] + HOSTILE[case] + tail)
    found = scan(str(path))
    assert found.reason and len(found.blocks) == 1
    path.write_bytes(HOSTILE[case] * 5000 + tail)  # nor does a chain of them recurse too deep
    assert scan(str(path)).reason


def test_files_that_are_no_tar_are_reported(folder):
    tar = (folder / "0.tar").read_bytes()
    (folder / "3.tar").write_bytes(gzip.compress(tar))
    (folder / "4.tar").write_bytes(b"")
    (folder / "5.tar").write_bytes(random.Random(0).randbytes(5000))
    (folder / "6.tar").write_bytes(tar + tar)
    (folder / "7.tar").symlink_to("nowhere")
    os.mkfifo(folder / "8.tar")
    write_tar(folder / "9.tar", [])  # no sample, and nothing wrong
    (folder / "a.tar").mkdir()
    shards = Shards(f"{folder}/*.tar")
    assert len(shards) == 15 and shards[14] == sample(4)
    assert [message.split(": ")[0] for message in shards.broken] == [f"{i}.tar" for i in range(3, 9)]
    (folder / "3.tar").unlink()  # a new index keeps what the old one has
    again = Shards(f"{folder}/*.tar")
    assert again.broken == shards.broken[1:]
    assert len(again) == 15 and again[14] == sample(4)


def test_user_errors(folder):
    for pattern in (f"{folder}/*.gz", f"{folder}/x.tar", str(folder), f"{folder}/nowhere/*.tar", ""):
        with pytest.raises(FileNotFoundError):
            Shards(pattern)
    (folder / "x.tar.gz").write_bytes(gzip.compress((folder / "0.tar").read_bytes()))
    with pytest.raises(ValueError, match="x.tar.gz: .*uncompressed"):
        Shards(f"{folder}/*.tar.gz")
    with pytest.raises(ValueError, match="sample"):
        Shards(str(write_tar(folder / "empty.tar", [])))
    (folder / "link").symlink_to("nowhere/at/all")
    for index in (folder / "0.tar", folder / "link"):
        with pytest.raises(ValueError, match="--index"):
            Shards(f"{folder}/*.tar", index=index)


def test_a_shard_that_changes_later_is_noticed(folder):
    shards = Shards(f"{folder}/*.tar")
    write_tar(folder / "0.tar", pairs(0, 3))
    (folder / "1.tar").unlink()
    status = (folder / "2.tar").stat()
    (folder / "2.tar").write_bytes(bytes(status.st_size))
    os.utime(folder / "2.tar", ns=(status.st_mtime_ns, status.st_mtime_ns))
    for i, error in ((4, Broken), (5, FileNotFoundError), (6, Broken)):
        with pytest.raises(error):
            shards[i]


# --- the index ---------------------------------------------------------------------------------------


def test_only_shards_that_changed_are_scanned_again(folder, scanned):
    pattern = f"{folder}/*.tar"
    Shards(pattern)
    assert scanned == ["0.tar", "1.tar", "2.tar"]
    before = index_file(folder).stat().st_mtime_ns
    Shards(pattern)
    assert len(scanned) == 3
    assert index_file(folder).stat().st_mtime_ns == before

    os.utime(folder / "1.tar", ns=(1, 1))
    write_tar(folder / "15.tar", pairs(70, 2))
    (folder / "0.tar").unlink()
    assert list(Shards(pattern)) == [sample(i) for i in (5, 70, 71, 6, 7, 8, 9)]
    assert scanned[3:] == ["1.tar", "15.tar"]
    (folder / "2.tar").unlink()
    assert list(Shards(pattern)) == [sample(i) for i in (5, 70, 71)]
    assert len(scanned) == 5


def test_a_shard_that_could_not_be_opened_is_tried_again(folder, monkeypatch):
    def refuse(path, *arguments):
        if str(path).endswith("1.tar"):
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", refuse, raising=False)
        (message,) = Shards(f"{folder}/*.tar").broken
    assert message.startswith("1.tar: ") and "Permission denied" in message
    assert len(read_all(f"{folder}/*.tar")) == 10


def test_patterns_and_folders_have_an_index_each(folder, tmp_path):
    assert len(Shards(f"{folder}/*.tar")) == 10
    assert len(Shards(f"{folder}/[01].tar")) == 6
    assert len(list((folder / "owlet-index").iterdir())) == 2

    other, index = tmp_path / "other", tmp_path / "new" / "index"
    other.mkdir()
    write_tar(other / "0.tar", pairs(30, 2))
    assert len(Shards(f"{folder}/*.tar", index)) == 10
    assert Shards(f"{other}/*.tar", index)[1] == sample(31)
    assert len(list(index.iterdir())) == 2
    assert not (other / "owlet-index").exists()


def test_an_index_moves_with_its_shards(folder, scanned, monkeypatch):
    Shards(f"{folder}/*.tar")
    monkeypatch.chdir(shutil.copytree(folder, folder / "copy"))
    assert Shards("*.tar")[9] == sample(9)
    assert len(scanned) == 3


@pytest.mark.parametrize("how", "empty cut short deep list missing negative huge fewer none".split())
def test_a_damaged_index_is_built_again_with_a_warning(folder, capsys, how):
    Shards(f"{folder}/*.tar")
    good = index_file(folder).read_bytes()
    n_table = int.from_bytes(good[-8:], "little")
    offsets, table = good[: -8 - n_table], json.loads(good[-8 - n_table : -8])
    tables = {
        "list": [1],
        "missing": {"names": table["names"]},
        "negative": table | {"counts": [11, -5, 4]},
        "huge": table | {"counts": [2**70, 1, 4]},
        "fewer": table | {"names": table["names"][:2]},
        "none": dict.fromkeys(table, []),
    }
    text = b"[" * 10**5 if how == "deep" else json.dumps(tables.get(how)).encode()
    damaged = {"empty": b"", "cut": good[:-3], "short": good[4:]}
    index_file(folder).write_bytes(damaged.get(how, offsets + text + len(text).to_bytes(8, "little")))
    assert capsys.readouterr().err == ""
    assert list(Shards(f"{folder}/*.tar")) == [sample(i) for i in range(10)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert index_file(folder).read_bytes() == good


def test_wrong_offsets_in_an_index_are_noticed_when_read(folder):
    Shards(f"{folder}/*.tar")
    path = index_file(folder)
    path.write_bytes((2).to_bytes(4, "little") + b"\xff" * 4 + path.read_bytes()[8:])
    shards = Shards(f"{folder}/*.tar")
    assert shards[2] == sample(2)
    with pytest.raises(Broken):
        shards[1]


def test_a_build_that_fails_leaves_the_old_index(folder, monkeypatch):
    Shards(f"{folder}/*.tar")
    good = index_file(folder).read_bytes()
    write_tar(folder / "3.tar", pairs(10, 1))

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "scan", stop)
    with pytest.raises(KeyboardInterrupt):
        Shards(f"{folder}/*.tar")
    assert index_file(folder).read_bytes() == good  # and it is the only file


def test_processes_that_open_at_once_agree(folder):
    with Pool(4) as pool:
        assert pool.map(read_all, [f"{folder}/*.tar"] * 8, chunksize=1) == [[sample(i) for i in range(10)]] * 8
    assert index_file(folder)


def test_the_command_builds_and_reports(folder, monkeypatch, capsys):
    def run(*flags: object) -> int:
        monkeypatch.setattr(sys, "argv", ["data.shards", *map(str, flags)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        try:
            module.main()
        except SystemExit as end:
            return end.code
        return 0

    assert run(f"{folder}/*.tar", "--workers", 2, "--index", folder / "new") == 0
    assert "10 samples" in capsys.readouterr().out
    assert len(list((folder / "new").iterdir())) == 1 and not (folder / "owlet-index").exists()
    (folder / "1.tar").write_bytes(b"not a tar")
    assert run(f"{folder}/*.tar") == 1
    assert "\n  1.tar: " in capsys.readouterr().out
    for flags in ((f"{folder}/*.gz",), (f"{folder}/1.tar",), (f"{folder}/*.tar", "--index", folder / "0.tar"), ()):
        assert run(*flags) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("kill, number", ((os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)))
def test_a_signal_ends_a_build_and_its_processes(tmp_path, kill, number):
    """Ctrl-C goes to all processes, a scheduler's signal perhaps to the first alone."""
    (tmp_path / "0.tar").write_bytes(header(b"0") * 20_000 + bytes(2 * BLOCK))
    for i in range(1, 300):  # 6 million headers in a file of 10 MB
        os.link(tmp_path / "0.tar", tmp_path / f"{i}.tar")
    command = [sys.executable, "-m", "data.shards", f"{tmp_path}/*.tar", "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)
    while not list(tmp_path.glob("owlet-index/*.unfinished")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)  # the scan is running
    kill(process.pid, number)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 130
    assert list((tmp_path / "owlet-index").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def resident() -> int:
    """Bytes of memory in use by this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_400_million_samples_in_40000_shards_take_little_memory_and_time(tmp_path):
    """The index is a file with a hole, except for one real shard, number 31,415."""
    n_shard, per_shard, real = 40_000, 10_000, 31_415
    blocks = scan(str(write_tar(tmp_path / "x.tar", pairs(0, 8)))).blocks
    table = {
        "names": [f"{shard:05}.tar" for shard in range(n_shard)],
        "sizes": [3 * 10**8] * n_shard,
        "mtimes": [1_700_000_000_000_000_000 + shard for shard in range(n_shard)],
        "counts": [per_shard] * n_shard,
        "reasons": {},
    }
    text = json.dumps(table).encode()
    with open(tmp_path / "big.index", "wb") as file:
        file.seek(4 * real * per_shard)
        file.write(blocks.tobytes())
        file.seek(4 * n_shard * per_shard)
        file.write(text + len(text).to_bytes(8, "little"))
    before, start = resident(), time.perf_counter()
    index = Index(tmp_path / "big.index")
    assert time.perf_counter() - start < 3
    (tmp_path / "big.index").unlink()  # a copy of the folder could fill the hole; the index stays open
    assert index.n_sample == 400_000_000
    for i in random.Random(0).choices(range(real * per_shard), k=5000):
        assert index.locate(i) == (i // per_shard, i % per_shard, 0)
    assert resident() - before < 100e6
    with open(tmp_path / "x.tar", "rb") as file:
        for i in range(8):
            shard, _, at = index.locate(real * per_shard + i)
            assert shard == real
            assert read_sample(file, at) == sample(i)


def test_a_range_of_numbers(folder):
    assert list(Shards(f"{folder}/{{0..2}}.tar")) == list(Shards(f"{folder}/*.tar"))
    assert len(Shards(f"{folder}/{{1..2}}.t*")) == 5
    missing = Shards(f"{folder}/{{1..3}}.tar")
    assert len(missing) == 5 and missing.broken[0].startswith("3.tar: ")
    assert expand_braces("{08..10}/{1..2}") == ["08/1", "08/2", "09/1", "09/2", "10/1", "10/2"]
    for pattern in ("{2..1}.tar", "{0..99999999999999999999}.tar"):
        with pytest.raises(ValueError, match="range"):
            Shards(f"{folder}/{pattern}")


def test_names_that_are_not_text_are_printable(folder):
    name = os.fsdecode(b"\xff\x1b[31m.tar")
    (folder / name).write_bytes(b"no tar" * 500)
    shards = Shards(f"{folder}/*.tar")
    assert len(shards) == 10 and shards.broken[0].isprintable() and shards.broken[0].encode()
