"""Words as tokens, for text files of one sentence a line, such as the Penn Treebank's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.errors import UserError

END = "<eos>"  # the word at the end of each line
UNKNOWN = "<unk>"


class Vocabulary:
    """The words of a text by number, in the order in which they first appear."""

    def __init__(self, text: str) -> None:
        """Words are what white space separates; the end of a line is the word <eos>."""
        self.words = list(dict.fromkeys(_split(text)))
        self._numbers = {word: number for number, word in enumerate(self.words)}
        # In bytes of UTF-8, with the space or the end of the line after a word, so that <eos> has none left.
        self.byte_counts = np.array([0 if word == END else len(word.encode()) + 1 for word in self.words], np.int32)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> np.ndarray:
        """The numbers of the words of a text, int32. An unknown word becomes <unk>.

        Raises `UserError` for an unknown word if the vocabulary has no <unk>.
        """
        words, unknown = _split(text), self._numbers.get(UNKNOWN)
        found = [self._numbers.get(word, unknown) for word in words]
        if None in found:
            raise UserError(f"the word {words[found.index(None)]!r} is not in the training text, nor is {UNKNOWN}")
        return np.array(found, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """The words as a text: spaces between the words of a line, and a line feed for each <eos>."""
        words = (self.words[token] if token < len(self.words) else UNKNOWN for token in tokens)
        lines: list[list[str]] = [[]]
        for word in words:
            if word == END:
                lines.append([])
            else:
                lines[-1].append(word)
        return "\n".join(map(" ".join, lines))


def _split(text: str) -> list[str]:
    return text.replace("\n", f" {END} ").split()


def read_text(files: str, split: str) -> str:
    """The text of a split, from the file whose path is `files` with the split's name in place of "{split}".

    Raises `UserError` if there is no such file or it is not UTF-8.
    """
    if "{split}" not in files:
        raise UserError(f"files is {files!r}; a path with {{split}} in it is expected, such as data/ptb.{{split}}.txt")
    path = Path(files.replace("{split}", split))
    if not path.is_file():
        raise UserError(f"no file {path}, the text of the split {split!r} (experiment.files is {files!r})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: {error}") from error
