"""The metrics files of a workdir, over kills and resumes."""

import dataclasses
import errno
import json
import math
import os
import random
import time
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.observe.event_reader import shown
from tests.tasks import Task, make_run
from trainer import config
from trainer.checkpoint import Store
from trainer.errors import HostError, UserError
from trainer.loop import train
from trainer.observe.log import MetricsLog, read_rows
from trainer.observe.progress import Progress


def values(step: int) -> dict[str, float]:
    row = {"train/loss": 1 / (step + 1), "train/accuracy": step / 7}
    return row | {"test/loss": 1 / (step + 2)} if step % 4 == 0 else row


def write(workdir: Path, steps: range, after_step: int = 0) -> None:
    with closing(MetricsLog(workdir, after_step, report=refuse_report)) as log:
        for step in steps:
            log.write(step, values(step), {"examples_per_second": 100.0 + step})


def refuse_report(text: str) -> None:
    raise AssertionError(f"nothing is wrong, but the log says: {text}")


def kill(log: MetricsLog) -> None:
    """Leaves the files as the death of the process would: nothing is written any more."""
    for file in (log._metrics, log._timing, log._events):
        file.close()


def rows(workdir: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows, by a reader that refuses NaN, as strict JSON does."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / file).read_text().splitlines()]


def events(workdir: Path) -> dict[tuple[str, int], float]:
    """(tag, step) → value, as TensorBoard shows them; no step is there twice."""
    return shown(workdir / "tensorboard")


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


BAD_LINES = {
    "cut": (b'{"step": 3, "tr', "is not valid JSON"),
    "binary": (b"\xff\xfe\x00\x01\x80", "is not text"),
    "nested": (b'{"step": 3, "a": ' + 900 * b"[" + 900 * b"]" + b"}", "is not"),
    "nested deeper": (90_000 * b"[", "is not valid JSON: it is nested too deep"),
    "list": (b"[1, 2]", "is not a row of metrics"),
    "number": (b"7", "is not a row of metrics"),
    "no step": (b'{"train/loss": 1.0}', "is not a row of metrics"),
    "a step that is text": (b'{"step": "3"}', "is not a row of metrics"),
    "objects": (b'{"step": 3, "a": {"b": 1}}', "is not a row of metrics"),
    "empty": (b"", "is not valid JSON"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_reader_of_rows_refuses_a_bad_line_by_file_and_number(tmp_path, bad):
    write(tmp_path, range(1, 6))
    line, message = BAD_LINES[bad]
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    lines[2] = line
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError) as refused:
        list(read_rows(tmp_path / "metrics.jsonl"))
    assert f"{tmp_path}/metrics.jsonl, line 3, {message}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_launch_keeps_a_damaged_file_aside_and_goes_on_with_its_readable_rows(tmp_path, name, bad):
    write(tmp_path, range(1, 6))
    file = tmp_path / name
    lines = file.read_bytes().split(b"\n")
    lines[2] = BAD_LINES[bad][0]
    damaged = b"\n".join(lines)
    file.write_bytes(damaged)
    said: list[str] = []
    with closing(MetricsLog(tmp_path, 4, row_count=4, report=said.append)) as log:
        log.write(5, values(5), {})
    assert [row["step"] for row in rows(tmp_path, name)] == [1, 2, 4, 5]
    (aside,) = tmp_path.glob(f"{name}.damaged-*")
    assert aside.read_bytes() == damaged
    (repaired,) = said
    assert f"{file} is damaged" in repaired
    assert "line 3" in repaired
    assert f"its {3:,} readable rows up to step 4 are carried over" in repaired
    write(tmp_path, range(6, 8), after_step=5)  # and says nothing more


@pytest.mark.parametrize("kind", ["folder", "link", "binary"])
def test_a_reader_of_rows_names_what_is_no_file_of_rows(tmp_path, kind):
    file = tmp_path / "metrics.jsonl"
    (tmp_path / "elsewhere").write_text('{"step": 1}\n')
    make = {
        "folder": file.mkdir,
        "link": lambda: file.symlink_to(tmp_path / "elsewhere"),
        "binary": lambda: file.write_bytes(b"\x80\x81\x82"),
    }
    make[kind]()
    with pytest.raises(UserError, match=f"^{file}.* is (a link or a folder|not text)"):
        list(read_rows(file))


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "link", "fifo", "binary", "empty", "gone"])
def test_a_launch_goes_on_whatever_is_in_place_of_a_file(tmp_path, name, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("somebody's")
    workdir = tmp_path / "run"
    workdir.mkdir()
    write(workdir, range(1, 4))
    file = workdir / name
    file.unlink()
    make = {
        "folder": file.mkdir,
        "link": lambda: file.symlink_to(elsewhere),
        "fifo": lambda: os.mkfifo(file),
        "binary": lambda: file.write_bytes(b"\x80" + random.Random(0).randbytes(10_000)),
        "empty": file.touch,
        "gone": lambda: None,
    }
    make[kind]()
    said: list[str] = []
    with closing(MetricsLog(workdir, 3, row_count=3, report=said.append)) as log:
        log.write(4, values(4), {})
    assert [row["step"] for row in rows(workdir, name)] == [4]
    assert elsewhere.read_text() == "somebody's"
    asides = list(workdir.glob(f"{name}.damaged-*"))
    assert len(asides) == (kind not in ("empty", "gone"))
    assert all("\n" not in text and str(file) in text for text in said)
    assert len(said) == (1 if asides or name == "metrics.jsonl" else 0)


def test_a_hole_that_the_checkpoint_knows_of_is_said_once_and_the_run_goes_on(tmp_path):
    write(tmp_path, range(1, 10))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3] + lines[5:]))
    said: list[str] = []
    with closing(MetricsLog(tmp_path, 8, row_count=8, report=said.append)) as log:
        assert log.count == 6
    expected = f"warning: 2 of the 8 rows up to step 8 are missing in {tmp_path}/metrics.jsonl; "
    assert said == [expected + "the run goes on without them"]


def test_rows_are_counted_over_writes_and_launches(tmp_path):
    for after, start in ((0, 0), (5, 5), (2, 2)):
        log = MetricsLog(tmp_path, after, report=refuse_report)
        assert log.count == start
        for step in range(start + 1, 9):
            log.write(step, values(step), {})
        assert log.count == 8
        log.sync()
        log.write(9, values(9), {})
        assert log.count == 9
        assert log.rows() == rows(tmp_path)
        kill(log)


def test_an_evaluation_is_a_row_of_its_own_and_survives_a_launch_from_its_step(tmp_path):
    for kept in (True, False):
        log = MetricsLog(tmp_path, 0, report=refuse_report)
        for step in (1, 2):
            log.write(step, {"train/loss": 1.0}, {})
        log.sync()
        assert not log.has_evaluation(2, "test/")
        if kept:
            log.write(2, {"test/loss": 2.0}, {})
            assert log.has_evaluation(2, "test/")
        log.write(3, {"train/loss": 1.0}, {})
        kill(log)
        log = MetricsLog(tmp_path, 2, row_count=2, report=refuse_report)
        assert log.has_evaluation(2, "test/") == kept
        assert log.has_evaluation(2, "train/")
        assert not log.has_evaluation(1, "test/")
        assert log.count == 2 + kept
        log.close()
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2][: 2 + kept]
        assert (("test/loss", 2) in events(tmp_path)) == kept


def test_a_row_may_hold_texts_which_tensorboard_does_not_get(tmp_path):
    with closing(MetricsLog(tmp_path, 0)) as log:
        log.write(3, {"accepted": ["seed was 1, is 2", "…"]}, {})
    assert list(read_rows(tmp_path / "metrics.jsonl")) == [{"step": 3, "accepted": ["seed was 1, is 2", "…"]}]
    assert events(tmp_path) == {}


def test_kills_at_random_leave_every_file_as_a_run_that_was_not_killed(tmp_path):
    """Rows at every step, a sync at every 5th and then an evaluation; launches go on from any earlier sync."""
    rng = random.Random(0)
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    def go_on(workdir: Path, start: int, stop: int) -> None:
        log = MetricsLog(workdir, start, report=refuse_report)
        if start and not log.has_evaluation(start, "test/"):
            log.write(start, {"test/loss": start / 3}, {})
        for step in range(start + 1, stop + 1):
            log.write(step, {"train/loss": 1 / step}, {"examples_per_second": float(step)})
            if step % 5 == 0:
                log.sync()
                if step != stop or rng.random() < 0.5:
                    log.write(step, {"test/loss": step / 3}, {})
        kill(log)

    for workdir in (straight, broken):
        workdir.mkdir()
    go_on(straight, 0, 101)
    reached = 0
    for _ in range(40):
        start = max(reached - 5 * rng.randrange(3), 0) // 5 * 5
        reached = min(start + rng.randrange(1, 20), 100)
        go_on(broken, start, reached)
    go_on(broken, 95, 101)
    assert (broken / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert events(broken) == events(straight)
    assert {step for tag, step in events(broken) if tag == "train/loss"} == set(range(1, 102))


def test_events_of_lost_rows_stay_in_tensorboard(tmp_path):
    write(tmp_path, range(1, 10))
    before = events(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"\x80\n")
    for after in (9, 9):  # as damaged, and as repaired
        log = MetricsLog(tmp_path, after, report=lambda _: None)
        log.write(10, values(10), {"examples_per_second": 110.0})
        kill(log)
        assert events(tmp_path) == before | {key: x for key, x in events(tmp_path).items() if key[1] == 10}


@pytest.mark.parametrize("damage", ["no folder", "no record", "bad record", "half a record", "no event file"])
def test_events_that_are_known_to_be_incomplete_are_made_again_from_the_rows(tmp_path, damage):
    write(tmp_path, range(1, 10))
    write(tmp_path, range(10, 15), after_step=9)
    folder = tmp_path / "tensorboard"
    record = folder / ".written.json"
    first, _ = sorted(folder.glob("events*"))
    if damage == "no folder":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    elif damage == "no event file":
        first.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_bytes({"bad record": b"[[[[1", "half a record": record.read_bytes()[:30]}[damage])
    write(tmp_path, range(15, 20), after_step=14)
    assert_same_events(events(tmp_path), expected_events(range(1, 20)))


def test_a_linked_tensorboard_folder_is_not_followed_and_the_rows_are_written(tmp_path):
    elsewhere, workdir = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "events.out.tfevents.1234567890.mine").write_text("mine")
    workdir.mkdir()
    (workdir / "tensorboard").symlink_to(elsewhere)
    said: list[str] = []
    with closing(MetricsLog(workdir, 0, report=said.append)) as log:
        log.write(1, values(1), {})
        log.sync()
        log.write(2, values(2), {})
    link = f"warning: {workdir}/tensorboard: it is a link, which is not followed; "
    assert said == [link + "events are not written until a save can write them"]
    assert [file.read_text() for file in elsewhere.iterdir()] == ["mine"]
    assert [row["step"] for row in rows(workdir)] == [1, 2]


def test_a_launch_does_not_depend_on_the_length_of_the_log(tmp_path):
    names = [f"train/metric_{i}" for i in range(11)]
    with closing(MetricsLog(tmp_path, 0)) as log:
        for step in range(1, 4001):
            log.write(step, dict.fromkeys(names, step / 7), {"examples_per_second": 100.0})
        log.sync()
        for step in range(4001, 4051):
            log.write(step, dict.fromkeys(names, step / 7), {"examples_per_second": 100.0})
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        log = MetricsLog(tmp_path, 4000, row_count=4000, report=refuse_report)
        seconds.append(time.perf_counter() - start)
        assert log.count == 4000
        log.close()
    assert min(seconds) < 0.05


def test_an_error_of_the_event_file_drops_only_its_writer_until_the_next_sync(tmp_path, capsys):
    with closing(MetricsLog(tmp_path, 0)) as log:
        for step in range(1, 21):
            if step == 5:
                os.close(log._events._descriptor or 0)  # the next write has a bad file descriptor
            log.write(step, values(step), {"examples_per_second": 100.0 + step})
            if step in (10, 15):
                log.sync()
    assert_same_events(events(tmp_path), expected_events(range(1, 21)))
    warning, note = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path}/tensorboard: Bad file descriptor; events are not written until")
    afterwards = "no metric is missing; images, texts and histograms of the meantime are in reports/ only"
    assert note == f"note: {tmp_path}/tensorboard: written again, and {afterwards}"


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_rows_that_the_kernel_lost_in_a_failed_fsync_are_written_again(tmp_path, monkeypatch, on_error):
    """No disk can be made to fail like this here: so `os.fsync` loses the rows since the sync before, and fails."""
    said: list[str] = []
    log = MetricsLog(tmp_path, 0, on_error=on_error, report=said.append)
    for step in range(1, 6):
        log.write(step, values(step), {})
    log.sync()
    synced = (tmp_path / "metrics.jsonl").stat().st_size
    for step in range(6, 11):
        log.write(step, values(step), {})
    real = os.fsync

    def lose(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino != (tmp_path / "metrics.jsonl").stat().st_ino:
            return real(descriptor)
        os.truncate(tmp_path / "metrics.jsonl", synced)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lose)
        if on_error == "stop":
            with pytest.raises(HostError, match=r"metrics\.jsonl: Input/output error"):
                log.sync()
        else:
            log.sync()
            log.write(11, values(11), {})
    log.close()
    last = 10 if on_error == "stop" else 11
    assert rows(tmp_path) == [{"step": step, **values(step)} for step in range(1, last + 1)]
    assert [text.partition(":")[0] for text in said] == ["warning", "note"][on_error == "stop" :]
    assert {step for _, step in events(tmp_path)} == set(range(1, last + 1))


def test_a_file_that_cannot_be_opened_ends_a_launch_in_one_line_or_not_as_told(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(HostError, match=r"gone/metrics\.jsonl: No such file or directory"):
        MetricsLog(gone, 0)
    said: list[str] = []
    log = MetricsLog(gone, 0, on_error="continue", report=said.append)
    for step in range(1, 4):
        log.write(step, values(step), {})
    gone.mkdir()
    log.sync()
    log.close()
    assert [row["step"] for row in rows(gone)] == [1, 2, 3]
    assert [text.partition(": ")[0] for text in said] == ["warning", "warning", "note", "note"]  # for both files
    assert {step for _, step in events(gone)} == {1, 2, 3}


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

    def slow_save(*arguments: Any) -> bool:
        time.sleep(0.3)
        return fast_save(*arguments)

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
    timings = rows(tmp_path, "timing.jsonl")
    rates = {row["step"]: row["examples_per_second"] for row in timings if "examples_per_second" in row}
    assert len(rates) == 12
    counted = 5 * run.batch_size / 0.3  # what the rate would be at most if the 0.3 s of a save or an evaluation counted
    # The largest, as other processes of this machine, and the writing itself, may have delayed some.
    assert max(rates[step] for step in (15, 35, 55)) > 2 * counted
    assert max(rates[step] for step in (25, 45)) > 2 * counted
