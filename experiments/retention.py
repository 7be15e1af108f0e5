"""Does the text ability survive if the language model is frozen, then adapted by LoRA only? (Owl1 section 3.2)

    python -m experiments.retention

Stage 1 freezes the language model. Stage 2 of an Owl1 trains adapters of rank 8 on q_proj and v_proj and the
abstractor, or everything; on images only, or on images and text. "stage 1" rows are tested during stage 1 instead.

The claims: the text loss is equal to the bit at all checkpoints of stage 1; after stage 2 on images, the text loss is
lower with LoRA than with full training (95 % interval of the paired difference below 0); text data keep the text
ability in both. What LoRA costs on images is reported next to it.

What else differs: the adapters have a learning rate of their own, twice that of full training, and a dropout of 0.05;
with them the vision encoder is frozen in stage 2.
"""

from experiments.lab import Lab, Setup
from experiments.report import Page, main

FROZEN = {"Owl1, stage 1": Setup("owl1", data="none"), "Owl2, stage 1": Setup(data="none")}


def frozen_losses(lab: Lab) -> str:
    """Whether the text loss is the same number at all checkpoints of stage 1."""
    lines = []
    for name, setup in FROZEN.items():
        losses = [[tests["text_test"]["loss"] for tests in lab.scores(setup, seed).values()] for seed in lab.seeds]
        n_equal = sum(len(set(of_seed)) == 1 for of_seed in losses)
        lines.append(
            f"{name}: the text loss is equal to the bit at {len(losses[0])} steps, the start included, in {n_equal} of "
            f"{len(losses)} seeds."
        )
    return "\n\n".join(lines)


PAGE = Page(
    "retention",
    __doc__,
    setups=FROZEN
    | {
        f"{data}, {name}": Setup("owl1", data=data, lora=name == "LoRA")
        for data in ("image", "both")
        for name in ("LoRA", "everything")
    },
    pairs=[
        ("image, LoRA", "image, everything"),
        ("both, LoRA", "both, everything"),
        ("both, LoRA", "image, LoRA"),
        ("both, everything", "image, everything"),
        *((f"{data}, {name}", "Owl1, stage 1") for data in ("image", "both") for name in ("LoRA", "everything")),
    ],
    paper="The paper reports no number for this (it rates answers of the whole model: 42 of 50 acceptable).",
    extra=frozen_losses,
)

if __name__ == "__main__":
    main(PAGE)
