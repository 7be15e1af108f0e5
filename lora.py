"""LoRA: fine-tuning with a low-rank update of each weight (arXiv 2106.09685; Owl1 section 3.2).

    x [.., n_in] --- W [n_out, n_in], frozen ------------------------------> + --> y [.., n_out]
        |                                                                    |
        +-- dropout -- lora_A [rank, n_in] -- lora_B [n_out, rank] -- * alpha / rank

lora_B starts at zero, so a new adapter changes nothing. `merge_lora` adds lora_B lora_A alpha / rank to W, after which
the adapter costs no time. inference/adapter.py reads and writes adapters.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A frozen Linear and its low-rank update."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)  # nn.Linear's would allocate another weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.register_buffer("unmerged_weight", None, persistent=False)
        options = {"bias": False, "device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, self.out_features, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)  # as in init_lora
        nn.init.zeros_(self.lora_B.weight)
        self.train(linear.training)  # no dropout in a model in evaluation mode

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    @property
    def scale(self) -> float:  # divided by the rank, so that a good learning rate does not depend on the rank
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., n_in]. Returns [.., n_out]."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + self.lora_B(self.lora_A(x)) * self.scale

    def merged_weight(self) -> Tensor:
        """The weight plus its update, [n_out, n_in] float32."""
        return self.weight.float() + self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scale


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yields (name, module) for each LoRALinear of a model."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def inject_lora(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freezes the model and replaces every Linear that a target names by a LoRALinear.

    A target is a full module name or its last parts: "q_proj", "k_proj.multiway.0"; "k_proj" means both branches.
    Raises ValueError if a target names no Linear, or if the model already has an adapter.
    """
    if any(lora_modules(model)):
        raise ValueError("the model already has an adapter: load the model again")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ends = {target: (f".{target}", f".{target}.multiway.0", f".{target}.multiway.1") for target in targets}
    matches = {target: [name for name in linears if f".{name}".endswith(ends[target])] for target in targets}
    if unmatched := [target for target, names in matches.items() if not names]:
        raise ValueError(f"the model has no Linear named {', '.join(unmatched)}")
    model.requires_grad_(False)
    for name in sorted({name for names in matches.values() for name in names}):
        model.set_submodule(name, LoRALinear(linears[name], rank, alpha, dropout))


def init_lora(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, float32 tensor) of new adapter matrices, for a model on the meta device.

    kaiming_uniform with a = sqrt(5) is uniform in +-1 / sqrt(n_in), torch's default for a Linear.
    """
    for name, module in lora_modules(model):
        yield f"{name}.lora_A.weight", nn.init.kaiming_uniform_(torch.empty(module.rank, module.in_features), a=5**0.5)
        yield f"{name}.lora_B.weight", torch.zeros(module.out_features, module.rank)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds each update to its weight, computed in float32 and rounded once to the weight's dtype."""
    for _, module in lora_modules(model):
        if not module.merged:
            module.unmerged_weight = module.weight.data
            module.weight.data = module.merged_weight().to(module.weight.dtype)


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Restores the weights from before merge_lora, bit for bit."""
    for _, module in lora_modules(model):
        if module.merged:
            module.weight.data = module.unmerged_weight
            module.unmerged_weight = None
