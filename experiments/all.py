"""Runs adaptive, retention, endtoend, vision, queries and resolution in one pool, and writes their pages.

    python -m experiments.all --jobs 14

The runs are those of the single commands, in that order.
"""

from experiments import adaptive, endtoend, queries, resolution, retention, vision
from experiments.report import main

PAGES = [script.PAGE for script in (adaptive, retention, endtoend, vision, queries, resolution)]

if __name__ == "__main__":
    main(*PAGES, doc=__doc__)
