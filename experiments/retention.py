"""Does the text ability survive if the language model is frozen, then adapted by LoRA only? (Owl1 section 3.2)

    python -m experiments.retention             # 3 seeds: an Owl1 language model, 3 runs of stage 1, 6 of stage 2

Stage 1 freezes the language model. Stage 2 then trains on images only, without the text part: adapters of rank 8 on
q_proj and v_proj (and the abstractor, as the paper's abstract says), or everything, or there is no stage 2, as the
reference. How much of the text ability is left, and how much is gained on images?

The adapters have a learning rate of their own, twice the rate of everything, and a dropout of 0.05; the vision encoder
is then frozen. The vision encoder was trained in an Owl2.
"""

from command import run
from experiments.lab import Setup, experiment
from experiments.report import compare_setups


def main() -> None:
    setups = {
        "nothing": Setup("owl1", data="none"),
        "LoRA": Setup("owl1", data="image", lora=True),
        "everything": Setup("owl1", data="image"),
    }
    with experiment(__doc__) as lab:
        compare_setups(lab, "retention", "stage 2 trains", "text ability after stage 2 on images only", setups)


if __name__ == "__main__":
    run(main)
