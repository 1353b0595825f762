"""What an experiment may offer besides the protocol: prepared data, augmentation, predictions, a report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from trainer.experiment import Batch, Experiment, Variables

Augment = Callable[[dict[str, Any], np.random.Generator], Mapping[str, Any]]


@runtime_checkable
class Prepares(Protocol):
    """An experiment whose data must be written to disk once, by `python -m trainer prepare`."""

    def prepare(self) -> None:
        """Writes the data that `source` reads. A second call is quick and changes nothing."""
        ...


@runtime_checkable
class Augments(Protocol):
    """An experiment whose training examples are changed at random on the host, each time that they are read."""

    def augment(self, example: dict[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """The example as the model gets it; it may have other entries and shapes, but all examples the same ones.

        This runs after decoding and after the in-memory cache, in threads of this process or in worker processes. The
        generator depends on the run's seed and the position of the example in the run: the result is the same on any
        number of processes, threads and workers, and after a resume.

        Args:
          example: arrays and numbers by name, as the source has them. The arrays may not be written to.
          rng: valid during this call only.
        """
        ...


def augmentation(experiment: Experiment) -> Augment | None:
    """The method `augment` of an experiment; None if it has none."""
    return experiment.augment if isinstance(experiment, Augments) else None


@runtime_checkable
class Predicts(Protocol):
    """An experiment whose model makes predictions, for the command `predict` and for `Trained.predict`."""

    def predict(self, variables: Variables, batch: Batch) -> Mapping[str, Array]:
        """Predictions by name, such as "label" or "probabilities", one for each example: arrays [B, …].

        It runs under `jax.jit`. `batch` has the entries of the data, and perhaps no mask.
        """
        ...


@runtime_checkable
class Reports(Protocol):
    """An experiment that writes files about a finished run, such as pictures."""

    def report(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Sequence[Path]:
        """Writes files, over those of an earlier call, and returns their paths.

        The command `train` calls this when the run is finished; the function `train` does not.

        Args:
          folder: the workdir.
          rows: the rows of `metrics.jsonl`: each has "step" and metrics by names such as "train/loss".
        """
        ...
