"""Metrics on disk: JSON lines, and TensorBoard event files that are made from them.

`metrics.jsonl` is a function of config and seed, so that `cmp` can compare two runs; `timing.jsonl` has measured times.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trainer.errors import HostError, UserError
from trainer.files import AnyPath
from trainer.observe.events import Events, event_files, shown_values
from trainer.observe.outage import Outage
from trainer.observe.row_file import RowFile
from trainer.observe.rows import Row, contents
from trainer.observe.rows import read_rows as read_rows
from trainer.observe.sync_record import NAME, SyncRecord, read_record, write_record
from trainer.report import ReportWriter
from trainer.workdir import Mirror

_FILES = ("metrics.jsonl", "timing.jsonl")

Values = Mapping[str, float | Sequence[str]]


def _to_stderr(text: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # it may be full, closed or absent
        print(text, file=sys.stderr, flush=True)


class MetricsLog:
    """The metrics files of a workdir, which hold one or more rows for each logged step.

    A disk error on `metrics.jsonl`, or on its copy in a bucket, raises `HostError` if `on_error` is "stop". Every other
    disk error is one line to `report`: the rows stay in memory, and each `sync` tries again. Files in a bucket cannot
    be appended to: there they are copies, renewed by `sync` and `close`. No copy replaces a file in the bucket before
    the rows of that file were read.
    """

    def __init__(
        self,
        workdir: AnyPath,
        after_step: int,
        *,
        row_count: int | None = None,
        on_error: Literal["stop", "continue"] = "stop",
        report: Callable[[str], None] = _to_stderr,
    ) -> None:
        """Continues the files after `after_step`, and drops later rows, whose steps a killed run logged.

        Args:
          workdir: a folder that is there, or a path in a bucket.
          after_step: the step of the checkpoint; 0 for a new run.
          row_count: how many rows there were when it was saved; if there are fewer now, `report` gets a warning.
          on_error: whether a row of `metrics.jsonl` that cannot be written raises `HostError` or waits in memory.
          report: shows one line.
        """
        self._mirror, self._report = Mirror(workdir), report
        folder, is_fatal = self._mirror.folder, on_error == "stop"
        self._events_folder = folder / "tensorboard"
        places = [(folder / name, partial(self._fetch, workdir / name, folder / name)) for name in _FILES]
        self._metrics, self._timing = (RowFile(file, after_step, report, fetch) for file, fetch in places)
        until = "kept in memory until a save can write them"
        self._metrics_outage = Outage(self._metrics.file, f"its rows are {until}", report, is_fatal=is_fatal)
        self._timing_outage = Outage(self._timing.file, f"its rows are {until}", report)
        self._events_outage = Outage(
            self._events_folder,
            "events are not written until a save can write them",
            report,
            afterwards="no metric is missing; images, texts and histograms of the meantime are in reports/ only",
        )
        self._copy_outage = Outage(workdir, "the metrics are copied there at the next save", report, is_fatal=is_fatal)
        record = f"tensorboard/{NAME}"
        self._copy_outage.attempt(lambda: self._fetch(workdir / record, folder / record))
        self._record = read_record(self._events_folder)
        known = self._record or SyncRecord()
        self._metrics_outage.attempt(lambda: self._metrics.open(known.metrics))
        self._timing_outage.attempt(lambda: self._timing.open(known.timing))
        self._report_hole(row_count, after_step, known)
        self._continue_events(workdir / "tensorboard", after_step)
        self._write_record()

    @property
    def count(self) -> int:
        """How many rows `metrics.jsonl` has, with those that wait in memory."""
        return self._metrics.count

    def rows(self) -> list[Row]:
        """All rows of `metrics.jsonl`, with those that wait in memory."""
        return self._metrics.rows_from_byte(0)

    def has_evaluation(self, step: int, prefix: str) -> bool:
        """Whether a row of `step` has a value whose name begins with `prefix`."""
        rows = self._metrics.rows_from_step(step)
        return any(row["step"] == step and any(name.startswith(prefix) for name in row) for row in rows)

    def write(self, step: int, values: Values, timing: Values) -> None:
        """Adds a row of a step to each file; JSON has no NaN, so a value that is not finite is null there.

        Steps must not decrease; a step may have several rows. Raises `HostError`, see `on_error`.
        """
        now = time.time()
        row, times = _with_nulls(values), {"time": now, **_with_nulls(timing)}
        self._metrics.append(step, row)
        self._timing.append(step, times)
        for file, outage in ((self._metrics, self._metrics_outage), (self._timing, self._timing_outage)):
            if outage.is_fatal or not outage.is_on:
                outage.attempt(file.flush)  # a killed process loses no row
        if self._events.is_open and self._events_outage.attempt(lambda: self._add(step, row, times)):
            self._bytes_in_events = self._metrics.size

    def report_writer(self, step: int) -> ReportWriter:
        """The `ReportWriter` for the reports of an experiment after a step; it raises no error of the disk."""
        place = self._mirror.folder / "reports"
        return ReportWriter(place, step, self.rows, self._add_summary, self._report)

    def _add_summary(self, step: int, summary: Any) -> None:
        if self._events.is_open:
            self._events_outage.attempt(lambda: self._events.add(summary, step, time.time()))

    def sync(self) -> None:
        """Puts all rows on disk, so that no checkpoint saved afterwards outlives its metrics; raises `HostError`."""
        self._sync_files()
        self._copy_outage.attempt(self._mirror.push)

    def close(self) -> None:
        """Writes out and closes every file; an error is shown only, as there is nothing left to stop."""
        was_on = self._metrics_outage.is_on
        try:
            self._sync_files()
            self._copy_outage.attempt(self._mirror.close)
        except HostError as error:
            if not was_on:  # else it was raised before
                self._report(f"warning: {error}")
        if self._metrics_outage.is_on and not self._metrics_outage.is_fatal:
            self._report(f"warning: {self._metrics.file} lacks the last rows; the next launch repeats their steps")
        for file in (self._metrics, self._timing, self._events):
            file.close()

    def _sync_files(self) -> None:
        try:
            self._metrics_outage.attempt(self._metrics.sync)
        finally:
            self._timing_outage.attempt(self._timing.sync)
        if not self._events.is_open and not self._metrics_outage.is_on:
            self._events_outage.attempt(self._begin_events)
        if self._events.is_open and self._events_outage.attempt(self._events.sync):
            events = self._events
            self._record = SyncRecord(
                bytes_in_events=self._bytes_in_events,
                file_count=events.file_count,
                newest=events.name,
                newest_size=events.size,
            )
        self._write_record()

    def _write_record(self) -> None:
        if self._events_folder.is_dir() and not self._events_folder.is_symlink():
            record = (self._record or SyncRecord())._replace(metrics=self._metrics.synced, timing=self._timing.synced)
            known = min(record.bytes_in_events, record.metrics.size)
            write_record(self._events_folder, record._replace(bytes_in_events=known))

    def _fetch(self, source: AnyPath, target: Path) -> None:
        """Copies a file of the bucket, if it is there. Does nothing if the workdir is a folder."""
        try:
            if source != target and source.exists():
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(source.read_bytes())
        except OSError as error:
            target.unlink(missing_ok=True)  # `push` must not put a part of the file in the place of the whole
            raise OSError(error.errno, f"{source} cannot be read: {error.strerror or error}") from error

    def _report_hole(self, row_count: int | None, after_step: int, known: SyncRecord) -> None:
        if row_count is None:
            row_count = known.metrics.row_count if known.metrics.step <= after_step else 0
        if self.count < row_count and not self._metrics.was_damaged and not self._metrics_outage.is_on:
            missing = f"{row_count - self.count:,} of the {row_count:,} rows up to step {after_step}"
            self._report(f"warning: {missing} are missing in {self._metrics.file}; the run goes on without them")

    def _continue_events(self, place: AnyPath, after_step: int) -> None:
        """Begins an event file with the values that the earlier ones lack; the record tells which these are."""
        record, names, shown = self._record, event_files(place), None
        self._events = Events(self._events_folder, names)
        is_valid = record is not None and record.file_count <= len(names) and record.newest in names
        if record is not None and is_valid and not self._metrics_outage.is_on:
            shown = _shown_since(place, names, record)
        if record is None or shown is None:
            # There is no valid record: TensorBoard is told to drop everything, and all rows are written again.
            self._record, self._shown, self._bytes_in_events = None, set(), 0
            self._purge_from = 0 if names else None
        else:
            # A damaged metrics.jsonl may have lost rows that the event files still have.
            known = record.bytes_in_events if self._metrics.matches_prefix else self._metrics.size
            self._bytes_in_events = min(known, self._metrics.size)
            self._shown, self._purge_from = shown, after_step + 1
            self._record = record._replace(bytes_in_events=self._bytes_in_events)
        if not self._metrics_outage.is_on:
            self._events_outage.attempt(self._begin_events)
        if self._record is None:
            self._record = SyncRecord(file_count=self._events.file_count, newest=self._events.name)

    def _begin_events(self) -> None:
        """Begins an event file with all rows that no other has."""
        self._events.begin(self._purge_from)
        rows = self._metrics.rows_from_byte(self._bytes_in_events)
        timings: dict[int, list[Row]] = defaultdict(list)
        for timing in self._timing.rows_from_step(rows[0]["step"]) if rows else ():
            timings[timing["step"]].append(timing)
        # Walk backwards: pair each row with the last unused timing row of its step.
        pairs = [(row, timings[row["step"]].pop() if timings[row["step"]] else {}) for row in reversed(rows)]
        try:
            for pair in reversed(pairs):
                step = pair[0]["step"]
                row, timing = ({k: v for k, v in x.items() if (k, step) not in self._shown} for x in pair)
                self._add(step, row, timing)
        except OSError:
            self._events.discard()
            raise
        self._purge_from, self._bytes_in_events, self._shown = None, self._metrics.size, set()

    def _add(self, step: int, row: Row, timing: Row) -> None:
        values = {name: value for name, value in {**row, **timing}.items() if name not in ("step", "time")}
        self._events.add_scalars(step, values, timing.get("time") or time.time())


class NoLog:
    """The log of a process that writes no metrics."""

    count = 0

    def write(self, *_: object) -> None:
        """Writes nothing."""

    sync = close = write

    def report_writer(self, step: int) -> ReportWriter:
        """One that writes nothing."""
        return ReportWriter(None, step, list, self.write, self.write)


def _with_nulls(values: Values) -> Row:
    """The values as strict JSON allows them: null for NaN and for infinities."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _shown_since(place: AnyPath, names: Sequence[str], record: SyncRecord) -> set[tuple[str, int]] | None:
    """The (tag, step) of values that event files got after the record; None if its newest file is not whole."""
    try:
        data = [contents(place / name) for name in names if name >= record.newest]
    except (FileNotFoundError, HostError, UserError):
        return None
    size = record.newest_size
    return shown_values([data[0][size:], *data[1:]]) if len(data[0]) >= size else None
