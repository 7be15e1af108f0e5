"""QLoRA: the loss and all gradients are those of LoRA on the dequantized weights, and nothing else is trained."""

import copy
from itertools import chain

import pytest
import torch

import lora
from conftest import assert_close, assert_gradients_close, make_config, make_images, make_owl, make_row, pad_rows
from inference.qlora import FrozenLinear, QLoRALinear, dequantize_base, quantize_base, quantized_tensors
from inference.quantize import GROUP, QuantizedLinear
from model import Owl
from train_stage2 import LORA_TARGETS
from training.flops import train_flops
from training.memory import state_bytes
from training.parallel import materialize
from training.presets import PRESETS

WIDE = {"n_embd": 64, "n_mlp": 72}  # a group of inputs, and a group and a part of one


def make_qlora(variant: str, bits: int) -> Owl:
    """A quantized model with an adapter, built as train_stage2 does. No matrix of the adapter is zero."""
    weights = make_owl(make_config(variant, llama=WIDE, abstractor={"n_out": 64})).state_dict()
    with torch.device("meta"):
        model = Owl(make_config(variant, llama=WIDE, abstractor={"n_out": 64})).requires_grad_(False)
    lora.inject_lora(model.llama, LORA_TARGETS[variant], rank=4, alpha=8)
    quantize_base(model.llama, bits)
    tensors = quantized_tensors(weights.items(), model, torch.device("cpu"))
    materialize(model, chain(tensors, lora.init_lora(model)), "cpu")
    generator = torch.Generator().manual_seed(1)
    for _, module in lora.lora_modules(model):
        module.lora_B.weight.data.normal_(std=0.2, generator=generator)
    return model.train()


def make_inputs(model: Owl) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, _ = pad_rows([make_row(model.config, 8, 1, generator), make_row(model.config, 6, 0, generator)])
    return ids, make_images(model.config, 1, generator)


@pytest.mark.parametrize("variant", ("owl1", "owl2"))
@pytest.mark.parametrize("bits", (8, 4))
def test_gradients_are_those_of_lora_on_the_dequantized_weights(variant, bits):
    """The same after dequantize_base; merged, the model still computes the same."""
    model = make_qlora(variant, bits)
    plain = copy.deepcopy(model)
    dequantize_base(plain.llama, torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    ids, images = make_inputs(model)
    losses, gradients = [], []
    for twin in (model, plain):
        losses.append(twin(ids, images, ids.clamp(min=0))[1])
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    assert_close(*losses)
    assert gradients[0].keys() == {f"{name}.lora_{x}.weight" for name, _ in lora.lora_modules(plain) for x in "AB"}
    assert_gradients_close(*gradients)

    with torch.no_grad():
        expected = model(ids, images)[0]
        assert_close(plain(ids, images)[0], expected)
        lora.merge_lora(plain)
        assert_close(plain(ids, images)[0], expected)


def test_the_whole_decoder_is_quantized_and_only_the_adapter_trains():
    model = make_qlora("owl1", 4)
    frozen = {name for name, module in model.llama.named_modules() if isinstance(module, FrozenLinear)}
    adapted = {name for name, module in model.llama.named_modules() if isinstance(module, QLoRALinear)}
    assert adapted == {f"layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"}
    rest = [f"layers.{i}.{name}" for i in range(2) for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")]
    assert frozen >= {"lm_head", *rest}
    assert model.llama.lm_head.quantized.bits == 8 and model.llama.layers[0].mlp.up_proj.quantized.bits == 4
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    plain = copy.deepcopy(model)
    dequantize_base(plain.llama, torch.float32)
    assert train_flops(model, 1, [20], 5) == train_flops(plain, 1, [20], 5)


def test_the_graph_keeps_no_dequantized_weights():
    """What the backward pass keeps is as large as without weights: activations alone."""
    model = make_qlora("owl2", 4)
    linear = model.llama.layers[0].mlp.up_proj
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear(torch.randn(3, GROUP, requires_grad=True)).sum().backward()
    assert (linear.out_features, linear.in_features) not in kept and kept


def test_autocast():
    """As in training on a GPU: products in bfloat16, gradients of the adapter in float32."""
    model = make_qlora("owl2", 8)
    linear = model.llama.layers[0].mlp.up_proj
    x = torch.randn(3, GROUP, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == linear.lora_A.weight.grad.dtype == torch.float32


def test_a_weight_that_does_not_fit_is_named():
    model = make_qlora("owl2", 4)
    weights = make_owl(make_config("owl2", llama=WIDE, abstractor={"n_out": 64})).state_dict()
    weights["llama.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors = quantized_tensors(weights.items(), model, torch.device("cpu"))
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj"):
        materialize(model, chain(tensors, lora.init_lora(model)), "cpu")


def test_memory_of_a_7b():
    """Weights, gradients and moments of Owl2-7B with 4 bits and rank 16, without activations."""
    with torch.device("meta"):
        model = Owl(PRESETS["owl2-7b"]()).requires_grad_(False).bfloat16()
    lora.inject_lora(model.llama, LORA_TARGETS["owl2"], rank=16, alpha=32)
    quantize_base(model.llama, 4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    needed = state_bytes(model)
    assert 5e9 < needed["weights"] < 6e9
    assert sum(needed.values()) < 7e9
