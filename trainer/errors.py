"""Errors: mistakes of the user (exit code 2), faults of a machine (3), and errors that all processes raise."""

import difflib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in a command, a config, an experiment or a workdir; its message is the one line to show."""


class NotPreparedError(UserError):
    """A data set that is not on disk yet; commands add how to prepare it."""


class HostError(Exception):
    """A fault of a machine: a full disk, a file system that is away, a process that died. Exit code 3; one line."""


class CollectiveError(Exception):
    """An error that every process of a run raises at the same point, so that all can end in good order."""


class DivergedError(CollectiveError):
    """Training diverged: a loss, a gradient or a state is not finite, or `max_skips` updates in a row were dropped."""

    def __init__(self, text: str, step: int, *, can_be_skipped: bool = False) -> None:
        """`divergence.explain` adds to the text.

        Args:
          text: the reason.
          step: counted from 1.
          can_be_skipped: whether `numerics.on_nonfinite="skip"` would have dropped the update.
        """
        super().__init__(text)
        self.reason, self.step, self.can_be_skipped = text, step, can_be_skipped

    def explained(self, more: str) -> "DivergedError":
        """The same error with a longer text."""
        error = DivergedError(f"{self.reason}; {more}", self.step, can_be_skipped=self.can_be_skipped)
        error.reason = self.reason
        return error


def kind_of(x: object) -> str:
    """The kind of a wrong value, for an error: "an array", "None", or its type."""
    return "an array" if hasattr(x, "dtype") else "None" if x is None else f"a value of type {type(x).__name__}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The text to append to an error about an unknown `name`: the closest of the `known` names, and all if few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = f" (known: {', '.join(known)})" if 0 < len(known) <= 12 else ""
    return hint + listed


def error_origin(error: BaseException) -> tuple[str, bool]:
    """Where an error came from, as a pair of two things.

    The first is the line of the model or of the experiment, as " (file:line)", "" if there is none; the second is
    whether the error came from this package itself.
    """
    frames, own = traceback.extract_tb(error.__traceback__), Path(__file__).parent
    users = [f for f in frames if "site-packages" not in f.filename and own not in Path(f.filename).parents]
    where = f" ({users[-1].filename}:{users[-1].lineno})" if users else ""
    return where, not users or own in Path(frames[-1].filename).parents


@contextmanager
def model_errors(spec: Mapping[str, Any]) -> Iterator[None]:
    """Turns an exception of a model during tracing into a one-line `UserError` with its source location and the batch.

    Args:
      spec: shapes and dtypes of the batch, by name.
    """
    import flax.errors  # takes a second, for which `--help` and mistyped flags need not wait

    try:
        yield
    except (AttributeError, IndexError, TypeError, ValueError, KeyError, NameError, flax.errors.FlaxError) as error:
        where, is_ours = error_origin(error)
        message = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        if isinstance(error, NameError) and "unbound axis name" in message:
            raise UserError(
                f"the model averages over an axis that is not there{where}: {message}; in the model write "
                "axis_name=replica_axis(), from trainer.experiment, in place of the name"
            ) from error
        if isinstance(error, AttributeError | NameError) and is_ours:
            raise  # a mistake of ours
        batch = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in spec.items())
        raise UserError(
            f"the model does not fit its batch{where}: {type(error).__name__}: {message}; the batch has {batch} "
            "(--traceback shows the whole error)"
        ) from error
