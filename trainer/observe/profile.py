"""A profile of some steps; every process writes its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from trainer.files import AnyPath
from trainer.workdir import Mirror


class Profile:
    """A trace of some steps, in a folder that TensorBoard and XProf read."""

    def __init__(self, folder: AnyPath, steps: tuple[int, int] | None = None) -> None:
        """Traces the first to the last of `steps`, counted from 1, into `folder`; None traces nothing."""
        self._folder, (self._first, self._last) = folder, steps or (0, 0)
        self._mirror: Mirror | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Encloses the work of a step; the trace shows the step's number."""
        if step == self._first:
            self._mirror = Mirror(self._folder)
            jax.profiler.start_trace(self._mirror.folder)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def dispatched(self, step: int, results: object) -> None:
        """Waits for the `results` of the last step to trace, and writes the trace."""
        if step == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace if it is not written yet, as the run ended before the last step to trace."""
        if self._mirror is not None:
            jax.profiler.stop_trace()
            self._mirror.close()
            self._mirror = None
