"""experiments/limits.py: its conditions, which the embedded model answers or not, and its page."""

import json

from data.text import Tokenizer
from experiments import limits
from experiments.lab import ROOT
from inference.fast_decode import FastDecoder
from runs import run_main
from weights import load_model

TINY = ROOT / "checkpoints" / "tiny-owl2"


def test_the_model_answers_as_in_training_and_not_on_leaves():
    decoder, tokenizer = FastDecoder(load_model(TINY)), Tokenizer(TINY)
    rows = ("gray 0 to 60", "leaves")
    cells = [cell for cell in limits.all_cells(0, 12) if cell.table == "backgrounds" and cell.row in rows]
    assert len(cells) == 4  # questions about objects, and about the word
    for cell in cells:
        limits.measure(cell, decoder, tokenizer)
        right = cell.right["own"]
        assert right >= 9 if cell.row == "gray 0 to 60" else right <= 3
        assert cell.right["blank"] <= 1


def test_page(tmp_path):
    code, stdout, stderr = run_main(limits.main, "--out", tmp_path, "--questions", 1)
    assert code == 0 and str(tmp_path / "limits.md") in stdout, stderr
    assert len(json.loads((tmp_path / "limits.json").read_text())["cells"]) == 247
    assert (tmp_path / "limits.png").read_bytes().startswith(b"\x89PNG")
    assert "What this does not show" in (tmp_path / "limits.md").read_text()


def test_user_errors(tmp_path):
    assert run_main(limits.main, "--weights", tmp_path / "nothing", "--out", tmp_path)[0] == 2
    assert run_main(limits.main, "--questions", 0)[0] == 2
