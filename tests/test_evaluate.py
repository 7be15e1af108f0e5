"""evaluate.py: what counts as right, what the model is shown, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from conftest import GOLDEN, make_config, make_owl
from data.image import load_image, to_pixels
from data.text import OWL1_SYSTEM, Tokenizer, render_conversation
from evaluate import ask, normal
from weights import load_model, save_model

SIZE = 28
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """weights(style) -> a folder with a tiny random model and its tokenizer."""
    folders = {}

    def make(style: str) -> Path:
        if style not in folders:
            folders[style] = tmp_path_factory.mktemp(style)
            llama = {"vocab_size": 2000, "context": 96}
            owl = make_owl(make_config(style, vit={"image_size": SIZE, "patch_size": 14}, llama=llama))
            owl.tokenizer_folder = GOLDEN / "text"
            save_model(owl, folders[style])
        return folders[style]

    return make


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIZE, SIZE), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def talk(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def row(image: str | list | None, *turns: str) -> dict:
    return {"image": image, "conversations": talk(*turns)}


@pytest.fixture
def run(folder, weights, monkeypatch, capsys):
    """run(rows, *flags, style="owl2") -> what evaluate.py prints, as {name: (right, asked)}."""

    def call(rows: list, *flags: object, style: str = "owl2") -> dict[str, tuple[int, int]]:
        path = folder / "data.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        command = ["evaluate.py", "--data", path, "--weights", weights(style), "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        evaluate.main()
        table = {}
        for line in capsys.readouterr().out.splitlines():
            words = line.rsplit(maxsplit=5)
            name, right, of, asked, percent, sign = words
            assert (of, sign) == ("of", "%")
            assert float(percent) == pytest.approx(100 * int(right) / int(asked), abs=0.005)
            table[name] = (int(right), int(asked))
        return table

    return call


@pytest.fixture
def eye(monkeypatch):
    """Stands for the model: names the brightest channel of the last picture, or says what it was told to say."""
    seen = []

    def answer(model, tokenizer, questions, images, max_new_tokens):
        assert len(images) == sum(question.count("<image>") for question in questions)
        images = list(images)
        answers = []
        for question in questions:
            pictures = [images.pop(0) for _ in range(question.count("<image>"))]
            seen.extend(pictures)
            if not pictures:
                answers.append(question.removeprefix("Say "))
            elif not pictures[-1].any():
                answers.append("nothing")
            else:
                answers.append(list(COLOURS)[int(pictures[-1].mean(dim=(1, 2)).argmax())])
        return answers

    monkeypatch.setattr(evaluate, "ask", answer)
    return seen


def test_what_is_the_same_answer():
    """Capitals, spaces around and one full stop do not count; everything else does."""
    assert normal(" Yes.\n") == normal("yes") == normal("YES")
    assert normal("two cats") != normal("twocats")
    assert normal("no") != normal("not")
    assert normal("1.5") == "1.5"
    assert normal("yes!") != normal("yes")


def test_exact_matches_are_counted_by_kind(run, eye, folder):
    """Yes/no questions and others apart; of a longer conversation the first question alone; --out lists all."""
    rows = [
        row("red.png", "<image>Which?", "Red."),
        row("green.png", "<image>Which?", "red"),
        row(["red.png", "blue.png"], "<image><image>The last?", " BLUE "),
        row("green.png", "<image>Which?", "greenish"),
        row(None, "Say yes", "Yes."),
        row(None, "Say no", "yes", "Say more", "more"),
        row(None, "Say Yes.", "yes", "Say more", "more"),
    ]
    out = folder / "answers.jsonl"
    table = run(rows, "--out", out, "--batch", 2)
    assert table == {"yes or no": (2, 3), "other": (2, 4), "all": (4, 7)}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0] == {"images": ["red.png"], "question": "<image>Which?", "answer": "red", "truth": "Red."}
    assert [line["answer"] for line in lines] == ["red", "green", "blue", "green", "yes", "no", "Yes."]


def test_owl1s_text_is_read_as_well(run, eye):
    text = f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: Which?\nAI: red"
    assert run([{"image": ["red.png"], "text": text}], style="owl1") == {"other": (1, 1), "all": (1, 1)}


def test_images_of_later_turns_are_not_shown(run, eye):
    """Only the first question is asked, with the images that it marks."""
    rows = [row(["red.png", "blue.png"], "<image>Which?", "red", "<image>And?", "blue")] * 3
    rows.append(row("green.png", "Say it", "it", "<image>Which?", "green"))
    assert run(rows)["all"] == (4, 4)
    assert len(eye) == 3


def test_blank_and_shuffled_images_are_what_they_say(run, eye):
    """Blank: all zero, which is the mean colour. Shuffled: the same pictures, changed about, the same way for a seed."""
    names = [*COLOURS] * 3
    rows = [row(f"{name}.png", "<image>Which?", name) for name in names]
    assert run(rows)["all"] == (9, 9)
    right = torch.stack(eye)
    eye.clear()
    assert run(rows, "--images", "blank")["all"] == (0, 9)
    assert not torch.stack(eye).any()
    scores = set()
    for seed in range(6):
        eye.clear()
        score = run(rows, "--images", "shuffled", "--seed", seed)["all"]
        scores.add(score)
        pictures = torch.stack(eye)
        assert run(rows, "--images", "shuffled", "--seed", seed)["all"] == score
        assert sorted(pictures.sum(dim=(1, 2, 3)).tolist()) == sorted(right.sum(dim=(1, 2, 3)).tolist())
    assert min(scores) < (9, 9)


@pytest.mark.parametrize("style", ("owl1", "owl2"))
def test_answers_do_not_depend_on_the_batch(folder, weights, style):
    """Questions of different lengths, with images and without, through the real model: alone, in twos, all at once."""
    model = load_model(weights(style))
    tokenizer = Tokenizer(weights(style))
    questions = ["<image>What?", "Why?", "<image>Which of these words is the one?", "<image><image>Both?", "And now what is it?"]
    names = [["red"], [], ["green"], ["blue", "red"], []]
    pictures = [[to_pixels(load_image(folder / f"{name}.png"), SIZE, "square") for name in row] for row in names]

    def answers(size: int) -> list[str]:
        texts = []
        for i in range(0, len(questions), size):
            images = [image for row in pictures[i : i + size] for image in row]
            texts += ask(model, tokenizer, questions[i : i + size], images, max_new_tokens=6)
        return texts

    alone = answers(1)
    assert answers(2) == alone
    assert answers(5) == alone
    assert len(set(alone)) > 1


def test_the_whole_program_does_not_depend_on_the_batch(run, folder):
    rows = [row("red.png", "<image>Which?", "red"), row(None, "Why is that so?", "yes"), row("blue.png", "<image>And this one?", "x")]
    logs = []
    for batch in (1, 2, 64):
        run(rows, "--batch", batch, "--out", folder / "log.jsonl", "--max-new-tokens", 4)
        logs.append((folder / "log.jsonl").read_text())
    assert logs[0] == logs[1] == logs[2]
    assert all(json.loads(line)["answer"] for line in logs[0].splitlines())


@pytest.mark.parametrize("style, same, other", [("owl1", "stretch", "crop"), ("owl2", "square", "crop")])
def test_the_fit_is_the_owls_own_unless_given(run, eye, folder, style, same, other):
    noise = torch.randint(0, 256, (40, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "noise.png")
    for flags, fit in (((), same), (("--fit", other), other)):
        eye.clear()
        run([row("noise.png", "<image>?", "x")], *flags, style=style)
        torch.testing.assert_close(eye[0], to_pixels(load_image(folder / "noise.png"), SIZE, fit), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------
# What is refused

GOOD = row("red.png", "<image>Which?", "red")
BAD_ROWS = {
    "missing image": (row("gone.png", "<image>?", "a"), "gone.png"),
    "unreadable image": (row("broken.png", "<image>?", "a"), "broken.png"),
    "image outside": (row("../outside.png", "<image>?", "a"), "outside.png"),
    "absolute image": (row("/outside.png", "<image>?", "a"), "outside.png"),
    "no answer": (row(None, "a"), "row 1"),
    "no conversation": ({"image": "red.png"}, "row 1"),
    "not an object": (["a"], "row 1"),
    "image is a number": (row(3, "<image>?", "a"), "row 1"),
    "images are numbers": (row([3], "<image>?", "a"), "row 1"),
    "too few images": (row("red.png", "<image><image>?", "a"), "row 1"),
    "too many images": (row(["red.png", "red.png"], "<image>?", "a"), "row 1"),
    "too long": (row(None, "word " * 200, "a"), "context"),
}


def refused(run, capsys, *arguments, **more) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **more)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_question_that_cannot_be_asked_stops_with_one_sentence(run, folder, capsys, case):
    bad, words = BAD_ROWS[case]
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:50])
    Image.new("RGB", (4, 4)).save(folder.parent / "outside.png")
    assert words in refused(run, capsys, [GOOD, bad, GOOD])


def test_a_broken_line_is_named(folder, weights, monkeypatch, capsys):
    (folder / "lines.jsonl").write_text(json.dumps(GOOD) + "\n{oops\n")
    command = ["evaluate.py", "--data", str(folder / "lines.jsonl"), "--weights", str(weights("owl2"))]
    monkeypatch.setattr(sys, "argv", command)
    assert "row 1" in refused(evaluate.main, capsys)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--data", "no-such.json"), "no-such.json"),
        (("--weights", "no-such-folder"), "no-such-folder"),
        (("--weights", GOLDEN / "text"), "config.json"),
        (("--weights", GOLDEN / "owl2"), "tokenizer"),
        (("--batch", "0"), "--batch"),
        (("--batch", "-1"), "--batch"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--device", "banana"), "banana"),
        (("--out", "no-such-folder/log.jsonl"), "no-such-folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_flag_that_cannot_be_meant_is_one_sentence(run, capsys, flags, words):
    assert words in refused(run, capsys, [GOOD], *flags)


def test_the_loss_is_that_of_the_logits(folder, weights, monkeypatch, capsys):
    """--loss prints the mean over all answers' tokens, here of a text: computed from the logits by hand."""
    rows = [{"conversations": talk("One?", "Two.", "Three?", "Four.")}]
    path = folder / "text.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    command = ["evaluate.py", "--data", str(path), "--weights", str(weights("owl2")), "--device", "cpu", "--loss"]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    model = load_model(weights("owl2"))
    ids, labels = render_conversation(rows[0]["conversations"], Tokenizer(weights("owl2")), "owl2")
    logits, _ = model(torch.tensor([ids]))
    by_hand = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(labels[1:]), ignore_index=-100)
    assert float(capsys.readouterr().out) == pytest.approx(by_hand.item(), abs=1e-5)
