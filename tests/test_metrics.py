"""Scores and PTB tokens are equal to those of the official evaluations."""

import json
import time

import pytest

from conftest import GOLDEN
from evaluation.metrics import cider, mme_scores, normalize_answer, percent, vqa_accuracy, wilson_interval
from evaluation.ptb_tokenizer import ptb_tokens

VQA = [json.loads(line) for line in (GOLDEN / "evaluate" / "vqa_accuracy.jsonl").read_text("utf-8").splitlines()]
CIDER = json.loads((GOLDEN / "evaluate" / "cider.json").read_text("utf-8"))
CASES = CIDER["cases"]


def test_vqa_accuracy_equals_the_official_one():
    assert len(VQA) == 300 and len({case["accuracy"] for case in VQA}) == 5
    for case in VQA:
        accuracy = vqa_accuracy(case["answer"], case["ground_truths"])
        assert accuracy * 100 == pytest.approx(case["accuracy"], abs=1e-9), case


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The  Two\ndogs!", "2 dogs"),
        ("dont", "don't"),
        ("1,000/5", "10005"),  # thousands separator: no sign becomes a space
        ("black/white 3.5 m.", "black white 3.5 m"),
        ("." * 33, "."),  # at most 32 full stops are removed
    ],
)
def test_normalize_answer(answer, normal):
    assert normalize_answer(answer) == normal


def test_ground_truths_are_normalized_only_if_they_differ():
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0.0
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["coat"]) == 1.0
    assert vqa_accuracy("the Dog", ["Dog"] * 9 + ["cat"]) == 0.0  # ground truths keep their case


def test_ptb_tokens_equal_the_official_ones():
    captions = [case["hypothesis"] for case in CASES]
    assert [" ".join(tokens) for tokens in ptb_tokens(captions)] == [case["tokens"] for case in CASES]
    references = [text for case in CASES for text in case["references"]]
    expected = [tokens for case in CASES for tokens in case["reference_tokens"]]
    assert [" ".join(tokens) for tokens in ptb_tokens(references)] == expected


# Output of Stanford's tokenizer 3.4.1 for each line, without the punctuation that pycocoevalcap removes.
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
def test_ptb_tokens_of_a_caption(caption):
    assert " ".join(ptb_tokens([caption])[0]) == TOKENIZED[caption]


def test_full_stop_after_a_last_letter_depends_on_the_next_caption():
    captions = ["A dog on a.", "A cat on a.", "two cats on a.", "", "The end"]
    assert [words[-1:] for words in ptb_tokens(captions)] == [["a"], ["a."], ["a"], [], ["end"]]


def test_line_breaks_within_a_caption_do_not_split_it():
    captions = ["one\ntwo", "three\rfour\u2028five\x85six\vseven", "", " ", "...", "\ud800", "eight"]
    assert ptb_tokens(captions) == [["one", "two"], "three four five six seven".split(), [], [], [], [], ["eight"]]


ADVERSARIAL = ["a,", "a", "<a ", "(", "'", "@a", "1:", "a-", "www.a.", "\\*", "/a", "é'", "&", "A&", "u.s.-"]


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_tokenizing_takes_linear_time(text):
    start = time.perf_counter()
    ptb_tokens([text * 5000])
    assert time.perf_counter() - start < 2


def test_cider_equals_the_official_one():
    corpus, per_case = cider([case["hypothesis"] for case in CASES], [case["references"] for case in CASES])
    assert len(per_case) == len(CASES) == 60
    assert per_case == pytest.approx([case["cider"] for case in CASES], abs=1e-9, rel=0)
    assert corpus == pytest.approx(CIDER["cider"], abs=1e-9, rel=0)


def test_cider_by_hand():
    """One of two words is shared by hypothesis and reference; both have the weight log 3. No bigram is shared."""
    _, per_case = cider(["red dog", "x", "y"], [["red cat"], ["p"], ["q"]])
    assert per_case == pytest.approx([10 * (1 / 2) / 4, 0.0, 0.0])


def test_cider_is_zero_for_one_image_and_for_empty_captions():
    assert cider(["a red dog"], [["a red dog"]]) == (0.0, [0.0])
    assert cider(["", "!?.", "a dog"], [["a cat"], ["two birds"], ["a dog"]])[1][:2] == [0.0, 0.0]
    assert cider(["a cat", "x"], [["", "..."], ["y"]]) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize(
    "function, arguments",
    [
        (vqa_accuracy, ("3", [])),
        (vqa_accuracy, ("3", "3333333333")),
        (ptb_tokens, ("a dog",)),
        (cider, ([], [])),
        (cider, (["a", "b"], [["a"]])),
        (cider, (["a", "b"], [["a"], []])),
        (mme_scores, ([("color", "1", True)],)),
    ],
)
def test_wrong_arguments_raise_value_error(function, arguments):
    with pytest.raises(ValueError):
        function(*arguments)


# --- Wilson's interval ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_right, n", [(0, 10), (1, 10), (5, 24), (500, 1000), (10, 10)])
def test_wilson_interval_holds_the_shares_that_a_score_test_does_not_reject(n_right, n):
    """Its ends are the two shares from which the measured one is exactly 1.96 standard errors away."""
    low, high = wilson_interval(n_right / n, n)
    assert 0 <= low <= n_right / n <= high + 1e-15 <= 1 + 1e-15
    for end in (low, high)[n_right == 0 : 1 + (n_right < n)]:  # without the ends 0 and 1
        assert abs(n_right / n - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, abs=1e-9)
    assert (low == 0) == (n_right == 0) and (high > 1 - 1e-15) == (n_right == n)


def test_percent():
    number = percent(5, 24)
    assert str(number) == "20.83 % (9.24 to 40.47)" and number.n == 24
    assert percent(0, 0).interval == (0, 100) and str(percent(0.9 + 0.3, 2)).startswith("60.00 %")
