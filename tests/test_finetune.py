"""The commands of docs/finetune.md, in order, as they stand except for fewer steps."""

import re
import runpy
import shlex
import sys

from conftest import ROOT
from runs import run_main

DOCUMENT = ROOT / "docs" / "finetune.md"
SKIPPED = ("python -c", "mplug-owl2-llama2-7b")  # PEFT's part is tested in test_lora.py; weights that are not here


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command of the page, without those of SKIPPED."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line.startswith("python ") and not any(part in line for part in SKIPPED)]
    return [shlex.split(line)[1:] for line in lines]


def test_the_page_works_as_written(tmp_path, monkeypatch):
    text = DOCUMENT.read_text(encoding="utf-8")
    (tmp_path / "draw.py").write_text(re.search(r"<<'END'\n(.*?)\nEND\n", text, re.DOTALL)[1])
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    first, *rest = commands(text.replace("--epochs 20", "--epochs 1").replace("step-00000200", "step-00000010"))
    assert first == ["draw.py"]
    runpy.run_path("draw.py", run_name="__main__")
    answers = []
    for words in rest:
        name, *flags = words[1:] if words[0] == "-m" else words
        main = __import__(name.removesuffix(".py"), fromlist=["main"]).main
        monkeypatch.setattr(sys, "argv", words)
        code, out, err = run_main(main, *flags)
        assert code == 0, (words, err)
        answers.append((name, out))
    assert ("sample.py", "I don't know.\n") in answers
    assert (tmp_path / "runs/arrows/adapter/adapter_config.json").is_file()
    model = (tmp_path / "runs/arrows/model-00001-of-00001.safetensors").read_bytes()
    for folder in ("arrows-model", "arrows-export"):
        assert (tmp_path / folder / "model-00001-of-00001.safetensors").read_bytes() == model
