"""Measures time and peak memory of loading an Owl2-7B at its full size.

    python tests/full_size.py write FOLDER --format bin           33 .bin shards, like the released ones (16 GB)
    python tests/full_size.py write FOLDER --format safetensors
    python tests/full_size.py write FOLDER --layers 6             a smaller decoder, which fits the page cache too (4 GB)
    python tests/full_size.py load FOLDER                         as bfloat16; then a few tokens about one image
    python tests/full_size.py load FOLDER --quantize int8

The weights are random, one block of numbers repeated: only the sizes matter. Not part of `make test`: it needs 16 GB
of disk and as much memory.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file

from common.files import write_json
from generate import generate
from inference.quantize import BITS, load_quantized
from model import IMAGE_TOKEN_ID, Owl
from training.presets import PRESETS
from weights import hf_config, hf_state_dict

N_SHARD = 33
SHARD_NAMES = {"bin": "pytorch_model-{}-of-33.bin", "safetensors": "model-{:05d}-of-00033.safetensors"}
INDEX_NAMES = {"bin": "pytorch_model.bin.index.json", "safetensors": "model.safetensors.index.json"}


def write(folder: Path, format: str, n_layer: int) -> None:
    """Writes a model folder of random float16 weights in N_SHARD shards of about equal size."""
    config = PRESETS["owl2-7b"]()
    config.llama.n_layer = n_layer
    with torch.device("meta"):
        model = Owl(config).to(torch.float16)
    shapes = {key: tensor.shape for key, tensor in hf_state_dict(model).items() if "pos_embed" not in key}
    total = sum(2 * shape.numel() for shape in shapes.values())
    block = torch.randn(1 << 24).mul(0.02).half()
    folder.mkdir(parents=True, exist_ok=True)
    index, shard, written = {}, {}, 0
    for key, shape in shapes.items():
        repeats = -(-shape.numel() // block.numel())
        shard[key] = block.repeat(repeats)[: shape.numel()].reshape(shape).clone()
        number = len(set(index.values())) + 1
        written += 2 * shape.numel()
        if written >= number * total / N_SHARD - 1:  # the last tensor completes the last shard
            name = SHARD_NAMES[format].format(number)
            save = torch.save if format == "bin" else save_file
            save(shard, folder / name)
            index |= dict.fromkeys(shard, name)
            shard = {}
    write_json(folder / INDEX_NAMES[format], {"metadata": {"total_size": total}, "weight_map": index})
    write_json(folder / "config.json", hf_config(model))
    print(f"{written / 1e9:.1f} GB in {len(set(index.values()))} shards")


def load(folder: Path, quantize: str | None) -> None:
    """Loads the folder and generates four tokens; prints times and peak memory."""
    before = peak_gb()
    start = time.perf_counter()
    model = load_quantized(folder, dtype=torch.bfloat16, to=quantize)
    seconds = time.perf_counter() - start
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(f"loaded {size / 1e9:.2f} GB in {seconds:.1f} s; peak memory {peak_gb():.1f} GB ({before:.1f} GB before)")
    block = torch.ones(10**9, dtype=torch.uint8)
    start = time.perf_counter()
    copy = torch.empty_like(block).copy_(block)
    copying = time.perf_counter() - start
    print(f"that is {size / seconds / 1e9:.1f} GB/s; a copy into new memory {len(copy) / copying / 1e9:.1f} GB/s")
    ids = torch.tensor([[1, 11889] + [IMAGE_TOKEN_ID] * model.config.n_visual_tokens + [29901, 15129]])
    image = torch.randn(1, 3, model.config.image_size, model.config.image_size).bfloat16()
    start = time.perf_counter()
    tokens = []
    for token in generate(model, ids, image, max_new_tokens=4, stop_at_eos=False):
        tokens.append(int(token))
        print(f"token {len(tokens)} after {time.perf_counter() - start:.1f} s")
    print(f"ids {tokens}; peak memory {peak_gb():.1f} GB")


def peak_gb() -> float:
    """Returns the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("do", choices=("write", "load"))
    p.add_argument("folder", type=Path)
    p.add_argument("--layers", type=int, default=32, help="decoder layers; the rest keeps its full size (default 32)")
    p.add_argument("--quantize", choices=BITS)
    p.add_argument("--format", choices=SHARD_NAMES, default="bin")
    args = p.parse_args()
    if args.do == "write":
        write(args.folder, args.format, args.layers)
    else:
        load(args.folder, args.quantize)
