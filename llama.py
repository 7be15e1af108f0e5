"""LLaMA decoder with Owl2's modality-adaptive module (Owl1 section 3.1; Owl2 section 3.2).

Text tokens and visual tokens form one sequence:

    x [B, T, C]                      text embeddings, with visual tokens scattered into the placeholder positions
      | n_layer times:
      |   h = input_layernorm(x)             * one weight for text, one for visual tokens
      |   q = q_proj(h)                      shared
      |   k, v = k_proj(h), v_proj(h)        * one projection for text, one for visual tokens
      |   x = x + o_proj(causal attention(rope(q), rope(k), v))
      |   h = post_attention_layernorm(x)    * one weight for text, one for visual tokens
      |   x = x + down_proj(silu(gate_proj(h)) * up_proj(h))
      | norm
    x [B, T, C]  --lm_head-->  logits [B, T, vocab_size]

The lines marked * are the modality-adaptive module. Owl1 has one set of weights in these places.
In Owl2 each modality keeps its own features, while all tokens share one attention and one MLP.
All n_query + 1 positions of an image take the visual branch, also the end-of-image embedding, as in the released code.
Grouped-query attention: k and v may have fewer heads than q; each of their heads then serves several of q's.

Training packs several sequences into one row (B = 1) instead of padding them. `PackedSequences` holds
their boundaries: positions restart at 0 in each sequence, and attention does not cross a boundary.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LlamaConfig:
    """Shape of the decoder. The defaults are LLaMA-7B's."""

    vocab_size: int = 32000
    context: int = 2048  # maximum sequence length in tokens
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32
    n_embd: int = 4096
    n_mlp: int = 11008
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    adaptive: bool = False  # the modality-adaptive module (Owl2)
    tied: bool = False  # tied embeddings: lm_head uses the weight of embed_tokens
    bos_id: int = 1
    eos_id: int = 2

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class Modality(NamedTuple):
    """Which tokens are visual, computed once per forward pass. None instead of a Modality means text only.

    Tokens are sorted by modality, so that each branch of an AdaptiveLinear reads one contiguous slice.
    """

    index: Tensor  # [B, T] int64: 0 for text, 1 for visual tokens
    order: Tensor  # [B * T] int64: positions of the text tokens, then those of the visual tokens
    inverse: Tensor  # [B * T] int64: the inverse permutation
    n_text: int

    @staticmethod
    def from_mask(is_image: Tensor, n_visual: int) -> "Modality":
        """is_image: [B, T] bool with n_visual ones. The caller passes the count, which avoids a synchronization."""
        order = torch.argsort(is_image.flatten().to(torch.uint8), stable=True)
        return Modality(is_image.long(), order, torch.argsort(order), is_image.numel() - n_visual)

    def permute(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B * T, C], all text tokens first."""
        # index_select, since its backward pass is faster than that of x[order].
        return x.flatten(0, 1).index_select(0, self.order)

    def unpermute(self, tokens: Tensor) -> Tensor:
        """[B * T, C] to [B, T, C], every token back at its position."""
        return tokens.index_select(0, self.inverse).view(*self.index.shape, -1)


class PackedSequences(NamedTuple):
    """Sequences packed into one row: boundaries as varlen attention kernels take them, and what Owl.forward reads."""

    cu_seqlens: Tensor  # [n + 1] int32: start of each sequence, then the length of the row
    max_seqlen: int  # length of the longest sequence
    n_placeholder: int  # image placeholders in the row
    supervised: Tensor  # [M] int64: positions whose next token is supervised


class RMSNorm(nn.Module):
    """Scales each token to unit root mean square, then multiplies by a learned weight."""

    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x: Tensor, modality: Modality | None = None) -> Tensor:
        """x: [.., C]. Returns x's shape. The modality is ignored: there is one weight for all tokens."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm with one weight for text, multiway[0], and one for visual tokens, multiway[1] (the released names)."""

    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.multiway = nn.ModuleList(RMSNorm(n_embd, eps) for _ in range(2))

    def forward(self, x: Tensor, modality: Modality | None) -> Tensor:
        """x: [B, T, C]. Returns [B, T, C]."""
        text, image = self.multiway
        if modality is None:
            return text(x)
        # The norms differ in their weight only: normalize all tokens at once, without a permutation, then look it up.
        x = F.rms_norm(x, text.weight.shape, eps=text.eps)
        return x * F.embedding(modality.index, torch.stack([text.weight, image.weight]))


class AdaptiveLinear(nn.Module):
    """One Linear for text, multiway[0], and one for visual tokens, multiway[1]."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.multiway = nn.ModuleList(nn.Linear(n_in, n_out, bias=False) for _ in range(2))

    def forward(self, x: Tensor, modality: Modality | None) -> Tensor:
        """Takes one of two layouts and returns [B, T, n_out].

        x: [B, T, n_in] if modality is None (text only), else [B * T, n_in] as returned by modality.permute.
        The caller permutes, since k_proj and v_proj read the same tokens.
        """
        text, image = self.multiway
        if modality is None:
            return text(x)
        return modality.unpermute(torch.cat([text(x[: modality.n_text]), image(x[modality.n_text :])]))


class KVCache:
    """Keys and values of the tokens processed so far.

    k, v: [n_layer, B, n_kv_head, max_length + 1, head_dim]. Rows may differ in length: `lengths` [B] counts the
    valid positions of each row. The next token of a row goes to position lengths[row], and the mask hides what lies
    beyond, such as padding. The one spare position takes writes past the end, of full rows and of padding.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length + 1, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.attend_len: int | None = None  # fixed number of positions to attend to (inference/fast_decode.py)

    @property
    def max_length(self) -> int:
        return self.k.shape[3] - 1

    def truncate(self, length: int) -> None:
        """Keeps only the first `length` tokens of every row."""
        self.lengths.clamp_(max=length)


class AttentionContext(NamedTuple):
    """What the layers need to know about the T new tokens.

    With a mask the tokens attend to the cache; with packed sequences each attends within its own sequence;
    with neither, plain causal attention.
    """

    modality: Modality | None
    cos: Tensor  # [B or 1, 1, T, head_dim]: rotary embedding of the tokens' positions
    sin: Tensor  # like cos; the first half is negated, see apply_rope
    rows: Tensor  # [B, 1]: the new keys and values are written to cache[rows, :, positions]
    positions: Tensor  # [B or 1, T]
    mask: Tensor | None  # [B, 1, T, attend_len]: 0 for visible positions, -inf for hidden ones
    packed: PackedSequences | None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: rotates each pair (x[i], x[i + D/2]) by the angle of its position. x: [B, H, T, D]."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # halves (a, b) become (b, a); the sign of (-b, a) is part of sin
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
    """Causal attention within each packed sequence. q: [1, n_head, T, D]; k, v: [1, n_kv_head, T, D]. Returns like q.

    On CUDA in bfloat16 or float16: one varlen kernel for all sequences. Elsewhere: a loop with the same result,
    which synchronizes with the device to read the boundaries.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # needs torch 2.11 or newer

        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, n_head, D]
        cu, longest = packed.cu_seqlens, packed.max_seqlen
        y = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))  # causal: any distance back, none ahead
        return y.transpose(0, 1)[None]
    lengths = packed.cu_seqlens.diff().tolist()
    parts = []
    for one in zip(*(x.split(lengths, dim=2) for x in (q, k, v))):
        parts.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(parts, dim=2)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, in Owl2, one K and V projection per modality."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        kv_width = config.n_kv_head * config.head_dim
        linear = AdaptiveLinear if config.adaptive else partial(nn.Linear, bias=False)
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = linear(config.n_embd, kv_width)
        self.v_proj = linear(config.n_embd, kv_width)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, context: AttentionContext, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: [B, T, C]. cache: this layer's keys and values, each [B, n_kv_head, positions, D]. Returns [B, T, C]."""
        B, T, C = x.shape
        D = self.config.head_dim

        # Project. Queries share one weight; keys and values use the weight of their modality.
        q = self.q_proj(x)
        if self.config.adaptive:
            tokens = x if context.modality is None else context.modality.permute(x)
            k = self.k_proj(tokens, context.modality)
            v = self.v_proj(tokens, context.modality)
        else:
            k = self.k_proj(x)
            v = self.v_proj(x)

        # Split into heads and rotate by position.
        q = q.view(B, T, -1, D).transpose(1, 2)  # [B, n_head, T, D]
        k = k.view(B, T, -1, D).transpose(1, 2)  # [B, n_kv_head, T, D]
        v = v.view(B, T, -1, D).transpose(1, 2)
        q = apply_rope(q, context.cos, context.sin)
        k = apply_rope(k, context.cos, context.sin)

        # Store the new keys and values. With a mask (the cache was not empty), attend to all stored ones.
        if cache is not None:
            for stored, new in zip(cache, (k, v)):
                stored[context.rows, :, context.positions] = new.transpose(1, 2)  # [B, T, n_kv_head, D]
            if context.mask is not None:
                k, v = (stored[:, :, : context.mask.shape[-1]] for stored in cache)

        if context.packed is not None:
            y = packed_attention(q, k, v, context.packed)
        else:
            is_grouped = self.config.n_kv_head != self.config.n_head
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=context.mask, is_causal=context.mask is None, enable_gqa=is_grouped
            )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU feed-forward network, shared by both modalities."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.down_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, C]. Returns [B, T, C]; the hidden width is n_mlp."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        norm = AdaptiveRMSNorm if config.adaptive else RMSNorm
        self.input_layernorm = norm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: AttentionContext, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: [B, T, C]. cache: as in Attention. Returns [B, T, C]."""
        x = x + self.self_attn(self.input_layernorm(x, context.modality), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x, context.modality))


class TiedHead(nn.Module):
    """lm_head of a model with tied embeddings: [.., n_embd] to [.., vocab_size], with the weight of embed_tokens."""

    def __init__(self, embed_tokens: nn.Embedding):
        super().__init__()
        self.owner = [embed_tokens]  # in a list, which hides it from parameters() and state_dict()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.owner[0].weight)


class Llama(nn.Module):
    """The decoder. Its submodules have the names of Hugging Face's LLaMA weights."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # Zeros until weights are loaded or initialized. (Random numbers on the meta device import torch's compiler.)
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.n_embd), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        head = partial(nn.Linear, config.n_embd, config.vocab_size, bias=False)
        self.lm_head = TiedHead(self.embed_tokens) if config.tied else head()

    def forward(
        self,
        x: Tensor,
        modality: Modality | None = None,
        cache: KVCache | None = None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """Runs the decoder over embedded tokens.

        x: [B, T, n_embd]. modality: which tokens are visual (None: none). cache: the tokens continue its rows and are
        stored in it; the caller then advances cache.lengths. packed: boundaries within a row (B = 1, no cache).
        Returns the normalized hidden states [B, T, n_embd], the input of lm_head.
        """
        context = self.attention_context(x, modality, cache, packed)
        for i, layer in enumerate(self.layers):
            x = layer(x, context, None if cache is None else (cache.k[i], cache.v[i]))
        return self.norm(x)

    @torch.inference_mode(False)  # so that the cache can be truncated outside of inference mode
    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Returns an empty cache on the decoder's device and in its dtype."""
        weight = self.embed_tokens.weight
        return KVCache(self.config, batch_size, max_length, weight.device, weight.dtype)

    def attention_context(
        self, x: Tensor, modality: Modality | None, cache: KVCache | None, packed: PackedSequences | None
    ) -> AttentionContext:
        """Computes positions, rotary embedding and mask of the tokens x [B, T, n_embd], once for all layers."""
        B, T = x.shape[:2]
        rows = torch.arange(B, device=x.device)[:, None]  # [B, 1]
        positions = torch.arange(T, device=x.device)[None]  # [1, T]
        if packed is not None:  # positions restart in each sequence
            lengths = packed.cu_seqlens.diff()
            positions = positions - packed.cu_seqlens[:-1].repeat_interleave(lengths, output_size=T)

        # Tokens that continue a cache see all earlier positions of their row. An empty cache needs no mask.
        mask = None
        if cache is not None:
            attend_len = cache.attend_len
            if attend_len is None:
                cached = int(cache.lengths.max())  # synchronizes with the device
                attend_len = min(cached + T, cache.max_length + 1) if cached > 0 else None
            if attend_len is not None:
                positions = cache.lengths[:, None] + positions  # [B, T]
                hidden = torch.arange(attend_len, device=x.device) > positions[:, None, :, None]
                mask = x.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)  # [B, 1, T, attend_len]
            positions = positions.clamp(max=cache.max_length)  # padding past the end goes to the spare position

        # Rotary embedding: D / 2 frequencies, each for a pair of channels.
        D = self.config.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
        angle = (positions[..., None] * frequency)[:, None]  # [B or 1, 1, T, D / 2]
        cos = torch.cat([angle.cos(), angle.cos()], dim=-1).to(x.dtype)  # [B or 1, 1, T, D]
        sin = torch.cat([-angle.sin(), angle.sin()], dim=-1).to(x.dtype)
        return AttentionContext(modality, cos, sin, rows, positions, mask, packed)
