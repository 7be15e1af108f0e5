"""Functions and stages in several processes, as torchrun would start them, but quicker: torch is read once for all."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

HEAVY = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "safetensors.torch"]
HEAVY += ["sentencepiece", "PIL.Image", "pytest"]


def one_process(work: Callable, arguments: tuple, rank: int, n: int, port: int, err: Path) -> None:
    """Does the work as one of n processes; what it writes to stderr goes to a file."""
    with err.open("w") as file:
        os.dup2(file.fileno(), 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in ranks.items()}, MASTER_ADDR="127.0.0.1")
    work(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def in_processes(n: int, folder: Path, work: Callable, *arguments: object) -> list[str]:
    """Calls work(*arguments) in n processes, and waits. Returns what each wrote to stderr (files in folder)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    errors = [folder / f"stderr-{rank}" for rank in range(n)]
    processes = []
    for rank, err in enumerate(errors):
        processes.append(context.Process(target=one_process, args=(work, arguments, rank, n, port, err)))
        processes[-1].start()
    try:
        for process in processes:
            process.join(timeout=100)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = [err.read_text() for err in errors]
    assert codes == [0] * n, "\n".join([f"exit codes {codes} (None: it hangs)", *said])
    return said
