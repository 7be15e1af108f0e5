"""Does the modality-adaptive module help, and on which data? (Owl2, Table 5)

    python experiments/adaptive.py              # 3 seeds: 6 runs of stage 1, 18 of stage 2
    python experiments/adaptive.py --seeds 1 --scale 0.01 --images 60 --out runs/try      # to see it work

With and without the module, stage 2 on text, on images, on both; all trained for the same number of steps, so that of
both a run sees half as much of each. Each is then asked about images that it never saw, and the questions of the text
part. The paper's claim: without the module, image data costs text ability and text data image ability; with it, both
together are best at both.

Then interference: questions about an image that begin with a false statement ("The circle is red. what color is the
circle?"). How often is the image believed, how often the statement?
"""

from lab import DATA, Lab, Variant, by_kind, draw, experiment, scores, table, write


def run(lab: Lab) -> None:
    variants = {
        f"{data}, {'with' if adaptive else 'without'}": Variant(adaptive=adaptive, data=data)
        for data in DATA
        for adaptive in (False, True)
    }
    lab.run(list(variants.values()), ("test", "text_test", "conflict"))
    both = scores(lab, variants)
    wins = {
        name: {
            "image believed": lab.shares(variant, "conflict", "image_answer"),
            "statement believed": lab.shares(variant, "conflict", "text_answer"),
        }
        for name, variant in variants.items()
        if variant.data != "text"
    }
    head = "stage 2 on, module"
    write(lab, "adaptive", table(head, both), table(head, by_kind(lab, variants)), table(head, wins))
    draw(lab.out / "adaptive.png", "modality-adaptive module: accuracy by data of stage 2", both, "% right")
    draw(lab.out / "interference.png", "image and statement contradict each other", wins, "% of questions")


if __name__ == "__main__":
    experiment(__doc__, run)
