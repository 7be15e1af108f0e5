"""How much does resolution matter, and does it need more queries? (Owl2 trains at 224 pixels and answers at 448)

    python -m experiments.resolution

The images are drawn at 64 pixels: a small object is 9 wide, a letter 14 x 22. At 32 pixels a small object is 5 wide, in
a patch of 8. At 96 nothing new is visible, but an image has 144 patches instead of 64. Each resolution has 16 and
64 queries.

A resolution counts as better if the 95 % interval of the paired difference is above 0 for objects or shapes, or if
reading is learned in fewer steps in all seeds. More queries count as necessary at a resolution if the same holds for
64 against 16 there and not at a lower one.

What else differs: the vision encoder was trained at 64 pixels, and its position embeddings are interpolated for the
other sizes, which may explain a loss there.
"""

from experiments.lab import Setup
from experiments.report import METRICS, Page, main

SIZES, COUNTS = (32, 64, 96), (16, 64)

PAGE = Page(
    "resolution",
    __doc__,
    setups={f"{size} px, {n}": Setup(image_size=size, n_query=n) for size in SIZES for n in COUNTS},
    pairs=[
        *((f"{size} px, {n}", f"64 px, {n}") for size in (32, 96) for n in COUNTS),
        *((f"{size} px, 64", f"{size} px, 16") for size in SIZES),
    ],
    metrics=METRICS + ("shapes",),
    paper="""
| pixels | 224 | 336 | 448 |
|---|---|---|---|
| VQAv2 | 76.8 | 78.5 | 79.4 |
| TextVQA | 42.5 | 49.8 | 54.3 |
""",
)

if __name__ == "__main__":
    main(PAGE)
