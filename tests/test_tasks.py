"""The benchmarks' readers: files in the published formats, and what goes wrong with them.

The files of fixtures/tasks are invented, a folder for each task, in the formats of: visualqa.org (vqav2),
okvqa.allenai.org, textvqa.org, vizwiz.org, the GQA download, the package easy-vqa, Karpathy's caption_datasets.zip,
open-compass/MMBench, AILab-CVC/SEED-Bench (DATASET.md), lupantech/ScienceQA, Q-Future/Q-Bench, MME's release,
AoiDragon/POPE, hendrycks/test, AllenAI's ARC-V1-Feb2018 and X-PLUG/mPLUG-Owl (OwlEval). The images are made here.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data.image import load_image
from data.text import IMAGE_MARK
from metrics import cider
from tasks import MME, PICK, SHORT, TASKS, Question, Row, letter, read_lines, read_table

FIXTURES = Path(__file__).parent / "fixtures" / "tasks"
COCO_42 = "val2014/COCO_val2014_000000000042.jpg"
SPLIT_MME = ("celebrity", "landmark", "posters", "scene")  # with folders for images and for questions, as artwork
IMAGES = {
    "vqav2": [COCO_42],
    "vqav2-testdev": ["test2015/COCO_test2015_000000000007.jpg"],
    "okvqa": ["val2014/COCO_val2014_000000000043.jpg"],
    "textvqa": ["train_images/00ab.jpg"],
    "vizwiz": ["val/VizWiz_val_00000000.jpg"],
    "vizwiz-test": ["test/VizWiz_test_00000000.jpg"],
    "gqa": ["images/n9.jpg"],
    "easy-vqa": ["test/images/0.png"],
    "coco": [COCO_42],
    "flickr30k": ["flickr30k-images/99.jpg"],
    "seed": ["SEED-Bench-image/1454426_25", "SEED-Bench-image/1454427_11"],
    "scienceqa": ["images/test/4/image.png", "images/test/6/image.png"],
    "qbench": ["images/00012.jpg", "images/00013.jpg"],
    "qbench-test": ["images/00012.jpg"],
    "mme": [
        *(f"{c}/images/0001.jpg" for c in SPLIT_MME),
        *(f"{c}/0001.png" for c in sum(MME.values(), []) if c not in (*SPLIT_MME, "artwork")),
        "artwork/images/toy_dataset/0001.jpg",
        "color/0002.jpg",
    ],
    "pope": [COCO_42],
    "owleval": ["cases/1.jpg"],
}


@pytest.fixture
def folder(tmp_path):
    """folder(name) -> a copy of the task's fixture, with its images."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        for image in IMAGES.get(name, []):
            path = tmp_path / name / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (220, 30, 30)).save(path, "PNG")
        return tmp_path / name

    return make


@pytest.fixture
def read(folder):
    return lambda name: TASKS[name].read(folder(name))


def results(task, questions, answers):
    """What summarise takes."""
    assert len(questions) == len(answers)
    return list(zip(questions, answers, TASKS[task].score(answers, questions)))


def summary(task, questions, answers):
    return TASKS[task].summarise(results(task, questions, answers))


# ----------------------------------------------------------------------------------------------------
# All tasks


def test_there_is_a_fixture_for_every_task():
    assert sorted(path.name for path in FIXTURES.iterdir()) == sorted(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_what_holds_for_every_task(folder, name):
    task = TASKS[name]
    assert task.name == name and "https://" in task.help and "\n" not in task.help
    assert (task.max_new_tokens == 0) == (name in ("mmlu", "arc-c", "arc-e"))
    assert task.min_new_tokens == (8 if name in ("coco", "flickr30k") else 1)
    place = folder(name)
    questions = task.read(place)
    assert len({question.id for question in questions}) == len(questions) > 0
    for question in questions:
        assert len(IMAGE_MARK.findall(question.prompt)) == len(question.images)
        assert (question.choices is not None) == (task.max_new_tokens == 0)
        for image in question.images:
            assert load_image(image if isinstance(image, bytes) else place / image).size == (2, 2)
        (score,) = task.score(["B"], [question])
        assert score is None or 0 <= score <= 1
        released = "single word or phrase." in question.prompt or "one-sentence caption" in question.prompt
        assert question.space == released  # for which the released scripts have a space after "ASSISTANT:"
    numbers = summary(name, questions, ["a kite over a beach"] * len(questions))
    assert numbers and all(isinstance(number, int | float) for number in numbers.values())


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_file_is_answered_with_its_name_and_where_it_is_published(folder, name):
    place = folder(name)
    for path in [path for path in place.rglob("*") if path.is_file() and path.suffix not in (".jpg", ".png", "")]:
        if name == "mme" and path.parent.name == "color":
            continue  # it has two files of questions, and one is enough
        if name == "mmlu" and path.parent.name == "test":
            continue  # likewise
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError) as error:
            TASKS[name].read(place)
        assert path.name in str(error.value) or "*.txt" in str(error.value)
        assert TASKS[name].url in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(content)
    for image in IMAGES.get(name, []):
        (place / image).rename(place / "hidden")
        with pytest.raises(FileNotFoundError) as error:
            TASKS[name].read(place)
        assert Path(image).stem in str(error.value) and TASKS[name].url in str(error.value)
        (place / "hidden").rename(place / image)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        TASKS[name].read(place / "nothing")


def damaged(content):
    """Parsed JSON with one of its values spoilt: each value, in several ways, one after the other."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[: 2 if isinstance(content, list) else None]:
        for wrong in (None, 1.5, {"x": [1]}, "\ud83d", "../../outside", "a <image> b"):
            content[key] = wrong
            yield content
        content[key] = value
        for _ in damaged(value):
            yield content


@pytest.mark.parametrize("name", [name for name in TASKS if list((FIXTURES / name).rglob("*.json*"))])
def test_spoilt_json_is_one_sentence_or_does_not_matter(folder, name):
    """Whatever stands in place of any value of the first file, read answers with questions or with one sentence."""
    place = folder(name)
    path = sorted(place.rglob("*.json*"))[-1]
    text = path.read_text(encoding="utf-8")
    by_line = path.suffix == ".jsonl" or name == "pope"
    content = [json.loads(line) for line in text.splitlines()] if by_line else json.loads(text)
    n_refused = 0
    for spoilt in damaged(content):
        path.write_text("".join(json.dumps(row) + "\n" for row in spoilt) if by_line else json.dumps(spoilt))
        try:
            questions = TASKS[name].read(place)
        except (ValueError, FileNotFoundError) as error:
            n_refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
            str(error).encode()
        else:
            words = [text for q in questions for text in (q.id, q.prompt, q.group, str(q.truth or ""), *q.images)]
            assert not any(part in word for word in words for part in ("\ud83d", "None", "{'x'", "1.5"))
            assert not any(".." in image for question in questions for image in question.images)
    assert n_refused > 10
    for broken in ("", "{", "[" * 100_000, "3", "\ufeff[3]"):
        path.write_text(broken)
        with pytest.raises(ValueError) as error:
            TASKS[name].read(place)
        assert "\n" not in str(error.value)
    path.write_bytes(b'\xff\xfe{"a": 1}')
    with pytest.raises(ValueError, match="not UTF-8"):
        TASKS[name].read(place)


def test_a_question_that_is_there_twice_is_named(folder):
    place = folder("vqav2-testdev")
    path = place / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    content = json.loads(path.read_text())
    content["questions"] *= 2
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="question '7000' is there twice"):
        TASKS["vqav2-testdev"].read(place)


@pytest.mark.parametrize("image", ["../42.jpg", "a/../../42.jpg", "{root}/coco_pope_random.json"])
def test_no_path_leads_out_of_the_folder(folder, image):
    place = folder("owleval")
    row = {"image": image, "question_id": 1, "question": "What?"}
    (place / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        TASKS["owleval"].read(place)
    assert image in str(error.value)
    if ".." in image:
        assert "is not a path below" in str(error.value)


def test_an_absolute_path_is_refused(folder):
    place = folder("coco")
    content = json.loads((place / "dataset_coco.json").read_text())
    content["images"][0]["filepath"] = str(place / "val2014")
    (place / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a path below"):
        TASKS["coco"].read(place)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have_is_one_sentence(folder, name):
    place = folder("owleval")
    (place / "questions.jsonl").write_text(json.dumps({"image": name, "question_id": 1, "question": "What?"}))
    with pytest.raises((ValueError, FileNotFoundError), match="question '1'") as error:
        TASKS["owleval"].read(place)
    assert len(str(error.value)) < 600


# ----------------------------------------------------------------------------------------------------
# Open questions


def test_vqav2(read):
    kite, wind = read("vqav2")
    truth = ["red"] * 7 + ["pink"] * 3
    prompt = f"<image>What colour is the kite? {SHORT}"
    assert kite == Question("42000", prompt, [COCO_42], truth, "other", space=True)
    assert wind.truth == ["yes"] * 10 and wind.group == "yes/no"
    numbers = summary("vqav2", [kite, wind], ["Red.", "no"])
    assert numbers == {"accuracy": 50.0, "accuracy, other": 100.0, "accuracy, yes/no": 0.0}


def test_questions_without_answers_are_refused(folder):
    place = folder("vqav2")
    path = place / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    del content["annotations"][1]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="questions 1: .*annotations.json has no answers to question 42001"):
        TASKS["vqav2"].read(place)


@pytest.mark.parametrize("name", ["vqav2-testdev", "vizwiz-test", "mmbench-test", "mmbench-test-cn", "qbench-test"])
def test_a_split_without_answers_is_asked_and_not_scored(read, name):
    questions = read(name)
    assert [question.truth for question in questions] == [None]
    assert results(name, questions, ["B"])[0][2] is None
    assert summary(name, questions, ["B"]) == {"answers without a published truth": 1}


def test_the_other_open_tasks(read):
    (sport,) = read("okvqa")
    assert sport.truth == ["sail"] * 10 and sport.images == ["val2014/COCO_val2014_000000000043.jpg"]
    (sign,) = read("textvqa")
    assert sign.id == "34602" and sign.truth == ["slow"] * 9 + ["slow down"]
    (tin,) = read("vizwiz")
    assert tin.prompt == f"<image>Hi, what is in this tin? Thank you. {SHORT}" and tin.group == "other"
    assert tin.truth == ["beans"] * 6 + ["unanswerable"] * 4
    assert summary("vizwiz", [tin], ["beans"]) == summary("vizwiz", [tin], ["unanswerable"]) == {"accuracy": 100.0}
    assert summary("vizwiz", [tin], ["I cannot tell"]) == {"accuracy": 0.0}  # "unanswerable" is a word like any other
    assert read("vizwiz-test")[0].images == ["test/VizWiz_test_00000000.jpg"]  # its file lies in no folder of its own


def test_gqa_and_easy_vqa_count_exact_matches(read):
    sky, bench = read("gqa")
    assert (sky.id, sky.images, sky.truth, sky.group) == ("201", ["images/n9.jpg"], "no", "verify")
    assert TASKS["gqa"].score(["No.", " no ", "not", "yes"], [sky] * 4) == [1, 1, 0, 0]
    numbers = summary("gqa", [sky, bench], ["no", "bench"])
    assert numbers == {"accuracy": 50.0, "accuracy, query": 0.0, "accuracy, verify": 100.0}
    shape, red = read("easy-vqa")
    assert shape.prompt == "<image>what shape is present?" and shape.images == red.images == ["test/images/0.png"]
    assert summary("easy-vqa", [shape, red], ["Circle.", "no"])["accuracy"] == 100.0


def test_captions_are_those_of_the_test_split(read):
    (kite,) = read("coco")
    assert kite.prompt == "<image>Provide a one-sentence caption for the provided image."
    assert kite.images == [COCO_42] and kite.truth == ["A red kite over a beach.", "Somebody flies a kite."]
    (sofa,) = read("flickr30k")
    assert sofa.images == ["flickr30k-images/99.jpg"] and sofa.truth == ["Two men carry a sofa."]
    other = Question("9", kite.prompt, kite.images, ["Two men carry a sofa up some stairs."])
    right = summary("coco", [kite, other], ["a red kite over a beach", "two men carry a sofa up some stairs"])
    wrong = summary("coco", [kite, other], ["a donkey", "a crane"])
    assert right["CIDEr"] > 100 > wrong["CIDEr"] == 0.0
    captions, truths = ["a red kite", "two men"], [kite.truth, other.truth]
    corpus, each = cider(captions, truths)
    assert TASKS["coco"].score(captions, [kite, other]) == each and each[0] > each[1] > 0
    assert summary("coco", [kite, other], captions) == pytest.approx({"CIDEr": 100 * corpus})


def test_owleval_is_for_people_to_rate(read):
    first, second, alone = read("owleval")
    assert first.prompt == "<image>What is odd here?" and first.images == ["cases/1.jpg"] and first.before == []
    assert second.prompt == "And why?" and second.images == [] and second.before == ["1"]
    assert (first.group, second.group) == ("a,b,e", "a,b")
    assert alone.before == [] and alone.images == ["cases/1.jpg"]  # "]single_turn", as published once
    assert summary("owleval", [first, second], ["This.", "That."]) == {"answers for people to rate": 2}


# ----------------------------------------------------------------------------------------------------
# Multiple choice


@pytest.mark.parametrize(
    "answer, expected",
    [
        *[(answer, "B") for answer in ("B", " B\n", "(B)", "B. a cat", "B) a cat", "The answer is B", "Option B.")],
        *[(answer, "A") for answer in ("A", "A: cat", "Answer: A", "A, the cat", "answer is (A)")],
        *[(answer, "") for answer in ("", "A cat", "A's", "cat", "b", "F", "Both", "A-frame house", "no")],
    ],
)
def test_the_letter_of_an_answer(answer, expected):
    assert letter(answer) == expected


def test_mmbench(read):
    first, rotated, style = read("mmbench")
    question = 'Which is the\ncolour of this "square"?'
    assert first.prompt == f"<image>It is no circle.\n{question}\nA. red\nB. blue\n{PICK}"
    assert rotated.prompt == f"<image>It is no circle.\n{question}\nA. blue\nB. red\n{PICK}"
    assert (first.id, first.truth, rotated.id, rotated.truth) == ("5", "A", "1000005", "B")
    assert first.images == rotated.images  # the rotation names the row of its image
    assert style.prompt.startswith("<image>N/A\nWhat is this?\nA. a photo\n") and style.group == "coarse_perception"
    (chinese,) = read("mmbench-cn")
    assert chinese.prompt == "<image>N/A\n这个方块是什么颜色？\nA. 红色\nB. 蓝色\n请直接回答选项字母。"


def test_mmbench_counts_a_question_if_all_rotations_are_right(read):
    questions = read("mmbench")
    assert summary("mmbench", questions, ["A", "B", "C"])["accuracy"] == 100.0
    for answers in (["A", "A", "C"], ["B", "B", "C"]):  # always the first, always the second
        numbers = summary("mmbench", questions, answers)
        assert numbers["accuracy"] == 50.0 and numbers["accuracy, coarse_perception"] == 100.0
    assert summary("mmbench", questions, ["A", "", "D"])["accuracy"] == 0.0
    unknown = [replace(question, truth=None) for question in questions]  # for the server, which wants every row
    assert summary("mmbench-test", unknown, ["A", "B", "C"]) == {"answers without a published truth": 3}


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("\n6\t", "\n6.5\t", "row 2: index should be"),
        ("\tred\tblue\t\t\tA\t", "\tred\tblue\t\t\tC\t", "row 0: answer should be one of A, B"),
        ("\tred\tblue\t\t\t", "\tred\t\t\t\t", "2 to 5 choices, not 1"),
        ("\tred\tblue\t\t\t", "\tred\tblue\t\tgreen\t", "option C is empty"),
        ("\t5\town", "\t5?\town", "row 1: image is not base64"),
        ("\t5\town", "\t5", "row 1: it has 13 cells, and should have 14"),
        ("\thint\t", "\ttip\t", "row 0: hint should be a text"),
        ("circle.\tred", "circle.\t<image>", "question '5' holds the placeholder"),
        ("6\tWhat", "5\tWhat", "question '5' is there twice"),
    ],
)
def test_a_spoilt_table_is_one_sentence(folder, before, after, words):
    place = folder("mmbench")
    path = place / "mmbench_dev_en_20231003.tsv"
    text = path.read_text(encoding="utf-8")
    assert text.count(before) >= 1
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        TASKS["mmbench"].read(place)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_cell_may_be_large_and_hold_any_line_break(tmp_path):
    path = tmp_path / "a.tsv"
    cell = "x" * 200_000
    path.write_text(f'a\tb\r\n{cell}\t"1\u2028\n2"\r\n\r\ny\u2028\x0b\tz\r\n', encoding="utf-8", newline="")
    first, second = read_table(path, "\t")
    assert first.fields == {"a": cell, "b": "1\u2028\n2"} and second.fields == {"a": "y\u2028\x0b", "b": "z"}


def test_seed_asks_about_its_images_alone(read):
    sheep, hill = read("seed")
    assert sheep.prompt == f"<image>How many sheep are on the hill?\nA. One\nB. Two\nC. Three\nD. Four\n{PICK}"
    assert (sheep.images, sheep.truth, sheep.group) == (["SEED-Bench-image/1454426_25"], "B", "Instances Counting")
    numbers = summary("seed", [sheep, hill], ["B", "A"])
    assert numbers == {"accuracy": 50.0, "accuracy, Instances Counting": 100.0, "accuracy, Spatial Relation": 0.0}


def test_scienceqa_passes_over_what_has_no_image(read):
    animals, arrow = read("scienceqa")
    assert animals.prompt == f"<image>N/A\nWhich of these two is the larger?\nA. the ant\nB. the elephant\n{PICK}"
    assert arrow.prompt.startswith("<image>The picture shows a map.\nWhere does the arrow point?\nA. north\n")
    assert (animals.id, animals.truth, arrow.id, arrow.truth) == ("4", "B", "6", "C")
    assert arrow.images == ["images/test/6/image.png"] and arrow.group == "social science"


def test_qbench(read):
    sharp, worst = read("qbench")
    assert sharp.prompt == f"<image>Is this picture sharp?\nA. No\nB. Yes\n{PICK}" and sharp.truth == "B"
    assert worst.truth == "A" and worst.images == ["images/00013.jpg"]


# ----------------------------------------------------------------------------------------------------
# Yes or no


def test_mme(read):
    questions = read("mme")
    assert len(questions) == 2 * 15 and {question.group for question in questions} == {*sum(MME.values(), [])}
    kite = next(question for question in questions if question.id == "color/0002/0")
    assert kite.prompt == f"<image>Is there a red kite? \n{SHORT}"  # the space is the released script's
    assert (kite.images, kite.truth) == (["color/0002.jpg"], "yes")
    places = {q.group: q.images[0] for q in questions if q.group in ("OCR", "scene", "artwork")}
    assert (places["OCR"], places["scene"]) == ("OCR/0001.png", "scene/images/0001.jpg")
    assert places["artwork"] == "artwork/images/toy_dataset/0001.jpg"  # as in some copies of the release

    def score(answer, question):
        return TASKS["mme"].score([answer], [question])[0]

    assert [score(a, kite) for a in ("Yes", "yes, it", " YES.", "A yes", "no", "I say yes")] == [1, 1, 1, 0, 0, 0]
    blue = next(question for question in questions if question.id == "color/0002/1")
    assert [score(a, blue) for a in ("No", "no.", "Not", "None", "A no", "yes", "")] == [1, 1, 1, 1, 1, 0, 0]


def test_the_points_of_mme(read):
    questions = read("mme")
    numbers = summary("mme", questions, [question.truth for question in questions])
    assert numbers["perception"] == 2000.0 and numbers["cognition"] == 800.0
    numbers = summary("mme", questions, ["yes"] * len(questions))
    assert numbers["perception"] == 500.0 and numbers["OCR acc"] == 50.0 and numbers["OCR acc+"] == 0.0
    answers = ["no" if question.id == "color/0002/0" else question.truth for question in questions]
    numbers = summary("mme", questions, answers)
    assert numbers["color acc"] == 75.0 and numbers["color acc+"] == 50.0
    assert numbers["perception"] == 2000.0 - 75.0


@pytest.mark.parametrize("text", ["One?\tYes\n", "One?\tYes\nTwo?\tPerhaps\n", "One? Yes\nTwo? No\n", "\tYes\n\tNo\n"])
def test_a_spoilt_file_of_mme_is_one_sentence(folder, text):
    place = folder("mme")
    (place / "count" / "0001.txt").write_text(text)
    with pytest.raises(ValueError, match="0001.txt, line [12]: there should be two lines"):
        TASKS["mme"].read(place)


def test_pope(read):
    questions = read("pope")
    assert questions[0].prompt == f"<image>Is there a kite in the image? {SHORT}"
    assert [q.id for q in questions[:3]] == ["random/1", "random/2", "popular/1"]

    def score(answer, question):
        return TASKS["pope"].score([answer], [question])[0]

    no = ("No", "no", "No, there is", "There is not any.", "There is no kite")
    assert [score(answer, questions[1]) for answer in no] == [1.0] * 5
    yes = ("Yes", "yes.", "Yes. There is no cat.", "Maybe", "Nothing", "")
    assert [score(answer, questions[0]) for answer in yes] == [1.0] * 6
    numbers = summary("pope", questions, ["yes", "no", "yes", "yes", "no", "no"])
    kinds = {kind: [numbers[f"{name}, {kind}"] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
             for kind in ("random", "popular", "adversarial")}  # fmt: skip
    assert kinds["random"] == [100.0, 100.0, 100.0, 100.0, 50.0]
    assert kinds["popular"] == [50.0, 50.0, 100.0, pytest.approx(200 / 3), 100.0]
    assert kinds["adversarial"] == [50.0, 0.0, 0.0, 0.0, 0.0]


# ----------------------------------------------------------------------------------------------------
# Text only


def test_mmlu_has_five_shots_of_its_subject(read):
    boats, roughly, two = read("mmlu")
    assert boats.prompt == (
        "The following are multiple choice questions (with answers) about  old boats.\n\n"
        "What drives a sailing boat?\nA. wind\nB. steam\nC. coal\nD. oxen\nAnswer: A\n\n"
        "What drives a rowing boat?\nA. wind\nB. steam\nC. people\nD. oxen\nAnswer:"
    )
    assert boats.choices == ["A", "B", "C", "D"] and boats.truth == "C" and len(boats.shots) == 1
    assert roughly.prompt.count("Answer: A\n\n") == len(roughly.shots) == 5 and "6 + 6" not in roughly.prompt
    assert roughly.prompt.endswith('What is 7 + 1, "roughly"?\nA. 9\nB. 8, exactly\nC. 7\nD. None\nAnswer:')
    numbers = summary("mmlu", [boats, roughly, two], ["C", "B", "A"])
    assert numbers["accuracy"] == pytest.approx(200 / 3) and numbers["accuracy, small_sums"] == 50.0


def test_shots_are_left_out_from_the_last_on(read):
    question = read("mmlu")[2]
    for n_left in (4, 3, 2, 1, 0):
        question = question.with_fewer_shots()
        assert len(question.shots) == n_left == question.prompt.count("Answer: A\n\n")
        assert [f"What is {n} + {n}?\nA. {2 * n}\n" in question.prompt for n in range(1, 6)].count(True) == n_left
        assert f"What is {n_left + 1} + {n_left + 1}?\nA. {2 * n_left + 2}\n" not in question.prompt
        assert question.prompt.startswith("The following are") and question.prompt.endswith("D. 4\nAnswer:")


def test_arc(read):
    letters, numbers, three = read("arc-c")
    rain = "Question: What falls from clouds?\nA. stones\nB. rain\nC. sand"
    assert letters.prompt == numbers.prompt == f"{rain}\nD. leaves\nAnswer:"
    assert three.prompt == f"{rain}\nAnswer:" and three.choices == ["A", "B", "C"]
    assert letters.truth == numbers.truth == three.truth == "B"
    assert summary("arc-c", [letters, numbers, three], ["B", "B", "A"])["accuracy"] == pytest.approx(200 / 3)
    assert read("arc-e")[0].choices == ["A", "B", "C", "D", "E"]


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match="a.jsonl, line 3 is not valid JSON"):
        read_lines(tmp_path / "a.jsonl")


def test_a_number_is_not_true():
    with pytest.raises(ValueError, match="here: n should be a whole number"):
        Row({"n": True}, "here").get("n", int)
