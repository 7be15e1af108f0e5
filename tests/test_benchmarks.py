"""The readers of benchmarks.py: questions from files in the published formats, their scores, and malformed files.

fixtures/benchmarks has a folder of invented files per benchmark, in the formats of: visualqa.org (vqav2),
okvqa.allenai.org, textvqa.org, vizwiz.org, the GQA download, the package easy-vqa, Karpathy's caption_datasets.zip,
open-compass/MMBench, AILab-CVC/SEED-Bench (DATASET.md), lupantech/ScienceQA, Q-Future/Q-Bench, MME's release,
AoiDragon/POPE, hendrycks/test, AllenAI's ARC-V1-Feb2018 and X-PLUG/mPLUG-Owl (OwlEval). The images are created here.
fixtures/questions.json has the questions that the readers should make of them.
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from data.image import load_image
from evaluation.benchmarks import BENCHMARKS, read_table
from evaluation.file_list import FILES
from evaluation.metrics import cider, percent
from evaluation.question import Question, limit_questions
from evaluation.scoring import MME_CATEGORIES, find_letter, find_letter_in_sentence

FIXTURES = Path(__file__).parent / "fixtures" / "benchmarks"
EXPECTED = json.loads((FIXTURES.parent / "questions.json").read_text(encoding="utf-8"))

def images_of(name: str) -> set[str]:
    """The paths of a benchmark's images. (Other images are part of a file; theirs is a hexadecimal number.)"""
    return {image for row in EXPECTED[name] for image in row.get("images", []) if "/" in image}


@pytest.fixture
def folder(tmp_path):
    """folder(name) -> a copy of the task's fixture, with its images."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        for image in images_of(name):
            path = tmp_path / name / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (220, 30, 30)).save(path, "PNG")
        return tmp_path / name

    return make


@pytest.fixture
def read(folder):
    return lambda name: BENCHMARKS[name].read(folder(name))


def numbers_of(name, questions, answers):
    scores = BENCHMARKS[name].score(answers, questions)
    return BENCHMARKS[name].summarize(list(zip(questions, answers, scores, strict=True)))


def summary(name, questions, answers):
    return {key: number.value for key, number in numbers_of(name, questions, answers).items()}


# --- All benchmarks -------------------------------------------------------------------------------


def test_every_benchmark_has_a_fixture():
    assert sorted(path.name for path in FIXTURES.iterdir()) == sorted(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_of_a_benchmark(folder, name):
    benchmark, root = BENCHMARKS[name], folder(name)
    assert benchmark.name == name and "https://" in benchmark.url and "\n" not in benchmark.title
    assert (benchmark.max_new_tokens == 0) == (name in ("mmlu", "arc-c", "arc-e"))
    assert benchmark.min_new_tokens == (8 if name in ("coco", "flickr30k") else 1)
    questions = benchmark.read(root)
    fields = [{key: value for key, value in asdict(question).items() if value} for question in questions]
    for row in fields:
        row["images"] = [image if isinstance(image, str) else image.hex() for image in row.get("images", [])]
    assert [{key: value for key, value in row.items() if value} for row in fields] == EXPECTED[name]
    for image in [image for question in questions for image in question.images]:
        assert load_image(image if isinstance(image, bytes) else root / image).size == (2, 2)
    scores = benchmark.score(["B"] * len(questions), questions)
    assert all(value is None or 0 <= value <= 1 for value in scores)
    numbers = summary(name, questions, ["a kite over a beach"] * len(questions))
    assert numbers and all(isinstance(number, int | float) for number in numbers.values())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_file_is_named_with_its_source(folder, name):
    root, url = folder(name), BENCHMARKS[name].url
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix not in (".jpg", ".png", "")]
    for path in [*files, *(root / image for image in images_of(name))]:
        if (name, path.parent.name, path.suffix) in (("mme", "color", ".txt"), ("mmlu", "test", ".csv")):
            continue  # there are two files of questions, and one is enough
        path.rename(root / "hidden")
        with pytest.raises(FileNotFoundError) as error:
            BENCHMARKS[name].read(root)
        assert path.stem in str(error.value) or "*.txt" in str(error.value)
        assert url in str(error.value) and "\n" not in str(error.value)
        (root / "hidden").rename(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        BENCHMARKS[name].read(root / "nothing")


def corruptions(content):
    """Yields JSON content with one value replaced, for each value in several ways."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[: 2 if isinstance(content, list) else None]:
        for wrong in (None, {"x": [1]}, "\ud83d", "../../outside", "a <image> b"):
            content[key] = wrong
            yield content
        content[key] = value
        for _ in corruptions(value):
            yield content


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if list((FIXTURES / name).rglob("*.json*"))])
def test_malformed_json_is_one_line_or_harmless(folder, name):
    """With any value of the first file replaced, read returns valid questions or raises a one-line error."""
    root = folder(name)
    path = sorted(root.rglob("*.json*"))[-1]
    text = path.read_text(encoding="utf-8")
    by_line = path.suffix == ".jsonl" or name == "pope"
    content = [json.loads(line) for line in text.splitlines()] if by_line else json.loads(text)
    n_refused = 0
    for corrupt in corruptions(content):
        path.write_text("".join(json.dumps(row) + "\n" for row in corrupt) if by_line else json.dumps(corrupt))
        try:
            questions = BENCHMARKS[name].read(root)
        except (ValueError, FileNotFoundError) as error:
            n_refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
            str(error).encode()
        else:
            texts = [text for q in questions for text in (q.id, q.prompt, q.group, str(q.truth or ""), *q.images)]
            assert not any(part in text for text in texts for part in ("\ud83d", "None", "{'x'"))
            assert not any(".." in image for question in questions for image in question.images)
    assert n_refused > 10
    for content in (b"", b"{", b"[" * 100_000, b"3", "\ufeff[3]".encode(), b'\xff\xfe{"a": 1}'):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            BENCHMARKS[name].read(root)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file, key, change, words",
    [
        ("OpenEnded_mscoco_val2014_questions", "questions", lambda rows: [rows[0] | {"question": True}], "row 0"),
        ("OpenEnded_mscoco_val2014_questions", "questions", lambda rows: rows[:1] * 2, "'42000'.* twice"),
        ("mscoco_val2014_annotations", "annotations", lambda rows: rows[:1], "row 1: .*42001"),
    ],
)
def test_errors_name_the_row(folder, file, key, change, words):
    path = folder("vqav2") / f"v2_{file}.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: change(content[key])}))
    with pytest.raises(ValueError, match=words):
        BENCHMARKS["vqav2"].read(path.parent)


@pytest.mark.parametrize("image", ["../../42.jpg", "a/../../../42.jpg", "{root}/1.jpg", "a\0b", "x" * 5000])
def test_image_paths_stay_in_the_folder(folder, image):
    root = folder("owleval")
    row = {"image": image.replace("{root}", str(root)), "question_id": 1, "question": "What?"}
    (root / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises((ValueError, FileNotFoundError), match="question '1'") as error:
        BENCHMARKS["owleval"].read(root)
    assert len(str(error.value)) < 600
    assert ".." not in image or "not a path below" in str(error.value)


def test_linked_images_stay_in_the_folder(folder):
    root = folder("owleval")
    (root / "questions.jsonl").write_text(json.dumps({"image": "link.jpg", "question_id": 1, "question": "What?"}))
    images = (root / "cases") if (root / "cases").is_dir() else (root / "images")
    (images / "link.jpg").symlink_to(next(images.glob("*.jpg")))
    assert BENCHMARKS["owleval"].read(root)
    Image.new("RGB", (2, 2)).save(root.parent / "outside.jpg")
    (images / "link.jpg").unlink()
    (images / "link.jpg").symlink_to(root.parent / "outside.jpg")
    with pytest.raises(ValueError, match="link.jpg"):
        BENCHMARKS["owleval"].read(root)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def enlarge(path):
    os.truncate(path, 2**36)  # a hole, which takes no space


@pytest.mark.parametrize("change", [replace_by_pipe, enlarge])
@pytest.mark.parametrize("name", ("vizwiz", "pope", "mmbench", "mmlu", "mme"))
def test_pipes_and_giant_files_are_refused(folder, name, change):
    root = folder(name)
    path = min(path for path in root.rglob("*.*") if path.suffix in (".json", ".tsv", ".csv", ".txt"))
    change(path)
    with pytest.raises(ValueError, match=path.name):
        BENCHMARKS[name].read(root)


def test_file_name_that_is_not_utf8_is_refused(folder):
    root = folder("mmlu")
    path = next((root / "test").glob("*.csv"))
    path.rename(os.fsdecode(os.fsencode(path.parent) + b"/\xff_test.csv"))
    with pytest.raises(ValueError, match="surrogates"):
        BENCHMARKS["mmlu"].read(root)


def test_absolute_path_is_refused(folder):
    path = folder("coco") / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"][0]["filepath"] = str(path.parent.parent)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a path below"):
        BENCHMARKS["coco"].read(path.parent)


# --- Open questions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, answers, expected",
    [
        ("vqav2", ["Red.", "no"], {"accuracy": 50.0, "accuracy, other": 100.0, "accuracy, yes/no": 0.0}),
        ("vizwiz", ["beans"], {"accuracy": 100.0}),
        ("vizwiz", ["unanswerable"], {"accuracy": 100.0}),
        ("vizwiz", ["I cannot tell"], {"accuracy": 0.0}),
        ("gqa", ["no", "bench"], {"accuracy": 50.0, "accuracy, query": 0.0, "accuracy, verify": 100.0}),
        ("easy-vqa", ["Circle.", "no"], {"accuracy": 100.0, "accuracy, other": 100.0, "accuracy, yes or no": 100.0}),
        ("seed", ["B", "A"], {"accuracy": 50, "accuracy, Instances Counting": 100, "accuracy, Spatial Relation": 0}),
        ("arc-c", ["B", "B", "A"], {"accuracy": 100 * 2 / 3}),
        ("mmlu", ["C", "B", "A"], {"accuracy": 200 / 3, "accuracy, old_boats": 100, "accuracy, small_sums": 50}),
        ("owleval", ["This.", "That.", "It."], {"answers for people to rate": 3}),
    ],
)
def test_summary(read, name, answers, expected):
    assert summary(name, read(name), answers) == pytest.approx(expected)


def test_numbers_say_what_they_are_computed_from(read):
    """MME: points and their maximum by part, then its categories; POPE: precision of the answers yes."""
    questions = read("mme")
    numbers = numbers_of("mme", questions, ["yes"] * len(questions))
    n = [sum(q.group in group for q in questions) for group in MME_CATEGORIES.values()]
    assert str(numbers["perception"]) == "500.00 of 2,000 points" and numbers["perception"].n == n[0]
    assert str(numbers["cognition"]) == "200.00 of 800 points" and numbers["cognition"].n == n[1]
    names = list(numbers)
    parts = [name.split(",")[0] for name in names]
    assert parts == sorted(parts, reverse=True) and names[0] == "perception" and set(parts) == {*MME_CATEGORIES}
    color, both = numbers["perception, color acc"], numbers["perception, color acc+"]
    assert color == percent(color.n / 2, color.n) and both.n == color.n / 2

    questions = read("pope")
    numbers = numbers_of("pope", questions, ["yes", "no", "yes", "yes", "no", "no"])
    assert numbers["precision, popular"] == percent(1, 2) and numbers["recall, popular"] == percent(1, 1)
    assert numbers["precision, adversarial"].n == 0 and numbers["f1, popular"].interval is None
    assert numbers["accuracy, average"].n == 6 and numbers["accuracy, average"].interval is None
    assert str(numbers_of("vizwiz", read("vizwiz"), ["beans"])["accuracy"]) == "100.00 % (20.65 to 100.00)"
    assert str(numbers_of("owleval", read("owleval"), ["a", "b", "c"])["answers for people to rate"]) == "3 answers"


@pytest.mark.parametrize("name", ["vqav2-testdev", "vizwiz-test", "mmbench-test", "mmbench-test-cn", "qbench-test"])
def test_split_without_truth_is_asked_but_not_scored(read, name):
    questions = read(name)
    assert [question.truth for question in questions] == [None]
    assert BENCHMARKS[name].score(["B"], questions) == [None]
    assert summary(name, questions, ["B"]) == {"answers without a published truth": 1}


def test_captions_are_scored_together(read):
    (kite,) = read("coco")
    other = Question("9", kite.prompt, kite.images, ["Two men carry a sofa up some stairs."])
    captions = ["a red kite", "two men"]
    corpus, each = cider(captions, [kite.truth, other.truth])
    assert BENCHMARKS["coco"].score(captions, [kite, other]) == each and each[0] > each[1] > 0
    assert summary("coco", [kite, other], captions) == pytest.approx({"CIDEr": 100 * corpus})


# --- Multiple choice ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, expected",
    [
        *[(answer, "B") for answer in ("B", " B\n", "(B)", "B. a cat", "B) a cat", "The answer is B", "Option B.")],
        *[(answer, "A") for answer in ("A", "A: cat", "Answer: A", "A, the cat", "answer is (A)")],
        *[(answer, "") for answer in ("", "A cat", "A's", "cat", "b", "F", "Both", "A-frame house", "no")],
    ],
)
def test_find_letter(answer, expected):
    assert find_letter(answer) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        *[(answer, "B") for answer in ("The correct option is B", "The best choice would be (B).", "I choose option: B")],
        *[(answer, "B") for answer in ("正确答案是B", "答案：B。", "答案是（B）", "我选择B", "选B", "B选项是正确的", "应该选 B", "答案为选项B")],
        *[(answer, "") for answer in ("The correct option is Big", "the answer", "选择苹果", "CAT", "A cat", "答案是Both")],
    ],
)
def test_find_letter_in_sentence(answer, expected):
    """It agrees with find_letter where that finds one, and finds no letter in words."""
    assert find_letter_in_sentence(answer) == expected
    assert find_letter(answer) in ("", expected)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_list_names_the_files_of_a_benchmark(folder, name):
    """All that are listed exist in the fixture, which has no others."""
    root, entries = folder(name), FILES[name].split(" (")[0].split()
    listed = {path for e in entries for path in root.glob(e + "**/*" if e.endswith("/") else f"**/{e}")}
    if name != "mme":  # of whose 14 categories there is only a pattern
        assert all(any(root.glob(f"**/{entry}")) for entry in entries)
        assert {path for path in root.rglob("*") if path.is_file()} == {path for path in listed if path.is_file()}


@pytest.mark.parametrize(
    "name, n, ids",
    [
        ("mmbench", 1, ["5", "1000005"]),  # all rotations
        ("mmbench", 2, ["5", "1000005", "6"]),
        ("owleval", 1, None),
        ("pope", 3, None),
        ("mme", 7, None),
    ],
)
def test_limit_keeps_what_belongs_together(read, name, n, ids):
    questions, benchmark = read(name), BENCHMARKS[name]
    kept = limit_questions(questions, n, benchmark.unit_of)
    assert ids is None or [question.id for question in kept] == ids
    units = {benchmark.unit_of(question) for question in kept}
    assert len(units) == n and kept == [question for question in questions if benchmark.unit_of(question) in units]
    if name == "pope":
        assert {question.group for question in kept} == {"random", "popular", "adversarial"}
    if name == "mme":
        assert len(kept) == 14 and len({question.group for question in kept}) == 7
        n_perception = len({question.group for question in kept} & {*MME_CATEGORIES["perception"]})
        assert numbers_of("mme", kept, ["yes"] * 14)["perception"].maximum == 200 * n_perception


def test_mmbench_counts_a_question_if_all_rotations_are_right(read):
    questions = read("mmbench")
    assert summary("mmbench", questions, ["A", "B", "C"])["accuracy"] == 100.0
    for answers in (["A", "A", "C"], ["B", "B", "C"]):  # always the first or always the second option
        numbers = summary("mmbench", questions, answers)
        assert numbers["accuracy"] == 50.0 and numbers["accuracy, coarse_perception"] == 100.0
    assert summary("mmbench", questions, ["A", "", "D"])["accuracy"] == 0.0
    unknown = [replace(question, truth=None) for question in questions]  # the server needs every row
    assert summary("mmbench-test", unknown, ["A", "B", "C"]) == {"answers without a published truth": 3}


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("\n6\t", "\n6.5\t", "row 2: "),
        ("\tred\tblue\t\t\tA\t", "\tred\tblue\t\t\tC\t", "row 0: answer"),
        ("\tred\tblue\t\t\t", "\tred\t\t\t\t", "row 0: "),
        ("\tred\tblue\t\t\t", "\tred\tblue\t\tgreen\t", "row 0: option C"),
        ("\t5\town", "\t5", "row 1: "),
        ("\thint\t", "\ttip\t", "row 0: hint"),
        ("circle.\tred", "circle.\t<image>", "question '5'"),
        ("6\tWhat", "5\tWhat", "question '5'"),
    ],
)
def test_malformed_table_is_one_line(folder, before, after, words):
    root = folder("mmbench")
    path = root / "mmbench_dev_en_20231003.tsv"
    text = path.read_text(encoding="utf-8")
    assert text.count(before) >= 1
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        BENCHMARKS["mmbench"].read(root)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_table_cells_may_be_large_and_contain_line_breaks(tmp_path):
    path = tmp_path / "a.tsv"
    cell = "x" * 200_000
    path.write_text(f'a\tb\r\n{cell}\t"1\u2028\n2"\r\n\r\ny\u2028\x0b\tz\r\n', encoding="utf-8", newline="")
    first, second = read_table(path, "\t")
    assert first == {"a": cell, "b": "1\u2028\n2"} and second == {"a": "y\u2028\x0b", "b": "z"}


# --- Yes or no ------------------------------------------------------------------------------------


def test_mme_score(read):
    questions = {question.id: question for question in read("mme")}
    yes, no = questions["color/0002/0"], questions["color/0002/1"]
    assert BENCHMARKS["mme"].score(["Yes", "yes, it", " YES.", "A yes", "no"], [yes] * 5) == [1, 1, 1, 0, 0]
    assert BENCHMARKS["mme"].score(["No", "no.", "Not", "None", "yes", ""], [no] * 6) == [1, 1, 1, 1, 0, 0]


def test_mme_summary(read):
    questions = read("mme")
    numbers = summary("mme", questions, ["yes"] * len(questions))
    assert numbers["perception"] == 500.0 and numbers["cognition"] == 200.0
    assert numbers["perception, OCR acc"] == 50.0 and numbers["perception, OCR acc+"] == 0.0
    answers = ["no" if question.id == "color/0002/0" else question.truth for question in questions]
    numbers = summary("mme", questions, answers)
    assert numbers["perception, color acc"] == 75.0 and numbers["perception, color acc+"] == 50.0
    assert numbers["perception"] == 2000.0 - 75.0 and numbers["cognition"] == 800.0


@pytest.mark.parametrize("text", ["One?\tYes\n", "One?\tYes\nTwo?\tPerhaps\n", "One? Yes\nTwo? No\n", "\tYes\n\tNo\n"])
def test_malformed_file_of_mme_is_one_line(folder, text):
    root = folder("mme")
    (root / "count" / "0001.txt").write_text(text)
    with pytest.raises(ValueError, match="0001.txt, row [01]: "):
        BENCHMARKS["mme"].read(root)


def test_pope(read):
    questions = read("pope")
    no = ["No", "no", "No, there is", "There is not any.", "There is no kite"]
    assert BENCHMARKS["pope"].score(no, [questions[1]] * 5) == [1.0] * 5
    yes = ["Yes", "yes.", "Yes. There is no cat.", "Maybe", "Nothing", ""]
    assert BENCHMARKS["pope"].score(yes, [questions[0]] * 6) == [1.0] * 6
    numbers = summary("pope", questions, ["yes", "no", "yes", "yes", "no", "no"])
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert [numbers[f"{name}, random"] for name in names] == [100.0, 100.0, 100.0, 100.0, 50.0]
    popular = [50.0, 50.0, 100.0, 200 / 3, 100.0]
    assert [numbers[f"{name}, popular"] for name in names] == pytest.approx(popular)
    assert [numbers[f"{name}, adversarial"] for name in names] == [50.0, 0.0, 0.0, 0.0, 0.0]
    assert list(numbers)[0] == "accuracy, average" and numbers["accuracy, average"] == pytest.approx(200 / 3)
    assert numbers["f1, average"] == pytest.approx(500 / 9)  # of the three, not of all answers together


# --- Text only ------------------------------------------------------------------------------------


def test_shots_are_removed_from_the_last_on(read):
    question = read("mmlu")[2]
    for n_left in (4, 3, 2, 1, 0):
        question = question.with_fewer_shots()
        assert len(question.shots) == n_left == question.prompt.count("Answer: A\n\n")
        assert [f"What is {n} + {n}?\nA. {2 * n}\n" in question.prompt for n in range(1, 6)].count(True) == n_left
        assert f"What is {n_left + 1} + {n_left + 1}?\nA. {2 * n_left + 2}\n" not in question.prompt
        assert question.prompt.startswith("The following are") and question.prompt.endswith("D. 4\nAnswer:")
