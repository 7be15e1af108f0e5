"""docs/walkthrough.md: its blocks print what it says, its links lead to the lines that they name."""

import pytest

from tools.walkthrough import DOCUMENT, LINK, is_close, update_links, update_outputs


def test_the_document_is_true():
    """On a failure `python -m tools.walkthrough` shows the differences, and --write corrects the document."""
    document = DOCUMENT.read_text(encoding="utf-8")
    assert len(LINK.findall(document)) == document.count("#L") > 30, "a link to a line has another form than LINK"
    assert update_links(document) == document
    assert update_outputs(document) == document


def test_outputs_and_line_numbers_are_corrected():
    document = 'see [vit.py:7](../vit.py#L7 "class ViT(nn.Module):")\n\n```python\nx = 1 / 3\nprint(f"{x:.2f}")\n```\n'
    written = update_outputs(update_links(document))
    number = written.partition("vit.py:")[2].partition("]")[0]
    assert f"(../vit.py#L{number} " in written and number != "7"
    assert written.endswith("```\n```text\n0.33\n```\n")
    assert update_outputs(update_links(written)) == written
    assert update_outputs(written.replace("0.33", "0.35")) == written.replace("0.33", "0.35")  # close enough: kept
    assert update_outputs(written.replace("0.33", "0.36")) == written
    assert update_outputs(written.replace("print", "str")).endswith('str(f"{x:.2f}")\n```\n')


def test_a_link_must_name_one_line():
    for part in ("this text is in no line", "import"):
        with pytest.raises(ValueError, match="change the title of the link"):
            update_links(f'[vit.py:7](../vit.py#L7 "{part}")')


def test_numbers_with_a_decimal_point_may_differ_by_two_units():
    assert is_close("a 0.50 b -1.0", "a 0.52 b -0.8")
    assert not is_close("0.50", "0.53")
    assert not is_close("0.50", "0.5")
    assert not is_close("7", "8")
    assert not is_close("a 0.50", "b 0.50")
