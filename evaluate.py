"""What an owl scores on short questions: exact matches, over a file of one-question conversations.

    python evaluate.py --data data/easy_vqa/test.json                       the embedded tiny-owl2
    python evaluate.py --data data/easy_vqa/test.json --images blank        ... who is shown nothing
    python evaluate.py --data data/easy_vqa/test.json --images shuffled     ... who is shown shuffled images
    python evaluate.py --data mine.json --weights mplug-owl2-llama2-7b --max-new-tokens 10
    python evaluate.py --data data/easy_vqa/text_val.json --loss            the mean loss instead, of all turns' answers

The file is what training reads as well (data/conversations.py): of each row the first question is asked, and the
answer counts if it is the row's first answer, but for capitals, spaces and a full stop. The two runs with --images
are the control: a model that looks must lose what only looking tells. (All images are held in memory at once.)
"""

import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

import torch
from torch import Tensor
from tqdm import tqdm

from data.conversations import Conversations, read_rows
from data.image import DEFAULT_FIT, FITS, load_image, to_pixels
from data.text import IMAGE_MARK, Tokenizer, conversation_turns, expand_images, render_prompt
from launch import fail
from model import Owl
from parallel import Place, start_process
from quantize import BITS
from train import validate
from watch import Skips
from weights import load_model, read_quantization

EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny-owl2"


@dataclass
class Case:
    """A question, its right answer, and the paths of the images it marks."""

    question: str
    truth: str
    images: list[str]


def read_cases(path: str) -> list[Case]:
    """The first question of each row of a data file. ValueError, in one sentence, for a row that has none."""
    cases = []
    for index, row in enumerate(read_rows(path)):
        try:
            turns = conversation_turns(row.get("text", row.get("conversations")))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, row {index}: {error}") from None
        images = row.get("image") or []
        images = [images] if isinstance(images, str) else images
        n_mark = [len(IMAGE_MARK.findall(turn)) for turn in turns]
        if not isinstance(images, list) or len(images) != sum(n_mark):
            raise ValueError(f"{path}, row {index}: image should list the {sum(n_mark)} images that are marked")
        for image in images:
            if not isinstance(image, str) or PurePath(image).is_absolute() or ".." in PurePath(image).parts:
                raise ValueError(f"{path}, row {index}: {image!r} is not a path below the image folder")
        cases.append(Case(turns[0], turns[1], images[: n_mark[0]]))
    return cases


def read_images(cases: list[Case], root: Path, size: int, fit: str) -> dict[str, Tensor]:
    """The pixels of all images that are asked about, each once. ValueError for one that cannot be read."""
    paths = sorted({path for case in cases for path in case.images})
    pixels = {}
    for path in tqdm(paths, desc="images", unit="image", disable=None):
        pixels[path] = to_pixels(load_image(root / path), size, fit)
    return pixels


def normal(answer: str) -> str:
    """What counts of an answer."""
    return answer.strip().lower().removesuffix(".")


def prompt_of(question: str, model: Owl, tokenizer: Tokenizer) -> list[int]:
    """The ids of one question. ValueError if they outgrow the model's context."""
    ids = render_prompt([question, None], tokenizer, model.config.style)
    ids, _ = expand_images(ids, None, model.config.image_words)
    if len(ids) > model.config.llama.context:
        context = model.config.llama.context
        raise ValueError(f"a question of {len(ids)} tokens is longer than the model's context of {context}")
    return ids


def ask(
    model: Owl, tokenizer: Tokenizer, questions: list[str], images: list[Tensor], max_new_tokens: int
) -> list[str]:
    """Answers a batch of questions greedily. images: those that the questions mark, in order, [3, S, S] each."""
    prompts = [prompt_of(question, model, tokenizer) for question in questions]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    device = model.llama.embed_tokens.weight.device
    pixels = torch.stack(images).to(device, model.llama.embed_tokens.weight.dtype) if images else None
    steps = list(model.generate(ids.to(device), pixels, lengths, max_new_tokens=max_new_tokens))
    answers = torch.stack(steps, dim=1).tolist()  # [B, steps]
    texts = []
    for answer in answers:
        if tokenizer.eos_id in answer:
            answer = answer[: answer.index(tokenizer.eos_id)]
        texts.append(tokenizer.decode(answer))
    return texts


def print_loss(args: argparse.Namespace, model: Owl, tokenizer: Tokenizer, place: Place) -> None:
    """Prints the loss that training calls the validation loss, to the last bit. Raises as Conversations does."""
    config = model.config
    fit = args.fit or DEFAULT_FIT[config.style]
    length = config.llama.context
    data = Conversations(
        args.data, tokenizer, config.style, config.image_words, config.image_size, length, fit, args.image_root
    )
    skips = Skips()
    print(repr(validate(model, data, args.batch, config, place, skips)))
    if skips.count:
        print(f"skipped {skips.summary()}", file=sys.stderr)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="FILE", help="questions, as conversations of one turn")
    p.add_argument("--weights", metavar="FOLDER", default=EMBEDDED, help="model folder (default: the embedded one)")
    p.add_argument("--quantize", choices=BITS, help="the language model's matrices in 8 or 4 bits")
    p.add_argument("--images", choices=("right", "blank", "shuffled"), default="right", help="what the model is shown")
    p.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: FILE's folder)")
    p.add_argument("--fit", choices=FITS, help="default: owl1 stretch, owl2 square")
    p.add_argument("--loss", action="store_true", help="print the mean loss over all answers' tokens instead")
    p.add_argument("--batch", type=int, default=64, help="questions at a time (default 64)")
    p.add_argument("--max-new-tokens", type=int, default=10)
    p.add_argument("--seed", type=int, default=0, help="of the shuffling")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", metavar="FILE", help="write each question, answer and right answer here (.jsonl)")
    return p.parse_args()


def main() -> None:
    args = parse()
    try:
        if args.batch < 1 or args.max_new_tokens < 1:
            raise ValueError("--batch and --max-new-tokens must be 1 or more")
        place = start_process(args.device)
        device = place.device
        fewer_bits = args.quantize or read_quantization(Path(args.weights))
        dtype = torch.bfloat16 if device.type == "cuda" or fewer_bits else torch.float32
        model = load_model(args.weights, device, dtype, args.quantize)
        tokenizer = Tokenizer(args.weights)
        model.config.llama.eos_id = tokenizer.eos_id
        if args.loss:
            print_loss(args, model, tokenizer, place)
            return
        cases = read_cases(args.data)
        fit = args.fit or DEFAULT_FIT[model.config.style]
        root = Path(args.image_root) if args.image_root else Path(args.data).parent
        pixels = read_images(cases, root, model.config.image_size, fit)
        for case in cases:
            prompt_of(case.question, model, tokenizer)
        log = open(args.out, "w", encoding="utf-8") if args.out else None
    except (ValueError, OSError) as error:
        fail(error)

    if args.images == "blank":
        # The mean colour, which normalisation takes to about zero.
        pixels = {path: torch.zeros_like(image) for path, image in pixels.items()}
    if args.images == "shuffled":
        others = list(pixels.values())
        random.Random(args.seed).shuffle(others)
        pixels = dict(zip(pixels, others))

    right = Counter()
    asked = Counter()
    for start in tqdm(range(0, len(cases), args.batch), desc="asking", unit="batch", disable=None):
        batch = cases[start : start + args.batch]
        images = [pixels[path] for case in batch for path in case.images]
        answers = ask(model, tokenizer, [case.question for case in batch], images, args.max_new_tokens)
        for case, answer in zip(batch, answers):
            kind = "yes or no" if normal(case.truth) in ("yes", "no") else "other"
            asked[kind] += 1
            right[kind] += normal(answer) == normal(case.truth)
            if log:
                log.write(json.dumps(asdict(case) | {"answer": answer}) + "\n")
    for kind in sorted(asked):
        print(f"{kind:<10} {right[kind]:>6} of {asked[kind]:>6}  {100 * right[kind] / asked[kind]:.2f} %")
    print(f"{'all':<10} {right.total():>6} of {asked.total():>6}  {100 * right.total() / asked.total():.2f} %")


if __name__ == "__main__":
    main()
