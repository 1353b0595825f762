"""Commands in processes of their own, and runs that several tests read."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import xla_flags
from trainer.rules import paths

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/multiprocess/config.py"
ENDLESS = "--config.total_steps=1000000"


class Group:
    """A command that runs in the root of the repository, and its output after `end`."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": xla_flags()} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stdout = self.stderr = ""

    def end(self, seconds: float = 120) -> int:
        """Waits for the command and returns its exit code."""
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode

    def errors(self) -> list[str]:
        """The lines of standard error that report a mistake."""
        return [line for line in self.stderr.splitlines() if "error: " in line]

    def child(self, index: int) -> int:
        """The process id of process `index` of `rehearse`."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        flag = f"--process={index}".encode()
        return next(int(pid) for pid in pids if flag in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))

    def wait_until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)


def rehearse(*arguments: str) -> Group:
    return Group("-m", "trainer", "rehearse", *arguments)


def finished(group: Group) -> Group:
    assert group.end() == 0, group.stderr
    return group


def rows_of(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def arrays(workdir: Path, step: int = 20) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, read as NumPy without any of this project's code."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(folder, restore_args=as_numpy)
    return dict(zip(paths(restored), jax.tree.leaves(restored), strict=True))


@pytest.fixture
def running() -> Iterator[list[Group]]:
    """Commands that are killed at the end of the test if they still run."""
    groups: list[Group] = []
    yield groups
    for group in groups:
        group.process.kill()
        group.process.communicate()


@pytest.fixture(scope="session")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Group]:
    """A finished run in two processes with two devices each, parameters and moments sharded over all four."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    flags = ("--processes=2", "--devices=2", "--profile=3:4", "--config.evaluation.every_steps=10")
    return workdir, finished(rehearse(CONFIG, f"--workdir={workdir}", *flags))


@dataclass
class Stopped:
    """A group that has ended because SIGSTOP stopped one of its processes."""

    group: Group
    pids: list[int]
    code: int
    seconds: float  # from the signal to the end


def stop(group: Group, pids: list[int], index: int) -> Stopped:
    """Stops a process of a group for ever."""
    os.kill(pids[index], signal.SIGSTOP)
    began = time.monotonic()
    code = group.end(60)
    return Stopped(group, pids, code, time.monotonic() - began)


@pytest.fixture(scope="session")
def in_four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Stopped]]:
    """The same run in four processes with a device each, but endless: the last one is stopped after 24 rows."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    flags = ("--processes=4", "--config.evaluation.every_steps=10")
    group = rehearse(CONFIG, f"--workdir={workdir}", ENDLESS, *flags)
    try:
        group.wait_until(lambda: rows_of(workdir) >= 24)
        yield workdir, stop(group, [group.child(index) for index in range(4)], 3)
    finally:
        group.process.kill()
