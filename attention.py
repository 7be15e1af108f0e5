"""Pictures of attention: which image words an answer attends to, and where the queries that wrote those look.

    python sample.py --image x.jpg --prompt "What is this?" --show-attention looks.png

The model reads the prompt and its answer once more. All its attention is F.scaled_dot_product_attention, which is
watched: what a call is given is enough to compute softmax(q k^T), which the call keeps to itself. Two are of interest:

    the abstractor's last layer, mean over heads        the decoder's layers, mean over heads and layers
    each query -> all queries, class token, patches     position that said a token -> all positions up to it
    looks [N, n_query, n_query + 1 + P]                 attends [n_answer, T]
        |                                                   |
        | the patches' columns                              | the columns of an image's words, mean over a word's tokens
        v                                                   v
    a look for each query [n_query, P]                  a word's attention to them [n_query + 1]
        |                                                   |  all but the last, which no query wrote
        +---------------------- product --------------------+
                                   v
                         a look for each word [P]

Looks are laid over the photo as its fit (data/image.py) showed it to the model: with the bars of "pad", and without
what "crop" cuts off.

Attention is not an explanation. The vision tower's tokens know of their whole image already, and a query has looked in
each layer before the one that is drawn.
"""

import math
import textwrap
import unicodedata

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data.image import fit_to_square, resize
from data.text import Tokenizer
from model import IMAGE_ID, Owl

N_COLUMN = 7  # the photo and six queries; or seven words
N_WORD = 4 * N_COLUMN  # words of the answer that are drawn, the first ones
LITTLE = 0.01  # a look of which less than this is on patches is drawn cold
TILE, GAP, LINE = 192, 10, 18  # pixels: a tile's longer edge, what is between two, a line of text
FONT = ImageFont.load_default(size=13)
RED = (225, 60, 60)
FOOTER = (
    "A query is a learned question that gathers something from the image's patches (the little squares) and writes one "
    "image word; image words are all that the language model knows of the image.",
    "The class token is the vision tower's summary of the whole image: what a query takes from it, or from the other "
    "queries, has no place in the photo and is not drawn.",
    "Each tile has its own scale (its hottest patch, or an even look at all patches if that is more), and is cold if "
    f"less than {LITTLE:.0%} is on patches: compare tiles by their bars, which show the first number below them.",
)


# --- the probabilities -------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """While it is entered, computes what attention keeps to itself, for one forward pass without a cache.

    The calls come in order: one for each layer of the vision tower, then of the abstractor, then of the decoder.
    """

    def __init__(self, model: Owl, first: int):
        super().__init__()
        self.n_vision = len(model.vit.blocks) + len(model.abstractor.layers)  # calls before the decoder's
        self.n_call = 0
        self.first = first  # the decoder's position from which on it is of interest
        self.looks: Tensor | None = None
        self.attends: Tensor | int = 0  # summed over the decoder's layers

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.n_call += 1
            q, k, _ = args
            if self.n_call == self.n_vision:
                self.looks = probabilities(q, k)
            elif self.n_call > self.n_vision:
                self.attends += probabilities(q, k, self.first, kwargs["is_causal"])[0]
        return function(*args, **kwargs)


def probabilities(q: Tensor, k: Tensor, first: int = 0, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) of the positions from `first` on, the mean over heads: [N, T - first, U] float32.

    q: [N, n_head, T, D]; k: [N, n_kv_head, U, D], each of whose heads serves several of q's.
    """
    q = q[:, :, first:].float()  # before the product, which for all T of a 7B's positions would be gigabytes
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if is_causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)


@torch.inference_mode()
def look(model: Owl, ids: list[int], said: list[int], images: Tensor) -> tuple[Tensor, Tensor]:
    """Reads a prompt and its answer, and says where the attention went: (looks, attends), float32 on the CPU.

    ids: the prompt, its images expanded, one at least. said: the answer's tokens, one at least. images: [N, 3, S, S].
    looks: [N, n_query, n_query + 1 + P], of the abstractor's last layer, the mean over heads.
    attends: [len(said), T], the mean over heads and the decoder's layers. Row i is position len(ids) - 1 + i, the one
    that said token i. T is len(ids) + len(said) - 1: the last token is said, but not read.
    Raises ValueError if the images are of another size or number than ids has places for.
    """
    device = model.llama.embed_tokens.weight.device
    with Watch(model, len(ids) - 1) as watch:
        model(torch.tensor([ids + said[:-1]], device=device), images.to(device))
    return watch.looks.cpu(), watch.attends.cpu() / len(model.llama.layers)


def words_of(said: list[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the places in `said` of the tokens that wrote it.

    Tokens that write only space, or bytes of one, or nothing at all like </s>, belong to no word.
    """
    answer = tokenizer.decode(said)
    words: list[tuple[str, list[int]]] = [(word, []) for word in answer.split()]
    text, n_whole = "", 0
    for i in range(len(said)):
        before, begin = text, n_whole
        text = tokenizer.decode(said[: i + 1])
        n_whole = max(begin, len(text.rstrip("\ufffd")))  # the first bytes of a character decode to these
        end = n_whole if n_whole > begin else begin + 1  # a byte alone belongs to the letter that it begins
        if text != before and answer[begin:end].strip():
            words[len(answer[:end].split()) - 1][1].append(i)
    return words


def by_word(
    attends: Tensor, ids: list[int], said: list[int], tokenizer: Tokenizer, image_words: int
) -> list[tuple[str, Tensor]]:
    """The words of an answer, each with its attention to the images' words, [N, image_words]: its tokens' mean.

    ids, said, attends: what look takes and returns. image_words: of each image, n_query + 1.
    """
    places = [place for place, token in enumerate(ids) if token == IMAGE_ID]
    to_images = attends[:, places].view(len(said), -1, image_words)
    return [(word, to_images[tokens].mean(dim=0)) for word, tokens in words_of(said, tokenizer)]


# --- the page ----------------------------------------------------------------------------------------


def seen(photo: Image.Image, fit: str) -> Image.Image:
    """What the model saw of a photo, but not stretched."""
    if fit in ("pad", "crop"):
        return fit_to_square(photo, TILE, fit)
    scale = TILE / max(photo.size)
    return resize(photo, *(max(1, round(edge * scale)) for edge in photo.size))


def photo_tile(title: str, photo: Image.Image, fit: str) -> Image.Image:
    """The whole photo, and in a frame what "crop" left of it."""
    small = seen(photo, "stretch")
    if fit != "crop":
        return tile(title, small, f"fit: {fit}")
    kept = min(small.size)
    left, top = (small.width - kept) // 2, (small.height - kept) // 2
    ImageDraw.Draw(small).rectangle((left, top, left + kept - 1, top + kept - 1), outline=RED, width=2)
    return tile(title, small, "fit: crop\n(the frame: what it left)")


def look_tile(title: str, small: Image.Image, patches: Tensor, whole: float, notes: str, bar: float) -> Image.Image:
    """small: of seen. patches: [P], what each patch has of `whole`; the rest of that is on none. Others: as in tile."""
    P = len(patches)
    heat = patches / max(float(patches.max()), whole / P)
    if patches.sum() < LITTLE:
        heat = torch.zeros(P)  # or noise would glow
        notes += "\ntoo little on patches: cold"
    return tile(title, heated(small, heat.view(math.isqrt(P), -1)), notes, bar)


def heated(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A picture in greys, none of them dark, and over it the heat of patches, [rows, columns], 0 to 1."""
    hot = Image.fromarray((255 * heat).byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
    grey = picture.convert("L").point(lambda value: 90 + 0.45 * value).convert("RGB")
    colour = ImageOps.colorize(hot, black="#40007a", mid="#f06030", white="#ffff70")
    return Image.composite(colour, grey, hot.point(lambda value: 0.8 * (255 * value) ** 0.5))


def draw(
    headings: list[str], photos: list[Image.Image], fit: str, looks: Tensor, words: list[tuple[str, Tensor]]
) -> Image.Image:
    """The page: headings, for each image of the prompt a row of queries and rows of words, and how to read them.

    photos: upright RGB, in the prompt's order. fit: how each became the square that the model saw.
    looks: of look. words: of by_word.
    """
    n_query = looks.shape[1]
    strip = heated(Image.new("RGB", (TILE, LINE // 2), "grey"), torch.linspace(0, 1, TILE)[None])
    rows = [[text(line)] for line in [*headings, "colours: none to a tile's most"]] + [[strip]]
    for i, photo in enumerate(photos):
        queries = [photo_tile(f"image {i + 1} of {len(photos)}", photo, fit)]
        if not words:
            rows += [[text("The answer has no words: there is none that attended to the image.")], queries]
            continue
        small = seen(photo, fit)
        maps = looks[i, :, n_query + 1 :]  # [n_query, P]
        answer = sum(attention[i] for _, attention in words)  # [n_query + 1]
        answer = (answer / answer.sum()).nan_to_num()  # which part of its look at this image each image word has
        for q in answer[:-1].topk(min(N_COLUMN - 1, n_query)).indices.tolist():
            others, class_token = looks[i, q, :n_query].sum(), looks[i, q, n_query]
            notes = f"{answer[q]:.1%} of the answer's look\nits own: {maps[q].sum():.0%} on patches,\n"
            notes += f"{class_token:.0%} class token, {others:.0%} queries"
            queries.append(look_tile(f"query {q}", small, maps[q], 1, notes, float(answer[q])))
        tiles = []
        for word, attention in words[:N_WORD]:
            on_image = float(attention[i].sum())
            patches = attention[i, :-1] @ maps  # [P]
            notes = f"{on_image:.1%} on this image's words,\nthrough them {patches.sum():.1%} on patches"
            tiles.append(look_tile(word, small, patches, on_image, notes, on_image))
        title = f"Queries whose image words the answer attends to most ({len(queries) - 1} of {n_query}): where they "
        title += f"look. The image's last word, which no query wrote, has {answer[-1]:.1%} of the answer's look."
        subtitle = f"The answer's words ({len(tiles)} of {len(words)}): where the queries look that each attends to."
        rows += [[text("\n" + title)], queries, [text(subtitle)]]
        rows += [tiles[j : j + N_COLUMN] for j in range(0, len(tiles), N_COLUMN)]
    return ImageOps.expand(laid_out([*rows, *([text(sentence)] for sentence in FOOTER)]), GAP, "white")


def tile(title: str, picture: Image.Image, notes: str, bar: float = 0) -> Image.Image:
    """A picture with a title above; below it a bar, of a length from 0 to 1, and lines of notes."""
    stripe = Image.new("RGB", (TILE, 12), "white")
    stripe.paste(RED, (0, 3, round(bar * TILE), 9))
    return laid_out([[text(title, TILE + GAP)], [picture], [stripe], [text(notes + "\n", TILE + GAP)]])


def text(words: str, width: int = N_COLUMN * (TILE + GAP)) -> Image.Image:
    lines = [line for part in plain(words).split("\n") for line in textwrap.wrap(part, width // 6) or [""]]
    picture = Image.new("RGB", (width, LINE * len(lines)), "white")
    for n, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, n * LINE), line, "black", FONT)
    return picture


def plain(words: str) -> str:
    """Words without accents, and with a ? for each letter that the font still has not."""
    missing = bytes(FONT.getmask("\uffff"))
    letters = [letter for letter in unicodedata.normalize("NFD", words) if not unicodedata.combining(letter)]
    return "".join("?" if letter != "\n" and bytes(FONT.getmask(letter)) == missing else letter for letter in letters)


def laid_out(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures, one below the other, on white."""
    heights = [max(each.height for each in row) for row in rows]
    page = Image.new("RGB", (max(sum(each.width for each in row) for row in rows), sum(heights)), "white")
    y = 0
    for row, height in zip(rows, heights):
        x = 0
        for each in row:
            page.paste(each, (x, y))
            x += each.width
        y += height
    return page
