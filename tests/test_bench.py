"""The benchmarks, on the smallest owl: that they run, count what they say, and refuse in one line."""

import re
import sys

import pytest

import bench
from conftest import GOLDEN
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
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments)
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and words in last
