"""The scripts that write training files, run as a user runs them."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EASY_VQA = ROOT / "data" / "easy_vqa" / "prepare.py"
CAPTIONS = ROOT / "data" / "captions" / "prepare.py"


def run(script: Path, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, **kwargs)


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def turns_of(sample: dict) -> list[tuple[str, str]]:
    conversation = sample["conversations"]
    assert [turn["from"] for turn in conversation] == ["human", "gpt"] * (len(conversation) // 2)
    values = [turn["value"] for turn in conversation]
    return list(zip(values[0::2], values[1::2], strict=True))


def assert_one_sentence(process: subprocess.CompletedProcess, *words: str) -> None:
    assert process.returncode == 2, process.stderr
    message = process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in message


# ----------------------------------------------------------------------------------------------------------------------
# Easy-VQA


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Path:
    pytest.importorskip("easy_vqa")
    out = tmp_path_factory.mktemp("easy")
    process = run(EASY_VQA, "--out", out)
    assert process.returncode == 0, process.stderr
    for name in ("text", "text_val", "captions", "captions_val", "train", "val", "test"):
        assert f"{name}.json: {len(read(out / f'{name}.json')):,} samples" in process.stdout
    return out


def test_easy_vqa_rules_reproduce_every_answer_of_the_package():
    easy_vqa = pytest.importorskip("easy_vqa")
    from data.easy_vqa.prepare import ANSWERS, scene_of, turns_by_image

    n_known = 0
    all_questions = set()
    for questions, answers, image_ids in (easy_vqa.get_train_questions(), easy_vqa.get_test_questions()):
        all_questions.update(questions)
        for turns in turns_by_image(questions, answers, image_ids).values():
            scene = scene_of(turns)  # raises where no scene gives all the answers
            if scene is not None:
                n_known += 1
                assert all(ANSWERS[scene][question] == answer for question, answer in turns)
    assert n_known > 4000
    assert all_questions == set().union(*ANSWERS.values())


def test_easy_vqa_rules_by_hand():
    from data.easy_vqa.prepare import ANSWERS, Scene, scene_of

    answers = ANSWERS[Scene("blue", "rectangle")]
    assert answers["what color is the shape?"] == "blue"
    assert answers["what is the blue shape?"] == "rectangle"
    assert answers["is there not a circle?"] == "yes"
    assert answers["is no rectangle present?"] == "no"
    assert answers["is a blue shape present?"] == "yes"
    assert "what is the red shape?" not in answers
    assert "what color is the circle?" not in answers
    assert scene_of([("what color is the rectangle?", "blue")]) == Scene("blue", "rectangle")
    assert scene_of([("what color is the shape?", "blue")]) is None
    not_round = [("is there a circle?", "no"), ("is no triangle present?", "yes"), ("what color is the shape?", "red")]
    assert scene_of(not_round) == Scene("red", "rectangle")
    with pytest.raises(ValueError):
        scene_of([("is there a circle?", "no"), ("is a circle present?", "yes")])


def test_easy_vqa_image_files(easy):
    import easy_vqa

    questions, answers, image_ids = easy_vqa.get_train_questions()
    official = Counter((f"images/train/{i}.png", q, a) for q, a, i in zip(questions, answers, image_ids, strict=True))
    ours = Counter()
    for name in ("train", "val"):
        for sample in read(easy / f"{name}.json"):
            (first, answer), *others = turns_of(sample)
            assert first.startswith("<|image|>")
            turns = [(first.removeprefix("<|image|>"), answer), *others]
            assert "<|image|>" not in "".join(question for question, _ in turns)
            ours.update((sample["image"], question, answer) for question, answer in turns)
    assert ours == official

    questions, answers, image_ids = easy_vqa.get_test_questions()
    official = Counter((f"images/test/{i}.png", "<|image|>" + q, a) for q, a, i in zip(questions, answers, image_ids))
    test = read(easy / "test.json")
    assert len(test) == 9673
    assert all(len(turns_of(sample)) == 1 for sample in test)
    assert Counter((sample["image"], *turns_of(sample)[0]) for sample in test) == official

    for name in ("train", "val", "test", "captions", "captions_val"):
        samples = read(easy / f"{name}.json")
        assert len({sample["id"] for sample in samples}) == len(samples)
        assert all((easy / sample["image"]).is_file() for sample in samples[::50])
    image_id = 2375
    official_file = Path(easy_vqa.get_train_image_paths()[image_id])
    assert (easy / "images" / "train" / f"{image_id}.png").read_bytes() == official_file.read_bytes()


def test_easy_vqa_captions_agree_with_answers(easy):
    answers = {}
    for name in ("train", "val"):
        for sample in read(easy / f"{name}.json"):
            answers[sample["image"]] = {answer for _, answer in turns_of(sample)} - {"yes", "no"}
    for name in ("captions", "captions_val"):
        for sample in read(easy / f"{name}.json"):
            ((request, caption),) = turns_of(sample)
            assert request == "<|image|>Provide a one-sentence caption for the provided image."
            article, color, shape = caption.removesuffix(".").split()
            assert article == "a"
            assert answers[sample["image"]] <= {color, shape}


def test_easy_vqa_held_out_images(easy):
    def images(name: str) -> set[str]:
        return {sample["image"] for sample in read(easy / f"{name}.json")}

    assert len(images("val")) == 100
    assert images("captions_val") == images("val")
    assert not images("val") & images("train")
    assert not images("val") & images("captions")
    assert {f"images/train/{s['id'].removeprefix('text-')}.png" for s in read(easy / "text_val.json")} == images("val")
    text_ids = {sample["id"] for sample in read(easy / "text.json")}
    assert not text_ids & {sample["id"] for sample in read(easy / "text_val.json")}


def test_easy_vqa_text(easy):
    from data.easy_vqa.prepare import ANSWERS, CAPTION_REQUEST, SCENES

    descriptions = {f"The image shows {scene.caption}": scene for scene in SCENES}
    assert "The image shows a blue rectangle." in descriptions
    text = read(easy / "text.json")
    assert len(text) == 8000
    assert len({sample["id"] for sample in text}) == 8000
    seen = Counter()
    n_captions = 0
    presence = Counter()
    for sample in text + read(easy / "text_val.json"):
        assert "image" not in sample
        (first, answer), *others = turns_of(sample)
        description, _, question = first.partition(". ")
        scene = descriptions[description + "."]
        if question == CAPTION_REQUEST:
            n_captions += 1
            assert answer == scene.caption
            assert not others
            continue
        for question, answer in [(question, answer), *others]:
            assert ANSWERS[scene][question] == answer
            seen[scene, question] += 1
            if answer in ("yes", "no"):
                presence[" not " in question or " no " in question, answer] += 1
    assert n_captions == 1600
    assert {question for _, question in seen} == set().union(*ANSWERS.values())
    assert {scene for scene, _ in seen} == set(SCENES)
    assert min(presence.values()) > 0.4 * max(presence.values())  # "not" alone says little about the answer


def test_easy_vqa_is_deterministic(easy, tmp_path):
    command = [sys.executable, "-m", "data.easy_vqa.prepare", "--out", str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=120)
    run(EASY_VQA, "--out", tmp_path / "other", "--seed", 1)
    for path in easy.glob("*.json"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert (easy / "val.json").read_bytes() != (tmp_path / "other" / "val.json").read_bytes()
    assert not list(easy.glob("*.unfinished"))


def test_easy_vqa_missing_package_is_a_sentence(tmp_path):
    (tmp_path / "easy_vqa.py").write_text("raise ModuleNotFoundError(\"No module named 'easy_vqa'\")")
    # The folder comes before the installed packages, and so hides the package where there is one.
    process = run(EASY_VQA, "--out", tmp_path / "out", env={"PYTHONPATH": str(tmp_path)})
    assert_one_sentence(process, "pip install easy-vqa")
    assert len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_easy_vqa_unwritable_folder_is_a_sentence(tmp_path):
    pytest.importorskip("easy_vqa")
    (tmp_path / "file").write_text("")
    assert_one_sentence(run(EASY_VQA, "--out", tmp_path / "file"), "Cannot write", str(tmp_path / "file"))


# ----------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    (images / "dogs").mkdir(parents=True)
    for name in ("a.png", "b.png", "dogs/c.png"):
        Image.new("RGB", (4, 4)).save(images / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    return tmp_path


PAIRS = [
    ("a.png", "A cat, asleep."),
    ("a.png", "A cat."),
    ("b.png", 'Says "hi".'),
    ("dogs/c.png", "Ein Hund, über all."),
]

CSV = 'image,caption\na.png,"A cat, asleep."\na.png,A cat.\nb.png,"Says ""hi""."\n\ndogs/c.png,"Ein Hund, über all."\n'
TSV = "id\timage\tcaption\n" + "".join(f"0\t{image}\t{caption}\n" for image, caption in PAIRS)
NESTED = [
    {"image": "a.png", "caption": ["A cat, asleep.", "A cat."]},
    {"image": "b.png", "caption": 'Says "hi".'},
    {"image": "dogs/c.png", "caption": "Ein Hund, über all."},
]
FILES = {
    "c.csv": CSV,
    "c.txt": CSV,
    "bom.csv": "\ufeff" + CSV,
    "windows.csv": CSV.replace("\n", "\r\n"),
    "c.tsv": TSV,
    "c.json": json.dumps(NESTED),
    "c.jsonl": "\n".join(json.dumps(entry) for entry in NESTED) + "\n\n",
}


def prepare_captions(folder: Path, content: str, *arguments: object, name="c.csv") -> subprocess.CompletedProcess:
    (folder / name).write_bytes(content.encode())
    paths = ("--images", folder / "images", "--captions", folder / name, "--out", folder / "new" / "out.json")
    return run(CAPTIONS, *paths, *arguments)


@pytest.mark.parametrize("name", FILES)
def test_captions_formats(folder, name):
    process = prepare_captions(folder, FILES[name], name=name)
    assert process.returncode == 0, process.stderr
    samples = read(folder / "new" / "out.json")
    request = "<|image|>Provide a one-sentence caption for the provided image."
    assert [(sample["image"], *turns_of(sample)[0]) for sample in samples] == [(i, request, c) for i, c in PAIRS]
    assert len({sample["id"] for sample in samples}) == 4
    assert f"--data {folder / 'new' / 'out.json'} --image-root {folder / 'images'}" in process.stdout
    assert "left out" not in process.stdout


def test_captions_held_out_by_image_and_one_caption(folder):
    assert prepare_captions(folder, CSV, "--val", 1, "--one-caption").returncode == 0
    train = [sample["image"] for sample in read(folder / "new" / "out.json")]
    val = [sample["image"] for sample in read(folder / "new" / "out_val.json")]
    assert len(val) == 1
    assert sorted(train + val) == ["a.png", "b.png", "dogs/c.png"]
    first = (folder / "new" / "out.json").read_bytes()
    prepare_captions(folder, CSV, "--val", 1, "--one-caption")
    assert (folder / "new" / "out.json").read_bytes() == first

    assert prepare_captions(folder, CSV, "--val", 2).returncode == 0
    train = {sample["image"] for sample in read(folder / "new" / "out.json")}
    val = {sample["image"] for sample in read(folder / "new" / "out_val.json")}
    assert len(val) == 2
    assert not train & val


def test_captions_leaves_out_and_reports(folder):
    rows = ["image,caption", "a.png,fine", "gone.png,x", "gone.png,y", "../secret.png,x", f"{folder}/secret.png,x"]
    rows += ["dogs/../../secret.png,x", "dogs,x", ",x", "b.png,   ", "b.png,two <image> here"]
    process = prepare_captions(folder, "\n".join(rows) + "\n")
    assert process.returncode == 0, process.stderr
    assert [sample["image"] for sample in read(folder / "new" / "out.json")] == ["a.png"]
    report = process.stdout.splitlines()
    assert report[0] == f"left out: 3 images not in {folder / 'images'}: 'gone.png', 'dogs', ''"
    assert report[1].startswith("left out: 3 images refused, their names lead out of the folder: '../secret.png'")
    assert report[2].startswith("left out: 2 captions")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("c.csv", "", ["first line"]),
        ("c.csv", "a.png,A cat.\n", ["first line", '"image"']),
        ("c.csv", "image,caption\na.png,A cat, asleep.\n", ["line 2", "3 columns", "quotes"]),
        ("c.csv", "image,caption\na.png\n", ["line 2", "1 columns"]),
        ("c.csv", 'image,caption\na.png,"never closed\nb.png,x\n', ["not a caption file"]),
        ("c.csv", "image,caption\ngone.png,x\n", ["No image"]),
        ("c.json", "{", ["not a caption file"]),
        ("c.json", "{}", ["list"]),
        ("c.json", '[{"image": 1, "caption": "x"}]', ["entry 1"]),
        ("c.json", '["x"]', ["entry 1"]),
        ("c.json", "[" * 100_000, ["not a caption file"]),
        ("c.jsonl", '{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": [1]}\n', ["line 2"]),
    ],
)
def test_captions_bad_files_are_a_sentence(folder, name, content, words):
    assert_one_sentence(prepare_captions(folder, content, name=name), *words)
    assert not (folder / "new").exists()


def test_captions_bad_arguments_are_a_sentence(folder):
    (folder / "c.csv").write_text(CSV)
    (folder / "latin.csv").write_bytes("image,caption\na.png,über\n".encode("latin-1"))
    images = folder / "images"
    good = {"--images": images, "--captions": folder / "c.csv", "--out": folder / "out.json"}

    def run_with(**changes: object) -> subprocess.CompletedProcess:
        arguments = good | {f"--{name}": value for name, value in changes.items()}
        return run(CAPTIONS, *[item for pair in arguments.items() for item in pair])

    assert_one_sentence(run_with(images=folder / "nowhere"), "no folder")
    assert_one_sentence(run_with(captions=folder / "nothing.csv"), "Cannot read", "nothing.csv")
    assert_one_sentence(run_with(captions=images), "Cannot read")
    assert_one_sentence(run_with(captions=folder / "latin.csv"), "not a caption file")
    assert_one_sentence(run_with(out=folder / "c.csv"), "overwritten")
    assert_one_sentence(run_with(out=images), "folder")
    assert_one_sentence(run_with(out=folder / "c.csv" / "x.json"), "Cannot write")
    assert_one_sentence(run_with(val=3), "--val is 3", "number of images, 3")
    assert_one_sentence(run_with(val=-1), "--val is -1")
    assert (folder / "c.csv").read_text() == CSV
    assert not (folder / "out.json").exists()


@pytest.mark.parametrize("script", [EASY_VQA, CAPTIONS])
def test_help(script):
    process = run(script, "--help")
    assert process.returncode == 0
    assert f"python {script.relative_to(ROOT)}" in process.stdout
