"""What all data sets of small labelled images say of themselves."""

import numpy as np
import tensorflow_datasets as tfds


def image_info(
    builder: tfds.core.GeneratorBasedBuilder,
    description: str,
    shape: tuple[int, int, int],
    labels: list[str],
    homepage: str,
) -> tfds.core.DatasetInfo:
    """The info of images, uint8 of `shape`, with one of `labels` each."""
    # Tensor and not Image: encoding PNG would need TensorFlow.
    image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=labels)}),
        supervised_keys=("image", "label"),
        homepage=homepage,
    )
