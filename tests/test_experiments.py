"""experiments/: initial models, commands that run once, and the numbers of the tables."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, assert_close
from data.conversations import Sample, SampleSpec
from data.image import load_image, to_pixels
from data.text import Tokenizer, expand_images, render_conversation
from inference.batch import ask
from inference.fast_decode import FastDecoder
from experiments import endtoend, patches, report, score, smol
from experiments.statistics import DETECTABLE, paired_difference
from experiments.lab import ENCODERS, N_EMBD, VIT, Lab, Setup, create_model, experiment, initial_model, make_parser
from runs import run_main
from training.presets import init_weights
from weights import load_model, save_model

TOKENIZER = ROOT / "checkpoints" / "tiny-owl2" / "tokenizer.model"


@pytest.fixture
def lab(tmp_path):
    return Lab(argparse.Namespace(out=tmp_path, jobs=2, seeds=2, images=60, scale=0.001))


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    """The folder of a random language model."""
    torch.manual_seed(0)
    model = init_weights(create_model(Setup(adaptive=False)))
    for vector in (p for p in model.parameters() if p.ndim == 1):
        torch.nn.init.normal_(vector)  # norms and biases that are not 1 and 0
    model.tokenizer_folder = TOKENIZER.parent
    folder = tmp_path_factory.mktemp("language")
    save_model(model, folder)
    return folder


def test_an_initial_model_has_the_trained_parts_and_a_seeded_abstractor(language):
    model = initial_model(language, Setup(n_query=5, image_size=32), seed=0)
    assert (model.config.n_query, model.config.image_size) == (5, 64)  # the stages resize it
    text = load_model(language).llama.bfloat16().float().state_dict()
    for key, x in model.llama.state_dict().items():
        assert torch.equal(x, text[key.replace(".multiway.0", "").replace(".multiway.1", "")])
    encoder = load_model(ROOT / "checkpoints" / ENCODERS["scenes"]).vit.state_dict()
    torch.testing.assert_close(model.vit.state_dict(), encoder, rtol=0, atol=0)

    first, other = (initial_model(language, Setup(), seed).state_dict() for seed in (0, 1))
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert "abstractor.queries" in changed and all(key.startswith("abstractor.") for key in changed)
    plain = initial_model(language, Setup(adaptive=False), 1).state_dict()
    assert all(torch.equal(other[key], plain[key]) for key in changed)  # equal for all setups of a seed


def test_without_the_module_only_the_text_half_is_left(language, tmp_path):
    """The same language model, as long as there are no images. It can be saved and loaded."""
    plain, full = initial_model(language, Setup(adaptive=False), seed=0), initial_model(language, Setup(), seed=0)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(plain(ids)[0], full(ids)[0])
    save_model(plain, tmp_path / "plain")
    loaded = load_model(tmp_path / "plain")
    assert loaded.config == plain.config and not loaded.config.llama.adaptive
    torch.testing.assert_close(loaded.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_wide_decoder_has_as_many_parameters_as_the_adaptive_one():
    setups = Setup(), Setup(adaptive=False, wide=True), Setup(adaptive=False)
    adaptive, wide, plain = (sum(p.numel() for p in create_model(setup).llama.parameters()) for setup in setups)
    assert plain < wide <= adaptive and abs(adaptive - wide) < 0.03 * (adaptive - plain)


def test_patches_are_visual_tokens(language, tmp_path, monkeypatch):
    """One Linear, without the class token; such a model folder can be evaluated."""
    model = initial_model(language, Setup(n_query=64, patches=True), seed=0).eval()
    images = torch.randn(2, 3, 64, 64)
    visual = model.encode_images(images)
    assert visual.shape == (2, model.config.n_visual_tokens, N_EMBD)
    expected = model.vit(images)[:, 1:] @ model.abstractor.fc.weight.T + model.abstractor.fc.bias
    assert_close(visual[:, :-1], expected)
    assert torch.equal(visual[1, -1], model.abstractor.eos[0, 0])

    monkeypatch.chdir(tmp_path)
    save_model(model, Path("model"))
    assert torch.equal(patches.load_patches(Path("model")).encode_images(images), visual)
    with pytest.raises(ValueError):
        load_model(Path("model"))  # other models are again loaded with an abstractor
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
    choices = {"variant": ("owl2", "owl1"), "n_query": (16, 4), "patches": (False, True), "image_size": (64, 32)}
    choices |= {"adaptive": (True, False), "wide": (False, True), "vit": VIT, "encoder": ENCODERS}
    choices |= {"end_to_end": (False, True), "data": ("text", "image", "both"), "lora": (False, True)}
    setups = [Setup(**dict(zip(choices, values))) for values in itertools.product(*choices.values())]
    assert len({setup.stage2 for setup in setups}) == len(setups)
    # Setups that differ only in stage 2 (3 kinds of data, with LoRA or without, end to end or not) share stage 1.
    assert len({setup.stage1 for setup in setups}) == len(setups) / 3 / 2 / 2
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
    monkeypatch.setattr(lab, "make_world", lambda _: other.run_setups([Setup()]))
    with pytest.raises(ValueError, match="another experiment"):
        lab.run_setups([Setup()])


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--jobs", "0"], ["--scale", "0"], ["--scale", "nan"]])
def test_invalid_flags_are_user_errors(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["queries.py", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as stop, experiment(make_parser("").parse_args()):
        pass
    err = capsys.readouterr().err
    assert stop.value.code == 2 and flags[0] in err and err.count("\n") == 1


def write_run(lab: Lab, seed: int, steps: dict[int, dict[str, str]], rows: dict[str, list[dict]]) -> None:
    """A world of these questions, and the scores of the baseline."""
    folder = lab.out / f"seed{seed}/world"
    folder.mkdir(parents=True)
    for test in ("test", "text_test", "conflict"):
        (folder / f"{test}.json").write_text(json.dumps(rows.get(test, [{}])))
    scores = {step: {test: {"right": right, "loss": step / 10} for test, right in x.items()} for step, x in steps.items()}
    record = {"device": "a CPU", "torch": "2", "owlet": "abc"}
    (folder.parent / "queries16-both.run.json").write_text(json.dumps(record))
    (folder.parent / "queries16-both.scores.json").write_text(json.dumps(scores))


def test_results_have_the_questions_of_a_metric_for_each_seed(lab):
    kinds = [("color", True), ("color", False), ("word", True), ("word", False)]
    rows = {"test": [{"kind": kind, "seen": seen} for kind, seen in kinds], "text_test": [{}, {}]}
    for seed, last in ((1, "1011"), (2, "0100")):
        write_run(lab, seed, {0: {"test": "0000", "text_test": "10"}, 2: {"test": last, "text_test": "11"}}, rows)
    page = report.Page("a", "A?", {"x": Setup()}, [], "")
    results = report.Results(lab, page)
    assert results.questions("x", "objects") == [[100.0], [0.0]]
    assert results.questions("x", "unseen") == [[0.0], [100.0]]
    assert results.questions("x", "reading") == [[100.0, 100.0], [0.0, 0.0]]
    assert results.questions("x", "text", step=0) == [[100.0, 0.0]] * 2
    assert results.curve("x", "text loss") == {1: [0.0, 0.0], 3: [0.2, 0.2]}  # stage 1 has 200 * 0.001 steps, at least 1
    assert results.learned_after("x") == ["3", "> 3"]


def test_a_page_has_scores_and_differences(lab):
    pytest.importorskip("matplotlib")
    rows = {"test": [{"kind": "color", "seen": True}, {"kind": "color", "seen": False}, {"kind": "word", "seen": True}]}
    for seed in lab.seeds:
        write_run(lab, seed, {0: {"test": "000", "text_test": "1"}, 2: {"test": "101", "text_test": "0"}}, rows)
    setups = {"one": Setup(), "other": Setup()}
    report.write_page(lab, report.Page("a", "A?\n\n    python -m a\n\nMore.\n", setups, [("one", "other")], "| 76.8 |"))
    page = (lab.out / "a.md").read_text()
    assert page.startswith("# A?\n\nMore.\n\n**The paper reports**\n\n| 76.8 |")
    row = "100.0 ± 0.0 | 0.0 ± 0.0 | 100.0 ± 0.0 | 0.0 ± 0.0 | 0.200 ± 0.000 | 3, 3 |"
    assert f"| one | {row}\n| other | {row}" in page
    assert "| one - other | +0.0 [+0.0, +0.0], 0.0 |" in page
    assert json.loads((lab.out / "a.json").read_text())["text"]["one"] == {"1": [100.0, 100.0], "3": [0.0, 0.0]}
    assert all((lab.out / f"a-{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("curves", "differences"))


def test_paired_differences():
    ones, zeros = [[1.0] * 50] * 3, [[0.0] * 50] * 3
    found = paired_difference(ones, zeros)
    assert (found.mean, found.low, found.high, found.detectable) == (1.0, 1.0, 1.0, 0.0)
    seeds_differ = paired_difference([[1.0] * 400, [0.5] * 400, [0.0] * 400], [[0.0] * 400] * 3)
    assert seeds_differ.per_seed == [1.0, 0.5, 0.0]  # their standard error is 0.5 / sqrt(3), and t is 4.3
    assert seeds_differ.high - seeds_differ.mean == pytest.approx(4.3 * 0.5 / 3**0.5)
    one_seed = paired_difference([[1.0, 0.0] * 200], [[0.0] * 400])  # a standard error of 0.5 / sqrt(399)
    assert one_seed.high - one_seed.mean == pytest.approx(1.96 * 0.5 / 399**0.5)


@pytest.mark.parametrize("n_seed, sd", [(3, 0.05), (5, 0.0), (5, 0.15)])
def test_intervals_contain_the_true_difference_as_often_as_they_say(n_seed, sd):
    rng = np.random.default_rng(0)
    n, covered = 1000, 0
    for _ in range(n):
        shares = rng.normal(0.5, sd, (2, n_seed, 1)).clip(0, 1)  # of questions right, with the same mean in both setups
        x = paired_difference(*(1.0 * (rng.random((2, n_seed, 200)) < shares)).tolist())
        covered += x.low < 0 < x.high
    assert abs(covered / n - 0.95) < 4 * (0.95 * 0.05 / n) ** 0.5


@pytest.mark.parametrize("n_seed", [2, 3, 5, 10])
def test_a_difference_of_the_detectable_size_is_found_in_80_percent(n_seed):
    """The true difference is fixed: it does not depend on what an experiment estimates."""
    rng = np.random.default_rng(0)
    n, truth = 4000, DETECTABLE[n_seed] / n_seed**0.5  # of seeds with a standard deviation of 1
    zeros = [[0.0]] * n_seed
    found = sum(paired_difference(rng.normal(truth, 1, (n_seed, 1)).tolist(), zeros).low > 0 for _ in range(n))
    assert abs(found / n - 0.8) < 0.03


def test_scores_are_those_of_greedy_answers(language, tmp_path):
    """With a model that answers some questions right, by greedy decoding."""
    model, tokenizer = load_model(ROOT / "checkpoints" / "tiny-owl2"), Tokenizer(TOKENIZER)
    questions = ["what color is the triangle?", "what word is written?", "is there a red ring?", "who?"] * 20
    truths = ["yellow", "B A G", "yes", "I don't know."] * 20
    name = str(ROOT / "assets" / "scene.png")
    pixels = to_pixels(load_image(name), 64, "square")
    answers = ask(FastDecoder(model), tokenizer, [f"<image>{q}" for q in questions], [pixels] * 80, max_new_tokens=10)
    samples = []
    spec = SampleSpec.for_model(model.config, tokenizer)
    for question, truth in zip(questions, truths):
        ids, labels = render_conversation(
            [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": truth}], tokenizer, "owl2"
        )
        ids, labels = expand_images(ids, labels, spec.n_visual_tokens)
        samples.append((Sample(ids, labels, torch.empty(0, 3, 64, 64)), name))
    visual = score.encode(model, {name: pixels[None]})
    found = score.score(model, samples, visual)["right"]
    expected = "".join("1" if answer == truth else "0" for answer, truth in zip(answers, truths))
    assert found == expected and 0 < found.count("1") < 80


def test_costs():
    setups = {"4": Setup(n_query=4), "16": Setup(), "small": Setup(image_size=32), "frozen": Setup(vit="frozen")}
    setups |= {"LoRA": Setup("owl1", data="image", lora=True), "none": Setup(data="none")}
    n_visual, _, stage2 = zip(*map(report.costs, setups.values()))
    assert n_visual == (5, 17, 17, 17, 17, 17)
    four, base, small, frozen, lora, none = stage2
    assert four < base > small
    assert none == 0 < lora < frozen < base  # adapters train little of the decoder


@pytest.mark.slow
def test_a_stopped_experiment_continues(tmp_path):
    """A few steps of every run; SIGTERM in between. Runs that are complete are not repeated."""
    command = [sys.executable, "-m", "experiments.endtoend", "--out", tmp_path / "lab"]
    command += ["--seeds", "1", "--scale", "0.004", "--images", "60"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "lab/seed1/queries16.run.json").exists():
        time.sleep(0.1)
        assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert "continues" in first.stderr.read()
    language = (tmp_path / "lab/seed1/language.run.json").stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lab/seed1/language.run.json").stat().st_mtime_ns == language
    page = (tmp_path / "lab/endtoend.md").read_text()
    assert all(f"\n| {setup} |" in page for setup in endtoend.PAGE.setups)
    assert "\n| one stage | all | " in page  # the table of speed and memory
    assert all((tmp_path / "lab" / f"endtoend{end}").exists() for end in (".json", "-curves.png", "-differences.png"))
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
    assert "smol-owl2-plain" in commands["owl2-plain"]

    lab.out.joinpath("seed1").mkdir()
    right = {"all questions": [50, 200], "arithmetic": [1, 2]}
    lab.out.joinpath("seed1/a-text.json").write_text(json.dumps({"perplexity": 35.5, "right": right}))
    assert smol.scores(lab, "seed1/a") == {"perplexity": 35.5, "text questions, %": 25.0}
    answers = [{"answer": "Red.", "truth": "red"}, {"answer": "two", "truth": "one"}]
    lab.out.joinpath("seed1/a-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert smol.scores(lab, "seed1/a")["image questions, %"] == 50.0
