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
    if sys.argv[1:2] != ["prepare"]:  # which removes what it has half written when it is interrupted
        signal.signal(signal.SIGINT, _leave)
    _leave_out_absent_chips()
    sys.exit(run(sys.argv[1:]))


def _leave_out_absent_chips() -> None:
    """Sets JAX_PLATFORMS=cpu where libtpu is installed, as `plan` needs it, on a machine without accelerators.

    There libtpu would take a second and print a page of errors before JAX takes the CPU.
    """
    found = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*"), *Path("/dev").glob("nvidia*")]
    if not found and not Path("/dev/kfd").exists() and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at once, while there is nothing to save; training takes the signal over when there is.

    A KeyboardInterrupt would be swallowed if it came in one of JAX's callbacks, and the run would go on.
    """
    del frame
    with suppress(RuntimeError):  # the signal may have come in the middle of a print
        sys.stdout.flush()
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    main()
