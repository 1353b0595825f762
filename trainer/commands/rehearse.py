"""`rehearse`: a run in several processes on this machine, each with CPU devices of its own."""

import argparse
import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from trainer.errors import UserError

DESCRIPTION = (
    "Runs a command in several JAX processes on this machine, connected as the hosts of a pod are, and shows what each "
    "prints behind its number. When one dies, all are ended."
)
_HEARTBEAT_SECONDS = 10
_GRACE_SECONDS = 5.0  # for the others to end in good order; twice what that takes
_POLL_SECONDS = 0.05


def add_options(parser: argparse.ArgumentParser) -> None:
    """How many processes and devices, and which command."""
    parser.add_argument("--processes", metavar="N", type=int, default=2, help="how many processes (default 2)")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="CPU devices of each (default 1)")
    parser.add_argument("--command", default="train", choices=("train", "evaluate"), help="what to run (default train)")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="as for train")
    parser.add_argument("--step", help="as for evaluate")


def start(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """The exit code of the first process to fail, as a shell would give it; 0 if none does."""
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.config is None and options.workdir is None:
        raise UserError("give --config=FILE, or --workdir=DIR with a run in it")
    if options.command == "evaluate" and options.workdir is None:
        raise UserError("give --workdir=DIR, whose run is to be evaluated")
    for name, command in (("profile", "train"), ("step", "evaluate")):
        if getattr(options, name) is not None and options.command != command:
            raise UserError(f"--{name} is for --command={command}")
    if options.workdir is None:
        options.workdir = tempfile.mkdtemp(prefix="rehearsal-")
        print(f"no --workdir: the run is in {options.workdir}", flush=True)
    flags = ("config", "workdir", "profile", "step")
    command = [sys.executable, "-m", "trainer", options.command]
    command += [f"--{name}={getattr(options, name)}" for name in flags if getattr(options, name) is not None]
    command += ["--traceback"] if options.traceback else []
    return run_group([*command, *overrides], options.processes, options.devices)


def run_group(command: Sequence[str], processes: int, devices: int) -> int:
    """Runs a command with the flags of `distributed.initialize` added, once for each process, and waits for all.

    Must be called in the main thread.
    """
    group = [
        f"--coordinator=127.0.0.1:{_free_port()}",
        f"--processes={processes}",
        f"--heartbeat={_HEARTBEAT_SECONDS}",
    ]
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }
    children = [_Child([*command, *group], i, environment) for i in range(processes)]

    def forward(signum: int, frame: FrameType | None) -> None:
        del frame
        for child in children:
            child.process.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _watch(children)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class _Child:
    """One process of the group, which dies with this one."""

    def __init__(self, command: Sequence[str], place: int, environment: dict[str, str]) -> None:
        self.place = place
        parent = os.getpid()

        def die_with_parent() -> None:
            if sys.platform == "linux":  # elsewhere kill -9 of this process leaves the children to their heartbeats
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

        self.process = subprocess.Popen(
            [*command, f"--process={place}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent,  # safe: no thread was started yet
            start_new_session=True,  # Ctrl-C comes once, from here
        )
        self._rests: dict[int, bytes] = {}  # of a line, by file descriptor
        self._after_noise = False

    def relay(self, pipe: int, shown: IO[bytes]) -> bool:
        """Shows the lines that have come through a pipe; false once there will be no more."""
        chunk = os.read(pipe, 1 << 16)
        *lines, rest = (self._rests.pop(pipe, b"") + chunk).split(b"\n")
        if chunk:
            self._rests[pipe] = rest
        elif rest:
            lines.append(rest)
        for line in lines:
            # What Gloo says of its connections, several threads at a time, goes with the empty lines that it leaves.
            self._after_noise = b"[Gloo]" in line or (self._after_noise and not line.strip())
            if not self._after_noise:
                shown.write(b"[%d] %s\n" % (self.place, line))
        shown.flush()
        return bool(chunk)

    def fate(self) -> str:
        """How it ended."""
        code = self.process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _watch(children: Sequence[_Child]) -> int:
    first: _Child | None = None  # to fail
    deadline = float("inf")
    with selectors.DefaultSelector() as selector:
        for child in children:
            for pipe, shown in ((child.process.stdout, sys.stdout), (child.process.stderr, sys.stderr)):
                assert pipe is not None  # as it was opened
                selector.register(pipe, selectors.EVENT_READ, (child, shown.buffer))
        while True:
            running = [child for child in children if child.process.poll() is None]
            for child in children:
                if first is None and child.process.returncode:
                    first, deadline = child, time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                for child in running:
                    child.process.kill()
            ready = selector.select(_POLL_SECONDS if running else 0)
            for key, _ in ready:
                child, shown = key.data
                if not child.relay(key.fd, shown):
                    selector.unregister(key.fileobj)
            if not running and not ready:  # a pipe may be kept open by processes of a child
                break
    if first is None:
        return 0
    code = first.process.returncode
    if any(child.process.returncode != code for child in children):
        print(f"error: process {first.place} {first.fate()}; all were ended", file=sys.stderr)
    return code if code > 0 else 128 - code


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
