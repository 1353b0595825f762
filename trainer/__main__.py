"""`python -m trainer COMMAND`, and the console command `trainer`."""

import sys

from trainer.commands import run


def main() -> None:
    """Runs the command in `sys.argv` and exits with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
