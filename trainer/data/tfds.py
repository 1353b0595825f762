"""Data sets of TFDS, read as random-access sources without TensorFlow."""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from trainer.errors import HostError, NotPreparedError, UserError, did_you_mean


class TfdsSource:
    """A split of a data set that TFDS has prepared as ArrayRecord; its builder's code need not be imported."""

    def __init__(
        self, name: str, split: str, features: Sequence[str], data_dir: str | None = None, encoded: Sequence[str] = ()
    ) -> None:
        """Opens the split; no example is read yet.

        Args:
          name: the data set, such as "mnist" or "mnist:3.0.1".
          split: "train", "test", or a slice such as "train[:90%]".
          features: the entries to decode; the others are skipped.
          data_dir: the folder of data sets; None for TFDS's own default, TFDS_DATA_DIR or ~/tensorflow_datasets.
          encoded: those of `features` that are left as they are stored, such as the bytes of an image file.

        Raises `NotPreparedError` if the data set is not there, `UserError` if the split or a feature is unknown or the
        format has no random access.
        """
        builder = _open(name, split, data_dir)
        known = dict(builder.info.features or {})
        _check_known(name, "feature", features, known)
        _check_known(name, "feature", encoded, known)
        skipped = {f: tfds.decode.SkipDecoding() for f in known if f not in features or f in encoded}
        self._source = _data_source(builder, name, split, decoders=skipped or None)
        self._features = tuple(features)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._select(self._source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Many examples in one read of the file."""
        return [self._select(example) for example in self._source.__getitems__(indices)]

    def _select(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        return {feature: example[feature] for feature in self._features}


class TfdsRecords(NamedTuple):
    """The serialised examples of a split, read when they are indexed, and what TFDS keeps of the data set."""

    records: Sequence[bytes]
    metadata: Mapping[str, Any]
    folder: Path

    @classmethod
    def open(cls, name: str, split: str, data_dir: str | None = None) -> "TfdsRecords":
        """Opens the split; arguments and errors are those of `TfdsSource`."""
        builder = _open(name, split, data_dir)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = _data_source(builder, name, split, deserialize_method=raw)
        metadata = dict((builder.info.metadata or {}).items())  # `items` reads the file
        return cls(records, metadata, Path(builder.data_dir))


def prepare(name: str, data_dir: str | None = None, **options: Any) -> None:
    """Writes a data set as ArrayRecord, if it is not there yet. The builder must be TFDS's own, or imported.

    `options` are arguments of the builder. Raises `UserError` if the builder has no such argument, lacks files that the
    user has to fetch, or needs TensorFlow, which is not installed; `HostError` if files cannot be fetched.
    """
    if _prepared(name, data_dir) is not None:
        return
    from requests import RequestException  # TFDS fetches files with it; slow to import, and only needed here

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # hundreds of lines in a log
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", **options)
    except TypeError as error:
        raise UserError(f"data set {name!r}: {error}") from error
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(f"TFDS knows no data set {name!r}{did_you_mean(name, known)}") from error
    except (AssertionError, ValueError) as error:  # a config or a version that the builder does not have
        raise UserError(f"data set {name!r}: {str(error).splitlines()[0]}") from error
    try:
        builder.download_and_prepare()
    except ImportError as error:
        if "tensorflow" not in str(error).lower():
            raise
        elsewhere = f"or write it in another environment: tfds build {name} --file_format=array_record"
        raise UserError(
            f"data set {name!r}: TFDS's builder needs TensorFlow to write it: pip install tensorflow, {elsewhere}; "
            "reading it needs none"
        ) from error
    except RequestException as error:  # TFDS has tried several times
        address = error.request.url if error.request is not None else "its files"
        raise HostError(f"data set {name!r}: {address} cannot be fetched: is there a network?") from error
    except AssertionError as error:  # files that the user has to fetch
        raise UserError(f"data set {name!r}: {' '.join(str(error).split())}") from error


def _open(name: str, split: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The builder of the files on disk, which has the split."""
    if (builder := _prepared(name, data_dir)) is None:
        raise NotPreparedError(f"data set {name!r} is not prepared in {data_dir or tfds.core.constants.DATA_DIR}")
    _check_known(name, "split", split.split("[")[0].split("+"), builder.info.splits)
    return builder


def _data_source(builder: tfds.core.DatasetBuilder, name: str, split: str, **options: Any) -> Any:
    """The examples of a split, at least one."""
    try:
        source = builder.as_data_source(split=split, **options)
        if not len(source):
            raise UserError(f"data set {name!r}, split {split!r}, has no example")
    except NotImplementedError as error:
        raise UserError(
            f"data set {name!r} lies in {builder.data_dir} as {builder.info.file_format.name}, which has no random "
            "access: prepare it in another folder, with data_dir or TFDS_DATA_DIR"
        ) from error
    except ValueError as error:
        raise UserError(f"data set {name!r}, split {split!r}: {str(error).splitlines()[0]}") from error
    return source


def _prepared(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder | None:
    """The builder of the files on disk, or None."""
    try:
        builder = tfds.core.load.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        return None
    except ValueError as error:  # no name at all, or the data set lies in several places
        raise UserError(f"data set {name!r}: {str(error).splitlines()[0]}") from error
    return builder if builder.info.splits else None


def _check_known(name: str, kind: str, asked: Sequence[str], known: Collection[str]) -> None:
    for one in asked:
        if one not in known:
            raise UserError(f"data set {name!r} has no {kind} {one!r}{did_you_mean(one, known)}")
