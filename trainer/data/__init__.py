"""Sources of examples: arrays in memory, and many examples of any source as one batch."""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainer.data.encoded import Encoded, as_objects, check_uniform, decoded
from trainer.errors import UserError
from trainer.experiment import Experiment, RandomAccessSource
from trainer.optional import Augment

IDS = "example ids"  # the name of a batch entry, int64 [B]: the index of each example in its source
# The number of examples that are read twice, to find a source that is random. If each of them has one random bit, the
# two reads agree by chance in one of 65,536 launches.
READ_TWICE = 16


class BatchSource(abc.ABC):
    """A source that reads many examples as one batch, faster than one by one.

    Attributes:
      block: consecutive examples that are read together. The order of a run keeps them together, see `Order`.
      identity: a text that a resumed run must find as it was, such as the checksum of a tokenizer.
    """

    block: int = 1
    identity: str = ""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @abc.abstractmethod
    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices`, int64 [n], as `take_encoded` has them."""

    @property
    @abc.abstractmethod
    def is_in_memory(self) -> bool:
        """Whether all examples are arrays in memory."""

    @abc.abstractmethod
    def loaded(self, load: Callable[[RandomAccessSource], RandomAccessSource]) -> RandomAccessSource:
        """The same source, with each source that it is made of replaced by what `load` returns for it."""


class ArraySource(BatchSource):
    """Examples in memory: one array for each entry, whose first axis is the example."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Casts arrays of 64-bit numbers to 32 bits, as JAX does; all must have one length, 1 or more."""
        self.arrays = {name: _narrow(np.asarray(array)) for name, array in arrays.items()}
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise UserError(f"a source needs entries of one length, 1 or more, not {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self.arrays.items()}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` as one batch."""
        return {name: array.take(indices, axis=0) for name, array in self.arrays.items()}

    @property
    def is_in_memory(self) -> bool:
        """True."""
        return True

    def loaded(self, load: Callable[[RandomAccessSource], RandomAccessSource]) -> RandomAccessSource:
        """This source itself."""
        return self


class FirstExamples:
    """The first examples of a source."""

    def __init__(self, source: RandomAccessSource, count: int) -> None:
        self.source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[index]

    def __getitems__(self, indices: list[int]) -> Sequence[Mapping[str, Any]]:
        """Many examples at once."""
        return read_examples(self.source, indices)


def open_source(experiment: Experiment, split: str) -> RandomAccessSource:
    """The examples of a split, if they are as the protocol says."""
    name = f"{type(experiment).__name__}.source({split!r})"
    try:
        source = experiment.source(split)
    except KeyError as error:
        raise UserError(f"{name}: KeyError: {error}; is there such a split? (--traceback shows where)") from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{name}: {error} (--traceback shows where)") from error
    if not isinstance(source, RandomAccessSource):
        raise UserError(f"{name} is a {type(source).__name__}, which has no length and indices")
    if not len(source):
        raise UserError(f"{name} has no example")
    if not isinstance(source[0], Mapping):
        raise UserError(f"{name} holds examples of type {type(source[0]).__name__}; a mapping from names is expected")
    return source


def eval_source(source: RandomAccessSource) -> RandomAccessSource:
    """The source that evaluations and predictions read: its attribute `in_evaluations` if it has one, else itself."""
    found = getattr(source, "in_evaluations", None)
    return source if found is None else found


def block_of(source: RandomAccessSource) -> int:
    """The number of consecutive examples that the order of a run keeps together."""
    return source.block if isinstance(source, BatchSource) else 1


def take(source: RandomAccessSource, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of any source at `indices`, stacked along a new first axis, in the dtypes that JAX uses."""
    return decoded(take_encoded(source, indices))


def take_encoded(source: RandomAccessSource, indices: np.ndarray) -> dict[str, np.ndarray]:
    """As `take`; but `Encoded` entries are left so, in an array of objects."""
    if isinstance(source, FirstExamples):
        return take_encoded(source.source, indices)
    return (
        source.take(indices)
        if isinstance(source, BatchSource)
        else stack(read_examples(source, [int(i) for i in indices]))
    )


def augmented(
    examples: Mapping[str, np.ndarray], augment: Augment | None, seed: int, positions: Iterable[Any]
) -> dict[str, np.ndarray]:
    """Stacked examples, decoded; `augment` changes each with the generator of (seed, its position in the run)."""
    if augment is None:
        return decoded(examples)
    # The counter keeps these numbers apart from those of the order of the examples. To reset one generator takes 1 µs,
    # to make another 8.
    bits = np.random.Philox(key=[seed, 0], counter=[0, 0, 0, 1])
    rng, fresh = np.random.Generator(bits), bits.state
    changed = []
    for i, position in enumerate(positions):
        fresh["state"]["key"][1] = position
        bits.state = fresh
        changed.append(augment({name: array[i] for name, array in examples.items()}, rng))
        if not isinstance(changed[-1], Mapping):
            raise UserError(f"augment returned a {type(changed[-1]).__name__}; a mapping from names is expected")
    return decoded(stack(changed))


def batch_spec(
    source: RandomAccessSource, batch_size: int, augment: Augment | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch, the mask included; raises `UserError` if an entry is not numeric or is misnamed."""
    example = stack([source[0]])
    example = augmented(example, augment, 0, [0])
    for name, array in example.items():
        if not isinstance(name, str):
            raise UserError(f"entry {name!r} of the data is named by a {type(name).__name__}; a text is expected")
        if name in ("mask", "example_key", IDS):
            raise UserError(f"entry {name!r} of the data has a name that the harness uses: give it another")
        if not (array.dtype.kind in "iufcb" or jax.dtypes.issubdtype(array.dtype, np.inexact)):
            raise UserError(f"entry {name!r} of the data is {array.dtype}, which no device can hold: leave it out")
    example["mask"] = np.ones((1,), np.float32)
    return {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in example.items()}


def read_examples(source: RandomAccessSource, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
    """The examples at `indices`, read together if the source can."""
    many = getattr(source, "__getitems__", None)
    return many(indices) if many else [source[i] for i in indices]


def stack(examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The examples along a new first axis, in the dtypes that JAX uses; raises `UserError` if they do not fit."""

    def entry(name: str) -> np.ndarray:
        if isinstance(examples[0][name], Encoded):
            return as_objects(name, [example[name] for example in examples])
        try:
            arrays = [np.asarray(example[name]) for example in examples]
        except ValueError as error:  # a list of lists of different lengths
            raise UserError(f"entry {name!r} of the data is no array: {error}") from error
        check_uniform(name, "shapes", (array.shape for array in arrays))
        if len({array.dtype for array in arrays}) > 1:
            arrays = [_narrow(array) for array in arrays]
            check_uniform(name, "dtypes", (array.dtype for array in arrays))
        return _narrow(np.stack(arrays))

    for example in examples:
        check_names(examples[0], example)
    return {name: entry(name) for name in examples[0]}


def check_names(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raises `UserError` unless two examples have the same entries."""
    if first.keys() != other.keys():
        texts = [", ".join(map(str, example)) or "none" for example in (first, other)]
        raise UserError(f"the examples of the data have different entries: {texts[0]}; and {texts[1]}")


def _narrow(x: np.ndarray) -> np.ndarray:
    # Python's int and most label features are int64, which JAX would cast to int32 at every transfer.
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False) if x.dtype.kind in "iufcb" else x
