"""The scores: as the official evaluations gave them, word for word where they cut words, and for hostile input."""

import json
import math
import time

import pytest

from conftest import GOLDEN
from metrics import CONTRACTIONS, cider, mme_scores, normalise_answer, pope_scores, ptb_tokens, vqa_accuracy

VQA = [json.loads(line) for line in (GOLDEN / "evaluate" / "vqa_accuracy.jsonl").read_text("utf-8").splitlines()]
CIDER = json.loads((GOLDEN / "evaluate" / "cider.json").read_text("utf-8"))
CASES = CIDER["cases"]


def test_vqa_accuracy_is_the_official_one():
    assert len(VQA) == 300 and len({case["accuracy"] for case in VQA}) == 5
    for case in VQA:
        accuracy = vqa_accuracy(case["answer"], case["ground_truths"])
        assert accuracy * 100 == pytest.approx(case["accuracy"], abs=1e-9), case


@pytest.mark.parametrize("n, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_each_person_is_left_out_once(n, accuracy):
    assert vqa_accuracy("a Dog.", ["dog"] * n + ["cat"] * (10 - n)) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("", ""),
        ("The  Two\ndogs!", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("1,000/5", "10005"),  # a comma of thousands: no sign leaves a space
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("3.5 m.", "3.5 m"),
        ("9:30", "9:30"),
        ("Im", "im"),
        ("an a the", ""),
        ("." * 33, "."),  # no more than 32 full stops go
    ],
)
def test_normalise_answer(answer, normal):
    assert normalise_answer(answer) == normal


def test_people_are_normalised_only_where_they_disagree():
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0.0
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["coat"]) == 1.0
    assert vqa_accuracy("the Dog", ["Dog"] * 9 + ["cat"]) == 0.0  # their capitals stay
    assert vqa_accuracy("", [""] * 10) == 1.0
    assert vqa_accuracy("dog", ["dog"]) == 0.0  # nobody else is left to agree


def test_contractions_can_be_found():
    assert all(word == word.lower() for word in CONTRACTIONS)


def test_words_are_those_of_the_official_tokenizer():
    assert [" ".join(words) for words in ptb_tokens([case["hypothesis"] for case in CASES])] == [
        case["tokens"] for case in CASES
    ]
    assert [" ".join(words) for words in ptb_tokens([text for case in CASES for text in case["references"]])] == [
        tokens for case in CASES for tokens in case["reference_tokens"]
    ]


# What Stanford's tokenizer 3.4.1 gave for these, each on a line of its own, less pycocoevalcap's punctuation.
TOKENIZED = {
    "He's sure they don't, can’t, won't; it’s y'all's": "he 's sure they do n't ca n't wo n't it 's y' all 's",
    "Cannot, gonna, gotta, lemme, gimme, wanna": "can not gon na got ta lem me gim me wan na",
    "'tis rock 'n' roll in the '90s, the dogs' bowl": "'t is rock 'n' roll in the '90s the dogs bowl",
    "O'Neil's o'clock ma'am c'mon 'em": "o'neil 's o'clock ma'am c'mon 'em",
    "a sign reads \"STOP\", 'GO' and “quoted” ‘single’ 'red'": "a sign reads stop go and quoted single red",
    "[a] {b} (c)": "-lsb- a -rsb- -lcb- b -rcb- -lrb- c -rrb-",
    "snow-covered, half-eaten -- 7-year-old x-ray - ----- end": "snow-covered half-eaten 7-year-old x-ray ----- end",
    "wait... what…now.... Wow!! really?! yes! no?": "wait what now wow !! really ?! yes no",
    "black/white and/or w/ a 1/2 cup, 5 7/8 in.": "black/white and/or w / a 1/2 cup 5 7/8 in",
    "3-1/2 2½ ⅔": "3-1/2 2 1/2 2/3",
    "1,000,000 3.14 .5 -5 10:30 10:30pm 20ft 6'2\" 3x4 1st": "1,000,000 3.14 .5 -5 10:30 10:30 pm 20ft 6 2 3x4 1st",
    "$5.50 US$5 £5 €5 5¢ 50% #1 #tag @you": "$ 5.50 us$ 5 # 5 $ 5 5 cents 50 % # 1 #tag @you",
    "Mr. Smith, St. Louis, U.S. p.m. e.g. i.e., etc., Jr. Dr. No. 5 no.": "mr. smith st. louis u.s. p.m. e.g. i.e. "
    "etc. jr. dr. no. 5 no",
    "mail bob@x.com or http://a.org/b_c?d=e, www.foo.org.": "mail bob@x.com or http://a.org/b_c?d=e www.foo.org",
    "AT&T R&B black&white salt & pepper B&amp;W M&M's": "at&t r&b black & white salt & pepper b&w m&m 's",
    "Café naïve Über-cool 中文 русский": "café naïve über-cool 中文 русский",
    "emoji 😀 ☕ ★ 20°C ™ m²": "emoji ☕ ★ 20 ° c ™ m ²",
    "a\tb\u00a0c\u3000d\u200be\xadf  g": "a b c d ef g",
    "end.Start of a.b x!y c# C++ <unk> <3": "end.start of a.b x!y c# c++ <unk> < 3",
    ":-) ;) call (555) 123-4567 or 555.123.4567": ":--rrb- ;-rrb- call -lrb-555-rrb- 123-4567 or 555.123.4567",
}


@pytest.mark.parametrize("caption", TOKENIZED)
def test_words_of_a_caption(caption):
    assert " ".join(ptb_tokens([caption])[0]) == TOKENIZED[caption]


def test_the_next_caption_decides_about_a_last_letter():
    captions = ["A dog on a.", "A cat on a.", "two cats on a.", "", "The end"]
    assert [words[-1:] for words in ptb_tokens(captions)] == [["a"], ["a."], ["a"], [], ["end"]]


def test_every_caption_has_its_line():
    captions = ["one\ntwo", "three\rfour\u2028five\x85six\vseven", "", " ", "...", "\ud800", "eight"]
    assert ptb_tokens(captions) == [["one", "two"], "three four five six seven".split(), [], [], [], [], ["eight"]]


HOSTILE = ["a,", "a", "a.", "<a ", "(", "'", "@a", "a@", "1:", "a-", "www.a.", "\\*", "/a", "é'", "&", "A&", "u.s.-"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_captions_take_no_time(text):
    start = time.perf_counter()
    ptb_tokens([text * 5000])
    assert time.perf_counter() - start < 2


def test_cider_is_the_official_one():
    corpus, per_case = cider([case["hypothesis"] for case in CASES], [case["references"] for case in CASES])
    assert len(per_case) == len(CASES) == 60
    assert per_case == pytest.approx([case["cider"] for case in CASES], abs=1e-9, rel=0)
    assert corpus == pytest.approx(CIDER["cider"], abs=1e-9, rel=0)


def test_identical_captions_score_ten():
    captions = ["a red dog runs quickly", "the blue cat sleeps here", "two green birds sing songs"]
    corpus, per_case = cider(captions, [[caption] for caption in captions])
    assert per_case == pytest.approx([10.0] * 3) and corpus == pytest.approx(10.0)
    _, shuffled = cider(captions[1:] + captions[:1], [[caption] for caption in captions])
    assert shuffled == [0.0] * 3


def test_cider_by_hand():
    """One shared word of two, in three images: its weight is log 3, as is the other's; no pair of words is shared."""
    _, per_case = cider(["red dog", "x", "y"], [["red cat"], ["p"], ["q"]])
    assert per_case == pytest.approx([10 * (1 / 2) / 4, 0.0, 0.0])
    _, twice = cider(["red red red", "x", "y"], [["red cat"], ["p"], ["q"]])  # clipped, and one pair of words longer
    assert twice[0] == pytest.approx(10 * (1 / (3 * math.sqrt(2))) / 4 * math.exp(-1 / 72))


def test_cider_of_one_image_is_zero():
    assert cider(["a red dog"], [["a red dog"]]) == (0.0, [0.0])


def test_cider_of_empty_captions_is_zero():
    assert cider(["", "!?.", "a dog"], [["a cat"], ["two birds"], ["a dog"]])[1][:2] == [0.0, 0.0]
    assert cider(["a cat", "x"], [["", "..."], ["y"]]) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: vqa_accuracy(3, ["3"]), "an answer should be text, not int"),
        (lambda: vqa_accuracy("3", []), "the ground truths should be a list of texts, and not empty"),
        (lambda: vqa_accuracy("3", "3333333333"), "the ground truths should be a list of texts, and not empty"),
        (lambda: vqa_accuracy("3", ["3", None]), "each of the ground truths should be text, not NoneType"),
        (lambda: ptb_tokens("a dog"), "the captions should be a list of texts, and not empty"),
        (lambda: cider([], []), "the captions should be a list of texts, and not empty"),
        (lambda: cider(["a", b"b"], [["a"], ["b"]]), "each of the captions should be text, not bytes"),
        (lambda: cider(["a", "b"], [["a"]]), "there are 2 captions, and references for 1"),
        (lambda: cider(["a"], "a"), "the references should be a list of lists of texts"),
        (lambda: cider(["a", "b"], [["a"], "b"]), "the references of caption 1 should be a list of texts"),
        (lambda: cider(["a", "b"], [["a"], []]), "the references of caption 1 should be a list of texts"),
        (lambda: cider(["a"], [[1]]), "each of the references of caption 0 should be text, not int"),
        (lambda: pope_scores([True], []), "as many answers as questions, and some: 1, 0"),
        (lambda: pope_scores([], []), "as many answers as questions, and some: 0, 0"),
        (lambda: pope_scores(3, [True]), "answers and truths should be lists"),
        (lambda: pope_scores(["yes"], [True]), "answers and truths should be True or False"),
        (lambda: mme_scores([]), "there are no answers to score"),
        (lambda: mme_scores([("color", "1", "yes")]), "whether an answer was right should be True or False, not 'yes'"),
        (lambda: mme_scores([("color", "1", True)]), "image 1 of category color should have 2 questions, not 1"),
    ],
)
def test_mistakes_are_one_sentence(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_pope_scores():
    scores = pope_scores([True, True, True, False, False], [True, True, False, True, False])
    assert scores == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    )
    never = {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    assert pope_scores([False, False], [True, False]) == never


def test_mme_scores():
    rows = [("color", "1", True), ("color", "2", True), ("color", "1", True), ("color", "2", False)]
    scores = mme_scores([*rows, ("count", "1", False), ("count", "1", True)])
    assert scores == {
        "color": {"acc": 0.75, "acc_plus": 0.5, "score": 125.0},
        "count": {"acc": 0.5, "acc_plus": 0.0, "score": 50.0},
    }
