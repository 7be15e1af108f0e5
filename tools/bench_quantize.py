"""Size and accuracy of quantized weights: what bf16, int8 and int4 save, and how far they change the outputs.

    python -m tools.bench_quantize

Prints the sizes of the 7B models, then errors relative to float32: of single Linears with the 7B's shapes, and of the
logits of checkpoints/tiny-owl2 and of mid-owl2. All weights except those of tiny-owl2 are random, which is the hardest
case for quantization.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from command import ArgumentParser, run
from inference.quantize import BITS, quantize
from model import IMAGE_TOKEN_ID, Owl
from tools.benchmark import random_model, random_prompts
from training.presets import PRESETS
from weights import load_model

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny-owl2"
FORMATS = {"bf16": None, **BITS}  # bits by name; None: not quantized


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.float() - exact).norm() / exact.norm())


def print_sizes() -> None:
    for preset, (name, bits) in product(("owl1-7b", "owl2-7b"), FORMATS.items()):
        with torch.device("meta"):
            model = Owl(PRESETS[preset]()).bfloat16()
        if bits is not None:
            quantize(model.llama, bits)
        n_byte = sum(tensor.nbytes for tensor in model.state_dict().values())
        print(f"{f'{preset}, {name}':<44}{n_byte / 1e9:>12.2f} GB")


def print_linear_errors() -> None:
    print(f"\n{'a Linear, random weights and inputs':<44}{'relative error':>15}")
    for n_out, n_in in ((4096, 4096), (11008, 4096), (4096, 11008)):
        torch.manual_seed(0)
        linear, x = nn.Linear(n_in, n_out, bias=False), torch.randn(64, n_in)
        exact = linear(x)
        for name, bits in FORMATS.items():
            layer = nn.Sequential(linear)
            if bits is not None:
                quantize(layer, bits)
            error = relative_error(layer.bfloat16()(x.bfloat16()), exact)
            linear.float()
            print(f"{f'{n_in} to {n_out}, {name}':<44}{error:>15.4f}")


def print_logit_errors(what: str, make_model: Callable[..., Owl]) -> None:
    """make_model(dtype=torch.float32): returns the model that is quantized."""
    model = make_model(dtype=torch.float32)
    ids, images = random_prompts(model, 8, 64)
    exact = model(ids, images)[0][ids != IMAGE_TOKEN_ID]
    for name, bits in FORMATS.items():
        model = make_model(dtype=torch.float32)
        if bits is not None:
            quantize(model.llama, bits)
        logits = model.bfloat16()(ids, images.bfloat16())[0][ids != IMAGE_TOKEN_ID].float()
        p, q = exact.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        kl = float((p.exp() * (p - q)).sum(dim=-1).mean())
        same = 100 * float((p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean())
        print(f"{f'{what}, {name}':<44}{relative_error(logits, exact):>15.4f}{kl:>12.1e}{same:>11.1f} %")


@torch.inference_mode()
def main() -> None:
    ArgumentParser(prog="python -m tools.bench_quantize", description=__doc__).parse_args()
    print_sizes()
    print_linear_errors()
    print(f"\n{'logits':<44}{'relative error':>15}{'KL, nats':>12}{'same argmax':>13}")
    print_logit_errors("checkpoints/tiny-owl2", partial(load_model, TINY))
    print_logit_errors("mid-owl2, random", partial(random_model, "mid-owl2", torch.device("cpu")))


if __name__ == "__main__":
    run(main)
