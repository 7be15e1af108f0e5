"""The Penn Treebank tokenizer of the COCO caption evaluation, in plain Python.

    captions --joined, one per line--> text --longest match of RULES--> PTB tokens --spell, drop punctuation--> words

CIDEr is defined on these words, so they have to equal those of the official evaluation, which calls Stanford's
tokenizer 3.4.1 (2014, Java) and removes punctuation: "don't" is do n't, "cannot" can not, "dog's" dog 's;
"snow-covered", "a/b", "10:30", "U.S." and "Mr." stay whole; brackets become -lrb- and -rrb- and stay, as "!!" does.

The words are equal on captions and plain English. They may differ for East Asian smileys, less common HTML entities,
addresses or tags that contain entities or brackets, file names and version numbers ("10.x"), "etc." and similar
directly before a letter, "S&P-500", dots with spaces before a number, hyphenated numbers after a number, rare signs,
and tokens of more than 200 characters. Only the Basic Multilingual Plane is covered: other emoji are no tokens.
"""

import re

# Parts of the rules below. A letter is one of any script, except superscripts and fractions, which \w includes.
SPACE = r" \t\xa0\u2000-\u200a\u3000"
LETTER = r"[^\W\d_²³¹¼-¾\u2070-\u209c\u2150-\u2189\u2460-\u24ff\U00010000-\U0010ffff]"
LETTERLIKE = rf"(?:{LETTER}|[\xad\u0300-\u036f])"  # or a soft hyphen or a combining accent
WORD = rf"{LETTERLIKE}(?:{LETTERLIKE}|\d)*"
WORDS = rf"{WORD}(?:[.!?]{WORD})*"  # one word without a space after the full stop: "end.The"
QUOTE = r"['’\x92]"
ANY_QUOTE = r"['’‘‛\x91\x92]"
CLITIC = rf"{QUOTE}(?:[msd]|re|ve|ll)"
NOT = rf"n{ANY_QUOTE}t"
PART = rf"(?:[dol]{ANY_QUOTE}(?:{LETTER}|\d))?(?:{LETTER}|\d)+"  # of a hyphenated word, such as "d'Avignon"
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

# After a single letter and a full stop, these words begin a sentence, also if they are in the next caption.
SENTENCE_STARTS = """
    A About According Additionally After An As At But Did During Earlier He Her Here How However If In It Last Many
    More Mr\\. Ms\\. Now Once One Other Our She Since So Some Such That The Their Then There These They This We What
    When While Who Why Yet You
""".split()

# (pattern of a token, pattern of what must follow it). The longest match wins, and the text after the token counts: in
# "don't", "do" followed by "n't" (5) wins over "don" (3). Of equally long matches the first wins. A character that no
# rule matches is dropped, which removes most punctuation.
RULES = [
    # two words in one
    ("can", "not"),
    ("gon|wan", "na"),
    ("got", "ta"),
    ("lem|gim", "me"),
    ("'t", "is|was"),
    # words, with and without apostrophes
    (WORDS, ""),
    (r"[a-z\xad]*(?-i:[A-MO-Za-mo-z])\xad*", NOT),  # "do" in "don't"
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
    (r"\(\d{2,3}\)[ \xa0]?\d{3,4}[- \xa0]?\d{3,5}", ""),  # a telephone number
    (r"(?-i:[A-Z]*)\$|#|[¢-¥€\u20a0₤฿￠￡￥￦]", ""),
    # addresses, names, tags, smileys
    (r"""https?://[^\s"<>|(){}]+[^\s"<>|.!?(){},-]""", ""),
    (
        r"""(?:www\.(?:[^\s"<>|.!?(){},]+\.)+[a-z]{2,4}|(?:(?-i:[#%&*+a-z~\x7f-\U0010ffff])+\.)+(?:com|net|org|edu))"""
        r"""(?:/[^\s"<>|()]+[^\s"<>|.!?(){},-])?""",
        "",
    ),
    (r"""<?[a-z0-9][^\s"<>|(){}]*@(?:[^\s"<>|(){}.]+\.)*[^\s"<>|(){}.]+>?""", ""),
    (rf"@[a-z_][a-z_0-9]*|#{LETTERLIKE}+", ""),
    (rf"<(?:[!?][a-z-][^>\n]*|{TAG_NAME}(?: +{TAG_NAME}(?: *= *{TAG_VALUE})?)* */?|/{TAG_NAME}) *>", ""),
    (r"&#\d+;", ""),
    (r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])", r"[^a-z0-9]"),
    (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)", ""),
    # signs
    (r"-+|\.{3,}|[?!]+|@+|_+|#+|\*+|(?:\\\*)+|<<?|>>?|[=/()\[\]{}¡¿。、]", ""),  # "?!" is one token, "((" two
    (r"'", rf"[a-z][^{SPACE}\n]"),  # opens a quotation: "'red'" has no "'re"
    (r"[`‘-‟\x91-\x94‹›«»]{1,2}|''", ""),  # "“" and "”" in "“STOP”"
    (rf"{CLITIC}|{NOT}", ""),  # "n't" in "don't"; "'s" where the text ends
    (  # one token per sign: "%" in "5%", "°" in "20°C"
        r"[+%&~^|\\¦-©¬®-º×÷‖‗†-‣‰-‸※‾-⁂⁄⁺-ⁿ₊-₎\u2100-\u214f\u2190-\u2bff〒・！-／：-＠［-｀｛-･]",
        "",
    ),
]
RULES = [re.compile(f"({token})(?:{context})", re.IGNORECASE) for token, context in RULES]
# Most words of most captions need no rules.
PLAIN = re.compile(r"(?!(?:cannot|gonna|wanna|gotta|lemme|gimme)\b)[a-z]{2,}(?=[ \n])", re.IGNORECASE | re.ASCII)
MAX_MATCH = 200  # characters of a token and what follows it: keeps the time linear in the length of any text

ENTITIES = {
    "&amp;": "&", "&quot;": '"', "&apos;": "'", "&lt;": "<", "&gt;": ">", "&nbsp;": " ", "&mdash;": "—", "&ndash;": "—",
}  # fmt: skip
RESPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "---": "--", "----": "--",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$",
}  # fmt: skip
STRAIGHT_QUOTES = {
    **dict.fromkeys(map(ord, "‘‛‹\x91"), "`"), **dict.fromkeys(map(ord, "’›\x92"), "'"),
    **dict.fromkeys(map(ord, "“«\x93"), "``"), **dict.fromkeys(map(ord, "”»\x94"), "''"),
}  # fmt: skip
QUOTE_OR_CLITIC = re.compile(rf"[`‘-‟\x91-\x94‹›«»]{{1,2}}|{CLITIC}|{NOT}", re.IGNORECASE)
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def ptb_tokens(captions: list[str]) -> list[list[str]]:
    """Returns the words of each caption, in lower case and without punctuation.

    The captions are tokenized as one text with one caption per line, as in the official evaluation, so they must be
    passed together and in order: the full stop after a last single letter ("... on a.") is dropped if the next
    caption begins a sentence ("A ...", "The ..."). Raises ValueError if captions is not a list of strings.
    """
    check_texts(captions, "captions")
    lines = [re.sub(r"[\n\v\f\r\x85\u2028\u2029]", " ", caption) for caption in captions]
    text = re.sub("|".join(ENTITIES), lambda match: ENTITIES[match[0].lower()], "\n".join(lines), flags=re.IGNORECASE)
    words: list[list[str]] = [[]]
    i = 0
    while i < len(text):
        if text[i] == "\n":
            words.append([])
        if plain := PLAIN.match(text, i, i + MAX_MATCH):
            token = plain[0]
            words[-1].append(token.lower())
        else:
            matches = [match for rule in RULES if (match := rule.match(text, i, i + MAX_MATCH))]
            token = max(matches, key=re.Match.end)[1] if matches else ""
            words[-1] += spell(token)
        i += max(1, len(token))
    return words


def spell(token: str) -> list[str]:
    """Returns the words of a token: usually one, none for punctuation, several for a token with spaces."""
    if QUOTE_OR_CLITIC.fullmatch(token):
        token = token.translate(STRAIGHT_QUOTES)
    elif token.startswith("..."):
        token = "..."
    elif token in RESPELLED:
        token = RESPELLED[token]
    elif not token.startswith("<"):
        token = token.replace("\xad", "").replace("(", "-lrb-").replace(")", "-rrb-")
    return [] if token in PUNCTUATION else token.lower().split()


def check_texts(texts: object, name: str) -> None:
    """Raises ValueError if texts is not a non-empty list of strings; a string would pass as a list of characters."""
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} should be a list of strings with at least one entry, not {texts!r:.80}")
