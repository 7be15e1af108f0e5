"""AdamW for the trained parameters, and the learning rate of each step."""

import math

import torch
from torch import nn

from model import Owl
from training.options import Recipe



def vit_depth(name: str, n_layer: int) -> int:
    """Returns the exponent of vit_lr_decay for a parameter.

    It is 1 in the top block of the ViT, n_layer in the lowest, n_layer + 1 for its embeddings, and 0 elsewhere.
    """
    if name.startswith("vit.blocks."):
        return n_layer - int(name.split(".")[2])
    if name.startswith("vit.") and not name.startswith("vit.post_norm"):
        return n_layer + 1
    return 0


def make_optimizer(model: Owl, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW for the trained parameters: norms and biases do not decay, lower ViT layers have lower rates.

    A group's rate is that of `learning_rate` times lr_scale, from the warm-up to the end of the cosine.
    """
    part_lr = {"vit": recipe.vit_lr or recipe.lr, "abstractor": recipe.abstractor_lr or recipe.lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = part_lr.get(name.partition(".")[0], recipe.lr) / recipe.lr
            scale *= recipe.vit_lr_decay ** vit_depth(name, model.config.vit.n_layer)
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr_scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,  # one kernel, no temporary copies of the parameters
    )
    # AdamW would create its state in the first step. A checkpoint is loaded into it before.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a half cosine down to min_lr at the last step. Steps count from 1."""
    if step <= recipe.warmup:
        return recipe.lr * step / recipe.warmup
    progress = (step - 1 - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
