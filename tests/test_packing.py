"""Samples packed into one row are to the model what they are alone: same numbers, and nothing passes between them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from conftest import make_images, make_row
from data.conversations import Sample, collate
from llama import Documents, attend_within
from model import IGNORE, IMAGE_ID, Owl

STYLES = ("owl1", "owl2")
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# (words, images) of the samples of a row. One has a single position, one nothing but an image and a word.
ROWS = {
    "mixed": [(5, 1), (1, 0), (7, 0), (4, 2), (1, 0), (1, 1), (9, 0)],
    "images": [(3, 1), (6, 2), (2, 1)],
    "text": [(6, 0), (1, 0), (3, 0), (11, 0)],
    "one": [(4, 1)],
}


def make_samples(owl: Owl, name: str, seed: int = 0) -> list[Sample]:
    """Random samples of which about half the words are supervised."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for n_word, n_image in ROWS[name]:
        ids = make_row(owl.config, n_word, n_image, generator)
        supervised = torch.rand(len(ids), generator=generator) < 0.5
        supervised[0] = True  # collate must see to it that the sample before does not foresee it
        supervised[-1] = True
        labels = torch.where(supervised & (ids != IMAGE_ID), ids, IGNORE)
        images = make_images(owl.config, n_image, generator)
        size = owl.config.image_size
        images = torch.empty(0, 3, size, size) if images is None else images
        samples.append(Sample(ids.tolist(), labels.tolist(), images))
    return samples


def images_of(samples: list[Sample]) -> Tensor | None:
    images = torch.cat([sample.images for sample in samples])
    return images if len(images) else None


def gradients(owl: Owl, loss: Tensor) -> dict[str, Tensor]:
    """By name; a parameter that took no part has a gradient of zero."""
    names, parameters = zip(*owl.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found))


def assert_close(a: Tensor, b: Tensor, what: str = "") -> None:
    """To 1e-5 of the largest number in it, or of 1."""
    scale = max(1.0, b.abs().max().item())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale, msg=lambda text: f"{what}: {text}")


@pytest.fixture
def owl(tiny_config, tiny_owl, request):
    style, n_kv_head = request.param
    return tiny_owl(tiny_config(style, llama={"n_kv_head": n_kv_head}), seed=3)


KINDS = [(style, n_kv_head) for style in STYLES for n_kv_head in (4, 2)]
EACH_OWL = pytest.mark.parametrize("owl", KINDS, ids=[f"{style}-{n}" for style, n in KINDS], indirect=True)


# ----------------------------------------------------------------------------------------------------
# The same numbers


@EACH_OWL
@pytest.mark.parametrize("name", ROWS)
def test_a_packed_row_is_its_samples_alone(owl, name):
    """The logits of every position, the loss, and the gradient of every parameter."""
    samples = make_samples(owl, name)
    batch = collate(samples)
    documents = Documents(batch.starts, batch.longest)
    logits = owl(batch.ids, batch.images, documents=documents)[0]
    loss = owl(batch.ids, batch.images, batch.labels, documents)[1]

    loss_sum = torch.zeros(())
    for sample, first in zip(samples, batch.starts.tolist()):
        T = len(sample.ids)
        alone = owl(torch.tensor([sample.ids]), images_of([sample]))[0]
        assert_close(logits[0, first : first + T], alone[0])
        targets = torch.tensor(sample.labels[1:], dtype=torch.int64)
        loss_sum = loss_sum + F.cross_entropy(alone[0, :-1], targets, ignore_index=IGNORE, reduction="sum")
    n_supervised = sum(label != IGNORE for sample in samples for label in sample.labels[1:])
    assert batch.n_supervised == n_supervised == int((batch.labels != IGNORE).sum()) > 0
    expected = loss_sum / n_supervised
    assert_close(loss, expected)
    for (key, a), b in zip(gradients(owl, loss).items(), gradients(owl, expected).values()):
        assert_close(a, b, key)


@EACH_OWL
@pytest.mark.parametrize("name", ROWS)
def test_a_packed_row_is_the_padded_batch(owl, padded, name):
    samples = make_samples(owl, name)
    batch = collate(samples)
    documents = Documents(batch.starts, batch.longest)
    ids, lengths = padded([torch.tensor(sample.ids) for sample in samples])
    labels, _ = padded([torch.tensor(sample.labels) for sample in samples], filler=IGNORE)
    assert (labels[1:, 0] != IGNORE).any() or name == "one"
    rows = owl(ids, images_of(samples))[0]
    logits = owl(batch.ids, batch.images, documents=documents)[0]
    assert_close(logits[0], torch.cat([row[:length] for row, length in zip(rows, lengths)]))
    loss = owl(ids, images_of(samples), labels)[1]
    packed = owl(batch.ids, batch.images, batch.labels, documents)[1]
    assert_close(packed, loss)
    for (key, a), b in zip(gradients(owl, packed).items(), gradients(owl, loss).values()):
        assert_close(a, b, key)


@EACH_OWL
def test_positions_begin_anew_with_each_sample(owl):
    """The same sample twice in a row, far from the row's beginning: the same logits."""
    samples = make_samples(owl, "mixed")
    twice = [samples[3], *samples[4:], samples[3]]
    batch = collate(twice)
    with torch.no_grad():
        logits = owl(batch.ids, batch.images, documents=Documents(batch.starts, batch.longest))[0][0]
    T = len(samples[3].ids)
    assert_close(logits[:T], logits[-T:])
    view = owl.llama._view(torch.zeros(1, batch.ids.shape[1], 32), None, None, Documents(batch.starts, batch.longest))
    assert view.positions[0].tolist() == [i for sample in twice for i in range(len(sample.ids))]
    # And positions matter at all: were they not to begin anew, this would be seen.
    as_one = owl(batch.ids, batch.images)[0][0]
    assert (as_one[-T:] - logits[-T:]).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------------
# Nothing passes between samples


@EACH_OWL
@pytest.mark.parametrize("name", ["mixed", "images", "text"])
def test_what_one_sample_holds_changes_no_other(owl, name):
    """Other words and other images, of one sample after the other: the logits of the rest stay, bit for bit."""
    samples = make_samples(owl, name)
    batch = collate(samples)
    documents = Documents(batch.starts, batch.longest)
    n_images = [len(sample.images) for sample in samples]
    starts = batch.starts.tolist()
    with torch.no_grad():
        before = owl(batch.ids, batch.images, documents=documents)[0][0]
        for i in range(len(samples)):
            a, b = starts[i], starts[i + 1]
            ids = batch.ids.clone()
            words = ids[0, a:b] != IMAGE_ID
            ids[0, a:b][words] = (ids[0, a:b][words] - 3 + 7) % 37 + 3
            images = None if batch.images is None else batch.images.clone()
            if n_images[i]:
                first = sum(n_images[:i])
                images[first : first + n_images[i]] *= -2.0
            after = owl(ids, images, documents=documents)[0][0]
            changed = (before != after).any(dim=1)
            assert changed[a:b].all()  # each of its own, from the first on
            assert not changed[:a].any() and not changed[b:].any()


@EACH_OWL
@pytest.mark.parametrize("name", ["mixed", "images", "text"])
def test_no_gradient_reaches_another_sample(owl, name):
    """From a sample's logits to the words and the pixels of all others it is exactly 0; to its own it is not."""
    samples = make_samples(owl, name)
    batch = collate(samples)
    documents = Documents(batch.starts, batch.longest)
    images = torch.zeros(0, 3, 16, 16) if batch.images is None else batch.images
    images = images.clone().requires_grad_()
    starts = batch.starts.tolist()
    owner = [i for i, sample in enumerate(samples) for _ in sample.images]
    kept = []
    hook = owl.llama.embed_tokens.register_forward_hook(lambda module, args, out: kept.append(out))
    logits = owl(batch.ids, images if len(images) else None, documents=documents)[0][0]
    hook.remove()
    (embedded,) = kept
    for i, sample in enumerate(samples):
        a, b = starts[i], starts[i + 1]
        # Squares, since a plain sum might have slopes that cancel.
        wanted = (embedded, images) if len(images) else (embedded,)
        found = torch.autograd.grad(logits[a:b].square().sum(), wanted, retain_graph=True)
        slopes = found[0][0].abs().amax(dim=1)
        assert slopes[:a].eq(0).all() and slopes[b:].eq(0).all()
        assert (slopes[a:b] > 0).tolist() == [id != IMAGE_ID for id in sample.ids]  # under image words nothing is read
        for j, slope in zip(owner, found[1] if len(found) > 1 else ()):
            assert slope.ne(0).any() == (j == i)
            assert j == i or slope.eq(0).all()


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5], [1, 4, 1, 7, 2]])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_attention_within_documents_is_attention_with_a_block_mask(lengths, n_kv_head):
    """Against softmax written out, with a mask that is causal and blind across borders."""
    generator = torch.Generator().manual_seed(len(lengths))
    T, D = sum(lengths), 8
    q = torch.randn(1, 4, T, D, generator=generator).requires_grad_()
    k, v = (torch.randn(1, n_kv_head, T, D, generator=generator).requires_grad_() for _ in range(2))
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    y = attend_within(q, k, v, Documents(starts, max(lengths)))
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    sees = (owner[:, None] == owner[None]) & torch.ones(T, T, dtype=torch.bool).tril()
    keys, values = (x.repeat_interleave(4 // n_kv_head, dim=1) for x in (k, v))
    expected = (q @ keys.mT / math.sqrt(D)).masked_fill(~sees, -math.inf).softmax(dim=-1) @ values
    assert_close(y, expected)
    weight = torch.randn(y.shape, generator=generator)
    found, wanted = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (y, expected))
    for a, b in zip(found, wanted):
        assert_close(a, b)


# ----------------------------------------------------------------------------------------------------
# The loss, a chunk at a time


class Largest(TorchDispatchMode):
    """Watches every operation, of the backward pass as well: the most rows of any float32 result of `width` columns.

    But for those of n_embd rows: so lm_head's weight and its gradient look when they are transposed.
    """

    def __init__(self, width: int, n_embd: int):
        super().__init__()
        self.width = width
        self.n_embd = n_embd
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.shape[-1:] == (self.width,):
                rows = tensor.numel() // self.width
                self.rows = max(self.rows, rows if rows != self.n_embd else 0)
        return result


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["mixed", "text"])
def test_the_loss_is_the_same_in_chunks_of_any_size(tiny_config, tiny_owl, monkeypatch, style, name):
    owl = tiny_owl(tiny_config(style), seed=3)
    batch = collate(make_samples(owl, name))
    documents = Documents(batch.starts, batch.longest)
    logits = owl(batch.ids, batch.images, documents=documents)[0]
    whole = F.cross_entropy(logits[0, :-1], batch.labels[0, 1:], ignore_index=IGNORE)
    expected = gradients(owl, whole)
    assert batch.n_supervised > 6
    for size in (1, 3, batch.n_supervised, 1000):
        monkeypatch.setattr(model_module, "LOSS_CHUNK", size)
        loss = owl(batch.ids, batch.images, batch.labels, documents)[1]
        assert_close(loss, whole)
        for key, gradient in gradients(owl, loss).items():
            assert_close(gradient, expected[key], key)


@pytest.mark.parametrize("trained", ["everything", "nothing of the language model", "no lm_head"])
def test_no_more_logits_than_a_chunk_are_ever_made(tiny_config, tiny_owl, monkeypatch, trained):
    """Forward and backward. Both are watched: without chunks, all of the logits would be seen."""
    vocab_size = 997  # as wide as nothing else
    owl = tiny_owl(tiny_config("owl2", llama={"vocab_size": vocab_size}), seed=3)
    if trained == "nothing of the language model":
        owl.llama.requires_grad_(False)
    owl.llama.lm_head.requires_grad_(trained == "everything")
    batch = collate(make_samples(owl, "mixed"))
    documents = Documents(batch.starts, batch.longest)
    n_supervised = batch.n_supervised
    seen = {}
    for size in (3, 1000):
        monkeypatch.setattr(model_module, "LOSS_CHUNK", size)
        with Largest(vocab_size, owl.config.llama.n_embd) as watch:
            loss = owl(batch.ids, batch.images, batch.labels, documents)[1]
            in_forward = watch.rows
            watch.rows = 0
            loss.backward()
        seen[size] = in_forward, watch.rows
    assert seen == {3: (3, 3), 1000: (n_supervised, n_supervised)} and 3 < n_supervised < 32


def test_a_row_without_anything_to_learn_has_no_loss(tiny_config, tiny_owl):
    """A loss of 0, gradients of 0, and no NaN."""
    owl = tiny_owl(tiny_config("owl2"), seed=3)
    batch = collate(make_samples(owl, "images"))
    documents = Documents(batch.starts, batch.longest)
    loss = owl(batch.ids, batch.images, torch.full_like(batch.labels, IGNORE), documents)[1]
    assert loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients(owl, loss).values())
    empty = collate([])  # as where all samples were skipped
    loss = owl(empty.ids, empty.images, empty.labels, Documents(empty.starts, empty.longest))[1]
    assert loss.item() == 0


# ----------------------------------------------------------------------------------------------------
# On a GPU


@ON_CUDA
@pytest.mark.parametrize("n_kv_head", [8, 2])
@pytest.mark.parametrize("lengths", [[1, 300, 17, 1, 64, 129], [1], [2048], [1] * 50])
def test_the_kernel_is_the_loop(n_kv_head, lengths):
    """In bfloat16, within 1 % of the largest number: both round what they read to 8 bits, in other orders."""
    generator = torch.Generator().manual_seed(0)
    T, D = sum(lengths), 64
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    shapes = ((1, 8, T, D), (1, n_kv_head, T, D), (1, n_kv_head, T, D))
    exact = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    rough = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    weight = torch.randn(shapes[0], generator=generator).bfloat16()
    y = attend_within(*rough, Documents(starts.cuda(), max(lengths)))
    expected = attend_within(*exact, Documents(starts, max(lengths)))
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    (y * weight.cuda()).sum().backward()
    (expected * weight.float()).sum().backward()
    for a, b in [(y, expected), *((a.grad, b.grad) for a, b in zip(rough, exact))]:
        assert (a.cpu().float() - b).abs().max() < 0.01 * b.abs().max()


@ON_CUDA
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("name", ROWS)
def test_a_packed_row_on_a_gpu_is_the_cpus(tiny_config, tiny_owl, style, n_kv_head, name):
    """bfloat16 products against float32: loss to 1 %; of the gradients, half are within 5 % of their norm, all 30 %."""
    owl = tiny_owl(tiny_config(style, llama={"n_kv_head": n_kv_head}), seed=3)
    batch = collate(make_samples(owl, name))
    loss = owl(batch.ids, batch.images, batch.labels, Documents(batch.starts, batch.longest))[1]
    expected = gradients(owl, loss)
    owl.cuda()
    images = None if batch.images is None else batch.images.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        documents = Documents(batch.starts.cuda(), batch.longest)
        rough = owl(batch.ids.cuda(), images, batch.labels.cuda(), documents)[1]
    assert rough.item() == pytest.approx(loss.item(), rel=0.01)
    errors = []
    for key, gradient in gradients(owl, rough).items():
        if expected[key].norm() > 1e-4:
            errors.append(((gradient.cpu() - expected[key]).norm() / expected[key].norm()).item())
    assert sorted(errors)[len(errors) // 2] < 0.05 and max(errors) < 0.3
