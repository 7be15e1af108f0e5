"""Is an abstractor better than one Linear for all patches? (Owl1 and Owl2 compared with LLaVA)

    python -m experiments.linear                # 3 seeds: 9 runs of each stage, 3 or 6 of them shared with the others

With the Linear an image has 64 visual tokens, one per patch: less to compute before the decoder, and more in it. So it
is compared both with 8 queries and with 64. (The vision encoder was trained through an abstractor, which may favor the
queries.)
"""

from command import run
from experiments.lab import Setup, experiment
from experiments.report import compare_setups


def main() -> None:
    setups = {
        "8 queries": Setup(),
        "64 queries": Setup(n_query=64),
        "64 patches": Setup(n_query=64, patches=True),
    }
    with experiment(__doc__) as lab:
        compare_setups(lab, "linear", "visual tokens from", "accuracy by source of the visual tokens", setups)


if __name__ == "__main__":
    run(main)
