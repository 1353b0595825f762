"""The order of the examples: a permutation for each epoch, known at any position without what came before."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from trainer.data.order import Order, permuted

EXAMPLES = 23
LARGE = (1 << 20) + 7  # no order of an epoch is kept
KEYS = np.random.default_rng(0).integers(0, 1 << 64, 8, np.uint64)


def first(order: Order, positions: int) -> np.ndarray:
    return order(np.arange(positions))


@pytest.mark.parametrize("examples", [1, 2, 7, 100, LARGE])
def test_each_epoch_of_the_order_has_every_example_once(examples):
    epochs = first(Order(examples, seed=3), 3 * examples).reshape(3, examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(examples), (3, 1)))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_computed_permutation_has_every_place_once(count):
    np.testing.assert_array_equal(np.sort(permuted(np.arange(count), count, KEYS)), np.arange(count))


def test_a_computed_permutation_of_some_places_is_that_of_all():
    everything, some = permuted(np.arange(1000), 1000, KEYS), np.random.default_rng(1).integers(0, 1000, 50)
    np.testing.assert_array_equal(permuted(some, 1000, KEYS), everything[some])


@pytest.mark.parametrize("examples", [100, LARGE])
def test_epochs_are_ordered_differently_from_each_other_and_from_the_source(examples):
    order = Order(examples, seed=3)
    epochs = [order(epoch * examples + np.arange(100)) for epoch in range(5)]
    assert len({epoch.tobytes() for epoch in [*epochs, np.arange(100)]}) == 6


def test_the_order_follows_from_seed_and_position_whatever_was_asked_for_before():
    positions = 9 * EXAMPLES
    expected = first(Order(EXAMPLES, seed=5), positions)
    order, rng = Order(EXAMPLES, seed=5), np.random.default_rng(0)
    lengths = []
    for _ in range(200):
        start, stop = sorted(rng.choice(positions + 1, 2, replace=False))
        np.testing.assert_array_equal(order(np.arange(start, stop)), expected[start:stop])
        lengths.append(stop - start)
    assert min(lengths) < EXAMPLES / 4  # within an epoch
    assert max(lengths) > 3 * EXAMPLES  # over several


@pytest.mark.parametrize("examples", [EXAMPLES, 10**9])
def test_a_position_far_away_is_reached_without_the_epochs_before_it(examples):
    positions = 10**6 * examples - 2 + np.arange(4)
    order = Order(examples, seed=5)
    ahead = order(positions)
    assert 0 <= ahead.min() <= ahead.max() < examples
    np.testing.assert_array_equal(np.concatenate([order(positions[i : i + 1]) for i in range(4)]), ahead)


def test_an_order_of_a_billion_examples_takes_no_memory():
    order, positions = Order(10**9, seed=0), 10**12 + np.arange(1024)
    order(positions)
    tracemalloc.start()
    order(positions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # bytes; the permutation would take 8e9


def test_the_order_of_a_seed_is_the_one_that_kept_runs_were_trained_in():
    np.testing.assert_array_equal(first(Order(7, seed=0), 14), [0, 5, 1, 6, 2, 4, 3, 2, 0, 4, 1, 5, 3, 6])
    found = Order(10**9, seed=0)(np.arange(3))
    np.testing.assert_array_equal(found, [676712508, 385244987, 204649467])


def test_another_seed_and_another_stream_give_another_order_in_every_epoch():
    orders = [Order(100, 0), Order(100, 1), Order(100, 0, stream=1)]
    epochs = [first(order, 500).reshape(5, 100) for order in orders]
    for one, other in itertools.combinations(epochs, 2):
        assert (one != other).any(axis=1).all()


def test_all_orders_of_a_small_source_are_equally_likely():
    counts = Counter(tuple(first(Order(4, seed), 4)) for seed in range(4800))
    assert stats.chisquare([counts[order] for order in itertools.permutations(range(4))]).pvalue > 1e-3


def test_a_computed_order_looks_random():
    size, seeds = LARGE, 3
    places = np.zeros((16, 16))
    for seed in range(seeds):
        found = first(Order(size, seed), size)
        places += np.histogram2d(np.arange(size), found, bins=16, range=[[0, size]] * 2)[0]
        steps = np.histogram(np.diff(found) % size, bins=64, range=(0, size))[0]
        assert stats.chisquare(steps).pvalue > 1e-4
        for lag in (1, 2, 1024, 1025):  # the halves of the Feistel network are of about 1024
            assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 4.5 / np.sqrt(size)
    # A permutation fills each row and column evenly, so it deviates less than independent draws, never more.
    assert stats.chisquare(places.ravel()).pvalue > 1e-4


def test_blocks_stay_together_in_an_order_of_their_own_in_each_epoch():
    order = first(Order(EXAMPLES, seed=3, block=4), 20 * EXAMPLES).reshape(20, EXAMPLES)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(EXAMPLES), (20, 1)))
    np.testing.assert_array_equal(order[:, 20:], np.tile([20, 21, 22], (20, 1)))  # no whole block
    blocks = order[:, :20].reshape(20, 5, 4)
    np.testing.assert_array_equal(blocks, blocks[..., :1] + np.arange(4))
    firsts = blocks[..., 0]
    assert (firsts % 4 == 0).all()
    assert len({tuple(epoch) for epoch in firsts}) > 15


def test_a_position_among_blocks_is_reached_by_itself():
    order = Order(10**9 + 1, seed=5, block=3)
    positions = np.array([0, 5, 10**9, 10**9 + 1, 7 * 10**9])
    together = order(positions)
    np.testing.assert_array_equal(np.concatenate([order(positions[i : i + 1]) for i in range(5)]), together)
    assert together[1] == together[1] // 3 * 3 + 2
    assert together[2] == 10**9  # the second of the last two, which are no whole block
