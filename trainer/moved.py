"""A workdir that is moved, removed or replaced while a run trains in it."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from trainer import distributed
from trainer.checkpoint import Metadata, Store
from trainer.errors import HostError
from trainer.program import Program
from trainer.state import TrainState
from trainer.workdir import Workdir


def save_beside_if_moved(
    workdir: Workdir, program: Program, state: TrainState, metadata: Metadata, accepted: Sequence[dict[str, Any]]
) -> None:
    """Raises `HostError` if the workdir is not where it was. A state that is finite is saved beside it first.

    All processes call it.

    Args:
      workdir: as it was locked.
      program: of the run.
      state: after the newest step.
      metadata: of that state.
      accepted: changes of the trajectory, for the new workdir.
    """
    if "yes" not in distributed.gather("the workdir", "yes" if workdir.is_replaced() else "no"):
        return
    beside = Workdir(distributed.gather("a workdir beside", str(workdir.beside().path))[0])
    cause = f"workdir {workdir.path} was moved, removed or replaced while the run trained in it"
    with closing(Store(beside.checkpoints, program.run.checkpoint)) as store:
        is_finite = store.save(state, metadata)
    if not is_finite:  # no `DivergedError`: its folder would be made where the workdir is no more
        raise HostError(f"{cause}; the state of step {metadata.step} holds NaN or Inf and is not saved")
    if distributed.is_primary():
        beside.write(program.run, str(program.param_table), accepted)
    raise HostError(f"{cause}; the state of step {metadata.step} is saved in {beside.path}: go on there with --workdir")
