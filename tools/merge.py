"""Merges a LoRA adapter into a model folder and saves the result as a model folder.

    python -m tools.merge --weights mplug-owl2-llama2-7b --adapter runs/mine/adapter --out mplug-owl2-mine

The adapter is in PEFT's files, as train_stage2.py, PEFT and the released code write them (inference/adapter.py).
"""

from pathlib import Path

from command import ArgumentParser, run, user_errors

import torch

from common.files import printable
from inference.loading import load_with_adapter
from training.distributed import PRECISIONS
from weights import save_model


def main() -> None:
    p = ArgumentParser(description=__doc__)
    p.add_argument("--weights", required=True, metavar="FOLDER", help="the model folder that the adapter belongs to")
    p.add_argument("--adapter", required=True, metavar="FOLDER", help="the adapter, in PEFT's files")
    p.add_argument("--out", required=True, metavar="FOLDER", help="the new model folder")
    p.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the saved weights (default bf16)")
    args = p.parse_args()
    out = Path(args.out)
    with user_errors():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} exists, and is not an empty folder: choose another one")
        dtype = PRECISIONS[args.precision]
        save_model(load_with_adapter(Path(args.weights), Path(args.adapter), torch.device("cpu"), dtype), out)
    print(printable(f"{out} holds {args.weights} with {args.adapter} merged"))


if __name__ == "__main__":
    run(main)
