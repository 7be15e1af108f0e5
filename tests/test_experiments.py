"""experiments/: what a run begins with, commands that run once, and the numbers of its tables."""

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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import lab as experiment  # noqa: E402
from answer import ask  # noqa: E402
from data.image import load_image, to_pixels  # noqa: E402
from data.text import Tokenizer  # noqa: E402
from model import PRESETS, Owl  # noqa: E402
from lab import Lab, Variant  # noqa: E402
from weights import load_model, save_model  # noqa: E402

TOKENIZER = ROOT / "checkpoints" / "tiny-owl2" / "tokenizer.model"


@pytest.fixture
def lab(tmp_path):
    return Lab(argparse.Namespace(out=tmp_path, jobs=2, seeds=2, images=60, scale=0.001))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with a language model and a vision tower, of random weights."""
    folder = tmp_path_factory.mktemp("given")
    for seed, name in enumerate(("language", "vision")):
        torch.manual_seed(seed)
        config = PRESETS["tiny-owl2"]()
        config.llama.vocab_size = Tokenizer(TOKENIZER).vocab_size
        model = Owl(config).init_weights()
        for part in (p for p in model.parameters() if p.ndim == 1):
            torch.nn.init.normal_(part)  # norms and biases that tell models apart
        model.tokenizer_folder = TOKENIZER.parent
        save_model(model, folder / name)
    return folder


def text_half(state: dict) -> dict:
    return {key.replace(".multiway.0.", "."): value for key, value in state.items() if ".multiway.1." not in key}


# ----------------------------------------------------------------------------------------------------
# What a run begins with


def test_a_run_begins_with_what_is_given(given):
    model = experiment.start_model(given / "language", given / "vision", Variant(n_query=5, image_size=32), seed=0)
    assert (model.config.n_query, model.config.image_size) == (5, 64)  # the stages resize it
    for part, source in (("vit", "vision"), ("llama", "language")):
        expected = getattr(load_model(given / source), part).state_dict()
        state = getattr(model, part).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


def test_the_seed_draws_the_abstractor_alone(given):
    one, same, other = (
        experiment.start_model(given / "language", given / "vision", Variant(), seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[key], same[key]) for key in one)
    changed = {key for key in one if not torch.equal(one[key], other[key])}
    assert "abstractor.queries" in changed
    assert all(key.startswith("abstractor.") for key in changed)
    plain = experiment.start_model(given / "language", given / "vision", Variant(adaptive=False), 1).state_dict()
    assert all(torch.equal(other[key], plain[key]) for key in changed)  # variants of one seed begin alike


def test_without_the_module_is_the_text_half(given):
    """And so the same language model, as long as there are no image words."""
    variant = Variant(adaptive=False)
    plain = experiment.start_model(given / "language", given / "vision", variant, seed=0)
    full = experiment.start_model(given / "language", given / "vision", Variant(), seed=0)
    expected, state = text_half(full.llama.state_dict()), plain.llama.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(plain(ids)[0], full(ids)[0])
    assert sum(p.numel() for p in full.parameters()) > sum(p.numel() for p in plain.parameters())


def test_a_model_without_the_module_is_saved_and_loaded(given, tmp_path):
    plain = experiment.start_model(given / "language", given / "vision", Variant(adaptive=False), seed=0)
    save_model(plain, tmp_path / "plain")
    again = load_model(tmp_path / "plain")
    assert not again.config.llama.adaptive
    assert again.config == plain.config
    state, expected = again.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_patches_are_image_words(given, tmp_path):
    """Through one Linear, without the class token; and read back by what evaluates and trains them."""
    variant = Variant(n_query=64, patches=True)
    owl = experiment.start_model(given / "language", given / "vision", variant, seed=0).eval()
    images = torch.randn(2, 3, 64, 64)
    words = owl.encode_images(images)
    assert words.shape == (2, owl.config.image_words, 128)
    weight, bias = owl.abstractor.fc.weight, owl.abstractor.fc.bias
    expected = owl.vit(images)[:, 1:] @ weight.T + bias
    assert torch.allclose(words[:, :-1], expected, atol=1e-5)
    assert torch.equal(words[1, -1], owl.abstractor.eos[0, 0])

    save_model(owl, tmp_path / "owl")
    Image.new("RGB", (64, 64), (200, 30, 90)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    script = [sys.executable, ROOT / "experiments" / "patches.py", "evaluate.py"]
    flags = ["--weights", "owl", "--data", "a.json", "--out", "answers.jsonl", "--max-new-tokens", "4"]
    done = subprocess.run([*script, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pixels = to_pixels(load_image(tmp_path / "a.png"), 64, "square")
    answer = json.loads((tmp_path / "answers.jsonl").read_text())["answer"]
    assert [answer] == ask(owl, Tokenizer(TOKENIZER), ["<image>what?"], [pixels], 4)


def test_every_variant_has_a_name_of_its_own():
    choices = {
        "style": ("owl2", "owl1"),
        "n_query": (8, 4),
        "patches": (False, True),
        "image_size": (64, 32),
        "adaptive": (True, False),
        "vit": tuple(experiment.VIT),
        "data": ("text", "image", "both"),
        "lora": (False, True),
    }
    variants = [Variant(**dict(zip(choices, values))) for values in itertools.product(*choices.values())]
    assert len({variant.stage2 for variant in variants}) == len(variants)
    # ... and stage 1 is shared by those that differ in stage 2 alone
    assert len({variant.stage1 for variant in variants}) == len(variants) / 3 / 2
    assert Variant(data="none").stage2 == Variant().stage1


# ----------------------------------------------------------------------------------------------------
# Commands, each run once


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(f"import pathlib, sys, time\n{text}\n")
    return str(path)  # (an absolute path below the repository is that path)


def test_a_command_is_run_once(lab):
    count = script(lab.out, "with open('count', 'a') as file: file.write(sys.argv[1])\nprint('said')")
    for _ in range(3):
        lab.once("a/b", count, "x")
    assert (lab.out / "count").read_text() == "x"
    assert (lab.out / "a/b.log").read_text() == "said\n"
    note = json.loads((lab.out / "a/b.run.json").read_text())
    assert note.pop("device") and note.pop("owlet", "")
    assert note == {"command": [count, "x"], "torch": torch.__version__, "done": True}


def test_what_was_made_otherwise_is_not_taken_for_it(lab):
    nothing = script(lab.out, "")
    lab.once("a", nothing, "x")
    with pytest.raises(ValueError, match="made with other settings: choose another --out"):
        lab.once("a", nothing, "y")


def test_a_command_that_failed_is_named_and_run_again(lab):
    flaky = script(lab.out, "ok = pathlib.Path('ok')\nif not ok.exists(): sys.exit('the reason')")
    with pytest.raises(ValueError, match="script.py failed for .*a: .*a.log says why"):
        lab.once("a", flaky)
    assert "the reason" in (lab.out / "a.log").read_text()
    (lab.out / "ok").touch()
    lab.once("a", flaky)
    assert json.loads((lab.out / "a.run.json").read_text())["done"]


def test_the_first_failure_stops_the_others(lab):
    slow = script(lab.out, "time.sleep(60)")

    def fail() -> None:
        while not lab.children:
            time.sleep(0.01)
        raise ValueError("the failure")

    began = time.monotonic()
    with pytest.raises(ValueError, match="the failure"):
        lab.all([lambda: lab.once("slow", slow), fail, lambda: lab.once("second", slow)])
    assert time.monotonic() - began < 30
    notes = list(lab.out.glob("*.run.json"))  # of "slow", and of "second" if it began before it could be called off
    assert notes and not any(json.loads(note.read_text())["done"] for note in notes)


def test_one_experiment_at_a_time(lab, monkeypatch):
    other = Lab(argparse.Namespace(out=lab.out, jobs=1, seeds=1, images=60, scale=1))
    with pytest.raises(ValueError, match="another experiment is at work in .*: wait for it"):
        monkeypatch.setattr(lab, "chain", lambda *_: other.run([Variant()]))
        lab.run([Variant()])


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--jobs", "0"], ["--scale", "0"], ["--scale", "nan"]])
def test_mistakes_are_one_sentence(flags, tmp_path, monkeypatch, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["queries.py", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as ended:
        experiment.experiment("", lambda lab: None)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --seeds and --jobs must be 1 or more, --scale above 0\n"


# ----------------------------------------------------------------------------------------------------
# Numbers


def test_shares_are_percent_of_the_rows_asked_for(lab):
    rows = [
        {"answer": "Red.", "truth": "red", "kind": "color", "seen": True, "text_answer": "blue"},
        {"answer": "blue", "truth": "red", "kind": "color", "seen": False, "text_answer": "blue"},
        {"answer": "two", "truth": "two", "kind": "count", "seen": True, "text_answer": "one"},
        {"answer": "", "truth": "two", "kind": "count", "seen": True, "text_answer": "one"},
    ]
    for seed, part in enumerate((rows, rows[:1]), start=1):
        (lab.out / f"seed{seed}").mkdir()
        text = "".join(json.dumps(row) + "\n" for row in part)
        (lab.out / f"seed{seed}/queries8-both-test.jsonl").write_text(text)
    assert lab.shares(Variant(), "test", "truth", lambda row: True) == [50.0, 100.0]
    assert lab.shares(Variant(), "test", "truth", lambda row: row["kind"] == "color") == [50.0, 100.0]
    assert lab.shares(Variant(), "test", "text_answer", lambda row: True) == [25.0, 0.0]
    unseen, none = lab.shares(Variant(), "test", "truth", lambda row: not row["seen"])
    assert unseen == 0.0 and math.isnan(none)


def test_words_do_not_count_as_things(lab):
    kinds = ("color", "color", "count", "word")
    for name, answers in (("test", ("right", "wrong", "wrong", "right")), ("text_test", ("right",) * 3 + ("wrong",))):
        rows = zip(kinds, answers, (True, True, False, True), strict=True)
        path = lab.out / f"seed1/queries8-both-{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        text = (json.dumps({"kind": k, "answer": a, "seen": s, "truth": "right"}) for k, a, s in rows)
        path.write_text("\n".join(text))
    lab.seeds = [1]
    expected = {"things, seen": [50.0], "unseen": [0.0], "words": [100.0], "text": [75.0]}
    assert experiment.scores(lab, {"a": Variant()}) == {"a": expected}
    assert experiment.by_kind(lab, {"a": Variant()}, "test")["a"]["count"] == [0.0]


def test_table_says_mean_and_deviation():
    rows = {"a": {"x": [1.0, 2.0, 3.0], "y": [10.0, 10.0, 10.0]}, "b": {"x": [4.0, 4.0, 5.5], "y": [0.0, 0.0, 0.0]}}
    assert experiment.table("which", rows).splitlines() == [
        "| which | x | y |",
        "|---|---|---|",
        "| a | 2.0 ± 1.0 | 10.0 ± 0.0 |",
        "| b | 4.5 ± 0.9 | 0.0 ± 0.0 |",
    ]


def test_one_seed_has_no_deviation():
    assert experiment.spread([12.34]) == "12.3"


def test_costs():
    small, frozen = Variant(image_size=32), Variant(vit="frozen")
    rows = experiment.costs({"4": Variant(n_query=4), "8": Variant(), "small": small, "frozen": frozen})
    assert [rows[name]["words of an image"] for name in rows] == [[5], [9], [9], [9]]
    four, eight, small, frozen = (rows[name]["MFLOP a sample"][0] for name in rows)
    assert four < eight > small
    vit = sum(p.numel() for p in experiment.make_owl(Variant()).vit.blocks.parameters())
    more = {"LoRA": Variant("owl1", data="image", lora=True), "none": Variant(data="none")}
    lora, none = (row["MFLOP a sample"][0] for row in experiment.costs(more).values())
    assert none == 0 < lora < frozen  # of which the first trains nothing, and the second little of the decoder
    assert eight - frozen > 4 * 64 * vit / 1e6  # what the gradients of 64 patches and more take: two products a weight


def test_belief_counts_what_is_known_without_the_statement(lab):
    sys.modules.pop("adaptive", None)
    import adaptive

    def write(name: str, rows: list[dict]) -> None:
        path = lab.out / f"seed1/queries8-both-{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def row(image: int, kind: str, answer: str, **more: str) -> dict:
        return {"images": [f"{image}.png"], "kind": kind, "answer": answer} | more

    lab.seeds = [1]
    alone = [row(i, "color", "red", truth="red") for i in range(4)] + [row(4, "color", "red", truth="blue")]
    write("test", [*alone, row(5, "size", "big", truth="big")])
    both = {"image_answer": "red", "text_answer": "green"}
    answers = ("red", "red", "green", "white", "green")
    conflicts = [row(i, "color", answer, **both) for i, answer in enumerate(answers)]
    write("conflict", [*conflicts, row(5, "color", "red", **both)])  # of kinds and images that the other has not
    assert adaptive.believed(lab, Variant()) == {"the image": [50.0], "the statement": [25.0], "neither": [25.0]}


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    experiment.draw(tmp_path / "a.png", "title", {"a": {"x": [1.0, 2.0]}, "b": {"x": [3.0, 4.0]}}, "% right")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.slow
def test_an_experiment_stopped_and_run_to_its_end(tmp_path):
    """A few steps of everything; SIGTERM in the middle of it, and then what is there is not made again."""
    command = [sys.executable, ROOT / "experiments" / "adaptive.py", "--out", tmp_path / "lab"]
    command += ["--seeds", "1", "--scale", "0.004", "--images", "60"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "lab/vision.run.json").exists():
        time.sleep(0.1)
        assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert "the same command goes on from here" in first.stderr.read()
    language = (tmp_path / "lab/language.run.json").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lab/language.run.json").stat().st_mtime_ns == language
    for data in experiment.DATA:
        assert f"| {data}, with |" in done.stdout and f"| {data}, without |" in done.stdout
    assert all((tmp_path / "lab" / name).exists() for name in ("adaptive.md", "adaptive.png", "interference.png"))
    made = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "lab").rglob("*.safetensors")}
    assert subprocess.run(command, capture_output=True, text=True).stdout == done.stdout
    assert {path: os.stat(path).st_mtime_ns for path in made} == made
