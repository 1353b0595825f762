"""Sources that are decoded once and kept in memory, if they fit."""

from collections.abc import Sequence

import numpy as np

from trainer.data import READ_TWICE, ArraySource, BatchSource, FirstExamples, check_names, stack, take_encoded
from trainer.data.encoded import check_uniform, is_encoded
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource

_READ_AT_ONCE = 1024  # examples; large enough to hide the cost of a call, small compared with a data set


def load_into_memory(source: RandomAccessSource, limit_bytes: int) -> RandomAccessSource:
    """`source` decoded into memory if `fits_in_memory`, else `source` itself.

    Raises `UserError` if two reads of one of the first 16 examples differ, and if the examples have different entries,
    shapes or dtypes.
    """
    if not fits_in_memory(source, limit_bytes):
        return source
    if isinstance(source, BatchSource):
        return source.loaded(lambda part: load_into_memory(part, limit_bytes))
    check_reads_are_equal(source)
    arrays = {name: np.empty((len(source), *x.shape[1:]), x.dtype) for name, x in stack([source[0]]).items()}
    for start in range(0, len(source), _READ_AT_ONCE):
        stop = min(start + _READ_AT_ONCE, len(source))
        parts = take_encoded(source, np.arange(start, stop))
        check_names(arrays, parts)
        for name, part in parts.items():
            check_uniform(name, "shapes", (arrays[name].shape[1:], part.shape[1:]))
            check_uniform(name, "dtypes", (arrays[name].dtype, part.dtype))
            arrays[name][start:stop] = part
    return ArraySource(arrays)


def load_all_into_memory(sources: Sequence[RandomAccessSource], limit_bytes: int) -> list[RandomAccessSource]:
    """Loads each source; a source that appears twice is decoded once.

    `FirstExamples(source, n)` are the first n of `source` in memory, if `sources` have it as a whole as well and it
    fits. Otherwise only the first examples are decoded, once for all `FirstExamples` of the same `source`.
    """
    loaded: dict[int, RandomAccessSource] = {}  # by the id of the source
    loaded_firsts: dict[int, RandomAccessSource] = {}  # by the id of the whole source
    counts: dict[int, int] = {}  # the number of first examples that are used, by the id of the whole source
    for source in sources:
        if isinstance(source, FirstExamples):
            counts[id(source.source)] = max(len(source), counts.get(id(source.source), 0))
        elif id(source) not in loaded:
            loaded[id(source)] = load_into_memory(source, limit_bytes)

    def first(source: FirstExamples) -> RandomAccessSource:
        key = id(source.source)
        examples = whole = loaded.get(key, source.source)
        if not isinstance(whole, ArraySource):
            if key not in loaded_firsts:
                loaded_firsts[key] = load_into_memory(FirstExamples(whole, counts[key]), limit_bytes)
            examples = loaded_firsts[key]
        if isinstance(examples, ArraySource):
            return ArraySource({name: array[: len(source)] for name, array in examples.arrays.items()})
        return FirstExamples(whole, len(source))

    return [first(source) if isinstance(source, FirstExamples) else loaded[id(source)] for source in sources]


def fits_in_memory(source: RandomAccessSource, limit_bytes: int) -> bool:
    """Whether the source is in memory already, or takes at most `limit_bytes` there and has no `Encoded` entries."""
    if isinstance(source, BatchSource) and source.is_in_memory:
        return True
    arrays = stack([source[0]]).values()
    return not any(map(is_encoded, arrays)) and len(source) * sum(array.nbytes for array in arrays) <= limit_bytes


def check_reads_are_equal(source: RandomAccessSource) -> None:
    """Reads the first examples of a source twice; raises `UserError` if the two reads differ."""
    first, second = (stack([source[i] for i in range(min(len(source), READ_TWICE))]) for _ in range(2))
    for name in first:
        if not np.array_equal(first[name], second[name], equal_nan=True):
            raise UserError(
                f"entry {name!r} of the data differs each time an example is read; a split in memory is read once, "
                "which would freeze this randomness: give the experiment a method augment(example, rng), draw random "
                "numbers in loss from batch['example_key'], or set loading.in_memory_bytes=0"
            )
