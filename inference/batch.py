"""Batches of prompts: generated answers, or the most probable of given choices.

    prompts, images --encode_prompt, pad--> ids [B, T], padded on the right
        | ask                  decodes, all rows at once
        | log_probabilities    of given answers, in one forward pass
        | choose               the most probable of given answers

A row does not depend on the others up to rounding: attention is causal, so no token attends to padding, and each row
is read out at its own last token.
"""

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
    model: Owl,
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

    images: in the order of the questions' placeholders, pixels [3, S, S] or visual tokens [n_query + 1, n_embd] each.
    Raises ValueError if a prompt exceeds the context.
    """
    prompts = [encode_prompt(question, model, tokenizer, space) for question in questions]
    ids, stacked, lengths = pad(prompts, images, model)
    limits = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    steps = FastDecoder(model).generate(ids, stacked, prompt_lengths=lengths, sampling=sampling, **limits)
    texts = []
    for answer in torch.stack(list(steps), dim=1).tolist():  # [B, steps]
        if tokenizer.eos_id in answer:
            answer = answer[: answer.index(tokenizer.eos_id)]
        texts.append(tokenizer.decode(answer))
    return texts


def choose(
    model: Owl, tokenizer: Tokenizer, questions: list[Messages], images: list[Tensor], *, choices: list[list[str]]
) -> list[str]:
    """Returns the most probable choice of each question, as log_probabilities has them. images: as in ask."""
    scores = log_probabilities(model, tokenizer, questions, images, answers=choices)
    return [max(zip(texts, row), key=lambda choice: choice[1][0])[0] for texts, row in zip(choices, scores)]


@torch.inference_mode()
def log_probabilities(
    model: Owl, tokenizer: Tokenizer, questions: list[Messages], images: list[Tensor], *, answers: list[list[str]]
) -> list[list[tuple[float, bool]]]:
    """Returns for each answer to each question (the sum of its tokens' log-probabilities, whether it is greedy).

    Greedy: each of its tokens is the most probable one, so that greedy decoding would begin with this answer.
    The last token of an answer is predicted, but not part of the input. So "A", "B" and "C", one token each, share one
    row, the prompt; "the cat" and "the dog" share another, the prompt and "the". images: as in ask.
    """
    rows, row_images, images = [], [], iter(images)
    predicted = []  # per answer: (row, position, token predicted there) of each of its tokens
    for question, texts in zip(questions, answers):
        prompt = encode_prompt(question, model, tokenizer)
        own_images = [next(images) for _ in range(count_placeholders(question))]
        row_of = {}  # all tokens of an answer but the last -> row
        for tokens in map(tokenizer.encode, texts):
            start = tuple(tokens[:-1])
            if start not in row_of:
                row_of[start] = len(rows)
                rows.append(prompt + tokens[:-1])
                row_images += own_images
            predicted.append([(row_of[start], len(prompt) - 1 + i, token) for i, token in enumerate(tokens)])

    # One forward pass; logits only at the positions that predict an answer's token.
    ids, stacked, _ = pad(rows, row_images, model)
    x, modality = model.embed(ids, stacked)
    row, position, token = zip(*(entry for entries in predicted for entry in entries))
    x = model.llama(x, modality)[row, position]  # [number of tokens in all answers, n_embd]
    logits = model.llama.lm_head(x).float()
    log_p = logits.log_softmax(dim=-1)[range(len(token)), token]
    if not log_p.isfinite().all():
        raise not_finite(model, stacked)
    is_greedy = logits.argmax(dim=-1).cpu() == torch.tensor(token)
    lengths = [len(entries) for entries in predicted]
    parts = zip(log_p.cpu().split(lengths), is_greedy.split(lengths))
    scores = iter([(part.sum().item(), greedy.all().item()) for part, greedy in parts])
    return [[next(scores) for _ in texts] for texts in answers]
