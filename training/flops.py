"""FLOPs of a training step, counted from the shapes of the weights, and the peak FLOP/s of GPUs.

What is counted is what the result needs (model FLOPs, as in MFU), not how it is computed:

    Linear      2 * n_out * n_in per token. As many again for the gradient of the weight if it is trained, and for the
                gradient of the input if anything upstream is trained.
    attention   two matrix products per pair of query and key, four in the backward pass. In the decoder only the
                causal pairs within a packed sequence count.
    lm_head     at supervised tokens only.

Norms, softmax and everything else without a matrix product, padding, and what activation checkpointing computes twice
do not count. The count is exact for what the stages train; a vision encoder trained below a frozen abstractor
would count one product too many.
"""

import torch
from torch import nn

from llama import TiedHead
from model import Owl, OwlConfig

# Dense bfloat16 FLOP/s from the data sheets (which often state twice as many, "with sparsity"). The keys are parts of
# the names that torch gives the devices; the first match counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}

# Linears that read the output of the module before them. All others read the input of their attention or MLP.
READS_PREVIOUS = ("proj", "fc2", "out", "w2", "fc", "o_proj", "down_proj", "lm_head", "lora_B")


def peak_flops(device: torch.device) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a device, None for a CPU, part of a GPU (MIG) or an unlisted GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:
        return None
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def train_flops(model: Owl, n_image: int, lengths: list[int], n_supervised: int) -> float:
    """Counts the FLOPs of the forward and backward pass of one micro-batch.

    model: on any device, "meta" included; parameters that require a gradient are trained. n_image: number of images.
    lengths: of the packed sequences, visual tokens included. n_supervised: number of supervised tokens.
    """
    config = model.config
    n_query, n_token = config.n_query, config.vit.n_token
    n_pair = {  # pairs of query and key, by the Linear at the end of the attention
        "proj": n_image * n_token**2,
        "out": n_image * n_query * (n_query + n_token),
        "o_proj": sum(length * (length + 1) // 2 for length in lengths),
    }

    # A Linear passes a gradient to its input if any parameter upstream of the input is trained.
    flops = 0
    upstream = False  # is anything trained among the modules so far?
    upstream_of_branch = False  # the same at the input of the current attention or MLP
    for name, module in model.named_modules():  # in the order of computation, except that w2 comes before w3
        n = n_token_through(name, config, n_image, sum(lengths), n_supervised)
        if n == 0:  # e.g. no images: the vision encoder does not run
            continue
        leaf = name.removesuffix(".lora_A").split(".")[-1]  # lora_A has the same input as its Linear
        if leaf in ("attn", "self_attn", "mlp"):
            upstream_of_branch = upstream
        if isinstance(module, (nn.Linear, nn.Conv2d, TiedHead)):
            weight = model.llama.embed_tokens.weight if isinstance(module, TiedHead) else module.weight
            input_grad = upstream if leaf in READS_PREVIOUS else upstream_of_branch
            if isinstance(module, nn.Conv2d):  # its input is the image
                input_grad = False
            is_quantized = weight is None  # inference/qlora.py
            n_weight = module.in_features * module.out_features if is_quantized else weight.numel()
            is_trained = not is_quantized and weight.requires_grad
            flops += 2 * n * n_weight * (1 + is_trained + input_grad)
            if leaf in n_pair and leaf == name.split(".")[-1]:  # queries and keys are as wide as this Linear's input
                flops += 4 * n_pair[leaf] * module.in_features * (3 if upstream else 1)
        upstream = upstream or any(p.requires_grad for p in module.parameters(recurse=False))
    return float(flops)


class FlopCounter:
    """train_flops for the many micro-batches of a run.

    The count is linear in the numbers of images, positions, supervised tokens, and pairs of query and key in the
    decoder. The coefficients, with images and without, are computed once.
    """

    def __init__(self, model: Owl):
        self.coefficients = [self.find_coefficients(model, n_image) for n_image in (0, 1)]

    @staticmethod
    def find_coefficients(model: Owl, n_image: int) -> tuple[float, float, float, float]:
        """FLOPs per image, position, supervised token and pair, as differences of counts."""
        length = 2 * model.config.n_visual_tokens + 1
        one = train_flops(model, n_image, [length], 1)
        image = train_flops(model, 2 * n_image, [length], 1) - one
        supervised = train_flops(model, n_image, [length], 2) - one
        position_and_pair = train_flops(model, n_image, [length, 1], 1) - one
        position_and_pairs = train_flops(model, n_image, [length + 1], 1) - one  # length + 1 pairs more
        pair = (position_and_pairs - position_and_pair) / length
        return image, position_and_pair - pair, supervised, pair

    def count(self, n_image: int, lengths: list[int], n_supervised: int) -> float:
        """Returns the same as train_flops(model, n_image, lengths, n_supervised)."""
        n_pair = sum(length * (length + 1) // 2 for length in lengths)
        numbers = (n_image, sum(lengths), n_supervised, n_pair)
        return sum(coefficient * n for coefficient, n in zip(self.coefficients[n_image > 0], numbers))


def n_token_through(name: str, config: OwlConfig, n_image: int, n_position: int, n_supervised: int) -> int:
    """Returns how many tokens pass through the module `name` of an Owl."""
    part, *path = name.split(".")
    if part == "vit":
        return n_image * (config.vit.n_token - ("patch_embed" in path))  # the class token is no patch
    if part == "abstractor":
        reads_patches = "k" in path or "v" in path
        return n_image * (config.n_query + config.vit.n_token * reads_patches)
    if path == ["lm_head"]:
        return n_supervised
    n_visual = n_image * config.n_visual_tokens
    if ".multiway.0" in name:
        return n_position - n_visual
    return n_visual if ".multiway.1" in name else n_position
