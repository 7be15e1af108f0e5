"""How many queries does the abstractor need? (Owl2, Table 7)

    python -m experiments.queries               # 3 seeds: 15 runs of each stage, 3 of them shared with adaptive

An image has one visual token per query and one more. Fewer queries cost less compute; too few cannot carry all that the
questions ask about. The paper finds that 64 are enough and that fewer hurt. Here an image of 64 x 64 pixels has 64
patches. (The vision encoder was trained through 8 queries, which may favor 8.)
"""

from command import run
from experiments.lab import Setup, experiment
from experiments.report import compare_setups


def main() -> None:
    setups = {str(n): Setup(n_query=n) for n in (4, 8, 16, 32, 64)}
    with experiment(__doc__) as lab:
        compare_setups(lab, "queries", "queries", "accuracy by number of queries", setups)


if __name__ == "__main__":
    run(main)
