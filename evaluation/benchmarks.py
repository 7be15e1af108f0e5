"""The benchmarks: how the published files of each become questions with the official prompts.

    folder with the files as published
      | Benchmark.read       every question with its prompt, images and truth, all validated before the first is asked
      v
    [Question] --asked by runner.py--> answers
                                         | Benchmark.score        of each answer             (scoring.py)
                                         | Benchmark.summarize    the official numbers       (scoring.py)
                                         v
                                       {"accuracy": 64.5 % of 500, ...}

docs/evaluation.md lists the files of each benchmark and where its prompt comes from. To add a benchmark, write a reader
that yields its questions and an entry in BENCHMARKS.
"""

import base64
import csv
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath

import evaluation.scoring as scoring
from data import CAPTION_REQUEST
from data.text import IMAGE_PLACEHOLDER
from evaluation.metrics import Number
from evaluation.question import Question, Results, first_question
from common.files import check_file, reading

SHORT_ANSWER = "Answer the question using a single word or phrase."
PICK_LETTER = "Answer with the option’s letter from the given choices directly."  # the released script's apostrophe
PICK_LETTER_CN = "请直接回答选项字母。"  # LLaVA's prompt for Chinese; Owl2's script has none
SPACED = (SHORT_ANSWER, CAPTION_REQUEST)  # prompts with a space after "ASSISTANT:" in the released scripts
LETTERS = "ABCDE"
MAX_FILE = 1_000_000_000  # bytes of a file that is read as a whole


@dataclass
class Benchmark:
    """A benchmark. read_questions takes the folder; score and summarize are those of scoring.py."""

    name: str
    title: str
    url: str  # where its files are published
    read_questions: Callable[[Path], Iterator[Question]]
    score: scoring.Score
    summarize: Callable[[Results], dict[str, Number]] = scoring.mean_accuracy
    min_new_tokens: int = 1
    max_new_tokens: int = 10  # 0: the answer is the most probable of Question.choices
    unit_of: Callable[[Question], object] = first_question  # --limit keeps the questions of a unit together

    def read(self, folder: Path) -> list[Question]:
        """Reads all questions. Images are not opened, but exist and are below the folder.

        Raises FileNotFoundError, naming where the benchmark is published, for a missing file, and ValueError, naming
        file and row, for anything that differs from the published format.
        """
        try:
            questions = [replace(q, space=q.prompt.endswith(SPACED)) for q in self.read_questions(folder)]
            self._check(questions, folder)
        except FileNotFoundError as error:
            reason = f"there is no file {error.filename}" if error.filename else error
            raise FileNotFoundError(f"{reason}; {self.name} is published at {self.url}") from None
        return questions

    def _check(self, questions: list[Question], folder: Path) -> None:
        if not questions:
            raise ValueError(f"{folder} holds no question of {self.name}")
        ids, paths = set(), set()
        for question in questions:
            where = f"{self.name}, question {question.id!r:.80}"
            if question.id in ids:
                raise ValueError(f"{where} occurs twice")
            ids.add(question.id)
            if len(IMAGE_PLACEHOLDER.findall(question.prompt)) != len(question.images):
                raise ValueError(f"{where} contains an image placeholder in its text")
            for path in question.images:
                if isinstance(path, str) and path not in paths:
                    check_image(folder, path, where)
                    paths.add(path)


def check_image(folder: Path, path: str, where: str) -> None:
    """Raises ValueError for a path that is or links to a file not below the folder, FileNotFoundError for no file."""
    try:
        file = os.path.realpath(folder / path)
    except ValueError:  # a null byte or a lone surrogate
        file = ""
    if file and not PurePath(file).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{where}: {path!r:.200} is not a path below {folder}, after links")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{where}: there is no file {path!r:.200} in {folder}")


# --- files -----------------------------------------------------------------------------------------------------------

KINDS = {str: "text", int: "an integer", list: "a list with at least one entry", dict: "an object with fields"}


@contextmanager
def in_row(path: Path, i: int) -> Iterator[None]:
    """Turns an error in row i (from 0) of a file into a ValueError that names both."""
    try:
        yield
    except (ValueError, LookupError, RecursionError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}, row {i}: {reason}") from None


def get(row: object, key: str, kind: type = str, one_of: tuple = ()):
    """Returns a field of a row. Raises ValueError if it is missing, empty, or not of that type or value."""
    value = row.get(key) if isinstance(row, dict) else None
    is_kind = isinstance(value, kind) and not isinstance(value, bool) and value not in ([], {})
    if not is_kind or (one_of and value not in one_of):
        expected = f"one of {', '.join(map(str, one_of))}" if one_of else KINDS.get(kind, kind)
        raise ValueError(f"{key} should be {expected}")
    if isinstance(value, str):
        value.encode()  # raises for a lone surrogate, which JSON can express and UTF-8 cannot
    return value


def get_texts(row: object, key: str, of: str | None = None) -> list[str]:
    """Returns a field that is a list of texts, or of objects with a text in the field `of`."""
    entries = get(row, key, list)
    return [get(entry, of) if of else get({key: entry}, key) for entry in entries]


def read_field(path: Path, key: str | None = None, kind: type = list):
    """Returns a field of the object in a JSON file, or with key=None the file's whole content."""
    with reading(path):
        check_file(path, MAX_FILE)
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        return get(content, key, kind) if key else get({"its content": content}, "its content", kind)


def read_text_lines(path: Path) -> list[str]:
    """Returns the lines of a file that are not blank."""
    with reading(path):
        check_file(path, MAX_FILE)
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def read_lines(path: Path) -> list[object]:
    """Returns the rows of a file with one JSON value per line."""
    lines, rows = read_text_lines(path), []
    for i, line in enumerate(lines):
        with in_row(path, i):
            rows.append(json.loads(line))
    return not_empty(path, rows)


def read_table(path: Path, delimiter: str, names: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """Returns the rows of a CSV or TSV file. names: of its columns, if its first row does not name them."""
    csv.field_size_limit(2**30)  # a cell may hold an image
    with reading(path):
        check_file(path, MAX_FILE)
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, names, delimiter=delimiter))
    for i, row in enumerate(rows):
        with in_row(path, i):
            if None in row or None in row.values():
                raise ValueError("it has another number of cells than there are columns")
    return not_empty(path, rows)


def not_empty(path: Path, rows: list) -> list:
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def find_files(folder: Path, pattern: str) -> list[Path]:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"there is no file {folder / pattern}")
    return paths


# --- open questions --------------------------------------------------------------------------------------------------


def read_vqa(questions: str, annotations: str | None, images: str, folder: Path) -> Iterator[Question]:
    """VQAv2 and OKVQA: questions and ten people's answers in two files. images: a path, with {} for the image's id."""
    truths = {}
    if annotations:
        for i, row in enumerate(read_field(folder / annotations, "annotations")):
            with in_row(folder / annotations, i):
                truths[get(row, "question_id", int)] = get_texts(row, "answers", "answer"), get(row, "answer_type")
    for i, row in enumerate(read_field(folder / questions, "questions")):
        with in_row(folder / questions, i):
            number = get(row, "question_id", int)
            truth, group = truths[number] if annotations else (None, "")
            image = images.format(get(row, "image_id", int))
            prompt = f"<image>{get(row, 'question')} {SHORT_ANSWER}"
            yield Question(str(number), prompt, [image], truth, group=group)


def read_textvqa(folder: Path) -> Iterator[Question]:
    path = folder / "TextVQA_0.5.1_val.json"
    for i, row in enumerate(read_field(path, "data")):
        with in_row(path, i):
            image = f"train_images/{get(row, 'image_id')}.jpg"
            prompt = f"<image>{get(row, 'question')} {SHORT_ANSWER}"
            yield Question(str(get(row, "question_id", int)), prompt, [image], get_texts(row, "answers"))


def read_vizwiz(split: str, folder: Path) -> Iterator[Question]:
    path = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    path = path / f"{split}.json"
    for i, row in enumerate(read_field(path)):
        with in_row(path, i):
            image = get(row, "image")
            truth, group = None, ""
            if "answers" in row:
                truth, group = get_texts(row, "answers", "answer"), get(row, "answer_type")
            prompt = f"<image>{get(row, 'question')} {SHORT_ANSWER}"
            yield Question(image, prompt, [f"{split}/{image}"], truth, group=group)


def read_gqa(folder: Path) -> Iterator[Question]:
    path = folder / "testdev_balanced_questions.json"
    for i, (number, row) in enumerate(read_field(path, kind=dict).items()):
        with in_row(path, i):
            group = get(get(row, "types", dict), "structural")
            prompt = f"<image>{get(row, 'question')} {SHORT_ANSWER}"
            yield Question(number, prompt, [f"images/{get(row, 'imageId')}.jpg"], get(row, "answer"), group=group)


def read_easy_vqa(folder: Path) -> Iterator[Question]:
    path = folder / "test" / "questions.json"
    for i, row in enumerate(read_field(path)):
        with in_row(path, i):
            row = dict(zip(("question", "answer", "image"), get({"a row": row}, "a row", list)))
            truth = get(row, "answer")
            group = "yes or no" if truth in ("yes", "no") else "other"
            image = f"test/images/{get(row, 'image', int)}.png"
            yield Question(str(i), f"<image>{get(row, 'question')}", [image], truth, group=group)


def read_captions(file: str, images: str, folder: Path) -> Iterator[Question]:
    """Karpathy's test split. images: the folder of the images whose row names none."""
    for i, row in enumerate(read_field(folder / file, "images")):
        with in_row(folder / file, i):
            if get(row, "split") == "test":
                image = f"{get(row, 'filepath') if 'filepath' in row else images}/{get(row, 'filename')}"
                captions = get_texts(row, "sentences", "raw")
                yield Question(str(get(row, "imgid", int)), f"<image>{CAPTION_REQUEST}", [image], captions)


def read_owleval(folder: Path) -> Iterator[Question]:
    """Single questions, and conversations: an image's questions of several turns in the order of their numbers.

    A question that is both is the first of its conversation. Nothing precedes it there, so one answer serves both.
    The published answers are those of the conversations: there is one per question, and they refer to earlier ones.
    """
    path = folder / "questions.jsonl"
    images = "cases" if (folder / "cases").is_dir() else "images"
    rows = []
    for i, row in enumerate(read_lines(path)):
        with in_row(path, i):
            rows.append((get(row, "question_id", int), i, row))
    conversations = defaultdict(list)  # image: ids of the questions so far
    for number, i, row in sorted(rows, key=lambda entry: entry[0]):
        with in_row(path, i):
            image = get(row, "image")
            kinds = get_texts(row, "category") if "category" in row else ["single_turn"]
            before = list(conversations[image]) if "multi_turn" in kinds else []
            if before and "single_turn" in kinds:
                raise ValueError("a question that is also asked alone should be the first of its conversation")
            if "multi_turn" in kinds:
                conversations[image].append(str(number))
            group = get(row, "ability") if "ability" in row else ""
            placeholder, paths = ("", []) if before else ("<image>", [f"{images}/{image}"])
            yield Question(str(number), placeholder + get(row, "question"), paths, group=group, before=before)


# --- multiple choice -------------------------------------------------------------------------------------------------


def format_options(choices: list[str]) -> str:
    """Returns one line per choice, with its letter."""
    if not 1 < len(choices) <= len(LETTERS):
        raise ValueError(f"there should be 2 to {len(LETTERS)} choices, not {len(choices)}")
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


def read_mmbench(file: str, instruction: str, folder: Path) -> Iterator[Question]:
    rows = read_table(folder / file, "\t")
    image_cells = {row.get("index"): row.get("image") for row in rows}
    for i, row in enumerate(rows):
        with in_row(folder / file, i):
            index = get(row, "index")
            int(index)  # raises ValueError; circular_accuracy computes with it
            is_empty = [row.get(letter, "").strip() in ("", "nan") for letter in LETTERS]
            n_choice = is_empty.index(True) if True in is_empty else len(LETTERS)
            if not all(is_empty[n_choice:]):
                raise ValueError(f"option {LETTERS[n_choice]} is empty, but a later one is not")
            choices = format_options([row[letter] for letter in LETTERS[:n_choice]])
            hint = get(row, "hint")
            hint = "N/A" if hint.strip() in ("", "nan") else hint
            cell = get(row, "image")  # a rotation may have the index of another row instead of an image
            image = base64.b64decode(image_cells.get(cell, cell), validate=True)
            truth = get(row, "answer", one_of=tuple(LETTERS[:n_choice])) if "answer" in row else None
            prompt = f"<image>{hint}\n{get(row, 'question')}\n{choices}\n{instruction}"
            yield Question(index, prompt, [image], truth, group=get(row, "l2-category"))


def read_seed(folder: Path) -> Iterator[Question]:
    path = folder / "SEED-Bench.json"
    types = read_field(path, "question_type", dict)
    names = {number: name for name, number in types.items() if isinstance(number, int)}
    for i, row in enumerate(read_field(path, "questions")):
        with in_row(path, i):
            if get(row, "data_type", one_of=("image", "video")) == "video":
                continue
            number = get(row, "question_id", str | int)
            choices = format_options([get(row, f"choice_{letter}") for letter in "abcd"])
            prompt = f"<image>{get(row, 'question')}\n{choices}\n{PICK_LETTER}"
            image, truth = f"SEED-Bench-image/{get(row, 'data_id')}", get(row, "answer", one_of=tuple("ABCD"))
            yield Question(str(number), prompt, [image], truth, group=names[get(row, "question_type_id", int)])


def read_scienceqa(folder: Path) -> Iterator[Question]:
    path = folder / "problems.json"
    problems = read_field(path, kind=dict)
    for i, number in enumerate(read_field(folder / "pid_splits.json", "test")):
        with in_row(folder / "pid_splits.json", i):
            row = get(problems, get({"a number": number}, "a number"), dict)
            if row.get("image") is None:
                continue
            texts = get_texts(row, "choices")
            choices = format_options(texts)
            answer = get(row, "answer", int, one_of=tuple(range(len(texts))))
            prompt = f"<image>{get(row, 'hint') or 'N/A'}\n{get(row, 'question')}\n{choices}\n{PICK_LETTER}"
            image = f"images/test/{number}/{get(row, 'image')}"
            yield Question(number, prompt, [image], LETTERS[answer], group=get(row, "subject"))


def read_qbench(file: str, folder: Path) -> Iterator[Question]:
    for i, row in enumerate(read_field(folder / file)):
        with in_row(folder / file, i):
            texts = get_texts(row, "candidates")
            choices = format_options(texts)
            truth = None
            if "correct_ans" in row:
                truth = LETTERS[texts.index(get(row, "correct_ans", one_of=tuple(texts)))]
            prompt = f"<image>{get(row, 'question')}\n{choices}\n{PICK_LETTER}"
            yield Question(str(i), prompt, [f"images/{get(row, 'img_path')}"], truth)


# --- yes or no -------------------------------------------------------------------------------------------------------


def read_mme(folder: Path) -> Iterator[Question]:
    """Two questions per image, one with the answer yes and one with no."""
    for category in sum(scoring.MME_CATEGORIES.values(), []):
        texts = images = folder / category
        if (texts / "questions_answers_YN").is_dir():
            texts, images = texts / "questions_answers_YN", texts / "images"
        # rglob: in some copies of the release artwork's images are one folder deeper, in toy_dataset
        image_of = {path.stem: path for path in sorted(images.rglob("*")) if path.suffix != ".txt"}
        for path in find_files(texts, "*.txt"):
            image = image_of.get(path.stem, images / f"{path.stem}.jpg").relative_to(folder).as_posix()
            lines = read_text_lines(path)
            for i, line in enumerate(lines):
                question, _, truth = line.rpartition("\t")
                truth = truth.strip().lower()
                if len(lines) != 2 or not question or truth not in ("yes", "no"):
                    raise ValueError(f"{path}, row {i}: there should be two rows: a question, a tab, Yes or No")
                # The released script removes this sentence, but not the space before it.
                prompt = f"<image>{question.replace('Please answer yes or no.', '')}\n{SHORT_ANSWER}"
                yield Question(f"{category}/{path.stem}/{i}", prompt, [image], truth, group=category)


def read_pope(folder: Path) -> Iterator[Question]:
    for group in ("random", "popular", "adversarial"):
        path = folder / f"coco_pope_{group}.json"
        for i, row in enumerate(read_lines(path)):
            with in_row(path, i):
                number, image = get(row, "question_id", int), f"val2014/{get(row, 'image')}"
                prompt = f"<image>{get(row, 'text')} {SHORT_ANSWER}"
                truth = get(row, "label", one_of=("yes", "no"))
                yield Question(f"{group}/{number}", prompt, [image], truth, group=group)


# --- text only -------------------------------------------------------------------------------------------------------


def read_mmlu(folder: Path) -> Iterator[Question]:
    """The authors' prompt, including the two spaces after "about"."""
    for path in find_files(folder / "test", "*_test.csv"):
        with in_row(path, 0):
            subject = get({"the file's name": path.name.removesuffix("_test.csv")}, "the file's name")
        examples = read_mmlu_table(folder / "dev" / f"{subject}_dev.csv")[:5]
        shots = [f"{prompt} {truth}\n\n" for prompt, truth in examples]
        intro = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        for i, (prompt, truth) in enumerate(read_mmlu_table(path)):
            prompt = intro + "".join(shots) + prompt
            yield Question(f"{subject}/{i}", prompt, [], truth, group=subject, choices=list("ABCD"), shots=shots)


def read_mmlu_table(path: Path) -> list[tuple[str, str]]:
    """Returns (prompt, right letter) of each row."""
    questions = []
    for i, row in enumerate(read_table(path, ",", ("question", *"ABCD", "answer"))):
        with in_row(path, i):
            options = format_options([row[letter] for letter in "ABCD"])
            questions.append((f"{row['question']}\n{options}\nAnswer:", get(row, "answer", one_of=tuple("ABCD"))))
    return questions


def read_arc(file: str, folder: Path) -> Iterator[Question]:
    for i, row in enumerate(read_lines(folder / file)):
        with in_row(folder / file, i):
            question = get(row, "question", dict)
            options = format_options(get_texts(question, "choices", "text"))
            labels = get_texts(question, "choices", "label")  # A to E, or 1 to 5
            truth = LETTERS[labels.index(get(row, "answerKey", one_of=tuple(labels)))]
            prompt = f"Question: {get(question, 'stem')}\n{options}\nAnswer:"
            yield Question(get(row, "id"), prompt, [], truth, choices=list(LETTERS[: len(labels)]))


# --- the table -------------------------------------------------------------------------------------------------------

VQAV2 = "https://visualqa.org/download.html"
VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
COCO = "https://cocodataset.org/#download"  # 2014
FLICKR = "https://shannon.cs.illinois.edu/DenotationGraph"
MMBENCH = "https://github.com/open-compass/MMBench"
SCIENCEQA = "https://github.com/lupantech/ScienceQA (data/scienceqa)"
QBENCH = "https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"
MME = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
SEED = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
MMLU = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
EASY_VQA = "https://pypi.org/project/easy-vqa (its folder easy_vqa/data)"
POPE = f"https://github.com/AoiDragon/POPE (output/coco), its images at {COCO}"
OWLEVAL = "https://github.com/X-PLUG/mPLUG-Owl/tree/main/OwlEval"
ARC = "https://allenai.org/data/arc (ARC-V1-Feb2018-2)"

VAL2014, TEST2015 = "val2014/COCO_val2014_{:012}.jpg", "test2015/COCO_test2015_{:012}.jpg"
vqav2 = partial(read_vqa, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", VAL2014)
vqav2_testdev = partial(read_vqa, "v2_OpenEnded_mscoco_test-dev2015_questions.json", None, TEST2015)
okvqa = partial(read_vqa, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", VAL2014)
vizwiz, vizwiz_test = partial(read_vizwiz, "val"), partial(read_vizwiz, "test")
coco = partial(read_captions, "dataset_coco.json", "val2014")
flickr30k = partial(read_captions, "dataset_flickr30k.json", "flickr30k-images")
mmbench = partial(read_mmbench, "mmbench_dev_en_20231003.tsv", PICK_LETTER)
mmbench_cn = partial(read_mmbench, "mmbench_dev_cn_20231003.tsv", PICK_LETTER_CN)
mmbench_test = partial(read_mmbench, "mmbench_test_en_20231003.tsv", PICK_LETTER)
mmbench_test_cn = partial(read_mmbench, "mmbench_test_cn_20231003.tsv", PICK_LETTER_CN)
mmbench_v11 = partial(read_mmbench, "MMBench_DEV_EN_V11.tsv", PICK_LETTER)
mmbench_v11_cn = partial(read_mmbench, "MMBench_DEV_CN_V11.tsv", PICK_LETTER_CN)
mmbench_v11_test = partial(read_mmbench, "MMBench_TEST_EN_V11.tsv", PICK_LETTER)
mmbench_v11_test_cn = partial(read_mmbench, "MMBench_TEST_CN_V11.tsv", PICK_LETTER_CN)
qbench, qbench_test = partial(read_qbench, "llvisionqa_dev.json"), partial(read_qbench, "llvisionqa_test.json")
arc_c = partial(read_arc, "ARC-Challenge/ARC-Challenge-Test.jsonl")
arc_e = partial(read_arc, "ARC-Easy/ARC-Easy-Test.jsonl")

# How the benchmarks of a kind are scored. Without a published truth there are only answers for the benchmark's server.
vqa = partial(Benchmark, score=scoring.vqa_score)
exact = partial(Benchmark, score=scoring.exact_match_score)
letters = partial(Benchmark, score=scoring.letter_score)
circular = partial(letters, summarize=scoring.circular_accuracy, unit_of=scoring.mmbench_question)
choices = partial(Benchmark, score=scoring.choice_score, max_new_tokens=0)
captions = partial(Benchmark, score=scoring.caption_score, summarize=scoring.mean_cider)
captions = partial(captions, min_new_tokens=8, max_new_tokens=60)
mme = partial(Benchmark, score=scoring.mme_score, summarize=scoring.mme_summary, unit_of=scoring.mme_image)
pope = partial(Benchmark, score=scoring.pope_score, summarize=scoring.pope_summary)
rated = partial(Benchmark, score=scoring.exact_match_score, summarize=scoring.count_answers, max_new_tokens=512)

ALL_BENCHMARKS = (
    vqa("vqav2", "VQAv2 val: VQA accuracy", VQAV2, vqav2),
    vqa("vqav2-testdev", "VQAv2 test-dev: answers only", VQAV2, vqav2_testdev),
    vqa("okvqa", "OKVQA val: VQA accuracy", "https://okvqa.allenai.org", okvqa),
    vqa("textvqa", "TextVQA val: VQA accuracy", "https://textvqa.org", read_textvqa),
    vqa("vizwiz", "VizWiz val: VQA accuracy", VIZWIZ, vizwiz),
    vqa("vizwiz-test", "VizWiz test: answers only", VIZWIZ, vizwiz_test),
    exact("gqa", "GQA test-dev, balanced: exact matches", GQA, read_gqa),
    exact("easy-vqa", "easy-VQA test: exact matches", EASY_VQA, read_easy_vqa),
    captions("coco", "COCO captions, Karpathy's test split: CIDEr", f"{KARPATHY} and {COCO}", coco),
    captions("flickr30k", "Flickr30K captions, same split: CIDEr", f"{KARPATHY} and {FLICKR}", flickr30k),
    circular("mmbench", "MMBench dev: accuracy", MMBENCH, mmbench),
    circular("mmbench-cn", "MMBench dev in Chinese: accuracy", MMBENCH, mmbench_cn),
    circular("mmbench-test", "MMBench test: answers only", MMBENCH, mmbench_test),
    circular("mmbench-test-cn", "MMBench test in Chinese: answers only", MMBENCH, mmbench_test_cn),
    circular("mmbench-v11", "MMBench V11 dev: accuracy", MMBENCH, mmbench_v11),
    circular("mmbench-v11-cn", "MMBench V11 dev in Chinese: accuracy", MMBENCH, mmbench_v11_cn),
    circular("mmbench-v11-test", "MMBench V11 test: answers only", MMBENCH, mmbench_v11_test),
    circular("mmbench-v11-test-cn", "MMBench V11 test in Chinese: answers only", MMBENCH, mmbench_v11_test_cn),
    letters("seed", "SEED-Bench, questions on images: accuracy", SEED, read_seed),
    letters("scienceqa", "ScienceQA-IMG test: accuracy", SCIENCEQA, read_scienceqa),
    letters("qbench", "Q-Bench A1 dev: accuracy", QBENCH, qbench),
    letters("qbench-test", "Q-Bench A1 test: answers only", QBENCH, qbench_test),
    mme("mme", "MME: acc and acc+ by category, and their sums", MME, read_mme),
    pope("pope", "POPE on COCO: accuracy, precision, recall, F1, share of yes", POPE, read_pope),
    choices("mmlu", "MMLU test, 5 shots if they fit: accuracy", MMLU, read_mmlu),
    choices("arc-c", "ARC-Challenge test, no shots: accuracy", ARC, arc_c),
    choices("arc-e", "ARC-Easy test, no shots: accuracy", ARC, arc_e),
    rated("owleval", "OwlEval with its conversations: answers for people to rate", OWLEVAL, read_owleval),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in ALL_BENCHMARKS}
