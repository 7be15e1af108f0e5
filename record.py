"""A run's folder: whose answers they are, and those that are there already.

    run.json              "settings": the weights, the questions, all that an answer depends on
                          "starts": of each start its date, versions and devices, which may differ
    answers-RANK.jsonl    a line for each answer, as it comes

A run may be killed at any moment. What it goes on with is every line that ends with a line break, of all ranks.
"""

import argparse
import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

import torch

from parallel import Place, wait_for_all
from tasks import Question
from weights import read_config, read_json, read_quantization, weight_map


def settings_of(
    args: argparse.Namespace, questions: list[Question], dtype: torch.dtype, fit: str, lengths: tuple[int, int]
) -> dict:
    """All that an answer depends on: a run goes on only with the same. lengths: an answer's least and most tokens."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.prompt, question.before, question.choices]).encode())
        for source in question.images:
            digest.update(source if isinstance(source, bytes) else json.dumps(source).encode())
    weights = Path(args.weights)
    stats = {path.name: path.stat() for path in weight_map(weights)}
    return {
        "task": args.task,
        "folder": str(Path(args.folder).resolve()),
        "questions": {"number": len(questions), "sha256": digest.hexdigest()},
        "weights": str(weights.resolve()),
        "weight_files": {name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()},
        "config": asdict(read_config(weights)),
        "quantize": args.quantize or read_quantization(weights),
        "dtype": str(dtype),
        "images": args.images,
        "fit": fit,
        "min_new_tokens": lengths[0],
        "max_new_tokens": lengths[1],
        "seed": args.seed,
    }


def start_of(args: argparse.Namespace, place: Place) -> dict:
    """What is recorded of each start, and may differ from one to the next."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "owlet": commit},
        "device": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else place.device.type,
        "processes": place.world,
        "batch": args.batch,
    }


def write_json(path: Path, content: dict) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def open_run(out: Path, record: dict, ids: set[str], place: Place) -> tuple[dict, dict[str, str]]:
    """Begins a run's folder or goes on with it: what run.json says now, and the answers so far by id.

    record: of this start, as run.json has it.

    ValueError, in one sentence, for a run with other settings or files that are no run's.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, and should be a folder")
    record = json.loads(json.dumps(record))
    files = sorted(out.glob("answers-*.jsonl"))
    if (out / "run.json").is_file():
        found = read_json(out / "run.json")
        before = found.get("settings")
        if not isinstance(before, dict) or not isinstance(found.get("starts"), list):
            raise ValueError(f"{out / 'run.json'} is not of a run: choose another --out")
        other = [name for name, setting in record["settings"].items() if before.get(name) != setting]
        if other:
            raise ValueError(f"{out} holds a run with other settings ({', '.join(other)}): choose another --out")
        record["starts"] = found["starts"] + record["starts"]
    elif files:
        raise ValueError(f"{out} holds answers, but no run.json that says whose: choose another --out")
    known = {}
    for path in files:
        for i, line in enumerate(path.read_bytes().split(b"\n")[:-1]):  # what has no line break is half a line
            try:
                row = json.loads(line)
                known[row["id"]] = row["answer"]
                if row["id"] not in ids or not isinstance(row["answer"], str):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {i + 1} is not an answer of this run: choose another --out") from None
    wait_for_all(place)  # nobody writes before all have read
    if place.is_first:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", record)
    wait_for_all(place)
    return record, known


def open_answers(path: Path) -> TextIO:
    """The file to append to, less a last line that was not written to its end."""
    if path.is_file():
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")
