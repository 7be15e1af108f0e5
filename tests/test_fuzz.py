"""The fuzzer finds what it looks for, and the code handles its first inputs."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch

from conftest import ROOT
from common.files import read_json
from runs import in_processes
from tools.fuzz import EXECUTED, KINDS, OUTCOMES, OUTSIDE
from tools.fuzz import damage_folder, make_outside, make_rows, make_templates, outcome_of


def raise_key_error(folder: Path) -> None:
    {}["a"]


def kill(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def wait(folder: Path) -> None:
    signal.setitimer(signal.ITIMER_PROF, 0.1)  # instead of 10 s
    while True:
        pass


def fill_memory(folder: Path) -> None:
    torch.ones(600_000_000)


def print_control(folder: Path) -> None:
    print("\x1b[31mred")


def follow_link(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images/a.json").symlink_to(folder.parent / OUTSIDE / "secret.png")
    (folder / "images/a.json").read_bytes()


FAULTS = {
    "value": lambda folder: (folder / "a.json").write_text("{}"),
    "error": lambda folder: read_json(folder / "\x1b[31m"),
    "traceback": raise_key_error,
    "crash": kill,
    "time": wait,
    "memory": fill_memory,
    "control": print_control,
    "outside": follow_link,
    "execution": lambda folder: (folder.parent / EXECUTED).mkdir(),
}


def find_faults(parent: Path) -> None:
    make_outside(parent / OUTSIDE)
    for expected, read in FAULTS.items():
        folder = parent / f"reads-{expected}"
        folder.mkdir()
        assert outcome_of(lambda: read(folder), folder, "images")[0] == expected


def test_every_kind_of_failure_is_found(tmp_path):
    assert set(FAULTS) == set(OUTCOMES)
    in_processes(1, tmp_path / "stderr", find_faults, tmp_path)


def read_templates(parent: Path) -> None:
    make_templates(parent, KINDS)
    for name, kind in KINDS.items():
        folder = parent / name
        assert outcome_of(lambda: kind.read(folder, random.Random(0)), folder)[0] == "value", name


def test_undamaged_inputs_are_read(tmp_path):
    """Else their damage would test nothing."""
    in_processes(1, tmp_path / "stderr", read_templates, tmp_path)


def fuzz(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.fuzz", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_damaged_inputs_are_handled(tmp_path):
    done = fuzz("--inputs", 180, "--seconds", 12, "--keep", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_input_depends_only_on_its_seed(tmp_path):
    contents = []
    for i, seed in enumerate((5, 5, 6)):
        folder = tmp_path / str(i)
        folder.mkdir()
        make_rows(folder)
        damage_folder(random.Random(seed), folder, "*.json*")
        files = [path for path in sorted(folder.glob("*.json*")) if path.is_file() and path.stat().st_size < 10**7]
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0] == contents[1] != contents[2]
