"""Quantisation of the language model's weights to 8 or 4 bits: less memory, and as much less to read for each token.

    python quantize.py --weights mplug-owl2-llama2-7b --out mplug-owl2-7b-int4 --to int4
    python sample.py --weights mplug-owl2-7b-int4 --image x.jpg --prompt "What is this?"

The folder that is written says in its config.json what it is ("quantization"), so that all that reads weights here
takes it as it stands; only training needs the weights themselves, and refuses it. What is not quantised (norms,
embeddings, vision tower, abstractor) is saved in bfloat16. What cannot be done is said in one sentence, with exit
code 2.

Weights alone are quantised: a Linear computes as ever, with weights that are nearly the old ones. A weight is a
small whole number (its code) and a scale that it shares with its neighbours:

    int8   weight = code * step                  code -127..127, a step for each output
    int4   weight = (code - 8) * step + middle   code 0..15, a step and a middle for each output's every 64 inputs

No code is off by more than half a step. Steps and middles are bfloat16, as kernels want them, and codes are chosen
for them as they are after that rounding. With 4 bits lm_head gets 8: it is 2 % of the weights, and the only ones whose
errors no later layer evens out.

    x [.., n_in] -- few rows: a kernel that reads codes ----------------------------------+--> y [.., n_out]
          |                                                                               |
          +-------- many rows: codes --> weights, some outputs at a time, then F.linear --+

With few rows, as in each step of an answer, time goes into reading weights, and the kernel reads fewer bytes. With
many, as in a prompt, it goes into products, and those of whole matrices are better at it. (That is on a CPU. On CUDA
there is a kernel for 4 bits, which reads prompts too, and should be slower at them than bfloat16; 8 bits are left to
the compiler, which spares the bytes for one row alone.)
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import LoRALinear

BITS = {"int8": 8, "int4": 4}
GROUP = 64  # inputs that share a step and a middle; n_in is padded with zeros to whole groups
BLOCK = 64  # outputs whose 4-bit codes lie together; n_out is padded to whole blocks
CHUNK = 256  # outputs that are turned back into weights at one time (a few MB: they stay in a CPU's own memory)
# The most rows for which the CPU's kernels are faster than turning codes back into weights. (Measured with AVX-512 and
# AMX, 4096 x 4096; the kernels take twice the time for twice the rows.)
MOST_ROWS = {8: 16, 4: 64}


# --- codes -------------------------------------------------------------------------------------------


def encode8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n_out, K] float32 as codes [n_out, K] int8 and steps [n_out] bfloat16."""
    step = (weight.abs().amax(dim=1) / 127).bfloat16()
    step[step == 0] = 1
    codes = (weight / step.float()[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), step


def encode4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n_out, K] float32, of whole blocks and groups, as codes and scales.

    The codes, [n_out / BLOCK, K, BLOCK / 2] uint8: two in a byte, in the low half those of a block's first 32 outputs,
    in the high half those of its last. That is how the AVX-512 kernel reads them. The scales, [K / GROUP, n_out, 2]
    bfloat16: step and middle.
    """
    n_out, K = weight.shape
    groups = weight.view(n_out, K // GROUP, GROUP)
    # A range that has 0 in it is never far from 0 for its width: so rounding the middle moves it by little.
    low = groups.amin(dim=2).clamp(max=0)
    step = ((groups.amax(dim=2).clamp(min=0) - low) / 15).bfloat16()
    step[step == 0] = 1
    middle = (low + 8 * step.float()).bfloat16()
    codes = ((groups - middle.float()[..., None]) / step.float()[..., None] + 8).round().clamp(0, 15)
    low_half, high_half = codes.to(torch.uint8).view(-1, 2, BLOCK // 2, K).transpose(2, 3).unbind(1)
    return (low_half | high_half << 4).contiguous(), torch.stack([step.t(), middle.t()], dim=2)


def decode4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in dtype, [n_out / BLOCK, K, BLOCK], of what encode4 returned."""
    n_block, K, _ = codes.shape
    codes = torch.cat([codes & 15, codes >> 4], dim=2).view(torch.int8) - 8
    scales = scales.to(dtype).view(K // GROUP, n_block, BLOCK, 2).permute(3, 1, 0, 2).contiguous()
    step, middle = scales[:, :, :, None]  # [n_block, K / GROUP, 1, BLOCK]
    weight = codes.to(dtype).view(n_block, K // GROUP, GROUP, BLOCK)
    return weight.mul_(step).add_(middle).view(n_block, K, BLOCK)


def kernel_reads_blocks() -> bool:
    """Whether this CPU's int4 kernel takes codes as encode4 lays them out: each kind of CPU has a layout of its own."""
    codes = torch.arange(BLOCK * GROUP, device="cpu").view(BLOCK, GROUP) * 7 // 5 % 16  # rows and columns all differ
    ours = (codes[: BLOCK // 2] | codes[BLOCK // 2 :] << 4).t().to(torch.uint8)
    try:
        theirs = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    except (AttributeError, RuntimeError):  # depends on how torch was built
        return False
    return torch.equal(theirs.flatten(), ours.flatten())


CPU_HAS_INT4 = kernel_reads_blocks()


# --- a Linear ----------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A Linear without bias, its weight in codes. Made empty: `set_weight` or a state dict fills it.

    weight and scale: as encode8 or encode4 returns them; this is what is saved, whatever the device. On CUDA with
    4 bits the first forward pass lays the weight out as the kernel there wants it, in place of what was saved.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        K = -(-in_features // GROUP) * GROUP
        if bits == 8:
            weight = torch.empty(out_features, K, dtype=torch.int8, device=device)
            scale = torch.empty(out_features, dtype=torch.bfloat16, device=device)
        else:
            n_block = -(-out_features // BLOCK)
            weight = torch.empty(n_block, K, BLOCK // 2, dtype=torch.uint8, device=device)
            scale = torch.empty(K // GROUP, n_block * BLOCK, 2, dtype=torch.bfloat16, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    @property
    def packed(self) -> bool:
        """Whether the weight lies as CUDA's kernel wants it, and can no more be saved or read back."""
        return self.weight.dtype == torch.int32

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """What a weight [n_out, n_in] becomes: {"weight": codes, "scale": scales}, on its device.

        Raises ValueError if it has a number that is not finite.
        """
        encode, block = (encode8, 1) if self.bits == 8 else (encode4, BLOCK)
        parts = []
        for part in weight.detach().split(CHUNK):  # of the largest there are gigabytes in float32
            padding = (0, -part.shape[1] % GROUP, 0, -part.shape[0] % block)
            parts.append(encode(F.pad(part.float(), padding)))
        codes, scales = zip(*parts)
        scale = torch.cat(scales, dim=0 if self.bits == 8 else 1)
        if not scale.isfinite().all():
            raise ValueError("a weight with infinite numbers, or such as are none, cannot be quantised")
        return {"weight": torch.cat(codes), "scale": scale}

    def set_weight(self, weight: Tensor) -> None:
        """Quantises a weight [n_out, n_in] into this Linear, on its device. Raises ValueError as encode does."""
        for name, tensor in self.encode(weight).items():
            setattr(self, name, tensor)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n_out, n_in] that this Linear computes with. ValueError once CUDA's kernel has it."""
        if self.packed:
            raise ValueError("this model was used on CUDA, and its 4-bit weights cannot be read back: load it anew")
        if self.bits == 8:
            weight = self.weight.to(dtype) * self.scale.to(dtype)[:, None]
        else:
            weight = decode4(self.weight, self.scale, dtype).transpose(1, 2).flatten(0, 1)
        return weight[: self.out_features, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., n_in]. Returns [.., n_out] in x's dtype; with 4 bits on CUDA it is computed in bfloat16."""
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        shape, dtype = x.shape, x.dtype
        x = x.reshape(-1, self.in_features)
        K = -(-self.in_features // GROUP) * GROUP
        if K != self.in_features:
            x = F.pad(x, (0, K - self.in_features))
        y = self._product(x)[:, : self.out_features]
        return y.to(dtype).view(*shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """x: [M, K]. Returns [M, n_out], with 4 bits padded to whole blocks."""
        if x.is_cuda and self.bits == 4:
            if not self.packed:
                self._pack()
            return torch._weight_int4pack_mm(x.bfloat16(), self.weight, GROUP, self.scale.bfloat16())
        if x.is_cuda:
            # With one row a compiler makes one pass over the codes of it; else weights are written out and read again.
            return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        # (In float32 the kernel for 8 bits is slow, and there is none for 4.)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[0] <= MOST_ROWS[self.bits]:
            if self.bits == 8:
                return torch._weight_int8pack_mm(x, self.weight, self.scale.to(x.dtype))
            if CPU_HAS_INT4:
                packed = self.weight.view(-1, x.shape[1] // 2)
                return torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, self.scale.to(x.dtype))
        size = CHUNK
        if torch.compiler.is_compiling():
            size = self.scale.numel()  # at once: of a loop the compiler would make a very long program
        if self.bits == 8:
            parts = [F.linear(x, codes.to(x.dtype)) for codes in self.weight.split(size)]
            return torch.cat(parts, dim=1) * self.scale.to(x.dtype)
        pairs = zip(self.weight.split(size // BLOCK), self.scale.split(size, dim=1))
        parts = [torch.matmul(x, decode4(codes, scales, x.dtype)) for codes, scales in pairs]
        return torch.cat(parts).transpose(0, 1).flatten(1)  # from [blocks, M, BLOCK]

    def _pack(self) -> None:
        """Lays the codes out as CUDA's kernel wants them. Both layouts together exist for one Linear at a time."""
        low, high = self.weight & 15, self.weight >> 4  # [n_block, K, BLOCK / 2]
        codes = torch.cat([low, high], dim=2).transpose(1, 2).flatten(0, 1)  # [n_out, K]
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        tiles = 8 if codes.shape[1] % 128 == 0 else 4  # of 16 inputs, which lie together
        self.weight = torch._convert_weight_to_int4pack(pairs.contiguous(), tiles)


# --- a model -----------------------------------------------------------------------------------------


def quantize(llama: nn.Module, bits: int) -> None:
    """Puts a QuantizedLinear in the place of each of the decoder's Linears, one after the other.

    bits: 8 or 4. On the meta device they stay empty, to be filled. A merged adapter becomes part of the weights.
    Raises ValueError for other bits, an adapter that is not merged, and a model that is quantised already.
    """
    if bits not in BITS.values():
        raise ValueError(f"weights are quantised to {' or '.join(str(n) for n in BITS.values())} bits, not {bits}")
    if is_quantized(llama):
        raise ValueError("the model is quantised already")
    linears = [(name, module) for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    if any(isinstance(module, LoRALinear) and not module.merged for _, module in linears):
        raise ValueError("merge the adapter first (lora.merge): quantised weights take none")
    linears = [(name, module) for name, module in linears if ".lora_" not in name]
    while linears:
        name, linear = linears.pop()  # nothing else holds it: its memory goes before the next one's turn
        new = QuantizedLinear(linear.in_features, linear.out_features, 8 if name == "lm_head" else bits, "meta")
        if not linear.weight.is_meta:
            new.set_weight(linear.weight)
        parent, _, child = name.rpartition(".")
        setattr(llama.get_submodule(parent), child, new)


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def is_packed(model: nn.Module) -> bool:
    """Whether some of its weights lie as CUDA's kernel wants them, and can no more be saved."""
    return any(isinstance(module, QuantizedLinear) and module.packed for module in model.modules())


def bits_of(model: nn.Module) -> int | None:
    """To how many bits `quantize` went, 8 or 4; None for a model that is not quantised."""
    return min((module.bits for module in model.modules() if isinstance(module, QuantizedLinear)), default=None)


def encoded(
    tensors: Iterable[tuple[str, Tensor]], model: nn.Module, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    """A stream of (name, weight) as the state of a quantised model: for a quantised Linear's weight, its buffers.

    Codes are computed on the device, of the weights as they come. Raises ValueError for one that is not finite.
    """
    modules = dict(model.named_modules())
    for name, tensor in tensors:
        parent = name.rpartition(".")[0]
        module = modules.get(parent)
        if not isinstance(module, QuantizedLinear):
            yield name, tensor
            continue
        try:
            state = module.encode(tensor.to(device))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for leaf, part in state.items():
            yield f"{parent}.{leaf}", part


def why_slow(bits: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> str | None:
    """A sentence if answers would come slower than from weights that are not quantised, for the user; else None."""
    if device.type == "cuda" and bits == 8 and not compiled:
        return "8-bit weights save memory here, but no time: on CUDA they are faster only for one row and compiled"
    if device.type == "cpu" and dtype != torch.bfloat16:
        return "quantised weights save memory here, but no time: on a CPU they are fast in bfloat16 only"
    if device.type == "cpu" and bits == 4 and not CPU_HAS_INT4:
        return "4-bit weights save memory here, but no time: on a CPU they need AVX-512 to be fast, 8-bit ones do not"
    if device.type not in ("cpu", "cuda"):
        return f"quantised weights save memory here, but no time: there is no kernel for {device.type}"
    return None


# --- the command line --------------------------------------------------------------------------------


def fail(message: object) -> NoReturn:
    """Says in one line why it cannot be done, and leaves with exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", required=True, metavar="FOLDER", help="a model folder, as it lies on the hub")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where the quantised model goes; holds none yet")
    p.add_argument("--to", required=True, choices=BITS, help="int8: nearly the same answers; int4: half the memory")
    return p.parse_args()


def main() -> None:
    args = parse()
    import weights  # here, since it imports this file

    try:
        out = Path(args.out)
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file, and should be a folder")
        if any((out / name).exists() for name in weights.WEIGHT_FILES):
            raise ValueError(f"--out {out} already holds weights: choose another folder")
        model = weights.load_model(args.weights, "cpu", torch.bfloat16, args.to)
        weights.save_model(model, out)
    except (ValueError, OSError) as error:
        fail(error)
    n_byte = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{out} holds {args.weights} at {args.to}: {n_byte / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
