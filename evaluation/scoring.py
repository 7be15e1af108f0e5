"""From answers to scores, and from the scores of all questions to a benchmark's official numbers.

    answers, questions --score------> one score per answer, 0 to 1 (CIDEr: to 10), None where there is no truth
    results            --summarize--> {"accuracy": 64.5 % of 500 answers, 60.2 to 68.6, ...}   (Number, metrics.py)

A split whose truth is not published gets scores of None, and its summary is the number of answers.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import fmean

from evaluation.metrics import Number, cider, mme_scores, percent, pope_scores, vqa_accuracy
from evaluation.question import Question, Results

Score = Callable[[list[str], list[Question]], list[float | None]]

MMBENCH_ROTATION = 1_000_000  # what each rotation of the options adds to a question's index
MME_CATEGORIES = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}

# --- score: answers to scores ----------------------------------------------------------------------------------------


def score_each(score_one: Callable[[str, object], float | None]) -> Score:
    """Makes a Score from a function of one answer and its truth. Without a truth the score is None."""

    def score(answers: list[str], questions: list[Question]) -> list[float | None]:
        pairs = zip(answers, (question.truth for question in questions), strict=True)
        return [None if truth is None else score_one(answer, truth) for answer, truth in pairs]

    return score


def is_exact_match(answer: str, truth: str) -> bool:
    """Compares two answers, ignoring case, surrounding whitespace and one final full stop."""
    return normalize_case(answer) == normalize_case(truth)


def normalize_case(answer: str) -> str:
    return answer.strip().lower().removesuffix(".")


def find_letter(answer: str) -> str:
    """Returns the option that an answer names: "B" for "B", "(B)", "B. a cat", "The answer is B"; "" for "A cat".

    MMBench's own script continues by matching the options' text and by asking ChatGPT, so answers without a letter
    may score higher there.
    """
    match = re.match(r"\W*([A-E])(?![-'’]?\w)(?!\s+\w)", answer)
    match = match or re.search(r"(?i:answer is|answer:|option)\s*\(?([A-E])\b", answer)
    return match[1] if match else ""


def find_letter_in_sentence(answer: str) -> str:
    """Finds a letter where find_letter does not: "The correct option is B", "正确答案是B", "选B", "B选项"."""
    english = r"(?i:\b(?:answer|option|choice)(?: (?:is|would be|should be))?(?: (?:option|choice))?)"
    chinese = r"(?:答案|选项|选择|选)(?:应该|应)?(?:是|为)?(?:选项|选)?"
    match = re.match(r"\W*([A-E])(?=\s*(?:选项|是|项|，|。))", answer)
    match = match or re.search(rf"(?:{english}|{chinese})[\s:：(（\"'“*]*([A-E])(?![-'’]?[A-Za-z0-9])", answer)
    return find_letter(answer) or (match[1] if match else "")


def find_yes_or_no(answer: str) -> str:
    """Returns MME's reading of an answer: "yes" or "no" if it is in the first four characters, else ""."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else ""


def is_affirmative(answer: str) -> bool:
    """Returns POPE's reading of an answer: yes, unless the first sentence contains the word no or not."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


vqa_score = score_each(vqa_accuracy)
exact_match_score = score_each(lambda answer, truth: float(is_exact_match(answer, truth)))
letter_score = score_each(lambda answer, truth: float(find_letter(answer) == truth))
loose_letter_score = score_each(lambda answer, truth: float(find_letter_in_sentence(answer) == truth))
choice_score = score_each(lambda answer, truth: float(answer == truth))
mme_score = score_each(lambda answer, truth: float(find_yes_or_no(answer) == truth))
pope_score = score_each(lambda answer, truth: float(is_affirmative(answer) == (truth == "yes")))


def caption_score(answers: list[str], questions: list[Question]) -> list[float]:
    """Returns the CIDEr of each caption, which depends on the references of all questions."""
    return cider(answers, [question.truth for question in questions])[1]


# --- summarize: results to official numbers --------------------------------------------------------------------------


def mean_accuracy(results: Results) -> dict[str, Number]:
    """Returns the mean score, and the mean of each group if there are several."""
    groups = defaultdict(list)
    for question, _, score in results:
        if score is not None:
            groups[question.group].append(score)
    if not groups:
        return count_answers(results, "answers without a published truth")
    numbers = {"accuracy": percent(sum(map(sum, groups.values())), sum(map(len, groups.values())))}
    if len(groups) > 1:
        numbers |= {f"accuracy, {group}": percent(sum(groups[group]), len(groups[group])) for group in sorted(groups)}
    return numbers


def mmbench_question(question: Question) -> int:
    """Returns the number that a question has in common with the rotations of its options."""
    return int(question.id) % MMBENCH_ROTATION


def mme_image(question: Question) -> str:
    """Returns the category and image that MME's two questions have in common (see read_mme)."""
    return question.id.rpartition("/")[0]


def circular_accuracy(results: Results) -> dict[str, Number]:
    """MMBench: a question counts as right if the answers to all rotations of its options are right."""
    if any(score is None for _, _, score in results):
        return mean_accuracy(results)  # the server groups the rotations
    rotations = defaultdict(list)
    for result in results:
        rotations[mmbench_question(result[0])].append(result)
    return mean_accuracy([min(group, key=lambda result: result[2]) for group in rotations.values()])


def mean_cider(results: Results) -> dict[str, Number]:
    return {"CIDEr": Number(100 * fmean(score for _, _, score in results), len(results), unit="")}


def mme_summary(results: Results) -> dict[str, Number]:
    """acc counts questions, acc+ counts images with both questions right; a part's points are the sum of both."""
    scores = mme_scores([(question.group, question.images[0], score == 1) for question, _, score in results])
    numbers = {}
    n_asked = Counter(question.group for question, _, _ in results)
    for part, categories in MME_CATEGORIES.items():
        categories = [category for category in categories if category in scores]
        points = sum(scores[category]["score"] for category in categories)
        n = sum(n_asked[category] for category in categories)
        numbers[part] = Number(points, n, unit="points", maximum=200 * len(categories))
        for category in categories:
            n = n_asked[category]
            numbers[f"{part}, {category} acc"] = percent(scores[category]["acc"] * n, n)
            numbers[f"{part}, {category} acc+"] = percent(scores[category]["acc_plus"] * (n // 2), n // 2)
    return numbers


def pope_summary(results: Results) -> dict[str, Number]:
    """Returns POPE's scores for each of its three ways of sampling absent objects, and first their averages.

    The averages have no interval: the three files share images and questions, so their answers are not independent.
    """
    files: dict[str, dict[str, Number]] = {}
    for group in sorted({question.group for question, _, _ in results}):
        asked = [(question, answer) for question, answer, _ in results if question.group == group]
        predicted = [is_affirmative(answer) for _, answer in asked]
        truth = [question.truth == "yes" for question, _ in asked]
        n_of = {"precision": sum(predicted), "recall": sum(truth)}  # the others: of all questions
        files[group] = {
            name: Number(100 * score, len(asked)) if name == "f1" else percent(score * n, n)
            for name, score in pope_scores(predicted, truth).items()
            for n in [n_of.get(name, len(asked))]
        }
    numbers = {}
    if len(files) > 1:
        for name in next(iter(files.values())):
            numbers[f"{name}, average"] = Number(fmean(file[name].value for file in files.values()), len(results))
    return numbers | {f"{name}, {group}": number for group, file in files.items() for name, number in file.items()}


def count_answers(results: Results, name: str = "answers for people to rate") -> dict[str, Number]:
    """Returns the number of answers, where there is no other: OwlEval's are rated by people, from A to D."""
    return {name: Number(len(results), len(results), unit="answers")}
