"""Worker processes that read and decode, by Grain: those of a batch that threads of one process cannot keep up with."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import resource_tracker

import grain
import jax
from absl import flags

from trainer.experiment import Batch

_SECONDS = 300.0  # far more than a start, or a batch, ever takes
_CLOSING_SECONDS = 60.0  # Grain itself kills a worker that does not end in half of it


def read_in_workers(dataset: grain.IterDataset, workers: int, *, seconds: float = _SECONDS) -> Iterator[Batch]:
    """The batches of `dataset` in their order, made in `workers` processes that end with this one.

    The first comes after a few seconds. The program must be guarded by `if __name__ == "__main__":`, since the workers
    import it.

    Args:
      dataset: what to read; it must be picklable.
      workers: how many processes, 1 or more; each makes every `workers`-th batch, two ahead.
      seconds: how long to wait for a batch before giving up.

    Raises:
      RuntimeError: a worker was killed or did not start, or no batch came in time.
      Exception: what the source raises in a worker is raised here.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own, which nobody sets here
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    dataset = dataset.mp_prefetch(options, worker_init_fn=_begin)
    others = multiprocessing.active_children()
    resource_tracker.ensure_running()  # or it starts with the first worker, and lets signals through again
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
    closed = threading.Event()

    def read() -> None:
        # A signal to all processes is for the one that trains: it finishes its step, and needs batches for it. Workers
        # inherit this from their first moment.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with closing(iter(dataset)) as batches:
                while requests.get():
                    answers.put(next(batches))
        except BaseException as error:
            answers.put(error)
        closed.set()

    # Grain waits without end for a worker that hangs, or was killed half way through a batch: wait in a thread.
    threading.Thread(target=read, name="batches of the workers", daemon=True).start()
    try:
        while True:
            requests.put(True)
            try:
                answer = answers.get(timeout=seconds)
            except queue.Empty:
                for worker in multiprocessing.active_children():
                    if worker not in others:
                        worker.kill()  # or closing would wait for them
                raise RuntimeError(
                    f"no batch came from the {workers} worker processes in {seconds:g} s: the source hangs, or the "
                    "machine has no memory left; loading.workers=0 reads in threads"
                ) from None
            if isinstance(answer, StopIteration):
                return
            if isinstance(answer, RuntimeError) and "terminated unexpectedly" in str(answer):
                raise RuntimeError(
                    f"a worker process of the data died ({answer}): was it out of memory, or does the program lack "
                    '`if __name__ == "__main__":`?'
                ) from answer
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        requests.put(False)
        if not sys.is_finalizing():  # then the thread runs no more, and Grain has closed already
            closed.wait(_CLOSING_SECONDS)


def _begin(worker: int, workers: int) -> None:
    """Runs first in each worker."""
    del worker, workers
    jax.config.update("jax_platforms", "cpu")  # a source that computes must not ask for the accelerators

    def end_with_the_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
