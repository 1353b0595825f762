"""Documents packed into rows of a fixed length: how rows are made, how they are stored, and the source that reads them.

The documents of a part, each after the token `BEGIN`, form one stream of tokens. A split has one part or more. A row is
T + 1 tokens of the stream; the last token of a row is the first one of the next. So each token but the last of a stream
is an input once, and each token but the first is a target once. A document goes on in the next row, and only the last
row of a stream has padding.

A row has

- "tokens", uint16, or int32 if the vocabulary that is asked for has more than 65,536 tokens, [T + 1];
- "segments", uint8, or uint16 for long rows, [T + 1]: 1, 2, … for the documents in the row, 0 for padding;
- "bytes", int32: the bytes of text in the targets that count. A target counts if its segment is that of the token
  before it and not 0. So `BEGIN` never counts, and all bytes of all documents do.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.tokenizer import BEGIN
from trainer.data import ArraySource, BatchSource
from trainer.experiment import RandomAccessSource

_RECORD_BYTES = 1 << 17  # of tokens in a record: where reading costs least for each token
_LEAST_RECORDS = 256  # in a split, if it has so many rows: the order of an epoch is one of records

Rows = dict[str, np.ndarray]


def pack(documents: Iterable[np.ndarray], lengths: np.ndarray, length: int, vocab: int) -> Rows:
    """The rows of documents.

    Args:
      documents: the tokens of each, without `BEGIN`; empty ones are left out.
      lengths: bytes of each token that the tokenizer has, int32.
      length: T.
      vocab: the vocabulary size that is asked for, which decides the dtype of tokens. The tokenizer has fewer tokens if
        its texts were too short.
    """
    pieces = [np.zeros(0, np.int32)]
    for tokens in documents:
        if len(tokens):
            pieces += [np.array([BEGIN], np.int32), tokens]
    stream = np.concatenate(pieces)
    count = max(-(-(len(stream) - 1) // length), 0)
    padded = np.zeros(max(count, 1) * length + 1, np.int32)
    padded[: len(stream)] = stream
    tokens = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length][:count]
    begins = tokens == BEGIN
    segments = np.cumsum(begins, axis=1, dtype=segment_dtype(length))
    segments += ~begins[:, :1]  # a row that begins within a document has its first segment there
    if count:
        segments[-1, len(stream) - (count - 1) * length :] = 0
    return {
        "tokens": tokens.astype(token_dtype(vocab)),
        "segments": segments,
        "bytes": (lengths[tokens[:, 1:]] * segment_target_mask(segments)).sum(axis=1, dtype=np.int32),
    }


def segment_target_mask(segments: np.ndarray) -> np.ndarray:
    """Whether each target of rows counts: bool [rows, T]."""
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)


def token_dtype(vocab: int) -> np.dtype:
    """The dtype of tokens, for a vocabulary size that is asked for."""
    return np.dtype(np.uint16 if vocab <= 1 << 16 else np.int32)


def segment_dtype(length: int) -> np.dtype:
    """The dtype of segments: a document has two tokens or more, so a row of T + 1 has at most T / 2 + 2 documents."""
    return np.dtype(np.uint8 if length // 2 + 2 <= 255 else np.uint16)


class Layout(NamedTuple):
    """How the rows of a split are stored: `rows_per_record` rows in each record, fewer in the last."""

    rows: int
    rows_per_record: int
    length: int
    vocab: int

    @classmethod
    def of(cls, rows: int, length: int, vocab: int) -> "Layout":
        """The layout for a number of rows."""
        row_bytes = (length + 1) * token_dtype(vocab).itemsize
        return cls(rows, max(min(_RECORD_BYTES // row_bytes, rows // _LEAST_RECORDS), 1), length, vocab)

    @property
    def records(self) -> int:
        """The number of records."""
        return -(-self.rows // self.rows_per_record)

    def rows_of(self, record: int) -> int:
        """The number of rows in a record."""
        return min(self.rows_per_record, self.rows - record * self.rows_per_record)


def to_record(rows: Rows) -> np.ndarray:
    """The rows of a record as bytes, uint8, as machines with the low byte first have them in memory.

    In this order: for each place at which the segment changes, row, column and the segment from there on
    (int32 [changes, 3]); the number of changes (int32); "bytes"; "tokens". A row begins with segment 1.
    """
    segments = rows["segments"].astype(np.int32)
    row, column = np.nonzero(np.diff(segments, axis=1, prepend=1))
    changes = np.stack([row, column, segments[row, column]], axis=1).astype(np.int32)
    parts = (changes, np.array([len(changes)], np.int32), rows["bytes"].astype(np.int32), rows["tokens"])
    return np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)


class PackedSource(BatchSource):
    """The rows of a split, from records in which `to_record` is the end."""

    def __init__(self, records: Sequence[bytes], layout: Layout, identity: str) -> None:
        """Reads nothing yet; `records` are read by index, as often as rows of them are asked for."""
        self._records, self._layout = records, layout
        self.block, self.identity = layout.rows_per_record, identity
        self._newest = (-1, b"")  # the number of the record that was read last, and the record

    def __len__(self) -> int:
        return self._layout.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[0] for name, array in self.take(np.array([index])).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Many rows; a record that several need one after the other is read once."""
        rows = self.take(np.array(indices, np.int64))
        return [{name: array[i] for name, array in rows.items()} for i in range(len(indices))]

    def take(self, indices: np.ndarray) -> Rows:
        """The rows at `indices`, stacked.

        Rows of one record that follow each other here, or in the next call, cost one read.
        """
        length, vocab, count = self._layout.length, self._layout.vocab, len(indices)
        rows = {
            "tokens": np.empty((count, length + 1), token_dtype(vocab)),
            "segments": np.ones((count, length + 1), segment_dtype(length)),
            "bytes": np.empty(count, np.int32),
        }
        numbers = indices // self.block
        places, follows = indices - numbers * self.block, indices[1:] - indices[:-1] == 1
        cuts = ((numbers[1:] != numbers[:-1]).nonzero()[0] + 1).tolist()
        for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
            is_run = bool(follows[start : stop - 1].all())
            own = {name: array[start:stop] for name, array in rows.items()}
            self._read(int(numbers[start]), places[start:stop], own, is_run=is_run)
        return rows

    def _read(self, number: int, places: np.ndarray, rows: Rows, *, is_run: bool) -> None:
        """Fills `rows` with those at `places` of a record, which follow each other if it `is_run`."""
        newest = self._newest  # other threads may replace it
        record = newest[1] if newest[0] == number else self._records[number]
        self._newest, stored = (number, record), self._layout.rows_of(number)
        row_bytes = (self._layout.length + 1) * rows["tokens"].itemsize
        end = len(record) - stored * row_bytes
        # Bytes, because NumPy copies numbers at odd addresses slowly.
        kept = np.frombuffer(record, np.uint8, offset=end).reshape(stored, row_bytes)
        first, last = int(places[0]), int(places[-1])
        chosen = slice(first, last + 1) if is_run else places
        rows["tokens"].view(np.uint8)[:] = kept[chosen]
        end -= 4 * stored
        rows["bytes"][:] = np.frombuffer(record, np.int32, stored, offset=end)[chosen]
        changes = int.from_bytes(record[end - 4 : end], "little")
        if not changes:
            return
        segments, flat = rows["segments"], np.frombuffer(record, np.int32, 3 * changes, end - 4 - 12 * changes).tolist()
        here = None if is_run else {place: np.flatnonzero(places == place) for place in set(places.tolist())}
        for row, column, segment in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            if here is None:
                if first <= row <= last:
                    segments[row - first, column:] = segment
            elif row in here:
                segments[here[row], column:] = segment

    @property
    def is_in_memory(self) -> bool:
        """False."""
        return False

    def loaded(self, load: Callable[[RandomAccessSource], RandomAccessSource]) -> ArraySource:
        """All rows in memory, to be read in the same order."""
        del load  # it is made of no other source
        rows: Rows = {}
        for start in range(0, len(self), self.block):
            part = self.take(np.arange(start, min(start + self.block, len(self))))
            rows = rows or {name: np.empty((len(self), *x.shape[1:]), x.dtype) for name, x in part.items()}
            for name, array in part.items():
                rows[name][start : start + len(array)] = array
        source = ArraySource(rows)
        source.block, source.identity = self.block, self.identity
        return source
