"""Conversations about images: from rows to batches of tensors.

    row (data/sources.py) --parse_row, render--> ids, labels [T]          whole turns, as many as fit max_length
                          --load, resize-------> images [n, 3, S, S]
    samples --collate--> Batch: ids, labels [1, T], cu_seqlens [n + 1], images [N, 3, S, S]

Packing: collate concatenates the samples of a micro-batch into one row, without padding; cu_seqlens holds the start of
each sample and the length of the row. Attention does not cross these boundaries and positions restart at 0
(llama.packed_attention), so the loss equals the loss of separate samples. Padding would double the tokens.

A row that cannot be used is never replaced silently: it becomes a Skipped that says why.
"""

import os
import random
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import CAPTION_REQUEST
from data.image import DEFAULT_FIT, augment, load_image, to_pixels
from data.sources import Unusable, open_rows, standard_row
from data.text import IMAGE_PLACEHOLDER, Tokenizer, expand_images, render_conversation
from common.files import printable
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, OwlConfig

MAX_REASON = 500  # characters


@dataclass(frozen=True)
class SampleSpec:
    """How rows become samples for one model."""

    tokenizer: Tokenizer
    variant: str  # "owl1" or "owl2": the prompt format
    n_visual_tokens: int  # positions of one image
    image_size: int  # pixels
    max_length: int  # positions of a whole sample
    fit: str  # how an image becomes square (data/image.py)
    crop_scale: float = 0.0  # training: random crops of at least this share of the area, and flips; 0: whole images

    @staticmethod
    def for_model(
        config: OwlConfig,
        tokenizer: Tokenizer,
        *,
        max_length: int = 2**31,
        fit: str | None = None,
        crop_scale: float = 0.0,
    ) -> "SampleSpec":
        """The spec for a model: at most its context, by default in the fit of its variant."""
        sizes = (config.n_visual_tokens, config.image_size, min(max_length, config.llama.context))
        return SampleSpec(tokenizer, config.variant, *sizes, fit or DEFAULT_FIT[config.variant], crop_scale)


@dataclass
class Sample:
    """One conversation. ids, labels: lists of T ids. images: [n, 3, S, S] float32."""

    ids: list[int]
    labels: list[int]
    images: Tensor
    n_cut: int = 0  # turns that did not fit


@dataclass
class Skipped:
    """A row that cannot be used. kind: one of a few, for counting. reason: a message that names the row."""

    kind: str
    reason: str


@dataclass
class Batch:
    """Samples of a micro-batch, packed into one row.

    The first label of each sample is IGNORE_INDEX: no last position predicts the first token of the next sample.
    If all rows were skipped, there is one position, without a label.
    """

    ids: Tensor  # [1, T] int64
    labels: Tensor  # [1, T] int64
    supervised: Tensor  # [M] int64: positions whose next token is supervised, which the loss is summed over
    cu_seqlens: Tensor  # [n + 1] int32: start of each sample, then T
    max_seqlen: int  # positions of the longest sample
    images: Tensor | None  # [N, 3, S, S] float32
    n_sample: int  # usable samples
    n_token: int  # positions of usable samples: T, or 0 without any
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def n_supervised(self) -> int:
        """Number of tokens that the loss is summed over."""
        return len(self.supervised)

    @property
    def n_image(self) -> int:
        return 0 if self.images is None else len(self.images)

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader: copies the tensors to pinned memory, from which a GPU copies asynchronously."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("ids", "labels", "supervised", "cu_seqlens")}
        return replace(self, **pinned, images=None if self.images is None else self.images.pin_memory())


class Conversations(Dataset):
    """The samples of a data file or of tar shards, for one model.

    image_root: folder of a file's image paths (default: the folder of the file). merge: merge a file's rows about
    the same image. index, n_worker: folder of the shards' index, and the processes that build it.
    An item is requested by (seed, index); the seed decides the crop and which of several captions is used.
    broken: one message per unreadable shard. Raises OSError or ValueError if the source cannot be opened.
    """

    def __init__(
        self,
        path: str | Path,
        spec: SampleSpec,
        *,
        image_root: str | Path | None = None,
        merge: bool = False,
        index: str | Path | None = None,
        n_worker: int = 1,
    ):
        self.path = path
        self.spec = spec
        self.image_root = Path(image_root) if image_root else Path(path).parent
        self.real_root = os.path.realpath(self.image_root)
        self.rows = open_rows(path, merge=merge, index=index, n_worker=n_worker)
        self.broken = self.rows.broken

    def __len__(self) -> int:
        return len(self.rows)

    def approx_length(self, index: int) -> int:
        """Estimates the positions of a sample without tokenizing or opening anything, to balance micro-batches."""
        return max(1, min(self.rows.approx_length(index, self.spec.n_visual_tokens), self.spec.max_length))

    def fingerprint(self) -> str:
        """Identifies the rows and their order, whatever the path: a resumed run compares it."""
        return self.rows.fingerprint()

    def __getitem__(self, key: tuple[int, int]) -> Sample | Skipped:
        seed, index = key
        try:
            return self._make_sample(index, seed)
        except Unusable as error:
            reason = f"{self.rows.name(index)}: {error}"[: 2 * MAX_REASON]  # an "image" may be megabytes long
            return Skipped(error.kind, printable(reason)[:MAX_REASON])

    def _make_sample(self, index: int, seed: int) -> Sample:
        """Renders a row and loads its images. Raises Unusable; a ValueError would be a bug."""
        try:
            conversation, images = parse_row(self.rows[index], seed)
            ids, labels = render_conversation(conversation, self.spec.tokenizer, self.spec.variant)
            if (n := ids.count(IMAGE_TOKEN_ID)) != len(images):
                raise ValueError(f"the text has {n} image placeholders (<image>), but the row has {len(images)} images")
        except ValueError as error:
            raise error if isinstance(error, Unusable) else Unusable("malformed row", str(error)) from None
        ids, labels, n_cut = fit_length(ids, labels, self.spec)
        if count_supervised(labels) == 0:
            raise Unusable("nothing supervised", "it has no supervised token")
        n_image = ids.count(IMAGE_TOKEN_ID) // self.spec.n_visual_tokens  # images of removed turns are not loaded
        return Sample(ids, labels, self._load_images(images[:n_image], seed), n_cut)

    def _load_images(self, images: list[str | bytes], seed: int) -> Tensor:
        """Loads images from paths below image_root or from file contents. Returns [n, 3, S, S] float32."""
        spec = self.spec
        pixels = [torch.empty(0, 3, spec.image_size, spec.image_size)]
        for i, source in enumerate(images):
            if isinstance(source, str):
                source = self._resolve(source)
            try:
                image = load_image(source)
                if spec.crop_scale:
                    image = augment(image, torch.Generator().manual_seed(seed + i), (spec.crop_scale, 1.0))
                pixels.append(to_pixels(image, spec.image_size, "stretch" if spec.crop_scale else spec.fit)[None])
            except (ValueError, OSError) as error:
                raise Unusable("unreadable image", str(error)) from None
        return torch.cat(pixels)

    def _resolve(self, path: str) -> str:
        """The file of a row's image path. Raises Unusable if it is missing or, after links, outside image_root."""
        path = os.path.join(self.image_root, path)
        try:
            file = os.path.realpath(path)
        except ValueError:  # a null byte or a lone surrogate
            file = ""
        if file and not file.startswith(os.path.join(self.real_root, "")):
            reason = f"{path} is or links to {file}, outside the image folder {self.real_root} (see --image-root)"
            raise Unusable("image outside its folder", reason)
        if not os.path.isfile(file):
            raise Unusable("missing image", f"there is no image {path}")
        return file


def parse_row(row: object, seed: int) -> tuple[object, list[str | bytes]]:
    """Returns the conversation of a row, in LLaVA's or Owl1's format, and its images. Raises ValueError."""
    row = standard_row(row)
    conversation = row["conversations"] if row.get("text") is None else row["text"]
    if conversation is None and row.get("caption") is not None:
        conversation = caption_turns(row["caption"], seed)
    if conversation is None:
        raise ValueError("it has neither a conversation nor a caption")
    return conversation, row["image"]


def caption_turns(captions: object, seed: int) -> list[dict]:
    """The conversation of a captioned image: a request, and one caption as the answer. Raises ValueError."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("caption should be a text or a list of texts")
    captions = [" ".join(caption.split()) for caption in captions]
    # All captions are checked, so that a row is usable or not whichever of them is sampled.
    if not all(captions) or any(IMAGE_PLACEHOLDER.search(caption) for caption in captions):
        raise ValueError("a caption is empty or has an image placeholder")
    caption = random.Random(seed).choice(captions)
    return [{"from": "human", "value": "<image>" + CAPTION_REQUEST}, {"from": "gpt", "value": caption}]


def fit_length(ids: list[int], labels: list[int], spec: SampleSpec) -> tuple[list[int], list[int], int]:
    """Removes whole turns from the end to meet max_length, and expands the images. Returns ids, labels, n_cut."""
    lengths = list(accumulate(spec.n_visual_tokens if token == IMAGE_TOKEN_ID else 1 for token in ids))
    n_cut = 0
    if lengths[-1] > spec.max_length:
        # Each answer ends with a supervised </s>: keep everything up to the last one that fits.
        ends = [i for i, label in enumerate(labels) if label == spec.tokenizer.eos_id]
        fitting = [end for end in ends if lengths[end] <= spec.max_length]
        if not fitting:
            n = lengths[ends[0] if ends else -1]
            raise Unusable("too long", f"its first turn takes {n} positions, more than {spec.max_length}")
        ids, labels = ids[: fitting[-1] + 1], labels[: fitting[-1] + 1]
        n_cut = len(ends) - len(fitting)
    return *expand_images(ids, labels, spec.n_visual_tokens), n_cut


def count_supervised(labels: list[int]) -> int:
    """Counts supervised positions, except the first, which no position predicts."""
    return sum(label != IGNORE_INDEX for label in labels[1:])


def collate(samples: list[Sample | Skipped]) -> Batch:
    """Packs samples into one row, without padding; see the module's docstring."""
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    samples = [sample for sample in samples if isinstance(sample, Sample)]
    lengths = [len(sample.ids) for sample in samples]
    ids = [token for sample in samples for token in sample.ids]
    labels = [label for sample in samples for label in (IGNORE_INDEX, *sample.labels[1:])]
    images = [sample.images for sample in samples if len(sample.images)]
    supervised = [t - 1 for t, label in enumerate(labels) if label != IGNORE_INDEX]
    return Batch(
        ids=torch.tensor([ids or [0]]),
        labels=torch.tensor([labels or [IGNORE_INDEX]]),
        supervised=torch.tensor(supervised, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *accumulate(lengths or [1])], dtype=torch.int32),
        max_seqlen=max(lengths, default=1),
        images=torch.cat(images) if images else None,
        n_sample=len(samples),
        n_token=sum(lengths),
        skipped=skipped,
    )
