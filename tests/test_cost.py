"""Costs: FLOPs against torch's counter, bytes against what a real step occupies."""

import functools
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import train_stage0
import train_stage1
import train_stage2
from conftest import ROOT, make_config, make_images, make_owl
from cost import PEAK_FLOPS, activation_bytes, peak_bytes, peak_flops, train_flops
from llama import Documents
from model import IGNORE, IMAGE_ID, PRESETS, Owl, OwlConfig

STYLES = ("owl1", "owl2")


def frozen_vit(model: Owl) -> None:
    model.vit.requires_grad_(False)


def upper_half(model: Owl) -> None:
    """Of the vision tower the last block, the abstractor, of the language model the last layer's MLP."""
    model.requires_grad_(False)
    model.vit.blocks[-1].requires_grad_(True)
    model.abstractor.requires_grad_(True)
    model.llama.layers[-1].mlp.requires_grad_(True)


def one_norm(model: Owl) -> None:
    model.requires_grad_(False)
    model.llama.layers[1].post_attention_layernorm.requires_grad_(True)


def lora(model: Owl, train_abstractor: bool = False) -> None:
    train_stage2.choose_trained(model, 4, 8.0, 0.05, train_abstractor)


CHOICES = {
    "stage 0": train_stage0.choose_trained,
    "stage 1": train_stage1.choose_trained,
    "stage 2": lambda model: train_stage2.choose_trained(model, 0, 0.0, 0.0, False),
    "LoRA": lora,
    "LoRA and abstractor": functools.partial(lora, train_abstractor=True),
    "frozen ViT": frozen_vit,
    "upper half": upper_half,
    "one norm": one_norm,
    "nothing": lambda model: model.requires_grad_(False),
}


def make_batch(config: OwlConfig, images_of: list[int], text: int, n_supervised: int) -> tuple[Tensor, ...]:
    """Documents of so many images and `text` words each: (ids, images, labels [n, T]). n_supervised: of each."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n_image in images_of:
        words = torch.randint(3, config.llama.vocab_size, (text,), generator=generator).tolist()
        rows.append(torch.tensor(words[:2] + [IMAGE_ID] * n_image * config.image_words + words[2:]))
    labels = [torch.where(torch.arange(len(row)) < len(row) - n_supervised, IGNORE, row) for row in rows]
    return rows, make_images(config, sum(images_of), generator), labels


# --- FLOPs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_of", [[1, 1], [2, 0, 1], [0, 0]], ids=["even", "packed", "text"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("style", STYLES)
def test_flops_are_those_of_torchs_counter(style, choice, images_of):
    """To the last one, once what the counter counts beside is subtracted.

    It does not look into the CPU's fused attention, so it is shown the plain one. That computes all pairs of a query
    and a key of a document, also those that the causal mask throws away; and where it computes the loss again for the
    backward pass (which it does to save memory) that is counted again.
    """
    config = make_config(style, llama={"n_kv_head": 2})
    model = make_owl(config)
    CHOICES[choice](model)
    model.train()
    rows, images, labels = make_batch(config, images_of, text=12, n_supervised=5)
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1 and images is not None:
        inputs = (torch.stack(rows), images, torch.stack(labels))
    else:
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        inputs = (torch.cat(rows)[None], images, torch.cat(labels)[None], Documents(starts, max(lengths)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(*inputs)[1]
        if loss.requires_grad:
            loss.backward()

    n_supervised = 5 * len(rows)
    ours = train_flops(model, sum(images_of), lengths, n_supervised)
    width, layers = config.llama.n_embd, config.llama.n_layer
    unseen = sum(length**2 - length * (length + 1) // 2 for length in lengths)
    # The layers whose attention has a backward pass.
    backward = layers if loss.requires_grad else 0
    if choice == "one norm" or choice == "upper half" and images is None:
        backward = 0
    extra = 4 * unseen * width * (layers + 2 * backward)
    if loss.requires_grad:
        extra += 2 * n_supervised * width * config.llama.vocab_size
    if style == "owl1" and (choice == "LoRA" or choice == "LoRA and abstractor" and images is None):
        # Adapters on q and v: the first layer's k needs no gradient. A fused kernel computes it all the same, the
        # plain attention leaves it out.
        extra -= 2 * sum(length**2 for length in lengths) * width
    assert counter.get_total_flops() == ours + extra


def test_flops_of_the_7b():
    """Owl1's language model by the rule of thumb: 6 FLOPs for each weight and token."""
    with torch.device("meta"):
        model = Owl(PRESETS["owl1-7b"]())
    weights = sum(p.numel() for name, p in model.llama.named_parameters() if "embed" not in name and "norm" not in name)
    attention = 32 * 12 * 4096 * 2048**2 / 2
    assert train_flops(model, 0, [2048], 2048) == pytest.approx(6 * 2048 * weights + attention, rel=1e-4)
    one = train_flops(model, 1, [1024], 512)
    assert train_flops(model, 2, [1024, 1024], 1024) == 2 * one
    assert train_flops(model, 2, [2048], 1024) > 2 * one


def test_peak_flops(monkeypatch):
    """The most specific name counts; of what is not listed nothing is claimed."""
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb": None,
        "NVIDIA GB200": 2500e12,
        "NVIDIA H20": None,
        "Tesla V100-SXM2-32GB": None,
    }
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == flops, name
    assert peak_flops(torch.device("cpu")) is None
    parts = list(PEAK_FLOPS)
    assert not any(parts[i] in later for i in range(len(parts)) for later in parts[i + 1 :])  # each can be found


# --- bytes -------------------------------------------------------------------------------------------


def test_peak_bytes():
    old = torch.zeros(1000)

    def views_and_old_ones() -> None:
        a = old.view(10, 100)[1:]
        a.add_(1)
        a.detach().t()

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(100).view(10, 10).t()

    def one_beside_the_other() -> None:
        kept = [torch.ones(100) for _ in range(3)]
        kept[0].view(10, 10)
        kept.pop()
        kept.append(torch.ones(50))

    def kept_by_the_graph() -> None:
        w = torch.ones(100, requires_grad=True)
        y = w.exp().exp().sum()  # each keeps its result
        torch.ones(10)
        y.backward()

    assert peak_bytes(views_and_old_ones) == 0
    assert peak_bytes(one_after_the_other) == 400
    assert peak_bytes(one_beside_the_other) == 1200
    # w, two results, the sum; backward the gradient of the sum, then two gradients of 400 at a time at most
    assert 1200 + 4 + 4 + 400 <= peak_bytes(kept_by_the_graph) <= 1200 + 4 + 4 + 800


def checkpointed(model: Owl) -> None:
    for block in (*model.vit.blocks, *model.abstractor.layers, *model.llama.layers):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def real_bytes(model: Owl, inputs: tuple[Tensor, ...], precision: object) -> int:
    """What a real micro-batch takes beside weights and gradients, the copy of the input on the device included."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def loss_of() -> Tensor:
        with precision:
            return model(*(x if x is None else x.clone() for x in inputs))[1]

    def step() -> None:
        loss = loss_of()
        if loss.requires_grad:
            loss.backward()

    return peak_bytes(step)


@pytest.mark.parametrize("how", ["float32", "mixed", "mixed checkpointed"])
@pytest.mark.parametrize(
    "style, choice", [("owl1", "stage 1"), ("owl1", "LoRA and abstractor"), ("owl2", "stage 2"), ("owl2", "LoRA")]
)
def test_a_fake_step_takes_what_a_real_one_does(style, choice, how):
    """Dropout as well, LoRA's and the abstractor's, and layers of a size at which the temporaries matter."""
    config = make_config(style, abstractor={"dropout": 0.1 if style == "owl1" else 0.0})
    model = make_owl(config)
    CHOICES[choice](model)
    model.train()
    if "checkpointed" in how:
        checkpointed(model)
    precision = torch.autocast("cpu", torch.bfloat16) if "mixed" in how else nullcontext()
    rows, images, labels = make_batch(config, [2], text=40, n_supervised=30)
    real = real_bytes(model, (rows[0][None], images, labels[0][None]), precision)
    fake = activation_bytes(model, 2, len(rows[0]), 30, precision)
    assert fake == pytest.approx(real, rel=0.01)


def test_gradients_that_are_not_there_yet():
    """The first micro-batch makes them as its activations go; for the next they are there, and it makes them anew."""
    model = make_owl(make_config("owl2")).train()
    rows, images, labels = make_batch(model.config, [1], text=40, n_supervised=30)
    inputs = (rows[0][None], images, labels[0][None])

    def step() -> None:
        model(*(x.clone() for x in inputs))[1].backward()

    first = peak_bytes(step)
    assert activation_bytes(model, 1, len(rows[0]), 30, nullcontext(), accumulate=False) == pytest.approx(first, 0.01)
    gradients = sum(4 * p.numel() for p in model.parameters())
    later = activation_bytes(model, 1, len(rows[0]), 30, nullcontext())
    assert later <= first < later + gradients


@pytest.mark.parametrize("style", STYLES)
def test_a_fake_step_on_text_alone(style):
    """Stage 1 learns nothing from it: there is no backward pass."""
    config = make_config(style)
    sizes = {}
    for choice in ("stage 1", "stage 2"):
        model = make_owl(config).train()
        CHOICES[choice](model)
        rows, _, labels = make_batch(config, [0], text=40, n_supervised=30)
        real = real_bytes(model, (rows[0][None], None, labels[0][None]), nullcontext())
        sizes[choice] = activation_bytes(model, 0, 40, 30, nullcontext())
        assert sizes[choice] == pytest.approx(real, rel=0.02)
    assert sizes["stage 1"] < 0.5 * sizes["stage 2"]


def test_a_fake_step_leaves_the_model_as_it_was():
    config = make_config("owl2")
    with torch.device("meta"):
        model = Owl(config).train()
    CHOICES["stage 1"](model)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    fake = activation_bytes(model, 1, 40, 20, nullcontext())
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(p.grad is None and p.is_meta for p in model.parameters())
    real = make_owl(config).train()
    CHOICES["stage 1"](real)
    assert activation_bytes(real, 1, 40, 20, nullcontext()) == fake  # wherever the model is


def test_attention_keeps_no_matrix_of_all_pairs():
    """Twice the length takes about twice the memory."""
    config = make_config("owl2", llama={"context": 8192, "vocab_size": 8})
    with torch.device("meta"):
        model = Owl(config).train()
    short, long = (activation_bytes(model, 0, length, 10, nullcontext()) for length in (4096, 8192))
    assert long == pytest.approx(2 * short, rel=0.01)
    assert short < 4096**2 * config.llama.n_head * 4


@pytest.mark.slow
def test_a_7b_takes_no_memory_to_measure():
    """Owl2-7B, full training, 2,048 positions with two images of 448 pixels: seconds, and no memory to speak of."""
    with torch.device("meta"):
        model = Owl(PRESETS["owl2-7b"]()).train()
    sizes = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for cached in (True, False):
        precision = torch.autocast("cpu", torch.bfloat16, cache_enabled=cached)
        sizes["plain", cached] = activation_bytes(model, 2, 2048, 1024, precision)
    checkpointed(model)
    for cached in (True, False):
        precision = torch.autocast("cpu", torch.bfloat16, cache_enabled=cached)
        sizes["checkpointed", cached] = activation_bytes(model, 2, 2048, 1024, precision)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 1e9
    # The graph keeps a bfloat16 copy of each weight for the backward pass; with checkpointing only autocast's cache.
    copies = 2 * sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and p.ndim > 1)
    assert sizes["plain", True] == sizes["plain", False] > copies
    assert sizes["checkpointed", True] > 0.9 * copies > 5 * sizes["checkpointed", False]


# What a process of its own does in the next test. Printed: the bytes that its tensors took at most beside weights and
# AdamW's moments, and by how much its resident memory grew at most.
REAL_STEPS = """
import resource, sys
sys.path.insert(0, "tests")
import torch
from cost import peak_bytes
from model import PRESETS, Owl
from test_cost import make_batch

track, n_micro = sys.argv[1] == "track", int(sys.argv[2])
torch.nn.Linear(8, 8)(torch.randn(4, 8)).sum().backward()  # starts whatever torch starts
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model = Owl(PRESETS["mid-owl2"]()).init_weights().train()
model.vit.requires_grad_(False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
rows, images, labels = make_batch(model.config, [1, 1], text=256, n_supervised=128)

def backward():
    for _ in range(n_micro):
        model(torch.stack(rows), images, torch.stack(labels))[1].backward()

backward()
optimizer.step()
optimizer.zero_grad()
if track:
    print(peak_bytes(backward))
else:
    for _ in range(2):
        backward()
        optimizer.step()
        optimizer.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and steers glibc")
@pytest.mark.parametrize("n_micro", [1, 2])
def test_the_prediction_for_a_middling_owl(n_micro):
    """Weights, gradients, moments and activations, of one micro-batch a step or of two."""
    with torch.device("meta"):
        model = Owl(PRESETS["mid-owl2"]()).train()
    model.vit.requires_grad_(False)
    weights = sum(4 * p.numel() for p in model.parameters())
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    length = 2 * (256 + model.config.image_words)
    beside = activation_bytes(model, 2, length, 256, nullcontext(), accumulate=n_micro > 1)
    beside += trained if n_micro > 1 else 0
    # So that glibc gives back what is freed, and the figure is that of tensors in use and not of holes between them.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}
    real = {}
    for how in ("track", "resident"):
        command = [sys.executable, "-c", REAL_STEPS, how, str(n_micro)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        real[how] = int(done.stdout)
    predicted = weights + 2 * trained + beside
    tracked = weights + 2 * trained + real["track"]
    print(f"MB: predicted {predicted / 1e6:.0f}, tensors {tracked / 1e6:.0f}, resident {real['resident'] / 1e6:.0f}")
    assert beside == pytest.approx(real["track"], rel=0.01)
    assert weights + 2 * trained + beside == pytest.approx(real["resident"], rel=0.15)
