"""Finds the largest batch that fits, for each count of microbatches and remat policy."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trainer import config
from trainer.plan.compiling import Figures
from trainer.plan.planning import batch_shards, train_only, with_batch
from trainer.plan.topology import Topology

_MOST = 2**16  # rows of a microbatch on a device: as good as no limit


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch, in powers of two, that fits one way to run.

    Attributes:
      strategy: its name.
      changes: settings of the mesh that this strategy needs other than the config has them, such as "parallel.fsdp=0".
      remat: the policy, or None where the experiment has none.
      microbatches: how many there are.
      batch_size: over all devices; 0 if not even one row a device fits.
      figures: of the train step, by the fast compiler; None if nothing fits.
    """

    strategy: str
    changes: tuple[str, ...]
    remat: str | None
    microbatches: int
    batch_size: int
    figures: Figures | None

    @property
    def fits(self) -> bool:
        """Whether there is such a batch."""
        return self.batch_size > 0

    def flags(self) -> str:
        """What to add to a command line."""
        flags = [f"parallel.strategy={self.strategy}", *self.changes, f"batch_size={self.batch_size}"]
        flags += [f"microbatches={self.microbatches}"]
        # It takes less than training on the same rows, and knows no microbatches.
        flags += [f"evaluation.batch_size={self.batch_size // self.microbatches}"]
        flags += [f"experiment.remat={self.remat}"] if self.remat is not None else []
        return " ".join(f"--config.{flag}" for flag in flags)


def search(
    run: config.Run,
    topology: Topology,
    microbatches: Sequence[int] = (1, 2, 4),
    changes: Sequence[str] = (),
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[Largest]:
    """Yields what it finds, one way to run after the other, under the run's own strategy.

    The memory of a step grows with the rows of a microbatch, of which a device gets a power of two. Each search starts
    where the one before ended, so that most take two compilations: one that fits, and a quick one that does not.

    Args:
      run: resolved.
      topology: what to compile for.
      microbatches: the counts to try.
      changes: for `Largest`.
      note: is told what goes on.

    Raises:
      UserError: the strategy does not fit the model or the topology.
    """
    for remat in remat_policies(run.experiment):
        chosen, start = _with_remat(run, remat), 1
        policy = "" if remat is None else f"remat {remat}, "
        for count in microbatches:
            prefix = f"{policy}{count} microbatch{'es' if count > 1 else ''}, "
            rows, figures = _largest(chosen, topology, count, start, lambda text, prefix=prefix: note(prefix + text))
            start = max(1, rows)
            batch_size = rows * count * batch_shards(chosen, topology)
            yield Largest(run.parallel.strategy, tuple(changes), remat, count, batch_size, figures)


def remat_policies(experiment: Any) -> tuple[str | None, ...]:
    """The values of the experiment's setting `remat`; only None without such a setting."""
    fields = {field.name: field for field in dataclasses.fields(experiment)}
    return fields["remat"].metadata.get("choices") or (experiment.remat,) if "remat" in fields else (None,)


def _with_remat(run: config.Run, remat: str | None) -> config.Run:
    if remat is None:
        return run
    experiment = copy.copy(run.experiment)
    experiment.remat = remat  # pyrefly: ignore[missing-attribute] - it has this setting
    return dataclasses.replace(run, experiment=experiment)


def _largest(
    run: config.Run, topology: Topology, microbatches: int, start: int, note: Callable[[str], None]
) -> tuple[int, Figures | None]:
    """The most rows of a microbatch on a device that fit, and their figures; (0, None) if none do."""
    shards = batch_shards(run, topology)
    fits, too_many, best = 0, 2 * _MOST, None
    rows = start
    while rows > fits and rows < too_many:
        found = train_only(with_batch(run, rows * microbatches * shards, microbatches, rows * shards), topology)
        room = topology.hbm_bytes / (found.peak if isinstance(found, Figures) else found.needed)
        note(f"{rows} rows on a device {'fit' if room >= 1 else 'do not fit'} ({found.seconds:.0f} s)")
        if isinstance(found, Figures):
            fits, best = rows, found
        else:
            too_many = rows
        # Memory grows at most in proportion to the rows, and by no more than them: as far as that says, at once.
        jump = rows * 2.0 ** math.floor(math.log2(room))
        rows = int(max(2 * fits, min(jump, too_many / 2)))
    return fits, best
