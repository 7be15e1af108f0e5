"""experiments/: initial models, commands that run once, and the numbers of the tables."""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, assert_close
from data.image import load_image, to_pixels
from data.text import Tokenizer
from inference.batch import ask
from inference.fast_decode import FastDecoder
from experiments import adaptive, patches, report, smol
from experiments.lab import DATA, VIT, Lab, Setup, experiment, initial_model
from model import Owl
from runs import run_main
from training.presets import PRESETS, init_weights
from weights import load_model, save_model

TOKENIZER = ROOT / "checkpoints" / "tiny-owl2" / "tokenizer.model"


@pytest.fixture
def lab(tmp_path):
    return Lab(argparse.Namespace(out=tmp_path, jobs=2, seeds=2, images=60, scale=0.001))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Path]:
    """Model folders of a random language model and of a random vision encoder."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = PRESETS["tiny-owl2"]()
        config.llama.vocab_size = Tokenizer(TOKENIZER).vocab_size
        model = init_weights(Owl(config))
        for vector in (p for p in model.parameters() if p.ndim == 1):
            torch.nn.init.normal_(vector)  # norms and biases that differ between models
        model.tokenizer_folder = TOKENIZER.parent
        folders.append(tmp_path_factory.mktemp("part"))
        save_model(model, folders[-1])
    return folders


def write_answers(lab: Lab, seed: int, test: str, rows: list[dict]) -> None:
    path = lab.out / f"seed{seed}/queries8-both-{test}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_initial_model_has_the_trained_parts_and_a_seeded_abstractor(parts):
    model = initial_model(*parts, Setup(n_query=5, image_size=32), seed=0)
    assert (model.config.n_query, model.config.image_size) == (5, 64)  # the stages resize it
    for part, source in (("llama", parts[0]), ("vit", parts[1])):
        expected = getattr(load_model(source), part).state_dict()
        torch.testing.assert_close(getattr(model, part).state_dict(), expected, rtol=0, atol=0)

    first, other = (initial_model(*parts, Setup(), seed).state_dict() for seed in (0, 1))
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert "abstractor.queries" in changed and all(key.startswith("abstractor.") for key in changed)
    plain = initial_model(*parts, Setup(adaptive=False), 1).state_dict()
    assert all(torch.equal(other[key], plain[key]) for key in changed)  # equal for all setups of a seed


def test_without_the_module_only_the_text_half_is_left(parts, tmp_path):
    """The same language model, as long as there are no images. It can be saved and loaded."""
    plain, full = initial_model(*parts, Setup(adaptive=False), seed=0), initial_model(*parts, Setup(), seed=0)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(plain(ids)[0], full(ids)[0])
    save_model(plain, tmp_path / "plain")
    loaded = load_model(tmp_path / "plain")
    assert loaded.config == plain.config and not loaded.config.llama.adaptive
    torch.testing.assert_close(loaded.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_patches_are_visual_tokens(parts, tmp_path, monkeypatch):
    """One Linear, without the class token; such a model folder can be evaluated."""
    model = initial_model(*parts, Setup(n_query=64, patches=True), seed=0).eval()
    images = torch.randn(2, 3, 64, 64)
    visual = model.encode_images(images)
    assert visual.shape == (2, model.config.n_visual_tokens, 128)
    expected = model.vit(images)[:, 1:] @ model.abstractor.fc.weight.T + model.abstractor.fc.bias
    assert_close(visual[:, :-1], expected)
    assert torch.equal(visual[1, -1], model.abstractor.eos[0, 0])

    monkeypatch.chdir(tmp_path)
    save_model(model, Path("model"))
    Image.new("RGB", (64, 64), (200, 30, 90)).save("a.png")
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
    Path("a.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    monkeypatch.setattr("model.Abstractor", patches.Patches)  # as the command leaves it; restored after the test
    flags = "evaluate --weights model --data a.json --out answers.jsonl --max-new-tokens 4"
    code, _, stderr = run_main(patches.main, *flags.split())
    assert code == 0, stderr
    pixels = to_pixels(load_image("a.png"), 64, "square")
    answer = json.loads(Path("answers.jsonl").read_text())["answer"]
    assert [answer] == ask(FastDecoder(model), Tokenizer(TOKENIZER), ["<image>what?"], [pixels], max_new_tokens=4)


def test_every_setup_has_its_own_name():
    choices = {"variant": ("owl2", "owl1"), "n_query": (8, 4), "patches": (False, True), "image_size": (64, 32)}
    choices |= {"adaptive": (True, False), "vit": VIT, "data": ("text", "image", "both"), "lora": (False, True)}
    setups = [Setup(**dict(zip(choices, values))) for values in itertools.product(*choices.values())]
    assert len({setup.stage2 for setup in setups}) == len(setups)
    # Setups that differ only in stage 2 (3 kinds of data, with LoRA or without) share stage 1.
    assert len({setup.stage1 for setup in setups}) == len(setups) / 3 / 2
    assert Setup(data="none").stage2 == Setup().stage1


def test_a_command_runs_once_and_again_after_a_failure(lab):
    code = "import pathlib\nok = pathlib.Path('ok')\nif not ok.exists(): raise SystemExit('the reason')\nok.unlink()"
    (lab.out / "script.py").write_text(code)
    with pytest.raises(ValueError, match="a/b.log"):
        lab.run_once("a/b", "script", "x")
    assert "the reason" in (lab.out / "a/b.log").read_text()
    for _ in range(2):
        (lab.out / "ok").touch()
        lab.run_once("a/b", "script", "x")
    assert (lab.out / "ok").exists()  # the command would have removed it
    record = json.loads((lab.out / "a/b.run.json").read_text())
    assert record.pop("device") and record.pop("owlet", "")
    assert record == {"command": ["script", "x"], "torch": torch.__version__, "done": True}
    with pytest.raises(ValueError, match="another command"):
        lab.run_once("a/b", "script", "y")


def test_the_first_failure_stops_the_others(lab):
    (lab.out / "script.py").write_text("import time\ntime.sleep(60)")

    def fail() -> None:
        while not lab.children:
            time.sleep(0.01)
        raise ValueError("the failure")

    start = time.monotonic()
    with pytest.raises(ValueError, match="the failure"):
        lab.run_parallel([lambda: lab.run_once("slow", "script"), fail, lambda: lab.run_once("second", "script")])
    assert time.monotonic() - start < 30
    records = list(lab.out.glob("*.run.json"))  # of "slow", and of "second" if it started before it was canceled
    assert records and not any(json.loads(record.read_text())["done"] for record in records)


def test_one_experiment_at_a_time_uses_a_folder(lab, monkeypatch):
    other = Lab(argparse.Namespace(out=lab.out, jobs=1, seeds=1, images=60, scale=1))
    monkeypatch.setattr(lab, "run_chain", lambda *_: other.run_setups([Setup()]))
    with pytest.raises(ValueError, match="another experiment"):
        lab.run_setups([Setup()])


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--jobs", "0"], ["--scale", "0"], ["--scale", "nan"]])
def test_invalid_flags_are_user_errors(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["queries.py", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as stop, experiment(""):
        pass
    err = capsys.readouterr().err
    assert stop.value.code == 2 and flags[0] in err and err.count("\n") == 1


def test_accuracy_is_of_the_selected_rows(lab):
    keys, rows = ("answer", "truth", "text_answer", "seen"), []
    rows.append(dict(zip(keys, ("Red.", "red", "blue", True))))
    rows.append(dict(zip(keys, ("blue", "red", "blue", False))))
    rows.append(dict(zip(keys, ("two", "two", "one", True))))
    rows.append(dict(zip(keys, ("", "two", "one", True))))
    write_answers(lab, 1, "test", rows)
    write_answers(lab, 2, "test", rows[:1])
    assert lab.accuracy(Setup(), "test") == [50.0, 100.0]
    assert lab.accuracy(Setup(), "test", key="text_answer") == [25.0, 0.0]
    unseen, none = lab.accuracy(Setup(), "test", lambda row: not row["seen"])
    assert unseen == 0.0 and math.isnan(none)


def test_reading_is_not_counted_as_objects(lab):
    lab.seeds = [1]
    kinds = ("color", "color", "count", "word")
    for test, answers in (("test", ("yes", "no", "no", "yes")), ("text_test", ("yes", "yes", "yes", "no"))):
        rows = zip(kinds, answers, (True, True, False, True), strict=True)
        write_answers(lab, 1, test, [{"kind": k, "answer": a, "seen": s, "truth": "yes"} for k, a, s in rows])
    expected = {"objects, seen": [50.0], "unseen": [0.0], "words": [100.0], "text": [75.0]}
    assert report.scores(lab, {"a": Setup()}) == {"a": expected}
    assert report.scores_by_kind(lab, {"a": Setup()}, "test")["a"]["count"] == [0.0]


def test_tables_and_charts_have_mean_and_deviation(tmp_path):
    table = {"a": {"x": [1.0, 2.0, 3.0], "y": [12.34]}, "b": {"x": [4.0, 4.0, 5.5], "y": [0.0]}}
    assert report.to_markdown("which", table).splitlines() == [
        "| which | x | y |",
        "|---|---|---|",
        "| a | 2.0 ± 1.0 | 12.3 |",  # a single seed has no deviation
        "| b | 4.5 ± 0.9 | 0.0 |",
    ]
    pytest.importorskip("matplotlib")
    report.save_chart(tmp_path / "a.png", "title", table, "% correct")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_costs():
    setups = {"4": Setup(n_query=4), "8": Setup(), "small": Setup(image_size=32), "frozen": Setup(vit="frozen")}
    setups |= {"LoRA": Setup("owl1", data="image", lora=True), "none": Setup(data="none")}
    table = report.costs(setups)
    assert [row["visual tokens"] for row in table.values()] == [[5], [9], [9], [9], [9], [9]]
    four, eight, small, frozen, lora, none = (row["MFLOP per sample"][0] for row in table.values())
    assert four < eight > small
    assert none == 0 < lora < frozen < eight  # adapters train little of the decoder


def test_conflicts_count_questions_that_are_answered_correctly_alone(lab):
    def row(image: int, kind: str, answer: str, **more: str) -> dict:
        return {"images": [f"{image}.png"], "kind": kind, "answer": answer} | more

    lab.seeds = [1]
    alone = [row(i, "color", "red", truth="red") for i in range(4)] + [row(4, "color", "red", truth="blue")]
    write_answers(lab, 1, "test", [*alone, row(5, "size", "big", truth="big")])
    both = {"image_answer": "red", "text_answer": "green"}
    conflicts = [row(i, "color", x, **both) for i, x in enumerate(("red", "red", "green", "white", "green", "red"))]
    write_answers(lab, 1, "conflict", conflicts)  # image 5 was not asked alone about its color
    expected = {"the image": [50.0], "the statement": [25.0], "neither": [25.0]}
    assert adaptive.conflict_shares(lab, Setup()) == expected


@pytest.mark.slow
def test_a_stopped_experiment_continues(tmp_path):
    """A few steps of every run; SIGTERM in between. Runs that are complete are not repeated."""
    command = [sys.executable, "-m", "experiments.adaptive", "--out", tmp_path / "lab"]
    command += ["--seeds", "1", "--scale", "0.004", "--images", "60"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "lab/vision.run.json").exists():
        time.sleep(0.1)
        assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert "continues" in first.stderr.read()
    language = (tmp_path / "lab/language.run.json").stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lab/language.run.json").stat().st_mtime_ns == language
    assert all(f"| {data}, with |" in done.stdout and f"| {data}, without |" in done.stdout for data in DATA)
    assert all((tmp_path / "lab" / name).exists() for name in ("adaptive.md", "adaptive.png", "interference.png"))
    made = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "lab").rglob("*.safetensors")}
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == done.stdout
    assert {path: os.stat(path).st_mtime_ns for path in made} == made


def test_the_real_language_model_is_measured_after_each_stage(lab, monkeypatch):
    """The numbers of the report are read from their files."""
    commands = {}
    monkeypatch.setattr(lab, "run_once", lambda name, *command: commands.update({name: command}))
    lab.seeds = [1]
    for start in smol.STARTS:
        smol.run_stage1(lab, start)
    for setup in smol.SETUPS:
        smol.run_stage2(lab, setup, 1)
    assert len({setup.name for setup in smol.SETUPS}) == 8 and len(commands) == 2 + 2 * 3 + 3 * 8
    assert "scenes/text.json:1" in commands["seed1/owl1-lora-text"]
    assert "scenes/text.json:1" not in commands["seed1/owl2-all-images"]
    assert "--train-abstractor" in commands["seed1/owl1-lora-images"]
    assert "smol-owl2-plain" in commands["owl2-plain"] and "owl2" in commands["owl2-plain-text"]

    lab.out.joinpath("seed1").mkdir()
    right = {"all questions": [50, 200], "arithmetic": [1, 2]}
    lab.out.joinpath("seed1/a-text.json").write_text(json.dumps({"perplexity": 35.5, "right": right}))
    assert smol.scores(lab, "seed1/a") == {"perplexity": 35.5, "text questions, %": 25.0}
    answers = [{"answer": "Red.", "truth": "red"}, {"answer": "two", "truth": "one"}]
    lab.out.joinpath("seed1/a-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert smol.scores(lab, "seed1/a")["image questions, %"] == 50.0
