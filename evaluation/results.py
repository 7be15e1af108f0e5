"""The folder of a run, which can be killed at any time and continued by the same command.

    run.json              "settings": everything an answer depends on (weights, questions, flags); must stay the same
                          "starts": date, versions, devices and image sizes of each start; may differ
    run.lock              locked by the process that works in the folder
    answers-RANK.jsonl    appended as answers arrive: {"id", "prompt", "answer"} as asked; "before": ids of the earlier
                          turns in the prompt
    answers.jsonl         at the end, in order: {"id", "prompt", "answer", "truth", "group", "score"} per question
    results.json          at the end: the numbers, and the content of run.json

The last two are those of a benchmark. --data keeps such a folder, OUT.run, until its file OUT is written.
A run continues with every complete line of all ranks. The main process cuts off incomplete lines before any process
writes. Files that this module did not write are not changed, and links in the folder are refused.
"""

import errno
import hashlib
import json
import os
import platform
import stat
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None
    import msvcrt

import numpy
import PIL
import sentencepiece
import torch

from evaluation.benchmarks import MAX_FILE, get, in_row, read_field
from evaluation.metrics import Number
from evaluation.question import Question, Results
from common.files import read_bytes, reading, writing
from inference.adapter import FILES as ADAPTER_FILES
from inference.quantize import read_quantization
from training.distributed import Dist, all_gather_object
from weights import weight_files

SMALL_FILES = ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")  # hashed; of weights, the size


def describe_settings(args: Namespace, folder: Path, questions: list[Question], dist: Dist) -> dict:
    """Returns everything that an answer depends on.

    Images are identified by name only, so that a run can continue after a broken one is repaired. Weights are
    identified by their size; for --data, whose weights are often trained anew in the same folder, also by their date.
    """
    digest = hashlib.sha256()
    for question in questions:
        asked = [question.id, question.prompt, question.space, question.before, question.choices]
        digest.update(json.dumps(asked).encode())
        for source in question.images:
            digest.update(source if isinstance(source, bytes) else json.dumps(source).encode())
    weights = Path(args.weights)
    small = [weights / name for name in SMALL_FILES if (weights / name).is_file()]
    return {
        "task": args.task,
        "folder": str(folder.resolve()),
        "questions": len(questions),
        "questions' sha256": digest.hexdigest(),
        "weights": str(weights.resolve()),
        **{f"sha256 of {path.name}": hash_file(path) for path in small},
        **{f"bytes of {path.name}": path.stat().st_size for path in weight_files(weights)},
        **({} if args.task else {f"date of {path.name}": path.stat().st_mtime_ns for path in weight_files(weights)}),
        **({"adapter": adapter_hashes(Path(args.adapter))} if args.adapter else {}),
        "quantize": args.quantize or read_quantization(weights),
        "dtype": str(dist.dtype),
        "images": args.images,
        "seed": args.seed if args.images == "shuffled" else None,
        "fit": args.fit,
        "min_new_tokens": args.min_new_tokens,
        "max_new_tokens": args.max_new_tokens,
    }


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of an adapter, by name."""
    names = ("adapter_config.json", "non_lora_trainables.bin", *ADAPTER_FILES)
    return {name: hash_file(folder / name) for name in names if (folder / name).is_file()}


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_start(args: Namespace, folder: Path, questions: list[Question], dist: Dist) -> dict:
    """Returns what is recorded of each start and may differ between the starts of a run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "pillow": PIL.__version__}
    versions |= {"numpy": numpy.__version__, "sentencepiece": sentencepiece.__version__}
    paths = {source for question in questions for source in question.images if isinstance(source, str)}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions | {"python": platform.python_version(), "owlet": commit},
        "device": torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else dist.device.type,
        "processes": dist.world_size,
        "batch": args.batch,
        "image_files": len(paths),
        "image_bytes": sum((folder / path).stat().st_size for path in paths),
    }


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically. Characters that UTF-8 cannot encode, as in a strange file name, become "?"."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace")


@contextmanager
def open_run(
    out: Path, args: Namespace, folder: Path, questions: list[Question], dist: Dist
) -> Iterator[tuple[dict, dict[str, str], FileIO]]:
    """Starts or continues the run in the folder `out`. folder: what image paths are relative to.

    Yields the content of run.json, the answers so far by question id, and the file to which this process appends.
    Raises ValueError on all processes for a run with other settings, a locked run, or files that are no run.
    """
    outcome = None
    with ExitStack() as stack:
        if dist.is_main:
            try:
                record = {"settings": describe_settings(args, folder, questions, dist)}
                record["starts"] = [describe_start(args, folder, questions, dist)]
                stack.enter_context(lock_run(out))
                outcome = resume_run(out, record, {question.id for question in questions})
            except (ValueError, OSError) as error:
                outcome = error
        outcome = all_gather_object(dist, outcome)[0]
        if isinstance(outcome, Exception):
            raise outcome
        yield *outcome, stack.enter_context(open_own(out / f"answers-{dist.rank}.jsonl"))


def lock_run(out: Path) -> FileIO:
    """Creates a run's folder if necessary and locks it until the returned file is closed."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").is_file() and any(not path.name.startswith("run.") for path in out.iterdir()):
        raise ValueError(f"--out {out} holds files, but no run.json: choose another --out")
    for path in out.iterdir():
        if not (stat.S_ISREG(path.lstat().st_mode) or stat.S_ISDIR(path.lstat().st_mode)):
            raise ValueError(f"{path} is a link or a device, and would be written through: choose another --out")
    file = open_own(out / "run.lock")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # the first byte
    except (BlockingIOError, PermissionError):  # of flock, of msvcrt
        file.close()
        raise ValueError(f"{out} is locked by another run: wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    return file


def open_own(path: Path) -> FileIO:
    """Opens a file to append to it, and creates it if necessary; does not follow a link."""
    no_follow = getattr(os, "O_NOFOLLOW", 0)  # Windows does not have it
    return open(path, "ab", buffering=0, opener=lambda path, flags: os.open(path, flags | no_follow, 0o644))


def resume_run(out: Path, record: dict, ids: set[str]) -> tuple[dict, dict[str, str]]:
    """Writes run.json. Returns its content, with the earlier starts, and the answers so far by question id."""
    files = sorted(out.glob("answers-*.jsonl"))
    if (out / "run.json").is_file():
        before, now = read_field(out / "run.json", "settings", dict), record["settings"]
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        if changed and any(path.stat().st_size for path in files):
            listed = ", ".join(f"{name}: {before.get(name)!r:.70}, now {now.get(name)!r:.70}" for name in changed[:4])
            advice = "choose another --out, or delete that folder"
            raise ValueError(f"{out} holds a run with other settings ({listed}): {advice}")
        record["starts"] = read_field(out / "run.json", "starts") + record["starts"]

    answers, cut = {}, {}
    for path in files:
        with reading(path):
            content = read_bytes(path, MAX_FILE)
        end = content.rfind(b"\n") + 1
        if end < len(content):
            cut[path] = content[:end]
            if end == 0 and not is_start_of_answer(content, ids):
                raise ValueError(f"{path} has no answers of this run: delete it to continue")
        for i, line in enumerate(content.split(b"\n")[:-1]):
            with in_row(path, i):
                row = json.loads(line)
                if get(row, "id") not in ids:
                    raise ValueError("not an answer of this run: delete it to continue")
                answers[row["id"]] = get(row, "answer")
    for path, content in cut.items():
        with writing(path) as part:
            part.write_bytes(content)
    write_text(out / "run.json", json.dumps(record, indent=1) + "\n")
    return record, answers


def is_start_of_answer(content: bytes, ids: set[str]) -> bool:
    """Whether append_answer has begun to write this line; a file system that lost power may have zeros instead."""
    starts = (f'{{"id": {json.dumps(id)}, "prompt": '.encode() for id in ids)
    return not content.strip(b"\0") or any(content.startswith(start) or start.startswith(content) for start in starts)


def append_answer(file: FileIO, turns: list[Question], answer: str) -> None:
    """Saves the answer to the last of some turns. After a kill at most the last line is incomplete."""
    row = {"id": turns[-1].id, "prompt": turns[-1].prompt, "answer": answer}
    if len(turns) > 1:
        row["before"] = [turn.id for turn in turns[:-1]]
    line = json.dumps(row).encode() + b"\n"
    try:
        is_full = file.write(line) < len(line)
    except OSError as error:  # it does not name the file
        raise OSError(error.errno, error.strerror, file.name) from None
    if is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def remove_run(out: Path) -> None:
    """Removes the files of a run, and its folder unless there are others in it."""
    for path in [*out.glob("answers-*.jsonl"), out / "run.json", out / "run.lock"]:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        out.rmdir()


def write_results(out: Path, results: Results, numbers: dict[str, Number], record: dict) -> None:
    """Writes answers.jsonl and results.json of a finished run."""
    lines = []
    for question, answer, score in results:
        row = {"id": question.id, "prompt": question.prompt, "answer": answer, "truth": question.truth}
        lines.append(json.dumps(row | {"group": question.group, "score": score}) + "\n")
    write_text(out / "answers.jsonl", "".join(lines))
    content = {"task": record["settings"]["task"], "answers": len(results)}
    content |= {"numbers": {name: asdict(number) for name, number in numbers.items()}} | record
    write_text(out / "results.json", json.dumps(content, indent=1) + "\n")
