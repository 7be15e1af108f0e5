"""What the experiments share: what is given, one baseline, and runs that are made once.

The papers begin with a LLaMA and a CLIP. So do these runs, with a language model and a vision tower of their own, made
once from the drawn world of data/shapes:

    world      data/shapes/prepare.py
      | train_stage0.py                  language   a language model that knows the world's text part; no images
      | train_stage1.py, 2,000 steps     vision     a vision tower; all else that this run learns is left behind
      v
    start      both, and an abstractor of random weights: the seed's
      | train_stage1.py                  seed1/queries8          captions
      | train_stage2.py                  seed1/queries8-both     questions about images, of the text part, or both
      v
    evaluate.py                          seed1/queries8-both-test.jsonl: test, text_test or conflict

A seed (1, 2, 3) decides the abstractor's first weights, the same for all variants that have them, and the order of the
samples in both stages. World, language model and tower are the same for all, and so are the test's questions: what the
tables call deviation covers none of these. Rates and numbers of steps were found by trial on the baseline, looking at
the test files, and for no other variant. Runs are short: after 200 steps of stage 1 and 300 of stage 2 all still learn,
so the tables compare how fast as much as how well.

A run's name says what it is, so experiments that want the same run share it. Each command is run once: beside what it
makes lie NAME.log, what it printed, and NAME.run.json: the command, versions, device. What was stopped or killed goes
on from its last checkpoint.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from cost import train_flops  # noqa: E402
from evaluate import normal  # noqa: E402
from launch import fail  # noqa: E402
from model import PRESETS, Owl, init_weights  # noqa: E402
from patches import Patches  # noqa: E402
from train_stage2 import choose_trained  # noqa: E402
from weights import load_model, read_json, save_model, write_json  # noqa: E402

DEVICE = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
VOCAB_SIZE = 640  # of data/shapes' tokenizer
KINDS = {  # of data/shapes' questions
    "test": ("color", "shape", "count", "relation", "size", "compare", "there", "word"),
    "text_test": ("fact", "named", "sum", "told"),
}
COLOURS = ("#1f5fa8", "#d1602b", "#b8912a", "#2f8f5b")

# Found by trial: enough that a run learns, few enough that it takes minutes on one core.
COMMON = ["--batch", "32", "--micro", "32", "--crop-scale", "0", "--save-every", "100"]
STAGE1 = ["--lr", "1.5e-3", "--min-lr", "1e-4"]
STAGE2 = ["--warmup", "50", "--lr", "1e-3", "--min-lr", "1e-5", "--weight-decay", "0.05", "--max-length", "512"]
N_STEP_LANGUAGE, N_STEP_VISION, N_STEP_1, N_STEP_2 = 1500, 2000, 200, 300
LORA_RANK = 8
LORA = ["--lora-rank", str(LORA_RANK), "--train-abstractor", "--lr", "2e-3"]  # (the last of two rates counts)
VIT = {
    "trained": ["--vit-lr-decay", "1"],
    "layer-wise": ["--vit-lr-decay", "0.5"],  # the lowest of 4 layers learns at 0.06; at 0.9, of 24, at 0.08
    "frozen": ["--vit-lr-decay", "1", "--freeze-vit"],
}
DATA = {  # of stage 2; "none": there is none, and stage 1's model is tested
    "none": [],
    "text": ["text.json:1"],
    "image": ["train.json:1"],
    "both": ["train.json:1", "text.json:1"],
}


@dataclass(frozen=True)
class Variant:
    """An owl and its training; the defaults are the baseline."""

    style: str = "owl2"
    n_query: int = 8
    patches: bool = False  # instead of the abstractor's queries: as many patches, through one Linear (patches.py)
    image_size: int = 64  # pixels
    adaptive: bool = True  # an Owl2's modality-adaptive module
    vit: str = "trained"  # a key of VIT
    data: str = "both"  # of stage 2: a key of DATA
    lora: bool = False  # in stage 2 adapters and the abstractor are trained, instead of everything

    @property
    def stage1(self) -> str:
        """What its stage 1 is called: all that tells it from others."""
        name = "owl1-" if self.style == "owl1" else ""
        name += f"{'patches' if self.patches else 'queries'}{self.n_query}"
        name += f"-{self.image_size}px" if self.image_size != 64 else ""
        name += "-plain" if not self.adaptive else ""
        return name + (f"-vit-{self.vit}" if self.vit != "trained" else "")

    @property
    def stage2(self) -> str:
        if self.data == "none":
            return self.stage1
        return f"{self.stage1}-{self.data}" + ("-lora" if self.lora else "")

    @property
    def language(self) -> str:
        return "language" if self.style == "owl2" else "language-owl1"

    def runs(self, script: str) -> list[str]:
        """The command that runs a script with this owl."""
        return ["experiments/patches.py", script] if self.patches else [script]

    @property
    def flags(self) -> list[str]:
        """Of both stages."""
        return ["--image-size", str(self.image_size), *VIT[self.vit]]


BASELINE = Variant()


# --- commands, each run once --------------------------------------------------------------------------


class Lab:
    """A folder of runs, and how they are made in it."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.jobs, self.seeds = args.out, args.jobs, range(1, args.seeds + 1)
        self.n_image, self.scale = args.images, args.scale
        self.lock: TextIO | None = None  # of the folder
        self.locks: dict[str, threading.Lock] = {}  # by name of what is made: two runs may want it at once
        self.children: set[subprocess.Popen] = set()
        self.stopped = threading.Event()

    def steps(self, n: int) -> list[str]:
        return ["--steps", str(max(1, round(n * self.scale)))]

    def once(self, name: str, script: str, *flags: str) -> None:
        """Runs a script of this repository in the lab's folder, unless that was done. ValueError if it fails, or if
        what is there was made otherwise."""
        with self.locks.setdefault(name, threading.Lock()):
            note, command = self.out / f"{name}.run.json", [script, *flags]
            if note.exists():
                before = read_json(note)
                if before.get("command") != command:
                    raise ValueError(f"{self.out / name} was made with other settings: choose another --out")
                if before.get("done"):
                    return
            note.parent.mkdir(parents=True, exist_ok=True)
            content = {"command": command, "torch": torch.__version__, "device": DEVICE, "owlet": commit()}
            write_json(note, content | {"done": False})
            if self.call(command, self.out / f"{name}.log") != 0:
                raise ValueError(f"{script} failed for {self.out / name}: {self.out / name}.log says why")
            write_json(note, content | {"done": True})

    def call(self, command: list[str], log: Path) -> int:
        """Runs a script, and waits for its exit code."""
        script, *flags = command
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        with open(log, "ab") as file:
            argv = [sys.executable, str(ROOT / script), *flags]
            # With the folder's lock, which it holds on if this process is killed and it is not.
            fds = [self.lock.fileno()] if self.lock else []
            child = subprocess.Popen(argv, cwd=self.out, env=env, stdout=file, stderr=file, pass_fds=fds)
        self.children.add(child)
        if self.stopped.is_set():  # after `all` has gone over the children
            child.terminate()
        code = child.wait()
        self.children.discard(child)
        return code

    def all(self, works: list[Callable[[], None]]) -> None:
        """Does the works, `jobs` at a time. On the first that fails, or when stopped, stops the others."""
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(work) for work in works]
                for future in tqdm(as_completed(futures), total=len(works), unit="run", disable=None):
                    future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self.children):
                    child.terminate()  # training makes a checkpoint, and leaves
                raise

    # --- the runs ------------------------------------------------------------------------------------

    def train(self, stage: int, variant: Variant, name: str, *flags: str) -> None:
        self.once(name, *variant.runs(f"train_stage{stage}.py"), *COMMON, *flags, "--out", name, "--resume")
        shutil.rmtree(self.out / name / "checkpoints", ignore_errors=True)  # ten times the model's size

    def world(self) -> None:
        self.once("world", "data/shapes/prepare.py", "--out", "world", "--images", str(self.n_image))

    def language(self, style: str) -> None:
        """Text in either owl's prompts."""
        variant = Variant(style)
        start = ["--preset", f"tiny-{style}", "--tokenizer", "world/tokenizer.model", *variant.flags]
        data = ["--data", "world/stage0.json", "--val", "world/stage0_val.json"]
        self.train(0, variant, variant.language, *start, *data, *self.steps(N_STEP_LANGUAGE))

    def vision(self) -> None:
        data = ["--data", "world/captions.json", "--val", "world/captions_val.json"]
        flags = [*BASELINE.flags, *data, *STAGE1, "--warmup", "100", *self.steps(N_STEP_VISION)]
        self.train(1, BASELINE, "vision", "--weights", "language", *flags)

    def stage1(self, variant: Variant, seed: int) -> None:
        name = f"seed{seed}/{variant.stage1}"
        start = self.out / f"{name}-start"
        with self.locks.setdefault("start", threading.Lock()):  # of all: chance is drawn from one generator
            if not (start / "model.safetensors.index.json").exists():  # which save_model writes last
                save_model(start_model(self.out / variant.language, self.out / "vision", variant, seed), start)
        data = ["--weights", f"{name}-start", "--data", "world/captions.json"]
        flags = [*variant.flags, *STAGE1, "--warmup", "50", *self.steps(N_STEP_1), "--seed", str(seed)]
        self.train(1, variant, name, *data, *flags)

    def stage2(self, variant: Variant, seed: int) -> None:
        if variant.data == "none":
            return
        mix = [f"world/{source}" for source in DATA[variant.data]]
        data = ["--weights", f"seed{seed}/{variant.stage1}", "--mix", *mix]
        flags = [*variant.flags, *STAGE2, *(LORA if variant.lora else ["--lora-rank", "0"])]
        flags += [*self.steps(N_STEP_2), "--seed", str(seed)]
        self.train(2, variant, f"seed{seed}/{variant.stage2}", *data, *flags)

    def test(self, variant: Variant, seed: int, test: str) -> None:
        name = f"seed{seed}/{variant.stage2}"
        flags = ["--data", f"world/{test}.json", "--weights", name, "--out", f"{name}-{test}.jsonl"]
        self.once(f"{name}-{test}", *variant.runs("evaluate.py"), *flags)

    def chain(self, variant: Variant, seed: int, tests: tuple[str, ...]) -> None:
        """A run from its beginnings to its tests, less what is there already."""
        self.world()
        self.language("owl2")
        self.vision()
        self.language(variant.style)
        self.stage1(variant, seed)
        self.stage2(variant, seed)
        for test in tests:
            self.test(variant, seed, test)

    def run(self, variants: list[Variant], tests: tuple[str, ...] = ("test", "text_test")) -> None:
        """All runs of all seeds. Raises ValueError, OSError."""
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "lock", "w") as self.lock:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another experiment is at work in {self.out}: wait for it") from None
            self.all([partial(self.chain, variant, seed, tests) for seed in self.seeds for variant in variants])

    def rows(self, variant: Variant, seed: int, test: str) -> list[dict]:
        """The answers of a test, and what evaluate.py wrote beside each."""
        path = self.out / f"seed{seed}/{variant.stage2}-{test}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def shares(self, variant: Variant, test: str, key: str, counts: Callable[[dict], bool]) -> list[float]:
        """For each seed: of how many percent of a test's rows the answer is row[key]. counts: which rows."""
        rows = (filter(counts, self.rows(variant, seed, test)) for seed in self.seeds)
        return [percent(said(row, key) for row in of_seed) for of_seed in rows]


def said(row: dict, key: str) -> bool:
    """Whether the answer is what the row has under that key."""
    return normal(row["answer"]) == normal(row[key])


def percent(counts: Iterable[bool]) -> float:
    """How many of them, nan of none."""
    counts = list(counts)
    return 100 * sum(counts) / len(counts) if counts else math.nan


def commit() -> str | None:
    """Of this repository, if it is one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_owl(variant: Variant) -> Owl:
    """An owl of that shape, without weights."""
    config = PRESETS[f"tiny-{variant.style}"]()
    config.llama.vocab_size = VOCAB_SIZE
    config.llama.adaptive &= variant.adaptive
    config.abstractor.n_query = variant.n_query
    config.resize(variant.image_size)
    owl = Owl(config)
    if variant.patches:
        owl.abstractor = Patches(config.abstractor)
    return owl


def start_model(language: Path, vision: Path, variant: Variant, seed: int) -> Owl:
    """The given language model and vision tower, with an abstractor of the seed's random weights; for 64 pixels.

    The image half of the modality-adaptive module is a copy of the text half, as stage 0 leaves it.
    """
    owl = make_owl(replace(variant, image_size=64))
    torch.manual_seed(seed)
    init_weights(owl.abstractor)
    words, sight = load_model(language), load_model(vision)
    owl.vit.load_state_dict(sight.vit.state_dict())
    state = words.llama.state_dict()
    if not owl.config.llama.adaptive:
        state = {key.replace(".multiway.0.", "."): value for key, value in state.items() if ".multiway.1." not in key}
    owl.llama.load_state_dict(state)
    owl.tokenizer_folder = words.tokenizer_folder
    return owl


# --- numbers ------------------------------------------------------------------------------------------


def spread(numbers: list[float]) -> str:
    """"61.2 ± 0.8": mean and standard deviation (of the seeds as a sample)."""
    mean = f"{statistics.mean(numbers):.1f}"
    return f"{mean} ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def table(head: str, rows: dict[str, dict[str, list[float]]]) -> str:
    """A table in Markdown: a row for each variant, a column for each measure, mean and deviation over the seeds."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {head} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | {' | '.join(spread(row[column]) for column in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def draw(path: Path, title: str, rows: dict[str, dict[str, list[float]]], unit: str) -> None:
    """The table as a picture: a group for each row, in it a bar for each measure, on it a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(next(iter(rows.values())))
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.2 * len(rows), 3.6), layout="constrained")
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        x = [k + (i - (len(columns) - 1) / 2) * width for k in range(len(rows))]
        values = [row[column] for row in rows.values()]
        axes.bar(x, [statistics.mean(v) for v in values], width * 0.92, color=COLOURS[i], label=column, alpha=0.55)
        for at, numbers in zip(x, values):
            axes.plot([at] * len(numbers), numbers, "o", color=COLOURS[i], markersize=3.5)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, ncols=len(columns), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def scores(lab: Lab, variants: dict[str, Variant]) -> dict[str, dict[str, list[float]]]:
    """Accuracy in percent, for each seed: on things of seen and of unseen pairs, on words to read, on the text part.

    Words stand apart, since reading is learned all at once, and chance says when: at the end of so short a run it is at
    any number from 0 to 100, and all else would drown in that.
    """
    return {
        name: {
            "things, seen": lab.shares(variant, "test", "truth", lambda row: row["kind"] != "word" and row["seen"]),
            "unseen": lab.shares(variant, "test", "truth", lambda row: row["kind"] != "word" and not row["seen"]),
            "words": lab.shares(variant, "test", "truth", lambda row: row["kind"] == "word"),
            "text": lab.shares(variant, "text_test", "truth", lambda row: True),
        }
        for name, variant in variants.items()
    }


def by_kind(lab: Lab, variants: dict[str, Variant], test: str) -> dict[str, dict[str, list[float]]]:
    """The same of each kind of question of a test."""
    return {
        name: {kind: lab.shares(variant, test, "truth", lambda row: row["kind"] == kind) for kind in KINDS[test]}
        for name, variant in variants.items()
    }


def costs(variants: dict[str, Variant]) -> dict[str, dict[str, list[float]]]:
    """What each takes: its image words, and the MFLOPs of stage 2 on one image and 100 words (20 of them answers)."""
    rows = {}
    for name, variant in variants.items():
        with torch.device("meta"):
            owl = make_owl(variant)
        choose_trained(owl, LORA_RANK if variant.lora else 0, 32.0, 0.05, True, freeze_vit=variant.vit == "frozen")
        flops = train_flops(owl, 1, [owl.config.image_words + 100], 20) if variant.data != "none" else 0.0
        rows[name] = {"words of an image": [owl.config.image_words], "MFLOP a sample": [flops / 1e6]}
    return rows


def compare(lab: Lab, name: str, head: str, title: str, variants: dict[str, Variant]) -> None:
    """Runs the variants, and writes their tables and picture."""
    lab.run(list(variants.values()))
    rows = scores(lab, variants)
    kinds = (table(head, by_kind(lab, variants, test)) for test in KINDS)
    write(lab, name, table(head, rows), *kinds, table(head, costs(variants)))
    draw(lab.out / f"{name}.png", title, rows, "% right")


def write(lab: Lab, name: str, *tables: str) -> None:
    about = f"Percent right: mean ± standard deviation over {len(lab.seeds)} seeds; {lab.n_image:,} training images, "
    about += f"{lab.scale:g} times the usual steps; {DEVICE}, torch {torch.__version__}, owlet {commit()}"
    text = "\n\n".join([about, *tables]) + "\n"
    (lab.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


# --- the command line ---------------------------------------------------------------------------------


def experiment(doc: str, run: Callable[[Lab], None]) -> None:
    """A script's main: run(lab), with what a person can get wrong said in one sentence, and exit code 2."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "experiments", help="folder (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="1 to N (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: the cores, %(default)s)")
    p.add_argument("--images", type=int, default=8000, metavar="N", help="of the world (default: %(default)s)")
    p.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps: 0.01 to try it (default: 1)")
    args = p.parse_args()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        import matplotlib  # noqa: F401 (now, rather than hours later)

        if args.seeds < 1 or args.jobs < 1 or not 0 < args.scale < math.inf:
            raise ValueError("--seeds and --jobs must be 1 or more, --scale above 0")
        args.out = args.out.resolve()
        run(Lab(args))
    except ModuleNotFoundError as error:
        fail(ValueError(f"{error}: pip install {error.name}"))
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt as interrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + interrupt.args[0])
