"""`python -m trainer COMMAND`, and the console command `trainer`."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from trainer.commands import run


def main() -> None:
    """Runs the command in `sys.argv` and exits with its code."""
    if sys.argv[1:2] != ["prepare"]:  # which removes what it has half written when it is interrupted
        signal.signal(signal.SIGINT, _leave)
    sys.exit(run(sys.argv[1:]))


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
