"""Should the vision tower learn as well, and how fast? (Owl2 section 3.3: it does, at rates that fall layer by layer)

    python experiments/vision.py                # 3 seeds: 9 runs of either stage, 3 of them shared with the others

Frozen, as Owl2's released fine-tuning scripts have it; trained; and trained with the learning rate halved from each
layer to the one below. The tower that is given has seen the same captions, for six or seven times as long as a stage 1 here.
"""

from lab import VIT, Lab, Variant, by_kind, draw, experiment, scores, table, write


def run(lab: Lab) -> None:
    variants = {vit: Variant(vit=vit) for vit in VIT}
    lab.run(list(variants.values()))
    rows = scores(lab, variants)
    write(lab, "vision", table("vision tower", rows), table("vision tower", by_kind(lab, variants)))
    draw(lab.out / "vision.png", "accuracy by what becomes of the vision tower", rows, "% right")


if __name__ == "__main__":
    experiment(__doc__, run)
