"""Packed tokens from ArrayRecord, through the harness, beside indexing the same arrays in NumPy."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from experiments.datasets.parts import ShardWriter
from experiments.packing import Layout, PackedSource, pack, to_record
from trainer.data.order import Order
from trainer.data.stream import Batches, train_batches

TOKENS, VOCAB, DOCUMENT = 30_000_000, 8192, 5000  # tokens in all, of the vocabulary, and of the longest document
SHAPES = ((256, 32), (1024, 16))  # T and rows in a batch


def packed(length: int) -> dict[str, np.ndarray]:
    """Rows of random documents."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, DOCUMENT, 2 * TOKENS // DOCUMENT)
    documents = [rng.integers(2, VOCAB, size, dtype=np.int32) for size in sizes]
    return pack(documents, np.full(VOCAB, 3, np.int32), length, VOCAB)


def stored(rows: dict[str, np.ndarray], length: int, folder: Path) -> PackedSource:
    """The same rows in ArrayRecord, as `prepare` writes them."""
    layout = Layout.of(len(rows["bytes"]), length, VOCAB)
    feature = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
    writer = ShardWriter(folder / "rows", tfds.features.FeaturesDict({"rows": feature}), "uncompressed")
    for start in range(0, layout.rows, layout.rows_per_record):
        writer.write({"rows": to_record({name: x[start : start + layout.rows_per_record] for name, x in rows.items()})})
    records: Any = ArrayRecordDataSource([str(writer.close().file)])
    return PackedSource(records, layout, "")


def indexed(rows: dict[str, np.ndarray], batch: int, steps: int) -> Iterator[Any]:
    """Batches of rows in random order, from memory."""
    order = Order(len(rows["bytes"]), 0)(np.arange(batch * steps))
    for step in range(steps):
        indices = order[step * batch : (step + 1) * batch]
        yield {name: array.take(indices, axis=0) for name, array in rows.items()}


def rate(read: Callable[[], Iterator[Any]], tokens: int) -> float:
    """Millions of tokens a CPU-second, of all threads."""
    began = time.process_time()
    for _ in read():
        pass
    return tokens / (time.process_time() - began) / 1e6


def tokens_table(options: argparse.Namespace) -> None:
    """Tokens per CPU-second of packed rows from ArrayRecord, beside indexing the same arrays in NumPy.

    `source` reads the harness's batches from the source, `Grain` reads them ahead in one of Grain's threads, as a run
    does. The sides are measured in turn, in rounds; the best of each counts. The files are in the system's cache.
    """
    for length, batch in SHAPES:
        rows = packed(length)
        with tempfile.TemporaryDirectory() as folder:
            source = stored(rows, length, Path(folder))
            steps = len(source) // batch
            batches = Batches(source, seed=0, batch_size=batch, steps=steps)
            many = max((1 << 20) // (batch * sum(x[:1].nbytes for x in rows.values())), 1)
            firsts = range(0, steps, many)

            def read(batches: Batches = batches, firsts: range = firsts, steps: int = steps) -> Iterator[Any]:
                return (one for i in firsts for one in batches.read(i, min(i + firsts.step, steps)))

            settings = {"seed": 0, "batch_size": batch, "start": 0, "stop": steps, "threads": 1}
            sides: dict[str, Callable[[], Iterator[Any]]] = {
                "NumPy": lambda rows=rows, batch=batch, steps=steps: indexed(rows, batch, steps),
                "source": read,
                "Grain": lambda source=source, settings=settings: train_batches(source, **settings),
            }
            best = dict.fromkeys(sides, 0.0)
            for _ in range(options.rounds):
                for name, side in sides.items():
                    best[name] = max(best[name], rate(side, steps * batch * (length + 1)))
        texts = ", ".join(f"{name} {value:,.0f} M" for name, value in best.items())
        print(f"tokens, rows of {length} + 1, {batch} in a batch: {texts} a CPU-second", end="; ")
        print(", ".join(f"{name} / NumPy {best[name] / best['NumPy']:.2f}" for name in ("source", "Grain")), flush=True)
