"""What the tests share: the golden files, and tiny owls with random weights."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from abstractor import AbstractorConfig  # noqa: E402
from llama import LlamaConfig  # noqa: E402
from model import IMAGE_ID, Owl, OwlConfig, owl1, owl2  # noqa: E402
from vit import ViTConfig  # noqa: E402
from weights import fill, load_model  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
GOLDEN_FOLDERS = ("owl1", "owl2", "owl2-bin-shards")

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits, above all on a busy machine


def make_config(style: str, vit: dict = {}, abstractor: dict = {}, llama: dict = {}) -> OwlConfig:
    """A tiny configuration; the three dictionaries replace fields of its parts."""
    parts = (
        ViTConfig(image_size=16, patch_size=8, n_layer=2, n_head=2, n_embd=16, n_mlp=24),
        AbstractorConfig(n_query=3, n_layer=2, n_head=2, n_embd=16, n_mlp=20, n_out=32, dropout=0.0),
        LlamaConfig(vocab_size=40, context=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, n_mlp=40),
    )
    changed = [dataclasses.replace(part, **changes) for part, changes in zip(parts, (vit, abstractor, llama))]
    return {"owl1": owl1, "owl2": owl2}[style](*changed)


@torch.no_grad()
def make_owl(config: OwlConfig, seed: int = 0) -> Owl:
    """An owl whose every parameter is random and matters: unlike init_weights, norms and biases are not plain."""
    generator = torch.Generator().manual_seed(seed)
    model = Owl(config)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            width = parameter.shape[1] if parameter.dim() == 2 else parameter.shape[-1]
            parameter.normal_(std=1.2 / width**0.5, generator=generator)
    return model.eval()


def build(config: OwlConfig, tensors) -> Owl:
    """An owl of float32 weights from a stream of (name, tensor)."""
    with torch.device("meta"):
        model = Owl(config)
    fill(model, tensors, "cpu")
    return model


def make_row(config: OwlConfig, length: int, n_image: int, generator: torch.Generator) -> torch.Tensor:
    """A random prompt [T] with `length` words (ids 3 and up) and n_image images at random places among them."""
    words = torch.randint(3, config.llama.vocab_size, (length,), generator=generator).tolist()
    for _ in range(n_image):
        place = int(torch.randint(0, len(words) + 1, (1,), generator=generator))
        while 0 < place < len(words) and words[place - 1] == words[place] == IMAGE_ID:
            place -= 1  # not inside another image
        words[place:place] = [IMAGE_ID] * config.image_words
    return torch.tensor(words)


def make_images(config: OwlConfig, n_image: int, generator: torch.Generator) -> torch.Tensor | None:
    """Random images [n_image, 3, image_size, image_size]; None for none."""
    if n_image == 0:
        return None
    return torch.randn(n_image, 3, config.image_size, config.image_size, generator=generator)


def pad_rows(rows: list[torch.Tensor], filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], lengths [B]): the rows padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    return ids, torch.tensor([len(row) for row in rows])


@pytest.fixture(scope="session")
def golden_folder():
    """golden_folder(name) -> Path of a golden model."""
    return lambda name: GOLDEN / name


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> (model, tensors) of a golden model, read once. Leave the model as it is."""
    read = {}

    def load(name: str) -> tuple[Owl, dict[str, torch.Tensor]]:
        if name not in read:
            read[name] = load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
        return read[name]

    return load


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(style, vit={}, abstractor={}, llama={}) -> OwlConfig."""
    return make_config


@pytest.fixture(scope="session")
def tiny_owl():
    """tiny_owl(config, seed=0) -> Owl with random weights."""
    return make_owl


@pytest.fixture(scope="session")
def random_row():
    """random_row(config, length, n_image, generator) -> ids [T]."""
    return make_row


@pytest.fixture(scope="session")
def random_images():
    """random_images(config, n_image, generator) -> images, or None for none."""
    return make_images


@pytest.fixture(scope="session")
def padded():
    """padded(rows, filler=0) -> (ids [B, T], lengths [B])."""
    return pad_rows
