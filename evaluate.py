"""Scores a model on a benchmark, or by exact matches on a file of questions.

    python evaluate.py --task vqav2 --folder vqav2 --weights mplug-owl2-llama2-7b --out runs/vqav2
    torchrun --nproc_per_node=8 evaluate.py --task vqav2 ...                the same answers from eight GPUs
    python evaluate.py --task owleval --folder owleval --out runs/owleval   for people to rate: runs/owleval/rate.html
    python evaluate.py --ratings ratings.json                               the grades that they gave
    python evaluate.py --list                                               the files and folders that each task needs
    python evaluate.py --task iqa --data test.json --weights one-align      image quality: SRCC and PLCC (iqa.py)

    python evaluate.py --data data/easy_vqa/test.json                       the embedded tiny-owl2
    python evaluate.py --data data/easy_vqa/test.json --images blank        control: no image
    python evaluate.py --data data/easy_vqa/test.json --images shuffled     control: other images
    python evaluate.py --data data/easy_vqa/text_val.json --loss            the mean loss of all answers

    files --benchmarks.py--> questions --runner.py--> answers --scoring.py--> scores, numbers --html_report.py--> page
                                                        results.py: saved as they arrive

--out of a benchmark is a folder: run.json (weights, settings, versions), answers-RANK.jsonl in the order of arrival,
and at the end answers.jsonl (per question: id, prompt, answer, truth, group, score), results.json, index.html and, for
VQAv2 test-dev, VizWiz test and MMBench, the answers in the format of the test server (submission.py). The same command
continues a run that was stopped or killed, on any number of devices: an answer does not depend on the questions that
share its batch or its process (runner.py explains why).

--data is a file that training can read as well. The first question of each row is asked, and its answer counts if it
equals the row's first answer (qa_file.py). --out is then a file with a line per question, in the file's order, written
at the end; until then the answers are in the folder OUT.run, and the same command continues.
"""

import math
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from command import ArgumentParser, log, run, user_errors
from common.files import printable

import torch
import torch.distributed

from data.conversations import Conversations, SampleSpec
from data.image import DEFAULT_FIT, FITS
from data.text import Tokenizer
from evaluation.benchmarks import BENCHMARKS
from evaluation.file_list import list_files
from evaluation.html_report import report_page, write_page
from evaluation.iqa import correlations, read_iqa, score_cases, score_lines
from evaluation.owleval import PUBLISHED_FILES, count_ratings, rating_page, read_published
from evaluation.qa_file import answer_lines, check_out, count_table, read_cases
from evaluation.question import first_question, limit_questions, shuffle_images
from evaluation.results import append_answer, open_run, remove_run, write_results, write_text
from evaluation.runner import Runner
from evaluation.scoring import letter_score, loose_letter_score
from evaluation.submission import write_submission
from inference.loading import load_with_adapter
from inference.quality import KINDS, PRESETS, Scorer, prompt_of
from inference.quantize import BITS, bits_of, read_quantization, why_slow
from model import Owl
from train import evaluate_loss
from training.distributed import PRECISIONS, Dist, init_distributed
from training.restore import is_checkpoint
from training.monitor import SkippedSamples
from weights import read_config

MAX_NUMBER = 100_000
EMBEDDED = Path(__file__).parent / "checkpoints" / "tiny-owl2"


def parse_args() -> Namespace:
    names = "".join(f"\n  {b.name:<16} {b.title}; from {b.url}" for b in BENCHMARKS.values())
    p = ArgumentParser(description=__doc__, epilog=f"benchmarks:{names}")
    what = p.add_mutually_exclusive_group()
    task = "a benchmark of the list below, or iqa: image quality, with --data"
    what.add_argument("--task", choices=[*BENCHMARKS, "iqa"], metavar="NAME", help=task)
    p.add_argument("--data", metavar="FILE", help="questions, as conversations of one turn")
    what.add_argument("--list", action="store_true", help="print the files and folders that each task needs")
    what.add_argument("--ratings", metavar="FILE", help="count the ratings that OwlEval's page saved")
    p.add_argument("--folder", help="the benchmark's files, as they are published")
    p.add_argument("--weights", metavar="FOLDER", default=EMBEDDED, help="model folder (default: the embedded one)")
    p.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter in PEFT format, merged into the weights")
    p.add_argument("--quantize", choices=BITS, help="the language model's matrices in 8 or 4 bits")
    p.add_argument("--images", choices=("right", "blank", "shuffled"), default="right", help="what the model sees")
    p.add_argument("--image-root", metavar="FOLDER", help="what image paths are relative to (default: FILE's folder)")
    p.add_argument("--fit", choices=FITS, help="how images are made square (default: owl1 stretch, owl2 square)")
    p.add_argument("--limit", type=int, metavar="N", help="ask only N questions, evenly spaced (MME: images)")
    p.add_argument("--loose-letters", action="store_true", help="find letters in sentences; official scripts do not")
    p.add_argument("--loss", action="store_true", help="print the mean loss over all answers' tokens instead")
    p.add_argument("--batch", type=int, default=64, help="questions per batch and device (default 64)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the benchmark's; 10 for --data")
    p.add_argument("--seed", type=int, default=0, help="of --images shuffled and of the pages' examples")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on CUDA and for quantized weights, else fp32")
    p.add_argument("--out", metavar="PATH", help="a benchmark's folder; of --data a file (.jsonl)")
    iqa = p.add_argument_group("image quality (--task iqa)").add_argument
    iqa("--preset", choices=PRESETS, default="published", help="prompt and words (default published; see score.py)")
    iqa("--kind", choices=KINDS, default="quality", help="what is scored (default quality)")
    iqa("--first-token", action="store_true", help="allow level words of several tokens: the first counts")
    args = p.parse_args()
    if not (args.task or args.data or args.ratings or args.list):
        p.error("pass one of --task, --data, --ratings and --list")
    return args


def check_flags(args: Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    benchmark, n = BENCHMARKS.get(args.task), args.max_new_tokens
    rules = {
        **{f"--{name.replace('_', '-')} is empty": value == "" for name, value in vars(args).items()},
        f"--batch should be 1 to {MAX_NUMBER:,}": not 1 <= args.batch <= MAX_NUMBER,
        f"--max-new-tokens should be 1 to {MAX_NUMBER:,}": n is not None and not 1 <= n <= MAX_NUMBER,
        f"--limit should be 1 to {10**9:,}": args.limit is not None and not 1 <= args.limit <= 10**9,
        "--loss takes no --limit": args.loss and args.limit,
        "--loose-letters is for tasks whose answers are letters, such as mmbench": args.loose_letters
        and (benchmark is None or benchmark.score is not letter_score),
        "--task iqa needs --data": args.task == "iqa" and not args.data,
        "--task iqa takes no --folder, --images, --limit, --loss and --max-new-tokens": args.task == "iqa"
        and (args.folder or args.images != "right" or args.limit or args.loss or n),
        "--data goes only with --task iqa": args.data and (benchmark or args.ratings or args.list),
        "--task needs --folder": benchmark and not args.folder,
        "--loss and --image-root are for --data": benchmark and (args.loss or args.image_root),
        "--folder is for --task; --data has --image-root": args.data and args.folder,
        "--loss takes neither --images nor --out": args.loss and (args.images != "right" or args.out),
        f"{args.task} has fixed choices and no --max-new-tokens": n and benchmark and benchmark.max_new_tokens == 0,
        f"{args.task} needs a larger --max-new-tokens": n and benchmark and n < benchmark.min_new_tokens,
    }
    for rule, is_broken in rules.items():
        if is_broken:
            raise ValueError(rule)


def resolve_defaults(args: Namespace) -> None:
    """Sets the flags whose default depends on the benchmark or the model. Raises ValueError if it is no model."""
    if is_checkpoint(args.weights):
        raise ValueError(f"{args.weights} is a checkpoint: write its model with python -m tools.export, and use that")
    benchmark = BENCHMARKS.get(args.task)
    args.min_new_tokens = benchmark.min_new_tokens if benchmark else 0
    args.max_new_tokens = args.max_new_tokens or (benchmark.max_new_tokens if benchmark else 10)
    args.fit = args.fit or (PRESETS[args.preset].fit if args.task == "iqa" else None)
    args.fit = args.fit or DEFAULT_FIT[read_config(args.weights).variant]
    if args.quantize or read_quantization(args.weights):
        args.precision = args.precision or "bf16"


def load_model_and_tokenizer(args: Namespace, dist: Dist) -> tuple[Owl, Tokenizer]:
    """Loads --weights with --adapter. Raises FileNotFoundError or ValueError as load_with_adapter and Tokenizer do."""
    tokenizer = Tokenizer(args.weights)
    adapter = Path(args.adapter) if args.adapter else None
    model = load_with_adapter(Path(args.weights), adapter, dist.device, dist.dtype, args.quantize)
    model.config.llama.eos_id = tokenizer.eos_id
    bits = bits_of(model)
    if bits and dist.is_main and (why := why_slow(bits, dist.device, dist.dtype)):
        log(why)
    return model, tokenizer


def make_runner(args: Namespace, dist: Dist, folder: Path) -> Runner:
    """Loads the model. folder: what image paths are relative to."""
    options = {"fit": args.fit, "blank": args.images == "blank", "batch_size": args.batch}
    options |= {"min_new_tokens": args.min_new_tokens, "max_new_tokens": args.max_new_tokens}
    return Runner(*load_model_and_tokenizer(args, dist), dist, folder, **options)


def run_benchmark(args: Namespace, dist: Dist) -> None:
    """Asks a benchmark's questions, prints its numbers and, with --out, keeps its folder."""
    benchmark, folder = BENCHMARKS[args.task], Path(args.folder)
    questions = benchmark.read(folder)
    n_question, is_loose = len(questions), args.loose_letters
    if args.limit:
        questions = limit_questions(questions, args.limit, benchmark.unit_of)
    if args.images == "shuffled":
        questions = shuffle_images(questions, args.seed)
    published = None
    if args.task == "owleval" and args.out:
        published = read_published(folder, questions)
        if published is None and dist.is_main:
            log(f"rate.html will not be written: {printable(folder)} has no {PUBLISHED_FILES[0]}")

    opened = open_run(Path(args.out), args, folder, questions, dist) if args.out else nullcontext(({}, {}, None))
    with opened as (record, answers, file):
        runner = make_runner(args, dist, folder)
        answers = runner.run(questions, answers, partial(append_answer, file) if file else None)
        if not dist.is_main:
            return
        texts = [answers[question.id] for question in questions]
        score = loose_letter_score if is_loose else benchmark.score
        results = list(zip(questions, texts, score(texts, questions)))
        numbers = benchmark.summarize(results)
        title = benchmark.title if args.images == "right" else f"{benchmark.title} (images: {args.images})"
        title += " (letters also from sentences)" if is_loose else ""
        title += f" ({len(questions):,} of {n_question:,} questions)" if len(questions) < n_question else ""
        print(f"{title}\n{printable(args.weights)}, {len(results):,} answers\n")
        for name, number in numbers.items():
            print(f"{printable(name):<40} {number}, n = {number.n:,}")
        if not args.out:
            return
        out = Path(args.out)
        write_results(out, results, numbers, record)
        write_submission(args.task, folder, out, results)
        if args.images == "blank":
            results = [(replace(question, images=[]), answer, score) for question, answer, score in results]
        where = {"weights": str(args.weights), "folder": folder, "seed": args.seed}
        page = report_page(title, numbers, results, record, **where)
        write_page(out / "index.html", page)
        if published:
            page = rating_page(results, published, **where)
            write_page(out / "rate.html", page)


def run_qa_file(args: Namespace, dist: Dist) -> None:
    """Asks the questions of --data and prints how many answers are right; --out lists them in the file's order."""
    out = Path(args.out) if args.out else None
    if out:
        check_out(out)
    root = Path(args.image_root) if args.image_root else Path(args.data).parent
    cases = read_cases(Path(args.data), root)
    if args.limit:
        kept = {q.id for q in limit_questions([case.question for case in cases], args.limit, first_question)}
        cases = [case for case in cases if case.question.id in kept]
    questions = [case.question for case in cases]
    if args.images == "shuffled":
        questions = shuffle_images(questions, args.seed)
    part = Path(f"{out}.run")  # holds the answers so far
    with open_run(part, args, root, questions, dist) if out else nullcontext(({}, {}, None)) as (_, answers, file):
        runner = make_runner(args, dist, root)
        answers = runner.run(questions, answers, partial(append_answer, file) if file else None)
        if dist.is_main:
            print(count_table(cases, answers))
            if out:
                write_text(out, answer_lines(cases, answers))
    if dist.is_main and out:
        remove_run(part)


def run_iqa(args: Namespace, dist: Dist) -> None:
    """Scores the images of --data and prints how well the scores agree with people's; --out lists them."""
    if dist.world_size > 1:
        raise ValueError("--task iqa runs in one process")
    out, root = Path(args.out) if args.out else None, Path(args.image_root or Path(args.data).parent)
    if out:
        check_out(out)
    prompt_of(args.preset, args.kind)
    cases = read_iqa(Path(args.data), root)
    options = {"fit": args.fit, "first_token": args.first_token}
    scorer = Scorer(*load_model_and_tokenizer(args, dist), args.preset, args.kind, **options)
    scores = score_cases(scorer, cases, root, args.batch)
    numbers = correlations(scores, [case.mos for case in cases])
    print(f"{printable(args.weights)}, {len(cases):,} images\n")
    for name, number in numbers.items():
        print(f"{name:<20} {number:>8.4f}")
    if len(numbers) == 2:
        log("the logistic fit needs scipy: pip install -r requirements-iqa.txt")
    if out:
        write_text(out, score_lines(cases, scores, scorer.prompt))


def print_loss(args: Namespace, dist: Dist) -> None:
    """Prints the loss of --data that training logs as the validation loss."""
    model, tokenizer = load_model_and_tokenizer(args, dist)
    spec = SampleSpec.for_model(model.config, tokenizer, fit=args.fit)
    data = Conversations(args.data, spec, image_root=args.image_root)
    skipped = SkippedSamples()
    loss = evaluate_loss(model, data, args.batch, dist, skipped=skipped)
    skipped = skipped.gather(dist)
    if skipped.count.total() == len(data):
        raise ValueError(f"no row of {args.data} can be used")
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: use --precision fp32, unless the weights are damaged")
    print(repr(loss))
    if skipped.count:
        log(f"skipped rows:\n{skipped.report()}")


@contextmanager
def explain_runtime_errors(device: str) -> Iterator[None]:
    """Turns a RuntimeError that the user can act on into a ValueError."""
    try:
        yield
    except RuntimeError as error:  # torch has no class for a full CPU memory and for a lost gloo process
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise ValueError(f"the memory of {device} is full: try a smaller --batch, or --quantize") from None
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise ValueError("another process has ended; it should say why") from None
        raise


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with user_errors(), explain_runtime_errors(args.device):
            check_flags(args)
            if args.list:
                print(list_files())
                return
            if args.ratings:
                print(count_ratings(Path(args.ratings)))
                return
            resolve_defaults(args)
            dist = init_distributed(args.device, args.precision)
            if args.task == "iqa":
                run_iqa(args, dist)
            elif args.task:
                run_benchmark(args, dist)
            elif args.loss:
                print_loss(args, dist)
            else:
                run_qa_file(args, dist)
    except KeyboardInterrupt as error:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        log("stopped" + ("; the same command continues the run" if args.out and args.task != "iqa" else ""))
        sys.exit(128 + error.args[0])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
