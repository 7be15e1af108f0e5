"""A run's folder: whose answers they are, and those that are there already.

    run.json              "settings": the weights, the questions, all that an answer depends on
                          "starts": of each start its date, versions, devices, images' bytes: these may differ
    run.lock              no two runs at a time: the one at work holds it
    answers-RANK.jsonl    what came when: {"id", "prompt", "answer"} as asked, and in "before" the earlier turns that
                          stood in the prompt

A run may be killed at any moment. What it goes on with is every line that ends with a line break, of all ranks; the
first process cuts off what else is there, before anybody writes.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

import numpy
import PIL
import sentencepiece
import torch

from parallel import Place, from_all
from tasks import Question
from weights import read_json, read_quantization, weight_map

SMALL_FILES = ("config.json", "tokenizer.model", "tokenizer_config.json")  # of a model, beside its weights


def settings_of(
    args: argparse.Namespace, questions: list[Question], dtype: torch.dtype, limits: tuple[int, int]
) -> dict[str, str | int | None]:
    """All that an answer depends on: a run goes on only with the same. limits: an answer's least and most tokens.

    Of images only the names, or a run could not go on once a broken one is mended.
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
        "folder": str(Path(args.folder).resolve()),
        "questions": len(questions),
        "questions' sha256": digest.hexdigest(),
        "weights": str(weights.resolve()),
        **{f"sha256 of {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in small},
        **{f"bytes of {path.name}": path.stat().st_size for path in weight_map(weights)},
        "quantize": args.quantize or read_quantization(weights),
        "dtype": str(dtype),
        "images": args.images,
        "seed": args.seed if args.images == "shuffled" else None,
        "fit": args.fit,
        "min_new_tokens": limits[0],
        "max_new_tokens": limits[1],
    }


def start_of(args: argparse.Namespace, questions: list[Question], place: Place) -> dict:
    """What is recorded of each start, and may differ from one to the next."""
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
        "device": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else place.device.type,
        "processes": place.world,
        "batch": args.batch,
        "image_files": len(paths),
        "image_bytes": sum((Path(args.folder) / path).stat().st_size for path in paths),
    }


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="replace")  # a file's name, on a page, may be no Unicode
    part.replace(path)


@contextmanager
def open_run(
    args: argparse.Namespace, questions: list[Question], dtype: torch.dtype, limits: tuple[int, int], place: Place
) -> Iterator[tuple[dict, dict[str, str], TextIO]]:
    """Begins the run's folder --out or goes on with it.

    Gives what run.json says now, the answers so far by id, and the file that this process adds its own to.
    ValueError, in one sentence and for all processes, for a run with other settings, one that is at work, or files that
    are no run's.
    """
    out, outcome = Path(args.out), None
    with ExitStack() as held:
        if place.is_first:
            try:
                record = {"settings": settings_of(args, questions, dtype, limits)}
                record["starts"] = [start_of(args, questions, place)]
                held.enter_context(lock(out))
                outcome = go_on(out, record, {question.id for question in questions})
            except (ValueError, OSError) as error:
                outcome = error
        outcome = from_all(place, outcome)[0]
        if isinstance(outcome, Exception):
            raise outcome
        yield *outcome, held.enter_context((out / f"answers-{place.rank}.jsonl").open("a", encoding="utf-8"))


def lock(out: Path) -> TextIO:
    """A run's folder, made if need be, for no other run until this file is closed. Raises as open_run does."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, and should be a folder")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").is_file() and any(not path.name.startswith("run.") for path in out.iterdir()):
        raise ValueError(f"--out {out} holds files, but no run.json that says whose: choose another --out")
    file = (out / "run.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"a run is at work in {out}: wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    return file


def go_on(out: Path, record: dict, ids: set[str]) -> tuple[dict, dict[str, str]]:
    """The record with the starts before this one, and the answers so far by id. Raises as open_run does."""
    known, ends, now = {}, {}, record["settings"]
    files = sorted(out.glob("answers-*.jsonl"))
    if (out / "run.json").is_file():
        found = read_json(out / "run.json")
        before = found.get("settings")
        if not isinstance(before, dict) or not isinstance(found.get("starts"), list):
            raise ValueError(f"{out / 'run.json'} is not of a run: choose another --out")
        other = [name for name in before | now if before.get(name) != now.get(name)]
        if other and any(path.stat().st_size for path in files):
            both = ", ".join(f"{name}: {before.get(name)!r:.70}, now {now.get(name)!r:.70}" for name in other[:4])
            raise ValueError(f"{out} holds a run with other settings ({both}): choose another --out")
        record["starts"] = found["starts"] + record["starts"]
    for path in files:
        content = path.read_bytes()
        ends[path] = content.rfind(b"\n") + 1
        for i, line in enumerate(content.split(b"\n")[:-1]):
            try:
                row = json.loads(line)
                known[row["id"]] = row["answer"]
                if row["id"] not in ids or not isinstance(row["answer"], str):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {i + 1} is not an answer of this run: delete it to go on") from None
    for path, end in ends.items():
        os.truncate(path, end)
    write(out / "run.json", json.dumps(record, indent=1) + "\n")
    return record, known
