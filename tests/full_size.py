"""Loads an Owl2-7B at its full size: how long it takes, and how much memory.

    python tests/full_size.py write FOLDER --format bin           33 .bin shards, as the released ones (16 GB)
    python tests/full_size.py write FOLDER --format safetensors
    python tests/full_size.py write FOLDER --layers 6             a part that fits the page cache too (4 GB)
    python tests/full_size.py load FOLDER                         into bfloat16, then one image and a few tokens
    python tests/full_size.py load FOLDER --quantize int8

The weights are random (a block of random numbers, over and over): it is the sizes that matter here.
Not a test that `make test` runs: it takes 16 GB of disk, and as much memory.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file

from model import IMAGE_ID, PRESETS, Owl
from weights import load_model, official_config, official_state, write_json

N_SHARD = 33


def write(folder: Path, kind: str, layers: int) -> None:
    config = PRESETS["owl2-7b"]()
    config.llama.n_layer = layers
    with torch.device("meta"):
        model = Owl(config).to(torch.float16)
    shapes = {key: tensor.shape for key, tensor in official_state(model).items() if "pos_embed" not in key}
    shard_bytes = sum(shape.numel() * 2 for shape in shapes.values()) / N_SHARD
    block = torch.randn(1 << 24).mul(0.02).half()
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    shard = {}
    written = 0.0
    number = 1
    names = {"bin": "pytorch_model-{}-of-33.bin", "safetensors": "model-{:05d}-of-00033.safetensors"}
    keys = list(shapes)
    for key in keys:
        shape = shapes[key]
        repeats = -(-shape.numel() // block.numel())
        shard[key] = block.repeat(repeats)[: shape.numel()].reshape(shape).clone()
        index[key] = names[kind].format(number)
        written += shape.numel() * 2
        if written >= number * shard_bytes - 1 and number < N_SHARD or key == keys[-1]:
            save = torch.save if kind == "bin" else save_file
            save(shard, folder / index[key])
            shard = {}
            number += 1
    index_name = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    write_json(folder / index_name, {"metadata": {"total_size": int(written)}, "weight_map": index})
    write_json(folder / "config.json", official_config(model))
    print(f"{written / 1e9:.1f} GB in {len(set(index.values()))} shards")


def load(folder: Path, quantize: str | None) -> None:
    before = peak_gb()
    start = time.perf_counter()
    model = load_model(folder, dtype=torch.bfloat16, quantize=quantize)
    seconds = time.perf_counter() - start
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(f"loaded {size / 1e9:.2f} GB in {seconds:.1f} s; peak memory {peak_gb():.1f} GB ({before:.1f} GB before)")
    block = torch.ones(10**9, dtype=torch.uint8)
    start = time.perf_counter()
    copy = torch.empty_like(block).copy_(block)
    copying = time.perf_counter() - start
    print(f"that is {size / seconds / 1e9:.1f} GB/s; a copy into new memory {len(copy) / copying / 1e9:.1f} GB/s")
    ids = torch.tensor([[1, 11889] + [IMAGE_ID] * model.config.image_words + [29901, 15129]])
    image = torch.randn(1, 3, model.config.image_size, model.config.image_size).bfloat16()
    start = time.perf_counter()
    tokens = []
    for token in model.generate(ids, image, max_new_tokens=4, stop=False):
        tokens.append(int(token))
        print(f"token {len(tokens)} after {time.perf_counter() - start:.1f} s")
    print(f"ids {tokens}; peak memory {peak_gb():.1f} GB")


def peak_gb() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("do", choices=("write", "load"))
    p.add_argument("folder", type=Path)
    p.add_argument("--layers", type=int, default=32, help="of the language model, all else at full size (default 32)")
    p.add_argument("--quantize", choices=("int8", "int4"))
    p.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    args = p.parse_args()
    if args.do == "write":
        write(args.folder, args.format, args.layers)
    else:
        load(args.folder, args.quantize)
