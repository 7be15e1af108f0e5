"""Tar shards: what is a sample, that it is read as it was written, what happens to the index, and the size of LAION."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from conftest import ROOT
from data import shards as module
from data.shards import BLOCK, Index, Shards, members, read_sample, scan

SCRIPT = ROOT / "data" / "shards.py"

Members = list[tuple[str, bytes]]


def write_tar(path: Path, names: Members, format: int = tarfile.USTAR_FORMAT, **kwargs) -> Path:
    with tarfile.open(path, "w", format=format, **kwargs) as tar:
        for name, content in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(first: int, n: int) -> Members:
    """Samples as img2dataset writes them, their contents of various lengths, whole blocks among them."""
    found = []
    for i in range(first, first + n):
        found.append((f"{i:09}.jpg", bytes([i % 256]) * (i * 128)))
        found.append((f"{i:09}.txt", f"caption {i}".encode()))
        found.append((f"{i:09}.json", json.dumps({"key": i}).encode()))
    return found


def sample(i: int) -> dict[str, bytes]:
    return {name.partition(".")[2]: content for name, content in pairs(i, 1)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of 5, 1 and 4 samples, numbered on: sample(i) is number i of them all."""
    for name, first, n in (("0.tar", 0, 5), ("1.tar", 5, 1), ("2.tar", 6, 4)):
        write_tar(tmp_path / name, pairs(first, n))
    return tmp_path


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """The names of the shards that are scanned in this process."""
    names = []
    monkeypatch.setattr(module, "scan", lambda path: names.append(os.path.basename(path)) or scan(path))
    return names


def the_index(folder: Path) -> Path:
    (path,) = (folder / "owlet-index").iterdir()
    return path


def samples_of(path: Path) -> list[dict[str, bytes]]:
    shards = Shards(str(path))
    assert shards.broken == []
    return [shards[i] for i in range(len(shards))]


# ----------------------------------------------------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize("n_worker", (0, 1, 2))
def test_every_sample_is_read_as_it_was_written(folder, n_worker):
    shards = Shards(f"{folder}/*.tar", n_worker=n_worker)
    assert len(shards) == 10
    assert shards.broken == []
    for i in random.Random(0).sample(range(10), 10):
        assert shards[i] == sample(i)
    assert [shards.name(i) for i in (0, 4, 5)] == ["0.tar, sample 0", "0.tar, sample 4", "1.tar, sample 0"]
    for i in (-1, 10):
        with pytest.raises(IndexError):
            shards[i]
    assert shards[np.int64(7)] == sample(7)


def test_one_file_and_shards_in_folders(folder):
    assert len(Shards(str(folder / "2.tar"))) == 4
    for name, first, n in (("a", 20, 5), ("b[1]", 50, 2)):
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", pairs(first, n))
    shards = Shards(f"{folder}/*/*.tar")
    assert [shards.name(i) for i in (0, 6)] == ["a/0.tar, sample 0", "b[1]/0.tar, sample 1"]
    assert shards[6] == sample(51)
    assert Shards(str(folder / "b[1]" / "0.tar"))[1] == sample(51)  # a file's name, though it looks like a pattern


def test_the_key_ends_at_the_first_dot_of_the_base_name(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("a.b/1.seg.PNG", b"1"),
            ("a.b/1.TXT", b"2"),
            ("a.c/1.txt", b"3"),  # another folder, another sample
            ("1.jpg", b"4"),
            ("README", b"no sample"),
            (".hidden.txt", b"no sample"),
            ("1.txt", b""),
            ("2.jpg", b"5"),
            ("1.jpg", b"6"),  # its key has been there, but not next to it
        ],
    )
    assert samples_of(path) == [
        {"seg.png": b"1", "txt": b"2"},
        {"txt": b"3"},
        {"jpg": b"4", "txt": b""},
        {"jpg": b"5"},
        {"jpg": b"6"},
    ]


def test_what_is_not_a_regular_file_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i, kind in enumerate((tarfile.DIRTYPE, None, tarfile.SYMTYPE, None, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"1.{i}")
            member.size = 0 if kind else 3
            if kind:
                member.type = kind
                member.linkname = "/etc/" + "p" * 200
            tar.addfile(member, io.BytesIO(b"abc"))
    assert samples_of(tmp_path / "x.tar") == [{"1": b"abc", "3": b"abc"}]


@pytest.mark.parametrize("format", (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
def test_the_members_are_those_that_tarfile_finds(tmp_path, format):
    """Random shards with long names, names in Unicode, a global header, links to long names."""
    rng = random.Random(format)
    for round in range(20):
        path = tmp_path / f"{round}.tar"
        notes = {"comment": "x" * rng.randrange(2000)} if format == tarfile.PAX_FORMAT else {}
        with tarfile.open(path, "w", format=format, pax_headers=notes) as tar:
            for i in range(rng.randrange(1, 8)):
                folders = "/".join("ordner-ü" * rng.randrange(1, 4) for _ in range(rng.randrange(4)))
                member = tarfile.TarInfo(f"{folders}/{i}{'0' * rng.randrange(60)}.jpg")
                member.type = rng.choice((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE)) if i else tarfile.REGTYPE
                member.linkname = "l" * rng.randrange(1, 100 if format == tarfile.USTAR_FORMAT else 300)
                member.mtime = rng.random() * 1e9  # pax writes a header for a fraction
                data = rng.randbytes(rng.choice((0, 1, 511, 512, 513, 5000)))
                member.size = len(data) if member.isreg() else 0
                tar.addfile(member, io.BytesIO(data))
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size, tar.extractfile(m).read()) for m in tar if m.isreg()]
        with open(path, "rb") as file:
            found = list(members(file, 0))
            assert [(name.decode(), content, size) for _, name, content, size in found] == [e[:3] for e in expected]
            for first, name, *place in found:  # and each can be found from its own first header on
                assert list(members(file, first))[0] == (first, name, *place)
        assert [x for s in samples_of(path) for x in s.values()] == [data for *_, data in expected]


def test_sizes_beyond_8_gib_and_sparse_members(tmp_path):
    """A member of 9 GiB of zeros (in a file with a hole) in both notations; and members with holes are refused."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        member = tarfile.TarInfo("1.bin")
        member.size = 9 * 2**30
        small = write_tar(tmp_path / "small", [("2.txt", b"two")]).read_bytes()
        with open(path, "wb") as file:
            header = member.tobuf(format)
            file.write(header)
            file.seek(len(header) + member.size)
            file.write(small)
        shards = Shards(str(path))
        assert len(shards) == 2 and shards.broken == []
        assert shards[1] == {"txt": b"two"}
        with pytest.raises(ValueError, match=rf"{format}.tar, sample 0: it is longer than 268,435,456 bytes"):
            shards[0]
        path.unlink()  # who copies the folder might fill the hole
    write_tar(tmp_path / "s.tar", [("1.txt", b"1"), ("2.txt", b"2")])
    data = bytearray((tmp_path / "s.tar").read_bytes())
    data[2 * BLOCK + 156 : 2 * BLOCK + 157] = b"S"
    fix_checksum(data, 2 * BLOCK)
    (tmp_path / "s.tar").write_bytes(data)
    assert "sparse" in scan(str(tmp_path / "s.tar"))[3]


def test_two_members_of_one_extension_are_a_mistake(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("1.jpg", b""), ("1.JPG", b""), ("2.jpg", b"2")])
    shards = Shards(str(path))
    assert shards[1] == {"jpg": b"2"}
    with pytest.raises(ValueError, match="x.tar, sample 0: it has two members .jpg"):
        shards[0]


def test_forked_workers_read_the_same(folder):
    shards = Shards(f"{folder}/*.tar")
    order = [random.Random(0).randrange(10) for _ in range(60)]
    loader = DataLoader(shards, sampler=order, batch_size=None, num_workers=2)
    assert [found for found in loader] == [sample(i) for i in order]


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def fix_checksum(data: bytearray, at: int) -> None:
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def test_a_shard_cut_anywhere_is_named_and_gives_what_came_before(tmp_path):
    whole = write_tar(tmp_path / "whole", pairs(0, 4)).read_bytes()
    path = tmp_path / "x.tar"
    with open(tmp_path / "whole", "rb") as file:
        starts = [first for first, name, *_ in members(file, 0) if name.endswith(b".jpg")]
        mark = file.tell() - BLOCK
    for n_byte in [*range(1, mark, 97), *starts[1:], mark]:
        path.write_bytes(whole[:n_byte])
        offsets, size, _, reason = scan(str(path))
        assert size == n_byte
        assert reason.startswith("it is cut" if n_byte >= BLOCK else "it is not a tar")
        # The sample that the cut falls into is not indexed; one that ends where the shard does may lack members.
        n_whole = max(sum(start + BLOCK <= n_byte for start in starts) - 1, 0)
        assert (offsets * BLOCK).tolist() == starts[:n_whole]
        with open(path, "rb") as file:
            assert [read_sample(file, start) for start in starts[:n_whole]] == [sample(i) for i in range(n_whole)]
    path.write_bytes(whole[: mark + BLOCK])  # one block of zeros is a mark
    assert scan(str(path))[3] == ""
    path.write_bytes(whole[: starts[2] + BLOCK])
    write_tar(tmp_path / "y.tar", pairs(20, 1))
    shards = Shards(f"{tmp_path}/*.tar")
    assert len(shards) == 3 and shards[2] == sample(20)
    (sentence,) = shards.broken
    assert sentence.startswith("x.tar: it is cut, for at byte ")
    assert sentence.endswith(" there is neither a member nor an end mark; only its first 2 samples are used")


def test_no_damage_of_a_byte_goes_unnoticed_or_raises(tmp_path):
    """In a header every byte counts (its checksum); in contents, none does."""
    whole = write_tar(tmp_path / "x.tar", pairs(0, 3)).read_bytes()
    with open(tmp_path / "x.tar", "rb") as file:
        content = {i for *_, at, size in members(file, 0) for i in range(at, at + -(-size // BLOCK) * BLOCK)}
        mark = file.tell() - BLOCK
    rng = random.Random(0)
    for _ in range(300):
        at = rng.randrange(mark + 2 * BLOCK)
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        (tmp_path / "x.tar").write_bytes(data)
        offsets, _, _, reason = scan(str(tmp_path / "x.tar"))
        if at in content:
            assert reason == "" and len(offsets) == 3
        elif at % BLOCK not in range(148, 156):  # blanks and zeros around the checksum's digits mean the same
            assert reason, at


def extended(kind: bytes, text: bytes, size: int | None = None) -> bytes:
    """An extended header, whatever it says."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"%011o\0" % (len(text) if size is None else size)
    header[156:157] = kind
    fix_checksum(header, 0)
    return bytes(header) + text + bytes(-len(text) % BLOCK)


@pytest.mark.parametrize(
    "hostile",
    [
        extended(b"x", b"0 path=1.jpg\n"),  # a length that leads nowhere
        extended(b"x", b"-9 path=1.jpg\n"),
        extended(b"x", b"99 path=1.jpg\n"),
        extended(b"x", b"9" * 5000),
        extended(b"x", b"17 size=-1000000\n"),  # back to itself
        extended(b"x", b"13 size=zero\n"),
        extended(b"x", b"30 size=9999999999999999999999\n"),
        extended(b"x", b"22 GNU.sparse.major=1\n"),
        extended(b"L", b"", 2**33 - 1),  # a name of 8 GiB
        extended(b"g", b"", 2**33 - 1),
    ],
)
def test_hostile_headers_are_named(tmp_path, hostile):
    tail = write_tar(tmp_path / "tail", pairs(2, 1)).read_bytes()
    head = write_tar(tmp_path / "head", pairs(0, 2)).read_bytes().rstrip(b"\0")
    head += bytes(-len(head) % BLOCK)
    (tmp_path / "x.tar").write_bytes(head + hostile + tail)
    offsets, _, _, reason = scan(str(tmp_path / "x.tar"))
    assert reason
    assert len(offsets) == 1
    (tmp_path / "x.tar").write_bytes(hostile * 5000 + tail)  # nor does a chain of them lead into a recursion
    assert scan(str(tmp_path / "x.tar"))[3]


def test_negative_sizes_do_not_lead_back(tmp_path):
    data = bytearray(write_tar(tmp_path / "x.tar", pairs(0, 2)).read_bytes())
    data[124:136] = (-BLOCK).to_bytes(12, "big", signed=True)
    fix_checksum(data, 0)
    (tmp_path / "x.tar").write_bytes(data)
    assert scan(str(tmp_path / "x.tar"))[3] == "it is not a tar"


def test_shards_that_are_no_tar_are_named(folder):
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
    assert len(shards) == 15
    assert shards[14] == sample(4)
    reasons = dict(sentence.split(": ", 1) for sentence in shards.broken)
    for name, words in {
        "3.tar": "it is compressed, and random access needs a plain tar; nothing of it is used",
        "4.tar": "it is empty",
        "5.tar": "it is not a tar",
        "6.tar": "it goes on after its end mark (several tars in a row?); only its first 5 samples are used",
        "7.tar": "it cannot be read (No such file or directory)",
        "8.tar": "it is not a file",
    }.items():
        assert reasons.pop(name).startswith(words)
    assert not reasons
    assert Shards(f"{folder}/*.tar").broken == shards.broken
    (folder / "3.tar").unlink()  # a new index takes over what the old one knew
    again = Shards(f"{folder}/*.tar")
    assert again.broken == shards.broken[1:]
    assert len(again) == 15
    assert again[14] == sample(4)


def test_mistakes_are_a_sentence(folder):
    for pattern in (f"{folder}/*.gz", f"{folder}/x.tar", folder, f"{folder}/nowhere/*.tar", ""):
        with pytest.raises(FileNotFoundError, match="there is no shard"):
            Shards(pattern)
    (folder / "x.tar.gz").write_bytes(gzip.compress((folder / "0.tar").read_bytes()))
    with pytest.raises(ValueError, match="holds a sample; x.tar.gz: it is compressed"):
        Shards(f"{folder}/*.tar.gz")
    with pytest.raises(ValueError, match="holds a sample$"):
        Shards(str(write_tar(folder / "empty.tar", [])))
    with pytest.raises(ValueError, match="Cannot .* the index .*0.tar"):
        Shards(f"{folder}/*.tar", index=folder / "0.tar")
    (folder / "link").symlink_to("nowhere/at/all")
    with pytest.raises(ValueError, match="Cannot write the index .* name a folder for it that can be written to"):
        Shards(f"{folder}/*.tar", index=folder / "link")
    with pytest.raises(ValueError, match="-1 processes"):
        Shards(f"{folder}/*.tar", n_worker=-1)


def test_a_shard_that_changes_later_is_named(folder):
    shards = Shards(f"{folder}/*.tar")
    write_tar(folder / "0.tar", pairs(0, 3))
    (folder / "1.tar").unlink()
    status = (folder / "2.tar").stat()
    (folder / "2.tar").write_bytes(bytes(status.st_size))
    os.utime(folder / "2.tar", ns=(status.st_mtime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match="^0.tar, sample 4: the shard has changed since it was indexed$"):
        shards[4]
    with pytest.raises(ValueError, match="^1.tar, sample 0: the shard cannot be read .No such file or directory.$"):
        shards[5]
    with pytest.raises(ValueError, match="^2.tar, sample 0: no sample begins where the index has one$"):
        shards[6]


# ----------------------------------------------------------------------------------------------------------------------
# The index


def test_only_shards_that_changed_are_scanned_again(folder, scanned):
    pattern = f"{folder}/*.tar"
    Shards(pattern)
    assert scanned == ["0.tar", "1.tar", "2.tar"]
    before = the_index(folder).stat()
    Shards(pattern)
    assert len(scanned) == 3
    assert the_index(folder).stat().st_mtime_ns == before.st_mtime_ns

    scanned.clear()
    os.utime(folder / "1.tar", ns=(1, 1))
    write_tar(folder / "15.tar", pairs(70, 2))
    (folder / "0.tar").unlink()
    shards = Shards(pattern)
    assert scanned == ["1.tar", "15.tar"]
    assert [shards[i] for i in range(7)] == [sample(i) for i in (5, 70, 71, 6, 7, 8, 9)]

    scanned.clear()
    (folder / "2.tar").unlink()
    shards = Shards(pattern)
    assert scanned == []
    assert [shards[i] for i in range(3)] == [sample(i) for i in (5, 70, 71)]


def test_a_shard_that_could_not_be_opened_is_tried_again(folder, scanned, monkeypatch):
    def refuse(path, *arguments):
        if str(path).endswith("1.tar"):
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments)

    monkeypatch.setattr(module, "open", refuse, raising=False)
    (sentence,) = Shards(f"{folder}/*.tar").broken
    assert sentence == "1.tar: it cannot be read (Permission denied); nothing of it is used"
    monkeypatch.undo()
    shards = Shards(f"{folder}/*.tar")
    assert shards.broken == [] and len(shards) == 10


def test_patterns_and_folders_have_an_index_each(folder, tmp_path_factory):
    assert len(Shards(f"{folder}/*.tar")) == 10
    assert len(Shards(f"{folder}/[01].tar")) == 6
    assert len(list((folder / "owlet-index").iterdir())) == 2

    other, index = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("index") / "new"
    write_tar(other / "0.tar", pairs(30, 2))
    assert len(Shards(f"{folder}/*.tar", index)) == 10
    assert Shards(f"{other}/*.tar", index)[1] == sample(31)
    assert len(list(index.iterdir())) == 2
    assert not (other / "owlet-index").exists()


def test_an_index_moves_with_its_shards(folder, scanned, monkeypatch):
    (folder / "a").mkdir()
    for name in ("0.tar", "1.tar", "2.tar"):
        (folder / name).rename(folder / "a" / name)
    Shards(f"{folder}/a/*.tar")
    (folder / "a").rename(folder / "b")
    monkeypatch.chdir(folder / "b")
    assert Shards("*.tar")[9] == sample(9)
    assert len(scanned) == 3


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    n_table = int.from_bytes(data[-8:], "little")
    offsets, table = data[: -8 - n_table], json.loads(data[-8 - n_table : -8])
    files = {"empty": b"", "cut": data[:-3], "short": data[4:], "garbage": offsets + b"{" * n_table + data[-8:]}
    if how in files:
        path.write_bytes(files[how])
        return
    table = {
        "list": [1],
        "missing": {key: table[key] for key in table if key != "counts"},
        "negative": table | {"counts": [11, -5, 4]},
        "huge": table | {"counts": [2**70, 1, 4]},
        "strings": table | {"sizes": ["a", "b", "c"]},
        "fewer": table | {"names": table["names"][:2]},
        "none": table | {"names": [], "sizes": [], "mtimes": [], "counts": []},
        "deep": None,
    }[how]
    text = b"[" * 10**5 if how == "deep" else json.dumps(table).encode()
    path.write_bytes(offsets + text + len(text).to_bytes(8, "little"))


@pytest.mark.parametrize("how", "empty cut short garbage list missing negative huge strings fewer none deep".split())
def test_a_damaged_index_is_built_anew_with_a_warning(folder, capsys, how):
    Shards(f"{folder}/*.tar")
    good = the_index(folder).read_bytes()
    assert capsys.readouterr().err == ""
    spoil(the_index(folder), how)
    assert [found for found in Shards(f"{folder}/*.tar")] == [sample(i) for i in range(10)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the index ") and " is damaged (" in line
    assert the_index(folder).read_bytes() == good


def test_wrong_offsets_in_an_index_are_noticed_when_read(folder):
    """An index of the right length is believed; but what it points to has to be a header."""
    Shards(f"{folder}/*.tar")
    path = the_index(folder)
    data = bytearray(path.read_bytes())
    data[:4] = (2).to_bytes(4, "little")
    data[4:8] = b"\xff" * 4
    path.write_bytes(data)
    shards = Shards(f"{folder}/*.tar")
    assert shards[2] == sample(2)
    with pytest.raises(ValueError, match="0.tar, sample 1"):
        shards[1]


def test_a_build_that_fails_leaves_the_old_index(folder, monkeypatch):
    Shards(f"{folder}/*.tar")
    good = the_index(folder).read_bytes()
    write_tar(folder / "3.tar", pairs(10, 1))
    write_tar(folder / "4.tar", pairs(11, 1))

    def stop(path):
        if path.endswith("4.tar"):
            raise KeyboardInterrupt
        return scan(path)

    monkeypatch.setattr(module, "scan", stop)
    with pytest.raises(KeyboardInterrupt):
        Shards(f"{folder}/*.tar")
    assert the_index(folder).read_bytes() == good  # and it is the only file


def test_processes_that_open_at_once_agree(folder):
    code = f"from data.shards import Shards; s = Shards('{folder}/*.tar'); print(len(s), s[9]['txt'].decode())"
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for run in runs:
        assert run.communicate(timeout=60)[0] == "10 caption 9\n"
        assert run.returncode == 0
    assert the_index(folder)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_the_command_builds_and_reports(folder):
    process = run(f"{folder}/*.tar", "--workers", 2, "--index", folder / "new")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("3 shards, 10 samples, an index of 0.000 GB, in ")
    assert len(list((folder / "new").iterdir())) == 1
    assert not (folder / "owlet-index").exists()

    (folder / "1.tar").write_bytes(b"not a tar")
    process = run(f"{folder}/*.tar")
    assert process.returncode == 1
    assert "  1.tar: it is not a tar; nothing of it is used\n" in process.stdout
    assert process.stdout.endswith("1 of them cannot be used whole\n")

    for arguments in ((f"{folder}/*.gz",), (f"{folder}/1.tar",), (f"{folder}/*.tar", "--index", folder / "0.tar")):
        process = run(*arguments)
        assert process.returncode == 2
        assert process.stdout == ""
        (line,) = process.stderr.splitlines()
        assert line.startswith("error: ")


@pytest.mark.parametrize("kill, number", ((os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)))
def test_a_signal_ends_a_build_and_its_processes(tmp_path, kill, number):
    """Ctrl-C goes to all processes, a scheduler's signal perhaps to the first alone."""
    block = b"".join(extended(b"0", b"") for _ in range(20_000))
    (tmp_path / "0.tar").write_bytes(block + bytes(2 * BLOCK))
    for i in range(1, 300):  # some 6 million headers in 10 MB
        os.link(tmp_path / "0.tar", tmp_path / f"{i}.tar")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), f"{tmp_path}/*.tar", "--workers", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob("owlet-index/*.unfinished")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # the scan is under way
    kill(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "stopped; no index was written\n")
    assert list((tmp_path / "owlet-index").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The size of LAION


def resident() -> int:
    """Bytes of memory in use by this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_400_million_samples_in_40000_shards_take_little_memory_and_time(tmp_path):
    """The index is a file with a hole, but for one shard, which is real: number 31,415."""
    n_shard, per_shard, real = 40_000, 10_000, 31_415
    starts, *_ = scan(str(write_tar(tmp_path / "x.tar", pairs(0, 8))))
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
        file.write(starts.tobytes())
        file.seek(4 * n_shard * per_shard)
        file.write(text + len(text).to_bytes(8, "little"))
    states = list(zip(table["names"], table["sizes"], table["mtimes"]))
    del text

    before, start = resident(), time.perf_counter()
    with open(tmp_path / "big.index", "rb") as file:
        index = Index(file)
    assert index.describes(states)
    seconds = time.perf_counter() - start
    assert index.n_sample == 400_000_000
    assert seconds < 3
    opened = resident() - before

    rng = random.Random(0)
    for _ in range(10_000):
        i = rng.randrange(400_000_000)
        if i // per_shard != real:
            assert index.place(i) == (i // per_shard, 0)
    assert resident() - before < 100e6
    print(
        f"an index of {index.n_byte / 1e9:.2f} GB opened in {seconds:.2f} s, taking {opened / 1e6:.1f} MB; "
        f"10,000 look-ups took {(resident() - before - opened) / 1e6:.2f} MB more"
    )
    (tmp_path / "big.index").unlink()  # who copies the folder might fill the hole; the index stays open

    with open(tmp_path / "x.tar", "rb") as file:
        for number in range(8):
            shard, at = index.place(real * per_shard + number)
            assert shard == real
            assert read_sample(file, at) == sample(number)
