"""Autoregressive generation with a KV cache: process the prompt once (prefill), then decode one token at a time.

    ids [B, T], images --embed, Llama--> last hidden state [B, n_embd] --lm_head, sample_token--> token [B]
                                  |  ^                                                              |
                          KVCache v  |                                                              |
                                  Llama  <-------------------- embed_tokens ------------------------+

There are two such loops, with the same signature, which yield the same tokens. This one is the reference: short, with
shapes that grow with the text. inference/fast_decode.py has fixed shapes, so that a step can be compiled or captured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.device import not_finite
from llama import KVCache
from model import Owl


@dataclass(frozen=True)
class Sampling:
    """How the next token is selected. Raises ValueError for settings that select nothing."""

    temperature: float = 0.0  # 0: greedy; else 1e-37 to 1e37, which float32 rounds neither to 0 nor to infinity
    top_k: int | None = None  # sample among the k most probable tokens
    top_p: float | None = None  # sample among the fewest tokens that together have probability p
    seed: int | None = None

    def __post_init__(self) -> None:
        is_valid_k = self.top_k is None or self.top_k >= 1
        is_valid_p = self.top_p is None or 0 < self.top_p <= 1
        if not ((self.temperature == 0 or 1e-37 <= self.temperature <= 1e37) and is_valid_k and is_valid_p):
            raise ValueError(f"need a temperature of 0 or 1e-37 to 1e37, top_k >= 1 and 0 < top_p <= 1, got {self}")


def sample_token(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Selects a token per row, [B] int64, -1 if not finite. logits: [B, V]. uniform: [B] or [1] numbers in [0, 1)."""
    largest, token = logits.max(dim=-1, keepdim=True)  # [B, 1]
    if sampling.temperature > 0:
        logits = logits.float() - largest.float()  # the maximum is 0: no overflow below
        probs, tokens = (logits / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        if sampling.top_k is not None:
            probs[:, sampling.top_k :] = 0
        if sampling.top_p is not None:  # nucleus sampling: drop tokens once the mass before them reaches top_p
            mass_before = probs.cumsum(dim=-1) - probs
            probs = probs.masked_fill(mass_before >= sampling.top_p * probs.sum(dim=-1, keepdim=True), 0)
        cdf = probs.cumsum(dim=-1)
        index = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(dim=-1, keepdim=True)  # inverse transform sampling
        token = tokens.gather(1, index.clamp(max=tokens.shape[1] - 1))
    return torch.where(largest.abs() < torch.inf, token, -1)[:, 0]  # NaN is the maximum of a row that contains it


@torch.inference_mode()
def prefill(model: Owl, ids: Tensor, images: Tensor | None, prompt_lengths: Tensor | None, cache: KVCache) -> Tensor:
    """Processes the prompt in one pass, which fills the cache. Returns the last hidden states [B, n_embd].

    Arguments and errors are those of `generate`.
    """
    device = cache.lengths.device
    B, T = ids.shape
    lengths = torch.full((B,), T, device=device) if prompt_lengths is None else prompt_lengths.to(device)
    if int((cache.lengths + lengths).max()) > cache.max_length:
        raise ValueError(f"the prompt does not fit the context of {cache.max_length} tokens")
    x, modality = model.embed(ids.to(device), images)  # [B, T, n_embd]
    x = model.llama(x, modality, cache)[torch.arange(B, device=device), lengths - 1]  # [B, n_embd]
    cache.lengths += lengths
    return x


@torch.inference_mode()
def generate(
    model: Owl,
    ids: Tensor,
    images: Tensor | None = None,
    *,
    prompt_lengths: Tensor | None = None,
    max_new_tokens: int = 512,
    min_new_tokens: int = 0,
    sampling: Sampling = Sampling(),
    stop_at_eos: bool = True,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, [B] int64 on the CPU, until all rows have ended or max_new_tokens is reached.

    ids: [B, T] int64, padded on the right where prompt_lengths [B] says so. images: as in Owl.embed.
    A row ends with </s> (unless stop_at_eos is False) or when the cache is full; it yields </s> from then on.
    min_new_tokens: before this many tokens, </s> is not selected. sampling: with a seed, all rows use the same random
    numbers, so that a row gets the tokens that it would get alone (and equal prompts get equal answers).
    cache: holds the tokens before ids, of a conversation that continues; afterwards it also holds the prompt and the
    yielded tokens except the last. Raises ValueError if the prompt does not fit the context or the images do not match.
    """
    llama, eos_id = model.llama, model.config.llama.eos_id
    if cache is None:
        cache = llama.make_cache(len(ids), min(ids.shape[1] + max_new_tokens, llama.config.context))
    x = prefill(model, ids, images, prompt_lengths, cache)  # [B, n_embd]
    rng = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)

    # Decode: select a token, process it, repeat. A step waits for the device to copy the token, in finished.all(),
    # and for the length of the longest row (Llama.attention_context).
    B, device = len(x), x.device
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        logits = llama.lm_head(x)  # [B, vocab_size]
        if step < min_new_tokens:
            logits[:, eos_id] = -torch.inf
        uniform = torch.rand(B if rng is None else 1, generator=rng).to(device)
        token = sample_token(logits, sampling, uniform).masked_fill(finished, eos_id)  # [B]
        with torch.inference_mode(False):  # not an inference tensor, so that training may use it
            answer = token.to("cpu", copy=True)
        if (answer < 0).any():
            raise not_finite(model, images)
        yield answer
        finished |= cache.lengths >= cache.max_length
        if stop_at_eos:
            finished |= token == eos_id
        if finished.all() or step + 1 == max_new_tokens:
            return
        x = llama(llama.embed_tokens(token)[:, None], None, cache)[:, 0]  # [B, n_embd]
        cache.lengths += ~finished  # the next token of a finished row overwrites this one
