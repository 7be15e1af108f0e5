"""Answer files for the test servers: their names, fields and types, and a workbook that other programs can read."""

import json
import zipfile
from xml.etree import ElementTree

import pytest

from evaluation.benchmarks import BENCHMARKS
from evaluation.question import Question
from evaluation.submission import write_submission, write_workbook
from test_benchmarks import FIXTURES, folder, read  # noqa: F401 (fixtures)

SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def read_sheet(path) -> list[list[str]]:
    """Returns the rows of the workbook's sheet; every other part of it is at least well-formed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: ElementTree.fromstring(archive.read(name)) for name in archive.namelist()}
    return [["".join(cell.itertext()) for cell in row] for row in parts["xl/sheet.xml"].iter(f"{SHEET}row")]


@pytest.mark.parametrize(
    "name, file, expected",
    [
        ("vqav2-testdev", "vqa_OpenEnded_mscoco_test-dev2015_owlet_results.json", {"question_id": int, "answer": str}),
        ("vizwiz-test", "vizwiz_results.json", {"image": str, "answer": str}),
    ],
)
def test_json_of_a_server(read, tmp_path, name, file, expected):  # noqa: F811
    questions = read(name)
    out = tmp_path / "out"
    out.mkdir()
    write_submission(name, tmp_path / name, out, [(question, "réd", None) for question in questions])
    rows = json.loads((out / file).read_text())
    assert len(rows) == len(questions) and {key: type(value) for key, value in rows[0].items()} == expected
    assert rows[0]["answer"] == "réd" and str(next(iter(rows[0].values()))) == questions[0].id


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("mmbench")])
def test_workbook_of_mmbench(read, tmp_path, name):  # noqa: F811
    """The table's columns without the image, and the answers as they are, in the table's order."""
    questions = read(name)
    answers = [f"<B> & {question.id}" for question in questions]
    write_submission(name, tmp_path / name, tmp_path, list(zip(questions, answers, [None] * len(questions)))[::-1])
    columns, *rows = read_sheet(tmp_path / f"{name}.xlsx")
    assert {"index", "question", "A", "B", "C", "D", "prediction"} <= set(columns) and "image" not in columns
    assert [dict(zip(columns, row))["index"] for row in rows] == [question.id for question in questions]
    assert [dict(zip(columns, row))["prediction"] for row in rows] == answers


def test_other_benchmarks_have_no_file(tmp_path):
    write_submission("pope", FIXTURES / "pope", tmp_path, [(Question("1", "?", [], "yes"), "yes", 1.0)])
    assert not list(tmp_path.iterdir())


def test_workbook_can_be_read_by_openpyxl(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    rows = [{"index": "1000005", "text": " a\n<&\x1b é"}, {"index": "7", "text": "007"}]
    write_workbook(tmp_path / "a.xlsx", rows)
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx").active
    assert [list(row) for row in sheet.values] == [["index", "text"], [1000005, " a\n<&\\x1b é"], [7, "007"]]
