"""Asks a model about images: one question, a chat, or a file of questions.

    python sample.py --image assets/scene.png --prompt "what color is the triangle?"
    python sample.py --image x.jpg                                  no --prompt: a chat
    python sample.py --image a.jpg --image b.jpg --prompt "Is <image> older than <image>?"
    python sample.py --weights mplug-owl2-llama2-7b --image x.jpg --prompt "Describe it." > answer.txt
    python sample.py --weights mplug-owl2-llama2-7b --adapter runs/my-lora --prompt "Who are you?"
    python sample.py --image assets/scene.png --prompt "what word is written?" --explain page.html
    python sample.py --image assets/scene.png --prompt "is the triangle yellow?" --choices yes no
    python sample.py --video clip.mp4 --fps 1 --max-frames 8 --prompt "What happens?"
    python sample.py --questions rows.csv --out answers.csv         see docs/batch.md

Only the answer goes to standard output, streamed; everything else goes to standard error. A user error is one line,
with exit code 2.

In a prompt, <image> (or <|image|>) is an image placeholder: the first one stands for the first --image. Images
without a placeholder come before the text. All other text is literal: "</s>" is four characters.

In a chat each line is a question, or one of

    /image PATH   adds an image to the next question
    /reset        forgets the conversation and its images
    /help         lists these commands
    /quit         ends the chat, as do Ctrl-D and pressing Ctrl-C twice

Ctrl-C stops an answer; the conversation keeps the text generated so far.
"""

from __future__ import annotations  # so that annotations can name a class that is imported later

import argparse
import os
import sys
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from command import ArgumentParser, log, run, user_errors
from common.files import check_file, escape_controls, printable

# torch takes seconds to import, so it and all that imports it are imported after the flags are parsed.
if TYPE_CHECKING:
    from data.text import Tokenizer
    from inference.chat import ChatSession
    from model import Owl, OwlConfig

TINY_FOLDER = Path(__file__).parent / "checkpoints" / "tiny-owl2"
EXPLAIN_MARK = b'<meta name="generator" content="owlet --explain">'  # at the start of its pages
TINY_NOTICE = (
    "This is the embedded tiny model, trained on drawn scenes (such as assets/scene.png) and easy-VQA: it knows nothing "
    "else. For photos download MAGAer13/mplug-owl2-llama2-7b (see the README) and pass it as --weights."
)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parses the flags and checks those that need neither torch nor the model."""
    parser = ArgumentParser(prog="sample.py", description=__doc__)

    add = parser.add_argument_group("question").add_argument
    add("--prompt", metavar="TEXT", help="the question; without it, a chat starts")
    add("--image", action="append", default=[], metavar="PATH", help="an image; repeat the flag for several")
    add("--video", metavar="PATH", help="a video, whose frames share one placeholder, after those of the images")
    add("--fps", type=float, default=1.0, metavar="N", help="frames taken per second of video; default 1")
    add("--max-frames", type=int, default=8, metavar="N", help="at most so many, evenly spread; default 8")
    choices = "print each choice, its probability among the choices, and its log-probability, instead of an answer"
    add("--choices", nargs="+", metavar="TEXT", help=choices)
    page = "save a page that shows how the answer came about (see inference/explain.py) as .html; needs --prompt"
    add("--explain", type=Path, metavar="FILE", help=page)

    add = parser.add_argument_group("file of questions").add_argument
    rows = "answer the rows of a .csv, .json or .jsonl file with the columns image (or video) and prompt, greedily; "
    rows += "--prompt replaces the rows' own"
    add("--questions", type=Path, metavar="FILE", help=rows)
    out = "the rows and their answers, .csv or .jsonl; the same command continues a file after a stop"
    add("--out", type=Path, metavar="FILE", help=out)
    add("--batch", type=int, default=16, metavar="N", help="rows answered at a time; default 16")

    add_model_flags(parser)

    add = parser.add_argument_group("answer").add_argument
    temperature = "0, the default: greedy, each token is the most probable one; above 0: tokens are sampled. The "
    temperature += "released chats sample: Owl2 with --temperature 0.7, Owl1 with --temperature 1 --top-k 5"
    add("--temperature", type=float, default=0.0, metavar="T", help=temperature)
    add("--top-k", type=int, metavar="K", help="sample among the K most probable tokens")
    add("--top-p", type=float, metavar="P", help="sample among the fewest tokens that together have probability P")
    add("--seed", type=int, help="makes sampled answers reproducible")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="maximum length of an answer; default 512")

    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 < args.fps < float("inf") or args.max_frames < 1:
        parser.error(f"--fps must be above 0 and --max-frames at least 1, not {args.fps} and {args.max_frames}")
    check_combination(parser, args)
    if args.explain is not None:
        check_page_path(parser, args)
    return args


def check_combination(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Reports flags that do not go together."""
    if (args.questions is None) != (args.out is None):
        parser.error("--questions and --out need each other")
    if args.questions is not None:
        if args.image or args.video or args.explain or args.compile or args.temperature != 0:
            parser.error("--questions takes no --image, --video, --explain, --compile or --temperature")
        if args.batch < 1:
            parser.error(f"--batch must be at least 1, not {args.batch}")
    if args.choices is not None:
        if args.prompt is None and args.questions is None:
            parser.error("--choices needs --prompt or --questions")
        if args.explain is not None:
            parser.error("--choices and --explain do not go together")
        if not all(map(str.strip, args.choices)) or len(set(args.choices)) < len(args.choices):
            parser.error("--choices must differ and not be empty")


def add_model_flags(parser: ArgumentParser) -> None:
    """Adds the flags that select and load a model."""
    add = parser.add_argument_group("model").add_argument
    folder = "an mPLUG-Owl or mPLUG-Owl2 model in Hugging Face format, one saved by train_stage*.py, or a checkpoint "
    folder += "of a run, RUN/checkpoints/step-N; default: the embedded tiny model, checkpoints/tiny-owl2"
    add("--weights", type=Path, metavar="FOLDER", help=folder)
    add("--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter in PEFT format, merged into the weights")
    add("--device", default="auto", type=device_name, help="cpu, cuda, cuda:1, mps; auto: the first of cuda, mps, cpu")
    dtypes = "auto: bfloat16 on cuda, on mps, on a CPU that computes with it, and for quantized weights; otherwise "
    dtypes += "float32, or bfloat16 if float32 does not fit the memory"
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help=dtypes)
    bits = "quantize the language model's linear layers to 8 or 4 bits: an Owl2-7B then takes 8.7 or 5.4 GB, and "
    bits += "decodes faster where memory bandwidth is the limit (python -m tools.quantize saves quantized weights)"
    add("--quantize", choices=("int8", "int4"), help=bits)
    compiled = "compile the decoding step: takes some ten seconds at the start and pays off over many tokens"
    add("--compile", action="store_true", help=compiled)
    fits = "how an image becomes a square; default: as in the released chats, stretch for Owl1 and square for Owl2 "
    fits += "(Owl2's training scripts and image quality models pad)"
    add("--fit", choices=("stretch", "square", "pad", "crop"), help=fits)


def device_name(text: str) -> str:
    if text != "auto" and text.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda, cuda:NUMBER or mps, not {text!r}")
    return text


def check_page_path(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Reports an --explain FILE that cannot be written, before the model is loaded."""
    path = args.explain
    if args.prompt is None:
        parser.error("--explain needs --prompt")
    if path.suffix.lower() != ".html":
        parser.error(f"--explain {path}: the name must end in .html")
    if not os.path.isdir(path.parent) or os.path.isdir(path):  # Path.is_dir raises an error for a name too long
        parser.error(f"--explain {path}: there is no folder {path.parent}, or this is a folder itself")
    if os.path.lexists(path) and not is_explanation(path):
        parser.error(f"--explain {path}: a file of another origin would be overwritten")


def is_explanation(path: Path) -> bool:
    """Whether --explain wrote this file."""
    try:
        check_file(path)
        with path.open("rb") as file:
            return EXPLAIN_MARK in file.read(1000)
    except (OSError, ValueError):
        return False


def read_settings(args: argparse.Namespace) -> tuple[Owl | None, OwlConfig, Tokenizer]:
    """Returns (model, if it is read from a run's checkpoint, else None, its configuration, its tokenizer).

    Loading weights can take minutes, so this comes first, to check the inputs with. Raises ValueError or OSError.
    """
    from data.text import Tokenizer
    from lora import merge_lora
    from training.restore import is_checkpoint, restore_model
    from weights import read_config

    folder, model = args.weights or TINY_FOLDER, None
    if is_checkpoint(folder):
        if args.adapter is not None:
            raise ValueError(f"{folder} is a checkpoint, which has its own adapter: leave out --adapter")
        model, _, _ = restore_model(folder)
        merge_lora(model)
        config, tokenizer = model.config, Tokenizer(model.tokenizer_folder)
    else:
        config, tokenizer = read_config(folder), Tokenizer(folder)
    if tokenizer.vocab_size > config.llama.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocabulary")
    return model, config, tokenizer


def load(args: argparse.Namespace, model: Owl | None, tokenizer: Tokenizer) -> Owl:
    """Loads the model, unless it is read already, and reports its settings."""
    from inference.loading import load_for_inference
    from inference.quantize import bits_of, why_slow

    folder = args.weights or TINY_FOLDER
    model, device, dtype = load_for_inference(
        folder, adapter=args.adapter, quantize_to=args.quantize, device=args.device, dtype=args.dtype, model=model
    )
    model.config.llama.eos_id = tokenizer.eos_id
    bits = bits_of(model)
    precision = str(dtype).removeprefix("torch.") + (f", its language model in {bits} bits" if bits else "")
    log(f"{printable(folder)} on {device} in {precision}")
    if bits and (reason := why_slow(bits, device, dtype)):
        log(reason)
    if args.weights is None:
        log(TINY_NOTICE)
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        log("--top-k and --top-p have no effect at --temperature 0.")
    return model


def build_session(args: argparse.Namespace) -> ChatSession:
    """Reads and checks all inputs, then loads the model. Raises ValueError or OSError for what the user can fix."""
    from data.image import DEFAULT_FIT
    from generate import Sampling, generate
    from inference.chat import ChatSession, Conversation
    from inference.fast_decode import FastDecoder

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    model, config, tokenizer = read_settings(args)
    conversation = Conversation(config, tokenizer, args.fit or DEFAULT_FIT[config.variant])
    for path in args.image:
        conversation.add_image(path)
    if args.video is not None:
        conversation.add_video(args.video, args.fps, args.max_frames)
    max_length = config.llama.context
    if args.prompt is not None:
        conversation.ask(args.prompt)
        max_length = min(max_length, len(conversation.prompt_ids) + args.max_new_tokens)
    model = load(args, model, tokenizer)

    # Select the decoding loop. A compiled step is compiled now, not during the first answer.
    is_fast = model.llama.embed_tokens.weight.is_cuda or args.compile
    decode = FastDecoder(model, compile=args.compile).generate if is_fast else partial(generate, model)
    cache = model.llama.make_cache(1, max_length)
    session = ChatSession(
        model, conversation, decode, sampling=sampling, max_new_tokens=args.max_new_tokens, cache=cache
    )
    if args.compile:
        log("Compiling, which takes about a minute (less if it was done before).")
        session.warm_up()
    return session


def print_answer(session: ChatSession) -> None:
    """Prints the answer to the last question while it is generated."""
    try:
        with user_errors(), closing(session.answer()) as texts:  # so that the session keeps the text also after Ctrl-C
            for text in texts:
                print(escape_controls(text), end="", flush=True)
    finally:
        print(flush=True)


def print_choices(session: ChatSession, choices: list[str]) -> None:
    """Prints the probabilities of answers to the last question."""
    from inference.batch import choice_probabilities, score_choices

    chat = session.conversation
    with user_errors():
        messages = [chat.messages[:-1]]  # without the answer
        [scores] = score_choices(session.model, chat.tokenizer, messages, chat.images, choices=[choices])
    for choice, p, score in zip(choices, choice_probabilities(scores), scores):
        print(f"{escape_controls(choice)}\t{p:.4f}\t{score.log_p:.3f}")


def answer_questions(args: argparse.Namespace) -> None:
    """Answers the rows of --questions that --out does not have yet."""
    from data.image import DEFAULT_FIT
    from inference.rows import AnswerFile, RowReader, answer_columns, answer_rows, read_rows

    with user_errors():
        model, config, tokenizer = read_settings(args)
        rows = read_rows(args.questions, needs_prompt=args.prompt is None)
        # All that the answers depend on.
        fit = args.fit or DEFAULT_FIT[config.variant]
        options = {name: getattr(args, name) for name in ("prompt", "choices", "fps", "max_frames")}
        names = ("max_new_tokens", "dtype", "quantize")
        settings = options | {"fit": fit} | {name: getattr(args, name) for name in names}
        paths = {"questions": args.questions, "weights": args.weights or TINY_FOLDER, "adapter": args.adapter}
        settings |= {name: path and str(path.resolve()) for name, path in paths.items()}
        with AnswerFile(args.out, rows, answer_columns(args.choices), settings) as file:
            n_new = len(rows) - file.n_done
            if n_new < len(rows):
                log(f"{printable(args.out)} has {file.n_done} of {len(rows)} rows already")
            if n_new == 0:
                return
            model = load(args, model, tokenizer)
            reader = RowReader(model, tokenizer, args.questions.parent, fit, **options)
            n_broken = answer_rows(reader, rows, file, batch_size=args.batch, max_new_tokens=args.max_new_tokens)
    log(f"{n_new - n_broken} rows answered, {n_broken} broken" + (' (see the column "error")' if n_broken else ""))


def chat(session: ChatSession) -> None:
    """Answers line by line until the input ends."""
    from inference.chat import COMMANDS

    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() arrow keys and a history)
    log(f"Type a question. {COMMANDS}")
    while (line := read_line()) is not None and line != "/quit":
        try:
            if line:
                take_turn(session, line)
        except KeyboardInterrupt:
            log("(stopped)")


def take_turn(session: ChatSession, line: str) -> None:
    """Executes a command or answers a question. A line that is not valid is reported and changes nothing."""
    try:
        if line.startswith("/"):
            log(session.run_command(line))
            return
        session.conversation.ask(line)
    except (ValueError, OSError) as error:
        log(printable(error))
        return
    print_answer(session)


def read_line() -> str | None:
    """Returns the next line; None at the end of the input, or if Ctrl-C is pressed twice."""
    # Print a prompt only on a terminal: in a pipe it would become part of an answer.
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    is_interrupted = False
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if is_interrupted:
                return None
            is_interrupted = True
            log("\n(once more to leave)")


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    if args.questions is not None:
        answer_questions(args)
        return
    with user_errors():
        session = build_session(args)
    if args.prompt is None:
        chat(session)
        return
    if args.choices is not None:
        print_choices(session, args.choices)
        return
    print_answer(session)
    if args.explain is not None:
        from inference.explain import explain
        from inference.explain_page import write_page

        with user_errors():
            write_page(explain(session, (args.weights or TINY_FOLDER).resolve().name), args.explain)
        log(f"wrote {printable(args.explain)}")


if __name__ == "__main__":
    run(main)
