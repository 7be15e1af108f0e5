"""The benchmarks in tools/, on tiny models: that they run, their numbers, and errors in one line."""

import json
import re
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import GOLDEN, make_config, make_owl
from inference import fast_decode
from inference.quantize import quantize
from runs import run_main
from tools import bench_data, bench_generate, bench_train
from training.distributed import Dist

TINY = ("--preset", "tiny-owl2", "--length", 5, "--new-tokens", 6, "--repeats", 1, "--threads", 1)
TOKENIZER = ("--tokenizer", GOLDEN / "text")


def write_data(folder, **more: str):
    question = "<image>What?" if "image" in more else "What?"
    row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]}
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    (folder / "data.json").write_text(json.dumps([row | more]))
    return folder / "data.json"


@pytest.mark.parametrize("more", [(), ("--lora-rank", 4), ("--freeze-vit", "--recompute"), ("--stage", 1)])
def test_train(more):
    """tokens/s and images/s follow from ms/step; no MFU on a CPU."""
    flags = ("--preset", "tiny-owl2", "--micro", 3, "--length", 11, "--steps", 2)
    *_, line = run_main(bench_train.main, *flags, *more)[1].splitlines()
    milliseconds, tokens, images, mfu, memory, _, predicted = line.removesuffix(" GB").split()[-7:]
    seconds = int(milliseconds) / 1000
    assert mfu == "-" and 0.1 < float(memory) < 20 and float(predicted) < 0.1
    rounding = 0.02 + 1 / int(milliseconds)
    assert float(images) == pytest.approx(3 / seconds, rel=rounding)
    assert int(tokens.replace(",", "")) == pytest.approx(3 * (11 + 9) / seconds, rel=rounding)  # 9 visual tokens


def test_data(tmp_path):
    flags = ("--data", write_data(tmp_path, image="a.png"), "--image-size", 28, "--images", 10, *TOKENIZER)
    stdout = run_main(bench_data.main, *flags)[1]
    assert re.search(r"^10 images .* \d+ images/s on one core$", stdout, re.MULTILINE)


def test_generate(monkeypatch):
    """A row for each kind of weights, compiled or not, and batch size; then a comparison with transformers."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(fast_decode, "compile_step", lambda: fast_decode.decode_step)  # compiling takes a minute
    monkeypatch.setattr(bench_generate, "BATCH_SIZES", (1, 3))
    monkeypatch.setattr(bench_generate, "N_PREFILL", 8)
    stdout = run_main(bench_generate.main, *TINY, "--precision", "bf16", "--compile")[1]
    rows = re.findall(r"^(\w+(?:, compiled)?) +(\d+)(?: +[\d.,]+){6} +\d+ % +[\d.]+ GB$", stdout, re.MULTILINE)
    names = [name + compiled for name in ("bf16", "int8", "int4") for compiled in ("", ", compiled")]
    assert rows == [(name, n) for name in names for n in "13"]

    assert "6 of 6 tokens are the same" in stdout
    prefill, decoding = (
        re.findall(r"^(\w+.*?) +([\d.]+) ms +([\d.]+)$", part, re.MULTILINE)
        for part in stdout[stdout.index("6 of 6") :].split("decoding, one token")
    )
    assert [name for name, _, _ in prefill] == ["transformers", "owlet, bf16", "owlet, int8", "owlet, int4"]
    assert [name for name, _, _ in decoding][2:] == [f"owlet, {name}" for name in names]
    for part in (prefill, decoding):
        best = min(float(time) for name, time, _ in part if name.startswith("transformers"))
        assert all(float(speedup) == pytest.approx(best / float(time), rel=0.05, abs=0.01) for _, time, speedup in part)


def test_numbers_of_a_row(monkeypatch):
    """From given times: tokens/s excludes the first token; GB/s is of the median step."""
    monkeypatch.setattr(bench_generate, "token_times", lambda *_: [0.5, 1.5, 1.6, 1.7])  # one slow step
    monkeypatch.setattr(bench_generate, "bytes_per_step", lambda _, batch_size, n_cached: 10**7 * batch_size * n_cached)
    decoder = SimpleNamespace(model=make_owl(make_config("owl2")))
    args = Namespace(length=2, new_tokens=4, repeats=3)
    line = bench_generate.measure_generation(args, decoder, 3, bandwidth=4e9)
    _, first, speed, step, read, per_second, share, _, _, _ = line.split()
    assert (first, speed, step) == ("500.0", "7.5", "100.00")  # 3 rows x 3 tokens in 1.2 s
    # When half of the tokens are generated, 4 visual, 2 text and 2 new tokens are cached.
    assert (read, per_second, share) == ("0.240", "2", "60")


def test_bytes_per_step():
    """Counted by hand: 2 layers, width 32, MLP and vocabulary of 40, 4 heads of which 2 have keys and values."""
    model = make_owl(make_config("owl2", llama={"n_kv_head": 2}))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40 + 2 * 32  # q and o, k and v, the MLP, two norms: only text's
    weights = 2 * layer + 32 + 40 * 32  # the last norm, lm_head
    row = 32 + 2 * 2 * 16 * 10  # an embedding; in each layer 10 keys and values
    assert bench_generate.bytes_per_step(model.llama, 1, 10) == 4 * (weights + row)
    assert bench_generate.bytes_per_step(model.llama, 3, 10) == 4 * (weights + 3 * row)
    model.bfloat16()
    assert bench_generate.bytes_per_step(model.llama, 3, 10) == 2 * (weights + 3 * row)
    quantize(model.llama, 8)
    padded = 64 + 2  # bytes per output: 64 quantized values and a scale
    layer = (32 + 16 + 16 + 32 + 40 + 40 + 32) * padded + 2 * 32 * 2
    assert bench_generate.bytes_per_step(model.llama, 3, 10) == 2 * layer + 32 * 2 + 40 * padded + 2 * 3 * row


def test_generate_continues_without_memory_or_transformers(monkeypatch):
    def measure(args, decoder, batch_size, bandwidth):
        if batch_size == 8:
            raise torch.cuda.OutOfMemoryError
        return " 1 2 3"

    monkeypatch.setattr(bench_generate, "measure_generation", measure)
    monkeypatch.setitem(sys.modules, "transformers", None)
    stdout = run_main(bench_generate.main, *TINY, "--quantize", "none")[1]
    *rows, comparison = [line for line in stdout.split("memory\n", 1)[1].splitlines() if line]
    names = [(name, n) for name in ("fp32", "bf16") for n in ("1", "8", "32")]
    assert [tuple(line.split()[:2]) for line in rows] == names
    assert ["does not fit" in line for line in rows] == [n == "8" for _, n in names]
    assert "pip install transformers" in comparison


@pytest.mark.parametrize("device, world_size", [("cpu", 2), ("mps", 1)])
def test_generate_needs_one_cpu_or_gpu(device, world_size):
    with pytest.raises(ValueError, match="one CPU or GPU"):
        bench_generate.check_args(Namespace(), Dist(0, world_size, torch.device(device), torch.float32))


@pytest.mark.parametrize(
    "module, arguments, keyword",
    [
        (bench_data, (), "--data"),
        (bench_data, ("--data", "none.json", *TOKENIZER), "none.json"),
        (bench_data, ("--data", "data.json", "--images", 3, *TOKENIZER), "data.json"),  # has no images
        (bench_train, ("--preset", "tiny-owl2", "--micro", 0), "--micro"),
        (bench_train, ("--preset", "tiny-owl2", "--stage", 1, "--lora-rank", 4), "--lora-rank"),
        (bench_generate, ("--preset", "tiny-owl2", "--new-tokens", 2), "--new-tokens"),
        (bench_generate, ("--preset", "tiny-owl2", "--length", 888), "1025"),  # tokens, of a context of 1024
        (bench_generate, ("--device", "nonsense"), "nonsense"),
    ],
)
def test_user_errors(monkeypatch, tmp_path, module, arguments, keyword):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run_main(module.main, *arguments)
    assert code == 2 and keyword in stderr and stderr.count("\n") == 1
