"""Serves a model: a chat page for the browser, and an OpenAI-compatible endpoint for programs.

    pip install -r requirements-serve.txt
    python serve.py                                        the embedded tiny model; open http://127.0.0.1:8000
    python serve.py --weights mplug-owl2-llama2-7b --quantize int8
    OWLET_API_KEY=secret python serve.py --host 0.0.0.0    for other machines too: anyone with the key can use it

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

Requests are answered one after the other; the others wait. A client that disconnects stops its answer. Images are data
URLs: no address is fetched. Ctrl-C ends the running answer and the server, with exit code 130. docs/serving.md has
examples, limits and what of OpenAI's format is supported.

A session keeps the KV cache of a conversation, so that its next question does not process it again. --sessions caches
of the model's whole context are allocated: for a 7B model with a context of 2,048 in bfloat16, 1.1 GB each.
"""

from __future__ import annotations  # so that annotations can name a class that is imported later

import argparse
import ipaddress
import logging
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from command import ArgumentParser, exit_with_error, log, run, user_errors
from common.files import escape_controls, printable
from sample import TINY_FOLDER, add_model_flags, build_session

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.engine import Engine


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parses the flags and checks those that need no model."""
    parser = ArgumentParser(prog="serve.py", description=__doc__)

    add = parser.add_argument_group("server").add_argument
    hosts = "address to listen at; default 127.0.0.1: only this machine. 0.0.0.0: all networks, without encryption"
    add("--host", default="127.0.0.1", help=hosts)
    add("--port", type=int, default=8000, help="default 8000; 0: any free port, which is printed")
    keys = "a key that requests must have, as Authorization: Bearer KEY; default: the environment variable "
    keys += "OWLET_API_KEY (which other users of this machine cannot see, unlike a flag)"
    add("--api-key", metavar="KEY", default=os.environ.get("OWLET_API_KEY"), help=keys)

    add_model_flags(parser)

    add = parser.add_argument_group("limits").add_argument
    add("--max-new-tokens", type=int, default=512, metavar="N", help="maximum length of an answer; default 512")
    add("--queue", type=int, default=256, metavar="N", help="requests that wait; more get error 429; default 256")
    add("--sessions", type=int, default=4, metavar="N", help="KV caches of recent conversations; default 4")
    add("--max-body", type=float, default=20, metavar="MB", help="size of a request with its images; default 20")
    add("--max-pixels", type=int, default=50_000_000, metavar="N", help="pixels of an image; default 50,000,000")
    add("--max-images", type=int, default=16, metavar="N", help="images of a conversation; default 16")

    # What sample.build_session asks for besides: a chat without a first question. Each request has its own sampling.
    parser.set_defaults(prompt=None, image=[], video=None, temperature=0.0, top_k=None, top_p=None, seed=None)
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "queue", "sessions", "max_pixels", "max_images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if not 0 < args.max_body <= 1000:
        parser.error(f"--max-body must be above 0 and at most 1000, not {args.max_body}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, not {args.port}")
    key = args.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        parser.error("the API key must be printable ASCII characters, without spaces at its ends")
    return args


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens, before the model is loaded. Raises ValueError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen at {host} port {port}: {reason}") from None


class LogFormatter(logging.Formatter):
    """Escapes control characters, which a terminal would obey: a log has text from clients."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def start_log() -> None:
    """Writes the messages of the server to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # not the steps of starting


def make_server(args: argparse.Namespace) -> tuple[FastAPI, Engine]:
    """Loads the model, and starts the generation thread. Raises ValueError or OSError for what the user can fix."""
    from serving.app import make_app
    from serving.engine import Engine
    from serving.openai_api import Limits

    session = build_session(args)
    llama, context = session.model.llama, session.cache.max_length
    caches = [llama.make_cache(1, context) for _ in range(args.sessions - 1)]
    others = [replace(session, cache=cache, cached_ids=[], answer_ids=[]) for cache in caches]
    engine = Engine([session, *others], name=printable((args.weights or TINY_FOLDER).resolve().name))
    limits = Limits(int(args.max_body * 1e6), args.max_pixels, args.max_images, args.max_new_tokens)
    return make_app(engine, limits, max_waiting=args.queue, host=args.host, api_key=args.api_key), engine


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        exit_with_error(f"the package {error.name} is not installed: pip install -r requirements-serve.txt")
    with user_errors():
        listener = listen(args.host, args.port)
        app, engine = make_server(args)

    class Server(uvicorn.Server):
        def handle_exit(self, *signal: object) -> None:
            """At Ctrl-C ends the answers first: uvicorn waits for them."""
            engine.stop()
            super().handle_exit(*signal)

    start_log()
    address, port = listener.getsockname()[:2]
    if args.api_key is None and not ipaddress.ip_address(address).is_loopback:
        log(f"warning: anyone who can reach {address} can use this server: set --api-key")
    log(f"Listening at http://{f'[{address}]' if ':' in address else address}:{port} (Ctrl-C ends the server)")
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, server_header=False, lifespan="off")
    Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run(main)
