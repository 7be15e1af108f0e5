"""Fast decoding: the tokens of the plain loop, in one answer and in chats, and what makes a step fast."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import Batch, assert_close, assert_gradients_close, collect, gradients, make_batch, make_config, make_owl
from conftest import VARIANTS, needs_cuda, pad_rows, small_vocab_owl
from common.device import not_finite
from generate import Sampling, generate
from inference import fast_decode
from inference.fast_decode import CAPTURE_COST, N_WARMUP, DecodeState, FastDecoder, Graphs, Steps, decode_step
from inference.fast_decode import rows_to_keep, use_column_major_weights
from llama import KVCache, Llama
from model import IMAGE_TOKEN_ID, Owl
from test_generate import SAMPLED, SIZES, assert_same_tokens

pytestmark = pytest.mark.usefixtures("no_near_ties")

BUCKET = 16  # instead of 256, so that few tokens fill several

SETTINGS = {
    "greedy": {},
    "no stop": {"stop_at_eos": False},
    "min 6": {"min_new_tokens": 6},
    "sampled": {"sampling": SAMPLED},
    "sampled, no stop": {"sampling": Sampling(1.3, top_p=0.9, seed=3), "stop_at_eos": False},
    "top_k": {"sampling": Sampling(0.7, top_k=5, seed=2)},
}


@pytest.fixture(autouse=True)
def small_bucket(monkeypatch):
    monkeypatch.setattr(fast_decode, "BUCKET", BUCKET)


class RecordedGraph(TorchDispatchMode):
    """Stands in for a CUDA graph: records the operations that run in it, and replays them on the same tensors.

    As on CUDA, capturing does not run them: what they wrote is restored at the end.
    """

    def __init__(self, log: list[str]):
        super().__init__()
        self.log = log
        self.operations = []
        self.overwritten = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten.append((value, value.clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.log.append("capture")
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)

    def replay(self) -> None:
        self.log.append("replay")
        for func, args, kwargs, outputs in self.operations:
            results = func(*args, **kwargs)
            for result, output in zip(*((x,) if isinstance(x, Tensor) else x for x in (results, outputs))):
                if result.data_ptr() != output.data_ptr():  # otherwise a view, or written in place
                    output.copy_(result)

    def pool(self) -> None:
        return None


@pytest.fixture
def simulate_cuda(monkeypatch):
    """simulate_cuda() -> a context in which CPU tensors claim to be on CUDA, and graphs are RecordedGraphs.

    It returns a list that receives "capture", "replay", "copy" (of tokens, started) and "wait" (for a copy).
    """

    @contextlib.contextmanager
    def simulation() -> Iterator[list[str]]:
        log = []

        class LoggedCopy:
            def __init__(self, tensor: Tensor):
                log.append("copy")
                self.tensor = tensor.clone()

            def wait(self) -> Tensor:
                log.append("wait")
                return self.tensor

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
            patch.setattr(torch.cuda, "CUDAGraph", lambda: RecordedGraph(log))
            patch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
            patch.setattr(fast_decode, "AsyncCopy", LoggedCopy)
            yield log

    return simulation


@pytest.fixture
def make_generate(simulate_cuda):
    """make_generate(kind, model) -> a function like generate.generate, without `model`.

    kind: "plain", "fast", "mixed" (alternately plain and fast) or "graphs" (fast, with simulated CUDA graphs).
    """

    def make(kind: str, model: Owl) -> Callable[..., Iterator[Tensor]]:
        decoder = FastDecoder(model)

        def with_graphs(*args, **kwargs) -> Iterator[Tensor]:
            with simulate_cuda():
                yield from decoder.generate(*args, **kwargs)

        plain, fast = functools.partial(generate, model), FastDecoder(model).generate
        kinds = {"plain": [plain], "fast": [fast], "mixed": [plain, fast], "graphs": [with_graphs]}
        generators = itertools.cycle(kinds[kind])
        return lambda *args, **kwargs: next(generators)(*args, **kwargs)

    return make


# ----------------------------------------------------------------------------------------------------
# One answer


@pytest.mark.parametrize("kind, variant", [("fast", "owl1"), ("graphs", "owl2")])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_of_the_plain_loop(make_generate, kind, variant, settings):
    """One row and ragged rows, with and without images, also where rows end at the context at different steps."""
    for context, sizes in ((90, [(4, 1)]), (90, SIZES), (38, [(9, 0), (20, 0), (1, 0), (2, 0)])):
        model = small_vocab_owl(variant, context)
        batch = make_batch(model.config, sizes)
        arguments = {"prompt_lengths": batch.lengths, "max_new_tokens": 40, **settings}
        expected = collect(generate(model, batch.ids, batch.images, **arguments))
        tokens = collect(make_generate(kind, model)(batch.ids, batch.images, **arguments))
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("kind", ["fast", "graphs"])
@pytest.mark.parametrize("length, n", [(5, 0), (5, 1), (5, 2), (22, 5), (21, 5)])
def test_few_tokens(make_generate, kind, length, n):
    """Also for a prompt that is as long as the context."""
    model = small_vocab_owl(context=22)
    batch, settings = make_batch(model.config, [(length, 0)]), {"max_new_tokens": n, "stop_at_eos": False}
    expected = collect(generate(model, batch.ids, **settings))
    assert torch.equal(collect(make_generate(kind, model)(batch.ids, **settings)), expected)


@pytest.mark.parametrize("kind", ["fast", "graphs"])
@pytest.mark.parametrize("settings", [{}, {"sampling": SAMPLED}, {"sampling": Sampling(1.5)}], ids=str)
def test_finished_rows_are_dropped(make_generate, record_calls, kind, settings):
    """As soon as half of the rows have finished; not from a cache. Unseeded rows keep their random numbers."""
    model = small_vocab_owl()
    batch = make_batch(model.config, [(2 + n, 0) for n in range(9)])
    arguments = {"prompt_lengths": batch.lengths, "max_new_tokens": 30, **settings}
    torch.manual_seed(0)
    expected = collect(generate(model, batch.ids, **arguments))
    calls = record_calls(model.llama)
    for cache, dropped in ((None, True), (model.llama.make_cache(9, 64), False)):
        torch.manual_seed(0)
        assert torch.equal(collect(make_generate(kind, model)(batch.ids, cache=cache, **arguments)), expected)
        sizes = [len(x) for x, _ in calls]
        assert sizes == sorted(sizes, reverse=True)
        assert (len(set(sizes)) > 1) == dropped
        calls.clear()


@pytest.mark.parametrize("kind", ["plain", "fast", "graphs"])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_numbers_that_are_not_finite_end_decoding_with_their_origin(make_generate, kind, sampling):
    model = make_owl(make_config("owl2", llama={"vocab_size": 12}))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = make_batch(model.config, [(4, 1), (6, 0)])
    arguments = {"prompt_lengths": batch.lengths, "max_new_tokens": 12, "stop_at_eos": False, "sampling": sampling}

    def error_with(images: Tensor | None, ids: Tensor = batch.ids) -> str:
        with pytest.raises(ValueError, match="not finite") as caught:
            collect(make_generate(kind, model)(ids, images, **arguments))
        return str(caught.value)

    for name in ("vit.blocks.0.mlp.fc1.weight", "llama.layers.1.mlp.gate_proj.weight", "llama.lm_head.weight"):
        for value in (torch.nan, torch.inf):
            model.state_dict()[name][-1, -1] = value
            assert name in error_with(batch.images)
            model.load_state_dict(state)

    # Finite weights whose products overflow: in the vision encoder, in visual tokens encoded before, in the decoder.
    model.vit.post_norm.weight.data.fill_(3e38)
    assert "visual tokens" in error_with(batch.images)
    model.load_state_dict(state)
    visual = model.encode_images(batch.images).detach()
    visual[0, 0, 0] = torch.nan
    assert "visual tokens" in error_with(visual)
    model.llama.norm.weight.data.fill_(3e38)
    assert "the logits" in error_with(batch.images)
    model.load_state_dict(state)

    # A later step, by a token that the prompt does not have, and only in one row.
    model.llama.embed_tokens.weight.data[4:] = torch.nan
    model.llama.lm_head.weight.data[:4] = 0
    assert "embed_tokens" in error_with(None, torch.full_like(batch.ids, 3))
    assert "try bfloat16 or float32" in str(not_finite(model.half(), None))


@pytest.mark.parametrize("kind", ["fast", "graphs"])
def test_a_limit_of_any_size_is_only_a_limit(make_generate, kind):
    model = small_vocab_owl(context=38)
    batch = make_batch(model.config, [(4, 0)])
    arguments = {"max_new_tokens": 10**15, "stop_at_eos": False, "sampling": SAMPLED}
    expected = collect(generate(model, batch.ids, **arguments))
    assert torch.equal(collect(make_generate(kind, model)(batch.ids, **arguments)), expected)


# ----------------------------------------------------------------------------------------------------
# Several turns with one cache


class Chat:
    """Conversations of B rows with one cache, and all their tokens, from which each answer can be recomputed."""

    def __init__(self, model: Owl, B: int):
        size = model.config.image_size
        self.model = model
        self.cache = model.llama.make_cache(B, model.config.llama.context)
        self.ids = [torch.zeros(0, dtype=torch.int64) for _ in range(B)]
        self.images = [torch.zeros(0, 3, size, size) for _ in range(B)]

    def ask(self, batch: Batch) -> dict:
        """Appends a question to each row. Returns what generate needs: the tokens that the cache does not hold."""
        for i, (ids, images) in enumerate(batch.rows):
            self.ids[i] = torch.cat([self.ids[i], ids[0]])
            if images is not None:
                self.images[i] = torch.cat([self.images[i], images])
        pending = [ids[n:] for ids, n in zip(self.ids, self.cache.lengths.tolist())]
        ids, lengths = pad_rows(pending, filler=7)
        return {"ids": ids, "images": batch.images, "prompt_lengths": lengths, "cache": self.cache}

    def check_turn(self, function: Callable, batch: Batch, n_read: int | None = None, **settings) -> list[int]:
        """Reads n_read tokens of each answer and compares them with the answers to whole conversations.

        Returns how many tokens of each row the cache does not hold.
        """
        iterator = function(**self.ask(batch), **settings)
        tokens = collect(itertools.islice(iterator, n_read))
        iterator.close()
        answers = []
        for i, (ids, images) in enumerate(zip(self.ids, self.images)):
            whole = generate(self.model, ids[None], images, **settings)
            answers.append(collect(itertools.islice(whole, n_read))[0])
            self.ids[i] = torch.cat([ids, answers[i]])
        assert_same_tokens(tokens, answers)
        return [len(ids) - n for ids, n in zip(self.ids, self.cache.lengths.tolist())]


@pytest.mark.parametrize("kind, variant", [("plain", "owl2"), ("fast", "owl1"), ("mixed", "owl2"), ("graphs", "owl1")])
def test_a_chat_equals_whole_conversations(make_generate, kind, variant):
    """With images in any turn, greedy or sampled, and answers that end at </s>, are cut short, or are left early."""
    model = small_vocab_owl(variant, context=160)
    function = make_generate(kind, model)
    generator = torch.Generator().manual_seed(1)
    n_missing = set()
    for B, settings in ((1, {}), (2, {"stop_at_eos": False}), (3, {}), (3, {"sampling": SAMPLED})):
        chat = Chat(model, B)
        for turn, n_read in enumerate((None, 1, 4, None)):
            sizes = torch.randint(1, 9, (B,), generator=generator), torch.randint(0, 3, (B,), generator=generator)
            batch = make_batch(model.config, zip(*(x.tolist() for x in sizes)), seed=turn)
            n_missing.update(chat.check_turn(function, batch, n_read, max_new_tokens=6 + turn, **settings))
    # All but the last token; CUDA is one step ahead of a reader that leaves early.
    assert n_missing == ({0, 1} if kind == "graphs" else {1})


@pytest.mark.parametrize("kind", ["plain", "fast", "graphs"])
def test_a_chat_fills_the_context(make_generate, kind):
    """One row reaches the end while the other goes on, then no prompt fits. Padding may reach past the end."""
    model = small_vocab_owl(context=22)
    function = make_generate(kind, model)
    chat = Chat(model, 2)
    settings = {"stop_at_eos": False}
    chat.check_turn(function, make_batch(model.config, [(12, 0), (2, 0)]), max_new_tokens=4, **settings)
    chat.check_turn(function, make_batch(model.config, [(3, 0), (12, 0)]), max_new_tokens=4, **settings)
    assert chat.cache.lengths.tolist() == [22, 21]
    with pytest.raises(ValueError, match="context"):
        next(function(**chat.ask(make_batch(model.config, [(1, 0), (1, 0)]))))


def test_truncate_to_any_length(make_generate):
    """From one token more than the cache holds down to none; each time another question follows."""
    model = small_vocab_owl()
    function = make_generate("mixed", model)
    chat = Chat(model, 2)
    chat.check_turn(function, make_batch(model.config, [(9, 0), (5, 0)]), max_new_tokens=6, stop_at_eos=False)
    for n in range(15, -1, -2):
        expected = chat.cache.lengths.clamp(max=n)
        chat.cache.truncate(n)
        assert torch.equal(chat.cache.lengths, expected)
        chat.ids = [ids[:length] for ids, length in zip(chat.ids, expected.tolist())]
        batch = make_batch(model.config, [(3, 0), (1, 0)], seed=n)
        chat.check_turn(function, batch, max_new_tokens=4, stop_at_eos=False)


def test_several_questions_after_one_image(make_generate):
    """The image is encoded and processed once; truncate goes back to it before each further question."""
    model = small_vocab_owl()
    n_visual = model.config.n_visual_tokens
    prefix = torch.cat([torch.tensor([3, 4, 5]), torch.full((n_visual,), IMAGE_TOKEN_ID)])
    image = make_batch(model.config, [(1, 1)]).images
    function, cache = make_generate("mixed", model), model.llama.make_cache(1, 64)
    for i in range(4):
        question = torch.randint(3, 12, (4,), generator=torch.Generator().manual_seed(i))
        expected = collect(generate(model, torch.cat([prefix, question])[None], image, max_new_tokens=6))
        cache.truncate(len(prefix))
        ids = question if i else torch.cat([prefix, question])
        tokens = collect(function(ids[None], None if i else image, max_new_tokens=6, cache=cache))
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("n_passes", [0, 1, 3])
def test_an_interrupted_pass_leaves_the_cache_usable(make_generate, kind, n_passes):
    """Ctrl-C during the prefill (0) or a later pass, after the first layer has written to the cache."""
    model = small_vocab_owl()
    function = make_generate(kind, model)
    chat = Chat(model, 2)
    chat.check_turn(function, make_batch(model.config, [(6, 0), (4, 0)]), max_new_tokens=3, stop_at_eos=False)
    before = chat.cache.lengths.tolist()
    passes = itertools.count()

    def interrupt(*_) -> None:
        if next(passes) == n_passes:
            raise KeyboardInterrupt

    handle = model.llama.layers[1].register_forward_pre_hook(interrupt)
    question = chat.ask(make_batch(model.config, [(3, 0), (5, 0)], seed=1))
    tokens = []
    with pytest.raises(KeyboardInterrupt):
        for token in function(**question, max_new_tokens=9, stop_at_eos=False):
            tokens.append(token)
    handle.remove()
    assert len(tokens) == n_passes
    if n_passes == 0:
        assert chat.cache.lengths.tolist() == before
    else:
        chat.ids = [torch.cat([ids, answer]) for ids, answer in zip(chat.ids, collect(tokens))]
    batch = make_batch(model.config, [(2, 0), (1, 0)])
    assert chat.check_turn(make_generate("plain", model), batch, max_new_tokens=5, stop_at_eos=False) == [1, 1]


# ----------------------------------------------------------------------------------------------------
# A step: nothing is read from the device, nothing moves, and graphs replay it


def make_steps(llama: Llama, sampling: Sampling, device: str = "cpu", max_length: int = 50) -> Steps:
    """Steps of three rows that never end, from an empty cache."""
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    eos_bias = torch.zeros((), device=device)
    state = DecodeState(zeros, zeros.bool(), zeros.float(), eos_bias, sampling, stop_at_eos=False)
    cache = KVCache(llama.config, 3, max_length, torch.device(device), torch.float32)
    return Steps(decode_step, False, llama, cache, state, Graphs(state))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.7, 5, 0.9)], ids=["greedy", "all", "top"])
def test_a_step_does_not_synchronize(variant, sampling):
    """With tensors that have shapes but no values: an operation that needs a value raises."""
    with FakeTensorMode(), torch.no_grad():
        steps = make_steps(Llama(make_config(variant).llama), sampling)
        for n in range(1, 5):
            steps.state.stop_at_eos = n > 2
            steps.run(n, n_left=9)
        assert steps.state.token.shape == (3,)
        with pytest.raises(DataDependentOutputException):
            bool(steps.state.finished[0])


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_step_works_in_place(sampling):
    steps = make_steps(small_vocab_owl().llama, sampling)
    state, cache = steps.state, steps.cache

    def addresses() -> list[int]:
        tensors = (state.token, state.finished, state.uniform, state.eos_bias, cache.k, cache.v, cache.lengths)
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    with torch.inference_mode():
        for n in range(1, 10):
            steps.run(n, n_left=9)
            assert addresses() == before
            assert cache.lengths.tolist() == [n] * 3


def test_one_graph_per_bucket(simulate_cuda):
    """In each bucket, N_WARMUP steps run eagerly, then one is captured and the others are replayed."""
    model = small_vocab_owl(context=160)
    batch = make_batch(model.config, [(BUCKET - 10, 0)])
    plain, cache = (model.llama.make_cache(1, 160) for _ in range(2))
    settings = {"max_new_tokens": 40, "stop_at_eos": False}
    expected = collect(generate(model, batch.ids, cache=plain, **settings))
    with simulate_cuda() as log:
        assert torch.equal(collect(FastDecoder(model).generate(batch.ids, cache=cache, **settings)), expected)
    assert cache.lengths.tolist() == plain.lengths.tolist() == [BUCKET - 10 + 39]
    n = int(cache.lengths)
    assert_close(cache.k[:, :, :, :n], plain.k[:, :, :, :n])
    assert_close(cache.v[:, :, :, :n], plain.v[:, :, :, :n])
    # Of the 39 steps, 10 attend to one bucket, 16 to two and 13 to three.
    assert log.count("capture") == 3
    assert log.count("replay") == 39 - 3 * N_WARMUP
    assert [item for item in log if item in ("capture", "replay")][:3] == ["capture", "replay", "replay"]


def test_graphs_are_kept_for_later_answers(simulate_cuda):
    """Also for fewer rows, another seed and other lengths; other sampling and a larger cache need new ones."""
    model = small_vocab_owl(context=160)
    decoder = FastDecoder(model)
    caches = []

    def n_captured(sizes: list[tuple[int, int]], max_new_tokens: int = 14, **settings) -> int:
        batch = make_batch(model.config, sizes, seed=len(caches))
        settings |= {"prompt_lengths": batch.lengths, "max_new_tokens": max_new_tokens}
        expected = collect(generate(model, batch.ids, batch.images, **settings))
        with simulate_cuda() as log:
            assert torch.equal(collect(decoder.generate(batch.ids, batch.images, **settings)), expected)
        caches.append(decoder.own_cache)
        return log.count("capture")

    endless = {"stop_at_eos": False}
    assert n_captured([(2, 0)] * 4, **endless) == 1
    assert n_captured([(1, 0), (2, 0), (2, 0), (1, 0)], **endless) == 0
    assert n_captured([(2, 0)] * 3, **endless) == 1  # the first three rows of the same cache
    assert n_captured([(1, 0)] * 3, **endless) == n_captured([(1, 0)] * 4, **endless) == 0
    assert n_captured([(2, 0)] * 4, sampling=Sampling(1.3, seed=1), **endless) == 1
    assert n_captured([(2, 0)] * 4, sampling=Sampling(1.3, seed=2), **endless) == 0
    assert len(set(map(id, caches))) == 1
    assert n_captured([(2, 1)] * 4, 40, **endless) > 1 and caches[-1] is not caches[0]
    assert n_captured([(2, 0)] * 4, **endless) == 0 and caches[-1] is caches[-2]
    assert len(decoder.graphs) == 2
    caches.clear()
    assert len(decoder.graphs) == 1  # what belongs to the replaced cache is freed with it


def test_graphs_are_kept_when_rows_are_dropped(simulate_cuda, monkeypatch):
    """The number of rows is halved each time, so that the next batch finds graphs for it."""
    monkeypatch.setattr(fast_decode, "N_WARMUP", 0)
    monkeypatch.setattr(fast_decode, "CAPTURE_COST", 0)
    model = small_vocab_owl()
    batch = make_batch(model.config, [(2 + n, 0) for n in range(9)])
    settings = {"prompt_lengths": batch.lengths, "max_new_tokens": 40}
    decoder, expected = FastDecoder(model), collect(generate(model, batch.ids, **settings))
    counts = []
    for _ in range(2):
        with simulate_cuda() as log:
            assert torch.equal(collect(decoder.generate(batch.ids, **settings)), expected)
        counts.append(log.count("capture"))
    [graphs] = decoder.graphs.values()
    n_rows = {shape.n_row for shape in graphs.captured}
    assert {9, 4} <= n_rows <= {9, 4, 2, 1}
    assert counts == [len(graphs.captured), 0]


@pytest.mark.parametrize("finished, kept", [("0000", "0123"), ("0100", "0123"), ("0101", "02"), ("1101", "2")])
def test_rows_that_are_kept(finished, kept):
    assert rows_to_keep(torch.tensor(list(map(int, finished)))).tolist() == list(map(int, kept))


def test_short_answers_are_not_captured(simulate_cuda):
    """Until as many eager steps have run, over all answers, as a capture costs."""
    model = small_vocab_owl()
    decoder, ids = FastDecoder(model), torch.full((1, 4), 3)
    settings = {"max_new_tokens": 4, "stop_at_eos": False}
    expected = collect(generate(model, ids, **settings))
    n_captured = []
    for _ in range(4):
        with simulate_cuda() as log:
            assert torch.equal(collect(decoder.generate(ids, **settings)), expected)
        n_captured.append(log.count("capture"))
    assert CAPTURE_COST == 8  # three steps per answer: the third answer captures its last one
    assert n_captured == [0, 0, 1, 0]


@pytest.mark.parametrize("on_cuda", [False, True])
def test_two_answers_at_a_time(simulate_cuda, on_cuda):
    """They do not share a cache. An answer that is left early gives up its own."""
    model = small_vocab_owl()
    batches = [make_batch(model.config, [(n, 0)]) for n in (4, 9)]
    settings = {"max_new_tokens": 12, "stop_at_eos": False}
    expected = [collect(generate(model, batch.ids, **settings)) for batch in batches]
    decoder = FastDecoder(model)
    for n_read in (12, 12, 5, 12):
        with simulate_cuda() if on_cuda else contextlib.nullcontext():
            pairs = zip(*(decoder.generate(batch.ids, **settings) for batch in batches))
            tokens = zip(*itertools.islice(pairs, n_read))
            assert all(torch.equal(torch.stack(row, dim=1), e[:, :n_read]) for row, e in zip(tokens, expected))


@pytest.mark.parametrize("kind", ["fast", "graphs"])
def test_an_answer_after_one_that_is_not_finite(make_generate, kind):
    """NaN in a cache do not reach the next answer, although a step of fixed size reads beyond its tokens."""
    model = small_vocab_owl()
    function = make_generate(kind, model)
    good, bad = (make_batch(model.config, [(n, 1)], seed=n) for n in (2, 12))
    expected = collect(generate(model, good.ids, good.images, max_new_tokens=8))
    for cache in (None, model.llama.make_cache(1, 64)):
        with pytest.raises(ValueError, match="visual tokens"):
            collect(function(bad.ids, bad.images.fill_(torch.nan), max_new_tokens=8, cache=cache))
        assert torch.equal(collect(function(good.ids, good.images, max_new_tokens=8, cache=cache)), expected)


def test_the_host_reads_tokens_one_step_late(simulate_cuda):
    model = small_vocab_owl()
    with simulate_cuda() as log:
        tokens = FastDecoder(model).generate(torch.full((1, 4), 3), max_new_tokens=6, stop_at_eos=False)
        next(tokens)
        assert log == ["copy", "copy", "wait"]
        collect(tokens)
    copies = [item for item in log if item in ("copy", "wait")]
    assert copies == ["copy"] + 5 * ["copy", "wait"] + ["wait"]


# ----------------------------------------------------------------------------------------------------
# A compiled step


@pytest.fixture
def compiled():
    """A model and a FastDecoder with a compiled step; nothing is compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    model = make_owl(make_config("owl2", llama={"vocab_size": 12, "context": 160, "n_kv_head": 2}), seed=5)
    yield model, FastDecoder(model, compile=True)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"sampling": SAMPLED}], ids=["greedy", "sampled"])
def test_compiled_equals_plain(compiled, settings):
    """Over several buckets; no graph break; three parts, each compiled once for one row and once for several."""
    model, decoder = compiled
    settings = {"max_new_tokens": 20, "stop_at_eos": False, **settings}
    for n_compiled, batches in ((1, ([(BUCKET - 10, 1)], [(40, 0)])), (2, (SIZES, [(4, 0), (30, 0)]))):
        for sizes in batches:
            batch = make_batch(model.config, sizes)
            caches = [model.llama.make_cache(len(sizes), 100) for _ in range(2)]
            arguments = {"prompt_lengths": batch.lengths, **settings}
            expected = collect(generate(model, batch.ids, batch.images, cache=caches[0], **arguments))
            address = caches[1].k.data_ptr()
            tokens = collect(decoder.generate(batch.ids, batch.images, cache=caches[1], **arguments))
            assert torch.equal(tokens, expected)
            assert caches[1].k.data_ptr() == address
            assert torch.equal(caches[1].lengths, caches[0].lengths)
            for i, n in enumerate(caches[0].lengths.tolist()):
                assert_close(caches[1].k[:, i, :, :n], caches[0].k[:, i, :, :n])
        assert counters["stats"]["unique_graphs"] == 3 * n_compiled
    assert sum(counters["graph_break"].values()) == 0


@pytest.mark.slow
def test_all_kinds_of_compiled_steps_in_one_process(compiled, monkeypatch):
    """Each way to sample is a program of its own; together they exceed torch's default limit of 8.

    (Traced but then run as they are: generating C++ for all would take minutes.)
    """
    model, _ = compiled
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, options, **how: compile(step, backend="eager", **how))
    decoder = FastDecoder(model, compile=True)
    limits = ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9})
    samplings = [Sampling(), *(Sampling(1.0, seed=1, **limit) for limit in limits)]
    for B, sampling, stop_at_eos in itertools.product((1, 2), samplings, (True, False)):
        arguments = {"max_new_tokens": 3, "sampling": sampling, "stop_at_eos": stop_at_eos}
        ids = make_batch(model.config, B * [(4, 0)]).ids
        for _ in range(2):
            assert torch.equal(collect(decoder.generate(ids, **arguments)), collect(generate(model, ids, **arguments)))
    assert 8 < counters["stats"]["unique_graphs"] - 4 <= 2 * len(samplings) * 2  # less the parts that do not sample


# ----------------------------------------------------------------------------------------------------
# Column-major weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_column_major_weights_change_nothing(variant):
    """Except the strides of wide float32 matrices: equal weights, logits, tokens and gradients."""
    config = make_config(variant, llama={"vocab_size": 100, "n_mlp": 80})
    plain, column_major = make_owl(config, seed=5), make_owl(config, seed=5)
    use_column_major_weights(column_major.llama)
    names = [name for name, parameter in column_major.named_parameters() if not parameter.is_contiguous()]
    wide = [f"llama.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("gate", "up")]
    assert names == [*wide, "llama.lm_head.weight"]
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in column_major.state_dict().items())

    batch = make_batch(config, [(9, 1), (9, 1)])
    with torch.no_grad():
        assert_close(column_major(batch.ids, batch.images)[0], plain(batch.ids, batch.images)[0])
    tokens = [collect(generate(model, batch.ids, batch.images, max_new_tokens=20)) for model in (plain, column_major)]
    assert torch.equal(*tokens)

    losses = [model(batch.ids, batch.images, batch.ids.clamp(min=0))[1] for model in (plain, column_major)]
    assert_gradients_close(gradients(column_major, losses[1]), gradients(plain, losses[0]))

    plain.bfloat16()
    use_column_major_weights(plain.llama)
    assert all(parameter.is_contiguous() for parameter in plain.parameters())


# ----------------------------------------------------------------------------------------------------
# CUDA


def cuda_answers(model: Owl, function: Callable) -> list[Tensor]:
    """Answers to one row and to ragged rows, greedy and sampled, over several buckets."""
    device = model.llama.lm_head.weight.device
    answers = []
    for sizes in ([(BUCKET - 10, 0)], [(BUCKET - 10, 0), (3, 0)], [(n, 0) for n in (4, 9, 2, 7, 5, 3)]):
        batch = make_batch(model.config, sizes)
        for settings in SETTINGS.values():
            arguments = {"prompt_lengths": batch.lengths, "max_new_tokens": 30, **settings}
            answers.append(collect(function(batch.ids.to(device), **arguments)))
    return answers


@needs_cuda
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_equal_the_plain_loop_on_cpu_and_cuda(compile):
    config = make_config("owl2", llama={"vocab_size": 12, "context": 160, "n_kv_head": 2})
    on_cpu, on_cuda = make_owl(config, seed=5), make_owl(config, seed=5).cuda()
    answers = cuda_answers(on_cuda, FastDecoder(on_cuda, compile).generate)
    for model in (on_cpu, on_cuda):
        for answer, expected in zip(answers, cuda_answers(model, functools.partial(generate, model)), strict=True):
            assert torch.equal(answer, expected)


@needs_cuda
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_no_step_synchronizes_on_cuda(sampling):
    """Neither an eager one nor a replayed one."""
    llama = make_owl(make_config("owl2", llama={"vocab_size": 12, "n_kv_head": 2})).cuda().llama
    steps = make_steps(llama, sampling, "cuda", max_length=BUCKET)
    with torch.no_grad():
        for n in range(1, N_WARMUP + 2):
            steps.run(n, n_left=CAPTURE_COST)  # the last one is captured, which synchronizes
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.run_eagerly(BUCKET)
            for n in range(N_WARMUP + 3, BUCKET):
                steps.run(n, n_left=CAPTURE_COST)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [shape.attend_len for shape in steps.graphs.captured] == [BUCKET]
