"""tools/scaling.py: exponents of known costs, all tables of a tiny model, and errors in one line."""

import math
import re
import tarfile

import pytest
import torch

from data.shards import Shards
from data.sources import FileRows
from runs import run_main
from tools import benchmark, scaling
from tools.scaling import exponents, format_table, linear_range
from training.distributed import Dist

CPU = Dist(0, 1, torch.device("cpu"), torch.float32)
SIZES = [1, 2, 4, 8, 16]


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_exponents_of_powers(exponent):
    assert exponents(SIZES, [3.0 * n**exponent for n in SIZES]) == pytest.approx([exponent] * 4)
    assert linear_range(SIZES, [3.0 * n**exponent for n in SIZES]) == (
        "linear from 1 to 16" if exponent == 1 else "nowhere linear"
    )


def test_a_constant_and_a_quadratic_part_limit_the_linear_range():
    costs = [20 + 100 * n + n**2 for n in (1, 10, 100, 1000)]
    assert linear_range([1, 10, 100, 1000], costs) == "linear from 1 to 10"
    assert math.isnan(exponents([1, 2], [0, 5])[0])
    *_, last, _, range_line = format_table("n", SIZES[:2], {"cost": [1.0, 4.0]}).splitlines()
    assert last == "| 2 | 4 (**2.00**) |" and range_line == "- cost: nowhere linear"


def test_a_tiny_run(monkeypatch):
    """A table for each axis, whose cells are numbers; the FLOPs of a batch are exactly linear."""
    monkeypatch.setattr(scaling, "in_new_process", lambda function, *arguments: function(*arguments))
    axes = {name: axis._replace(values=axis.values[:2]) for name, axis in scaling.AXES.items()}
    monkeypatch.setattr(scaling, "AXES", axes)
    flags = ("--preset", "tiny-owl2", "--device", "cpu", "--rounds", 1, "--rows", 400)
    code, stdout, _ = run_main(scaling.main, *flags)
    assert code == 0 and re.findall("^## (.*)", stdout, re.MULTILINE) == [*axes, "data rows"]
    assert len(re.findall(r"^\|[ \d,]+\|( [\d.,e-]+( \([*\d.-]+\))? \|)+$", stdout, re.MULTILINE)) == 4 * 2 + 3 * 3
    assert "- training, GFLOP: linear from 1 to 2" in stdout
    (computed,) = re.findall(r"tar shards.*?\n\| 1,000,000,000, computed \|(.*?)\n", stdout, re.DOTALL)
    assert 4000 <= int(computed.split("|")[2].replace(",", "")) < 4020  # 4 bytes per row


def test_queries_can_be_replaced():
    """The model then computes with as many as it says."""
    model = scaling.create_model("tiny-owl2", CPU.device, CPU.dtype)
    for n_query in (3, 20, 0):
        calls = scaling.stage_calls(model, scaling.Sizes(n_image=2, n_query=n_query), CPU)
        assert all(call() >= 0 for call in calls.values())
        assert model.encode_images(torch.zeros(1, 3, 64, 64)).shape[1] == (n_query or 20) + 1


@pytest.mark.skipif(not scaling.Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_in_a_new_process():
    """Of a call alone: not what its process or the one that started it has used."""
    used = bytearray(300_000_000)
    seconds, megabytes = scaling.in_new_process(scaling.time_and_memory, bytearray, 50_000_000)
    assert len(used) == 300_000_000 and seconds < 10 and 45 < megabytes < 70


def test_the_data_that_is_measured(tmp_path):
    """The shards are readable, links among them; rows are written as a list and as lines; two have the same image."""
    scaling.write_shards(tmp_path / "tar", 25, per_shard=10)
    shards = Shards(str(tmp_path / "tar" / "*.tar"))
    assert len(shards) == 25 and shards.broken == [] and shards[0].keys() == {"jpg", "json", "txt"}
    with tarfile.open(tmp_path / "tar" / "00002.tar") as tar:
        assert len(tar.getnames()) == 5 * 3
    for suffix in (".json", ".jsonl"):
        scaling.write_rows(tmp_path / f"x{suffix}", 4)
        rows = FileRows(tmp_path / f"x{suffix}", merge=False)
        assert [row["id"] for row in rows] == list("0123")
        assert len(FileRows(tmp_path / f"x{suffix}", merge=True)) == 2


@pytest.mark.parametrize("flags", [("--only", "nonsense"), ("--rows", 5), ("--rounds", 0), ("--device", "nonsense")])
def test_user_errors(flags):
    code, _, stderr = run_main(scaling.main, *flags)
    assert code == 2 and str(flags[1]) in stderr and stderr.count("\n") == 1


def test_random_samples_with_several_images():
    model = scaling.create_model("tiny-owl2", CPU.device, CPU.dtype)
    sample = benchmark.random_sample(model.config, 10, torch.Generator().manual_seed(0), n_image=3)
    assert len(sample.ids) == 3 * model.config.n_visual_tokens + 10 and len(sample.images) == 3
