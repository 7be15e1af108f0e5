"""Decoding: a kept cache against the whole prompt, and each fast way of taking a step against the slow one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import decode
from conftest import pad_rows
from decode import RECORD_AFTER, Decoder, Sampling, State, compiled_step, lay_out, take_step
from llama import BUCKET, Cache, Llama, LlamaConfig, attend_once
from model import IMAGE_ID, Owl
from weights import save_model

STYLES = ("owl1", "owl2")
EOS = 2
DRAWN = {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "seed": 4}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def collect(iterator) -> Tensor:
    """All tokens of a generation, [B, steps]."""
    steps = list(iterator)
    return torch.stack(steps, dim=1) if steps else torch.zeros(0, 0, dtype=torch.int64)


def words(length: int, seed: int = 0) -> Tensor:
    """A text of that many random words, [length]."""
    return torch.randint(3, 12, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def owls(tiny_config, tiny_owl):
    """owls(style="owl2", context=160) -> a tiny owl of 12 words and grouped heads. Made once: leave it as it is."""
    made = {}

    def get(style: str = "owl2", context: int = 160) -> Owl:
        if (style, context) not in made:
            config = tiny_config(style, llama={"vocab_size": 12, "context": context, "n_kv_head": 2})
            made[style, context] = tiny_owl(config, seed=5)
            with torch.no_grad():
                made[style, context].llama.lm_head.weight[EOS] *= 1.3  # </s> often, but not soon
        return made[style, context]

    return get


@pytest.fixture
def watch():
    """watch(module) -> a list to which each of its passes adds (input, output); until the test is over."""
    handles = []

    def start(module: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
        seen = []
        handles.append(module.register_forward_hook(lambda _, given, made: seen.append((given[0], made))))
        return seen

    yield start
    for handle in handles:
        handle.remove()


# ----------------------------------------------------------------------------------------------------
# A kept cache


class Talk:
    """Conversations of B rows in one kept cache; and, the slow way, each of them whole in one prompt."""

    def __init__(self, model: Owl, B: int):
        self.model = model
        self.cache = model.make_cache(B)
        self.history = [torch.zeros(0, dtype=torch.int64) for _ in range(B)]  # all that was asked and said
        self.images = [torch.zeros(0, 3, model.config.image_size, model.config.image_size) for _ in range(B)]

    def ask(self, rows: list[Tensor], images: list[Tensor | None]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Adds a question to each row. Returns what of ids, images and lengths the cache does not hold yet."""
        ids, pictures = [], []
        for i, (row, shown) in enumerate(zip(rows, images)):
            self.history[i] = torch.cat([self.history[i], row])
            ids.append(self.history[i][int(self.cache.lengths[i]) :])
            if shown is not None:
                self.images[i] = torch.cat([self.images[i], shown])
            n_new = int((ids[-1] == IMAGE_ID).sum()) // self.model.config.image_words
            pictures.append(self.images[i][len(self.images[i]) - n_new :])
        ids, lengths = pad_rows(ids)
        return ids, torch.cat(pictures), lengths

    def turn(self, rows: list[Tensor], images: list[Tensor | None], n_seen: int | None = None, **settings) -> Tensor:
        """A question to each row; its answers, [B, steps], which the reader leaves after n_seen tokens."""
        ids, pictures, lengths = self.ask(rows, images)
        iterator = self.model.generate(ids, pictures, lengths, cache=self.cache, **settings)
        tokens = collect(itertools.islice(iterator, n_seen))
        iterator.close()
        for i, said in enumerate(tokens):
            end = int(self.cache.lengths[i]) + 1 - len(self.history[i])  # a row that is over is not asked any more
            self.history[i] = torch.cat([self.history[i], said[:end]])
        return tokens

    def whole(self, n_seen: int | None = None, **settings) -> list[Tensor]:
        """The answer to what was asked so far, for each row alone and with nothing kept."""
        answers = []
        for row, shown in zip(self.history, self.images):
            answers.append(collect(itertools.islice(self.model.generate(row[None], shown, **settings), n_seen))[0])
        return answers


def check_turn(talk: Talk, rows, images, watch, n_seen: int | None = None, **settings) -> set[str]:
    """A turn gives the tokens and logits that the whole conversations give, and computes only what is new.

    Returns what became of the rows: "went on", "ended" at </s>, "full" at the end of the context.
    """
    model, cache = talk.model, talk.cache
    before = cache.lengths.clone()
    asked = [torch.cat([history, row]) for history, row in zip(talk.history, rows)]
    passes, logits = watch(model.llama), watch(model.llama.lm_head)
    tokens = talk.turn(rows, images, n_seen, **settings)
    widths = [given.shape[1] for given, _ in passes]
    ours = [made for _, made in logits]
    if n_seen == 0:
        assert widths == []
        assert torch.equal(cache.lengths, before)
        return set()
    n_new = max(len(row) - int(held) for row, held in zip(asked, before))
    assert widths == [n_new] + [1] * (tokens.shape[1] - 1)

    talk.history, after = asked, talk.history
    alone = talk.whole(n_seen, **settings)
    talk.history = after
    assert tokens.shape[1] == max(len(answer) for answer in alone)
    met = set()
    for i, answer in enumerate(alone):
        assert torch.equal(tokens[i, : len(answer)], answer)
        assert (tokens[i, len(answer) :] == EOS).all()
        assert torch.equal(after[i], torch.cat([asked[i], answer]))
        assert int(cache.lengths[i]) == len(after[i]) - 1
        with torch.no_grad():
            expected = model(after[i][None], talk.images[i])[0][0, len(asked[i]) - 1 : -1]
        close(torch.stack([step[i] for step in ours[: len(answer)]]), expected, 1e-5)
        if cache.lengths[i] == model.config.llama.context:
            met.add("full")
        else:
            met.add("ended" if answer[-1] == EOS and settings.get("stop", True) else "went on")
    return met


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("B", [1, 3])
def test_a_kept_cache_equals_the_whole_conversation(owls, random_row, random_images, watch, style, B):
    """12 random conversations in each of 4 kinds: 2 to 4 turns, each with images or not, cut short or not."""
    model = owls(style)
    generator = torch.Generator().manual_seed(B)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    met = set()
    for _ in range(12):
        talk = Talk(model, B)
        for _ in range(draw(2, 5)):
            counts = [draw(0, 3) for _ in range(B)]
            rows = [random_row(model.config, draw(1, 9), n, generator) for n in counts]
            images = [random_images(model.config, n, generator) for n in counts]
            n_seen = (None, None, 0, 1, 3)[draw(0, 5)]
            met |= check_turn(talk, rows, images, watch, n_seen, max_new_tokens=draw(1, 12), stop=draw(0, 3) > 0)
    assert met == {"went on", "ended"}


@pytest.mark.parametrize("style", STYLES)
def test_a_kept_cache_draws_as_the_whole_conversation(owls, watch, style):
    talk = Talk(owls(style), 2)
    for seed in range(4):
        rows = [words(3 + seed, seed), words(5, seed + 9)]
        check_turn(talk, rows, [None, None], watch, max_new_tokens=8, stop=False, **DRAWN | {"seed": seed})


@pytest.mark.parametrize("style", STYLES)
def test_a_kept_cache_grows_over_several_buckets(owls, random_row, random_images, watch, style):
    """Turns that end before, at and after the borders of buckets, in steps and in prompts; the rows apart."""
    model = owls(style, context=1000)
    generator = torch.Generator().manual_seed(0)
    talk = Talk(model, 2)
    sizes = []
    for lengths, n in (((240, 100), 20), ((1, 3), 2), ((250, 300), 4), ((210, 130), 40)):
        rows = [random_row(model.config, length, 1, generator) for length in lengths]
        images = [random_images(model.config, 1, generator) for _ in rows]
        check_turn(talk, rows, images, watch, max_new_tokens=n, stop=False)
        sizes.append(talk.cache.size)
    assert sizes == [n * BUCKET + 1 for n in (2, 2, 3, 4)]
    assert int(talk.cache.lengths.max()) > 3 * BUCKET


@pytest.mark.parametrize("style", STYLES)
def test_a_kept_cache_up_to_the_end_of_the_context(owls, watch, style):
    """One row reaches the end while the other goes on, and then both do; after which there is no room for a word."""
    model = owls(style, context=22)
    talk = Talk(model, 2)
    check_turn(talk, [words(9, 1), words(2, 2)], [None, None], watch, max_new_tokens=4, stop=False)
    met = check_turn(talk, [words(4, 3), words(1, 4)], [None, None], watch, max_new_tokens=9, stop=False)
    assert met == {"full", "went on"}
    ids, _, lengths = talk.ask([words(1), words(1)], [None, None])
    with pytest.raises(ValueError, match="context of 22"):
        model.generate(ids, lengths=lengths, cache=talk.cache)

    talk = Talk(model, 2)
    check_turn(talk, [words(9, 1), words(2, 2)], [None, None], watch, max_new_tokens=4, stop=False)
    check_turn(talk, [words(4, 3), words(1, 4)], [None, None], watch, max_new_tokens=99, stop=False)
    assert talk.cache.lengths.tolist() == [22, 22]


@pytest.mark.parametrize("B", [1, 2])
def test_a_kept_cache_rewound_to_any_length(owls, watch, B):
    """From one token more than there are down to none; each time other words follow."""
    talk = Talk(owls(), B)
    talk.turn([words(9, 1), words(5, 2)][:B], [None] * B, max_new_tokens=6, stop=False)
    assert int(talk.cache.lengths.max()) == 14
    for n in reversed(range(16)):
        expected = talk.cache.lengths.clamp(max=n)
        talk.cache.rewind(n)
        assert torch.equal(talk.cache.lengths, expected)
        assert talk.cache.longest == int(expected.max())
        talk.history = [history[: int(held)] for history, held in zip(talk.history, expected)]
        check_turn(talk, [words(3, n), words(1, n)][:B], [None] * B, watch, max_new_tokens=4, stop=False)


@pytest.mark.parametrize("style", STYLES)
def test_several_questions_after_one_image(owls, random_images, watch, style):
    """The image is encoded and read once: each further question starts again where the image ended."""
    model = owls(style)
    shown = random_images(model.config, 1, torch.Generator().manual_seed(0))
    prefix = torch.cat([words(3), torch.full((model.config.image_words,), IMAGE_ID)])
    questions = [words(4, seed) for seed in range(4)]
    settings = {"max_new_tokens": 6}
    expected = [collect(model.generate(torch.cat([prefix, q])[None], shown, **settings)) for q in questions]

    encoded, passes = watch(model.vit), watch(model.llama)
    cache = model.make_cache()
    for i, (question, answer) in enumerate(zip(questions, expected)):
        cache.rewind(len(prefix))
        passes.clear()
        ids = question if i else torch.cat([prefix, question])
        tokens = collect(model.generate(ids[None], None if i else shown, cache=cache, **settings))
        assert torch.equal(tokens, answer)
        assert passes[0][0].shape[1] == len(ids)
    assert len(encoded) == 1


@pytest.mark.parametrize("place", range(6))
def test_a_pass_that_is_interrupted_leaves_the_cache_right(owls, watch, place):
    """Ctrl-C within the prompt's pass (the first), or within a step's, after the first layer was written."""
    model = owls()
    talk = Talk(model, 2)
    check_turn(talk, [words(6, 1), words(4, 2)], [None, None], watch, max_new_tokens=3, stop=False)
    before = talk.cache.lengths.clone()
    calls = itertools.count()

    def interrupt(*_):
        if next(calls) == place:
            raise KeyboardInterrupt

    handle = model.llama.layers[1].register_forward_pre_hook(interrupt)
    ids, pictures, lengths = talk.ask([words(3, 3), words(5, 4)], [None, None])
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for tokens in model.generate(ids, pictures, lengths, max_new_tokens=9, stop=False, cache=talk.cache):
            seen.append(tokens)
    handle.remove()
    assert len(seen) == place
    expected = before if place == 0 else before + lengths + place - 1
    assert torch.equal(talk.cache.lengths, expected)
    if seen:
        talk.history = [torch.cat([row, said]) for row, said in zip(talk.history, torch.stack(seen, dim=1))]
    check_turn(talk, [words(2, 5), words(1, 6)], [None, None], watch, max_new_tokens=5, stop=False)


WRONG_TURNS = {
    "one row too few": {"ids": words(4)[None]},
    "one row too many": {"ids": words(12).view(3, 4)},
    "past the context": {"ids": words(2 * 20).view(2, 20)},
    "an image without a place": {"images": torch.zeros(1, 3, 16, 16)},
    "places without an image": {"ids": torch.full((2, 4), IMAGE_ID)},
    "lengths that ids do not have": {"lengths": torch.tensor([4, 5])},
    "a temperature below 0": {"temperature": -1.0},
    "fewer tokens than none": {"max_new_tokens": -1},
}


@pytest.mark.parametrize("wrong", WRONG_TURNS)
def test_a_turn_that_is_refused_leaves_the_cache_as_it_was(owls, watch, wrong):
    model = owls(context=22)
    talk = Talk(model, 2)
    check_turn(talk, [words(6, 1), words(3, 2)], [None, None], watch, max_new_tokens=3, stop=False)
    lengths, longest = talk.cache.lengths.clone(), talk.cache.longest
    layers = [(keys.clone(), values.clone()) for keys, values in talk.cache.layers]
    passes = watch(model.llama)
    with pytest.raises(ValueError):
        model.generate(**{"ids": words(8).view(2, 4), "cache": talk.cache} | WRONG_TURNS[wrong])
    assert passes == []
    assert torch.equal(talk.cache.lengths, lengths)
    assert talk.cache.longest == longest
    for now, then in zip(talk.cache.layers, layers):
        assert torch.equal(now[0], then[0]) and torch.equal(now[1], then[1])
    check_turn(talk, [words(2, 3), words(4, 4)], [None, None], watch, max_new_tokens=3, stop=False)


def test_an_answer_is_read_before_the_next_question_to_its_cache(owls):
    """What generate found in the cache at the call must still be all of it when the prompt is read."""
    model = owls()
    cache = model.make_cache()
    first, second = (model.generate(words(3)[None], max_new_tokens=2, cache=cache) for _ in range(2))
    collect(first)
    held = cache.lengths.clone()
    with pytest.raises(ValueError, match="cache has changed"):
        collect(second)
    assert torch.equal(cache.lengths, held)


@pytest.mark.parametrize("length", [-1, -300])
def test_a_cache_cannot_be_rewound_to_less_than_nothing(owls, length):
    cache = owls().make_cache()
    collect(owls().generate(words(5)[None], max_new_tokens=2, cache=cache))
    held = cache.lengths.clone()
    with pytest.raises(ValueError, match="0 tokens or more"):
        cache.rewind(length)
    assert torch.equal(cache.lengths, held)


# ----------------------------------------------------------------------------------------------------
# Images encoded beforehand


@pytest.mark.parametrize("style", STYLES)
def test_image_words_in_place_of_images(owls, random_row, random_images, watch, style):
    """encode_images once, then a ragged batch, each row alone, and all questions about one image in one batch."""
    model = owls(style)
    generator = torch.Generator().manual_seed(0)
    images = random_images(model.config, 3, generator)
    rows = [random_row(model.config, length, n, generator) for length, n in ((7, 2), (3, 0), (4, 1))]
    ids, lengths = pad_rows(rows)
    settings = {"max_new_tokens": 8, "stop": False}
    expected = collect(model.generate(ids, images, lengths, **settings))
    one = random_row(model.config, 5, 1, generator).expand(3, -1)
    expected_of_one = collect(model.generate(one, images[:1].expand(3, -1, -1, -1), **settings))

    encoded = watch(model.vit)
    made = model.encode_images(images)
    assert made.shape == (3, model.config.image_words, model.config.llama.n_embd)
    assert torch.equal(collect(model.generate(ids, made, lengths, **settings)), expected)
    assert torch.equal(collect(model.generate(rows[0][None], made[:2], **settings)), expected[:1])
    assert torch.equal(collect(model.generate(rows[2][None], made[2:], **settings)), expected[2:])
    assert torch.equal(collect(model.generate(one, made[:1].expand(3, -1, -1), **settings)), expected_of_one)
    with torch.no_grad():
        close(model(rows[0][None], made[:2])[0], model(rows[0][None], images[:2])[0], 1e-5)
    assert len(encoded) == 2, "once beforehand, and once for the images themselves in the line above"


@pytest.mark.parametrize("shape", [(1, 3, 32), (1, 5, 32), (1, 4, 31), (4, 32), (3, 16, 16), (1, 1, 4, 32)])
def test_image_words_of_another_shape_are_refused(owls, watch, shape):
    """At the call, in a sentence that names the right shape; and the model does no work."""
    model = owls()
    passes = watch(model.llama)
    ids = torch.full((1, model.config.image_words), IMAGE_ID)
    for call in (model.generate, model):
        with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\].*\[N, 4, 32\]"):
            call(ids, torch.zeros(shape))
    assert passes == []


def test_image_words_need_as_many_places(owls):
    model = owls()
    ids = torch.full((1, model.config.image_words), IMAGE_ID)
    with pytest.raises(ValueError, match="2 images"):
        model.generate(ids, torch.zeros(2, model.config.image_words, 32))


# ----------------------------------------------------------------------------------------------------
# Rows that are over


@pytest.mark.parametrize("style", STYLES)
def test_rows_that_are_over_leave_the_batch(owls, watch, style):
    """Once those that are over are half of it, the others go on alone: to the tokens that each row gives alone."""
    model = owls(style)
    logits = watch(model.llama.lm_head)
    met = set()
    for seed in range(8):
        rows = [words(2 + (seed + i) % 7, 10 * seed + i) for i in range(7)]
        ids, lengths = pad_rows(rows)
        settings = {"max_new_tokens": 20} | (DRAWN if seed % 2 else {})
        logits.clear()
        tokens = collect(model.generate(ids, lengths=lengths, **settings))
        sizes = [len(made) for _, made in logits]

        expected, size = [7], 7
        for step in range(tokens.shape[1] - 1):
            going = int((tokens[:, : step + 1] != EOS).all(dim=1).sum())
            size = going if 2 * going <= size else size
            expected.append(size)
        assert sizes == expected
        met |= set(itertools.pairwise(sizes))

        for row, said in zip(rows, tokens):
            alone = collect(model.generate(row[None], **settings))[0]
            assert torch.equal(said[: len(alone)], alone)
            assert (said[len(alone) :] == EOS).all()

        logits.clear()  # the slow way: no row leaves a cache that is kept
        kept = collect(model.generate(ids, lengths=lengths, cache=model.make_cache(7), **settings))
        assert torch.equal(kept, tokens)
        assert {len(made) for _, made in logits} == {7}
    shrinks = {pair for pair in met if pair[0] > pair[1]}
    assert len(shrinks) >= 2
    assert any(large < 7 for large, _ in shrinks), "a batch that shrinks again"


def test_rows_take_their_luck_along(owls):
    """Unseeded, each row has luck of its own: also once others have left. (A kept cache loses no row.)"""
    model = owls()
    ids = words(3).expand(8, -1)
    for seed in range(8):
        torch.manual_seed(seed)
        shrunk = collect(model.generate(ids, temperature=1.5, max_new_tokens=20))
        torch.manual_seed(seed)
        kept = collect(model.generate(ids, temperature=1.5, max_new_tokens=20, cache=model.make_cache(8)))
        assert torch.equal(shrunk, kept)


def test_a_cache_keeps_the_rows_it_is_asked_to(owls):
    """And in the order asked for."""
    model = owls()
    ids, more = torch.stack([words(5, seed) for seed in range(3)]), torch.stack([words(4, 7), words(4, 8)])
    cache = model.make_cache(3)
    collect(model.generate(ids, max_new_tokens=1, cache=cache))
    cache.keep(torch.tensor([2, 0]))
    tokens = collect(model.generate(more, max_new_tokens=5, stop=False, cache=cache))
    whole = torch.cat([ids[[2, 0]], more], dim=1)
    assert torch.equal(tokens, collect(model.generate(whole, max_new_tokens=5, stop=False)))


# ----------------------------------------------------------------------------------------------------
# A step asks nothing of the device


def tiny_llama(**changes) -> LlamaConfig:
    shape = {"vocab_size": 12, "context": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_mlp": 40}
    return LlamaConfig(**shape | changes)


def blank_state(B: int) -> State:
    return State(torch.ones(B, dtype=torch.int64), torch.zeros(B, dtype=torch.bool), torch.zeros(B), torch.zeros(B))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.7, 5, 0.9)])
def test_a_step_needs_no_values(adaptive, stop, sampling):
    """With tensors that have shapes but no values: what would wait for a value raises."""
    config = tiny_llama(adaptive=adaptive)
    with FakeTensorMode(), torch.no_grad():
        llama = Llama(config)
        cache = Cache(config, 3, torch.device("cpu"), torch.float32)
        cache.grow(20)
        state = blank_state(3)
        take_step(llama, cache, state, 20, sampling, stop)
        decoder = Decoder(llama, cache, state, torch.zeros(4, 3), sampling, stop, take_step)
        for _ in range(3):
            decoder.advance()
        assert state.token.shape == state.ended.shape == (3,)
        with pytest.raises(DataDependentOutputException):  # it does raise
            bool(state.ended[0])


class Recorded(TorchDispatchMode):
    """A stand-in for a CUDA graph: the operations that are recorded, and may be run again on the same places.

    As on CUDA, to record is not to run: what was written meanwhile is taken back.
    """

    def __init__(self):
        super().__init__()
        self.operations = []
        self.written = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append((value, value.clone()))
        made = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, made))
        return made

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for place, value in reversed(self.written):
            place.copy_(value)
        self.written = []

    def replay(self) -> None:
        for func, args, kwargs, places in self.operations:
            made = func(*args, **kwargs)
            for value, place in zip(*((x,) if isinstance(x, Tensor) else x for x in (made, places))):
                if value.data_ptr() != place.data_ptr():  # else a view, or written in place
                    place.copy_(value)


@pytest.fixture
def like_cuda(monkeypatch):
    """like_cuda() -> from then on, tensors say that they are on CUDA, and graphs are `Recorded`.

    Returns a list of what happens: "record", "replay", "send" (a token to the CPU), "look" (at it there).
    """

    def start() -> list[str]:
        log = []

        class Graph(Recorded):
            def __enter__(self):
                log.append("record")
                return super().__enter__()

            def replay(self):
                log.append("replay")
                super().replay()

            def pool(self):
                return None

        class Late:
            def __init__(self, tensor: Tensor):
                log.append("send")
                self.tensor = tensor.clone()  # in the device's order: what was sent off before is in it

            def wait(self) -> Tensor:
                log.append("look")
                return self.tensor

        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
        monkeypatch.setattr(decode, "Arriving", Late)
        return log

    return start


def some_generations(model: Owl) -> list[Tensor]:
    """Greedy and drawn, to </s> or not, ragged, shrinking, over the border of a bucket, to the context's end."""
    results = []
    kinds = ({}, DRAWN, {"stop": False}, DRAWN | {"stop": False}, DRAWN | {"top_k": None}, {"min_new_tokens": 6})
    for seed, settings in enumerate(kinds):
        rows = [words(2 + (seed + i) % 5, 10 * seed + i) for i in range(6)]
        ids, lengths = pad_rows(rows)
        results.append(collect(model.generate(ids, lengths=lengths, max_new_tokens=25, **settings)))
        results.append(collect(model.generate(ids[:1], lengths=lengths[:1], max_new_tokens=25, **settings)))
    ids, lengths = pad_rows([words(BUCKET - 6, 1), words(3, 2)])
    for n in (1, 2, 3, 8, 12, 400):
        results.append(collect(model.generate(ids, lengths=lengths, max_new_tokens=n, stop=False)))
    return results


def test_recorded_steps_equal_steps_taken(owls, like_cuda):
    model = owls(context=270)
    expected = some_generations(model)
    log = like_cuda()
    results = some_generations(model)
    for tokens, wanted in zip(results, expected, strict=True):
        assert torch.equal(tokens, wanted)
    assert log.count("record") >= 10
    assert log.count("replay") > 10 * log.count("record")


def test_one_graph_a_bucket(owls, like_cuda, watch):
    """The first steps of a bucket are taken, the next recorded, and all others are replayed; the cache is the same."""
    model = owls(context=700)
    ids = words(BUCKET - 10)[None]
    plain, cache = model.make_cache(), model.make_cache()
    expected = collect(model.generate(ids, max_new_tokens=310, stop=False, cache=plain))
    log = like_cuda()
    passes = watch(model.llama)
    tokens = collect(model.generate(ids, max_new_tokens=310, stop=False, cache=cache))
    assert torch.equal(tokens, expected)
    n = int(cache.lengths)
    assert n == int(plain.lengths) == len(ids[0]) + 309
    for ours, theirs in zip(itertools.chain(*cache.layers), itertools.chain(*plain.layers), strict=True):
        close(ours[:, :, :n], theirs[:, :, :n], 1e-5)
    # Position 246 comes first, so 10 steps see one bucket, 256 two, and the last 43 three.
    assert log.count("replay") == 309 - 3 * RECORD_AFTER
    assert log.count("record") == 3
    ran = [given.shape[1] for given, _ in passes]  # in Python
    assert ran == [len(ids[0])] + 3 * [1] * (RECORD_AFTER + 1)
    assert [item for item in log if item in ("record", "replay")][:3] == ["record", "replay", "replay"]


def test_the_host_looks_at_a_token_when_the_next_step_is_on_its_way(owls, like_cuda):
    model = owls()
    log = like_cuda()
    iterator = model.generate(words(4)[None], max_new_tokens=6, stop=False)
    next(iterator)
    assert [item for item in log if item in ("send", "look")] == ["send", "send", "look"]
    collect(iterator)
    assert [item for item in log if item in ("send", "look")] == ["send"] + ["send", "look"] * 5 + ["look"]


def test_a_row_that_is_over_costs_one_step_more_at_most(owls, like_cuda):
    model = owls()
    log = like_cuda()
    ends = set()
    for seed in range(8):
        log.clear()
        tokens = collect(model.generate(words(4, seed)[None], max_new_tokens=60))
        ends.add(tokens.shape[1])
        assert log.count("send") - tokens.shape[1] == (1 if tokens.shape[1] < 60 else 0)
    assert len(ends) >= 3


@pytest.mark.parametrize("style", STYLES)
def test_a_kept_cache_with_recorded_steps(owls, random_row, random_images, like_cuda, style):
    """Though the device is a step ahead, the next turn goes on from what has been said: also where it was cut short."""
    model = owls(style)
    generator = torch.Generator().manual_seed(2)
    log = like_cuda()
    for _ in range(4):
        talk = Talk(model, 2)
        for n_seen in (None, 1, 0, 4, None):
            rows = [random_row(model.config, 3, n, generator) for n in (1, 0)]
            images = [random_images(model.config, n, generator) for n in (1, 0)]
            settings = {"max_new_tokens": 9, "stop": n_seen is None}
            asked = [torch.cat([history, row]) for history, row in zip(talk.history, rows)]
            tokens = talk.turn(rows, images, n_seen, **settings)
            talk.history, after = asked, talk.history
            alone = [] if n_seen == 0 else talk.whole(n_seen, **settings)
            talk.history = after
            for i, answer in enumerate(alone):
                assert torch.equal(tokens[i, : len(answer)], answer)
                assert (tokens[i, len(answer) :] == EOS).all()
                assert torch.equal(after[i], torch.cat([asked[i], answer]))
                n_unread = len(after[i]) - int(talk.cache.lengths[i])
                assert n_unread in (0, 1)
                assert n_unread == 1 or tokens[i, -1] != EOS or not settings["stop"]
    assert log.count("replay") > 20


def places(decoder: Decoder) -> list[int]:
    tensors = [*decoder.state, decoder.cache.lengths, *itertools.chain(*decoder.cache.layers)]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5, 0.9)])
def test_all_that_a_step_reads_or_writes_stays_in_its_place(owls, sampling):
    llama = owls().llama
    cache = Cache(llama.config, 3, torch.device("cpu"), torch.float32)
    cache.grow(2 * BUCKET)
    state = blank_state(3)
    decoder = Decoder(llama, cache, state, torch.rand(30, 3), sampling, False, take_step)
    before = places(decoder)
    with torch.no_grad():
        for n in range(1, 30):
            decoder.advance()
            assert places(decoder) == before
            assert cache.lengths.tolist() == [n] * 3
    assert decoder.state is state


# ----------------------------------------------------------------------------------------------------
# A compiled step


@pytest.fixture
def compiled(tiny_config, tiny_owl):
    """compiled() -> (an owl that takes plain steps, the same with compiled ones); nothing is compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    config = tiny_config("owl2", llama={"vocab_size": 12, "context": 700, "n_kv_head": 2})
    plain, fast = tiny_owl(config, seed=5), tiny_owl(config, seed=5)
    fast.step = compiled_step()
    yield plain, fast
    torch._dynamo.reset()


def n_compiled() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, DRAWN])
def test_compiled_steps_equal_plain_ones(compiled, random_row, random_images, settings):
    """Alone and in ragged batches, over the border of a bucket; one compilation for one row, one for several."""
    plain, fast = compiled
    generator = torch.Generator().manual_seed(0)
    image = random_images(plain.config, 1, generator)

    row = random_row(plain.config, BUCKET - 10, 1, generator)[None]
    for ids in (row, row[:, :40]):
        shown = image if (ids == IMAGE_ID).any() else None
        arguments = {"max_new_tokens": 20, "stop": False, **settings}
        expected = collect(plain.generate(ids, shown, **arguments))
        assert torch.equal(collect(fast.generate(ids, shown, **arguments)), expected)
        assert torch.equal(collect(fast.generate(ids, shown, cache=fast.make_cache(), **arguments)), expected)
    assert n_compiled() == 1

    for B in (3, 2):
        rows = [random_row(plain.config, length, 0, generator) for length in (4, 2 * BUCKET - 7, 30)[:B]]
        ids, lengths = pad_rows(rows)
        expected = collect(plain.generate(ids, lengths=lengths, **arguments))
        assert torch.equal(collect(fast.generate(ids, lengths=lengths, **arguments)), expected)
    assert n_compiled() == 2


@pytest.mark.slow
def test_compiled_steps_write_into_the_cache_in_place(compiled):
    plain, fast = compiled
    ids, lengths = pad_rows([words(5, 1), words(8, 2)])
    caches = []
    for model in (plain, fast):
        cache = model.make_cache(2)
        iterator = model.generate(ids, lengths=lengths, max_new_tokens=12, stop=False, cache=cache)
        next(iterator)
        before = [tensor.data_ptr() for tensor in (cache.lengths, *itertools.chain(*cache.layers))]
        collect(iterator)
        assert [tensor.data_ptr() for tensor in (cache.lengths, *itertools.chain(*cache.layers))] == before
        caches.append(cache)
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert caches[0].lengths.tolist() == [5 + 11, 8 + 11]
    for ours, theirs in zip(itertools.chain(*caches[1].layers), itertools.chain(*caches[0].layers), strict=True):
        for row, length in enumerate(caches[0].lengths.tolist()):
            close(ours[row, :, :length], theirs[row, :, :length], 1e-5)
            assert ours[row, :, length - 1].abs().min() > 0


@pytest.mark.slow
def test_all_kinds_of_compiled_steps_in_one_process(compiled, monkeypatch):
    """Each way of choosing is a program of its own: torch's limit of 8 for one function must not be in the way.

    (Traced as ever, but then run as they are: writing C++ for so many would take minutes.)
    """
    plain, fast = compiled
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, options, **how: compile(step, backend="eager", **how))
    fast.step = compiled_step()
    ways = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.9}, DRAWN]
    for B, way, stop in itertools.product((1, 2), ways, (True, False)):
        arguments = {"ids": words(4 * B).view(B, 4), "max_new_tokens": 3, "seed": 1, "stop": stop, **way}
        expected = collect(plain.generate(**arguments))
        assert torch.equal(collect(fast.generate(**arguments)), expected)
        assert torch.equal(collect(fast.generate(**arguments, cache=fast.make_cache(B))), expected)
    assert 8 < n_compiled() <= 2 * len(ways) * 2


# ----------------------------------------------------------------------------------------------------
# Matrices laid column by column


@pytest.fixture
def laid_out(tiny_config, tiny_owl):
    """laid_out(style) -> (an owl, the same with wide matrices column by column)."""

    def make(style: str) -> tuple[Owl, Owl]:
        config = tiny_config(style, llama={"vocab_size": 100, "n_mlp": 80})
        plain, laid = tiny_owl(config, seed=5), tiny_owl(config, seed=5)
        lay_out(laid.llama)
        return plain, laid

    return make


def by_columns(model: Owl) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.is_contiguous()]


@pytest.mark.parametrize("style", STYLES)
def test_laid_out_matrices_give_the_same(laid_out, random_row, random_images, style):
    plain, laid = laid_out(style)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([random_row(plain.config, 9, 1, generator) for _ in range(2)])
    images = random_images(plain.config, 2, generator)
    assert by_columns(plain) == []
    wide = ["llama.lm_head.weight"]
    wide += [f"llama.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("gate", "up")]
    assert sorted(by_columns(laid)) == sorted(wide)
    with torch.no_grad():
        close(laid(ids, images)[0], plain(ids, images)[0], 1e-5)
    expected = collect(plain.generate(ids, images, max_new_tokens=20))
    assert torch.equal(collect(laid.generate(ids, images, max_new_tokens=20)), expected)


def test_other_dtypes_lie_as_they_lay(laid_out):
    plain, _ = laid_out("owl2")
    plain.to(torch.bfloat16)
    lay_out(plain.llama)
    assert by_columns(plain) == []


@pytest.mark.parametrize("style", STYLES)
def test_laid_out_matrices_are_saved_to_the_same_files(laid_out, tmp_path, style):
    files = []
    for name, model in zip(("plain", "laid"), laid_out(style)):
        save_model(model, tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert any(name.endswith(".safetensors") for name in files[0])


@pytest.mark.parametrize("style", STYLES)
def test_laid_out_matrices_can_be_trained(laid_out, random_row, random_images, style):
    """Two steps of AdamW lead to the same weights, which lie as they lay."""
    models = laid_out(style)
    generator = torch.Generator().manual_seed(0)
    ids = random_row(models[0].config, 12, 1, generator)[None]
    labels = ids.masked_fill(ids == IMAGE_ID, -100)
    images = random_images(models[0].config, 1, generator)
    before = {name: parameter.detach().clone() for name, parameter in models[0].named_parameters()}
    lay = by_columns(models[1])
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), eps=1e-3)  # else the noise of gradients near 0 counts
        for _ in range(2):
            model(ids, images, labels)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters()):
        close(ours, theirs, 1e-5)
    assert not torch.equal(models[1].llama.lm_head.weight, before["llama.lm_head.weight"])
    assert by_columns(models[1]) == lay


# ----------------------------------------------------------------------------------------------------
# Attention of one query, written out


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("B, T", [(1, 1), (1, 7), (3, 40)])
def test_attention_written_out(n_kv_head, B, T):
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(B, 1, 4, 8, generator=generator).transpose(1, 2)  # as a projection lays it
    k, v = (torch.randn(B, n_kv_head, T, 8, generator=generator) for _ in range(2))
    n_seen = torch.randint(1, T + 1, (B, 1), generator=generator)
    n_seen[0] = 1
    mask = torch.zeros(B, T).masked_fill(torch.arange(T) >= n_seen, -torch.inf)[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    ours = attend_once(q, k, v, mask)
    assert ours.shape == q.shape
    close(ours, expected, 1e-6)
    close(ours[0], v[0, :, :1].repeat_interleave(4 // n_kv_head, dim=0), 1e-6)  # all that row 0 sees

    k[:, :, 1:][mask[:, 0, :, 1:].expand(B, n_kv_head, T - 1) < 0] = 1e4  # what is hidden has no say
    close(attend_once(q, k, v, mask), expected, 1e-6)


def test_attention_written_out_in_half_precision():
    """Sums and softmax in float32: no further from the truth than the kernel, but for one rounding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, T, 16, generator=generator) for n, T in ((4, 1), (2, 50), (2, 50)))
    mask = torch.zeros(2, 1, 1, 50)
    mask[1, :, :, 20:] = -torch.inf
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    ours = attend_once(*(x.to(torch.bfloat16) for x in (q, k, v, mask)))
    assert ours.dtype == torch.bfloat16
    close(ours.float(), expected, 0.02)


@pytest.mark.parametrize("style", STYLES)
def test_decoding_with_attention_written_out(owls, like_cuda, monkeypatch, style):
    """What is compiled on CUDA, here uncompiled on a CPU."""
    model = owls(style)
    ids, lengths = pad_rows([words(5, 1), words(8, 2)])
    expected = collect(model.generate(ids, lengths=lengths, max_new_tokens=30, stop=False))
    used = []
    written_out = attend_once

    def attend(*arguments):
        used.append(1)
        return written_out(*arguments)

    like_cuda()
    monkeypatch.setattr("llama.attend_once", attend)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(collect(model.generate(ids, lengths=lengths, max_new_tokens=30, stop=False)), expected)
    assert used


# ----------------------------------------------------------------------------------------------------
# On CUDA


@pytest.fixture
def on_cuda(tiny_config, tiny_owl):
    """on_cuda() -> (an owl on the CPU, the same on CUDA)."""

    def make() -> tuple[Owl, Owl]:
        config = tiny_config("owl2", llama={"vocab_size": 12, "context": 700, "n_kv_head": 2})
        return tiny_owl(config, seed=5), tiny_owl(config, seed=5).cuda()

    return make


def generations(model: Owl) -> list[Tensor]:
    """Of one row and of ragged rows, greedy and drawn, over the border of a bucket."""
    device = model.llama.lm_head.weight.device
    results = []
    for lengths in ((BUCKET - 10,), (BUCKET - 10, 3), (4, 9, 2, 7, 5, 3)):
        ids, lengths = pad_rows([words(length, i) for i, length in enumerate(lengths)])
        for settings in ({}, {"stop": False}, DRAWN, DRAWN | {"stop": False}):
            results.append(collect(model.generate(ids.to(device), lengths=lengths, max_new_tokens=30, **settings)))
    return results


@needs_cuda
def test_graphs_equal_the_cpu(on_cuda):
    plain, fast = on_cuda()
    for ours, expected in zip(generations(fast), generations(plain), strict=True):
        assert torch.equal(ours, expected)


@needs_cuda
def test_graphs_equal_steps_taken_one_by_one(on_cuda, monkeypatch):
    _, model = on_cuda()
    recorded = generations(model)
    monkeypatch.setattr(Decoder, "advance", advance_plainly)
    for ours, expected in zip(recorded, generations(model), strict=True):
        assert torch.equal(ours, expected)


def advance_plainly(decoder: Decoder) -> None:
    """Decoder.advance without graphs."""
    decoder.n_taken += 1
    decoder.state.luck.copy_(decoder.luck[decoder.n_taken])
    decoder.cache.longest = min(decoder.cache.longest + 1, decoder.cache.size - 1)
    n_visible = min(-(-decoder.cache.longest // BUCKET) * BUCKET, decoder.cache.size - 1)
    decoder.step(decoder.llama, decoder.cache, decoder.state, n_visible, decoder.sampling, decoder.stop)


@needs_cuda
@pytest.mark.slow
def test_compiled_steps_equal_plain_ones_on_cuda(on_cuda):
    plain, fast = on_cuda()
    torch._dynamo.reset()
    fast.step = compiled_step()
    for ours, expected in zip(generations(fast), generations(plain), strict=True):
        assert torch.equal(ours, expected)


@needs_cuda
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5, 0.9)])
def test_no_step_waits_for_the_device(on_cuda, sampling):
    """Neither one that is taken nor one that is replayed."""
    llama = on_cuda()[1].llama
    cache = Cache(llama.config, 3, torch.device("cuda"), torch.float32)
    cache.grow(60)
    state = State(*(tensor.cuda() for tensor in blank_state(3)))
    decoder = Decoder(llama, cache, state, torch.rand(60, 3, device="cuda"), sampling, True, take_step)
    with torch.inference_mode():
        for _ in range(RECORD_AFTER + 1):
            decoder.advance()  # the last is recorded, which does wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_step(llama, cache, state, BUCKET, sampling, True)
            for _ in range(20):
                decoder.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert list(decoder.graphs) == [BUCKET]
    assert int(cache.lengths.max()) <= 22 + RECORD_AFTER


@needs_cuda
def test_a_kept_cache_on_cuda(on_cuda):
    """Turns, one of them cut short, on a device that is a step ahead."""
    plain, fast = on_cuda()
    cache = fast.make_cache(2)
    history = [torch.zeros(0, dtype=torch.int64) for _ in range(2)]
    for turn, n_seen in enumerate((None, 3, None)):
        held = cache.lengths.tolist()
        history = [torch.cat([row, words(3 + i, turn + i)]) for i, row in enumerate(history)]
        ids, lengths = pad_rows([row[n:] for row, n in zip(history, held)])
        iterator = fast.generate(ids.cuda(), lengths=lengths, max_new_tokens=8, stop=False, cache=cache)
        tokens = collect(itertools.islice(iterator, n_seen))
        iterator.close()
        for i, row in enumerate(history):
            alone = collect(itertools.islice(plain.generate(row[None], max_new_tokens=8, stop=False), n_seen))[0]
            assert torch.equal(tokens[i], alone)
            history[i] = torch.cat([row, alone])
