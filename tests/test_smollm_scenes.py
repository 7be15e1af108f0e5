"""The training files of the smol models, and the measure of a language model's ability."""

import itertools
import random

import pytest
import torch
from PIL import Image

from conftest import GOLDEN, make_config, make_owl
from data.shapes.prepare import HELD_OUT, Turn, make_scene, questions_about
from data.smollm import scenes, text
from data.smollm.scenes import FORMS, SHORT, THINGS, english
from data.text import Tokenizer
from runs import run_main
from test_prepare import assert_user_error, read, turns_of
from tools.text_ability import has_word, read_text

TRAINING = ("captions", "captions_val", "train", "val", "text")
TESTS = ("test", "rephrased", "knowledge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm")
    code, _, stderr = run_main(scenes.main, "--out", out, "--images", 400)
    assert code == 0, stderr
    return out


def questions_in(folder, *names: str) -> set[str]:
    turns = itertools.chain.from_iterable(turns_of(x) for name in names for x in read(folder / f"{name}.json"))
    return {question.replace("<|image|>", "").removesuffix(SHORT) for question, _ in turns}


def test_every_question_has_a_phrasing():
    rng = random.Random(0)
    for _ in range(100):
        for turn in questions_about(make_scene(rng, held_out=rng.random() < 0.3)):
            for rephrased in (False, True):
                question, sentence = english(turn, rng, rephrased)
                assert "{" not in question + sentence and sentence[0].isupper() and sentence.endswith(".")
                assert turn.answer in sentence.lower() or turn.answer in sentence
    with pytest.raises(ValueError):
        english(Turn("other", "who is this?", ""), rng)


def test_the_tests_have_what_training_never_has(folder):
    trained = questions_in(folder, *TRAINING)
    assert not trained & questions_in(folder, "rephrased", "text_test")
    assert all(set(form.trained).isdisjoint(form.rephrased) for form in FORMS)
    things = [thing for some in THINGS.values() for thing in some[scenes.N_TRAINED_THINGS :]]
    assert not any(thing in question for question in trained for thing in things)
    for name in ("captions", "train"):
        for sample in read(folder / f"{name}.json"):
            for _, answer in turns_of(sample):
                held_out = [f"{pair[1]} {pair[0]}" if isinstance(pair, tuple) else f"word {pair}." for pair in HELD_OUT]
                assert not any(what in answer for what in held_out if not answer.startswith("No"))


def test_files_of_scenes(folder):
    for name in (*TRAINING, *TESTS, "text_test"):
        for sample in read(folder / f"{name}.json"):
            assert ("image" in sample) == ("text" not in name)
            if "image" in sample:
                assert Image.open(folder / sample["image"]).size == (64, 64)
    for test, rephrased in zip(read(folder / "test.json"), read(folder / "rephrased.json"), strict=True):
        assert (test["image"], test["kind"]) == (rephrased["image"], rephrased["kind"])
        assert turns_of(test)[0][1] == turns_of(rephrased)[0][1], "the same answer"
    assert {x["kind"] for x in read(folder / "knowledge.json")} == {"choice", "corners", "sum"}
    assert len(read(folder / "text_test.json")) == scenes.N_TEXT_TEST
    assert_user_error(run_main(scenes.main, "--images", 3), "--images")


def test_items_are_trained_or_tested():
    trained, tested = text.split_items(random.Random(0))
    assert {item.kind for item in trained} == {item.kind for item in tested}
    assert not {q for item in trained for q in item.questions} & {q for item in tested for q in item.questions}
    assert all(item.answer and len(item.questions) == 2 for item in [*trained, *tested])


def test_text_ability():
    assert has_word("The answer is 15.", "15") and not has_word("150", "15") and has_word("oslo", "Oslo")
    model, tokenizer = make_owl(make_config("owl2", llama={"vocab_size": 2000})), Tokenizer(GOLDEN / "text")
    paragraphs = "A cat.\n\nTwo cats sit here."
    perplexity, fingerprint = read_text(model, tokenizer, paragraphs)
    assert perplexity > 1 and read_text(model, tokenizer, paragraphs) == (perplexity, fingerprint)
    layer = model.llama.layers[0].self_attn
    layer.k_proj.multiway[1].weight.data += 1  # the visual branch does not matter
    assert read_text(model, tokenizer, paragraphs)[1] == fingerprint
    layer.k_proj.multiway[0].weight.data[0, 0] += 1e-3
    assert read_text(model, tokenizer, paragraphs)[1] != fingerprint
    assert torch.is_grad_enabled()
