"""Image classification: convolutional networks and transformers, on any TFDS data set with "image" and "label"."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, UInt8

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from experiments.augmentation import Augmentation, smooth
from experiments.models import MODELS, UNSET, make_model
from trainer.config import setting
from trainer.data import tfds
from trainer.data.images import EncodedImages
from trainer.experiment import Batch, Collections, RandomAccessSource, Variables
from trainer.metrics import Mean, Metrics


@dataclasses.dataclass
class ImageClassification:
    """Cross-entropy on images, scaled, normalised and, while training, augmented."""

    dataset: str = setting("digits")
    """Name of a TFDS data set, such as "digits", "fashion_mnist_local" or "cifar10"."""
    data_dir: str | None = setting(None, may_change=True)
    """The folder of TFDS data sets; None for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    classes: int = setting(10, minimum=2)
    """Number of classes; labels are 0 … classes − 1."""
    max_value: float = setting(255.0, minimum=1)
    """The largest pixel value, which is scaled to 1."""
    mean: tuple[float, ...] = setting((0.0,))
    """Mean of the scaled pixels, of all channels or one for each, which is subtracted."""
    std: tuple[float, ...] = setting((1.0,))
    """Standard deviation of the scaled pixels, likewise, by which they are divided."""
    model: str = setting("cnn", choices=MODELS)
    """`cnn` is a small strided CNN; the others are those of `experiments.models`. Each uses some of the settings from
    here to `stem`; another that is given is an error. `vgg11` needs images of 32 pixels or more a side, and a ViT needs
    sides that are multiples of 16."""
    widths: tuple[int, ...] | None = setting(None)
    """Channels of the convolutions of `cnn`, units of the layers of `mlp`, channels of each stage of VGG and ResNets,
    growth of DenseNet; None for those of the named model, (32, 64) for `cnn` and `mlp`."""
    blocks: tuple[int, ...] | None = setting(None)
    """Convolutions of each stage of VGG, blocks of each stage of ResNets, layers of each block of DenseNet, blocks of a
    ViT; None for those of the named model."""
    hidden: int | None = setting(None, minimum=1)
    """Units of a hidden layer of `cnn` or VGG; None for 128 in `cnn`, and for VGG see `stem`."""
    dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate while training, the share of units that are set to 0."""
    batch_norm: bool = setting(False)
    """Whether `cnn` has BatchNorm after each convolution."""
    stem: str = setting("cifar", choices=("cifar", "imagenet"))
    """For ResNets and DenseNet, the first layers: `cifar` is one 3×3 convolution; `imagenet` is a convolution and a
    max-pooling, which divide height and width by 4. For VGG, the default of `hidden`: 512 for `cifar`, 4,096 for
    `imagenet`."""
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)  # of training images, on the device
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Dtype of the activations. Parameters, batch statistics and loss are always float32."""

    def _model(self) -> nn.Module:
        given = {name: getattr(self, name) for name in UNSET}
        return make_model(self.model, classes=self.classes, dtype=self.dtype, **given)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh variables of the model, each kernel in a box with its logical axes."""
        return self._model().init(key, self._normalised(self._scaled(batch["image"])), train=False)

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss", the cross-entropy in nats, and "accuracy".

        In training the loss is that of mixed and smoothed targets. With mixup, a prediction scores the weight of the
        predicted class in the mixed target.
        """
        images, labels, augmentation = self._scaled(batch["image"]), batch["label"], self.augmentation
        if train and augmentation != Augmentation():
            keys = batch["example_key"]
            images = augmentation.images(images, keys, jnp.asarray(self.mean))
            if augmentation.softens:
                images, labels = augmentation.mixed(images, jax.nn.one_hot(labels, self.classes), keys)
        logits, collections = self._model().apply(
            variables,
            self._normalised(images),
            train=train,
            rngs={"dropout": key},
            mutable=[name for name in variables if name != "params"] if train else [],
        )
        logits, likeliest = logits.astype(jnp.float32), jnp.argmax(logits, axis=-1)
        if labels.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            hits = likeliest == labels
        else:
            losses = optax.softmax_cross_entropy(logits, smooth(labels, augmentation.label_smoothing))
            hits = jnp.take_along_axis(labels, likeliest[:, None], axis=-1)[:, 0]
        return {"loss": Mean.of(losses, batch["mask"]), "accuracy": Mean.of(hits, batch["mask"])}, collections

    def predict(self, variables: Variables, batch: Batch) -> dict[str, Array]:
        """ "label", the class with the largest logit, and "probabilities" [B, classes]."""
        images = self._normalised(self._scaled(batch["image"]))
        logits = jnp.asarray(self._model().apply(variables, images, train=False), jnp.float32)
        return {"label": jnp.argmax(logits, axis=-1), "probabilities": jax.nn.softmax(logits)}

    def source(self, split: str) -> RandomAccessSource:
        """The images and labels of a split."""
        return tfds.TfdsSource(self.dataset, split, ("image", "label"), self.data_dir)

    def prepare(self) -> None:
        """Writes the data set as ArrayRecord."""
        tfds.prepare(self.dataset, self.data_dir)

    def _scaled(
        self, images: UInt8[Array, "examples height width channels"]
    ) -> Float[Array, "examples height width channels"]:
        return images.astype(jnp.float32) / self.max_value

    def _normalised(
        self, images: Float[Array, "examples height width channels"]
    ) -> Float[Array, "examples height width channels"]:
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)


@dataclasses.dataclass
class EncodedImageClassification(ImageClassification):
    """The same on photographs of many sizes, which are decoded and cropped on the host each time that they are read.

    In training each is a random crop, in an evaluation its centre. `loading.workers` are processes that do it.
    """

    size: int = setting(224, minimum=1)
    """Sides of the square image that the model gets, in pixels."""
    shorter: int = setting(256, minimum=1)
    """Pixels of an image's shorter side after an evaluation resized it; it then takes the centre of `size` pixels."""
    smallest_crop: float = setting(0.08, above=0, maximum=1)
    """The smallest share of an image's area in a random crop."""

    def augment(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The example with a random crop of its image, uint8 [size, size, 3]."""
        return {**example, "image": example["image"].random_crop(rng, self.smallest_crop)}

    def source(self, split: str) -> RandomAccessSource:
        """The images, still encoded, and labels of a split."""
        source = tfds.TfdsSource(self.dataset, split, ("image", "label"), self.data_dir, encoded=("image",))
        return EncodedImages(source, self.size, self.shorter)
