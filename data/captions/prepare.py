"""Your own images with captions, as a training file.

Takes a folder of images and a file of captions, and writes the conversation format of LLaVA that stage 1 reads:

    python data/captions/prepare.py --images flickr/images --captions flickr/captions.txt --out flickr/train.json
    python data/captions/prepare.py --images flickr/images --captions flickr/captions.txt --out flickr/train.json \\
        --val 500 --one-caption       # 500 of the images go to flickr/train_val.json; one random caption per image

The caption file, in UTF-8, is one of

    .jsonl   {"image": "dogs/1.jpg", "caption": "A dog."} on each line, or "caption": ["A dog.", "A dog runs."]
    .json    a list of such objects
    others   a table whose first line names the columns "image" and "caption", and possibly more:
             comma-separated, with quotes around a caption with commas, or tab-separated, where quotes have no
             meaning. An image may have several lines

Image names are relative to the folder of --images, here and in the output, so training needs both:

    --data flickr/train.json --image-root flickr/images

Images that do not exist and names that lead out of the folder are left out, counted and reported.
The images are not opened.
"""

import csv
import json
import os
import random
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePath
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from command import ArgumentParser, run, user_errors  # noqa: E402  reports missing packages

from tqdm import tqdm  # noqa: E402

from data import CAPTION_REQUEST  # noqa: E402
from data.easy_vqa.prepare import make_sample, write_samples  # noqa: E402
from common.files import check_file, printable, reading  # noqa: E402

PLACEHOLDERS = ("<|image|>", "<image>")  # in a caption, they would stand for a second image
N_NAMED = 5  # images left out that the report names


# ----------------------------------------------------------------------------------------------------------------------
# The caption file -> (image, caption) pairs


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Reads a caption file. Raises ValueError if it is not one, OSError if it cannot be opened."""
    readers = {".json": json_pairs, ".jsonl": jsonl_pairs}
    read = readers.get(path.suffix.lower(), table_pairs)
    with reading(path):
        check_file(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(read(file))


def table_pairs(file: TextIO) -> Iterator[tuple[str, str]]:
    header_line = file.readline()
    lines = chain([header_line], file)
    if "\t" in header_line:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(lines, strict=True)  # strict: an unclosed quote is an error, not one very long caption
    header = next(rows, [])
    if "image" not in header or "caption" not in header:
        raise ValueError('its first line must name the columns "image" and "caption"')
    for row in rows:
        if not row:  # an empty line
            continue
        if len(row) != len(header):
            hint = "; a caption with commas needs quotes" if len(row) > len(header) else ""
            raise ValueError(f"line {rows.line_num} has {len(row)} columns, the first line {len(header)}{hint}")
        yield row[header.index("image")], row[header.index("caption")]


def json_pairs(file: TextIO) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(json.load(file), start=1):
        yield from entry_pairs(entry, f"entry {number}")


def jsonl_pairs(file: TextIO) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield from entry_pairs(json.loads(line), f"line {number}")


def entry_pairs(entry: object, location: str) -> Iterator[tuple[str, str]]:
    image = entry.get("image") if isinstance(entry, dict) else None
    captions = entry.get("caption") if isinstance(entry, dict) else None
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(image, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError(f'{location} does not have the form {{"image": "NAME", "caption": "TEXT" or ["TEXT", ...]}}')
    for caption in captions:
        yield image, caption


# ----------------------------------------------------------------------------------------------------------------------
# Pairs -> samples


def collect_captions(pairs: list[tuple[str, str]], folder: Path) -> dict[str, list[str]]:
    """Returns the captions of each image that exists; prints what is left out."""
    captions = {}
    outside = {}  # dicts as ordered sets
    missing = {}
    n_unusable = 0
    for image, caption in tqdm(pairs, desc="captions", unit="caption"):
        if leads_outside(image):
            outside[image] = True
            continue
        if image not in captions and (image in missing or not os.path.isfile(folder / image)):
            missing[image] = True
            continue
        caption = " ".join(caption.split())
        if not caption or any(placeholder in caption for placeholder in PLACEHOLDERS):
            n_unusable += 1
            continue
        captions.setdefault(image, []).append(caption)
    report_left_out(list(missing), f"not in {printable(folder)}")
    report_left_out(list(outside), "refused, their names lead out of the folder")
    if n_unusable:
        print(f"left out: {n_unusable:,} captions that are empty or contain an image placeholder")
    return captions


def leads_outside(image: str) -> bool:
    path = PurePath(image)
    return path.is_absolute() or ".." in path.parts


def report_left_out(images: list[str], reason: str) -> None:
    if images:
        named = ", ".join(ascii(image) for image in images[:N_NAMED])
        more = ", ..." if len(images) > N_NAMED else ""
        print(f"left out: {len(images):,} images {reason}: {named}{more}")


def caption_samples(captions: dict[str, list[str]]) -> list[dict]:
    """Returns one sample per caption."""
    return [
        make_sample(f"{image}#{k}", [(CAPTION_REQUEST, text)], "<|image|>", image)
        for image, texts in captions.items()
        for k, text in enumerate(texts)
    ]


def prepare(images: Path, captions_file: Path, out: Path, *, n_val: int, one_caption: bool, seed: int) -> None:
    """Writes the training file and, if n_val > 0, the validation file. Raises ValueError or OSError."""
    val_out = out.with_name(f"{out.stem}_val{out.suffix}")
    if out.is_dir() or captions_file.resolve() in (out.resolve(), val_out.resolve()):
        raise ValueError(f"--out {out} is a folder or would overwrite {captions_file}: give another file name")

    rng = random.Random(seed)
    captions = collect_captions(read_pairs(captions_file), images)
    if not captions:
        raise ValueError(f"no image named in {captions_file} is in {images} and has a caption")
    if not 0 <= n_val < len(captions):
        raise ValueError(f"--val is {n_val}: it must be from 0 to less than the number of images, {len(captions):,}")
    if one_caption:
        captions = {image: [rng.choice(texts)] for image, texts in captions.items()}

    # Hold out images, not captions: no validation image is trained on with another caption.
    held_out = set(rng.sample(sorted(captions), n_val))
    splits = [(out, captions.keys() - held_out)]
    if n_val:
        splits.append((val_out, held_out))
    for path, split in splits:
        write_samples(path, caption_samples({image: captions[image] for image in captions if image in split}))
        print(f"use it with --data {printable(path)} --image-root {printable(images)}")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="where the images are")
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help="a table, .json or .jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the training file to write")
    parser.add_argument("--val", type=int, default=0, metavar="N", help="images to hold out, into FILE_val.json")
    parser.add_argument("--one-caption", action="store_true", help="one random caption per image (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    args = parser.parse_args()
    with user_errors():
        prepare(
            args.images, args.captions, args.out, n_val=args.val, one_caption=args.one_caption, seed=args.seed
        )


if __name__ == "__main__":
    run(main)
