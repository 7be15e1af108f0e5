"""Training as a user runs it: what is trained, with which hyperparameters, on which data, and what is refused.

Runs on several processes are in test_parallel.py, resumed runs in test_resume.py.
"""

import argparse
import errno
import functools
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import train
import train_stage1
import train_stage2
from conftest import GOLDEN, N_THREAD, ROOT, assert_close, make_config, make_owl, make_packed, write_tar
from data.conversations import Conversations, SampleSpec, collate
from data.image import load_image, to_pixels
from data.mix import BatchSampler, Mixture
from data.text import Tokenizer
from inference.batch import ask
from inference.fast_decode import FastDecoder
from inference.adapter import load_lora
from inference.quantize import QuantizedLinear, load_quantized
from lora import LoRALinear
from model import IGNORE_INDEX, Owl
from runs import run_main
from training import checkpoint, plan
from training.checkpoint import HashingStream, training_state
from training.monitor import Monitor
from training.optimizer import learning_rate, make_optimizer, set_learning_rate
from training.options import Recipe, add_training_flags, command_line, default_image_size, make_recipe
from training.presets import PRESETS, init_weights, resize
from weights import load_model, save_model

STYLES = ("owl1", "owl2")
SIZE = 28
COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (235, 235, 235)}
SPEED = {"tokens_per_s", "images_per_s", "mfu", "memory_gb", "left_s"}  # metrics that depend on the machine
QUICK = ("--image-size", "0", "--log-every", "1", "--warmup", "2", "--lr", "1e-3", "--min-lr", "1e-5")


@pytest.fixture(autouse=True)
def same_threads():
    """As in the processes that tests start, so that results are bit-equal."""
    torch.set_num_threads(N_THREAD)


def tiny(variant: str, dropout: float = 0.0):
    """variant: "owl1" or "owl2", with "-tied" for tied embeddings."""
    variant, _, tied = variant.partition("-")
    return make_config(
        variant,
        vit={"image_size": SIZE, "patch_size": 14},
        abstractor={"dropout": dropout},
        llama={"vocab_size": 2000, "context": 256, "tied": bool(tied)},
    )


def save_with_tokenizer(model: Owl, folder: Path) -> Path:
    model.tokenizer_folder = GOLDEN / "text"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(variant, dropout) -> a model folder to start from, tokenizer included."""

    @functools.cache
    def make(variant: str, dropout: float = 0.0) -> Path:
        return save_with_tokenizer(make_owl(tiny(variant, dropout)), tmp_path_factory.mktemp(f"start-{variant}"))

    return make


def talk(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def paint(path: Path, name: str, rng: random.Random) -> None:
    """An image of one shade of a color."""
    shade = tuple(min(255, max(0, value + rng.randint(-20, 20))) for value in COLORS[name])
    Image.new("RGB", (SIZE, SIZE), shade).save(path)


def write_rows(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def color_rows(folder: Path, n: int, seed: int) -> list[dict]:
    """n questions about n new images, whose colors take turns."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        name = list(COLORS)[i % len(COLORS)]
        paint(folder / f"{seed}-{i}.png", name, rng)
        rows.append({"id": i, "image": f"{seed}-{i}.png", "conversations": talk("<image>What color?", name)})
    return rows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A data file of rows with one image, two, or none, with answers of very different lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = color_rows(folder, 12, seed=1)
    for i in (1, 2, 5, 6, 7, 11):
        rows[i] = {"id": i, "conversations": talk("Say it.", "yes " * (i * i % 7 + 1), "Again?", "no")}
    rows[8] = {"image": ["1-8.png", "1-0.png"], "conversations": talk("<image><image>Which?", "both of them, I think")}
    return write_rows(folder / "mixed.json", rows)


def run_stage(stage: str, *flags: object) -> None:
    """Calls a stage's main as its command line would."""
    before = sys.argv
    sys.argv = [f"{stage}.py", *map(str, flags)]
    try:
        importlib.import_module(stage).main()
    finally:
        sys.argv = before


def exit_code(stage: str, *flags: object) -> int:
    """Runs a stage that exits early."""
    with pytest.raises(SystemExit) as stop:
        run_stage(stage, *flags)
    return stop.value.code


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in lines_of(out) if "loss" in line]


def timeless(out: Path) -> list[dict]:
    """The metrics without those that depend on the machine."""
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines_of(out)]


def source(path: Path, variant: str, fit: str = "stretch", max_length: int = 256) -> Conversations:
    """A source as a run of a tiny model reads it."""
    return Conversations(path, SampleSpec(Tokenizer(GOLDEN / "text"), variant, 4, SIZE, max_length, fit))


def order_of(path: Path, per_step: int, micro: int, steps: int, rank: int = 0, world_size: int = 1) -> list[list]:
    """The micro-batches of one rank of a run with seed 0 on one source, as keys."""
    sizes = {"batch_size": per_step, "micro_batch_size": micro, "rank": rank, "world_size": world_size}
    return list(BatchSampler(data=Mixture([source(path, "owl2")], [1.0]), steps=range(steps), seed=0, **sizes))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model-*.safetensors"))
    return {key: tensor for path in files for key, tensor in load_file(path).items()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_close_runs(a: Path, b: Path) -> None:
    """Equal except for rounding: losses, gradient norms and weights.

    AdamW divides by the size of the gradient, so a rounding error in a small gradient becomes a larger part of the
    step: weights are compared with what the run could change, at most the learning rate in each step.
    """
    for one, other in zip(timeless(a), timeless(b), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for name in ("loss", "val_loss", "norm"):
            if name in one:
                assert_close(one[name], other[name], 1e-4 if name == "norm" else 2e-6, f"{name} of step {one['step']}")
    largest_change = sum(line.get("lr", 0) for line in timeless(b))
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert (first[key] - second[key]).abs().max() < 0.01 * largest_change, key


# ----------------------------------------------------------------------------------------------------
# Hyperparameters


def test_the_recipes_are_the_papers():
    """Every number, as the papers give it."""
    owl1_stage1 = Recipe(
        steps=50_000, warmup=2_000, batch=4_096, lr=1e-4, min_lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1,
        grad_clip=1.0, max_length=512, image_size=224, vit_lr_decay=1.0, crop_scale=0.5,
    )  # fmt: skip
    owl1_stage2 = Recipe(
        steps=2_000, warmup=50, batch=128 + 128, lr=2e-5, min_lr=1e-6, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-4,
        grad_clip=1.0, max_length=1_024, image_size=224, vit_lr_decay=1.0, crop_scale=0.0,
    )  # fmt: skip
    owl2_stage1 = Recipe(
        steps=42_500, warmup=1_000, batch=8_192, lr=1e-4, min_lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05,
        grad_clip=1.0, max_length=256, image_size=224, vit_lr_decay=0.9, crop_scale=0.5,
    )  # fmt: skip
    owl2_stage2 = Recipe(
        steps=4_800, warmup=250, batch=256, lr=2e-5, min_lr=1e-7, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0,
        grad_clip=1.0, max_length=2_048, image_size=448, vit_lr_decay=0.9, crop_scale=0.0,
    )  # fmt: skip
    assert train_stage1.RECIPES == {"owl1": owl1_stage1, "owl2": owl2_stage1}
    assert train_stage2.RECIPES == {"owl1": owl1_stage2, "owl2": owl2_stage2}
    assert train_stage2.LORA_RANK == {"owl1": 8, "owl2": 0}
    assert train_stage2.LORA_TARGETS["owl1"] == ("q_proj", "v_proj")


def make_test_recipe(**changes) -> Recipe:
    values = {"steps": 100, "warmup": 10, "batch": 4, "lr": 1e-2, "min_lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6}
    values |= {"weight_decay": 0.1, "grad_clip": 1.0, "max_length": 64, "image_size": 0}
    return Recipe(**values | changes)


def test_learning_rate_warms_up_peaks_and_ends_at_the_minimum():
    recipe = make_test_recipe()
    rates = [learning_rate(step, recipe) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([1e-3 * step for step in range(1, 11)])
    assert rates[9] == rates[10] == max(rates) == 1e-2
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[99] == pytest.approx(1e-4)
    assert rates[54] + rates[55] == pytest.approx(1e-2 + 1e-4)  # halfway between steps 11 and 100
    assert learning_rate(1, make_test_recipe(steps=1, warmup=0)) == 1e-2
    assert learning_rate(5, make_test_recipe(steps=5)) == pytest.approx(5e-3)  # the run ends within the warm-up


# ----------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize(
    "own, paper, is_new, expected",
    [
        (64, 448, False, 64),  # the embedded model stays as small as it is
        (64, 224, False, 64),
        (336, 448, False, 336),
        (448, 224, False, 448),  # stage 1 from a model that has seen stage 2
        (224, 448, False, 448),  # the papers' step from stage 1 to stage 2 of Owl2
        (224, 224, False, 224),
        (448, 224, True, 224),  # a new 7B begins with 224
        (448, 448, True, 448),
        (64, 224, True, 64),
    ],
)
def test_the_default_image_size_is_the_models_own_or_the_papers(own, paper, is_new, expected):
    assert default_image_size(own, paper, is_new) == expected


def test_fine_tuning_keeps_the_image_size_and_says_what_it_does(start, tmp_path, mixed, capsys):
    """12 rows in batches of 4: half an epoch is two steps, and the warm-up has the paper's share of them."""
    flags = ("--weights", start("owl2"), "--data", mixed, "--batch", 4, "--micro-batch", 2, "--epochs", 0.5)
    run_stage("train_stage2", *flags, "--out", tmp_path / "out")
    assert load_model(tmp_path / "out").config.image_size == SIZE
    assert [line["step"] for line in lines_of(tmp_path / "out")] == [2]
    err = capsys.readouterr().err
    assert f"images of {SIZE} pixels: 4 patches, 4 positions\n" in err
    assert "batches of 4 samples: 2 micro-batches of 2\n2 steps, the first 0 of them warm-up\n" in err
    assert "0.67 epochs of the 12 rows" in err and "warning" not in err and "training:" not in err


def test_more_than_20_epochs_are_reported(start, tmp_path, mixed, capsys):
    flags = ("--weights", start("owl2"), "--data", mixed, "--batch", 12, "--micro-batch", 12, *QUICK)
    for n_epoch, warned in ((20, False), (21, True)):
        run_stage("train_stage2", *flags, "--out", tmp_path / str(n_epoch), "--epochs", n_epoch)
        assert ("21 passes over" in capsys.readouterr().err) == warned


def test_the_warm_up_keeps_its_share_of_the_steps():
    def recipe_of(*flags: str) -> Recipe:
        parser = argparse.ArgumentParser()
        add_training_flags(parser)
        return make_recipe(parser.parse_args(flags), train_stage2.RECIPES["owl2"], 448)

    recipe = recipe_of("--steps", "96")
    assert (recipe.steps, recipe.warmup) == (96, 5)  # 250 of 4,800
    assert recipe_of("--steps", "96", "--warmup", "250").warmup == 250
    assert recipe_of() == train_stage2.RECIPES["owl2"]


def trained_names(model: Owl) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("variant", STYLES)
def test_stage_1_trains_all_but_the_language_model(variant):
    model = Owl(tiny(variant))
    train_stage1.choose_trained(model)
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if name.startswith(("vit.", "abstractor."))}
    if variant == "owl2":
        parts = ("input_layernorm", "post_attention_layernorm", "self_attn.k_proj", "self_attn.v_proj")
        expected |= {f"llama.layers.{i}.{part}.multiway.1.weight" for i in range(2) for part in parts}
    assert trained_names(model) == expected and expected <= names


def test_stage_2_trains_adapters_in_owl1_and_everything_in_owl2():
    owl2 = Owl(tiny("owl2"))
    train_stage2.choose_trained(owl2, 0, 32.0, 0.05, False)
    assert trained_names(owl2) == {name for name, _ in owl2.named_parameters()}

    owl1 = Owl(tiny("owl1"))
    train_stage2.choose_trained(owl1, 8, 32.0, 0.05, False)
    expected = {f"llama.layers.{i}.self_attn.{p}_proj.lora_{m}.weight" for i in range(2) for p in "qv" for m in "AB"}
    assert trained_names(owl1) == expected
    adapter = owl1.llama.layers[0].self_attn.q_proj
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 32.0, 0.05)

    released = Owl(tiny("owl2"))  # as Owl2's released scripts: every Linear of the decoder except lm_head
    train_stage2.choose_trained(released, 4, 32.0, 0.05, False)
    adapted = {name for name, module in released.named_modules() if isinstance(module, LoRALinear)}
    linears = {name for name, module in Owl(tiny("owl2")).llama.named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted == {f"llama.{name}" for name in linears - {"lm_head"}}
    assert all(".lora_" in name for name in trained_names(released))


def test_a_frozen_vit_is_not_trained():
    for choose_trained in (
        train_stage1.choose_trained,
        lambda model, **more: train_stage2.choose_trained(model, 0, 32.0, 0.05, False, **more),
    ):
        everything, rest = Owl(tiny("owl2")), Owl(tiny("owl2"))
        choose_trained(everything)
        choose_trained(rest, freeze_vit=True)
        vit = {name for name in trained_names(everything) if name.startswith("vit.")}
        assert vit and trained_names(rest) == trained_names(everything) - vit


def test_the_optimizer_gives_each_parameter_its_rate_and_decay():
    """Layer-wise rates in the ViT, no decay for norms and biases, nothing that is frozen."""
    model = Owl(tiny("owl2"))
    train_stage1.choose_trained(model)
    optimizer = make_optimizer(model, make_test_recipe(vit_lr_decay=0.9))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(groups) == len(trained)
    scales = {"vit.blocks.1.": 0.9, "vit.blocks.0.": 0.9**2, "vit.post_norm.": 1.0, "vit.": 0.9**3, "": 1.0}
    for name, parameter in trained.items():
        group = groups[id(parameter)]
        scale = next(value for prefix, value in scales.items() if name.startswith(prefix))
        assert group["lr_scale"] == pytest.approx(scale), name
        assert group["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.1), name
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6


def test_vision_encoder_and_abstractor_can_have_rates_of_their_own():
    """The decay over the ViT's layers applies on top; other parts keep --lr."""
    model = Owl(tiny("owl2"))
    recipe = make_test_recipe(vit_lr_decay=0.9, vit_lr=1e-3, abstractor_lr=3e-2)
    optimizer = make_optimizer(model, recipe)
    set_learning_rate(optimizer, learning_rate(10, recipe))  # the peak
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["vit.post_norm.weight"] == pytest.approx(1e-3)
    assert found["vit.blocks.0.norm1.weight"] == pytest.approx(1e-3 * 0.9**2)
    assert found["abstractor.queries"] == pytest.approx(3e-2)
    assert found["llama.norm.weight"] == pytest.approx(1e-2)


@pytest.mark.parametrize("targets, expected", [
    (["attention"], {"q_proj", "k_proj.multiway.0", "k_proj.multiway.1", "v_proj.multiway.0", "v_proj.multiway.1", "o_proj"}),
    (["visual"], {"q_proj", "v_proj.multiway.1"}),
    (["visual", "down_proj"], {"q_proj", "v_proj.multiway.1", "down_proj"}),
])  # fmt: skip
def test_lora_targets(targets, expected):
    model = Owl(tiny("owl2"))
    train_stage2.choose_trained(model, 2, 4.0, 0.0, False, targets=targets)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert {name.split("_attn.")[-1].split("mlp.")[-1] for name in adapted} == expected
    assert len(adapted) == len(expected) * model.config.llama.n_layer


# ----------------------------------------------------------------------------------------------------
# Real runs


def test_stage_2_learns_to_see(tmp_path):
    """From random weights to correct answers about new images; the metrics have every promised number."""
    torch.manual_seed(0)
    first = save_with_tokenizer(init_weights(Owl(tiny("owl2"))), tmp_path / "start")
    data = write_rows(tmp_path / "data.json", color_rows(tmp_path, 64, seed=1))
    val = write_rows(tmp_path / "val.json", color_rows(tmp_path, 16, seed=2))
    out = tmp_path / "out"
    flags = ("--steps", 100, "--warmup", 10, "--batch", 16, "--micro-batch", 16, "--lr", 5e-3, "--vit-lr-decay", 1)
    more = ("--image-size", 0, "--log-every", 10, "--val-every", 50, "--save-every", 100)
    run_stage("train_stage2", "--weights", first, "--data", data, "--val", val, "--out", out, *flags, *more)

    lines = lines_of(out)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(10, 101, 10))
    recipe = make_test_recipe(steps=100, warmup=10, lr=5e-3, min_lr=1e-7)
    for line in logged:
        assert set(line) == {"step", "loss", "lr", "norm", *SPEED}
        assert line["lr"] == pytest.approx(learning_rate(line["step"], recipe))
        assert line["norm"] > 0 and line["tokens_per_s"] > 5 * line["images_per_s"] > 0
        assert line["mfu"] is None  # the peak FLOP/s of a CPU is unknown
        assert 0.05 < line["memory_gb"] < 50
    validated = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validated] == [50, 100]
    assert loss_by_hand(first, data, "owl2", "pad") > 7  # about ln 2000: untrained
    assert losses_of(out)[-1] < 0.2 and validated[-1]["val_loss"] < 0.3

    rows = json.loads(val.read_text())
    questions = [row["conversations"][0]["value"] for row in rows]
    images = [to_pixels(load_image(tmp_path / row["image"]), SIZE, "square") for row in rows]
    answers = ask(FastDecoder(load_model(out)), Tokenizer(out), questions, images, max_new_tokens=5)
    assert answers == [row["conversations"][1]["value"] for row in rows]


@pytest.mark.parametrize("variant", STYLES)
def test_stage_1_leaves_the_language_model_bit_identical(start, tmp_path, mixed, variant):
    """Also if a micro-batch is all text and has no gradient. Everything that is trained changes."""
    out = tmp_path / "out"
    flags = ("--steps", 4, "--batch", 4, "--micro-batch", 1, *QUICK)
    run_stage("train_stage1", "--weights", start(variant), "--data", mixed, "--out", out, *flags)
    before = load_model(start(variant)).state_dict()
    after = load_model(out).state_dict()
    frozen = {name for name in before if name.startswith("llama.") and ".multiway.1." not in name}
    # No logit depends on what the last layer's MLP computes for a visual token: it is trained without gradient.
    unused = {"llama.layers.1.post_attention_layernorm.multiway.1.weight"}
    for name in before:
        changed = name not in frozen | unused and not name.endswith("_pos")
        assert torch.equal(before[name], after[name]) != changed, name
        assert after[name].isfinite().all(), name


def test_stage_1_of_pure_text_changes_nothing(start, tmp_path):
    """No vision parameter gets a gradient; this is no error, and without decay nothing changes."""
    data = write_rows(tmp_path / "text.json", [{"conversations": talk("a", "b")}] * 3)
    flags = ("--steps", 2, "--batch", 2, "--micro-batch", 1, "--weight-decay", 0, *QUICK)
    run_stage("train_stage1", "--weights", start("owl2"), "--data", data, "--out", tmp_path / "out", *flags)
    assert_same_weights(weights_of(tmp_path / "out"), weights_of(start("owl2")))
    assert all(loss > 0 for loss in losses_of(tmp_path / "out"))


def test_stage_2_of_owl1_trains_an_adapter_on_a_frozen_base(start, tmp_path, mixed):
    """The starting model with OUT/adapter gives what the merged model in OUT gives; all else is bit-identical."""
    out = tmp_path / "out"
    base = start("owl1", dropout=0.1)
    flags = ("--steps", 4, "--batch", 4, "--micro-batch", 2, *QUICK, "--lr", 1e-2)
    run_stage("train_stage2", "--weights", base, "--data", mixed, "--out", out, *flags)
    before, after = weights_of(base), weights_of(out)
    assert before.keys() == after.keys()
    for key in before:
        changed = key.endswith(("q_proj.weight", "v_proj.weight"))
        assert torch.equal(before[key], after[key]) != changed, key
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32.0, 0.05)
    assert config["base_model_name_or_path"] == str(base)

    adapted = load_model(base)
    load_lora(adapted, out / "adapter")
    data = source(mixed, "owl1", max_length=200)
    batch = collate([data[0, index] for index in range(len(data))])
    packed = make_packed(batch.ids, batch.labels, batch.cu_seqlens.diff().tolist())
    models = (load_model(out), adapted.eval(), load_model(base))
    with torch.no_grad():
        expected, actual, untrained = (model(batch.ids, batch.images, packed=packed)[0] for model in models)
    assert_close(actual, expected)
    assert (untrained - expected).abs().max() > 1e-2


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_qlora(start, tmp_path, mixed, to):
    """OUT is the quantized base with the adapter merged; the adapter is close to it on the original base; it resumes."""
    base, out = start("owl2"), tmp_path / "out"
    lora_flags = ("--lora-rank", 2, "--lora-targets", "visual", "--quantize", to, "--lora-dropout", 0)
    flags = ("--weights", base, "--data", mixed, "--out", out, "--batch", 4, "--micro-batch", 2, *QUICK, *lora_flags)
    run_stage("train_stage2", *flags, "--steps", 4, "--lr", 1e-2)
    quantized = load_quantized(base, to=to)
    before, after = weights_of(base), weights_of(out)
    assert before.keys() == after.keys()
    adapted = load_model(base)
    load_lora(adapted, out / "adapter")
    for name, module in list(quantized.llama.named_modules()):
        if isinstance(module, QuantizedLinear):
            expected = module.dequantize()
            twin = adapted.get_submodule(f"llama.{name}")
            if isinstance(twin, LoRALinear):
                expected = expected + twin.merged_weight() - twin.weight
                assert (expected - module.dequantize()).abs().max() > 1e-3, name
            assert_close(load_model(out).get_submodule(f"llama.{name}").weight, expected)
    code, _, stderr = run_main(train_stage2.main, *flags, "--steps", 4, "--lr", 1e-2, "--resume", "--parallel", "fsdp")
    assert code == 2 and "--parallel fsdp" in stderr
    for wrong in (("--quantize", to), ("--lora-targets", "visual"), ("--lora-rank", 2, "--vit-lr", 1e-3)):
        common = ("--weights", base, "--data", mixed, "--out", tmp_path / "wrong", *QUICK)
        code, _, stderr = run_main(train_stage2.main, *common, *wrong)
        assert code == 2 and wrong[-2] in stderr and "\n" not in stderr.strip()


def test_train_abstractor_adds_the_abstractor_and_nothing_else(start, tmp_path, mixed):
    out = tmp_path / "out"
    flags = ("--steps", 3, "--batch", 4, "--micro-batch", 4, *QUICK, "--train-abstractor")
    run_stage("train_stage2", "--weights", start("owl1"), "--data", mixed, "--out", out, *flags)
    before, after = weights_of(start("owl1")), weights_of(out)
    for key in before:
        changed = key.endswith(("q_proj.weight", "v_proj.weight")) or key.startswith(("abstractor.", "query_tokens"))
        assert torch.equal(before[key], after[key]) != changed, key


@pytest.mark.parametrize("variant", STYLES)
def test_train_language_trains_the_text_half_alone(tmp_path, monkeypatch, variant):
    """The vision encoder keeps its random weights; at the end the visual halves are copies of the text halves."""
    monkeypatch.setitem(PRESETS, "tiny-test", lambda: tiny(variant))
    data = write_rows(tmp_path / "text.json", [{"conversations": talk("Say it.", f"number {i}")} for i in range(8)])
    out = tmp_path / "out"
    model = ("--preset", "tiny-test", "--tokenizer", GOLDEN / "text")
    flags = ("--steps", 4, "--batch", 4, "--micro-batch", 2, *QUICK)
    run_stage("tools.train_language", *model, "--data", data, "--out", out, *flags)
    torch.manual_seed(0)
    before = init_weights(Owl(tiny(variant))).state_dict()
    after = load_model(out).state_dict()
    for name in before:
        changed = name.startswith("llama.")
        assert torch.equal(before[name], after[name]) != changed, name
        assert torch.equal(after[name], after[name.replace("multiway.1", "multiway.0")]), name
    assert Tokenizer(out).vocab_size == 2000


def test_stage_1_starts_from_clip_and_llama(tmp_path, monkeypatch):
    """From folders written by transformers, for both variants."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    vision |= {"image_size": 42, "patch_size": 14, "projection_dim": 8}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text |= {"vocab_size": 50, "projection_dim": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=2000, tie_word_embeddings=False, **shape))
    llama.save_pretrained(tmp_path / "llama")
    shutil.copyfile(GOLDEN / "text" / "tokenizer.model", tmp_path / "llama" / "tokenizer.model")
    data = write_rows(tmp_path / "data.json", color_rows(tmp_path, 4, seed=1))
    parts = ("--preset", "tiny-test", "--clip", tmp_path / "clip", "--llama", tmp_path / "llama")
    reference = llama.state_dict()
    for variant in STYLES:
        monkeypatch.setitem(PRESETS, "tiny-test", lambda: tiny(variant))
        out = tmp_path / variant
        flags = ("--steps", 1, "--batch", 2, "--micro-batch", 2, *QUICK)
        run_stage("train_stage1", *parts, "--data", data, "--out", out, *flags)
        model = load_model(out)
        assert model.config.image_size == SIZE and Tokenizer(out).vocab_size == 2000
        assert torch.equal(model.llama.embed_tokens.weight, reference["model.embed_tokens.weight"])
        assert torch.equal(model.llama.layers[1].mlp.up_proj.weight, reference["model.layers.1.mlp.up_proj.weight"])
        k_proj = model.llama.layers[1].self_attn.k_proj
        k_proj = k_proj.multiway[0] if variant == "owl2" else k_proj
        assert torch.equal(k_proj.weight, reference["model.layers.1.self_attn.k_proj.weight"])
        # One step changes a weight by at most the learning rate.
        patches = clip.state_dict()["vision_model.embeddings.patch_embedding.weight"]
        assert 0 < (model.vit.patch_embed.weight - patches).abs().max() < 2e-3


# ----------------------------------------------------------------------------------------------------
# Several sources


def captions(folder: Path, n: int) -> list[tuple[str, bytes]]:
    """The members of a tar of n images with captions, as img2dataset writes them."""
    rng = random.Random(3)
    members = []
    for i in range(n):
        name = list(COLORS)[i % len(COLORS)]
        paint(folder / "image.png", name, rng)
        members.append((f"{i:09}.png", (folder / "image.png").read_bytes()))
        members.append((f"{i:09}.txt", f"All {name}.".encode()))
    return members


def test_sources_are_mixed_by_their_weights(start, tmp_path, monkeypatch):
    """A file with images, a text file, and a tar of captions, 1 : 1 : 2: each step trains on the mixture's samples."""
    paths = (
        write_rows(tmp_path / "seen.json", color_rows(tmp_path, 5, seed=1)),
        write_rows(tmp_path / "text.json", [{"conversations": talk("Say it.", f"number {i}")} for i in range(3)]),
        write_tar(tmp_path / "captions.tar", captions(tmp_path, 6)),
    )
    weights = (1.0, 1.0, 2.0)
    trained = []
    update = Monitor.update

    def record_update(monitor, micro_batches, **numbers):
        trained.extend(micro_batches)
        update(monitor, micro_batches, **numbers)

    monkeypatch.setattr(Monitor, "update", record_update)
    out = tmp_path / "out"
    mix = [f"{path}:{weight}" for path, weight in zip(paths, weights)]
    flags = ("--steps", 6, "--batch", 8, "--micro-batch", 4, "--workers", 1, "--fit", "stretch", *QUICK)
    run_stage("train_stage2", "--weights", start("owl2"), "--mix", *mix, "--out", out, *flags)

    data = Mixture([source(path, "owl2") for path in paths], list(weights))
    order = list(BatchSampler(data=data, steps=range(6), seed=0, batch_size=8, micro_batch_size=4))
    for batch, keys in zip(trained, order, strict=True):
        expected = collate([data[key] for key in keys])
        assert batch.ids.equal(expected.ids) and batch.labels.equal(expected.labels)
        assert batch.n_image == expected.n_image and (batch.n_image == 0 or batch.images.equal(expected.images))
    sampled = [key for keys in order for key in keys]
    assert [sum(i == source for _, source, _ in sampled) for i in range(3)] == [12, 12, 24]
    assert {key[1:] for key in sampled} == {(i, row) for i, n in enumerate((5, 3, 6)) for row in range(n)}
    assert len(losses_of(out)) == 6


def test_a_mixture_of_one_source_equals_data(start, tmp_path, mixed):
    flags = ("--weights", start("owl1"), "--steps", 2, "--batch", 4, "--micro", 2, *QUICK)  # the old name of a flag
    run_stage("train_stage2", *flags, "--data", mixed, "--out", tmp_path / "data")
    run_stage("train_stage2", *flags, "--mix", f"{mixed}:0.5", "--out", tmp_path / "mix")
    assert timeless(tmp_path / "data") == timeless(tmp_path / "mix")


def test_merged_images_train_as_rows_merged_by_hand_do(start, tmp_path):
    rows = color_rows(tmp_path, 4, seed=1)
    more = [{**row, "conversations": talk("<image>\nSure?", "yes")} for row in rows[:2]]
    by_hand = [{**row, "conversations": row["conversations"] + talk("Sure?", "yes")} for row in rows[:2]] + rows[2:]
    apart = write_rows(tmp_path / "apart.json", rows + more)
    together = write_rows(tmp_path / "together.json", by_hand)
    flags = ("--weights", start("owl2"), "--steps", 2, "--batch", 4, "--micro-batch", 2, *QUICK)
    run_stage("train_stage2", *flags, "--data", apart, "--merge-images", "--out", tmp_path / "merged")
    run_stage("train_stage2", *flags, "--data", together, "--out", tmp_path / "by-hand")
    assert timeless(tmp_path / "merged") == timeless(tmp_path / "by-hand")


# ----------------------------------------------------------------------------------------------------
# Steps with a non-finite loss or gradient


def poison_loss(monkeypatch, steps: tuple[int, ...], poison, n_micro: int = 2) -> list[dict[str, torch.Tensor]]:
    """Replaces the loss of the last micro-batch of these steps by poison(loss, parameter).

    Returns a list that receives copies of the training state: before the first step, and after each.
    """
    calls = iter(range(10**6))
    compute_loss, train_steps, update = train.compute_loss, train.train_steps, Monitor.update
    states = []
    observed = []

    def poisoned_loss(model, batch, dist):
        loss = compute_loss(model, batch, dist)
        step, micro = divmod(next(calls), n_micro)
        if step + 1 in steps and micro == n_micro - 1:
            loss = poison(loss, next(p for p in model.parameters() if p.requires_grad))
        return loss

    def record_state():
        states.append({name: tensor.clone() for name, tensor in training_state(*observed).items()})

    def observed_steps(run, optimizer, *arguments):
        observed[:] = run.model, optimizer
        record_state()
        train_steps(run, optimizer, *arguments)

    def observed_update(monitor, micro_batches, **numbers):
        update(monitor, micro_batches, **numbers)
        record_state()

    monkeypatch.setattr(train, "compute_loss", poisoned_loss)
    monkeypatch.setattr(train, "train_steps", observed_steps)
    monkeypatch.setattr(Monitor, "update", observed_update)
    return states


@pytest.mark.parametrize(
    "stage, variant, kind",
    [("train_stage1", "owl2", "nan"), ("train_stage2", "owl1", "inf"), ("train_stage2", "owl1", "gradient")],
)
def test_a_step_without_a_finite_gradient_is_skipped(start, tmp_path, mixed, capsys, monkeypatch, stage, variant, kind):
    """Nothing changes, to the bit; the run warns and continues. A gradient can be non-finite with a finite loss."""
    poison = {
        "nan": lambda loss, parameter: loss * math.nan,
        "inf": lambda loss, parameter: loss + math.inf * (1 + parameter.sum() ** 2),
        "gradient": lambda loss, parameter: loss + (0 * parameter.sum()).sqrt(),  # 0, with derivative inf * 0
    }[kind]
    bad = (3, 4, 6)
    states = poison_loss(monkeypatch, bad, poison)
    out = tmp_path / "out"
    flags = ("--steps", 7, "--batch", 4, "--micro-batch", 2, *QUICK)
    run_stage(stage, "--weights", start(variant), "--data", mixed, "--out", out, *flags)
    assert len(states) == 8
    err = capsys.readouterr().err
    for step in range(1, 8):
        before, after = states[step - 1], states[step]
        is_equal = all(torch.equal(before[name], after[name]) for name in before)
        assert is_equal == (f"warning: step {step} is skipped" in err) == (step in bad), step
    lines = lines_of(out)
    assert [line["step"] for line in lines if line["norm"] is None or line["loss"] is None] == list(bad)
    assert [line["step"] for line in lines if line["loss"] is None] == ([] if kind == "gradient" else list(bad))


def stopped(capsys, stage: str, *flags: object) -> str:
    """Returns what a run prints that gives up with exit code 2 and can be resumed."""
    assert exit_code(stage, *flags) == 2
    err = capsys.readouterr().err
    assert "continue with --resume" in err and "Traceback" not in err
    return err


def checkpoints_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_five_such_steps_in_a_row_stop_the_run(start, tmp_path, mixed, capsys, monkeypatch):
    """Four do not. The checkpoint has the last good state; resumed without the cause, the run completes."""
    flags = ("--weights", start("owl2"), "--data", mixed, "--steps", 14, "--batch", 4, "--micro-batch", 2, *QUICK)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        bad = (2, 3, 4, 5, 8, 9, 10, 11, 12, 13)
        states = poison_loss(patch, bad, lambda loss, parameter: loss * math.nan)
        err = stopped(capsys, "train_stage2", *flags, "--out", out)
    assert "stopped after step 12 (5 consecutive steps" in err
    assert checkpoints_of(out) == ["step-00000012"]
    assert not (out / "config.json").exists()
    assert [line["step"] for line in lines_of(out)] == list(range(1, 13))

    resumed = poison_loss(monkeypatch, (), None)
    run_stage("train_stage2", *flags, "--out", out, "--resume")
    assert len(resumed) == 3
    assert_same_weights(resumed[0], states[7])
    assert any(not torch.equal(resumed[0][name], resumed[1][name]) for name in resumed[0])
    assert [line["step"] for line in lines_of(out)] == list(range(1, 15))
    assert all(line["loss"] is not None for line in lines_of(out)[12:])


# ----------------------------------------------------------------------------------------------------
# Rows that cannot be used


def test_bad_rows_are_counted_named_and_harmless(start, tmp_path, capsys):
    """With micro-batches of one, so that some of them are empty."""
    rows = color_rows(tmp_path, 6, seed=1)
    rows[1]["image"] = "gone.png"
    rows[3]["conversations"] = talk("<image>What?", "")
    rows[4] = {"id": "long", "conversations": talk("word " * 300, "yes")}
    data = write_rows(tmp_path / "data.json", rows)
    val = write_rows(tmp_path / "val.json", [rows[0], rows[2], {"id": "bad-val", "conversations": []}])
    sampled = [index for keys in order_of(data, 4, 1, 5) for _, _, index in keys]
    out = tmp_path / "out"
    flags = ("--steps", 5, "--batch", 4, "--micro-batch", 1, "--max-length", 100, *QUICK)
    run_stage("train_stage1", "--weights", start("owl2"), "--data", data, "--val", val, "--out", out, *flags)
    err = capsys.readouterr().err
    for index, row_id, kind in ((1, "1", "missing image"), (3, "3", "malformed row"), (4, "long", "too long")):
        assert f"{sampled.count(index)} x {kind}" in err
        assert f"{data}, row {index} (id {row_id})" in err
    assert f"{val}, row 2 (id bad-val)" in err
    assert all(math.isfinite(line["loss"]) for line in lines_of(out) if "loss" in line)
    assert all(line["val_loss"] > 0 for line in lines_of(out) if "val_loss" in line)


def test_a_step_of_bad_rows_changes_nothing(start, tmp_path):
    """Loss 0, no NaN, and the same weights to the bit: the only good row is never sampled."""
    rows = [{"image": "gone.png", "conversations": talk("<image>a", "b")}] * 8
    data = write_rows(tmp_path / "data.json", rows)
    sampled = {index for keys in order_of(data, 2, 1, 3) for _, _, index in keys}
    rows[min(set(range(8)) - sampled)] = {"conversations": talk("a", "b")}
    write_rows(data, rows)
    out = tmp_path / "out"
    flags = ("--steps", 3, "--batch", 2, "--micro-batch", 1, *QUICK)
    run_stage("train_stage2", "--weights", start("owl2"), "--data", data, "--out", out, *flags)
    assert losses_of(out) == [0.0, 0.0, 0.0]
    assert_same_weights(weights_of(out), weights_of(start("owl2")))


@pytest.fixture
def three_in_twenty(tmp_path):
    """A data file of 20 rows, three of them unusable: of any 100 consecutive samples, 15."""
    rows = [{"id": i, "conversations": talk("Say it.", f"number {i}")} for i in range(20)]
    rows[4] = {"id": 4, "image": "gone.png", "conversations": talk("<image>a", "b")}
    rows[9] = {"id": 9, "image": "lost.png", "conversations": talk("<image>a", "b")}
    rows[17]["conversations"] = talk("a", "")
    return write_rows(tmp_path / "data.json", rows)


def test_a_run_with_too_many_bad_rows_stops(start, tmp_path, three_in_twenty, capsys):
    """After the 100th sample, not before; it lists the rows by kind, and can be resumed."""
    out = tmp_path / "out"
    flags = ("--weights", start("owl2"), "--data", three_in_twenty, "--out", out, "--steps", 12, "--batch", 10)
    flags = (*flags, "--micro-batch", 5, *QUICK)
    err = stopped(capsys, "train_stage2", *flags)
    assert "stopped after step 10 (15 of 100" in err and "--max-skipped" in err
    assert "10 x missing image" in err and "5 x malformed row" in err
    for row in (4, 9, 17):
        assert f"{three_in_twenty}, row {row} (id {row})" in err
    assert checkpoints_of(out) == ["step-00000010"]
    assert not (out / "config.json").exists()
    run_stage("train_stage2", *flags, "--resume", "--max-skipped", 0.2)
    assert [line["step"] for line in lines_of(out)] == list(range(1, 13))
    assert (out / "config.json").exists()


def test_a_run_with_as_many_bad_rows_as_allowed_completes(start, tmp_path, three_in_twenty):
    """Exactly the allowed share; or any share of fewer than 100 samples."""
    flags = ("--weights", start("owl2"), "--data", three_in_twenty, "--batch", 10, "--micro-batch", 5, *QUICK)
    run_stage("train_stage2", *flags, "--out", tmp_path / "allowed", "--steps", 10, "--max-skipped", 0.15)
    run_stage("train_stage2", *flags, "--out", tmp_path / "early", "--steps", 9, "--max-skipped", 0)
    assert (tmp_path / "allowed" / "config.json").exists() and (tmp_path / "early" / "config.json").exists()


# ----------------------------------------------------------------------------------------------------
# --check and --dry-run


def bare_folder(folder: Path, model: Path) -> Path:
    """A model folder without weights."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(model / name, folder / name)
    return folder


def test_check_reads_the_data_and_no_weights(start, tmp_path, mixed, capsys):
    folder = bare_folder(tmp_path / "no-weights", start("owl2"))
    bad = write_rows(tmp_path / "bad.json", [{"conversations": talk("a", "b")}, {"id": 5}])
    for data, code in ((mixed, 0), (bad, 1)):
        assert exit_code("train_stage2", "--weights", folder, "--data", data, "--check", "--image-size", 0) == code
    out = capsys.readouterr().out
    assert "12 rows: 12 usable (6 text only)" in out and "[[" in out
    assert "1 x malformed row" in out and "row 1 (id 5)" in out


def dry_run(capsys, stage: str, *flags: object) -> tuple[int, str, dict[str, float]]:
    """Returns (exit code, stdout, the gigabytes in it by kind) of a --dry-run."""
    code = exit_code(stage, *flags)
    out, err = capsys.readouterr()
    assert err == ""
    rows = re.findall(r"^  (\w+) +([\d.]+) GB(?: of [\d.]+ GB: (?:it should fit|it does not fit))?$", out, re.MULTILINE)
    return code, out, {kind: float(number) for kind, number in rows}


def test_dry_run_reads_no_weights_and_writes_nothing(start, tmp_path, mixed, capsys):
    folder = bare_folder(tmp_path / "no-weights", start("owl1"))
    before = sorted(tmp_path.rglob("*"))
    flags = ("--weights", folder, "--data", mixed, "--batch", 4, "--micro-batch", 2, "--image-size", 0)
    code, out, gigabytes = dry_run(capsys, "train_stage2", *flags, "--out", tmp_path / "out", "--dry-run")
    assert code == 0 and "it should fit" in out
    assert list(gigabytes) == ["weights", "gradients", "optimizer", "activations", "all"]
    n_frozen = sum(p.numel() for p in Owl(tiny("owl1")).parameters())
    n_trained = 2 * 2 * 2 * 8 * 32  # two LoRA matrices of rank 8, of q_proj and v_proj in two layers of width 32
    printed = [line.split() for line in out.splitlines()]
    assert ["all", f"{n_trained:,}", "trained", f"{n_frozen:,}", "frozen"] in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_measures_rows_that_can_be_used(start, tmp_path, capsys):
    """Not those that are too long, which are skipped, and would come first."""
    rows = [{"conversations": talk("Say it.", "word " * 4000)}] * 4 + [{"conversations": talk("Why?", "So.")}] * 12
    data = write_rows(tmp_path / "rows.json", rows)
    flags = ("--weights", start("owl2"), "--data", data, *QUICK, "--batch", 8, "--micro-batch", 1, "--dry-run")
    out = dry_run(capsys, "train_stage2", *flags, "--max-length", 64)[1]
    assert int(re.search(r"for 1 samples of (\d+) tokens", out)[1]) > 5


def test_dry_run_adds_up_what_is_trained_and_what_is_not(mixed, capsys, monkeypatch):
    """Per trained weight 4 bytes, 4 for its gradient and 8 for AdamW's moments; and whether it fits."""
    preset = ("--preset", "mid-owl2", "--tokenizer", GOLDEN / "text", "--image-size", 56, "--precision", "bf16")
    flags = (*preset, "--data", mixed, "--batch", 4, "--micro-batch", 2, "--dry-run")
    config = PRESETS["mid-owl2"]()
    config.llama.vocab_size = 2000
    resize(config, 56)
    with torch.device("meta"):
        model = Owl(config)
    train_stage1.choose_trained(model)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)

    monkeypatch.setattr(plan, "device_memory", lambda device: 10**9)
    code, out, gigabytes = dry_run(capsys, "train_stage1", *flags)
    assert code == 0 and "of 1.00 GB: it should fit" in out
    assert [f"{n_trained:,}", f"{n_frozen:,}"] in [line.split()[1::2] for line in out.splitlines()]
    expected = {"weights": 4 * n_trained + 2 * n_frozen}  # what is frozen is bfloat16
    expected |= {"gradients": 4 * n_trained, "optimizer": 8 * n_trained}
    for kind, n in expected.items():
        assert gigabytes[kind] == pytest.approx(n / 1e9, abs=0.005), kind
    total = gigabytes.pop("all")
    assert total == pytest.approx(sum(gigabytes.values()), abs=0.02)
    monkeypatch.setattr(plan, "device_memory", lambda device: 10**8)
    code, out, _ = dry_run(capsys, "train_stage1", *flags)
    assert code == 1 and "of 0.10 GB: it does not fit" in out


def test_dry_run_divides_a_sharded_model_by_the_devices_of_a_node(mixed, capsys):
    preset = ("--preset", "mid-owl2", "--tokenizer", GOLDEN / "text", "--image-size", 56, "--data", mixed)
    flags = (*preset, "--batch", 16, "--micro-batch", 2, "--parallel", "fsdp")
    one = dry_run(capsys, "train_stage2", *flags, "--dry-run")[2]
    eight = dry_run(capsys, "train_stage2", *flags, "--dry-run", 8)[2]
    assert list(eight) == ["weights", "gradients", "optimizer", "gathered", "activations", "all"]
    for kind in ("weights", "gradients", "optimizer"):
        assert eight[kind] == pytest.approx(one[kind] / 8, abs=0.01) and eight[kind] > 0
    assert eight["gathered"] == one["gathered"] > 0 and eight["activations"] == one["activations"]


def test_dry_run_prints_a_command_that_gives_the_same_settings(mixed):
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    flags = ["--data", str(mixed), "--epochs", "3.0", "--no-recompute", "--betas", "0.5", "0.9", "--seed", "-1"]
    flags += ["--merge-images", "--mix", "a b.json:2", "c.json"]
    args = parser.parse_args([*flags, "--dry-run", "8", "--memory", "24"])
    words = command_line(parser, args)
    assert sorted(words) == sorted(flags)
    assert vars(parser.parse_args(words)) | {"dry_run": 8, "memory": 24.0} == vars(args)


def test_dry_run_proposes_the_first_settings_that_fit(mixed, capsys):
    """For a card of any size, in bf16; its command fits as it stands."""
    preset = ("--preset", "mid-owl2", "--tokenizer", GOLDEN / "text", "--image-size", 56, "--data", mixed)
    flags = (*preset, "--batch", 16, "--micro-batch", 8, "--epochs", 3, "--dry-run")
    for memory, expected in (
        (9.0, None),
        (0.62, "--lora-rank"),
        (1e-3, "none"),
    ):
        code, out, _ = dry_run(capsys, "train_stage2", *flags, "--memory", memory)
        assert code == (expected is not None)
        if expected == "none":
            assert "none of these fits" in out and "start it" not in out
            continue
        assert "3 steps" in out and "tokens and" in out and "checkpoints of" in out and "hours" not in out
        command = shlex.split(out.splitlines()[-1])
        assert command[:2] == ["python", "train_stage2.py"] and "--epochs" in command
        if expected:
            assert expected in command and "--micro-batch 1" in out
            flags_of = [word for word in command[2:]]
            code, out, _ = dry_run(capsys, "train_stage2", *flags_of, "--dry-run", "--memory", memory)
            assert code == 0 and out.splitlines()[-1].split() == command


def test_dry_run_names_the_hours_only_of_a_known_device(mixed, capsys, monkeypatch):
    flags = ("--preset", "mid-owl2", "--tokenizer", GOLDEN / "text", "--image-size", 56, "--data", mixed)
    flags = (*flags, "--batch", 4, "--micro-batch", 2, "--dry-run")
    monkeypatch.setattr(plan, "peak_flops", lambda device: 1e12)
    assert " hours" in dry_run(capsys, "train_stage1", *flags)[1]
    assert " hours" not in dry_run(capsys, "train_stage1", *flags, "--memory", 24)[1]


# ----------------------------------------------------------------------------------------------------
# Validation, precision, the global batch


def loss_by_hand(folder: Path, path: Path, variant: str, fit: str) -> float:
    """The mean over all supervised tokens, row by row from the logits."""
    model = load_model(folder)
    data = source(path, variant, fit)
    losses = []
    for index in range(len(data)):
        sample = data[0, index]
        with torch.no_grad():
            logits = model(torch.tensor([sample.ids]), sample.images if len(sample.images) else None)[0][0]
        for position, label in enumerate(sample.labels):
            if label != IGNORE_INDEX:
                losses.append(F.cross_entropy(logits[position - 1], torch.tensor(label)).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("variant, fit", [("owl1", "stretch"), ("owl2", "pad")])
def test_validation_loss_is_the_loss_by_hand(start, tmp_path, mixed, variant, fit):
    """In evaluation mode (Owl1 has dropout), without crops, over all tokens of all rows."""
    flags = ("--weights", start(variant, 0.1), "--steps", 2, "--batch", 4, "--micro-batch", 4, *QUICK)
    run_stage("train_stage1", *flags, "--data", mixed, "--val", mixed, "--out", tmp_path, "--crop-scale", 0.5)
    (val_loss,) = [line["val_loss"] for line in lines_of(tmp_path) if "val_loss" in line]
    assert_close(val_loss, loss_by_hand(tmp_path, mixed, variant, fit), 2e-6)


def test_the_loss_does_not_depend_on_the_micro_batch(start, tmp_path, mixed):
    """Micro-batches of 1 and 8 samples with unequal numbers of supervised tokens."""
    losses = []
    for micro in (1, 8):
        out = tmp_path / str(micro)
        flags = ("--steps", 4, "--batch", 8, "--micro-batch", micro, *QUICK)
        run_stage("train_stage2", "--weights", start("owl2"), "--data", mixed, "--out", out, *flags)
        losses.append(losses_of(out))
    assert_close(losses[0], losses[1], 2e-6)
    data = source(mixed, "owl2", "square")
    (first,) = order_of(mixed, 8, 8, 1)
    batch = collate([data[0, index] for _, _, index in first])
    with torch.no_grad():
        packed = make_packed(batch.ids, batch.labels, batch.cu_seqlens.diff().tolist())
        loss = load_model(start("owl2"))(batch.ids, batch.images, batch.labels, packed)[1]
    assert_close(losses[0][0], loss, 2e-6)


def test_mixed_precision_trains_close_to_float32(start, tmp_path, mixed):
    """The path of CUDA, on the CPU: matrix products in bfloat16, and the model is saved in bfloat16."""
    flags = ("--weights", start("owl2"), "--data", mixed, "--steps", 5, "--batch", 4, "--micro-batch", 2, *QUICK)
    run_stage("train_stage2", *flags, "--out", tmp_path / "32")
    run_stage("train_stage2", *flags, "--out", tmp_path / "16", "--precision", "bf16")
    full, half = losses_of(tmp_path / "32"), losses_of(tmp_path / "16")
    assert half != full and half == pytest.approx(full, rel=0.02)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "32").values()} == {torch.float32}
    for key, tensor in weights_of(tmp_path / "16").items():
        assert tensor.dtype == (torch.float32 if key.endswith("_pos_embed") else torch.bfloat16), key


# ----------------------------------------------------------------------------------------------------
# The command line

ALL = ("tools.train_language", "train_stage1", "train_stage2")


def refusal(capsys, stage: str, *flags: object) -> str:
    """Returns the only line that is printed for a command line that is refused with exit code 2."""
    assert exit_code(stage, *flags) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.fixture
def usable(start, tmp_path, mixed):
    """usable(stage) -> flags that work, to which a test adds its mistake (the last of equal flags counts)."""

    def flags(stage: str) -> tuple:
        run = ("--data", mixed, "--out", tmp_path / "out", "--image-size", 0, "--batch", 4, "--micro-batch", 2)
        if stage == "tools.train_language":
            return (*run, "--preset", "tiny-owl2", "--tokenizer", GOLDEN / "text")
        return (*run, "--weights", start("owl1"))

    return flags


MISTAKES = {  # stages: mistakes, and a word of the message if it is not the flag's name
    ALL: [
        ("--data", "no-such.json"),
        ("--data", "TMP/broken.json", "broken.json"),
        ("--mix", "no-such.json:2", "--data"),  # not both
        ("--batch", "3", "--batch 3"),
        ("--device", "banana"),
        ("--out", "TMP/broken.json", "broken.json"),
        ("--steps", "0"),
        ("--epochs", "0"),
        ("--epochs", "1e12"),
        ("--device", "", "device"),
    ],
    ALL[1:]: [
        ("--weights", "no-such-folder"),
        ("--weights", "TMP", "TMP"),
        ("--weights", "TMP", "--tokenizer", GOLDEN / "text", "config.json"),
        ("--image-size", "30", "30"),
        ("--out", "TMP/other-weights", "other-weights"),
    ],
    ALL[2:]: [
        ("--val", "no-such.json"),
        ("--data", "TMP/empty.json", "at least one"),
        ("--data", "TMP/unusable.json", "none of the first 3 rows"),
        ("--data", "TMP", "TMP"),
        ("--tokenizer", "no-such-tokenizer"),
        ("--tokenizer", "TMP/broken.json", "broken.json"),
        ("--device", "cuda"),
        ("--micro-batch", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--warmup", "-1"),
        ("--betas", "1.5", "0.9", "--betas"),
        ("--image-size", "-14"),
        ("--crop-scale", "1.5"),
        ("--max-skipped", "2"),  # not in percent
        ("--lora-dropout", "1.5"),
        ("--preset", "owl3"),
        ("--steps", "many"),
        ("--no-such-flag", "1"),
        ("--dry-run", "-3"),
        ("--memory", "0"),
        ("--memory", "24"),  # without --dry-run
        ("--micro-batch", "1000000000"),
        ("--batch", "1000000000"),
        ("--steps", "100000000"),  # a checkpoint's name has eight digits
        ("--lora-rank", "1000000000"),
        ("--image-size", "800000"),
        ("--workers", "1000000000"),
        ("--epochs", "1", "--steps", "2", "--epochs"),  # not both
        ("--seed", "9" * 30),
        ("--log-every", "9" * 5000),
    ],
}
CASES = [(stage, *mistake) for stages, mistakes in MISTAKES.items() for mistake in mistakes for stage in stages]


@pytest.mark.parametrize("stage, flag, value, rest", [(s, f, v, r) for s, f, v, *r in CASES], ids=lambda x: str(x)[:30])
def test_a_mistake_is_reported_in_one_line(usable, tmp_path, capsys, stage, flag, value, rest):
    """Exit code 2, one line, before anything is trained or written."""
    (tmp_path / "broken.json").write_text('[{"a": 1}')
    (tmp_path / "empty.json").write_text("[]")
    write_rows(tmp_path / "unusable.json", [{"image": "gone.png", "conversations": talk("<image>a", "b")}] * 3)
    (tmp_path / "other-weights").mkdir()
    (tmp_path / "other-weights" / "pytorch_model.bin").write_bytes(b"")
    *more, word = rest or [value if flag in ("--data", "--val", "--weights", "--tokenizer", "--device") else flag]
    error = refusal(capsys, stage, *usable(stage), flag, value.replace("TMP", str(tmp_path)), *more)
    assert word.replace("TMP", str(tmp_path)) in error
    assert not (tmp_path / "out").exists()


def without(flags: tuple, name: str) -> tuple:
    """The flags except one and its value."""
    i = flags.index(name)
    return flags[:i] + flags[i + 2 :]


@pytest.mark.parametrize("stage", ALL)
def test_data_and_out_are_required(usable, capsys, stage):
    no_data = without(usable(stage), "--data")
    error = refusal(capsys, stage, *no_data)
    assert "--data" in error and "--mix" in error
    assert "--out" in refusal(capsys, stage, *without(usable(stage), "--out"))
    mixed = usable(stage)[1]
    for mix, word in (
        ((f"{mixed}:0",), "weight"),
        ((f"{mixed}:1", "no-such.json:2"), "no-such.json"),
        ((":1",), "PATH"),
        ((f"{mixed}:nan", f"{mixed}:1"), "weight"),
    ):
        assert word in refusal(capsys, stage, *no_data, "--mix", *mix)


def test_the_starting_weights_are_required(usable, start, tmp_path, capsys):
    language = usable("tools.train_language")
    assert "--tokenizer" in refusal(capsys, "tools.train_language", *without(language, "--tokenizer"))
    assert "--preset" in refusal(capsys, "tools.train_language", *without(language, "--preset"))
    assert "tiny" in refusal(capsys, "tools.train_language", *language, "--preset", "owl2-7b")
    bare = without(usable("train_stage1"), "--weights")
    preset, clip, llama = ("--preset", "tiny-owl2"), ("--clip", tmp_path), ("--llama", start("owl1"))
    for parts in ((), preset, (*preset, *clip), (*clip, *llama)):
        assert "--weights" in refusal(capsys, "train_stage1", *bare, *parts)
    assert str(tmp_path) in refusal(capsys, "train_stage1", *bare, *preset, *clip, *llama)
    assert "--weights" in refusal(capsys, "train_stage2", *without(usable("train_stage2"), "--weights"))


def test_the_tokenizer_must_fit_the_model(usable, tmp_path, capsys):
    model = init_weights(Owl(make_config("owl2", vit={"image_size": SIZE, "patch_size": 14})))  # 40 tokens
    small = save_with_tokenizer(model, tmp_path / "small")
    error = refusal(capsys, "train_stage2", *usable("train_stage2"), "--weights", small)
    assert "2000" in error and "40" in error


def test_the_starting_folder_is_not_overwritten(usable, start, tmp_path, capsys):
    """--out that is --weights would replace the model that a resumed run starts from."""
    folder = Path(shutil.copytree(start("owl1"), tmp_path / "model"))
    flags = (*usable("train_stage2"), "--weights", folder, "--out", folder)
    assert str(folder) in refusal(capsys, "train_stage2", *flags)
    assert_same_weights(weights_of(folder), weights_of(start("owl1")))


def test_the_script_itself_refuses_in_one_line(start, mixed):
    """As a user types it: a process, its exit code and its stderr."""
    command = [sys.executable, "train_stage2.py", "--weights", start("owl2"), "--data", mixed, "--batch", "3"]
    command = [*map(str, command), "--out", "x", "--image-size", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stdout == "" and ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: --batch 3")
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("stage", ALL)
def test_help_shows_the_flags(stage, capsys):
    assert exit_code(stage, "--help") == 0
    out = capsys.readouterr().out
    assert ("--llama" in out, "--lora-rank" in out) == (stage == "train_stage1", stage == "train_stage2")


@pytest.mark.parametrize("seed", [2**33, -1])
def test_any_seed_works(start, tmp_path, mixed, capsys, seed):
    """Crops and dropout depend on it, and no image becomes unreadable for it."""
    flags = ("--steps", 1, "--batch", 2, "--micro-batch", 2, *QUICK, "--crop-scale", 0.5, "--seed", seed)
    run_stage("train_stage2", "--weights", start("owl1"), "--data", mixed, "--out", tmp_path / "out", *flags)
    assert "skipped" not in capsys.readouterr().err
    assert losses_of(tmp_path / "out")[0] > 0


def snapshot(folder: Path) -> dict[Path, object]:
    """What is in a folder: the content of files, the targets of links."""
    found = sorted(folder.rglob("*"))
    return {p: p.readlink() if p.is_symlink() else p.read_bytes() for p in found if p.is_symlink() or p.is_file()}


FOREIGN = ["model", "metrics", "metrics link", "checkpoints link", "weights link"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_not_a_run_is_not_written_to(usable, start, tmp_path, capsys, kind):
    out, other = tmp_path / "out-of-another", tmp_path / "other"
    other.mkdir()
    if kind == "model":
        shutil.copytree(start("owl2"), out)
    else:
        out.mkdir()
    if kind == "weights link":
        (out / "config.json").symlink_to(start("owl2") / "config.json")
    elif kind.endswith("link"):
        (other / "metrics.jsonl").write_text("precious")
        target = other / "metrics.jsonl" if kind == "metrics link" else other
        (out / target.name.replace("other", "checkpoints")).symlink_to(target)
    elif kind == "metrics":
        (out / "metrics.jsonl").write_text("precious")
    before = snapshot(tmp_path)
    for more in ((), ("--resume",)):
        assert str(out) in refusal(capsys, "train_stage2", *usable("train_stage2"), "--out", out, *more)
    assert snapshot(tmp_path) == before


def test_windows_is_refused_in_one_line(usable, capsys, monkeypatch):
    """Nothing that training imports at the start is missing there."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Linux or macOS" in refusal(capsys, "train_stage2", *usable("train_stage2"))
    assert not hasattr(importlib.import_module("training.monitor"), "resource")


def nonfinite_from(monkeypatch, first: int) -> None:
    """The gradient norm of this step and of all later ones is nan."""
    clip, calls = train.clip_grad_norm, []

    def clip_or_nan(*arguments: object) -> float:
        calls.append(clip(*arguments))
        return math.nan if len(calls) >= first else calls[-1]

    monkeypatch.setattr(train, "clip_grad_norm", clip_or_nan)


@pytest.mark.parametrize("steps, first, code", [(1, 1, 2), (4, 3, 2), (5, 1, 2), (4, 4, 0)])
def test_a_run_that_ends_without_finite_steps_fails(start, mixed, tmp_path, capsys, monkeypatch, steps, first, code):
    """Also when it is resumed. One step that is skipped at the end is no reason to lose the model."""
    flags = ("--weights", start("owl2"), "--data", mixed, "--steps", steps, "--batch", 2, "--micro-batch", 2, *QUICK)
    flags = ("train_stage2", *flags, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        nonfinite_from(patch, first)
        if code == 0:
            run_stage(*flags)
            assert (tmp_path / "out" / "config.json").exists()
            return
        assert exit_code(*flags) == 2
    assert exit_code(*flags, "--resume") == 2
    assert "no model is written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))


def test_a_full_disk_is_reported_as_such(start, mixed, tmp_path, capsys, monkeypatch):
    """While a checkpoint is written, by one process, and while metrics are."""
    flags = ("--weights", start("owl2"), "--data", mixed, "--steps", 1, "--batch", 2, "--micro-batch", 2, *QUICK)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    for owner, name in ((HashingStream, "write"), (Monitor, "write_metrics")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            assert exit_code("train_stage2", *flags, "--out", tmp_path / name) == 2
        *_, error = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("error: ") and "No space left" in error


def test_stage_1_warns_about_data_without_images(start, tmp_path, mixed, capsys):
    text = write_rows(tmp_path / "text.json", [{"conversations": talk("a", "b")}] * 4)
    flags = ("--steps", 1, "--batch", 2, "--micro-batch", 2, *QUICK)
    for stage, data, warned in (("1", text, True), ("1", mixed, False), ("2", text, False)):
        out = tmp_path / f"{stage}-{data.stem}"
        run_stage(f"train_stage{stage}", "--weights", start("owl1"), "--data", data, "--out", out, *flags)
        assert ("no images" in capsys.readouterr().err) == warned


def test_writing_a_checkpoint_does_not_count_as_training(start, mixed, tmp_path, monkeypatch):
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args, **more: (time.sleep(2), save(*args, **more)))
    flags = ("--steps", 2, "--batch", 2, "--micro-batch", 2, *QUICK, "--save-every", 1)
    run_stage("train_stage2", "--weights", start("owl2"), "--data", mixed, "--out", tmp_path / "out", *flags)
    first, second = (line["tokens_per_s"] for line in lines_of(tmp_path / "out"))
    assert second > first / 10  # it would be some hundred times less
