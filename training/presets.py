"""Model sizes for training from scratch and for benchmarks (`--preset NAME`), and random initialization."""

from torch import nn

from abstractor import AbstractorConfig
from llama import LlamaConfig
from model import OwlConfig
from vit import ViTConfig


def owl1(vit: ViTConfig, abstractor: AbstractorConfig, llama: LlamaConfig) -> OwlConfig:
    """Combines the three configurations into an Owl1."""
    return OwlConfig("owl1", vit, abstractor, llama)


def owl2(vit: ViTConfig, abstractor: AbstractorConfig, llama: LlamaConfig) -> OwlConfig:
    """Combines the three configurations into an Owl2 and sets the fields in which it differs from Owl1."""
    abstractor.grid_size = vit.grid_size
    abstractor.dropout = 0.0
    llama.adaptive = True
    return OwlConfig("owl2", vit, abstractor, llama)


def resize(config: OwlConfig, image_size: int) -> None:
    """Sets the image size in pixels. Raises ValueError if it is not a multiple of the patch size."""
    if image_size < 1 or image_size % config.vit.patch_size != 0:
        raise ValueError(f"an image size of {image_size} is not a multiple of the patch size {config.vit.patch_size}")
    config.vit.image_size = image_size
    if config.variant == "owl2":
        config.abstractor.grid_size = config.vit.grid_size


def tiny_parts() -> tuple[ViTConfig, AbstractorConfig, LlamaConfig]:
    """A size that two CPU cores train within half an hour."""
    return (
        ViTConfig(image_size=64, patch_size=8, n_layer=4, n_head=4, n_embd=128, n_mlp=512),
        AbstractorConfig(n_query=8, n_layer=2, n_head=4, n_embd=128, n_mlp=344, n_out=128, dropout=0.0),
        LlamaConfig(vocab_size=512, context=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_mlp=344),
    )


def scene_parts() -> tuple[ViTConfig, AbstractorConfig, LlamaConfig]:
    """The embedded model, for the scenes of data/tiny: more layers in the vision encoder and more queries."""
    vit, abstractor, llama = tiny_parts()
    vit.n_layer, abstractor.n_query, llama.vocab_size = 6, 16, 640
    return vit, abstractor, llama


def smol_parts() -> tuple[ViTConfig, AbstractorConfig, LlamaConfig]:
    """SmolLM2-135M (data/smollm/prepare.py) with the vision encoder of the embedded model, for drawn scenes."""
    vit, abstractor, _ = scene_parts()
    llama = LlamaConfig(vocab_size=49152, context=8192, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_mlp=1536)
    llama.norm_eps, llama.rope_theta, llama.tied = 1e-5, 100_000.0, True
    abstractor.n_out = llama.n_embd
    return vit, abstractor, llama


def smol_owl2_plain() -> OwlConfig:
    """Without the modality-adaptive module, for experiments."""
    config = owl2(*smol_parts())
    config.llama.adaptive = False
    return config


def mid_parts() -> tuple[ViTConfig, AbstractorConfig, LlamaConfig]:
    """A size for benchmarks on a laptop, in the proportions of the 7B."""
    return (
        ViTConfig(image_size=448, n_layer=6, n_head=4, n_embd=256, n_mlp=1024),
        AbstractorConfig(n_layer=6, n_head=4, n_embd=256, n_mlp=704, n_out=512),
        LlamaConfig(n_layer=8, n_head=8, n_kv_head=8, n_embd=512, n_mlp=1376),
    )


PRESETS = {
    "owl1-7b": lambda: owl1(ViTConfig(), AbstractorConfig(), LlamaConfig()),
    "owl2-7b": lambda: owl2(ViTConfig(image_size=448), AbstractorConfig(), LlamaConfig()),
    "tiny-owl1": lambda: owl1(*tiny_parts()),
    "tiny-owl2": lambda: owl2(*tiny_parts()),
    "tiny-owl2-scenes": lambda: owl2(*scene_parts()),
    "smol-owl1": lambda: owl1(*smol_parts()),
    "smol-owl2": lambda: owl2(*smol_parts()),
    "smol-owl2-plain": smol_owl2_plain,
    "mid-owl2": lambda: owl2(*mid_parts()),
    "owl2-1b": lambda: owl2(ViTConfig(image_size=448, n_layer=6), AbstractorConfig(n_layer=2), LlamaConfig(n_layer=5)),
}


def init_weights(model: nn.Module) -> nn.Module:
    """Initializes a model, or a part of one, for training from scratch. Returns it.

    A matrix has standard deviation fan_in ** -0.5, so that activations keep their scale.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] in ("cls_token", "position_embedding", "queries", "eos"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)  # equal queries would stay equal in training
    return model
