"""Means, deviations and Welch's test against SciPy; the table, the CSV file and the plot."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from tests.tasks import make_run
from trainer import config
from trainer.commands.arguments import override
from trainer.errors import UserError
from trainer.sweep import report
from trainer.sweep.cells import Cell, make_cells
from trainer.sweep.results import Failure, Results, exit_code, metric_and_mode
from trainer.sweep.statistics import summarize, welch

PEAK = "optimizer.schedule.peak"
STEPS = 20


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (10, 4)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_welch_is_that_of_scipy(sizes, scale):
    rng = np.random.default_rng(sizes[0])
    a, b = rng.normal(0.9, 0.01, sizes[0]) * scale, rng.normal(0.92, 0.05, sizes[1]) * scale
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    found = welch(summarize(list(a)), summarize(list(b)))
    assert found is not None
    assert found.t == pytest.approx(expected.statistic, rel=1e-9)
    assert found.freedom == pytest.approx(expected.df, rel=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_welch_of_means_far_apart_keeps_its_digits():
    a, b = [1.0, 1.0001, 0.9999, 1.0002, 1.0], [2.0, 2.0001, 1.9999, 2.0002, 2.0]
    found = welch(summarize(a), summarize(b))
    assert found is not None
    assert found.p == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-6)
    assert 0 < found.p < 1e-20


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_there_is_no_test_without_a_second_value_or_without_a_difference(a, b):
    assert welch(summarize(a), summarize(b)) is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.9861, 0.9881, 0.9843], "0.9862 ± 0.0019"),
        ([120.0, 100.0], "110 ± 14"),
        ([0.5, 0.5], "0.5 ± 0"),
        ([0.123456789], "0.123457"),
        ([1e-5, 3e-5], "0.000020 ± 0.000014"),
    ],
)
def test_a_summary_shows_two_digits_of_its_deviation(values, text):
    summary = summarize(values)
    assert str(summary) == text
    assert summary.mean == pytest.approx(np.mean(values))
    assert len(values) == 1 or summary.deviation == pytest.approx(np.std(values, ddof=1))


def sweep_of(folder: Path, peaks: str = "0.1,0.2,0.3", seeds: str = "0,1,2") -> tuple[list[Cell], Results]:
    grid = {PEAK: peaks, "seed": seeds, "optimizer.name": "adam"}
    cells, _ = make_cells(make_run(STEPS), config.Sweep(grid=grid), override)
    for cell in cells:
        (folder / cell.name / ".sweep").mkdir(parents=True)
    return cells, Results(folder, "test/accuracy", "max")


def done(results: Results, cell: Cell, step: int = STEPS, **metrics: Any) -> None:
    """Writes the files of a cell that was trained and evaluated."""
    row = {"step": step, "train/loss": 1.0} | {f"test/{name}": value for name, value in metrics.items()}
    with (results.workdir(cell) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    results.write_done(cell, step)


def shown(cells: list[Cell], results: Results, steps: int | dict[str, int] = STEPS) -> tuple[Any, Any, str]:
    targets = steps if isinstance(steps, dict) else {cell.name: steps for cell in cells}
    found = report.outcomes(cells, results, targets)
    groups = report.ranked(found, results)
    return found, groups, report.table_text(groups, results)


def numbers_of(cells: list[Cell]) -> dict[str, float]:
    rng = np.random.default_rng(0)
    return {cell.name: cell.run.optimizer.schedule.peak + rng.normal(0, 0.01) for cell in cells}


def test_the_table_ranks_the_means_and_tests_the_first_two(tmp_path):
    cells, results = sweep_of(tmp_path)
    numbers = numbers_of(cells)
    for cell in cells:
        done(results, cell, accuracy=numbers[cell.name], loss=1.0)
    _, groups, text = shown(cells, results)
    assert [group.settings[PEAK] for group in groups] == [0.3, 0.2, 0.1]
    best, second = ([numbers[c.name] for c in cells if c.settings[PEAK] == peak] for peak in (0.3, 0.2))
    expected = scipy.stats.ttest_ind(best, second, equal_var=False)
    assert f"p = {expected.pvalue:.2g}\n" in text
    assert f"t = {expected.statistic:.3g}, degrees of freedom = {expected.df:.3g}" in text
    header, first, *_ = text.splitlines()
    assert header.split() == ["optimizer.name", PEAK, "seeds", "test/accuracy", "steps", "cells"]
    assert first.split() == [
        "adam",
        "0.3",
        "3",
        *f"{np.mean(best):.3f} ± {np.std(best, ddof=1):.3f}".split(),
        "20",
        "3",
        "done",
    ]
    assert f"best: optimizer.name=adam, {PEAK}=0.3: test/accuracy" in text
    assert f"second best, optimizer.name=adam, {PEAK}=0.2: {np.mean(best) - np.mean(second):+.4g}" in text


def test_the_smallest_is_the_best_of_a_loss(tmp_path):
    cells, results = sweep_of(tmp_path, seeds="0")
    for cell in cells:
        done(results, cell, accuracy=1.0, loss=cell.settings[PEAK])
    _, groups, text = shown(cells, Results(tmp_path, "test/loss", "min"))
    assert [group.settings[PEAK] for group in groups] == [0.1, 0.2, 0.3]
    assert "no test, which takes two seeds of each" in text


def test_failures_are_shown_and_a_group_with_one_comes_behind(tmp_path):
    cells, results = sweep_of(tmp_path, seeds="0,1")
    numbers = numbers_of(cells)
    for cell in cells[:-1]:
        done(results, cell, accuracy=numbers[cell.name])
    results.write_failure(cells[-1], Failure(1, "the loss of step 3 is nan", True, "x"))
    _, groups, text = shown(cells, results)
    assert [group.settings[PEAK] for group in groups] == [0.2, 0.1, 0.3]
    assert "1 done, 1 diverged" in text
    assert (
        f"diverged: {cells[-1].name}: exit code 1: the loss of step 3 is nan ({tmp_path / cells[-1].name}/log.txt)"
        in text
    )


def test_cells_that_have_not_run_are_open(tmp_path):
    cells, results = sweep_of(tmp_path, seeds="0")
    _, _, text = shown(cells, results)
    assert text.count("1 open") == 3
    assert text.endswith("no cell has been evaluated\n")
    done(results, cells[0], accuracy=0.5)
    assert (
        "best: optimizer.name=adam, optimizer.schedule.peak=0.1: test/accuracy 0.5 (1 seed" in shown(cells, results)[2]
    )


def test_a_cell_that_got_further_comes_first_though_its_metric_is_worse(tmp_path):
    cells, results = sweep_of(tmp_path, seeds="0")
    steps = {cells[0].name: STEPS, cells[1].name: 5, cells[2].name: 5}
    for cell in cells:
        done(results, cell, steps[cell.name], accuracy=cell.settings[PEAK])
    found, groups, text = shown(cells, results, steps)
    assert [group.settings[PEAK] for group in groups] == [0.1, 0.3, 0.2]
    assert [outcome.status for outcome in found] == ["done", "stopped", "stopped"]
    assert "against" not in text  # the others were not trained as long


def test_a_metric_that_is_not_there_is_named_with_the_nearest(tmp_path):
    cells, _ = sweep_of(tmp_path, seeds="0")
    results = Results(tmp_path, "test/acuracy", "max")
    done(results, cells[0], accuracy=0.5, loss=1.0)
    with pytest.raises(UserError, match=r"metric 'test/acuracy' is not evaluated; did you mean 'test/accuracy'\?"):
        shown(cells, results)


def test_an_evaluation_may_have_a_name_that_begins_with_step(tmp_path):
    cells, _ = sweep_of(tmp_path, seeds="0")
    results = Results(tmp_path, "steps_long/loss", "min")
    row = {"step": STEPS, "train/loss": 1.0, "steps_long/loss": 0.5, "step.2/loss": 0.25}
    (results.workdir(cells[0]) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    results.write_done(cells[0], STEPS)
    assert results.value(cells[0], STEPS) == 0.5
    assert results.metrics(cells[0], STEPS) == {"steps_long/loss": 0.5, "step.2/loss": 0.25}


def test_csv_has_every_cell_with_all_digits(tmp_path):
    cells, results = sweep_of(tmp_path, seeds="0,1")
    numbers = numbers_of(cells)
    for cell in cells[:-2]:
        done(results, cell, accuracy=numbers[cell.name], loss=None)
    results.write_failure(cells[-1], Failure(137, "killed by SIGKILL", False, "x"))
    rows = list(csv.DictReader(io.StringIO(report.csv_text(shown(cells, results)[0]))))
    assert [row["cell"] for row in rows] == [cell.name for cell in cells]
    assert [float(row["test/accuracy"]) for row in rows[:-2]] == [numbers[cell.name] for cell in cells[:-2]]
    assert [float(row[PEAK]) for row in rows] == [cell.settings[PEAK] for cell in cells]
    assert [(row["status"], row["exit_code"], row["step"]) for row in rows] == [("done", "0", "20")] * 4 + [
        ("open", "", ""),
        ("failed", "137", ""),
    ]
    assert {row["test/loss"] for row in rows} == {""}  # null is no number


def test_the_plot_has_means_with_bars_of_their_deviations(tmp_path):
    cells, results = sweep_of(tmp_path)
    numbers = numbers_of(cells)
    for cell in cells:
        done(results, cell, accuracy=numbers[cell.name])
    groups = shown(cells, results)[1]
    (axes,) = report.figure(groups, results).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (PEAK, "test/accuracy")
    (line,) = [line for line in axes.lines if line.get_marker() == "o"]
    by_peak = sorted(groups, key=lambda group: group.settings[PEAK])
    assert list(line.get_xdata()) == [0.1, 0.2, 0.3]
    assert list(line.get_ydata()) == pytest.approx([group.summary.mean for group in by_peak])
    (bars,) = axes.collections
    heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert heights == pytest.approx([2 * group.summary.deviation for group in by_peak])


def test_the_plot_of_a_wide_range_is_logarithmic(tmp_path):
    cells, _ = make_cells(make_run(STEPS), config.Sweep(grid={PEAK: "1e-4,1e-3,1e-2"}), override)
    results = Results(tmp_path, "test/accuracy", "max")
    for cell in cells:
        (tmp_path / cell.name / ".sweep").mkdir(parents=True)
        done(results, cell, accuracy=cell.settings[PEAK])
    (axes,) = report.figure(shown(cells, results)[1], results).axes
    assert axes.get_xscale() == "log"
    line = next(line for line in axes.lines if line.get_marker() == "o")
    assert list(line.get_xdata()) == [1e-4, 1e-3, 1e-2]


def test_the_plot_of_a_halving_shows_curves(tmp_path):
    cells, results = sweep_of(tmp_path, seeds="0")
    steps = {cells[0].name: STEPS, cells[1].name: 5, cells[2].name: 5}
    for cell in cells:
        for step in sorted({5, steps[cell.name]}):
            done(results, cell, step, accuracy=step * cell.settings[PEAK])
    (axes,) = report.figure(shown(cells, results, steps)[1], results).axes
    assert axes.get_xlabel() == "step"
    assert sorted(tuple(line.get_xdata()) for line in axes.lines) == [(5,), (5,), (5, 20)]


@pytest.mark.parametrize(
    ("given", "best", "expected"),
    [
        ((None, None), None, ("test/loss", "min")),
        ((None, None), ("test/accuracy", "max"), ("test/accuracy", "max")),
        ((None, "min"), ("test/accuracy", "max"), ("test/accuracy", "min")),
        (("test/accuracy", "max"), None, ("test/accuracy", "max")),
        (("test/loss", None), ("test/accuracy", "max"), ("test/loss", "min")),
    ],
)
def test_metric_and_mode_are_those_of_the_run_unless_they_are_given(given, best, expected):
    run = make_run(STEPS)
    if best:
        run.checkpoint.best_metric, run.checkpoint.best_mode = best
    assert metric_and_mode(run, *given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tets/loss", None), "metric 'tets/loss' is of no evaluation of the run; did you mean 'test/loss'? (known: "),
        (("accuracy", None), "metric 'accuracy' is of no evaluation of the run"),
        (("test/accuracy", None), "is more test/accuracy better? give --mode=max, or else --mode=min"),
        (("test/accuracy", "maximum"), "--mode is 'maximum'; did you mean 'max'?"),
    ],
)
def test_a_wrong_metric_or_mode_is_one_line(given, message):
    with pytest.raises(UserError) as error:
        metric_and_mode(make_run(STEPS), *given)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("codes", "expected"), [([], 0), ([1, 1], 1), ([2], 2), ([1, 2], 1), ([137], 137)])
def test_the_exit_code_is_that_of_the_failures_if_they_agree(codes, expected):
    assert exit_code([Failure(code, "", False, "") for code in codes]) == expected


def test_a_summary_of_nothing_has_no_mean():
    assert math.isnan(summarize([]).mean)
