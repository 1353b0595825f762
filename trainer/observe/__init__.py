"""Output of a run: metrics files, the progress line, profiles, and tables as plain text."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Columns two spaces apart, those named in `right` aligned on the right. No line ends in spaces."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(line(row) for row in [header, *rows]) + "\n"
