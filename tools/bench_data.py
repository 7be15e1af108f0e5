"""Speed of data loading on one core, and the rate at which stage 1 of Owl2-7B could consume it.

    python -m tools.bench_data --data 'laion/*.tar' --image-size 224

Reads samples as training does (read, decode, crop, resize) in one process, and prints images per second. On a CUDA
device it also prints how many images per second this GPU could train on at its peak FLOP/s.
"""

import argparse
import time

import torch
from tqdm import tqdm

import train_stage1
from command import ArgumentParser, run, user_errors
from data.conversations import Conversations, Sample, SampleSpec
from data.text import Tokenizer
from model import Owl, OwlConfig
from training.distributed import init_distributed
from training.flops import peak_flops, train_flops
from training.options import fraction, positive_int
from training.presets import PRESETS, resize


def parse_args() -> argparse.Namespace:
    p = ArgumentParser(prog="python -m tools.bench_data", description=__doc__)
    p.add_argument("--data", metavar="SOURCE", required=True, help="a .json or .jsonl file, or tar shards")
    p.add_argument("--image-root", metavar="FOLDER", help="base of relative image paths (default: the file's folder)")
    p.add_argument("--tokenizer", metavar="PATH", default="checkpoints/tiny-owl2")
    p.add_argument("--image-size", type=positive_int, default=224)
    p.add_argument("--crop-scale", type=fraction, default=0.5, help="as in stage 1 (default %(default)s)")
    p.add_argument("--images", type=positive_int, default=1000, help="number of images to read (default %(default)s)")
    p.add_argument("--device", help="whose speed is compared (default: cuda if there is one)")
    return p.parse_args()


def loading_speed(args: argparse.Namespace, config: OwlConfig) -> float:
    """Images per second that one core reads. Raises ValueError if the data has no readable image."""
    torch.set_num_threads(1)
    spec = SampleSpec.for_model(config, Tokenizer(args.tokenizer), max_length=2048, crop_scale=args.crop_scale)
    data = Conversations(args.data, spec, image_root=args.image_root)
    n_image = 0
    start = time.perf_counter()
    with tqdm(total=args.images, desc="reading", unit="image", disable=None) as bar:
        for i in range(10 * args.images):
            sample = data[i, i % len(data)]
            found = len(sample.images) if isinstance(sample, Sample) else 0
            n_image += found
            bar.update(found)
            if n_image >= args.images:
                break
    if n_image == 0:
        raise ValueError(f"no image of {args.data} could be read")
    speed = n_image / (time.perf_counter() - start)
    print(f"{n_image} images read, decoded, resized to {args.image_size}: {speed:.0f} images/s on one core")
    return speed


def main() -> None:
    args = parse_args()
    with user_errors():
        dist = init_distributed(args.device)
        config = PRESETS["owl2-7b"]()
        resize(config, args.image_size)
        speed = loading_speed(args, config)
    with torch.device("meta"):
        model = Owl(config)
    train_stage1.choose_trained(model)
    flops = train_flops(model, 1, [config.n_visual_tokens + 30], 20)
    print(f"stage 1 of Owl2-7B takes {flops / 1e12:.2f} TFLOP for an image with a caption of 20 tokens")
    peak = peak_flops(dist.device)
    if peak:
        needed = peak / flops
        print(f"so this GPU consumes at most {needed:.0f} images/s, which {needed / speed:.0f} cores can load")


if __name__ == "__main__":
    run(main)
