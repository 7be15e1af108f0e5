"""Is an abstractor better than all patches through one Linear? (Owl1 and Owl2 against LLaVA)

    python experiments/linear.py                # 3 seeds: 9 runs of either stage, 3 or 6 of them shared with the others

The Linear's owl has an image word for each of the 64 patches; it computes less before the decoder, and more in it. So
it is set beside 8 queries, and beside as many queries as it has words. (The given tower was trained through an
abstractor, which may favour that.)
"""

from lab import Lab, Variant, compare, experiment


def run(lab: Lab) -> None:
    variants = {
        "8 queries": Variant(),
        "64 queries": Variant(n_query=64),
        "64 patches": Variant(n_query=64, patches=True),
    }
    compare(lab, "linear", "image words of", "accuracy by what makes the image words", variants)


if __name__ == "__main__":
    experiment(__doc__, run)
