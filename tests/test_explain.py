"""Pictures of attention: the numbers against the attention kernel, and their position on a photo."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from conftest import GOLDEN, assert_close, make_config, make_images, make_owl, make_row
from data.image import FITS, to_pixels
from data.text import Tokenizer
from inference import explain
from inference.quantize import quantize
from model import IMAGE_TOKEN_ID
from test_sample import TALL, WIDE, run_sample



@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "text")


@pytest.mark.parametrize("variant, n_kv_head, bits", [("owl1", 2, 4), ("owl2", 4, 8), ("owl2", 2, None)])
@torch.no_grad()
def test_attention_maps_equal_the_kernel(monkeypatch, variant, n_kv_head, bits):
    """With one-hot values, the output of the kernel is the attention probabilities."""
    model = make_owl(make_config(variant, llama={"n_kv_head": n_kv_head}))
    if bits is not None:
        quantize(model.llama, bits)
    generator = torch.Generator().manual_seed(3)
    ids, answer_ids = make_row(model.config, 6, 2, generator).tolist() + [7], [9, 4, 11, 5, 8]
    images = make_images(model.config, 2, generator)
    query_maps, token_attention = explain.attention_maps(model, ids, answer_ids, images)

    probs, kernel = [], F.scaled_dot_product_attention

    def recording_kernel(q, k, v, **options):
        one_hot = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        probs.append(kernel(q, k, one_hot, **options).mean(dim=1))  # mean over heads
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording_kernel)
    row = ids + answer_ids[:-1]
    model(torch.tensor([row]), images)
    *_, last_of_abstractor, decoder1, decoder2 = probs
    assert_close(query_maps, last_of_abstractor)
    # Position t predicts token t + 1: the prompt's last position predicts the first token of the answer.
    expected = (decoder1[0] + decoder2[0])[len(ids) - 1 :] / 2
    assert token_attention.shape == (5, len(row)) and token_attention.dtype == torch.float32
    assert_close(token_attention, expected)


def test_words_and_their_tokens(tokenizer):
    text = "It is extraordinarily \U0001f989 red.\nTwo"
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    words = explain.split_words(ids, tokenizer)
    assert [word for word, _ in words] == text.split()
    for word, indices in words:
        assert tokenizer.decode([ids[i] for i in indices]).strip() == word
    indices = [i for _, indices in words for i in indices]
    assert indices == sorted(set(indices)) and len(ids) - 1 not in indices  # </s> belongs to no word
    assert explain.split_words([tokenizer.eos_id], tokenizer) == []
    cut = tokenizer.encode("\U0001f989")[:-1]  # the answer ends within a character
    assert [word for word, _ in explain.split_words(cut, tokenizer)] == [tokenizer.decode(cut)]


def test_attention_of_a_word_is_the_mean_over_its_tokens():
    ids = [1, *[IMAGE_TOKEN_ID] * 3, 5, *[IMAGE_TOKEN_ID] * 3, 6]
    token_attention = torch.rand(4, len(ids) + 3, generator=torch.Generator().manual_seed(0))
    words = [("extraordinarily", [0, 1, 2]), ("red", [3])]
    (_, first), (_, second) = explain.word_attention(token_attention, ids, words, 3)
    assert_close(first, token_attention[:3].mean(dim=0)[[1, 2, 3, 5, 6, 7]].view(2, 3), 1e-6)
    assert torch.equal(second, token_attention[3, [1, 2, 3, 5, 6, 7]].view(2, 3))


@pytest.mark.parametrize("fit", FITS)
def test_a_patch_is_colored_on_the_photo_that_the_model_receives(fit):
    gradient = np.broadcast_to(np.linspace(0, 255, 400, dtype=np.uint8)[None, :, None], (200, 400, 3))
    photo = Image.fromarray(gradient.copy())
    shown = explain.apply_fit(photo, fit)
    assert (to_pixels(shown, 28, "stretch") - to_pixels(photo, 28, fit)).abs().mean() < 0.05

    heat = torch.zeros(4, 4)
    heat[2, 1] = 1  # row, column
    cold, hot = (np.asarray(explain.draw_heat(shown, each)).astype(int) for each in (torch.zeros(4, 4), heat))
    patch = np.zeros(cold.shape[:2], dtype=bool)
    patch[shown.height // 2 : shown.height * 3 // 4, shown.width // 4 : shown.width // 2] = True
    assert np.array_equal((cold != hot).any(axis=-1), patch)
    assert (cold[..., 0] == cold[..., 2]).all()  # gray: the brightness of the photo does not pass for attention
    assert (hot[patch][:, 0] - hot[patch][:, 2]).min() > 80  # yellow


@pytest.mark.parametrize(
    "to_patches, total, expected",
    [
        ([0.5, 0, 0.25, 0], 1, [1, 0, 0.5, 0]),  # relative to the maximum
        ([0.125] * 4, 1, [0.5] * 4),  # relative to uniform attention, which is more
        ([0.125] * 4, 0.5, [1] * 4),
        ([0.009, 0, 0, 0], 0.01, [0] * 4),  # too little
    ],
)
def test_scale_of_a_map(monkeypatch, to_patches, total, expected):
    heats = []
    monkeypatch.setattr(explain, "draw_heat", lambda picture, heat: heats.append(heat) or picture)
    explain.render_map("", Image.new("RGB", (2, 2)), torch.tensor(to_patches), total=total, notes="", bar=0)
    assert heats[0].flatten().tolist() == expected


def test_numbers_of_a_page(monkeypatch):
    """Two queries, a grid of 2 x 2 patches, one image, two words."""
    query_maps = torch.zeros(1, 2, 2 + 1 + 4)
    query_maps[0, 0] = torch.tensor([0, 0.25, 0.25, 0, 0.5, 0, 0])  # two queries, class token, patches
    query_maps[0, 1, 3 + 2] = 1
    words = [("red", torch.tensor([[0.0, 0.25, 0.25]])), ("hat", torch.tensor([[0.125, 0.25, 0.125]]))]
    maps = {}

    def render_map(title, background, to_patches, *, bar, notes, **_):
        maps[title] = (to_patches.tolist(), bar, notes)
        return background

    monkeypatch.setattr(explain, "render_map", render_map)
    photos = [Image.new("RGB", (380, 190))]
    explain.render_attention_page(["prompt: ?"], photos, fit="stretch", query_maps=query_maps, words=words)
    assert list(maps) == ["query 1", "query 0", "red", "hat"]  # by their part of the answer's attention
    assert maps["query 1"][:2] == ([0, 0, 1, 0], 0.5)
    assert maps["query 0"][:2] == ([0, 0.5, 0, 0], 0.125)
    assert "50% to patches" in maps["query 0"][2] and "25% class token, 25% queries" in maps["query 0"][2]
    assert maps["red"][:2] == ([0, 0, 0.25, 0], 0.5)  # the bar includes the end-of-image embedding
    assert maps["hat"][:2] == ([0, 0.0625, 0.25, 0], 0.5) and "31.2% to patches" in maps["hat"][2]


def test_long_answers_and_unusual_characters():
    query_maps = torch.full((1, 2, 2 + 1 + 4), 1 / 7)
    unusual = ["x" * 500, "\U0001f989", "\ufffd", "\x07", "\xe9", "\u732b"]
    heights = []
    for n in (0, 28, 29):
        words = [(unusual[i % len(unusual)], torch.full((1, 3), 0.1)) for i in range(n)]
        photos = [Image.new("RGB", (2000, 1), "red")]
        page = explain.render_attention_page(["w" * 3000, ""], photos, fit="pad", query_maps=query_maps, words=words)
        heights.append(page.height)
    assert heights[0] < heights[1] == heights[2]  # only the first words are shown
    assert explain.to_font("caf\xe9 \u732b\x07") == "cafe ??"


def test_sample_saves_a_picture(tmp_path, capsys, monkeypatch):
    question = ("--prompt", "Is <image> red?", "--image", WIDE, "--image", TALL, "--fit", "crop")
    _, plain, _ = run_sample(capsys, "--device", "cpu", *question)
    inputs, pages = [], []
    attention_maps, render_page = explain.attention_maps, explain.render_attention_page
    monkeypatch.setattr(explain, "attention_maps", lambda *args: inputs.append(args) or attention_maps(*args))
    recorder = lambda *args, **options: pages.append((args, options)) or render_page(*args, **options)  # noqa: E731
    monkeypatch.setattr(explain, "render_attention_page", recorder)
    code, stdout, stderr = run_sample(capsys, "--device", "cpu", *question, "--show-attention", tmp_path / "maps.JPG")
    assert code == 0 and stdout == plain and str(tmp_path / "maps.JPG") in stderr

    # The placeholder stands for the first image, and the other comes first: photos have the order of the pixels.
    (_, ids, _, pixels), ((headings, photos), options) = inputs[0], pages[0]
    assert [photo.size for photo in photos] == [(150, 200), (190, 120)] and options["fit"] == "crop"
    assert torch.equal(pixels, torch.stack([to_pixels(photo, 64, "crop") for photo in photos]))
    assert ids.count(IMAGE_TOKEN_ID) == 2 * 9
    assert " ".join(word for word, _ in options["words"]) == " ".join(stdout.split())
    for heading, end in zip(headings, ("<image>Is <image> red?", stdout[:-1], str(sample.TINY_FOLDER)), strict=True):
        assert heading.endswith(end)
    assert Image.open(tmp_path / "maps.JPG").format == "JPEG"


def test_a_name_that_is_too_long_is_an_error_after_the_answer(tmp_path, capsys):
    arguments = ("--image", WIDE, "--prompt", "What?", "--show-attention", tmp_path / ("a" * 300 + ".jpg"))
    code, stdout, stderr = run_sample(capsys, "--device", "cpu", *arguments)
    assert code == 2 and stdout != "" and "Traceback" not in stderr


@pytest.mark.parametrize(
    "keyword, arguments, name",
    [
        ("--prompt", "--image photo.png", "a.png"),
        ("--image", "--prompt What?", "a.png"),
        ("folder", "--image photo.png --prompt What?", "none/a.png"),
        ("folder", "--image photo.png --prompt What?", "folder.png"),
        ("overwritten", "--image photo.png --prompt What?", "./photo.png"),
        *((".png", "--image photo.png --prompt What?", name) for name in ("a.gif", "a", ".png")),
    ],
)
def test_invalid_flags_are_reported_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, keyword, arguments, name):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    shutil.copy(WIDE, "photo.png")
    arguments = ("--weights", "/not/a/folder", *arguments.split(), "--show-attention", name)
    code, stdout, stderr = run_sample(capsys, "--device", "cpu", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and keyword in stderr
    assert Path("photo.png").read_bytes() == WIDE.read_bytes()


def test_a_full_disk_keeps_the_old_picture(tmp_path, capsys, monkeypatch):
    path = tmp_path / "maps.png"
    path.write_bytes(b"old")

    def save(picture, file, *args, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(sample, "is_attention_picture", lambda path: True)
    arguments = ("--image", WIDE, "--prompt", "What?", "--show-attention", path)
    code, _, stderr = run_sample(capsys, "--device", "cpu", *arguments)
    assert code == 2 and "No space left" in stderr and "Traceback" not in stderr
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_link_to_another_file_is_refused(tmp_path, capsys):
    (tmp_path / "other.png").write_bytes(b"old")
    (tmp_path / "maps.png").symlink_to(tmp_path / "other.png")
    arguments = ("--image", WIDE, "--prompt", "What?", "--show-attention", tmp_path / "maps.png")
    assert run_sample(capsys, "--device", "cpu", *arguments)[0] == 2
    assert (tmp_path / "other.png").read_bytes() == b"old" and (tmp_path / "maps.png").is_symlink()
