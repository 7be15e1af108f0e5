"""Runs that are stopped, or killed at any moment, and go on: as if nothing had happened, to the bit."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train
from conftest import ROOT
from parallel import Place
from runs import in_processes
from test_checkpoint import FILES, flip
from test_train import (  # noqa: F401
    QUICK,
    SPEED,
    assert_same_weights,
    lines_of,
    losses_of,
    mixed,
    one_thread,
    refusal,
    run_stage,
    start,
    talk,
    timeless,
    weights_of,
    write_rows,
)

ALONE = Place(0, 1, torch.device("cpu"), torch.float32)
N_STEP = 12
STOP = 6  # the step that a run is stopped after: none at which it would have saved anyway
RUN = ("--steps", N_STEP, "--batch", 4, "--micro", 2, "--save-every", 4, "--val-every", 4, "--crop-scale", 0.5, *QUICK)
CHANCE = ("--workers", 1, "--lora-dropout", 0.3)  # and the start's dropout in the abstractor

# The stage, but a step takes a while, and so does writing a checkpoint: time enough to be killed in the middle.
SLOW_STAGE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import checkpoint, train, train_stage2
rate, digest = train.learning_rate, checkpoint.digest
def slow_rate(step, recipe):
    time.sleep(0.1)
    return rate(step, recipe)
def slow_digest(path):
    if path.parent.suffix == ".part":
        time.sleep(0.1)
    return digest(path)
train.learning_rate, checkpoint.digest = slow_rate, slow_digest
train_stage2.main()
"""


def run_until(step: int, rank: int, flags: tuple) -> None:
    """Runs stage 2, with a SIGTERM that reaches one rank in that step."""
    rate = train.learning_rate

    def rate_and_signal(now: int, recipe: train.Recipe) -> float:
        if now == step - 1 and rank == int(os.environ.get("RANK", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(now, recipe)

    train.learning_rate = rate_and_signal
    try:
        with pytest.raises(SystemExit) as stop:
            run_stage("train_stage2", *flags)
        assert stop.value.code == 128 + signal.SIGTERM
    finally:
        train.learning_rate = rate


def resume(flags: tuple, out: Path) -> None:
    run_stage("train_stage2", *flags, "--out", out, "--resume")


def expected_steps() -> list[tuple[int, str]]:
    """What metrics.jsonl should have: a line for each step, and one for each validation."""
    lines = []
    for step in range(1, N_STEP + 1):
        lines += [(step, "loss")] + [(step, "val_loss")] * (step % 4 == 0)
    return lines


def steps_of(out: Path) -> list[tuple[int, str]]:
    return [(line["step"], "loss" if "loss" in line else "val_loss") for line in lines_of(out)]


def checkpoints_of(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in reversed(checkpoint.newest_first(out / "checkpoints"))]


def state_of(out: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(the manifest but for the files, the tensors) of a run's newest checkpoint."""
    path, manifest = checkpoint.find(out / "checkpoints", ALONE)
    described = pickle.loads((path / ".metadata").read_bytes()).state_dict_metadata
    tensors = {name: torch.zeros(one.size, dtype=one.properties.dtype) for name, one in described.items()}
    checkpoint.load(path, manifest, tensors)
    del manifest["files"]
    return manifest, tensors


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics (but the speed), final weights, adapter, and the optimizer's state, bit for bit."""
    assert timeless(a) == timeless(b)
    assert steps_of(a) == expected_steps()
    assert_same_weights(weights_of(a), weights_of(b))
    assert weights_of(a)
    adapters = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (a, b)]
    assert_same_weights(*adapters)
    (facts, state), (other_facts, other_state) = state_of(a), state_of(b)
    assert facts == other_facts
    assert_same_weights(state, other_state)


def assert_close_run(a: Path, b: Path) -> None:
    """The same but for rounding: losses to 1e-5, gradient norms, and the weights."""
    assert steps_of(a) == steps_of(b) == expected_steps()
    for one, other in zip(timeless(a), timeless(b)):
        for name, tolerance in (("loss", {"abs": 1e-5}), ("val_loss", {"abs": 1e-5}), ("norm", {"rel": 1e-4})):
            if name in one:
                assert one[name] == pytest.approx(other[name], **tolerance), (one["step"], name)
    assert len(set(losses_of(a))) == N_STEP
    before, after = weights_of(a), weights_of(b)
    assert before.keys() == after.keys() and before
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def chancy(start, mixed, tmp_path_factory):  # noqa: F811
    """(the flags but --out, the folder) of a run with accumulation, dropout, crops and a worker."""
    torch.set_num_threads(1)
    flags = ("--weights", start("owl1", 0.1), "--data", mixed, "--val", mixed, *RUN, *CHANCE)
    out = tmp_path_factory.mktemp("chancy") / "out"
    run_stage("train_stage2", *flags, "--out", out)
    return flags, out


@pytest.fixture(scope="module")
def stopped_run(chancy, tmp_path_factory):
    """A run of the same flags that was asked to stop in the middle."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("stopped") / "out"
    run_until(STOP, 0, (*chancy[0], "--out", out))
    assert checkpoints_of(out) == [4, STOP]
    return out


@pytest.fixture
def stopped(stopped_run, tmp_path):
    return Path(shutil.copytree(stopped_run, tmp_path / "out"))


@pytest.fixture(scope="module")
def steady(start, mixed, tmp_path_factory):  # noqa: F811
    """(the flags but --out, the folder) of a run of all of an Owl2, where nothing hangs on how it is cut up."""
    torch.set_num_threads(1)
    flags = ("--weights", start("owl2"), "--data", mixed, "--val", mixed, *RUN)
    out = tmp_path_factory.mktemp("steady") / "out"
    run_stage("train_stage2", *flags, "--out", out)
    return flags, out


# ----------------------------------------------------------------------------------------------------
# Stopped


def test_stopped_and_resumed_is_the_same_run(chancy, stopped):
    flags, whole = chancy
    before = lines_of(stopped)
    assert steps_of(stopped) == [line for line in expected_steps() if line[0] <= STOP]
    assert not (stopped / "config.json").exists()  # no model: the run has not ended
    resume(flags, stopped)
    assert lines_of(stopped)[: len(before)] == before  # and not written again
    assert_same_run(stopped, whole)
    assert checkpoints_of(stopped) == [8, 12]


def start_process(script: Path, *flags: object, torchrun: int = 0) -> tuple[subprocess.Popen, Path]:
    """(process, what it writes to stderr) of a script started as a user does, in a process group of its own."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    err = script.with_name(f"stderr-{len(list(script.parent.iterdir()))}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with err.open("w") as file:
        process = subprocess.Popen(
            [*command, str(script), *map(str, flags)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )
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
    for one in found:
        found += children.get(one, [])
    return found


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def wait_for(condition, process: subprocess.Popen, err: Path, what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, f"ended before {what}: {err.read_text()}"
        time.sleep(0.01)
    raise AssertionError(f"waited in vain for {what}")


def n_lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script" / "slow_stage2.py"
    path.parent.mkdir()
    path.write_text(SLOW_STAGE)
    return path


def test_sigterm_and_ctrl_c_save_and_leave(chancy, script, tmp_path):
    """They reach the loading processes too."""
    flags, whole = chancy
    runs = {}
    for kind in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / kind.name
        runs[out] = kind, *start_process(script, *flags, "--out", out)
    for out, (kind, process, err) in runs.items():
        wait_for(lambda: n_lines(out) >= 3, process, err, "step 3")
        os.killpg(process.pid, kind)
    for out, (kind, process, err) in runs.items():
        process.wait(timeout=60)
        said = err.read_text()
        assert process.returncode == 128 + kind and "Traceback" not in said, said
        assert not (out / "config.json").exists()
        step = checkpoints_of(out)[-1]
        assert 3 <= step < N_STEP
        assert f"stopped after step {step}" in said and "--resume" in said
        assert lines_of(out)[-1]["step"] == step  # it lost nothing
        resume(flags, out)
        assert_same_run(out, whole)


def test_resuming_a_finished_run_is_harmless(chancy, tmp_path):
    flags, whole = chancy
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    resume(flags, out)
    assert_same_run(out, whole)
    assert lines_of(out) == lines_of(whole)


def test_resume_without_a_checkpoint_starts_from_the_beginning(chancy, tmp_path):
    flags, whole = chancy
    out = tmp_path / "out"
    (out / "checkpoints" / "step-00000004.part").mkdir(parents=True)
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')
    resume(flags, out)
    assert_same_run(out, whole)
    assert not (out / "checkpoints" / "step-00000004.part").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (("--lr", "2e-3"), "lr"),
        (("--steps", "13"), "steps"),
        (("--batch", "8"), "batch"),
        (("--seed", "1"), "seed"),
        (("--crop-scale", "0.6"), "crop_scale"),
        (("--betas", "0.8", "0.9"), "betas"),
        (("--lora-rank", "4"), "lora_rank"),
        (("--lora-alpha", "16"), "lora_alpha"),
        (("--lora-dropout", "0.1"), "lora_dropout"),
        (("--fit", "pad"), "fit"),
        (("--merge-images",), "merge_images"),
        (("--train-abstractor",), "train_abstractor"),
        (("--precision", "bf16"), "precision"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_resuming_with_other_settings_is_refused(chancy, capsys, change, words):
    """Each would make another run of it, in silence; the sentence names what differs."""
    flags, whole = chancy
    before = (whole / "metrics.jsonl").read_text()
    error = refusal(capsys, "train_stage2", *flags, "--out", whole, "--resume", *change)
    assert "step-00000012" in error and words in error
    assert (whole / "metrics.jsonl").read_text() == before


def test_resuming_with_more_data_is_refused(start, tmp_path, capsys):
    """The same file, but longer: it would be shuffled otherwise."""
    data, out = tmp_path / "data.json", tmp_path / "out"
    rows = [{"conversations": talk("a", "b")}] * 4
    flags = ("--weights", start("owl1"), "--data", data, "--steps", 1, "--batch", 2, "--micro", 2, *QUICK, "--out", out)
    run_stage("train_stage2", *flags[:2], "--data", write_rows(data, rows), *flags[4:])
    capsys.readouterr()
    write_rows(data, [*rows, rows[0]])
    assert "samples: [4] then, [5] now" in refusal(capsys, "train_stage2", *flags, "--resume")


def test_a_folder_that_holds_a_run_is_not_overwritten(chancy, capsys):
    flags, whole = chancy
    error = refusal(capsys, "train_stage2", *flags, "--out", whole)
    assert str(whole) in error and "--resume" in error


# ----------------------------------------------------------------------------------------------------
# Damaged


@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(chancy, stopped, capsys, name):
    flags, whole = chancy
    newest = stopped / "checkpoints" / f"step-{STOP:08d}"
    flip(newest / name)
    resume(flags, stopped)
    err = capsys.readouterr().err
    warnings = [line for line in err.splitlines() if line.startswith("warning: the checkpoint")]
    assert len(warnings) == 1 and str(newest) in warnings[0] and name in warnings[0]
    assert_same_run(stopped, whole)


def test_where_all_checkpoints_are_corrupt_nothing_is_touched(chancy, stopped, capsys):
    flags, _ = chancy
    before = (stopped / "metrics.jsonl").read_bytes()
    for path in checkpoint.newest_first(stopped / "checkpoints"):
        flip(path / "__0_0.distcp")
    for more in (("--resume",), ()):
        with pytest.raises(SystemExit) as stop:
            run_stage("train_stage2", *flags, "--out", stopped, *more)
        assert stop.value.code == 2
        *warnings, error = capsys.readouterr().err.strip().splitlines()
        assert len(warnings) == 2 and all(line.startswith("warning: ") for line in warnings)
        assert error.startswith("error: ") and str(stopped / "checkpoints") in error
    assert (stopped / "metrics.jsonl").read_bytes() == before
    assert checkpoints_of(stopped) == [4, STOP]


def add(text: str):
    def harm(out: Path) -> None:
        with (out / "metrics.jsonl").open("a") as file:
            file.write(text)

    return harm


def leave_parts(out: Path) -> None:
    shutil.copytree(out / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000008.part")
    (out / "checkpoints" / "step-00000008.part" / "manifest.json").unlink()
    (out / "checkpoints" / "step-00000008.part" / "__0_0.distcp").write_bytes(b"half")
    (out / "metrics.jsonl.part").write_text('{"step": 1, "lo')


@pytest.mark.parametrize(
    "harm",
    [
        add('{"step": 7, "loss": 7.0}\n{"step": 8, "lo'),
        add('{"step": 7, "loss": 7.0}\n{"step": 8, "val_loss": 7.0}\n'),
        add('{"st'),
        add("{"),
        add("\0\0\0\0"),
        add("7"),
        leave_parts,
    ],
    ids=["steps, half a line", "steps", "half a line", "a brace", "zeros", "a number", "parts"],
)
def test_what_a_kill_leaves_behind_does_not_matter(chancy, stopped, harm):
    flags, whole = chancy
    harm(stopped)
    resume(flags, stopped)
    assert_same_run(stopped, whole)
    assert not list(stopped.rglob("*.part"))


class Killed(BaseException):
    """As a kill is: nothing gets to handle it."""


@pytest.mark.parametrize("moment", ["before it is written", "half-written", "before it is named"])
def test_a_kill_while_the_metrics_are_rewritten_loses_nothing(chancy, stopped, monkeypatch, moment):
    flags, whole = chancy
    add('{"step": 7, "loss": 7.0}\n{"step": 8, "lo')(stopped)  # so that there is something to rewrite
    before = (stopped / "metrics.jsonl").read_bytes()
    write_text = Path.write_text

    def write_half(path: Path, text: str, *args: object, **kwargs: object) -> None:
        write_text(path, text[: len(text) // 2 if moment == "half-written" else 0], *args, **kwargs)
        raise Killed

    def die(path: Path, other: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before it is named":
            patch.setattr(Path, "replace", die)
        else:
            patch.setattr(Path, "write_text", write_half)
        with pytest.raises(Killed):
            resume((*flags, "--workers", 0), stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    resume(flags, stopped)
    assert_same_run(stopped, whole)


# ----------------------------------------------------------------------------------------------------
# On other processes


@pytest.mark.parametrize("micro, more", [(1, ()), (4, ("--parallel", "fsdp")), (2, ("--recompute", "--workers", 1))])
def test_resumed_with_another_cut(steady, tmp_path, micro, more):
    flags, whole = steady
    out = tmp_path / "out"
    run_until(STOP, 0, (*flags, "--out", out))
    resume((*flags, "--micro", micro, *more), out)
    assert_close_run(out, whole)


def test_from_one_process_to_two_shards_and_two_copies_and_back(steady, tmp_path):
    """Alone until step 3, sharded over two until 6, copied to two until 9, then alone and sharded, then alone."""
    flags, whole = steady
    out = tmp_path / "out"
    alone = (*flags, "--out", out, "--resume")
    run_until(3, 0, alone)
    in_processes(2, tmp_path, run_until, 6, 1, (*alone, "--micro", 1, "--parallel", "fsdp"))
    assert checkpoints_of(out) == [4, 6]
    in_processes(2, tmp_path, run_until, 9, 1, (*alone, "--micro", 2, "--parallel", "ddp"))
    assert checkpoints_of(out) == [8, 9]
    run_until(10, 0, (*alone, "--parallel", "fsdp"))
    resume(flags, out)
    assert_close_run(out, whole)


@pytest.fixture(scope="module")
def sharded(chancy, tmp_path_factory):
    """(the flags but --out, the folder) of a run with dropout and crops, sharded over two processes."""
    flags = (*chancy[0], "--micro", 1, "--workers", 0, "--parallel", "fsdp")
    folder = tmp_path_factory.mktemp("sharded")
    in_processes(2, folder, run_stage, "train_stage2", *flags, "--out", folder / "out")
    return flags, folder / "out"


@pytest.mark.parametrize("whom", [pytest.param("torchrun", marks=pytest.mark.slow), "all"])
def test_sigterm_to_two_processes(sharded, script, tmp_path, whom):
    """By `kill`, to torchrun alone, which passes it on; by a scheduler, to all at once: the ranks get it twice."""
    flags, whole = sharded
    out = tmp_path / "out"
    process, err = start_process(script, *flags, "--out", out, torchrun=2)
    try:
        wait_for(lambda: n_lines(out) >= 3, process, err, "step 3")
        signal_all([process.pid] if whom == "torchrun" else family(process.pid), signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        signal_all(family(process.pid), signal.SIGKILL)
    said = err.read_text()
    step = checkpoints_of(out)[-1] if checkpoints_of(out) else 0
    assert 3 <= step < N_STEP and f"stopped after step {step}" in said, said
    assert lines_of(out)[-1]["step"] == step
    in_processes(2, tmp_path, resume, flags, out)
    assert_same_run(out, whole)


# ----------------------------------------------------------------------------------------------------
# Killed


def parts_of(out: Path) -> dict[Path, tuple]:
    """Half-written checkpoints, each with what tells it from another of the same name."""
    found = {}
    for path in (out / "checkpoints").glob("step-*.part"):
        status = path.stat()
        found[path] = status.st_ino, status.st_mtime_ns
    return found


def assert_beginning(out: Path, whole: Path) -> None:
    """Whenever it was killed: the curve is a beginning of the whole one, but for half a line; checkpoints are whole."""
    metrics = out / "metrics.jsonl"
    *lines, rest = metrics.read_text().split("\n") if metrics.exists() else [""]
    curve = [json.loads(line) for line in lines]
    assert [{k: v for k, v in line.items() if k not in SPEED} for line in curve] == timeless(whole)[: len(curve)]
    assert len(rest) < 500
    steps = checkpoints_of(out)
    assert all(checkpoint.damage(out / "checkpoints" / f"step-{step:08d}", ALONE) is None for step in steps)
    assert not steps or max(line["step"] for line in curve) >= steps[-1]


def kill_again_and_again(
    run: tuple, script: Path, out: Path, rng: random.Random, n: int, torchrun: int = 0, longest: float = 2.5
) -> tuple[int, int]:
    """Starts a run, kills it within `longest` seconds, resumes it ..., n times or until it ends before it is killed.

    Returns how many kills there were, and how many of them fell into the writing of a checkpoint.
    """
    flags, whole = run
    killed = in_write = 0
    for _ in range(n):
        parts = parts_of(out)
        process, err = start_process(script, *flags, "--out", out, "--resume", torchrun=torchrun)
        try:
            wait_for(lambda: re.search(r"^  all .* trained", err.read_text(), re.M), process, err, "training")
            time.sleep(rng.uniform(0, longest))
        finally:
            everyone = family(process.pid)
            signal_all(everyone, signal.SIGKILL)
            process.wait()
        said = err.read_text()
        assert "Traceback" not in said and "error" not in said, said
        if process.returncode == 0:  # it ended before the signal came, perhaps at that very moment
            break
        assert process.returncode == -signal.SIGKILL, said
        killed += 1
        in_write += any(parts.get(path) != state for path, state in parts_of(out).items())
        assert_beginning(out, whole)
    return killed, in_write


def test_killed_and_resumed_is_the_same_run_bit_for_bit(chancy, script, tmp_path):
    """Three times; see below for more."""
    flags, whole = chancy
    out = tmp_path / "out"
    saving = ((*flags, "--save-every", 1), whole)
    killed, _ = kill_again_and_again(saving, script, out, random.Random(0), 3, longest=1.5)  # before it ends by itself
    assert killed >= 2
    resume(flags, out)
    assert_same_run(out, whole)


@pytest.mark.slow
def test_killed_20_times(chancy, script, tmp_path):
    """At random moments of the wall clock; a few of them while a checkpoint is being written."""
    flags, whole = chancy
    killed = in_write = 0
    for i in range(20):
        if killed >= 20:
            break
        out = tmp_path / f"out-{i}"
        saving = (*flags, "--save-every", 1 + i % 2, "--keep", 1 + i % 3)
        now, now_in_write = kill_again_and_again((saving, whole), script, out, random.Random(i), min(4, 20 - killed))
        killed += now
        in_write += now_in_write
        resume(flags, out)
        assert_same_run(out, whole)
    print(f"{killed} kills, {in_write} of them while a checkpoint was being written")
    assert killed == 20 and in_write >= 3


@pytest.mark.slow
def test_two_processes_killed(sharded, script, tmp_path):
    """All at once, as when the machine goes."""
    flags, whole = sharded
    out = tmp_path / "out"
    saving = ((*flags, "--save-every", 1), whole)
    killed, in_write = kill_again_and_again(saving, script, out, random.Random(0), 5, torchrun=2)
    print(f"{killed} kills, {in_write} of them while a checkpoint was being written")
    assert killed >= 3
    in_processes(2, tmp_path, resume, flags, out)
    assert_same_run(out, whole)


# A run in whose third step something goes wrong.
BROKEN_STAGE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train, train_stage2
rate = train.learning_rate
def no_rate(step, recipe):
    if step == 2:
        raise RuntimeError("this is the test's error")
    return rate(step, recipe)
train.learning_rate = no_rate
train_stage2.main()
"""


def test_after_an_error_nothing_waits_for_the_loading_processes(start, mixed, tmp_path):
    """They ignore SIGTERM, and Python asks by SIGTERM what is left when it ends."""
    flags = ("--weights", start("owl1"), "--data", mixed, *RUN, "--workers", 2, "--out", tmp_path / "out")
    command = [sys.executable, "-c", BROKEN_STAGE, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "this is the test's error" in done.stderr
