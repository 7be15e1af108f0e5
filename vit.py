"""CLIP's vision transformer: the eye of both owls (Owl1 section 3.1, Owl2 section 3.1).

The image is cut into patches, each patch becomes a vector, and a stack of
transformer blocks lets every patch look at every other. All tokens that come
out, the class token included, go on to the visual abstractor.

    image [N, 3, H, W]
      | patch_embed: one Linear per patch, written as a strided convolution
    patches [N, P, C]              P = (H / patch_size) * (W / patch_size)
      | a learned class token in front, a learned position added to each
    tokens [N, 1 + P, C]
      | pre_norm, then n_layer blocks: x += attention(norm1(x)); x += mlp(norm2(x))
      | post_norm
    tokens [N, 1 + P, C]

ViT-L/14 is 24 blocks of width 1024 with 16 heads and patches of 14 pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ViTConfig:
    """The shape of the vision tower; the defaults are ViT-L/14 at 224 pixels, as in Owl1."""

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
        """Tokens that leave the tower: the class token and the patches."""
        return 1 + self.grid_size**2


class Attention(nn.Module):
    """Every token attends to every token of its own image."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, T, C]. Returns [N, T, C]."""
        N, T, C = x.shape
        # The released weights lay the fused output out head by head: q, k, v of head 0, then of head 1, ...
        qkv = self.qkv(x).view(N, T, self.n_head, 3, C // self.n_head)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [N, n_head, T, C / n_head]
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(N, T, C)
        return self.proj(y)


class MLP(nn.Module):
    """Two Linears with CLIP's QuickGELU, x * sigmoid(1.702 x), in between."""

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
    """A pre-norm transformer block."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, T, C]. Returns [N, T, C]."""
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ViT(nn.Module):
    """The vision tower."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(
            3, config.n_embd, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.n_embd))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.n_token, config.n_embd))
        self.pre_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.post_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images.

        images: [N, 3, image_size, image_size], normalised as CLIP wants them, of any float dtype.
        Returns [N, 1 + P, n_embd] in the weights' dtype.
        Raises ValueError for any other size: the position table would not fit.
        """
        self.check_size(images)
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype))  # [N, C, H/patch, W/patch]
        x = x.flatten(2).transpose(1, 2)  # [N, P, C]
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1)  # [N, 1 + P, C]
        x = self.pre_norm(x + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        return self.post_norm(x)


    def check_size(self, images: Tensor) -> None:
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"this model takes images of shape [N, 3, {size}, {size}], not {list(images.shape)}")


def resize_positions(table: Tensor, n_token: int) -> Tensor:
    """Stretches a table of learned positions to another square grid of patches.

    Owl2's stage 1 sees 224 pixels (16 x 16 patches), its stage 2 448 (32 x 32).
    The class token's row is kept; the grid is interpolated (bicubic, in float32).

    table: [1, 1 + P, C]. Returns [1, n_token, C] in the table's dtype.
    """
    if table.shape[1] == n_token:
        return table
    cls, grid = table[:, :1], table[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    new = round((n_token - 1) ** 0.5)
    image = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, C, old, old]
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    grid = image.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(table.dtype)
    return torch.cat([cls, grid], dim=1)
