"""The processes of a run: how they agree, how they fail together, and how a signal stops them."""

import itertools
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import jax
from jax._src.distributed import global_state  # strings and barriers with a time limit: JAX has no public ones
from jax.experimental.multihost_utils import reached_preemption_sync_point

from trainer.errors import CollectiveError, HostError, UserError

_BARRIER_SECONDS = 600  # far more than hosts differ by in loading their data
_calls: Counter[str] = Counter()  # of `gather`, by name


class CollectiveUserError(UserError, CollectiveError):
    """A mistake that one process found and every process raises; its cause is the error itself where it was found."""


def count() -> int:
    """The number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1  # counting would start JAX's backend


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_primary() -> bool:
    """Whether this is process 0, the only one that writes to the workdir and to the terminal."""
    return index() == 0


def gather(name: str, value: str = "", *, seconds: float = _BARRIER_SECONDS) -> list[str]:
    """Returns the values of all processes, in their order, once all have called it with this name.

    A name can be used again: the nth call in one process belongs to the nth call in the others. Raises `TimeoutError`,
    which names the missing processes, if not all called it within `seconds`.
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
        arrived = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
        missing = ", ".join(str(i) for i in range(count()) if i not in arrived)
        if not missing:
            raise
        raise TimeoutError(f"waited {seconds:g} s at {name!r} for process {missing} of {count()}") from error
    return [value for _, value in sorted(client.key_value_dir_get(key))]


@contextmanager
def collective_errors(name: str) -> Iterator[None]:
    """Raises a `UserError` of any process in all of them at the end of the block, as a `CollectiveUserError`.

    Its cause, in the first process that found a mistake, is that mistake. A run of one process raises it unchanged.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        if count() == 1 or isinstance(raised, CollectiveError):
            raise
        error = raised
    texts = gather(name, f"{type(error).__name__}: {error}" if error else "")
    first = next((i for i, text in enumerate(texts) if text), None)
    if first is not None:
        raise CollectiveUserError(f"process {first}: {texts[first]}") from (error if first == index() else None)


def check_same(message: str, text: str) -> None:
    """Raises `CollectiveUserError`, with the first line that differs, unless all processes pass the same text."""
    texts = gather(message, text)
    with collective_errors(message):
        for here, there in itertools.zip_longest(text.splitlines(), texts[0].splitlines(), fillvalue="nothing"):
            if here != there:
                here, there = (line.strip(" ,") for line in (here, there))
                raise UserError(f"{message}: process {index()} has {here}, process 0 has {there}")


@contextmanager
def fail_fast() -> Iterator[None]:
    """If a single process of several raises an exception, it exits at once; the others notice its missing heartbeat.

    An orderly exit would hang: JAX's shutdown waits for the other processes, which wait for this one in a collective.
    A `CollectiveError` passes, since every process raises it.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1 or isinstance(error, CollectiveError):
            raise
        if isinstance(error, UserError | HostError):
            message, code = f"error: {error}\n", 3 if isinstance(error, HostError) else 2
        elif isinstance(error, KeyboardInterrupt):
            message, code = "\ninterrupted\n", 130
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            message, code = "", error.code
        else:
            message, code = traceback.format_exc(), 1
        sys.stdout.flush()
        print(message, end="", file=sys.stderr, flush=True)
        os._exit(code)


class Interrupted(KeyboardInterrupt, CollectiveError):  # noqa: N818 - named like its base
    """A signal stopped the run, in all of its processes, after the state was saved."""

    def __init__(self, step: int, signum: int) -> None:
        """`step` is the saved step, from which the run can continue."""
        self.signum = signal.Signals(signum)
        super().__init__(f"stopped by {self.signum.name} at step {step}, which is saved; launch it again to go on")


class Preemption:
    """While entered, SIGINT and SIGTERM do not break a step: `signal_after` reports them. A second SIGINT breaks it.

    A process alone handles signals in its main thread only, as Python demands. Of several processes, JAX's preemption
    service takes a SIGTERM to any of them and informs the others; a SIGINT is handed on to the service. A Jupyter
    kernel keeps its SIGINT, which interrupts the cell.
    """

    def __init__(self, handle_signals: bool = True) -> None:
        """`handle_signals=False` installs no handler and reports no signal."""
        self._enabled, self._group = handle_signals, count() > 1
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._enabled and threading.current_thread() is threading.main_thread():
            left_alone = {signal.SIGINT: _in_jupyter(), signal.SIGTERM: self._group}
            self._previous = {s: signal.signal(s, self._handle) for s, is_left in left_alone.items() if not is_left}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def signal_after(self, step: int) -> int | None:
        """The signal that ends the run after `step`, the same step in every process; None if none came.

        Call it once a step, in every process. A process that received no signal itself gets SIGTERM.
        """
        if not self._group or not self._enabled:
            return self._signum
        return (self._signum or signal.SIGTERM) if reached_preemption_sync_point(step) else None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self._signum = signum
        if self._group:
            os.kill(os.getpid(), signal.SIGTERM)


def _in_jupyter() -> bool:
    """Whether a Jupyter kernel runs this process; IPython in a terminal has none."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_ipython(), "kernel", None) is not None
