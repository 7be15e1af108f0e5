"""The model that lies in the repository: small, in the official layout, and it looks before it answers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from data.image import to_pixels
from data.text import Tokenizer
from weights import load_model, save_model

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "checkpoints" / "tiny-owl2"


def test_it_is_small_and_complete(tmp_path):
    assert sum(path.stat().st_size for path in (ROOT / "checkpoints").rglob("*")) < 20_000_000
    assert (FOLDER / "README.md").is_file()
    model = load_model(FOLDER)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert Tokenizer(FOLDER).vocab_size == model.config.llama.vocab_size
    save_model(model, tmp_path)
    saved = "model-00001-of-00001.safetensors"
    assert (tmp_path / saved).read_bytes() == (FOLDER / saved).read_bytes()


def test_the_demo_as_typed():
    """What `make demo` runs, and its answer on stdout alone."""
    command = [sys.executable, "sample.py", "--image", "assets/blue-rectangle.png"]
    command += ["--prompt", "what color is the shape?"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout == "blue\n"
    assert "easy-VQA" in done.stderr


def test_it_answers_easy_vqa_and_looks():
    """640 of the official test questions: nearly all right with their images, few of the open ones without."""
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, numbers = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    model = load_model(FOLDER)
    tokenizer = Tokenizer(FOLDER)
    right = {"shown": 0, "blank": 0}
    open_right = {"shown": 0, "blank": 0}
    for start in range(0, 640, 64):
        batch = slice(start, start + 64)
        images = [to_pixels(evaluate.load_image(paths[n]), 64, "square") for n in numbers[batch]]
        marked = [f"<image>{question}" for question in questions[batch]]
        for kind, shown in (("shown", images), ("blank", [torch.zeros_like(image) for image in images])):
            said = evaluate.ask(model, tokenizer, marked, shown, max_new_tokens=10)
            for answer, truth in zip(said, answers[batch]):
                right[kind] += answer == truth
                open_right[kind] += answer == truth and truth not in ("yes", "no")
    assert right["shown"] >= 0.97 * 640
    assert open_right["blank"] < 0.5 * open_right["shown"]
