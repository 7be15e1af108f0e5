"""Should the vision tower learn as well, and how fast? (Owl2 section 3.3: it does, at rates that fall layer by layer)

    python experiments/vision.py                # 3 seeds: 9 runs of either stage, 3 of them shared with the others

Frozen in both stages (Owl2's released scripts freeze it in fine-tuning); trained; and trained with the learning rate
halved from each layer to the one below. The tower that is given has seen the same captions, for ten times as long as a
stage 1 here, so freezing it should cost little.
"""

from lab import VIT, Lab, Variant, compare, experiment


def run(lab: Lab) -> None:
    variants = {vit: Variant(vit=vit) for vit in VIT}
    compare(lab, "vision", "vision tower", "accuracy by what becomes of the vision tower", variants)


if __name__ == "__main__":
    experiment(__doc__, run)
