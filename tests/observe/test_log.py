"""The metrics files of a workdir, over kills and resumes."""

import dataclasses
import json
import math
import statistics
import struct
import time
from collections import Counter
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from tests.tasks import Task, make_run
from trainer import config
from trainer.checkpoint import Store
from trainer.errors import UserError
from trainer.loop import train
from trainer.observe.log import MetricsLog, read_rows
from trainer.observe.progress import Progress


def values(step: int) -> dict[str, float]:
    row = {"train/loss": 1 / (step + 1), "train/accuracy": step / 7}
    return row | {"test/loss": 1 / (step + 2)} if step % 4 == 0 else row


def write(workdir: Path, steps: range, after_step: int = 0) -> None:
    with closing(MetricsLog(workdir, after_step)) as log:
        for step in steps:
            log.write(step, values(step), {"examples_per_second": 100.0 + step})
    # Event files are named by the second: within one, the next would overwrite this one by accident.
    for file in (workdir / "tensorboard").glob("events.out.tfevents.*"):
        file.rename(file.with_name(f"events.out.tfevents.{file.stat().st_ino}.earlier"))


def rows(workdir: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows, by a reader that refuses NaN, as strict JSON does."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / file).read_text().splitlines()]


def events(workdir: Path) -> dict[tuple[str, int], float]:
    """(tag, step) → value over all event files, which are TFRecords: length, checksum, an Event, checksum."""
    found: list[tuple[tuple[str, int], float]] = []
    for file in (workdir / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = event_pb2.Event.FromString(data[12 : 12 + length])  # pyrefly: ignore[missing-attribute] - made at import
            found += [((value.tag, event.step), value.simple_value) for value in event.summary.value]
            data = data[12 + length + 4 :]
    counts = Counter(key for key, _ in found)
    assert set(counts.values()) <= {1}, f"more than once: {[key for key, count in counts.items() if count > 1]}"
    return dict(found)


def expected_events(steps: range) -> dict[tuple[str, int], float]:
    return {
        (name, step): value
        for step in steps
        for name, value in {**values(step), "examples_per_second": 100.0 + step}.items()
    }


def assert_same_events(found: dict[tuple[str, int], float], expected: dict[tuple[str, int], float]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == np.float32(value), key


def test_rows_are_read_back_as_they_were_written(tmp_path):
    write(tmp_path, range(1, 10))
    expected = [{"step": step, **values(step)} for step in range(1, 10)]
    assert rows(tmp_path) == expected
    assert list(read_rows(tmp_path / "metrics.jsonl")) == expected


def test_the_clocks_part_is_in_a_file_of_its_own(tmp_path):
    write(tmp_path, range(1, 4))
    assert [set(row) for row in rows(tmp_path, "timing.jsonl")] == [{"step", "time", "examples_per_second"}] * 3
    assert [row["examples_per_second"] for row in rows(tmp_path, "timing.jsonl")] == [101, 102, 103]


def test_tensorboard_shows_every_value_of_every_row_once(tmp_path):
    write(tmp_path, range(1, 10))
    assert_same_events(events(tmp_path), expected_events(range(1, 10)))


def test_a_row_is_in_the_file_when_write_returns_so_that_a_kill_loses_none(tmp_path):
    with closing(MetricsLog(tmp_path, 0)) as log:
        for step in (1, 2):
            log.write(step, values(step), {})
            assert [row["step"] for row in rows(tmp_path)] == list(range(1, step + 1))
            assert [row["step"] for row in rows(tmp_path, "timing.jsonl")] == list(range(1, step + 1))


@pytest.mark.parametrize("after_step", [0, 1, 5, 9, 20])
def test_reopened_after_a_step_the_log_has_dropped_what_came_later_from_every_file(tmp_path, after_step):
    write(tmp_path, range(1, 10))
    write(tmp_path, range(0), after_step)
    kept = range(1, min(after_step, 9) + 1)
    assert rows(tmp_path) == [{"step": step, **values(step)} for step in kept]
    assert [row["step"] for row in rows(tmp_path, "timing.jsonl")] == list(kept)
    assert_same_events(events(tmp_path), expected_events(kept))


def test_a_run_that_was_killed_and_resumed_twice_leaves_the_log_of_one_that_was_not(tmp_path):
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    for folder in (broken, straight):
        folder.mkdir()
    write(straight, range(1, 21))
    for start, stop in ((0, 8), (5, 13), (10, 20)):
        write(broken, range(start + 1, stop + 1), start)
    assert (broken / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert events(broken) == events(straight)
    assert_same_events(events(broken), expected_events(range(1, 21)))


def test_logs_written_at_different_times_are_the_same_bytes(tmp_path):
    texts = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        with closing(MetricsLog(folder, 0)) as log:
            log.write(1, values(1), {"examples_per_second": 1.0 if name == "first" else 2.0})
        texts.append(((folder / "metrics.jsonl").read_bytes(), (folder / "timing.jsonl").read_bytes()))
    assert texts[0][0] == texts[1][0]
    assert texts[0][1] != texts[1][1]  # the clock has gone on between them


@pytest.mark.parametrize("torn", ['{"step": 6, "train/lo', "{", '{"step": 6}, {', "\0\0\0\0"])
def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path, torn):
    write(tmp_path, range(1, 6))
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(torn)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    write(tmp_path, range(6, 8), after_step=5)
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert [row["step"] for row in rows(tmp_path, name)] == [1, 2, 3, 4, 5, 6, 7]
    assert_same_events(events(tmp_path), expected_events(range(1, 8)))


def test_a_whole_last_line_that_lacks_only_its_end_is_kept_apart_from_the_next(tmp_path):
    write(tmp_path, range(1, 6))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().rstrip("\n"))
    write(tmp_path, range(6, 7), after_step=5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_broken_line_in_the_middle_is_refused_by_file_and_number_and_left_as_it_is(tmp_path, name):
    write(tmp_path, range(1, 6))
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    lines[2] = lines[2][:9] + "\n"
    (tmp_path / name).write_text("".join(lines))
    with pytest.raises(UserError, match=f"{name}, line 3, is not valid JSON"):
        MetricsLog(tmp_path, 5)
    assert (tmp_path / name).read_text() == "".join(lines)


def test_values_that_are_not_finite_are_null_in_strict_json_and_absent_from_tensorboard(tmp_path):
    with closing(MetricsLog(tmp_path, 0)) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}, {"examples_per_second": math.inf})
    for _ in range(2):  # as it was written, and as it is after a resume
        assert rows(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.5}]
        assert rows(tmp_path, "timing.jsonl")[0]["examples_per_second"] is None
        assert events(tmp_path) == {("d", 1): 1.5}
        write(tmp_path, range(0), after_step=1)


def test_numbers_come_back_from_the_file_to_the_last_bit_and_survive_resumes(tmp_path):
    numbers = np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-100, 100)
    with closing(MetricsLog(tmp_path, 0)) as log:
        log.write(1, {str(i): float(x) for i, x in enumerate(numbers)}, {})
    write(tmp_path, range(0), after_step=1)
    assert [rows(tmp_path)[0][str(i)] for i in range(200)] == numbers.tolist()


def test_what_another_program_put_into_the_tensorboard_folder_stays(tmp_path):
    write(tmp_path, range(1, 3))
    note = tmp_path / "tensorboard" / "note.txt"
    note.write_text("mine")
    write(tmp_path, range(0), after_step=1)
    assert note.read_text() == "mine"


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert list(read_rows(tmp_path / "metrics.jsonl")) == []


class SlowToRead:
    """Examples on a slow disk."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.02)
        return {name: array[index] for name, array in self.arrays.items()}


@dataclasses.dataclass
class SlowEvaluation(Task):
    def source(self, split: str) -> Any:
        source = super().source(split)
        return SlowToRead(source.arrays) if split == "test" else source


@pytest.mark.slow
def test_evaluations_and_saves_do_not_count_in_the_examples_per_second_of_the_next_row(tmp_path, monkeypatch):
    fast_save = Store.save

    def slow_save(*arguments: Any) -> None:
        time.sleep(0.3)
        fast_save(*arguments)

    monkeypatch.setattr(Store, "save", slow_save)
    run = make_run(
        60,
        experiment=SlowEvaluation(),
        evaluation=config.Evaluation(every_steps=20, batch_size=8),
        checkpoint=config.Checkpoint(every_steps=10),
        logging=config.Logging(every_steps=5),
        loading=config.Loading(in_memory_bytes=0, threads=1),
        parallel=config.Parallel(devices=1),
    )
    train(run, tmp_path, progress=Progress(60, StringIO()))
    rates = {row["step"]: row["examples_per_second"] for row in rows(tmp_path, "timing.jsonl")}
    assert len(rates) == 12
    usual = statistics.median(rate for step, rate in rates.items() if step % 10 == 0)
    after_saves = [rates[step] for step in (15, 35, 55)]
    after_evaluations = [rates[step] for step in (25, 45)]
    # The largest, as other processes of this machine may have delayed some.
    assert max(after_saves) > usual / 5
    assert max(after_evaluations) > usual / 5
