"""Pictures of attention: the numbers against loops that take their time, and where they end up on a photo."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import attention
import sample
from data.image import to_pixels
from data.text import Tokenizer
from model import IMAGE_ID, PRESETS, Owl
from quantize import QuantizedLinear, quantize
from weights import save_model

TEXT = Path(__file__).parent / "golden" / "text"
WIDE = TEXT / "images" / "syn_l_190x120.png"
TALL = TEXT / "images" / "syn_rgba_150x200.png"
OWLS = (  # style, heads of keys for the 4 of queries, bits
    ("owl1", 4, None), ("owl1", 2, None), ("owl1", 4, 8), ("owl1", 2, 4),
    ("owl2", 4, None), ("owl2", 2, None), ("owl2", 4, 4), ("owl2", 2, 8),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TEXT)


@pytest.fixture(params=OWLS, ids=str)
def owl(request, tiny_config, tiny_owl) -> Owl:
    style, n_kv_head, bits = request.param
    owl = tiny_owl(tiny_config(style, llama={"n_kv_head": n_kv_head}))
    if bits is not None:
        quantize(owl.llama, bits)
    return owl


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


def weight_of(linear: nn.Module) -> Tensor:
    return linear.dequantized() if isinstance(linear, QuantizedLinear) else linear.weight


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
        rows = [(weight_of(linear) @ x[0, t]).tolist() for linear in (attn.q_proj, key)]
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


@pytest.mark.parametrize("n_kv_head", [6, 3, 1])
def test_probabilities_are_what_the_kernel_mixes_values_with(n_kv_head):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 7, 8), torch.randn(2, n_kv_head, 9, 8)
    one_hot = torch.eye(9).expand(2, n_kv_head, 9, 9)  # mixed, these are the probabilities themselves
    kernel = F.scaled_dot_product_attention(q, k, one_hot, enable_gqa=True).mean(dim=1)
    assert (attention.probabilities(q, k) - kernel).abs().max() < 1e-6
    assert (attention.probabilities(q, k, 3) - kernel[:, 3:]).abs().max() < 1e-6
    k, one_hot = k[:, :, :7], one_hot[:, :, :7, :7]
    kernel = F.scaled_dot_product_attention(q, k, one_hot, is_causal=True, enable_gqa=True).mean(dim=1)
    for first in (0, 4, 6):
        watched = attention.probabilities(q, k, first, is_causal=True)
        assert (watched - kernel[:, first:]).abs().max() < 1e-6
        assert watched.triu(first + 1).abs().max() == 0


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


def test_look_computes_what_it_needs_and_leaves_nothing_behind(owl, question, monkeypatch):
    ids, said, images = question(owl)
    shapes = []
    probabilities = attention.probabilities
    monkeypatch.setattr(attention, "probabilities", lambda q, *rest: shapes.append(q.shape) or probabilities(q, *rest))
    looks, attends = attention.look(owl, ids, said, images)
    T = len(ids) + 4
    assert shapes == [(2, 2, 3, 8), (1, 4, T, 8), (1, 4, T, 8)]  # the abstractor's last layer, both of the decoder's
    with pytest.raises(ValueError, match="places in ids"):
        attention.look(owl, ids, said, images[:1])
    owl(torch.tensor([ids]), images)
    assert len(shapes) == 3
    # The last token is not read; and what is said later changes nothing of what was before.
    assert torch.equal(attention.look(owl, ids, [*said[:-1], 20], images)[1], attends)
    first = attention.look(owl, ids, said[:1], images)[1]
    assert (first - attends[:1, : len(ids)]).abs().max() < 1e-6 and attends[0, len(ids) :].abs().max() == 0


# --- which words ----------------------------------------------------------------------


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
    said = tokenizer.encode("red\u3000is \U0001f989!")  # the wide space is in three bytes, the owl in four
    (_, red), (_, verb), (_, owl) = attention.words_of(said, tokenizer)
    assert tokenizer.decode([said[place] for place in owl]) == "\U0001f989!" and len(owl) > 4
    assert (tokenizer.decode(said[: red[-1] + 1]), verb[0]) == ("red", red[-1] + 4)
    first, *rest = tokenizer.encode("extraordinarily")
    assert attention.words_of([first, tokenizer.bos_id, *rest], tokenizer) == [
        ("extraordinarily", [0, *range(2, 2 + len(rest))])  # <s> writes nothing
    ]
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


# --- the page ----------------------------------------------------------------------------------------


# A photo of 400 x 200 or 200 x 400, a grid of 4 x 4 patches, heat on one of them, as (row, column). By hand: a tile's
# longer edge is 192; what the model saw in it, a square of the photo where the fit makes one; and where the patch is.
WIDE_TILES = {
    "stretch": ((192, 96), (1, 2), (96, 24, 144, 48)),
    "square": ((192, 96), (3, 0), (0, 72, 48, 96)),
    "pad": ((192, 192), (0, 3), (144, 0, 192, 48)),  # in the bar above the photo
    "crop": ((192, 192), (2, 1), (48, 96, 96, 144)),
}
# Where in the tile the photo's square from (200, 100) to (250, 150), or (100, 200) to (150, 250), must be.
WIDE_SQUARES = {
    "stretch": (96, 48, 120, 72),
    "square": (96, 48, 120, 72),
    "pad": (96, 96, 120, 120),
    "crop": (96, 96, 144, 144),
}


@pytest.mark.parametrize("fit", WIDE_TILES)
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_heat_lies_where_the_model_looked(fit, tall):
    size, patch, heat_box = WIDE_TILES[fit]
    square_box, photo_box, photo_size = WIDE_SQUARES[fit], (200, 100, 250, 150), (400, 200)
    if tall:  # all of it mirrored at the diagonal
        size, patch, photo_size = size[::-1], patch[::-1], photo_size[::-1]
        heat_box, square_box, photo_box = ([box[i] for i in (1, 0, 3, 2)] for box in (heat_box, square_box, photo_box))
    photo = Image.new("RGB", photo_size, "black")
    photo.paste("white", tuple(photo_box))
    small = attention.seen(photo, fit)
    assert small.size == size

    def inside(box) -> np.ndarray:
        mask = np.zeros(size[::-1], dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        return mask

    edge = inside(square_box) ^ inside([v + d for v, d in zip(square_box, (2, 2, -2, -2))])  # blurred by the resize
    white = np.asarray(small.convert("L")) > 200
    assert np.array_equal(white[~edge], inside(square_box)[~edge]) and white.sum() > 400

    heat = torch.zeros(4, 4)
    heat[patch] = 1
    cold, hot = (np.asarray(attention.heated(small, each)).astype(int) for each in (torch.zeros(4, 4), heat))
    assert np.array_equal((cold != hot).any(axis=-1), inside(heat_box))


def test_a_dark_photo_does_not_look_cold_nor_a_bright_one_hot():
    black, white = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")
    for photo in (black, white):
        cold = np.asarray(attention.heated(photo, torch.zeros(2, 2)))
        assert (cold[..., 0] == cold[..., 2]).all() and 80 < cold.min() <= cold.max() < 210
        hot = np.asarray(attention.heated(photo, torch.ones(2, 2))).astype(int)
        assert (hot[..., 0] - hot[..., 2]).min() > 80  # yellow


def test_how_hot():
    """By the tile's most; by an even look if that is more; and cold if little is on patches."""
    drawn = []

    def heats(look: list[float], whole: float) -> list[float]:
        attention.look_tile("", Image.new("RGB", (2, 2)), torch.tensor(look), whole, "", 0)
        return drawn.pop().flatten().tolist()

    heated = attention.heated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "heated", lambda picture, heat: drawn.append(heat) or heated(picture, heat))
        assert heats([0.5, 0, 0.25, 0], 1) == [1, 0, 0.5, 0]
        assert heats([0.125, 0.125, 0.125, 0.125], 1) == [0.5, 0.5, 0.5, 0.5]
        assert heats([0.125, 0.125, 0.125, 0.125], 0.5) == [1, 1, 1, 1]
        assert heats([0.009, 0, 0, 0], 0.01) == [0, 0, 0, 0]


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """What is written on a page."""
    written: list[str] = []
    text = attention.text
    monkeypatch.setattr(attention, "text", lambda words, *rest: written.append(words.strip()) or text(words, *rest))
    return written


def test_page_of_known_attention(texts):
    """Two queries, a grid of 2 x 2 patches, two images: which tile glows where, how long the bars are, what it says."""
    looks = torch.zeros(2, 2, 2 + 1 + 4)
    looks[0, 0, 3 + 1] = 0.5  # image 1: query 0 looks at the upper right, with half of its attention,
    looks[0, 0, 2] = 0.25  # and with a quarter at the class token
    looks[0, 0, 1] = 0.25
    looks[0, 1, 3 + 2] = 1  # query 1 at the lower left
    looks[1, :, 3 + 3] = 1  # image 2: both at the lower right
    words = [("red", torch.tensor([[0.0, 0.25, 0.25], [0.0, 0.0, 0.25]]))]  # the last: the end-of-image words
    words += [("hat", torch.tensor([[0.125, 0.25, 0.125], [0.5, 0.25, 0.0]]))]
    photos = [Image.new("RGB", (380, 190), "black"), Image.new("RGB", (190, 380), "black")]
    page = attention.draw(["prompt: ?"], photos, "stretch", looks, words)

    def glows(x: int, y: int, width: int, height: int) -> list[bool]:
        quarters = [(x + width * (1 + 2 * i) // 4, y + height * (1 + 2 * j) // 4) for j in (0, 1) for i in (0, 1)]
        return [page.getpixel(quarter)[0] > 200 for quarter in quarters]

    def bar(x: int, y: int) -> int:
        return sum(page.getpixel((x + i, y + 6)) == attention.RED for i in range(202))

    first, second, third = 10, 212, 414
    y = 10 + 2 * 18 + 9 + 2 * 18 + 18  # a gap, a heading and the colours' name, the colours, two lines, a title
    assert [page.getpixel((first + x, y)) for x in (0, 191, 192)] == [(0, 0, 0), (0, 0, 0), (255, 255, 255)]
    assert glows(second, y, 192, 96) == [False, False, True, False]  # query 1, which has half of the answer's look
    assert bar(second, y + 96) == 96
    assert glows(third, y, 192, 96) == [False, True, False, False] and bar(third, y + 96) == round(0.125 * 192)
    assert "50.0% of the answer's look\nits own: 100% on patches,\n0% class token, 0% queries" in texts
    assert "12.5% of the answer's look\nits own: 50% on patches,\n25% class token, 25% queries" in texts
    assert any("no query wrote, has 37.5% of the answer's look" in text for text in texts)
    y += 96 + 12 + 4 * 18 + 18 + 18  # the bar, four lines below it, a line, a title
    assert glows(first, y, 192, 96) == [False, False, True, False] and bar(first, y + 96) == 96
    assert glows(second, y, 192, 96) == [False, False, True, False] and bar(second, y + 96) == 96
    assert "50.0% on this image's words,\nthrough them 25.0% on patches" in texts
    assert "50.0% on this image's words,\nthrough them 31.2% on patches" in texts
    y += 96 + 12 + 3 * 18 + 2 * 18 + 18
    assert glows(second, y, 96, 192) == [False, False, False, True] and bar(second, y + 192) == 96
    assert glows(third, y, 96, 192) == [False, False, False, True] and bar(third, y + 192) == 48
    y += 192 + 12 + 4 * 18 + 18 + 18
    assert glows(first, y, 96, 192) == [False] * 4 and bar(first, y + 192) == 48
    assert "25.0% on this image's words,\nthrough them 0.0% on patches\ntoo little on patches: cold" in texts
    assert glows(second, y, 96, 192) == [False, False, False, True] and bar(second, y + 192) == 144
    assert list(texts[-3:]) == list(attention.FOOTER)


def test_what_crop_cuts_off_is_outside_a_frame():
    tile = attention.photo_tile("", Image.new("RGB", (400, 200), "black"), "crop")  # drawn 192 x 96, under a line
    red = np.argwhere((np.asarray(tile) == attention.RED).all(axis=-1))
    assert red.min(axis=0).tolist() == [18, 48] and red.max(axis=0).tolist() == [18 + 95, 48 + 95]


def test_long_answers_and_strange_words_and_shapes(texts):
    looks = torch.full((1, 2, 2 + 1 + 4), 1 / 7)
    share = torch.full((1, 3), 0.1)
    strange = ["x" * 500, "\U0001f989", "\ufffd", "\x07", "\xe9", "\u732b"]
    height = {}
    for n in (0, 1, 8, 28, 29, 500):
        words = [(strange[i % len(strange)], share) for i in range(n)]
        page = attention.draw(["w" * 3000, ""], [Image.new("RGB", (2000, 1), "red")], "pad", looks, words)
        height[n] = page.height
        assert any("no words" in text for text in texts) == (n == 0)
        texts.clear()
    assert height[0] < height[1] < height[8] < height[28] == height[29] == height[500]
    assert attention.plain("caf\xe9 \u732b\x07\n\u201cA\u201d") == "cafe ??\n\u201cA\u201d"


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
    assert [line for line in stderr.removeprefix(plain.err).splitlines() if "font" not in line] == [
        f"wrote {tmp_path / name}"
    ]

    # The mark takes the first image, the other comes first: the photos are in the order of the pixels.
    (_, ids, said, pixels), (headings, photos, fit, _, words) = looked[0], drawn[0]
    assert [photo.size for photo in photos] == [(150, 200), (190, 120)] and fit == "crop"
    assert torch.equal(pixels, torch.stack([to_pixels(photo, 64, fit) for photo in photos]))
    assert len(said) == 6 and ids.count(IMAGE_ID) == 2 * 9
    assert " ".join(word for word, _ in words) == " ".join(stdout.split())
    assert headings == ["prompt: <image>Is <image> red?", f"answer: {stdout[:-1]}", f"model: {folder}"]
    with Image.open(tmp_path / name) as picture:
        assert np.array_equal(picture.size, draw(*drawn[0]).size)
        assert picture.format == {"png": "PNG", "JPG": "JPEG"}[name[-3:]]


def test_sample_says_which_letters_the_font_lacks(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "answer", lambda model, conversation, ids, args: conversation.answered("") or [2])
    for prompt, n_note in (("Is it red?", 0), ("Is it a caf\xe9?", 1)):
        ask(folder, "--image", WIDE, "--prompt", prompt, "--show-attention", tmp_path / "a.png")
        stderr = capsys.readouterr().err
        assert stderr.count("without their accent") == n_note and stderr.endswith(f"wrote {tmp_path / 'a.png'}\n")


def test_a_conversation_keeps_photos_small(tmp_path, folder):
    conversation = sample.Conversation(PRESETS["tiny-owl2"](), Tokenizer(folder), "square")
    Image.new("RGB", (3000, 1500)).save(tmp_path / "large.png")
    for path in (tmp_path / "large.png", TALL):
        conversation.show(path)
    conversation.ask("Is <image> red?")
    assert [photo.size for photo in conversation.photos] == [(150, 200), (512, 256)]
    assert [pixels.shape for pixels in conversation.images] == [(3, 64, 64)] * 2 and conversation.waiting_photos == []
    conversation.reset()
    assert conversation.photos == []


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
