"""Which samples make up which batch: a function of the seed and the position, in exact proportions, balanced."""

import json
import math
import multiprocessing
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import GOLDEN, write_tar
from data.conversations import Conversations, Sample, SampleSpec, Skipped, collate
from data.mix import BLOCK, BatchSampler, Mixture, derive_seed, load_batches, parse_mix, permute
from data.text import Tokenizer
from training.monitor import Monitor

SEEDS = (0, 1, -1, 20240101, 2**33, 2**33 + 1, -(2**70))
STEP_7 = [  # of rank 1 of 2
    [(1421493602947547409, 0, 620), (3285744416725285048, 0, 948), (2568981982393149283, 1, 25)],
    [(2773268030507416473, 1, 5), (2979706834276018250, 0, 707), (2084223866418212118, 0, 515)],
]


class Lengths:
    """A source with lengths only. Its samples are the requests for them."""

    def __init__(self, lengths: list[int], path: str = "lengths.json"):
        self.lengths = lengths
        self.path = path

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        return self.path, *key

    def approx_length(self, index: int) -> int:
        return self.lengths[index]


def mixture(*sizes: int, weights: list[float] | None = None) -> Mixture:
    """Sources with these numbers of samples, of different lengths."""
    sources = [Lengths([1 + i * i % 37 for i in range(n)], f"{k}.json") for k, n in enumerate(sizes)]
    return Mixture(sources, weights or [1.0] * len(sources))


def sampler(data, steps: range, batch: int = 16, micro: int = 2, **options: int) -> BatchSampler:
    return BatchSampler(data=data, steps=steps, batch_size=batch, micro_batch_size=micro, **{"seed": 0, **options})


# --- permutations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_permutation_is_one_to_one(seed):
    for n in [*range(1, 40), 63, 64, 65, 99, 100, 101, 1000, 1024]:
        assert sorted(permute(i, n, seed) for i in range(n)) == list(range(n))


def test_seeds_give_different_permutations():
    seeds = {*SEEDS, *range(200)}
    assert len({tuple(permute(i, 50, seed) for i in range(50)) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_permutations_are_equally_likely(n):
    """Chi squared over all n!: within 4.5 standard deviations."""
    counts = Counter(tuple(permute(i, n, seed) for i in range(n)) for seed in range(100 * math.factorial(n)))
    freedom = math.factorial(n) - 1
    assert len(counts) == freedom + 1
    chi = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi < freedom + 4.5 * math.sqrt(2 * freedom)


def test_neighbors_in_a_large_permutation_are_independent():
    """Values, differences of neighbors, last digits, and the values of one position over seeds are uniform."""
    n, n_bin = 400_000_000, 20
    values = np.array([permute(i, n, 3) for i in range(10_000)])
    over_seeds = np.array([permute(5, n, seed) for seed in range(2000)])
    differences = np.diff(values) % n
    for numbers in (values // (n // n_bin), differences // (n // n_bin), values % n_bin, over_seeds // (n // n_bin)):
        counts = np.bincount(numbers, minlength=n_bin)
        expected = len(numbers) / n_bin
        assert ((counts - expected) ** 2 / expected).sum() < n_bin + 5 * math.sqrt(2 * n_bin)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(len(values))


@pytest.mark.parametrize(
    "text, path, weight",
    [
        ("llava.json", "llava.json", 1.0),
        ("laion/[0-9]*.tar:0.25", "laion/[0-9]*.tar", 0.25),
        ("a:b/c.json", "a:b/c.json", 1.0),
        ("a:3:1e-2", "a:3", 0.01),
        ("c.json:", "c.json:", 1.0),
    ],
)
def test_a_source_is_a_path_and_a_weight(text, path, weight):
    assert parse_mix(text) == (path, weight)


@pytest.mark.parametrize("text", ["a.json:0", "a.json:-1", "a.json:nan", "a.json:inf", "a.json:1e999", "", ":1"])
def test_wrong_weights(text):
    with pytest.raises(ValueError, match="PATH:WEIGHT"):
        parse_mix(text)


def test_extreme_weights():
    with pytest.raises(ValueError, match="1.json"):
        mixture(1, 1, weights=[1.0, 1e-6])
    assert mixture(1, 1, weights=[1e308, 1e308]).n_slot == [5000, 5000]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 5.0, 2.7, 0.01], [1.0, 9998.0, 1.0]])
def test_every_block_has_the_weights_exactly(weights):
    """To the nearest whole sample in each block; and to a few samples in any stretch."""
    data = mixture(*[100] * len(weights), weights=weights)
    sources = [data.key(position, 0)[1] for position in range(2 * BLOCK)]
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        before = np.cumsum([0] + [i == source for i in sources])
        for block in (0, 1):
            assert abs(before[(block + 1) * BLOCK] - before[block * BLOCK] - share * BLOCK) < 1
        assert np.abs(before - np.arange(len(before)) * share).max() < 3


def test_the_rest_goes_to_the_largest_remainders():
    assert mixture(1, 1, 1, weights=[4.0, 2.0, 1.0]).n_slot == [5714, 2857, 1429]  # 5714.29, 2857.14, 1428.57
    assert mixture(1, 1, 1).n_slot == [3334, 3333, 3333]
    data = mixture(5, 7)
    assert [data.key(position, 0)[1] for position in range(8)] == [0, 1] * 4


@pytest.mark.parametrize(
    "sizes, weights, seed",
    [([12], [1.0], 0), ([1], [1.0], -1), ([7, 30, 1], [2.0, 3.0, 0.5], 2**33), ([4567], [1.0], 0)],
)
def test_each_source_yields_all_its_samples_once_an_epoch(sizes, weights, seed):
    """Across blocks as well; epochs differ; no two samples have the same seed."""
    data = mixture(*sizes, weights=weights)
    keys = [data.key(position, seed) for position in range(11_000)]
    for source, n in enumerate(sizes):
        indices = [index for _, i, index in keys if i == source]
        epochs = [indices[start : start + n] for start in range(0, len(indices) - n + 1, n)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        if n >= 12:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    seeds = {own for own, _, _ in keys}
    assert len(seeds) == len(keys) and all(0 <= own < 2**62 for own in seeds)


def test_sources_of_one_length_have_different_orders():
    data = mixture(20, 20)
    keys = [data.key(position, 0) for position in range(40)]
    first, second = ([index for _, i, index in keys if i == source] for source in (0, 1))
    assert first != second


def test_keys_stay_as_they_are():
    """A run that began on another machine, or before an update, has to continue with the same samples."""
    data = mixture(1000, 50, weights=[3.0, 1.0])
    assert derive_seed(0, -1) == 1782708310608008020
    assert [permute(i, 1000, 0) for i in range(5)] == [770, 165, 960, 133, 938]
    assert [data.key(position, 1) for position in (123_456_789, 0, 1)] == [
        (153352925252741130, 0, 354),
        (3441493077921728212, 0, 980),
        (475726782986624371, 0, 469),
    ]
    assert list(sampler(data, range(7, 8), 12, 3, seed=1, rank=1, world_size=2)) == STEP_7


# --- micro-batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 4, 16])
def test_a_step_takes_the_next_samples_whatever_the_micro_batch(micro):
    """The micro-batches of a step go from the longest to the shortest, each in the order of positions."""
    data = mixture(11, 50, weights=[2.0, 1.0])
    for step in range(3, 8):
        micro_batches = sampler(data, range(1), micro=micro, seed=3).micro_batches(step)
        keys = [data.key(position, 3) for position in range(16 * step, 16 * step + 16)]
        assert all(len(batch) == micro for batch in micro_batches)
        assert sorted(key for batch in micro_batches for key in batch) == sorted(keys)
        assert all(batch == sorted(batch, key=keys.index) for batch in micro_batches)
        lengths = [sum(map(data.approx_length, batch)) for batch in micro_batches]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("world_size, ranks", [(1, "000000000000"), (3, "012210012210"), (4, "012332100123")])
def test_ranks_take_micro_batches_back_and_forth(world_size, ranks):
    data = mixture(300)
    expected = [[] for _ in range(world_size)]
    for step in range(2, 5):
        for rank, batch in zip(map(int, ranks), sampler(data, range(1), 24).micro_batches(step), strict=True):
            expected[rank].append(batch)
    for rank in range(world_size):
        assert list(sampler(data, range(2, 5), 24, rank=rank, world_size=world_size)) == expected[rank]


def test_any_start_continues_the_same_sequence():
    data = mixture(10, 3)
    whole = list(sampler(data, range(9), 8, 2, world_size=2))
    for start in range(9):
        assert list(sampler(data, range(start, 9), 8, 2, world_size=2)) == whole[start * 2 :]


@pytest.mark.parametrize("micro, in_turn_bound, bound", [(4, 0.64, 0.95), (8, 0.71, 0.985)])
def test_ranks_have_similar_lengths(micro, in_turn_bound, bound):
    """The mean time of 8 ranks over the slowest one's, with micro-batches in the order of positions and as sampled.

    Lengths as in instruction data: median 200 of text, and in 70 % of the samples an image of 65.
    The bounds are a little above what is measured in order, and a little below what is measured as sampled.
    """
    rng = np.random.default_rng(0)
    text = np.exp(rng.normal(np.log(200), 0.8, 20_000))
    lengths = np.clip(text + 65 * (rng.random(20_000) < 0.7), 1, 2048).astype(int).tolist()
    data = Mixture([Lengths(lengths)], [1.0])
    batches = [batch for step in range(40) for batch in sampler(data, range(1), 256, micro).micro_batches(step)]
    sampled = np.array([sum(map(data.approx_length, batch)) for batch in batches]).reshape(-1, 8)
    in_order = np.array([data.approx_length(data.key(position, 0)) for position in range(256 * 40)])
    in_order = in_order.reshape(-1, 8, micro).sum(2)
    assert sampled.sum() == in_order.sum()
    in_turn_balance, balance = ((total.mean(1) / total.max(1)).mean() for total in (in_order, sampled))
    assert in_turn_balance < in_turn_bound and balance > bound


# --- batches from files and shards -------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Two sources with a missing and a broken image: a JSON file and two shards."""
    noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    first = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "noise"}]
    more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": i, "image": "noise.png", "conversations": first + more * (i % 3)} for i in range(5)]
    rows[2]["image"] = "gone.png"
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    photo = (tmp_path / "noise.png").read_bytes()
    captions = json.dumps({"caption": ["word " * k for k in (1, 4, 9)]}).encode()
    for name, photos in (("0.tar", [photo] * 3), ("1.tar", [photo, photo, b"broken"])):
        pairs = [((f"{i}.png", content), (f"{i}.json", captions)) for i, content in enumerate(photos)]
        write_tar(tmp_path / name, [member for pair in pairs for member in pair])
    spec = SampleSpec(Tokenizer(GOLDEN / "text"), "owl2", 4, 28, 200, "stretch", crop_scale=0.3)
    return Mixture([Conversations(tmp_path / name, spec) for name in ("talk.json", "*.tar")], [1.0, 2.0])


def test_crops_and_captions_differ_between_epochs_and_are_reproducible(data):
    by_row: dict[tuple[int, int], list[Sample]] = {}
    skipped = set()
    for key in [key for batch in sampler(data, range(10), 8, 4) for key in batch]:
        sample, again = data[key], data[key]
        if isinstance(sample, Skipped):
            assert again == sample
            skipped.add((key[1:], sample.reason.split(": ")[0].rpartition("/")[2]))
            continue
        assert again.ids == sample.ids and again.images.equal(sample.images)
        by_row.setdefault(key[1:], []).append(sample)
    assert skipped == {((0, 2), "talk.json, row 2 (id 2)"), ((1, 5), "1.tar, sample 2")}
    assert len(by_row) == 5 + 6 - 2
    for (source, _), samples in by_row.items():
        assert len(samples) >= 4
        assert not any(a.images.equal(b.images) for a, b in zip(samples, samples[1:]))
        if source == 1:
            assert len({len(sample.ids) for sample in samples}) > 1


def test_worker_processes_give_the_same_batches(data):
    batches = sampler(data, range(5), 8, 4)
    expected = [collate([data[key] for key in keys]) for keys in batches]
    assert len(expected) == 10 and sum(len(batch.skipped) for batch in expected) > 0
    for n_worker in (0, 2):
        loaded = load_batches(data, batches, n_worker=n_worker, pin_memory=False)
        for a, b in zip(loaded, expected, strict=True):
            for name, value in vars(b).items():
                assert getattr(a, name).equal(value) if torch.is_tensor(value) else getattr(a, name) == value


class Stuck:
    """Samples that take a minute to load, as from a dead network drive."""

    def __getitem__(self, key: int) -> None:
        time.sleep(60)


class Unsendable:
    """A batch that cannot be sent from a worker, with torch's error if shared memory is full."""

    def __reduce__(self) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")


def test_waiting_for_a_batch_can_be_ended():
    def stop() -> None:
        raise InterruptedError

    batches = load_batches(Stuck(), [[0]], n_worker=1, pin_memory=False, on_wait=stop)
    with pytest.raises(InterruptedError):
        next(batches)


def test_full_shared_memory_is_an_error_that_names_it(monkeypatch, data):
    monkeypatch.setattr("data.mix.collate", lambda samples: Unsendable())
    with pytest.raises(OSError, match="/dev/shm.*--workers"):
        next(load_batches(data, [[(0, 0, 0)]], n_worker=1, pin_memory=False))


def load_one(folder: Path) -> None:
    worker = load_batches(Stuck(), [[0]], n_worker=1, pin_memory=False)  # noqa: F841
    (folder / "pid").write_text(str(multiprocessing.active_children()[0].pid))


def test_a_process_of_multiprocessing_ends_its_workers(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=load_one, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_signal_ends_a_step_only_if_its_batch_does_not_come():
    messages = []
    now = time.monotonic()
    for signals, since, is_ended in (([], now - 60, False), ([15], now, False), ([15], now - 60, True)):
        monitor = SimpleNamespace(signals=signals, signal_time=since, print_status=messages.append)
        with pytest.raises(SystemExit, match="143") if is_ended else nullcontext():
            Monitor.on_wait(monitor)
    assert len(messages) == 1
