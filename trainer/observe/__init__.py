"""Output of a run: metrics files, the progress line, profiles, and tables as plain text."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Columns two spaces apart, those named in `right` aligned on the right. No line ends in spaces."""
    columns = []
    for name, *cells in zip(header, *rows, strict=True):
        width = max(map(len, (name, *cells)))
        columns.append([cell.rjust(width) if name in right else cell.ljust(width) for cell in (name, *cells)])
    return "".join("  ".join(line).rstrip() + "\n" for line in zip(*columns, strict=True))
