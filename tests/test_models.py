"""The models: equal to the released code, to transformers and to slow twins, and no dearer than they must be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import weights
from conftest import build
from llama import AdaptiveLinear, AdaptiveRMSNorm, Split
from model import IGNORE, IMAGE_ID, PRESETS, Owl
from vit import resize_positions

FOLDERS = ("owl1", "owl2", "owl2-bin-shards")
CASES = {
    "owl1": ("a", "b", "c", "d", "d2"),
    "owl2": ("a", "b", "c", "c2", "d", "d2", "d3", "d4"),
    "owl2-bin-shards": ("a", "b", "c", "c2", "d", "d2", "d3", "d4"),
}
ALL_CASES = [(folder, case) for folder in FOLDERS for case in CASES[folder]]
LOSS_CASES = [(folder, case) for folder, case in ALL_CASES if folder == "owl1" or case.startswith("d")]
STYLES = ("owl1", "owl2")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def count_calls(*modules: torch.nn.Module) -> list:
    """A list that grows by one item at each call of one of the modules."""
    calls = []
    for module in modules:
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def watch_attention(monkeypatch) -> list[dict]:
    """Records the keyword arguments of every attention."""
    seen = []
    original = F.scaled_dot_product_attention

    def attention(q, k, v, **kwargs):
        seen.append({"q": q, "k": k, **kwargs})
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return seen


@pytest.fixture
def mixed(tiny_config, tiny_owl, random_row, random_images, padded):
    """mixed(style, seed=0, **changes) -> (model, ids, images, lengths): 3 right-padded rows with 1, 0 and 2 images."""

    def make(style: str, seed: int = 0, **changes):
        config = tiny_config(style, **changes)
        generator = torch.Generator().manual_seed(seed)
        rows = [random_row(config, length, n, generator) for length, n in ((9, 1), (5, 0), (7, 2))]
        ids, lengths = padded(rows)
        return tiny_owl(config, seed), ids, random_images(config, 3, generator), lengths

    return make


# ----------------------------------------------------------------------------------------------------
# The released code's numbers


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_golden_case_is_forgotten(golden, folder):
    _, tensors = golden(folder)
    assert sorted(key.removesuffix(".valid") for key in tensors if key.endswith(".valid")) == list(CASES[folder])
    with_loss = [key.removesuffix(".loss") for key in tensors if key.endswith(".loss")]
    assert sorted(with_loss) == [case for other, case in LOSS_CASES if other == folder]


@pytest.mark.parametrize("folder, case", ALL_CASES)
def test_golden_logits(golden, folder, case):
    model, tensors = golden(folder)
    with torch.no_grad():
        logits, loss = model(tensors[f"{case}.ids"], tensors.get(f"{case}.images"))
    assert loss is None
    valid = tensors[f"{case}.valid"].bool()
    close(logits[valid], tensors[f"{case}.logits"][valid], 3e-5)


@pytest.mark.parametrize("folder, case", LOSS_CASES)
def test_golden_loss(golden, folder, case):
    model, tensors = golden(folder)
    with torch.no_grad():
        _, loss = model(tensors[f"{case}.ids"], tensors.get(f"{case}.images"), tensors[f"{case}.labels"])
    close(loss, tensors[f"{case}.loss"], 1e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_insides(golden, folder):
    """The vision tower, the abstractor, the first decoder layer, and the last norm, each by itself."""
    model, tensors = golden(folder)
    seen = {}
    hooks = [
        model.llama.layers[0].register_forward_hook(lambda _, __, output: seen.update(layer0=output)),
        model.llama.norm.register_forward_hook(lambda _, __, output: seen.update(norm=output)),
    ]
    with torch.no_grad():
        close(model.vit(tensors["b.images"]), tensors["b.vit"], 1e-5)
        close(model.abstractor(tensors["b.vit"]), tensors["b.abstractor"], 2e-5)
        close(model.encode_images(tensors["b.images"]), tensors["b.abstractor"], 2e-5)
        model(tensors["b.ids"], tensors["b.images"])
    for hook in hooks:
        hook.remove()
    valid = tensors["b.valid"].bool()
    close(seen["layer0"][valid], tensors["b.layer0"][valid], 2e-5)
    close(seen["norm"][valid], tensors["b.norm"][valid], 2e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_gradients(golden, golden_folder, folder):
    _, tensors = golden(folder)
    model = weights.load_model(golden_folder(folder))
    _, loss = model(tensors["d.ids"], tensors["d.images"], tensors["d.labels"])
    loss.backward()
    ours = weights.official_state(model)
    names = [key.removeprefix("grad.") for key in tensors if key.startswith("grad.")]
    assert len(names) >= 12
    for name in names:
        expected = tensors[f"grad.{name}"]
        torch.testing.assert_close(ours[name].grad, expected, rtol=0, atol=5e-6, msg=lambda text: f"{name}: {text}")
        assert expected.abs().max() > 1e-4, f"{name}: a gradient this small would prove nothing"


# ----------------------------------------------------------------------------------------------------
# Images and their places


@pytest.mark.parametrize("style", STYLES)
def test_a_wrong_number_of_images_is_refused_before_any_work(mixed, style):
    model, ids, images, _ = mixed(style)
    calls = count_calls(model.vit, model.llama)
    for wrong in (None, images[:2], torch.cat([images, images[:1]])):
        with pytest.raises(ValueError, match="images"):
            model(ids, wrong)
        with pytest.raises(ValueError, match="images"):
            model.generate(ids, wrong)
    with pytest.raises(ValueError, match="images"):
        model(ids.clamp(min=3), images)
    one_place_less = ids.clone()
    one_place_less[ids == IMAGE_ID] = torch.tensor([IMAGE_ID] * (3 * model.config.image_words - 1) + [3])
    with pytest.raises(ValueError, match="images"):
        model(one_place_less, images)
    assert calls == []


@pytest.mark.parametrize("style", STYLES)
def test_a_text_batch_runs_no_vision_tower(mixed, style):
    model, ids, images, _ = mixed(style)
    tower = count_calls(model.vit)
    abstractor = count_calls(model.abstractor)
    model(ids.clamp(min=3))
    model(ids.clamp(min=3), images[:0])
    assert len(tower) == 0
    assert len(abstractor) == 0
    model(ids, images)
    assert len(tower) == 1
    assert len(abstractor) == 1


@pytest.mark.parametrize("style", STYLES)
def test_images_go_to_their_places_in_order(mixed, style):
    """What enters the decoder is image words at IMAGE_ID, row by row, and embeddings elsewhere."""
    model, ids, images, _ = mixed(style)
    seen = {}
    model.llama.register_forward_pre_hook(lambda _, arguments: seen.update(x=arguments[0]))
    with torch.no_grad():
        model(ids, images)
        words = torch.cat([model.encode_images(image[None]) for image in images])
    is_image = ids == IMAGE_ID
    close(seen["x"][is_image], words.flatten(0, 1), 1e-5)
    assert torch.equal(seen["x"][~is_image], model.llama.embed_tokens(ids[~is_image]))


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 24, 16), (3, 24, 24), (1, 16, 16)])
def test_images_of_another_shape_are_refused(mixed, shape):
    model, ids, _, _ = mixed("owl2")
    with pytest.raises(ValueError, match="16, 16"):
        model(ids, torch.zeros(3, *shape))


# ----------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("style", STYLES)
def test_loss_is_the_mean_cross_entropy_of_the_supervised_tokens(mixed, style):
    model, ids, images, _ = mixed(style)
    labels = ids.clone()
    labels[ids == IMAGE_ID] = IGNORE
    labels[:, :3] = IGNORE
    labels[1, 4:] = IGNORE
    with torch.no_grad():
        logits, _ = model(ids, images)
        _, loss = model(ids, images, labels)
    by_hand = []
    for row in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            if labels[row, t] != IGNORE:
                by_hand.append(-logits[row, t - 1].log_softmax(dim=-1)[labels[row, t]])
    close(loss, torch.stack(by_hand).mean(), 1e-5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("with_images", [True, False])
def test_loss_is_zero_without_supervised_tokens(mixed, style, with_images):
    """Also where only the first token, which nothing foresees, is supervised. Nothing becomes NaN."""
    model, ids, images, _ = mixed(style)
    if not with_images:
        ids, images = ids.clamp(min=3), None
    labels = torch.full_like(ids, IGNORE)
    labels[:, 0] = 5
    _, loss = model(ids, images, labels)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("style", STYLES)
def test_padding_does_not_matter(mixed, style):
    """Whatever stands behind a row, and however much of it: its logits and the loss stay."""
    model, ids, images, lengths = mixed(style)
    T = ids.shape[1]
    valid = torch.arange(T) < lengths[:, None]
    labels = ids.masked_fill(~valid | (ids == IMAGE_ID), IGNORE)
    garbage = torch.where(valid, ids, torch.randint(0, 40, ids.shape, generator=torch.Generator().manual_seed(1)))
    longer = F.pad(garbage, (0, 5), value=7)
    with torch.no_grad():
        expected, _ = model(ids, images)
        expected_loss = model(ids, images, labels)[1]
        for other in (garbage, longer):
            logits, _ = model(other, images)
            close(logits[:, :T][valid], expected[valid], 1e-5)
            loss = model(other, images, F.pad(labels, (0, other.shape[1] - T), value=IGNORE))[1]
            close(loss, expected_loss, 1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_no_token_sees_those_after_it(mixed, style):
    model, ids, images, _ = mixed(style)
    with torch.no_grad():
        whole, _ = model(ids, images)
        for end in (1, 6, 12):
            part = ids[:1, :end]
            n = int((part == IMAGE_ID).sum())
            if n % model.config.image_words == 0:
                logits, _ = model(part, images[: n // model.config.image_words])
                close(logits, whole[:1, :end], 1e-5)


# ----------------------------------------------------------------------------------------------------
# What it costs


def flops(model: Owl, ids: Tensor, images: Tensor | None, labels: Tensor | None) -> dict[str, int]:
    """Floating-point operations of a forward pass (and, with labels, a backward pass) by module."""
    with FlopCounterMode(display=False) as counter:
        _, loss = model(ids, images, labels)
        if loss is not None:
            loss.backward()
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_adaptive_module_costs_what_plain_llama_costs(tiny_config, mixed, with_images, training):
    model, ids, images, _ = mixed("owl2")
    config = tiny_config("owl2")
    config.llama.adaptive = False
    plain = Owl(config)
    if not with_images:
        ids, images = ids.clamp(min=3), None
    labels = ids.clamp(min=0) if training else None
    ours = flops(model, ids, images, labels)
    theirs = flops(plain, ids, images, labels)
    assert ours["Global"] == theirs["Global"] > 0
    if not training:
        B, T = ids.shape
        C = config.llama.n_embd
        assert ours["Owl.llama.layers.0.self_attn.k_proj"] == 2 * B * T * C * C
        assert ours["Owl.llama.layers.0.self_attn.v_proj"] == 2 * B * T * C * C


def test_text_and_generated_tokens_never_meet_the_image_half(mixed):
    model, ids, images, lengths = mixed("owl2")
    half = count_calls(model.llama.layers[0].self_attn.k_proj.multiway[1])
    model(ids.clamp(min=3))
    list(model.generate(ids.clamp(min=3), lengths=lengths, max_new_tokens=4, stop=False))
    assert len(half) == 0
    list(model.generate(ids, images, lengths, max_new_tokens=4, stop=False))
    assert len(half) == 1, "the prompt, and no more"


@pytest.mark.parametrize("style", STYLES)
def test_no_mask_in_training(mixed, monkeypatch, style):
    """Attention of right-padded batches is left to the kernel: causal in the decoder, full in the others, no mask."""
    model, ids, images, _ = mixed(style)
    seen = watch_attention(monkeypatch)
    model.train()
    model(ids, images, ids.clamp(min=0))[1].backward()
    assert all(call.get("attn_mask") is None for call in seen)
    n_causal = sum(bool(call.get("is_causal")) for call in seen)
    assert n_causal == model.config.llama.n_layer
    assert len(seen) == n_causal + model.config.vit.n_layer + model.config.abstractor.n_layer


@pytest.mark.parametrize("style", STYLES)
def test_no_mask_over_a_ragged_prompt(mixed, monkeypatch, style):
    """Generation reads its prompts without a mask as well; for a later token it is of a single row."""
    model, ids, images, lengths = mixed(style)
    seen = watch_attention(monkeypatch)
    list(model.generate(ids, images, lengths, max_new_tokens=3, stop=False))
    decoder = [call for call in seen if call["q"].shape[1] == 4]
    n_layer = model.config.llama.n_layer
    assert all(call["attn_mask"] is None and call["is_causal"] for call in decoder[:n_layer])
    assert len(decoder) > n_layer
    for call in decoder[n_layer:]:
        assert call["q"].shape[2] == 1
        assert call["attn_mask"].shape[-2] == 1


class NoHostSync(TorchDispatchMode):
    """Raises where a value of a tensor, or a shape that depends on one, would be brought to the host."""

    SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.SYNCS or by_mask:
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **kwargs)


def test_the_watch_for_host_syncs_sees_them():
    x = torch.tensor([1.0, -1.0])
    for sync in (lambda: x.max().item(), lambda: bool(x.any()), lambda: x[x > 0], lambda: x.nonzero()):
        with NoHostSync(), pytest.raises(AssertionError, match="waits"):
            sync()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("with_images", [True, False])
def test_no_host_sync_inside_the_layers(mixed, style, with_images):
    model, ids, images, _ = mixed(style)
    if not with_images:
        ids, images = ids.clamp(min=3), None
    x, split = model._embed(ids, images)
    assert (split is not None) == with_images
    x = x.detach().requires_grad_()
    with NoHostSync():
        model.llama(x, split).sum().backward()
    assert x.grad is not None


# ----------------------------------------------------------------------------------------------------
# The modality-adaptive module against its slow twin


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_adaptive_parts_equal_a_choice_between_two(share):
    """Both halves over all tokens, then a choice: the same results and gradients."""
    torch.manual_seed(0)
    linear = AdaptiveLinear(12, 10)
    norm = AdaptiveRMSNorm(12, 1e-5)
    for half in norm.multiway:
        torch.nn.init.uniform_(half.weight, 0.5, 1.5)
    is_image = torch.rand(3, 17) < share
    split = Split.of(is_image, int(is_image.sum()))
    x = torch.randn(3, 17, 12)
    for part in (linear, norm):
        text, image = part.multiway
        fast, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = part(split.sort(fast) if part is linear else fast, split)
        part.zero_grad()
        y.sin().sum().backward()
        gradients = [parameter.grad.clone() for parameter in part.parameters()]
        expected = torch.where(is_image[..., None], image(slow), text(slow))
        part.zero_grad()
        expected.sin().sum().backward()
        close(y, expected, 1e-6)
        close(fast.grad, slow.grad, 1e-6)
        for gradient, parameter in zip(gradients, part.parameters()):
            close(gradient, parameter.grad, 1e-5)
        close(part(x, None), text(x), 0)


# ----------------------------------------------------------------------------------------------------
# Other shapes


ODD_WIDTHS = {
    "vit": {"image_size": 15, "patch_size": 5, "n_head": 3, "n_embd": 36, "n_mlp": 37},
    "abstractor": {"n_query": 5, "n_head": 3, "n_embd": 36, "n_mlp": 41, "n_out": 66},
    "llama": {"vocab_size": 97, "n_head": 3, "n_kv_head": 3, "n_embd": 66, "n_mlp": 55},
}
LARGE_IMAGES = {
    "vit": {"image_size": 448, "patch_size": 14, "n_layer": 1, "n_embd": 8},
    "abstractor": {"n_embd": 8},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("changes", [ODD_WIDTHS, LARGE_IMAGES], ids=["odd", "448"])
def test_other_shapes(mixed, tmp_path, style, changes):
    """Shapes, a gradient everywhere, rows as they are alone, and bit-identical after save and load."""
    model, ids, images, lengths = mixed(style, **changes)
    config = model.config
    assert model.vit(images).shape == (3, 1 + config.vit.grid_size**2, config.vit.n_embd)
    assert model.encode_images(images).shape == (3, config.n_query + 1, config.llama.n_embd)
    logits, _ = model(ids, images)
    assert logits.shape == (*ids.shape, config.llama.vocab_size)
    alone, _ = model(ids[2:, : lengths[2]], images[1:])
    close(logits[2:, : lengths[2]], alone, 1e-5)
    model(ids, images, ids.clamp(min=0))[1].backward()
    for name, parameter in model.named_parameters():
        if name != "vit.position_embedding" and not name.endswith((".k.bias", "qkv.bias")):
            assert parameter.grad.abs().max() > 0, name
    weights.save_model(model, tmp_path)
    again, _ = weights.load_model(tmp_path)(ids, images)
    assert torch.equal(again, logits)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_heads_equal_repeated_ones(mixed, tiny_owl, tiny_config, style, n_kv_head):
    """Each key and value head written out for every query head that it serves: the same logits."""
    model, ids, images, lengths = mixed(style, llama={"n_kv_head": n_kv_head})
    full = tiny_owl(tiny_config(style))
    state = model.state_dict()
    D = model.config.llama.head_dim
    for name in state:
        if ".k_proj." in name or ".v_proj." in name:
            heads = state[name].view(n_kv_head, D, -1)
            state[name] = heads.repeat_interleave(4 // n_kv_head, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    with torch.no_grad():
        close(model(ids, images)[0], full(ids, images)[0], 1e-5)
    ours = torch.stack(list(model.generate(ids, images, lengths, max_new_tokens=6, stop=False)))
    theirs = torch.stack(list(full.generate(ids, images, lengths, max_new_tokens=6, stop=False)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_they_are_named_after(name):
    with torch.device("meta"):
        model = Owl(PRESETS[name]())
    count = sum(parameter.numel() for parameter in model.parameters())
    low, high = {
        "owl1-7b": (7.1e9, 7.2e9),
        "owl2-7b": (8.1e9, 8.3e9),
        "tiny-owl1": (1e6, 5e6),
        "tiny-owl2": (1e6, 5e6),
        "mid-owl2": (5e7, 1e8),
    }[name]
    assert low < count < high
    assert model.config.style == name[: name.index("-")] or model.config.style in name
    if name in ("owl1-7b", "owl2-7b"):
        assert model.config.image_words == 65


def test_init_weights_gives_a_model_that_can_learn(tiny_config, mixed):
    """Queries differ from each other, and nothing is left at what memory held."""
    _, ids, images, _ = mixed("owl1")
    torch.manual_seed(0)
    model = Owl(tiny_config("owl1")).init_weights()
    assert not torch.equal(model.abstractor.queries[0, 0], model.abstractor.queries[0, 1])
    labels = ids.clamp(min=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        _, loss = model(ids, images, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ----------------------------------------------------------------------------------------------------
# Position embeddings for another image size


@pytest.mark.parametrize("old, new", [(2, 4), (4, 2), (16, 32)])
def test_positions_are_interpolated_as_bicubic_does_it(old, new):
    table = torch.randn(1, 1 + old * old, 6, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(table, 1 + new * new)
    grid = table[0, 1:].T.reshape(1, 6, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :1], grid.reshape(1, 6, new * new).transpose(1, 2)], dim=1)
    assert torch.equal(resized, expected)
    assert resize_positions(table, 1 + old * old) is table
    half = resize_positions(table.bfloat16(), 1 + new * new)
    assert half.dtype == torch.bfloat16
    grid = F.interpolate(table.bfloat16().float()[0, 1:].T.reshape(1, 6, old, old), size=(new, new), mode="bicubic")
    assert torch.equal(half[0, 1:], grid.reshape(6, new * new).T.bfloat16()), "interpolated in float32, then rounded"


# ----------------------------------------------------------------------------------------------------
# transformers' LLaMA and CLIP


def save_llama(folder, **changes):
    """A tiny random LLaMA of transformers, saved as the hub's are, in several shards."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    theta = changes.pop("rope_theta", 10000.0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    llama.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return llama


def save_clip(folder):
    """A tiny random CLIP of transformers, both towers, saved as the hub's is."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 4,
        "layer_norm_eps": 1e-6,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter.data, mean=0.1 if parameter.dim() == 1 else 0.0, std=0.3)
    clip.save_pretrained(folder)
    return clip


def starting_config(tiny_config, style: str, image_size: int = 16, **llama):
    sizes = {"vocab_size": 97, "context": 128, "n_embd": 48, "n_mlp": 72, "norm_eps": 1e-5}
    return tiny_config(
        style,
        vit={"image_size": image_size, "patch_size": 4, "n_head": 3, "n_embd": 24, "n_mlp": 40},
        abstractor={"n_embd": 24, "n_head": 3, "n_out": 48},
        llama=sizes | llama,
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n_kv_head, rope_theta", [(4, 10000.0), (2, 500.0)])
def test_starting_points_equal_transformers(tiny_config, tmp_path, style, n_kv_head, rope_theta):
    llama = save_llama(tmp_path / "llama", num_key_value_heads=n_kv_head, rope_theta=rope_theta)
    clip = save_clip(tmp_path / "clip")
    config = starting_config(tiny_config, style, n_kv_head=n_kv_head, rope_theta=rope_theta)
    model = build(config, weights.start_from(config, tmp_path / "clip", tmp_path / "llama")).eval()

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (2, 21), generator=generator)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        close(model(ids)[0], llama(ids).logits, 1e-5)
        tower = clip.vision_model
        expected = tower.post_layernorm(tower(images).last_hidden_state)
        close(model.vit(images), expected, 1e-5)

        # The image halves are copies of the text halves, so that images, too, pass as in a plain LLaMA.
        mixed = torch.cat([ids[:, :3], torch.full((2, config.image_words), IMAGE_ID), ids[:, 3:]], dim=1)
        words = model.encode_images(images)
        embedded = torch.cat([model.llama.embed_tokens(ids[:, :3]), words, model.llama.embed_tokens(ids[:, 3:])], dim=1)
        close(model(mixed, images)[0], llama(inputs_embeds=embedded).logits, 1e-5)
    if style == "owl2":
        theirs = llama.state_dict()
        halves = [name for name in model.state_dict() if ".multiway.1." in name]
        assert len(halves) == 4 * config.llama.n_layer
        for name in halves:
            image = model.get_parameter(name)
            text = model.get_parameter(name.replace(".multiway.1.", ".multiway.0."))
            assert torch.equal(image, text)
            assert torch.equal(image, theirs["model." + name.removeprefix("llama.").replace(".multiway.1", "")])
            assert image.data_ptr() != text.data_ptr(), "they are to be trained apart"


def test_starting_positions_are_interpolated(tiny_config, tmp_path):
    save_llama(tmp_path / "llama")
    clip = save_clip(tmp_path / "clip")
    config = starting_config(tiny_config, "owl2", image_size=32)
    model = build(config, weights.start_from(config, tmp_path / "clip", tmp_path / "llama"))
    table = clip.vision_model.embeddings.position_embedding.weight.detach()
    grid = table[1:].T.reshape(1, 24, 4, 4)
    grid = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:1], grid.reshape(24, 64).T])
    assert torch.equal(model.vit.position_embedding[0], expected)
    assert model.abstractor.layers[0].attn.k_pos.shape == (65, 24)
    assert model.encode_images(torch.zeros(1, 3, 32, 32)).shape == (1, config.image_words, 48)


# ----------------------------------------------------------------------------------------------------
# On CUDA


def flash_config(tiny_config, style: str, n_kv_head: int):
    """Heads of 64, which the flash kernels have."""
    return tiny_config(
        style,
        vit={"n_embd": 128},
        abstractor={"n_embd": 128, "n_out": 256},
        llama={"n_embd": 256, "n_kv_head": n_kv_head},
    )


@needs_cuda
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flash_attention_runs_on_cuda(tiny_config, tiny_owl, random_row, random_images, padded, style, n_kv_head):
    """With every other kernel forbidden: training and reading a ragged prompt, in bf16."""
    config = flash_config(tiny_config, style, n_kv_head)
    generator = torch.Generator().manual_seed(0)
    rows = [random_row(config, length, n, generator) for length, n in ((9, 1), (5, 0), (7, 2))]
    ids, lengths = (tensor.cuda() for tensor in padded(rows))
    images = random_images(config, 3, generator).cuda().bfloat16()
    model = tiny_owl(config).cuda().bfloat16().train()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        _, loss = model(ids, images, ids.clamp(min=0))
        loss.backward()
        first = next(model.eval().generate(ids, images, lengths))
    assert loss.isfinite()
    assert first.shape == (3,)


@needs_cuda
@pytest.mark.parametrize("style", STYLES)
def test_no_host_sync_on_cuda(mixed, style):
    """CUDA's own watch over synchronisation, around the layers and their backward pass."""
    model, ids, images, _ = mixed(style)
    model = copy.deepcopy(model).cuda()
    x, split = model._embed(ids.cuda(), images.cuda())
    x = x.detach().requires_grad_()
    model.llama(x, split).sum().backward()  # the libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.llama(x, split).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("style", STYLES)
def test_cuda_equals_cpu(mixed, style):
    model, ids, images, lengths = mixed(style)
    expected, _ = model(ids, images)
    tokens = torch.stack(list(model.generate(ids, images, lengths, max_new_tokens=6, stop=False)))
    there = copy.deepcopy(model).cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        close(there(ids.cuda(), images.cuda())[0].cpu(), expected, 1e-4)
    ours = list(there.generate(ids.cuda(), images.cuda(), lengths.cuda(), max_new_tokens=6, stop=False))
    assert torch.equal(torch.stack(ours).cpu(), tokens)
