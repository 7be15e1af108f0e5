"""The model in the repository: small, in the Hugging Face layout, and it uses its images."""

import random
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from PIL.Image import Image

from conftest import ROOT, collect, pad_rows
from data.image import load_image, to_pixels
from data.shapes.prepare import (
    HELD_OUT,
    KINDS,
    BalancedSampler,
    Turn,
    make_scene,
    render,
    seen_questions,
    unseen_questions,
)
from data.text import Tokenizer, expand_images, render_prompt
from data.tiny.prepare import EASY_VQA_PAIRS, UNKNOWN, unknown_picture
from generate import generate
from weights import load_model, save_model

FOLDER = ROOT / "checkpoints" / "tiny-owl2"


def test_it_is_small_and_complete(tmp_path):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 12_000_000
    assert (FOLDER / "README.md").is_file()
    model = load_model(FOLDER)
    assert Tokenizer(FOLDER).vocab_size == model.config.llama.vocab_size
    save_model(model, tmp_path)
    saved = "model-00001-of-00001.safetensors"
    assert (tmp_path / saved).read_bytes() == (FOLDER / saved).read_bytes()


def test_make_demo(tmp_path):
    """The commands of `make demo`, from another folder. Standard output has only the answer."""
    for prompt, answer in (("what shape is left of the purple thing?", "triangle"), ("what word is written?", "M A P")):
        command = [sys.executable, ROOT / "sample.py", "--image", ROOT / "assets/scene.png", "--prompt", prompt]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stdout) == (0, f"{answer}\n")
        assert "drawn scenes" in result.stderr and "MAGAer13/mplug-owl2-llama2-7b" in result.stderr


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER)


def is_correct(model, images: list[Image] | torch.Tensor, questions: list[str], answers: list[str]) -> list[bool]:
    """Whether the greedy answer to each question about its image is exactly the expected one."""
    tokenizer = Tokenizer(FOLDER)
    prompts = [render_prompt([f"<image>{question}", None], tokenizer, "owl2") for question in questions]
    ids, lengths = pad_rows([torch.tensor(expand_images(p, None, model.config.n_visual_tokens)[0]) for p in prompts])
    if not isinstance(images, torch.Tensor):
        images = torch.stack([to_pixels(image, model.config.image_size, "square") for image in images])
    tokens = collect(generate(model, ids, images, prompt_lengths=lengths, max_new_tokens=10))
    return [tokenizer.decode(row) == answer for row, answer in zip(tokens.tolist(), answers, strict=True)]


def scene_questions(held_out: bool, n_scene: int, seed: int) -> list[tuple[Image, Turn]]:
    """Questions about new scenes: one of each kind per scene; with held_out only about held-out pairs and words."""
    rng = random.Random(seed)
    sampler = BalancedSampler(rng)
    rows = []
    for _ in range(n_scene):
        scene = make_scene(rng, held_out)
        image = render(scene, rng)
        rows += [(image, turn) for turn in sampler.sample((unseen_questions if held_out else seen_questions)(scene))]
    return rows


@pytest.mark.parametrize("held_out, least, least_of_a_kind", [(False, 0.93, 0.8), (True, 0.86, 0.65)])
def test_it_answers_questions_about_scenes(model, held_out, least, least_of_a_kind):
    """New scenes, none of which it was trained on. held_out: pairs of shape and color that no training image has."""
    rows = scene_questions(held_out, 48, seed=1234)
    if held_out:
        rows = [(image, turn) for image, turn in rows if not turn.about & EASY_VQA_PAIRS]
        assert all(turn.about & HELD_OUT for _, turn in rows)
    correct = is_correct(model, [image for image, _ in rows], [t.question for _, t in rows], [t.answer for _, t in rows])
    by_kind = defaultdict(list)
    for (_, turn), is_right in zip(rows, correct, strict=True):
        by_kind[turn.kind].append(is_right)
    assert set(by_kind) == set(KINDS)
    assert sum(correct) >= least * len(correct)
    for kind, values in by_kind.items():
        assert sum(values) >= least_of_a_kind * len(values), kind

    blank = is_correct(model, torch.zeros(len(rows), 3, 64, 64), [t.question for _, t in rows], [t.answer for _, t in rows])
    assert sum(blank) == 0  # "I don't know."


def test_it_does_not_know_what_is_neither_a_scene_nor_easy_vqa(model):
    rng = random.Random(77)
    questions = ["what color is the circle?", "what is this?", "how many things are there?", "what word is written?"]
    images = [unknown_picture(rng) for _ in range(64)]
    assert sum(is_correct(model, images, questions * 16, [UNKNOWN] * 64)) >= 60


def test_it_answers_easy_vqa_from_the_images(model):
    """256 of the test questions: nearly all correct, but few of the open ones with blank images."""
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, image_ids = (column[:256] for column in easy_vqa.get_test_questions())
    paths = easy_vqa.get_test_image_paths()
    shown = is_correct(model, [load_image(paths[i]) for i in image_ids], questions, answers)
    blank = is_correct(model, torch.zeros(256, 3, 64, 64), questions, answers)
    assert sum(shown) >= 0.97 * 256
    is_open = [answer not in ("yes", "no") for answer in answers]
    n_shown, n_blank = (sum(a and b for a, b in zip(correct, is_open)) for correct in (shown, blank))
    assert n_blank < 0.5 * n_shown
