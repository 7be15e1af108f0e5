"""From data files and tar shards to batches: what becomes a sample, what is skipped and why."""

import io
import json
import os
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image

from conftest import GOLDEN
from data.check import check, marked
from data.conversations import (
    CAPTION_REQUEST,
    Conversations,
    Sample,
    Skipped,
    collate,
    is_shards,
    merge_by_image,
    read_rows,
)
from data.image import load_image, to_pixels
from data.mix import Mixture
from data.text import OWL1_SYSTEM, Tokenizer
from model import IGNORE, IMAGE_ID

STYLES = ("owl1", "owl2")
WORDS = 4  # positions an image takes
SIZE = 28
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(GOLDEN / "text")


@pytest.fixture
def folder(tmp_path):
    """A folder with three one-coloured pictures, and a photo of many colours."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIZE, SIZE), colour).save(tmp_path / f"{name}.png")
    noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    return tmp_path


@pytest.fixture
def open_data(folder, tokenizer):
    """open_data(rows, style="owl2", ...) -> Conversations over these rows, written to a file first."""

    def make(rows, style="owl2", name="data.json", max_length=200, crop_scale=None, merge=False):
        path = folder / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(rows), encoding="utf-8")
        return Conversations(
            path, tokenizer, style, WORDS, SIZE, max_length, "stretch", crop_scale=crop_scale, merge=merge
        )

    return make


@pytest.fixture
def open_tar(folder, tokenizer):
    """open_tar(samples, ...) -> Conversations over a shard of these samples, {extension: content} each."""

    def make(samples, style="owl2", crop_scale=None, max_length=200):
        write_tar(folder / "00000.tar", samples)
        return Conversations(
            folder / "00000.tar", tokenizer, style, WORDS, SIZE, max_length, "stretch", crop_scale=crop_scale
        )

    return make


def write_tar(path, samples):
    """A shard as img2dataset writes it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{number:09}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def talk(*turns: str) -> list[dict]:
    """Questions and answers in turn, as LLaVA writes them."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def supervised(sample: Sample) -> list[int]:
    return [label for label in sample.labels if label != IGNORE]


def answers(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """The ids that should be supervised: each answer and its </s>."""
    return [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]


def mean_colour(pixels: torch.Tensor) -> list[float]:
    return pixels.mean(dim=(1, 2)).tolist()


# ----------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("style", STYLES)
def test_the_three_file_formats_give_one_and_the_same_sample(open_data, style):
    """LLaVA's JSON, the same as a line of jsonl, and (where the words are equal) Owl1's text."""
    row = {"id": 7, "image": "red.png", "conversations": talk("<image>What is it?", "red", "And?", "a square")}
    text = f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: What is it?\nAI: red\nHuman: And?\nAI: a square"
    samples = [
        open_data([row], style)[0, 0],
        open_data([row], style, "data.jsonl")[0, 0],
        open_data([{"image": ["red.png"], "text": text}], style, "owl1.jsonl")[0, 0],
    ]
    for sample in samples:
        assert isinstance(sample, Sample)
        assert sample.images.shape == (1, 3, SIZE, SIZE)
        torch.testing.assert_close(sample.images, samples[0].images, rtol=0, atol=0)
    assert samples[0].ids == samples[1].ids and samples[0].labels == samples[1].labels
    if style == "owl1":
        assert samples[2].ids == samples[0].ids
    assert supervised(samples[2]) == supervised(samples[0])


@pytest.mark.parametrize("style", STYLES)
def test_labels_lie_exactly_on_the_answers_and_their_ends(open_data, tokenizer, style):
    sample = open_data([{"image": "red.png", "conversations": talk("<image>What?", "A cat.", "Sure?", "Yes.")}], style)[0, 0]
    assert supervised(sample) == answers(tokenizer, "A cat.", "Yes.")
    for token, label in zip(sample.ids, sample.labels):
        assert label in (IGNORE, token)
    assert sample.ids[0] == tokenizer.bos_id
    assert sample.ids.count(tokenizer.eos_id) == 2
    assert sample.n_cut == 0


@pytest.mark.parametrize("style", STYLES)
def test_text_only_rows_have_no_image(open_data, style):
    rows = [{"conversations": talk("a", "b")}, {"image": None, "conversations": talk("a", "b")}, {"image": [], "conversations": talk("a", "b")}]
    data = open_data(rows, style)
    for index in range(3):
        sample = data[0, index]
        assert sample.images.shape == (0, 3, SIZE, SIZE)
        assert IMAGE_ID not in sample.ids
    assert data[0, 0].ids == data[0, 1].ids == data[0, 2].ids


@pytest.mark.parametrize("style", STYLES)
def test_several_images_keep_their_order_and_both_marks_count(open_data, style):
    """Two images in a question, a third in a later one, marked in both ways; equal to the other mark everywhere."""
    paths = ["red.png", "green.png", "blue.png"]
    row = {"image": paths, "conversations": talk("<image><|image|>Which?", "both", "<|image|>This?", "no")}
    other = json.loads(json.dumps(row).replace("<|image|>", "<image>"))
    sample, twin = (open_data([r], style)[0, 0] for r in (row, other))
    assert sample.ids == twin.ids
    assert sample.ids.count(IMAGE_ID) == 3 * WORDS
    brightest = [mean_colour(image).index(max(mean_colour(image))) for image in sample.images]
    assert brightest == [0, 1, 2]


def test_windows_line_ends_blank_lines_and_odd_line_separators_do_not_break_a_jsonl(folder, open_data):
    """U+2028 and U+0085 end lines for str.splitlines, but not in JSON."""
    row = {"conversations": talk("a\u2028b", "c\x85d")}
    line = json.dumps(row, ensure_ascii=False)
    (folder / "odd.jsonl").write_text(f"{line}\r\n\r\n{line}\n", encoding="utf-8")
    assert read_rows(folder / "odd.jsonl") == [row, row]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "not valid JSON"),
        ("[]", "at least one"),
        ("{}", "a list"),
        ('[{"a": 1}', "not valid JSON"),
        (b"\xff\xfe[", "not valid JSON"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_that_is_no_data_file_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=reason) as error:
        read_rows(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_rows(tmp_path / "nowhere.json")


# ----------------------------------------------------------------------------------------------------
# The length limit


@pytest.mark.parametrize("style", STYLES)
def test_cut_between_turns_at_every_limit(open_data, tokenizer, style):
    """At each length limit: as many whole turns as fit, each image whole, and no image of a turn left out."""
    paths = ["red.png", "green.png", "blue.png"]
    talks = ["<image>What is it?", "a red square", "<image><image>And these?", "two more", "Sure?", "Yes, I am."]
    row = {"image": paths, "conversations": talk(*talks)}
    whole = [open_data([{"image": paths[:n], "conversations": talk(*talks[: 2 * k])}], style)[0, 0] for k, n in ((1, 1), (2, 3), (3, 3))]
    lengths = [len(sample.ids) for sample in whole]
    seen = set()
    for limit in range(lengths[0] - 1, lengths[2] + 2):
        sample = open_data([row], style, max_length=limit)[0, 0]
        fits = sum(length <= limit for length in lengths)
        seen.add(fits)
        if fits == 0:
            assert isinstance(sample, Skipped) and sample.kind == "too long"
            continue
        assert len(sample.ids) <= limit
        assert sample.ids == whole[fits - 1].ids and sample.labels == whole[fits - 1].labels
        assert sample.n_cut == 3 - fits
        torch.testing.assert_close(sample.images, whole[fits - 1].images, rtol=0, atol=0)
        assert sample.ids[-1] == tokenizer.eos_id
    assert seen == {0, 1, 2, 3}


def test_a_missing_image_of_a_turn_that_is_cut_off_does_not_matter(open_data):
    row = {"image": ["red.png", "gone.png"], "conversations": talk("<image>a", "b", "<image>c", "d")}
    assert open_data([row], max_length=200)[0, 0].kind == "missing image"
    short = len(open_data([{"image": "red.png", "conversations": talk("<image>a", "b")}])[0, 0].ids)
    sample = open_data([row], max_length=short)[0, 0]
    assert isinstance(sample, Sample) and len(sample.images) == 1


# ----------------------------------------------------------------------------------------------------
# What cannot be used

QUESTION = "<image>What?"
BAD_ROWS = {
    "missing image": ({"image": "gone.png", "conversations": talk(QUESTION, "a")}, "missing image", "gone.png"),
    "an image that is a folder": ({"image": "", "conversations": talk(QUESTION, "a")}, "missing image", ""),
    "unreadable image": ({"image": "broken.png", "conversations": talk(QUESTION, "a")}, "unreadable image", "broken.png"),
    "absolute path": ({"image": "/etc/passwd", "conversations": talk(QUESTION, "a")}, "image outside its folder", "/etc/passwd"),
    "path above": ({"image": "x/../../red.png", "conversations": talk(QUESTION, "a")}, "image outside its folder", "x/../../red.png"),
    "path too long": ({"image": "a" * 300, "conversations": talk(QUESTION, "a")}, None, "aaa"),
    "fewer images than marks": ({"image": "red.png", "conversations": talk("<image><image>?", "a")}, "malformed row", "marks 2 images and has 1"),
    "more images than marks": ({"image": "red.png", "conversations": talk("What?", "a")}, "malformed row", "marks 0 images and has 1"),
    "half a character in a path": ({"image": "\ud83d.png", "conversations": talk(QUESTION, "a")}, None, "\\ud83d"),
    "a line break in a path": ({"image": "a\nb.png", "conversations": talk(QUESTION, "a")}, "missing image", "a b.png"),
    "a whole image for a path": ({"image": "a" * 10**5, "conversations": talk(QUESTION, "a")}, None, "aaa"),
    "no image at all": ({"conversations": talk(QUESTION, "a")}, "malformed row", "marks 1 images and has 0"),
    "image is a number": ({"image": 3, "conversations": talk(QUESTION, "a")}, "malformed row", "image"),
    "image list with a number": ({"image": ["red.png", 3], "conversations": talk(QUESTION, "a")}, "malformed row", "image"),
    "no conversation": ({"image": "red.png"}, "malformed row", "conversation"),
    "empty conversation": ({"conversations": []}, "malformed row", "conversation"),
    "conversation is a number": ({"conversations": 5}, "malformed row", "conversation"),
    "two questions": ({"conversations": [talk("a")[0], talk("b")[0]]}, "malformed row", "turn 1"),
    "answer first": ({"conversations": talk("a", "b")[::-1]}, "malformed row", "turn 0"),
    "no answer": ({"conversations": talk("a", "b", "c")}, "malformed row", "answer"),
    "turn is a string": ({"conversations": ["a", "b"]}, "malformed row", "turn 0"),
    "value is a number": ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]}, "malformed row", "turn 0"),
    "unknown speaker": ({"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "a"}]}, "malformed row", "turn 0"),
    "empty answer": ({"conversations": talk("a", " \n")}, "malformed row", "empty answer"),
    "half a character": ({"conversations": talk("a", "\ud83d")}, "malformed row", ""),
    "Owl1 text without an answer": ({"text": f"{OWL1_SYSTEM}\nHuman: hi"}, "malformed row", "answer"),
    "Owl1 text with an empty answer": ({"text": f"{OWL1_SYSTEM}\nHuman: hi\nAI: "}, "malformed row", "answer"),
    "Owl1 text that is none": ({"text": "hello"}, "malformed row", "conversation"),
    "a list": ([], "malformed row", "object"),
    "a string": ("hello", "malformed row", ""),
    "nothing": (None, "malformed row", "object"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_skipped_by_name(open_data, folder, style, case):
    """Its kind is counted, its reason is one sentence that names the row; its neighbours are untouched."""
    row, kind, words = BAD_ROWS[case]
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:200])
    if isinstance(row, dict):
        row = {"id": "the-bad-one", **row}
    good = {"conversations": talk("a", "b")}
    data = open_data([good, row, good], style)
    skipped = data[0, 1]
    assert isinstance(skipped, Skipped)
    assert kind is None or skipped.kind == kind
    assert skipped.reason.startswith(f"{folder / 'data.json'}, row 1")
    assert words in skipped.reason and "\n" not in skipped.reason
    assert skipped.reason.encode() and len(skipped.reason) < 600
    if isinstance(row, dict):
        assert "the-bad-one" in skipped.reason
    assert isinstance(data[0, 0], Sample) and isinstance(data[0, 2], Sample)


def test_a_broken_line_is_skipped_with_its_number(folder, tokenizer):
    good = json.dumps({"conversations": talk("a", "b")})
    bad = [good[:-5], '{"id": ' + "9" * 5000 + "}", "[" * 100_000]  # cut, a number too long to read, too deep
    (folder / "lines.jsonl").write_text("\n".join([good, "", *bad, good]))
    data = Conversations(folder / "lines.jsonl", tokenizer, "owl2", WORDS, SIZE, 200, "stretch")
    assert len(data) == 5
    for index in (1, 2, 3):
        skipped = data[0, index]
        assert skipped.kind == "malformed row"
        assert f"row {index}" in skipped.reason and f"line {index + 2}" in skipped.reason
    assert isinstance(data[0, 4], Sample)


# ----------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("style", STYLES)
def test_collate_packs_the_samples_one_after_the_other_and_counts(open_data, style):
    rows = [
        {"conversations": talk("a", "b")},
        {"image": "gone.png", "conversations": talk("<image>x", "y")},
        {"image": ["red.png", "blue.png"], "conversations": talk("<image><image>What are they?", "two squares")},
        {"image": "green.png", "conversations": talk("<image>x", "y", "z", "w")},
    ]
    data = open_data(rows, style)
    samples = [data[0, index] for index in range(4)]
    batch = collate(samples)
    used = [samples[0], samples[2], samples[3]]
    lengths = [len(sample.ids) for sample in used]
    assert batch.ids.shape == batch.labels.shape == (1, sum(lengths))
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert batch.starts.dtype == torch.int32
    assert batch.starts.tolist() == [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]
    assert batch.longest == max(lengths)
    for start, end, sample in zip(batch.starts, batch.starts[1:], used):
        assert batch.ids[0, start:end].tolist() == sample.ids
        assert batch.labels[0, start:end].tolist() == [IGNORE, *sample.labels[1:]]
    torch.testing.assert_close(batch.images, torch.cat([samples[2].images, samples[3].images]), rtol=0, atol=0)
    assert batch.n_sample == 3
    assert batch.n_supervised == int((batch.labels[:, 1:] != IGNORE).sum()) > 0
    assert batch.n_token == sum(lengths)
    assert batch.skipped == [samples[1]]


def test_no_sample_is_asked_to_foresee_the_next():
    """Even if a sample's own first label were supervised: nothing of its own comes before it."""
    samples = [Sample([5, 6, 7], [5, IGNORE, 7], torch.empty(0, 3, SIZE, SIZE)) for _ in range(3)]
    batch = collate(samples)
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 7] * 3]
    assert batch.starts.tolist() == [0, 3, 6, 9]
    assert batch.n_supervised == 3


@pytest.mark.parametrize("style", STYLES)
def test_a_batch_of_nothing_but_skipped_rows_teaches_nothing(tiny_config, tiny_owl, style):
    """Its loss is 0, not NaN, and every gradient is zero or absent."""
    batch = collate([Skipped("missing image", "row 3: gone"), Skipped("too long", "row 4: long")])
    assert batch.n_supervised == batch.n_token == batch.n_sample == 0 and len(batch.skipped) == 2
    assert batch.images is None
    assert batch.ids.shape == batch.labels.shape == (1, 1) and batch.labels.item() == IGNORE
    assert batch.starts.tolist() == [0, 1] and batch.starts.dtype == torch.int32 and batch.longest == 1
    model = tiny_owl(tiny_config(style)).train()
    loss = model(batch.ids, batch.images, batch.labels)[1]
    assert loss.item() == 0
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_a_text_only_batch_has_no_images(open_data):
    data = open_data([{"conversations": talk("a", "b")}] * 2)
    assert collate([data[0, 0], data[0, 1]]).images is None


# ----------------------------------------------------------------------------------------------------
# Captions


def answer_of(sample: Sample, tokenizer: Tokenizer) -> str:
    assert isinstance(sample, Sample), sample
    return tokenizer.decode(supervised(sample)[:-1])


@pytest.mark.parametrize("style", STYLES)
def test_a_caption_is_the_answer_to_the_request(open_data, style):
    captioned = {"image": "red.png", "caption": "  A red\n square. "}
    spelt = {"image": "red.png", "conversations": talk(f"<|image|>{CAPTION_REQUEST}", "A red square.")}
    data = open_data([captioned, spelt, {**captioned, "caption": ["A red square."]}], style)
    first = data[0, 0]
    for index in (1, 2):
        other = data[0, index]
        assert first.ids == other.ids and first.labels == other.labels
        assert first.images.equal(other.images)


def test_chance_picks_one_of_several_captions_by_the_samples_seed(open_data, tokenizer):
    captions = ["one", "two", "three", "four"]
    data = open_data([{"image": "red.png", "caption": captions}])
    drawn = [answer_of(data[seed, 0], tokenizer) for seed in range(400)]
    assert drawn == [answer_of(data[seed, 0], tokenizer) for seed in range(400)]
    counts = Counter(drawn)
    assert counts.keys() == set(captions)
    assert all(70 < count < 130 for count in counts.values())
    for seed in (-1, 2**33, 2**62):
        assert answer_of(data[seed, 0], tokenizer) in captions


BAD_CAPTIONS = {
    "no image": ({"caption": "A cat."}, "no image"),
    "two images": ({"image": ["red.png", "blue.png"], "caption": "A cat."}, "marks 1 images and has 2"),
    "empty": ({"image": "red.png", "caption": " \n"}, "empty"),
    "one of several is empty": ({"image": "red.png", "caption": ["A cat.", ""]}, "empty"),
    "no caption at all": ({"image": "red.png", "caption": []}, "caption should be"),
    "a number": ({"image": "red.png", "caption": 5}, "caption should be"),
    "a number among them": ({"image": "red.png", "caption": ["A cat.", None]}, "caption should be"),
    "a placeholder": ({"image": "red.png", "caption": "A cat <image>."}, "placeholder"),
    "the other placeholder": ({"image": "red.png", "caption": ["A cat.", "<|image|>"]}, "placeholder"),
    "half a character": ({"image": "red.png", "caption": "\ud83d"}, "half a character"),
    "null": ({"image": "red.png", "caption": None}, "conversation"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_an_unusable_caption_is_a_malformed_row_whatever_the_seed(open_data, style, case):
    row, words = BAD_CAPTIONS[case]
    data = open_data([row], style)
    for seed in range(4):
        skipped = data[seed, 0]
        assert isinstance(skipped, Skipped) and skipped.kind == "malformed row"
        assert words in skipped.reason and "row 0" in skipped.reason and "\n" not in skipped.reason


def test_a_conversation_goes_before_a_caption(open_data, tokenizer):
    row = {"image": "red.png", "caption": "not this", "conversations": talk("<image>What?", "this")}
    assert answer_of(open_data([row])[0, 0], tokenizer) == "this"


# ----------------------------------------------------------------------------------------------------
# Rows about one image


def turns_of(row: dict) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def test_conversations_about_one_image_become_one_in_the_files_order():
    rows = [
        {"id": 1, "image": "a.png", "conversations": talk("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
        {"id": 2, "image": "b.png", "conversations": talk("<image>Other?", "No.")},
        {"id": 3, "image": ["a.png"], "conversations": talk("Where?\n<|image|>", "On a mat.")},
        {"id": 4, "image": "a.png", "conversations": talk("Is <image> it?", "It is.", "Who?", "Me.")},
    ]
    before = json.dumps(rows)
    merged = merge_by_image(rows)
    assert json.dumps(rows) == before  # the rows themselves are untouched
    assert [row["id"] for row in merged] == [1, 2]
    asked = ["<image>\nWhat?", "A cat.", "Sure?", "Yes.", "Where?", "On a mat.", "Is it?", "It is.", "Who?", "Me."]
    assert turns_of(merged[0]) == asked
    assert [turn["from"] for turn in merged[0]["conversations"]] == ["human", "gpt"] * 5
    assert merged[1] == rows[1]
    assert merge_by_image(merged) == merged


def test_only_what_is_beyond_doubt_is_merged():
    """Other rows stay as they are, in their places, among them all that are malformed."""
    good = {"image": "a.png", "conversations": talk("<image>What?", "A cat.")}
    others = [
        {"conversations": talk("text", "only")},
        {"image": ["a.png", "a.png"], "conversations": talk("<image><image>Same?", "Yes.")},
        {"image": "a.png", "conversations": talk("Hm.", "Yes?", "<image>What?", "A cat.")},
        {"image": "a.png", "conversations": talk("What?", "A cat.")},
        {"image": "a.png", "conversations": talk("<image>What <image>?", "A cat.")},
        {"image": "a.png", "conversations": talk("<image>What?", "A <image>.")},
        {"image": "a.png", "conversations": talk("<image>\n", "A question that is the image alone.")},
        {"image": "a.png", "conversations": talk("<image>What?", " ")},
        {"image": "a.png", "conversations": talk("<image>What?", "\ud83d")},
        {"image": "a.png", "conversations": talk("<image>What?")},
        {"image": "a.png", "conversations": 5},
        {"image": 5, "conversations": talk("<image>What?", "A cat.")},
        {"image": "a.png", "caption": "A cat."},
        {"image": "a.png", "text": f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: What?\nAI: A cat."},
        {"image": "a.png"},
        "line 3 is not valid JSON",
        None,
    ]
    both = {**good, "conversations": good["conversations"] + talk("What?", "A cat.")}
    assert merge_by_image([good, *others, good]) == [both, *others]


@pytest.mark.parametrize("style", STYLES)
def test_merged_rows_are_samples_like_others(open_data, style):
    rows = [{"id": i, "image": "red.png", "conversations": talk("<image>What?", f"a{i}")} for i in range(3)]
    whole = {"image": "red.png", "conversations": talk("<image>What?", "a0", "What?", "a1", "What?", "a2")}
    merged = open_data(rows, style, merge=True)
    assert len(merged) == 1 and len(open_data(rows, style)) == 3
    sample, expected = merged[0, 0], open_data([whole], style, name="whole.json")[0, 0]
    assert sample.ids == expected.ids and sample.labels == expected.labels and sample.images.equal(expected.images)
    gone = [{**row, "image": "gone.png"} for row in rows]
    assert "merged row 0 (id 0): there is no image" in open_data(gone, style, merge=True)[0, 0].reason


# ----------------------------------------------------------------------------------------------------
# Tar shards


def test_what_is_a_pattern_of_shards():
    for path in ("a.tar", "a/*.tar", "a/0000?.tar", "a/[01].tar", "a/*"):
        assert is_shards(path)
    for path in ("a.json", "a.jsonl", "tar/a.json", "a.tar.json"):
        assert not is_shards(path)


@pytest.mark.parametrize("style", STYLES)
def test_tar_samples_from_end_to_end(open_tar, open_data, folder, tokenizer, style):
    """Each way to write a sample gives what the same row of a file gives; several captions are drawn from."""
    red, noise = ((folder / name).read_bytes() for name in ("red.png", "noise.png"))
    Image.open(folder / "noise.png").save(folder / "noise.webp", lossless=True)
    webp = (folder / "noise.webp").read_bytes()
    conversation = talk("<image>What?", "Noise.", "Sure?", "Yes.")
    text = f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: What?\nAI: Noise.\nHuman: Sure?\nAI: Yes."
    tar = open_tar(
        [
            {"png": red, "txt": "Ein rotes Quadrat – ö.\n".encode()},
            {"json": json.dumps({"caption": "A square.", "url": "x", "image": "y"}).encode(), "png": red, "txt": b"no"},
            {"webp": webp, "json": json.dumps({"conversations": conversation}).encode()},
            {"png": noise, "json": json.dumps({"text": text}).encode()},
            {"png": red, "json": json.dumps({"caption": None, "text": None, "key": "3"}).encode(), "txt": b"From txt."},
            {"json": json.dumps({"conversations": talk("a", "b")}).encode()},
            {"PNG": red, "json": json.dumps({"caption": ["one", "two"]}).encode()},
        ],
        style,
    )
    rows = [
        {"image": "red.png", "caption": "Ein rotes Quadrat – ö."},
        {"image": "red.png", "caption": "A square."},
        {"image": "noise.png", "conversations": conversation},
        {"image": "noise.png", "text": text},
        {"image": "red.png", "caption": "From txt."},
        {"conversations": talk("a", "b")},
        {"image": "red.png", "caption": ["one", "two"]},
    ]
    data = open_data(rows, style)
    assert len(tar) == len(data) == 7
    assert tar.broken == []
    for index in range(7):
        for seed in range(4):
            sample, expected = tar[seed, index], data[seed, index]
            assert isinstance(sample, Sample), sample
            assert sample.ids == expected.ids and sample.labels == expected.labels
            assert sample.images.equal(expected.images)
    assert {answer_of(tar[seed, 6], tokenizer) for seed in range(20)} == {"one", "two"}
    assert tar[0, 3].images[0].equal(to_pixels(load_image(folder / "noise.png"), SIZE, "stretch"))


@pytest.mark.parametrize(
    "sample, kind, words",
    [
        ({"png": b"no image", "txt": b"A cat."}, "unreadable image", "Cannot read the image"),
        ({"png": b"", "txt": b"A cat."}, "unreadable image", "Cannot read the image"),
        ({"txt": b"A cat."}, "malformed row", "no image"),
        ({"gif": b"GIF89a", "txt": b"A cat."}, "malformed row", "no image"),
        ({"png": "red.png", "jpg": "red.png", "txt": b"A cat."}, "malformed row", "2 images"),
        ({"png": "red.png"}, "malformed row", "neither"),
        ({"png": "red.png", "json": b'{"url": "x"}'}, "malformed row", "neither"),
        ({"png": "red.png", "txt": b" \n"}, "malformed row", "empty"),
        ({"png": "red.png", "txt": b"A <image>."}, "malformed row", "placeholder"),
        ({"png": "red.png", "txt": b"\xff\xfe"}, "malformed row", "not UTF-8"),
        ({"png": "red.png", "json": b"{", "txt": b"A cat."}, "malformed row", ".json"),
        ({"png": "red.png", "json": b"\xff\xff", "txt": b"A cat."}, "malformed row", ".json"),
        ({"png": "red.png", "json": b"[" * 100_000}, "malformed row", ".json"),
        ({"png": "red.png", "json": b'["A cat."]', "txt": b"A cat."}, "malformed row", "JSON object"),
        ({"png": "red.png", "json": b'{"caption": 3}', "txt": b"A cat."}, "malformed row", "caption should be"),
        ({"png": "red.png", "json": b'{"conversations": []}', "txt": b"A cat."}, "malformed row", "conversation"),
        ({"png": "red.png", "json": b'{"text": "A cat."}', "txt": b"A cat."}, "malformed row", "conversation"),
        ({"png": "red.png", "txt": b"word " * 300}, "too long", "200 positions"),
    ],
)
def test_a_tar_sample_that_cannot_be_used_is_skipped_by_name(open_tar, folder, sample, kind, words):
    """Its neighbours are untouched; a path in its .json is never opened, since its image is the member."""
    red = (folder / "red.png").read_bytes()
    sample = {suffix: red if content == "red.png" else content for suffix, content in sample.items()}
    good = {"png": red, "txt": b"A cat."}
    data = open_tar([good, sample, good])
    skipped = data[0, 1]
    assert isinstance(skipped, Skipped) and skipped.kind == kind
    assert words in skipped.reason and "\n" not in skipped.reason
    assert f"{folder / '00000.tar'}, sample 1: " in skipped.reason
    assert isinstance(data[0, 0], Sample) and isinstance(data[0, 2], Sample)


def test_a_shard_that_breaks_under_way_is_skipped_not_fatal(open_tar, folder):
    """It was whole when the run began: now it is damaged in the middle, then cut, then gone."""
    path = folder / "00000.tar"
    data = open_tar([{"png": (folder / "red.png").read_bytes(), "txt": b"A cat."}] * 3)
    whole = path.read_bytes()
    time = path.stat().st_mtime_ns
    at = whole.index(b"000000001.png")
    path.write_bytes(whole[:at] + b"damaged" + whole[at + 7 :])
    os.utime(path, ns=(time, time))
    assert isinstance(data[0, 2], Sample)
    skipped = [data[0, 1]]
    path.write_bytes(whole[: len(whole) // 2])
    skipped.append(data[0, 1])
    path.unlink()
    skipped.append(data[0, 1])
    for sample in skipped:
        assert isinstance(sample, Skipped) and sample.kind == "unreadable shard"
        assert sample.reason.count("00000.tar, sample 1") == 1 and "\n" not in sample.reason


@pytest.mark.parametrize("name", ["none.tar", "none/*.tar", "*.nothing"])
def test_shards_that_are_not_there_are_one_sentence(folder, tokenizer, name):
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        Conversations(folder / name, tokenizer, "owl2", WORDS, SIZE, 200, "stretch")
    assert name in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------
# Sizes


def test_sizes_are_about_right_and_open_nothing(open_data, open_tar, folder):
    rows = [
        {"image": "gone.png", "conversations": talk("<image>" + "What is it? " * 4, "It is a cat. " * 4)},
        {"conversations": talk("a " * 20, "b " * 20)},
        {"image": ["gone.png"] * 3, "conversations": talk("<image>" * 3 + "word " * 10, "word " * 10)},
        {"image": "gone.png", "caption": ["a caption of some words"] * 3},
        {"conversations": talk("word " * 1000, "word " * 1000)},
        {"text": "x" * 400},
    ]
    sizes = [open_data(rows).size(index) for index in range(6)]
    assert sizes == [WORDS + (7 + 48 + 52) // 4, 20, 3 * WORDS + (21 + 100) // 4, WORDS + 23 // 4, 200, 100]
    tar = open_tar([{"png": b"x", "txt": b"A cat."}, {"png": b"x", "txt": b"A cat. " * 100}])
    (folder / "00000.tar").unlink()
    assert tar.size(0) == tar.size(1) > WORDS


def test_the_size_of_any_row_is_a_number_within_the_limit(open_data):
    bad = [row for row, *_ in [*BAD_ROWS.values(), *BAD_CAPTIONS.values()]]
    deep = json.loads("[" * 400 + "]" * 400)
    bad += [{"conversations": deep}, {"image": ["x"] * 10_000}, {"caption": deep}, {"conversations": [deep, 3, "x"]}]
    data = open_data(bad, max_length=50)
    assert all(1 <= data.size(index) <= 50 for index in range(len(bad)))


# ----------------------------------------------------------------------------------------------------
# --check


def test_check_reports_every_row_and_shows_what_is_supervised(open_data, capsys):
    rows = [
        {"image": "red.png", "conversations": talk("<image>What is it?", "red")},
        {"conversations": talk("a", "b", "c " * 100, "d")},
        {"id": "x9", "image": "gone.png", "conversations": talk("<image>a", "b")},
        {"image": ["blue.png", "red.png"], "conversations": talk("<image><image>a", "b")},
        {"conversations": talk("a", "")},
        {"image": "also-gone.png", "conversations": talk("<image>a", "b")},
    ]
    data = open_data(rows, max_length=60)
    assert check(Mixture([data], [1.0]), n_show=2) == 3
    out = capsys.readouterr().out
    samples = [data[0, index] for index in (0, 1, 3)]
    n_supervised = sum(len(supervised(sample)) for sample in samples)
    n_position = sum(len(sample.ids) for sample in samples)
    assert "6 rows: 3 usable (1 text only), 3 not" in out
    assert f"3 images; {n_supervised} supervised tokens of {n_position} positions" in out
    assert "1 samples lose turns" in out
    assert "2 x missing image" in out and "1 x malformed row" in out
    assert "row 2 (id x9): there is no image" in out and "also-gone.png" in out
    assert "row 4: turn 1 is an empty answer" in out
    assert out.count("[[") == 2  # two samples shown, one answer each
    assert out.index("USER:") < out.index("6 rows")


def test_check_goes_over_every_source_of_a_mixture(open_data, open_tar, folder, capsys):
    rows = [{"image": "red.png", "conversations": talk("<image>a", "b")}, {"conversations": talk("a", "")}]
    photo = (folder / "red.png").read_bytes()
    tar = open_tar([{"png": photo, "txt": b"A square."}, {"png": b"no image", "txt": b"A square."}, {"png": photo}])
    with open(folder / "00001.tar", "wb") as file:
        file.write((folder / "00000.tar").read_bytes()[:2500])  # cut in its first image
    several = Conversations(folder / "*.tar", tar.tokenizer, "owl2", WORDS, SIZE, 200, "stretch")
    assert check(Mixture([open_data(rows), several], [1.0, 3.0])) == 1 + 2 + 1
    out = capsys.readouterr().out
    assert f"{folder / 'data.json'}: 25.00% of the samples" in out
    assert f"{folder / '*.tar'}: 75.00% of the samples" in out
    first, second = out.split(f"{folder / '*.tar'}:")
    assert "2 rows: 1 usable (0 text only), 1 not" in first and "1 shards" not in first
    assert "3 rows: 1 usable (0 text only), 2 not" in second
    assert "1 x unreadable image" in second and "1 x malformed row" in second
    assert "1 shards cannot be read to their end" in second and "00001.tar" in second


def test_the_marked_text_brackets_the_supervised_tokens_alone(open_data, tokenizer):
    row = {"image": "red.png", "conversations": talk("<image>What is it?", "A cat.", "Sure?", "Yes.")}
    text = marked(open_data([row])[0, 0], tokenizer)
    assert f"<image: {WORDS} positions>" in text
    assert text.count("[[") == text.count("]]") == 2
    assert "[[ A cat.</s>]]" in text and "[[ Yes.</s>]]" in text
    assert text.replace("[[", "").replace("]]", "").startswith("<s> USER:")
    owl1 = marked(open_data([row], "owl1")[0, 0], tokenizer)
    assert "[[ A cat.</s>]]" in owl1 and "[[ Yes.</s>]]" in owl1
    assert "\n" in owl1  # line breaks are shown as such
