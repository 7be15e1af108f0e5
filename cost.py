"""What a training step costs, in FLOPs and in bytes: counted, not guessed.

    train_flops         from the shapes of the weights and from what is trained
    peak_bytes          of any piece of code: what the tensors made in it occupy at one time, at most
    activation_bytes    of a model's step on fake tensors, which have shapes but no memory: a 7B's takes seconds
                        on a laptop

Training takes, beside activation_bytes, its weights, a gradient for each trained one, and AdamW's two numbers for
each: in float32 16 bytes a trained weight and 4 a frozen one.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from llama import Split
from model import Owl, OwlConfig, summed_loss

# --- FLOPs -------------------------------------------------------------------------------------------

# Dense bfloat16 FLOP/s, as the makers' data sheets have it (theirs are often the double, "with sparsity"), by a part of
# the name that torch gives the device. The first that fits counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """What a device can compute at best: FLOP/s in bfloat16. None where that is not known: a CPU, an unlisted GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if " MIG " in name:  # a slice of a GPU
        return None
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


# The Linear that ends an attention or an MLP, or stands alone: it reads what comes right before it. All others read
# what came into their attention or MLP.
LAST = ("proj", "fc2", "out", "w2", "fc", "o_proj", "down_proj", "lm_head", "lora_B")


def train_flops(model: Owl, n_image: int, lengths: list[int], n_supervised: int) -> float:
    """FLOPs of one micro-batch, forward and backward: those that the result needs, however it is computed.

    A product of a weight [n_out, n_in] and a token is 2 * n_out * n_in; the weight's gradient is as much again if it
    is trained, and so is the gradient of what comes in if anything before is trained. Attention is two products for
    each pair of a query and a key, backward four; in the language model a pair counts if the key is of the query's
    own document and not after it. The language model's head counts at supervised tokens alone. Left out: norms,
    softmaxes and all else that is no matrix product, what activation checkpointing computes twice, and padding.
    Exact for what the stages train; a vision tower trained below a frozen abstractor would count one product too many.

    model: on any device, "meta" included; what is trained is what requires a gradient. n_image: images.
    lengths: of the documents, in positions, image words included. n_supervised: supervised tokens.
    """
    config = model.config
    n_query, n_token = config.n_query, config.vit.n_token
    pairs = {
        "proj": n_image * n_token**2,
        "out": n_image * n_query * (n_query + n_token),
        "o_proj": sum(length * (length + 1) // 2 for length in lengths),
    }
    flops = 0
    before = False  # is anything trained on the way to here?
    door = False  # the same, where the attention or MLP begins that we are in
    for name, module in model.named_modules():  # in the order in which they compute, but for w2 before w3
        n = tokens_through(name, config, n_image, sum(lengths), n_supervised)
        if n == 0:  # no images: the model's eye stays shut
            continue
        leaf = name.removesuffix(".lora_A").split(".")[-1]  # lora_A reads what the Linear reads that it corrects
        if leaf in ("attn", "self_attn", "mlp"):
            door = before
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            into = False if isinstance(module, nn.Conv2d) else before if leaf in LAST else door
            flops += 2 * n * module.weight.numel() * (1 + module.weight.requires_grad + into)
            if leaf in pairs and leaf == name.split(".")[-1]:
                # Queries and keys are as wide as what this Linear, at the attention's end, reads.
                flops += 4 * pairs[leaf] * module.in_features * (3 if before else 1)
        before = before or any(p.requires_grad for p in module.parameters(recurse=False))
    return float(flops)


def tokens_through(name: str, config: OwlConfig, n_image: int, n_position: int, n_supervised: int) -> int:
    """How many tokens pass through one of an Owl's modules."""
    part, *path = name.split(".")
    if part == "vit":
        return n_image * (config.vit.n_token - ("patch_embed" in path))  # the class token is no patch
    if part == "abstractor":
        reads_image = "k" in path or "v" in path
        return n_image * (config.n_query + config.vit.n_token * reads_image)
    if path == ["lm_head"]:
        return n_supervised
    n_word = n_image * config.image_words
    if ".multiway.0" in name:
        return n_position - n_word
    return n_word if ".multiway.1" in name else n_position


# --- bytes -------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Sees each operation as it happens, and keeps account of the memory of the tensors that come out.

    What matters is not the tensor but its storage, which views share and which lives on in the autograd graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = weakref.WeakSet()  # of storages
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs)):
            self.seen.add(tensor.untyped_storage())  # if it is not known by now, it is older than the ledger
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, size: int) -> None:
        self.now -= size


def tensors_in(tree: object) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from tensors_in(branch)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


def peak_bytes(step: Callable[[], None]) -> int:
    """Runs `step`, and returns the most bytes that the tensors made in it occupied at one time.

    Tensors from before do not count, nor does what a kernel takes for itself while it runs. It works on fake tensors
    as on real ones.
    """
    with Ledger() as ledger:
        step()
    return ledger.peak


class FakeStep(nn.Module):
    """A micro-batch's forward and backward, of which no more than the sizes are known."""

    def __init__(self, model: Owl, precision: AbstractContextManager):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, n_image: int, length: int, n_supervised: int) -> None:
        with self.precision:
            loss = self.loss(n_image, length, n_supervised)
        if loss.requires_grad:
            loss.backward()

    def loss(self, n_image: int, length: int, n_supervised: int) -> Tensor:
        """What Owl.forward does, less its questions to values: where image words are, which tokens are supervised."""
        size, llama = self.model.config.image_size, self.model.llama
        ids, labels = torch.empty(2, 1, length, dtype=torch.int64)
        images = torch.empty(n_image, 3, size, size)
        is_image = torch.empty(1, length, dtype=torch.bool)
        x = llama.embed_tokens(ids)
        split = None
        if n_image > 0:
            words = self.model.encode_images(images)
            x = x.masked_scatter(is_image[..., None], words.to(x.dtype))
            split = Split.of(is_image, n_image * self.model.config.image_words)
        supervised = labels[0, :n_supervised]
        x = llama(x, split)
        return summed_loss(llama.lm_head, x[0].index_select(0, supervised), supervised)


def activation_bytes(
    model: Owl,
    n_image: int,
    length: int,
    n_supervised: int,
    precision: AbstractContextManager,
    accumulate: bool = True,
) -> int:
    """The most bytes that one micro-batch's forward and backward take beside the weights and their gradients.

    These are the activations kept for the backward pass, the input, autocast's copies of the weights, and whatever
    comes and goes. No memory is used: the step runs on fake tensors of the parameters' shapes and dtypes. It takes
    the operations that a CPU would take; CUDA's fused ones keep less of a dropout (LoRA's, and that of the attention
    in Owl1's abstractor), and its autocast keeps some norms in float32.

    model: on any device, "meta" included, and whole (before it is sharded); in training mode, with requires_grad and
    checkpointed blocks as they will be. length: of the micro-batch, in positions, image words included. precision:
    what the forward pass runs under, on the CPU: torch.autocast("cpu", torch.bfloat16), or nullcontext().
    accumulate: the gradients are there already, from earlier micro-batches, and new ones are added to them. False:
    there are none yet, and those that come as the activations go are counted in.
    """
    with FakeTensorMode():
        state = {}
        for name, old in chain(model.named_parameters(), model.named_buffers()):
            new = torch.empty(old.shape, dtype=old.dtype).requires_grad_(old.requires_grad)
            if new.requires_grad and accumulate:
                new.grad = torch.empty_like(new)  # is there before the step, so that it does not count
            state[f"model.{name}"] = new
        step = FakeStep(model, precision)
        return peak_bytes(lambda: functional_call(step, state, (n_image, length, n_supervised)))
