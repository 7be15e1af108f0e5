"""The model: equal to the reference implementation, to transformers and to a plain computation, and as cheap."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import GOLDEN, GOLDEN_FOLDERS, VARIANTS, assert_close, assert_gradients_close, build, collect, gradients
from conftest import make_batch, make_config, make_owl, needs_cuda
from generate import generate
from llama import Llama, Modality
from model import IGNORE_INDEX, IMAGE_TOKEN_ID, Owl
from training.presets import PRESETS, init_weights
from training.pretrained import pretrained_tensors, resize_position_embedding
from weights import hf_state_dict, load_model, save_model

SIZES = ((9, 1), (5, 0), (7, 2))  # (text tokens, images) of the rows of a batch


@pytest.fixture
def mixed():
    """mixed(variant, **changes) -> (model, batch): three rows with 1, 0 and 2 images."""

    def make(variant: str, **changes):
        config = make_config(variant, **changes)
        return make_owl(config), make_batch(config, SIZES)

    return make


@pytest.fixture
def record_attention(monkeypatch) -> list[dict]:
    """A list that receives the arguments of each attention."""
    calls = []
    attention = F.scaled_dot_product_attention

    def record(q, k, v, **kwargs):
        calls.append({"q": q, **kwargs})
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


# ----------------------------------------------------------------------------------------------------
# Outputs of the reference implementation


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS)
def test_golden_logits_and_loss(golden, folder):
    model, tensors = golden(folder)
    cases = [key.removesuffix(".valid") for key in tensors if key.endswith(".valid")]
    assert len(cases) == (5 if folder == "owl1" else 8)
    n_loss = 0
    for case in cases:
        ids, images, valid = tensors[f"{case}.ids"], tensors.get(f"{case}.images"), tensors[f"{case}.valid"].bool()
        with torch.no_grad():
            logits, loss = model(ids, images)
            assert loss is None
            assert_close(logits[valid], tensors[f"{case}.logits"][valid], name=case)
            if f"{case}.loss" in tensors:
                _, loss = model(ids, images, tensors[f"{case}.labels"])
                assert_close(loss, tensors[f"{case}.loss"], 2e-6, name=case)
                n_loss += 1
    assert n_loss >= 4


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS)
def test_golden_intermediate_results(golden, record_calls, folder):
    """Of the vision encoder, abstractor, first decoder layer and last norm. A wrong epsilon is above the tolerance."""
    model, tensors = golden(folder)
    assert model.config.llama.norm_eps == (1e-6 if folder == "owl1" else 1e-5)
    layer_calls, norm_calls = record_calls(model.llama.layers[0]), record_calls(model.llama.norm)
    with torch.no_grad():
        assert_close(model.vit(tensors["b.images"]), tensors["b.vit"], 1.5e-6)
        assert_close(model.abstractor(tensors["b.vit"]), tensors["b.abstractor"], 2e-6)
        assert_close(model.encode_images(tensors["b.images"]), tensors["b.abstractor"], 5e-6)
        model(tensors["b.ids"], tensors["b.images"])
    valid = tensors["b.valid"].bool()
    assert_close(layer_calls[0][1][valid], tensors["b.layer0"][valid], 5e-6)
    assert_close(norm_calls[0][1][valid], tensors["b.norm"][valid], 1e-5)


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS)
def test_golden_gradients(golden, folder):
    _, tensors = golden(folder)
    model = load_model(GOLDEN / folder)
    model(tensors["d.ids"], tensors["d.images"], tensors["d.labels"])[1].backward()
    parameters = hf_state_dict(model)
    names = [key for key in tensors if key.startswith("grad.")]
    assert len(names) >= 12
    for name in names:
        assert_close(parameters[name.removeprefix("grad.")].grad, tensors[name], 3e-5, name=name)
        assert tensors[name].abs().max() > 1e-4, f"{name}: too small a gradient to prove anything"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_epsilon_of_every_norm(variant):
    """With inputs so small that the epsilon decides. Three norms of the abstractor have 1e-5, as the released ones."""
    model = make_owl(make_config(variant, llama={"norm_eps": 1e-4}))
    is_image = torch.arange(24).view(2, 12) % 3 == 0
    for name, norm in model.named_modules():
        if "norm" not in name or "multiway" in name:
            continue
        eps = 1e-4 if name.startswith("llama.") else 1e-5 if name.endswith(("norm_q", "norm_k", "norm_mlp")) else 1e-6
        branches = norm.multiway if hasattr(norm, "multiway") else (norm, norm)
        weight = torch.where(is_image[..., None], branches[1].weight, branches[0].weight)
        x = torch.randn(*weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        if isinstance(norm, nn.LayerNorm):
            y, centered, bias = norm(x), x - x.mean(dim=-1, keepdim=True), norm.bias
        else:
            y, centered, bias = norm(x, Modality.from_mask(is_image, int(is_image.sum()))), x, 0
        expected = centered / (centered.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias
        assert_close(y, expected, 2e-6, name=name)


# ----------------------------------------------------------------------------------------------------
# Images and their placeholders


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_another_number_or_shape_are_refused(mixed, record_calls, variant):
    model, batch = mixed(variant)
    ids, images = batch.ids, batch.images
    one_less = ids.clone()
    one_less.view(-1)[(ids.view(-1) == IMAGE_TOKEN_ID).nonzero()[-1]] = 3
    calls = record_calls(model.vit), record_calls(model.llama)
    wrong = [(ids, None), (ids, images[:2]), (ids, torch.cat([images, images[:1]])), (ids.clamp(min=3), images)]
    wrong += [(ids, torch.zeros(3, *shape)) for shape in ((3, 16, 24), (3, 24, 16), (3, 24, 24), (1, 16, 16))]
    for wrong_ids, wrong_images in (*wrong, (one_less, images)):
        with pytest.raises(ValueError):
            model(wrong_ids, wrong_images)
    assert calls == ([], [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_tokens_are_scattered_into_their_placeholders(mixed, record_calls, variant):
    """Row by row; text tokens get their embeddings. Visual tokens may be passed instead of images.

    The visual branch is for all positions of an image, the end-of-image embedding included, and no others.
    """
    model, batch = mixed(variant)
    is_image = batch.ids == IMAGE_TOKEN_ID
    vit_calls, decoder_calls = record_calls(model.vit), record_calls(model.llama)
    with torch.no_grad():
        visual = torch.cat([model.encode_images(image[None]) for image in batch.images])
        logits, _ = model(batch.ids, visual)
        assert len(vit_calls) == 3
        x = decoder_calls[0][0]
        assert torch.equal(x[is_image], visual.flatten(0, 1))
        assert torch.equal(x[~is_image], model.llama.embed_tokens(batch.ids[~is_image]))
        assert_close(model(batch.ids, batch.images)[0], logits)
        model(batch.ids.clamp(min=3))  # text only: the vision encoder does not run
        model(batch.ids.clamp(min=3), batch.images[:0])
        assert len(vit_calls) == 4
        modality = model.embed(batch.ids, visual)[1]
    assert torch.equal(visual[:, -1], model.abstractor.eos[0].expand(3, -1))
    if variant == "owl2":
        assert torch.equal(modality.index, is_image.long())
    assert model.embed(batch.ids.clamp(min=3))[1] is None


# ----------------------------------------------------------------------------------------------------
# The decoder and its modality-adaptive module, compared with a plain computation


def reference_decoder(llama: Llama, x: Tensor, is_image: Tensor) -> Tensor:
    """Llama.forward, computed plainly: both branches for all tokens, repeated heads, a mask, complex rotation."""
    config = llama.config
    B, T, C = x.shape
    D = C // config.n_head

    def branch(module: nn.Module, x: Tensor) -> Tensor:
        if not config.adaptive:
            return module(x)
        text, image = module.multiway
        return torch.where(is_image[..., None], image(x), text(x))

    def heads(x: Tensor, n_head: int) -> Tensor:
        x = x.view(B, T, n_head, D).transpose(1, 2)
        return x.repeat_interleave(config.n_head // n_head, dim=1)

    def rotate(x: Tensor) -> Tensor:
        angle = torch.arange(T)[:, None] * config.rope_theta ** (-torch.arange(0, D, 2) / D)
        rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([rotated.real, rotated.imag], dim=-1)

    for layer in llama.layers:
        attention = layer.self_attn
        h = branch(layer.input_layernorm, x)
        q = rotate(heads(attention.q_proj(h), config.n_head))
        k = rotate(heads(branch(attention.k_proj, h), config.n_kv_head))
        v = heads(branch(attention.v_proj, h), config.n_kv_head)
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
        x = x + attention.o_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, C))
        h = branch(layer.post_attention_layernorm, x)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return llama.norm(x)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("variant, visual", [("owl1", 0.3), ("owl2", 0.0), ("owl2", 0.3), ("owl2", 1.0)])
def test_the_decoder_equals_a_plain_computation(variant, visual, n_kv_head):
    """Hidden states and gradients, for text only, a mix, and visual tokens only."""
    generator = torch.Generator().manual_seed(0)
    llama = make_owl(make_config(variant, llama={"n_kv_head": n_kv_head, "rope_theta": 500.0})).llama
    x = torch.randn(3, 17, 32, generator=generator).requires_grad_()
    is_image = torch.rand(3, 17, generator=generator) < visual
    expected = reference_decoder(llama, x, is_image)
    expected_gradients = gradients(llama, expected.sin().sum())
    modalities = [Modality.from_mask(is_image, int(is_image.sum()))] + [None] * (visual == 0)
    for modality in modalities:
        y = llama(x, modality)
        assert_close(y, expected)
        assert_gradients_close(gradients(llama, y.sin().sum()), expected_gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_depends_on_later_ones(mixed, variant):
    """Neither on padding, whatever its content and length."""
    model, batch = mixed(variant)
    T = batch.ids.shape[1]
    valid = torch.arange(T) < batch.lengths[:, None]
    labels = batch.ids.masked_fill(~valid | (batch.ids == IMAGE_TOKEN_ID), IGNORE_INDEX)
    other = F.pad(torch.where(valid, batch.ids, torch.arange(T) % 37 + 3), (0, 5), value=9)
    with torch.no_grad():
        expected, _ = model(batch.ids, batch.images)
        logits, _ = model(other, batch.images)
        assert_close(logits[:, :T][valid], expected[valid])
        loss = model(other, batch.images, F.pad(labels, (0, 5), value=IGNORE_INDEX))[1]
        assert_close(loss, model(batch.ids, batch.images, labels)[1])
        for logits, (ids, images) in zip(expected, batch.rows):
            assert_close(model(ids, images)[0][0], logits[: ids.shape[1]])
        assert_close(model(batch.ids[1:2, :3])[0], expected[1:2, :3])


# ----------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_the_mean_cross_entropy_of_supervised_tokens(mixed, variant):
    model, batch = mixed(variant)
    labels = batch.ids.masked_fill(batch.ids == IMAGE_TOKEN_ID, IGNORE_INDEX)
    labels[:, :3] = IGNORE_INDEX
    labels[1, 4:] = IGNORE_INDEX
    with torch.no_grad():
        logits, _ = model(batch.ids, batch.images)
        _, loss = model(batch.ids, batch.images, labels)
    losses = []
    for row, t in (labels != IGNORE_INDEX).nonzero().tolist():
        losses.append(-logits[row, t - 1].log_softmax(dim=-1)[labels[row, t]])
    assert_close(loss, torch.stack(losses).mean(), 2e-6)


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_zero_without_supervised_tokens(mixed, variant, with_images):
    """Also if only the first token is supervised, which nothing predicts. No gradient is NaN."""
    model, batch = mixed(variant)
    ids, images = (batch.ids, batch.images) if with_images else (batch.ids.clamp(min=3), None)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, 0] = 5
    _, loss = model(ids, images, labels)
    assert loss.shape == () and loss.item() == 0
    for name, gradient in gradients(model, loss).items():
        assert not gradient.any(), name


# ----------------------------------------------------------------------------------------------------
# Cost


def count_flops(model: Owl, ids: Tensor, images: Tensor | None, labels: Tensor | None) -> int:
    """Floating-point operations of a forward pass and, with labels, a backward pass."""
    with FlopCounterMode(display=False) as counter:
        _, loss = model(ids, images, labels)
        if loss is not None:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_adaptive_module_costs_as_much_as_llama(mixed, with_images, training):
    model, batch = mixed("owl2")
    config = make_config("owl2")
    config.llama.adaptive = False
    ids, images = (batch.ids, batch.images) if with_images else (batch.ids.clamp(min=3), None)
    labels = ids.clamp(min=0) if training else None
    assert count_flops(model, ids, images, labels) == count_flops(Owl(config), ids, images, labels) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_needs_no_mask_in_training_and_prefill(mixed, record_attention, variant):
    """A mask would exclude the fastest kernels. A later token has a mask of one row."""
    model, batch = mixed(variant)
    config = model.config
    model.train()(batch.ids, batch.images, batch.ids.clamp(min=0))[1].backward()
    assert all(call.get("attn_mask") is None for call in record_attention)
    n_causal = sum(bool(call.get("is_causal")) for call in record_attention)
    assert n_causal == config.llama.n_layer
    assert len(record_attention) == n_causal + config.vit.n_layer + config.abstractor.n_layer

    record_attention.clear()
    settings = {"prompt_lengths": batch.lengths, "max_new_tokens": 3, "stop_at_eos": False}
    collect(generate(model.eval(), batch.ids, batch.images, **settings))
    decoder = [call for call in record_attention if call["q"].shape[1] == config.llama.n_head]
    assert all(call["attn_mask"] is None for call in decoder[: config.llama.n_layer])
    assert [call["attn_mask"].shape[2] for call in decoder[config.llama.n_layer :]] == [1] * 2 * config.llama.n_layer


@pytest.mark.parametrize("n_visual", [0, 12])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoder_does_not_synchronize(variant, n_visual):
    """Forward and backward with tensors that have shapes but no values: an operation that needs a value raises."""
    with FakeTensorMode():
        llama = Llama(make_config(variant).llama)
        x = torch.zeros(3, 17, 32, requires_grad=True)
        is_image = torch.zeros(3, 17, dtype=torch.bool)
        llama(x, Modality.from_mask(is_image, n_visual) if n_visual else None).sum().backward()
        assert x.grad.shape == x.shape
        with pytest.raises(DataDependentOutputException):
            int(is_image.sum())


# ----------------------------------------------------------------------------------------------------
# Shapes and initialization


ODD_WIDTHS = {
    "vit": {"image_size": 15, "patch_size": 5, "n_head": 3, "n_embd": 36, "n_mlp": 37},
    "abstractor": {"n_query": 5, "n_head": 3, "n_embd": 36, "n_mlp": 41, "n_out": 66},
    "llama": {"vocab_size": 97, "n_head": 3, "n_kv_head": 3, "n_embd": 66, "n_mlp": 55},
}
LARGE_IMAGES = {
    "vit": {"image_size": 448, "patch_size": 14, "n_layer": 1, "n_embd": 8},
    "abstractor": {"n_embd": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", [ODD_WIDTHS, LARGE_IMAGES], ids=["odd", "448"])
def test_other_shapes(mixed, tmp_path, variant, changes):
    """Output shapes, a gradient for every parameter, and equal logits after saving and loading."""
    model, batch = mixed(variant, **changes)
    config = model.config
    assert model.vit(batch.images).shape == (3, 1 + config.vit.grid_size**2, config.vit.n_embd)
    assert model.encode_images(batch.images).shape == (3, config.n_query + 1, config.llama.n_embd)
    logits, _ = model(batch.ids, batch.images)
    assert logits.shape == (*batch.ids.shape, config.llama.vocab_size)
    _, loss = model(batch.ids, batch.images, batch.ids.clamp(min=0))
    for name, gradient in gradients(model, loss).items():
        if not name.endswith((".k.bias", "qkv.bias")):
            assert gradient.any(), name
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(batch.ids, batch.images)[0], logits)


SIZE_RANGES = {"owl1-7b": (7.1e9, 7.2e9), "owl2-7b": (8.1e9, 8.3e9), "mid-owl2": (5e7, 1e8)}
SIZE_RANGES |= {"smol-owl1": (1.36e8, 1.37e8), "smol-owl2": (1.42e8, 1.43e8), "smol-owl2-plain": (1.36e8, 1.37e8)}
SIZE_RANGES["owl2-1b"] = (1.5e9, 1.7e9)  # 1.15e9 are read per token


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_in_their_name(name):
    with torch.device("meta"):
        model = Owl(PRESETS[name]())
    low, high = SIZE_RANGES.get(name, (1e6, 5e6))
    assert low < sum(parameter.numel() for parameter in model.parameters()) < high
    assert model.config.variant in name
    assert model.config.n_visual_tokens == 65 or "tiny" in name or "smol" in name


def test_an_initialized_model_learns(mixed):
    """Queries differ from each other, and every parameter is initialized."""
    _, batch = mixed("owl1")
    torch.manual_seed(0)
    model = init_weights(Owl(make_config("owl1")))
    assert not torch.equal(model.abstractor.queries[0, 0], model.abstractor.queries[0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        _, loss = model(batch.ids, batch.images, batch.ids.clamp(min=0))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ----------------------------------------------------------------------------------------------------
# Pretrained weights: LLaMA and CLIP of transformers


def interpolate(table: Tensor, old: int, new: int) -> Tensor:
    """[1 + old ** 2, C] to [1 + new ** 2, C]; bicubic, in float32."""
    grid = table[1:].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([table[:1], grid.reshape(-1, new * new).T])


@pytest.mark.parametrize("dtype, old, new", [(torch.float32, 4, 2), (torch.bfloat16, 16, 32)])
def test_position_embeddings_are_interpolated(dtype, old, new):
    table = torch.randn(1, 1 + old * old, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    resized = resize_position_embedding(table, 1 + new * new)
    assert resized.dtype == dtype and torch.equal(resized[0], interpolate(table[0], old, new))
    assert resize_position_embedding(table, 1 + old * old) is table


def save_llama(folder: Path, n_kv_head: int, rope_theta: float) -> nn.Module:
    """Saves a tiny random LLaMA of transformers in several shards, as those on the hub are."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter.data, 0.5, 1.5)
    llama.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return llama


def save_clip(folder: Path) -> nn.Module:
    """Saves a tiny random CLIP of transformers, with its text encoder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    shared = {"num_hidden_layers": 2, "layer_norm_eps": 1e-6}
    vision = shared | {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
    vision |= {"image_size": 16, "patch_size": 4}
    text = shared | {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text |= {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    for parameter in clip.parameters():
        nn.init.normal_(parameter.data, mean=0.1 if parameter.dim() == 1 else 0.0, std=0.3)
    clip.save_pretrained(folder)
    return clip


@pytest.mark.parametrize("variant, n_kv_head, rope_theta", [("owl1", 4, 10000.0), ("owl2", 2, 500.0)])
def test_pretrained_weights_equal_transformers(tmp_path, variant, n_kv_head, rope_theta):
    """Also for twice the image size, where only the position embeddings differ."""
    llama, clip = save_llama(tmp_path / "llama", n_kv_head, rope_theta), save_clip(tmp_path / "clip")
    vit = {"patch_size": 4, "n_head": 3, "n_embd": 24, "n_mlp": 40}
    abstractor = {"n_embd": 24, "n_head": 3, "n_out": 48}
    sizes = {"vocab_size": 97, "context": 128, "n_embd": 48, "n_mlp": 72, "norm_eps": 1e-5}
    sizes |= {"n_kv_head": n_kv_head, "rope_theta": rope_theta}
    config, large = (make_config(variant, vit | {"image_size": size}, abstractor, sizes) for size in (16, 32))
    model = build(config, pretrained_tensors(config, tmp_path / "clip", tmp_path / "llama")).eval()

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (2, 21), generator=generator)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        assert_close(model(ids)[0], llama(ids).logits)
        vision = clip.vision_model
        assert_close(model.vit(images), vision.post_layernorm(vision(images).last_hidden_state))

        # The visual branch is a copy of the text branch, so images pass through it as through a plain LLaMA.
        placeholders = torch.full((2, config.n_visual_tokens), IMAGE_TOKEN_ID)
        embed, visual = model.llama.embed_tokens, model.encode_images(images)
        x = torch.cat([embed(ids[:, :3]), visual, embed(ids[:, 3:])], dim=1)
        logits, _ = model(torch.cat([ids[:, :3], placeholders, ids[:, 3:]], dim=1), images)
        assert_close(logits, llama(inputs_embeds=x).logits)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(addresses) == len(list(model.parameters())), "branches share memory, but are trained separately"

    model = build(large, pretrained_tensors(large, tmp_path / "clip", tmp_path / "llama"))
    table = vision.embeddings.position_embedding.weight.detach()
    assert torch.equal(model.vit.position_embedding[0], interpolate(table, 4, 8))
    assert model.encode_images(torch.zeros(1, 3, 32, 32)).shape == (1, config.n_visual_tokens, 48)


# ----------------------------------------------------------------------------------------------------
# CUDA


@needs_cuda
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flash_attention_runs_on_cuda(mixed, variant, n_kv_head):
    """Training and the prefill of a ragged prompt in bfloat16, with all other attention kernels disabled."""
    wide = {"vit": {"n_embd": 128}, "abstractor": {"n_embd": 128, "n_out": 256}}  # heads of 64 channels
    model, batch = mixed(variant, **wide, llama={"n_embd": 256, "n_kv_head": n_kv_head})
    model.cuda().bfloat16().train()
    ids, images = batch.ids.cuda(), batch.images.cuda().bfloat16()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        _, loss = model(ids, images, ids.clamp(min=0))
        loss.backward()
        first = next(generate(model.eval(), ids, images, prompt_lengths=batch.lengths))
    assert loss.isfinite()
    assert first.shape == (3,)


@needs_cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_decoder_does_not_synchronize_on_cuda(mixed, variant):
    model, batch = mixed(variant)
    x, modality = model.cuda().embed(batch.ids.cuda(), batch.images.cuda())
    x = x.detach().requires_grad_()
    model.llama(x, modality).sum().backward()  # initializes the libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.llama(x, modality).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_equals_cpu(mixed, variant):
    model, batch = mixed(variant)
    on_cuda = copy.deepcopy(model).cuda()
    ids, images = batch.ids.cuda(), batch.images.cuda()
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        assert_close(on_cuda(ids, images)[0].cpu(), model(batch.ids, batch.images)[0], 2e-5)
    settings = {"prompt_lengths": batch.lengths, "max_new_tokens": 6, "stop_at_eos": False}
    expected = collect(generate(model, batch.ids, batch.images, **settings))
    assert torch.equal(collect(generate(on_cuda, ids, images, **settings)), expected)
