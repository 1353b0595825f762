"""A process that is stuck, stopped or dead is named; one that ends in good order is not."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.distributed import peers
from trainer.distributed.stuck import held_up

ROOT = Path(__file__).parents[2]
# Steps with a collective in each; process {stuck} hangs in its own code at step 5. The others wait for their devices.
SCRIPT = """
import sys, time
import jax, jax.numpy as jnp
from jax.experimental.multihost_utils import process_allgather
from trainer import distributed
from trainer.distributed import peers, startup

flags = dict(flag.removeprefix("--").split("=") for flag in sys.argv[1:])
startup.initialize(flags["coordinator"], int(flags["process"]), int(flags["processes"]), heartbeat_seconds=3)
peers.set_end_seconds(3.0)
index = distributed.index()
for step in range(1, 9):
    peers.report(step, "data")
    if (index, step) == ({stuck}, 5):
        print("stuck", flush=True)
        time.sleep(1000)
    peers.report(step, "device")
    process_allgather(jnp.ones(()))
if index:
    sys.exit()  # before the others
time.sleep(5)  # longer than any limit
print("the end")
"""
WATCHED = """
import socket, sys, time
from trainer.distributed import peers

peers.start(1, {{0: socket.create_connection(("127.0.0.1", int(sys.argv[1])))}}, 2.0)
print("ready", flush=True)
{then}
"""


def run(script: str, processes: int) -> subprocess.CompletedProcess[str]:
    group = f"with ProcessGroup({[sys.executable, '-c', script]!r}, processes={processes}, devices=1) as group:"
    program = f"from trainer.distributed.launch import ProcessGroup\n{group}\n    raise SystemExit(group.wait())"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.slow
def test_a_process_stuck_in_its_own_code_is_named_and_all_end():
    result = run(SCRIPT.format(stuck=1), 2)
    said = r"\[0\] error: process 1 on \S+ has been waiting for its data at step 5 for \d+ s; the run ends, .*\n"
    assert result.stdout == "[1] stuck\n"
    assert re.fullmatch(said, result.stderr)
    assert result.returncode == 3


@pytest.mark.slow
def test_processes_that_end_in_good_order_one_earlier_than_the_other_are_no_fault():
    result = run(SCRIPT.format(stuck=-1), 2)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[0] the end\n", "")


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def watched(server: socket.socket, then: str = "time.sleep(100)") -> tuple[subprocess.Popen[str], socket.socket]:
    """Process 1 of two, and the connection over which this test is process 0."""
    command = [sys.executable, "-c", WATCHED.format(then=then), str(server.getsockname()[1])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    connection = server.accept()[0]
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process, connection


def test_a_process_that_continues_after_the_limit_does_nothing_more_and_ends(server, tmp_path):
    then = f"for i in range(10000):\n    time.sleep(0.002)\n    open({str(tmp_path / 'file')!r}, 'a').write('.')"
    process, connection = watched(server, then)
    with connection:
        connection.sendall(b'["host", "other"]\n')
        while not (tmp_path / "file").exists():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)  # the signal takes a moment
        written = (tmp_path / "file").stat().st_size
        time.sleep(2.2)
        os.kill(process.pid, signal.SIGCONT)
        error = process.communicate(timeout=10)[1]
    assert process.returncode == 3
    name = f"process 1 on {socket.gethostname()}"
    assert re.fullmatch(rf"error: {name} did not answer for \d+ s \(stopped\?\); the run ends, .*\n", error)
    assert (tmp_path / "file").stat().st_size == written


@pytest.mark.parametrize(
    ("said", "closes", "error"),
    [
        (b'["fault", "process 2 on there was killed or crashed; the run ends", 3]\n', False, ""),
        (b"", True, "error: process 0 on other was killed or crashed; the run ends, launch it again to .*\n"),
        (
            b"",
            False,
            r"error: process 0 on other does not answer for \d+ s \(is it stopped, .*\?\); .*\n",
        ),
    ],
    ids=["told", "closed", "silent"],
)
def test_process_0_at_fault_is_named_by_another_and_what_it_says_is_obeyed(said, closes, error, server):
    process, connection = watched(server)
    with connection:
        connection.sendall(b'["host", "other"]\n' + said)
        if closes:
            time.sleep(0.2)
            connection.shutdown(socket.SHUT_WR)
        shown = process.communicate(timeout=10)[1]
    assert process.returncode == 3
    assert re.fullmatch(error, shown)


def test_a_line_of_which_the_kernel_took_a_part_is_finished_before_the_next_one(server):
    with socket.create_connection(server.getsockname()) as ours, server.accept()[0] as theirs:
        monitor = peers._PeerMonitor(0, {1: ours}, 100.0)
        for number in range(2000):  # far more than the buffers of a connection hold
            monitor.say("hosts", f"{number} " * 1000)
        received, deadline = b"", time.monotonic() + 20
        theirs.settimeout(0.1)
        while b'["bye"]\n' not in received and time.monotonic() < deadline:
            monitor.say("bye")
            with contextlib.suppress(TimeoutError):
                received += theirs.recv(1 << 20)
    kinds = [json.loads(line)[0] for line in received.splitlines(keepends=True) if line.endswith(b"\n")]
    assert set(kinds) == {"hosts", "bye"}


def test_those_that_wait_for_no_other_hold_up_the_others_and_else_the_last():
    states = {0: (5, "device", 1.0), 1: (5, "data", 2.0), 2: (4, "processes", 0.0)}
    assert held_up(states, 12.0) == {1: "has been waiting for its data at step 5 for 10 s"}
    del states[1]
    assert held_up(states, 12.0) == {2: "has been waiting for the other processes at step 4 for 12 s"}


def test_a_goodbye_is_no_fault(server):
    process, connection = watched(server, "time.sleep(3)")
    with connection:
        connection.sendall(b'["host", "other"]\n["bye"]\n')
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == 0


def test_a_report_costs_less_than_a_microsecond_and_an_inner_wait_ends_with_its_block():
    count = 100_000
    best = min(_seconds(count) for _ in range(5))
    assert best / count < 1e-6
    with peers.waiting("processes"):
        assert peers._own_activity[:2] == (7, "processes")
    assert peers._own_activity[:2] == (7, "device")


def _seconds(count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        peers.report(7, "device")
    return time.perf_counter() - began
