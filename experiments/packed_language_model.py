"""Language modelling on tokens of a trained vocabulary, with documents packed into rows."""

import dataclasses
import functools
import hashlib
from typing import Any

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from experiments.datasets.packed_text import TOKENIZER, PackedText, config_name
from experiments.language_model import LanguageModel
from experiments.packing import Layout, PackedSource
from experiments.tokenizer import BEGIN, Tokenizer
from trainer.config import setting
from trainer.data import tfds
from trainer.errors import UserError


@dataclasses.dataclass
class PackedLanguageModel(LanguageModel):
    """Cross-entropy of the next token of documents that are tokenized and packed by `prepare`.

    A run notices another tokenizer when it is resumed: its SHA-256 is part of the fingerprint of the examples.
    """

    dataset: str = setting("linux_source")
    """Name of a TFDS data set with a feature "text" and a split "train", on which the tokenizer is trained."""
    archive: str | None = setting(None, may_change=True)
    """For `linux_source`: the tar file with the kernel, read by `prepare`; None for that of Debian's package."""
    vocab: int = setting(8192, minimum=258)
    """Vocabulary size: 256 single bytes, 2 special tokens, and longer pieces."""
    length: int = setting(256, minimum=1)
    """Sequence length: the number of tokens to predict in a row."""

    @property
    def _name(self) -> str:
        return f"{PackedText.name}/{config_name(self.dataset, self.vocab, self.length)}"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the packed data, which must be prepared."""
        return _tokenizer(self._name, self.data_dir)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that begins a document."""
        return [BEGIN, *self.tokenizer().encode(text.encode()).tolist()]

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; what is not UTF-8 is shown as replacement characters."""
        return self.tokenizer().decode(tokens).decode(errors="replace")

    def source(self, split: str) -> Any:
        """The packed rows of a split, read from ArrayRecord."""
        records, metadata, _ = tfds.TfdsRecords.open(self._name, split, self.data_dir)
        if split not in metadata["rows"]:
            raise UserError(f"split {split!r} of packed texts cannot be a part or a sum of splits")
        layout = Layout.of(metadata["rows"][split], self.length, self.vocab)
        return PackedSource(records, layout, f"tokenizer {self.tokenizer().sha256}")

    def prepare(self) -> None:
        """Writes the texts, the tokenizer and the packed rows; each goes on where a killed `prepare` was."""
        tfds.prepare(self.dataset, self.data_dir, **({"archive": self.archive} if self.archive else {}))
        settings = {"dataset": self.dataset, "vocab": self.vocab, "length": self.length}
        builder = PackedText(**settings, data_dir=self.data_dir)
        builder.download_and_prepare(file_format="array_record")


@functools.lru_cache(maxsize=4)
def _tokenizer(name: str, data_dir: str | None) -> Tokenizer:
    """The tokenizer beside packed data; raises `UserError` if it is not the one that made them."""
    _, metadata, folder = tfds.TfdsRecords.open(name, "train", data_dir)
    model = (folder / TOKENIZER).read_bytes()
    if (found := hashlib.sha256(model).hexdigest()) != metadata["tokenizer"]:
        raise UserError(
            f"{folder / TOKENIZER} has SHA-256 {found}, but the rows beside it were made with "
            f"{metadata['tokenizer']}: move {folder} away and prepare it again"
        )
    return Tokenizer(model)
