"""A chat with a model: the conversation so far, and a session that answers it with one KV cache.

    conversation.add_image("x.jpg")
    conversation.ask("What is this?")
    for text in session.answer():
        print(text, end="", flush=True)

The prompt of a turn is the whole conversation, and the cache holds the tokens of the turns before. Only the tokens
after their common prefix are processed, and only images after it are encoded:

    cache     <s> USER: What is this? ASSISTANT: A cat.
    prompt    <s> USER: What is this? ASSISTANT: A cat.</s> USER: What color? ASSISTANT:
              |----------- kept in the cache ----------|---------- processed ----------|
"""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from data.image import load_image, to_pixels
from data.text import IMAGE_PLACEHOLDER, Tokenizer, expand_images, render_prompt
from data.video import read_frames
from generate import Sampling
from inference.batch import place_images
from llama import KVCache
from model import IMAGE_TOKEN_ID, Owl, OwlConfig

COMMANDS = "/image PATH adds an image to the next question; /reset starts a new conversation; /help; /quit"


@dataclass
class Conversation:
    """Questions, answers and images of a chat."""

    config: OwlConfig
    tokenizer: Tokenizer
    fit: str  # how an image becomes a square (data/image.py)
    messages: list[str] = field(default_factory=list)  # questions and answers in turn; "" if not generated yet
    images: list[Tensor] = field(default_factory=list)  # [3, S, S] float32 each, in the order of their placeholders
    pending: list[Tensor] = field(default_factory=list)  # of the next question: images; videos [n_frames, 3, S, S]
    prompt_ids: list[int] = field(default_factory=list)  # up to the last question; n_query + 1 placeholders per image

    def reset(self) -> None:
        """Forgets all messages and images."""
        self.messages, self.images, self.pending, self.prompt_ids = [], [], [], []

    def add_image(self, path: str) -> None:
        """Adds an image to the next question. Raises ValueError or OSError if it cannot be read."""
        self.pending.append(to_pixels(load_image(path), self.config.image_size, self.fit))

    def add_video(self, path: str, fps: float, max_frames: int) -> None:
        """Adds frames of a video to the next question. Raises ValueError or OSError if it cannot be read."""
        frames = read_frames(path, fps, max_frames)
        self.pending.append(torch.stack([to_pixels(frame, self.config.image_size, self.fit) for frame in frames]))

    def ask(self, question: str) -> None:
        """Adds a question with the pending images; those without a placeholder come before its text.

        Raises ValueError and changes nothing if there are more placeholders than images, or if the conversation
        does not fit the context.
        """
        # Input that is not valid UTF-8 arrives as lone surrogates, which cannot be tokenized.
        question = question.encode(errors="replace").decode()
        question, images = place_images(question, self.pending)
        ids = render_prompt([*self.messages, question, None], self.tokenizer, self.config.variant)
        ids, _ = expand_images(ids, None, self.config.n_visual_tokens)
        context = self.config.llama.context
        if len(ids) > context:
            size = f"the conversation has {len(ids)} tokens, including visual tokens"
            raise ValueError(f"{size}, but the model's context is {context} (in a chat, /reset starts a new one)")
        self.messages += [question, ""]
        self.prompt_ids = ids
        self.images += images
        self.pending = []

    def set_answer(self, text: str) -> None:
        """Sets the answer to the last question. A placeholder in it stands for no image and is removed."""
        self.messages[-1] = IMAGE_PLACEHOLDER.sub(" ", text)


@dataclass
class ChatSession:
    """Answers a conversation, with a KV cache that is kept between turns."""

    model: Owl
    conversation: Conversation
    decode: Callable[..., Iterator[Tensor]]  # FastDecoder.generate, or generate.generate with its model bound
    sampling: Sampling
    max_new_tokens: int
    cache: KVCache  # for one row
    cached_ids: list[int] = field(default_factory=list)  # the tokens in the cache
    answer_ids: list[int] = field(default_factory=list)  # the tokens of the last answer

    def answer(self) -> Iterator[str]:
        """Yields the answer to the last question as text, as it is generated.

        The conversation keeps the text generated so far also if the caller closes the iterator early.
        """
        # Keep the common prefix of cache and prompt, at most all but one token. An answer in the cache can differ from
        # the same answer in the prompt, where its text is tokenized again.
        ids = self.conversation.prompt_ids
        n_kept = 0
        while n_kept < min(len(self.cached_ids), len(ids) - 1) and self.cached_ids[n_kept] == ids[n_kept]:
            n_kept += 1
        self.cache.truncate(n_kept)
        self.cached_ids = ids[:n_kept]

        # Process the rest, with its images, and generate.
        device = self.cache.lengths.device
        n_image = ids[:n_kept].count(IMAGE_TOKEN_ID) // self.model.config.n_visual_tokens
        pixels = self.conversation.images[n_image:]
        tokens = self.decode(
            torch.tensor([ids[n_kept:]], device=device),
            torch.stack(pixels).to(device) if pixels else None,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            cache=self.cache,
        )
        self.answer_ids = []
        answer = ""
        try:
            for text in stream_text(tokens, self.conversation.tokenizer, self.answer_ids):
                answer += text
                yield text
        finally:
            self.conversation.set_answer(answer)
            self.cached_ids = (ids + self.answer_ids)[: int(self.cache.lengths)]

    def warm_up(self) -> None:
        """Generates two tokens, which compiles the decoding step. Raises ValueError if torch cannot compile here."""
        bos = torch.tensor([[self.model.config.llama.bos_id]], device=self.cache.lengths.device)
        try:
            list(self.decode(bos, max_new_tokens=2, min_new_tokens=2, sampling=self.sampling, cache=self.cache))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"compilation does not work here: {str(error).splitlines()[0]}") from None
        self.cache.truncate(0)

    def run_command(self, line: str) -> str:
        """Executes /image, /reset or /help. Returns a message. Raises ValueError or OSError if it cannot."""
        command, *argument = line.split(maxsplit=1)
        if command == "/image" and argument:
            self.conversation.add_image(to_path(argument[0].strip()))
            return "The image is added to the next question."
        if line == "/reset":
            self.conversation.reset()
            self.cached_ids = []
            return "The conversation and its images are forgotten."
        if line == "/help":
            return COMMANDS
        raise ValueError(f"{line} is not a command: {COMMANDS}")


def to_path(text: str) -> str:
    """Returns the path of a file as it is typed, or as a terminal writes a file that is dropped on it.

    A terminal writes '/My Photos/a.png' with its quotes, /My\\ Photos/a.png, or file:///My%20Photos/a.png.
    """
    if text.startswith("file://"):
        return url2pathname(urlsplit(text).path)
    path = os.path.expanduser(text)
    if not os.path.exists(path):
        with suppress(ValueError):  # a quotation mark without its partner
            words = shlex.split(text)
            path = os.path.expanduser(words[0]) if len(words) == 1 else path
    return path


def stream_text(tokens: Iterable[Tensor | int], tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """Yields the text of tokens as they arrive, and appends the tokens to ids.

    Whether a space precedes a token depends on its neighbors, so all tokens are decoded again each time. The bytes of
    a rare character are separate tokens, which decode to U+FFFD until the last one; their text waits.
    """
    text, n_yielded = "", 0
    for token in tokens:
        ids.append(int(token))
        text = tokenizer.decode(ids)
        n_complete = len(text.rstrip("\ufffd"))
        if n_complete > n_yielded:
            yield text[n_yielded:n_complete]
            n_yielded = n_complete
    if len(text) > n_yielded:
        yield text[n_yielded:]
