"""Scores the quality of images, or of videos, with an Owl2 model trained for it: Q-Align, DeQA-Score or Q-Instruct.

    python score.py --weights one-align a.jpg b.jpg                  scores and level probabilities as CSV
    python score.py --weights one-align photos --out scores.csv      all images of a folder
    python score.py --weights one-align rows.csv --out scores.csv    the column image of a table; paths relative to it
    python score.py --weights one-align --kind video clip.mp4        frames of a video (see data/video.py)
    python score.py --weights DeQA-Score-Mix3 --preset deqa a.jpg    its scale of 1 to 5

    image,score,excellent,good,fair,poor,bad,error
    a.jpg,0.812345,0.401234,...

An image that cannot be read has its reason in the column error, and the others are scored. With --out (.csv or .jsonl)
rows are appended as they are computed, with the other columns of a table, and the same command continues a run that was
stopped.
"""

import csv
import io
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from command import ArgumentParser, log, run, user_errors
from common.files import escape_controls, printable

import torch
from tqdm import tqdm

from data.image import FITS
from data.text import Tokenizer
from inference.loading import load_for_inference
from inference.quality import KINDS, PRESETS, SCALES, Scorer, prompt_of, scores_of, word_ids
from inference.rows import AnswerFile, Row, describe, read_rows

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".webp")
SETTINGS = ("kind", "preset", "scale", "fit", "fps", "max_frames", "first_token", "dtype")  # of all rows in one file


def parse_args() -> Namespace:
    p = ArgumentParser(prog="score.py", description=__doc__)
    p.add_argument("inputs", nargs="+", type=Path, metavar="PATH", help="images, folders, or tables (.csv, .json, .jsonl)")
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
    dtypes = "default: bfloat16, on a CPU without instructions for it float32"
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help=dtypes)
    p.add_argument("--out", type=Path, metavar="FILE", help="append here (.csv, .jsonl) instead of printing")
    args = p.parse_args()
    if args.batch < 1 or args.max_frames < 1:
        p.error("--batch and --max-frames must be at least 1")
    if not 0 < args.fps < float("inf"):
        p.error(f"--fps must be above 0, not {args.fps}")
    args.scale = args.scale or PRESETS[args.preset].scale
    args.fit = args.fit or PRESETS[args.preset].fit
    return args


def read_inputs(inputs: list[Path], kind: str) -> tuple[list[Row], list[Path]]:
    """Returns the rows to score, with a column "image", and their paths. Raises OSError, or ValueError without any."""
    rows, paths = [], []
    for source in inputs:
        if source.is_dir():
            suffixes = VIDEO_SUFFIXES if kind == "video" else SUFFIXES
            found = sorted(path for path in source.iterdir() if path.suffix.lower() in suffixes)
            if not found:
                raise ValueError(f"{source} has no files that end in {', '.join(suffixes)}")
            rows += [{"image": str(path)} for path in found]
            paths += found
        elif source.suffix.lower() in (".csv", ".json", ".jsonl"):
            table = read_rows(source)
            if not all(isinstance(row.get("image"), str) and row["image"].strip() for row in table):
                raise ValueError(f'{source}: each row needs one path in the column "image" (also of a video)')
            rows += table
            paths += [source.parent / row["image"] for row in table]
        elif source.exists():
            rows.append({"image": str(source)})
            paths.append(source)
        else:
            raise FileNotFoundError(f"{source} does not exist")
    return rows, paths


def load_scorer(args: Namespace) -> Scorer:
    """Loads the model. Raises ValueError or OSError for what the user can fix."""
    tokenizer = Tokenizer(args.weights)
    word_ids(PRESETS[args.preset].words, tokenizer, args.first_token)  # before the weights, which can take minutes
    model, device, dtype = load_for_inference(
        args.weights, adapter=None, quantize_to=None, device=args.device, dtype=args.dtype
    )
    log(f"{printable(args.weights)} on {device} in {str(dtype).removeprefix('torch.')}")
    return Scorer(model, tokenizer, args.preset, args.kind, fit=args.fit, first_token=args.first_token)


def score_batch(scorer: Scorer, paths: list[Path], args: Namespace) -> list[dict[str, object]]:
    """Scores images in one forward pass. Returns the new columns of each: score and probabilities, or error."""
    images, results = [], []
    for path in paths:
        try:
            images.append(scorer.read(path, args.fps, args.max_frames))
            results.append({})
        except (OSError, ValueError) as error:
            results.append({"error": describe(error)})
    if images:
        probabilities = scorer.probabilities(images)  # [B, number of words]
        numbers = torch.cat([scores_of(probabilities, args.scale)[:, None], probabilities], dim=1)
        readable = (result for result in results if not result)
        for result, values in zip(readable, numbers.tolist()):
            result |= {name: round(value, 6) for name, value in zip(new_columns(args), values)}
    return results


def new_columns(args: Namespace) -> list[str]:
    return ["score", *PRESETS[args.preset].words]


def print_line(cells: list[object]) -> None:
    """Prints a line of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    print(escape_controls(text.getvalue()), flush=True)


def main() -> None:
    args = parse_args()
    with user_errors():
        prompt_of(args.preset, args.kind)
        rows, paths = read_inputs(args.inputs, args.kind)
        settings = {name: getattr(args, name) for name in SETTINGS} | {"weights": str(args.weights.resolve())}
        settings["inputs"] = [str(source.resolve()) for source in args.inputs]
        columns = new_columns(args)
        with AnswerFile(args.out, rows, columns, settings) if args.out else nullcontext() as file:
            n_done = file.n_done if file else 0
            if n_done == len(rows):
                log(f"{printable(args.out)} has all {n_done:,} rows already")
                return
            scorer = load_scorer(args)
            if not file:
                print_line(["image", *columns, "error"])
            n_error = 0
            with tqdm(total=len(rows), initial=n_done, unit="image", disable=None) as bar:
                for start in range(n_done, len(rows), args.batch):
                    batch = slice(start, start + args.batch)
                    for row, result in zip(rows[batch], score_batch(scorer, paths[batch], args)):
                        if file:
                            file.append(row, result)
                        else:
                            print_line([row["image"], *(result.get(name) for name in (*columns, "error"))])
                        n_error += "error" in result
                        bar.update()
    log(f"{len(rows) - n_done:,} images, {n_error:,} could not be read")


if __name__ == "__main__":
    run(main)
