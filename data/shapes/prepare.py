"""Shapes: a synthetic data set for experiments at tiny scale, harder than easy-VQA, with facts that no image shows.

    python data/shapes/prepare.py                                   # 8,000 training images into data/shapes
    python data/shapes/prepare.py --images 400 --out elsewhere      # a small one, into another folder

An image has 64 x 64 pixels: up to four objects in six cells, and a word below them.

    +-------------------+    column   left      middle    right
    |  O          ###   |    row      top, bottom
    |       +     ###   |    object   6 shapes x 6 colors x 2 sizes; no two in an image share both shape and color
    |  B A G            |    word     2 or 3 of 12 letters, written with spaces in every text: one token per letter
    +-------------------+

    file                             samples                                                   for
    -------------------------------  --------------------------------------------------------  --------------------
    stage0.json    stage0_val.json   a described image and questions about it; the text        a language model from
                                     part; captions. No images                                 scratch
    captions.json  captions_val.json an image and its caption                                  stage 1
    train.json     val.json          an image, up to 8 questions in one conversation           stage 2, images
    text.json      text_val.json     the text part, below                                      stage 2, text
    test.json                        a test image and one question; with "kind" and "seen"     evaluation
    text_test.json                   a question of the text part; with "kind"                  evaluation
    conflict.json                    a test image and a question that begins with a false      which of the two the
                                     statement; with "image_answer" and "text_answer"          model believes
    tokenizer.model                  the vocabulary of a tiny model                            all of them

The files have LLaVA's conversation format, as in data/easy_vqa/prepare.py. In train.json and val.json a tenth of the
questions that can begin with a statement begin with a true one, and the "told" questions of the text part have no
image: a model learns that both sources are reliable, and they disagree in conflict.json only.

**Kinds of image questions:** color, shape, count, relation (left of, right of, above, below), size, compare, there,
word. **Seen:** six of the 36 pairs of shape and color, in both sizes, and a fifth of the words are in no training
file, neither in images nor in texts. A test question is unseen if it is about one of these.

**The text part:** invented facts about 32 animals. Its kinds of questions, and what is tested but never trained:

    fact     "what is the food of the zib?"           tested: a fact trained in three phrasings, asked in two others
    named    "Ada is a zib. what does Ada eat?"       tested: a name that was never with that animal
    sum      "what is the last digit of 3 plus 4?"    tested: the other order of a sum
    told     "The circle is blue. ... what color is the circle?"   tested: other statements

(Below 4,000 images there are too few samples for all facts: some are tested that training never states.)

The answers of a kind are about equally frequent, except where statements give them. The column `blind` that is printed
at the end is the best accuracy without seeing images or knowing facts: either each question gets its most frequent
answer in training (in the text part, all questions about food count as one, and so on), or all questions of a kind
get the most frequent answer of the kind in the test.

Left and right have a meaning here, so **train with `--crop-scale 0`**: flips make captions false. The same seed gives
the same texts and pixels on any machine. (The bytes of the PNGs depend on Pillow's version; tokenizer.model contains
the name of its folder.)
"""

import itertools
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from command import ArgumentParser, run, user_errors  # noqa: E402  reports missing packages

from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import CAPTION_REQUEST  # noqa: E402
from data.easy_vqa.prepare import make_sample, train_tokenizer, write_samples  # noqa: E402

COLORS = {
    "red": (230, 40, 40),
    "green": (30, 180, 60),
    "blue": (50, 80, 255),
    "yellow": (250, 220, 30),
    "purple": (170, 50, 210),
    "white": (255, 255, 255),
}
MORE_COLORS = {  # for scenes in which few pairs of shape and color are missing (data/tiny)
    "orange": (255, 140, 0),
    "pink": (255, 150, 190),
    "cyan": (0, 220, 220),
    "brown": (130, 75, 30),
    "lime": (180, 255, 80),
    "navy": (80, 80, 150),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
RADIUS = {"big": 8, "small": 4}  # pixels
NUMBERS = ("zero", "one", "two", "three", "four")
MORE_NUMBERS = ("five", "six")  # of objects in scenes with more of them than any training scene (experiments/limits.py)
COLUMNS = ("left", "middle", "right")
ROWS = ("top", "bottom")
KINDS = ("color", "shape", "count", "relation", "size", "compare", "there", "word")

CONSONANTS = "BGKLMPST"
VOWELS = "AEOU"  # the built-in font's I and T are too much alike
WORDS = [
    " ".join(letters)
    for parts in ((CONSONANTS, VOWELS), (CONSONANTS, VOWELS, CONSONANTS))
    for letters in itertools.product(*parts)
]

# No training file has these. Each shape and each color is in one of the pairs, so all are equally frequent.
HELD_OUT_PAIRS = frozenset(zip(SHAPES, COLORS))
HELD_OUT_WORDS = frozenset(WORDS[::5])
HELD_OUT = HELD_OUT_PAIRS | HELD_OUT_WORDS
SEEN_PAIRS = [pair for pair in itertools.product(SHAPES, COLORS) if pair not in HELD_OUT]
MORE_PAIRS = list(itertools.product(SHAPES, MORE_COLORS))
SEEN_WORDS = [word for word in WORDS if word not in HELD_OUT]

CELL = 21  # pixels from one column or row to the next
MAX_SHIFT = 2  # pixels between the centers of an object and its cell; big objects still do not touch
WORD_COLOR = (150, 150, 150)  # no object has it
MAX_BACKGROUND = 60  # brightness; the minimum is 0

ANIMALS = (
    "zib mup dov kel rax fen goz luk wim tas hob pif nar vek jol sud "
    "bax cug dreb fim gral hesk jat kroz lemp nuf plin quab snol trev vint yog"
).split()
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
RELATIONS = {
    "food": ("nuts", "grass", "fish", "honey", "seeds", "corn", "moss", "berries"),
    "home": ("caves", "trees", "rivers", "barns", "dunes", "swamps", "holes", "hills"),
    "tool": ("stick", "drum", "lamp", "rope", "cup", "flag", "key", "bell"),
}
FACT_FORMS = {
    "food": (
        "what does the {} eat?",
        "what is the food of the {}?",
        "the {} feeds on what?",
        "name the meal of the {}.",
        "what will a hungry {} look for?",
    ),
    "home": (
        "where does the {} live?",
        "what is the home of the {}?",
        "the {} dwells in what?",
        "name the place of the {}.",
        "where will you find a {}?",
    ),
    "tool": (
        "what does the {} carry?",
        "what is the tool of the {}?",
        "the {} works with what?",
        "name the gear of the {}.",
        "what will a {} take along?",
    ),
}
SUM_FORMS = (
    "what is the last digit of {} plus {}?",
    "add {} and {} and say the last digit.",
    "{} and {} together end in which digit?",
)
N_TESTED_FORMS = 2  # of the five phrasings of a fact

STATED_SHARE = 0.1  # share of the questions about an image that begin with a true statement
MIN_IMAGES = 40  # training images; with fewer, the test files would be empty


class Object(NamedTuple):
    shape: str
    color: str
    size: str
    column: int
    row: int

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.color


class Scene(NamedTuple):
    """The content of an image: its objects in reading order, and its word."""

    objects: tuple[Object, ...]
    word: str

    @property
    def caption(self) -> str:
        """For example "a big red circle top left, a small blue bar bottom middle, the word B A G"."""
        names = [f"a {x.size} {x.color} {x.shape} {ROWS[x.row]} {COLUMNS[x.column]}" for x in self.objects]
        return ", ".join([*names, f"the word {self.word}"])

    @property
    def description(self) -> str:
        """Replaces the image in conversations of text only."""
        return f"The image shows {self.caption}. "


class Turn(NamedTuple):
    """A question and its answer.

    about: the pairs of shape and color, or the word, that the question is about. statement: a sentence that gives the
    answer, with {} for it; choices: what else could be inserted without mentioning a held-out pair. form: the part of
    the question that print_blind uses.
    """

    kind: str
    question: str
    answer: str
    about: frozenset = frozenset()
    statement: str = ""
    choices: tuple[str, ...] = ()
    form: str = ""

    @property
    def true_statement(self) -> str:
        return self.statement.format(self.answer)


# ----------------------------------------------------------------------------------------------------------------------
# Scenes and their images


def make_scene(
    rng: random.Random,
    held_out: bool = False,
    pairs: Sequence[tuple[str, str]] = SEEN_PAIRS,
    n_object: int | None = None,
) -> Scene:
    """Returns a random scene.

    held_out: with one held-out pair and a held-out word. pairs: of its other objects. n_object: 1 to 6, or None: a
    random number of 1 to 4.
    """
    n_object = n_object or rng.randint(1, 4)
    first = [rng.choice(sorted(HELD_OUT_PAIRS))] if held_out else []
    if rng.random() < 0.5:  # all share a shape or a color, so that counts differ from 0 and 1
        shared = rng.choice(first[0] if held_out else [*SHAPES, *COLORS])
        sharing = [pair for pair in pairs if shared in pair]
        first += rng.sample(sharing, min(n_object - len(first), len(sharing)))
    rest = [pair for pair in pairs if pair not in first]
    chosen = first + rng.sample(rest, n_object - len(first))
    rng.shuffle(chosen)
    cells = sorted(rng.sample(range(len(ROWS) * len(COLUMNS)), n_object))
    objects = [
        Object(shape, color, rng.choice(list(RADIUS)), cell % len(COLUMNS), cell // len(COLUMNS))
        for (shape, color), cell in zip(chosen, cells)
    ]
    return Scene(tuple(objects), rng.choice(sorted(HELD_OUT_WORDS) if held_out else SEEN_WORDS))


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Returns the image of a scene: RGB, 64 x 64 pixels. Objects and word are shifted by random numbers of pixels."""
    background = rng.randint(0, MAX_BACKGROUND)
    image = Image.new("RGB", (64, 64), (background, background, background))
    draw_objects(image, scene, rng)
    draw_word(image, scene.word, 8 + rng.randint(0, 3), 41 + rng.randint(0, 2))
    return image


def draw_objects(image: Image.Image, scene: Scene, rng: random.Random) -> None:
    """Draws all objects of a scene, each shifted by random numbers of pixels."""
    canvas = ImageDraw.Draw(image)
    for item in scene.objects:
        x = CELL // 2 + 1 + CELL * item.column + rng.randint(-MAX_SHIFT, MAX_SHIFT)
        y = CELL // 2 + 1 + CELL * item.row + rng.randint(-MAX_SHIFT, MAX_SHIFT)
        draw_object(canvas, item, x, y)


def draw_word(image: Image.Image, word: str, x: int, y: int, *, scale: float = 2, pitch: int = 16) -> None:
    """Draws a word whose first letter has its upper left corner at the pixel (x, y).

    scale: of the built-in font. pitch: pixels from one letter to the next.
    """
    size = round(7 * scale), round(11 * scale)
    for k, letter in enumerate(word.split()):
        # Bitmaps of the built-in font, enlarged. One by one, because letters of a word touch in that font.
        mask = Image.new("1", (7, 11))
        ImageDraw.Draw(mask).text((0, 0), letter, fill=1, font=ImageFont.load_default_imagefont())
        image.paste(WORD_COLOR, (x + pitch * k, y), mask.resize(size, Image.Resampling.NEAREST))


def draw_object(canvas: ImageDraw.ImageDraw, item: Object, x: int, y: int) -> None:
    """Draws an object centered at the pixel (x, y)."""
    shape, r, color = item.shape, RADIUS[item.size], (COLORS | MORE_COLORS)[item.color]
    box = (x - r, y - r, x + r, y + r)
    thin = r // 4  # half the thickness of the lines of a bar or cross
    if shape == "circle":
        canvas.ellipse(box, fill=color)
    elif shape == "ring":
        canvas.ellipse(box, outline=color, width=thin + 1)
    elif shape == "square":
        canvas.rectangle(box, fill=color)
    elif shape == "triangle":
        canvas.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=color)
    else:
        canvas.rectangle((x - r, y - thin, x + r, y + thin), fill=color)
        if shape == "cross":
            canvas.rectangle((x - thin, y - r, x + thin, y + r), fill=color)


# ----------------------------------------------------------------------------------------------------------------------
# Questions about a scene


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def questions_about(scene: Scene) -> list[Turn]:
    """Returns all questions about a scene whose presuppositions hold, such as that there is one circle."""
    turns = []

    def add(kind: str, question: str, answer: str, objects: list[Object], statement: str = "", choices=()) -> None:
        about = frozenset(item.pair for item in objects)
        turns.append(Turn(kind, question, answer, about, statement, tuple(choices), form=question))

    by_shape = {shape: [item for item in scene.objects if item.shape == shape] for shape in SHAPES}
    by_color = {color: [item for item in scene.objects if item.color == color] for color in COLORS}
    unique_shape = [objects[0] for objects in by_shape.values() if len(objects) == 1]
    unique_color = [objects[0] for objects in by_color.values() if len(objects) == 1]

    for item in unique_shape:
        choices = [color for color in COLORS if (item.shape, color) not in HELD_OUT]
        question = f"what color is the {item.shape}?"
        add("color", question, item.color, [item], f"The {item.shape} is {{}}.", choices)
    for item in unique_color:
        choices = [shape for shape in SHAPES if (shape, item.color) not in HELD_OUT]
        question = f"what shape is the {item.color} thing?"
        add("shape", question, item.shape, [item], f"The {item.color} thing is a {{}}.", choices)

    counted = {plural(shape): objects for shape, objects in by_shape.items()}
    counted |= {f"{color} things": objects for color, objects in by_color.items()}
    counted["things"] = list(scene.objects)
    for name, objects in counted.items():
        statement = f"The number of {name} is {{}}."
        add("count", f"how many {name} are there?", (NUMBERS + MORE_NUMBERS)[len(objects)], objects, statement, NUMBERS)

    for direction in ("left of", "right of", "above", "below"):
        for item in scene.objects:
            beyond = [other for other in scene.objects if is_in_direction(other, direction, item)]
            if len(beyond) != 1:
                continue
            both = [item, beyond[0]]
            if item in unique_shape:
                location = f"{direction} the {item.shape}"
                statement = f"The color {location} is {{}}."
                add("relation", f"what color is {location}?", beyond[0].color, both, statement, COLORS)
            if item in unique_color:
                location = f"{direction} the {item.color} thing"
                statement = f"The shape {location} is a {{}}."
                add("relation", f"what shape is {location}?", beyond[0].shape, both, statement, SHAPES)

    for item in scene.objects:
        name = f"{item.color} {item.shape}"
        add("size", f"is the {name} big or small?", item.size, [item], f"The {name} is {{}}.", RADIUS)

    for one, other in itertools.permutations(unique_color, 2):
        if one.size != other.size:
            bigger = max(one, other, key=lambda item: RADIUS[item.size])
            question = f"which is bigger, the {one.color} or the {other.color} thing?"
            add("compare", question, bigger.color, [one, other])

    pairs = {item.pair for item in scene.objects}
    for shape, color in itertools.product(SHAPES, COLORS):
        if by_shape[shape] or by_color[color]:  # else absence would be too easy to see
            answer = "yes" if (shape, color) in pairs else "no"
            question = f"is there a {color} {shape}?"
            turns.append(Turn("there", question, answer, frozenset([(shape, color)]), form=question))

    question = "what word is written?"
    about = frozenset([scene.word])
    turns.append(Turn("word", question, scene.word, about, "The word is {}.", tuple(SEEN_WORDS), form=question))
    return turns


def is_in_direction(item: Object, direction: str, other: Object) -> bool:
    """Returns whether an object lies in that direction of another; in the same column, neither left nor right."""
    return {
        "left of": item.column < other.column,
        "right of": item.column > other.column,
        "above": item.row < other.row,
        "below": item.row > other.row,
    }[direction]


class BalancedSampler:
    """Samples questions so that the answers of a kind, and those of a question, are about equally frequent.

    It counts the answers so far and prefers the rarest. Each file has its own.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.n_used: Counter[tuple[str, str]] = Counter()

    def sample(self, turns: list[Turn]) -> list[Turn]:
        """Returns at most one question of each kind, in random order: the one whose answer was rarest so far."""
        sampled = []
        for kind in KINDS:
            of_kind = [turn for turn in turns if turn.kind == kind]
            if of_kind:
                turn = min(of_kind, key=self.rarity)
                self.n_used[kind, turn.answer] += 1
                self.n_used[turn.question, turn.answer] += 1
                sampled.append(turn)
        self.rng.shuffle(sampled)
        return sampled

    def rarity(self, turn: Turn) -> tuple[int, int, float]:
        return self.n_used[turn.kind, turn.answer], self.n_used[turn.question, turn.answer], self.rng.random()


def seen_questions(scene: Scene) -> list[Turn]:
    return [turn for turn in questions_about(scene) if not turn.about & HELD_OUT]


def unseen_questions(scene: Scene) -> list[Turn]:
    return [turn for turn in questions_about(scene) if turn.about & HELD_OUT]


# ----------------------------------------------------------------------------------------------------------------------
# The text part


class Knowledge:
    """The invented facts: for each kind of question, the turns to train on and those to test.

    named: a list of turns for each pair of name and animal, since one introduction precedes them.
    """

    def __init__(self, rng: random.Random):
        self.fact: dict[str, list[Turn]] = {"train": [], "test": []}
        self.named: dict[str, list[list[Turn]]] = {"train": [], "test": []}
        self.sum: dict[str, list[Turn]] = {"train": [], "test": []}
        facts = {}
        for relation, answers in RELATIONS.items():
            assigned = list(answers) * (len(ANIMALS) // len(answers))
            rng.shuffle(assigned)
            for animal, answer in zip(ANIMALS, assigned, strict=True):
                facts[animal, relation] = answer
                forms = list(FACT_FORMS[relation])
                tested = rng.sample(forms, N_TESTED_FORMS)
                for form in forms:
                    part = "test" if form in tested else "train"
                    self.fact[part].append(Turn("fact", form.format(animal), answer, form=relation))

        assigned = rng.sample(ANIMALS, len(ANIMALS))
        for k, name in enumerate(NAMES):
            tested = assigned[8 * k % 32 :][:8]  # each animal with two of the names
            for animal in ANIMALS:
                turns = []
                for relation, forms in FACT_FORMS.items():
                    question = forms[0].replace("the {}", name)
                    statement = f"{name} is a {animal}."
                    turns.append(Turn("named", question, facts[animal, relation], statement=statement, form=relation))
                self.named["test" if animal in tested else "train"].append(turns)

        for a, b in itertools.combinations_with_replacement(range(10), 2):
            trained = (a, b) if rng.random() < 0.5 else (b, a)
            for form in SUM_FORMS:
                for x, y in sorted({(a, b), (b, a)}):
                    part = "train" if (x, y) == trained else "test"
                    self.sum[part].append(Turn("sum", form.format(x, y), str((x + y) % 10), form=form))


def told(rng: random.Random, sampler: BalancedSampler) -> tuple[str, list[Turn]]:
    """Returns statements about an image that does not exist, and the questions that they answer."""
    turns: list[Turn] = []
    while len(turns) < 2:
        turns = [turn for turn in sampler.sample(seen_questions(make_scene(rng))) if turn.statement][:4]
    statements = " ".join(turn.true_statement for turn in turns) + " "
    rng.shuffle(turns)
    return statements, turns


def text_sample(name: str, kind: str, knowledge: Knowledge, rng: random.Random, sampler: BalancedSampler) -> dict:
    """Returns a conversation of several questions to train on."""
    if kind == "told":
        before, turns = told(rng, sampler)
    elif kind == "named":
        turns = rng.choice(knowledge.named["train"])
        before = turns[0].statement + " "
        turns = rng.sample(turns, len(turns))
    else:
        before = ""
        turns = rng.sample(knowledge.fact["train"] if kind == "fact" else knowledge.sum["train"], 6)
    return plain_sample(name, turns, before) | {"kind": kind}


def text_samples(split: str, n: int, knowledge: Knowledge, rng: random.Random) -> list[dict]:
    sampler = BalancedSampler(rng)
    kinds = ("fact", "named", "sum", "told")
    return [text_sample(f"{split}-{k}", kinds[k % 4], knowledge, rng, sampler) for k in range(n)]


def text_tests(n_told: int, knowledge: Knowledge, rng: random.Random) -> list[tuple[str, Turn]]:
    """Returns all test questions, each with the text before it."""
    tests = [("", turn) for turn in knowledge.fact["test"] + knowledge.sum["test"]]
    tests += [(turn.statement + " ", turn) for turns in knowledge.named["test"] for turn in turns]
    sampler = BalancedSampler(rng)
    for _ in range(n_told):
        statements, turns = told(rng, sampler)
        tests.append((statements, turns[0]._replace(kind="told")))
    return tests


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def plain_sample(name: str, turns: list[Turn], before: str, image: str | None = None) -> dict:
    return make_sample(name, [(turn.question, turn.answer) for turn in turns], before, image)


def caption_sample(name: str, scene: Scene, before: str, image: str | None = None) -> dict:
    return make_sample(name, [(CAPTION_REQUEST, scene.caption + ".")], before, image)


def add_statements(turns: list[Turn], rng: random.Random) -> list[Turn]:
    """Puts a true statement before some of the questions."""
    return [
        turn._replace(question=f"{turn.true_statement} {turn.question}")
        if turn.statement and rng.random() < STATED_SHARE
        else turn
        for turn in turns
    ]


def stage0_samples(split: str, n: int, knowledge: Knowledge, rng: random.Random) -> list[dict]:
    """Returns samples of text only: of 20, 8 of the text part, 3 captions, 9 questions about a described image."""
    n_text = n * 8 // 20
    n_caption = n * 3 // 20
    samples = text_samples(f"{split}-text", n_text, knowledge, rng)
    sampler = BalancedSampler(rng)
    for k in range(n - n_text):
        scene = make_scene(rng)
        if k < n_caption:
            samples.append(caption_sample(f"{split}-caption-{k}", scene, scene.description))
        else:
            turns = sampler.sample(seen_questions(scene))
            samples.append(plain_sample(f"{split}-described-{k}", turns, scene.description))
    rng.shuffle(samples)
    return samples


def conflict_sample(name: str, image: str, turns: list[Turn], k: int, rng: random.Random) -> dict:
    """Returns a false statement and a question that it answers wrongly; the sample has the image's answer."""
    turns = [turn for turn in turns if turn.statement]
    turn = turns[k % len(turns)]  # so that all kinds occur
    false_answer = rng.choice([choice for choice in turn.choices if choice != turn.answer])
    sample = plain_sample(name, [turn], f"<|image|>{turn.statement.format(false_answer)} ", image)
    return sample | {"kind": turn.kind, "image_answer": turn.answer, "text_answer": false_answer}


def write_images(out: Path, split: str, scenes: list[Scene], rng: random.Random) -> list[str]:
    """Writes the images of the scenes. Returns their paths relative to `out`."""
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, scene in enumerate(tqdm(scenes, desc=f"images to {folder}", unit="image")):
        render(scene, rng).save(folder / f"{k}.png")
        paths.append(f"images/{split}/{k}.png")
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy without the image


def print_blind(title: str, trained: list[Turn], tested: list[Turn]) -> None:
    """Prints, for each kind, the higher accuracy of the two guesses in the module's docstring."""
    answers = defaultdict(Counter)
    for turn in trained:
        answers[turn.form][turn.answer] += 1
    # Ties: the first in the alphabet, so that the order of the turns does not matter.
    guesses = {form: min(counts, key=lambda answer: (-counts[answer], answer)) for form, counts in answers.items()}
    print(f"\n{title:<20} {'questions':>9} {'answers':>8} {'blind':>8}")
    for kind in sorted({turn.kind for turn in tested}):
        turns = [turn for turn in tested if turn.kind == kind]
        counts = Counter(turn.answer for turn in turns)
        n_right = max(sum(guesses.get(turn.form) == turn.answer for turn in turns), max(counts.values()))
        print(f"  {kind:<18} {len(turns):>9,} {len(counts):>8} {100 * n_right / len(turns):>6.1f} %")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def prepare(out: Path, n_image: int, seed: int) -> None:
    """Writes all files. n_image: training images; the sizes of the other files follow. Raises OSError, ValueError."""
    if n_image < MIN_IMAGES:
        raise ValueError(f"--images is {n_image}: it must be {MIN_IMAGES} or more")
    rng = random.Random(seed)
    knowledge = Knowledge(rng)

    # Images are written before JSON files: if a JSON file exists, so do its images.
    scenes = {
        "train": [make_scene(rng) for _ in range(n_image)],
        "val": [make_scene(rng) for _ in range(n_image // 40)],
        "test": [make_scene(rng) for _ in range(n_image // 20)],
        "unseen": [make_scene(rng, held_out=True) for _ in range(n_image // 20)],
    }
    paths = {split: write_images(out, split, scenes[split], rng) for split in scenes}

    turns = {}  # by split, a list of turns per image
    for split in scenes:
        sampler = BalancedSampler(rng)
        questions = unseen_questions if split == "unseen" else seen_questions
        turns[split] = [sampler.sample(questions(scene)) for scene in scenes[split]]

    files = {}
    files["stage0"] = stage0_samples("stage0", n_image, knowledge, rng)
    files["stage0_val"] = stage0_samples("stage0-val", n_image // 40, knowledge, rng)
    files["text"] = text_samples("text", n_image // 2, knowledge, rng)
    files["text_val"] = text_samples("text-val", n_image // 40, knowledge, rng)
    for split, captions in (("train", "captions"), ("val", "captions_val")):
        files[captions] = [
            caption_sample(f"{split}-{k}", scene, "<|image|>", path)
            for k, (scene, path) in enumerate(zip(scenes[split], paths[split]))
        ]
        files[split] = [
            plain_sample(f"{split}-{k}", add_statements(asked, rng), "<|image|>", path)
            for k, (asked, path) in enumerate(zip(turns[split], paths[split]))
        ]
    files["test"] = test_samples("test", paths, turns) + test_samples("unseen", paths, turns)
    files["conflict"] = [
        conflict_sample(f"conflict-{k}", path, asked, k, rng)
        for k, (asked, path) in enumerate(zip(turns["test"], paths["test"]))
    ]
    tests = text_tests(n_image // 40, knowledge, rng)
    files["text_test"] = [
        plain_sample(f"text-test-{k}", [turn], before) | {"kind": turn.kind} for k, (before, turn) in enumerate(tests)
    ]

    train_tokenizer(out / "tokenizer.model", files["stage0"])
    for name, samples in files.items():
        write_samples(out / f"{name}.json", samples)
    print_all_blind(turns, knowledge, [turn for _, turn in tests])


def test_samples(split: str, paths: dict[str, list[str]], turns: dict[str, list[list[Turn]]]) -> list[dict]:
    """Returns one sample per question about the images of a split."""
    return [
        plain_sample(f"{split}-{k}-{turn.kind}", [turn], "<|image|>", path)
        | {"kind": turn.kind, "seen": split == "test"}
        for k, (asked, path) in enumerate(zip(turns[split], paths[split]))
        for turn in asked
    ]


def print_all_blind(turns: dict[str, list[list[Turn]]], knowledge: Knowledge, text_tested: list[Turn]) -> None:
    trained = [turn for asked in turns["train"] for turn in asked]
    for split, title in (("test", "test.json, seen"), ("unseen", "test.json, unseen")):
        print_blind(title, trained, [turn for asked in turns[split] for turn in asked])
    named = [turn for asked in knowledge.named["train"] for turn in asked]
    told = [turn._replace(kind="told") for turn in trained]  # they are questions about images too
    print_blind("text_test.json", knowledge.fact["train"] + knowledge.sum["train"] + named + told, text_tested)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/shapes"), help="folder to fill (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8000, metavar="N", help="training images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    args = parser.parse_args()
    with user_errors():
        prepare(args.out, args.images, args.seed)


if __name__ == "__main__":
    run(main)
