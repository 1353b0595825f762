"""Grain's worker processes, for sources that the threads of one process cannot decode fast enough."""

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

_CLOSING_SECONDS = 60.0  # Grain kills a worker that does not end in half of this time


def read_in_workers(dataset: grain.IterDataset, workers: int, *, seconds: float = 300.0) -> Iterator[Batch]:
    """The batches of `dataset`, in order, made in worker processes that end with this one.

    The first batch comes after a few seconds. The workers import the main script, so `if __name__ == "__main__":`
    must guard its code. `dataset` must be picklable. The number of `workers` is at least 1. Each makes every
    `workers`-th batch, and makes two before they are asked for.

    Raises `RuntimeError` if a worker was killed, if a worker did not start, or if no batch came in `seconds`, which is
    far more than a batch takes. Raises any error that the source raises in a worker.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags of its own, which nobody sets here
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    dataset = dataset.mp_prefetch(options, worker_init_fn=_begin)
    others = set(multiprocessing.active_children())
    resource_tracker.ensure_running()  # else the first worker starts it, and its start unblocks signals
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()

    def read() -> None:
        # Only the training process answers a signal to the process group: it needs batches to finish its step. Workers
        # inherit the blocked signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with closing(iter(dataset)) as batches:
                while requests.get():
                    answers.put(next(batches))
        except BaseException as error:
            answers.put(error)

    # Grain waits for ever for a worker that hangs or was killed in the middle of a batch, so a thread waits for Grain.
    thread = threading.Thread(target=read, name="batches of the workers", daemon=True)
    thread.start()
    try:
        while True:
            requests.put(True)
            try:
                answer = answers.get(timeout=seconds)
            except queue.Empty:
                for worker in set(multiprocessing.active_children()) - others:
                    worker.kill()  # or closing would wait for it
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
        if not sys.is_finalizing():  # at finalization no thread runs, and Grain has closed already
            thread.join(_CLOSING_SECONDS)


def _begin(*_: int) -> None:
    """Runs first in each worker."""
    jax.config.update("jax_platforms", "cpu")  # a source that uses JAX must not take the accelerators

    def end_with_the_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
