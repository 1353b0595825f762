"""Text of plans: a table for each topology, and the largest buffers of a step that does not fit."""

import dataclasses
from collections.abc import Iterable, Sequence

from trainer.observe import table
from trainer.plan.analysis import KINDS, Collective
from trainer.plan.compiling import CompiledStep, OutOfMemory
from trainer.plan.planning import NO_WINDOWED_EINSUM, Plan
from trainer.plan.search import LargestBatch
from trainer.plan.topology import Topology

_GIB = 2**30

LEGEND = """\
GiB (M: MiB) on one device. moments: with the EMA params, if there are any. gradients: all together; XLA may hold fewer
at a time, among the temporaries. other: the batch, batch statistics, counters and padding. peak: arguments, results and
temporaries; state that evaluation does not read, such as the moments, stays in memory beside its peak. MB: size on
one device of the arrays in collectives, in 1e6 bytes. async: the share of it in collectives that overlap with
other work. at least: the bytes that a device must send, divided by the published bandwidth of its links; an estimate
that is not XLA's. GFLOP: 1e9 operations of matrix products and convolutions in a step on one device.
"""
SEARCH_LEGEND = """\
The largest batches that fit, in powers of two of examples on a device, compiled with little effort. peak: of the train
step, in GiB on one device. `plan` with the flags shows the rest.
"""
_HEADER = (
    *("strategy", "step", "parameters", "moments", "gradients", "other", "temporaries", "peak", "of HBM"),
    *("collective", "dtype", "MB", "async", "at least", "GFLOP", "compiled in"),
)
_LEFT = ("strategy", "step", "collective", "dtype")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind and dtype in a step.

    Attributes:
      kind: as of `Collective`.
      dtype: as of `Collective`.
      bytes: of all arrays.
      asynchronous_share: the share of the bytes in asynchronous collectives, from 0 to 1.
      sent_bytes: the least number of bytes that each device sends.
      exact: whether all counts are exact; otherwise the bytes are a lower bound.
    """

    kind: str
    dtype: str
    bytes: int
    asynchronous_share: float
    sent_bytes: float
    exact: bool


def traffic(collectives: Iterable[Collective]) -> list[Traffic]:
    """The sums of collectives by kind and dtype."""
    groups: dict[tuple[str, str], list[Collective]] = {}
    for collective in collectives:
        groups.setdefault((collective.kind, collective.dtype), []).append(collective)
    sums = []
    for kind, dtype in sorted(groups, key=lambda key: (KINDS.index(key[0]), key[1])):
        group = groups[kind, dtype]
        total = sum(c.bytes * c.times for c in group)
        hidden = sum(c.bytes * c.times for c in group if c.asynchronous)
        sent_bytes, exact = sum(c.sent_bytes for c in group), all(c.exact for c in group)
        sums.append(Traffic(kind, dtype, total, hidden / total if total else 0.0, sent_bytes, exact))
    return sums


def plans_text(topology: Topology, plans: Sequence[Plan]) -> str:
    """The table of a topology, the compile choices made, and the largest buffers of a step that does not fit."""
    little = ", compiled with little effort: memory and MB are nearly right, the async column is not"
    effort = little if plans[0].fast else ""
    rows = [row for plan in plans for row in _rows(topology, plan)]
    notes = [note for plan in plans for note in _notes(plan)]
    return "\n".join([_title(topology) + effort, _table(rows), *notes])


def here_text(plan: Plan) -> str:
    """The same table for the devices of this process."""
    return "\n".join([_table(_rows(None, plan)) + LEGEND.rstrip(), *_notes(plan)])


def search_text(topology: Topology, batches: Sequence[LargestBatch]) -> str:
    """The largest batches on a topology, with the flags that set each."""
    cells = []
    for batch in batches:
        size = batch.step.peak_bytes if batch.step else 0
        peak = [_gib(size), _share(size, topology.hbm_bytes)] if batch.step else ["-", "-"]
        sizes = [f"{batch.batch_size / topology.chips:g}", f"{batch.batch_size:,}"] if batch.fits else ["-", "-"]
        settings = (batch.strategy, batch.remat or "-", str(batch.microbatches))
        flags = batch.flags() if batch.fits else "not even one example on a device fits"
        cells.append((*settings, *sizes, *peak, flags))
    header = ("strategy", "remat", "microbatches", "on a chip", "batch", "peak", "of HBM", "flags to use")
    return "\n".join([_title(topology), table(header, cells, right=header[2:7])])


def _title(topology: Topology) -> str:
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    return f"{slices}{topology.name}: {len(topology.devices)} devices of {topology.hbm_bytes / _GIB:.2f} GiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return table(_HEADER, rows, right=[name for name in _HEADER if name not in _LEFT])


def _rows(topology: Topology | None, plan: Plan) -> list[list[str]]:
    rows = []
    for name, step in (("train", plan.train), ("evaluate", plan.evaluation)):
        is_train = name == "train"
        first = [plan.run.parallel.strategy if is_train else "", name]
        first += [_gib(plan.param_bytes), _gib(plan.moment_bytes + plan.ema_bytes)]
        first.append(_gib(plan.gradient_bytes) if is_train else "-")
        seconds = f"{step.seconds:.1f} s"
        if isinstance(step, OutOfMemory):
            peak = [_gib(step.needed_bytes), _share(step.needed_bytes, plan.hbm_bytes)]
            rows.append([*first, "-", "-", *peak, *["-"] * 6, seconds])
            continue
        all_bytes = plan.param_bytes + plan.moment_bytes + plan.ema_bytes
        read_bytes = all_bytes if is_train else plan.ema_bytes or plan.param_bytes
        memory = [_gib(max(0, step.argument_bytes - read_bytes)), _gib(step.temporary_bytes)]
        memory += [_gib(step.peak_bytes), _share(step.peak_bytes, plan.hbm_bytes)]
        flops = f"{_bound(step.hlo.exact)}{step.hlo.flops / 1e9:,.1f}"
        cells = [_traffic_cells(topology, t) for t in traffic(step.hlo.collectives)] or [["none", *["-"] * 4]]
        rows.append([*first, *memory, *cells[0], flops, seconds])
        rows += [[*[""] * 9, *more, "", ""] for more in cells[1:]]
    return rows


def _traffic_cells(topology: Topology | None, t: Traffic) -> list[str]:
    seconds = topology.seconds(t.sent_bytes) if topology else None
    least = "-" if seconds is None else f"{seconds * 1e3:.2f} ms"
    return [t.kind, t.dtype, f"{_bound(t.exact)}{t.bytes / 1e6:,.2f}", f"{t.asynchronous_share:.0%}", least]


def _notes(plan: Plan) -> list[str]:
    strategy, hbm_bytes = plan.run.parallel.strategy, plan.hbm_bytes
    notes = []
    if plan.choices_compared > 1:
        torus = str(plan.choice.torus).lower()
        note = f"{strategy}: the best of {plan.choices_compared} compile choices has --config.parallel.torus={torus}"
        if not plan.choice.windowed:
            flags = " ".join(f"--{name}={value}" for name, value in NO_WINDOWED_EINSUM.items())
            note += f" and LIBTPU_INIT_ARGS={flags}"
        notes.append(note)
    for name, step in (("train", plan.train), ("evaluate", plan.evaluation)):
        if isinstance(step, OutOfMemory):
            sizes = f"{_gib(step.needed_bytes)}{f' of {_gib(hbm_bytes)}' if hbm_bytes else ''} GiB"
            notes.append(f"{strategy} {name} does not fit: {sizes}. Its largest buffers:")
            cells = [(str(b.count), _gib(b.bytes), _gib(b.count * b.bytes), b.shape, b.name) for b in step.buffers]
            header = ("buffers", "each", "together", "shape", "operation or argument")
            notes.append(table(header, cells, right=header[:3]))
    compiled = isinstance(plan.train, CompiledStep) and isinstance(plan.evaluation, CompiledStep)
    if compiled and hbm_bytes and not plan.fits:
        notes.append(f"{strategy} evaluate does not fit: its peak and the rest of the state exceed the device's memory")
    return notes


def _bound(exact: bool) -> str:
    return "" if exact else "≥ "


def _share(size: int, hbm_bytes: int) -> str:
    return f"{size / hbm_bytes:.0%}" if hbm_bytes else "-"


def _gib(size: int) -> str:
    """In GiB; in MiB where that would be all zeros."""
    return f"{size / _GIB:.3f}" if size >= _GIB / 100 else f"{size / 2**20:.2f}M"
