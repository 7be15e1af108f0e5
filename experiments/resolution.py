"""How much does resolution matter? (Owl2 trains at 224 pixels and answers at 448)

    python -m experiments.resolution            # 3 seeds: 9 runs of each stage, 3 of them shared with the others

The images are drawn at 64 pixels. At 32, small objects blur; 96 shows nothing that 64 does not, but has 144 patches
instead of 64. The vision encoder was trained at 64 pixels, and its position embeddings are interpolated for the other
sizes, which may explain a loss there.
"""

from command import run
from experiments.lab import Setup, experiment
from experiments.report import compare_setups


def main() -> None:
    setups = {f"{size} pixels": Setup(image_size=size) for size in (32, 64, 96)}
    with experiment(__doc__) as lab:
        compare_setups(lab, "resolution", "image size", "accuracy by resolution", setups)


if __name__ == "__main__":
    run(main)
