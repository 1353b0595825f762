"""What the user can mend: reported as one line, with exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a command, a config, an experiment or a workdir; its message is the one line to show."""


class NotPreparedError(UserError):
    """A data set that is not on disk yet; commands add how to prepare it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error about an unknown `name`: the closest of the `known` names, then all of them when they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = f" (known: {', '.join(known)})" if 0 < len(known) <= 12 else ""
    return hint + listed
