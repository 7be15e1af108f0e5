"""sample.py from the command line: questions, user errors, chats, Ctrl-C."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import device
import lora
import sample
from conftest import GOLDEN, ROOT, needs_cuda
from data.image import load_image, to_pixels
from data.text import Tokenizer, expand_images, render_prompt
from common.files import read_json, write_json
from generate import Sampling, generate
from inference import fast_decode, loading
from inference.adapter import save_lora
from inference.chat import ChatSession, Conversation, stream_text
from inference.loading import select_device, select_dtype
from inference.quantize import BITS
from model import Owl
from training.distributed import init_distributed
from training.presets import PRESETS, init_weights
from weights import load_model, save_model

TEXT = GOLDEN / "text"
WIDE = TEXT / "images" / "syn_l_190x120.png"
TALL = TEXT / "images" / "syn_rgba_150x200.png"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder of each variant, with random weights that never generate </s>."""
    folders = {}
    for variant in ("owl1", "owl2"):
        torch.manual_seed(0)
        config = PRESETS[f"tiny-{variant}"]()
        config.llama.vocab_size = 2000
        config.llama.context = 3000  # so that an answer is long enough to be interrupted
        model = init_weights(Owl(config))
        model.llama.lm_head.weight.data[config.llama.eos_id] = 0
        folders[variant] = tmp_path_factory.mktemp(variant)
        save_model(model, folders[variant])
        shutil.copy(TEXT / "tokenizer.model", folders[variant])
    return folders


def run_sample(capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of sample.py in this process."""
    code = 0
    try:
        sample.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def assert_user_error(result: tuple[int, str, str], keyword: str) -> None:
    """A user error is exit code 2 and one line."""
    code, stdout, stderr = result
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and keyword in stderr, stderr


def expected_answer(model: Owl, messages: list[str | None], images: list[Path], fit: str, n: int) -> str:
    """The greedy answer, computed without sample.py."""
    tokenizer = Tokenizer(TEXT)
    ids = render_prompt(messages, tokenizer, model.config.variant)
    ids, _ = expand_images(ids, None, model.config.n_visual_tokens)
    pixels = [to_pixels(load_image(path), model.config.image_size, fit) for path in images]
    tokens = generate(model, torch.tensor([ids]), torch.stack(pixels) if pixels else None, max_new_tokens=n)
    return tokenizer.decode([int(token) for token in tokens])


def make_session(folder: Path, n: int) -> ChatSession:
    model = load_model(folder)
    conversation, cache = Conversation(model.config, Tokenizer(TEXT), "square"), model.llama.make_cache(1, 3000)
    return ChatSession(
        model, conversation, partial(generate, model), sampling=Sampling(), max_new_tokens=n, cache=cache
    )


@pytest.mark.parametrize("variant, fit", [("owl1", "stretch"), ("owl2", "square")])
def test_answers_are_those_of_the_model(folders, capsys, variant, fit):
    weights = ("--weights", folders[variant], "--max-new-tokens", 8, "--device", "cpu")
    model = load_model(folders[variant])
    text_only = expected_answer(model, ["Hello </s> there", None], [], fit, 8)
    code, stdout, stderr = run_sample(capsys, *weights, "--prompt", "Hello </s> there")
    assert (code, stdout, stderr.count("\n")) == (0, text_only + "\n", 1) and "cpu in float32" in stderr

    # The placeholder stands for the first image; the second image has none and comes before the text.
    images = ("--image", TALL, "--image", WIDE)
    expected = expected_answer(model, ["<image>Is <image> red?", None], [WIDE, TALL], fit, 8)
    assert run_sample(capsys, *weights, *images, "--prompt", "Is <|image|> red?")[1] == expected + "\n"

    padded = expected_answer(model, ["<image>What?", None], [WIDE], "pad", 8)
    assert run_sample(capsys, *weights, "--image", WIDE, "--fit", "pad", "--prompt", "What?")[1] == padded + "\n"


def test_seeds(folders, capsys):
    flags = f"--weights {folders['owl2']} --prompt Why? --max-new-tokens 12 --temperature 1 --top-k 50 --top-p 0.9"
    answers = [run_sample(capsys, *flags.split(), "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_adapter(folders, tmp_path, capsys):
    model = load_model(folders["owl2"])
    plain = expected_answer(model, ["What?", None], [], "square", 8)
    lora.inject_lora(model, ("q_proj", "v_proj.multiway.0"), rank=4, alpha=8)
    torch.manual_seed(1)
    for _, module in lora.lora_modules(model):
        torch.nn.init.normal_(module.lora_B.weight)
    save_lora(model, tmp_path)
    lora.merge_lora(model)
    flags = ("--prompt", "What?", "--max-new-tokens", 8, "--device", "cpu", "--adapter", tmp_path, "--weights")
    answer = run_sample(capsys, *flags, folders["owl2"])[1]
    assert answer == expected_answer(model, ["What?", None], [], "square", 8) + "\n" != plain + "\n"
    assert "bits" in run_sample(capsys, *flags, folders["owl2"], "--quantize", "int4")[2]
    assert_user_error(run_sample(capsys, *flags, folders["owl1"]), "adapter")


def test_dtype(folders, capsys, monkeypatch):
    flags = ("--weights", folders["owl2"], "--prompt", "What?", "--max-new-tokens", 2)
    assert "cpu in bfloat16" in run_sample(capsys, *flags, "--device", "cpu", "--dtype", "bfloat16")[2]
    if torch.cuda.is_available():
        assert "cuda:0 in bfloat16" in run_sample(capsys, *flags)[2]

    config, cpu = PRESETS["tiny-owl2"](), torch.device("cpu")
    assert select_dtype("auto", torch.device("mps"), config, False) == torch.bfloat16
    assert select_dtype("auto", cpu, config, True) == torch.bfloat16
    for has_bfloat16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: has_bfloat16)
        assert select_dtype("auto", cpu, config, False) == dtype
        assert select_dtype("float32", cpu, config, False) == torch.float32
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # a machine with a million bytes of memory
    assert select_dtype("auto", cpu, config, False) == torch.bfloat16
    assert select_dtype("float32", cpu, config, False) == torch.float32


@needs_cuda
@pytest.mark.parametrize("flags", [("--dtype", "float32"), ("--dtype", "bfloat16"), *(("--quantize", to) for to in BITS)])
def test_answers_on_cuda_equal_those_on_a_cpu(capsys, flags):
    """Of the embedded model, which is sure of each token."""
    flags += ("--image", ROOT / "assets" / "scene.png", "--prompt", "Describe the image.")
    expected, answer = (run_sample(capsys, "--device", device, *flags) for device in ("cpu", "cuda"))
    assert answer[:2] == expected[:2] and len(answer[1].split()) > 10


def test_compile_happens_once_before_the_first_answer(folders, capsys, monkeypatch):
    """With a step that only records what is printed before each call, since compiling takes a minute."""
    printed = []

    def step(*arguments: object) -> None:
        printed.append(capsys.readouterr().out)
        fast_decode.decode_step(*arguments)

    def broken_step(*arguments: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nsecond line")

    flags = ("--weights", folders["owl2"], "--prompt", "What?", "--max-new-tokens", 4, "--device", "cpu")
    plain = run_sample(capsys, *flags)[1]
    monkeypatch.setattr(fast_decode, "compile_step", lambda: step)
    last = run_sample(capsys, *flags, "--compile")[1]
    assert printed[0] == "" and len(printed) == 1 + 3  # one step to compile, three for the answer
    assert "".join(printed) + last == plain

    monkeypatch.setattr(fast_decode, "compile_step", lambda: broken_step)
    code, _, stderr = run_sample(capsys, *flags, "--compile")
    assert code == 2 and "no compiler" in stderr


def test_text_is_streamed():
    tokenizer = Tokenizer(TEXT)
    for seed in range(50):
        generator = random.Random(seed)  # half of the tokens are single bytes, which seldom form characters
        ids = [generator.choice((generator.randrange(3, 259), generator.randrange(2000))) for _ in range(40)]
        seen = []
        assert "".join(stream_text(iter(ids), tokenizer, seen)) == tokenizer.decode(ids)
        assert seen == ids

    text = "An owl 🦉 says  ツ\nand 日本語."
    parts = list(stream_text(iter(tokenizer.encode(text)), tokenizer, []))
    assert "".join(parts) == text
    assert "🦉" in "".join(parts[: len(parts) // 2])  # it did not wait for the end
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("variant", ["owl1", "owl2"])
def test_a_turn_processes_only_new_tokens(folders, variant):
    """And its answer equals the one of a new session; an image is encoded once."""
    session = make_session(folders[variant], 6)
    conversation = session.conversation
    processed, encoded = [], []
    session.model.llama.register_forward_hook(lambda _, inputs, __: processed.append(inputs[0].shape[1]))
    session.model.vit.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    history, shown, n_cached = [], [], 0
    for question, image in (("What is it?", [WIDE]), ("And this?", [WIDE]), ("Why?", [])):
        for path in image:
            conversation.add_image(path)
        shown += image
        history += ["<image>" * len(image) + question, None]
        conversation.ask(question)
        n_prompt = len(conversation.prompt_ids)
        processed.clear()
        encoded.clear()
        history[-1] = "".join(session.answer())
        assert history[-1] == expected_answer(load_model(folders[variant]), [*history[:-1], None], shown, "square", 6)
        assert encoded == [1] * len(image)
        assert processed[0] <= n_prompt - n_cached and set(processed[1:]) <= {1}
        n_cached = n_prompt - 1  # at least the question is in the cache

    # After /reset nothing of the cache is used, even for an equal prompt with another image.
    session.run_command("/reset")
    conversation.add_image(TALL)
    conversation.ask("What is it?")
    expected = expected_answer(load_model(folders[variant]), ["<image>What is it?", None], [TALL], "square", 6)
    assert "".join(session.answer()) == expected


def test_text_of_a_conversation_is_literal():
    tokenizer = Tokenizer(TEXT)
    conversation = Conversation(PRESETS["tiny-owl2"](), tokenizer, "square")
    conversation.add_image(WIDE)
    conversation.ask("What </s> <s> is \udcff this?")
    ids = conversation.prompt_ids
    assert ids.count(tokenizer.eos_id) == 0 and ids.count(tokenizer.bos_id) == 1
    conversation.set_answer("an <image> of it")  # a placeholder that the model generated stands for no image
    conversation.ask("And now?")
    assert len(conversation.images) == 1
    assert conversation.messages == ["<image>What </s> <s> is ? this?", "an   of it", "And now?", ""]


def test_help_does_not_import_torch():
    command = [sys.executable, "-X", "importtime", str(ROOT / "sample.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "torch" not in result.stderr
    assert "--temperature 0.7" in result.stdout and "/reset" in result.stdout


def test_missing_packages_are_named():
    """As with a Python outside the environment; -S hides the installed packages."""
    command = [sys.executable, "-S", str(ROOT / "sample.py"), "--prompt", "What?"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert_user_error((result.returncode, result.stdout, result.stderr), "source .venv/bin/activate")


INVALID = ["--prompt=", "--prompt", "--promt=a", "a.jpg", "--fit=round", "--device=tpu", "--dtype=int8", "--top-k=0"]
INVALID += ["--temperature=-1", "--temperature=nan", "--top-p=0", "--top-p=1.1", "--seed=-1", f"--seed={2**64}"]


@pytest.mark.parametrize("flag", [*INVALID, "--max-new-tokens=0"])
def test_invalid_flags(capsys, flag):
    assert_user_error(run_sample(capsys, flag), flag.split("=")[0].strip("-").split("-")[0])


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b'{"model_type": "bert"}'),
        ("model-00001-of-00001.safetensors", b"\0" * 1000),
        ("tokenizer.model", b"not a tokenizer"),
        ("tokenizer.model", None),
        ("adapter_model.safetensors", b"junk"),
    ],
)
def test_missing_and_damaged_files(folders, tmp_path, capsys, name, content):
    folder = Path(shutil.copytree(folders["owl2"], tmp_path / "model"))
    flags = ("--prompt", "What?", "--weights", folder)
    if name.startswith("adapter"):
        flags += ("--adapter", folder)
        (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    assert_user_error(run_sample(capsys, *flags), name)


def test_unusable_inputs(folders, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(WIDE.read_bytes()[:1000])
    folder = shutil.copytree(folders["owl2"], tmp_path / "model")
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace('"vocab_size": 2000', '"vocab_size": 512'))
    cases = {
        "nowhere": ("--weights", tmp_path / "nowhere"),
        "2000": ("--weights", folder),
        "no-adapter": ("--adapter", tmp_path / "no-adapter"),
        "missing.jpg": ("--image", tmp_path / "missing.jpg"),
        "broken.png": ("--image", tmp_path / "broken.png"),
        "placeholders": ("--image", WIDE, "--prompt", "<image> and <|image|>?"),
        "context": ("--prompt", "long " * 4000),
        "cuda:99": ("--device", "cuda:99"),
    }
    for keyword, flags in cases.items():
        assert_user_error(run_sample(capsys, "--weights", folders["owl2"], "--prompt", "What?", *flags), keyword)


def test_bugs_keep_their_traceback(folders, monkeypatch):
    monkeypatch.setattr(ChatSession, "answer", lambda session: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample.main(["--weights", str(folders["owl2"]), "--prompt", "What?"])


def test_chat_in_a_pipe(folders, capsys, monkeypatch):
    lines = ["/image nowhere.png", "What is this?", "", f"/image '{TALL}'", "And <image> now?", "too long " * 3000]
    lines += ["<image>?", "/jump\x1b[2J", "/help", "/reset", "Hello", "/quit", "never asked"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    flags = ("--weights", folders["owl1"], "--image", WIDE, "--max-new-tokens", 8, "--device", "cpu")
    code, stdout, stderr = run_sample(capsys, *flags)

    model = load_model(folders["owl1"])
    first = expected_answer(model, ["<image>What is this?", None], [WIDE], "stretch", 8)
    history = ["<image>What is this?", first, "And <image> now?", None]
    second = expected_answer(model, history, [WIDE, TALL], "stretch", 8)
    third = expected_answer(model, ["Hello", None], [], "stretch", 8)
    assert code == 0 and stdout == f"{first}\n{second}\n{third}\n"

    # One line for the settings, one for the start, and one for each input line that is not a question.
    keywords = ("on cpu", "/image PATH", "nowhere.png", "next question", "/reset", "placeholders", "/jump\\x1b")
    for line, keyword in zip(stderr.splitlines(), keywords + ("/image PATH", "forgotten"), strict=True):
        assert keyword in line


def test_ctrl_c_and_a_closed_pipe_end_an_answer(folders):
    command = [sys.executable, ROOT / "sample.py", "--weights", folders["owl2"], "--prompt", "Tell me all."]
    command += ["--max-new-tokens", "3000"]
    interrupted, unread = (subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2))
    first = os.read(interrupted.stdout.fileno(), 1)
    interrupted.send_signal(signal.SIGINT)
    stdout, stderr = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert first + stdout.strip() and b"Traceback" not in stderr

    os.read(unread.stdout.fileno(), 1)
    unread.stdout.close()
    assert b"Error" not in unread.stderr.read()
    assert unread.wait(timeout=60) == 1


def test_ctrl_c_in_a_chat(folders, capsys, monkeypatch):
    """It stops an answer, and the conversation keeps the text generated so far. Pressed twice, it ends the chat."""
    lines = iter(["Tell me all.", KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "never asked"])
    printed = []

    def read(prompt: str) -> str:
        if (line := next(lines)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def interrupted_print(*values: object, **options: object) -> None:
        printed.extend(values)
        if len(printed) == 5:
            raise KeyboardInterrupt

    session = make_session(folders["owl2"], 50)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sample, "print", interrupted_print, raising=False)
    sample.chat(session)
    stderr = capsys.readouterr().err
    assert next(lines) == "never asked" and "(stopped)" in stderr and stderr.count("once more") == 2

    assert session.conversation.messages == ["Tell me all.", "".join(printed)]
    assert session.cached_ids == (session.conversation.prompt_ids + session.answer_ids)[: len(session.cached_ids)]
    n = len(session.answer_ids)
    expected = expected_answer(load_model(folders["owl2"]), ["Tell me all.", None], [], "square", n)
    assert session.conversation.messages[1] == expected.rstrip("\ufffd") and 5 <= n < 50


@pytest.mark.parametrize(
    "written",
    ["{0}", '"{0}"', "{1}", "file://{2}", "file://localhost{2}", "{0}  ", "'{3}'"],
    ids=["plain", "quoted", "backslashes", "url", "url with a host", "trailing space", "quoted quote"],
)
def test_paths_as_terminals_write_them(folders, tmp_path, written):
    folder = tmp_path / "My Photos"
    folder.mkdir()
    path = folder / ("it's a.png" if "3" in written else "a (1).png")
    shutil.copy(WIDE, path)
    escaped = re.sub(r"([ ()])", r"\\\1", str(path))
    written = written.format(path, escaped, str(path).replace(" ", "%20"), str(path).replace("'", "'\\''"))
    session = make_session(folders["owl2"], 6)
    session.run_command(f"/image {written}")
    session.run_command(f"/image\t{written}")
    assert [list(pixels.shape) for pixels in session.conversation.pending] == [[3, 64, 64]] * 2


def test_an_answer_has_no_control_characters(folders, capsys):
    """But the conversation keeps the text of the model."""
    session = make_session(folders["owl2"], 6)
    text = "red\x1b]0;title\x07\r\x9b2J\n\tréd\u3000日本"
    session.decode = lambda *_, **__: iter(session.conversation.tokenizer.encode(text))
    session.conversation.ask("What?")
    sample.print_answer(session)
    assert capsys.readouterr().out == "red\\x1b]0;title\\x07\\r\\x9b2J\n\tréd\u3000日本\n"
    assert session.conversation.messages[-1] == text


@pytest.mark.parametrize("is_chat", [False, True])
def test_numbers_that_are_not_finite_are_a_user_error(folders, tmp_path, monkeypatch, capsys, is_chat):
    folder = shutil.copytree(folders["owl2"], tmp_path / "model")
    model = load_model(folder)
    model.llama.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    save_model(model, folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What?\nAnd now?")))
    prompt = () if is_chat else ("--prompt", "What?")
    code, stdout, stderr = run_sample(capsys, "--weights", folder, "--device", "cpu", *prompt)
    assert code == 2 and stdout.strip() == ""
    assert "down_proj.weight" in stderr and stderr.count("error: ") == 1 and "Traceback" not in stderr


def test_no_control_character_of_an_answer_or_a_name_is_printed(folders, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(folders["owl2"], tmp_path / "a\x1b[2J\nb")
    monkeypatch.setattr(ChatSession, "answer", lambda session: (text for text in ("a\x1b[2J\x9b", "\r\nb\t\u200d")))
    code, stdout, stderr = run_sample(capsys, "--weights", folder, "--prompt", "What?", "--device", "cpu")
    assert (code, stdout) == (0, "a\\x1b[2J\\x9b\\r\nb\t\u200d\n"), stderr
    assert "\x1b" not in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--device=", "--device=cuda:-1", "--device=cuda:x", "--device=cpu:x", "--dtype="])
def test_devices_and_dtypes_that_do_not_exist(folders, capsys, flag):
    flags = ("--weights", folders["owl2"], "--prompt", "What?", flag)
    assert_user_error(run_sample(capsys, *flags), flag.strip("-").split("=")[0])


def test_huge_numbers_and_names(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["owl2"], tmp_path / "model")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"max_position_embeddings": 40})
    flags = ("--weights", folder, "--prompt", "What?", "--device", "cpu")
    short = run_sample(capsys, *flags, "--max-new-tokens", 3000)
    assert run_sample(capsys, *flags, "--max-new-tokens", 10**12)[:2] == short[:2]
    assert run_sample(capsys, *flags, "--top-k", 10**30, "--temperature", 1, "--max-new-tokens", 2)[0] == 0
    for name in ("a" * 300, "a/" * 5000):
        assert_user_error(run_sample(capsys, "--prompt", "What?", "--weights", name), name[:100])


def test_float32_is_not_tf32(monkeypatch):
    """Both device selections turn off TF32, of convolutions and of matrix products."""
    for select in (partial(select_device, "cpu"), partial(init_distributed, "cpu")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        torch.set_float32_matmul_precision("high")
        select()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("command", ["sample.py --prompt What?", "evaluate.py --data rows.json"])
def test_without_the_modules_that_windows_lacks(tmp_path, command):
    """os.sysconf, fcntl and resource do not exist there; an empty module stands in for msvcrt."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    hide = "import asyncio, os, runpy, subprocess, sys, types; del os.sysconf; "  # Python's asyncio needs it on Linux
    hide += "sys.modules |= {'fcntl': None, 'resource': None}; "
    hide += "sys.modules['msvcrt'] = types.ModuleType('msvcrt'); sys.path[0] = sys.argv[1]; sys.argv = sys.argv[2:]; "
    hide += "runpy.run_path(os.path.join(sys.path[0], sys.argv[0]), run_name='__main__')"
    arguments = [sys.executable, "-c", hide, ROOT, *command.split(), "--device", "cpu"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


@pytest.mark.parametrize(
    "chosen, expected", [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_openmp_threads_spin_briefly_unless_the_user_chooses(chosen, expected):
    code = "import command, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | chosen, capture_output=True, text=True)
    assert result.stdout == f"{expected} False\n", result.stderr


def test_the_memory_of_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert device.device_memory(torch.device("cpu")) == 16 * 2**30
