"""Worker processes: the batches of one process, and an end in good order whoever is killed."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from trainer.data import ArraySource
from trainer.data.order import Order
from trainer.data.stream import Batches, train_batches
from trainer.data.workers import read_in_workers
from trainer.errors import HostError

ROOT = Path(__file__).parents[2]
EXAMPLES, BATCH, STEPS = 23, 8, 40

pytestmark = pytest.mark.slow  # a worker takes seconds to start


class Source:
    """Numbered examples; reading the one with the number `at` fails, or hangs."""

    def __init__(self, at: int = -1, *, hangs: bool = False) -> None:
        self.at, self.hangs = at, hangs
        self.x = np.random.default_rng(0).normal(size=(EXAMPLES, 300)).astype(np.float32)

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.at:
            if self.hangs:
                time.sleep(1000)
            raise OSError("the disk is gone")
        return {"number": np.int32(index), "x": self.x[index]}


def whole(start: int = 0, **settings: Any) -> list[Any]:
    return list(train_batches(Source(), seed=0, batch_size=BATCH, start=start, stop=STEPS, **settings))


def dataset(source: Source) -> grain.IterDataset:
    batches = Batches(source, seed=0, batch_size=BATCH, steps=STEPS)
    return grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))


def workers() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("grain")]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.exhaustive  # of the next two tests one has a later start, the other one worker
def test_one_worker_gives_the_batches_of_threads_bit_for_bit_and_ends_with_them():
    assert_same(whole(workers=1), whole())
    assert workers() == []


def test_workers_give_the_batches_of_threads_from_any_start_whatever_signals_the_group_gets_and_end_with_them():
    batches = train_batches(Source(), seed=0, batch_size=BATCH, start=7, stop=STEPS, workers=3)
    found = [next(batches)]
    assert len(workers()) == 3
    for worker in workers():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    found += batches
    assert_same(found, whole()[7:])
    assert workers() == []


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_places_that_processes_read_with_workers_make_up_the_global_batch(processes):
    # Each process reads every other place, as for the chips of a torus, and not one range.
    places = [np.arange(first, BATCH, processes) for first in range(processes)]
    span: dict = {"seed": 0, "batch_size": BATCH, "start": 0, "stop": 5}
    read = [train_batches(Source(), **span, local_positions=p, workers=1) for p in places]
    for parts, expected in zip(zip(*read, strict=True), whole()[:5], strict=True):
        for name, array in expected.items():
            joined = np.empty_like(array)
            for p, part in zip(places, parts, strict=True):
                joined[p] = part[name]
            np.testing.assert_array_equal(joined, array)


def test_arrays_in_memory_are_read_without_workers():
    source = ArraySource({"number": np.arange(EXAMPLES)})
    next(train_batches(source, seed=0, batch_size=BATCH, start=0, stop=STEPS, workers=2))
    assert workers() == []


def test_an_error_of_the_source_is_raised_where_the_batches_are_used():
    with pytest.raises(OSError, match="the disk is gone"):
        list(read_in_workers(dataset(Source(at=11)), 2))
    assert workers() == []


@pytest.mark.parametrize(
    ("signum", "message"),
    [
        (
            signal.SIGKILL,
            r"a worker process of the data died \(exit code -9\) while batch {} was awaited: .*out of memory",
        ),
        (signal.SIGSTOP, r"batch {} did not come from the 2 worker processes in 12 s: process \d+ is stopped"),
    ],
)
def test_a_killed_or_stopped_worker_is_an_error_that_names_the_batch_and_leaves_no_worker(signum, message):
    batches = read_in_workers(dataset(Source()), 2, timeout_seconds=12, first=100)
    next(batches)
    os.kill(workers()[0].pid, signum)
    start, given = time.monotonic(), 1
    with pytest.raises(HostError) as raised:  # noqa: PT012 - it counts what came before
        for _ in batches:
            given += 1
    assert re.match(message.format(100 + given), str(raised.value))
    assert time.monotonic() - start < 20
    assert workers() == []


def test_a_source_that_hangs_is_an_error_after_the_time_limit_and_no_worker_stays():
    first = int(Order(EXAMPLES, seed=0)(np.zeros(1, np.int64))[0])
    with pytest.raises(HostError, match="batch 0 did not come from the 2 worker processes in 5 s: the source hangs"):
        next(read_in_workers(dataset(Source(at=first, hangs=True)), 2, timeout_seconds=5))
    assert workers() == []


PROGRAM = """
import os, signal, sys
from tests.data.test_workers import dataset, Source, workers
from trainer.data.workers import read_in_workers

{guard}
    batches = read_in_workers(dataset(Source()), 2, timeout_seconds=60)
    next(batches)
    print(*[worker.pid for worker in workers()], flush=True)
    {then}
"""


def run(folder: Path, **parts: str) -> subprocess.CompletedProcess[str]:
    file = folder / "program.py"
    file.write_text(PROGRAM.format(**parts))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(file)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


STOP = "os.kill(workers()[0].pid, signal.SIGSTOP); "


@pytest.mark.parametrize(
    ("then", "code"),
    [
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", -9, marks=pytest.mark.exhaustive),
        (f"{STOP}os.kill(os.getpid(), signal.SIGKILL)", -9),
        pytest.param("os._exit(3)", 3, marks=pytest.mark.exhaustive),  # no more than SIGKILL lets Python do
        ("raise KeyboardInterrupt", -2),
        pytest.param("sys.exit(3)", 3, marks=pytest.mark.exhaustive),  # atexit, as after KeyboardInterrupt
    ],
    ids=["killed", "killed with a stopped worker", "left at once", "interrupted", "left"],
)
def test_workers_end_with_the_process_that_reads_from_them_however_it_ends(tmp_path, then, code):
    start = time.monotonic()
    result = run(tmp_path, guard="if __name__ == '__main__':", then=then)
    assert result.returncode == code, result.stderr
    assert "resource_tracker" not in result.stderr
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2
    while any(alive(pid) for pid in pids):
        assert time.monotonic() - start < 60
        time.sleep(0.1)


def test_a_program_without_a_guard_is_told_so(tmp_path):
    result = run(tmp_path, guard="if True:", then="pass")
    assert result.returncode == 1
    assert result.stderr.count('does the program lack `if __name__ == "__main__":`?') == 1
