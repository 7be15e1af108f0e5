"""Pictures of attention: the numbers against loops that take their time, and where they end up on a photo."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import attention
import sample
from data.image import FITS, fit_to_square, load_image, to_pixels
from data.text import Tokenizer
from model import IMAGE_ID, PRESETS, Owl
from weights import save_model

TEXT = Path(__file__).parent / "golden" / "text"
WIDE = TEXT / "images" / "syn_l_190x120.png"
TALL = TEXT / "images" / "syn_rgba_150x200.png"
STYLES = ("owl1", "owl2")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TEXT)


@pytest.fixture(params=[(style, n_kv_head) for style in STYLES for n_kv_head in (4, 2)], ids=str)
def owl(request, tiny_config, tiny_owl) -> Owl:
    """Both styles; a key for each head, and a key for two."""
    style, n_kv_head = request.param
    return tiny_owl(tiny_config(style, llama={"n_kv_head": n_kv_head}))


@pytest.fixture
def question(random_row, random_images):
    """question(owl) -> (prompt ids of two images and words, five tokens of an answer, images)."""

    def make(owl: Owl) -> tuple[list[int], list[int], Tensor]:
        generator = torch.Generator().manual_seed(3)
        ids = random_row(owl.config, 6, 2, generator).tolist() + [7]
        return ids, [9, 4, 11, 5, 8], random_images(owl.config, 2, generator)

    return make


@torch.no_grad()
def calls(owl: Owl, modules: list[nn.Module], ids: list[int], images: Tensor) -> list[tuple[tuple, Tensor]]:
    """What each of these modules takes and gives when the owl reads ids."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.update({module: (inputs, output)}))
        for module in modules
    ]
    owl(torch.tensor([ids]), images)
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in modules]


# --- the slow way ------------------------------------------------------------------------------------


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_abstractor_attention(attn, queries: Tensor, image: Tensor) -> Tensor:
    """One image, one head, one query, one key at a time."""
    N, Q, C = queries.shape
    D = C // attn.n_head
    probabilities = torch.zeros(N, attn.n_head, Q, Q + image.shape[1])
    for n in range(N):
        tokens = [*queries[n], *image[n]]
        if attn.has_positions:
            tokens = [token + code for token, code in zip(tokens, [*attn.q_pos, *attn.k_pos], strict=True)]
        q = [(attn.q.weight @ token + attn.q.bias).tolist() for token in tokens[:Q]]
        k = [(attn.k.weight @ token + attn.k.bias).tolist() for token in tokens]
        for h in range(attn.n_head):
            part = slice(h * D, (h + 1) * D)
            for i in range(Q):
                scores = [dot(q[i][part], key[part]) / math.sqrt(D) for key in k]
                probabilities[n, h, i] = torch.tensor(softmax(scores))
    return probabilities


def turned(x: list[float], position: int, theta: float) -> list[float]:
    """Rotary embedding: element i and element i + D/2 are a complex number, which is turned."""
    half = len(x) // 2
    pairs = [
        complex(x[i], x[i + half]) * complex(math.cos(a), math.sin(a))
        for i in range(half)
        for a in [position * theta ** (-i / half)]
    ]
    return [pair.real for pair in pairs] + [pair.imag for pair in pairs]


def slow_decoder_attention(attn, x: Tensor, ids: list[int]) -> Tensor:
    """One head, one position, one earlier position at a time: [n_head, T, T]."""
    config = attn.config
    D, T = config.head_dim, len(ids)
    q, k = [], []
    for t in range(T):
        key = attn.k_proj.multiway[int(ids[t] == IMAGE_ID)] if config.adaptive else attn.k_proj
        rows = [(attn.q_proj.weight @ x[0, t]).tolist(), (key.weight @ x[0, t]).tolist()]
        for row, all_heads in zip(rows, (q, k)):
            parts = [row[begin : begin + D] for begin in range(0, len(row), D)]
            all_heads.append([turned(part, t, config.rope_theta) for part in parts])
    probabilities = torch.zeros(config.n_head, T, T)
    for h in range(config.n_head):
        shared = h * config.n_kv_head // config.n_head
        for t in range(T):
            scores = [dot(q[t][h], k[u][shared]) / math.sqrt(D) for u in range(t + 1)]
            probabilities[h, t, : t + 1] = torch.tensor(softmax(scores))
    return probabilities


@torch.no_grad()
def test_abstractor_attention_is_the_slow_one_and_the_modules_own(owl, question):
    ids, _, images = question(owl)
    for (inputs, output), layer in zip(
        calls(owl, [layer.attn for layer in owl.abstractor.layers], ids, images), owl.abstractor.layers
    ):
        fast = attention.abstractor_attention(layer.attn, *inputs)
        assert (fast - slow_abstractor_attention(layer.attn, *inputs)).abs().max() < 1e-5
        assert (fast.sum(dim=-1) - 1).abs().max() < 1e-5
        v = attention.heads(layer.attn.v(torch.cat(inputs, dim=1)), 8)
        mixed = layer.attn.out((fast @ v).transpose(1, 2).flatten(2))
        assert (mixed - output).abs().max() < 1e-5


@torch.no_grad()
def test_decoder_attention_is_the_slow_one_and_the_modules_own(owl, question):
    ids, said, images = question(owl)
    ids = ids + said
    for (inputs, output), layer in zip(
        calls(owl, [layer.self_attn for layer in owl.llama.layers], ids, images), owl.llama.layers
    ):
        attn = layer.self_attn
        x, view, split, _ = inputs
        fast = attention.decoder_attention(attn, x, view, split, 0)
        assert (fast - slow_decoder_attention(attn, x, ids)).abs().max() < 1e-5
        assert (fast.sum(dim=-1) - 1).abs().max() < 1e-5
        assert fast.triu(diagonal=1).abs().max() == 0
        assert torch.equal(attention.decoder_attention(attn, x, view, split, 9), fast[:, 9:])
        v = attn.v_proj(split.sort(x), split) if attn.config.adaptive else attn.v_proj(x)
        v = attention.heads(v, 8)[0].repeat_interleave(4 // attn.config.n_kv_head, dim=0)
        mixed = attn.o_proj((fast @ v).transpose(0, 1).flatten(1))
        assert (mixed - output[0]).abs().max() < 1e-5


@torch.no_grad()
def test_look_is_the_mean_of_what_is_slow(owl, question):
    ids, said, images = question(owl)
    looks, attends = attention.look(owl, ids, said, images)
    row = ids + said[:-1]
    last = owl.abstractor.layers[-1].attn
    blocks = [layer.self_attn for layer in owl.llama.layers]
    (inputs, _), *others = calls(owl, [last, *blocks], row, images)
    assert (looks - slow_abstractor_attention(last, *inputs).mean(dim=1)).abs().max() < 1e-5
    slow = [slow_decoder_attention(attn, inputs[0], row) for attn, (inputs, _) in zip(blocks, others)]
    slow = torch.stack(slow).mean(dim=(0, 1))  # [T, T]
    assert attends.shape == (5, len(row)) and attends.dtype == torch.float32
    # The position before a token is the one that said it: the prompt's last said the first.
    assert (attends - slow[len(ids) - 1 :]).abs().max() < 1e-5
    assert (attends.sum(dim=1) - 1).abs().max() < 1e-5


def test_look_leaves_nothing_behind_and_reads_no_last_token(owl, question):
    ids, said, images = question(owl)
    looks, attends = attention.look(owl, ids, said, images)
    assert torch.equal(attention.look(owl, ids, [*said[:-1], 20], images)[1], attends)
    first = attention.look(owl, ids, said[:1], images)[1]
    assert (first - attends[:1, : len(ids)]).abs().max() < 1e-6 and attends[0, len(ids) :].abs().max() == 0
    with pytest.raises(ValueError, match="places in ids"):
        attention.look(owl, ids, said, images[:1])
    assert not any(module._forward_pre_hooks for module in owl.modules())


# --- which words, which queries ----------------------------------------------------------------------


def test_words_of_an_answer(tokenizer):
    text = "It is extraordinarily \U0001f989 red.\nTwo"
    said = [*tokenizer.encode(text), tokenizer.eos_id]
    words = attention.words_of(said, tokenizer)
    assert [word for word, _ in words] == text.split()
    for word, places in words:
        assert tokenizer.decode([said[place] for place in places]).strip() == word
    assert all(len(tokenizer.encode(word)) > 1 for word in ("extraordinarily", "\U0001f989"))  # or it shows little
    places = [place for _, places in words for place in places]
    assert places == sorted(set(places)) and said.index(tokenizer.eos_id) not in places
    assert attention.words_of([tokenizer.eos_id], tokenizer) == []
    half = tokenizer.encode("\U0001f989")[:-1]  # an answer cut off within a character
    assert [word for word, _ in attention.words_of(half, tokenizer)] == [tokenizer.decode(half)]


def test_a_word_has_its_tokens_mean_at_each_images_places(tokenizer):
    said = tokenizer.encode("extraordinarily red")
    n_first = len(tokenizer.encode("extraordinarily"))
    ids = [1, IMAGE_ID, IMAGE_ID, IMAGE_ID, 5, IMAGE_ID, IMAGE_ID, IMAGE_ID, 6]
    attends = torch.rand(len(said), len(ids) + len(said) - 1, generator=torch.Generator().manual_seed(0))
    (first, of_first), (second, of_second) = attention.by_word(attends, ids, said, tokenizer, 3)
    assert (first, second) == ("extraordinarily", "red")
    mean = sum(attends[i] for i in range(n_first)) / n_first
    assert torch.allclose(of_first, torch.stack([mean[1:4], mean[5:8]]))
    mean = sum(attends[i] for i in range(n_first, len(said))) / (len(said) - n_first)
    assert torch.allclose(of_second, torch.stack([mean[1:4], mean[5:8]]))


def test_the_queries_that_differ_most():
    maps = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1], [0.4, 0.6, 0], [1, 0, 0], [0.5, 0.5, 0]])
    assert attention.choose(maps, 1) == [2]
    assert attention.choose(maps, 2) == [0, 2]  # all others are as far from it: the first of them
    assert attention.choose(maps, 3) == [0, 2, 4]
    assert attention.choose(maps, 9) == [0, 1, 2, 3, 4, 5]
    assert attention.choose(torch.ones(4, 3), 2) == [0, 1]  # all the same


# --- where on the photo ------------------------------------------------------------------------------


def ramp(width: int, height: int) -> Image.Image:
    """A photo whose colours say where they are: red is the column, green the row, blue 255 (no padded bar is)."""
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([column, row, np.full_like(row, 255)], axis=-1).astype(np.uint8))


SIDEWAYS = {  # by EXIF orientation, what the camera did to the photo
    1: lambda image: image,
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", SIDEWAYS)
@pytest.mark.parametrize("width, height", [(240, 150), (97, 251), (131, 131)])
def test_heat_lies_where_the_model_looked(tmp_path, fit, orientation, width, height):
    exif = Image.Exif()
    exif[0x0112] = orientation
    SIDEWAYS[orientation](ramp(width, height)).save(tmp_path / "photo.png", exif=exif)
    photo = load_image(tmp_path / "photo.png")
    assert photo.size == (width, height) and np.array_equal(photo, ramp(width, height))

    size, n = 64, 8
    square = np.asarray(fit_to_square(photo, size, fit)).astype(float)
    box = attention.seen_box(width, height, size, fit)
    # Laid over the photo four times as large, that an edge between two pixels is not rounded to either.
    laid = attention.on_photo(np.arange(n * n).reshape(n, n), box, photo.size, (4 * width, 4 * height))
    n_seen = 0
    for row in range(n):
        for column in range(n):
            # Where the model's patch comes from, read off the colours of what it is shown.
            patch = square[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            if patch[..., 2].min() < 255 or (fit == "pad" and touches_bar(square, row, column)):
                continue
            n_seen += 1
            heat = laid == row * n + column
            x = (np.flatnonzero(heat.any(axis=0)).mean() + 0.5) / 4 - 0.5
            y = (np.flatnonzero(heat.any(axis=1)).mean() + 0.5) / 4 - 0.5
            assert abs(x - patch[..., 0].mean()) < 0.4 and abs(y - patch[..., 1].mean()) < 0.4, (row, column)
    assert n_seen >= 16


def touches_bar(square: np.ndarray, row: int, column: int) -> bool:
    """Whether a patch or the pixels next to it are of a padded bar: its colours are blends there."""
    around = square[max(0, row * 8 - 2) : row * 8 + 10, max(0, column * 8 - 2) : column * 8 + 10, 2]
    return around.min() < 255


def test_what_the_fit_cut_off_has_no_heat():
    everywhere = np.ones((4, 4))
    for fit in FITS:
        heat = attention.on_photo(everywhere, attention.seen_box(80, 40, 16, fit), (80, 40), (80, 40))
        seen = np.zeros((40, 80), dtype=bool)
        seen[:, 20:60] = True
        assert np.array_equal(~np.isnan(heat), seen if fit == "crop" else np.ones_like(seen)), fit
        dark = np.asarray(attention.heated(Image.new("RGB", (80, 40), "white"), heat))
        assert (dark[np.isnan(heat)] < 50).all() and (dark[~np.isnan(heat)].max(axis=-1) > 200).all()


# --- the picture -------------------------------------------------------------------------------------


def test_picture_of_known_attention():
    """Two queries, a grid of 2 x 2 patches, two images: which tile glows where, and how long the bars are."""
    looks = torch.zeros(2, 2, 2 + 1 + 4)
    looks[0, 0, 3 + 1] = 0.5  # image 1: query 0 looks at the upper right, with half of its attention,
    looks[0, 0, 2] = 0.5
    looks[0, 1, 3 + 2] = 1  # query 1 at the lower left
    looks[1, :, 3 + 3] = 1  # image 2: both at the lower right
    words = [("red", torch.tensor([[0.0, 0.25, 0.25], [0.0, 0.0, 0.25]]))]  # the last: the end-of-image words
    photos = [Image.new("RGB", (380, 190), "black"), Image.new("RGB", (190, 380), "black")]
    page = attention.draw(photos, "stretch", 28, looks, words)

    def glows(x: int, y: int, width: int, height: int) -> list[bool]:
        quarters = [(x + width * (1 + 2 * i) // 4, y + height * (1 + 2 * j) // 4) for j in (0, 1) for i in (0, 1)]
        return [max(page.getpixel(quarter)) > 150 for quarter in quarters]

    def bar(x: int, y: int) -> int:
        return sum(page.getpixel((x + i, y)) == attention.COLOURS[2] for i in range(attention.TILE + attention.GAP))

    first, second, third = 10, 210, 410
    y = 10 + 20 + 20  # a gap, a line of text, a title
    assert glows(first, y, 190, 95) == [False] * 4  # the photo itself, black
    assert glows(second, y, 190, 95) == [False, True, False, False] and bar(second, y + 95 + 8) == 95
    assert glows(third, y, 190, 95) == [False, False, True, False] and bar(third, y + 95 + 8) == 190
    y += 95 + 40 + 20 + 20
    assert glows(first, y, 190, 95) == [False, False, True, False] and bar(first, y + 95 + 8) == 95
    y += 95 + 40 + 20 + 20
    assert glows(second, y, 95, 190) == [False, False, False, True] and bar(second, y + 190 + 8) == 190
    y += 190 + 40 + 20 + 20
    assert glows(first, y, 95, 190) == [False] * 4 and bar(first, y + 190 + 8) == round(0.25 * 190)


def test_long_answers_and_strange_words_and_shapes():
    looks = torch.full((1, 2, 2 + 1 + 4), 1 / 7)
    share = torch.full((1, 3), 0.1)
    strange = ["x" * 500, "\U0001f989", "\ufffd", "\x07", "é", "猫"]
    height = {}
    for n in (0, 1, 8, 28, 29, 500):
        words = [(strange[i % len(strange)], share) for i in range(n)]
        height[n] = attention.draw([Image.new("RGB", (2000, 1), "red")], "pad", 28, looks, words).height
    assert height[0] < height[1] < height[8] < height[28] == height[29] == height[500]


# --- as typed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An Owl2 with random weights, which never says </s>."""
    torch.manual_seed(0)
    config = PRESETS["tiny-owl2"]()
    config.llama.vocab_size = 2000
    model = Owl(config).init_weights()
    model.llama.lm_head.weight.data[config.llama.eos_id] = 0
    folder = tmp_path_factory.mktemp("owl2")
    save_model(model, folder)
    shutil.copy(TEXT / "tokenizer.model", folder)
    return folder


def ask(folder: Path, *arguments: object) -> None:
    flags = ("--weights", folder, "--device", "cpu", "--max-new-tokens", 6, "--prompt", "Is <image> red?")
    sample.main([str(argument) for argument in (*flags, *arguments)])


@pytest.mark.parametrize("name", ["looks.png", "LOOKS.JPG"])
def test_sample_draws(folder, tmp_path, capsys, monkeypatch, name):
    looked, drawn = [], []
    look, draw = attention.look, attention.draw
    monkeypatch.setattr(attention, "look", lambda *inputs: looked.append(inputs) or look(*inputs))
    monkeypatch.setattr(attention, "draw", lambda *inputs: drawn.append(inputs) or draw(*inputs))
    images = ("--image", WIDE, "--image", TALL, "--fit", "crop")
    ask(folder, *images)
    plain = capsys.readouterr()
    assert not looked and not drawn
    ask(folder, *images, "--show-attention", tmp_path / name)
    stdout, stderr = capsys.readouterr()
    assert stdout == plain.out
    assert stderr == f"{plain.err}wrote {tmp_path / name}\n"

    # The mark takes the first image, the other comes first: the photos are in the order of the pixels.
    (_, ids, said, pixels), (photos, fit, image_size, _, words) = looked[0], drawn[0]
    assert [photo.size for photo in photos] == [(150, 200), (190, 120)] and fit == "crop"
    assert torch.equal(pixels, torch.stack([to_pixels(photo, image_size, fit) for photo in photos]))
    assert len(said) == 6 and ids.count(IMAGE_ID) == 2 * 9
    assert " ".join(word for word, _ in words) == " ".join(stdout.split())
    with Image.open(tmp_path / name) as picture:
        assert np.array_equal(picture.size, draw(*drawn[0]).size)
        assert picture.format == {"png": "PNG", "JPG": "JPEG"}[name[-3:]]


def test_sample_refuses_before_it_loads(tmp_path, capsys):
    (tmp_path / "dir.png").mkdir()
    shutil.copy(WIDE, tmp_path / "photo.png")
    photo = ("--image", tmp_path / "photo.png")
    mistakes = {
        "needs --prompt and --image": [(*photo, "--show-attention", tmp_path / "a.png")],
        "ends in .png or .jpg": [
            (*photo, "--prompt", "What?", "--show-attention", tmp_path / name) for name in ("a.gif", "a", ".png")
        ],
        "there is no folder": [(*photo, "--prompt", "What?", "--show-attention", tmp_path / "none" / "a.png")],
        "this is a folder": [(*photo, "--prompt", "What?", "--show-attention", tmp_path / "dir.png")],
        "would be overwritten": [(*photo, "--prompt", "What?", "--show-attention", tmp_path / "." / "photo.png")],
    }
    mistakes["needs --prompt and --image"] += [("--prompt", "What?", "--show-attention", tmp_path / "a.png")]
    for words, lines in mistakes.items():
        for line in lines:
            with pytest.raises(SystemExit) as leaving:
                sample.main(["--weights", "/there/is/no/such/folder", *map(str, line)])
            stdout, stderr = capsys.readouterr()
            assert leaving.value.code == 2 and stdout == ""
            assert words in stderr and stderr.count("\n") == 1, stderr


def test_sample_says_when_the_picture_cannot_be_written(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        ask(folder, "--image", WIDE, "--show-attention", tmp_path / ("a" * 300 + ".png"))
    stdout, stderr = capsys.readouterr()
    assert leaving.value.code == 2 and stdout != ""
    assert "cannot write" in stderr.splitlines()[-1] and "Traceback" not in stderr
