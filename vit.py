"""CLIP's vision transformer, the vision encoder of Owl1 and Owl2 (section 3.1 of both papers).

The image is cut into patches, each patch becomes a vector, and in a stack of transformer blocks every patch attends to
every other. All outputs, including the class token's, go on to the visual abstractor.

    images [N, 3, H, W]
      | patch_embed: one Linear per patch, written as a strided convolution
    patches [N, P, C]              P = (H / patch_size) * (W / patch_size)
      | prepend a learned class token, add a learned position embedding
    x [N, 1 + P, C]
      | pre_norm (CLIP's own), then n_layer blocks: x += attention(norm1(x)); x += mlp(norm2(x))
      | post_norm
    patch features [N, 1 + P, C]

ViT-L/14 is 24 blocks of width 1024 with 16 heads and patches of 14 pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)  # of RGB pixels in 0..1
CLIP_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


@dataclass
class ViTConfig:
    """Shape of the vision encoder. The defaults are ViT-L/14 at 224 pixels, as in Owl1."""

    image_size: int = 224
    patch_size: int = 14
    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 1024
    n_mlp: int = 4096
    norm_eps: float = 1e-6

    @property
    def grid_size(self) -> int:
        """Patches along one edge of the image."""
        return self.image_size // self.patch_size

    @property
    def n_token(self) -> int:
        """Length of the output: the class token and the patches."""
        return 1 + self.grid_size**2


class Attention(nn.Module):
    """Self-attention without a mask: every token attends to all tokens of its image."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, T, C]. Returns [N, T, C]."""
        N, T, C = x.shape
        # The released weights order the fused output by head: q, k, v of head 0, then of head 1, ...
        qkv = self.qkv(x).view(N, T, self.n_head, 3, C // self.n_head)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [N, n_head, T, C / n_head]
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(N, T, C)
        return self.proj(y)


class MLP(nn.Module):
    """Two Linears with CLIP's activation between them, QuickGELU: x * sigmoid(1.702 x)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_mlp)
        self.fc2 = nn.Linear(config.n_mlp, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, T, C]. Returns [N, T, C]."""
        x = self.fc1(x)  # [N, T, n_mlp]
        x = x * torch.sigmoid(1.702 * x)
        return self.fc2(x)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, T, C]. Returns [N, T, C]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The vision encoder."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.n_embd, config.patch_size, stride=config.patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.n_embd))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.n_token, config.n_embd))
        self.pre_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.post_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images.

        images: [N, 3, image_size, image_size], normalized by CLIP_MEAN and CLIP_STD, of any float dtype.
        Returns [N, 1 + P, n_embd] in the weights' dtype. Raises ValueError for images of another size.
        """
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"this model takes images of shape [N, 3, {size}, {size}], not {list(images.shape)}")

        x = self.patch_embed(images.to(self.patch_embed.weight.dtype))  # [N, C, H/patch, W/patch]
        x = x.flatten(2).transpose(1, 2)  # [N, P, C]
        cls = self.cls_token.expand(x.shape[0], -1, -1)  # [N, 1, C]
        x = torch.cat([cls, x], dim=1)  # [N, 1 + P, C]
        x = self.pre_norm(x + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        return self.post_norm(x)
