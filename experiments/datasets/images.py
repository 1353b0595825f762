"""The TFDS info of data sets of small labelled images."""

import numpy as np
import tensorflow_datasets as tfds


def image_info(
    builder: tfds.core.GeneratorBasedBuilder,
    description: str,
    shape: tuple[int, int, int],
    labels: list[str],
    homepage: str,
) -> tfds.core.DatasetInfo:
    """The info of a data set of images, uint8 of `shape`, each with one of `labels`."""
    # Tensor instead of Image, which would need TensorFlow to encode PNG.
    image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=labels)}),
        supervised_keys=("image", "label"),
        homepage=homepage,
    )
