"""The processes of a sweep on one machine: each trains a cell that this sweep has claimed.

A claim is the lock of `WORKDIR/.sweep`, held as long as the process trains. If the sweep is killed, the kernel ends its
processes with it, and its claims are free: at once on this machine and where the file system has locks, else
after a minute (see `trainer.lock`). Whoever takes the cell then continues it from its last checkpoint.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

from trainer.errors import UserError
from trainer.files import host_error
from trainer.lock import locked
from trainer.sweep.cells import Cell
from trainer.sweep.results import LOG, OWN, Failure, Results

_POLL_SECONDS = 0.05
_LOOK_SECONDS = 2.0  # between looks at cells that other sweeps train
_END_SECONDS = 60.0  # for a process to save its state and end, before it is killed
_TAIL_BYTES = 1 << 16  # of a log, in which the last error is looked for
# Environment variables by which JAX finds the processes of one run. They are removed for the cells, since a cell is a
# run of one process.
_CLUSTER_VARIABLES = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE")
# Runs a command that the kernel kills as soon as its parent, of process id argv[1], is gone. (On systems other than
# Linux it goes on, and its workdir is locked until it ends.)
_DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class _Child(NamedTuple):
    cell: Cell
    until: int
    process: subprocess.Popen[bytes]
    claim: ExitStack
    log_begin: int  # the size of the log before this launch
    began: float


class Pool:
    """Trains cells, several at a time. Enter it in the main thread.

    While entered, SIGINT, SIGTERM and SIGHUP are passed on to the processes, which save their state and end, and no
    other cell is started.
    """

    def __init__(
        self,
        results: Results,
        command: Callable[[Cell, int], Sequence[str]],
        jobs: int,
        show: Callable[[str], None],
        compiles_alike: Callable[[Cell], object] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
          results: where the cells lie.
          command: trains a cell to a step.
          jobs: how many at a time.
          show: takes a line about each cell that begins or ends.
          compiles_alike: cells for which this is equal share a compiled program. Of these, one begins alone, and the
            others when it has trained its first steps. None: all begin as soon as they can.
        """
        self._results, self._command, self._jobs, self._show = results, command, jobs, show
        self._compiles_alike = compiles_alike
        self._children = list[_Child]()
        self._signals = list[int]()
        self._handlers: dict[int, Any] = {}
        self._launch = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._earlier: dict[str, Failure | None] = {}  # failures before this launch, which are tried again
        self._is_waiting = False

    @property
    def signum(self) -> int | None:
        """The first signal that came."""
        return self._signals[0] if self._signals else None

    def __enter__(self) -> Self:
        signums = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under `nohup`
            signums.append(signal.SIGHUP)
        self._handlers = {signum: signal.signal(signum, self._handle) for signum in signums}
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:  # there are some if an error ended the sweep
            child.process.terminate()
        for child in self._children:
            with child.claim:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(_END_SECONDS)
                child.process.kill()
                child.process.wait()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        self._signals.append(signum)

    def run(self, cells: Sequence[Cell], targets: Callable[[], Mapping[str, int]]) -> None:
        """Trains each cell to its target; returns when all are there or have failed, or after a signal.

        `targets` gives the step by the name of the cell, anew after each cell that ends anywhere.
        """
        self._earlier = {cell.name: self._results.failure(cell) for cell in cells}
        looked, passed_on = -float("inf"), 0
        while True:
            has_ended = self._collect()
            if passed_on < len(self._signals):
                for child in self._children:
                    child.process.send_signal(self._signals[passed_on])
                passed_on += 1
            elif self._signals:
                if not self._children:
                    return
            elif has_ended or time.monotonic() - looked > _LOOK_SECONDS:
                looked, steps = time.monotonic(), targets()
                left = [cell for cell in cells if not self._is_settled(cell, steps[cell.name])]
                if not left and not self._children:
                    return
                self._start_some(left, steps)
            time.sleep(_POLL_SECONDS)

    def _is_settled(self, cell: Cell, step: int) -> bool:
        """Whether nothing is left to do for a cell: it is at its target, or has failed and is not tried again."""
        if self._results.metrics(cell, step) is not None:
            return True
        failure = self._results.failure(cell)
        return failure is not None and (failure.diverged or failure != self._earlier[cell.name])

    def _start_some(self, left: Sequence[Cell], steps: Mapping[str, int]) -> None:
        """Starts cells while there is room, and says once if all that are left are trained elsewhere."""
        running = {child.cell.name for child in self._children}
        compiling = {} if self._compiles_alike is None else self._compiling(self._compiles_alike)
        for cell in left:
            if len(self._children) >= self._jobs or self._signals:
                return
            if cell.name in running or (self._compiles_alike and self._compiles_alike(cell) in compiling.values()):
                continue
            if (claim := self._claim(cell, steps[cell.name])) is not None:
                self._start(cell, steps[cell.name], claim)
                if self._compiles_alike is not None:
                    compiling[cell.name] = self._compiles_alike(cell)
        if left and not self._children and not self._is_waiting:
            self._is_waiting = True
            self._show(f"waiting for {', '.join(cell.name for cell in left)}: another process trains there")

    def _compiling(self, compiles_alike: Callable[[Cell], object]) -> dict[str, object]:
        """For each running cell that has no row of metrics yet: the value of `compiles_alike`, by name."""

        def has_trained(cell: Cell) -> bool:
            file = self._results.workdir(cell) / "metrics.jsonl"
            return file.exists() and file.stat().st_size > 0

        cells = [child.cell for child in self._children]
        return {cell.name: compiles_alike(cell) for cell in cells if not has_trained(cell)}

    def _claim(self, cell: Cell, step: int) -> ExitStack | None:
        """The claim of a cell; None if another process has it, or has just finished the cell."""
        workdir = self._results.workdir(cell)
        with ExitStack() as stack:
            try:
                (workdir / OWN).mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(workdir / OWN))
                with locked(workdir):  # nobody trains there by hand
                    pass
            except UserError:
                return None
            except OSError as error:
                raise host_error(workdir / OWN, error) from error
            return None if self._is_settled(cell, step) else stack.pop_all()

    def _start(self, cell: Cell, until: int, claim: ExitStack) -> None:
        command = self._command(cell, until)
        environment = {name: value for name, value in os.environ.items() if name not in _CLUSTER_VARIABLES}
        file = self._results.workdir(cell) / LOG
        try:
            with file.open("ab") as log:
                begin = log.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
                    env=environment | {"PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # the terminal's Ctrl-C comes through this pool only
                )
        except OSError as error:
            claim.close()
            raise host_error(file, error) from error
        self._children.append(_Child(cell, until, process, claim, begin, time.monotonic()))
        self._show(f"{cell.name}: process {process.pid} trains to step {until:,}")

    def _collect(self) -> bool:
        """Writes the result of each process that has ended. Returns whether any has ended."""
        ended = [child for child in self._children if child.process.poll() is not None]
        for child in ended:
            self._children.remove(child)
            with child.claim:
                self._record(child)
        return bool(ended)

    def _record(self, child: _Child) -> None:
        """Writes the result of a process that has ended, and shows a line about it."""
        cell, code = child.cell, child.process.returncode
        seconds = time.monotonic() - child.began
        if code == 0:
            self._results.write_done(cell, child.until)
            metrics = self._results.metrics(cell, child.until) or {}
            value = metrics.get(self._results.metric, f"is not evaluated (there are {', '.join(metrics)})")
            shown = (
                f", {self._results.metric} {value:.6g}"
                if isinstance(value, float)
                else f", {self._results.metric} {value}"
            )
            self._show(f"{cell.name}: at step {child.until:,} after {seconds:.0f} s{shown}")
        elif self._signals:
            self._show(f"{cell.name}: stopped")
        else:
            code = code if code > 0 else 128 - code
            message, diverged = _last_error(self._results.workdir(cell) / LOG, child.log_begin, code)
            self._results.write_failure(cell, Failure(code, message, diverged and code == 1, self._launch))
            self._show(f"{cell.name}: failed with exit code {code} after {seconds:.0f} s: {message}")


def _last_error(log: Path, begin: int, code: int) -> tuple[str, bool]:
    """The last line of error that a launch wrote, and whether it is one of ours, and no traceback."""
    with log.open("rb") as stream:
        stream.seek(max(begin, log.stat().st_size - _TAIL_BYTES))
        lines = [line for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    if code > 128:
        with suppress(ValueError):
            return f"killed by {signal.Signals(code - 128).name}", False
    errors = [line for line in lines if line.startswith("error: ")]
    if errors and not any(re.match("Traceback ", line) for line in lines):
        return errors[-1].removeprefix("error: "), True
    return (lines[-1].strip() if lines else "it printed nothing"), False
