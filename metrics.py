"""The scores of the benchmarks: how right short answers are, how good captions, and what yes and no are worth.

    an answer ----normalise------------> compared with ten people's ----> VQA accuracy   vqa_accuracy
    captions  ----ptb_tokens--> words ----> n-grams of 1 to 4, weighted ----> CIDEr-D    cider
    yes or no --------------------------> counted ----------------------> POPE, MME      pope_scores, mme_scores

Papers compare their figures with each other's, so a score is worth having only if it is the official one, quirks and
all. What looks odd here (a full stop that stays because of the next caption, an answer that ten people gave word for
word and that counts as wrong) is what everybody's figures have been computed with. Plain Python, no torch.
"""

import math
import re
from collections import Counter, defaultdict

# ---- VQA accuracy -----------------------------------------------------------------------------------------------

NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
ANSWER_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# As the official evaluation has it: words are in lower case when they are looked up, so that no entry for "I" is ever
# found and none is here; "somebody'd" loses its apostrophe, and let's and she's stay themselves.
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
    """How far an answer agrees with people's (ten of them, usually), in 0..1, as VQAv2's official evaluation says.

    Each person in turn is left out, and the answer is worth a third for everyone else who gave it, up to 1. The
    answer is normalised in full; people's answers lose their punctuation, and only if they are not all the same. So
    people's capitals, articles and number words match no answer whatever: they are hardly found in the real data.
    ValueError, in one sentence, for what is not text or for no ground truth.
    """
    _check_text(answer, "an answer")
    _check_texts(ground_truths, "the ground truths")
    if len(set(ground_truths)) > 1:
        ground_truths = [strip_punctuation(truth) for truth in ground_truths]
    answer = normalise_answer(answer)
    n_same = sum(truth == answer for truth in ground_truths)
    return sum(min(1.0, (n_same - (truth == answer)) / 3) for truth in ground_truths) / len(ground_truths)


def normalise_answer(answer: str) -> str:
    """A model's answer as it is compared: no punctuation, lower case, digits for number words, no articles."""
    words = strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """Takes punctuation away: where it touches a space nothing takes its place, between words a space does."""
    stripped = text
    has_thousands = re.search(r"\d,\d", text)  # "1,000": then no sign anywhere leaves a space
    for sign in ANSWER_PUNCTUATION:
        closed_up = has_thousands or sign + " " in text or " " + sign in text
        stripped = stripped.replace(sign, "" if closed_up else " ")
    # Full stops stay before a digit. No more than 32 go: a flag's value stands where the official code counts.
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


# ---- Words of captions ------------------------------------------------------------------------------------------

# Pieces of the rules below. Letters are those of all scripts, but for superscripts and fractions, which Python counts.
SPACE = r" \t\xa0\u2000-\u200a\u3000"
LETTER = r"[^\W\d_²³¹¼-¾\u2070-\u209c\u2150-\u2189\u2460-\u24ff\U00010000-\U0010ffff]"
LETTERS = rf"(?:{LETTER}|[\xad\u0300-\u036f])"  # ... with soft hyphens and accents of their own
WORD = rf"{LETTERS}(?:{LETTERS}|\d)*"
WORDS = rf"{WORD}(?:[.!?]{WORD})*"  # one word without a space after the full stop: "end.The"
QUOTE = r"['’\x92]"
ANY_QUOTE = r"['’‘‛\x91\x92]"
CLITIC = rf"{QUOTE}(?:[msd]|re|ve|ll)"
NOT = rf"n{ANY_QUOTE}t"
PART = rf"(?:[dol]{ANY_QUOTE}(?:{LETTER}|\d))?(?:{LETTER}|\d)+"  # of a hyphenated word, maybe "d'Avignon"
HYPHENATED = rf"{PART}(?:[-_\u058a‐‑]{PART})*"
INITIALS = r"(?:U\.S\.-U\.K|(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|[a-z](?:\.[a-z])*)"  # "U.S", "p.m", "a"
DOTTED = rf"[a-z0-9][a-z0-9.,\xad]*(?:-(?:[a-z](?:\.[a-z])+\.|non-U\.S\.|[a-z0-9\xad]+))+"  # "U.S.-made"
FIRM = r"(?-i:[A-Z]+(?:[+&][A-Z]+)+)"  # "AT&T"
TAG_NAME = r"[a-z][a-z0-9_:.-]*"
TAG_VALUE = rf"""(?:'[^'\n]*'|"[^"\n]*"|{TAG_NAME})"""

ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    mr mrs ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt capt ste? pres lieut hon
    brig co?mdr pfc spc supts? det adj adv asst assoc ens insp mlle mme msgr sfc jr bros esq (?:ed|ph)\\.d ph
    ave blvd rd mt ft rt bldg dept alex wm jos cie vs cf etc al seq treas invt elec natl m[ft]g tel est ext sq
    inc cos? corp pp?t[ey]s? ltd plc bancorp bhd assn univ intl sys a\\.k\\.a
    ala ariz calif colo conn ct dak fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt wisc? wyo
    (?-i:A)rk (?-i:A)z (?-i:D)el (?-i:I)ll (?-i:L)a (?-i:M)ass (?-i:M)iss (?-i:O)re (?-i:P)a (?-i:T)ex (?-i:W)ash
""".split()

# After a single letter and a full stop, these begin a sentence, be it in the next caption.
SENTENCE_STARTS = """
    A About According Additionally After An As At But Did During Earlier He Her Here How However If In It Last Many
    More Mr\\. Ms\\. Now Once One Other Our She Since So Some Such That The Their Then There These They This We What
    When While Who Why Yet You
""".split()

# What a token may look like, and what has to follow it. The longest match wins, what follows counted in: of "don't",
# "do" with its "n't" (5) wins over "don" (3). Of equally long ones the first wins. A sign that no rule takes is no
# token: that is where most punctuation goes.
RULES = [
    # two words in one
    ("can", "not"),
    ("gon|wan", "na"),
    ("got", "ta"),
    ("lem|gim", "me"),
    ("'t", "is|was"),
    # words, and what an apostrophe makes of them
    (WORDS, ""),
    (r"[a-z\xad]*(?-i:[A-MO-Za-mo-z])\xad*", NOT),  # "do" of "don't"
    (CLITIC, r"[^a-z]"),
    (rf"{QUOTE}(?:n{QUOTE}?|em|till?|cause|[2-9]0s)|(?:[ldj]|ol|somethin|dunkin){QUOTE}", ""),
    (rf"{QUOTE}\d\d", rf"[{SPACE}\n]"),  # "'68"
    (rf"(?-i:[A-HJ-XZn]){ANY_QUOTE}{LETTER}{{2,}}", ""),  # "O'Neil"
    (rf"{LETTER}+[aeiouy]{ANY_QUOTE}(?-i:[aeiouA-Z]){LETTER}*", ""),  # "ma'am"
    (r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cap'n|c'est", ""),
    (rf"y{QUOTE}", LETTER),  # "y'all"
    # words with hyphens, slashes and signs
    (HYPHENATED, ""),  # "snow-covered"
    (DOTTED, ""),
    (r"pro-|anti-", ""),  # "pro- and anti-war"
    (r"[a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}", ""),  # "black/white"
    (FIRM, ""),  # "AT&T"
    (r"c\+\+|[cf]#", ""),
    # words with full stops
    (rf"(?:{'|'.join(ABBREVIATIONS)}|{INITIALS})\.", ""),
    ("[a-z]", rf"\.[{SPACE}\n]+(?-i:{'|'.join(SENTENCE_STARTS)})[{SPACE}\n]"),
    (r"(?:ca|figs?|prop|nos?|sect?s?|arts?|bldg|pp|op)\.", rf"[{SPACE}\n]?\d"),  # "No. 5"
    (rf"(?:{WORDS}|{HYPHENATED}|{DOTTED}|{FIRM})\.", r"[,;:、]"),
    # numbers
    (r"[-+]?(?:\d*(?:[.:,\xad]\d+)+|\d+)", ""),  # "1,000", "10:30", ".5"
    (r"(?:\d{1,4}-)?\d{1,4}[/⁄]\d{1,4}|[¼-¾⅓-⅞]", ""),
    (r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", ""),
    (r"\(\d{2,3}\)[ \xa0]?\d{3,4}[- \xa0]?\d{3,5}", ""),  # a telephone's
    (r"(?-i:[A-Z]*)\$|#|[¢-¥€\u20a0₤฿￠￡￥￦]", ""),
    # addresses, names, tags, smileys
    (r"""https?://[^\s"<>|(){}]+[^\s"<>|.!?(){},-]""", ""),
    (
        r"""(?:www\.(?:[^\s"<>|.!?(){},]+\.)+[a-z]{2,4}|(?:(?-i:[#%&*+a-z~\x7f-\U0010ffff])+\.)+(?:com|net|org|edu))"""
        r"""(?:/[^\s"<>|()]+[^\s"<>|.!?(){},-])?""",
        "",
    ),
    (r"""<?[a-z0-9][^\s"<>|(){}]*@(?:[^\s"<>|(){}.]+\.)*[^\s"<>|(){}.]+>?""", ""),
    (rf"@[a-z_][a-z_0-9]*|#{LETTERS}+", ""),
    (rf"<(?:[!?][a-z-][^>\n]*|{TAG_NAME}(?: +{TAG_NAME}(?: *= *{TAG_VALUE})?)* */?|/{TAG_NAME}) *>", ""),
    (r"&#\d+;", ""),
    (r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])", r"[^a-z0-9]"),
    (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)", ""),
    # signs
    (r"-+|\.{3,}|[?!]+|@+|_+|#+|\*+|(?:\\\*)+|<<?|>>?|[=/()\[\]{}¡¿。、]", ""),  # "?!" is one token, "((" two
    (r"'", rf"[a-z][^{SPACE}\n]"),  # opens a quotation: "'red'" has no "'re"
    (r"[`‘-‟\x91-\x94‹›«»]{1,2}|''", ""),  # "“" and "”" of "“STOP”"
    (rf"{CLITIC}|{NOT}", ""),  # "n't" of "don't"; "'s" where the text ends
    (  # each a token by itself: "%" of "5%", "°" of "20°C"
        r"[+%&~^|\\¦-©¬®-º×÷‖‗†-‣‰-‸※‾-⁂⁄⁺-ⁿ₊-₎\u2100-\u214f\u2190-\u2bff〒・！-／：-＠［-｀｛-･]",
        "",
    ),
]
RULES = [re.compile(f"({token})(?:{context})", re.IGNORECASE) for token, context in RULES]
# Most words of most captions, which need no rules.
PLAIN = re.compile(r"(?!(?:cannot|gonna|wanna|gotta|lemme|gimme)\b)[a-z]{2,}(?=[ \n])", re.IGNORECASE | re.ASCII)
LONGEST = 200  # characters of a token and what follows: hostile text must not take a time quadratic in its length

ENTITIES = {
    "&amp;": "&", "&quot;": '"', "&apos;": "'", "&lt;": "<", "&gt;": ">", "&nbsp;": " ", "&mdash;": "—", "&ndash;": "—",
}  # fmt: skip
RESPELT = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "---": "--", "----": "--",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$",
}  # fmt: skip
STRAIGHT = {
    **dict.fromkeys(map(ord, "‘‛‹\x91"), "`"), **dict.fromkeys(map(ord, "’›\x92"), "'"),
    **dict.fromkeys(map(ord, "“«\x93"), "``"), **dict.fromkeys(map(ord, "”»\x94"), "''"),
}  # fmt: skip
STRAIGHTENED = re.compile(rf"[`‘-‟\x91-\x94‹›«»]{{1,2}}|{CLITIC}|{NOT}", re.IGNORECASE)
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def ptb_tokens(captions: list[str]) -> list[list[str]]:
    """The words of each caption, lower-case and without punctuation, as the COCO caption evaluation cuts them.

    That is Stanford's Penn Treebank tokenizer of 2014, from whose tokens the usual punctuation is then taken out:
    "don't" is do n't, "cannot" can not, "dog's" dog 's; "snow-covered", "a/b", "10:30", "U.S." and "Mr." stay whole;
    brackets become -lrb- and -rrb- and stay (in capitals they would have gone), as "!!" does. Letters and signs of the
    Basic Multilingual Plane only: other emoji are no tokens.

    The captions are read as one text, a line each, and so must be given together and in order: the full stop of a
    last single letter ("... on a.") goes if the next caption begins a sentence ("A ...", "The ...").

    It is the same on captions and on plain English. It may differ where text is no language: smileys of East Asia,
    HTML's entities beyond the common ones, inside addresses or as brackets of tags, file names and versions of digits
    ("10.x"), "etc." and its like before a letter without a space, "S&P-500", dots with spaces before a number,
    numbers with hyphens after a number, rare signs, tokens beyond 200 characters.
    ValueError, in one sentence, for what is not a list of texts.
    """
    _check_texts(captions, "the captions")
    lines = [re.sub(r"[\n\v\f\r\x85\u2028\u2029]", " ", caption) for caption in captions]
    text = re.sub("|".join(ENTITIES), lambda match: ENTITIES[match[0].lower()], "\n".join(lines), flags=re.IGNORECASE)
    words: list[list[str]] = [[]]
    i = 0
    while i < len(text):
        if text[i] == "\n":
            words.append([])
        if plain := PLAIN.match(text, i, i + LONGEST):
            token = plain[0]
            words[-1].append(token.lower())
        else:
            matches = [match for rule in RULES if (match := rule.match(text, i, i + LONGEST))]
            token = max(matches, key=re.Match.end)[1] if matches else ""
            words[-1] += _spelt(token)
        i += max(1, len(token))
    return words


def _spelt(token: str) -> list[str]:
    """The words that a token counts as: one, or none for punctuation, or several for one with spaces."""
    if STRAIGHTENED.fullmatch(token):
        token = token.translate(STRAIGHT)
    elif token.startswith("..."):
        token = "..."
    elif token in RESPELT:
        token = RESPELT[token]
    elif not token.startswith("<"):
        token = token.replace("\xad", "").replace("(", "-lrb-").replace(")", "-rrb-")
    return [] if token in DROPPED else token.lower().split()


# ---- CIDEr-D ----------------------------------------------------------------------------------------------------

MAX_N = 4
SIGMA = 6.0  # words by which a length may be off before it costs much


def cider(hypotheses: list[str], references: list[list[str]]) -> tuple[float, list[float]]:
    """CIDEr-D of captions, one for each image, against people's: (the mean, each image's), from 0 to 10.

    Papers write it times 100. An n-gram weighs the more, the fewer images' references have it: scores are those of
    this set of images, and with one image all weights are log(1 / 1) = 0, and so is the score. The order of the
    images matters little (ptb_tokens). ValueError, in one sentence, for lists that do not fit together, no images, an
    image without references, or what is not text.
    """
    _check_texts(hypotheses, "the captions")
    if not isinstance(references, list | tuple):
        raise ValueError("the references should be a list of lists of texts")
    if len(references) != len(hypotheses):
        raise ValueError(f"there are {len(hypotheses)} captions, and references for {len(references)}")
    for i, texts in enumerate(references):
        _check_texts(texts, f"the references of caption {i}")

    found = [_ngrams(words) for words in ptb_tokens(hypotheses)]
    wanted = iter(_ngrams(words) for words in ptb_tokens([text for texts in references for text in texts]))
    wanted = [[next(wanted) for _ in texts] for texts in references]
    n_image_with = Counter(ngram for of_image in wanted for ngram in set().union(*of_image))
    log_n_image = math.log(len(hypotheses))

    def weigh(counts: Counter) -> list[dict]:
        """Of each n, the n-grams' weights: how often they occur, times how rare they are."""
        vectors: list[dict] = [{} for _ in range(MAX_N)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (log_n_image - math.log(max(1, n_image_with[ngram])))
        return vectors

    scores = []
    for counts, of_image in zip(found, wanted, strict=True):
        vectors = weigh(counts)
        alike = [_similarity(vectors, weigh(other)) * _closeness(counts, other) for other in of_image]
        scores.append(10.0 * sum(alike) / len(of_image))
    return sum(scores) / len(scores), scores


def _ngrams(words: list[str]) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _similarity(found: list[dict], wanted: list[dict]) -> float:
    """The mean over n of the cosine of two captions' weights, where a word said too often counts no more (the D)."""
    total = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        norm = math.sqrt(sum(w * w for w in ours.values())) * math.sqrt(sum(w * w for w in theirs.values()))
        if norm:
            total += sum(min(w, theirs[ngram]) * theirs[ngram] for ngram, w in ours.items() if ngram in theirs) / norm
    return total / MAX_N


def _closeness(found: Counter, wanted: Counter) -> float:
    """The penalty for another length, which the official code counts in pairs of words."""
    n_found, n_wanted = (sum(n for ngram, n in counts.items() if len(ngram) == 2) for counts in (found, wanted))
    return math.exp(-((n_found - n_wanted) ** 2) / (2 * SIGMA**2))


# ---- Yes or no --------------------------------------------------------------------------------------------------


def pope_scores(predicted: list[bool], truth: list[bool]) -> dict[str, float]:
    """POPE's scores in 0..1, yes (True) being what is looked for: accuracy, precision, recall, f1, yes_ratio.

    A ratio of nothing (nobody said yes, say) is 0. ValueError, in one sentence, for unequal lengths, no answers, or
    what is neither True nor False.
    """
    if not isinstance(predicted, list | tuple) or not isinstance(truth, list | tuple):
        raise ValueError("answers and truths should be lists")
    if len(predicted) != len(truth) or not truth:
        raise ValueError(f"there should be as many answers as questions, and some: {len(predicted)}, {len(truth)}")
    if not all(isinstance(said, bool) for said in [*predicted, *truth]):
        raise ValueError("answers and truths should be True or False")
    n_right = sum(said == true for said, true in zip(predicted, truth, strict=True))
    n_hit = sum(said and true for said, true in zip(predicted, truth, strict=True))
    n_yes, n_true = sum(predicted), sum(truth)
    return {
        "accuracy": n_right / len(truth),
        "precision": n_hit / n_yes if n_yes else 0.0,
        "recall": n_hit / n_true if n_true else 0.0,
        "f1": 2 * n_hit / (n_yes + n_true) if n_yes + n_true else 0.0,
        "yes_ratio": n_yes / len(truth),
    }


def mme_scores(rows: list[tuple[str, str, bool]]) -> dict[str, dict[str, float]]:
    """MME's scores by category. rows: of each question the category, the image, and whether the answer was right.

    acc is the share of right answers, acc_plus that of images with both answers right, score = 100 * (acc + acc_plus),
    from 0 to 200. ValueError, in one sentence, if there are no rows or an image has not two questions in a category.
    """
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for category, image, is_right in rows:
        if not isinstance(is_right, bool):
            raise ValueError(f"whether an answer was right should be True or False, not {is_right!r}")
        images[category][image].append(is_right)
    if not images:
        raise ValueError("there are no answers to score")
    scores = {}
    for category, answers in images.items():
        for image, right in answers.items():
            if len(right) != 2:
                raise ValueError(f"image {image} of category {category} should have 2 questions, not {len(right)}")
        acc = sum(map(sum, answers.values())) / (2 * len(answers))
        acc_plus = sum(map(all, answers.values())) / len(answers)
        scores[category] = {"acc": acc, "acc_plus": acc_plus, "score": 100 * (acc + acc_plus)}
    return scores


def _check_texts(texts: object, name: str) -> None:
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(f"{name} should be a list of texts, and not empty")
    for text in texts:
        _check_text(text, f"each of {name}")


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} should be text, not {type(text).__name__}")
