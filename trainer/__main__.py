"""`python -m trainer COMMAND`, and the console command `trainer`."""

import importlib.util
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from trainer.commands import run
from trainer.errors import HostError
from trainer.observe.output import make_safe

# Commands that go on when nobody can read what they print.
_TRAINING = {"train", "rehearse", "sweep"}


def main() -> None:
    """Runs the command in `sys.argv` and exits with its code."""
    make_safe(is_needed=_TRAINING.isdisjoint(sys.argv[1:2]))
    if sys.argv[1:2] != ["prepare"]:  # `prepare` needs KeyboardInterrupt to remove its partial files
        signal.signal(signal.SIGINT, _exit_at_once)  # until training begins: `distributed.Preemption` replaces it
    devices = [path for name in ("accel*", "vfio/[0-9]*", "nvidia*", "kfd") for path in Path("/dev").glob(name)]
    if not devices and importlib.util.find_spec("libtpu"):  # libtpu is here for `plan` only
        # Else libtpu would search for TPUs, which takes a second, and print a page of errors before JAX takes the CPU.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    code = run(sys.argv[1:])
    distributed = sys.modules.get("trainer.distributed")
    if code and distributed is not None and distributed.count() == 1:
        # The end of Python would wait for threads that still compile, or that read an example for ever.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _exit_at_once(signum: int, _: FrameType | None) -> NoReturn:
    """Ends the process: JAX would swallow a KeyboardInterrupt in one of its callbacks, and the command would go on."""
    with suppress(RuntimeError, OSError, HostError):  # in the middle of a print, or nobody reads it
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    main()
