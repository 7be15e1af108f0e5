"""A question of a benchmark, as the readers produce it and the runner asks it."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

ImageSource = str | bytes  # a path below the benchmark's folder, or the content of an image file


@dataclass
class Question:
    """One question, ready for render_prompt of data/text.py."""

    id: str  # unique in its benchmark
    prompt: str  # the user's message, with an <image> for each image and without "USER:"
    images: list[ImageSource]
    truth: object = None  # what the benchmark's score compares with; None: the truth is not published
    group: str = ""  # subset that is also summarized on its own
    choices: list[str] | None = None  # the most probable one is the answer; None: the answer is generated
    shots: list[str] = field(default_factory=list)  # worked examples in the prompt, in order
    before: list[str] = field(default_factory=list)  # ids of the conversation's earlier questions, in order
    space: bool = False  # whether Owl2's prompt ends with a space, as in most of the released evaluation scripts

    def with_fewer_shots(self) -> "Question":
        """Returns the question without its last worked example, for a prompt that exceeds the context."""
        before, _, after = self.prompt.rpartition(self.shots[-1])
        return replace(self, prompt=before + after, shots=self.shots[:-1])


Results = list[tuple[Question, str, float | None]]  # question, answer, score


def first_question(question: Question) -> str:
    """Returns the id of the conversation's first question."""
    return question.before[0] if question.before else question.id


def limit_questions(questions: list[Question], n: int, unit_of: Callable[[Question], object]) -> list[Question]:
    """Returns n questions that are evenly spaced over the list, so that all groups are asked.

    Questions with the same unit_of, such as the turns of a conversation, stay together and count as one.
    """
    units = defaultdict(list)
    for question in questions:
        units[unit_of(question)].append(question)
    keys, n = list(units), min(n, len(units))
    kept = {keys[i * len(keys) // n] for i in range(n)}
    return [question for question in questions if unit_of(question) in kept]


def shuffle_images(questions: list[Question], seed: int) -> list[Question]:
    """Returns the questions with their images permuted. Equal seeds give equal permutations."""
    sources = {source for question in questions for source in question.images}
    sources = sorted(sources, key=lambda source: (isinstance(source, bytes), source))
    permuted = list(sources)
    random.Random(seed).shuffle(permuted)
    new_source = dict(zip(sources, permuted))
    return [replace(question, images=[new_source[source] for source in question.images]) for question in questions]
