"""Rows of Arrow tables as examples: the part that the sources of parquet and of Hugging Face's files share."""

import abc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError, did_you_mean

try:
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet
    from pyarrow import types
except ImportError as error:
    raise UserError(f"{error}; it is part of: pip install 'belief-trainer[arrow]'") from error

Transform = Callable[[dict[str, Any]], Mapping[str, Any]]


class ArrowSource(abc.ABC):
    """Rows by index, from tables of consecutive rows that a subclass reads.

    A row is a dict by column: a number or boolean is NumPy's, a list of numbers an array, and text (UTF-8) and binary
    are `bytes`, as TFDS gives them. Examples need one shape, and no device holds `bytes`, so `transform` makes an
    example of a row. It is called at each read and must return the same each time. Worker processes unpickle it: a
    function of a module works, a lambda does not.

    Raises `UserError` if a row has no value in a column.
    """

    def __init__(self, rows: Sequence[int], columns: Sequence[str], transform: Transform | None) -> None:
        """`rows` is the number of rows in each table."""
        self._ends, self._columns, self._transform = np.cumsum(rows, dtype=np.int64), tuple(columns), transform

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """The examples at `indices`, in their order; each table is read once."""
        wanted = np.asarray(indices, np.int64)
        if ((wanted < 0) | (wanted >= len(self))).any():
            raise IndexError(f"{wanted.min()} … {wanted.max()} are not all in 0 … {len(self) - 1}")
        tables = np.searchsorted(self._ends, wanted, side="right")
        examples: dict[int, Mapping[str, Any]] = {}
        for number, group in itertools.groupby(np.argsort(tables).tolist(), lambda place: int(tables[place])):
            places, table = list(group), self._table(number)
            chosen = table.take(wanted[places] - self._ends[number] + table.num_rows)
            columns = [_values(chosen[name], name) for name in self._columns]
            for place, *row in zip(places, *columns, strict=True):
                example = dict(zip(self._columns, row, strict=True))
                examples[place] = example if self._transform is None else self._transform(example)
        return [examples[place] for place in range(len(wanted))]

    @abc.abstractmethod
    def _table(self, number: int) -> Any:
        """The `pyarrow.Table` of that number, with the columns."""


def check_columns(file: Path, schema: Any, columns: Sequence[str], before: list[Any] | None) -> list[Any]:
    """The types of the columns of a file; `before` are those of the files before it.

    Raises `UserError` if a column is not there, or if its type is not supported or not that of `before`.
    """
    for name in columns:
        if name not in schema.names:
            raise UserError(f"{file} has no column {name!r}{did_you_mean(name, schema.names)}")
        if not (_is_text(kind := schema.field(name).type) or _is_number(kind) or _is_list(kind)):
            accepted = "numbers, booleans, lists of numbers, text and binary"
            raise UserError(f"column {name!r} of {file} is {kind}; accepted are {accepted}")
    kinds = [schema.field(name).type for name in columns]
    for name, kind, first in zip(columns, kinds, before or kinds, strict=True):
        if kind != first:
            raise UserError(f"column {name!r} is {kind} in {file}, but {first} in the files before it")
    return kinds


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raises `UserError` for a file that Arrow cannot read."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no file {file}") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def _is_number(kind: Any) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _is_list(kind: Any) -> bool:
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and _is_number(kind.value_type)


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in names or types.is_fixed_size_binary(kind)


def _values(column: Any, name: str) -> np.ndarray:
    """The value of each row of a column."""
    numbers = pa.compute.call_function("list_flatten", [column]) if _is_list(column.type) else column
    if column.null_count or numbers.null_count:
        raise UserError(f"column {name!r} of the data has rows without a value: fill them in or leave them out")
    return (column.cast(pa.large_binary()) if _is_text(column.type) else column).to_numpy()
