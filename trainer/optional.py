"""Optional methods of an experiment: data, augmentation, predictions, texts, evaluations, reports."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Array, Key

from trainer.errors import UserError
from trainer.experiment import Batch, Experiment, Variables
from trainer.report import ReportWriter

_Offer = TypeVar("_Offer")
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
        """The example as the model gets it.

        Its entries and shapes may differ from those of the source, but must be the same for all examples.

        This runs after the source decoded the example and after the in-memory cache, in threads of this process or in
        worker processes. An `Encoded` entry, such as a JPEG file, comes as it is, because decoding only a crop costs
        less; if it stays in the result, it is decoded afterwards. The generator depends on the run's seed and the
        position of the example in the run: the result is the same on any number of processes, threads and workers, and
        after a resume.

        Args:
          example: arrays and numbers by name, as the source has them. The arrays may not be written to.
          rng: valid during this call only.
        """
        ...


def offered(experiment: Experiment, protocol: type[_Offer]) -> _Offer | None:
    """The experiment if it has the methods of `protocol`, one of those in this module, else None.

    Raises `UserError` if it has something of that name that is no method, such as a setting.
    """
    if not isinstance(experiment, protocol):
        return None
    for name in vars(protocol):
        if not name.startswith("_") and not callable(getattr(experiment, name)):
            kind = f"a {type(getattr(experiment, name)).__name__}"
            raise UserError(f"{type(experiment).__name__}.{name} is {kind}; a method is expected: rename the setting")
    return experiment


def augmentation(experiment: Experiment) -> Augment | None:
    """The method `augment` of an experiment; None if it has none."""
    found = offered(experiment, Augments)
    return None if found is None else found.augment


@runtime_checkable
class Predicts(Protocol):
    """An experiment whose model makes predictions, for the command `predict` and for `Trained.predict`."""

    def predict(self, variables: Variables, batch: Batch) -> Mapping[str, Array]:
        """Predictions by name, such as "label" or "probabilities", one for each example: arrays [B, …].

        It runs under `jax.jit`. `batch` has the entries of the data, and a mask except in `Trained.predict`.
        """
        ...


@runtime_checkable
class Generates(Protocol):
    """An experiment whose model writes texts, for the command `generate`."""

    def generate(
        self,
        variables: Variables,
        prompt: str,
        length: int,
        *,
        key: Key[Array, ""],
        temperature: float,
        top_k: int | None,
    ) -> str:
        """The prompt and what follows it, as one text.

        Args:
          variables: the parameters and the collections, on the devices.
          prompt: the text to go on from; `UserError` if the model cannot begin with it.
          length: how many tokens to draw.
          key: from which they are drawn.
          temperature: divides the logits; 0 for the likeliest token.
          top_k: how many of the likeliest tokens are drawn from; None for all.
        """
        ...


@runtime_checkable
class Evaluates(Protocol):
    """An experiment with evaluations that are no sum over examples, such as generation or nearest neighbours."""

    def evaluate(self, name: str, variables: Variables, batches: Iterator[Batch]) -> Mapping[str, Any] | None:
        """Metrics by name, numbers or objects of `trainer.metrics`; None for the usual evaluation by `loss`.

        All processes call this together and must return the same.

        Args:
          name: the name of the evaluation: a key of `Run.evaluations`, or the split for the main evaluation.
          variables: the parameters to evaluate and the collections, on the devices.
          batches: the batches of the split on the devices, in order. They need not all be taken.
        """
        ...


@runtime_checkable
class Reports(Protocol):
    """An experiment that shows what its model does, in pictures or texts."""

    def report(self, step: int, variables: Variables, writer: ReportWriter) -> None:
        """Writes images, texts, histograms and figures with `writer`, to TensorBoard and to WORKDIR/reports/STEP.

        This is called after each main evaluation, by all processes together; only one of them writes. A file
        that cannot be written does not stop the run.

        Args:
          step: steps made.
          variables: the parameters that were evaluated and the collections, on the devices.
          writer: also has the rows of `metrics.jsonl`.
        """
        ...
