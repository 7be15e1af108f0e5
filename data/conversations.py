"""Conversations about images: from a file to batches of tensors.

A data file is a JSON list (or one object a line, .jsonl) in LLaVA's format or Owl1's:

    {"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>What is this?"},
                                                         {"from": "gpt", "value": "A cat."}]}
    {"image": ["7.jpg"], "text": "The following is ...\\nHuman: <image>\\nHuman: What is this?\\nAI: A cat."}

`image` is a path below the image folder, or a list of them; a text-only sample has none.

    row --render, expand--> ids, labels [T]          as long as whole turns fit
        --load, resize----> images [n, 3, S, S]
    rows --collate--------> Batch: ids, labels [B, T] padded on the right, images [N, 3, S, S]

A row that cannot be used is never replaced in silence: it comes out as a Skipped that says why.
"""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.image import augment, load_image, to_pixels
from data.text import Tokenizer, expand_images, render_conversation
from model import IGNORE, IMAGE_ID


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
    """What the model is trained on. It always has a row, if only one with nothing to learn from."""

    ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64
    images: Tensor | None  # [N, 3, S, S] float32
    n_supervised: int  # labels that the loss is summed over: those that foresee a token
    n_token: int  # positions that are not padding
    skipped: list[Skipped] = field(default_factory=list)


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
                except json.JSONDecodeError as error:
                    rows.append(f"line {i + 1} is not valid JSON: {error}")
        else:
            rows = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} should hold a list of conversations, and at least one")
    return rows


class Conversations(Dataset):
    """The samples of a data file, ready for a model.

    image_words: positions an image takes (n_query + 1). max_length: positions in all. fit: as in data/image.py.
    crop_scale: in training, random crops of at least that share of the area, and flips; 0: images as they are.
    An item is asked for by (seed, index), where the seed decides the crop alone.
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
    ):
        self.rows = read_rows(path)
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

    def __getitem__(self, key: tuple[int, int]) -> Sample | Skipped:
        seed, index = key
        row = self.rows[index]
        name = f"row {index}"
        if isinstance(row, dict) and "id" in row:
            name += f" (id {str(row['id'])[:80]})"
        try:
            return self._sample(row, seed)
        except Unusable as error:
            return Skipped(error.kind, f"{name}: {error}")

    def _sample(self, row: dict, seed: int) -> Sample:
        if not isinstance(row, dict):
            raise Unusable("malformed row", row if isinstance(row, str) else "a row should be a JSON object")
        conversation = row.get("text", row.get("conversations"))
        paths = row.get("image", [])
        paths = [paths] if isinstance(paths, str) else (paths or [])
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise Unusable("malformed row", "image should be a path or a list of paths")
        try:
            ids, labels = render_conversation(conversation, self.tokenizer, self.style)
        except ValueError as error:
            raise Unusable("malformed row", str(error)) from None
        if ids.count(IMAGE_ID) != len(paths):
            raise Unusable("malformed row", f"it marks {ids.count(IMAGE_ID)} images and has {len(paths)}")
        ids, labels, n_cut = self._fit_length(ids, labels)
        if n_supervised(labels) == 0:
            raise Unusable("nothing supervised", "it has no supervised token")
        n_image = ids.count(IMAGE_ID) // self.image_words
        return Sample(ids, labels, self._images(paths[:n_image], seed), n_cut)

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

    def _images(self, paths: list[str], seed: int) -> Tensor:
        pixels = []
        for i, path in enumerate(paths):
            if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
                raise Unusable("image outside its folder", f"{path} is not below the image folder")
            try:
                if not (self.image_root / path).is_file():
                    raise Unusable("missing image", f"there is no image {self.image_root / path}")
                image = load_image(self.image_root / path)
                if not self.crop_scale:
                    pixels.append(to_pixels(image, self.image_size, self.fit))
                else:
                    generator = torch.Generator().manual_seed(seed + i)
                    image = augment(image, generator, (self.crop_scale, 1.0))
                    pixels.append(to_pixels(image, self.image_size, "stretch"))
            except (ValueError, OSError) as error:
                raise Unusable("unreadable image", str(error)) from None
        return torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)


class Unusable(Exception):
    """Why a row cannot be used."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def n_supervised(labels: list[int]) -> int:
    """Supervised positions, but for the first, which nothing foresees."""
    return sum(label != IGNORE for label in labels[1:])


def collate(samples: list[Sample | Skipped]) -> Batch:
    """Pads samples on the right to one length. Where all were skipped, a row that teaches nothing is left."""
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    samples = [sample for sample in samples if isinstance(sample, Sample)]
    if not samples:
        return Batch(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORE), None, 0, 0, skipped)
    T = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), T, dtype=torch.int64)
    labels = torch.full((len(samples), T), IGNORE)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, : len(sample.ids)] = torch.tensor(sample.labels)
    images = torch.cat([sample.images for sample in samples])
    return Batch(
        ids,
        labels,
        images if len(images) else None,
        sum(n_supervised(sample.labels) for sample in samples),
        sum(len(sample.ids) for sample in samples),
        skipped,
    )


class Order:
    """Which samples make up which batch: a pure function of the seed and the position.

    The samples are shuffled anew for each epoch and stand one epoch after the other in an endless row. Step s
    takes the next `per_step` of them, whatever the number of processes; rank r takes its part of each, in
    micro-batches. So a run can begin anywhere, and on another number of processes sees the same samples.
    """

    def __init__(self, n: int, seed: int, per_step: int, micro: int, rank: int, world: int, steps: range):
        self.n = n
        self.seed = seed
        self.per_step = per_step
        self.micro = micro
        self.rank = rank
        self.world = world
        self.steps = steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields micro-batches of (seed of the sample's own chances, index)."""
        epoch = -1
        for step in self.steps:
            part = self.per_step // self.world
            first = step * self.per_step + self.rank * part
            for start in range(first, first + part, self.micro):
                keys = []
                for position in range(start, start + self.micro):
                    if position // self.n != epoch:
                        epoch = position // self.n
                        generator = torch.Generator().manual_seed(((self.seed << 20) + epoch) % 2**63)
                        order = torch.randperm(self.n, generator=generator).tolist()
                    # 64 apart, since an image adds its number in the sample to it
                    keys.append((((self.seed << 40) + position * 64) % 2**63, order[position % self.n]))
                yield keys


def loader(data: Conversations, order: Order | list, n_worker: int, pin: bool) -> Iterator[Batch]:
    """Batches in the given order, made ready by n_worker processes beside this one (0: by this one)."""
    return iter(
        DataLoader(
            data,
            batch_sampler=order,
            num_workers=n_worker,
            collate_fn=collate,
            pin_memory=pin,
            worker_init_fn=_ignore_signals,
        )
    )


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a run; the step under way still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
