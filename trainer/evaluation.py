"""Evaluation: every example of a split once, whatever the batch size and the devices."""

from collections import defaultdict, deque
from typing import Any

import jax
import numpy as np

from trainer.data.stream import once, prefetch
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource
from trainer.metrics import Mean, Metrics
from trainer.program import Program
from trainer.state import TrainState


def evaluate_split(program: Program, state: TrainState, source: RandomAccessSource) -> dict[str, float]:
    """The metrics of a split by name, such as "test/accuracy", and "test/examples", how many examples were seen.

    Args:
      program: gives the evaluation step.
      state: whose parameters are evaluated.
      source: the examples of the split, usually loaded into memory.
    """
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    strategy, in_flight = program.strategy, deque[Metrics]()
    # Two batches keep the devices busy. On fake devices XLA:CPU deadlocks when programs with collectives overlap.
    fake = len(strategy.devices) > 1 and strategy.devices[0].platform == "cpu"
    limit = 0 if fake else 2
    size = program.eval_spec["mask"].shape[0]
    batches = once(source, size, local_examples=strategy.local_examples(size), threads=program.run.loading.threads)
    for batch in prefetch(batches, strategy.shard_batch):
        in_flight.append(program.eval_step(state, batch))
        if len(in_flight) > limit:
            _add(sums, in_flight.popleft())
    for metrics in in_flight:
        _add(sums, metrics)
    seen = round(sums.pop("examples")[0])
    if seen != len(source):
        raise UserError(f"the evaluation saw {seen} examples of {len(source)}")
    split = program.run.evaluation.split
    means: dict[str, Any] = {f"{split}/{name}": Mean(*sums[name]).compute() for name in sorted(sums)}
    return means | {f"{split}/examples": seen}


def evaluation_text(metrics: dict[str, float]) -> str:
    """The metrics as one line: `test accuracy: 0.9833, test loss: 0.0712 (360 examples)`."""
    examples = "".join(f" ({value:,.0f} examples)" for name, value in metrics.items() if name.endswith("/examples"))
    shown = [f"{k.replace('/', ' ')}: {v:.4f}" for k, v in metrics.items() if not k.endswith("/examples")]
    return ", ".join(shown) + examples


def _add(sums: dict[str, np.ndarray], metrics: Metrics) -> None:
    for name, mean in jax.device_get(metrics).items():
        sums[name] += (float(mean.total), float(mean.weight))
