"""The step to which each cell is trained: the end of its run, or a rung of successive halving.

Successive halving (Jamieson and Talwalkar, AISTATS 2016, arXiv:1502.07943) trains all cells for a few steps, keeps the
best 1/η of them, trains these η times as long, and so on. A cell that goes on continues from its checkpoint; schedules
are those of the whole run, so a cell that reaches the end is, bit for bit, the run that was never stopped.
"""

from collections.abc import Callable, Sequence

import numpy as np

from trainer.errors import UserError
from trainer.sweep.cells import Cell, groups_of

# (cell, step) → the metric after that step; NaN if the cell failed for good; None if it is not there yet.
Value = Callable[[Cell, int], float | None]


def rungs(total_steps: int, groups: int, eta: int, first: int | None = None) -> list[int]:
    """The steps after which groups are compared, ascending; the last one is the end of the run.

    Args:
      total_steps: of the run.
      groups: how many begin.
      eta: 1/eta of the groups go on, at least one group, and the steps grow by this factor; 2 or more.
      first: the step of the first rung. None: total_steps // eta**k, at least 1. Here k is how often the number of
        groups can be divided by `eta` until one is left.
    """
    times = 0
    while eta ** (times + 1) <= groups:
        times += 1
    step = max(total_steps // eta**times, 1) if first is None else first
    found = []
    while step < total_steps:
        found.append(step)
        step *= eta
    return [*found, total_steps]


def targets(
    cells: Sequence[Cell], value: Value, mode: str, eta: int | None = None, first: int | None = None
) -> dict[str, int]:
    """The step to which each cell is to be trained, by name, as far as the results until now tell.

    All cells of a rung are compared together, so the answer does not depend on the order in which they end. Without
    `eta`, all are trained to the end. Groups are ranked by the mean over their cells; one with a cell that failed comes
    last, and of equal ones the first in order goes on.
    """
    found = {cell.name: cell.run.total_steps for cell in cells}
    if eta is None:
        return found
    alive = list(groups_of(cells).values())
    total_steps = cells[0].run.total_steps
    for rung in rungs(total_steps, len(alive), eta, first):
        step = total_steps if len(alive) == 1 else rung  # a group that is alone has nothing to be compared with
        members = [cell for group in alive for cell in group]
        found |= dict.fromkeys((cell.name for cell in members), step)
        values = {cell.name: number for cell in members if (number := value(cell, step)) is not None}
        if len(values) < len(members):
            break
        means = [float(np.mean([values[cell.name] for cell in group])) for group in alive]
        order = np.argsort([-mean if mode == "max" else mean for mean in means], stable=True)  # NaN comes last
        alive = [alive[i] for i in sorted(order[: max(len(alive) // eta, 1)])]
    return found


def check_halving(cells: Sequence[Cell], eta: int, first: int | None) -> None:
    """Raises `UserError` unless successive halving can compare these cells."""
    if eta < 2:
        raise UserError(f"--halving is {eta}; it must be at least 2")
    lengths = {cell.run.total_steps for cell in cells}
    if len(lengths) > 1:
        raise UserError(f"--halving compares runs of one length; total_steps is {', '.join(map(str, sorted(lengths)))}")
    if first is not None and not 1 <= first <= min(lengths):
        raise UserError(f"--first-rung is {first}; a step from 1 to {min(lengths)}, the end of the run, is expected")
