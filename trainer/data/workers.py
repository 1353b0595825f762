"""Grain's worker processes, for sources that the threads of one process cannot decode fast enough."""

import itertools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import grain
import jax
from absl import flags

from trainer.distributed import Break
from trainer.errors import HostError
from trainer.experiment import Batch

_CLOSING_SECONDS = 60.0  # Grain kills a worker that does not end in half of this time
_POLL_SECONDS = 0.5  # between two checks that the workers live


def read_in_workers(
    dataset: grain.IterDataset, workers: int, *, timeout_seconds: float = 300.0, first: int = 0
) -> Iterator[Batch]:
    """The batches of `dataset`, in order, made in worker processes that end with this one.

    The first batch comes after a few seconds. The workers import the main script, so `if __name__ == "__main__":`
    must guard its code. `dataset` must be picklable. The number of `workers` is at least 1. Each makes every
    `workers`-th batch, and makes two before they are asked for.

    Raises `HostError` if a worker was killed, if a worker did not start, or if no batch came in `timeout_seconds`,
    which is far more than a batch takes. The error names the batch's index; the first batch has index `first`. Raises
    any error that the source raises in a worker.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags of its own, which nobody sets here
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
    earlier_children = set(multiprocessing.active_children())
    _start_tracker()
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()

    def read() -> None:
        # A signal to the process group must not end a worker: the training process still needs batches to finish its
        # step. So the signals are blocked here, and the workers inherit that.
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
    started: list[BaseProcess] = []  # the workers
    reaper: subprocess.Popen[bytes] | None = None
    try:
        for index in itertools.count(first):
            requests.put(True)
            answer = _wait(answers, started, earlier_children, timeout_seconds, index)
            if isinstance(answer, StopIteration):
                return
            if isinstance(answer, BaseException):
                raise answer
            reaper = reaper or _start_reaper(_add_new_workers(started, earlier_children))
            yield answer
    except Break:
        for worker in _add_new_workers(started, earlier_children):
            worker.kill()  # or closing would wait for the batch
        raise
    finally:
        requests.put(False)
        if reaper is not None:
            reaper.communicate(b"\n")
        if not sys.is_finalizing():  # at finalization no thread runs, and Grain has closed already
            thread.join(_CLOSING_SECONDS)


def _wait(
    answers: "queue.SimpleQueue[Batch | BaseException]",
    workers: list[BaseProcess],
    earlier_children: set[BaseProcess],
    timeout_seconds: float,
    index: int,
) -> Batch | BaseException:
    """The next answer. If a worker has died or none answers in time, kills all workers and raises `HostError`."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            answer = answers.get(timeout=min(_POLL_SECONDS, timeout_seconds))
            if not isinstance(answer, RuntimeError) or "terminated unexpectedly" not in str(answer):
                return answer
        except queue.Empty:
            answer = None
        dead = [worker for worker in _add_new_workers(workers, earlier_children) if worker.exitcode]
        if answer is None and not dead and time.monotonic() < deadline:
            continue
        stopped = [worker.pid for worker in workers if _is_stopped(worker)]
        for worker in workers:
            worker.kill()  # or closing would wait for it
        if dead or answer is not None:
            end = f"exit code {dead[0].exitcode}" if dead else str(answer)
            raise HostError(
                f"a worker process of the data died ({end}) while batch {index} was awaited: was it out of memory, or "
                'does the program lack `if __name__ == "__main__":`?'
            )
        cause = f"process {stopped[0]} is stopped" if stopped else "the source hangs, or the machine has no memory left"
        raise HostError(
            f"batch {index} did not come from the {len(workers)} worker processes in {timeout_seconds:g} s: {cause}; "
            "loading.workers=0 reads in threads"
        )


def _add_new_workers(workers: list[BaseProcess], earlier_children: set[BaseProcess]) -> list[BaseProcess]:
    """Adds to `workers` every child process that is in neither collection; returns `workers`."""
    workers += set(multiprocessing.active_children()) - earlier_children - set(workers)
    return workers


def _is_stopped(worker: BaseProcess) -> bool:
    """Whether a process is stopped by a signal such as SIGSTOP. False on systems other than Linux: it is not known."""
    try:
        with open(f"/proc/{worker.pid}/stat") as file:  # noqa: PTH123 - one short read
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _start_tracker() -> None:
    """Starts Python's tracker of shared memory, without its warning; it removes the memory of a killed worker.

    If the first worker started it, Python would warn, and would unblock SIGINT and SIGTERM in this thread.
    """
    before = list(sys.warnoptions)
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # the tracker inherits them
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions[:] = before


def _start_reaper(workers: Sequence[BaseProcess]) -> subprocess.Popen[bytes]:
    """A shell that kills the workers when this process has died: a stopped worker cannot notice it and end by itself.

    A line on its standard input ends it.
    """
    command = ["sh", "-c", 'read _ || kill -9 "$@"', "sh", *(str(worker.pid) for worker in workers)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)


def _init_worker(*_: int) -> None:
    """Runs first in each worker."""
    jax.config.update("jax_platforms", "cpu")  # a source that uses JAX must not take the accelerators

    def end_with_the_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
