"""Writes the data of inference/explain.py as one self-contained HTML page, which needs no network.

    explain_page.html (the template)      data
      | {{title}}   the model's name        |
      | {{data}}    JSON  <-----------------+
      v
    page.html

The page is safe with any text in the data: JSON has no "<" (it is written as \\u003c), and the page's code inserts
text as text, never as HTML. Its Content-Security-Policy forbids all loading.
"""

import html
import json
from pathlib import Path

from common.files import writing

TEMPLATE = Path(__file__).with_suffix(".html")


def page(data: dict) -> str:
    """Returns the page. data: what explain() returned."""
    before, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("{{title}}")
    between, _, after = rest.partition("{{data}}")
    title = html.escape(f"How {data['model']['name']} answered")
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return before + title + between + content + after


def write_page(data: dict, path: Path) -> None:
    """Writes the page, whole or not at all. Raises OSError."""
    with writing(path) as part:
        part.write_text(page(data), encoding="utf-8")
