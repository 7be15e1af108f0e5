"""Counts how many statements of a model's captions are true, for the scenes of data/tiny, data/shapes and data/smollm.

    python evaluate.py --data data/tiny/test_captions.json --out captions.jsonl
    python -m tools.check_captions captions.jsonl

A caption is a list of statements, "a big red circle top left, a small blue bar bottom middle, the word B A G.": one per
object, and one about the word. The sentences of data/smollm are first reduced to this form. A statement is true if the
scene's own caption has it. Each of its parts (size, color, shape, place) is also compared with the object at the stated
place.
"""

from command import ArgumentParser, run, user_errors

import json
import re
from collections import Counter
from pathlib import Path

from common.files import reading
from data.shapes.prepare import COLORS, COLUMNS, MORE_COLORS, RADIUS, ROWS, SHAPES
from data.smollm.scenes import CAPTIONS

OBJECT = re.compile(
    rf"a (?P<size>{'|'.join(RADIUS)}) (?P<color>{'|'.join(COLORS | MORE_COLORS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?P<place>(?:{'|'.join(ROWS)}) (?:{'|'.join(COLUMNS)}))"
)
WORD = re.compile(r"the word (?P<word>[A-Z](?: [A-Z])*)")


def statements(caption: str) -> list[str]:
    for sentence in CAPTIONS:
        caption = caption.strip().removeprefix(sentence.split("{}")[0])
    caption = caption.replace(" and the word", ", the word")
    caption = re.sub(r"at the (top|bottom) (?:in the )?(left|middle|right)", r"\1 \2", caption)
    return [statement.strip() for statement in caption.rstrip(".").split(",") if statement.strip()]


def by_place(caption: str) -> dict[str, dict[str, str]]:
    """The objects of a caption, by their place."""
    matches = [OBJECT.fullmatch(statement) for statement in statements(caption)]
    return {match["place"]: match.groupdict() for match in matches if match}


def count(answer: str, truth: str, counts: Counter) -> None:
    """Compares a caption with the scene's own. Adds to counts[name] and counts[name, "true"]."""

    def add(name: str, is_true: bool) -> None:
        counts[name] += 1
        counts[name, "true"] += is_true

    stated, true = statements(answer), statements(truth)
    objects = by_place(truth)
    for statement in stated:
        match = OBJECT.fullmatch(statement)
        if match:
            add("statements about objects", statement in true)
            add("their places: something is there", match["place"] in objects)
            if actual := objects.get(match["place"]):
                for part in ("size", "color", "shape"):
                    add(f"their {part}, if something is there", match[part] == actual[part])
        elif WORD.fullmatch(statement):
            add("statements about the word", statement in true)
        else:
            add("other statements (counted as false)", False)
        add("all statements", statement in true)
    for statement in true:
        add("true statements that were made", statement in stated)
    add("captions: all true and complete", sorted(stated) == sorted(true))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path, help="--out of evaluate.py")
    args = parser.parse_args()
    counts: Counter = Counter()
    with user_errors():
        with reading(args.answers):
            for line in args.answers.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                count(row["answer"], row["truth"], counts)
        if not counts:
            raise ValueError(f"{args.answers}: there are no answers")
    for name in sorted(name for name in counts if isinstance(name, str)):
        n_true, n = counts[name, "true"], counts[name]
        print(f"{name:<36} {n_true:>7,} of {n:>7,}  {100 * n_true / n:.2f} %")


if __name__ == "__main__":
    run(main)
