"""OwlEval, whose answers people rate: a page with the model's and the published answers side by side.

    results, published answers --rating_page-> rate.html   a person rates each answer from A to D and saves
                                                 |
                                               ratings.json --count_ratings--> how many A, B, C, D, by ability

The page does not show which answer is the model's. ratings.json is {"weights": name, "page": ..., "ratings":
[{"id", "ability", "ours": grade or null, "published": grade or null}, ...]}.
"""

import json
import random
from collections import Counter, defaultdict
from html import escape
from pathlib import Path

from evaluation.benchmarks import get, in_row, read_field, read_lines
from evaluation.html_report import end_of_prompt, page_head, thumbnail
from evaluation.question import Question, Results, first_question

GRADES = "ABCD"
GUIDE = {
    "A": "correct and satisfying",
    "B": "correct except for small errors",
    "C": "related to the question, with large errors",
    "D": "unrelated to the question, or no answer",
}
MODELS = ("ours", "published")
PUBLISHED_FILES = ("answer/mPLUG_Owl_7b_answer.jsonl", "answers_mplug_owl_7b.jsonl")  # either, in OwlEval's folder
ABILITIES = dict(zip("abcdef", ("instructions", "seeing", "reading text", "knowledge", "reasoning", "several turns")))

STYLE = """<style>
body { max-width: none }
header { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid #8888; padding: .5rem 0; z-index: 1 }
header p { margin: 0 1.2rem .2rem 0; display: inline-block }
.question { display: grid; gap: .8rem; grid-template-columns: 1fr; margin: 1rem 0; scroll-margin-top: 12rem }
@media (min-width: 60rem) { .question.seen { grid-template-columns: minmax(15rem, 1fr) 3fr } }
.question .cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.unrated .card { border-color: #d1453b; border-width: 2px }
</style>"""

SCRIPT = """
const key = JSON.parse(document.getElementById("key").textContent);
const form = document.forms[0];
const count = document.getElementById("count");
const warning = document.getElementById("warning");
const questions = [...document.querySelectorAll(".question")];
const grades = () => Object.fromEntries(new FormData(form));
const isRated = (given, i) => given[i + "left"] && given[i + "right"];
let hasWarned = false;
const update = () => {
  const given = grades();
  const nRated = questions.filter((_, i) => isRated(given, i)).length;
  count.textContent = `${nRated} of ${questions.length} rated`;
  questions.forEach((question, i) => question.classList.toggle("unrated", hasWarned && !isRated(given, i)));
  const nMissing = questions.length - nRated;
  warning.textContent = hasWarned && nMissing ? `${nMissing} not rated, marked in red. Save again to save without them.` : "";
  return nMissing;
};
form.onsubmit = event => {
  event.preventDefault();
  const given = grades();
  if (update() && !hasWarned) {  // the first time only
    hasWarned = true;
    update();
    document.querySelector(".unrated").scrollIntoView();
    return;
  }
  const ratings = key.ratings.map((row, i) => {
    const sides = {left: given[i + "left"] || null, right: given[i + "right"] || null};
    return {...row, ours: sides[row.ours], published: sides[row.ours === "left" ? "right" : "left"]};
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({...key, ratings}, null, 1)]));
  link.download = "ratings.json";
  link.click();
};
form.onchange = update;
try {  // a page that is closed by mistake keeps its grades, if the browser has storage
  const kept = JSON.parse(localStorage.getItem(key.page) || "{}");
  form.onchange = () => { update(); localStorage.setItem(key.page, JSON.stringify(grades())); };
  for (const input of form.elements) if (kept[input.name] === input.value) input.checked = true;
} catch {}
update();
"""


def read_published(folder: Path, questions: list[Question]) -> dict[str, str] | None:
    """Returns the published answers by question id, or None. Raises ValueError if one is missing."""
    path = next((folder / name for name in PUBLISHED_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    published = {}
    for i, row in enumerate(read_lines(path)):
        with in_row(path, i):
            published[str(get(row, "question_id", int))] = get(row, "answer")
    missing = [question.id for question in questions if question.id not in published]
    if missing:
        raise ValueError(f"{path} has no answer to question {missing[0]}")
    return published


def rating_page(results: Results, published: dict[str, str], *, weights: str, folder: Path, seed: int) -> str:
    """Returns rate.html. weights: the model's name, which the page does not show. folder: of the images.

    All answers of a conversation by one model are on one side, which the seed selects.
    Raises ValueError for an image that cannot be read.
    """
    rng = random.Random(seed)
    legend = "".join(f"<p><b>{grade}</b> {meaning}</p>" for grade, meaning in GUIDE.items())
    html = [page_head("OwlEval", "; script-src 'unsafe-inline'"), STYLE]
    html.append(f"<h1>OwlEval: two answers to each question</h1><form><header>{legend}<br>")
    html.append('<p><b id="count"></b> <button>save</button> <span id="warning" role="status"></span></p></header>')
    side_of, ratings = {}, []  # the side of the model's answers, by the conversation's first question
    for i, (question, answer, _) in enumerate(results):
        first = first_question(question)
        side_of.setdefault(first, rng.choice(("left", "right")))
        texts = (answer, published[question.id])
        html.append('<hr><div class="question seen"><div>' if question.images else '<div class="question"><div>')
        html += [thumbnail(source, folder, question.id, size=480) for source in question.images]
        html.append(f'</div><div><p><b>{escape(end_of_prompt(question))}</b></p><div class="cards">')
        for side, text in zip(("left", "right"), texts if side_of[first] == "left" else reversed(texts)):
            radios = (f'<label title="{GUIDE[g]}"><input type="radio" name="{i}{side}" value="{g}"> {g}</label>' for g in GRADES)
            html.append(f'<div class="card"><p>{escape(text)}</p>{"".join(radios)}</div>')
        html.append("</div></div></div>")
        ratings.append({"id": question.id, "ability": question.group, "ours": side_of[first]})
    answers = "\n".join(answer for _, answer, _ in results)
    page_id = random.Random(f"{weights} {seed} {answers}".encode(errors="replace")).getrandbits(64)
    key = {"weights": weights, "page": f"owleval {page_id:x}", "ratings": ratings}
    text = json.dumps(key).replace("<", "\\u003c")  # only "<" could end the script element
    html.append('</form><script type="application/json" id="key">')
    html.append(f"{text}</script><script>{SCRIPT}</script></body></html>")
    return "\n".join(html)


def count_ratings(path: Path) -> str:
    """Returns a table of ratings.json: how often each grade was given, in all and by ability.

    Raises FileNotFoundError, or ValueError for a file that the rating page did not save.
    """
    weights, rows = read_field(path, "weights", str), read_field(path, "ratings")
    counts: dict[str, dict[str, Counter]] = defaultdict(lambda: {model: Counter() for model in MODELS})
    ids, n_rated = set(), 0
    for i, row in enumerate(rows):
        with in_row(path, i):
            if get(row, "id") in ids:
                raise ValueError(f"question {row['id']!r:.80} occurs twice")
            ids.add(row["id"])
            grades = {m: None if row[m] is None else get(row, m, one_of=tuple(GRADES)) for m in MODELS}
            n_rated += None not in grades.values()
            letters = get(row, "ability").split(",")
            for ability in {"all", *(ABILITIES.get(letter.strip(), "other") for letter in letters)}:
                for model, grade in grades.items():
                    counts[ability][model][grade] += 1

    lines = [f"ours: {weights!r:.80}", f"rated: {n_rated} of {len(rows)} questions", ""]
    lines.append(f"{'':<38}{'A':>5}{'B':>5}{'C':>5}{'D':>5}{'A+B':>6}{'not rated':>11}")
    for ability in [name for name in ("all", *ABILITIES.values(), "other") if name in counts]:
        for model, count in counts[ability].items():
            grades = "".join(f"{count[grade]:>5}" for grade in GRADES)
            lines.append(f"{ability:<27}{model:<11}{grades}{count['A'] + count['B']:>6}{count[None]:>11}")
    return "\n".join(lines)
