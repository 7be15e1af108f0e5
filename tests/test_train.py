"""Training as a user runs it: what is trained, with which numbers, on which data, and what is refused.

Runs on several processes are in test_parallel.py, runs that go on from a checkpoint in test_resume.py.
"""

import importlib
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import launch
import lora
import model as model_module
import train
import train_stage1
import train_stage2
from conftest import GOLDEN, ROOT, make_config, make_owl
from data.conversations import Conversations, collate
from data.image import load_image, to_pixels
from data.mix import Mixture, Order
from data.text import Tokenizer
from evaluate import ask
from llama import Documents
from lora import LoRALinear
from model import IGNORE, Owl
from train import Recipe, learning_rate, make_optimizer, vit_depth
from weights import load_model, official_name, save_model

STYLES = ("owl1", "owl2")
SIZE = 28
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (235, 235, 235)}
SPEED = {"tokens_per_s", "images_per_s", "mfu", "memory_gb", "left_s"}  # the metrics that time decides
QUICK = ("--image-size", "0", "--log-every", "1", "--warmup", "2", "--lr", "1e-3", "--min-lr", "1e-5")


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that the tests start, so that results can be compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(style: str, dropout: float = 0.0, context: int = 256):
    return make_config(
        style,
        vit={"image_size": SIZE, "patch_size": 14},
        abstractor={"dropout": dropout},
        llama={"vocab_size": 2000, "context": context},
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(style) -> a model folder to begin with, as save_model leaves it, tokenizer included."""
    folders = {}

    def make(style: str, dropout: float = 0.0) -> Path:
        key = (style, dropout)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(f"start-{style}")
            owl = make_owl(tiny(style, dropout))
            owl.tokenizer_folder = GOLDEN / "text"
            save_model(owl, folders[key])
        return folders[key]

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(GOLDEN / "text")


def talk(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def paint(path: Path, name: str, rng: random.Random) -> None:
    """A picture of one shade of a colour."""
    shade = tuple(min(255, max(0, value + rng.randint(-20, 20))) for value in COLOURS[name])
    Image.new("RGB", (SIZE, SIZE), shade).save(path)


def write_rows(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def colour_rows(folder: Path, n: int, seed: int) -> list[dict]:
    """n questions about n new pictures; the colours come in turn."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        name = list(COLOURS)[i % len(COLOURS)]
        paint(folder / f"{seed}-{i}.png", name, rng)
        rows.append({"id": i, "image": f"{seed}-{i}.png", "conversations": talk("<image>What colour?", name)})
    return rows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A data file of rows with an image, two, or none, whose answers are of very different lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = colour_rows(folder, 12, seed=1)
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


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in lines_of(out) if "loss" in line]


def timeless(out: Path) -> list[dict]:
    """The metrics, but for how fast it went and what memory it took."""
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines_of(out)]


def source(path: Path, style: str, fit: str = "stretch", max_length: int = 256) -> Conversations:
    """A source as a run on a tiny owl reads it."""
    return Conversations(path, Tokenizer(GOLDEN / "text"), style, 4, SIZE, max_length, fit)


def order_of(path: Path, per_step: int, micro: int, steps: int, rank: int = 0, world: int = 1) -> list[list[tuple]]:
    """The micro-batches of one rank of a run with the seed 0 on one source, as keys."""
    return list(Order(Mixture([source(path, "owl2")], [1.0]), 0, per_step, micro, rank, world, range(steps)))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in sorted(folder.glob("model-*.safetensors")) for key, tensor in load_file(path).items()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_finite(folder: Path) -> None:
    for key, tensor in weights_of(folder).items():
        assert tensor.isfinite().all(), key


# ----------------------------------------------------------------------------------------------------
# The numbers


def test_the_recipes_are_the_papers():
    """Every number, as the papers give them."""
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


def numbers(**changes) -> Recipe:
    recipe = Recipe(
        steps=100, warmup=10, batch=4, lr=1e-2, min_lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1,
        grad_clip=1.0, max_length=64, image_size=0,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(recipe, name, value)
    return recipe


def test_learning_rate_warms_up_peaks_and_ends_at_the_minimum():
    recipe = numbers()
    rates = [learning_rate(step, recipe) for step in range(100)]
    for step in range(10):
        assert rates[step] == pytest.approx(1e-2 * (step + 1) / 10)
    assert rates[9] == rates[10] == max(rates) == 1e-2
    assert rates[99] == pytest.approx(1e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = learning_rate(54, recipe) + learning_rate(55, recipe)  # half-way between steps 10 and 99
    assert middle == pytest.approx(1e-2 + 1e-4)
    assert learning_rate(0, numbers(warmup=0)) == 1e-2
    assert learning_rate(99, numbers(min_lr=0.0)) == pytest.approx(0.0)
    assert learning_rate(0, numbers(steps=1, warmup=0)) == 1e-2
    # A warm-up longer than the run is a line that stops early.
    assert learning_rate(4, numbers(steps=5)) == pytest.approx(5e-3)


# ----------------------------------------------------------------------------------------------------
# What is trained


def trained_names(owl: Owl) -> set[str]:
    return {name for name, parameter in owl.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("style", STYLES)
def test_stage_1_trains_all_but_the_language_model(style):
    owl = Owl(tiny(style))
    train_stage1.choose_trained(owl)
    names = {name for name, _ in owl.named_parameters()}
    expected = {name for name in names if name.startswith(("vit.", "abstractor."))}
    if style == "owl2":
        parts = ("input_layernorm", "post_attention_layernorm", "self_attn.k_proj", "self_attn.v_proj")
        expected |= {f"llama.layers.{i}.{part}.multiway.1.weight" for i in range(2) for part in parts}
    assert trained_names(owl) == expected and expected <= names


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

    official = Owl(tiny("owl2"))  # as Owl2's released scripts do: every Linear of the decoder but lm_head
    train_stage2.choose_trained(official, 4, 32.0, 0.05, False)
    wrapped = {name for name, module in official.named_modules() if isinstance(module, LoRALinear)}
    linears = {name for name, module in Owl(tiny("owl2")).llama.named_modules() if isinstance(module, torch.nn.Linear)}
    assert wrapped == {f"llama.{name}" for name in linears - {"lm_head"}}
    assert all(".lora_" in name for name in trained_names(official))


@pytest.mark.parametrize("stage", (train_stage1, train_stage2))
def test_a_frozen_vit_is_not_trained(stage):
    arguments = () if stage is train_stage1 else (0, 32.0, 0.05, False)
    everything, rest = Owl(tiny("owl2")), Owl(tiny("owl2"))
    stage.choose_trained(everything, *arguments)
    stage.choose_trained(rest, *arguments, freeze_vit=True)
    assert trained_names(rest) == {name for name in trained_names(everything) if not name.startswith("vit.")}
    assert any(name.startswith("vit.") for name in trained_names(everything))


def test_the_optimizer_gives_each_parameter_its_rate_and_decay():
    """Layer-wise rates in the ViT, no decay for norms and biases, nothing that is frozen."""
    owl = Owl(tiny("owl2"))
    train_stage1.choose_trained(owl)
    optimizer = make_optimizer(owl, numbers(vit_lr_decay=0.9))
    given = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in owl.named_parameters() if p.requires_grad}
    assert len(given) == len(trained)
    scales = {"vit.blocks.1.": 0.9, "vit.blocks.0.": 0.9**2, "vit.post_norm.": 1.0, "vit.": 0.9**3, "": 1.0}
    for name, parameter in trained.items():
        group = given[id(parameter)]
        scale = next(value for prefix, value in scales.items() if name.startswith(prefix))
        assert group["lr_scale"] == pytest.approx(scale), name
        assert group["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.1), name
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6
    vectors = [name for name, p in trained.items() if given[id(p)]["weight_decay"] == 0]
    assert all("norm" in name or name.endswith(".bias") for name in vectors) and vectors


def test_vit_depth_of_the_released_tower():
    assert [vit_depth(f"vit.blocks.{i}.norm1.weight", 24) for i in (23, 22, 0)] == [1, 2, 24]
    assert vit_depth("vit.patch_embed.weight", 24) == vit_depth("vit.cls_token", 24) == vit_depth("vit.pre_norm.bias", 24) == 25
    assert vit_depth("vit.post_norm.weight", 24) == vit_depth("abstractor.queries", 24) == vit_depth("llama.norm.weight", 24) == 0


# ----------------------------------------------------------------------------------------------------
# Real runs


def test_stage_2_learns_to_see(tmp_path, tokenizer):
    """From random weights to right answers about pictures it has not seen; the metrics say so line by line."""
    torch.manual_seed(0)
    owl = Owl(tiny("owl2")).init_weights()
    owl.tokenizer_folder = GOLDEN / "text"
    save_model(owl, tmp_path / "start")
    data = write_rows(tmp_path / "data.json", colour_rows(tmp_path, 64, seed=1))
    val = write_rows(tmp_path / "val.json", colour_rows(tmp_path, 16, seed=2))
    out = tmp_path / "out"
    flags = ("--steps", 160, "--warmup", 10, "--batch", 16, "--micro", 16, "--lr", 5e-3, "--vit-lr-decay", 1)
    more = ("--image-size", 0, "--log-every", 10, "--val-every", 80, "--save-every", 100)
    run_stage("train_stage2", "--weights", tmp_path / "start", "--data", data, "--val", val, "--out", out, *flags, *more)

    lines = lines_of(out)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(10, 161, 10))
    recipe = numbers(steps=160, warmup=10, lr=5e-3, min_lr=1e-7)
    for line in logged:
        assert set(line) == {"step", "loss", "lr", "norm", *SPEED}
        assert line["lr"] == pytest.approx(learning_rate(line["step"] - 1, recipe))
        assert line["norm"] > 0 and line["tokens_per_s"] > 5 * line["images_per_s"] > 0
        assert line["mfu"] is None  # nobody knows what a CPU can do
        assert 0.05 < line["memory_gb"] < 50
    validated = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validated] == [80, 160]
    assert loss_by_hand(tmp_path / "start", data, "owl2", "pad") > 7  # about ln 2000: it knows nothing
    assert losses_of(out)[-1] < 0.2
    assert validated[-1]["val_loss"] < 0.3

    trained = load_model(out)
    rows = json.loads(val.read_text())
    pictures = [to_pixels(load_image(tmp_path / row["image"]), SIZE, "square") for row in rows]
    answers = ask(trained, tokenizer, [row["conversations"][0]["value"] for row in rows], pictures, 5)
    assert answers == [row["conversations"][1]["value"] for row in rows]
    assert Tokenizer(out).vocab_size == 2000  # the saved folder is complete


@pytest.mark.parametrize("style", STYLES)
def test_stage_1_leaves_the_language_model_bit_identical(start, tmp_path, mixed, capsys, style):
    """Also where a micro-batch is all text and touches nothing that is trained. Everything trained has moved."""
    out = tmp_path / "out"
    flags = ("--steps", 8, "--batch", 4, "--micro", 1, *QUICK)
    run_stage("train_stage1", "--weights", start(style), "--data", mixed, "--out", out, *flags)
    before = load_model(start(style)).state_dict()
    after = load_model(out).state_dict()
    frozen = {name for name in before if name.startswith("llama.") and ".multiway.1." not in name}
    # What the last layer's MLP makes of an image word reaches no logit: it is trained, but has no gradient.
    still = {"llama.layers.1.post_attention_layernorm.multiway.1.weight"}
    for name in before:
        if name in frozen | still or name.endswith("_pos"):
            assert torch.equal(before[name], after[name]), name
        else:
            assert not torch.equal(before[name], after[name]), name
            assert after[name].isfinite().all(), name
    assert len(frozen) > 15
    n_frozen = sum(before[name].numel() for name in frozen)
    n_trained = sum(p.numel() for p in load_model(out).parameters()) - n_frozen
    shown = [line.split() for line in capsys.readouterr().err.splitlines() if "trained" in line]
    assert ["all", f"{n_trained:,}", "trained", f"{n_frozen:,}", "frozen"] in shown


def test_stage_1_of_pure_text_changes_nothing(start, tmp_path):
    """No vision parameter gets a gradient; that is no error, and without decay nothing moves."""
    data = write_rows(tmp_path / "text.json", [{"conversations": talk("a", "b")}] * 3)
    for style in STYLES:
        out = tmp_path / style
        flags = ("--steps", 2, "--batch", 2, "--micro", 1, "--weight-decay", 0, *QUICK)
        run_stage("train_stage1", "--weights", start(style), "--data", data, "--out", out, *flags)
        assert_same_weights(weights_of(out), weights_of(start(style)))
        assert all(loss > 0 for loss in losses_of(out))


def test_stage_2_of_owl1_trains_an_adapter_on_a_base_that_stays(start, tmp_path, mixed):
    """OUT/adapter on the starting model gives what the merged model in OUT gives; all else is bit-identical."""
    out = tmp_path / "out"
    base = start("owl1", dropout=0.1)
    flags = ("--steps", 6, "--batch", 4, "--micro", 2, *QUICK, "--lr", 1e-2)
    run_stage("train_stage2", "--weights", base, "--data", mixed, "--out", out, *flags)
    before = weights_of(base)
    after = weights_of(out)
    assert before.keys() == after.keys()
    for key in before:
        changed = key.endswith(("q_proj.weight", "v_proj.weight"))
        assert torch.equal(before[key], after[key]) != changed, key
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32.0, 0.05)
    assert config["base_model_name_or_path"] == str(base)

    merged = load_model(out)
    adapted = load_model(base)
    lora.load(adapted, out / "adapter", lambda name: official_name(name, "owl1"))
    adapted.eval()
    data = source(mixed, "owl1", max_length=200)
    batch = collate([data[0, index] for index in range(len(data))])
    documents = Documents(batch.starts, batch.longest)
    with torch.no_grad():
        expected = merged(batch.ids, batch.images, documents=documents)[0]
        actual = adapted(batch.ids, batch.images, documents=documents)[0]
        plain = load_model(base)(batch.ids, batch.images, documents=documents)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-2  # and it learnt something
    for name, parameter in adapted.named_parameters():  # loading it leaves the base as it was
        if ".lora_" not in name:
            assert torch.equal(parameter, before[official_name(name, "owl1")])


def test_train_abstractor_adds_the_abstractor_and_nothing_else(start, tmp_path, mixed):
    out = tmp_path / "out"
    flags = ("--steps", 3, "--batch", 4, "--micro", 4, *QUICK, "--train-abstractor")
    run_stage("train_stage2", "--weights", start("owl1"), "--data", mixed, "--out", out, *flags)
    before = weights_of(start("owl1"))
    after = weights_of(out)
    for key in before:
        changed = key.endswith(("q_proj.weight", "v_proj.weight")) or key.startswith("abstractor.") or key == "query_tokens"
        assert torch.equal(before[key], after[key]) != changed, key


@pytest.mark.parametrize("style", STYLES)
def test_stage_0_trains_the_text_half_alone(tmp_path, monkeypatch, mixed, tokenizer, style):
    """The eye keeps its first random weights; at the end the image halves are copies of the text halves."""
    monkeypatch.setitem(model_module.PRESETS, "tiny-test", lambda: tiny(style))
    data = write_rows(tmp_path / "text.json", [{"conversations": talk("Say it.", f"number {i}")} for i in range(8)])
    out = tmp_path / "out"
    flags = ("--steps", 4, "--batch", 4, "--micro", 2, *QUICK)
    run_stage("train_stage0", "--preset", "tiny-test", "--tokenizer", GOLDEN / "text", "--data", data, "--out", out, *flags)
    torch.manual_seed(0)
    before = Owl(tiny(style)).init_weights().state_dict()
    after = load_model(out).state_dict()
    for name in before:
        if name.startswith("llama."):
            assert not torch.equal(before[name], after[name]), name
            assert torch.equal(after[name], after[name.replace("multiway.1", "multiway.0")])
        else:
            assert torch.equal(before[name], after[name]), name
    assert Tokenizer(out).vocab_size == 2000


def test_stage_1_starts_from_clip_and_llama(tmp_path, monkeypatch):
    """From folders made by transformers, through the preset and both flags, for both owls."""
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
    data = write_rows(tmp_path / "data.json", colour_rows(tmp_path, 4, seed=1))
    parts = ("--preset", "tiny-test", "--clip", tmp_path / "clip", "--llama", tmp_path / "llama")
    for style in STYLES:
        monkeypatch.setitem(model_module.PRESETS, "tiny-test", lambda: tiny(style))
        out = tmp_path / style
        run_stage("train_stage1", *parts, "--data", data, "--out", out, "--steps", 1, "--batch", 2, "--micro", 2, *QUICK)
        owl = load_model(out)
        assert owl.config.image_size == SIZE and Tokenizer(out).vocab_size == 2000
        theirs = llama.state_dict()
        assert torch.equal(owl.llama.embed_tokens.weight, theirs["model.embed_tokens.weight"])
        assert torch.equal(owl.llama.layers[1].mlp.up_proj.weight, theirs["model.layers.1.mlp.up_proj.weight"])
        key = owl.llama.layers[1].self_attn.k_proj
        key = key.multiway[0] if style == "owl2" else key
        assert torch.equal(key.weight, theirs["model.layers.1.self_attn.k_proj.weight"])
        # One step of at most the learning rate away from CLIP.
        patches = clip.state_dict()["vision_model.embeddings.patch_embedding.weight"]
        assert 0 < (owl.vit.patch_embed.weight - patches).abs().max() < 2e-3
        assert math.isfinite(losses_of(out)[0])


def test_the_line_for_a_person_says_where_the_run_is_and_how_fast(start, tmp_path, mixed, capsys):
    """The same numbers as in metrics.jsonl, and how long the rest will take."""
    flags = ("--steps", 3, "--batch", 2, "--micro", 2, *QUICK)
    run_stage("train_stage2", "--weights", start("owl2"), "--data", mixed, "--out", tmp_path / "out", *flags)
    number = r"[\d,]+(?:\.\d+)?"
    line = re.compile(
        rf"step (\d)/3  loss ({number})  lr (\S+)  norm ({number})  ({number}) tokens/s  ({number}) images/s"
        rf"  ({number}) GB  0:00:\d\d left$"
    )
    said = [line.search(text) for text in re.split(r"[\r\n]+", capsys.readouterr().err) if " tokens/s" in text]
    names = ("step", "loss", "lr", "norm", "tokens_per_s", "images_per_s", "memory_gb")
    assert len(said) == 3
    for match, numbers in zip(said, lines_of(tmp_path / "out")):
        shown = [float(group.replace(",", "")) for group in match.groups()]
        assert shown == pytest.approx([numbers[name] for name in names], rel=1e-2, abs=0.5e-1)


# ----------------------------------------------------------------------------------------------------
# Several sources


def write_tar(path: Path, folder: Path, n: int) -> Path:
    """n captioned pictures as img2dataset leaves them."""
    rng = random.Random(3)
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            name = list(COLOURS)[i % len(COLOURS)]
            paint(folder / "picture.png", name, rng)
            for suffix, content in (("png", (folder / "picture.png").read_bytes()), ("txt", f"All {name}.".encode())):
                member = tarfile.TarInfo(f"{i:09}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_sources_are_mixed_by_their_weights(start, tmp_path, monkeypatch, workers):
    """A file with images, a text, and a tar of captions, 1 : 1 : 2: each step is what the mixture holds there."""
    paths = (
        write_rows(tmp_path / "seen.json", colour_rows(tmp_path, 5, seed=1)),
        write_rows(tmp_path / "text.json", [{"conversations": talk("Say it.", f"number {i}")} for i in range(3)]),
        write_tar(tmp_path / "captions.tar", tmp_path, 6),
    )
    weights = (1.0, 1.0, 2.0)
    computed = []
    take_step = train.take_step

    def spy(run, model, micros, n_supervised):
        computed.append(micros)
        return take_step(run, model, micros, n_supervised)

    monkeypatch.setattr(train, "take_step", spy)
    out = tmp_path / "out"
    mix = [f"{path}:{weight}" for path, weight in zip(paths, weights)]
    flags = ("--steps", 6, "--batch", 8, "--micro", 4, "--workers", workers, "--fit", "stretch", *QUICK)
    run_stage("train_stage2", "--weights", start("owl2"), "--mix", *mix, "--out", out, *flags)

    data = Mixture([source(path, "owl2") for path in paths], list(weights))
    order = list(Order(data, 0, 8, 4, 0, 1, range(6)))
    assert len(computed) == 6
    for step, micros in enumerate(computed):
        expected = [collate([data[key] for key in keys]) for keys in order[2 * step : 2 * step + 2]]
        for micro, other in zip(micros, expected, strict=True):
            assert micro.ids.equal(other.ids) and micro.labels.equal(other.labels)
            assert micro.n_image == other.n_image and (micro.n_image == 0 or micro.images.equal(other.images))
    drawn = [key for keys in order for key in keys]
    assert [sum(source == i for _, source, _ in drawn) for i in range(3)] == [12, 12, 24]
    assert {key[1:] for key in drawn} == {(0, i) for i in range(5)} | {(1, i) for i in range(3)} | {(2, i) for i in range(6)}
    assert all(math.isfinite(loss) for loss in losses_of(out)) and len(losses_of(out)) == 6
    assert_finite(out)


def test_a_mixture_of_one_is_that_source(start, tmp_path, mixed):
    flags = ("--weights", start("owl1"), "--steps", 2, "--batch", 4, "--micro", 2, *QUICK)
    run_stage("train_stage2", *flags, "--data", mixed, "--out", tmp_path / "data")
    run_stage("train_stage2", *flags, "--mix", f"{mixed}:0.5", "--out", tmp_path / "mix")
    assert timeless(tmp_path / "data") == timeless(tmp_path / "mix")


def test_merged_images_train_as_rows_merged_by_hand_do(start, tmp_path):
    rows = colour_rows(tmp_path, 4, seed=1)
    more = [{**row, "conversations": talk("<image>\nSure?", "yes")} for row in rows[:2]]
    by_hand = [{**row, "conversations": row["conversations"] + talk("Sure?", "yes")} for row in rows[:2]] + rows[2:]
    apart = write_rows(tmp_path / "apart.json", rows + more)
    together = write_rows(tmp_path / "together.json", by_hand)
    flags = ("--weights", start("owl2"), "--steps", 3, "--batch", 4, "--micro", 2, *QUICK)
    run_stage("train_stage2", *flags, "--data", apart, "--merge-images", "--out", tmp_path / "merged")
    run_stage("train_stage2", *flags, "--data", together, "--out", tmp_path / "by-hand")
    run_stage("train_stage2", *flags, "--data", apart, "--out", tmp_path / "unmerged")
    assert timeless(tmp_path / "merged") == timeless(tmp_path / "by-hand")
    assert losses_of(tmp_path / "merged") != losses_of(tmp_path / "unmerged")


# ----------------------------------------------------------------------------------------------------
# Steps that cannot be taken


def poisoned(monkeypatch, steps: tuple[int, ...], poison, n_micro: int = 2) -> list[dict[str, torch.Tensor]]:
    """From now on, poison(loss, parameter) stands for the loss of each chosen step's last micro-batch.

    Returns a list that fills with what is trained and AdamW's moments, as they stand before all steps and after each.
    """
    calls = iter(range(10**6))
    loss_of, take_step = train.loss_of, train.take_step
    states = []

    def poisoned_loss(model, batch, config, place):
        loss = loss_of(model, batch, config, place)
        step, micro = divmod(next(calls), n_micro)
        if step + 1 in steps and micro == n_micro - 1:
            loss = poison(loss, next(p for p in model.parameters() if p.requires_grad))
        return loss

    def copy(run):
        return {name: tensor.clone() for name, tensor in train.training_state(run).items()}

    def watched_step(run, model, micros, n_supervised):
        if not states:
            states.append(copy(run))
        result = take_step(run, model, micros, n_supervised)
        states.append(copy(run))
        return result

    monkeypatch.setattr(train, "loss_of", poisoned_loss)
    monkeypatch.setattr(train, "take_step", watched_step)
    return states


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("stage, style", [("train_stage1", "owl2"), ("train_stage2", "owl1")])
def test_a_step_without_a_finite_gradient_is_skipped(start, tmp_path, mixed, capsys, monkeypatch, stage, style, kind):
    """Nothing changes, to the bit, the run says so and goes on. A gradient may be broken where the loss is not."""
    poison = {
        "nan": lambda loss, parameter: loss * math.nan,
        "inf": lambda loss, parameter: loss + math.inf * (1 + parameter.sum() ** 2),
        "gradient": lambda loss, parameter: loss + (0 * parameter.sum()).sqrt(),  # 0, of slope inf * 0
    }[kind]
    bad = (3, 4, 6)
    states = poisoned(monkeypatch, bad, poison)
    out = tmp_path / "out"
    flags = ("--steps", 7, "--batch", 4, "--micro", 2, *QUICK)
    run_stage(stage, "--weights", start(style), "--data", mixed, "--out", out, *flags)
    assert len(states) == 8
    for step in range(1, 8):
        before, after = states[step - 1], states[step]
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (step in bad), step
    err = capsys.readouterr().err
    for step in range(1, 8):
        assert (f"warning: step {step} is skipped: loss" in err) == (step in bad)
    lines = lines_of(out)
    assert [line["step"] for line in lines if line["norm"] is None or line["loss"] is None] == list(bad)
    assert [line["step"] for line in lines if line["loss"] is None] == ([] if kind == "gradient" else list(bad))
    assert_finite(out)


def stopped(capsys, stage: str, *flags: object) -> str:
    """What a run says that gives up: exit code 2, and it can be resumed."""
    with pytest.raises(SystemExit) as stop:
        run_stage(stage, *flags)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "continue with --resume" in err and "Traceback" not in err
    return err


def checkpoints_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_five_such_steps_in_a_row_stop_the_run(start, tmp_path, mixed, capsys, monkeypatch):
    """Four do not. What it leaves is the last good state: resumed without the cause, the run ends as it should."""
    flags = ("--weights", start("owl2"), "--data", mixed, "--steps", 14, "--batch", 4, "--micro", 2, *QUICK)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        states = poisoned(patch, (2, 3, 4, 5, 8, 9, 10, 11, 12, 13), lambda loss, parameter: loss * math.nan)
        err = stopped(capsys, "train_stage2", *flags, "--out", out)
    assert "stopped after step 12 (5 steps in a row had no finite loss and gradient)" in err
    assert checkpoints_of(out) == ["step-00000012"]
    assert not (out / "config.json").exists()
    assert [line["step"] for line in lines_of(out)] == list(range(1, 13))

    resumed = poisoned(monkeypatch, (), None)
    run_stage("train_stage2", *flags, "--out", out, "--resume")
    assert len(resumed) == 3
    assert_same_weights(resumed[0], states[7])
    assert any(not torch.equal(resumed[0][name], resumed[1][name]) for name in resumed[0])
    assert [line["step"] for line in lines_of(out)] == list(range(1, 15))
    assert all(line["loss"] is not None for line in lines_of(out)[12:])
    assert_finite(out)


def test_a_run_that_diverges_stops_and_stops_again(start, tmp_path, mixed, capsys):
    """At an absurd learning rate, without any help: the first step sends the weights where nothing is finite."""
    out = tmp_path / "out"
    flags = ("--weights", start("owl2"), "--data", mixed, "--out", out, "--steps", 20, "--batch", 2, "--micro", 2)
    flags = (*flags, *QUICK, "--warmup", 0, "--lr", 1e20)
    assert "5 steps in a row" in stopped(capsys, "train_stage2", *flags)
    assert checkpoints_of(out) == ["step-00000006"]
    assert "5 steps in a row" in stopped(capsys, "train_stage2", *flags, "--resume")
    assert len(checkpoints_of(out)) == 2
    assert not (out / "config.json").exists()


# ----------------------------------------------------------------------------------------------------
# Rows that cannot be used


def test_bad_rows_among_good_ones_are_counted_named_and_harmless(start, tmp_path, capsys):
    """In both stages, with micro-batches of one, so that some of them hold nothing at all."""
    rows = colour_rows(tmp_path, 6, seed=1)
    rows[1]["image"] = "gone.png"
    rows[3]["conversations"] = talk("<image>What?", "")
    rows[4] = {"id": "long", "conversations": talk("word " * 300, "yes")}
    data = write_rows(tmp_path / "data.json", rows)
    val = write_rows(tmp_path / "val.json", [rows[0], rows[2], {"id": "bad-val", "conversations": []}])
    steps, batch = 5, 4
    drawn = [index for keys in order_of(data, batch, 1, steps) for _, _, index in keys]
    for stage in ("train_stage1", "train_stage2"):
        for style in STYLES:
            out = tmp_path / f"{stage}-{style}"
            flags = ("--steps", steps, "--batch", batch, "--micro", 1, "--max-length", 100, *QUICK)
            run_stage(stage, "--weights", start(style), "--data", data, "--val", val, "--out", out, *flags)
            err = capsys.readouterr().err
            for index, kind, words in (
                (1, "missing image", "row 1 (id 1): there is no image"),
                (3, "malformed row", "row 3 (id 3): turn 1 is an empty answer"),
                (4, "too long", "row 4 (id long): its first turn"),
            ):
                assert f"{drawn.count(index)} x {kind}" in err
                assert f"{data}, {words}" in err
            assert f"{val}, row 2 (id bad-val)" in err  # of the validation data as well
            assert all(math.isfinite(line["loss"]) for line in lines_of(out) if "loss" in line)
            assert all(line["val_loss"] > 0 for line in lines_of(out) if "val_loss" in line)
            assert_finite(out)


def test_nothing_but_bad_rows_is_refused(start, tmp_path, capsys):
    """A wrong --image-root, say: the run says so before its first step, not after its last."""
    rows = [{"image": "gone.png", "conversations": talk("<image>a", "b")}] * 3
    data = write_rows(tmp_path / "data.json", rows)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run_stage("train_stage2", "--weights", start("owl2"), "--data", data, "--out", out, "--steps", 2, *QUICK)
    assert stop.value.code == 2
    assert "none of the first 3 rows" in capsys.readouterr().err
    assert not out.exists()


def test_a_step_of_bad_rows_teaches_nothing(start, tmp_path):
    """Loss 0, no NaN, and the weights are bit for bit the old ones: only the row that is never drawn is good."""
    bad = {"image": "gone.png", "conversations": talk("<image>a", "b")}
    rows = [bad] * 8
    data = write_rows(tmp_path / "data.json", rows)
    drawn = {index for keys in order_of(data, 2, 1, 3) for _, _, index in keys}
    rows[min(set(range(8)) - drawn)] = {"conversations": talk("a", "b")}
    write_rows(data, rows)
    out = tmp_path / "out"
    run_stage("train_stage2", "--weights", start("owl2"), "--data", data, "--out", out, "--steps", 3, "--batch", 2, "--micro", 1, *QUICK)
    assert losses_of(out) == [0.0, 0.0, 0.0]
    assert_same_weights(weights_of(out), weights_of(start("owl2")))


@pytest.fixture
def three_in_twenty(tmp_path):
    """A data file of 20 rows of which three cannot be used: of any 100 samples in a row, 15."""
    rows = [{"id": i, "conversations": talk("Say it.", f"number {i}")} for i in range(20)]
    rows[4] = {"id": 4, "image": "gone.png", "conversations": talk("<image>a", "b")}
    rows[9] = {"id": 9, "image": "lost.png", "conversations": talk("<image>a", "b")}
    rows[17]["conversations"] = talk("a", "")
    return write_rows(tmp_path / "data.json", rows)


def test_a_run_with_too_many_bad_rows_stops(start, tmp_path, three_in_twenty, capsys):
    """After the 100th sample, not before; with the list by kind, and a checkpoint to go on from once it is mended."""
    out = tmp_path / "out"
    flags = ("--weights", start("owl2"), "--data", three_in_twenty, "--out", out, "--steps", 12, "--batch", 10, "--micro", 5)
    err = stopped(capsys, "train_stage2", *flags, *QUICK)
    assert "stopped after step 10 (15 of 100 samples could not be used" in err and "--max-skipped" in err
    assert "skipped rows, each time they came up: 10 x missing image, 5 x malformed row" in err
    listed = err[err.index("skipped rows, each time") :]
    assert "  10 x missing image, e.g.\n" in listed and "  5 x malformed row, e.g.\n" in listed
    for row, image in ((4, "gone.png"), (9, "lost.png")):
        assert f"    {three_in_twenty}, row {row} (id {row}): there is no image {tmp_path / image}\n" in listed
    assert listed.count(f"    {three_in_twenty}, row 17 (id 17): turn 1 is an empty answer\n") == 1  # named once
    assert checkpoints_of(out) == ["step-00000010"]
    assert not (out / "config.json").exists()
    run_stage("train_stage2", *flags, *QUICK, "--resume", "--max-skipped", 0.2)
    assert [line["step"] for line in lines_of(out)] == list(range(1, 13))
    assert (out / "config.json").exists()


def test_a_run_with_as_many_bad_rows_as_are_allowed_goes_on(start, tmp_path, three_in_twenty, capsys):
    """Exactly the share that is allowed; and, of fewer than 100 samples, any share."""
    flags = ("--weights", start("owl2"), "--data", three_in_twenty, "--batch", 10, "--micro", 5, *QUICK)
    run_stage("train_stage2", *flags, "--out", tmp_path / "allowed", "--steps", 10, "--max-skipped", 0.15)
    run_stage("train_stage2", *flags, "--out", tmp_path / "early", "--steps", 9, "--max-skipped", 0)
    err = capsys.readouterr().err
    assert "stopped" not in err and err.count("the model is in") == 2


def bare_folder(folder: Path, model: Path) -> Path:
    """What describes a model, without its weights."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(model / name, folder / name)
    return folder


def test_check_reads_no_weights(start, tmp_path, mixed):
    """A look at the data before a 7B need not wait for the 7B: config.json and the tokenizer will do."""
    folder = bare_folder(tmp_path / "no-weights", start("owl2"))
    with pytest.raises(SystemExit) as stop:
        run_stage("train_stage2", "--weights", folder, "--data", mixed, "--check", "--image-size", 0)
    assert stop.value.code == 0


def test_check_looks_at_the_data_and_trains_nothing(start, tmp_path, mixed, capsys):
    bad = write_rows(tmp_path / "bad.json", [{"conversations": talk("a", "b")}, {"id": 5}])
    for data, code in ((mixed, 0), (bad, 1)):
        with pytest.raises(SystemExit) as stop:
            run_stage("train_stage2", "--weights", start("owl2"), "--data", data, "--check", "--image-size", 0)
        assert stop.value.code == code
    out = capsys.readouterr().out
    assert "12 rows: 12 usable (6 text only), 0 not" in out
    assert "1 x malformed row" in out and "row 1 (id 5)" in out
    assert "[[" in out


# ----------------------------------------------------------------------------------------------------
# What it would take


def dry_run(capsys, stage: str, *flags: object) -> tuple[int, str, dict[str, float]]:
    """(exit code, what is printed, the gigabytes in it by kind) of a run that is only reckoned."""
    with pytest.raises(SystemExit) as stop:
        run_stage(stage, *flags)
    out, err = capsys.readouterr()
    assert err == ""
    rows = re.findall(r"^  (\w+) +([\d.]+) GB(?: of [\d.]+ GB: (?:it should fit|it does not fit))?$", out, re.MULTILINE)
    return stop.value.code, out, {kind: float(number) for kind, number in rows}


def test_dry_run_reads_no_weights_and_writes_nothing(start, tmp_path, mixed, capsys):
    folder = bare_folder(tmp_path / "no-weights", start("owl1"))
    before = sorted(tmp_path.rglob("*"))
    flags = ("--weights", folder, "--data", mixed, "--batch", 4, "--micro", 2, "--image-size", 0)
    for where in ((), ("--out", tmp_path / "out")):
        code, out, gigabytes = dry_run(capsys, "train_stage2", *flags, *where, "--dry-run")
        assert code == 0 and "it should fit" in out
        assert list(gigabytes) == ["weights", "gradients", "optimizer", "activations", "all"]
    owl = Owl(tiny("owl1"))
    n_frozen = sum(p.numel() for p in owl.parameters())
    shown = [line.split() for line in out.splitlines() if "frozen" in line]
    # LoRA's two matrices of rank 8, of q_proj and v_proj in both layers, 32 wide.
    n_trained = 2 * 2 * 2 * 8 * 32
    assert ["all", f"{n_trained:,}", "trained", f"{n_frozen:,}", "frozen"] in shown
    assert ["vit", "0", "trained", f"{sum(p.numel() for p in owl.vit.parameters()):,}", "frozen"] in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("precision, frozen_bytes", [("fp32", 4), ("bf16", 2)])
def test_dry_run_adds_up_what_is_trained_and_what_is_not(tmp_path, mixed, capsys, monkeypatch, precision, frozen_bytes):
    """Stage 1 of a middle-sized owl: 4 bytes a trained weight, 4 its gradient, 8 AdamW's moments; and what fits."""
    preset = ("--preset", "mid-owl2", "--tokenizer", GOLDEN / "text", "--image-size", 56, "--precision", precision)
    flags = (*preset, "--data", mixed, "--batch", 4, "--micro", 2)
    with torch.device("meta"):
        config = model_module.PRESETS["mid-owl2"]()
        config.llama.vocab_size = 2000
        config.resize(56)
        owl = Owl(config)
    train_stage1.choose_trained(owl)
    n_trained = sum(p.numel() for p in owl.parameters() if p.requires_grad)
    n_frozen = sum(p.numel() for p in owl.parameters() if not p.requires_grad)

    monkeypatch.setattr(launch, "device_memory", lambda device: 10**9)
    code, out, gigabytes = dry_run(capsys, "train_stage1", *flags, "--dry-run")
    assert code == 0 and "of 1.00 GB: it should fit" in out
    assert [line.split()[1::2] for line in out.splitlines() if line.startswith("  all")][0] == [f"{n_trained:,}", f"{n_frozen:,}"]
    expected = {"weights": 4 * n_trained + frozen_bytes * n_frozen, "gradients": 4 * n_trained, "optimizer": 8 * n_trained}
    for kind, n in expected.items():
        assert gigabytes[kind] == pytest.approx(n / 1e9, abs=0.005), kind
    assert 0.01 < gigabytes["activations"] < 1
    parts = ("weights", "gradients", "optimizer", "activations")
    assert gigabytes["all"] == pytest.approx(sum(gigabytes[kind] for kind in parts), abs=0.02)
    assert re.search(rf"for 2 samples of \d+ positions with {heaviest_images(mixed)} images:", out)

    monkeypatch.setattr(launch, "device_memory", lambda device: 10**8)
    code, out, _ = dry_run(capsys, "train_stage1", *flags, "--dry-run")
    assert code == 1 and "of 0.10 GB: it does not fit" in out


def test_dry_run_divides_a_sharded_model_by_the_devices_of_a_node(mixed, capsys):
    preset = ("--preset", "mid-owl2", "--tokenizer", GOLDEN / "text", "--image-size", 56, "--data", mixed)
    flags = (*preset, "--batch", 4, "--micro", 2, "--parallel", "fsdp")
    one = dry_run(capsys, "train_stage2", *flags, "--dry-run")[2]
    eight = dry_run(capsys, "train_stage2", *flags, "--dry-run", 8)[2]
    assert list(eight) == ["weights", "gradients", "optimizer", "gathered", "activations", "all"]
    for kind in ("weights", "gradients", "optimizer"):
        assert eight[kind] == pytest.approx(one[kind] / 8, abs=0.01) and eight[kind] > 0
    assert eight["gathered"] == one["gathered"] > 0 and eight["activations"] == one["activations"]


def heaviest_images(path: Path) -> int:
    """The most images in one of the first four micro-batches, two samples each, of a run with four a step."""
    data = source(path, "owl2")
    return max(sum(len(data[key[0], key[2]].images) for key in keys) for keys in order_of(path, 4, 2, 2))


# ----------------------------------------------------------------------------------------------------
# Validation, precision, the global batch


def loss_by_hand(folder: Path, path: Path, style: str, fit: str) -> float:
    """The mean over all supervised tokens, row by row from the logits."""
    owl = load_model(folder)
    data = source(path, style, fit)
    total = 0.0
    n_token = 0
    for index in range(len(data)):
        sample = data[0, index]
        images = sample.images if len(sample.images) else None
        with torch.no_grad():
            logits = owl(torch.tensor([sample.ids]), images)[0][0]
        for position, label in enumerate(sample.labels):
            if label != IGNORE:
                total += F.cross_entropy(logits[position - 1], torch.tensor(label)).item()
                n_token += 1
    return total / n_token


@pytest.mark.parametrize("style, fit", [("owl1", "stretch"), ("owl2", "pad")])
def test_validation_loss_is_the_loss_by_hand_whatever_the_micro_batch(start, tmp_path, mixed, style, fit):
    """In evaluation mode (Owl1 has dropout), without crops, over all tokens of all rows."""
    for micro in (1, 4):
        out = tmp_path / str(micro)
        flags = ("--steps", 2, "--batch", 4, "--micro", micro, *QUICK, "--crop-scale", 0.5)
        run_stage("train_stage1", "--weights", start(style, 0.1), "--data", mixed, "--val", mixed, "--out", out, *flags)
        (val_loss,) = [line["val_loss"] for line in lines_of(out) if "val_loss" in line]
        assert val_loss == pytest.approx(loss_by_hand(out, mixed, style, fit), abs=1e-5)


def test_the_step_is_the_mean_over_its_tokens_however_it_is_cut_up(start, tmp_path, mixed):
    """Micro-batches of 1, 2 and 8 of samples with unequal numbers of supervised tokens: the same losses."""
    runs = []
    for micro in (1, 2, 8):
        out = tmp_path / str(micro)
        flags = ("--steps", 8, "--batch", 8, "--micro", micro, *QUICK)
        run_stage("train_stage2", "--weights", start("owl2"), "--data", mixed, "--out", out, *flags)
        runs.append(losses_of(out))
    assert runs[0] == pytest.approx(runs[2], abs=1e-5)
    assert runs[1] == pytest.approx(runs[2], abs=1e-5)
    data = source(mixed, "owl2", "square")
    (first,) = order_of(mixed, 8, 8, 1)
    batch = collate([data[0, index] for _, _, index in first])
    with torch.no_grad():
        documents = Documents(batch.starts, batch.longest)
        loss = load_model(start("owl2"))(batch.ids, batch.images, batch.labels, documents)[1]
    assert runs[0][0] == pytest.approx(loss.item(), abs=1e-5)


def test_mixed_precision_trains_close_to_float32(start, tmp_path, mixed):
    """The path that CUDA takes, on the CPU: bfloat16 products, and the model is saved in bfloat16."""
    flags = ("--steps", 5, "--batch", 4, "--micro", 2, *QUICK)
    for style in STYLES:
        run_stage("train_stage2", "--weights", start(style), "--data", mixed, "--out", tmp_path / f"{style}-32", *flags)
        bf16 = (*flags, "--precision", "bf16")
        run_stage("train_stage2", "--weights", start(style), "--data", mixed, "--out", tmp_path / f"{style}-16", *bf16)
        full = losses_of(tmp_path / f"{style}-32")
        half = losses_of(tmp_path / f"{style}-16")
        assert half != full
        assert half == pytest.approx(full, rel=0.02)
        assert_finite(tmp_path / f"{style}-16")
        assert {tensor.dtype for tensor in weights_of(tmp_path / f"{style}-32").values()} == {torch.float32}
        for key, tensor in weights_of(tmp_path / f"{style}-16").items():
            assert tensor.dtype == (torch.float32 if key.endswith("_pos_embed") else torch.bfloat16), key


# ----------------------------------------------------------------------------------------------------
# The command line

ALL = ("train_stage0", "train_stage1", "train_stage2")


def refusal(capsys, stage: str, *flags: object) -> str:
    """The one line with which a command line is refused; exit code 2, and nothing else on either stream."""
    with pytest.raises(SystemExit) as stop:
        run_stage(stage, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.fixture
def usable(start, tmp_path, mixed):
    """usable(stage) -> flags that would run, to which a test adds its mistake (the last of equal flags counts)."""

    def flags(stage: str) -> tuple:
        place = ("--data", mixed, "--out", tmp_path / "out", "--image-size", 0, "--batch", 4, "--micro", 2, "--steps", 2)
        if stage == "train_stage0":
            return (*place, "--preset", "tiny-owl2", "--tokenizer", GOLDEN / "text")
        return (*place, "--weights", start("owl1"))

    return flags


MISTAKES = [
    (ALL, ("--data", "no-such.json"), "no-such.json"),
    (ALL, ("--val", "no-such.json"), "no-such.json"),
    (ALL, ("--data", "TMP/broken.json"), "broken.json is not valid JSON"),
    (ALL, ("--data", "TMP/empty.json"), "at least one"),
    (ALL, ("--data", "TMP"), "no data file"),
    (ALL[1:], ("--weights", "no-such-folder"), "no-such-folder"),
    (ALL[1:], ("--weights", "TMP"), "TMP"),
    (ALL[1:], ("--weights", "TMP", "--tokenizer", GOLDEN / "text"), "config.json"),
    (ALL, ("--tokenizer", "no-such-tokenizer"), "no-such-tokenizer"),
    (ALL, ("--tokenizer", "TMP/broken.json"), "not a SentencePiece model"),
    (ALL, ("--batch", "3"), "--batch 3"),
    (ALL, ("--device", "banana"), "banana"),
    (ALL, ("--device", "cuda"), "cuda"),
    (ALL, ("--device", "mps"), "mps"),
    (ALL, ("--steps", "0"), "--steps"),
    (ALL, ("--batch", "-4"), "--batch"),
    (ALL, ("--micro", "0"), "--micro"),
    (ALL, ("--lr", "0"), "--lr"),
    (ALL, ("--lr", "nan"), "lr"),
    (ALL, ("--lr", "inf"), "lr"),
    (ALL, ("--min-lr", "-1"), "--min-lr"),
    (ALL, ("--warmup", "-1"), "--warmup"),
    (ALL, ("--betas", "1.5", "0.9"), "beta"),
    (ALL, ("--eps", "0"), "--eps"),
    (ALL, ("--weight-decay", "-1"), "--weight-decay"),
    (ALL, ("--weight-decay", "nan"), "--weight-decay"),
    (ALL, ("--grad-clip", "0"), "--grad-clip"),
    (ALL, ("--grad-clip", "nan"), "--grad-clip"),
    (ALL, ("--max-length", "0"), "--max-length"),
    (ALL[1:], ("--image-size", "30"), "30"),
    (ALL, ("--image-size", "-14"), "--image-size"),
    (ALL, ("--vit-lr-decay", "nan"), "--vit-lr-decay"),
    (ALL, ("--crop-scale", "-1"), "--crop-scale"),
    (ALL, ("--crop-scale", "1.5"), "--crop-scale"),
    (ALL, ("--workers", "-1"), "--workers"),
    (ALL, ("--mix", "no-such.json:2"), "give --data"),  # not both
    (ALL, ("--keep", "0"), "--keep"),
    (ALL, ("--max-skipped", "-0.1"), "--max-skipped"),
    (ALL, ("--max-skipped", "nan"), "--max-skipped"),
    (ALL, ("--max-skipped", "2"), "--max-skipped"),  # not per cent
    (ALL, ("--log-every", "0"), "--log-every"),
    (ALL, ("--val-every", "0"), "--val-every"),
    (ALL, ("--save-every", "0"), "--save-every"),
    (ALL, ("--out", "TMP/broken.json"), "broken.json"),
    (ALL[1:], ("--out", "TMP/other-weights"), "other-weights"),
    (ALL[2:], ("--lora-rank", "-1"), "--lora-rank"),
    (ALL[2:], ("--lora-dropout", "1.5"), "--lora-dropout"),
    (ALL[2:], ("--lora-alpha", "nan"), "--lora-alpha"),
]


@pytest.mark.parametrize("stages, mistake, words", MISTAKES, ids=[" ".join(map(str, mistake)) for _, mistake, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_one_sentence(usable, tmp_path, capsys, stages, mistake, words):
    """Exit code 2, one line, before anything is trained or written."""
    (tmp_path / "broken.json").write_text('[{"a": 1}')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "other-weights").mkdir()
    (tmp_path / "other-weights" / "pytorch_model.bin").write_bytes(b"")
    mistake = [str(part).replace("TMP", str(tmp_path)) for part in mistake]
    for stage in stages:
        error = refusal(capsys, stage, *usable(stage), *mistake)
        assert words.replace("TMP", str(tmp_path)) in error
        assert not (tmp_path / "out").exists()


def without(flags: tuple, name: str) -> tuple:
    """The flags less one and its value."""
    place = flags.index(name)
    return flags[:place] + flags[place + 2 :]


def test_what_a_stage_cannot_do_without_is_named(usable, start, tmp_path, capsys, monkeypatch):
    for stage in ALL:
        error = refusal(capsys, stage, *without(usable(stage), "--data"))
        assert "--data" in error and "--mix" in error
        for mix, words in ((("MIXED:0",), "above 0"), (("MIXED:1", "no-such.json:2"), "no-such.json"), ((":1",), "path")):
            mix = [text.replace("MIXED", str(usable(stage)[1])) for text in mix]
            assert words in refusal(capsys, stage, *without(usable(stage), "--data"), "--mix", *mix)
        for weights in (("1", "1e-9"), ("nan", "1"), ("-2", "1")):
            mix = [f"{usable(stage)[1]}:{weight}" for weight in weights]
            assert "weight" in refusal(capsys, stage, *without(usable(stage), "--data"), "--mix", *mix)
        assert "--out" in refusal(capsys, stage, *without(usable(stage), "--out"))
    assert "--tokenizer" in refusal(capsys, "train_stage0", *without(usable("train_stage0"), "--tokenizer"))
    assert "--preset" in refusal(capsys, "train_stage0", *without(usable("train_stage0"), "--preset"))
    assert "tiny" in refusal(capsys, "train_stage0", *usable("train_stage0"), "--preset", "owl2-7b")
    bare = without(usable("train_stage1"), "--weights")
    for part in ((), ("--preset", "tiny-owl2"), ("--preset", "tiny-owl2", "--clip", tmp_path), ("--clip", tmp_path, "--llama", tmp_path)):
        assert "--weights" in refusal(capsys, "train_stage1", *bare, *part)
    empty = ("--preset", "tiny-owl2", "--clip", tmp_path, "--llama", start("owl1"))
    assert str(tmp_path) in refusal(capsys, "train_stage1", *bare, *empty)
    assert "--weights" in refusal(capsys, "train_stage2", *without(usable("train_stage2"), "--weights"))

    small = tmp_path / "small"
    owl = Owl(make_config("owl2", vit={"image_size": SIZE, "patch_size": 14}))  # 40 words
    owl.tokenizer_folder = GOLDEN / "text"
    save_model(owl.init_weights(), small)
    for stage in ALL[1:]:
        error = refusal(capsys, stage, *usable(stage), "--weights", small)
        assert "2000" in error and "40" in error


def test_the_folder_it_starts_from_is_not_overwritten(start, tmp_path, mixed, capsys):
    """--out that is --weights would replace the model that a resumed run begins with."""
    folder = tmp_path / "model"
    shutil.copytree(start("owl1"), folder)
    flags = ("--weights", folder, "--data", mixed, "--out", folder, "--batch", 2, "--micro", 2, "--steps", 1, "--image-size", 0)
    assert str(folder) in refusal(capsys, "train_stage2", *flags)
    assert_same_weights(weights_of(folder), weights_of(start("owl1")))


def test_the_script_itself_refuses_in_one_line(start, mixed):
    """Once as a user types it: a process, its exit code and its stderr."""
    command = [sys.executable, "train_stage2.py", "--weights", str(start("owl2")), "--data", str(mixed), "--batch", "3"]
    done = subprocess.run([*command, "--out", "x", "--image-size", "0"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("error: --batch 3")
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("flags", [("--preset", "owl3"), ("--steps", "many"), ("--fit", "squash"), ("--precision", "banana"), ("--parallel", "tensor"), ("--mix",), ("--no-such-flag",)])
def test_argparse_mistakes_exit_with_2(flags, mixed, capsys):
    for stage in ALL:
        with pytest.raises(SystemExit) as stop:
            run_stage(stage, "--data", mixed, *flags)
        assert stop.value.code == 2
        assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ALL)
def test_help_shows_the_flags(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        run_stage(stage, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    flags = ["--preset", "--weights", "--data", "--mix", "--out", "--resume", "--check", "--dry-run", "--lr", "--grad-clip"]
    for flag in [*flags, "--workers", "--parallel", "--precision", "--recompute", "--compile", "--keep", "--max-skipped"]:
        assert flag in out
    assert ("--llama" in out) == (stage == "train_stage1")
    assert ("--lora-rank" in out) == (stage == "train_stage2")


@pytest.mark.parametrize("seed", [20240101, 2**33, -1])
def test_any_seed_does(start, tmp_path, mixed, capsys, seed):
    """A date as a seed: crops and dropout draw from it, and no image becomes unreadable for it."""
    flags = ("--steps", 1, "--batch", 2, "--micro", 2, *QUICK, "--crop-scale", 0.5)
    run_stage("train_stage2", "--weights", start("owl1"), "--data", mixed, "--out", tmp_path / "out", *flags, "--seed", seed)
    assert "skipped" not in capsys.readouterr().err
    assert losses_of(tmp_path / "out")[0] > 0
