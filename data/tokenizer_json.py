"""Reads a tokenizer.json, the format of Hugging Face's tokenizers, as if it were a SentencePiece model.

Two kinds are supported, and both are byte-pair encodings (BPE):

    SentencePiece's   LLaMA's tokenizer, in folders that transformers 5 has saved: "▁What", "▁is", "<0x0A>"
    byte-level        GPT-2's and SmolLM2's: every byte is a printable character, a space "Ġ": "ĠWhat", "Ġis", "Ċ"

SentencePiece puts a space in front of each text that it tokenizes, and removes it in decode. JsonProcessor does so for
byte-level tokenizers too: with any tokenizer, the segments of data/text.py become the same text.

    "USER: What is this? ASSISTANT:" + "A cat."  -->  " USER: What is this? ASSISTANT: A cat."
"""

from pathlib import Path

from common.files import MAX_JSON, read_bytes, read_json


class JsonProcessor:
    """The methods of sentencepiece.SentencePieceProcessor that this project uses, with the same results for LLaMA.

    path: a tokenizer.json. The tokenizer_config.json beside it names its <s> and </s>. To be called inside
    `with reading(path)`. Raises ValueError for another kind of tokenizer, or without the package tokenizers.
    """

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise ValueError("reading a tokenizer.json needs the package tokenizers: pip install tokenizers") from None
        self.tokenizer = Tokenizer.from_buffer(read_bytes(path, MAX_JSON))
        self.tokenizer.encode_special_tokens = True  # a typed </s> is text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.is_byte_level = type(self.tokenizer.decoder).__name__ == "ByteLevel"
        is_bpe = type(self.tokenizer.model).__name__ == "BPE"
        if not is_bpe or not (self.is_byte_level or self.id_to_piece(self.encode("a")[0]).startswith("▁")):
            raise ValueError("it is neither SentencePiece's nor a byte-level tokenizer")
        config = path.with_name("tokenizer_config.json")
        names = read_json(config) if config.is_file() else {}
        self.bos, self.eos = self.find(names.get("bos_token", "<s>")), self.find(names.get("eos_token", "</s>"))

    def find(self, token: object) -> int:
        """The id of a token in tokenizer_config.json, its text or {"content": its text, ...}; -1 if there is none."""
        text = token.get("content") if isinstance(token, dict) else token
        return self.piece_to_id(text) if isinstance(text, str) else -1

    def encode(self, text: str) -> list[int]:
        """Tokenizes a text with a space in front of it; an empty text has no tokens."""
        text = " " + text if self.is_byte_level and text else text
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids)
        return text.removeprefix(" ") if self.is_byte_level else text

    def id_to_piece(self, token: int) -> str:
        """The text of one token, with "▁" for a space. Bytes that are only a part of a character become U+FFFD."""
        piece = self.tokenizer.id_to_token(token)
        if self.is_byte_level and piece is not None and token not in self.tokenizer.get_added_tokens_decoder():
            piece = self.tokenizer.decode([token]).replace(" ", "▁")
        return piece or ""

    def piece_to_id(self, piece: str) -> int:
        token = self.tokenizer.token_to_id(piece)
        return -1 if token is None else token

    def is_byte(self, token: int) -> bool:
        """Whether the token is one byte that SentencePiece writes as <0x0A>."""
        return not self.is_byte_level and len(piece := self.id_to_piece(token)) == 6 and piece.startswith("<0x")

    def bos_id(self) -> int:
        return self.bos

    def eos_id(self) -> int:
        return self.eos

    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()
