"""OwlEval's rating page in a browser: width, legend, count, warning, and the file that it saves.

    questions, answers --rating_page--> rate.html --> chromium --> ratings.json --count_ratings--> table
"""

import json

import pytest
from PIL import Image

from evaluation.owleval import GUIDE, count_ratings, rating_page
from evaluation.question import Question

PHONE, DESKTOP = 390, 1280
N = 6


@pytest.fixture
def open_rating(new_page, tmp_path):
    """open_rating(width) -> a page with N questions: conversations of two turns, the second without an image."""

    def open_page(width):
        Image.new("RGB", (300, 200), (30, 90, 200)).save(tmp_path / "a.jpg")
        results = []
        for i in range(0, N, 2):
            results.append((Question(str(i), f"<image>Ask {i}?", ["a.jpg"], group="a"), "Long answer. " * 40, None))
            results.append((Question(str(i + 1), "And?", [], group="f", before=[str(i)]), "Short.", None))
        published = {str(i): f"published {i}" for i in range(N)}
        html = rating_page(results, published, weights="mine", folder=tmp_path, seed=3)
        (tmp_path / "rate.html").write_text(html, encoding="utf-8")
        page = new_page(width, accept_downloads=True)
        page.goto((tmp_path / "rate.html").as_uri())
        return page

    return open_page


def rate(page, questions, grade="B"):
    for i in questions:
        for side in ("left", "right"):
            page.check(f'input[name="{i}{side}"][value="{grade}"]')


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_width_and_legend(open_rating, width):
    """The page fills the window without scrolling sideways; the legend is visible at the end of the page as well."""
    page = open_rating(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    body = page.locator("body").bounding_box()
    assert body["x"] + body["width"] >= width - 17 and body["x"] <= 1  # but for a scroll bar
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    for meaning in GUIDE.values():
        box = page.locator("header").get_by_text(meaning).bounding_box()
        assert 0 <= box["y"] < 300 and box["x"] + box["width"] <= width
    assert page.locator("header").bounding_box()["height"] < 300
    cards = [card.bounding_box() for card in page.locator(".question").last.locator(".card").all()]
    assert (cards[0]["y"] == cards[1]["y"]) == (width == DESKTOP)  # side by side


def test_count_warning_and_saved_file(open_rating, tmp_path):
    """A first click on save warns about unrated questions; a second one saves them as null."""
    page = open_rating(DESKTOP)
    assert page.inner_text("#count") == f"0 of {N} rated"
    rate(page, [0, 1, 5])
    page.check('input[name="2left"][value="A"]')  # one of two answers is not enough
    assert page.inner_text("#count") == f"3 of {N} rated" and page.inner_text("#warning") == ""
    page.click("button")
    assert page.inner_text("#warning").startswith("3 not rated") and page.locator(".unrated").count() == 3
    assert page.locator(".unrated").first.bounding_box()["y"] >= page.locator("header").bounding_box()["height"]
    rate(page, [3], "D")
    assert page.inner_text("#warning").startswith("2 not rated") and page.locator(".unrated").count() == 2
    with page.expect_download() as download:
        page.click("button")
    download.value.save_as(tmp_path / "ratings.json")
    rows = json.loads((tmp_path / "ratings.json").read_text())["ratings"]
    assert [row["ours"] for row in rows[:2]] == ["B", "B"] and rows[3]["published"] == "D"
    assert {rows[2]["ours"], rows[2]["published"]} == {"A", None} and rows[4]["ours"] is None
    assert f"rated: 4 of {N} questions" in count_ratings(tmp_path / "ratings.json")


def test_complete_ratings_are_saved_at_once_and_kept(open_rating):
    page = open_rating(DESKTOP)
    rate(page, range(N))
    with page.expect_download():
        page.click("button")
    page.reload()
    assert page.inner_text("#count") == f"{N} of {N} rated" and page.inner_text("#warning") == ""
