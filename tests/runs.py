"""Runs commands in this process and functions in several processes, where torch is imported only once."""

import io
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import torch.distributed

HEAVY = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "safetensors.torch"]
HEAVY += ["sentencepiece", "PIL.Image", "pytest", "torch._dynamo"]
TIMEOUT = 240  # seconds


def free_ports(n: int) -> list[int]:
    """Returns ports on which nothing listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def one_process(function: Callable, arguments: tuple, environment: dict[str, int], stderr: Path) -> None:
    """Calls the function as one of several processes; its stderr is a file."""
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(number) for name, number in environment.items()}, MASTER_ADDR="127.0.0.1")
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def in_processes(
    n: int, folder: Path, function: Callable, *arguments: object, n_local: int | None = None
) -> list[str]:
    """Calls function(*arguments) in n processes, started as by torchrun, and waits. Returns the stderr of each.

    n_local: processes per node (default: all). If one fails, the others are killed. Starts from a fork server.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    folder.mkdir(exist_ok=True)
    (port,) = free_ports(1)
    n_local = n_local or n
    stderr = [folder / f"stderr-{rank}" for rank in range(n)]
    processes = []
    for rank in range(n):
        environment = {"RANK": rank, "LOCAL_RANK": rank % n_local, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n_local}
        environment["MASTER_PORT"] = port
        processes.append(context.Process(target=one_process, args=(function, arguments, environment, stderr[rank])))
        processes[-1].start()
    deadline = time.monotonic() + TIMEOUT
    try:
        running = processes
        while running and not any(process.exitcode for process in processes) and time.monotonic() < deadline:
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
            running = [process for process in processes if process.exitcode is None]
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    printed = [path.read_text() for path in stderr]
    assert codes == [0] * n, "\n".join([f"exit codes {codes} (None: still running)", *printed])
    return printed


def run_main(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
    """Calls a command's main with these command-line arguments. Returns (exit code, stdout, stderr)."""
    stdout, stderr, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["command", *map(str, arguments)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = argv
    return code, stdout.getvalue(), stderr.getvalue()
