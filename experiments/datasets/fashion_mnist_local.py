"""`fashion_mnist_local`: Fashion-MNIST from the files of the Debian package dataset-fashion-mnist (MIT licence)."""

import gzip
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.images import image_info
from trainer.errors import UserError

FOLDER_VARIABLE = "FASHION_MNIST_DIR"
DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"

_DESCRIPTION = """
Zalando's articles of clothing, 28×28 pixels in 256 levels of grey, ten classes (Xiao et al., 2017, arXiv:1708.07747):
60,000 to train on and 10,000 to test, read from local IDX files.
"""
_LABELS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
_PREFIXES = {"train": "train", "test": "t10k"}


class FashionMnistLocal(tfds.core.GeneratorBasedBuilder):
    """Image uint8 [28, 28, 1], label 0 … 9.

    The four gz files are read from the folder that the environment variable FASHION_MNIST_DIR names, by default
    /usr/share/datasets/fashion-mnist, where the Debian package puts them.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        homepage = "https://github.com/zalandoresearch/fashion-mnist"
        return image_info(self, _DESCRIPTION, (28, 28, 1), _LABELS, homepage)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        folder = Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER))
        if not folder.is_dir():
            raise UserError(
                f"no folder {folder}: install the Debian package dataset-fashion-mnist, or name a folder with the four "
                f"gz files in {FOLDER_VARIABLE}"
            )
        return {split: self._generate_examples(folder, prefix) for split, prefix in _PREFIXES.items()}

    def _generate_examples(self, folder: Path, prefix: str) -> Iterator[tuple[int, dict[str, Any]]]:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise UserError(f"{folder}: {prefix} images are {images.shape}, labels {labels.shape}")
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image[..., None], "label": int(label)}


def read_idx(path: Path) -> np.ndarray:
    """Reads a gz-compressed IDX file of unsigned bytes, the format of MNIST.

    The file holds two zero bytes, the type (8 for uint8), the number of dimensions, each dimension as a big-endian
    uint32, and the data.

    Raises:
      UserError: the file is missing or has another format.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gz file: {error}") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path} is not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape):
        raise UserError(f"{path} holds {values.size} bytes; its header says {shape}")
    return values.reshape(shape)
