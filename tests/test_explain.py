"""The numbers of an explanation, each against a slow definition or hooks of the test's own, and --explain."""

import base64
import errno
import inspect
import json
import math
import shutil
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sample
from conftest import GOLDEN, ROOT, assert_close, make_config, make_images, make_owl
from data.image import fit_to_square, load_image
from data.text import Tokenizer, expand_images, render_prompt
from generate import Sampling, generate
from inference import explain as explain_module
from inference.chat import ChatSession, Conversation
from inference.explain import Recorder, count_parameters, explain, pack, rounded, thin_maps, token_text
from inference.quantize import quantize
from model import IMAGE_TOKEN_ID, Owl
from test_sample import TALL, WIDE, run_sample
from training.flops import train_flops

TOKENIZER = Tokenizer(GOLDEN / "text")
LLAMA = {"vocab_size": 2000, "context": 400}  # the tokenizer's; more than Owl1's system prompt


def make_session(model: Owl, turns: list[tuple[str, list[Path]]], n: int = 6) -> ChatSession:
    """A session that has answered questions, each with its images."""
    conversation = Conversation(model.config, TOKENIZER, "crop")
    cache = model.llama.make_cache(1, model.config.llama.context)
    decode = partial(generate, model, min_new_tokens=n)
    session = ChatSession(model, conversation, decode, sampling=Sampling(), max_new_tokens=n, cache=cache)
    for question, paths in turns:
        for path in paths:
            conversation.add_image(path)
        conversation.ask(question)
        list(session.answer())
    assert len(session.answer_ids) == n
    return session


def unpack(array: dict) -> Tensor:
    values = torch.frombuffer(bytearray(base64.b64decode(array["data"])) or bytearray(1), dtype=torch.uint8)
    return (values[: math.prod(array["shape"])] / 255 * array["scale"]).view(array["shape"])


def assert_packed(array: dict, expected: Tensor) -> None:
    """A byte per number rounds by at most half a 255th of the largest, and the scale by a 2000th."""
    assert_close(unpack(array), expected, 0.5 / 255 + 1 / 2000)


@dataclass
class Case:
    """A session, its explanation, and what the test recorded in a pass of its own."""

    session: ChatSession
    data: dict
    row: list[int]  # the tokens that are processed
    logits: Tensor  # [T, vocab_size] float32
    hidden: list[Tensor]  # after each layer of the decoder, [T, n_embd]
    query_probs: Tensor | None  # [N, n_query, n_query + 1 + P]: abstractor, last layer, mean over heads
    probs: Tensor  # [T, T]: decoder, mean over heads and layers
    tolerance: float

    @property
    def n_prompt(self) -> int:
        return len(self.session.conversation.prompt_ids)


def record(session: ChatSession, data: dict, tolerance: float) -> Case:
    """Runs the model with every attention computed in full from its q and k."""
    model, row = session.model, session.conversation.prompt_ids + session.answer_ids[:-1]
    probs, hidden, kernel = [], [], F.scaled_dot_product_attention

    def eager(q, k, v, is_causal=False, **options):
        repeats = q.shape[1] // k.shape[1]
        scores = q.float() @ k.float().repeat_interleave(repeats, 1).transpose(2, 3) / math.sqrt(q.shape[3])
        if is_causal:
            scores += torch.full(scores.shape[2:], -torch.inf).triu(1)
        probs.append(scores.softmax(-1).mean(1))
        return kernel(q, k, v, is_causal=is_causal, **options)

    handles = [
        layer.register_forward_hook(lambda _, __, output: hidden.append(output[0])) for layer in model.llama.layers
    ]
    images = session.conversation.images
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", eager)
        logits, _ = model(torch.tensor([row]), torch.stack(images) if images else None)
    for handle in handles:
        handle.remove()
    n_layer = len(model.llama.layers)
    query_probs, mean_probs = probs[-n_layer - 1] if images else None, sum(probs[-n_layer:])[0] / n_layer
    return Case(session, data, row, logits[0].float(), hidden, query_probs, mean_probs, tolerance)


# name: (variant, changes of the decoder, bits, dtype, questions with images)
CASES = {
    "owl1": ("owl1", {}, None, torch.float32, [("What is it?", [WIDE])]),
    "owl2": ("owl2", {}, None, torch.float32, [("What is it?", [WIDE])]),
    "grouped": ("owl2", {"n_kv_head": 2}, None, torch.float32, [("What is it?", [WIDE])]),
    "two images": ("owl2", {}, None, torch.float32, [("Is <image> like <image>?", [WIDE, TALL])]),
    "no image": ("owl2", {}, None, torch.float32, [("Who are you?", [])]),
    "owl1 no image": ("owl1", {}, None, torch.float32, [("Who are you?", [])]),
    "turns": ("owl2", {}, None, torch.float32, [("What?", [WIDE]), ("And this?", [TALL]), ("Why?", [])]),
    "owl1 turns": ("owl1", {}, None, torch.float32, [("What?", [WIDE]), ("And this?", [TALL])]),
    "int8": ("owl2", {}, 8, torch.float32, [("What is it?", [WIDE])]),
    "int4": ("owl1", {}, 4, torch.bfloat16, [("What is it?", [WIDE])]),
    "bfloat16": ("owl2", {}, None, torch.bfloat16, [("What is it?", [WIDE])]),
}


@cache
def make_case(name: str) -> Case:
    variant, changes, bits, dtype, turns = CASES[name]
    model = make_owl(make_config(variant, llama=LLAMA | changes)).to(dtype)
    if bits is not None:
        quantize(model.llama, bits)
    session = make_session(model, turns)
    data = json.loads(json.dumps(explain(session, "a name"), allow_nan=False))
    return record(session, data, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return make_case(request.param)


# --- the numbers -------------------------------------------------------------------------------------


def test_attention_of_the_answer(case):
    """To positions, as shares, and through the queries to patches."""
    is_image = torch.tensor(case.row) == IMAGE_TOKEN_ID
    config, n_image = case.session.model.config, len(case.session.conversation.images)
    assert len(case.data["answer"]) == len(case.session.answer_ids)
    for i, token in enumerate(case.data["answer"]):
        position = case.n_prompt - 1 + i
        expected = case.probs[position, : position + 1]
        assert token["position"] == position
        assert_packed(token["attention"], expected)

        masks = {"on_image": is_image, "on_answer": torch.arange(len(case.row)) >= case.n_prompt}
        masks["on_prompt"] = ~masks["on_image"] & ~masks["on_answer"]
        for name, mask in masks.items():
            assert abs(token[name] - float(case.probs[position, mask].sum())) < 1e-4
        assert abs(sum(token[name] for name in masks) - 1) < 2e-4

        assert token["image_maps"]["shape"] == [n_image, config.vit.grid_size**2 if n_image else 0]
        if n_image:
            n, P = config.n_query, config.vit.grid_size**2
            expected = torch.zeros(n_image, P)
            for image in range(n_image):
                start = is_image.nonzero()[image * (n + 1)]
                for query in range(n):
                    weight = case.probs[position, start + query]
                    expected[image] += weight * case.query_probs[image, query, n + 1 :]
            assert_packed(token["image_maps"], expected)


def test_attention_of_the_queries(case):
    n_query = case.session.model.config.n_query
    assert len(case.data["queries"]) == len(case.session.conversation.images)
    for image, queries in enumerate(case.data["queries"]):
        probs = case.query_probs[image]
        assert_packed(queries["maps"], probs[:, n_query + 1 :])
        assert_close(queries["on_class"], probs[:, n_query].tolist(), 1e-3)
        assert_close(queries["on_queries"], probs[:, :n_query].sum(1).tolist(), 1e-3)
        total = unpack(queries["maps"]).sum(1) + torch.tensor(queries["on_class"]) + torch.tensor(queries["on_queries"])
        assert_close(total, torch.ones(n_query), 0.05)


def test_probable_tokens(case):
    for token, logits, answer in zip(
        case.data["answer"], case.logits[case.n_prompt - 1 :], case.session.answer_ids, strict=True
    ):
        p, ids = logits.softmax(-1).sort(descending=True)
        assert token["id"] == answer and token["text"] == token_text(answer, TOKENIZER)
        assert_close([top["p"] for top in token["top"]], p[:5].tolist(), 5e-4)
        shown = [top["id"] for top in token["top"]]
        assert torch.equal(logits[shown], logits[ids[:5]]) and len(set(shown)) == 5  # in bfloat16 some are equal
        assert [top["text"] for top in token["top"]] == [token_text(i, TOKENIZER) for i in shown]
        if case.tolerance < 1e-4:  # in bfloat16 generation rounds differently
            assert answer == ids[0]


@torch.no_grad()
def test_logit_lens(case):
    """Each layer's hidden state through final norm and lm_head; the last layer's are the model's logits."""
    llama = case.session.model.llama
    for i, token in enumerate(case.data["answer"]):
        lens = token["lens"]
        assert [entry["layer"] for entry in lens] == list(range(1, len(llama.layers) + 1))
        for entry, hidden in zip(lens, case.hidden):
            logits = llama.lm_head(llama.norm(hidden))[case.n_prompt - 1 + i].float()
            probs = logits.softmax(-1)
            assert abs(entry["p"] - float(probs.max())) < case.tolerance + 1e-4
            assert abs(entry["p"] - float(probs[entry["id"]])) < case.tolerance + 1e-4
            assert abs(entry["p_answer"] - float(probs[token["id"]])) < case.tolerance + 1e-4
            assert entry["text"] == token_text(entry["id"], TOKENIZER)
        assert {key: lens[-1][key] for key in ("id", "text", "p")} == token["top"][0]


def test_tokens(case):
    """Kind and branch of each position, and which query it is."""
    chat, model, tokens = case.session.conversation, case.session.model, case.data["tokens"]
    config = model.config
    assert [token["id"] for token in tokens] == case.row
    assert [token["part"] for token in tokens] == ["prompt"] * case.n_prompt + ["answer"] * 5
    seen = []
    for token in tokens:
        is_image = token["id"] == IMAGE_TOKEN_ID
        assert token["kind"] == ("visual" if is_image else "text")
        assert token["branch"] == (None if config.variant == "owl1" else token["kind"])
        if is_image:
            seen.append((token["image"], token["query"]))
        else:
            assert token["text"] == token_text(token["id"], TOKENIZER) and "image" not in token
    assert seen == [(i, q) for i in range(len(chat.images)) for q in range(config.n_query + 1)]


def test_the_branch_is_the_one_that_is_used(record_calls):
    """Different K projections process what the page shows."""
    case = make_case("two images")
    model = case.session.model
    projection = model.llama.layers[0].self_attn.k_proj
    calls = [record_calls(branch) for branch in projection.multiway]
    explain(case.session, "")
    shown = [token["branch"] for token in case.data["tokens"]]
    assert [len(branch_calls[0][0]) for branch_calls in calls] == [shown.count("text"), shown.count("visual")]


def test_images_are_the_pixels_of_the_model(case):
    config, paths = case.session.model.config.vit, [path for _, paths in dict_turns(case) for path in paths]
    for shown, path in zip(case.data["images"], paths, strict=True):
        assert shown["png"].startswith("data:image/png;base64,")
        image = Image.open(BytesIO(base64.b64decode(shown["png"].partition(",")[2])))
        assert np.array_equal(np.asarray(image), np.asarray(fit_to_square(load_image(path), config.image_size, "crop")))
        assert (shown["size"], shown["patch_size"], shown["grid"]) == (16, 8, [2, 2])


def dict_turns(case: Case) -> list[tuple[str, list[Path]]]:
    return next(CASES[name][4] for name in CASES if make_case(name) is case)


# --- modules -----------------------------------------------------------------------------------------


def test_modules_are_described(case, record_calls):
    """Parameters, shapes, position in the source."""
    model = case.session.model
    calls = {name: record_calls(module) for name, module in model.named_modules()}
    explain(case.session, "")
    variant, changes, *_ = next(CASES[name] for name in CASES if make_case(name) is case)
    plain = make_owl(make_config(variant, llama=LLAMA | changes))  # not quantized
    modules = {module["name"]: module for module in case.data["modules"]}
    for name, shown in modules.items():
        name = "" if name == "model" else name
        module = model.get_submodule(name)
        assert shown["parameters"] == sum(p.numel() for p in plain.get_submodule(name).parameters()), name
        assert shown["cls"] == type(module).__name__
        path = ROOT / shown["file"]
        path = path if path.exists() else Path(torch.__file__).parents[1] / shown["file"]
        assert path.read_text().splitlines()[shown["line"] - 1].startswith(f"class {shown['cls']}(")
        if calls[name]:
            x, y = calls[name][0]
            assert shown["input"] == list(x.shape) and shown["ms"] > 0
            assert shown["output"] == list((y[0] if isinstance(y, tuple) else y).shape)
        else:
            assert (shown["input"], shown["output"], shown["flops"], shown["ms"]) == (None, None, 0, None)
        parent = name.rpartition(".")[0]
        depth = modules[parent or "model"]["depth"] + 1 if parent in modules or not parent else None
        assert depth is None or shown["depth"] == (0 if name == "" else depth)

    # All modules are shown, but one of each stack of equal layers.
    assert modules["model"]["parameters"] == case.data["model"]["parameters"]
    assert modules["vit.blocks.0"]["copies"] == len(model.vit.blocks) == 2 and "vit.blocks.1" not in modules
    parts = (modules[f"vit.{name}"] for name in ("patch_embed", "pre_norm", "blocks.0", "post_norm"))
    total = sum(module["copies"] * module["parameters"] for module in parts)
    own = model.vit.cls_token.numel() + model.vit.position_embedding.numel()
    assert total + own == modules["vit"]["parameters"]


def test_layers_of_the_vision_encoder(record_calls):
    case = make_case("two images")
    vit = case.session.model.vit
    layers = [vit.patch_embed, vit.pre_norm, *vit.blocks, vit.post_norm]
    outputs = [record_calls(layer) for layer in layers]
    explain(case.session, "")
    for shown, calls in zip(case.data["vision"], outputs, strict=True):
        expected = calls[0][1][0]  # of the first image
        assert shown["shape"] == list((expected.flatten(1).T if expected.dim() == 3 else expected).shape)
        assert shown["ms"] > 0
    assert make_case("no image").data["vision"] == []


def test_flops_of_the_pass(case):
    """By the formula of training/flops.py with nothing trained, and by hand for single modules."""
    model, config = case.session.model, case.session.model.config
    n_image, T = len(case.session.conversation.images), len(case.row)
    flops = {module["name"]: module["flops"] for module in case.data["modules"]}
    assert flops["llama.lm_head"] == 2 * T * 32 * 2000
    assert flops["llama.layers.0.self_attn.q_proj"] == 2 * T * 32 * 32
    assert flops["vit.patch_embed"] == n_image * 4 * 2 * 3 * 8 * 8 * 16
    n_kv = 32 * config.llama.n_kv_head // 4
    attention = 2 * (T * (T + 1) // 2) * 2 * 32  # two products
    assert flops["llama.layers.0.self_attn"] == 2 * T * 32 * (32 + n_kv + n_kv + 32) + attention
    if config.variant == "owl2":
        branches = [flops[f"llama.layers.0.self_attn.k_proj.multiway.{i}"] for i in range(2)]
        n_visual = n_image * config.n_visual_tokens
        assert branches == [2 * (T - n_visual) * 32 * n_kv, 2 * n_visual * 32 * n_kv]
    plain = make_owl(make_config(config.variant, llama={**LLAMA, "n_kv_head": config.llama.n_kv_head}))
    assert flops["model"] == train_flops(plain.requires_grad_(False), n_image, [T], T)


@pytest.mark.parametrize("name", ["owl1", "grouped", "two images", "no image"])
def test_flops_equal_torchs_counter(name):
    """torch counts the whole square of causal attention, and only that of the unfused implementation on a CPU."""
    case = make_case(name)
    model = case.session.model.requires_grad_(False)
    images = case.session.conversation.images
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.tensor([case.row]), torch.stack(images) if images else None)
    model.requires_grad_(True)
    T, counts = len(case.row), counter.get_flop_counts()
    hidden_pairs = (T * T - T * (T + 1) // 2) * 2 * 2 * 32  # of one layer
    for module in case.data["modules"]:
        path = "Owl" if module["name"] == "model" else f"Owl.{module['name']}"
        n_layer = {"model": 2, "llama": 2, "llama.layers.0": 1, "llama.layers.0.self_attn": 1}.get(module["name"], 0)
        assert module["flops"] + n_layer * hidden_pairs == sum(counts.get(path, {}).values()), path


def test_times_are_plausible(monkeypatch):
    """A module takes at least as long as what it calls, and the recorder's own work is not counted."""
    case = make_case("owl2")
    slow = explain_module.attention_probs

    def sleep(*args):
        explain_module.time.sleep(0.2)
        return slow(*args)

    monkeypatch.setattr(explain_module, "attention_probs", sleep)
    data = explain(case.session, "")
    ms = {module["name"]: module["ms"] for module in data["modules"]}
    assert ms["model"] < 200  # with the sleep it would be 800
    assert ms["model"] >= 0.999 * (ms["vit"] + ms["abstractor"] + ms["llama"] + ms["llama.lm_head"])
    for parent, children in {"vit.blocks.0": ("attn", "mlp"), "llama.layers.0": ("self_attn", "mlp")}.items():
        assert ms[parent] >= 0.999 * sum(ms[f"{parent}.{child}"] for child in children)


def test_description_of_a_model():
    data = make_case("owl2").data["model"]
    assert data["name"] == "a name" and (data["variant"], data["dtype"], data["device"]) == ("owl2", "float32", "cpu")
    data = make_case("int4").data["model"]
    assert "bfloat16" in data["dtype"] and "4 bits" in data["dtype"]
    assert data["parameters"] == make_case("owl1").data["model"]["parameters"]
    assert explain(make_case("owl2").session, "a\x1b[2J\nb\udcff")["model"]["name"] == "a\\x1b[2J b\\udcff"


# --- limits and special cases ------------------------------------------------------------------------


def make_large_session(n_image: int, n_answer: int, noise: bool = False) -> ChatSession:
    """64 queries, 1,024 patches of an image of 448 pixels, and an answer of any length."""
    sizes = ({"image_size": 448, "patch_size": 14, "n_layer": 1}, {"n_query": 64}, {**LLAMA, "context": 8000})
    sizes[2]["n_layer"] = 24
    model = make_owl(make_config("owl2", *sizes))
    generator = torch.Generator().manual_seed(0)
    pixels = make_images(model.config, n_image, generator)
    if not noise and n_image:
        pixels = F.interpolate(pixels[:, :, ::56, ::56], size=448, mode="bilinear")
    session = make_session(model, [("What?", [])], 1)
    ids = render_prompt(["<image>" * n_image + "What?", None], TOKENIZER, "owl2")
    session.conversation.prompt_ids, _ = expand_images(ids, None, 65)
    images = [] if pixels is None else pixels
    session.conversation.images = list(images)
    session.answer_ids = torch.randint(3, 2000, (n_answer,), generator=generator).tolist()
    return session


LARGE = [(1, 512, False), (4, 512, False), (1, 600, True), (24, 512, True), (0, 4000, False)]


@pytest.mark.parametrize("n_image, n_answer, noise", LARGE)
def test_a_large_explanation_stays_small(n_image, n_answer, noise):
    session = make_large_session(n_image, n_answer, noise)
    data = explain(session, "")
    text = json.dumps(data, allow_nan=False)
    assert len(text) < 2_500_000, {key: len(json.dumps(value)) for key, value in data.items()}
    assert len(data["answer"]) == min(n_answer, 512)
    for token in data["answer"]:
        for array, full in ((token["attention"], [token["position"] + 1]), (token["image_maps"], [n_image, 32])):
            n_cell = math.ceil(full[-1] / array["per_cell"])
            assert array["shape"] == ([n_cell] if len(full) == 1 else [n_image, n_cell**2 if n_image else 0])
        assert token["lens"][-1]["layer"] == 24
    notes, last = " ".join(data["notes"]), data["answer"][-1]
    assert ("logit lens has one of" in notes) == (len(last["lens"]) < 24)
    assert ("maps of the answer" in notes) == (last["image_maps"]["per_cell"] > 1) == (n_image > 1)
    assert ("maps of the queries" in notes) == any(image["maps"]["per_cell"] > 1 for image in data["queries"])
    assert ("neighboring positions" in notes) == (last["attention"]["per_cell"] > 1)
    assert ("answer's" in notes) == (n_answer > 512)
    assert ("JPEG" in notes) == any("jpeg" in image["png"][:16] for image in data["images"])
    for image in data["images"]:
        assert len(image["png"]) < 300_000 and image["grid"] == [32, 32] and image["size"] == 448
        assert Image.open(BytesIO(base64.b64decode(image["png"].partition(",")[2]))).width <= 448


def test_cells_are_means():
    maps = torch.rand(2, 3, 25, generator=torch.Generator().manual_seed(0))
    cells = thin_maps(maps, 2).view(2, 3, 3, 3)  # a grid of 5 x 5
    squares = maps.view(2, 3, 5, 5)
    for row in range(3):
        for column in range(3):
            square = squares[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # cut at the edge
            assert_close(cells[:, :, row, column], square.mean(dim=(2, 3)), 1e-6)
    assert torch.equal(thin_maps(maps, 1), maps)


def test_thinned_attention(monkeypatch):
    case = make_case("owl2")
    monkeypatch.setattr(explain_module, "MAX_ATTENTION", 60)
    monkeypatch.setattr(explain_module, "MAX_LENS", 6)
    data = explain(case.session, "")
    size = data["answer"][0]["attention"]["per_cell"]
    assert size > 1 and len([note for note in data["notes"] if "To save space" in note]) == 2
    for token in data["answer"]:
        probs = case.probs[token["position"], : token["position"] + 1]
        assert_packed(token["attention"], torch.stack([part.mean() for part in probs.split(size)]))
        assert [entry["layer"] for entry in token["lens"]] == [2]


def test_packed_numbers():
    for numbers in (torch.rand(5, 7), torch.rand(9) * 1e-6, torch.zeros(3), torch.zeros(0), torch.ones(1)):
        array = pack(numbers)
        assert array["shape"] == list(numbers.shape) and array["per_cell"] == 1
        if numbers.numel():
            assert_packed(array, numbers)
    assert rounded(0.123456) == 0.1235 and rounded(0) == 0 and rounded(torch.tensor(1.23456e-9)) == 1.235e-9


def test_memory_of_a_recording():
    """Nothing of the size of all positions, or of all heads, stays."""
    session = make_large_session(2, 4)
    ids = session.conversation.prompt_ids
    with torch.inference_mode():
        recorder = Recorder(session.model, ids, session.answer_ids)
        recorder.run(torch.stack(session.conversation.images))
    T = len(ids) + 3
    assert recorder.attention.shape == (4, T) and recorder.query_attention.shape == (2, 64, 64 + 1025)
    for hidden in recorder.hidden:
        assert hidden.untyped_storage().nbytes() == 4 * 32 * 4
    kept = [value for value in vars(recorder).values() if isinstance(value, Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) < 4 * (T * 2000 + 4 * T + 2 * 64 * 1089 + 1)


def test_text_of_tokens():
    texts = [token_text(token, TOKENIZER) for token in range(TOKENIZER.vocab_size)]
    assert all(text.isprintable() for text in texts) and all(texts)
    processor = TOKENIZER.processor
    assert texts[TOKENIZER.bos_id] == "<s>" and texts[TOKENIZER.eos_id] == "</s>"
    assert texts[processor.piece_to_id("<0x0A>")] == "\\n" and texts[processor.piece_to_id("<0xE2>")] == "<0xE2>"
    assert texts[processor.piece_to_id("<0x1B>")] == "\\x1b" and texts[processor.piece_to_id("<0x41>")] == "A"
    sentence = "What is this?"
    assert "".join(texts[token] for token in TOKENIZER.encode(sentence)) == " " + sentence
    assert token_text(TOKENIZER.vocab_size, TOKENIZER) == f"<{TOKENIZER.vocab_size}>"


def test_a_vocabulary_larger_than_the_tokenizers():
    model = make_owl(make_config("owl2", llama=LLAMA | {"vocab_size": 2100}))
    model.llama.lm_head.weight.data[2050] = 100 * model.llama.norm.weight.data  # so that it is probable somewhere
    data = explain(make_session(model, [("What?", [WIDE])]), "")
    assert "<2050>" in json.dumps(data)


def test_an_answer_without_tokens():
    case = make_case("two images")
    session = ChatSession(case.session.model, case.session.conversation, None, Sampling(), 6, case.session.cache)
    data = explain(session, "")
    assert data["answer"] == [] and len(data["queries"]) == 2
    assert [token["id"] for token in data["tokens"]] == session.conversation.prompt_ids


def test_a_sampled_answer_is_noted():
    session = make_session(make_case("owl2").session.model, [("What?", [])])
    n_note = len(explain(session, "")["notes"])
    session.sampling = Sampling(temperature=1.0)
    notes = explain(session, "")["notes"]
    assert len(notes) == n_note + 1 and "sampled" in notes[-1]


def test_the_model_is_as_before():
    """No hook stays, also after an error, and the outputs do not change."""
    model = make_owl(make_config("owl2", llama=LLAMA))
    session = make_session(model, [("What?", [WIDE])])
    row, pixels = torch.tensor([session.conversation.prompt_ids]), session.conversation.images[0][None]
    before = model(row, pixels)[0]
    explain(session, "")
    assert torch.equal(before, model(row, pixels)[0])
    model.llama.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj.weight"):
        explain(session, "")
    model.llama.norm.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        explain(session, "")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_weights_are_counted_once():
    module = make_owl(make_config("owl2"))
    n = count_parameters(module)
    quantize(module.llama, 4)
    assert count_parameters(module) == n == sum(p.numel() for p in make_owl(make_config("owl2")).parameters())


def test_lines_of_the_source_are_this_projects():
    modules = {module["name"]: module for module in make_case("owl2").data["modules"]}
    assert modules["model"]["file"] == "model.py" and modules["vit.blocks.0"]["file"] == "vit.py"
    assert modules["vit.blocks.0.mlp.fc1"]["file"] == "torch/nn/modules/linear.py"
    assert modules["model"]["line"] == inspect.getsourcelines(Owl)[1]


# --- sample.py --explain -----------------------------------------------------------------------------


@pytest.mark.parametrize("images", [(), (WIDE,), (WIDE, TALL)])
def test_sample_writes_a_page(tmp_path, capsys, images):
    path = tmp_path / "page.HTML"
    question = ("--device", "cpu", "--prompt", "What </script> is it?", *(f"--image={image}" for image in images))
    _, plain, _ = run_sample(capsys, *question)
    for _ in range(2):  # the second replaces the page of the first
        code, stdout, stderr = run_sample(capsys, *question, "--explain", path)
        assert code == 0 and stdout == plain and str(path) in stderr, stderr
    content = path.read_bytes()
    assert sample.EXPLAIN_MARK in content[:1000] and len(content) < 3_000_000
    assert list(tmp_path.iterdir()) == [path]
    assert str(ROOT).encode() not in content  # a page that is sent to others does not name the user's folders


def test_sample_explains_its_answer(tmp_path, capsys, monkeypatch):
    import inference.explain_page

    written = []
    monkeypatch.setattr(inference.explain_page, "write_page", lambda *args: written.append(args))
    arguments = ("--image", WIDE, "--image", TALL, "--prompt", "Is <image> red?", "--fit", "crop", "--device", "cpu")
    _, stdout, _ = run_sample(capsys, *arguments, "--explain", tmp_path / "a.html")
    ((data, path),) = written
    assert path == tmp_path / "a.html" and data["model"]["name"] == sample.TINY_FOLDER.name
    tokenizer = Tokenizer(sample.TINY_FOLDER)
    assert tokenizer.decode([token["id"] for token in data["answer"]]) + "\n" == stdout
    # The placeholder stands for the first image, and the other comes first.
    for shown, file in zip(data["images"], (TALL, WIDE), strict=True):
        image = Image.open(BytesIO(base64.b64decode(shown["png"].partition(",")[2])))
        assert np.array_equal(np.asarray(image), np.asarray(fit_to_square(load_image(file), shown["size"], "crop")))


def test_a_name_that_is_too_long_is_an_error_after_the_answer(tmp_path, capsys):
    arguments = ("--image", WIDE, "--prompt", "What?", "--explain", tmp_path / ("a" * 300 + ".html"))
    code, stdout, stderr = run_sample(capsys, "--device", "cpu", *arguments)
    assert code == 2 and stdout != "" and "Traceback" not in stderr


@pytest.mark.parametrize(
    "keyword, arguments, name",
    [
        ("--prompt", "--image photo.png", "a.html"),
        ("folder", "--prompt What?", "none/a.html"),
        ("folder", "--prompt What?", "folder.html"),
        ("overwritten", "--prompt What?", "./other.html"),
        ("overwritten", "--prompt What?", "link.html"),
        ("overwritten", "--prompt What?", "dangling.html"),
        *((".html", "--prompt What?", name) for name in ("photo.png", "a.htm", "a", ".html")),
    ],
)
def test_invalid_flags_are_reported_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, keyword, arguments, name):
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    shutil.copy(WIDE, "photo.png")
    other = b"<html>" + b" " * 2000 + sample.EXPLAIN_MARK  # such as a page about this flag
    Path("other.html").write_bytes(other)
    Path("link.html").symlink_to("other.html")
    Path("dangling.html").symlink_to("none.html")
    arguments = ("--weights", "/not/a/folder", *arguments.split(), "--explain", name)
    code, stdout, stderr = run_sample(capsys, "--device", "cpu", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and keyword in stderr
    assert Path("other.html").read_bytes() == other and Path("link.html").is_symlink()


def test_a_full_disk_keeps_the_old_page(tmp_path, capsys, monkeypatch):
    path = tmp_path / "page.html"
    old = b"<!doctype html>" + sample.EXPLAIN_MARK
    path.write_bytes(old)

    def write(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(Path, "write_bytes", write)
    arguments = ("--image", WIDE, "--prompt", "What?", "--explain", path)
    code, _, stderr = run_sample(capsys, "--device", "cpu", *arguments)
    assert code == 2 and "No space left" in stderr and "Traceback" not in stderr
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
