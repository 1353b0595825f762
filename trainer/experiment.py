"""What a task must offer to be trained: the `Experiment` protocol, its batches, and metrics as sums."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

Batch = Mapping[str, Any]  # name → array whose first axis is the example
Variables = Mapping[str, Any]  # Linen's: "params", and mutable collections such as "batch_stats"
Collections = Mapping[str, Any]  # the variables without "params"


_Numbers = Num[Array, "*shape"] | Bool[Array, "*shape"]


class Mean(NamedTuple):
    """A mean that is not yet divided: sums can be added over microbatches, replicas and batches without bias.

    Attributes:
      total: scalar sum of the weighted values.
      weight: scalar sum of the weights, 0 or more.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def of(cls, values: _Numbers, weights: _Numbers) -> "Mean":
        """The mean of `values` under `weights` of the same shape, summed in float32 or better."""
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        weights = weights.astype(dtype)
        # A masked row may hold anything, so its value is replaced and not multiplied: 0·inf would be NaN.
        values = jnp.where(weights == 0, 0, values.astype(dtype))
        return cls(jnp.sum(values * weights), jnp.sum(weights))


Metrics = Mapping[str, Mean]


@runtime_checkable
class RandomAccessSource(Protocol):
    """Examples by index, as Grain, PyTorch and `tfds.data_source` have them.

    An example is a mapping from name to array or number, alike in names, shapes and dtypes over the whole source.
    A `__getitems__(indices)` that returns many examples at once is used where there is one.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class Experiment(Protocol):
    """A task: a dataclass whose fields are its hyper-parameters.

    A batch has the example's own entries, stacked along a new first axis of size B, and two that the harness adds:

    - `mask`, float32 [B]: 1 for an example, 0 for a row that only fills up the last batch of an evaluation;
    - `row_key`, PRNG keys [B], while training only: one key for each row of the global batch, whatever the number of
      devices and microbatches. Random augmentation draws from these.
    """

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh variables. Runs under `jax.jit`; the batch holds zeros in the right shapes."""
        ...

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool, axis_name: str | None
    ) -> tuple[Metrics, Collections]:
        """Metrics of one batch, "loss" among them, and the mutable collections as they are afterwards.

        Args:
          variables: "params" and the collections.
          batch: as above.
          key: a key for this step, for dropout and the like.
          train: whether this is a training step.
          axis_name: None when the arrays are global (`Sharded`); under `Pmapped` the name of the replica axis, to be
            handed to `nn.BatchNorm(axis_name=…)`.
        """
        ...

    def source(self, split: str) -> RandomAccessSource:
        """The examples of a split; raises `trainer.errors.NotPreparedError` if they are not on disk."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """An experiment whose data must be written to disk once, by `python -m trainer prepare`."""

    def prepare(self) -> None:
        """Writes what `source` reads. A second call is quick and changes nothing."""
        ...


@runtime_checkable
class Reports(Protocol):
    """An experiment that shows what a run came to, in pictures for example."""

    def report(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Sequence[Path]:
        """Writes files and returns them; those of an earlier call are replaced.

        The command `train` calls this when the run is finished; from Python, `train` does not.

        Args:
          folder: the workdir.
          rows: those of `metrics.jsonl`, each with "step" and the metrics of that step by names such as "train/loss".
        """
        ...
