"""The benchmarks, on the smallest owl: that they run, count what they say, and refuse in one line."""

import re
import sys

import pytest
import torch

import bench
import decode
import quantize
from conftest import GOLDEN
from parallel import Place
from test_train import colour_rows, one_thread, talk, write_rows  # noqa: F401


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    bench.main()


@pytest.mark.parametrize("more", [(), ("--lora-rank", 4), ("--freeze-vit", "--recompute"), ("--stage", 1)])
def test_train(monkeypatch, capsys, more):
    """A line: milliseconds a step; tokens and images a second follow from it; no MFU on a CPU."""
    run(monkeypatch, "train", "--preset", "tiny-owl2", "--micro", 3, "--length", 11, "--steps", 2, *more)
    head, _, columns, line = capsys.readouterr().out.splitlines()
    assert "cpu" in head and columns.split()[:2] == ["what", "ms/step"]
    milliseconds, tokens, images, mfu, memory = re.search(r"(\d+) +([\d,]+) +([\d.]+) +(\S+) +([\d.]+) GB$", line).groups()
    seconds = int(milliseconds) / 1000
    assert mfu == "-" and 0.1 < float(memory) < 20
    assert float(images) == pytest.approx(3 / seconds, rel=0.2)
    assert int(tokens.replace(",", "")) == pytest.approx(3 * (11 + 9) / seconds, rel=0.2)  # an image is 9 words


def test_loader(monkeypatch, capsys, tmp_path):
    data = write_rows(tmp_path / "data.json", colour_rows(tmp_path, 4, seed=1))
    run(monkeypatch, "loader", "--data", data, "--image-size", 28, "--images", 10, "--tokenizer", GOLDEN / "text")
    out = capsys.readouterr().out
    assert re.search(r"^10 images read, decoded, resized to 28: \d+ images/s on one core$", out, re.MULTILINE)
    assert "TFLOP for an image" in out and "this GPU" not in out


TINY = ("generate", "--length", 5, "--new-tokens", 6, "--repeats", 1, "--threads", 1, "--preset")


def test_generate(monkeypatch, capsys):
    """The table has a line for each kind of weights, compiled or not, and batch; then come the two comparisons."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(decode, "compiled_step", lambda: decode.take_step)  # compiling takes a minute
    run(monkeypatch, *TINY, "tiny-owl2", "--precision", "bf16", "--compile")
    out = capsys.readouterr().out
    limit = float(re.search(r"^bandwidth of this device: ([\d,]+) GB/s$", out, re.MULTILINE)[1].replace(",", ""))
    assert 0.1 < limit < 1000
    rest = r" +[\d.,]+ +[\d.]+ +[\d.]+ +\d+ +\d+ % +[\d.]+ GB$"
    line = re.compile(r"^(\w+(?:, compiled)?) +(\d+) +([\d.]+) +([\d.]+)" + rest)
    rows = [found.groups() for found in map(line.match, out.splitlines()) if found]
    names = [name + compiled for name in ("bf16", "int8", "int4") for compiled in ("", ", compiled")]
    assert [row[:2] for row in rows] == [(name, B) for name in names for B in ("1", "8", "32")]
    assert all(float(image) > 0 and float(first) > 0 for _, _, image, first in rows)
    assert re.search(r"^decoder alone +[\d.]+ ms +[\d.]+ ms +[+-][\d.]+ %$", out, re.MULTILINE)
    assert re.search(r"^with the image's encoding +[\d.]+ ms +[\d.]+ ms +[+-][\d.]+ %$", out, re.MULTILINE)
    assert "6 of 6 tokens are the same" in out
    reading, saying = out[out.index("6 of 6") :].split("decoding, one token")
    ratios = [re.findall(r"^(\w+.*?) +([\d.]+) ms +([\d.]+)$", part, re.MULTILINE) for part in (reading, saying)]
    assert [name for name, _, _ in ratios[0]] == ["transformers", "owlet, bf16", "owlet, int8", "owlet, int4"]
    assert [name for name, _, _ in ratios[1]][2:] == [f"owlet, {name}" for name in names]
    for part in ratios:
        best = min(float(time) for name, time, _ in part if name.startswith("transformers"))
        for _, time, ratio in part:
            assert float(ratio) == pytest.approx(best / float(time), rel=0.05, abs=0.01)


def test_numbers_of_a_line(monkeypatch, tiny_config, tiny_owl):
    """From known times: tokens a second without the first token; bytes a second of the median step."""
    moments = [0.5, 1.5, 1.6, 1.7]  # one slow step, as the one that CUDA records
    monkeypatch.setattr(bench, "time_answer", lambda owl, ids, images, n: moments)
    monkeypatch.setattr(bench, "bytes_read", lambda llama, B, n_live: 10**7 * B * n_live)
    run_args = ["bench.py", "generate", "--length", "2", "--new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", run_args)
    line = bench.bench_answers(bench.parse(), tiny_owl(tiny_config("owl2")), 3, limit=4e9)
    _, first, speed, step, read, per_second, share, _, _, _ = line.split()
    assert (first, speed, step) == ("500.0", "7.5", "100.00")  # 3 rows x 3 tokens in 1.2 s
    # Half of the answer is there mid-run: 4 image words, 2 words, 2 tokens.
    assert (read, per_second, share) == ("0.240", "2", "60")


def test_bytes_read(tiny_config, tiny_owl):
    """Counted by hand: 2 layers, 32 wide, 40 in the MLP and in the vocabulary, 4 heads with keys for 2."""
    owl = tiny_owl(tiny_config("owl2", llama={"n_kv_head": 2}))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40 + 2 * 32  # q and o, k and v, the MLP, two norms: text's alone
    weights = 2 * layer + 32 + 40 * 32  # the last norm, lm_head
    row = 32 + 2 * 2 * 16 * 10  # a row of embed_tokens; of each layer 10 keys and values
    assert bench.bytes_read(owl.llama, 1, 10) == 4 * (weights + row)
    assert bench.bytes_read(owl.llama, 3, 10) == 4 * (weights + 3 * row)
    owl.bfloat16()
    assert bench.bytes_read(owl.llama, 3, 10) == 2 * (weights + 3 * row)
    quantize.quantize(owl.llama, 8)
    padded = 64 + 2  # bytes of an output: codes for 64 inputs, and a step
    layer = (32 + 16 + 16 + 32 + 40 + 40 + 32) * padded + 2 * 32 * 2
    assert bench.bytes_read(owl.llama, 3, 10) == 2 * layer + 32 * 2 + 40 * padded + 2 * 3 * row


def test_what_does_not_fit_is_said(monkeypatch, capsys):
    """A line without memory does not end the table; nor does a machine without transformers."""

    def answers(args, owl, B, limit):
        if B == 8:
            raise torch.cuda.OutOfMemoryError
        return " 1 2 3"

    monkeypatch.setattr(bench, "bench_answers", answers)
    monkeypatch.setitem(sys.modules, "transformers", None)
    run(monkeypatch, *TINY, "tiny-owl1", "--precision", "bf16", "--quantize", "none")
    table = capsys.readouterr().out.split("memory\n", 1)[1].splitlines()
    assert [line.split(maxsplit=2) for line in table[:3]] == [
        ["bf16", "1", "1 2 3"],
        ["bf16", "8", "does not fit this device's memory"],
        ["bf16", "32", "1 2 3"],
    ]
    assert [line for line in table[3:] if line] == [  # and of an Owl1 there is no module to measure
        "transformers is not installed: `pip install transformers` adds a comparison with it"
    ]


def test_rows_of_a_device(monkeypatch):
    """A GPU computes in bfloat16; --precision and --quantize choose."""
    for device, arguments, names in (
        ("cpu", (), ["fp32", "bf16", "int8", "int4"]),
        ("cuda", (), ["bf16", "int8", "int4"]),
        ("cuda", ("--precision", "fp32"), ["fp32", "int8", "int4"]),
        ("cpu", ("--quantize", "none"), ["fp32", "bf16"]),
        ("cpu", ("--quantize", "int4"), ["int4"]),
    ):
        monkeypatch.setattr(sys, "argv", ["bench.py", "generate", *arguments])
        rows = bench.generate_set(bench.parse(), Place(0, 1, torch.device(device), torch.float32))
        assert list(rows) == names
        wanted = torch.float32 if "fp32" in arguments else torch.bfloat16
        assert all(dtype == wanted for name, (dtype, bits) in rows.items() if bits)


def test_generate_is_of_one_cpu_or_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "generate"])
    for device, world, words in (("cpu", 2, "without torchrun"), ("mps", 1, "not on mps")):
        with pytest.raises(ValueError, match=words):
            bench.check(bench.parse(), Place(0, world, torch.device(device), torch.float32))


def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path):
    text = write_rows(tmp_path / "text.json", [{"conversations": talk("a", "b")}])
    tokenizer = ("--tokenizer", GOLDEN / "text")
    for arguments, words in (
        (("loader",), "--data"),
        (("loader", "--data", tmp_path / "none.json", *tokenizer), "none.json"),
        (("loader", "--data", text, "--images", 3, *tokenizer), "no image"),
        (("train", "--preset", "tiny-owl2", "--micro", 0), "--micro"),
        (("train", "--preset", "tiny-owl2", "--stage", 1, "--lora-rank", 4), "--stage 2"),
        (("train", "--device", "cuda"), "cuda"),
        (("generate", "--preset", "tiny-owl2", "--new-tokens", 2), "--new-tokens"),
        (("generate", "--preset", "tiny-owl2", "--threads", 0), "--threads"),
        (("generate", "--preset", "tiny-owl2", "--length", 888), "1025 tokens together, more than the context of 1024"),
        (("generate", "--device", "cuda"), "cuda"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments)
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and words in last
