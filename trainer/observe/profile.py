"""A profile of some steps, written by every process for itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from trainer.workdir import Folder, Mirror


class Profile:
    """A trace of the steps first … last, in a folder that TensorBoard and XProf read."""

    def __init__(self, folder: Folder, steps: tuple[int, int] | None) -> None:
        """`folder` is this process's own; `steps` are the first and the last to trace, counted from 1, None for none."""
        self._folder, (self._first, self._last) = folder, steps or (0, 0)
        self._mirror: Mirror | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of a step, which the trace shows with its number."""
        if step == self._first:
            self._mirror = Mirror(self._folder)
            jax.profiler.start_trace(self._mirror.folder)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def dispatched(self, step: int, results: object) -> None:
        """After the dispatch of the last step to trace: waits for its results and writes the trace."""
        if step == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if the last step was not reached."""
        if self._mirror is not None:
            jax.profiler.stop_trace()
            self._mirror.close()
            self._mirror = None
