"""How much does resolution matter? (Owl2 learns at 224 pixels and answers at 448)

    python experiments/resolution.py            # 3 seeds: 9 runs of either stage, 3 of them shared with the others

The world is drawn at 64 pixels. At 32 small things blur; 96 shows nothing that 64 does not, but gives 144 patches
instead of 64. The given tower has seen 64 only, and its position embeddings are interpolated for the others: what those
lose may be that.
"""

from lab import Lab, Variant, compare, experiment


def run(lab: Lab) -> None:
    variants = {f"{size} pixels": Variant(image_size=size) for size in (32, 64, 96)}
    compare(lab, "resolution", "images of", "accuracy by resolution", variants)


if __name__ == "__main__":
    experiment(__doc__, run)
