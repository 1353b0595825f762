"""The batches of a run: batch i is a function of (seed, i), so no position has to be saved."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from typing import TypeVar

import grain
import numpy as np

from trainer.data import IDS, BatchSource, augmented, take, take_encoded
from trainer.data.mixture import order_of
from trainer.data.workers import read_in_workers
from trainer.experiment import Batch, RandomAccessSource
from trainer.optional import Augment

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_READ_BYTES = 1 << 20  # bytes: consecutive batches of a `BatchSource` are read together up to this size


@dataclass(eq=False, repr=False)
class Batches:
    """Batches by index. Batch i of size B holds positions i·B … (i+1)·B − 1 of the order in which examples are read."""

    source: RandomAccessSource
    _: KW_ONLY
    seed: int | None  # None: the order of the source; masked copies of the last example fill up the last batch
    batch_size: int  # B, over all processes
    steps: int  # the number of batches
    local_positions: np.ndarray | None = None  # in a batch, of the examples that this process reads; None: all
    with_ids: bool = False  # whether each batch has the array `IDS`, int64
    augment: Augment | None = None  # changes each example; ignored if `seed` is None

    def __post_init__(self) -> None:
        self.order = None if self.seed is None else order_of(self.source, self.seed)
        self.batch_positions = np.arange(self.batch_size) if self.local_positions is None else self.local_positions

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        return next(self.read(index, index + 1))

    def read(self, first: int, stop: int) -> Iterator[Batch]:
        """Batches first … stop − 1; reads all of them before it yields the first."""
        positions = (np.arange(first, stop)[:, None] * self.batch_size + self.batch_positions).reshape(-1)
        if self.order is None:
            indices, mask = np.minimum(positions, len(self.source) - 1), positions < len(self.source)
        else:
            indices, mask = self.order(positions), np.ones(len(positions))
        augment = None if self.seed is None else self.augment
        batches = augmented(take_encoded(self.source, indices), augment, self.seed or 0, positions)
        batches["mask"] = mask.astype(np.float32)
        if self.with_ids:
            batches[IDS] = indices
        size = len(self.batch_positions)
        for start in range(0, len(positions), size):
            yield {name: array[start : start + size] for name, array in batches.items()}


def train_batches(
    source: RandomAccessSource,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    local_positions: np.ndarray | None = None,
    threads: int = 4,
    workers: int = 0,
    timeout_seconds: float = 300.0,
    with_ids: bool = False,
    augment: Augment | None = None,
) -> Iterator[Batch]:
    """Training batches start … stop − 1, in host memory.

    Arrays in memory that are not augmented are indexed here. Grain reads everything else ahead: with `workers` 0 in
    `threads` threads of this process, else in `workers` processes with `threads` threads each. With workers, the errors
    are those of `read_in_workers`, one of which is raised if no batch comes in `timeout_seconds`. `with_ids` adds the
    array `IDS` to each batch.
    """
    batches = Batches(
        source,
        seed=seed,
        batch_size=batch_size,
        steps=stop,
        local_positions=local_positions,
        with_ids=with_ids,
        augment=augment,
    )
    return _read(batches, start, threads, workers, timeout_seconds)


def eval_batches(
    source: RandomAccessSource, batch_size: int, *, local_positions: np.ndarray | None = None, threads: int = 4
) -> Iterator[Batch]:
    """Every example once, in order; masked copies of the last example fill up the last batch."""
    steps = -(-len(source) // batch_size)
    batches = Batches(source, seed=None, batch_size=batch_size, steps=steps, local_positions=local_positions)
    return _read(batches, 0, threads, workers=0)


def split_ids(batch: Batch) -> tuple[np.ndarray | None, Batch]:
    """The array `IDS` of a batch, None if it has none, and the batch without it."""
    if IDS not in batch:
        return None, batch
    return batch[IDS], {name: array for name, array in batch.items() if name != IDS}


def _read(batches: Batches, start: int, threads: int, workers: int, timeout_seconds: float = 300.0) -> Iterator[Batch]:
    """The batches from `start` on, read ahead unless they lie in memory."""
    source = batches.source
    if isinstance(source, BatchSource) and source.is_in_memory and batches.augment is None:
        groups = _BatchGroups(batches, start)
        return chain.from_iterable(groups[i] for i in range(len(groups)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    if isinstance(source, BatchSource) and batches.augment is None and not workers:
        return chain.from_iterable(grain.MapDataset.source(_BatchGroups(batches, start)).to_iter_dataset(options))
    dataset = grain.MapDataset.source(batches)[start:].to_iter_dataset(options)
    if not workers:
        return iter(dataset)
    return read_in_workers(dataset, workers, timeout_seconds=timeout_seconds, first=start)


class _BatchGroups:
    """Lists of consecutive batches from `start` on, of about `_READ_BYTES` each.

    On CPUs every microsecond of Python is taken from the step, and one call for several batches costs little more.
    """

    def __init__(self, batches: Batches, start: int) -> None:
        example_bytes = sum(array.nbytes for array in take(batches.source, np.arange(1)).values())
        self._batches = batches
        self._many = min(max(_READ_BYTES // (len(batches.batch_positions) * example_bytes), 1), 64)
        self._firsts = range(start, len(batches), self._many)

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, index: int) -> list[Batch]:
        first = self._firsts[index]
        return list(self._batches.read(first, min(first + self._many, len(self._batches))))


def prefetch(items: Iterable[_Item], launch: Callable[[_Item], _Result], depth: int = 2) -> Iterator[_Result]:
    """The result of `launch` for each item; `launch` begins some work, such as a transfer to the devices.

    While the caller uses one result, the work on the next `depth` is under way.
    """
    waiting: deque[_Result] = deque()
    for item in items:
        waiting.append(launch(item))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
