"""A group of connected processes on this machine, each with CPU devices of its own.

with ProcessGroup([sys.executable, "-m", "trainer", "train", "--config=FILE"], processes=2, devices=4) as group:
    exit_code = group.wait()
"""

import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Self

_HOST_ERROR_CODE = 3
_HEARTBEAT_SECONDS = 10
_GRACE_SECONDS = 5.0  # twice what the other processes need to end in good order after one has failed
_POLL_SECONDS = 0.05

# The parts in which Gloo writes "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is
# : 1", each with the number after it. The parts of several threads come mixed, and so do their line ends.
_GLOO_PARTS = re.compile(
    rb"(?:\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : )\d*"
)


class ProcessGroup:
    """Runs a command in several processes, connected as the hosts of a pod are. Enter it in the main thread.

    While entered, it passes SIGINT and SIGTERM on to the processes; at its exit it kills those that still run.
    """

    def __init__(self, command: Sequence[str], processes: int, devices: int) -> None:
        """Starts the processes: each runs `command` with the flags of `startup.initialize`, on `devices` CPU devices.

        Enter the group at once: only its exit ends processes that still run.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:  # to find a free port
            address = f"127.0.0.1:{server.getsockname()[1]}"
        flags = (f"--coordinator={address}", f"--processes={processes}", f"--heartbeat={_HEARTBEAT_SECONDS}")
        flag = "--xla_force_host_platform_device_count"
        xla_flags = re.sub(rf"{flag}=\S+", "", os.environ.get("XLA_FLAGS", "")) + f" {flag}={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.strip(), "PYTHONUNBUFFERED": "1"}
        self._processes = [_start([*command, *flags, f"--process={i}"], environment) for i in range(processes)]

    def __enter__(self) -> Self:
        signums = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {s: signal.signal(s, lambda signum, _: self.send_signal(signum)) for s in signums}
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with process:  # closes its pipes, and waits for its end
                process.kill()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def send_signal(self, signum: int) -> None:
        """Sends a signal to every process that still runs."""
        for process in self._processes:
            process.send_signal(signum)

    def wait(self) -> int:
        """Shows the output of the processes until all have ended; kills the others soon after one has failed.

        Returns the exit code of the process at fault, 128 + N if signal N killed it; 0 if none failed.
        """
        ended: dict[int, int] = {}  # exit codes by process, in the order in which the processes ended by themselves
        failed_at = float("inf")  # the time at which the first process failed
        with selectors.DefaultSelector() as selector:
            for index, process in enumerate(self._processes):
                for pipe, shown in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                    assert pipe is not None  # as `_start` opens it
                    selector.register(pipe, selectors.EVENT_READ, _LinePrinter(index, shown.buffer))
            running = ready = True
            # Read what is left in the pipes; do not wait for them to close, since a grandchild may hold them open.
            while running or ready:
                codes = [process.poll() for process in self._processes]
                running = None in codes
                if time.monotonic() < failed_at + _GRACE_SECONDS:
                    ended |= {i: code for i, code in enumerate(codes) if code is not None and i not in ended}
                else:
                    self.send_signal(signal.SIGKILL)
                if any(ended.values()):
                    failed_at = min(failed_at, time.monotonic())
                ready = selector.select(_POLL_SECONDS if running else 0)
                for key, _ in ready:
                    if not key.data.show(os.read(key.fd, 1 << 16)):
                        selector.unregister(key.fileobj)
        return self._report(ended)

    def _report(self, ended: Mapping[int, int]) -> int:
        """Names the process at fault, unless all have the same exit code, and returns its exit code.

        A process that a signal killed comes first; SIGABRT does not count, as JAX aborts a process by it when another
        one has died. Then comes the first one that failed by itself, then one that `wait` had to kill, then any with an
        exit code other than 0.
        """
        left = [i for i in range(len(self._processes)) if i not in ended]  # `wait` killed them
        if not left and len(set(ended.values())) == 1:
            code = next(iter(ended.values()))
            return code if code >= 0 else 128 - code
        # A process that ended because of another one ended with `HostError`'s code, or JAX aborted it.
        consequences = (0, _HOST_ERROR_CODE, -signal.SIGABRT)
        causes = [i for i, code in ended.items() if code not in consequences]
        killed = [i for i in causes if ended[i] < 0]
        failed = next(iter([*killed, *causes, *left, *(i for i, code in ended.items() if code)]))
        if failed in left:
            print(f"error: process {failed} did not end and was killed; all were ended", file=sys.stderr)
            return _HOST_ERROR_CODE
        code = ended[failed]
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"error: process {failed} {end}; all were ended", file=sys.stderr)
        return code if code > 0 else 128 - code


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a process. On Linux it dies with this one; on other systems it goes on if this one is killed."""
    parent = os.getpid()

    def die_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=die_with_parent,  # safe in a process without threads
        start_new_session=True,  # the terminal's Ctrl-C comes through `ProcessGroup.send_signal` only
    )


class _LinePrinter:
    """Prints each line of one pipe with the process number in front."""

    def __init__(self, index: int, shown: IO[bytes]) -> None:
        self._index, self._shown = index, shown
        self._partial, self._after_gloo = b"", False  # the incomplete last line; whether the last one was Gloo's

    def show(self, chunk: bytes) -> bool:
        """Prints the lines that end in `chunk`. An empty chunk is the end of the pipe: then it returns False."""
        *lines, self._partial = (self._partial + (chunk or b"\n")).split(b"\n")
        for line in lines if chunk else filter(None, lines):
            rest = _GLOO_PARTS.sub(b"", line)
            is_empty = not rest.strip(b" 0123456789")  # a number alone is the end of a report of Gloo's
            self._after_gloo = rest != line or (self._after_gloo and is_empty)
            if not (self._after_gloo and is_empty):
                self._shown.write(b"[%d] %s\n" % (self._index, rest))
        self._shown.flush()
        return bool(chunk)
