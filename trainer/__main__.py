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


def main() -> None:
    """Runs the command in `sys.argv` and exits with its code."""
    if sys.argv[1:2] != ["prepare"]:  # an interrupt there removes files that are half written
        signal.signal(signal.SIGINT, _exit_at_once)
    _use_cpu_without_accelerators()
    sys.exit(run(sys.argv[1:]))


def _use_cpu_without_accelerators() -> None:
    """Sets JAX_PLATFORMS=cpu on a machine with libtpu, which `plan` needs, and without accelerators.

    Otherwise libtpu would search for a second and print a page of errors before JAX takes the CPU.
    """
    accelerators = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*"), *Path("/dev").glob("nvidia*")]
    if not accelerators and not Path("/dev/kfd").exists() and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _exit_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """Ends the process, while there is nothing to save; `distributed.Preemption` replaces this handler during training.

    JAX would swallow a KeyboardInterrupt in one of its callbacks, and the command would go on.
    """
    del frame
    with suppress(RuntimeError):  # the signal may have come in the middle of a print
        sys.stdout.flush()
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    main()
