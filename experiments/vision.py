"""Should the vision encoder be trained, and at which rate? (Owl2 section 3.3: yes, at rates that decay layer by layer)

    python -m experiments.vision

Frozen in both stages, trained at one rate, or trained at rates that decay from each layer to the one below. The encoder
to start from is that of checkpoints/tiny-owl1, trained on pictures with a single shape: it has seen neither several
objects nor a letter, as CLIP was not trained for VQA. "scenes" is the baseline of the other experiments for comparison,
trained at one rate from the encoder of checkpoints/tiny-owl2, which has seen 60,000 other scenes of the same kind.

Training counts as better than freezing, and layer-wise rates as better than one rate, if the 95 % interval of the
paired difference is above 0 for objects, or if reading is learned in fewer steps in all seeds.

What else differs: frozen runs cost less compute. The rates were not tuned for each setup. The two encoders also differ
in depth (4 and 6 layers).
"""

from experiments.lab import VIT, Setup
from experiments.report import Page, main

PAGE = Page(
    "vision",
    __doc__,
    setups={vit: Setup(vit=vit, encoder="easy-vqa") for vit in VIT} | {"scenes": Setup()},
    pairs=[("trained", "frozen"), ("layer-wise", "frozen"), ("layer-wise", "trained"), ("trained", "scenes")],
    paper="""
| vision encoder | VQAv2 | TextVQA |
|---|---|---|
| frozen | 74.8 | 39.8 |
| trained | 76.2 | 40.3 |
| trained, layer-wise rates | 76.8 | 42.5 |
""",
)

if __name__ == "__main__":
    main(PAGE)
