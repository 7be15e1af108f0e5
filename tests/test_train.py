"""Training as a user runs it: what is trained, with which numbers, resumed, on two processes, and what is refused."""

import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import lora
import model as model_module
import train
import train_stage0
import train_stage1
import train_stage2
from conftest import GOLDEN, ROOT, make_config, make_owl
from data.conversations import Conversations, Order, Sample, collate
from data.image import load_image, to_pixels
from data.text import Tokenizer
from evaluate import ask
from lora import LoRALinear
from model import IGNORE, Owl
from train import Recipe, learning_rate, make_optimizer, vit_depth
from weights import load_model, official_name, save_model

STYLES = ("owl1", "owl2")
SIZE = 28
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (235, 235, 235)}
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
    """The metrics, but for how fast it went."""
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines_of(out)]


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
        assert set(line) == {"step", "loss", "lr", "norm", "tokens_per_s"}
        assert line["lr"] == pytest.approx(learning_rate(line["step"] - 1, recipe))
        assert line["norm"] > 0 and line["tokens_per_s"] > 0
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
    data = Conversations(mixed, Tokenizer(base), "owl1", 4, SIZE, 200, "stretch")
    batch = collate([data[0, index] for index in range(len(data))])
    with torch.no_grad():
        expected = merged(batch.ids, batch.images)[0]
        actual = adapted(batch.ids, batch.images)[0]
        plain = load_model(base)(batch.ids, batch.images)[0]
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
    drawn = [index for keys in Order(6, 0, batch, 1, 0, 1, range(steps)) for _, index in keys]
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
                assert words in err
            assert "bad-val" in err  # of the validation data as well
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
    order = next(iter(Order(8, 0, 8, 8, 0, 1, range(1))))
    rows = [bad] * 8
    rows[order[-1][1]] = {"conversations": talk("a", "b")}
    data = write_rows(tmp_path / "data.json", rows)
    out = tmp_path / "out"
    run_stage("train_stage2", "--weights", start("owl2"), "--data", data, "--out", out, "--steps", 3, "--batch", 2, "--micro", 1, *QUICK)
    assert losses_of(out) == [0.0, 0.0, 0.0]
    assert_same_weights(weights_of(out), weights_of(start("owl2")))


def test_check_reads_no_weights(start, tmp_path, mixed):
    """A look at the data before a 7B need not wait for the 7B: config.json and the tokenizer will do."""
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(start("owl2") / name, folder / name)
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
# Validation, precision, the global batch


def loss_by_hand(folder: Path, path: Path, style: str, fit: str) -> float:
    """The mean over all supervised tokens, row by row from the logits."""
    owl = load_model(folder)
    data = Conversations(path, Tokenizer(folder), style, owl.config.image_words, SIZE, 256, fit)
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
    data = Conversations(mixed, Tokenizer(start("owl2")), "owl2", 4, SIZE, 256, "pad")
    first = next(iter(Order(len(data), 0, 8, 8, 0, 1, range(1))))
    batch = collate([data[key] for key in first])
    with torch.no_grad():
        loss = load_model(start("owl2"))(batch.ids, batch.images, batch.labels)[1]
    assert runs[0][0] == pytest.approx(loss.item(), abs=1e-5)


def test_mixed_precision_trains_close_to_float32(start, tmp_path, mixed, monkeypatch):
    """The path that CUDA takes, on the CPU: bfloat16 products, float32 weights."""
    flags = ("--steps", 5, "--batch", 4, "--micro", 2, *QUICK)
    for style in STYLES:
        run_stage("train_stage2", "--weights", start(style), "--data", mixed, "--out", tmp_path / f"{style}-32", *flags)
        with monkeypatch.context() as patch:
            patch.setattr(train, "mixed_precision", lambda place: torch.autocast("cpu", torch.bfloat16))
            run_stage("train_stage2", "--weights", start(style), "--data", mixed, "--out", tmp_path / f"{style}-16", *flags)
        full = losses_of(tmp_path / f"{style}-32")
        half = losses_of(tmp_path / f"{style}-16")
        assert half != full
        assert half == pytest.approx(full, rel=0.02)
        assert_finite(tmp_path / f"{style}-16")
        assert {tensor.dtype for tensor in weights_of(tmp_path / f"{style}-16").values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------
# Resume

# The stage, but a step takes a while: time enough to be killed in the middle.
SLOW_STAGE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train, train_stage2
rate = train.learning_rate
def slow_rate(step, recipe):
    time.sleep(0.1)
    return rate(step, recipe)
train.learning_rate = slow_rate
train_stage2.main()
"""
RESUMABLE = ("--steps", 12, "--batch", 4, "--micro", 2, "--save-every", 4, "--val-every", 4, "--workers", 1)
RESUMABLE += ("--crop-scale", 0.5, "--lora-dropout", 0.3, *QUICK)


@pytest.fixture(scope="module")
def uninterrupted(start, mixed, tmp_path_factory):
    """(the flags but --out, the folder) of a run with accumulation, dropout, crops and a worker."""
    torch.set_num_threads(1)
    flags = ("--weights", start("owl1", 0.1), "--data", mixed, "--val", mixed, *RESUMABLE)
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_stage("train_stage2", *flags, "--out", out)
    return flags, out


def wait_for(condition, process: subprocess.Popen, what: str) -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, f"ended before {what}: {process.communicate()[1]}"
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics (but the speed), final weights, adapter, and the optimizer's state, bit for bit."""
    assert timeless(a) == timeless(b)
    assert_same_weights(weights_of(a), weights_of(b))
    assert_same_weights(load_file(a / "adapter" / "adapter_model.safetensors"), load_file(b / "adapter" / "adapter_model.safetensors"))
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["state"] for folder in (a, b)]
    for index, state in states[0].items():
        assert_same_weights(state, states[1][index])


def test_killed_and_resumed_is_the_same_run_bit_for_bit(uninterrupted, tmp_path):
    """By SIGTERM and by Ctrl-C, which reach the loading processes too, and by SIGKILL between two checkpoints."""
    flags, whole = uninterrupted
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    processes = {}
    for kind in signals:
        command = [sys.executable, "-c", SLOW_STAGE, *map(str, flags), "--out", str(tmp_path / kind.name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes[kind] = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    for kind, process in processes.items():
        out = tmp_path / kind.name
        metrics = out / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 6, process, "step 5")
        os.killpg(process.pid, kind)
    for kind, process in processes.items():
        out = tmp_path / kind.name
        err = process.communicate(timeout=60)[1]
        assert "Traceback" not in err, err
        assert not (out / "config.json").exists()  # no model: the run has not ended
        step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
        assert 4 <= step < 12
        if kind == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
            assert step % 4 == 0 and lines_of(out)[-1]["step"] >= step
            with (out / "metrics.jsonl").open("a") as file:
                file.write('{"step": 11, "loss": 7.0}\n{"step": 12, "lo')  # and the line it was writing
            (out / "checkpoint.pt.part").write_bytes(b"half a checkpoint")
        else:
            assert f"stopped after step {step}: continue with --resume" in err
            assert lines_of(out)[-1]["step"] == step  # it lost nothing
        run_stage("train_stage2", *flags, "--out", out, "--resume")
        assert_same_run(out, whole)


def test_resuming_a_finished_run_is_harmless(uninterrupted, tmp_path):
    flags, whole = uninterrupted
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    run_stage("train_stage2", *flags, "--out", out, "--resume")
    assert_same_run(out, whole)
    assert lines_of(out) == lines_of(whole)


def test_resume_without_a_checkpoint_starts_from_the_beginning(uninterrupted, tmp_path):
    flags, whole = uninterrupted
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')
    run_stage("train_stage2", *flags, "--out", out, "--resume")
    assert_same_run(out, whole)


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


@pytest.mark.parametrize(
    "change, words",
    [
        (("--lr", "2e-3"), "lr"),
        (("--steps", "13"), "steps"),
        (("--batch", "8"), "batch"),
        (("--seed", "1"), "seed"),
        (("--crop-scale", "0.6"), "crop_scale"),
        (("--betas", "0.8", "0.9"), "betas"),
        (("--lora-rank", "4"), ""),
        (("--lora-alpha", "16"), "lora_alpha"),
        (("--lora-dropout", "0.1"), "lora_dropout"),
        (("--fit", "pad"), "fit"),
        (("--train-abstractor",), ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_resuming_with_other_settings_is_refused(uninterrupted, capsys, change, words):
    """Each would make another run of it, in silence; the sentence names what differs."""
    flags, whole = uninterrupted
    before = (whole / "metrics.jsonl").read_text()
    error = refusal(capsys, "train_stage2", *flags, "--out", whole, "--resume", *change)
    assert "checkpoint.pt" in error and words in error
    assert (whole / "metrics.jsonl").read_text() == before


def test_a_folder_that_holds_a_run_is_not_overwritten(uninterrupted, capsys):
    flags, whole = uninterrupted
    error = refusal(capsys, "train_stage2", *flags, "--out", whole)
    assert str(whole) in error and "--resume" in error


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other"])
def test_a_corrupt_checkpoint_is_one_sentence(uninterrupted, tmp_path, capsys, damage):
    flags, whole = uninterrupted
    path = tmp_path / "checkpoint.pt"
    content = (whole / "checkpoint.pt").read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"\x93garbage" * 99, "other": b""}[damage])
    if damage == "other":
        torch.save({"weight": torch.ones(3)}, path)
    error = refusal(capsys, "train_stage2", *flags, "--out", tmp_path, "--resume")
    assert str(path) in error


# ----------------------------------------------------------------------------------------------------
# Two processes


def start_two(stage: str, *flags: object) -> subprocess.Popen:
    """Starts a stage on two gloo processes, as `torchrun --nproc_per_node=2 stage.py ...` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{stage}.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, flags)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish_two(process: subprocess.Popen) -> str:
    try:
        err = process.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"two processes hang: {process.communicate()[1]}") from None
    assert process.returncode == 0, err
    return err


def has_images(data: Conversations, keys: list) -> bool:
    return any(len(data[key].images) for key in keys)


def assert_ranks_differ(path: Path, style: str, batch: int, micro: int, steps: int) -> None:
    """The data is what it should be: ranks that see only text beside ranks that see images, in every combination."""
    data = Conversations(path, Tokenizer(GOLDEN / "text"), style, 4, SIZE, 256, "stretch")
    ranks = [list(Order(len(data), 0, batch, micro, rank, 2, range(steps))) for rank in range(2)]
    accumulate = batch // micro // 2
    assert accumulate > 1
    one_rank_text = last_micro_text_only = unequal = 0
    for step in range(steps):
        parts = [[has_images(data, keys) for keys in rank[step * accumulate : (step + 1) * accumulate]] for rank in ranks]
        one_rank_text += any(parts[0]) != any(parts[1])
        last_micro_text_only += (any(parts[0]) or any(parts[1])) and not parts[0][-1] and not parts[1][-1]
        counts = []
        for rank in ranks:
            keys = [key for keys in rank[step * accumulate : (step + 1) * accumulate] for key in keys]
            counts.append(collate([data[key] for key in keys]).n_supervised)
        unequal += counts[0] != counts[1]
    assert one_rank_text >= 2 and last_micro_text_only >= 1 and unequal >= steps // 2


def compare_two_with_one(stage: str, style: str, start, tmp_path, mixed, *more: object) -> None:
    """20 steps on two processes and on one: losses and validation losses to 1e-5, gradient norms, and the weights."""
    assert_ranks_differ(mixed, style, batch=4, micro=1, steps=20)
    flags = ("--weights", start(style), "--data", mixed, "--val", mixed, "--steps", 20, "--batch", 4, *QUICK, *more)
    process = start_two(stage, *flags, "--micro", 1, "--val-every", 10, "--out", tmp_path / "two")
    run_stage(stage, *flags, "--micro", 2, "--val-every", 10, "--out", tmp_path / "one")
    err = finish_two(process)
    assert err.count("the model is in") == 1  # the first process alone writes and speaks
    one = timeless(tmp_path / "one")
    two = timeless(tmp_path / "two")
    assert len(one) == len(two) == 22
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name, tolerance in (("loss", {"abs": 1e-5}), ("val_loss", {"abs": 1e-5}), ("norm", {"rel": 1e-4})):
            if name in a:
                assert a[name] == pytest.approx(b[name], **tolerance), name
    assert len(set(losses_of(tmp_path / "one"))) == 20
    before, after = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-4)


def test_two_processes_train_owl2_as_one_does(start, tmp_path, mixed):
    compare_two_with_one("train_stage2", "owl2", start, tmp_path, mixed)


def test_two_processes_train_owl1s_adapter_as_one_does(start, tmp_path, mixed):
    compare_two_with_one("train_stage2", "owl1", start, tmp_path, mixed, "--lora-dropout", 0)


@pytest.mark.parametrize("style", STYLES)
def test_two_processes_train_stage_1_as_one_does(start, tmp_path, mixed, style):
    """Here a rank of pure text uses nothing at all that is trained."""
    crops = ("--crop-scale", 0.5)
    compare_two_with_one("train_stage1", style, start, tmp_path, mixed, *crops)


# ----------------------------------------------------------------------------------------------------
# The command line

ALL = ("train_stage0", "train_stage1", "train_stage2")


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


@pytest.mark.parametrize("flags", [("--preset", "owl3"), ("--steps", "many"), ("--fit", "squash"), ("--no-such-flag",)])
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
    for flag in ("--preset", "--weights", "--data", "--out", "--resume", "--check", "--lr", "--grad-clip", "--workers"):
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
