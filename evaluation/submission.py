"""Answer files in the formats of the test servers: of splits whose truth is not published, and of all of MMBench.

    vqav2-testdev      vqa_OpenEnded_mscoco_test-dev2015_owlet_results.json    [{"question_id": 1, "answer": "red"}]
    vizwiz-test        vizwiz_results.json                                     [{"image": "a.jpg", "answer": "red"}]
    mmbench-...        mmbench-....xlsx    the columns of the published table without the image, and "prediction"

Servers compare the answers as they are: they normalize them, or find the letter, themselves.
"""

import json
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

from common.files import escape_controls, printable, writing
from evaluation.benchmarks import read_table
from evaluation.file_list import FILES
from evaluation.question import Results

VQA_FILE = "vqa_OpenEnded_mscoco_test-dev2015_owlet_results.json"
VIZWIZ_FILE = "vizwiz_results.json"

# The parts of an Excel workbook with one sheet, whose cells are all text. Path in the archive: content.
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
SHEET_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
WORKBOOK = {
    "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{SHEET_TYPE}.sheet.main+xml"/>'
    f'<Override PartName="/xl/sheet.xml" ContentType="{SHEET_TYPE}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships">'
    f'<Relationship Id="r1" Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}">'
    '<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships">'
    f'<Relationship Id="r1" Type="{OFFICE}/worksheet" Target="sheet.xml"/></Relationships>',
}


def write_submission(task: str, folder: Path, out: Path, results: Results) -> None:
    """Writes the answer file of a task that has a test server to `out`. folder: of the benchmark's files."""
    if task == "vqav2-testdev":
        path, rows = out / VQA_FILE, [{"question_id": int(q.id), "answer": answer} for q, answer, _ in results]
    elif task == "vizwiz-test":
        path, rows = out / VIZWIZ_FILE, [{"image": q.id, "answer": answer} for q, answer, _ in results]
    elif task.startswith("mmbench"):
        path, rows = out / f"{task}.xlsx", read_table(folder / FILES[task], "\t")
        answers = {question.id: answer for question, answer, _ in results}
        rows = [row | {"prediction": answers[row["index"]]} for row in rows if row["index"] in answers]
    else:
        return
    with writing(path) as part:
        if path.suffix == ".xlsx":
            write_workbook(part, [{name: row[name] for name in row if name != "image"} for row in rows])
        else:
            part.write_text(json.dumps(rows), encoding="utf-8")
    print(f"for the test server: {printable(path)}")


def write_workbook(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes rows as the only sheet of an Excel workbook, below a row of the columns' names.

    All cells are text, also "4" and "007", except those of the column "index".
    """
    lines = ["<row>" + "".join(map(text_cell, rows[0])) + "</row>"]
    for row in rows:
        cells = (f"<c><v>{int(text)}</v></c>" if name == "index" else text_cell(text) for name, text in row.items())
        lines.append("<row>" + "".join(cells) + "</row>")
    sheet = f'<worksheet xmlns="{MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**WORKBOOK, "xl/sheet.xml": sheet}.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{content}')


def text_cell(text: str) -> str:
    text = escape(escape_controls(text))  # XML cannot express most control characters
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
