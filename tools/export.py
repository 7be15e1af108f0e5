"""Writes the model of a checkpoint as a model folder, as the run would have written it after this step.

    python -m tools.export --checkpoint runs/mine/checkpoints/step-00000500 --out runs/mine-500
    python sample.py --weights runs/mine-500 --image x.jpg

For a run that was stopped, or whose validation loss was lowest before its end (--keep-best). One process reads any
checkpoint, also one of FSDP on many devices. The folder has Hugging Face's layout; with LoRA the adapter is merged,
and OUT/adapter holds it alone.
"""

from pathlib import Path

from command import ArgumentParser, run, user_errors

from common.files import printable
from train_stage2 import save_final
from training.restore import restore_model


def main() -> None:
    p = ArgumentParser(prog="python -m tools.export", description=__doc__)
    p.add_argument("--checkpoint", required=True, type=Path, metavar="FOLDER", help="RUN/checkpoints/step-N")
    p.add_argument("--weights", metavar="FOLDER", help="what the run started from, if it has moved (not checked)")
    p.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the new model folder")
    args = p.parse_args()
    with user_errors():
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"--out {args.out} exists, and is not an empty folder: choose another one")
        model, base, dtype = restore_model(args.checkpoint, args.weights)
        save_final(model, args.out, base, dtype)
    print(printable(f"{args.out} holds the model of {args.checkpoint}"))


if __name__ == "__main__":
    run(main)
