"""Which samples make up which batch: a pure function of the seed and the step.

Several sources are mixed by weight into one endless sequence of samples. It is computed, never stored:

    position --pattern--> source, and how many of its samples came before
             --permute--> (epoch, index in the source)
    step s: positions s * batch_size ... --BatchSampler--> micro-batches of similar length, assigned to ranks
                                         --load_batches--> Batch

So a run that was killed at any moment continues with the same samples in the same micro-batches, on any number of
processes.
"""

import atexit
import functools
import hashlib
import heapq
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.conversations import Batch, Conversations, Sample, Skipped, collate

BLOCK = 10_000  # samples after which the pattern of sources repeats
N_ROUND = 6
MASK = 2**64 - 1

Key = tuple[int, int, int]  # a sample of a mixture: its own seed, source, index in the source


def derive_seed(*numbers: int) -> int:
    """A pseudo-random integer of 62 bits, computed from other integers of any size and sign."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 2


@functools.lru_cache(maxsize=256)
def round_keys(seed: int) -> tuple[int, ...]:
    return tuple(derive_seed(seed, i) for i in range(N_ROUND))


def permute(position: int, n: int, seed: int) -> int:
    """Maps a position through a pseudo-random permutation of range(n), in constant time and memory.

    It is a Feistel network: the position is written as two digits (a, b) to the base `side`, and each round maps them
    to (b, a + hash(b)). A round is invertible whatever the hash is, because b is kept. The digits cover slightly more
    than n numbers; a result of n or more goes through the network again, which keeps the map one to one.
    """
    # The smallest side that covers n, but even (an odd one gives only even permutations) and at least 4.
    side = max(4, math.isqrt(n - 1) + 2) & ~1
    keys = round_keys(seed)
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
    """Parses "llava.json:2" into path and weight; "llava.json" has weight 1. Raises ValueError.

    A path may contain colons; one that ends in a colon and a number needs an explicit weight.
    """
    path, colon, tail = text.rpartition(":")
    try:
        weight = float(tail) if colon else 1.0
    except ValueError:
        weight = 1.0
    else:
        text = path if colon else text
    if not text or not 0 < weight < math.inf:
        raise ValueError(f"a source is PATH or PATH:WEIGHT with a weight above 0, not {text}:{weight}")
    return text, weight


class Mixture(Dataset):
    """Sources of samples, mixed by weight into one endless sequence.

    weights: relative frequencies of the sources, whatever their lengths. Each BLOCK of samples has every source's
    share, rounded to whole samples, evenly spaced. Within a source, epoch follows epoch, each in its own order.
    An item is requested by a Key. Raises ValueError if a weight is too small for one sample per BLOCK.
    """

    def __init__(self, sources: list[Conversations], weights: list[float]):
        assert len(sources) == len(weights) > 0
        self.sources = sources

        # Samples of each source per block; what rounding down leaves over goes to the largest remainders.
        total = sum(map(Fraction, weights))
        exact = [Fraction(weight) * BLOCK / total for weight in weights]
        self.n_slot = [int(share) for share in exact]
        by_remainder = sorted(range(len(sources)), key=lambda i: self.n_slot[i] - exact[i])
        for i in by_remainder[: BLOCK - sum(self.n_slot)]:
            self.n_slot[i] += 1
        if 0 in self.n_slot:
            path = sources[self.n_slot.index(0)].path
            raise ValueError(f"the weight of {path} is less than one in {BLOCK:,} of all weights together")

        # The slots of each source are evenly spaced; on a tie the first source goes first.
        slots = sorted(((k + 0.5) / n, i) for i, n in enumerate(self.n_slot) for k in range(n))
        self.pattern = [i for _, i in slots]  # slot -> source
        self.n_before = []  # slot -> earlier slots of the same source in the block
        count = [0] * len(sources)
        for i in self.pattern:
            self.n_before.append(count[i])
            count[i] += 1

    def key(self, position: int, seed: int) -> Key:
        """The key of the sample at a position of the endless sequence."""
        block, slot = divmod(position, BLOCK)
        source = self.pattern[slot]
        n = len(self.sources[source])
        epoch, i = divmod(block * self.n_slot[source] + self.n_before[slot], n)
        return derive_seed(seed, position), source, permute(i, n, derive_seed(seed, source, epoch))

    def __getitem__(self, key: Key) -> Sample | Skipped:
        seed, source, index = key
        return self.sources[source][seed, index]

    def approx_length(self, key: Key) -> int:
        """Estimated positions of a sample (Conversations.approx_length)."""
        _, source, index = key
        return self.sources[source].approx_length(index)


@dataclass(kw_only=True)
class BatchSampler:
    """Yields the micro-batches of one rank as lists of keys, for a DataLoader.

    Step s takes positions s * batch_size to (s + 1) * batch_size - 1 of the mixture, whatever the number of ranks.
    They are grouped into micro-batches of similar total length, which are sorted from the longest to the shortest
    and assigned to ranks back and forth: 0 1 2 2 1 0 0 1 2 ... Ranks wait for each other, so those computed at the
    same time should be similar, and so should each rank's total.
    batch_size must be a multiple of micro_batch_size * world_size.
    """

    data: Mixture
    steps: range
    seed: int
    batch_size: int  # samples per step on all ranks
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def micro_batches(self, step: int) -> list[list[Key]]:
        """The micro-batches of a step on all ranks, from the longest to the shortest."""
        first = step * self.batch_size
        keys = [self.data.key(position, self.seed) for position in range(first, first + self.batch_size)]
        lengths = [self.data.approx_length(key) for key in keys]

        # Greedy: each sample, the longest first, joins the shortest micro-batch that is not full.
        members: list[list[int]] = [[] for _ in range(self.batch_size // self.micro_batch_size)]
        shortest = [(0, m) for m in range(len(members))]  # heap of (total length, number) of those not full
        full = []
        for i in sorted(range(len(keys)), key=lambda i: -lengths[i]):  # stable: ties stay in order
            total, m = heapq.heappop(shortest)
            members[m].append(i)
            if len(members[m]) < self.micro_batch_size:
                heapq.heappush(shortest, (total + lengths[i], m))
            else:
                full.append((-total - lengths[i], m))
        return [[keys[i] for i in sorted(members[m])] for _, m in sorted(full)]

    def __iter__(self) -> Iterator[list[Key]]:
        # A thread groups the next step's samples, which takes 0.2 s for 8,192 of them, while a GPU computes this step.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.micro_batches, self.steps.start)
            for step in self.steps:
                micro_batches, ahead = ahead.result(), pool.submit(self.micro_batches, step + 1)
                for i, keys in enumerate(micro_batches):
                    turn, rank = divmod(i, self.world_size)
                    if turn % 2 == 1:
                        rank = self.world_size - 1 - rank
                    if rank == self.rank:
                        yield keys


def load_batches(
    data: Mixture,
    sampler: BatchSampler | list,
    *,
    n_worker: int,
    pin_memory: bool,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """Loads the sampler's batches in its order, in n_worker processes (0: in this one).

    on_wait is called every second while a batch is awaited, and may raise. Raises OSError if a batch does not fit the
    shared memory, through which workers send them.
    """
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=n_worker,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
        timeout=min(n_worker, 1),
    )
    batches = iter(loader)  # starts the workers
    atexit.register(_kill_workers)
    Finalize(None, _kill_workers, exitpriority=10)  # a process that multiprocessing started ends without atexit
    return _receive(batches, on_wait)


def _receive(batches: Iterator[Batch | Exception], on_wait: Callable[[], None]) -> Iterator[Batch]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            try:
                on_wait()
            except BaseException:
                _kill_workers()  # torch would wait 5 s for each of them
                raise
            continue
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _prepare_worker(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a run; the current step still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Python prints the error of a thread that sends, and drops what it sent: the batch would be awaited for ever.
    Queue._on_queue_feeder_error = _send_error


def _send_error(queue: Queue, error: Exception, item: tuple[int, Batch]) -> None:
    """Sends an error in place of an item of a worker's queue: a batch and its number."""
    if "shared memory" in str(error):
        size = sum(x.nbytes for x in vars(item[1]).values() if isinstance(x, Tensor)) / 1e6
        free = shutil.disk_usage("/dev/shm").free / 1e6 if os.path.isdir("/dev/shm") else 0
        reason = f"a batch of {size:,.0f} MB does not fit into /dev/shm, through which workers send it and which has "
        error = OSError(f"{reason}{free:,.0f} MB left: enlarge it (docker run --shm-size=8g), or give --workers 0")
    queue.put((item[0], error))


def _kill_workers() -> None:
    """Python would end workers by SIGTERM, which they ignore, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is killed
    for process in multiprocessing.active_children():
        process.kill()
