"""Predictions of a trained model for every example of a split, sharded as an evaluation is."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer import config, distributed
from trainer.data import batch_spec, eval_source, open_source
from trainer.data.memory import load_into_memory
from trainer.data.stream import eval_batches, prefetch
from trainer.errors import UserError, kind_of, model_errors
from trainer.experiment import Batch
from trainer.experiment_checks import abstract_params
from trainer.program import zeros
from trainer.restore import load, predictor, run_of
from trainer.sharding import build_strategy, check_divides
from trainer.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions for a split, batch by batch."""

    step: int  # that of the checkpoint
    examples: int  # how many there are
    outputs: Mapping[str, jax.ShapeDtypeStruct]  # of one batch, by name, in the dtypes of `predict`
    batches: Iterator[dict[str, np.ndarray]]  # in the order of the source; every process sees all examples


def predict_split(
    workdir: str | PathLike[str], run: config.Run | None = None, *, step: int | str = "latest", split: str | None = None
) -> Predictions:
    """Predicts every example of a split once, on any devices. All processes call it.

    Arguments are those of `evaluate`; `max_examples` of an evaluation does not count here. Raises `UserError` if the
    experiment makes no predictions or none that `checked_predictions` allows, if a batch size of the run is no multiple
    of the batch shards, and for what `evaluate` does.
    """
    folder = Workdir(workdir)
    with distributed.collective_errors("the run"):
        run = run_of(folder, run)
        folder.check_run(run)
        predict = checked(predictor(run.experiment).predict)
        named = run.evaluation if split is None else run.evaluations.get(split)
        source = eval_source(open_source(run.experiment, named.split if named else str(split)))
        size = run.evaluation.batch_size or run.batch_size
        spec = batch_spec(source, size)
        boxed = abstract_params(run.experiment, lambda: run.experiment.init(jax.random.key(0), zeros(spec)), spec)
        # Under `jax.pmap` each replica would see only its part of the predictions. `data` reads the same checkpoints.
        strategy = "data" if run.parallel.strategy == "pmap" else run.parallel.strategy
        strategy = build_strategy(dataclasses.replace(run.parallel, strategy=strategy), boxed)
        check_divides(run, strategy.batch_shards)
        source = load_into_memory(source, run.loading.in_memory_bytes)
    trained = load(workdir, step, run=run, sharding=strategy.sharding)
    compiled, local = strategy.jit_predict(predict), strategy.local_positions(size)
    outputs = jax.eval_shape(compiled, trained.variables, spec)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        left = len(source)
        read = eval_batches(source, size, local_positions=local, threads=run.loading.threads)
        for batch in prefetch(read, strategy.shard_batch):
            found = jax.device_get(compiled(trained.variables, batch))
            yield {name: _widened(x)[:left] for name, x in found.items()}
            left -= size

    return Predictions(trained.step, len(source), outputs, batches())


def checked(predict: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], dict[str, Any]]:
    """`predict`, which raises `UserError` while it is traced if it fails or returns no predictions."""

    @functools.wraps(predict)
    def traced(variables: Any, batch: Batch) -> dict[str, Any]:
        size = batch["mask"].shape[0]
        with model_errors(batch):
            found = predict(variables, batch)
        return checked_predictions(found, size)

    return traced


def checked_predictions(found: Any, size: Any) -> dict[str, Any]:
    """The predictions that `predict` returned for `size` examples, a number or a symbol.

    Raises `UserError` unless it is a mapping of names to arrays of numbers, with one row for each example.
    """
    expected = "predict must return a mapping of names to arrays, with one row for each example"
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{expected}, not {kind_of(found) if not isinstance(found, Mapping) else 'an empty one'}")
    for name, x in found.items():
        if not (isinstance(name, str) and name and name.isprintable()):
            raise UserError(f"{expected}; it names one {name!r}, and a printable text is expected")
        if not isinstance(x, jax.Array | np.ndarray | np.generic):
            raise UserError(f"{expected}; prediction {name!r} is {kind_of(x)}")
        if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
            raise UserError(f"{expected}; prediction {name!r} is an array of {x.dtype}, not of numbers")
        if len(x.shape) == 0 or x.shape[0] != size:
            shape = ", ".join(map(str, x.shape))
            raise UserError(f"prediction {name!r} has shape [{shape}]; its first axis must have the {size} examples")
    return dict(found)


def _widened(x: np.ndarray) -> np.ndarray:
    """An array in a dtype that NumPy's files can hold: bfloat16 and float8 become float32, int4 becomes int8."""
    if x.dtype.isbuiltin == 1:
        return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(np.float32)
    return x.astype(np.int8 if jnp.issubdtype(x.dtype, jnp.signedinteger) else np.uint8)
