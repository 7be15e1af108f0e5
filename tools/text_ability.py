"""Measures what a language model can do without images: before training, and after each stage.

    python -m tools.text_ability --llama checkpoints/smollm2          # a LLaMA, before it learns to see
    python -m tools.text_ability --weights runs/smol-owl2/stage2      # the language model of an Owl

    perplexity     of data/smollm/english.txt, 510 words written for this purpose: exp of the mean loss per token
    questions      of --questions (data/smollm/text_test.json): the share of greedy answers that contain the truth
    fingerprint    of the logits on the text: equal if and only if nothing has changed, to the bit

Questions are asked in the prompt format of the model, for --llama in that of --variant. An answer that contains the truth
as a word, in any case, counts: a language model that was never trained on the papers' request for a short answer writes
sentences.
"""

from command import ArgumentParser, run, user_errors

import hashlib
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.text import Tokenizer
from evaluation.qa_file import read_cases
from common.files import printable, read_bytes, reading, write_json
from inference.batch import ask
from inference.fast_decode import FastDecoder
from inference.loading import select_device
from model import Owl
from training.parallel import materialize
from training.presets import PRESETS
from training.pretrained import llama_tensors
from weights import load_model

BATCH = 50  # questions that are answered at a time
ENGLISH = Path(__file__).resolve().parents[1] / "data/smollm/english.txt"


def load_llama(folder: Path, device: torch.device, variant: str) -> Owl:
    """Loads SmolLM2, from data/smollm/prepare.py, as the language model of an Owl that never sees an image."""
    with torch.device("meta"):
        model = Owl(replace(PRESETS["smol-owl1"](), variant=variant))
    rest = {name: x for part in ("vit", "abstractor") for name, x in getattr(model, part).named_parameters(part)}
    blank = ((name, torch.zeros(x.shape)) for name, x in rest.items())
    materialize(model, [*blank, *llama_tensors(folder, model.state_dict())], device)
    return model.eval()


@torch.no_grad()
def read_text(model: Owl, tokenizer: Tokenizer, text: str) -> tuple[float, str]:
    """Returns the perplexity of a text, paragraph by paragraph, and the fingerprint of the logits."""
    loss, n_token, digest, device = 0.0, 0, hashlib.sha256(), next(model.parameters()).device
    for paragraph in text.strip().split("\n\n"):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(paragraph)]])
        logits = model(ids.to(device))[0][0].float().cpu()  # [T, vocab_size]
        loss += F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
        n_token += ids.shape[1] - 1
        digest.update(logits.numpy().tobytes())
    return math.exp(loss / n_token), digest.hexdigest()[:16]


def has_word(answer: str, truth: str) -> bool:
    """Whether the answer contains the truth, not as a part of a longer word."""
    return re.search(rf"(?<!\w){re.escape(truth)}(?!\w)", answer, re.IGNORECASE) is not None


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--weights", type=Path, metavar="FOLDER", help="a model folder")
    which.add_argument("--llama", type=Path, metavar="FOLDER", help="the folder of SmolLM2")
    add = parser.add_argument
    add("--questions", type=Path, default=Path("data/smollm/text_test.json"), help="default: %(default)s")
    add("--variant", choices=("owl1", "owl2"), default="owl2", help="prompt format for --llama (default: owl2)")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="length of an answer (default: %(default)s)")
    add("--device", default="cpu", help="cpu (default), cuda, mps, or auto; the fingerprint depends on it")
    add("--show", type=int, default=0, metavar="N", help="print the first N answers")
    add("--out", type=Path, metavar="FILE", help="write the numbers to this JSON file too")
    args = parser.parse_args()
    with user_errors():
        folder = args.weights or args.llama
        tokenizer = Tokenizer(folder)
        cases = read_cases(args.questions, args.questions.parent)
        device = select_device(args.device)
        model = load_model(folder, device) if args.weights else load_llama(folder, device, args.variant)
        model.config.llama.eos_id = tokenizer.eos_id
        with reading(ENGLISH):
            text = read_bytes(ENGLISH, 100_000).decode("utf-8")

    perplexity, fingerprint = read_text(model, tokenizer, text)
    print(f"perplexity   {perplexity:.4f}\nfingerprint  {fingerprint}")
    decoder, prompts, answers = FastDecoder(model), [case.question.prompt for case in cases], []
    for i in tqdm(range(0, len(cases), BATCH), unit="batch", disable=None):
        answers += ask(decoder, tokenizer, prompts[i : i + BATCH], [], max_new_tokens=args.max_new_tokens)
    is_right = defaultdict(list)
    for i, (case, answer) in enumerate(zip(cases, answers)):
        for kind in ("all questions", case.notes.get("kind", "other")):
            is_right[kind].append(has_word(answer, case.question.truth))
        if i < args.show:
            print(printable(f"{prompts[i]} [{case.question.truth}] {answer}"))
    for kind, counts in is_right.items():
        print(f"{printable(kind):<16} {sum(counts):>4} of {len(counts):>4}")
    if args.out:
        right = {kind: [sum(counts), len(counts)] for kind, counts in is_right.items()}
        with user_errors():
            write_json(args.out, {"perplexity": perplexity, "fingerprint": fingerprint, "right": right})


if __name__ == "__main__":
    run(main)
