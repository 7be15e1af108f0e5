"""mPLUG-Owl and mPLUG-Owl2: a vision encoder, a visual abstractor and a language model.

    images [N, 3, H, W]                       ids [B, T], IMAGE_TOKEN_ID at the placeholder positions
      | vit                vit.py               | embed_tokens
    patch features [N, 1 + P, C]              text embeddings [B, T, n_embd]
      | abstractor         abstractor.py        |
    visual tokens [N, n_query + 1, n_embd] ---> scattered into the placeholder positions
                                                |
                                              x [B, T, n_embd]
                                                | llama       llama.py
                                              logits [B, T, vocab_size]

Owl1 (arXiv 2304.14178) and Owl2 (arXiv 2311.04257) share this structure. Owl2 adds position embeddings to the
abstractor, reads images of 448 instead of 224 pixels, gives visual tokens their own norms and K/V projections in
the decoder (the modality-adaptive module), and uses another prompt format. OwlConfig has these differences.

Example: Owl2-7B, the prompt "USER: <image>What is this? ASSISTANT:" with one image of 448 pixels.

    images                    [1, 3, 448, 448]
    patch features            [1, 1025, 1024]     32 x 32 patches of 14 pixels, and the class token
    visual tokens             [1, 65, 4096]       64 queries, and the end-of-image embedding
    ids                       [1, 79]             14 text tokens including <s>, and 65 placeholders
    x                         [1, 79, 4096]       14 rows are text embeddings, 65 are visual tokens
    logits                    [1, 79, 32000]      the last row predicts the first token of the answer
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abstractor import Abstractor, AbstractorConfig
from llama import Llama, LlamaConfig, Modality, PackedSequences
from vit import ViT, ViTConfig

IMAGE_TOKEN_ID = -200  # in `ids`: placeholder for a visual token. Each image has n_query + 1 of them in a row.
IGNORE_INDEX = -100  # in `labels`: not supervised
LOSS_CHUNK = 1024  # supervised tokens whose logits are in memory at one time


@dataclass
class OwlConfig:
    """Configuration of an Owl. variant: "owl1" or "owl2", which also decides the prompt format."""

    variant: str
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
    def n_visual_tokens(self) -> int:
        """Positions of one image in the decoder's sequence: the queries and the end-of-image embedding."""
        return self.abstractor.n_query + 1


class Owl(nn.Module):
    """A language model that reads images and text and predicts text."""

    def __init__(self, config: OwlConfig):
        super().__init__()
        self.config = config
        self.vit = ViT(config.vit)
        self.abstractor = Abstractor(config.abstractor)
        self.llama = Llama(config.llama)
        self.tokenizer_folder: Path | None = None  # whose tokenizer files save_model copies

    def forward(
        self,
        ids: Tensor,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns (logits [B, T, vocab_size], None) without labels, (None, loss) with labels; the loss is a scalar.

        ids: [B, T] int64, padded on the right (which needs no mask, since attention is causal); IMAGE_TOKEN_ID at the
        n_query + 1 positions of each image. images: as in embed. labels: [B, T] int64, aligned with ids (the shift
        happens here), IGNORE_INDEX where not supervised; the loss is the mean next-token cross-entropy over supervised
        tokens, 0 if there are none. packed: if ids is one packed row; it has the positions that are supervised.
        """
        x, modality = self.embed(ids, images, packed.n_placeholder if packed else None)  # [B, T, n_embd]
        x = self.llama(x, modality, packed=packed)  # [B, T, n_embd]
        if labels is None:
            return self.llama.lm_head(x), None

        # Position t predicts token t + 1. Logits are computed only where that token is supervised.
        targets = labels[:, 1:].flatten()  # [B * (T - 1)]
        supervised = packed.supervised if packed else (targets != IGNORE_INDEX).nonzero()[:, 0]  # nonzero synchronizes
        x = x[:, :-1].flatten(0, 1).index_select(0, supervised)  # [M, n_embd]
        return None, cross_entropy_sum(self.llama.lm_head, x, targets[supervised]) / max(len(supervised), 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """[N, 3, image_size, image_size] normalized pixels to visual tokens [N, n_query + 1, n_embd]."""
        return self.abstractor(self.vit(images))

    def embed(
        self, ids: Tensor, images: Tensor | None = None, n_placeholder: int | None = None
    ) -> tuple[Tensor, Modality | None]:
        """Embeds text tokens and scatters the visual tokens into their placeholder positions.

        images: pixels [N, 3, S, S] or visual tokens [N, n_query + 1, n_embd] from encode_images, in the order of
        their placeholders in ids (row by row). n_placeholder: their number, or None: waits for the device to count.
        Returns x [B, T, n_embd] and the modality of each token. Raises ValueError if their numbers do not match.
        """
        is_image = ids == IMAGE_TOKEN_ID  # [B, T]
        n_visual = 0 if images is None else len(images) * self.config.n_visual_tokens
        n_placeholder = int(is_image.sum()) if n_placeholder is None else n_placeholder
        if n_placeholder != n_visual:
            raise ValueError(f"the images have {n_visual} visual tokens, but ids has {n_placeholder} placeholders")

        x = self.llama.embed_tokens(ids.masked_fill(is_image, 0))  # [B, T, n_embd]
        if n_visual == 0:  # text only: the vision encoder does not run
            return x, None
        visual = images if images.ndim == 3 else self.encode_images(images)  # [N, n_query + 1, n_embd]
        modality = Modality.from_mask(is_image, n_visual)  # its order ends with the placeholders, row by row
        x = x.flatten(0, 1).index_copy(0, modality.order[modality.n_text :], visual.flatten(0, 1).to(x.dtype))
        return x.view(*ids.shape, -1), modality


def cross_entropy_sum(lm_head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of M supervised tokens, float32. x: [M, n_embd], targets: [M] int64.

    Works on LOSS_CHUNK tokens at a time and recomputes their logits in the backward pass, so that at most
    LOSS_CHUNK x vocab_size of the M x vocab_size logits are in memory.
    """

    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(lm_head(x).float(), targets, reduction="sum")

    loss = torch.zeros((), device=x.device)
    for chunk in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
        loss = loss + checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
    return loss
