"""Checkpoints are read bit for bit on any number of processes; damage is detected, hostile files do no harm."""

import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from runs import in_processes
from training import checkpoint
from training.checkpoint import MANIFEST, checksum, find, find_damage, load, newest_first, save
from training.distributed import Dist, init_distributed
from training.parallel import full_tensor

ALONE = Dist(0, 1, torch.device("cpu"), torch.float32)
METADATA = {"settings": {"lr": 1e-3, "data": "über.json", "val": None}, "updates": 1, "bad_steps": 0}


def example(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of several dtypes, some with fewer rows than processes or not divisible by them."""
    g = torch.Generator().manual_seed(seed)
    return {
        "weight.a": torch.randn(5, 3, generator=g),
        "weight.b": torch.randn(7, 2, generator=g).bfloat16(),
        "weight.c": torch.randn(1, 4, generator=g),
        "moment1.a": torch.randn(5, 3, generator=g) * 1e-40,  # most are subnormal
        "moment2.a": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]),
        "scalar": torch.randn((), generator=g),
    }


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        first, second = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name]))
        assert torch.equal(first, second), name


def blanks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 99.0) for name, tensor in tensors.items()}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint with the names and shapes of `example`."""
    tensors = blanks(example())
    load(path, manifest_of(path), tensors)
    return tensors


def manifest_of(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog):
    """torch must not log a traceback for an error that is reported in one line."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelname == "WARNING"] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of checkpoints of steps 1 and 2, with the tensors example(1) and example(2). Copy it."""
    folder = tmp_path_factory.mktemp("made")
    for step in (1, 2):
        save(folder, step, METADATA, example(step), dist=ALONE, keep=2)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "checkpoints"))


# --- Saving and loading ---------------------------------------------------------------------------


def test_every_bit_is_restored(tmp_path, capfd):
    """Without a message or a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "new" / "checkpoints", 12, METADATA, example(), dist=ALONE, keep=2)
        path, manifest = find(tmp_path / "new" / "checkpoints", ALONE)
        assert_same_bits(read(path), example())
    assert (path.name, manifest["step"], manifest["facts"]) == ("step-00000012", 12, METADATA)
    assert capfd.readouterr() == ("", "")


def test_find_returns_the_newest_and_save_removes_old_ones(tmp_path):
    assert find(tmp_path / "none", ALONE) is None and find(tmp_path, ALONE) is None
    others = {"notes", "step-000000001", "step-0000000x", "step-1"}  # kept
    for name in others:
        (tmp_path / name).mkdir()
    for step in (5, 99, 100, 1000):
        save(tmp_path, step, METADATA | {"was": step}, example(step), dist=ALONE, keep=2)
    assert [path.name for path in newest_first(tmp_path)] == ["step-00001000", "step-00000100"]
    path, manifest = find(tmp_path, ALONE)
    assert manifest["step"] == 1000 and manifest["facts"]["was"] == 1000
    assert_same_bits(read(path), example(1000))
    save(tmp_path, 1001, METADATA, example(), dist=ALONE, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "step-00001001"}


@pytest.mark.parametrize("name", ["step-00000003.part", "step-00000003"])
def test_an_incomplete_checkpoint_is_ignored_and_replaced(folder, capsys, name):
    """Of a run that was killed, or damaged; a run that resumes reaches its step again."""
    shutil.copytree(folder / "step-00000002", folder / name)
    (folder / name / ".metadata").unlink()
    (folder / name / "__7_0.distcp").write_bytes(b"of a run on eight processes")
    assert find(folder, ALONE)[0].name == "step-00000002"
    save(folder, 3, METADATA, example(3), dist=ALONE, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert not (folder / "step-00000003" / "__7_0.distcp").exists()
    assert_same_bits(read(find(folder, ALONE)[0]), example(3))


def test_a_folder_that_nodes_do_not_share_is_an_error(folder, monkeypatch):
    """A rank on another node reports a file that rank 0 does not see."""
    monkeypatch.setattr(checkpoint, "all_gather_object", lambda dist, own: [own, {"__8_0.distcp": [5, "0" * 64]}])
    with pytest.raises(OSError, match="__8_0.distcp"):
        save(folder, 3, METADATA, example(3), dist=ALONE, keep=2)
    assert not (folder / "step-00000003").exists()


INTERRUPTED = {"checksum": (checkpoint, 2), "replace": (Path, 2), "newest_first": (checkpoint, 3)}


@pytest.mark.parametrize("function", INTERRUPTED)
def test_an_interrupted_save_leaves_an_intact_checkpoint(folder, monkeypatch, function):
    """Before the manifest is written, before the folder gets its name, or before old checkpoints are removed."""

    def die(*_, **__):
        raise KeyboardInterrupt  # like a kill, no handler catches it

    owner, step = INTERRUPTED[function]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, function, die)
        save(folder, 3, METADATA, example(3), dist=ALONE, keep=1)
    path, manifest = find(folder, ALONE)
    assert manifest["step"] == step
    assert_same_bits(read(path), example(step))
    save(folder, 3, METADATA, example(3), dist=ALONE, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


# --- Damage ---------------------------------------------------------------------------------------

FILES = (".metadata", "__0_0.distcp", MANIFEST)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


HARM = {
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\n",
    "zero": lambda content: bytes(len(content)),  # after a crash of the machine before it was on the disk
    "flipped": flip,
    "missing": None,
    "a folder": None,
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(folder, capsys, name, harm):
    file = folder / "step-00000002" / name
    content = file.read_bytes()
    file.unlink()
    if harm == "a folder":
        file.mkdir()
    elif harm != "missing":
        file.write_bytes(HARM[harm](content))
    path, manifest = find(folder, ALONE)
    assert path.name == "step-00000001" and manifest["step"] == 1
    assert_same_bits(read(path), example(1))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("warning: ") and str(file.parent) in err and name in err


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected_at_any_position(folder, name):
    path = folder / "step-00000002"
    intact = (path / name).read_bytes()
    rng = random.Random(0)
    for offset in rng.sample(range(len(intact)), 150):
        for mask in (1 << rng.randrange(8), 7):  # 7 turns one kind of line end into the other
            content = bytearray(intact)
            content[offset] ^= mask
            (path / name).write_bytes(content)
            assert find_damage(path, ALONE) is not None, f"byte {offset}: {intact[offset]} -> {content[offset]}"
    (path / name).write_bytes(intact)
    assert find_damage(path, ALONE) is None


OTHER_JSON = ["", "{}", "[]", "7", '"step"', "[" * 100_000, '{"files": {}}', "\u00fc"]
OTHER_JSON += [f'{{"step": 9, "facts": {{}}, "tensors": [], "files": {files}}}' for files in ("3", "{}")]


@pytest.mark.parametrize("text", OTHER_JSON, ids=lambda text: text[:20])
def test_a_manifest_of_other_json_is_damaged(folder, capsys, text):
    newest = folder / "step-00000002"
    (newest / MANIFEST).write_text(text, encoding="latin-1")
    assert find(folder, ALONE)[0].name == "step-00000001"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(newest) in err and MANIFEST in err


IMPOSSIBLE = [("step", -5), ("step", 10), ("step", "2"), ("step", True), ("facts", {}), ("facts", []), ("files", {})]
IMPOSSIBLE += [("tensors", [1]), ("tensors", None), ("facts", METADATA | {"updates": -1}), ("step", None)]
IMPOSSIBLE += [("facts", METADATA | {"updates": 9}), ("facts", METADATA | {"settings": 1})]
IMPOSSIBLE += [("files", {".metadata": 7}), ("files", {"../step-00000001/.metadata": [1, ""]})]


@pytest.mark.parametrize("name, value", IMPOSSIBLE, ids=str)
def test_an_impossible_manifest_is_damaged(folder, capsys, name, value):
    """Its own checksum is right. None: the entry is missing."""
    newest = folder / "step-00000002"
    manifest = {key: value for key, value in (manifest_of(newest) | {name: value}).items() if value is not None}
    manifest.pop("sha256")
    (newest / MANIFEST).write_bytes(checkpoint.encode_manifest(manifest))
    assert find(folder, ALONE)[0].name == "step-00000001"
    assert MANIFEST in capsys.readouterr().err


def test_sizes_are_compared_before_any_content_is_read(folder, monkeypatch):
    with (folder / "step-00000002" / "__0_0.distcp").open("ab") as file:
        file.write(b"x")
    monkeypatch.setattr(checkpoint, "checksum", lambda path: 1 / 0)
    assert "__0_0.distcp" in find_damage(folder / "step-00000002", ALONE)


def test_what_is_written_is_not_read_back(tmp_path, monkeypatch):
    """The manifest has the checksums of the files nevertheless."""
    read_back = []
    monkeypatch.setattr(checkpoint, "checksum", lambda path: read_back.append(path.name) or checksum(path))
    save(tmp_path, 1, METADATA, example(), dist=ALONE, keep=1)
    assert read_back == [".metadata"]
    monkeypatch.undo()
    files = manifest_of(tmp_path / "step-00000001")["files"]
    assert files == {name: checksum(tmp_path / "step-00000001" / name) for name in (".metadata", "__0_0.distcp")}


def test_links_are_removed_and_not_followed(folder, tmp_path):
    """Named like what save removes: half a checkpoint, a damaged one, and an old one."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    for name in ("step-00000003.part", "step-00000003", "step-00000000"):
        (folder / name).symlink_to(precious)
    save(folder, 3, METADATA, example(3), dist=ALONE, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert [path.name for path in precious.iterdir()] == ["file"] and (precious / "file").read_text() == "x"


def test_find_raises_if_all_are_damaged(folder, capsys):
    for path in newest_first(folder):
        (path / "__0_0.distcp").unlink()
    with pytest.raises(ValueError) as error:
        find(folder, ALONE)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err.count("warning: ") == 2


# --- From another run, or hostile -----------------------------------------------------------------


def refused(path: Path, tensors: dict[str, Tensor] | None = None) -> str:
    """Returns the one-line error with which an intact checkpoint is refused."""
    assert find_damage(path, ALONE) is None
    with pytest.raises(ValueError) as error:
        load(path, manifest_of(path), tensors or blanks(example()))
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "Traceback" not in message
    return message


def test_other_tensors_are_refused(folder):
    path = folder / "step-00000001"
    fewer = {name: tensor for name, tensor in example().items() if name != "weight.a"}
    for tensors in (fewer, example() | {"weight.z": torch.zeros(1)}, fewer | {"weight.A": torch.zeros(5, 3)}):
        assert "other parameters" in refused(path, tensors)
    for shape in ((3, 5), (5, 4), (6, 3), (15,), ()):
        assert "weight.a" in refused(path, fewer | {"weight.a": torch.zeros(shape)})


def write_metadata(path: Path, metadata: object) -> None:
    """Replaces .metadata by these bytes or this pickled object, with a matching manifest, as an attacker would."""
    (path / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))
    manifest = manifest_of(path)
    manifest.pop("sha256", None)
    manifest["files"] = {file.name: checksum(file) for file in path.iterdir() if file.name != MANIFEST}
    (path / MANIFEST).write_bytes(checkpoint.encode_manifest(manifest))


@pytest.fixture
def touched(tmp_path):
    """The file that hostile code would create."""
    yield tmp_path / "touched"
    assert not (tmp_path / "touched").exists()


class Touch:
    """Is pickled as a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def pickled_text(text: str) -> bytes:
    return pickle.BINUNICODE + len(text.encode()).to_bytes(4, "little") + text.encode()


def pickled_name(module: str, name: str, opcodes: bytes) -> bytes:
    """A pickle that applies opcodes to what find_class returns for a name, which may have dots."""
    start = pickle.PROTO + b"\x04" + pickled_text(module) + pickled_text(name) + pickle.STACK_GLOBAL
    return start + opcodes + pickle.STOP


CALLS = [
    ("os", "system", "touch {}"),
    ("builtins", "eval", "open({!r}, 'w')"),
    ("builtins", "open", "{}", "w"),
    ("builtins", "getattr", "a", "upper"),
    ("torch", "os.system", "touch {}"),
    ("torch", "float32.__class__", "{}"),
    ("torch.serialization", "_get_layout.__globals__", "{}"),
    ("torch.serialization", "load", "{}"),
    (dcp_metadata.__name__, "os.system", "touch {}"),
    (dcp_metadata.__name__, "Metadata.__init__.__globals__", "{}"),
    ("pathlib", "PosixPath.touch", "{}"),
    ("pathlib", "Path", "{}"),
    ("operator", "attrgetter", "a.b"),
]


@pytest.mark.parametrize("module, name, arguments", [(m, n, a) for m, n, *a in CALLS], ids=lambda x: str(x)[:40])
def test_metadata_cannot_call_a_function(folder, touched, module, name, arguments):
    texts = b"".join(pickled_text(text.format(str(touched))) for text in arguments)
    call = pickle.MARK + texts + pickle.TUPLE + pickle.REDUCE
    write_metadata(folder / "step-00000002", pickled_name(module, name, call))
    assert f"{module}.{name}" in refused(folder / "step-00000002")


@pytest.mark.parametrize("target", [pathlib.PosixPath, torch.serialization._get_layout, dcp_metadata.Metadata])
def test_metadata_cannot_modify_a_class_or_function(folder, target):
    """A pickle can set attributes of what it names: PosixPath.name could make any path look like a file here."""
    before = dict(vars(target))
    state = pickle.EMPTY_DICT + pickled_text("name") + pickled_text("x") + pickle.SETITEM
    build = pickle.MARK + pickle.NONE + state + pickle.TUPLE + pickle.BUILD  # of (None, {"name": "x"}): setattr
    write_metadata(folder / "step-00000002", pickled_name(target.__module__, target.__name__, build))
    try:
        refused(folder / "step-00000002")
        assert dict(vars(target)) == before
    finally:
        if "name" in vars(target) and "name" not in before:
            del target.name


@pytest.mark.parametrize("position", ["metadata", "tensor", "legacy tensor", "object"])
def test_a_hostile_pickle_is_not_loaded(folder, tmp_path, touched, position):
    """Inside valid metadata, as a tensor, or as an entry that is not a tensor, which torch unpickles without limits."""
    path = folder / "step-00000002"
    metadata, file = pickle.loads((path / ".metadata").read_bytes()), path / "__0_0.distcp"
    if position == "metadata":
        metadata.state_dict_metadata["weight.a"].chunks.append(Touch(touched))
    else:
        torch.save(Touch(touched), tmp_path / "blob", _use_new_zipfile_serialization=position != "legacy tensor")
        content, blob = file.read_bytes(), (tmp_path / "blob").read_bytes()
        file.write_bytes(content + blob)
        (index,) = [index for index in metadata.storage_data if index.fqn == "weight.a"]
        part = metadata.storage_data.pop(index)
        part.offset, part.length = len(content), len(blob)
        if position == "object":
            metadata.state_dict_metadata["weight.a"] = dcp_metadata.BytesStorageMetadata()
            index = dcp_metadata.MetadataIndex("weight.a")
        metadata.storage_data[index] = part
    write_metadata(path, metadata)
    refused(path)


OUTSIDE = ["../../secret", "TMP/secret", "../step-00000001/__0_0.distcp", "..", "", "x/../y"]


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_path_outside_the_folder_is_refused(folder, tmp_path, outside):
    path = folder / "step-00000002"
    outside = outside.replace("TMP", str(tmp_path))
    (tmp_path / "secret").write_bytes((path / "__0_0.distcp").read_bytes())  # it could be read
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for part in metadata.storage_data.values():
        part.relative_path = outside
    write_metadata(path, metadata)
    tensors = blanks(example())
    assert repr(outside) in refused(path, tensors)
    assert_same_bits(tensors, blanks(example()))


def test_a_length_in_metadata_reserves_no_memory(folder):
    """13 bytes that ask for 6 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    length = (6 * 10**9).to_bytes(8, "little")
    for opcode in (pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME):
        write_metadata(folder / "step-00000002", pickle.PROTO + b"\x05" + opcode + length + pickle.STOP)
        refused(folder / "step-00000002")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


@pytest.mark.parametrize("change", ["no chunk", "smaller", "moved", "not stored"])
def test_metadata_that_leaves_a_part_of_a_tensor_is_refused(folder, change):
    """torch would leave that part as it was."""
    path = folder / "step-00000002"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    chunks = metadata.state_dict_metadata["weight.a"].chunks
    if change == "no chunk":
        chunks.clear()
    elif change == "smaller":
        chunks[0].sizes = torch.Size((4, 3))
    elif change == "moved":
        chunks[0].offsets = torch.Size((1, 0))
    else:
        metadata.storage_data = {i: x for i, x in metadata.storage_data.items() if i.fqn != "weight.a"}
    write_metadata(path, metadata)
    assert "weight.a" in refused(path)


def test_metadata_with_any_byte_changed_is_read_or_refused(folder):
    """Raises only ValueError."""
    path = folder / "step-00000002"
    intact, rng, n_refused = (path / ".metadata").read_bytes(), random.Random(0), 0
    for _ in range(100):
        content = bytearray(intact)
        content[rng.randrange(len(content))] = rng.randrange(256)
        write_metadata(path, bytes(content[: rng.choice((len(content), rng.randrange(len(content))))]))
        try:
            read(path)
        except ValueError as error:
            assert "\n" not in str(error) and "Traceback" not in str(error)
            n_refused += 1
    assert n_refused > 50


# --- Several processes ----------------------------------------------------------------------------


def sharded(tensors: dict[str, Tensor], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of `example`, three of them sharded over a mesh of these sizes; two sizes: replicated shards."""
    names = ("weight.a", "weight.b", "weight.c")
    model = nn.Module()
    model.parts = nn.ParameterList(tensors[name].clone() for name in names)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copy", "shard")[-len(sizes) :])
    fully_shard(model, mesh=mesh)
    return tensors | {name: part.detach() for name, part in zip(names, model.parts)}


def assert_read_as(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    load(path, manifest_of(path), tensors)
    assert_same_bits({name: full_tensor(tensor) for name, tensor in tensors.items()}, expected)


def two_processes(folder: Path) -> None:
    """One of two processes: saves plain and sharded tensors, loads each as either, and skips a damaged file."""
    dist = init_distributed("cpu")
    for step, tensors in ((1, example(1)), (2, sharded(example(2), (2,))), (3, sharded(example(3), (2,)))):
        save(folder, step, METADATA, tensors, dist=dist, keep=3)
    for step in (1, 2):
        assert_read_as(folder / f"step-{step:08d}", blanks(example()), example(step))
        assert_read_as(folder / f"step-{step:08d}", sharded(blanks(example()), (2,)), example(step))
    files = {name for name in manifest_of(folder / "step-00000002")["files"]}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}

    for tensors in (blanks(example()), sharded(blanks(example()), (2,))):
        tensors["weight.b"] = torch.zeros(4, 3)
        with pytest.raises(ValueError, match="weight.b"):
            load(folder / "step-00000002", manifest_of(folder / "step-00000002"), tensors)

    torch.distributed.barrier()
    if dist.is_main:
        (folder / "step-00000003" / "__1_0.distcp").write_bytes(b"")
    torch.distributed.barrier()
    path, manifest = find(folder, dist)
    assert path.name == "step-00000002" and manifest["step"] == 2


def four_processes(folder: Path, copy: Path) -> None:
    """One of four processes: loads what two saved, sharded over 4 and over 2 x 2, and saves for one to load."""
    dist = init_distributed("cpu")
    path, _ = find(folder, dist)
    for sizes in ((4,), (2, 2)):
        assert_read_as(path, sharded(blanks(example()), sizes), example(2))
    assert_read_as(path, blanks(example()), example(2))
    save(copy, 4, METADATA, sharded(example(4), (2, 2)), dist=dist, keep=1)


def test_two_processes_save_and_one_two_or_four_load(tmp_path):
    folder, copy = tmp_path / "two", tmp_path / "four"
    errors = in_processes(2, tmp_path, two_processes, folder)
    assert errors[0].count("warning: the checkpoint") == 1 and "warning: the checkpoint" not in errors[1]
    assert f"{folder / 'step-00000003'}" in errors[0] and "__1_0.distcp" in errors[0]
    for step in (1, 2):
        assert_same_bits(read(folder / f"step-{step:08d}"), example(step))
    shutil.rmtree(folder / "step-00000003")
    in_processes(4, tmp_path, four_processes, folder, copy)
    assert_same_bits(read(find(copy, ALONE)[0]), example(4))
