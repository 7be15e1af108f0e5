"""How this project reads files that it does not trust, and writes files that nobody may find half written.

Weights, adapters, images and data come from strangers, so each is opened through this module:

    with reading(path):             any error that the content causes becomes a ValueError of one line, naming the file
        content = read_bytes(path)  only a regular file of at most max_bytes: a pipe would block, a huge one fill
                                    the memory; a Git LFS pointer is named as such
    read_json(path)                 the same for a JSON object

    with writing(path) as part:     a new file beside the target, renamed to it at the end; links are not followed
        part.write_text(...)        so a full disk or a kill leaves the old file as it was

    printable(text)                 text from files on one line, without characters that a terminal would obey
    escape_controls(text)           the same for text of several lines, such as an answer
"""

import errno
import json
import os
import pickle
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_JSON = 64_000_000  # bytes; the index of a 7B model has 100,000
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def printable(text: object) -> str:
    """Joins the lines of a text and escapes control characters, so that a terminal does not obey them."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def escape_controls(text: object) -> str:
    """Escapes control characters except line breaks and tabs. Keeps the joiners that some scripts and emojis need."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], str(text))


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns any error that a file's content causes into a ValueError of one line that names the file.

    The system's own errors (FileNotFoundError, PermissionError, ...), which name the file already, pass unchanged.
    """
    try:
        yield
    except Exception as error:  # json, torch, safetensors, Pillow and sentencepiece each raise errors of their own
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        if is_out_of_memory(error):
            raise ValueError(f"{path} does not fit in memory") from None
        reason = str(error) if type(error) in (ValueError, AssertionError) else f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises loading it anyway
            reason = "it is damaged, or holds objects that could run code, which are never loaded"
        raise ValueError(f"{path} cannot be read: {printable(reason)[:500]}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch has run out of memory. On a CPU and MPS, torch has no class of its own for that."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    texts = ("DefaultCPUAllocator: ", "allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def check_file(path: str | Path, max_bytes: int | None = None) -> None:
    """Raises OSError or ValueError unless this is a regular file, not larger than max_bytes and no Git LFS pointer."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"it has {status.st_size:,} bytes, more than {max_bytes:,}")
    if status.st_size < 1024:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError("it is a Git LFS pointer instead of the file: run git lfs pull in its folder")


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """Returns the content of a file. Raises what check_file raises."""
    check_file(path, max_bytes)
    return Path(path).read_bytes()


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises OSError, or ValueError if the content is not one."""
    with reading(path):
        content = json.loads(read_bytes(path, MAX_JSON).decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields the path of a new, empty file beside `path`, and renames it to `path` at the end; removes it on an error.

    A link at `path` is replaced, not followed. Raises OSError that names `path`; for a full disk, one that says so,
    whatever error the writing library raised.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # as root, os.replace would replace /dev/null
        raise FileExistsError(errno.EEXIST, "it exists and is not a regular file", str(path))
    # At most 255 bytes, the limit of most file systems.
    part = path.with_name(f"{os.fsdecode(os.fsencode(path.name)[:200])}.{secrets.token_hex(4)}.part")
    try:
        # O_EXCL creates the file and never follows a link of that name.
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield part
        os.replace(part, path)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename in (None, str(part), part):  # a failed write has no name
                error.filename, error.filename2 = str(path), None
        elif is_full(path.parent) or os.strerror(errno.ENOSPC) in str(error):  # safetensors reserves all, or nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if type(error).__name__ == "SafetensorError" or "inline_container" in str(error):  # torch's; a disk quota
            raise OSError(f"{path} cannot be written: {error}") from error
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def is_full(folder: Path) -> bool:
    """Whether the disk of a folder has less than a megabyte left."""
    return shutil.disk_usage(folder).free < 1_000_000


def write_json(path: Path, content: dict) -> None:
    with writing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
