"""Should the vision encoder be trained, and at which rate? (Owl2 section 3.3: yes, at rates that decay layer by layer)

    python -m experiments.vision                # 3 seeds: 9 runs of each stage, 3 of them shared with the others

Frozen in both stages (Owl2's released scripts freeze it in fine-tuning); trained; or trained with a learning rate that
halves from each layer to the one below. All runs start from a vision encoder that was trained on the same captions for
ten times as many steps as stage 1 has here, so freezing it should cost little.
"""

from command import run
from experiments.lab import VIT, Setup, experiment
from experiments.report import compare_setups


def main() -> None:
    setups = {vit: Setup(vit=vit) for vit in VIT}
    with experiment(__doc__) as lab:
        compare_setups(lab, "vision", "vision encoder", "accuracy by training of the vision encoder", setups)


if __name__ == "__main__":
    run(main)
