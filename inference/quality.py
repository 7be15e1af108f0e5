"""Scores of image quality by Owl2 models trained for it: Q-Align (OneAlign), DeQA-Score and Q-Instruct.

    images --pad to a square--> pixels --+
                                         +--model, one forward pass--> logits at the last position
    prompt, "... The quality is" --------+        | softmax over the level words alone
                                                  v
                        probabilities of excellent, good, fair, poor, bad --weighted mean--> score

The model has learned to continue the prompt with a level word. A video is several frames in the place of one image.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.device import not_finite
from data.image import load_image, to_pixels
from data.text import Tokenizer, encode_raw, expand_images
from inference.batch import pad
from model import Owl

LEVELS = ("excellent", "good", "fair", "poor", "bad")  # from best to worst, as all words here
SCALES = {"0-1": (0.0, 1.0), "1-5": (1.0, 5.0), "0-100": (0.0, 100.0)}  # scores if only the worst or best word counts
KINDS = ("quality", "aesthetics", "video")
QUESTION = "USER: How would you rate the {} of this {}?"


@dataclass(frozen=True)
class Preset:
    """How a family of scorers was released. prompts: by kind; the image's placeholder is <|image|>."""

    prompts: dict[str, str]
    words: tuple[str, ...] = LEVELS
    scale: str = "0-1"
    fit: str = "pad"


ONEALIGN = {
    "quality": QUESTION.format("quality", "image") + "\n<|image|>\nASSISTANT: The quality of the image is",
    "aesthetics": QUESTION.format("aesthetics", "image") + "\n<|image|>\nASSISTANT: The aesthetics of the image is",
    "video": QUESTION.format("quality", "video") + "\n<|image|>\nASSISTANT: The quality of the video is",
}
# The prompts of Q-Align's and DeQA-Score's evaluation scripts, which gave the published numbers.
PUBLISHED = {
    "quality": QUESTION.format("quality", "image") + "\n<|image|> ASSISTANT: The quality of the image is",
    "aesthetics": "USER: <|image|>How would you rate the aesthetics of this image? ASSISTANT: The aesthetics of the "
    "image is",
}
Q_INSTRUCT = {"quality": "USER: <|image|>Rate the quality of the image.\nASSISTANT: "}
PRESETS = {
    "onealign": Preset(ONEALIGN),
    "deqa": Preset({"quality": ONEALIGN["quality"]}, scale="1-5"),
    "q-instruct": Preset(Q_INSTRUCT, words=("good", "average", "poor"), fit="crop"),
    "published": Preset(PUBLISHED),
}


def prompt_of(preset: str, kind: str) -> str:
    """Returns the prompt. Raises ValueError if the preset has none for this kind."""
    if kind not in PRESETS[preset].prompts:
        raise ValueError(f"the preset {preset} has no prompt for {kind}: it has {', '.join(PRESETS[preset].prompts)}")
    return PRESETS[preset].prompts[kind]


def word_ids(words: tuple[str, ...], tokenizer: Tokenizer, first_token: bool = False) -> list[int]:
    """Returns the token id of each word. Raises ValueError if a word is several tokens.

    first_token: a word of several tokens counts by the first, which must differ from the first of all other words.
    """
    tokens = {word: tokenizer.encode(word) for word in words}
    for word, ids in tokens.items():
        if len(ids) > 1 and not first_token:
            raise ValueError(f"{word!r} is {len(ids)} tokens of this tokenizer, not one (see --first-token)")
    first = [ids[0] for ids in tokens.values()]
    if len(set(first)) < len(first):
        raise ValueError(f"the first tokens of {', '.join(words)} are not all different")
    return first


class Scorer:
    """Computes the probabilities of a preset's words. Raises ValueError as prompt_of and word_ids, or for an Owl1.

    fit: how images become squares (default: the preset's). first_token: as in word_ids.
    """

    def __init__(
        self,
        model: Owl,
        tokenizer: Tokenizer,
        preset: str = "onealign",
        kind: str = "quality",
        *,
        fit: str | None = None,
        first_token: bool = False,
    ):
        if model.config.variant != "owl2":
            raise ValueError(f"the model is an {model.config.variant}; image quality models are Owl2 models")
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.prompt, self.fit = prompt_of(preset, kind), fit or PRESETS[preset].fit
        self.ids = word_ids(PRESETS[preset].words, tokenizer, first_token)

    def read(self, path: str | Path, fps: float = 1.0, max_frames: int = 8) -> list[Tensor]:
        """Returns the pixels of an image, or of a video's frames. Raises OSError or ValueError if it is unreadable."""
        if self.kind == "video":
            from data.video import read_frames

            images = read_frames(path, fps=fps, max_frames=max_frames)
        else:
            images = [load_image(path)]
        self.encode(len(images))
        return [to_pixels(image, self.model.config.image_size, self.fit) for image in images]

    def encode(self, n_frames: int) -> list[int]:
        """Returns the token ids of the prompt with n_frames images. Raises ValueError if they exceed the context."""
        prompt = self.prompt.replace("<|image|>", "<|image|>" * n_frames)
        ids = encode_raw(prompt, self.tokenizer, "owl2")
        ids = expand_images(ids, None, self.model.config.n_visual_tokens)[0]
        if len(ids) > self.model.config.llama.context:
            raise ValueError(f"{n_frames} frames exceed the context of {self.model.config.llama.context} tokens")
        return ids

    @torch.inference_mode()
    def probabilities(self, images: list[list[Tensor]]) -> Tensor:
        """Returns the probabilities [B, number of words] after the prompt, in one forward pass.

        images: per row the frames [3, S, S] in the place of the placeholder: one, or those of a video. Raises
        ValueError if a prompt exceeds the context, or the logits are not finite.
        """
        model, rows = self.model, [self.encode(len(frames)) for frames in images]
        ids, stacked, lengths = pad(rows, [frame for frames in images for frame in frames], model)
        x = model.llama(*model.embed(ids, stacked))  # [B, T, n_embd]
        last = x[torch.arange(len(rows)), lengths - 1]  # [B, n_embd]
        logits = model.llama.lm_head(last)[:, self.ids].float()
        if not logits.isfinite().all():
            raise not_finite(model, stacked)
        return logits.softmax(dim=-1).cpu()


def scores_of(probabilities: Tensor, scale: str) -> Tensor:
    """Returns scores [B], the mean of equally spaced values: the first word counts as the highest of the scale."""
    low, high = SCALES[scale]
    return probabilities @ torch.linspace(high, low, probabilities.shape[1])
