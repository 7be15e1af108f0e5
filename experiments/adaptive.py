"""Does the modality-adaptive module help, and on which data? (Owl2, Table 5)

    python -m experiments.adaptive

Stage 2 trains on text, on images, or on both: equally much of each, four times as many samples with images, or four
times as many without. Three decoders: without the module, with it, and a wider one without it that has as many
parameters. The claims: (1) without the module, data of one modality cost ability in the other; (2) with it, training on
both is best at both.

The module counts as an improvement if the 95 % interval of the paired difference, with minus without, is above 0 for
objects or for text, and neither is below 0; it counts as more than parameters if the same holds against the wide one.

Interference: a false statement precedes a question about the image ("The circle is red. what color is the circle?").
"Follows the image" and "follows the statement" are the shares of all such questions with either answer. In training
such statements are always true.

What else differs: with the module, stage 1 also trains the visual half of the decoder's module; without, it trains
nothing in the decoder. The wide decoder has a language model of its own. All train for the same number of steps, so a
run on both sees half as many samples of each as a run on one.
"""

from experiments.lab import Setup
from experiments.report import CONFLICTS, METRICS, Page, main

MODULES = {"without": {"adaptive": False}, "wide": {"adaptive": False, "wide": True}, "with": {}}
MIXES, UNEVEN = ("both", "image", "text"), ("image-rich", "text-rich")

PAGE = Page(
    "adaptive",
    __doc__,
    setups={
        f"{data}, {name}": Setup(data=data, **fields)
        for data in (*MIXES, *UNEVEN)
        for name, fields in MODULES.items()
        if name != "wide" or data in MIXES
    },
    pairs=[
        *((f"{data}, with", f"{data}, without") for data in (*MIXES, *UNEVEN)),
        *((f"{data}, with", f"{data}, wide") for data in MIXES),
        *((f"both, {name}", f"{data}, {name}") for name in ("without", "with") for data in ("image", "text")),
    ],
    metrics=METRICS + CONFLICTS,
    paper="""
| module | text data | image data | VQAv2 | Q-Bench | MMLU | BBH |
|---|---|---|---|---|---|---|
| without | yes | no | 58.2 | 54.4 | 51.8 | 43.6 |
| without | no | yes | 76.3 | 61.3 | 45.4 | 25.7 |
| without | yes | yes | 76.2 | 60.3 | 51.6 | 43.2 |
| with | yes | no | 60.5 | 55.6 | 51.8 | 44.0 |
| with | no | yes | 76.5 | 60.2 | 46.1 | 30.6 |
| with | yes | yes | 76.8 | 62.2 | 52.8 | 45.0 |
""",
)

if __name__ == "__main__":
    main(PAGE)
