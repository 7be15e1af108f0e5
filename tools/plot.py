"""Plots the loss and the throughput of one or more runs over their steps, and prints a table of them.

    python -m tools.plot runs/a/metrics.jsonl                            writes runs/a/curves.png
    python -m tools.plot runs/a/metrics.jsonl runs/b/metrics.jsonl --out a-and-b.png

                      loss     best val. loss after step   last val. loss   tokens/s
    a               0.0766             0.0712        180           0.0731      3,736

The table has the last training loss and the median throughput. Upper panel: training loss (line) and validation loss
(dots). Lower panel: tokens per second. Each run has a color and the name of its folder. The input is the metrics.jsonl
that training writes, one JSON object per line, for example {"step": 10, "loss": 2.1, "tokens_per_s": 900.0} or {"step":
500, "val_loss": 1.9}. A loss that is null (it was not finite) is left out.

Needs matplotlib: pip install matplotlib
"""

import json
import math
from pathlib import Path
from statistics import median

from command import ArgumentParser, log, run, user_errors
from common.files import printable, read_bytes, reading, writing

COLORS = ("#1f5fa8", "#d1602b", "#2f8f5b", "#8a4fa3", "#b8912a", "#4aa3b5", "#a8324e", "#6b6b6b")
MAX_METRICS = 1_000_000_000  # bytes
QUANTITIES = ("loss", "val_loss", "tokens_per_s")
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#888888",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}
Curves = dict[str, tuple[list[float], list[float]]]  # by quantity: steps and values


def read_curves(path: Path) -> Curves:
    """Reads the curves of a metrics.jsonl. A truncated last line, as of a run in progress, is skipped with a note.

    Raises ValueError for any other malformed line and for a file without a finite loss.
    """
    with reading(path):
        lines = read_bytes(path, MAX_METRICS).decode(errors="replace").splitlines()
    curves = {quantity: ([], []) for quantity in QUANTITIES}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = float(row["step"])
            found = {key: float(row[key]) for key in QUANTITIES if row.get(key) is not None}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            if 1 < number == len(lines):
                log(f"note: {printable(path)} ends within line {number}, which is left out")
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step") from None
        for quantity, value in found.items():
            curves[quantity][0].append(step)
            curves[quantity][1].append(value)
    if not any(math.isfinite(value) for value in curves["loss"][1] + curves["val_loss"][1]):
        raise ValueError(f"{path} has no finite loss")
    return curves


def run_names(paths: list[Path]) -> list[str]:
    """Names the runs after their folders, with as many parent folders as it takes to tell them apart."""
    parts = [path.resolve().parent.parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def table(runs: list[tuple[str, Curves]]) -> str:
    """Compares runs: the last loss, the best and last validation loss, and the median throughput."""
    width = max(12, *(len(printable(name)) for name, _ in runs))
    lines = [f"{'':<{width}}{'loss':>10}{'best val. loss':>19}{'after step':>11}{'last val. loss':>17}{'tokens/s':>11}"]
    for name, curves in runs:
        losses, (steps, val_losses), rates = curves["loss"][1], curves["val_loss"], curves["tokens_per_s"][1]
        finite = [(loss, step) for loss, step in zip(val_losses, steps) if math.isfinite(loss)]
        best, step = min(finite) if finite else (None, None)
        last = [losses[-1] if losses else None, best, val_losses[-1] if val_losses else None]
        loss, best, last = ("-" if x is None else f"{x:.4f}" for x in last)
        rate = f"{median(rates):,.0f}" if rates else "-"
        step = "-" if step is None else f"{step:,.0f}"
        lines.append(f"{printable(name):<{width}}{loss:>10}{best:>19}{step:>11}{last:>17}{rate:>11}")
    return "\n".join(lines)


def save_plot(runs: list[tuple[str, Curves]], out: Path) -> None:
    """Saves the curves of (name, curves) pairs as a PNG with two panels."""
    import matplotlib

    matplotlib.use("Agg")  # renders to a file, without a screen
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    with plt.rc_context(STYLE):
        figure, (upper, lower) = plt.subplots(
            2, 1, figsize=(9, 7), height_ratios=(2, 1), sharex=True, layout="constrained"
        )
        for i, (name, curves) in enumerate(runs):
            name = printable(name).replace("$", r"\$")  # matplotlib reads text between two dollars as a formula
            line = {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--", ":")[i // len(COLORS) % 3]}
            upper.plot(*curves["loss"], **line, linewidth=1.4, label=name)
            if curves["val_loss"][0]:
                dots = {"marker": "o", "markersize": 6, "markeredgecolor": "white", "linewidth": 0.8}
                upper.plot(*curves["val_loss"], **line, **dots, label=f"{name}, validation")
            lower.plot(*curves["tokens_per_s"], **line, linewidth=1.4)
        upper.set_title("loss")
        lower.set_title("tokens per second")
        lower.set_ylim(bottom=0)
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        upper.legend(frameon=False)
        with writing(out) as part:
            figure.savefig(part, dpi=150, format="png")
        plt.close(figure)


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.plot", description=__doc__)
    parser.add_argument("metrics", nargs="+", type=Path, metavar="METRICS", help="metrics.jsonl of a run")
    parser.add_argument("--out", type=Path, metavar="PNG", help="default: curves.png beside the first METRICS")
    args = parser.parse_args()
    out = args.out or args.metrics[0].parent / "curves.png"
    with user_errors():
        if out.exists() and not (out.is_file() and b"Matplotlib" in out.read_bytes()[:500]):
            raise ValueError(f"{out} exists and is not a plot: choose another --out")
        runs = list(zip(run_names(args.metrics), map(read_curves, args.metrics)))
        save_plot(runs, out)
    print(table(runs))
    print(printable(out))


if __name__ == "__main__":
    run(main)
