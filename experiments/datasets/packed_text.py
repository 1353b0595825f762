"""`packed_text`: the texts of another TFDS data set as rows of tokens, with the tokenizer that made them.

See `experiments.packing` for the rows. The tokenizer is trained on the training split, and lies beside the shards.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.parts import PartwiseBuilder, Shard, ShardWriter, UnfinishedFolder
from trainer.data.tfds import TfdsSource
from trainer.errors import NotPreparedError, UserError

TOKENIZER = "tokenizer.model"
SAMPLE_BYTES = 32 << 20  # of text that the tokenizer is trained on
SAMPLE_OF_ONE = 1 << 18  # bytes of one text that may be in the sample
PART_BYTES = 32 << 20  # of text, after which a part is complete
SHARD_BYTES = 64 << 20  # of tokens in a shard
_CALL_BYTES = 4 << 20  # of text that are encoded by one call
_DESCRIPTION = """
Documents packed into rows of tokens of a fixed length, several rows in each record, in random order.
"""


def config_name(dataset: str, vocab: int, length: int) -> str:
    """The name of a TFDS config, such as "linux_source-8192-256"."""
    return f"{''.join(c if c.isalnum() else '_' for c in dataset)}-{vocab}-{length}"


class PackedText(PartwiseBuilder):
    """Feature "rows": the bytes of several rows.

    The metadata have "rows", the number of rows of each split, and "fill", the number of padding tokens in them.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, dataset: str, vocab: int, length: int, data_dir: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        """Reads nothing yet.

        Args:
          dataset: name of a prepared TFDS data set with a feature "text" and a split "train".
          vocab: tokens of the vocabulary, at least 258.
          length: targets in a row.
          data_dir: the folder of both data sets; None for TFDS's default.
          options: those of every TFDS builder.
        """
        self._dataset, self._vocab, self._length = dataset, vocab, length
        self._folder = None if data_dir is None else os.fspath(data_dir)
        config = tfds.core.BuilderConfig(name=config_name(dataset, vocab, length))
        super().__init__(config=config, data_dir=data_dir, **options)

    def _create_builder_config(self, builder_config: Any, version: Any) -> Any:
        del version
        return builder_config  # TFDS would warn that it is not one of a list

    def _info(self) -> tfds.core.DatasetInfo:
        rows = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"rows": rows}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def identity(self) -> Mapping[str, Any]:
        """The settings, and the data set with the bytes of its splits."""
        try:
            there = tfds.core.load.read_only_builder.builder_from_files(self._dataset, data_dir=self._folder)
        except tfds.core.registered.DatasetNotFoundError as error:
            raise NotPreparedError(f"data set {self._dataset!r}, which is to be packed, is not prepared") from error
        splits = {name: split.num_bytes for name, split in there.info.splits.items()}
        if "train" not in splits:
            raise UserError(f"data set {self._dataset!r} has no split 'train', on which the tokenizer is trained")
        return {
            "dataset": there.info.full_name,
            "source": dict((there.info.metadata or {}).items()),
            "splits": splits,
            "vocab": self._vocab,
            "length": self._length,
            "parts": [SAMPLE_BYTES, SAMPLE_OF_ONE, PART_BYTES, SHARD_BYTES],
        }

    def write(self, unfinished: UnfinishedFolder) -> Mapping[str, list[Shard]]:
        """The tokenizer, the packed rows of each part of a split, and the shards, in which all rows are mixed."""
        from experiments.packing import Layout
        from experiments.tokenizer import Tokenizer

        identity = unfinished.entry("identity")
        self._train_tokenizer(unfinished)
        tokenizer = Tokenizer(unfinished.path(TOKENIZER).read_bytes())
        shards, rows, fill, sizes = {}, {}, {}, {}
        for split in identity["splits"]:
            parts = list(self._packed(unfinished, split, tokenizer))
            rows[split], fill[split], sizes[split] = (
                sum(part[key] for part in parts) for key in ("rows", "fill", "bytes")
            )
            if not rows[split]:
                raise UserError(f"split {split!r} of data set {self._dataset!r} has no text")
            layout = Layout.of(rows[split], self._length, self._vocab)
            shards[split] = list(self._mixed(unfinished, split, [part["rows"] for part in parts], layout))
            tokens = rows[split] * self._length
            print(
                f"packed_text: {split}: {tokens:,} tokens in {rows[split]:,} rows, {fill[split]:,} of them are padding "
                f"({fill[split] / tokens:.3%}); {sizes[split]:,} bytes of text, "
                f"{sizes[split] / (tokens - fill[split]):.2f} a token",
                flush=True,
            )
        assert self.info.metadata is not None
        self.info.metadata.update(identity, tokenizer=tokenizer.sha256, rows=rows, fill=fill, bytes=sizes)
        return shards

    def other_files(self, unfinished: UnfinishedFolder) -> Iterable[Path]:
        """The tokenizer and its checksum, in the format of `sha256sum`."""
        checksum = unfinished.path(f"{TOKENIZER}.sha256")
        checksum.write_text(f"{unfinished.entry('tokenizer')['sha256']}  {TOKENIZER}\n")
        return unfinished.path(TOKENIZER), checksum

    def _train_tokenizer(self, unfinished: UnfinishedFolder) -> None:
        from experiments.tokenizer import Tokenizer, train

        if unfinished.entry("tokenizer"):
            return
        sample, size = [], 0
        for _, text in self._texts("train", 0):
            sample.append(text[:SAMPLE_OF_ONE])
            size += len(sample[-1])
            if size >= SAMPLE_BYTES:
                break
        model = train(sample, self._vocab)
        tokenizer = Tokenizer(model)
        unfinished.path(TOKENIZER).write_bytes(model)
        few = "" if len(tokenizer.pieces) == self._vocab else f" ({self._vocab:,} were asked for: the texts are short)"
        print(f"packed_text: {len(tokenizer.pieces):,} tokens learnt from {size:,} bytes{few}", flush=True)
        unfinished.commit("tokenizer", {"sha256": tokenizer.sha256})

    def _texts(self, split: str, start: int) -> Iterator[tuple[int, bytes]]:
        """The texts of a split in a fixed random order from place `start` on, each with the number of texts so far."""
        texts = TfdsSource(self._dataset, split, ("text",), self._folder)
        order = np.random.default_rng(0).permutation(len(texts))
        for place in range(start, len(order)):
            yield place + 1, bytes(texts[int(order[place])]["text"])

    def _packed(self, unfinished: UnfinishedFolder, split: str, tokenizer: Any) -> Iterator[Mapping[str, Any]]:
        """The entries of a split's parts; their rows lie in a .npy file for each array."""
        number, start, total = 0, 0, len(TfdsSource(self._dataset, split, ("text",), self._folder))
        while start < total:
            task = f"{split}-{number:05}"
            if (entry := unfinished.entry(task)) is None:
                entry = self._pack(unfinished, task, split, start, tokenizer)
                print(f"packed_text: {split}: {entry['stop']:,} of {total:,} texts are packed", flush=True)
            yield entry
            number, start = number + 1, entry["stop"]

    def _pack(
        self, unfinished: UnfinishedFolder, task: str, split: str, start: int, tokenizer: Any
    ) -> Mapping[str, Any]:
        from experiments.packing import pack

        texts: list[bytes] = []
        documents: list[np.ndarray] = []
        stop, size, waiting, threads = start, 0, 0, os.cpu_count() or 1
        for stop, text in self._texts(split, start):  # noqa: B007 - where the next part begins
            texts.append(text)
            size, waiting = size + len(text), waiting + len(text)
            if waiting >= _CALL_BYTES or size >= PART_BYTES:
                documents += tokenizer.encode_all(texts, threads)
                texts, waiting = [], 0
            if size >= PART_BYTES:
                break
        documents += tokenizer.encode_all(texts, threads)
        rows = pack(documents, tokenizer.lengths, self._length, self._vocab)
        for name, array in rows.items():
            np.save(unfinished.path(f"{task}.{name}.npy"), array)
        fill = int((rows["segments"][:, 1:] == 0).sum())
        if int(rows["bytes"].sum()) != size:
            raise AssertionError(f"{size} bytes of text were packed, {rows['bytes'].sum()} are counted")
        entry = {"stop": stop, "rows": len(rows["bytes"]), "fill": fill, "bytes": size}
        unfinished.commit(task, entry)
        return entry

    def _mixed(self, unfinished: UnfinishedFolder, split: str, counts: list[int], layout: Any) -> Iterator[Shard]:
        """The shards of a split: its rows in a fixed random order."""
        from experiments.packing import to_record, token_dtype

        row_bytes, many = (self._length + 1) * token_dtype(self._vocab).itemsize, layout.rows_per_record
        records = max(SHARD_BYTES // (row_bytes * many), 1)  # in a shard
        order = np.random.default_rng(1).permutation(layout.rows)
        for number, first in enumerate(range(0, layout.records, records)):
            task = f"shard-{split}-{number:05}"
            if (entry := unfinished.entry(task)) is None:
                rows = _gathered(unfinished, split, counts, order[first * many :][: records * many])
                writer = ShardWriter(unfinished.path(f"{task}.array_record"), self.info.features, "uncompressed")
                for start in range(0, len(rows["bytes"]), many):
                    record = {name: array[start : start + many] for name, array in rows.items()}
                    writer.write({"rows": to_record(record)})
                shard = writer.close()
                entry = {"examples": shard.examples, "num_bytes": shard.num_bytes}
                unfinished.commit(task, entry)
            yield Shard(unfinished.path(f"{task}.array_record"), **entry)


def _gathered(
    unfinished: UnfinishedFolder, split: str, counts: list[int], indices: np.ndarray
) -> dict[str, np.ndarray]:
    """The rows at `indices` of all parts, from which one part after the other is mapped into memory."""
    rows: dict[str, np.ndarray] = {}
    begins = np.cumsum([0, *counts])
    parts = np.searchsorted(begins, indices, side="right") - 1
    for part in np.unique(parts).tolist():
        chosen = parts == part
        for name in ("tokens", "segments", "bytes"):
            array = np.load(unfinished.path(f"{split}-{part:05}.{name}.npy"), mmap_mode="r")
            if name not in rows:
                rows[name] = np.empty((len(indices), *array.shape[1:]), array.dtype)
            rows[name][chosen] = array[indices[chosen] - begins[part]]
    return rows
