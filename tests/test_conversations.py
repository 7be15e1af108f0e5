"""From data files and tar shards to batches: what becomes a sample, what is skipped and why, and the check of data."""

import base64
import json
import os
import shutil
import sys
import time
import tracemalloc
from collections import Counter

import pytest
import torch
from PIL import Image

from conftest import GOLDEN, make_config, make_owl, write_tar
from data import CAPTION_REQUEST
from data import check as check_module
from data.check import check, format_sample
from data.conversations import Conversations, Sample, SampleSpec, Skipped, collate
from data.image import load_image, to_pixels
from data.mix import Mixture
from data.sources import merge_by_image, read_rows
from data.text import OWL1_SYSTEM, Tokenizer
from model import IGNORE_INDEX, IMAGE_TOKEN_ID

VARIANTS = ("owl1", "owl2")
N_VISUAL = 4  # positions of one image
SIZE = 28
TOKENIZER = Tokenizer(GOLDEN / "text")


@pytest.fixture
def folder(tmp_path):
    """A folder with three images of one color, and one of many."""
    for name, color in (("red", (220, 30, 30)), ("green", (30, 200, 40)), ("blue", (20, 40, 230))):
        Image.new("RGB", (SIZE, SIZE), color).save(tmp_path / f"{name}.png")
    noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    return tmp_path


def spec(variant: str = "owl2", max_length: int = 200) -> SampleSpec:
    return SampleSpec(TOKENIZER, variant, N_VISUAL, SIZE, max_length, "stretch")


@pytest.fixture
def open_data(folder):
    """open_data(rows, variant="owl2", ...) -> Conversations over a file with these rows."""

    def make(rows, variant="owl2", name="data.json", max_length=200, merge=False):
        content = "\n".join(map(json.dumps, rows)) if name.endswith(".jsonl") else json.dumps(rows)
        (folder / name).write_text(content)
        return Conversations(folder / name, spec(variant, max_length), merge=merge)

    return make


@pytest.fixture
def open_tar(folder):
    """open_tar(samples) -> Conversations over a shard with these samples, {extension: content}."""

    def make(samples):
        named = [(f"{i:09}.{suffix}", sample[suffix]) for i, sample in enumerate(samples) for suffix in sample]
        return Conversations(write_tar(folder / "00000.tar", named), spec())

    return make


def talk(*turns: str) -> list[dict]:
    """Alternating questions and answers in LLaVA's format."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def supervised(sample: Sample) -> list[int]:
    return [label for label in sample.labels if label != IGNORE_INDEX]


def answer_of(sample: Sample) -> str:
    assert isinstance(sample, Sample), sample
    return TOKENIZER.decode(supervised(sample)[:-1])


def assert_equal(a: Sample, b: Sample) -> None:
    assert isinstance(a, Sample) and isinstance(b, Sample), (a, b)
    assert a.ids == b.ids and a.labels == b.labels and a.images.equal(b.images)


# --- formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_formats_give_the_same_sample(open_data, variant):
    """LLaVA's JSON, the same as a line of .jsonl, and (where the tokens are equal) Owl1's text."""
    row = {"id": 7, "image": "red.png", "conversations": talk("<image>What is it?", "red", "And?", "a square")}
    text = f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: What is it?\nAI: red\nHuman: And?\nAI: a square"
    sample = open_data([row], variant)[0, 0]
    assert sample.images.shape == (1, 3, SIZE, SIZE)
    assert_equal(sample, open_data([row], variant, "data.jsonl")[0, 0])
    from_text = open_data([{"image": ["red.png"], "text": text}], variant, "owl1.jsonl")[0, 0]
    assert supervised(from_text) == supervised(sample)
    assert from_text.images.equal(sample.images)
    if variant == "owl1":
        assert from_text.ids == sample.ids


def test_text_only_rows_have_no_image(open_data):
    row = {"conversations": talk("a", "b")}
    data = open_data([row, row | {"image": None}, row | {"image": []}])
    samples = [data[0, index] for index in range(3)]
    assert samples[0].images.shape == (0, 3, SIZE, SIZE) and IMAGE_TOKEN_ID not in samples[0].ids
    for sample in samples[1:]:
        assert_equal(sample, samples[0])
    assert collate(samples).images is None


def test_several_images_keep_their_order_with_both_placeholders(open_data):
    paths = ["red.png", "green.png", "blue.png"]
    row = {"image": paths, "conversations": talk("<image><|image|>Which?", "both", "<|image|>This?", "no")}
    other = json.loads(json.dumps(row).replace("<|image|>", "<image>"))
    data = open_data([row, other])
    assert_equal(data[0, 0], data[0, 1])
    assert data[0, 0].ids.count(IMAGE_TOKEN_ID) == 3 * N_VISUAL
    assert data[0, 0].images.mean(dim=(2, 3)).argmax(dim=1).tolist() == [0, 1, 2]


def test_lines_of_a_jsonl(folder):
    """Blank lines and U+2028, which JSON allows in a text, end no row; a broken line is skipped with its number."""
    good = json.dumps({"conversations": talk("a\u2028b", "c\x85d")}, ensure_ascii=False)
    bad = [good[:-5], '{"id": ' + "9" * 5000 + "}", "[" * 100_000]  # cut, a number too long to parse, too deep
    path = folder / "lines.jsonl"
    path.write_bytes("\r\n".join([good, "", *bad, good, ""]).encode())
    rows = read_rows(path)
    assert len(rows) == 5 and rows[0] == rows[4] == json.loads(good)
    data = Conversations(path, spec())
    for index in (1, 2, 3):
        assert data[0, index].kind == "malformed row"
        assert f"row {index}" in data[0, index].reason and f"line {index + 2}" in data[0, index].reason
    assert isinstance(data[0, 4], Sample)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'[{"a": 1}', b"\xff\xfe[", b"[" * 10**5], ids=range(6))
def test_what_is_no_data_file_is_one_error(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match="bad.json") as error:
        Conversations(tmp_path / "bad.json", spec())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["none.json", "none.tar", "none/*.tar", "*.nothing"])
def test_a_missing_source_is_one_error(folder, name):
    with pytest.raises(FileNotFoundError) as error:
        Conversations(folder / name, spec())
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_turns_are_cut_at_every_limit(open_data, variant):
    """As many whole turns as fit, each image whole, and no image of a removed turn."""
    paths = ["red.png", "green.png", "blue.png"]
    turns = ["<image>What is it?", "a red square", "<image><image>And these?", "two more", "Sure?", "Yes, I am."]
    rows = [{"image": paths[:n], "conversations": talk(*turns[: 2 * k])} for k, n in ((1, 1), (2, 3), (3, 3))]
    data = open_data(rows, variant)
    whole = [data[0, index] for index in range(3)]
    lengths = [len(sample.ids) for sample in whole]
    for limit in range(lengths[0] - 1, lengths[2] + 2):
        sample = open_data(rows[2:], variant, max_length=limit)[0, 0]
        n_fit = sum(length <= limit for length in lengths)
        if n_fit == 0:
            assert isinstance(sample, Skipped) and sample.kind == "too long"
        else:
            assert_equal(sample, whole[n_fit - 1])
            assert sample.n_cut == 3 - n_fit


def test_a_missing_image_of_a_removed_turn_does_not_matter(open_data):
    row = {"image": ["red.png", "gone.png"], "conversations": talk("<image>a", "b", "<image>c", "d")}
    assert open_data([row])[0, 0].kind == "missing image"
    short = len(open_data([{"image": "red.png", "conversations": talk("<image>a", "b")}])[0, 0].ids)
    assert len(open_data([row], max_length=short)[0, 0].images) == 1


# --- rows that cannot be used ------------------------------------------------------------------------

ASK = {"conversations": talk("<image>What?", "a")}
CAT = {"image": "red.png", "caption": "A cat."}
BAD_ROWS = {  # row, kind ("": malformed row), keyword of the reason
    "missing image": (ASK | {"image": "gone.png"}, "missing image", "gone.png"),
    "an image that is a folder": (ASK | {"image": "folder"}, "missing image", "folder"),
    "an image outside through a link": (ASK | {"image": "link.png"}, "image outside its folder", "outside.png"),
    "a null byte in a path": (ASK | {"image": "a\0.png"}, "missing image", "a\\x00.png"),
    "a control character in a path": (ASK | {"image": "\x1b[31m.png"}, "missing image", "\\x1b[31m"),
    "no image for a placeholder": (ASK | {"image": ""}, "", "0 images"),
    "images without a placeholder": ({"images": ["red.png"], "conversations": talk("What?", "a")}, "", "1 images"),
    "an unread image": ({"image_path": "red.png", "conversations": talk("What?", "a")}, "unread field", "image_path"),
    "a video": ({"video": "a.mp4", "conversations": talk("<video>What?", "a")}, "unread field", "video"),
    "unreadable image": (ASK | {"image": "broken.png"}, "unreadable image", "broken.png"),
    "absolute path": (ASK | {"image": "/etc/passwd"}, "image outside its folder", "/etc/passwd"),
    "path above": (ASK | {"image": "x/../../red.png"}, "image outside its folder", "x/../../red.png"),
    "a lone surrogate in a path": (ASK | {"image": "\ud83d.png"}, "missing image", "\\ud83d"),
    "a line break in a path": (ASK | {"image": "a\nb.png"}, "missing image", "a b.png"),
    "a whole image for a path": (ASK | {"image": "a" * 10**5}, "missing image", "aaa"),
    "fewer images than placeholders": (CAT | {"conversations": talk("<image><image>?", "a")}, "", "2 image"),
    "more images than placeholders": (CAT | {"conversations": talk("What?", "a")}, "", "0 image"),
    "image is a number": (ASK | {"image": 3}, "", "image"),
    "image list with a number": (ASK | {"image": ["red.png", 3]}, "", "image"),
    "no conversation": ({"image": "red.png"}, "", "conversation"),
    "empty answer": ({"conversations": talk("a", " \n")}, "", "turn 1"),
    "a lone surrogate": ({"conversations": talk("a", "\ud83d")}, "", "surrogate"),
    "Owl1 text without an answer": ({"text": f"{OWL1_SYSTEM}\nHuman: hi"}, "", "answer"),
    "a list": ([], "", "object"),
    "a caption without an image": ({"caption": "A cat."}, "", "0 images"),
    "one of several captions is empty": (CAT | {"caption": ["A cat.", " \n"]}, "", "empty"),
    "no caption at all": (CAT | {"caption": []}, "", "caption"),
    "a number among captions": (CAT | {"caption": ["A cat.", 5]}, "", "caption"),
    "a placeholder in a caption": (CAT | {"caption": ["A cat.", "<|image|>"]}, "", "placeholder"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_an_unusable_row_is_skipped_by_name_whatever_the_seed(open_data, folder, case):
    """The reason is one printable line that names the row; its neighbors are not affected."""
    row, kind, keyword = BAD_ROWS[case]
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:200])
    (folder / "folder").mkdir()
    (folder / "link.png").symlink_to((folder / "red.png").rename(folder.parent / f"{folder.name}-outside.png"))
    if isinstance(row, dict):
        row = {"id": "the-bad-one", **row}
    good = {"conversations": talk("a", "b")}
    data = open_data([good, row, good])
    for seed in range(2):
        skipped = data[seed, 1]
        assert isinstance(skipped, Skipped) and skipped.kind == (kind or "malformed row")
        assert skipped.reason.startswith(f"{folder / 'data.json'}, row 1")
        assert keyword in skipped.reason and "\n" not in skipped.reason
        assert skipped.reason.encode() and len(skipped.reason) < 600
        assert ("the-bad-one" in skipped.reason) == isinstance(row, dict)
    assert isinstance(data[0, 0], Sample) and isinstance(data[0, 2], Sample)


def test_collate_packs_samples_and_counts():
    """No sample predicts the first token of the next, even if that label is supervised."""
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, SIZE, SIZE)
    skipped = Skipped("missing image", "row 3: gone")
    first = Sample([5, 6, 7], [5, IGNORE_INDEX, 7], images[:1])
    text = Sample([8, 9], [IGNORE_INDEX, 9], images[:0])
    batch = collate([first, skipped, text, Sample([3, 4], [3, 4], images)])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX, 9, IGNORE_INDEX, 4]]
    assert batch.ids.dtype == batch.labels.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 7] and batch.max_seqlen == 3
    assert batch.images.equal(images[[0, 0, 1]])
    assert (batch.n_sample, batch.n_token, batch.n_supervised, batch.skipped) == (3, 7, 3, [skipped])


def test_a_batch_of_skipped_rows_has_zero_loss_and_gradient():
    batch = collate([Skipped("missing image", "row 3: gone"), Skipped("too long", "row 4: long")])
    assert batch.n_supervised == batch.n_token == batch.n_sample == 0 and len(batch.skipped) == 2
    model = make_owl(make_config("owl2")).train()
    loss = model(batch.ids, batch.images, batch.labels)[1]
    assert loss.item() == 0
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_a_caption_is_the_answer_to_the_request(open_data):
    row = {"image": "red.png", "conversations": talk(f"<|image|>{CAPTION_REQUEST}", "A red square.")}
    captioned = [{"image": "red.png", "caption": caption} for caption in ("  A red\n square. ", ["A red square."])]
    data = open_data([row, *captioned, row | {"caption": "not this"}])
    for index in (1, 2, 3):
        assert_equal(data[0, index], data[0, 0])


def test_the_seed_selects_one_of_several_captions(open_data):
    data = open_data([{"image": "red.png", "caption": ["one", "two", "three", "four"]}])
    first, second = ([answer_of(data[seed, 0]) for seed in [*range(100), -1, 2**62]] for _ in range(2))
    assert first == second
    counts = Counter(first)
    assert len(counts) == 4 and all(10 < count < 40 for count in counts.values())


def test_conversations_about_the_same_image_become_one_in_the_order_of_the_file(open_data):
    rows = [
        {"id": 1, "image": "a.png", "conversations": talk("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
        {"id": 2, "image": "b.png", "conversations": talk("<image>Other?", "No.")},
        {"id": 3, "image": ["a.png"], "conversations": talk("Where?\n<|image|>", "On a mat.")},
        {"id": 4, "image": "a.png", "conversations": talk("Is <image> it?", "It is.", "Who?", "Me.")},
    ]
    before = json.dumps(rows)
    merged = list(merge_by_image(rows))
    assert json.dumps(rows) == before  # the rows themselves are unchanged
    turns = ["<image>\nWhat?", "A cat.", "Sure?", "Yes.", "Where?", "On a mat.", "Is it?", "It is.", "Who?", "Me."]
    assert merged == [{"id": 1, "image": "a.png", "conversations": talk(*turns)}, rows[1]]
    data = open_data(rows, merge=True)
    assert len(data) == 2 and "merged row 0 (id 1)" in data[0, 0].reason


def test_other_rows_are_not_merged():
    """They keep their positions, malformed ones too."""
    good = {"image": "a.png", "conversations": talk("<image>What?", "A cat.")}
    others = [
        {"conversations": talk("text", "only")},
        {"image": ["a.png", "a.png"], "conversations": talk("<image><image>Same?", "Yes.")},
        good | {"conversations": talk("Hm.", "Yes?", "<image>What?", "A cat.")},
        good | {"conversations": talk("<image>What?", "A <image>.")},
        good | {"conversations": talk("<image>\n", "A question that is the image alone.")},
        good | {"conversations": talk("<image>What?", "\ud83d")},
        good | {"conversations": talk("<image>What?", "", "<image>And this?", "A dog.")},
        good | {"image": 5},
        {"image": "a.png", "caption": "A cat."},
        {"image": "a.png", "text": f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: What?\nAI: A cat."},
        None,
    ]
    both = {**good, "conversations": good["conversations"] + talk("What?", "A cat.")}
    assert list(merge_by_image([good, *others, good])) == [both, *others]


# --- tar shards --------------------------------------------------------------------------------------


def test_tar_samples_equal_rows_of_a_file(open_tar, open_data, folder):
    red = (folder / "red.png").read_bytes()
    Image.open(folder / "noise.png").save(folder / "noise.webp", lossless=True)
    webp = (folder / "noise.webp").read_bytes()
    turns = talk("<image>What?", "Noise.", "Sure?", "Yes.")
    text = f"{OWL1_SYSTEM}\nHuman: <image>\nHuman: What?\nAI: Noise.\nHuman: Sure?\nAI: Yes."
    pairs = [  # members of a sample, and the same as a row of a file
        ({"png": red, "txt": "Rot – ö.\n".encode()}, {"image": "red.png", "caption": "Rot – ö."}),
        ({"json": {"caption": "A", "image": "x"}, "png": red, "txt": b"no"}, {"image": "red.png", "caption": "A"}),
        ({"webp": webp, "json": {"conversations": turns}}, {"image": "noise.png", "conversations": turns}),
        ({"png": red, "json": {"text": text}}, {"image": "red.png", "text": text}),
        ({"png": red, "json": {"caption": None, "text": None}, "txt": b"B"}, {"image": "red.png", "caption": "B"}),
        ({"json": {"conversations": talk("a", "b")}}, {"conversations": talk("a", "b")}),
        ({"PNG": red, "json": {"caption": ["one", "two"]}}, {"image": "red.png", "caption": ["one", "two"]}),
    ]
    samples = [
        {extension: json.dumps(c).encode() if isinstance(c, dict) else c for extension, c in members.items()}
        for members, _ in pairs
    ]
    tar, data = open_tar(samples), open_data([row for _, row in pairs])
    assert len(tar) == 7 and tar.broken == []
    for index in range(7):
        assert_equal(tar[3, index], data[3, index])
    assert {answer_of(tar[seed, 6]) for seed in range(20)} == {"one", "two"}
    assert tar[0, 2].images[0].equal(to_pixels(load_image(folder / "noise.png"), SIZE, "stretch"))


@pytest.mark.parametrize(
    "sample, kind, keyword",
    [
        ({"png": b"no image", "txt": b"A cat."}, "unreadable image", ""),
        ({"gif": b"GIF89a", "txt": b"A cat."}, "malformed row", ".gif"),
        ({"png": "red.png", "jpg": "red.png", "txt": b"A cat."}, "malformed row", "2 images"),
        ({"png": "red.png", "json": b'{"url": "x"}'}, "malformed row", "caption"),
        ({"png": "red.png", "txt": b"\xff\xfe"}, "malformed row", ".txt"),
        ({"png": "red.png", "json": b"{", "txt": b"A cat."}, "malformed row", ".json"),
        ({"png": "red.png", "json": b"[" * 100_000}, "malformed row", ".json"),
        ({"png": "red.png", "json": b'["A cat."]', "txt": b"A cat."}, "malformed row", ".json"),
    ],
)
def test_an_unusable_tar_sample_is_skipped_by_name(open_tar, folder, sample, kind, keyword):
    red = (folder / "red.png").read_bytes()
    sample = {suffix: red if content == "red.png" else content for suffix, content in sample.items()}
    good = {"png": red, "txt": b"A cat."}
    data = open_tar([good, sample, good])
    skipped = data[0, 1]
    assert isinstance(skipped, Skipped) and skipped.kind == kind
    assert f"{folder / '00000.tar'}, sample 1: " in skipped.reason
    assert keyword in skipped.reason and "\n" not in skipped.reason
    assert isinstance(data[0, 0], Sample) and isinstance(data[0, 2], Sample)


def test_a_shard_that_breaks_later_is_skipped_not_fatal(open_tar, folder):
    """After it was opened: it is damaged in the middle, then gone."""
    path = folder / "00000.tar"
    data = open_tar([{"png": (folder / "red.png").read_bytes(), "txt": b"A cat."}] * 3)
    mtime = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"000000001.png", b"damaged01.png"))
    os.utime(path, ns=(mtime, mtime))
    assert isinstance(data[0, 2], Sample)
    skipped = [data[0, 1]]
    path.unlink()
    skipped.append(data[0, 1])
    for sample in skipped:
        assert isinstance(sample, Skipped) and sample.kind == "unreadable shard"
        assert "00000.tar, sample 1" in sample.reason and "\n" not in sample.reason


def test_approximate_lengths_open_nothing(open_data, open_tar, folder):
    rows = [
        {"image": "gone.png", "conversations": talk("<image>" + "What is it? " * 4, "It is a cat. " * 4)},
        {"image": ["gone.png"] * 3, "conversations": talk("<image>" * 3 + "word " * 10, "word " * 10)},
        {"image": "gone.png", "caption": ["a caption of some words"] * 3},
        {"conversations": talk("word " * 1000, "word " * 1000)},
        {"text": "x" * 400},
    ]
    data = open_data(rows)
    lengths = [N_VISUAL + (7 + 48 + 52) // 4, 3 * N_VISUAL + (21 + 100) // 4, N_VISUAL + 23 // 4, 200, 100]
    assert [data.approx_length(index) for index in range(5)] == lengths
    tar = open_tar([{"png": b"x", "txt": b"A cat."}])
    (folder / "00000.tar").unlink()
    assert tar.approx_length(0) > N_VISUAL


def test_the_approximate_length_of_any_row_is_within_the_limit(open_data):
    deep = json.loads("[" * 400 + "]" * 400)
    rows = [row for row, *_ in BAD_ROWS.values()]
    rows += [{"image": ["x"] * 10_000}, {"caption": deep}, {"conversations": [deep, 3, "x"]}]
    data = open_data(rows, max_length=50)
    assert all(1 <= data.approx_length(index) <= 50 for index in range(len(rows)))


# --- the check of data -------------------------------------------------------------------------------


def test_check_reports_on_every_source_and_shows_samples(open_data, open_tar, folder, capsys):
    rows = [
        {"image": "red.png", "conversations": talk("<image>What is it?", "red")},
        {"conversations": talk("a", "b", "c " * 100, "d")},
        {"id": "x9", "image": "gone.png", "conversations": talk("<image>a", "b")},
        {"image": ["blue.png", "red.png"], "conversations": talk("<image><image>a", "b")},
        {"conversations": talk("a", "")},
        {"image": "also-gone.png", "conversations": talk("<image>a", "b")},
    ]
    data = open_data(rows, max_length=60)
    open_tar([{"png": (folder / "red.png").read_bytes(), "txt": b"A"}, {"png": b"no image", "txt": b"A"}])
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes()[:700])  # cut in its first image
    shards = Conversations(folder / "*.tar", spec())
    assert check(Mixture([data, shards], [1.0, 3.0]), n_show=2) == 3 + 1 + 1
    first, second = capsys.readouterr().out.split(f"{folder / '*.tar'}:")
    samples = [data[0, index] for index in (0, 1, 3)]
    n_supervised = sum(len(supervised(sample)) for sample in samples)
    n_position = sum(len(sample.ids) for sample in samples)
    counts = ("3 usable (1 text only), 3 not", f"3 images; {n_supervised} ", f" {n_position} ", "1 samples lose")
    examples = ("2 x missing image", "row 2 (id x9)", "also-gone.png", "1 x malformed row", "row 4: ")
    assert all(text in first for text in ("25.00%", *counts, *examples))
    assert first.count("[[") == 2  # two samples shown, one answer each
    assert all(text in second for text in ("75.00%", "1 usable", "1 x unreadable image", "1 shards", "00001.tar"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shown_text_has_the_supervised_tokens_in_brackets(open_data, variant):
    row = {"image": "red.png", "conversations": talk("<image>What is it?", "A cat.\n", "Sure?", "Yes.")}
    text = format_sample(open_data([row], variant)[0, 0], TOKENIZER)
    assert text.startswith("<s> ") and f"<image: {N_VISUAL} positions>" in text
    assert text.count("[[") == text.count("]]") == 2
    assert "[[ A cat.\n</s>]]" in text and "[[ Yes.</s>]]" in text


def test_the_command_checks_a_source(open_data, folder, monkeypatch, capsys):
    def run(*flags: object) -> int:
        monkeypatch.setattr(sys, "argv", ["data.check", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            check_module.main()
        return end.value.code

    good, bad = {"conversations": talk("a", "b")}, {"conversations": talk("a", "")}
    model = ("--tokenizer", GOLDEN / "text", "--variant", "owl1")
    assert run("--data", open_data([good], name="good.json").path, *model) == 0
    assert "[[ b</s>]]" in capsys.readouterr().out
    (folder / "model").mkdir()
    for file in (GOLDEN / "owl2" / "config.json", GOLDEN / "text" / "tokenizer.model"):  # the weights are not needed
        shutil.copy(file, folder / "model")
    assert run("--data", open_data([good, bad]).path, "--weights", folder / "model", "--show", 0) == 1
    assert "1 usable" in capsys.readouterr().out
    for flags in ((), ("--data", folder / "good.json"), ("--data", folder / "none.json", *model)):
        assert run(*flags) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1


# --- resume ------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_content_not_the_path(open_data, open_tar, folder):
    rows = [{"image": "red.png", "caption": f"caption {i}"} for i in range(100)]
    first = open_data(rows)
    assert open_data(rows, name="moved.json").fingerprint() == first.fingerprint()
    rows[57] = rows[57] | {"caption": "caption 75"}  # the same length
    for changed in (open_data(rows, name="edited.json"), open_data(rows[1:], name="cut.json")):
        assert changed.fingerprint() != first.fingerprint()

    tar = open_tar([{"png": b"x", "txt": b"A"}])
    (folder / "copy").mkdir()
    shutil.copy(folder / "00000.tar", folder / "copy")  # another modification time
    assert Conversations(folder / "copy" / "00000.tar", spec()).fingerprint() == tar.fingerprint()
    assert open_tar([{"png": b"x" * 20_000, "txt": b"A"}]).fingerprint() != tar.fingerprint()


# --- rows of similar formats -------------------------------------------------------------------------


def test_similar_formats_give_the_same_sample(open_data, folder):
    """`images`, an absolute path, the image after the question, OpenAI's messages, and an empty answer."""
    turns = talk("<image>\nWhat is it?", "A square.", "And?", "Red.")
    row = {"image": "red.png", "conversations": turns}
    messages = [
        {"role": role, "content": turn["value"]} for role, turn in zip(("user", "assistant") * 2, turns, strict=True)
    ]
    url = "data:image/png;base64," + base64.b64encode((folder / "red.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "\nWhat is it?"}]
    parts_with_data = [{"type": "image_url", "image_url": {"url": url}}, parts[1]]
    others = [
        {"images": ["red.png"], "conversations": turns},
        {"image": str(folder / "red.png"), "conversations": turns},
        row | {"conversations": talk("What is it?\n<image> ", "A square.", "And?", "Red.")},
        row | {"conversations": talk("What is it?<image>", "A square.", "Lost", " \n", "And?", "Red.")},
        row | {"conversations": talk("<image>Lost", "", "\nWhat is it?", "A square.", "And?", "Red.")},
        {"image": "red.png", "messages": messages},
        {"messages": [messages[0] | {"content": parts}, *messages[1:]]},
        {"messages": [messages[0] | {"content": parts_with_data}, *messages[1:]]},
    ]
    data = open_data([row, *others])
    for index in range(1, len(others) + 1):
        assert_equal(data[0, index], data[0, 0])
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, messages[1]]
    data = open_data([{"messages": system}, {"conversations": talk("Be brief.\nHi", "A square."), "image": ""}])
    assert_equal(data[0, 0], data[0, 1])


def test_bad_messages_are_malformed_rows(open_data):
    rows = [3, [3], [{"role": "user", "content": [{"type": "audio"}]}], [{"role": "tool", "content": "x"}] * 2]
    rows += [[{"role": ["user"], "content": None}] * 2, [{"role": "system", "content": "x"}], [{"role": "user"}, 3]]
    data = open_data([{"messages": messages} for messages in rows])
    assert [data[0, index].kind for index in range(len(rows))] == ["malformed row"] * len(rows)


@pytest.mark.parametrize("space", " \n")
def test_long_runs_of_spaces_and_many_turns_take_little_time(open_data, space):
    spaces = space * 200_000
    row = {"image": "red.png", "conversations": talk(f"<image>{spaces}What?{spaces}", f"a{spaces}b")}
    rows = [row, row, {"image": "red.png", "caption": f"A{spaces}cat."}]
    rows += [{"text": f"\nHuman: a{spaces}\nAI: b{spaces}c"}, row | {"conversations": talk(f"{spaces}<image>", "a")}]
    rows += [{"conversations": talk(*["a", "b"] * 4000)}]
    start = time.perf_counter()
    for variant in VARIANTS:
        data = open_data(rows, variant, merge=True, max_length=2048)
        assert len(data) == 5 and data[0, 4].n_cut > 3000
        assert [isinstance(data[0, index], Sample | Skipped) for index in range(5)] == [True] * 5
    assert time.perf_counter() - start < 10


def test_a_folder_of_shards_is_a_source_and_a_pipe_is_not(open_tar, folder):
    data = open_tar([{"png": (folder / "red.png").read_bytes(), "txt": b"A cat."}] * 2)
    assert_equal(Conversations(folder, spec())[0, 1], data[0, 1])
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(ValueError, match="pipe.json"):
        Conversations(folder / "pipe.json", spec())
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        Conversations(folder / "empty", spec())


def test_members_that_are_not_adjacent_are_explained(folder):
    red = (folder / "red.png").read_bytes()
    members = [(f"{i}.png", red) for i in range(2)] + [(f"{i}.txt", b"A cat.") for i in range(2)]
    data = Conversations(write_tar(folder / "unsorted.tar", members), spec())
    assert all("next to each other" in data[0, index].reason for index in range(4))


def test_rows_are_one_buffer(open_data):
    """Any spacing and any characters; a row that is not UTF-8 is malformed alone."""
    data = open_data([{"conversations": talk("a", "b")}])
    rows = '\ufeff [ {"a": "é\\"]}, 你"} ,\r\n[1, {"b": []}],null\t,"x" ] \n'
    data.path.write_bytes(rows.encode())
    assert list(read_rows(data.path)) == [{"a": 'é"]}, 你'}, [1, {"b": []}], None, "x"]
    data.path.write_bytes(b'[{"a": "\xff"}, 2]')
    assert "UTF-8" in read_rows(data.path)[0].upper() and read_rows(data.path)[1] == 2
    for wrong in ("[1 2]", "[1,]", "[1", "[,1]", "[1]]", "1", "[1],"):
        data.path.write_text(wrong)
        with pytest.raises(ValueError, match="data.json"):
            read_rows(data.path)


@pytest.mark.parametrize("merge", [False, True])
def test_rows_take_the_memory_of_their_file_once(open_data, merge):
    """Also after all of them have been read, as by a worker; parsed rows would take several times as much."""
    rows = [{"image": f"{i % 1000}.png", "conversations": talk(f"<image>Word {i}?", "Yes.")} for i in range(2000)]
    tracemalloc.start()
    try:
        data = open_data(rows, merge=merge)
        del rows
        for index in range(len(data)):
            data.approx_length(index)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < 1.5 * data.path.stat().st_size


def test_opening_lines_takes_little_more_memory_than_the_file(tmp_path):
    """At the peak: the content, and three numbers per row."""
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps({"caption": "x" * 200}) + "\n") * 5000)
    tracemalloc.start()
    try:
        rows = read_rows(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == 5000 and peak < 1.4 * path.stat().st_size
