"""Text to ids and labels: as in the released code where it is right, and correct where it is not."""

import json
import shutil

import pytest
from sentencepiece import SentencePieceTrainer

from conftest import GOLDEN
from data.text import OWL1_SYSTEM, Tokenizer, encode_raw, expand_images, render_conversation, render_prompt
from model import IGNORE_INDEX, IMAGE_TOKEN_ID

VARIANTS = ("owl1", "owl2")
PLACEHOLDERS = ("<image>", "<|image|>")
LEGACY = {"legacy": True, "nonlegacy": False}
TEXT = GOLDEN / "text"

OWL1, OWL2 = (json.loads((TEXT / f"{variant}.json").read_text()) for variant in VARIANTS)
PROMPTS = [("owl1", case) for case in OWL1["prompts"]] + [("owl2", case) for case in OWL2["prompts"]]
CONVERSATIONS = [("owl1", case) for case in OWL1["conversations"]] + [("owl2", case) for case in OWL2["conversations"]]
OWL1_MESSAGES = {  # the prompts of owl1.json as messages
    "readme": ["<image>Explain why this meme is funny.", None],
    "text_only": ["Write a haiku about snow.", None],
    "two_images": ["<image><image>Compare them.", None],
    "two_turn": ["<image>What is this?", "A cat.", "What colour?", None],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """The golden tokenizer in LlamaTokenizer's two behaviors."""
    made = {}
    for kind, legacy in LEGACY.items():
        folder = tmp_path_factory.mktemp(kind)
        shutil.copyfile(TEXT / "tokenizer.model", folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        made[kind] = Tokenizer(folder)
    return made


@pytest.fixture(scope="module")
def tokenizer(tokenizers) -> Tokenizer:
    return tokenizers["legacy"]


def llava(*texts: str) -> list[dict]:
    """Alternating questions and answers in LLaVA's format."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def supervised(ids: list[int], labels: list[int]) -> list[list[int]]:
    """The supervised runs of a sample; also checks that labels are the ids, or not supervised."""
    assert len(ids) == len(labels)
    runs = [[]]
    for token, label in zip(ids, labels):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def with_placeholder(text: str, placeholder: str) -> str:
    return text.replace("<|image|>", "<image>").replace("<image>", placeholder)


# --- ids and labels of the released code -------------------------------------------------------------


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("variant, case", PROMPTS)
def test_golden_prompts(tokenizers, variant, case, kind, placeholder):
    """From messages, and from the prompt as written. Owl1's have no </s>, so both tokenizers agree."""
    messages = case["messages"] if variant == "owl2" else OWL1_MESSAGES[case["name"]]
    messages = [message and with_placeholder(message, placeholder) for message in messages]
    expected = case[f"ids_{kind}"] if variant == "owl2" else case["ids"]
    assert render_prompt(messages, tokenizers[kind], variant) == expected
    assert encode_raw(with_placeholder(case["prompt"], placeholder), tokenizers[kind], variant) == expected


@pytest.mark.parametrize("kind", LEGACY)
def test_a_prompt_that_ends_in_a_space(tokenizers, kind):
    """As in the released evaluation scripts: one more token."""
    plain, ids = (render_prompt(["<|image|>Why?", None], tokenizers[kind], "owl2", space) for space in (False, True))
    assert ids == encode_raw("USER: <|image|>Why? ASSISTANT: ", tokenizers[kind], "owl2")
    assert ids[:-1] == plain


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
@pytest.mark.parametrize("variant, case", CONVERSATIONS)
def test_golden_conversations(tokenizers, variant, case, placeholder):
    if variant == "owl1":
        conversation = with_placeholder(case["text"], placeholder)
    else:
        conversation = [turn | {"value": with_placeholder(turn["value"], placeholder)} for turn in case["conversation"]]
    tokenizer = tokenizers[case.get("tokenizer", "legacy")]
    assert render_conversation(conversation, tokenizer, variant) == (case["ids"], case["labels"])


# --- one conversation, four ways ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns, text",
    [
        (("<image>\nWhat is it?", "A cat."), "\nHuman: <image>\nHuman: What is it?\nAI: A cat."),
        (
            ("<image><image>Compare.", "Alike.", "<|image|>And now?", "No.\nNot at all."),
            "\nHuman: <image>\nHuman: <image>\nHuman: Compare.\nAI: Alike."
            "\nHuman: <image>\nHuman: And now?\nAI: No.\nNot at all.",
        ),
        (("Look at <image> here.", "I do."), "\nHuman: Look at <image> here.\nAI: I do."),
    ],
)
def test_llavas_and_owl1s_format_are_the_same_conversation(tokenizer, turns, text):
    as_text = OWL1_SYSTEM + text
    assert render_conversation(llava(*turns), tokenizer, "owl1") == render_conversation(as_text, tokenizer, "owl1")
    plain = [turn.replace("<image>\n", "<image>") for turn in turns]
    assert render_conversation(as_text, tokenizer, "owl2") == render_conversation(llava(*plain), tokenizer, "owl2")


@pytest.mark.parametrize("kind", LEGACY)
def test_training_and_inference_have_the_same_prompt(tokenizers, kind):
    turns = ["<image>What is it?", "A cat.", "What color?", "Red </s> and blue."]
    ids, _ = render_conversation(llava(*turns), tokenizers[kind], "owl2")
    prompt = render_prompt([*turns[:3], None], tokenizers[kind], "owl2")
    assert ids[: len(prompt)] == prompt


# --- where the released code is wrong ----------------------------------------------------------------

LIKE_A_TURN = ["Why is ASSISTANT: written here?", "Say USER: ASSISTANT: please", "a\nHuman: b\nAI: c"]
LIKE_AN_END = ["</s>ends a row.", "A row ends with </s> here.", "It is </s>"]
TRICKY = [(text, "Because.") for text in LIKE_A_TURN] + [("Q", text) for text in LIKE_A_TURN + LIKE_AN_END]
TRICKY += [("<image>\nWhat is in the picture?", "No.\nIt is not."), ("<image> Say hello", "Ça va, 你好")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("question, answer", TRICKY)
def test_answers_and_their_ends_are_supervised(tokenizers, variant, kind, question, answer):
    """Each answer as a whole with its </s>, and nothing else, also where a text looks like a turn or an end."""
    tokenizer = tokenizers[kind]
    ids, labels = render_conversation(llava(question, answer, "Sure?", "Yes."), tokenizer, variant)
    runs = supervised(ids, labels)
    assert [tokenizer.decode(run) for run in runs] == [answer, "Yes."]
    assert [run.count(tokenizer.eos_id) for run in runs] == [1, 1]
    assert (ids[0], ids[-1], runs[0][-1]) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_id)
    assert ids.count(tokenizer.bos_id) == 1 and ids.count(IMAGE_TOKEN_ID) == question.count("<image>")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LEGACY)
def test_typed_control_tokens_are_text(tokenizers, variant, kind):
    """In a raw prompt, </s> is the token."""
    tokenizer = tokenizers[kind]
    typed = "Say </s> and <s> and <unk> and <pad> and <0x0A> and [INST]."
    ids = render_prompt(["Hi.", "Hello.", typed, None], tokenizer, variant)
    assert typed in tokenizer.decode(ids)
    assert ids.count(tokenizer.bos_id) == 1 and 0 not in ids
    assert ids.count(tokenizer.eos_id) == (1 if variant == "owl2" else 0)
    assert encode_raw("a</s>b</s>", tokenizer, variant).count(tokenizer.eos_id) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_anywhere(tokenizer, variant):
    question = "<image><|image|> one <image>two\n<|image|>"
    assert render_prompt([question, "Yes.", "<image>", None], tokenizer, variant).count(IMAGE_TOKEN_ID) == 5
    ids, labels = render_conversation(llava(question, "Yes.", "<|image|>", "No."), tokenizer, variant)
    assert ids.count(IMAGE_TOKEN_ID) == 5
    assert all(label == IGNORE_INDEX for token, label in zip(ids, labels) if token == IMAGE_TOKEN_ID)
    for almost in ("<Image>", "<image >", "<|image>"):
        assert IMAGE_TOKEN_ID not in render_prompt([almost, None], tokenizer, variant)


def test_expand_images():
    ids = [1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 5, IMAGE_TOKEN_ID]
    labels = [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 5, IGNORE_INDEX]
    long_ids = [1, *[IMAGE_TOKEN_ID] * 6, 5, *[IMAGE_TOKEN_ID] * 3]
    assert expand_images(ids, labels, 3) == (long_ids, [IGNORE_INDEX] * 7 + [5] + [IGNORE_INDEX] * 3)
    assert expand_images(ids, None, 3) == (long_ids, None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "conversation",
    [
        [],
        None,
        {"from": "human", "value": "Hi"},
        ["Hi", "Hello"],
        llava("Hi"),
        llava("Hi", "Hello", "And?"),
        llava("Hi", " \n"),
        llava(3, "Hi"),
        llava("Hi", "Hello")[::-1],
        llava("Hi") + llava("Hi"),
        [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hi"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt"}],
        [{"from": ["human"], "value": "Hi"}, {"from": "gpt", "value": "Hi"}],
        "Just some text.",
        OWL1_SYSTEM,
        f"{OWL1_SYSTEM}\nHuman: A question without an answer.",
        f"{OWL1_SYSTEM}\nHuman: A question with an empty answer.\nAI: ",
        f"{OWL1_SYSTEM}\nAI: An answer without a question.",
    ],
    ids=lambda conversation: str(conversation)[:40],
)
def test_malformed_conversations(tokenizer, variant, conversation):
    with pytest.raises(ValueError) as caught:
        render_conversation(conversation, tokenizer, variant)
    assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], [None], ["Hi"], ["Hi", "Yes"], ["Hi", None, "So", None], ["Hi", "Yes", None]])
@pytest.mark.parametrize("variant", VARIANTS)
def test_malformed_messages(tokenizer, messages, variant):
    with pytest.raises(ValueError, match="messages"):
        render_prompt(messages, tokenizer, variant)


# --- the tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["A cat.", "Ça va? Grüße, 你好，世界 🦉", "two  spaces", "a\nb\tc", "</s>", ""])
def test_decode_inverts_encode(tokenizers, text):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text, "control tokens have no text"
        assert tokenizer.decode([IMAGE_TOKEN_ID, IGNORE_INDEX, *ids, tokenizer.vocab_size, 10**9]) == text


def test_a_tokenizer_is_a_folder_or_a_file(tmp_path):
    shutil.copyfile(TEXT / "tokenizer.model", tmp_path / "tokenizer.model")
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.model"):
        tokenizer = Tokenizer(path)
        assert tokenizer.legacy and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for content in ("{}", "\ufeff{}", '{"legacy": null}', '{"legacy": true}', '{"legacy": false}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert Tokenizer(tmp_path / "tokenizer.model").legacy == ("false" not in content)


def test_unreadable_tokenizers(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=path.name):
            Tokenizer(path)
    good = (TEXT / "tokenizer.model").read_bytes()
    for content in (b"", b"hello", b"\0" * 100, good[: len(good) // 2]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model") as caught:
            Tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.model").write_bytes(good)
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            Tokenizer(tmp_path)


def test_text_after_an_end_is_tokenized_as_by_the_released_code(tokenizers):
    """With "legacy": false the first token loses its space; what remains is not merged again."""
    tokenizer = tokenizers["nonlegacy"]
    ids = render_prompt(["<|image|>What is this?", "A cat.", "What colour is it?", None], tokenizer, "owl2")
    assert ids[15:22] == [1956, 2, 88, 1286, 1974, 893, 871]
    assert tokenizer.encode(" USER", after_eos=True) == tokenizer.encode(" USER")
    assert tokenizer.encode("", after_eos=True) == []


@pytest.mark.parametrize("missing", ["--bos_id=-1", "--eos_id=-1"])
def test_a_tokenizer_without_a_start_or_an_end_is_rejected(tmp_path, missing):
    (tmp_path / "text").write_text("a b c d e f g\n" * 10)
    flags = f"--input={tmp_path}/text --model_prefix={tmp_path}/tokenizer --vocab_size=14 --model_type=bpe {missing}"
    SentencePieceTrainer.Train(flags + " --minloglevel=2")
    with pytest.raises(ValueError, match="<s>"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_answer_loses_only_its_turn(tokenizer, variant):
    turns = ("<image>Lost", "", "One?", "1", "Lost", " \n", "Two?", "2", "Lost", "")
    whole = render_conversation(llava("<image>One?", "1", "Two?", "2"), tokenizer, variant)
    assert render_conversation(llava(*turns), tokenizer, variant) == whole
    text = f"{OWL1_SYSTEM}\nHuman: One?\nAI: 1\nHuman: Lost\nAI: \nHuman: Two?\nAI: 2"
    runs = supervised(*render_conversation(text, tokenizer, variant))
    assert [tokenizer.decode(run) for run in runs] == ["1", "2"]
