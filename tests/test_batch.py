"""sample.py on a file of questions: batches equal single questions, broken rows, files that continue after a kill."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import lora
import sample
from conftest import ROOT, assert_close
from data.image import load_image, to_pixels
from data.text import Tokenizer
from data.video import read_frames
from inference.adapter import save_lora
from inference.batch import ask, choice_probabilities, choose, encode_prompt, place_images, score_choices
from inference.fast_decode import FastDecoder
from inference.rows import AnswerFile, RowReader, read_ahead
from model import IMAGE_TOKEN_ID
from runs import run_main
from tools import bench_batch
from weights import load_model

TINY = ROOT / "checkpoints" / "tiny-owl2"
SCENE, RECTANGLE = ROOT / "assets" / "scene.png", ROOT / "assets" / "blue-rectangle.png"
PROMPTS = ("what color is the triangle?", "what word is written?", "how many things are there?", "describe the picture")


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY), Tokenizer(TINY)


@pytest.fixture
def run_sample(capsys):
    """run_sample(flags) -> (exit code, stdout, stderr) of sample.py in this process."""

    def run(*flags: object) -> tuple[int, str, str]:
        code = 0
        try:
            sample.main([*map(str, flags), "--device", "cpu"])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_clip(path: Path, n: int, duration: int) -> Path:
    first, *others = [Image.new("RGB", (40, 24), (250 - 40 * i, 40 * i, 90)) for i in range(n)]
    first.save(path, save_all=True, append_images=others, duration=duration)
    return path


# --- answers -----------------------------------------------------------------------------------------


def test_batched_answers_equal_single_ones(tmp_path, run_sample, tiny):
    """Rows with no, one and two images, and answers of other lengths; in batches of 1 and 5, and asked one by one."""
    images = ["", str(SCENE), str(RECTANGLE), f"{SCENE};{RECTANGLE}"]
    rows = [{"id": i, "image": images[i % 4], "prompt": PROMPTS[i % 3 + (i > 8)]} for i in range(12)]
    questions = write_csv(tmp_path / "rows.csv", rows)
    flags = ("--questions", questions, "--max-new-tokens", 24, "--out")
    for size in (1, 5):
        code, stdout, stderr = run_sample(*flags, tmp_path / f"{size}.csv", "--batch", size)
        assert (code, stdout) == (0, "") and stderr.endswith("12 rows answered, 0 broken\n")
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "5.csv").read_bytes()

    answers = read_csv(tmp_path / "5.csv")
    model, tokenizer = tiny
    for row, answer in zip(rows, answers):
        paths = [path for path in row["image"].split(";") if path]
        pixels = [to_pixels(load_image(path), model.config.image_size, "square") for path in paths]
        [text] = ask(FastDecoder(model), tokenizer, ["<image>" * len(paths) + row["prompt"]], pixels, max_new_tokens=24)
        assert answer == row | {"id": str(row["id"]), "answer": text, "error": ""}
    assert len({answer["answer"] for answer in answers}) > 4
    flags = ("--image", SCENE, "--image", RECTANGLE, "--prompt", rows[3]["prompt"], "--max-new-tokens", 24)
    assert run_sample(*flags)[1] == answers[3]["answer"] + "\n"


def test_adapter_and_quantized_weights(tmp_path, run_sample, tiny):
    """Rows are answered by the same model as a single question."""
    model = load_model(TINY)
    lora.inject_lora(model, ("q_proj",), rank=2, alpha=8)
    torch.manual_seed(0)
    for _, module in lora.lora_modules(model):
        torch.nn.init.normal_(module.lora_B.weight, std=5.0)
    save_lora(model, tmp_path / "adapter")
    questions = write_csv(tmp_path / "rows.csv", [{"image": str(SCENE), "prompt": prompt} for prompt in PROMPTS])
    answers = []
    for i, flags in enumerate([(), ("--adapter", tmp_path / "adapter", "--quantize", "int8", "--dtype", "float32")]):
        flags += ("--max-new-tokens", 8)
        assert run_sample("--questions", questions, "--out", tmp_path / f"{i}.csv", *flags)[0] == 0
        answers.append([line["answer"] for line in read_csv(tmp_path / f"{i}.csv")])
        assert run_sample("--image", SCENE, "--prompt", PROMPTS[0], *flags)[1] == answers[i][0] + "\n"
    assert answers[0] != answers[1]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_formats_and_relative_paths(tmp_path, run_sample, suffix):
    (tmp_path / "images").mkdir()
    shutil.copy(SCENE, tmp_path / "images" / "a b.png")
    shutil.copy(RECTANGLE, tmp_path / "images")
    paths = ["images/a b.png", "images/blue-rectangle.png"]
    rows = [{"image": paths[0], "note": 'a "quoted",\r\nnote; ü'}, {"image": paths, "note": ""}]
    questions = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        rows[1]["image"] = "; ".join(paths)
        write_csv(questions, rows)
        questions.write_bytes(b"\xef\xbb\xbf" + questions.read_bytes())  # as Excel begins a file
    elif suffix == ".json":
        questions.write_text(json.dumps(rows, indent=1))
    else:
        questions.write_text("\n\n".join(map(json.dumps, rows)))
    flags = ("--questions", questions, "--prompt", PROMPTS[0])
    for out in ("out.csv", "out.jsonl"):
        assert run_sample(*flags, "--out", tmp_path / out)[0] == 0
    lines, table = read_jsonl(tmp_path / "out.jsonl"), read_csv(tmp_path / "out.csv")
    assert [{name: line[name] for name in rows[0]} for line in lines] == rows  # other columns are kept
    assert [line["answer"] for line in lines] == [line["answer"] for line in table] and lines[0]["answer"] == "yellow"
    assert [line["note"] for line in table] == [row["note"] for row in rows]
    assert lines[0]["error"] is None and table[0]["error"] == ""


def test_broken_rows_are_reported_in_place(tmp_path, run_sample):
    (tmp_path / "broken.png").write_bytes(SCENE.read_bytes()[:200])
    cases = [
        ({"image": str(SCENE), "prompt": PROMPTS[0]}, None),
        ({"image": "missing.png", "prompt": "a"}, "missing.png: No such file"),
        ({"image": "broken.png", "prompt": "a"}, "broken.png cannot be read"),
        ({"image": str(SCENE), "prompt": "  "}, "no prompt"),
        ({"image": str(SCENE)}, "no prompt"),
        ({"image": str(SCENE), "prompt": 3}, "no prompt"),
        ({"image": str(SCENE), "prompt": "<image> or <|image|>?"}, "2 image placeholders"),
        ({"image": str(SCENE), "prompt": "word " * 3000}, "tokens"),
        ({"image": {"path": "a"}, "prompt": "a"}, "'image'"),
        ({"image": "a\0b", "prompt": "a"}, "null"),
        ({"video": str(SCENE.parent), "prompt": "a"}, "folder"),
        ({"image": str(SCENE), "prompt": PROMPTS[0] + " \ud800"}, None),  # not valid UTF-8
        ({"image": str(SCENE), "prompt": PROMPTS[0]}, None),
    ]
    (tmp_path / "rows.json").write_text(json.dumps([row for row, _ in cases]))
    flags = ("--questions", tmp_path / "rows.json", "--batch", 3)
    code, _, stderr = run_sample(*flags, "--out", tmp_path / "out.jsonl")
    assert code == 0 and '3 rows answered, 10 broken (see the column "error")\n' in stderr
    for (row, error), line in zip(cases, read_jsonl(tmp_path / "out.jsonl"), strict=True):
        assert (line["error"] is None) == (error is None) and (error or "") in (line["error"] or ""), line
        assert (line["answer"] is None) == (error is not None)
    assert run_sample(*flags, "--out", tmp_path / "out.csv")[0] == 0
    assert [bool(line["error"]) for line in read_csv(tmp_path / "out.csv")] == [bool(error) for _, error in cases]


INVALID = {
    "empty.csv": (b"", "no rows"),
    "header.csv": (b"image,prompt\n", "no rows"),
    "ragged.csv": (b"image,prompt\na.png\n", "row 1"),
    "twice.csv": (b"image,prompt,prompt\na,b,c\n", "same name"),
    "semicolon.csv": (b"image;prompt\na;b\n", "image;prompt"),
    "no-image.csv": (b"images,prompt\na,b\n", "images"),
    "no-prompt.csv": (b"image,question\na,b\n", "question"),
    "taken.csv": (b"image,prompt,answer\na,b,c\n", "answer"),
    "latin.csv": b"image,prompt\na,\xe4\n",
    "object.json": b'{"image": "a"}',
    "strings.jsonl": b'"a"\n',
    "half.jsonl": b'{"image": "a", "prompt": "b"}\n{"ima',
    "rows.txt": (b"image,prompt\na,b\n", ".csv"),
}


@pytest.mark.parametrize("name", INVALID)
def test_files_that_are_no_questions(tmp_path, run_sample, name):
    content, keyword = INVALID[name] if isinstance(INVALID[name], tuple) else (INVALID[name], name)
    (tmp_path / name).write_bytes(content)
    code, stdout, stderr = run_sample("--questions", tmp_path / name, "--out", tmp_path / "out.csv")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and keyword in stderr.replace(str(tmp_path), ""), stderr
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--questions rows.csv",
        "--out out.csv",
        "--questions rows.csv --out out.json",
        "--questions rows.csv --out out.csv --batch 0",
        "--questions rows.csv --out out.csv --image a.png",
        "--questions rows.csv --out out.csv --temperature 1",
        "--questions rows.csv --out nowhere/out.csv",
        "--questions nowhere.csv --out out.csv",
        "--choices yes no",
        "--prompt a --choices yes yes",
        "--prompt a --video a.gif --fps 0",
        "--prompt a --video a.gif --max-frames 0",
        "--prompt a --video nowhere.gif",
    ],
)
def test_invalid_flags(tmp_path, run_sample, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("image,prompt\na.png,b\n")
    code, stdout, stderr = run_sample(*flags.split())
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert os.listdir() == ["rows.csv"]


def test_read_ahead_keeps_the_order_and_the_errors():
    def read(row: dict) -> int:
        if row["i"] % 3 == 1:
            raise ValueError(row["i"])
        time.sleep(0.01 * (row["i"] % 2))
        return row["i"]

    for size in (1, 2, 3, 7, 20):
        rows, seen = [{"i": i} for i in range(7)], []
        for part, outcomes in read_ahead(rows, read, size):
            assert len(part) <= size
            seen += zip(part, outcomes, strict=True)
        assert [row for row, _ in seen] == rows
        for row, outcome in seen:
            assert outcome.args == (row["i"],) if row["i"] % 3 == 1 else outcome == row["i"]


# --- continuing --------------------------------------------------------------------------------------


def test_killed_again_and_again(tmp_path, run_sample):
    """With SIGKILL, after which a line is half written. The file is then that of a run without a kill."""
    rows = [{"id": i, "image": str(SCENE), "prompt": PROMPTS[i % 4] + " " * (i % 3)} for i in range(140)]
    rows[100]["image"] = "missing.png"
    questions = write_csv(tmp_path / "rows.csv", rows)
    flags = ("--questions", questions, "--batch", "4", "--max-new-tokens", "12", "--out")
    out, n_before, n_killed = tmp_path / "out.csv", 0, 0
    while True:
        command = [sys.executable, ROOT / "sample.py", *flags, out, "--device", "cpu"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < n_before + 50):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        n_killed += 1
        n_lines = out.read_bytes().count(b"\n")
        assert n_lines >= n_before + 50
        n_before = n_lines
        with out.open("ab") as file:
            file.write(b'7,"half')
    assert process.returncode == 0 and n_killed >= 1  # mostly 2
    assert '139 rows answered, 1 broken (see the column "error")\n' in run_sample(*flags, tmp_path / "whole.csv")[2]
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes() and len(read_csv(out)) == 140


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_answer_file_cut_anywhere_continues(tmp_path, suffix):
    rows = [{"image": "a.png", "prompt": f'a "b",\n\r{i}', "n": [i, None]} for i in range(3)]
    answers = [{"answer": 'two\nlines, "x"'}, {"error": "broken"}, {"answer": ""}]

    def write(path: Path) -> None:
        with AnswerFile(path, rows, ["answer"], {"weights": "w"}) as file:
            for row, answer in list(zip(rows, answers))[file.n_done :]:
                file.append(row, answer)

    out = tmp_path / f"out{suffix}"
    write(out)
    whole = out.read_bytes()
    for n in range(len(whole)):
        out.write_bytes(whole[:n])
        write(out)
        assert out.read_bytes() == whole, n
    if suffix == ".csv":
        assert [line["answer"] for line in read_csv(out)] == ['two\nlines, "x"', "", ""]
        assert [line["prompt"] for line in read_csv(out)] == [row["prompt"] for row in rows]
    else:
        assert read_jsonl(out) == [row | {"answer": None, "error": None} | new for row, new in zip(rows, answers)]


def test_answers_of_other_questions_or_settings_are_refused(tmp_path, run_sample):
    rows = [{"image": str(SCENE), "prompt": prompt} for prompt in PROMPTS[:2]]
    questions, out = write_csv(tmp_path / "rows.csv", rows), tmp_path / "out.csv"
    flags = ("--questions", questions, "--out", out)
    assert run_sample(*flags)[0] == 0
    content = out.read_bytes()
    assert "2 of 2" in run_sample(*flags)[2]  # the same command, and nothing to do
    for changed in (("--prompt", "b"), ("--fit", "pad"), ("--choices", "a", "b"), ("--dtype", "bfloat16")):
        code, _, stderr = run_sample(*flags, *changed)
        assert code == 2 and changed[0].strip("-") in stderr and stderr.count("\n") == 1
    write_csv(questions, rows[:1] + [{"image": str(SCENE), "prompt": "another?"}])
    assert run_sample(*flags)[0] == 2
    assert out.read_bytes() == content

    mine = tmp_path / "mine.csv"  # a file that this program did not write
    mine.write_bytes(b"image,prompt,answer,error\n")
    assert run_sample("--questions", questions, "--out", mine)[0] == 2
    assert mine.read_bytes() == b"image,prompt,answer,error\n"


# --- choices -----------------------------------------------------------------------------------------


def test_scores_of_choices_equal_a_plain_loop(tiny):
    """Choices of one token and of several, alone and in a batch."""
    model, tokenizer = tiny
    pixels = [to_pixels(load_image(path), model.config.image_size, "square") for path in (SCENE, RECTANGLE)]
    questions = ["<image>is the triangle yellow?", "is it?", "<image>what is it?"]
    choices = [["yes", "no", "I don't know."], ["yes", "no"], ["a blue rectangle", "a blue circle", "a", "blue"]]
    images = [[pixels[0]], [], [pixels[1]]]
    expected = []
    for question, own, texts in zip(questions, images, choices):
        prompt, sums = encode_prompt(question, model, tokenizer), []
        for tokens in map(tokenizer.encode, texts):
            with torch.no_grad():
                logits, _ = model(torch.tensor([prompt + tokens]), torch.stack(own) if own else None)
            log_p = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            sums.append(log_p.gather(1, torch.tensor(tokens)[:, None]).sum().item())
        expected.append(sums)
    together = score_choices(model, tokenizer, questions, pixels, choices=choices)
    for i, sums in enumerate(expected):
        [alone] = score_choices(model, tokenizer, questions[i : i + 1], images[i], choices=choices[i : i + 1])
        assert_close([score.log_p for score in together[i]], sums)
        assert_close([score.log_p for score in alone], sums)
        p = [torch.tensor(value).exp().item() for value in sums]
        assert_close(choice_probabilities(together[i]), [value / sum(p) for value in p], 1e-4)
    best = [texts[sums.index(max(sums))] for texts, sums in zip(choices, expected)]
    assert choose(model, tokenizer, questions, pixels, choices=choices) == best
    with pytest.raises(ValueError, match="context"):
        score_choices(model, tokenizer, ["word " * 3000], [], choices=[["a"]])


def test_choices_of_an_image_and_of_rows(tmp_path, run_sample, tiny):
    prompts = ["is the triangle yellow?", "is the triangle red?"]
    rows = [{"image": str(SCENE), "prompt": prompt} for prompt in prompts] + [{"image": "missing.png", "prompt": "a"}]
    flags = ("--questions", write_csv(tmp_path / "rows.csv", rows), "--out", tmp_path / "out.csv")
    assert run_sample(*flags, "--choices", "yes", "no", "maybe not")[0] == 0
    *lines, broken = read_csv(tmp_path / "out.csv")
    assert [line["answer"] for line in lines] == ["yes", "no"]
    assert broken["answer"] == broken["p(yes)"] == "" and broken["error"]
    for prompt, line in zip(prompts, lines):
        code, stdout, _ = run_sample("--image", SCENE, "--prompt", prompt, "--choices", "yes", "no", "maybe not")
        printed = [row.split("\t") for row in stdout.splitlines()]
        assert code == 0 and [name for name, _, _ in printed] == ["yes", "no", "maybe not"]
        assert_close([float(p) for _, p, _ in printed], [float(line[f"p({name})"]) for name, _, _ in printed], 2e-4)
        assert sum(float(p) for _, p, _ in printed) == pytest.approx(1, abs=2e-4)


# --- video -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["is <image> like <image>?", "is it like <|image|>?", "what?"])
def test_one_placeholder_takes_all_frames_of_a_video(tmp_path, tiny, prompt):
    model, tokenizer = tiny
    image = torch.randn(3, 64, 64)
    video = torch.randn(3, 3, 64, 64)
    text, images = place_images(prompt, [image, video])
    ids = encode_prompt(text, model, tokenizer)
    n = model.config.n_visual_tokens
    runs = [len(match[0]) for match in re.finditer("v+", "".join("v" if i == IMAGE_TOKEN_ID else "t" for i in ids))]
    first = [video, image[None]] if prompt.count("image") == 1 else [image[None], video]
    assert torch.equal(torch.stack(images), torch.cat(first))
    assert runs == ([4 * n] if prompt == "what?" else [n, 3 * n] if prompt.count("image") == 2 else [3 * n, n])


def test_one_decoder_for_all_batches(tmp_path, run_sample, monkeypatch):
    """So that on CUDA its graphs are captured once."""
    decoders, generate = [], FastDecoder.generate
    monkeypatch.setattr(FastDecoder, "generate", lambda self, *a, **k: decoders.append(self) or generate(self, *a, **k))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": "", "prompt": "what?"}) for _ in range(5)))
    flags = ("--questions", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl", "--batch", 2)
    assert run_sample(*flags, "--max-new-tokens", 2)[0] == 0
    assert len(decoders) == 3 and len(set(map(id, decoders))) == 1


def test_video_of_a_question_and_of_rows(tmp_path, run_sample, tiny):
    """The frames are those of read_frames, and the answers those of a prompt with as many images."""
    model, tokenizer = tiny
    save_clip(tmp_path / "a.gif", 6, 500)
    save_clip(tmp_path / "b.webp", 4, 1000)
    prompt = "what color is the shape?"
    rows = [{"video": name, "prompt": prompt} for name in ("a.gif", "b.webp", "")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    video = ("--fps", 2, "--max-frames", 3, "--max-new-tokens", 12)
    assert run_sample("--questions", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl", *video)[0] == 0
    lines = read_jsonl(tmp_path / "out.jsonl")
    reader = RowReader(model, tokenizer, tmp_path, "square", fps=2, max_frames=3)
    for row, line in zip(rows, lines):
        frames = read_frames(tmp_path / row["video"], 2, 3) if row["video"] else []
        pixels = [to_pixels(frame, 64, "square") for frame in frames]
        assert len(pixels) == (3 if frames else 0) and len(reader.read(row)[1]) == len(pixels)
        [text] = ask(FastDecoder(model), tokenizer, ["<image>" * len(pixels) + prompt], pixels, max_new_tokens=12)
        assert line["answer"] == text
    code, stdout, _ = run_sample("--video", tmp_path / "a.gif", "--prompt", "<image>" + prompt, *video)
    assert (code, stdout) == (0, lines[0]["answer"] + "\n")


# --- the page and the benchmark ----------------------------------------------------------------------


def test_the_examples_of_the_page(tmp_path, run_sample, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    questions, answers = re.findall(r"```csv\n(.*?)```", text, re.DOTALL)
    assert (ROOT / "assets" / "questions.csv").read_text() == questions
    assert run_sample("--questions", "assets/questions.csv", "--out", tmp_path / "answers.csv")[0] == 0
    assert (tmp_path / "answers.csv").read_text() == answers

    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program, {})
    first, *lists = capsys.readouterr().out.splitlines()
    assert first == re.search(r"max_new_tokens=8\)\)  # (.*)", program)[1]
    assert [len(json.loads(line)) for line in lists] == [2, 3]


def test_the_benchmark_runs():
    code, stdout, _ = run_main(bench_batch.main, "--images", 5, "--batch", 2, "--device", "cpu")
    lines = [line.split() for line in stdout.splitlines()[1:]]
    assert code == 0 and [(batch, n_other) for batch, *_, n_other in lines] == [("1", "0"), ("2", "0")]
