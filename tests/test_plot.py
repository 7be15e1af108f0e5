"""The picture of runs, and what is said where there is none to be drawn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import plot
from conftest import ROOT


def write_run(folder: Path, n: int, val: bool = True, end: str = "") -> Path:
    folder.mkdir(parents=True)
    rows = []
    for step in range(10, 10 * n + 1, 10):
        rows.append({"step": step, "loss": 5 / step, "lr": 1e-3, "norm": 1.0, "tokens_per_s": 900.0 + step})
        if val and step % 50 == 0:
            rows.append({"step": step, "val_loss": 6 / step})
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def run(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """plot.py with these arguments: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    code = 0
    try:
        plot.main()
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_curves(tmp_path, capsys):
    path = write_run(tmp_path / "a", 10, end='{"step": 110, "lo')
    curves = plot.read_metrics(path)
    assert curves["loss"] == ([10.0 * i for i in range(1, 11)], [5 / (10 * i) for i in range(1, 11)])
    assert curves["val_loss"] == ([50, 100], [6 / 50, 6 / 100])
    assert curves["tokens_per_s"][1][0] == 910
    assert capsys.readouterr().err == f"note: {path} breaks off in line 13, which is left out\n"


def test_a_loss_that_was_not_finite_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null, "mfu": null}\n{"step": 3, "loss": 1.0}\n')
    assert plot.read_metrics(path)["loss"] == ([1, 3], [2.0, 1.0])


def test_names(tmp_path):
    """As short as tells the runs apart."""
    paths = [tmp_path / name / "metrics.jsonl" for name in ("x/stage1", "x/stage2", "y/stage2")]
    assert plot.names_of(paths[:1]) == ["stage1"]
    assert plot.names_of(paths[:2]) == ["stage1", "stage2"]
    assert plot.names_of(paths) == ["x/stage1", "x/stage2", "y/stage2"]
    assert plot.names_of([paths[0], paths[0]]) == ["stage1", "stage1"]


def test_the_picture(tmp_path, capsys, monkeypatch):
    """Beside the first file, or where --out says; each run in a colour of its own."""
    pytest.importorskip("matplotlib")
    a, b = write_run(tmp_path / "a", 20), write_run(tmp_path / "b$c$", 15, val=False)
    code, out, err = run(capsys, monkeypatch, a, b)
    assert (code, out, err) == (0, f"{tmp_path / 'a' / 'curves.png'}\n", "")
    with Image.open(tmp_path / "a" / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1000 and image.height > 700
        both = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    code, out, err = run(capsys, monkeypatch, a, "--out", tmp_path / "one.png")
    assert (code, out, err) == (0, f"{tmp_path / 'one.png'}\n", "")
    with Image.open(tmp_path / "one.png") as image:
        one = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    first, second = (tuple(bytes.fromhex(colour[1:])) for colour in plot.COLOURS[:2])
    assert first in both and second in both
    assert first in one and second not in one


def test_odd_numbers_are_drawn(tmp_path, capsys, monkeypatch):
    """A loss that went to NaN, one step alone, a run without throughput."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n\n{"step": 2, "loss": NaN, "mfu": null}\n')
    code, _, err = run(capsys, monkeypatch, path)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "holds no losses"),
        (b'{"step": 1, "lr": 0.1}\n', "holds no losses"),
        (b'{"step": 1, "loss": NaN}\n', "holds no losses"),
        (b'{"step": 1, "loss": 2}\nhello\n{"step": 2, "loss": 2}\n', "line 2, is not a line of metrics"),
        (b"[1, 2]\n", "line 1, is not"),
        (b'{"loss": 2}\n', "line 1, is not"),
        (b'{"step": 1, "loss": "low"}\n', "line 1, is not"),
        (b'{"step": true, "loss": 2}\n', "line 1, is not"),
        (b'{"step": 1, "loss": 1' + 400 * b"0" + b"}\n", "line 1, is not"),
        (b'{"step": 1, "loss": ' + 100_000 * b"[" + b"\n", "line 1, is not"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_what_is_no_run(tmp_path, capsys, monkeypatch, content, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    code, out, err = run(capsys, monkeypatch, path)
    assert code == 2 and out == ""
    assert err.startswith(f"error: {path}") and reason in err and err.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_paths_that_are_not_there(tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path / "a", 5)
    for arguments, reason in (
        ([tmp_path / "b" / "metrics.jsonl"], "there is no file"),
        ([tmp_path / "a"], "there is no file"),
        ([path, "--out", tmp_path / "b" / "x.png"], "there is no folder"),
    ):
        code, _, err = run(capsys, monkeypatch, *arguments)
        assert code == 2 and err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_without_matplotlib(tmp_path):
    """Says what to install. (A process of its own, in which the import fails.)"""
    path = write_run(tmp_path / "a", 5)
    script = "import sys; sys.modules['matplotlib'] = None; import plot; plot.main()"
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: drawing wants matplotlib: pip install matplotlib\n"
