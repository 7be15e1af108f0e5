"""Draws runs: the loss and the throughput over the steps, several runs in one picture.

    python plot.py runs/a/metrics.jsonl                            writes runs/a/curves.png
    python plot.py runs/a/metrics.jsonl runs/b/metrics.jsonl --out a-and-b.png

A run is called what its folder is called; dots are its validation loss. The files are those that training writes: a
JSON object a line, {"step": 10, "loss": 2.1, "tokens_per_s": 900.0} or {"step": 500, "val_loss": 1.9}; a loss that was
not finite is null there, and left out here.

Wants matplotlib, which nothing else here does.
"""

import argparse
import json
import math
import sys
from pathlib import Path

COLOURS = ("#1f5fa8", "#d1602b", "#2f8f5b", "#8a4fa3", "#b8912a", "#4aa3b5", "#a8324e", "#6b6b6b")
QUANTITIES = ("loss", "val_loss", "tokens_per_s")


def read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """A run's curves: for each of QUANTITIES the steps at which it was written, and its values there.

    A last line that breaks off, as where a run is at work or was killed, is left out with a note on stderr. Raises
    ValueError or OSError, in one sentence, for files that are not a run's metrics.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
    curves = {quantity: ([], []) for quantity in QUANTITIES}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
            found = {quantity: row[quantity] for quantity in QUANTITIES if row.get(quantity) is not None}
            if any(type(value) not in (int, float) for value in (step, *found.values())):
                raise TypeError
            step, found = float(step), {quantity: float(value) for quantity, value in found.items()}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number == len(lines) and number > 1:
                print(f"note: {path} breaks off in line {number}, which is left out", file=sys.stderr)
                break
            raise ValueError(f"{path}, line {number}, is not a line of metrics: a JSON object with a step") from None
        for quantity, value in found.items():
            curves[quantity][0].append(step)
            curves[quantity][1].append(value)
    losses = curves["loss"][1] + curves["val_loss"][1]
    if not any(math.isfinite(value) for value in losses):
        raise ValueError(f"{path} holds no losses")
    return curves


def names_of(paths: list[Path]) -> list[str]:
    """What the runs are called: their folders, as much of each path as tells them apart."""
    parts = [path.resolve().parent.parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def draw(runs: list[tuple[str, dict]], out: Path) -> None:
    """Draws (name, curves) pairs as a PNG of two panels. ImportError without matplotlib, OSError as writing files."""
    import matplotlib

    matplotlib.use("Agg")  # a picture in a file; no screen is asked for
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "axes.edgecolor": "#888888",
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
    }
    with plt.rc_context(style):
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(9, 7), height_ratios=(2, 1), sharex=True, layout="constrained"
        )
        for i, (name, curves) in enumerate(runs):
            name = name.replace("$", r"\$")  # between two dollars matplotlib expects a formula
            colour = COLOURS[i % len(COLOURS)]
            dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
            upper.plot(*curves["loss"], dashes, color=colour, linewidth=1.4, label=name)
            if curves["val_loss"][0]:
                dots = {"marker": "o", "markersize": 6, "markeredgecolor": "white", "linewidth": 0.8}
                upper.plot(*curves["val_loss"], dashes, color=colour, label=f"{name}, validation", **dots)
            lower.plot(*curves["tokens_per_s"], dashes, color=colour, linewidth=1.4)
        upper.set_title("loss")
        lower.set_title("tokens per second")
        lower.set_ylim(bottom=0)
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        upper.legend(frameon=False)
        figure.savefig(out, dpi=150, format="png")
        plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("metrics", nargs="+", type=Path, metavar="METRICS", help="a run's metrics.jsonl")
    p.add_argument("--out", type=Path, metavar="PNG", help="default: curves.png beside the first METRICS")
    args = p.parse_args()
    try:
        for path in args.metrics:
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}")
        out = args.out or args.metrics[0].parent / "curves.png"
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
        draw(list(zip(names_of(args.metrics), map(read_metrics, args.metrics))), out)
    except ImportError:
        print("error: drawing wants matplotlib: pip install matplotlib", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)


if __name__ == "__main__":
    main()
