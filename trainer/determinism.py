"""A check that a run repeats itself: its first steps twice, compared bit for bit."""

import copy
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from trainer import config
from trainer.data.stream import train_batches
from trainer.optional import augmentation
from trainer.program import build_program
from trainer.rules import path_of


def check_determinism(run: config.Run, steps: int) -> tuple[bool, str]:
    """Makes the first `steps` steps of a resolved run twice, from fresh variables also if the run has `init_from`.

    Each time it opens the data, builds the program and makes the initial state anew.

    Returns whether every metric of each step and every array of the state after them are equal, bit for bit, and a text
    that names the first that differ. Touches no workdir.
    """
    passes = [_one_pass(copy.deepcopy(run), steps) for _ in range(2)]
    texts = []
    for step, (one, other) in enumerate(zip(passes[0][0], passes[1][0], strict=True), 1):
        if (name := next(_differing(one, other), None)) is not None:
            (at, *_) = np.flatnonzero(_bits(one[name]) != _bits(other[name]))
            first, second = (f"{values[name][at]:.9g}" for values in (one, other))
            texts.append(f"step {step}: the metric {name} differs first: its sum is {first}, then {second}")
            break
    if (path := next(_differing(passes[0][1], passes[1][1]), None)) is not None:
        texts.append(f"after {steps} steps {path} differs first")
    same = f"{steps} steps twice: every metric and every array of the state equal, bit for bit"
    return not texts, "\n".join(texts) or same


def _one_pass(run: config.Run, steps: int) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The sums of each metric of each step, as one array, and the arrays of the state by path, parameters first."""
    program = build_program(run)
    strategy, state, metrics = program.strategy, program.init(), []
    batches = train_batches(
        program.train_source,
        seed=run.seed,
        batch_size=run.batch_size,
        start=0,
        stop=steps,
        local_positions=strategy.local_positions(run.batch_size),
        threads=run.loading.threads,
        workers=run.loading.workers,
        augment=augmentation(run.experiment),
    )
    for batch in batches:
        state, found = program.train_step(state, strategy.shard_batch(batch))
        names = dict.fromkeys(("loss", "grad_norm", *found))  # the loss first: the others follow from it
        metrics.append({name: _sums(jax.device_get(found[name])) for name in names})
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {path_of(keys): np.asarray(jax.device_get(leaf)) for keys, leaf in leaves}
    return metrics, dict(sorted(arrays.items(), key=lambda item: not item[0].startswith("params/")))


def _differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> Iterator[str]:
    return (name for name in one if one[name].tobytes() != other[name].tobytes())


def _sums(metric: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(metric)])


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")
