"""tools/plot.py: the curves of runs, and errors for files that are not metrics."""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from runs import run_main
from tools import plot


def write_metrics(folder: Path, n: int, end: str = "") -> Path:
    folder.mkdir(parents=True)
    rows = []
    for step in range(10, 10 * n + 1, 10):
        rows.append({"step": step, "loss": 5 / step, "lr": 1e-3, "tokens_per_s": 900.0 + step})
        if step % 50 == 0:
            rows.append({"step": step, "val_loss": 6 / step})
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_curves_without_null_losses_and_the_truncated_last_line(tmp_path, capsys):
    path = write_metrics(tmp_path / "a", 10, end='\n{"step": 105, "loss": null, "mfu": null}\n{"step": 110, "lo')
    curves = plot.read_curves(path)
    assert curves["loss"] == ([10.0 * i for i in range(1, 11)], [5 / (10 * i) for i in range(1, 11)])
    assert curves["val_loss"] == ([50, 100], [6 / 50, 6 / 100])
    assert curves["tokens_per_s"][1][0] == 910
    assert "line 15" in capsys.readouterr().err


def test_table_of_runs(tmp_path):
    """b has no validation and no throughput."""
    b = {"loss": ([1, 2], [3.0, 2.0]), "val_loss": ([], []), "tokens_per_s": ([], [])}
    lines = plot.table([("a", plot.read_curves(write_metrics(tmp_path / "a", 11))), ("b\x1b", b)]).splitlines()
    assert lines[1].split() == ["a", "0.0455", "0.0600", "100", "0.0600", "960"]
    assert lines[2].split() == ["b\\x1b", "2.0000", "-", "-", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def test_run_names_are_as_short_as_possible(tmp_path):
    paths = [tmp_path / name / "metrics.jsonl" for name in ("x/stage1", "x/stage2", "y/stage2")]
    assert plot.run_names(paths[:2]) == ["stage1", "stage2"]
    assert plot.run_names(paths) == ["x/stage1", "x/stage2", "y/stage2"]
    assert plot.run_names([paths[0], paths[0]]) == ["stage1", "stage1"]


def test_each_run_has_a_color(tmp_path):
    """In curves.png beside the first file, or in --out. The second run has a NaN and no throughput."""
    pytest.importorskip("matplotlib")
    a, b = write_metrics(tmp_path / "a", 20), tmp_path / "b$c$.jsonl"
    b.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 3}\n{"step": 9, "loss": 1}\n')
    first, second = (tuple(bytes.fromhex(color[1:])) for color in plot.COLORS[:2])
    default, chosen = tmp_path / "a" / "curves.png", tmp_path / "chosen.png"
    for arguments, out, expected in (((a, b), default, {first, second}), ((a, "--out", chosen), chosen, {first})):
        code, printed, err = run_main(plot.main, *arguments)
        assert (code, err) == (0, "") and printed.endswith(f"\n{out}\n")
        image = Image.open(out)
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
        assert image.format == "PNG" and colors & {first, second} == expected


@pytest.mark.parametrize(
    "content, keyword",
    [
        (b"", "loss"),
        (b'{"step": 1, "loss": NaN}\n', "loss"),
        (b'{"step": 1, "loss": 2}\nhello\n{"step": 2, "loss": 2}\n', "line 2"),
        (b"[1, 2]\n", "line 1"),
        (b'{"loss": 2}\n', "line 1"),
        (b'{"step": 1, "loss": "low"}\n', "line 1"),
        (b'{"step": 1, "loss": 1' + 400 * b"0" + b"}\n", "line 1"),
        (b'{"step": 1, "loss": ' + 100_000 * b"[" + b"\n", "line 1"),
        (b"\xff\xfe\x00", "line 1"),
    ],
)
def test_malformed_metrics_are_user_errors(tmp_path, content, keyword):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    code, stdout, stderr = run_main(plot.main, path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and str(path) in stderr and keyword in stderr
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("arguments", [["b/metrics.jsonl"], ["a"], ["a/metrics.jsonl", "--out", "b/x.png"]])
def test_unusable_paths_are_user_errors(tmp_path, monkeypatch, arguments):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "a", 5)
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run_main(plot.main, *arguments)
    assert code == 2 and arguments[-1] in stderr and stderr.count("\n") == 1


def test_only_a_plot_is_replaced(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_metrics(tmp_path / "a", 5)
    assert [run_main(plot.main, path)[0] for _ in range(2)] == [0, 0]
    code, _, stderr = run_main(plot.main, path, "--out", path)
    assert code == 2 and str(path) in stderr and plot.read_curves(path)["loss"][1]
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    content = (tmp_path / "photo.png").read_bytes()
    assert run_main(plot.main, path, "--out", tmp_path / "photo.png")[0] == 2
    assert (tmp_path / "photo.png").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    assert run_main(plot.main, tmp_path / "pipe")[0] == 2


def test_missing_matplotlib_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, stderr = run_main(plot.main, write_metrics(tmp_path / "a", 5))
    assert code == 2 and "pip install matplotlib" in stderr and stderr.count("\n") == 1
