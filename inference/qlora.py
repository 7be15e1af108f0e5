"""QLoRA: LoRA on a quantized model (arXiv 2305.14314), whose frozen weights need a quarter (4 bits) or half (8 bits) of the memory.

    x [.., n_in] --- W [n_out, n_in], 8 or 4 bits, dequantized for this product ---> + --> y [.., n_out]
        |                                                                            |
        +-- dropout -- lora_A -- lora_B, in full precision --- * alpha / rank -------+

W has no gradient, but x has one, for the adapters in the layers below:

    forward     y  = x W^T      W is dequantized for the product and not kept
    backward    dx = dy W       W is dequantized again

The formats are those of inference/quantize.py. Its kernels have no backward pass; here all products are dense.

    inject_lora --> quantize_base --> quantized_tensors (the weights) --> training --> dequantize_base --> merge_lora
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.quantize import LINEARS, QuantizedLinear, quantize_tensors
from lora import LoRALinear


class FrozenProduct(torch.autograd.Function):
    """x [.., n_in] times a quantized weight [n_out, n_in]. Returns [.., n_out] in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.linear.dequantize(dy.dtype), None


def frozen_product(x: Tensor, linear: QuantizedLinear) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # it does not see into FrozenProduct
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return FrozenProduct.apply(x, linear)


class FrozenLinear(nn.Linear):
    """A Linear without bias whose weight is quantized and frozen; `weight` is None."""

    def __init__(self, linear: nn.Linear, bits: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = self.bias = None
        self.quantized = LINEARS[bits](self.in_features, self.out_features, linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., n_in]. Returns [.., n_out]."""
        return frozen_product(x, self.quantized)


class QLoRALinear(LoRALinear):
    """A LoRALinear whose weight is quantized; `weight` is None."""

    def __init__(self, adapted: LoRALinear, bits: int):
        super().__init__(adapted, adapted.rank, adapted.alpha, adapted.dropout)
        self.weight = None
        self.quantized = LINEARS[bits](self.in_features, self.out_features, adapted.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., n_in]. Returns [.., n_out]."""
        y = frozen_product(x, self.quantized)
        x = F.dropout(x, self.dropout, self.training)
        return y + self.lora_B(self.lora_A(x)) * self.scale


def quantize_base(llama: nn.Module, bits: int) -> None:
    """Replaces each Linear of a decoder on the meta device, adapted or not, by a quantized one. lm_head gets 8 bits."""
    for name, module in list(llama.named_modules()):
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            replacement = QLoRALinear if isinstance(module, LoRALinear) else FrozenLinear
            llama.set_submodule(name, replacement(module, 8 if name == "lm_head" else bits))


def quantized_tensors(
    tensors: Iterable[tuple[str, Tensor]], model: nn.Module, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Turns a stream of (name, weight) into one for a model after quantize_base; quantizes on the device."""
    parents = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    names = {f"{name.removesuffix('.quantized')}.weight": f"{name}.weight" for name in parents}
    yield from quantize_tensors(((names.get(name, name), tensor) for name, tensor in tensors), model, device)


@torch.no_grad()
def dequantize_base(llama: nn.Module, dtype: torch.dtype) -> None:
    """Undoes quantize_base, except for the rounding: the decoder computes the same, with weights in dtype."""
    for name, module in list(llama.named_modules()):
        if isinstance(module, (FrozenLinear, QLoRALinear)):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.quantized.dequantize(dtype), requires_grad=False)
            if isinstance(module, QLoRALinear):
                linear = LoRALinear(linear, module.rank, module.alpha, module.dropout)
                linear.lora_A, linear.lora_B = module.lora_A, module.lora_B
            llama.set_submodule(name, linear)
