"""Search for the largest batch that fits, for each number of microbatches and remat policy."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trainer import config
from trainer.plan.compiling import CompiledStep
from trainer.plan.planning import compile_train_fast
from trainer.plan.topology import Topology
from trainer.plan.variants import batch_shards, with_batch

_LIMIT = 2**16  # examples of a microbatch on a device


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The largest batch, in powers of two on each device, that fits one combination of settings.

    Attributes:
      strategy: its name.
      changes: other settings of the mesh that this strategy needs changed in the config, such as "parallel.fsdp=None".
      remat: the remat policy; None if the experiment has no such setting.
      microbatches: the number of microbatches.
      batch_size: over all devices; 0 if not even one example on each device fits.
      step: the train step, compiled with little effort; None if nothing fits.
    """

    strategy: str
    changes: tuple[str, ...]
    remat: str | None
    microbatches: int
    batch_size: int
    step: CompiledStep | None

    @property
    def fits(self) -> bool:
        """Whether any batch fits."""
        return self.batch_size > 0

    def flags(self) -> str:
        """The flags that set this batch on a command line."""
        flags = [f"parallel.strategy={self.strategy}", *self.changes, f"batch_size={self.batch_size}"]
        flags += [f"microbatches={self.microbatches}"]
        # Evaluation has no microbatches; a batch as large as one microbatch takes less memory than training on it.
        flags += [f"evaluation.batch_size={self.batch_size // self.microbatches}"]
        flags += [f"experiment.remat={self.remat}"] if self.remat is not None else []
        return " ".join(f"--config.{flag}" for flag in flags)


def search(
    run: config.Run,
    topology: Topology,
    changes: tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda _: None,
    microbatches: Sequence[int] = (1, 2, 4),
) -> Iterator[LargestBatch]:
    """Yields the largest batch for each remat policy and number of microbatches, under the run's own strategy.

    Each search starts at the previous result, because memory grows with the examples of a microbatch. Most need two
    compilations: one that fits, and one of twice as many examples, which fails fast.

    Args:
      run: resolved.
      topology: the devices to compile for.
      changes: for `LargestBatch`.
      progress: receives a message after each compilation.
      microbatches: the numbers to try.

    Raises:
      UserError: the strategy does not fit the model or the topology.
    """
    for remat in remat_policies(run.experiment):
        variant, start = _with_remat(run, remat), 1
        policy = "" if remat is None else f"remat {remat}, "
        for count in microbatches:
            prefix = f"{policy}{count} microbatch{'es' if count > 1 else ''}, "
            examples, step = _largest(
                variant, topology, count, start, lambda text, prefix=prefix: progress(prefix + text)
            )
            start = max(1, examples)
            batch_size = examples * count * batch_shards(variant, topology)
            yield LargestBatch(run.parallel.strategy, changes, remat, count, batch_size, step)


def remat_policies(experiment: Any) -> tuple[str | None, ...]:
    """The remat policies to try.

    If the experiment has a setting `remat` with `choices` in its metadata, these are tried. Without `choices`, only the
    value in the config is tried. Without such a setting, the result is (None,).
    """
    fields = {field.name: field for field in dataclasses.fields(experiment)}
    return fields["remat"].metadata.get("choices") or (experiment.remat,) if "remat" in fields else (None,)


def _with_remat(run: config.Run, remat: str | None) -> config.Run:
    if remat is None:
        return run
    experiment = copy.copy(run.experiment)
    experiment.remat = remat  # pyrefly: ignore[missing-attribute] - it has this setting
    return dataclasses.replace(run, experiment=experiment)


def _largest(
    run: config.Run, topology: Topology, microbatches: int, start: int, progress: Callable[[str], None]
) -> tuple[int, CompiledStep | None]:
    """The most examples of a microbatch on a device that fit, and the step; (0, None) if not even one fits."""
    shards = batch_shards(run, topology)
    fits, too_many, largest = 0, 2 * _LIMIT, None
    examples = start
    while fits < examples < too_many:
        variant = with_batch(run, examples * microbatches * shards, microbatches, examples * shards)
        step = compile_train_fast(variant, topology)
        room = topology.hbm_bytes / (step.peak_bytes if isinstance(step, CompiledStep) else step.needed_bytes)
        outcome = "fit" if room >= 1 else "do not fit"
        progress(f"{examples} examples on a device {outcome} ({step.seconds:.0f} s)")
        if isinstance(step, CompiledStep):
            fits, largest = examples, step
        else:
            too_many = examples
        # Memory grows by at most the factor by which the examples grow, so a batch `room` times as large still fits.
        jump = examples * 2.0 ** math.floor(math.log2(room))
        examples = int(max(2 * fits, min(jump, too_many / 2)))
    return fits, largest
