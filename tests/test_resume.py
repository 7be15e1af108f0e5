"""Runs that are stopped or killed at any moment and then resumed give the same result, to the bit."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from runs import HEAVY, in_processes
from test_checkpoint import flip
from test_train import (  # noqa: F401
    QUICK,
    SPEED,
    assert_close_runs,
    assert_same_weights,
    exit_code,
    lines_of,
    mixed,
    same_threads,
    refusal,
    run_stage,
    start,
    talk,
    timeless,
    weights_of,
    write_rows,
)
from training import checkpoint
from training.distributed import Dist

ALONE = Dist(0, 1, torch.device("cpu"), torch.float32)
N_STEP = 12
STOP = 6  # a run is stopped after this step, at which it would not have saved
RUN = ("--steps", N_STEP, "--batch", 4, "--micro-batch", 2, "--save-every", 4, "--val-every", 4, "--crop-scale", 0.5)
RUN = (*RUN, *QUICK)
RANDOM = ("--workers", 1, "--lora-dropout", 0.3)  # and the dropout of the abstractor


def run_until(step: int, ranks: tuple[int, ...], flags: tuple) -> None:
    """Runs stage 2 and sends SIGTERM to these ranks in that step."""
    rate = train.learning_rate

    def rate_and_signal(now: int, recipe: object) -> float:
        if now == step and int(os.environ.get("RANK", 0)) in ranks:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(now, recipe)

    train.learning_rate = rate_and_signal
    try:
        assert exit_code("train_stage2", *flags) == 128 + signal.SIGTERM
    finally:
        train.learning_rate = rate


def resume(flags: tuple, out: Path) -> None:
    run_stage("train_stage2", *flags, "--out", out, "--resume")


def expected_steps() -> list[tuple[int, str]]:
    """The lines that metrics.jsonl should have: one per step and one per validation."""
    lines = []
    for step in range(1, N_STEP + 1):
        lines += [(step, "loss")] + [(step, "val_loss")] * (step % 4 == 0)
    return lines


def steps_of(out: Path) -> list[tuple[int, str]]:
    return [(line["step"], "loss" if "loss" in line else "val_loss") for line in lines_of(out)]


def checkpoints_of(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in reversed(checkpoint.newest_first(out / "checkpoints"))]


def state_of(out: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(the manifest without the files, the tensors) of a run's newest checkpoint."""
    path, manifest = checkpoint.find(out / "checkpoints", ALONE)
    described = pickle.loads((path / ".metadata").read_bytes()).state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    checkpoint.load(path, manifest, tensors)
    del manifest["files"]
    return manifest, tensors


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics (except speed), final weights, adapter and training state are bit-equal."""
    assert timeless(a) == timeless(b)
    assert steps_of(a) == expected_steps()
    assert_same_weights(weights_of(a), weights_of(b))
    assert weights_of(a)
    adapters = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (a, b)]
    assert_same_weights(*adapters)
    (manifest, state), (other_manifest, other_state) = state_of(a), state_of(b)
    assert manifest == other_manifest
    assert_same_weights(state, other_state)


@pytest.fixture(scope="module")
def randomized(start, mixed, tmp_path_factory):  # noqa: F811
    """(the flags without --out, the folder) of a complete run with accumulation, dropout, crops and a worker."""
    flags = ("--weights", start("owl1", 0.1), "--data", mixed, "--val", mixed, *RUN, *RANDOM)
    out = tmp_path_factory.mktemp("randomized") / "out"
    run_stage("train_stage2", *flags, "--out", out)
    return flags, out


@pytest.fixture(scope="module")
def stopped_run(randomized, tmp_path_factory):
    """A run with the same flags that was stopped in the middle."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    run_until(STOP, (0,), (*randomized[0], "--out", out))
    assert checkpoints_of(out) == [4, STOP]
    return out


@pytest.fixture
def stopped(stopped_run, tmp_path):
    return Path(shutil.copytree(stopped_run, tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------
# Stopped by a signal


def test_a_stopped_and_resumed_run_is_the_same(randomized, stopped):
    flags, whole = randomized
    before = lines_of(stopped)
    assert steps_of(stopped) == [line for line in expected_steps() if line[0] <= STOP]
    assert not (stopped / "config.json").exists()
    resume(flags, stopped)
    assert lines_of(stopped)[: len(before)] == before
    assert_same_run(stopped, whole)
    assert checkpoints_of(stopped) == [8, 12]


def slow_stage(*flags: object) -> None:
    """Stage 2, slowed down in each step and in writing a checkpoint, so that it can be killed in either."""
    rate, checksum = train.learning_rate, checkpoint.checksum

    def slow_rate(step: int, recipe: object) -> float:
        time.sleep(0.1)
        return rate(step, recipe)

    def slow_checksum(path: Path) -> str:
        if path.parent.suffix == ".part":
            time.sleep(0.1)
        return checksum(path)

    train.learning_rate, checkpoint.checksum = slow_rate, slow_checksum
    run_stage("train_stage2", *flags)


def failing_stage(*flags: object) -> None:
    """Stage 2, which fails in its third step."""
    rate = train.learning_rate
    train.learning_rate = lambda step, recipe: rate(step, recipe) if step < 3 else 1 / 0
    run_stage("train_stage2", *flags)


PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run_alone(err: Path, function: Callable, flags: tuple, launcher: tuple) -> None:
    """In a new process: leads a process group, writes stderr to a file, and calls function(*flags).

    With a launcher, as a script, whose end runs the exit handlers too; a forked process starts faster.
    """
    os.setsid()
    with err.open("w") as file:
        os.dup2(file.fileno(), 2)
    if launcher:
        script = err.with_suffix(".py")
        script.write_text(f"import sys\nsys.path[:0] = {sys.path!r}\nimport test_resume\n")
        with script.open("a") as file:
            file.write(f"test_resume.{function.__name__}(*sys.argv[1:])\n")
        os.execv(sys.executable, [*launcher, str(script), *map(str, flags)])
    function(*flags)


def start_process(
    folder: Path, function: Callable, *flags: object, launcher: tuple[str, ...] = ()
) -> tuple[multiprocessing.Process, Path]:
    """Starts function(*flags) in a process group of its own. Returns the process and the file of its stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    err = folder / f"stderr-{time.monotonic_ns()}"
    process = context.Process(target=run_alone, args=(err, function, flags, launcher))
    process.start()
    return process, err


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it has just ended
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process, err: Path) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.is_alive(), f"ended too early: {err.read_text()}"
        time.sleep(0.01)
    raise AssertionError("timed out")


def n_lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_sigterm_and_ctrl_c_save_and_exit(randomized, tmp_path):
    """The signals reach the data-loading processes too."""
    flags, whole = randomized
    runs = {}
    for kind in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / kind.name
        runs[out] = kind, *start_process(tmp_path, slow_stage, *flags, "--out", out, launcher=PYTHON)
    for out, (kind, process, err) in runs.items():
        wait_for(lambda: n_lines(out) >= 3, process, err)
        os.killpg(process.pid, kind)
    for out, (kind, process, err) in runs.items():
        process.join(timeout=60)
        printed = err.read_text()
        assert process.exitcode == 128 + kind and "Traceback" not in printed, printed
        assert not (out / "config.json").exists()
        step = checkpoints_of(out)[-1]
        assert 3 <= step < N_STEP
        assert f"stopped after step {step}" in printed and "--resume" in printed
        assert lines_of(out)[-1]["step"] == step  # no step is lost
        resume(flags, out)
        assert_same_run(out, whole)


def test_resuming_a_finished_run_is_harmless(randomized, tmp_path):
    flags, whole = randomized
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    resume(flags, out)
    assert_same_run(out, whole)
    assert lines_of(out) == lines_of(whole)


def test_resume_without_a_checkpoint_starts_from_the_beginning(randomized, tmp_path):
    flags, whole = randomized
    out = tmp_path / "out"
    (out / "checkpoints" / "step-00000004.part").mkdir(parents=True)
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')
    resume(flags, out)
    assert_same_run(out, whole)
    assert not (out / "checkpoints" / "step-00000004.part").exists()


@pytest.mark.parametrize(
    "setting, value",
    [
        ("lr", ("2e-3",)),
        ("steps", ("11",)),  # more steps continue the run: test_export.py
        ("betas", ("0.8", "0.9")),
        ("seed", ("1",)),
        ("fit", ("pad",)),
        ("merge_images", ()),
        ("lora_rank", ("4",)),
        ("train_abstractor", ()),
        ("precision", ("bf16",)),
    ],
)
def test_resuming_with_other_settings_is_refused(randomized, capsys, setting, value):
    """Each would change the run silently. The message names the setting."""
    flags, whole = randomized
    before = (whole / "metrics.jsonl").read_text()
    change = ("--" + setting.replace("_", "-"), *value)
    error = refusal(capsys, "train_stage2", *flags, "--out", whole, "--resume", *change)
    assert "step-00000012" in error and setting in error
    assert (whole / "metrics.jsonl").read_text() == before


def test_data_may_move_but_not_change(start, tmp_path, capsys):
    """A checkpoint from before there were fingerprints compares the number of rows."""
    data, out = tmp_path / "data.json", tmp_path / "out"
    rows = [{"conversations": talk("a", "b")}] * 4
    flags = ("--weights", start("owl1"), "--steps", 1, "--batch", 2, "--micro-batch", 2, *QUICK, "--out", out)
    run_stage("train_stage2", *flags, "--data", write_rows(data, rows))
    moved = tmp_path / "moved" / "other.json"
    edited = write_rows(tmp_path / "edited.json", [*rows[1:], {"caption": "c"}])
    longer = write_rows(tmp_path / "longer.json", [*rows, rows[0]])
    moved.parent.mkdir()
    data.replace(moved)
    flags = (*flags, "--resume", "--data")
    run_stage("train_stage2", *flags, moved)
    capsys.readouterr()
    assert "content" in refusal(capsys, "train_stage2", *flags, edited)
    assert "samples" in refusal(capsys, "train_stage2", *flags, longer)

    (path,) = checkpoint.newest_first(out / "checkpoints")
    manifest = checkpoint.read_manifest(path)
    for name in ("content", "shares"):
        del manifest["facts"]["settings"][name]
    manifest["facts"]["settings"] |= {"data": "data.json", "mix": None, "image_root": None}
    (path / checkpoint.MANIFEST).write_bytes(checkpoint.encode_manifest(manifest))
    assert "samples" in refusal(capsys, "train_stage2", *flags, longer)
    run_stage("train_stage2", *flags, edited)


def test_a_folder_that_holds_a_run_is_not_overwritten(randomized, capsys):
    flags, whole = randomized
    error = refusal(capsys, "train_stage2", *flags, "--out", whole)
    assert str(whole) in error and "--resume" in error


# ----------------------------------------------------------------------------------------------------
# Damaged


def corrupt(path: Path) -> None:
    path.write_bytes(flip(path.read_bytes()))


def test_a_corrupt_checkpoint_is_skipped_for_the_one_before(randomized, stopped, capsys):
    flags, whole = randomized
    newest = stopped / "checkpoints" / f"step-{STOP:08d}"
    corrupt(newest / "__0_0.distcp")
    resume(flags, stopped)
    err = capsys.readouterr().err
    warnings = [line for line in err.splitlines() if line.startswith("warning: the checkpoint")]
    assert len(warnings) == 1 and str(newest) in warnings[0]
    assert_same_run(stopped, whole)


def test_if_all_checkpoints_are_corrupt_nothing_changes(randomized, stopped, capsys):
    flags, _ = randomized
    before = (stopped / "metrics.jsonl").read_bytes()
    for path in checkpoint.newest_first(stopped / "checkpoints"):
        corrupt(path / "__0_0.distcp")
    for more in (("--resume",), ()):
        assert exit_code("train_stage2", *flags, "--out", stopped, *more) == 2
        *warnings, error = capsys.readouterr().err.strip().splitlines()
        assert len(warnings) == 2 and all(line.startswith("warning: ") for line in warnings)
        assert error.startswith("error: ") and str(stopped / "checkpoints") in error
    assert (stopped / "metrics.jsonl").read_bytes() == before
    assert checkpoints_of(stopped) == [4, STOP]


def append(out: Path, text: str) -> None:
    with (out / "metrics.jsonl").open("a") as file:
        file.write(text)


LINES = '{"step": 7, "loss": 7.0}\n{"step": 8, "lo'


@pytest.mark.parametrize("text", [LINES, "\0\0\0\0", "7"], ids=["steps", "zeros", "a number"])
def test_what_a_kill_leaves_behind_does_not_matter(randomized, stopped, text):
    flags, whole = randomized
    append(stopped, text)
    part = Path(shutil.copytree(stopped / "checkpoints" / "step-00000004", stopped / "checkpoints/step-00000008.part"))
    (part / "manifest.json").unlink()
    (part / "__0_0.distcp").write_bytes(b"half")
    (stopped / "metrics.jsonl.part").write_text('{"step": 1, "lo')
    resume(flags, stopped)
    assert_same_run(stopped, whole)
    assert not list(stopped.rglob("*.part"))


class Killed(BaseException):
    """Like a kill, no handler catches it."""


def test_a_kill_while_the_metrics_are_rewritten_loses_nothing(randomized, stopped, monkeypatch):
    flags, whole = randomized
    append(stopped, LINES)  # which resuming removes
    before = (stopped / "metrics.jsonl").read_bytes()
    write_text = Path.write_text

    def write_half(path: Path, text: str, *args: object, **kwargs: object) -> None:
        write_text(path, text[: len(text) // 2], *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(Killed):
            resume((*flags, "--workers", 0), stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    resume(flags, stopped)
    assert_same_run(stopped, whole)


# ----------------------------------------------------------------------------------------------------
# On other numbers of processes


def test_from_one_process_to_two_and_back(start, mixed, tmp_path):  # noqa: F811
    """One process until step 3, two with FSDP until 6, two with DDP until 9, then one with FSDP.

    The micro-batches change too. Without dropout, the result does not depend on how a batch is split.
    """
    flags = ("--weights", start("owl2"), "--data", mixed, "--val", mixed, *RUN)
    run_stage("train_stage2", *flags, "--out", tmp_path / "whole")
    out = tmp_path / "out"
    alone = (*flags, "--out", out, "--resume")
    run_until(3, (0,), alone)
    in_processes(2, tmp_path, run_until, 6, (1,), (*alone, "--micro-batch", 1, "--parallel", "fsdp"))
    assert checkpoints_of(out) == [4, 6]
    in_processes(2, tmp_path, run_until, 9, (1,), (*alone, "--micro-batch", 2, "--parallel", "ddp"))
    assert checkpoints_of(out) == [8, 9]
    resume((*flags, "--micro-batch", 4, "--parallel", "fsdp", "--recompute", "--workers", 1), out)
    assert_close_runs(out, tmp_path / "whole")
    assert steps_of(out) == expected_steps()


@pytest.fixture(scope="module")
def sharded(randomized, tmp_path_factory):
    """(the flags without --out, the folder) of a run with dropout and crops, sharded over two processes."""
    flags = (*randomized[0], "--micro-batch", 1, "--workers", 0, "--parallel", "fsdp")
    folder = tmp_path_factory.mktemp("sharded")
    in_processes(2, folder, run_stage, "train_stage2", *flags, "--out", folder / "out")
    return flags, folder / "out"


def test_two_stopped_and_resumed_processes_are_the_same_run(sharded, tmp_path):
    """A scheduler sends SIGTERM to both."""
    flags, whole = sharded
    out = tmp_path / "out"
    in_processes(2, tmp_path, run_until, STOP, (0, 1), (*flags, "--out", out))
    assert checkpoints_of(out) == [4, STOP]
    in_processes(2, tmp_path, resume, flags, out)
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchrun", "all"])
def test_sigterm_to_torchrun(sharded, tmp_path, target):
    """`kill` sends it to torchrun, which forwards it; a scheduler to all processes, so the ranks get it twice."""
    flags, whole = sharded
    out = tmp_path / "out"
    process, err = start_process(tmp_path, slow_stage, *flags, "--out", out, launcher=TORCHRUN)
    try:
        wait_for(lambda: n_lines(out) >= 3, process, err)
        signal_all([process.pid] if target == "torchrun" else family(process.pid), signal.SIGTERM)
        process.join(timeout=60)
    finally:
        signal_all(family(process.pid), signal.SIGKILL)
    printed = err.read_text()
    step = checkpoints_of(out)[-1] if checkpoints_of(out) else 0
    assert 3 <= step < N_STEP and f"stopped after step {step}" in printed, printed
    assert lines_of(out)[-1]["step"] == step
    in_processes(2, tmp_path, resume, flags, out)
    assert_same_run(out, whole)


# ----------------------------------------------------------------------------------------------------
# Killed


def half_written(out: Path) -> set[tuple]:
    """The half-written checkpoints; two of the same name are different. The next save deletes them."""
    states = {path.name: path.stat() for path in out.glob("checkpoints/step-*.part")}
    return {(name, state.st_ino, state.st_mtime_ns) for name, state in states.items()}


def assert_beginning(out: Path, whole: Path) -> None:
    """The metrics are a prefix of those of the complete run, apart from half a line; checkpoints are intact."""
    metrics = out / "metrics.jsonl"
    *lines, rest = metrics.read_text().split("\n") if metrics.exists() else [""]
    curve = [json.loads(line) for line in lines]
    assert [{k: v for k, v in line.items() if k not in SPEED} for line in curve] == timeless(whole)[: len(curve)]
    assert len(rest) < 500
    steps = checkpoints_of(out)
    assert all(checkpoint.find_damage(out / "checkpoints" / f"step-{step:08d}", ALONE) is None for step in steps)
    assert not steps or max(line["step"] for line in curve) >= steps[-1]


def kill_again_and_again(
    run: tuple, out: Path, rng: random.Random, *, n: int, launcher: tuple[str, ...] = ()
) -> tuple[int, int]:
    """Starts a run, kills it within a second after a step, resumes it ..., n times or until it ends before the kill.

    Returns the number of kills, and how many of them interrupted the writing of a checkpoint.
    """
    flags, whole = run
    killed = in_write = 0
    for _ in range(n):
        before, n_before = half_written(out), n_lines(out)
        process, err = start_process(out.parent, slow_stage, *flags, "--out", out, "--resume", launcher=launcher)
        try:
            wait_for(lambda: n_lines(out) > n_before or not process.is_alive(), process, err)
            time.sleep(rng.uniform(0, 1))
        finally:
            signal_all(family(process.pid), signal.SIGKILL)
            process.join()
        printed = err.read_text()
        assert "Traceback" not in printed and "error" not in printed, printed
        if process.exitcode == 0:  # it ended before the signal
            break
        assert process.exitcode == -signal.SIGKILL, printed
        killed += 1
        in_write += not half_written(out) <= before
        assert_beginning(out, whole)
    return killed, in_write


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_the_same_run_bit_for_bit(randomized, tmp_path, n):
    """At random moments; of 20 kills, a few while a checkpoint is written."""
    flags, whole = randomized
    killed = in_write = 0
    for i in range(n):
        out = tmp_path / f"out-{i}"
        saving = (*flags, "--save-every", 1 + i % 2, "--keep", 1 + i % 3)
        now, now_in_write = kill_again_and_again((saving, whole), out, random.Random(i), n=min(4, n - killed))
        killed += now
        in_write += now_in_write
        resume(flags, out)
        assert_same_run(out, whole)
        if killed == n:
            break
    assert killed == n and (n == 3 or in_write >= 3)


@pytest.mark.slow
def test_two_processes_killed(sharded, tmp_path):
    """All at once, as in a power failure."""
    flags, whole = sharded
    out = tmp_path / "out"
    saving = ((*flags, "--save-every", 1), whole)
    killed, _ = kill_again_and_again(saving, out, random.Random(0), n=5, launcher=TORCHRUN)
    assert killed >= 3
    in_processes(2, tmp_path, resume, flags, out)
    assert_same_run(out, whole)


def test_after_an_error_no_loading_process_blocks_the_exit(start, mixed, tmp_path):  # noqa: F811
    """They ignore SIGTERM, by which Python ends them at exit."""
    flags = ("--weights", start("owl1"), "--data", mixed, *RUN, "--workers", 2, "--out", tmp_path / "out")
    process, err = start_process(tmp_path, failing_stage, *flags, launcher=PYTHON)
    process.join(timeout=60)
    assert process.exitcode == 1 and "ZeroDivisionError" in err.read_text()
