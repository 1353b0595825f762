"""Tables as plain text, for terminals and golden files."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from trainer import config
from trainer.optim.labels import Row, number_text
from trainer.optim.rounding import storage_dtype
from trainer.parallel.placement import Placement


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Columns two spaces apart; those named in `right` are aligned there. No line ends in spaces."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(line(row) for row in [header, *rows]) + "\n"


def label_table_text(rows: Sequence[Row], optimizer: config.Optimizer) -> str:
    """The label table: every parameter with its label, the sums, and then every label with all that it means."""
    cells = [
        (
            row.path,
            "×".join(map(str, row.shape)) or "scalar",
            row.dtype,
            row.label,
            row.weight_decay,
            f"{row.parameters:,}",
            f"{row.bytes:,}",
        )
        for row in rows
    ]
    total = ("total", "", "", "", "", f"{sum(r.parameters for r in rows):,}", f"{sum(r.bytes for r in rows):,}")
    header = ("path", "shape", "dtype", "label", "weight decay", "parameters", "bytes")
    parameters = table(header, [*cells, total], right=("weight decay", "parameters", "bytes"))
    return f"{parameters}\n{_groups_text(rows, optimizer)}"


def placement_table_text(placements: Iterable[Placement], sizes: Mapping[str, int]) -> str:
    """How each parameter is split, for example 768×3072 as fsdp × tensor, and who decided so; "" if nothing can be.

    Args:
      placements: one for each parameter.
      sizes: how many devices lie along each axis of the mesh.
    """
    if sizes["fsdp"] == sizes["tensor"] == 1:
        return ""
    cells = []
    for placement in placements:
        axes = [axis if axis and sizes[axis] > 1 else None for axis in placement.axes]
        axes += [None] * (len(placement.shape) - len(axes))
        parts = [size // (sizes[axis] if axis else 1) for size, axis in zip(placement.shape, axes, strict=True)]
        cells.append(
            (
                placement.path,
                "×".join(map(str, placement.shape)) or "scalar",
                " × ".join(axis or "-" for axis in axes) if any(axes) else "whole",
                "×".join(map(str, parts)) or "scalar",
                placement.why,
            )
        )
    return table(("path", "shape", "split over", "on a device", "by"), cells)


def _groups_text(rows: Sequence[Row], optimizer: config.Optimizer) -> str:
    header = ("label", "parameters", "optimizer", "learning rate", "weight decay", "clip norm", "updated", "moments")
    cells = []
    for label, group in optimizer.groups.items():
        members = [row for row in rows if row.label == label]
        size = f"{sum(row.parameters for row in members):,}"
        if group.frozen:
            cells.append((label, size, "frozen", *["-"] * 5))
            continue
        rate = number_text(group.schedule or optimizer.schedule)
        decay = number_text(group.decay_schedule or group.weight_decay)
        clips = [f"{group.clip_norm:g}"] if group.clip_norm else []
        clips += [f"{optimizer.clip_norm:g} of all"] if optimizer.clip_norm else []
        name = group.optimizer or optimizer.name
        asked = [group.mu_dtype or optimizer.mu_dtype, group.nu_dtype or optimizer.nu_dtype][
            : 1 if name == "sgd" else 2
        ]
        stored = {np.dtype(storage_dtype(row.dtype, dtype or None)).name: None for dtype in asked for row in members}
        cells.append(
            (
                label,
                size,
                name,
                rate if group.lr_multiplier == 1 else f"{rate} × {group.lr_multiplier:g}",
                decay if optimizer.decay == "decoupled" or decay == "0" else f"{decay} {optimizer.decay}",
                ", ".join(clips) or "-",
                "every step" if group.every_steps == 1 else f"every {group.every_steps} steps",
                ", ".join(stored),
            )
        )
    return table(header, cells, right=("parameters",))
