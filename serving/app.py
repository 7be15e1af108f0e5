"""The server's routes, and what every request must pass before it reaches one.

    GET  /                       the chat page
    GET  /health                 {"status": "ok", ...}
    GET  /v1/models, .../NAME    the one model
    POST /v1/chat/completions    OpenAI's chat format (openai_api.py)
    GET  /scene                  a random drawn scene with questions about it
    POST /explain                messages that end with an answer; returns the page that explains that answer

    request --Guard: host, origin, key, queue--> route --parse--> question --Engine.submit--> Job --> response

A web page can send requests to a server on its reader's machine. The server therefore accepts a request with an Origin
header only if Origin equals Host. Without a key, Host must be an IP address, localhost or --host, because anyone's DNS
name can point here. Content-Type must be application/json: a page of another site needs a CORS preflight to set it, and
the server refuses preflights.
"""

import asyncio
import ipaddress
import random
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from common.files import is_out_of_memory
from data.shapes.prepare import make_scene, questions_about, render
from inference.chat import Conversation
from serving.engine import ClientGone, Engine, Job, Question, ShuttingDown, WorkFailed
from serving.openai_api import (
    ApiError,
    Limits,
    chunk,
    completion,
    error_json,
    event,
    head_json,
    model_json,
    read_conversation,
    read_question,
    read_request,
    usage_json,
)

CHAT_PAGE = Path(__file__).parent / "chat_page.html"
BODY_SECONDS = 30  # for sending the body of a request
N_READING = 8  # bodies that are in memory at a time
# A page may load nothing from elsewhere. Pages that it opens as blobs inherit this.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' data: blob: 'unsafe-inline'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(engine: Engine, limits: Limits, max_waiting: int, host: str, api_key: str | None) -> FastAPI:
    """Returns the application. host: the name or address at which it is served."""
    routes = Routes(engine, limits)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for method, path, route in (
        ("GET", "/", routes.chat_page),
        ("GET", "/health", routes.health),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.model),
        ("POST", "/v1/chat/completions", routes.chat_completions),
        ("GET", "/scene", routes.scene),
        ("POST", "/explain", routes.explain),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None)
    for kind in (Exception, HTTPException, ApiError, ClientGone, ClientDisconnect, ShuttingDown, WorkFailed):
        app.add_exception_handler(kind, report_error)
    app.add_middleware(Guard, max_waiting=max_waiting, host=host, api_key=api_key)
    return app


def to_api_error(error: Exception) -> ApiError:
    """Returns what the client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # of the router: 404, 405
        return ApiError(error.status_code, error.detail)
    if isinstance(error, ClientGone | ClientDisconnect):
        return ApiError(499, "the client has closed the connection")  # nobody reads it
    if isinstance(error, ShuttingDown):
        return ApiError(503, "the server is shutting down")
    if is_out_of_memory(error.__cause__ or error):
        return ApiError(500, "out of memory")
    return ApiError(500, "internal error: the server's log has details")


async def report_error(_: Request, error: Exception) -> JSONResponse:
    api_error = to_api_error(error)
    return JSONResponse(error_json(api_error), api_error.status, getattr(error, "headers", None))


class Guard:
    """Refuses requests from pages of other sites, without the key, or when the queue is full."""

    def __init__(self, app: ASGIApp, max_waiting: int, host: str, api_key: str | None):
        self.app, self.max_waiting, self.host, self.api_key = app, max_waiting, host, api_key
        self.n_active = 0  # POST requests: one that is answered, and those that wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self.check(request)
        except ApiError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse(error_json(error), error.status, headers)(scope, receive, send)
            return
        self.n_active += request.method == "POST"
        try:
            await self.app(scope, receive, send)  # until the whole response is sent, or the client has gone
        finally:
            self.n_active -= request.method == "POST"

    def check(self, request: Request) -> None:
        """Raises ApiError unless a request may be processed."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "pages of other sites may not use this server", code="origin_not_allowed")
        if self.api_key is None and not is_own_host(host, self.host):
            message = "without --api-key the server answers only at its address, localhost or its --host"
            raise ApiError(403, message, code="host_not_allowed")
        if self.api_key is not None and request.scope["path"] != "/":
            key = request.headers.get("authorization", "")
            if not secrets.compare_digest(key.encode(), f"Bearer {self.api_key}".encode()):
                message = "the API key is missing or wrong: it belongs in the header Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
        if request.method == "POST" and self.n_active > self.max_waiting:
            raise ApiError(429, f"{self.n_active} requests are waiting: try again later", code="queue_full")


def is_own_host(header: str, own: str) -> bool:
    """Whether a Host header cannot come from a DNS server that points its own name to this machine."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
        ipaddress.ip_address(name)
        return True
    except ValueError:
        name = header.partition(":")[0].lower()
        return name in ("", "localhost", own.lower())


class Routes:
    """What the server answers at each path. All methods run in the event loop, except those that `parse` is given."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self.created = int(time.time())
        self.reading = asyncio.Semaphore(N_READING)
        self.parser = ThreadPoolExecutor(1, "parser")  # one image is decoded at a time, which bounds the memory
        self.watchers: set[asyncio.Task] = set()
        self.rng = random.Random()

    # --- pages and facts ---

    async def chat_page(self) -> Response:
        return HTMLResponse(CHAT_PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def health(self) -> Response:
        return JSONResponse({"status": "ok", "model": self.engine.name})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [model_json(self.engine.name, self.created)]})

    async def model(self, name: str) -> Response:
        self.check_model(name)
        return JSONResponse(model_json(name, self.created))

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.engine.name):
            message = f"there is no model {name[:100]!r} here, only {self.engine.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def scene(self) -> Response:
        scene = make_scene(self.rng)
        file = BytesIO()
        render(scene, self.rng).save(file, "PNG")
        turns = questions_about(scene)
        self.rng.shuffle(turns)
        questions = {turn.kind: turn.question for turn in turns}  # one of each kind
        image = "data:image/png;base64," + b64encode(file.getvalue()).decode()
        return JSONResponse({"image": image, "caption": scene.caption, "questions": list(questions.values())})

    # --- work for the engine ---

    async def chat_completions(self, request: Request) -> Response:
        is_streamed, include_usage, question = await self.parse(request, self.read_question)
        job = self.submit(request, partial(self.engine.answer, question))
        texts = job.texts()
        first = await anext(texts, "")  # before a response starts, so that an error until here has its status
        completion_id = "chatcmpl-" + secrets.token_hex(12)
        if is_streamed:
            head = head_json(self.engine.name, completion_id, "chat.completion.chunk")
            events = stream_events(job, first, texts, head, include_usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        text = first + "".join([text async for text in texts])
        head = head_json(self.engine.name, completion_id, "chat.completion")
        return JSONResponse(completion(head, text, job.result))

    def read_question(self, body: bytes) -> tuple[bool, bool, Question]:
        """Returns whether to stream, and with the number of tokens, and the question. The images' text is freed."""
        chat = read_request(body)
        self.check_model(chat.model)
        include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        return bool(chat.stream), include_usage, read_question(chat, self.engine.new_conversation(), self.limits)

    async def explain(self, request: Request) -> Response:
        conversation, answer = await self.parse(request, self.read_answer)
        job = self.submit(request, partial(self.engine.explain, conversation, answer))
        async for _ in job.texts():
            pass
        return HTMLResponse(job.result, headers=PAGE_HEADERS)

    def read_answer(self, body: bytes) -> tuple[Conversation, str]:
        conversation = self.engine.new_conversation()
        answer = read_conversation(read_request(body), conversation, self.limits)
        if not answer:
            raise ApiError(400, "the last message must be the assistant's answer, which is explained", "messages")
        context = conversation.config.llama.context
        if len(conversation.prompt_ids) + len(conversation.tokenizer.encode(answer)) >= context:
            raise ApiError(400, f"the conversation exceeds the context of {context} tokens", "messages")
        return conversation, answer

    async def parse(self, request: Request, read: Callable[[bytes], tuple]) -> tuple:
        """Reads the body of a request and returns read(body), computed in another thread."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json")
        async with self.reading:
            body = await read_body(request, self.limits.body)
            return await asyncio.get_running_loop().run_in_executor(self.parser, read, body)

    def submit(self, request: Request, work: Callable[[Job], object]) -> Job:
        """Queues work, which is canceled when the client closes the connection."""
        job = self.engine.submit(work)

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.cancel()

        task = asyncio.create_task(watch())
        self.watchers.add(task)  # the event loop alone does not keep it
        task.add_done_callback(self.watchers.discard)
        return job


async def read_body(request: Request, limit: int) -> bytes:
    """Returns the body of a request. Raises ApiError if it is too large or too slow."""
    body, n_byte = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                n_byte += len(part)
                if n_byte <= limit:
                    body += part
                elif n_byte > 10 * limit:
                    break
                # Else read on: a client that is cut off while it sends does not see the error.
    except TimeoutError:
        raise ApiError(408, f"the request was not complete after {BODY_SECONDS} s") from None
    if n_byte > limit:
        raise ApiError(413, f"the request has more than {limit:,} bytes", code="request_too_large")
    return bytes(body)


async def stream_events(
    job: Job, first: str, texts: AsyncIterator[str], head: dict, include_usage: bool
) -> AsyncIterator[str]:
    """Yields an answer as server-sent events. An error is an event too, since the status was sent before."""
    try:
        yield event(chunk(head, {"role": "assistant", "content": ""}))
        if first:
            yield event(chunk(head, {"content": first}))
        async for text in texts:
            yield event(chunk(head, {"content": text}))
        yield event(chunk(head, {}, job.result.finish_reason))
        if include_usage:
            yield event(head | {"choices": [], "usage": usage_json(job.result)})
    except (ClientGone, ShuttingDown, WorkFailed) as error:
        yield event(error_json(to_api_error(error)))
    yield "data: [DONE]\n\n"
