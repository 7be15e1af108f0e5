"""One command each: python -m tools.NAME."""

import command  # noqa: F401  reports missing packages before a command imports them
