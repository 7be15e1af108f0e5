"""Batches of prompts: greedy answers, or the most probable of given choices.

    prompts, images --encode_prompt, pad--> ids [B, T], padded on the right
        | ask        decodes greedily, all rows at once
        | choose     one forward pass; the choice whose tokens are the most probable

A row does not depend on the others up to rounding: attention is causal, so no token attends to padding, and each row
is read out at its own last token.
"""

import torch
from torch import Tensor

from data.text import IMAGE_PLACEHOLDER, Tokenizer, expand_images, render_prompt
from common.device import not_finite
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
) -> list[str]:
    """Answers a batch of questions by greedy decoding.

    images: in the order of the questions' placeholders, pixels [3, S, S] or visual tokens [n_query + 1, n_embd] each.
    Raises ValueError if a prompt exceeds the context.
    """
    prompts = [encode_prompt(question, model, tokenizer, space) for question in questions]
    ids, stacked, lengths = pad(prompts, images, model)
    limits = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    steps = FastDecoder(model).generate(ids, stacked, prompt_lengths=lengths, **limits)
    texts = []
    for answer in torch.stack(list(steps), dim=1).tolist():  # [B, steps]
        if tokenizer.eos_id in answer:
            answer = answer[: answer.index(tokenizer.eos_id)]
        texts.append(tokenizer.decode(answer))
    return texts


@torch.inference_mode()
def choose(
    model: Owl, tokenizer: Tokenizer, questions: list[Messages], images: list[Tensor], *, choices: list[list[str]]
) -> list[str]:
    """Returns the most probable choice of each question: the highest sum of its tokens' log-probabilities.

    The last token of a choice is predicted, but not part of the input. So "A", "B" and "C", one token each, share one
    row, the prompt; "the cat" and "the dog" share another, the prompt and "the". images: as in ask.
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

    # One forward pass; logits only at the positions that predict a choice's token.
    ids, stacked, _ = pad(rows, row_images, model)
    x, modality = model.embed(ids, stacked)
    row, position, token = zip(*(entry for entries in predicted for entry in entries))
    x = model.llama(x, modality)[row, position]  # [number of tokens in all choices, n_embd]
    log_p = model.llama.lm_head(x).float().log_softmax(dim=-1)[range(len(token)), token]
    if not log_p.isfinite().all():
        raise not_finite(model, stacked)
    sums = iter(part.sum().item() for part in log_p.cpu().split([len(entries) for entries in predicted]))
    return [max(zip(texts, sums), key=lambda choice: choice[1])[0] for texts in choices]
