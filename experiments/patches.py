"""An owl without an abstractor: every patch becomes an image word, through one Linear, as in LLaVA.

    python experiments/patches.py train_stage2.py --weights FOLDER ...      a script of this repository, with such owls

Its model folders look like any other's, but only hold what there is: visual_fc and vit_eos.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
from abstractor import AbstractorConfig  # noqa: E402


class Patches(nn.Module):
    """Stands where the Abstractor does: config.n_query must be the number of patches."""

    def __init__(self, config: AbstractorConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()  # none: what goes over an abstractor's layers finds nothing to do
        self.fc = nn.Linear(config.n_embd, config.n_out)
        self.eos = nn.Parameter(torch.zeros(1, 1, config.n_out))

    def forward(self, image: Tensor) -> Tensor:
        """image: [N, 1 + P, n_embd] from the vision tower. Returns [N, P + 1, n_out]."""
        x = self.fc(image[:, 1:])  # [N, P, n_out]
        return torch.cat([x, self.eos.expand(len(x), -1, -1)], dim=1)


def main() -> None:
    model.Abstractor = Patches  # of all owls that the script makes
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
