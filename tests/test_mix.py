"""Which samples make up which batch: of the seed and the position alone, in exact proportions, in even groups."""

import io
import json
import math
import random
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import GOLDEN
from data.conversations import Conversations, Sample, Skipped, collate
from data.mix import BLOCK, Mixture, Order, chance, loader, parse_mix, shuffled
from data.text import Tokenizer

SEEDS = (0, 1, -1, 20240101, 2**33, 2**33 + 1, -(2**70))


class Lengths:
    """A source of which only the lengths are known. Its samples say what they were asked for."""

    def __init__(self, sizes: list[int], path: str = "lengths.json"):
        self.sizes = sizes
        self.path = path

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        return self.path, *key

    def size(self, index: int) -> int:
        return self.sizes[index]


def mixture(*lengths: int, weights: list[float] | None = None) -> Mixture:
    """Sources of these numbers of samples, whose sizes differ."""
    sources = [Lengths([1 + i * i % 37 for i in range(n)], f"{k}.json") for k, n in enumerate(lengths)]
    return Mixture(sources, weights or [1.0] * len(sources))


# ----------------------------------------------------------------------------------------------------
# Shuffling without a list


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shuffle_takes_every_place_once(seed):
    for n in [*range(1, 40), 63, 64, 65, 99, 100, 101, 1000, 1024]:
        assert sorted(shuffled(i, n, seed) for i in range(n)) == list(range(n))


def test_seeds_give_different_shuffles_and_the_same_seed_the_same():
    orders = {tuple(shuffled(i, 50, seed) for i in range(50)) for seed in [*SEEDS, *range(2, 500)]}
    assert len(orders) == len(SEEDS) + 498
    assert [shuffled(i, 10**9, 7) for i in (0, 1, 10**9 - 1)] == [shuffled(i, 10**9, 7) for i in (0, 1, 10**9 - 1)]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_are_equally_likely(n):
    """Chi squared over all n! orders: within 4.5 standard deviations of what chance gives."""
    n_draw = 100 * math.factorial(n)
    counts = Counter(tuple(shuffled(i, n, seed) for i in range(n)) for seed in range(n_draw))
    freedom = math.factorial(n) - 1
    assert len(counts) == freedom + 1
    chi = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi < freedom + 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1000, 400_000_000])
def test_neighbours_of_a_large_shuffle_have_nothing_in_common(n):
    """Places, steps from one to the next, and last digits are spread evenly; so is where one place goes, over seeds."""
    n_draw = min(n, 20_000)
    places = np.array([shuffled(i, n, 3) for i in range(n_draw)])
    over_seeds = np.array([shuffled(5, n, seed) for seed in range(2000)])
    steps = np.diff(places) % n
    twentieth = n // 20
    spread = ((places // twentieth, 20), (steps // twentieth, 20), (places % 10, 10), (over_seeds // twentieth, 20))
    for numbers, n_bin in spread:
        counts = np.bincount(numbers, minlength=n_bin)
        expected = len(numbers) / n_bin
        assert ((counts - expected) ** 2 / expected).sum() < n_bin + 5 * math.sqrt(2 * n_bin)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 4 / math.sqrt(n_draw)


def test_a_place_of_400_million_is_found_at_once():
    """2 microseconds on one Xeon core; the bound leaves room for a busy machine."""
    positions = random.Random(0).choices(range(400_000_000), k=2000)
    start = time.perf_counter()
    for position in positions:
        shuffled(position, 400_000_000, 0)
    assert (time.perf_counter() - start) / len(positions) < 100e-6


# ----------------------------------------------------------------------------------------------------
# Sources and weights


@pytest.mark.parametrize(
    "text, path, weight",
    [
        ("llava.json", "llava.json", 1.0),
        ("llava.json:1", "llava.json", 1.0),
        ("laion/*.tar:4", "laion/*.tar", 4.0),
        ("laion/[0-9]*.tar:0.25", "laion/[0-9]*.tar", 0.25),
        ("a:b/c.json", "a:b/c.json", 1.0),
        ("a:b/c.json:2", "a:b/c.json", 2.0),
        ("a:3:1e-2", "a:3", 0.01),
        ("c.json:", "c.json:", 1.0),
    ],
)
def test_a_source_is_a_path_and_a_weight(text, path, weight):
    assert parse_mix(text) == (path, weight)


@pytest.mark.parametrize("text", ["a.json:0", "a.json:-1", "a.json:nan", "a.json:inf", "a.json:1e999", "", ":1"])
def test_weights_that_make_no_mixture_are_one_sentence(text):
    with pytest.raises(ValueError) as error:
        parse_mix(text)
    assert "\n" not in str(error.value)
    assert "a.json" in str(error.value) or "path is missing" in str(error.value)


def test_a_mixture_refuses_what_it_cannot_mix():
    a, b = Lengths([1], "a.json"), Lengths([1], "b.json")
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="b.json must be a number above 0"):
            Mixture([a, b], [1.0, weight])
    with pytest.raises(ValueError, match="b.json is less than one in 10,000"):
        Mixture([a, b], [1.0, 1e-6])
    with pytest.raises(ValueError, match="a weight for each source"):
        Mixture([a, b], [1.0])
    with pytest.raises(ValueError, match="a weight for each source"):
        Mixture([], [])
    assert Mixture([a, b], [1e308, 1e308]).slots == [5000, 5000]


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0], [1.0, 4.0], [1.0, 1.0, 1.0], [0.3, 5.0, 2.7, 0.01], [1.0, 9998.0, 1.0], [7.0] * 13]
)
def test_every_block_holds_the_weights_exactly(weights):
    """To the nearest whole slot, in each block; and any stretch of a row to a few."""
    data = mixture(*[100] * len(weights), weights=weights)
    row = [data.key(position, 0)[1] for position in range(2 * BLOCK)]
    for block in (row[:BLOCK], row[BLOCK:]):
        counts = Counter(block)
        for source, weight in enumerate(weights):
            assert abs(counts[source] - weight / sum(weights) * BLOCK) < 1
    for source, weight in enumerate(weights):
        before = np.cumsum([0] + [i == source for i in row])
        ideal = np.arange(len(before)) * weight / sum(weights)
        assert np.abs(before - ideal).max() < 3


def test_slots_left_over_go_to_the_largest_remainders():
    assert mixture(1, 1, 1, weights=[4.0, 2.0, 1.0]).slots == [5714, 2857, 1429]  # 5714.29, 2857.14, 1428.57
    assert mixture(1, 1, 1).slots == [3334, 3333, 3333]


def test_equal_weights_take_turns():
    data = mixture(5, 7)
    assert [data.key(position, 0)[1] for position in range(8)] == [0, 1] * 4
    data = mixture(5, 7, weights=[1.0, 3.0])
    assert Counter(tuple(data.key(4 * k + i, 0)[1] for i in range(4)) for k in range(100)).most_common(1)[0][1] == 100


@pytest.mark.parametrize("seed", [0, -1, 2**33])
@pytest.mark.parametrize(
    "lengths, weights", [((12,), [1.0]), ((1,), [1.0]), ((7, 30, 1), [2.0, 3.0, 0.5]), ((4567,), [1.0])]
)
def test_each_source_goes_through_all_its_samples_once_an_epoch(lengths, weights, seed):
    """Over the seams of blocks as well; epochs differ; no two samples share their chances."""
    data = mixture(*lengths, weights=weights)
    keys = [data.key(position, seed) for position in range(11_000)]
    for source, n in enumerate(lengths):
        indices = [index for _, i, index in keys if i == source]
        epochs = [indices[start : start + n] for start in range(0, len(indices) - n + 1, n)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert sorted(epoch) == list(range(n))
        if n >= 12:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert len({own for own, _, _ in keys}) == len(keys)
    assert all(0 <= own < 2**62 for own, _, _ in keys)


def test_sources_of_one_length_are_shuffled_differently():
    data = mixture(20, 20)
    keys = [data.key(position, 0) for position in range(40)]
    first, second = ([index for _, i, index in keys if i == source] for source in (0, 1))
    assert first != second


def test_the_row_is_a_pure_function():
    """Another object, another order of asking: the same keys. Another seed: others."""
    positions = [*range(300), 10**12, 10**12 + 1, 9999, 10_000]
    keys = {position: mixture(7, 30, weights=[1.0, 2.0]).key(position, 5) for position in positions[:20]}
    data = mixture(7, 30, weights=[1.0, 2.0])
    once = [data.key(position, 5) for position in positions]
    random.Random(0).shuffle(shuffled_positions := positions.copy())
    again = {position: data.key(position, 5) for position in shuffled_positions}
    assert once == [again[position] for position in positions]
    assert all(again[position] == key for position, key in keys.items())
    assert once != [data.key(position, 6) for position in positions]


def test_these_keys_stay_as_they_are():
    """A run that was begun on another machine, or before an update, must meet the same samples."""
    data = mixture(1000, 50, weights=[3.0, 1.0])
    assert chance(0, -1) == 1782708310608008020
    assert [shuffled(i, 1000, 0) for i in range(5)] == [770, 165, 960, 133, 938]
    assert [data.key(position, 1) for position in (0, 1, 123_456_789)] == [
        (3441493077921728212, 0, 980),
        (475726782986624371, 0, 469),
        (153352925252741130, 0, 354),
    ]


def test_a_sample_and_its_size_are_asked_of_the_right_source():
    data = Mixture([Lengths([3, 4], "a"), Lengths([5, 6], "b")], [1.0, 1.0])
    assert data[9, 1, 0] == ("b", 9, 0) and data[9, 0, 1] == ("a", 9, 1)
    assert data.size((9, 1, 0)) == 5 and data.size((9, 0, 1)) == 4


# ----------------------------------------------------------------------------------------------------
# Order


def step_groups(data, steps, seed=0, per_step=16, micro=2, world=1) -> list[list[list[tuple]]]:
    """What all ranks compute, step by step: the groups in the order in which the ranks take them, forth and back."""
    ranks = [list(Order(data, seed, per_step, micro, rank, world, steps)) for rank in range(world)]
    n = per_step // micro // world
    assert all(len(rank) == n * len(steps) for rank in ranks)
    rounds = [ranks if m % 2 == 0 else ranks[::-1] for m in range(n)]
    return [[rank[s * n + m] for m in range(n) for rank in rounds[m]] for s in range(len(steps))]


def test_a_step_takes_the_next_samples_of_the_row():
    data = mixture(11, 5, weights=[2.0, 1.0])
    for s, groups in enumerate(step_groups(data, range(7), seed=3)):
        keys = sorted(key for group in groups for key in group)
        assert keys == sorted(data.key(position, 3) for position in range(16 * s, 16 * s + 16))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_groups_are_the_same_on_any_number_of_ranks(micro):
    data = mixture(11, 50, weights=[2.0, 1.0])
    single = step_groups(data, range(3, 8), micro=micro)
    for world in (2, 4):
        assert step_groups(data, range(3, 8), micro=micro, world=world) == single


def test_ranks_take_groups_forth_and_back():
    """0 1 2 2 1 0 0 1 2 and so on, in every step, from the heaviest group to the lightest."""
    data = mixture(300)
    turns = {3: [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0], 4: [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3], 1: [0] * 12}
    for world, turn in turns.items():
        ranks = [list(Order(data, 0, 24, 2, rank, world, range(2, 5))) for rank in range(world)]
        for s in range(3):
            (groups,) = step_groups(data, range(2 + s, 3 + s), per_step=24)
            mine = [[group for group, rank in zip(groups, turn) if rank == r] for r in range(world)]
            n = 12 // world
            assert [rank[s * n : (s + 1) * n] for rank in ranks] == mine


@pytest.mark.parametrize("world, micro, share", [(2, 4, 0.6), (2, 8, 0.65), (8, 4, 0.8), (8, 8, 0.6)])
def test_forth_and_back_gives_ranks_more_equal_totals_than_turns(world, micro, share):
    """Group g to rank g % world would give rank 0 the heaviest of each round.

    The heaviest total less the lightest, over steps of 256, as a share of what turns would give: the bounds are a
    little above what is measured.
    """
    data = Mixture([Lengths(lognormal_lengths(20_000).tolist())], [1.0])
    n = 256 // micro // world
    ranks = [list(Order(data, 0, 256, micro, rank, world, range(10))) for rank in range(world)]
    spread = in_turns = 0
    for s, groups in enumerate(step_groups(data, range(10), per_step=256, micro=micro)):
        totals = [sum(data.size(key) for group in rank[s * n : (s + 1) * n] for key in group) for rank in ranks]
        plain = [sum(data.size(key) for group in groups[r::world] for key in group) for r in range(world)]
        assert sum(totals) == sum(plain)
        spread += max(totals) - min(totals)
        in_turns += max(plain) - min(plain)
    assert spread < share * in_turns


@pytest.mark.parametrize("micro", [1, 2, 4, 8, 16])
def test_micro_batches_share_out_the_same_samples(micro):
    data = mixture(11)
    whole = step_groups(data, range(4), micro=16)
    for cut, (keys,) in zip(step_groups(data, range(4), micro=micro), whole):
        assert sorted(key for group in cut for key in group) == sorted(keys)
        assert all(len(group) == micro for group in cut)
    assert [keys for (keys,) in whole] == [[data.key(p, 0) for p in range(16 * s, 16 * s + 16)] for s in range(4)]


def test_any_start_continues_the_same_row():
    data = mixture(10, 3)
    whole = list(Order(data, 0, 8, 2, 0, 2, range(9)))
    for start in range(9):
        assert list(Order(data, 0, 8, 2, 0, 2, range(start, 9))) == whole[start * 2 :]


def test_samples_of_a_group_stand_in_the_order_of_the_row_and_groups_by_weight():
    data = mixture(200)
    place = {data.key(position, 0): position for position in range(256)}
    (groups,) = step_groups(data, range(1), per_step=256, micro=4)
    for group in groups:
        assert [place[key] for key in group] == sorted(place[key] for key in group)
    weights = [sum(map(data.size, group)) for group in groups]
    assert weights == sorted(weights, reverse=True)


def lognormal_lengths(n: int) -> np.ndarray:
    """Positions of samples such as instruction data has: median 200 of text, and in 70 % of them an image of 65."""
    rng = np.random.default_rng(0)
    text = np.exp(rng.normal(np.log(200), 0.8, n))
    return np.clip(text + 65 * (rng.random(n) < 0.7), 1, 2048).astype(int)


@pytest.mark.parametrize("micro, padded_share, plain_balance, balance", [(4, 0.56, 0.64, 0.95), (8, 0.44, 0.71, 0.985)])
def test_packing_and_balancing_leave_little_to_wait_for(micro, padded_share, plain_balance, balance):
    """Real tokens among those computed, and how long 8 ranks compute of the time that the slowest takes.

    256 samples a step. The bounds are a little to the side of what is measured, for padding and the row's own order
    (above it) and for ours (below it).
    """
    sizes = lognormal_lengths(20_000).tolist()
    data = Mixture([Lengths(sizes)], [1.0])
    n_step = 40
    steps = step_groups(data, range(n_step), per_step=256, micro=micro)
    grouped = np.array([[sum(map(data.size, keys)) for keys in groups] for groups in steps])
    grouped = grouped.reshape(-1, 8)  # [micro-batches, ranks]
    row = np.array([data.size(data.key(position, 0)) for position in range(256 * n_step)]).reshape(-1, micro)
    plain = row.sum(1).reshape(-1, 8)
    assert grouped.sum() == plain.sum()
    padded = row.sum() / (row.max(1) * micro).sum()
    in_turn = (plain.mean(1) / plain.max(1)).mean()
    balanced = (grouped.mean(1) / grouped.max(1)).mean()
    assert padded < padded_share
    assert in_turn < plain_balance
    assert balanced > balance
    samples = [Sample([3] * n, [3] * n, torch.empty(0, 3, 2, 2)) for n in row[0]]
    batch = collate(samples)
    print(
        f"{micro} samples: real {batch.n_token / batch.ids.numel():.0%}, if padded {padded:.1%}; "
        f"mean / maximum over ranks {balanced:.3f}, if not balanced {in_turn:.3f}"
    )
    assert batch.n_token / batch.ids.numel() == 1.0 >= 0.95


# ----------------------------------------------------------------------------------------------------
# Batches, from files and shards


@pytest.fixture
def files(tmp_path):
    """Two sources on disk, with a bad row and a bad image among them: a JSON file and two shards."""
    noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise.numpy()).save(buffer, "PNG")
    photo = buffer.getvalue()
    (tmp_path / "noise.png").write_bytes(photo)
    first = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "noise"}]
    more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": i, "image": "noise.png", "conversations": first + more * (i % 3)} for i in range(5)]
    rows[2]["image"] = "gone.png"
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for i in range(3):
                captions = json.dumps({"caption": ["word " * k for k in (1, 4, 9)]}).encode()
                for suffix, content in (("png", b"broken" if shard + i == 3 else photo), ("json", captions)):
                    member = tarfile.TarInfo(f"{shard:05}{i:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path


@pytest.fixture
def data(files):
    tokenizer = Tokenizer(GOLDEN / "text")
    sources = [
        Conversations(files / name, tokenizer, "owl2", 4, 28, 200, "stretch", crop_scale=0.3)
        for name in ("talk.json", "*.tar")
    ]
    return Mixture(sources, [1.0, 2.0])


def test_crops_and_captions_are_new_in_each_epoch_and_reproducible(data):
    keys = [key for keys in Order(data, 0, 8, 4, 0, 1, range(12)) for key in keys]
    samples = [data[key] for key in keys]
    seen: dict[tuple[int, int], list[Sample]] = {}
    for key, sample in zip(keys, samples):
        again = data[key]
        if isinstance(sample, Skipped):
            assert again == sample and key[1:] in {(0, 2), (1, 5)}
            continue
        assert again.ids == sample.ids and again.images.equal(sample.images)
        seen.setdefault(key[1:], []).append(sample)
    assert len(seen) == 5 + 6 - 2
    for (source, _), times in seen.items():
        assert len(times) >= 4
        assert not any(a.images.equal(b.images) for a, b in zip(times, times[1:]))
        if source == 1:
            assert len({len(sample.ids) for sample in times}) > 1
    assert {sample.reason.split(": ")[0].rpartition("/")[2] for sample in samples if isinstance(sample, Skipped)} == {
        "talk.json, row 2 (id 2)",
        "00001.tar, sample 2",
    }


@pytest.mark.parametrize("n_worker", [1, 2])
def test_worker_processes_give_the_same_batches(data, n_worker):
    order = Order(data, 0, 8, 4, 0, 1, range(5))
    alone = list(loader(data, order, 0, False))
    helped = list(loader(data, order, n_worker, False))
    assert len(alone) == len(helped) == 10
    assert sum(len(batch.skipped) for batch in alone) > 0
    for a, b, keys in zip(alone, helped, order):
        expected = collate([data[key] for key in keys])
        for other in (b, expected):
            assert a.ids.equal(other.ids) and a.labels.equal(other.labels) and a.starts.equal(other.starts)
            assert a.images.equal(other.images)
            assert (a.n_sample, a.n_supervised, a.n_token) == (other.n_sample, other.n_supervised, other.n_token)
            assert a.longest == other.longest and a.skipped == other.skipped


def test_the_ranks_together_compute_what_one_process_does(data):
    """Token for token: the sum over a step does not depend on how many compute it."""

    def step_rows(world: int) -> list[list[list[int]]]:
        ranks = [list(loader(data, Order(data, 0, 16, 2, rank, world, range(3)), 0, False)) for rank in range(world)]
        n = 8 // world
        return [sorted(b.ids[0].tolist() for rank in ranks for b in rank[s * n : (s + 1) * n]) for s in range(3)]

    single = step_rows(1)
    assert step_rows(2) == step_rows(4) == single
