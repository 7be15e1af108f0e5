"""Where does the embedded model stop working? Word length, letter size, new pairs, more objects, other backgrounds.

    python -m experiments.limits                      # 11 minutes on one core; runs/experiments/limits.md
    python -m experiments.limits --questions 20       # to see it work; the intervals are wide

No model is trained. checkpoints/tiny-owl2 answers questions about newly drawn scenes (data/shapes), greedily:

    letter size   each letter centered where training has it; training has 2 and 3 letters, enlarged by 2
    word size     1 to 6 letters, enlarged by 1 to 3 with the spaces between them, so that their places change too
    word place    words of 3 letters, moved by some pixels more than in training; held-out words
    described     the same question about a description in text, without an image
    object place  all objects moved right by some pixels more than in training
    pairs         held-out pairs of shape and color: no image of a scene in training shows them, some texts name them
    objects       1 to 6 objects; training has 1 to 4
    backgrounds   training has one gray of 0 to 60

A cell of a table is a condition, with new scenes and one question per scene. Each question is asked three times: about
its image, about the image of the cell's next question (what the question alone tells), and about a blank image.
Answers must be exactly right. Of words, "first letters" compares at most the first three letters only, because the
language model itself may write no other lengths than it was trained on.

A condition is a limit (marked "below") if its 95 % interval is below the interval of its reference, the condition of
training. It is a failure ("chance") if its interval is not above that of the same questions about other images.
With some 250 cells, a few marks of cells close to their reference are expected by chance.

What else differs: letters that are not enlarged by a whole number have strokes of uneven width. Letters of longer
words, and of larger ones, are at places where training has none; compare with the moved words. With more objects fewer
questions have a unique answer, so questions are drawn per kind. On backgrounds that are not dark all colors have
another contrast; white objects are left out there.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from command import ArgumentParser, run, user_errors

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.files import write_json
from data.image import DEFAULT_FIT, MEAN_COLOR, to_pixels
from data.shapes.prepare import (
    CELL,
    CONSONANTS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    KINDS,
    MAX_SHIFT,
    SEEN_PAIRS,
    SEEN_WORDS,
    VOWELS,
    BalancedSampler,
    Scene,
    Turn,
    draw_object,
    draw_objects,
    draw_word,
    make_scene,
    questions_about,
    render,
    seen_questions,
)
from data.text import Tokenizer
from data.tiny.prepare import EASY_VQA_PAIRS, UNKNOWN, unknown_picture
from evaluation.metrics import Number, percent
from experiments.lab import DEVICE, ROOT, git_commit
from experiments.report import to_markdown
from inference.batch import ask
from inference.fast_decode import FastDecoder
from tools.plot import STYLE
from training.options import positive_int
from weights import load_model

SCALES = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3)  # of letters; at 2 they are 14 x 22 pixels
PITCH = 16  # pixels from one letter to the next in training
LENGTHS = range(1, 7)  # of words
WORD_SETS = {"words of training": SEEN_WORDS, "held-out words": sorted(HELD_OUT_WORDS)}
UNSEEN_PAIRS = HELD_OUT_PAIRS - EASY_VQA_PAIRS
# Questions of these kinds have no unique answer with one object, and with an object in each of the six cells.
MISSING_KINDS = {1: ("relation", "compare"), 6: ("relation",)}
OBJECT_KINDS = tuple(kind for kind in KINDS if kind != "word")
BATCH = 100  # questions

PAPER = """
Neither paper has such a test. The nearest numbers of Owl2 are those of TextVQA, whose letters have more pixels at a
higher resolution, and of data sets that it was not trained on.

| | 224 | 336 | 448 pixels |
|---|---|---|---|
| TextVQA | 42.5 | 49.8 | 54.3 |
| VQAv2 | 76.8 | 78.5 | 79.4 |

Zero-shot: Flickr30K CIDEr 85.1, VizWiz 54.5, ScienceQA-IMG 68.7.
"""


class Case(NamedTuple):
    """A question. context: the image it is about, or a description in text."""

    turn: Turn
    context: Image.Image | str


@dataclass
class Cell:
    """A condition. reference: row and column of the cell that it is compared with. The rest is counted by `measure`."""

    table: str
    row: str
    column: str
    reference: tuple[str, str]
    cases: list[Case]
    right: Counter[str] = field(default_factory=Counter)  # by context, "own", "other" or "blank"
    first_right: Counter[str] = field(default_factory=Counter)  # the first letters only
    wrong: Counter[str] = field(default_factory=Counter)  # answers about the own context

    @property
    def is_varied(self) -> bool:
        """Whether answers differ; if not, other images of the cell have the right answer too."""
        return len({case.turn.answer for case in self.cases}) > 1

    def percent(self, context: str = "own", first: bool = False) -> Number:
        """Right answers. first: compares the first letters only."""
        return percent((self.first_right if first else self.right)[context], len(self.cases))


# --- conditions ---------------------------------------------------------------------------------------

Questions = Callable[[Scene], list[Turn]]


def draw_cases(
    rng: random.Random,
    n: int,
    kinds: tuple[str, ...],
    scene_of: Callable[[], Scene],
    *,
    questions: Questions = seen_questions,
    context_of: Callable[[Scene], Image.Image | str] | None = None,
) -> list[Case]:
    """Returns n questions of these kinds in turn, each about a scene of its own. context_of: draws a scene."""
    sampler, cases = BalancedSampler(rng), []
    while len(cases) < n:
        scene, kind = scene_of(), kinds[len(cases) % len(kinds)]
        for turn in sampler.sample([turn for turn in questions(scene) if turn.kind == kind]):  # one, or none
            cases.append(Case(turn, context_of(scene) if context_of else render(scene, rng)))
    return cases


def random_word(rng: random.Random, length: int) -> str:
    """Consonants and vowels in turn, as in the words of training, which have 2 or 3 letters."""
    return " ".join(rng.choice((CONSONANTS, VOWELS)[k % 2]) for k in range(length))


def top_scene(rng: random.Random, word: str) -> Scene:
    """A scene with objects in the top row only, so that there is room for large letters."""
    scene = make_scene(rng)
    while any(item.row for item in scene.objects):
        scene = make_scene(rng)
    return scene._replace(word=word)


def draw_reading(
    scene: Scene, rng: random.Random, scale: float = 2, pitch: int = PITCH, moved: tuple[int, int] = (0, 0)
) -> Image.Image:
    """Draws a scene with letters of another size or at another place.

    Without `moved`, the first letter is centered where training has it, unless the word would be cut off.
    moved: by pixels beyond the places of training, to the right (negative: left) and down (negative: up).
    """
    image = gray(rng, 0, 60)
    draw_objects(image, scene, rng)
    width, height = round(7 * scale), round(11 * scale)
    dx, dy = moved
    x = 15 + rng.randint(0, 3) if dx == 0 else (15 if dx < 0 else 18) + dx  # centers
    y = 52 + rng.randint(0, 2) if dy == 0 else (52 if dy < 0 else 54) + dy
    x = min(x - width // 2, 64 - word_width(scene.word, scale, pitch))
    draw_word(image, scene.word, x, min(y - height // 2, 64 - height), scale=scale, pitch=pitch)
    return image


def word_width(word: str, scale: float, pitch: int) -> int:
    return pitch * (len(word.split()) - 1) + round(7 * scale)


def reading_cells(rng: random.Random, n: int) -> Iterator[Cell]:
    def cases(words: Callable[[], str], context_of: Callable[[Scene], Image.Image | str]) -> list[Case]:
        scene_of = lambda: top_scene(rng, words())  # noqa: E731
        return draw_cases(rng, n, ("word",), scene_of, questions=questions_about, context_of=context_of)

    for table, pitch_of in {"letter size": lambda scale: PITCH, "word size": lambda scale: round(8 * scale)}.items():
        for scale, length in itertools.product(SCALES, LENGTHS):
            width, pitch = round(7 * scale), pitch_of(scale)
            if pitch >= width and pitch * (length - 1) + width <= 64:
                draw = lambda scene: draw_reading(scene, rng, scale, pitch)  # noqa: E731
                found = cases(lambda: random_word(rng, length), draw)
                yield Cell(table, f"x {scale}", f"{length}", ("x 2", "3"), found)
    for length in LENGTHS:
        found = cases(lambda: random_word(rng, length), lambda scene: scene.description)
        yield Cell("described", "text", f"{length}", ("text", "3"), found)

    words = {name: [word for word in words if len(word.split()) == 3] for name, words in WORD_SETS.items()}
    reference = "0", "left"
    for pixels in range(9):
        for column, moved in {"left": (-pixels, 0), "right": (pixels, 0), "up": (0, -pixels)}.items():
            if column == "right" and pixels == 8:  # the word would be cut off
                continue
            draw = lambda scene: draw_reading(scene, rng, moved=moved)  # noqa: E731
            found = cases(lambda: rng.choice(words["words of training"]), draw)
            yield Cell("word place", f"{pixels}", column, reference, found)
    found = cases(lambda: rng.choice(words["held-out words"]), lambda scene: draw_reading(scene, rng))
    yield Cell("word place", "0, held-out words", "left", reference, found)


def pair_cells(rng: random.Random, n: int) -> Iterator[Cell]:
    def unseen_questions(scene: Scene) -> list[Turn]:
        return [turn for turn in questions_about(scene) if turn.about & UNSEEN_PAIRS]

    rows: dict[str, tuple[Callable[[], Scene], Questions]] = {
        "seen": (lambda: make_scene(rng), seen_questions),
        "one held out": (lambda: make_scene(rng, held_out=True), unseen_questions),
        "all held out": (lambda: make_scene(rng, pairs=sorted(HELD_OUT_PAIRS)), unseen_questions),
    }
    for row, (scene_of, questions) in rows.items():
        for kind in OBJECT_KINDS:
            yield Cell("pairs", row, kind, ("seen", kind), draw_cases(rng, n, (kind,), scene_of, questions=questions))
    for pair in sorted(HELD_OUT_PAIRS):
        name = f"{pair[1]} {pair[0]}" + (" (in easy-VQA)" if pair in EASY_VQA_PAIRS else "")
        questions = lambda scene: [turn for turn in questions_about(scene) if turn.about == {pair}]  # noqa: E731
        for kind in ("color", "shape", "size"):
            found = draw_cases(rng, n, (kind,), rows["one held out"][0], questions=questions)
            yield Cell("pairs", name, kind, ("seen", kind), found)


def place_cells(rng: random.Random, n: int) -> Iterator[Cell]:
    def left_scene() -> Scene:
        """A scene with objects in the left and the middle column."""
        scene = make_scene(rng)
        while any(item.column == 2 for item in scene.objects):
            scene = make_scene(rng)
        return scene

    for pixels in (0, 1, 2, 4, 6, 8):

        def draw(scene: Scene) -> Image.Image:
            image = gray(rng, 0, 60)
            if pixels == 0:
                draw_objects(image, scene, rng)
            else:
                for item in scene.objects:
                    x, y = (CELL // 2 + 1 + CELL * place for place in (item.column, item.row))
                    y += rng.randint(-MAX_SHIFT, MAX_SHIFT)
                    draw_object(ImageDraw.Draw(image), item, x + MAX_SHIFT + pixels, y)
            draw_word(image, scene.word, 8 + rng.randint(0, 3), 41 + rng.randint(0, 2))
            return image

        for kind in ("color", "shape", "size", "count", "there"):
            found = draw_cases(rng, n, (kind,), left_scene, context_of=draw)
            yield Cell("object place", f"{pixels}", kind, ("0", kind), found)


def object_cells(rng: random.Random, n: int) -> Iterator[Cell]:
    def subset_counts(scene: Scene) -> list[Turn]:
        return [turn for turn in seen_questions(scene) if turn.answer not in ("five", "six") and not is_total(turn)]

    def totals(scene: Scene) -> list[Turn]:
        return [turn for turn in questions_about(scene) if is_total(turn)]

    def is_total(turn: Turn) -> bool:
        return turn.question == "how many things are there?"

    for n_object in (None, *range(1, 7)):
        row = "1 to 4" if n_object is None else f"{n_object}"
        scene_of = lambda: make_scene(rng, n_object=n_object)  # noqa: E731
        for kind in KINDS:
            if kind not in MISSING_KINDS.get(n_object, ()):
                questions = subset_counts if kind == "count" else seen_questions
                found = draw_cases(rng, n, (kind,), scene_of, questions=questions)
                yield Cell("objects", row, kind, ("1 to 4", kind), found)
        found = draw_cases(rng, n, ("count",), scene_of, questions=totals)
        yield Cell("objects", row, "total", ("1 to 4", "total"), found)


def gray(rng: random.Random, low: int, high: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (rng.randint(low, high),) * 3)


def one_color(rng: random.Random, high: int) -> Image.Image:
    return Image.new("RGB", (64, 64), tuple(rng.randint(0, high) for _ in range(3)))


def gradient(rng: random.Random, high: int) -> Image.Image:
    """From black to a gray of `high`, in one of four directions."""
    image = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((64, 64))
    return image.point(lambda value: value * high // 255).convert("RGB")


def noise(rng: random.Random, amount: int) -> Image.Image:
    """A gray of training, and in each channel a random number of up to ± amount; negative values become 0."""
    base = rng.randint(0, 60)
    image = Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3))
    return image.point(lambda value: max(0, round(base + amount * (value / 127.5 - 1))))


def leaves(rng: random.Random, high: int) -> Image.Image:
    """A picture of data/tiny to which "I don't know." was the answer in training, darkened to at most `high`."""
    return unknown_picture(rng).point(lambda value: value * high // 255)


BACKGROUNDS: dict[str, Callable[[random.Random], Image.Image]] = {
    "gray 0 to 60": lambda rng: gray(rng, 0, 60),
    "gray 61 to 90": lambda rng: gray(rng, 61, 90),
    "gray 91 to 120": lambda rng: gray(rng, 91, 120),
    "gray 180 to 210": lambda rng: gray(rng, 180, 210),
    "gray 225 to 255": lambda rng: gray(rng, 225, 255),
    "color, each channel 0 to 60": lambda rng: one_color(rng, 60),
    "color, each channel 0 to 120": lambda rng: one_color(rng, 120),
    "gradient 0 to 60": lambda rng: gradient(rng, 60),
    "gradient 0 to 120": lambda rng: gradient(rng, 120),
    "noise ± 10": lambda rng: noise(rng, 10),
    "noise ± 30": lambda rng: noise(rng, 30),
    "noise ± 60": lambda rng: noise(rng, 60),
    "leaves, dark (0 to 60)": lambda rng: leaves(rng, 60),
    "leaves": lambda rng: leaves(rng, 255),
}


def background_cells(rng: random.Random, n: int) -> Iterator[Cell]:
    pairs = [pair for pair in SEEN_PAIRS if pair[1] != "white"]
    for name, background in BACKGROUNDS.items():

        def draw(scene: Scene) -> Image.Image:
            image = background(rng)
            draw_objects(image, scene, rng)
            draw_word(image, scene.word, 8 + rng.randint(0, 3), 41 + rng.randint(0, 2))
            return image

        for column, kinds in {"objects": OBJECT_KINDS, "word": ("word",)}.items():
            found = draw_cases(rng, n, kinds, lambda: make_scene(rng, pairs=pairs), context_of=draw)
            yield Cell("backgrounds", name, column, ("gray 0 to 60", column), found)


def all_cells(seed: int, n: int) -> list[Cell]:
    """Draws all conditions, with n questions in each."""
    rng = random.Random(seed)
    parts = (reading_cells, place_cells, pair_cells, object_cells, background_cells)
    return [cell for part in parts for cell in part(rng, n)]


# --- answers ------------------------------------------------------------------------------------------


def answer(
    decoder: FastDecoder, tokenizer: Tokenizer, turns: Iterable[Turn], contexts: list[Image.Image | str]
) -> list[str]:
    """Answers questions about images or descriptions, greedily. The contexts are all of one type."""
    config, answers = decoder.model.config, []
    is_text = isinstance(contexts[0], str)
    questions = [(context if is_text else "<image>") + turn.question for turn, context in zip(turns, contexts)]
    for start in range(0, len(questions), BATCH):
        part = slice(start, start + BATCH)
        fit = DEFAULT_FIT[config.variant]
        images = [] if is_text else [to_pixels(image, config.image_size, fit) for image in contexts[part]]
        answers += ask(decoder, tokenizer, questions[part], images, max_new_tokens=16)
    return answers


def starts_right(text: str, truth: str) -> bool:
    """Whether an answer begins with the letters of a word, or with the first three of a longer one."""
    letters = truth.split()[:3]
    return text.split()[: len(letters)] == letters


def measure(cell: Cell, decoder: FastDecoder, tokenizer: Tokenizer) -> None:
    """Asks the questions of a cell, with all three contexts, and counts the right answers."""
    turns, own = zip(*cell.cases)
    blank = "" if isinstance(own[0], str) else Image.new("RGB", (64, 64), MEAN_COLOR)
    for name, contexts in {"own": own, "other": own[1:] + own[:1], "blank": (blank,) * len(own)}.items():
        pairs = list(zip(answer(decoder, tokenizer, turns, list(contexts)), turns))
        cell.right[name] = sum(text == turn.answer for text, turn in pairs)
        cell.first_right[name] = sum(starts_right(text, turn.answer) for text, turn in pairs)
        if name == "own":
            cell.wrong.update(text for text, turn in pairs if text != turn.answer)


# --- the page -----------------------------------------------------------------------------------------


def rows_and_columns(cells: dict[tuple[str, str], Cell]) -> tuple[list[str], list[str]]:
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells))
    return rows, columns


def table(cells: list[Cell], name: str, first: bool = False) -> str:
    """Percent right [95 % interval], percent right with another image. first: compares the first letters only."""
    found = {(cell.row, cell.column): cell for cell in cells if cell.table == name}
    rows, columns = rows_and_columns(found)
    lines = []
    for row in rows:
        line = [row]
        for column in columns:
            if (row, column) not in found:
                line.append("")
                continue
            cell = found[row, column]
            number, reference = cell.percent(first=first), found[cell.reference].percent(first=first)
            text = f"{number.value:.1f} [{number.interval[0]:.0f}, {number.interval[1]:.0f}]"
            if cell.is_varied:
                other = cell.percent("other", first)
                text += f", {other.value:.0f}"
                if number.interval[0] <= other.interval[1]:
                    line.append(text + " **chance**")
                    continue
            line.append(text + (" **below**" if number.interval[1] < reference.interval[0] else ""))
        lines.append(line)
    return to_markdown(["", *columns], lines)


def wrong_table(cells: list[Cell]) -> str:
    """The most frequent wrong answers where at most half is right; not of words in images, which are all different."""
    lines = []
    for cell in cells:
        if cell.percent().value <= 50 and not cell.table.startswith(("letter", "word")) and cell.column != "word":
            n_unknown = cell.wrong[UNKNOWN]
            wrong = [f"{text} ({n})" for text, n in cell.wrong.most_common(4) if text != UNKNOWN]
            lines.append([f"{cell.table}: {cell.row}, {cell.column}", f"{n_unknown}", ", ".join(wrong[:3])])
    return to_markdown(["condition", f'"{UNKNOWN}"', "other wrong answers (how many)"], lines)


def save_heatmaps(path: Path, cells: list[Cell]) -> None:
    """A panel per table, with percent right in each cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"letter size": True, "word size": True, "word place": False, "object place": False}
    panels |= {"objects": False, "pairs": False, "backgrounds": False, "described": True}
    with pyplot.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = pyplot.subplots(4, 2, figsize=(11, 15), layout="constrained")
        for axis, (name, first) in zip(axes.flat, panels.items()):
            found = {(cell.row, cell.column): cell for cell in cells if cell.table == name}
            rows, columns = rows_and_columns(found)
            values = torch.full((len(rows), len(columns)), torch.nan)
            for (row, column), cell in found.items():
                i, j = rows.index(row), columns.index(column)
                values[i, j] = cell.percent(first=first).value
                axis.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", fontsize=9)
            axis.imshow(values, cmap="Blues", vmin=0, vmax=140, aspect="auto")  # black text is readable on all
            axis.set_xticks(range(len(columns)), columns, fontsize=8)
            axis.set_yticks(range(len(rows)), rows, fontsize=8)
            axis.set_title(f"{name}: at most three letters" if first else name, fontsize=10)
        figure.savefig(path, dpi=70)
        pyplot.close(figure)


def to_json(cell: Cell) -> dict:
    counts = {"n": len(cell.cases), "right": cell.right, "first_letters_right": cell.first_right}
    counts["wrong"] = cell.wrong.most_common(5)
    return {"table": cell.table, "row": cell.row, "column": cell.column} | counts


def write_page(out: Path, cells: list[Cell], weights: Path, seed: int) -> None:
    """Writes the page, its numbers and its chart."""
    title, _, about = __doc__.partition("\n")
    about = re.sub(r"\n(    python .*\n)+", "", about).strip()
    n = len(cells[0].cases)
    n_blank = sum(cell.right["blank"] for cell in cells)
    half = (percent(n // 2, n).interval[1] - percent(n // 2, n).interval[0]) / 2
    parts = [
        f"# {title}",
        about,
        f"**The papers report**\n\n{PAPER.strip()}",
        f"**What was run.** {weights.name}, seed {seed}: {len(cells)} conditions of {n} questions, so a 95 % interval "
        f"(Wilson) is at most ± {half:.1f} points; {DEVICE}, torch {torch.__version__}, owlet {git_commit()}. With "
        f"blank images {n_blank} of {n * len(cells):,} answers are right.",
        "In the tables: percent right [95 % interval], percent right with the image of another question of the cell "
        "(unless all have the same answer).",
        "**Letter size (rows) and number of letters (columns)**, each letter centered where training has it; the first "
        "three letters compared\n\n" + table(cells, "letter size", first=True),
        "**Word size (rows) and number of letters (columns)**, with the spaces enlarged; the first three letters "
        "compared\n\n" + table(cells, "word size", first=True),
        "**The same, the whole word compared**\n\n" + table(cells, "word size"),
        "**Word place: pixels (rows) by which the word is moved beyond the places of training**\n\n"
        + table(cells, "word place"),
        "**Described: the word of a scene that is described in text**, whole; below, at most three letters\n\n"
        + table(cells, "described")
        + "\n\n"
        + table(cells, "described", first=True),
        "**Object place: pixels (rows) by which all objects are moved beyond the places of training**\n\n"
        + table(cells, "object place"),
        "**Pairs: by kind of question; below, by held-out pair**\n\n" + table(cells, "pairs"),
        '**Objects: their number (rows)**; "count" asks for the number of a shape or color, up to four, "total" for '
        "that of all\n\n" + table(cells, "objects"),
        "**Backgrounds**\n\n" + table(cells, "backgrounds"),
        "![percent right in all conditions](limits.png)",
        "**Wrong answers** where at most half is right, of " + f"{n}\n\n" + wrong_table(cells),
        "**What this does not show.** It is one model of one training run, and it reads drawn scenes only. Intervals "
        "cover the questions, not other seeds of training. A limit is that of vision encoder, abstractor and language "
        "model together; only the described words separate the language model.",
    ]
    (out / "limits.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_json(out / "limits.json", {"seed": seed, "n": n, "cells": [to_json(cell) for cell in cells]})
    save_heatmaps(out / "limits.png", cells)
    print(out / "limits.md")


def main() -> None:
    p = ArgumentParser(prog="python -m experiments.limits", description=__doc__)
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "experiments", help="folder (default: %(default)s)")
    p.add_argument("--weights", type=Path, default=ROOT / "checkpoints" / "tiny-owl2", help="(default: %(default)s)")
    p.add_argument("--questions", type=positive_int, default=200, metavar="N", help="per cell (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of scenes and questions (default: %(default)s)")
    args = p.parse_args()
    with user_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        decoder, tokenizer = FastDecoder(load_model(args.weights)), Tokenizer(args.weights)
        cells = all_cells(args.seed, args.questions)
        for cell in tqdm(cells, unit="condition", disable=None):
            measure(cell, decoder, tokenizer)
        write_page(args.out, cells, args.weights, args.seed)


if __name__ == "__main__":
    run(main)
