"""Python's search for garbage in cycles, paused while almost all objects that are made stay.

Imports, the tracing of a model and a restored checkpoint make them by the hundred thousand. To look at them again and
again took a twelfth of the time to the first step of a small model.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_is_paused = False  # by this module: it does not end a pause that the user began


def pause_gc() -> None:
    """Looks for no more garbage in cycles, until `resume_gc`."""
    global _is_paused
    if gc.isenabled():
        gc.disable()
        _is_paused = True


def resume_gc() -> None:
    """Ends the pause, if there is one."""
    global _is_paused
    if _is_paused:
        _is_paused = False
        gc.enable()


@contextmanager
def gc_paused() -> Iterator[None]:
    """A pause for the time of a block; within a longer pause it does nothing."""
    was_enabled = gc.isenabled()
    pause_gc()
    try:
        yield
    finally:
        if was_enabled:
            resume_gc()
