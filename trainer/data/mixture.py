"""Several sources read as one, in exact proportions."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from trainer.data import BatchSource, block_of, take_encoded
from trainer.data.order import Order
from trainer.data.streams import Streams
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource

_MOST = 10**6  # the largest sum of the weights as whole numbers, so that positions up to 10^12 do not overflow int64


class Mixture(BatchSource):
    """Examples of several sources. In training each source has its share of every stretch of the run.

    By index, a mixture is one source after the other; an evaluation reads it so. In training, let w be the weight of a
    source and W the sum of all, in whole numbers: of examples k·W … (k + 1)·W − 1, exactly w come from this source.
    Each source is read in epochs of its own, in its own order. An epoch of the mixture, the unit of schedules, is as
    many examples as all sources have.
    """

    def __init__(self, parts: Mapping[str, tuple[RandomAccessSource, float]]) -> None:
        """`parts` gives (source, weight) by name.

        Weights are above 0 and need not add up to 1. Raises `UserError` if there is no source, if a source is a
        `Mixture` or `Streams`, for a weight that is not a finite number above 0, and for weights such as 1/3 that need
        more than 6 digits: write 1 and 2 in place of 1/3 and 2/3.

        All sources must have the same entries, shapes and dtypes. `take` raises `UserError` if those of one batch
        differ.
        """
        self.parts = dict(parts)
        if not self.parts:
            raise UserError("a mixture needs a source: Mixture({name: (source, weight)})")
        self._sources = [source for source, _ in self.parts.values()]
        for name, source in zip(self.parts, self._sources, strict=True):
            if isinstance(source, Mixture | Streams):
                kind = type(source).__name__
                raise UserError(f"source {name!r} of the mixture is a {kind}, whose own order a mixture would not keep")
        self._weights = _whole({name: weight for name, (_, weight) in self.parts.items()})
        self._begins = np.cumsum([0, *map(len, self._sources)])
        self.identity = " ".join(one.identity for one in self._sources if isinstance(one, BatchSource) and one.identity)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a mixture of {len(self)}")
        number = int(np.searchsorted(self._begins, index, side="right")) - 1
        return self._sources[number][index - int(self._begins[number])]

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` as one batch."""
        numbers = np.searchsorted(self._begins, indices, side="right") - 1
        batch: dict[str, np.ndarray] = {}
        for number in np.unique(numbers):
            chosen = numbers == number
            own = take_encoded(self._sources[number], indices[chosen] - self._begins[number])
            if not batch:
                batch = {name: np.empty((len(indices), *x.shape[1:]), x.dtype) for name, x in own.items()}
            self._check(int(number), batch, own)
            for name, array in own.items():
                batch[name][chosen] = array
        return batch

    @property
    def is_in_memory(self) -> bool:
        """Whether all sources are arrays in memory."""
        return all(isinstance(source, BatchSource) and source.is_in_memory for source in self._sources)

    def loaded(self, load: Callable[[RandomAccessSource], RandomAccessSource]) -> "Mixture":
        """The mixture of what `load` returns for each source."""
        return Mixture({name: (load(source), weight) for name, (source, weight) in self.parts.items()})

    def order(self, seed: int) -> "MixedOrder":
        """The order in which a run of a seed reads the examples."""
        return MixedOrder(self._sources, self._weights, seed)

    def _check(self, number: int, batch: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> None:
        expected, found = ({name: (x.dtype, x.shape[1:]) for name, x in arrays.items()} for arrays in (batch, own))
        if expected != found:
            name, texts = list(self.parts)[number], [_described(entries) for entries in (found, expected)]
            raise UserError(f"source {name!r} of the mixture has entries {texts[0]}, another has {texts[1]}")


def order_of(source: RandomAccessSource, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The order in which a run of a seed reads a source: a function from positions to indices, both int64 [n]."""
    if isinstance(source, Mixture | Streams):
        return source.order(seed)
    return Order(len(source), seed, block=block_of(source))


class MixedOrder:
    """As `Order`, for the sources of a mixture."""

    def __init__(self, sources: Sequence[RandomAccessSource], weights: Sequence[int], seed: int) -> None:
        self._weights = weights
        self._orders = [Order(len(source), seed, i, block_of(source)) for i, source in enumerate(sources)]
        self._begins = np.cumsum([0, *map(len, sources)])

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The index in the mixture of the example at each of `positions`, both int64 [n]."""
        numbers, drawn = drawn_before(positions, self._weights)
        indices = np.empty_like(positions)
        for number in np.unique(numbers):
            chosen = numbers == number
            indices[chosen] = self._begins[number] + self._orders[number](drawn[chosen])
        return indices


def drawn_before(positions: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each position, and how many examples were drawn from that source before; int64 [n].

    Of the first k positions, the first source has floor(k·w/W + 1/2). The others share the rest in the same way.
    """
    numbers = np.full(positions.shape, len(weights) - 1)
    drawn, unassigned, total = np.zeros_like(positions), np.ones(positions.shape, bool), sum(weights)
    rest = positions  # how many earlier positions went to none of the sources handled so far
    for number, weight in enumerate(weights):
        before, after = ((2 * k * weight + total) // (2 * total) for k in (rest, rest + 1))
        own = unassigned & (after > before)
        numbers[own], drawn[own] = number, before[own]
        unassigned &= ~own
        rest, total = rest - before, total - weight
    return numbers, drawn


def _whole(weights: Mapping[str, float]) -> list[int]:
    """The weights as the smallest whole numbers of the same proportions."""
    found = []
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < float("inf"):
            raise UserError(f"the weight of {name!r} in a mixture is {weight!r}; a number above 0 is expected")
        found.append(Fraction(str(weight)))
    common = np.lcm.reduce([fraction.denominator for fraction in found], dtype=object)
    whole = [int(fraction * common) for fraction in found]
    divisor = np.gcd.reduce(whole, dtype=object)
    whole = [int(number // divisor) for number in whole]
    if sum(whole) > _MOST:
        text = ", ".join(f"{name} {weight}" for name, weight in weights.items())
        most = f"as smallest whole numbers they may add up to {_MOST:,} at most"
        raise UserError(f"the weights of a mixture ({text}) need more than 6 digits: {most}; round them")
    return whole


def _described(entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in entries.items())
