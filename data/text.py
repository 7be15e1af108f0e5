"""From words to token ids, and which of them are supervised.

Both owls read LLaMA's SentencePiece tokens; what differs is how a conversation is
written down. An image is one IMAGE_ID here (`expand_images` gives it its positions).

Owl2, <s> once at the start, </s> after every answer:

    USER: <|image|>What is this? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT:
                                            ~~~~~~~~~~ supervised in training

Owl1, a system prompt first, each image on a line of its own:

    The following is a conversation ...
    Human: <image>
    Human: What is this?
    AI: A cat.
        ~~~~~~ supervised in training, with the </s> that training puts after it

Text is tokenised in pieces: at each image, and at each </s>, one ends and the next
begins; SentencePiece puts a space in front of each. In Owl1's training data `AI: `
and `\\nHuman: ` are pieces of their own as well. One renderer below writes each
format as a list of pieces, for prompts and for training alike.

What a person typed is text and nothing else: only `<image>` and `<|image|>` have a
meaning in it. A typed `</s>` becomes the letters of it.
"""

import json
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from model import IGNORE, IMAGE_ID

IMAGE_MARK = re.compile(r"<image>|<\|image\|>")
OWL1_SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = "\nHuman: "
AI = "AI: "
Piece = tuple[str | int, bool]  # a text, IMAGE_ID, or the end token; and whether it is supervised
LONER = "\x01"  # a character that SentencePiece joins to no other
END = -1  # stands for </s> in a list of pieces; no token has this id


class Tokenizer:
    """LLaMA's tokenizer.

    path: a folder that holds tokenizer.model, or that file. `legacy` in the tokenizer_config.json beside it
    (true when absent) is LLaMA's old habit: text after a </s> begins with a space that nobody wrote.
    Raises FileNotFoundError or ValueError in one sentence.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.model"
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer at {path}")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error})") from None
        self.path = path
        self.legacy = _read_legacy(path.with_name("tokenizer_config.json"))
        self.bos_id = self.pieces.bos_id()
        self.eos_id = self.pieces.eos_id()
        self.vocab_size = self.pieces.vocab_size()

    def encode(self, text: str, after_end: bool = False) -> list[int]:
        """The ids of one piece of text, without <s>. after_end: the piece follows a </s>.

        Raises ValueError for a text that is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the text holds half a character (a lone surrogate)") from None
        if after_end and not self.legacy:
            # A character that is in no piece takes SentencePiece's space upon itself, and is cut off again.
            return self.pieces.encode(LONER + text)[len(self.pieces.encode(LONER)) :]
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of an answer; control tokens and ids outside the vocabulary have none."""
        return self.pieces.decode([i for i in ids if 0 <= i < self.vocab_size])


def _read_legacy(path: Path) -> bool:
    if not path.is_file():
        return True
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    legacy = content.get("legacy") if isinstance(content, dict) else None
    return legacy is not False  # null stands for "not set"


# --- pieces ----------------------------------------------------------------------------------------


def mark(text: str, supervised: bool = False) -> list[Piece]:
    """Cuts a text at its images. Empty texts are left out."""
    pieces: list[Piece] = []
    end = 0
    for match in IMAGE_MARK.finditer(text):
        pieces.append((text[end : match.start()], supervised))
        pieces.append((IMAGE_ID, False))
        end = match.end()
    pieces.append((text[end:], supervised))
    return [piece for piece in pieces if piece[0] != ""]


def encode_pieces(pieces: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Turns pieces into (ids, labels), with <s> in front; labels are IGNORE where not supervised."""
    ids = [tokenizer.bos_id]
    labels = [IGNORE]
    after_end = False
    for content, supervised in pieces:
        if content == IMAGE_ID:
            new = [IMAGE_ID]
        elif content == END:
            new = [tokenizer.eos_id]
        else:
            new = tokenizer.encode(content, after_end)
        ids += new
        labels += new if supervised else [IGNORE] * len(new)
        after_end = content == END
    return ids, labels


def owl2_pieces(turns: list[str | None], training: bool) -> list[Piece]:
    """Owl2's format. turns: questions and answers in turn; None is the place of an answer to come.

    Each question runs together with the `ASSISTANT:` after it; the answer is a piece of its own, which gives
    the same tokens as one running text, since a piece's own space is the one after the colon.
    """
    pieces: list[Piece] = []
    for i in range(0, len(turns), 2):
        question, answer = turns[i], turns[i + 1]
        # The released template writes an empty message as the bare role.
        pieces += mark(f"USER: {question} ASSISTANT:" if question else "USER:ASSISTANT:")
        if answer is not None:
            pieces += mark(answer, supervised=training)
            pieces.append((END, training))
    return pieces


def owl1_lines(turns: list[str | None]) -> list[tuple[str, str]]:
    """Owl1's format as (speaker, what is said); images that begin a question get lines of their own."""
    lines = [("", OWL1_SYSTEM)]
    for i in range(0, len(turns), 2):
        question, answer = turns[i], turns[i + 1]
        first = re.match(r"(\s*(<image>|<\|image\|>))+\s*", question)
        if first is not None:
            question = question[first.end() :]
            lines += [(HUMAN, "<image>")] * len(IMAGE_MARK.findall(first[0]))
        if question or first is None:
            lines.append((HUMAN, question))
        lines[-1] = (HUMAN, lines[-1][1] + "\n")  # the line break before "AI: " belongs to the question
        lines.append((AI, "" if answer is None else answer))
    return lines


def owl1_lines_of_text(text: str) -> list[tuple[str, str]]:
    """Owl1's training text as (speaker, what is said). An answer begins where a line begins with `AI: `."""
    parts = re.split(rf"({HUMAN}|(?<=\n){AI})", text)
    return list(zip(["", *parts[1::2]], parts[0::2]))


def owl1_pieces(lines: list[tuple[str, str]]) -> list[Piece]:
    """Owl1's training format: each speaker and each thing said are pieces of their own, </s> ends an answer."""
    pieces: list[Piece] = []
    for speaker, said in lines:
        if speaker:
            pieces.append((speaker, False))
        pieces += mark(said, supervised=speaker == AI)
        if speaker == AI and said:
            pieces.append((END, True))
    return pieces


def owl1_turns(lines: list[tuple[str, str]]) -> list[str]:
    """Owl1's lines as questions and answers in turn; ValueError if they are not."""
    turns: list[str] = []
    question = ""
    for speaker, said in lines[1:]:
        if speaker == HUMAN:
            question += said
        elif not question or not said:
            raise ValueError("the text has an answer without a question, or an empty answer")
        else:
            turns += [question.removesuffix("\n"), said]
            question = ""
    if not turns or question:
        raise ValueError("the text is not a conversation of `Human: ` and `AI: ` lines that ends with an answer")
    return turns


# --- what others call --------------------------------------------------------------------------------


def encode_raw(text: str, tokenizer: Tokenizer, style: str) -> list[int]:
    """The ids of a whole prompt, given as it is written down. Here a `</s>` is the end token.

    It is meant for prompts that a program has put together; text that a person typed goes through
    render_prompt. The prompt is written in the style's own format, so that style changes nothing here but
    that an unknown one is a ValueError.
    """
    _check_style(style)
    pieces: list[Piece] = []
    for i, part in enumerate(text.split("</s>")):
        if i > 0:
            pieces.append((END, False))
        pieces += mark(part)
    return encode_pieces(pieces, tokenizer)[0]


def render_prompt(messages: list[str | None], tokenizer: Tokenizer, style: str, space: bool = False) -> list[int]:
    """The ids of a conversation that waits for an answer, one IMAGE_ID an image.

    messages: questions and answers in turn, the last None, where the answer goes. space: Owl2's prompt ends in a
    space, for LLaMA a token of its own (the released chat has none; most of the released evaluation scripts do).
    Raises ValueError for other messages.
    """
    _check_style(style)
    if len(messages) % 2 != 0 or not messages or messages[-1] is not None or None in messages[:-1]:
        raise ValueError("messages are questions and answers in turn, and the last is None: the answer to come")
    if style == "owl1":
        text = "".join(speaker + said for speaker, said in owl1_lines(messages))
        return encode_pieces(mark(text), tokenizer)[0]
    pieces = owl2_pieces(messages, training=False)
    if space:
        pieces[-1] = (pieces[-1][0] + " ", False)
    return encode_pieces(pieces, tokenizer)[0]


def render_conversation(
    conversation: list[dict] | str, tokenizer: Tokenizer, style: str
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a finished conversation, one IMAGE_ID an image; the answers and their </s> are supervised.

    conversation: LLaVA's list of {"from": "human" or "gpt", "value": text}, or Owl1's text.
    Raises ValueError in one sentence for a conversation that is neither.
    """
    _check_style(style)
    if style == "owl1":
        is_text = isinstance(conversation, str)
        lines = owl1_lines_of_text(conversation) if is_text else owl1_lines(llava_turns(conversation))
        owl1_turns(lines)  # a ValueError if it is no conversation
        return encode_pieces(owl1_pieces(lines), tokenizer)
    turns = conversation_turns(conversation)
    return encode_pieces(owl2_pieces(turns, training=True), tokenizer)


def conversation_turns(conversation: list[dict] | str) -> list[str]:
    """Questions and answers in turn, of LLaVA's turns or of Owl1's text; ValueError if it is neither."""
    if isinstance(conversation, str):
        return owl1_turns(owl1_lines_of_text(conversation))
    return llava_turns(conversation)


def llava_turns(conversation: list[dict]) -> list[str]:
    """LLaVA's turns as questions and answers in turn; ValueError if they are not."""
    if not isinstance(conversation, list) or not conversation:
        raise ValueError("a conversation is a list of turns, and this one has none")
    turns = []
    for i, turn in enumerate(conversation):
        speaker = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(f'turn {i} should be {{"from": "{speaker}", "value": a text}}')
        if speaker == "gpt" and not turn["value"].strip():
            raise ValueError(f"turn {i} is an empty answer")
        turns.append(turn["value"])
    if len(turns) % 2 != 0:
        raise ValueError("the last question has no answer")
    return turns


def expand_images(ids: list[int], labels: list[int] | None, n: int) -> tuple[list[int], list[int] | None]:
    """Gives each image its n positions (n_query + 1) in ids, and in labels where there are any."""
    long_ids: list[int] = []
    long_labels: list[int] = []
    for i, token in enumerate(ids):
        repeat = n if token == IMAGE_ID else 1
        long_ids += [token] * repeat
        if labels is not None:
            long_labels += [labels[i]] * repeat
    return long_ids, None if labels is None else long_labels


def _check_style(style: str) -> None:
    if style not in ("owl1", "owl2"):
        raise ValueError(f'style is "owl1" or "owl2", not {style!r}')
