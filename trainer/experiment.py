"""The protocol of a task, `Experiment`, with its batches and the axis over which its model may average."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Key

from trainer.metrics import Metrics

Batch = Mapping[str, Any]  # name → array whose first axis is the example
Variables = Mapping[str, Any]  # Linen's: "params", and mutable collections such as "batch_stats"
Collections = Mapping[str, Any]  # the variables without "params"


_replica_axis: ContextVar[str | None] = ContextVar("replica_axis", default=None)


def replica_axis() -> str | None:
    """The axis over which a model may average, as in `nn.BatchNorm(axis_name=replica_axis())`.

    Under `jax.pmap` each replica sees only its share of the batch, and this is the name of the pmapped axis while a
    step is traced. Otherwise arrays are global, and it is None.
    """
    return _replica_axis.get()


@contextmanager
def set_replica_axis(name: str | None) -> Iterator[None]:
    """Sets the result of `replica_axis` while a step is traced."""
    token = _replica_axis.set(name)
    try:
        yield
    finally:
        _replica_axis.reset(token)


@runtime_checkable
class RandomAccessSource(Protocol):
    """Examples by index, as Grain, PyTorch and `tfds.data_source` have them.

    An example is a mapping from name to array or number, alike in names, shapes and dtypes over the whole source.
    If a source has `__getitems__(indices)`, which returns many examples at once, the harness calls that instead.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class Experiment(Protocol):
    """A task: a dataclass whose fields are its hyper-parameters.

    A batch has the example's own entries, stacked along a new first axis of size B, and two that the harness adds:

    - `mask`, float32 [B]: 1 for an example, 0 for padding of the last batch of an evaluation;
    - `example_key`, PRNG keys [B], while training only: one key for each example, from which random augmentation draws.
      The keys do not depend on the number of devices or microbatches.
    """

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh variables. Runs under `jax.jit`; the batch holds zeros in the right shapes."""
        ...

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics of one microbatch, "loss" among them, and the mutable collections after it.

        The harness drops the sown collection "intermediates". This method must pop every other sown collection, such as
        "losses", and add it to the loss; `init` must leave it out.

        Args:
          variables: "params" and the collections.
          batch: as above.
          key: for dropout, for example. In training it differs between steps, microbatches and, under `pmap`, replicas.
          train: whether this is a training step.
        """
        ...

    def source(self, split: str) -> RandomAccessSource:
        """The examples of a split; raises `trainer.errors.NotPreparedError` if they are not on disk."""
        ...
