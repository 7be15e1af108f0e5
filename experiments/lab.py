"""What the experiments share: the models they start from, and runs that are each made once.

The papers start from LLaMA and CLIP. These runs start from a language model of their own, trained on the text of the
drawn scenes of data/shapes, and from the vision encoder of a model in checkpoints/. A seed decides everything else:

    seed1/world                 data.shapes.prepare: images, captions, questions, a text part (facts no image shows)
      | train_stage2            on text only, from random weights
    seed1/language              a small language model; it has seen no images
      |                         + vision encoder of checkpoints/tiny-owl2, + an abstractor with random weights
    seed1/queries16-start
      | train_stage1            captions
    seed1/queries16
      | train_stage2            questions about images, about the text part, or both
    seed1/queries16-both
      | experiments.score       tests 8 checkpoints of the run, and its start
    seed1/queries16-both.scores.json

So two seeds differ in scenes, facts, test questions, language model, abstractor and the order of the samples. All
setups of a seed share these, and are compared in pairs. All seeds share the vision encoder, as the papers' runs share
CLIP. The decoder is small (280,000 parameters), so that image and text data compete for it. Learning rates and
numbers of steps were chosen on the baseline of one seed, not for any other setup.

The name of a run describes its setup, so experiments share runs. Each command runs once: NAME.log has its output and
NAME.run.json its arguments, versions and device. A stopped or killed training continues from its last checkpoint.
"""

import argparse
import fcntl
import os
import re
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
from experiments.patches import Patches
from common.files import read_json, write_json
from model import Owl
from training.options import positive_float, positive_int
from training.presets import PRESETS, init_weights, resize
from weights import load_model, read_config, save_model

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
VOCAB_SIZE = 640  # of data/shapes' tokenizer
N_EMBD, N_HEAD = 64, 4  # of the decoder
N_MLP, N_MLP_WIDE = 172, 215  # the wide one without the modality-adaptive module has the parameters of one with it
N_POINT = 8  # checkpoints of a run of stage 2, which are tested

# Found by trial: enough that a run learns, few enough that it takes minutes on one core.
COMMON = ["--batch", "32", "--micro-batch", "32", "--crop-scale", "0", "--keep", str(N_POINT)]
LANGUAGE = ["--warmup", "50", "--lr", "3e-3", "--min-lr", "1e-4", "--weight-decay", "0.05", "--max-length", "512"]
STAGE1 = ["--warmup", "50", "--lr", "3e-3", "--min-lr", "1e-4"]
STAGE2 = ["--warmup", "50", "--lr", "2e-3", "--min-lr", "1e-5", "--weight-decay", "0.05", "--max-length", "512"]
N_STEP_LANGUAGE, N_STEP_1, N_STEP_2 = 800, 200, 400
LORA_RANK = 8
# Overrides the rate of STAGE2.
LORA = ["--lora-rank", str(LORA_RANK), "--vit-lr-decay", "1", "--train-abstractor", "--lr", "4e-3"]
VIT = {
    "trained": ["--vit-lr", "3e-4", "--vit-lr-decay", "1"],
    # The lowest of 6 layers has 0.08 of the rate, as at the paper's 0.9 the lowest of 24.
    "layer-wise": ["--vit-lr", "3e-4", "--vit-lr-decay", "0.65"],
    "frozen": ["--vit-lr-decay", "1", "--freeze-vit"],
}
ENCODERS = {  # folders in checkpoints
    "scenes": "tiny-owl2",  # trained on other scenes of data/shapes, words included
    "easy-vqa": "tiny-owl1",  # trained on pictures with a single shape; it has seen no letter
}
DATA = {  # of stage 2; "none": no stage 2, the model of stage 1 is tested
    "none": [],
    "text": ["text.json:1"],
    "image": ["train.json:1"],
    "both": ["train.json:1", "text.json:1"],
    "image-rich": ["train.json:4", "text.json:1"],
    "text-rich": ["train.json:1", "text.json:4"],
    "captions": ["captions.json:1", "train.json:1", "text.json:1"],  # of a single stage: as many samples as in two
}


@dataclass(frozen=True)
class Setup:
    """A model and its training; the defaults are the baseline."""

    variant: str = "owl2"
    n_query: int = 16
    patches: bool = False  # one visual token per patch, by one Linear, instead of an abstractor (patches.py)
    image_size: int = 64  # pixels
    adaptive: bool = True  # Owl2's modality-adaptive module
    wide: bool = False  # a wider MLP; without the module, the model has as many parameters as with it
    vit: str = "trained"  # a key of VIT
    encoder: str = "scenes"  # a key of ENCODERS
    end_to_end: bool = False  # no stage 1; stage 2 has the steps of both
    data: str = "both"  # of stage 2: a key of DATA
    lora: bool = False  # stage 2 trains adapters and the abstractor instead of everything
    config: tuple[tuple[str, object], ...] = ()  # other fields of the model, such as ("llama.n_layer", 2)
    recipe: tuple[tuple[str, str], ...] = ()  # other flags of stage 2, such as ("--lr", "2e-3")

    @property
    def stage1(self) -> str:
        """Name of the stage 1 run, which has all fields that stage 1 depends on."""
        name = "owl1-" if self.variant == "owl1" else ""
        name += f"{'patches' if self.patches else 'queries'}{self.n_query}"
        name += f"-{self.image_size}px" if self.image_size != 64 else ""
        name += ("" if self.adaptive else "-plain") + ("-wide" if self.wide else "")
        name += f"-vit-{self.vit}" if self.vit != "trained" else ""
        name += f"-{self.encoder}" if self.encoder != "scenes" else ""
        return name + "".join(f"-{field}={value}" for field, value in self.config)

    @property
    def stage2(self) -> str:
        if self.data == "none":
            return self.stage1
        name = f"{self.stage1}-{self.data}" + ("-lora" if self.lora else "") + ("-end" if self.end_to_end else "")
        return name + "".join(f"-{flag.removeprefix('--')}={value}" for flag, value in self.recipe)

    @property
    def language(self) -> str:
        """Name of the language model that it starts from."""
        name = "language" + ("-owl1" if self.variant == "owl1" else "") + ("-wide" if self.wide else "")
        return name + "".join(f"-{field}={value}" for field, value in self.plain.config)

    @property
    def plain(self) -> "Setup":
        """What the language model depends on."""
        config = tuple((field, value) for field, value in self.config if field.startswith("llama."))
        return Setup(self.variant, adaptive=False, wide=self.wide, config=config)

    def command(self, *command: str) -> list[str]:
        return ["experiments.patches", *command] if self.patches else list(command)


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

    def is_done(self, name: str) -> bool:
        path = self.out / f"{name}.run.json"
        return path.exists() and read_json(path).get("done", False)

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

    def run_setups(self, setups: Iterable[Setup]) -> None:
        """Makes all runs of all seeds, as run_parallel does. Earlier setups run first."""
        setups = list(setups)
        by_language = {setup.language: setup for setup in setups}
        # A single stage only needs the start of stage 1; another setup may need the run as well.
        by_stage1 = {setup.stage1: setup for setup in sorted(setups, key=lambda setup: not setup.end_to_end)}
        by_stage2 = {setup.stage2: setup for setup in setups if setup.data != "none"}
        self.run_parallel([partial(self.make_world, seed) for seed in self.seeds])
        for step, chosen in (
            (self.train_language, by_language),
            (self.train_stage1, by_stage1),
            (self.train_stage2, by_stage2),
        ):
            self.run_parallel([partial(step, setup, seed) for setup in chosen.values() for seed in self.seeds])

    def train(
        self,
        command: list[str],
        name: str,
        n_step: int,
        *flags: str,
        common: list[str] = COMMON,
        n_point: int = N_POINT,
    ) -> None:
        """Runs a stage. n_point: number of its checkpoints."""
        n_step = max(1, round(n_step * self.scale))
        steps = ["--steps", str(n_step), "--save-every", str(max(1, n_step // n_point))]
        self.run_once(name, *command, *common, *steps, *flags, "--out", name, "--resume")
        shutil.rmtree(self.out / name / "checkpoints", ignore_errors=True)  # each is three times the model's size

    def make_world(self, seed: int) -> None:
        name = f"seed{seed}/world"
        self.run_once(name, "data.shapes.prepare", "--out", name, "--images", str(self.n_image), "--seed", str(seed))

    def start(self, name: str, seed: int, model: Callable[[], Owl]) -> list[str]:
        """Flags that start a run from this model, which is made unless the run is done."""
        folder = self.out / f"{name}-start"
        with self.locks.setdefault("start", threading.Lock()):  # one lock for all: torch's generator is shared
            is_made = (folder / "model.safetensors.index.json").exists()  # save_model writes it last
            if not is_made and not self.is_done(name):
                torch.manual_seed(seed)
                save_model(model(), folder)
        return ["--weights", f"{name}-start", "--seed", str(seed)]

    def train_language(self, setup: Setup, seed: int) -> None:
        """Trains a language model on text in the prompt format of a variant. The rest of the model is not used."""
        name, world = f"seed{seed}/{setup.language}", f"seed{seed}/world"

        def random_model() -> Owl:
            model = init_weights(create_model(setup.plain))
            model.tokenizer_folder = self.out / world
            return model

        flags = [*self.start(name, seed, random_model), *VIT["frozen"], *LANGUAGE, "--lora-rank", "0"]
        data = ["--data", f"{world}/stage0.json", "--val", f"{world}/text_val.json"]
        self.train(["train_stage2"], name, N_STEP_LANGUAGE, *flags, *data)

    def train_stage1(self, setup: Setup, seed: int) -> None:
        name = f"seed{seed}/{setup.stage1}"
        flags = self.start(name, seed, lambda: initial_model(self.out / f"seed{seed}/{setup.language}", setup, seed))
        if setup.end_to_end:
            return
        flags += ["--image-size", str(setup.image_size), *VIT[setup.vit], *STAGE1]
        flags += ["--data", f"seed{seed}/world/captions.json"]
        command = setup.command("experiments.score", f"seed{seed}/world", "train_stage1")
        self.train(command, name, N_STEP_1, *flags, n_point=2)

    def train_stage2(self, setup: Setup, seed: int) -> None:
        name, start = f"seed{seed}/{setup.stage2}", f"seed{seed}/{setup.stage1}"
        mix = [f"seed{seed}/world/{source}" for source in DATA[setup.data]]
        flags = ["--weights", start + ("-start" if setup.end_to_end else ""), "--mix", *mix, "--seed", str(seed)]
        flags += ["--image-size", str(setup.image_size), *STAGE2]
        flags += LORA if setup.lora else ["--lora-rank", "0", *VIT[setup.vit]]
        flags += [word for pair in setup.recipe for word in pair]
        n_step = N_STEP_2 + (N_STEP_1 if setup.end_to_end else 0)
        command = setup.command("experiments.score", f"seed{seed}/world", "train_stage2")
        self.train(command, name, n_step, *flags)

    def scores(self, setup: Setup, seed: int) -> dict[int, dict]:
        """By step, the scores of a run that experiments.score wrote."""
        scores = read_json(self.out / f"seed{seed}/{setup.stage2}.scores.json")
        return {int(step): tests for step, tests in scores.items()}


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
    config.vit = read_config(ROOT / "checkpoints" / ENCODERS[setup.encoder]).vit
    config.llama.vocab_size, config.llama.n_embd = VOCAB_SIZE, N_EMBD
    config.llama.n_head = config.llama.n_kv_head = N_HEAD
    config.llama.n_mlp = N_MLP_WIDE if setup.wide else N_MLP
    config.llama.adaptive &= setup.adaptive
    config.abstractor.n_query = setup.n_query
    for field, value in setup.config:
        part, name = field.split(".")
        setattr(getattr(config, part), name, value)
    config.abstractor.n_out = config.llama.n_embd
    resize(config, setup.image_size)
    model = Owl(config)
    if setup.patches:
        model.abstractor = Patches(config.abstractor)
    return model


def initial_model(language: Path, setup: Setup, seed: int) -> Owl:
    """The trained language model and vision encoder with a random abstractor, for 64 pixels.

    The visual half of the modality-adaptive module is a copy of the text half, as tools.train_language leaves it. The
    language model is rounded to bfloat16, in which a GPU keeps frozen weights: so stage 1 leaves it as it is.
    """
    model = create_model(replace(setup, image_size=64))
    torch.manual_seed(seed)
    init_weights(model.abstractor)
    text_model = load_model(language)
    text = text_model.llama.bfloat16().float().state_dict()
    # Both "norm.multiway.0.weight" and "norm.multiway.1.weight" are "norm.weight" of the language model.
    state = {key: text[re.sub(r"\.multiway\.\d", "", key)] for key in model.llama.state_dict()}
    model.llama.load_state_dict(state)
    model.vit.load_state_dict(load_model(ROOT / "checkpoints" / ENCODERS[setup.encoder]).vit.state_dict())
    model.tokenizer_folder = text_model.tokenizer_folder
    return model


# --- the command line ---------------------------------------------------------------------------------


def make_parser(doc: str) -> ArgumentParser:
    """A parser with the flags that all experiments have."""
    p = ArgumentParser(prog=f"python -m experiments.{Path(sys.argv[0]).stem}", description=doc)
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "experiments", help="folder (default: %(default)s)")
    p.add_argument("--seeds", type=positive_int, default=5, metavar="N", help="1 to N (default: %(default)s)")
    p.add_argument("--jobs", type=positive_int, default=os.cpu_count(), help="parallel runs (default: the cores)")
    p.add_argument("--images", type=positive_int, default=4000, metavar="N", help="per seed (default: %(default)s)")
    p.add_argument("--scale", type=positive_float, default=1.0, help="factor of all steps (default: 1)")
    return p


@contextmanager
def experiment(args: argparse.Namespace) -> Iterator[Lab]:
    """The lab of an experiment's command line. On SIGTERM or Ctrl-C stops all runs and exits with 128 + signal."""
    args.out = args.out.resolve()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with user_errors():
        try:
            yield Lab(args)
        except KeyboardInterrupt as interrupt:
            log("stopped; the same command continues from here")
            sys.exit(128 + interrupt.args[0])
