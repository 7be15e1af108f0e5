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

BUCKET = 256  # positions by which a cache grows


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

    modality: Tensor  # [B, T] int64: 0 for text, 1 for an image word
    order: Tensor  # [B * T] int64: where the text tokens are, then where the image words are
    inverse: Tensor  # [B * T] int64: undoes `order`
    n_text: int

    @staticmethod
    def of(is_image: Tensor, n_image: int) -> "Split":
        """is_image: [B, T] bool with n_image ones. Knowing that number, the layers need not wait for a GPU to count."""
        order = torch.argsort(is_image.flatten().to(torch.uint8), stable=True)
        return Split(is_image.long(), order, torch.argsort(order), is_image.numel() - n_image)

    def sort(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B * T, C]: all text tokens, then all image words."""
        # (index_select, since its gradient is a plain addition where that of x[order] is a slower one.)
        return x.flatten(0, 1).index_select(0, self.order)

    def unsort(self, tokens: Tensor) -> Tensor:
        """[B * T, C] to [B, T, C]: each token back in its place."""
        return tokens.index_select(0, self.inverse).view(*self.modality.shape, -1)


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
        return x * F.embedding(split.modality, torch.stack([text.weight, image.weight]))


class AdaptiveLinear(nn.Module):
    """A Linear for text, [0], and a Linear for image words, [1]: each token passes through its own, once."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.multiway = nn.ModuleList(nn.Linear(n_in, n_out, bias=False) for _ in range(2))

    def forward(self, x: Tensor, split: Split | None) -> Tensor:
        """x: [B * T, n_in] as split.sort makes it, or [B, T, n_in] where all is text. Returns [B, T, n_out]."""
        text, image = self.multiway
        if split is None:
            return text(x)
        return split.unsort(torch.cat([text(x[: split.n_text]), image(x[split.n_text :])]))


class Cache:
    """The keys and values of all tokens read so far, so that the next token is all that need be computed.

    `layers[i]` are the keys and the values of layer i, [B, n_kv_head, size, head_dim] each. Rows of a batch may
    be of different lengths: `lengths [B]` says how many tokens of each row are held, and so where its next one
    goes. What lies beyond a row's length is left over; it is masked, and overwritten as the row grows.
    """

    def __init__(self, config: LlamaConfig, B: int, device: torch.device, dtype: torch.dtype):
        nothing = torch.zeros(B, config.n_kv_head, 0, config.head_dim, device=device, dtype=dtype)
        self.layers = [(nothing, nothing)] * config.n_layer
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.longest = 0  # no row is longer: known without asking the device

    @property
    def size(self) -> int:
        return self.layers[0][0].shape[2]

    def grow(self, size: int) -> None:
        """Makes room for `size` positions a row: in whole buckets, so that sizes are few.

        And one more: rows that are over still write, and if they fill the context it is there, where nobody looks.
        """
        more = -(-size // BUCKET) * BUCKET + 1 - self.size
        if more > 0:
            for i, layer in enumerate(self.layers):  # one by one: never all of them twice
                self.layers[i] = tuple(F.pad(x, (0, 0, 0, more)) for x in layer)

    def rewind(self, length: int) -> None:
        """Forgets of each row all but its first `length` tokens. ValueError for fewer than none."""
        if length < 0:
            raise ValueError(f"a cache is rewound to 0 tokens or more, not {length}")
        self.lengths.clamp_(max=length)
        self.longest = min(self.longest, length)

    def keep(self, rows: Tensor) -> None:
        """Forgets all rows but these, [n] int64."""
        for i, layer in enumerate(self.layers):
            self.layers[i] = tuple(x[rows] for x in layer)
        self.lengths = self.lengths[rows]


class View(NamedTuple):
    """How this pass's T tokens see the sequence: the same for all layers.

    With a mask they look at the cache; with documents, each at those before it in its own; with neither, each at all
    before it.
    """

    cos: Tensor  # [B or 1, 1, T, head_dim]: the rotary embedding of their positions
    sin: Tensor  # its first half negative
    rows: Tensor  # [B, 1]: where in the cache they go: these rows,
    positions: Tensor  # [B or 1, T]: and these positions
    mask: Tensor | None  # [B, 1, T, n_visible]: 0 for what they see, -inf for what not
    documents: Documents | None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turns each pair (x[i], x[i + D/2]) by its position's angle. x: [B, H, T, D]."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # the halves (a, b) as (b, a); that it must be (-b, a) is in sin
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


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


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query a row, written out: a compiler makes less work of it than a kernel for many queries does.

    q: [B, n_head, 1, D]; k, v: [B, n_kv_head, T, D]; mask: [B, 1, 1, T]. Returns q's shape.
    """
    B, n_kv_head, T, D = k.shape
    q = q.view(B, n_kv_head, -1, 1, D) * D**-0.5  # [B, n_kv_head, queries of a key, 1, D]
    scores = (q * k[:, :, None]).float().sum(dim=-1) + mask  # [B, n_kv_head, queries of a key, T]
    p = scores.softmax(dim=-1).to(v.dtype)
    return (p[..., None] * v[:, :, None]).sum(dim=-2).view(B, -1, 1, D)


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

    def forward(self, x: Tensor, view: View, split: Split | None, stored: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: [B, T, C]. stored: this layer's part of the cache, if there is one. Returns [B, T, C]."""
        B, T, C = x.shape
        q = self.q_proj(x)
        if self.config.adaptive:
            tokens = x if split is None else split.sort(x)
            k = self.k_proj(tokens, split)
            v = self.v_proj(tokens, split)
        else:
            k = self.k_proj(x)
            v = self.v_proj(x)
        q = q.view(B, T, -1, self.config.head_dim).transpose(1, 2)  # [B, n_head, T, head_dim]
        k = k.view(B, T, -1, self.config.head_dim).transpose(1, 2)  # [B, n_kv_head, T, head_dim]
        v = v.view(B, T, -1, self.config.head_dim).transpose(1, 2)
        q = rotate(q, view.cos, view.sin)
        k = rotate(k, view.cos, view.sin)
        if stored is not None:
            # Two index arrays around a slice: what is written is [B, T, n_kv_head, head_dim].
            stored[0][view.rows, :, view.positions] = k.transpose(1, 2)
            stored[1][view.rows, :, view.positions] = v.transpose(1, 2)
            if view.mask is not None:  # else nothing came before, and k and v are all there is to see
                k, v = (x[:, :, : view.mask.shape[-1]] for x in stored)
        if view.documents is not None:
            y = attend_within(q, k, v, view.documents)
        elif T == 1 and view.mask is not None and q.is_cuda and torch.compiler.is_compiling():
            y = attend_once(q, k, v, view.mask)
        else:
            grouped = self.config.n_kv_head != self.config.n_head
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=view.mask, is_causal=view.mask is None, enable_gqa=grouped
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

    def forward(self, x: Tensor, view: View, split: Split | None, stored: tuple[Tensor, Tensor] | None) -> Tensor:
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
        # Made of zeros: drawing numbers for a model without memory (on the meta device) would import torch's compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.n_embd), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self,
        x: Tensor,
        split: Split | None = None,
        cache: Cache | None = None,
        n_visible: int | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Runs the decoder over embedded tokens.

        x: [B, T, n_embd]. split: which of them are image words (None: none). With a cache the tokens continue
        each of its rows and are stored in it, which the caller then adds to cache.lengths. n_visible: how many
        of its positions may be looked at, those of these tokens included (None: there is none or it is empty, and
        they see only each other). With documents (B is 1 then, and there is no cache) the row is several sequences.
        Returns [B, T, n_embd], normalised for lm_head.
        """
        view = self._view(x, cache, n_visible, documents)
        for i, layer in enumerate(self.layers):
            x = layer(x, view, split, None if cache is None else cache.layers[i])
        return self.norm(x)

    def _view(self, x: Tensor, cache: Cache | None, n_visible: int | None, documents: Documents | None) -> View:
        B, T = x.shape[:2]
        positions = torch.arange(T, device=x.device)[None]  # [1, T]
        if documents is not None:  # each counts from 0
            begins = documents.starts[:-1].repeat_interleave(documents.starts.diff(), output_size=T)
            positions = positions - begins
        mask = None
        if n_visible is not None:
            positions = cache.lengths[:, None] + positions  # [B, T]
            hidden = torch.arange(n_visible, device=x.device) > positions[:, :, None]  # [B, T, n_visible]
            mask = torch.zeros(hidden.shape, device=x.device, dtype=x.dtype).masked_fill(hidden, -torch.inf)[:, None]
        D = self.config.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
        angle = (positions[..., None] * frequency)[:, None]  # [B or 1, 1, T, D / 2]
        cos = torch.cat([angle.cos(), angle.cos()], dim=-1).to(x.dtype)  # [B or 1, 1, T, D]
        sin = torch.cat([-angle.sin(), angle.sin()], dim=-1).to(x.dtype)
        rows = torch.arange(B, device=x.device)[:, None]
        return View(cos, sin, rows, positions, mask, documents)
