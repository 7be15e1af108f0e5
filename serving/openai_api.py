"""OpenAI's chat format: requests to questions, and answers, chunks and errors to JSON.

    request body --read_request--> ChatRequest --read_conversation--> Conversation, a last answer or None
    Answer --completion, chunk--> JSON                          ApiError --error_json--> JSON

    messages                                                        the model's turns (Owl2's format)
    --------                                                        ---------------------------------
    system      "Answer in one word."
    user        [text "What is this?", image A]                     USER: <A>Answer in one word.
                                                                    What is this? ASSISTANT:
    assistant   "A cat."                                             A cat.</s>
    user        [text "Which is older,", image B, text "or", image C]   USER: Which is older,<B>or<C> ASSISTANT:

Neither model has a place for instructions: those of a system or developer message go before the first text of the next
user message, on a line of their own. (No released model was trained with them.) Images after all text move to the
front, where they are in the training data; images between texts stay there. Texts that follow one another are joined by
a line break. A typed <image> is text, not a placeholder: it becomes "< image>".
"""

import base64
import binascii
import json
import re
import time
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from data.image import load_image, to_pixels
from data.text import IMAGE_PLACEHOLDER
from generate import Sampling
from inference.chat import Conversation
from serving.engine import Answer, Question

DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow reads many more, with decoders that are less tested
MAX_TOKEN_LENGTH = 64  # characters; a longer text than this times the context is refused without tokenizing it
# What would change the answer but does not exist here; with one of these values it changes nothing.
UNSUPPORTED = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    body: int  # bytes
    pixels: int  # of an image
    images: int  # of a conversation
    new_tokens: int  # of an answer


class ApiError(Exception):
    """An error that the client is told."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


# --- requests ----------------------------------------------------------------------------------------


class StrictModel(BaseModel):
    """Checks types without converting them. Unknown fields are kept in model_extra."""

    model_config = ConfigDict(strict=True, extra="allow")


class ImageURL(StrictModel):
    url: str


class Part(StrictModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(StrictModel):
    include_usage: bool | None = None


class ChatRequest(StrictModel):
    messages: list[Message] = Field(min_length=1, max_length=2000)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None


def read_request(body: bytes) -> ChatRequest:
    """Parses a request. Raises ApiError."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # Of the alternatives of a field, such as string or list, the one that fits longest is what was meant.
        error = max(error.errors(include_url=False, include_input=False), key=lambda error: len(error["loc"]))
        names = [str(name) for name in error["loc"] if isinstance(name, int) or name in FIELD_NAMES]
        param = ".".join(names) or None
        raise ApiError(400, f"{param or 'the request'}: {error['msg']}", param) from None
    for name, harmless in UNSUPPORTED.items():
        if request.model_extra.get(name) not in harmless:
            raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")
    return request


FIELD_NAMES = {name for model in (ChatRequest, Message, Part, ImageURL, StreamOptions) for name in model.model_fields}


def read_question(request: ChatRequest, conversation: Conversation, limits: Limits) -> Question:
    """Returns the question that a request asks. conversation: an empty one, which is filled. Raises ApiError."""
    if read_conversation(request, conversation, limits) is not None:
        raise ApiError(400, "the last message must be the user's: an answer is not continued", "messages")
    try:
        sampling = Sampling(request.temperature or 0.0, request.top_k, request.top_p, request.seed)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 16 or not all(1 <= len(text) <= 200 for text in stop):
        raise ApiError(400, "stop is at most 16 strings of 1 to 200 characters", "stop")
    wanted = request.max_completion_tokens or request.max_tokens or limits.new_tokens
    return Question(conversation, sampling, min(wanted, limits.new_tokens), stop)


def read_conversation(request: ChatRequest, conversation: Conversation, limits: Limits) -> str | None:
    """Fills an empty conversation. Returns the last message if it is an answer, which the conversation lacks then."""
    questions, answers = split_turns(request.messages)
    last_answer = answers.pop() if len(answers) == len(questions) else None

    # Check the length before decoding images and tokenizing text.
    texts = [part for question in questions for part in question if isinstance(part, str)] + answers
    urls = [part.url for question in questions for part in question if isinstance(part, ImageURL)]
    context = conversation.config.llama.context
    if len(urls) > limits.images:
        raise ApiError(400, f"there are {len(urls)} images, more than {limits.images}", "messages", "too_many_images")
    n_visual, n_character = len(urls) * conversation.config.n_visual_tokens, sum(map(len, texts))
    if n_visual > context or n_character > MAX_TOKEN_LENGTH * context:
        size = f"{len(urls)} images of {conversation.config.n_visual_tokens} tokens and {n_character} characters"
        raise ApiError(400, f"{size} exceed the context of {context} tokens", "messages", "context_length_exceeded")

    images = [read_image(url, conversation, limits) for url in urls]
    n_last = sum(isinstance(part, ImageURL) for part in questions[-1])
    conversation.images, conversation.pending = images[: len(images) - n_last], images[len(images) - n_last :]
    for question, answer in zip(questions, answers):
        conversation.messages += [render_question(question), as_text(answer)]
    try:
        conversation.ask(render_question(questions[-1]))
    except ValueError as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
    return last_answer


def split_turns(messages: list[Message]) -> tuple[list[list[str | ImageURL]], list[str]]:
    """Returns the questions, each a list of texts and images, and the answers. Raises ApiError."""
    questions: list[list[str | ImageURL]] = []
    answers: list[str] = []
    instructions: list[str] = []  # for the next question
    for i, message in enumerate(messages):
        parts = read_parts(message, f"messages.{i}.content")
        if message.role == "user":
            if len(questions) == len(answers):
                questions.append([])
            first_text = next((k for k, part in enumerate(parts) if isinstance(part, str)), len(parts))
            questions[-1] += [*parts[:first_text], *instructions, *parts[first_text:]]
            instructions = []
            continue
        if any(isinstance(part, ImageURL) for part in parts):
            raise ApiError(400, "only the user's messages can have images", f"messages.{i}.content")
        text = "\n".join(parts)
        if message.role != "assistant":
            instructions.append(text)
        elif not questions:
            raise ApiError(400, "an answer needs a user's message before it", f"messages.{i}.role")
        elif len(answers) == len(questions):
            answers[-1] += "\n" + text
        else:
            answers.append(text)
    if not questions or instructions:
        raise ApiError(400, "the last message must be the user's", "messages")
    return questions, answers


def read_parts(message: Message, param: str) -> list[str | ImageURL]:
    """Returns the texts and images of a message. Raises ApiError."""
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{param}: a string or a list is missing", param)
    if not isinstance(message.content, list):
        return [message.content or ""]
    parts = [part.text if part.type == "text" else part.image_url for part in message.content]
    if None in parts:
        raise ApiError(400, f"{param}: a part of this type needs the field text or image_url", param)
    return parts


def render_question(parts: list[str | ImageURL]) -> str:
    """Returns a question as text with image placeholders."""
    is_image = [isinstance(part, ImageURL) for part in parts]
    n_image = sum(is_image)
    if n_image and all(is_image[-n_image:]):  # all after the text
        parts = parts[-n_image:] + parts[:-n_image]
    question = ""
    after_text = False
    for part in parts:
        if isinstance(part, ImageURL):
            question += "<image>"
        else:
            question += "\n" * after_text + as_text(part)
        after_text = isinstance(part, str)
    return question


def as_text(text: str) -> str:
    """Returns text in which nothing is an image placeholder."""
    return IMAGE_PLACEHOLDER.sub(lambda match: "< " + match[0][1:], text)


def read_image(url: str, conversation: Conversation, limits: Limits) -> Tensor:
    """Decodes a data URL to pixels, [3, S, S] float32. Raises ApiError. No other URL is read, from network or disk."""
    match = DATA_URL.match(url)
    if match is None:
        message = "an image is a data URL, data:image/png;base64,...; other addresses are not fetched"
        raise ApiError(400, message, "messages", "invalid_image_url")
    try:
        content = base64.b64decode(url[match.end() :], validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size that is refused here, or of transparency
            with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as image:  # reads the header only
                width, height = image.size
            if width * height > limits.pixels:
                raise ValueError(f"it has {width} x {height} pixels, more than {limits.pixels:,}")
            return to_pixels(load_image(content), conversation.config.image_size, conversation.fit)
    except binascii.Error:
        raise ApiError(400, "an image is not valid base64", "messages", "invalid_image") from None
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        is_unknown = type(error).__name__ == "UnidentifiedImageError"  # its message has the address of an object
        reason = f"it is no {', '.join(IMAGE_FORMATS)} file" if is_unknown else str(error)
        raise ApiError(400, f"an image cannot be used: {reason}", "messages", "invalid_image") from None


# --- responses ---------------------------------------------------------------------------------------


def error_json(error: ApiError) -> dict:
    kind = ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def model_json(name: str, created: int) -> dict:
    return {"id": name, "object": "model", "created": created, "owned_by": "owlet"}


def head_json(name: str, completion_id: str, kind: str) -> dict:
    """The fields that all chunks of an answer share."""
    return {"id": completion_id, "object": kind, "created": int(time.time()), "model": name}


def usage_json(answer: Answer) -> dict:
    return {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": answer.n_new,
        "total_tokens": answer.n_prompt + answer.n_new,
        "prompt_tokens_details": {"cached_tokens": answer.n_cached},
    }


def completion(head: dict, text: str, answer: Answer) -> dict:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    return head | {"choices": [choice], "usage": usage_json(answer)}


def chunk(head: dict, delta: dict, finish_reason: str | None = None) -> dict:
    """A part of a streamed answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return head | {"choices": [choice]}


def event(content: dict) -> str:
    """A server-sent event. json.dumps writes no line breaks, and other than ASCII characters as \\u escapes."""
    return f"data: {json.dumps(content)}\n\n"
