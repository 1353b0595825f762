"""Evaluation: every example once, whatever the batch and the devices."""

from collections import defaultdict, deque

import jax
import numpy as np

from trainer.build import Parts
from trainer.data.stream import once, prefetch
from trainer.errors import UserError
from trainer.experiment import Metrics, RandomAccessSource
from trainer.state import TrainState


def evaluate(parts: Parts, state: TrainState, source: RandomAccessSource) -> dict[str, float]:
    """The metrics of a split by name, such as "test/accuracy", and "test/examples", how many were seen.

    Args:
      parts: the run.
      state: what to evaluate.
      source: the evaluation split, usually loaded into memory.
    """
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    # Programs that do not wait for each other can starve each other of threads in XLA:CPU's collectives, and hang.
    fake = len(parts.parallel.devices) > 1 and parts.parallel.devices[0].platform == "cpu"
    ahead = 0 if fake else 2  # otherwise enough that the devices never wait, few enough to bound what is in flight
    results: deque[Metrics] = deque()
    size = parts.run.evaluation.batch_size
    batches = once(source, size, rows=parts.parallel.local_rows(size), threads=parts.run.loading.threads)
    for batch in prefetch(batches, parts.parallel.put):
        results.append(parts.eval_step(state, batch))
        if len(results) > ahead:
            _add(sums, results.popleft())
    for result in results:
        _add(sums, result)
    seen = round(sums.pop("examples")[0])
    if seen != len(source):
        raise UserError(f"the evaluation saw {seen} examples of {len(source)}")
    split = parts.run.evaluation.split
    return {f"{split}/{name}": float(divide(*sums[name])) for name in sorted(sums)} | {f"{split}/examples": seen}


def divide(total: float, weight: float) -> float:
    """The one division of a mean; NaN when nothing was counted."""
    return total / weight if weight else float("nan")


def _add(sums: dict[str, np.ndarray], metrics: Metrics) -> None:
    for name, mean in jax.device_get(metrics).items():
        sums[name] += (float(mean.total), float(mean.weight))
