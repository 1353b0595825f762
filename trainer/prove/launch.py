"""One launch of the real command: started, followed through its trace, sent a signal in a chosen phase, awaited."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from trainer.distributed.launch import ProcessGroup
from trainer.errors import HostError
from trainer.observe.phase_log import Follower

SAVING = "saving"  # the asynchronous part of a save, which goes on beside the phases of the main thread
_POLL_SECONDS = 0.0005
_FREEZE_SECONDS = 0.002  # after which a process that was sent SIGSTOP stands still


class ProcessLayout(NamedTuple):
    """The processes and devices of a launch, and how it shards."""

    processes: int = 1
    devices: int | None = None  # CPU devices of each process; None for the devices of this machine
    strategy: str | None = None  # None for that of the config

    def __str__(self) -> str:
        parts = [f"{self.processes} × {'own' if self.devices is None else self.devices}", self.strategy]
        return " ".join(filter(None, parts))


class Aim(NamedTuple):
    """The moment for a signal, and the process that gets it."""

    phase: str  # one of `aims.PHASES`
    step: int  # the first update at which the phase counts
    last: int  # after this update the signal is sent in any phase
    delay: float  # seconds after the phase has begun
    signum: signal.Signals
    process: int
    everyone: bool = False  # whether all processes get it


class Hit(NamedTuple):
    """The moment at which a signal came."""

    phase: str
    step: int
    saving: bool  # whether a save was being written


class End(NamedTuple):
    """How a launch ended."""

    code: int  # its exit code, 128 + N if signal N killed it
    hit: Hit | None  # None: it ended before its signal
    seconds: float  # since it was started


class Trail:
    """Where one process of a launch is, as its trace says."""

    def __init__(self, file: Path) -> None:
        """The file need not exist yet."""
        self._follower = Follower(file)
        self.pid: int | None = None
        self.phase, self.step, self._writing = "start", 0, dict[int, bool]()
        self._since, self._saving_since = 0.0, 0.0  # as of `time.monotonic`

    def read(self) -> bool:
        """Reads on; returns whether anything was new."""
        lines = list(self._follower.new_lines())
        for line in lines:
            if "launch" in line:
                self.pid = line["launch"]
            elif "phase" in line:
                self.phase, self.step, self._since = line["phase"], line["step"], line["time"]
            elif SAVING in line:
                # A short save may have ended before the main thread could write that it had begun.
                self._writing.setdefault(line[SAVING], True)
                self._saving_since = line["time"]
            elif "saved" in line:
                self._writing[line["saved"]] = False
        return bool(lines)

    @property
    def saving(self) -> bool:
        """Whether a save is being written."""
        return any(self._writing.values())

    def is_in(self, phase: str, step: int, delay: float = 0.0) -> bool:
        """Whether this process is in a phase of `step` or a later update, and has been for `delay` seconds."""
        here, since = (self.saving, self._saving_since) if phase == SAVING else (self.phase == phase, self._since)
        return here and self.step >= step and time.monotonic() - since >= delay

    def hit(self) -> Hit:
        """Where it is."""
        return Hit(self.phase, self.step, self.saving)


class _Running(Protocol):
    def poll(self) -> int | None:
        """The exit code, 128 + N if signal N killed it; None while it runs."""


def run_launch(
    command: Sequence[str], layout: ProcessLayout, folder: Path, *, aim: Aim | None = None, limit: float
) -> End:
    """Runs a command that writes its trace to `folder`, and sends it the signal that `aim` describes, if any.

    Args:
      command: `python -m trainer train …`, without the flags of several processes.
      layout: where it runs.
      folder: for its trace, and for its output, in the files `stdout` and `stderr`.
      aim: None lets it run to its end.
      limit: seconds without a line of the trace, or after the signal, until it counts as stuck.

    Raises `HostError` if it is stuck. None of its processes is left when this returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began, hit = time.monotonic(), None
    watched = [Trail(folder / f"process_{i}.jsonl") for i in range(layout.processes)]
    with _started(command, layout, folder) as running:
        deadline = time.monotonic() + limit
        while (code := running.poll()) is None:
            if sum(trail.read() for trail in watched) and hit is None:
                deadline = time.monotonic() + limit
            if hit is None and aim is not None:
                hit = _send_if_due(aim, watched)
            if time.monotonic() > deadline:
                since = "its last line of the trace" if hit is None else "its signal"
                raise HostError(f"a launch still ran {limit:g} s after {since}; its output is in {folder}")
            time.sleep(_POLL_SECONDS if hit is None and aim is not None else 0.01)
    if aim is not None and hit is not None and aim.signum == signal.SIGKILL:
        watched[aim.process].read()  # nothing came after the signal, so its last line tells where it was killed
        place = watched[aim.process].hit()
        hit = place._replace(saving=place.saving or hit.saving)
    return End(code, hit, time.monotonic() - began)


def _send_if_due(aim: Aim, trails: Sequence[Trail]) -> Hit | None:
    """Sends the signal if its moment has come, and returns the moment; None if it has not come.

    A process can leave a phase before the signal arrives. So it is stopped first, and goes on if it has left.
    """
    victim, watched = trails[aim.process], trails[0 if aim.phase == SAVING else aim.process]
    pids = [trail.pid for trail in (trails if aim.everyone else [victim]) if trail.pid is not None]
    if victim.pid is None:
        return None
    # Phases that last microseconds cannot be seen before they are over: stop at any time, then look.
    blind = aim.phase in ("data", "step") and victim.step >= aim.step
    if not (blind or victim.step > aim.last or watched.is_in(aim.phase, aim.step, aim.delay)):
        return None
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(victim.pid, signal.SIGSTOP)
        time.sleep(_FREEZE_SECONDS)
        victim.read()
        watched.read()
        hit = None
        if victim.step > aim.last or watched.is_in(aim.phase, aim.step):
            hit = victim.hit()._replace(saving=watched.saving)
            for pid in pids:
                os.kill(pid, aim.signum)
        os.kill(victim.pid, signal.SIGCONT)
        return hit
    return None


@contextmanager
def _started(command: Sequence[str], layout: ProcessLayout, folder: Path) -> Iterator[_Running]:
    """Starts a command; at the end nothing of it is left."""
    with ExitStack() as stack:
        stdout, stderr = (stack.enter_context((folder / name).open("w")) for name in ("stdout", "stderr"))
        if layout.processes > 1:
            yield stack.enter_context(_several(command, layout, stdout, stderr))
            return
        environment = dict(os.environ)
        if layout.devices is not None:
            flag = "--xla_force_host_platform_device_count"
            flags = re.sub(rf"{flag}=\S+", "", environment.get("XLA_FLAGS", "")) + f" {flag}={layout.devices}"
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            yield _Alone(process)
        finally:
            with suppress(ProcessLookupError):  # the usual case: the whole group has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Alone(NamedTuple):
    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


class _Several:
    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._code = group, list[int]()
        self.thread = threading.Thread(target=lambda: self._code.append(self._group.wait()), name="launch")
        self.thread.start()

    def poll(self) -> int | None:
        if self.thread.is_alive():
            return None
        return self._code[0]


@contextmanager
def _several(command: Sequence[str], layout: ProcessLayout, stdout: IO[str], stderr: IO[str]) -> Iterator[_Several]:
    """A group of processes, whose output goes to two files."""
    signums = (signal.SIGINT, signal.SIGTERM)
    ours = [signal.getsignal(signum) for signum in signums]
    with redirect_stdout(stdout), redirect_stderr(stderr):
        with ProcessGroup(command, layout.processes, layout.devices or 1) as group:
            for signum, handler in zip(signums, ours, strict=True):
                signal.signal(signum, handler)  # a signal to the proof ends it; the group would pass it on
            running = _Several(group)
            yield running
        running.thread.join()
