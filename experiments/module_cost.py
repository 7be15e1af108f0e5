"""What does the modality-adaptive module cost? (Owl2 section 3.2)

    python -m experiments.module_cost           # a few minutes on two cores, prints a table

Parameters, FLOPs and memory are computed for Owl2-7B, of a training step of all weights on one image and 256 text
tokens in bfloat16. (The memory of gradients and of AdamW grows with the parameters.)

Times are measured with and without the module, interleaved: of such a step without the optimizer (mid-owl2, float32),
and of the prefill of an image and 512 text tokens (Owl2-7B in bfloat16 on CUDA, mid-owl2 in float32 on a CPU), in the
decoder alone and with the image's encoding.
"""

from dataclasses import replace
from functools import partial

import torch

from command import ArgumentParser, run
from llama import Llama
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, Owl
from tools.benchmark import (
    interleaved_medians,
    random_embeddings,
    random_model,
    random_prompts,
    run_prefill,
    synchronized_time,
    text_weights,
    time_call,
)
from training.flops import train_flops
from training.memory import activation_bytes
from training.presets import PRESETS, init_weights, resize

N_TEXT = 256
ROUNDS = 15


def create_owl2(preset: str, adaptive: bool) -> Owl:
    config = PRESETS[preset]()
    resize(config, 448)
    config.llama.adaptive = adaptive
    return Owl(config)


def compute_costs(adaptive: bool) -> list[float]:
    """For Owl2-7B: billions of parameters, TFLOPs of a step, GB of weights, GB of a step's activations."""
    with torch.device("meta"):
        model = create_owl2("owl2-7b", adaptive).to(torch.bfloat16).train()
    n = sum(parameter.numel() for parameter in model.parameters())
    length = model.config.n_visual_tokens + N_TEXT
    flops = train_flops(model, 1, [length], N_TEXT)
    autocast = torch.autocast("cpu", torch.bfloat16)
    return [n / 1e9, flops / 1e12, 2 * n / 1e9, activation_bytes(model, 1, length, N_TEXT, autocast=autocast) / 1e9]


def training_seconds(model: Owl, device: torch.device) -> float:
    """Seconds of a training step without the optimizer."""
    image_ids = torch.full((1, model.config.n_visual_tokens), IMAGE_TOKEN_ID)
    ids = torch.cat([image_ids, torch.randint(3, 1000, (1, N_TEXT))], dim=1).to(device)
    images = torch.randn(1, 3, model.config.image_size, model.config.image_size, device=device)
    labels = torch.where(ids == IMAGE_TOKEN_ID, IGNORE_INDEX, ids)
    model.zero_grad()
    start = synchronized_time(device)
    model(ids, images, labels)[1].backward()
    return synchronized_time(device) - start


def measure_training(device: torch.device) -> tuple[float, float]:
    """Seconds of a training step of mid-owl2 without and with the module."""
    torch.manual_seed(0)
    models = {adaptive: init_weights(create_owl2("mid-owl2", adaptive)).to(device) for adaptive in (False, True)}
    calls = {str(adaptive): partial(training_seconds, model, device) for adaptive, model in models.items()}
    return tuple(interleaved_medians(calls, ROUNDS).values())


def measure_prefill(preset: str, device: torch.device, rounds: int) -> tuple[float, float, float]:
    """Seconds of a prefill in the decoder without and with the module, and of the image's encoding."""
    model = random_model(preset, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    x, modality = random_embeddings(model, 512)
    with torch.device("meta"):
        plain = Llama(replace(model.config.llama, adaptive=False))
    plain.load_state_dict(text_weights(model.llama), assign=True)  # shares the tensors
    images = random_prompts(model, 1, 2)[1].to(x.dtype)
    calls = {
        "without": partial(time_call, device, run_prefill, plain, x, None),
        "with": partial(time_call, device, run_prefill, model.llama, x, modality),
        "image": partial(time_call, device, model.encode_images, images),
    }
    return tuple(interleaved_medians(calls, rounds).values())


def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    print("| | without | with | more |\n|---|---|---|---|")
    names = ("parameters, billions", "TFLOP per training step", "weights in bfloat16, GB", "activations of a step, GB")
    for name, without, with_it in zip(names, compute_costs(False), compute_costs(True)):
        more = 100 * (with_it / without - 1)
        print(f"| Owl2-7B: {name} | {without:.2f} | {with_it:.2f} | {more:+.1f} % |")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = "owl2-7b" if device.type == "cuda" else "mid-owl2"
    without, with_it, image = measure_prefill(preset, device, 2 * ROUNDS)
    rows = {
        "mid-owl2: training step": measure_training(device),
        f"{preset}: prefill, decoder alone": (without, with_it),
        f"{preset}: prefill, with the image's encoding": (without + image, with_it + image),
    }
    for name, (without, with_it) in rows.items():
        more = 100 * (with_it / without - 1)
        print(f"| {name}, ms on {device.type} | {1000 * without:.0f} | {1000 * with_it:.0f} | {more:+.1f} % |")


if __name__ == "__main__":
    run(main)
