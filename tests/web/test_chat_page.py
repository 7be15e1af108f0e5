"""The chat page, serving/chat_page.html, in a browser.

    page in chromium --fetch--> StandIn: the routes of serve.py without a model (fast and deterministic)
                                serve.py: one test of the whole path

    python tests/web/test_chat_page.py http://127.0.0.1:8000     # docs/chat.png, from a running serve.py
"""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright  # noqa: E402

expect.set_options(timeout=20_000)  # milliseconds; the machine may be busy
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "serving" / "chat_page.html"
QUESTIONS = ["what color is the bar?", "how many shapes are there?", "is there a ring?", "what is the word?", "a fifth"]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b> &amp; *x*"


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png(size: tuple[int, int] = (64, 64), color: str = "teal") -> bytes:
    return encode(Image.new("RGB", size, color))


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def from_data_url(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


# --- a server without a model ------------------------------------------------------------------------


class StandIn(ThreadingHTTPServer):
    """serve.py's routes. The question selects what the answer is like, see Handler.answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.key = ""
        self.failures = 0  # the next requests of a path with "completions" or "explain" that fail
        self.requests: list[tuple[str, dict]] = []  # path and body
        self.hung_up = threading.Event()  # a client ended a slow answer
        self.explanation = "<!doctype html><meta charset=utf-8><title>x</title><h1>Explanation</h1>"

    def bodies(self, path: str = "/v1/chat/completions") -> list[dict]:
        return [body for other, body in self.requests if other == path]


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *args):
        pass

    def send(self, content: bytes, kind: str = "application/json", status: int = 200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_error_object(self, status: int, message: str):
        error = {"message": message, "type": "x", "param": None, "code": None}
        self.send(json.dumps({"error": error}).encode(), status=status)

    def allowed(self) -> bool:
        if not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self.send_error_object(401, "wrong key" if self.headers["Authorization"] else "a key is needed")
        return False

    def do_GET(self):
        if self.path == "/":
            self.send(PAGE.read_bytes(), "text/html")
        elif self.allowed() and self.path == "/v1/models":
            self.send(json.dumps({"object": "list", "data": [{"id": "stand-in", "object": "model"}]}).encode())
        elif self.path == "/scene":
            scene = {"image": data_url(png()), "caption": "a big red bar top left", "questions": QUESTIONS}
            self.send(json.dumps(scene).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.requests.append((self.path, body))
        if self.server.failures:
            self.server.failures -= 1
            self.send_error_object(503, "the queue is <b>full</b>")
        elif self.path == "/explain":
            self.send(self.server.explanation.encode(), "text/html")
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            content = body["messages"][-1]["content"]
            self.answer(content if isinstance(content, str) else content[-1]["text"])

    def chunk(self, delta: dict, finish: str | None = None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self.event(json.dumps({"object": "chat.completion.chunk", "choices": [choice]}, ensure_ascii=False))

    def event(self, data: str):
        content = f"data: {data}\n\n".encode()
        for start in range(0, len(content), 25):  # pieces that end anywhere, inside characters too
            self.wfile.write(content[start : start + 25])
            self.wfile.flush()

    def answer(self, question: str):
        self.chunk({"role": "assistant", "content": ""})
        if question in ("slow", "wait"):
            if question == "slow":
                self.chunk({"content": "one two"})
            try:
                while not self.server.hung_up.wait(0.02):
                    self.wfile.write(b": waiting\n\n")
            except OSError:
                self.server.hung_up.set()
            return
        if question == "break off":
            self.chunk({"content": "half an ans"})
            return
        if question == "fail late":
            self.chunk({"content": "half an ans"})
            self.event(json.dumps({"error": {"message": "out of memory"}}))
            self.event("[DONE]")
            return
        long = "W" * 3000 + " word" * 500
        texts = {"hostile": HOSTILE, "empty": "", "long": long, "emoji": "🦉 größer 大きい " * 9}
        for piece in re.findall(r"(?s).{1,40}", texts.get(question, f"answer to {question}")):
            self.chunk({"content": piece})
        self.chunk({}, "length" if question == "long" else "stop")
        self.event(json.dumps({"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}}))
        self.event("[DONE]")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.hung_up.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def chat(server: StandIn, browser: Browser) -> Iterator["Chat"]:
    chat = Chat(browser, server.url)
    yield chat
    assert not chat.errors
    chat.page.context.close()


class Chat:
    """The page and what a user does with it. errors: messages of the console, except of HTTP status codes."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, dark: bool = False):
        options = {"color_scheme": "dark" if dark else "light", "viewport": {"width": width, "height": 844}}
        self.page: Page = browser.new_context(**options, reduced_motion="reduce").new_page()
        self.page.set_default_timeout(20_000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self.on_console)
        self.page.goto(url)
        self.input = self.page.get_by_label("Question", exact=True)
        self.log = self.page.get_by_role("log")
        self.answers = self.page.locator(".answer > .text")
        self.pending = self.page.get_by_role("group", name="Images of the next question").get_by_role("img")

    def on_console(self, message):
        if message.type in ("error", "warning") and "the server responded with a status of" not in message.text:
            self.errors.append(message.text)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, text: str):
        self.input.fill(text)
        self.input.press("Enter")

    def ask_and_wait(self, text: str):
        self.ask(text)
        expect(self.answers.last).to_have_text(f"answer to {text}")
        expect(self.button("Send")).to_be_visible()

    def choose(self, *files: tuple[str, str, bytes]):
        """files: name, media type and content."""
        files = [{"name": name, "mimeType": kind, "buffer": content} for name, kind, content in files]
        self.page.locator("input[type=file]").set_input_files(files)

    def transfer(self, event: str, content: bytes, texts: dict[str, str] = {}):
        """Dispatches a paste or drag event with one PNG file and texts by media type."""
        self.page.evaluate(
            """([name, content, texts]) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(content), (x) => x.charCodeAt(0));
                transfer.items.add(new File([bytes], "x.png", { type: "image/png" }));
                for (const [type, text] of Object.entries(texts)) transfer.setData(type, text);
                const options = { bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer };
                const event = name === "paste" ? new ClipboardEvent(name, options) : new DragEvent(name, options);
                document.querySelector("textarea").dispatchEvent(event);
            }""",
            [event, base64.b64encode(content).decode(), texts],
        )


# --- questions and answers ---------------------------------------------------------------------------


def test_a_question_is_answered(chat, server):
    expect(chat.page.get_by_text("stand-in", exact=True)).to_be_visible()
    expect(chat.button("Send")).to_be_disabled()
    chat.input.fill("first line")
    chat.input.press("Shift+Enter")
    chat.input.press_sequentially("second")
    chat.input.press("Enter")
    expect(chat.answers).to_have_text("answer to first line\nsecond")
    (body,) = server.bodies()
    assert body["messages"] == [{"role": "user", "content": "first line\nsecond"}]
    assert body["stream"] is True and body["model"] == "stand-in"
    expect(chat.input).to_have_value("")
    expect(chat.input).to_be_focused()


def test_turns_resend_the_history_with_images(chat, server):
    image = png(color="red")
    chat.choose(("a.png", "image/png", image), ("b.png", "image/png", png(color="blue")))
    expect(chat.pending).to_have_count(2)
    chat.ask_and_wait("first")
    expect(chat.pending).to_have_count(0)
    chat.ask_and_wait("second")
    first, second = server.bodies()
    content = first["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0]["image_url"]["url"] == data_url(image)  # a small file is sent unchanged
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": "answer to first"},
        {"role": "user", "content": "second"},
    ]
    chat.button("New conversation").click()
    expect(chat.answers).to_have_count(0)
    chat.ask_and_wait("third")
    assert server.bodies()[-1]["messages"] == [{"role": "user", "content": "third"}]


def test_characters_survive_the_stream(chat):
    chat.ask("emoji")
    expect(chat.answers).to_have_text("🦉 größer 大きい " * 9)


def test_hostile_text_stays_text(chat, server):
    chat.ask("hostile")
    expect(chat.answers).to_have_text(HOSTILE)
    assert chat.answers.evaluate("element => element.children.length") == 0
    chat.ask(HOSTILE)
    expect(chat.page.locator(".question > .text").last).to_have_text(HOSTILE)
    expect(chat.answers.last).to_have_text(f"answer to {HOSTILE}")  # else the failure would be this answer's
    expect(chat.page).to_have_title("owlet: stand-in")
    server.failures = 1
    chat.ask("again")
    expect(chat.page.locator(".answer > .error").last).to_have_text("the queue is <b>full</b>")


def test_empty_and_long_answers(chat):
    chat.ask("empty")
    expect(chat.answers).to_have_text("(an empty answer)")
    chat.ask("long")
    expect(chat.log.get_by_text("Ended at max tokens.")).to_be_visible()


def test_settings_are_sent(chat, server):
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("0.7")
    chat.page.get_by_label("Max tokens").fill("32")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_label("Temperature")).to_be_hidden()
    chat.ask_and_wait("x")
    assert server.bodies()[0]["temperature"] == 0.7 and server.bodies()[0]["max_tokens"] == 32


def test_a_text_with_an_image_of_it_is_pasted_as_text(chat):
    chat.transfer("paste", png(), {"text/plain": "cells", "text/html": "<b>cells</b>"})
    chat.transfer("paste", png())
    expect(chat.pending).to_have_count(1)


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_the_text_so_far(chat, server, how):
    chat.ask("slow")
    expect(chat.answers).to_have_text("one two")
    chat.ask("more")  # not sent while an answer is running
    expect(chat.input).to_have_value("more")
    if how == "button":
        chat.button("Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    expect(chat.log.get_by_text("Stopped.")).to_be_visible()
    assert server.hung_up.wait(5)  # the connection was closed
    chat.ask_and_wait("next")
    assert server.bodies()[-1]["messages"][1] == {"role": "assistant", "content": "one two"}


def test_stop_before_the_first_token(chat, server):
    chat.ask("wait")
    expect(chat.log.get_by_text("Waiting for the first token")).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(chat.button("Try again")).to_be_visible()
    expect(chat.button("How did it answer?")).to_have_count(0)
    chat.ask_and_wait("next")
    assert server.bodies()[-1]["messages"] == [{"role": "user", "content": "next"}]


def test_a_new_conversation_stops_the_answer(chat, server):
    chat.ask("slow")
    expect(chat.answers).to_have_text("one two")
    chat.button("New conversation").click()
    assert server.hung_up.wait(5)
    expect(chat.answers).to_have_count(0)
    chat.ask_and_wait("next")


# --- errors ------------------------------------------------------------------------------------------


def test_a_failed_question_is_asked_again_or_edited(chat, server):
    chat.choose(("a.png", "image/png", png()))
    expect(chat.pending).to_have_count(1)
    server.failures = 2
    chat.ask("first")
    error = chat.page.locator(".answer > .error")
    expect(error).to_have_text("the queue is <b>full</b>")
    chat.button("Try again").click()
    expect(error).to_have_text("the queue is <b>full</b>")
    chat.button("Edit question").click()
    expect(chat.input).to_have_value("first")
    expect(chat.pending).to_have_count(1)
    chat.ask_and_wait("second")
    expect(chat.button("Try again")).to_have_count(0)
    messages = [body["messages"] for body in server.bodies()]
    assert messages[0] == messages[1] and len(messages[2]) == 1 and len(messages[2][0]["content"]) == 2


def test_a_question_without_an_answer_leaves_the_history(chat, server):
    server.failures = 1
    chat.ask("first")
    expect(chat.page.locator(".answer > .error")).to_be_visible()
    chat.ask_and_wait("second")
    assert server.bodies()[-1]["messages"] == [{"role": "user", "content": "second"}]


@pytest.mark.parametrize("question, message", [("fail late", "out of memory"), ("break off", "The connection ended")])
def test_an_error_within_an_answer(chat, question, message):
    chat.ask(question)
    expect(chat.page.locator(".answer > .error")).to_contain_text(message)
    expect(chat.answers).to_have_text("half an ans")
    expect(chat.button("Try again")).to_be_visible()


def test_a_server_that_is_gone(chat, server):
    expect(chat.page.get_by_text("stand-in", exact=True)).to_be_visible()
    server.socket.close()
    chat.ask("x")
    expect(chat.page.locator(".answer > .error")).to_contain_text("The server does not respond")
    chat.errors = [text for text in chat.errors if "ERR_CONNECTION" not in text]


def test_the_key_is_asked_for(browser, server):
    server.key = "secret"
    chat = Chat(browser, server.url)
    dialog = chat.page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("a key is needed")
    chat.page.get_by_label("Key", exact=True).fill("wrong")
    chat.page.keyboard.press("Enter")
    expect(dialog).to_contain_text("wrong key")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("alert")).to_have_text("wrong key")
    chat.ask("x")  # without the model's name, which the page was not told
    chat.page.get_by_label("Key", exact=True).fill("secret")
    chat.button("Continue").click()
    expect(chat.answers).to_have_text("answer to x")
    expect(dialog).to_be_hidden()
    assert "model" not in server.bodies()[0]
    assert not chat.errors
    chat.page.context.close()


# --- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_an_image_is_pasted_or_dropped(chat, server, event):
    content = png(color="green")
    if event == "drop":
        chat.transfer("dragover", content)
        expect(chat.page.locator("body")).to_have_class("dragging")
    chat.transfer(event, content)
    expect(chat.pending).to_have_count(1)
    expect(chat.page.locator("body")).not_to_have_class("dragging")
    assert chat.pending.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    chat.ask_and_wait("x")
    assert server.bodies()[0]["messages"][0]["content"][0]["image_url"]["url"] == data_url(content)


def test_large_images_are_scaled_down(chat, server):
    large = encode(Image.new("RGB", (3000, 1500), "orange"), "JPEG")
    small = encode(Image.new("RGB", (80, 40), "orange"), "GIF")
    noise = encode(Image.effect_noise((1000, 1200), 90).convert("RGB"))  # as large as a photo
    chat.choose(("a.jpg", "image/jpeg", large), ("b.gif", "image/gif", small), ("c.png", "image/png", noise))
    expect(chat.pending).to_have_count(3)
    chat.ask_and_wait("x")
    *images, _ = server.bodies()[0]["messages"][0]["content"]
    images = [from_data_url(part["image_url"]["url"]) for part in images]
    assert [(image.format, image.size) for image in images] == [
        ("JPEG", (1024, 512)), ("PNG", (80, 40)), ("JPEG", (853, 1024)),
    ]
    red, green, blue = images[0].convert("RGB").getpixel((500, 250))
    assert abs(red - 255) < 5 and abs(green - 165) < 5 and blue < 5


def test_pending_images_are_removed_and_others_refused(chat, server):
    chat.choose(("a.png", "image/png", png()), ("notes.txt", "text/plain", b"no image"))
    expect(chat.pending).to_have_count(1)
    expect(chat.page.get_by_role("alert")).to_contain_text("notes.txt is not an image")
    chat.button("Remove a.png").click()
    expect(chat.pending).to_have_count(0)
    chat.ask_and_wait("x")
    expect(chat.page.get_by_role("alert")).to_have_count(0)
    assert server.bodies()[0]["messages"][0]["content"] == "x"


def test_a_random_scene_has_suggestions(chat, server):
    chat.button("New random scene").first.click()
    expect(chat.pending).to_have_count(1)
    chat.button("New random scene").first.click()  # replaces the scene
    expect(chat.button("New random scene").first).to_be_enabled()
    suggestions = chat.page.get_by_role("group", name="Suggested questions").get_by_role("button")
    expect(suggestions).to_have_text(QUESTIONS[:4])
    expect(chat.pending).to_have_count(1)
    suggestions.nth(1).click()
    expect(chat.answers).to_have_text(f"answer to {QUESTIONS[1]}")
    expect(suggestions).to_have_text([QUESTIONS[0], *QUESTIONS[2:4]])
    assert server.bodies()[0]["messages"][0]["content"][0]["image_url"]["url"] == data_url(png())
    chat.page.get_by_text("What was drawn").click()
    expect(chat.log.get_by_text("a big red bar top left")).to_be_visible()


def test_a_random_scene_begins_a_new_conversation(chat, server):
    chat.ask_and_wait("first")
    chat.button("New random scene").click()
    expect(chat.pending).to_have_count(1)
    chat.ask_and_wait("second")
    expect(chat.page.get_by_text("The model no longer sees what is above.").last).to_be_visible()
    chat.ask_and_wait("third")
    texts = [[message["content"] for message in body["messages"]] for body in server.bodies()]
    assert texts[1][0][1]["text"] == "second"
    assert texts[2] == [texts[1][0], "answer to second", "third"]


# --- how did it answer? ------------------------------------------------------------------------------


def test_an_answer_is_explained_in_a_sandbox(chat, server):
    """The explanation's scripts run, but reach neither the chat page nor the server."""
    server.explanation = """<!doctype html><meta charset="utf-8"><h1>Explanation</h1><p id="found">nothing</p><script>
        let found = ["script ran"];
        try { found.push(parent.document.title) } catch { found.push("no parent") }
        fetch("SERVER/v1/models").then((x) => x.text(), () => "no server").then((text) => {
            document.getElementById("found").textContent = [...found, text].join(", ");
        });
    </script>""".replace("SERVER/", server.url)
    chat.ask_and_wait("first")
    chat.ask_and_wait("second")
    chat.button("How did it answer?").first.click()
    dialog = chat.page.get_by_role("dialog", name="How did it answer?")
    frame = chat.page.frame_locator("iframe")
    expect(frame.get_by_role("heading", name="Explanation")).to_be_visible()
    expect(frame.locator("#found")).to_have_text("script ran, no parent, no server")
    (body,) = server.bodies("/explain")
    answer = {"role": "assistant", "content": "answer to first"}
    assert body == {"messages": [{"role": "user", "content": "first"}, answer]}
    with chat.page.expect_download() as download:
        dialog.get_by_role("link", name="Save").click()
    assert Path(download.value.path()).read_text(encoding="utf-8") == server.explanation
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()
    expect(chat.page.locator("iframe")).to_have_count(0)
    refused = [text for text in chat.errors if "blocked by CORS policy" in text or "net::ERR_FAILED" in text]
    chat.errors = [text for text in chat.errors if text not in refused]


def test_an_explanation_that_fails(chat, server):
    chat.ask_and_wait("x")
    server.failures = 1
    chat.button("How did it answer?").click()
    expect(chat.page.locator(".answer > .error")).to_have_text("the queue is <b>full</b>")
    chat.button("How did it answer?").click()
    expect(chat.page.frame_locator("iframe").get_by_role("heading", name="Explanation")).to_be_visible()
    expect(chat.page.locator(".answer > .error")).to_be_hidden()


# --- layout and accessibility ------------------------------------------------------------------------


def test_only_finished_answers_are_announced(chat):
    status = chat.page.get_by_role("status")
    expect(chat.log).to_have_attribute("aria-live", "off")
    chat.ask("slow")
    expect(chat.answers).to_have_text("one two")
    expect(status).to_have_text("")
    chat.page.keyboard.press("Escape")
    expect(status).to_have_text("Answer: one two")


def test_all_controls_are_reached_by_keyboard(chat):
    chat.button("New random scene").first.click()
    expect(chat.pending).to_have_count(1)
    chat.ask_and_wait("x")
    chat.button("New random scene").last.click()
    expect(chat.pending).to_have_count(1)
    chat.button("New conversation").focus()
    names, outlines = [], []
    for _ in range(12):
        chat.page.keyboard.press("Tab")
        name, outline = chat.page.evaluate(
            """() => {
                const x = document.activeElement;
                const shown = x.id === "question" || getComputedStyle(x).outlineStyle !== "none";
                return [x.ariaLabel || x.textContent.trim() || x.id, shown];
            }"""
        )
        names.append(name)
        outlines.append(outline)
    expected = ["Settings", "Conversation", "What was drawn", "How did it answer?", *QUESTIONS[:4]]
    expected += ["Remove random scene", "question", "Choose images", "New random scene"]  # Send is disabled
    assert names == expected and all(outlines)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_and_is_legible(browser, server, width, dark):
    chat = Chat(browser, server.url, width, dark)
    server.failures = 1
    chat.ask("first")
    expect(chat.button("Try again")).to_be_visible()
    chat.choose(*[("a.png", "image/png", png()), ("b.png", "image/png", png((1000, 300)))] * 3)
    expect(chat.pending).to_have_count(6)
    chat.ask("long")
    expect(chat.button("How did it answer?")).to_be_visible()
    chat.button("New random scene").click()
    expect(chat.pending).to_have_count(1)
    chat.input.fill("M" * 500)
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
    assert chat.page.get_by_role("main").evaluate("main => main.scrollWidth <= main.clientWidth")
    low = {text: value for text, value in chat.page.evaluate(CONTRASTS).items() if value < 4.5}
    assert not low
    assert not chat.errors
    chat.page.context.close()


# The contrast of each visible text with the next opaque background, by WCAG's formula.
CONTRASTS = """() => {
    const parse = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => {
        const [r, g, b] = parse(color).map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (element) => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if ((parse(color)[3] ?? 1) === 1) return color;
        }
    };
    const found = {};
    for (const element of document.querySelectorAll("body *")) {
        const text = [...element.childNodes].filter((x) => x.nodeType === 3).map((x) => x.data.trim()).join(" ").trim();
        if (!(text || element.tagName === "TEXTAREA") || !element.checkVisibility()) continue;
        if (element.matches(":disabled, :disabled *")) continue;
        const values = [getComputedStyle(element).color, background(element)].map(luminance).sort((a, b) => a - b);
        found[element.className + " " + text.slice(0, 40)] = (values[1] + 0.05) / (values[0] + 0.05);
    }
    return found;
}"""


# --- the real server ---------------------------------------------------------------------------------


@pytest.fixture
def real_url(tmp_path: Path) -> Iterator[str]:
    """serve.py with the embedded model."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with open(tmp_path / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, "serve.py", "--port", "0"], cwd=ROOT, stderr=log)
        try:
            deadline = time.monotonic() + 100
            while not (found := re.search(r"http://\S+:\d+", (tmp_path / "log").read_text(encoding="utf-8"))):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def test_with_the_real_server(browser, real_url):
    chat = Chat(browser, real_url)
    chat.page.set_default_timeout(60_000)
    chat.button("New random scene").first.click()
    expect(chat.pending).to_have_count(1, timeout=60_000)
    suggestions = chat.page.get_by_role("group", name="Suggested questions").get_by_role("button")
    n_question = suggestions.count()
    assert 3 <= n_question <= 4
    for _ in range(n_question):  # each continues the conversation
        question = suggestions.first.text_content()
        suggestions.first.click()
        expect(chat.page.locator(".question > .text").last).to_have_text(question)
        expect(chat.button("Send")).to_be_visible(timeout=60_000)
    expect(chat.page.locator(".answer > .error").filter(visible=True)).to_have_count(0)
    chat.button("How did it answer?").last.click()
    explanation = chat.page.frame_locator("iframe")
    expect(explanation.get_by_role("heading").first).to_be_visible(timeout=60_000)
    chat.button("Close").click()
    assert not chat.errors
    chat.page.context.close()


def take_screenshot(url: str, path: Path):
    """Two suggested questions about a random scene."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        chat = Chat(browser, url)
        chat.page.set_viewport_size({"width": 760, "height": 880})
        chat.button("New random scene").first.click()
        for count in (1, 2):
            chat.page.get_by_role("group", name="Suggested questions").get_by_role("button").first.click()
            expect(chat.button("How did it answer?")).to_have_count(count)
        chat.page.mouse.move(0, 0)
        chat.page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    take_screenshot(sys.argv[1], ROOT / "docs" / "chat.png")
