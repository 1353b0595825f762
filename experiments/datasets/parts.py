"""Data sets that are written part by part, so that a killed `prepare` goes on where it was.

A builder writes its files into a folder beside its own, `VERSION.partial`, in tasks, each with a name. A task ends with
a small JSON file, its entry; a task that has an entry is not done again. When all are done, TFDS gets the files.
"""

import abc
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from trainer.errors import UserError

_ENTRY = ".entry.json"


class UnfinishedFolder:
    """The folder of a data set that is not finished."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Opens the folder; empties it if what is in it was made of something else, by its `identity` (JSON)."""
        self.folder = folder
        if self.entry("identity") not in (None, identity):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.commit("identity", identity)

    def entry(self, task: str) -> Any:
        """The entry that `commit` was given for a task; None if the task is not done."""
        try:
            return json.loads((self.folder / (task + _ENTRY)).read_text())
        except FileNotFoundError:
            return None

    def path(self, name: str) -> Path:
        """Where a task writes a file; what a killed task left there is written again."""
        return self.folder / name

    def commit(self, task: str, entry: Mapping[str, Any]) -> None:
        """Ends a task: its files are complete, and `entry` (JSON) is what later tasks need to know of it."""
        half_written = self.folder / f"{task}.unfinished"
        half_written.write_text(json.dumps(entry))
        half_written.replace(self.folder / (task + _ENTRY))


class Shard(NamedTuple):
    """A complete ArrayRecord file, with the number of its examples and their bytes."""

    file: Path
    examples: int
    num_bytes: int


class ShardWriter:
    """Writes examples into an ArrayRecord file as TFDS does, one after the other."""

    def __init__(self, file: Path, features: tfds.features.FeaturesDict, options: str = "") -> None:
        """Begins the file anew; `options` are further ones of ArrayRecord, such as "uncompressed"."""
        self._file, self._features, self._examples, self._bytes = file, features, 0, 0
        self._writer = ArrayRecordWriter(os.fspath(file), ",".join(filter(None, ("group_size:1", options))))

    def write(self, example: Mapping[str, Any]) -> None:
        """Adds an example."""
        record = self._features.serialize_example(example)
        self._writer.write(record)
        self._examples += 1
        self._bytes += len(record)

    def close(self) -> Shard:
        """Completes the file."""
        self._writer.close()
        return Shard(self._file, self._examples, self._bytes)


class PartwiseBuilder(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):
    """A builder that writes its shards in an `UnfinishedFolder`, and goes on there after a kill."""

    @abc.abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """JSON of all that the files are made of; with another one, `prepare` begins anew."""

    @abc.abstractmethod
    def write(self, unfinished: UnfinishedFolder) -> Mapping[str, Iterable[Shard]]:
        """Does the missing tasks, and returns the shards of each split in order. No shard may be empty."""

    def other_files(self, unfinished: UnfinishedFolder) -> Iterable[Path]:
        """Further files that belong beside the shards."""
        del unfinished
        return ()

    def download_and_prepare(self, **options: Any) -> None:
        """Writes the data set, if it is not there yet. Raises `UserError` if another process is writing it."""
        if self.data_path.exists():
            return
        folder = Path(f"{self.data_path}.partial")
        with _locked(folder):
            for left in self.data_path.parent.glob(f"incomplete.*_{self.data_path.name}"):
                shutil.rmtree(left)  # TFDS's, of a process that was killed
            super().download_and_prepare(**options)
            shutil.rmtree(folder, ignore_errors=True)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        del dl_manager, download_config  # nothing is downloaded
        unfinished = UnfinishedFolder(Path(f"{self._data_dir_root}/{self.info.full_name}.partial"), self.identity())
        splits = {name: list(shards) for name, shards in self.write(unfinished).items()}
        infos = []
        for name, shards in splits.items():
            template = self._get_filename_template(split_name=name)
            for index, shard in enumerate(shards):
                _place(shard.file, Path(template.sharded_filepath(shard_index=index, num_shards=len(shards))))
            lengths, size = [shard.examples for shard in shards], sum(shard.num_bytes for shard in shards)
            infos.append(tfds.core.SplitInfo(name, lengths, size, template))
        for file in self.other_files(unfinished):
            _place(file, Path(self.data_dir) / file.name)
        self.info.set_splits(tfds.core.splits.SplitDict(infos))


def _place(file: Path, there: Path) -> None:
    """Puts a file at another place of the file system, and leaves it where it is until the data set is complete."""
    try:
        os.link(file, there)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, there)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which the system releases when the process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {folder}: wait for it") from error
        yield
