"""Training on several processes or with less memory is the same mathematics as training on one.

Both variants in all stages, sharded (fsdp) and replicated (ddp), are compared with one process that trains on the same
batches. The ranks get different work: images or none, many or few supervised tokens.
"""

import ctypes
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import llama
import train
from conftest import GOLDEN, N_THREAD, ROOT, needs_cuda
from data.conversations import collate
from model import Owl
from runs import free_ports, in_processes
from test_train import (
    QUICK,
    assert_close_runs,
    assert_same_weights,
    losses_of,
    mixed,
    same_threads,
    order_of,
    run_stage,
    source,
    start,
    talk,
    timeless,
    weights_of,
    write_rows,
)
from training import parallel
from training.distributed import Dist
from training.parallel import choose_fsdp
from training.presets import PRESETS, init_weights
from weights import save_model

__all__ = ["mixed", "same_threads", "start"]  # fixtures

STEPS = 4
CONFIGURATIONS = {
    "owl1-stage1": ("train_stage1", "owl1", "--crop-scale", 0.5),
    "owl2-stage1": ("train_stage1", "owl2", "--crop-scale", 0.5),
    "owl1-full": ("train_stage2", "owl1", "--lora-rank", 0),
    "owl2-full": ("train_stage2", "owl2", "--val-every", STEPS // 2),
    "owl1-lora": ("train_stage2", "owl1", "--lora-dropout", 0),
    "owl2-lora": ("train_stage2", "owl2", "--lora-rank", 4, "--lora-dropout", 0),
    "owl2-tied": ("train_stage2", "owl2-tied"),
    "owl2-bf16": ("train_stage1", "owl2", "--crop-scale", 0.5, "--precision", "bf16"),
}
# Two processes run all of QUICK_JOBS, one after the other, and two others SLOW_JOBS.
QUICK_JOBS = [*(("fsdp", name) for name in CONFIGURATIONS)]
QUICK_JOBS += [("ddp", "owl1-stage1"), ("ddp", "owl2-full"), ("ddp", "owl2-bf16")]
SLOW_JOBS = [("ddp", "owl2-stage1"), ("ddp", "owl1-full"), ("ddp", "owl2-tied"), ("ddp", "owl2-lora")]


# ----------------------------------------------------------------------------------------------------
# Observing a run


def observe(stage: str, *flags: object) -> dict[str, dict]:
    """Runs a stage. Returns what this process has of each parameter in the first step, by name."""
    observed = {}
    models = []
    wrap_ddp = train.wrap_ddp

    def remember_model(model, *arguments):
        models.append(model)
        return wrap_ddp(model, *arguments)

    def after_step(optimizer, *_):
        for name, p in models[0].named_parameters():
            if name in observed:
                assert str(p.dtype) == observed[name]["dtype"]
                continue
            observed[name] = {"trained": p.requires_grad, "dtype": str(p.dtype), "size": p.numel()}
            observed[name]["mesh"] = list(p.device_mesh.shape) if isinstance(p, DTensor) else None
            observed[name]["local size"] = (p.to_local() if isinstance(p, DTensor) else p).numel()
            if p.requires_grad:
                trained = (p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])
                observed[name]["gradient and moments"] = [str(tensor.dtype) for tensor in trained]

    hook = register_optimizer_step_post_hook(after_step)
    train.wrap_ddp = remember_model
    try:
        run_stage(stage, *flags)
    finally:
        train.wrap_ddp = wrap_ddp
        hook.remove()
    return observed


def observe_all(jobs: list[tuple[int, Path, tuple]]) -> None:
    """Runs (port, out, (stage, *flags)) jobs, and writes what this process observes into OUT.RANK."""
    for port, out, job in jobs:
        os.environ["MASTER_PORT"] = str(port)  # a new one for each, on which nothing of the last one is left
        observed = observe(*job, "--out", out)
        Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(observed))


def observations(out: Path, n: int = 2) -> list[dict[str, dict]]:
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(n)]


def run_in_processes(n: int, folder: Path, jobs: dict[str, tuple], n_local: int | None = None) -> str:
    """Runs the jobs, stage and flags by name, in n processes, each into folder/name. Returns their stderr."""
    jobs = [(port, folder / name, job) for port, (name, job) in zip(free_ports(len(jobs)), jobs.items())]
    return "".join(in_processes(n, folder, observe_all, jobs, n_local=n_local))


# ----------------------------------------------------------------------------------------------------
# Each configuration, on two processes and on one


@pytest.fixture(scope="module")
def command(start, mixed):
    """command(name) -> (stage, *flags) of a configuration, without --out, --batch and --micro."""

    def make(name: str) -> tuple:
        stage, variant, *more = CONFIGURATIONS[name]
        data = ("--weights", start(variant), "--data", mixed, "--val", mixed)
        return stage, *data, "--steps", STEPS, "--val-every", STEPS, *QUICK, *more

    return make


@pytest.fixture(scope="module")
def single(command, tmp_path_factory):
    """single(name, batch=4) -> the folder of a configuration's run on one process."""

    @functools.cache
    def run(name: str, batch: int = 4) -> Path:
        torch.set_num_threads(N_THREAD)
        out = tmp_path_factory.mktemp("single") / name
        run_stage(*command(name), "--batch", batch, "--micro", 2, "--out", out)
        return out

    return run


@pytest.fixture(scope="module")
def double(command, tmp_path_factory):
    """double(kind, name) -> the folder of the job's run on two processes, and what its group of jobs prints."""

    @functools.cache
    def run_group(is_slow: bool) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("double")
        jobs = {}
        for kind, name in SLOW_JOBS if is_slow else QUICK_JOBS:
            jobs[f"{kind}-{name}"] = (*command(name), "--parallel", kind, "--batch", 4, "--micro", 1)
        return folder, run_in_processes(2, folder, jobs)

    def run(kind: str, name: str) -> tuple[Path, str]:
        folder, stderr = run_group((kind, name) in SLOW_JOBS)
        return folder / f"{kind}-{name}", stderr

    return run


def test_the_ranks_get_different_work(mixed):
    """Images on one rank only, none in the last micro-batch, and unequal numbers of supervised tokens."""
    data = source(mixed, "owl2")
    batches = [
        [collate([data[seed, index] for seed, _, index in keys]) for keys in order_of(mixed, 4, 1, STEPS, rank, 2)]
        for rank in range(2)
    ]
    steps = [[rank[2 * step : 2 * step + 2] for rank in batches] for step in range(STEPS)]
    has_image = [[[batch.n_image > 0 for batch in rank] for rank in step] for step in steps]
    assert sum(any(a) != any(b) for a, b in has_image) >= 1
    assert sum((any(a) or any(b)) and not a[-1] and not b[-1] for a, b in has_image) >= 1
    n_supervised = [[sum(batch.n_supervised for batch in rank) for rank in step] for step in steps]
    assert sum(a != b for a, b in n_supervised) >= STEPS // 2


def assert_same_mathematics(one: Path, many: Path) -> None:
    assert_close_runs(one, many)
    assert len(set(losses_of(one))) == STEPS
    assert (one / "adapter").exists() == (many / "adapter").exists()


@pytest.mark.parametrize(
    "kind, name",
    [job for job in QUICK_JOBS if job[1] != "owl2-bf16"]
    + [pytest.param(*job, marks=pytest.mark.slow) for job in SLOW_JOBS],
)
def test_two_processes_train_like_one(single, double, kind, name):
    folder, stderr = double(kind, name)
    assert_same_mathematics(single(name), folder)
    assert stderr.count(f"the model is in {folder}\n") == 1  # only rank 0 writes and prints
    assert_placement(observations(folder), kind)


def assert_placement(ranks: list[dict[str, dict]], kind: str) -> None:
    """ddp replicates every weight. fsdp shards all, frozen ones too; no rank has more than a little over half."""
    for name, first in ranks[0].items():
        sizes = [rank[name]["local size"] for rank in ranks]
        assert all(rank[name]["mesh"] == ([2] if kind == "fsdp" else None) for rank in ranks), name
        assert sum(sizes) == first["size"] if kind == "fsdp" else sizes == [first["size"]] * 2, name
    totals = [sum(p["local size"] for p in rank.values()) for rank in ranks]
    assert max(totals) < 0.55 * sum(totals)


def test_torchrun_trains_like_one_process(command, single, tmp_path):
    stage, *flags = command("owl1-lora")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags += ["--parallel", "ddp", "--batch", 4, "--micro", 1, "--out", tmp_path / "out"]
    done = subprocess.run([*torchrun, f"{stage}.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_mathematics(single("owl1-lora"), tmp_path / "out")


def assert_dtypes(observed: dict[str, dict], low: torch.dtype) -> None:
    """Trained weights, their gradients and moments are float32; frozen weights are `low`."""
    for name, p in observed.items():
        if p["trained"]:
            assert {p["dtype"], *p["gradient and moments"]} == {"torch.float32"}, name
        else:
            assert p["dtype"] == str(low), name
    assert {p["trained"] for p in observed.values()} == {True, False}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bfloat16_on_two_processes_is_close_to_float32(single, double, kind):
    """Losses to 2 %."""
    folder, _ = double(kind, "owl2-bf16")
    losses, expected = losses_of(folder), losses_of(single("owl2-stage1"))
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.02)
    for rank in observations(folder):
        assert_dtypes(rank, torch.bfloat16)
    assert_placement(observations(folder), kind)
    for key, tensor in weights_of(folder).items():
        assert tensor.isfinite().all(), key
        assert tensor.dtype == (torch.float32 if key.endswith("_pos_embed") else torch.bfloat16), key


def test_two_nodes_of_two_processes_train_like_one(command, single, tmp_path):
    """Each node has the whole model in two shards: a gradient is reduced within the nodes, then between them."""
    job = (*command("owl2-full"), "--parallel", "fsdp", "--batch", 8, "--micro", 1)
    run_in_processes(4, tmp_path, {"out": job}, n_local=2)
    assert_same_mathematics(single("owl2-full", batch=8), tmp_path / "out")
    ranks = observations(tmp_path / "out", n=4)
    for key, first in ranks[0].items():
        assert all(rank[key]["mesh"] == [2, 2] for rank in ranks)
        sizes = [rank[key]["local size"] for rank in ranks]
        assert sizes[:2] == sizes[2:] and sum(sizes[:2]) == first["size"]


# ----------------------------------------------------------------------------------------------------
# Memory


class Loaded(Exception):
    """Raised when the weights are loaded, to end a run."""


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def measure_loading(jobs: list[tuple[int, Path, tuple]]) -> None:
    """Writes [resident memory as each tensor is loaded, bytes of this process's weights] of each job into OUT.RANK."""
    ctypes.CDLL(None).mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD: glibc returns freed tensors to the system at once
    memory = []
    shard_like = parallel.shard_like

    def watched_shard_like(tensor, target):
        memory.append(resident_bytes())
        shard = shard_like(tensor, target)
        memory.append(resident_bytes())
        return shard

    def end_run(model, *_):
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        raise Loaded(sum(p.nbytes for p in shards))

    parallel.shard_like = watched_shard_like
    train.wrap_ddp = end_run
    for port, out, job in jobs:
        os.environ["MASTER_PORT"] = str(port)
        memory.clear()
        with pytest.raises(Loaded) as loaded:
            run_stage(*job, "--out", out)
        Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps([memory, loaded.value.args[0]]))
        del loaded
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and needs glibc")
def test_no_process_of_a_sharded_run_ever_has_the_whole_model(tmp_path):
    """While the weights are loaded, fsdp needs about half of their memory, ddp all of it."""
    config = PRESETS["mid-owl2"]()
    config.llama.vocab_size = 2000
    model = init_weights(Owl(config)).bfloat16()
    model.tokenizer_folder = GOLDEN / "text"
    save_model(model, tmp_path / "model")
    size = sum(4 * p.numel() for p in model.parameters())
    data = write_rows(tmp_path / "text.json", [{"conversations": talk("a", "b")}] * 2)
    flags = ("--weights", tmp_path / "model", "--data", data, "--batch", 2, "--micro", 1, "--image-size", 0)
    jobs = []
    for port, kind in zip(free_ports(2), ("fsdp", "ddp")):
        jobs.append((port, tmp_path / kind, ("train_stage2", *flags, "--parallel", kind)))
    in_processes(2, tmp_path, measure_loading, jobs)
    for kind, expected, at_least, at_most in (("fsdp", size / 2, 0.4, 0.6), ("ddp", size, 0.9, 1.2)):
        for memory, n_byte in observations(tmp_path / kind):
            assert n_byte == pytest.approx(expected, rel=0.01)
            assert len(memory) > 200
            assert at_least * size < max(memory) - memory[0] < at_most * size, kind


# ----------------------------------------------------------------------------------------------------
# On one process


@pytest.fixture(scope="module")
def short_job(start, mixed):
    """short_job(stage, variant, *flags, dropout=0.0) -> (stage, *flags) of a run of 3 steps, without --out."""

    def make(stage: str, variant: str, *flags: object, dropout: float = 0.0) -> tuple:
        data = ("--weights", start(variant, dropout), "--data", mixed, "--val", mixed)
        return stage, *data, "--steps", 3, "--batch", 4, "--micro", 2, *QUICK, *flags

    return make


@pytest.fixture(scope="module")
def short_run(short_job, tmp_path_factory):
    """short_run(stage, variant, *flags) -> the folder of a run of 3 steps."""

    @functools.cache
    def run(*job: object) -> Path:
        out = tmp_path_factory.mktemp("short") / "out"
        run_stage(*short_job(*job), "--out", out)
        return out

    return run


@pytest.mark.parametrize("stage, variant", [("train_stage1", "owl2"), ("train_stage2", "owl1")])
def test_sharding_over_one_process_changes_nothing(short_run, stage, variant):
    """Without torchrun, as on a single GPU."""
    plain, sharded = short_run(stage, variant), short_run(stage, variant, "--parallel", "fsdp")
    assert_close_runs(plain, sharded)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("stage, variant, kind", [("train_stage1", "owl2", "fsdp"), ("train_stage2", "owl1", "ddp")])
def test_activation_checkpointing_changes_nothing(short_job, tmp_path, mixed, monkeypatch, stage, variant, kind):
    """With dropout too, which samples the same mask again. The decoder's MLPs run twice."""
    calls = []
    forward = llama.MLP.forward
    monkeypatch.setattr(llama.MLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    job = short_job(stage, variant, "--parallel", kind, dropout=0.1)
    job += ("--lora-dropout", 0.2) if stage == "train_stage2" else ()
    n_calls = {}
    for choice in ("--no-recompute", "--recompute"):
        calls.clear()
        run_stage(*job, choice, "--out", tmp_path / choice)
        n_calls[choice] = sum(calls)  # without those of the validation
    assert timeless(tmp_path / "--recompute") == timeless(tmp_path / "--no-recompute")
    assert_same_weights(weights_of(tmp_path / "--recompute"), weights_of(tmp_path / "--no-recompute"))
    # In stage 1 a micro-batch of text has no trained parameter, so it has no backward pass. The decoder has 2 layers.
    is_stage1 = stage == "train_stage1"
    n_text_only = sum(not has_images(mixed, keys) for keys in order_of(mixed, 4, 2, 3)) if is_stage1 else 0
    assert n_calls["--no-recompute"] == 2 * 6
    assert n_calls["--recompute"] == 2 * n_calls["--no-recompute"] - 2 * n_text_only


def has_images(path: Path, keys: list) -> bool:
    data = source(path, "owl2")
    return any(len(data[key[0], key[2]].images) for key in keys)


@pytest.mark.parametrize("variant, kind", [("owl1", "ddp"), ("owl2", "fsdp")])
def test_bfloat16_on_one_process_keeps_trained_weights_in_float32(
    short_job, short_run, tmp_path, monkeypatch, variant, kind
):
    """Losses to 2 %; matrix products are in bfloat16."""
    expected = losses_of(short_run("train_stage1", variant, "--parallel", kind))
    products = []
    forward = llama.MLP.forward

    def watched_forward(self, x):
        y = forward(self, x)
        products.append(y.dtype)
        return y

    monkeypatch.setattr(llama.MLP, "forward", watched_forward)
    job = short_job("train_stage1", variant, "--parallel", kind, "--precision", "bf16")
    assert_dtypes(observe(*job, "--out", tmp_path / "out"), torch.bfloat16)
    assert set(products) == {torch.bfloat16}
    losses = losses_of(tmp_path / "out")
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.02)


@needs_cuda
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage, variant", itertools.product(("train_stage1", "train_stage2"), ("owl1", "owl2")))
def test_a_run_on_cuda_equals_one_on_a_cpu(short_run, stage, variant, kind):
    """In float32 to rounding, in bfloat16 to 2 % of the loss."""
    expected = losses_of(short_run(stage, variant, "--device", "cpu"))
    on_cuda = ("--device", "cuda", "--parallel", kind)
    assert losses_of(short_run(stage, variant, *on_cuda, "--precision", "fp32")) == pytest.approx(expected, rel=1e-4)
    assert losses_of(short_run(stage, variant, *on_cuda)) == pytest.approx(expected, rel=0.02)


def test_choose_fsdp(monkeypatch):
    """By default on several GPUs that are too small for what one needs; else as requested."""
    monkeypatch.setattr(parallel, "device_memory", lambda device: 80 * 10**9)
    monkeypatch.setattr(parallel, "all_gather_object", lambda dist, value: [value] * dist.world_size)

    def chosen(requested: str | None, world_size: int, kind: str, gigabytes: int) -> bool:
        dist = Dist(0, world_size, torch.device(kind), torch.float32)
        return choose_fsdp(requested, dist, lambda: {"weights": 4e9, "rest": gigabytes * 1e9})

    assert chosen(None, 2, "cuda", 127)  # an Owl2-7B, everything trained
    assert not chosen(None, 2, "cuda", 40)  # its stage 1
    assert not chosen(None, 1, "cuda", 127) and not chosen(None, 2, "cpu", 127)
    for kind in ("cpu", "cuda"):
        assert chosen("fsdp", 2, kind, 1) and not chosen("ddp", 2, kind, 127)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile on a CPU needs a C compiler")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage, variant", [("train_stage1", "owl2"), ("train_stage2", "owl1")])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_blocks_compute_the_same(short_job, tmp_path, stage, variant, kind):
    """Rows of all lengths, with activation checkpointing too; no step falls back to eager."""
    torch._dynamo.reset()
    job = short_job(stage, variant, "--parallel", kind)
    job += ("--lora-dropout", 0) if stage == "train_stage2" else ()
    run_stage(*job, "--out", tmp_path / "eager")
    torch._dynamo.utils.counters.clear()
    run_stage(*job, "--compile", "--out", tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # ViT, abstractor, decoder
    torch._dynamo.reset()
    run_stage(*job, "--compile", "--recompute", "--out", tmp_path / "both")
    for other in ("compiled", "both"):
        assert_close_runs(tmp_path / "eager", tmp_path / other)
    assert math.isfinite(sum(losses_of(tmp_path / "both")))
