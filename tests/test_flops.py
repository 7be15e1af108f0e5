"""FLOPs of a training step, compared with torch's FlopCounterMode."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_stage1
from conftest import VARIANTS, make_config, make_images, make_owl, make_packed
from lora import inject_lora
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, Owl, OwlConfig
from tools import train_language
from train_stage2 import LORA_TARGETS
from training.flops import PEAK_FLOPS, FlopCounter, peak_flops, train_flops
from training.presets import PRESETS


def freeze_vit(model: Owl) -> None:
    model.vit.requires_grad_(False)


def train_upper_half(model: Owl) -> None:
    model.requires_grad_(False)
    model.vit.blocks[-1].requires_grad_(True)
    model.abstractor.requires_grad_(True)
    model.llama.layers[-1].mlp.requires_grad_(True)


def train_one_norm(model: Owl) -> None:
    model.requires_grad_(False)
    model.llama.layers[1].post_attention_layernorm.requires_grad_(True)


def train_lora(model: Owl) -> None:
    model.requires_grad_(False)
    inject_lora(model.llama, LORA_TARGETS[model.config.variant], 4, 8.0, 0.05)


def train_lora_and_abstractor(model: Owl) -> None:
    train_lora(model)
    model.abstractor.requires_grad_(True)


TRAINED = {
    "language": train_language.choose_trained,
    "stage 1": train_stage1.choose_trained,
    "all": lambda model: model.requires_grad_(True),
    "LoRA": train_lora,
    "LoRA and abstractor": train_lora_and_abstractor,
    "all but the ViT": freeze_vit,
    "upper half": train_upper_half,
    "one norm": train_one_norm,
    "nothing": lambda model: model.requires_grad_(False),
}
BATCHES = {"batch": [1, 1], "packed": [2, 0, 1], "text": [0, 0]}  # the number of images of each row


def make_batch(
    config: OwlConfig, n_images: list[int], n_text: int, n_supervised: int
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Returns (rows of ids, images, rows of labels): row i has n_images[i] images, n_text and n_supervised tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n_image in n_images:
        text = torch.randint(3, config.llama.vocab_size, (n_text,), generator=generator).tolist()
        rows.append(torch.tensor(text[:2] + [IMAGE_TOKEN_ID] * n_image * config.n_visual_tokens + text[2:]))
    labels = [torch.where(torch.arange(len(row)) < len(row) - n_supervised, IGNORE_INDEX, row) for row in rows]
    return rows, make_images(config, sum(n_images), generator), labels


@pytest.mark.parametrize("trained, kind", [("all", "batch"), *product(TRAINED, ("packed", "text"))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_train_flops_equals_torchs_counter(variant, trained, kind):
    """Exactly, after subtracting what only the counter counts.

    FlopCounterMode cannot count the CPU's fused attention, so the test uses the math backend. That computes the pairs
    that the causal mask hides too; and the logits, which the loss computes again in the backward pass, count twice.
    """
    config = make_config(variant, llama={"n_kv_head": 2})
    model = make_owl(config)
    TRAINED[trained](model)
    model.train()
    n_images = BATCHES[kind]
    rows, images, labels = make_batch(config, n_images, n_text=12, n_supervised=5)
    lengths = [len(row) for row in rows]
    if kind == "batch":
        inputs = (torch.stack(rows), images, torch.stack(labels))
    else:
        ids, labels = torch.cat(rows)[None], torch.cat(labels)[None]
        inputs = (ids, images, labels, make_packed(ids, labels, lengths))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(*inputs)[1]
        if loss.requires_grad:
            loss.backward()

    n_supervised = 5 * len(rows)
    expected = train_flops(model, sum(n_images), lengths, n_supervised)
    assert FlopCounter(model).count(sum(n_images), lengths, n_supervised) == expected
    width, n_layer = config.llama.n_embd, config.llama.n_layer
    n_hidden = sum(length**2 - length * (length + 1) // 2 for length in lengths)
    n_backward = n_layer if loss.requires_grad else 0  # layers whose attention has a backward pass
    if trained == "one norm" or trained == "upper half" and images is None:
        n_backward = 0
    expected += 4 * n_hidden * width * (n_layer + 2 * n_backward)
    if loss.requires_grad:
        expected += 2 * n_supervised * width * config.llama.vocab_size
    if variant == "owl1" and (trained == "LoRA" or trained == "LoRA and abstractor" and images is None):
        # With adapters on q and v, the first layer's k needs no gradient. Fused kernels compute it, math does not.
        expected -= 2 * sum(length**2 for length in lengths) * width
    assert counter.get_total_flops() == expected


def test_train_flops_of_the_7b_is_6_per_weight_and_token():
    with torch.device("meta"):
        model = Owl(PRESETS["owl1-7b"]())
    weights = sum(p.numel() for name, p in model.llama.named_parameters() if "embed" not in name and "norm" not in name)
    attention = 32 * 12 * 4096 * 2048**2 / 2
    assert train_flops(model, 0, [2048], 2048) == pytest.approx(6 * 2048 * weights + attention, rel=1e-4)
    one = train_flops(model, 1, [1024], 512)
    assert train_flops(model, 2, [1024, 1024], 1024) == 2 * one
    assert train_flops(model, 2, [2048], 1024) > 2 * one
    for numbers in ((2, [2048, 77], 1024), (0, [2048], 3), (64, [129] * 64, 0)):
        assert FlopCounter(model).count(*numbers) == train_flops(model, *numbers)


def test_peak_flops_uses_the_most_specific_name(monkeypatch):
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb": None,
        "NVIDIA GB200": 2500e12,
        "NVIDIA H20": None,
    }
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == flops, name
    assert peak_flops(torch.device("cpu")) is None
    parts = list(PEAK_FLOPS)
    assert not any(parts[i] in later for i in range(len(parts)) for later in parts[i + 1 :])  # all are reachable
