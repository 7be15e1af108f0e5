"""The drawn world: its pictures read again from their pixels, its questions answered again by other code."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from sentencepiece import SentencePieceProcessor

from data.conversations import Conversations, Skipped
from data.shapes.prepare import WORDS
from data.text import Tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "data" / "shapes" / "prepare.py"

COLORS = {
    (230, 40, 40): "red",
    (30, 180, 60): "green",
    (50, 80, 255): "blue",
    (250, 220, 30): "yellow",
    (170, 50, 210): "purple",
    (255, 255, 255): "white",
}
SHAPES = ["circle", "square", "triangle", "cross", "ring", "bar"]
HELD_PAIRS = {("red", "circle"), ("green", "square"), ("blue", "triangle"),
              ("yellow", "cross"), ("purple", "ring"), ("white", "bar")}  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four"]
LETTERS = "BGKLMPSTAEOU"
TRAINING = ["stage0", "stage0_val", "captions", "captions_val", "train", "val", "text", "text_val"]
TESTS = ["test", "text_test", "conflict"]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    process = run("--out", out, "--images", 1200)
    assert process.returncode == 0, process.stderr
    for name in TRAINING + TESTS:
        assert f"{name}.json: {len(read(out, name)):,} samples" in process.stdout
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small")
    assert run("--out", out, "--images", 40).returncode == 0
    return out


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def turns_of(sample: dict) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in sample["conversations"]]
    return list(zip(values[0::2], values[1::2], strict=True))


def split(text: str) -> tuple[str, str]:
    """A question's statements (or description), and what is asked."""
    before, _, question = text.removeprefix("<|image|>").rpartition(". ")
    return before, question


# ----------------------------------------------------------------------------------------------------------------------
# What a picture shows, from its pixels


def see(path: Path) -> tuple[list[tuple[str, str, str, int, int]], str]:
    """(things as (size, color, shape, column, row) in reading order, the word). Asserts that all is recognised."""
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (64, 64, 3)
    things = []
    for row in range(2):
        for column in range(3):
            cell = pixels[1 + 21 * row : 22 + 21 * row, 1 + 21 * column : 22 + 21 * column]
            colors = {tuple(color) for color in cell.reshape(-1, 3).tolist()} & set(COLORS)
            assert len(colors) <= 1
            for color in colors:
                mask = (cell == color).all(axis=2)
                mask = mask[mask.any(axis=1)][:, mask.any(axis=0)]
                size = {17: "big", 9: "small"}[mask.shape[1]]
                things.append((size, COLORS[color], shape_of(mask), column, row))
    return things, word_of((pixels == 150).all(axis=2))


def shape_of(mask: np.ndarray) -> str:
    """mask: [height, width] bool, cut to what is drawn."""
    height, width = mask.shape
    if 2 * height < width:
        assert mask.all()
        return "bar"
    assert height == width
    if mask.all():
        return "square"
    if not mask[height // 2, width // 2]:
        return "ring"
    if mask[-1].all() and mask[0].sum() <= 2:
        return "triangle"
    if mask[height // 2].all() and mask[:, width // 2].all():
        assert not mask[[0, 0, -1, -1], [0, -1, 0, -1]].any()
        return "circle" if mask.mean() > 0.7 else "cross"
    raise AssertionError("no shape is like this")


def word_of(ink: np.ndarray) -> str:
    """ink: [64, 64] bool. Compares each letter's place with all letters of the font."""
    glyphs = {}
    for letter in LETTERS:
        glyph = Image.new("1", (7, 11))
        ImageDraw.Draw(glyph).text((0, 0), letter, fill=1, font=ImageFont.load_default_imagefont())
        glyphs[(np.asarray(glyph.convert("L")) > 0)[3:9].tobytes()] = letter
    glyphs[np.zeros((6, 7), dtype=bool).tobytes()] = ""
    assert len(glyphs) == len(LETTERS) + 1
    top = int(np.flatnonzero(ink.any(axis=1))[0])
    for left in range(8, 12):
        places = [ink[top : top + 12 : 2, left + 16 * k : left + 16 * k + 14 : 2] for k in range(3)]
        letters = [glyphs.get(place.tobytes()) for place in places]
        if None not in letters and len("".join(letters)) > 1:
            return " ".join(letters).strip()
    raise AssertionError("no word is like this")


def answer(question: str, things: list[tuple[str, str, str, int, int]], word: str) -> str:
    """The answer to any question about a picture. Asserts that it takes nothing wrong for granted."""

    def named(name: str) -> list[tuple[str, str, str, int, int]]:
        """Those that "red circle", "red thing", "circles", "things" may mean."""
        wanted = {re.sub("(?<=s)es$|(?<!s)s$", "", word) for word in name.split()} - {"thing"}
        assert wanted <= {*COLORS.values(), *SHAPES}
        return [thing for thing in things if wanted <= set(thing)]

    def one(name: str) -> tuple[str, str, str, int, int]:
        (thing,) = named(name)
        return thing

    if question == "what word is written?":
        return word
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        return one(match[1])[1]
    if match := re.fullmatch(r"what shape is the (\w+ thing)\?", question):
        return one(match[1])[2]
    if match := re.fullmatch(r"how many (.*) are there\?", question):
        return NUMBERS[len(named(match[1]))]
    if match := re.fullmatch(r"is the (\w+ \w+) big or small\?", question):
        return one(match[1])[0]
    if match := re.fullmatch(r"is there a (\w+ \w+)\?", question):
        return "yes" if named(match[1]) else "no"
    if match := re.fullmatch(r"which is bigger, the (\w+) or the (\w+) thing\?", question):
        sizes = {one(color)[0]: color for color in match.groups()}
        assert set(sizes) == {"big", "small"}
        return sizes["big"]
    match = re.fullmatch(r"what (color|shape) is (left of|right of|above|below) the (.*)\?", question)
    _, _, _, column, row = one(match[3])
    beyond = {
        "left of": [thing for thing in things if thing[3] < column],
        "right of": [thing for thing in things if thing[3] > column],
        "above": [thing for thing in things if thing[4] < row],
        "below": [thing for thing in things if thing[4] > row],
    }[match[2]]
    ((_, color, shape, _, _),) = beyond
    return color if match[1] == "color" else shape


def caption(things: list[tuple[str, str, str, int, int]], word: str) -> str:
    columns, rows = ("left", "middle", "right"), ("top", "bottom")
    names = [f"a {size} {color} {shape} {rows[y]} {columns[x]}, " for size, color, shape, x, y in things]
    return f"{''.join(names)}the word {word}."


def test_answers_are_what_the_pixels_show(shapes):
    n_question = Counter()
    for name, n in (("train", 150), ("val", 30), ("test", 10_000)):
        for sample in read(shapes, name)[:n]:
            things, word = see(shapes / sample["image"])
            assert 1 <= len(things) <= 4
            for text, given in turns_of(sample):
                statement, question = split(text)
                assert answer(question, things, word) == given
                assert not statement or statement.endswith((f" is {given}", f" is a {given}"))
                n_question[name] += 1
    assert n_question["train"] > 900 and n_question["test"] > 700
    for sample in read(shapes, "captions")[:150]:
        ((request, given),) = turns_of(sample)
        assert request == "<|image|>Provide a one-sentence caption for the provided image."
        assert given == caption(*see(shapes / sample["image"]))


def test_described_pictures_have_right_answers(shapes):
    n_described = 0
    for sample in read(shapes, "stage0"):
        (first, given), *others = turns_of(sample)
        if not first.startswith("The image shows "):
            continue
        description, question = split(first)
        *names, word = description.removeprefix("The image shows ").split(", ")
        word = word.removeprefix("the word ")
        things = []
        for name in names:
            _, size, color, shape, row, column = name.split()
            things.append((size, color, shape, ["left", "middle", "right"].index(column), row == "bottom"))
        for question, given in [(question, given), *others]:
            asked_for_caption = question.startswith("Provide")
            assert given == (caption(things, word) if asked_for_caption else answer(question, things, word))
            n_described += 1
    assert n_described > 3000


def test_conflicting_statements(shapes):
    kinds = Counter()
    for sample in read(shapes, "conflict"):
        ((text, given),) = turns_of(sample)
        statement, question = split(text)
        assert answer(question, *see(shapes / sample["image"])) == given == sample["image_answer"]
        assert statement.endswith((f" is {sample['text_answer']}", f" is a {sample['text_answer']}"))
        assert sample["text_answer"] != given
        kinds[sample["kind"]] += 1
    assert set(kinds) == {"color", "shape", "count", "relation", "size", "word"}


# ----------------------------------------------------------------------------------------------------------------------
# What is kept for the test


def spoken_pairs(text: str, given: str) -> set[tuple[str, str]]:
    """The pairs of (color, shape) that a question and its answer speak of together."""
    pairs = set(re.findall(rf"({'|'.join(COLORS.values())}) ({'|'.join(SHAPES)})\b", text))
    pairs |= {(color, shape) for shape, color in re.findall(r"The (\w+) is (\w+)\.", text)}
    pairs |= set(re.findall(r"The (\w+) thing is a (\w+)\.", text))
    if match := re.search(r"what color is the (\w+)\?$", text):
        pairs.add((given, match[1]))
    if match := re.search(r"what shape is the (\w+) thing\?$", text):
        pairs.add((match[1], given))
    return {(color, shape) for color, shape in pairs if shape in SHAPES}


def words_in(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z](?: [A-Z])+\b", text))


def test_no_training_file_has_what_is_held_out(shapes):
    test = read(shapes, "test")
    held_words = {given for sample in test for _, given in turns_of(sample) if not sample["seen"]} - {""}
    held_words = {given for given in held_words if words_in(given)}
    assert len(held_words) > 25
    words = set()
    pairs = set()
    for name in TRAINING:
        for sample in read(shapes, name):
            for text, given in turns_of(sample):
                pairs |= spoken_pairs(text, given) | spoken_pairs(given, "")
                words |= words_in(text) | words_in(given)
    assert len(pairs) == 30  # all others
    assert not pairs & HELD_PAIRS
    assert not words & held_words
    assert all({word.split()[k] for word in words if len(word) == 5} >= set("BGKLMPST") for k in (0, 2))
    assert {word.split()[1] for word in words} == set("AEOU")

    for path in sorted((shapes / "images" / "train").iterdir())[:300]:
        things, word = see(path)
        assert not HELD_PAIRS & {(color, shape) for _, color, shape, _, _ in things}
        assert word not in held_words


def test_unseen_questions_are_about_what_is_held_out(shapes):
    kinds = defaultdict(set)
    for sample in read(shapes, "test"):
        ((text, given),) = turns_of(sample)
        things, word = see(shapes / sample["image"])
        held = HELD_PAIRS & {(color, shape) for _, color, shape, _, _ in things}
        assert len(held) == (not sample["seen"])
        pairs = spoken_pairs(text.removeprefix("<|image|>"), given)
        if pairs:
            assert bool(pairs & HELD_PAIRS) != sample["seen"]
        kinds[sample["seen"]].add(sample["kind"])
    assert kinds[True] == kinds[False] == {"color", "shape", "count", "relation", "size", "compare", "there", "word"}


def test_files_share_no_images(shapes):
    images = {name: {sample["image"] for sample in read(shapes, name)} for name in ("train", "val", "test", "conflict")}
    assert len(images["train"]) == 1200 and len(images["val"]) == 30 and len(images["test"]) == 120
    assert not images["train"] & images["val"]
    assert not images["test"] & (images["train"] | images["val"])
    assert images["conflict"] < images["test"]
    for name in ("train", "val"):
        captions = "captions" if name == "train" else "captions_val"
        assert {sample["image"] for sample in read(shapes, captions)} == images[name]


def test_text_part(shapes):
    trained = defaultdict(set)  # question -> answers
    introductions = set()
    for name in ("text", "text_val", "stage0", "stage0_val"):
        for sample in read(shapes, name):
            for text, given in turns_of(sample):
                before, question = split(text)
                trained[question].add(given)
                introductions.add(before)
    kinds = Counter()
    for sample in read(shapes, "text_test"):
        assert "image" not in sample
        ((text, given),) = turns_of(sample)
        before, question = split(text)
        kinds[sample["kind"]] += 1
        if sample["kind"] == "sum":
            assert question not in trained
            a, b = map(int, re.findall(r"\d", question))
            assert str((a + b) % 10) == given
            other = question.replace(str(a), "x").replace(str(b), str(a)).replace("x", str(b))
            assert trained[other] == {given}
        elif sample["kind"] == "fact":
            assert question not in trained
            animal = re.findall(r"\b(?:the|a) (\w+)", question.replace("hungry ", ""))[-1]
            known = [answers for other, answers in trained.items() if animal in re.findall(r"\w+", other)]
            assert len(known) <= 9  # three of the five phrasings of each relation
            assert 1 <= known.count({given}) <= 3
        elif sample["kind"] == "named":
            assert before not in introductions
            assert question in trained
            name, animal = re.fullmatch(r"(\w+) is a (\w+)", before).groups()
            form = question.replace(name, f"the {animal}")
            assert trained.get(form, {given}) == {given}
        else:
            assert any(statement.endswith(f" {given}") for statement in before.split(". "))
    assert kinds == {"fact": 192, "named": 192, "sum": 135, "told": 30}


def test_blind_answers_are_seldom_right(shapes):
    kind_of = {}  # by how a question begins
    for sample in read(shapes, "test"):
        question = split(turns_of(sample)[0][0])[1]
        kind_of[" ".join(question.split()[:3])] = sample["kind"]
    answers = defaultdict(Counter)  # question -> its answers
    n_stated = 0
    for sample in read(shapes, "train"):
        for text, given in turns_of(sample):
            before, question = split(text)
            answers[question][given] += 1
            n_stated += bool(before)
    assert 0.05 < n_stated / sum(map(Counter.total, answers.values())) < 0.1
    asked = Counter()
    right = Counter()
    for question, counts in answers.items():
        if re.match("what (color|shape) is (left|right|above|below)", question):
            kind = "relation"
        else:
            kind = kind_of[" ".join(question.split()[:3])]
        asked[kind] += counts.total()
        right[kind] += max(counts.values())
    share = {kind: right[kind] / asked[kind] for kind in asked}
    limits = {"color": 0.3, "shape": 0.3, "count": 0.4, "relation": 0.4, "word": 0.03}
    limits |= {"size": 0.55, "there": 0.55, "compare": 0.6}
    assert set(share) == set(limits)
    assert all(share[kind] <= limits[kind] for kind in share), share

    # Nor does it help to answer always the same.
    of_kind = defaultdict(Counter)
    for sample in read(shapes, "test"):
        of_kind[sample["kind"]][turns_of(sample)[0][1]] += 1
    for kind in ("size", "there"):
        assert max(of_kind[kind].values()) <= 0.6 * of_kind[kind].total()
    assert max(of_kind["count"].values()) <= 0.35 * of_kind["count"].total()


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_all_files_load(small):
    tokenizer = Tokenizer(small / "tokenizer.model")
    assert tokenizer.vocab_size <= 640
    for name in TRAINING + TESTS:
        data = Conversations(small / f"{name}.json", tokenizer, "owl2", 9, 64, 256, "square")
        assert len(data) > 0
        for index in range(len(data)):
            sample = data[0, index]
            assert not isinstance(sample, Skipped), sample
            assert sample.n_cut == 0
    for word in WORDS:
        assert len(tokenizer.encode(f"word {word}")) - len(tokenizer.encode("word")) == len(word.split())


def test_same_seed_same_files(small, tmp_path):
    command = [sys.executable, "-m", "data.shapes.prepare", "--out", str(tmp_path / "again"), "--images", "40"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=120)
    first, second = (SentencePieceProcessor(model_file=str(f / "tokenizer.model")) for f in (small, tmp_path / "again"))
    assert [first.id_to_piece(i) for i in range(len(first))] == [second.id_to_piece(i) for i in range(len(second))]
    assert run("--out", tmp_path / "other", "--images", 40, "--seed", 1).returncode == 0

    def hashes(folder: Path) -> dict[str, str]:
        # The tokenizer's file names the folder that it was made in.
        paths = [path for path in folder.rglob("*") if path.suffix in (".json", ".png")]
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    assert hashes(small) == hashes(tmp_path / "again")
    assert len(hashes(small)) == len(TRAINING) + len(TESTS) + 40 + 1 + 2 + 2
    other = hashes(tmp_path / "other")
    assert all(other[f"{name}.json"] != hashes(small)[f"{name}.json"] for name in TRAINING + TESTS)


def test_texts_and_pixels_are_the_same_everywhere(small):
    """What another machine, or another Pillow, has to come to as well."""
    digest = hashlib.sha256()
    for name in TRAINING + TESTS:
        digest.update(json.dumps(read(small, name)).encode())
    for path in sorted((small / "images").rglob("*.png")):
        digest.update(Image.open(path).tobytes())
    assert digest.hexdigest()[:16] == "feb7a27bb096a5de"


@pytest.mark.parametrize("arguments, words", [(["--images", "39"], "40 or more"), (["--out", "FILE"], "cannot write")])
def test_mistakes_are_a_sentence(tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    process = run("--out", tmp_path / "out", *(str(tmp_path / "file") if a == "FILE" else a for a in arguments))
    assert process.returncode == 2
    assert process.stderr.startswith("error: ") and len(process.stderr.splitlines()) == 1
    assert words in process.stderr
    assert not (tmp_path / "out").exists()
