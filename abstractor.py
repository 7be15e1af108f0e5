"""The visual abstractor: compresses an image to 65 visual tokens (section 3.1 of both papers).

Owl2's 1,024 patches per image would fill half of a context of 2,048 tokens. So 64 learnable queries read the patch
features in six layers of cross-attention, and their outputs are all that the decoder receives of the image. (The design
follows DeepMind's Perceiver and Flamingo's resampler.)

    patch features [N, 1 + P, C]      queries [1, n_query, C], learned, the same for each image
            |                             |
            |    +------------------------+
            v    v
      n_layer x  q  = norm_q(queries)                    [N, n_query, C]
                 kv = cat(q, norm_k(patch features))     [N, n_query + 1 + P, C]
                 y  = q + attention(q, kv)
                 queries = y + mlp(norm_mlp(y))
            |
            |  fc: project to the decoder's width
            |  append the learned end-of-image embedding
            v
    visual tokens [N, n_query + 1, n_out]

Two details are easy to get wrong; the released weights need them. The residual connection starts at
the normalized queries, not at the queries. And Owl2 adds fixed sine-cosine position embeddings to the
inputs of the query and key projections, but not to the input of the value projection.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class AbstractorConfig:
    """Shape of the abstractor. The defaults are Owl1's."""

    n_query: int = 64
    n_layer: int = 6
    n_head: int = 16
    n_embd: int = 1024  # also the vision encoder's width: queries and patch features are concatenated
    n_mlp: int = 2816
    n_out: int = 4096  # the decoder's width
    norm_eps: float = 1e-6
    dropout: float = 0.1  # on the attention probabilities, in training; 0 in Owl2
    grid_size: int = 0  # patches along an edge, for Owl2's position embeddings; 0: none (Owl1)


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Sine-cosine embeddings of positions [M]: [M, dim] float32, all sines, then all cosines. dim is even."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angle = positions.double()[:, None] * frequency  # [M, dim / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(grid_size: int, dim: int) -> Tensor:
    """Embeddings of the class token (zeros) and a grid of patches, row by row: [1 + grid_size ** 2, dim] float32.

    The first half of the channels encodes the column, the second half the row. dim is a multiple of 4.
    """
    index = torch.arange(grid_size**2, device="cpu")
    column = sincos_1d(index % grid_size, dim // 2)
    row = sincos_1d(index // grid_size, dim // 2)
    grid = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, dim, device="cpu"), grid])


class CrossAttention(nn.Module):
    """The queries attend to themselves and to the patch features."""

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
            # Buffers, since some released weights contain them; those values are then loaded. They are computed
            # on the CPU even if the model is on the meta device.
            self.register_buffer("q_pos", sincos_1d(torch.arange(config.n_query, device="cpu"), config.n_embd))
            self.register_buffer("k_pos", sincos_2d(config.grid_size, config.n_embd))

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """queries: [N, Q, C], image: [N, 1 + P, C], both normalized. Returns [N, Q, C]."""
        N, Q, C = queries.shape
        kv = torch.cat([queries, image], dim=1)  # [N, Q + 1 + P, C]
        q_in, k_in = queries, kv
        if self.has_positions:
            q_pos, k_pos = self.q_pos.to(kv.dtype), self.k_pos.to(kv.dtype)
            q_in = queries + q_pos
            k_in = kv + torch.cat([q_pos, k_pos])

        q = self._heads(self.q(q_in))  # [N, n_head, Q, C / n_head]
        k = self._heads(self.k(k_in))
        v = self._heads(self.v(kv))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(N, Q, C))

    def _heads(self, x: Tensor) -> Tensor:
        N, T, C = x.shape
        return x.view(N, T, self.n_head, C // self.n_head).transpose(1, 2)  # [N, n_head, T, C / n_head]


class MLP(nn.Module):
    """SwiGLU with a LayerNorm before the output projection."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.n_mlp)
        self.w2 = nn.Linear(config.n_mlp, config.n_embd)
        self.w3 = nn.Linear(config.n_embd, config.n_mlp)
        self.norm = nn.LayerNorm(config.n_mlp, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, Q, C]. Returns [N, Q, C]; the hidden width is n_mlp."""
        return self.w2(self.norm(F.silu(self.w1(x)) * self.w3(x)))


class Layer(nn.Module):
    """One layer of cross-attention and MLP."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        # These three use torch's default epsilon, 1e-5; only the norm inside the MLP uses config.norm_eps.
        self.norm_q = nn.LayerNorm(config.n_embd)
        self.norm_k = nn.LayerNorm(config.n_embd)
        self.attn = CrossAttention(config)
        self.norm_mlp = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """queries: [N, Q, C], image: [N, 1 + P, C]. Returns the updated queries [N, Q, C]."""
        q = self.norm_q(queries)  # [N, Q, C]; the residual starts here
        y = q + self.attn(q, self.norm_k(image))
        return y + self.mlp(self.norm_mlp(y))


class Abstractor(nn.Module):
    """Turns patch features into visual tokens."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.zeros(1, config.n_query, config.n_embd))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.fc = nn.Linear(config.n_embd, config.n_out)
        self.eos = nn.Parameter(torch.zeros(1, 1, config.n_out))  # end-of-image embedding (released name: vit_eos)

    def forward(self, image: Tensor) -> Tensor:
        """image: patch features [N, 1 + P, n_embd]. Returns visual tokens [N, n_query + 1, n_out]."""
        N = image.shape[0]
        x = self.queries.expand(N, -1, -1)  # [N, n_query, n_embd]
        for layer in self.layers:
            x = layer(x, image)
        x = self.fc(x)  # [N, n_query, n_out]
        return torch.cat([x, self.eos.expand(N, -1, -1)], dim=1)
