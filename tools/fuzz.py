"""Gives damaged files to the code that reads files, and reports every one that it does not handle.

    python -m tools.fuzz                                      1,000 inputs, in a minute or two
    python -m tools.fuzz --inputs 1000000 --seconds 3600      as many as an hour allows
    python -m tools.fuzz --kind bin --seed 17 --inputs 1      one input again

An input is a folder of small files of one kind, of which some are damaged: flipped bits, a cut, JSON values of other
types, huge numbers, deep nesting, control characters, paths and links that lead outside, pipes, pickles that call
functions. It is determined by the kind and the seed. A forked process reads it as the commands do, and must succeed
or report a ValueError or OSError in one line. It fails with

    traceback   any other exception
    crash       a signal, such as a segmentation fault
    time        more than 10 seconds of computing, or 30 of waiting
    memory      more than 2 GB
    control     a control character in what it prints
    outside     a file outside the input's folder is opened
    execution   a function that a pickle names is called, or a program is started

For each failure, the command that repeats it is printed and the input is kept. Exit code: 1 if there are failures.
"""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from command import ArgumentParser, run, user_errors

import torch
from PIL import Image
from tqdm import tqdm

import sample
from data.check import check
from data.conversations import Conversations, SampleSpec
from data.image import FITS, load_image, to_pixels
from data.mix import Mixture
from data.shards import Shards
from data.text import Tokenizer
from evaluation.qa_file import read_cases
from common.files import printable
from inference.adapter import save_lora, save_non_lora
from lora import inject_lora
from model import Owl
from training import checkpoint
from training.distributed import Dist
from training.options import number
from training.presets import PRESETS, init_weights
from weights import hf_state_dict, save_model

TOKENIZER = Path(__file__).resolve().parents[1] / "checkpoints/tiny-owl2/tokenizer.model"
MAX_SECONDS = 10
MAX_BYTES = 2_000_000_000  # of memory, beyond what the modules take
ALONE = Dist(0, 1, torch.device("cpu"), torch.float32)
STEP = "step-00000001"
OUTSIDE = "outside"  # beside the input's folder: files that must not be opened
OUT_OF_MEMORY = ("does not fit in memory", "out of memory")  # messages
EXECUTED = "executed"  # beside it: a folder that hostile pickles create

# --- damage ------------------------------------------------------------------------------------------

CONTROL = "\x1b[31m\x07\r\n\x9b\u202e"
TEXTS = [CONTROL, "", " ", "\ud800", "\0", "../outside/secret.png", "<image>", "<image>" * 50, "</s>", " " * 200_000]
TEXTS += ["a" * 1_000_000, "owl1", "mplug-owl", "1e308", "images/0.png", "x/../../outside/secret.png", "é" * 300]
TEXTS += [json.dumps({"from": "human"}), "../outside/secret.safetensors", "../outside/secret.bin"]
VALUES = [json.dumps(text) for text in TEXTS]  # as JSON source, since some cannot be built from Python's objects
VALUES += ["null", "true", "false", "-1", "0", "1", "2", "3", "7", "1.5", "1e308", "-1e999", "1e-320", "NaN"]
VALUES += ["Infinity", str(2**31), str(2**63), "1" * 300, "9" * 5000, "1000000", "[]", "{}", "[[]]", '{"a": null}']
VALUES += ["[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[0, 0]", '[1, "a", null]']
NAMES = [CONTROL + ".jpg", "../outside/secret.png", "/etc/hostname", "a.jpg", "a.b.c", "a" * 300 + ".jpg", "", "."]


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    content = bytearray(content)
    start = rng.randrange(len(content) + 1)
    if rng.random() < 0.5:
        start = min(start, rng.randrange(64))  # headers are at the beginning
    how = rng.choice(["bits", "bits", "cut", "insert", "number", "number", "copy"])
    if how == "bits":
        for _ in range(rng.choice([1, 1, 4, 30]) if content else 0):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[start:]
    elif how == "insert":
        content[start:start] = rng.choice([rng.randbytes(rng.randrange(1, 40)), CONTROL.encode(), bytes(5000)])
    elif how == "number":
        size = rng.choice([1, 2, 4, 8])
        value = rng.choice([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), rng.randrange(2 ** (8 * size))])
        content[start : start + size] = value.to_bytes(size, rng.choice(["little", "big"]))
    else:
        content[start:start] = content[start : start + rng.randrange(1, 200)]
    return bytes(content)


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Replaces, removes, renames or repeats values. Content that is not JSON gets other bytes."""
    try:
        root = [json.loads(content)]
    except (ValueError, RecursionError):
        return damage_bytes(rng, content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        damage_value(rng, root)
    text = json.dumps(root[0])
    if rng.random() < 0.1:
        key = json.dumps(rng.choice(["image", "conversations", "model_type", CONTROL]))
        text = text.replace("{", f"{{{key}: @VALUE@, {key}: @VALUE@, ", 1)  # a key twice
    return text.replace('"@VALUE@"', "@VALUE@").replace("@VALUE@", rng.choice(VALUES)).encode()


def damage_value(rng: random.Random, root: list) -> None:
    """Changes one value inside the only item of root, or that item."""
    places = []  # (list or dictionary, index or key)
    found = [root]
    while found:
        parent = found.pop()
        for key in parent if isinstance(parent, dict) else range(len(parent)):
            places.append((parent, key))
            if isinstance(parent[key], (dict, list)):
                found.append(parent[key])
    parent, key = rng.choice(places)
    how = rng.choice(["replace", "replace", "replace", "remove", "rename", "repeat"])
    if how == "remove" and parent is not root:
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[rng.choice([CONTROL, "", "\ud800", "a" * 10_000, key + "."])] = parent.pop(key)
    elif how == "repeat" and isinstance(parent, list) and parent is not root:
        parent += [parent[key]] * rng.choice([1, 1, 300])
    else:
        parent[key] = "@VALUE@"


class Hostile:
    """Is pickled as a call that creates a folder, or starts a program that does."""

    def __init__(self, rng: random.Random, folder: Path):
        self.call = rng.choice([(os.mkdir, (str(folder),)), (os.system, (f"mkdir {folder}",))])

    def __reduce__(self) -> tuple:
        return self.call


def damage_pickle(rng: random.Random, content: bytes, executed: Path) -> bytes:
    how = rng.random()
    if how < 0.1:
        return pickle.dumps(rng.choice([Hostile(rng, executed), {"a": Hostile(rng, executed)}]))
    if how < 0.2:
        stop = rng.randrange(len(content) + 1)  # a call in the middle; PROTO is left out
        return content[:stop] + pickle.dumps(Hostile(rng, executed), 2)[2:-1] + content[stop:]
    return damage_bytes(rng, content)


def damage_zip(rng: random.Random, content: bytes, executed: Path) -> bytes:
    """Damages a member of a zip, such as the pickle in a .bin; the checksums of the zip fit the new content."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return damage_pickle(rng, content, executed)
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        members = {name: old.read(name) for name in old.namelist()}
    chosen = rng.choice([name for name in members if name.endswith(".pkl")] * 10 + list(members))
    members[chosen] = damage_pickle(rng, members[chosen], executed)
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as file:
        for name, member in members.items():
            if name != chosen or rng.random() < 0.95:
                file.writestr(name, member)
    return new.getvalue()


def damage_tar(rng: random.Random, content: bytes, executed: Path) -> bytes:
    """Damages a member's content, its header (with a fitting checksum), or the order of the members."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    i = rng.randrange(len(members))
    member, data = members[i]
    how = rng.choice(["content", "content", "header", "header", "name", "type", "order"])
    if how == "content":
        data = damage_json(rng, data)
        member.size = len(data)
    elif how == "name":
        member.name = rng.choice([*NAMES, members[0][0].name, member.name + CONTROL])
    elif how == "type":
        member.type, member.linkname = rng.choice([b"1", b"2", b"3", b"5", b"6", b"S", b"L", b"x", b"g"]), NAMES[1]
    elif how == "order":
        rng.shuffle(members)
    members[i] = (member, data) if how != "order" else members[i]
    blocks = []
    for k, (member, data) in enumerate(members):
        header = bytearray(member.tobuf(rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
        if how == "header" and k == i:
            header[:500] = damage_bytes(rng, bytes(header[:500]))[:500].ljust(500, b"\0")
            total = sum(header[:148] + b" " * 8 + header[156:512])
            header[148:156] = b"%06o\0 " % total
        blocks += [header, data.ljust(-(-len(data) // 512) * 512, b"\0")]
    return b"".join(blocks) + bytes(1024)


def damage_safetensors(rng: random.Random, content: bytes, executed: Path) -> bytes:
    """Damages the JSON header, whose length then fits it, or any bytes."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4 or not 0 < size < len(content):
        return damage_bytes(rng, content)
    header = damage_json(rng, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def damage_text(rng: random.Random, content: bytes, executed: Path) -> bytes:
    return (damage_json if rng.random() < 0.85 else damage_bytes)(rng, content)


def damage_lines(rng: random.Random, content: bytes, executed: Path) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = damage_text(rng, lines[i], executed)
    return b"\n".join(lines)


BY_SUFFIX = {".json": damage_text, ".jsonl": damage_lines, ".safetensors": damage_safetensors, ".bin": damage_zip}
BY_SUFFIX |= {".tar": damage_tar, ".metadata": damage_pickle}


def damage_folder(rng: random.Random, folder: Path, files: str) -> None:
    """Damages one or a few of the files that match a pattern."""
    paths = sorted(path for path in folder.glob(files) if path.is_file())
    for path in rng.sample(paths, min(len(paths), rng.choice([1, 1, 1, 2, 3]))):
        if rng.random() > 0.12:
            damage = BY_SUFFIX.get(path.suffix or path.name, lambda rng, content, _: damage_bytes(rng, content))
            path.write_bytes(damage(rng, path.read_bytes()[:1_000_000], folder.parent / EXECUTED))
            continue
        how = rng.choice(["gone", "empty", "pipe", "folder", "loop", "pointer", "huge", "outside"])
        if how == "huge":
            os.truncate(path, 100_000_000 if path.suffix in (".json", ".jsonl") else 3_000_000_000)  # takes no space
            continue
        path.unlink()
        if how == "empty":
            path.touch()
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how == "loop":
            path.symlink_to(path.name)
        elif how == "outside":
            path.symlink_to(folder.parent / OUTSIDE / f"secret{path.suffix}")
        elif how == "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


# --- kinds of input ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """make: writes valid files to a folder. files: a pattern of those to damage. read: reads all, as commands do.

    closed: a folder from which links may not lead outside. Elsewhere they may, as in the cache of the Hugging Face hub.
    """

    make: Callable[[Path], None]
    files: str
    read: Callable[[Path, random.Random], object]
    closed: str = "-"


def gradient(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.linear_gradient("L").rotate(30).resize(size).convert(mode)


def make_images(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    gradient().save(folder / "0.png")
    for i, mode in enumerate(["L", "P", "1", "I;16", "RGBA", "LA"]):
        gradient("L" if mode == "P" else mode).convert(mode).save(folder / f"{mode.replace(';', '')}.png")
    gradient().save(folder / "exif.jpg", exif=exif)
    gradient("CMYK").save(folder / "cmyk.jpg")
    for mode in ("RGB", "I;16", "F", "L"):
        gradient(mode).save(folder / f"{mode.replace(';', '')}.tiff")
    for suffix in ("webp", "bmp", "gif", "ppm", "ico", "tga", "jp2"):
        gradient().save(folder / f"a.{suffix}")


def read_images(folder: Path, _: random.Random) -> None:
    for path in sorted(folder.iterdir()):
        image = load_image(path)
        for fit in FITS:
            to_pixels(image, 64, fit)


ROWS = [
    {"id": "a", "image": "images/0.png", "conversations": [{"from": "human", "value": "<image>What is this?"},
     {"from": "gpt", "value": "A cat."}, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
    {"id": 1, "image": ["images/0.png"], "text": "The following is\nHuman: <image>\nHuman: What?\nAI: A dog."},
    {"image": "images/0.png", "caption": ["A cat.", "A cat on a mat."]},
    {"id": "b", "kind": "x", "image": "images/0.png", "conversations": [{"from": "human", "value": "<image> How?"},
     {"from": "gpt", "value": "So."}]},
]  # fmt: skip


def make_rows(folder: Path) -> None:
    (folder / "images").mkdir()
    gradient().save(folder / "images/0.png")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "questions.json").write_text(json.dumps(ROWS[::3]))


def check_rows(path: Path, merge: bool, variant: str) -> None:
    """What --check and python -m data.check do."""
    spec = SampleSpec(Tokenizer(TOKENIZER), variant, 4, 28, 64, "square")
    check(Mixture([Conversations(path, spec, image_root=path.parent, merge=merge)], [1.0]))


def read_rows(folder: Path, rng: random.Random) -> None:
    for path in (folder / "rows.json", folder / "rows.jsonl"):
        check_rows(path, rng.random() < 0.5, rng.choice(["owl1", "owl2"]))
    read_cases(folder / "questions.json", folder)


def make_tars(folder: Path) -> None:
    image = io.BytesIO()
    gradient().save(image, "PNG")
    for shard in "01":
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i, row in enumerate(ROWS):
                text = row["caption"][0] if "caption" in row else ""
                contents = {"png": image.getvalue(), "json": json.dumps(row).encode(), "txt": text.encode()}
                for extension, content in contents.items():
                    member = tarfile.TarInfo(f"a/{shard}{i}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    Shards(str(folder / "*.tar"))  # writes the index


def read_tars(folder: Path, rng: random.Random) -> None:
    check_rows(folder / rng.choice(["*.tar", "0.tar"]), False, rng.choice(["owl1", "owl2"]))


def tiny_model(variant: str = "owl2") -> Owl:
    """A model with random weights, of 70,000 parameters."""
    config = PRESETS[f"tiny-{variant}"]()
    for part in (config.vit, config.abstractor, config.llama):
        part.n_layer, part.n_head, part.n_embd, part.n_mlp = 1, 2, 16, 16
    config.abstractor.n_out, config.llama.n_kv_head, config.llama.vocab_size = 16, 2, 640
    model = init_weights(Owl(config)).eval()
    model.tokenizer_folder = TOKENIZER.parent
    return model


def make_weights(folder: Path) -> None:
    save_model(tiny_model(), folder)
    tokens = {"2": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "added_tokens_decoder": tokens}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')


def make_bin(folder: Path) -> None:
    model = tiny_model("owl1")
    save_model(model, folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    state = {key: tensor.detach() for key, tensor in hf_state_dict(model).items()}
    for i, is_zip in enumerate((True, False)):  # torch's present format and the one before
        name = f"pytorch_model-{i}.bin"
        torch.save(dict(list(state.items())[i::2]), folder / name, _use_new_zipfile_serialization=is_zip)
    files = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(state)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def make_adapter(folder: Path) -> None:
    make_weights(folder)
    model = tiny_model()
    inject_lora(model, ("o_proj", "gate_proj"), 2, 4.0, 0.0)
    save_lora(model, folder / "adapter", "base")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("abstractor"))
    save_non_lora(model, folder / "adapter")


def make_checkpoint(folder: Path) -> None:
    checkpoint.save(folder, 1, {"settings": {"lr": 0.1}, "updates": 1, "bad_steps": 0}, state(), dist=ALONE, keep=1)


def state() -> dict[str, torch.Tensor]:
    return {"weight.a": torch.ones(5, 3), "moment1.a": torch.ones(5, 3), "moment2.b": torch.ones(7).bfloat16()}


def read_checkpoint(folder: Path, rng: random.Random) -> None:
    sign(folder / STEP, rng)
    if (found := checkpoint.find(folder, ALONE)) is not None:
        checkpoint.load(*found, state())


def sign(path: Path, rng: random.Random) -> None:
    """Mostly: makes the checksums fit the damaged files, as an attacker would."""
    small = [file.name for file in path.iterdir() if file.is_file() and file.stat().st_size < 1_000_000]
    if checkpoint.MANIFEST not in small:
        return
    try:
        manifest = json.loads((path / checkpoint.MANIFEST).read_bytes())
        manifest.pop("sha256", None)
        if rng.random() < 0.8:
            manifest["files"] |= {name: checkpoint.checksum(path / name) for name in manifest["files"] if name in small}
        content = checkpoint.encode_manifest(manifest)
    except Exception:  # the manifest itself is damaged
        return
    if rng.random() < 0.8:
        (path / checkpoint.MANIFEST).write_bytes(content)


def ask(folder: Path, rng: random.Random, *flags: str) -> None:
    """What sample.py does with --weights."""
    image = folder.parent / "question.png"
    gradient().save(image)
    flags += ("--weights", str(folder), "--image", str(image), "--prompt", "What is this?", "--device", "cpu")
    sample.main([*flags, "--max-new-tokens", "2"])


def ask_adapter(folder: Path, rng: random.Random) -> None:
    ask(folder, rng, "--adapter", str(folder / "adapter"))


KINDS = {
    "images": Kind(make_images, "*", read_images),
    "rows": Kind(make_rows, "**/*.*", read_rows, closed="images"),
    "tars": Kind(make_tars, "**/*.*", read_tars),
    "config": Kind(make_weights, "*config.json", ask),
    "tokenizer": Kind(make_weights, "tokenizer*", ask),
    "safetensors": Kind(make_weights, "model*", ask),
    "bin": Kind(make_bin, "pytorch*", ask),
    "adapter": Kind(make_adapter, "adapter/*", ask_adapter),
    "checkpoint": Kind(make_checkpoint, "step*/*", read_checkpoint),
}

# --- one input ---------------------------------------------------------------------------------------


def read_guarded(read: Callable[[], object], folder: Path, closed: str) -> str:
    """Reads in this process, which ends afterwards. Returns "value", "error", or how it failed."""
    opened: list[str] = []
    outside = os.path.realpath(folder.parent / OUTSIDE)
    programs = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen")

    def observe(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str):
            path = os.path.realpath(arguments[0])
            if path.startswith(outside) and (not os.path.islink(arguments[0]) or f"/{closed}/" in arguments[0]):
                opened.append("outside")
        elif event in programs:
            opened.append("execution")

    sys.addaudithook(observe)
    _, limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MAX_BYTES, limit))  # twice, since mapped files count, too
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # of computing; the signals end the process
    signal.alarm(3 * MAX_SECONDS)  # of waiting, on a machine that also does other work
    outcome = "value"
    try:
        with user_errors():
            read()
    except SystemExit as ended:
        outcome = "error" if ended.code == 2 else "traceback"
    except BaseException:
        traceback.print_exc()
        outcome = "traceback"
    sys.stdout.flush()
    return opened[0] if opened else outcome


OUTCOMES = ("value", "error", "traceback", "crash", "time", "memory", "control", "outside", "execution")


def outcome_of(read: Callable[[], object], folder: Path, closed: str = "-") -> tuple[str, str]:
    """Reads in a forked process. Returns one of OUTCOMES and what was printed."""
    log = folder.parent / "log"
    pid = os.fork()
    if pid == 0:
        code = OUTCOMES.index("crash")
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = OUTCOMES.index(read_guarded(read, folder, closed))
        finally:
            os._exit(code)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, status, usage = os.wait4(pid, 0)
    text = log.read_bytes().decode(errors="replace")
    if os.WIFSIGNALED(status):
        return "time" if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF) else "crash", text
    outcome = OUTCOMES[os.WEXITSTATUS(status)]
    if (folder.parent / EXECUTED).exists():
        outcome = "execution"
    elif (usage.ru_maxrss - before) * 1024 > MAX_BYTES or any(words in text for words in OUT_OF_MEMORY):
        outcome = "memory"
    elif outcome in ("value", "error") and not all(c.isprintable() or c == "\n" for c in text):
        outcome = "control"
    return outcome, text


def try_input(name: str, seed: int, template: Path, folder: Path) -> tuple[str, str]:
    """Damages a copy of a kind's valid files in a new folder and reads them. Returns outcome_of(...)."""
    kind = KINDS[name]
    rng = random.Random(f"{name} {seed}")
    shutil.copytree(template, folder)
    damage_folder(rng, folder, kind.files)
    return outcome_of(lambda: kind.read(folder, rng), folder, kind.closed)


def make_templates(root: Path, kinds: Iterable[str]) -> None:
    """Writes the valid files of each kind, always the same, to a folder of its name."""
    torch.set_num_threads(1)  # threads do not survive the fork for an input
    for name in kinds:
        (root / name).mkdir()
        torch.manual_seed(0)
        KINDS[name].make(root / name)


def make_outside(folder: Path) -> None:
    """Writes files that no input may open."""
    folder.mkdir(parents=True)
    gradient().save(folder / "secret.png")
    (folder / "secret.json").write_text(json.dumps(ROWS))
    torch.save({"a": torch.ones(2)}, folder / "secret.bin")
    for suffix in (".jsonl", ".tar", ".safetensors", ".metadata", ".distcp", ".model", ".index", ""):
        (folder / f"secret{suffix}").write_text("secret")


def fuzz(kinds: list[str], seed: int, n_input: int, seconds: float, keep: Path) -> int:
    """Tries n_input inputs, the kinds in turn. Prints the failures and a table. Returns the number of failures."""
    counts = Counter()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="owlet-fuzz-") as root:
        make_templates(Path(root), kinds)
        for i in tqdm(range(n_input), "fuzzing", unit="input", disable=None):
            if time.monotonic() > deadline:
                break
            name, number = kinds[i % len(kinds)], seed + i // len(kinds)
            parent = Path(root) / "input"
            make_outside(parent / OUTSIDE)
            outcome, text = try_input(name, number, Path(root) / name, parent / name)
            counts[name, outcome] += 1
            if outcome not in ("value", "error"):
                shutil.rmtree(keep / f"{name}-{number}", ignore_errors=True)
                shutil.copytree(parent, keep / f"{name}-{number}", symlinks=True, ignore=is_special)
                last = printable(text.strip().rpartition("\n")[2])[:200]
                command = f"python -m tools.fuzz --kind {name} --seed {number} --inputs 1"
                tqdm.write(f"{outcome}: {command}\n    {last}")
            shutil.rmtree(parent)
    print(f"{'':<12}{'inputs':>8}{'values':>8}{'errors':>8}{'failures':>10}")
    for name in kinds:
        n, n_value, n_error = (sum(counts[name, o] for o in group) for group in (OUTCOMES, ["value"], ["error"]))
        print(f"{name:<12}{n:>8}{n_value:>8}{n_error:>8}{n - n_value - n_error:>10}")
    n_failure = sum(count for (_, outcome), count in counts.items() if outcome not in ("value", "error"))
    print(f"{n_failure} of {counts.total()} inputs failed" + (f"; they are in {keep}" if n_failure else ""))
    return n_failure


def is_special(folder: str, names: list[str]) -> list[str]:
    """Names that are not copied: pipes, and files that are huge because of a hole."""
    paths = {name: os.path.join(folder, name) for name in names}
    return [name for name, path in paths.items() if not os.path.islink(path) and not os.path.isdir(path)
            and (not os.path.isfile(path) or os.path.getsize(path) > 10_000_000)]


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    at_least_1 = number(int, lambda x: x >= 1, "1 or more")
    parser.add_argument("--kind", choices=KINDS, action="append", help="one kind of input (default: all in turn)")
    parser.add_argument("--inputs", type=at_least_1, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each kind (default: 0)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time (default: no limit)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for inputs that fail (default: a temporary one)")
    args = parser.parse_args()
    if sys.platform != "linux":
        parser.error("it needs Linux: it forks, and limits the memory of a process")
    keep = args.keep or Path(tempfile.gettempdir()) / "owlet-fuzz-failures"
    sys.exit(1 if fuzz(args.kind or list(KINDS), args.seed, args.inputs, args.seconds, keep) else 0)


if __name__ == "__main__":
    run(main)
