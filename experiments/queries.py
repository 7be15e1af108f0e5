"""How many queries does the abstractor need, and does it need to be an abstractor? (Owl2, Table 7)

    python -m experiments.queries

An image of 64 x 64 pixels has 64 patches and one visual token per query, plus one. "64 patches" has no abstractor: one
Linear turns each patch into a visual token, as in LLaVA. Fewer queries cost less compute (the table of costs); too few
cannot carry all that the questions ask about.

More queries count as better if the 95 % interval of the paired difference with 16 queries is above 0 for objects, or if
reading is learned in fewer steps in all seeds.

What else differs: the vision encoder was trained through 16 queries. All train for the same number of steps, not for
the same compute.
"""

from experiments.lab import Setup
from experiments.report import Page, main

COUNTS = (4, 8, 16, 32, 64)

PAGE = Page(
    "queries",
    __doc__,
    setups={str(n): Setup(n_query=n) for n in COUNTS} | {"64 patches": Setup(n_query=64, patches=True)},
    pairs=[*((str(n), "16") for n in COUNTS if n != 16), ("64 patches", "64"), ("64 patches", "16")],
    paper="""
| queries | 8 | 16 | 32 | 64 | 128 |
|---|---|---|---|---|---|
| VQAv2 | 58.3 | 66.2 | 72.4 | 76.8 | 76.7 |
| TextVQA | 18.6 | 28.5 | 36.3 | 42.5 | 44.4 |
""",
)

if __name__ == "__main__":
    main(PAGE)
