"""The rungs of successive halving, and the cells that go on at each."""

import math
from typing import Any

import pytest

from tests.tasks import make_run
from trainer import config
from trainer.commands.arguments import override
from trainer.errors import UserError
from trainer.sweep.cells import Cell, make_cells
from trainer.sweep.halving import check_halving, rungs, targets


def cells_of(peaks: int, seeds: int = 1, total_steps: int = 900) -> list[Cell]:
    grid = {"optimizer.schedule.peak": [(i + 1) / 10 for i in range(peaks)], "seed": range(seeds)}
    return make_cells(make_run(total_steps), config.Sweep(grid=grid), override)[0]


@pytest.mark.parametrize(
    ("groups", "eta", "first", "expected"),
    [
        (9, 3, None, [100, 300, 900]),
        (27, 3, None, [33, 99, 297, 891, 900]),  # 900 is no power of three times a whole number
        (8, 2, None, [112, 224, 448, 896, 900]),
        (8, 3, None, [300, 900]),
        (1, 3, None, [900]),
        (9, 3, 50, [50, 150, 450, 900]),
        (9, 3, 900, [900]),
        (5000, 4, None, [1, 4, 16, 64, 256, 900]),
    ],
)
def test_rungs_grow_by_the_factor_up_to_the_end(groups, eta, first, expected):
    assert rungs(900, groups, eta, first) == expected


def run_all(cells: list[Cell], score: Any, **settings: Any) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Trains as told until nothing is left; the final targets, and those in between."""
    done, history = dict[tuple[str, int], float](), []
    while True:
        steps = targets(cells, lambda cell, step: done.get((cell.name, step)), **settings)
        left = [cell for cell in cells if (cell.name, steps[cell.name]) not in done]
        if not left:
            return steps, history
        history.append(steps)
        for cell in left:
            done[cell.name, steps[cell.name]] = score(cell, steps[cell.name])


def peak(cell: Cell) -> float:
    return cell.run.optimizer.schedule.peak


def test_one_in_three_goes_on_at_each_rung_and_the_best_reaches_the_end():
    cells = cells_of(9)
    steps, history = run_all(cells, lambda cell, step: peak(cell), mode="max", eta=3)
    assert list(steps.values()) == [100] * 6 + [300] * 2 + [900]
    assert [len(set(one.values())) for one in history] == [1, 2, 3]
    steps, _ = run_all(cells, lambda cell, step: peak(cell), mode="min", eta=3)
    assert list(steps.values()) == [900] + [300] * 2 + [100] * 6


def test_a_group_that_is_alone_goes_to_the_end_at_once():
    steps, history = run_all(cells_of(4), lambda cell, step: peak(cell), mode="max", eta=2, first=10)
    assert list(steps.values()) == [10, 10, 20, 900]
    assert len(history) == 3


def test_the_metric_is_that_of_the_rung():
    def score(cell: Cell, step: int) -> float:  # the last ones are the best in the beginning only
        return peak(cell) if step == 100 else -peak(cell)

    steps, _ = run_all(cells_of(9), score, mode="max", eta=3)
    assert list(steps.values()) == [100] * 6 + [900, 300, 300]


def test_groups_go_on_by_their_mean_with_all_their_seeds():
    def score(cell: Cell, step: int) -> float:  # the first group has the best cell, the last the best mean
        return {0.1: (9, 0), 0.2: (1, 1), 0.3: (5, 5)}[peak(cell)][cell.run.seed]

    steps, _ = run_all(cells_of(3, seeds=2), score, mode="max", eta=3)
    assert list(steps.values()) == [300, 300, 300, 300, 900, 900]


def test_a_group_with_a_cell_that_failed_comes_last():
    def score(cell: Cell, step: int) -> float:
        return math.nan if (peak(cell), cell.run.seed) == (0.3, 1) else peak(cell)

    steps, _ = run_all(cells_of(3, seeds=2), score, mode="max", eta=3)
    assert list(steps.values()) == [300, 300, 900, 900, 300, 300]


def test_of_equal_groups_the_first_goes_on():
    steps, _ = run_all(cells_of(3), lambda cell, step: 1.0, mode="max", eta=3)
    assert list(steps.values()) == [900, 300, 300]


def test_nothing_goes_on_before_the_whole_rung_is_there():
    cells = cells_of(3)
    steps = targets(cells, lambda cell, step: None if cell is cells[2] else 1.0, "max", 3)
    assert list(steps.values()) == [300] * 3


def test_without_halving_all_go_to_the_end():
    assert set(targets(cells_of(3), lambda cell, step: None, "max").values()) == {900}


@pytest.mark.parametrize(
    ("eta", "first", "message"),
    [
        (1, None, "--halving is 1; it must be at least 2"),
        (3, 0, "--first-rung is 0; a step from 1 to 900, the end of the run, is expected"),
        (3, 901, "--first-rung is 901; a step from 1 to 900"),
    ],
)
def test_a_mistake_is_one_line(eta, first, message):
    with pytest.raises(UserError) as error:
        check_halving(cells_of(3), eta, first)
    assert str(error.value).startswith(message)


def test_runs_of_different_lengths_are_not_compared():
    run = make_run(20, optimizer=config.Optimizer())
    cells, _ = make_cells(run, config.Sweep(grid={"total_steps": "20,30"}), override)
    with pytest.raises(UserError, match=r"--halving compares runs of one length; total_steps is 20, 30"):
        check_halving(cells, 2, None)
