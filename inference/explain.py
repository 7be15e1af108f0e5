"""Pictures of attention: from an answer to visual tokens, and from the abstractor's queries to patches.

    python sample.py --image x.jpg --prompt "What is this?" --show-attention maps.png

One more forward pass over the prompt and its answer records the inputs of F.scaled_dot_product_attention:

    abstractor, last layer, mean over heads           decoder, mean over heads and layers
    each query -> queries, class token, patches       position before an answer token -> all positions up to it
    query_maps [N, n_query, n_query + 1 + P]          token_attention [n_answer, T]
        |                                                 |
        | columns of the patches                          | columns of the visual tokens, mean over a word's tokens
        v                                                 v
    map of each query [n_query, P]                    attention of each word [N, n_query + 1]
        |                                                 |  without the end-of-image embedding
        +---------------------- product ------------------+
                                   v
                        map of each word [P]

Maps are drawn over the photo as the model received it (its fit, data/image.py). Attention is not an explanation: patch
features already mix information from the whole image, and a query attends to the image in every layer.
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
from inference.chat import ChatSession
from model import IMAGE_TOKEN_ID, Owl

N_COLUMNS = 7  # the photo and six queries, or seven words
N_WORDS = 4 * N_COLUMNS  # only the first words of an answer are drawn
MIN_ON_PATCHES = 0.01  # a map with less attention on patches is drawn without heat, which would be noise
TILE, GAP, LINE = 192, 10, 18  # pixels: longer edge of a tile, gap between two, height of a line of text
FONT = ImageFont.load_default(size=13)
RED = (225, 60, 60)
FOOTER = (
    "A query is a learned vector that gathers information from the image's patches and becomes one visual token. Its "
    "attention to other queries and to the class token, a summary of the image, has no position and is not drawn.",
    "The scale of a tile is its maximum, or uniform attention to all patches if that is more. Less than "
    f"{MIN_ON_PATCHES:.0%} on patches: no heat. Compare tiles by their bars, which show the first number below them.",
    "Characters that the font lacks are printed without their accent, or as ?.",
)


class AttentionRecorder(TorchFunctionMode):
    """Records attention of a forward pass: its calls are the layers of vision encoder, abstractor and decoder."""

    def __init__(self, model: Owl, first: int):
        super().__init__()
        self.n_before_decoder = len(model.vit.blocks) + len(model.abstractor.layers)
        self.n_calls = 0
        self.first = first  # first position of the decoder to record
        self.query_maps: Tensor | None = None  # [N, n_query, n_query + 1 + P]
        self.decoder_sum: Tensor | int = 0  # [T - first, T], summed over layers

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.n_calls += 1
            q, k, _ = args
            if self.n_calls == self.n_before_decoder:
                self.query_maps = attention_probs(q, k)
            elif self.n_calls > self.n_before_decoder:
                self.decoder_sum += attention_probs(q, k, self.first, kwargs["is_causal"])[0]
        return function(*args, **kwargs)


def attention_probs(q: Tensor, k: Tensor, first: int = 0, is_causal: bool = False) -> Tensor:
    """Attention probabilities of the queries from position `first` on, mean over heads: [N, T - first, U] float32.

    q: [N, n_head, T, D]; k: [N, n_kv_head, U, D], where each head serves several of q's.
    """
    q = q[:, :, first:].float()  # before the product, which takes gigabytes for all positions of a 7B model
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if is_causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)


@torch.inference_mode()
def attention_maps(model: Owl, ids: list[int], answer_ids: list[int], images: Tensor) -> tuple[Tensor, Tensor]:
    """Processes a prompt with its answer and returns (query_maps, token_attention), float32 on the CPU.

    ids: the prompt, with the placeholders of images [N, 3, S, S]. query_maps: [N, n_query, n_query + 1 + P].
    token_attention: [n_answer, T]; row i is the position that predicts answer token i, len(ids) - 1 + i.
    T is len(ids) + n_answer - 1, since the last token is predicted but not processed.
    """
    device = model.llama.embed_tokens.weight.device
    with AttentionRecorder(model, len(ids) - 1) as recorder:
        model(torch.tensor([ids + answer_ids[:-1]], device=device), images.to(device))
    return recorder.query_maps.cpu(), recorder.decoder_sum.cpu() / len(model.llama.layers)


def split_words(answer_ids: list[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Returns the words of an answer, each with the indices in answer_ids of its tokens.

    Tokens of white space, or without text (</s>), belong to no word.
    """
    answer = tokenizer.decode(answer_ids)
    words: list[tuple[str, list[int]]] = [(word, []) for word in answer.split()]
    text, n_complete = "", 0
    for i in range(len(answer_ids)):
        previous, start = text, n_complete
        text = tokenizer.decode(answer_ids[: i + 1])
        n_complete = max(start, len(text.rstrip("\ufffd")))  # the first bytes of a character decode to U+FFFD
        end = n_complete if n_complete > start else start + 1  # such a byte belongs to the next character
        if text != previous and answer[start:end].strip():
            words[len(answer[:end].split()) - 1][1].append(i)
    return words


def word_attention(
    token_attention: Tensor, ids: list[int], words: list[tuple[str, list[int]]], n_visual_tokens: int
) -> list[tuple[str, Tensor]]:
    """Returns each word with its attention to visual tokens, [N, n_visual_tokens]: the mean over the word's tokens."""
    positions = [position for position, token in enumerate(ids) if token == IMAGE_TOKEN_ID]
    to_images = token_attention[:, positions].unflatten(1, (-1, n_visual_tokens))
    return [(word, to_images[indices].mean(dim=0)) for word, indices in words]


def explain_answer(session: ChatSession, heading: str) -> Image.Image:
    """Renders the attention maps of the answer to a session's first question, which has one or more images."""
    chat, ids, answer_ids = session.conversation, session.conversation.prompt_ids, session.answer_ids
    pixels, photos = zip(*chat.images)
    query_maps, token_attention = attention_maps(session.model, ids, answer_ids, torch.stack(pixels))
    words = split_words(answer_ids, chat.tokenizer)
    words = word_attention(token_attention, ids, words, chat.config.n_visual_tokens)
    headings = [f"prompt: {chat.messages[0]}", f"answer: {chat.messages[1]}", heading]
    return render_attention_page(headings, list(photos), fit=chat.fit, query_maps=query_maps, words=words)


def render_attention_page(
    headings: list[str], photos: list[Image.Image], *, fit: str, query_maps: Tensor, words: list[tuple[str, Tensor]]
) -> Image.Image:
    """Renders headings, then for each image a row of queries and rows of words, then an explanation.

    photos: upright RGB, in the order of the prompt. fit: how each became the square that the model received.
    query_maps: from attention_maps. words: from word_attention.
    """
    n_query = query_maps.shape[1]
    scale = draw_heat(Image.new("RGB", (TILE, LINE // 2), "gray"), torch.linspace(0, 1, TILE)[None])
    rows = [[render_text(line)] for line in [*headings, "colors: zero to the maximum of a tile"]] + [[scale]]
    for i, photo in enumerate(photos):
        background = apply_fit(photo, fit)
        query_tiles = [render_photo(f"image {i + 1} of {len(photos)}", photo, fit)]
        if not words:
            rows += [[render_text("The answer has no words.")], query_tiles]
            continue

        # The queries whose visual tokens receive most of the answer's attention to this image.
        to_patches = query_maps[i, :, n_query + 1 :]  # [n_query, P]
        share = sum(attention[i] for _, attention in words)  # [n_query + 1]
        share = (share / share.sum()).nan_to_num()
        for q in share[:-1].topk(min(N_COLUMNS - 1, n_query)).indices.tolist():
            notes = f"{share[q]:.1%} of the answer's attention\nits own: {to_patches[q].sum():.0%} to patches,\n"
            notes += f"{query_maps[i, q, n_query]:.0%} class token, {query_maps[i, q, :n_query].sum():.0%} queries"
            bar = float(share[q])
            query_tiles.append(render_map(f"query {q}", background, to_patches[q], total=1, notes=notes, bar=bar))
        title = f"\nQueries whose visual tokens the answer attends to most ({len(query_tiles) - 1} of {n_query}). The "
        title += f"end-of-image embedding receives {share[-1]:.1%} of the answer's attention to the image."
        rows += [[render_text(title)], query_tiles]

        # The words: maps of all queries, weighted by the word's attention to their visual tokens.
        word_tiles = []
        for word, attention in words[:N_WORDS]:
            on_image, heat = float(attention[i].sum()), attention[i, :-1] @ to_patches  # [P]
            notes = f"{on_image:.1%} to visual tokens,\nthrough them {heat.sum():.1%} to patches"
            word_tiles.append(render_map(word, background, heat, total=on_image, notes=notes, bar=on_image))
        title = f"Words of the answer ({len(word_tiles)} of {len(words)}): the maps of the queries they attend to."
        rows.append([render_text(title)])
        rows += [word_tiles[j : j + N_COLUMNS] for j in range(0, len(word_tiles), N_COLUMNS)]
    return ImageOps.expand(stack_rows([*rows, *([render_text(line)] for line in FOOTER)]), GAP, "white")


def render_photo(title: str, photo: Image.Image, fit: str) -> Image.Image:
    """Returns a tile with the whole photo, and a frame around what "crop" keeps."""
    small = apply_fit(photo, "stretch")
    if fit == "crop":
        edge = min(small.size)
        left, top = (small.width - edge) // 2, (small.height - edge) // 2
        ImageDraw.Draw(small).rectangle((left, top, left + edge - 1, top + edge - 1), outline=RED, width=2)
    return render_tile(title, small, f"fit: {fit}")


def render_map(
    title: str, background: Image.Image, to_patches: Tensor, *, total: float, notes: str, bar: float
) -> Image.Image:
    """Returns a tile with a map. to_patches: [P], parts of `total`; the rest of it is not on patches."""
    P = len(to_patches)
    heat = to_patches / max(float(to_patches.max()), total / P)
    if to_patches.sum() < MIN_ON_PATCHES:
        heat = torch.zeros(P)
        notes += "\ntoo little to patches: no heat"
    return render_tile(title, draw_heat(background, heat.view(math.isqrt(P), -1)), notes, bar)


def apply_fit(photo: Image.Image, fit: str) -> Image.Image:
    """Returns a photo as the model received it, but small and with its aspect ratio kept."""
    if fit in ("pad", "crop"):
        return fit_to_square(photo, TILE, fit)
    scale = TILE / max(photo.size)
    return resize(photo, *(max(1, round(edge * scale)) for edge in photo.size))


def draw_heat(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Draws a picture in light gray, and over it the heat of its patches, [rows, columns], 0 to 1."""
    heat = Image.fromarray((255 * heat).byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
    gray = picture.convert("L").point(lambda value: 90 + 0.45 * value).convert("RGB")
    color = ImageOps.colorize(heat, black="#40007a", mid="#f06030", white="#ffff70")
    return Image.composite(color, gray, heat.point(lambda value: 0.8 * (255 * value) ** 0.5))


def render_tile(title: str, picture: Image.Image, notes: str, bar: float = 0) -> Image.Image:
    """Stacks a title, a picture, a bar with a length from 0 to 1, and notes."""
    stripe = Image.new("RGB", (TILE, 12), "white")
    stripe.paste(RED, (0, 3, round(bar * TILE), 9))
    above, below = (render_text(text, TILE + GAP) for text in (title, notes + "\n"))
    return stack_rows([[above], [picture], [stripe], [below]])


def render_text(text: str, width: int = N_COLUMNS * (TILE + GAP)) -> Image.Image:
    """Renders text, wrapped to a width in pixels."""
    lines = [line for part in to_font(text).split("\n") for line in textwrap.wrap(part, width // 6) or [""]]
    picture = Image.new("RGB", (width, LINE * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, i * LINE), line, "black", FONT)
    return picture


def to_font(text: str) -> str:
    """Removes accents, and replaces characters that the font lacks by ?."""
    missing = bytes(FONT.getmask("\uffff"))
    letters = [letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter)]
    return "".join("?" if letter != "\n" and bytes(FONT.getmask(letter)) == missing else letter for letter in letters)


def stack_rows(rows: list[list[Image.Image]]) -> Image.Image:
    """Pastes rows of pictures below one another on white."""
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(sum(picture.width for picture in row) for row in rows)
    page = Image.new("RGB", (width, sum(heights)), "white")
    for i, row in enumerate(rows):
        x = 0
        for picture in row:
            page.paste(picture, (x, sum(heights[:i])))
            x += picture.width
    return page
