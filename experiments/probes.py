"""What do visual tokens tell? Linear probes of the vision encoder and the abstractor, layer by layer (Owl1 section 3.1)

    python -m experiments.probes

A probe is a linear classifier from the numbers of one layer, all tokens of an image side by side, to a property of the
image. It shows what is there to be read without further computation. Each question has one probe per shape, cell or
letter, and the percent right is their mean:

    color of a shape    which of 6 colors does the only object of a shape have, wherever it is?
    color in a cell     which of 6 colors does the object in a cell have?
    cell of a shape     in which of 6 cells is the only object of a shape?
    count               how many objects, 1 to 4?
    word                which letter is the first, the second, the third?

    pixels -> encoder 0 .. -> patch features -> abstractor 1 .. -> visual tokens       "encoder 0": the embedded patches
                                            \\-> one Linear ------> visual tokens       (experiments/patches.py)

The models are those of experiments.queries after stage 2 on both kinds of data. "random abstractor" is the one with 16
queries with its abstractor replaced by a random one; "all random" has no trained weight. "guess" is the most frequent
answer.

The abstractor's outputs count as meaningful if, for each question, the probe of its visual tokens is better than that
of a random abstractor's (95 % interval of the paired difference above 0). They count as losing something if it is worse
than the probe of the Linear's visual tokens.

What else differs: layers have different numbers of inputs (the table has them), which favors the larger ones. Scenes
are new, with the pairs and words of training.
"""

import random
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from abstractor import Abstractor
from command import run
from common.files import read_json, write_json
from data.image import to_pixels
from data.shapes.prepare import COLORS, COLUMNS, ROWS, SHAPES, Object, Scene, make_scene, render
from experiments.lab import DEVICE, Lab, Setup, create_model, experiment, git_commit, make_parser
from experiments.patches import load_patches
from experiments.plots import save_layers
from experiments.report import format_numbers, to_markdown
from experiments.statistics import paired_difference
from model import Owl
from training.presets import init_weights
from weights import load_model

SETUPS = {"16 queries": Setup(), "64 queries": Setup(n_query=64), "64 patches": Setup(n_query=64, patches=True)}
FIRST = "16 queries"  # all its layers are in the table
PAIRS = [(FIRST, "random abstractor"), (FIRST, "64 patches"), ("64 queries", "64 patches"), (FIRST, "all random")]
TOKENS = "visual tokens"
N_TRAIN, N_TEST = 2000, 1000  # scenes
RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # penalties, relative to the mean squared norm of the inputs
BATCH = 100  # images
Answers = list[int | None]  # the class of each scene; None where the question has no answer


def cell_of(item: Object) -> int:
    return len(COLUMNS) * item.row + item.column


def questions(scenes: list[Scene]) -> dict[str, list[Answers]]:
    """By question, one list of answers per shape, cell or letter."""
    found: dict[str, list[Answers]] = {name: [] for name in ("color of a shape", "color in a cell", "cell of a shape")}
    colors = list(COLORS)
    for shape in SHAPES:
        of_shape = [[item for item in scene.objects if item.shape == shape] for scene in scenes]
        only = [items[0] if len(items) == 1 else None for items in of_shape]
        found["color of a shape"].append([None if item is None else colors.index(item.color) for item in only])
        found["cell of a shape"].append([None if item is None else cell_of(item) for item in only])
    by_cell = [{cell_of(item): item for item in scene.objects} for scene in scenes]
    for cell in range(len(ROWS) * len(COLUMNS)):
        found["color in a cell"].append([colors.index(at[cell].color) if cell in at else None for at in by_cell])
    found["count"] = [[len(scene.objects) - 1 for scene in scenes]]
    words = [scene.word.split() for scene in scenes]
    found["word"] = [[ord(word[i]) - ord("A") if i < len(word) else None for word in words] for i in range(3)]
    return found


@torch.no_grad()
def layers(model: Owl, pixels: Tensor) -> dict[str, Tensor]:
    """By layer, all numbers of each image: [N, tokens * channels] float32. pixels: [N, 3, S, S]."""
    found: dict[str, list[Tensor]] = {}
    hooks = []

    def keep(name: str, module: torch.nn.Module, select: slice) -> None:
        def hook(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
            found.setdefault(name, []).append(output[:, select].flatten(1))

        hooks.append(module.register_forward_hook(hook))

    patches = slice(1, None)  # without the class token
    keep("encoder 0", model.vit.pre_norm, patches)
    for i, block in enumerate(model.vit.blocks, 1):
        keep(f"encoder {i}", block, patches)
    keep("patch features", model.vit.post_norm, patches)
    for i, layer in enumerate(model.abstractor.layers, 1):
        keep(f"abstractor {i}", layer, slice(None))
    keep(TOKENS, model.abstractor, slice(-1))  # without the end-of-image embedding
    for part in pixels.split(BATCH):
        model.encode_images(part)
    for hook in hooks:
        hook.remove()
    return {"pixels": pixels.flatten(1)} | {name: torch.cat(parts) for name, parts in found.items()}


def fit(kernel: Tensor, classes: Tensor, ridge: float) -> Tensor:
    """Ridge regression to one-hot vectors. kernel: [n, n], classes: [n]. Returns the coefficients [n, n_class]."""
    targets = torch.nn.functional.one_hot(classes).to(kernel.dtype)
    penalty = ridge * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
    return torch.cholesky_solve(targets, torch.linalg.cholesky(kernel + penalty))


def share_right(kernel: Tensor, coefficients: Tensor, classes: Tensor) -> float:
    """kernel: [m, n], of m tested and n trained images. Returns the share of the m classes that is predicted."""
    return ((kernel @ coefficients).argmax(1) == classes).double().mean().item()


def probe(kernel: Tensor, answers: Answers, n_train: int) -> float:
    """Percent of the scenes from n_train on that a linear classifier trained on the others gets right.

    kernel: [N, N] float64, inner products of the images' numbers. The last fifth of the training scenes chooses the
    penalty; then all of them are used.
    """
    known = torch.tensor([i for i, answer in enumerate(answers) if answer is not None])
    classes = torch.tensor([answer for answer in answers if answer is not None])
    train, test = known[known < n_train], known[known >= n_train]
    classes, tested = classes.split([len(train), len(test)])
    n = len(train) * 4 // 5
    inner = kernel[train][:, train]

    def validation(ridge: float) -> float:
        return share_right(inner[n:, :n], fit(inner[:n, :n], classes[:n], ridge), classes[n:])

    best = max(reversed(RIDGE), key=validation)  # of equally good ones the largest
    return 100 * share_right(kernel[test][:, train], fit(inner, classes, best), tested)


def most_frequent(answers: Answers, n_train: int) -> float:
    """Percent right of a guess that does not see the image: the most frequent class of the training scenes."""
    train, test = ([a for a in part if a is not None] for part in (answers[:n_train], answers[n_train:]))
    guess = max(set(train), key=train.count)
    return 100 * sum(answer == guess for answer in test) / len(test)


def probe_all(x: Tensor, asked: dict[str, list[Answers]], n_train: int) -> dict[str, float]:
    """By question, the mean percent right of its probes. x: [N, numbers], of all scenes."""
    x = x - x[:n_train].mean(0)
    kernel = (x @ x.T).double()
    kernel += kernel.diagonal().mean()  # as a constant input would add: classes need not be equally frequent
    return {name: sum(probe(kernel, one, n_train) for one in lists) / len(lists) for name, lists in asked.items()}


def models(lab: Lab, seed: int) -> Iterator[tuple[str, Owl]]:
    """Yields the models of a seed by name."""
    for name, setup in SETUPS.items():
        load = load_patches if setup.patches else load_model
        yield name, load(lab.out / f"seed{seed}/{setup.stage2}")
    torch.manual_seed(seed)
    model = load_model(lab.out / f"seed{seed}/{SETUPS[FIRST].stage2}")
    model.abstractor = init_weights(Abstractor(model.config.abstractor))
    yield "random abstractor", model
    yield "all random", init_weights(create_model(SETUPS[FIRST]))


def measure(lab: Lab, seed: int) -> None:
    """Writes seedN/probes.json: by model and layer the percent right by question, and the number of inputs."""
    path = lab.out / f"seed{seed}/probes.json"
    if path.exists():
        return
    rng = random.Random(f"probes of seed {seed}")  # other scenes than those of the seed's files
    scenes = [make_scene(rng) for _ in range(N_TRAIN + N_TEST)]
    pixels = torch.stack([to_pixels(render(scene, rng), 64, "square") for scene in scenes])
    asked = questions(scenes)
    guess = {name: sum(most_frequent(one, N_TRAIN) for one in lists) / len(lists) for name, lists in asked.items()}
    scores: dict[str, dict[str, dict[str, float]]] = {"guess": {"": guess | {"inputs": 0}}}
    for name, model in models(lab, seed):
        scores[name] = {}
        for layer, x in layers(model.eval(), pixels).items():
            if name == FIRST or not layer.startswith(("pixels", "encoder")):
                scores[name][layer] = probe_all(x, asked, N_TRAIN) | {"inputs": x.shape[1]}
    write_json(path, scores)


def write_page(lab: Lab) -> None:
    """Writes the page, its numbers and its chart."""
    by_seed = [read_json(lab.out / f"seed{seed}/probes.json") for seed in lab.seeds]
    first = by_seed[0]
    names = [name for name in first["guess"][""] if name != "inputs"]
    numbers = {
        model: {layer: {name: [x[model][layer][name] for x in by_seed] for name in names} for layer in first[model]}
        for model in first
    }
    rows = []
    for model, by_layer in numbers.items():
        for layer in by_layer:
            cells = [format_numbers(by_layer[layer][name]) for name in names]
            rows.append([f"{model}: {layer}" if layer else model, f"{first[model][layer]['inputs']:,}", *cells])
    differences = []
    for one, other, layer in [(*pair, TOKENS) for pair in PAIRS] + [(FIRST, FIRST, "patch features")]:
        cells = []
        for name in names:
            x = paired_difference([[v] for v in numbers[one][TOKENS][name]], [[v] for v in numbers[other][layer][name]])
            cells.append(f"{x.mean:+.1f} [{x.low:+.1f}, {x.high:+.1f}], {x.detectable:.1f}")
        differences.append([f"{one} - {other}" + (f": {layer}" if layer != TOKENS else ""), *cells])
    title, _, about = __doc__.partition("\n")
    parts = [
        f"# {title}",
        re.sub(r"\n    python .*\n", "", about).strip(),
        "**The papers report** no such probes.",
        f"**What was run.** {len(lab.seeds)} seeds, {N_TRAIN:,} scenes for each probe's training and {N_TEST:,} for its "
        f"test; {DEVICE}, torch {torch.__version__}, owlet {git_commit()}; the models as on the page of "
        "experiments.queries.",
        "**Percent right**, mean ± standard deviation over the seeds.\n\n" + to_markdown(["", "inputs", *names], rows),
        "**Paired differences of visual tokens** (last row: visual tokens less patch features of one model): mean [95 % "
        "interval], smallest difference detectable with a power of 80 %.\n\n" + to_markdown(["", *names], differences),
        "![percent right by layer](probes.png)",
        "**What this does not show.** A property that no linear probe reads may still be there, and the decoder is not "
        "linear. A property that is read need not be used by the decoder. All models are tiny and read drawn scenes.",
    ]
    (lab.out / "probes.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    write_json(lab.out / "probes.json", numbers)
    save_layers(lab.out / "probes.png", {model: x for model, x in numbers.items() if model != "guess"}, names)
    print(lab.out / "probes.md")


def main() -> None:
    with experiment(make_parser(__doc__).parse_args()) as lab:
        lab.run_setups(SETUPS.values())
        for seed in tqdm(lab.seeds, unit="seed", disable=None):
            measure(lab, seed)
        write_page(lab)


if __name__ == "__main__":
    run(main)
