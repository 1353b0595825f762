"""A sweep, as `get_sweep()` of a config file returns it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class Sweep:
    """Settings that vary, by their paths, and how the runs are compared.

    `python -m trainer sweep` has a flag for each field, which comes before it:

        def get_sweep() -> Sweep:
            return Sweep(grid={"optimizer.schedule.peak": (1e-3, 3e-3), "seed": (0, 1, 2)})
    """

    grid: Mapping[str, str | Sequence[Any]] = dataclasses.field(default_factory=dict)
    """Values by path, in a tuple or as the text of a flag, such as "1e-3,3e-3". Every combination is a cell."""
    random: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Range or choices of random draws, by path: "LOW:HIGH", "LOW:HIGH:log", or values such as "32,64,128".
    A drawn number has 4 digits; that of an integer setting is an integer from LOW to HIGH."""
    trials: int = 1  # number of random draws; each is combined with the whole grid
    search_seed: int = 0  # seed of the draws; draw i does not depend on the number of draws, nor on the other paths
    metric: str | None = None
    """Evaluation metric by which cells are compared, such as "test/accuracy". None: `checkpoint.best_metric` of the run
    or, if it has none, the loss of its main evaluation."""
    mode: str | None = None
    """Whether the best value is the largest, `max`, or the smallest, `min`. None: `checkpoint.best_mode` for
    `best_metric`, and `min` for a loss."""
    halving: int | None = None
    """Successive halving: one in so many cells goes on at each rung, and its steps grow by this factor. 2 or more; None
    trains every cell to its end. Cells that differ only in their seed go on or stop together."""
    first_rung: int | None = None
    """Steps of the first rung. None: such that at least one cell reaches the end of the run."""
