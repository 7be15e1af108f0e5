"""LoRA: a fresh adapter changes nothing, the frozen stays frozen, merging is exact both ways, and PEFT agrees."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import weights
from model import Owl

STYLES = ("owl1", "owl2")
OWL1_TARGETS = ("q_proj", "v_proj")
OWL2_TARGETS = (
    "q_proj",
    "k_proj.multiway.0",
    "k_proj.multiway.1",
    "v_proj.multiway.0",
    "v_proj.multiway.1",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
TARGETS = {"owl1": OWL1_TARGETS, "owl2": OWL2_TARGETS}


def official(style: str):
    """The function that lora.save and lora.load take for an owl of that style."""
    return lambda name: weights.official_name(name, style)


def logits_of(model: Owl, batch) -> torch.Tensor:
    ids, images = batch
    with torch.no_grad():
        return model(ids, images)[0]


def randomize(model: torch.nn.Module, seed: int = 1) -> None:
    """Gives the adapter matrices as training would leave them: none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in lora.adapted(model):
        for matrix in (module.lora_A.weight, module.lora_B.weight):
            matrix.data.normal_(std=0.2, generator=generator)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def owl_and_batch(tiny_config, tiny_owl, random_row, random_images, padded):
    """owl_and_batch(style) -> (model, (ids, images)): two rows, one with an image."""

    def make(style: str, **changes):
        config = tiny_config(style, **changes)
        generator = torch.Generator().manual_seed(0)
        ids, _ = padded([random_row(config, 8, 1, generator), random_row(config, 6, 0, generator)])
        return tiny_owl(config), (ids, random_images(config, 1, generator))

    return make


# ----------------------------------------------------------------------------------------------------
# What it does to a model


@pytest.mark.parametrize("style", STYLES)
def test_a_fresh_adapter_changes_nothing(owl_and_batch, style):
    """Bit for bit: logits, and the state that save_model would write."""
    model, batch = owl_and_batch(style)
    expected = logits_of(model, batch)
    state = {key: tensor.detach().clone() for key, tensor in weights.official_state(model).items()}
    lora.wrap(model, TARGETS[style], rank=4, alpha=8, dropout=0.5)
    assert torch.equal(logits_of(model, batch), expected)
    after = weights.official_state(model)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    lora.merge(model)
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("style", STYLES)
def test_only_the_adapter_is_trained(owl_and_batch, style):
    """After some steps everything else is bit-identical, and every matrix of the adapter has moved."""
    model, (ids, images) = owl_and_batch(style)
    base = snapshot(model)
    n_wrapped = len(TARGETS[style]) * model.config.llama.n_layer
    lora.wrap(model, TARGETS[style], rank=4, alpha=8, dropout=0.05)
    fresh = snapshot(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * n_wrapped
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(5):
        _, loss = model(ids, images, ids.clamp(min=0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = snapshot(model)
    for name in base:
        assert torch.equal(after[name], base[name]), name
    for name in trained:
        assert not torch.equal(after[name], fresh[name]), name
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert parameter.grad is None, name


@pytest.mark.parametrize("style", STYLES)
def test_merged_equals_unmerged_and_back(owl_and_batch, style):
    """To 1e-5 in float32 merged; bit for bit after unmerge, again and again."""
    model, batch = owl_and_batch(style)
    plain = logits_of(model, batch)
    lora.wrap(model, TARGETS[style], rank=4, alpha=2)
    randomize(model)
    before = snapshot(model)
    adapted = logits_of(model, batch)
    assert (adapted - plain).abs().max() > 0.01, "the adapter does something"
    for _ in range(3):
        lora.merge(model)
        lora.merge(model)
        torch.testing.assert_close(logits_of(model, batch), adapted, rtol=0, atol=1e-5)
        lora.unmerge(model)
        lora.unmerge(model)
        assert torch.equal(logits_of(model, batch), adapted)
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_unmerge_is_exact_in_bf16(owl_and_batch):
    model, _ = owl_and_batch("owl2")
    model = model.bfloat16()
    lora.wrap(model, OWL2_TARGETS, rank=4, alpha=8)
    randomize(model)
    before = snapshot(model)
    lora.merge(model)
    name = "llama.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(name), before[name])
    lora.unmerge(model)
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_correction_by_hand():
    """y = W x + b + B A x alpha / rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    x = torch.randn(3, 6)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    lora.wrap(model, ("0",), rank=2, alpha=3)
    randomize(model)
    A, B = model[0].lora_A.weight, model[0].lora_B.weight
    expected = x @ W.T + b + x @ (B @ A).T * 1.5
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_dropout_is_for_training_only_and_for_the_adapter_only():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 3, bias=False))
    x = torch.ones(1, 400)
    lora.wrap(model, ("0",), rank=2, alpha=2, dropout=0.5)
    plain = model.train()(x)
    assert torch.equal(model(x), plain), "the base path has no dropout"
    randomize(model)
    assert not torch.equal(model(x), model(x))
    mean = torch.stack([model(x) for _ in range(600)]).mean(dim=0)
    expected = model.eval()(x)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.3)


def test_targets_are_whole_names_or_their_last_parts(owl_and_batch):
    model, _ = owl_and_batch("owl2")
    lora.wrap(model, ("layers.1.self_attn.q_proj", "k_proj.multiway.1", "llama.lm_head"), rank=1, alpha=1)
    assert [name for name, _ in lora.adapted(model)] == [
        "llama.layers.0.self_attn.k_proj.multiway.1",
        "llama.layers.1.self_attn.q_proj",
        "llama.layers.1.self_attn.k_proj.multiway.1",
        "llama.lm_head",
    ]


@pytest.mark.parametrize("target", ["nothing", "_proj", "multiway", "norm", "embed_tokens", "patch_embed"])
def test_a_target_that_is_no_linear(owl_and_batch, target):
    """ValueError; half a name does not count; and the model is not half wrapped."""
    model, _ = owl_and_batch("owl2")
    with pytest.raises(ValueError, match=target):
        lora.wrap(model, ("q_proj", target), rank=1, alpha=1)
    assert not list(lora.adapted(model))


def test_wrapping_twice_does_not_lose_the_first_adapter(owl_and_batch):
    """It is refused: a second adapter over the same Linear would silently take the first one's place."""
    model, batch = owl_and_batch("owl1")
    lora.wrap(model, ("q_proj",), rank=2, alpha=4)
    randomize(model)
    expected = logits_of(model, batch)
    with pytest.raises(ValueError):
        lora.wrap(model, ("q_proj",), rank=2, alpha=4)
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_adapter_is_in_the_models_mode(owl_and_batch, training):
    """Put on a model in evaluation mode, it has no dropout: nobody calls eval() a second time."""
    model, _ = owl_and_batch("owl2")
    model.train(training)
    lora.wrap(model, ("q_proj",), rank=2, alpha=4, dropout=0.5)
    assert all(module.training == training for module in model.modules())


# ----------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("style", STYLES)
def test_an_adapter_comes_back(owl_and_batch, tmp_path, style):
    """Only the adapter is written; loaded on a fresh model it gives the same bits."""
    model, batch = owl_and_batch(style)
    base = copy.deepcopy(model)
    lora.wrap(model, TARGETS[style], rank=4, alpha=6, dropout=0.05)
    randomize(model)
    lora.save(model, tmp_path, official(style), base="an/owl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.05)
    assert config["base_model_name_or_path"] == "an/owl"

    lora.load(base, tmp_path, official(style))
    assert torch.equal(logits_of(base, batch), logits_of(model, batch))
    first, second = snapshot(model), snapshot(base)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {n for n in first if ".lora_" in n}
    assert all(module.dropout == 0.05 for _, module in lora.adapted(base))


@pytest.mark.parametrize("style", STYLES)
def test_saving_a_merged_adapter_saves_the_adapter(owl_and_batch, tmp_path, style):
    model, _ = owl_and_batch(style)
    lora.wrap(model, TARGETS[style], rank=4, alpha=6)
    randomize(model)
    lora.save(model, tmp_path / "apart", official(style))
    lora.merge(model)
    lora.save(model, tmp_path / "merged", official(style))
    for path in (tmp_path / "apart").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()


def test_owl_names_are_those_of_official_runs(owl_and_batch, tmp_path):
    """base_model.model. and the released checkpoint's own name."""
    for style, prefix in (("owl1", "language_model.model."), ("owl2", "model.")):
        model, _ = owl_and_batch(style)
        lora.wrap(model, TARGETS[style], rank=2, alpha=4)
        lora.save(model, tmp_path / style, official(style))
        keys = load_file(tmp_path / style / "adapter_model.safetensors").keys()
        assert f"base_model.model.{prefix}layers.0.self_attn.q_proj.lora_A.weight" in keys
        assert f"base_model.model.{prefix}layers.1.self_attn.q_proj.lora_B.weight" in keys
        if style == "owl2":
            assert f"base_model.model.{prefix}layers.0.self_attn.k_proj.multiway.1.lora_A.weight" in keys
        assert len(keys) == 2 * len(TARGETS[style]) * model.config.llama.n_layer


def test_every_linear_of_an_owl_can_be_wrapped_saved_and_loaded(owl_and_batch, tmp_path):
    """Vision tower, abstractor, decoder and lm_head."""
    for style in STYLES:
        model, batch = owl_and_batch(style)
        base = copy.deepcopy(model)
        names = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        lora.wrap(model, names, rank=1, alpha=1)
        randomize(model)
        lora.save(model, tmp_path / style, official(style))
        state = weights.official_state(base)
        for key in load_file(tmp_path / style / "adapter_model.safetensors"):
            name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            assert f"{name}.weight" in state
        lora.load(base, tmp_path / style, official(style))
        assert torch.equal(logits_of(base, batch), logits_of(model, batch))


def test_adapter_in_bin(owl_and_batch, tmp_path):
    """As official runs of the time wrote it."""
    model, batch = owl_and_batch("owl2")
    base = copy.deepcopy(model)
    lora.wrap(model, OWL2_TARGETS, rank=2, alpha=4)
    randomize(model)
    lora.save(model, tmp_path, official("owl2"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    lora.load(base, tmp_path, official("owl2"))
    assert torch.equal(logits_of(base, batch), logits_of(model, batch))


# ----------------------------------------------------------------------------------------------------
# PEFT


HF_NAMES = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "k_proj", "up_proj")


def hf_llama(transformers):
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def twins(tiny_config):
    """The same tiny LLaMA twice: (ours, an Owl1 without need of images; transformers')."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    theirs = hf_llama(transformers)
    sizes = {"vocab_size": 50, "n_mlp": 44, "n_kv_head": 2, "norm_eps": 1e-5}
    ours = Owl(tiny_config("owl1", llama=sizes)).init_weights().eval()
    ours.llama.load_state_dict({key.removeprefix("model."): value for key, value in theirs.state_dict().items()})
    return ours, theirs


def hf_name(name: str) -> str:
    """Our module's name as transformers' plain LLaMA has it."""
    name = name.removeprefix("llama.")
    return name if name.startswith("lm_head") else f"model.{name}"


def test_peft_loads_ours(twins, tmp_path):
    """PeftModel.from_pretrained on our files gives our outputs, apart and merged; and they are its own file names."""
    import peft

    ours, theirs = twins
    lora.wrap(ours, HF_NAMES, rank=4, alpha=6)
    randomize(ours)
    lora.save(ours, tmp_path, hf_name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses or does not know
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(ids)[0]
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)
        lora.merge(ours)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, ours(ids)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], list(HF_NAMES), "all-linear"])
def test_we_load_pefts(twins, tmp_path, safe, targets):
    import peft

    ours, theirs = twins
    config = peft.LoraConfig(r=3, lora_alpha=9, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    adapted.save_pretrained(tmp_path, safe_serialization=safe)
    lora.load(ours, tmp_path, hf_name)
    assert all((m.rank, m.alpha, m.dropout) == (3, 9, 0.1) for _, m in lora.adapted(ours))
    ids = torch.randint(0, 50, (2, 13), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], adapted(ids).logits, rtol=0, atol=1e-5)

    lora.save(ours, tmp_path / "again", hf_name)
    if safe:
        first = load_file(tmp_path / "adapter_model.safetensors")
        second = load_file(tmp_path / "again" / "adapter_model.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_training_step_equals_pefts(twins):
    """The same gradients for both matrices of every adapter."""
    import peft

    ours, theirs = twins
    lora.wrap(ours, ("q_proj", "v_proj"), rank=4, alpha=6)
    randomize(ours)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, module in lora.adapted(ours):
            twin = adapted.get_submodule("base_model.model." + hf_name(name))
            twin.lora_A["default"].weight.copy_(module.lora_A.weight)
            twin.lora_B["default"].weight.copy_(module.lora_B.weight)
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(0))
    loss = ours(ids, labels=ids)[1]
    loss.backward()
    expected = adapted(ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for name, module in lora.adapted(ours):
        twin = adapted.get_submodule("base_model.model." + hf_name(name))
        torch.testing.assert_close(module.lora_A.weight.grad, twin.lora_A["default"].weight.grad, rtol=0, atol=5e-6)
        torch.testing.assert_close(module.lora_B.weight.grad, twin.lora_B["default"].weight.grad, rtol=0, atol=5e-6)


# ----------------------------------------------------------------------------------------------------
# Errors


@pytest.fixture
def adapter(owl_and_batch, tmp_path):
    """(a plain owl2, the folder of a good adapter for it)."""
    model, _ = owl_and_batch("owl2")
    plain = copy.deepcopy(model)
    lora.wrap(model, ("q_proj", "v_proj.multiway.0"), rank=2, alpha=4)
    randomize(model)
    lora.save(model, tmp_path / "adapter", official("owl2"))
    return plain, tmp_path / "adapter"


def assert_refused(plain, folder, *words: str, error=ValueError) -> None:
    """Loading fails in one sentence with these words, and leaves the model without an adapter."""
    with pytest.raises(error) as caught:
        lora.load(plain, folder, official("owl2"))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not list(lora.adapted(plain))


def test_saving_without_an_adapter(owl_and_batch, tmp_path):
    model, _ = owl_and_batch("owl2")
    with pytest.raises(ValueError, match="no adapter"):
        lora.save(model, tmp_path)


def test_files_that_are_missing(adapter, tmp_path):
    plain, folder = adapter
    assert_refused(plain, tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    (folder / "adapter_model.safetensors").unlink()
    assert_refused(plain, folder, "adapter_model.safetensors", error=FileNotFoundError)
    (folder / "adapter_config.json").unlink()
    assert_refused(plain, folder, "adapter_config.json", error=FileNotFoundError)


NO_CONFIG = ["", "{", "[]", "3", "null", "{}", '{"r": "x", "lora_alpha": 1}', '{"r": 2}', '{"r": null, "lora_alpha": 1}']


@pytest.mark.parametrize("content", NO_CONFIG)
def test_a_corrupt_config(adapter, content):
    plain, folder = adapter
    (folder / "adapter_config.json").write_text(content)
    assert_refused(plain, folder, "adapter_config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -2},
        {"lora_dropout": 2.0},
        {"lora_dropout": "much"},
        {"peft_type": "IA3"},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_another_kind_of_adapter(adapter, changes):
    plain, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    assert_refused(plain, folder, "adapter_config.json")


def test_tensors_that_do_not_fit(adapter):
    plain, folder = adapter
    path = folder / "adapter_model.safetensors"
    good = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changes, words in [
        ({key: torch.zeros(2, 31)}, (key, "[2, 31]", "[2, 32]")),
        ({key: torch.zeros(3, 32)}, (key, "[3, 32]", "[2, 32]")),
        ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}, ("layers.9",)),
        ({"model.layers.0.self_attn.k_proj.multiway.0.lora_A.weight": torch.zeros(2, 32)}, ("k_proj",)),
        ({key.replace("lora_A.weight", "lora_A.bias"): torch.zeros(2)}, ("lora_A.bias",)),
        ({key.replace("lora_A", "lora_C"): torch.zeros(2)}, ("lora_C",)),
    ]:
        save_file(good | changes, path)
        assert_refused(plain, folder, "adapter_model.safetensors", *words)
    save_file({other: tensor for other, tensor in good.items() if other != key}, path)
    assert_refused(plain, folder, "adapter_model.safetensors", "layers.0.self_attn.q_proj")
    save_file({}, path)
    assert_refused(plain, folder, "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.98])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(adapter, name, share, zipped):
    plain, folder = adapter
    path = folder / "adapter_model.safetensors"
    if name.endswith(".bin"):
        tensors = load_file(path)
        path.unlink()
        path = folder / name
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(plain, folder, name)


@pytest.mark.parametrize("content", [[1], {"a": 1}, {3: torch.zeros(2)}, 3])
def test_pickles_of_other_things(adapter, content):
    plain, folder = adapter
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    assert_refused(plain, folder, "adapter_model.bin")


def test_a_malicious_pickle_is_not_executed(adapter, tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil-was-here"),)

    plain, folder = adapter
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    assert_refused(plain, folder, "adapter_model.bin")
    assert not (tmp_path / "evil-was-here").exists()


def test_loading_over_an_adapter_is_refused(adapter):
    """A model has one adapter; a second one is not stacked on it in silence."""
    plain, folder = adapter
    lora.load(plain, folder, official("owl2"))
    before = snapshot(plain)
    with pytest.raises(ValueError):
        lora.load(plain, folder, official("owl2"))
    after = snapshot(plain)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
