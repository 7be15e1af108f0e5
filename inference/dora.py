"""DoRA: a low-rank update of the direction of each row of a weight, and a learned length (arXiv 2402.09353).

    V  = W + lora_B lora_A alpha / rank      [n_out, n_in], as in LoRA
    W' = m * V / |V|                         |V| [n_out]: lengths of V's rows; m [n_out]: learned lengths
    y  = W' x + b

inference/adapter.py loads DoRA adapters that PEFT trained. Training here has LoRA only.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lora import LoRALinear


class DoRALinear(LoRALinear):
    """A frozen Linear with a DoRA adapter, for inference: there is no dropout. The parameter has PEFT's name."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(linear, rank, alpha, dropout)
        self.lora_magnitude_vector = nn.Parameter(self.weight.detach().norm(dim=1))  # m: changes nothing

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., n_in]. Returns [.., n_out]."""
        weight = self.weight if self.merged else self.merged_weight().to(self.weight.dtype)
        return F.linear(x, weight, self.bias)

    def merged_weight(self) -> Tensor:
        """W', [n_out, n_in] float32."""
        v = super().merged_weight()
        return v * (self.lora_magnitude_vector.float() / v.norm(dim=1))[:, None]
