"""Data sources: data files and tar shards, both read as rows.

A data file is a JSON list, or one JSON object per line (.jsonl). A row is a conversation in LLaVA's format or in
Owl1's, or a captioned image:

    {"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>What is this?"},
                                                         {"from": "gpt", "value": "A cat."}]}
    {"image": ["7.jpg"], "text": "The following is ...\\nHuman: <image>\\nHuman: What is this?\\nAI: A cat."}
    {"image": "7.jpg", "caption": ["A cat.", "A cat on a mat."]}

`image` is a path below the image folder, or a list of paths; a text-only row has none. `caption` is one text, or a
list that one is sampled from. In tar shards (data/shards.py) an image is a member of the archive, with its text in
the member .json, a row as above, or else .txt, a caption.
"""

import json
import re
from pathlib import Path

from data.shards import Broken, Shards
from data.text import IMAGE_PLACEHOLDER, llava_turns
from weights import reading

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of members of a tar
CAPTION_LENGTH = 40  # approximate number of tokens of a caption and its request


class Unusable(ValueError):
    """Why a row cannot be used. kind: one of a few, for counting."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def read_rows(path: str | Path) -> list:
    """Reads a data file. A line of a .jsonl that is not valid JSON becomes a string that says why.

    Raises FileNotFoundError, or ValueError for a file that is no list of rows. The rows are not checked yet.
    """
    with reading(path):
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".jsonl":
            rows = [parse_line(line, i + 1) for i, line in enumerate(text.split("\n")) if line.strip()]
        else:
            rows = json.loads(text)
        if not isinstance(rows, list) or not rows:
            raise ValueError("it should be a list of at least one conversation")
    return rows


def parse_line(line: str, number: int) -> object:
    """Parses one line of a .jsonl. Returns a string with the error if it is not valid JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"line {number} is not valid JSON: {error}"


def merge_by_image(rows: list) -> list:
    """Merges conversations about the same image into one, in the order of the file, as in Owl2's training.

    The first one keeps its id, its position and its image placeholder; the placeholders of the others are removed.
    Only rows in LLaVA's format with exactly one placeholder, in their first question and not all of it, are merged.
    All other rows, including malformed ones, stay as they are.
    """
    merged = []
    first_with: dict[str, dict] = {}  # image: the row that the others are merged into
    for row in rows:
        image = mergeable_image(row)
        if image is None:
            merged.append(row)
        elif image not in first_with:
            first_with[image] = {**row, "conversations": list(row["conversations"])}
            merged.append(first_with[image])
        else:
            question, *others = row["conversations"]
            text = re.sub(rf"\s*({IMAGE_PLACEHOLDER.pattern})\s*", " ", question["value"]).strip()
            first_with[image]["conversations"] += [{**question, "value": text}, *others]
    return merged


def mergeable_image(row: object) -> str | None:
    """The image of a row that merge_by_image may merge, else None."""
    if not isinstance(row, dict) or row.get("text") is not None:
        return None
    image = row.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    try:
        turns = llava_turns(row.get("conversations"))
        "".join(turns).encode()  # a lone surrogate would make the whole merged conversation unusable
    except ValueError:
        return None
    first, *others = (len(IMAGE_PLACEHOLDER.findall(turn)) for turn in turns)
    is_only_image = not IMAGE_PLACEHOLDER.sub("", turns[0]).strip()
    return image if isinstance(image, str) and first == 1 and not any(others) and not is_only_image else None


class FileRows:
    """The rows of a data file; merge: after merge_by_image."""

    broken: list[str] = []  # as TarRows.broken: a file is read as a whole or not at all

    def __init__(self, path: str | Path, merge: bool):
        rows = read_rows(path)
        self.rows = merge_by_image(rows) if merge else rows
        self.label = f"{path}, {'merged row' if merge else 'row'}"  # a merged row has another number than in the file

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return self.rows[index]

    def name(self, index: int) -> str:
        row = self.rows[index]
        row_id = f" (id {str(row['id'])[:80]})" if isinstance(row, dict) and "id" in row else ""
        return f"{self.label} {index}{row_id}"

    def approx_length(self, index: int, n_visual_tokens: int) -> int:
        """Estimates the tokens of a row, malformed or not: four characters per token, plus the visual tokens."""
        row = self.rows[index]
        if not isinstance(row, dict):
            return 1
        turns, captions, image = row.get("conversations"), row.get("caption"), row.get("image")
        texts = [row.get("text"), *(captions[:1] if isinstance(captions, list) else [captions])]
        if isinstance(turns, list):
            texts += [turn.get("value") for turn in turns if isinstance(turn, dict)]
        n_image = len(image) if isinstance(image, list) else isinstance(image, str)
        return sum(len(text) for text in texts if isinstance(text, str)) // 4 + n_image * n_visual_tokens


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

    def approx_length(self, index: int, n_visual_tokens: int) -> int:
        return n_visual_tokens + CAPTION_LENGTH


def row_of(members: dict[str, bytes]) -> dict:
    """Converts a sample of a tar, {extension: content}, to a row whose image is a list of contents."""
    images = [content for extension, content in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) > 1:
        raise ValueError(f"it has {len(images)} images, and may have one")
    with reading("its .json"):
        row = json.loads(members.get("json", b"{}"))
        row = {**row, "image": images}  # a TypeError unless it is a JSON object
    if all(row.get(key) is None for key in ("text", "conversations", "caption")) and "txt" in members:
        with reading("its .txt"):
            row["caption"] = members["txt"].decode("utf-8-sig")
    return row


def open_rows(path: str | Path, *, merge: bool, index: str | Path | None, n_worker: int) -> FileRows | TarRows:
    """Opens a data file, or tar shards: one .tar, or a pattern that is not the name of a file."""
    is_pattern = any(sign in str(path) for sign in "*?[") and not Path(path).is_file()
    if is_pattern or str(path).endswith(".tar"):
        return TarRows(path, index, n_worker)
    return FileRows(path, merge)
