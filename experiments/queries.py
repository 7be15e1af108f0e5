"""How many queries does the abstractor want? (Owl2, Table 7)

    python experiments/queries.py               # 3 seeds: 15 runs of either stage, 3 of them shared with adaptive.py

An image becomes as many words as there are queries, and one more. Fewer cost less; too few cannot say all that is asked
about. The paper found 64 enough, and that fewer hurt. Here an image of 64 x 64 pixels has 64 patches.
"""

from lab import Lab, Variant, by_kind, draw, experiment, scores, table, write


def run(lab: Lab) -> None:
    variants = {str(n): Variant(n_query=n) for n in (4, 8, 16, 32, 64)}
    lab.run(list(variants.values()))
    rows = scores(lab, variants)
    write(lab, "queries", table("queries", rows), table("queries", by_kind(lab, variants)))
    draw(lab.out / "queries.png", "accuracy by number of queries", rows, "% right")


if __name__ == "__main__":
    experiment(__doc__, run)
