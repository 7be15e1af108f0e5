"""Which samples make up which batch: a pure function of the seed and the position.

Several sources are mixed by weight into one endless row of samples, of which nothing is ever held:

    position --key--> block of 10,000 slots, slot --pattern--> source, how many of it came before
                                                   --shuffled--> (epoch of the source,) index in it

    step s: positions s * per_step ... --Order--> micro-batches of about equal size, dealt to the ranks
                                          --loader--> Batch

So a run that was killed at any moment goes on as if it had not been, on any number of processes: step s has the same
samples, in the same micro-batches.
"""

import atexit
import functools
import hashlib
import heapq
import math
import multiprocessing
import signal
from collections.abc import Iterator
from fractions import Fraction

from torch.utils.data import DataLoader, Dataset

from data.conversations import Batch, Conversations, Sample, Skipped, collate

BLOCK = 10_000  # slots of the pattern in which the sources take turns
N_ROUND = 6
MASK = 2**64 - 1


def chance(*numbers: int) -> int:
    """A number of 62 bits that follows from other integers, of any size and sign, and looks like chance."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 2


@functools.lru_cache(maxsize=256)
def _round_keys(seed: int) -> tuple[int, ...]:
    return tuple(chance(seed, i) for i in range(N_ROUND))


def shuffled(position: int, n: int, seed: int) -> int:
    """Where a pseudo-random permutation of range(n) takes a position: a shuffle of which no list is ever made.

    It is a Feistel network. The position is written as two digits (a, b) to the base `side`, and a round takes them
    to (b, a + hash(b)): one to one, whatever the hash, since b is still there to undo it. After a few rounds little is
    left of the order. The digits count somewhat further than n: what lands there is sent through once more, until it
    is back below n, which is one to one again.
    """
    # The least that will do, but even (else half of all permutations, the odd ones, never come), and not tiny.
    side = max(4, math.isqrt(n - 1) + 2) & ~1
    keys = _round_keys(seed)
    while True:
        a, b = divmod(position, side)
        for key in keys:
            x = (b + key) * 0x9E3779B97F4A7C15 & MASK
            x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & MASK
            a, b = b, (a + (x >> 32)) % side
        position = a * side + b
        if position < n:
            return position


def parse_mix(text: str) -> tuple[str, float]:
    """A source as the command line names it: "llava.json:2" is its path and its weight, "llava.json" has weight 1.

    A path may hold colons; one that ends in a colon and a number needs its weight written out. Raises ValueError.
    """
    path, colon, tail = text.rpartition(":")
    try:
        weight = float(tail) if colon else 1.0
    except ValueError:
        weight = 1.0
    else:
        text = path if colon else text
    if not text:
        raise ValueError("a source of data is PATH or PATH:WEIGHT, and the path is missing")
    if not 0 < weight < math.inf:
        raise ValueError(f"the weight of {text} must be a number above 0, not {weight}")
    return text, weight


class Mixture(Dataset):
    """Sources of samples, and how they are mixed into one endless row.

    weights: how often samples of each source come, relative to the others', whatever the sources' lengths. Of any
    BLOCK samples from one that is a multiple of BLOCK, each source has its share to the nearest whole; and its own
    come evenly in between. Within a source, epoch follows epoch, each shuffled anew.
    An item is asked for by a key, which says all of it: (seed of the sample's own chances, source, index).
    Raises ValueError for weights that make no mixture.
    """

    def __init__(self, sources: list[Conversations], weights: list[float]):
        if not sources or len(sources) != len(weights):
            raise ValueError(f"a mixture has a weight for each source, not {len(weights)} for {len(sources)}")
        for source, weight in zip(sources, weights):
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {source.path} must be a number above 0, not {weight}")
        self.sources = sources
        total = sum(map(Fraction, weights))
        exact = [Fraction(weight) * BLOCK / total for weight in weights]
        self.slots = [int(share) for share in exact]  # of each source in a block
        by_remainder = sorted(range(len(sources)), key=lambda i: self.slots[i] - exact[i])
        for i in by_remainder[: BLOCK - sum(self.slots)]:
            self.slots[i] += 1
        for source, n_slot in zip(sources, self.slots):
            if n_slot == 0:
                raise ValueError(f"the weight of {source.path} is less than one in {BLOCK:,} of all weights together")
        # Each source's slots at even distances; where two fall together, the first source goes first.
        places = sorted(((k + 0.5) / n_slot, i) for i, n_slot in enumerate(self.slots) for k in range(n_slot))
        self.pattern = [i for _, i in places]  # slot -> source
        self.before = []  # slot -> slots of that source that came before it in the block
        seen = [0] * len(sources)
        for i in self.pattern:
            self.before.append(seen[i])
            seen[i] += 1

    def key(self, position: int, seed: int) -> tuple[int, int, int]:
        """The key of the sample that stands at a position of the endless row."""
        block, slot = divmod(position, BLOCK)
        source = self.pattern[slot]
        n = len(self.sources[source])
        epoch, place = divmod(block * self.slots[source] + self.before[slot], n)
        return chance(seed, position), source, shuffled(place, n, chance(seed, source, epoch))

    def __getitem__(self, key: tuple[int, int, int]) -> Sample | Skipped:
        seed, source, index = key
        return self.sources[source][seed, index]

    def size(self, key: tuple[int, int, int]) -> int:
        """About the positions of a sample (Conversations.size)."""
        _, source, index = key
        return self.sources[source].size(index)


class Order:
    """Which samples make up which micro-batch of a rank, step by step.

    Step s takes positions s * per_step to (s + 1) * per_step - 1 of the mixture, whatever the number of processes.
    They are cut into groups of `micro` samples whose sizes together are about equal, the groups stand from the
    heaviest to the lightest, and the ranks take them in turn, forth and back: 0 1 2 2 1 0 0 1 2 ... So the ranks, who
    wait for one another, compute groups that are the most alike at the same time, and about as much in all; and the
    step's groups are the same on any number of ranks.
    per_step must be a multiple of micro * world.
    """

    def __init__(self, data: Mixture, seed: int, per_step: int, micro: int, rank: int, world: int, steps: range):
        self.data = data
        self.seed = seed
        self.per_step = per_step
        self.micro = micro
        self.rank = rank
        self.world = world
        self.steps = steps

    def groups(self, step: int) -> list[list[tuple[int, int, int]]]:
        """The micro-batches of a step on all ranks together, as keys, from the heaviest to the lightest."""
        first = step * self.per_step
        keys = [self.data.key(position, self.seed) for position in range(first, first + self.per_step)]
        sizes = [self.data.size(key) for key in keys]
        members: list[list[int]] = [[] for _ in range(self.per_step // self.micro)]
        lightest = [(0, g) for g in range(len(members))]  # a heap of the groups that have room, by weight
        full = []
        for i in sorted(range(len(keys)), key=lambda i: -sizes[i]):  # the longest first; sorting keeps ties in order
            weight, g = heapq.heappop(lightest)
            members[g].append(i)
            place = (weight + sizes[i], g)
            if len(members[g]) < self.micro:
                heapq.heappush(lightest, place)
            else:
                full.append(place)
        heaviest = sorted(full, key=lambda place: (-place[0], place[1]))
        return [[keys[i] for i in sorted(members[g])] for _, g in heaviest]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yields this rank's micro-batches as lists of keys, each in the order of their positions."""
        for step in self.steps:
            groups = self.groups(step)
            for first in range(0, len(groups), 2 * self.world):
                forth, back = groups[first : first + self.world], groups[first + self.world : first + 2 * self.world]
                yield forth[self.rank]
                if back:
                    yield back[-1 - self.rank]


def loader(data: Mixture, order: Order | list, n_worker: int, pin: bool) -> Iterator[Batch]:
    """Batches in the given order, made ready by n_worker processes beside this one (0: by this one)."""
    batches = iter(
        DataLoader(
            data,
            batch_sampler=order,
            num_workers=n_worker,
            collate_fn=collate,
            pin_memory=pin,
            worker_init_fn=_ignore_signals,
        )
    )
    atexit.register(_end_workers)
    return batches


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a run; the step under way still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """After an error they are still there when Python ends; it would ask them by SIGTERM to end, and wait."""
    for process in multiprocessing.active_children():
        process.kill()
