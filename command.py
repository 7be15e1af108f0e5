"""What all commands share: messages on standard error, user errors with exit code 2, and a check for packages.

    from command import ArgumentParser, run, user_errors      # before any import of torch

    def main() -> None:
        args = ArgumentParser(description=__doc__).parse_args()
        with user_errors():              # a ValueError or OSError in here is the user's to fix: one line, exit code 2
            model = load_model(args.weights)
        ...                              # any other error is a bug and keeps its traceback

    if __name__ == "__main__":
        run(main)
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

PACKAGES = {"torch": "torch", "numpy": "numpy", "sentencepiece": "sentencepiece", "safetensors": "safetensors"}
PACKAGES |= {"PIL": "pillow", "tqdm": "tqdm"}  # module: package


def log(message: object) -> None:
    """Prints a message to standard error, where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)


def one_line(message: object) -> str:
    """Joins the lines of a message and escapes control characters, so that a terminal does not obey them."""
    line = " ".join(str(message).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def exit_with_error(message: object) -> NoReturn:
    """Prints an error in one line and exits with code 2."""
    log("error: " + one_line(message))
    sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one line for a ValueError or OSError, which a user can fix."""
    try:
        yield
    except ModuleNotFoundError as error:  # a package of one of the extras
        exit_with_error(f"the package {error.name} is not installed: pip install {error.name}")
    except OSError as error:
        exit_with_error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except ValueError as error:
        exit_with_error(error)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser; descriptions keep their line breaks, and an error is one line instead of the usage."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        exit_with_error(f"{message} (see --help)")


def run(main: Callable[[], None]) -> None:
    """Calls a command's main. Ctrl-C and a reader that closes the pipe end it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it closes stdout
        sys.exit(1)


def check_packages() -> None:
    """Ends the program if a package of requirements.txt is missing, as in an environment that was not activated."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        exit_with_error(
            f"missing packages: {', '.join(missing)}. Activate the environment (source .venv/bin/activate, after "
            "make demo) or install them (pip install -r requirements.txt)"
        )


check_packages()
