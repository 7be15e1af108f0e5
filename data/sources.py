"""Data sources: data files and tar shards, both read as rows.

A data file is a JSON list, or one JSON object per line (.jsonl). A row is a conversation in LLaVA's format or in
Owl1's, or a captioned image:

    {"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>What is this?"},
                                                         {"from": "gpt", "value": "A cat."}]}
    {"image": ["7.jpg"], "text": "The following is ...\\nHuman: <image>\\nHuman: What is this?\\nAI: A cat."}
    {"image": "7.jpg", "caption": ["A cat.", "A cat on a mat."]}

`image` (or `images`) is a path below the image folder, or a list of paths; a text-only row has none. `caption` is one
text, or a list that one is sampled from. OpenAI's format is converted to LLaVA's; a system message becomes the first
paragraph of the first question, and an image_url is a path or a data URL:

    {"images": ["7.jpg"], "messages": [{"role": "user", "content": "<image>What is this?"},
                                       {"role": "assistant", "content": "A cat."}]}

In tar shards (data/shards.py) an image is a member of the archive, with its text in the member .json, a row as above,
or else .txt, a caption.
"""

import base64
import glob
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.shards import Broken, Shards, is_pattern
from data.text import IMAGE_PLACEHOLDER, llava_turns
from common.files import read_bytes, reading

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of members of a tar
MAX_FILE = 64_000_000_000  # bytes of a data file, which is kept in memory
# Fields that suggest images or videos in a row without `image`.
UNREAD_FIELD = re.compile(r"(image|img|picture|photo|video|audio)s?(_?(path|file|url|name)s?)?", re.IGNORECASE)
BOM = b"\xef\xbb\xbf"
CAPTION_LENGTH = 40  # approximate number of tokens of a caption and its request


class Unusable(ValueError):
    """Why a row cannot be used. kind: one of a few, for counting."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


class JsonRows(Sequence):
    """The rows of a data file: its bytes, parsed when a row is read, so that forked processes share the memory.

    bounds: [n, 2] int64, start and end (exclusive) byte of each row. lines: [n], its line in a .jsonl, from 1.
    """

    def __init__(self, content: bytes, bounds: np.ndarray, lines: np.ndarray | None = None):
        self.content = content
        self.bounds = bounds
        self.lines = lines

    @classmethod
    def of_lines(cls, content: bytes) -> "JsonRows":
        bounds, lines = array("q"), array("q")
        start, line = len(BOM) if content.startswith(BOM) else 0, 1
        while start < len(content):
            end = content.find(b"\n", start)
            end = len(content) if end < 0 else end
            if content[start:end].strip():
                bounds.extend((start, end))
                lines.append(line)
            start, line = end + 1, line + 1
        return cls(content, np.array(bounds).reshape(-1, 2), np.array(lines))

    @classmethod
    def of_list(cls, content: bytes) -> "JsonRows":
        """Finds the elements of a JSON list. Raises ValueError."""
        # In Latin-1 a byte is a character, and quotes and brackets are those of UTF-8: positions are those of bytes.
        text = content.decode("latin-1")
        skip_spaces = re.compile(r"[ \t\n\r]*").match
        decoder = json.JSONDecoder()
        at = skip_spaces(text, len(BOM) if content.startswith(BOM) else 0).end()
        if text[at : at + 1] != "[":
            raise ValueError("it should be a list (or, with one object per line, be named .jsonl)")
        if text.startswith("]", skip_spaces(text, at + 1).end()):
            raise ValueError("it should be a list of at least one conversation")
        bounds = array("q")
        separator = ","
        while separator == ",":
            start = skip_spaces(text, at + 1).end()
            _, end = decoder.raw_decode(text, start)
            bounds.extend((start, end))
            at = skip_spaces(text, end).end()
            separator = text[at : at + 1]
        if separator != "]" or text[at + 1 :].strip():
            raise ValueError(f"it is not valid JSON at byte {at:,}")
        return cls(content, np.array(bounds).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> object:
        """Parses a row. Returns a string with the error if it is not valid JSON."""
        start, end = self.bounds[index].tolist()
        try:
            return json.loads(self.content[start:end].decode("utf-8"))
        except (ValueError, RecursionError) as error:
            name = "it" if self.lines is None else f"line {self.lines[index]}"
            return f"{name} is not valid JSON: {error}"


def read_rows(path: str | Path) -> JsonRows:
    """Reads a data file. A line of a .jsonl that is not valid JSON becomes a string that says why.

    Raises FileNotFoundError, or ValueError for a file that is no list of rows. The rows are not checked yet.
    """
    with reading(path):
        content = read_bytes(path, MAX_FILE)
        rows = (JsonRows.of_lines if Path(path).suffix == ".jsonl" else JsonRows.of_list)(content)
        if not rows:
            raise ValueError("it should be a list of at least one conversation")
    return rows


def standard_row(row: object) -> dict:
    """Converts a row to the fields `image`, a list, and `conversations`, `text` or `caption`. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, str) else "a row should be a JSON object")
    images = row.get("image") or row.get("images") or []
    images = [images] if isinstance(images, str) else images
    turns = row.get("messages") if row.get("conversations") is None else row["conversations"]
    if isinstance(turns, list) and any(isinstance(turn, dict) and "role" in turn for turn in turns):
        turns, found = openai_turns(turns)
        images = found or images
    if not isinstance(images, list) or not all(isinstance(image, str | bytes) for image in images):
        raise ValueError("image should be a path or a list of paths")
    if not images:
        for name, value in row.items():
            if value and isinstance(value, str | list | dict) and UNREAD_FIELD.fullmatch(name):
                raise Unusable("unread field", f"{name} is not read: a row names its images in `image`")
    return {**row, "image": images, "conversations": turns}


def openai_turns(messages: list) -> tuple[list[dict], list[str | bytes]]:
    """Converts OpenAI's messages to LLaVA's turns, and the images of their image_url. Raises ValueError."""
    turns: list[dict] = []
    images: list[str | bytes] = []
    system = ""
    for i, message in enumerate(messages):
        message = message if isinstance(message, dict) else {}
        role, parts = message.get("role"), message.get("content")
        text = ""
        for part in parts if isinstance(parts, list) else [{"type": "text", "text": parts}]:
            match part:
                case {"type": "text", "text": str(content)}:
                    text += content
                case {"type": "image_url", "image_url": {"url": str(url)}}:
                    text += "<image>"
                    images.append(base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else url)
                case _:
                    raise ValueError(f"message {i} has a part that is neither text nor image_url")
        if role == "system" and i == 0:
            system = text + "\n"
        else:
            turns.append({"from": {"user": "human", "assistant": "gpt"}.get(str(role), role), "value": text})
    if turns:
        turns[0]["value"] = system + turns[0]["value"]
    return turns, images


def merge_by_image(rows: Sequence) -> Iterator[object]:
    """Merges conversations about the same image into one, in the order of the file, as in Owl2's training.

    The first one keeps its id, its position and its image placeholder; the placeholders of the others are removed.
    Only rows in LLaVA's format with exactly one placeholder, in their first question, which also has text, are merged.
    All other rows, including malformed ones, stay as they are.
    """
    images = [mergeable_image(row) for row in rows]
    members: dict[str, list[int]] = {}  # image: its rows
    for index, image in enumerate(images):
        if image is not None:
            members.setdefault(image, []).append(index)
    for index, image in enumerate(images):
        if image is None or members[image] == [index]:
            yield rows[index]
        elif members[image][0] == index:
            merged = standard_row(rows[index])
            merged = {**merged, "image": image, "conversations": list(merged["conversations"])}
            for other in members[image][1:]:
                question, *others = standard_row(rows[other])["conversations"]
                # Without a regular expression, which would be quadratic in the length of a run of spaces.
                text = " ".join(part.strip() for part in IMAGE_PLACEHOLDER.split(question["value"])).strip()
                merged["conversations"] += [{**question, "value": text}, *others]
            yield merged


def mergeable_image(row: object) -> str | None:
    """The image of a row that merge_by_image may merge, else None."""
    try:
        row = standard_row(row)
        llava_turns(row["conversations"])
        turns = [turn["value"] for turn in row["conversations"]]  # with those that have no answer
        "".join(turns).encode()  # a lone surrogate would make the whole merged conversation unusable
    except ValueError:
        return None
    first, *others = (len(IMAGE_PLACEHOLDER.findall(turn)) for turn in turns)
    is_only_image = not IMAGE_PLACEHOLDER.sub("", turns[0]).strip()
    if row.get("text") is not None or len(row["image"]) != 1 or first != 1 or any(others) or is_only_image:
        return None
    return row["image"][0] if isinstance(row["image"][0], str) else None


class FileRows:
    """The rows of a data file; merge: after merge_by_image."""

    broken: list[str] = []  # as TarRows.broken: a file is read as a whole or not at all

    def __init__(self, path: str | Path, merge: bool):
        self.rows = read_rows(path)
        self.label = f"{path}, {'merged row' if merge else 'row'}"  # a merged row has another number than in the file
        if merge:
            with reading(path):
                self.rows = JsonRows.of_lines(b"\n".join(json.dumps(row).encode() for row in merge_by_image(self.rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return self.rows[index]

    def name(self, index: int) -> str:
        row = self.rows[index]
        row_id = f" (id {str(row['id'])[:80]})" if isinstance(row, dict) and "id" in row else ""
        return f"{self.label} {index}{row_id}"

    def fingerprint(self) -> str:
        """Identifies the content of the rows and their order, whatever the path of the file."""
        return f"{len(self)} {hashlib.sha256(self.rows.content).hexdigest()}"

    def approx_length(self, index: int, n_visual_tokens: int) -> int:
        """Estimates the tokens of a row, malformed or not: four characters per token, plus the visual tokens."""
        try:
            row = standard_row(self.rows[index])
        except ValueError:
            return 1
        turns, captions = row["conversations"], row.get("caption")
        texts = [row.get("text"), *(captions[:1] if isinstance(captions, list) else [captions])]
        if isinstance(turns, list):
            texts += [turn.get("value") for turn in turns if isinstance(turn, dict)]
        n_char = sum(len(text) for text in texts if isinstance(text, str))
        return n_char // 4 + len(row["image"]) * n_visual_tokens


class TarRows:
    """The samples of tar shards as rows; an image is the content of a file, as bytes, instead of a path.

    index: the folder of the shards' index. broken: one message for each shard that is not readable to its end.
    """

    def __init__(self, pattern: str | Path, index: str | Path | None, n_worker: int):
        self.shards = Shards(str(pattern), index, n_worker)
        self.broken = self.shards.broken

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict:
        try:
            members = self.shards[index]
        except (Broken, OSError) as error:
            raise Unusable("unreadable shard", str(error)) from None
        return row_of(members)

    def name(self, index: int) -> str:
        return str(self.shards.root / self.shards.name(index))

    def fingerprint(self) -> str:
        """Identifies the shards by their names and sizes, whatever their folder and modification times."""
        states = [(name, size) for name, size, _ in self.shards.index.states]
        return f"{len(self)} {hashlib.sha256(json.dumps(states).encode()).hexdigest()}"

    def approx_length(self, index: int, n_visual_tokens: int) -> int:
        return n_visual_tokens + CAPTION_LENGTH


def row_of(members: dict[str, bytes]) -> dict:
    """Converts a sample of a tar, {extension: content}, to a row whose image is a list of contents."""
    images = [content for extension, content in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) > 1:
        raise ValueError(f"it has {len(images)} images, and may have one")
    with reading("its .json"):
        row = json.loads(members.get("json", b"{}"))
        wants_image = row.get("image") or row.get("images")  # an AttributeError unless it is a JSON object
        row = {**row, "image": images, "images": None}
    texts = [name for name in ("text", "conversations", "messages", "caption") if row.get(name) is not None]
    if not texts and "txt" in members:
        with reading("its .txt"):
            row["caption"] = members["txt"].decode("utf-8-sig")
        texts = ["caption"]
    if not texts or (not images and (texts == ["caption"] or wants_image)):
        found = ", ".join(f".{extension}" for extension in members)
        raise ValueError(
            f"it contains only {found}: it needs an image ({', '.join(IMAGE_EXTENSIONS)}) and a caption (.txt) or "
            "a row (.json), next to each other in the tar (sorted by name, as tar --sort=name does)"
        )
    return row


def open_rows(path: str | Path, *, merge: bool, index: str | Path | None, n_worker: int) -> FileRows | TarRows:
    """Opens a data file, or tar shards: one .tar, a folder of them, or a pattern that is not the name of a file."""
    if os.path.isdir(path):
        path = os.path.join(glob.escape(str(path)), "*.tar")
    if is_pattern(str(path)) or str(path).endswith(".tar"):
        return TarRows(path, index, n_worker)
    return FileRows(path, merge)
