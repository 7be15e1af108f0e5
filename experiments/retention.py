"""Does the text ability stay if the language model is frozen, then adapted by LoRA alone? (Owl1 section 3.2)

    python experiments/retention.py             # 3 seeds: an Owl1's language model, 3 runs of stage 1, 6 of stage 2

Stage 1 freezes the language model. Then stage 2 on images alone, which ask nothing of the text part: once with adapters
of rank 8 on q_proj and v_proj (and the abstractor, as the paper's abstract has it), at a learning rate of their own;
once with everything trained. What is left of the text ability?
"""

from lab import Lab, Variant, by_kind, draw, experiment, scores, table, write


def run(lab: Lab) -> None:
    variants = {
        "LoRA": Variant("owl1", data="image", lora=True),
        "everything": Variant("owl1", data="image"),
    }
    lab.run(list(variants.values()))
    rows = scores(lab, variants)
    write(lab, "retention", table("stage 2 trains", rows), table("stage 2 trains", by_kind(lab, variants)))
    draw(lab.out / "retention.png", "stage 2 on images alone: what stays of the text ability", rows, "% right")


if __name__ == "__main__":
    experiment(__doc__, run)
