"""The weights that stage 1 starts from: CLIP's vision encoder, a LLaMA, and a random abstractor.

    CLIP folder  (openai/clip-vit-large-patch14) --clip_tensors-->  vit.*         q, k, v fused; positions resized
    random                                                          abstractor.*
    LLaMA folder (huggyllama/llama-7b for Owl1,  --llama_tensors--> llama.*       one weight for both modalities
                  meta-llama/Llama-2-7b-hf for Owl2)

The vision encoder may also be that of an Owl, with its abstractor (vision_tensors). All are streams of (our name,
tensor), as those of weights.hf_tensors; training.parallel.materialize copies them.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from abstractor import Abstractor, sincos_2d
from model import Owl, OwlConfig
from training.presets import init_weights
from vit import ViTConfig
from weights import folder_tensors, hf_tensors, read_config, translate

CLIP_NAMES = {  # substrings of our names in vit.py: CLIP's. CLIP has three Linears for our qkv.
    "cls_token": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "patch_embed": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",  # spelled so
    "post_norm": "post_layernorm",
    "blocks.": "encoder.layers.",
    ".norm": ".layer_norm",
    "attn.proj": "self_attn.out_proj",
}
CLIP_UNUSED = (
    "text_model.",
    "text_projection",
    "visual_projection",
    "logit_scale",
    "vision_model.embeddings.position_ids",
)


def pretrained_tensors(
    config: OwlConfig, clip: str | Path | None, llama: str | Path, vision: str | Path | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for a model that starts from a pretrained vision encoder and a LLaMA.

    clip, llama: model folders. vision: the folder of an Owl, whose vision encoder and abstractor are taken instead of
    CLIP and a random abstractor. What depends on the language model's width is random: abstractor.fc and .eos.
    Only tensors are read from them: epsilons, rope_theta and context are those of the configuration (1e-6 as in the
    released Owl2, where Llama 2's own config.json says 1e-5).
    Raises FileNotFoundError or ValueError as load_model does.
    """
    with torch.device("meta"):
        expected = Owl(config).state_dict()
    abstractor = init_weights(Abstractor(config.abstractor)).state_dict(prefix="abstractor.")
    pretrained = vision_tensors(vision, config, expected) if vision else clip_tensors(Path(clip), config.vit, expected)
    yield from (abstractor | dict(pretrained)).items()
    yield from llama_tensors(Path(llama), expected)


def resize_position_embeddings(
    tensors: Iterable[tuple[str, Tensor]], config: OwlConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yields the same tensors for images of config's size: position embeddings are interpolated or recomputed.

    Owl2's stage 1 runs at 224 pixels, its stage 2 at 448. Nothing changes if the size stays the same.
    """
    for name, tensor in tensors:
        if name == "vit.position_embedding":
            tensor = resize_position_embedding(tensor, config.vit.n_token)
        if name.endswith(".k_pos") and len(tensor) != config.vit.n_token:
            tensor = sincos_2d(config.abstractor.grid_size, config.abstractor.n_embd)
        yield name, tensor


def resize_position_embedding(table: Tensor, n_token: int) -> Tensor:
    """Interpolates learned position embeddings to another square grid of patches.

    Owl2 trains stage 1 at 224 pixels (16 x 16 patches) and stage 2 at 448 (32 x 32). The class token's row is kept;
    the grid is resized (bicubic, in float32). table: [1, 1 + P, C]. Returns [1, n_token, C] in the table's dtype.
    """
    if table.shape[1:2] == (n_token,):
        return table
    if table.ndim != 3 or math.isqrt(table.shape[1] - 1) ** 2 != table.shape[1] - 1:
        raise ValueError(f"position embeddings have shape {list(table.shape)}, not [1, 1 + a square number, C]")
    cls, grid = table[:, :1], table[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    new = round((n_token - 1) ** 0.5)
    image = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, C, old, old]
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    grid = image.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(table.dtype)
    return torch.cat([cls, grid], dim=1)


def clip_tensors(folder: Path, config: ViTConfig, expected: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields CLIP's vision encoder under our names. CLIP's text encoder is not used.

    expected: our names and tensors of the right shapes (on the meta device).
    """
    tensors = {key: tensor for key, tensor in folder_tensors(folder) if not key.startswith(CLIP_UNUSED)}
    for name, target in expected.items():
        if not name.startswith("vit."):
            continue
        if ".qkv." in name:
            # Three Linears become one whose outputs are ordered by head, as in vit.py: [n_head, 3, head_dim, ...].
            _, _, layer, *_, leaf = name.split(".")
            prefix = f"vision_model.encoder.layers.{layer}.self_attn"
            shape = target.chunk(3)[0].shape
            qkv = [take(tensors, f"{prefix}.{letter}_proj.{leaf}", shape, folder) for letter in "qkv"]
            heads = [x.reshape(config.n_head, 1, -1, *x.shape[1:]) for x in qkv]
            yield name, torch.cat(heads, dim=1).reshape(target.shape)
            continue
        key = "vision_model." + translate(name.removeprefix("vit."), CLIP_NAMES)
        if name == "vit.cls_token":
            yield name, take(tensors, key, target.shape[2:], folder)[None, None]
        elif name == "vit.position_embedding":
            # A class token and a square grid of patches, of any size.
            n_token = tensors[key].shape[:1].numel() if key in tensors else 0
            side = math.isqrt(max(n_token - 1, 1))
            table = take(tensors, key, (1 + side**2, config.n_embd), folder)
            yield name, resize_position_embedding(table[None], config.n_token)
        else:
            yield name, take(tensors, key, target.shape, folder)
    refuse_rest(tensors, folder)


def vision_tensors(
    folder: str | Path, config: OwlConfig, expected: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the vision encoder and the abstractor of an Owl, without what only the abstractor of `folder` has (Owl2's
    position embeddings) or what depends on its language model. Its images may have another size than config's."""
    tensors = hf_tensors(folder, read_config(folder))
    for name, tensor in resize_position_embeddings(tensors, config):
        is_projection = name in ("abstractor.eos", "abstractor.fc.weight", "abstractor.fc.bias")
        if name.startswith("vit.") or (name.startswith("abstractor.") and name in expected and not is_projection):
            yield name, tensor


def llama_tensors(folder: Path, expected: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields a LLaMA under our names. Both branches of the modality-adaptive module start from its one weight."""
    tensors = dict(folder_tensors(folder))
    if "llama.lm_head.weight" not in expected:  # tied embeddings: some files have them twice
        tensors.pop("lm_head.weight", None)
    for name, target in expected.items():
        if not name.startswith("llama.") or ".multiway.1." in name:
            continue
        key = name.removeprefix("llama.").replace(".multiway.0.", ".")
        key = key if key.startswith("lm_head.") else f"model.{key}"
        value = take(tensors, key, target.shape, folder)
        yield name, value
        if ".multiway.0." in name:
            yield name.replace(".multiway.0.", ".multiway.1."), value
    refuse_rest(tensors, folder)


def take(tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    """Removes a tensor from `tensors` and returns it. Raises ValueError if it is missing or of another shape."""
    tensor = tensors.pop(key, None)
    if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)} in {tensor.dtype}"
        raise ValueError(f"{folder}: {key} is {found}, the model needs {list(shape)}")
    return tensor


def refuse_rest(tensors: dict[str, Tensor], folder: Path) -> None:
    if tensors:
        raise ValueError(f"{folder} has {len(tensors)} tensors that the model lacks, such as {next(iter(tensors))}")
