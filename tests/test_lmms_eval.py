"""tools/lmms_eval.py with a stub in place of lmms-eval: each answer and score is that of a plain loop, alone.

Once run with the real package, lmms-eval 0.7.3 (docs/harnesses.md); the stub has what the model class uses of it.
"""

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import GOLDEN, ROOT, make_config, make_owl
from data.image import load_image, to_pixels
from generate import Sampling, generate
from inference.batch import encode_prompt, score_choices
from weights import save_model

SIZE = 28
COLORS = ("red", "green", "blue", "white")


class StubBase:
    def __init__(self):
        self.task_dict = {}

    @classmethod
    def create_from_arg_string(cls, text: str, others: dict) -> "StubBase":
        return cls(**dict(item.split("=") for item in text.split(",")), **others)


@pytest.fixture
def module(monkeypatch):
    """tools.lmms_eval, imported with a stub of the package."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "tools.lmms_eval"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = StubBase
    del sys.modules["tools.lmms_eval"]
    return importlib.import_module("tools.lmms_eval")


@pytest.fixture(scope="module", params=("owl1", "owl2"))
def weights(request, tmp_path_factory) -> Path:
    """The folder of a tiny random model with a context of 128, and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_owl(
        make_config(
            request.param, vit={"image_size": SIZE, "patch_size": 14}, llama={"vocab_size": 2000, "context": 128}
        )
    )
    model.tokenizer_folder = GOLDEN / "text"
    save_model(model, folder)
    return folder


def make_lm(module, weights, documents: list[dict], batch_size: int | str = 3):
    lm = module.OwletModel(pretrained=str(weights), batch_size=batch_size, device="cpu", max_batch_size=None)
    lm.task_dict = {"task": {"test": documents}}
    return lm


def make_documents() -> list[dict]:
    """Documents with 0 to 2 images, questions of different lengths, and an answer."""
    documents = []
    for i in range(7):
        images = [Image.new("RGB", (20 + 9 * i, 30), COLORS[(i + k) % 4]) for k in range(i % 3)]
        documents.append({"images": images, "question": f"Question {'very ' * i}long?", "answer": COLORS[i % 4]})
    return documents


def visuals(document: dict) -> list[Image.Image]:
    return document["images"]


def ask_requests(documents: list[dict], **settings) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(args=(document["question"], dict(settings), visuals, i, "task", "test"))
        for i, document in enumerate(documents)
    ]


def plain_answer(lm, document: dict, max_new_tokens: int) -> str:
    """The answer of generate.generate to one document, its images before its text."""
    question = "<image>" * len(document["images"]) + document["question"]
    ids = torch.tensor([encode_prompt(question, lm.model, lm.tokenizer)])
    images = [to_pixels(image, SIZE, lm.fit) for image in document["images"]]
    tokens = generate(lm.model, ids, torch.stack(images) if images else None, max_new_tokens=max_new_tokens)
    return lm.tokenizer.decode([int(token) for token in tokens])


@pytest.mark.usefixtures("no_near_ties")
def test_answers_equal_a_plain_loop_in_the_order_of_the_requests(module, weights):
    documents = make_documents()
    lm = make_lm(module, weights, documents)
    requests = ask_requests(documents)
    for i, request in enumerate(requests):  # two limits, so that the requests do not form batches as they come
        request.args[1]["max_new_tokens"] = (4, 7)[i % 2]
    answers = lm.generate_until(requests)
    assert answers == [plain_answer(lm, document, (4, 7)[i % 2]) for i, document in enumerate(documents)]
    assert len(set(answers)) > 3


@pytest.mark.usefixtures("no_near_ties")
def test_an_answer_ends_before_the_first_stop(module, weights):
    documents = make_documents()[:3]
    lm = make_lm(module, weights, documents)
    whole = lm.generate_until(ask_requests(documents, max_new_tokens=6))
    stop = whole[0][3:5]
    assert stop
    for until in (stop, [stop], ["not in it", stop, whole[0][4:], ""]):
        requests = ask_requests(documents, max_new_tokens=6, until=until)
        assert lm.generate_until(requests)[0] == whole[0].split(stop)[0] != whole[0]
        assert requests[0].args[1]["until"] == until  # lmms-eval uses the settings again
    assert lm.generate_until(ask_requests(documents, max_new_tokens=6, until=[])) == whole


def test_settings_of_sampling(module):
    read = module.read_sampling
    for settings in ({}, {"temperature": 0, "top_p": 1.0}, {"temperature": 0.2, "do_sample": False}, {"top_p": None}):
        assert read(settings) == Sampling()
    assert read({"temperature": 0.5, "top_p": 0.9, "do_sample": True}) == Sampling(0.5, top_p=0.9)
    assert read({"temperature": 1, "top_p": 0}) == Sampling(1)


def test_a_temperature_samples(module, weights):
    documents = make_documents()[:1] * 8
    lm = make_lm(module, weights, documents, batch_size=8)
    torch.manual_seed(0)
    answers = lm.generate_until(ask_requests(documents, max_new_tokens=6, temperature=2.0))
    assert len(set(answers)) > 1
    torch.manual_seed(0)  # as lmms-eval does
    assert lm.generate_until(ask_requests(documents, max_new_tokens=6, temperature=2.0)) == answers


def plain_score(lm, document: dict, answer: str) -> tuple[float, bool]:
    question = "<image>" * len(document["images"]) + document["question"]
    prompt, tokens = encode_prompt(question, lm.model, lm.tokenizer), lm.tokenizer.encode(answer)
    images = [to_pixels(image, SIZE, lm.fit) for image in document["images"]]
    with torch.no_grad():
        logits, _ = lm.model(torch.tensor([prompt + tokens]), torch.stack(images) if images else None)
    logits = logits[0, len(prompt) - 1 : -1]  # [number of tokens, vocab_size]
    log_p = logits.log_softmax(dim=-1)[range(len(tokens)), tokens].sum().item()
    return log_p, logits.argmax(dim=-1).tolist() == tokens


def greedy_text(lm, document: dict) -> str:
    """The first tokens of the greedy answer, if their text is tokenized to them again."""
    text = plain_answer(lm, document, 2)
    return text if plain_score(lm, document, text)[1] else ""


def test_scores_equal_a_plain_loop(module, weights):
    """Functions of the document get log-probabilities, choices minus these. Greedy answers are recognized."""
    documents = make_documents()
    lm = make_lm(module, weights, documents)
    answers = [greedy_text(lm, document) or "two words" for document in documents]
    expected = [plain_score(lm, document, answer) for document, answer in zip(documents, answers)]
    assert any(greedy for _, greedy in expected)  # else this would test half
    for document, answer in zip(documents, answers):
        document["answer"] = answer
    for sign, target in ((1, lambda document: document["answer"]), (-1, None)):
        requests = [
            SimpleNamespace(args=(doc["question"], target or " " + doc["answer"], visuals, i, "task", "test"))
            for i, doc in enumerate(documents)  # (a choice begins with lmms-eval's delimiter, a space)
        ]
        for (score, greedy), (log_p, is_greedy) in zip(lm.loglikelihood(requests), expected):
            assert score == pytest.approx(sign * log_p, abs=1e-3) and greedy is is_greedy
    lists = [[answer, f"{answer} no", "the cat sat"] for answer in answers]  # the second begins greedily
    questions = ["<image>" * len(document["images"]) + document["question"] for document in documents]
    pixels = [to_pixels(image, SIZE, lm.fit) for document in documents for image in document["images"]]
    for document, texts, row in zip(
        documents, lists, score_choices(lm.model, lm.tokenizer, questions, pixels, choices=lists)
    ):
        for text, (log_p, greedy) in zip(texts, row):
            reference = plain_score(lm, document, text)
            assert log_p == pytest.approx(reference[0], abs=1e-3) and greedy is reference[1]


def test_choices_of_a_document_share_its_prompt(module, weights, record_calls):
    """Scores are in the order of the requests, and choices of one token need one row of one forward pass."""
    documents = make_documents()[:3]
    lm = make_lm(module, weights, documents)
    pairs = [(i, choice) for choice in ("A", "B", "the cat") for i in (2, 0, 1)]
    requests = [
        SimpleNamespace(args=(documents[i]["question"], choice, visuals, i, "task", "test")) for i, choice in pairs
    ]
    calls = record_calls(lm.model.llama)
    scores = lm.loglikelihood(requests)
    for (i, choice), (score, _) in zip(pairs, scores):
        assert score == pytest.approx(-plain_score(lm, documents[i], choice)[0], abs=1e-3)
    assert [len(ids) for ids, _ in calls[:1]] == [6]  # of 9 choices


def test_scores_reach_the_tasks(module):
    """lmms-eval 0.7.3 makes a text of all that is not text; other outputs are still its own matter."""
    unwrap = module.keep_scores(lambda output: (str(output), None))
    assert unwrap((-1.5, True)) == ((-1.5, True), None)
    assert unwrap("blue") == ("blue", None) and unwrap(("blue", {})) == ("('blue', {})", None)


def test_where_images_go(module):
    place = module.add_placeholders
    assert place("What?", 0) == "What?"
    assert place("What?", 2) == "<image><image>What?"
    assert place("Is <image> older than <|image|>?", 2) == "Is <image> older than <|image|>?"
    assert place("What does <image> mean in HTML?", 0) == "What does < image> mean in HTML?"
    assert place("As in <image>: what?", 2) == "<image><image>As in < image>: what?"


def test_a_prompt_that_exceeds_the_context_is_left_out(module, weights, capsys):
    documents = make_documents()[:3]
    documents[1]["question"] = "word " * 200
    lm = make_lm(module, weights, documents)
    answers = lm.generate_until(ask_requests(documents, max_new_tokens=5))
    assert answers[1] == "" and answers[0] == plain_answer(lm, documents[0], 5)
    assert "task, document 1 is left out" in capsys.readouterr().err
    scored = [SimpleNamespace(args=(d["question"], "red", visuals, i, "task", "test")) for i, d in enumerate(documents)]
    scores = lm.loglikelihood(scored)
    assert scores[1] == (math.inf, False) and scores[0][0] < math.inf
    long = SimpleNamespace(args=("Short?", "red " * 200, visuals, 0, "task", "test"))
    assert lm.loglikelihood([long]) == [(math.inf, False)]


def test_what_is_not_supported_is_an_error(module, weights):
    lm = make_lm(module, weights, [{"images": ["clip.mp4"], "question": "What?"}, {"images": [None], "question": "?"}])
    requests = ask_requests(lm.task_dict["task"]["test"], max_new_tokens=2)
    with pytest.raises(ValueError, match="document 0: only images"):
        lm.generate_until(requests)
    assert lm.generate_until(requests[1:]) == [plain_answer(lm, {"images": [], "question": "?"}, 2)]
    with pytest.raises(ValueError, match="num_beams=5"):
        lm.generate_until(ask_requests(lm.task_dict["task"]["test"][1:], num_beams=5))
    with pytest.raises(NotImplementedError):
        lm.generate_until_multi_round(requests)
    for arguments in ({"batch_size": "auto"}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            module.OwletModel(**{"pretrained": str(weights), **arguments})


def test_an_error_in_the_command_line_is_one_line(module, weights, tmp_path, capsys):
    lm = module.OwletModel.create_from_arg_string(f"pretrained={weights},dtype=bfloat16", {"batch_size": "2"})
    assert lm.batch_size == 2 and lm.model.llama.embed_tokens.weight.dtype == torch.bfloat16
    wrong = [f"pretrained={weights},{name}=other" for name in ("fit", "dtype", "quantize", "adapter")]
    for arguments in (f"pretrained={tmp_path / 'missing'}", *wrong):
        with pytest.raises(SystemExit) as ended:
            module.OwletModel.create_from_arg_string(arguments, {})
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_embedded_model_answers(module):
    """The default model, to an image: with the greedy answer, and with the most probable of three choices."""
    lm = module.OwletModel(batch_size=2, device="cpu")
    question = "what color is the shape?"
    images = [load_image(ROOT / "assets/blue-rectangle.png")]
    lm.task_dict = {"task": {"test": [{"images": images, "question": question}]}}
    [answer] = lm.generate_until(ask_requests(lm.task_dict["task"]["test"], max_new_tokens=8, until="\n"))
    choices = ["red", "blue", "gray"]
    requests = [SimpleNamespace(args=(question, " " + color, visuals, 0, "task", "test")) for color in choices]
    scores = [score for score, _ in lm.loglikelihood(requests)]
    assert answer == "blue" and choices[scores.index(min(scores))] == "blue"


def test_a_missing_package_is_one_line():
    """Also if lmms-eval is installed here: None in sys.modules makes its import fail."""
    code = "import runpy, sys; sys.modules['lmms_eval'] = None; runpy.run_module('tools.lmms_eval', None, '__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "requirements-lmms.txt" in done.stderr
