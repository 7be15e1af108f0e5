"""serve.py: the chat endpoint with OpenAI's own client, on a loopback port, and what bad clients do."""

import asyncio
import base64
import http.client
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
import uvicorn
from PIL import Image

import sample
import serve
from conftest import GOLDEN, ROOT
from data.image import DEFAULT_FIT, load_image, to_pixels
from data.shapes.prepare import make_scene, questions_about, render
from data.text import Tokenizer, expand_images, render_prompt
from generate import generate
from model import Owl
from serving.app import is_own_host, make_app
from serving.engine import Engine, StopStrings
from serving.openai_api import Limits, Message, render_question, split_turns
from training.presets import PRESETS, init_weights
from weights import load_model, save_model

TINY = ROOT / "checkpoints" / "tiny-owl2"
LIMITS = Limits(body=2_000_000, pixels=1_000_000, images=4, new_tokens=24)
LONG = 2500  # tokens of an answer that would take many seconds


@contextmanager
def serving(app: object) -> Iterator[int]:
    """Serves an application with uvicorn in another thread. Yields the port."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def make_engine(folder: Path) -> Engine:
    return serve.make_server(serve.parse_flags(["--weights", str(folder), "--device", "cpu", "--sessions", "3"]))[1]


def client_of(port: int, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def tiny() -> Iterator[SimpleNamespace]:
    """A server of the embedded model: engine, port, client."""
    engine = make_engine(TINY)
    with serving(make_app(engine, LIMITS, 256, "127.0.0.1", None)) as port:
        yield SimpleNamespace(engine=engine, port=port, client=client_of(port))
    engine.stop()
    engine.thread.join(20)
    assert not engine.thread.is_alive()


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A server of a random model that never generates </s>, so that its answers take long, for one waiting request."""
    torch.manual_seed(0)
    config = PRESETS["tiny-owl2"]()
    config.llama.vocab_size, config.llama.context = 2000, 4000
    model = init_weights(Owl(config))
    model.llama.lm_head.weight.data[config.llama.eos_id] = 0
    folder = tmp_path_factory.mktemp("endless")
    save_model(model, folder)
    shutil.copy(GOLDEN / "text" / "tokenizer.model", folder)
    engine = make_engine(folder)
    limits = Limits(body=2_000_000, pixels=1_000_000, images=4, new_tokens=LONG)
    with serving(make_app(engine, limits, 1, "127.0.0.1", None)) as port:
        yield SimpleNamespace(engine=engine, port=port, client=client_of(port), name=folder.name)
    engine.stop()
    engine.thread.join(20)


# --- messages and the answers expected to them ---


def picture(seed: int) -> bytes:
    """A PNG of a random scene."""
    rng, file = random.Random(seed), io.BytesIO()
    render(make_scene(rng), rng).save(file, "PNG")
    return file.getvalue()


def image_part(content: bytes, kind: str = "png") -> dict:
    url = f"data:image/{kind};base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: bytes | str) -> dict:
    content = [image_part(part) if isinstance(part, bytes) else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def expected(model: Owl, folder: Path, turns: list[str | None], images: list[bytes], n: int = 24) -> str:
    """The greedy answer, computed without the server."""
    tokenizer, config = Tokenizer(folder), model.config
    ids, _ = expand_images(render_prompt(turns, tokenizer, config.variant), None, config.n_visual_tokens)
    pixels = [to_pixels(load_image(image), config.image_size, DEFAULT_FIT[config.variant]) for image in images]
    cache, pixels = model.llama.make_cache(1, config.llama.context), torch.stack(pixels) if pixels else None
    tokens = generate(model, torch.tensor([ids]), pixels, max_new_tokens=n, cache=cache)
    return tokenizer.decode([int(token) for token in tokens])


def ask(client: openai.OpenAI, messages: list[dict], **options: object):
    return client.chat.completions.create(model=options.pop("model", "tiny-owl2"), messages=messages, **options)


def text_of(completion) -> str:
    return completion.choices[0].message.content


def streamed(client: openai.OpenAI, messages: list[dict], **options: object) -> tuple[str, str, list]:
    """(text, finish_reason, chunks) of a streamed answer."""
    chunks = list(ask(client, messages, stream=True, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason, chunks


def post(port: int, body: bytes | object, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
    """(status, JSON) of a request that OpenAI's client would not send."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content)


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


# --- answers ---


def test_answers_equal_those_of_sample(tiny, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(1))
    for question in ("what color is the shape?", "what word is written?"):
        sample.main(["--image", str(tmp_path / "a.png"), "--prompt", question, "--max-new-tokens", "24"])
        answer = capsys.readouterr().out.removesuffix("\n")
        messages = [user(picture(1), question)]
        completion = ask(tiny.client, messages)
        assert text_of(completion) == answer
        text, finish_reason, chunks = streamed(tiny.client, messages, stream_options={"include_usage": True})
        assert (text, finish_reason) == (answer, completion.choices[0].finish_reason)
        usage = chunks[-1].usage
        assert usage.prompt_tokens == completion.usage.prompt_tokens == usage.total_tokens - usage.completion_tokens
        assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"


def test_a_conversation_is_not_processed_again(endless, record_calls, no_near_ties):
    """Each turn processes its new tokens and images only, and its answer equals the one computed alone."""
    model, folder = endless.engine.sessions[0].model, endless.engine.blank.tokenizer.path.parent
    reference = load_model(folder)
    processed, encoded = record_calls(model.llama), record_calls(model.vit)
    messages, turns, images, n_before = [], [], [], 0
    for parts in (("What?", picture(1)), (picture(2), "And ", picture(1), "?"), ("Why?",)):
        new = [part for part in parts if isinstance(part, bytes)]
        messages.append(user(*parts))
        first = "<image>What?" if parts[0] == "What?" else None  # images after all text move to the front
        turns += [first or "".join("<image>" if isinstance(part, bytes) else part for part in parts), None]
        images += new
        processed.clear(), encoded.clear()
        completion = ask(endless.client, messages, max_tokens=6, model=endless.name)
        turns[-1] = text_of(completion)
        assert turns[-1] == expected(reference, folder, [*turns[:-1], None], images, 6)
        assert completion.choices[0].finish_reason == "length" and completion.usage.completion_tokens == 6
        assert sum(len(x) for x, _ in encoded) == len(new)
        n_prompt, n_cached = completion.usage.prompt_tokens, completion.usage.prompt_tokens_details.cached_tokens
        assert sum(x.shape[1] for x, _ in processed) == n_prompt - n_cached + 5  # the last token is not processed
        assert n_cached >= n_before - 1
        messages.append(assistant(turns[-1]))
        n_before = n_prompt

    # Other conversations in between take other sessions; this one is still there.
    for seed in (3, 4):
        ask(endless.client, [user(picture(seed), "What is it?")], max_tokens=2, model=endless.name)
    messages.append(user("Why?"))
    completion = ask(endless.client, messages, max_tokens=2, model=endless.name)
    assert completion.usage.prompt_tokens_details.cached_tokens > n_before - 2


def test_equal_text_about_another_image_uses_no_cache_of_it(tiny):
    model = load_model(TINY)
    question = "what color is the shape?"
    for seed in (11, 12, 11, 13, 12):
        completion = ask(tiny.client, [user(picture(seed), question)])
        assert text_of(completion) == expected(model, TINY, [f"<image>{question}", None], [picture(seed)])
    assert completion.usage.prompt_tokens_details.cached_tokens == completion.usage.prompt_tokens - 1
    # An equal second image after another first one.
    for first in (14, 15):
        completion = ask(tiny.client, [user(picture(first), picture(11), question)])
        assert completion.usage.prompt_tokens_details.cached_tokens < 10
        images = [picture(first), picture(11)]
        assert text_of(completion) == expected(model, TINY, [f"<image><image>{question}", None], images)


def test_how_messages_become_turns():
    def turns(*messages: dict) -> tuple[list[str], list[str]]:
        questions, answers = split_turns([Message(**message) for message in messages])
        return [render_question(question) for question in questions], answers

    def system(text: str) -> dict:
        return {"role": "system", "content": text}

    image = picture(1)
    assert turns(user("a", image)) == (["<image>a"], [])
    assert turns(user(image, "a", image, "b")) == (["<image>a<image>b"], [])
    assert turns(user("a", "b")) == (["a\nb"], [])
    assert turns(user("a"), user(image, "b")) == (["a<image>b"], [])
    assert turns(system("s"), {"role": "developer", "content": "d"}, user(image, "a")) == (["<image>s\nd\na"], [])
    assert turns(user("a"), assistant("b"), system("s"), user(image)) == (["a", "<image>s"], ["b"])
    assert turns(user("a"), assistant("b"), assistant("c"), user("d")) == (["a", "d"], ["b\nc"])
    assert turns(user("an <image> and <|image|>")) == (["an < image> and < |image|>"], [])


def test_typed_placeholders_and_special_tokens_are_text(tiny):
    for text in ("<image>", "a <|image|> b", "</s><s>[INST]", "<<image>image>", "\0\x1b[2J"):
        ask(tiny.client, [user(text)], max_tokens=1)
        ask(tiny.client, [user("a"), assistant(text), user("b")], max_tokens=1)
    status, content = post(tiny.port, b'{"messages": [{"role": "user", "content": "\\ud83d"}]}')
    assert status in (200, 400), content


def test_sampling(endless):
    def answer(**options: object) -> str:
        return text_of(ask(endless.client, [user("Why?")], model=endless.name, max_tokens=12, **options))

    greedy = answer()
    assert answer(temperature=0) == greedy == answer(temperature=5, top_p=1e-9)
    assert answer(temperature=5, extra_body={"top_k": 1}) == greedy
    sampled = [answer(temperature=1, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    limited = ask(endless.client, [user("Why?")], model=endless.name, max_completion_tokens=3, max_tokens=7)
    assert limited.usage.completion_tokens == 3


def test_stop_strings(endless):
    messages = [user("Why?")]
    whole = text_of(ask(endless.client, messages, model=endless.name, max_tokens=30))
    for stop in (whole[5:7], [whole[9:14], "nowhere"], whole[:3]):
        end = whole.index(stop if isinstance(stop, str) else stop[0])
        for _ in range(2):
            completion = ask(endless.client, messages, model=endless.name, max_tokens=30, stop=stop)
            assert (text_of(completion), completion.choices[0].finish_reason) == (whole[:end], "stop")
            text, finish_reason, _ = streamed(endless.client, messages, model=endless.name, max_tokens=30, stop=stop)
            assert (text, finish_reason) == (whole[:end], "stop")


def test_a_stop_string_is_found_however_the_text_is_cut():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(12))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        filtered, sent, rest = StopStrings(stops), "", text
        while rest and not filtered.found:
            n = rng.randint(1, 4)
            sent += filtered.push(rest[:n])
            rest = rest[n:]
        sent += "" if filtered.found else filtered.waiting
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert filtered.found == bool(found)
        assert sent == (text[: min(found)[1]] if found else text)


# --- other routes ---


def test_models_and_health(tiny):
    assert [model.id for model in tiny.client.models.list()] == ["tiny-owl2"]
    assert tiny.client.models.retrieve("tiny-owl2").object == "model"
    assert json.loads(get(tiny.port, "/health")[1])["status"] == "ok"


def test_a_scene_can_be_asked_about(tiny):
    scene = json.loads(get(tiny.port, "/scene")[1])
    assert scene["caption"] and len(scene["questions"]) > 3
    content = base64.b64decode(scene["image"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(content)).size == (64, 64)
    for question in scene["questions"]:
        assert text_of(ask(tiny.client, [user(content, question)]))
    assert json.loads(get(tiny.port, "/scene")[1])["image"] != scene["image"]


def test_an_answer_is_explained(tiny):
    """With the tokens that were generated, if a session still has them, else with those of the answer's text."""

    def explain(answer: str) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", tiny.port, timeout=60)
        body = json.dumps({"messages": [question, assistant(answer)]})
        connection.request("POST", "/explain", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        html = response.read().decode()
        connection.close()
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/html")
        return json.loads(re.search(r'<script [^>]*type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)[1])

    question = user(picture(31), "what color is the shape?")
    answer = text_of(ask(tiny.client, [question]))
    data = explain(answer)
    tokens = list(tiny.engine.sessions[-1].answer_ids)
    assert [token["id"] for token in data["answer"]] == tokens
    assert len(data["images"]) == 1 and data["model"]["name"] == "tiny-owl2"
    other = explain(answer + " <image> thing")
    assert len(other["notes"]) == len(data["notes"]) + 1 and len(other["images"]) == 1
    ask(tiny.client, [question])
    assert [token["id"] for token in explain(answer)["answer"]] == tokens  # no session was disturbed
    for messages in ([question], [question, assistant("")], [question, assistant("long " * 3000)], [assistant("a")]):
        assert post(tiny.port, {"messages": messages}, "/explain")[0] == 400


# --- errors ---


def test_errors_have_types(tiny):
    messages = [user("a")]
    for options in (
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 1},
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"stop": ""},
        {"extra_body": {"temperature": "hot"}},
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask(tiny.client, messages, **options)
        assert error.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as error:
        ask(tiny.client, messages, model="gpt-9")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        tiny.client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError) as error:
        ask(tiny.client, [user("long " * 3000)])
    assert error.value.code == "context_length_exceeded"
    harmless = {"n": 1, "tools": [], "user": "me", "logit_bias": {}, "store": True, "unknown": [1]}
    ask(tiny.client, messages, extra_body=harmless)
    for path, method, status in (("/v2", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/scene", "DELETE", 405)):
        answer = get(tiny.port, path, method)
        assert answer[0] == status and set(json.loads(answer[1])["error"]) == {"message", "type", "param", "code"}


def png_header(width: int, height: int) -> bytes:
    """The begin of a PNG that says that it is large."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def message_with(url: object) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
BAD_BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "a list": [],
    "no messages": {},
    "null messages": {"messages": None},
    "empty messages": {"messages": []},
    "nested": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested unknown": b'{"messages":[{"role":"user","content":"a"}],"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a text as message": {"messages": ["a"]},
    "role": {"messages": [{"role": "tool", "content": "a"}]},
    "no content": {"messages": [{"role": "user"}]},
    "content": {"messages": [{"role": "user", "content": 1}]},
    "part": {"messages": [{"role": "user", "content": ["a"]}]},
    "part type": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    "part without text": {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    "only instructions": {"messages": [{"role": "system", "content": "a"}]},
    "answer first": {"messages": [assistant("a"), user("b")]},
    "answer last": {"messages": [user("a"), assistant("b")]},
    "image of the assistant": {"messages": [user("a"), user(picture(1)) | {"role": "assistant"}, user("b")]},
    "many messages": {"messages": [user("a")] * 3000},
    "many images": {"messages": [user(*[picture(1)] * 5)]},
    "types": {"messages": [user("a")], "max_tokens": "5"},
    "bool": {"messages": [user("a")], "max_tokens": True},
    "stop": {"messages": [user("a")], "stop": [1]},
    "huge number": b'{"messages":[{"role":"user","content":"a"}],"temperature":1e999}',
    "NaN": b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}',
    "huge seed": {"messages": [user("a")], "seed": 2**70},
    "huge integer": b'{"messages":[{"role":"user","content":"a"}],"seed":' + b"9" * 100_000 + b"}",
    "url": message_with("a"),
    "no url": message_with({}),
    "http": message_with({"url": "http://127.0.0.1:9/a.png"}),
    "file": message_with({"url": "file:///etc/passwd"}),
    "path": message_with({"url": "/etc/passwd"}),
    "text": message_with({"url": "data:text/plain;base64,aGk="}),
    "no base64": message_with({"url": "data:image/png;base64,%%%"}),
    "base64 padding": message_with({"url": "data:image/png;base64,aGk"}),
    "no image": {"messages": [user(b"hello")]},
    "empty image": {"messages": [user(b"")]},
    "truncated": {"messages": [user(picture(1)[:200])]},
    "bomb": {"messages": [user(png_header(60_000, 60_000))]},
    "large": {"messages": [user(png_header(1500, 1500))]},
    "no pixels": {"messages": [user(png_header(0, 0))]},
    "program": {"messages": [user(POSTSCRIPT)]},
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_requests(tiny, name):
    """Each is an error 400 in OpenAI's format, soon, that shows nothing of the server's inside."""
    start = time.monotonic()
    status, content = post(tiny.port, BAD_BODIES[name])
    assert status == 400 and set(content["error"]) == {"message", "type", "param", "code"}, content
    message = content["error"]["message"]
    assert 5 < len(message) < 500 and " object at 0x" not in message and str(ROOT) not in message, message
    assert time.monotonic() - start < 5


def test_no_address_is_fetched(tiny):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        assert post(tiny.port, message_with({"url": address}))[0] == 400
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "MPO"])
def test_image_formats(tiny, kind):
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).save(file, kind)
    ask(tiny.client, [user("a", file.getvalue())], max_tokens=1)


def test_requests_of_harnesses(tiny):
    """docs/harnesses.md: the fields that VLMEvalKit sends, ignored fields, and values that are not what they seem."""
    jpeg = io.BytesIO()
    Image.open(ROOT / "assets/blue-rectangle.png").convert("RGB").save(jpeg, "JPEG")
    part = image_part(jpeg.getvalue(), "jpeg")
    question = {"type": "text", "text": "what color is the shape?"}
    system = {"role": "system", "content": "Be short."}

    def answer_to(*parts: dict, before: list[dict] = [], **options: object) -> tuple[int, dict]:
        return post(tiny.port, {"messages": [*before, {"role": "user", "content": parts}], **options})

    vlmevalkit = {"model": "tiny-owl2", "n": 1, "temperature": 0.0, "max_tokens": 32768}
    ignored = {"repetition_penalty": 1.3, "min_p": 0.1, "num_beams": 5, "do_sample": False, "best_of": 1}
    ignored |= {"max_new_tokens": 1, "chat_template_kwargs": {}, "reasoning_effort": "high"}
    neutral = {"logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0, "top_p": None, "stop": None, "tools": []}
    detailed = {"type": "image_url", "image_url": part["image_url"] | {"detail": "high"}}
    mislabeled = {"type": "image_url", "image_url": {"url": part["image_url"]["url"].replace("jpeg", "png")}}
    for status, content in (
        answer_to(part, question, **vlmevalkit),
        answer_to(part, question, before=[system], **vlmevalkit),
        answer_to(detailed, question, **ignored),
        answer_to(question, mislabeled, **neutral),
    ):
        assert status == 200 and content["choices"][0]["message"]["content"] == "blue"
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    bare = {"type": "image_url", "image_url": {"url": part["image_url"]["url"].partition(",")[2]}}
    assert answer_to(video, question)[0] == answer_to(bare, question)[0] == 400
    for refused in ({"top_k": -1}, {"top_k": 0}, {"top_p": 0}, {"top_logprobs": 5}, {"max_tokens": 0}, {"n": 2}):
        assert answer_to(part, question, **refused)[0] == 400


def test_the_body_is_limited(tiny):
    for chunks in (False, True):
        connection = http.client.HTTPConnection("127.0.0.1", tiny.port, timeout=60)
        body = b" " * 3_000_000
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", iter([body[:9], body]) if chunks else body, headers)
        response = connection.getresponse()
        assert response.status == 413 and json.loads(response.read())["error"]["code"] == "request_too_large"
        connection.close()
    assert post(tiny.port, {"messages": [user("a")]}, Content_Type="text/plain")[0] == 415


def test_an_error_while_answering(tiny, monkeypatch):
    """It is an error 500, or an event of the stream if that has begun; the thread goes on."""
    sessions = tiny.engine.sessions
    original = sessions[0].decode

    def broken(*arguments: object, **options: object) -> Iterator[torch.Tensor]:
        tokens = list(original(*arguments, **options))
        yield from tokens[: tiny.n_good]
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        for session in sessions:
            patch.setattr(session, "decode", broken)
        tiny.n_good = 0
        with pytest.raises(openai.InternalServerError) as error:
            ask(tiny.client, [user("what?")])
        assert "secret" not in str(error.value)
        with pytest.raises(openai.InternalServerError):
            streamed(tiny.client, [user("what?")])
        tiny.n_good = 1
        with pytest.raises(openai.APIError) as error:
            streamed(tiny.client, [user(picture(1), "what color is the shape?")])
        assert "secret" not in str(error.value)
    question = "what color is the shape?"
    answer = expected(load_model(TINY), TINY, [f"<image>{question}", None], [picture(1)])
    assert text_of(ask(tiny.client, [user(picture(1), question)])) == answer


# --- who may use it ---


def test_api_key(tiny):
    with serving(make_app(tiny.engine, LIMITS, 4, "127.0.0.1", "sesame")) as port:
        assert text_of(ask(client_of(port, "sesame"), [user("a")], max_tokens=1)) is not None
        assert client_of(port, "sesame").models.list().data
        for key in ("wrong", "sesam", "sesame2"):
            with pytest.raises(openai.AuthenticationError):
                ask(client_of(port, key), [user("a")])
            with pytest.raises(openai.AuthenticationError):
                client_of(port, key).models.list()
        for path in ("/health", "/scene", "/v1/models", "/nowhere", "//"):
            assert get(port, path)[0] == 401
        assert get(port, "/")[0] != 401  # the page asks for the key


def test_other_sites_are_refused(tiny):
    """By the Host, which a DNS server of theirs chose (DNS rebinding), and by the Origin, of their page."""
    body = {"messages": [user("a")], "max_tokens": 1}
    own = f"127.0.0.1:{tiny.port}"
    assert post(tiny.port, body, Origin=f"http://{own}")[0] == 200
    assert post(tiny.port, body, Host=f"localhost:{tiny.port}", Origin=f"http://localhost:{tiny.port}")[0] == 200
    assert post(tiny.port, body, Host="evil.example", Origin="http://evil.example")[0] == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://localhost:{tiny.port}"):
        assert post(tiny.port, body, Origin=origin)[0] == 403
        assert get(tiny.port, "/v1/chat/completions", "OPTIONS", Origin=origin)[0] == 403
        assert get(tiny.port, "/scene", Origin=origin)[0] == 403
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil.example:127.0.0.1"):
        assert get(tiny.port, "/scene", Host=host)[0] in (400, 403)
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "10.0.0.7:8000", "mine:1"):
        assert is_own_host(host, "mine")


# --- many clients ---


def generated(engine: Engine) -> list[int]:
    """The tokens of the answer that is being generated, or was last. Each answer is a new list."""
    return engine.sessions[-1].answer_ids


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def send_raw(port: int, body: dict) -> socket.socket:
    """Sends a request and does not wait for the answer."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def receive_until(connection: socket.socket, text: bytes) -> None:
    received = b""
    while text not in received:
        received += (part := connection.recv(4096))
        assert part, received


def wait_for_thread(engine: Engine) -> None:
    """Waits until the generation thread takes new work."""
    done = threading.Event()

    async def submit() -> None:
        engine.submit(lambda job: done.set())

    asyncio.run(submit())
    assert done.wait(60)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_stops_its_answer(endless, is_streamed):
    question = {"messages": [user(f"Why? {is_streamed}")], "stream": is_streamed}
    before = generated(endless.engine)
    with send_raw(endless.port, question) as connection:
        if is_streamed:
            receive_until(connection, b"data: ")
        wait_until(lambda: len(generated(endless.engine)) > 3 and generated(endless.engine) is not before)
    wait_for_thread(endless.engine)
    assert len(generated(endless.engine)) < LONG


def test_stop_button(endless):
    """OpenAI's client closes the stream."""
    with ask(endless.client, [user("Go on")], model=endless.name, stream=True) as stream:
        for k, _ in enumerate(stream):
            if k == 5:
                break
    wait_for_thread(endless.engine)
    assert len(generated(endless.engine)) < LONG


def test_a_full_queue(endless):
    """One request is answered, one waits, the third is refused. If the waiting one leaves, it is never answered."""
    messages = [user("Tell me all")]
    answered = []
    original = endless.engine.answer
    first = send_raw(endless.port, {"messages": messages, "stream": True})
    try:
        receive_until(first, b"data: ")
        endless.engine.answer = lambda question, job: answered.append(question) or original(question, job)
        with send_raw(endless.port, {"messages": messages}):
            wait_until(lambda: endless.engine.queue.qsize() == 1)
            with pytest.raises(openai.RateLimitError) as error:
                ask(endless.client, messages, model=endless.name)
            assert error.value.code == "queue_full"
            assert endless.client.models.list().data  # what needs no engine is answered
        invalid = {"messages": messages, "n": 2}  # error 429, or 400 once the place is free
        wait_until(lambda: post(endless.port, invalid)[0] == 400)
        first.close()
        wait_for_thread(endless.engine)
        assert not answered
    finally:
        first.close()
        endless.engine.answer = original


def test_200_concurrent_requests(tiny):
    """Each gets the answer to its own image and question, streamed or not."""
    model, rng = load_model(TINY), random.Random(5)
    requests = []
    for k in range(200):
        scene = make_scene(rng)
        file = io.BytesIO()
        render(scene, rng).save(file, "PNG")
        requests.append((file.getvalue(), rng.choice(questions_about(scene)).question))
    begin = time.monotonic()
    answers = [expected(model, TINY, [f"<image>{question}", None], [image], 8) for image, question in requests]
    seconds = time.monotonic() - begin
    assert len(set(answers)) >= 5  # so that mixed up answers would be noticed

    async def ask_one(client: openai.AsyncOpenAI, k: int) -> str:
        image, question = requests[k]
        options = {"model": "tiny-owl2", "messages": [user(image, question)], "max_tokens": 8}
        if k % 2:
            return text_of(await client.chat.completions.create(**options))
        stream = await client.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        address = f"http://127.0.0.1:{tiny.port}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="any", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(ask_one(client, k) for k in range(200)))

    begin = time.monotonic()
    assert asyncio.run(ask_all()) == answers
    assert time.monotonic() - begin < 30 + 10 * seconds


def test_clients_that_come_and_go(tiny):
    """Random requests, half of which end early, leave a server that answers."""
    rng = random.Random(0)

    def visit(seed: int) -> None:
        rng = random.Random(seed)
        body = {"messages": [user(picture(seed), "what is it?")], "stream": rng.random() < 0.5}
        connection = send_raw(tiny.port, body)
        time.sleep(rng.random() * 0.05)
        if rng.random() < 0.5:
            connection.recv(100)
        connection.close()

    threads = [threading.Thread(target=visit, args=(rng.randrange(100),)) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert text_of(ask(tiny.client, [user("a")], max_tokens=3)) is not None


# --- the command ---


def start(*flags: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "serve.py"), *map(str, flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def wait_for_port(process: subprocess.Popen) -> tuple[int, str]:
    """Returns the port that the command prints, and the lines until there."""
    lines = ""
    for line in process.stderr:
        lines += line
        if "Listening at " in line:
            return int(line.split(":")[2].split()[0]), lines
    raise AssertionError(lines)


def test_ctrl_c(endless):
    """While an answer is streamed: the client gets an error, and the command ends soon, with code 130."""
    folder = endless.engine.blank.tokenizer.path.parent
    process = start("--weights", folder, "--device", "cpu", "--port", 0, "--max-new-tokens", LONG, OWLET_API_KEY="k")
    try:
        port, lines = wait_for_port(process)
        assert "warning" not in lines
        client = client_of(port, "k")
        begin = time.monotonic()
        with pytest.raises(openai.APIError, match="shutting down"):
            for k, _ in enumerate(ask(client, [user("Why?")], model=folder.name, stream=True)):
                if k == 3:
                    process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and time.monotonic() - begin < 15
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def run_serve(capsys, *flags: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        serve.main([str(flag) for flag in flags])
    return ended.value.code, capsys.readouterr().err


def test_user_errors_of_the_command(capsys, monkeypatch):
    monkeypatch.delenv("OWLET_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = {
            "--port": ("--port", 70_000),
            "in use": ("--port", taken.getsockname()[1]),
            "cannot listen": ("--host", "256.1.1.1"),
            "queue": ("--queue", 0),
            "max-body": ("--max-body", 0),
            "nowhere": ("--port", 0, "--weights", "nowhere"),
            "API key": ("--api-key", "é"),
        }
        for keyword, flags in cases.items():
            code, message = run_serve(capsys, *flags)
            assert code == 2 and message.count("\n") == 1 and keyword in message, message
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, message = run_serve(capsys, "--port", 0)
    assert code == 2 and message.count("\n") == 1 and "requirements-serve.txt" in message


def test_other_machines_without_a_key_are_warned_of(monkeypatch):
    monkeypatch.delenv("OWLET_API_KEY", raising=False)
    process = start("--host", "0.0.0.0", "--port", 0)
    try:
        _, lines = wait_for_port(process)
        assert "--api-key" in lines
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


def test_help_needs_neither_torch_nor_fastapi():
    command = [sys.executable, "-X", "importtime", str(ROOT / "serve.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "torch" not in result.stderr and "fastapi" not in result.stderr
    assert "--api-key" in result.stdout


def test_the_log_has_no_control_characters():
    formatter = serve.LogFormatter("%(message)s")
    record = logging.LogRecord("a", logging.INFO, "a", 1, "%s", ("\x1b[2J\x07",), None)
    assert formatter.format(record) == "\\x1b[2J\\x07"
