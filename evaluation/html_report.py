"""index.html, the page of a benchmark run: model, date, numbers, and some right and wrong answers with their images.

A page is one file that loads nothing. All text comes from data sets and models and is not trusted: it is escaped, and
the Content-Security-Policy forbids scripts (except the few lines of OwlEval's rating page) and network access.
"""

import base64
import json
import random
from collections import Counter, defaultdict
from html import escape
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

from data.text import IMAGE_PLACEHOLDER
from evaluation.metrics import Number
from evaluation.question import ImageSource, Question, Results
from evaluation.results import write_text
from evaluation.runner import open_image
from common.files import printable

N_EXAMPLES = 24  # right answers on a page, and as many wrong ones
MAX_PROMPT = 600  # characters of a prompt on a page; what comes before are worked examples

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{policy}">
<title>{title}</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 1rem auto; padding: 0 1rem }
table { border-collapse: collapse } td { padding: .1rem 1.5rem .1rem 0; vertical-align: top }
th { text-align: left; font-weight: normal; opacity: .75; padding-right: 1.5rem }
td + td { font-variant-numeric: tabular-nums } .score { font-size: 1.6rem; font-weight: bold }
.table { overflow-x: auto }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
.card { border: 1px solid #8888; border-radius: .5rem; padding: .7rem; min-width: 0 }
.right { border-left: .4rem solid #2a9d4a } .wrong { border-left: .4rem solid #d1453b }
img { max-width: 100%; border-radius: .3rem }
p, pre { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.prompt, small { opacity: .75 } pre { font-size: .8rem } label { margin-right: 1.2rem }
</style></head><body>
"""


def page_head(title: str, policy: str = "") -> str:
    """Returns the beginning of a page. policy: appended to its Content-Security-Policy."""
    return HEAD.replace("{policy}", policy).replace("{title}", escape(title))


def write_page(path: Path, html: str) -> None:
    write_text(path, html)
    print(f"\npage: {printable(path)}")


def thumbnail(source: ImageSource, folder: Path, question_id: str, *, size: int) -> str:
    """Returns an <img> with the image in it, at most size x size pixels. Raises ValueError as open_image does."""
    file = BytesIO()
    with open_image(source, folder, question_id) as image:
        image.thumbnail((size, size))
        image.save(file, "JPEG", quality=75)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def sample_results(results: Results, n: int, seed: int) -> Results:
    """Returns n random results: one of each group in turn, in a random order of the groups."""
    groups = defaultdict(list)
    for result in results:
        groups[result[0].group].append(result)
    rng, shuffled = random.Random(seed), list(groups.values())
    rng.shuffle(shuffled)
    for group in shuffled:
        rng.shuffle(group)
    return [result for turn in zip_longest(*shuffled) for result in turn if result is not None][:n]


def number_table(numbers: dict[str, Number]) -> str:
    """Returns the first number in large print, and a table of all."""
    name, first = next(iter(numbers.items()))
    html = [f'<p class="score">{escape(name)}: {escape(str(first))}</p><div class="table"><table>']
    html.append("<tr><th></th><th>number (95 % confidence interval)</th><th>n</th></tr>")
    for name, number in numbers.items():
        html.append(f"<tr><td>{escape(name)}</td><td>{escape(str(number))}</td><td>{number.n:,}</td></tr>")
    return "".join(html) + "</table></div>"


def format_truth(truth: object) -> str:
    """Returns a right answer, or several, each with the number of people who gave it."""
    if not isinstance(truth, list):
        return str(truth)
    return ", ".join(f"{text} (x {n})" if n > 1 else text for text, n in Counter(truth).most_common())


def end_of_prompt(question: Question) -> str:
    """Returns the end of a prompt, without image placeholders."""
    text = IMAGE_PLACEHOLDER.sub("", question.prompt).strip()
    return text if len(text) <= MAX_PROMPT else f"... {text[-MAX_PROMPT:]}"


def report_page(
    title: str, numbers: dict[str, Number], results: Results, record: dict, *, weights: str, folder: Path, seed: int
) -> str:
    """Returns index.html: the numbers, right and wrong answers (or those without a score), and run.json's content.

    record: that content. weights: the model's name. folder: of the images. Raises ValueError for an image that cannot be read.
    """
    by_id = {question.id: question for question, _, _ in results}
    about = f"{weights}, {record['starts'][-1]['date']:.10}, {len(results):,} answers"
    html = [page_head(title), f"<h1>{escape(title)}</h1><p>{escape(about)}</p>{number_table(numbers)}"]
    sections = {
        "Right": [result for result in results if result[2] is not None and result[2] >= 0.5],
        "Wrong": [result for result in results if result[2] is not None and result[2] < 0.5],
        "Answers": [result for result in results if result[2] is None],
    }
    for name, section in sections.items():
        if not section:
            continue
        examples = sample_results(section, N_EXAMPLES, seed)
        html.append(f"<h2>{name}: {len(section):,} of {len(results):,} ({len(examples):,} shown)</h2>")
        html.append('<div class="cards">')
        for question, answer, score in examples:
            html.append(f'<div class="card {name.lower()}">')
            turns = [by_id[id] for id in [*question.before, question.id]]  # images of the whole conversation
            html += [thumbnail(source, folder, turn.id, size=240) for turn in turns for source in turn.images]
            html.append(f'<p class="prompt">{escape(end_of_prompt(question))}</p><p><b>{escape(answer)}</b></p>')
            if question.truth is not None:
                html.append(f"<p>truth: {escape(format_truth(question.truth))}</p>")
            notes = [question.group, "" if score in (None, 0, 1) else f"score {score:.2f}", question.id]
            html.append(f"<small>{escape(' | '.join(note for note in notes if note))}</small></div>")
        html.append("</div>")
    html.append(f"<h2>The run</h2><pre>{escape(json.dumps(record, indent=1, ensure_ascii=False))}</pre></body></html>")
    return "\n".join(html)
