"""Checkpoints: the official layout in and out, bit for bit, and a sentence for everything that is not one."""

import copy
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import weights
from abstractor import sincos_1d, sincos_2d
from conftest import build
from vit import resize_positions

FOLDERS = ("owl1", "owl2", "owl2-bin-shards")
STYLES = ("owl1", "owl2")
PROBE = "model.norm.weight"  # a key of owl2's files
TOKENIZER = Path(__file__).parent / "golden" / "text" / "tokenizer.model"


def is_rotary(key: str) -> bool:
    return key.endswith("rotary_emb.inv_freq")


def is_position_code(key: str) -> bool:
    return key.endswith(("q_pos_embed", "k_pos_embed"))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weight files, read without the code that is tested."""
    tensors = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" and path.name != "golden.safetensors":
            tensors |= load_file(path)
        elif path.suffix == ".bin":
            tensors |= torch.load(path, weights_only=True)
    return tensors


def same_state(a, b) -> bool:
    """Whether two models hold the same names with the same bits."""
    first, second = a.state_dict(), b.state_dict()
    if list(first) != list(second):
        return False
    same_dtypes = all(first[key].dtype == second[key].dtype for key in first)
    return same_dtypes and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def copied(golden_folder, tmp_path):
    """copied(name) -> a copy of a golden model's folder, to be spoilt."""

    def make(name: str) -> Path:
        folder = tmp_path / f"copy-of-{name}"
        shutil.copytree(golden_folder(name), folder, ignore=shutil.ignore_patterns("golden.safetensors"))
        return folder

    return make


def edit_weights(folder: Path, edit) -> None:
    """Lets edit(tensors) change the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, edit) -> None:
    """Lets edit(content) change a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def assert_refused(folder: Path, *words: str, error=(ValueError, FileNotFoundError)) -> str:
    """Loading fails with one sentence that has all the words in it."""
    with pytest.raises(error) as caught:
        weights.load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# ----------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("folder", FOLDERS)
def test_load(golden_folder, folder):
    """Every tensor of the files is in the model as it is there, and the model is ready for use."""
    model = weights.load_model(golden_folder(folder))
    assert not model.training
    assert not any(module.training for module in model.modules())
    state = weights.official_state(model)
    for key, tensor in all_tensors(golden_folder(folder)).items():
        if not is_rotary(key):
            assert torch.equal(state[key], tensor), key
    for tensor in state.values():
        assert tensor.device.type == "cpu"
        assert tensor.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.is_leaf for parameter in model.parameters())


def test_shards_and_one_file_load_the_same(copied):
    """The .bin shards' tensors in one safetensors file; and the path as a string."""
    folder = copied("owl2-bin-shards")
    first = weights.load_model(folder)
    save_file({key: tensor.contiguous() for key, tensor in all_tensors(folder).items()}, folder / "model.safetensors")
    for path in (*folder.glob("*.bin"), *folder.glob("*.index.json")):
        path.unlink()
    assert same_state(first, weights.load_model(str(folder)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_load_in_bf16(golden_folder, folder):
    """Straight to the asked dtype; each value is the float32 one, rounded once."""
    full = weights.official_state(weights.load_model(golden_folder(folder)))
    model = weights.load_model(golden_folder(folder), dtype=torch.bfloat16)
    for key, tensor in weights.official_state(model).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, full[key].bfloat16()), key
    logits, _ = model(torch.tensor([[1, 5, 6]]))
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_loaded_model_is_no_view_of_its_files(copied, folder):
    """The files may be written over or deleted; the model, and training it, does not touch them."""
    folder = copied(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = weights.load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model = weights.load_model(folder)
    kept = copy.deepcopy(model)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    assert same_state(model, kept)


@pytest.mark.parametrize("name", ("owl1", "owl2"))
def test_one_bin_file(copied, golden_folder, name):
    """pytorch_model.bin without an index, as Owl1's released checkpoint is; also in torch's old format, not a zip."""
    folder = copied(name)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    expected = weights.load_model(golden_folder(name))
    for zipped in (True, False):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert same_state(weights.load_model(folder), expected)


def test_safetensors_are_preferred_to_bin(copied):
    """A folder that holds both formats is read once, from the safer one."""
    folder = copied("owl2")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    weights.load_model(folder)


def test_tensors_of_training_runs_load(copied):
    """The .bin files of training runs may hold half precision, parameters, and views of larger storages."""
    folder = copied("owl2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored = {}
    for key, tensor in tensors.items():
        twice = torch.cat([tensor, tensor]).half()
        stored[key] = torch.nn.Parameter(twice[: len(tensor)])
    torch.save(stored, folder / "pytorch_model.bin")
    model = weights.load_model(folder)
    for key, tensor in weights.official_state(model).items():
        assert torch.equal(tensor, tensors[key].half().float())
        assert tensor.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_save_load_is_bit_identical(golden_folder, tmp_path, folder, dtype):
    first = weights.load_model(golden_folder(folder), dtype=dtype)
    weights.save_model(first, tmp_path / "saved")
    second = weights.load_model(tmp_path / "saved", dtype=dtype)
    assert same_state(first, second)
    assert first.config == second.config
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"]
    assert stored == str(dtype).removeprefix("torch.")
    weights.save_model(second, tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("folder", ("owl1", "owl2"))
def test_saved_files_are_in_the_official_layout(copied, tmp_path, folder):
    """The released code's keys, dtypes and shapes; an index that lists them; the tokenizer's files."""
    source = copied(folder)
    shutil.copyfile(TOKENIZER, source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text('{"legacy": false}')
    model = weights.load_model(source)
    saved = tmp_path / "saved"
    weights.save_model(model, saved)
    theirs = {key: tensor for key, tensor in load_file(source / "model.safetensors").items() if not is_rotary(key)}
    ours = all_tensors(saved)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
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
    assert index["weight_map"].keys() == theirs.keys()
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in theirs.values())
    assert (saved / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert (saved / "tokenizer_config.json").read_text() == '{"legacy": false}'
    assert weights.read_config(saved) == weights.read_config(source)


@pytest.mark.parametrize("folder", ("owl1", "owl2"))
def test_saved_config_says_what_the_released_code_reads(golden_folder, tmp_path, folder):
    """Each field that we write has the released config's value, at the same place."""
    weights.save_model(weights.load_model(golden_folder(folder)), tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((golden_folder(folder) / "config.json").read_text())

    def compare(ours: dict, theirs: dict, place: str) -> None:
        for key, value in ours.items():
            if isinstance(value, dict):
                compare(value, theirs[key], f"{place}{key}.")
            elif key in theirs and theirs[key] is not None:
                assert value == theirs[key], place + key

    compare(ours, theirs, "")
    assert ours["architectures"] == theirs["architectures"]
    assert ours["model_type"] == theirs["model_type"]


def test_sharding(golden_folder, tmp_path, monkeypatch):
    """No shard above the limit, but for a tensor that is larger by itself; nothing twice, nothing lost."""
    model = weights.load_model(golden_folder("owl2"))
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    weights.save_model(model, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    n = len(shards)
    assert n > 5
    assert [path.name for path in shards] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    count = 0
    for path in shards:
        tensors = load_file(path)
        count += len(tensors)
        assert all(index[key] == path.name for key in tensors)
        assert len(tensors) == 1 or sum(4 * tensor.numel() for tensor in tensors.values()) <= 100_000
    assert count == len(index)
    assert same_state(weights.load_model(tmp_path), model)


def test_saving_again_to_the_same_folder(golden_folder, tmp_path, monkeypatch):
    """The newest weights are read, even where the older ones lay in more shards."""
    model = weights.load_model(golden_folder("owl2"))
    shutil.copyfile(TOKENIZER, tmp_path / "tokenizer.model")
    monkeypatch.setattr(weights, "SHARD_BYTES", 200_000)
    weights.save_model(model, tmp_path)
    model = weights.load_model(tmp_path)
    with torch.no_grad():
        model.llama.norm.weight.add_(1)
    monkeypatch.setattr(weights, "SHARD_BYTES", 10**9)
    weights.save_model(model, tmp_path)
    assert same_state(weights.load_model(tmp_path), model)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_saving_over_other_weights_is_refused(copied):
    """A folder that would then hold two models."""
    for name in ("owl2", "owl2-bin-shards"):
        folder = copied(name)
        with pytest.raises(ValueError, match="other weights"):
            weights.save_model(weights.load_model(folder), folder)


@pytest.mark.parametrize("style", STYLES)
def test_a_model_made_here_is_saved_and_loaded(tiny_config, tiny_owl, tmp_path, style):
    model = tiny_owl(tiny_config(style, llama={"n_kv_head": 2, "rope_theta": 500.0, "bos_id": 4, "eos_id": 5}))
    model.tokenizer_folder = TOKENIZER.parent
    weights.save_model(model, tmp_path)
    again = weights.load_model(tmp_path)
    assert same_state(model, again)
    assert again.config == model.config
    assert (tmp_path / "tokenizer.model").is_file()


# ----------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("style", STYLES)
def test_official_state_holds_the_parameters_themselves(tiny_config, tiny_owl, style):
    """The same memory: what is written through it, the model has; and every parameter is there once."""
    model = tiny_owl(tiny_config(style))
    state = weights.official_state(model)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held = [tensor.data_ptr() for key, tensor in state.items() if not is_position_code(key)]
    assert set(held) == parameters
    assert len(held) == len(parameters)
    key = {"owl1": "language_model.model.norm.weight", "owl2": "model.norm.weight"}[style]
    with torch.no_grad():
        state[key].fill_(7)
    assert (model.llama.norm.weight == 7).all()


def test_official_names_of_linears():
    """As adapters are named; also where the module's name has no `.weight` behind it."""
    for name, owl1, owl2 in [
        (
            "llama.layers.3.self_attn.q_proj",
            "language_model.model.layers.3.self_attn.q_proj",
            "model.layers.3.self_attn.q_proj",
        ),
        ("llama.lm_head", "language_model.lm_head", "lm_head"),
        ("llama.lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"),
        ("abstractor.fc", "abstractor.visual_fc", "model.visual_abstractor.visual_fc"),
        ("abstractor.eos", "abstractor.vit_eos", "model.visual_abstractor.vit_eos"),
        ("abstractor.queries", "query_tokens", "model.visual_abstractor.query_embeds"),
        (
            "vit.blocks.11.attn.qkv",
            "vision_model.encoder.layers.11.self_attn.query_key_value",
            "model.vision_model.encoder.layers.11.self_attn.query_key_value",
        ),
    ]:
        assert weights.official_name(name, "owl1") == owl1
        assert weights.official_name(name, "owl2") == owl2


def test_every_linear_has_an_official_name_of_its_own(tiny_config, tiny_owl):
    """A module's name is its weight's without `.weight`."""
    for style in STYLES:
        model = tiny_owl(tiny_config(style))
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert weights.official_name(name, style) + ".weight" == weights.official_name(f"{name}.weight", style)


# ----------------------------------------------------------------------------------------------------
# Position codes, image sizes, configs that lie


def test_missing_position_codes_are_computed(copied, golden_folder):
    """As the released code made them, to the last bit or two."""
    folder = copied("owl2")

    def drop(tensors):
        for key in [key for key in tensors if is_position_code(key)]:
            del tensors[key]

    edit_weights(folder, drop)
    computed = weights.official_state(weights.load_model(folder))
    stored = load_file(golden_folder("owl2") / "model.safetensors")
    for key in filter(is_position_code, stored):
        torch.testing.assert_close(computed[key], stored[key], rtol=0, atol=1e-6)


def test_position_codes_of_a_checkpoint_win(copied):
    folder = copied("owl2")

    def change(tensors):
        for key in filter(is_position_code, tensors):
            tensors[key] += 0.5

    edit_weights(folder, change)
    stored = load_file(folder / "model.safetensors")
    model = weights.load_model(folder)
    state = weights.official_state(model)
    for key in filter(is_position_code, stored):
        assert torch.equal(state[key], stored[key])
    weights.save_model(model, folder.parent / "saved")
    assert same_state(weights.load_model(folder.parent / "saved"), model)


def test_position_codes_by_hand():
    code = sincos_1d(torch.tensor([0, 3]), 4)
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.03, 3.0, 0.03]])
    expected[1, :2] = expected[1, :2].sin()
    expected[1, 2:] = expected[1, 2:].cos()
    torch.testing.assert_close(code, expected, rtol=0, atol=1e-7)
    grid = sincos_2d(3, 8)
    assert torch.equal(grid[0], torch.zeros(8))
    column, row = sincos_1d(torch.tensor([2]), 4)[0], sincos_1d(torch.tensor([1]), 4)[0]
    assert torch.equal(grid[1 + 1 * 3 + 2], torch.cat([column, row]))


@pytest.mark.parametrize("folder", FOLDERS)
def test_config_lies_about_the_width_of_the_abstractor(copied, golden_folder, folder):
    """Some of Owl1's config files do: the tensors are trusted."""
    expected = weights.load_model(golden_folder(folder))
    folder = copied(folder)

    def lie(content):
        section = content.get("visual_abstractor_config") or content["visual_config"]["visual_abstractor"]
        section["intermediate_size"] = 4096

    edit_json(folder / "config.json", lie)
    model = weights.load_model(folder)
    assert same_state(model, expected)
    assert model.config == expected.config


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [8, 16, 32])
def test_resized(tiny_config, tiny_owl, tmp_path, style, size):
    """Positions are interpolated, codes made for the new grid; the rest stays, and it can be trained and saved."""
    before = tiny_owl(tiny_config(style))
    config = copy.deepcopy(before.config)
    for wrong in (20, 0):
        with pytest.raises(ValueError):
            config.resize(wrong)
    config.resize(size)
    model = build(config, weights.resized(before.state_dict().items(), config))
    if size == 16:
        assert same_state(model, before)
    n_token = 1 + (size // 8) ** 2
    assert torch.equal(model.vit.position_embedding, resize_positions(before.vit.position_embedding.data, n_token))
    for name, tensor in before.state_dict().items():
        if name != "vit.position_embedding" and not name.endswith(".k_pos"):
            assert torch.equal(model.state_dict()[name], tensor)
    if style == "owl2":
        for layer in model.abstractor.layers:
            assert torch.equal(layer.attn.k_pos, sincos_2d(size // 8, 16))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.encode_images(torch.zeros(1, 3, size, size)).shape == (1, 4, 32)
    weights.save_model(model, tmp_path)
    again = weights.load_model(tmp_path)
    assert again.config == model.config
    assert same_state(again, model)


def test_fill_wants_a_tensor_for_every_place(tiny_config, tiny_owl):
    model = tiny_owl(tiny_config("owl2"))
    tensors = model.state_dict()
    del tensors["llama.norm.weight"]
    with pytest.raises(ValueError, match="llama.norm.weight"):
        build(model.config, tensors.items())


# ----------------------------------------------------------------------------------------------------
# Tensors that do not fit


def test_unknown_key(copied):
    folder = copied("owl2")
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.surprise": torch.zeros(2)}))
    assert_refused(folder, "model.layers.0.self_attn.surprise", "model.safetensors")


def test_rotary_buffers_are_the_only_keys_passed_over(copied):
    folder = copied("owl1")
    key = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({key + ".more": torch.zeros(2), "inv_freq": torch.zeros(2)}))
    message = assert_refused(folder, key + ".more", "model.safetensors: inv_freq", error=ValueError)
    assert "layers.1" not in message


@pytest.mark.parametrize("folder", ("owl1", "owl2"))
def test_every_missing_key_is_named(copied, golden_folder, folder):
    """Whichever one is taken away: none may be left at what memory held."""
    source = copied(folder)
    tensors = load_file(source / "model.safetensors")
    needed = [key for key in tensors if not is_rotary(key) and not is_position_code(key)]
    for key in needed[:: max(1, len(needed) // 12)]:
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        save_file(rest, source / "model.safetensors")
        assert_refused(source, key, str(list(tensors[key].shape)), error=ValueError)


def test_a_misshapen_tensor_names_file_key_and_both_shapes(copied):
    folder = copied("owl2")
    edit_weights(folder, lambda tensors: tensors.update({PROBE: torch.zeros(65)}))
    assert_refused(folder, "model.safetensors", PROBE, "[65]", "[64]", error=ValueError)


@pytest.mark.parametrize("shape", [(), (0,), (64,), (48, 31), (48, 32, 1)])
def test_a_misshapen_width_giver(copied, shape):
    """Also the tensor that the abstractor's width is read from."""
    folder = copied("owl2")
    key = "model.visual_abstractor.encoder.layers.0.crossattention.output.mlp.w1.weight"
    edit_weights(folder, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    assert_refused(folder, "model.safetensors", "output.mlp.", error=ValueError)


@pytest.mark.parametrize("key", ["q_pos_embed", "k_pos_embed"])
def test_misshapen_position_codes(copied, key):
    folder = copied("owl2")
    key = f"model.visual_abstractor.encoder.layers.1.crossattention.attention.{key}"
    edit_weights(folder, lambda tensors: tensors.update({key: torch.zeros(5, 32)}))
    assert_refused(folder, "model.safetensors", key, "[5, 32]", error=ValueError)


# ----------------------------------------------------------------------------------------------------
# Files that cannot be read


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.99])
def test_truncated_safetensors(copied, share):
    folder = copied("owl2")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])
    assert_refused(folder, "model.safetensors", "truncated or corrupt", error=ValueError)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_bin(copied, share, zipped):
    folder = copied("owl2-bin-shards")
    path = folder / "pytorch_model-2-of-4.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(folder, "pytorch_model-2-of-4.bin", "truncated or corrupt", error=ValueError)


NO_WEIGHTS = [b"hello\n", b"\0" * 1000, b"\x80\x02}q\0.", b"<!DOCTYPE html><html>", b"\xff" * 64]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", NO_WEIGHTS)
def test_files_that_are_something_else(copied, name, content):
    """Such as the web page that a failed download leaves."""
    folder = copied("owl2")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    assert_refused(folder, error=ValueError)


@pytest.mark.parametrize("name", ["owl2", "owl2-bin-shards"])
def test_git_lfs_pointers(copied, name):
    """What a clone without git-lfs holds."""
    folder = copied(name)
    path = next(path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 14200000000\n")
    assert_refused(folder, path.name, error=ValueError)


OTHER_PICKLES = [
    [torch.zeros(2)],
    {"a": 3},
    torch.zeros(2),
    {3: torch.zeros(2)},
    {"state_dict": {"a": torch.zeros(2)}},
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", OTHER_PICKLES)
def test_pickles_of_other_things(copied, content, zipped):
    folder = copied("owl2")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_refused(folder, "pytorch_model.bin", error=ValueError)


class Evil:
    """A pickle that makes a folder when it is read carelessly."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("how", ["zip", "old", "plain"])
def test_a_malicious_pickle_is_refused_and_not_executed(copied, tmp_path, how):
    folder = copied("owl2")
    (folder / "model.safetensors").unlink()
    target = tmp_path / "evil-was-here"
    content = {PROBE: torch.zeros(64), "x": Evil(target)}
    path = folder / "pytorch_model.bin"
    if how == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    assert_refused(folder, "pytorch_model.bin", error=ValueError)
    assert not target.exists()
    with path.open("rb") as file:
        if how == "plain":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert target.exists(), "the trap does work"


ELSEWHERE = ["../evil.bin", "/evil.bin", "sub/evil.bin", "..", "", "evil.txt", 3, None, ["a.bin"], {"a": 1}]


@pytest.mark.parametrize("shard", ELSEWHERE)
def test_an_index_that_points_elsewhere(copied, shard):
    folder = copied("owl2-bin-shards")
    shutil.copyfile(folder / "pytorch_model-1-of-4.bin", folder.parent / "evil.bin")
    edit_json(folder / "pytorch_model.bin.index.json", lambda index: index["weight_map"].update({PROBE: shard}))
    assert_refused(folder, "pytorch_model.bin.index.json", error=ValueError)


NO_INDEX = ["{}", "[]", "3", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "{", "", "null"]


@pytest.mark.parametrize("content", NO_INDEX)
def test_an_index_that_is_none(copied, content):
    folder = copied("owl2-bin-shards")
    (folder / "pytorch_model.bin.index.json").write_text(content)
    assert_refused(folder, "pytorch_model.bin.index.json", error=ValueError)


def test_a_shard_that_the_index_lists_is_missing(copied):
    folder = copied("owl2-bin-shards")
    (folder / "pytorch_model-3-of-4.bin").unlink()
    assert_refused(folder, "pytorch_model-3-of-4.bin", error=FileNotFoundError)


def test_a_shard_lacks_what_the_index_places_there(copied):
    folder = copied("owl2-bin-shards")
    path = folder / "pytorch_model.bin.index.json"
    home = json.loads(path.read_text())["weight_map"][PROBE]
    other = next(f"pytorch_model-{i}-of-4.bin" for i in range(1, 5) if f"-{i}-" not in home)
    edit_json(path, lambda index: index["weight_map"].update({PROBE: other}))
    assert_refused(folder, PROBE, other, error=ValueError)


# ----------------------------------------------------------------------------------------------------
# Folders and configs


def test_a_folder_that_is_none(copied, tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "file")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "config.json", error=FileNotFoundError)


def test_a_folder_without_weights(copied):
    folder = copied("owl2")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "model.safetensors", "pytorch_model.bin", error=FileNotFoundError)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "\x00", '"text"', "{'a': 1}", b"\xff\xfe{}"])
def test_a_corrupt_config(copied, content):
    folder = copied("owl2")
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(folder, "config.json", error=ValueError)


@pytest.mark.parametrize("model_type", ["llama", "mplug_owl3", "MPLUG_OWL2", "", None, 3, [], {}])
def test_an_unknown_model_type(copied, model_type):
    folder = copied("owl2")
    edit_json(folder / "config.json", lambda content: content.update(model_type=model_type))
    assert_refused(folder, "config.json", "model_type", error=ValueError)


def test_the_model_type_decides_whatever_the_folder_is_called(copied, golden_folder, tmp_path):
    folder = copied("owl2")
    renamed = folder.rename(tmp_path / "mplug-owl1-lora-llama-7b")
    assert same_state(weights.load_model(renamed), weights.load_model(golden_folder("owl2")))


HOSTILE = [
    ("hidden_size", "64"),
    ("hidden_size", -64),
    ("hidden_size", 0),
    ("hidden_size", 64.5),
    ("hidden_size", True),
    ("hidden_size", [64]),
    ("hidden_size", {}),
    ("hidden_size", 10**15),
    ("num_attention_heads", 0),
    ("num_attention_heads", 3),
    ("num_attention_heads", 64),
    ("num_attention_heads", -4),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 4),
    ("num_hidden_layers", 2),
    ("vocab_size", "many"),
    ("vocab_size", 513),
    ("max_position_embeddings", 0),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("rope_theta", 0),
    ("rope_theta", "10000"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("tie_word_embeddings", True),
    ("eos_token_id", "two"),
    ("eos_token_id", []),
    ("eos_token_id", float("inf")),
    ("visual_config", None),
    ("visual_config", []),
    ("visual_config", "x"),
    ("visual_config", {}),
    ("visual_config.visual_model", 3),
    ("visual_config.visual_model", None),
    ("visual_config.visual_model.image_size", "56"),
    ("visual_config.visual_model.image_size", 7),
    ("visual_config.visual_model.image_size", 112),
    ("visual_config.visual_model.patch_size", 0),
    ("visual_config.visual_model.patch_size", 7),
    ("visual_config.visual_model.patch_size", 100),
    ("visual_config.visual_model.num_attention_heads", 0),
    ("visual_config.visual_model.num_attention_heads", 5),
    ("visual_config.visual_model.hidden_size", 64),
    ("visual_config.visual_model.hidden_act", "gelu"),
    ("visual_config.visual_model.use_cls_token", False),
    ("visual_config.visual_model.use_post_layernorm", False),
    ("visual_config.visual_abstractor", [1]),
    ("visual_config.visual_abstractor.num_attention_heads", 0),
    ("visual_config.visual_abstractor.num_attention_heads", 5),
    ("visual_config.visual_abstractor.num_learnable_queries", -8),
    ("visual_config.visual_abstractor.num_learnable_queries", 9),
    ("visual_config.visual_abstractor.hidden_size", 30),
    ("visual_config.visual_abstractor.attention_probs_dropout_prob", "a lot"),
    ("visual_config.visual_abstractor.attention_probs_dropout_prob", 7),
    ("visual_config.visual_abstractor.attention_probs_dropout_prob", -0.5),
]


@pytest.mark.parametrize("key, value", HOSTILE)
def test_hostile_config_values(copied, key, value):
    """Each is refused in a sentence that names the file: of the config, or of the tensor that does not fit it."""
    folder = copied("owl2")
    *path, leaf = key.split(".")

    def change(content):
        for part in path:
            content = content[part]
        content[leaf] = value

    edit_json(folder / "config.json", change)
    assert_refused(folder, folder.name, error=ValueError)


@pytest.mark.parametrize("changes", [{"n_embd": 36, "n_head": 4}])
def test_an_odd_head_is_refused(tiny_config, tiny_owl, tmp_path, changes):
    """Rotary embedding turns pairs: heads of 9 have no last partner."""
    config = tiny_config("owl1", llama=changes, abstractor={"n_out": 36})
    weights.save_model(tiny_owl(config), tmp_path)
    assert_refused(tmp_path, "config.json", error=ValueError)


def test_a_config_that_says_little_means_the_7b():
    """Absent fields are those of the released models."""
    first = weights.parse_config({"model_type": "mplug-owl"}, "owl1")
    assert first == weights.OwlConfig("owl1", weights.ViTConfig(), weights.AbstractorConfig(), weights.LlamaConfig())
    second = weights.parse_config({"model_type": "mplug_owl2"}, "owl2")
    assert second.image_size == 448
    assert second.abstractor.grid_size == 32
    assert second.llama.adaptive


# ----------------------------------------------------------------------------------------------------
# Adapters and saving


def test_an_unmerged_adapter_is_not_lost_in_silence(tiny_config, tiny_owl, tmp_path):
    model = tiny_owl(tiny_config("owl2"))
    keys = list(weights.official_state(model))
    lora.wrap(model, ("q_proj",), rank=2, alpha=4)
    with pytest.raises(ValueError, match="merge"):
        weights.save_model(model, tmp_path / "no")
    lora.merge(model)
    weights.save_model(model, tmp_path / "yes")
    assert sorted(all_tensors(tmp_path / "yes")) == sorted(keys)
    again = weights.load_model(tmp_path / "yes")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids)[0], model(ids)[0])


# ----------------------------------------------------------------------------------------------------
# The starting points of stage 1, spoilt


@pytest.fixture
def starting_points(tiny_config, tiny_owl, tmp_path):
    """A CLIP and a LLaMA folder made by hand from a tiny owl, and the owl's configuration."""
    config = tiny_config("owl2")
    model = tiny_owl(config)
    clip = {"text_model.x": torch.zeros(2), "logit_scale": torch.zeros(())}
    for name, tensor in model.vit.state_dict().items():
        if ".qkv." in name:
            layer, leaf = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name).groups()
            parts = tensor.view(2, 3, 8, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)
            for letter, part in zip("qkv", parts):
                clip[f"vision_model.encoder.layers.{layer}.self_attn.{letter}_proj.{leaf}"] = part.clone()
        else:
            clip["vision_model." + weights._rename(name, weights.CLIP_NAMES)] = tensor.clone()
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


def test_starting_points_as_files(starting_points):
    """The vision tower comes back bit for bit, and the text halves of the decoder."""
    config, clip, llama, source = starting_points
    model = build(config, weights.start_from(config, clip, llama))
    for name, tensor in source.state_dict().items():
        if name.startswith("vit.") or (name.startswith("llama.") and ".multiway.1" not in name):
            assert torch.equal(model.state_dict()[name], tensor), name
    assert not torch.equal(model.abstractor.queries[0, 0], model.abstractor.queries[0, 1])
    assert all(parameter.requires_grad for parameter in model.parameters())


SPOILT = [
    ("clip", "vision_model.post_layernorm.weight", None),
    ("clip", "vision_model.post_layernorm.weight", (17,)),
    ("clip", "vision_model.encoder.layers.0.self_attn.k_proj.weight", None),
    ("clip", "vision_model.encoder.layers.0.self_attn.k_proj.weight", (16, 17)),
    ("clip", "vision_model.embeddings.position_embedding.weight", (7, 16)),
    ("clip", "vision_model.embeddings.position_embedding.weight", (5, 17)),
    ("clip", "vision_model.embeddings.position_embedding.weight", (1, 16)),
    ("clip", "vision_model.embeddings.position_embedding.weight", ()),
    ("clip", "vision_model.embeddings.class_embedding", (15,)),
    ("clip", "vision_model.surprise", (1,)),
    ("llama", "model.norm.weight", None),
    ("llama", "model.norm.weight", (33,)),
    ("llama", "model.layers.0.self_attn.k_proj.weight", None),
    ("llama", "model.layers.1.mlp.up_proj.weight", (40, 31)),
    ("llama", "model.surprise", (1,)),
]


@pytest.mark.parametrize("which, key, shape", SPOILT)
def test_spoilt_starting_points(starting_points, which, key, shape):
    config, clip, llama, _ = starting_points
    folder = {"clip": clip, "llama": llama}[which]
    tensors = load_file(folder / "model.safetensors")
    if shape is None:
        del tensors[key]
    else:
        tensors[key] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        list(weights.start_from(config, clip, llama))
    assert key in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["clip", "llama"])
def test_starting_points_that_are_not_there(starting_points, tmp_path, which):
    config, clip, llama, _ = starting_points
    places = {"clip": clip, "llama": llama} | {which: tmp_path / "nowhere"}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(weights.start_from(config, **places))


def test_what_a_lora_run_trained_beside_its_adapter_is_loaded(tmp_path):
    """non_lora_trainables.bin, under PEFT's names: its values win, unknown names and shapes are refused."""
    model = weights.load_model(TOKENIZER.parent.parent / "owl2")
    fc = weights.official_state(model)["model.visual_abstractor.visual_fc.weight"]
    wanted = torch.randn_like(fc)
    weights.load_non_lora(model, tmp_path)  # a folder without the file: nothing happens
    key = "base_model.model.model.visual_abstractor.visual_fc.weight"
    torch.save({key: wanted}, tmp_path / "non_lora_trainables.bin")
    weights.load_non_lora(model, tmp_path)
    assert torch.equal(model.abstractor.fc.weight, wanted)
    for key, tensor in (("base_model.model.nobody.weight", wanted), ("base_model.model.lm_head.weight", wanted)):
        torch.save({key: tensor}, tmp_path / "non_lora_trainables.bin")
        with pytest.raises(ValueError, match="non_lora_trainables.bin"):
            weights.load_non_lora(model, tmp_path)
