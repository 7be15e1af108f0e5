"""Training files for image-quality scorers in Q-Align's format: mean opinion scores become level words.

    python -m data.quality mos.csv --out train.json          mos.csv: image,mos, and perhaps std
    python -m data.quality --demo runs/quality               draws images with blur or noise: train, val and test.json

    mos --five equal bins of [smallest, largest]--> bad, poor, fair, good, excellent --> conversation JSON

    {"id": "a.jpg->71.5", "image": "a.jpg", "gt_score": 71.5, "conversations": [
      {"from": "human", "value": "Rate the quality of this image.\n<|image|>"},
      {"from": "gpt", "value": "The quality of the image is good."}]}

train_stage2.py trains on this file and evaluate.py --task iqa tests on it. With a column std, each row also has
DeQA-Score's soft labels, `level_probs` (excellent first), which train_stage2.py does not use.
"""

import csv
import json
import math
import random
from pathlib import Path

from command import ArgumentParser, exit_with_error, run, user_errors

from PIL import Image, ImageFilter
from tqdm import tqdm

from common.files import printable, read_bytes, reading, writing

LEVELS = ("excellent", "good", "fair", "poor", "bad")
QUESTIONS = (
    "How would you rate the quality of this image?",
    "Can you rate the quality of this picture?",
    "What do you think about the quality of this image?",
    "Rate the quality of this image.",
    "What is your quality rating for this image?",
    "What's your opinion on the quality of this picture?",
    "How would you judge the quality of this image?",
    "Could you evaluate the quality of this image?",
    "How do you assess the quality of this image?",
)
MAX_CSV = 1_000_000_000  # bytes
MAX_BLUR, MAX_NOISE = 3.0, 80.0  # of the demo: radius in pixels, standard deviation of 8-bit values
N_DEMO = {"train": 3000, "val": 100, "test": 300}


def level_of(mos: float, low: float, high: float) -> str:
    """Returns the word of one of five equal bins of [low, high]; a score on a boundary belongs to the lower bin."""
    bin_index = math.ceil((mos - low) / (high - low) * 5) - 1  # bins are open at the lower end, except the first
    return LEVELS[4 - min(max(bin_index, 0), 4)]


def soft_labels(mos: float, std: float, low: float, high: float) -> list[float]:
    """DeQA-Score's five probabilities (excellent first), of about the mean and the deviation of the scores.

    They are a Gaussian's density at 5, 4, 3, 2, 1, corrected linearly so that their sum and mean are right. Where that
    is inaccurate (a small deviation, or a mean near an end), the two levels around the mean share the probability.
    """
    mean, std = 4 * (mos - low) / (high - low) + 1, 4 * std / (high - low)
    levels = (5, 4, 3, 2, 1)
    if std >= 0.2:
        p = [math.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi)) for x in levels]
        total, weighted = sum(p), sum(x * q for x, q in zip(levels, p))
        a = (mean - 3) / (weighted - 3 * total + 1e-9)
        b = (1 - a * total) / 5
        p = [max(a * q + b, 0.0) for q in p]
        if abs(sum(x * q for x, q in zip(levels, p)) - mean) <= 0.1:
            return p
    return [max(0.0, 1 - abs(x - mean)) for x in levels]


def read_scores(path: Path) -> list[tuple[str, float, float | None]]:
    """Reads (image, mos, std or None) from a CSV. Raises OSError, or ValueError that names the line."""
    with reading(path):
        lines = csv.DictReader(read_bytes(path, MAX_CSV).decode("utf-8-sig").splitlines())
        if not {"image", "mos"} <= set(lines.fieldnames or ()):
            raise ValueError("its first line should name the columns image and mos")
        scores = []
        for row in lines:
            try:
                numbers = [float(row["mos"]), float(row["std"]) if row.get("std") else None]
            except (TypeError, ValueError):
                numbers = [math.nan]
            if not row["image"] or not all(n is None or math.isfinite(n) for n in numbers) or (numbers[-1] or 0) < 0:
                raise ValueError(f"line {lines.line_num} should have an image, a number mos, and std >= 0 or none")
            scores.append((row["image"], *numbers))
        if len({mos for _, mos, _ in scores}) < 2:
            raise ValueError("it needs two different scores")
        return scores


def quality_rows(scores: list[tuple[str, float, float | None]], seed: int = 0) -> list[dict]:
    """Makes a conversation of each (image, mos, std or None). The bins span all of the scores."""
    rng = random.Random(seed)
    low, high = min(mos for _, mos, _ in scores), max(mos for _, mos, _ in scores)
    rows = []
    for image, mos, std in scores:
        turns = (f"{rng.choice(QUESTIONS)}\n<|image|>", f"The quality of the image is {level_of(mos, low, high)}.")
        conversation = [{"from": role, "value": value} for role, value in zip(("human", "gpt"), turns)]
        row = {"id": f"{image}->{mos:g}", "image": image, "gt_score": mos, "conversations": conversation}
        if std is not None:
            row["level_probs"] = soft_labels(mos, std, low, high)
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    with writing(path) as part:
        part.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{printable(path)}: {len(rows):,} rows")


def degrade(image: Image.Image, kind: str, strength: float, rng: random.Random) -> Image.Image:
    """Blurs an RGB image or adds noise to it. strength: 0 to 1."""
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(MAX_BLUR * strength))
    sigma = MAX_NOISE * strength
    noisy = (min(max(round(value + rng.gauss(0, sigma)), 0), 255) for value in image.tobytes())
    return Image.frombytes("RGB", image.size, bytes(noisy))


def draw_demo(out: Path, seed: int = 0) -> None:
    """Draws scenes of shapes and letters, each blurred or noisy; the score is 100 * (1 - strength)."""
    from data.shapes.prepare import make_scene, render

    rng = random.Random(seed)
    for split, n in N_DEMO.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        scores = []
        for i in tqdm(range(n), desc=split, disable=None):
            strength = rng.random()
            image = degrade(render(make_scene(rng), rng).convert("RGB"), rng.choice(("blur", "noise")), strength, rng)
            name = f"{split}/{i}.png"
            with writing(out / name) as part:
                image.save(part, format="PNG")
            scores.append((name, round(100 * (1 - strength), 2), None))
        write_rows(out / f"{split}.json", quality_rows(scores, seed))


def main() -> None:
    parser = ArgumentParser(prog="python -m data.quality", description=__doc__)
    parser.add_argument("scores", nargs="?", type=Path, metavar="CSV", help="columns image, mos and perhaps std")
    parser.add_argument("--out", type=Path, metavar="JSON", help="the file to write; image paths are kept as they are")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="draw images instead")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the demo's images")
    args = parser.parse_args()
    if (args.scores is None) == (args.demo is None) or (args.scores is None) != (args.out is None):
        exit_with_error("pass a CSV and --out, or --demo FOLDER (see --help)")
    with user_errors():
        if args.demo:
            draw_demo(args.demo, args.seed)
        else:
            write_rows(args.out, quality_rows(read_scores(args.scores), args.seed))


if __name__ == "__main__":
    run(main)
