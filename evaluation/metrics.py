"""Scores of the benchmarks, computed as their official evaluations compute them.

    answer    --normalize_answer--> compared with ten people's answers --> VQA accuracy   vqa_accuracy
    captions  --ptb_tokens--------> n-grams of 1 to 4 words, tf-idf -----> CIDEr-D        cider
    yes or no ----------------------------------------------------------> POPE, MME      pope_scores, mme_scores
    a share of n answers ------------------------------------------------> its interval   wilson_interval

Published numbers are comparable only if every detail is the official one, so details that look like mistakes are
intended: a full stop that depends on the next caption, a verbatim answer of ten people that counts as wrong.
Plain Python, without torch.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from evaluation.ptb_tokenizer import check_texts, ptb_tokens

# --- a number of a report --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A number of a report: 64.5 % of 500 answers, 1450.19 of 2000 points."""

    value: float
    n: int  # answers (or images, or questions with all their rotations) that it is computed from
    unit: str = "%"
    maximum: float | None = None  # where the unit does not imply it
    interval: tuple[float, float] | None = None  # 95 % confidence interval, in the same unit

    def __str__(self) -> str:
        value = f"{self.value:,}" if isinstance(self.value, int) else f"{self.value:,.2f}"
        maximum = f" of {self.maximum:,}" if self.maximum else ""
        interval = f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval else ""
        return f"{value}{maximum} {self.unit}".rstrip() + interval


def percent(total: float, n: int) -> Number:
    """Returns total / n in percent with its Wilson interval. total: the sum of n scores of 0 to 1."""
    low, high = wilson_interval(total / n, n) if n else (0.0, 1.0)
    return Number(100 * total / n if n else 0.0, n, interval=(100 * low, 100 * high))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of a share of n independent answers, both 0 to 1.

    Unlike the normal approximation it is not empty at 0 and 1. For scores between 0 and 1 (VQA accuracy), whose
    variance is at most that of right and wrong answers of the same mean, it is wider than necessary.
    """
    z = 1.959964  # 97.5 % of a normal distribution lie below
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


# --- VQA accuracy ----------------------------------------------------------------------------------------------------

NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
ANSWER_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The official evaluation's table without the entries for "I", which never match because words are looked up in lower
# case. Its quirks are kept: "somebody'd" loses its apostrophe; "let's" and "she's" map to themselves.
CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldve": "could've", "couldnt": "couldn't",
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "didnt": "didn't", "doesnt": "doesn't", "dont": "don't",
    "hadnt": "hadn't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "hasnt": "hasn't", "havent": "haven't",
    "hed": "he'd", "hed've": "he'd've", "he'dve": "he'd've", "hes": "he's", "howd": "how'd", "howll": "how'll",
    "hows": "how's", "isnt": "isn't", "itd": "it'd", "itd've": "it'd've", "it'dve": "it'd've", "itll": "it'll",
    "let's": "let's", "maam": "ma'am", "mightnt": "mightn't", "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've", "mightve": "might've", "mustnt": "mustn't", "mustve": "must've",
    "neednt": "needn't", "notve": "not've", "oclock": "o'clock", "oughtnt": "oughtn't", "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "shant": "shan't", "shed've": "she'd've", "she'dve": "she'd've",
    "she's": "she's", "shouldve": "should've", "shouldnt": "shouldn't", "shouldnt've": "shouldn't've",
    "shouldn'tve": "shouldn't've", "somebody'd": "somebodyd", "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've", "somebodyll": "somebody'll", "somebodys": "somebody's", "someoned": "someone'd",
    "someoned've": "someone'd've", "someone'dve": "someone'd've", "someonell": "someone'll", "someones": "someone's",
    "somethingd": "something'd", "somethingd've": "something'd've", "something'dve": "something'd've",
    "somethingll": "something'll", "thats": "that's", "thered": "there'd", "thered've": "there'd've",
    "there'dve": "there'd've", "therere": "there're", "theres": "there's", "theyd": "they'd", "theyd've": "they'd've",
    "they'dve": "they'd've", "theyll": "they'll", "theyre": "they're", "theyve": "they've", "twas": "'twas",
    "wasnt": "wasn't", "wed've": "we'd've", "we'dve": "we'd've", "weve": "we've", "werent": "weren't",
    "whatll": "what'll", "whatre": "what're", "whats": "what's", "whatve": "what've", "whens": "when's",
    "whered": "where'd", "wheres": "where's", "whereve": "where've", "whod": "who'd", "whod've": "who'd've",
    "who'dve": "who'd've", "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll",
    "whyre": "why're", "whys": "why's", "wont": "won't", "wouldve": "would've", "wouldnt": "wouldn't",
    "wouldnt've": "wouldn't've", "wouldn'tve": "wouldn't've", "yall": "y'all", "yall'll": "y'all'll",
    "y'allll": "y'all'll", "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
    "youd": "you'd", "youd've": "you'd've", "you'dve": "you'd've", "youll": "you'll", "youre": "you're",
    "youve": "you've",
}  # fmt: skip


def vqa_accuracy(answer: str, ground_truths: list[str]) -> float:
    """Returns the agreement of an answer with people's answers (usually ten), 0 to 1, as in VQAv2's evaluation.

    Each person is left out in turn; the answer then scores a third for each other person who gave it, at most 1.
    The answer is normalized completely. People's answers only lose their punctuation, and only if they differ from
    each other, so their capitals, articles and number words never match. Raises ValueError for anything but text.
    """
    check_texts([answer], "answer")
    check_texts(ground_truths, "ground_truths")
    if len(set(ground_truths)) > 1:
        ground_truths = [strip_punctuation(truth) for truth in ground_truths]
    answer = normalize_answer(answer)
    n_same = sum(truth == answer for truth in ground_truths)
    return sum(min(1.0, (n_same - (truth == answer)) / 3) for truth in ground_truths) / len(ground_truths)


def normalize_answer(answer: str) -> str:
    """Returns a model's answer as it is compared: lower case, digits for number words, no punctuation or articles."""
    words = strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """Removes punctuation. A sign becomes a space, unless it is next to a space anywhere in the text."""
    stripped = text
    has_thousands = re.search(r"\d,\d", text)  # "1,000": then no sign becomes a space
    for sign in ANSWER_PUNCTUATION:
        is_removed = has_thousands or sign + " " in text or " " + sign in text
        stripped = stripped.replace(sign, "" if is_removed else " ")
    # A full stop before a digit stays. At most 32 are removed: the official code passes re.UNICODE (32) as `count`.
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


# --- CIDEr-D ---------------------------------------------------------------------------------------------------------

MAX_N = 4
SIGMA = 6.0  # standard deviation of the length penalty, in words


def cider(hypotheses: list[str], references: list[list[str]]) -> tuple[float, list[float]]:
    """Returns CIDEr-D of one caption per image against people's captions: (mean, one score per image), 0 to 10.

    Papers report it times 100. An n-gram weighs more if fewer images have it in their references, so scores depend
    on the set of images; for a single image all weights are log(1 / 1) = 0. The order of the images hardly matters
    (ptb_tokens). Raises ValueError for unequal lengths, no images, an image without references, or anything but text.
    """
    check_texts(hypotheses, "hypotheses")
    if not isinstance(references, list | tuple) or len(references) != len(hypotheses):
        raise ValueError("references should have one list of captions per hypothesis")
    for texts in references:
        check_texts(texts, "each entry of references")

    # Count n-grams. All references are tokenized as one text, as in the official evaluation.
    counts = [count_ngrams(words) for words in ptb_tokens(hypotheses)]
    flat = iter(count_ngrams(words) for words in ptb_tokens([text for texts in references for text in texts]))
    reference_counts = [[next(flat) for _ in texts] for texts in references]

    # Inverse document frequency: a document is the set of an image's references.
    n_image_with = Counter(ngram for image in reference_counts for ngram in set().union(*image))
    idf = {ngram: math.log(len(hypotheses)) - math.log(n) for ngram, n in n_image_with.items()}
    unseen_idf = math.log(len(hypotheses))

    def weigh(counts: Counter) -> list[dict]:
        """Returns the tf-idf weights of the n-grams, one dictionary per n."""
        vectors: list[dict] = [{} for _ in range(MAX_N)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen_idf)
        return vectors

    scores = []
    for found, image in zip(counts, reference_counts, strict=True):
        vectors = weigh(found)
        similarities = [similarity(vectors, weigh(other)) * length_penalty(found, other) for other in image]
        scores.append(10.0 * sum(similarities) / len(image))
    return sum(scores) / len(scores), scores


def count_ngrams(words: list[str]) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def similarity(found: list[dict], wanted: list[dict]) -> float:
    """Returns the mean over n of the cosine similarity, with weights clipped to the reference's (the D of CIDEr-D)."""
    total = 0.0
    for x, y in zip(found, wanted, strict=True):
        norm = math.sqrt(sum(w * w for w in x.values())) * math.sqrt(sum(w * w for w in y.values()))
        if norm:
            total += sum(min(w, y[ngram]) * y[ngram] for ngram, w in x.items() if ngram in y) / norm
    return total / MAX_N


def length_penalty(found: Counter, wanted: Counter) -> float:
    """Returns a Gaussian penalty for a different length, measured in bigrams as in the official code."""
    n_found, n_wanted = (sum(n for ngram, n in counts.items() if len(ngram) == 2) for counts in (found, wanted))
    return math.exp(-((n_found - n_wanted) ** 2) / (2 * SIGMA**2))


# --- yes or no -------------------------------------------------------------------------------------------------------


def pope_scores(predicted: list[bool], truth: list[bool]) -> dict[str, float]:
    """Returns POPE's scores, 0 to 1, with yes (True) as the positive class. A ratio with denominator 0 is 0."""
    pairs = list(zip(predicted, truth, strict=True))
    n_right = sum(x == y for x, y in pairs)
    n_hit = sum(x and y for x, y in pairs)
    n_yes, n_true = sum(predicted), sum(truth)
    return {
        "accuracy": n_right / len(pairs),
        "precision": n_hit / n_yes if n_yes else 0.0,
        "recall": n_hit / n_true if n_true else 0.0,
        "f1": 2 * n_hit / (n_yes + n_true) if n_yes + n_true else 0.0,
        "yes_ratio": n_yes / len(pairs),
    }


def mme_scores(rows: list[tuple[str, str, bool]]) -> dict[str, dict[str, float]]:
    """Returns MME's scores by category. rows: (category, image, whether the answer is right), one per question.

    acc is the share of right answers, acc_plus the share of images with both answers right, both 0 to 1;
    score = 100 * (acc + acc_plus). Raises ValueError if an image does not have two questions in a category.
    """
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for category, image, is_right in rows:
        images[category][image].append(is_right)
    scores = {}
    for category, answers in images.items():
        for image, right in answers.items():
            if len(right) != 2:
                raise ValueError(f"image {image} of category {category} should have 2 questions, not {len(right)}")
        acc = sum(map(sum, answers.values())) / (2 * len(answers))
        acc_plus = sum(map(all, answers.values())) / len(answers)
        scores[category] = {"acc": acc, "acc_plus": acc_plus, "score": 100 * (acc + acc_plus)}
    return scores
