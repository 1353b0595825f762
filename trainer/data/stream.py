"""The stream of a run: batch i is a function of (seed, i), so no position has to be saved."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import grain
import numpy as np

from trainer.data import ArraySource, take
from trainer.data.workers import read_in_workers
from trainer.experiment import Batch, RandomAccessSource

_READ_BYTES = 1 << 20  # of examples in memory at once: small beside any batch that matters


class Order:
    """Which example stands at each position of an endless training run: epoch after epoch, each in its own order."""

    def __init__(self, examples: int, seed: int) -> None:
        """`examples` is the length of the source; the order of epoch e follows from (seed, e)."""
        self.examples = examples
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """The examples at positions start … stop − 1, int64."""
        first, last = start // self.examples, (stop - 1) // self.examples
        epochs = [self._epoch(epoch) for epoch in range(first, last + 1)]
        order = epochs[0] if first == last else np.concatenate(epochs)
        return order[start - first * self.examples : stop - first * self.examples]

    def _epoch(self, epoch: int) -> np.ndarray:
        order = self._epochs.get(epoch)
        if order is None:
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.examples)
            # Threads may stand on both sides of an epoch's end; two are all that are ever in use.
            self._epochs = {e: o for e, o in self._epochs.items() if abs(e - epoch) <= 1} | {epoch: order}
        return order


class Batches:
    """The batches of a run by index; batch i holds positions i·B … (i+1)·B − 1, or those of them that are wanted."""

    def __init__(
        self, source: RandomAccessSource, *, seed: int, batch_size: int, steps: int, rows: np.ndarray | None = None
    ) -> None:
        """`rows` are those to read of each batch, in that order, as a process does that holds no others; None for all.

        So what stands where in a batch does not depend on how many processes read it.
        """
        self.source = source
        self.order = Order(len(source), seed)
        self.batch_size = batch_size
        self.steps = steps
        self.rows = np.arange(batch_size) if rows is None else rows
        self.mask = np.ones(len(self.rows), np.float32)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        return next(self.run(index, index + 1))

    def run(self, first: int, stop: int) -> Iterator[Batch]:
        """Batches first … stop − 1, read all at once."""
        positions = self.order(first * self.batch_size, stop * self.batch_size)
        indices = positions.reshape(-1, self.batch_size)[:, self.rows]
        examples = take(self.source, indices.reshape(-1))
        arrays = {name: array.reshape(*indices.shape, *array.shape[1:]) for name, array in examples.items()}
        for i in range(len(indices)):
            yield {name: array[i] for name, array in arrays.items()} | {"mask": self.mask}


def stream(
    source: RandomAccessSource,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    rows: np.ndarray | None = None,
    threads: int = 4,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches start … stop − 1 of the run, or the `rows` of each that this process holds, in host memory.

    Arrays in memory are indexed directly; any other source is read ahead by Grain in `threads` threads: of this process
    or, if there are any, of each of the `workers`, which are processes of their own.
    """
    batches = Batches(source, seed=seed, batch_size=batch_size, steps=stop, rows=rows)
    if isinstance(source, ArraySource):
        # Several batches at once: on CPUs every microsecond of Python is taken from the step.
        batch_bytes = len(batches.rows) * sum(array[:1].nbytes for array in source.arrays.values())
        many = min(max(_READ_BYTES // batch_bytes, 1), 64)
        firsts = range(start, stop, many)
        return chain.from_iterable(batches.run(first, min(first + many, stop)) for first in firsts)
    return _read_ahead(batches, range(start, stop), threads, workers)


class _Once:
    """The batches of `once` by index."""

    def __init__(self, source: RandomAccessSource, batch_size: int, rows: np.ndarray | None) -> None:
        self.source, self.batch_size = source, batch_size
        self.rows = np.arange(batch_size) if rows is None else rows

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        examples = index * self.batch_size + self.rows
        mask = (examples < len(self.source)).astype(np.float32)
        return take(self.source, np.minimum(examples, len(self.source) - 1)) | {"mask": mask}


def once(
    source: RandomAccessSource, batch_size: int, *, rows: np.ndarray | None = None, threads: int = 4
) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up with masked copies of the last example.

    Of each batch only the `rows` that this process holds; every process gets the same number of batches.
    """
    batches = _Once(source, batch_size, rows)
    if isinstance(source, ArraySource):
        return (batches[i] for i in range(len(batches)))
    return _read_ahead(batches, range(len(batches)), threads)


def _read_ahead(batches: Batches | _Once, wanted: range, threads: int, workers: int = 0) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.source(batches)[wanted.start : wanted.stop].to_iter_dataset(options)
    return read_in_workers(dataset, workers) if workers else iter(dataset)


def prefetch(batches: Iterable[Batch], put: Callable[[Batch], Batch], depth: int = 2) -> Iterator[Batch]:
    """The batches on the devices, `depth` of them under way while one is in use."""
    waiting: deque[Batch] = deque()
    for batch in batches:
        waiting.append(put(batch))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting
