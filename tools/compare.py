"""Shows the results of two checkpoints on the same questions side by side.

    python -m tools.compare runs/vqav2-a runs/vqav2-b                    two folders of evaluate.py --task
    python -m tools.compare a.jsonl b.jsonl --page compare.html          two files of evaluate.py --data

    A, B --read_results--> numbers                    printed side by side
                           questions with scores --> on which A or B is better, and all whose answers differ

Questions are compared that both have, with the same prompt and truth. p is the probability of a difference at least as
large, in either direction, if A and B were equally good (the exact sign test on the questions with unequal scores).
"""

from command import ArgumentParser, log, run, user_errors

import math
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path

from common.files import escape_controls, printable, read_json
from evaluation.benchmarks import get, get_texts, in_row, read_lines
from evaluation.html_report import MAX_PROMPT, format_truth, page_head, write_page
from evaluation.metrics import Number, percent
from evaluation.scoring import is_exact_match


@dataclass
class Answer:
    """An answer of one checkpoint. score: None where the truth is not published."""

    id: str
    prompt: str
    truth: object
    answer: str
    score: float | None
    group: str


def read_results(path: Path) -> tuple[dict[str, Number], dict[str, Answer]]:
    """Returns a run's numbers by name and its answers by question id (--data: by images and question). path: a benchmark's folder, or a file of --data.

    Raises FileNotFoundError for a run that has not finished, and ValueError for any other file.
    """
    file = path / "answers.jsonl" if path.is_dir() else path
    answers = {}
    for i, row in enumerate(read_lines(file)):
        with in_row(file, i):
            text = get(row, "answer")
            if "id" in row:
                truth = row["truth"]
                if isinstance(truth, list):
                    truth = get_texts(row, "truth")
                elif truth is not None:
                    truth = get(row, "truth")
                score = None if row["score"] is None else get(row, "score", int | float)
                answers[get(row, "id")] = Answer(row["id"], get(row, "prompt"), truth, text, score, get(row, "group"))
            else:
                truth, group = get(row, "truth"), get(row, "kind") if "kind" in row else ""
                score, prompt = float(is_exact_match(text, truth)), get(row, "question")
                images = ", ".join(get_texts(row, "images")) if row.get("images") else ""
                key = next(key for n in count() if (key := f"{images}: {prompt} ({n})") not in answers)
                answers[key] = Answer(images or f"line {i + 1}", prompt, truth, text, score, group)
    return read_numbers(path) if path.is_dir() else count_right(answers), answers


def read_numbers(folder: Path) -> dict[str, Number]:
    """Returns the official numbers of a finished benchmark."""
    path = folder / "results.json"
    try:
        numbers = {name: Number(**fields) for name, fields in get(read_json(path), "numbers", dict).items()}
        "".join(map(str, numbers.values()))  # raises an error for fields of other types
    except (TypeError, ValueError, LookupError):
        raise ValueError(f"{path} is damaged or from an older version: run the same evaluate.py again") from None
    return numbers


def count_right(answers: dict[str, Answer]) -> dict[str, Number]:
    """Returns the share of right answers, in all and of each kind of question."""
    groups = defaultdict(list)
    for answer in answers.values():
        groups["right"].append(answer.score)
        if answer.group:
            groups[f"right, {answer.group}"].append(answer.score)
    return {name: percent(sum(scores), len(scores)) for name, scores in groups.items()}


def sign_test(n_a: int, n_b: int) -> float:
    """Returns the two-sided p value of n_a against n_b wins if both are equally probable."""
    n, less = n_a + n_b, min(n_a, n_b)
    tail = sum(math.comb(n, k) for k in range(less + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(a: dict[str, Answer], b: dict[str, Answer]) -> tuple[str, list[tuple[Answer, Answer]]]:
    """Returns a summary of the questions that both have, and those with unequal answers; unequal scores come first."""
    pairs = [(x, b[id]) for id, x in a.items() if id in b and (x.prompt, x.truth) == (b[id].prompt, b[id].truth)]
    if not pairs:
        raise ValueError("A and B have no question in common")
    scored = [(x, y) for x, y in pairs if x.score is not None and y.score is not None]
    n_a, n_b = sum(x.score > y.score for x, y in scored), sum(x.score < y.score for x, y in scored)
    different = [(x, y) for x, y in pairs if x.answer != y.answer]
    different.sort(key=lambda pair: pair[0].score == pair[1].score)  # stable: otherwise in the order of A
    lines = [f"questions in common: {len(pairs):,} (A has {len(a):,}, B has {len(b):,})"]
    if scored:
        n_equal, p = len(scored) - n_a - n_b, sign_test(n_a, n_b)
        lines.append(f"A better: {n_a:,}, B better: {n_b:,}, equal: {n_equal:,}; p = {p:.3g}")
    lines.append(f"different answers: {len(different):,} of {len(pairs):,}")
    return "\n".join(lines), different


def number_rows(a: dict[str, Number], b: dict[str, Number]) -> list[tuple[str, str, str, str]]:
    """Returns (name, A, B, B - A) of each number that A or B has."""
    rows = []
    for name in a | b:
        x, y = a.get(name), b.get(name)
        difference = f"{y.value - x.value:+.2f}" if x and y else ""
        rows.append((name, str(x or "-"), str(y or "-"), difference))
    return rows


def describe(x: Answer, y: Answer) -> list[str]:
    """Returns the lines that show a question and its two answers."""
    prompt = x.prompt if len(x.prompt) <= MAX_PROMPT else f"... {x.prompt[-MAX_PROMPT:]}"
    truth = [] if x.truth is None else [f"truth: {format_truth(x.truth)}"]
    score = ["" if z.score is None else f" ({z.score:.2f})" for z in (x, y)]
    return [prompt, *truth, f"A{score[0]}: {x.answer}", f"B{score[1]}: {y.answer}"]


def compare_page(names: list[str], rows: list[tuple], summary: str, different: list[tuple[Answer, Answer]]) -> str:
    """Returns the page: the numbers, the summary, and a card per question."""
    html = [page_head("A and B"), "<h1>A and B</h1>", *(f"<p>{escape(name)}</p>" for name in names)]
    html.append('<div class="table"><table>')
    for row in [("", "A", "B", "B - A"), *rows]:
        html.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    html.append(f'</table></div><p>{escape(summary)}</p><div class="cards">')
    for x, y in different:
        better = "right" if (y.score or 0) > (x.score or 0) else "wrong" if (y.score or 0) < (x.score or 0) else ""
        lines = "".join(f"<p>{escape(line)}</p>" for line in describe(x, y))
        html.append(f'<div class="card {better}">{lines}<small>{escape(x.id)}</small></div>')
    return "\n".join(html) + "</div></body></html>"


def main() -> None:
    p = ArgumentParser(description=__doc__)
    p.add_argument("a", metavar="A", type=Path, help="a folder of --task, or a file of --data")
    p.add_argument("b", metavar="B", type=Path)
    p.add_argument("--shown", type=int, default=20, metavar="N", help="questions that are shown (default 20)")
    p.add_argument("--page", type=Path, metavar="FILE", help="write a page as well (.html)")
    args = p.parse_args()
    with user_errors():
        if not 0 <= args.shown <= 100_000:
            raise ValueError("--shown should be 0 to 100,000")
        if args.page and args.page.exists() and args.page.suffix != ".html":
            raise ValueError(f"--page {args.page} exists and does not end with .html: choose another name")
        (numbers_a, a), (numbers_b, b) = read_results(args.a), read_results(args.b)
        if numbers_a.keys() != numbers_b.keys():
            log("A and B report different metrics: they may be of different benchmarks")
        rows, (summary, different) = number_rows(numbers_a, numbers_b), compare(a, b)
        names = [f"A: {args.a}", f"B: {args.b}"]
        print(*map(printable, names), "", sep="\n")
        width = max(len(printable(row[0])) for row in rows)
        for name, x, y, difference in [("", "A", "B", "B - A"), *rows]:
            print(f"{printable(name):<{width}}  {printable(x):<28} {printable(y):<28} {difference:>8}".rstrip())
        print(f"\n{summary} ({min(args.shown, len(different)):,} shown)")
        for x, y in different[: args.shown]:
            print(f"\n{printable(x.id)}", *(f"  {escape_controls(line)}" for line in describe(x, y)), sep="\n")
        if args.page:
            write_page(args.page, compare_page(names, rows, summary, different[: args.shown]))


if __name__ == "__main__":
    run(main)
