"""Scores the quality of images, or of videos, with an Owl2 model trained for it: Q-Align, DeQA-Score or Q-Instruct.

    python score.py --weights one-align a.jpg b.jpg                  scores and level probabilities as CSV
    python score.py --weights one-align photos --out scores.csv      all images of a folder
    python score.py --weights one-align rows.csv --out scores.csv    the column image; paths relative to rows.csv
    python score.py --weights one-align --kind video clip.mp4        frames of a video (see data/video.py)
    python score.py --weights DeQA-Score-Mix3 --preset deqa a.jpg    its scale of 1 to 5

    image,score,excellent,good,fair,poor,bad,error
    a.jpg,0.812345,0.401234,...

An image that cannot be read has its reason in the column error, and the others are scored; the exit code is then 1.
With --out rows are appended as they are computed, and the same command continues a run that was stopped.
"""

import csv
import io
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from command import ArgumentParser, log, run, user_errors
from common.files import escape_controls, printable, read_bytes, read_json, reading, write_json

import torch
from tqdm import tqdm

from data.image import FITS
from data.text import Tokenizer
from inference.loading import load_for_inference
from inference.quality import KINDS, PRESETS, SCALES, Scorer, prompt_of, scores_of, word_ids

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".webp")
MAX_CSV = 2_000_000_000  # bytes
SETTINGS = ("weights", "kind", "preset", "scale", "fit", "fps", "max_frames", "first_token")  # must not change


def parse_args() -> Namespace:
    p = ArgumentParser(prog="score.py", description=__doc__)
    p.add_argument("inputs", nargs="+", type=Path, metavar="PATH", help="images, folders, or CSV files")
    p.add_argument("--weights", type=Path, required=True, metavar="FOLDER", help="a scorer in Hugging Face layout")
    p.add_argument("--kind", choices=KINDS, default="quality", help="what is scored (default quality)")
    preset = "the prompt, words and fit of a family; published: Q-Align's for its published numbers (default onealign)"
    p.add_argument("--preset", choices=PRESETS, default="onealign", help=preset)
    p.add_argument("--scale", choices=SCALES, help="worst to best score (default: 1-5 for deqa, otherwise 0-1)")
    p.add_argument("--fit", choices=FITS, help="how images become squares (default: crop for q-instruct, else pad)")
    p.add_argument("--first-token", action="store_true", help="allow level words of several tokens: the first counts")
    p.add_argument("--fps", type=float, default=1.0, help="frames per second of a video (default 1)")
    p.add_argument("--max-frames", type=int, default=8, metavar="N", help="the most frames of a video (default 8)")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="images per forward pass (default 8)")
    p.add_argument("--device", default="auto", help="default: the first of cuda, mps, cpu")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    p.add_argument("--out", type=Path, metavar="CSV", help="append here instead of printing")
    args = p.parse_args()
    if args.batch < 1 or args.max_frames < 1:
        p.error("--batch and --max-frames must be at least 1")
    args.scale = args.scale or PRESETS[args.preset].scale
    args.fit = args.fit or PRESETS[args.preset].fit
    return args


def list_paths(inputs: list[Path], kind: str) -> list[tuple[str, Path]]:
    """Returns (name in the output, path) of all inputs. Raises OSError, or ValueError if one has no images."""
    paths = []
    for source in inputs:
        if source.is_dir():
            suffixes = VIDEO_SUFFIXES if kind == "video" else SUFFIXES
            found = sorted(path for path in source.iterdir() if path.suffix.lower() in suffixes)
            if not found:
                raise ValueError(f"{source} has no files that end in {', '.join(suffixes)}")
            paths += [(str(path), path) for path in found]
        elif source.suffix.lower() == ".csv":
            with reading(source):
                rows = csv.DictReader(io.StringIO(read_bytes(source, MAX_CSV).decode("utf-8-sig"), newline=""))
                if "image" not in (rows.fieldnames or ()):
                    raise ValueError("its first line names no column image")
                paths += [(row["image"], source.parent / row["image"]) for row in rows]
        else:
            paths.append((str(source), source))
    return paths


def load_scorer(args: Namespace) -> Scorer:
    """Loads the model. Raises ValueError or OSError for what the user can fix."""
    tokenizer = Tokenizer(args.weights)
    word_ids(PRESETS[args.preset].words, tokenizer, args.first_token)  # before the weights, which can take minutes
    model, device, dtype = load_for_inference(
        args.weights, adapter=None, quantize_to=None, device=args.device, dtype=args.dtype
    )
    log(f"{printable(args.weights)} on {device} in {str(dtype).removeprefix('torch.')}")
    return Scorer(model, tokenizer, args.preset, args.kind, fit=args.fit, first_token=args.first_token)


def score_rows(scorer: Scorer, paths: list[tuple[str, Path]], args: Namespace) -> list[list[str]]:
    """Scores one batch. Returns rows of the output."""
    images, errors = [], {}
    for i, (_, path) in enumerate(paths):
        try:
            images.append(scorer.read(path, args.fps, args.max_frames))
        except (OSError, ValueError) as error:
            errors[i] = printable(error)
    numbers = iter(())
    if images:
        probabilities = scorer.probabilities(images)
        numbers = iter(torch.cat([scores_of(probabilities, args.scale)[:, None], probabilities], dim=1).tolist())
    empty = [""] * (1 + len(scorer.ids))
    return [
        [name, *(empty if i in errors else [f"{x:.6f}" for x in next(numbers)]), errors.get(i, "")]
        for i, (name, _) in enumerate(paths)
    ]


def open_out(args: Namespace, header: list[str], names: list[str]) -> tuple[TextIO, list[list[str]]]:
    """Opens --out to append, cut after its last complete line. Returns the file and the rows that it has.

    Raises ValueError if it has other rows, or was written with other settings.
    """
    record_path = args.out.with_name(args.out.name + ".run.json")
    record = {name: str(getattr(args, name)) for name in SETTINGS}
    content = b""
    if args.out.exists():
        with reading(args.out):
            content = read_bytes(args.out, MAX_CSV)
            content = content[: content.rfind(b"\n") + 1]
            rows = list(csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")))
            if not record_path.exists() or read_json(record_path) != record:
                raise ValueError("it exists, and was not written with these settings")
            if rows and (rows[0] != header or [row[0] for row in rows[1:]] != names[: len(rows) - 1]):
                raise ValueError("it exists, and has the scores of other images")
    else:
        rows = []
        write_json(record_path, record)
    file = args.out.open("a", encoding="utf-8", errors="surrogateescape", newline="")
    file.truncate(len(content))
    if not rows:
        file.write(to_csv([header]))
    return file, rows[1:]


def to_csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def main() -> None:
    args = parse_args()
    with user_errors():
        prompt_of(args.preset, args.kind)
        paths = list_paths(args.inputs, args.kind)
        scorer = load_scorer(args)
        header = ["image", "score", *PRESETS[args.preset].words, "error"]
        file, done = open_out(args, header, [name for name, _ in paths]) if args.out else (None, [])
        if file is None:
            print(",".join(header))
        n_error = sum(row[-1] != "" for row in done)
        with file or nullcontext(), tqdm(total=len(paths), initial=len(done), unit="image", disable=None) as bar:
            for start in range(len(done), len(paths), args.batch):
                rows = score_rows(scorer, paths[start : start + args.batch], args)
                if file is None:
                    print(escape_controls(to_csv(rows)), end="", flush=True)
                else:
                    file.write(to_csv(rows))
                    file.flush()
                n_error += sum(row[-1] != "" for row in rows)
                bar.update(len(rows))
    log(f"{len(paths):,} images, {n_error:,} could not be read")
    sys.exit(1 if n_error else 0)


if __name__ == "__main__":
    run(main)
