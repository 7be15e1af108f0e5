"""What the benchmarks share: command-line flags, models and samples with random numbers, and timing."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from command import ArgumentParser
from data.conversations import Sample
from inference.fast_decode import use_column_major_weights
from inference.quantize import quantize
from llama import Llama, Modality
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, Owl, OwlConfig
from training.distributed import PRECISIONS, Dist
from training.options import number
from training.presets import PRESETS


def make_parser(name: str, description: str, length: int) -> ArgumentParser:
    """A parser with the flags that the benchmarks of a model share. length: the default of --length."""
    p = ArgumentParser(prog=f"python -m tools.{name}", description=description)
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    p.add_argument("--precision", choices=PRECISIONS, help="default: cuda bf16, cpu fp32")
    p.add_argument("--preset", choices=sorted(PRESETS), help="default: what suits the device")
    at_least_2 = number(int, lambda x: x >= 2, "2 or more")
    p.add_argument("--length", type=at_least_2, default=length, help=f"text tokens of a sample (default {length})")
    return p


def print_environment(dist: Dist) -> None:
    on_cuda = dist.device.type == "cuda"
    name = torch.cuda.get_device_name(dist.device) if on_cuda else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {dist.world_size} x {dist.device.type} ({name}), {dist.dtype}\n")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Gives a model random weights that preserve the scale of activations (denormal numbers are slow on a CPU)."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():  # quantized: the caller's
            continue
        if tensor.ndim > 1:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)


def random_model(preset: str, device: torch.device, dtype: torch.dtype, bits: int | None = None) -> Owl:
    """A model for inference, always with the same random weights. bits: quantize its decoder to 8 or 4 bits."""
    with torch.device("meta"):
        model = Owl(PRESETS[preset]()).to(dtype).requires_grad_(False).eval()
    model.to_empty(device=device)
    torch.manual_seed(0)
    randomize(model)
    if bits is not None:
        quantize(model.llama, bits)
    use_column_major_weights(model.llama)
    return model


def random_sample(config: OwlConfig, length: int, generator: torch.Generator, n_image: int = 1) -> Sample:
    """A training sample: images, then `length` random text tokens, the second half of them supervised."""
    tokens = torch.randint(3, config.llama.vocab_size, (length,), generator=generator).tolist()
    ids = [IMAGE_TOKEN_ID] * (n_image * config.n_visual_tokens) + tokens
    labels = [IGNORE_INDEX] * (len(ids) - length // 2) + tokens[length - length // 2 :]
    images = torch.randn(n_image, 3, config.image_size, config.image_size, generator=generator)
    return Sample(ids, labels, images)


def random_prompts(model: Owl, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Prompts of an image and `length` text tokens on the model's device: ids [B, T] int64, images [B, 3, S, S]."""
    generator = torch.Generator().manual_seed(0)
    samples = [random_sample(model.config, length, generator) for _ in range(batch_size)]
    device = model.llama.embed_tokens.weight.device
    return torch.tensor([s.ids for s in samples], device=device), torch.cat([s.images for s in samples]).to(device)


def random_embeddings(model: Owl, length: int) -> tuple[Tensor, Modality]:
    """An embedded prompt of an image and `length` text tokens: random x [1, T, n_embd], and the modality of each."""
    ids, _ = random_prompts(model, 1, length)
    x = torch.randn_like(model.llama.embed_tokens(ids.clamp(min=0)))
    return x, Modality.from_mask(ids == IMAGE_TOKEN_ID, model.config.n_visual_tokens)


def run_prefill(llama: Llama, x: Tensor, modality: Modality | None) -> None:
    """Processes embedded prompts [B, T, n_embd], filling a new cache; without lm_head."""
    llama(x, modality, llama.make_cache(*x.shape[:2]))


def text_weights(llama: Llama) -> dict[str, Tensor]:
    """The decoder's tensors for text tokens, under the names of a plain LLaMA."""
    tensors = llama.state_dict()
    return {name.replace("multiway.0.", ""): x for name, x in tensors.items() if "multiway.1." not in name}


def synchronized_time(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def time_call(device: torch.device, call: Callable[..., object], *arguments: object, **named: object) -> float:
    """The seconds that a call takes on the device."""
    start = synchronized_time(device)
    call(*arguments, **named)
    return synchronized_time(device) - start


def interleaved_medians(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of the seconds that each call returns, over some rounds of all calls after a warm-up round.

    The order is random in each round, since what a call leaves in the CPU's caches affects the next.
    """
    rng = random.Random(0)
    seconds = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name in rng.sample(list(calls), len(calls)):
            seconds[name].append(calls[name]())
    return {name: median(measured[1:]) for name, measured in seconds.items()}


def reset_peak_memory(device: torch.device) -> None:
    """Restarts the measurement of training.monitor.peak_memory, where the system can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif device.type == "cpu" and Path("/proc/self/clear_refs").exists():  # Linux
        Path("/proc/self/clear_refs").write_text("5")
