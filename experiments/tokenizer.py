"""A byte-level vocabulary of pieces of text, trained and applied by SentencePiece (byte-pair encoding).

SentencePiece reads text, and treats spaces, tabs and unknown characters in ways of its own. So each byte goes there as
one character: printable ASCII as itself, any other byte b as the character of number 256 + b. All 256 are in every
vocabulary, and each file comes back byte for byte.
"""

import collections
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from trainer.errors import UserError

try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
except ImportError as error:
    raise UserError(f"{error}; it is part of: pip install 'belief-trainer[examples]'") from error

BEGIN = 1  # the token before each document; 0 is SentencePiece's for what it does not know, which never comes
SPECIAL = 2  # tokens that stand for no bytes
_CHARACTERS = np.array([b if 33 <= b < 127 else 256 + b for b in range(256)], np.uint16)
_BYTES = {chr(character): byte for byte, character in enumerate(_CHARACTERS.tolist())}
# Merges stay within these words: a name with one sign and one space before it; signs up to the end of a line, with the
# line feeds and the indentation that follow; spaces.
_WORD = re.compile(rb"[^\sA-Za-z_0-9]? ?[A-Za-z_0-9]+| ?[^\sA-Za-z_0-9]*\n[\n\t ]*| ?[^\sA-Za-z_0-9]+|[ \t]+|\s")
_LONGEST_PIECE = 32  # bytes
_LONGEST_WORD = 200  # bytes; longer ones, such as rows of dashes, are not learnt from
_PIECE_OF_TEXT = 1 << 16  # bytes that are encoded at once: SentencePiece needs 100 times as much memory


class Tokenizer:
    """A trained vocabulary: 2 special tokens and pieces of 1 … 32 bytes."""

    def __init__(self, model: bytes) -> None:
        """`model` is what `train` returns."""
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        names = [self._processor.id_to_piece(i) for i in range(self._processor.vocab_size())]
        self.pieces = [b""] * SPECIAL + [bytes(_BYTES[character] for character in name) for name in names[SPECIAL:]]
        self.lengths = np.array([len(piece) for piece in self.pieces], np.int32)  # bytes of each token

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of a text, int32, without `BEGIN`."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes], threads: int = 1) -> list[np.ndarray]:
        """The tokens of each text. Texts of more than 64 KiB are cut, after a line feed where there is one."""
        pieces = [list(_cut(text)) for text in texts]
        flat = [_as_characters(piece) for own in pieces for piece in own]
        found = iter(self._processor.encode(flat, num_threads=threads))
        return [
            np.concatenate([np.zeros(0, np.int32), *(np.array(next(found), np.int32) for _ in own)]) for own in pieces
        ]

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens; special tokens, and those that the vocabulary does not have, stand for none."""
        return b"".join(self.pieces[token] for token in tokens if token < len(self.pieces))


def train(texts: Iterable[bytes], vocab: int) -> bytes:
    """A model with `vocab` tokens, at least 258, learnt from texts; equal texts give equal bytes.

    It has fewer tokens if the texts are too short for so many pieces.
    """
    words: collections.Counter[bytes] = collections.Counter()
    for text in texts:
        words.update(_WORD.findall(text))
    often = sorted((-count, word) for word, count in words.items() if count > 1 and len(word) <= _LONGEST_WORD)
    with tempfile.TemporaryDirectory() as folder:
        file, model = Path(folder) / "words.tsv", io.BytesIO()
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{_as_characters(word)}\t{-count}\n" for count, word in often)
            lines.writelines(f"{chr(character)}\t1\n" for character in _CHARACTERS.tolist())
        sentencepiece.SentencePieceTrainer.train(
            input=os.fspath(file),
            input_format="tsv",
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,
            split_by_number=False,
            split_by_unicode_script=False,
            max_sentencepiece_length=_LONGEST_PIECE,
            bos_id=BEGIN,
            eos_id=-1,
            minloglevel=2,
        )
    proto = vars(sentencepiece_model_pb2)["ModelProto"].FromString(model.getvalue())
    proto.trainer_spec.ClearField("input")  # the name of a temporary file
    return proto.SerializeToString(deterministic=True)


def _as_characters(text: bytes) -> str:
    return _CHARACTERS.take(np.frombuffer(text, np.uint8)).astype("<u2").tobytes().decode("utf-16-le")


def _cut(text: bytes) -> Iterable[bytes]:
    start = 0
    while start < len(text):
        stop = min(start + _PIECE_OF_TEXT, len(text))
        if stop < len(text):
            stop = text.rfind(b"\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
