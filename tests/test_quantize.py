"""Quantized weights: errors within the theoretical bound, equal results on every path, one-line errors."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import tools.merge
import tools.quantize
import weights
from conftest import GOLDEN, make_config, make_images, make_owl, needs_cuda
from generate import generate
from inference import quantize
from inference.adapter import load_lora, load_non_lora, save_lora
from inference.fast_decode import FastDecoder
from inference.loading import load_for_inference
from inference.quantize import BITS, LINEARS, QuantizedLinear
from model import IMAGE_TOKEN_ID, Owl
from runs import run_main
from training.presets import PRESETS

pytestmark = pytest.mark.usefixtures("no_near_ties")

SHAPES = ((64, 64), (344, 128), (128, 344), (7, 10), (1, 65))  # [n_out, n_in]; most are not whole blocks and groups
FOLDERS = ("owl1", "owl2", "owl2-bin-shards")


def make_linear(n_out: int, n_in: int, bits: int) -> tuple[QuantizedLinear, torch.Tensor]:
    """Returns a quantized Linear and the weight that it was made from."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * 0.02
    linear = LINEARS[bits](n_in, n_out)
    linear.set_weight(weight)
    return linear, weight


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same names with the same bits."""
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def random_prompt(model: Owl) -> torch.Tensor:
    return torch.randint(3, model.config.llama.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """saved(name, to) -> the folder of a golden model that was saved quantized."""

    def make(name: str, to: str) -> Path:
        folder = tmp_path / f"{name}-{to}"
        quantize.save_quantized(quantize.load_quantized(GOLDEN / name, to=to), folder)
        return folder

    return make


def assert_refused(folder: Path, *words: str, **arguments) -> None:
    """Asserts that loading fails with one line that has all the words."""
    with pytest.raises(ValueError) as caught:
        quantize.load_quantized(folder, **arguments)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits, shift", ((8, 0.0), (4, 0.0), (4, 0.1), (4, -5.0)))
def test_error_is_at_most_half_a_scale(bits, shape, shift):
    """int8 has a scale per output, the largest weight / 127; int4 one per group of 64, its range (with 0) / 15.

    Scales are rounded to bfloat16 (by 2^-8 at most). A shift: all weights of a group have one sign.
    """
    linear, weight = make_linear(*shape, bits=bits)
    weight = weight + shift
    linear.set_weight(weight)
    size = shape[1] if bits == 8 else quantize.GROUP
    for i, group in enumerate(weight.split(size, dim=1)):
        scale = (linear.scale if bits == 8 else linear.scale[i, : shape[0], 0]).float()
        low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
        span = group.abs().amax(dim=1) / 127 if bits == 8 else (high - low) / 15
        assert torch.all((scale / span - 1).abs() <= 2**-8)
        error = (linear.dequantize()[:, i * size : (i + 1) * size] - group).abs()
        assert torch.all(error <= scale[:, None] * 0.5001)  # float32 rounds as well


def test_int4_layout():
    """Two values per byte: of output d the low half, of output d + 32 the high half; one row per input."""
    weight = torch.zeros(64, 64)
    weight[:, 0], weight[:, 1] = -8, 7  # so the scale is 1 and the zero point 0
    weight[5, 2], weight[37, 2] = 3, -4
    linear = LINEARS[4](64, 64)
    linear.set_weight(weight)
    assert linear.weight.shape == (1, 64, 32)
    assert linear.weight[0, 2, 5].item() == (3 + 8) | (-4 + 8) << 4
    assert linear.weight[0, 0].tolist() == [0x00] * 32
    assert linear.weight[0, 1].tolist() == [0xFF] * 32
    assert linear.scale[0].tolist() == [[1, 0]] * 64


@pytest.mark.parametrize("bits, has_kernel", ((8, True), (4, True), (4, False)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (0, 1, 16, 64, 100))
def test_forward_multiplies_with_the_dequantized_weight(bits, has_kernel, dtype, rows, monkeypatch):
    """With the kernel, and by dense products where there is none or for many rows (0: only visual tokens)."""
    if not has_kernel:
        monkeypatch.setattr(quantize, "CPU_HAS_INT4", False)
        assert "AVX-512" in quantize.why_slow(4, torch.device("cpu"), torch.bfloat16)
    for shape in SHAPES:
        linear, _ = make_linear(*shape, bits)
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        weight = linear.dequantize(torch.float64)
        expected = F.linear(x.double(), weight)
        y = linear(x)
        assert y.dtype == dtype and y.shape == expected.shape
        # bfloat16 has 8 binary digits: weights may be rounded to it (int4: scale and zero point too), and y is.
        unit = 2**-8 if dtype == torch.bfloat16 else 2**-20
        assert torch.all((y.double() - expected).abs() <= 2 * unit * (x.double().abs() @ weight.abs().t()))
        assert torch.equal(linear(x[None, :, None])[0, :, 0], y)


@pytest.mark.parametrize("bits, number", ((8, float("nan")), (8, float("inf")), (4, float("nan")), (4, 3.3e38)))
def test_weights_that_are_not_finite(bits, number):
    """... or, with 4 bits, whose range is not finite."""
    weight = torch.tensor([[number, -number] + [0.0] * 62]).repeat(64, 1)
    with pytest.raises(ValueError):
        LINEARS[bits](64, 64).set_weight(weight)


# --- a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ("owl1", "owl2"))
@pytest.mark.parametrize("bits", BITS.values())
def test_which_modules_are_quantized(variant, bits):
    """Every Linear of the decoder, lm_head always to 8 bits, and nothing else; the same on the meta device."""
    config = make_config(variant)
    model = make_owl(config)
    with torch.device("meta"):
        empty = Owl(config)
    linears = {f"llama.{name}" for name, module in model.llama.named_modules() if isinstance(module, nn.Linear)}
    others = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in linears}
    quantize.quantize(model.llama, bits)
    quantize.quantize(empty.llama, bits)
    found = {name: module.bits for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == {name: 8 if name == "llama.lm_head" else bits for name in linears}
    left = dict(model.named_parameters())
    assert left.keys() == others.keys() and all(left[name] is others[name] for name in left)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()}
    assert all(tensor.is_meta for tensor in empty.llama.state_dict().values())
    assert quantize.bits_of(model) == bits and quantize.bits_of(model.vit) is None


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("to", BITS)
def test_load_quantizes_save_and_load_keep_every_bit(saved, tmp_path, monkeypatch, folder, to):
    """Loading with `to` equals loading and quantizing; saved in shards and loaded, the bits are the same."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    model = quantize.load_quantized(GOLDEN / folder)
    quantize.quantize(model.llama, BITS[to])
    path = saved(folder, to)
    assert len(list(path.glob("*.safetensors"))) > 1
    config = json.loads((path / "config.json").read_text())
    assert config["quantization"] == {"bits": BITS[to], "group": 64} and config["torch_dtype"] == "float32"
    assert quantize.read_quantization(path) == to
    for asked in (None, to):
        loaded = quantize.load_quantized(path, to=asked)
        assert same_state(loaded, model) and not loaded.training
    quantize.save_quantized(loaded, tmp_path / "again")
    assert same_state(quantize.load_quantized(tmp_path / "again"), model)
    # The dtype of the rest does not change quantized values and scales.
    half = quantize.load_quantized(GOLDEN / folder, dtype=torch.bfloat16, to=to)
    assert same_state(half.llama.layers[0].mlp.down_proj, model.llama.layers[0].mlp.down_proj)
    assert half.llama.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("to", BITS)
def test_answers_are_those_of_the_dequantized_weights(to):
    """Greedy decoding, with an image: a model of plain Linears with the same weights answers the same."""
    config = make_config("owl2", llama={"n_embd": 64, "n_mlp": 80}, abstractor={"n_out": 64})
    model = make_owl(config)
    plain = copy.deepcopy(model)
    quantize.quantize(model.llama, BITS[to])
    for name, module in model.llama.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.llama.get_submodule(name).weight.data = module.dequantize()
    images = make_images(config, 1, torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6] + [IMAGE_TOKEN_ID] * config.n_visual_tokens + [7, 8]])
    a, b = (list(generate(m, ids, images, max_new_tokens=12, stop_at_eos=False)) for m in (model, plain))
    assert a == b and len(a) == 12


@pytest.mark.slow
@pytest.mark.parametrize("rows", (1, 80))
@pytest.mark.parametrize("to", BITS)
def test_a_compiled_step_generates_the_same(to, rows):
    """By the kernel and by dense products.

    A compiler rounds elsewhere, so that of two equally probable tokens it may select the other, even for one of
    several equal rows: each must be the most probable one up to the rounding of bfloat16.
    """
    model = make_owl(make_config("owl2"))
    quantize.quantize(model.llama, BITS[to])
    model = model.bfloat16()
    ids = random_prompt(model)[:1].expand(rows, -1)
    decoder = FastDecoder(model, compile=True)
    steps = torch.stack(list(decoder.generate(ids, max_new_tokens=5, stop_at_eos=False)), dim=1)
    assert steps.shape == (rows, 5)
    with torch.no_grad():
        logits, _ = model(torch.cat([ids, steps], dim=1))
    logits = logits[:, ids.shape[1] - 1 : -1].float()
    selected = logits.gather(2, steps[..., None])[..., 0]
    assert torch.all(selected >= logits.amax(dim=2) - 4 * 2**-8 * logits.abs().amax(dim=2))


@pytest.mark.parametrize("to, most", (("int8", 12e9), ("int4", 8e9)))
def test_7b_fits(to, most):
    """From the shapes: under 12 GB at 8 bits and under 8 GB at 4, with 1.1 GB of KV cache and 0.5 GB of the rest."""
    with torch.device("meta"):
        model = Owl(PRESETS["owl2-7b"]()).bfloat16()
    quantize.quantize(model.llama, BITS[to])
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) + 1.6e9 < most


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", BITS)
def test_settings_that_do_not_fit(saved, to):
    """float16, other bits than the saved ones, and load_model: training starts from weights that are not quantized."""
    assert_refused(GOLDEN / "owl2", "float16", to=to, dtype=torch.float16)
    folder = saved("owl2", to)
    assert_refused(folder, "int4", "int8", to="int8" if to == "int4" else "int4")
    with pytest.raises(ValueError, match="load_quantized"):
        weights.load_model(folder)
    with pytest.raises(ValueError, match="load_quantized"):
        next(weights.hf_tensors(folder, weights.read_config(folder)))


@pytest.fixture
def adapted(tmp_path):
    """adapted(model) -> the model with a random adapter, which is also saved in "adapter"."""

    def add(model: Owl) -> Owl:
        lora.inject_lora(model, ("q_proj",), rank=2, alpha=4)
        with torch.no_grad():
            for _, module in lora.lora_modules(model):
                module.lora_B.weight.normal_()
        save_lora(model, tmp_path / "adapter")
        return model

    return add


def test_adapters(adapted, tmp_path):
    """A merged adapter becomes part of the quantized weights; others are refused, before and after."""
    model = adapted(make_owl(make_config("owl2")))
    with pytest.raises(ValueError, match="merge"):
        quantize.quantize(model.llama, 8)
    lora.merge_lora(model)
    merged = model.llama.layers[0].self_attn.q_proj.weight.detach()
    quantize.quantize(model.llama, 8)
    q_proj = model.llama.layers[0].self_attn.q_proj
    assert torch.all((q_proj.dequantize() - merged).abs() <= q_proj.scale.float()[:, None] * 0.5001)
    assert not any("lora" in name for name in model.state_dict())
    with pytest.raises(ValueError):
        load_lora(model, tmp_path / "adapter")
    key = "model.layers.0.self_attn.q_proj.weight"
    torch.save({f"base_model.model.{key}": torch.ones(q_proj.weight.shape)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match="int8"):
        load_non_lora(model, tmp_path)
    quantize.save_quantized(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="quantized"):
        load_for_inference(
            tmp_path / "saved", adapter=tmp_path / "adapter", quantize_to=None, device="cpu", dtype="auto"
        )


ENTRIES = (4, [], "int8", {"bits": 3, "group": 64}, {"bits": 4}, {"bits": 4, "group": 32})


@pytest.mark.parametrize("entry", ENTRIES)
def test_hostile_quantization_in_config(saved, entry):
    folder = saved("owl2", "int4")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": entry}))
    assert_refused(folder, "config.json", "quantization")


@pytest.mark.parametrize("to", BITS)
@pytest.mark.parametrize(
    "leaf, change",
    (
        ("weight", lambda tensor: tensor.float()),
        ("weight", lambda tensor: tensor[:1].clone()),
        ("weight", lambda tensor: None),
        ("scale", lambda tensor: tensor.int()),
        ("scale", lambda tensor: tensor[:0].clone()),
        ("scale", lambda tensor: tensor * float("nan")),
        ("zero", lambda tensor: torch.zeros(3)),
    ),
    ids=("float", "shape", "missing", "integer", "empty", "nan", "unexpected"),
)
def test_corrupt_files(saved, to, leaf, change):
    folder = saved("owl2", to)
    (path,) = folder.glob("*.safetensors")
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    key = f"model.layers.0.mlp.up_proj.{leaf}"
    changed = change(tensors.pop(key, torch.zeros(3)))
    if changed is not None:
        tensors[key] = changed
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, path)
    assert_refused(folder, f"layers.0.mlp.up_proj.{leaf}")


def test_config_and_files_disagree(saved, tmp_path):
    """Quantized files without the entry in config.json, and the entry without quantized files."""
    quantized = saved("owl2", "int8")
    plain = shutil.copytree(GOLDEN / "owl2", tmp_path / "plain")
    entry, config = (quantized / "config.json").read_bytes(), (plain / "config.json").read_bytes()
    (quantized / "config.json").write_bytes(config)
    assert_refused(quantized, "int8")
    (plain / "config.json").write_bytes(entry)
    assert_refused(plain, "float32")


def test_why_slow(monkeypatch):
    """On a CPU bfloat16 is fast, on CUDA 4 bits, or 8 in bfloat16 with Triton."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(quantize, "HAS_TRITON", True)
    assert quantize.why_slow(8, cpu, torch.bfloat16) is None
    assert "bfloat16" in quantize.why_slow(8, cpu, torch.float32)
    assert quantize.why_slow(8, cuda, torch.bfloat16) is None
    assert "bfloat16" in quantize.why_slow(8, cuda, torch.float32)
    assert quantize.why_slow(4, cuda, torch.bfloat16) is None
    assert "mps" in quantize.why_slow(8, torch.device("mps"), torch.bfloat16)
    monkeypatch.setattr(quantize, "HAS_TRITON", False)
    assert "Triton" in quantize.why_slow(8, cuda, torch.bfloat16)


# --- commands --------------------------------------------------------------------------------------


def test_quantize_command(tmp_path):
    """It writes what load_quantized reads; user errors are one line and exit code 2."""
    source, out = GOLDEN / "owl2", tmp_path / "out"
    code, output, _ = run_main(tools.quantize.main, "--weights", source, "--out", out, "--to", "int4")
    assert code == 0 and str(out) in output
    expected = quantize.load_quantized(source, dtype=torch.bfloat16, to="int4")
    assert same_state(quantize.load_quantized(out, dtype=torch.bfloat16), expected)
    file, new = tmp_path / "file", tmp_path / "b"
    file.write_text("")
    for wrong, target in ((source, out), (source, source), (source, file), (tmp_path / "nowhere", new), (out, new)):
        code, output, error = run_main(tools.quantize.main, "--weights", wrong, "--out", target, "--to", "int8")
        assert code == 2 and output == "" and error.startswith("error: ") and error.count("\n") == 1
    assert not new.exists()


def test_merge_command(adapted, tmp_path):
    """The saved model answers as the adapted one, and the folder is a plain model folder."""
    model = adapted(weights.load_model(GOLDEN / "owl2"))
    flags = ("--weights", GOLDEN / "owl2", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert run_main(tools.merge.main, *flags, "--precision", "fp32")[0] == 0
    lora.merge_lora(model)
    ids = random_prompt(model)
    assert torch.equal(weights.load_model(tmp_path / "out")(ids)[0], model(ids)[0])
    assert run_main(tools.merge.main, *flags)[0] == 2  # --out already holds weights


@needs_cuda
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n_in", [64, 128, 192, 4096])
@pytest.mark.parametrize("n_row", [1, 3, 17, 64, 65])
def test_cuda_computes_with_the_same_weights(bits, n_in, n_row):
    """The first call converts 4-bit weights to the layout of the kernel, the second uses them."""
    torch.manual_seed(0)
    linear = LINEARS[bits](n_in, 70)
    linear.set_weight(torch.randn(70, n_in))
    x = torch.randn(n_row, n_in).bfloat16()
    expected = F.linear(x.float(), linear.dequantize())
    linear.cuda()
    for _ in range(2):
        y = linear(x.cuda()).float().cpu()
        assert float((y - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_commands_write_to_a_new_folder_only(adapted, tmp_path, command):
    """Another model, the adapter, a file, a link to nothing and a file's inside are refused and stay as they were."""
    adapted(make_owl(make_config("owl2")))
    main, flags = {
        "merge": (tools.merge.main, ("--adapter", tmp_path / "adapter")),
        "quantize": (tools.quantize.main, ("--to", "int8")),
    }[command]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors.index.json").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in ("file", "other", "adapter", "link", "file/inside"):
        code, _, error = run_main(main, "--weights", GOLDEN / "owl2", "--out", tmp_path / out, *flags)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_write_that_fails_is_one_line(tmp_path):
    """As on a full disk or above a quota; nothing half written stays."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        flags = ("--weights", GOLDEN / "owl2", "--out", tmp_path / "out", "--to", "int8")
        code, _, error = run_main(tools.quantize.main, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2 and error.count("\n") == 1 and "File too large" in error
    assert not list((tmp_path / "out").iterdir())
