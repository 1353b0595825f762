"""Processes of a sweep: each cell is trained once, whoever dies, and no cell stops the others."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.sweep.many import STEPS, cells_of, train_all
from trainer.lock import began
from trainer.sweep import pool as pools
from trainer.sweep.cells import Cell
from trainer.sweep.halving import targets
from trainer.sweep.pool import Pool
from trainer.sweep.results import Results

ROOT = Path(__file__).parents[2]


def launches(folder: Path, cells: Sequence[Cell]) -> list[list[tuple[float, float]]]:
    """When each launch of each cell began and ended."""
    texts = [(folder / cell.name / "launches").read_text().splitlines() for cell in cells]
    return [[(float(line.split()[0]), float(line.split()[1])) for line in lines] for lines in texts]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def pid_of(folder: Path, cell: Cell) -> int:
    file = folder / cell.name / "pid"
    return int(wait_for(lambda: file.exists() and file.read_text()))


def run_pool(
    folder: Path, cells: Sequence[Cell], script: str, jobs: int = 1, **settings: Any
) -> tuple[Pool, list[str]]:
    """Runs `python -c script WORKDIR STEP` for each cell."""
    results, shown = Results(folder, "test/accuracy", "max"), list[str]()

    def command(cell: Cell, until: int) -> list[str]:
        return [sys.executable, "-S", "-c", script, str(results.workdir(cell)), str(until)]

    with Pool(results, command, jobs, shown.append, **settings) as pool:
        pool.run(cells, lambda: targets(cells, results.value, results.mode))
    return pool, shown


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_cell_is_trained_once_and_so_many_at_a_time(jobs, tmp_path):
    cells = cells_of(5)
    train_all(tmp_path, cells, 0.3, jobs)
    spans = [span for (span,) in launches(tmp_path, cells)]
    at_once = [sum(begin <= other[0] < end for begin, end in spans) for other in spans]
    assert min(jobs, 2) <= max(at_once) <= jobs  # a loaded machine may start the last one late
    assert Results(tmp_path, "test/accuracy", "max").value(cells[0], STEPS) == 0.5
    assert train_all(tmp_path, cells, 0.3, jobs) == []  # nothing is left
    assert [len(one) for one in launches(tmp_path, cells)] == [1] * 5


def start_another(folder: Path, seeds: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sweep.many", str(folder), str(seeds), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_sweeps_of_one_folder_share_the_cells(tmp_path):
    cells = cells_of(6)
    with start_another(tmp_path, 6, 0.5) as other:
        pid_of(tmp_path, cells[0])  # the other one has begun
        mine = train_all(tmp_path, cells, 0.5)
        theirs, _ = other.communicate(timeout=60)
    assert [len(one) for one in launches(tmp_path, cells)] == [1] * 6
    trained = [{line.split(":")[0] for line in lines if "trains to" in line} for lines in (mine, theirs.splitlines())]
    assert trained[0] | trained[1] == {cell.name for cell in cells}
    assert not trained[0] & trained[1]
    assert all(trained)


def test_a_killed_sweep_leaves_no_process_and_another_one_takes_its_cell(tmp_path):
    cells = cells_of(2)
    with start_another(tmp_path, 2, 600) as other:
        pid = pid_of(tmp_path, cells[0])
        other.send_signal(signal.SIGKILL)
        other.wait()
        wait_for(lambda: began(pid) is None or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z", 10)
    train_all(tmp_path, cells, 0.0)
    assert [len(one) for one in launches(tmp_path, cells)] == [1, 1]


def test_a_cell_of_another_host_is_left_alone_until_its_lock_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_LOOK_SECONDS", 0.1)
    (cell,) = cells_of(1)
    lock = tmp_path / cell.name / ".sweep" / ".lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": "another", "pid": 1, "began": "1"}))

    def age() -> None:
        assert not (tmp_path / cell.name / "pid").exists()
        os.utime(lock, (time.time() - 61,) * 2)

    timer = threading.Timer(1.0, age)
    timer.start()
    shown = train_all(tmp_path, [cell], 0.0)
    timer.join()
    assert shown[0] == f"waiting for {cell.name}: another process trains there"
    assert [len(one) for one in launches(tmp_path, [cell])] == [1]


FAILING = """
import pathlib, sys
workdir = pathlib.Path(sys.argv[1])
number = int(workdir.name.partition("=")[2])
with (workdir / "launches").open("a") as file:
    file.write("0 0\\n")
if number == 0:
    print("error: the loss of step 3 is nan", file=sys.stderr)
    sys.exit(1)
if number == 1:
    print("a table\\nerror: data set 'digits' is not prepared", file=sys.stderr)
    sys.exit(2)
if number == 2:
    raise ValueError("a mistake in the model")
if number == 3:
    import os
    os.kill(os.getpid(), 9)
(workdir / "metrics.jsonl").write_text('{"step": %s, "test/accuracy": 0.5}\\n' % sys.argv[2])
"""


def test_a_cell_that_fails_stops_no_other_and_is_tried_again_unless_it_diverged(tmp_path):
    cells = cells_of(5)
    run_pool(tmp_path, cells, FAILING, jobs=2)
    results = Results(tmp_path, "test/accuracy", "max")
    found = [results.failure(cell) for cell in cells]
    assert [(one.code, one.message, one.diverged) if one else None for one in found] == [
        (1, "the loss of step 3 is nan", True),
        (2, "data set 'digits' is not prepared", False),
        (1, "ValueError: a mistake in the model", False),
        (137, "killed by SIGKILL", False),
        None,
    ]
    run_pool(tmp_path, cells, FAILING)
    assert [len(one) for one in launches(tmp_path, cells)] == [1, 2, 2, 2, 1]
    run_pool(tmp_path, cells, FAILING.replace("if number == 3", "if number == 9"))
    assert results.failure(cells[3]) is None
    assert results.value(cells[3], STEPS) == 0.5


SAVING = """
import pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
def save(signum, frame):
    (workdir / "saved").write_text(str(signum))
    sys.exit(128 + signum)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
(workdir / "pid").write_text("1")
time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_in_good_order_and_is_no_failure(signum, tmp_path):
    cells = cells_of(3)

    def interrupt() -> None:
        for cell in cells[:2]:
            pid_of(tmp_path, cell)
        os.kill(os.getpid(), signum)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signum)
    pool, shown = run_pool(tmp_path, cells, SAVING, jobs=2)
    assert pool.signum == signum
    assert signal.getsignal(signum) == before
    for cell in cells[:2]:
        assert (tmp_path / cell.name / "saved").read_text() == str(int(signum))
        assert Results(tmp_path, "test/accuracy", "max").failure(cell) is None
        assert f"{cell.name}: stopped" in shown
    assert not (tmp_path / cells[2].name / "pid").exists()


# Notes whether others had trained when it began.
COMPILING = """
import pathlib, sys, time
workdir = pathlib.Path(sys.argv[1])
others = [file.parent.name for file in workdir.parent.glob("*/metrics.jsonl")]
(workdir / "others").write_text(" ".join(others))
time.sleep(0.5)
(workdir / "metrics.jsonl").write_text('{"step": %s, "test/accuracy": 0.5}\\n' % sys.argv[2])
time.sleep(0.5)
"""


def test_cells_that_share_a_program_wait_until_the_first_has_compiled_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_LOOK_SECONDS", 0.05)
    cells = cells_of(4)
    run_pool(tmp_path, cells, COMPILING, jobs=4, compiles_alike=lambda cell: cell.run.seed == 0)
    others = [(tmp_path / cell.name / "others").read_text().split() for cell in cells]
    assert others[:2] == [[], []]  # two programs: the first of each began at once
    assert all(cells[1].name in names for names in others[2:])


def test_an_error_of_the_sweep_lets_its_processes_save(tmp_path):
    (cell,) = cells_of(1)
    results = Results(tmp_path, "test/accuracy", "max")

    def command(cell: Cell, until: int) -> list[str]:
        return [sys.executable, "-S", "-c", SAVING, str(results.workdir(cell)), str(until)]

    def fail_later() -> dict[str, int]:
        if (tmp_path / cell.name / "pid").exists():
            raise OSError("the disk is gone")
        return {cell.name: STEPS}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "_LOOK_SECONDS", 0.05)
        with pytest.raises(OSError, match="the disk is gone"), Pool(results, command, 1, lambda text: None) as pool:
            pool.run([cell], fail_later)
    assert (tmp_path / cell.name / "saved").read_text() == str(int(signal.SIGTERM))
