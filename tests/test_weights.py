"""Model folders: the Hugging Face layout in and out, bit for bit, and one line for everything that is not one."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import weights
from abstractor import sincos_2d
from conftest import GOLDEN, assert_close, build, make_config, make_owl
from training.presets import resize
from training.pretrained import CLIP_NAMES, pretrained_tensors, resize_position_embedding, resize_position_embeddings

FOLDERS = ("owl1", "owl2", "owl2-bin-shards")
VARIANTS = ("owl1", "owl2")
NORM = "model.norm.weight"  # a key of owl2's files
POSITIONS = ("q_pos_embed", "k_pos_embed")  # ends of keys of buffers
TOKENIZER = Path(__file__).parent / "golden" / "text" / "tokenizer.model"


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of a folder's weight files but rotary buffers, without the code under test."""
    tensors = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" and path.name != "golden.safetensors":
            tensors |= load_file(path)
        elif path.suffix == ".bin":
            tensors |= torch.load(path, weights_only=True)
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("rotary_emb.inv_freq")}


def same_state(a, b) -> bool:
    """Whether two models have the same names with the same bits."""
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


@pytest.fixture
def copied(tmp_path):
    """copied(name) -> a copy of a golden model's folder, for a test to change."""

    def make(name: str) -> Path:
        folder = tmp_path / f"copy-of-{name}"
        shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("golden.safetensors"))
        return folder

    return make


def edit_weights(folder: Path, edit) -> None:
    """Lets edit(tensors) change the tensors of model.safetensors."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, edit) -> None:
    """Lets edit(content) change a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def assert_refused(folder: Path, *words: str, error=ValueError) -> None:
    """Asserts that loading fails with one line that has all the words."""
    with pytest.raises(error) as caught:
        weights.load_model(folder)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


# --- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_load(folder):
    """The model has every tensor of the files, bit for bit, in evaluation mode and trainable."""
    model = weights.load_model(GOLDEN / folder)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    state = weights.hf_state_dict(model)
    for key, tensor in all_tensors(GOLDEN / folder).items():
        assert torch.equal(state[key], tensor), key
    assert {(tensor.device.type, tensor.dtype) for tensor in state.values()} == {("cpu", torch.float32)}

    # In bfloat16 each value is the float32 one, rounded once.
    half = weights.load_model(GOLDEN / folder, dtype=torch.bfloat16)
    for key, tensor in weights.hf_state_dict(half).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[key].bfloat16()), key
    assert half(torch.tensor([[1, 5, 6]]))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_loaded_model_shares_no_memory_with_its_files(copied, folder):
    """Training does not write to the files, and the files may be overwritten."""
    folder = copied(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = weights.load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model = weights.load_model(folder)
    expected = copy.deepcopy(model)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    assert same_state(model, expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_one_bin_file(copied, zipped):
    """pytorch_model.bin without an index, also in torch's older format; safetensors are preferred to it."""
    folder = copied("owl1")
    tensors = load_file(folder / "model.safetensors")
    expected = weights.load_model(GOLDEN / "owl1")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert same_state(weights.load_model(folder), expected)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same_state(weights.load_model(str(folder)), expected)


def test_tensors_of_training_runs_load(copied):
    """.bin files may have half precision, parameters, and views of larger storages."""
    folder = copied("owl2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    twice = {key: torch.cat([tensor, tensor]).half() for key, tensor in tensors.items()}
    stored = {key: torch.nn.Parameter(twice[key][: len(tensor)]) for key, tensor in tensors.items()}
    torch.save(stored, folder / "pytorch_model.bin")
    for key, tensor in weights.hf_state_dict(weights.load_model(folder)).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[key].half().float())
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


# --- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder, dtype", [("owl1", torch.bfloat16), ("owl2", torch.float32)])
def test_load_save_load_is_bit_identical(tmp_path, folder, dtype):
    first = weights.load_model(GOLDEN / folder, dtype=dtype)
    weights.save_model(first, tmp_path / "saved")
    second = weights.load_model(tmp_path / "saved", dtype=dtype)
    assert same_state(first, second)
    assert first.config == second.config
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"]
    assert stored == str(dtype).removeprefix("torch.")
    weights.save_model(second, tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("folder", VARIANTS)
def test_saved_files_have_the_released_layout(copied, tmp_path, folder):
    """The released code's keys and tensors, an index, the tokenizer's files, and config.json's values."""
    source, saved = copied(folder), tmp_path / "saved"
    shutil.copyfile(TOKENIZER, source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text('{"legacy": false}')
    model = weights.load_model(source)
    weights.save_model(model, saved)
    expected, actual = all_tensors(source), all_tensors(saved)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in actual)
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert json.loads((saved / "preprocessor_config.json").read_text())["size"] == model.config.image_size
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in expected.values())
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()

    def compare(actual: dict, expected: dict, section: str) -> None:
        for key, value in actual.items():
            if isinstance(value, dict):
                compare(value, expected[key], f"{section}{key}.")
            elif key in expected and expected[key] is not None:
                assert value == expected[key], section + key

    configs = [json.loads((path / "config.json").read_text()) for path in (saved, source)]
    compare(*configs, "")
    assert configs[0]["architectures"] == configs[1]["architectures"]


def test_sharding(tmp_path, monkeypatch):
    """No shard above the limit, except for one larger tensor; fewer shards written later replace these."""
    model = weights.load_model(GOLDEN / "owl2")
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    weights.save_model(model, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    n = len(shards)
    assert n > 5
    assert [path.name for path in shards] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for path in shards:
        tensors = load_file(path)
        assert tensors.keys() == {key for key, name in index.items() if name == path.name}
        assert len(tensors) == 1 or sum(4 * tensor.numel() for tensor in tensors.values()) <= 100_000
    assert same_state(weights.load_model(tmp_path), model)

    model.llama.norm.weight.data.add_(1)
    monkeypatch.setattr(weights, "SHARD_BYTES", 10**9)
    weights.save_model(model, tmp_path)
    assert same_state(weights.load_model(tmp_path), model)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ("owl2", "owl2-bin-shards"))
def test_saving_beside_other_weights_is_refused(copied, name):
    """The folder would have two models."""
    folder = copied(name)
    with pytest.raises(ValueError, match="other weights"):
        weights.save_model(weights.load_model(folder), folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_model_is_saved_and_loaded(tmp_path, variant):
    config = make_config(variant, llama={"n_kv_head": 2, "rope_theta": 500.0, "bos_id": 4, "eos_id": 5})
    config.llama.adaptive = False  # Owl2: config.json has modality_adaptive
    model = make_owl(config)
    model.tokenizer_folder = TOKENIZER.parent
    weights.save_model(model, tmp_path)
    loaded = weights.load_model(tmp_path)
    assert same_state(model, loaded) and loaded.config == model.config
    assert (tmp_path / "tokenizer.model").is_file()


def test_an_adapter_must_be_merged_before_saving(tmp_path):
    model = make_owl(make_config("owl2"))
    lora.inject_lora(model, ("q_proj",), rank=2, alpha=4)
    with pytest.raises(ValueError, match="merge"):
        weights.save_model(model, tmp_path / "unmerged")
    lora.merge_lora(model)
    weights.save_model(model, tmp_path / "merged")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(weights.load_model(tmp_path / "merged")(ids)[0], model(ids)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_state_dict_shares_memory_with_the_parameters(variant):
    model = make_owl(make_config(variant))
    state = weights.hf_state_dict(model)
    pointers = sorted(tensor.data_ptr() for key, tensor in state.items() if not key.endswith(POSITIONS))
    assert pointers == sorted(parameter.data_ptr() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, owl1, owl2",
    [
        ("llama.layers.3.mlp.up_proj", "language_model.model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"),
        ("llama.lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"),
        ("abstractor.fc", "abstractor.visual_fc", "model.visual_abstractor.visual_fc"),
        ("abstractor.queries", "query_tokens", "model.visual_abstractor.query_embeds"),
    ],
)
def test_hf_names(name, owl1, owl2):
    """Of parameters, and of modules as in adapters."""
    assert (weights.hf_name(name, "owl1"), weights.hf_name(name, "owl2")) == (owl1, owl2)


# --- position embeddings, image sizes, a wrong config ----------------------------------------------


def test_position_embeddings_are_computed_or_read(copied):
    """Computed if the files lack them, like the released code's to the last bit or two; else the files' are used."""
    folder = copied("owl2")
    stored = load_file(GOLDEN / "owl2" / "model.safetensors")
    keys = [key for key in stored if key.endswith(POSITIONS)]
    edit_weights(folder, lambda tensors: [tensors.pop(key) for key in keys])
    computed = weights.hf_state_dict(weights.load_model(folder))
    for key in keys:
        assert_close(computed[key], stored[key], 1e-6)
    edit_weights(folder, lambda tensors: tensors.update({key: stored[key] + 0.5 for key in keys}))
    loaded = weights.hf_state_dict(weights.load_model(folder))
    for key in keys:
        assert torch.equal(loaded[key], stored[key] + 0.5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_config_with_a_wrong_width_of_the_abstractor(copied, folder):
    """As in some released Owl1 folders: the weights decide."""
    expected = weights.load_model(GOLDEN / folder)
    folder = copied(folder)
    content = json.loads((folder / "config.json").read_text())
    section = content.get("visual_abstractor_config") or content["visual_config"]["visual_abstractor"]
    section["intermediate_size"] = 4096
    (folder / "config.json").write_text(json.dumps(content))
    assert weights.read_config(folder) == expected.config
    assert same_state(weights.load_model(folder), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [8, 16, 32])
def test_resize_position_embeddings(tmp_path, variant, size):
    """Learned ones are interpolated, fixed ones recomputed, and the rest stays; the model can be saved."""
    before = make_owl(make_config(variant))
    config = copy.deepcopy(before.config)
    for wrong in (20, 0):
        with pytest.raises(ValueError):
            resize(config, wrong)
    resize(config, size)
    model = build(config, resize_position_embeddings(before.state_dict().items(), config))
    if size == 16:
        assert same_state(model, before)
    expected = dict(before.state_dict())
    table = before.vit.position_embedding.data
    expected["vit.position_embedding"] = resize_position_embedding(table, 1 + (size // 8) ** 2)
    if variant == "owl2":
        expected |= {name: sincos_2d(size // 8, 16) for name in expected if name.endswith(".k_pos")}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.encode_images(torch.zeros(1, 3, size, size)).shape == (1, 4, 32)
    weights.save_model(model, tmp_path)
    loaded = weights.load_model(tmp_path)
    assert loaded.config == config and same_state(loaded, model)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (1, 4, 16)])
def test_position_embeddings_that_cannot_be_resized(shape):
    with pytest.raises(ValueError):
        resize_position_embedding(torch.zeros(shape), 17)


def test_integer_weights_are_refused(copied):
    """Training refuses them too: they would be quantized values in an unknown format."""
    folder = copied("owl2")
    edit_weights(folder, lambda tensors: tensors.update({NORM: torch.zeros(64, dtype=torch.int8)}))
    assert_refused(folder, "llama.norm.weight", "int8")
    with pytest.raises(ValueError, match="int8"):
        list(weights.hf_tensors(folder, weights.read_config(folder)))


def test_materialize_refuses_tensors_that_do_not_fit():
    model = make_owl(make_config("owl2"))
    tensors = model.state_dict()
    wrong = {"llama.norm.weight": tensors.pop("llama.norm.weight")[:-1], "surprise": torch.zeros(2)}
    with pytest.raises(ValueError) as caught:
        build(model.config, (tensors | wrong).items())
    assert "llama.norm.weight" in str(caught.value) and "surprise" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (48, 31)])
def test_the_tensor_that_decides_the_width_may_be_misshapen(copied, shape):
    folder = copied("owl2")
    key = weights.hf_name("abstractor.layers.0.mlp.w1.weight", "owl2")
    edit_weights(folder, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    assert_refused(folder, folder.name)


def test_all_wrong_keys_are_reported_at_once(copied):
    """Missing, misshapen and unexpected ones; rotary buffers are the only keys that are ignored."""
    folder = copied("owl2")
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    q_pos = "abstractor.layers.1.attn.q_pos"
    wrong = {NORM: (65,), weights.hf_name(q_pos, "owl2"): (5, 32), rotary: (4,), rotary + ".more": (4,)}

    def change(tensors):
        del tensors["lm_head.weight"]
        tensors.update({key: torch.zeros(shape) for key, shape in wrong.items()})

    edit_weights(folder, change)
    assert_refused(folder, "llama.lm_head.weight", "llama.norm.weight", "[65]", q_pos, rotary + ".more")


# --- files that cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize("content", [0.0, 0.3, 0.99, b"\0" * 1000, b"<!DOCTYPE html><html>"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "older"])
def test_damaged_files(copied, kind, content):
    """Truncated ones (to this share), and others in their stead, such as the web page of a failed download."""
    folder = copied("owl2")
    path = folder / "model.safetensors"
    if kind != "safetensors":
        tensors = load_file(path)
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])
    assert_refused(folder, path.name)




@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 3}, {3: torch.zeros(2)}, {"a": {"b": torch.zeros(2)}}])
def test_pickles_of_other_objects(copied, content):
    folder = copied("owl2")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin")


@pytest.mark.parametrize("how", ["zip", "older", "plain"])
def test_a_malicious_pickle_is_refused_and_not_executed(copied, tmp_path, how):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "created"),)

    folder = copied("owl2")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    content = {NORM: torch.zeros(64), "x": Evil()}
    if how == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    assert_refused(folder, "pytorch_model.bin", "run code")
    assert not (tmp_path / "created").exists()
    with path.open("rb") as file:
        pickle.load(file) if how == "plain" else torch.load(file, weights_only=False)
    assert (tmp_path / "created").exists(), "the pickle works"




@pytest.mark.parametrize("shard", ["../evil.bin", "/evil.bin", "sub/evil.bin", "..", "", "evil.txt", 3, ["a.bin"]])
def test_an_index_that_points_elsewhere(copied, shard):
    folder = copied("owl2-bin-shards")
    shutil.copyfile(folder / "pytorch_model-1-of-4.bin", folder.parent / "evil.bin")
    edit_json(folder / "pytorch_model.bin.index.json", lambda index: index["weight_map"].update({NORM: shard}))
    assert_refused(folder, "pytorch_model.bin.index.json")


@pytest.mark.parametrize("content", ["{}", "3", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_a_corrupt_index(copied, content):
    folder = copied("owl2-bin-shards")
    (folder / "pytorch_model.bin.index.json").write_text(content)
    assert_refused(folder, folder.name)


def test_shards_that_disagree_with_the_index(copied):
    """One that lacks a key of the index, one that repeats a key of another, and one that is missing."""
    folder = copied("owl2-bin-shards")
    index_path = folder / "pytorch_model.bin.index.json"
    index = index_path.read_text()
    home = json.loads(index)["weight_map"][NORM]
    other = next(path for path in folder.glob("*.bin") if path.name != home)
    edit_json(index_path, lambda index: index["weight_map"].update({NORM: other.name}))
    assert_refused(folder, NORM, other.name)
    index_path.write_text(index)
    torch.save(torch.load(other) | {NORM: torch.zeros(64)}, other)
    assert_refused(folder, NORM)
    other.unlink()
    assert_refused(folder, other.name, error=FileNotFoundError)


# --- folders and config.json -----------------------------------------------------------------------


def test_folders_without_a_model(copied, tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    assert_refused(tmp_path, "config.json", error=FileNotFoundError)
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "file", error=(ValueError, OSError))
    folder = copied("owl2")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "model.safetensors", "pytorch_model.bin", error=FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"model_type": "llama"}'])
def test_a_corrupt_config(copied, content):
    folder = copied("owl2")
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, "config.json")


HOSTILE = {  # "." separates sections
    "model_type": ["mplug_owl3", None, []],
    "hidden_size": ["64", -64, 0, 64.5, True, [64], 10**15],
    "num_attention_heads": [0, 3, 64],
    "num_key_value_heads": [0, 3, 8],
    "num_hidden_layers": [-1, 2, 4],
    "vocab_size": ["many", 513],
    "max_position_embeddings": [0],
    "rms_norm_eps": ["1e-6", -1e-6, float("nan"), float("inf")],
    "rope_theta": [0, "10000"],
    "rope_scaling": [{"type": "linear", "factor": 2.0}],
    "hidden_act": ["gelu"],
    "attention_bias": [True],
    "tie_word_embeddings": [True],
    "eos_token_id": ["two", []],
    "visual_config": [None, "x", {}],
    "visual_config.visual_model": [3],
    "visual_config.visual_model.image_size": [7, 112],
    "visual_config.visual_model.patch_size": [0, 7, 100],
    "visual_config.visual_model.num_attention_heads": [5],
    "visual_config.visual_model.hidden_size": [64],
    "visual_config.visual_model.hidden_act": ["gelu"],
    "visual_config.visual_model.use_cls_token": [False],
    "visual_config.visual_model.use_post_layernorm": [False],
    "visual_config.visual_abstractor": [[1]],
    "visual_config.visual_abstractor.num_attention_heads": [5],
    "visual_config.visual_abstractor.num_learnable_queries": [-8, 9],
    "visual_config.visual_abstractor.hidden_size": [30],
    "visual_config.visual_abstractor.attention_probs_dropout_prob": ["a lot", 7, -0.5],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in HOSTILE.items() for value in values])
def test_hostile_config_values(copied, key, value):
    """Each ends in one line that names the folder, whether config.json or a tensor is found not to fit."""
    folder = copied("owl2")
    *path, leaf = key.split(".")
    edit_json(folder / "config.json", lambda content: reduce(dict.get, path, content).update({leaf: value}))
    assert_refused(folder, folder.name)


def test_an_odd_head_size_is_refused(tmp_path):
    """Rotary embeddings rotate pairs of channels."""
    config = make_config("owl1", llama={"n_embd": 36, "n_head": 4}, abstractor={"n_out": 36})
    weights.save_model(make_owl(config), tmp_path)
    assert_refused(tmp_path, "config.json")


def test_an_empty_config_means_the_7b():
    """Missing fields are those of the released models."""
    first = weights.config_from_hf({"model_type": "mplug-owl"})
    assert first == weights.OwlConfig("owl1", weights.ViTConfig(), weights.AbstractorConfig(), weights.LlamaConfig())
    second = weights.config_from_hf({"model_type": "mplug_owl2"})
    assert (second.image_size, second.abstractor.grid_size, second.llama.adaptive) == (448, 32, True)


# --- stage 1's pretrained parts --------------------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path):
    """(config, CLIP folder, LLaMA folder, the tiny model that both were made from)."""
    config = make_config("owl2")
    model = make_owl(config)
    clip = {"text_model.x": torch.zeros(2), "logit_scale": torch.zeros(())}
    for name, tensor in model.vit.state_dict().items():
        if ".qkv." in name:
            layer, leaf = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name).groups()
            parts = tensor.view(2, 3, 8, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)
            for letter, part in zip("qkv", parts):
                clip[f"vision_model.encoder.layers.{layer}.self_attn.{letter}_proj.{leaf}"] = part.clone()
        else:
            clip["vision_model." + weights.translate(name, CLIP_NAMES)] = tensor.clone()
    clip["vision_model.embeddings.class_embedding"] = clip["vision_model.embeddings.class_embedding"].flatten()
    table = clip["vision_model.embeddings.position_embedding.weight"]
    clip["vision_model.embeddings.position_embedding.weight"] = table[0].clone()
    llama = {}
    for name, tensor in model.llama.state_dict().items():
        if ".multiway.1" not in name:
            name = name.replace(".multiway.0", "")
            llama[name if name.startswith("lm_head") else "model." + name] = tensor.clone()
    llama["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    for folder, tensors in (("clip", clip), ("llama", llama)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    return config, tmp_path / "clip", tmp_path / "llama", model


def test_pretrained_tensors(pretrained):
    """The vision encoder and the text branch of the decoder come back bit for bit; the abstractor is random."""
    config, clip, llama, source = pretrained
    model = build(config, pretrained_tensors(config, clip, llama))
    for name, tensor in source.state_dict().items():
        if name.startswith("vit.") or (name.startswith("llama.") and ".multiway.1" not in name):
            assert torch.equal(model.state_dict()[name], tensor), name
    assert not torch.equal(model.abstractor.queries[0, 0], model.abstractor.queries[0, 1])
    assert all(parameter.requires_grad for parameter in model.parameters())


CORRUPT = [
    ("llama", "model.norm.weight", "int8"),
    ("clip", "vision_model.post_layernorm.weight", None),
    ("clip", "vision_model.encoder.layers.0.self_attn.k_proj.weight", (16, 17)),
    ("clip", "vision_model.embeddings.position_embedding.weight", (7, 16)),
    ("clip", "vision_model.embeddings.position_embedding.weight", (1, 16)),
    ("clip", "vision_model.embeddings.position_embedding.weight", ()),
    ("clip", "vision_model.surprise", (1,)),
    ("llama", "model.norm.weight", None),
    ("llama", "model.layers.1.mlp.up_proj.weight", (40, 31)),
    ("llama", "model.surprise", (1,)),
]


@pytest.mark.parametrize("which, key, shape", CORRUPT)
def test_pretrained_tensors_that_do_not_fit(pretrained, which, key, shape):
    """shape: of the tensor that replaces or joins the right ones; None: it is missing. "int8": of another dtype."""
    config, clip, llama, _ = pretrained
    folder = {"clip": clip, "llama": llama}[which]
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(key, None)
    if shape == "int8":
        tensors[key] = torch.zeros(32, dtype=torch.int8)
    elif shape is not None:
        tensors[key] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        list(pretrained_tensors(config, clip, llama))
    assert key in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["clip", "llama"])
def test_missing_pretrained_folders(pretrained, tmp_path, which):
    config, clip, llama, _ = pretrained
    folders = {"clip": clip, "llama": llama} | {which: tmp_path / "nowhere"}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(pretrained_tensors(config, **folders))


# --- what strangers' folders contain ---------------------------------------------------------------


def test_rope_parameters(copied):
    """transformers 5 writes rope_theta and rope_type there; a type that is not implemented is refused."""
    folder = copied("owl2")

    def move(content, rope_type="default"):
        content.pop("rope_theta", None)
        content["rope_parameters"] = {"rope_theta": 500.0, "rope_type": rope_type}

    edit_json(folder / "config.json", move)
    assert weights.read_config(folder).llama.rope_theta == 500.0
    edit_json(folder / "config.json", lambda content: move(content, "llama3"))
    assert_refused(folder, "config.json", "llama3")


def test_config_with_a_byte_order_mark_and_several_end_tokens(copied):
    folder = copied("owl2")
    edit_json(folder / "config.json", lambda content: content.update({"eos_token_id": [7, 2]}))
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert weights.load_model(folder).config.llama.eos_id == 7


def test_git_lfs_pointers_are_named(copied):
    folder = copied("owl2")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(pointer)
        assert_refused(folder, name, "Git LFS")


def test_an_index_without_its_shards(copied):
    """Complete weights beside it are used; shards that are missing from a set are named."""
    folder = copied("owl2-bin-shards")
    expected = weights.load_model(folder)
    index = (folder / "pytorch_model.bin.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(index.replace(".bin", ".safetensors"))
    assert same_state(weights.load_model(folder), expected)
    (folder / "pytorch_model-2-of-4.bin").unlink()
    assert_refused(folder, "pytorch_model-2-of-4.bin", error=FileNotFoundError)


def test_links_out_of_a_weights_folder_are_followed(copied):
    """Hub caches consist of them."""
    folder = copied("owl2")
    for path in list(folder.iterdir()):
        target = folder.parent / f"blob-{path.name}"
        path.rename(target)
        path.symlink_to(target)
    assert same_state(weights.load_model(folder), weights.load_model(GOLDEN / "owl2"))


def test_an_adapter_given_as_weights(copied):
    folder = copied("owl2")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert_refused(folder, "--adapter")
    (folder / "config.json").unlink()
    assert_refused(folder, "--adapter")


UNUSUAL = {
    "meta": lambda: torch.zeros(64, device="meta"),
    "sparse": lambda: torch.zeros(64).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(64), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(32), torch.zeros(32)]),
    "expanded": lambda: torch.zeros(1).expand(10**12),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain(copied, kind):
    """An expanded one would need more memory than its file has."""
    folder = copied("owl2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {NORM: UNUSUAL[kind]()}, folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin", NORM)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1_000_000},
        {"hidden_size": 2**30},
        {"vocab_size": 2**31 - 1},
        {"intermediate_size": 2**31 - 1},
        {"visual_config.visual_model.num_hidden_layers": 1_000_000},
        {"visual_config.visual_abstractor.num_hidden_layers": 1_000_000},
        {"visual_config.visual_abstractor.num_learnable_queries": 2**31 - 1},
        {"visual_config.visual_model.image_size": 2**30, "visual_config.visual_model.patch_size": 1},
        {"visual_config.visual_model.image_size": 2**30, "visual_config.visual_model.patch_size": 2**28},
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_at_once(copied, changes):
    """Without building such a model, which would take the memory or the day."""
    folder = copied("owl2")

    def change(content):
        for key, value in changes.items():
            *path, leaf = key.split(".")
            reduce(dict.get, path, content)[leaf] = value

    edit_json(folder / "config.json", change)
    assert_refused(folder, folder.name)


def test_misfits_are_not_copied(copied):
    """10,000 tensors of one storage of 40 MB would take 400 GB."""
    folder = copied("owl2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    large = torch.zeros(10**7)
    torch.save(tensors | {f"x{i}": large for i in range(10_000)}, folder / "pytorch_model.bin")
    assert_refused(folder, "x0")


@pytest.mark.parametrize("name", ["owl2", "owl2-bin-shards"])
def test_a_folder_with_a_name_that_is_not_utf8(copied, name):
    """safetensors and torch cannot open it: a sentence says so."""
    folder = copied(name)
    folder = folder.rename(folder.with_name(os.fsdecode(b"caf\xe9")))
    with pytest.raises(ValueError, match="(?i)utf-?8"):
        weights.load_model(folder)


def test_a_pipe_is_refused(copied):
    folder = copied("owl2")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert_refused(folder, folder.name, error=(ValueError, FileNotFoundError))


def test_too_little_memory_is_called_that(tmp_path):
    """Not damage. The limit is on addresses, so that mapping the file fails."""
    tensors = {"a": torch.zeros(4 * 10**7)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    save_file(tensors, tmp_path / "model.safetensors")
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(weights.__file__).parent)!r})
from pathlib import Path
import weights
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 10**8, size + 10**8))
for name in ("pytorch_model.bin", "model.safetensors"):
    try:
        weights.read_tensors(Path({str(tmp_path)!r}, name))
    except ValueError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.stdout.count("does not fit in memory") == 2, result


@pytest.mark.parametrize("n_header", [5_000_000, 2**62])
def test_a_huge_safetensors_header_is_refused_at_once(copied, n_header):
    folder = copied("owl2")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(n_header.to_bytes(8, "little") + content[8:])
    assert_refused(folder, "model.safetensors", "header is too large")
