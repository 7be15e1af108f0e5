"""Answers the questions of many clients one after the other, and keeps the KV caches of recent conversations.

    event loop                               generation thread
    ----------                               -----------------
    submit(work) -> Job  ---- queue ----->   work(job): selects a session, generates
    async for text in job.texts()   <-----   job.send(text), ..., job.finish(result)
    job.cancel()         ---------------->   checks job.is_canceled after each piece of text

A request holds its whole conversation: the server keeps none. What it keeps is a few sessions (inference/chat.py), each
with the KV cache of the conversation that it answered last. A request gets the session with the longest common prefix:

    session 1    <s> USER: [image A] what color? ASSISTANT: blue
    session 2    <s> USER: [image B] what color? ASSISTANT: red
    request      <s> USER: [image B] what color? ASSISTANT: red</s> USER: what shape? ASSISTANT:
                 |---------- kept in session 2's cache --------|---------- processed ----------|

The placeholders of two images are equal, so images are compared too. Requests are not batched: that would need one
cache with a row per conversation, and rows that start and end at different times.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from time import perf_counter

import torch

from generate import Sampling
from inference.chat import ChatSession, Conversation
from inference.explain import explain
from inference.explain_page import page
from model import IMAGE_TOKEN_ID

logger = logging.getLogger("owlet")


class ClientGone(Exception):
    """The client has closed its connection."""


class ShuttingDown(Exception):
    """The server ends, so this work is not finished."""


class WorkFailed(Exception):
    """The work raised an error, its cause, which the log has."""


@dataclass
class Question:
    """A conversation whose last question is to be answered."""

    conversation: Conversation
    sampling: Sampling
    max_new_tokens: int
    stop: list[str]  # texts that end the answer; they are not part of it


@dataclass
class Answer:
    """What is known after the last piece of an answer's text."""

    finish_reason: str  # "stop": the model or a stop string ended it; "length": a limit
    n_prompt: int  # tokens, visual tokens included
    n_cached: int  # of these, tokens that were in a cache
    n_new: int  # generated tokens, with </s>


class Job:
    """Work for the generation thread. All methods but `send` and `finish` belong to the event loop."""

    def __init__(self, work: Callable[["Job"], object]):
        self.work: Callable[[Job], object] | None = work
        self.is_canceled = False
        self.result: object = None  # what the work returned, after the last text
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[str, object]] = asyncio.Queue()

    def cancel(self) -> None:
        """Stops the work, or drops it from the queue."""
        self.is_canceled = True
        self.work = None  # frees its images now, not when its turn comes
        self.events.put_nowait(("error", ClientGone()))

    async def texts(self) -> AsyncIterator[str]:
        """Yields what the work sends. At its end sets `result`, or raises the error of the work."""
        while True:
            kind, value = await self.events.get()
            if kind == "text":
                yield value
            elif kind == "error":
                raise value
            else:
                self.result = value
                return

    def send(self, text: str) -> None:
        self.post("text", text)

    def finish(self, result: object) -> None:
        self.post("error" if isinstance(result, Exception) else "result", result)

    def post(self, kind: str, value: object) -> None:
        with suppress(RuntimeError):  # the event loop has ended
            self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))


class Engine:
    """The queue, its thread and the sessions. name: of the model."""

    def __init__(self, sessions: list[ChatSession], name: str):
        self.sessions = sessions  # the least recently used first; only the generation thread reads or changes them
        self.blank = sessions[0].conversation
        self.name = name
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.is_stopping = False
        self.thread = threading.Thread(target=self.run, name="generation", daemon=True)
        self.thread.start()

    def new_conversation(self) -> Conversation:
        """Returns an empty conversation with the model."""
        return Conversation(self.blank.config, self.blank.tokenizer, self.blank.fit)

    def submit(self, work: Callable[[Job], object]) -> Job:
        """Appends work to the queue. Raises ShuttingDown."""
        if self.is_stopping:
            raise ShuttingDown
        job = Job(work)
        self.queue.put(job)
        return job

    def stop(self) -> None:
        """Ends all jobs, the running one after its next piece of text. May be called by a signal handler."""
        self.is_stopping = True
        self.queue.put(None)

    def run(self) -> None:
        """The generation thread."""
        while (job := self.queue.get()) is not None:
            work = job.work
            if work is None:  # canceled
                continue
            try:
                if self.is_stopping:
                    raise ShuttingDown
                job.finish(work(job))
            except (ClientGone, ShuttingDown) as error:
                job.finish(error)
            except Exception as error:
                logger.exception("The generation thread continues after this error:")
                failed = WorkFailed()
                failed.__cause__ = error
                job.finish(failed)
            del job, work  # not until the next job arrives: they hold images

    # --- work, in the generation thread ---

    def answer(self, question: Question, job: Job) -> Answer:
        """Sends the answer to a question, piece by piece."""
        start = perf_counter()
        session, n_cached = self.select_session(question.conversation)
        session.conversation = question.conversation
        session.sampling, session.max_new_tokens = question.sampling, question.max_new_tokens
        stops = StopStrings(question.stop)
        with closing(session.answer()) as texts:
            for text in texts:
                if job.is_canceled:
                    logger.info("The client has gone after %d tokens.", len(session.answer_ids))
                    raise ClientGone
                if self.is_stopping:
                    raise ShuttingDown
                if text := stops.push(text):
                    job.send(text)
                if stops.found:
                    break
        if stops.waiting and not stops.found:
            job.send(stops.waiting)
        is_complete = stops.found or session.answer_ids[-1:] == [session.model.config.llama.eos_id]
        n_prompt, n_new = len(question.conversation.prompt_ids), len(session.answer_ids)
        message = "prompt: %d tokens, %d of them cached; answer: %d tokens; %.2f s"
        logger.info(message, n_prompt, n_cached, n_new, perf_counter() - start)
        return Answer("stop" if is_complete else "length", n_prompt, n_cached, n_new)

    def select_session(self, conversation: Conversation) -> tuple[ChatSession, int]:
        """Returns a session to answer a conversation, and how many tokens of its cache the conversation begins with."""
        shared = [common_prefix(session, conversation) for session in self.sessions]
        best = max(range(len(shared)), key=shared.__getitem__)
        if 2 * shared[best] < len(self.sessions[best].cached_ids):
            best = 0  # another conversation, perhaps continued later: replace the least recently used instead
        session = self.sessions.pop(best)
        self.sessions.append(session)
        session.cached_ids = session.cached_ids[: shared[best]]
        return session, shared[best]

    def explain(self, conversation: Conversation, text: str, _: Job) -> str:
        """Returns the explanation page of an answer to the conversation's last question."""
        ids, tokenizer = conversation.prompt_ids, conversation.tokenizer
        for session in self.sessions:
            # If a session gave this answer last, its tokens are known.
            is_same = session.conversation.prompt_ids == ids and common_prefix(session, conversation) == len(ids) - 1
            if is_same and tokenizer.decode(session.answer_ids) == text:
                return page(explain(session, self.name))
        answer_ids = [*tokenizer.encode(text), tokenizer.eos_id]
        session = replace(session, conversation=conversation, answer_ids=answer_ids, sampling=Sampling())
        data = explain(session, self.name)
        data["notes"].append("The tokens of the answer were not kept: its text was tokenized again, and </s> appended.")
        return page(data)


def common_prefix(session: ChatSession, conversation: Conversation) -> int:
    """Returns how many tokens of a session's cache a conversation can reuse: at most all of its prompt but one."""
    ids, cached = conversation.prompt_ids, session.cached_ids
    n = 0
    while n < min(len(cached), len(ids) - 1) and cached[n] == ids[n]:
        n += 1
    # The first image that differs ends the prefix.
    starts = [k for k in range(n) if ids[k] == IMAGE_TOKEN_ID][:: conversation.config.n_visual_tokens]
    for start, old, new in zip(starts, session.conversation.images, conversation.images):
        if not torch.equal(old, new):
            return start
    return n


class StopStrings:
    """Ends a streamed text at the first of some strings. Text that may be the beginning of one waits."""

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.waiting = ""
        self.found = False

    def push(self, text: str) -> str:
        """Takes the next piece. Returns the text that can be sent, and sets `found` at a stop string."""
        text = self.waiting + text
        found = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.found = True
            return text[: min(found)[1]]  # of the one that ends first, however the text is cut into pieces
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        n_sent = len(text) - max(lengths, default=0)
        self.waiting = text[n_sent:]
        return text[:n_sent]
