"""Memory estimates on fake tensors, compared with the memory of a real step."""

import os
import resource
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from conftest import ROOT, VARIANTS, make_config, make_owl
from model import Owl
from test_flops import TRAINED, make_batch
from training.distributed import Dist
from training.memory import activation_bytes, peak_bytes
from training.parallel import prepare_blocks
from training.presets import PRESETS, init_weights

MIXED = torch.autocast("cpu", torch.bfloat16)
CPU = Dist(0, 1, torch.device("cpu"), torch.float32)


def test_peak_bytes_counts_new_storages_while_they_exist():
    old = torch.zeros(1000)

    def views_of_old_tensors() -> None:
        view = old.view(10, 100)[1:]
        view.add_(1)
        view.detach().t()

    def one_at_a_time() -> None:
        for _ in range(3):
            torch.ones(100).view(10, 10).t()

    def three_at_a_time() -> None:
        kept = [torch.ones(100) for _ in range(3)]
        kept[0].view(10, 10)
        kept.pop()
        kept.append(torch.ones(50))

    def saved_for_backward() -> None:
        w = torch.ones(100, requires_grad=True)
        y = w.exp().exp().sum()  # each exp saves its result
        torch.ones(10)
        y.backward()

    assert peak_bytes(views_of_old_tensors) == 0
    assert peak_bytes(one_at_a_time) == 400
    assert peak_bytes(three_at_a_time) == 1200
    # w, two results and the sum; then the sum's gradient, and one or two gradients of 400 bytes at a time.
    assert 1200 + 4 + 4 + 400 <= peak_bytes(saved_for_backward) <= 1200 + 4 + 4 + 800


def real_bytes(model: Owl, inputs: tuple[Tensor | None, ...], autocast=nullcontext(), accumulate: bool = True) -> int:
    """Peak memory of a real micro-batch, including the copy of the input on the device."""
    for parameter in model.parameters():
        if parameter.requires_grad and accumulate:
            parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with autocast:
            loss = model(*(x if x is None else x.clone() for x in inputs))[1]
        if loss.requires_grad:
            loss.backward()

    return peak_bytes(step)


@pytest.mark.parametrize(
    "variant, trained, autocast, is_checkpointed",
    [
        ("owl1", "stage 1", nullcontext(), True),
        ("owl1", "LoRA and abstractor", nullcontext(), False),
        ("owl2", "all", MIXED, False),
        ("owl2", "LoRA", MIXED, True),
    ],
)
def test_a_fake_step_needs_as_much_memory_as_a_real_one(variant, trained, autocast, is_checkpointed):
    """With dropout in LoRA and in the abstractor."""
    config = make_config(variant, abstractor={"dropout": 0.1 if variant == "owl1" else 0.0})
    model = make_owl(config).train()
    TRAINED[trained](model)
    prepare_blocks(model, CPU, is_checkpointed, False)
    rows, images, labels = make_batch(config, [2], n_text=40, n_supervised=30)
    real = real_bytes(model, (rows[0][None], images, labels[0][None]), autocast)
    fake = activation_bytes(model, 2, len(rows[0]), 30, autocast=autocast)
    assert fake == pytest.approx(real, rel=0.01)


def test_new_gradients_count_unless_they_are_accumulated():
    model = make_owl(make_config("owl2")).train()
    rows, images, labels = make_batch(model.config, [1], n_text=40, n_supervised=30)
    real = real_bytes(model, (rows[0][None], images, labels[0][None]), accumulate=False)
    first = activation_bytes(model, 1, len(rows[0]), 30, autocast=nullcontext(), accumulate=False)
    later = activation_bytes(model, 1, len(rows[0]), 30, autocast=nullcontext())
    assert first == pytest.approx(real, 0.01)
    assert later <= real < later + sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fake_step_on_text_only(variant):
    """Stage 1 trains nothing on text: there is no backward pass."""
    sizes = {}
    for trained in ("stage 1", "all"):
        model = make_owl(make_config(variant)).train()
        TRAINED[trained](model)
        rows, _, labels = make_batch(model.config, [0], n_text=40, n_supervised=30)
        sizes[trained] = activation_bytes(model, 0, 40, 30, autocast=nullcontext())
        assert sizes[trained] == pytest.approx(real_bytes(model, (rows[0][None], None, labels[0][None])), rel=0.02)
    assert sizes["stage 1"] < 0.5 * sizes["all"]


def test_a_fake_step_does_not_change_the_model():
    with torch.device("meta"):
        model = Owl(make_config("owl2")).train()
    TRAINED["stage 1"](model)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    fake = activation_bytes(model, 1, 40, 20, autocast=nullcontext())
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(p.grad is None and p.is_meta for p in model.parameters())
    real = make_owl(model.config).train()
    TRAINED["stage 1"](real)
    assert activation_bytes(real, 1, 40, 20, autocast=nullcontext()) == fake  # on any device


def test_attention_memory_is_linear_in_the_length():
    config = make_config("owl2", llama={"context": 8192, "vocab_size": 8})
    with torch.device("meta"):
        model = Owl(config).train()
    short, long = (activation_bytes(model, 0, length, 10, autocast=nullcontext()) for length in (4096, 8192))
    assert long == pytest.approx(2 * short, rel=0.01)
    assert short < 4096**2 * config.llama.n_head * 4


@pytest.mark.slow
def test_measuring_a_7b_needs_no_memory():
    """Owl2-7B, everything trained, 2,048 positions with two images of 448 pixels."""
    with torch.device("meta"):
        model = Owl(PRESETS["owl2-7b"]()).train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = {}
    for is_checkpointed in (False, True):
        prepare_blocks(model, CPU, is_checkpointed, False)
        for is_cached in (True, False):
            autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=is_cached)
            sizes[is_checkpointed, is_cached] = activation_bytes(model, 2, 2048, 1024, autocast=autocast)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 1e9
    # The autograd graph keeps a bfloat16 copy of each weight; with checkpointing, only autocast's cache would.
    copies = 2 * sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and p.ndim > 1)
    assert sizes[False, True] == sizes[False, False] > copies
    assert sizes[True, True] > 0.9 * copies > 5 * sizes[True, False]


# Run in a process of its own. Prints the peak memory of the tensors besides weights and moments ("track"), or the
# increase of the resident memory ("resident").
REAL_STEPS = """
import resource, sys
sys.path.insert(0, "tests")
import torch
from model import Owl
from test_flops import make_batch
from training.memory import peak_bytes
from training.presets import PRESETS, init_weights

what, n_micro_batch = sys.argv[1], int(sys.argv[2])
torch.nn.Linear(8, 8)(torch.randn(4, 8)).sum().backward()  # initializes torch
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model = init_weights(Owl(PRESETS["mid-owl2"]())).train()
model.vit.requires_grad_(False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
rows, images, labels = make_batch(model.config, [1, 1], n_text=256, n_supervised=128)

def backward():
    for _ in range(n_micro_batch):
        model(torch.stack(rows), images, torch.stack(labels))[1].backward()

def step():
    backward()
    optimizer.step()
    optimizer.zero_grad()

step()
if what == "track":
    print(peak_bytes(backward))
else:
    step()
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and needs glibc")
@pytest.mark.parametrize("n_micro_batch", [1, 2])
def test_predicted_memory_of_a_mid_model(n_micro_batch):
    """Weights, gradients, moments and activations, with one or two micro-batches per step."""
    with torch.device("meta"):
        model = Owl(PRESETS["mid-owl2"]()).train()
    model.vit.requires_grad_(False)
    weights = sum(4 * p.numel() for p in model.parameters())
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    length, accumulate = 2 * (256 + model.config.n_visual_tokens), n_micro_batch > 1
    activations = activation_bytes(model, 2, length, 256, autocast=nullcontext(), accumulate=accumulate)
    activations += trained if accumulate else 0
    # With this threshold glibc returns freed memory at once, so that resident memory is that of the live tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}
    real = {}
    for what in ("track", "resident"):
        command = [sys.executable, "-c", REAL_STEPS, what, str(n_micro_batch)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        real[what] = int(done.stdout)
    assert activations == pytest.approx(real["track"], rel=0.01)
    assert weights + 2 * trained + activations == pytest.approx(real["resident"], rel=0.15)
