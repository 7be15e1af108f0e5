"""The explanation page in a browser: its sections, what can be pointed at and selected, and text from outside.

    make_data(): invented numbers --write_page--> page.html --> chromium

    python -m tests.web.test_explain_page page.html docs/explain.png      # a screenshot of a page of sample.py
"""

import base64
import io
import json
import re
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from inference.explain_page import page as make_page
from inference.explain_page import write_page

ROOT = Path(__file__).resolve().parents[2]
PHONE, DESKTOP = 390, 1280
HOSTILE = "</script><script>console.log(1)</script><img src=x onerror=console.log(2)>&lt;{{data}}{{title}}<!--"
CONTROLS = "a\u202ereversed\u2066\x1b[31m\u2028\u200fb"  # direction, terminal colors, line separator


# --- data --------------------------------------------------------------------------------------------


def packed(*shape: int, values: bytes | None = None, per_cell: int = 1) -> dict:
    """Numbers as inference/explain.py packs them; without values, numbers that differ from row to row."""
    n, columns = shape[0] * shape[-1] if len(shape) > 1 else shape[0], shape[-1]
    values = values or bytes((37 * i + 11 * (i // columns)) % 256 for i in range(n))
    return {"shape": list(shape), "scale": 0.2, "data": base64.b64encode(values).decode(), "per_cell": per_cell}


def picture(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def make_data(
    n_image: int = 1, n_query: int = 4, grid: int = 4, n_text: int = 6, n_answer: int = 3, n_layer: int = 2,
    variant: str = "owl2", text: str = "word",
) -> dict:  # fmt: skip
    """An explanation of invented numbers. The prompt is n_image images, then n_text words. text: in all names."""
    tokens = []
    for i in range(n_image):
        for q in range(n_query + 1):
            name = f"query {q}" if q < n_query else "end of image"
            tokens.append({"id": -200, "text": name, "kind": "visual", "part": "prompt", "image": i, "query": q})
    n_prompt = len(tokens) + n_text
    for k in range(n_text + n_answer - 1):
        part = "prompt" if k < n_text else "answer"
        tokens.append({"id": k, "text": f" {text}{k}", "kind": "text", "part": part})
    for token in tokens:
        token["branch"] = token["kind"] if variant == "owl2" else None

    answer = []
    for i in range(n_answer):
        p = [0.5, 0.2, 0.1, 0.05, 0.01]
        lens = [{"layer": j + 1, "id": 7, "text": text, "p": 0.3, "p_answer": 0.25} for j in range(n_layer)]
        answer.append(
            {"position": n_prompt - 1 + i, "id": 100 + i, "text": f" {text}{n_text + i}", "lens": lens}
            | {"top": [{"id": 100 + i + k, "text": f" top-{i}-{k}{text}", "p": p[k]} for k in range(5)]}
            | {"on_image": 0.5, "on_prompt": 0.5 - 0.1 * (i > 0), "on_answer": 0.1 * (i > 0)}
            | {"attention": packed(n_prompt + i), "image_maps": packed(n_image, grid * grid)}
        )
    module = {"cls": "Owl", "file": "model.py", "line": 75, "parameters": 12345, "flops": 1e9, "copies": 1, "ms": 2.5}
    queries = {"maps": packed(n_query, grid * grid), "on_class": [0.1] * n_query, "on_queries": [0.2] * n_query}
    gradient = picture(Image.linear_gradient("L").resize((16 * grid, 16 * grid)).convert("RGB"))
    return {
        "model": {"name": text, "variant": variant, "dtype": "float32", "device": "cpu", "parameters": 12345},
        "images": [{"png": gradient, "size": 16 * grid, "patch_size": 16, "grid": [grid] * 2} for _ in range(n_image)],
        "vision": [{"name": f"block {i}", "shape": [17, 8], "ms": 1.5} for i in range(3)] * (n_image > 0),
        "queries": [queries] * n_image,
        "tokens": tokens,
        "reply": f"{text} 1\n{text} 2",
        "answer": answer,
        "modules": [
            module | {"name": "model", "input": [1, 9], "output": [1, 9, 20], "depth": 0},
            module | {"name": "vit.blocks.0", "input": None, "output": None, "depth": 2, "copies": 4, "ms": None},
            module | {"name": "vit.blocks.0.mlp.fc1", "input": [9], "output": [9], "depth": 3},
        ],
        "notes": ["A note.", text],
    }


def big_data() -> dict:
    """The size of a 7B: 64 queries, 1,024 patches, 1,101 positions, 512 answer tokens, 32 layers, two images.

    Thinned by the limits of inference/explain.py: 530,000 numbers in maps, 200,000 of attention, 4,000 predictions.
    """
    data = make_data(n_image=2, n_query=64, grid=32, n_text=460, n_answer=512, n_layer=7)
    photo = Image.effect_noise((448, 448), 80).convert("RGB")  # as bad for compression as a photo
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=70)
    for image in data["images"]:
        image["png"] = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    for entry in data["answer"]:
        entry["image_maps"] = packed(2, 256, per_cell=2)
        entry["attention"] = packed(-(-(entry["position"] + 1) // 3), per_cell=3)
    data["vision"] = data["vision"] * 9
    return data


@pytest.fixture
def show(new_page, tmp_path):
    """Writes and opens a page. Any request but that of the file itself fails the test, as does a console message."""

    def show(data: dict, width: int = DESKTOP, **options):
        path = tmp_path / "page.html"
        write_page(data, path)
        return open_file(new_page(width, **options), path)

    return show


def open_file(page, path: Path):
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or page.problems.append(f"request {r.url}"))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    return page


def drawn(page, selector: str) -> str:
    """The content of a canvas."""
    return page.eval_on_selector(selector, "canvas => canvas.toDataURL()")


def pixels_at(page, points: list[tuple[int, int]], n: int) -> list[list[int]]:
    """Colors on the large map of a query: RGBA at points of an n x n grid."""
    script = """(canvas, [points, n]) => {
      const { width, height } = canvas, { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
      return points.map(([x, y]) => 4 * (Math.round(y * height / n) * width + Math.round(x * width / n)))
        .map(i => [...data.slice(i, i + 4)]);
    }"""
    return page.eval_on_selector("#query-map", script, [points, n])


def shares(page) -> list[float]:
    """Heights of the bars on the boxes of the sequence, from 0 to 1."""
    script = "all => all.map(box => Number(box.style.getPropertyValue('--share')))"
    return page.eval_on_selector_all("#tokens button", script)


# --- content -----------------------------------------------------------------------------------------


def test_it_has_all_sections(show):
    page = show(make_data())
    assert page.title() == page.inner_text("h1") == "How word answered"
    assert page.locator("h2").all_inner_texts() == [
        "1. The image becomes patches",
        "2. Queries summarize the patches",
        "3. The language model reads one sequence",
        "4. The answer, token by token",
        "5. Where the work is done",
        "Notes",
    ]
    intro = page.inner_text("#image-intro")
    assert "64 \u00d7 64 pixels" in intro and "4 \u00d7 4 patches of 16 \u00d7 16 pixels" in intro
    assert page.locator("#layers li").count() == 3 and "[17, 8]" in page.inner_text("#layers")
    assert "1.5\u00a0ms" in page.inner_text("#layers")
    assert page.locator("#maps button").count() == 4
    assert page.locator("#tokens button").count() == 5 + 6 + 2
    assert page.locator("#tokens .visual").count() == 5
    assert page.locator("#tokens button").all_inner_texts()[4:6] == ["end", "\u00b7word0"]
    assert page.get_attribute("#tokens button:nth-child(1)", "data-branch") == "V"
    assert page.get_attribute("#tokens button:nth-child(6)", "data-branch") == "T"
    assert page.locator("#answer button").all_inner_texts() == ["\u00b7word6", "\u00b7word7", "\u00b7word8"]
    assert page.inner_text("#prompt") == "[image] word0 word1 word2 word3 word4 word5"
    assert page.inner_text("#reply") == "word 1\nword 2"
    assert page.locator("#notes li").all_inner_texts() == ["A note.", "word"]


def test_modules(show):
    page = show(make_data())
    rows = page.locator("#modules tbody tr")
    assert rows.nth(0).locator("th, td").all_inner_texts() == [
        "model", "Owl", "12,345", "1.00\u00a0G", "2.5", "[1, 9]", "[1, 9, 20]", "model.py:75",
    ]  # fmt: skip
    assert rows.nth(1).locator("th, td").all_inner_texts()[0] == "blocks.0 \u00d7 4"
    assert not rows.nth(2).is_visible()  # details are shown on demand
    page.click("#more")
    assert rows.nth(2).is_visible() and page.get_attribute("#more", "aria-pressed") == "true"
    page.click("#more")
    assert not rows.nth(2).is_visible()


def test_owl1_has_no_branches(show):
    page = show(make_data(variant="owl1"))
    assert page.locator("#tokens [data-branch]").count() == 0
    assert "same weights" in page.inner_text("#sequence-intro") and "branch" not in page.inner_text("main")


def test_without_an_image(show):
    page = show(make_data(n_image=0))
    assert "no image" in page.inner_text("#image-intro")
    for hidden in ("#image-part", "#queries-part", "#answer-figure", "#thumbs"):
        assert not page.is_visible(hidden)
    assert page.locator("#tokens button").count() == 6 + 2
    page.click("#answer button:nth-child(2)")
    assert "Token 2 of 3" in page.inner_text("#token-status")


def test_an_empty_answer(show):
    data = make_data(n_answer=1)
    data |= {"answer": [], "reply": ""}
    page = show(data)
    assert not page.is_visible("#answer-part") and page.inner_text("#reply") == "(empty)"
    page.click("#maps button:nth-child(2)")
    page.click("#tokens button:nth-child(2)")
    assert "query 1 of image 1" in page.inner_text("#position-status")


# --- interaction -------------------------------------------------------------------------------------


def test_a_query_is_shown_by_pointer_and_keyboard(show):
    page = show(make_data())
    first = drawn(page, "#query-map")
    page.hover("#maps button:nth-child(3)")
    third = drawn(page, "#query-map")
    assert third != first and "Query 2 " in page.inner_text("#query-status")
    assert page.get_attribute("#maps button:nth-child(1)", "aria-pressed") == "true"  # pointing does not select
    page.hover("h1")
    assert drawn(page, "#query-map") == first and "Query 0 " in page.inner_text("#query-status")

    page.click("#maps button:nth-child(3)")
    page.hover("h1")
    assert drawn(page, "#query-map") == third
    assert page.get_attribute("#maps button:nth-child(3)", "aria-pressed") == "true"
    page.keyboard.press("ArrowRight")
    assert "Query 3 " in page.inner_text("#query-status") and drawn(page, "#query-map") not in (first, third)
    page.keyboard.press("ArrowRight")  # at the end it stays
    assert "Query 3 " in page.inner_text("#query-status")
    page.keyboard.press("Home")
    assert "Query 0 " in page.inner_text("#query-status") and drawn(page, "#query-map") == first
    status = page.inner_text("#query-status")
    assert "70\u00a0% on patches, 10\u00a0% on the class token, 20\u00a0% on queries" in status


def test_a_query_is_shown_by_touch(show):
    page = show(make_data(), PHONE, has_touch=True, is_mobile=True)
    first = drawn(page, "#query-map")
    page.tap("#maps button:nth-child(2)")
    assert "Query 1 " in page.inner_text("#query-status") and drawn(page, "#query-map") != first


def test_the_veil_follows_the_numbers(show):
    """On an orange image: all of the color at the maximum, a darker orange for less, almost black for nothing."""
    data = make_data(n_query=1, grid=2)
    data["images"][0]["png"] = picture(Image.new("RGB", (32, 32), (255, 128, 0)))
    data["queries"][0]["maps"] = packed(1, 4, values=bytes([255, 0, 64, 255]))
    page = show(data)
    full, none, quarter = pixels_at(page, [(1, 1), (3, 1), (1, 3)], 4)
    assert full == [255, 128, 0, 255]
    assert max(none[:3]) < 70
    assert none[0] < quarter[0] < 255 and quarter[0] > quarter[1] > quarter[2]  # still orange
    assert "row 1, column 1" in page.inner_text("#query-status")
    assert "20\u00a0% per patch" in page.inner_text("#query-legend") and "25\u00a0%" in page.inner_text("#query-legend")


def test_a_map_with_cells_of_several_patches(show):
    """3 x 3 patches in cells of 2 x 2: the cells at the edge are cut."""
    data = make_data(n_query=1, grid=3)
    data["images"][0]["png"] = picture(Image.new("RGB", (48, 48), "white"))
    data["queries"][0]["maps"] = packed(1, 4, values=bytes([0, 0, 0, 255]), per_cell=2)
    page = show(data)
    dark, bright = pixels_at(page, [(7, 7), (9, 9)], 12)
    assert max(dark[:3]) < 70 and bright == [255] * 4
    assert "row 3\u20134, column 3\u20134" in page.inner_text("#query-status")


def test_an_answer_token_is_selected(show):
    page = show(make_data())
    assert "Token 1 of 3: \u201cword6\u201d, with a probability of 50\u00a0%" in page.inner_text("#token-status")
    first, first_map, first_strip = shares(page), drawn(page, "#answer-map"), drawn(page, "#strip")
    page.focus("#answer button:nth-child(1)")
    page.keyboard.press("ArrowRight")
    assert "Token 2 of 3" in page.inner_text("#token-status")
    assert page.get_attribute("#answer button:nth-child(2)", "aria-pressed") == "true"
    second = shares(page)
    assert first[11] == first[12] == 0 and second[11] > 0 and second[12] == 0  # position 11: the answer's first token
    assert page.get_attribute("#tokens .predicts", "aria-label").startswith("Position 11")
    assert drawn(page, "#strip") != first_strip

    top = page.locator("#top tbody tr")
    assert top.count() == 5 and "top-1-0word" in top.nth(0).inner_text() and "50\u00a0%" in top.nth(0).inner_text()
    widths = page.eval_on_selector_all("#top i", "all => all.map(bar => bar.style.width)")
    assert widths == ["50%", "20%", "10%", "5%", "1%"]
    assert page.locator("#lens tbody tr").count() == 2 and "25\u00a0%" in page.inner_text("#lens")
    names = page.locator("#share-key > span").all_inner_texts()
    assert names == ["image 50\u00a0%", "text of the prompt 40\u00a0%", "answer so far 10\u00a0%"]

    page.click("#tokens button:nth-child(12)")  # in the sequence: the answer's first token
    assert "Token 1 of 3" in page.inner_text("#token-status") and drawn(page, "#answer-map") == first_map


def test_attention_on_the_boxes(show):
    """The highest bar is on the position with the most attention, which the list names too."""
    data = make_data(n_answer=1)
    data["answer"][0]["attention"] = packed(4, values=bytes([10, 0, 255, 51]), per_cell=3)  # 11 positions
    page = show(data)
    assert shares(page) == pytest.approx([0.039] * 3 + [0] * 3 + [1] * 3 + [0.2] * 2, abs=0.001)
    assert "\u00b7word1" in page.locator("#most li").nth(0).inner_text()  # position 6
    assert "20\u00a0%" in page.locator("#most li").nth(0).inner_text()
    page.click("#tokens button:nth-child(10)")
    assert "\u00a0% each, positions 6\u20138" in page.locator("#most li").nth(0).inner_text()
    assert "It gets 4\u00a0% of the attention when \u201cword6\u201d is predicted" in page.inner_text("#position-status")


def test_the_answer_is_shown_as_it_is_printed(show):
    """Line breaks and characters of several tokens, which the tokens' own texts do not have."""
    page = show(make_data() | {"reply": "a\n\u00e9 \u202e"})
    assert page.inner_text("#reply") == "a\n\u00e9 \\u202e"


def test_a_map_of_zeros_has_no_strongest_patch(show):
    data = make_data(n_image=2)
    data["answer"][0]["image_maps"] = packed(2, 16, values=bytes([9] * 16 + [0] * 16))
    page = show(data)
    page.click("#answer-figure .chip:nth-child(2)")
    assert page.get_attribute("#answer-map", "aria-label").endswith("is predicted: almost none")


def test_a_visual_token_selects_its_query_and_image(show):
    data = make_data(n_image=2)
    data["images"][1]["png"] = picture(Image.new("RGB", (64, 64), "green"))
    page = show(data)
    before = drawn(page, "#grid"), drawn(page, "#answer-map")
    page.click("#tokens button:nth-child(8)")  # query 2 of the second image
    assert "query 2 of image 2, a visual token" in page.inner_text("#position-status")
    assert "Query 2 " in page.inner_text("#query-status")
    for group in page.locator(".image-choice").all():
        assert group.locator("button").evaluate_all("all => all.map(b => b.ariaPressed)") == ["false", "true"]
    after = drawn(page, "#grid"), drawn(page, "#answer-map")
    assert after[0] != before[0] and after[1] != before[1]
    page.click("#queries .image-choice button:nth-child(1)")
    assert drawn(page, "#grid") == before[0]


def test_the_strip_follows_color_scheme_and_width(show):
    page = show(make_data(), color_scheme="light")
    light = drawn(page, "#strip")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => document.getElementById('strip').toDataURL() !== before", arg=light)
    width = page.evaluate("document.getElementById('strip').width")
    page.set_viewport_size({"width": PHONE, "height": 800})
    page.wait_for_function("before => document.getElementById('strip').width < before", arg=width)


# --- accessibility and layout ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_axe_finds_nothing(show, scheme, width):
    """axe-core's rules: names, roles, contrast, structure. In a page with two images and details shown."""
    from axe_playwright_python.sync_playwright import Axe

    page = show(make_data(n_image=2), width, color_scheme=scheme)
    page.click("#more")
    page.click("#tokens button:nth-child(2)")
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_keyboard_order_and_names(show):
    page = show(make_data(n_image=2))
    for group in ("#maps", "#tokens", "#answer", "#image .image-choice"):
        buttons = page.locator(f"{group} button")
        assert page.locator(f"{group} [tabindex='0']").count() == 1
        buttons.nth(1).focus()
        assert buttons.evaluate_all("all => all.map(b => b.tabIndex)")[:2] == [-1, 0]
        style = buttons.nth(1).evaluate("b => (b.matches(':focus-visible'), getComputedStyle(b).outlineStyle)")
        assert style == "solid"
    assert page.get_attribute("#maps button:nth-child(1)", "aria-label") == "Query 0"
    name = page.get_attribute("#tokens button:nth-child(1)", "aria-label")
    assert name == "Position 0, visual token, query 0, visual branch"
    images = page.locator("[role=img]").evaluate_all("all => all.map(c => c.ariaLabel)")
    assert len(images) == 5 and all(images)
    assert page.locator("[aria-live=polite]").count() == 3
    assert page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("n_image", [0, 1, 3])
@pytest.mark.parametrize("text", ["word", "averylongtokenwithoutanyspace" * 9])
def test_a_phone_does_not_scroll_sideways(show, n_image, text):
    data = make_data(n_image=n_image, n_query=64, text=text)
    page = show(data, PHONE, has_touch=True, is_mobile=True)
    page.click("#more")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    boxes = page.eval_on_selector_all("#tokens button", "all => all.map(b => b.getBoundingClientRect().right)")
    assert max(boxes) <= PHONE


# --- text from outside, size -------------------------------------------------------------------------


@pytest.mark.parametrize("text", [HOSTILE, CONTROLS])
def test_text_from_outside_stays_text(show, text):
    data = make_data(text=text)
    for key in ("variant", "dtype", "device"):
        data["model"][key] = text
    for module in data["modules"]:
        module.update(name=text, cls=text, file=text)
    data["vision"][0]["name"] = text
    page = show(data)  # anything that ran or loaded would be a problem of show
    page.click("#tokens button:nth-child(7)")
    assert page.locator("script").count() == 2 and page.locator("img").count() == 1  # the image of the prompt
    shown = page.inner_text("body")
    if text == HOSTILE:
        assert page.inner_text("#notes li:nth-child(2)") == HOSTILE
        assert shown.count("<img src=x onerror=console.log(2)>") > 10
    else:
        assert not set(CONTROLS) & set("\u202e\u2066\x1b\u2028\u200f") & set(shown)
        assert "a\\u202ereversed\\u2066\\u001b[31m\\u2028\\u200fb" in page.inner_text("h1")
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', make_page(data), re.DOTALL)[1]
    assert json.loads(content) == data


def test_the_head_of_the_file():
    """sample.py overwrites only files that begin like its own. Nothing may be loaded."""
    text = make_page(make_data())
    assert '<meta name="generator" content="owlet --explain">' in text[:500]
    assert "default-src 'none'" in text and "http:" not in text and "https:" not in text
    assert "{{title}}" not in text and "{{data}}" not in text


def test_a_damaged_picture(show):
    data = make_data()
    data["images"][0]["png"] = "data:image/png;base64,AAAA"
    page = show(data)
    page.click("#maps button:nth-child(2)")
    assert "Query 1 " in page.inner_text("#query-status")


def test_a_page_of_a_7b(show):
    data = big_data()
    assert len(make_page(data).encode()) < 3_000_000
    start = time.perf_counter()
    page = show(data, PHONE)
    assert time.perf_counter() - start < 15
    script = "const start = performance.now(); selectToken(511); selectImage(1); performance.now() - start"
    assert page.evaluate(script) < 3000  # milliseconds
    assert "Token 512 of 512" in page.inner_text("#token-status")
    assert page.locator("#tokens button").count() == 130 + 460 + 511
    assert page.evaluate("document.getElementsByTagName('*').length") < 6000
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_what_sample_py_writes(new_page, tmp_path, capsys):
    """The whole path, with the embedded model: the answer on the page is the answer printed."""
    import sample

    path = tmp_path / "page.html"
    picture = str(ROOT / "assets" / "blue-rectangle.png")
    sample.main(["--device", "cpu", "--image", picture, "--prompt", "what color is the shape?", "--explain", str(path)])
    page = open_file(new_page(), path)
    assert page.inner_text("#reply") == capsys.readouterr().out.strip()
    assert page.locator("#modules tbody tr").count() > 20 and "llama.py:" in page.inner_text("#modules")
    first = drawn(page, "#query-map")
    page.hover("#maps button:nth-child(2)")
    assert drawn(page, "#query-map") != first


# --- a screenshot for the documentation --------------------------------------------------------------


def screenshot(source: Path, target: Path, width: int = DESKTOP, height: int = 1740) -> None:
    """Saves the top of an explanation page as a PNG of 256 colors."""
    from playwright.sync_api import sync_playwright

    from tests.web.conftest import CHROMIUM

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.goto(source.absolute().as_uri())
        page.wait_for_selector("body[data-ready]")
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    image.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
