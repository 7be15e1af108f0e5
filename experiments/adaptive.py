"""Does the modality-adaptive module help, and on which data? (Owl2, Table 5)

    python -m experiments.adaptive              # 3 seeds: 6 runs of stage 1, 18 of stage 2
    python -m experiments.adaptive --seeds 1 --scale 0.01 --images 400 --out runs/try     # to see it work

With and without the module, stage 2 trains on text, on images, on both, or is left out. Each model is tested on images
that it has not seen, and on the questions of the text part. The paper's claim: without the module, image data costs
text ability and text data costs image ability; with it, training on both is best at both.

Then interference: questions about an image that begin with a false statement ("The circle is red. what color is the
circle?"), counted if the same model answers correctly without the statement. How often does the answer follow the
image, how often the statement? (In training such statements are always true, so copying them is never penalized.)

What else differs between the models:
- With the module, stage 1 also trains the visual half of the decoder's module, 6 % of all parameters; without, it
  trains nothing in the decoder. So this may explain a difference, rather than the separation of modalities.
- The vision encoder that all start from was trained through a decoder with the module.
- All train for the same number of steps. A run on both sees half as many samples of each as a run on one.
"""

from command import run
from evaluation.scoring import is_exact_match
from experiments.lab import DATA, Lab, Setup, experiment, percentage
from experiments.report import Table, save_chart, scores, scores_by_kind, to_markdown, write_report

HEAD = "stage 2 on, module"


def module_gains(table: Table) -> Table:
    """Accuracy with the module minus without, per seed: the two runs have equal initial weights and sample order."""
    return {
        data: {
            column: [a - b for a, b in zip(numbers, table[f"{data}, without"][column])]
            for column, numbers in table[f"{data}, with"].items()
        }
        for data in DATA
    }


def conflict_shares(lab: Lab, setup: Setup) -> dict[str, list[float]]:
    """What answers follow after a false statement, in percent per seed.

    Counts the questions that are answered correctly without the statement.
    """
    shares = {"the image": [], "the statement": [], "neither": []}
    for seed in lab.seeds:
        correct = {
            (*row["images"], row["kind"])
            for row in lab.answers(setup, seed, "test")
            if is_exact_match(row["answer"], row["truth"])
        }
        rows = [row for row in lab.answers(setup, seed, "conflict") if (*row["images"], row["kind"]) in correct]
        image = percentage(is_exact_match(row["answer"], row["image_answer"]) for row in rows)
        statement = percentage(is_exact_match(row["answer"], row["text_answer"]) for row in rows)
        for share, value in zip(shares.values(), (image, statement, 100 - image - statement)):
            share.append(value)
    return shares


def main() -> None:
    setups = {
        f"{data}, {'with' if adaptive else 'without'}": Setup(adaptive=adaptive, data=data)
        for data in DATA
        for adaptive in (False, True)
    }
    with experiment(__doc__) as lab:
        lab.run_setups(setups.values(), ("test", "text_test", "conflict"))
        table = scores(lab, setups)
        with_images = {name: setup for name, setup in setups.items() if setup.data in ("image", "both")}
        conflicts = {name: conflict_shares(lab, setup) for name, setup in with_images.items()}
        write_report(
            lab,
            "adaptive",
            to_markdown(HEAD, table),
            to_markdown("gain by the module, stage 2 on", module_gains(table)),
            *(to_markdown(HEAD, scores_by_kind(lab, setups, test)) for test in ("test", "text_test")),
            to_markdown(f"the answer follows; {HEAD}", conflicts),
        )
        title = "without and with the modality-adaptive module, by stage 2's data"
        save_chart(lab.out / "adaptive.png", title, table, "% correct")
        title = "a false statement about the image: what the answer follows"
        save_chart(lab.out / "interference.png", title, conflicts, "% of answers")


if __name__ == "__main__":
    run(main)
