"""Saves a model folder with its decoder quantized to 8 or 4 bits.

    python -m tools.quantize --weights mplug-owl2-llama2-7b --out mplug-owl2-7b-int4 --to int4
    python sample.py --weights mplug-owl2-7b-int4 --image x.jpg --prompt "What is this?"

sample.py and evaluate.py take the new folder like any other; training does not. What is not quantized (norms,
embeddings, vision encoder, abstractor) is saved in bfloat16. --quantize of sample.py does the same without saving.
"""

from pathlib import Path

from command import ArgumentParser, run, user_errors

import torch

from common.files import printable
from inference.quantize import BITS, load_quantized, save_quantized


def main() -> None:
    p = ArgumentParser(description=__doc__)
    p.add_argument("--weights", required=True, metavar="FOLDER", help="the model folder to quantize")
    p.add_argument("--out", required=True, metavar="FOLDER", help="the new model folder")
    p.add_argument("--to", required=True, choices=BITS, help="int8: nearly the same answers; int4: half the memory")
    args = p.parse_args()
    out = Path(args.out)
    with user_errors():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} exists, and is not an empty folder: choose another one")
        if (Path(args.weights) / "adapter_config.json").is_file() and not (Path(args.weights) / "config.json").is_file():
            merge = f"python -m tools.merge --weights BASE --adapter {args.weights} --out MERGED"
            raise ValueError(f"{args.weights} is an adapter: merge it first ({merge}), and quantize MERGED")
        model = load_quantized(args.weights, dtype=torch.bfloat16, to=args.to)
        save_quantized(model, out)
    n_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(printable(f"{out} holds {args.weights} at {args.to}: {n_bytes / 1e6:,.1f} MB"))


if __name__ == "__main__":
    run(main)
