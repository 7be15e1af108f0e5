"""Rows of questions about images, from a file and to a file that can be continued after a kill.

    rows.csv, .json, .jsonl --read_rows--> rows --RowReader.read, in threads--> prompts, pixels --+
                                                                                                  | answer_rows
    answers.csv, .jsonl <--AnswerFile.append: the row's own columns, the answer, error <----------+

A row has the columns

    image     a path, or several: a list in JSON, separated by ";" in CSV; relative to the file. Empty: no image
    video     the path of a video, whose frames share one placeholder
    prompt    the question; --prompt replaces it

and any others, which are copied. A row that cannot be asked is reported in its column "error"; the others are
answered.

The answers are in the order of the rows, so a run continues after the last complete one. OUT.run.json describes the
rows and the settings, which must stay the same.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import check_file, printable, read_bytes, read_json, reading, write_json
from data.image import load_image, to_pixels
from data.text import Tokenizer
from data.video import read_frames
from inference.batch import ask, choice_probabilities, encode_prompt, place_images, score_choices
from inference.fast_decode import FastDecoder
from model import Owl

MAX_FILE = 2_000_000_000  # bytes
N_READ_THREADS = 4
Row = dict[str, object]  # by column


# --- reading -----------------------------------------------------------------------------------------


def read_rows(path: Path, needs_prompt: bool = False) -> list[Row]:
    """Reads the rows of a CSV (.csv), JSON (.json) or JSON lines (.jsonl) file.

    Raises OSError, or ValueError if it is not such a file, no row has a column "image" or "video", or needs_prompt and
    no row has a column "prompt".
    """
    with reading(path):
        try:
            text = read_bytes(path, MAX_FILE).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8 text") from None
        rows = parse(text, path.suffix.lower())
        if not rows:
            raise ValueError("it has no rows")
        columns = column_names(rows)
        missing = None
        if not {"image", "video"} & set(columns):
            missing = '"image" or "video"'
        elif needs_prompt and "prompt" not in columns:
            missing = '"prompt" (or give --prompt)'
        if missing:
            raise ValueError(f"it needs a column {missing}; it has {', '.join(map(repr, columns))}")
        return rows


def column_names(rows: list[Row]) -> list[str]:
    """Returns the names of all columns, in the order in which they appear first."""
    return list(dict.fromkeys(name for row in rows for name in row))


def parse(text: str, suffix: str) -> list[Row]:
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
        if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
            raise ValueError("two columns have the same name")
        for i, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise ValueError(f"row {i} has a different number of columns from the first line")
        return rows
    if suffix == ".jsonl":
        rows = [parse_line(line, i) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    elif suffix == ".json":
        rows = json.loads(text)
    else:
        raise ValueError("the name must end in .csv, .json or .jsonl")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of objects, one for each row")
    return rows


def parse_line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} (character {error.colno})") from None


@dataclass
class RowReader:
    """Reads the images of rows. folder: what their paths are relative to."""

    model: Owl
    tokenizer: Tokenizer
    folder: Path
    fit: str  # as in data/image.py
    prompt: str | None = None  # instead of the rows' own
    fps: float = 1.0
    max_frames: int = 8
    choices: list[str] | None = None  # the answers to choose from; without them, answers are decoded greedily

    @cached_property
    def decoder(self) -> FastDecoder:
        return FastDecoder(self.model)

    @cached_property
    def n_reserved(self) -> int:
        """Tokens of an answer that must fit the context after the prompt. (The last token of a choice is no input.)"""
        return max((len(self.tokenizer.encode(choice)) - 1 for choice in self.choices or []), default=0)

    def read(self, row: Row) -> tuple[str, list[Tensor]]:
        """Returns the prompt, with a placeholder per image, and the pixels [3, S, S] of each image.

        Raises ValueError or OSError if the row cannot be asked.
        """
        prompt = row.get("prompt") if self.prompt is None else self.prompt
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("it has no prompt")
        size = self.model.config.image_size
        sources = [to_pixels(load_image(path), size, self.fit) for path in self.paths(row, "image")]
        for path in self.paths(row, "video"):
            frames = read_frames(path, self.fps, self.max_frames)
            sources.append(torch.stack([to_pixels(frame, size, self.fit) for frame in frames]))
        # Text that is not valid UTF-8 has lone surrogates, which cannot be tokenized.
        prompt, images = place_images(prompt.encode(errors="replace").decode(), sources)
        length, context = len(encode_prompt(prompt, self.model, self.tokenizer)), self.model.config.llama.context
        if length + self.n_reserved > context:
            raise ValueError(f"it has {length} tokens with its images, but the model's context is {context}")
        return prompt, images

    def paths(self, row: Row, column: str) -> list[Path]:
        """Returns the paths in a column, which may be missing or empty."""
        value = row.get(column) or []
        parts = value.split(";") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"the column {column!r} should have a path, or a list of paths")
        return [self.folder / part.strip() for part in parts if part.strip()]


def read_ahead(rows: list[Row], read: Callable[[Row], object], batch_size: int) -> Iterator[tuple[list[Row], list]]:
    """Yields (batch of rows, what read returned for each); threads read the next batch in the meantime.

    An OSError or ValueError that read raises takes the place of its result.
    """

    def outcome(row: Row) -> object:
        try:
            return read(row)
        except (ValueError, OSError) as error:
            return error

    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    futures: list[list[Future]] = []  # of the current batch and the next one
    with ThreadPoolExecutor(N_READ_THREADS) as pool, ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)  # after Ctrl-C, no more images are read
        for i, part in enumerate(parts):
            futures += [[pool.submit(outcome, row) for row in ahead] for ahead in parts[i + len(futures) : i + 2]]
            yield part, [future.result() for future in futures.pop(0)]


# --- answering ---------------------------------------------------------------------------------------


def answer_rows(
    reader: RowReader, rows: list[Row], file: "AnswerFile", *, batch_size: int, max_new_tokens: int
) -> int:
    """Appends the answers to all rows that the file does not have yet. Returns how many of these rows are broken."""
    n_broken = 0
    with tqdm(total=len(rows), initial=file.n_done, unit="row", disable=None) as bar:  # None: on a terminal only
        for batch, outcomes in read_ahead(rows[file.n_done :], reader.read, batch_size):
            usable = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
            answers = iter(answer_batch(reader, usable, max_new_tokens) if usable else [])
            for row, outcome in zip(batch, outcomes):
                is_broken = isinstance(outcome, Exception)
                n_broken += is_broken
                file.append(row, {"error": describe(outcome)} if is_broken else next(answers))
                bar.update()
    return n_broken


def answer_batch(reader: RowReader, inputs: list[tuple[str, list[Tensor]]], max_new_tokens: int) -> list[dict]:
    """Returns the values of answer_columns for each prompt with its images."""
    prompts, images = [prompt for prompt, _ in inputs], [image for _, own in inputs for image in own]
    model, tokenizer, choices = reader.model, reader.tokenizer, reader.choices
    if choices is None:
        texts = ask(reader.decoder, tokenizer, prompts, images, max_new_tokens=max_new_tokens)
        return [{"answer": text} for text in texts]
    answers = []
    for scores in score_choices(model, tokenizer, prompts, images, choices=[choices] * len(prompts)):
        p = [round(value, 6) for value in choice_probabilities(scores)]
        best = max(range(len(p)), key=lambda i: scores[i].log_p)
        answers.append(dict(zip(answer_columns(choices), [choices[best], *p])))
    return answers


def answer_columns(choices: list[str] | None) -> list[str]:
    """Returns the columns that an answer adds to a row: the answer, and the probability of each choice."""
    return ["answer", *(f"p({choice})" for choice in choices or [])]


def describe(error: Exception) -> str:
    """Returns an error as one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(error)


# --- writing -----------------------------------------------------------------------------------------


class AnswerFile:
    """A file of answers, one per row, appended as they are produced.

    with AnswerFile(out, rows, ["answer"], settings) as file:
        for row in rows[file.n_done :]:
            file.append(row, {"answer": ...})       or, for a broken row: file.append(row, {"error": ...})

    Raises OSError or ValueError, and changes nothing, if `out` exists and is not a file of these rows and settings.
    """

    def __init__(self, out: Path, rows: list[Row], columns: list[str], settings: dict):
        """columns: of the output, besides those of the rows and "error". settings: what the answers depend on."""
        if out.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"--out {out}: the name must end in .csv or .jsonl (a .json list cannot be appended to)")
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
        self.is_csv = out.suffix.lower() == ".csv"
        self.out, self.new_columns = out, [*columns, "error"]
        own = column_names(rows)
        if clash := sorted(set(own) & set(self.new_columns)):
            raise ValueError(f"the rows have a column {clash[0]!r} already, which --out adds: rename it")
        self.columns = own + self.new_columns
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        self.record = json.loads(json.dumps({"rows": len(rows), "rows' sha256": digest} | settings))  # as it is read
        self.side = out.with_name(out.name + ".run.json")

        ends = self.complete_lines() if os.path.lexists(out) else []
        self.n_done = max(0, len(ends) - self.is_csv)  # the first line of a CSV has the names of the columns
        if self.n_done > len(rows):
            raise ValueError(f"--out {out} has more rows than the input: choose another --out")
        write_json(self.side, self.record)
        self.file = open(out, "r+b" if ends else "wb", buffering=0)
        self.file.truncate(ends[-1] if ends else 0)  # without an incomplete last line
        self.file.seek(0, os.SEEK_END)
        if self.is_csv and not ends:
            self.write(self.csv_line(self.columns))

    def complete_lines(self) -> list[int]:
        """Returns where the complete lines of the file end; none if it has no answer yet, so that it starts anew.

        In a CSV, a line break between quotation marks is part of a value. Raises OSError or ValueError if it is not a
        file of these rows and settings.
        """
        with reading(self.out):
            content = read_bytes(self.out, MAX_FILE)
        if self.out.is_symlink() or (content and not self.side.is_file()):
            raise ValueError(f"--out {self.out} exists and is not a file of answers: choose another --out")
        ends, position, n_quotes = [], 0, 0
        for line in io.BytesIO(content):
            position += len(line)
            n_quotes += line.count(b'"')
            if line.endswith(b"\n") and (n_quotes % 2 == 0 or not self.is_csv):
                ends.append(position)
        if len(ends) <= self.is_csv:
            return []
        before = read_json(self.side)
        changed = [name for name in before | self.record if before.get(name) != self.record.get(name)]
        if changed or (self.is_csv and not content.startswith(self.csv_line(self.columns))):
            reason = ", ".join(changed) or "columns"
            raise ValueError(f"--out {self.out} has the answers of another run ({reason}): choose another --out")
        return ends

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, row: Row, answer: dict[str, object]) -> None:
        """Saves the answer to the next row. After a kill at most the last line is incomplete."""
        values = row | {name: answer.get(name) for name in self.new_columns}
        if self.is_csv:
            for name in ("image", "video"):
                if isinstance(values.get(name), list):
                    values[name] = ";".join(map(str, values[name]))  # as read_rows expects it
            cells = [values.get(name) for name in self.columns]
            self.write(self.csv_line([json.dumps(x) if isinstance(x, (list, dict, bool)) else x for x in cells]))
        else:
            self.write(json.dumps(values).encode() + b"\n")

    def csv_line(self, cells: list) -> bytes:
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\n").writerow(cells)  # None is an empty cell
        return line.getvalue().encode(errors="replace")

    def write(self, line: bytes) -> None:
        try:
            while line:  # a full disk can take a part
                line = line[self.file.write(line) :]
        except OSError as error:  # it does not name the file
            raise OSError(error.errno, error.strerror, str(self.out)) from None
