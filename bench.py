"""How fast, and near to which limit: the training step without its data, the data without the training, and answers.

    python bench.py train                                       the benchmark set of this device (below)
    python bench.py train --preset mid-owl2 --stage 2 --freeze-vit --micro 2 --length 256
    python bench.py train --preset owl2-7b --stage 2 --recompute --micro 4 --length 2048
    torchrun --nproc_per_node=8 bench.py train --preset owl2-7b --stage 2
    python bench.py loader --data 'laion/*.tar' --image-size 224
    python bench.py generate                                    the weights in bf16, int8 and int4, on a CPU in fp32 too
    python bench.py generate --precision bf16 --quantize int8 --compile
    python bench.py quantize                                    what bf16, int8 and int4 save and change

`train` takes steps of a stage with random weights on random samples (each one image and --length words) and prints, of
the median step: tokens/s, images/s, MFU (the share of the device's FLOP/s that the step's FLOPs, counted once, take up;
cost.py) and the peak memory. On CUDA memory is what torch's tensors took; on a CPU, the whole process.

`loader` reads samples as training does, in one process, and prints how many images a core decodes and resizes in a
second, and the most that this machine's GPU could consume of them in stage 1.

`generate` answers with random weights: each row of a batch reads an image and --length words and goes on for
--new-tokens, whatever it says. On CUDA that is Owl2-7B, on a CPU mid-owl2 in some ten minutes. Of several runs the
median:

    image ms     for the batch's images to become image words
    first ms     until the first token is there, image ms included
    tokens/s     of all rows together, from the first token to the last
    ms/step      of the median step: a token for each row (on CUDA the first steps take longer, since one is recorded)
    read GB      what a step must read: the decoder's weights for text, once, and each row's keys and values, mid-run
    GB/s, share  how fast the median step reads that, and the share of this device's bandwidth: that of a large copy in
                 the same run, bytes read and bytes written. (A CPU whose caches hold the weights may pass 100 %.)
    memory       as in `train`

Then `generate` compares, by turns, so that whatever else the machine does hits all alike: the prefill of 512 words and
an image with and without the modality-adaptive module, and on a CPU both prefill and decoding with transformers' LLaMA.

`quantize` prints the sizes of the 7B, and how far outputs move from those in float32: of single Linears as large as the
7B's, and the logits of the embedded model and of mid-owl2. (Random weights, as all but the embedded ones are here, are
the hardest case.)
"""

import argparse
import dataclasses
import gc
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm

import decode
import quantize
import train_stage1
import train_stage2
from cost import peak_flops, train_flops
from data.conversations import Conversations, Sample, collate
from data.image import DEFAULT_FIT
from data.text import Tokenizer
from launch import fail
from llama import Llama, Split
from model import IGNORE, IMAGE_ID, PRESETS, Owl, OwlConfig
from parallel import PRECISIONS, Place, choose_fsdp, ready, shard, start_process, total, with_ddp
from train import Run, make_optimizer, take_step
from watch import peak_memory
from weights import load_model

HEADER = f"{'what':<44}{'ms/step':>9}{'tokens/s':>10}{'images/s':>10}{'MFU':>9}{'memory':>10}"
GENERATE_HEADER = (
    f"{'what':<23}{'rows':>5}{'image ms':>10}{'first ms':>10}{'tokens/s':>10}{'ms/step':>9}{'read GB':>9}{'GB/s':>8}"
    f"{'share':>8}{'memory':>10}"
)
BATCHES = (1, 8, 32)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("train", "loader", "generate", "quantize"))
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    p.add_argument("--precision", choices=PRECISIONS, help="default: cuda bf16, cpu fp32")
    p.add_argument("--preset", choices=sorted(PRESETS), help="default: what suits the device")
    p.add_argument("--length", type=int, help="words of each sample, beside its image (train: 256, generate: 64)")
    p.add_argument("--compile", action="store_true", help="generate: compiled rows as well (each takes a minute first)")
    g = p.add_argument_group("train")
    g.add_argument("--stage", type=int, choices=(1, 2), default=2)
    g.add_argument("--lora-rank", type=int, default=0, help="0: none (default)")
    g.add_argument("--freeze-vit", action="store_true")
    g.add_argument("--micro", type=int, default=2, help="samples a step on each device (default 2)")
    g.add_argument("--steps", type=int, default=5, help="steps measured, after one that is not (default 5)")
    g.add_argument("--parallel", choices=("ddp", "fsdp"), help="as in training")
    g.add_argument("--recompute", action="store_true", help="activation checkpointing")
    g = p.add_argument_group("loader")
    g.add_argument("--data", metavar="SOURCE", help="a .json or .jsonl file, or tar shards")
    g.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: file's folder)")
    g.add_argument("--tokenizer", metavar="PATH", default="checkpoints/tiny-owl2")
    g.add_argument("--image-size", type=int, default=224)
    g.add_argument("--crop-scale", type=float, default=0.5, help="as in stage 1 (default 0.5)")
    g.add_argument("--images", type=int, default=1000, help="how many to read (default 1000)")
    g = p.add_argument_group("generate")
    g.add_argument("--quantize", choices=("none", *quantize.BITS), help="these rows alone (default: all)")
    g.add_argument("--new-tokens", type=int, default=128, help="of each answer (default 128)")
    g.add_argument("--repeats", type=int, default=3, help="measurements, after one that is not (default 3)")
    g.add_argument("--threads", type=int, default=2, help="of a CPU (default 2)")
    args = p.parse_args()
    if args.length is None:
        args.length = 64 if args.what == "generate" else 256
    return args


def check(args: argparse.Namespace, place: Place) -> None:
    """Raises ValueError for what cannot be measured."""
    if args.what == "train":
        if args.micro < 1 or args.length < 2 or args.steps < 1 or args.lora_rank < 0:
            raise ValueError("--micro, --steps are 1 or more, --length 2 or more, --lora-rank 0 or more")
        if args.lora_rank > 0 and args.stage == 1:
            raise ValueError("--lora-rank is for --stage 2")
    if args.what == "generate":
        if args.length < 2 or args.new_tokens < 3 or args.repeats < 1 or args.threads < 1:
            raise ValueError("--repeats, --threads are 1 or more, --length 2 or more, --new-tokens 3 or more")
        if place.world > 1:
            raise ValueError("generate is measured on one device: start it without torchrun")
        if place.device.type not in ("cpu", "cuda"):
            raise ValueError(f"generate is measured on cpu or cuda, not on {place.device.type}")
        args.preset = args.preset or ("owl2-7b" if place.device.type == "cuda" else "mid-owl2")
        config = PRESETS[args.preset]()
        n, context = config.image_words + args.length + args.new_tokens, config.llama.context
        if n > context:
            raise ValueError(
                f"an image's {config.image_words} words, --length and --new-tokens are {n} tokens together, more than "
                f"the context of {context}"
            )


def empty_peak(device: torch.device) -> None:
    """Forgets the most memory that there was so far."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Random weights, as init_weights: what passes through keeps its size (vanishing numbers are slow on a CPU)."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)


# --- the training step -------------------------------------------------------------------------------


def ready_run(args: argparse.Namespace, place: Place) -> Run:
    """A run of the stage with random weights and without data."""
    config = PRESETS[args.preset]()
    recipe = (train_stage1, train_stage2)[args.stage - 1].RECIPES[config.style]
    config.resize(min(recipe.image_size, config.image_size))
    with torch.device("meta"):
        model = Owl(config)
    if args.stage == 1:
        train_stage1.choose_trained(model, args.freeze_vit)
    else:
        train_stage2.choose_trained(model, args.lora_rank, 2.0 * args.lora_rank, 0.05, False, args.freeze_vit)
    ready(model, place, args.recompute, args.compile)
    fsdp = choose_fsdp(args.parallel, model, place)
    if fsdp:
        shard(model, place)
    model.to_empty(device=place.device)
    draw_weights(model)
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
    empty_peak(place.device)
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


# --- answers -----------------------------------------------------------------------------------------


def generate_set(args: argparse.Namespace, place: Place) -> dict[str, tuple[torch.dtype, int | None]]:
    """The rows of the table: by name, the precision, and the bits of the decoder's weights (None: the precision's).

    Without --precision a CPU computes in float32, and with a second row in bfloat16, as do quantised weights.
    """
    names = ["fp32", "bf16"] if place.device.type == "cpu" else ["bf16"]
    if args.precision:
        names = [args.precision]
    rows = {name: (PRECISIONS[name], None) for name in names}
    rows |= {name: (PRECISIONS[names[-1]], bits) for name, bits in quantize.BITS.items()}
    if args.quantize:
        rows = {name: row for name, row in rows.items() if row[1] == quantize.BITS.get(args.quantize)}
    return rows


def ready_owl(preset: str, place: Place, dtype: torch.dtype, bits: int | None = None) -> Owl:
    """An owl with random weights, always the same ones; its decoder's in 8 or 4 bits if so asked."""
    with torch.device("meta"):
        owl = Owl(PRESETS[preset]()).to(dtype).requires_grad_(False).eval()
    owl.to_empty(device=place.device)
    torch.manual_seed(0)
    draw_weights(owl)
    if bits is not None:
        quantize.quantize(owl.llama, bits)
    decode.lay_out(owl.llama)
    return owl


def make_prompts(owl: Owl, B: int, length: int) -> tuple[Tensor, Tensor]:
    """B prompts of an image and `length` words, on the owl's device: ids [B, T] int64 and images [B, 3, S, S]."""
    generator = torch.Generator().manual_seed(0)
    samples = [make_sample(owl.config, length, generator) for _ in range(B)]
    device = owl.llama.embed_tokens.weight.device
    return torch.tensor([s.ids for s in samples], device=device), torch.cat([s.images for s in samples]).to(device)


def text_weights(llama: Llama) -> dict[str, Tensor]:
    """The tensors that a decoder has for text, under the names that they have in a plain LLaMA."""
    tensors = llama.state_dict()
    return {name.replace("multiway.0.", ""): x for name, x in tensors.items() if "multiway.1." not in name}


def bytes_read(llama: Llama, B: int, n_live: int) -> int:
    """The bytes, as they are stored, that a step must read to make one token for each of B rows.

    Once, the weights for text, lm_head and norms among them; for each row the embedding of its token, and the keys
    and values of its n_live positions.
    """
    config = llama.config
    once = sum(x.nbytes for name, x in text_weights(llama).items() if name != "embed_tokens.weight")
    live = 2 * config.n_layer * config.n_kv_head * config.head_dim * n_live
    return once + B * (config.n_embd + live) * llama.embed_tokens.weight.itemsize


@torch.inference_mode()
def timed(device: torch.device, call: Callable[..., object], *arguments: object, **named: object) -> float:
    """The seconds that a call takes, until the device has done all of it."""
    start = now(device)
    call(*arguments, **named)
    return now(device) - start


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bandwidth(device: torch.device) -> float:
    """The bytes that the device reads and writes in a second when it copies many."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)  # 4 GiB, 256 MiB
    copy = torch.empty_like(source)
    return 2 * source.nbytes / median([timed(device, copy.copy_, source) for _ in range(11)][1:])


def time_answer(owl: Owl, ids: Tensor, images: Tensor | None, n: int) -> list[float]:
    """When each of n tokens was there, in seconds from the start."""
    start = now(ids.device)
    return [time.perf_counter() - start for _ in owl.generate(ids, images, max_new_tokens=n, stop=False)]


def bench_answers(args: argparse.Namespace, owl: Owl, B: int, limit: float) -> str:
    """Measures answers of B rows, and returns the numbers of a line of the table. limit: the device's bytes/s."""
    ids, images = make_prompts(owl, B, args.length)
    time_answer(owl, ids, images, args.new_tokens)  # it may compile
    empty_peak(ids.device)
    image = median(timed(ids.device, owl.encode_images, images) for _ in range(args.repeats))
    runs = [time_answer(owl, ids, images, args.new_tokens) for _ in range(args.repeats)]
    first = median(run[0] for run in runs)
    speed = median(B * (len(run) - 1) / (run[-1] - run[0]) for run in runs)
    step = median(b - a for run in runs for a, b in pairwise(run))
    n_byte = bytes_read(owl.llama, B, ids.shape[1] + args.new_tokens // 2)
    return (
        f"{1000 * image:>10.1f}{1000 * first:>10.1f}{speed:>10,.1f}{1000 * step:>9.2f}{n_byte / 1e9:>9.3f}"
        f"{n_byte / step / 1e9:>8,.0f}{100 * n_byte / step / limit:>6.0f} %{peak_memory(ids.device) / 1e9:>7.1f} GB"
    )


def bench_generate(args: argparse.Namespace, place: Place) -> None:
    """Prints the table of answers."""
    limit = bandwidth(place.device)
    print(f"{args.preset}: an image and {args.length} words, then {args.new_tokens} tokens")
    print(f"bandwidth of this device: {limit / 1e9:,.0f} GB/s\n\n{GENERATE_HEADER}")
    for name, (dtype, bits) in generate_set(args, place).items():
        owl = None  # the one before goes
        torch.compiler.reset()  # else it keeps the models of other rows, and after a few compiles no more
        gc.collect()
        for compiled, B in product((False, True) if args.compile else (False,), BATCHES):
            try:
                owl = owl or ready_owl(args.preset, place, dtype, bits)
                owl.step = decode.compiled_step() if compiled else decode.take_step
                numbers = bench_answers(args, owl, B, limit)
            except torch.cuda.OutOfMemoryError:
                numbers = "  does not fit this device's memory"
            print(f"{name + (', compiled' if compiled else ''):<23}{B:>5}{numbers}", flush=True)


# --- answers, beside others --------------------------------------------------------------------------


def by_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of the seconds that each call returns. In each round all have their turn; the first does not count.

    In another order each time, since what a call leaves in the CPU's caches helps or hinders the next.
    """
    chance = random.Random(0)
    seconds = []
    for _ in range(1 + rounds):
        names = chance.sample(list(calls), len(calls))
        seconds.append({name: calls[name]() for name in names})
    seconds = seconds[1:]
    return {name: median(turn[name] for turn in seconds) for name in calls}


def make_x(owl: Owl) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt of an image and 512 words: x [1, T, n_embd] random, is_image [1, T] bool, images [1, 3, S, S]."""
    ids, images = make_prompts(owl, 1, 512)
    return torch.randn_like(owl.llama.embed_tokens(ids.clamp(min=0))), ids == IMAGE_ID, images


def read_prompt(owl: Owl, llama: Llama, x: Tensor, is_image: Tensor | None) -> Tensor:
    """A prompt through the decoder into a new cache, as generate does it; without lm_head."""
    split = None if is_image is None else Split.of(is_image, owl.config.image_words)
    cache = owl.make_cache()
    cache.grow(x.shape[1])
    return llama(x, split, cache)


def bench_module(args: argparse.Namespace, place: Place) -> None:
    """Prints what the modality-adaptive module adds to reading a prompt, against a plain LLaMA of the same size."""
    owl = ready_owl(args.preset, place, place.dtype)
    x, is_image, images = make_x(owl)
    with torch.device("meta"):
        plain = Llama(dataclasses.replace(owl.config.llama, adaptive=False))
    plain.load_state_dict(text_weights(owl.llama), assign=True)  # the same tensors: they take no memory
    calls = {
        "image": partial(timed, place.device, owl.encode_images, images),
        "with": partial(timed, place.device, read_prompt, owl, owl.llama, x, is_image),
        "without": partial(timed, place.device, read_prompt, owl, plain, x, None),
    }
    image, with_it, without = by_turns(calls, 10 * args.repeats).values()
    print(f"{f'prefill, {x.shape[1]} positions':<44}{'with the module':>18}{'without':>15}")
    for what, rest in (("decoder alone", 0.0), ("with the image's encoding", image)):
        a, b = 1000 * (rest + with_it), 1000 * (rest + without)
        print(f"{what:<44}{a:>15.1f} ms{b:>12.1f} ms{100 * (a / b - 1):>+8.1f} %")


def transformers_llama(transformers: ModuleType, llama: Llama) -> nn.Module:
    """transformers' LlamaForCausalLM in float32, of this decoder's shape and with its weights for text."""
    config = llama.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.n_mlp,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
        )
    )
    tensors = text_weights(llama).items()
    theirs.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": x for name, x in tensors})
    theirs.generation_config.eos_token_id = None  # it goes on, whatever it says
    return theirs.eval()


@torch.inference_mode()
def loop(theirs: nn.Module, ids: Tensor, n: int) -> None:
    """n tokens by the plainest loop there is: forward, take the likeliest, forward."""
    cache = None
    for _ in range(n):
        out = theirs(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values


def per_token(answer: Callable[[int], object], n: int) -> float:
    """Seconds a token after the first: what n tokens take longer than one does."""
    one, all_of_them = (timed(torch.device("cpu"), answer, count) for count in (1, n))
    return (all_of_them - one) / (n - 1)


def compare(args: argparse.Namespace, place: Place) -> None:
    """Prints on a CPU how fast one row is read and continued, beside transformers' in float32."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: `pip install transformers` adds a comparison with it")
        return
    torch.compiler.reset()
    owl, n = ready_owl(args.preset, place, torch.float32), args.new_tokens
    theirs = transformers_llama(transformers, owl.llama)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, owl.config.llama.vocab_size, (1, args.length), generator=generator)
    x, is_image, _ = make_x(owl)

    def say(owl: Owl, step: decode.Step, n: int) -> list[int]:
        owl.step = step
        return [int(token) for token in owl.generate(ids, max_new_tokens=n, stop=False)]

    def be_told(n: int) -> list[int]:
        return theirs.generate(ids, max_new_tokens=n, do_sample=False)[0, args.length :].tolist()

    same = sum(a == b for a, b in zip(say(owl, decode.take_step, n), be_told(n)))
    print(f"transformers {transformers.__version__}, LlamaForCausalLM of the same weights, float32: ", end="")
    print(f"{same} of {n} tokens are the same")
    reading = {"transformers": partial(timed, place.device, theirs.model, inputs_embeds=x, use_cache=True)}
    saying = {
        "transformers, forward in a loop": partial(per_token, partial(loop, theirs, ids), n),
        "transformers, generate()": partial(per_token, be_told, n),
    }
    for name, (dtype, bits) in generate_set(args, place).items():
        owl = ready_owl(args.preset, place, dtype, bits)
        reading[f"owlet, {name}"] = partial(timed, place.device, read_prompt, owl, owl.llama, x.to(dtype), is_image)
        saying[f"owlet, {name}"] = partial(per_token, partial(say, owl, decode.take_step), n)
        if args.compile:
            saying[f"owlet, {name}, compiled"] = partial(per_token, partial(say, owl, decode.compiled_step()), n)
    for what, calls, rounds in (
        (f"prefill, {x.shape[1]} positions", reading, 10 * args.repeats),
        ("decoding, one token", saying, args.repeats),
    ):
        medians = by_turns(calls, rounds)
        best = min(seconds for name, seconds in medians.items() if name.startswith("transformers"))
        print(f"\n{what:<44}{'time':>18}{'times as fast as transformers at its best':>46}")
        for name, seconds in medians.items():
            print(f"{name:<44}{1000 * seconds:>15.2f} ms{best / seconds:>46.2f}")


# --- fewer bits --------------------------------------------------------------------------------------


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.float() - exact).norm() / exact.norm())


@torch.inference_mode()
def bench_quantize() -> None:
    """Prints how large the 7B are in fewer bits, and what these do to outputs."""
    for preset, (name, bits) in product(("owl1-7b", "owl2-7b"), {"bf16": None, **quantize.BITS}.items()):
        with torch.device("meta"):
            owl = Owl(PRESETS[preset]()).bfloat16()
        if bits is not None:
            quantize.quantize(owl.llama, bits)
        print(f"{f'{preset}, {name}':<44}{sum(x.nbytes for x in owl.state_dict().values()) / 1e9:>12.2f} GB")
    print()
    print(f"{'a Linear, random weights and inputs':<44}{'relative error':>15}")
    for n_out, n_in in ((4096, 4096), (11008, 4096), (4096, 11008)):
        torch.manual_seed(0)
        linear, x = nn.Linear(n_in, n_out, bias=False), torch.randn(64, n_in)
        exact = linear(x)
        print(f"{f'{n_in} to {n_out}, bf16':<44}{relative_error(linear.bfloat16()(x.bfloat16()), exact):>15.4f}")
        linear = linear.float()
        for name, bits in quantize.BITS.items():
            few = quantize.QuantizedLinear(n_in, n_out, bits)
            few.set_weight(linear.weight)
            print(f"{f'{n_in} to {n_out}, {name}':<44}{relative_error(few(x.bfloat16()), exact):>15.4f}")
    print(f"\n{'logits':<44}{'relative error':>15}{'KL, nats':>12}{'same likeliest':>17}")
    for what, make in (
        ("checkpoints/tiny-owl2", partial(load_model, Path(__file__).parent / "checkpoints" / "tiny-owl2")),
        ("mid-owl2, random", partial(ready_owl, "mid-owl2", Place(0, 1, torch.device("cpu"), torch.float32))),
    ):
        exact = None
        for name, bits in {"fp32": None, "bf16": None, **quantize.BITS}.items():
            owl = make(dtype=torch.float32)
            ids, images = make_prompts(owl, 8, 64)
            if bits is not None:
                quantize.quantize(owl.llama, bits)
            owl.to(PRECISIONS["fp32" if name == "fp32" else "bf16"])
            logits = owl(ids, images.to(owl.llama.embed_tokens.weight.dtype))[0][ids != IMAGE_ID].float()
            if exact is None:
                exact = logits
                continue
            p, q = exact.log_softmax(dim=-1), logits.log_softmax(dim=-1)
            kl = float((p.exp() * (p - q)).sum(dim=-1).mean())
            same = 100 * float((p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean())
            print(f"{f'{what}, {name}':<44}{relative_error(logits, exact):>15.4f}{kl:>12.1e}{same:>15.1f} %")


def main() -> None:
    args = parse()
    try:
        place = start_process(args.device, args.precision)
        check(args, place)
        if args.what == "loader":
            bench_loader(args, place)
            return
    except (ValueError, OSError) as error:
        fail(error)
    if args.what == "quantize":
        bench_quantize()
        return
    if args.what == "generate" and place.device.type == "cpu":
        torch.set_num_threads(args.threads)
    name = f"{torch.get_num_threads()} threads"
    if place.device.type == "cuda":
        name = torch.cuda.get_device_name(place.device)
    if place.is_first:
        print(f"torch {torch.__version__}, {place.world} x {place.device.type} ({name}), {place.dtype}\n")
    if args.what == "generate":
        bench_generate(args, place)
        print()
        if PRESETS[args.preset]().llama.adaptive:
            try:
                bench_module(args, place)
            except torch.cuda.OutOfMemoryError:
                print("prefill with the module and without: does not fit this device's memory")
            print()
        if place.device.type == "cpu":
            compare(args, place)
        return
    if place.is_first:
        print(HEADER)
    for case in train_set(args, place):
        try:
            line = bench_train(case, place)
        except torch.cuda.OutOfMemoryError:
            line = f"{case.preset} stage {case.stage}: does not fit this device's memory"
        if place.is_first:
            print(line, flush=True)


if __name__ == "__main__":
    main()
