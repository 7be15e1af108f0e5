"""Does the text ability stay if the language model is frozen, then adapted by LoRA alone? (Owl1 section 3.2)

    python experiments/retention.py             # 3 seeds: an Owl1's language model, 3 runs of stage 1, 6 of stage 2

Stage 1 freezes the language model. Then stage 2 on images alone, which ask nothing of the text part: with adapters of
rank 8 on q_proj and v_proj (and the abstractor, as the paper's abstract has it); with everything trained; or none at
all, which is what there was to keep. What is left of the text ability, and what does it buy on images?

The adapters learn at a rate of their own, twice that of everything, with a dropout of 0.05, and leave the vision tower
frozen. The tower is an Owl2's.
"""

from lab import Lab, Variant, compare, experiment


def run(lab: Lab) -> None:
    variants = {
        "nothing": Variant("owl1", data="none"),
        "LoRA": Variant("owl1", data="image", lora=True),
        "everything": Variant("owl1", data="image"),
    }
    compare(lab, "retention", "stage 2 trains", "stage 2 on images alone: what stays of the text ability", variants)


if __name__ == "__main__":
    experiment(__doc__, run)
