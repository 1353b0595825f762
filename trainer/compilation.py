"""Compilation: ahead of the first step, in a thread of its own, and kept on disk for the next launch."""

import hashlib
import os
import platform
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from trainer.errors import UserError

_CACHE_BYTES = 10 << 30
_THREAD = "compilation ahead of the first step"


class AheadCompiled:
    """A jitted function that is compiled at its first call, or ahead of it; the call then waits for the compilation.

    It is called as the jitted function is.
    """

    def __init__(self, jitted: Any, arguments: tuple[Any, ...]) -> None:
        """`arguments` are those of every call, abstract: a `jax.ShapeDtypeStruct` with its sharding for each array."""
        self.jitted, self._arguments = jitted, arguments
        self._compiled: futures.Future[Callable[..., Any]] | None = None
        self._call: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Calls the compiled function."""
        if self._call is None:
            if self.announce():  # compiled for the abstract arguments, for which `build_program` has traced it
                self.compile()
            self._call = self.jitted if self._compiled is None else self._compiled.result()
        return self._call(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """As that of the jitted function."""
        return self.jitted.lower(*arguments)

    def announce(self) -> bool:
        """Makes the first call wait for a `compile` in another thread; returns whether it is needed."""
        if self._compiled is not None or not hasattr(self.jitted, "lower"):
            return False
        self._compiled = futures.Future()
        return True

    def compile(self) -> None:
        """Compiles what was announced. An error is raised by the first call instead."""
        assert self._compiled is not None
        try:
            self._compiled.set_result(self.jitted.lower(*self._arguments).compile())
        except BaseException as error:
            self._compiled.set_exception(error)


def compile_ahead(*steps: AheadCompiled) -> None:
    """Compiles steps in a thread, one after the other, unless they were given to it before.

    XLA compiles without Python's lock, so other work goes on.
    """
    announced = [step for step in steps if step.announce()]

    def run() -> None:
        for step in announced:
            step.compile()

    if announced:  # no daemon: at the end of Python XLA would abort the process
        threading.Thread(target=run, name=_THREAD).start()


def quick_options(devices: Iterable[jax.Device]) -> dict[str, Any]:
    """The `compiler_options` of `jax.jit` for a function that is called once on some devices.

    On CPUs XLA then compiles in half the time, to slower code. A level of optimisation in XLA_FLAGS is left as it is.
    """
    is_set = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    is_cpu = all(device.platform == "cpu" for device in devices)
    return {"xla_backend_optimization_level": 1} if is_cpu and not is_set else {}


def use_cache(folder: str | None) -> None:
    """Keeps what XLA compiles on disk, so that the next launch need not compile it again.

    Args:
      folder: at most 10 GiB are kept there; "off" for no cache. None for JAX_COMPILATION_CACHE_DIR, with the limits
        that JAX's own settings give it, or, if that is not set, a default folder in XDG_CACHE_HOME or ~/.cache. It is
        separate for each kind of CPU, since compiled CPU code runs only there, and is not used unless it can be made
        and only the user can write in it.

    Raises `UserError` if a folder that was given cannot be made, or if others can write in it: what lies there is
    executed.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and jax.config.jax_compilation_cache_dir is not None:  # pyrefly: ignore[missing-attribute] - JAX adds it
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "belief-trainer"
    place = Path(folder) if folder is not None else cache / f"compiled-{_cpu()}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.lstat()
    except OSError as error:
        if folder is None:
            return  # no home to write in: nothing is kept
        raise UserError(f"--compilation-cache={folder} cannot be made a folder: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        if folder is None:
            return
        raise UserError(f"--compilation-cache={folder} is no folder that only you can write in: its code is executed")
    _remove_half_written(place)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small programs, too, add up to half a second


def _remove_half_written(place: Path) -> None:
    """Removes what a process wrote when it was killed: JAX would fail to read it in every launch, and write no more.

    JAX writes a program to KEY-cache, and then the time to KEY-atime, while it holds the lock.
    """
    # An OSError: the lock is held for longer, or the folder cannot be written. JAX will meet and report it.
    with suppress(OSError), filelock.FileLock(place / ".lockfile", timeout=1):
        for program in place.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()


@contextmanager
def no_cache() -> Iterator[None]:
    """While entered, nothing is read from the cache: JAX cannot read a program for devices that are not here."""
    was = jax.config.jax_enable_compilation_cache  # pyrefly: ignore[missing-attribute] - JAX adds it
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else JAX keeps to what it found at its first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()


def _cpu() -> str:
    """A name for the instructions that this CPU has."""
    text = platform.machine() + platform.processor()
    with suppress(OSError):  # no Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]
