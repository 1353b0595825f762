"""A profile of some steps, written by every process for itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class Profile:
    """A trace of the steps first … last, in a folder that TensorBoard and XProf read."""

    def __init__(self, folder: Path, steps: tuple[int, int]) -> None:
        """`folder` is this process's own; `steps` are the first and the last to trace, counted from 1."""
        self._folder, (self._first, self._last) = folder, steps
        self._tracing = False

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of a step; in the trace it is a step with that number."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
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
