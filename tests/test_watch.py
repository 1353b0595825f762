"""Signals are answered everywhere, with the newest complete state on disk, and a stalled run says what it waits for."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import xla_flags
from trainer import config
from trainer.checkpoint import Store
from trainer.distributed import Interrupted
from trainer.observe.phase_log import Follower
from trainer.watch import Watch

ROOT = Path(__file__).parents[1]


@contextmanager
def start(where: str, folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A training that gets its signals although the tests may run under `nohup`; it is killed at the end."""
    command = [sys.executable, "-m", "trainer", "train", f"--config=tests/stuck_config.py:{where}"]
    command += [f"--workdir={folder / 'run'}", f"--trace={folder / 'trace'}", *flags]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the process inherits
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags()}, **pipes)
    signal.signal(signal.SIGHUP, before)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(folder: Path, key: str, value: str | int, step: int, seconds: float = 120) -> None:
    """Returns when the trace has a line {key: value} of a step from `step` on; with step 0, when it stays the last."""
    follower, deadline = Follower(folder / "trace" / "process_0.jsonl"), time.monotonic() + seconds
    last, since = {}, time.monotonic()
    while time.monotonic() < deadline:
        for line in follower.new_lines():
            last, since = line, time.monotonic()
            if step and line.get(key) == value and line.get("step", step) >= step:
                return
        if not step and last.get(key) == value and time.monotonic() - since > 1.5:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {key} {value}")


def dispatched(folder: Path) -> int:
    """The last step that the trace shows."""
    lines = Follower(folder / "trace" / "process_0.jsonl").new_lines()
    return max((line["step"] for line in lines if line.get("phase") in ("step", "compile")), default=0)


def saved(folder: Path) -> int:
    return max(Store(folder / "run" / "checkpoints", config.Checkpoint()).steps(), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "key", "value", "step", "signum"),
    [
        ("data", "phase", "data", 0, signal.SIGTERM),
        ("evaluate", "phase", "evaluate", 0, signal.SIGHUP),
        ("c", "phase", "data", 0, signal.SIGINT),
        ("compile", "phase", "compile", 1, signal.SIGTERM),
        ("save", "saving", 3, 3, signal.SIGTERM),
        pytest.param("step", "phase", "step", 30, signal.SIGINT, marks=pytest.mark.exhaustive),  # as in test_resume.py
    ],
)
def test_a_signal_ends_the_run_soon_with_the_newest_state_on_disk(where, key, value, step, signum, tmp_path):
    flags = ("--compilation-cache=off",) if where == "compile" else ()
    with start(where, tmp_path, *flags) as process:
        wait_for(tmp_path, key, value, step)
        began = time.monotonic()
        process.send_signal(signum)
        out, shown = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    print(f"{where}: {seconds:.1f} s")
    assert process.returncode == 128 + signum, shown
    assert seconds < 20
    name = signal.Signals(signum).name
    if where == "compile":
        assert re.search(
            rf"stopped by {name}(; no step was complete| before the first step| at step 1, which is saved)", shown
        )
        return
    last = int(re.findall(r"step (\d+)(?:,| is) (?:which is )?saved", shown)[0])
    assert f"stopped by {name}" in shown
    python = rf"(python|{re.escape(sys.executable)})"  # as the shell's PATH has it
    assert re.search(rf"continue with: {python} -m trainer train --config=tests/stuck_config.py:{where}", shown)
    assert saved(tmp_path) == last == dispatched(tmp_path)
    assert ("the next launch makes it" in out) == (where == "evaluate")


def test_a_run_that_is_stopped_before_its_first_step_does_not_claim_a_save():
    assert "saved" not in str(Interrupted(0, signal.SIGINT))
    assert "at step 3, which is saved" in str(Interrupted(3, signal.SIGINT))


@pytest.mark.slow
def test_a_run_that_waits_for_its_data_too_long_names_the_examples_and_saves(tmp_path):
    flags = ("--config.watch.stall_seconds=1.5", "--config.watch.data_seconds=3")
    with start("data", tmp_path, *flags) as process:
        _, shown = process.communicate(timeout=120)
    assert process.returncode == 3
    stalled = re.search(
        r"no step for \d+ s: waiting for the batch of step (\d+) "
        r"\(positions (\d+) to (\d+) in the run's order of examples\)",
        shown,
    )
    assert stalled
    step, first, last = map(int, stalled.groups())
    assert (first, last) == (16 * (step - 1), 16 * step - 1)
    assert "thread MainThread:" in shown
    assert "in __getitem__" in shown  # the stack of the thread that is stuck
    assert f"error: no batch came in 3 s (watch.data_seconds) while waiting for the batch of step {step}" in shown
    assert f"step {step - 1} is saved; continue with:" in shown
    assert saved(tmp_path) == step - 1


def test_a_phase_costs_microseconds():
    with Watch(config.Watch()) as watch:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for step in range(2000):
                watch.enter("data", step)
            times.append((time.perf_counter() - began) / 2000)
    assert min(times) < 20e-6
