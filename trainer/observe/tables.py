"""Tables as plain text, for terminals and golden files."""

from collections.abc import Sequence

from trainer.optim.labels import Row


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


def label_table_text(rows: Sequence[Row]) -> str:
    """The label table, with sums in its last line."""
    cells = [
        (
            row.path,
            "×".join(map(str, row.shape)) or "scalar",
            row.dtype,
            row.label,
            f"{row.weight_decay:g}",
            f"{row.parameters:,}",
            f"{row.bytes:,}",
        )
        for row in rows
    ]
    total = ("total", "", "", "", "", f"{sum(r.parameters for r in rows):,}", f"{sum(r.bytes for r in rows):,}")
    header = ("path", "shape", "dtype", "label", "weight decay", "parameters", "bytes")
    return table(header, [*cells, total], right=("weight decay", "parameters", "bytes"))
