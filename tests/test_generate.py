"""Generation with the plain loop: the reference's tokens, and the tokens of a full recompute."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import GOLDEN_FOLDERS, VARIANTS, assert_close, collect, make_batch, small_vocab_owl
from generate import Sampling, generate, sample_token
from model import IMAGE_TOKEN_ID, Owl

pytestmark = pytest.mark.usefixtures("no_near_ties")

EOS = 2
SIZES = ((3, 2), (8, 0), (5, 1))  # (text tokens, images) of the rows of a batch
SAMPLED = Sampling(temperature=1.3, top_k=8, top_p=0.9, seed=5)


def assert_same_tokens(tokens: Tensor, expected: list[Tensor]) -> None:
    """Checks that tokens [B, steps] are the expected ones of each row, and </s> from then on."""
    assert tokens.shape[1] == max(len(row) for row in expected)
    for row, wanted in zip(tokens.tolist(), expected, strict=True):
        assert row == wanted.tolist() + [EOS] * (len(row) - len(wanted))


def recompute_logits(model: Owl, ids: Tensor, images: Tensor | None, tokens: Tensor) -> Tensor:
    """Logits [steps, V] from which the tokens [steps] of a row are selected, in one pass without a cache."""
    with torch.no_grad():
        logits, _ = model(torch.cat([ids, tokens[None]], dim=1), images)
    return logits[0, ids.shape[1] - 1 : -1]


# ----------------------------------------------------------------------------------------------------
# Greedy


@pytest.mark.parametrize("folder", GOLDEN_FOLDERS)
@pytest.mark.parametrize("kind", ["text", "image", "two"])
def test_golden_tokens(golden, folder, kind):
    model, tensors = golden(folder)
    ids, images = tensors[f"greedy.{kind}.ids"], tensors.get(f"greedy.{kind}.images")
    expected = tensors[f"greedy.{kind}.tokens"]
    tokens = collect(generate(model, ids, images, max_new_tokens=expected.shape[1], stop_at_eos=False))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_full_recompute(record_calls, variant):
    """Logits and tokens of each row at each step of a ragged batch with images."""
    model = small_vocab_owl(variant)
    batch = make_batch(model.config, SIZES)
    lm_head_calls, decoder_calls = record_calls(model.llama.lm_head), record_calls(model.llama)
    tokens = collect(
        generate(model, batch.ids, batch.images, prompt_lengths=batch.lengths, max_new_tokens=15, stop_at_eos=False)
    )
    assert [x.shape[1] for x, _ in decoder_calls] == [batch.ids.shape[1]] + 14 * [1]
    logits = torch.stack([output for _, output in lm_head_calls], dim=1)  # [B, steps, V]
    for i, (ids, images) in enumerate(batch.rows):
        expected = recompute_logits(model, ids, images, tokens[i])
        assert_close(logits[i], expected)
        assert torch.equal(tokens[i], expected.argmax(dim=-1))


@pytest.mark.parametrize("variant, context", [("owl1", 64), ("owl2", 22)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"stop_at_eos": False}, {"min_new_tokens": 5}]
    + [{"sampling": dataclasses.replace(SAMPLED, **k_p)} for k_p in ({}, {"top_k": None}, {"top_p": None})],
    ids=["greedy", "no stop", "min 5", "top_k top_p", "top_p", "top_k"],
)
def test_batched_rows_equal_rows_alone(variant, context, settings):
    """Random batches. With a context of 22, rows also end where the context is full, each at its own step."""
    model = small_vocab_owl(variant, context)
    generator = torch.Generator().manual_seed(17)
    lengths = set()
    for seed in range(3):
        sizes = [torch.randint(1, 14, (3,), generator=generator).tolist(), [0, 1, 2]]
        batch = make_batch(model.config, zip(*sizes), seed)
        settings = {"max_new_tokens": 14} | settings
        tokens = collect(generate(model, batch.ids, batch.images, prompt_lengths=batch.lengths, **settings))
        alone = [collect(generate(model, *row, **settings))[0] for row in batch.rows]
        assert_same_tokens(tokens, alone)
        lengths.update(len(row) for row in alone)
    assert len(lengths) >= 4 or (context == 64 and lengths == {14} and "stop_at_eos" in settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_tokens_in_place_of_pixels(record_calls, variant):
    model = small_vocab_owl(variant)
    batch = make_batch(model.config, SIZES)
    settings = {"prompt_lengths": batch.lengths, "max_new_tokens": 8, "stop_at_eos": False}
    expected = collect(generate(model, batch.ids, batch.images, **settings))
    visual = model.encode_images(batch.images)
    calls = record_calls(model.vit)
    assert torch.equal(collect(generate(model, batch.ids, visual, **settings)), expected)
    assert len(calls) == 0


# ----------------------------------------------------------------------------------------------------
# The end of a row


def test_an_ended_row_yields_eos_until_all_rows_have_ended(monkeypatch):
    """With a model that always selects the tokens of a script."""
    model = small_vocab_owl()
    script = torch.tensor([[5, 5, EOS, 7, 7, 7], [5, 5, 5, 5, 5, EOS]])

    def run(**settings) -> list[list[int]]:
        steps = itertools.count()
        monkeypatch.setattr(model.llama.lm_head, "forward", lambda x: F.one_hot(script[:, next(steps)], 12).float())
        return collect(generate(model, torch.tensor([[3, 4], [3, 4]]), **settings)).tolist()

    assert run(max_new_tokens=50) == [[5, 5, EOS, EOS, EOS, EOS], [5, 5, 5, 5, 5, EOS]]
    assert run(max_new_tokens=6, stop_at_eos=False) == script.tolist()


@pytest.mark.parametrize("lengths", [(22,), (3,), (22, 3)])
def test_only_the_prompt_has_to_fit_the_context(lengths):
    """A prompt as long as the context gets one token, a shorter one until all positions are filled.

    Padding may be longer than the context.
    """
    model = small_vocab_owl(context=22)
    batch = make_batch(model.config, [(length, 0) for length in lengths])
    alone = [collect(generate(model, ids, max_new_tokens=40, stop_at_eos=False))[0] for ids, _ in batch.rows]
    assert [len(row) for row in alone] == [23 - length for length in lengths]
    for (ids, images), row in zip(batch.rows, alone):
        assert torch.equal(row, recompute_logits(model, ids, images, row).argmax(dim=-1))
    padded = F.pad(batch.ids, (0, 30 - max(lengths)), value=5)
    tokens = generate(model, padded, prompt_lengths=batch.lengths, max_new_tokens=40, stop_at_eos=False)
    assert_same_tokens(collect(tokens), alone)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_max_new_tokens(record_calls, count):
    """n tokens take n passes of the decoder, and each pass runs when its token is requested."""
    model = small_vocab_owl()
    calls = record_calls(model.llama)
    tokens = generate(model, torch.tensor([[3, 4], [5, 6]]), max_new_tokens=count, stop_at_eos=False)
    assert len(calls) == 0
    for n, token in enumerate(tokens, start=1):
        assert token.shape == (2,) and token.dtype == torch.int64
        assert len(calls) == n
    assert len(calls) == max(count, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [0, 3, 8])
def test_min_new_tokens(variant, count):
    """</s> is left out of the first tokens: compared with a full recompute that selects the best other token."""
    model = small_vocab_owl(variant)
    batch = make_batch(model.config, [(3, 1)] * 12)
    settings = {"min_new_tokens": count, "max_new_tokens": 12, "stop_at_eos": False}
    n_prevented = 0
    for row, tokens in zip(batch.rows, collect(generate(model, batch.ids, batch.images, **settings))):
        logits = recompute_logits(model, *row, tokens)
        n_prevented += int((logits[:count].argmax(dim=-1) == EOS).sum())
        logits[:count, EOS] = -torch.inf
        assert torch.equal(tokens, logits.argmax(dim=-1))
    assert (n_prevented > 0) == (count > 0)
    settings = {"min_new_tokens": count, "max_new_tokens": count, "sampling": Sampling(2.0)}
    assert EOS not in collect(generate(model, torch.full((40, 2), 4), **settings))


def test_generation_changes_nothing():
    """Gradients stay enabled for the caller between steps. The results can be used in training."""
    model = small_vocab_owl()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[3, 4, 5]])
    for token in generate(model, ids, max_new_tokens=5, stop_at_eos=False):
        assert torch.is_grad_enabled()
        ids = torch.cat([ids, token[:, None]], dim=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    _, loss = model(ids, labels=ids)
    gradients = torch.autograd.grad(loss, model.llama.parameters(), allow_unused=True)
    assert gradients[0].abs().max() > 0


# ----------------------------------------------------------------------------------------------------
# Sampling


def sample(model: Owl, ids: Tensor, n: int = 20, **settings) -> Tensor:
    return collect(generate(model, ids, max_new_tokens=n, stop_at_eos=False, sampling=Sampling(**settings)))


def test_a_seed_repeats_the_sample():
    model, ids = small_vocab_owl(), torch.tensor([[3, 4, 5]])
    assert torch.equal(sample(model, ids, temperature=2.0, seed=1), sample(model, ids, temperature=2.0, seed=1))
    assert len({str(sample(model, ids, temperature=2.0, seed=seed).tolist()) for seed in range(5)}) == 5

    # A seed leaves the global generator as it is. Without one, samples differ, and so do rows.
    state = torch.get_rng_state()
    sample(model, ids, temperature=2.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sample(model, ids, temperature=2.0), sample(model, ids, temperature=2.0))
    rows = sample(model, ids.expand(4, -1), temperature=2.0).tolist()
    assert len({str(row) for row in rows}) == 4


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 0.5}, {"temperature": 1e-30}])
def test_the_narrowest_sampling_is_greedy(limits):
    model, ids = small_vocab_owl(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert torch.equal(sample(model, ids, **{"temperature": 3.0, "seed": 0} | limits), sample(model, ids))


P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
ALL = [0, 1, 2, 3, 4]
KEPT = [({}, ALL), ({"top_k": 2}, [1, 3]), ({"top_k": 99}, ALL), ({"top_p": 0.3}, [1]), ({"top_p": 0.5}, [1, 3])]
KEPT += [({"top_p": 0.64}, [1, 3]), ({"top_p": 0.66}, [1, 3, 4]), ({"top_p": 0.97}, ALL), ({"top_p": 1.0}, ALL)]
KEPT += [({"top_k": 2, "top_p": 0.97}, [1, 3]), ({"top_k": 3, "top_p": 0.7}, [1, 3])]


@pytest.mark.parametrize("limits, kept", KEPT)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_token_follows_the_probabilities(temperature, limits, kept):
    """Frequencies over 20,000 evenly spaced `uniform` are the probabilities of the tokens kept, renormalized."""
    n = 20000
    logits = temperature * P.log() + 7.0  # the temperature divides them again
    tokens = sample_token(logits.expand(n, -1), Sampling(temperature, **limits), (torch.arange(n) + 0.5) / n)
    expected = torch.zeros(5)
    expected[kept] = P[kept] / P[kept].sum()
    assert_close(torch.bincount(tokens, minlength=5) / n, expected, tolerance=2 / n)


def test_sample_token_at_the_limits():
    """uniform = 0 and just below 1 never select a token of probability 0. Extreme numbers do not overflow."""
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0]])
    low, high = torch.tensor([0.0]), torch.tensor([1 - 2**-24])
    assert sample_token(logits, Sampling(1.0), low).tolist() == [1]
    assert sample_token(logits, Sampling(1.0), high).tolist() == [0]
    assert sample_token(logits.expand(2, -1), Sampling(1.0, top_k=2), high).tolist() == [3, 3]
    for extreme in (1e4 * logits, logits.half() * 3e4, logits):
        for temperature in (1e-35, 1e-6):
            assert sample_token(extreme, Sampling(temperature), high).tolist() == [1]
    assert sample_token(logits, Sampling(1e30), high).tolist() == [3]


# ----------------------------------------------------------------------------------------------------
# Errors


BAD = [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_k": -3}]
BAD += [{"top_p": value} for value in (0.0, 1.1, -0.5, float("nan"))]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_bad_sampling_is_refused(settings):
    with pytest.raises(ValueError, match="top_k"):
        Sampling(**settings)


BAD_PROMPTS = {
    "longer than the context": {"ids": torch.full((2, 23), 4)},
    "one row longer than the context": {"ids": torch.full((2, 30), 4), "prompt_lengths": torch.tensor([3, 23])},
    "placeholders without an image": {"ids": torch.full((2, 4), IMAGE_TOKEN_ID)},
    "an image without placeholders": {"ids": torch.full((2, 3), 4), "images": torch.zeros(1, 3, 16, 16)},
    "too few placeholders": {"ids": torch.tensor([[3] + 3 * [IMAGE_TOKEN_ID]]), "images": torch.zeros(1, 3, 16, 16)},
}


@pytest.mark.parametrize("prompt", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_bad_prompt_is_refused_before_the_decoder_runs(record_calls, prompt):
    """So that a cache stays as it was."""
    model = small_vocab_owl(context=22)
    calls = record_calls(model.llama)
    with pytest.raises(ValueError):
        next(generate(model, **prompt))
    assert calls == []


@pytest.mark.parametrize("temperature", [1e-50, 1e-38, 1e38, 1e300, -1.0, torch.nan, torch.inf])
def test_temperatures_that_float32_cannot_divide_by_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-37, 1.0, 1e37])
def test_extreme_temperatures_select_a_token_of_finite_logits(temperature):
    logits = torch.tensor([[-torch.inf, -3e38, 3e38], [0.0, -torch.inf, -1.0], [1, torch.nan, 2], [0, 1, torch.inf]])
    tokens = sample_token(logits, Sampling(temperature), torch.full((4,), 0.5)).tolist()
    assert tokens[0] in (1, 2) and tokens[1] in (0, 2) and tokens[2:] == [-1, -1]
    if temperature < 1:
        assert tokens[:2] == [2, 0]
