"""evaluate.py, answer.py, record.py and report.py: what counts as right, what is shown, what is kept and refused."""

import base64
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import answer
import evaluate
import record
import report
from answer import choose, deal, fitted, opened, prompt_of
from conftest import GOLDEN, make_config, make_owl
from data.image import load_image, to_pixels
from data.text import OWL1_SYSTEM, Tokenizer, render_conversation
from evaluate import ask, normal
from metrics import cider
from model import Owl
from parallel import Place
from report import count_ratings, page, pick, rating_page
from runs import HEAVY, in_processes
from tasks import Question
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

    def answer_for(model, tokenizer, questions, images, max_new_tokens, min_new_tokens=0, space=False):
        assert len(images) == sum(question.count("<image>") for (question,) in questions)
        images = list(images)
        answers = []
        for (question,) in questions:
            pictures = [images.pop(0) for _ in range(question.count("<image>"))]
            seen.extend(pictures)
            if not pictures:
                answers.append(question.removeprefix("Say "))
            elif not pictures[-1].any():
                answers.append("nothing")
            else:
                answers.append(list(COLOURS)[int(pictures[-1].mean(dim=(1, 2)).argmax())])
        return answers

    monkeypatch.setattr(answer, "ask", answer_for)
    monkeypatch.setattr(Owl, "encode_images", lambda self, images: images)
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


def test_the_list_of_answers_is_written_at_the_end_and_beside_the_data(run, eye, folder, capsys):
    """An earlier one stays if anything goes wrong, and the data always."""
    out = folder / "answers.jsonl"
    out.write_text("earlier")
    (folder / "broken.png").write_bytes(b"no image")
    refused(run, capsys, [GOOD, row("broken.png", "<image>?", "a")], "--out", out)
    assert out.read_text() == "earlier"
    assert "a file of its own" in refused(run, capsys, [GOOD], "--out", folder / ".." / folder.name / "data.json")
    assert "a file of its own" in refused(run, capsys, [GOOD], "--out", "/dev/null")
    assert json.loads((folder / "data.json").read_text()) == [GOOD]
    run([GOOD], "--out", out)
    assert json.loads(out.read_text())["answer"] == "red" and not list(folder.glob("*.part"))


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
    "half a character": (row(None, "\ud800", "a"), "row 1: a text holds half a character"),
    "half a character in a note": (GOOD | {"kind": "\udfff"}, "row 1: a text holds half a character"),
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
        (("--loss", "--out", "log.jsonl"), "neither --images nor --out"),
        (("--loss", "--images", "blank"), "neither --images nor --out"),
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


def test_a_files_kinds_are_counted_apart(run, eye, folder):
    """kind, seen and unseen, and how often each of two answers was said; --out has them too."""
    rows = [
        row("red.png", "<image>Which?", "red") | {"kind": "color", "seen": True},
        row("green.png", "<image>Which?", "red") | {"kind": "color", "seen": False},
        row("blue.png", "<image>Which?", "blue") | {"kind": "word", "image_answer": "Blue", "text_answer": "red"},
        row(None, "Say red", "blue") | {"kind": "word", "image_answer": "blue", "text_answer": "red."},
    ]
    table = run(rows, "--out", folder / "log.jsonl")
    assert list(table) == ["other", "all", "color", "word", "seen", "unseen", "image_answer", "text_answer"]
    assert table["all"] == (2, 4) and table["color"] == (1, 2) and table["word"] == (1, 2)
    assert table["seen"] == (1, 1) and table["unseen"] == (0, 1)
    assert table["image_answer"] == (1, 2) and table["text_answer"] == (1, 2)
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[2])
    assert line["kind"] == "word" and line["image_answer"] == "Blue" and line["answer"] == "blue"


@pytest.mark.parametrize("note", [{"kind": 3}, {"seen": "yes"}, {"image_answer": ["red"]}])
def test_a_note_of_another_kind_is_refused(run, capsys, note):
    assert f"row 1: {[*note][0]} should be" in refused(run, capsys, [GOOD, GOOD | note])


# ----------------------------------------------------------------------------------------------------
# Conversations and prompts that outgrow the context


@pytest.fixture(scope="module")
def owl(weights):
    """(model, tokenizer), of a context of 96."""
    return load_model(weights("owl2")), Tokenizer(weights("owl2"))


def test_what_is_dealt_is_all_and_keeps_images_and_conversations_together():
    questions = [Question(str(i), "<image>?", [f"{i % 3}.png"]) for i in range(10)]
    questions += [Question("a", "<image>?", ["9.png"]), Question("b", "and?", [], before=["a"])]
    questions += [Question(f"t{i}", "why?", []) for i in range(4)]
    for world in (1, 2, 5, 30):
        known = {"4": "x", "a": "y", "t2": "z"}
        parts = [deal(questions, known, Place(rank, world, None, None)) for rank in range(world)]
        ids = [turn.id for part in parts for turns in part for turn in turns]
        assert sorted(ids) == sorted({question.id for question in questions} - {"4", "t2"})  # b needs a
        for image in ("0.png", "1.png", "2.png"):
            holders = [[turns[0].images == [image] for turns in part] for part in parts]
            (where,) = [flags for flags in holders if any(flags)]
            assert flags_are_neighbours(where)
        assert all([turn.id for turn in turns] == ["a", "b"] for part in parts for turns in part if len(turns) > 1)


def flags_are_neighbours(flags: list[bool]) -> bool:
    return "".join("x" if flag else " " for flag in flags).strip().count(" ") == 0


@pytest.mark.parametrize("style", ("owl1", "owl2"))
def test_a_conversation_is_asked_with_its_answers(weights, style):
    """And when it outgrows the context its earliest turns go; their images stay, before the next question."""
    model, tokenizer = load_model(weights(style)), Tokenizer(weights(style))
    model.config.llama.context = 160
    turns = [Question("1", "<image>What is it?", ["a.png"]), Question("2", "And why?", [], before=["1"])]
    turns += [Question("3", "<image>This too?", ["b.png"], before=["1", "2"])]
    known = {"1": "A <image> cat.", "2": "No."}
    kept, messages = fitted(turns, known, model, tokenizer, 8)
    assert [turn.id for turn in kept] == ["1", "2", "3"]
    assert messages == ["<image>What is it?", "A   cat.", "And why?", "No.", "<image>This too?"]
    long = known | {"2": "word " * 30}
    kept, messages = fitted(turns, known | {"1": "word " * 30}, model, tokenizer, 40 if style == "owl1" else 75)
    assert messages == ["<image>And why?", "No.", "<image>This too?"] and [turn.id for turn in kept] == ["2", "3"]
    kept, messages = fitted(turns, long, model, tokenizer, 90)
    assert messages == ["<image><image>This too?"] and [turn.id for turn in kept] == ["3"]
    assert len(prompt_of(messages, model, tokenizer)) <= 160
    with pytest.raises(ValueError, match="question '9' takes .* tokens, more than the model's context of 160"):
        fitted([Question("9", "word " * 200, [])], {}, model, tokenizer, 8)


def test_worked_examples_leave_a_prompt_that_is_too_long(owl):
    shots = [f"Is {n} a number? yes\n\n" for n in range(9)]
    question = Question("q", "Answer.\n" + "".join(shots) + "Is cat a number?", [], "no", "", ["yes", "no"], shots)
    (fit,), (prompt,) = fitted([question], {}, *owl, 0)
    assert 0 < len(fit.shots) < 9 and prompt == fit.prompt == "Answer.\n" + "".join(fit.shots) + "Is cat a number?"
    assert len(prompt_of(prompt, *owl)) <= 96 < len(prompt_of(prompt, *owl)) + 25


# ----------------------------------------------------------------------------------------------------
# The likeliest choice


@pytest.mark.parametrize("style", ("owl1", "owl2"))
def test_the_likeliest_choice_is_that_of_a_plain_loop(weights, style):
    """Letters, choices of several tokens that begin alike, images or none; alone and together."""
    model, tokenizer = load_model(weights(style)), Tokenizer(weights(style))
    lists = [["A", "B", "C", "D"], ["the cat sat", "the cat ran", "the dog", "some dog"], ["yes", "no"], ["I see", "B"]]
    generator = torch.Generator().manual_seed(0)
    questions, images, choices, expected = [], [], [], []
    for i in range(12):
        shown = [torch.randn(3, SIZE, SIZE, generator=generator) for _ in range(i % 3)]
        questions.append("<image>" * len(shown) + f"Question {i}, what is it?")
        images.append(shown)
        choices.append(lists[i % 4])
        sums = []
        for choice in choices[-1]:
            prompt, piece = prompt_of(questions[-1], model, tokenizer), tokenizer.encode(choice)
            with torch.no_grad():
                logits, _ = model(torch.tensor([prompt + piece]), torch.stack(shown) if shown else None)
            log_p = logits[0].log_softmax(dim=-1)
            sums.append(sum(log_p[len(prompt) - 1 + k, token].item() for k, token in enumerate(piece)))
        expected.append(choices[-1][sums.index(max(sums))])
    together = choose(model, tokenizer, questions, [image for shown in images for image in shown], choices)
    alone = [choose(model, tokenizer, [q], shown, [c])[0] for q, shown, c in zip(questions, images, choices)]
    assert together == alone == expected
    assert len(set(expected)) > 3


# ----------------------------------------------------------------------------------------------------
# Tasks


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A folder of easy-VQA: 10 noisy images, of each one to four questions, in no order."""
    folder = tmp_path_factory.mktemp("easy")
    (folder / "test" / "images").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(10):
        noise = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / "test" / "images" / f"{i}.png")
    for i in range(25):
        rows.append([f"Is number {i} {'very ' * (i % 4)}red?", ("yes", "red", "no")[i % 3], (i * 7) % 10])
    (folder / "test" / "questions.json").write_text(json.dumps(rows))
    return folder


def command(weights: Path, folder: Path, out: Path | None, *flags: object, task: str = "easy-vqa") -> list[str]:
    words = ["evaluate.py", "--task", task, "--folder", folder, "--weights", weights, "--device", "cpu", *flags]
    return [str(word) for word in words + (["--out", out] if out else [])]


@pytest.fixture
def task(weights, monkeypatch, capsys):
    """task(folder, out, *flags, task=) -> what is printed."""

    def call(folder: Path, out: Path | None, *flags: object, task: str = "easy-vqa") -> str:
        monkeypatch.setattr(sys, "argv", command(weights("owl2"), folder, out, *flags, task=task))
        evaluate.main()
        return capsys.readouterr().out

    return call


def lines(out: Path) -> list[bytes]:
    """All answers of a run, sorted."""
    return sorted(line for path in out.glob("answers-*.jsonl") for line in path.read_bytes().splitlines())


def in_a_process(words: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = words
    evaluate.main()


def in_order(out: Path) -> list[dict]:
    """What a run wrote at its end."""
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_the_answers_of_any_batch_and_any_number_of_processes(task, easy, weights, tmp_path):
    """Byte for byte, sorted; and the same numbers and page. Then a run of two is ended by one."""
    for batch in (1, 3, 64):
        task(easy, tmp_path / str(batch), "--batch", batch)
    expected = lines(tmp_path / "1")
    assert len(expected) == 25 and len({json.loads(line)["answer"] for line in expected}) > 5
    assert lines(tmp_path / "3") == lines(tmp_path / "64") == expected
    in_processes(2, tmp_path, in_a_process, command(weights("owl2"), easy, tmp_path / "two", "--batch", 4))
    assert lines(tmp_path / "two") == expected
    assert all((tmp_path / "two" / f"answers-{rank}.jsonl").stat().st_size for rank in (0, 1))
    numbers = [json.loads((tmp_path / name / "results.json").read_text())["numbers"] for name in ("1", "64", "two")]
    assert numbers[0] == numbers[1] == numbers[2] and set(numbers[0]) == {
        "accuracy", "accuracy, other", "accuracy, yes or no",
    }  # fmt: skip
    assert in_order(tmp_path / "1") == in_order(tmp_path / "two")

    half = (tmp_path / "two" / "answers-1.jsonl").read_bytes()
    (tmp_path / "two" / "answers-1.jsonl").write_bytes(half[: len(half) // 2] + b"\0\0\0")
    (tmp_path / "two" / "results.json").unlink()
    task(easy, tmp_path / "two")
    content = (tmp_path / "two" / "answers-1.jsonl").read_bytes()
    assert content == half[: half.rindex(b"\n", 0, len(half) // 2) + 1]  # half a line goes, whoever wrote it
    assert lines(tmp_path / "two") == expected and in_order(tmp_path / "1") == in_order(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "results.json").read_text())["numbers"] == numbers[0]
    starts = json.loads((tmp_path / "two" / "run.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 1]


def one_fails(words: list[str]) -> None:
    real = evaluate.load
    evaluate.load = lambda *arguments: real(*arguments) if os.environ["RANK"] == "0" else fails()
    with pytest.raises(SystemExit) as stopped:
        in_a_process(words)
    assert stopped.value.code == 2
    os._exit(0)  # the group of processes is in pieces


def fails() -> None:
    raise ValueError("this one fails")


def test_when_one_process_fails_the_others_end_with_a_sentence(easy, weights, tmp_path):
    """What they answered stays."""
    first, second = in_processes(2, tmp_path, one_fails, command(weights("owl2"), easy, tmp_path / "run"))
    assert "error: this one fails" in second.splitlines()
    assert "error: another process has ended; it should say why" in first.splitlines()
    assert "Traceback" not in first + second
    assert 0 < len(lines(tmp_path / "run")) < 25


class Killed:
    """A file in whose midst its process is killed."""

    def __init__(self, file, room: int):
        self.file = file
        self.room = room

    def write(self, text: str) -> None:
        self.file.write(text[: self.room])
        self.room -= len(text)
        if self.room <= 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def flush(self) -> None:
        self.file.flush()


def killed(words: list[str], room: int) -> None:
    real = evaluate.open_run

    @contextmanager
    def open_run(*arguments):
        with real(*arguments) as (content, known, log):
            yield content, known, Killed(log, room)

    evaluate.open_run = open_run
    in_a_process(words)


def test_a_killed_run_goes_on(task, easy, weights, tmp_path):
    """SIGKILL inside a line or between two; in the end the answers of a run left alone."""
    task(easy, tmp_path / "alone")
    out, sizes, chance = tmp_path / "run", [], random.Random(7)
    line = len((tmp_path / "alone" / "answers-0.jsonl").read_bytes().splitlines(keepends=True)[0])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    for room in (line - 1, line, *(chance.randrange(1, 500) for _ in range(2))):
        words = command(weights("owl2"), easy, out, "--batch", 2)
        process = context.Process(target=killed, args=(words, room))
        process.start()
        process.join(100)
        assert process.exitcode == -signal.SIGKILL
        sizes.append((out / "answers-0.jsonl").stat().st_size)
    assert len(set(sizes)) > 2 and not (out / "results.json").exists()
    task(easy, out, "--batch", 5)
    assert lines(out) == lines(tmp_path / "alone") and in_order(out) == in_order(tmp_path / "alone")
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_cleanly(task, easy, tmp_path, monkeypatch, capsys, number):
    real, asked = answer.ask, []

    def interrupted(*arguments):
        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(number)
        return real(*arguments)

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(answer, "ask", interrupted)
    with pytest.raises(SystemExit) as stopped:
        task(easy, tmp_path / "run", "--batch", 4)
    for n, handler in before.items():
        signal.signal(n, handler)
    assert stopped.value.code == 128 + number
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    assert len(lines(tmp_path / "run")) == 8
    monkeypatch.setattr(answer, "ask", real)
    task(easy, tmp_path / "run")
    task(easy, tmp_path / "alone")
    assert lines(tmp_path / "run") == lines(tmp_path / "alone")


def test_each_image_is_read_and_encoded_once(task, easy, tmp_path, monkeypatch):
    """Whatever the batch; a run that is over reads nothing. Pillow's warnings are left as they were."""
    read, encoded = [], []
    real_read, real_encode, filters = answer.load_image, Owl.encode_images, list(warnings.filters)
    monkeypatch.setattr(report, "thumbnail", lambda *_: "")
    monkeypatch.setattr(answer, "load_image", lambda source: read.append(source) or real_read(source))
    monkeypatch.setattr(Owl, "encode_images", lambda self, x: encoded.append(len(x)) or real_encode(self, x))
    for batch in (1, 2, 7, 64):
        read.clear(), encoded.clear()
        task(easy, tmp_path / str(batch), "--batch", batch)
        assert len(read) == len(set(read)) == sum(encoded) == 10
    read.clear(), encoded.clear()
    task(easy, tmp_path / "7")
    assert read == encoded == [] and warnings.filters == filters


def test_a_line_says_what_was_asked_and_what_it_scored(task, easy, tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "ask", lambda model, tokenizer, questions, *_: ["Yes."] * len(questions))
    said = task(easy, tmp_path / "run")
    rows = in_order(tmp_path / "run")
    assert [row["id"] for row in rows] == [str(i) for i in range(25)]
    asked = {"id": "0", "prompt": "<image>Is number 0 red?", "answer": "Yes."}
    assert rows[0] == asked | {"truth": "yes", "group": "yes or no", "score": 1.0}
    assert asked in [json.loads(line) for line in lines(tmp_path / "run")]
    assert re.search(r"^accuracy +36\.00$", said, re.M) and sum(row["score"] for row in rows) == 9  # of 25
    assert said == task(easy, None) + said[said.index("\nto look at") :]  # without --out the same is printed
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["max_new_tokens"] == 10 and len(run["settings"]["sha256 of tokenizer.model"]) == 64
    assert run["settings"]["bytes of model-00001-of-00001.safetensors"] > 1000
    versions = run["starts"][0]["versions"]
    assert set(versions) == {"torch", "numpy", "pillow", "sentencepiece", "python", "cuda", "owlet"}
    assert versions["torch"] == torch.__version__
    sizes = [path.stat().st_size for path in (easy / "test" / "images").iterdir()]
    assert (run["starts"][0]["image_files"], run["starts"][0]["image_bytes"]) == (10, sum(sizes))


@pytest.mark.parametrize("space", (False, True))
def test_the_space_of_a_tasks_prompt_reaches_the_model(weights, monkeypatch, space):
    """As one token more."""
    seen = []
    monkeypatch.setattr(answer, "prompt_of", lambda *arguments: seen.append(prompt_of(*arguments)) or seen[-1])
    model, tokenizer = load_model(weights("owl2")), Tokenizer(weights("owl2"))
    questions = [[Question("1", "Why?", [], space=space)]]
    assert len(list(answer.answers(model, tokenizer, questions, {}, {}, None, 1, (1, 3)))) == 1
    plain = prompt_of("Why?", model, tokenizer)
    assert seen == [plain + tokenizer.encode("ASSISTANT: ")[-1:] if space else plain]


def test_a_score_is_the_tasks_of_now(task, easy, finished, monkeypatch):
    """A finished run scores anew, and asks nothing."""
    monkeypatch.setattr(answer, "ask", None)
    monkeypatch.setattr(evaluate.TASKS["easy-vqa"], "score", lambda answers, questions: [1.0] * len(answers))
    assert re.search(r"^accuracy +100\.00$", task(easy, finished), re.M)
    assert {row["score"] for row in in_order(finished)} == {1.0}


def test_a_task_of_choices(task, tmp_path, capsys):
    """Letters by likelihood."""
    place = tmp_path / "arc"
    (place / "ARC-Easy").mkdir(parents=True)
    choices = [{"text": text, "label": label} for text, label in (("one", "1"), ("two", "2"), ("three", "3"))]
    rows = [{"id": f"q{i}", "question": {"stem": f"What {i}?", "choices": choices}, "answerKey": "2"} for i in range(6)]
    (place / "ARC-Easy" / "ARC-Easy-Test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for batch in (1, 4):
        task(place, tmp_path / f"arc-{batch}", "--batch", batch, task="arc-e")
    answers = [json.loads(line)["answer"] for line in lines(tmp_path / "arc-1")]
    assert lines(tmp_path / "arc-1") == lines(tmp_path / "arc-4") and set(answers) <= set("ABC")
    assert "not for arc-e" in refused(task, capsys, place, None, "--max-new-tokens", 3, task="arc-e")


def test_captions_have_each_their_cider(task, folder, tmp_path, monkeypatch):
    captions = {"red": "a red wall", "green": "a green wall of grass", "blue": "the blue sky above"}
    images = [
        {"imgid": i, "split": "test", "filepath": ".", "filename": f"{name}.png", "sentences": [{"raw": text}]}
        for i, (name, text) in enumerate(captions.items())
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    monkeypatch.setattr(answer, "ask", lambda model, tokenizer, questions, *_: ["a green wall"] * len(questions))
    said = task(folder, tmp_path / "run", task="coco")
    corpus, scores = cider(["a green wall"] * 3, [[text] for text in captions.values()])
    assert [row["score"] for row in in_order(tmp_path / "run")] == scores and len(set(scores)) == 3
    assert re.search(rf"^CIDEr +{100 * corpus:.2f}$", said, re.M)


# ----------------------------------------------------------------------------------------------------
# Folders that are refused


@pytest.fixture
def finished(task, easy, tmp_path):
    task(easy, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--images", "blank"), "(images: 'right', now 'blank')"),
        (("--max-new-tokens", 3), "(max_new_tokens: 10, now 3)"),
        (("--fit", "crop"), "(fit: 'square', now 'crop')"),
    ],
)
def test_another_setting_is_refused(task, easy, finished, monkeypatch, capsys, flags, words):
    """With both values, and before the weights are loaded."""
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    monkeypatch.setattr(evaluate, "load_model", None)
    assert f"holds a run with other settings {words}" in refused(task, capsys, easy, finished, *flags)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_model_is_the_same_by_its_files(task, easy, weights, tmp_path, capsys):
    """When they were written does not matter, nor a seed that nothing is drawn with; the tokenizer's bytes do."""
    model = shutil.copytree(weights("owl2"), tmp_path / "model")
    task(easy, tmp_path / "run", "--weights", model)
    for path in model.iterdir():
        os.utime(path, (1, 1))
    task(easy, tmp_path / "run", "--weights", model, "--seed", 3)
    (model / "tokenizer_config.json").write_text('{"legacy": true }')
    sentence = refused(task, capsys, easy, tmp_path / "run", "--weights", model)
    assert "(sha256 of tokenizer_config.json: " in sentence and sentence.count("sha256") == 1


def test_a_shuffles_seed_is_a_setting(task, easy, tmp_path, capsys):
    task(easy, tmp_path / "run", "--images", "shuffled")
    assert "seed: 0, now 3" in refused(task, capsys, easy, tmp_path / "run", "--images", "shuffled", "--seed", 3)


def test_a_run_without_answers_may_begin_anew(task, easy, finished):
    for path in finished.glob("answers*"):
        path.unlink()
    task(easy, finished, "--max-new-tokens", 3)
    assert json.loads((finished / "run.json").read_text())["settings"]["max_new_tokens"] == 3


def test_two_runs_in_one_folder_are_refused(task, easy, finished, capsys):
    with record.lock(finished):
        assert "a run is at work in" in refused(task, capsys, easy, finished)
    task(easy, finished)


def test_another_folder_is_left_alone(task, easy, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "no run.json" in refused(task, capsys, easy, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


SPOILT = {
    "no record": (lambda run: (run / "run.json").unlink(), "no run.json"),
    "a broken record": (lambda run: (run / "run.json").write_text("{"), "not valid JSON"),
    "a deep record": (lambda run: (run / "run.json").write_text('{"a":' * 100_000), "not valid JSON"),
    "an empty record": (lambda run: (run / "run.json").write_text("{}"), "not of a run"),
    "a broken line": (lambda run: (run / "answers-0.jsonl").write_text('{"id": "0"\n'), "line 1 is not an answer"),
    "no answer": (lambda run: (run / "answers-0.jsonl").write_text('{"id": "0"}\n'), "line 1 is not an answer"),
    "another's": (lambda run: (run / "answers-3.jsonl").write_text('{"id": "x", "answer": ""}\n'), "line 1 is not"),
    "a list": (lambda run: (run / "answers-0.jsonl").write_text("[3]\n"), "line 1 is not an answer"),
    "an id that is a list": (
        lambda run: (run / "answers-0.jsonl").write_text('{"id": [], "answer": ""}\n'),
        "line 1 is not an answer",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_one_sentence(task, easy, finished, capsys, case):
    spoil, words = SPOILT[case]
    spoil(finished)
    assert words in refused(task, capsys, easy, finished)


def test_a_file_in_the_folders_place_is_one_sentence(task, easy, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "should be a folder" in refused(task, capsys, easy, tmp_path / "file")


def test_broken_images_are_named_and_all_else_is_answered(task, easy, tmp_path, capsys):
    """Once they are mended, the run goes on."""
    paths = [easy / "test" / "images" / f"{i}.png" for i in (1, 4, 5, 8)]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    try:
        sentence = refused(task, capsys, easy, tmp_path / "run", "--batch", 2)
    finally:
        for path, content in zip(paths, whole):
            path.write_bytes(content)
    assert "4 of the images cannot be read" in sentence and "once they are mended, the same command goes on" in sentence
    assert sum(str(path) in sentence for path in paths) == 3
    asked = {json.loads(line)["id"] for line in lines(tmp_path / "run")}
    assert asked == {str(i) for i in range(25) if (i * 7) % 10 not in (1, 4, 5, 8)}
    task(easy, tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 25


def test_what_is_wrong_with_an_image_names_it(folder):
    with pytest.raises(ValueError, match="^question 'q7': Cannot read the image: not an image"):
        with opened(b"x", folder, "q7"):
            pass
    with pytest.raises(ValueError, match="red.png: too long$"):
        with opened("red.png", folder, "q7") as image:
            assert image.size == (SIZE, SIZE)
            raise ValueError("too long")


def test_blank_images_are_read_by_nobody(task, easy, tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "load_image", None)
    task(easy, tmp_path / "run", "--images", "blank")
    assert "<img" not in (tmp_path / "run" / "index.html").read_text()


def test_a_full_memory_is_one_sentence(task, easy, monkeypatch, capsys):
    monkeypatch.setattr(answer, "ask", lambda *_: torch.empty(1 << 50))
    assert "the memory of cpu is full: try a smaller --batch" in refused(task, capsys, easy, None)


def test_other_errors_are_shown_in_full(task, easy, monkeypatch):
    monkeypatch.setattr(answer, "ask", lambda *_: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="must match"):
        task(easy, None)


@pytest.mark.parametrize("bits, why", [((), ""), (("--quantize", "int8"), "on a CPU they are fast in bfloat16 only\n")])
def test_what_is_said_of_fewer_bits_and_done_for_float32(folder, monkeypatch, capsys, bits, why):
    """On a CPU they are slow in float32; on CUDA float32 is not to be rounded."""
    (folder / "data.json").write_text(json.dumps([row(None, "Say it", "it")]))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    words = ["evaluate.py", "--data", str(folder / "data.json"), "--device", "cpu", "--precision", "fp32", *bits]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    said = capsys.readouterr().err
    assert (said.endswith(why) if why else said == "") and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--task", "easy-vqa"), "--folder"),
        (("--task", "easy-vqa", "--folder", "nowhere"), "https://pypi.org/project/easy-vqa"),
        (("--task", "coco", "--folder", "nowhere", "--max-new-tokens", "4"), "should be 8 or more for coco"),
        (("--task", "coco", "--folder", "nowhere", "--loss"), "--loss"),
        (("--data", "x.json", "--folder", "nowhere"), "--folder is for --task"),
        (("--ratings", "nowhere.json"), "nowhere.json"),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *flags])
    assert words in refused(evaluate.main, capsys)


# ----------------------------------------------------------------------------------------------------
# Pages

EVIL = '<script>alert(1)</script><img src=x onerror="a">&</p>'


class Elements(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, and its text but for scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = [], [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text += data if self.inside not in ("script", "style") else ""


def test_what_a_page_quotes_is_escaped(folder):
    """Words, groups, names, settings: all that they say is text."""
    question = Question("7" + EVIL, "<image>" + EVIL, ["red.png"], [EVIL, EVIL, "red"], group=EVIL)
    other = Question("8", "<image>" + EVIL, ["red.png"], EVIL)
    words = page(EVIL, {EVIL: 50.0}, [(question, EVIL, 0.3), (other, "fine", 1.0)], {EVIL: EVIL}, folder, 0)
    rate = rating_page([(question, EVIL, None)], {"7" + EVIL: EVIL}, EVIL, folder, 0)
    for html, n_evil, n_script in ((words, 8, 0), (rate, 3, 2)):
        elements = Elements(html)
        assert elements.text.count(EVIL) >= n_evil
        assert elements.tags.count("script") == n_script and elements.tags.count("img") == (2 if n_script == 0 else 1)
        known = {"alt", "charset", "class", "content", "http-equiv", "id", "lang", "name", "src", "type", "value"}
        assert {name for name, _ in elements.attributes} <= known
        assert all(value.startswith("data:image/jpeg;base64,") for name, value in elements.attributes if name == "src")
        assert "default-src 'none'" in html and ("name", "viewport") in elements.attributes
    assert "Right: 1 of 1" in words and "Wrong: 1 of 1" in words and "score 0.30" in words and "(x 2)" in words
    key = json.loads(re.search(r'id="key">(.*?)</script>', rate, re.S)[1])
    assert key["weights"] == EVIL and key["ratings"][0]["id"] == "7" + EVIL


def test_thumbnails_are_small_bounded_and_of_every_group(folder):
    Image.new("RGB", (900, 300), (9, 200, 9)).save(folder / "wide.png")
    content = (folder / "wide.png").read_bytes()
    results = [(Question(str(i), "<image>?", [content], "a", "big"), "a", 1.0) for i in range(60)]
    results += [(Question(f"s{i}", "<image>?", ["wide.png"], "a", "small"), "a", 1.0) for i in range(3)]
    chosen = pick(results, 24, seed=1)
    assert len(chosen) == 24 and sum(question.group == "small" for question, _, _ in chosen) == 3
    assert chosen == pick(results, 24, seed=1) != pick(results, 24, seed=2)
    many = [(Question(str(i), "?", [], "a", f"group {i // 3}"), "a", 1.0) for i in range(90)]
    groups = [{question.group for question, _, _ in pick(many, 24, seed)} for seed in range(5)]
    assert all(len(names) == 24 for names in groups) and len(set().union(*groups)) == 30
    html = page("t", {"n": 1.0, "m": 1234}, results, {}, folder, 1)
    assert "<td>1.00</td>" in html and "<td>1,234</td>" in html
    thumbnails = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", html)
    assert len(thumbnails) == 24
    assert {load_image(base64.b64decode(text)).size for text in thumbnails} == {(240, 80)}


@pytest.fixture(scope="module")
def owleval(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owleval")
    (folder / "images").mkdir()
    rows, published = [], []
    kinds = [["single_turn"], ["single_turn", "multi_turn"], ["multi_turn"], ["multi_turn"], ["single_turn"]]
    for i, (image, category) in enumerate(zip("12223", kinds), start=1):
        Image.new("RGB", (40, 30), (40 * i, 90, 200 - 30 * i)).save(folder / "images" / f"{image}.jpg")
        rows.append({"image": f"{image}.jpg", "question_id": i, "question": f"Ask {i}?"})
        rows[-1] |= {"ability": "a,f" if "multi_turn" in category else "a", "category": category}
        published.append({"question_id": i, "answer": f"published {i}"})
    for name, content in (("questions", rows), ("answers_mplug_owl_7b", published)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def test_owlevals_conversations_are_held_with_our_own_answers(task, owleval, tmp_path, monkeypatch):
    """In any batch; the image encoded once; a conversation that was cut in two goes on where it was."""
    seen, encoded = [], []
    real_encode = Owl.encode_images

    def echo(model, tokenizer, questions, images, *_):
        assert len(images) == sum("".join(messages).count("<image>") for messages in questions)
        seen.extend(map(tuple, questions))
        return [f"I say {messages[-1][-2]}" for messages in questions]

    monkeypatch.setattr(answer, "ask", echo)
    monkeypatch.setattr(Owl, "encode_images", lambda self, x: encoded.append(len(x)) or real_encode(self, x))
    for batch in (1, 2, 9):
        seen.clear(), encoded.clear()
        task(owleval, tmp_path / str(batch), "--batch", batch, "--max-new-tokens", 8, task="owleval")
        assert sorted(seen) == [
            ("<image>Ask 1?",),
            ("<image>Ask 2?",),
            ("<image>Ask 2?", "I say 2", "Ask 3?"),
            ("<image>Ask 2?", "I say 2", "Ask 3?", "I say 3", "Ask 4?"),
            ("<image>Ask 5?",),
        ]
        assert sum(encoded) == 3
    path = tmp_path / "1" / "answers-0.jsonl"
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row.get("before") for row in rows] == [None, None, ["2"], ["2", "3"], None]
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    seen.clear()
    task(owleval, tmp_path / "1", "--max-new-tokens", 8, task="owleval")
    assert [messages[-1] for messages in seen] == ["<image>Ask 5?", "Ask 4?"] and path.stat().st_size == len(whole)


def test_the_rating_page_tells_nobody_whose_answer_it_is(task, owleval, tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "ask", lambda model, tokenizer, questions, *_: ["OURS"] * len(questions))
    sides = set()
    for seed in range(6):
        out = tmp_path / str(seed)
        task(owleval, out, "--max-new-tokens", 8, "--seed", seed, task="owleval")
        html = (out / "rate.html").read_text()
        cards = re.findall(r'<div class="card"><p>(.*?)</p>(.*?)</div>', html)
        assert len(cards) == 10 and html.count('type="radio"') == 40
        key = json.loads(re.search(r'id="key">(.*?)</script>', html, re.S)[1])
        for i, row in enumerate(key["ratings"]):
            pair = {"left": cards[2 * i], "right": cards[2 * i + 1]}
            assert pair[row["ours"]][0] == "OURS"
            assert {name for _, radios in pair.values() for name in re.findall('name="(.*?)"', radios)} == {
                f"{i}left", f"{i}right",
            }  # fmt: skip
        order = [row["ours"] for row in key["ratings"]]
        assert order[1] == order[2] == order[3]  # a conversation
        sides.add(tuple(order))
        visible = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S)
        assert str(tmp_path) not in visible and "owl2" not in visible
    assert len(sides) > 2


@pytest.mark.parametrize("name", ["answer/mPLUG_Owl_7b_answer.jsonl", None, "too few"])
def test_the_published_answers_are_looked_for_before_anything_is_asked(
    task, owleval, tmp_path, monkeypatch, capsys, name
):
    place = shutil.copytree(owleval, tmp_path / "owleval")
    published = (place / "answers_mplug_owl_7b.jsonl").read_text().splitlines(keepends=True)
    if name == "too few":
        (place / "answers_mplug_owl_7b.jsonl").write_text("".join(published[:4]))
        monkeypatch.setattr(evaluate, "load_model", None)
        sentence = refused(task, capsys, place, tmp_path / "run", task="owleval")
        assert sentence.endswith("answers_mplug_owl_7b.jsonl has no answer to question 5")
        assert not (tmp_path / "run").exists()
        return
    (place / "answers_mplug_owl_7b.jsonl").unlink()
    if name:
        (place / name).parent.mkdir()
        (place / name).write_text("".join(published))
    said = []
    monkeypatch.setattr(answer, "ask", lambda *words: said.append(capsys.readouterr().err) or ["OURS"] * len(words[2]))
    task(place, tmp_path / "run", "--max-new-tokens", 8, task="owleval")
    assert (tmp_path / "run" / "rate.html").exists() == bool(name)
    assert ("there will be no page to rate" in said[0] and "answer/mPLUG_Owl_7b_answer.jsonl" in said[0]) == (not name)


def test_a_rating_page_saves_where_there_is_no_storage():
    """A browser that refuses it throws: what saves stands before."""
    assert report.SCRIPT.index("form.onsubmit") < report.SCRIPT.index("try {") < report.SCRIPT.index("localStorage")
    assert report.SCRIPT.rstrip().endswith("} catch {}")


RATINGS = [
    {"id": "1", "ability": "a, b", "ours": "A", "published": "D"},
    {"id": "2", "ability": "a", "ours": "B", "published": "A"},
    {"id": "3", "ability": "b,f", "ours": "C", "published": None},
]


def test_ratings_are_counted(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ratings.json"
    path.write_text(json.dumps({"weights": "mine", "ratings": RATINGS}))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ratings", str(path)])
    evaluate.main()
    said = capsys.readouterr().out
    table = {tuple(line[:38].split()): [int(n) for n in line[38:].split()] for line in said.splitlines()[4:]}
    assert "ours: 'mine'" in said and "rated: 2 of 3 questions" in said
    assert table == {
        ("all", "ours"): [1, 1, 1, 0, 2, 0],
        ("all", "published"): [1, 0, 0, 1, 1, 1],
        ("instructions", "ours"): [1, 1, 0, 0, 2, 0],
        ("instructions", "published"): [1, 0, 0, 1, 1, 0],
        ("seeing", "ours"): [1, 0, 1, 0, 1, 0],
        ("seeing", "published"): [0, 0, 0, 1, 0, 1],
        ("several", "turns", "ours"): [0, 0, 1, 0, 0, 0],
        ("several", "turns", "published"): [0, 0, 0, 0, 0, 1],
    }


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ours": "E"}, "ours should be one of A, B, C, D"),
        ({"ours": 3}, "ours should be a text"),
        ({"ability": None}, "ability should be a text"),
        ({"id": "1"}, "question '1' is there twice"),
    ],
)
def test_ratings_of_nobody_are_one_sentence(tmp_path, change, words):
    path = tmp_path / "ratings.json"
    path.write_text(json.dumps({"weights": "mine", "ratings": [RATINGS[0], RATINGS[1] | change]}))
    with pytest.raises(ValueError, match=f"ratings 1: {words}"):
        count_ratings(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="should be an object"):
        count_ratings(path)


def test_scores_are_there_for_others():
    assert evaluate.vqa_accuracy("red", ["red"] * 10) == 1.0
    assert evaluate.cider(["a"], [["b"]])[0] == 0.0
