"""The tables and charts of an experiment: accuracy by setup, with mean and standard deviation over the seeds."""

import statistics
from pathlib import Path

import torch

from experiments.lab import DEVICE, LORA_RANK, Lab, Setup, create_model, git_commit
from tools.plot import COLORS
from train_stage2 import choose_trained
from training.flops import train_flops

KINDS = {  # of data/shapes' questions
    "test": ("color", "shape", "count", "relation", "size", "compare", "there", "word"),
    "text_test": ("fact", "named", "sum", "told"),
}

Table = dict[str, dict[str, list[float]]]  # by row and column: a number per seed


def format_numbers(numbers: list[float]) -> str:
    """Mean and sample standard deviation over the seeds, such as "61.2 ± 0.8"."""
    mean = f"{statistics.mean(numbers):.1f}"
    return f"{mean} ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def to_markdown(head: str, table: Table) -> str:
    columns = list(next(iter(table.values())))
    lines = [f"| {head} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in table.items():
        lines.append(f"| {name} | {' | '.join(format_numbers(row[column]) for column in columns)} |")
    return "\n".join(lines)


def save_chart(path: Path, title: str, table: Table, unit: str) -> None:
    """Saves a bar chart: a group of bars for each row, a bar for each column, and on it a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(next(iter(table.values())))
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.2 * len(table), 3.6), layout="constrained")
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        x = [k + (i - (len(columns) - 1) / 2) * width for k in range(len(table))]
        values = [row[column] for row in table.values()]
        axes.bar(x, [statistics.mean(v) for v in values], width * 0.92, color=COLORS[i], label=column, alpha=0.55)
        for center, numbers in zip(x, values):
            axes.plot([center] * len(numbers), numbers, "o", color=COLORS[i], markersize=3.5)
    axes.set_xticks(range(len(table)), list(table))
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, ncols=len(columns), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def scores(lab: Lab, setups: dict[str, Setup]) -> Table:
    """Accuracy on questions about objects of seen and unseen pairs, on reading, and on the text part.

    Reading has a column of its own: it is learned suddenly, at a random time, so after such short runs its accuracy is
    anything from 0 to 100 and would dominate an average.
    """
    return {
        name: {
            "objects, seen": lab.accuracy(setup, "test", lambda row: row["kind"] != "word" and row["seen"]),
            "unseen": lab.accuracy(setup, "test", lambda row: row["kind"] != "word" and not row["seen"]),
            "words": lab.accuracy(setup, "test", lambda row: row["kind"] == "word"),
            "text": lab.accuracy(setup, "text_test"),
        }
        for name, setup in setups.items()
    }


def scores_by_kind(lab: Lab, setups: dict[str, Setup], test: str) -> Table:
    """Accuracy on each kind of question of a test."""
    return {
        name: {kind: lab.accuracy(setup, test, lambda row: row["kind"] == kind) for kind in KINDS[test]}
        for name, setup in setups.items()
    }


def costs(setups: dict[str, Setup]) -> Table:
    """Visual tokens of an image, and MFLOPs of stage 2 on an image and 100 text tokens, 20 of them supervised."""
    table = {}
    for name, setup in setups.items():
        with torch.device("meta"):
            model = create_model(setup)
        choose_trained(model, LORA_RANK if setup.lora else 0, 32.0, 0.05, True, freeze_vit=setup.vit == "frozen")
        n_visual = model.config.n_visual_tokens
        flops = train_flops(model, 1, [n_visual + 100], 20) if setup.data != "none" else 0.0
        table[name] = {"visual tokens": [n_visual], "MFLOP per sample": [flops / 1e6]}
    return table


def compare_setups(lab: Lab, name: str, head: str, title: str, setups: dict[str, Setup]) -> None:
    """Runs the setups, and writes their tables and chart. head: of the tables' first column."""
    lab.run_setups(setups.values())
    table = scores(lab, setups)
    by_kind = (to_markdown(head, scores_by_kind(lab, setups, test)) for test in KINDS)
    write_report(lab, name, to_markdown(head, table), *by_kind, to_markdown(head, costs(setups)))
    save_chart(lab.out / f"{name}.png", title, table, "% correct")


def write_report(lab: Lab, name: str, *tables: str) -> None:
    about = f"Percent correct: mean ± standard deviation over {len(lab.seeds)} seeds; {lab.n_image:,} training images, "
    about += f"{lab.scale:g} times the usual steps; {DEVICE}, torch {torch.__version__}, owlet {git_commit()}"
    text = "\n\n".join([about, *tables]) + "\n"
    (lab.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
