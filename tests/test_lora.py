"""LoRA: a new adapter changes nothing, frozen weights stay frozen, merging is exact both ways, and PEFT agrees."""

import copy
import json
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import weights
from conftest import assert_close, assert_gradients_close, make_config, make_images, make_owl, make_row, pad_rows
from inference.adapter import load_adapter, load_lora, load_non_lora, save_lora, save_non_lora
from model import Owl
from train_stage2 import LORA_TARGETS
from training.presets import init_weights

VARIANTS = ("owl1", "owl2")


def logits_of(model: Owl, batch) -> torch.Tensor:
    ids, images = batch
    with torch.no_grad():
        return model(ids, images)[0]


def randomize(model: torch.nn.Module) -> None:
    """Fills the adapter's matrices as training would: none is zero."""
    generator = torch.Generator().manual_seed(1)
    for _, module in lora.lora_modules(model):
        for matrix in (module.lora_A.weight, module.lora_B.weight):
            matrix.data.normal_(std=0.2, generator=generator)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def model_and_batch():
    """model_and_batch(variant) -> (model, (ids, images)): two rows, one with an image."""

    def make(variant: str):
        config = make_config(variant)
        generator = torch.Generator().manual_seed(0)
        ids, _ = pad_rows([make_row(config, 8, 1, generator), make_row(config, 6, 0, generator)])
        return make_owl(config), (ids, make_images(config, 1, generator))

    return make


# --- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing(model_and_batch, variant):
    """Bit for bit: logits, and the state that save_model would write. It takes over the model's mode."""
    model, batch = model_and_batch(variant)
    expected = logits_of(model, batch)
    state = {key: tensor.detach().clone() for key, tensor in weights.hf_state_dict(model).items()}
    lora.inject_lora(model, LORA_TARGETS[variant], rank=4, alpha=8, dropout=0.5)
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits_of(model, batch), expected)
    assert same(weights.hf_state_dict(model), state)
    lora.merge_lora(model)
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_adapter_is_trained(model_and_batch, variant):
    """After some steps everything else is bit-identical, and every matrix of the adapter has changed."""
    model, (ids, images) = model_and_batch(variant)
    lora.inject_lora(model, LORA_TARGETS[variant], rank=4, alpha=8, dropout=0.05)
    before = snapshot(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * {"owl1": 2, "owl2": 9}[variant] * model.config.llama.n_layer
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        _, loss = model(ids, images, ids.clamp(min=0))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name]) == (".lora_" not in name) == (name not in trained), name
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("variant, dtype", [("owl1", torch.float32), ("owl2", torch.float32), ("owl2", torch.bfloat16)])
def test_merge_and_unmerge(model_and_batch, variant, dtype):
    """Merged, logits agree in float32; after unmerge_lora all weights and logits are bit-identical."""
    model, (ids, images) = model_and_batch(variant)
    model, batch = model.to(dtype), (ids, images.to(dtype))
    plain = logits_of(model, batch)
    lora.inject_lora(model, LORA_TARGETS[variant], rank=4, alpha=2)
    randomize(model)
    before, expected = snapshot(model), logits_of(model, batch)
    assert (expected - plain).abs().max() > 0.01, "the adapter has an effect"
    for _ in range(2):
        lora.merge_lora(model)
        lora.merge_lora(model)
        name = "llama.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(model.state_dict()[name], before[name])
        if dtype == torch.float32:
            assert_close(logits_of(model, batch), expected)
        lora.unmerge_lora(model)
        lora.unmerge_lora(model)
        assert torch.equal(logits_of(model, batch), expected)
    assert same(snapshot(model), before)


def test_update_by_hand():
    """y = W x + b + B A x alpha / rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    x = torch.randn(3, 6)
    plain = model(x)
    lora.inject_lora(model, ("0",), rank=2, alpha=3)
    randomize(model)
    expected = plain + x @ (model[0].lora_B.weight @ model[0].lora_A.weight).T * 1.5
    assert_close(model(x), expected, 1e-6)


def test_dropout_only_in_training_and_only_in_the_adapter():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 3, bias=False))
    x = torch.ones(1, 400)
    lora.inject_lora(model, ("0",), rank=2, alpha=2, dropout=0.5)
    assert torch.equal(model.train()(x), model(x)), "the base path has no dropout"
    randomize(model)
    assert not torch.equal(model(x), model(x))
    samples = model(x.expand(600, 400))
    expected = model.eval()(x)
    assert torch.equal(model(x), expected)
    assert torch.all((samples.mean(dim=0) - expected).abs() < 5 * samples.std(dim=0) / len(samples) ** 0.5)


def test_targets_are_full_names_or_their_last_parts(model_and_batch):
    """The name of a module of the modality-adaptive module means both of its Linears."""
    model, _ = model_and_batch("owl2")
    targets = ("layers.1.self_attn.q_proj", "k_proj.multiway.1", "layers.1.self_attn.v_proj", "llama.lm_head")
    lora.inject_lora(model, targets, rank=1, alpha=1)
    assert [name for name, _ in lora.lora_modules(model)] == [
        "llama.layers.0.self_attn.k_proj.multiway.1",
        "llama.layers.1.self_attn.q_proj",
        "llama.layers.1.self_attn.k_proj.multiway.1",
        "llama.layers.1.self_attn.v_proj.multiway.0",
        "llama.layers.1.self_attn.v_proj.multiway.1",
        "llama.lm_head",
    ]


@pytest.mark.parametrize("target", ["nothing", "_proj", "multiway", "embed_tokens"])
def test_a_target_that_names_no_linear(model_and_batch, target):
    """Part of a name component does not match, and nothing is injected."""
    model, _ = model_and_batch("owl2")
    with pytest.raises(ValueError, match=target):
        lora.inject_lora(model, ("q_proj", target), rank=1, alpha=1)
    assert not list(lora.lora_modules(model))


def test_init_lora(model_and_batch):
    """lora_B is zero, and lora_A uniform in +-1 / sqrt(n_in)."""
    model, _ = model_and_batch("owl2")
    lora.inject_lora(model, ("down_proj",), rank=8, alpha=4)
    tensors = dict(lora.init_lora(model))
    assert tensors.keys() == {name for name in model.state_dict() if ".lora_" in name}
    for name, tensor in tensors.items():
        bound = tensor.shape[1] ** -0.5 if ".lora_A." in name else 0.0
        assert 0.9 * bound <= tensor.abs().max() <= bound


@pytest.mark.parametrize("variant, kind", [("owl1", "bin"), ("owl2", "safetensors")])
def test_save_and_load(model_and_batch, tmp_path, variant, kind):
    """Only the adapter is written, merged or not; loaded into the base model it gives the same bits."""
    model, batch = model_and_batch(variant)
    base = copy.deepcopy(model)
    lora.inject_lora(model, LORA_TARGETS[variant], rank=4, alpha=6, dropout=0.05)
    randomize(model)
    save_lora(model, tmp_path, base="some/base")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "some/base"}
    assert config | expected == config
    expected = logits_of(model, batch), snapshot(model)
    lora.merge_lora(model)
    save_lora(model, tmp_path / "merged", base="some/base")
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == files

    if kind == "bin":  # as older versions of PEFT wrote it
        torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    load_lora(base, tmp_path)
    assert torch.equal(logits_of(base, batch), expected[0])
    assert same(snapshot(base), expected[1])
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {n for n in expected[1] if ".lora_" in n}
    assert all(module.dropout == 0.05 for _, module in lora.lora_modules(base))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_can_be_adapted_saved_and_loaded(model_and_batch, tmp_path, variant):
    """Vision encoder, abstractor, decoder and lm_head, under base_model.model. and their Hugging Face names."""
    model, batch = model_and_batch(variant)
    base = copy.deepcopy(model)
    names = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    lora.inject_lora(model, names, rank=1, alpha=1)
    randomize(model)
    save_lora(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    ends = ("lora_A.weight", "lora_B.weight")
    assert keys == {f"base_model.model.{weights.hf_name(name, variant)}.{end}" for name in names for end in ends}
    load_lora(base, tmp_path)
    assert torch.equal(logits_of(base, batch), logits_of(model, batch))


def test_non_lora_trainables(model_and_batch, tmp_path):
    """Weights that were trained beside an adapter, under PEFT's names; unknown names and shapes are refused."""
    model, _ = model_and_batch("owl2")
    base = copy.deepcopy(model)
    load_non_lora(base, tmp_path)  # without the file nothing happens
    model.requires_grad_(False)
    save_non_lora(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    model.abstractor.fc.requires_grad_(True)
    model.abstractor.fc.weight.data.normal_()
    save_non_lora(model, tmp_path)
    path = tmp_path / "non_lora_trainables.bin"
    prefix = "base_model.model.model.visual_abstractor.visual_fc"
    assert torch.load(path).keys() == {f"{prefix}.weight", f"{prefix}.bias"}
    load_non_lora(base, tmp_path)
    assert torch.equal(base.abstractor.fc.weight, model.abstractor.fc.weight)
    save_non_lora(model.requires_grad_(False), tmp_path)
    assert not path.exists()  # an adapter without such weights does not keep those of an earlier one
    for key in ("base_model.model.nothing.weight", "base_model.model.lm_head.weight"):
        torch.save({key: torch.zeros(3, 3)}, path)
        with pytest.raises(ValueError, match=path.name):
            load_non_lora(base, tmp_path)


# --- PEFT ------------------------------------------------------------------------------------------


HF_NAMES = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "k_proj", "up_proj")


@pytest.fixture
def twins():
    """The same tiny LLaMA twice: (ours, an Owl2 without the modality-adaptive module; transformers')."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(7)
    hf_config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.15,
    )
    theirs = transformers.LlamaForCausalLM(hf_config).eval()
    config = make_config("owl2", llama={"vocab_size": 50, "n_mlp": 44, "n_kv_head": 2, "norm_eps": 1e-5})
    config.llama.adaptive = False  # so that Hugging Face's names are those of a plain LLaMA
    ours = init_weights(Owl(config)).eval()
    ours.llama.load_state_dict({key.removeprefix("model."): value for key, value in theirs.state_dict().items()})
    return ours, theirs


def test_peft_loads_ours(twins, tmp_path):
    """PeftModel.from_pretrained on our files gives our outputs, apart and merged; and they are its own file names."""
    import peft

    ours, theirs = twins
    lora.inject_lora(ours, HF_NAMES, rank=4, alpha=6)
    randomize(ours)
    save_lora(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses or does not know
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(ids)[0]
        assert_close(loaded(ids).logits, expected)
        lora.merge_lora(ours)
        assert_close(loaded.merge_and_unload()(ids).logits, ours(ids)[0])


@pytest.mark.parametrize("safe, targets", [(True, ["q_proj", "v_proj"]), (False, list(HF_NAMES)), (True, "all-linear")])
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
    load_lora(ours, tmp_path)
    assert all((m.rank, m.alpha, m.dropout) == (3, 9, 0.1) for _, m in lora.lora_modules(ours))
    ids = torch.randint(0, 50, (2, 13), generator=generator)
    with torch.no_grad():
        assert_close(ours(ids)[0], adapted(ids).logits)
    save_lora(ours, tmp_path / "again")
    if safe:
        first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
        assert same(first, second)


def test_a_training_step_equals_pefts(twins):
    """The same gradients for both matrices of every adapter."""
    import peft

    ours, theirs = twins
    lora.inject_lora(ours, ("q_proj", "v_proj"), rank=4, alpha=6)
    randomize(ours)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, config)
    pairs = []  # of the same matrix
    for name, module in lora.lora_modules(ours):
        twin = adapted.get_submodule("base_model.model." + weights.hf_name(name, "owl2"))
        pairs.append((module.lora_A.weight, twin.lora_A["default"].weight))
        pairs.append((module.lora_B.weight, twin.lora_B["default"].weight))
    for matrix, twin in pairs:
        twin.data.copy_(matrix)
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(0))
    loss, expected = ours(ids, labels=ids)[1], adapted(ids, labels=ids).loss
    assert_close(loss, expected, 2e-6)
    loss.backward()
    expected.backward()
    assert_gradients_close(*({i: pair[side].grad for i, pair in enumerate(pairs)} for side in (0, 1)))


# --- errors ----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(model_and_batch, tmp_path):
    """(a plain Owl2, the folder of a valid adapter for it)."""
    model, _ = model_and_batch("owl2")
    plain = copy.deepcopy(model)
    lora.inject_lora(model, ("q_proj", "v_proj.multiway.0"), rank=2, alpha=4)
    randomize(model)
    save_lora(model, tmp_path / "adapter")
    return plain, tmp_path / "adapter"


def assert_refused(plain, folder, *words: str, error=ValueError) -> None:
    """Asserts that loading fails with one line that has all the words, and leaves the model without an adapter."""
    with pytest.raises(error) as caught:
        load_lora(plain, folder)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert not list(lora.lora_modules(plain))


def test_saving_without_an_adapter(model_and_batch, tmp_path):
    with pytest.raises(ValueError, match="adapter"):
        save_lora(model_and_batch("owl1")[0], tmp_path)


def test_missing_files(adapter, tmp_path):
    plain, folder = adapter
    assert_refused(plain, tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    (folder / "adapter_model.safetensors").unlink()
    assert_refused(plain, folder, "adapter_model.safetensors", error=FileNotFoundError)
    (folder / "adapter_config.json").unlink()
    assert_refused(plain, folder, "adapter_config.json", error=FileNotFoundError)




@pytest.mark.parametrize("content", ["", "[]", "{}", '{"r": "x", "lora_alpha": 1}', '{"r": null, "lora_alpha": 1}'])
def test_a_corrupt_config(adapter, content):
    plain, folder = adapter
    (folder / "adapter_config.json").write_text(content)
    assert_refused(plain, folder, "adapter_config.json")


OTHER_KINDS = [("r", 0), ("lora_dropout", 2.0), ("peft_type", "IA3"), ("fan_in_fan_out", True), ("bias", "some")]
OTHER_KINDS += [("modules_to_save", 5), ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", {"q_proj": "x"})]
OTHER_KINDS += [("rank_pattern", {"(": 4}), ("rank_pattern", {"(a+)+b": 4}), ("alpha_pattern", {".*.*.*.*": 4})]


@pytest.mark.parametrize("key, value", OTHER_KINDS)
def test_another_kind_of_adapter(adapter, key, value):
    plain, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    assert_refused(plain, folder, "adapter_config.json")


@pytest.mark.parametrize(
    "key, value", [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 4})]
)
def test_tensors_that_the_config_announces_and_the_file_lacks(adapter, key, value):
    plain, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    assert_refused(plain, folder, "adapter_model.safetensors", "does not fit")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("q_proj.lora_A.weight", (2, 31)),
        ("q_proj.lora_A.weight", (3, 32)),
        ("q_proj.lora_A.weight", None),
        ("q_proj.lora_A.bias", (2,)),
        ("nothing.lora_A.weight", (2, 32)),
        ("k_proj.multiway.0.lora_A.weight", (2, 32)),
    ],
)
def test_tensors_that_do_not_fit(adapter, name, shape):
    """shape: of a tensor that is added or replaced; None: it is removed."""
    plain, folder = adapter
    path = folder / "adapter_model.safetensors"
    key = f"base_model.model.model.layers.0.self_attn.{name}"
    tensors = load_file(path)
    tensors.pop(key, None)
    save_file(tensors if shape is None else tensors | {key: torch.zeros(shape)}, path)
    assert_refused(plain, folder, path.name, name.partition(".lora_")[0])
    save_file({}, path)
    assert_refused(plain, folder, path.name)


def test_truncated_files(adapter):
    plain, folder = adapter
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert_refused(plain, folder, path.name)


def test_a_malicious_pickle_is_not_executed(adapter, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "created"),)

    plain, folder = adapter
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    assert_refused(plain, folder, "adapter_model.bin")
    assert not (tmp_path / "created").exists()


def test_a_second_adapter_is_refused(adapter):
    """It would replace the first one: neither inject_lora nor load_lora adds one."""
    plain, folder = adapter
    load_lora(plain, folder)
    before = snapshot(plain)
    with pytest.raises(ValueError):
        load_lora(plain, folder)
    with pytest.raises(ValueError):
        lora.inject_lora(plain, ("q_proj",), rank=2, alpha=4)
    assert same(snapshot(plain), before)


OTHER_VARIANTS = [("lora_bias", True), ("alora_invocation_tokens", [1]), ("arrow_config", {"top_k": 3})]
OTHER_VARIANTS += [("use_qalora", True), ("use_bdlora", True), ("target_parameters", ["x"]), ("kasa_config", {"a": 1})]
OTHER_VARIANTS += [("layer_replication", [[0, 1]]), ("trainable_token_indices", [3]), ("megatron_config", {"a": 1})]
OTHER_VARIANTS += [("velora_config", {"a": 1}), ("monteclora_config", {"a": 1})]
OTHER_VARIANTS += [("init_lora_weights", name) for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")]
OTHER_VARIANTS += [("init_lora_weights", "lora_ga"), ("lora_alpha", float("nan")), ("lora_alpha", 1e308)]
OTHER_VARIANTS += [("lora_alpha", 1e400), ("lora_alpha", -1)]


@pytest.mark.parametrize("key, value", OTHER_VARIANTS)
def test_what_plain_lora_cannot_do_is_refused_by_name(adapter, key, value):
    """Also initializations that changed the base weights, which would load silently wrong."""
    plain, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    assert_refused(plain, folder, key)


@pytest.mark.parametrize("key, value", [("r", 10**9), ("r", 1e400), ("r", [2]), ("lora_alpha", [8]), ("bias", [])])
def test_absurd_values_in_an_adapters_config(adapter, key, value):
    plain, folder = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    assert_refused(plain, folder, str(folder))


VARIANTS_OF_PEFT = {
    "plain": {"init_lora_weights": "gaussian"},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "rank_pattern": {"rank_pattern": {r"layers\.1\..*q_proj": 2, "o_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"layers.0.self_attn.o_proj": 3}, "rank_pattern": {"o_proj": 3}},
    "bias": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["abstractor.fc", "attn.proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True, "rank_pattern": {"o_proj": 2}, "use_rslora": True},
}


def peft_adapter(model: Owl, **options):
    """PEFT's adapter of our modules, with random numbers in everything that it trains."""
    peft = pytest.importorskip("peft")
    parts = torch.nn.Module()  # without our config, which PEFT would read
    for name, part in copy.deepcopy(model).named_children():
        parts.add_module(name, part)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "abstractor.fc", "attn.proj"]} | options
    adapted = peft.get_peft_model(parts, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=generator)
    return adapted


def hf_names(tensors: dict[str, torch.Tensor], variant: str) -> dict[str, torch.Tensor]:
    """The same tensors as PEFT would name them in the released model."""
    prefix = "base_model.model."
    return {prefix + weights.hf_name(key.removeprefix(prefix), variant): x.clone() for key, x in tensors.items()}


def assert_merges_to(model: Owl, merged) -> None:
    """Asserts that our merged weights are PEFT's, and that merging does not change the outputs."""
    expected = dict(merged.state_dict())
    lora.merge_lora(model)
    found = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        atol = 1e-6 * expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("kind", VARIANTS_OF_PEFT)
def test_variants_of_lora_equal_pefts_merge(model_and_batch, tmp_path, kind):
    """Loaded, unmerged and merged; and what save_lora writes of them is the same adapter again."""
    model, batch = model_and_batch("owl2")
    adapted = peft_adapter(model, **VARIANTS_OF_PEFT[kind])
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(hf_names(load_file(path), "owl2"), path)
    base = copy.deepcopy(model)
    load_lora(model, tmp_path)
    unmerged = logits_of(model, batch)
    assert (unmerged - logits_of(base, batch)).abs().max() > 1e-3
    if kind not in ("bias", "lora_only", "lora_bias", "modules_to_save"):  # they have changed the base
        save_lora(model, tmp_path / "again")
        load_lora(base, tmp_path / "again")
        assert_close(logits_of(base, batch), unmerged)
    assert_merges_to(model, adapted.merge_and_unload())
    assert_close(logits_of(model, batch), unmerged)


@pytest.mark.parametrize("kind", ["plain", "modules_to_save", "dora", "bias"])
def test_the_whole_state_of_a_training_run(model_and_batch, tmp_path, kind):
    """As trainers save it: every weight of the model, under the names that PEFT has in memory."""
    model, _ = model_and_batch("owl2")
    adapted = peft_adapter(model, **VARIANTS_OF_PEFT[kind])
    adapted.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    state = hf_names(adapted.state_dict(), "owl2")
    assert any(".lora_A.default." in key for key in state) and any(".base_layer." in key for key in state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    load_lora(model, tmp_path)
    assert_merges_to(model, adapted.merge_and_unload())


def test_the_output_of_owl1s_script(model_and_batch, tmp_path):
    """It saves no adapter_config.json: rank 8 and alpha 32 are those of the script."""
    model, _ = model_and_batch("owl1")
    adapted = peft_adapter(model, r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    torch.save(hf_names(adapted.state_dict(), "owl1"), tmp_path / "pytorch_model.bin")
    load_adapter(model, tmp_path)
    assert_merges_to(model, adapted.merge_and_unload())


def test_a_whole_state_without_an_adapter(model_and_batch, tmp_path):
    model, _ = model_and_batch("owl1")
    torch.save(dict(weights.hf_state_dict(model)), tmp_path / "pytorch_model.bin")
    assert_refused(model, tmp_path, "pytorch_model.bin", "no adapter")


def test_rotary_buffers_beside_an_adapter_are_ignored(adapter):
    """As in weights: the released trainers save them, and the model computes them."""
    plain, folder = adapter
    prefix = "base_model.model."
    tensors = {f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    tensors[f"{prefix}model.norm.weight"] = torch.full((32,), 3.0)
    torch.save(tensors, folder / "non_lora_trainables.bin")
    load_non_lora(plain, folder)
    assert torch.equal(plain.llama.norm.weight, torch.full((32,), 3.0))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_no_pickle_of_an_adapter_runs_code(adapter, tmp_path, name, zipped):
    """The message does not advise to load it nevertheless, as torch's does."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "created"),)

    plain, folder = adapter
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="run code") as caught:
        load_non_lora(plain, folder)
        load_lora(plain, folder)
    assert name in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "created").exists()
