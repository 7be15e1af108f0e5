"""From a data file to batches: what becomes a sample, what is skipped and why, and in which order they come."""

import json

import pytest
import torch
from PIL import Image

from conftest import GOLDEN
from data.check import check, marked
from data.conversations import Conversations, Order, Sample, Skipped, collate, loader, read_rows
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

    def make(rows, style="owl2", name="data.json", max_length=200, crop_scale=None):
        path = folder / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(rows), encoding="utf-8")
        return Conversations(path, tokenizer, style, WORDS, SIZE, max_length, "stretch", crop_scale=crop_scale)

    return make


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
    assert skipped.reason.startswith("row 1")
    assert words in skipped.reason and "\n" not in skipped.reason
    if isinstance(row, dict):
        assert "the-bad-one" in skipped.reason
    assert isinstance(data[0, 0], Sample) and isinstance(data[0, 2], Sample)


def test_a_broken_line_is_skipped_with_its_number(folder, tokenizer):
    good = json.dumps({"conversations": talk("a", "b")})
    (folder / "lines.jsonl").write_text(f"{good}\n\n{good[:-5]}\n{good}\n")
    data = Conversations(folder / "lines.jsonl", tokenizer, "owl2", WORDS, SIZE, 200, "stretch")
    assert len(data) == 3
    skipped = data[0, 1]
    assert skipped.kind == "malformed row" and "row 1" in skipped.reason and "line 3" in skipped.reason
    assert isinstance(data[0, 2], Sample)


# ----------------------------------------------------------------------------------------------------
# Batches


def test_collate_pads_on_the_right_and_counts(open_data):
    rows = [
        {"conversations": talk("a", "b")},
        {"image": "gone.png", "conversations": talk("<image>x", "y")},
        {"image": ["red.png", "blue.png"], "conversations": talk("<image><image>What are these things?", "two squares")},
        {"image": "green.png", "conversations": talk("<image>x", "y")},
    ]
    data = open_data(rows)
    samples = [data[0, index] for index in range(4)]
    batch = collate(samples)
    used = [samples[0], samples[2], samples[3]]
    assert batch.ids.shape == batch.labels.shape == (3, max(len(sample.ids) for sample in used))
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    for row, sample in enumerate(used):
        length = len(sample.ids)
        assert batch.ids[row, :length].tolist() == sample.ids
        assert batch.labels[row, :length].tolist() == sample.labels
        assert (batch.labels[row, length:] == IGNORE).all()
        assert (batch.ids[row, length:] >= 0).all()  # padding is no image
    torch.testing.assert_close(batch.images, torch.cat([samples[2].images, samples[3].images]), rtol=0, atol=0)
    assert batch.n_supervised == int((batch.labels[:, 1:] != IGNORE).sum())
    assert batch.n_token == sum(len(sample.ids) for sample in used)
    assert batch.skipped == [samples[1]]


@pytest.mark.parametrize("style", STYLES)
def test_a_batch_of_nothing_but_skipped_rows_teaches_nothing(tiny_config, tiny_owl, style):
    """Its loss is 0, not NaN, and every gradient is zero or absent."""
    batch = collate([Skipped("missing image", "row 3: gone"), Skipped("too long", "row 4: long")])
    assert batch.n_supervised == 0 and batch.n_token == 0 and len(batch.skipped) == 2
    assert batch.images is None
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
# Order


def keys_of(n, steps, seed=0, per_step=8, micro=8, rank=0, world=1):
    return [key for keys in Order(n, seed, per_step, micro, rank, world, steps) for key in keys]


def test_each_epoch_is_another_permutation():
    n = 12
    keys = keys_of(n, range(6), per_step=8)  # 48 samples, four epochs; steps do not end where epochs do
    indices = [index for _, index in keys]
    epochs = [indices[i * n : (i + 1) * n] for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert keys == keys_of(n, range(6), per_step=8)
    assert keys != keys_of(n, range(6), per_step=8, seed=1)
    assert len({seed for seed, _ in keys}) == len(keys)  # each draws its own crop


def test_a_batch_larger_than_the_data_takes_several_epochs():
    indices = [index for _, index in keys_of(3, range(2), per_step=8)]
    assert sorted(indices[:3]) == sorted(indices[3:6]) == sorted(indices[9:12]) == [0, 1, 2]


def test_any_start_continues_the_same_row():
    whole = keys_of(10, range(9))
    for start in range(9):
        assert keys_of(10, range(start, 9)) == whole[start * 8 :]


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (2, 4), (2, 2), (2, 1), (4, 2), (8, 1)])
def test_processes_and_micro_batches_share_out_the_same_samples(world, micro):
    """Step by step, the ranks' parts together are the single process's samples, seeds included, each once."""
    steps = range(3, 8)
    single = keys_of(11, steps)
    ranks = [list(Order(11, 0, 8, micro, rank, world, steps)) for rank in range(world)]
    per_rank = 8 // world // micro
    for i in range(len(steps)):
        parts = [key for rank in ranks for keys in rank[i * per_rank : (i + 1) * per_rank] for key in keys]
        assert sorted(parts) == sorted(single[i * 8 : (i + 1) * 8])
    for rank in ranks:
        assert len(rank) == len(steps) * per_rank
        assert all(len(keys) == micro for keys in rank)


@pytest.mark.parametrize("seed", [0, -1, 20240101, 2**40])
def test_crops_are_reproducible_and_new_in_each_epoch(open_data, seed):
    """For any seed a person would choose; images without crops ignore the seed."""
    row = {"image": ["noise.png", "noise.png"], "conversations": talk("<image><image>What?", "noise")}
    data = open_data([row], crop_scale=0.3)
    keys = keys_of(1, range(3), seed=seed, per_step=1, micro=1)
    samples = [data[key] for key in keys]
    for key, sample in zip(keys, samples):
        assert isinstance(sample, Sample), sample
        torch.testing.assert_close(data[key].images, sample.images, rtol=0, atol=0)
        assert not torch.equal(sample.images[0], sample.images[1])
    assert not torch.equal(samples[0].images, samples[1].images)
    assert not torch.equal(samples[1].images, samples[2].images)
    plain = open_data([row])
    torch.testing.assert_close(plain[1, 0].images, plain[2, 0].images, rtol=0, atol=0)


def test_worker_processes_give_the_same_batches(open_data):
    rows = [{"id": i, "image": "noise.png", "conversations": talk("<image>What?", "word " * (i + 1))} for i in range(6)]
    rows[2]["image"] = "gone.png"
    data = open_data(rows, crop_scale=0.5)
    order = Order(6, 0, 4, 2, 0, 1, range(4))
    alone = list(loader(data, order, 0, False))
    helped = list(loader(data, order, 1, False))
    assert len(alone) == len(helped) == 8
    for a, b in zip(alone, helped):
        assert a.ids.equal(b.ids) and a.labels.equal(b.labels)
        assert (a.images is None and b.images is None) or a.images.equal(b.images)
        assert a.n_supervised == b.n_supervised and a.skipped == b.skipped


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
    assert check(data, n_show=2) == 3
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
