"""From words to ids and labels: the released code's where it is right, and the right ones where it is not."""

import json
import shutil
from pathlib import Path

import pytest

from data.text import OWL1_SYSTEM, Tokenizer, encode_raw, expand_images, render_conversation, render_prompt
from model import IGNORE, IMAGE_ID

GOLDEN = Path(__file__).parent / "golden" / "text"
STYLES = ("owl1", "owl2")
MARKS = ("<image>", "<|image|>")
LEGACY = {"legacy": True, "nonlegacy": False}


def read(style: str) -> dict:
    return json.loads((GOLDEN / f"{style}.json").read_text())


def by_name(case: dict) -> str:
    return "-".join(case[key] for key in ("name", "tokenizer") if key in case)


OWL1_PROMPTS = read("owl1")["prompts"]
OWL1_CONVERSATIONS = read("owl1")["conversations"]
OWL2_PROMPTS = read("owl2")["prompts"]
OWL2_CONVERSATIONS = read("owl2")["conversations"]
# What the prompts of owl1.json say, as messages.
OWL1_MESSAGES = {
    "readme": ["<image>Explain why this meme is funny.", None],
    "text_only": ["Write a haiku about snow.", None],
    "two_images": ["<image><image>Compare them.", None],
    "two_turn": ["<image>What is this?", "A cat.", "What colour?", None],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """The golden tokenizer in LlamaTokenizer's two behaviours."""
    made = {}
    for kind, legacy in LEGACY.items():
        folder = tmp_path_factory.mktemp(kind)
        shutil.copyfile(GOLDEN / "tokenizer.model", folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        made[kind] = Tokenizer(folder)
    return made


@pytest.fixture(scope="module")
def tokenizer(tokenizers) -> Tokenizer:
    return tokenizers["legacy"]


def llava(*texts: str) -> list[dict]:
    """Questions and answers in turn, as LLaVA's files have them."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def supervised(ids: list[int], labels: list[int]) -> list[list[int]]:
    """The supervised runs of a sample; also that labels are the ids, or not supervised."""
    assert len(ids) == len(labels)
    runs = [[]]
    for token, label in zip(ids, labels):
        assert label in (token, IGNORE)
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def swap_marks(text: str, mark: str) -> str:
    for other in MARKS:
        text = text.replace(other, "\0")
    return text.replace("\0", mark)


# ----------------------------------------------------------------------------------------------------
# The released code's ids and labels


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("case", OWL2_PROMPTS, ids=by_name)
def test_golden_owl2_prompts(tokenizers, case, kind, mark):
    """From messages, and from the prompt as it is written down."""
    messages = [message and swap_marks(message, mark) for message in case["messages"]]
    assert render_prompt(messages, tokenizers[kind], "owl2") == case[f"ids_{kind}"]
    assert encode_raw(swap_marks(case["prompt"], mark), tokenizers[kind], "owl2") == case[f"ids_{kind}"]


@pytest.mark.parametrize("kind", LEGACY)
def test_a_prompt_that_ends_in_a_space(tokenizers, kind):
    """As the released evaluation scripts write it down: one token more."""
    plain, ids = (render_prompt(["<|image|>Why?", None], tokenizers[kind], "owl2", space) for space in (False, True))
    assert ids == encode_raw("USER: <|image|>Why? ASSISTANT: ", tokenizers[kind], "owl2")
    assert ids[:-1] == plain


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("case", OWL1_PROMPTS, ids=by_name)
def test_golden_owl1_prompts(tokenizers, case, kind, mark):
    """There is no </s> in them, so both behaviours agree."""
    assert encode_raw(swap_marks(case["prompt"], mark), tokenizers[kind], "owl1") == case["ids"]
    messages = [message and swap_marks(message, mark) for message in OWL1_MESSAGES[case["name"]]]
    assert render_prompt(messages, tokenizers[kind], "owl1") == case["ids"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("case", OWL2_CONVERSATIONS, ids=by_name)
def test_golden_owl2_conversations(tokenizers, case, mark):
    turns = [turn | {"value": swap_marks(turn["value"], mark)} for turn in case["conversation"]]
    ids, labels = render_conversation(turns, tokenizers[case["tokenizer"]], "owl2")
    assert ids == case["ids"]
    assert labels == case["labels"]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("case", OWL1_CONVERSATIONS, ids=by_name)
def test_golden_owl1_conversations(tokenizer, case, mark):
    ids, labels = render_conversation(swap_marks(case["text"], mark), tokenizer, "owl1")
    assert ids == case["ids"]
    assert labels == case["labels"]


# ----------------------------------------------------------------------------------------------------
# One conversation, four ways


@pytest.mark.parametrize(
    "turns, text",
    [
        (("<image>\nWhat is it?", "A cat."), "\nHuman: <image>\nHuman: What is it?\nAI: A cat."),
        (("Hi.", "Hello.", "Bye.", "See you."), "\nHuman: Hi.\nAI: Hello.\nHuman: Bye.\nAI: See you."),
        (
            ("<image><image>Compare.", "Alike.", "<|image|>And now?", "No.\nNot at all."),
            "\nHuman: <image>\nHuman: <image>\nHuman: Compare.\nAI: Alike."
            "\nHuman: <image>\nHuman: And now?\nAI: No.\nNot at all.",
        ),
        (("Look at <image> here.", "I do."), "\nHuman: Look at <image> here.\nAI: I do."),
    ],
)
@pytest.mark.parametrize("kind", LEGACY)
def test_lists_and_texts_are_the_same_conversation(tokenizers, turns, text, kind):
    """LLaVA's list in Owl1's style is Owl1's text; and Owl1's text in Owl2's style is LLaVA's list."""
    tokenizer = tokenizers[kind]
    as_text = OWL1_SYSTEM + text
    assert render_conversation(llava(*turns), tokenizer, "owl1") == render_conversation(as_text, tokenizer, "owl1")
    plain = [turn.replace("<image>\n", "<image>") for turn in turns]
    assert render_conversation(as_text, tokenizer, "owl2") == render_conversation(llava(*plain), tokenizer, "owl2")


@pytest.mark.parametrize("kind", LEGACY)
def test_training_sees_what_inference_shows(tokenizers, kind):
    """Owl2: the ids of a conversation begin as the prompt for its last answer does."""
    turns = ["<image>What is it?", "A cat.", "What colour?", "Red </s> and blue."]
    ids, _ = render_conversation(llava(*turns), tokenizers[kind], "owl2")
    prompt = render_prompt([*turns[:3], None], tokenizers[kind], "owl2")
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", LEGACY)
def test_answers_and_their_ends_are_supervised(tokenizers, style, kind):
    """All of each answer with its </s>, and nothing else."""
    answers = ["A small brown dog.", "No.\nIt is not.", "Ça va, 你好"]
    questions = ["<image>\nWhat is in the picture?", "Is it a cat?", "<image> Say hello"]
    turns = [text for pair in zip(questions, answers) for text in pair]
    tokenizer = tokenizers[kind]
    ids, labels = render_conversation(llava(*turns), tokenizer, style)
    runs = supervised(ids, labels)
    assert [tokenizer.decode(run) for run in runs] == answers
    assert all(run[-1] == tokenizer.eos_id and tokenizer.eos_id not in run[:-1] for run in runs)
    assert ids.count(IMAGE_ID) == 2
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id


# ----------------------------------------------------------------------------------------------------
# Where the released code is wrong


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_an_answer_with_an_end_token_in_it_stays_supervised(tokenizers, style, kind, where):
    tokenizer = tokenizers[kind]
    answer = {"start": "</s>ends a row.", "middle": "A row ends with </s> here.", "end": "It is </s>"}[where]
    ids, labels = render_conversation(llava("How does it end?", answer, "Sure?", "Yes."), tokenizer, style)
    runs = supervised(ids, labels)
    assert [tokenizer.decode(run) for run in runs] == [answer, "Yes."]
    assert [run.count(tokenizer.eos_id) for run in runs] == [1, 1], "a typed </s> is letters"


LIKE_A_TURN = ["Why is ASSISTANT: written here?", "Say USER: ASSISTANT: please", "a\nAI: b", "a\nHuman: b\nAI: c"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("question", LIKE_A_TURN)
def test_a_question_that_looks_like_a_turn_stays_a_question(tokenizer, style, question):
    """It gets no supervision, and the answers lose none."""
    ids, labels = render_conversation(llava(question, "Because."), tokenizer, style)
    assert [tokenizer.decode(run) for run in supervised(ids, labels)] == ["Because."]
    plain, _ = render_conversation(llava("Q", "Because."), tokenizer, style)
    assert ids.count(tokenizer.eos_id) == plain.count(tokenizer.eos_id) == 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("answer", ["See ASSISTANT: or USER: there", "a\nHuman: b", "a\nAI: b"])
def test_an_answer_that_looks_like_a_turn_stays_an_answer(tokenizer, style, answer):
    ids, labels = render_conversation(llava("Q", answer), tokenizer, style)
    assert [tokenizer.decode(run) for run in supervised(ids, labels)] == [answer]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", LEGACY)
def test_typed_control_tokens_are_plain_text(tokenizers, style, kind):
    """Whoever types </s> or <s> has typed letters: one <s> in front, no </s>, and the text comes back."""
    tokenizer = tokenizers[kind]
    typed = "Say </s> and <s> and <unk> and <pad> and <0x0A> and [INST]."
    ids = render_prompt([typed, None], tokenizer, style)
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in ids
    assert 0 not in ids
    assert typed in tokenizer.decode(ids)
    after = render_prompt(["Hi.", "Hello.", typed, None], tokenizer, style)
    assert after.count(tokenizer.eos_id) == (1 if style == "owl2" else 0)
    assert typed in tokenizer.decode(after)


def test_a_raw_prompt_has_control_over_its_ends(tokenizers):
    """encode_raw is for programs: there </s> is the token."""
    for kind, tokenizer in tokenizers.items():
        assert encode_raw("a</s>b</s>", tokenizer, "owl2").count(tokenizer.eos_id) == 2
    system = "A chat. USER: <|image|>Hi ASSISTANT: "
    ids = encode_raw(system, tokenizers["legacy"], "owl2")
    assert ids.count(IMAGE_ID) == 1
    assert len(ids) == len(encode_raw(system[:-1], tokenizers["legacy"], "owl2")) + 1


# ----------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("style", STYLES)
def test_images_anywhere(tokenizer, style):
    """At the start, in the middle, at the end, side by side, of both kinds: none is lost, none is added."""
    question = "<image><|image|> one <image>two\n<|image|>"
    ids = render_prompt([question, "Yes.", "<image>", None], tokenizer, style)
    assert ids.count(IMAGE_ID) == 5
    ids, labels = render_conversation(llava(question, "Yes.", "<|image|>", "No."), tokenizer, style)
    assert ids.count(IMAGE_ID) == 5
    assert all(label == IGNORE for token, label in zip(ids, labels) if token == IMAGE_ID)
    for almost in ("<Image>", "<image >", "< image>", "<|image>", "<image|>"):
        assert IMAGE_ID not in render_prompt([almost, None], tokenizer, style)


def test_expand_images():
    ids = [1, IMAGE_ID, IMAGE_ID, 5, IMAGE_ID]
    labels = [IGNORE, IGNORE, IGNORE, 5, IGNORE]
    long_ids, long_labels = expand_images(ids, labels, 3)
    assert long_ids == [1, *[IMAGE_ID] * 6, 5, *[IMAGE_ID] * 3]
    assert long_labels == [IGNORE, *[IGNORE] * 6, 5, *[IGNORE] * 3]
    assert expand_images(ids, None, 2) == ([1, *[IMAGE_ID] * 4, 5, *[IMAGE_ID] * 2], None)
    assert expand_images([1, 2], [IGNORE, 2], 65) == ([1, 2], [IGNORE, 2])
    assert expand_images([], [], 65) == ([], [])
    assert ids == [1, IMAGE_ID, IMAGE_ID, 5, IMAGE_ID], "the caller's list stays"


# ----------------------------------------------------------------------------------------------------
# What is no conversation


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "conversation",
    [
        [],
        None,
        3,
        {},
        {"from": "human", "value": "Hi"},
        [1, 2],
        ["Hi", "Hello"],
        [{"from": "human", "value": "Hi"}],
        [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Hi"}],
        [{"from": "human", "value": "Hi"}, {"from": "human", "value": "Hi"}],
        [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hi"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt"}],
        [{"from": "human", "value": None}, {"from": "gpt", "value": "Hi"}],
        [{"from": "human", "value": 3}, {"from": "gpt", "value": "Hi"}],
        [{"value": "Hi"}, {"from": "gpt", "value": "Hi"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " \n"}],
        [*llava("Hi", "Hello", "And?")],
        [{"from": ["human"], "value": "Hi"}, {"from": "gpt", "value": "Hi"}],
        "",
        "Just some text.",
        OWL1_SYSTEM,
        f"{OWL1_SYSTEM}\nHuman: A question without an answer.",
        f"{OWL1_SYSTEM}\nAI: An answer without a question.",
    ],
    ids=lambda conversation: str(conversation)[:40],
)
def test_malformed_conversations(tokenizer, style, conversation):
    with pytest.raises(ValueError) as caught:
        render_conversation(conversation, tokenizer, style)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


NO_MESSAGES = [
    [],
    [None],
    ["Hi"],
    ["Hi", "Hello"],
    ["Hi", None, "More", None],
    ["Hi", "Hello", None],
    [None, None],
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("messages", NO_MESSAGES)
def test_malformed_messages(tokenizer, style, messages):
    with pytest.raises(ValueError, match="messages"):
        render_prompt(messages, tokenizer, style)


@pytest.mark.parametrize("style", ["owl3", "", None, "OWL2"])
def test_an_unknown_style(tokenizer, style):
    for call in (
        lambda: encode_raw("Hi", tokenizer, style),
        lambda: render_prompt(["Hi", None], tokenizer, style),
        lambda: render_conversation(llava("Hi", "Hello"), tokenizer, style),
    ):
        with pytest.raises(ValueError, match="style"):
            call()


# ----------------------------------------------------------------------------------------------------
# The tokenizer


@pytest.mark.parametrize("text", ["A cat.", "Ça va? Grüße, 你好，世界 🦉", "two  spaces", "a\nb\tc", "</s>", ""])
def test_decode_undoes_encode(tokenizers, text):
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert tokenizer.decode(ids) == text, "control tokens have no text"


def test_decode_passes_over_what_is_no_token(tokenizer):
    ids = tokenizer.encode("A cat.")
    assert tokenizer.decode([IMAGE_ID, IGNORE, *ids, tokenizer.vocab_size, 10**9]) == "A cat."
    assert tokenizer.decode([]) == ""


def test_where_the_tokenizer_is(tmp_path):
    """A folder or the file itself; legacy unless the config beside it says otherwise."""
    shutil.copyfile(GOLDEN / "tokenizer.model", tmp_path / "tokenizer.model")
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.model", str(tmp_path / "tokenizer.model")):
        tokenizer = Tokenizer(path)
        assert tokenizer.legacy
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert tokenizer.vocab_size == tokenizer.pieces.vocab_size()
    for content in ("{}", '{"legacy": null}', '{"legacy": true}', '{"legacy": false}'):
        legacy = "false" not in content
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert Tokenizer(tmp_path).legacy == legacy
        assert Tokenizer(tmp_path / "tokenizer.model").legacy == legacy


def test_tokenizers_that_are_none(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "tokenizer.model"):
        with pytest.raises(FileNotFoundError, match=path.name):
            Tokenizer(path)
    good = (GOLDEN / "tokenizer.model").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for content in (b"", b"hello", b"\0" * 100, good[: len(good) // 2], pointer):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError) as caught:
            Tokenizer(tmp_path)
        assert "tokenizer.model" in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.model").write_bytes(good)
    for content in (b"{", b"", b"\xff\xfe"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            Tokenizer(tmp_path)
