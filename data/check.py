"""Goes over the data before a long run: what is in it, what cannot be used, what the model will learn from."""

from collections import Counter

from tqdm import tqdm

from data.conversations import Conversations, Sample, Skipped
from data.mix import Mixture
from data.text import Tokenizer
from model import IGNORE, IMAGE_ID


def check(data: Mixture, n_show: int = 3) -> int:
    """Prints a report on every row of every source, and shows a few samples of each.

    Returns the number of rows that cannot be used, and of shards that cannot be read to their end.
    """
    n_unusable = 0
    for source, n_slot in zip(data.sources, data.slots):
        if len(data.sources) > 1:
            print(f"{source.path}: {n_slot / sum(data.slots):.2%} of the samples")
        n_unusable += check_source(source, n_show)
    return n_unusable


def check_source(data: Conversations, n_show: int) -> int:
    """The report on one source. What is kept is counts, since there may be very many rows."""
    skipped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    lengths: Counter[int] = Counter()
    shown: list[Sample] = []
    n_image = 0
    n_text_only = 0
    n_cut = 0
    n_supervised = 0
    for index in tqdm(range(len(data)), desc="checking", unit="row", disable=None):
        sample = data[0, index]
        if isinstance(sample, Skipped):
            skipped[sample.kind] += 1
            if skipped[sample.kind] <= 5:
                examples.setdefault(sample.kind, []).append(sample.reason)
            continue
        if len(shown) < n_show:
            shown.append(sample)
        lengths[len(sample.ids)] += 1
        n_image += len(sample.images)
        n_text_only += len(sample.images) == 0
        n_cut += sample.n_cut > 0
        n_supervised += sum(label != IGNORE for label in sample.labels[1:])  # nothing foresees the first
    for sample in shown:
        print(marked(sample, data.tokenizer), end="\n\n")
    n_usable = lengths.total()
    print(f"{len(data)} rows: {n_usable} usable ({n_text_only} text only), {skipped.total()} not")
    if n_usable:
        n_position = sum(length * number for length, number in lengths.items())
        print(f"{n_image} images; {n_supervised} supervised tokens of {n_position} positions")
        print(f"positions: median {median(lengths)}, longest {max(lengths)}, limit {data.max_length}")
        print(f"{n_cut} samples lose turns at the end to the limit")
    for kind, number in skipped.most_common():
        print(f"  {number} x {kind}, e.g.")
        for reason in examples[kind]:
            print(f"    {reason}")
    if data.broken:
        print(f"  {len(data.broken)} shards cannot be read to their end")
        for reason in data.broken:
            print(f"    {reason}")
    return skipped.total() + len(data.broken)


def median(counts: Counter[int]) -> int:
    """The middle of all counted numbers; of two middles, the greater."""
    n_seen = 0
    for number in sorted(counts):
        n_seen += counts[number]
        if n_seen > counts.total() // 2:
            return number
    raise ValueError("nothing was counted")


def marked(sample: Sample, tokenizer: Tokenizer) -> str:
    """A sample's text, with what is supervised in [[brackets]]."""
    text = ""
    run: list[int] = []
    supervised = False
    n_image = 0
    for token, label in zip([*sample.ids, IMAGE_ID], [*sample.labels, IGNORE]):
        if token == IMAGE_ID or (label != IGNORE) != supervised:
            words = b"".join(_piece(i, tokenizer) for i in run).decode(errors="replace")
            if words:
                text += f"[[{words}]]" if supervised else words
            run = []
            supervised = label != IGNORE
        if token == IMAGE_ID:
            n_image += 1
        else:
            if n_image:
                text += f"<image: {n_image} positions>"
                n_image = 0
            run.append(token)
    return text


def _piece(token: int, tokenizer: Tokenizer) -> bytes:
    """A token as it is read; a character that is in no piece is spelt in bytes."""
    piece = tokenizer.pieces.id_to_piece(token)
    if tokenizer.pieces.is_byte(token):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace("▁", " ").encode()
