"""Errors: mistakes of the user, which commands show as one line with exit code 2, and those that all processes raise."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a command, a config, an experiment or a workdir; its message is the one line to show."""


class NotPreparedError(UserError):
    """A data set that is not on disk yet; commands add how to prepare it."""


class CollectiveError(Exception):
    """An error that every process of a run raises at the same point, so that all can end in good order."""


class DivergedError(CollectiveError):
    """The loss, the gradient or the state of a step is not finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: the closest of the `known` names, and all of them if there are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = f" (known: {', '.join(known)})" if 0 < len(known) <= 12 else ""
    return hint + listed
