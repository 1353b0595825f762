"""Image classification: a small strided CNN or an MLP, on any TFDS data set with "image" and "label"."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, UInt8

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from trainer.config import setting
from trainer.data import tfds
from trainer.experiment import Batch, Collections, RandomAccessSource, Variables, replica_axis
from trainer.metrics import Mean, Metrics


class StridedCNN(nn.Module):
    """3×3 convolutions with stride 2 (the first has stride 1 on images below 16 pixels), then a hidden layer.

    It strides instead of pooling: on CPUs the gradient of max_pool makes such a network eight times slower.
    """

    widths: tuple[int, ...]
    hidden: int
    classes: int
    dropout: float
    batch_norm: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples classes"]:
        """Logits of images with values from 0 to 1."""
        for i, width in enumerate(self.widths):
            stride = 1 if i == 0 and x.shape[1] < 16 else 2
            x = nn.Conv(
                width, (3, 3), strides=stride, use_bias=not self.batch_norm, dtype=self.dtype, name=f"conv_{i}"
            )(x)
            if self.batch_norm:
                x = nn.BatchNorm(not train, momentum=0.9, axis_name=replica_axis(), dtype=self.dtype, name=f"norm_{i}")(
                    x
                )
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


class MLP(nn.Module):
    """Dense layers with dropout between them."""

    widths: tuple[int, ...]
    classes: int
    dropout: float
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples classes"]:
        """Logits of images with values from 0 to 1."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout_{i}")(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


@dataclasses.dataclass
class ImageClassification:
    """Cross-entropy on images, scaled to [0, 1] and, while training, shifted at random."""

    dataset: str = setting("digits")
    """Name of a TFDS data set, such as "digits", "fashion_mnist_local" or "mnist"."""
    data_dir: str | None = setting(None, may_change=True)
    """The folder of TFDS data sets; None for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    classes: int = setting(10, minimum=2)
    """Number of classes; labels are 0 … classes − 1."""
    max_value: float = setting(255.0, minimum=1)
    """The largest pixel value, which is scaled to 1."""
    model: str = setting("cnn", choices=("cnn", "mlp"))
    """`cnn` is StridedCNN, `mlp` is MLP."""
    widths: tuple[int, ...] = setting((32, 64))
    """Channels of the convolutions, or units of the dense layers."""
    hidden: int = setting(128, minimum=1)
    """Units of the CNN's hidden layer."""
    dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate while training, the share of units that are set to 0."""
    batch_norm: bool = setting(False)
    """Whether the CNN has BatchNorm after each convolution."""
    max_shift: int = setting(0, minimum=0)
    """Training images are shifted by at most this many pixels along both axes and padded with zeros."""
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Dtype of the activations. Parameters, batch statistics and loss are always float32."""

    def _model(self) -> nn.Module:
        if self.model == "mlp":
            return MLP(self.widths, self.classes, self.dropout, self.dtype)
        return StridedCNN(self.widths, self.hidden, self.classes, self.dropout, self.batch_norm, self.dtype)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh variables of the model."""
        return self._model().init(key, self._scaled(batch["image"]), train=False)

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss", the cross-entropy in nats, and "accuracy"."""
        images = self._scaled(batch["image"])
        if train and self.max_shift:
            images = shift(images, batch["example_key"], self.max_shift)
        logits, collections = self._model().apply(
            variables,
            images,
            train=train,
            rngs={"dropout": key},
            mutable=[name for name in variables if name != "params"] if train else [],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["label"])
        hits = jnp.argmax(logits, axis=-1) == batch["label"]
        metrics = {"loss": Mean.of(losses, batch["mask"]), "accuracy": Mean.of(hits, batch["mask"])}
        return metrics, collections

    def predict(self, variables: Variables, batch: Batch) -> dict[str, Array]:
        """ "label", the class with the largest logit, and "probabilities" [B, classes]."""
        logits = jnp.asarray(self._model().apply(variables, self._scaled(batch["image"]), train=False), jnp.float32)
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


def shift(
    images: Float[Array, "examples height width channels"], keys: Key[Array, " examples"], most: int
) -> Float[Array, "examples height width channels"]:
    """Each image shifted by −most … most pixels along both axes, drawn from its own key, and padded with zeros."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))

    def crop(image: Float[Array, "h w channels"], key: Key[Array, ""]) -> Float[Array, "height width channels"]:
        offset = jax.random.randint(key, (2,), 0, 2 * most + 1)
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, image.shape[-1]))

    return jax.vmap(crop)(padded, keys)
