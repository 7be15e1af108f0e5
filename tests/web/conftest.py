"""A headless Chromium for the tests of pages: Debian's chromium, driven by playwright (requirements-web.txt).

Without chromium or playwright the tests are skipped. Where playwright should be there, under `make test-web` (which
sets OWLET_WEB) and in continuous integration (CI), a missing one is an error.
"""

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    if not {"OWLET_WEB", "CI"} & set(os.environ):
        pytest.importorskip("playwright", reason="pip install -r requirements-web.txt")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser):
    """Opens a page of a width. After the test: no error and no message in the console."""
    contexts = []
    problems = []

    def open_page(width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce", **options)
        context.set_default_timeout(20_000)  # milliseconds; the machine may be busy
        contexts.append(context)
        page = context.new_page()
        page.problems = problems
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
