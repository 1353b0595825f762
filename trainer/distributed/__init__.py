"""The processes that train one run together: how they agree and how they end."""

import itertools
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax._src.distributed import global_state  # barriers with a time limit: JAX has no public ones

from trainer.errors import CollectiveError, UserError

_SECONDS = 600  # of patience at a barrier: far more than hosts differ by in loading their data
_calls: Counter[str] = Counter()


class ReportedError(UserError):
    """A mistake that another process reports; a command ends with exit code 2 and says nothing."""


def count() -> int:
    """How many processes there are."""
    return global_state.num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which one this is, from 0."""
    return global_state.process_id if jax.distributed.is_initialized() else 0


def is_primary() -> bool:
    """Whether this is the process that writes and speaks: the first."""
    return index() == 0


def gather(name: str, value: str = "", *, seconds: float = _SECONDS) -> list[str]:
    """What every process gives under a name, in their order; returns when all have given it, for the nth time if it is.

    Raises:
      TimeoutError: not all came within `seconds`; it names those missing.
    """
    client = global_state.client
    if client is None:
        return [value]
    _calls[name] += 1
    key = f"trainer/{name}/{_calls[name]}"
    client.key_value_set(f"{key}/{index():06}", value)
    try:
        client.wait_at_barrier(key, round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
        missing = ", ".join(str(i) for i in range(count()) if i not in came)
        if not missing:
            raise
        raise TimeoutError(f"waited {seconds:g} s at {name!r} for process {missing} of {count()}") from error
    return [value for _, value in sorted(client.key_value_dir_get(key))]


def barrier(name: str, seconds: float = _SECONDS) -> None:
    """Returns when all processes are here; raises `TimeoutError`, which names those missing, after `seconds`."""
    gather(name, seconds=seconds)


@contextmanager
def collective_errors(name: str) -> Iterator[None]:
    """Ends in all processes alike: a mistake that any of them finds inside is raised in all, and told by one.

    Raises:
      UserError: in the first process that found one.
      ReportedError: in all others.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as found:
        error = found
    failed = [i for i, text in enumerate(gather(name, type(error).__name__ if error else "")) if text]
    if not failed:
        return
    if error is None or failed[0] != index():
        error = ReportedError(f"see process {failed[0]}")
    vars(error)["agreed"] = True
    raise error


def check_same(what: str, text: str) -> None:
    """Raises `UserError` in one process, `ReportedError` in the others, unless the text is the same in all of them."""
    texts = gather(what, text)
    with collective_errors(what):
        mine, first = text.splitlines(), texts[0].splitlines()
        for here, there in itertools.zip_longest(mine, first, fillvalue="nothing"):
            if here != there:
                here, there = (line.strip(" ,") for line in (here, there))
                raise UserError(f"{what}: process {index()} has {here}, process 0 has {there}")


@contextmanager
def fail_fast() -> Iterator[None]:
    """What one of several processes fails with alone inside ends it at once; the others miss its heartbeat.

    Anything orderly would hang: the others wait for this one in a collective, and it for them when JAX shuts down. An
    exception is everybody's, and passes, if it has a true attribute `agreed`.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1 or isinstance(error, CollectiveError) or getattr(error, "agreed", False):
            raise
        sys.stdout.flush()
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, UserError | KeyboardInterrupt):
            print(f"error: {error}" if isinstance(error, UserError) else "\ninterrupted", file=sys.stderr)
            code = 2 if isinstance(error, UserError) else 130
        else:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
