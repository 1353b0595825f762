"""Event files by themselves: names, purges, errors and what TensorBoard makes of them."""

from pathlib import Path

import pytest
from tensorboardX.summary import histogram, text

from tests.observe.event_reader import shown
from trainer.observe.events import Events, event_files, read_events, shown_values
from trainer.observe.log import MetricsLog


def add_all(folder: Path, steps: range, purge_from: int | None = None) -> Events:
    events = Events(folder)
    events.begin(purge_from)
    for step in steps:
        events.add_scalars(step, {"loss": 1 / step, "ignored": None, "texts": ["a"]}, 1e9 + step)
    return events


def test_a_later_file_purges_the_steps_from_its_own_first_on(tmp_path):
    for steps in (range(1, 10), range(6, 8), range(7, 12)):
        add_all(tmp_path / "events", steps, purge_from=steps[0]).close()
    assert sorted(shown(tmp_path / "events")) == [("loss", step) for step in range(1, 12)]


def test_files_are_named_in_the_order_in_which_they_are_begun_whatever_the_clock(tmp_path):
    names = []
    (tmp_path / "events.out.tfevents.9999999990.of_a_clock_that_was_ahead").touch()
    for _ in range(5):
        events = Events(tmp_path)
        events.begin()
        names.append(events.name)
        events.close()
    assert names == sorted(names)
    assert event_files(tmp_path)[1:] == names
    assert events.file_count == 6


def test_an_incomplete_last_event_is_skipped(tmp_path):
    add_all(tmp_path, range(1, 4)).close()
    data = (tmp_path / event_files(tmp_path)[0]).read_bytes()
    whole = list(read_events(data))
    assert [event.step for event in whole] == [0, 1, 2, 3]
    for length in range(len(data) - 1, len(data) - 40, -1):
        assert list(read_events(data[:length])) == whole[:3]
    assert shown_values([data]) == {("loss", 1), ("loss", 2), ("loss", 3)}


def test_an_event_is_in_the_file_when_add_returns(tmp_path):
    events = add_all(tmp_path, range(1, 2))
    assert shown(tmp_path) == {("loss", 1): 1.0}
    assert (tmp_path / events.name).stat().st_size == events.size
    events.close()


def test_a_file_that_another_placed_in_the_way_is_never_written_to(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(OSError, match="it is a link, which is not followed"):
        Events(tmp_path / "folder").begin()
    with pytest.raises(FileExistsError):
        Events(tmp_path / "elsewhere").begin()
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_any_summary_can_be_added(tmp_path):
    events = add_all(tmp_path, range(0))
    events.add(text("note", "hello"), 1, 1e9)
    events.add(histogram("weights", [1.0, 2.0, 3.0], bins=3), 2, 1e9)
    events.close()
    found = list(read_events((tmp_path / events.name).read_bytes()))
    assert [(event.step, value.tag) for event in found for value in event.summary.value] == [
        (1, "note/text_summary"),
        (2, "weights"),
    ]


def test_tensorboard_itself_shows_every_step_once_after_kills(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard, an extra, is not installed"
    )
    for start, stop in ((0, 13), (10, 17), (15, 21), (10, 23), (20, 30)):
        log = MetricsLog(tmp_path, start)
        for step in range(start + 1, stop + 1):
            log.write(step, {"train/loss": 1 / step}, {"examples_per_second": 1.0})
            if step % 5 == 0:
                log.sync()
                log.write(step, {"test/loss": 1 / step}, {})
        for file in (log._metrics, log._timing, log._events):
            file.close()
    reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == list(range(1, 31))
    assert [event.step for event in reader.Scalars("examples_per_second")] == list(range(1, 31))
    assert [event.step for event in reader.Scalars("test/loss")] == list(range(5, 31, 5))
