"""How fast, and near to which limit: the training step without its data, and the data without the training.

    python bench.py train                                       the benchmark set of this device (below)
    python bench.py train --preset mid-owl2 --stage 2 --freeze-vit --micro 2 --length 256
    python bench.py train --preset owl2-7b --stage 2 --recompute --micro 4 --length 2048
    torchrun --nproc_per_node=8 bench.py train --preset owl2-7b --stage 2
    python bench.py loader --data 'laion/*.tar' --image-size 224

`train` takes steps of a stage with random weights on random samples (each one image and --length words) and prints, of
the median step: tokens/s, images/s, MFU (the share of the device's FLOP/s that the step's FLOPs, counted once, take up;
cost.py) and the peak memory. On CUDA memory is what torch's tensors took; on a CPU, the whole process.

`loader` reads samples as training does, in one process, and prints how many images a core decodes and resizes in a
second, and the most that this machine's GPU could consume of them in stage 1.
"""

import argparse
import gc
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import train_stage1
import train_stage2
from cost import peak_flops, train_flops
from data.conversations import Conversations, Sample, collate
from data.image import DEFAULT_FIT
from data.text import Tokenizer
from launch import fail
from model import IGNORE, IMAGE_ID, PRESETS, Owl, OwlConfig
from parallel import PRECISIONS, Place, choose_fsdp, ready, shard, start_process, total, with_ddp
from train import Run, make_optimizer, take_step
from watch import peak_memory

HEADER = f"{'what':<44}{'ms/step':>9}{'tokens/s':>10}{'images/s':>10}{'MFU':>9}{'memory':>10}"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("train", "loader"))
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    p.add_argument("--precision", choices=PRECISIONS, help="default: cuda bf16, cpu fp32")
    g = p.add_argument_group("train")
    g.add_argument("--preset", choices=sorted(PRESETS), help="without it: a set of benchmarks that suits the device")
    g.add_argument("--stage", type=int, choices=(1, 2), default=2)
    g.add_argument("--lora-rank", type=int, default=0, help="0: none (default)")
    g.add_argument("--freeze-vit", action="store_true")
    g.add_argument("--micro", type=int, default=2, help="samples a step on each device (default 2)")
    g.add_argument("--length", type=int, default=256, help="words of each sample, beside its image (default 256)")
    g.add_argument("--steps", type=int, default=5, help="steps measured, after one that is not (default 5)")
    g.add_argument("--parallel", choices=("ddp", "fsdp"), help="as in training")
    g.add_argument("--recompute", action="store_true", help="activation checkpointing")
    g.add_argument("--compile", action="store_true")
    g = p.add_argument_group("loader")
    g.add_argument("--data", metavar="SOURCE", help="a .json or .jsonl file, or tar shards")
    g.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: file's folder)")
    g.add_argument("--tokenizer", metavar="PATH", default="checkpoints/tiny-owl2")
    g.add_argument("--image-size", type=int, default=224)
    g.add_argument("--crop-scale", type=float, default=0.5, help="as in stage 1 (default 0.5)")
    g.add_argument("--images", type=int, default=1000, help="how many to read (default 1000)")
    return p.parse_args()


# --- the training step -------------------------------------------------------------------------------


def ready_run(args: argparse.Namespace, place: Place) -> Run:
    """A run of the stage with random weights and without data."""
    config = PRESETS[args.preset]()
    recipe = (train_stage1, train_stage2)[args.stage - 1].RECIPES[config.style]
    config.resize(min(recipe.image_size, config.image_size))
    with torch.device("meta"):
        model = Owl(config)
    if args.stage == 1:
        train_stage1.choose_trained(model)
    else:
        train_stage2.choose_trained(model, args.lora_rank, 2.0 * args.lora_rank, 0.05, False)
    if args.freeze_vit:
        model.vit.requires_grad_(False)
    ready(model, place, args.recompute, args.compile)
    fsdp = choose_fsdp(args.parallel, model, place)
    if fsdp:
        shard(model, place)
    model.to_empty(device=place.device)
    with torch.no_grad():  # as init_weights: what passes through keeps its size (vanishing numbers are slow on a CPU)
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
            else:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    return Run(args, recipe, place, fsdp, model.train(), make_optimizer(model, recipe), data=None, val=None)


def make_sample(config: OwlConfig, length: int, generator: torch.Generator) -> Sample:
    """An image and `length` random words, of which the second half is supervised."""
    words = torch.randint(3, config.llama.vocab_size, (length,), generator=generator).tolist()
    ids = [IMAGE_ID] * config.image_words + words
    labels = [IGNORE] * (len(ids) - length // 2) + words[length - length // 2 :]
    images = torch.randn(1, 3, config.image_size, config.image_size, generator=generator)
    return Sample(ids, labels, images)


def bench_train(args: argparse.Namespace, place: Place) -> str:
    """Measures a stage's step, and returns a line of the table."""
    gc.collect()
    if place.device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the most memory that there was so far
    run = ready_run(args, place)
    model = with_ddp(run.model, place, run.fsdp)
    generator = torch.Generator().manual_seed(place.rank)
    batch = collate([make_sample(run.model.config, args.length, generator) for _ in range(args.micro)])
    flops = train_flops(run.model, batch.n_image, batch.starts.diff().tolist(), batch.n_supervised)
    n_supervised, n_token, n_image, flops = total(place, batch.n_supervised, batch.n_token, batch.n_image, flops)
    seconds = []
    for step in range(1 + args.steps):
        start = time.perf_counter()
        take_step(run, model, [batch], n_supervised)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if step == 0 and place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    middle = median(seconds[1:])
    peak = peak_flops(place.device)
    mfu = f"{100 * flops / middle / (peak * place.world):.1f} %" if peak else "-"
    what = f"{args.preset} stage {args.stage}, {args.micro} x ({args.length} + image)"
    what += f", LoRA {args.lora_rank}" if args.lora_rank else ""
    what += ", ViT frozen" if args.freeze_vit else ""
    return (
        f"{what:<44}{1000 * middle:>9.0f}{n_token / middle:>10,.0f}{n_image / middle:>10.1f}{mfu:>9}"
        f"{peak_memory(place.device) / 1e9:>7.1f} GB"
    )


def train_set(args: argparse.Namespace, place: Place) -> list[argparse.Namespace]:
    """The benchmarks of a device: mid-owl2's three kinds of training on a CPU, the 7B's on a GPU."""

    def case(**changes: object) -> argparse.Namespace:
        return argparse.Namespace(**vars(args) | changes)

    if args.preset:
        return [args]
    if place.device.type == "cpu":
        return [
            case(preset="mid-owl2", stage=1),
            case(preset="mid-owl2", stage=2),
            case(preset="mid-owl2", stage=2, freeze_vit=True),
            case(preset="mid-owl2", stage=2, lora_rank=16),
        ]
    big = {"preset": "owl2-7b", "recompute": True}
    return [
        case(**big, stage=1, micro=64, length=64),
        case(**big, stage=2, micro=8, length=1983, lora_rank=128),
        case(**big, stage=2, micro=4, length=1983),
    ]


# --- the data ----------------------------------------------------------------------------------------


def bench_loader(args: argparse.Namespace, place: Place) -> None:
    """Prints how fast one core reads samples, and how fast the GPU could consume them."""
    if not args.data:
        raise ValueError("give the data to read: --data SOURCE")
    torch.set_num_threads(1)
    config = PRESETS["owl2-7b"]()
    config.resize(args.image_size)
    tokenizer = Tokenizer(args.tokenizer)
    fit = DEFAULT_FIT[config.style]
    shape = (config.style, config.image_words, args.image_size, 2048)
    data = Conversations(args.data, tokenizer, *shape, fit, args.image_root, args.crop_scale)
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
    with torch.device("meta"):
        model = Owl(config)
    train_stage1.choose_trained(model)
    flops = train_flops(model, 1, [config.image_words + 30], 20)
    print(f"stage 1 of an Owl2-7B takes {flops / 1e12:.2f} TFLOP for an image with a caption of 20 tokens")
    peak = peak_flops(place.device)
    if peak:
        print(f"so this GPU consumes at most {peak / flops:.0f} images/s: {peak / flops / speed:.0f} cores feed it")


def main() -> None:
    args = parse()
    try:
        place = start_process(args.device, args.precision)
        if args.what == "loader":
            bench_loader(args, place)
            return
        if args.micro < 1 or args.length < 2 or args.steps < 1 or args.lora_rank < 0:
            raise ValueError("--micro, --steps are 1 or more, --length 2 or more, --lora-rank 0 or more")
        if args.lora_rank > 0 and args.stage == 1:
            raise ValueError("--lora-rank is for --stage 2")
    except (ValueError, OSError) as error:
        fail(error)
    name = f"{torch.get_num_threads()} threads"
    if place.device.type == "cuda":
        name = torch.cuda.get_device_name(place.device)
    if place.is_first:
        print(f"torch {torch.__version__}, {place.world} x {place.device.type} ({name}), {place.dtype}\n\n{HEADER}")
    for case in train_set(args, place):
        try:
            line = bench_train(case, place)
        except torch.cuda.OutOfMemoryError:
            line = f"{case.preset} stage {case.stage}: does not fit this device's memory"
        if place.is_first:
            print(line, flush=True)


if __name__ == "__main__":
    main()
