"""sample.py as a person types it: right and wrong questions, strange images, chats, Ctrl-C."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lora
import sample
from data.image import FITS, load_image, to_pixels
from data.text import Tokenizer, expand_images, render_prompt
from model import PRESETS, Owl
from weights import load_model, official_name, save_model

ROOT = Path(__file__).parent.parent
TEXT = Path(__file__).parent / "golden" / "text"
WIDE = TEXT / "images" / "syn_l_190x120.png"
TALL = TEXT / "images" / "syn_rgba_150x200.png"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as tiny as these are slower with more, much slower on a busy machine."""
    n_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_thread)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder of each style, with random weights that never say </s>."""
    folders = {}
    for style in ("owl1", "owl2"):
        torch.manual_seed(0)
        config = PRESETS[f"tiny-{style}"]()
        config.llama.vocab_size = 2000
        config.llama.context = 3000  # an answer long enough to be interrupted
        model = Owl(config).init_weights()
        model.llama.lm_head.weight.data[config.llama.eos_id] = 0
        folders[style] = tmp_path_factory.mktemp(style)
        save_model(model, folders[style])
        shutil.copy(TEXT / "tokenizer.model", folders[style])
    return folders


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread there as well."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def typed(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, timeout=120, env=environment(), cwd="/"
    )


def expect_sentence(code: int, stdout: str, stderr: str, words: str) -> None:
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("sample.py: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert words in stderr


def refused(capsys, words: str, *arguments: object) -> None:
    """The command ends with code 2 and one sentence, which has these words in it."""
    with pytest.raises(SystemExit) as leaving:
        sample.main([str(argument) for argument in arguments])
    expect_sentence(leaving.value.code, *capsys.readouterr(), words)


def answered(capsys, *arguments: object) -> tuple[str, str]:
    sample.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def expected_answer(model: Owl, messages: list[str | None], images: list[Path], fit: str, n: int) -> str:
    """The greedy answer, put together without sample.py."""
    tokenizer = Tokenizer(TEXT)
    ids = render_prompt(messages, tokenizer, model.config.style)
    ids, _ = expand_images(ids, None, model.config.image_words)
    pixels = [to_pixels(load_image(path), model.config.image_size, fit) for path in images]
    steps = model.generate(torch.tensor([ids]), torch.stack(pixels) if pixels else None, max_new_tokens=n)
    return tokenizer.decode([int(step) for step in steps])


# --- questions ---------------------------------------------------------------------------------------


def test_one_question_as_typed(folders):
    flags = ("--weights", folders["owl2"], "--image", WIDE, "--max-new-tokens", 12, "--device", "cpu")
    result = typed(*flags, "--prompt", "What is this?")
    assert result.returncode == 0
    model = load_model(folders["owl2"])
    expected = expected_answer(model, ["<image>What is this?", None], [WIDE], "square", 12)
    assert result.stdout == expected + "\n"
    assert result.stderr == f"{folders['owl2']} on cpu in float32\n"


def test_answers_are_the_models_own(folders, capsys):
    for style, fit in (("owl1", "stretch"), ("owl2", "square")):
        weights = ("--weights", folders[style], "--max-new-tokens", 8, "--device", "cpu")
        model = load_model(folders[style])

        text_only = expected_answer(model, ["Hello </s> there", None], [], fit, 8)
        assert answered(capsys, *weights, "--prompt", "Hello </s> there")[0] == text_only + "\n"

        # The mark takes the first image; the second is left over, and comes first.
        images = ("--image", TALL, "--image", WIDE)
        placed = expected_answer(model, ["<image>Is <image> red?", None], [WIDE, TALL], fit, 8)
        assert answered(capsys, *weights, *images, "--prompt", "Is <|image|> red?")[0] == placed + "\n"

        padded = expected_answer(model, ["<image>What?", None], [WIDE], "pad", 8)
        assert answered(capsys, *weights, "--image", WIDE, "--fit", "pad", "--prompt", "What?")[0] == padded + "\n"


def test_embedded_model_is_announced(folders, capsys, monkeypatch):
    monkeypatch.setattr(sample, "TINY", folders["owl2"])
    stdout, stderr = answered(capsys, "--prompt", "What?", "--max-new-tokens", 2, "--top-k", 5)
    assert stdout.count("\n") == 1
    assert "easy-VQA" in stderr and "MAGAer13/mplug-owl2-llama2-7b" in stderr
    assert "--top-p change nothing" in stderr


def test_seeds(folders, capsys):
    flags = ("--weights", folders["owl2"], "--prompt", "Why?", "--max-new-tokens", 12, "--temperature", 1)
    flags += ("--top-k", 50, "--top-p", 0.9)
    answers = [answered(capsys, *flags, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_adapter(folders, tmp_path, capsys):
    model = load_model(folders["owl2"])
    lora.wrap(model, ("q_proj", "v_proj.multiway.0"), rank=4, alpha=8)
    torch.manual_seed(1)
    for _, module in lora.adapted(model):
        torch.nn.init.normal_(module.lora_B.weight)
    lora.save(model, tmp_path, official=lambda name: official_name(name, "owl2"))
    lora.merge(model)
    flags = ("--weights", folders["owl2"], "--prompt", "What?", "--max-new-tokens", 8, "--device", "cpu")
    adapted = answered(capsys, *flags, "--adapter", tmp_path)[0]
    assert adapted == expected_answer(model, ["What?", None], [], "square", 8) + "\n"
    assert adapted != answered(capsys, *flags)[0]
    refused(capsys, "no Linear of the model takes", *flags[2:], "--weights", folders["owl1"], "--adapter", tmp_path)


def test_device_and_dtype(folders, capsys, monkeypatch):
    flags = ("--weights", folders["owl2"], "--prompt", "What?", "--max-new-tokens", 2)
    assert "cpu in bfloat16" in answered(capsys, *flags, "--device", "cpu", "--dtype", "bfloat16")[1]
    if torch.cuda.is_available():
        assert "cuda:0 in bfloat16" in answered(capsys, *flags)[1]

    config = PRESETS["tiny-owl2"]()
    assert sample.pick_dtype("auto", torch.device("mps"), config, False) == torch.bfloat16
    assert sample.pick_dtype("auto", torch.device("cpu"), config, False) == torch.float32
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # a machine of a million bytes
    assert sample.pick_dtype("auto", torch.device("cpu"), config, False) == torch.bfloat16
    assert sample.pick_dtype("float32", torch.device("cpu"), config, False) == torch.float32
    assert sample.pick_dtype("auto", torch.device("cpu"), config, True) == torch.bfloat16


def test_stream():
    tokenizer = Tokenizer(TEXT)
    for seed in range(200):
        generator = random.Random(seed)  # half of the tokens are single bytes, and seldom make characters
        ids = [generator.choice((generator.randrange(3, 259), generator.randrange(2000))) for _ in range(40)]
        said = []
        assert "".join(sample.stream(iter(ids), tokenizer, said)) == tokenizer.decode(ids)
        assert said == ids

    text = "An owl 🦉 says  ツ\nand 日本語."
    pieces = list(sample.stream(iter(tokenizer.encode(text)), tokenizer, []))
    assert "".join(pieces) == text
    assert "🦉" in "".join(pieces[: len(pieces) // 2])  # it did not wait for the end
    assert not any("\ufffd" in piece for piece in pieces)


# --- the conversation --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["owl1", "owl2"])
def test_a_next_turn_reads_only_what_is_new(folders, capsys, monkeypatch, style):
    """And answers as if it had read it all; an image is encoded once."""
    model = load_model(folders[style])
    conversation = sample.Conversation(model.config, Tokenizer(TEXT), "square")
    args = sample.parse(["--max-new-tokens", "6"])
    read, encoded = [], []
    model.llama.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    model.vit.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    messages: list[str | None] = []
    n_before = 0
    for turn, question in enumerate(("What is it?", "And this?", "Why?", "Sure?")):
        images = [WIDE] if turn < 2 else []
        for image in images:
            conversation.show(image)
        ids = conversation.ask(question)
        read.clear()
        encoded.clear()
        sample.answer(model, conversation, ids, args)
        text = capsys.readouterr().out.removesuffix("\n")
        assert encoded == [1] * len(images)
        assert read[0] <= len(ids) - n_before and set(read[1:]) <= {1}
        n_before = len(ids) - 1  # at least the question has been read
        assert conversation.read[: len(ids)] == ids
        messages += ["<image>" * len(images) + question, None]
        shown = [WIDE] * min(turn + 1, 2)
        assert text == expected_answer(load_model(folders[style]), messages, shown, "square", 6)
        messages[-1] = conversation.messages[-1]


def test_conversation():
    config = PRESETS["tiny-owl2"]()
    tokenizer = Tokenizer(TEXT)
    conversation = sample.Conversation(config, tokenizer, "square")
    conversation.show(WIDE)
    with pytest.raises(ValueError, match="marks"):
        conversation.ask("<image> <|image|>")
    assert conversation.messages == [] and len(conversation.waiting) == 1

    ids = conversation.ask("What </s> <s> is \udcff this?")
    assert ids.count(tokenizer.eos_id) == 0 and ids.count(tokenizer.bos_id) == 1
    assert [image.shape for image in conversation.images] == [(3, 64, 64)]
    conversation.answered("an <image> of it")  # the model's mark asks for no image
    conversation.ask("And now?")
    assert len(conversation.images) == 1
    assert conversation.messages == ["<image>What </s> <s> is ? this?", "an   of it", "And now?", ""]
    with pytest.raises(ValueError, match="/reset"):
        conversation.ask("more " * 1000)
    assert len(conversation.messages) == 4


def test_strange_images(folders, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me right": the camera was held upright
    image.save(tmp_path / "rotated.png", exif=exif)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("P").save(tmp_path / "transparent.png", transparency=3)
    image.convert("RGBA").save(tmp_path / "rgba.webp", lossless=True)
    image.convert("1").save(tmp_path / "black and white.png")
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    image.save(tmp_path / "animated.gif", save_all=True, append_images=[image.rotate(90), image.rotate(180)])

    config = PRESETS["tiny-owl2"]()
    conversation = sample.Conversation(config, Tokenizer(TEXT), "square")
    conversation.show(tmp_path / "rotated.png")
    upright = to_pixels(image.transpose(Image.Transpose.ROTATE_270), 64, "square")
    assert torch.equal(conversation.waiting[0], upright)

    flags = ["--weights", folders["owl2"], "--prompt", "What?", "--max-new-tokens", 2]
    for path in tmp_path.iterdir():
        flags += ["--image", path]
    stdout, stderr = answered(capsys, *flags)
    assert stdout.count("\n") == 1 and stderr.count("\n") == 1


# --- mistakes ----------------------------------------------------------------------------------------


def test_help_and_wrong_arguments_do_not_wait_for_torch():
    help_page = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "sample.py"), "--help"], capture_output=True, text=True
    )
    assert help_page.returncode == 0
    assert "torch" not in help_page.stderr
    assert "--temperature 0.7" in help_page.stdout and "/reset" in help_page.stdout

    wrong = [
        ("--prompt", ""),
        ("--prompt", "  \n"),
        ("--prompt",),
        ("--promt", "a"),
        ("a.jpg",),
        ("--fit", "round"),
        ("--device", "tpu"),
        ("--dtype", "int8"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "hot"),
        ("--top-k", "0"),
        ("--top-k", "1.5"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--max-new-tokens", "0"),
    ]
    for arguments in wrong:
        start = time.monotonic()
        result = typed(*arguments)
        expect_sentence(result.returncode, result.stdout, result.stderr, "see --help")
        assert time.monotonic() - start < 20
    for fit in FITS:
        assert sample.parse(["--fit", fit]).fit == fit


def test_wrong_files(folders, tmp_path, capsys):
    good = folders["owl2"]
    ask = ("--prompt", "What?", "--max-new-tokens", 2)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    refused(capsys, "there is no folder", *ask, "--weights", tmp_path / "nowhere")
    refused(capsys, "config.json", *ask, "--weights", tmp_path)

    unknown = copy("unknown")
    (unknown / "config.json").write_text('{"model_type": "bert"}')
    refused(capsys, "bert", *ask, "--weights", unknown)

    truncated = copy("truncated")
    shard = truncated / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100_000])
    refused(capsys, "corrupt", *ask, "--weights", truncated)
    shard.unlink()
    refused(capsys, "is missing", *ask, "--weights", truncated)

    wordless = copy("wordless")
    (wordless / "tokenizer.model").write_bytes(b"not a tokenizer")
    refused(capsys, "not a SentencePiece model", *ask, "--weights", wordless)
    (wordless / "tokenizer.model").unlink()
    refused(capsys, "no tokenizer", *ask, "--weights", wordless)

    small = copy("small")
    config = small / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 2000', '"vocab_size": 512'))
    refused(capsys, "2000 tokens, more than the model's 512", *ask, "--weights", small)

    adapter = tmp_path / "adapter"
    refused(capsys, "is not an adapter", *ask, "--weights", good, "--adapter", adapter)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    (adapter / "adapter_model.safetensors").write_bytes(b"junk")
    refused(capsys, "corrupt", *ask, "--weights", good, "--adapter", adapter)


def test_wrong_images_and_prompts(folders, tmp_path, capsys):
    ask = ("--weights", folders["owl2"], "--prompt", "What?")
    broken = tmp_path / "broken.png"
    broken.write_bytes(WIDE.read_bytes()[:1000])
    Image.new("1", (11_000, 11_000)).save(tmp_path / "huge.png")
    Image.new("1", (60_000, 1)).save(tmp_path / "line.png")
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("missing.jpg", "broken.png", "huge.png", "text.jpg", "."):
        refused(capsys, "Cannot read the image", *ask, "--image", tmp_path / name)
    refused(capsys, "too long", *ask, "--image", tmp_path / "line.png")

    few = ("--weights", folders["owl2"], "--image", WIDE)
    refused(capsys, "more than its images", *few, "--prompt", "<image> and <|image|>?")
    refused(capsys, "at most 3000", *few, "--prompt", "long " * 4000)
    refused(capsys, "no device", *ask, "--device", "cuda:99")


def test_wrong_as_typed(folders, tmp_path):
    broken = Path(shutil.copytree(folders["owl1"], tmp_path / "broken"))
    (broken / "model-00001-of-00001.safetensors").write_bytes(b"\0" * 1000)
    result = typed("--weights", broken, "--prompt", "What?")
    expect_sentence(result.returncode, result.stdout, result.stderr, "corrupt")


def test_a_bug_is_not_taken_for_a_mistake(folders, monkeypatch):
    def generate(*arguments: object, **options: object):
        raise ValueError("a bug")

    monkeypatch.setattr(Owl, "generate", generate)
    with pytest.raises(ValueError, match="a bug"):
        sample.main(["--weights", str(folders["owl2"]), "--prompt", "What?"])


# --- the chat ----------------------------------------------------------------------------------------


def test_chat_through_a_pipe(folders):
    lines = [
        "/image nowhere.png",
        "What is this?",
        "",
        f"/image '{TALL}'",
        "And <image> now?",
        "too long " * 3000,
        "<image>?",
        "/jump",
        "/help",
        "/reset",
        "Hello",
        "/quit",
        "never asked",
    ]
    flags = ("--weights", folders["owl1"], "--image", WIDE, "--max-new-tokens", 8, "--device", "cpu")
    result = typed(*flags, stdin="\n".join(lines))
    assert result.returncode == 0

    model = load_model(folders["owl1"])
    first = expected_answer(model, ["<image>What is this?", None], [WIDE], "stretch", 8)
    history = ["<image>What is this?", first, "And <image> now?", None]
    second = expected_answer(model, history, [WIDE, TALL], "stretch", 8)
    third = expected_answer(model, ["Hello", None], [], "stretch", 8)
    assert result.stdout == f"{first}\n{second}\n{third}\n"

    notices = result.stderr.splitlines()
    assert len(notices) == 9  # device, greeting, and one for each line that is no question
    for number, words in enumerate(("on cpu", "/image PATH", "nowhere.png", "next question", "/reset starts afresh")):
        assert words in notices[number]
    for number, words in enumerate(("more than its images", "no command /jump", "/image PATH", "forgotten"), start=5):
        assert words in notices[number]


def test_ctrl_c_stops_one_question(folders):
    flags = ("--weights", folders["owl2"], "--prompt", "Tell me all.", "--max-new-tokens", 3000)
    process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    start = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert start + stdout.strip()
    assert b"Traceback" not in stderr


def test_ctrl_c_in_a_chat_at_a_terminal(folders):
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        command("--weights", folders["owl2"], "--max-new-tokens", 3000, "--device", "cpu"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that the terminal's Ctrl-C goes to it
        env=environment(),
    )
    os.close(terminal)
    screen = b""

    def wait_for(words: bytes) -> bytes:
        """Reads on until these words are on the screen, and returns what stood before them."""
        nonlocal screen
        while words not in screen:
            screen += os.read(keyboard, 4096)
        before, screen = screen.split(words, 1)
        return before

    def wait_for_answer() -> None:
        nonlocal screen
        while len(screen) < 20:
            screen += os.read(keyboard, 4096)

    def press(keys: bytes) -> None:
        os.write(keyboard, keys)

    def give_up(*_: object) -> None:
        process.kill()
        raise TimeoutError(f"on the screen is {screen!r}")

    old_handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(90)
    try:
        wait_for(b"> ")
        press(b"Tell me all.\n")
        wait_for(b"Tell me all.")
        wait_for_answer()
        press(b"\x03")
        answer = wait_for(b"(stopped)")
        assert len(answer) < 15_000  # it would have gone on
        wait_for(b"> ")
        press(b"And more?\n")
        wait_for(b"And more?")
        wait_for_answer()
        press(b"\x03")
        wait_for(b"(stopped)")
        wait_for(b"> ")
        time.sleep(1)  # between showing its prompt and listening to the keyboard, readline is deaf for a moment
        press(b"\x03")
        wait_for(b"(once more to leave)")
        wait_for(b"> ")
        time.sleep(1)
        press(b"\x03")
        assert process.wait(timeout=30) == 0
        assert b"Traceback" not in screen
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
        process.kill()
        os.close(keyboard)


def test_an_interrupted_answer_stays_in_the_conversation(folders, capsys):
    model = load_model(folders["owl2"])
    conversation = sample.Conversation(model.config, Tokenizer(TEXT), "square")
    args = sample.parse(["--max-new-tokens", "50"])
    ids = conversation.ask("Tell me all.")

    def interrupted_steps(*arguments: object, **options: object):
        for number, step in enumerate(Owl.generate(model, *arguments, **options)):
            if number == 5:
                raise KeyboardInterrupt
            yield step

    model.generate = interrupted_steps
    with pytest.raises(KeyboardInterrupt):
        sample.answer(model, conversation, ids, args)
    partial = capsys.readouterr().out.removesuffix("\n")
    assert conversation.messages == ["Tell me all.", partial]
    assert partial == expected_answer(load_model(folders["owl2"]), ["Tell me all.", None], [], "square", 5)
