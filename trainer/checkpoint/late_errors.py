"""Errors of reads that Orbax gave up: they come after the error that was reported, and say nothing."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any


def drop_late_read_errors() -> None:
    """Silences messages about reads that Orbax abandoned when another read failed."""
    if not isinstance(sys.unraisablehook, _DropLateReadErrors):
        sys.unraisablehook = _DropLateReadErrors(sys.unraisablehook)
    warnings.filterwarnings("ignore", r"coroutine '(_read_array|ArrayHandler\.)", RuntimeWarning)


class _DropLateReadErrors:
    """Drops errors of TensorStore reads that end after an earlier read failed and Orbax closed their event loop."""

    def __init__(self, report: Callable[[Any], Any]) -> None:
        self._report = report

    def __call__(self, unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine that is dropped
        is_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
        if not is_orbax and str(unraisable.exc_value) != "Event loop is closed":
            self._report(unraisable)
