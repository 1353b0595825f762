"""The progress line, on terminals and elsewhere."""

import io
import os
import pty
from pathlib import Path

import pytest

from trainer.observe.progress import Progress, clock


def on_terminal(*calls: tuple[str, tuple], total: int = 1000, seconds: float = 0.0) -> str:
    """The output of these calls of Progress, as a terminal receives it."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        progress = Progress(total, stream, redraw_seconds=seconds)
        for name, arguments in calls:
            getattr(progress, name)(*arguments)
    received = b""
    try:
        while part := os.read(ours, 65536):
            received += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    return received.decode()


def screen(received: str) -> list[str]:
    """The lines that a terminal shows then: \\r goes back to the left, where what is written replaces what was."""
    lines, column = [""], 0
    for character in received:
        if character == "\r":
            column = 0
        elif character == "\n":
            lines.append("")
        else:
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return lines


def update(step: int, loss: float = 0.5, rate: float = 100.0, left: float = 10.0) -> tuple[str, tuple]:
    return "update", (step, loss, rate, left)


def message(text: str) -> tuple[str, tuple]:
    return "message", (text,)


def test_a_line_has_step_loss_examples_per_second_and_the_time_left():
    assert screen(on_terminal(update(7, 0.123456, 12345.6, 3725))) == [
        "step    7/1000  loss 0.1235  12,346 examples/s  ETA 1:02:05"
    ]


def test_elsewhere_every_update_and_message_is_a_plain_line():
    stream = io.StringIO()
    progress = Progress(100, stream, redraw_seconds=1000)
    progress.message("hello")
    for step in (1, 2, 100):
        progress.update(step, 0.5, 100, 10)
    progress.message("two\nlines")
    lines = [f"step {step:3}/100  loss 0.5000  100 examples/s  ETA 0:10" for step in (1, 2, 100)]
    assert stream.getvalue() == "\n".join(["hello", *lines, "two", "lines", ""])


def test_without_a_stream_lines_go_to_standard_output(capsys):
    progress = Progress(10)
    progress.update(3, 0.5, 100, 10)
    progress.message("done")
    assert capsys.readouterr().out == "step  3/10  loss 0.5000  100 examples/s  ETA 0:10\ndone\n"


def test_on_a_terminal_one_line_is_rewritten():
    received = on_terminal(*(update(step) for step in range(1, 6)))
    assert received.count("\r") == 5
    assert "\n" not in received
    assert screen(received) == ["step    5/1000  loss 0.5000  100 examples/s  ETA 0:10"]


def test_a_line_shorter_than_the_one_before_leaves_no_debris():
    long, middle, short = update(1, 12345.6789, 1e9, 1e6), update(2, 12.5, 1e4), update(3, 0.5, 1, 1)
    received = on_terminal(long, middle, short, middle, short)
    assert [line.rstrip() for line in screen(received)] == ["step    3/1000  loss 0.5000  1 examples/s  ETA 0:01"]


def test_messages_on_a_terminal_have_lines_of_their_own_below_the_line_as_it_was():
    first = message("begin"), update(1, 12345.6789), message("note"), message("another")
    received = on_terminal(*first, update(2), update(3), message("end"))
    assert [line.rstrip() for line in screen(received)] == [
        "begin",
        "step    1/1000  loss 12345.6789  100 examples/s  ETA 0:10",
        "note",
        "another",
        "step    3/1000  loss 0.5000  100 examples/s  ETA 0:10",
        "end",
        "",
    ]


def test_on_a_terminal_updates_that_follow_too_fast_are_not_drawn_but_the_last_step_is():
    received = on_terminal(*(update(step) for step in (1, 2, 999, 1000)), seconds=1000)
    assert [part.split()[1] for part in received.split("\r")[1:]] == ["1/1000", "1000/1000"]


def show_all(progress: Progress) -> None:
    progress.message("begin")
    for step in (1, 2, 1000):
        progress.update(step, 0.5, 100, 10)
    progress.message("end")
    progress.end_line()


def test_a_full_stream_ends_progress_and_nothing_is_raised():
    stream = Path("/dev/full").open("w")  # noqa: SIM115 - closing fails too
    progress = Progress(1000, stream)
    show_all(progress)
    show_all(progress)
    with pytest.raises(OSError, match="No space left"):
        stream.close()


def test_a_closed_stream_ends_progress_and_nothing_is_raised(tmp_path):
    stream = (tmp_path / "file").open("w")
    progress = Progress(1000, stream)
    progress.message("before")
    stream.close()
    show_all(progress)
    show_all(Progress(1000, stream))
    assert (tmp_path / "file").read_text() == "before\n"


def test_a_pipe_whose_reader_is_gone_ends_progress_and_nothing_is_raised():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    show_all(Progress(1000, stream))
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_process_without_standard_output_has_no_progress(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    show_all(Progress(1000))


def test_a_character_that_the_encoding_lacks_is_replaced(tmp_path):
    with (tmp_path / "file").open("w", encoding="ascii") as stream:
        Progress(1000, stream).message("10 µs → ok")
    assert (tmp_path / "file").read_text() == "10 ?s ? ok\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (9, "0:09"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3599.7, "1:00:00"),
        (3661, "1:01:01"),
        (100 * 3600, "100:00:00"),
    ],
)
def test_clock_shows_hours_only_when_there_are_some(seconds, text):
    assert clock(seconds) == text
