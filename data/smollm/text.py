"""Text-only instructions with short, checkable answers, to keep a language model's abilities in stage 2.

    kind         example                                                    tested
    capital      "What is the capital of Norway?" -> "Oslo"                 countries that training never asks about
    opposite     "What is the opposite of hot?" -> "cold"                   other words
    plural       "What is the plural of mouse?" -> "mice"                   other words
    next         "Which day comes after Monday?" -> "Tuesday"               other days and months
    arithmetic   "What is 7 plus 5?" -> "12"                                other numbers
    write        "Write the word river in capital letters." -> "RIVER"      other words
    choose       "Which is an animal: chair, horse or river?" -> "horse"    other triples

Everything is written here; nothing is taken from a data set. A fifth of the items are tested, and never trained
(of a pair of opposites, training may ask for the other one).
"""

import random
from typing import NamedTuple

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Norway": "Oslo", "Japan": "Tokyo",
    "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Peru": "Lima",
    "Russia": "Moscow", "China": "Beijing", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Belgium": "Brussels", "Canada": "Ottawa", "Cuba": "Havana",
    "Kenya": "Nairobi", "Thailand": "Bangkok", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Argentina": "Buenos Aires", "Chile": "Santiago", "Colombia": "Bogota", "England": "London",
    "Scotland": "Edinburgh", "South Korea": "Seoul",
    "Vietnam": "Hanoi", "Australia": "Canberra", "the United States": "Washington",
    "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia", "the Czech Republic": "Prague",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "left": "right", "day": "night", "open": "closed",
    "happy": "sad", "light": "dark", "old": "young", "rich": "poor", "full": "empty", "early": "late", "hard": "soft",
    "strong": "weak", "wet": "dry", "high": "low", "near": "far", "love": "hate", "win": "lose", "buy": "sell",
    "black": "white", "true": "false", "first": "last", "begin": "end", "above": "below", "inside": "outside",
    "question": "answer", "north": "south", "east": "west",
}  # fmt: skip
PLURALS = {
    "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women",
    "goose": "geese", "knife": "knives", "leaf": "leaves", "wolf": "wolves", "city": "cities", "box": "boxes",
    "dog": "dogs", "tree": "trees", "bus": "buses", "baby": "babies", "life": "lives", "potato": "potatoes",
    "house": "houses", "church": "churches",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
WORDS = {
    "animal": ("horse", "dog", "cat", "lion", "rabbit", "sheep", "tiger", "cow"),
    "fruit": ("apple", "banana", "pear", "cherry", "grape", "orange", "peach", "plum"),
    "tool": ("hammer", "saw", "shovel", "drill", "wrench", "axe", "rake", "pliers"),
    "piece of clothing": ("shirt", "coat", "hat", "glove", "sock", "scarf", "dress", "jacket"),
    "vehicle": ("car", "train", "bus", "truck", "bicycle", "ship", "airplane", "tractor"),
}
TESTED_SHARE = 0.2


class Item(NamedTuple):
    """One fact or task: questions that have the same answer."""

    kind: str
    questions: tuple[str, ...]
    answer: str


def all_items(rng: random.Random) -> list[Item]:
    """Returns the items of all kinds, in random order."""

    def item(kind: str, answer: str, *questions: str) -> Item:
        return Item(kind, questions, answer)

    items = []
    for country, city in CAPITALS.items():
        items.append(item("capital", city, f"What is the capital of {country}?", f"Name the capital of {country}."))
    for word, opposite in [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())]:
        questions = (f"What is the opposite of {word}?", f"Which word means the opposite of {word}?")
        items.append(item("opposite", opposite, *questions))
    for word, plural in PLURALS.items():
        items.append(item("plural", plural, f"What is the plural of {word}?", f"Write the plural of {word}."))
    for name, cycle in (("day", DAYS), ("month", MONTHS)):
        for one, other in zip(cycle, cycle[1:] + cycle[:1]):
            items.append(item("next", other, f"Which {name} comes after {one}?", f"Name the {name} after {one}."))
            items.append(item("next", one, f"Which {name} comes before {other}?", f"Name the {name} before {other}."))
    for a in range(1, 13):
        for b in range(1, 13):
            questions = (f"What is {a} plus {b}?", f"Add {a} and {b}.")
            items.append(item("arithmetic", str(a + b), *questions))
            if a >= b:
                items.append(item("arithmetic", str(a - b), f"What is {a} minus {b}?", f"Subtract {b} from {a}."))
    words = [word for group in WORDS.values() for word in group]
    for word in words:
        questions = (f"Write the word {word} in capital letters.", f'Change "{word}" to capital letters.')
        items.append(item("write", word.upper(), *questions))
        items.append(item("write", word, f"Repeat the word {word}.", f"Say {word}."))
    for kind, group in WORDS.items():
        others = [word for other, words in WORDS.items() if other != kind for word in words]
        for word in group:
            for _ in range(3):
                choices = [word, *rng.sample(others, 2)]
                rng.shuffle(choices)
                a, b, c = choices
                article = "an" if kind[0] in "aeiou" else "a"
                name = f"{article} {kind}"
                questions = (f"Which is {name}: {a}, {b} or {c}?", f"{a}, {b}, {c}: which is {name}?")
                items.append(item("choose", word, *questions))
    rng.shuffle(items)
    return items


def split_items(rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Returns the items to train on and those to test: of each kind a share of TESTED_SHARE."""
    items = all_items(rng)
    trained, tested = [], []
    for kind in sorted({item.kind for item in items}):
        of_kind = [item for item in items if item.kind == kind]
        n = round(TESTED_SHARE * len(of_kind))
        tested += of_kind[:n]
        trained += of_kind[n:]
    return trained, tested
