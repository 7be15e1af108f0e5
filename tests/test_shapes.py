"""The shapes data set: other code reads the images from their pixels and answers the questions again."""

import functools
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data import CAPTION_REQUEST
from data.conversations import Conversations, SampleSpec, Skipped
from data.shapes import prepare
from data.shapes.prepare import HELD_OUT_PAIRS, HELD_OUT_WORDS, KINDS, NUMBERS, SHAPES, WORDS
from data.text import Tokenizer
from runs import run_main
from test_prepare import assert_user_error, turns_of

COLORS = {rgb: name for name, rgb in prepare.COLORS.items()}
HELD_OUT = {(color, shape) for shape, color in HELD_OUT_PAIRS}
TRAINING = ["stage0", "stage0_val", "captions", "captions_val", "train", "val", "text", "text_val"]
TESTS = ["test", "text_test", "conflict"]

Object = tuple[str, str, str, int, int]  # size, color, shape, column, row


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    code, stdout, stderr = run_main(prepare.main, "--out", out, "--images", 800)
    assert code == 0, stderr
    assert all(f"{name}.json: {len(read(out, name)):,} samples" in stdout for name in TRAINING + TESTS)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small")
    run_main(prepare.main, "--out", out, "--images", 40)
    return out


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def turns_in(folder: Path, name: str) -> list[tuple[str, str]]:
    return [turn for sample in read(folder, name) for turn in turns_of(sample)]


def split(text: str) -> tuple[str, str]:
    """Returns (statements or description, question)."""
    before, _, question = text.removeprefix("<|image|>").rpartition(". ")
    return before, question


@functools.cache
def recognize(path: Path) -> tuple[list[Object], str]:
    """Returns the objects in reading order and the word. Asserts that everything is recognized."""
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (64, 64, 3)
    objects = []
    for row in range(2):
        for column in range(3):
            cell = pixels[1 + 21 * row : 22 + 21 * row, 1 + 21 * column : 22 + 21 * column]
            colors = {tuple(color) for color in cell.reshape(-1, 3).tolist()} & set(COLORS)
            assert len(colors) <= 1
            for color in colors:
                mask = crop((cell == color).all(axis=2))
                objects.append(({17: "big", 9: "small"}[mask.shape[1]], COLORS[color], shape_of(mask), column, row))
    return objects, words_by_pixels()[crop((pixels == 150).all(axis=2)[::2, ::2]).tobytes()]


def shape_of(mask: np.ndarray) -> str:
    """mask: [height, width] bool, cropped to the object."""
    height, width = mask.shape
    if mask.all():
        return "square" if height == width else "bar"
    if not mask[height // 2, width // 2]:
        return "ring"
    if mask[-1].all() and mask[0].sum() <= 2:
        return "triangle"
    assert mask[height // 2].all() and mask[:, width // 2].all()
    return "circle" if mask.mean() > 0.7 else "cross"


@functools.cache
def words_by_pixels() -> dict[bytes, str]:
    """Returns the words by their pixels, cropped and in half of their size."""
    words = {}
    for word in WORDS:
        picture = Image.new("L", (32, 16))
        for k, letter in enumerate(word.split()):
            ImageDraw.Draw(picture).text((8 * k, 0), letter, fill=255, font=ImageFont.load_default_imagefont())
        words[crop(np.asarray(picture) > 0).tobytes()] = word
    assert len(words) == len(WORDS)
    return words


def crop(mask: np.ndarray) -> np.ndarray:
    return mask[mask.any(axis=1)][:, mask.any(axis=0)]


def answer(question: str, objects: list[Object], word: str) -> str:
    """Answers any question about an image. Asserts that its presuppositions hold."""

    def named(name: str) -> list[Object]:
        """Returns what "red circle", "red thing", "circles" or "things" means."""
        wanted = {re.sub("(?<=s)es$|(?<!s)s$", "", word) for word in name.split()} - {"thing"}
        assert wanted <= {*COLORS.values(), *SHAPES}
        return [item for item in objects if wanted <= set(item)]

    def one(name: str) -> Object:
        (item,) = named(name)
        return item

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
        return {one(color)[0]: color for color in match.groups()}["big"]
    match = re.fullmatch(r"what (color|shape) is (left of|right of|above|below) the (.*)\?", question)
    axis, sign = {"left of": (3, -1), "right of": (3, 1), "above": (4, -1), "below": (4, 1)}[match[2]]
    there = one(match[3])
    ((_, color, shape, _, _),) = [item for item in objects if sign * (item[axis] - there[axis]) > 0]
    return color if match[1] == "color" else shape


def caption(objects: list[Object], word: str) -> str:
    columns, rows = ("left", "middle", "right"), ("top", "bottom")
    names = [f"a {size} {color} {shape} {rows[y]} {columns[x]}, " for size, color, shape, x, y in objects]
    return f"{''.join(names)}the word {word}."


def test_answers_and_captions_agree_with_the_pixels(shapes):
    for name in ("train", "val", "test"):
        for sample in read(shapes, name)[:150]:
            objects, word = recognize(shapes / sample["image"])
            assert 1 <= len(objects) <= 4
            for text, given in turns_of(sample):
                statement, question = split(text)
                assert answer(question, objects, word) == given
                assert not statement or statement.endswith((f" is {given}", f" is a {given}"))
    for sample in read(shapes, "captions")[:150]:
        ((request, given),) = turns_of(sample)
        assert request == "<|image|>" + CAPTION_REQUEST
        assert given == caption(*recognize(shapes / sample["image"]))


def test_answers_about_described_images_are_right(shapes):
    n_question = 0
    for sample in read(shapes, "stage0"):
        (first, given), *others = turns_of(sample)
        if not first.startswith("The image shows "):
            continue
        description, question = split(first)
        *names, word = description.removeprefix("The image shows ").split(", ")
        objects = []
        for name in names:
            _, size, color, shape, row, column = name.split()
            objects.append((size, color, shape, ["left", "middle", "right"].index(column), row == "bottom"))
        word = word.removeprefix("the word ")
        for question, given in [(question, given), *others]:
            is_caption = question == CAPTION_REQUEST
            assert given == (caption(objects, word) if is_caption else answer(question, objects, word))
            n_question += 1
    assert n_question > 2000


def test_conflicting_statements_are_false(shapes):
    kinds = set()
    for sample in read(shapes, "conflict"):
        ((text, given),) = turns_of(sample)
        statement, question = split(text)
        assert answer(question, *recognize(shapes / sample["image"])) == given == sample["image_answer"]
        assert statement.endswith((f" is {sample['text_answer']}", f" is a {sample['text_answer']}"))
        assert sample["text_answer"] != given
        kinds.add(sample["kind"])
    assert kinds == set(KINDS) - {"compare", "there"}


def mentioned_pairs(text: str, given: str) -> set[tuple[str, str]]:
    """Returns the pairs of (color, shape) that a question and its answer mention together."""
    pairs = set(re.findall(rf"({'|'.join(COLORS.values())}) ({'|'.join(SHAPES)})\b", text))
    pairs |= {(color, shape) for shape, color in re.findall(r"The (\w+) is (\w+)\.", text)}
    pairs |= set(re.findall(r"The (\w+) thing is a (\w+)\.", text))
    if match := re.search(r"what color is the (\w+)\?$", text):
        pairs.add((given, match[1]))
    if match := re.search(r"what shape is the (\w+) thing\?$", text):
        pairs.add((match[1], given))
    return {(color, shape) for color, shape in pairs if shape in SHAPES}


def test_no_training_file_has_what_is_held_out(shapes):
    words, pairs = set(), set()
    for name in TRAINING:
        for text, given in turns_in(shapes, name):
            pairs |= mentioned_pairs(text, given) | mentioned_pairs(given, "")
            words |= set(re.findall(r"\b[A-Z](?: [A-Z])+\b", f"{text} {given}"))
    assert len(pairs) == 30 and not pairs & HELD_OUT
    assert len(words) > 100 and not words & HELD_OUT_WORDS
    for path in sorted((shapes / "images" / "train").iterdir())[:150]:
        objects, word = recognize(path)
        assert not HELD_OUT & {(color, shape) for _, color, shape, _, _ in objects}
        assert word not in HELD_OUT_WORDS


def test_unseen_questions_are_about_what_is_held_out(shapes):
    kinds = defaultdict(set)
    for sample in read(shapes, "test"):
        ((text, given),) = turns_of(sample)
        objects, _ = recognize(shapes / sample["image"])
        held_out = HELD_OUT & {(color, shape) for _, color, shape, _, _ in objects}
        assert len(held_out) == (not sample["seen"])
        pairs = mentioned_pairs(text.removeprefix("<|image|>"), given)
        if pairs:
            assert bool(pairs & HELD_OUT) != sample["seen"]
        kinds[sample["seen"]].add(sample["kind"])
    assert kinds[True] == kinds[False] == set(KINDS)


def test_files_share_no_images(shapes):
    names = ("train", "val", "test", "conflict", "captions", "captions_val")
    images = {name: {sample["image"] for sample in read(shapes, name)} for name in names}
    assert [len(images[name]) for name in ("train", "val", "test")] == [800, 20, 80]
    assert len(images["train"] | images["val"] | images["test"]) == 900
    assert images["conflict"] < images["test"]
    assert images["captions"] == images["train"] and images["captions_val"] == images["val"]


def test_text_part_tests_what_was_not_trained(shapes):
    trained = defaultdict(set)  # question -> answers
    introductions = set()
    for name in ("text", "text_val", "stage0", "stage0_val"):
        for text, given in turns_in(shapes, name):
            before, question = split(text)
            trained[question].add(given)
            introductions.add(before)
    kinds = set()
    for sample in read(shapes, "text_test"):
        assert "image" not in sample
        ((text, given),) = turns_of(sample)
        before, question = split(text)
        kinds.add(sample["kind"])
        if sample["kind"] == "sum":
            a, b = re.findall(r"\d", question)
            other = question.replace(a, "x").replace(b, a).replace("x", b)
            assert question not in trained and trained[other] == {given} == {str((int(a) + int(b)) % 10)}
        elif sample["kind"] == "fact":
            animal = re.findall(r"\b(?:the|a) (\w+)", question.replace("hungry ", ""))[-1]
            answers = [answers for other, answers in trained.items() if animal in re.findall(r"\w+", other)]
            assert question not in trained and 1 <= answers.count({given}) <= 3  # of the five phrasings
        elif sample["kind"] == "named":
            name, animal = re.fullmatch(r"(\w+) is a (\w+)", before).groups()
            assert before not in introductions and question in trained
            assert trained.get(question.replace(name, f"the {animal}"), {given}) == {given}
        else:
            assert any(statement.endswith(f" {given}") for statement in before.split(". "))
    assert kinds == {"fact", "named", "sum", "told"}


def test_answers_are_balanced(shapes):
    """Neither the question nor its kind says much about the answer; few of the questions begin with a statement."""
    limits = {"left of|right of|above|below": 0.4, "what color": 0.3, "what shape": 0.3, "what word": 0.03}
    limits |= {"how many": 0.4, "is the ": 0.55, "is there": 0.55, "which is": 0.6}

    def kind_of(question: str) -> str:
        return next(pattern for pattern in limits if re.search(pattern, question))

    answers, tested = defaultdict(Counter), defaultdict(Counter)
    with_statement = []
    for text, given in turns_in(shapes, "train"):
        before, question = split(text)
        answers[question][given] += 1
        with_statement.append(bool(before))
    assert 0.05 < sum(with_statement) / len(with_statement) < 0.1
    for text, given in turns_in(shapes, "test"):
        tested[kind_of(text)][given] += 1
    for kind, limit in limits.items():
        of_kind = [counts for question, counts in answers.items() if kind_of(question) == kind]
        assert sum(max(counts.values()) for counts in of_kind) <= limit * sum(map(Counter.total, of_kind)), kind
        assert max(tested[kind].values()) <= (0.35 if kind == "how many" else 0.6) * tested[kind].total()


def test_all_files_load(small):
    tokenizer = Tokenizer(small / "tokenizer.model")
    assert tokenizer.vocab_size <= 640
    spec = SampleSpec(tokenizer, "owl2", 9, 64, 256, "square")
    for name in TRAINING + TESTS:
        data = Conversations(small / f"{name}.json", spec)
        samples = [data[0, index] for index in range(len(data))]
        assert samples
        assert not any(isinstance(sample, Skipped) or sample.n_cut for sample in samples)
    for word in WORDS:
        assert len(tokenizer.encode(f"word {word}")) - len(tokenizer.encode("word")) == len(word.split())


def test_the_same_seed_gives_the_same_texts_and_pixels(small, tmp_path):
    """On any machine, with any version of Pillow."""
    digest = hashlib.sha256()
    for name in TRAINING + TESTS:
        digest.update(json.dumps(read(small, name)).encode())
    paths = sorted((small / "images").rglob("*.png"))
    for path in paths:
        digest.update(Image.open(path).tobytes())
    assert len(paths) == 40 + 1 + 2 + 2 and digest.hexdigest()[:16] == "feb7a27bb096a5de"
    run_main(prepare.main, "--out", tmp_path, "--images", 40, "--seed", 1)
    assert all(read(tmp_path, name) != read(small, name) for name in TRAINING + TESTS)


def test_user_errors(tmp_path):
    (tmp_path / "file").write_text("")
    assert_user_error(run_main(prepare.main, "--out", tmp_path / "out", "--images", 39), "--images")
    assert_user_error(run_main(prepare.main, "--out", tmp_path / "file", "--images", 40), str(tmp_path / "file"))
    assert not (tmp_path / "out").exists()
