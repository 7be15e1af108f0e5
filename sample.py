"""Asks an owl about images: one question, or a chat.

    python sample.py --image x.jpg --prompt "What is this?"
    python sample.py --image x.jpg                                  a chat, as there is no --prompt
    python sample.py --image a.jpg --image b.jpg --prompt "Is <image> older than <image>?"
    python sample.py --weights mplug-owl2-llama2-7b --image x.jpg --prompt "Describe it." > answer.txt
    python sample.py --weights mplug-owl2-llama2-7b --adapter runs/my-lora --prompt "Who are you?"
    python sample.py --image x.jpg --prompt "What is this?" --show-attention looks.png     draws where it looked

The answer alone goes to standard output, piece by piece as it is made; all else goes to standard error.
What cannot be done is said in one sentence, with exit code 2.

In a prompt, <image> (or <|image|>) is where an image goes: the first mark takes the first --image. Images
without a mark come before the text. Nothing else that is typed has a special meaning: "</s>" is four letters.

In a chat a line is a question, or one of

    /image PATH   shows an image with the next question
    /reset        forgets the conversation and its images
    /help         lists these commands
    /quit         leaves, and so do Ctrl-D and two Ctrl-C

Ctrl-C stops an answer; what was said of it stays in the conversation.
"""

from __future__ import annotations  # the hints below name classes that are imported late

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# torch, and with it all of ours, is imported by the functions that use it: `--help` and mistakes in the
# arguments are answered at once, not after the seconds that importing torch takes.
if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from data.text import Tokenizer
    from llama import Cache
    from model import Owl, OwlConfig

TINY = Path(__file__).parent / "checkpoints" / "tiny-owl2"
TINY_NOTICE = (
    "This is the embedded tiny model, trained on easy-VQA's pictures: it answers questions on the colour and shape "
    "of one simple drawn shape, and nothing else. For real answers download MAGAer13/mplug-owl2-llama2-7b "
    "(the README has the line) and give its folder to --weights."
)
COMMANDS = "/image PATH shows an image with the next question; /reset starts afresh; /help; /quit"


# --- the command line --------------------------------------------------------------------------------


def notice(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fail(message: object) -> NoReturn:
    """Says in one line why it cannot be done, and leaves with exit code 2."""
    notice("sample.py: " + " ".join(str(message).split()))
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Without the page of usage that argparse puts before each error."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    question = parser.add_argument_group("question")
    question.add_argument("--prompt", metavar="TEXT", help="the question; without it a chat begins")
    question.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="an image; give it as often as there are images",
    )
    question.add_argument(
        "--fit",
        choices=("stretch", "square", "pad", "crop"),
        help="how an image becomes a square; by default as in the released chats: stretch for Owl1, square for Owl2 "
        "(Owl2's training scripts and image quality models pad)",
    )
    question.add_argument(
        "--show-attention",
        type=Path,
        metavar="FILE",
        help="draw where in the images the model looked (attention.py says how) into a .png or .jpg; with --prompt",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--weights",
        type=Path,
        metavar="FOLDER",
        help="any mPLUG-Owl or mPLUG-Owl2 checkpoint as it lies on the hub, or one saved by train_stage*.py; "
        "by default the embedded tiny model, checkpoints/tiny-owl2",
    )
    model.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="a LoRA adapter in PEFT's files, merged into the weights",
    )
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: the first of cuda, mps, cpu")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: bfloat16 on cuda and mps, and where the weights are quantised; else, on a CPU, float32, or "
        "bfloat16 where float32 would not fit the memory",
    )
    model.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="keep the language model's matrices in 8 or 4 bits: an Owl2-7B then fits 12 or 8 GB, and answers sooner "
        "where reading the weights is what takes time (python quantize.py saves them so)",
    )
    model.add_argument(
        "--compile",
        action="store_true",
        help="compile what makes a word: takes a minute at the start, and pays off over many words",
    )

    sampling = parser.add_argument_group("answer")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the default, takes the likeliest token each time, so that answers can be repeated; above 0 tokens are "
        "drawn. The released chats draw: Owl2 with --temperature 0.7, Owl1 with --temperature 1 --top-k 5",
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the fewest tokens that together have probability P",
    )
    sampling.add_argument("--seed", type=int, help="makes drawn answers repeatable")
    sampling.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="the longest answer; default 512",
    )

    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.show_attention is not None:
        if args.prompt is None or not args.image:
            parser.error("--show-attention needs --prompt and --image: it draws one answer's look at its images")
        if why := why_no_picture(args.show_attention, args.image):
            parser.error(f"--show-attention {args.show_attention}: {why}")
    if args.device != "auto" and args.device.split(":")[0] not in ("cpu", "cuda", "mps"):
        parser.error(f"--device is auto, cpu, cuda, cuda:NUMBER or mps, not {args.device!r}")
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature must be 0 or more, not {args.temperature}")
    if args.top_k is not None and args.top_k < 1:
        parser.error(f"--top-k must be 1 or more, not {args.top_k}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be 1 or more, not {args.max_new_tokens}")
    return args


def why_no_picture(path: Path, images: list[str]) -> str | None:
    """Why a picture cannot be written there, and None where it can."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return "a picture's name ends in .png or .jpg"
    if not os.path.isdir(path.parent):  # not path.parent.is_dir(), which raises for an overlong name
        return f"there is no folder {path.parent}"
    if os.path.isdir(path):
        return "this is a folder"
    if os.path.exists(path) and any(os.path.exists(image) and os.path.samefile(path, image) for image in images):
        return "this is an --image, which would be overwritten"
    return None


# --- the model ---------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device of that name, or for "auto" the best there is. Raises ValueError if there is none."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # depends on how torch was built
        raise ValueError(f"there is no device {name!r} here that torch can use") from None


def pick_dtype(name: str, device: torch.device, config: OwlConfig, quantised: bool) -> torch.dtype:
    """The dtype of that name, or for "auto" the one that suits the device."""
    import torch

    from model import Owl

    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu" or quantised:
        # Not float16: the owls were trained in bfloat16, whose range is float32's, and a few of LLaMA's
        # activations are so large that their squares leave float16's.
        return torch.bfloat16
    with torch.device("meta"):
        n_parameter = sum(parameter.numel() for parameter in Owl(config).parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A quarter is left for the cache, the activations, and all else that runs on the machine.
    return torch.float32 if 4 * n_parameter < 0.75 * memory else torch.bfloat16


def load(args: argparse.Namespace, folder: Path, device: torch.device, dtype: torch.dtype) -> Owl:
    """Loads the weights, merges the adapter, quantises. Raises FileNotFoundError, ValueError or OSError."""
    import torch

    import decode
    import lora
    import quantize
    import weights

    try:
        # An adapter is merged into whole weights, which are quantised then; else they are as they come.
        model = weights.load_model(folder, device, dtype, None if args.adapter else args.quantize)
        if args.adapter is not None:
            weights.load_non_lora(model, args.adapter)
            lora.load(model, args.adapter, official=lambda name: weights.official_name(name, model.config.style))
            lora.merge(model)
            if args.quantize is not None:
                quantize.quantize(model.llama, quantize.BITS[args.quantize])
    except torch.OutOfMemoryError:
        raise ValueError(f"{folder} does not fit the memory of {device} in {dtype}") from None
    decode.lay_out(model.llama)
    return model


def compile_step(model: Owl, args: argparse.Namespace) -> None:
    """Has the model's step compiled, by taking one. Raises ValueError where that cannot be done."""
    import torch

    import decode

    notice("Compiling, which takes a minute or more (less, where it was done before).")
    model.step = decode.compiled_step()
    device = model.llama.embed_tokens.weight.device
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    try:
        for word in range(model.config.llama.vocab_size):
            prompt = torch.tensor([[word]], device=device)
            if len(list(model.generate(prompt, max_new_tokens=2, cache=model.make_cache(), **sampling))) == 2:
                break  # a step was taken: the answer did not end with its first token
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(f"--compile cannot be done here: {str(error).splitlines()[0]}") from None


# --- the conversation --------------------------------------------------------------------------------


class Conversation:
    """What was said and shown so far.

    messages: questions and answers in turn. images: those in the messages, in order, [3, S, S] each. waiting: those
    that come with the next question. photos, waiting_photos: the same images small and upright, for people to look at.
    cache: what the model keeps of the tokens it has read, `read`.
    """

    def __init__(self, config: OwlConfig, tokenizer: Tokenizer, fit: str):
        self.config = config
        self.tokenizer = tokenizer
        self.fit = fit
        self.reset()

    def reset(self) -> None:
        self.messages: list[str] = []
        self.images: list[Tensor] = []
        self.waiting: list[Tensor] = []
        self.photos: list[Image] = []
        self.waiting_photos: list[Image] = []
        self.cache: Cache | None = None
        self.read: list[int] = []

    def show(self, path: str) -> None:
        """Adds an image to the next question. Raises ValueError for a file that cannot be shown."""
        from data.image import load_image, to_pixels

        photo = load_image(path)
        self.waiting.append(to_pixels(photo, self.config.image_size, self.fit))
        photo.thumbnail((512, 512))  # in place; a long chat is not to hold all its photos whole
        self.waiting_photos.append(photo)

    def ask(self, question: str) -> list[int]:
        """Adds a question with its images. Returns the whole conversation as ids.

        Raises ValueError, and changes nothing, if the question has more image marks than there are images
        or the conversation outgrows the model's context.
        """
        from data.text import IMAGE_MARK, expand_images, render_prompt

        # Bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer takes: they become "?".
        question = question.encode(errors="replace").decode()
        n_mark = len(IMAGE_MARK.findall(question))
        if n_mark > len(self.waiting):
            raise ValueError(f"the image marks in the prompt ({n_mark}) are more than its images ({len(self.waiting)})")
        question = "<image>" * (len(self.waiting) - n_mark) + question

        short_ids = render_prompt([*self.messages, question, None], self.tokenizer, self.config.style)
        ids, _ = expand_images(short_ids, None, self.config.image_words)
        context = self.config.llama.context
        if len(ids) > context:
            raise ValueError(
                f"the conversation is {len(ids)} tokens long, images included, and the model reads at most {context} "
                "(in a chat, /reset starts afresh)"
            )
        self.messages += [question, ""]
        # Those without a mark come first.
        self.images += self.waiting[n_mark:] + self.waiting[:n_mark]
        self.photos += self.waiting_photos[n_mark:] + self.waiting_photos[:n_mark]
        self.waiting, self.waiting_photos = [], []
        return ids

    def answered(self, text: str) -> None:
        """Puts the answer to the last question in its place."""
        from data.text import IMAGE_MARK

        self.messages[-1] = IMAGE_MARK.sub(" ", text)  # said by the model, a mark stands for no image


def stream(steps: Iterator[Tensor], tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """Turns an answer's ids, one at a time, into its text, piece by piece; puts them into the list `ids` as well.

    A token is seldom a word, and whether a space stands before it depends on its neighbours: so the answer
    is decoded from its start each time, and what is new is handed on.
    """
    text = ""
    n_shown = 0
    for step in steps:
        ids.append(int(step))
        text = tokenizer.decode(ids)
        # A rare character is several tokens, one for each of its bytes. Until the last is here, they decode
        # to replacement characters; these wait.
        whole = text.rstrip("\ufffd")
        if len(whole) > n_shown:
            yield whole[n_shown:]
            n_shown = len(whole)
    if len(text) > n_shown:
        yield text[n_shown:]


def answer(model: Owl, conversation: Conversation, ids: list[int], args: argparse.Namespace) -> list[int]:
    """Prints the answer as it is made, and puts it in the conversation, also if Ctrl-C cuts it short. Returns its ids.

    What the model has read of the conversation before is not read again: only what is new goes through it.
    """
    import torch

    from model import IMAGE_ID

    if conversation.cache is None:
        conversation.cache = model.make_cache()
    # Rendered anew, an answer may be cut into other tokens than those it was made of: what is known is what is equal.
    n = 0
    while n < min(len(conversation.read), len(ids) - 1) and conversation.read[n] == ids[n]:
        n += 1
    conversation.read = ids[:n]
    conversation.cache.rewind(n)
    images = conversation.images[ids[:n].count(IMAGE_ID) // model.config.image_words :]
    device = model.llama.embed_tokens.weight.device
    steps = model.generate(
        torch.tensor([ids[n:]], device=device),
        torch.stack(images).to(device) if images else None,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        cache=conversation.cache,
    )
    said: list[int] = []
    text = ""
    try:
        for piece in stream(steps, conversation.tokenizer, said):
            text += piece
            print(piece, end="", flush=True)
    finally:
        conversation.answered(text)
        conversation.read = (ids + said)[: int(conversation.cache.lengths)]
        print(flush=True)
    return said


def show_attention(
    model: Owl, conversation: Conversation, ids: list[int], said: list[int], folder: Path, path: Path
) -> None:
    """Draws into `path` where the answer `said` to the prompt `ids` looked. folder: the model's."""
    import torch

    import attention

    looks, attends = attention.look(model, ids, said, torch.stack(conversation.images))
    words = attention.by_word(attends, ids, said, conversation.tokenizer, model.config.image_words)
    prompt, text = conversation.messages
    headings = [f"prompt: {prompt}", f"answer: {text}", f"model: {folder}"]
    picture = attention.draw(headings, conversation.photos, conversation.fit, looks, words)
    try:
        picture.save(path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")
    letters = "".join("".join(headings).split())
    if attention.plain(letters) != letters:
        notice("Letters that the picture's font lacks are drawn without their accent, or as ?.")
    notice(f"wrote {path}")


# --- the chat ----------------------------------------------------------------------------------------


def chat(model: Owl, conversation: Conversation, args: argparse.Namespace) -> None:
    """Answers line by line, until the person leaves."""
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  it gives input() the arrow keys and a history
        except ImportError:
            pass
    notice(f"Ask away. {COMMANDS}")
    while (line := read_line()) is not None and line != "/quit":
        try:
            if line:
                take_turn(model, conversation, line, args)
        except KeyboardInterrupt:
            notice("(stopped)")


def read_line() -> str | None:
    """The next line, or None at the end of the input and after two Ctrl-C."""
    # A prompt is for a person who sees it; in a pipe it would be taken for part of an answer.
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    interrupted = False
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if interrupted:
                return None
            interrupted = True
            notice("\n(once more to leave)")


def take_turn(model: Owl, conversation: Conversation, line: str, args: argparse.Namespace) -> None:
    """Obeys a command or answers a question; a mistake is one sentence, and changes nothing."""
    try:
        if line.startswith("/"):
            obey(conversation, line)
            return
        ids = conversation.ask(line)
    except ValueError as error:
        notice(str(error))
        return
    answer(model, conversation, ids, args)


def obey(conversation: Conversation, line: str) -> None:
    """Runs a chat command. Raises ValueError for what is none."""
    command, _, argument = line.partition(" ")
    path = argument.strip().strip("\"'")  # a terminal puts quotes around a file that is dropped on it
    if command == "/image" and path:
        conversation.show(os.path.expanduser(path))
        notice("The image comes with your next question.")
    elif line == "/reset":
        conversation.reset()
        notice("The conversation and its images are forgotten.")
    elif line == "/help":
        notice(COMMANDS)
    else:
        raise ValueError(f"There is no command {line}: {COMMANDS}")


# --- all of it ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import quantize
    from data.image import DEFAULT_FIT
    from data.text import Tokenizer
    from weights import read_config, read_quantization

    folder = args.weights or TINY
    # All that can be wrong is looked at before the weights, which may take minutes, and only here is an error
    # taken for a person's mistake: one in the model's computation is ours, and is shown in full.
    try:
        config = read_config(folder)
        tokenizer = Tokenizer(folder)
        if tokenizer.vocab_size > config.llama.vocab_size:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens, more than the model's {config.llama.vocab_size}"
            )
        conversation = Conversation(config, tokenizer, args.fit or DEFAULT_FIT[config.style])
        for path in args.image:
            conversation.show(path)
        if args.prompt is not None:
            ids = conversation.ask(args.prompt)
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device, config, bool(args.quantize or read_quantization(folder)))
        model = load(args, folder, device, dtype)
        model.config.llama.eos_id = tokenizer.eos_id
        if args.compile:
            compile_step(model, args)
    except (ValueError, OSError) as error:
        fail(error)

    bits = quantize.bits_of(model)
    codes = f", its language model in {bits} bits" if bits else ""
    notice(f"{folder} on {device} in {str(dtype).removeprefix('torch.')}{codes}")
    if bits and (why := quantize.why_slow(bits, device, dtype, args.compile)):
        notice(why)
    if args.weights is None:
        notice(TINY_NOTICE)
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        notice("--top-k and --top-p change nothing at --temperature 0.")
    sys.stdout.reconfigure(errors="replace")  # a terminal without a character shows "?" in its place
    if args.prompt is None:
        chat(model, conversation, args)
    else:
        said = answer(model, conversation, ids, args)
        if args.show_attention is not None:
            show_attention(model, conversation, ids, said, folder, args.show_attention)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the answer has left, as `head` does. Without this Python complains when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
