"""Keeps docs/walkthrough.md true: runs its Python blocks and compares what they print, and checks its links to code.

    python -m tools.walkthrough            # prints what differs; exit code 1 if anything does
    python -m tools.walkthrough --write    # corrects the outputs and the line numbers

Two things in the document are checked; all else is prose:

    ```python                              the blocks run in order, in one namespace, in the project's root
    print(round(x, 2))
    ```
    ```text                                what the block above printed (absent if it prints nothing)
    0.42
    ```
    [vit.py:96](../vit.py#L96 "x = x.flatten(2).transpose(1, 2)")     a link, whose title is a part of that line:
                                                                     the only line of the file that contains it

A printed number with a decimal point may differ by two units of its last digit, since processors and versions of torch
round differently; --write leaves a block alone whose numbers are all so close. All else must be equal, except the number
of spaces.
"""

import contextlib
import difflib
import io
import re
import sys
from pathlib import Path

from command import ArgumentParser, log, run, user_errors

import torch

from common.files import writing

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(```text\n(?P<output>.*?)```\n)?", re.DOTALL)
LINK = re.compile(r'\[[^]\n]*:\d+\]\(\.\./(?P<file>[^)#\s]+)#L\d+ "(?P<title>[^"\n]+)"\)')
DECIMAL = re.compile(r"-?\d+\.\d+")


def update_links(document: str) -> str:
    """Returns the document with the right line numbers. Raises ValueError for a title that is not in exactly one line."""
    return LINK.sub(lambda match: link_to(match["file"], match["title"]), document)


def update_outputs(document: str) -> str:
    """Runs the blocks and returns the document with what they print. Exceptions are not caught; tracebacks show the document's lines."""
    namespace: dict[str, object] = {"__name__": "walkthrough"}

    def run_block(match: re.Match) -> str:
        n_above = document[: match.start("code")].count("\n")
        code = compile("\n" * n_above + match["code"], DOCUMENT.name, "exec")  # a traceback names the document's line
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(code, namespace)
        output = stdout.getvalue()
        if is_close(match["output"] or "", output):
            return match[0]
        return f"```python\n{match['code']}```\n" + (f"```text\n{output}```\n" if output else "")

    with contextlib.chdir(ROOT), torch.enable_grad():  # which restores the caller's gradient mode
        return BLOCK.sub(run_block, document)


def link_to(file: str, part: str) -> str:
    """Returns a link to the only line of a file that contains a text."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    numbers = [i for i, line in enumerate(lines, 1) if part in line]
    if len(numbers) != 1:
        raise ValueError(f"{file} has {len(numbers)} lines with {part!r}, not one: change the title of the link")
    return f'[{file}:{numbers[0]}](../{file}#L{numbers[0]} "{part}")'


def is_close(old: str, new: str) -> bool:
    """Whether two outputs are equal, except that numbers with a decimal point differ by two units of the last digit."""
    if [DECIMAL.sub("#", line).split() for line in old.splitlines()] != [
        DECIMAL.sub("#", line).split() for line in new.splitlines()
    ]:
        return False
    for a, b in zip(DECIMAL.findall(old), DECIMAL.findall(new)):
        n_digit = len(a.partition(".")[2])
        if len(b.partition(".")[2]) != n_digit or abs(float(a) - float(b)) > 2.001 * 10.0**-n_digit:
            return False
    return True


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="correct the document instead of printing the differences")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
    with user_errors():
        old = DOCUMENT.read_text(encoding="utf-8")
        linked = update_links(old)
    new = update_outputs(linked)
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "written", "now", lineterm="", n=1))
    print("\n".join(diff) or f"{DOCUMENT.relative_to(ROOT)} is up to date")
    if diff and args.write:
        with user_errors(), writing(DOCUMENT) as part:
            part.write_text(new, encoding="utf-8")
        log(f"{DOCUMENT.relative_to(ROOT)} is corrected")
    elif diff:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
