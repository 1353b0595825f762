"""Sources in memory, reading any source as batches, decoding it into memory, and the shapes of its batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.data import IDS, ArraySource, FirstExamples, batch_spec, take
from trainer.data.memory import load_all_into_memory, load_into_memory
from trainer.errors import UserError

EXAMPLES = 2500  # more than `load_into_memory` reads at once, and no multiple of that
BYTES = EXAMPLES * (3 * 4 + 1 + 4)  # of the arrays below in the dtypes that JAX uses


class CountingSource:
    """Examples as a data set gives them, with Python's numbers; counts how often each is read."""

    def __init__(self, examples: int = EXAMPLES) -> None:
        self.reads = np.zeros(examples, int)

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        assert type(index) is int  # readers of files take no NumPy integers
        self.reads[index] += 1
        return {"x": index + np.array([0.0, 0.25, 0.5]), "odd": bool(index % 2), "label": index % 10}


class ManySource(CountingSource):
    """Also reads many examples at once; counts the calls."""

    def __init__(self, examples: int = EXAMPLES) -> None:
        super().__init__(examples)
        self.calls = 0

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        self.calls += 1
        return [self[i] for i in indices]


def expected(indices: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "x": (indices[:, None] + np.array([0.0, 0.25, 0.5])).astype(np.float32),
        "odd": indices % 2 == 1,
        "label": (indices % 10).astype(np.int32),
    }


def assert_same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({}, "{}"),
        ({"x": np.zeros((0, 2))}, "'x': 0"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "'x': 3, 'y': 4"),
    ],
    ids=["no entry", "no example", "two lengths"],
)
def test_arrays_that_are_no_source_are_refused_with_their_lengths(arrays, named):
    with pytest.raises(UserError, match="one length, 1 or more") as refusal:
        ArraySource(arrays)
    assert named in str(refusal.value)


def test_an_array_source_gives_examples_by_index():
    source = ArraySource(expected(np.arange(5)))
    assert len(source) == 5
    assert_same({name: np.asarray(value)[None] for name, value in source[3].items()}, expected(np.array([3])))


@pytest.mark.parametrize("kind", [CountingSource, ManySource])
def test_take_stacks_the_examples_in_the_order_asked_for_repeats_included(kind):
    indices = np.array([7, 0, 2499, 7, 3])
    assert_same(take(kind(), indices), expected(indices))
    assert_same(take(ArraySource(expected(np.arange(EXAMPLES))), indices), expected(indices))


def test_take_reads_many_examples_in_one_call_where_there_is_one():
    source = ManySource()
    take(source, np.arange(100))
    assert source.calls == 1


def test_take_of_a_source_in_memory_gives_copies_that_may_be_changed():
    source = ArraySource(expected(np.arange(5)))
    take(source, np.arange(5))["x"][:] = -1
    assert_same(take(source, np.arange(5)), expected(np.arange(5)))


@pytest.mark.parametrize("kind", [CountingSource, ManySource])
def test_load_decodes_a_source_that_fits_into_memory_once(kind):
    source = kind()
    loaded = load_into_memory(source, BYTES)
    assert isinstance(loaded, ArraySource)
    assert_same(loaded.arrays, expected(np.arange(EXAMPLES)))
    assert (source.reads[:16] >= 3).all()  # also read to compare two readings, and the first to see how large it is
    assert (source.reads[16:] == 1).all()
    reads = source.reads.sum()
    take(loaded, np.arange(EXAMPLES))
    assert source.reads.sum() == reads


def test_load_reads_in_large_chunks_where_it_can():
    source = ManySource()
    load_into_memory(source, BYTES)
    assert source.calls <= 4


class RandomSource(CountingSource):
    """An augmentation on the host: each reading of an example adds noise, flips it at random, or draws NaN or 0."""

    def __init__(self, kind: str, *, seeded: bool = False) -> None:
        super().__init__(40)
        self.kind, self.seeded = kind, seeded
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = super().__getitem__(index)
        rng = np.random.default_rng(index) if self.seeded else self.rng
        x: Any = example["x"]
        x = {
            "noise": lambda: x + 0.1 * rng.normal(size=3),
            "flip": lambda: x[:: rng.choice([-1, 1])],
            "nan": lambda: np.where(rng.random(3) < 0.5, np.nan, x),
            "size": lambda: np.resize(x, 2 + int(self.reads.sum() > 17)),
        }[self.kind]()
        return {**example, "x": x}


@pytest.mark.parametrize("kind", ["noise", "flip", "nan", "size"])
def test_load_refuses_a_source_whose_randomness_it_would_freeze_and_says_what_to_use(kind):
    with pytest.raises(
        UserError, match=r"entry 'x' of the data differs each .* loading\.in_memory_bytes=0$"
    ) as refusal:
        load_into_memory(RandomSource(kind), BYTES)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["noise", "flip", "nan"])
def test_load_takes_a_source_that_draws_the_same_numbers_for_the_same_example_nan_included(kind):
    loaded = load_into_memory(RandomSource(kind, seeded=True), BYTES)
    assert isinstance(loaded, ArraySource)
    again = RandomSource(kind, seeded=True)
    assert_same(loaded.arrays, take(again, np.arange(40)))


def test_load_leaves_a_random_source_that_is_not_kept_in_memory_as_it_is():
    source = RandomSource("noise")
    assert load_into_memory(source, 0) is source
    assert (take(source, np.arange(9))["x"] != take(source, np.arange(9))["x"]).all()


@pytest.mark.parametrize("limit", [0, BYTES - 1])
def test_load_leaves_a_source_as_it_is_that_takes_a_byte_more_than_the_limit(limit):
    source = CountingSource()
    assert load_into_memory(source, limit) is source
    assert source.reads.sum() == 1


def loaded_first(sources: list[Any], limit: int = BYTES) -> tuple[Any, ...]:
    return tuple(load_all_into_memory(sources, limit))


def test_only_the_first_examples_are_decoded_once_where_nothing_uses_the_whole_source():
    source = CountingSource()
    few, more = loaded_first([FirstExamples(source, 5), FirstExamples(source, 20)])
    assert_same(few.arrays, expected(np.arange(5)))
    assert_same(more.arrays, expected(np.arange(20)))
    assert (source.reads[16:20] == 1).all()
    assert source.reads[20:].sum() == 0


def test_the_whole_source_is_decoded_once_where_it_is_used_as_well():
    source = CountingSource()
    few, whole = loaded_first([FirstExamples(source, 20), source])
    assert_same(few.arrays, expected(np.arange(20)))
    assert_same(whole.arrays, expected(np.arange(EXAMPLES)))
    assert (source.reads[16:] == 1).all()


def test_the_first_examples_are_decoded_where_the_whole_source_does_not_fit():
    source = CountingSource()
    whole, few = loaded_first([source, FirstExamples(source, 20)], BYTES - 1)
    assert whole is source
    assert_same(few.arrays, expected(np.arange(20)))
    assert source.reads[20:].sum() == 0
    (read,) = loaded_first([FirstExamples(source, 20)], 0)
    assert (type(read), len(read)) == (FirstExamples, 20)
    assert_same(take(read, np.arange(3, 7)), expected(np.arange(3, 7)))


def test_load_leaves_arrays_in_memory_as_they_are():
    source = ArraySource({"x": np.zeros(10)})
    assert load_into_memory(source, 0) is source


@pytest.mark.parametrize(
    ("value", "narrow"),
    [
        (3, np.int32),
        (np.int64(3), np.int32),
        (np.uint64(3), np.uint32),
        (0.5, np.float32),
        (np.float64(0.5), np.float32),
        (True, np.bool_),
        (np.uint8(3), np.uint8),
        (np.float16(0.5), np.float16),
        (jnp.bfloat16(0.5), jnp.bfloat16),
    ],
    ids=str,
)
def test_numbers_of_64_bits_become_32_and_others_stay_in_batches_loaded_arrays_and_shapes_alike(value, narrow):
    class Source:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"value": value}

    loaded = load_into_memory(Source(), 1 << 20)
    for batch in (take(Source(), np.arange(2)), take(loaded, np.arange(2)), batch_spec(Source(), 2)):
        assert batch["value"].dtype == narrow
    np.testing.assert_array_equal(take(loaded, np.arange(2))["value"], np.full(2, value, narrow))


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_take_of_a_source_in_memory_narrows_too(dtype):
    source = ArraySource({"value": np.arange(4, dtype=dtype)})
    assert take(source, np.arange(2))["value"].dtype == batch_spec(source, 2)["value"].dtype


def test_the_spec_has_every_entry_and_the_mask_with_the_batch_in_front():
    assert batch_spec(CountingSource(), 6) == {
        "x": jax.ShapeDtypeStruct((6, 3), jnp.float32),
        "odd": jax.ShapeDtypeStruct((6,), jnp.bool_),
        "label": jax.ShapeDtypeStruct((6,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((6,), jnp.float32),
    }


def test_the_spec_reads_a_single_example():
    source = CountingSource()
    batch_spec(source, 100)
    assert source.reads.sum() == 1


@pytest.mark.parametrize("name", ["mask", "example_key", IDS])
def test_an_entry_with_a_name_of_the_harness_is_refused(name):
    with pytest.raises(UserError, match=f"entry '{name}' of the data has a name that the harness uses"):
        batch_spec(ArraySource({"x": np.zeros((4, 3)), name: np.zeros(4)}), 2)


TEXTS = {"str": "a word", "bytes": b"a word", "0d": np.array("a word"), "1d": np.array(["two", "words"], object)}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_an_entry_that_no_device_can_hold_is_refused_by_its_name(text):
    class Source:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": np.zeros(3), "caption": text}

    with pytest.raises(UserError, match=r"entry 'caption' of the data is .*: leave it out"):
        batch_spec(Source(), 2)
