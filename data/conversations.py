"""Conversations about images: from files to batches of tensors.

A source is a JSON list (or one object a line, .jsonl), in LLaVA's format, Owl1's, or of captions:

    {"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>What is this?"},
                                                         {"from": "gpt", "value": "A cat."}]}
    {"image": ["7.jpg"], "text": "The following is ...\\nHuman: <image>\\nHuman: What is this?\\nAI: A cat."}
    {"image": "7.jpg", "caption": ["A cat.", "A cat on a mat."]}      or one text; of several, chance picks one

`image` is a path below the image folder, or a list of them; a text-only sample has none. Or a source is tar shards
(data/shards.py): there a sample's image is a member of its own, and its words are in .json, a row like those above, or
else in .txt, a caption.

    row --render, expand--> ids, labels [T]          as long as whole turns fit
        --load, resize----> images [n, 3, S, S]
    rows --collate--------> Batch: ids, labels [1, T] the samples one after the other, images [N, 3, S, S]

A row that cannot be used is never replaced in silence: it comes out as a Skipped that says why.
"""

import json
import random
import re
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path, PurePath

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import CAPTION_REQUEST
from data.image import augment, load_image, to_pixels
from data.shards import Shards
from data.text import IMAGE_MARK, Tokenizer, expand_images, llava_turns, render_conversation
from model import IGNORE, IMAGE_ID

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of a tar's members
TAR_WORDS = 40  # about the positions of a request and a caption
MAX_REASON = 500  # characters


@dataclass
class Sample:
    """One conversation. ids, labels: lists of T ids; images: [n, 3, S, S] float32."""

    ids: list[int]
    labels: list[int]
    images: Tensor
    n_cut: int = 0  # turns that did not fit


@dataclass
class Skipped:
    """A row that cannot be used. kind: one of a few, for counting; reason: one sentence that names the row."""

    kind: str
    reason: str


@dataclass
class Batch:
    """What the model is trained on: the samples one after the other in one row, which the attention keeps apart.

    It always has a sample, if only one of a single position with nothing to learn from. The first label of each is
    IGNORE: no sample's last position is asked to foresee the first of the next.
    """

    ids: Tensor  # [1, T] int64
    labels: Tensor  # [1, T] int64
    starts: Tensor  # [n + 1] int32: where each sample begins, and T
    longest: int  # positions of the longest sample
    images: Tensor | None  # [N, 3, S, S] float32
    n_sample: int  # usable samples
    n_supervised: int  # labels that the loss is summed over
    n_token: int  # positions of usable samples: T, or 0 without any
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def n_image(self) -> int:
        return 0 if self.images is None else len(self.images)

    def pin_memory(self) -> "Batch":
        """For the DataLoader: in memory that a GPU can copy from while other work goes on."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("ids", "labels", "starts")}
        return replace(self, **pinned, images=None if self.images is None else self.images.pin_memory())


def read_rows(path: str | Path) -> list:
    """Reads a data file. Raises FileNotFoundError or ValueError in one sentence; rows are not looked at yet."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = []
            for i, line in enumerate(text.split("\n")):
                try:
                    if line.strip():
                        rows.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    rows.append(f"line {i + 1} is not valid JSON: {error}")
        else:
            rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} should hold a list of conversations, and at least one")
    return rows


def merge_by_image(rows: list) -> list:
    """Joins the conversations about one and the same image into one, in the file's order, as Owl2 trains on them.

    The first keeps its id, its place and its image marker; from the others' questions the marker goes. What is merged
    are rows in LLaVA's format with exactly one image, marked in their first question and not all of it. Any other
    row, and so any that is malformed, stays as it is.
    """
    merged = []
    first_with: dict[str, dict] = {}  # by image
    for row in rows:
        image = _only_image(row)
        if image is None:
            merged.append(row)
        elif image not in first_with:
            first_with[image] = {**row, "conversations": list(row["conversations"])}
            merged.append(first_with[image])
        else:
            question, *others = row["conversations"]
            text = re.sub(rf"\s*({IMAGE_MARK.pattern})\s*", " ", question["value"]).strip()
            first_with[image]["conversations"] += [{**question, "value": text}, *others]
    return merged


def _only_image(row: object) -> str | None:
    """The image that a row may be merged by; None if it may not."""
    if not isinstance(row, dict) or row.get("text") is not None:
        return None
    image = row.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    try:
        turns = llava_turns(row.get("conversations"))
        "".join(turns).encode()  # half a character would take the whole conversation with it
    except ValueError:
        return None
    n_mark = [len(IMAGE_MARK.findall(turn)) for turn in turns]
    if not isinstance(image, str) or n_mark[0] != 1 or sum(n_mark) != 1 or not IMAGE_MARK.sub("", turns[0]).strip():
        return None
    return image


def is_shards(path: str | Path) -> bool:
    """Whether a path means tar shards: one .tar, or a pattern of several (and not a file that is called so)."""
    is_pattern = any(sign in str(path) for sign in "*?[") and not Path(path).is_file()
    return str(path).endswith(".tar") or is_pattern


class FileRows:
    """The rows of a data file. merge: as merge_by_image does."""

    def __init__(self, path: str | Path, merge: bool):
        self.rows = read_rows(path)
        self.path = path
        self.broken: list[str] = []
        self.kind = "row"
        if merge:
            self.rows = merge_by_image(self.rows)
            self.kind = "merged row"  # no longer the number of a row in the file

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return self.rows[index]

    def name(self, index: int) -> str:
        row = self.rows[index]
        number = f" (id {str(row['id'])[:80]})" if isinstance(row, dict) and "id" in row else ""
        return f"{self.path}, {self.kind} {index}{number}"

    def size(self, index: int, image_words: int) -> int:
        """About the positions of a row, whatever is in it: a token is about four characters."""
        row = self.rows[index]
        if not isinstance(row, dict):
            return 1
        turns = row.get("conversations")
        captions = row.get("caption")
        texts = [row.get("text"), *(captions[:1] if isinstance(captions, list) else [captions])]
        if isinstance(turns, list):
            texts += [turn.get("value") for turn in turns if isinstance(turn, dict)]
        image = row.get("image")
        n_image = len(image) if isinstance(image, list) else isinstance(image, str)
        return sum(len(text) for text in texts if isinstance(text, str)) // 4 + n_image * image_words


class TarRows:
    """The samples of tar shards as rows whose image is not a path but the file's content. index: the index's folder."""

    def __init__(self, pattern: str | Path, index: str | Path | None, n_worker: int):
        self.shards = Shards(str(pattern), index, n_worker)
        self.broken = self.shards.broken

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict:
        try:
            members = self.shards[index]
        except ValueError as error:
            raise Unusable("unreadable shard", str(error).removeprefix(f"{self.shards.name(index)}: ")) from None
        return row_of(members)

    def name(self, index: int) -> str:
        return str(self.shards.root / self.shards.name(index))

    def size(self, index: int, image_words: int) -> int:
        return image_words + TAR_WORDS


def row_of(members: dict[str, bytes]) -> dict:
    """A tar's sample, {extension: content}, as a row whose image is a list of contents. Raises Unusable."""
    images = [content for suffix, content in members.items() if suffix in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise Unusable("malformed row", f"it has {len(images)} images, and should have one")
    row = {}
    try:
        if "json" in members:
            row = json.loads(members["json"])
        if not isinstance(row, dict):
            raise ValueError("it should be a JSON object")
    except (ValueError, RecursionError) as error:
        raise Unusable("malformed row", f"its .json cannot be used: {error}") from None
    if all(row.get(words) is None for words in ("text", "conversations", "caption")):
        if "txt" not in members:
            raise Unusable("malformed row", "it has neither a caption nor a conversation")
        try:
            row["caption"] = members["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Unusable("malformed row", f"its .txt is not UTF-8: {error}") from None
    return {**row, "image": images}


def caption_turns(captions: object, seed: int) -> list[dict]:
    """The conversation of a captioned image: the request, and one of the captions. ValueError for an unusable one."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("caption should be a text or a list of texts")
    captions = [" ".join(caption.split()) for caption in captions]
    if not all(captions):  # all of them, so that it is not chance whether a row can be used
        raise ValueError("a caption is empty")
    if any(IMAGE_MARK.search(caption) for caption in captions):
        raise ValueError("a caption holds the placeholder of an image")
    caption = random.Random(seed).choice(captions)
    return [{"from": "human", "value": "<image>" + CAPTION_REQUEST}, {"from": "gpt", "value": caption}]


class Conversations(Dataset):
    """The samples of a data file or of tar shards, ready for a model.

    image_words: positions an image takes (n_query + 1). max_length: positions in all. fit: as in data/image.py.
    image_root: what a file's image paths are relative to (default: the file's folder).
    crop_scale: in training, random crops of at least that share of the area, and flips; 0: images as they are.
    merge: whether a file's rows about one image are joined (merge_by_image); shards are read as they are.
    index, n_worker: the folder for the shards' index, and the processes that build it (Shards).
    An item is asked for by (seed, index), where the seed decides the crop and which of several captions it is.
    broken: a sentence for each shard that could not be read to its end.
    Raises FileNotFoundError or ValueError in one sentence for what is no source.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        style: str,
        image_words: int,
        image_size: int,
        max_length: int,
        fit: str,
        image_root: str | Path | None = None,
        crop_scale: float = 0.0,
        merge: bool = False,
        index: str | Path | None = None,
        n_worker: int = 1,
    ):
        self.path = path
        self.rows = TarRows(path, index, n_worker) if is_shards(path) else FileRows(path, merge)
        self.broken = self.rows.broken
        self.tokenizer = tokenizer
        self.style = style
        self.image_words = image_words
        self.image_size = image_size
        self.max_length = max_length
        self.fit = fit
        self.image_root = Path(image_root) if image_root else Path(path).parent
        self.crop_scale = crop_scale

    def __len__(self) -> int:
        return len(self.rows)

    def size(self, index: int) -> int:
        """About the positions of a sample, without tokenising or opening anything. It serves to balance batches."""
        return max(1, min(self.rows.size(index, self.image_words), self.max_length))

    def __getitem__(self, key: tuple[int, int]) -> Sample | Skipped:
        seed, index = key
        try:
            return self._sample(self.rows[index], seed)
        except Unusable as error:
            # Whatever the row holds, a line that can be printed: an "image" may be megabytes, or half a character.
            reason = " ".join(f"{self.rows.name(index)}: {error}".split())[:MAX_REASON]
            return Skipped(error.kind, reason.encode(errors="backslashreplace").decode())

    def _sample(self, row: object, seed: int) -> Sample:
        if not isinstance(row, dict):
            raise Unusable("malformed row", row if isinstance(row, str) else "a row should be a JSON object")
        images = row.get("image", [])
        images = [images] if isinstance(images, str) else (images or [])
        if not isinstance(images, list) or not all(isinstance(image, str | bytes) for image in images):
            raise Unusable("malformed row", "image should be a path or a list of paths")
        conversation = row.get("text")
        if conversation is None:
            conversation = row.get("conversations")
        try:
            if conversation is None and row.get("caption") is not None:
                conversation = caption_turns(row["caption"], seed)
                if not images:
                    raise ValueError("it has a caption and no image")
            ids, labels = render_conversation(conversation, self.tokenizer, self.style)
        except ValueError as error:
            raise Unusable("malformed row", str(error)) from None
        if ids.count(IMAGE_ID) != len(images):
            raise Unusable("malformed row", f"it marks {ids.count(IMAGE_ID)} images and has {len(images)}")
        ids, labels, n_cut = self._fit_length(ids, labels)
        if n_supervised(labels) == 0:
            raise Unusable("nothing supervised", "it has no supervised token")
        n_image = ids.count(IMAGE_ID) // self.image_words
        return Sample(ids, labels, self._images(images[:n_image], seed), n_cut)

    def _fit_length(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int], int]:
        """Expands the images; past max_length, leaves whole turns out from the end, each with its question."""
        end = self.tokenizer.eos_id
        n_cut = 0
        while True:
            long_ids, long_labels = expand_images(ids, labels, self.image_words)
            if len(long_ids) <= self.max_length:
                return long_ids, long_labels, n_cut
            # Each answer ends with a supervised </s>: cut after the last but one.
            ends = [i for i, label in enumerate(labels) if label == end]
            n_cut += 1
            if len(ends) < 2:
                raise Unusable(
                    "too long", f"its first turn alone is longer than {self.max_length} positions ({len(long_ids)})"
                )
            ids, labels = ids[: ends[-2] + 1], labels[: ends[-2] + 1]

    def _images(self, images: list[str | bytes], seed: int) -> Tensor:
        pixels = []
        for i, image in enumerate(images):
            if isinstance(image, str):
                image = self._path(image)
            try:
                image = load_image(image)
                if not self.crop_scale:
                    pixels.append(to_pixels(image, self.image_size, self.fit))
                else:
                    generator = torch.Generator().manual_seed(seed + i)
                    image = augment(image, generator, (self.crop_scale, 1.0))
                    pixels.append(to_pixels(image, self.image_size, "stretch"))
            except ValueError as error:
                raise Unusable("unreadable image", str(error)) from None
        return torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)

    def _path(self, path: str) -> Path:
        if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
            raise Unusable("image outside its folder", f"{path} is not below the image folder")
        try:
            if not (self.image_root / path).is_file():
                raise Unusable("missing image", f"there is no image {self.image_root / path}")
        except (ValueError, OSError) as error:
            raise Unusable("unreadable image", str(error)) from None
        return self.image_root / path


class Unusable(Exception):
    """Why a row cannot be used."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def n_supervised(labels: list[int]) -> int:
    """Supervised positions, but for the first, which nothing foresees."""
    return sum(label != IGNORE for label in labels[1:])


def collate(samples: list[Sample | Skipped]) -> Batch:
    """Packs samples into one row, without padding. Where all were skipped, a sample that teaches nothing is left."""
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    samples = [sample for sample in samples if isinstance(sample, Sample)]
    lengths = [len(sample.ids) for sample in samples] or [1]
    images = [sample.images for sample in samples if len(sample.images)]
    return Batch(
        ids=torch.tensor([[i for sample in samples for i in sample.ids] or [0]]),
        labels=torch.tensor([[i for sample in samples for i in [IGNORE, *sample.labels[1:]]] or [IGNORE]]),
        starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        longest=max(lengths),
        images=torch.cat(images) if images else None,
        n_sample=len(samples),
        n_supervised=sum(n_supervised(sample.labels) for sample in samples),
        n_token=sum(len(sample.ids) for sample in samples),
        skipped=skipped,
    )
