"""How many queries does the abstractor want? (Owl2, Table 7)

    python experiments/queries.py               # 3 seeds: 15 runs of either stage, 3 of them shared with adaptive.py

An image becomes as many words as there are queries, and one more. Fewer cost less; too few cannot say all that is asked
about. The paper found 64 enough, and that fewer hurt. Here an image of 64 x 64 pixels has 64 patches. (The given tower
was trained through 8 queries, which may favour those.)
"""

from lab import Lab, Variant, compare, experiment


def run(lab: Lab) -> None:
    variants = {str(n): Variant(n_query=n) for n in (4, 8, 16, 32, 64)}
    compare(lab, "queries", "queries", "accuracy by number of queries", variants)


if __name__ == "__main__":
    experiment(__doc__, run)
