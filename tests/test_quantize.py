"""Quantised weights: as near to the old ones as theory says, the same by every path, and a sentence for mistakes."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import quantize
import weights
from decode import take_step
from model import PRESETS, Owl
from quantize import BITS, QuantizedLinear

SHAPES = ((64, 64), (344, 128), (128, 344), (7, 10), (1, 65))  # [n_out, n_in]; few of them whole blocks and groups
FOLDERS = ("owl1", "owl2", "owl2-bin-shards")


def make_linear(n_out: int, n_in: int, bits: int, seed: int = 0) -> tuple[QuantizedLinear, torch.Tensor]:
    """A quantised Linear, and the weight that went into it."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) * 0.02
    linear = QuantizedLinear(n_in, n_out, bits)
    linear.set_weight(weight)
    return linear, weight


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same names with the same bits."""
    first, second = a.state_dict(), b.state_dict()
    same_names = list(first) == list(second)
    return same_names and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def prompt(model: Owl) -> torch.Tensor:
    return torch.randint(3, model.config.llama.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(golden_folder, tmp_path):
    """saved(name, to) -> the folder of a golden model that was saved quantised."""

    def make(name: str, to: str) -> Path:
        folder = tmp_path / f"{name}-{to}"
        weights.save_model(weights.load_model(golden_folder(name), quantize=to), folder)
        return folder

    return make


def assert_refused(folder: Path, *words: str, **arguments) -> None:
    """Loading fails with one sentence that has all the words in it."""
    with pytest.raises(ValueError) as caught:
        weights.load_model(folder, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# ----------------------------------------------------------------------------------------------------
# One Linear


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape):
    """... of the weight's own output. The step is the largest weight / 127, rounded to bfloat16 (by 2^-8 at most)."""
    linear, weight = make_linear(*shape, bits=8)
    step = linear.scale.float()
    assert torch.all((step * 127 / weight.abs().amax(dim=1) - 1).abs() <= 2**-8)
    error = (linear.dequantized() - weight).abs()
    assert torch.all(error <= step[:, None] * 0.5001)  # (float32 rounds as well)
    assert error.max() > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", (0.0, 0.1, -5.0))
def test_int4_is_within_half_a_step(shape, shift):
    """... of the weight's own group; also where all weights of a group have one sign."""
    linear, weight = make_linear(*shape, bits=4)
    weight = weight + shift
    linear.set_weight(weight)
    n_out, n_in = shape
    for i in range(0, n_in, quantize.GROUP):
        group = weight[:, i : i + quantize.GROUP]
        step = linear.scale[i // quantize.GROUP, :n_out, 0].float()
        low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
        assert torch.all((step * 15 / (high - low) - 1).abs() <= 2**-8)
        error = (linear.dequantized()[:, i : i + quantize.GROUP] - group).abs()
        assert torch.all(error <= step[:, None] * 0.5001)


@pytest.mark.parametrize("bits", BITS.values())
def test_numbers_that_codes_can_say_come_back_exactly(bits):
    """Whole numbers from the least to the greatest code, and nothing but zeros."""
    most = 127 if bits == 8 else 7
    weight = torch.arange(-most - (bits == 4), most + 1).float().repeat(64, 256 // (2 * most))
    weight[3] = 0
    linear = QuantizedLinear(weight.shape[1], 64, bits)
    linear.set_weight(weight)
    assert torch.equal(linear.dequantized(), weight)


def test_int4_codes_lie_as_said():
    """Two codes a byte: of output d the low half, of output d + 32 the high one. Row by row, an input each."""
    weight = torch.zeros(64, 64)
    weight[:, 0], weight[:, 1] = -8, 7  # so the step is 1, and the middle 0
    weight[5, 2], weight[37, 2] = 3, -4
    linear = QuantizedLinear(64, 64, 4)
    linear.set_weight(weight)
    assert linear.weight.shape == (1, 64, 32)
    assert linear.weight[0, 2, 5].item() == (3 + 8) | (-4 + 8) << 4
    assert linear.weight[0, 0].tolist() == [0x00] * 32
    assert linear.weight[0, 1].tolist() == [0xFF] * 32
    assert linear.scale[0].tolist() == [[1, 0]] * 64


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (1, 2, 33, 100))
def test_forward_is_the_product_with_the_dequantised_weight(bits, dtype, rows):
    """By whichever path that number of rows takes, and in whichever shape they come."""
    for shape in SHAPES:
        linear, _ = make_linear(*shape, bits)
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = F.linear(x.double(), linear.dequantized(torch.float64))
        y = linear(x)
        assert y.dtype == dtype and y.shape == expected.shape
        # bfloat16 has 8 binary digits: weights may be rounded to it (int4: step and middle apart), and y is.
        size = x.double().abs() @ linear.dequantized(torch.float64).abs().t()
        unit = 2**-8 if dtype == torch.bfloat16 else 2**-20
        assert torch.all((y.double() - expected).abs() <= 2 * unit * size)
        assert torch.equal(linear(x[None, :, None])[0, :, 0], y)


@pytest.mark.parametrize("bits", BITS.values())
def test_both_paths_agree(bits, monkeypatch):
    """The kernel and the products of whole matrices, at the numbers of rows where one takes over from the other."""
    linear, weight = make_linear(200, 300, bits)
    most = quantize.MOST_ROWS[bits]
    x = torch.randn(most + 1, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    few, many = linear(x[:most]), linear(x)[:most]
    size = x[:most].float().abs() @ linear.dequantized().abs().t()
    assert torch.all((few.float() - many.float()).abs() <= 4 * 2**-8 * size)
    assert not torch.equal(few, many)  # they are two paths


def test_no_rows():
    """A batch of images alone has no word of text: its half of a Linear gets nothing."""
    linear, _ = make_linear(40, 32, 4)
    assert linear(torch.zeros(2, 0, 32)).shape == (2, 0, 40)


@pytest.mark.parametrize(
    "bits, number", ((8, float("nan")), (8, float("inf")), (4, float("nan")), (4, float("inf")), (4, 3.3e38))
)
def test_weights_that_are_no_numbers(bits, number):
    """... or, with 4 bits, whose range is too wide for one."""
    weight = torch.zeros(64, 64)
    weight[3, 4], weight[3, 5] = number, -number
    with pytest.raises(ValueError, match="cannot be quantised"):
        QuantizedLinear(64, 64, bits).set_weight(weight)


# ----------------------------------------------------------------------------------------------------
# A model


@pytest.mark.parametrize("style", ("owl1", "owl2"))
@pytest.mark.parametrize("bits", BITS.values())
def test_which_parts_are_quantised(tiny_config, tiny_owl, style, bits):
    """Every Linear of the decoder, lm_head always to 8 bits, and nothing else; on the meta device alike."""
    config = tiny_config(style)
    model = tiny_owl(config)
    linears = {name for name, module in model.llama.named_modules() if isinstance(module, nn.Linear)}
    weights_of_linears = {f"llama.{name}.weight" for name in linears}
    others = {name: p for name, p in model.named_parameters() if name not in weights_of_linears}
    with torch.device("meta"):
        empty = Owl(config)
    for owl in (model, empty):
        quantize.quantize(owl.llama, bits)
    found = {name: module.bits for name, module in model.llama.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == {name: 8 if name == "lm_head" else bits for name in linears}
    assert {name for name, _ in model.named_parameters()} == set(others)
    assert all(p is others[name] for name, p in model.named_parameters())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()}
    assert all(tensor.is_meta for tensor in empty.llama.state_dict().values())
    assert quantize.bits_of(model) == bits
    assert quantize.bits_of(model.vit) is None


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("to", BITS)
def test_quantised_while_loading_equals_quantised_after_loading(golden_folder, folder, to):
    after = weights.load_model(golden_folder(folder))
    quantize.quantize(after.llama, BITS[to])
    while_loading = weights.load_model(golden_folder(folder), quantize=to)
    assert same_state(while_loading, after)
    assert not while_loading.training


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_codes_do_not_depend_on_the_dtype_of_the_rest(golden_folder, dtype):
    """They are made of the weights in the file; and the scales stay bfloat16."""
    expected = weights.load_model(golden_folder("owl2"), quantize="int4").llama.layers[0].mlp.down_proj
    model = weights.load_model(golden_folder("owl2"), dtype=dtype, quantize="int4")
    assert same_state(model.llama.layers[0].mlp.down_proj, expected)
    assert model.llama.norm.weight.dtype == dtype


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("to", BITS)
def test_saved_and_loaded(golden_folder, saved, tmp_path, monkeypatch, folder, to):
    """The same bits come back, from one file or from shards, and config.json says what they are."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    path = saved(folder, to)
    assert len(list(path.glob("*.safetensors"))) > 1
    first = weights.load_model(golden_folder(folder), quantize=to)
    assert json.loads((path / "config.json").read_text())["quantization"] == {"bits": BITS[to], "group": 64}
    assert json.loads((path / "config.json").read_text()).get("torch_dtype") == "float32"
    for asked in (None, to):
        assert same_state(weights.load_model(path, quantize=asked), first)
    weights.save_model(weights.load_model(path), tmp_path / "again")
    assert same_state(weights.load_model(tmp_path / "again"), first)


@pytest.mark.parametrize("folder", ("owl1", "owl2"))
@pytest.mark.parametrize("to, most", (("int8", 0.03), ("int4", 0.5)))
def test_logits_are_near(golden, golden_folder, folder, to, most):
    """Of the golden models, whose weights are random: the error's size relative to that of the logits."""
    model, tensors = golden(folder)
    near = weights.load_model(golden_folder(folder), quantize=to)
    ids = prompt(model)
    with torch.no_grad():
        expected, _ = model(ids)
        logits, _ = near(ids)
    error = ((logits - expected).norm() / expected.norm()).item()
    assert 0 < error < most


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("to", BITS)
def test_answers_are_those_of_the_dequantised_weights(tiny_config, tiny_owl, random_images, dtype, to):
    """Greedy decoding, with an image: a model of plain Linears with the same weights says the same in float32."""
    config = tiny_config("owl2", llama={"n_embd": 64, "n_mlp": 80}, abstractor={"n_out": 64})
    model = tiny_owl(config)
    plain = copy.deepcopy(model)
    quantize.quantize(model.llama, BITS[to])
    for name, module in model.llama.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.llama.get_submodule(name).weight.data = module.dequantized()
    for owl in (model, plain):
        for part in owl.parameters():
            part.data = part.data.to(dtype)
    words = [5, 6] + [-200] * config.image_words + [7, 8]
    images = random_images(config, 1, torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.tensor([words])
    answers = [list(owl.generate(ids, images, max_new_tokens=12, stop=False)) for owl in (model, plain)]
    assert len(answers[0]) == 12
    if dtype == torch.float32:
        assert torch.equal(*(torch.stack(answer) for answer in answers))


@pytest.mark.slow
@pytest.mark.parametrize("rows", (1, 80))
@pytest.mark.parametrize("to", BITS)
def test_a_compiled_step_says_the_same(tiny_config, tiny_owl, to, rows):
    """One graph, by the kernel and by products of whole matrices.

    A compiler rounds elsewhere, so that of two tokens that are as likely it may choose the other: each must be the
    likeliest but for the rounding of bfloat16.
    """
    model = tiny_owl(tiny_config("owl2"))
    quantize.quantize(model.llama, BITS[to])
    model = model.bfloat16()
    ids = prompt(model)[:1].expand(rows, -1)
    model.step = torch.compile(take_step, fullgraph=True, dynamic=True)
    steps = torch.stack(list(model.generate(ids, max_new_tokens=5, stop=False)), dim=1)
    assert steps.shape == (rows, 5) and torch.equal(steps, steps[:1].expand(rows, -1))
    with torch.no_grad():
        logits, _ = model(torch.cat([ids[:1], steps[:1]], dim=1))
    logits = logits[0, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, steps[0, :, None])[:, 0]
    assert torch.all(chosen >= logits.amax(dim=1) - 4 * 2**-8 * logits.abs().amax(dim=1))


def test_7b_fits():
    """From the shapes: under 12 GB at 8 bits and under 8 GB at 4, with 1.1 GB of cache and 0.5 GB of the rest."""
    for to, most in (("int8", 12e9), ("int4", 8e9)):
        with torch.device("meta"):
            model = Owl(PRESETS["owl2-7b"]()).bfloat16()
        quantize.quantize(model.llama, BITS[to])
        assert sum(tensor.nbytes for tensor in model.state_dict().values()) + 1.6e9 < most


# ----------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("bits", (1, 5, 16))
def test_other_bits(tiny_config, tiny_owl, bits):
    with pytest.raises(ValueError, match="8 or 4 bits"):
        quantize.quantize(tiny_owl(tiny_config("owl2")).llama, bits)


def test_twice(tiny_config, tiny_owl):
    model = tiny_owl(tiny_config("owl2"))
    quantize.quantize(model.llama, 8)
    with pytest.raises(ValueError, match="already"):
        quantize.quantize(model.llama, 8)


def test_other_names(golden_folder):
    assert_refused(golden_folder("owl2"), "int8 or int4", quantize="int3")
    assert_refused(golden_folder("owl2"), "float16", quantize="int8", dtype=torch.float16)


def test_another_quantisation_of_a_quantised_folder(saved):
    assert_refused(saved("owl2", "int4"), "int4 already", quantize="int8")


def test_training_from_a_quantised_folder(saved):
    folder = saved("owl2", "int8")
    with pytest.raises(ValueError, match="is quantised, and training"):
        list(weights.read_weights(folder, weights.read_shape(folder)))


def test_adapters(tiny_config, tiny_owl, tmp_path):
    """One that is merged first becomes part of the codes; else it is a sentence."""
    model = tiny_owl(tiny_config("owl2"))
    lora.wrap(model, ("q_proj",), rank=2, alpha=4)
    with torch.no_grad():
        for _, module in lora.adapted(model):
            module.lora_B.weight.normal_()
    with pytest.raises(ValueError, match="merge the adapter first"):
        quantize.quantize(model.llama, 8)
    lora.merge(model)
    merged = model.llama.layers[0].self_attn.q_proj.weight.detach()
    quantize.quantize(model.llama, 8)
    q_proj = model.llama.layers[0].self_attn.q_proj
    assert torch.all((q_proj.dequantized() - merged).abs() <= q_proj.scale.float()[:, None] * 0.5001)
    assert not any("lora" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="cannot be merged into quantised weights"):
        weights.load_non_lora(model, tmp_path)


@pytest.mark.parametrize(
    "said", (4, [], "int8", {"bits": 3, "group": 64}, {"bits": 4}, {"bits": 4, "group": 32}, {"bits": 8, "by": "me"})
)
def test_hostile_quantisation_in_config(saved, said):
    folder = saved("owl2", "int4")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": said}))
    assert_refused(folder, "config.json", "quantization")


LINEAR = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("to", BITS)
@pytest.mark.parametrize(
    "leaf, change, word",
    (
        ("weight", lambda tensor: tensor.float(), "float32"),
        ("weight", lambda tensor: tensor.int(), "int32"),
        ("weight", lambda tensor: tensor[:1].clone(), "shape"),
        ("weight", lambda tensor: None, "lacks"),
        ("scale", lambda tensor: tensor.int(), "int32"),
        ("scale", lambda tensor: tensor[:0].clone(), "shape"),
        ("scale", lambda tensor: None, "lacks"),
        ("scale", lambda tensor: tensor * float("nan"), "finite"),
        ("zero", lambda tensor: torch.zeros(3), "that the model does not"),
    ),
)
def test_spoilt_files(saved, to, leaf, change, word):
    folder = saved("owl2", to)
    (path,) = folder.glob("*.safetensors")
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    key = f"{LINEAR}.{leaf}"
    changed = change(tensors.pop(key, torch.zeros(3)))
    if changed is not None:
        tensors[key] = changed
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, path)
    assert_refused(folder, key, word)


def test_config_and_files_disagree(saved, golden_folder, tmp_path):
    """Quantised files that are said not to be, and the other way round."""
    folder = saved("owl2", "int8")
    shutil.copy(golden_folder("owl2") / "config.json", folder / "config.json")
    assert_refused(folder, "weight", "int8")
    folder = tmp_path / "said"
    shutil.copytree(golden_folder("owl2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 8, "group": 64}}))
    assert_refused(folder, "float32", "int8")


def test_saying_what_is_slow():
    """On a CPU bfloat16 is fast, on CUDA 4 bits, or 8 when compiled."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert quantize.why_slow(8, cpu, torch.bfloat16, False) is None
    assert "bfloat16" in quantize.why_slow(8, cpu, torch.float32, False)
    assert "compiled" in quantize.why_slow(8, cuda, torch.bfloat16, False)
    assert quantize.why_slow(8, cuda, torch.bfloat16, True) is None
    assert quantize.why_slow(4, cuda, torch.bfloat16, False) is None
    assert "mps" in quantize.why_slow(8, torch.device("mps"), torch.bfloat16, True)


def test_a_cpu_without_the_kernel(monkeypatch):
    """It computes the same (slowly), and says so."""
    linear, _ = make_linear(128, 128, 4)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(quantize, "CPU_HAS_INT4", False)
    y = linear(x)
    size = x.float().abs() @ linear.dequantized().abs().t()
    assert torch.all((y.float() - F.linear(x.float(), linear.dequantized())).abs() <= 2 * 2**-8 * size)
    assert "AVX-512" in quantize.why_slow(4, torch.device("cpu"), torch.bfloat16, False)


# ----------------------------------------------------------------------------------------------------
# The command


def test_the_command(golden_folder, tmp_path, monkeypatch, capsys):
    """It writes what load_model reads, and answers mistakes with one sentence and exit code 2."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, arguments)])
        code = 0
        try:
            quantize.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    code, said, _ = run("--help")
    assert code == 0 and "--to int4" in said
    source, out = golden_folder("owl2"), tmp_path / "out"
    code, said, _ = run("--weights", source, "--out", out, "--to", "int4")
    assert code == 0 and f"{out} holds" in said
    expected = weights.load_model(source, dtype=torch.bfloat16, quantize="int4")
    assert same_state(weights.load_model(out, dtype=torch.bfloat16), expected)
    (tmp_path / "file").write_text("")
    for arguments, word in (
        (("--weights", source, "--out", out, "--to", "int8"), "already holds weights"),
        (("--weights", source, "--out", source, "--to", "int8"), "already holds weights"),
        (("--weights", source, "--out", tmp_path / "file", "--to", "int8"), "is a file"),
        (("--weights", tmp_path / "nowhere", "--out", tmp_path / "b", "--to", "int8"), "there is no folder"),
        (("--weights", out, "--out", tmp_path / "b", "--to", "int8"), "int4 already"),
    ):
        code, said, error = run(*arguments)
        assert code == 2 and said == ""
        assert error.startswith("error: ") and error.count("\n") == 1 and word in error
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n_in", [64, 128, 192, 4096])
def test_cuda_computes_with_the_same_weights(bits, n_in):
    """The kernel there, before and after it has laid the codes out as it wants them."""
    torch.manual_seed(0)
    linear = QuantizedLinear(n_in, 70, bits)
    linear.set_weight(torch.randn(70, n_in))
    x = torch.randn(3, n_in).bfloat16()
    expected = F.linear(x.float(), linear.dequantized())
    linear.cuda()
    for _ in range(2):
        y = linear(x.cuda()).float().cpu()
        assert float((y - expected).norm() / expected.norm()) < 0.01
