"""From questions to answers: a batch at a time, each image encoded once for all that is asked about it.

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

import torch
from PIL import Image
from torch import Tensor

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


def prompt_of(question: Said, model: Owl, tokenizer: Tokenizer) -> list[int]:
    """The ids of a question. ValueError if they outgrow the model's context."""
    messages = [question] if isinstance(question, str) else question
    ids = render_prompt([*messages, None], tokenizer, model.config.style)
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
) -> list[str]:
    """Answers a batch of questions greedily.

    images: those that the questions mark, in order: [3, S, S] each, or [n_word, n_embd] of encode_images.
    """
    ids, shown, lengths = padded([prompt_of(question, model, tokenizer) for question in questions], images, model)
    steps = model.generate(ids, shown, lengths, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
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

    A choice's last token is only foreseen, not read: letters have no other, and so share a row.
    """
    rows, pictures, images = [], [], iter(images)
    row, position, token, n_token = [], [], [], []
    for question, texts in zip(questions, choices):
        prompt = prompt_of(question, model, tokenizer)
        shown = [next(images) for _ in range(n_mark(question))]
        row_of = {}
        for piece in map(tokenizer.encode, texts):
            start = tuple(piece[:-1])
            if start not in row_of:
                row_of[start] = len(rows)
                rows.append(prompt + piece[:-1])
                pictures += shown
            row += [row_of[start]] * len(piece)
            position += range(len(prompt) - 1, len(prompt) - 1 + len(piece))
            token += piece
            n_token.append(len(piece))
    ids, shown, _ = padded(rows, pictures, model)
    x, split = model._embed(ids, shown)
    x = model.llama(x, split)[row, position]  # [all choices' tokens, n_embd]
    log_p = model.llama.lm_head(x).float().log_softmax(dim=-1)[range(len(token)), token]
    sums = iter(part.sum().item() for part in log_p.cpu().split(n_token))
    return [max(texts, key=lambda _: next(sums)) for texts in choices]


# --- all questions -----------------------------------------------------------------------------------

Source = str | bytes  # an image: a path below the folder, or a file's content


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
    marks = ""
    n_more = max(len(tokenizer.encode(choice)) for choice in question.choices) - 1 if question.choices else 0
    while True:
        messages = [text for turn in before for text in (turn.prompt, IMAGE_MARK.sub(" ", known[turn.id]))]
        messages.append(question.prompt)
        messages[0] = marks + messages[0]
        ids = render_prompt([*messages, None], tokenizer, model.config.style)
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
def encode(model: Owl, pixels: dict[Source, Future], words: dict[Source, Tensor]) -> dict[Source, Tensor]:
    """A batch's images as words, [n_word, n_embd] each; those that the last batch had as well are there already."""
    new = [source for source in pixels if source not in words]
    words = {source: words[source] for source in pixels if source in words}
    if new:
        images = torch.stack([pixels[source].result() for source in new])
        words |= zip(new, model.encode_images(images.to(model.llama.embed_tokens.weight)))
    return words


def answers(
    model: Owl,
    tokenizer: Tokenizer,
    conversations: list[list[Question]],
    known: dict[str, str],
    read: Callable[[Source], Tensor],
    batch: int,
    lengths: tuple[int, int],
) -> Iterator[tuple[list[Question], str]]:
    """Asks what is not known, `batch` conversations at a time, and adds it: yields (what stood in the prompt, answer).

    read: an image's pixels, [3, S, S]. lengths: an answer's least and most tokens.
    Raises ValueError, in one sentence, for images that cannot be read and prompts that do not fit.
    """
    min_new_tokens, max_new_tokens = lengths
    # load_image changes this for a while, which threads might do at odds.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    pool = ThreadPoolExecutor(N_READER)

    def batches() -> Iterator[tuple[list[list[Question]], dict[Source, Future]]]:
        pixels = {}
        for start in range(0, len(conversations), batch):
            part = conversations[start : start + batch]
            sources = dict.fromkeys(source for turns in part for turn in turns for source in turn.images)
            pixels = {source: pixels.get(source) or pool.submit(read, source) for source in sources}
            yield part, pixels

    try:
        words = {}
        for part, pixels in ahead(batches(), N_AHEAD):
            words = encode(model, pixels, words)
            for n in range(1, max(map(len, part)) + 1):
                asked = [turns[:n] for turns in part if len(turns) >= n and turns[n - 1].id not in known]
                if not asked:
                    continue
                images = [words[source] for turns in asked for turn in turns for source in turn.images]
                asked = [fitted(turns, known, model, tokenizer, max_new_tokens) for turns in asked]
                messages = [said for _, said in asked]
                if asked[0][0][-1].choices:
                    texts = choose(model, tokenizer, messages, images, [turns[-1].choices for turns, _ in asked])
                else:
                    texts = ask(model, tokenizer, messages, images, max_new_tokens, min_new_tokens)
                for (turns, _), text in zip(asked, texts):
                    known[turns[-1].id] = text
                    yield turns, text
    finally:
        pool.shutdown(cancel_futures=True)
