"""The benchmarks: how each one's files become questions, and how the answers become its official numbers.

    a folder, with the files as their owners publish them
      | Task.read          every question with its prompt, its images and the truth; all is looked at before it begins
      v
    [Question] ---- asked by evaluate.py, batch by batch ----> answers, one text each
                                                                 |  Task.score         of each, or None
                                                                 |  Task.summarise     the official numbers, by name
                                                                 v
                                                               {"accuracy": 64.5, ...}      in percent

A folder holds these files, with the owners' names and folders. Where they are published is said by TASKS below, by
`help`, and by the error for a file that is missing.

    task              files                                                                 images
    ----------------  --------------------------------------------------------------------  ------------------------
    vqav2             v2_OpenEnded_mscoco_val2014_questions.json and annotations             val2014/
    vqav2-testdev     v2_OpenEnded_mscoco_test-dev2015_questions.json         (no answers)   test2015/
    okvqa             OpenEnded_mscoco_val2014_questions.json and annotations                val2014/
    textvqa           TextVQA_0.5.1_val.json                                                 train_images/
    vizwiz, -test     val.json; test.json, or in Annotations/         (test: no answers)     val/; test/
    gqa               testdev_balanced_questions.json                                        images/
    easy-vqa          test/questions.json                                                    test/images/
    coco, flickr30k   dataset_coco.json; dataset_flickr30k.json         (Karpathy's test)    val2014/; flickr30k-images/
    mmbench, -cn      mmbench_dev_en_20231003.tsv, ..._cn_...                                in the file, as base64
    mmbench-test, ... mmbench_test_en_20231003.tsv, ..._cn_...                (no answers)   in the file
    seed              SEED-Bench.json, of which the questions on images                      SEED-Bench-image/
    scienceqa         problems.json, pid_splits.json: the test questions with an image       images/test/
    qbench, -test     llvisionqa_dev.json; llvisionqa_test.json       (test: no answers)     images/
    mme               CATEGORY/*.txt or CATEGORY/questions_answers_YN/*.txt                  beside; CATEGORY/images/
    pope              coco_pope_random.json, ..._popular.json, ..._adversarial.json          val2014/
    mmlu              dev/*_dev.csv, test/*_test.csv                                         none
    arc-c, arc-e      ARC-Challenge/ARC-Challenge-Test.jsonl; ARC-Easy/ARC-Easy-Test.jsonl   none
    owleval           questions.jsonl                                                        cases/ (or images/)

The prompts are those of Owl2's released evaluation scripts, and so is the space (a token of its own) that those for
VQA, captions and MME (not that for MMBench) leave after "ASSISTANT:". There are none for VizWiz, GQA and POPE, which
get that of VQAv2, nor for SEED, Q-Bench and ScienceQA, which get that of MMBench (Owl2's authors say so of the first
two), without the line for a hint where a benchmark has no hints. easy-VQA's questions are asked as they stand.

MMLU is asked in its owners' form, behind five worked examples. ARC's owners have none for language models: it gets one
like it, behind no examples. The answer is whichever letter the model finds likeliest. OwlEval's conversations are held
as such, with the model's own answers.

A split whose answers its owners keep to themselves is asked all the same: its answers are for their server, each score
is None, and the summary is their number.

MMBench asks a question once for each rotation of its options, in rows whose index differs by millions; the question
counts if all of them are answered right. Everywhere else a question is a row, and nothing in a file is passed over but
what the table leaves out.
"""

import base64
import binascii
import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from statistics import fmean

from data import CAPTION_REQUEST
from data.text import IMAGE_MARK
from metrics import cider, mme_scores, pope_scores, vqa_accuracy

SHORT = "Answer the question using a single word or phrase."
PICK = "Answer with the option’s letter from the given choices directly."  # the released script's apostrophe
PICK_CN = "请直接回答选项字母。"  # LLaVA's for Chinese; Owl2's script has none
SPACED = (SHORT, CAPTION_REQUEST)  # what the released scripts leave a space after "ASSISTANT:" for
LETTERS = "ABCDE"
ROTATION = 1_000_000  # MMBench: what a rotation adds to the index of its question
MME = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


@dataclass
class Question:
    """One question, ready for data/text.py's render_prompt."""

    id: str  # unique in its task
    prompt: str  # what the person says, an <image> for each image, without "USER:"
    images: list[str | bytes]  # paths below the task's folder, or files' contents
    truth: object = None  # what Task.score needs; None: its owners keep it to themselves
    group: str = ""  # what it is summed up under
    choices: list[str] | None = None  # the answers to choose from by likelihood; None: the answer is generated
    shots: list[str] = field(default_factory=list)  # the worked examples that stand in the prompt, in order
    before: list[str] = field(default_factory=list)  # the ids of the conversation's earlier questions, in order
    space: bool = False  # Owl2's prompt ends in one

    def with_fewer_shots(self) -> "Question":
        """The same without its last worked example: for a prompt that outgrows the model's context."""
        before, _, after = self.prompt.rpartition(self.shots[-1])
        return replace(self, prompt=before + after, shots=self.shots[:-1])


Results = list[tuple[Question, str, float | None]]  # with its answer, and that one's score


@dataclass
class Task:
    """A benchmark.

    max_new_tokens, min_new_tokens: of an answer; 0: the likeliest of Question.choices is the answer. score: of answers
    to these questions, each from 0 to 1 (CIDEr: to 10), or None.
    """

    name: str
    what: str
    url: str  # where its files are published
    max_new_tokens: int
    reader: Callable[[Path], Iterator[Question]]
    score: Callable[[list[str], list[Question]], list[float | None]]
    summarise: Callable[[Results], dict[str, float]]
    min_new_tokens: int = 1

    @property
    def help(self) -> str:
        """One line: what it is and where it is published."""
        return f"{self.what}; from {self.url}"

    def read(self, folder: str | Path) -> list[Question]:
        """All questions of a folder. No image is opened, but each is known to be there.

        FileNotFoundError, in one sentence that says where it is published, for a file that is missing. ValueError, in
        one sentence that names file and row, for anything that is not as published, and for a path out of the folder.
        """
        folder = Path(folder)
        try:
            questions = [replace(each, space=each.prompt.endswith(SPACED)) for each in self.reader(folder)]
            self._check(questions, folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {self.name} is published at {self.url}") from None
        return questions

    def _check(self, questions: list[Question], folder: Path) -> None:
        if not questions:
            raise ValueError(f"{folder} holds no question of {self.name}")
        ids = set()
        paths = {}  # in the file's order, each once
        for question in questions:
            where = f"{self.name}, question {question.id!r:.80}"
            if question.id in ids:
                raise ValueError(f"{where} is there twice")
            ids.add(question.id)
            if len(IMAGE_MARK.findall(question.prompt)) != len(question.images):
                raise ValueError(f"{where} holds the placeholder of an image in its words")
            for path in question.images:
                if isinstance(path, str):
                    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
                        raise ValueError(f"{where}: {path!r:.200} is not a path below {folder}")
                    paths[path] = where
        for path, where in paths.items():
            try:
                found = (folder / path).is_file()
            except OSError as error:
                raise ValueError(f"{where}: {path!r:.200} cannot be a file ({error.strerror})") from None
            if not found:
                raise FileNotFoundError(f"{where}: there is no image {path!r:.200} in {folder}")


# --- files -------------------------------------------------------------------------------------------

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # what JSON can write down and UTF-8 cannot
KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object", (str, int): "a text or a number"}


class Row:
    """A row of a file, which says where it stands if it is not what it should be."""

    def __init__(self, fields: object, where: str):
        if not isinstance(fields, dict):
            raise ValueError(f"{where} should be an object with named fields")
        self.fields = fields
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def get(self, key: str, kind: type | tuple = str):
        """The value of a field that must be there, of that kind."""
        value = self.fields.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.where}: {key} should be {KINDS[kind]}")
        if isinstance(value, str) and HALF_CHARACTER.search(value):
            raise ValueError(f"{self.where}: {key} holds half a character (a lone surrogate)")
        return value

    def one_of(self, key: str, values: tuple[str, ...]) -> str:
        value = self.get(key)
        if value not in values:
            raise ValueError(f"{self.where}: {key} should be one of {', '.join(values)}")
        return value

    def items(self, key: str) -> list:
        values = self.get(key, list)
        if not values:
            raise ValueError(f"{self.where}: {key} is empty")
        return values

    def texts(self, key: str) -> list[str]:
        """The value of a field that must be a list of texts, of one at least."""
        row = Row(dict(enumerate(self.items(key))), f"{self.where}, {key}")
        return [row.get(i) for i in row.fields]

    def rows(self, key: str) -> list["Row"]:
        """The value of a field that must be a list of objects, of one at least."""
        return [Row(fields, f"{self.where}, {key} {i}") for i, fields in enumerate(self.items(key))]


def read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def some_files(folder: Path, pattern: str) -> list[Path]:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"there is no file {folder / pattern}")
    return paths


def parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def read_object(path: Path) -> Row:
    """A JSON file that is one object."""
    return Row(parse_json(read_text(path), str(path)), str(path))


def read_list(path: Path, names: tuple[str, ...] = ()) -> list[Row]:
    """A JSON file that is a list of rows. names: of the fields, where the rows are lists themselves."""
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, list):
        raise ValueError(f"{path} should hold a list")
    if names:
        content = [dict(zip(names, row)) if isinstance(row, list) else row for row in content]
    return [Row(row, f"{path}, row {i}") for i, row in enumerate(content)]


def read_lines(path: Path) -> list[Row]:
    """A file with a JSON object a line."""
    lines = [(f"{path}, line {i + 1}", line) for i, line in enumerate(read_text(path).split("\n")) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    return [Row(parse_json(line, where), where) for where, line in lines]


def read_table(path: Path, delimiter: str, names: tuple[str, ...] = ()) -> list[Row]:
    """A table of texts. names: of its columns; without them they stand in its first row."""
    csv.field_size_limit(2**30)  # a cell may be an image
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise ValueError(f"{path} is not a table: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    names = names or rows.pop(0)
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(f"{path}, row {i}: it has {len(row)} cells, and should have {len(names)}")
    return [Row(dict(zip(names, row)), f"{path}, row {i}") for i, row in enumerate(rows)]


# --- open questions ----------------------------------------------------------------------------------


def read_vqa(questions: str, annotations: str | None, images: str, folder: Path) -> Iterator[Question]:
    """VQAv2 and OKVQA: questions and ten people's answers in two files. images: a path, with {} for the image's id."""
    answers = {}
    if annotations:
        for row in read_object(folder / annotations).rows("annotations"):
            given = [answer.get("answer") for answer in row.rows("answers")]
            answers[row.get("question_id", int)] = (given, row.get("answer_type"))
    for row in read_object(folder / questions).rows("questions"):
        number = row.get("question_id", int)
        if annotations and number not in answers:
            raise ValueError(f"{row.where}: {folder / annotations} has no answers to question {number}")
        truth, group = answers.get(number, (None, ""))
        image = images.format(row.get("image_id", int))
        yield Question(str(number), f"<image>{row.get('question')} {SHORT}", [image], truth, group)


def read_textvqa(folder: Path) -> Iterator[Question]:
    for row in read_object(folder / "TextVQA_0.5.1_val.json").rows("data"):
        image = f"train_images/{row.get('image_id')}.jpg"
        number = str(row.get("question_id", int))
        yield Question(number, f"<image>{row.get('question')} {SHORT}", [image], row.texts("answers"))


def read_vizwiz(split: str, folder: Path) -> Iterator[Question]:
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    for row in read_list(annotations / f"{split}.json"):
        image = row.get("image")
        truth, group = None, ""
        if "answers" in row:
            truth, group = [answer.get("answer") for answer in row.rows("answers")], row.get("answer_type")
        yield Question(image, f"<image>{row.get('question')} {SHORT}", [f"{split}/{image}"], truth, group)


def read_gqa(folder: Path) -> Iterator[Question]:
    content = read_object(folder / "testdev_balanced_questions.json")
    for number in content.fields:
        row = Row(content.fields[number], f"{content.where}, question {number!r:.40}")
        group = Row(row.get("types", dict), f"{row.where}, types").get("structural")
        image = f"images/{row.get('imageId')}.jpg"
        yield Question(number, f"<image>{row.get('question')} {SHORT}", [image], row.get("answer"), group)


def read_easy_vqa(folder: Path) -> Iterator[Question]:
    for i, row in enumerate(read_list(folder / "test" / "questions.json", ("question", "answer", "image"))):
        truth = row.get("answer")
        image = f"test/images/{row.get('image', int)}.png"
        group = "yes or no" if truth in ("yes", "no") else "other"
        yield Question(str(i), f"<image>{row.get('question')}", [image], truth, group)


def read_captions(file: str, images: str, folder: Path) -> Iterator[Question]:
    """Karpathy's test split. images: the folder of those whose row names none."""
    for row in read_object(folder / file).rows("images"):
        if row.get("split") == "test":
            image = f"{row.get('filepath') if 'filepath' in row else images}/{row.get('filename')}"
            captions = [sentence.get("raw") for sentence in row.rows("sentences")]
            yield Question(str(row.get("imgid", int)), f"<image>{CAPTION_REQUEST}", [image], captions)


def read_owleval(folder: Path) -> Iterator[Question]:
    """Single questions, and conversations: an image's questions of several turns in the order of their numbers.

    A question that is both begins its conversation. Nothing comes before it there either, so one answer is for both.
    The published answers are those of the conversations too: there is one for each question, and they refer back.
    """
    images = "cases" if (folder / "cases").is_dir() else "images"
    conversations = defaultdict(list)  # by image: the ids so far
    for row in sorted(read_lines(folder / "questions.jsonl"), key=lambda row: row.get("question_id", int)):
        number, image = str(row.get("question_id", int)), row.get("image")
        kinds = row.texts("category") if "category" in row else ["single_turn"]
        before = list(conversations[image]) if "multi_turn" in kinds else []
        if before and "single_turn" in kinds:
            raise ValueError(f"{row.where}: a question that is asked alone too should begin its conversation")
        if "multi_turn" in kinds:
            conversations[image].append(number)
        ability = row.get("ability") if "ability" in row else ""
        mark, paths = ("", []) if before else ("<image>", [f"{images}/{image}"])
        yield Question(number, f"{mark}{row.get('question')}", paths, group=ability, before=before)


# --- multiple choice ---------------------------------------------------------------------------------


def options(choices: list[str], where: str) -> str:
    """One line for each choice, behind its letter."""
    if not 1 < len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: there should be 2 to {len(LETTERS)} choices, not {len(choices)}")
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


def read_mmbench(file: str, pick: str, folder: Path) -> Iterator[Question]:
    rows = read_table(folder / file, "\t")
    cells = {row.get("index"): row.get("image") for row in rows}
    for row in rows:
        index = row.get("index")
        if not re.fullmatch("[0-9]{1,12}", index):
            raise ValueError(f"{row.where}: index should be a whole number")
        texts = [row.get(letter) if letter in row else "" for letter in LETTERS]
        n_choice = next((i for i, text in enumerate(texts) if empty(text)), len(texts))
        if not all(empty(text) for text in texts[n_choice:]):
            raise ValueError(f"{row.where}: option {LETTERS[n_choice]} is empty, and a later one is not")
        choices = options(texts[:n_choice], row.where)
        hint = "N/A" if empty(row.get("hint")) else row.get("hint")
        cell = row.get("image")
        try:
            image = base64.b64decode(cells.get(cell, cell), validate=True)  # a rotation may name the row of its image
        except (binascii.Error, ValueError):
            raise ValueError(f"{row.where}: image is not base64") from None
        truth = row.one_of("answer", tuple(LETTERS[:n_choice])) if "answer" in row else None
        prompt = f"<image>{hint}\n{row.get('question')}\n{choices}\n{pick}"
        yield Question(index, prompt, [image], truth, row.get("l2-category"))


def empty(cell: str) -> bool:
    return cell.strip() in ("", "nan")


def read_seed(folder: Path) -> Iterator[Question]:
    content = read_object(folder / "SEED-Bench.json")
    names = {number: name for name, number in content.get("question_type", dict).items() if isinstance(number, int)}
    for row in content.rows("questions"):
        if row.one_of("data_type", ("image", "video")) == "image":
            choices = options([row.get(f"choice_{letter}") for letter in "abcd"], row.where)
            kind = row.get("question_type_id", int)
            if kind not in names:
                raise ValueError(f"{row.where}: question_type has no name for {kind}")
            prompt = f"<image>{row.get('question')}\n{choices}\n{PICK}"
            image, truth = f"SEED-Bench-image/{row.get('data_id')}", row.one_of("answer", ("A", "B", "C", "D"))
            yield Question(str(row.get("question_id", (str, int))), prompt, [image], truth, names[kind])


def read_scienceqa(folder: Path) -> Iterator[Question]:
    problems = read_object(folder / "problems.json")
    for number in read_object(folder / "pid_splits.json").texts("test"):
        row = Row(problems.fields.get(number), f"{problems.where}, problem {number!r:.40}")
        if row.fields.get("image") is not None:
            texts = row.texts("choices")
            choices = options(texts, row.where)
            answer = row.get("answer", int)
            if not 0 <= answer < len(texts):
                raise ValueError(f"{row.where}: answer should be the number of a choice, from 0")
            prompt = f"<image>{row.get('hint') or 'N/A'}\n{row.get('question')}\n{choices}\n{PICK}"
            image = f"images/test/{number}/{row.get('image')}"
            yield Question(number, prompt, [image], LETTERS[answer], row.get("subject"))


def read_qbench(file: str, folder: Path) -> Iterator[Question]:
    for i, row in enumerate(read_list(folder / file)):
        texts = row.texts("candidates")
        choices = options(texts, row.where)
        truth = None
        if "correct_ans" in row:
            truth = LETTERS[texts.index(row.one_of("correct_ans", tuple(texts)))]
        image = f"images/{row.get('img_path')}"
        yield Question(str(i), f"<image>{row.get('question')}\n{choices}\n{PICK}", [image], truth)


# --- yes or no ---------------------------------------------------------------------------------------


def read_mme(folder: Path) -> Iterator[Question]:
    """Two questions on each image, one to be answered with yes and one with no."""
    for category in MME["perception"] + MME["cognition"]:
        texts = images = folder / category
        if (texts / "questions_answers_YN").is_dir():
            texts, images = texts / "questions_answers_YN", texts / "images"
        # rglob: artwork's images lie in one more folder, toy_dataset, in some copies of the release
        image_of = {path.stem: path for path in sorted(images.rglob("*")) if path.suffix != ".txt"}
        for path in some_files(texts, "*.txt"):
            if path.stem not in image_of:
                raise FileNotFoundError(f"there is no image {images / path.stem}.jpg or .png")
            image = image_of[path.stem].relative_to(folder).as_posix()
            lines = [line for line in read_text(path).split("\n") if line.strip()]
            for i, line in enumerate(lines):
                question, _, truth = line.rpartition("\t")
                truth = truth.strip().lower()
                if len(lines) != 2 or not question or truth not in ("yes", "no"):
                    raise ValueError(f"{path}, line {i + 1}: there should be two lines: a question, a tab, Yes or No")
                # the released script cuts the sentence and leaves the space before it
                question = question.replace("Please answer yes or no.", "")
                yield Question(f"{category}/{path.stem}/{i}", f"<image>{question}\n{SHORT}", [image], truth, category)


def read_pope(folder: Path) -> Iterator[Question]:
    for kind in ("random", "popular", "adversarial"):
        for row in read_lines(folder / f"coco_pope_{kind}.json"):
            number, image = row.get("question_id", int), f"val2014/{row.get('image')}"
            truth = row.one_of("label", ("yes", "no"))
            yield Question(f"{kind}/{number}", f"<image>{row.get('text')} {SHORT}", [image], truth, kind)


# --- text only ---------------------------------------------------------------------------------------


def read_mmlu(folder: Path) -> Iterator[Question]:
    """The owners' prompt to the letter: its two spaces after "about" are theirs."""
    names = ("question", *"ABCD", "answer")
    for path in some_files(folder / "test", "*_test.csv"):
        subject = path.name.removesuffix("_test.csv")
        shots = []
        for row in read_table(folder / "dev" / f"{subject}_dev.csv", ",", names)[:5]:
            shots.append(f"{mmlu_question(row)} {row.one_of('answer', tuple('ABCD'))}\n\n")
        topic = subject.replace("_", " ")
        before = f"The following are multiple choice questions (with answers) about  {topic}.\n\n{''.join(shots)}"
        for i, row in enumerate(read_table(path, ",", names)):
            truth = row.one_of("answer", tuple("ABCD"))
            yield Question(f"{subject}/{i}", before + mmlu_question(row), [], truth, subject, list("ABCD"), shots)


def mmlu_question(row: Row) -> str:
    return f"{row.get('question')}\n{options([row.get(letter) for letter in 'ABCD'], row.where)}\nAnswer:"


def read_arc(file: str, folder: Path) -> Iterator[Question]:
    for row in read_lines(folder / file):
        question = Row(row.get("question", dict), f"{row.where}, question")
        choices = question.rows("choices")
        prompt = f"Question: {question.get('stem')}\n{options([choice.get('text') for choice in choices], row.where)}"
        labels = tuple(choice.get("label") for choice in choices)  # A to E, or 1 to 5
        truth = LETTERS[labels.index(row.one_of("answerKey", labels))]
        yield Question(row.get("id"), f"{prompt}\nAnswer:", [], truth, "", list(LETTERS[: len(labels)]))


# --- scores ------------------------------------------------------------------------------------------

Score = Callable[[list[str], list[Question]], list[float | None]]


def one_by_one(score_one: Callable[[str, Question], float | None]) -> Score:
    """Makes a score of many answers out of that of one."""
    return lambda answers, questions: [score_one(answer, question) for answer, question in zip(answers, questions)]


@one_by_one
def by_people(answer: str, question: Question) -> float | None:
    """The official VQA accuracy against ten people's answers."""
    return None if question.truth is None else vqa_accuracy(answer, question.truth)


@one_by_one
def by_match(answer: str, question: Question) -> float:
    """1 for the right words, but for capitals, spaces around and a full stop: GQA's script forgives none of them."""
    return float(answer.strip().lower().removesuffix(".") == question.truth.strip().lower().removesuffix("."))


@one_by_one
def by_letter(answer: str, question: Question) -> float | None:
    return None if question.truth is None else float(letter(answer) == question.truth)


def letter(answer: str) -> str:
    """The option an answer names, "" for none: "B", "(B)", "B. a cat", "The answer is B", but not "A cat".

    MMBench's owners go on to find an option by its words, and if need be by asking ChatGPT: answers that are no letter
    may get more from them.
    """
    said = re.match(r"\W*([A-E])(?![-'’]?\w)(?!\s+\w)", answer)
    said = said or re.search(r"(?i:answer is|answer:|option)\s*\(?([A-E])\b", answer)
    return said[1] if said else ""


@one_by_one
def by_first_letters(answer: str, question: Question) -> float:
    """MME: yes or no in the first four characters; where neither is, the answer is wrong."""
    start = answer.strip().lower()[:4]
    return float(("yes" if "yes" in start else "no" if "no" in start else "") == question.truth)


def says_yes(answer: str) -> bool:
    """POPE: every answer is a yes whose first sentence has none of its words of denial."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


@one_by_one
def by_denial(answer: str, question: Question) -> float:
    return float(says_yes(answer) == (question.truth == "yes"))


@one_by_one
def by_choice(answer: str, question: Question) -> float:
    """Of a question with choices, whose answer is the likeliest of them."""
    return float(answer == question.truth)


@one_by_one
def by_raters(answer: str, question: Question) -> None:
    """People say how good it is."""


def by_consensus(answers: list[str], questions: list[Question]) -> list[float]:
    """Each caption's CIDEr, which depends on all of the references."""
    return cider(answers, [question.truth for question in questions])[1]


# --- a task's numbers, in percent --------------------------------------------------------------------


def accuracy(results: Results) -> dict[str, float]:
    """The mean score, and that of each group where there are several."""
    groups = defaultdict(list)
    for question, _, score in results:
        if score is not None:
            groups[question.group].append(score)
    if not groups:
        return {"answers without a published truth": len(results)}
    numbers = {"accuracy": 100 * fmean([score for scores in groups.values() for score in scores])}
    if len(groups) > 1:
        numbers |= {f"accuracy, {group}": 100 * fmean(groups[group]) for group in sorted(groups)}
    return numbers


def circular(results: Results) -> dict[str, float]:
    """MMBench: of the questions, those with all their rotations right."""
    if any(score is None for _, _, score in results):
        return accuracy(results)  # the server puts the rotations together
    rotations = defaultdict(list)
    for result in results:
        rotations[int(result[0].id) % ROTATION].append(result)
    return accuracy([min(rows, key=lambda row: row[2]) for rows in rotations.values()])


def mean_cider(results: Results) -> dict[str, float]:
    return {"CIDEr": 100 * fmean(score for _, _, score in results)}


def mme_points(results: Results) -> dict[str, float]:
    """acc counts questions, acc+ the images whose two questions are both right; points are their sums.

    ValueError, in one sentence, for an image of whose questions only one was asked.
    """
    scores = mme_scores([(question.group, question.images[0], score == 1) for question, _, score in results])
    numbers = {}
    for part, categories in MME.items():
        numbers[part] = sum(scores[category]["score"] for category in categories if category in scores)
    for category in scores:
        numbers[f"{category} acc"] = 100 * scores[category]["acc"]
        numbers[f"{category} acc+"] = 100 * scores[category]["acc_plus"]
    return numbers


def pope_points(results: Results) -> dict[str, float]:
    """For each way of choosing what is asked about."""
    numbers = {}
    for kind in sorted({question.group for question, _, _ in results}):
        asked = [(question, answer) for question, answer, _ in results if question.group == kind]
        said, truth = [says_yes(answer) for _, answer in asked], [question.truth == "yes" for question, _ in asked]
        for name, number in pope_scores(said, truth).items():
            numbers[f"{name}, {kind}"] = 100 * number
    return numbers


def counted(results: Results) -> dict[str, float]:
    """OwlEval: people rate its answers, from A to D."""
    return {"answers for people to rate": len(results)}


# --- the tasks ---------------------------------------------------------------------------------------

VQAV2 = "https://visualqa.org/download.html"
VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa"
SPLITS = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
COCO = "https://cocodataset.org/#download"  # 2014
FLICKR = "https://shannon.cs.illinois.edu/DenotationGraph"
MMBENCH = "https://github.com/open-compass/MMBench"
SCIENCEQA = "https://github.com/lupantech/ScienceQA (data/scienceqa)"
QBENCH = "https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"
MME_URL = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
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
vizwiz = partial(read_vizwiz, "val")
vizwiz_test = partial(read_vizwiz, "test")
coco = partial(read_captions, "dataset_coco.json", "val2014")
flickr30k = partial(read_captions, "dataset_flickr30k.json", "flickr30k-images")
mmbench = partial(read_mmbench, "mmbench_dev_en_20231003.tsv", PICK)
mmbench_cn = partial(read_mmbench, "mmbench_dev_cn_20231003.tsv", PICK_CN)
mmbench_test = partial(read_mmbench, "mmbench_test_en_20231003.tsv", PICK)
mmbench_test_cn = partial(read_mmbench, "mmbench_test_cn_20231003.tsv", PICK_CN)
arc_c = partial(read_arc, "ARC-Challenge/ARC-Challenge-Test.jsonl")
arc_e = partial(read_arc, "ARC-Easy/ARC-Easy-Test.jsonl")
qbench = partial(read_qbench, "llvisionqa_dev.json")
qbench_test = partial(read_qbench, "llvisionqa_test.json")
CIDER = (by_consensus, mean_cider)
LIKELIEST = "accuracy of the likeliest letter"
FOR_SERVER = "for its server"

TASKS = {
    task.name: task
    for task in (
        Task("vqav2", "VQAv2 val: VQA accuracy", VQAV2, 10, vqav2, by_people, accuracy),
        Task("vqav2-testdev", f"VQAv2 test-dev: {FOR_SERVER}", VQAV2, 10, vqav2_testdev, by_people, accuracy),
        Task("okvqa", "OKVQA val: VQA accuracy", "https://okvqa.allenai.org", 10, okvqa, by_people, accuracy),
        Task("textvqa", "TextVQA val: VQA accuracy", "https://textvqa.org", 10, read_textvqa, by_people, accuracy),
        Task("vizwiz", "VizWiz val: VQA accuracy", VIZWIZ, 10, vizwiz, by_people, accuracy),
        Task("vizwiz-test", f"VizWiz test: {FOR_SERVER}", VIZWIZ, 10, vizwiz_test, by_people, accuracy),
        Task("gqa", "GQA test-dev, balanced: exact matches", GQA, 10, read_gqa, by_match, accuracy),
        Task("easy-vqa", "easy-VQA test: exact matches", EASY_VQA, 10, read_easy_vqa, by_match, accuracy),
        Task("coco", "COCO captions, Karpathy's test split: CIDEr", f"{SPLITS} and {COCO}", 60, coco, *CIDER, 8),
        Task("flickr30k", "Flickr30K captions, likewise: CIDEr", f"{SPLITS} and {FLICKR}", 60, flickr30k, *CIDER, 8),
        Task("mmbench", "MMBench dev: accuracy", MMBENCH, 10, mmbench, by_letter, circular),
        Task("mmbench-cn", "MMBench dev in Chinese: accuracy", MMBENCH, 10, mmbench_cn, by_letter, circular),
        Task("mmbench-test", f"MMBench test: {FOR_SERVER}", MMBENCH, 10, mmbench_test, by_letter, circular),
        Task("mmbench-test-cn", f"... in Chinese: {FOR_SERVER}", MMBENCH, 10, mmbench_test_cn, by_letter, circular),
        Task("seed", "SEED-Bench on images (none of its videos): accuracy", SEED, 10, read_seed, by_letter, accuracy),
        Task("scienceqa", "ScienceQA-IMG test: accuracy", SCIENCEQA, 10, read_scienceqa, by_letter, accuracy),
        Task("qbench", "Q-Bench A1 dev: accuracy", QBENCH, 10, qbench, by_letter, accuracy),
        Task("qbench-test", f"Q-Bench A1 test: {FOR_SERVER}", QBENCH, 10, qbench_test, by_letter, accuracy),
        Task("mme", "MME: acc and acc+ by category, their sums", MME_URL, 10, read_mme, by_first_letters, mme_points),
        Task("pope", "POPE on COCO: accuracy, precision, recall, F1 ...", POPE, 10, read_pope, by_denial, pope_points),
        Task("mmlu", f"MMLU test, 5 shots if they fit: {LIKELIEST}", MMLU, 0, read_mmlu, by_choice, accuracy),
        Task("arc-c", f"ARC-Challenge test, no shots: {LIKELIEST}", ARC, 0, arc_c, by_choice, accuracy),
        Task("arc-e", f"ARC-Easy test, no shots: {LIKELIEST}", ARC, 0, arc_e, by_choice, accuracy),
        Task("owleval", "OwlEval, with its conversations: for raters", OWLEVAL, 512, read_owleval, by_raters, counted),
    )
}
