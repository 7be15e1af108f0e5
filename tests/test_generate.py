"""Generation: the released code's tokens, and every shortcut against the long way."""

import itertools

import pytest
import torch

from decode import draw
from model import IMAGE_ID, Owl

STYLES = ("owl1", "owl2")
EOS = 2
GREEDY = list(itertools.product(("owl1", "owl2", "owl2-bin-shards"), ("text", "image", "two")))


def collect(iterator) -> torch.Tensor:
    """All tokens of a generation, [B, steps]."""
    steps = list(iterator)
    return torch.stack(steps, dim=1) if steps else torch.zeros(0, 0, dtype=torch.int64)


@pytest.fixture(scope="module")
def owls(tiny_config, tiny_owl):
    """owls(style, context=64) -> a tiny owl of 12 words, so that </s> comes up often. Made once."""
    made = {}

    def get(style: str, context: int = 64) -> Owl:
        if (style, context) not in made:
            config = tiny_config(style, llama={"vocab_size": 12, "context": context})
            made[style, context] = tiny_owl(config, seed=5)
        return made[style, context]

    return get


# ----------------------------------------------------------------------------------------------------
# Greedy


@pytest.mark.parametrize("folder, kind", GREEDY)
def test_golden_tokens(golden, folder, kind):
    model, tensors = golden(folder)
    ids, images = tensors[f"greedy.{kind}.ids"], tensors.get(f"greedy.{kind}.images")
    expected = tensors[f"greedy.{kind}.tokens"]
    tokens = collect(model.generate(ids, images, max_new_tokens=expected.shape[1], stop=False))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n_image", [0, 1, 2])
def test_cached_equals_full_recompute(owls, random_row, random_images, style, n_image):
    model = owls(style)
    generator = torch.Generator().manual_seed(n_image)
    ids = random_row(model.config, 6, n_image, generator)[None]
    images = random_images(model.config, n_image, generator)
    fast = model.generate(ids, images, max_new_tokens=15, stop=False)
    for _ in range(15):
        with torch.no_grad():
            logits, _ = model(ids, images)
        slow = logits[:, -1].argmax(dim=-1)
        assert torch.equal(next(fast), slow)
        ids = torch.cat([ids, slow[:, None]], dim=1)
    assert next(fast, None) is None


@pytest.mark.parametrize("style", STYLES)
def test_cached_logits_equal_those_of_full_recompute(owls, random_row, random_images, padded, monkeypatch, style):
    """Stronger than equal tokens: each row's logits at each step, in a ragged batch, to 1e-5."""
    model = owls(style)
    generator = torch.Generator().manual_seed(0)
    rows = [random_row(model.config, length, n, generator) for length, n in ((3, 2), (8, 0), (5, 1))]
    images = random_images(model.config, 3, generator)
    seen = []
    handle = model.llama.lm_head.register_forward_hook(lambda _, __, output: seen.append(output))
    tokens = collect(model.generate(padded(rows)[0], images, padded(rows)[1], max_new_tokens=8, stop=False))
    handle.remove()
    assert len(seen) == 8
    for i, (row, pictures) in enumerate(zip(rows, (images[:2], None, images[2:]))):
        whole = torch.cat([row, tokens[i]])[None]
        with torch.no_grad():
            logits, _ = model(whole, pictures)
        ours = torch.stack([step[i] for step in seen])
        torch.testing.assert_close(ours, logits[0, len(row) - 1 : -1], rtol=0, atol=1e-5)


def assert_rows_as_alone(model: Owl, rows, images, padded, **settings) -> dict[str, int]:
    """A batch gives each row what it gives alone, and </s> from then on. Returns what has been met on the way."""
    filler = int(rows[0][0]) if rows[0][0] != IMAGE_ID else 7  # whatever stands in the padding
    ids, lengths = padded(rows, filler=filler)
    present = [picture for picture in images if picture is not None]
    together = collect(
        model.generate(ids, torch.cat(present) if present else None, lengths, **settings)
    )
    alone = [collect(model.generate(row[None], picture, **settings))[0] for row, picture in zip(rows, images)]
    assert together.shape[1] == max(len(tokens) for tokens in alone)
    met = {"ended early": 0, "went on": 0}
    for batch, tokens in zip(together, alone):
        assert torch.equal(batch[: len(tokens)], tokens)
        assert (batch[len(tokens) :] == EOS).all()
        met["ended early" if len(tokens) < together.shape[1] else "went on"] += 1
    return met


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("context", [64, 22])
def test_batched_rows_equal_rows_alone(owls, random_row, random_images, padded, style, stop, context):
    """10 random batches in each of 8 kinds; in half of them rows also run into the context, each at its own time."""
    model = owls(style, context)
    generator = torch.Generator().manual_seed(17)
    met = {"ended early": 0, "went on": 0}
    for _ in range(10):
        B = int(torch.randint(2, 5, (1,), generator=generator))
        rows, images = [], []
        for _ in range(B):
            n_image = int(torch.randint(0, 3, (1,), generator=generator))
            length = int(torch.randint(1, 14, (1,), generator=generator))
            rows.append(random_row(model.config, length, n_image, generator))
            images.append(random_images(model.config, n_image, generator))
        settings = {"max_new_tokens": 14, "stop": stop}
        for kind, count in assert_rows_as_alone(model, rows, images, padded, **settings).items():
            met[kind] += count
    assert met["went on"] >= 10
    assert met["ended early"] >= 5 or (not stop and context == 64)


# ----------------------------------------------------------------------------------------------------
# Where it ends


@pytest.mark.parametrize("style", STYLES)
def test_end_token_is_yielded_and_from_then_on(owls, padded, monkeypatch, style):
    """With a decoder that says 5, 5, </s>, 7, 7, ... to one row and 5 for ever to the other."""
    model = owls(style)
    script = torch.tensor([[5, 5, EOS, 7, 7, 7], [5, 5, 5, 5, 5, EOS]])
    steps = itertools.count()

    def lm_head(x):
        return torch.nn.functional.one_hot(script[:, next(steps)], 12).float()

    monkeypatch.setattr(model.llama.lm_head, "forward", lm_head)
    ids, lengths = padded([torch.tensor([3, 4]), torch.tensor([3])])
    cache = model.make_cache(2)  # with which no row is taken out of the batch
    tokens = collect(model.generate(ids, lengths=lengths, max_new_tokens=50, cache=cache))
    assert tokens.tolist() == [[5, 5, EOS, EOS, EOS, EOS], [5, 5, 5, 5, 5, EOS]]

    steps = itertools.count()
    tokens = collect(model.generate(ids, lengths=lengths, max_new_tokens=6, stop=False))
    assert torch.equal(tokens, script)


@pytest.mark.parametrize("style", STYLES)
def test_generation_ends_with_the_context(owls, random_row, random_images, style):
    """Every place of the context is filled, and the token foreseen at the last one is the last."""
    model = owls(style, context=22)
    generator = torch.Generator().manual_seed(3)
    ids = random_row(model.config, 9, 1, generator)[None]
    images = random_images(model.config, 1, generator)
    tokens = collect(model.generate(ids, images, max_new_tokens=100, stop=False))
    assert ids.shape[1] + tokens.shape[1] - 1 == 22
    with torch.no_grad():
        logits, _ = model(torch.cat([ids, tokens[:, :-1]], dim=1), images)
    assert torch.equal(logits[0, ids.shape[1] - 1 :].argmax(dim=-1), tokens[0])


def test_a_prompt_as_long_as_the_context_gives_one_token(owls):
    model = owls("owl1", context=22)
    ids = torch.randint(3, 12, (1, 22), generator=torch.Generator().manual_seed(0))
    assert collect(model.generate(ids, max_new_tokens=5, stop=False)).shape == (1, 1)


@pytest.mark.parametrize("length, filler", [(3, 0), (22, 5)])
def test_padding_may_reach_past_the_context(owls, length, filler):
    """What counts is the rows' lengths."""
    model = owls("owl2", context=22)
    row = torch.randint(3, 12, (1, length), generator=torch.Generator().manual_seed(0))
    ids = torch.nn.functional.pad(row, (0, 30 - length), value=filler)
    expected = collect(model.generate(row, max_new_tokens=40, stop=False))
    tokens = collect(model.generate(ids, lengths=torch.tensor([length]), max_new_tokens=40, stop=False))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_max_new_tokens(owls, count):
    model = owls("owl2")
    ids = torch.tensor([[3, 4], [5, 6]])
    assert len(list(model.generate(ids, max_new_tokens=count, stop=False))) == count


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_the_first_tokens_end_nothing(owls, random_row, random_images, padded, style, count):
    """min_new_tokens, in batches that shrink, against a loop that takes the likeliest but </s>."""
    model = owls(style)
    generator = torch.Generator().manual_seed(11)
    n_barred = 0
    for _ in range(6):
        rows = [random_row(model.config, length, n, generator) for length, n in ((4, 1), (9, 0), (2, 2), (6, 1))]
        images = [random_images(model.config, n, generator) for n in (1, 0, 2, 1)]
        ids, lengths = padded(rows)
        together = torch.cat([picture for picture in images if picture is not None])
        tokens = collect(model.generate(ids, together, lengths, max_new_tokens=12, min_new_tokens=count))
        for row, picture, answer in zip(rows, images, tokens.tolist()):
            slow = []
            while len(slow) < 12 and EOS not in slow:
                with torch.no_grad():
                    logits, _ = model(torch.cat([row, torch.tensor(slow, dtype=torch.int64)])[None], picture)
                likely = logits[0, -1].argsort(descending=True).tolist()
                n_barred += len(slow) < count and likely[0] == EOS
                slow.append(next(token for token in likely if token != EOS or len(slow) >= count))
            assert answer == slow + [EOS] * (len(answer) - len(slow))
    assert (n_barred > 0) == (count > 0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 2.0, "top_p": 0.4}])
def test_drawn_tokens_end_nothing_before_their_time(owls, settings):
    tokens = collect(owls("owl2").generate(torch.tensor([[3, 4]] * 40), min_new_tokens=7, max_new_tokens=7, **settings))
    assert tokens.shape == (40, 7) and EOS not in tokens


@pytest.mark.parametrize("count", [-1, 6])
def test_min_new_tokens_that_cannot_be(owls, count):
    with pytest.raises(ValueError, match="min_new_tokens must be from 0 to max_new_tokens, 5"):
        owls("owl2").generate(torch.tensor([[3]]), max_new_tokens=5, min_new_tokens=count)


@pytest.mark.parametrize("ragged", [False, True])
def test_no_pass_is_made_that_no_token_needs(owls, ragged):
    """n tokens: the prompt's pass and n - 1 more. And each is made only when its token is asked for."""
    model = owls("owl2")
    calls = []
    handle = model.llama.register_forward_pre_hook(lambda *_: calls.append(1))
    lengths = torch.tensor([2, 1]) if ragged else None
    iterator = model.generate(torch.tensor([[3, 4], [5, 6]]), lengths=lengths, max_new_tokens=4, stop=False)
    assert len(calls) == 0
    for count, _ in enumerate(iterator, start=1):
        assert len(calls) == count
    handle.remove()
    assert len(calls) == 4


def test_generation_leaves_no_trace(owls):
    """Gradients stay on for the caller between the steps, and the model remembers nothing."""
    model = owls("owl2")
    ids = torch.tensor([[3, 4, 5]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = []
    for token in model.generate(ids, max_new_tokens=5, stop=False):
        assert torch.is_grad_enabled()
        assert not token.requires_grad
        first.append(token)
    assert torch.equal(collect(model.generate(ids, max_new_tokens=5, stop=False)), torch.stack(first, dim=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert ids.tolist() == [[3, 4, 5]]


# ----------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("top_k, top_p", [(None, None), (5, None), (None, 0.8), (6, 0.9)])
def test_seeded_samples_do_not_depend_on_neighbours(owls, random_row, random_images, padded, style, top_k, top_p):
    model = owls(style)
    generator = torch.Generator().manual_seed(23)
    for seed in range(4):
        rows = [random_row(model.config, length, n, generator) for length, n in ((4, 1), (9, 0), (2, 2))]
        images = [random_images(model.config, n, generator) for n in (1, 0, 2)]
        settings = {"temperature": 1.3, "top_k": top_k, "top_p": top_p, "seed": seed, "max_new_tokens": 10}
        assert_rows_as_alone(model, rows, images, padded, **settings)
        assert_rows_as_alone(model, rows[::-1], images[::-1], padded, **settings)


def test_a_seed_repeats_and_another_differs(owls):
    model = owls("owl2")
    ids = torch.tensor([[3, 4, 5]])

    def sample(seed):
        return collect(model.generate(ids, temperature=2.0, seed=seed, max_new_tokens=20, stop=False)).tolist()

    assert sample(1) == sample(1)
    assert len({str(sample(seed)) for seed in range(5)}) == 5
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sample(1)
    assert torch.equal(torch.get_rng_state(), state), "a seeded sample leaves the global generator alone"
    assert sample(None) != sample(None)


def test_unseeded_rows_draw_apart(owls):
    model = owls("owl2")
    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 5]]).expand(4, -1)
    tokens = collect(model.generate(ids, temperature=2.0, max_new_tokens=20, stop=False))
    assert len({str(row) for row in tokens.tolist()}) == 4


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 0.5}])
def test_the_narrowest_sampling_is_greedy(owls, random_row, random_images, padded, style, settings):
    model = owls(style)
    generator = torch.Generator().manual_seed(1)
    rows = [random_row(model.config, 5, 1, generator), random_row(model.config, 8, 0, generator)]
    images = random_images(model.config, 1, generator)
    ids, lengths = padded(rows)
    greedy = collect(model.generate(ids, images, lengths, max_new_tokens=12, stop=False))
    sampled = collect(
        model.generate(ids, images, lengths, max_new_tokens=12, stop=False, temperature=3.0, seed=0, **settings)
    )
    assert torch.equal(sampled, greedy)


def frequencies(p: torch.Tensor, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """How often each token is drawn, over luck that covers 0..1 evenly."""
    n = 20000
    luck = (torch.arange(n) + 0.5) / n
    tokens = draw(p.log().expand(n, -1).clone(), 1.0, top_k, top_p, luck)
    return torch.bincount(tokens, minlength=len(p)) / n


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    torch.testing.assert_close(frequencies(p), p, rtol=0, atol=1e-3)


def test_top_k_keeps_the_likeliest():
    p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    expected = torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65
    torch.testing.assert_close(frequencies(p, top_k=2), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(frequencies(p, top_k=99), p, rtol=0, atol=1e-3)


EVERYTHING = [0, 1, 2, 3, 4]
TOP_P = [(0.3, [1]), (0.5, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.97, EVERYTHING), (1.0, EVERYTHING)]


@pytest.mark.parametrize("top_p, kept", TOP_P)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    expected = torch.zeros(5)
    expected[kept] = p[kept] / p[kept].sum()
    torch.testing.assert_close(frequencies(p, top_p=top_p), expected, rtol=0, atol=1e-3)


def test_draws_at_the_ends_of_luck():
    """0 and the last number below 1 draw the likeliest and the least likely, never one of probability 0."""
    logits = torch.tensor([[0.0, 2.0, float("-inf"), 1.0]])
    assert draw(logits, 1.0, None, None, torch.tensor([0.0])).item() == 1
    assert draw(logits, 1.0, None, None, torch.tensor([1 - 2**-24])).item() == 0
    assert draw(logits.expand(2, -1), 1.0, 2, None, torch.tensor([1 - 2**-24])).tolist() == [3, 3]


def test_temperature_sharpens_and_flattens(owls):
    """Sampled tokens follow softmax(logits / temperature): counted over many rows of one prompt."""
    model = owls("owl2")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        logits = model(ids)[0][0, -1]
    torch.manual_seed(0)
    for temperature in (0.5, 2.0):
        tokens = next(model.generate(ids.expand(4000, -1), temperature=temperature, max_new_tokens=1))
        counts = torch.bincount(tokens, minlength=12) / 4000
        torch.testing.assert_close(counts, (logits / temperature).softmax(dim=-1), rtol=0, atol=0.03)


# ----------------------------------------------------------------------------------------------------
# What cannot be done is said at the call


BAD_SETTINGS = [
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"top_k": 0},
    {"top_k": -3},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_p": -0.5},
    {"top_p": float("nan")},
    {"max_new_tokens": -1},
    {"lengths": torch.tensor([3])},
    {"lengths": torch.tensor([0, 3])},
    {"lengths": torch.tensor([3, 4])},
    {"lengths": torch.tensor([[3, 3]])},
    {"ids": torch.zeros(2, 0, dtype=torch.int64)},
    {"ids": torch.zeros(2, 23, dtype=torch.int64)},
    {"ids": torch.zeros(2, 30, dtype=torch.int64), "lengths": torch.tensor([3, 23])},
    {"ids": torch.tensor([[3, IMAGE_ID, IMAGE_ID, IMAGE_ID, IMAGE_ID]])},
    {"images": torch.zeros(1, 3, 16, 16)},
    {"ids": torch.tensor([[3, IMAGE_ID, IMAGE_ID, IMAGE_ID]]), "images": torch.zeros(1, 3, 16, 16)},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda settings: "-".join(settings))
def test_bad_settings_are_refused_at_the_call(owls, settings):
    """A ValueError from generate() itself, not from the first token, and no part of the model has run."""
    model = owls("owl2", context=22)
    calls = []
    handles = [
        part.register_forward_pre_hook(lambda *_: calls.append(1))
        for part in (model.vit, model.abstractor, model.llama, model.llama.embed_tokens)
    ]
    with pytest.raises(ValueError):
        model.generate(**{"ids": torch.full((2, 3), 4)} | settings)
    for handle in handles:
        handle.remove()
    assert calls == []
