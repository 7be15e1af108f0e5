"""How much does resolution matter? (Owl2 learns at 224 pixels and answers at 448)

    python experiments/resolution.py            # 3 seeds: 9 runs of either stage, 3 of them shared with the others

The world is drawn at 64 pixels. At 32 small things and letters all but vanish; 96 shows nothing that 64 does not, but
gives 144 patches instead of 64. The given tower has seen 64: its position embeddings are interpolated.
"""

from lab import Lab, Variant, by_kind, draw, experiment, scores, table, write


def run(lab: Lab) -> None:
    variants = {f"{size} pixels": Variant(image_size=size) for size in (32, 64, 96)}
    lab.run(list(variants.values()))
    rows = scores(lab, variants)
    write(lab, "resolution", table("images of", rows), table("images of", by_kind(lab, variants)))
    draw(lab.out / "resolution.png", "accuracy by resolution", rows, "% right")


if __name__ == "__main__":
    experiment(__doc__, run)
