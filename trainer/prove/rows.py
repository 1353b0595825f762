"""The comparison of the metrics of two runs, an undisturbed one and one that was killed, row by row."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.observe.rows import Row, contents, row_or_none


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics is that of an evaluation."""
    return any(name.endswith("/examples") for name in row)


def evaluation_differences(steps: Sequence[int], undisturbed: Path, killed: Path) -> Iterator[str]:
    """A text for each evaluation after one of these steps that has not exactly one line in each file of metrics.

    The lines are counted, since `read_rows` joins those of a step.
    """
    counts = [_evaluation_lines(file) for file in (undisturbed, killed)]
    names = {step: sorted({name for count in counts for at, name in count if at == step}) for step in steps}
    for run, count in zip(("undisturbed", "killed"), counts, strict=True):
        where = f"in metrics.jsonl of the {run} run"
        for step in steps:
            if not names[step]:
                yield f"evaluation of step {step}: it has 0 rows {where}"
            for name in names[step]:
                if count[step, name] != 1:
                    yield f"evaluation of step {step} on {name!r}: it has {count[step, name]} rows {where}"


def _evaluation_lines(file: Path) -> Counter[tuple[int, str]]:
    """The number of lines of each evaluation in a file of metrics, by step and name."""
    counts: Counter[tuple[int, str]] = Counter()
    for line in contents(file).split(b"\n") if file.exists() else ():
        row = row_or_none(line) or {}
        counts.update((row["step"], name.removesuffix("/examples")) for name in row if name.endswith("/examples"))
    return counts


def row_differences(undisturbed: Sequence[Row], killed: Sequence[Row]) -> Iterator[str]:
    """A text for each metric that is not equal bit for bit, and one if the numbers of rows differ."""
    if len(undisturbed) != len(killed):
        yield f"metrics.jsonl: {len(undisturbed)} rows undisturbed, {len(killed)} killed"
    for number, (a, b) in enumerate(zip(undisturbed, killed, strict=False), 1):
        for name in a | b:
            if json.dumps(a.get(name)) != json.dumps(b.get(name)):  # as text: NaN is no row's value, −0.0 is not 0.0
                where = f"metrics.jsonl, row {number} (step {a['step']}): {name}"
                yield f"{where} is {a.get(name, 'missing')} undisturbed, {b.get(name, 'missing')} killed"


def compare_losses(undisturbed: Sequence[Row], killed: Sequence[Row], tolerance: float) -> tuple[float, list[str]]:
    """The largest relative difference of two losses, and a text for each that is above the tolerance."""
    steps = [[(row["step"], is_evaluation(row)) for row in rows] for rows in (undisturbed, killed)]
    if steps[0] != steps[1]:
        counts = f"{len(undisturbed)} rows undisturbed, {len(killed)} killed"
        return math.inf, [f"metrics.jsonl: {counts}, of other steps"]
    largest, differences = 0.0, list[str]()
    for number, (a, b) in enumerate(zip(undisturbed, killed, strict=True), 1):
        for name in (name for name in a if name.endswith("/loss")):
            expected, found = a[name], b.get(name)
            missing = expected is None or found is None
            apart = math.inf if missing else abs(expected - found) / max(abs(expected), abs(found), 1e-30)
            largest = max(largest, apart)
            if apart > tolerance:
                where = f"metrics.jsonl, row {number} (step {a['step']}): {name}"
                differences.append(f"{where} is {expected} undisturbed, {found} killed, {apart:.1e} apart")
    return largest, differences
