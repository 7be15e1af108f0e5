"""Your own images with captions, as a training file.

Takes a folder of images and a file that captions them, and writes LLaVA's conversation JSON, which stage 1 reads:

    python data/captions/prepare.py --images flickr/images --captions flickr/captions.txt --out flickr/train.json
    python data/captions/prepare.py --images flickr/images --captions flickr/captions.txt --out flickr/train.json \\
        --val 500 --one-caption       # flickr/train_val.json gets 500 of the images; one caption an image, at random

The caption file, in UTF-8, one of

    .jsonl   {"image": "dogs/1.jpg", "caption": "A dog."} on each line, or "caption": ["A dog.", "A dog runs."]
    .json    a list of the same
    others   a table with a header line that names the columns "image" and "caption" (and perhaps more):
             comma-separated, quotes around a caption with commas; or tab-separated, quotes without a meaning.
             An image may have several lines

Image names are relative to the folder of --images, here and in the output, so training needs both:

    --data flickr/train.json --image-root flickr/images

An image that is not there is left out, and so is a name that leads out of the folder; both are counted and reported.
Images are not opened.
"""

import argparse
import csv
import json
import os
import random
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePath
from typing import TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import CAPTION_REQUEST  # noqa: E402

PLACEHOLDERS = ("<|image|>", "<image>")  # in a caption they would stand for a second image

N_NAMED = 5  # of the images left out, in the report


class BadInput(Exception):
    """Something the user can mend, in one sentence."""


# ----------------------------------------------------------------------------------------------------------------------
# The caption file -> (image, caption) pairs


def read_pairs(path: Path) -> list[tuple[str, str]]:
    readers = {".json": json_pairs, ".jsonl": jsonl_pairs}
    read = readers.get(path.suffix.lower(), table_pairs)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(read(file))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except OSError as error:
        raise BadInput(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise BadInput(f"{path} is not a caption file: {error}.") from None


def table_pairs(file: TextIO) -> Iterator[tuple[str, str]]:
    header_line = file.readline()
    lines = chain([header_line], file)
    if "\t" in header_line:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(lines, strict=True)  # strict: a quote never closed is an error, not one very long caption
    header = next(rows, [])
    if "image" not in header or "caption" not in header:
        raise BadInput('the first line must name the columns "image" and "caption".')
    for row in rows:
        if not row:
            continue  # an empty line
        if len(row) != len(header):
            hint = "; a caption with commas needs quotes" if len(row) > len(header) else ""
            raise BadInput(f"line {rows.line_num} has {len(row)} columns, the header {len(header)}{hint}.")
        yield row[header.index("image")], row[header.index("caption")]


def json_pairs(file: TextIO) -> Iterator[tuple[str, str]]:
    entries = json.load(file)
    if not isinstance(entries, list):
        raise BadInput("a JSON caption file holds a list.")
    for number, entry in enumerate(entries, start=1):
        yield from entry_pairs(entry, f"entry {number}")


def jsonl_pairs(file: TextIO) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield from entry_pairs(json.loads(line), f"line {number}")


def entry_pairs(entry: object, where: str) -> Iterator[tuple[str, str]]:
    image = entry.get("image") if isinstance(entry, dict) else None
    captions = entry.get("caption") if isinstance(entry, dict) else None
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(image, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadInput(f'{where} is not of the form {{"image": "NAME", "caption": "TEXT" or ["TEXT", ...]}}.')
    for caption in captions:
        yield image, caption


# ----------------------------------------------------------------------------------------------------------------------
# Pairs -> samples


def collect_captions(pairs: list[tuple[str, str]], folder: Path) -> dict[str, list[str]]:
    """The captions of each image that is there; reports what is left out."""
    captions = {}
    outside = {}  # dicts as sets that keep their order
    missing = {}
    n_unusable = 0
    for image, caption in tqdm(pairs, desc="captions", unit="caption"):
        caption = " ".join(caption.split())
        if image in captions:
            pass
        elif image in outside or leads_outside(image):
            outside[image] = True
            continue
        elif image in missing or not os.path.isfile(folder / image):
            missing[image] = True
            continue
        if not caption or any(placeholder in caption for placeholder in PLACEHOLDERS):
            n_unusable += 1
            continue
        captions.setdefault(image, []).append(caption)
    report_left_out(list(missing), f"not in {folder}")
    report_left_out(list(outside), "refused, their names lead out of the folder")
    if n_unusable:
        print(f"left out: {n_unusable:,} captions that are empty or hold an image's placeholder")
    return captions


def leads_outside(image: str) -> bool:
    path = PurePath(image)
    return path.is_absolute() or ".." in path.parts


def report_left_out(images: list[str], why: str) -> None:
    if images:
        named = ", ".join(ascii(image) for image in images[:N_NAMED])
        more = ", ..." if len(images) > N_NAMED else ""
        print(f"left out: {len(images):,} images {why}: {named}{more}")


def make_samples(captions: dict[str, list[str]]) -> list[dict]:
    """One sample a caption."""
    samples = []
    for image, texts in captions.items():
        for k, text in enumerate(texts):
            conversation = [
                {"from": "human", "value": "<|image|>" + CAPTION_REQUEST},
                {"from": "gpt", "value": text},
            ]
            samples.append({"id": f"{image}#{k}", "image": image, "conversations": conversation})
    return samples


def write_samples(path: Path, samples: list[dict], image_root: Path) -> None:
    """Written beside and then renamed: a file of this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    n_images = len({sample["image"] for sample in samples})
    print(f"{path}: {len(samples):,} samples, {n_images:,} images; use it with --data {path} --image-root {image_root}")


def prepare(images: Path, captions_file: Path, out: Path, n_val: int, one_caption: bool, seed: int) -> None:
    if out.is_dir():
        raise BadInput(f"--out is a file's name, and {out} is a folder.")
    val_out = out.with_name(f"{out.stem}_val{out.suffix}")
    if not images.is_dir():
        raise BadInput(f"There is no folder {images}.")
    if captions_file.resolve() in (out.resolve(), val_out.resolve()):
        raise BadInput(f"{captions_file} would be overwritten; choose another name for --out.")

    rng = random.Random(seed)
    captions = collect_captions(read_pairs(captions_file), images)
    if not captions:
        raise BadInput(f"No image named in {captions_file} is in {images} and has a caption.")
    if not 0 <= n_val < len(captions):
        raise BadInput(f"--val is {n_val}: it must be from 0 to less than the number of images, {len(captions):,}.")
    if one_caption:
        captions = {image: [rng.choice(texts)] for image, texts in captions.items()}

    # By image, not by caption: otherwise validation would be on images that were trained on.
    held_out = set(rng.sample(sorted(captions), n_val))
    write_samples(out, make_samples({i: texts for i, texts in captions.items() if i not in held_out}), images)
    if n_val:
        write_samples(val_out, make_samples({i: texts for i, texts in captions.items() if i in held_out}), images)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="where the images are")
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help="a table, .json or .jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the training file to write")
    parser.add_argument("--val", type=int, default=0, metavar="N", help="images to hold out, into FILE_val.json")
    parser.add_argument("--one-caption", action="store_true", help="one random caption an image (default: all of them)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    args = parser.parse_args()
    try:
        prepare(args.images, args.captions, args.out, args.val, args.one_caption, args.seed)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Cannot write {args.out}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
