"""What does a field of the model or of the recipe change? For a question of your own.

    python -m experiments.run --vary n_query=4,8,16 --seeds 5       # runs/experiments/vary-n_query.md
    python -m experiments.run --vary llama.n_layer=2,4,6            # fields of the configurations in llama.py and
    python -m experiments.run --vary abstractor.n_layer=1,2         #   abstractor.py, with the name of the part
    python -m experiments.run --vary lr=5e-4,1e-3,2e-3              # fields of Recipe (training/options.py), in stage 2
    python -m experiments.run --vary vit=frozen,layer-wise          # fields of Setup (experiments/lab.py)
    python -m experiments.run --quick                               # a known answer, in three minutes on two cores

Everything else is as in the other experiments: small models on drawn scenes, two stages, seeds with data of their own.
The page compares each value with the first one, in pairs of equal seeds. A difference counts if its 95 % interval does
not contain 0. Decide before the run which column answers your question: with five columns, one of four comparisons
without any effect has such an interval somewhere.

--quick asks whether the model looks at the image at all: the same model answers the same questions with the image and
with a blank one. It starts from the embedded model's vision encoder, like all experiments.
"""

import argparse
import math
from dataclasses import fields, replace
from statistics import fmean

import torch

from abstractor import AbstractorConfig
from command import run
from experiments.lab import DATA, ENCODERS, N_POINT, VIT, Lab, Setup, create_model, experiment, make_parser
from experiments.report import METRICS, Page, Results, write_page
from experiments.statistics import paired_difference
from llama import LlamaConfig
from model import IMAGE_TOKEN_ID
from training.options import Recipe
from training.presets import init_weights

PARTS = {"abstractor": AbstractorConfig, "llama": LlamaConfig}
CHOICES = {"variant": ("owl1", "owl2"), "vit": VIT, "encoder": ENCODERS, "data": DATA}  # of fields of Setup
CHOICES |= {name: ("false", "true") for name in ("adaptive", "wide", "end_to_end", "lora", "llama.tied")}
# Not to vary: what depends on other fields, on the data, or has a name in Setup.
FIXED = {"config", "recipe", "patches", "llama.vocab_size", "llama.adaptive", "llama.bos_id", "llama.eos_id"}
FIXED |= {f"abstractor.{name}" for name in ("n_query", "n_out", "n_embd", "grid_size")}
QUICK = {"seeds": 3, "scale": 0.3, "images": 1500}


def parse_value(kind: type, name: str, text: str) -> object:
    """Returns the text as a value of this type. Raises ValueError."""
    if name in CHOICES and text not in CHOICES[name]:
        raise ValueError(f"it is one of {', '.join(CHOICES[name])}")
    if kind is bool:
        return text == "true"
    value = kind(text)
    if kind in (int, float) and not (0 < value < math.inf or name == "abstractor.dropout" and 0 <= value < 1):
        raise ValueError("it must be above 0")
    return value


def make_setup(name: str, text: str) -> Setup:
    """The baseline with another value in one field. Raises ValueError for an unknown field or an impossible value."""
    own = {f.name: f.type for f in fields(Setup)}
    config = {f"{part}.{f.name}": f.type for part, kind in PARTS.items() for f in fields(kind)}
    own, config = ({name: kind for name, kind in of.items() if name not in FIXED} for of in (own, config))
    recipe = {f.name: f.metadata["type"] for f in fields(Recipe) if "nargs" not in f.metadata and f.name not in own}
    try:
        if name in own:
            return replace(Setup(), **{name: parse_value(own[name], name, text)})
        if name in config:
            return Setup(config=((name, parse_value(config[name], name, text)),))
        if name in recipe:
            value = recipe[name](text)
            flags = {f"--{name.replace('_', '-')}": value}
            if name == "batch":
                flags["--micro-batch"] = value
            if name == "steps":
                flags["--save-every"] = max(1, value // N_POINT)
            return Setup(recipe=tuple((flag, str(x)) for flag, x in flags.items()))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{name} cannot be {text!r}: {error}") from None
    names = [*own, *config, *recipe]
    close = [other for other in names if other.endswith(f".{name}")]
    raise ValueError(f"there is no field {name!r} to vary. There are {', '.join(close or names)}")


@torch.no_grad()
def check_setup(setup: Setup, name: str, text: str) -> None:
    """Raises ValueError unless such a model can read an image."""
    try:
        model = init_weights(create_model(setup))
        for part in (model.config.abstractor, model.config.llama):
            if part.n_embd % part.n_head != 0:
                raise ValueError(f"n_embd, {part.n_embd}, is not a multiple of n_head")
        ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * model.config.n_visual_tokens, 2]])
        model(ids, torch.zeros(1, 3, setup.image_size, setup.image_size))
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"there is no model with {name}={text}: {str(error).splitlines()[0]}") from None


def parse_vary(text: str) -> dict[str, Setup]:
    """Parses "n_query=4,8" into a setup per value. Raises ValueError."""
    name, equals, values = text.partition("=")
    texts = values.split(",")
    setups = {f"{name}={value}": make_setup(name, value) for value in texts if equals}
    if len(texts) < 2 or len(set(setups.values())) < len(texts):
        raise ValueError(f"--vary is NAME=VALUE,VALUE,... with different values, not {text!r}")
    for (label, setup), value in zip(setups.items(), texts):
        check_setup(setup, name, value)
    return setups


def vary(lab: Lab, text: str) -> None:
    """Makes the runs of all values, and their page."""
    setups = parse_vary(text)
    first, *others = setups
    name = text.partition("=")[0]
    doc = f"What does {name} change?\n\nA difference counts if its 95 % interval does not contain 0."
    pairs = [(other, first) for other in others]
    lab.run_setups(list(setups.values()))
    write_page(lab, Page(f"vary-{name}", doc, setups, pairs, ""))


def quick(lab: Lab) -> None:
    """Prints what the baseline answers with images and with blank ones."""
    page = Page("quick", "", {"baseline": Setup()}, [], "", METRICS)
    lab.run_setups(page.setups.values())
    results = Results(lab, page)
    image, blank = (results.questions("baseline", metric) for metric in ("objects", "objects, blank"))
    print("questions about objects, percent right     " + "".join(f"  seed {seed:<4}" for seed in lab.seeds))
    for name, by_seed in (("with the image", image), ("with a blank image", blank)):
        print(f"{name:<43}" + "".join(f"  {fmean(of_seed):<9.1f}" for of_seed in by_seed))
    x = paired_difference(image, blank)
    print(f"difference {x.mean:+.1f} points, 95 % interval {x.low:+.1f} to {x.high:+.1f}")
    print("the model looks at the image" if x.low > 0 else "these runs do not show that the model looks at the image")


def main() -> None:
    parser = make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vary", metavar="NAME=VALUE,VALUE,...", help="a field, and the values to compare")
    what.add_argument("--quick", action="store_true", help="image against blank image; with few images, steps and seeds")
    args = parser.parse_args()
    if args.quick:
        args = argparse.Namespace(**vars(args) | QUICK)
        args.out /= "quick"
    with experiment(args) as lab:
        if args.quick:
            quick(lab)
        else:
            vary(lab, args.vary)


if __name__ == "__main__":
    run(main)
