"""A check that a run repeats itself: its first steps twice, compared bit for bit."""

import copy
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from trainer import config
from trainer.data.stream import train_batches
from trainer.program import compile_program
from trainer.rules import path_of


def check_determinism(run: config.Run, steps: int) -> tuple[bool, str]:
    """Makes the first `steps` steps of a resolved run twice, each time read, compiled and begun anew.

    Returns whether every metric of each step and every array of the state after them are equal, bit for bit, and a text
    that names the first that differ. Touches no workdir.
    """
    passes = [_one_pass(copy.deepcopy(run), steps) for _ in range(2)]
    texts = []
    for step, (one, other) in enumerate(zip(passes[0][0], passes[1][0], strict=True), 1):
        if (name := next(_differing(one, other), None)) is not None:
            first, second = (_number(values[name]) for values in (one, other))
            texts.append(f"step {step}: the metric {name} differs first: {first}, then {second}")
            break
    if (path := next(_differing(passes[0][1], passes[1][1]), None)) is not None:
        texts.append(f"after {steps} steps {path} differs first")
    same = f"{steps} steps twice: every metric and every parameter equal, bit for bit"
    return not texts, "\n".join(texts) or same


def _one_pass(run: config.Run, steps: int) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The metrics of each step as [total, weight], and the arrays of the state by path, parameters first."""
    program = compile_program(run)
    strategy, state, metrics = program.strategy, program.init(), []
    batches = train_batches(
        program.train_source,
        seed=run.seed,
        batch_size=run.batch_size,
        start=0,
        stop=steps,
        local_examples=strategy.local_examples(run.batch_size),
        threads=run.loading.threads,
        workers=run.loading.workers,
    )
    for batch in batches:
        state, found = program.train_step(state, strategy.shard_batch(batch))
        names = dict.fromkeys(("loss", "grad_norm", *found))  # the loss first: the others follow from it
        metrics.append({name: np.asarray(jax.device_get(tuple(found[name]))) for name in names})
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {path_of(keys): np.asarray(jax.device_get(leaf)) for keys, leaf in leaves}
    return metrics, dict(sorted(arrays.items(), key=lambda item: not item[0].startswith("params/")))


def _differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> Iterator[str]:
    return (name for name in one if one[name].tobytes() != other[name].tobytes())


def _number(mean: Any) -> str:
    return f"{mean[0]:.9g} / {mean[1]:.9g}"
