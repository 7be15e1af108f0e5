"""Is an abstractor better than all patches through one Linear? (Owl1 and Owl2 against LLaVA)

    python experiments/linear.py                # 3 seeds: 9 runs of either stage, 3 or 6 of them shared with the others

The Linear's owl has an image word for each of the 64 patches; it computes less before the decoder, and more in it. So it
is set beside 8 queries, and beside as many queries as it has words. FLOPs are counted (cost.py), of a training step on
one image and 100 words.
"""

import torch
from lab import Lab, Variant, by_kind, draw, experiment, make_owl, scores, table, write

from cost import train_flops  # after lab, which puts the repository on the path


def flops(variant: Variant) -> float:
    """GFLOPs of a training step on one image and 100 words."""
    with torch.device("meta"):
        owl = make_owl(variant)
    return train_flops(owl, 1, [owl.config.image_words + 100], 20) / 1e9


def run(lab: Lab) -> None:
    variants = {
        "8 queries": Variant(),
        "64 queries": Variant(n_query=64),
        "64 patches": Variant(n_query=64, patches=True),
    }
    lab.run(list(variants.values()))
    rows = scores(lab, variants)
    costs = {name: rows[name] | {"GFLOP": [flops(variant)] * len(lab.seeds)} for name, variant in variants.items()}
    write(lab, "linear", table("image words of", costs), table("image words of", by_kind(lab, variants)))
    draw(lab.out / "linear.png", "accuracy by what makes the image words", rows, "% right")


if __name__ == "__main__":
    experiment(__doc__, run)
