"""What an owl scores: on the benchmarks of tasks.py, or by exact matches over a file of one-question conversations.

    python evaluate.py --task vqav2 --folder vqav2 --weights mplug-owl2-llama2-7b --out runs/vqav2
    torchrun --nproc_per_node=8 evaluate.py --task vqav2 ...                the same answers, sooner
    python evaluate.py --task owleval --folder owleval --out runs/owleval   for people to rate: runs/owleval/rate.html
    python evaluate.py --ratings ratings.json                               ... and what they said

    python evaluate.py --data data/easy_vqa/test.json                       the embedded tiny-owl2
    python evaluate.py --data data/easy_vqa/test.json --images blank        ... who is shown nothing
    python evaluate.py --data data/easy_vqa/test.json --images shuffled     ... who is shown shuffled images
    python evaluate.py --data mine.json --weights mplug-owl2-llama2-7b --max-new-tokens 10
    python evaluate.py --data data/easy_vqa/text_val.json --loss            the mean loss instead, of all turns' answers

    files --tasks.py--> questions --answer.py--> answers --tasks.py--> scores, numbers --report.py--> a page
                                                   record.py: appended as they come

--out of a task is a folder: run.json (weights, settings, versions), answers-RANK.jsonl, and at the end results.json and
index.html, a page to look at. The same command goes on where a run was stopped or killed, on any number of devices.

--data is a file that training reads as well (data/conversations.py): of each row the first question is asked, and the
answer counts if it is the row's first answer, but for capitals, spaces and a full stop; counts by the rows' "kind" and
"seen" follow, and how often "image_answer" and "text_answer" are said. --out is then a file, a line for each question.

The two runs with --images are the control: a model that looks must lose what only looking tells.
"""

import argparse
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from answer import Source, answers, ask, deal, fitted, n_mark  # noqa: F401 (ask: for a few questions of one's own)
from data.conversations import Conversations, read_rows
from data.image import DEFAULT_FIT, FITS, load_image, to_pixels
from data.text import Tokenizer, conversation_turns
from launch import fail
from metrics import cider, vqa_accuracy  # noqa: F401 (a score alone)
from model import Owl
from parallel import PRECISIONS, Place, from_all, start_process
from quantize import BITS
from record import open_answers, open_run, settings_of, start_of, write_json
from report import count_ratings, page, rating_page
from tasks import TASKS, Question, read_lines
from train import validate
from watch import Skips
from weights import load_model, read_quantization

EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny-owl2"
PUBLISHED = "answers_mplug_owl_7b.jsonl"  # in OwlEval's folder


# --- all questions -----------------------------------------------------------------------------------


def shown(questions: list[Question], images: str, seed: int) -> list[Question]:
    """The questions with the images changed about, if they are to be shuffled: the same for equal seeds."""
    if images != "shuffled":
        return questions
    sources = sorted({source for question in questions for source in question.images})
    others = list(sources)
    random.Random(seed).shuffle(others)
    other = dict(zip(sources, others))
    return [replace(question, images=[other[source] for source in question.images]) for question in questions]


def make_reader(args: argparse.Namespace, model: Owl, folder: Path) -> Callable[[Source], Tensor]:
    """read(source) -> what the model sees of an image, [3, S, S]."""
    size = model.config.image_size
    fit = args.fit or DEFAULT_FIT[model.config.style]

    def read(source: Source) -> Tensor:
        if args.images == "blank":  # the mean colour, which normalisation takes to about zero
            return torch.zeros(3, size, size)
        return to_pixels(load_image(source if isinstance(source, bytes) else folder / source), size, fit)

    return read


def ask_all(
    args: argparse.Namespace,
    model: Owl,
    tokenizer: Tokenizer,
    place: Place,
    questions: list[Question],
    known: dict[str, str],
    folder: Path,
    lengths: tuple[int, int],
    note: Callable[[list[Question], str], None],
) -> dict[str, str]:
    """Asks this process' part of what is not known, and notes each answer; returns everybody's answers by id.

    Raises ValueError, in one sentence, as answers does; for prompts that are too long before the first is asked.
    """
    conversations = deal(questions, known, place)
    for turn in (turn for turns in conversations for turn in turns):
        fitted([turn], known, model, tokenizer, lengths[1])
    n_turn = sum(turn.id not in known for turns in conversations for turn in turns)
    read = make_reader(args, model, folder)
    # (disable=None shows a bar where there is a terminal)
    bar = tqdm(total=n_turn, desc="asking", unit="question", disable=None if place.is_first else True)
    with bar:
        for turns, answer in answers(model, tokenizer, conversations, known, read, args.batch, lengths):
            note(turns, answer)
            bar.update()
    return {id: answer for part in from_all(place, known) for id, answer in part.items()}


# --- a task ------------------------------------------------------------------------------------------


def run_task(args: argparse.Namespace, place: Place) -> None:
    """Asks a task's questions, prints its numbers and, with --out, writes its folder (see above)."""
    task, folder = TASKS[args.task], Path(args.folder)
    lengths = (task.min_new_tokens, args.max_new_tokens or task.max_new_tokens)
    if args.max_new_tokens and not (task.min_new_tokens <= args.max_new_tokens and task.max_new_tokens):
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is not for {task.name}")
    questions = shown(task.read(folder), args.images, args.seed)
    model, tokenizer = load(args, place)
    fit = args.fit or DEFAULT_FIT[model.config.style]
    settings = settings_of(args, questions, model.llama.embed_tokens.weight.dtype, fit, lengths)
    record, known, log = {"settings": settings, "starts": [start_of(args, place)]}, {}, None
    if args.out:
        out = Path(args.out)
        record, known = open_run(out, record, {question.id for question in questions}, place)
        log = open_answers(out / f"answers-{place.rank}.jsonl")

    def note(turns: list[Question], answer: str) -> None:
        question = turns[-1]
        row = {"id": question.id, "prompt": question.prompt, "answer": answer}
        row |= {"score": task.score_one(answer, question), "group": question.group, "truth": question.truth}
        if len(turns) > 1:
            row["before"] = [turn.id for turn in turns[:-1]]  # which earlier turns stood in the prompt
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()

    known = ask_all(args, model, tokenizer, place, questions, known, folder, lengths, note)
    if not place.is_first:
        return
    results = [(question, known[question.id], task.score_one(known[question.id], question)) for question in questions]
    numbers = task.summarise(results)
    title = task.what if args.images == "right" else f"{task.what} (images: {args.images})"
    print(f"{title}\n{args.weights}, {len(results):,} answers\n")
    for name, number in numbers.items():
        print(f"{name:<40} {number:>10.2f}")
    if args.out:
        write_json(out / "results.json", {"task": task.name, "answers": len(results), "numbers": numbers} | record)
        write_page(out / "index.html", page(title, numbers, results, record, folder, args.seed))
        if task.name == "owleval" and (folder / PUBLISHED).is_file():
            rows = read_lines(folder / PUBLISHED)
            published = {str(row.get("question_id", int)): row.get("answer") for row in rows}
            write_page(out / "rate.html", rating_page(results, published, str(args.weights), folder, args.seed))


def write_page(path: Path, html: str) -> None:
    path.write_text(html, encoding="utf-8", errors="replace")  # a file's name may be no Unicode
    print(f"\nto look at: {path}")


# --- a file of conversations --------------------------------------------------------------------------

NOTES = {"kind": str, "seen": bool, "image_answer": str, "text_answer": str}  # what a row may say besides


@dataclass
class Case:
    """A question, its right answer, the paths of the images it marks, and those of NOTES that the row has."""

    question: str
    truth: str
    images: list[str]
    notes: dict[str, str | bool]


def read_cases(path: str, root: Path) -> list[Case]:
    """The first question of each row of a data file. ValueError, in one sentence, for a row that has none."""
    cases = []
    for index, row in enumerate(read_rows(path)):
        where = f"{path}, row {index}"
        try:
            turns = conversation_turns(row.get("text", row.get("conversations")))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from None
        images = row.get("image") or []
        images = [images] if isinstance(images, str) else images
        n_image = [n_mark(turn) for turn in turns]
        if not isinstance(images, list) or len(images) != sum(n_image):
            raise ValueError(f"{where}: image should list the {sum(n_image)} images that are marked")
        for image in images:
            if not isinstance(image, str) or PurePath(image).is_absolute() or ".." in PurePath(image).parts:
                raise ValueError(f"{where}: {image!r} is not a path below the image folder")
            if not (root / image).is_file():
                raise ValueError(f"{where}: there is no image {root / image}")
        notes = {name: row[name] for name in NOTES if row.get(name) is not None}
        for name, note in notes.items():
            if not isinstance(note, NOTES[name]):
                raise ValueError(f"{where}: {name} should be {'true or false' if name == 'seen' else 'a text'}")
        cases.append(Case(turns[0], turns[1], images[: n_image[0]], notes))
    return cases


def normal(answer: str) -> str:
    """What counts of an answer."""
    return answer.strip().lower().removesuffix(".")


def run_data(args: argparse.Namespace, place: Place) -> None:
    """Asks a data file's questions and prints how many answers were right; --out lists them, in the file's order."""
    root = Path(args.image_root) if args.image_root else Path(args.data).parent
    cases = read_cases(args.data, root)
    questions = [Question(str(i), case.question, case.images) for i, case in enumerate(cases)]
    questions = shown(questions, args.images, args.seed)
    model, tokenizer = load(args, place)
    log = open(args.out, "w", encoding="utf-8") if args.out and place.is_first else None
    known = ask_all(args, model, tokenizer, place, questions, {}, root, (0, args.max_new_tokens or 10), lambda *_: None)
    if not place.is_first:
        return
    right, asked = Counter(), Counter()
    for i, case in enumerate(cases):
        answer = normal(known[str(i)])
        is_right = answer == normal(case.truth)
        counted = [(0, "yes or no" if normal(case.truth) in ("yes", "no") else "other", is_right), (1, "all", is_right)]
        for name, note in case.notes.items():
            if name == "kind":
                counted.append((2, note, is_right))
            elif name == "seen":
                counted.append((3, "seen" if note else "unseen", is_right))
            else:
                counted.append((4, name, answer == normal(note)))
        for section, name, counts in counted:
            asked[section, name] += 1
            right[section, name] += counts
        if log:
            row = {"question": case.question, "truth": case.truth, "images": case.images} | case.notes
            log.write(json.dumps(row | {"answer": known[str(i)]}) + "\n")
    width = max(10, *(len(name) for _, name in asked))
    for section, name in sorted(asked):
        n, of = right[section, name], asked[section, name]
        print(f"{name:<{width}} {n:>6} of {of:>6}  {100 * n / of:.2f} %")


def print_loss(args: argparse.Namespace, place: Place) -> None:
    """Prints the loss that training calls the validation loss, to the last bit. Raises as Conversations does."""
    model, tokenizer = load(args, place)
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


# --- the command line --------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    tasks = "".join(f"\n  {task.name:<16} {task.help}" for task in TASKS.values())
    p = argparse.ArgumentParser(
        description=__doc__, epilog=f"tasks:{tasks}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS, metavar="NAME", help="a benchmark: one of the tasks below")
    what.add_argument("--data", metavar="FILE", help="questions, as conversations of one turn")
    what.add_argument("--ratings", metavar="FILE", help="count the ratings that OwlEval's page saved")
    p.add_argument("--folder", help="the task's files, as they are published")
    p.add_argument("--weights", metavar="FOLDER", default=EMBEDDED, help="model folder (default: the embedded one)")
    p.add_argument("--quantize", choices=BITS, help="the language model's matrices in 8 or 4 bits")
    p.add_argument("--images", choices=("right", "blank", "shuffled"), default="right", help="what the model is shown")
    p.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: FILE's folder)")
    p.add_argument("--fit", choices=FITS, help="default: owl1 stretch, owl2 square")
    p.add_argument("--loss", action="store_true", help="print the mean loss over all answers' tokens instead")
    p.add_argument("--batch", type=int, default=64, help="questions at a time on a device (default 64)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the task's; 10 for --data)")
    p.add_argument("--seed", type=int, default=0, help="of the shuffling, and of what the pages show")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on CUDA and for fewer bits, else fp32")
    p.add_argument("--out", metavar="PATH", help="a task's folder; of --data a file (.jsonl)")
    return p.parse_args()


def load(args: argparse.Namespace, place: Place) -> tuple[Owl, Tokenizer]:
    """Raises FileNotFoundError or ValueError, in one sentence, as load_model and Tokenizer do."""
    fewer_bits = args.quantize or read_quantization(Path(args.weights))
    dtype = torch.bfloat16 if fewer_bits and not args.precision else place.dtype
    model = load_model(args.weights, place.device, dtype, args.quantize)
    tokenizer = Tokenizer(args.weights)
    model.config.llama.eos_id = tokenizer.eos_id
    return model, tokenizer


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    args = parse()
    try:
        if args.ratings:
            print(count_ratings(args.ratings))
            return
        if args.batch < 1 or (args.max_new_tokens is not None and args.max_new_tokens < 1):
            raise ValueError("--batch and --max-new-tokens must be 1 or more")
        if args.task and (not args.folder or args.loss or args.image_root):
            raise ValueError("--task takes its files from --folder FOLDER, and neither --loss nor --image-root")
        if args.data and args.folder:
            raise ValueError("--folder is for --task; --data has --image-root")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        place = start_process(args.device, args.precision)
        run = run_task if args.task else print_loss if args.loss else run_data
        run(args, place)
    except torch.OutOfMemoryError:
        fail(ValueError(f"the memory of {args.device} is full: try a smaller --batch, or --quantize"))
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt as interrupt:
        goes_on = "; the same command goes on from here" if args.task and args.out else ""
        print(f"stopped{goes_on}", file=sys.stderr)
        sys.exit(128 + interrupt.args[0])
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
