"""The scripts that write training files from easy-VQA and from captions."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
from data import CAPTION_REQUEST
from data.captions import prepare as captions_script
from data.easy_vqa import prepare as easy_vqa_script
from data.easy_vqa.prepare import ANSWERS, SCENES, scene_of, turns_by_image
from runs import run_main


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def turns_of(sample: dict) -> list[tuple[str, str]]:
    conversation = sample["conversations"]
    assert [turn["from"] for turn in conversation] == ["human", "gpt"] * (len(conversation) // 2)
    values = [turn["value"] for turn in conversation]
    return list(zip(values[0::2], values[1::2], strict=True))


def assert_user_error(result: tuple[int, str, str], *keywords: str) -> None:
    code, _, stderr = result
    last = stderr.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and all(keyword in last for keyword in keywords), stderr


@pytest.mark.parametrize("name", ["easy_vqa", "captions", "shapes"])
def test_help(name):
    """From the project's root, as the documentation says."""
    script = f"data/{name}/prepare.py"
    process = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert process.returncode == 0 and f"python {script}" in process.stdout


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Path:
    pytest.importorskip("easy_vqa")
    out = tmp_path_factory.mktemp("easy")
    code, stdout, stderr = run_main(easy_vqa_script.main, "--out", out)
    assert code == 0, stderr
    assert all(f"{path.name}: {len(read(path)):,} samples" in stdout for path in out.glob("*.json"))
    return out


def test_easy_vqa_rules_reproduce_all_answers_of_the_package():
    easy_vqa = pytest.importorskip("easy_vqa")
    n_scene = 0
    for questions, answers, image_ids in (easy_vqa.get_train_questions(), easy_vqa.get_test_questions()):
        assert set(questions) == set().union(*ANSWERS.values())
        for turns in turns_by_image(questions, answers, image_ids).values():
            scene = scene_of(turns)  # raises if no scene gives all the answers
            if scene is not None:
                n_scene += 1
                assert all(ANSWERS[scene][question] == answer for question, answer in turns)
    assert n_scene > 4000


def test_easy_vqa_files_have_all_questions_and_images_of_the_package(easy):
    import easy_vqa

    all_questions = {"train": easy_vqa.get_train_questions(), "test": easy_vqa.get_test_questions()}
    for split, questions in all_questions.items():
        expected = Counter((f"images/{split}/{i}.png", q, a) for q, a, i in zip(*questions, strict=True))
        actual = Counter()
        for sample in read(easy / f"{split}.json") + (read(easy / "val.json") if split == "train" else []):
            turns = turns_of(sample)
            assert turns[0][0].startswith("<|image|>") and (split == "train" or len(turns) == 1)
            actual.update((sample["image"], question.removeprefix("<|image|>"), given) for question, given in turns)
        assert actual == expected

    for name in ("train", "val", "test", "captions", "captions_val"):
        samples = read(easy / f"{name}.json")
        assert len({sample["id"] for sample in samples}) == len(samples)
        assert all((easy / sample["image"]).is_file() for sample in samples[::50])
    original = Path(easy_vqa.get_train_image_paths()[2375])
    assert (easy / "images" / "train" / "2375.png").read_bytes() == original.read_bytes()


def test_easy_vqa_captions_agree_with_the_answers(easy):
    for suffix in ("", "_val"):
        samples = read(easy / ("val.json" if suffix else "train.json"))
        answers = {sample["image"]: {answer for _, answer in turns_of(sample)} for sample in samples}
        for sample in read(easy / f"captions{suffix}.json"):
            ((request, caption),) = turns_of(sample)
            assert request == "<|image|>" + CAPTION_REQUEST
            article, color, shape = caption.removesuffix(".").split()
            assert article == "a" and answers[sample["image"]] - {"yes", "no"} <= {color, shape}


def test_easy_vqa_validation_images_are_held_out(easy):
    names = ("train", "val", "captions", "captions_val")
    images = {name: {sample["image"] for sample in read(easy / f"{name}.json")} for name in names}
    assert len(images["val"]) == 100 and images["captions_val"] == images["val"]
    assert not images["val"] & (images["train"] | images["captions"])
    ids = {name: {sample["id"] for sample in read(easy / f"{name}.json")} for name in ("text", "text_val")}
    assert {f"images/train/{name.removeprefix('text-')}.png" for name in ids["text_val"]} == images["val"]
    assert not ids["text"] & ids["text_val"]


def test_easy_vqa_text_is_balanced_and_correct(easy):
    descriptions = {f"The image shows {scene.caption}": scene for scene in SCENES}
    seen, presence, n_captions = set(), Counter(), 0
    assert len(read(easy / "text.json")) == 8000
    for sample in read(easy / "text.json") + read(easy / "text_val.json"):
        assert "image" not in sample
        (first, answer), *others = turns_of(sample)
        description, _, question = first.partition(". ")
        scene = descriptions[description + "."]
        if question == CAPTION_REQUEST:
            n_captions += 1
            assert answer == scene.caption and not others
            continue
        for question, answer in [(question, answer), *others]:
            assert ANSWERS[scene][question] == answer
            seen.add((scene, question))
            if answer in ("yes", "no"):
                presence[" not " in question or " no " in question, answer] += 1
    assert n_captions == 1600
    assert {question for _, question in seen} == set().union(*ANSWERS.values())
    assert {scene for scene, _ in seen} == set(SCENES)
    assert min(presence.values()) > 0.4 * max(presence.values())  # "not" does not imply the answer


def test_easy_vqa_is_deterministic(easy, tmp_path, monkeypatch):
    monkeypatch.setattr(easy_vqa_script, "copy_images", lambda *_: None)  # slow, and nothing depends on them
    monkeypatch.setattr(easy_vqa_script, "train_tokenizer", lambda *_: None)
    for seed in (0, 1):
        written = {}  # the samples of each file
        monkeypatch.setattr(easy_vqa_script, "write_samples", lambda path, new: written.update({path.name: new}))
        assert run_main(easy_vqa_script.main, "--out", tmp_path / "out", "--seed", seed)[0] == 0
        same = [samples == read(easy / name) for name, samples in written.items()]
        assert len(same) == 7 and all(same) == (seed == 0)
    assert not list(easy.glob("*.unfinished"))


def test_easy_vqa_user_errors(tmp_path, monkeypatch):
    if "easy_vqa" in sys.modules:
        (tmp_path / "file").write_text("")
        assert_user_error(run_main(easy_vqa_script.main, "--out", tmp_path / "file"), str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "easy_vqa", None)  # as if it was not installed
    assert_user_error(run_main(easy_vqa_script.main, "--out", tmp_path / "out"), "pip install easy_vqa")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    (images / "dogs").mkdir(parents=True)
    for name in ("a.png", "b.png", "dogs/c.png", "../secret.png"):
        Image.new("RGB", (4, 4)).save(images / name)
    return tmp_path


PAIRS = [("a.png", "A cat, asleep."), ("a.png", "A cat."), ("b.png", 'Says "hi".')]
PAIRS += [("dogs/c.png", "Ein Hund, über all.")]
CSV = 'image,caption\na.png,"A cat, asleep."\na.png,A cat.\nb.png,"Says ""hi""."\n\ndogs/c.png,"Ein Hund, über all."\n'
NESTED = [{"image": "a.png", "caption": ["A cat, asleep.", "A cat."]}]
NESTED += [{"image": image, "caption": caption} for image, caption in PAIRS[2:]]
FILES = {
    "c.csv": CSV,
    "c.txt": CSV,
    "bom.csv": "\ufeff" + CSV,
    "windows.csv": CSV.replace("\n", "\r\n"),
    "c.tsv": "id\timage\tcaption\n" + "".join(f"0\t{image}\t{caption}\n" for image, caption in PAIRS),
    "c.json": json.dumps(NESTED),
    "c.jsonl": "\n".join(json.dumps(entry) for entry in NESTED) + "\n\n",
}


def prepare_captions(folder: Path, content: str | bytes, *flags: object, name: str = "c.csv") -> tuple[int, str, str]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = ("--images", folder / "images", "--captions", folder / name, "--out", folder / "new" / "out.json")
    return run_main(captions_script.main, *paths, *flags)


@pytest.mark.parametrize("name", FILES)
def test_captions_formats(folder, name):
    code, stdout, stderr = prepare_captions(folder, FILES[name], name=name)
    assert code == 0, stderr
    samples = read(folder / "new" / "out.json")
    expected = [(image, "<|image|>" + CAPTION_REQUEST, caption) for image, caption in PAIRS]
    assert [(sample["image"], *turns_of(sample)[0]) for sample in samples] == expected
    assert len({sample["id"] for sample in samples}) == 4
    assert f"--data {folder / 'new' / 'out.json'} --image-root {folder / 'images'}" in stdout


def test_captions_hold_out_images(folder):
    def split(*flags: object) -> list[list[str]]:
        assert prepare_captions(folder, CSV, *flags)[0] == 0
        return [[sample["image"] for sample in read(folder / "new" / f"out{end}.json")] for end in ("", "_val")]

    train, val = split("--val", 1, "--one-caption")
    assert len(val) == 1 and sorted(train + val) == ["a.png", "b.png", "dogs/c.png"]
    assert split("--val", 1, "--one-caption") == [train, val]
    train, val = split("--val", 2)
    assert len(set(val)) == 2 and not set(train) & set(val)


def test_captions_report_what_is_left_out(folder):
    rows = ["image,caption", "a.png,fine", "gone.png,x", "gone.png,y", "../secret.png,x", f"{folder}/secret.png,x"]
    rows += ["dogs/../../secret.png,x", "dogs,x", ",x", "b.png,   ", "b.png,two <image> here"]
    code, stdout, _ = prepare_captions(folder, "\n".join(rows) + "\n")
    assert code == 0
    assert [sample["image"] for sample in read(folder / "new" / "out.json")] == ["a.png"]
    missing, outside, unusable = stdout.splitlines()[:3]
    assert " 3 images " in missing and "gone.png" in missing
    assert " 3 images " in outside and "../secret.png" in outside
    assert " 2 captions " in unusable


@pytest.mark.parametrize(
    "name, content, keyword",
    [
        ("c.csv", "", "first line"),
        ("c.csv", "image,caption\na.png,A cat, asleep.\n", "line 2"),
        ("c.csv", "image,caption\na.png\n", "line 2"),
        ("c.csv", 'image,caption\na.png,"never closed\nb.png,x\n', "c.csv"),
        ("c.csv", "image,caption\na.png,über\n".encode("latin-1"), "c.csv"),
        ("c.csv", "image,caption\ngone.png,x\n", "no image"),
        ("c.json", "{", "c.json"),
        ("c.json", '[{"image": 1, "caption": "x"}]', "entry 1"),
        ("c.json", '["x"]', "entry 1"),
        ("c.json", "[" * 100_000, "c.json"),
        ("c.jsonl", '{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": [1]}\n', "line 2"),
    ],
)
def test_captions_malformed_files_are_user_errors(folder, name, content, keyword):
    assert_user_error(prepare_captions(folder, content, name=name), keyword)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "flags, keyword",
    [
        ("--images nowhere", "nowhere"),
        ("--captions nothing.csv", "nothing.csv"),
        ("--captions images", "images"),
        ("--out c.csv", "overwrite"),
        ("--out images", "images"),
        ("--out c.csv/x.json", "c.csv"),
        ("--out images/a.png", "a.png"),
        ("--val 3", "--val"),
        ("--val -1", "--val"),
    ],
)
def test_captions_user_errors(folder, monkeypatch, flags, keyword):
    monkeypatch.chdir(folder)
    (folder / "c.csv").write_text(CSV)
    flags = f"--images images --captions c.csv --out out.json {flags}".split()
    assert_user_error(run_main(captions_script.main, *flags), keyword)
    assert (folder / "c.csv").read_text() == CSV
    assert not (folder / "out.json").exists()
