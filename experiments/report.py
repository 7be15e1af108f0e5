"""The page of an experiment: what the paper reports, what was run, final scores, paired differences, learning curves.

    runs/experiments/NAME.md, NAME.json       the page, and its numbers by setup, metric, step and seed
    runs/experiments/NAME-*.png               learning curves and differences
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from command import run
from common.files import read_json, write_json
from data.sources import read_rows
from experiments.lab import LORA_RANK, N_STEP_1, N_STEP_2, N_STEP_LANGUAGE, Lab, Setup
from experiments.lab import create_model, experiment, git_commit, make_parser
from experiments.plots import save_curves, save_differences
from experiments.statistics import Difference, paired_difference
from train_stage1 import choose_trained as choose_stage1
from train_stage2 import choose_trained
from training.flops import train_flops

METRICS = ("objects", "unseen", "reading", "text", "text loss")
CONFLICTS = ("follows the image", "follows the statement")
SELECT: dict[str, tuple[str, Callable[[dict], bool]]] = {  # a test of score.py, and which of its questions count
    "objects": ("test", lambda row: row["kind"] != "word" and row["seen"]),
    "unseen": ("test", lambda row: row["kind"] != "word" and not row["seen"]),
    "reading": ("test", lambda row: row["kind"] == "word"),
    "shapes": ("test", lambda row: row["kind"] == "shape"),
    "text": ("text_test", lambda row: True),
    "objects, blank": ("blank", lambda row: row["kind"] != "word" and row["seen"]),
    "follows the image": ("conflict_image", lambda row: True),
    "follows the statement": ("conflict_text", lambda row: True),
}
SOURCE = {"blank": "test", "conflict_image": "conflict", "conflict_text": "conflict"}  # files of tests
LEARNED = 50  # percent of the words that a model reads when reading counts as learned


@dataclass
class Page:
    """An experiment. pairs: of setups whose difference is reported, first minus second. extra: text for the results."""

    name: str
    doc: str  # of the script: the question, the criterion, what else differs
    setups: dict[str, Setup]
    pairs: list[tuple[str, str]]
    paper: str  # what the paper reports, "" for a question that is not from the papers
    metrics: tuple[str, ...] = METRICS
    extra: Callable[[Lab], str] | None = None


class Results:
    """The scores of an experiment. A question is a number, 100 if it is answered right and 0 if not."""

    def __init__(self, lab: Lab, page: Page):
        self.lab, self.page = lab, page
        self.rows = {
            (test, seed): list(read_rows(lab.out / f"seed{seed}/world/{test}.json"))
            for test in ("test", "text_test", "conflict")
            for seed in lab.seeds
        }
        setups = page.setups.items()
        self.scores = {name: {seed: lab.scores(setup, seed) for seed in lab.seeds} for name, setup in setups}

    def questions(self, name: str, metric: str, step: int | None = None) -> list[list[float]]:
        """For each seed the questions of a metric, after the last step unless given; a loss counts as one question."""
        values = []
        for seed in self.lab.seeds:
            scores = self.scores[name][seed]
            tests = scores[max(scores) if step is None else step]
            if metric.endswith(" loss"):
                values.append([tests["text_test" if metric == "text loss" else "test"]["loss"]])
                continue
            test, select = SELECT[metric]
            rows = self.rows[SOURCE.get(test, test), seed]
            right = tests[test]["right"]
            values.append([100.0 * int(bit) for row, bit in zip(rows, right, strict=True) if select(row)])
        return values

    def curve(self, name: str, metric: str) -> dict[int, list[float]]:
        """By step of training, a number per seed. The steps of stage 1 count, so that a single stage is comparable."""
        setup = self.page.setups[name]
        first = 0 if setup.end_to_end or setup.data == "none" else max(1, round(N_STEP_1 * self.lab.scale))
        steps = self.scores[name][self.lab.seeds[0]]
        return {first + step: list(map(fmean, self.questions(name, metric, step))) for step in steps}

    def learned_after(self, name: str) -> list[str]:
        """For each seed the first tested step after which LEARNED percent of the words are read."""
        curve = self.curve(name, "reading")
        found = []
        for i in range(len(self.lab.seeds)):
            steps = [step for step, values in curve.items() if values[i] >= LEARNED]
            found.append(f"{steps[0]:,}" if steps else f"> {max(curve):,}")
        return found


def format_numbers(numbers: list[float], digits: int = 1) -> str:
    """Mean and sample standard deviation over the seeds, such as "61.2 ± 0.8"."""
    mean = f"{fmean(numbers):.{digits}f}"
    return f"{mean} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def to_markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def costs(setup: Setup) -> tuple[int, float, float]:
    """Visual tokens of an image, and MFLOPs of each stage on an image and 100 text tokens, 20 of them supervised."""
    with torch.device("meta"):
        model = create_model(setup)
    n_visual, flops = model.config.n_visual_tokens, []
    is_frozen = setup.vit == "frozen"
    for choose in (
        lambda: choose_stage1(model, freeze_vit=is_frozen),
        lambda: choose_trained(model, LORA_RANK if setup.lora else 0, 32.0, 0.05, True, freeze_vit=is_frozen),
    ):
        choose()
        flops.append(train_flops(model, 1, [n_visual + 100], 20) / 1e6)
    return n_visual, 0.0 if setup.end_to_end else flops[0], 0.0 if setup.data == "none" else flops[1]


def final_table(results: Results) -> str:
    page, rows = results.page, []
    for name in page.setups:
        cells = []
        for metric in page.metrics:
            cells.append(format_numbers(list(map(fmean, results.questions(name, metric))), digits_of(metric)))
        rows.append([name, *cells, ", ".join(results.learned_after(name))])
    return to_markdown(["", *page.metrics, f"steps until {LEARNED} % are read, per seed"], rows)


def difference_table(page: Page, differences: dict[tuple[str, str], dict[str, Difference]]) -> str:
    rows = []
    for (one, other), by_metric in differences.items():
        cells = []
        for metric, x in by_metric.items():
            d = digits_of(metric)
            cells.append(f"{x.mean:+.{d}f} [{x.low:+.{d}f}, {x.high:+.{d}f}], {x.detectable:.{d}f}")
        rows.append([f"{one} - {other}", *cells])
    return to_markdown(["", *page.metrics], rows)


def cost_table(page: Page) -> str:
    rows = []
    for name, setup in page.setups.items():
        n_visual, stage1, stage2 = costs(setup)
        rows.append([name, f"{n_visual}", f"{stage1:,.0f}", f"{stage2:,.0f}"])
    return to_markdown(["", "visual tokens", "MFLOP per sample of stage 1", "of stage 2"], rows)


def digits_of(metric: str) -> int:
    return 3 if metric.endswith("loss") else 1


def write_page(lab: Lab, page: Page) -> None:
    """Writes the page, its numbers and its charts."""
    results = Results(lab, page)
    curves = {m: {name: results.curve(name, m) for name in page.setups} for m in page.metrics}
    differences = {
        (one, other): {
            m: paired_difference(results.questions(one, m), results.questions(other, m)) for m in page.metrics
        }
        for one, other in page.pairs
    }
    title, _, about = page.doc.partition("\n")
    about = re.sub(r"\n    python .*\n", "", about).strip()
    steps = ", ".join(f"{round(n * lab.scale):,}" for n in (N_STEP_LANGUAGE, N_STEP_1, N_STEP_2))
    made = read_json(lab.out / f"seed1/{next(iter(page.setups.values())).stage2}.run.json")
    parts = [
        f"# {title}",
        about,
        *([f"**The paper reports**\n\n{page.paper.strip()}"] if page.paper else []),
        f"**What was run.** {len(lab.seeds)} seeds, each with {lab.n_image:,} images of its own; steps of the language "
        f"model, stage 1 and stage 2, unless a setup says otherwise: {steps}; {made['device']}, torch {made['torch']}, "
        f"owlet {made['owlet'] or git_commit()}.",
        "**Scores after the last step**: percent of the questions answered exactly, mean ± standard deviation over the "
        f"seeds; loss: nats per token.\n\n{final_table(results)}",
        *([page.extra(lab)] if page.extra else []),
        "**Paired differences**: mean [95 % interval], smallest difference detectable with a power of 80 % "
        f"(Student's t over the seeds).\n\n{difference_table(page, differences)}",
        f"![differences]({page.name}-differences.png)",
        f"**Learning curves**: mean over the seeds, and each seed.\n\n![curves]({page.name}-curves.png)",
        f"**Costs** of an image and 100 text tokens.\n\n{cost_table(page)}",
        "**What this does not show.** All models are tiny and read drawn scenes; the seeds share the vision encoder; "
        "runs are short, so scores compare the speed of learning as much as its result.",
    ]
    (lab.out / f"{page.name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_json(lab.out / f"{page.name}.json", curves)
    save_curves(lab.out / f"{page.name}-curves.png", curves)
    save_differences(lab.out / f"{page.name}-differences.png", differences)
    print(lab.out / f"{page.name}.md")


def main(*pages: Page, doc: str = "") -> None:
    """The command of one or more experiments: makes their runs, then writes their pages."""

    def make() -> None:
        with experiment(make_parser(doc or pages[0].doc).parse_args()) as lab:
            lab.run_setups([setup for page in pages for setup in page.setups.values()])
            for page in pages:
                write_page(lab, page)

    run(make)
