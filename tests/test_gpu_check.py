"""tools/gpu_check.py without a GPU: its reports, with commands that need none, and its errors."""

import json

import torch

from runs import run_main
from tools import gpu_check


def test_reports_and_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(gpu_check, "PARTS", {"good": ["this"], "bad": ["no_such_module"], "left out": ["that"]})
    code, _, stderr = run_main(gpu_check.main, "--out", tmp_path, "--only", "good", "bad")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    good, bad = report["parts"]
    assert (good["command"], good["exit_code"], bad["exit_code"]) == ("python -m this", 0, 1)
    assert "Readability counts." in good["output"] and "Readability counts." in stderr
    page = (tmp_path / "gpu_check.md").read_text()
    assert "a device" in page and "Readability counts." in page and "No module named no_such_module" in page
    assert code == 1 and "1 of 2 commands failed" in stderr


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, stderr = run_main(gpu_check.main, "--out", tmp_path / "out")
    assert code == 2 and "no CUDA device" in stderr and not (tmp_path / "out").exists()
