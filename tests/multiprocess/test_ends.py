"""A group of processes ends in good order on a signal, soon when one process fails, and always as a whole."""

import fcntl
import json
import os
import re
import signal
import socket
import time

import pytest

from tests.multiprocess.conftest import (
    CONFIG,
    ENDLESS,
    Group,
    Stopped,
    finished,
    free_port,
    is_alive,
    rehearse,
    rows_of,
    stop,
)
from trainer import config
from trainer.checkpoint import Store

pytestmark = pytest.mark.slow

PLAIN = f"{CONFIG}:plain"
LAUNCH_AGAIN = "the run ends, launch it again to go on from the last checkpoint"


def start(running, workdir, *flags, steps: int = 3) -> tuple[Group, list[int]]:
    """A command in two processes, or as many as `flags` say, that has made some steps, and their process ids."""
    group = rehearse(PLAIN, f"--workdir={workdir}", *flags)
    running.append(group)
    group.wait_until(lambda: rows_of(workdir) >= steps)
    count = next((int(flag.partition("=")[2]) for flag in flags if flag.startswith("--processes=")), 2)
    return group, [group.child(index) for index in range(count)]


def assert_gone(pids: list[int], seconds: float = 3) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"left behind: {pids}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signum", "code", "to_one"),
    [(signal.SIGTERM, 143, True), pytest.param(signal.SIGINT, 130, False, marks=pytest.mark.exhaustive)],
)
def test_a_signal_to_one_process_or_to_all_saves_one_step_and_ends_all(signum, code, to_one, running, tmp_path):
    workdir = tmp_path / "run"
    group, pids = start(running, workdir, ENDLESS, "--config.checkpoint.every_steps=1000000")
    os.kill(pids[1] if to_one else group.process.pid, signum)
    assert group.end(30) == code
    steps = Store(workdir / "checkpoints", config.Checkpoint()).steps()
    assert len(steps) == 1
    said = f"[0] stopped by {signum.name} at step {steps[0]}, which is saved; launch it again to go on"
    assert [line for line in group.stderr.splitlines() if "stopped" in line] == [said]
    assert not group.errors()
    assert rows_of(workdir) == steps[0]
    assert_gone(pids)


TO_ONE, TO_ALL = (signal.SIGTERM, 143), (signal.SIGINT, 130)


@pytest.mark.parametrize("signals", [[TO_ONE], pytest.param([TO_ONE, TO_ALL], marks=pytest.mark.exhaustive)])
def test_an_evaluation_that_is_broken_off_once_or_twice_is_still_owed_and_made(signals, running, tmp_path, monkeypatch):
    workdir, flags = tmp_path / "run", (f"{CONFIG}:slow", f"--workdir={tmp_path}/run")
    for signum, code in signals:
        (folder := tmp_path / signum.name).mkdir()
        monkeypatch.setenv("SLOW_EVALUATION", str(folder))
        running.append(rehearse(*flags))
        # Both processes evaluate: to open the data they read fewer examples.
        running[-1].wait_until(lambda folder=folder: [f.stat().st_size > 5 for f in folder.iterdir()] == [True, True])
        os.kill(running[-1].child(1) if signum == signal.SIGTERM else running[-1].process.pid, signum)
        assert running[-1].end(30) == code, running[-1].stderr
        assert "the evaluation of step 10 is broken off: the next launch makes it" in running[-1].stdout
        assert rows_of(workdir) == 10
    monkeypatch.delenv("SLOW_EVALUATION")
    running.append(rehearse(*flags))
    assert "step 10 was not yet evaluated on 'test': evaluating it now" in finished(running[-1]).stdout
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "test/loss" in row] == [10, 20]


def newest_step(workdir) -> int:
    return max(Store(workdir / "checkpoints", config.Checkpoint()).steps(), default=0)


def kill_one(group: Group, pids: list[int], index: int) -> None:
    """Kills a process; it is named, and the others end at once."""
    os.kill(pids[index], signal.SIGKILL)
    began = time.monotonic()
    assert group.end(30) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 10
    assert group.stderr == (
        f"[{int(index == 0)}] error: process {index} on {socket.gethostname()} was killed or crashed; {LAUNCH_AGAIN}\n"
        f"error: process {index} was killed by SIGKILL; all were ended\n"
    )
    assert_gone(pids, 0)


def test_a_killed_process_is_named_and_the_others_end_at_once_and_a_relaunch_goes_on(running, tmp_path):
    workdir = tmp_path / "run"
    kill_one(*start(running, workdir, ENDLESS, steps=22), 1)
    killed_at = newest_step(workdir)
    group = rehearse(PLAIN, f"--workdir={workdir}", ENDLESS)
    running.append(group)
    group.wait_until(lambda: newest_step(workdir) >= killed_at + 10)
    kill_one(group, [group.child(index) for index in range(2)], 0)
    assert f"resumed from step {killed_at}" in group.stdout
    step = newest_step(workdir)
    running.append(rehearse(f"--workdir={workdir}", f"--config.total_steps={step + 5}"))
    assert f"resumed from step {step}" in finished(running[-1]).stdout
    assert newest_step(workdir) == step + 5


@pytest.mark.exhaustive
def test_a_killed_process_of_four_is_named_and_the_others_end_at_once(running, tmp_path):
    kill_one(*start(running, tmp_path / "run", ENDLESS, "--processes=4", steps=22), 1)


def assert_stopped(stopped: Stopped, index: int) -> None:
    """The process that was stopped is named and killed, and the others end after the limit."""
    assert stopped.code == 3
    assert stopped.seconds < 10 + 15
    said = (
        rf"\[{int(index == 0)}\] error: process {index} on \S+ does not answer for \d+ s \(is it stopped, or .*\?\); "
    )
    last = f"{LAUNCH_AGAIN}\nerror: process {index} did not end and was killed; all were ended\n"
    assert re.fullmatch(said + last, stopped.group.stderr)
    assert_gone(stopped.pids, 0)


@pytest.mark.exhaustive  # test_training.py stops one of four
def test_a_stopped_process_of_two_is_named_and_killed_and_the_other_ends_after_the_limit(running, tmp_path):
    assert_stopped(stop(*start(running, tmp_path / "run", ENDLESS, steps=22), 0), 0)


def test_a_killed_rehearsal_leaves_no_process_behind(running, tmp_path):
    group, pids = start(running, tmp_path / "run", ENDLESS)
    assert all(map(is_alive, pids))
    group.process.kill()
    assert_gone(pids)


def test_an_exception_in_one_of_two_processes_that_slurm_started_ends_both_without_rehearse(running, tmp_path):
    for index in range(2):
        environment = {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
            "JAX_COORDINATOR_PORT": str(free_port()) if not index else running[0].port,
        }
        flags = (CONFIG, f"--workdir={tmp_path}/run", "--heartbeat=5", "--config.experiment.broken_in=1")
        running.append(Group("-m", "trainer", "train", *flags, **environment))
        running[-1].port = environment["JAX_COORDINATOR_PORT"]
    assert running[1].end() == 1
    began = time.monotonic()
    assert running[1].stderr.count("OSError: the disk is gone") == 1
    assert "Traceback" in running[1].stderr
    assert running[0].end(30) == 1
    assert time.monotonic() - began < 15
    host = socket.gethostname()
    assert running[0].stderr == f"error: process 1 on {host} failed: OSError: the disk is gone; the run ends\n"


def test_a_lone_process_of_three_says_in_time_where_it_waited_and_who_did_not_come(running, tmp_path):
    ports = free_port(), free_port()
    began = time.monotonic()
    for index, port in enumerate(ports):
        flags = (f"--coordinator=127.0.0.1:{port}", f"--process={index}", "--processes=3", "--wait=2")
        running.append(Group("-m", "trainer", "train", CONFIG, f"--workdir={tmp_path}/run", *flags))
    assert [group.end() for group in running] == [2, 2]
    assert time.monotonic() - began < 30
    came = f"error: only 1 of 3 processes came within 2 s to 127.0.0.1:{ports[0]}: no process 1, 2\n"
    waited = f"error: process 0 of 3 at 127.0.0.1:{ports[1]} did not answer; process 1 waited 2 s\n"
    assert [group.stderr for group in running] == [came, waited]
    assert not (tmp_path / "run").exists()


# The exhaustive ones are found where others are, a wrong name also in test_bad_input.py.
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            (CONFIG, "--config.batchsize=8"),
            r"config has no field 'batchsize'; did you mean 'batch_size'\?",
            marks=pytest.mark.exhaustive,
        ),
        (
            (f"{CONFIG}:differing",),
            'the processes were not started alike: process 1 has "batch_size": 32, process 0 has "batch_size": 16\n',
        ),
        ((CONFIG, "--config.batch_size=6"), "batch_size 6 does not divide over 4 batch shards"),
        pytest.param(
            (CONFIG, "--config.total_steps=9", "--profile=8:10"),
            "the profile is to end with step 10, the run ends with 9",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ("--config=configs/digits.py", "--config.experiment.data_dir=/nowhere"),
            "data set 'digits' is not prepared in /nowhere; prepare it with: python -m trainer prepare --config=",
            marks=pytest.mark.exhaustive,
        ),
        (
            (CONFIG, "--compilation-cache=README.md"),  # handed on to the processes
            r"--compilation-cache=README\.md cannot be made a folder: File exists\n",
        ),
    ],
    ids=["typo", "differing", "batch", "profile", "not prepared", "cache"],
)
def test_a_mistake_is_one_line_of_one_process_and_leaves_nothing(flags, message, running, tmp_path):
    running.append(rehearse(*flags, "--processes=2", "--devices=2", f"--workdir={tmp_path}/run"))
    assert running[0].end() == 2
    assert len(running[0].stderr.splitlines()) == 1
    assert re.match(rf"\[[01]\] error: {message}", running[0].stderr)
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_only_the_first_process_can_find_ends_all(running, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running.append(rehearse(PLAIN, f"--workdir={workdir}"))
        assert running[0].end() == 2
    assert running[0].stderr == f"[0] error: another process is training in workdir {workdir}\n"


def test_divergence_ends_all_at_the_same_step_with_one_line(running, tmp_path):
    running.append(rehearse(PLAIN, f"--workdir={tmp_path}/run", "--config.experiment.explode_at=1"))
    assert running[0].end() == 1
    error = (
        r"\[0\] error: the loss of step ([1-4]) is inf; the run is stopped, there is no checkpoint yet; recomputed, "
    )
    found = re.fullmatch(
        error + r"the loss is inf again; python -m trainer replay .*diverged/\1 .*\n", running[0].stderr
    )
    assert found, running[0].stderr
    assert rows_of(tmp_path / "run") < 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((CONFIG, "--processes=0"), "--processes is 0; it must be at least 1"),
        ((), "give --config=FILE, or --workdir=DIR with a run in it"),
        ((CONFIG, "--command=evaluate"), "give --workdir=DIR, whose run is to be evaluated"),
        ((CONFIG, "--step=best"), "--step is for --command=evaluate"),
    ],
)
def test_rehearse_refuses_what_it_cannot_start(flags, message):
    group = rehearse(*flags)
    assert group.end() == 2
    assert group.stderr == f"error: {message}\n"
    assert group.stdout == ""
