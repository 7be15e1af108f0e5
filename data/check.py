"""Goes over a data file before a long run: what is in it, what cannot be used, what the model will learn from."""

from collections import Counter

from tqdm import tqdm

from data.conversations import Conversations, Sample, Skipped
from data.text import Tokenizer
from model import IGNORE, IMAGE_ID


def check(data: Conversations, n_show: int = 3) -> int:
    """Prints a report on every row and shows a few samples; returns the number of rows that cannot be used."""
    skipped: list[Skipped] = []
    lengths: list[int] = []
    shown: list[Sample] = []
    n_image = 0
    n_text_only = 0
    n_cut = 0
    n_supervised = 0
    for index in tqdm(range(len(data)), desc="checking", unit="row", disable=None):
        sample = data[0, index]
        if isinstance(sample, Skipped):
            skipped.append(sample)
            continue
        if len(shown) < n_show:
            shown.append(sample)
        lengths.append(len(sample.ids))
        n_image += len(sample.images)
        n_text_only += len(sample.images) == 0
        n_cut += sample.n_cut > 0
        n_supervised += sum(label != IGNORE for label in sample.labels)
    for sample in shown:
        print(marked(sample, data.tokenizer), end="\n\n")
    print(f"{len(data)} rows: {len(lengths)} usable ({n_text_only} text only), {len(skipped)} not")
    if lengths:
        lengths.sort()
        print(f"{n_image} images; {n_supervised} supervised tokens of {sum(lengths)} positions")
        print(f"positions: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, limit {data.max_length}")
        print(f"{n_cut} samples lose turns at the end to the limit")
    for kind, number in Counter(sample.kind for sample in skipped).most_common():
        print(f"  {number} x {kind}, e.g.")
        for example in [sample for sample in skipped if sample.kind == kind][:5]:
            print(f"    {example.reason}")
    return len(skipped)


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
