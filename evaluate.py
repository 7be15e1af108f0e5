"""What an owl scores on short questions: exact matches, over a file of one-question conversations.

    python evaluate.py --data data/easy_vqa/test.json                       the embedded tiny-owl2
    python evaluate.py --data data/easy_vqa/test.json --images blank        ... who is shown nothing
    python evaluate.py --data data/easy_vqa/test.json --images shuffled     ... who is shown another question's image
    python evaluate.py --data mine.json --weights mplug-owl2-llama2-7b --max-new-tokens 10

The file is what training reads as well (data/conversations.py): of each row the first question is asked, and the
answer counts if it is the row's first answer, but for capitals, spaces and a full stop. The last two of the four
runs above are the control: a model that looks loses what only looking could have told it.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from data.conversations import read_rows
from data.image import load_image, to_pixels
from data.text import Tokenizer, conversation_turns, expand_images, render_prompt
from model import IMAGE_ID, Owl
from weights import load_model

EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny-owl2"


def normal(answer: str) -> str:
    """What counts of an answer."""
    return answer.strip().lower().removesuffix(".")


def ask(
    model: Owl, tokenizer: Tokenizer, questions: list[str], images: list[torch.Tensor], max_new_tokens: int
) -> list[str]:
    """Answers a batch of questions greedily. images: those that the questions mark, in order, [3, S, S] each."""
    prompts = []
    for question in questions:
        ids = render_prompt([question, None], tokenizer, model.config.style)
        prompts.append(expand_images(ids, None, model.config.image_words)[0])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    device = model.llama.lm_head.weight.device
    pixels = torch.stack(images).to(device, model.llama.lm_head.weight.dtype) if images else None
    steps = list(model.generate(ids.to(device), pixels, lengths, max_new_tokens=max_new_tokens))
    answers = torch.stack(steps, dim=1).tolist()  # [B, steps]
    texts = []
    for answer in answers:
        if tokenizer.eos_id in answer:
            answer = answer[: answer.index(tokenizer.eos_id)]
        texts.append(tokenizer.decode(answer))
    return texts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="FILE", help="questions, as conversations of one turn")
    p.add_argument("--weights", metavar="FOLDER", default=EMBEDDED, help="model folder (default: the embedded one)")
    p.add_argument("--images", choices=("right", "blank", "shuffled"), default="right", help="what the model is shown")
    p.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: FILE's folder)")
    p.add_argument("--fit", choices=("stretch", "square", "pad", "crop"), help="default: owl1 stretch, owl2 square")
    p.add_argument("--batch", type=int, default=64, help="questions at a time (default 64)")
    p.add_argument("--max-new-tokens", type=int, default=10)
    p.add_argument("--seed", type=int, default=0, help="of the shuffling")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", metavar="FILE", help="write each question, answer and right answer here (.jsonl)")
    args = p.parse_args()
    try:
        rows = read_rows(args.data)
        cases = []
        for index, row in enumerate(rows):
            try:
                turns = conversation_turns(row.get("text", row.get("conversations")))
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{args.data}, row {index}: {error}") from None
            paths = row.get("image") or []
            cases.append((turns[0], turns[1], [paths] if isinstance(paths, str) else paths))
        model = load_model(args.weights, args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
        tokenizer = Tokenizer(args.weights)
        fit = args.fit or ("stretch" if model.config.style == "owl1" else "square")
        root = Path(args.image_root) if args.image_root else Path(args.data).parent
        files = sorted({path for _, _, paths in cases for path in paths})
        pixels = {}
        for path in tqdm(files, desc="images", unit="image", disable=None):
            image = load_image(root / path)
            pixels[path] = to_pixels(image, model.config.image_size, fit)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    if args.images == "blank":
        # The mean colour, which normalisation takes to about zero.
        pixels = {path: torch.zeros_like(image) for path, image in pixels.items()}
    if args.images == "shuffled":
        others = list(pixels.values())
        random.Random(args.seed).shuffle(others)
        pixels = dict(zip(pixels, others))

    right = Counter()
    asked = Counter()
    log = open(args.out, "w", encoding="utf-8") if args.out else None
    for start in tqdm(range(0, len(cases), args.batch), desc="asking", unit="batch", disable=None):
        batch = cases[start : start + args.batch]
        images = [pixels[path] for _, _, paths in batch for path in paths]
        answers = ask(model, tokenizer, [question for question, _, _ in batch], images, args.max_new_tokens)
        for (question, truth, paths), answer in zip(batch, answers):
            kind = "yes or no" if normal(truth) in ("yes", "no") else "other"
            asked[kind] += 1
            right[kind] += normal(answer) == normal(truth)
            if log:
                log.write(json.dumps({"image": paths, "question": question, "answer": answer, "truth": truth}) + "\n")
    for kind in sorted(asked):
        print(f"{kind:<10} {right[kind]:>6} of {asked[kind]:>6}  {100 * right[kind] / asked[kind]:.2f} %")
    print(f"{'all':<10} {right.total():>6} of {asked.total():>6}  {100 * right.total() / asked.total():.2f} %")


if __name__ == "__main__":
    main()
