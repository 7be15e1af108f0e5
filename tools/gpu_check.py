"""Everything that needs a GPU, in one command: tests, then speed and memory of generation and training.

    python -m tools.gpu_check --out gpu_check                       about 15 minutes on an H100 or H200
    python -m tools.gpu_check --out gpu_check --only tests training

It needs the packages of requirements-dev.txt.

    tests         all CUDA tests: equal to a CPU in float32 and bfloat16; CUDA graphs; int8 and int4; FSDP on one GPU
    generation    Owl2-7B in bf16, int8 and int4: tokens/s, and GB/s next to the bandwidth of a copy
    compiled      the same in bf16, with and without --compile
    training      both stages of Owl2-7B: ms per step, MFU, memory next to what --dry-run predicts
    options       its stage 2 with LoRA: with --compile, without --recompute, and both

Each part is one to three commands. OUT/gpu_check.md has what they print, OUT/gpu_check.json the same as data. Both are
written after each command, so a run that is killed keeps what it has measured. The exit code is 1 if a command fails.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

from command import ArgumentParser, log, run, user_errors
from common.files import escape_controls, write_json, writing

ROOT = Path(__file__).resolve().parent.parent
LORA = "tools.bench_train --preset owl2-7b --stage 2 --lora-rank 128 --micro-batch 2 --length 1983 --steps 3"
PARTS = {  # arguments of python -m
    "tests": ["pytest -q -m cuda tests"],
    "generation": ["tools.bench_generate --repeats 2"],
    "compiled": ["tools.bench_generate --repeats 2 --quantize none --compile"],
    "training": ["tools.bench_train --steps 3"],
    "options": [f"{LORA} --recompute --compile", LORA, f"{LORA} --compile"],
}


def run_command(arguments: str) -> dict:
    """Runs python -m with these arguments in the project's folder. Returns what is reported about it."""
    start, lines = time.monotonic(), []
    command = [sys.executable, "-m", *arguments.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, text=True, errors="replace", **pipes) as process:
        for line in process.stdout:
            lines.append(escape_controls(line.rstrip("\n")))
            log(lines[-1])
    seconds = round(time.monotonic() - start, 1)
    return {"command": f"python -m {arguments}", "exit_code": process.returncode, "seconds": seconds, "output": lines}


def to_markdown(report: dict) -> str:
    parts = [f"# Check of a GPU\n\n{report['device']}, torch {report['torch']}, {report['date']}\n"]
    for part in report["parts"]:
        result = f"`{part['command']}`: exit code {part['exit_code']}, {part['seconds']:.0f} s"
        parts.append("\n".join([result, "", "```", *part["output"], "```\n"]))
    return "\n".join(parts)


def main() -> None:
    p = ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    p.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder of the two reports")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts (default: all)")
    args = p.parse_args()
    with user_errors():
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here that torch can use")
        args.out.mkdir(parents=True, exist_ok=True)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    report["parts"] = []
    for arguments in [arguments for name in args.only for arguments in PARTS[name]]:
        report["parts"].append(run_command(arguments))
        with user_errors():
            write_json(args.out / "gpu_check.json", report)
            with writing(args.out / "gpu_check.md") as file:
                file.write_text(to_markdown(report), encoding="utf-8")
    failed = [part["command"] for part in report["parts"] if part["exit_code"] != 0]
    log(f"{args.out / 'gpu_check.md'} has the results; {len(failed)} of {len(report['parts'])} commands failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
