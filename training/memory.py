"""Memory of a training step, measured on fake tensors: they have shapes but no data, so a 7B takes seconds on a laptop.

    state_bytes        weights, gradients and moments of a model
    peak_bytes         peak memory of the tensors that a function creates
    activation_bytes   peak_bytes of the forward and backward pass of a model

Training also needs the weights, their gradients, and two moments per trained weight: in float32, 16 bytes per trained
and 4 bytes per frozen weight.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import Modality
from model import Owl, cross_entropy_sum


class StorageTracker(TorchDispatchMode):
    """Tracks the memory of all tensors that operations create while the mode is active.

    It counts storages, not tensors: views share one, and the autograd graph keeps it alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = weakref.WeakSet()
        self.current = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs)):
            self.seen.add(tensor.untyped_storage())  # if it is new here, it is older than the tracker: not counted
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.current += storage.nbytes()
                weakref.finalize(storage, self._subtract, storage.nbytes())
        self.peak = max(self.peak, self.current)
        return result

    def _subtract(self, n_byte: int) -> None:
        self.current -= n_byte


def state_bytes(model: nn.Module) -> dict[str, float]:
    """Bytes of a model's weights, of their gradients, and of AdamW's moments."""
    needed = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for parameter in model.parameters():
        needed["weights"] += parameter.nbytes
        needed["gradients"] += parameter.nbytes * parameter.requires_grad
        needed["optimizer"] += 2 * parameter.nbytes * parameter.requires_grad
    needed["weights"] += sum(buffer.nbytes for buffer in model.buffers())  # quantized weights
    return needed


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(function: Callable[[], None]) -> int:
    """Calls a function and returns the peak memory of the tensors that it creates, real or fake.

    Neither tensors from before nor workspace inside a kernel count.
    """
    with StorageTracker() as tracker:
        function()
    return tracker.peak


class FakeStep(nn.Module):
    """Forward and backward pass of one micro-batch, given only its sizes. A module, as functional_call needs one.

    Does what Owl.forward does, except that it reads no values, such as which tokens are visual or supervised.
    """

    def __init__(self, model: Owl, autocast: AbstractContextManager):
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, n_image: int, length: int, n_supervised: int) -> None:
        with self.autocast:
            loss = self.loss(n_image, length, n_supervised)
        if loss.requires_grad:
            loss.backward()

    def loss(self, n_image: int, length: int, n_supervised: int) -> Tensor:
        config, llama = self.model.config, self.model.llama
        ids, labels = torch.empty(2, 1, length, dtype=torch.int64)
        images = torch.empty(n_image, 3, config.image_size, config.image_size)
        is_image = torch.empty(1, length, dtype=torch.bool)
        x, modality = llama.embed_tokens(ids), None  # [1, length, n_embd]
        if n_image > 0:
            visual = self.model.encode_images(images)
            modality = Modality.from_mask(is_image, n_image * config.n_visual_tokens)
            positions = modality.order[modality.n_text :]
            x = x.flatten(0, 1).index_copy(0, positions, visual.flatten(0, 1).to(x.dtype))[None]
        x = llama(x, modality)
        targets = labels[0, :n_supervised]
        x = x[:, :-1].flatten(0, 1).index_select(0, targets)
        return cross_entropy_sum(llama.lm_head, x, targets)


def activation_bytes(
    model: Owl,
    n_image: int,
    length: int,
    n_supervised: int,
    *,
    autocast: AbstractContextManager,
    accumulate: bool = True,
) -> int:
    """Returns the peak memory of the forward and backward pass of a micro-batch, besides weights and gradients.

    model: on any device, "meta" included, not sharded; in training mode, with requires_grad and checkpointed blocks as
    in the run. length: of the micro-batch, visual tokens included. autocast: the context of the forward pass, of a CPU.
    accumulate: gradients exist already and are added to; if False, those that the backward pass creates count as well.
    The operations are those of a CPU: on CUDA, dropout needs less memory, and autocast keeps some norms in float32.
    """
    with FakeTensorMode(), torch.compiler.set_stance("force_eager"):  # nothing is compiled for fake tensors
        state = {}
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
            if fake.requires_grad and accumulate:
                fake.grad = torch.empty_like(fake)  # created before the tracker, so it does not count
            state[f"model.{name}"] = fake
        step = FakeStep(model, autocast)
        return peak_bytes(lambda: functional_call(step, state, (n_image, length, n_supervised)))
