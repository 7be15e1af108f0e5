"""Pictures of attention: where the abstractor's queries look, and what each word of an answer attends to.

    python sample.py --image x.jpg --prompt "What is this?" --show-attention looks.png

The model reads the prompt and its answer once more, and at two places the probabilities that its attention never
writes down are computed from what the attention is given, softmax(q k^T), and averaged over the heads:

    the abstractor's last layer                       each layer of the decoder, then the mean of the layers
    query -> queries, class token, patches            position that said a token -> all positions up to it
    looks [N, n_query, n_query + 1 + P]               attends [n_answer, T]
        |                                                 |
        |                                                 +-- image's n_query + 1 words, summed: its share, a bar
        |                                                 +-- the first n_query: [n_query]
        +-- the patches: [n_query, P] ------ times ------------'
        v                                      v
    maps of a few queries                  map of a word [P]     --on_photo--> heat over the photo [height, width]

What a word attends to are image words, not patches; its map follows these to the patches that their queries look at.
Each map is as bright as its own brightest patch lets it: how much there is in all, the bar below says. What was cut
off by the fit "crop" is nearly black.

Attention is not an explanation. The vision tower's tokens know of their whole image already, and a query has looked in
each layer before the one that is drawn. (Pillow's font, which the words are written in, has hardly more than ASCII.)
"""

from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import abstractor
import llama
from data.image import resize
from data.text import Tokenizer
from model import IMAGE_ID, Owl

N_COLUMN = 7  # the photo and six queries; or seven words
N_WORD = 4 * N_COLUMN  # words of the answer that are drawn, the first ones
TILE = 190  # pixels of a tile's longer edge
GAP = 10  # pixels
LINE = 20  # pixels of a line of text
INK = (40, 40, 40)
PALE = (225, 225, 225)
COLOURS = ((0, 0, 0), (120, 20, 110), (225, 60, 60), (255, 160, 40), (255, 250, 170))  # from cold to hot


# --- the probabilities -------------------------------------------------------------------------------


def abstractor_attention(attn: abstractor.CrossAttention, queries: Tensor, image: Tensor) -> Tensor:
    """What attn(queries, image) weighs its values with: [N, n_head, Q, Q + 1 + P] float32.

    queries: [N, Q, C], image: [N, 1 + P, C]. The last axis: the queries, the class token, the patches row by row.
    """
    q_in, k_in = queries, torch.cat([queries, image], dim=1)
    if attn.has_positions:
        q_pos, k_pos = attn.q_pos.to(k_in.dtype), attn.k_pos.to(k_in.dtype)
        q_in = q_in + q_pos
        k_in = k_in + torch.cat([q_pos, k_pos])
    head_dim = queries.shape[-1] // attn.n_head
    q, k = heads(attn.q(q_in), head_dim).float(), heads(attn.k(k_in), head_dim).float()
    return (q @ k.transpose(2, 3) * head_dim**-0.5).softmax(dim=-1)


def decoder_attention(attn: llama.Attention, x: Tensor, view: llama.View, split: llama.Split, first: int) -> Tensor:
    """What attn(x, view, split, None) weighs its values with, from position `first` on: [n_head, T - first, T] float32.

    x: [1, T, C], some of it image words.
    """
    config = attn.config
    k = attn.k_proj(split.sort(x), split) if config.adaptive else attn.k_proj(x)
    q = heads(attn.q_proj(x), config.head_dim)
    k = heads(k, config.head_dim).repeat_interleave(config.n_head // config.n_kv_head, dim=1)
    q, k = (llama.rotate(each, view.cos, view.sin)[0].float() for each in (q, k))  # [n_head, T, head_dim]
    scores = q[:, first:] @ k.transpose(1, 2) * config.head_dim**-0.5
    position = torch.arange(x.shape[1], device=x.device)
    return scores.masked_fill(position > position[first:, None], -torch.inf).softmax(dim=-1)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[N, T, C] to [N, C / head_dim, T, head_dim]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


@torch.inference_mode()
def look(model: Owl, ids: list[int], said: list[int], images: Tensor) -> tuple[Tensor, Tensor]:
    """Reads a prompt and its answer, and watches the attention: the means over heads, and over the decoder's layers.

    ids: the prompt, its images expanded, one at least. said: the answer's tokens, one at least. images: [N, 3, S, S].
    Returns (looks [N, n_query, n_query + 1 + P], attends [len(said), T]), float32 on the CPU, where T is
    len(ids) + len(said) - 1: the last token is said, but not read. Row i of attends is of the position that said
    token i, the one before it. Raises ValueError if the images are of another size or number than ids has places for.
    """
    looks: list[Tensor] = []
    attends = torch.zeros(())
    first = len(ids) - 1  # the position that says the answer's first token

    def watch_abstractor(attn: abstractor.CrossAttention, inputs: tuple) -> None:
        looks.append(abstractor_attention(attn, *inputs).mean(dim=1))

    def watch_decoder(attn: llama.Attention, inputs: tuple) -> None:
        nonlocal attends  # summed layer by layer, so that no more than one layer's heads are ever held
        x, view, split, _ = inputs
        attends = attends + decoder_attention(attn, x, view, split, first).mean(dim=0).cpu()

    with ExitStack() as hooks:
        last = model.abstractor.layers[-1].attn
        hooks.callback(last.register_forward_pre_hook(watch_abstractor).remove)
        for layer in model.llama.layers:
            hooks.callback(layer.self_attn.register_forward_pre_hook(watch_decoder).remove)
        device = model.llama.embed_tokens.weight.device
        model(torch.tensor([[*ids, *said[:-1]]], device=device), images.to(device))
    return looks[0].cpu(), attends / len(model.llama.layers)


# --- what is drawn -----------------------------------------------------------------------------------


def words_of(said: list[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the places in `said` of the tokens that wrote it.

    Tokens that write nothing but space, or nothing at all like </s>, belong to no word.
    """
    words = tokenizer.decode(said).split()
    places: list[list[int]] = [[] for _ in words]
    before = ""
    for i in range(len(said)):
        text = tokenizer.decode(said[: i + 1])
        n_word = len(text.split())
        if text != before and not text[-1].isspace() and n_word <= len(words):
            places[n_word - 1].append(i)
        before = text
    return [(word, place) for word, place in zip(words, places) if place]


def by_word(
    attends: Tensor, ids: list[int], said: list[int], tokenizer: Tokenizer, image_words: int
) -> list[tuple[str, Tensor]]:
    """The words of an answer, each with its attention to the images' words, [N, image_words]: its tokens' mean.

    ids, said, attends: what look takes and returns. image_words: of each image, n_query + 1.
    """
    places = torch.tensor([place for place, token in enumerate(ids) if token == IMAGE_ID]).view(-1, image_words)
    return [(word, attends[tokens].mean(dim=0)[places]) for word, tokens in words_of(said, tokenizer)]


def choose(maps: Tensor, n: int) -> list[int]:
    """The n queries that differ most, in order. maps: [n_query, P]; distances are sums of absolute differences.

    The first is the one farthest from the mean, each next the one whose nearest among the chosen is farthest off.
    """
    chosen = [int((maps - maps.mean(dim=0)).abs().sum(dim=1).argmax())]
    distance = torch.cdist(maps, maps, p=1)  # [n_query, n_query]
    while len(chosen) < min(n, len(maps)):
        nearest = distance[chosen].amin(dim=0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


def seen_box(width: int, height: int, size: int, fit: str) -> tuple[float, float, float, float]:
    """Where the square that the model sees lies: (left, top, right, bottom) in the pixels of a photo width x height.

    It undoes data/image.py's fit_to_square: with "pad" the box is larger than the photo, with "crop" smaller.
    """
    if fit in ("stretch", "square"):
        return 0, 0, width, height
    if fit == "pad":
        longer = max(width, height)
        left, top = (longer - width) // 2, (longer - height) // 2
        return -left, -top, longer - left, longer - top
    new_width = int(width * size / min(width, height))
    new_height = int(height * size / min(width, height))
    left, top = (new_width - size) // 2, (new_height - size) // 2
    across, down = width / new_width, height / new_height
    return left * across, top * down, (left + size) * across, (top + size) * down


def on_photo(
    grid: np.ndarray, box: tuple[float, float, float, float], photo: tuple[int, int], out: tuple[int, int]
) -> np.ndarray:
    """Lays values of patches, [G, G], over a photo of size (width, height): float32 [out height, out width].

    box: of seen_box. A patch keeps its edges, so that what is seen is what there is; outside the box is nan.
    """
    left, top, right, bottom = box
    across, down = grid.shape[1] / (right - left), grid.shape[0] / (bottom - top)
    extent = (-left * across, -top * down, (photo[0] - left) * across, (photo[1] - top) * down)
    values = Image.fromarray(grid.astype(np.float32))
    laid = values.transform(out, Image.Transform.EXTENT, extent, Image.Resampling.NEAREST, fillcolor=np.nan)
    return np.asarray(laid)


def heated(photo: Image.Image, heat: np.ndarray) -> Image.Image:
    """A photo in greys, with heat [height, width], 0 to 1, glowing over it; nearly black where it is nan."""
    grey = np.asarray(photo.convert("L"), dtype=np.float32)[..., None] * np.where(np.isnan(heat), 0.15, 0.75)[..., None]
    heat = np.nan_to_num(heat)
    steps = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(heat, steps, channel) for channel in zip(*COLOURS)], axis=-1)
    opacity = 0.8 * np.sqrt(heat)[..., None]
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).round().astype(np.uint8))


# --- the picture -------------------------------------------------------------------------------------


class Tile(NamedTuple):
    title: str
    picture: Image.Image
    share: float | None = None  # 0 to 1: the bar below the picture
    note: str = ""  # what the bar says


def draw(
    photos: list[Image.Image], fit: str, image_size: int, looks: Tensor, words: list[tuple[str, Tensor]]
) -> Image.Image:
    """The picture: for each image of the prompt a row of queries, and below it rows of words.

    photos: upright RGB, in the prompt's order. fit: how each became the square of image_size pixels that the model saw.
    looks: of look. words: of by_word.
    """
    n_query = looks.shape[1]
    rows: list[str | list[Tile]] = []
    for i, photo in enumerate(photos):
        box = seen_box(*photo.size, image_size, fit)
        scale = TILE / max(photo.size)
        small = resize(photo, *(max(1, round(edge * scale)) for edge in photo.size))
        maps = looks[i, :, n_query + 1 :]  # [n_query, P]

        def tile(title: str, patches: Tensor, share: Tensor, note: str) -> Tile:
            heat = (patches / patches.max().clamp(min=1e-30)).view(round(len(patches) ** 0.5), -1).numpy()
            glowing = heated(small, on_photo(heat, box, photo.size, small.size))
            return Tile(title, glowing, float(share), f"{float(share):.1%} {note}")

        queries = [Tile(f"{photo.width} x {photo.height}, {fit}", small)]
        for q in choose(maps, N_COLUMN - 1):
            class_token = float(looks[i, q, n_query])
            queries.append(tile(f"query {q}", maps[q], maps[q].sum(), f"patches, {class_token:.1%} class"))
        many = f"the {len(queries) - 1} of {n_query} queries that differ most"
        first = f"the answer's first {N_WORD} of {len(words)} words" if len(words) > N_WORD else "the answer's words"
        here = f"image {i + 1} of {len(photos)}: " if len(photos) > 1 else ""
        last = "in the abstractor's last layer, mean over heads; bars: how much of that goes to patches"
        rows += [f"{here}where {many} look ({last})", queries]
        mean = "mean over layers and heads; bars: how much of that goes to this image"
        rows += [f"{here}where {first} look, by way of the queries ({mean})"]
        tiles = [tile(word, share[i, :-1] @ maps, share[i].sum(), "on this image") for word, share in words[:N_WORD]]
        rows += [tiles[j : j + N_COLUMN] for j in range(0, len(tiles), N_COLUMN)]
    return paint(rows)


def paint(rows: list[str | list[Tile]]) -> Image.Image:
    """Rows of text, and of tiles of one height, from the top down on a white page."""
    font = ImageFont.load_default(size=14)
    heights = [LINE if isinstance(row, str) else row[0].picture.height + 3 * LINE for row in rows]
    page = Image.new("RGB", (GAP + N_COLUMN * (TILE + GAP), 2 * GAP + sum(heights)), "white")
    pen = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str, width: int) -> None:
        short = text
        while font.getlength(short) > width:
            short = short.removesuffix("…")[:-1] + "…"
        pen.text((x, y), short, INK, font)

    y = GAP
    for row, height in zip(rows, heights):
        if isinstance(row, str):
            write(GAP, y, row, page.width - 2 * GAP)
        else:
            for i, (title, picture, share, note) in enumerate(row):
                x = GAP + i * (TILE + GAP)
                write(x, y, title, TILE)
                page.paste(picture, (x, y + LINE))
                bar = y + LINE + picture.height + 6
                if share is not None:
                    page.paste(PALE, (x, bar, x + TILE, bar + 6))
                    page.paste(COLOURS[2], (x, bar, x + round(share * TILE), bar + 6))
                    write(x, bar + 8, note, TILE)
        y += height
    return page
