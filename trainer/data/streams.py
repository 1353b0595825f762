"""Sequences that are read side by side, in order, for models that carry a state from one batch to the next."""

from collections.abc import Mapping

import numpy as np

from trainer.data import ArraySource
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource


class Streams(ArraySource):
    """Pieces of several sequences in memory, which a run never shuffles.

    Example i is piece i // S of stream i modulo S, where S is the number of streams. In training, position k of the run
    is example k modulo the number of examples. So with batches of S examples, row b of each batch continues row b of
    the batch before, and after the last pieces all streams begin again. An example has the given entries, and its
    place: "stream" and "piece", int32.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], *, in_evaluations: RandomAccessSource | None = None) -> None:
        """Checks and flattens the arrays.

        Args:
          arrays: [streams, pieces, …], one for each entry.
          in_evaluations: the source that evaluations read instead, since they carry no state between batches; None for
            the pieces themselves.

        Raises `UserError` if the arrays disagree in streams or pieces, and for an entry named "stream" or "piece".
        """
        lengths = {name: array.shape[:2] for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"streams need arrays [streams, pieces, …] of the same two lengths, not {lengths}")
        ((streams, pieces),) = set(lengths.values())
        place = {"stream": np.tile(np.arange(streams), pieces), "piece": np.repeat(np.arange(pieces), streams)}
        flat = {name: np.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for name, x in arrays.items()}
        if taken := sorted(place.keys() & flat.keys()):
            raise UserError(f"streams have an entry {taken[0]!r} of their own: give that of the data another name")
        super().__init__({**flat, **place})
        self.in_evaluations = in_evaluations

    def order(self, seed: int) -> "InOrder":
        """The order in which a run of any seed reads the examples."""
        del seed
        return InOrder(len(self))


class InOrder:
    """As `trainer.data.order.Order`, in the order of the source, epoch after epoch."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The indices of the examples at `positions`, both int64 [n]."""
        return positions % self.examples
