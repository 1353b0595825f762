"""Agreements of two processes, how an error of one becomes an error of both, and which signals a run takes."""

import functools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.distributed import Break, Preemption, how_to_continue
from trainer.distributed.agreement import Agreement

ROOT = Path(__file__).parents[2]
# Each process runs it with the flags of its place in the group, by `launch.ProcessGroup`.
SCRIPT = """
import sys
from trainer import distributed
from trainer.distributed import startup
from trainer.errors import CollectiveError, NotPreparedError, UserError

flags = dict(flag.removeprefix("--").split("=") for flag in sys.argv[1:])
startup.initialize(flags["coordinator"], int(flags["process"]), int(flags["processes"]))
index = distributed.index()

def attempt(name, found_by):
    try:
        with distributed.collective_errors(name):
            if index in found_by:
                raise NotPreparedError(f"{name} of {index}")
    except UserError as error:
        assert isinstance(error, CollectiveError)
        print(f"{name}: {error}; caused by {type(error.__cause__).__name__}")

attempt("none", [])
attempt("one", [1])
attempt("both", [0, 1])
attempt("again", [0])
with distributed.fail_fast():
    try:
        with distributed.collective_errors("outer"):
            distributed.check_same("the numbers differ", f"equal\\nnumber {index},")
    except UserError as error:
        print(f"{error}; caused by {type(error.__cause__).__name__}")
print(distributed.gather("values", f"value {index}"), distributed.is_primary())
"""


# Process 1 gets a signal while both call `signal_after` as often as they can.
SIGNAL_SCRIPT = """
import os, signal, sys, threading
import jax
from trainer import distributed
from trainer.distributed import startup

flags = dict(flag.removeprefix("--").split("=") for flag in sys.argv[2:])
place = flags["coordinator"], int(flags["process"]), int(flags["processes"])
if sys.argv[1] == "startup":
    startup.initialize(*place)
else:
    jax.distributed.initialize(place[0], place[2], place[1])
calls, signum = 0, None
with distributed.Preemption() as preemption:
    if place[1] == 1:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGHUP)).start()
    while signum is None:
        calls, signum = calls + 1, preemption.signal_after()
assert len(set(distributed.gather("calls", str(calls)))) == 1
print(f"{calls > 10} {signum}")
"""


def run_group(script: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Runs a script in two connected processes; also returns the lines of each."""
    command = [sys.executable, "-c", script, *arguments]
    group = f"with ProcessGroup({command!r}, processes=2, devices=1) as group:\n    raise SystemExit(group.wait())"
    result = subprocess.run(
        [sys.executable, "-c", f"from trainer.distributed.launch import ProcessGroup\n{group}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return result, [[line[4:] for line in result.stdout.splitlines() if line.startswith(f"[{i}]")] for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("connected_by", ["startup", "jax"])
def test_a_signal_to_one_process_stops_both_with_the_same_call(connected_by):
    result, shown = run_group(SIGNAL_SCRIPT, connected_by)
    assert (result.returncode, shown) == (0, [["True 1"]] * 2), result.stderr


@pytest.mark.parametrize("seed", range(10))
def test_processes_that_get_signals_in_any_order_stop_with_the_same_call(seed):
    rng = np.random.default_rng(seed)
    queues: list[Any] = [queue.Queue() for _ in range(3)]

    def say(i: int, *message: Any) -> None:
        for j in [0] if i else [1, 2]:
            queues[j].put((i, *message))

    agreements = [Agreement(i, 2, functools.partial(say, i)) for i in range(3)]
    signalled = {int(i): int(at) for i, at in zip(rng.choice(3, 2, replace=False), rng.integers(1, 40, 2), strict=True)}
    pauses = rng.uniform(0, 0.002, (3, 200))

    def receive(i: int) -> None:
        while (message := queues[i].get()) is not None:
            agreements[i].take(*message)

    def train(i: int) -> tuple[int, int | None]:
        for call in range(1, 200):
            time.sleep(pauses[i, call])
            signum = 10 + i if call >= signalled.get(i, 1000) else None
            if (stops := agreements[i].signal_after(signum)) is not None:
                return call, stops
        return 0, None

    with ThreadPoolExecutor(6) as threads:
        receiving = [threads.submit(receive, i) for i in range(3)]
        ends = list(threads.map(train, range(3)))
        for receiver, messages in zip(receiving, queues, strict=True):
            messages.put(None)
            receiver.result()
    assert len(set(ends)) == 1, ends
    assert ends[0][0] >= min(signalled.values())
    assert ends[0][1] in [10 + i for i in signalled]


@pytest.mark.slow
def test_a_mistake_of_any_process_is_a_collective_error_in_all_and_its_cause_where_it_was_found():
    result, shown = run_group(SCRIPT)
    assert (result.returncode, result.stderr) == (0, "")
    differ = "process 1: UserError: the numbers differ: process 1 has number 1, process 0 has number 0"
    assert shown[0] == [
        "one: process 1: NotPreparedError: one of 1; caused by NoneType",
        "both: process 0: NotPreparedError: both of 0; caused by NotPreparedError",
        "again: process 0: NotPreparedError: again of 0; caused by NotPreparedError",
        f"{differ}; caused by NoneType",
        "['value 0', 'value 1'] True",
    ]
    assert shown[1] == [
        "one: process 1: NotPreparedError: one of 1; caused by NotPreparedError",
        "both: process 0: NotPreparedError: both of 0; caused by NoneType",
        "again: process 0: NotPreparedError: again of 0; caused by NoneType",
        f"{differ}; caused by UserError",
        "['value 0', 'value 1'] False",
    ]


def handlers() -> list:
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_signal_is_reported_and_a_second_interrupt_acts_at_once():
    before = handlers()
    with Preemption() as preemption:
        assert preemption.signal_after() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.signal_after() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def break_off(preemption: Preemption) -> None:
    with preemption.breakable():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(10)


def test_a_region_is_broken_off_at_once_by_a_signal_in_it_or_before_it():
    with Preemption() as preemption:
        with pytest.raises(Break):
            break_off(preemption)
        with pytest.raises(Break):
            break_off(preemption)
        assert preemption.signal_after() == signal.SIGHUP


def test_nohup_keeps_its_signal():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert preemption.signal_after() is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_no_handler_is_installed_when_signals_are_not_to_be_handled():
    before = handlers()
    with Preemption(handle_signals=False) as preemption:
        assert handlers() == before
        assert preemption.signal_after() is None


def test_no_handler_is_installed_outside_of_the_main_thread():
    before, seen = handlers(), []

    def enter() -> None:
        with Preemption() as preemption:
            seen.extend([*handlers(), preemption.signal_after()])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [*before, None]


@pytest.mark.parametrize("is_found", [True, False])
def test_the_command_to_continue_names_python_by_its_path_where_the_shell_finds_another_one(
    is_found, monkeypatch, tmp_path
):
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["trainer/__main__.py", "train", "--workdir=a b"])
    if is_found:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    python = "python" if is_found else sys.executable
    assert how_to_continue() == f"continue with: {python} -m trainer train '--workdir=a b'"
