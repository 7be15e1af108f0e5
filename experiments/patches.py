"""A model without an abstractor, as in LLaVA: one Linear turns each patch into a visual token.

    python -m experiments.patches train_stage2 --weights FOLDER ...      runs a command with such models

Model folders look like those of other models, but of the abstractor they contain only visual_fc and vit_eos.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import model
from abstractor import Abstractor, AbstractorConfig
from command import ArgumentParser
from weights import load_model


class Patches(nn.Module):
    """Replaces the Abstractor. config.n_query must be the number of patches."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()  # code that iterates over an abstractor's layers finds none
        self.fc = nn.Linear(config.n_embd, config.n_out)
        self.eos = nn.Parameter(torch.zeros(1, 1, config.n_out))

    def forward(self, image: Tensor) -> Tensor:
        """image: [N, 1 + P, n_embd] from the vision encoder. Returns [N, P + 1, n_out]."""
        x = self.fc(image[:, 1:])  # [N, P, n_out]
        return torch.cat([x, self.eos.expand(len(x), -1, -1)], dim=1)


def load_patches(folder: Path) -> model.Owl:
    """Loads a model with Patches. Raises as load_model does."""
    model.Abstractor = Patches
    try:
        return load_model(folder)
    finally:
        model.Abstractor = Abstractor


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    modules = ("train_stage1", "train_stage2", "evaluate", "experiments.score")
    parser.add_argument("module", choices=modules, help="the command to run")
    parser.parse_args(sys.argv[1:2])  # the flags that follow are those of the command
    model.Abstractor = Patches  # used by all models that the command creates
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
