"""Data sets that Hugging Face's `datasets` saved to disk, as random-access sources; `datasets` is not needed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.data.arrow import ArrowSource, Transform, check_columns, pa, reading
from trainer.errors import UserError


class HuggingFaceSource(ArrowSource):
    """The rows of a folder that `Dataset.save_to_disk` wrote. Its Arrow files are mapped into memory and not loaded."""

    def __init__(self, folder: str | Path, columns: Sequence[str], transform: Transform | None = None) -> None:
        """Maps each file, and reads no row yet.

        Args:
          folder: that of a `Dataset`. A `DatasetDict` has such a folder for each split, as "data/train".
          columns: those to read.
          transform: makes an example of a row; see `ArrowSource`.

        Raises `UserError` if the folder, a file or a column is not there, or a column has a type that is not supported.
        """
        self._folder, self._tables, kinds = Path(folder), [], None
        for file in _files(self._folder):
            with reading(file), pa.ipc.open_stream(pa.memory_map(str(file))) as opened:
                kinds = check_columns(file, opened.schema, columns, kinds)
                self._tables += [pa.Table.from_batches([batch]).select(list(columns)) for batch in opened]
        super().__init__([table.num_rows for table in self._tables], columns, transform)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._folder, self._columns, self._transform)  # each worker process maps the files itself

    def _table(self, number: int) -> Any:
        return self._tables[number]


def _files(folder: Path) -> list[Path]:
    """The Arrow files of a folder, in the order of their rows."""
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.is_file():
            known = " or ".join(str(folder / split) for split in json.loads(splits.read_text())["splits"])
            raise UserError(f"{folder} holds the splits of a DatasetDict: name one, {known}")
        if not state.is_file():
            raise UserError(f"no data set of Dataset.save_to_disk in {folder}: there is no {state}")
        content = json.loads(state.read_text())
        if content.get("_indices_data_files"):
            raise UserError(
                f"{folder} was saved by datasets 1.x with an index of its rows, which is not supported: load it with "
                "datasets and call save_to_disk again"
            )
        return [folder / one["filename"] for one in content["_data_files"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} does not describe a data set: {type(error).__name__}: {error}") from error
