"""The processes of a run: how they agree, how they fail together, and how a signal stops them."""

import itertools
import os
import shlex
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
from jax._src.distributed import global_state  # strings and barriers with a time limit: JAX has no public ones

from trainer.distributed import peers
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
        with peers.waiting("processes"):
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
        peers.fail(error, code)
        sys.stdout.flush()
        print(message, end="", file=sys.stderr, flush=True)
        os._exit(code)


class Interrupted(KeyboardInterrupt, CollectiveError):  # noqa: N818 - named like its base
    """A signal stopped the run, in all of its processes, after the state was saved."""

    def __init__(self, step: int, signum: int) -> None:
        """`step` is the saved step, from which the run can continue; 0 if none was made."""
        self.signum = signal.Signals(signum)
        place = f"at step {step}, which is saved" if step else "before the first step"
        super().__init__(f"stopped by {self.signum.name} {place}; {again()}")


class Break(BaseException):
    """A signal came in a region that may be broken off."""


class Preemption:
    """While entered, SIGINT, SIGTERM and SIGHUP do not break a step: `signal_after` reports them. A second SIGINT does.

    Handlers are installed in the main thread only, as Python demands. A signal to any of several processes stops them
    all. A Jupyter kernel keeps its SIGINT, which interrupts the cell, and `nohup` its SIGHUP.
    """

    def __init__(self, handle_signals: bool = True, wake_at: Callable[[Collection[int]], int] | None = None) -> None:
        """`handle_signals=False`, which all processes must give alike, installs no handler and reports no signal.

        `wake_at`, given the signals, returns a descriptor on which the number of each is written when it comes, even
        if the main thread is in a long call of C.
        """
        self._enabled, self._group, self._wake_at = handle_signals, count() > 1, wake_at
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._is_breakable, self._wakeup, self._agreement = False, -1, peers.agreement()

    def __enter__(self) -> Self:
        if self._enabled and threading.current_thread() is threading.main_thread():
            left_alone = {
                signal.SIGINT: _in_jupyter(),
                signal.SIGTERM: False,
                signal.SIGHUP: signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
            }
            self._previous = {s: signal.signal(s, self._handle) for s, is_left in left_alone.items() if not is_left}
            if self._wake_at is not None and not self._group:
                self._wakeup = signal.set_wakeup_fd(self._wake_at(list(self._previous)), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous and self._wake_at is not None and not self._group:
            signal.set_wakeup_fd(self._wakeup)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def signal_after(self) -> int | None:
        """The signal that ends the run now, in every process; None if none came.

        Every process calls it at the same points.
        """
        if not self._group or not self._enabled:
            return self._signum
        if self._agreement is None:  # JAX was not connected by `startup`: a slower way, with a barrier at each call
            return max(map(int, gather("signal", str(int(self._signum or 0))))) or None
        with peers.waiting("processes"):
            return self._agreement.signal_after(self._signum)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """A region that a signal to a process alone ends at once, by raising `Break`."""
        self._is_breakable = not self._group
        try:
            if self._signum is not None and self._is_breakable:
                raise Break
            yield
        finally:
            self._is_breakable = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self._signum = signum
        if self._is_breakable:
            self._is_breakable = False
            raise Break


def again() -> str:
    """How to go on with a run that was stopped: the command line, if it was one of ours."""
    program = Path(sys.argv[0])
    ours = {"__main__.py": "python -m trainer", "trainer": "trainer"}.get(program.name)
    if ours is None or count() > 1 or (program.name == "__main__.py" and program.parent.name != "trainer"):
        return "launch it again to go on"
    return f"continue with: {ours} {shlex.join(sys.argv[1:])}"


def _in_jupyter() -> bool:
    """Whether a Jupyter kernel runs this process; IPython in a terminal has none."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_ipython(), "kernel", None) is not None
