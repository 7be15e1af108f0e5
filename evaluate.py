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

--out of a task is a folder: run.json (weights, settings, versions), answers-RANK.jsonl, which come as they may, and at
the end answers.jsonl (a line for each question, in order: id, prompt, answer, truth, group, score), results.json and
index.html, a page to look at. The same command goes on where a run was stopped or killed, on any number of devices.

--data is a file that training reads as well (data/conversations.py): of each row the first question is asked, and the
answer counts if it is the row's first answer, but for capitals, spaces and a full stop; counts by the rows' "kind" and
"seen" follow, and how often "image_answer" and "text_answer" are said. --out is then a file, written at the end, of a
line for each question.

The two runs with --images are the control: a model that looks must lose what only looking tells.
"""

import argparse
import json
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from answer import Source, answers, ask, deal, fitted, n_mark, opened  # noqa: F401 (ask: for questions of one's own)
from data.conversations import Conversations, read_rows
from data.image import DEFAULT_FIT, FITS, load_image, to_pixels  # noqa: F401 (load_image: likewise)
from data.text import Tokenizer, conversation_turns
from launch import fail
from metrics import cider, vqa_accuracy  # noqa: F401 (a score alone)
from model import Owl
from parallel import PRECISIONS, Place, from_all, start_process
from quantize import BITS, bits_of, why_slow
from record import open_run, write
from report import PUBLISHED, count_ratings, figure, page, rating_page, read_published, write_page
from tasks import HALF_CHARACTER, TASKS, Question, Task
from train import validate
from watch import Skips
from weights import load_model, read_config, read_quantization

EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny-owl2"


# --- all questions -----------------------------------------------------------------------------------


def changed_about(questions: list[Question], seed: int) -> list[Question]:
    """The questions with their images shuffled, the same way for equal seeds."""
    sources = sorted({source for question in questions for source in question.images})
    others = list(sources)
    random.Random(seed).shuffle(others)
    other = dict(zip(sources, others))
    return [replace(question, images=[other[source] for source in question.images]) for question in questions]


def ask_all(
    args: argparse.Namespace,
    model: Owl,
    tokenizer: Tokenizer,
    place: Place,
    questions: list[Question],
    known: dict[str, str],
    folder: Path,
    limits: tuple[int, int],
    note: Callable[[list[Question], str], None],
) -> dict[str, str]:
    """Asks this process' part of what is not known, and notes each answer; returns everybody's answers by id.

    Raises ValueError, in one sentence: before the first is asked, for a question that does not fit the context; and on
    the first process, when all else is answered, for images that cannot be read.
    """
    conversations = deal(questions, known, place)
    for turn in (turn for turns in conversations for turn in turns):
        fitted([turn], known, model, tokenizer, limits[1])
    n_turn = sum(turn.id not in known for turns in conversations for turn in turns)
    size, broken = model.config.image_size, {}

    def read(source: Source, id: str) -> Tensor:
        if args.images == "blank":  # the mean colour, which normalisation takes to about zero
            return torch.zeros(3, size, size)
        with opened(source, folder, id) as image:
            return to_pixels(image, size, args.fit)

    # (disable=None shows a bar where there is a terminal)
    bar = tqdm(total=n_turn, desc="asking", unit="question", disable=None if place.is_first else True)
    with bar:
        for turns, answer in answers(model, tokenizer, conversations, known, broken, read, args.batch, limits):
            note(turns, answer)
            bar.update()
    parts = from_all(place, (known, broken))
    reasons = list({source: reason for _, part in parts for source, reason in part.items()}.values())
    if reasons and place.is_first:
        some = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        goes_on = "; once they are mended, the same command goes on" if args.task and args.out else ""
        raise ValueError(f"{len(reasons)} of the images cannot be read ({some}), all else was asked{goes_on}")
    return {id: answer for part, _ in parts for id, answer in part.items()}


# --- a task ------------------------------------------------------------------------------------------


def run_task(args: argparse.Namespace, place: Place) -> None:
    """Asks a task's questions, prints its numbers and, with --out, writes its folder (see above)."""
    task, folder = TASKS[args.task], Path(args.folder)
    limits = (task.min_new_tokens, args.max_new_tokens or task.max_new_tokens)
    if args.max_new_tokens and not task.max_new_tokens:
        raise ValueError(f"--max-new-tokens is not for {task.name}: its answers are chosen from those given")
    if args.max_new_tokens and args.max_new_tokens < task.min_new_tokens:
        raise ValueError(f"--max-new-tokens should be {task.min_new_tokens} or more for {task.name}")
    questions = task.read(folder)
    if args.images == "shuffled":
        questions = changed_about(questions, args.seed)
    published = None
    if task.name == "owleval" and args.out:
        published = read_published(folder, questions)
        if published is None and place.is_first:
            print(f"there will be no page to rate: {folder} has no {PUBLISHED[0]}", file=sys.stderr)
    tokenizer = Tokenizer(args.weights)
    run = nullcontext(({}, {}, None))
    if args.out:
        run = open_run(args, questions, dtype_of(args, place), limits, place)
    with run as (record, known, log):
        model = load(args, tokenizer, place)

        def note(turns: list[Question], answer: str) -> None:
            row = {"id": turns[-1].id, "prompt": turns[-1].prompt, "answer": answer}
            if len(turns) > 1:
                row["before"] = [turn.id for turn in turns[:-1]]
            if log:
                log.write(json.dumps(row) + "\n")
                log.flush()

        said = ask_all(args, model, tokenizer, place, questions, known, folder, limits, note)
        if place.is_first:
            finish(args, task, questions, said, record, published)


def finish(
    args: argparse.Namespace,
    task: Task,
    questions: list[Question],
    said: dict[str, str],
    record: dict,
    published: dict[str, str] | None,
) -> None:
    """Scores all answers, prints the numbers and, with --out, writes all that is written at the end."""
    texts = [said[question.id] for question in questions]
    results = list(zip(questions, texts, task.score(texts, questions)))
    numbers = task.summarise(results)
    title = task.what if args.images == "right" else f"{task.what} (images: {args.images})"
    print(f"{title}\n{args.weights}, {len(results):,} answers\n")
    for name, number in numbers.items():
        print(f"{name:<40} {figure(number):>10}")
    if not args.out:
        return
    out, folder = Path(args.out), Path(args.folder)
    rows = []
    for question, answer, score in results:
        row = {"id": question.id, "prompt": question.prompt, "answer": answer, "truth": question.truth}
        rows.append(json.dumps(row | {"group": question.group, "score": score}) + "\n")
    write(out / "answers.jsonl", "".join(rows))
    content = {"task": task.name, "answers": len(results), "numbers": numbers} | record
    write(out / "results.json", json.dumps(content, indent=1) + "\n")
    if args.images == "blank":
        results = [(replace(question, images=[]), answer, score) for question, answer, score in results]
    write_page(out / "index.html", page(title, numbers, results, record, folder, args.seed))
    if published:
        write_page(out / "rate.html", rating_page(results, published, str(args.weights), folder, args.seed))


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
        for text in [*turns, *images, *map(str, notes.values())]:
            if HALF_CHARACTER.search(text):
                raise ValueError(f"{where}: a text holds half a character (a lone surrogate)")
        cases.append(Case(turns[0], turns[1], images[: n_image[0]], notes))
    return cases


def normal(answer: str) -> str:
    """What counts of an answer."""
    return answer.strip().lower().removesuffix(".")


def run_data(args: argparse.Namespace, place: Place) -> None:
    """Asks a data file's questions and prints how many answers were right; --out lists them, in the file's order."""
    out = Path(args.out) if args.out else None
    if out and (out.resolve() == Path(args.data).resolve() or (out.exists() and not out.is_file())):
        raise ValueError(f"--out {out} should be a file of its own")
    if out and not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: there is no folder {out.parent} to write to")
    root = Path(args.image_root) if args.image_root else Path(args.data).parent
    cases = read_cases(args.data, root)
    questions = [Question(str(i), case.question, case.images) for i, case in enumerate(cases)]
    if args.images == "shuffled":
        questions = changed_about(questions, args.seed)
    tokenizer = Tokenizer(args.weights)
    model, limits = load(args, tokenizer, place), (0, args.max_new_tokens or 10)
    said = ask_all(args, model, tokenizer, place, questions, {}, root, limits, lambda *_: None)
    if not place.is_first:
        return
    # In each part of the table, by the line's name: of each answer whether it counts.
    parts = {name: defaultdict(list) for name in ("truth", "all", "kind", "seen", "said")}
    rows = []
    for i, case in enumerate(cases):
        answer = normal(said[str(i)])
        is_right = answer == normal(case.truth)
        parts["truth"]["yes or no" if normal(case.truth) in ("yes", "no") else "other"].append(is_right)
        parts["all"]["all"].append(is_right)
        for name, note in case.notes.items():
            if name == "kind":
                parts["kind"][note].append(is_right)
            elif name == "seen":
                parts["seen"]["seen" if note else "unseen"].append(is_right)
            else:
                parts["said"][name].append(answer == normal(note))
        row = {"question": case.question, "truth": case.truth, "images": case.images} | case.notes
        rows.append(json.dumps(row | {"answer": said[str(i)]}) + "\n")
    lines = [line for part in parts.values() for line in sorted(part.items())]
    width = max(10, *(len(name) for name, _ in lines))
    for name, counts in lines:
        n, of = sum(counts), len(counts)
        print(f"{name:<{width}} {n:>6} of {of:>6}  {100 * n / of:.2f} %")
    if out:
        write(out, "".join(rows))


def print_loss(args: argparse.Namespace, place: Place) -> None:
    """Prints the loss that training calls the validation loss, to the last bit. Raises as Conversations does."""
    tokenizer = Tokenizer(args.weights)
    model = load(args, tokenizer, place)
    config = model.config
    shape = (config.style, config.image_words, config.image_size, config.llama.context)
    data = Conversations(args.data, tokenizer, *shape, args.fit, args.image_root)
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
    p.add_argument("--seed", type=int, default=0, help="of --images shuffled, and of what the pages show on which side")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on CUDA and for fewer bits, else fp32")
    p.add_argument("--out", metavar="PATH", help="a task's folder; of --data a file (.jsonl)")
    return p.parse_args()


def dtype_of(args: argparse.Namespace, place: Place) -> torch.dtype:
    """What the model computes in."""
    fewer_bits = args.quantize or read_quantization(Path(args.weights))
    return torch.bfloat16 if fewer_bits and not args.precision else place.dtype


def load(args: argparse.Namespace, tokenizer: Tokenizer, place: Place) -> Owl:
    """Raises FileNotFoundError or ValueError, in one sentence, as load_model does."""
    dtype = dtype_of(args, place)
    # Else convolutions on CUDA round float32 to 10 bits, each way of computing them its own way, and --batch chooses.
    torch.backends.cudnn.allow_tf32 = False
    model = load_model(args.weights, place.device, dtype, args.quantize)
    model.config.llama.eos_id = tokenizer.eos_id
    bits = bits_of(model)
    if bits and place.is_first and (why := why_slow(bits, place.device, dtype, compiled=False)):
        print(why, file=sys.stderr)
    return model


def mended(error: RuntimeError, args: argparse.Namespace) -> ValueError:
    """What a person can do about it, in one sentence; raises the error itself if that is nothing."""
    # torch has no class for a full memory on a CPU, nor gloo for a process that is gone
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return ValueError(f"the memory of {args.device} is full: try a smaller --batch, or --quantize")
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return ValueError("another process has ended; it should say why")
    raise error


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    args = parse()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        if args.ratings:
            print(count_ratings(args.ratings))
            return
        if args.batch < 1 or (args.max_new_tokens is not None and args.max_new_tokens < 1):
            raise ValueError("--batch and --max-new-tokens must be 1 or more")
        if args.task and (not args.folder or args.loss or args.image_root):
            raise ValueError("--task takes its files from --folder FOLDER, and neither --loss nor --image-root")
        if args.data and args.folder:
            raise ValueError("--folder is for --task; --data has --image-root")
        if args.loss and (args.images != "right" or args.out):
            raise ValueError("--loss is printed, of the right images: it takes neither --images nor --out")
        args.fit = args.fit or DEFAULT_FIT[read_config(Path(args.weights)).style]
        place = start_process(args.device, args.precision)
        run = run_task if args.task else print_loss if args.loss else run_data
        run(args, place)
    except RuntimeError as error:
        fail(mended(error, args))
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
