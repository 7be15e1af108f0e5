"""The product of a few rows and an 8-bit weight on CUDA, as a Triton kernel: it reads each weight once, as one byte.

    x       [M, K] bfloat16 ------------------------------------+
    weight  [N, K] int8 --tiles of N_TILE x K_TILE--> bfloat16 --+--> sums [M, N_TILE] float32 --scale--> y [M, N]

Each program computes N_TILE outputs of all rows. The number of rows is padded to M_TILE, the 16 rows that a tensor core
multiplies at a time, or more: with few rows the time is spent on reading weights. F.linear on a converted weight, its
slow counterpart (Int8Linear.matmul), reads one byte per weight, writes two and reads two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64  # from here on the product takes longer than reading the weight
N_TILE = 32


@triton.jit
def multiply_tile(
    x, weight, scale, y, M, N, K, M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, M_TILE)[:, None]
    output = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)[None, :]
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(0, K, K_TILE):
        k = start + tl.arange(0, K_TILE)
        x_tile = tl.load(x + row * K + k[None, :], mask=(row < M) & (k[None, :] < K), other=0.0)
        w_tile = tl.load(weight + output * K + k[:, None], mask=(output < N) & (k[:, None] < K), other=0)
        sums = tl.dot(x_tile, w_tile.to(x_tile.dtype), sums)
    sums *= tl.load(scale + output, mask=output < N, other=0.0).to(tl.float32)
    tl.store(y + row * N + output, sums.to(y.dtype.element_ty), mask=(row < M) & (output < N))


def multiply_few_rows(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x: [M, K] bfloat16, 1 <= M <= MAX_ROWS; weight: [N, K] int8; scale: [N] bfloat16. Returns [M, N] bfloat16."""
    x = x.contiguous()
    (M, K), N = x.shape, len(weight)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    M_TILE, K_TILE = (16, 256) if M <= 16 else (MAX_ROWS, 128)  # the fastest of those tried on an H100
    grid = (triton.cdiv(N, N_TILE),)
    multiply_tile[grid](x, weight, scale, y, M, N, K, M_TILE, N_TILE, K_TILE, num_warps=4, num_stages=4)
    return y
