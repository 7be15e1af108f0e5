"""The model in the repository: small, in the Hugging Face layout, and it uses its images."""

import subprocess
import sys

import pytest
import torch

from conftest import ROOT, collect, pad_rows
from data.image import load_image, to_pixels
from data.text import Tokenizer, expand_images, render_prompt
from generate import generate
from weights import load_model, save_model

FOLDER = ROOT / "checkpoints" / "tiny-owl2"


def test_it_is_small_and_complete(tmp_path):
    assert sum(path.stat().st_size for path in (ROOT / "checkpoints").rglob("*")) < 20_000_000
    assert (FOLDER / "README.md").is_file()
    model = load_model(FOLDER)
    assert Tokenizer(FOLDER).vocab_size == model.config.llama.vocab_size
    save_model(model, tmp_path)
    saved = "model-00001-of-00001.safetensors"
    assert (tmp_path / saved).read_bytes() == (FOLDER / saved).read_bytes()


def test_make_demo(tmp_path):
    """The command of `make demo`, from another folder. Standard output has only the answer."""
    command = [sys.executable, ROOT / "sample.py", "--image", ROOT / "assets/blue-rectangle.png"]
    command += ["--prompt", "what color is the shape?"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "blue\n")
    assert "easy-VQA" in result.stderr and "MAGAer13/mplug-owl2-llama2-7b" in result.stderr


def test_it_answers_easy_vqa_from_the_images():
    """256 of the test questions: nearly all correct, but few of the open ones with blank images."""
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, image_ids = (column[:256] for column in easy_vqa.get_test_questions())
    paths = easy_vqa.get_test_image_paths()
    model, tokenizer = load_model(FOLDER), Tokenizer(FOLDER)
    prompts = [render_prompt([f"<image>{question}", None], tokenizer, "owl2") for question in questions]
    ids, lengths = pad_rows([torch.tensor(expand_images(p, None, model.config.n_visual_tokens)[0]) for p in prompts])
    images = torch.stack([to_pixels(load_image(paths[i]), 64, "square") for i in image_ids])

    def is_correct(images: torch.Tensor) -> list[bool]:
        tokens = collect(generate(model, ids, images, prompt_lengths=lengths, max_new_tokens=10))
        return [tokenizer.decode(row) == answer for row, answer in zip(tokens.tolist(), answers, strict=True)]

    shown, blank = is_correct(images), is_correct(torch.zeros_like(images))
    assert sum(shown) >= 0.97 * 256
    is_open = [answer not in ("yes", "no") for answer in answers]
    n_shown, n_blank = (sum(a and b for a, b in zip(correct, is_open)) for correct in (shown, blank))
    assert n_blank < 0.5 * n_shown
