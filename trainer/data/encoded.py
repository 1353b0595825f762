"""Entries of examples that stay encoded until a batch is made, such as photographs of many sizes."""

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.errors import UserError


class Encoded(abc.ABC):
    """An entry of an example that is decoded each time a batch is made of it, in threads or in worker processes.

    `augment` gets the object itself. Evaluations, and runs without `augment`, get `decode()`. A source that has such
    entries is never kept in memory.
    """

    @abc.abstractmethod
    def decode(self) -> np.ndarray:
        """The array of this entry where nothing is random; all entries of a source give the same shape and dtype."""


def as_objects(name: str, values: Sequence[Any]) -> np.ndarray:
    """An array of the objects themselves; `UserError` if an entry is not encoded, as the first one is."""
    if other := [value for value in values if not isinstance(value, Encoded)]:
        raise UserError(
            f"entry {name!r} of the data is encoded in some examples, and a {type(other[0]).__name__} in others"
        )
    array = np.empty(len(values), object)
    array[:] = values
    return array


def decoded(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with its encoded entries decoded and stacked."""
    return {name: _decoded(name, array) if is_encoded(array) else array for name, array in batch.items()}


def is_encoded(array: np.ndarray) -> bool:
    """Whether it holds `Encoded` objects."""
    return array.dtype == object and array.ndim == 1 and isinstance(array[0], Encoded)


def _decoded(name: str, array: np.ndarray) -> np.ndarray:
    arrays = [entry.decode() for entry in array]
    check_uniform(name, "shapes", (one.shape for one in arrays))
    check_uniform(name, "dtypes", (one.dtype for one in arrays))
    return np.stack(arrays)


def check_uniform(name: str, kind: str, values: Iterable[Any]) -> None:
    """Raises `UserError` unless the shapes, or the dtypes, of all examples of an entry are the same."""
    if len(found := set(values)) > 1:
        texts = sorted(map(str, found))
        raise UserError(f"entry {name!r} of the data has examples of different {kind}: {texts[0]}, {texts[1]}")
