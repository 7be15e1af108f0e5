"""The papers' questions on tiny models, one command each: python -m experiments.NAME."""

import command  # noqa: F401  reports missing packages before an experiment imports them
