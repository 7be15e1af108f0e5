"""Speed of generation with random weights, for bf16, int8 and int4 weights and several batch sizes.

    python -m tools.bench_generate                      bf16, int8 and int4 weights; on a CPU fp32 as well
    python -m tools.bench_generate --precision bf16 --quantize int8 --compile
    python -m tools.bench_generate --preset owl2-1b --rows 1        a CPU at the 7B's width, without the comparison

Each row of a batch reads an image and --length text tokens and generates --new-tokens tokens. The model is Owl2-7B on
CUDA, mid-owl2 on a CPU (about ten minutes). The table shows medians over --repeats runs:

    image ms     encoding the images of the batch
    first ms     time to the first token, image encoding included
    tokens/s     of all rows together, from the first token to the last
    ms/step      median decoding step, one token per row (on CUDA the first steps are slower: warm-up, graph capture)
    read GB      bytes that a step must read: the decoder's weights for text, and the keys and values of each row when
                 half of the tokens have been generated
    GB/s, share  rate at which the median step reads them, and its share of the device's bandwidth, measured in the same
                 run by a large copy, bytes read plus written (above 100 % if a CPU's caches hold the weights)
    memory       peak: of tensors on CUDA, of the whole process on a CPU

On a CPU a comparison with transformers' LLaMA follows, of prefill (an image and 512 text tokens) and of decoding, with
interleaved measurements, so that other load on the machine affects all alike.
"""

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from statistics import median
from types import ModuleType

import torch
from torch import Tensor, nn

from command import run, user_errors
from inference.fast_decode import FastDecoder
from inference.quantize import BITS
from llama import Llama
from tools import benchmark
from tools.benchmark import random_model, text_weights, time_call
from training.distributed import PRECISIONS, Dist, init_distributed
from training.monitor import peak_memory
from training.options import number, positive_int
from training.presets import PRESETS

BATCH_SIZES = (1, 8, 32)
N_PREFILL = 512  # text tokens of the prompt whose prefill is compared
HEADER = f"{'what':<23}{'rows':>5}{'image ms':>10}{'first ms':>10}{'tokens/s':>10}{'ms/step':>9}"
HEADER += f"{'read GB':>9}{'GB/s':>8}{'share':>8}{'memory':>10}"
CPU = torch.device("cpu")


def parse_args() -> argparse.Namespace:
    p = benchmark.make_parser("bench_generate", __doc__, length=64)
    p.add_argument("--quantize", choices=("none", *BITS), help="only these weights (default: all)")
    p.add_argument("--rows", type=positive_int, nargs="+", help="only these batch sizes, no comparison (default: 1 8 32)")
    p.add_argument("--compile", action="store_true", help="compiled decoding as well (each compilation takes a minute)")
    at_least_3 = number(int, lambda x: x >= 3, "3 or more")
    p.add_argument("--new-tokens", type=at_least_3, default=128, help="tokens to generate (default %(default)s)")
    p.add_argument("--repeats", type=positive_int, default=3, help="measured runs, after a warm-up run (default 3)")
    p.add_argument("--threads", type=positive_int, default=2, help="CPU threads (default %(default)s)")
    return p.parse_args()


def check_args(args: argparse.Namespace, dist: Dist) -> None:
    """Sets the default preset. Raises ValueError for a device or lengths that cannot be measured."""
    if dist.world_size > 1 or dist.device.type not in ("cpu", "cuda"):
        raise ValueError(f"generation is measured on one CPU or GPU, without torchrun, not on {dist.device.type}")
    args.preset = args.preset or ("owl2-7b" if dist.device.type == "cuda" else "mid-owl2")
    config = PRESETS[args.preset]()
    n, context = config.n_visual_tokens + args.length + args.new_tokens, config.llama.context
    if n > context:
        raise ValueError(f"an image, --length and --new-tokens are {n} tokens, more than the context of {context}")


def weight_formats(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[torch.dtype, int | None]]:
    """By name: the dtype that is computed in, and the bits of the decoder's weights (None: not quantized).

    Without --precision a CPU has fp32 and bf16 weights. Quantized weights are computed in the last precision.
    """
    names = [args.precision] if args.precision else ["fp32", "bf16"] if device.type == "cpu" else ["bf16"]
    formats = {name: (PRECISIONS[name], None) for name in names}
    formats |= {name: (PRECISIONS[names[-1]], bits) for name, bits in BITS.items()}
    if args.quantize:
        formats = {name: pair for name, pair in formats.items() if pair[1] == BITS.get(args.quantize)}
    return formats


# --- the table ---------------------------------------------------------------------------------------


def bytes_per_step(llama: Llama, batch_size: int, n_cached: int) -> int:
    """Bytes that a decoding step must read, as they are stored.

    Once the weights for text; for each row an embedding, and the keys and values of n_cached positions.
    """
    config = llama.config
    weights = sum(x.nbytes for name, x in text_weights(llama).items() if config.tied or name != "embed_tokens.weight")
    n_row = config.n_embd + 2 * config.n_layer * config.n_kv_head * config.head_dim * n_cached
    return weights + batch_size * n_row * llama.embed_tokens.weight.itemsize


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads and writes in a large copy."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)  # 4 GiB, 256 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / median([time_call(device, target.copy_, source) for _ in range(11)][1:])


def token_times(decoder: FastDecoder, ids: Tensor, images: Tensor, n: int) -> list[float]:
    """The time at which each of n tokens reaches the CPU, in seconds from the start."""
    start = benchmark.synchronized_time(ids.device)
    tokens = decoder.generate(ids, images, max_new_tokens=n, stop_at_eos=False)
    return [time.perf_counter() - start for _ in tokens]


def measure_generation(args: argparse.Namespace, decoder: FastDecoder, batch_size: int, bandwidth: float) -> str:
    """Returns the numbers of a row of the table. bandwidth: of the device, in bytes per second."""
    model = decoder.model
    ids, images = benchmark.random_prompts(model, batch_size, args.length)
    token_times(decoder, ids, images, args.new_tokens)  # warm-up; may compile
    benchmark.reset_peak_memory(ids.device)
    image = median(time_call(ids.device, model.encode_images, images) for _ in range(args.repeats))
    runs = [token_times(decoder, ids, images, args.new_tokens) for _ in range(args.repeats)]
    first = median(times[0] for times in runs)
    speed = median(batch_size * (len(times) - 1) / (times[-1] - times[0]) for times in runs)
    step = median(b - a for times in runs for a, b in pairwise(times))
    n_byte = bytes_per_step(model.llama, batch_size, ids.shape[1] + args.new_tokens // 2)
    line = f"{1000 * image:>10.1f}{1000 * first:>10.1f}{speed:>10,.1f}{1000 * step:>9.2f}{n_byte / 1e9:>9.3f}"
    line += f"{n_byte / step / 1e9:>8,.0f}{100 * n_byte / step / bandwidth:>6.0f} %"
    return f"{line}{peak_memory(ids.device) / 1e9:>7.1f} GB"


def print_generation(args: argparse.Namespace, dist: Dist) -> None:
    """Prints the table."""
    bandwidth = copy_bandwidth(dist.device)
    print(f"{args.preset}: an image and {args.length} text tokens, then {args.new_tokens} new tokens")
    print(f"bandwidth of this device: {bandwidth / 1e9:,.0f} GB/s\n\n{HEADER}")
    for name, (dtype, bits) in weight_formats(args, dist.device).items():
        model = decoder = None  # frees the previous model
        torch.compiler.reset()  # the number of programs that torch compiles is limited
        gc.collect()
        for compile, batch_size in product((False, True)[: 1 + args.compile], args.rows or BATCH_SIZES):
            try:
                model = model or random_model(args.preset, dist.device, dtype, bits)
                if decoder is None or decoder.is_compiled != compile:
                    decoder = FastDecoder(model, compile)
                numbers = measure_generation(args, decoder, batch_size, bandwidth)
            except torch.cuda.OutOfMemoryError:
                numbers = "  does not fit this device's memory"
            print(f"{name + (', compiled' if compile else ''):<23}{batch_size:>5}{numbers}", flush=True)


# --- comparison with transformers --------------------------------------------------------------------


def make_reference(transformers: ModuleType, llama: Llama) -> nn.Module:
    """transformers' LlamaForCausalLM in float32 with the shape and the text weights of this decoder."""
    config = llama.config
    reference_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_mlp,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
    )
    reference = transformers.LlamaForCausalLM(reference_config)
    tensors = text_weights(llama).items()
    reference.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": x for name, x in tensors})
    reference.generation_config.eos_token_id = None  # do not stop at </s>
    return reference.eval()


def loop_reference(reference: nn.Module, ids: Tensor, n: int) -> None:
    """Generates n tokens with transformers' model, without the overhead of its generate()."""
    cache = None
    for _ in range(n):
        out = reference(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values


def generate_reference(reference: nn.Module, ids: Tensor, n: int) -> list[int]:
    return reference.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :].tolist()


def generate_owlet(decoder: FastDecoder, ids: Tensor, n: int) -> list[int]:
    return [int(token) for token in decoder.generate(ids, max_new_tokens=n, stop_at_eos=False)]


def seconds_per_token(generate_n: Callable[..., object], model: object, ids: Tensor, n: int) -> float:
    """Seconds per token after the first: the difference between generating n tokens and one."""
    one = time_call(CPU, generate_n, model, ids, 1)
    return (time_call(CPU, generate_n, model, ids, n) - one) / (n - 1)


def compare_transformers(args: argparse.Namespace) -> None:
    """Prints prefill and decoding times of one row on a CPU, next to those of transformers in float32."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: `pip install transformers` adds a comparison with it")
        return
    torch.compiler.reset()
    model, n = random_model(args.preset, CPU, torch.float32), args.new_tokens
    reference = make_reference(transformers, model.llama)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.llama.vocab_size, (1, args.length), generator=generator)
    x, modality = benchmark.random_embeddings(model, N_PREFILL)
    tokens, expected = generate_owlet(FastDecoder(model), ids, n), generate_reference(reference, ids, n)
    print(f"transformers {transformers.__version__}, LlamaForCausalLM of the same weights, float32: ", end="")
    print(f"{sum(a == b for a, b in zip(tokens, expected))} of {n} tokens are the same")

    prefill = {"transformers": partial(time_call, CPU, reference.model, inputs_embeds=x, use_cache=True)}
    decoding = {
        "transformers, forward in a loop": partial(seconds_per_token, loop_reference, reference, ids, n),
        "transformers, generate()": partial(seconds_per_token, generate_reference, reference, ids, n),
    }
    for name, (dtype, bits) in weight_formats(args, CPU).items():
        model = random_model(args.preset, CPU, dtype, bits)
        prefill[f"owlet, {name}"] = partial(time_call, CPU, benchmark.run_prefill, model.llama, x.to(dtype), modality)
        for compile in (False, True)[: 1 + args.compile]:
            key = f"owlet, {name}" + (", compiled" if compile else "")
            decoding[key] = partial(seconds_per_token, generate_owlet, FastDecoder(model, compile), ids, n)
    print_speedups(f"prefill, {x.shape[1]} positions", prefill, 10 * args.repeats)
    print_speedups("decoding, one token", decoding, args.repeats)


def print_speedups(what: str, calls: dict[str, Callable[[], float]], rounds: int) -> None:
    """Prints the times of calls, and the speedup of each over the fastest of transformers."""
    seconds = benchmark.interleaved_medians(calls, rounds)
    best = min(value for name, value in seconds.items() if name.startswith("transformers"))
    print(f"\n{what:<44}{'time':>18}{'speedup over the fastest of transformers':>46}")
    for name, value in seconds.items():
        print(f"{name:<44}{1000 * value:>15.2f} ms{best / value:>46.2f}")


def main() -> None:
    args = parse_args()
    with user_errors():
        dist = init_distributed(args.device, args.precision)
        check_args(args, dist)
    if dist.device.type == "cpu":
        torch.set_num_threads(args.threads)
    benchmark.print_environment(dist)
    print_generation(args, dist)
    if dist.device.type == "cpu" and args.rows is None:
        print()
        compare_transformers(args)


if __name__ == "__main__":
    run(main)
