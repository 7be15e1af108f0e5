"""What does the modality-adaptive module cost? (Owl2 section 3.2)

    python experiments/module_cost.py           # a minute or two on two cores, printed as a table

Parameters, FLOPs and memory of an Owl2-7B are counted (cost.py), for a training step on one image and 256 words, all
trained, in bfloat16; what gradients and AdamW take grows as the parameters do. The time of such a step without the
optimizer's part, and of reading the same as a prompt, is measured on mid-owl2 in float32, with and without the module
by turns. (bench.py generate has the time to read a longer prompt.)
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import by_turns, now  # noqa: E402
from cost import activation_bytes, train_flops  # noqa: E402
from model import IGNORE, IMAGE_ID, PRESETS, Owl  # noqa: E402

N_WORD = 256
ROUNDS = 15


def make(preset: str, adaptive: bool, image_size: int) -> Owl:
    config = PRESETS[preset]()
    config.resize(image_size)
    config.llama.adaptive = adaptive
    return Owl(config)


def counted(adaptive: bool) -> list[float]:
    """Of an Owl2-7B: parameters in billions, TFLOPs of a step, GB of weights, GB of a step's activations."""
    with torch.device("meta"):
        model = make("owl2-7b", adaptive, 448).to(torch.bfloat16).train()
    n = sum(parameter.numel() for parameter in model.parameters())
    length = model.config.image_words + N_WORD
    flops = train_flops(model, 1, [length], N_WORD)
    precision = torch.autocast("cpu", torch.bfloat16)
    return [n / 1e9, flops / 1e12, 2 * n / 1e9, activation_bytes(model, 1, length, N_WORD, precision) / 1e9]


def timed_step(model: Owl, device: torch.device, train: bool) -> float:
    """The seconds of a training step without the optimizer's, or of reading a prompt."""
    n_word = model.config.image_words
    ids = torch.cat([torch.full((1, n_word), IMAGE_ID), torch.randint(3, 1000, (1, N_WORD))], dim=1).to(device)
    images = torch.randn(1, 3, model.config.image_size, model.config.image_size, device=device)
    labels = torch.where(ids == IMAGE_ID, IGNORE, ids)
    model.zero_grad()
    start = now(device)
    if train:
        model(ids, images, labels)[1].backward()
    else:
        with torch.inference_mode():
            model(ids, images)
    return now(device) - start


def main() -> None:
    rows = [
        "| | without | with | more |",
        "|---|---|---|---|",
    ]
    names = ("parameters, billions", "TFLOP a training step", "weights in bfloat16, GB", "activations of a step, GB")
    for name, without, with_it in zip(names, counted(False), counted(True)):
        rows.append(f"| Owl2-7B: {name} | {without:.2f} | {with_it:.2f} | {100 * (with_it / without - 1):+.1f} % |")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    models = {adaptive: make("mid-owl2", adaptive, 448).init_weights().to(device) for adaptive in (False, True)}
    for train, name in ((True, "training step"), (False, "reading a prompt")):
        calls = {str(key): lambda key=key: timed_step(models[key], device, train) for key in models}
        without, with_it = (1000 * seconds for seconds in by_turns(calls, ROUNDS).values())
        more = 100 * (with_it / without - 1)
        rows.append(f"| mid-owl2: {name}, ms on {device.type} | {without:.0f} | {with_it:.0f} | {more:+.1f} % |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
