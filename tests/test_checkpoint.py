"""Checkpoints: every bit comes back, on any number of processes; damage is noticed; what is hostile is harmless."""

import json
import os
import pathlib
import pickle
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as descriptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import checkpoint
from checkpoint import MANIFEST, damage, digest, find, load, newest_first, save
from parallel import Place, start_process, whole
from runs import in_processes

ALONE = Place(0, 1, torch.device("cpu"), torch.float32)
FACTS = {"settings": {"lr": 1e-3, "data": "über.json", "val": None}, "updates": 7, "bad_steps": 0}


def example(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of all kinds and of awkward sizes: fewer rows than processes, or not divisible by them."""
    g = torch.Generator().manual_seed(seed)
    return {
        "weight.a": torch.randn(5, 3, generator=g),
        "weight.b": torch.randn(7, 2, generator=g).bfloat16(),
        "weight.c": torch.randn(1, 4, generator=g),
        "moment1.a": torch.randn(5, 3, generator=g) * 1e-40,  # most of them are not normal numbers
        "moment2.a": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]),
        "scalar": torch.randn((), generator=g),
    }


def bits(tensor: Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert bits(a[name]) == bits(b[name]), name


def blanks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 99.0) for name, tensor in tensors.items()}


def read(path: Path) -> dict[str, Tensor]:
    """What is in a checkpoint of `example`'s tensors."""
    tensors = blanks(example())
    load(path, manifest_of(path), tensors)
    return tensors


def manifest_of(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog):
    """torch would log a traceback for what is answered by one sentence."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelname == "WARNING"] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of two checkpoints, of steps 1 and 2, with the tensors example(1) and example(2). Copy it."""
    folder = tmp_path_factory.mktemp("made")
    for step in (1, 2):
        save(folder, step, FACTS, example(step), ALONE, keep=2)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "checkpoints"))


# ----------------------------------------------------------------------------------------------------
# There and back


def test_every_bit_comes_back(tmp_path):
    save(tmp_path / "new" / "checkpoints", 12, FACTS, example(), ALONE, keep=2)
    path, manifest = find(tmp_path / "new" / "checkpoints", ALONE)
    assert path.name == "step-00000012"
    assert (manifest["step"], manifest["facts"]) == (12, FACTS)
    assert_same_bits(read(path), example())


def test_saving_and_loading_say_nothing(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 1, FACTS, example(), ALONE, keep=2)
        read(tmp_path / "step-00000001")
    assert capfd.readouterr() == ("", "")


def test_loading_fills_the_tensors_that_it_is_given(folder):
    """The model's own, and the optimizer's: none is put in their place."""
    tensors = blanks(example())
    own = dict(tensors)
    parameter = nn.Parameter(tensors["weight.a"])
    tensors["weight.a"] = parameter.detach()
    load(folder / "step-00000001", manifest_of(folder / "step-00000001"), tensors)
    assert_same_bits({**own, "weight.a": parameter.detach()}, example(1))


def test_no_checkpoint_is_no_checkpoint(tmp_path):
    assert find(tmp_path / "none", ALONE) is None
    assert find(tmp_path, ALONE) is None


def test_the_newest_counts_and_only_some_stay(tmp_path):
    for step in (5, 99, 100, 1000):
        save(tmp_path, step, {"was": step}, example(step), ALONE, keep=2)
    assert [path.name for path in newest_first(tmp_path)] == ["step-00001000", "step-00000100"]
    path, manifest = find(tmp_path, ALONE)
    assert manifest["step"] == 1000 and manifest["facts"] == {"was": 1000}
    assert_same_bits(read(path), example(1000))
    save(tmp_path, 1001, {}, example(), ALONE, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00001001"]


def test_other_things_in_the_folder_stay(folder):
    others = ["notes", "step-000000001", "step-0000000x", "step-1"]
    for name in others:
        (folder / name).mkdir()
    save(folder, 3, FACTS, example(3), ALONE, keep=1)
    assert {path.name for path in folder.iterdir()} == {*others, "step-00000003"}
    assert find(folder, ALONE)[0].name == "step-00000003"


def test_a_half_written_one_is_ignored_and_written_anew(folder):
    part = folder / "step-00000003.part"
    shutil.copytree(folder / "step-00000002", part)
    (part / "__7_0.distcp").write_bytes(b"of a run on eight processes")
    assert find(folder, ALONE)[0].name == "step-00000002"
    save(folder, 3, FACTS, example(3), ALONE, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert not (folder / "step-00000003" / "__7_0.distcp").exists()
    assert_same_bits(read(find(folder, ALONE)[0]), example(3))


def test_a_damaged_one_is_written_anew(folder):
    """A run that goes on from the one before comes by its step again."""
    (folder / "step-00000002" / ".metadata").unlink()
    (folder / "step-00000002" / "__9_9.distcp").write_bytes(b"")
    save(folder, 2, FACTS, example(5), ALONE, keep=2)
    assert [path.name for path in newest_first(folder)] == ["step-00000002", "step-00000001"]
    assert not (folder / "step-00000002" / "__9_9.distcp").exists()
    assert_same_bits(read(find(folder, ALONE)[0]), example(5))


def test_a_folder_that_nodes_do_not_share_is_noticed_at_once(folder, monkeypatch):
    """Another node's process tells of a file that the first does not see."""
    monkeypatch.setattr(checkpoint, "from_all", lambda place, mine: [mine, {"__8_0.distcp": [5, "0" * 64]}])
    with pytest.raises(OSError, match="__8_0.distcp.*all nodes share"):
        save(folder, 3, FACTS, example(3), ALONE, keep=2)
    assert not (folder / "step-00000003").exists()


class Killed(BaseException):
    """As a kill is: nothing gets to handle it."""


@pytest.mark.parametrize("moment", ["before the manifest", "before the name", "before the old ones go"])
def test_there_is_a_whole_one_whenever_a_save_is_cut_short(folder, monkeypatch, moment):
    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before the manifest":
            patch.setattr(checkpoint, "digest", die)
        elif moment == "before the name":
            patch.setattr(Path, "replace", die)
        else:
            patch.setattr(checkpoint, "newest_first", die)
        with pytest.raises(Killed):
            save(folder, 3, FACTS, example(3), ALONE, keep=1)
    step = 3 if moment == "before the old ones go" else 2
    path, manifest = find(folder, ALONE)
    assert manifest["step"] == step
    assert_same_bits(read(path), example(step))
    save(folder, 3, FACTS, example(3), ALONE, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


# ----------------------------------------------------------------------------------------------------
# Damage

FILES = (".metadata", "__0_0.distcp", MANIFEST)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def add_a_byte(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b"\n")


def zero(file: Path) -> None:
    """What a crash of the whole machine leaves of a file that was not yet on the disk."""
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def make_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [truncate, halve, empty, add_a_byte, zero, flip, Path.unlink, make_a_folder])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_passed_over_with_a_warning(folder, capsys, name, harm):
    newest = folder / "step-00000002"
    harm(newest / name)
    path, manifest = find(folder, ALONE)
    assert path.name == "step-00000001" and manifest["step"] == 1
    assert_same_bits(read(path), example(1))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("warning: ") and str(newest) in err and name in err


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_wherever_it_is(folder, name):
    path = folder / "step-00000002"
    sound = (path / name).read_bytes()
    rng = random.Random(0)
    places = range(len(sound)) if name == MANIFEST else sorted(rng.sample(range(len(sound)), 300))
    for place in places:
        for mask in (1 << rng.randrange(8), rng.randrange(1, 256), 7):  # 7 takes one kind of line end to the other
            content = bytearray(sound)
            content[place] ^= mask
            (path / name).write_bytes(content)
            assert damage(path, ALONE) is not None, f"byte {place}: {sound[place]} -> {content[place]}"
    (path / name).write_bytes(sound)
    assert damage(path, ALONE) is None


OTHER_JSON = ["", "{}", "[]", "null", "7", '"step"', "{", "[" * 100_000, '{"files": {}}', "\u00fc"]
OTHER_JSON += [f'{{"step": 9, "facts": {{}}, "tensors": [], "files": {files}}}' for files in ("3", "[]", "{}")]


@pytest.mark.parametrize("text", OTHER_JSON, ids=lambda text: text[:20])
def test_a_manifest_of_other_json_is_damage(folder, capsys, text):
    newest = folder / "step-00000002"
    (newest / MANIFEST).write_text(text, encoding="latin-1")
    assert find(folder, ALONE)[0].name == "step-00000001"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(newest) in err and MANIFEST in err


def test_where_all_are_damaged_it_says_so(folder, capsys):
    for path in newest_first(folder):
        flip(path / "__0_0.distcp")
    with pytest.raises(ValueError) as error:
        find(folder, ALONE)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err.count("warning: ") == 2


# ----------------------------------------------------------------------------------------------------
# Another run's, or an enemy's


def refused(path: Path, tensors: dict[str, Tensor] | None = None) -> str:
    """The one sentence with which a checkpoint is refused that is as it was written."""
    assert damage(path, ALONE) is None
    with pytest.raises(ValueError) as error:
        load(path, manifest_of(path), tensors or blanks(example()))
    sentence = str(error.value)
    assert str(path) in sentence and "\n" not in sentence and "Traceback" not in sentence and len(sentence) < 500
    return sentence


def test_other_tensors_are_refused(folder):
    path = folder / "step-00000001"
    fewer = {name: tensor for name, tensor in example().items() if name != "weight.a"}
    for tensors in (fewer, example() | {"weight.z": torch.zeros(1)}, fewer | {"weight.A": torch.zeros(5, 3)}):
        assert "other parameters" in refused(path, tensors)


@pytest.mark.parametrize("shape", [(3, 5), (5, 4), (6, 3), (15,), ()])
def test_other_shapes_are_refused(folder, shape):
    assert "weight.a" in refused(folder / "step-00000001", example() | {"weight.a": torch.zeros(shape)})


def reseal(path: Path) -> None:
    """Makes the manifest one of the files as they are now, as someone who means harm would."""
    manifest = manifest_of(path)
    manifest.pop("sha256", None)
    manifest["files"] = {file.name: digest(file) for file in path.iterdir() if file.name != MANIFEST}
    (path / MANIFEST).write_bytes(checkpoint.seal(manifest))


def open_metadata(path: Path) -> object:
    return pickle.loads((path / ".metadata").read_bytes())


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: object, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def by_name(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls what find_class has for a name, dots and all."""

    def text(string: str) -> bytes:
        return pickle.BINUNICODE + len(string.encode()).to_bytes(4, "little") + string.encode()

    called = pickle.MARK + b"".join(map(text, arguments)) + pickle.TUPLE + pickle.REDUCE
    return pickle.PROTO + b"\x04" + text(module) + text(name) + pickle.STACK_GLOBAL + called + pickle.STOP


PLACE = "torch.distributed.checkpoint.metadata"
CALLS = [
    ("os", "system", "touch {}"),
    ("posix", "system", "touch {}"),
    ("builtins", "eval", "open({!r}, 'w')"),
    ("builtins", "exec", "open({!r}, 'w')"),
    ("builtins", "open", "{}", "w"),
    ("builtins", "__import__", "this"),
    ("builtins", "getattr", "a", "upper"),
    ("torch", "os.system", "touch {}"),
    ("torch", "float32.__class__", "{}"),
    ("torch", "serialization.os.system", "touch {}"),
    ("torch.serialization", "os.system", "touch {}"),
    ("torch.serialization", "_get_layout.__globals__", "{}"),
    ("torch.serialization", "load", "{}"),
    (PLACE, "os.system", "touch {}"),
    (PLACE, "Metadata.__init__.__globals__", "{}"),
    (PLACE, "__builtins__", "{}"),
    ("pathlib", "os.system", "touch {}"),
    ("pathlib", "PosixPath.touch", "{}"),
    ("pathlib", "Path", "{}"),
    ("operator", "attrgetter", "a.b"),
    ("functools", "partial", "{}"),
    ("torch.hub", "load", "{}"),
    ("numpy", "save", "{}"),
]


@pytest.mark.parametrize("module, name, arguments", [(m, n, a) for m, n, *a in CALLS], ids=lambda x: str(x)[:40])
def test_a_description_that_calls_something_calls_nothing(folder, tmp_path, module, name, arguments):
    path = folder / "step-00000002"
    mark = tmp_path / "mark"
    (path / ".metadata").write_bytes(by_name(module, name, *(text.format(str(mark)) for text in arguments)))
    reseal(path)
    assert f"{module}.{name}" in refused(path)
    assert not mark.exists()


def test_a_call_hidden_in_a_true_description_is_not_made(folder, tmp_path):
    """Everything is as it should be, but for one thing deep inside."""
    path = folder / "step-00000002"
    mark = tmp_path / "mark"
    metadata = open_metadata(path)
    metadata.state_dict_metadata["weight.a"].chunks.append(Call(os.system, f"touch {mark}"))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    refused(path)
    assert not mark.exists()


@pytest.mark.parametrize("target", [pathlib.PosixPath, torch.serialization._get_layout, descriptions.Metadata])
def test_a_description_changes_no_class_and_no_function(folder, target):
    """A pickle may set attributes of what it names: with PosixPath.name it would pass for a file beside it."""
    path = folder / "step-00000002"
    before = dict(vars(target))
    harm = pickle.MARK + pickle.NONE  # (None, {"name": "x"}): what goes into slots is set by setattr
    harm += pickle.EMPTY_DICT + b"\x8c\x04name" + b"\x8c\x01x" + pickle.SETITEM + pickle.TUPLE + pickle.BUILD
    named = b"\x8c" + bytes([len(target.__module__)]) + target.__module__.encode()
    named += b"\x8c" + bytes([len(target.__name__)]) + target.__name__.encode() + pickle.STACK_GLOBAL
    (path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + named + harm + pickle.STOP)
    reseal(path)
    try:
        refused(path)
        assert dict(vars(target)) == before
    finally:
        if "name" in vars(target) and "name" not in before:
            del target.name


def splice(path: Path, blob: bytes, name: str = "weight.a") -> object:
    """Appends a blob to the file of tensors, and returns the description with one tensor's place moved there."""
    metadata = open_metadata(path)
    file = path / "__0_0.distcp"
    for index, part in metadata.storage_data.items():
        if index.fqn == name:
            part.offset, part.length = file.stat().st_size, len(blob)
    with file.open("ab") as end:
        end.write(blob)
    return metadata


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_is_a_hostile_pickle_is_not_run(folder, tmp_path, zipped):
    path = folder / "step-00000002"
    mark, blob = tmp_path / "mark", tmp_path / "blob"
    torch.save(Call(os.system, f"touch {mark}"), blob, _use_new_zipfile_serialization=zipped)
    (path / ".metadata").write_bytes(pickle.dumps(splice(path, blob.read_bytes())))
    reseal(path)
    refused(path)
    assert not mark.exists()


def test_a_tensor_that_is_described_as_an_object_is_not_unpickled(folder, tmp_path):
    """torch reads what is said to be no tensor with a pickle that may do anything."""
    path = folder / "step-00000002"
    mark, blob = tmp_path / "mark", tmp_path / "blob"
    torch.save(Call(os.system, f"touch {mark}"), blob)
    metadata = splice(path, blob.read_bytes())
    metadata.state_dict_metadata["weight.a"] = descriptions.BytesStorageMetadata()
    metadata.storage_data = {
        descriptions.MetadataIndex(index.fqn) if index.fqn == "weight.a" else index: part
        for index, part in metadata.storage_data.items()
    }
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    refused(path)
    assert not mark.exists()


OUTSIDE = ["../../secret", "TMP/secret", "../step-00000001/__0_0.distcp", "..", "", ".", "x/../y"]


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_place_outside_the_folder_is_refused(folder, tmp_path, outside):
    path = folder / "step-00000002"
    outside = outside.replace("TMP", str(tmp_path))
    (tmp_path / "secret").write_bytes((path / "__0_0.distcp").read_bytes())  # what is there would do
    metadata = open_metadata(path)
    for part in metadata.storage_data.values():
        part.relative_path = outside
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    tensors = blanks(example())
    assert repr(outside) in refused(path, tensors)
    assert_same_bits(tensors, blanks(example()))


def test_a_description_with_any_byte_changed_is_read_or_refused(folder):
    """Nothing but ValueError, whatever the pickle has become."""
    path = folder / "step-00000002"
    sound = (path / ".metadata").read_bytes()
    rng = random.Random(0)
    n_refused = 0
    for _ in range(200):
        content = bytearray(sound)
        content[rng.randrange(len(content))] = rng.randrange(256)
        (path / ".metadata").write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        reseal(path)
        try:
            read(path)
        except ValueError as error:
            assert "\n" not in str(error) and "Traceback" not in str(error)
            n_refused += 1
    assert n_refused > 100


# ----------------------------------------------------------------------------------------------------
# Several processes


class Sharded(nn.Module):
    """Three of `example`'s tensors as parameters, which FSDP can shard."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.parts = nn.ParameterList(tensors[f"weight.{x}"].clone() for x in "abc")

    def tensors(self) -> dict[str, Tensor]:
        return {f"weight.{x}": part.detach() for x, part in zip("abc", self.parts)}


def sharded(tensors: dict[str, Tensor], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """`example`'s tensors, three of them sharded over a mesh of processes; in copies, where it has two sizes."""
    model = Sharded(tensors)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copy", "shard")[-len(sizes) :])
    fully_shard(model, mesh=mesh)
    return tensors | model.tensors()


def assert_read_as(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    load(path, manifest_of(path), tensors)
    assert_same_bits({name: whole(tensor) for name, tensor in tensors.items()}, expected)


def two_processes(folder: Path) -> None:
    """What each of two processes does: writes sharded and plain ones, reads both as both, and meets damage."""
    place = start_process("cpu")
    for step, tensors in ((1, example(1)), (2, sharded(example(2), (2,))), (3, sharded(example(3), (2,)))):
        save(folder, step, FACTS, tensors, place, keep=3)
    for step in (1, 2):
        assert_read_as(folder / f"step-{step:08d}", blanks(example()), example(step))
        assert_read_as(folder / f"step-{step:08d}", sharded(blanks(example()), (2,)), example(step))
    files = {name for name in manifest_of(folder / "step-00000002")["files"]}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}

    for tensors, word in (
        (example() | {"more": torch.zeros(1)}, "other parameters"),
        (blanks(example()) | {"weight.a": torch.zeros(3, 5)}, "weight.a"),
        (sharded(blanks(example()) | {"weight.a": torch.zeros(4, 3)}, (2,)), "weight.a"),
    ):
        try:
            load(folder / "step-00000002", manifest_of(folder / "step-00000002"), tensors)
        except ValueError as error:
            assert word in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError("it was read")

    dist.barrier()
    if place.is_first:
        flip(folder / "step-00000003" / "__1_0.distcp")
    dist.barrier()
    path, manifest = find(folder, place)
    assert path.name == "step-00000002" and manifest["step"] == 2


def four_processes(folder: Path, copy: Path) -> None:
    """Reads what two have written, sharded over four and over two times two; and writes so for one to read."""
    place = start_process("cpu")
    path, _ = find(folder, place)
    for sizes in ((4,), (2, 2)):
        assert_read_as(path, sharded(blanks(example()), sizes), example(2))
    assert_read_as(path, blanks(example()), example(2))
    save(copy, 4, FACTS, sharded(example(4), (2, 2)), place, keep=1)


def test_what_two_write_is_read_by_one_two_and_four(tmp_path):
    folder, copy = tmp_path / "two", tmp_path / "four"
    errors = in_processes(2, tmp_path, two_processes, folder)
    assert errors[0].count("warning: the checkpoint") == 1 and "warning: the checkpoint" not in errors[1]
    assert f"{folder / 'step-00000003'} is passed over: __1_0.distcp" in errors[0]
    for step in (1, 2):
        assert_same_bits(read(folder / f"step-{step:08d}"), example(step))
    shutil.rmtree(folder / "step-00000003")
    in_processes(4, tmp_path, four_processes, folder, copy)
    assert_same_bits(read(find(copy, ALONE)[0]), example(4))
