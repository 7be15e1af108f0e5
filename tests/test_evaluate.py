"""evaluate.py and its runner: answers, run folders, pages, and refused input."""

import base64
import errno
import functools
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate
import lora
from conftest import GOLDEN, assert_close, make_config, make_owl
from data.image import load_image, to_pixels
from data.text import OWL1_SYSTEM, Tokenizer, render_conversation
from evaluation import html_report, results, runner
from evaluation.html_report import report_page, sample_results
from evaluation.metrics import Number, percent
from evaluation.owleval import count_ratings, rating_page
from evaluation.question import Question
from evaluation.runner import Runner
from inference import batch
from inference.batch import choose, encode_prompt
from evaluation.scoring import is_exact_match
from inference.adapter import save_lora
from inference.fast_decode import FastDecoder
from model import Owl
from runs import in_processes, run_main
from training.distributed import Dist
from weights import load_model, save_model

SIZE = 28
COLORS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
FIXTURES = Path(__file__).parent / "fixtures" / "benchmarks"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """weights(variant) -> folder of a tiny random model with a context of 96, and its tokenizer."""

    @functools.cache
    def make(variant: str) -> Path:
        folder = tmp_path_factory.mktemp(variant)
        llama = {"vocab_size": 2000, "context": 96}
        model = make_owl(make_config(variant, vit={"image_size": SIZE, "patch_size": 14}, llama=llama))
        model.tokenizer_folder = GOLDEN / "text"
        save_model(model, folder)
        return folder

    return make


@pytest.fixture
def make_runner(weights):
    """make_runner(variant, **options) -> Runner of that model."""

    def make(variant: str = "owl2", context: int = 96, **options: object) -> Runner:
        model, tokenizer = load_model(weights(variant)), Tokenizer(weights(variant))
        model.config.llama.context = context
        return Runner(model, tokenizer, Dist(0, 1, torch.device("cpu"), torch.float32), Path(), "square", **options)

    return make


@pytest.fixture
def folder(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (SIZE, SIZE), color).save(tmp_path / f"{name}.png")
    return tmp_path


def row(image: str | list | None, *turns: str) -> dict:
    conversation = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"image": image, "conversations": conversation}


GOOD = row("red.png", "<image>Which?", "red")


@pytest.fixture
def data(folder, weights):
    """data(rows, variant) -> flags to ask the questions of these rows."""

    def write(rows: list, variant: str = "owl2") -> list:
        (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
        return ["--data", folder / "data.json", "--weights", weights(variant)]

    return write


@pytest.fixture(scope="module")
def task(weights):
    """task(folder, out, *flags, name) -> flags to run a benchmark."""

    def flags(folder: Path, out: Path | None, *more: object, name: str = "easy-vqa") -> list:
        output = ["--out", out] if out else []
        return ["--task", name, "--folder", folder, "--weights", weights("owl2"), *output, *more]

    return flags


def main(*flags: object) -> str:
    """Returns what evaluate.py prints to stdout."""
    code, out, err = run_main(evaluate.main, "--device", "cpu", *flags)
    assert code == 0, err
    return out


def refused(*flags: object) -> str:
    """Returns the one line of an exit with code 2."""
    code, _, err = run_main(evaluate.main, "--device", "cpu", *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


def scores(printed: str) -> dict[str, tuple[int, int]]:
    """Parses the table of --data. Returns {name: (right, asked)}."""
    table = {}
    for line in printed.splitlines():
        name, right, _, asked, number = line.rsplit(maxsplit=8)[:4] + [" ".join(line.rsplit(maxsplit=5)[1:])]
        assert number == str(percent(int(right), int(asked)))
        table[name] = (int(right), int(asked))
    return table


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_always(text: str):
    return lambda model, tokenizer, questions, *_, **__: [text] * len(questions)


@pytest.fixture
def color_model(monkeypatch):
    """Replaces the model by one that names the brightest channel of the last image, or repeats the text after "Say".

    Returns the list of images that it receives."""
    seen = []

    def answer(decoder, tokenizer, questions, images, **options):
        images = iter(images)
        answers = []
        for (question,) in questions:
            own = [next(images) for _ in range(question.count("<image>"))]
            seen.extend(own)
            color = list(COLORS)[int(own[-1].mean(dim=(1, 2)).argmax())] if own else None
            answers.append(color or question.removeprefix("Say "))
        return answers

    monkeypatch.setattr(runner, "ask", answer)
    monkeypatch.setattr(Owl, "encode_images", lambda self, images: images)
    return seen


def test_one_decoder_for_all_batches(make_runner, monkeypatch):
    """So that on CUDA its graphs are captured once."""
    decoders, generate = [], FastDecoder.generate
    monkeypatch.setattr(FastDecoder, "generate", lambda self, *a, **k: decoders.append(self) or generate(self, *a, **k))
    make_runner(batch_size=2, max_new_tokens=2).run([Question(str(i), "What?", []) for i in range(5)], {})
    assert len(decoders) == 3 and len(set(map(id, decoders))) == 1


# --- --data: a file of questions ------------------------------------------------------------------


def test_exact_match():
    """Case, surrounding whitespace and one full stop do not count; everything else does."""
    assert is_exact_match(" Yes.\n", "yes") and is_exact_match("YES", "yes") and is_exact_match("1.5", "1.5")
    assert not is_exact_match("two cats", "twocats") and not is_exact_match("yes!", "yes")


def test_answers_are_counted(data, color_model, folder):
    """In all, yes/no questions apart, and by kind, seen and the answers of image and text; --out lists the answers.

    Only the first question of a conversation is asked.
    """
    rows = [
        row("red.png", "<image>Which?", "Red.") | {"kind": "color", "seen": True},
        row(["red.png", "blue.png"], "<image><image>The last?", " BLUE ") | {"kind": "color", "seen": False},
        row(["green.png", "red.png"], "<image>Which?", "greenish", "<image>And?", "red") | {"seen": False},
        row("blue.png", "<image>Which?", "blue") | {"kind": "word", "image_answer": "Blue", "text_answer": "red"},
        row(None, "Say red", "blue") | {"kind": "word", "image_answer": "blue", "text_answer": "red."},
        row(None, "Say no", "yes", "Say more", "more"),
        row(None, "Say Yes.", "yes"),
    ]
    table = scores(main(*data(rows), "--out", folder / "answers.jsonl", "--batch", 2))
    expected = {"yes or no": (1, 2), "other": (3, 5), "all": (4, 7), "color": (2, 2), "word": (1, 2)}
    expected |= {"seen": (1, 1), "unseen": (1, 2), "image_answer": (1, 2), "text_answer": (1, 2)}
    assert table == expected
    lines = read_jsonl(folder / "answers.jsonl")
    listed = {"images": ["red.png"], "question": "<image>Which?", "answer": "red", "truth": "Red."}
    assert lines[0] == listed | {"kind": "color", "seen": True}
    assert [line["answer"] for line in lines] == ["red", "blue", "green", "blue", "red", "no", "Yes."]


def test_control_characters_are_not_printed(data, color_model):
    assert "\\x1b[31mred" in main(*data([GOOD | {"kind": "\x1b[31mred"}]))


def test_out_is_written_at_the_end_and_replaces_only_its_own_files(data, color_model, folder):
    out, flags = folder / "answers.jsonl", data([GOOD])
    main(*flags, "--out", out)
    written = out.read_bytes()
    assert json.loads(written)["answer"] == "red"
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:50])
    assert "broken.png" in refused(*data([GOOD, row("broken.png", "<image>?", "a")]), "--out", out)
    assert out.read_bytes() == written
    assert "answers.jsonl.run" in refused(*data([GOOD, GOOD]), "--out", out)  # other questions
    shutil.rmtree(folder / "answers.jsonl.run")
    main(*data([GOOD, GOOD]), "--out", out)
    assert len(read_jsonl(out)) == 2 and not [*folder.glob("*.part"), *folder.glob("*.run")]

    (folder / "empty").touch()
    (folder / "link").symlink_to(out)
    os.mkfifo(folder / "fifo")
    write_jsonl(folder / "other.jsonl", [json.loads(written) | {"conversations": []}])
    others = ("data.json", f"../{folder.name}/data.json", "red.png", "empty", "other.jsonl", "link", "fifo", ".")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in (*others, "/dev/null", "x" * 300):
        refused(*flags, "--out", folder / name)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert (folder / "link").is_symlink()


def test_killed_run_of_a_file_continues(data, color_model, folder, monkeypatch):
    """Answers are saved as they arrive, beside --out, and are not asked again; the final file is in the file's order."""
    rows = [row(None, f"Say {i}", str(i % 3)) for i in range(7)]
    flags = [*data(rows), "--out", folder / "answers.jsonl", "--batch", 2]
    real, asked = runner.ask, []

    def fail_at_third(*arguments, **options):
        asked.append(len(arguments[2]))
        if len(asked) == 3:
            raise KeyboardInterrupt(signal.SIGTERM)
        return real(*arguments, **options)

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(runner, "ask", fail_at_third)
    code, _, err = run_main(evaluate.main, "--device", "cpu", *flags)
    for n, handler in before.items():
        signal.signal(n, handler)
    assert code == 128 + signal.SIGTERM and "the same command continues" in err
    assert not (folder / "answers.jsonl").exists()
    saved = read_jsonl(folder / "answers.jsonl.run" / "answers-0.jsonl")
    assert [line["answer"] for line in saved] == ["0", "1", "2", "3"]
    file = next(Path(flags[3]).glob("*.safetensors"))
    date = file.stat().st_mtime_ns
    os.utime(file, ns=(date, date + 10**9))  # as if the model had been trained anew
    assert "date of model" in refused(*flags)
    os.utime(file, ns=(date, date))
    assert scores(main(*flags))["all"] == (3, 7)
    assert sum(asked[3:]) == 3 and not (folder / "answers.jsonl.run").exists()
    assert [line["answer"] for line in read_jsonl(folder / "answers.jsonl")] == [str(i) for i in range(7)]


def test_limit_of_a_file(data, color_model, folder):
    """Evenly spaced, with the same answers; more than there are means all."""
    flags = [*data([row(None, f"Say {i}", "5") for i in range(10)]), "--out", folder / "answers.jsonl"]
    assert scores(main(*flags, "--limit", 2))["all"] == (1, 2)
    assert [line["answer"] for line in read_jsonl(folder / "answers.jsonl")] == ["0", "5"]
    assert scores(main(*flags, "--limit", 99))["all"] == (1, 10)


def test_text_format_of_owl1(data, color_model):
    text = f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: Which?\nAI: red"
    assert scores(main(*data([{"image": ["red.png"], "text": text}], "owl1")))["all"] == (1, 1)


def test_rows_are_read_as_in_training(data, color_model, folder):
    """OpenAI's messages with an image in the row, `images`, and an absolute path below the image root."""
    url = "data:image/png;base64," + base64.b64encode((folder / "blue.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which?"}]
    openai = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "blue"}]}
    listed = {"images": ["green.png"], "conversations": row(None, "<image>Which?", "green")["conversations"]}
    flags = data([openai, listed, row(str(folder / "red.png"), "<image>Which?", "red")])
    assert scores(main(*flags, "--out", folder / "answers.jsonl"))["all"] == (3, 3)
    assert len(read_jsonl(folder / "answers.jsonl")) == 3
    assert scores(main(*flags, "--images", "shuffled"))["all"][1] == 3
    del listed["images"]
    for name in ("images", "video"):
        unmarked = row(None, "Which?", "green") | {name: ["green.png"]}
        assert "row 1" in refused(*data([openai, unmarked]))


def test_blank_and_shuffled_images(data, color_model):
    """Blank images are zero. Shuffled ones are a permutation that depends on the seed alone."""
    flags = data([row(f"{name}.png", "<image>Which?", name) for name in [*COLORS] * 3])
    assert scores(main(*flags))["all"] == (9, 9)
    right = torch.stack(color_model)
    color_model.clear()
    main(*flags, "--images", "blank")
    assert not torch.stack(color_model).any()
    shuffled = []
    for seed in (0, 0, 1):
        color_model.clear()
        assert scores(main(*flags, "--images", "shuffled", "--seed", seed))["all"] < (9, 9)
        shuffled.append(torch.stack(color_model))
        assert sorted(shuffled[-1].sum(dim=(1, 2, 3)).tolist()) == sorted(right.sum(dim=(1, 2, 3)).tolist())
    assert torch.equal(shuffled[0], shuffled[1]) and not torch.equal(shuffled[0], shuffled[2])


@pytest.mark.parametrize(
    "variant, flags, fit", [("owl1", (), "stretch"), ("owl2", (), "square"), ("owl2", ("--fit", "crop"), "crop")]
)
def test_fit(data, color_model, folder, variant, flags, fit):
    noise = torch.randint(0, 256, (40, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "noise.png")
    main(*data([row("noise.png", "<image>?", "x")], variant), *flags)
    assert torch.equal(color_model[0], to_pixels(load_image(folder / "noise.png"), SIZE, fit))


def test_loss_of_no_row_is_an_error(data):
    """Not a loss of 0."""
    flags = data([row("gone.png", "<image>?", "a")])
    code, out, err = run_main(evaluate.main, "--device", "cpu", *flags, "--loss")
    assert (code, out) == (2, "") and "gone.png" in err and "error: no row" in err


def test_loss_equals_cross_entropy_of_the_logits(data, weights):
    rows = [row(None, "One?", "Two.", "Three?", "Four.")]
    printed = main(*data(rows), "--loss")
    model = load_model(weights("owl2"))
    ids, labels = render_conversation(rows[0]["conversations"], Tokenizer(weights("owl2")), "owl2")
    logits, _ = model(torch.tensor([ids]))
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(labels[1:]), ignore_index=-100)
    assert_close(float(printed), expected.item())


@pytest.fixture
def adapter(weights, tmp_path):
    """A folder with an adapter that changes the answers, and the model with it merged."""
    model = load_model(weights("owl2"))
    lora.inject_lora(model.llama, ("q_proj", "v_proj"), rank=2, alpha=4)
    torch.manual_seed(0)
    for _, module in lora.lora_modules(model):
        torch.nn.init.normal_(module.lora_B.weight)
    save_lora(model, tmp_path / "adapter")
    lora.merge_lora(model)
    save_model(model, tmp_path / "merged")
    shutil.copy(weights("owl2") / "tokenizer.model", tmp_path / "merged")
    return tmp_path / "adapter"


def test_adapter(data, task, easy, adapter):
    """The loss is that of the merged model. A run does not continue with another adapter."""
    flags = [*data([row(None, "One?", "Two.", "Three?", "Four.")]), "--loss"]
    merged = float(main(*flags, "--weights", adapter.parent / "merged"))
    assert_close(float(main(*flags, "--adapter", adapter)), merged)
    assert abs(float(main(*flags)) - merged) > 0.01
    flags = task(easy, adapter.parent / "run", "--adapter", adapter)
    main(*flags)
    main(*flags)
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + " ")
    assert "adapter" in refused(*flags)
    assert "adapter_config.json" in refused(*data([GOOD]), "--adapter", adapter.parent)


BAD_ROWS = {
    "link outside": (row("link.png", "<image>?", "a"), "link.png"),
    "missing image": (row("gone.png", "<image>?", "a"), "gone.png"),
    "image outside": (row("../outside.png", "<image>?", "a"), "not a path below"),
    "absolute image": (row(str(GOLDEN.parent / "data.png"), "<image>?", "a"), "not a path below"),
    "no answer": (row(None, "a"), "row 1"),
    "not an object": (["a"], "row 1"),
    "image is a number": (row(3, "<image>?", "a"), "row 1"),
    "images are numbers": (row([3], "<image>?", "a"), "row 1"),
    "too few images": (row("red.png", "<image><image>?", "a"), "row 1"),
    "too long": (row(None, "word " * 200, "a"), "context"),
    "lone surrogate in a note": (GOOD | {"kind": "\udfff"}, "row 1"),
    "seen is text": (GOOD | {"seen": "yes"}, "row 1: seen"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_one_line(data, folder, case):
    bad, words = BAD_ROWS[case]
    Image.new("RGB", (4, 4)).save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    assert words in refused(*data([GOOD, bad, GOOD]))


def test_broken_json_line_is_named(data, folder):
    (folder / "lines.jsonl").write_text(json.dumps(GOOD) + "\n{oops\n")
    assert "row 1" in refused(*data([]), "--data", folder / "lines.jsonl")


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--data", "no-such.json"), "no-such.json"),
        (("--weights", "no-such-folder"), "no-such-folder"),
        (("--weights", GOLDEN / "text"), "config.json"),
        (("--weights", GOLDEN / "owl2"), "tokenizer"),
        (("--batch", "0"), "--batch"),
        (("--device", "banana"), "banana"),
        (("--out", "no-such-folder/log.jsonl"), "no-such-folder"),
        (("--loss", "--out", "log.jsonl"), "--loss"),
        (("--folder", "nowhere"), "--folder"),
        (("--task", "easy-vqa"), "--folder"),
        (("--task", "easy-vqa", "--folder", "nowhere"), "https://pypi.org/project/easy-vqa"),
        (("--task", "coco", "--folder", "nowhere", "--max-new-tokens", "4"), "--max-new-tokens"),
        (("--task", "arc-e", "--folder", "nowhere", "--max-new-tokens", "4"), "--max-new-tokens"),
        (("--ratings", "nowhere.json"), "nowhere.json"),
        (("--ratings", ""), "--ratings"),
        (("--ratings", "/dev/zero"), "/dev/zero"),
        (("--device", ""), "--device"),
        (("--weights", ""), "--weights"),
        (("--image-root", ""), "--image-root"),
        (("--out", ""), "--out"),
        (("--limit", 0), "--limit"),
        (("--loss", "--limit", 3), "--loss"),
        (("--loose-letters",), "--loose-letters"),
        (("--task", "vqav2", "--folder", "nowhere", "--loose-letters"), "--loose-letters"),
        (("--batch", 10**12), "--batch"),
        (("--batch", "9" * 5000), "--batch"),
        (("--max-new-tokens", 10**12), "--max-new-tokens"),
        (("--seed", "x\x1b[31m\n"), "--seed"),
    ],
)
def test_wrong_flag_is_one_line(data, flags, words):
    assert words in refused(*([] if flags[0] in ("--task", "--ratings") else data([GOOD])), *flags)


def test_slow_quantization_is_reported_and_tf32_is_off(data, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    flags = data([row(None, "Say it", "it")]) + ["--device", "cpu", "--precision", "fp32", "--quantize", "int8"]
    code, _, err = run_main(evaluate.main, *flags)
    assert code == 0 and "bfloat16" in err and not torch.backends.cudnn.allow_tf32


# --- The runner -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ("owl1", "owl2"))
def test_answers_do_not_depend_on_the_batch(folder, make_runner, variant):
    """Questions of different lengths, with and without images: alone, two at a time, all at once."""
    prompts = ["<image>What?", "Why?", "<image>Which of these is the one?", "<image><image>Both?", "And what is it?"]
    images = [["red.png"], [], ["green.png"], ["blue.png", "red.png"], []]
    questions = [Question(str(i), prompt, images[i]) for i, prompt in enumerate(prompts)]
    runners = [make_runner(variant, batch_size=size, max_new_tokens=6) for size in (1, 2, 5)]
    for run in runners:
        run.folder = folder
    alone, *batched = [run.run(questions, {}) for run in runners]
    assert batched == [alone, alone] and len(set(alone.values())) > 1


@pytest.mark.parametrize("variant", ("owl1", "owl2"))
def test_long_conversation_loses_its_first_turns_but_no_image(make_runner, variant):
    run = make_runner(variant, context=160, max_new_tokens=8)
    turns = [Question("1", "<image>What is it?", ["a.png"]), Question("2", "And why?", [], before=["1"])]
    turns += [Question("3", "<image>This too?", ["b.png"], before=["1", "2"])]
    answers = {"1": "A <image> cat.", "2": "No."}
    kept, messages = run.fit_prompt(turns, answers)
    assert [turn.id for turn in kept] == ["1", "2", "3"]
    assert messages == ["<image>What is it?", "A   cat.", "And why?", "No.", "<image>This too?"]
    run.max_new_tokens = 40 if variant == "owl1" else 75
    kept, messages = run.fit_prompt(turns, answers | {"1": "word " * 30})
    assert messages == ["<image>And why?", "No.", "<image>This too?"] and [turn.id for turn in kept] == ["2", "3"]
    run.max_new_tokens = 90
    kept, messages = run.fit_prompt(turns, answers | {"2": "word " * 30})
    assert messages == ["<image><image>This too?"] and [turn.id for turn in kept] == ["3"]
    assert len(encode_prompt(messages, run.model, run.tokenizer)) <= 160
    with pytest.raises(ValueError, match="question '9'.* context"):
        run.fit_prompt([Question("9", "word " * 200, [])], {})


def test_long_prompt_loses_its_last_worked_examples(make_runner):
    run = make_runner(max_new_tokens=0)
    shots = [f"Is {n} a number? yes\n\n" for n in range(9)]
    question = Question("q", "Answer.\n" + "".join(shots) + "Is cat a number?", [], "no", "", ["yes", "no"], shots)
    (fit,), (prompt,) = run.fit_prompt([question], {})
    assert 0 < len(fit.shots) < 9 and prompt == fit.prompt == "Answer.\n" + "".join(fit.shots) + "Is cat a number?"
    length = len(encode_prompt(prompt, run.model, run.tokenizer))
    assert length <= 96 < length + 25


@pytest.mark.parametrize("space", (False, True))
def test_space_of_a_prompt_reaches_the_model(make_runner, monkeypatch, space):
    run, seen = make_runner(max_new_tokens=3), []
    real = batch.pad
    monkeypatch.setattr(batch, "pad", lambda rows, *rest: seen.extend(rows) or real(rows, *rest))
    run.run([Question("1", "Why?", [], space=space)], {})
    plain = encode_prompt("Why?", run.model, run.tokenizer)
    assert seen == [plain + run.tokenizer.encode("ASSISTANT: ")[-1:] if space else plain]


@pytest.mark.parametrize("variant", ("owl1", "owl2"))
def test_choose_equals_a_plain_loop(weights, variant):
    """Choices of one and of several tokens that begin alike, with and without images; alone and in a batch."""
    model, tokenizer = load_model(weights(variant)), Tokenizer(weights(variant))
    lists = [["A", "B", "C", "D"], ["the cat sat", "the cat ran", "the dog", "some dog"], ["yes", "no"], ["I see", "B"]]
    generator = torch.Generator().manual_seed(0)
    images = [[torch.randn(3, SIZE, SIZE, generator=generator) for _ in range(i % 3)] for i in range(12)]
    questions = ["<image>" * len(own) + f"Question {i}, what is it?" for i, own in enumerate(images)]
    choices = [lists[i % 4] for i in range(12)]
    expected = []
    for question, own, texts in zip(questions, images, choices):
        sums = []
        for text in texts:
            prompt, tokens = encode_prompt(question, model, tokenizer), tokenizer.encode(text)
            with torch.no_grad():
                logits, _ = model(torch.tensor([prompt + tokens]), torch.stack(own) if own else None)
            log_p = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            sums.append(log_p.gather(1, torch.tensor(tokens)[:, None]).sum().item())
        expected.append(texts[sums.index(max(sums))])
    together = choose(model, tokenizer, questions, sum(images, []), choices=choices)
    alone = [choose(model, tokenizer, [q], own, choices=[c])[0] for q, own, c in zip(questions, images, choices)]
    assert together == alone == expected
    assert len(set(expected)) > 3


def test_questions_of_several_kinds_share_a_batch(make_runner):
    """With a space and without, with choices and without: each is asked as it is alone."""
    kinds = [{}, {"space": True}, {"choices": ["A", "B"]}, {"space": True}, {"choices": ["the cat", "a dog"]}]
    questions = [Question(str(i), "What is it?", [], **kind) for i, kind in enumerate(kinds)]
    together, alone = (make_runner(batch_size=size, max_new_tokens=6).run(questions, {}) for size in (5, 1))
    assert together == alone and alone["0"] != alone["1"]


@pytest.mark.parametrize("flags", [("--loss",), ("--max-new-tokens", 5), ()])
def test_logits_that_are_not_finite_are_an_error(data, task, weights, tmp_path, flags):
    """Not a loss of nan, and not wrong answers."""
    model = load_model(weights("owl2"))
    model.llama.norm.weight.data[3] = torch.nan
    model.tokenizer_folder = GOLDEN / "text"
    save_model(model, tmp_path / "nan")
    asked = data([row(None, "One?", "Two.")]) if flags else task(FIXTURES / "arc-c", tmp_path / "run", name="arc-c")
    assert re.search("finite|nan", refused(*asked, *flags, "--weights", tmp_path / "nan").replace(str(tmp_path), ""))
    assert not (tmp_path / "run").exists() or not saved_lines(tmp_path / "run")


def test_unreadable_image_content_is_named_by_its_question(folder):
    with pytest.raises(ValueError, match="question 'q7'"), runner.open_image(b"x", folder, "q7"):
        pass


# --- Benchmarks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A folder of easy-VQA: 10 images of noise with one to four questions each, in no order."""
    folder = tmp_path_factory.mktemp("easy")
    (folder / "test" / "images").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for i in range(10):
        noise = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / "test" / "images" / f"{i}.png")
    rows = [[f"Is number {i} {'very ' * (i % 4)}red?", ("yes", "red", "no")[i % 3], (i * 7) % 10] for i in range(25)]
    (folder / "test" / "questions.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def finished_run(task, easy, tmp_path_factory):
    """A finished run with the default flags. Shared: do not modify it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    main(*task(easy, out))
    return out


@pytest.fixture
def finished(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))


def saved_lines(out: Path) -> list[bytes]:
    """Returns all answers of a run, sorted."""
    return sorted(line for path in out.glob("answers-*.jsonl") for line in path.read_bytes().splitlines())


def test_two_processes_give_the_same_answers_and_one_continues_their_run(easy, task, finished_run, tmp_path):
    """Byte for byte, with the same numbers and for any batch size."""
    two, expected = tmp_path / "two", saved_lines(finished_run)
    assert len(expected) == 25 and len({json.loads(line)["answer"] for line in expected}) > 5
    in_processes(2, tmp_path, main, *task(easy, two, "--batch", 4))
    content = (two / "answers-1.jsonl").read_bytes()
    for batch in (4, 1):
        assert saved_lines(two) == expected
        assert (two / "answers.jsonl").read_bytes() == (finished_run / "answers.jsonl").read_bytes()
        numbers = [json.loads((out / "results.json").read_text())["numbers"] for out in (two, finished_run)]
        assert numbers[0] == numbers[1] and len(numbers[0]) == 3
        if batch == 4:
            n_bytes = len(content) // 2
            (two / "answers-1.jsonl").write_bytes(content[:n_bytes] + b"\0\0\0")  # an incomplete line, which is cut off
            main(*task(easy, two, "--batch", 1))
    assert (two / "answers-1.jsonl").read_bytes() == content[: content.rindex(b"\n", 0, n_bytes) + 1]
    starts = json.loads((two / "run.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 1]


def fail_on_rank_1(*flags: object) -> None:
    real = evaluate.load_model_and_tokenizer

    def load(*arguments):
        if os.environ["RANK"] == "1":
            raise ValueError("this one fails")
        return real(*arguments)

    evaluate.load_model_and_tokenizer = load
    print(refused(*flags), file=sys.stderr, flush=True)
    os._exit(0)  # the process group cannot be destroyed


def test_failed_process_ends_the_others_with_one_line(easy, task, tmp_path):
    first, second = in_processes(2, tmp_path, fail_on_rank_1, *task(easy, tmp_path / "run"))
    assert "this one fails" in second and "another process" in first
    assert 0 < len(saved_lines(tmp_path / "run")) < 25


def test_killed_run_continues(task, easy, finished):
    """Wherever the file of answers ends, within a line or between two, the final answers are the same."""
    content = (finished / "answers-0.jsonl").read_bytes()
    rows, line = read_jsonl(finished / "answers.jsonl"), content.index(b"\n")
    for n_bytes in (0, line, line + 1, len(content) // 2):
        (finished / "answers-0.jsonl").write_bytes(content[:n_bytes])
        for name in ("answers.jsonl", "results.json", "index.html"):
            (finished / name).unlink()
        main(*task(easy, finished, "--batch", 5))
        assert saved_lines(finished) == sorted(content.splitlines())
        assert read_jsonl(finished / "answers.jsonl") == rows
    assert len(json.loads((finished / "run.json").read_text())["starts"]) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_continues(task, easy, finished_run, tmp_path, monkeypatch, number):
    """Every answer is saved except those of the batch in progress."""
    real, on_disk = runner.ask, []

    def interrupted(*arguments, **options):
        on_disk.append((tmp_path / "run" / "answers-0.jsonl").read_bytes().count(b"\n"))
        if len(on_disk) == 3:
            signal.raise_signal(number)
        return real(*arguments, **options)

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with monkeypatch.context() as patch:
        patch.setattr(runner, "ask", interrupted)
        code, _, err = run_main(evaluate.main, "--device", "cpu", *task(easy, tmp_path / "run", "--batch", 4))
    for n, handler in before.items():
        signal.signal(n, handler)
    assert code == 128 + number and "continues" in err
    assert on_disk == [0, 4, 8] and len(saved_lines(tmp_path / "run")) == 8
    main(*task(easy, tmp_path / "run"))
    assert saved_lines(tmp_path / "run") == saved_lines(finished_run)


def test_full_disk_is_named_and_the_run_continues(task, easy, finished_run, tmp_path):
    """Where a limit on the size of files stands for the full disk: in the middle of an answer."""
    flags, half = task(easy, tmp_path / "run"), (finished_run / "answers-0.jsonl").stat().st_size // 2
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))
    try:
        assert "answers-0.jsonl" in refused(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "run" / "answers-0.jsonl").stat().st_size == half
    main(*flags)
    assert saved_lines(tmp_path / "run") == saved_lines(finished_run)


def test_each_image_is_read_and_encoded_once(task, easy, tmp_path, monkeypatch):
    """For any batch size; a finished run reads none. Pillow's warning filters are restored."""
    read, encoded = [], []
    real_read, real_encode, filters = runner.load_image, Owl.encode_images, list(warnings.filters)
    monkeypatch.setattr(html_report, "thumbnail", lambda *_, **__: "")
    monkeypatch.setattr(runner, "load_image", lambda source: read.append(source) or real_read(source))
    monkeypatch.setattr(Owl, "encode_images", lambda self, x: encoded.append(len(x)) or real_encode(self, x))
    for batch, n in ((2, 10), (7, 20), (7, 20)):
        main(*task(easy, tmp_path / str(batch), "--batch", batch))
        assert len(read) == sum(encoded) == n and len(set(read)) == 10
    assert warnings.filters == filters


def test_files_of_a_run(task, easy, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ask", answer_always("Yes."))
    printed = main(*task(easy, tmp_path / "run"))
    rows = read_jsonl(tmp_path / "run" / "answers.jsonl")
    assert [row["id"] for row in rows] == [str(i) for i in range(25)]
    asked = {"id": "0", "prompt": "<image>Is number 0 red?", "answer": "Yes."}
    assert rows[0] == asked | {"truth": "yes", "group": "yes or no", "score": 1.0}
    assert asked in [json.loads(line) for line in saved_lines(tmp_path / "run")]
    assert re.search(r"^accuracy +36\.00 % \(\d+\.\d\d to \d+\.\d\d\), n = 25$", printed, re.M) and sum(row["score"] for row in rows) == 9  # of 25
    assert printed.startswith(main(*task(easy, None)))  # without the line of the page's path
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["max_new_tokens"] == 10 and len(run["settings"]["sha256 of tokenizer.model"]) == 64
    assert run["settings"]["bytes of model-00001-of-00001.safetensors"] > 1000
    start = run["starts"][0]
    assert set(start["versions"]) == {"torch", "numpy", "pillow", "sentencepiece", "python", "cuda", "owlet"}
    sizes = [path.stat().st_size for path in (easy / "test" / "images").iterdir()]
    assert (start["image_files"], start["image_bytes"]) == (10, sum(sizes))


def test_limit_of_a_benchmark(task, easy, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ask", answer_always("yes"))
    printed = main(*task(easy, tmp_path / "run", "--limit", 5))
    assert [row["id"] for row in read_jsonl(tmp_path / "run" / "answers.jsonl")] == ["0", "5", "10", "15", "20"]
    assert "(5 of 25 questions)" in printed.splitlines()[0] and ", n = 5" in printed
    assert "(5 of 25 questions)" in (tmp_path / "run" / "index.html").read_text()
    assert "questions: 5, now 6" in refused(*task(easy, tmp_path / "run", "--limit", 6))


def test_list_of_files():
    printed = main("--list")
    assert len(printed.split("\n\n")) == len(evaluate.BENCHMARKS)
    assert "vqav2: VQAv2 val" in printed and "val2014/" in printed and "https://visualqa.org" in printed


def test_loose_letters(task, tmp_path, monkeypatch):
    """They change the scores, not the answers: a finished run is scored again either way."""
    monkeypatch.setattr(runner, "ask", answer_always("The correct option is B"))
    flags = task(FIXTURES / "mmbench", tmp_path / "run", name="mmbench")
    strict, loose = main(*flags), main(*flags, "--loose-letters")
    assert re.search(r"^accuracy +0\.00 %", strict, re.M) and "sentences" not in strict
    assert "(letters also from sentences)" in loose.splitlines()[0]
    rows = read_jsonl(tmp_path / "run" / "answers.jsonl")
    assert [row["score"] for row in rows] == [float(row["truth"] == "B") for row in rows] and len(set(map(str, rows))) > 1
    assert sum(row["score"] for row in rows) == 1


def test_strange_names_are_escaped(task, easy, weights, tmp_path):
    """Control characters, and bytes that are not UTF-8 (with which safetensors opens no file)."""
    name, model = os.fsdecode(b"a\xff\x1b[31m\nb"), "m\x1b[31m\nb"
    shutil.copytree(weights("owl2"), tmp_path / model)
    shutil.copytree(easy, tmp_path / "easy" / name)
    printed = main(*task(tmp_path / "easy" / name, tmp_path / f"run{name}", "--weights", tmp_path / model))
    assert "\\x1b[31m" in printed and printed.encode() and "\x1b" not in printed
    assert (tmp_path / f"run{name}" / "index.html").exists()


def test_finished_run_is_scored_again_without_asking(task, easy, finished, monkeypatch):
    monkeypatch.setattr(runner, "ask", None)
    monkeypatch.setattr(evaluate.BENCHMARKS["easy-vqa"], "score", lambda answers, questions: [1.0] * len(answers))
    assert re.search(r"^accuracy +100\.00 %", main(*task(easy, finished)), re.M)
    assert {row["score"] for row in read_jsonl(finished / "answers.jsonl")} == {1.0}


def test_benchmark_with_choices(task, tmp_path):
    for batch in (1, 4):
        main(*task(FIXTURES / "arc-c", tmp_path / str(batch), "--batch", batch, name="arc-c"))
    assert saved_lines(tmp_path / "1") == saved_lines(tmp_path / "4")
    assert {json.loads(line)["answer"] for line in saved_lines(tmp_path / "1")} <= set("ABCDE")


# --- Folders that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, name",
    [
        (("--images", "blank"), "images"),
        (("--images", "shuffled"), "seed"),
        (("--max-new-tokens", 3), "max_new_tokens"),
        (("--fit", "crop"), "fit"),
    ],
)
def test_other_settings_are_refused(task, easy, finished, monkeypatch, flags, name):
    """Before the weights are loaded, and without changing any file. They may change while there is no answer."""
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_with_adapter", None)
        assert f"{name}: " in refused(*task(easy, finished, *flags))
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    if name == "max_new_tokens":
        (finished / "answers-0.jsonl").unlink()
        main(*task(easy, finished, *flags))
        assert json.loads((finished / "run.json").read_text())["settings"][name] == 3


def test_model_is_identified_by_its_files(task, easy, weights, tmp_path):
    """Not by their dates; nor does an unused seed matter. The tokenizer's bytes do."""
    model = shutil.copytree(weights("owl2"), tmp_path / "model")
    flags = task(easy, tmp_path / "run", "--weights", model)
    main(*flags)
    for path in model.iterdir():
        os.utime(path, (1, 1))
    main(*flags, "--seed", 3)
    (model / "tokenizer_config.json").write_text('{"legacy": true }')
    line = refused(*flags)
    assert "tokenizer_config.json" in line and line.count("sha256") == 1


def test_locked_run_is_refused(task, easy, finished):
    with results.lock_run(finished):
        assert "locked" in refused(*task(easy, finished))
    main(*task(easy, finished))


def test_other_folders_and_files_are_left_alone(task, easy, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "run.json" in refused(*task(easy, tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    refused(*task(easy, tmp_path / "mine" / "thesis.txt"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", None),
        ("run.json", '{"a":' * 100_000),
        ("answers-0.jsonl", '{"id": "0"\n'),
        ("answers-3.jsonl", '{"id": "x", "answer": ""}\n'),  # a question of another run
        ("answers-0.jsonl", "[3]\n"),
        ("answers-0.jsonl", '{"id": [], "answer": ""}\n'),
        ("answers-9.jsonl", "all my notes"),
        ("answers-9.jsonl", '{"id": 5, "text": "all my notes, without a line break at the end"}'),
    ],
)
def test_damaged_folder_is_one_line(task, easy, finished, name, content):
    (finished / name).unlink(missing_ok=True)
    if content is not None:
        (finished / name).write_text(content)
    assert name in refused(*task(easy, finished))
    assert content is None or (finished / name).read_text() == content


@pytest.mark.parametrize("name", ("run.lock", "run.json", "answers-0.jsonl", "answers-7.jsonl", "index.html"))
@pytest.mark.parametrize("content", ("all my notes", None))
def test_links_in_a_folder_are_not_written_through(task, easy, finished, tmp_path, name, content):
    """Neither to a file, nor to one that does not exist yet."""
    if content:
        (tmp_path / "outside").write_text(content)
    (finished / name).unlink(missing_ok=True)
    (finished / name).symlink_to(tmp_path / "outside")
    assert name in refused(*task(easy, finished)) or name == "run.json"
    assert (tmp_path / "outside").read_text() == content if content else not (tmp_path / "outside").exists()


def test_runs_are_locked_without_fcntl_too(monkeypatch, tmp_path):
    """On Windows, which has neither fcntl nor O_NOFOLLOW, but msvcrt."""
    locked = []

    def locking(file, mode, n_bytes):
        if locked:
            raise PermissionError(errno.EACCES, "locked")
        locked.append((mode, n_bytes))

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.delattr(os, "O_NOFOLLOW")
    spec = importlib.util.spec_from_file_location("results_on_windows", results.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.lock_run(tmp_path), pytest.raises(ValueError, match="locked"):
        module.lock_run(tmp_path)
    assert locked == [(2, 1)]


def test_unreadable_images_are_named_and_all_else_is_answered(task, easy, tmp_path):
    """After a repair the run continues."""
    folder = shutil.copytree(easy, tmp_path / "easy")
    broken = [folder / "test" / "images" / f"{i}.png" for i in (1, 4, 5, 8)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    line = refused(*task(folder, tmp_path / "run", "--batch", 2))
    assert "4 images" in line and sum(str(path) in line for path in broken) == 3
    asked = {json.loads(line)["id"] for line in saved_lines(tmp_path / "run")}
    assert asked == {str(i) for i in range(25) if (i * 7) % 10 not in (1, 4, 5, 8)}
    shutil.copytree(easy, folder, dirs_exist_ok=True)
    main(*task(folder, tmp_path / "run"))
    assert len(saved_lines(tmp_path / "run")) == 25


def test_blank_images_are_not_read(task, easy, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_image", None)
    main(*task(easy, tmp_path / "run", "--images", "blank"))
    assert "<img" not in (tmp_path / "run" / "index.html").read_text()


def test_full_memory_is_one_line_and_bugs_keep_their_traceback(task, easy, monkeypatch):
    monkeypatch.setattr(runner, "ask", lambda *_, **__: torch.empty(1 << 50))
    assert "--batch" in refused(*task(easy, None))
    monkeypatch.setattr(runner, "ask", lambda *_, **__: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="must match"):
        main(*task(easy, None))


# --- Pages ----------------------------------------------------------------------------------------

EVIL = '<script>alert(1)</script><img src=x onerror="a">&</p>'


class Elements(HTMLParser):
    """What a browser reads in a page: its elements, their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_pages_escape_all_text(folder):
    question = Question("7" + EVIL, "<image>" + EVIL, ["red.png"], [EVIL, EVIL, "red"], group=EVIL)
    other = Question("8", "<image>" + EVIL, ["red.png"], EVIL)
    where = {"folder": folder, "seed": 0}
    rated = [(question, EVIL, 0.3), (other, "fine", 1.0)]
    record = {EVIL: EVIL, "starts": [{"date": EVIL}]}
    report = report_page(EVIL, {EVIL: Number(50.0, 2, unit=EVIL)}, rated, record, weights=EVIL, **where)
    rate = rating_page([(question, EVIL, None)], {"7" + EVIL: EVIL}, weights=EVIL, **where)
    allowed = {"alt", "charset", "class", "content", "http-equiv", "id", "lang", "name", "role", "src", "title", "type", "value"}
    for html, n_evil, n_script, n_img in ((report, 8, 0, 2), (rate, 3, 2, 1)):
        elements = Elements(html)
        assert elements.text.count(EVIL) >= n_evil
        assert elements.tags.count("script") == n_script and elements.tags.count("img") == n_img
        assert {name for name, _ in elements.attributes} <= allowed
        assert all(value.startswith("data:image/jpeg;base64,") for name, value in elements.attributes if name == "src")
        assert "default-src 'none'" in html and ("name", "viewport") in elements.attributes
    key = json.loads(re.search(r'id="key">(.*?)</script>', rate, re.S)[1])
    assert key["weights"] == EVIL and key["ratings"][0]["id"] == "7" + EVIL


def test_examples_on_a_page(folder):
    """They are limited in number and size, and come from all groups."""
    Image.new("RGB", (900, 300), (9, 200, 9)).save(folder / "wide.png")
    content = (folder / "wide.png").read_bytes()
    answered = [(Question(str(i), "<image>?", [content], "a", "big"), "a", 1.0) for i in range(60)]
    answered += [(Question(f"s{i}", "<image>?", ["wide.png"], "a", "small"), "a", 1.0) for i in range(3)]
    chosen = sample_results(answered, 24, seed=1)
    assert len(chosen) == 24 and sum(question.group == "small" for question, _, _ in chosen) == 3
    assert chosen == sample_results(answered, 24, seed=1) != sample_results(answered, 24, seed=2)
    answered += [(Question("w", "<image>?", [content], "a"), "b", 0.0)]
    record = {"starts": [{"date": "2025-01-02T10:00:00+00:00"}, {"date": "2026-11-26T10:00:00+00:00"}]}
    numbers = {"accuracy": percent(63, 64), "m": Number(1234, 64, unit="answers")}
    html = report_page("Title", numbers, answered, record, weights="an-owl", folder=folder, seed=1)
    text = " ".join(Elements(html).text.split())
    assert text.index("an-owl, 2026-11-26, 64 answers") < text.index("accuracy: 98.44 % (91.67 to 99.72)")
    assert "Right: 63 of 64 (24 shown)" in text and "Wrong: 1 of 64 (1 shown)" in text and "truth: a" in text
    assert "<td>1,234 answers</td><td>64</td>" in html
    thumbnails = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", html)
    assert len(thumbnails) == 24 + 1
    assert {load_image(base64.b64decode(text)).size for text in thumbnails} == {(240, 80)}


# --- OwlEval --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def owleval_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owleval")
    (folder / "images").mkdir()
    rows = []
    kinds = [["single_turn"], ["single_turn", "multi_turn"], ["multi_turn"], ["multi_turn"], ["single_turn"]]
    for i, (image, category) in enumerate(zip("12223", kinds), start=1):
        Image.new("RGB", (40, 30), (40 * i, 90, 200 - 30 * i)).save(folder / "images" / f"{image}.jpg")
        rows.append({"image": f"{image}.jpg", "question_id": i, "question": f"Ask {i}?"})
        rows[-1] |= {"ability": "a,f" if "multi_turn" in category else "a", "category": category}
    write_jsonl(folder / "questions.jsonl", rows)
    published = [{"question_id": i, "answer": f"published {i}"} for i in range(1, 6)]
    write_jsonl(folder / "answers_mplug_owl_7b.jsonl", published)
    return folder


@pytest.fixture(scope="module")
def owleval_task(task):
    return lambda *arguments: task(*arguments, "--max-new-tokens", 8, name="owleval")


def test_conversations_continue_with_the_models_answers(owleval_task, owleval_folder, tmp_path, monkeypatch):
    """In any batch, with the image encoded once; a conversation that was interrupted continues."""
    seen, encoded = [], []
    real_encode = Owl.encode_images

    def echo(model, tokenizer, questions, images, **options):
        assert len(images) == sum("".join(messages).count("<image>") for messages in questions)
        seen.extend(map(tuple, questions))
        return [f"I say {messages[-1][-2]}" for messages in questions]

    monkeypatch.setattr(runner, "ask", echo)
    monkeypatch.setattr(Owl, "encode_images", lambda self, x: encoded.append(len(x)) or real_encode(self, x))
    for batch in (1, 2, 9):
        seen.clear()
        encoded.clear()
        main(*owleval_task(owleval_folder, tmp_path / str(batch), "--batch", batch))
        assert sorted(seen) == [
            ("<image>Ask 1?",),
            ("<image>Ask 2?",),
            ("<image>Ask 2?", "I say 2", "Ask 3?"),
            ("<image>Ask 2?", "I say 2", "Ask 3?", "I say 3", "Ask 4?"),
            ("<image>Ask 5?",),
        ]
        assert sum(encoded) == 3
    path = tmp_path / "1" / "answers-0.jsonl"
    content = path.read_bytes()
    assert [row.get("before") for row in read_jsonl(path)] == [None, None, ["2"], ["2", "3"], None]
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:3]))
    seen.clear()
    main(*owleval_task(owleval_folder, tmp_path / "1"))
    assert [messages[-1] for messages in seen] == ["<image>Ask 5?", "Ask 4?"] and path.stat().st_size == len(content)


def test_rating_page_hides_whose_answer_it_is(owleval_task, owleval_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ask", answer_always("OURS"))
    all_sides = set()
    for seed in range(4):
        out = tmp_path / str(seed)
        main(*owleval_task(owleval_folder, out, "--seed", seed))
        html = (out / "rate.html").read_text()
        cards = re.findall(r'<div class="card"><p>(.*?)</p>(.*?)</div>', html)
        assert len(cards) == 10 and html.count('type="radio"') == 40
        key = json.loads(re.search(r'id="key">(.*?)</script>', html, re.S)[1])
        for i, row in enumerate(key["ratings"]):
            pair = {"left": cards[2 * i], "right": cards[2 * i + 1]}
            assert pair[row["ours"]][0] == "OURS"
            names = {name for _, radios in pair.values() for name in re.findall('name="(.*?)"', radios)}
            assert names == {f"{i}left", f"{i}right"}
        sides = [row["ours"] for row in key["ratings"]]
        assert sides[1] == sides[2] == sides[3]  # a conversation
        all_sides.add(tuple(sides))
        visible = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S)
        assert str(tmp_path) not in visible and "owl2" not in visible
    assert len(all_sides) > 2
    assert html.index("form.onsubmit") < html.index("try {") < html.index("localStorage")  # which may raise an error


@pytest.mark.parametrize(
    "name, n_published",
    [("answer/mPLUG_Owl_7b_answer.jsonl", 5), ("other.jsonl", 5), ("answers_mplug_owl_7b.jsonl", 4)],
)
def test_rating_page_needs_published_answers(owleval_task, owleval_folder, tmp_path, monkeypatch, name, n_published):
    """Without their file there is no page; an incomplete file is an error before the first question."""
    root, out = shutil.copytree(owleval_folder, tmp_path / "owleval"), tmp_path / "run"
    (root / "answer").mkdir()
    (root / "answers_mplug_owl_7b.jsonl").rename(root / name)
    write_jsonl(root / name, read_jsonl(root / name)[:n_published])
    monkeypatch.setattr(runner, "ask", answer_always("OURS"))
    if n_published < 5:
        assert "question 5" in refused(*owleval_task(root, out)) and not out.exists()
    else:
        code, _, err = run_main(evaluate.main, "--device", "cpu", *owleval_task(root, out))
        assert code == 0 and (out / "rate.html").exists() == (name != "other.jsonl") == ("rate.html" not in err)


RATINGS = [
    {"id": "1", "ability": "a, b", "ours": "A", "published": "D"},
    {"id": "2", "ability": "a", "ours": "B", "published": "A"},
    {"id": "3", "ability": "b,f", "ours": "C", "published": None},
]


def test_ratings_are_counted(tmp_path):
    path = tmp_path / "ratings.json"
    path.write_text(json.dumps({"weights": "mine", "ratings": RATINGS}))
    printed = main("--ratings", path)
    table = {tuple(line[:38].split()): [int(n) for n in line[38:].split()] for line in printed.splitlines()[4:]}
    assert "'mine'" in printed and "2 of 3 questions" in printed
    assert table[("all", "ours")] == [1, 1, 1, 0, 2, 0] and table[("all", "published")] == [1, 0, 0, 1, 1, 1]
    assert table[("seeing", "ours")] == [1, 0, 1, 0, 1, 0] and table[("seeing", "published")] == [0, 0, 0, 1, 0, 1]
    assert table[("several", "turns", "ours")] == [0, 0, 1, 0, 0, 0] and len(table) == 8


@pytest.mark.parametrize("change", [{"ours": "E"}, {"ours": 3}, {"ability": None}, {"id": "1"}])
def test_malformed_ratings_are_refused(tmp_path, change):
    path = tmp_path / "ratings.json"
    path.write_text(json.dumps({"weights": "mine", "ratings": [RATINGS[0], RATINGS[1] | change]}))
    with pytest.raises(ValueError, match="ratings.json, row 1: "):
        count_ratings(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="ratings.json"):
        count_ratings(path)
