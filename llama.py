"""LLaMA, with Owl2's modality-adaptive module (Owl1 section 3.1; Owl2 section 3.2).

The decoder reads one sequence in which words and image words stand side by side:

    x [B, T, C]                      text embeddings, with image words written over their places
      | n_layer times:
      |   h = input_layernorm(x)             * one weight for text, one for images
      |   q = q_proj(h)                      shared
      |   k, v = k_proj(h), v_proj(h)        * one projection for text, one for images
      |   x = x + o_proj(causal attention(rope(q), rope(k), v))
      |   h = post_attention_layernorm(x)    * one weight for text, one for images
      |   x = x + down_proj(silu(gate_proj(h)) * up_proj(h))
      | norm
    x [B, T, C]  --lm_head-->  logits [B, T, vocab_size]

The lines marked * are the modality-adaptive module. In Owl1 they are plain: one
set of weights for everything. In Owl2 an image word keeps the features of its own
modality, while both still meet in one attention and one MLP. (Grouped-query heads:
k and v may have fewer heads than q, each then serves several.)

In training B is 1 and many sequences stand one after the other in the row, so that
nothing is padding; `Documents` says where each begins, and none attends to another.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LlamaConfig:
    """The shape of the decoder; the defaults are LLaMA-7B's."""

    vocab_size: int = 32000
    context: int = 2048  # the longest sequence, in tokens
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32
    n_embd: int = 4096
    n_mlp: int = 11008
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    adaptive: bool = False  # the modality-adaptive module: Owl2
    bos_id: int = 1
    eos_id: int = 2

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class Split(NamedTuple):
    """Which tokens are image words: found once, used by all layers. None stands for a pure text."""

    is_image: Tensor  # [B, T, 1] bool
    order: Tensor  # [B * T] int64: where the text tokens are, then where the image words are
    inverse: Tensor  # [B * T] int64: undoes `order`
    n_text: int

    @staticmethod
    def of(is_image: Tensor, n_image: int) -> "Split":
        """is_image: [B, T] bool with n_image ones. Knowing that number, the layers need not wait for a GPU to count."""
        order = torch.argsort(is_image.flatten().to(torch.uint8), stable=True)
        return Split(is_image[..., None], order, torch.argsort(order), is_image.numel() - n_image)


class Documents(NamedTuple):
    """Sequences that stand one after the other in one row, and know nothing of each other."""

    starts: Tensor  # [n + 1] int32: where each begins, and the row's length
    longest: int  # the longest one's length


class RMSNorm(nn.Module):
    """Scales each token to unit root mean square, then by a learned weight."""

    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class AdaptiveRMSNorm(nn.Module):
    """An RMSNorm with one weight for text, [0], and one for image words, [1]."""

    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.multiway = nn.ModuleList(RMSNorm(n_embd, eps) for _ in range(2))

    def forward(self, x: Tensor, split: Split | None) -> Tensor:
        """x: [B, T, C]. Returns [B, T, C]."""
        text, image = self.multiway
        if split is None:
            return text(x)
        x = F.rms_norm(x, text.weight.shape, eps=text.eps)
        return x * torch.where(split.is_image, image.weight, text.weight)


class AdaptiveLinear(nn.Module):
    """A Linear for text, [0], and a Linear for image words, [1]: each token passes through its own, once."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.multiway = nn.ModuleList(nn.Linear(n_in, n_out, bias=False) for _ in range(2))

    def forward(self, x: Tensor, split: Split | None) -> Tensor:
        """x: [B, T, n_in]. Returns [B, T, n_out]."""
        text, image = self.multiway
        if split is None:
            return text(x)
        B, T, C = x.shape
        # Gather each modality's tokens, project them apart, and put the results back in their places.
        # (index_select, since its gradient is a plain addition where that of tokens[order] is a slower one.)
        tokens = x.reshape(B * T, C).index_select(0, split.order)
        y = torch.cat([text(tokens[: split.n_text]), image(tokens[split.n_text :])])
        return y.index_select(0, split.inverse).view(B, T, -1)


class Cache:
    """The keys and values of all tokens read so far, so that the next token is all that need be computed.

    `layers[i]` is [2, B, n_kv_head, size, head_dim]: keys and values of layer i. Rows of a batch may be of
    different lengths: `lengths [B]` says where each row's next token goes. What lies beyond a row's length is
    left over from padding; it is masked, and overwritten as the row grows.
    """

    def __init__(self, config: LlamaConfig, B: int, size: int, device: torch.device, dtype: torch.dtype):
        self.size = size
        shape = (2, B, config.n_kv_head, size, config.head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.longest = 0  # the longest row's length, known without asking the device
        self.ragged = False  # whether the lengths of rows still growing differ

    def start(self, lengths: Tensor) -> None:
        """Says how long each row is, [B] int64, once the (padded) prompts have been read."""
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.ragged = int(lengths.min()) != self.longest

    def advance(self, ended: Tensor) -> None:
        """Moves on by the token just read. Rows that have ended, [B] bool, stay: the next overwrites it."""
        self.lengths = torch.where(ended, self.lengths, self.lengths + 1)
        self.longest = min(self.longest + 1, self.size - 1)


class View(NamedTuple):
    """How this pass's T tokens see the sequence: the same for all layers."""

    cos: Tensor  # [B or 1, 1, T, head_dim]: the rotary embedding of their positions
    sin: Tensor
    positions: Tensor  # [B or 1, T]: where in the cache they go
    n_visible: int  # keys in the cache that any of them may see
    mask: Tensor | None  # [B, 1, T, n_visible] bool; None where the rule is plain
    causal: bool  # a plain causal mask, left to the attention kernel
    documents: Documents | None  # a causal mask within each of these


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turns each pair (x[i], x[i + D/2]) by its position's angle. x: [B, H, T, D]."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def attend_within(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention of each document to itself. q: [1, n_head, T, D]; k, v: [1, n_kv_head, T, D]. Returns q's shape.

    On CUDA one kernel for all of them (bfloat16 or float16, torch from 2.11 on); elsewhere a loop, to the same result.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # here, since older releases of torch have no such thing

        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, n_head, D]
        starts, longest = documents
        y = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))  # all before, none after
        return y.transpose(0, 1)[None]
    parts = []
    for a, b in pairwise(documents.starts.tolist()):
        one = (x[:, :, a:b] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(parts, dim=2)


class Attention(nn.Module):
    """Causal self-attention, each token with itself and those before it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.adaptive:
            self.k_proj = AdaptiveLinear(config.n_embd, kv_width)
            self.v_proj = AdaptiveLinear(config.n_embd, kv_width)
        else:
            self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
            self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, view: View, split: Split | None, stored: Tensor | None) -> Tensor:
        """x: [B, T, C]. stored: this layer's part of the cache, if there is one. Returns [B, T, C]."""
        B, T, C = x.shape
        q = self.q_proj(x)
        if self.config.adaptive:
            k = self.k_proj(x, split)
            v = self.v_proj(x, split)
        else:
            k = self.k_proj(x)
            v = self.v_proj(x)
        q = q.view(B, T, -1, self.config.head_dim).transpose(1, 2)  # [B, n_head, T, head_dim]
        k = k.view(B, T, -1, self.config.head_dim).transpose(1, 2)  # [B, n_kv_head, T, head_dim]
        v = v.view(B, T, -1, self.config.head_dim).transpose(1, 2)
        q = rotate(q, view.cos, view.sin)
        k = rotate(k, view.cos, view.sin)
        if stored is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            # Two index arrays around a slice: what is written is [B, T, n_kv_head, head_dim].
            stored[0][rows, :, view.positions] = k.transpose(1, 2)
            stored[1][rows, :, view.positions] = v.transpose(1, 2)
            if not view.causal:  # else nothing came before, and k and v are all there is to see
                k, v = stored[:, :, :, : view.n_visible]
        if view.documents is not None:
            y = attend_within(q, k, v, view.documents)
        else:
            grouped = self.config.n_kv_head != self.config.n_head
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=view.mask, is_causal=view.causal, enable_gqa=grouped
            )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.down_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, C]. Returns [B, T, C]; n_mlp wide in between."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.adaptive = config.adaptive
        norm = AdaptiveRMSNorm if config.adaptive else RMSNorm
        self.input_layernorm = norm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, view: View, split: Split | None, stored: Tensor | None) -> Tensor:
        """x: [B, T, C]. Returns [B, T, C]."""
        x = x + self.self_attn(self._norm(self.input_layernorm, x, split), view, split, stored)
        x = x + self.mlp(self._norm(self.post_attention_layernorm, x, split))
        return x

    def _norm(self, norm: nn.Module, x: Tensor, split: Split | None) -> Tensor:
        return norm(x, split) if self.adaptive else norm(x)


class Llama(nn.Module):
    """The decoder. The names of its parts are those of the hub's LLaMA weights."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, x: Tensor, split: Split | None = None, cache: Cache | None = None, documents: Documents | None = None
    ) -> Tensor:
        """Runs the decoder over embedded tokens.

        x: [B, T, n_embd]. split: which of them are image words (None: none). With a cache the tokens continue
        each of its rows and are stored in it; the caller then says so with cache.start or cache.advance.
        With documents (B is 1 then, and there is no cache) the row is several sequences.
        Returns [B, T, n_embd], normalised for lm_head.
        """
        view = self._view(x, cache, documents)
        for i, layer in enumerate(self.layers):
            x = layer(x, view, split, None if cache is None else cache.layers[i])
        return self.norm(x)

    def _view(self, x: Tensor, cache: Cache | None, documents: Documents | None) -> View:
        T = x.shape[1]
        positions = torch.arange(T, device=x.device)[None]  # [1, T]
        if documents is not None:  # each counts from 0
            begins = documents.starts[:-1].repeat_interleave(documents.starts.diff(), output_size=T)
            positions = positions - begins
        mask = None
        causal = cache is None or cache.longest == 0
        n_visible = T
        if not causal:
            positions = cache.lengths[:, None] + positions  # [B, T]
            n_visible = cache.longest + T
            if T > 1 or cache.ragged:  # a single token at the end of the cache sees all of it
                keys = torch.arange(n_visible, device=x.device)
                mask = (keys <= positions[:, :, None])[:, None]  # [B, 1, T, n_visible]
        D = self.config.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
        angle = positions[..., None] * frequency  # [B or 1, T, D / 2]
        angle = torch.cat([angle, angle], dim=-1)[:, None]  # [B or 1, 1, T, D]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return View(cos, sin, positions, n_visible, mask, causal, documents)
