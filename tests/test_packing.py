"""Packed sequences: the results of each sequence alone, no attention between them, and a loss in chunks."""

import math
import statistics
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from common.device import disable_tf32
from conftest import VARIANTS, Batch, assert_close, assert_gradients_close, gradients, make_batch, make_config, make_owl
from conftest import make_packed, needs_cuda
from llama import PackedSequences, packed_attention
from model import IGNORE_INDEX, IMAGE_TOKEN_ID

aten = torch.ops.aten

# (text tokens, images) of each sequence. Some have a single position, one nothing but an image and a token.
ROWS = {
    "mixed": [(5, 1), (1, 0), (7, 0), (4, 2), (1, 0), (1, 1), (9, 0)],
    "images": [(3, 1), (6, 2), (2, 1)],
    "text": [(6, 0), (1, 0), (3, 0), (11, 0)],
    "one": [(4, 1)],
}


def make_sequences(lengths: list[int]) -> PackedSequences:
    """Boundaries only, for packed_attention."""
    nothing = torch.zeros(1, sum(lengths), dtype=torch.int64)
    return make_packed(nothing, nothing, lengths)


def pack(batch: Batch) -> tuple[Tensor, Tensor, PackedSequences]:
    """Returns ids [1, T], labels [1, T] and boundaries. The first token of each sequence is not supervised."""
    ids = torch.cat([ids for ids, _ in batch.rows], dim=1)
    lengths = batch.lengths.tolist()
    labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, IGNORE_INDEX)
    labels[0, [0, *accumulate(lengths[:-1])]] = IGNORE_INDEX
    return ids, labels, make_packed(ids, labels, lengths)


# ----------------------------------------------------------------------------------------------------
# Each sequence alone


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ROWS)
def test_packed_equals_separate_sequences(name, variant, n_kv_head):
    """The logits of every position, the loss, and the gradient of every parameter."""
    model = make_owl(make_config(variant, llama={"n_kv_head": n_kv_head}), seed=3)
    batch = make_batch(model.config, ROWS[name])
    ids, labels, packed = pack(batch)
    logits, _ = model(ids, batch.images, packed=packed)
    _, loss = model(ids, batch.images, labels, packed)

    context = model.llama.attention_context(torch.zeros(*ids.shape, 32), None, None, packed)
    assert torch.equal(context.positions[0], torch.cat([torch.arange(n) for n in batch.lengths]))  # restart at 0

    loss_sum = torch.zeros(())
    starts = packed.cu_seqlens.tolist()
    for (row, images), start, end in zip(batch.rows, starts, starts[1:]):
        alone, _ = model(row, images)
        assert_close(logits[0, start:end], alone[0])
        loss_sum = loss_sum + F.cross_entropy(alone[0, :-1], labels[0, start + 1 : end], reduction="sum")
    expected = loss_sum / (labels != IGNORE_INDEX).sum()
    assert_close(loss, expected)
    assert_gradients_close(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_reaches_another_sequence(variant):
    """From a sequence's logits to the text embeddings and pixels of all others the gradient is exactly 0."""
    model = make_owl(make_config(variant), seed=3)
    batch = make_batch(model.config, ROWS["mixed"])
    ids, _, packed = pack(batch)
    images = batch.images.clone().requires_grad_()
    x, modality = model.embed(ids, images)
    y = model.llama(x, modality, packed=packed)[0]
    starts, n_image = packed.cu_seqlens.tolist(), 0
    for (_, own_images), start, end in zip(batch.rows, starts, starts[1:]):
        x_gradient, image_gradient = torch.autograd.grad(y[start:end].pow(3).sum(), (x, images), retain_graph=True)
        reached = x_gradient[0].any(dim=1)
        assert reached[start:end].all() and reached.sum() == end - start
        own = range(n_image, n_image + (0 if own_images is None else len(own_images)))
        assert image_gradient.flatten(1).any(dim=1).nonzero()[:, 0].tolist() == list(own)
        n_image = own.stop


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5], [1, 4, 1, 7, 2]])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_packed_attention_equals_a_block_mask(lengths, n_kv_head):
    generator = torch.Generator().manual_seed(len(lengths))
    T, D = sum(lengths), 8
    q, k, v = (torch.randn(1, n, T, D, generator=generator).requires_grad_() for n in (4, n_kv_head, n_kv_head))
    y = packed_attention(q, k, v, make_sequences(lengths))
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    visible = (owner[:, None] == owner) & torch.ones(T, T, dtype=torch.bool).tril()
    keys, values = (x.repeat_interleave(4 // n_kv_head, dim=1) for x in (k, v))
    expected = (q @ keys.mT / math.sqrt(D)).masked_fill(~visible, -math.inf).softmax(dim=-1) @ values
    assert_close(y, expected)
    names = ("q", "k", "v")
    actual, wanted = (dict(zip(names, torch.autograd.grad(x.pow(3).sum(), (q, k, v)))) for x in (y, expected))
    assert_gradients_close(actual, wanted)


# ----------------------------------------------------------------------------------------------------
# The loss in chunks


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_in_chunks_of_any_size(monkeypatch, variant):
    model = make_owl(make_config(variant), seed=3)
    batch = make_batch(model.config, ROWS["mixed"])
    ids, labels, packed = pack(batch)
    logits, _ = model(ids, batch.images, packed=packed)
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    expected_gradients = gradients(model, expected)
    n_supervised = int((labels != IGNORE_INDEX).sum())
    assert n_supervised > 6
    for size in (1, 3, n_supervised, 1000):
        monkeypatch.setattr(model_module, "LOSS_CHUNK", size)
        _, loss = model(ids, batch.images, labels, packed)
        assert_close(loss, expected, 2e-6)
        assert_gradients_close(gradients(model, loss), expected_gradients)


class LargestResult(TorchDispatchMode):
    """The most rows of any float32 result with vocab_size columns, except lm_head's transposed weight and gradient."""

    def __init__(self, vocab_size: int, n_embd: int):
        super().__init__()
        self.vocab_size, self.n_embd = vocab_size, n_embd
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.shape[-1:] == (self.vocab_size,):
                rows = tensor.numel() // self.vocab_size
                self.rows = max(self.rows, rows if rows != self.n_embd else 0)
        return result


@pytest.mark.parametrize("trained", ["everything", "all but the language model", "all but lm_head"])
def test_only_one_chunk_of_logits_is_in_memory(monkeypatch, trained):
    """In the forward and in the backward pass. With one large chunk, all logits are found, so the test sees them."""
    vocab_size = 997  # no other tensor has this width
    model = make_owl(make_config("owl2", llama={"vocab_size": vocab_size}), seed=3)
    model.llama.requires_grad_(trained != "all but the language model")
    model.llama.lm_head.requires_grad_(trained == "everything")
    batch = make_batch(model.config, ROWS["mixed"])
    ids, labels, packed = pack(batch)
    n_supervised = int((labels != IGNORE_INDEX).sum())
    assert 3 < n_supervised < model.config.llama.n_embd
    for size in (3, 1000):
        monkeypatch.setattr(model_module, "LOSS_CHUNK", size)
        with LargestResult(vocab_size, model.config.llama.n_embd) as largest:
            _, loss = model(ids, batch.images, labels, packed)
            assert largest.rows == min(size, n_supervised)
            largest.rows = 0
            loss.backward()
            assert largest.rows == min(size, n_supervised)


class ReadsNothing(TorchDispatchMode):
    """Fails at operations that need the values of a tensor on the host, which would wait for a GPU."""

    WAITING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.masked_scatter_backward)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.WAITING, function
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ROWS)
def test_a_training_step_needs_no_values_on_the_host(variant, name):
    model = make_owl(make_config(variant))
    batch = make_batch(model.config, ROWS[name])
    ids, labels, packed = pack(batch)
    with ReadsNothing():
        model(ids, batch.images, labels, packed)[1].backward()
    with pytest.raises(AssertionError), ReadsNothing():
        model(ids, batch.images, labels)


# ----------------------------------------------------------------------------------------------------
# CUDA


def move(packed: PackedSequences, device: str) -> PackedSequences:
    return packed._replace(cu_seqlens=packed.cu_seqlens.to(device), supervised=packed.supervised.to(device))


@needs_cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_does_not_wait_for_cuda(variant):
    model = make_owl(make_config(variant)).cuda()
    batch = make_batch(model.config, ROWS["mixed"])
    ids, labels, packed = pack(batch)
    ids, labels, images, packed = ids.cuda(), labels.cuda(), batch.images.cuda(), move(packed, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, images, labels, packed)[1]
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("n_kv_head", [8, 2])
@pytest.mark.parametrize("lengths", [[1, 300, 17, 1, 64, 129], [1], [2048], [1] * 50])
def test_the_varlen_kernel_equals_the_loop(n_kv_head, lengths):
    """In bfloat16, within 1 % of the largest number: both round their inputs to 8 bits, but sum in another order.

    Gradients are compared together: those of a query that sees a single key are 0, to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    T, D = sum(lengths), 64
    shapes = ((1, 8, T, D), (1, n_kv_head, T, D), (1, n_kv_head, T, D))
    exact = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    rounded = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    weight = torch.randn(shapes[0], generator=generator).bfloat16()
    packed = make_sequences(lengths)
    expected = packed_attention(*exact, packed)
    y = packed_attention(*rounded, move(packed, "cuda"))
    assert y.dtype == torch.bfloat16
    (y * weight.cuda()).sum().backward()
    (expected * weight.float()).sum().backward()
    assert_close(y.detach().cpu().float(), expected.detach(), 0.01)
    on_cuda, on_cpu = (torch.cat([x.grad.cpu().float().flatten() for x in inputs]) for inputs in (rounded, exact))
    assert_close(on_cuda, on_cpu, 0.01)


@needs_cuda
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("name", ROWS)
def test_packed_on_cuda_equals_cpu(variant, n_kv_head, name):
    """In float32 to rounding. In bfloat16 the loss within 1 %, and gradients differ no more than a CPU's in bfloat16."""
    disable_tf32()
    model = make_owl(make_config(variant, llama={"n_kv_head": n_kv_head}), seed=3)
    batch = make_batch(model.config, ROWS[name])
    ids, labels, packed = pack(batch)

    def compute(device: str, bfloat16: bool) -> tuple[float, dict[str, Tensor]]:
        model.to(device)
        images = None if batch.images is None else batch.images.to(device)
        on_device = move(packed, device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            _, loss = model(ids.to(device), images, labels.to(device), on_device)
        return loss.item(), {name: x.cpu() for name, x in gradients(model, loss).items()}

    loss, expected = compute("cpu", False)
    expected = {name: x for name, x in expected.items() if x.norm() > 1e-4}

    def median_error(actual: dict[str, Tensor]) -> float:
        return statistics.median(((actual[name] - x).norm() / x.norm()).item() for name, x in expected.items())

    exact_loss, exact = compute("cuda", False)
    assert exact_loss == pytest.approx(loss, rel=1e-5) and median_error(exact) < 1e-4
    rounded_loss, rounded = compute("cuda", True)
    assert rounded_loss == pytest.approx(loss, rel=0.01)
    assert median_error(rounded) < 2 * median_error(compute("cpu", True)[1])
