"""Batches of prompts: generated answers, or the log-probabilities of given choices.

    prompts, images --encode_prompt, pad--> ids [B, T], padded on the right
        | ask              decodes, all rows at once
        | score_choices    one forward pass; the log-probability of each choice
        | choose           the choice with the highest one

A row does not depend on the others up to rounding: attention is causal, so no token attends to padding, and each row
is read out at its own last token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data.text import IMAGE_PLACEHOLDER, Tokenizer, expand_images, render_prompt
from common.device import not_finite
from generate import Sampling
from inference.fast_decode import FastDecoder
from model import Owl

Messages = str | list[str]  # a question; or a conversation, questions and answers in turn, that ends with a question


def count_placeholders(messages: Messages) -> int:
    return len(IMAGE_PLACEHOLDER.findall("".join(messages)))


def place_images(prompt: str, sources: list[Tensor]) -> tuple[str, list[Tensor]]:
    """Returns the prompt with a placeholder per image, and the images [3, S, S] in the order of their placeholders.

    sources: images [3, S, S] and videos [n_frames, 3, S, S]. The first placeholder in the prompt stands for the first
    source, and so on; sources without one come before the text. A video's placeholder is repeated for each frame.
    Raises ValueError if there are more placeholders than sources.
    """
    n_placeholder, n_source = count_placeholders(prompt), len(sources)
    if n_placeholder > n_source:
        raise ValueError(f"the prompt has {n_placeholder} image placeholders, but there are {n_source} images")
    sources = sources[n_placeholder:] + sources[:n_placeholder]
    frames = [[source] if source.ndim == 3 else list(source) for source in sources]
    numbers = iter(map(len, frames))
    prompt = "<image>" * (n_source - n_placeholder) + prompt
    prompt = IMAGE_PLACEHOLDER.sub(lambda _: "<image>" * next(numbers), prompt)
    return prompt, [image for images in frames for image in images]


def encode_prompt(messages: Messages, model: Owl, tokenizer: Tokenizer, space: bool = False) -> list[int]:
    """Returns the token ids of a prompt, with the placeholders of its images. space: as in render_prompt."""
    messages = [messages] if isinstance(messages, str) else messages
    ids = render_prompt([*messages, None], tokenizer, model.config.variant, space)
    ids, _ = expand_images(ids, None, model.config.n_visual_tokens)
    return ids


def pad(rows: list[list[int]], images: list[Tensor], model: Owl) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns ids [B, T] and stacked images on the model's device, and the rows' lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    weight = model.llama.embed_tokens.weight
    return ids.to(weight.device), torch.stack(images).to(weight) if images else None, lengths


def ask(
    decoder: FastDecoder,
    tokenizer: Tokenizer,
    questions: list[Messages],
    images: list[Tensor],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    space: bool = False,
    sampling: Sampling = Sampling(),
) -> list[str]:
    """Answers a batch of questions, by greedy decoding unless `sampling` has a temperature.

    decoder: of the model; keep it for all batches, since it keeps CUDA graphs.
    images: in the order of the questions' placeholders, pixels [3, S, S] or visual tokens [n_query + 1, n_embd] each.
    Raises ValueError if a prompt exceeds the context.
    """
    prompts = [encode_prompt(question, decoder.model, tokenizer, space) for question in questions]
    ids, stacked, lengths = pad(prompts, images, decoder.model)
    limits = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    steps = decoder.generate(ids, stacked, prompt_lengths=lengths, sampling=sampling, **limits)
    texts = []
    for answer in torch.stack(list(steps), dim=1).tolist():  # [B, steps]
        if tokenizer.eos_id in answer:
            answer = answer[: answer.index(tokenizer.eos_id)]
        texts.append(tokenizer.decode(answer))
    return texts


def choose(
    model: Owl, tokenizer: Tokenizer, questions: list[Messages], images: list[Tensor], *, choices: list[list[str]]
) -> list[str]:
    """Returns the most probable choice of each question. Parameters and errors: as in score_choices."""
    scores = score_choices(model, tokenizer, questions, images, choices=choices)
    return [max(zip(texts, row), key=lambda choice: choice[1].log_p)[0] for texts, row in zip(choices, scores)]


class Score(NamedTuple):
    """Of a choice. Greedy: each of its tokens is the most probable one, so greedy decoding would begin with it."""

    log_p: float
    is_greedy: bool


def choice_probabilities(scores: list[Score]) -> list[float]:
    """Returns the probabilities of the choices of one question, given that the answer is one of them: their softmax."""
    return torch.tensor([score.log_p for score in scores], dtype=torch.float64).softmax(dim=0).tolist()


@torch.inference_mode()
def score_choices(
    model: Owl, tokenizer: Tokenizer, questions: list[Messages], images: list[Tensor], *, choices: list[list[str]]
) -> list[list[Score]]:
    """Returns the log-probability of each choice of each question: that the answer begins with the choice's tokens.

    It is the sum of the tokens' log-probabilities, not their mean, and </s> is not part of a choice. So of choices
    with different lengths the longer ones tend to be less probable.

    The last token of a choice is predicted, but not part of the input. So "A", "B" and "C", one token each, share one
    row, the prompt; "the cat" and "the dog" share another, the prompt and "the". images: as in ask.
    Raises ValueError if a prompt with a choice exceeds the context.
    """
    rows, row_images, images = [], [], iter(images)
    predicted = []  # per choice: (row, position, token predicted there) of each of its tokens
    for question, texts in zip(questions, choices):
        prompt = encode_prompt(question, model, tokenizer)
        own_images = [next(images) for _ in range(count_placeholders(question))]
        row_of = {}  # all tokens of a choice but the last -> row
        for tokens in map(tokenizer.encode, texts):
            start = tuple(tokens[:-1])
            if start not in row_of:
                row_of[start] = len(rows)
                rows.append(prompt + tokens[:-1])
                row_images += own_images
            predicted.append([(row_of[start], len(prompt) - 1 + i, token) for i, token in enumerate(tokens)])
    longest, context = max(map(len, rows)), model.config.llama.context
    if longest > context:
        raise ValueError(f"a prompt and a choice have {longest} tokens, but the model's context is {context}")

    # One forward pass; logits only at the positions that predict a choice's token.
    ids, stacked, _ = pad(rows, row_images, model)
    x, modality = model.embed(ids, stacked)
    row, position, token = zip(*(entry for entries in predicted for entry in entries))
    x = model.llama(x, modality)[row, position]  # [number of tokens in all choices, n_embd]
    logits = model.llama.lm_head(x).float()
    log_p = logits.log_softmax(dim=-1)[range(len(token)), token]
    if not log_p.isfinite().all():
        raise not_finite(model, stacked)
    is_greedy = logits.argmax(dim=-1).cpu() == torch.tensor(token)
    lengths = [len(entries) for entries in predicted]
    parts = zip(log_p.cpu().split(lengths), is_greedy.split(lengths))
    scores = iter([Score(part.sum().item(), bool(greedy.all())) for part, greedy in parts])
    return [[next(scores) for _ in texts] for texts in choices]
