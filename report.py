"""Pages for people, who would rather look: what was answered, with thumbnails; OwlEval's answers, to be rated.

    results --page--------> index.html   the numbers, and some right and wrong answers beside their images
            --rating_page-> rate.html    OwlEval: ours and the published answers side by side, nobody sees which
                              | a person rates each from A to D, and saves
                              v
                            ratings.json --count_ratings--> how many A, B, C, D, by ability

A page is a single file that loads nothing. All words in it come from data sets and models, which may say anything:
they are escaped, and a page may not run scripts but for the few lines of the rating page, nor reach the network.
"""

import base64
import json
import random
from collections import Counter, defaultdict
from html import escape
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

from answer import Source, opened
from data.text import IMAGE_MARK
from record import write
from tasks import Question, Results, read_lines, read_object

GUIDE = (
    "A: correct and satisfying. B: correct but for small errors. C: it does relate to the question, with large errors. "
    "D: it has nothing to do with the question, or is no answer. Save at the end."
)
N_SHOWN = 24  # answers of a kind on a page
MAX_TEXT = 600  # characters of a prompt on a page: what stands before are worked examples
GRADES, WHOSE = "ABCD", ("ours", "published")
PUBLISHED = ("answer/mPLUG_Owl_7b_answer.jsonl", "answers_mplug_owl_7b.jsonl")  # in OwlEval's folder: either
ABILITIES = dict(zip("abcdef", ("instructions", "seeing", "reading text", "knowledge", "reasoning", "several turns")))

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{more}">
<title>{title}</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 1rem auto; padding: 0 1rem }
table { border-collapse: collapse } td { padding: .1rem 1.5rem .1rem 0; vertical-align: top }
td + td { text-align: right; font-variant-numeric: tabular-nums }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
.card { border: 1px solid #8888; border-radius: .5rem; padding: .7rem; min-width: 0 }
.right { border-left: .4rem solid #2a9d4a } .wrong { border-left: .4rem solid #d1453b }
img { max-width: 100%; border-radius: .3rem }
p, pre { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.prompt, small { opacity: .75 } pre { font-size: .8rem } label { margin-right: 1.2rem }
</style></head><body>
"""


def head(title: str, more: str = "") -> str:
    """The beginning of a page. more: what it may do besides."""
    return HEAD.replace("{more}", more).replace("{title}", escape(title))


def write_page(path: Path, html: str) -> None:
    write(path, html)
    print(f"\nto look at: {path}")


def thumbnail(source: Source, folder: Path, id: str, size: int) -> str:
    """An <img> with the image in it, at most size x size. Raises ValueError as opened does."""
    file = BytesIO()
    with opened(source, folder, id) as image:
        image.thumbnail((size, size))
        image.save(file, "JPEG", quality=75)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def pick(results: Results, n: int, seed: int) -> Results:
    """n of them, drawn by the seed: one of each group in turn, the groups in an order of chance."""
    groups = defaultdict(list)
    for result in results:
        groups[result[0].group].append(result)
    chance, drawn = random.Random(seed), list(groups.values())
    chance.shuffle(drawn)
    for group in drawn:
        chance.shuffle(group)
    return [result for turn in zip_longest(*drawn) for result in turn if result is not None][:n]


def figure(number: float) -> str:
    """What is counted without, what is computed with two decimals."""
    return f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"


def in_words(truth: object) -> str:
    """A right answer; or people's, each with the number of those who gave it."""
    if not isinstance(truth, list):
        return str(truth)
    return ", ".join(f"{text} (x {n})" if n > 1 else text for text, n in Counter(truth).most_common())


def end_of_prompt(question: Question) -> str:
    """The end of what was asked, without the images' places."""
    text = IMAGE_MARK.sub("", question.prompt).strip()
    return text if len(text) <= MAX_TEXT else f"... {text[-MAX_TEXT:]}"


def page(title: str, numbers: dict[str, float], results: Results, record: dict, folder: Path, seed: int) -> str:
    """index.html: the numbers, N_SHOWN right and N_SHOWN wrong answers (or of those without a score), the record.

    folder: of the images. Raises ValueError, in one sentence, for an image that cannot be read.
    """
    by_id = {question.id: question for question, _, _ in results}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{figure(number)}</td></tr>" for name, number in numbers.items())
    html = [head(title), f"<h1>{escape(title)}</h1><table>{rows}</table>"]
    kinds = {
        "Right": [result for result in results if result[2] is not None and result[2] >= 0.5],
        "Wrong": [result for result in results if result[2] is not None and result[2] < 0.5],
        "Answers": [result for result in results if result[2] is None],
    }
    for kind, of_kind in kinds.items():
        if not of_kind:
            continue
        picked = pick(of_kind, N_SHOWN, seed)
        html.append(f'<h2>{kind}: {len(picked):,} of {len(of_kind):,}</h2><div class="cards">')
        for question, answer, score in picked:
            html.append(f'<div class="card {kind.lower()}">')
            turns = [by_id[id] for id in [*question.before, question.id]]  # the images are the conversation's
            html += [thumbnail(source, folder, turn.id, 240) for turn in turns for source in turn.images]
            html.append(f'<p class="prompt">{escape(end_of_prompt(question))}</p><p><b>{escape(answer)}</b></p>')
            if question.truth is not None:
                html.append(f"<p>right: {escape(in_words(question.truth))}</p>")
            notes = [question.group, "" if score in (None, 0, 1) else f"score {score:.2f}", question.id]
            html.append(f"<small>{escape(' | '.join(note for note in notes if note))}</small></div>")
        html.append("</div>")
    html.append(f"<h2>The run</h2><pre>{escape(json.dumps(record, indent=1, ensure_ascii=False))}</pre></body></html>")
    return "\n".join(html)


# --- OwlEval -----------------------------------------------------------------------------------------

SCRIPT = """
const key = JSON.parse(document.getElementById("key").textContent);
const form = document.forms[0];
const grades = () => Object.fromEntries(new FormData(form));
form.onsubmit = event => {
  event.preventDefault();
  const given = grades();
  const ratings = key.ratings.map((row, i) => {
    const sides = {left: given[i + "left"] || null, right: given[i + "right"] || null};
    return {...row, ours: sides[row.ours], published: sides[row.ours === "left" ? "right" : "left"]};
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({...key, ratings}, null, 1)]));
  link.download = "ratings.json";
  link.click();
};
try {  // a page that is closed by mistake loses nothing, if the browser has storage
  const kept = JSON.parse(localStorage.getItem(key.page) || "{}");
  form.onchange = () => localStorage.setItem(key.page, JSON.stringify(grades()));
  for (const input of form.elements) if (kept[input.name] === input.value) input.checked = true;
} catch {}
"""


def read_published(folder: Path, questions: list[Question]) -> dict[str, str] | None:
    """The published answers of OwlEval's folder by id; None if it has none.

    ValueError, in one sentence, for a question without one, and for a file that is not as published.
    """
    path = next((folder / name for name in PUBLISHED if (folder / name).is_file()), None)
    if path is None:
        return None
    published = {str(row.get("question_id", int)): row.get("answer") for row in read_lines(path)}
    for question in questions:
        if question.id not in published:
            raise ValueError(f"{path} has no answer to question {question.id}")
    return published


def rating_page(results: Results, published: dict[str, str], name: str, folder: Path, seed: int) -> str:
    """rate.html. published: of read_published. name: whose answers ours are; the page keeps it to itself.

    A conversation is by the same model on the same side throughout; chance says on which. What is saved is
    {"weights": name, "page": ..., "ratings": [{"id", "ability", "ours": grade or null, "published": ...}, ...]}.
    Raises ValueError as page does.
    """
    chance = random.Random(seed)
    html = [head("OwlEval", "; script-src 'unsafe-inline'"), "<h1>OwlEval: two answers to each question</h1>"]
    html.append(f"<p>{GUIDE}</p><form>")
    ours_on, rows = {}, []  # the side, by the conversation's first question
    for i, (question, answer, _) in enumerate(results):
        first = question.before[0] if question.before else question.id
        ours_on.setdefault(first, chance.choice(("left", "right")))
        texts = (answer, published[question.id])
        html.append("<hr>" if question.images else "")
        html += [thumbnail(source, folder, question.id, 480) for source in question.images]
        html.append(f'<p><b>{escape(end_of_prompt(question))}</b></p><div class="cards">')
        for side, text in zip(("left", "right"), texts if ours_on[first] == "left" else reversed(texts)):
            radios = (f'<label><input type="radio" name="{i}{side}" value="{g}"> {g}</label>' for g in GRADES)
            html.append(f'<div class="card"><p>{escape(text)}</p>{"".join(radios)}</div>')
        html.append("</div>")
        rows.append({"id": question.id, "ability": question.group, "ours": ours_on[first]})
    answers = "\n".join(answer for _, answer, _ in results)
    key = {"weights": name, "page": f"owleval {random.Random(f'{name} {seed} {answers}').getrandbits(64):x}"}
    # In a script no character but "<" can end it.
    text = json.dumps(key | {"ratings": rows}).replace("<", "\\u003c")
    html.append('<hr><p><button>save</button></p></form><script type="application/json" id="key">')
    html.append(f"{text}</script><script>{SCRIPT}</script></body></html>")
    return "\n".join(html)


def count_ratings(path: str | Path) -> str:
    """A table for the terminal: how often each grade was given, A + B, and the same for each ability.

    Raises FileNotFoundError or ValueError, in one sentence, for what the rating page did not save.
    """
    content = read_object(Path(path))
    name = content.get("weights")
    counts: dict[str, dict[str, Counter]] = defaultdict(lambda: {whose: Counter() for whose in WHOSE})
    rows, ids = content.rows("ratings"), set()
    for row in rows:
        if row.get("id") in ids:
            raise ValueError(f"{row.where}: question {row.get('id')!r:.80} is there twice")
        ids.add(row.get("id"))
        for ability in {"all", *(ABILITIES.get(letter.strip(), "other") for letter in row.get("ability").split(","))}:
            for whose in WHOSE:
                rated = row.fields.get(whose, "") is not None
                counts[ability][whose][row.one_of(whose, tuple(GRADES)) if rated else None] += 1
    n = sum(None not in (row.fields[whose] for whose in WHOSE) for row in rows)
    lines = [f"ours: {name!r:.80}", f"rated: {n} of {len(rows)} questions", ""]
    lines.append(f"{'':<38}{'A':>5}{'B':>5}{'C':>5}{'D':>5}{'A+B':>6}{'not rated':>11}")
    for ability in [name for name in ("all", *ABILITIES.values(), "other") if name in counts]:
        for whose, count in counts[ability].items():
            title = f"{ability:<27}{whose:<11}"
            grades = "".join(f"{count[grade]:>5}" for grade in GRADES)
            lines.append(f"{title}{grades}{count['A'] + count['B']:>6}{count[None]:>11}")
    return "\n".join(lines)
