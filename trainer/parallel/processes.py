"""The processes that train one run together: how they find each other, agree, and end."""

import itertools
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
from jax._src.clusters import ClusterEnv  # what started these processes: public only as a side effect of `initialize`
from jax._src.distributed import global_state  # barriers with a time limit: JAX has no public ones

from trainer.errors import UserError
from trainer.parallel.rollcall import call_roll

_SECONDS = 600  # of patience at a barrier: far more than hosts differ by in loading their data
_calls: Counter[str] = Counter()


class ReportedError(UserError):
    """A mistake that another process reports; a command ends with exit code 2 and says nothing."""


def initialize(
    coordinator: str | None = None,
    process: int | None = None,
    processes: int | None = None,
    *,
    wait_seconds: int = 300,
    heartbeat_seconds: int = 100,
    preemptible: bool = False,
) -> None:
    """Joins the other processes of the run; on a machine that is alone it does nothing.

    What is not given comes from the environment on Cloud TPU, GKE, Slurm and Open MPI. Call it before JAX computes.

    Args:
      coordinator: HOST:PORT of process 0, where it will listen.
      process: which process this is, from 0.
      processes: how many there are.
      wait_seconds: how long to wait for the others, at least 1.
      heartbeat_seconds: how long after a process died the others end, at least 2.
      preemptible: whether SIGTERM is left to `checkpoint.preemption`; otherwise it kills, as usual.

    Raises:
      UserError: not all came in time, or it cannot be told where or how many they are.
    """
    found = _find(coordinator, process, processes, wait_seconds)
    if found is None:
        return
    address, count, place, local_devices = found
    hosts = next((os.environ[name] for name in _HOSTS if name in os.environ), "")
    call_roll(address, place, count, wait_seconds, hosts)
    jax.config.update("jax_enable_preemption_service", preemptible)
    jax.distributed.initialize(
        address,
        count,
        place,
        local_devices,
        cluster_detection_method="deactivate",  # it has told all it knows
        initialization_timeout=max(wait_seconds, 60),
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    jax.devices()  # all processes exchange theirs: a mistake that only one of them finds must come afterwards


_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "SLURM_STEP_NODELIST")


def _find(
    coordinator: str | None, process: int | None, processes: int | None, seconds: int
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """Address, number of processes, number of this one, and its devices where they are shared out; None if alone."""
    local_devices: Sequence[int] | None = None
    method = None
    if None in (coordinator, processes, process):
        platforms = jax.config.jax_platforms  # pyrefly: ignore[missing-attribute] - made at import
        method = _method(dict(os.environ), platforms or "")
    if method is not None:
        try:
            coordinator, processes, process, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, processes, process, None, method, seconds
            )
        except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot tell from the environment ({method}) where the processes of the run are "
                f"({type(error).__name__}: {error}); give --coordinator, --process and --processes"
            ) from error
    if coordinator is None and processes in (None, 1) and process in (None, 0):
        return None
    if coordinator is None or processes is None or process is None:
        raise UserError("give --coordinator=HOST:PORT, --process=I and --processes=N together")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}; it must be from 0 to {processes - 1}, below --processes")
    return (coordinator, processes, process, local_devices) if processes > 1 else None


def _method(environment: dict[str, str], platforms: str) -> str | None:
    """JAX's name for what started several processes like this one; None on a workstation, or where a single one runs.

    JAX itself is not asked, since it takes any pod of Kubernetes for one of a group.
    """
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if "tpu" not in platforms.split(","):  # JAX adds it where there are chips
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "gketpu" if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1 else None
    return None if "TPU_SKIP_MDS_QUERY" in environment else "gcetpu"


def count() -> int:
    """How many processes there are."""
    return global_state.num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which one this is, from 0."""
    return global_state.process_id if jax.distributed.is_initialized() else 0


def is_writer() -> bool:
    """Whether this is the process that writes and speaks: the first."""
    return index() == 0


def gather(name: str, value: str = "", *, seconds: float = _SECONDS) -> list[str]:
    """What every process gives under a name, in their order; returns when all have given it, for the nth time if it is.

    Raises:
      TimeoutError: not all came within `seconds`; it names those missing.
    """
    client = global_state.client
    if client is None:
        return [value]
    _calls[name] += 1
    key = f"trainer/{name}/{_calls[name]}"
    client.key_value_set(f"{key}/{index():06}", value)
    try:
        client.wait_at_barrier(key, round(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
        missing = ", ".join(str(i) for i in range(count()) if i not in came)
        if not missing:
            raise
        raise TimeoutError(f"waited {seconds:g} s at {name!r} for process {missing} of {count()}") from error
    return [value for _, value in sorted(client.key_value_dir_get(key))]


def barrier(name: str, seconds: float = _SECONDS) -> None:
    """Returns when all processes are here; raises `TimeoutError`, which names those missing, after `seconds`."""
    gather(name, seconds=seconds)


@contextmanager
def together(name: str) -> Iterator[None]:
    """Ends in all processes alike: a mistake that any of them finds inside is raised in all, and told by one.

    Raises:
      UserError: in the first process that found one.
      ReportedError: in all others.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as found:
        error = found
    failed = [i for i, text in enumerate(gather(name, type(error).__name__ if error else "")) if text]
    if not failed:
        return
    if error is None or failed[0] != index():
        error = ReportedError(f"see process {failed[0]}")
    vars(error)["agreed"] = True
    raise error


def check_same(what: str, text: str) -> None:
    """Raises `UserError` in one process, `ReportedError` in the others, unless the text is the same in all of them."""
    texts = gather(what, text)
    with together(what):
        mine, first = text.splitlines(), texts[0].splitlines()
        for here, there in itertools.zip_longest(mine, first, fillvalue="nothing"):
            if here != there:
                here, there = (line.strip(" ,") for line in (here, there))
                raise UserError(f"{what}: process {index()} has {here}, process 0 has {there}")


@contextmanager
def failing_at_once() -> Iterator[None]:
    """What one of several processes fails with alone inside ends it at once; the others miss its heartbeat.

    Anything orderly would hang: the others wait for this one in a collective, and it for them when JAX shuts down. An
    exception is everybody's, and passes, if it has a true attribute `agreed`.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1 or getattr(error, "agreed", False):
            raise
        sys.stdout.flush()
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, UserError | KeyboardInterrupt):
            print(f"error: {error}" if isinstance(error, UserError) else "\ninterrupted", file=sys.stderr)
            code = 2 if isinstance(error, UserError) else 130
        else:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
