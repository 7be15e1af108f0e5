"""Questions from a file of conversations that training can read as well (--data), scored by exact matches.

Of each row the first question is asked, and the answer counts as right if it equals the row's first answer, ignoring
case, surrounding whitespace and a final full stop. Rows may also have these fields, which are counted separately:
"kind" (text), "seen" (whether training contained it), and "image_answer" and "text_answer" (how often the model gives
them, where image and text contradict each other).
"""

import json
import os
import stat
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.sources import read_rows, standard_row
from data.text import conversation_turns
from evaluation.benchmarks import check_image, in_row
from evaluation.metrics import percent
from evaluation.question import Question
from evaluation.scoring import is_exact_match
from common.files import printable
from inference.batch import count_placeholders

FIELDS = ("question", "truth", "images", "answer")  # of a line of --out, besides NOTES
MAX_LINE = 10_000_000  # bytes
NOTES = {"kind": str, "seen": bool, "image_answer": str, "text_answer": str}


@dataclass
class Case:
    """A row of the file. notes: those of NOTES that it has."""

    question: Question
    notes: dict[str, str | bool]


def read_cases(path: Path, image_root: Path) -> list[Case]:
    """Reads the first question of each row. Raises ValueError, naming the row, if one cannot be asked."""
    cases = []
    for i, row in enumerate(read_rows(path)):
        with in_row(path, i):
            row = standard_row(row)
            turns = conversation_turns(row["conversations"] if row.get("text") is None else row["text"])
            images, n_images = row["image"], [count_placeholders(turn) for turn in turns]
            if len(images) != sum(n_images):
                raise ValueError(f"image should list the {sum(n_images)} images of the conversation's placeholders")
            for image in images:
                if isinstance(image, str):
                    check_image(image_root, image, f"{path}, row {i}")
            notes = {name: row[name] for name in NOTES if row.get(name) is not None}
            for name, note in notes.items():
                if not isinstance(note, NOTES[name]):
                    raise ValueError(f"{name} should be {'true or false' if name == 'seen' else 'text'}")
            "".join([*turns, *map(str, notes.values())]).encode()  # raises ValueError for a lone surrogate
            cases.append(Case(Question(str(i), turns[0], images[: n_images[0]], turns[1]), notes))
    return cases


def count_table(cases: list[Case], answers: dict[str, str]) -> str:
    """Returns a table: how many answers are right, in all and for each value of the notes, with 95 % intervals."""
    sections = {name: defaultdict(list) for name in ("truth", "all", "kind", "seen", "given")}
    for case in cases:
        answer, truth = answers[case.question.id], case.question.truth
        is_right = is_exact_match(answer, truth)
        is_yes_or_no = is_exact_match(truth, "yes") or is_exact_match(truth, "no")
        sections["truth"]["yes or no" if is_yes_or_no else "other"].append(is_right)
        sections["all"]["all"].append(is_right)
        for name, note in case.notes.items():
            if name == "kind":
                sections["kind"][note].append(is_right)
            elif name == "seen":
                sections["seen"]["seen" if note else "unseen"].append(is_right)
            else:
                sections["given"][name].append(is_exact_match(answer, note))
    lines = [line for section in sections.values() for line in sorted(section.items())]
    width = max(10, *(len(printable(name)) for name, _ in lines))
    rows = []
    for name, counts in lines:
        n_right, n = sum(counts), len(counts)
        rows.append(f"{printable(name):<{width}} {n_right:>6} of {n:>6}  {percent(n_right, n)}")
    return "\n".join(rows)


def check_out(out: Path) -> None:
    """Raises OSError or ValueError if no file can be written there, or one exists that is not made of answer_lines."""
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: there is no such folder, or it cannot be written to")
    try:
        is_file = stat.S_ISREG(os.lstat(out).st_mode)
    except FileNotFoundError:
        return
    row = None
    if is_file:
        with out.open("rb") as file, suppress(ValueError, RecursionError):
            row = json.loads(file.readline(MAX_LINE))
    if not isinstance(row, dict) or not set(FIELDS) <= set(row) <= {*FIELDS, *NOTES}:
        raise ValueError(f"--out {out} exists and is not a file of answers: choose another --out")


def answer_lines(cases: list[Case], answers: dict[str, str]) -> str:
    """Returns a JSON line per question, in the file's order."""
    lines = []
    for case in cases:
        q = case.question
        images = [image if isinstance(image, str) else "part of the row" for image in q.images]
        row = {"question": q.prompt, "truth": q.truth, "images": images} | case.notes | {"answer": answers[q.id]}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)
