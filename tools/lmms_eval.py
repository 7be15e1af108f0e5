"""Runs lmms-eval, a harness with many benchmarks, on a model: its model class for mPLUG-Owl and mPLUG-Owl2.

    pip install -r requirements-lmms.txt
    python -m tools.lmms_eval --model owlet --model_args pretrained=mplug-owl2-llama2-7b --tasks mme --batch_size 8

All flags are those of lmms-eval; --model_args has the arguments of OwletModel. docs/harnesses.md has examples.

    document --doc_to_visual--> PIL images --to_pixels--> [3, S, S] each --+
                                                                           +--> ask                 answers
    context --add_placeholders--> question with <image> placeholders ------+--> score_choices       scores

A document's text is one question, in the model's own prompt format, and its images come before the text unless the
text has as many placeholders (<image>) as there are images. A prompt that exceeds the model's context is left out with
a message: its answer is empty, and its log-probability is minus infinity.
"""

from command import exit_with_error, log, run, user_errors

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.files import printable
from data.image import DEFAULT_FIT, FITS, to_pixels
from data.text import IMAGE_PLACEHOLDER, Tokenizer
from generate import Sampling
from inference.batch import ask, count_placeholders, encode_prompt, score_choices
from inference.fast_decode import FastDecoder
from inference.loading import load_for_inference
from sample import TINY_FOLDER

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as error:
    exit_with_error(f"the package {error.name} is not installed: pip install -r requirements-lmms.txt")

DEFAULT_NEW_TOKENS = 1024  # of a task that sets no limit, as in lmms-eval's own models
Batch = list[tuple[int, str, list[Tensor]]]  # (index, question, its images' pixels [3, S, S] each)


class OwletModel(lmms):
    """A model as lmms-eval calls it. Its requests name a document; task_dict, which lmms-eval sets, has the documents.

    pretrained: a model folder; the name is lmms-eval's, which names its results after it. adapter: a LoRA adapter.
    quantize: "int8" or "int4". device, dtype, fit: as in sample.py. Raises ValueError or OSError.
    """

    is_simple = True  # the requests have a text and a function that returns the images, not a list of chat messages

    def __init__(
        self,
        pretrained: str = str(TINY_FOLDER),
        adapter: str | None = None,
        quantize: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        fit: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # not used: of lmms-eval's automatic batch size
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size must be a number of at least 1, not {batch_size}")
        for name, value, allowed in (
            ("quantize", quantize, (None, "int8", "int4")),
            ("dtype", dtype, ("auto", "float32", "bfloat16", "float16")),
            ("fit", fit, (None, *FITS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(filter(None, allowed))}, not {value}")
        self.batch_size = int(batch_size)
        self.tokenizer = Tokenizer(pretrained)
        self.model, self.device, _ = load_for_inference(
            Path(pretrained),
            adapter=None if adapter is None else Path(adapter),
            quantize_to=quantize,
            device=device or "auto",
            dtype=dtype,
        )
        self.model.config.llama.eos_id = self.tokenizer.eos_id
        self.decoder = FastDecoder(self.model)
        self.fit = fit or DEFAULT_FIT[self.model.config.variant]

    @classmethod
    def create_from_arg_string(cls, *arguments: object) -> "OwletModel":
        """Creates the model of a command line. For an error in it, lmms-eval itself would end with exit code 0."""
        with user_errors():
            return super().create_from_arg_string(*arguments)

    def generate_until(self, requests: list) -> list[str]:
        """Answers (context, settings, doc_to_visual, document's id, task, split) each. Raises ValueError.

        Of the settings, max_new_tokens, temperature, do_sample, top_p and until are used: an answer ends before the
        first of the texts in `until`.
        """
        answers = [""] * len(requests)
        groups = defaultdict(list)  # a batch has one limit and one way of sampling
        for i, (context, settings, *document) in enumerate(request.args for request in requests):
            if (settings.get("num_beams") or 1) != 1:
                raise ValueError(f"num_beams={settings['num_beams']} is not supported: there is no beam search here")
            limit = settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS
            groups[limit, read_sampling(settings)].append((i, context, document))
        with tqdm(total=len(requests), unit="answer", disable=None) as bar:
            for (limit, sampling), entries in groups.items():
                for batch in self.batches(entries):
                    indices, questions, images = unzip(batch)
                    options = {"max_new_tokens": limit, "sampling": sampling}
                    texts = ask(self.decoder, self.tokenizer, questions, images, **options)
                    for i, text in zip(indices, texts):
                        answers[i] = end_before(text, requests[i].args[1].get("until") or [])
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Returns (score, whether the continuation is the greedy answer) of continuations as the model's answer.

        A request is (context, continuation, doc_to_visual, document's id, task, split). The score is the sum of the
        tokens' log-probabilities if the continuation is a function of the document, as lmms-eval's interface says. It
        is minus this sum if it is a text: these are the answers of multiple-choice tasks, of which lmms-eval selects
        the one with the smallest score, since most of its models return a loss.
        """
        groups = defaultdict(list)  # the choices of a document share its prompt, and perhaps their first tokens
        for i, (context, _, *document) in enumerate(request.args for request in requests):
            groups[context, *document[1:]].append(i)
        members = list(groups.values())
        entries, answers = [], []
        for group in members:
            context, _, *document = requests[group[0]].args
            entries.append((len(entries), context, document))
            answers.append([self.read_continuation(requests[i]) for i in group])

        scores = [(-math.inf, False)] * len(requests)
        with tqdm(total=len(requests), unit="score", disable=None) as bar:
            for batch in self.batches(entries, answers):
                indices, questions, images = unzip(batch)
                texts = [answers[n] for n in indices]
                rows = score_choices(self.model, self.tokenizer, questions, images, choices=texts)
                for n, row in zip(indices, rows):
                    for i, score in zip(members[n], row):
                        scores[i] = score
                bar.update(sum(map(len, texts)))
        is_choice = [isinstance(request.args[1], str) for request in requests]
        return [(-log_p if choice else log_p, greedy) for choice, (log_p, greedy) in zip(is_choice, scores)]

    def read_continuation(self, request: object) -> str:
        _, continuation, *document = request.args
        if not isinstance(continuation, str):
            continuation = continuation(self.find_document(document))
        # Both prompt formats have a space before the answer, which is part of its first token.
        return continuation.removeprefix(" ")

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("tasks whose next question depends on the answer before are not supported")

    def find_document(self, document: list) -> dict:
        """document: the rest of a request, (doc_to_visual, document's id, task, split)."""
        _, doc_id, task, split = document
        return self.task_dict[task][split][doc_id]

    def batches(
        self, entries: list[tuple[int, str, list]], answers: list[list[str]] | None = None
    ) -> Iterator[Batch]:
        """Yields batches of entries (index, context, rest of the request), with pixels for the images.

        answers: by index, texts that follow the prompts. Leaves out, with a message, prompts that exceed the context.
        Raises ValueError for a document with something else than images, such as a video.
        """
        config = self.model.config
        for start in range(0, len(entries), self.batch_size):
            batch = []
            for i, context, document in entries[start : start + self.batch_size]:
                doc_to_visual, doc_id, task, _ = document
                visuals = [visual for visual in doc_to_visual(self.find_document(document)) or [] if visual is not None]
                if not all(isinstance(visual, Image.Image) for visual in visuals):
                    raise ValueError(f"{task}, document {doc_id}: only images are supported, not video or sound")
                question = add_placeholders(context, len(visuals))
                n_token = len(encode_prompt(question, self.model, self.tokenizer))
                n_token += max(len(self.tokenizer.encode(text)) for text in answers[i]) if answers else 0
                if n_token > config.llama.context:
                    size = f"{n_token} tokens, more than the context of {config.llama.context}"
                    log(f"{printable(task)}, document {doc_id} is left out: its prompt has {size}")
                    continue
                batch.append((i, question, [to_pixels(visual, config.image_size, self.fit) for visual in visuals]))
            if batch:
                yield batch


def unzip(batch: Batch) -> tuple[list[int], list[str], list[Tensor]]:
    """Returns the indices, the questions, and the images of all questions in one list."""
    indices, questions, images = zip(*batch)
    return list(indices), list(questions), [pixels for own in images for pixels in own]


def add_placeholders(context: str, n_image: int) -> str:
    """Puts the images before a text that has not a placeholder for each. A placeholder without an image is text."""
    if count_placeholders(context) == n_image:
        return context
    return "<image>" * n_image + IMAGE_PLACEHOLDER.sub(lambda match: "< " + match[0][1:], context)


def read_sampling(settings: dict) -> Sampling:
    """Returns how a task samples: greedily without a temperature, or with do_sample=False. Raises ValueError."""
    temperature = settings.get("temperature") or 0.0
    if settings.get("do_sample") is False or temperature == 0:
        return Sampling()
    return Sampling(temperature, top_p=settings.get("top_p") or None)  # some tasks say 0 for "not set"


def end_before(text: str, stops: str | list[str]) -> str:
    """Returns the text before the first of the stops in it."""
    stops = [stops] if isinstance(stops, str) else stops
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def keep_scores(unwrap: Callable) -> Callable:
    """Returns lmms-eval's function that reads what a model returned, mended for scores.

    In 0.7.3 it makes a text of (score, is greedy), of any model, and tasks of multiple choice then end with an error.
    """

    def unwrap_output(output: object) -> tuple:
        is_score = isinstance(output, tuple) and isinstance(output[0], float)
        return (output, None) if is_score else unwrap(output)

    return unwrap_output


def main() -> None:
    try:
        from lmms_eval import evaluator
        from lmms_eval.__main__ import cli_evaluate
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.models.registry_v2 import ModelManifest
    except ModuleNotFoundError as error:
        exit_with_error(f"the package {error.name} is not installed: pip install -r requirements-lmms.txt")
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("owlet", simple_class_path="tools.lmms_eval.OwletModel"))
    evaluator.unwrap_generation_output = keep_scores(evaluator.unwrap_generation_output)
    cli_evaluate()


if __name__ == "__main__":
    run(main)
