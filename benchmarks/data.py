"""Costs of reading on the host, one table for each option.

    python -m benchmarks.data                    # all tables
    python -m benchmarks.data --augment          # only this one
    python -m benchmarks.data --wait --config=configs/shakespeare.py
    python -m benchmarks.data --jpeg --torch_python=ENVIRONMENT/bin/python

Sides that are compared are measured in turn, in rounds, in one process.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import header
from benchmarks.jpeg import jpeg_table
from benchmarks.reading import read_table
from benchmarks.tokens import tokens_table
from benchmarks.waiting import wait_table
from trainer.data import ArraySource
from trainer.data.order import Order
from trainer.data.stream import Batches

EXAMPLES, BATCH = 4096, 128


def flip(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The image, flipped from left to right for one example in two."""
    return {**example, "image": example["image"][:, ::-1] if rng.random() < 0.5 else example["image"]}


def data(side: int) -> dict[str, np.ndarray]:
    """Random images with labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, side, side, 3)).astype(np.uint8)
    return {"image": images, "label": rng.integers(0, 10, EXAMPLES).astype(np.int32)}


def plain(arrays: dict[str, np.ndarray], steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of a loop that somebody would write."""
    order, rng = Order(EXAMPLES, 0), np.random.default_rng(0)
    for step in range(steps):
        examples = [
            flip({name: array[i] for name, array in arrays.items()}, rng)
            for i in order(np.arange(step * BATCH, (step + 1) * BATCH))
        ]
        yield {name: np.stack([example[name] for example in examples]) for name in arrays}


def harness(arrays: dict[str, np.ndarray], steps: int) -> Iterator[Any]:
    """Batches as the harness reads them, without threads."""
    batches = Batches(ArraySource(arrays), seed=0, batch_size=BATCH, steps=steps, augment=flip)
    return (batches[step] for step in range(steps))


def microseconds(read: Callable[..., Iterator[Any]], arrays: dict[str, np.ndarray], steps: int) -> float:
    """Microseconds an example."""
    began = time.perf_counter()
    for _ in read(arrays, steps):
        pass
    return (time.perf_counter() - began) / (steps * BATCH) * 1e6


def augment_table(options: argparse.Namespace) -> None:
    """Microseconds an example that augmentation costs, in the harness and in a plain loop that does the same work.

    Both sides call one function for each example and stack the results. The plain loop has one generator for all of
    them, so it gives other numbers on every number of processes; the harness gives each example the generator of its
    seed and position. The overhead is the difference. Both are measured in turn, in rounds, on one thread.
    """
    for side in (8, 32):
        arrays = data(side)
        times: dict[Callable[..., Iterator[Any]], list[float]] = {plain: [], harness: []}
        for _ in range(options.rounds):
            for read, own in times.items():
                own.append(microseconds(read, arrays, options.steps))
        loop, ours = (min(own) for own in times.values())
        print(f"augment, images {side}×{side}×3: loop {loop:.1f} µs, harness {ours:.1f} µs an example", end=": ")
        print(f"overhead {ours - loop:.1f} µs (bar: 15), {ours / loop:.2f} ×")


# A table for each option of the command line: `--augment` prints the first.
TABLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "augment": augment_table,
    "read": read_table,
    "tokens": tokens_table,
    "jpeg": jpeg_table,
    "wait": wait_table,
}


def main() -> None:
    """Prints the tables whose options are given; all if none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, table in TABLES.items():
        parser.add_argument(f"--{name}", action="store_true", help=str(table.__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each side is measured")
    parser.add_argument("--steps", type=int, default=40, help="batches in a round")
    parser.add_argument("--wait_steps", type=int, default=400, help="steps of a run of --wait")
    parser.add_argument("--config", help="the config of --wait, whose data must be prepared")
    parser.add_argument("--torch_python", help="for --jpeg, an interpreter that has torch and torchvision")
    options = parser.parse_args()
    print(header())
    for name in [name for name in TABLES if getattr(options, name)] or TABLES:
        TABLES[name](options)


if __name__ == "__main__":
    main()
