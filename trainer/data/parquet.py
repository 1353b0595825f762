"""Rows of parquet files as a random-access source."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from trainer.data.arrow import ArrowSource, Transform, check_columns, pa, reading
from trainer.errors import UserError, did_you_mean


class ParquetSource(ArrowSource):
    """The rows of parquet files. A row is read with its whole row group; the last used row groups stay in memory."""

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str],
        transform: Transform | None = None,
        cache_bytes: int = 256 << 20,
    ) -> None:
        """Reads the index of each file, and no row yet.

        Args:
          path: a file, a pattern such as "data/train-*.parquet", or a folder, which stands for its "*.parquet"; several
            files follow each other in the order of their names.
          columns: those to read.
          transform: makes an example of a row; see `ArrowSource`.
          cache_bytes: the limit for all row groups in memory; the last used one stays whatever its size.

        Raises `UserError` if a file or a column is not there, or a column has a type that is not supported.
        """
        path, rows, kinds, self._groups = Path(path), [], None, []
        folder, pattern = (path, "*.parquet") if path.is_dir() else (path.parent, path.name)
        for file in [path] if path.is_file() else sorted(folder.glob(pattern)):
            with reading(file), pa.parquet.ParquetFile(file) as opened:
                kinds = check_columns(file, opened.schema_arrow, columns, kinds)
                self._groups += [(file, group) for group in range(opened.num_row_groups)]
                rows += [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        if kinds is None:
            raise UserError(f"no file {folder / pattern}{did_you_mean(pattern, (f.name for f in folder.glob('*')))}")
        super().__init__(rows, columns, transform)
        self._cache, self._cache_bytes, self._lock = dict[int, Any](), cache_bytes, Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": {}, "_lock": None}  # neither goes to a worker process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def _table(self, number: int) -> Any:
        # Threads that want the same row group read it once. Threads that want another one wait, too: a
        # second thread of `loading.threads` reads no faster.
        with self._lock:
            file, group = self._groups[number]
            if (table := self._cache.pop(number, None)) is None:
                with reading(file), pa.parquet.ParquetFile(file) as opened:
                    table = opened.read_row_group(group, list(self._columns), use_threads=False).combine_chunks()
            while self._cache and sum(one.nbytes for one in self._cache.values()) + table.nbytes > self._cache_bytes:
                del self._cache[next(iter(self._cache))]  # the one that was not used for longest
            self._cache[number] = table
            return table
