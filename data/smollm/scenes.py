"""Training files of the smol models: drawn scenes in natural English, and text-only instructions.

    python -m data.smollm.scenes                                    # 20,000 scenes into data/smollm, a minute
    python -m data.smollm.scenes --images 400 --out elsewhere       # a small one, into another folder

    file                              samples                                                     for
    --------------------------------  ----------------------------------------------------------  --------------------
    captions.json   captions_val.json an image and its caption, in one of several sentences       stage 1
    test_captions.json                the same of the test's images                               tools.check_captions
    train.json      val.json          an image, up to 6 questions in one conversation             stage 2, images
    text.json                         instructions of data/smollm/text.py, up to 4 in one         stage 2, text
    test.json                         an image and one question, in a phrasing of training        evaluation
    rephrased.json                    the same questions in phrasings that training never has     evaluation
    knowledge.json                    questions that need sight and knowledge; with "kind"        evaluation
    text_test.json                    200 instructions that training never has                    tools.text_ability

Scenes, held-out pairs and held-out words are those of data/shapes/prepare.py, whose docstring shows a scene. test.json
and rephrased.json have "kind" and "seen": a question is unseen if it is about a pair or a word that no training image
shows.

**Answers.** Half of the questions in training end with the papers' request for a short answer, and the answer is a
word; the others have a sentence. The tests ask for a short answer, so evaluate.py can count exact matches.

**Sight and knowledge.** "Which of these has the color of the circle: snow, a banana or a frog?" needs the color, which
the image has, and a fact, which it has not. Training asks about some things, the test (kind "choice") about others. Of
two kinds training has no question: "corners" of the red thing, and "sum", the number of things plus three.
"""

import random
import re
from pathlib import Path
from typing import NamedTuple

from command import ArgumentParser, run, user_errors

from data import CAPTION_REQUEST
from data.easy_vqa.prepare import make_sample, write_samples
from data.shapes.prepare import (
    COLORS,
    MIN_IMAGES,
    NUMBERS,
    BalancedSampler,
    Scene,
    Turn,
    make_scene,
    seen_questions,
    unseen_questions,
    write_images,
)
from data.smollm.text import split_items

SHORT = " Answer the question using a single word or phrase."  # as in the training data of Owl2 and LLaVA-1.5
SHORT_SHARE = 0.5  # of the questions in training that end with it
N_TEXT_TEST = 200
CAPTIONS = ("The picture shows {}.", "There is a drawing of {}.", "This image contains {}.", "I can see {}.")
CAPTION_REQUESTS = (CAPTION_REQUEST, "Describe the image.", "What do you see in the picture?")


class Form(NamedTuple):
    """How one kind of question is asked and answered in natural English.

    pattern: matches a question of data/shapes/prepare.py; its groups are inserted into the other fields.
    """

    pattern: str
    trained: tuple[str, ...]
    rephrased: tuple[str, ...]
    sentence: str


FORMS = (
    Form(
        r"what (?P<what>color|shape) is (?P<place>(left of|right of|above|below) .*)\?",
        ("What {what} is {place}?", "Which {what} do you see {place}?", "Look {place}. What {what} is there?"),
        ("Name the {what} that is {place}.", "I am looking for the {what} {place}. Which one is it?"),
        "The {what} {place} is {answer}.",
    ),
    Form(
        r"what color is the (?P<shape>\w+)\?",
        ("What color is the {shape}?", "What is the color of the {shape}?", "Tell me the color of the {shape}."),
        ("Which color does the {shape} have?", "The {shape} was painted in which color?"),
        "The {shape} is {answer}.",
    ),
    Form(
        r"what shape is the (?P<color>\w+) thing\?",
        ("What shape is the {color} thing?", "What is the shape of the {color} thing?", "Tell me the {color} shape."),
        ("Which form does the {color} object have?", "What kind of figure is drawn in {color}?"),
        "The {color} thing is a {answer}.",
    ),
    Form(
        r"how many (?P<name>.*) are there\?",
        ("How many {name} are there?", "What is the number of {name} in the picture?", "Count the {name}."),
        ("How many {name} can you see?", "The image contains how many {name}?"),
        "The number of {name} is {answer}.",
    ),
    Form(
        r"is the (?P<name>.*) big or small\?",
        ("Is the {name} big or small?", "What size is the {name}, big or small?", "Is it big or small, the {name}?"),
        ("Would you call the {name} big or small?", "Big or small: which word fits the {name}?"),
        "The {name} is {answer}.",
    ),
    Form(
        r"which is bigger, the (?P<one>\w+) or the (?P<other>\w+) thing\?",
        ("Which is bigger, the {one} or the {other} thing?", "Is the {one} or the {other} thing bigger?"),
        ("Of the {one} and the {other} object, which one is larger?", "Which has the larger size, {one} or {other}?"),
        "The {answer} thing is bigger.",
    ),
    Form(
        r"is there a (?P<name>.*)\?",
        ("Is there a {name}?", "Is there a {name} in the picture?", "Do you see a {name}?"),
        ("Does the image show a {name}?", "Can you find a {name} here?"),
        "{answer}, the picture has {article} {name}.",
    ),
    Form(
        r"what word is written\?",
        ("What word is written?", "What does the text say?", "Read the word."),
        ("Which letters are written in the picture?", "What can you read in this image?"),
        "The word is {answer}.",
    ),
)
THINGS = {  # things of each color: the first three in training, the others in the test
    "red": ("a tomato", "a fire truck", "blood", "a strawberry", "a cherry"),
    "green": ("a frog", "grass", "a cucumber", "a lime", "broccoli"),
    "blue": ("the sky", "a sapphire", "a blueberry", "the ocean", "a pair of jeans"),
    "yellow": ("a lemon", "the sun", "a canary", "a banana", "a sunflower"),
    "purple": ("an eggplant", "lavender", "a violet", "a plum", "an amethyst"),
    "white": ("snow", "salt", "a polar bear", "milk", "a cloud"),
}
N_TRAINED_THINGS = 3
CORNERS = {"triangle": "three", "square": "four", "circle": "zero"}
MORE_NUMBERS = (*NUMBERS, "five", "six", "seven")


def caption(scene: Scene, rng: random.Random) -> str:
    """For example "The picture shows a big red circle at the top left and the word B A G."."""
    rows, columns = ("at the top", "at the bottom"), (" left", " in the middle", " right")
    parts = [f"a {x.size} {x.color} {x.shape} {rows[x.row]}{columns[x.column]}" for x in scene.objects]
    return rng.choice(CAPTIONS).format(", ".join(parts) + f" and the word {scene.word}")


def english(turn: Turn, rng: random.Random, rephrased: bool = False) -> tuple[str, str]:
    """Returns a question in one of its phrasings, and the answer as a sentence."""
    for form in FORMS:
        if match := re.fullmatch(form.pattern, turn.question):
            values = match.groupdict() | {"answer": turn.answer, "article": "a" if turn.answer == "yes" else "no"}
            question = rng.choice(form.rephrased if rephrased else form.trained).format(**values)
            sentence = form.sentence.format(**values)
            return question, sentence[0].upper() + sentence[1:]
    raise ValueError(f"there is no phrasing of {turn.question!r}")


def choice_turns(scene: Scene, rng: random.Random, tested: bool) -> list[Turn]:
    """Returns questions about the color of an object that ask for a thing of that color, one of three."""
    turns = []
    things = {color: some[N_TRAINED_THINGS:] if tested else some[:N_TRAINED_THINGS] for color, some in THINGS.items()}
    for turn in seen_questions(scene):
        if turn.kind != "color":
            continue
        others = rng.sample([color for color in COLORS if color != turn.answer], 2)
        choices = [rng.choice(things[color]) for color in (turn.answer, *others)]
        answer = choices[0]
        rng.shuffle(choices)
        shape = turn.question.removeprefix("what color is the ").removesuffix("?")
        a, b, c = choices
        question = f"Which of these has the color of the {shape}: {a}, {b} or {c}?"
        turns.append(Turn("choice", question, answer))
    return turns


def knowledge_turns(scene: Scene, rng: random.Random) -> list[Turn]:
    """Returns the questions of knowledge.json about a scene."""
    turns = choice_turns(scene, rng, tested=True)
    for turn in seen_questions(scene):
        if turn.kind == "shape" and turn.answer in CORNERS:
            color = turn.question.removeprefix("what shape is the ").removesuffix(" thing?")
            turns.append(Turn("corners", f"How many corners does the {color} thing have?", CORNERS[turn.answer]))
    total = MORE_NUMBERS[len(scene.objects) + 3]
    return [*turns, Turn("sum", "What is the number of things in the picture plus three?", total)]


def train_turns(scene: Scene, sampler: BalancedSampler, rng: random.Random) -> list[tuple[str, str]]:
    """Returns up to 6 questions and answers about a scene."""
    turns = []
    for turn in sampler.sample(seen_questions(scene))[:5]:
        question, sentence = english(turn, rng)
        is_short = rng.random() < SHORT_SHARE
        turns.append((question + SHORT, turn.answer) if is_short else (question, sentence))
    if choices := choice_turns(scene, rng, tested=False):
        turn = rng.choice(choices)
        turns.insert(rng.randint(0, len(turns)), (turn.question + SHORT, turn.answer))
    return turns


def text_files(n: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Returns n conversations of text-only instructions to train on, and those to test."""
    trained, tested = split_items(rng)
    samples = []
    for k in range(n):
        items = rng.sample(trained, rng.randint(1, 4))
        turns = [(rng.choice(item.questions) + SHORT, item.answer) for item in items]
        samples.append(make_sample(f"text-{k}", turns, ""))
    tests = rng.sample([(item, question) for item in tested for question in item.questions], N_TEXT_TEST)
    tests = [
        make_sample(f"text-test-{k}", [(question + SHORT, item.answer)], "") | {"kind": item.kind}
        for k, (item, question) in enumerate(tests)
    ]
    return samples, tests


def test_files(
    scenes: dict[str, list[Scene]], paths: dict[str, list[str]], rng: random.Random
) -> dict[str, list[dict]]:
    """Returns test.json, rephrased.json and knowledge.json."""
    files: dict[str, list[dict]] = {"test": [], "rephrased": [], "knowledge": []}

    def add(name: str, question: str, turn: Turn, path: str, **notes: bool) -> None:
        sample = make_sample(f"{name}-{len(files[name])}", [(question + SHORT, turn.answer)], "<|image|>", path)
        files[name].append(sample | {"kind": turn.kind} | notes)

    for split, questions in (("test", seen_questions), ("unseen", unseen_questions)):
        sampler = BalancedSampler(rng)
        for scene, path in zip(scenes[split], paths[split]):
            for turn in sampler.sample(questions(scene)):
                add("test", english(turn, rng)[0], turn, path, seen=split == "test")
                add("rephrased", english(turn, rng, rephrased=True)[0], turn, path, seen=split == "test")
            for turn in knowledge_turns(scene, rng) if split == "test" else ():
                add("knowledge", turn.question, turn, path)
    return files


def caption_samples(prefix: str, pairs: list[tuple[Scene, str]], rng: random.Random) -> list[dict]:
    """pairs: scenes and the paths of their images."""
    return [
        make_sample(f"{prefix}-{k}", [(rng.choice(CAPTION_REQUESTS), caption(scene, rng))], "<|image|>", path)
        for k, (scene, path) in enumerate(pairs)
    ]


def prepare(out: Path, n_image: int, seed: int) -> None:
    """Writes all files. n_image: training scenes; the sizes of the other files follow. Raises OSError, ValueError."""
    if n_image < MIN_IMAGES:
        raise ValueError(f"--images is {n_image}: it must be {MIN_IMAGES} or more")
    rng = random.Random(seed)
    n_test = min(300, n_image // 20)
    scenes = {
        "train": [make_scene(rng) for _ in range(n_image)],
        "val": [make_scene(rng) for _ in range(n_test // 3)],
        "test": [make_scene(rng) for _ in range(n_test)],
        "unseen": [make_scene(rng, held_out=True) for _ in range(n_test)],
    }
    paths = {split: write_images(out, split, scenes[split], rng) for split in scenes}
    files = {}
    for split, captions in (("train", "captions"), ("val", "captions_val")):
        sampler = BalancedSampler(rng)
        pairs = list(zip(scenes[split], paths[split]))
        files[captions] = caption_samples(split, pairs, rng)
        files[split] = [
            make_sample(f"{split}-{k}", train_turns(scene, sampler, rng), "<|image|>", path)
            for k, (scene, path) in enumerate(pairs)
        ]
    files["text"], files["text_test"] = text_files(n_image // 2, rng)
    files |= test_files(scenes, paths, rng)
    pairs = [pair for split in ("test", "unseen") for pair in zip(scenes[split], paths[split])]
    files["test_captions"] = caption_samples("caption", pairs, rng)
    for name, samples in files.items():
        write_samples(out / f"{name}.json", samples)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/smollm"), help="folder to fill (default: %(default)s)")
    parser.add_argument("--images", type=int, default=20_000, metavar="N", help="training scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    args = parser.parse_args()
    with user_errors():
        prepare(args.out, args.images, args.seed)


if __name__ == "__main__":
    run(main)
