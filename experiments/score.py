"""Trains a stage, then tests every checkpoint: which questions does the model answer right, and with what loss?

    python -m experiments.score WORLD train_stage2 --out seed1/queries16-both ...    # seed1/queries16-both.scores.json

WORLD is a folder of data.shapes.prepare, with the tests; what follows is the command of the stage.

Greedy decoding writes an answer if and only if each of its tokens, </s> included, is the most probable one after the
tokens before it. So one forward pass over the questions with their answers is enough, and no text is generated.

The model that the run started from is step 0. The last one is also tested with blank images ("blank"). A question of
conflict.json is scored with the answer of the image and with the answer of the statement. Scores have, for each step
and test, the right answers as a text of 0 and 1, in the order of the file, and the mean loss per token.
"""

import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from command import ArgumentParser, run, user_errors
from common.files import write_json
from data.conversations import Conversations, Sample, SampleSpec, collate
from data.text import Tokenizer
from llama import PackedSequences
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, Owl
from training import checkpoint
from training.restore import restore_model
from weights import load_model

TESTS = ("test", "text_test", "conflict_image", "conflict_text")
BATCH = 64


def read_samples(world: Path, test: str, spec: SampleSpec, pixels: dict[str, Tensor]) -> list[tuple[Sample, str]]:
    """The samples of a test, without their images, and the names of the images, whose pixels are added to `pixels`.

    The samples of conflict.json have one of its two answers.
    """
    name, _, answer = test.partition("_") if test.startswith("conflict") else (test, "", "")
    data = Conversations(world / f"{name}.json", spec)
    rows = list(data.rows)
    if answer:
        for row in rows:
            row["conversations"][1]["value"] = row[f"{answer}_answer"]
        data.rows = rows
    samples = []
    for i, row in enumerate(rows):
        sample, image = data[0, i], row.get("image", "")
        if image:
            pixels[image] = sample.images
        samples.append((replace(sample, images=sample.images[:0]), image))
    return samples


@torch.no_grad()
def score(model: Owl, samples: list[tuple[Sample, str]], visual: dict[str, Tensor]) -> dict:
    """Which samples are answered right, and the mean loss per supervised token. visual: tokens of each image."""
    device = next(model.parameters()).device
    right, loss, n_token = "", 0.0, 0
    for start in range(0, len(samples), BATCH):
        part, names = zip(*samples[start : start + BATCH])
        batch = collate(part)
        images = torch.cat([visual[name] for name in names]) if names[0] else None
        n_placeholder = int((batch.ids == IMAGE_TOKEN_ID).sum())
        packed = PackedSequences(batch.cu_seqlens.to(device), batch.max_seqlen, n_placeholder, batch.supervised)
        logits = model(batch.ids.to(device), images, None, packed)[0][0, :-1].float().cpu()
        targets = batch.labels[0, 1:]
        loss += F.cross_entropy(logits, targets, reduction="sum").item()  # ignores IGNORE_INDEX
        n_token += batch.n_supervised
        is_wrong = (targets != IGNORE_INDEX) & (logits.argmax(-1) != targets)  # a sample's first label is ignored
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), is_wrong.cumsum(0)])
        n_wrong = counts[batch.cu_seqlens.long().clamp(max=len(targets))].diff()
        right += "".join("0" if n else "1" for n in n_wrong)
    return {"right": right, "loss": loss / n_token}


@torch.no_grad()
def encode(model: Owl, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """The visual tokens of each image, [1, n_query + 1, n_embd]."""
    device = next(model.parameters()).device
    parts = [model.encode_images(x.to(device)) for x in torch.cat(list(pixels.values())).split(BATCH)]
    return dict(zip(pixels, torch.cat(parts).split(1)))


def models(out: Path) -> Iterator[tuple[int, Owl]]:
    """Yields the step and the model of the run's start and of its checkpoints."""
    paths = sorted((out / "checkpoints").glob(checkpoint.STEP))
    settings = checkpoint.read_manifest(paths[-1])["facts"]["settings"]
    start = load_model(settings["weights"])
    if start.config.image_size == settings["image_size"]:
        yield 0, start
    for path in paths:
        yield int(path.name.removeprefix("step-")), restore_model(path)[0].float()  # frozen weights may be bfloat16


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path, metavar="WORLD")
    parser.add_argument("stage", choices=("train_stage1", "train_stage2"))
    args = parser.parse_args(sys.argv[1:3])  # the flags that follow are those of the stage
    sys.argv = sys.argv[2:]
    runpy.run_module(args.stage, run_name="__main__", alter_sys=True)

    out = Path(sys.argv[sys.argv.index("--out") + 1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels: dict[str, Tensor] = {}
    samples, scores = {}, {}
    with user_errors():
        for step, model in models(out):
            if not samples:
                spec = SampleSpec.for_model(model.config, Tokenizer(out))
                samples = {test: read_samples(args.world, test, spec, pixels) for test in TESTS}
            visual = encode(model.to(device), pixels)
            scores[step] = {test: score(model, samples[test], visual) for test in TESTS}
        blank = encode(model, {"": torch.zeros_like(next(iter(pixels.values())))})[""]
        scores[step]["blank"] = score(model, samples["test"], dict.fromkeys(pixels, blank))
        write_json(Path(f"{out}.scores.json"), scores)


if __name__ == "__main__":
    run(main)
