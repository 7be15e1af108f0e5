"""The visual abstractor: an image in 65 words (Owl1 section 3.1, Owl2 section 3.1).

A thousand patches would crowd the language model's context. So 64 learnable
queries look at the patches through cross-attention, six times over, and what
they have gathered is all that the language model will ever see of the image.
(The idea is DeepMind's Perceiver, by way of Flamingo's resampler.)

    image tokens [N, 1 + P, C]        queries [n_query, C], the same for each image
            |                             |
            |    +------------------------+
            v    v
      n_layer x  q  = norm_q(queries)                    [N, n_query, C]
                 kv = cat(q, norm_k(image tokens))       [N, n_query + 1 + P, C]
                 y  = q + attention(q, kv)
                 queries = y + mlp(norm_mlp(y))
            |
            |  fc: into the language model's width
            |  a learned end-of-image vector is appended
            v
    image words [N, n_query + 1, n_out]

Two things are easy to get wrong. The residual is taken from the normalised
queries, not from the queries. And Owl2 adds fixed sine-cosine positions to what
goes into the query and key projections, never to what goes into the values.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class AbstractorConfig:
    """The shape of the abstractor; the defaults are Owl1's."""

    n_query: int = 64
    n_layer: int = 6
    n_head: int = 16
    n_embd: int = 1024  # the vision tower's width as well: queries and image tokens stand in one sequence
    n_mlp: int = 2816
    n_out: int = 4096  # the language model's width
    norm_eps: float = 1e-6
    dropout: float = 0.1  # on the attention probabilities, in training; 0 in Owl2
    grid_size: int = 0  # patches along an edge, for Owl2's position codes; 0: no position codes (Owl1)


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Position codes of positions [M]: [M, dim] float32, all sines, then all cosines (not interleaved).

    dim is even.
    """
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angle = positions.double()[:, None] * frequency  # [M, dim / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(grid_size: int, dim: int) -> Tensor:
    """Position codes [1 + grid_size ** 2, dim] float32 of a class token and a grid of patches, row by row.

    The first half of the width says which column, the second half which row; the class token gets zeros.
    dim is a multiple of 4.
    """
    index = torch.arange(grid_size**2, device="cpu")
    column = sincos_1d(index % grid_size, dim // 2)
    row = sincos_1d(index // grid_size, dim // 2)
    grid = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, dim, device="cpu"), grid])


class CrossAttention(nn.Module):
    """The queries attend to themselves and to the image tokens."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.q = nn.Linear(config.n_embd, config.n_embd)
        self.k = nn.Linear(config.n_embd, config.n_embd)
        self.v = nn.Linear(config.n_embd, config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)
        self.has_positions = config.grid_size > 0
        if self.has_positions:
            # Buffers, since some released checkpoints hold them (and then theirs are used). They are computed
            # on the CPU even while weights.py makes the model without memory.
            self.register_buffer("q_pos", sincos_1d(torch.arange(config.n_query, device="cpu"), config.n_embd))
            self.register_buffer("k_pos", sincos_2d(config.grid_size, config.n_embd))

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """queries: [N, Q, C], image: [N, 1 + P, C], both normalised. Returns [N, Q, C]."""
        N, Q, C = queries.shape
        kv = torch.cat([queries, image], dim=1)  # [N, Q + 1 + P, C]
        q_in, k_in = queries, kv
        if self.has_positions:
            q_pos, k_pos = self.q_pos.to(kv.dtype), self.k_pos.to(kv.dtype)
            q_in = queries + q_pos
            k_in = kv + torch.cat([q_pos, k_pos])
        q = self._heads(self.q(q_in))
        k = self._heads(self.k(k_in))
        v = self._heads(self.v(kv))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(N, Q, C))

    def _heads(self, x: Tensor) -> Tensor:
        N, T, C = x.shape
        return x.view(N, T, self.n_head, C // self.n_head).transpose(1, 2)  # [N, n_head, T, C / n_head]


class MLP(nn.Module):
    """SwiGLU with a LayerNorm before the way out."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.n_mlp)
        self.w2 = nn.Linear(config.n_mlp, config.n_embd)
        self.w3 = nn.Linear(config.n_embd, config.n_mlp)
        self.norm = nn.LayerNorm(config.n_mlp, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, Q, C]. Returns [N, Q, C]; n_mlp wide in between."""
        return self.w2(self.norm(F.silu(self.w1(x)) * self.w3(x)))


class Layer(nn.Module):
    """One look at the image."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        # These three use torch's own epsilon (1e-5); only the norm inside the MLP follows the config.
        self.norm_q = nn.LayerNorm(config.n_embd)
        self.norm_k = nn.LayerNorm(config.n_embd)
        self.attn = CrossAttention(config)
        self.norm_mlp = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """queries: [N, Q, C], image: [N, 1 + P, C]. Returns the queries, wiser: [N, Q, C]."""
        q = self.norm_q(queries)
        y = q + self.attn(q, self.norm_k(image))
        return y + self.mlp(self.norm_mlp(y))


class Abstractor(nn.Module):
    """From image tokens to image words."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.zeros(1, config.n_query, config.n_embd))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.fc = nn.Linear(config.n_embd, config.n_out)
        self.eos = nn.Parameter(torch.zeros(1, 1, config.n_out))

    def forward(self, image: Tensor) -> Tensor:
        """image: [N, 1 + P, n_embd] from the vision tower. Returns [N, n_query + 1, n_out]."""
        N = image.shape[0]
        x = self.queries.expand(N, -1, -1)
        for layer in self.layers:
            x = layer(x, image)
        x = self.fc(x)  # [N, n_query, n_out]
        return torch.cat([x, self.eos.expand(N, -1, -1)], dim=1)
