"""Text to token ids, and which of them are supervised.

Owl1 and Owl2 use LLaMA's SentencePiece tokenizer and differ in the prompt format. Here an image is one
IMAGE_TOKEN_ID; `expand_images` repeats it for each of its visual tokens.

Owl2: <s> once at the start, </s> after every answer:

    USER: <|image|>What is this? ASSISTANT: A cat.</s>USER: What color? ASSISTANT:
                                            ~~~~~~~~~~ supervised in training

Owl1: a system prompt first, each image on its own line:

    The following is a conversation ...
    Human: <image>
    Human: What is this?
    AI: A cat.
        ~~~~~~ supervised in training, with the </s> that training adds

Text is tokenized in segments, which end at each image and at each </s>; SentencePiece puts a space in front of each
segment. In Owl1's training data, `AI: ` and `\\nHuman: ` are segments of their own as well. For each format one
function returns the list of segments, for prompts and for training:

    conversation --owl1_segments, owl2_segments--> [(text, is_supervised), ...] --encode_segments--> ids, labels

User text is only text: nothing except the image placeholders `<image>` and `<|image|>` has a special meaning in it.
A typed `</s>` is tokenized as its letters.
"""

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from common.files import read_bytes, read_json, reading
from data.tokenizer_json import JsonProcessor
from model import IGNORE_INDEX, IMAGE_TOKEN_ID

IMAGE_PLACEHOLDER = re.compile(r"<image>|<\|image\|>")
OWL1_SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = "\nHuman: "
AI = "AI: "
Segment = tuple[str | int, bool]  # a text, IMAGE_TOKEN_ID or EOS; whether it is supervised
EOS = -1  # stands for </s> in a list of segments; no token has this id
MAX_TOKENIZER = 100_000_000  # bytes; LLaMA's has 500,000


class Tokenizer:
    """LLaMA's tokenizer, or another model's (data/tokenizer_json.py).

    path: a folder with tokenizer.model or else tokenizer.json, or that file. `legacy` in the tokenizer_config.json
    beside it (default: true) selects LLaMA's old behavior: text after a </s> begins with an extra space. Without it,
    text is tokenized as by transformers 4.31, the version of the released code; later versions have other tokens there.
    Raises FileNotFoundError, or ValueError if a file cannot be read or has no <s> or </s>.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if path.is_dir():
            has_only_json = (path / "tokenizer.json").exists() and not (path / "tokenizer.model").exists()
            path = path / ("tokenizer.json" if has_only_json else "tokenizer.model")
        with reading(path):
            if path.suffix == ".json":
                self.processor = JsonProcessor(path)
            else:
                self.processor = SentencePieceProcessor()
                self.processor.LoadFromSerializedProto(read_bytes(path, MAX_TOKENIZER))
            if self.processor.bos_id() < 0 or self.processor.eos_id() < 0:
                raise ValueError("it has no <s> or no </s>: it is not a tokenizer of a LLaMA")
        self.path = path
        config = path.with_name("tokenizer_config.json")
        self.legacy = not config.is_file() or read_json(config).get("legacy") is not False  # null: not set
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()
        self.vocab_size = self.processor.vocab_size()

    def encode(self, text: str, after_eos: bool = False) -> list[int]:
        """Tokenizes one segment, without <s>. after_eos: it follows a </s>. Raises ValueError for a lone surrogate."""
        text.encode("utf-8")  # UnicodeEncodeError is a ValueError
        ids = self.processor.encode(text)
        if after_eos and not self.legacy and ids and not text.startswith(" "):
            # SentencePiece's space is removed from the first token: "▁US", "ER" become "US", "ER", not "USER".
            first = self.processor.id_to_piece(ids[0])
            if first == "▁":
                del ids[0]
            elif first.startswith("▁"):
                ids[0] = self.processor.piece_to_id(first[1:])  # <unk> if there is no such token
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of an answer. Control tokens and ids outside the vocabulary have no text."""
        return self.processor.decode([i for i in ids if 0 <= i < self.vocab_size])

    def show(self, ids: list[int]) -> str:
        """The text of tokens, with control tokens written out and every space kept."""
        parts = []
        for token in ids:
            text = self.processor.id_to_piece(token)
            is_byte = self.processor.is_byte(token)  # such as <0x0A>, a part of a character without a token
            parts.append(bytes([int(text[1:-1], 16)]) if is_byte else text.replace("▁", " ").encode())
        return b"".join(parts).decode(errors="replace")


# --- segments ----------------------------------------------------------------------------------------


def split_at_images(text: str, is_supervised: bool = False) -> list[Segment]:
    """Splits a text at its image placeholders into segments. Empty texts are left out."""
    segments: list[Segment] = []
    end = 0
    for match in IMAGE_PLACEHOLDER.finditer(text):
        segments += [(text[end : match.start()], is_supervised), (IMAGE_TOKEN_ID, False)]
        end = match.end()
    segments.append((text[end:], is_supervised))
    return [segment for segment in segments if segment[0] != ""]


def encode_segments(segments: list[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokenizes segments to (ids, labels), starting with <s>; labels are IGNORE_INDEX where not supervised."""
    ids = [tokenizer.bos_id]
    labels = [IGNORE_INDEX]
    after_eos = False
    for content, is_supervised in segments:
        if content == IMAGE_TOKEN_ID:
            new = [IMAGE_TOKEN_ID]
        elif content == EOS:
            new = [tokenizer.eos_id]
        else:
            new = tokenizer.encode(content, after_eos)
        ids += new
        labels += new if is_supervised else [IGNORE_INDEX] * len(new)
        after_eos = content == EOS
    return ids, labels


def owl2_segments(turns: list[str | None], training: bool) -> list[Segment]:
    """Owl2's format. turns: alternating questions and answers; None is an answer that is to be generated.

    A question and the `ASSISTANT:` after it are one segment. The answer is a segment of its own, which gives the
    same tokens as continuous text, since SentencePiece's space is the one after the colon.
    """
    segments: list[Segment] = []
    for question, answer in zip(turns[::2], turns[1::2]):
        # The released template writes an empty message as the role alone.
        segments += split_at_images(f"USER: {question} ASSISTANT:" if question else "USER:ASSISTANT:")
        if answer is not None:
            segments += [*split_at_images(answer, training), (EOS, training)]
    return segments


def owl1_lines(turns: list[str | None]) -> list[tuple[str, str]]:
    """Owl1's format as (speaker, text). Images at the beginning of a question get lines of their own."""
    lines = [("", OWL1_SYSTEM)]
    for question, answer in zip(turns[::2], turns[1::2]):
        images = re.match(rf"(\s*({IMAGE_PLACEHOLDER.pattern}))+\s*", question)
        if images is not None:
            question = question[images.end() :]
            lines += [(HUMAN, "<image>")] * len(IMAGE_PLACEHOLDER.findall(images[0]))
        if question or images is None:
            lines.append((HUMAN, question))
        lines[-1] = (HUMAN, lines[-1][1] + "\n")  # the line break before "AI: " belongs to the question
        lines.append((AI, "" if answer is None else answer))
    return lines


def split_owl1_text(text: str) -> list[tuple[str, str]]:
    """Owl1's training text as (speaker, text). An answer begins where a line begins with `AI: `."""
    parts = re.split(rf"({HUMAN}|(?<=\n){AI})", text)
    return list(zip(["", *parts[1::2]], parts[0::2]))


def owl1_segments(lines: list[tuple[str, str]]) -> list[Segment]:
    """Owl1's training format: each speaker and each text are segments of their own; </s> ends an answer."""
    segments: list[Segment] = []
    for speaker, text in lines:
        if speaker:
            segments.append((speaker, False))
        segments += split_at_images(text, is_supervised=speaker == AI)
        if speaker == AI and text:
            segments.append((EOS, True))
    return segments


def owl1_turns(lines: list[tuple[str, str]]) -> list[str]:
    """Owl1's lines as alternating questions and answers. Raises ValueError if they are not."""
    turns: list[str] = []
    question = ""
    for speaker, text in lines[1:]:
        if speaker == HUMAN:
            question += text
        else:
            turns += [question, text]
            question = ""
    if question or not turns or not all(turns[::2]):
        raise ValueError("the text is not a conversation of `Human: ` and `AI: ` lines that ends with an answer")
    turns[::2] = [question.removesuffix("\n") for question in turns[::2]]
    return drop_empty_answers(turns)


def llava_turns(conversation: list[dict]) -> list[str]:
    """LLaVA's turns as alternating questions and answers. Raises ValueError if they are not."""
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2 != 0:
        raise ValueError("a conversation is a list of turns that ends with an answer")
    turns = []
    for i, turn in enumerate(conversation):
        speaker = ("human", "gpt")[i % 2]
        text = turn.get("value") if isinstance(turn, dict) and turn.get("from") == speaker else None
        if not isinstance(text, str):
            raise ValueError(f'turn {i} should be {{"from": "{speaker}", "value": text}}')
        turns.append(move_images_first(text) if speaker == "human" else text)
    return drop_empty_answers(turns)


def move_images_first(question: str) -> str:
    """Moves images from the end of a question to its front, on a line of their own, as the released trainers do.

    They move an image from within a question too, and keep one of several; here those stay where they are.
    """
    text, *others = IMAGE_PLACEHOLDER.split(question)
    if not text.strip() or not others or any(other.strip() for other in others):
        return question
    return "".join(IMAGE_PLACEHOLDER.findall(question)) + "\n" + text.strip()


def drop_empty_answers(turns: list[str]) -> list[str]:
    """Removes questions whose answer is empty; their images move to the next question.

    Raises ValueError if no turn is left.
    """
    kept: list[str] = []
    images = ""
    for question, answer in zip(turns[::2], turns[1::2]):
        if answer.strip():
            kept += [images + question, answer]
            images = ""
        else:
            images += "".join(IMAGE_PLACEHOLDER.findall(question))
    if not kept:
        raise ValueError("all answers are empty, from turn 1 on")
    return kept


def conversation_turns(conversation: list[dict] | str) -> list[str]:
    """Alternating questions and answers of LLaVA's turns or Owl1's text. Raises ValueError if it is neither."""
    if isinstance(conversation, str):
        return owl1_turns(split_owl1_text(conversation))
    return llava_turns(conversation)


# --- public functions --------------------------------------------------------------------------------


def encode_raw(text: str, tokenizer: Tokenizer, variant: str) -> list[int]:
    """Tokenizes a whole prompt as written, in the variant's format. Here `</s>` is the token.

    For prompts that a program has built; use render_prompt for text that a user typed.
    """
    check_variant(variant)
    segments: list[Segment] = []
    for i, part in enumerate(text.split("</s>")):
        if i > 0:
            segments.append((EOS, False))
        segments += split_at_images(part)
    return encode_segments(segments, tokenizer)[0]


def render_prompt(messages: list[str | None], tokenizer: Tokenizer, variant: str, space: bool = False) -> list[int]:
    """The ids of a conversation that waits for an answer; each image is one IMAGE_TOKEN_ID.

    messages: alternating questions and answers; the last is None, the answer to generate. space: Owl2's prompt ends
    in a space, which is a token (the released chat has none; most of the released evaluation scripts do).
    Raises ValueError for other messages.
    """
    check_variant(variant)
    if len(messages) % 2 != 0 or not messages or messages[-1] is not None or None in messages[:-1]:
        raise ValueError("messages are alternating questions and answers, and the last is None")
    if variant == "owl1":
        text = "".join(speaker + text for speaker, text in owl1_lines(messages))
        return encode_segments(split_at_images(text), tokenizer)[0]
    segments = owl2_segments(messages, training=False)
    if space:
        segments[-1] = (segments[-1][0] + " ", False)
    return encode_segments(segments, tokenizer)[0]


def render_conversation(
    conversation: list[dict] | str, tokenizer: Tokenizer, variant: str
) -> tuple[list[int], list[int]]:
    """The (ids, labels) of a complete conversation; answers and their </s> are supervised.

    Each image is one IMAGE_TOKEN_ID. conversation: LLaVA's list of {"from": "human" or "gpt", "value": text}, or
    Owl1's text. Raises ValueError if it is neither.
    """
    check_variant(variant)
    if variant == "owl2":
        return encode_segments(owl2_segments(conversation_turns(conversation), training=True), tokenizer)
    is_text = isinstance(conversation, str)
    lines = split_owl1_text(conversation) if is_text else owl1_lines(llava_turns(conversation))
    owl1_turns(lines)  # raises ValueError if it is not a conversation
    return encode_segments(owl1_segments(lines), tokenizer)


def expand_images(ids: list[int], labels: list[int] | None, n: int) -> tuple[list[int], list[int] | None]:
    """Repeats each image's token n times (n_query + 1) in ids, and its label in labels."""
    counts = [n if token == IMAGE_TOKEN_ID else 1 for token in ids]
    long_ids = [token for token, count in zip(ids, counts) for _ in range(count)]
    if labels is None:
        return long_ids, None
    return long_ids, [label for label, count in zip(labels, counts) for _ in range(count)]


def check_variant(variant: str) -> None:
    if variant not in ("owl1", "owl2"):
        raise ValueError(f'variant is "owl1" or "owl2", not {variant!r}')
