"""Easy-VQA: 5,000 images of one colored shape each, with 48,248 questions, as training files.

The data set is part of a Python package, so nothing is downloaded here. It is small enough to train a tiny
vision-language model on a laptop, in the same stages as a large one:

    pip install easy-vqa
    python data/easy_vqa/prepare.py                  # writes into data/easy_vqa, takes a few seconds
    python -m data.easy_vqa.prepare --out elsewhere  # the same, into another folder

    file                             samples of                                            for
    -------------------------------  ----------------------------------------------------  ------------------------
    text.json      text_val.json     a described image, questions about it; no image       language model from scratch
    captions.json  captions_val.json an image and its caption                              stage 1
    train.json     val.json          an image, all its questions in one conversation       stage 2
    test.json                        a test image and one question                         evaluation
    tokenizer.model                  the vocabulary of a tiny model                        all of them

The `_val` files and val.json are about the same 100 training images, which no other file contains.

Every JSON file has LLaVA's conversation format, with image paths relative to the folder of the file:

    [{"id": "train-17",
      "image": "images/train/17.png",                                      (absent: text only)
      "conversations": [{"from": "human", "value": "<|image|>what color is the shape?"},
                        {"from": "gpt", "value": "blue"}, ...]}, ...]

Captions need the color and the shape of an image, which the package does not state. They follow from the answers:

    8 colors x 3 shapes = 24 scenes  ->  those that agree with all answers about the image  ->  the only one left

An image with which several scenes agree has no caption, but its questions are in train.json.
"""

import json
import io
import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from command import ArgumentParser, run, user_errors  # noqa: E402  reports missing packages

from tqdm import tqdm  # noqa: E402

from data import CAPTION_REQUEST  # noqa: E402
from common.files import check_file, printable, writing  # noqa: E402

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

# The 107 questions of the package. {name} is "blue shape" (a color) or "rectangle" (a shape).
IS_THERE = (
    "does the image contain a {name}?",
    "is a {name} present?",
    "is there a {name}?",
    "is there a {name} in the image?",
)
IS_THERE_NOT = (
    "does the image not contain a {name}?",
    "is no {name} present?",
    "is there not a {name}?",
    "is there not a {name} in the image?",
)
WHAT_COLOR = ("what color is the {shape}?", "what is the color of the {shape}?")
WHAT_SHAPE = ("what shape does the image contain?", "what shape is in the image?", "what shape is present?")
WHICH_SHAPE = "what is the {color} shape?"

# The text around the turns in the prompts of Owl2 and Owl1.
PROMPT_WORDS = [
    "USER: ASSISTANT:",
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "Human: AI:",
]

N_HELD_OUT = 100  # training images kept for the validation files
N_TEXT = 8000  # samples in text.json
CAPTION_SHARE = 0.2  # of the samples in text.json


class Scene(NamedTuple):
    """The content of an image."""

    color: str
    shape: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape}."

    @property
    def description(self) -> str:
        """Replaces the image in conversations of text only."""
        return f"The image shows a {self.color} {self.shape}."


SCENES = [Scene(color, shape) for color in COLORS for shape in SHAPES]

Turn = tuple[str, str]  # a question and its answer


# ----------------------------------------------------------------------------------------------------------------------
# Questions and their answers


def answers_of(scene: Scene) -> dict[str, str]:
    """Returns all questions about a scene with their answers.

    Questions with a false presupposition ("what is the blue shape?" of a red one) are not among them.
    """
    answers = {}
    for name in [f"{color} shape" for color in COLORS] + list(SHAPES):
        present = name in (f"{scene.color} shape", scene.shape)
        for form in IS_THERE:
            answers[form.format(name=name)] = "yes" if present else "no"
        for form in IS_THERE_NOT:
            answers[form.format(name=name)] = "no" if present else "yes"
    answers.update(what_questions(scene))
    return answers


def what_questions(scene: Scene) -> dict[str, str]:
    """Returns the questions whose answer is a color or a shape, with their answers."""
    answers = {WHICH_SHAPE.format(color=scene.color): scene.shape}
    for form in WHAT_SHAPE:
        answers[form] = scene.shape
    for form in WHAT_COLOR:
        answers[form.format(shape="shape")] = scene.color
        answers[form.format(shape=scene.shape)] = scene.color
    return answers


ANSWERS = {scene: answers_of(scene) for scene in SCENES}


def scene_of(turns: list[Turn]) -> Scene | None:
    """Returns the scene that agrees with all these answers, None if several do. Raises ValueError if none does."""
    fitting = [scene for scene in SCENES if all(ANSWERS[scene].get(question) == answer for question, answer in turns)]
    if not fitting:
        raise ValueError(f"no scene agrees with these answers: {turns}")
    return fitting[0] if len(fitting) == 1 else None


def invent_turns(scene: Scene, rng: random.Random) -> list[Turn]:
    """Returns 8 to 10 questions about a scene with their answers.

    Sampled uniformly from `ANSWERS`, nearly all would be about absent colors and shapes, and "not" would imply "yes".
    So half of those asked for are present, and every fourth question begins with "what".
    """
    other_color = rng.choice([color for color in COLORS if color != scene.color])
    other_shape = rng.choice([shape for shape in SHAPES if shape != scene.shape])
    names = (f"{scene.color} shape", f"{other_color} shape", scene.shape, other_shape)
    about_presence = [form.format(name=name) for form in IS_THERE + IS_THERE_NOT for name in names]
    n_turns = rng.randint(8, 10)
    n_what = n_turns // 4
    questions = rng.sample(sorted(what_questions(scene)), n_what) + rng.sample(about_presence, n_turns - n_what)
    rng.shuffle(questions)
    return [(question, ANSWERS[scene][question]) for question in questions]


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def make_sample(name: str, turns: list[Turn], before: str, image: str | None = None) -> dict:
    """Returns one conversation. `before` begins its first question: the image placeholder or the description."""
    sample = {"id": name}
    if image is not None:
        sample["image"] = image
    sample["conversations"] = []
    for question, answer in turns:
        sample["conversations"].append({"from": "human", "value": before + question})
        sample["conversations"].append({"from": "gpt", "value": answer})
        before = ""
    return sample


def image_sample(split: str, image_id: int, turns: list[Turn], suffix: str = "") -> dict:
    return make_sample(f"{split}-{image_id}{suffix}", turns, "<|image|>", f"images/{split}/{image_id}.png")


def caption_samples(image_ids: list[int], scenes: dict[int, Scene]) -> list[dict]:
    return [image_sample("train", i, [(CAPTION_REQUEST, scenes[i].caption)]) for i in image_ids if i in scenes]


def question_samples(image_ids: list[int], turns: dict[int, list[Turn]]) -> list[dict]:
    return [image_sample("train", i, turns[i]) for i in image_ids]


def described_samples(image_ids: list[int], turns: dict[int, list[Turn]], scenes: dict[int, Scene]) -> list[dict]:
    """Returns the questions about each image, with a description instead of the image."""
    return [make_sample(f"text-{i}", turns[i], scenes[i].description + " ") for i in image_ids if i in scenes]


def invented_samples(n_questions: int, n_captions: int, rng: random.Random) -> list[dict]:
    """Returns samples of text only, about all 24 scenes equally often: conversations, then captions."""
    samples = []
    for k in range(n_questions):
        scene = SCENES[k % len(SCENES)]
        samples.append(make_sample(f"text-rule-{k}", invent_turns(scene, rng), scene.description + " "))
    for k in range(n_captions):
        scene = SCENES[k % len(SCENES)]
        turn = (CAPTION_REQUEST, scene.caption)
        samples.append(make_sample(f"text-caption-{k}", [turn], scene.description + " "))
    return samples


# ----------------------------------------------------------------------------------------------------------------------
# Files


def turns_by_image(questions: list[str], answers: list[str], image_ids: list[int]) -> dict[int, list[Turn]]:
    turns = defaultdict(list)
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        turns[image_id].append((question, answer))
    return dict(sorted(turns.items()))


def copy_images(paths: dict[int, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image_id, path in tqdm(sorted(paths.items()), desc=f"images to {folder}", unit="image"):
        shutil.copyfile(path, folder / f"{image_id}.png")


def write_samples(path: Path, samples: list[dict]) -> None:
    """Writes a JSON file, whole or not at all. Raises ValueError if it would replace a file of another kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        check_file(path)
        with open(path, "rb") as file:
            if file.read(4) != b"[\n {":
                raise ValueError(f"{path} exists, and is no file of samples: choose another name, or remove it")
    with writing(path) as part:
        part.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    n_images = len({sample["image"] for sample in samples if "image" in sample})
    n_turns = sum(len(sample["conversations"]) // 2 for sample in samples)
    print(f"{printable(path)}: {len(samples):,} samples, {n_images:,} images, {n_turns:,} questions")


def train_tokenizer(path: Path, samples: list[dict]) -> None:
    """Trains a tokenizer like LLaMA's (SentencePiece BPE with byte fallback) with 640 tokens, for tiny models.

    It is trained on the text of the samples and the prompts; all other text is encoded as bytes.
    """
    from sentencepiece import SentencePieceTrainer

    turns = [turn["value"].replace("<|image|>", "") for sample in samples for turn in sample["conversations"]]
    ascii_characters = "".join(chr(code) for code in range(33, 127))
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(turns + PROMPT_WORDS * (len(turns) // 2)),
        model_writer=model,
        vocab_size=640,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        required_chars=ascii_characters,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    with writing(path) as part:
        part.write_bytes(model.getvalue())


def prepare(out: Path, seed: int) -> None:
    import easy_vqa  # an extra (requirements-dev.txt)

    rng = random.Random(seed)
    train_turns = turns_by_image(*easy_vqa.get_train_questions())
    test_turns = turns_by_image(*easy_vqa.get_test_questions())

    scenes = {}
    for image_id, turns in train_turns.items():
        scene = scene_of(turns)
        if scene is not None:
            scenes[image_id] = scene
        rng.shuffle(turns)

    held_out = sorted(rng.sample(sorted(scenes), N_HELD_OUT))
    kept = sorted(set(train_turns) - set(held_out))
    n_unknown = len(train_turns) - len(scenes)
    print(f"{n_unknown} of {len(train_turns):,} training images: color and shape do not follow from the answers")

    text = described_samples(kept, train_turns, scenes)
    n_captions = round(CAPTION_SHARE * N_TEXT)
    text += invented_samples(N_TEXT - n_captions - len(text), n_captions, rng)
    train = question_samples(kept, train_turns)
    captions = caption_samples(kept, scenes)
    for samples in (text, train, captions):
        rng.shuffle(samples)
    test = [
        image_sample("test", image_id, [turn], suffix=f"-{k}")
        for image_id, turns in test_turns.items()
        for k, turn in enumerate(turns)
    ]

    # Images are written before JSON files: if a JSON file exists, so do its images.
    copy_images(easy_vqa.get_train_image_paths(), out / "images" / "train")
    copy_images(easy_vqa.get_test_image_paths(), out / "images" / "test")
    train_tokenizer(out / "tokenizer.model", text + train)
    write_samples(out / "text.json", text)
    write_samples(out / "text_val.json", described_samples(held_out, train_turns, scenes))
    write_samples(out / "captions.json", captions)
    write_samples(out / "captions_val.json", caption_samples(held_out, scenes))
    write_samples(out / "train.json", train)
    write_samples(out / "val.json", question_samples(held_out, train_turns))
    write_samples(out / "test.json", test)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/easy_vqa"), help="folder to fill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    args = parser.parse_args()
    with user_errors():
        prepare(args.out, args.seed)


if __name__ == "__main__":
    run(main)
