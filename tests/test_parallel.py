"""However a run is spread over processes, and however it saves memory: the same mathematics.

Both owls in all stages, sharded and copied, are compared with one process that trains on the same batches. The data
gives the ranks different things to do: images or none, many supervised tokens or few.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo

import llama
import model as model_module
import train
from conftest import GOLDEN, ROOT
from data.conversations import collate
from model import Owl
from parallel import Place, choose_fsdp, n_trained
from test_train import (
    QUICK,
    STYLES,
    assert_same_weights,
    losses_of,
    mixed,
    one_thread,
    order_of,
    run_stage,
    source,
    start,
    talk,
    timeless,
    weights_of,
    write_rows,
)
from weights import load_model, save_model

__all__ = ["mixed", "one_thread", "start"]  # fixtures

STEPS = 20
CONFIGURATIONS = {
    "owl1-stage1": ("train_stage1", "owl1", "--crop-scale", 0.5),
    "owl2-stage1": ("train_stage1", "owl2", "--crop-scale", 0.5),
    "owl1-full": ("train_stage2", "owl1", "--lora-rank", 0),
    "owl2-full": ("train_stage2", "owl2"),
    "owl1-lora": ("train_stage2", "owl1", "--lora-dropout", 0),
    "owl2-lora": ("train_stage2", "owl2", "--lora-rank", 4, "--lora-dropout", 0),
}
# What is run on two processes at one go; the last group only where there is time for it.
GROUPS = {
    "fsdp": ("fsdp", list(CONFIGURATIONS)),
    "ddp": ("ddp", ["owl1-stage1", "owl2-full", "owl1-lora"]),
    "ddp-rest": ("ddp", ["owl2-stage1", "owl1-full", "owl2-lora"]),
}

# Runs several stages one after the other, which saves starting Python for each. Each rank notes what its model looks
# like as the first step is taken; or, where no step is to be taken, what memory it takes to get the weights.
DRIVER = f"""
import importlib, json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
import launch, train

def note(name, content):
    with open(name + "." + os.environ["RANK"], "w") as file:
        json.dump(content, file)

def look(run):
    found = {{}}
    for name, p in run.model.named_parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        mesh = list(p.device_mesh.shape) if isinstance(p, DTensor) else None
        moments = [run.optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq") if p.requires_grad]
        found[name] = [[str(x.dtype) for x in [p, *moments]], p.requires_grad, mesh, local.numel(), p.numel()]
    return found

seen = set()
take_step = train.take_step
def watched_step(run, model, micros, n_supervised):
    if run.args.out not in seen:
        seen.add(run.args.out)
        note(run.args.out, look(run))
    return take_step(run, model, micros, n_supervised)
train.take_step = watched_step

def memory():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

fill = launch.fill
def watched_fill(model, tensors, device, part):
    def watched_part(tensor, place):
        mine = part(tensor, place)
        while_filling.append(memory())
        return mine
    while_filling.append(memory())
    fill(model, tensors, device, watched_part)
    while_filling.append(memory())
launch.fill = watched_fill

os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for stage, flags, only_prepare, port in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(port)  # a new meeting place for each: nothing of the last one's is found there
    sys.argv = [stage + ".py", *flags]
    module = importlib.import_module(stage)
    while_filling = []
    if only_prepare:
        module.train = lambda run, finish: note(run.args.out, [while_filling, look(run)])
    module.main()
    if dist.is_initialized():
        dist.destroy_process_group()
"""


def start_processes(folder: Path, jobs: list, n: int = 2, n_local: int | None = None) -> list[subprocess.Popen]:
    """Starts n processes for the jobs: by torchrun or, for several "nodes" of n_local processes, by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(DRIVER)
    ports = free_ports(len(jobs))
    jobs = [(stage, list(map(str, flags)), only, port) for (stage, flags, only), port in zip(jobs, ports)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(folder / "driver.py"), str(folder / "jobs.json")]
    if n_local is None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        return [start_process(torchrun + command, folder / "err-0")]
    places = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n_local, "MASTER_ADDR": "127.0.0.1"}
    processes = []
    for rank in range(n):
        places |= {"RANK": rank, "LOCAL_RANK": rank % n_local}
        processes.append(start_process([sys.executable, *command], folder / f"err-{rank}", **places))
    return processes


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def start_process(command: list[str], err: Path, **environment: object) -> subprocess.Popen:
    """A process in a session of its own. What it says goes to a file, since no one may be there to read a pipe."""
    # The threshold makes glibc give back at once what a tensor took, where by default it keeps memory for later: a
    # process's memory is then what its tensors take.
    usual = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    environment = {**os.environ, **usual, **{name: str(value) for name, value in environment.items()}}
    with err.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def finish_processes(folder: Path, processes: list[subprocess.Popen]) -> str:
    """Waits for all, and returns what they said. One that fails takes the others with it."""
    late = time.monotonic() + 240
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < late:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = "".join(path.read_text() for path in sorted(folder.glob("err-*")))
    assert [process.returncode for process in processes] == [0] * len(processes), said[-5000:]
    return said


def notes(out: Path, n: int = 2) -> list:
    """What each rank noted about a run."""
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(n)]


# ----------------------------------------------------------------------------------------------------
# Each configuration, on two processes and on one


@pytest.fixture(scope="module")
def command(start, mixed):
    """command(name) -> (stage, flags but --out, --batch and --micro) of a configuration."""

    def flags(name: str) -> tuple:
        stage, style, *more = CONFIGURATIONS[name]
        data = ("--weights", start(style), "--data", mixed, "--val", mixed)
        return stage, (*data, "--steps", STEPS, "--val-every", 10, *QUICK, *more)

    return flags


@pytest.fixture(scope="module")
def single(command, tmp_path_factory):
    """single(name, batch) -> the folder of a configuration's run on this one process."""
    runs = {}

    def run(name: str, batch: int = 4) -> Path:
        if (name, batch) not in runs:
            torch.set_num_threads(1)
            stage, flags = command(name)
            out = tmp_path_factory.mktemp("single") / name
            run_stage(stage, *flags, "--batch", batch, "--micro", 2, "--out", out)
            runs[name, batch] = out
        return runs[name, batch]

    return run


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """(flags, bytes of its float32 weights) of a model large enough to be seen in a process's memory."""
    folder = tmp_path_factory.mktemp("middling")
    config = model_module.PRESETS["mid-owl2"]()
    config.llama.vocab_size = 2000
    torch.manual_seed(0)
    owl = Owl(config).init_weights().bfloat16()
    owl.tokenizer_folder = GOLDEN / "text"
    save_model(owl, folder / "model")
    data = write_rows(folder / "text.json", [{"conversations": talk("a", "b")}] * 2)
    flags = ("--weights", folder / "model", "--data", data, "--batch", 2, "--micro", 1, "--image-size", 0)
    return flags, sum(4 * p.numel() for p in owl.parameters())


@pytest.fixture(scope="module")
def double(command, single, middling, tmp_path_factory):
    """double(group) -> the folder with the group's runs on two processes, by name, and what was said."""
    done = {}

    def run(group: str) -> tuple[Path, str]:
        if group not in done:
            folder = tmp_path_factory.mktemp("double")
            parallel, names = GROUPS[group]
            jobs = []
            for name in names:
                stage, flags = command(name)
                more = ("--parallel", parallel, "--batch", 4, "--micro", 1, "--out", folder / name)
                jobs.append((stage, (*flags, *more), False))
            if group != "ddp-rest":
                stage, flags = command("owl2-stage1")
                flags = (*flags, "--parallel", parallel, "--batch", 4, "--micro", 1)
                jobs.append((stage, (*flags, "--precision", "bf16", "--out", folder / "bf16"), False))
                flags = (*middling[0], "--parallel", parallel, "--out", folder / "middling")
                jobs.append(("train_stage2", flags, True))
            processes = start_processes(folder, jobs)
            for name in names:  # meanwhile
                single(name)
            done[group] = folder, finish_processes(folder, processes)
        return done[group]

    return run


def test_the_ranks_have_different_things_to_do(mixed):
    """Text only beside images, in every combination; also in the last micro-batch, and unequal numbers of tokens."""
    data = source(mixed, "owl2")
    ranks = [order_of(mixed, 4, 1, STEPS, rank, 2) for rank in range(2)]
    one_rank_text = last_micro_text_only = one_has_image = unequal = unequal_images = 0
    for step in range(STEPS):
        keys = [rank[2 * step : 2 * step + 2] for rank in ranks]
        mine = [[collate([data[seed, index] for seed, _, index in group]) for group in rank] for rank in keys]
        seen = [[batch.n_image > 0 for batch in batches] for batches in mine]
        one_rank_text += any(seen[0]) != any(seen[1])
        last_micro_text_only += (any(seen[0]) or any(seen[1])) and not seen[0][-1] and not seen[1][-1]
        one_has_image += sum(a != b for a, b in zip(*seen))
        counts = [sum(batch.n_supervised for batch in batches) for batches in mine]
        unequal += counts[0] != counts[1]
        unequal_images += sum(b.n_image for b in mine[0]) != sum(b.n_image for b in mine[1])
    assert one_rank_text >= 2 and last_micro_text_only >= 1 and one_has_image >= STEPS // 4
    assert unequal >= STEPS // 2 and unequal_images >= 3


def assert_same_mathematics(one: Path, many: Path) -> None:
    """Losses and validation losses to 1e-5, gradient norms to 1e-4 of themselves, the model to 1e-4."""
    a, b = timeless(one), timeless(many)
    assert len(a) == len(b) == STEPS + 2
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and x["step"] == y["step"]
        for name, tolerance in (("loss", {"abs": 1e-5}), ("val_loss", {"abs": 1e-5}), ("norm", {"rel": 1e-4})):
            if name in x:
                assert x[name] == pytest.approx(y[name], **tolerance), (name, x["step"])
    assert len(set(losses_of(one))) == STEPS
    before, after = weights_of(one), weights_of(many)
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-4, msg=lambda text: f"{key}: {text}")
    loaded, expected = load_model(many).state_dict(), load_model(one).state_dict()
    for key in expected:
        torch.testing.assert_close(loaded[key], expected[key], rtol=0, atol=1e-4)
    assert (one / "adapter").exists() == (many / "adapter").exists()


@pytest.mark.parametrize(
    "group, name",
    [
        pytest.param(group, name, marks=[pytest.mark.slow] if group == "ddp-rest" else [])
        for group, (_, names) in GROUPS.items()
        for name in names
    ],
)
def test_two_processes_train_as_one_does(single, double, group, name):
    folder, said = double(group)
    assert_same_mathematics(single(name), folder / name)
    assert said.count(f"the model is in {folder / name}\n") == 1  # the first process alone writes and speaks


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_sharded_means_that_each_process_holds_its_part(double, name):
    """Together all of it, none more than a little over half; frozen weights too."""
    folder, _ = double("fsdp")
    ranks = notes(folder / name)
    for parameters in zip(*(rank.items() for rank in ranks)):
        (key, (_, _, mesh, local, n)), (_, (_, _, _, other, _)) = parameters
        assert mesh == [2], key
        assert local + other == n, key
    held = [sum(local for _, _, _, local, _ in rank.values()) for rank in ranks]
    assert max(held) < 0.55 * sum(held)


def test_copied_means_that_each_process_holds_all(double):
    folder, _ = double("ddp")
    for rank in notes(folder / "owl2-full"):
        assert all(mesh is None and local == n for _, _, mesh, local, n in rank.values())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bfloat16_on_two_processes_is_close_to_float32(single, double, parallel):
    """Losses to 2 %. What is trained, and both moments of it, stays float32; what is frozen is bfloat16."""
    folder, _ = double(parallel)
    full, half = losses_of(single("owl2-stage1")), losses_of(folder / "bf16")
    assert half != full
    assert half == pytest.approx(full, rel=0.02)
    for rank in notes(folder / "bf16"):
        kinds = {trained: {tuple(kinds) for kinds, t, *_ in rank.values() if t == trained} for trained in (True, False)}
        assert kinds == {True: {("torch.float32",) * 3}, False: {("torch.bfloat16",)}}
    for key, tensor in weights_of(folder / "bf16").items():
        assert tensor.isfinite().all(), key
        assert tensor.dtype == (torch.float32 if key.endswith("_pos_embed") else torch.bfloat16), key


def test_no_process_of_a_sharded_run_ever_holds_the_whole_model(double, middling):
    """Memory as the weights are read, tensor by tensor: about half of all; where the model is copied, all of it."""
    _, size = middling
    assert size > 150e6
    for parallel, least, most in (("fsdp", 0.45, 0.6), ("ddp", 0.95, 1.2)):
        folder, _ = double(parallel)
        for memory, parameters in notes(folder / "middling"):
            held = sum(4 * local for *_, local, _ in parameters.values())
            assert held == pytest.approx(size if parallel == "ddp" else size / 2, rel=0.01)
            assert len(memory) > 200
            assert least * size < max(memory) - memory[0] < most * size, parallel


# ----------------------------------------------------------------------------------------------------
# Nodes


def test_two_nodes_of_two_processes_train_as_one_process_does(command, single, tmp_path):
    """Each node holds the whole model, cut in two: a gradient is first divided within a node, then added across."""
    stage, flags = command("owl2-full")
    flags = (*flags, "--parallel", "fsdp", "--batch", 8, "--micro", 1, "--out", tmp_path / "out")
    processes = start_processes(tmp_path / "run", [(stage, flags, False)], n=4, n_local=2)
    one = single("owl2-full", batch=8)
    finish_processes(tmp_path / "run", processes)
    assert_same_mathematics(one, tmp_path / "out")
    ranks = notes(tmp_path / "out", n=4)
    for key in ranks[0]:
        assert all(rank[key][2] == [2, 2] for rank in ranks)
        n = ranks[0][key][4]
        assert [rank[key][3] for rank in ranks[:2]] == [rank[key][3] for rank in ranks[2:]]
        assert ranks[0][key][3] + ranks[1][key][3] == n


# ----------------------------------------------------------------------------------------------------
# On one process


def short(start, style: str, mixed: Path, *more: object, dropout: float = 0.0) -> tuple:
    data = ("--weights", start(style, dropout), "--data", mixed, "--val", mixed)
    return (*data, "--steps", 5, "--batch", 4, "--micro", 2, *QUICK, *more)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("stage", ["train_stage1", "train_stage2"])
def test_sharding_over_one_process_changes_nothing(start, tmp_path, mixed, stage, style):
    """Without torchrun: the way in which a single GPU trains a model of billions."""
    flags = short(start, style, mixed)
    run_stage(stage, *flags, "--out", tmp_path / "plain")
    run_stage(stage, *flags, "--parallel", "fsdp", "--out", tmp_path / "sharded")
    plain, sharded = timeless(tmp_path / "plain"), timeless(tmp_path / "sharded")
    assert len(plain) == len(sharded) == 6
    for a, b in zip(plain, sharded):
        assert a == pytest.approx(b, rel=1e-6)
    before, after = weights_of(tmp_path / "plain"), weights_of(tmp_path / "sharded")
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-6)
    assert not torch.distributed.is_initialized()  # it leaves no trace behind


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("stage", ["train_stage1", "train_stage2"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_recomputed_activations_change_nothing(start, tmp_path, mixed, monkeypatch, stage, style, parallel):
    """With dropout too, which is drawn the same way again. The language model's MLPs really run twice."""
    calls = []
    forward = llama.MLP.forward
    monkeypatch.setattr(llama.MLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    flags = (*short(start, style, mixed, "--parallel", parallel, dropout=0.1), "--log-every", 1)
    flags += ("--lora-dropout", 0.2) if stage == "train_stage2" else ()
    n_calls = {}
    for choice in ("--no-recompute", "--recompute"):
        calls.clear()
        run_stage(stage, *flags, choice, "--out", tmp_path / choice)
        n_calls[choice] = sum(calls)  # less those of the validation
    assert timeless(tmp_path / "--recompute") == timeless(tmp_path / "--no-recompute")
    assert_same_weights(weights_of(tmp_path / "--recompute"), weights_of(tmp_path / "--no-recompute"))
    text_only = sum(not has_images(mixed, keys) for keys in order_of(mixed, 4, 2, 5)) if stage == "train_stage1" else 0
    # A batch of text meets nothing that is trained in stage 1, so nothing goes back through it.
    assert n_calls["--recompute"] == 2 * n_calls["--no-recompute"] - 2 * text_only
    assert n_calls["--no-recompute"] == 2 * 10


def has_images(path: Path, keys: list) -> bool:
    data = source(path, "owl2")
    return any(len(data[key[0], key[2]].images) for key in keys)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_on_one_process_keeps_trained_weights_exact(start, tmp_path, mixed, monkeypatch, parallel, style):
    """Losses to 2 %; dtypes as they should be before and after a step, gradients among them; products in bfloat16."""
    products = []
    forward = llama.MLP.forward

    def watched(self, x):
        y = forward(self, x)
        products.append(y.dtype)
        return y

    take_step = train.take_step
    kinds = []

    def watched_step(run, model, micros, n_supervised):
        hooks = []
        for p in run.model.parameters():
            if p.requires_grad:
                see = lambda p: kinds.append(("gradient", p.grad.dtype))  # noqa: E731
                hooks.append(p.register_post_accumulate_grad_hook(see))
        result = take_step(run, model, micros, n_supervised)
        for hook in hooks:
            hook.remove()
        for parameter in run.model.parameters():
            kinds.append(("trained" if parameter.requires_grad else "frozen", parameter.dtype))
        kinds.extend(("moment", run.optimizer.state[p]["exp_avg"].dtype) for p in run.optimizer.state)
        return result

    monkeypatch.setattr(llama.MLP, "forward", watched)
    monkeypatch.setattr(train, "take_step", watched_step)
    flags = short(start, style, mixed, "--parallel", parallel)
    losses = {}
    for precision in ("fp32", "bf16"):
        products.clear()
        kinds.clear()
        run_stage("train_stage1", *flags, "--precision", precision, "--out", tmp_path / precision)
        losses[precision] = losses_of(tmp_path / precision)
        low = torch.bfloat16 if precision == "bf16" else torch.float32
        assert set(products) == {low}
        expected = {("trained", torch.float32), ("frozen", low), ("moment", torch.float32), ("gradient", torch.float32)}
        assert set(kinds) == expected
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_what_is_sharded_if_nobody_says():
    """On several GPUs, where more than a billion parameters are trained; never on a CPU. Asked for, it is as asked."""
    with torch.device("meta"):
        large = torch.nn.Linear(40_000, 40_000)
        small = torch.nn.Linear(40, 40)
    cpu = Place(0, 2, torch.device("cpu"), torch.float32)
    gpu = Place(0, 2, torch.device("cuda"), torch.bfloat16)
    assert n_trained(large) > 10**9
    assert choose_fsdp(None, large, gpu)
    assert not choose_fsdp(None, small, gpu) and not choose_fsdp(None, large, cpu)
    assert not choose_fsdp(None, large, Place(0, 1, torch.device("cuda"), torch.bfloat16))
    large.requires_grad_(False)
    assert not choose_fsdp(None, large, gpu)  # LoRA on a 7B
    for place in (cpu, gpu):
        assert choose_fsdp("fsdp", small, place) and not choose_fsdp("ddp", large, place)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile on a CPU needs a C compiler")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage, style", [("train_stage1", "owl2"), ("train_stage2", "owl1")])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_blocks_compute_the_same(start, tmp_path, mixed, stage, style, parallel):
    """In every step, for rows of all lengths and with recomputation; and compiled they are, to the last step."""
    torch._dynamo.reset()
    flags = short(start, style, mixed, "--parallel", parallel)
    flags += ("--lora-dropout", 0) if stage == "train_stage2" else ()
    run_stage(stage, *flags, "--out", tmp_path / "eager")
    torch._dynamo.utils.counters.clear()
    run_stage(stage, *flags, "--compile", "--out", tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # of the ViT, the abstractor, the decoder
    torch._dynamo.reset()
    run_stage(stage, *flags, "--compile", "--recompute", "--out", tmp_path / "both")
    for other in ("compiled", "both"):
        for a, b in zip(timeless(tmp_path / "eager"), timeless(tmp_path / other), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        before, after = weights_of(tmp_path / "eager"), weights_of(tmp_path / other)
        for key in before:
            torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-4)
    assert math.isfinite(sum(losses_of(tmp_path / "both")))
