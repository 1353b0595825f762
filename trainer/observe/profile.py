"""A profile of some steps, written by every process for itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from trainer.workdir import Folder, Mirror


class Profile:
    """A trace of the steps first … last, in a folder that TensorBoard and XProf read."""

    def __init__(self, folder: Folder, steps: tuple[int, int]) -> None:
        """`folder` is this process's own; `steps` are the first and the last to trace, counted from 1."""
        self._mirror, (self._first, self._last) = Mirror(folder), steps
        self._tracing = False

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of a step; in the trace it is a step with that number."""
        if step == self._first:
            jax.profiler.start_trace(self._mirror.folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def done(self, step: int, results: object) -> None:
        """After the dispatch of a step: at the last one, waits for its results and writes the trace."""
        if step == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if the last step was not reached."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
        self._mirror.close()
