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
import errno
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from common.files import escape_controls, is_out_of_memory, printable

# A thread that waits for others spins before it sleeps. By default it spins so long that a program on one of the cores
# makes every step many times slower (docs/training.md). OpenMP reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

PACKAGES = {"torch": "torch", "numpy": "numpy", "sentencepiece": "sentencepiece", "safetensors": "safetensors"}
PACKAGES |= {"PIL": "pillow", "tqdm": "tqdm"}  # module: package


def log(message: object) -> None:
    """Prints a message to standard error, where it does not mix with results."""
    print(escape_controls(message), file=sys.stderr, flush=True)


def exit_with_error(message: object) -> NoReturn:
    """Prints an error in one line and exits with code 2."""
    log("error: " + printable(message))
    sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one line for a ValueError or OSError, errors that the user can fix."""
    try:
        yield
    except ModuleNotFoundError as error:  # a package that only some commands need
        if error.name is None or importlib.util.find_spec(error.name.partition(".")[0]) is not None:
            raise  # a part of a package that is installed, or of this project
        exit_with_error(f"the package {error.name} is not installed: pip install {error.name}")
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE):
            raise  # perhaps of standard output: see run
        exit_with_error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except ValueError as error:
        exit_with_error(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with_error("out of memory")


# A warning is one line, without the line of code that Python adds.
warnings.showwarning = lambda message, *_: log("warning: " + printable(message))


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser; descriptions keep their line breaks, and an error is one line instead of the usage."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        exit_with_error(f"{message} (see --help)")


def run(main: Callable[[], None]) -> None:
    """Calls a command's main. A full disk, and a reader that closes the pipe, end it without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not if the shell has closed it
        sys.stdout.reconfigure(errors="replace")  # a character that it cannot show becomes "?"
    try:
        try:
            main()
        finally:
            print(end="", flush=True)  # here, where an error is handled
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        if sys.stdout is not None:  # else Python complains when it closes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(1)
        exit_with_error(f"{error.filename or 'a file or standard output'}: {error.strerror}")


def exit_at_interrupt(kind: type[BaseException], *error: object) -> None:
    """Ends the program with code 130 for Ctrl-C, also while torch is being imported."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *error)
        return
    sys.exit(130)


sys.excepthook = exit_at_interrupt


def check_packages() -> None:
    """Ends the program if a package of requirements.txt is missing, as in an environment that was not activated."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        exit_with_error(
            f"missing packages: {', '.join(missing)}. Activate the environment (source .venv/bin/activate, after "
            "make demo) or install them (pip install -r requirements.txt)"
        )


check_packages()
