"""The order of a run, its stream of batches, an evaluation's, and the prefetch to the devices."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from trainer.data import ArraySource
from trainer.data.order import Order
from trainer.data.stream import Batches, eval_batches, prefetch, train_batches
from trainer.data.streams import Streams
from trainer.errors import UserError

EXAMPLES, BATCH, STEPS = 23, 8, 12  # the stream ends in its fifth epoch, and no epoch ends where a batch does


class ListSource:
    """The examples of an `ArraySource` that is read one by one, so that Grain's threads do it."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self.arrays.items()}


def arrays(examples: int = EXAMPLES) -> dict[str, np.ndarray]:
    number = np.arange(examples, dtype=np.int32)
    return {"number": number, "x": np.random.default_rng(0).normal(size=(examples, 3)).astype(np.float32)}


def whole(source: Any, *, seed: int = 0, start: int = 0, **settings: Any) -> list[Any]:
    return list(train_batches(source, seed=seed, batch_size=BATCH, start=start, stop=STEPS, **settings))


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


class FileSource(ArraySource):
    """The same as arrays, read in threads many batches at a time."""

    @property
    def is_in_memory(self) -> bool:
        return False


@pytest.fixture(params=[ArraySource, ListSource, FileSource], ids=["memory", "grain", "batches"])
def source(request: pytest.FixtureRequest) -> Any:
    return request.param(arrays())


def test_batch_i_of_the_stream_is_batch_i_by_index(source):
    batches = Batches(source, seed=0, batch_size=BATCH, steps=STEPS)
    assert len(batches) == STEPS
    assert_same(whole(source), [batches[i] for i in range(STEPS)])


def test_batches_lie_end_to_end_in_the_order_of_the_run(source):
    numbers = np.concatenate([batch["number"] for batch in whole(source)])
    np.testing.assert_array_equal(numbers, Order(EXAMPLES, seed=0)(np.arange(STEPS * BATCH)))


def test_every_place_of_a_batch_holds_one_complete_example_unmasked(source):
    expected = arrays()
    for batch in whole(source):
        np.testing.assert_array_equal(batch["x"], expected["x"][batch["number"]])
        assert batch["mask"].dtype == np.float32
        np.testing.assert_array_equal(batch["mask"], np.ones(BATCH))


@pytest.mark.parametrize("start", [1, 5, STEPS - 1, STEPS])
def test_a_stream_that_starts_later_is_the_tail_of_the_whole(source, start):
    assert_same(whole(source, start=start), whole(source)[start:])


PLACES = [[7], [0, 1, 2, 3], [0, 2, 4, 6], [1, 2, 5, 7], list(range(BATCH))]


@pytest.mark.parametrize("places", PLACES)
def test_a_stream_of_some_places_is_those_places_of_every_batch(source, places):
    expected = [{name: array[places] for name, array in batch.items()} for batch in whole(source)]
    assert_same(whole(source, local_positions=np.array(places)), expected)


@pytest.mark.parametrize("places", PLACES)
def test_once_of_some_places_is_those_places_of_every_batch_and_of_its_mask(source, places):
    expected = [{name: array[places] for name, array in batch.items()} for batch in eval_batches(source, BATCH)]
    assert len(expected) == 3
    assert_same(list(eval_batches(source, BATCH, local_positions=np.array(places))), expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_reading_in_threads_gives_the_batches_of_memory_bit_for_bit(threads):
    assert_same(whole(ListSource(arrays()), threads=threads), whole(ArraySource(arrays())))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_blocks_are_read_in_the_same_order_from_memory_and_in_threads(threads, start):
    sources = [ArraySource(arrays()), FileSource(arrays())]
    for source in sources:
        source.block = 4
    memory, read = (whole(source, threads=threads, start=start) for source in sources)
    assert_same(read, memory)
    numbers = np.concatenate([batch["number"] for batch in memory])
    expected = Order(EXAMPLES, seed=0, block=4)(np.arange(start * BATCH, STEPS * BATCH))
    np.testing.assert_array_equal(numbers, expected)


def test_another_seed_streams_another_order_of_the_same_examples(source):
    one, other = (np.concatenate([b["number"] for b in whole(source, seed=seed)])[:EXAMPLES] for seed in (0, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(np.sort(one), np.sort(other))


@pytest.mark.parametrize("kind", [ArraySource, ListSource])
def test_a_batch_larger_than_an_epoch_holds_several_epochs(kind):
    examples = 3
    batches = whole(kind(arrays(examples)))
    numbers = np.concatenate([batch["number"] for batch in batches])
    assert [len(batch["mask"]) for batch in batches] == [BATCH] * STEPS
    epochs = numbers.reshape(-1, examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(examples), (len(epochs), 1)))


def test_a_source_that_fails_fails_the_stream_with_its_own_error():
    class Broken(ListSource):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 11:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="the disk is gone"):
        whole(Broken(arrays()))


@pytest.mark.parametrize("batch_size", [1, 5, EXAMPLES, EXAMPLES + 9])
def test_once_gives_every_example_once_in_order_and_masks_the_rest(source, batch_size):
    batches = list(eval_batches(source, batch_size))
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < EXAMPLES)
    for name, expected in arrays().items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches])[mask == 1], expected)


@pytest.mark.parametrize("batch_size", [1, 5, EXAMPLES, EXAMPLES + 9])
def test_all_batches_of_once_have_one_shape_and_the_fewest_batches_do(source, batch_size):
    batches = list(eval_batches(source, batch_size))
    assert {batch["x"].shape for batch in batches} == {(batch_size, 3)}
    assert {(batch["mask"].shape, batch["mask"].dtype) for batch in batches} == {((batch_size,), np.dtype("float32"))}
    assert len(batches) == -(-EXAMPLES // batch_size)


def test_prefetch_gives_each_batch_as_it_was_sharded_in_order():
    batches = [{"number": np.array([i])} for i in range(10)]
    found = prefetch(batches, lambda batch: {"number": batch["number"] + 100})
    assert [int(batch["number"][0]) for batch in found] == list(range(100, 110))


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_exactly_depth_batches_are_sharded_ahead_of_the_one_in_use(depth):
    sharded: list[int] = []

    def record(batch: Any) -> Any:
        sharded.append(batch["number"])
        return batch

    endless = ({"number": i} for i in range(10**9))
    for in_use, batch in enumerate(islice(prefetch(endless, record, depth), 20)):
        assert batch["number"] == in_use
        assert sharded == list(range(in_use + depth + 1))


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_stream_shorter_than_the_depth_comes_out_whole(length):
    batches = [{"number": i} for i in range(length)]
    assert list(prefetch(batches, dict, depth=4)) == batches


def test_an_error_of_the_source_reaches_the_consumer_and_ends_the_stream():
    def failing() -> Iterator[dict[str, Any]]:
        yield from ({"number": i} for i in range(6))
        raise OSError("the disk is gone")

    batches = prefetch(failing(), dict, depth=2)
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(batch["number"] for batch in batches)
    assert seen == list(range(len(seen)))
    assert len(seen) >= 6 - 2  # all but those under way
    assert next(batches, None) is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "of the same two lengths, not {}"),
        ({"x": np.zeros((2, 6)), "y": np.zeros((3, 4))}, r"'x': \(2, 6\), 'y': \(3, 4\)"),
        ({"x": np.zeros((2, 6)), "piece": np.zeros((2, 6))}, "have an entry 'piece' of their own"),
    ],
)
def test_arrays_that_make_no_streams_are_refused(arrays, message):
    with pytest.raises(UserError, match=message):
        Streams(arrays)
