"""The header of the benchmarks' tables, and what the table of readers compares."""

import datetime
import itertools
import multiprocessing
import platform
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from benchmarks import commit, cpu_model, header, reading


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=A Tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(("git", *identity, *command), cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_marked_while_tracked_files_differ_from_it(tmp_path):
    assert commit(tmp_path) == "unknown"
    git(tmp_path, "init")
    (tmp_path / "tracked").write_text("before")
    git(tmp_path, "add", "tracked")
    git(tmp_path, "commit", "--message=first")
    revision = git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert commit(tmp_path) == revision
    (tmp_path / "tracked").write_text("after")
    assert commit(tmp_path) == f"{revision}+changes"


def test_the_header_has_commit_date_versions_and_cpu():
    first, second = header().splitlines()
    parts = first.split(", ")
    assert parts[0] == f"commit {commit()}"
    assert abs(datetime.date.today() - datetime.date.fromisoformat(parts[1])) <= datetime.timedelta(days=1)
    assert parts[2:4] == [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
    assert [part.split()[0] for part in parts[4:]] == ["jaxlib", "optax", "flax"]
    assert second.startswith(f"{cpu_model()}, ")


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_every_way_to_read_gives_each_example_once_an_epoch(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "EXAMPLES", 4 * reading.BATCH)
    (name, *_), arrays = reading.stored(kind), reading.stored(kind)
    expected = sorted(example.tobytes() for example in arrays[name])
    ways = {way: batches for way, batches in reading.readers(kind, str(tmp_path)).items() if "workers" not in way}
    assert len(ways) >= 5
    for way, batches in ways.items():
        epoch = [np.asarray(batch[name]) for batch in itertools.islice(batches, 4)]
        assert {len(batch) for batch in epoch} == {reading.BATCH}, way
        assert sorted(example.tobytes() for batch in epoch for example in batch) == expected, way
        getattr(batches, "close", lambda: None)()


def test_the_cpu_time_is_that_of_this_process_and_its_workers():
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()
    try:
        before = reading.settled()
        times = [psutil.Process(pid).cpu_times() for pid in (None, worker.pid)]
        assert times[1].user > 0
        assert before == pytest.approx(sum(one.user + one.system for one in times), abs=0.1)
        np.random.default_rng(0).random(10**7)
        spent = psutil.Process().cpu_times()
        assert reading.cpu_seconds() - before == pytest.approx(
            spent.user + spent.system - times[0].user - times[0].system, abs=0.05
        )
    finally:
        worker.kill()
        worker.join()
