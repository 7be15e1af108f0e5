"""Does the modality-adaptive module help, and on which data? (Owl2, Table 5)

    python experiments/adaptive.py              # 3 seeds: 6 runs of stage 1, 18 of stage 2
    python experiments/adaptive.py --seeds 1 --scale 0.01 --images 400 --out runs/try     # to see it work

With and without the module, stage 2 on text, on images, on both, or none at all. Each model is then asked about images
that it never saw, and the questions of the text part. The paper's claim: without the module, image data costs text
ability and text data image ability; with it, both together are best at both.

Then interference: questions about an image that begin with a false statement ("The circle is red. what color is the
circle?"), of which those count that the same model answers rightly without it. How often is the image believed, how
often the statement? (Wherever training has a statement it is true, so copying it is never punished there.)

What else differs:
- With the module, stage 1 also trains the image half of the decoder, 6 % of all parameters. Without, it trains nothing
  of the decoder. So a difference may be this, and not that the two are kept apart.
- The given tower was trained through a decoder with the module, for both.
- All train for the same number of steps. Of both, a run sees half as many samples of each as one on text or on images.
"""

from lab import DATA, Lab, Variant, by_kind, draw, experiment, percent, said, scores, table, write

HEAD = "stage 2 on, module"


def gains(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """With the module, less without: for each seed, whose two runs begin alike and see the same samples in order."""
    return {
        data: {
            column: [a - b for a, b in zip(numbers, rows[f"{data}, without"][column])]
            for column, numbers in rows[f"{data}, with"].items()
        }
        for data in DATA
    }


def believed(lab: Lab, variant: Variant) -> dict[str, list[float]]:
    """For each seed, of the false statements before questions that are answered rightly alone: what the answer is."""
    shares = {"the image": [], "the statement": [], "neither": []}
    for seed in lab.seeds:
        known = {(*row["images"], row["kind"]) for row in lab.rows(variant, seed, "test") if said(row, "truth")}
        rows = [row for row in lab.rows(variant, seed, "conflict") if (*row["images"], row["kind"]) in known]
        shares["the image"].append(percent(said(row, "image_answer") for row in rows))
        shares["the statement"].append(percent(said(row, "text_answer") for row in rows))
        shares["neither"].append(100 - shares["the image"][-1] - shares["the statement"][-1])
    return shares


def run(lab: Lab) -> None:
    variants = {
        f"{data}, {'with' if adaptive else 'without'}": Variant(adaptive=adaptive, data=data)
        for data in DATA
        for adaptive in (False, True)
    }
    lab.run(list(variants.values()), ("test", "text_test", "conflict"))
    rows = scores(lab, variants)
    trained = {name: variant for name, variant in variants.items() if variant.data in ("image", "both")}
    wins = {name: believed(lab, variant) for name, variant in trained.items()}
    write(
        lab,
        "adaptive",
        table(HEAD, rows),
        table("what the module adds, stage 2 on", gains(rows)),
        *(table(HEAD, by_kind(lab, variants, test)) for test in ("test", "text_test")),
        table(f"believed; {HEAD}", wins),
    )
    draw(lab.out / "adaptive.png", "without and with the modality-adaptive module, by stage 2's data", rows, "% right")
    draw(lab.out / "interference.png", "a false statement about the image: what is believed", wins, "% of answers")


if __name__ == "__main__":
    experiment(__doc__, run)
