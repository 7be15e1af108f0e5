"""From questions to answers, in batches.

    questions --assign--> this process's conversations (most have one question), those on the same images together
                            | Runner.run, batch by batch
    image files --threads, prefetch--> pixels --encode_images--> visual tokens --+
                                       prompts, shortened to the context --------+--> ask: decode greedily
                                                                                      choose: most probable choice

Each image is read and encoded once, although benchmarks ask several questions about it: these are neighbors, and a
batch keeps the visual tokens that it shares with the previous one.

An answer does not depend on the other questions of its batch, nor on the number of processes:
- Rows are padded on the right and attention is causal, so no token attends to padding. Each row is read out at its own
  last token, and its new tokens overwrite its padding in the KV cache (`prompt_lengths` in generate.py).
- No layer mixes rows, decoding is greedy, and a finished row is ignored or dropped.
- The batch still changes the shapes of matrix products, and so their rounding. In float32 this changes an answer
  only if two tokens are equally probable up to rounding; in bfloat16 it may change a few answers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.image import load_image, to_pixels
from data.text import IMAGE_PLACEHOLDER, Tokenizer
from evaluation.question import ImageSource, Question, first_question
from inference.batch import ask, choose, encode_prompt
from inference.fast_decode import FastDecoder
from model import Owl
from training.distributed import Dist, all_gather_object

N_READ_THREADS = 4
N_PREFETCH = 2  # batches whose images are read in advance


@contextmanager
def open_image(source: ImageSource, folder: Path, question_id: str) -> Iterator[Image.Image]:
    """Yields an image as load_image reads it. A ValueError or OSError, also in the body, becomes a ValueError that
    names the file, or the question if the source is a file's content."""
    name = f"question {question_id!r:.80}" if isinstance(source, bytes) else str(folder / source)
    try:
        yield load_image(source if isinstance(source, bytes) else folder / source)
    except (ValueError, OSError) as error:
        raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from None


def assign(questions: list[Question], answers: dict[str, str], dist: Dist) -> list[list[Question]]:
    """Returns the unfinished conversations of this process. Those on the same images are neighbors.

    answers: by question id; a conversation is finished if all its questions are in it.
    """
    conversations: dict[str, list[Question]] = {}
    for question in questions:
        conversations.setdefault(first_question(question), []).append(question)
    groups: dict[object, list[list[Question]]] = {}
    for first, turns in conversations.items():
        if any(turn.id not in answers for turn in turns):
            groups.setdefault(tuple(turns[0].images) or (first, "no image"), []).append(turns)
    return [turns for group in list(groups.values())[dist.rank :: dist.world_size] for turns in group]


def image_ids(conversations: list[list[Question]]) -> dict[ImageSource, str]:
    """Returns the images of some conversations in order, each with the id of the last question about it."""
    return {source: turn.id for turns in conversations for turn in turns for source in turn.images}


@dataclass
class Runner:
    """Asks questions about images. folder: what image paths are relative to. fit: as in data/image.py."""

    model: Owl
    tokenizer: Tokenizer
    dist: Dist
    folder: Path
    fit: str
    blank: bool = False  # show a single color, which is about zero after normalization, instead of the images
    batch_size: int = 64  # conversations per batch
    min_new_tokens: int = 0
    max_new_tokens: int = 10

    @cached_property
    def decoder(self) -> FastDecoder:
        return FastDecoder(self.model)

    def run(
        self,
        questions: list[Question],
        answers: dict[str, str],
        on_answer: Callable[[list[Question], str], None] | None = None,
    ) -> dict[str, str]:
        """Asks the questions that have no answer yet. Returns the answers of all processes by question id.

        answers: those given already. on_answer: called with the turns in a prompt and the answer to the last of them.
        Raises ValueError before the first question is asked if one exceeds the context; and at the end, on the main
        process, if images cannot be read: their conversations are left out.
        """
        answers = dict(answers)
        conversations = assign(questions, answers, self.dist)
        for turn in (turn for turns in conversations for turn in turns):
            self.fit_prompt([turn], answers)
        n_new = sum(turn.id not in answers for turns in conversations for turn in turns)
        unreadable: dict[ImageSource, str] = {}

        # (disable=None: a bar on a terminal only)
        with tqdm(total=n_new, unit="question", disable=None if self.dist.is_main else True) as bar:
            for batch, images in self.encode_batches(conversations, unreadable):
                for turns, answer in self.answer_batch(batch, images, answers):
                    if on_answer:
                        on_answer(turns, answer)
                    bar.update()

        parts = all_gather_object(self.dist, (answers, unreadable))
        reasons = list({source: reason for _, part in parts for source, reason in part.items()}.values())
        if reasons and self.dist.is_main:
            listed = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
            raise ValueError(
                f"{len(reasons)} images cannot be read ({listed}); all other questions were asked. Once they are "
                "repaired, the same command continues a run that has --out"
            )
        return {id: answer for part, _ in parts for id, answer in part.items()}

    def encode_batches(
        self, conversations: list[list[Question]], unreadable: dict[ImageSource, str]
    ) -> Iterator[tuple[list[list[Question]], dict[ImageSource, Tensor]]]:
        """Yields (batch of conversations, visual tokens [n_query + 1, n_embd] of each of its images).

        Leaves out conversations with an image that cannot be read and adds the reason to `unreadable`.
        """
        batches = [conversations[i : i + self.batch_size] for i in range(0, len(conversations), self.batch_size)]
        pixels: dict[ImageSource, Future] = {}
        encoded: dict[ImageSource, Tensor] = {}
        with ThreadPoolExecutor(N_READ_THREADS) as pool, ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)  # after Ctrl-C, no more images are read
            for i, batch in enumerate(batches):
                # Read the images of this batch and of the next ones in threads; drop those of earlier batches.
                ids = image_ids([turns for part in batches[i : i + 1 + N_PREFETCH] for turns in part])
                pixels = {source: pixels.get(source) or pool.submit(self.read, source, ids[source]) for source in ids}
                for source in image_ids(batch):
                    try:
                        pixels[source].result()
                    except ValueError as error:
                        unreadable[source] = str(error)
                batch = [turns for turns in batch if not unreadable.keys() & image_ids([turns]).keys()]

                # Encode them, except those that the previous batch had as well.
                sources = image_ids(batch)
                new = [source for source in sources if source not in encoded]
                encoded = {source: encoded[source] for source in sources if source in encoded}
                if new:
                    images = torch.stack([pixels[source].result() for source in new])
                    with torch.inference_mode():
                        encoded |= zip(new, self.model.encode_images(images.to(self.model.llama.embed_tokens.weight)))
                yield batch, encoded

    def read(self, source: ImageSource, question_id: str) -> Tensor:
        """Returns an image's pixels, [3, image_size, image_size]. Raises ValueError as open_image does."""
        size = self.model.config.image_size
        if self.blank:
            return torch.zeros(3, size, size)
        with open_image(source, self.folder, question_id) as image:
            return to_pixels(image, size, self.fit)

    def answer_batch(
        self, batch: list[list[Question]], images: dict[ImageSource, Tensor], answers: dict[str, str]
    ) -> Iterator[tuple[list[Question], str]]:
        """Asks the first turns of all conversations, then the second turns, and so on. Adds the answers to `answers`.

        Yields (the turns in the prompt, the answer to the last of them).
        """
        for n in range(1, max(map(len, batch), default=0) + 1):
            kinds = defaultdict(list)  # questions that can be asked together
            for turns in (turns[:n] for turns in batch if len(turns) >= n and turns[n - 1].id not in answers):
                kinds[bool(turns[-1].choices), turns[-1].space].append(turns)
            for (has_choices, space), due in kinds.items():
                prompts = [self.fit_prompt(turns, answers) for turns in due]
                messages = [messages for _, messages in prompts]
                # Of all turns: the images of turns that were removed stay in the prompt.
                visual = [images[source] for turns in due for turn in turns for source in turn.images]
                if has_choices:
                    choices = [turns[-1].choices for turns in due]
                    texts = choose(self.model, self.tokenizer, messages, visual, choices=choices)
                else:
                    limits = {"max_new_tokens": self.max_new_tokens, "min_new_tokens": self.min_new_tokens}
                    texts = ask(self.decoder, self.tokenizer, messages, visual, space=space, **limits)
                for (turns, _), text in zip(prompts, texts):
                    answers[turns[-1].id] = text
                    yield turns, text

    def fit_prompt(self, turns: list[Question], answers: dict[str, str]) -> tuple[list[Question], list[str]]:
        """Returns the turns that are in the prompt of the last one, and their messages.

        If the prompt leaves no room for max_new_tokens, worked examples are removed from the last on, or a
        conversation's earlier turns from the first on; their images are kept, before the next turn.
        Raises ValueError if the question alone exceeds the context.
        """
        *before, question = turns
        context, encode = self.model.config.llama.context, self.tokenizer.encode
        removed_images = ""  # placeholders of removed turns
        n_more = max(len(encode(choice)) for choice in question.choices) - 1 if question.choices else 0  # see choose
        while True:
            messages = [text for turn in before for text in (turn.prompt, IMAGE_PLACEHOLDER.sub(" ", answers[turn.id]))]
            messages.append(question.prompt)
            messages[0] = removed_images + messages[0]
            length = len(encode_prompt(messages, self.model, self.tokenizer, question.space))
            room = context - length
            if room >= max(self.max_new_tokens, n_more) or not (before or question.shots):
                break
            if question.shots:
                question = question.with_fewer_shots()
            else:
                removed_images += "<image>" * len(before.pop(0).images)
        if room < n_more:
            raise ValueError(f"question {question.id!r:.80}: {length + n_more} tokens exceed the context of {context}")
        return [*before, question], messages
