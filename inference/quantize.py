"""Quantization of the decoder's weights to 8 or 4 bits: less memory, and fewer bytes to read for each token.

Only weights are quantized. A Linear's input and output stay bfloat16 or float32; its weight is an integer q and a
scale (with 4 bits also a zero point) that neighbors share:

    int8   weight = q * scale                      q in -127..127, one scale per output
    int4   weight = (q - 8) * scale + zero point   q in 0..15, scale and zero point per output and 64 inputs

The rounding error is at most half a scale. Scales and zero points are bfloat16, as the kernels need them; q is
computed after they are rounded. At 4 bits lm_head still gets 8: it is 2 % of the weights, and no later layer can
compensate its errors. Tied embeddings are not quantized.

    x [.., n_in] -- few rows: kernel that reads quantized weights ----------------------------+--> y [.., n_out]
          |                                                                                   |
          +-------- many rows: dequantize the weights of CHUNK outputs at a time, F.linear ---+

With few rows, as in a decode step, the time is spent on reading weights, and the kernel reads fewer bytes. With many
rows, as in prefill, it is spent on multiplications, where dense matrix products are faster. On CUDA the 4-bit kernel is
used for all rows; the 8-bit kernel is int8_cuda.py.

load_quantized quantizes while it loads. save_quantized writes a model folder that has "quantization" in config.json
and NAME.weight and NAME.scale for each quantized Linear; tools/quantize.py is its command.
"""

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import read_json
from lora import LoRALinear
from model import Owl
from weights import assign_tensors, hf_tensors, load_model, read_config, save_model

HAS_TRITON = find_spec("triton") is not None  # torch installs it where it supports CUDA, except on Windows
if HAS_TRITON:
    from inference import int8_cuda

BITS = {"int8": 8, "int4": 4}
GROUP = 64  # inputs that share an int4 scale and zero point; n_in is padded with zeros to a multiple
BLOCK = 64  # outputs that are stored together in int4; n_out is padded to a multiple
CHUNK = 256  # outputs that are quantized or dequantized at a time (a few MB, which fit a CPU cache)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n_out, K] float32 to quantized values [n_out, K] int8 and scales [n_out] bfloat16."""
    scale = (weight.abs().amax(dim=1) / 127).bfloat16()
    scale[scale == 0] = 1
    q = (weight / scale.float()[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n_out, K] float32, n_out and K multiples of BLOCK and GROUP, to quantized values and scales.

    Values: [n_out / BLOCK, K, BLOCK / 2] uint8, two per byte: the low half belongs to the first 32 outputs of a block,
    the high half to the last 32, as the AVX-512 kernel reads them.
    Scales: [K / GROUP, n_out, 2] bfloat16, scale and zero point.
    """
    n_out, K = weight.shape
    groups = weight.view(n_out, K // GROUP, GROUP)
    # The range includes 0, so the zero point is at most 8 scales from 0, and rounding it to bfloat16 shifts it little.
    low = groups.amin(dim=2).clamp(max=0)
    scale = ((groups.amax(dim=2).clamp(min=0) - low) / 15).bfloat16()
    scale[scale == 0] = 1
    zero = (low + 8 * scale.float()).bfloat16()
    q = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    low_half, high_half = q.to(torch.uint8).view(-1, 2, BLOCK // 2, K).transpose(2, 3).unbind(1)
    return (low_half | high_half << 4).contiguous(), torch.stack([scale.t(), zero.t()], dim=2)


def dequantize_int4(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The result of quantize_int4 to weights in dtype, [n_out / BLOCK, K, BLOCK]."""
    n_block, K, _ = q.shape
    q = torch.cat([q & 15, q >> 4], dim=2).view(torch.int8) - 8
    scales = scales.to(dtype).view(K // GROUP, n_block, BLOCK, 2).permute(3, 1, 0, 2).contiguous()
    scale, zero = scales[:, :, :, None]  # [n_block, K / GROUP, 1, BLOCK]
    weight = q.to(dtype).view(n_block, K // GROUP, GROUP, BLOCK)
    return weight.mul_(scale).add_(zero).view(n_block, K, BLOCK)


def cpu_kernel_reads_blocks() -> bool:
    """Tests whether this CPU's int4 kernel takes the layout of quantize_int4; each kind of CPU has its own."""
    q = torch.arange(BLOCK * GROUP, device="cpu").view(BLOCK, GROUP) * 7 // 5 % 16  # all rows and columns differ
    expected = (q[: BLOCK // 2] | q[BLOCK // 2 :] << 4).t().to(torch.uint8)
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(q.int(), 2)
    except (AttributeError, RuntimeError):  # torch can be built without it
        return False
    return torch.equal(packed.flatten(), expected.flatten())


CPU_HAS_INT4 = cpu_kernel_reads_blocks()


class QuantizedLinear(nn.Module):
    """A Linear without bias whose weight is quantized: what Int8Linear and Int4Linear share.

    The buffers `weight` and `scale` are what is saved; they are uninitialized until set_weight or a state dict fills
    them. The subclasses have dequantize(dtype), which returns the weight [n_out, n_in], and matmul(x), which multiplies
    x [M, K], padded to whole groups, and returns [M, n_out or more].
    """

    def __init__(self, in_features: int, out_features: int, weight: Tensor, scale: Tensor):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantizes a weight [n_out, n_in] on its device. Returns the buffers by name."""
        values, scales = [], []
        for chunk in weight.detach().split(CHUNK):  # the largest weights are gigabytes in float32
            padding = (0, -self.in_features % GROUP, 0, -len(chunk) % self.block)
            q, scale = self.quantize_chunk(F.pad(chunk.float(), padding))
            values.append(q)
            scales.append(scale)
        scale = torch.cat(scales, dim=self.scale_dim)
        if not scale.isfinite().all():
            raise ValueError("a weight with infinite or NaN numbers cannot be quantized")
        return {"weight": torch.cat(values), "scale": scale}

    def set_weight(self, weight: Tensor) -> None:
        """Quantizes a weight [n_out, n_in] into this Linear, on the weight's device."""
        for name, tensor in self.quantize_weight(weight).items():
            setattr(self, name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., n_in]. Returns [.., n_out] in x's dtype; 4 bits on CUDA compute in bfloat16."""
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        rows = F.pad(x.reshape(-1, self.in_features), (0, -self.in_features % GROUP))
        y = self.matmul(rows)[:, : self.out_features]
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """weight: [n_out, K] int8, scale: [n_out] bfloat16."""

    bits, block, scale_dim = 8, 1, 0
    quantize_chunk = staticmethod(quantize_int8)
    # The most rows for which the CPU kernel is faster than dense products, measured at 4096 x 4096 with AVX-512 and
    # AMX; its time is proportional to the number of rows.
    max_kernel_rows = 16

    def __init__(self, in_features: int, out_features: int, device: torch.device | str = "cpu"):
        K = in_features + -in_features % GROUP
        weight = torch.empty(out_features, K, dtype=torch.int8, device=device)
        scale = torch.empty(out_features, dtype=torch.bfloat16, device=device)
        super().__init__(in_features, out_features, weight, scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.to(dtype) * self.scale.to(dtype)[:, None])[:, : self.in_features]

    def matmul(self, x: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype)
        if x.is_cuda:
            if HAS_TRITON and x.dtype == torch.bfloat16 and x.shape[0] <= int8_cuda.MAX_ROWS:
                return int8_cuda.multiply_few_rows(x, self.weight, scale)
            return F.linear(x, self.weight.to(x.dtype)) * scale
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[0] <= self.max_kernel_rows:
            return torch._weight_int8pack_mm(x, self.weight, scale)
        chunks = [F.linear(x, q.to(x.dtype)) for q in self.weight.split(chunk_size(self.out_features))]
        return torch.cat(chunks, dim=1) * scale


class Int4Linear(QuantizedLinear):
    """weight: [n_out / BLOCK, K, BLOCK / 2] uint8, scale: [K / GROUP, n_out, 2] bfloat16, as quantize_int4 has them.

    On CUDA the first forward pass replaces `weight` by the layout of the kernel there, which cannot be saved.
    """

    bits, block, scale_dim = 4, BLOCK, 1
    quantize_chunk = staticmethod(quantize_int4)
    max_kernel_rows = 64

    def __init__(self, in_features: int, out_features: int, device: torch.device | str = "cpu"):
        K = in_features + -in_features % GROUP
        n_block = -(-out_features // BLOCK)
        weight = torch.empty(n_block, K, BLOCK // 2, dtype=torch.uint8, device=device)
        scale = torch.empty(K // GROUP, n_block * BLOCK, 2, dtype=torch.bfloat16, device=device)
        super().__init__(in_features, out_features, weight, scale)

    @property
    def packed(self) -> bool:
        """Whether `weight` has the layout of the CUDA kernel."""
        return self.weight.dtype == torch.int32

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        assert not self.packed, "the weights have the layout of the CUDA kernel: load the model again"
        weight = dequantize_int4(self.weight, self.scale, dtype).transpose(1, 2).flatten(0, 1)
        return weight[: self.out_features, : self.in_features]

    def matmul(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            if not self.packed:
                self.pack()
            return torch._weight_int4pack_mm(x.bfloat16(), self.weight, GROUP, self.scale.bfloat16())
        is_few = x.dtype == torch.bfloat16 and x.shape[0] <= self.max_kernel_rows
        if x.device.type == "cpu" and is_few and CPU_HAS_INT4:
            packed = self.weight.view(-1, x.shape[1] // 2)
            return torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, self.scale.to(x.dtype))
        size = chunk_size(self.scale.shape[1])
        chunks = zip(self.weight.split(size // BLOCK), self.scale.split(size, dim=1))
        products = [torch.matmul(x, dequantize_int4(q, scales, x.dtype)) for q, scales in chunks]
        return torch.cat(products).transpose(0, 1).flatten(1)  # from [n_block, M, BLOCK]

    def pack(self) -> None:
        """Converts `weight` to the layout of the CUDA kernel. Both layouts exist for one Linear at a time."""
        low, high = self.weight & 15, self.weight >> 4  # [n_block, K, BLOCK / 2]
        q = torch.cat([low, high], dim=2).transpose(1, 2).flatten(0, 1)  # [n_out, K]
        pairs = q[:, ::2] << 4 | q[:, 1::2]
        inner_tiles = 8 if q.shape[1] % 128 == 0 else 4  # tiles of 16 inputs that are stored together
        self.weight = torch._convert_weight_to_int4pack(pairs.contiguous(), inner_tiles)


LINEARS = {8: Int8Linear, 4: Int4Linear}


def chunk_size(n_out: int) -> int:
    """Outputs to dequantize at a time. All of them while compiling: a compiler would unroll the loop."""
    return n_out if torch.compiler.is_compiling() else CHUNK


def quantize(llama: nn.Module, bits: int) -> None:
    """Replaces each Linear of the decoder by a quantized one. bits: 8 or 4.

    On the meta device the new ones stay uninitialized. A merged adapter becomes part of the weights. Raises
    ValueError for an adapter that is not merged, and for a weight that is not finite.
    """
    assert bits_of(llama) is None, "the model is quantized already"
    linears = [(name, module) for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    if any(isinstance(module, LoRALinear) and not module.merged for _, module in linears):
        raise ValueError("merge the adapter first (lora.merge_lora, or python -m tools.merge), then quantize")
    linears = [(name, module) for name, module in linears if ".lora_" not in name]
    while linears:
        name, linear = linears.pop()  # the last reference: its memory is freed before the next one is quantized
        new = LINEARS[8 if name == "lm_head" else bits](linear.in_features, linear.out_features, "meta")
        if not linear.weight.is_meta:
            new.set_weight(linear.weight)
        llama.set_submodule(name, new)


def bits_of(model: nn.Module) -> int | None:
    """Returns the bits that the decoder was quantized to, 8 or 4; None for a model that is not quantized."""
    return min((module.bits for module in model.modules() if isinstance(module, QuantizedLinear)), default=None)


def read_quantization(folder: str | Path) -> str | None:
    """Returns the name in BITS of what a folder's weights are quantized to; None if they are not quantized."""
    path = Path(folder) / "config.json"
    entry = read_json(path).get("quantization")
    for name, bits in BITS.items():
        if entry == {"bits": bits, "group": GROUP}:
            return name
    if entry is not None:
        raise ValueError(f"{path}: quantization {json.dumps(entry)[:200]} is not supported")
    return None


def load_quantized(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    to: str | None = None,
) -> Owl:
    """Loads a model folder as load_model does, saved quantized or not.

    dtype: of everything that is not quantized. to: "int8" or "int4" quantizes the decoder while it is loaded, one
    Linear at a time on the device. Raises ValueError also for float16, and if the folder is quantized to other bits.
    """
    folder = Path(folder)
    saved = read_quantization(folder)
    if to is None and saved is None:
        return load_model(folder, device, dtype)
    if saved is not None and to not in (None, saved):
        raise ValueError(f"{folder} is already quantized to {saved}, and cannot be quantized to {to}")
    if dtype == torch.float16:
        raise ValueError("quantized weights compute in bfloat16 or float32: the range of float16 is too small")
    config = read_config(folder)
    with torch.device("meta"):
        model = Owl(config).to(dtype)
    quantize(model.llama, BITS[saved or to])
    if saved is not None:
        tensors = hf_tensors(folder, config, quantized=model)
    else:
        tensors = quantize_tensors(hf_tensors(folder, config), model, device)
    assign_tensors(model, tensors, device, folder)
    for name, buffer in model.named_buffers():
        if name.endswith(".scale") and not buffer.isfinite().all():
            raise ValueError(f"{folder}: {name} is not finite")
    return model.eval()


def quantize_tensors(
    tensors: Iterable[tuple[str, Tensor]], model: nn.Module, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Replaces each weight of a quantized Linear in a stream of (name, tensor) by the Linear's buffers."""
    modules = dict(model.named_modules())
    for name, tensor in tensors:
        parent = name.rpartition(".")[0]
        module = modules.get(parent)
        if isinstance(module, QuantizedLinear) and tensor.shape == (module.out_features, module.in_features):
            for leaf, buffer in module.quantize_weight(tensor.to(device)).items():
                yield f"{parent}.{leaf}", buffer
        else:
            yield name, tensor


def save_quantized(model: Owl, folder: str | Path) -> None:
    """Writes a model folder of a quantized model, as save_model does."""
    if any(isinstance(module, Int4Linear) and module.packed for module in model.modules()):
        raise ValueError("4-bit weights cannot be saved once they were used on CUDA: save the model before")
    save_model(model, folder, {"quantization": {"bits": bits_of(model), "group": GROUP}})


def why_slow(bits: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns a sentence for the user if decoding is slower than with unquantized weights, else None."""
    reason = None
    if device.type == "cuda" and bits == 8 and not (HAS_TRITON and dtype == torch.bfloat16):
        reason = "on CUDA they are fast in bfloat16 only, and need Triton"
    elif device.type == "cpu" and dtype != torch.bfloat16:
        reason = "on a CPU they are fast in bfloat16 only"
    elif device.type == "cpu" and bits == 4 and not CPU_HAS_INT4:
        reason = "on a CPU they need AVX-512 to be fast, 8-bit weights do not"
    elif device.type not in ("cpu", "cuda"):
        reason = f"there is no kernel for {device.type}"
    return f"{bits}-bit weights save memory here, but no time: {reason}" if reason else None
