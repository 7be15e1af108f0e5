"""What the tests share: golden files, tiny models with random weights, random batches, comparison with a tolerance."""

import dataclasses
import functools
import io
import itertools
import os
import signal
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402
from abstractor import AbstractorConfig  # noqa: E402
from inference import loading  # noqa: E402
from llama import LlamaConfig, PackedSequences  # noqa: E402
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, Owl, OwlConfig  # noqa: E402
from training.presets import owl1, owl2  # noqa: E402
from vit import ViTConfig  # noqa: E402
from training.parallel import materialize  # noqa: E402
from weights import load_model  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
GOLDEN_FOLDERS = ("owl1", "owl2", "owl2-bin-shards")
VARIANTS = ("owl1", "owl2")

Numbers = Tensor | float | list[float]

needs_cuda = pytest.mark.cuda

# The tensors are tiny: a second thread only waits. The processes that tests start inherit the number.
N_THREAD = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(N_THREAD)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked cuda where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def restore_process_state():
    """Commands set what holds for the whole process: signal handlers, and which attention computes on a CPU.

    Processes that a later test forks would inherit the handlers, and not end at SIGTERM.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    flash = torch.backends.cuda.flash_sdp_enabled()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.backends.cuda.enable_flash_sdp(flash)


@pytest.fixture(autouse=True)
def float32_by_default(monkeypatch):
    """The dtype that a test does not choose is the same on every CPU."""
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)


def make_config(variant: str, vit: dict = {}, abstractor: dict = {}, llama: dict = {}) -> OwlConfig:
    """A tiny configuration; the three dictionaries replace fields of its parts."""
    parts = (
        ViTConfig(image_size=16, patch_size=8, n_layer=2, n_head=2, n_embd=16, n_mlp=24),
        AbstractorConfig(n_query=3, n_layer=2, n_head=2, n_embd=16, n_mlp=20, n_out=32, dropout=0.0),
        LlamaConfig(vocab_size=40, context=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, n_mlp=40),
    )
    changed = [dataclasses.replace(part, **changes) for part, changes in zip(parts, (vit, abstractor, llama))]
    return {"owl1": owl1, "owl2": owl2}[variant](*changed)


@torch.no_grad()
def make_owl(config: OwlConfig, seed: int = 0) -> Owl:
    """A model whose every parameter is random and affects the output, norm weights and biases included."""
    generator = torch.Generator().manual_seed(seed)
    model = Owl(config)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            width = parameter.shape[1] if parameter.dim() == 2 else parameter.shape[-1]
            parameter.normal_(std=1.2 / width**0.5, generator=generator)
    return model.eval()


@functools.cache
def small_vocab_owl(variant: str = "owl2", context: int = 64) -> Owl:
    """A model with 12 tokens, so that </s> is selected often, and grouped heads. Shared: do not modify it."""
    model = make_owl(make_config(variant, llama={"vocab_size": 12, "context": context, "n_kv_head": 2}), seed=5)
    model.llama.lm_head.weight.data[model.config.llama.eos_id] *= 1.3
    return model


def build(config: OwlConfig, tensors: Iterable[tuple[str, Tensor]]) -> Owl:
    """A model with the float32 weights of (name, tensor) pairs."""
    with torch.device("meta"):
        model = Owl(config)
    materialize(model, tensors, "cpu")
    return model


def make_row(config: OwlConfig, length: int, n_image: int, generator: torch.Generator) -> Tensor:
    """A random prompt [T]: `length` text tokens (ids 3 and up) with n_image images at random positions."""
    ids = torch.randint(3, config.llama.vocab_size, (length,), generator=generator).tolist()
    for _ in range(n_image):
        position = int(torch.randint(0, len(ids) + 1, (1,), generator=generator))
        while 0 < position < len(ids) and ids[position - 1] == ids[position] == IMAGE_TOKEN_ID:
            position -= 1  # not inside another image
        ids[position:position] = [IMAGE_TOKEN_ID] * config.n_visual_tokens
    return torch.tensor(ids)


def make_images(config: OwlConfig, n_image: int, generator: torch.Generator) -> Tensor | None:
    """Random images [n_image, 3, image_size, image_size], or None if n_image is 0."""
    if n_image == 0:
        return None
    return torch.randn(n_image, 3, config.image_size, config.image_size, generator=generator)


def pad_rows(rows: list[Tensor], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Pads rows on the right. Returns ids [B, T] and lengths [B]."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    return ids, torch.tensor([len(row) for row in rows])


class Batch(NamedTuple):
    """Rows padded on the right, and each row alone."""

    ids: Tensor  # [B, T]
    images: Tensor | None  # [N, 3, S, S], of all rows
    lengths: Tensor  # [B]
    rows: list[tuple[Tensor, Tensor | None]]  # ids [1, T] and images of each row


def make_batch(config: OwlConfig, sizes: Iterable[tuple[int, int]], seed: int = 0) -> Batch:
    """A random batch. sizes: (number of text tokens, number of images) of each row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(make_row(config, *size, generator), make_images(config, size[1], generator)) for size in sizes]
    images = [images for _, images in rows if images is not None]
    ids, lengths = pad_rows([ids for ids, _ in rows], filler=7)
    return Batch(ids, torch.cat(images) if images else None, lengths, [(ids[None], images) for ids, images in rows])


def make_packed(ids: Tensor, labels: Tensor, lengths: list[int]) -> PackedSequences:
    """Boundaries of a packed row, ids and labels [1, T], from the lengths of its sequences."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    supervised = (labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0]
    return PackedSequences(cu_seqlens, max(lengths), int((ids == IMAGE_TOKEN_ID).sum()), supervised)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar with these (name, content) members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def collect(tokens: Iterable[Tensor]) -> Tensor:
    """Generates to the end. Returns the tokens [B, steps]."""
    steps = list(tokens)
    return torch.stack(steps, dim=1) if steps else torch.zeros(0, 0, dtype=torch.int64)


def assert_close(actual: Numbers, expected: Numbers, tolerance: float = 1e-5, name: str = "") -> None:
    """Checks that numbers are equal within `tolerance` times the largest magnitude in `expected`.

    float32 rounds by 6e-8, and processors differ in the order of their sums. On all that were tried, results differed
    by at most half the tolerance of their test; a wrong epsilon or a token that should be hidden exceeds it.
    """
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    atol = tolerance * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss for each parameter, by name; zero where the loss does not depend on it."""
    names, parameters = zip(*module.named_parameters())
    values = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, values))


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 4e-5) -> None:
    """Checks each gradient within `tolerance` times its largest magnitude, but at least 5 % of the largest of all.

    (The gradient of a key bias is exactly 0, computed as a sum of numbers that cancel.)
    """
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        atol = tolerance * max(gradient.abs().max().item(), 0.05 * largest)
        message = f"gradient of {name}: "
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=atol, msg=lambda text: message + text)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[Owl, dict[str, Tensor]]]:
    """golden(name) -> (model, tensors) of a golden model. Shared: do not modify the model."""
    return functools.cache(lambda name: (load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")))


@pytest.fixture
def no_near_ties(monkeypatch):
    """Fails a test in which rounding could select another token: each must also be selected from logits with noise.

    The noise is 1e-5 of the largest logit, more than different kernels and processors differ by. Such a test needs
    another seed.
    """
    torch.manual_seed(0)  # of samples without a seed
    rng = torch.Generator().manual_seed(0)
    select = generate.sample_token

    def select_clearly(logits: Tensor, sampling: generate.Sampling, uniform: Tensor) -> Tensor:
        token = select(logits, sampling, uniform)
        largest = logits.masked_fill(logits.isinf(), 0).abs().amax(dim=-1, keepdim=True)
        noise = torch.rand(16, *logits.shape, generator=rng).to(logits.device) * 2 - 1
        noisy = (logits + 1e-5 * largest * noise).flatten(0, 1)
        others = select(noisy, sampling, uniform.expand(16, len(logits)).flatten())
        assert (others.view(16, -1) == token).all(), "rounding could select another token: use another seed"
        return token

    monkeypatch.setattr(generate, "sample_token", select_clearly)


@pytest.fixture
def record_calls():
    """record_calls(module) -> a list that receives (input, output) of each call, until the test ends."""
    handles = []

    def start(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
        calls = []
        handles.append(module.register_forward_hook(lambda _, args, output: calls.append((args[0], output))))
        return calls

    yield start
    for handle in handles:
        handle.remove()
