"""Mixtures: exact proportions as a function of position, for any processes, in memory or not, and after a resume."""

import itertools

import numpy as np
import pytest

from trainer import ArraySource, Mixture
from trainer.data import take
from trainer.data.memory import load_all_into_memory
from trainer.data.mixture import drawn_before, order_of
from trainer.data.stream import eval_batches, train_batches
from trainer.data.streams import Streams
from trainer.errors import UserError


class OneByOne:
    """Examples that Grain reads one at a time."""

    def __init__(self, begin: int, count: int) -> None:
        self.begin, self.count = begin, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"x": np.array(self.begin + index, np.float32), "pair": np.full(2, index, np.int32)}


def memory(source: OneByOne) -> ArraySource:
    return ArraySource(take(source, np.arange(len(source))))


PARTS = {"a": (OneByOne(0, 5), 0.5), "b": (OneByOne(100, 40), 0.3), "c": (OneByOne(200, 7), 0.2)}
BEGINS = {"a": 0, "b": 5, "c": 45}
MIXTURES = {
    "memory": Mixture({name: (memory(source), weight) for name, (source, weight) in PARTS.items()}),
    "read": Mixture(PARTS),
}


def test_a_mixture_by_index_is_one_source_after_the_other():
    mixture = MIXTURES["read"]
    assert len(mixture) == 52
    assert [float(mixture[i]["x"]) for i in (0, 4, 5, 44, 45, 51)] == [0, 4, 100, 139, 200, 206]
    with pytest.raises(IndexError):
        mixture[52]
    with pytest.raises(IndexError):
        mixture[-1]


@pytest.mark.parametrize("weights", [[1], [1, 1], [5, 3, 2], [1, 999], [7, 1, 1, 1, 3], [3, 5, 7, 11, 13]])
def test_each_source_has_its_share_of_every_stretch(weights):
    total = sum(weights)
    numbers, drawn = drawn_before(np.arange(4 * total), weights)
    for number, weight in enumerate(weights):
        own = numbers == number
        np.testing.assert_array_equal(drawn[own], np.arange(own.sum()))  # each of its draws once, in order
        np.testing.assert_array_equal(own.reshape(4, total).sum(1), weight)  # exact over the sum of the weights
        shares = np.cumsum(own) - np.arange(1, 4 * total + 1) * weight / total
        assert abs(shares).max() <= 1 + 1e-9 if len(weights) <= 3 else abs(shares).max() < 2


def test_shares_are_exact_far_into_a_run():
    start, weights = 10**12, [499_999, 500_001]
    numbers, drawn = drawn_before(start + np.arange(10**6), weights)
    assert np.bincount(numbers).tolist() == weights
    assert drawn[numbers == 0][0] == start // 10**6 * weights[0]


@pytest.mark.parametrize("kind", MIXTURES)
def test_each_source_is_read_in_epochs_of_its_own(kind):
    mixture = MIXTURES[kind]
    batches = train_batches(mixture, seed=0, batch_size=8, start=0, stop=50)
    x = np.concatenate([batch["x"] for batch in batches])
    for begin, (source, weight) in zip((0, 100, 200), PARTS.values(), strict=True):
        own = x[(x >= begin) & (x < begin + 100)] - begin
        assert abs(len(own) - 400 * weight) <= 1
        whole = own[: len(own) // len(source) * len(source)].reshape(-1, len(source))
        np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(len(source)), (len(whole), 1)))
        assert len({epoch.tobytes() for epoch in whole}) > len(whole) / 2  # 5 examples have only 120 orders


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_the_batch_that_one_would_and_a_later_start_is_the_tail(kind, processes):
    mixture = MIXTURES[kind]
    expected = list(train_batches(MIXTURES["memory"], seed=3, batch_size=8, start=0, stop=12))
    for process in range(processes):
        places = np.arange(8).reshape(processes, -1)[process]
        own = train_batches(mixture, seed=3, batch_size=8, start=5, stop=12, local_positions=places)
        for batch, whole in zip(own, expected[5:], strict=True):
            for name in whole:
                np.testing.assert_array_equal(batch[name], whole[name][places])


def test_worker_processes_read_the_same():
    expected = list(train_batches(MIXTURES["memory"], seed=3, batch_size=8, start=0, stop=6))
    for batch, whole in zip(
        train_batches(MIXTURES["read"], seed=3, batch_size=8, start=0, stop=6, workers=1), expected, strict=True
    ):
        np.testing.assert_array_equal(batch["x"], whole["x"])


def test_an_evaluation_sees_every_example_of_every_source_once():
    batches = list(eval_batches(MIXTURES["read"], 8))
    x, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("x", "mask"))
    expected = np.concatenate([begin + np.arange(n) for begin, n in ((0, 5), (100, 40), (200, 7))])
    np.testing.assert_array_equal(x[mask == 1], expected)


def test_a_mixture_is_loaded_into_memory_if_all_of_it_fits():
    (loaded,) = load_all_into_memory([MIXTURES["read"]], 52 * 12)
    assert isinstance(loaded, Mixture)
    assert loaded.is_in_memory
    positions = np.arange(200)
    np.testing.assert_array_equal(order_of(loaded, 1)(positions), order_of(MIXTURES["read"], 1)(positions))
    assert load_all_into_memory([MIXTURES["read"]], 52 * 12 - 1) == [MIXTURES["read"]]


def test_another_seed_draws_other_examples_in_the_same_proportions():
    one, other = (order_of(MIXTURES["memory"], seed)(np.arange(100)) for seed in (0, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(np.searchsorted([5, 45], one, "right"), np.searchsorted([5, 45], other, "right"))


def test_weights_count_only_relative_to_each_other():
    source = PARTS["b"][0]
    pairs: list[tuple] = [(1, 3), (0.25, 0.75), (2, 6), (np.float32(0.5), 1.5)]
    orders = [order_of(Mixture({"a": (source, a), "b": (source, b)}), 0)(np.arange(100)) for a, b in pairs]
    for one, other in itertools.pairwise(orders):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "1", None, True, 1 / 3])
def test_a_wrong_weight_is_an_error_that_says_what_is_expected(weight):
    with pytest.raises(UserError, match=r"above 0|6 digits"):
        Mixture({"a": (PARTS["a"][0], weight), "b": (PARTS["b"][0], 1.0)})


def test_sources_with_other_entries_are_named():
    mixture = Mixture({"a": (PARTS["a"][0], 1), "b": (ArraySource({"x": np.zeros(3, np.int32)}), 1)})
    with pytest.raises(
        UserError, match=r"source 'b' of the mixture has entries x int32\[\], another has x float32\[\]"
    ):
        mixture.take(np.arange(8))
    with pytest.raises(UserError, match="needs a source"):
        Mixture({})


@pytest.mark.parametrize("source", [MIXTURES["read"], Streams({"x": np.zeros((2, 3))})])
def test_a_source_with_an_order_of_its_own_is_refused(source):
    with pytest.raises(UserError, match=r"source 'a' of the mixture is a (Mixture|Streams), whose own order"):
        Mixture({"a": (source, 1.0)})
