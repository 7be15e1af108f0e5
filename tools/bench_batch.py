"""Speed of sample.py --questions against single questions, in one process.

    python -m tools.bench_batch                   500 images on the embedded tiny model

Both read the same image files and save each answer. They take turns, in chunks of 50 rows, so that other load on the
machine affects both alike. The table has

    rows/s           by the clock
    CPU ms           of all threads, per row
    to single        how many times as fast as single questions: by the clock, and by CPU time
    other answers    that differ from those of single questions (in float32 only near-ties)
"""

import random
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

from command import ArgumentParser, log, run, user_errors

import torch

from data.image import DEFAULT_FIT
from data.text import Tokenizer
from inference.loading import load_for_inference
from inference.rows import AnswerFile, RowReader, answer_batch, answer_rows
from training.options import positive_int

CHUNK = 50  # rows
COLORS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
PROMPTS = ("what shape is in the image?", "what color is the shape?", "does the image contain a circle?")


def draw(path: Path, rng: random.Random) -> None:
    """Saves a picture of 256 x 256 pixels with a shape."""
    image = Image.new("RGB", (256, 256), "white")
    x, y, size = rng.randrange(100), rng.randrange(100), rng.randrange(60, 150)
    pen = ImageDraw.Draw(image)
    rng.choice((pen.ellipse, pen.rectangle))((x, y, x + size, y + size), fill=rng.choice(COLORS))
    image.save(path)


def answer(reader: RowReader, rows: list[dict], out: Path, batch_size: int) -> tuple[torch.Tensor, str]:
    """Answers rows in batches; with batch_size 1, each before the next one is read.

    Returns (seconds by the clock and of CPU time [2], answers).
    """
    start = torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)
    with AnswerFile(out, rows, ["answer"], {}) as file:
        if batch_size > 1:
            answer_rows(reader, rows, file, batch_size=batch_size, max_new_tokens=16)
        else:
            for row in rows:
                [single] = answer_batch(reader, [reader.read(row)], max_new_tokens=16)
                file.append(row, single)
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64) - start, out.read_text()


def main() -> None:
    p = ArgumentParser(prog="bench_batch", description=__doc__)
    p.add_argument("--weights", type=Path, default=Path("checkpoints/tiny-owl2"), help="default: the embedded model")
    p.add_argument("--device", default="auto")
    p.add_argument("--images", type=positive_int, default=500, help="default %(default)s")
    p.add_argument("--batch", type=positive_int, nargs="+", default=[16], help="batch sizes; default 16")
    args = p.parse_args()
    with user_errors(), tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(0)
        options = {"adapter": None, "quantize_to": None, "device": args.device, "dtype": "auto"}
        (model, _, _), tokenizer = load_for_inference(args.weights, **options), Tokenizer(args.weights)
        model.config.llama.eos_id = tokenizer.eos_id
        reader = RowReader(model, tokenizer, folder, DEFAULT_FIT[model.config.variant])
        rows = [{"image": f"{i}.png", "prompt": PROMPTS[i % len(PROMPTS)]} for i in range(args.images)]
        for row in rows:
            draw(folder / row["image"], rng)
        sizes = [1, *args.batch]
        seconds, texts = {size: torch.zeros(2) for size in sizes}, {size: [] for size in sizes}
        for size in sizes:  # warm up
            answer(reader, rows[: 2 * size], folder / f"warm-{size}.csv", size)
        for start in range(0, len(rows), CHUNK):
            for size in sizes:
                spent, text = answer(reader, rows[start : start + CHUNK], folder / f"{start}-{size}.csv", size)
                seconds[size] += spent
                texts[size] += text.splitlines()
            log(f"{min(start + CHUNK, len(rows))} rows")
    print(f"{'batch':>5}{'rows/s':>10}{'CPU ms':>10}{'to single: clock':>20}{'CPU':>7}{'other answers':>17}")
    for size in sizes:
        (clock, cpu), ratio = seconds[size].tolist(), (seconds[1] / seconds[size]).tolist()
        n_other = sum(a != b for a, b in zip(texts[1], texts[size], strict=True))
        speed = f"{args.images / clock:>10.1f}{1000 * cpu / args.images:>10.1f}"
        print(f"{size:>5}{speed}{ratio[0]:>20.2f}{ratio[1]:>7.2f}{n_other:>17}")


if __name__ == "__main__":
    run(main)
