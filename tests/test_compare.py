"""python -m tools.compare: two checkpoints' numbers, and the questions on which they differ."""

import json

import pytest

from evaluation.metrics import percent
from runs import run_main
from tools import compare

EVIL = "<script>alert(1)</script>\x1b[31m"


def write_run(folder, rows, numbers=None):
    """Writes what evaluate.py leaves of a benchmark. rows: (id, truth, answer, score)."""
    folder.mkdir()
    lines = [
        {"id": id, "prompt": f"<image>Ask {id}?", "answer": answer, "truth": truth, "group": "", "score": score}
        for id, truth, answer, score in rows
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    total = percent(sum(score or 0 for *_, score in rows), len(rows))
    content = {"task": "easy-vqa", "numbers": numbers or {"accuracy": vars(total)}}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


A = [("1", "red", "red", 1.0), ("2", "yes", "no", 0.0), ("3", "yes", "no", 0.0), ("4", ["a", "a"], "b", 0.3)]
B = [("1", "red", "blue", 0.0), ("2", "yes", "yes", 1.0), ("3", "yes", EVIL, 0.0), ("4", ["a", "a"], "b", 0.3)]


def run(*flags):
    code, out, err = run_main(compare.main, *flags)
    assert code == 0, err
    return out


def refused(*flags):
    code, out, err = run_main(compare.main, *flags)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_two_runs_of_a_benchmark(tmp_path):
    """Numbers with their difference; unequal scores come before answers that are only different; equal ones are left out."""
    a, b = write_run(tmp_path / "a", A), write_run(tmp_path / "b", [*B, ("5", "x", "x", 1.0)])
    printed = run(a, b)
    (line,) = [line for line in printed.splitlines() if line.startswith("accuracy")]
    assert line.split() == f"accuracy {percent(1.3, 4)} {percent(2.3, 5)} +13.50".split()
    assert "in common: 4 (A has 4, B has 5)" in printed and "A better: 1, B better: 1, equal: 2; p = 1" in printed
    assert "different answers: 3 of 4 (3 shown)" in printed
    assert [line for line in printed.splitlines() if line in list("12345")] == ["1", "2", "3"]
    assert "  A (1.00): red\n  B (0.00): blue\n" in printed and "\\x1b[31m" in printed and "\x1b" not in printed
    assert "(1 shown)" in run(a, b, "--shown", 1) and run(a, a).endswith("different answers: 0 of 4 (0 shown)\n")


def test_page(tmp_path):
    page = tmp_path / "page.html"
    run(write_run(tmp_path / "a", A), write_run(tmp_path / "b", B), "--page", page)
    html = page.read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "default-src 'none'" in html
    assert html.count('class="card ') == 3 and html.count('class="card right"') == html.count('class="card wrong"') == 1
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(tmp_path / "a", tmp_path / "b", "--page", tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_files_of_data(tmp_path):
    for name, answers in (("a", ["Red.", "no"]), ("b", ["red", "yes"])):
        rows = [{"question": "?", "truth": t, "images": [], "answer": x} for t, x in zip(("red", "yes"), answers)]
        (tmp_path / name).write_text("".join(json.dumps(row | {"kind": "color"}) + "\n" for row in rows))
    printed = run(tmp_path / "a", tmp_path / "b")
    assert "right, color" in printed and "+50.00" in printed and "A better: 0, B better: 1, equal: 1; p = 1" in printed


def test_answers_to_the_same_images_are_compared(tmp_path):
    """Also if B was asked only some of A's questions: by images and question, not by line."""
    rows = [{"question": "?", "truth": "red", "images": [f"{i}.png"], "answer": answer} for i, answer in enumerate("abc")]
    for name, part in (("a", rows), ("b", [rows[2], rows[1] | {"answer": "red"}])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    printed = run(tmp_path / "a", tmp_path / "b")
    assert "in common: 2 (A has 3, B has 2)" in printed and "A better: 0, B better: 1, equal: 1" in printed
    assert "different answers: 1 of 2" in printed and "\n1.png\n" in printed


def test_answers_without_a_truth(tmp_path):
    rows = [("1", None, "red", None)]
    a = write_run(tmp_path / "a", rows)
    b = write_run(tmp_path / "b", [("1", None, "blue", None)])
    printed = run(a, b)
    assert "A better" not in printed and "truth:" not in printed and "  A: red\n  B: blue\n" in printed


@pytest.mark.parametrize("n_a, n_b, p", [(0, 0, 1), (1, 1, 1), (0, 5, 2 / 32), (8, 2, 2 * 56 / 1024), (5, 0, 2 / 32)])
def test_sign_test(n_a, n_b, p):
    assert compare.sign_test(n_a, n_b) == pytest.approx(p)


@pytest.mark.parametrize(
    "line", ["3", "[]", "{}", '{"id": "1"}', '{"id": "1", "prompt": "", "answer": 3, "truth": "", "group": "", "score": 1}',
             '{"id": "1", "prompt": "", "answer": "", "truth": [3], "group": "", "score": 1.0}', "x", ""],
)  # fmt: skip
def test_damaged_answers_are_one_line(tmp_path, line):
    a, b = write_run(tmp_path / "a", A), write_run(tmp_path / "b", B)
    (b / "answers.jsonl").write_text(line)
    assert "answers.jsonl" in refused(a, b)


def test_runs_that_cannot_be_compared_are_one_line(tmp_path):
    a, b = write_run(tmp_path / "a", A), write_run(tmp_path / "b", [("9", "red", "red", 1.0)])
    assert "no question in common" in refused(a, b)
    assert "nothing" in refused(a, tmp_path / "nothing")
    assert "--shown" in refused(a, b, "--shown", -1)
    old = write_run(tmp_path / "old", A, {"accuracy": 64.5})
    assert "older version" in refused(a, old)
    (old / "results.json").unlink()
    assert "results.json" in refused(a, old)
