"""Training files of the embedded model: the scenes of data/shapes, easy-VQA, and pictures to answer with "I don't know".

    pip install easy-vqa
    python data/tiny/prepare.py                                     # 60,000 scenes into data/tiny, a few minutes
    python data/tiny/prepare.py --images 400 --out elsewhere        # a small one, into another folder

    file                              samples                                                     for
    --------------------------------  ----------------------------------------------------------  --------------------
    text.json       text_val.json     described scenes: captions and questions; no images         a language model
    captions.json   captions_val.json an image and its caption                                    stage 1
    train.json      val.json          an image, up to 8 questions in one conversation             stage 2, images
    varied.json  varied_captions.json the same of scenes with twelve colors instead of six        stage 2, images
    text_all.json                     as text.json, with twelve colors and the held-out pairs     stage 2, text
    test.json                         an image and one question; with "kind"                      evaluation
    unseen.json                       the same about held-out pairs and words; with "seen"        evaluation
    unknown.json                      an unknown picture and one question                         evaluation
    test_captions.json                an image and its caption; with "seen"                       evaluation
    easy_vqa/                         the files of data/easy_vqa/prepare.py                       all stages, evaluation
    tokenizer.model                   one vocabulary for all of them                              all stages

Scenes, questions, held-out pairs and words are those of data/shapes/prepare.py; its text part is not used. No training
image of a scene shows a held-out pair. If six of 36 pairs are missing, a model learns that they never occur: varied.json
has twelve colors, so six of 72 are missing, and text_all.json has all pairs, as the text that LLaMA has read would. Two
of the held-out pairs, red circles and blue triangles, are in easy-VQA's pictures, so in unseen.json they are "seen".

**Unknown pictures:** overlapping leaves, blurred and noisy, which have the statistics of photos more than of drawings.
Every question about them, and questions about dogs or weather in a scene, have the answer "I don't know."
"""

import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from command import ArgumentParser, run, user_errors  # noqa: E402  reports missing packages

from PIL import Image, ImageDraw, ImageFilter  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import CAPTION_REQUEST  # noqa: E402
from data.easy_vqa import prepare as easy_vqa  # noqa: E402
from data.easy_vqa.prepare import make_sample, train_tokenizer, write_samples  # noqa: E402
from data.shapes.prepare import (  # noqa: E402
    COLORS,
    MORE_COLORS,
    MORE_PAIRS,
    SEEN_PAIRS,
    SHAPES,
    BalancedSampler,
    Scene,
    Turn,
    caption_sample,
    make_scene,
    plain_sample,
    questions_about,
    seen_questions,
    unseen_questions,
    write_images,
)

EASY_VQA_PAIRS = {("circle", "red"), ("triangle", "blue")}  # held-out pairs that easy-VQA has
ALL_PAIRS = list(itertools.product(SHAPES, COLORS | MORE_COLORS))
MIN_IMAGES = 160  # with fewer scenes, the validation files would be empty
UNKNOWN = "I don't know."
UNKNOWN_DESCRIPTION = "The image shows something else. "  # replaces an unknown picture in conversations of text only
UNKNOWN_SHARE = 0.1  # unknown pictures per scene
FOREIGN_SHARE = 0.1  # of the scenes in stage 2 that are asked one question about something they cannot contain

NOUNS = (
    "dog cat man woman child people person bird horse car bus train boat bicycle house street tree flower table chair "
    "food pizza cup phone computer book ball shirt hat sign water snow beach mountain sky room door game player"
).split()
FOREIGN_FORMS = (
    "what is the {} doing?",
    "where is the {}?",
    "is there a {} in the picture?",
    "how many {}s are in the photo?",
    "what color is the {}?",
    "describe the {}.",
    "who owns the {}?",
)
FOREIGN_QUESTIONS = [form.format(noun) for form, noun in itertools.product(FOREIGN_FORMS, NOUNS)] + [
    "what is this?",
    "who is this?",
    "where is this?",
    "what is happening here?",
    "what is the weather like?",
    "is this a photo?",
    "when was this taken?",
]
CAPTION_REQUESTS = (  # that of both papers, and what people write
    CAPTION_REQUEST,
    "describe the image.",
    "describe this image in detail.",
    "what is in this picture?",
    "what do you see?",
)
CAPITAL_SHARE = 0.2  # of the questions, except those of the tests, that begin with a capital letter


# ----------------------------------------------------------------------------------------------------------------------
# Pictures of neither scenes nor easy-VQA


def unknown_picture(rng: random.Random) -> Image.Image:
    """Returns an image of overlapping leaves with random colors, RGB, 64 x 64 pixels.

    Photos have objects of all sizes that cover one another, smooth shading, and noise.
    """
    base = [rng.randrange(256) for _ in range(3)]
    spread = rng.choice((30, 80, 160))  # of the colors

    def color() -> tuple[int, ...]:
        return tuple(min(255, max(0, round(rng.gauss(value, spread)))) for value in base)

    image = Image.new("RGB", (128, 128), color())
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.choice((5, 15, 60, 200))):
        r = min(80, 4 / rng.uniform(0.05, 1))  # many small leaves, few large ones
        x, y = rng.uniform(0, 128), rng.uniform(0, 128)
        stretch = rng.uniform(0.3, 1)
        box = (x - r, y - r * stretch, x + r, y + r * stretch)
        kind = rng.randrange(4)
        if kind == 0:
            canvas.ellipse(box, fill=color())
        elif kind == 1:
            canvas.rectangle(box, fill=color())
        elif kind == 2:
            canvas.polygon([(rng.gauss(x, r), rng.gauss(y, r)) for _ in range(rng.randint(3, 6))], fill=color())
        else:
            canvas.line([(rng.gauss(x, 2 * r), rng.gauss(y, 2 * r)) for _ in range(3)], color(), rng.randint(1, 4))
    # Light from one side, as shading changes slowly in photos.
    light = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(image.size).convert("RGB")
    image = Image.blend(image, light, rng.uniform(0, 0.4))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 4))).resize((64, 64))
    if rng.random() < 0.5:
        noise = Image.frombytes("RGB", image.size, rng.randbytes(64 * 64 * 3))
        image = Image.blend(image, noise, rng.uniform(0, 0.3))
    return image.convert("L").convert("RGB") if rng.random() < 0.1 else image


def write_unknown(out: Path, split: str, n: int, rng: random.Random) -> list[str]:
    """Writes n unknown pictures. Returns their paths relative to `out`."""
    folder = out / "images" / f"unknown-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    for k in tqdm(range(n), desc=f"images to {folder}", unit="image"):
        unknown_picture(rng).save(folder / f"{k}.png")
    return [f"images/unknown-{split}/{k}.png" for k in range(n)]


def unknown_turns(known: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """Returns four questions to answer with "I don't know.": half from `known`, questions that scenes answer."""
    questions = rng.sample(known, 2) + rng.sample([*FOREIGN_QUESTIONS, *CAPTION_REQUESTS], 2)
    rng.shuffle(questions)
    return [(capitalize(question, rng), UNKNOWN) for question in questions]


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def capitalize(question: str, rng: random.Random) -> str:
    """Makes the first letter of some questions a capital one."""
    return question[0].upper() + question[1:] if rng.random() < CAPITAL_SHARE else question


def scene_turns(turns: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
    """Returns questions and answers; some conversations have a question about something that no scene contains."""
    asked = [(turn.question, turn.answer) for turn in turns]
    if rng.random() < FOREIGN_SHARE:
        asked.insert(rng.randint(0, len(asked)), (rng.choice(FOREIGN_QUESTIONS), UNKNOWN))
    return [(capitalize(question, rng), answer) for question, answer in asked]


def caption_turn(answer: str, rng: random.Random) -> tuple[str, str]:
    """Returns one of the requests for a caption, and the answer."""
    return capitalize(rng.choice(CAPTION_REQUESTS), rng), answer


def described_samples(split: str, n: int, known: list[str], rng: random.Random, all_pairs: bool = False) -> list[dict]:
    """Returns samples of text only: captions, questions about described scenes, and unknown pictures.

    all_pairs: held-out pairs and more colors too.
    """
    pairs, questions = (ALL_PAIRS, questions_about) if all_pairs else (SEEN_PAIRS, seen_questions)
    samples = []
    sampler = BalancedSampler(rng)
    for k in range(n):
        scene = make_scene(rng, pairs=pairs)
        if k % 10 == 0:  # no scene
            samples.append(make_sample(f"{split}-{k}", unknown_turns(known, rng), UNKNOWN_DESCRIPTION))
        elif k % 10 <= 3:
            turn = caption_turn(scene.caption + ".", rng)
            samples.append(make_sample(f"{split}-{k}", [turn], scene.description))
        else:
            turns = scene_turns(sampler.sample(questions(scene)), rng)
            samples.append(make_sample(f"{split}-{k}", turns, scene.description))
    rng.shuffle(samples)
    return samples


def image_samples(
    split: str, scenes: list[Scene], paths: list[str], rng: random.Random
) -> tuple[list[dict], list[dict]]:
    """Returns the questions about each image, and its caption."""
    sampler = BalancedSampler(rng)
    asked, captions = [], []
    for k, (scene, path) in enumerate(zip(scenes, paths)):
        turns = scene_turns(sampler.sample(seen_questions(scene)), rng)
        asked.append(make_sample(f"{split}-{k}", turns, "<|image|>", path))
        captions.append(make_sample(f"{split}-{k}", [caption_turn(scene.caption + ".", rng)], "<|image|>", path))
    return asked, captions


def prepare(out: Path, n_image: int, seed: int) -> None:
    """Writes all files. n_image: training scenes; the sizes of the other files follow. Raises OSError, ValueError."""
    if n_image < MIN_IMAGES:
        raise ValueError(f"--images is {n_image}: it must be {MIN_IMAGES} or more")
    easy_vqa.prepare(out / "easy_vqa", seed)
    rng = random.Random(seed)
    n_test = min(2000, n_image // 20)
    scenes: dict[str, list[Scene]] = {
        "train": [make_scene(rng) for _ in range(n_image)],
        "val": [make_scene(rng) for _ in range(n_test // 4)],
        "test": [make_scene(rng) for _ in range(n_test)],
        "unseen": [make_scene(rng, held_out=True) for _ in range(n_test)],
    }
    known = sorted({turn.question for scene in scenes["train"][:1000] for turn in questions_about(scene)})
    paths = {split: write_images(out, split, scenes[split], rng) for split in scenes}
    unknown = {split: write_unknown(out, split, round(len(scenes[split]) * UNKNOWN_SHARE), rng) for split in scenes}

    files = {
        "text": described_samples("text", n_image // 2, known, rng),
        "text_val": described_samples("text-val", n_test // 4, known, rng),
    }
    for split, captions in (("train", "captions"), ("val", "captions_val")):
        files[split], files[captions] = image_samples(split, scenes[split], paths[split], rng)
        for k, path in enumerate(unknown[split]):
            caption = caption_turn(UNKNOWN, rng)
            files[captions].append(make_sample(f"{split}-unknown-{k}", [caption], "<|image|>", path))
            files[split].append(make_sample(f"{split}-unknown-{k}", unknown_turns(known, rng), "<|image|>", path))
        rng.shuffle(files[captions])
        rng.shuffle(files[split])

    for split, questions in (("test", seen_questions), ("unseen", unseen_questions)):
        sampler = BalancedSampler(rng)
        files[split] = []
        for k, (scene, path) in enumerate(zip(scenes[split], paths[split])):
            for turn in sampler.sample(questions(scene)):
                sample = plain_sample(f"{split}-{k}-{turn.kind}", [turn], "<|image|>", path)
                seen = split == "test" or bool(turn.about & EASY_VQA_PAIRS)
                files[split].append(sample | {"kind": turn.kind, "seen": seen})
    files["unknown"] = []
    for split in ("test", "unseen"):
        for k, path in enumerate(unknown[split]):
            question = unknown_turns(known, rng)[:1]
            files["unknown"].append(make_sample(f"{split}-unknown-{k}", question, "<|image|>", path))
    files["test_captions"] = [
        caption_sample(f"{split}-{k}", scene, "<|image|>", path) | {"seen": split == "test"}
        for split in ("test", "unseen")
        for k, (scene, path) in enumerate(zip(scenes[split], paths[split]))
    ]

    # For stage 2: more colors, so that few of all pairs are missing, and text with all pairs.
    varied = [make_scene(rng, pairs=SEEN_PAIRS + MORE_PAIRS) for _ in range(n_image * 2 // 3)]
    varied_paths = write_images(out, "varied", varied, rng)
    files["varied"], files["varied_captions"] = image_samples("varied", varied, varied_paths, rng)
    files["varied"] += [x for x in files["train"] if "unknown" in x["image"]]
    rng.shuffle(files["varied"])
    files["text_all"] = described_samples("text-all", n_image // 3, known, rng, all_pairs=True)

    easy_vqa_text = json.loads((out / "easy_vqa/text.json").read_text(encoding="utf-8"))
    train_tokenizer(out / "tokenizer.model", files["text"] + files["text_all"] + easy_vqa_text)
    for name, samples in files.items():
        write_samples(out / f"{name}.json", samples)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/tiny"), help="folder to fill (default: %(default)s)")
    parser.add_argument("--images", type=int, default=60_000, metavar="N", help="training scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    args = parser.parse_args()
    with user_errors():
        prepare(args.out, args.images, args.seed)


if __name__ == "__main__":
    run(main)
