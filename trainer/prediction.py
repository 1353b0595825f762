"""Predictions of a trained model for every example of a split, sharded as an evaluation is."""

import dataclasses
from collections.abc import Iterator
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np

from trainer import config, distributed
from trainer.data import batch_spec, eval_source, open_source
from trainer.data.memory import load_into_memory
from trainer.data.stream import eval_batches, prefetch
from trainer.errors import UserError
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
    batches: Iterator[dict[str, np.ndarray]]  # in the order of the source; every process sees all examples


def predict_split(
    workdir: str | PathLike[str], run: config.Run | None = None, *, step: int | str = "latest", split: str | None = None
) -> Predictions:
    """Predicts every example of a split once, on any devices. All processes call it.

    Arguments are those of `evaluate`; `max_examples` of an evaluation does not count here. Raises `UserError` if the
    experiment makes no predictions, if a batch size of the run is no multiple of the batch shards, and for what
    `evaluate` does.
    """
    folder = Workdir(workdir)
    with distributed.collective_errors("the run"):
        run = run_of(folder, run)
        folder.check_run(run)
        predict = predictor(run.experiment).predict
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

    def batches() -> Iterator[dict[str, np.ndarray]]:
        left = len(source)
        read = eval_batches(source, size, local_positions=local, threads=run.loading.threads)
        for batch in prefetch(read, strategy.shard_batch):
            found = jax.device_get(compiled(trained.variables, batch))
            yield {name: _whole(name, x, size)[:left] for name, x in found.items()}
            left -= size

    return Predictions(trained.step, len(source), batches())


def _whole(name: str, x: np.ndarray, size: int) -> np.ndarray:
    """An array of predictions on the host; bfloat16, which NumPy's files cannot hold, becomes float32."""
    if np.shape(x)[:1] != (size,):
        shape = list(np.shape(x))
        raise UserError(f"prediction {name!r} has shape {shape}; its first axis must have the {size} examples")
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
