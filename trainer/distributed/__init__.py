"""The processes of a run: how they agree, how they fail together, and how a signal stops them."""

import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
from jax._src.distributed import global_state  # strings and barriers with a time limit: JAX has no public ones

from trainer.distributed import peers
from trainer.errors import CollectiveError, HostError, UserError

_BARRIER_SECONDS = 600  # far more than the slowest host needs beyond the fastest one to load its data
_calls: Counter[str] = Counter()  # of `gather`, by name


class CollectiveUserError(UserError, CollectiveError):
    """A mistake that one process found and every process raises.

    In the process that found it, `__cause__` is the original error.
    """


def count() -> int:
    """The number of processes."""
    return jax.process_count() if jax.distributed.is_initialized() else 1  # counting would start JAX's backend


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_primary() -> bool:
    """Whether this is process 0, which alone shows progress and writes the settings and metrics of the workdir.

    All processes write their shards of a checkpoint and their profiles, and may print an error to stderr.
    """
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
def collective_errors(barrier: str) -> Iterator[None]:
    """Raises a `UserError` of any process in all of them at the end of the block, as a `CollectiveUserError`.

    In the first process that found an error, `__cause__` is that error. A run of one process raises it unchanged. Every
    process passes the same `barrier`, the name at which they wait for each other.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        if count() == 1 or isinstance(raised, CollectiveError):
            raise
        error = raised
    texts = gather(barrier, f"{type(error).__name__}: {error}" if error else "")
    first = next((i for i, text in enumerate(texts) if text), None)
    if first is not None:
        raise CollectiveUserError(f"process {first}: {texts[first]}") from (error if first == index() else None)


def check_same(name: str, text: str) -> None:
    """Raises `CollectiveUserError`, with the first line that differs, unless all processes pass the same text.

    `name` begins the error, and is the name at which the processes wait for each other: all pass the same.
    """
    texts = gather(name, text)
    with collective_errors(name):
        for here, there in itertools.zip_longest(text.splitlines(), texts[0].splitlines(), fillvalue="nothing"):
            if here != there:
                here, there = (line.strip(" ,") for line in (here, there))
                raise UserError(f"{name}: process {index()} has {here}, process 0 has {there}")


def same_numbers(name: str, values: Mapping[str, float] | None) -> dict[str, float] | None:
    """The numbers of process 0, by name: the last digits of other hosts may differ. None if no process has any.

    Raises `CollectiveUserError`, as `check_same` does, if those of a process differ by more than a thousandth.
    """
    mine = json.dumps(values and dict(values), indent=0, sort_keys=True)
    first = gather(f"{name}, process 0", mine)[0]
    found = json.loads(first)
    if values and found and values.keys() == found.keys():
        is_near = all(np.isclose(x, found[key], rtol=1e-3, equal_nan=True) for key, x in values.items())
        mine = first if is_near else mine
    check_same(name, mine)
    return found


@contextmanager
def fail_fast() -> Iterator[None]:
    """Ends this process at once on an exception that the other processes do not raise. The others then end, too.

    They end when they get its message, or else when its connection closes or its heartbeats are missing. An orderly
    exit would hang: JAX's shutdown waits for the other processes, which wait for this one in a collective.
    A `CollectiveError` passes, since every process raises it. In a run of one process every exception passes.
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
        super().__init__(f"stopped by {self.signum.name} {place}; {how_to_continue()}")


class Break(BaseException):
    """A signal came in a region that may be broken off."""


class Preemption:
    """While entered, SIGINT, SIGTERM and SIGHUP do not break a step: `signal_after` reports them.

    A SIGINT that follows any of these signals raises KeyboardInterrupt at once.

    Handlers are installed in the main thread only, as Python demands. A signal to any of several processes stops them
    all. A Jupyter kernel keeps its SIGINT, which interrupts the cell, and `nohup` its SIGHUP.
    """

    def __init__(self, handle_signals: bool = True, wakeup_fd: Callable[[Collection[int]], int] | None = None) -> None:
        """`handle_signals=False`, which all processes must give alike, installs no handler and reports no signal.

        `wakeup_fd` gets the signals and returns a descriptor. When one of them comes, its number is written there,
        even if the main thread is in a long call of C.
        """
        self._enabled, self._is_multiprocess, self._wakeup_fd = handle_signals, count() > 1, wakeup_fd
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._is_breakable, self._previous_fd, self._agreement = False, -1, peers.agreement()

    def __enter__(self) -> Self:
        if self._enabled and threading.current_thread() is threading.main_thread():
            left_alone = {
                signal.SIGINT: _in_jupyter(),
                signal.SIGTERM: False,
                signal.SIGHUP: signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
            }
            self._previous = {s: signal.signal(s, self._handle) for s, is_left in left_alone.items() if not is_left}
            if self._wakeup_fd is not None and not self._is_multiprocess:
                descriptor = self._wakeup_fd(list(self._previous))
                self._previous_fd = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous and self._wakeup_fd is not None and not self._is_multiprocess:
            signal.set_wakeup_fd(self._previous_fd)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def signal_after(self) -> int | None:
        """The signal that ends the run now, in every process; None if none came.

        Every process calls it at the same points.
        """
        if not self._is_multiprocess or not self._enabled:
            return self._signum
        if self._agreement is None:  # JAX was not connected by `startup`: a slower way, with a barrier at each call
            return max(map(int, gather("signal", str(int(self._signum or 0))))) or None
        with peers.waiting("processes"):
            return self._agreement.signal_after(self._signum)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """In a run of one process, a signal ends the block at once by raising `Break`."""
        self._is_breakable = not self._is_multiprocess
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


def how_to_continue() -> str:
    """Text for the user: the command that continues the run, if `trainer` or `python -m trainer` started it."""
    program = Path(sys.argv[0])
    ours = {"__main__.py": f"{_interpreter()} -m trainer", "trainer": "trainer"}.get(program.name)
    if ours is None or count() > 1 or (program.name == "__main__.py" and program.parent.name != "trainer"):
        return "launch it again to go on"
    return f"continue with: {ours} {shlex.join(sys.argv[1:])}"


def _interpreter() -> str:
    """The command of this Python for a shell: `python`, or a path if `python` is another one or none."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)


def _in_jupyter() -> bool:
    """Whether a Jupyter kernel runs this process; IPython in a terminal has none."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_ipython(), "kernel", None) is not None
