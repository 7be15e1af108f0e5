"""Two stages with a frozen language model first, or everything from the beginning? (Owl1 section 3.2)

    python -m experiments.endtoend

Two stages: captions with the language model frozen, then everything on questions and text. One stage: everything on
captions, questions and text, in the same proportions and for the same number of steps; or on questions and text only,
for as many steps. The abstractor is random at the start.

Two stages count as better if the 95 % interval of the paired difference is above 0 for objects or for text, and neither
is below 0.

What else differs: a step of stage 1 costs less, as the decoder's weights have no gradients (the table of costs counts
this), so one stage has a little more compute. Learning rates and warm-up are those of stage 2.
"""

from experiments.lab import Setup
from experiments.report import Page, main

PAGE = Page(
    "endtoend",
    __doc__,
    setups={
        "two stages": Setup(),
        "one stage": Setup(end_to_end=True, data="captions"),
        "one stage, no captions": Setup(end_to_end=True),
    },
    pairs=[("two stages", "one stage"), ("two stages", "one stage, no captions")],
    paper="The paper reports no comparison with training in one stage.",
)

if __name__ == "__main__":
    main(PAGE)
