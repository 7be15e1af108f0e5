"""Image quality: scores equal a plain recomputation, files are continued, and metrics equal direct formulas."""

import csv
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer

import evaluate
import score
from conftest import make_config, make_owl
from data import quality
from data.image import load_image, to_pixels
from data.text import Tokenizer
from evaluation.iqa import correlations, fit_logistic, plcc, read_iqa, srcc
from inference.quality import LEVELS, PRESETS, Scorer, prompt_of, scores_of, word_ids
from weights import load_model, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Owl2 in the released layout, with the level words in its vocabulary."""
    folder = tmp_path_factory.mktemp("scorer")
    with (folder / "tokenizer.model").open("wb") as file:
        prompts = [text for preset in PRESETS.values() for text in preset.prompts.values()]
        SentencePieceTrainer.train(
            sentence_iterator=iter(text for prompt in prompts for text in prompt.split("\n")),
            model_writer=file,
            vocab_size=400,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            user_defined_symbols=[f"▁{word}" for word in (*LEVELS, "average")],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    config = make_config("owl2", llama={"vocab_size": Tokenizer(folder).vocab_size, "context": 200})
    save_model(make_owl(config), folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Images of different shapes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(3)]
    for path, size in zip(paths, ((20, 30), (16, 16), (40, 12))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return paths


def make_scorer(folder: Path, preset: str = "onealign", kind: str = "quality") -> Scorer:
    return Scorer(load_model(folder), Tokenizer(folder), preset, kind)


def plain_scores(folder: Path, path: Path, preset: str, kind: str, n_frame: int = 1) -> tuple[float, list[float]]:
    """The score from 0 to 1 and the probabilities, from all logits of a single row."""
    model, tokenizer = load_model(folder), Tokenizer(folder)
    before, after = PRESETS[preset].prompts[kind].split("<|image|>")
    ids = [tokenizer.bos_id, *tokenizer.encode(before)]
    ids += [-200] * model.config.n_visual_tokens * n_frame + tokenizer.encode(after)
    pixels = to_pixels(load_image(path), 16, "crop" if preset == "q-instruct" else "pad")
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids]), torch.stack([pixels] * n_frame))
    words = ("good", "average", "poor") if preset == "q-instruct" else LEVELS
    values = [logits[0, -1, tokenizer.encode(word)[0]].double().exp().item() for word in words]
    p = [value / sum(values) for value in values]
    return sum(q * (1 - i / (len(words) - 1)) for i, q in enumerate(p)), p


def run_score(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Runs the command. Returns its exit code, output and messages."""
    monkeypatch.setattr(sys, "argv", ["score.py", *map(str, args)])
    code = 0
    try:
        score.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "preset, kind", [(preset, kind) for preset in PRESETS for kind in PRESETS[preset].prompts if kind != "video"]
)
def test_scores_equal_a_plain_recomputation(folder, images, preset, kind):
    scorer = make_scorer(folder, preset, kind)
    probabilities = scorer.probabilities([scorer.read(path) for path in images])
    for row, value, path in zip(probabilities, scores_of(probabilities, "0-1"), images):
        expected, p = plain_scores(folder, path, preset, kind)
        assert row.tolist() == pytest.approx(p, abs=1e-5) and value.item() == pytest.approx(expected, abs=1e-5)
    assert probabilities.std(dim=0).max() > 1e-3  # the images differ


def test_a_batch_equals_single_images_and_frames_share_a_placeholder(folder, images):
    scorer = make_scorer(folder)
    rows = [scorer.read(path) for path in images]
    rows.append(rows[0] + rows[1])  # a row of another length
    batched = scorer.probabilities(rows)
    torch.testing.assert_close(batched, torch.cat([scorer.probabilities([row]) for row in rows]), atol=1e-5, rtol=0)
    video = make_scorer(folder, kind="video").probabilities([rows[2] * 3])
    assert video[0].tolist() == pytest.approx(plain_scores(folder, images[2], "onealign", "video", 3)[1], abs=1e-5)
    with pytest.raises(ValueError, match="context"):
        scorer.probabilities([rows[0] * 60])


def test_scales():
    p = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0.5, 0.5, 0, 0, 0]])
    assert scores_of(p, "0-1").tolist() == [1, 0, 0.875]
    assert scores_of(p, "1-5").tolist() == [5, 1, 4.5]
    assert scores_of(p, "0-100").tolist() == [100, 0, 87.5]
    assert scores_of(torch.tensor([[0.25, 0.5, 0.25]]), "0-1").tolist() == [0.5]


def test_level_words_must_be_tokens(folder):
    tokenizer = Tokenizer(folder)
    pieces = [tokenizer.processor.id_to_piece(i) for i in word_ids(LEVELS, tokenizer)]
    assert pieces == [f"▁{word}" for word in LEVELS]
    with pytest.raises(ValueError, match="'zebra' is .* tokens"):
        word_ids(("good", "zebra"), tokenizer)
    with pytest.raises(ValueError, match="not all different"):
        word_ids(("zebra", "zebras"), tokenizer, first_token=True)
    tiny = Tokenizer(evaluate.EMBEDDED)  # has no level words, but their first tokens differ, and training predicts them
    sentence = "The quality of the image is"
    for word, first in zip(LEVELS, word_ids(LEVELS, tiny, first_token=True)):
        assert tiny.encode(f"{sentence} {word}.")[len(tiny.encode(sentence))] == first
    with pytest.raises(ValueError, match="has no prompt for video"):
        prompt_of("deqa", "video")


def test_command(folder, images, monkeypatch, capsys, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    flags = ("--weights", folder, "--batch", 2)
    code, out, err = run_score(monkeypatch, capsys, images[0], broken, images[1], images[2], *flags)
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and "4 images, 1 could not be read" in err and "Traceback" not in err
    assert [row["image"] for row in rows] == [str(images[0]), str(broken), str(images[1]), str(images[2])]
    assert rows[1]["score"] == "" and "no image" in rows[1]["error"] and rows[0]["error"] == ""
    for row, path in zip(rows[::2], (images[0], images[1])):
        expected, p = plain_scores(folder, path, "onealign", "quality")
        assert [float(row[word]) for word in LEVELS] == pytest.approx(p, abs=2e-5)
        assert float(row["score"]) == pytest.approx(expected, abs=2e-5)

    # A folder and a CSV, whose paths are relative to it, give the same scores.
    (images[0].parent / "rows.csv").write_text("number,image\n" + "".join(f"1,{path.name}\n" for path in images))
    for source in (images[0].parent, images[0].parent / "rows.csv"):
        code, out, _ = run_score(monkeypatch, capsys, source, *flags, "--preset", "deqa")
        values = [float(row["score"]) for row in csv.DictReader(out.splitlines())]
        expected = [4 * plain_scores(folder, path, "deqa", "quality")[0] + 1 for path in images]
        assert code == 0 and values == pytest.approx(expected, abs=1e-4)


def test_a_stopped_run_continues(folder, images, monkeypatch, capsys, tmp_path):
    out = tmp_path / "scores.csv"
    args = (*images, "--weights", folder, "--batch", 1, "--out", out)
    assert run_score(monkeypatch, capsys, *args)[0] == 0
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4
    for kept in ("", lines[0], lines[0] + lines[1] + lines[2][:9], whole):
        out.write_text(kept)
        assert run_score(monkeypatch, capsys, *args)[0] == 0
        assert out.read_text() == whole
    out.write_text(lines[0] + lines[1].replace(",0.", ",7.", 1))  # rows that exist are not computed again
    run_score(monkeypatch, capsys, *args)
    assert out.read_text().splitlines()[2:] == whole.splitlines()[2:] and ",7." in out.read_text()
    for changed in (("--preset", "published"), ("--scale", "1-5")):
        code, _, err = run_score(monkeypatch, capsys, *args, *changed)
        assert code == 2 and f"another run ({changed[0][2:]})" in err
    code, _, err = run_score(monkeypatch, capsys, images[1], *args[3:])
    assert code == 2 and "another run (rows" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["missing"], "missing"),
        (["--kind", "video", "--preset", "deqa"], "no prompt for video"),
        (["--batch", "0"], "--batch"),
        (["--weights", "nowhere"], "nowhere"),
    ],
)
def test_user_errors(folder, images, monkeypatch, capsys, flags, message):
    weights = () if "--weights" in flags else ("--weights", folder)
    code, out, err = run_score(monkeypatch, capsys, images[0], *weights, *flags)
    assert code == 2 and message in err and "Traceback" not in err and out == ""


def test_video_frames(folder, monkeypatch, capsys, tmp_path):
    pytest.importorskip("data.video")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=1000)
    code, out, _ = run_score(monkeypatch, capsys, tmp_path / "clip.gif", "--weights", folder, "--kind", "video")
    assert code == 0 and next(csv.DictReader(out.splitlines()))["error"] == ""


# --- metrics -----------------------------------------------------------------------------------------


def test_correlations_equal_direct_formulas():
    x, y = [1.0, 2.0, 2.0, 5.0, 3.5], [10.0, 30.0, 20.0, 50.0, 20.0]
    ranks = {1.0: 1, 2.0: 2.5, 3.5: 4, 5.0: 5}, {10.0: 1, 20.0: 2.5, 30.0: 4, 50.0: 5}
    assert plcc(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert srcc(x, y) == pytest.approx(np.corrcoef([ranks[0][v] for v in x], [ranks[1][v] for v in y])[0, 1])
    assert srcc(x, [math.exp(v) for v in x]) == pytest.approx(1)
    assert math.isnan(srcc([1, 1, 1], [1, 2, 3]))


def test_correlations_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x = rng.random(200).round(2)  # with ties
    clean = 60 / (1 + np.exp(-(x - 0.4) / 0.1)) + 20
    assert np.abs(fit_logistic(x, clean) - clean).max() < 1e-4
    y = clean + rng.normal(size=200)
    numbers = correlations(x, y)
    assert numbers["SRCC"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert numbers["PLCC"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert numbers["PLCC, logistic fit"] > numbers["PLCC"] + 0.01


def test_published_files(tmp_path):
    (tmp_path / "a.png").touch()
    path = tmp_path / "test.json"
    rows = [{"image": "a.png", "gt_score": 3}, {"img_path": "a.png", "gt_score": 2.5}]
    rows += [{"id": f"a.png->{mos}", "image": "a.png"} for mos in (1.5, 2, 4)]
    path.write_text(json.dumps(rows))
    assert [case.mos for case in read_iqa(path, tmp_path)] == [3, 2.5, 1.5, 2, 4]
    outside, no_number = {"image": "../a.png", "gt_score": 1}, {"image": "a.png", "gt_score": []}
    for bad in ({"image": "a.png"}, {"gt_score": 1}, outside, no_number, 7):
        path.write_text(json.dumps([*rows, bad]))
        with pytest.raises(ValueError, match="row 5"):
            read_iqa(path, tmp_path)


def test_evaluate(folder, monkeypatch, capsys, tmp_path):
    data = tmp_path / "test.json"
    paths, mos = [tmp_path / f"{i}.png" for i in range(5)], [0, 1, 2, 3, 4]
    for path, color in zip(paths, ("red", "green", "blue", "white", "black")):
        Image.new("RGB", (16, 16), color).save(path)
    data.write_text(json.dumps([{"image": path.name, "gt_score": i} for i, path in enumerate(paths)]))
    flags = ["evaluate.py", "--task", "iqa", "--data", str(data), "--weights", str(folder)]
    monkeypatch.setattr(sys, "argv", flags)
    evaluate.main()
    scores = [plain_scores(folder, path, "published", "quality")[0] for path in paths]
    out = capsys.readouterr().out
    assert f"\nPLCC {plcc(scores, mos):>24.4f}\n" in out and f"\nSRCC {srcc(scores, mos):>24.4f}\n" in out
    other_task = ["evaluate.py", "--data", "x", "--task", "pope", "--folder", "x"]
    for wrong in (flags[:3], flags + ["--images", "blank"], ["evaluate.py"], other_task):
        monkeypatch.setattr(sys, "argv", wrong)
        with pytest.raises(SystemExit) as end:
            evaluate.main()
        assert end.value.code == 2


# --- training files ----------------------------------------------------------------------------------


def test_levels_are_equal_bins():
    # KonIQ's cuts, from its published files: 22.4, 38.1, 53.9, 69.6 of [6.67, 85.36].
    scores = (6.67, 22.3, 22.5, 38.0, 38.2, 53.8, 54, 69.5, 69.7, 85.36)
    words = [quality.level_of(mos, 6.67, 85.36) for mos in scores]
    assert words == [word for word in reversed(LEVELS) for _ in range(2)]
    assert [quality.level_of(mos, 0, 5) for mos in (1, 2, 3, 4)] == ["bad", "poor", "fair", "good"]  # on the cuts


def test_soft_labels_have_sum_and_mean():
    for mos, std in itertools.product((1.0, 1.3, 2.6, 3.0, 4.4, 5.0), (0.0, 0.1, 0.5, 0.9)):
        p = quality.soft_labels(mos, std, 1, 5)
        assert min(p) >= 0 and sum(p) == pytest.approx(1, abs=0.05)
        assert sum(x * q for x, q in zip((5, 4, 3, 2, 1), p)) == pytest.approx(mos, abs=0.1)


def test_training_file(tmp_path, monkeypatch):
    (tmp_path / "mos.csv").write_text("image,mos,std\na.jpg,1,0.5\nb.jpg,5,\n")
    monkeypatch.setattr(sys, "argv", ["quality", str(tmp_path / "mos.csv"), "--out", str(tmp_path / "train.json")])
    quality.main()
    first, second = json.loads((tmp_path / "train.json").read_text())
    assert first["conversations"][1]["value"] == "The quality of the image is bad."
    assert second["conversations"][1]["value"] == "The quality of the image is excellent."
    assert first["conversations"][0]["value"].endswith("\n<|image|>") and first["gt_score"] == 1
    assert len(first["level_probs"]) == 5 and "level_probs" not in second
    for text in ("image\na\n", "image,mos\na,x\n", "image,mos\na,nan\n", "image,mos\na,1\nb,1\n", "image,mos\n"):
        (tmp_path / "mos.csv").write_text(text)
        with pytest.raises(ValueError):
            quality.read_scores(tmp_path / "mos.csv")
