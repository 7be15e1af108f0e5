"""From questions to answers, a batch at a time; those on the same images are neighbours, and share what is encoded.

    questions --deal--> this process' conversations (most are of one question), those on the same images together
                          | answers, batch by batch
    image files --a few threads, ahead--> pixels --encode--> image words ---+
                                          prompts (fitted to the context) --+--> ask: the answer, greedily
                                                                                 choose: the likeliest of the choices

An answer does not depend on what it was asked beside: in float32 it is the same for any batch size and any number of
processes. (Only where two words were equally likely up to rounding could it differ.)
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.image import load_image
from data.text import IMAGE_MARK, Tokenizer, expand_images, render_prompt
from decode import ahead
from model import Owl
from parallel import Place
from tasks import Question

N_READER = 4  # threads that read images
N_AHEAD = 2  # batches whose images are read before it is their turn


# --- a batch of questions ----------------------------------------------------------------------------

Said = str | list[str]  # a question; or a conversation, questions and answers in turn, that ends with a question


def n_mark(question: Said) -> int:
    return len(IMAGE_MARK.findall("".join(question)))


def prompt_of(question: Said, model: Owl, tokenizer: Tokenizer, space: bool = False) -> list[int]:
    """The ids of a question. space: as in render_prompt. ValueError if they outgrow the model's context."""
    messages = [question] if isinstance(question, str) else question
    ids = render_prompt([*messages, None], tokenizer, model.config.style, space)
    ids, _ = expand_images(ids, None, model.config.image_words)
    if len(ids) > model.config.llama.context:
        context = model.config.llama.context
        raise ValueError(f"a question of {len(ids)} tokens is longer than the model's context of {context}")
    return ids


def padded(rows: list[list[int]], images: list[Tensor], model: Owl) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids [B, T] and images on the model's device, as generate takes them, and the rows' lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    weight = model.llama.embed_tokens.weight
    return ids.to(weight.device), torch.stack(images).to(weight) if images else None, lengths


def ask(
    model: Owl,
    tokenizer: Tokenizer,
    questions: list[Said],
    images: list[Tensor],
    max_new_tokens: int,
    min_new_tokens: int = 0,
    space: bool = False,
) -> list[str]:
    """Answers a batch of questions greedily.

    images: those that the questions mark, in order: [3, S, S] each, or [n_word, n_embd] of encode_images.
    space: as in render_prompt.
    """
    prompts = [prompt_of(question, model, tokenizer, space) for question in questions]
    ids, pictures, lengths = padded(prompts, images, model)
    steps = model.generate(ids, pictures, lengths, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
    texts = []
    for answer in torch.stack(list(steps), dim=1).tolist():  # [B, steps]
        if tokenizer.eos_id in answer:
            answer = answer[: answer.index(tokenizer.eos_id)]
        texts.append(tokenizer.decode(answer))
    return texts


@torch.inference_mode()
def choose(
    model: Owl, tokenizer: Tokenizer, questions: list[Said], images: list[Tensor], choices: list[list[str]]
) -> list[str]:
    """Of each question's choices the likeliest answer: that with the highest sum of log-probabilities. images: as ask.

    A choice's last token is only foreseen, not read. So "A", "B" and "C", of a token each, share a row, the prompt
    alone; "the cat" and "the dog" share another, the prompt and "the".
    """
    rows, pictures, images = [], [], iter(images)
    foreseen = []  # of each choice a list: (row, position, token foreseen there) of each of its tokens
    for question, texts in zip(questions, choices):
        prompt = prompt_of(question, model, tokenizer)
        own = [next(images) for _ in range(n_mark(question))]
        row_of = {}  # by what of a choice is read
        for piece in map(tokenizer.encode, texts):
            start = tuple(piece[:-1])
            if start not in row_of:
                row_of[start] = len(rows)
                rows.append(prompt + piece[:-1])
                pictures += own
            foreseen.append([(row_of[start], len(prompt) - 1 + i, token) for i, token in enumerate(piece)])
    ids, pictures, _ = padded(rows, pictures, model)
    x, split = model._embed(ids, pictures)
    row, position, token = zip(*(spot for spots in foreseen for spot in spots))
    x = model.llama(x, split)[row, position]  # [all choices' tokens, n_embd]
    log_p = model.llama.lm_head(x).float().log_softmax(dim=-1)[range(len(token)), token]
    sums = iter(part.sum().item() for part in log_p.cpu().split([len(spots) for spots in foreseen]))
    return [max(zip(texts, sums), key=lambda choice: choice[1])[0] for texts in choices]


# --- all questions -----------------------------------------------------------------------------------

Source = str | bytes  # an image: a path below the folder, or a file's content


@contextmanager
def opened(source: Source, folder: Path, id: str) -> Iterator[Image.Image]:
    """An image, as load_image reads it, to work on.

    ValueError, in one sentence that names the file (or the question of that id, where there is none), if it cannot be
    read, or if the work itself ends in a ValueError.
    """
    try:
        yield load_image(source if isinstance(source, bytes) else (folder / source).read_bytes())
    except (ValueError, OSError) as error:
        name = f"question {id!r:.80}" if isinstance(source, bytes) else folder / source
        raise ValueError(f"{name}: {error}") from None


def deal(questions: list[Question], known: dict[str, str], place: Place) -> list[list[Question]]:
    """The conversations (most are of one question) that this process holds; those on the same images are neighbours.

    known: answers by id. Conversations that are over are left out.
    """
    conversations: dict[str, list[Question]] = {}
    for question in questions:
        conversations.setdefault(question.before[0] if question.before else question.id, []).append(question)
    groups: dict[object, list[list[Question]]] = {}
    for first, turns in conversations.items():
        if any(turn.id not in known for turn in turns):
            groups.setdefault(tuple(turns[0].images) or (first, "no image"), []).append(turns)
    return [turns for group in list(groups.values())[place.rank :: place.world] for turns in group]


def fitted(
    turns: list[Question], known: dict[str, str], model: Owl, tokenizer: Tokenizer, n_new: int
) -> tuple[list[Question], list[str]]:
    """The turns that stand in the prompt of the last one, and their messages.

    If the prompt leaves no room for n_new tokens, the worked examples leave it, the last first; or a conversation's
    earlier turns, the first first, whose images then come with the next. ValueError if the question alone is too long.
    """
    *before, question = turns
    marks = ""  # of the images of turns that have left
    # what choose reads behind the prompt: a choice's tokens but the last
    n_more = max(len(tokenizer.encode(choice)) for choice in question.choices) - 1 if question.choices else 0
    while True:
        messages = [text for turn in before for text in (turn.prompt, IMAGE_MARK.sub(" ", known[turn.id]))]
        messages.append(question.prompt)
        messages[0] = marks + messages[0]
        ids = render_prompt([*messages, None], tokenizer, model.config.style, question.space)
        length = len(ids) + (model.config.image_words - 1) * n_mark(messages)
        room = model.config.llama.context - length
        if room >= max(n_new, n_more) or not (before or question.shots):
            break
        if question.shots:
            question = question.with_fewer_shots()
        else:
            marks += "<image>" * len(before.pop(0).images)
    if room < n_more:
        raise ValueError(
            f"question {question.id!r:.80} takes {length + n_more} tokens, more than the model's context of "
            f"{model.config.llama.context}"
        )
    return [*before, question], messages


@torch.inference_mode()
def encode(model: Owl, pixels: dict[Source, Future], encoded: dict[Source, Tensor]) -> dict[Source, Tensor]:
    """A batch's images as words, [n_word, n_embd] each; those that the last batch had as well are there already."""
    new = [source for source in pixels if source not in encoded]
    encoded = {source: encoded[source] for source in pixels if source in encoded}
    if new:
        images = torch.stack([pixels[source].result() for source in new])
        encoded |= zip(new, model.encode_images(images.to(model.llama.embed_tokens.weight)))
    return encoded


@contextmanager
def readers() -> Iterator[ThreadPoolExecutor]:
    """Threads that read images."""
    with warnings.catch_warnings():
        # load_image changes this for a while, which threads might do at odds: so it is changed before and after, too.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        pool = ThreadPoolExecutor(N_READER)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def answers(
    model: Owl,
    tokenizer: Tokenizer,
    conversations: list[list[Question]],
    known: dict[str, str],
    broken: dict[Source, str],
    read: Callable[[Source, str], Tensor],
    batch: int,
    limits: tuple[int, int],
) -> Iterator[tuple[list[Question], str]]:
    """Asks what is not known, `batch` conversations at a time, and adds it: yields (what stood in the prompt, answer).

    read(image, a question's id): its pixels, [3, S, S]. limits: an answer's least and most tokens. A conversation with
    an image that cannot be read is left out, and the reason, in one sentence, added to broken.
    Raises ValueError, in one sentence, for prompts that do not fit.
    """
    min_new_tokens, max_new_tokens = limits

    def batches() -> Iterator[tuple[list[list[Question]], dict[Source, Future]]]:
        pixels = {}
        for start in range(0, len(conversations), batch):
            part = conversations[start : start + batch]
            id_of = {source: turn.id for turns in part for turn in turns for source in turn.images}
            pixels = {source: pixels.get(source) or pool.submit(read, source, id) for source, id in id_of.items()}
            yield part, pixels

    with readers() as pool:
        encoded = {}
        for part, pixels in ahead(batches(), N_AHEAD):
            for source, future in pixels.items():
                try:
                    future.result()
                except ValueError as error:
                    broken[source] = str(error)
            part = [turns for turns in part if not any(source in broken for turn in turns for source in turn.images)]
            encoded = encode(model, {source: pixels[source] for source in pixels if source not in broken}, encoded)
            for n in range(1, max(map(len, part), default=0) + 1):
                due = [turns[:n] for turns in part if len(turns) >= n and turns[n - 1].id not in known]
                if not due:
                    continue
                # Of all turns, those too that do not fit the context: their images' marks stay in the prompt.
                images = [encoded[source] for turns in due for turn in turns for source in turn.images]
                prompts = [fitted(turns, known, model, tokenizer, max_new_tokens) for turns in due]
                messages = [said for _, said in prompts]
                if due[0][-1].choices:
                    texts = choose(model, tokenizer, messages, images, [turns[-1].choices for turns in due])
                else:
                    texts = ask(model, tokenizer, messages, images, max_new_tokens, min_new_tokens, due[0][-1].space)
                for (turns, _), text in zip(prompts, texts):
                    known[turns[-1].id] = text
                    yield turns, text
