"""mPLUG-Owl and mPLUG-Owl2: a vision tower, an abstractor and a language model, joined.

    images [N, 3, H, W]                       ids [B, T], IMAGE_ID where an image word goes
      | vit                vit.py               | embed_tokens
    image tokens [N, 1 + P, C]                text embeddings [B, T, n_embd]
      | abstractor         abstractor.py        |
    image words [N, n_query + 1, n_embd] -----> written over the IMAGE_ID places
                                                |
                                              x [B, T, n_embd]
                                                | llama       llama.py
                                              logits [B, T, vocab_size]

Owl1 (arXiv 2304.14178) and Owl2 (arXiv 2311.04257) are the same drawing. Owl2 adds
position codes to the abstractor, sees 448 pixels instead of 224, and gives image
words their own norms and K/V projections in the language model (the
modality-adaptive module), and words its prompts differently. Each difference is a
setting in OwlConfig; there is one path through the code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abstractor import Abstractor, AbstractorConfig
from decode import Sampling, decode, take_step
from llama import Cache, Documents, Llama, LlamaConfig, Split
from vit import ViT, ViTConfig

IMAGE_ID = -200  # in `ids`: an image word stands here. Each image has n_query + 1 of them, in a row.
IGNORE = -100  # in `labels`: not supervised
LOSS_CHUNK = 1024  # supervised tokens whose logits are held at one time


@dataclass
class OwlConfig:
    """What an Owl is made of. style: "owl1" or "owl2", which decides the prompt format."""

    style: str
    vit: ViTConfig
    abstractor: AbstractorConfig
    llama: LlamaConfig

    @property
    def image_size(self) -> int:
        return self.vit.image_size

    @property
    def n_query(self) -> int:
        return self.abstractor.n_query

    @property
    def image_words(self) -> int:
        """Positions that one image takes in the language model's sequence."""
        return self.abstractor.n_query + 1

    def resize(self, image_size: int) -> None:
        """Sets the image size. ValueError if patches do not tile it."""
        if image_size < 1 or image_size % self.vit.patch_size != 0:
            raise ValueError(f"an image size of {image_size} is not a multiple of the patch size {self.vit.patch_size}")
        self.vit.image_size = image_size
        if self.style == "owl2":
            self.abstractor.grid_size = self.vit.grid_size


def owl1(vit: ViTConfig, abstractor: AbstractorConfig, llama: LlamaConfig) -> OwlConfig:
    return OwlConfig("owl1", vit, abstractor, llama)


def owl2(vit: ViTConfig, abstractor: AbstractorConfig, llama: LlamaConfig) -> OwlConfig:
    """Sets what an Owl2 needs in the three parts, and joins them."""
    abstractor.grid_size = vit.grid_size
    abstractor.dropout = 0.0
    llama.adaptive = True
    return OwlConfig("owl2", vit, abstractor, llama)


def tiny_parts() -> tuple[ViTConfig, AbstractorConfig, LlamaConfig]:
    """Parts small enough to be trained on two CPU cores within half an hour."""
    return (
        ViTConfig(image_size=64, patch_size=8, n_layer=4, n_head=4, n_embd=128, n_mlp=512),
        AbstractorConfig(n_query=8, n_layer=2, n_head=4, n_embd=128, n_mlp=344, n_out=128, dropout=0.0),
        LlamaConfig(vocab_size=512, context=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_mlp=344),
    )


def mid_parts() -> tuple[ViTConfig, AbstractorConfig, LlamaConfig]:
    """Parts for benchmarks: every cost of the 7B is visible, on a laptop."""
    return (
        ViTConfig(image_size=448, n_layer=6, n_head=4, n_embd=256, n_mlp=1024),
        AbstractorConfig(n_layer=6, n_head=4, n_embd=256, n_mlp=704, n_out=512),
        LlamaConfig(n_layer=8, n_head=8, n_kv_head=8, n_embd=512, n_mlp=1376),
    )


PRESETS = {
    "owl1-7b": lambda: owl1(ViTConfig(), AbstractorConfig(), LlamaConfig()),
    "owl2-7b": lambda: owl2(ViTConfig(image_size=448), AbstractorConfig(), LlamaConfig()),
    "tiny-owl1": lambda: owl1(*tiny_parts()),
    "tiny-owl2": lambda: owl2(*tiny_parts()),
    "mid-owl2": lambda: owl2(*mid_parts()),
}


def init_weights(part: nn.Module) -> None:
    """Draws random weights for a model or a part of one: each layer keeps the size of what passes through it."""
    for module in part.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in part.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in part.named_parameters():
        if name.split(".")[-1] in ("cls_token", "position_embedding", "queries", "eos"):
            # Random, the queries above all: equal ones would stay equal in training.
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


class Owl(nn.Module):
    """A model that reads images and text, and writes text."""

    def __init__(self, config: OwlConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config.vit)
        self.abstractor = Abstractor(config.abstractor)
        self.llama = Llama(config.llama)
        self.step = take_step  # of generate; or decode.compiled_step()
        self.tokenizer_folder: Path | None = None  # whose tokenizer files go with the weights

    def init_weights(self) -> "Owl":
        """Draws random weights, for training from scratch; returns the model."""
        init_weights(self)
        return self

    def forward(
        self,
        ids: Tensor,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reads a batch of sequences; with labels, says how well each next token was foreseen.

        ids: [B, T] int64, IMAGE_ID at the n_query + 1 places of each image; rows padded on the right.
        images: [N, 3, image_size, image_size], in the order of their places in ids (row by row); or what
        encode_images made of them.
        labels: [B, T] int64, aligned with ids (the shift by one happens here), IGNORE where not supervised.
        documents: where ids is one row of several sequences, where they begin (their first labels are IGNORE).
        Returns (logits [B, T, vocab_size], None) without labels and (None, loss []) with them: the mean
        over the supervised tokens, 0 where there is none.
        Raises ValueError if the images are of another size or number than ids has places for.
        """
        x, split = self._embed(ids, images)
        x = self.llama(x, split, documents=documents)  # [B, T, n_embd]
        if labels is None:
            return self.llama.lm_head(x), None
        # Position t foresees token t + 1. Logits are computed only where that token is supervised.
        targets = labels[:, 1:]
        supervised = targets != IGNORE
        targets = targets[supervised]
        return None, summed_loss(self.llama.lm_head, x[:, :-1][supervised], targets) / max(len(targets), 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images as words: [N, 3, image_size, image_size] to [N, n_query + 1, n_embd]; ValueError for other sizes."""
        return self.abstractor(self.vit(images))

    def _embed(self, ids: Tensor, images: Tensor | None) -> tuple[Tensor, Split | None]:
        """Embeds the text, writes the image words over their places: [B, T, n_embd], and which is which."""
        n_image = self._check_images(ids, images)
        is_image = ids == IMAGE_ID
        x = self.llama.embed_tokens(ids.masked_fill(is_image, 0))
        if n_image == 0:
            return x, None
        words = images if images.ndim == 3 else self.encode_images(images)
        x = x.masked_scatter(is_image[..., None], words.to(x.dtype))
        return x, Split.of(is_image, n_image * self.config.image_words)

    def _check_images(self, ids: Tensor, images: Tensor | None) -> int:
        """Returns the number of images; ValueError unless they are of the model's size and ids has their places."""
        n_image = 0
        if images is not None:
            n_image = images.shape[0]
            size, n_word, n_embd = self.config.image_size, self.config.image_words, self.config.llama.n_embd
            if images.shape[1:] not in ((3, size, size), (n_word, n_embd)):
                raise ValueError(
                    f"this model takes images of shape [N, 3, {size}, {size}], or what encode_images made of them, "
                    f"[N, {n_word}, {n_embd}], not {list(images.shape)}"
                )
        places = int((ids == IMAGE_ID).sum())
        words = self.config.image_words
        if places != n_image * words:
            raise ValueError(
                f"{n_image} images take {n_image * words} places in ids ({words} each), but ids has {places}"
            )
        return n_image

    @torch.inference_mode(False)  # always: so it may be rewound anywhere, and a step is compiled for one kind alone
    def make_cache(self, B: int = 1) -> Cache:
        """An empty cache for `generate`: for conversations of B rows, which grows with them."""
        weight = self.llama.embed_tokens.weight
        return Cache(self.config.llama, B, weight.device, weight.dtype)

    def generate(
        self,
        ids: Tensor,
        images: Tensor | None = None,
        lengths: Tensor | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: bool = True,
        cache: Cache | None = None,
        min_new_tokens: int = 0,
    ) -> Iterator[Tensor]:
        """Continues a batch of prompts, yielding the next ids of all rows, [B] on the CPU, one step at a time.

        ids: [B, T] int64 as in forward; lengths [B]: rows shorter than T are padded on the right.
        images: as in forward, or what encode_images made of them, so that many questions may share it.
        temperature 0 takes the likeliest token; above 0 one is drawn, among the top_k likeliest, or the
        fewest that together have probability top_p. With a seed, each row draws the same numbers as it
        would alone, whatever its neighbours; so two rows with the same prompt get the same answer.
        A row ends with </s>, which is yielded, and yielded again while other rows go on; the iterator ends
        when all rows have, or after max_new_tokens. stop=False does not stop at </s>. Rows also end where
        the context does. None of the first min_new_tokens is </s>.
        cache: of make_cache. What it holds comes before ids, and is not computed again. Afterwards it holds the
        prompt as well, and the tokens yielded but for </s> and perhaps the last: cache.lengths of each row in all.
        (With max_new_tokens 0 nothing is read.)
        Raises ValueError, at the call, for what cannot be done.
        """
        self._check_images(ids, images)
        B, T = ids.shape
        lengths = torch.full((B,), T) if lengths is None else torch.as_tensor(lengths).cpu()
        if lengths.shape != (B,) or T == 0 or int(lengths.min()) < 1 or int(lengths.max()) > T:
            raise ValueError(f"lengths must hold a number from 1 to {T} for each of the {B} rows of ids")
        if cache is not None and cache.lengths.shape != (B,):
            raise ValueError(f"the cache is of {len(cache.lengths)} rows, but ids of {B}")
        held = lengths if cache is None else lengths + cache.lengths.cpu()
        context = self.config.llama.context
        if int(held.max()) > context:
            raise ValueError(f"a prompt of {int(held.max())} tokens does not fit the context of {context}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(f"min_new_tokens must be from 0 to max_new_tokens, {max_new_tokens}, not {min_new_tokens}")
        sampling = Sampling(temperature, top_k, top_p)
        sampling.check()
        n = min(max_new_tokens, context + 1 - int(held.min()))  # the last token need not fit
        steps = self._generate(ids, images, lengths, held, n, sampling, seed, stop, cache, min_new_tokens)
        return (tokens.clone() for tokens in steps)  # tensors made in inference mode cannot be used in training

    @torch.inference_mode()
    def _generate(
        self,
        ids: Tensor,
        images: Tensor | None,
        lengths: Tensor,
        held: Tensor,
        n: int,
        sampling: Sampling,
        seed: int | None,
        stop: bool,
        cache: Cache | None,
        min_new_tokens: int,
    ) -> Iterator[Tensor]:
        """What generate promises, once its arguments are found good. held: [B], lengths with what the cache holds."""
        if n == 0:
            return
        if cache is not None and not torch.equal(lengths + cache.lengths.cpu(), held):
            raise ValueError("the cache has changed since the call: read an answer before the next question")
        B, T = ids.shape
        shrink = cache is None and self.step is take_step
        cache = cache or self.make_cache(B)
        before = cache.longest
        cache.grow(max(before + T, min(before + T + n, self.config.llama.context)))
        x, split = self._embed(ids, images)
        x = self.llama(x, split, cache, before + T if before else None)
        x = x[torch.arange(B, device=x.device), lengths.to(x.device) - 1]  # [B, n_embd]
        cache.lengths.copy_(held)
        cache.longest = int(held.max())
        if seed is None:
            luck = torch.rand(n, B)
        else:  # one number for all rows: then a row draws what it would draw alone
            generator = torch.Generator().manual_seed(seed)
            luck = torch.rand(n, 1, generator=generator).expand(n, B)
        luck = luck.to(x.device)
        yield from decode(self.llama, x, cache, held, luck, sampling, stop, self.step, shrink, min_new_tokens)


def summed_loss(lm_head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies at M supervised tokens, float32. x: [M, n_embd], targets: [M] int64.

    A chunk of them at a time, whose logits the backward pass computes again: of M x 32,000 float32 numbers no more
    than LOSS_CHUNK x 32,000 are ever held.
    """

    def of_chunk(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(lm_head(x).float(), targets, reduction="sum")

    total = torch.zeros((), device=x.device)
    for chunk in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
        total = total + checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total
