"""What was planned, as text: one table for each topology, and what does not fit."""

import dataclasses
from collections.abc import Iterable, Sequence

from trainer.observe import table
from trainer.plan.collectives import KINDS, Collective
from trainer.plan.compiling import Figures, TooLarge
from trainer.plan.planning import UNSPLIT, Plan
from trainer.plan.search import Largest
from trainer.plan.topology import Topology

_GIB = 2**30

LEGEND = """\
GiB (M: MiB) on one device. moments: with the mean of the parameters, if one is kept. other: the batch, batch
statistics, counts and padding. gradients: all at once; the temporaries hold what is needed of them at a time. peak:
arguments, temporaries and results; what evaluation does not read, such as the moments, stays beside its own.
MB: 1e6 bytes of arrays exchanged in a step, as large as they are on one device. async: the share beside which other
work goes on. at least: what a device must send over the published bandwidth of its links, an estimate and not the
compiler's. GFLOP: 1e9 operations of matrix products and convolutions in a step on one device.
"""
SEARCH_LEGEND = """\
The largest batches that fit, in powers of two of rows on a device, by the compiler with little effort; peak: of the \
train step, in GiB on one device. Run `plan` with the flags to see all of it.
"""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind and dtype in a step.

    Attributes:
      kind: as of `Collective`.
      dtype: of the numbers.
      bytes: of all arrays.
      asynchronous: the share of the bytes, from 0 to 1.
      sent: bytes that every device sends at least.
      exact: whether it is known how often each happens; otherwise there are at least so many bytes.
    """

    kind: str
    dtype: str
    bytes: int
    asynchronous: float
    sent: float
    exact: bool


def exchanges(collectives: Iterable[Collective]) -> list[Exchange]:
    """Sums by kind and dtype."""
    groups: dict[tuple[str, str], list[Collective]] = {}
    for collective in collectives:
        groups.setdefault((collective.kind, collective.dtype), []).append(collective)
    found = []
    for kind, dtype in sorted(groups, key=lambda key: (KINDS.index(key[0]), key[1])):
        group = groups[kind, dtype]
        total = sum(c.bytes * c.times for c in group)
        hidden = sum(c.bytes * c.times for c in group if c.asynchronous)
        sent, exact = sum(c.sent for c in group), all(c.exact for c in group)
        found.append(Exchange(kind, dtype, total, hidden / total if total else 0.0, sent, exact))
    return found


def plans_text(topology: Topology, plans: Sequence[Plan], fast: bool) -> str:
    """The table of a topology, the layouts chosen, and the largest buffers of what does not fit."""
    title = _title(topology) + (", compiled with little effort: memory and bytes hold, async does not" if fast else "")
    rows = [row for plan in plans for row in _rows(topology, plan)]
    notes = [note for plan in plans for note in _notes(plan)]
    return "\n".join([title, _table(rows), *notes])


def machine_text(plan: Plan) -> str:
    """The same table of the devices that are there."""
    return "\n".join([_table(_rows(None, plan)) + LEGEND.rstrip(), *_notes(plan)])


def search_text(topology: Topology, found: Sequence[Largest]) -> str:
    """The largest batches of a topology, and the flags to use each."""
    cells = []
    for one in found:
        peak = [_gib(one.figures.peak), f"{one.figures.peak / topology.hbm_bytes:.0%}"] if one.figures else ["-", "-"]
        batch = [f"{one.batch_size / topology.chips:g}", f"{one.batch_size:,}"] if one.fits else ["-", "-"]
        way = (one.strategy, one.remat or "-", str(one.microbatches))
        cells.append((*way, *batch, *peak, one.flags() if one.fits else "not even one row on a device fits"))
    header = ("strategy", "remat", "microbatches", "on a chip", "batch", "peak", "of HBM", "flags to use")
    return "\n".join([_title(topology), table(header, cells, right=header[2:7])])


def _title(topology: Topology) -> str:
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    return f"{slices}{topology.name}: {len(topology.devices)} devices of {topology.hbm_bytes / _GIB:.2f} GiB"


_HEADER = (
    *("strategy", "step", "parameters", "moments", "gradients", "other", "temporaries", "peak", "of HBM"),
    *("collective", "dtype", "MB", "async", "at least", "GFLOP", "compiled in"),
)


def _table(rows: Sequence[Sequence[str]]) -> str:
    left = ("strategy", "step", "collective", "dtype")
    return table(_HEADER, rows, right=[name for name in _HEADER if name not in left])


def _rows(topology: Topology | None, plan: Plan) -> list[list[str]]:
    rows = []
    for step, found in (("train", plan.train), ("evaluate", plan.evaluation)):
        state = [
            _gib(plan.parameters),
            _gib(plan.moments + plan.mean),
            _gib(plan.gradients) if step == "train" else "-",
        ]
        first = [plan.run.parallel.strategy if step == "train" else "", step, *state]
        if isinstance(found, TooLarge):
            rows.append(
                [
                    *first,
                    "-",
                    "-",
                    _gib(found.needed),
                    _share(found.needed, plan.hbm),
                    *["-"] * 6,
                    f"{found.seconds:.1f} s",
                ]
            )
            continue
        held = plan.parameters + plan.moments + plan.mean if step == "train" else plan.mean or plan.parameters
        memory = [_gib(max(0, found.arguments - held)), _gib(found.temporaries), _gib(found.peak)]
        memory.append(_share(found.peak, plan.hbm))
        program = found.program
        flops = f"{'' if program.exact else '≥ '}{program.flops / 1e9:,.1f}"
        cells = [_exchange(topology, e) for e in exchanges(program.collectives)] or [["none", *["-"] * 4]]
        rows.append([*first, *memory, *cells[0], flops, f"{found.seconds:.1f} s"])
        rows += [[*[""] * 9, *more, "", ""] for more in cells[1:]]
    return rows


def _exchange(topology: Topology | None, exchange: Exchange) -> list[str]:
    seconds = topology.seconds(exchange.sent) if topology else None
    return [
        exchange.kind,
        exchange.dtype,
        _megabytes(exchange),
        f"{exchange.asynchronous:.0%}",
        "-" if seconds is None else f"{seconds * 1e3:.2f} ms",
    ]


def _megabytes(exchange: Exchange) -> str:
    return f"{'' if exchange.exact else '≥ '}{exchange.bytes / 1e6:,.2f}"


def _notes(plan: Plan) -> list[str]:
    strategy = plan.run.parallel.strategy
    notes = []
    if plan.tried > 1:
        notes.append(
            f"{strategy}: the best of {plan.tried} layouts has --config.parallel.torus={plan.layout.torus}".lower()
        )
        if plan.layout.unsplit:
            flags = " ".join(f"--{name}={value}" for name, value in UNSPLIT.items())
            notes[-1] += f" and LIBTPU_INIT_ARGS={flags}"
    for step, found in (("train", plan.train), ("evaluate", plan.evaluation)):
        if isinstance(found, TooLarge):
            sizes = f"{_gib(found.needed)}{f' of {_gib(plan.hbm)}' if plan.hbm else ''} GiB"
            notes.append(f"{strategy} {step} does not fit: {sizes}. Its largest buffers:")
            cells = [(str(b.count), _gib(b.bytes), _gib(b.count * b.bytes), b.shape, b.name) for b in found.buffers]
            header = ("buffers", "each", "together", "shape", "operation or argument")
            notes.append(table(header, cells, right=header[:3]))
    if isinstance(plan.train, Figures) and isinstance(plan.evaluation, Figures) and plan.hbm and not plan.fits:
        notes.append(
            f"{strategy} evaluate does not fit: its peak and the rest of the state are more than the device holds"
        )
    return notes


def _share(size: int, hbm: int) -> str:
    return f"{size / hbm:.0%}" if hbm else "-"


def _gib(size: int) -> str:
    """In GiB; in MiB where that would be all zeros."""
    return f"{size / _GIB:.3f}" if size >= _GIB / 100 else f"{size / 2**20:.2f}M"
