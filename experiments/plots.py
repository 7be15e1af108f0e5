"""The charts of the experiments: learning curves, paired differences with their intervals, scores by layer."""

from pathlib import Path
from statistics import fmean

from experiments.statistics import Difference
from tools.plot import COLORS, STYLE


def save_curves(path: Path, curves: dict[str, dict[str, dict[int, list[float]]]]) -> None:
    """By metric and setup, numbers per seed at each step: thin lines for the seeds, a thick one for their mean.

    A column of panels per metric; a row per group of setups: "both, with" and "both, without" are in the group "both".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[str]] = {}
    for name in next(iter(curves.values())):
        groups.setdefault(name.rpartition(", ")[0], []).append(name)
    # A setup has the same color in all groups.
    labels = list(dict.fromkeys(name.rpartition(", ")[2] for names in groups.values() for name in names))
    with pyplot.rc_context(STYLE):
        size = (3.3 * len(curves), 0.6 + 2.4 * len(groups))
        options = {"figsize": size, "sharex": True, "sharey": "col", "squeeze": False, "layout": "constrained"}
        figure, rows = pyplot.subplots(len(groups), len(curves), **options)
        for (group, names), panels in zip(groups.items(), rows):
            for panel, (metric, by_setup) in zip(panels, curves.items()):
                for name in names:
                    label = name.rpartition(", ")[2]
                    color = COLORS[labels.index(label)]
                    steps, values = list(by_setup[name]), list(by_setup[name].values())
                    panel.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
                    panel.plot(steps, list(map(fmean, values)), color=color, linewidth=2, label=label)
                panel.set_title(f"{group}: {metric}" if group else metric, fontsize=9)
            panels[0].legend(frameon=False, fontsize=8)
        for panel in rows[-1]:
            panel.set_xlabel("step")
        figure.savefig(path, dpi=80)
        pyplot.close(figure)


def save_differences(path: Path, differences: dict[tuple[str, str], dict[str, Difference]]) -> None:
    """A panel per metric, a row per pair: the interval, the mean, and a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(next(iter(differences.values())))
    names = [f"{one} - {other}" for one, other in differences]
    with pyplot.rc_context(STYLE):
        size = (2 + 2.8 * len(metrics), 1.4 + 0.32 * len(names))
        figure, panels = pyplot.subplots(1, len(metrics), figsize=size, sharey=True, layout="constrained")
        for panel, metric in zip(panels, metrics):
            for y, by_metric in enumerate(differences.values()):
                x = by_metric[metric]
                color = COLORS[0] if x.low > 0 else COLORS[1] if x.high < 0 else COLORS[7]
                panel.plot([x.low, x.high], [y, y], color=color, linewidth=2.5)
                panel.plot(x.per_seed, [y] * len(x.per_seed), "o", color=color, markersize=3, alpha=0.5)
                panel.plot(x.mean, y, "|", color="black", markersize=11)
            panel.axvline(0, color="#444444", linewidth=0.8)
            panel.set_title(metric, fontsize=10)
        panels[0].set_yticks(range(len(names)), names, fontsize=8)
        panels[0].invert_yaxis()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def save_layers(path: Path, numbers: dict[str, dict[str, dict[str, list[float]]]], names: list[str]) -> None:
    """By model, layer and question, numbers per seed: a panel per question, dots for the seeds, a line for their mean.

    The first model has all layers, in their order.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = {layer: i for i, layer in enumerate(next(iter(numbers.values())))}
    with pyplot.rc_context(STYLE):
        size = (2.9 * len(names), 3.9)
        figure, panels = pyplot.subplots(1, len(names), figsize=size, sharey=True, layout="constrained")
        for panel, name in zip(panels, names):
            for color, (model, by_layer) in zip(COLORS, numbers.items()):
                x, values = [places[layer] for layer in by_layer], [of[name] for of in by_layer.values()]
                panel.plot(x, values, ".", color=color, markersize=3, alpha=0.5)
                panel.plot(x, list(map(fmean, values)), color=color, label=model)
            panel.set_xticks(list(places.values()), list(places), rotation=90, fontsize=7)
            panel.set_title(name, fontsize=10)
        panels[0].set_ylabel("percent right")
        panels[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=80)
        pyplot.close(figure)
