"""Shapes: a drawn world for experiments at tiny scale, harder than easy-VQA, with facts of its own that no image shows.

    python data/shapes/prepare.py                                   # 8,000 training images into data/shapes
    python data/shapes/prepare.py --images 400 --out elsewhere      # a small one, into another folder

An image is 64 x 64 pixels: up to four things in six cells, and a word below them.

    +-------------------+    column   left      middle    right
    |  O          ###   |    row      top, bottom
    |       +     ###   |    thing    6 shapes x 6 colours x 2 sizes; no two of one picture agree in shape and colour
    |  B A G            |    word     2 or 3 letters of 12, written with spaces in every text: a token for each letter
    +-------------------+

    file                             samples of                                                for
    -------------------------------  --------------------------------------------------------  --------------------
    stage0.json    stage0_val.json   a described picture and questions about it; the text      a language model from
                                     part; captions. No images                                 scratch
    captions.json  captions_val.json an image and its caption                                  stage 1
    train.json     val.json          an image, up to 8 questions in one conversation           stage 2, images
    text.json      text_val.json     the text part, below                                      stage 2, text
    test.json                        a test image and one question; with "kind" and "seen"     evaluation
    text_test.json                   a question of the text part; with "kind"                  evaluation
    conflict.json                    a test image and a question about it that begins with a   which of the two wins
                                     false statement; with "image_answer" and "text_answer"
    tokenizer.model                  the vocabulary of a tiny model                            all of them

The files are LLaVA's conversations, as in data/easy_vqa/prepare.py. In train.json and val.json a tenth of the
questions that can begin with a statement begin with a true one, and what is "told" in the text part has no image at
all: a model learns that either source can be relied upon, and meets the two at odds in conflict.json alone.

**Kinds of image questions:** color, shape, count, relation (left of, right of, above, below), size, compare, there,
word. **Seen:** six of the 36 pairs of shape and colour, in both sizes, and a fifth of the words are in no training
file, be it as an image or in words. A test question is unseen if it is about one of these.

**The text part,** invented facts about 32 animals, and its kinds; what is tested was never trained on:

    fact     "what is the food of the zib?"           tested: a fact known from three phrasings, asked in two others
    named    "Ada is a zib. what does Ada eat?"       tested: a name that was never with that animal
    sum      "what is the last digit of 3 plus 4?"    tested: the other order of a sum
    told     "The circle is blue. ... what color is the circle?"   tested: other statements

(A small world has fewer samples to say it all in: below 4,000 images some facts are tested that training never says.)

The answers of a kind are about equally frequent, except where statements are told. What is printed at the end as
`blind` is the best that one gets who sees no image and knows no fact: either to each question its most frequent
answer in training (in the text part all questions about food are one, and so on), or to all of the kind their most
frequent answer in the test.

Left and right have a meaning here, so **train with `--crop-scale 0`**: flips make captions false. Same seed, same texts
and pixels on any machine. (The bytes of the PNGs follow Pillow's version; tokenizer.model names its own folder.)
"""

import argparse
import itertools
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
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
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
RADIUS = {"big": 8, "small": 4}  # pixels
NUMBERS = ("zero", "one", "two", "three", "four")
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

# No training file has these. Each shape and each colour is in one of the pairs, so none is rarer than the others.
HELD_PAIRS = frozenset(zip(SHAPES, COLORS))
HELD_WORDS = frozenset(WORDS[::5])
HELD = HELD_PAIRS | HELD_WORDS
SEEN_PAIRS = [pair for pair in itertools.product(SHAPES, COLORS) if pair not in HELD]
SEEN_WORDS = [word for word in WORDS if word not in HELD]

CELL = 21  # pixels from one column or row to the next
SHIFT = 2  # pixels a thing may be off the middle of its cell: big ones still do not touch
INK = (150, 150, 150)  # of the word; no thing's colour
MAX_GROUND = 60  # brightness of the background, from black

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
N_TESTED_FORMS = 2  # of a fact's five

STATED_SHARE = 0.1  # of the questions about an image: they begin with a true statement
SMALLEST = 40  # training images; with fewer the test files would be empty


class Thing(NamedTuple):
    shape: str
    color: str
    size: str
    column: int
    row: int

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.color


class Scene(NamedTuple):
    """What one picture shows: its things in reading order, and its word."""

    things: tuple[Thing, ...]
    word: str

    @property
    def words(self) -> str:
        """"a big red circle top left, a small blue bar bottom middle, the word B A G"."""
        names = [f"a {t.size} {t.color} {t.shape} {ROWS[t.row]} {COLUMNS[t.column]}" for t in self.things]
        return ", ".join([*names, f"the word {self.word}"])

    @property
    def description(self) -> str:
        """Stands where the image would, in conversations of text only."""
        return f"The image shows {self.words}. "


class Turn(NamedTuple):
    """A question and its answer.

    about: pairs of shape and colour, or the word, that have to be known to answer. statement: says what the answer is,
    with {} in its place; choices: what could stand there without speaking of a held pair. form: the part of the
    question that `blind` (print_blind) may see.
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
# Scenes and their pictures


def make_scene(rng: random.Random, held: bool = False) -> Scene:
    """A random scene. held: with one held pair, and a held word."""
    n_thing = rng.randint(1, 4)
    first = [rng.choice(sorted(HELD_PAIRS))] if held else []
    if rng.random() < 0.5:
        # All share a shape or a colour, so that there is something to count.
        shared = rng.choice(first[0] if held else [*SHAPES, *COLORS])
        first += rng.sample([pair for pair in SEEN_PAIRS if shared in pair], n_thing - len(first))
    rest = [pair for pair in SEEN_PAIRS if pair not in first]
    pairs = first + rng.sample(rest, n_thing - len(first))
    rng.shuffle(pairs)
    cells = sorted(rng.sample(range(len(ROWS) * len(COLUMNS)), n_thing))
    things = [
        Thing(shape, color, rng.choice(list(RADIUS)), cell % len(COLUMNS), cell // len(COLUMNS))
        for (shape, color), cell in zip(pairs, cells)
    ]
    return Scene(tuple(things), rng.choice(sorted(HELD_WORDS) if held else SEEN_WORDS))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene: RGB [64 x 64]. Where exactly things and word stand is chance."""
    ground = rng.randint(0, MAX_GROUND)
    image = Image.new("RGB", (64, 64), (ground, ground, ground))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        x = CELL // 2 + 1 + CELL * thing.column + rng.randint(-SHIFT, SHIFT)
        y = CELL // 2 + 1 + CELL * thing.row + rng.randint(-SHIFT, SHIFT)
        draw_shape(pen, thing.shape, x, y, RADIUS[thing.size], COLORS[thing.color])
    x = 8 + rng.randint(0, 3)
    y = 41 + rng.randint(0, 2)
    for k, letter in enumerate(scene.word.split()):
        # The built-in font's bitmaps, twice as large. One by one, since in a word of that font letters touch.
        mask = Image.new("1", (7, 11))
        ImageDraw.Draw(mask).text((0, 0), letter, fill=1, font=ImageFont.load_default_imagefont())
        mask = mask.resize((14, 22), Image.Resampling.NEAREST)
        image.paste(INK, (x + 16 * k, y), mask)
    return image


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, color: tuple[int, int, int]) -> None:
    """Around the pixel (x, y), 2 r + 1 pixels wide."""
    box = (x - r, y - r, x + r, y + r)
    thin = r // 4  # half the thickness of a beam
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "ring":
        pen.ellipse(box, outline=color, width=thin + 1)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=color)
    else:
        pen.rectangle((x - r, y - thin, x + r, y + thin), fill=color)
        if shape == "cross":
            pen.rectangle((x - thin, y - r, x + thin, y + r), fill=color)


# ----------------------------------------------------------------------------------------------------------------------
# Questions about a scene


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def questions_about(scene: Scene) -> list[Turn]:
    """All that can be asked about a scene without taking something wrong for granted."""
    turns = []

    def add(kind: str, question: str, answer: str, things: list[Thing], statement: str = "", choices=()) -> None:
        about = frozenset(thing.pair for thing in things)
        turns.append(Turn(kind, question, answer, about, statement, tuple(choices), form=question))

    by_shape = {shape: [thing for thing in scene.things if thing.shape == shape] for shape in SHAPES}
    by_color = {color: [thing for thing in scene.things if thing.color == color] for color in COLORS}
    only_shape = [things[0] for things in by_shape.values() if len(things) == 1]  # to be called by their shape alone
    only_color = [things[0] for things in by_color.values() if len(things) == 1]

    for thing in only_shape:
        choices = [color for color in COLORS if (thing.shape, color) not in HELD]
        question = f"what color is the {thing.shape}?"
        add("color", question, thing.color, [thing], f"The {thing.shape} is {{}}.", choices)
    for thing in only_color:
        choices = [shape for shape in SHAPES if (shape, thing.color) not in HELD]
        question = f"what shape is the {thing.color} thing?"
        add("shape", question, thing.shape, [thing], f"The {thing.color} thing is a {{}}.", choices)

    counted = {plural(shape): things for shape, things in by_shape.items()}
    counted |= {f"{color} things": things for color, things in by_color.items()}
    counted["things"] = list(scene.things)
    for name, things in counted.items():
        statement = f"The number of {name} is {{}}."
        add("count", f"how many {name} are there?", NUMBERS[len(things)], things, statement, NUMBERS)

    for direction in ("left of", "right of", "above", "below"):
        for thing in scene.things:
            beyond = [other for other in scene.things if lies(other, direction, thing)]
            if len(beyond) != 1:
                continue
            both = [thing, beyond[0]]
            if thing in only_shape:
                there = f"{direction} the {thing.shape}"
                statement = f"The color {there} is {{}}."
                add("relation", f"what color is {there}?", beyond[0].color, both, statement, COLORS)
            if thing in only_color:
                there = f"{direction} the {thing.color} thing"
                statement = f"The shape {there} is a {{}}."
                add("relation", f"what shape is {there}?", beyond[0].shape, both, statement, SHAPES)

    for thing in scene.things:
        name = f"{thing.color} {thing.shape}"
        add("size", f"is the {name} big or small?", thing.size, [thing], f"The {name} is {{}}.", RADIUS)

    for one, other in itertools.permutations(only_color, 2):
        if one.size != other.size:
            bigger = max(one, other, key=lambda thing: RADIUS[thing.size])
            question = f"which is bigger, the {one.color} or the {other.color} thing?"
            add("compare", question, bigger.color, [one, other])

    pairs = {thing.pair for thing in scene.things}
    for shape, color in itertools.product(SHAPES, COLORS):
        if by_shape[shape] or by_color[color]:  # what shares nothing with the picture is absent at a glance
            answer = "yes" if (shape, color) in pairs else "no"
            question = f"is there a {color} {shape}?"
            turns.append(Turn("there", question, answer, frozenset([(shape, color)]), form=question))

    question = "what word is written?"
    about = frozenset([scene.word])
    turns.append(Turn("word", question, scene.word, about, "The word is {}.", tuple(SEEN_WORDS), form=question))
    return turns


def lies(thing: Thing, direction: str, other: Thing) -> bool:
    """Whether a thing lies in that direction of the other; those of one column are neither left nor right."""
    return {
        "left of": thing.column < other.column,
        "right of": thing.column > other.column,
        "above": thing.row < other.row,
        "below": thing.row > other.row,
    }[direction]


class Chooser:
    """Chooses questions so that no answer of a kind, and no answer of a question, is much more frequent than another.

    It counts what it chose, and prefers what there was least of. One for each file.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.used: Counter[tuple[str, str]] = Counter()

    def choose(self, turns: list[Turn]) -> list[Turn]:
        """At most one question of each kind, in random order: the one whose answer was rarest so far."""
        chosen = []
        for kind in KINDS:
            of_kind = [turn for turn in turns if turn.kind == kind]
            if of_kind:
                turn = min(of_kind, key=self.rarity)
                self.used[kind, turn.answer] += 1
                self.used[turn.question, turn.answer] += 1
                chosen.append(turn)
        self.rng.shuffle(chosen)
        return chosen

    def rarity(self, turn: Turn) -> tuple[int, int, float]:
        return self.used[turn.kind, turn.answer], self.used[turn.question, turn.answer], self.rng.random()


def seen_questions(scene: Scene) -> list[Turn]:
    return [turn for turn in questions_about(scene) if not turn.about & HELD]


def unseen_questions(scene: Scene) -> list[Turn]:
    return [turn for turn in questions_about(scene) if turn.about & HELD]


# ----------------------------------------------------------------------------------------------------------------------
# The text part


class Knowledge:
    """The invented facts, and for each kind of question those to train on and those to test: lists of Turns.

    named: a list of Turns for each pair of name and animal, since they follow one introduction.
    """

    def __init__(self, rng: random.Random):
        self.fact: dict[str, list[Turn]] = {"train": [], "test": []}
        self.named: dict[str, list[list[Turn]]] = {"train": [], "test": []}
        self.sum: dict[str, list[Turn]] = {"train": [], "test": []}
        facts = {}
        for relation, answers in RELATIONS.items():
            dealt = list(answers) * (len(ANIMALS) // len(answers))
            rng.shuffle(dealt)
            for animal, answer in zip(ANIMALS, dealt, strict=True):
                facts[animal, relation] = answer
                forms = list(FACT_FORMS[relation])
                tested = rng.sample(forms, N_TESTED_FORMS)
                for form in forms:
                    part = "test" if form in tested else "train"
                    self.fact[part].append(Turn("fact", form.format(animal), answer, form=relation))

        dealt = rng.sample(ANIMALS, len(ANIMALS))
        for k, name in enumerate(NAMES):
            tested = dealt[8 * k % 32 :][:8]  # each animal with two of the names
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


def told(rng: random.Random, chooser: Chooser) -> tuple[str, list[Turn]]:
    """Statements about a picture that does not exist, and the questions that they answer."""
    turns: list[Turn] = []
    while len(turns) < 2:
        turns = [turn for turn in chooser.choose(seen_questions(make_scene(rng))) if turn.statement][:4]
    statements = " ".join(turn.true_statement for turn in turns) + " "
    rng.shuffle(turns)
    return statements, turns


def text_sample(name: str, kind: str, knowledge: Knowledge, rng: random.Random, chooser: Chooser) -> dict:
    """A conversation of several questions to train on."""
    if kind == "told":
        before, turns = told(rng, chooser)
    elif kind == "named":
        turns = rng.choice(knowledge.named["train"])
        before = turns[0].statement + " "
        turns = rng.sample(turns, len(turns))
    else:
        before = ""
        turns = rng.sample(knowledge.fact["train"] if kind == "fact" else knowledge.sum["train"], 6)
    return plain_sample(name, turns, before) | {"kind": kind}


def text_samples(split: str, n: int, knowledge: Knowledge, rng: random.Random) -> list[dict]:
    chooser = Chooser(rng)
    kinds = ("fact", "named", "sum", "told")
    return [text_sample(f"{split}-{k}", kinds[k % 4], knowledge, rng, chooser) for k in range(n)]


def text_tests(n_told: int, knowledge: Knowledge, rng: random.Random) -> list[tuple[str, Turn]]:
    """All questions kept for the test, with what comes before each."""
    tests = [("", turn) for turn in knowledge.fact["test"] + knowledge.sum["test"]]
    tests += [(turn.statement + " ", turn) for turns in knowledge.named["test"] for turn in turns]
    chooser = Chooser(rng)
    for _ in range(n_told):
        statements, turns = told(rng, chooser)
        tests.append((statements, turns[0]._replace(kind="told")))
    return tests


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def plain_sample(name: str, turns: list[Turn], before: str, image: str | None = None) -> dict:
    return make_sample(name, [(turn.question, turn.answer) for turn in turns], before, image)


def caption_sample(name: str, scene: Scene, before: str, image: str | None = None) -> dict:
    return make_sample(name, [(CAPTION_REQUEST, scene.words + ".")], before, image)


def stated(turns: list[Turn], rng: random.Random) -> list[Turn]:
    """Begins some of the questions with a true statement."""
    return [
        turn._replace(question=f"{turn.true_statement} {turn.question}")
        if turn.statement and rng.random() < STATED_SHARE
        else turn
        for turn in turns
    ]


def stage0_samples(split: str, n: int, knowledge: Knowledge, rng: random.Random) -> list[dict]:
    """Text alone: of 20 samples 8 are of the text part, 3 captions, 9 questions about a described picture."""
    n_text = n * 8 // 20
    n_caption = n * 3 // 20
    samples = text_samples(f"{split}-text", n_text, knowledge, rng)
    chooser = Chooser(rng)
    for k in range(n - n_text):
        scene = make_scene(rng)
        if k < n_caption:
            samples.append(caption_sample(f"{split}-caption-{k}", scene, scene.description))
        else:
            turns = chooser.choose(seen_questions(scene))
            samples.append(plain_sample(f"{split}-described-{k}", turns, scene.description))
    rng.shuffle(samples)
    return samples


def conflict_sample(name: str, image: str, turns: list[Turn], k: int, rng: random.Random) -> dict:
    """A false statement, and the question what is true. The answer of the conversation is the image's."""
    turns = [turn for turn in turns if turn.statement]
    turn = turns[k % len(turns)]  # so that each kind comes up
    lie = rng.choice([choice for choice in turn.choices if choice != turn.answer])
    sample = plain_sample(name, [turn], f"<|image|>{turn.statement.format(lie)} ", image)
    return sample | {"kind": turn.kind, "image_answer": turn.answer, "text_answer": lie}


def draw_images(out: Path, split: str, scenes: list[Scene], rng: random.Random) -> list[str]:
    """Writes the scenes' pictures, and gives their paths below `out`."""
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, scene in enumerate(tqdm(scenes, desc=f"images to {folder}", unit="image")):
        draw(scene, rng).save(folder / f"{k}.png")
        paths.append(f"images/{split}/{k}.png")
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# What can be guessed


def print_blind(title: str, trained: list[Turn], tested: list[Turn]) -> None:
    """Prints how often the two guesses of the module's docstring are right, the better of them, for each kind."""
    answers = defaultdict(Counter)
    for turn in trained:
        answers[turn.form][turn.answer] += 1
    # Of equally frequent ones the first in the alphabet, so that nothing hangs on their order.
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
    """Writes all files. n_image: training images; the other files follow. Raises OSError, ValueError."""
    if n_image < SMALLEST:
        raise ValueError(f"--images is {n_image}: it must be {SMALLEST} or more")
    rng = random.Random(seed)
    knowledge = Knowledge(rng)

    # The images first: where there is a JSON file, its images are there.
    scenes = {
        "train": [make_scene(rng) for _ in range(n_image)],
        "val": [make_scene(rng) for _ in range(n_image // 40)],
        "test": [make_scene(rng) for _ in range(n_image // 20)],
        "unseen": [make_scene(rng, held=True) for _ in range(n_image // 20)],
    }
    paths = {split: draw_images(out, split, scenes[split], rng) for split in scenes}

    turns = {}  # by split, those of each image
    for split in scenes:
        chooser = Chooser(rng)
        questions = unseen_questions if split == "unseen" else seen_questions
        turns[split] = [chooser.choose(questions(scene)) for scene in scenes[split]]

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
            plain_sample(f"{split}-{k}", stated(asked, rng), "<|image|>", path)
            for k, (asked, path) in enumerate(zip(turns[split], paths[split]))
        ]
    files["test"] = [
        plain_sample(f"{split}-{k}-{turn.kind}", [turn], "<|image|>", path)
        | {"kind": turn.kind, "seen": split == "test"}
        for split in ("test", "unseen")
        for k, (asked, path) in enumerate(zip(turns[split], paths[split]))
        for turn in asked
    ]
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

    trained = [turn for asked in turns["train"] for turn in asked]
    for split, title in (("test", "test.json, seen"), ("unseen", "test.json, unseen")):
        print_blind(title, trained, [turn for asked in turns[split] for turn in asked])
    named = [turn for asked in knowledge.named["train"] for turn in asked]
    # What is told are questions about pictures, so that their answers are guessed as those are.
    about_told = [turn._replace(kind="told") for turn in trained]
    known = knowledge.fact["train"] + knowledge.sum["train"] + named + about_told
    print_blind("text_test.json", known, [turn for _, turn in tests])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/shapes"), help="folder to fill (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8000, metavar="N", help="to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    args = parser.parse_args()
    try:
        prepare(args.out, args.images, args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write into {args.out}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
