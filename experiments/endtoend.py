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

import json
from statistics import median

from experiments.lab import Lab, Setup
from experiments.report import Page, main, to_markdown


def speed_and_memory(lab: Lab) -> str:
    """A table of what the runs logged: the median tokens/s, and the highest peak memory of the process."""
    rows = []
    for name, setup in PAGE.setups.items():
        stages = {"all": setup.stage2} if setup.end_to_end else {"stage 1": setup.stage1, "stage 2": setup.stage2}
        for stage, run in stages.items():
            files = [lab.out / f"seed{seed}/{run}/metrics.jsonl" for seed in lab.seeds]
            lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
            speed, memory = median(x["tokens_per_s"] for x in lines), max(x["memory_gb"] for x in lines)
            rows.append([name, stage, f"{speed:,.0f}", f"{memory:.2f}"])
    table = to_markdown(["", "steps of", "tokens/s", "memory, GB"], rows)
    return f"**Speed and memory** as the runs logged them ({lab.jobs} at a time on one machine).\n\n{table}"


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
    extra=speed_and_memory,
)

if __name__ == "__main__":
    main(PAGE)
