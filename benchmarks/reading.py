"""Examples and tokens per CPU-second of several ways to read one data set; `python -m benchmarks.data --read`."""

import argparse
import importlib.util
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from trainer.data import ArraySource
from trainer.data.order import Order
from trainer.data.stream import train_batches
from trainer.data.tfds import TfdsSource, prepare
from trainer.experiment import RandomAccessSource

EXAMPLES, BATCH, TOKENS, WORKERS = 16384, 128, 1024, 2  # TOKENS are those to predict in an example
SECONDS = 0.5  # of CPU time that a way to read has in a round, at least


def stored(kind: str) -> dict[str, np.ndarray]:
    """Random examples: "images" of 28×28 pixels with labels, or "tokens", each a row of 1,025."""
    rng = np.random.default_rng(0)
    if kind == "tokens":
        return {"tokens": rng.integers(0, 8192, (EXAMPLES, TOKENS + 1)).astype(np.uint16)}
    images = rng.integers(0, 256, (EXAMPLES, 28, 28, 1)).astype(np.uint8)
    return {"image": images, "label": rng.integers(0, 10, EXAMPLES).astype(np.int32)}


class BenchmarkImages(tfds.core.GeneratorBasedBuilder):
    """The examples of `stored` as a TFDS data set."""

    VERSION = tfds.core.Version("1.0.0")
    KIND = "images"

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            name: tfds.features.Tensor(shape=x.shape[1:], dtype=x.dtype, encoding=tfds.features.Encoding.BYTES)
            if x.ndim > 1
            else x.dtype
            for name, x in stored(self.KIND).items()
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        arrays = stored(self.KIND)
        return ((i, {name: array[i] for name, array in arrays.items()}) for i in range(EXAMPLES))


class BenchmarkTokens(BenchmarkImages):
    """The same of tokens."""

    VERSION = tfds.core.Version("1.0.0")
    KIND = "tokens"


def on_disk(kind: str, folder: str) -> TfdsSource:
    """The data set of a kind as ArrayRecord; it is written first if it is not there."""
    prepare(f"benchmark_{kind}", folder)
    return TfdsSource(f"benchmark_{kind}", "train", tuple(stored(kind)), folder)


def numpy_batches(arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end, as NumPy indexes arrays in memory."""
    order = Order(EXAMPLES, 0)
    for step in itertools.count():
        indices = order(np.arange(step * BATCH, (step + 1) * BATCH))
        yield {name: array[indices] for name, array in arrays.items()}


def harness_batches(source: RandomAccessSource, workers: int = 0) -> Iterator[Any]:
    """Batches without end, as the harness reads them for a training."""
    return iter(train_batches(source, seed=0, batch_size=BATCH, start=0, stop=10**9, workers=workers))


def grain_batches(source: Any, workers: int = 0) -> Iterator[Any]:
    """Batches without end, of `grain.MapDataset` as its documentation uses it."""
    dataset = grain.MapDataset.source(source).shuffle(seed=0).repeat().batch(BATCH).to_iter_dataset()
    return iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else dataset)


def torch_batches(source: RandomAccessSource, workers: int = 0) -> Iterator[Any]:
    """Batches without end, of PyTorch's DataLoader."""
    from torch.utils.data import DataLoader  # pyrefly: ignore[missing-import] - it need not be installed

    more: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    loader = DataLoader(source, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers, **more)
    for _ in itertools.count():
        yield from loader


def readers(kind: str, folder: str) -> dict[str, Iterator[Any]]:
    """The batches of each way to read the examples of a kind, by its name; the first is to compare with."""
    arrays, source = stored(kind), on_disk(kind, folder)
    libraries: dict[str, Callable[..., Iterator[Any]]] = {"harness": harness_batches, "grain.MapDataset": grain_batches}
    if importlib.util.find_spec("torch"):
        libraries["DataLoader"] = torch_batches
    else:
        print("PyTorch is not installed: DataLoader is left out")
    found: dict[str, Iterator[Any]] = {"memory, NumPy": numpy_batches(arrays)}
    found |= {f"memory, {name}": read(ArraySource(arrays)) for name, read in libraries.items()}
    for workers in (0, WORKERS):
        where = f"ArrayRecord, {workers} workers" if workers else "ArrayRecord"
        found |= {f"{where}, {name}": read(source, workers) for name, read in libraries.items()}
    return found


def cpu_seconds() -> float:
    """The CPU time of this process and of its worker processes, with all their threads, as Linux gives it."""
    pids = [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)  # clock_getcpuclockid(3)


def settled() -> float:
    """`cpu_seconds`, once everything is read ahead and the threads and the workers wait."""
    before, after = 0.0, cpu_seconds()
    while after - before > 0.005:
        time.sleep(0.3)
        before, after = after, cpu_seconds()
    return after


def read_table(options: argparse.Namespace) -> None:
    """Examples and tokens per CPU-second, from memory and from disk, beside NumPy, Grain and PyTorch.

    Every way gives batches of the same examples in random order. The CPU time is that of the process and its workers,
    between two moments at which all that is read ahead is read: starting does not count, and every thread does. A
    figure is that of all rounds together, as several batches may be read in one of them and used in the next.
    """
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("images", "tokens"):
            found = readers(kind, folder)
            seconds, examples = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0)
            with ExitStack() as stack:
                for batches in found.values():
                    for _ in itertools.islice(batches, 8 * WORKERS):  # all threads and workers run then
                        pass
                    stack.callback(getattr(batches, "close", lambda: None))
                for name, batches in list(found.items()) * options.rounds:
                    began = settled()
                    while cpu_seconds() - began < SECONDS:
                        examples[name] += sum(BATCH for _ in itertools.islice(batches, options.steps))
                    seconds[name] += settled() - began
            print(f"{kind}, batches of {BATCH}")
            rates = {name: examples[name] / seconds[name] for name in found}
            first, *_ = rates.values()
            for name, rate in rates.items():
                tokens = f", {rate * TOKENS / 1e6:8.2f} million tokens" if kind == "tokens" else ""
                print(f"  {name:40} {rate:10,.0f} examples{tokens} per CPU-second, {rate / first:.4f} of NumPy's")
