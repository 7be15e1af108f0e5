"""Reading files that are not trusted, and writing files that nobody finds half written."""

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import files
from command import user_errors
from conftest import ROOT
from common.files import check_file, escape_controls, is_out_of_memory, printable, read_bytes, read_json, reading, writing

needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")


@needs_posix
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(ValueError, match="regular"):
            check_file(path)
    with pytest.raises(IsADirectoryError):
        check_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "none")


def test_large_files_and_lfs_pointers_are_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4"):
        read_bytes(path, 4)
    path.write_bytes(files.LFS_POINTER + b"v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        check_file(path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 200_000, b'{"a": 1' + b"0" * 5000 + b"}"])
def test_json_that_cannot_be_read_is_one_line_with_the_name(tmp_path, content):
    path = tmp_path / "a\nb.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert "b.json" in str(caught.value) and "\n" not in printable(caught.value)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # with a byte order mark
    assert read_json(path) == {"a": 1}


def test_errors_of_the_system_and_of_memory_keep_their_meaning(tmp_path):
    with pytest.raises(PermissionError) as caught, reading(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(ValueError, match="memory"), reading(tmp_path):
        torch.empty(2**60)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / ("ü" * 125)  # 250 bytes: a suffix would make the name too long
    path.write_text("old")

    def write(error: Exception) -> None:
        with writing(path) as part:
            part.write_text("new")
            raise error

    with pytest.raises(OSError) as caught:
        write(OSError(errno.ENOSPC, "full"))  # as write(2) reports it: without a name
    assert caught.value.filename == str(path)
    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    with pytest.raises(RuntimeError):
        write(RuntimeError("a library's words"))
    monkeypatch.setattr(files, "is_full", lambda folder: True)
    with pytest.raises(OSError) as caught:
        write(RuntimeError("a library's words"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]

    with writing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == [path.name]
    with pytest.raises(FileNotFoundError) as caught, writing(tmp_path / "none" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "file")


@needs_posix
def test_writing_follows_no_links_and_replaces_no_devices(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    with writing(link) as part:
        part.write_text("new")
    assert target.read_text() == "old" and link.read_text() == "new" and not link.is_symlink()

    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(FileExistsError), writing(path):
            pass
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_controls_are_escaped():
    every = "".join(map(chr, range(0x2100))) + "\ud800\U0001f989"
    assert printable(every).isprintable() and "\U0001f989" in printable(every)
    assert printable("a\n\x1b[2J\x9b\u202e\udcff b") == r"a \x1b[2J\x9b\u202e\udcff b"
    assert not re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", escape_controls(every))
    assert escape_controls("a\tb\nc\r\u200d") == "a\tb\nc\\r\u200d"


# --- command.py, with each kind of error a program of its own ----------------------------------------


def run_main(body: str, **options: object) -> subprocess.CompletedProcess:
    """Runs `def main(): body` under command.run."""
    body = "\n    ".join(body.splitlines())
    program = f"import os, signal, sys\nfrom command import run, user_errors, log\ndef main():\n    {body}\nrun(main)"
    options = {"capture_output": True, "text": True, "timeout": 60, "cwd": ROOT} | options
    return subprocess.run([sys.executable, "-c", program], **options)


@pytest.mark.parametrize(
    "body, code, lines",
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, 0),
        ("raise OSError(28, 'No space left on device', 'x')", 2, 1),
        ("with user_errors():\n    raise OSError(28, 'No space left on device')", 2, 1),
        ("log('a\\x1b[2J \\udcff')", 0, 1),
        ("print('a \\udcff')", 0, 0),
        ("1 / 0", 1, 10),
    ],
)
def test_how_a_command_ends(body, code, lines):
    result = run_main(body)
    assert result.returncode == code, result.stderr
    assert "\x1b" not in result.stderr
    n_line = result.stderr.count("\n")
    assert n_line == lines or n_line > 5 < lines  # a bug keeps its traceback


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("body", ["print(1)", "print(1, flush=True)", "with user_errors():\n    print(1, flush=True)"])
def test_a_full_disk_under_standard_output(body):
    with open("/dev/full", "w") as full:
        result = run_main(body, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_while_a_module_is_imported():
    program = "import command, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.returncode, result.stderr) == (130, "")


def test_long_names_are_user_errors(capsys):
    with pytest.raises(SystemExit), user_errors():
        read_json(Path("a" * 5000))
    assert capsys.readouterr().err.count("\n") == 1
