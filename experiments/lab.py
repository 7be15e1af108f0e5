"""What the experiments share: the models they start from, a baseline, and runs that are each made once.

The papers start from LLaMA and CLIP. These runs start from a language model and a vision encoder of their own, trained
once on the drawn scenes of data/shapes:

    world        data.shapes.prepare: images, captions, questions, and a text part (facts that no image shows)
      | tools.train_language             language   a language model of the text part; it has seen no images
      | train_stage1, 2,000 steps        vision     a vision encoder; the rest of this model is not used
      v
    start        both, and an abstractor with random weights
      | train_stage1                     seed1/queries8          captions
      | train_stage2                     seed1/queries8-both     questions about images, about the text part, or both
      v
    evaluate                             seed1/queries8-both-test.jsonl: test, text_test or conflict

A seed (1, 2, 3) decides the initial abstractor, equal for all setups of the same shape, and the order of the samples
in both stages. All seeds share the world, the language model, the vision encoder and the test questions, so the
standard deviations in the tables do not cover these. Learning rates and numbers of steps were tuned on the baseline's
test results, not for any other setup. Runs are short: after 200 steps of stage 1 and 300 of stage 2 all models still
improve, so the tables compare speed of learning as much as its result.

The name of a run describes its setup, so experiments share runs. Each command runs once: NAME.log has its output and
NAME.run.json its arguments, versions and device. A stopped or killed training continues from its last checkpoint.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from command import ArgumentParser, log, user_errors
from evaluation.scoring import is_exact_match
from experiments.patches import Patches
from common.files import read_json, write_json
from model import Owl
from training.options import positive_float, positive_int
from training.presets import PRESETS, init_weights, resize
from weights import load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
VOCAB_SIZE = 640  # of data/shapes' tokenizer

# Found by trial: enough that a run learns, few enough that it takes minutes on one core.
COMMON = ["--batch", "32", "--micro-batch", "32", "--crop-scale", "0", "--save-every", "100"]
STAGE1 = ["--lr", "1.5e-3", "--min-lr", "1e-4"]
STAGE2 = ["--warmup", "50", "--lr", "1e-3", "--min-lr", "1e-5", "--weight-decay", "0.05", "--max-length", "512"]
N_STEP_LANGUAGE, N_STEP_VISION, N_STEP_1, N_STEP_2 = 1500, 2000, 200, 300
LORA_RANK = 8
LORA = ["--lora-rank", str(LORA_RANK), "--train-abstractor", "--lr", "2e-3"]  # overrides the rate of STAGE2
VIT = {
    "trained": ["--vit-lr-decay", "1"],
    "layer-wise": ["--vit-lr-decay", "0.5"],  # the lowest of 4 layers has 0.06 of the rate; at 0.9, of 24 layers, 0.08
    "frozen": ["--vit-lr-decay", "1", "--freeze-vit"],
}
DATA = {  # of stage 2; "none": no stage 2, the model of stage 1 is tested
    "none": [],
    "text": ["text.json:1"],
    "image": ["train.json:1"],
    "both": ["train.json:1", "text.json:1"],
}


@dataclass(frozen=True)
class Setup:
    """A model and its training; the defaults are the baseline."""

    variant: str = "owl2"
    n_query: int = 8
    patches: bool = False  # one visual token per patch, by one Linear, instead of an abstractor (patches.py)
    image_size: int = 64  # pixels
    adaptive: bool = True  # Owl2's modality-adaptive module
    vit: str = "trained"  # a key of VIT
    data: str = "both"  # of stage 2: a key of DATA
    lora: bool = False  # stage 2 trains adapters and the abstractor instead of everything

    @property
    def stage1(self) -> str:
        """Name of the stage 1 run, which has all fields that stage 1 depends on."""
        name = "owl1-" if self.variant == "owl1" else ""
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
        return "language" if self.variant == "owl2" else "language-owl1"

    @property
    def flags(self) -> list[str]:
        """Flags of both stages."""
        return ["--image-size", str(self.image_size), *VIT[self.vit]]

    def command(self, module: str) -> list[str]:
        return ["experiments.patches", module] if self.patches else [module]


# --- runs ---------------------------------------------------------------------------------------------


class Lab:
    """A folder of runs, and the commands that make them."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.jobs, self.seeds = args.out, args.jobs, range(1, args.seeds + 1)
        self.n_image, self.scale = args.images, args.scale
        self.folder_lock: TextIO | None = None
        self.locks: dict[str, threading.Lock] = {}  # by run: two setups may need the same run
        self.children: set[subprocess.Popen] = set()
        self.stopped = threading.Event()

    def run_once(self, name: str, module: str, *flags: str) -> None:
        """Runs `python -m module flags` in the lab's folder, unless it has been done.

        Raises ValueError if it fails, or if a run of this name had another command.
        """
        with self.locks.setdefault(name, threading.Lock()):
            path, command = self.out / f"{name}.run.json", [module, *flags]
            record = read_json(path) if path.exists() else {"command": command}
            if record.get("command") != command:
                raise ValueError(f"{self.out / name} was made by another command ({path}): choose another --out")
            if record.get("done"):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"command": command, "torch": torch.__version__, "device": DEVICE, "owlet": git_commit()}
            write_json(path, record | {"done": False})
            if self.run_command(command, self.out / f"{name}.log") != 0:
                raise ValueError(f"{module} failed for {self.out / name}: see {self.out / name}.log")
            write_json(path, record | {"done": True})

    def run_command(self, command: list[str], log_file: Path) -> int:
        """Runs a module with flags in a process and returns its exit code."""
        n_thread = max(1, (os.cpu_count() or 1) // self.jobs)
        env = os.environ | {"OMP_NUM_THREADS": str(n_thread), "PYTHONPATH": str(ROOT)}
        # The child holds the folder's lock too, in case it outlives this process.
        fds = [self.folder_lock.fileno()] if self.folder_lock else []
        with open(log_file, "ab") as file:
            argv = [sys.executable, "-m", *command]
            child = subprocess.Popen(argv, cwd=self.out, env=env, stdout=file, stderr=file, pass_fds=fds)
        self.children.add(child)
        if self.stopped.is_set():  # run_parallel may have terminated the other children before this one was added
            child.terminate()
        code = child.wait()
        self.children.discard(child)
        return code

    def run_parallel(self, functions: list[Callable[[], None]]) -> None:
        """Calls functions, `jobs` at a time. If one fails, or on a signal, terminates all running commands.

        Raises ValueError or OSError if one fails or if the folder is in use.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "lock", "w") as self.folder_lock:
            try:
                fcntl.flock(self.folder_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another experiment is running in {self.out}: wait until it ends") from None
            self.call_parallel(functions)

    def call_parallel(self, functions: list[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(function) for function in functions]
                for future in tqdm(as_completed(futures), total=len(functions), unit="run", disable=None):
                    future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self.children):
                    child.terminate()  # training saves a checkpoint and exits
                raise

    def run_setups(self, setups: Iterable[Setup], tests: tuple[str, ...] = ("test", "text_test")) -> None:
        """Makes all runs of all seeds, as run_parallel does."""
        setups = list(setups)
        self.run_parallel([partial(self.run_chain, setup, seed, tests) for seed in self.seeds for setup in setups])

    def run_chain(self, setup: Setup, seed: int, tests: tuple[str, ...]) -> None:
        """Makes a setup's run and all that it starts from, then tests it."""
        self.run_once("world", "data.shapes.prepare", "--out", "world", "--images", str(self.n_image))
        self.train_language("owl2")
        self.train_vision()
        self.train_language(setup.variant)
        self.train_stage1(setup, seed)
        self.train_stage2(setup, seed)
        name = f"seed{seed}/{setup.stage2}"
        for test in tests:
            flags = ["--data", f"world/{test}.json", "--weights", name, "--out", f"{name}-{test}.jsonl"]
            self.run_once(f"{name}-{test}", *setup.command("evaluate"), *flags)

    def train(self, command: list[str], name: str, n_step: int, *flags: str, common: list[str] = COMMON) -> None:
        steps = ["--steps", str(max(1, round(n_step * self.scale)))]
        self.run_once(name, *command, *common, *flags, *steps, "--out", name, "--resume")
        shutil.rmtree(self.out / name / "checkpoints", ignore_errors=True)  # ten times the model's size

    def train_language(self, variant: str) -> None:
        """Trains a language model on text in the prompt format of a variant."""
        setup = Setup(variant)
        start = ["--preset", f"tiny-{variant}", "--tokenizer", "world/tokenizer.model", *setup.flags]
        data = ["--data", "world/stage0.json", "--val", "world/stage0_val.json"]
        self.train(["tools.train_language"], setup.language, N_STEP_LANGUAGE, *start, *data)

    def train_vision(self) -> None:
        data = ["--data", "world/captions.json", "--val", "world/captions_val.json"]
        flags = ["--weights", "language", *Setup().flags, *data, *STAGE1, "--warmup", "100"]
        self.train(["train_stage1"], "vision", N_STEP_VISION, *flags)

    def train_stage1(self, setup: Setup, seed: int) -> None:
        name = f"seed{seed}/{setup.stage1}"
        start = self.out / f"{name}-start"
        with self.locks.setdefault("start", threading.Lock()):  # one lock for all: torch's generator is shared
            if not (start / "model.safetensors.index.json").exists():  # save_model writes it last
                save_model(initial_model(self.out / setup.language, self.out / "vision", setup, seed), start)
        data = ["--weights", f"{name}-start", "--data", "world/captions.json"]
        flags = [*setup.flags, *STAGE1, "--warmup", "50", "--seed", str(seed)]
        self.train(setup.command("train_stage1"), name, N_STEP_1, *data, *flags)

    def train_stage2(self, setup: Setup, seed: int) -> None:
        if setup.data == "none":
            return
        mix = [f"world/{source}" for source in DATA[setup.data]]
        data = ["--weights", f"seed{seed}/{setup.stage1}", "--mix", *mix]
        flags = [*setup.flags, *STAGE2, *(LORA if setup.lora else ["--lora-rank", "0"]), "--seed", str(seed)]
        self.train(setup.command("train_stage2"), f"seed{seed}/{setup.stage2}", N_STEP_2, *data, *flags)

    def answers(self, setup: Setup, seed: int, test: str) -> list[dict]:
        """The answers of a test with the notes of their questions, as evaluate.py wrote them."""
        path = self.out / f"seed{seed}/{setup.stage2}-{test}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def accuracy(
        self, setup: Setup, test: str, select: Callable[[dict], bool] = lambda row: True, key: str = "truth"
    ) -> list[float]:
        """For each seed, the percentage of the selected answers that equal row[key]."""
        rows = (filter(select, self.answers(setup, seed, test)) for seed in self.seeds)
        return [percentage(is_exact_match(row["answer"], row[key]) for row in of_seed) for of_seed in rows]


def percentage(values: Iterable[bool]) -> float:
    """Percentage of true values; nan if there are none."""
    values = list(values)
    return 100 * sum(values) / len(values) if values else math.nan


def git_commit() -> str | None:
    """The commit of this repository; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- models -------------------------------------------------------------------------------------------


def create_model(setup: Setup) -> Owl:
    """A model of that shape, without initialized weights."""
    config = PRESETS[f"tiny-{setup.variant}"]()
    config.llama.vocab_size = VOCAB_SIZE
    config.llama.adaptive &= setup.adaptive
    config.abstractor.n_query = setup.n_query
    resize(config, setup.image_size)
    model = Owl(config)
    if setup.patches:
        model.abstractor = Patches(config.abstractor)
    return model


def initial_model(language: Path, vision: Path, setup: Setup, seed: int) -> Owl:
    """The trained language model and vision encoder with a random abstractor, for 64 pixels.

    The visual half of the modality-adaptive module is a copy of the text half, as tools.train_language leaves it.
    """
    model = create_model(replace(setup, image_size=64))
    torch.manual_seed(seed)
    init_weights(model.abstractor)
    text_model = load_model(language)
    state = text_model.llama.state_dict()
    if not model.config.llama.adaptive:
        state = {key.replace(".multiway.0.", "."): value for key, value in state.items() if ".multiway.1." not in key}
    model.llama.load_state_dict(state)
    model.vit.load_state_dict(load_model(vision).vit.state_dict())
    model.tokenizer_folder = text_model.tokenizer_folder
    return model


# --- the command line ---------------------------------------------------------------------------------


@contextmanager
def experiment(doc: str) -> Iterator[Lab]:
    """The lab of an experiment's command line. On SIGTERM or Ctrl-C stops all runs and exits with 128 + signal."""
    p = ArgumentParser(prog=f"python -m experiments.{Path(sys.argv[0]).stem}", description=doc)
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "experiments", help="folder (default: %(default)s)")
    p.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="1 to N (default: %(default)s)")
    p.add_argument("--jobs", type=positive_int, default=os.cpu_count(), help="parallel runs (default: the cores)")
    p.add_argument("--images", type=positive_int, default=8000, metavar="N", help="to draw (default: %(default)s)")
    p.add_argument("--scale", type=positive_float, default=1.0, help="factor of all steps (default: 1)")
    args = p.parse_args()
    args.out = args.out.resolve()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with user_errors():
        import matplotlib  # noqa: F401 (a missing package is an error now rather than after hours)

        try:
            yield Lab(args)
        except KeyboardInterrupt as interrupt:
            log("stopped; the same command continues from here")
            sys.exit(128 + interrupt.args[0])
