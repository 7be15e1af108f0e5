"""The training files of the embedded model, and the check of its captions."""

import filecmp
import json
from pathlib import Path

import pytest
from PIL import Image

from data.shapes.prepare import HELD_OUT_PAIRS, HELD_OUT_WORDS
from data.text import Tokenizer
from data.tiny import prepare
from data.tiny.prepare import CAPTION_REQUESTS, EASY_VQA_PAIRS, FOREIGN_QUESTIONS, UNKNOWN
from runs import run_main
from test_prepare import assert_user_error, read, turns_of
from tools import check_captions

TRAINING = ["text", "text_val", "captions", "captions_val", "train", "val", "varied", "varied_captions"]
TESTS = ["test", "unseen", "unknown", "test_captions"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("easy_vqa")
    out = tmp_path_factory.mktemp("tiny")
    code, _, stderr = run_main(prepare.main, "--out", out, "--images", 400)
    assert code == 0, stderr
    return out


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    run_main(prepare.main, "--out", tmp_path, "--images", 400)
    names = [f"{name}.json" for name in TRAINING + TESTS + ["text_all"]] + ["images/train/399.png", "images/unknown-train/39.png"]
    assert filecmp.cmpfiles(folder, tmp_path, names, shallow=False) == (names, [], [])


def test_every_image_exists_and_the_vocabulary_covers_the_text(folder):
    tokenizer = Tokenizer(folder)
    for name in TRAINING + TESTS + ["text_all"]:
        samples = read(folder / f"{name}.json")
        assert samples
        for sample in samples:
            assert ("image" in sample) == (not name.startswith("text"))
            if "image" in sample:
                assert Image.open(folder / sample["image"]).size == (64, 64)
                assert sample["conversations"][0]["value"].startswith("<|image|>")
        texts = [text.replace("<|image|>", "") for turn in turns_of(samples[0]) for text in turn]
        for text in texts:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and len(ids) < len(text)


def texts_in(folder: Path, *names: str) -> list[str]:
    return [text for name in names for x in read(folder / f"{name}.json") for turn in turns_of(x) for text in turn]


def test_held_out_pairs_are_in_no_training_image_and_words_in_no_text(folder):
    texts = texts_in(folder, *TRAINING)
    for shape, color in HELD_OUT_PAIRS:
        assert not any(f"{color} {shape} {row}" in text for text in texts for row in ("top", "bottom"))
    texts += texts_in(folder, "text_all")
    assert all(any(f"{color} {shape} {row}" in text for text in texts for row in ("top", "bottom")) for shape, color in HELD_OUT_PAIRS)
    assert not any(text in HELD_OUT_WORDS or text.endswith(f"word {word}.") for word in HELD_OUT_WORDS for text in texts)


def test_seen_is_false_where_no_training_file_has_the_pair_or_word(folder):
    unseen = read(folder / "unseen.json")
    assert {x["seen"] for x in unseen} == {True, False}
    assert all(x["seen"] for x in read(folder / "test.json"))
    easy = read(folder / "easy_vqa" / "train.json")
    descriptions = {turn for x in easy for turn in turns_of(x)}
    for shape, color in HELD_OUT_PAIRS:
        assert ((f"what is the {color} shape?", shape) in descriptions) == ((shape, color) in EASY_VQA_PAIRS)


def test_what_no_image_shows_is_not_known(folder):
    for name in ("train", "val", "varied"):
        for sample in read(folder / f"{name}.json"):
            for question, answer in turns_of(sample):
                question = question.removeprefix("<|image|>")
                is_foreign = question[0].lower() + question[1:] in FOREIGN_QUESTIONS
                assert (answer == UNKNOWN) == (is_foreign or "unknown" in sample["image"])


def test_captions_have_several_requests_and_some_questions_a_capital(folder):
    requests = {turns_of(x)[0][0].removeprefix("<|image|>") for x in read(folder / "captions.json")}
    assert requests >= set(CAPTION_REQUESTS) and "Describe the image." in requests
    assert {turns_of(x)[0][0] for x in read(folder / "test_captions.json")} == {f"<|image|>{CAPTION_REQUESTS[0]}"}
    questions = [question.removeprefix("<|image|>") for x in read(folder / "varied.json") for question, _ in turns_of(x)]
    assert 0.1 < sum(question[0].isupper() for question in questions) / len(questions) < 0.3


def test_too_few_images(tmp_path):
    assert_user_error(run_main(prepare.main, "--out", tmp_path, "--images", 159), "--images is 159")


def test_captions_are_checked_statement_by_statement(tmp_path):
    truth = "a big red circle top left, a small blue bar bottom middle, the word B A G."
    answers = [
        truth,
        "a big red circle top left, a small red bar bottom middle, the word B A G.",  # a wrong color
        "a big red circle top right, the word B A.",  # a wrong place, a wrong word
        "a big red dog",
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"answer": answer, "truth": truth}) + "\n" for answer in answers))
    code, stdout, _ = run_main(check_captions.main, path)
    table = {" ".join(line.split()[: line.split().index("of") - 1]): line.split() for line in stdout.splitlines()}
    counts = {name: (int(words[-5]), int(words[-3])) for name, words in table.items()}
    assert code == 0 and counts == {
        "all statements": (5, 9),
        "captions: all true and complete": (1, 4),
        "other statements (counted as false)": (0, 1),
        "statements about objects": (3, 5),
        "statements about the word": (2, 3),
        "their color, if something is there": (3, 4),
        "their places: something is there": (4, 5),
        "their shape, if something is there": (4, 4),
        "their size, if something is there": (4, 4),
        "true statements that were made": (5, 12),
    }
    sentence = "I can see a big red circle at the top left, a small blue bar at the bottom in the middle and the word B A G."
    assert check_captions.statements(sentence) == check_captions.statements(truth)
    (tmp_path / "empty").write_text("")
    assert_user_error(run_main(check_captions.main, tmp_path / "empty"), "no answers")
    assert_user_error(run_main(check_captions.main, tmp_path / "none"), "none")
