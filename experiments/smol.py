"""What does learning to see cost a real language model? (Owl1 section 3.2, Owl2 sections 3.2 and 3.3)

    python -m experiments.smol --seeds 1              # 3 runs of stage 1, 8 of stage 2: over an hour on two cores
    python -m experiments.smol --seeds 1 --scale 0.05 --out runs/try          # to see it work

    SmolLM2 (data.smollm.prepare), drawn scenes in natural English (data.smollm.scenes)
      | train_stage1      owl1, owl2, owl2-plain            the language model is frozen
      | train_stage2      seed1/owl1-lora-images, ...       on questions about images, with or without text
      v
    tools.text_ability    NAME-text.json                    perplexity and 200 questions
    evaluate              NAME-test.jsonl                   400 questions about images

Owl1 trains LoRA adapters or everything in stage 2, Owl2 everything, with the modality-adaptive module or without it.
The papers' claims: the frozen language model keeps its text ability in stage 1; text-only data in stage 2 keep it; the
module reduces what images cost. Stage 2 has as many steps in all setups, so a run with text sees fewer images: a third
of its samples are text.

What differs besides: LoRA has a learning rate of its own. With the module, stage 1 also trains the visual half of the
decoder's module. Runs are short, a fifth of those of `make smol-owl1`, so they show how fast the text ability moves,
not where it ends. A seed decides the order of the samples in stage 2; all seeds share stage 1.
"""

import json
from functools import partial
from itertools import product
from typing import NamedTuple

from command import run
from common.files import read_json
from evaluation.scoring import is_exact_match
from experiments.lab import ROOT, Lab, experiment, make_parser
from experiments.report import format_numbers, to_markdown

STARTS = ("owl1", "owl2", "owl2-plain")  # presets smol-...
COMMON = ["--image-size", "64", "--batch", "8", "--micro-batch", "8", "--vit-lr-decay", "1", "--crop-scale", "0"]
COMMON += ["--max-length", "256", "--precision", "bf16"]
STAGE1 = ["--warmup", "20", "--lr", "1e-3", "--min-lr", "5e-5", "--vit-lr", "3e-4"]
STAGE1 += ["--vision", str(ROOT / "checkpoints" / "tiny-owl2")]
LORA = ["--train-abstractor", "--lr", "1e-3", "--min-lr", "1e-5"]
EVERYTHING = ["--lora-rank", "0", "--lr", "2e-4", "--min-lr", "2e-6"]
N_STEP_1, N_STEP_2 = 150, 80
N_TEST = 400


class Setup(NamedTuple):
    """One run of stage 2."""

    start: str  # of STARTS
    lora: bool
    text: bool  # whether text-only data are mixed in

    @property
    def name(self) -> str:
        return f"{self.start}-{'lora' if self.lora else 'all'}-{'text' if self.text else 'images'}"


SETUPS = [
    *(Setup("owl1", lora, text) for lora, text in product((True, False), (True, False))),
    *(Setup(start, False, text) for start, text in product(("owl2", "owl2-plain"), (True, False))),
]


def run_stage1(lab: Lab, start: str) -> None:
    """Makes the data and the language model if they are missing, runs stage 1 and measures the text ability."""
    lab.run_once("smollm2", "data.smollm.prepare", "--out", "smollm2")
    lab.run_once("scenes", "data.smollm.scenes", "--out", "scenes", "--images", str(lab.n_image))
    flags = ["--preset", f"smol-{start}", "--llama", "smollm2", "--data", "scenes/captions.json", *STAGE1]
    lab.train(["train_stage1"], start, N_STEP_1, *flags, common=COMMON)
    measure(lab, start)


def run_stage2(lab: Lab, setup: Setup, seed: int) -> None:
    name = f"seed{seed}/{setup.name}"
    mix = ["scenes/train.json:2", *(["scenes/text.json:1"] if setup.text else [])]
    flags = ["--weights", setup.start, "--mix", *mix, "--warmup", "10", "--seed", str(seed)]
    flags += LORA if setup.lora else EVERYTHING
    lab.train(["train_stage2"], name, N_STEP_2, *flags, common=COMMON)
    measure(lab, name)
    flags = ["--weights", name, "--data", "scenes/test.json", "--limit", str(N_TEST), "--precision", "bf16"]
    lab.run_once(f"{name}-test", "evaluate", *flags, "--batch", "32", "--out", f"{name}-test.jsonl")


def measure(lab: Lab, name: str) -> None:
    flags = ["--weights", name, "--questions", "scenes/text_test.json", "--device", "auto"]
    lab.run_once(f"{name}-text", "tools.text_ability", *flags, "--out", f"{name}-text.json")


def scores(lab: Lab, name: str) -> dict[str, float]:
    """The numbers of one run; without questions about images for stage 1, whose models only write captions."""
    text = read_json(lab.out / f"{name}-text.json")
    n_right, n = text["right"]["all questions"]
    row = {"perplexity": text["perplexity"], "text questions, %": 100 * n_right / n}
    answers = lab.out / f"{name}-test.jsonl"
    if answers.exists():
        rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        right = [is_exact_match(row["answer"], row["truth"]) for row in rows]
        row["image questions, %"] = 100 * sum(right) / len(right)
    return row


def table(lab: Lab, head: str, names: dict[str, list[str]]) -> str:
    """Mean and standard deviation of each number. names: of the runs of each row."""
    cells = []
    for row, runs in names.items():
        numbers = [scores(lab, name) for name in runs]
        columns = list(numbers[0])
        cells.append([row, *(format_numbers([run[column] for run in numbers]) for column in columns)])
    return to_markdown([head, *columns], cells)


def main() -> None:
    with experiment(make_parser(__doc__).parse_args()) as lab:
        lab.run_parallel([partial(run_stage1, lab, start) for start in STARTS])
        lab.run_parallel([partial(run_stage2, lab, setup, seed) for seed in lab.seeds for setup in SETUPS])
        stage2 = {setup.name: [f"seed{seed}/{setup.name}" for seed in lab.seeds] for setup in SETUPS}
        tables = table(lab, "after stage 1", {start: [start] for start in STARTS}), table(lab, "after stage 2", stage2)
        (lab.out / "smol.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
        print(*tables, sep="\n\n")


if __name__ == "__main__":
    run(main)
