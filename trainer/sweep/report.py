"""The results of a sweep: a table with means over seeds and a test of the best, a CSV file, and a plot."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trainer.observe import table
from trainer.sweep.cells import SEED, Cell, groups_of
from trainer.sweep.results import LOG, Failure, Results
from trainer.sweep.statistics import Summary, summarize, welch


class Outcome(NamedTuple):
    """How a cell stands."""

    cell: Cell
    step: int  # to which it was to be trained, less than the end of its run where successive halving stopped it
    metrics: Mapping[str, Any] | None  # of its evaluation after this step; None if it did not get there
    failure: Failure | None

    @property
    def status(self) -> str:
        """One word: done, stopped, diverged, failed or open.

        `stopped`: the cell has reached a rung of successive halving, before the end of its run. It may still go on
        while other cells of the rung train.
        """
        if self.metrics is not None:
            return "done" if self.step == self.cell.run.total_steps else "stopped"
        if self.failure is None:
            return "open"
        return "diverged" if self.failure.diverged else "failed"


class Group(NamedTuple):
    """Cells that differ in their seed only."""

    settings: Mapping[str, Any]
    outcomes: Sequence[Outcome]
    summary: Summary  # of the metric, over the cells that have it
    step: int

    @property
    def name(self) -> str:
        """The settings in a text."""
        return ", ".join(f"{path}={value}" for path, value in self.settings.items()) or "all cells"


def outcomes(cells: Sequence[Cell], results: Results, targets: Mapping[str, int]) -> list[Outcome]:
    """How each cell stands, with the step to which it was to be trained."""
    return [
        Outcome(cell, step, results.metrics(cell, step), results.failure(cell))
        for cell in cells
        for step in [targets[cell.name]]
    ]


def ranked(found: Sequence[Outcome], results: Results) -> list[Group]:
    """The groups, best first: those that got further, and of these the better mean. Raises `UserError`.

    A group of which a cell failed comes behind the others, as in `halving`: the mean of the rest would flatter it.
    """
    by_name = {outcome.cell.name: outcome for outcome in found}
    groups = []
    for settings, cells in groups_of([outcome.cell for outcome in found]).items():
        own = [by_name[cell.name] for cell in cells]
        numbers = [results.value(one.cell, one.step) for one in own if one.metrics is not None]
        finite = [number for number in numbers if number is not None and math.isfinite(number)]
        groups.append(Group(dict(settings), own, summarize(finite), own[0].step))
    sign = -1 if results.mode == "max" else 1

    def key(group: Group) -> tuple[bool, bool, int, float]:
        has_failed = any(outcome.status in ("diverged", "failed") for outcome in group.outcomes)
        mean = sign * group.summary.mean if group.summary.count else 0.0
        return not group.summary.count, has_failed, -group.step, mean

    return sorted(groups, key=key)


def table_text(groups: Sequence[Group], results: Results) -> str:
    """A row for each group, best first; the failures; and the test of the best against the second best."""
    paths = list(groups[0].settings)
    rows = []
    for group in groups:
        states = [outcome.status for outcome in group.outcomes]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        value = str(group.summary) if group.summary.count else "-"
        rows.append(
            (*(str(group.settings[path]) for path in paths), str(group.summary.count), value, f"{group.step:,}", counts)
        )
    right = (*(path for path in paths if _are_numbers(groups, path)), "seeds", "steps")
    text = table((*paths, "seeds", results.metric, "steps", "cells"), rows, right=right)
    for group in groups:
        for outcome in group.outcomes:
            if outcome.metrics is None and (failure := outcome.failure) is not None:
                log = results.workdir(outcome.cell) / LOG
                text += f"{outcome.status}: {outcome.cell.name}: exit code {failure.code}: {failure.message} ({log})\n"
    return text + "".join(f"{line}\n" for line in _comparison(groups, results))


def _are_numbers(groups: Sequence[Group], path: str) -> bool:
    values = [group.settings[path] for group in groups]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _comparison(groups: Sequence[Group], results: Results) -> list[str]:
    """The best group, and whether it is better than the second best by more than chance."""
    compared = [group for group in groups if group.summary.count]
    if not compared:
        return ["no cell has been evaluated"]
    best, *others = [group for group in compared if group.step == compared[0].step]
    lines = [f"best: {best.name}: {results.metric} {best.summary} ({_seeds(best.summary)})"]
    if not others:
        return lines
    second = others[0]
    apart = f"against the second best, {second.name}: {best.summary.mean - second.summary.mean:+.4g}"
    if (test := welch(best.summary, second.summary)) is None:
        few = min(best.summary.count, second.summary.count) < 2
        why = "which takes two seeds of each" if few else "since no value differs from another of its group"
        return [*lines, f"{apart}; no test, {why}"]
    digits = f"t = {test.t:.3g}, degrees of freedom = {test.freedom:.3g}, p = {test.p:.2g}"
    return [*lines, f"{apart}; Welch's t-test: {digits}"]


def _seeds(summary: Summary) -> str:
    return "1 seed" if summary.count == 1 else f"mean ± standard deviation of {summary.count} seeds"


def csv_text(found: Sequence[Outcome]) -> str:
    """A row for each cell: its settings, how it ended, and the metrics of its evaluation in full precision."""
    paths = list(found[0].cell.settings)
    metrics = list(dict.fromkeys(name for outcome in found for name in outcome.metrics or {}))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *paths, "status", "exit_code", "step", *metrics])
    for outcome in found:
        values = outcome.metrics or {}
        code = "" if outcome.metrics is None and outcome.failure is None else 0
        if outcome.metrics is None and outcome.failure is not None:
            code = outcome.failure.code
        settings = [outcome.cell.settings[path] for path in paths]
        step = outcome.step if outcome.metrics is not None else ""
        row = [outcome.cell.name, *settings, outcome.status, code, step, *(values.get(name) for name in metrics)]
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def figure(groups: Sequence[Group], results: Results) -> Any:
    """A `matplotlib.figure.Figure` of the metric against one varying setting, a numeric one if there is any.

    It has one line for each combination of the other settings. Bars are standard deviations over seeds. Where cells
    were stopped at different steps, it shows the metric by step instead, a line for each cell.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    axes.set_ylabel(results.metric)
    compared = [group for group in groups if group.summary.count]
    if len({group.step for group in compared}) > 1:
        for number, group in enumerate(compared):
            for outcome in group.outcomes:
                curve = results.curve(outcome.cell)
                label = group.name if outcome is group.outcomes[0] else None
                axes.plot(*zip(*curve, strict=True), color=f"C{number % 10}", marker=".", label=label)
        axes.set_xlabel("step")
    elif compared:
        _draw_by_setting(axes, compared)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    return drawn


def _draw_by_setting(axes: Any, groups: Sequence[Group]) -> None:
    varying = [path for path in groups[0].settings if len({str(group.settings[path]) for group in groups}) > 1]
    first = next((path for path in varying if _are_numbers(groups, path)), (*varying, SEED)[0])
    is_number = first in varying and _are_numbers(groups, first)

    def x_of(group: Group) -> Any:
        return group.settings[first] if is_number else str(group.settings.get(first, "all seeds"))

    lines: dict[str, list[Group]] = {}
    for group in groups:
        rest = ", ".join(f"{path}={value}" for path, value in group.settings.items() if path != first)
        lines.setdefault(rest, []).append(group)
    for label, members in lines.items():
        key: Callable[[Group], Any] = x_of
        members = sorted(members, key=key)
        bars = [0.0 if math.isnan(one.summary.deviation) else one.summary.deviation for one in members]
        means = [one.summary.mean for one in members]
        axes.errorbar([x_of(one) for one in members], means, bars, marker="o", capsize=3, label=label or None)
    numbers = [x_of(group) for group in groups] if is_number else []
    if numbers and min(numbers) > 0 and max(numbers) / min(numbers) >= 8:
        axes.set_xscale("log")
    axes.set_xlabel(first)
