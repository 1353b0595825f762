"""`digits`: scikit-learn's 1,797 scans of handwritten digits, 8×8 pixels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.images import image_info

_DESCRIPTION = """
Handwritten digits, 8×8 pixels with 17 levels of grey (0 … 16), as scikit-learn ships them: 1,797 scans from the test
set of UCI's Optical Recognition of Handwritten Digits. Every fifth one is for testing: 1,438 to train on, 359 to test.
"""


class Digits(tfds.core.GeneratorBasedBuilder):
    """Image uint8 [8, 8, 1] with values 0 … 16, label 0 … 9."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        labels = [str(digit) for digit in range(10)]
        return image_info(self, _DESCRIPTION, (8, 8, 1), labels, "https://archive.ics.uci.edu/dataset/80")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples(test=False), "test": self._generate_examples(test=True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        pixels, labels = load_digits(return_X_y=True)
        images = pixels.astype(np.uint8).reshape(-1, 8, 8, 1)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if (index % 5 == 4) == test:
                yield index, {"image": image, "label": int(label)}
