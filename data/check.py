"""Checks data before a long run: what it contains, which rows cannot be used, and which tokens are supervised.

    python -m data.check --data llava.json --weights checkpoints/mplug-owl2
    python -m data.check --data 'laion/*.tar' --tokenizer checkpoints/tiny-owl2 --variant owl2

Reads every row as training does, shows a few samples with the supervised text in [[brackets]], and counts the skipped
rows by kind. Exit code: 0 if all rows are usable, 1 if some are not, 2 for a wrong flag or an unreadable file.
train_stage1.py and train_stage2.py do the same with --check, for their own flags.
"""

import argparse
import statistics
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":
    import command  # noqa: F401  reports missing packages before they are imported

from tqdm import tqdm

from data.conversations import Conversations, Sample, SampleSpec, Skipped, count_supervised
from data.image import DEFAULT_FIT, FITS
from data.mix import Mixture
from data.text import Tokenizer
from common.files import printable, read_json, reading
from model import IGNORE_INDEX, IMAGE_TOKEN_ID
from weights import config_from_hf

N_EXAMPLE = 5  # reasons that are shown for each kind of skipped row


def check(data: Mixture, n_show: int = 3) -> int:
    """Prints a report on each source. Returns how many rows and shards cannot be used."""
    n_unusable = 0
    for source, n_slot in zip(data.sources, data.n_slot):
        if len(data.sources) > 1:
            print(f"{printable(source.path)}: {n_slot / sum(data.n_slot):.2%} of the samples")
        n_unusable += check_source(source, n_show)
    return n_unusable


def check_source(data: Conversations, n_show: int) -> int:
    """Reports on one source. Keeps counts only, because there may be very many rows."""
    reasons: dict[str, list[str]] = {}  # kind: the first reasons
    skipped, lengths, count = Counter(), Counter(), Counter()
    for index in tqdm(range(len(data)), desc="checking", unit="row", disable=None):
        sample = data[0, index]
        if isinstance(sample, Skipped):
            skipped[sample.kind] += 1
            if skipped[sample.kind] <= N_EXAMPLE:
                reasons.setdefault(sample.kind, []).append(sample.reason)
            continue
        if count["shown"] < n_show:
            count["shown"] += 1
            tqdm.write(format_sample(sample, data.spec.tokenizer) + "\n")
        lengths[len(sample.ids)] += 1
        count["image"] += len(sample.images)
        count["text only"] += len(sample.images) == 0
        count["cut"] += sample.n_cut > 0
        count["supervised"] += count_supervised(sample.labels)

    print(f"{len(data)} rows: {lengths.total()} usable ({count['text only']} text only), {skipped.total()} not")
    if lengths:
        n_position = sum(length * n for length, n in lengths.items())
        median = statistics.median_high(lengths.elements())
        print(f"{count['image']} images; {count['supervised']} supervised tokens of {n_position} positions")
        print(f"positions: median {median}, longest {max(lengths)}, limit {data.spec.max_length}")
        print(f"{count['cut']} samples lose turns at the end to the limit")
    for kind, n in skipped.most_common():
        print(f"  {n} x {kind}, e.g.", *reasons[kind], sep="\n    ")
    if data.broken:
        print(f"  {len(data.broken)} shards cannot be read to their end", *data.broken, sep="\n    ")
    return skipped.total() + len(data.broken)


def format_sample(sample: Sample, tokenizer: Tokenizer) -> str:
    """The text of a sample, with what is supervised in [[brackets]]."""
    text = ""
    pairs = zip(sample.ids, sample.labels)
    for (is_image, is_supervised), run in groupby(pairs, lambda p: (p[0] == IMAGE_TOKEN_ID, p[1] != IGNORE_INDEX)):
        ids = [token for token, _ in run]
        part = f"<image: {len(ids)} positions>" if is_image else tokenizer.show(ids)
        part = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in part)
        text += f"[[{part}]]" if is_supervised else part
    return text


def main() -> None:
    from command import ArgumentParser, user_errors

    parser = ArgumentParser(prog="python -m data.check", description=__doc__)
    parser.add_argument("--data", required=True, metavar="SOURCE", help=".json, .jsonl, or tar shards ('laion/*.tar')")
    parser.add_argument("--weights", metavar="FOLDER", help="the model to train, or instead of it the next two:")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.model, tokenizer.json or its folder")
    parser.add_argument("--variant", choices=DEFAULT_FIT, help="format of the prompts and number of pixels")
    parser.add_argument("--image-root", metavar="FOLDER", help="folder of image paths (default: beside --data)")
    parser.add_argument("--merge-images", action="store_true", help="merge the conversations about the same image")
    parser.add_argument("--fit", choices=FITS, help="how images become square (default: owl1 stretch, owl2 square)")
    parser.add_argument("--max-length", type=int, default=2048, help="positions per sample (default: %(default)s)")
    parser.add_argument("--index", metavar="FOLDER", help="folder of the shards' index (default: beside the shards)")
    parser.add_argument("--workers", type=int, default=1, help="processes that build the index (default: %(default)s)")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="samples to show (default: %(default)s)")
    args = parser.parse_args()
    with user_errors():
        options = {"merge": args.merge_images, "index": args.index, "n_worker": args.workers}
        data = Conversations(args.data, spec_of(args), image_root=args.image_root, **options)
        n_unusable = check_source(data, args.show)
    sys.exit(1 if n_unusable else 0)


def spec_of(args: argparse.Namespace) -> SampleSpec:
    """What the model of --weights needs, or without it the released model of --variant."""
    if args.weights:
        path = Path(args.weights) / "config.json"
        hf = read_json(path)
        with reading(path):
            config = config_from_hf(hf)  # unlike read_config, this needs no weights
        tokenizer = Tokenizer(args.tokenizer or args.weights)
        return SampleSpec.for_model(config, tokenizer, max_length=args.max_length, fit=args.fit)
    if not args.tokenizer or not args.variant:
        raise ValueError("give --weights FOLDER, or --tokenizer PATH and --variant")
    image_size = {"owl1": 224, "owl2": 448}[args.variant]
    fit = args.fit or DEFAULT_FIT[args.variant]
    return SampleSpec(Tokenizer(args.tokenizer), args.variant, 65, image_size, args.max_length, fit)


if __name__ == "__main__":
    from command import run

    run(main)
