"""Contrastive learning: SimCLR (Chen et al., 2020, arXiv:2002.05709) on small images, and a linear probe."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Float, Float64, Int, Key, UInt8

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from experiments.augmentation import flip, random_resized_crop
from experiments.image_keys import image_keys
from experiments.models.layers import batch_norm, conv, dense
from trainer.config import setting
from trainer.data import take, tfds
from trainer.experiment import Batch, Collections, RandomAccessSource, Variables, replica_axis
from trainer.metrics import Mean, Metrics

_BLOCK = 512  # images that the probe encodes at once


class Encoder(nn.Module):
    """3×3 convolutions with stride 2, BatchNorm and ReLU, then the mean over all pixels."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples features"]:
        """The features of images with values from 0 to 1."""
        for i, width in enumerate(self.widths):
            x = conv(width, 3, stride=2, input_is_image=i == 0, name=f"conv_{i}", dtype="float32")(x)
            x = nn.relu(batch_norm(train, name=f"norm_{i}", dtype="float32")(x))
        return x.mean((1, 2))


class SimCLR(nn.Module):
    """An encoder, and a projection that the loss sees and the probe does not."""

    widths: tuple[int, ...]
    projection: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> tuple[Float[Array, "examples features"], Float[Array, "examples projection"]]:
        """Features, and their projection as unit vectors."""
        features = Encoder(self.widths, name="encoder")(x, train)
        hidden = nn.relu(dense(self.widths[-1], name="hidden", dtype="float32")(features))
        vectors = dense(self.projection, name="projection", dtype="float32", axes=("embed", None))(hidden)
        return features, vectors / jnp.sqrt(jnp.sum(jnp.square(vectors), -1, keepdims=True) + 1e-12)


def nt_xent(
    views: Float[Array, "examples 2 projection"],
    mask: Float[Array, " examples"],
    temperature: float,
    axis: str | None = None,
) -> tuple[Float[Array, " examples"], Float[Array, " examples"]]:
    """NT-Xent, the cross-entropy in nats of finding an example's other view among all views of the whole batch.

    Args:
      views: two unit vectors for each example; those of other examples are negatives.
      mask: 1 for an example, 0 for padding. Padding is not used as a negative, and its own results must be ignored.
      temperature: by which similarities are divided.
      axis: the axis of `jax.pmap` over which the batch is spread; its gradient is right if the gradients of all
        replicas are added up, as the harness does. None if arrays are global.

    Returns:
      For each example the mean over its two views of the cross-entropy, and of whether no other view is more similar.
    """
    count, everyone, present, first = len(views), views, mask, 0
    if axis is not None:
        everyone, present = (jax.lax.all_gather(x, axis, tiled=True) for x in (views, mask))
        first = jax.lax.axis_index(axis) * count
    anchors, others = views.reshape(2 * count, -1), everyone.reshape(2 * len(everyone), -1)
    places, own = jnp.arange(len(others)), 2 * first + jnp.arange(2 * count)
    similar = anchors @ others.T / temperature
    # Not −inf: where nothing is left, the gradient of its logarithm would be NaN, also of a masked example.
    similar = jnp.where((places == own[:, None]) | (jnp.repeat(present, 2) == 0), -1e9, similar)
    positive = jnp.sum(jnp.where(places == (own ^ 1)[:, None], similar, 0), axis=1)
    losses, hits = jax.nn.logsumexp(similar, axis=1) - positive, positive >= similar.max(1)
    return losses.reshape(count, 2).mean(1), hits.reshape(count, 2).mean(1)


@dataclasses.dataclass
class Contrastive:
    """Two random views of each image are told from those of all other images in the batch; no label is used.

    The images are those of a TFDS data set with "image", uint8 with values from 0 to 255, and "label" for the probe.
    """

    dataset: str = setting("fashion_mnist_local")
    """Name of a TFDS data set, such as "fashion_mnist_local" or "cifar10"."""
    data_dir: str | None = setting(None, may_change=True)
    """The folder of TFDS data sets; None for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    classes: int = setting(10, minimum=2)
    """Number of classes of the probe; labels are 0 … classes − 1."""
    widths: tuple[int, ...] = setting((32, 64, 128))
    """Channels of the encoder's convolutions; the last is the number of features."""
    projection: int = setting(64, minimum=1)
    """Size of the vectors that are compared."""
    temperature: float = setting(0.2, above=0)
    """Divides the cosine of two vectors; a smaller one looks at the most similar negatives only."""
    smallest_crop: float = setting(0.3, above=0, maximum=1)
    """The smallest share of the image's area in the random crop that makes a view."""
    jitter: float = setting(0.4, minimum=0, below=1)
    """A view's brightness and contrast are multiplied by random numbers from 1 − jitter to 1 + jitter."""
    penalty: float = setting(1e-3, above=0, may_change=True)
    """Half of it times the sum of the probe's squared weights is added to the cross-entropy that fits the probe."""

    def _model(self) -> SimCLR:
        return SimCLR(self.widths, self.projection)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh variables of the model."""
        return self._model().init(key, _scaled(batch["image"]), train=False)

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss", NT-Xent over all examples of a microbatch on all devices, and "found", its accuracy.

        Both depend on the number of negatives, so on the batch size. In evaluations an image always has the same views.
        """
        del key
        keys = batch["example_key"] if train else image_keys(batch["image"])
        images = self.views(_scaled(batch["image"]), keys)
        (_, vectors), collections = self._model().apply(
            variables, images, train=train, mutable=["batch_stats"] if train else []
        )
        views = vectors.reshape(-1, 2, self.projection)
        losses, hits = nt_xent(views, batch["mask"], self.temperature, replica_axis())
        return {"loss": Mean.of(losses, batch["mask"]), "found": Mean.of(hits, batch["mask"])}, collections

    def views(
        self, images: Float[Array, "examples height width channels"], keys: Key[Array, " examples"]
    ) -> Float[Array, "views height width channels"]:
        """Two views of each image, one after the other, drawn from its key: crop, flip, brightness and contrast."""
        pairs = jax.vmap(lambda key: jax.random.split(key, (2, 3)))(keys).reshape(-1, 3)
        images = random_resized_crop(jnp.repeat(images, 2, axis=0), pairs[:, 0], self.smallest_crop)
        return jittered(flip(images, pairs[:, 1], 0.5), pairs[:, 2], self.jitter)

    def predict(self, variables: Variables, batch: Batch) -> dict[str, Array]:
        """ "features" of each image, of the encoder."""
        return {"features": _features(self._model(), variables, batch["image"])}

    def evaluate(self, name: str, variables: Variables, batches: Iterator[Batch]) -> dict[str, float] | None:
        """The metric of an evaluation named "probe": "accuracy", that of a linear classifier of the frozen features.

        It is fitted to all images of the split "train" and their labels.
        """
        if name != "probe":
            return None
        weights = fit_probe(*self._encoded(variables), self.classes, self.penalty)
        hits = count = 0
        for batch in batches:
            features, label, mask = process_allgather(
                (_features(self._model(), variables, batch["image"]), batch["label"], batch["mask"]), tiled=True
            )
            right = probe(weights, features).argmax(-1) == label
            hits, count = hits + int(right[mask > 0].sum()), count + int(mask.sum())
        return {"accuracy": hits / count}

    def _encoded(self, variables: Variables) -> tuple[Float[np.ndarray, "n features"], Int[np.ndarray, " n"]]:
        """Features and labels of the split "train"; every process reads all of it."""
        source, found = self.source("train"), []
        for start in range(0, len(source), _BLOCK):
            batch = take(source, np.arange(start, min(start + _BLOCK, len(source))))
            features: Any = process_allgather(_features(self._model(), variables, batch["image"]), tiled=True)
            found.append((features, batch["label"]))
        features, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return features, labels

    def source(self, split: str) -> RandomAccessSource:
        """The images and labels of a split."""
        return tfds.TfdsSource(self.dataset, split, ("image", "label"), self.data_dir)

    def prepare(self) -> None:
        """Writes the data set as ArrayRecord."""
        tfds.prepare(self.dataset, self.data_dir)


def _scaled(images: UInt8[Array, "examples h w channels"]) -> Float[Array, "examples h w channels"]:
    return images.astype(jnp.float32) / 255


@functools.partial(jax.jit, static_argnums=0)  # compiled once for each size of a batch
def _features(model: SimCLR, variables: Variables, images: Array) -> Array:
    outputs: Any = model.apply(variables, _scaled(images), train=False)
    return outputs[0]


def jittered(
    images: Float[Array, "examples height width channels"], keys: Key[Array, " examples"], most: float
) -> Float[Array, "examples height width channels"]:
    """Images whose contrast and brightness are multiplied by numbers from 1 − most to 1 + most, from 0 to 1 again."""
    factors = jax.vmap(lambda key: jax.random.uniform(key, (2, 1, 1, 1), minval=1 - most, maxval=1 + most))(keys)
    means = images.mean((1, 2, 3), keepdims=True)
    return jnp.clip((means + (images - means) * factors[:, 0]) * factors[:, 1], 0, 1)


def fit_probe(
    features: Float[np.ndarray, "n features"], labels: Int[np.ndarray, " n"], classes: int, penalty: float
) -> Float64[np.ndarray, "features_and_1 classes"]:
    """The weights, and in the last row the biases, of a logistic regression of the labels on whitened features.

    Whitened features are uncorrelated with variance 1, so that L-BFGS converges in tens of iterations; directions with
    less than a millionth of the largest variance are left out. Weights of whitened features are penalised, biases not.
    """
    from scipy.optimize import minimize  # slow to import, and only needed here

    mean = features.mean(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(np.cov(features, rowvar=False))
    kept = variances > 1e-6 * variances[-1]
    whitening = directions[:, kept] / np.sqrt(variances[kept])
    x = (features - mean).astype(features.dtype) @ whitening.astype(features.dtype)
    targets = np.eye(classes, dtype=x.dtype)[labels]

    def objective(flat: np.ndarray) -> tuple[np.floating, np.ndarray]:
        weights = flat.reshape(-1, classes).astype(x.dtype)
        logits = x @ weights[:-1] + weights[-1]
        logits -= logits.max(1, keepdims=True)
        sums = np.exp(logits).sum(1, keepdims=True)
        loss = np.mean(np.log(sums[:, 0]) - (logits * targets).sum(1), dtype=np.float64)
        errors = (np.exp(logits) / sums - targets) / len(x)
        gradient = np.concatenate([x.T @ errors + penalty * weights[:-1], errors.sum(0)[None]])
        return loss + penalty / 2 * np.square(flat[:-classes]).sum(), gradient.ravel().astype(np.float64)

    found = minimize(objective, np.zeros((x.shape[1] + 1) * classes), jac=True, method="L-BFGS-B")
    weights = found.x.reshape(-1, classes)
    return np.concatenate([whitening @ weights[:-1], [weights[-1] - mean @ whitening @ weights[:-1]]])


def probe(
    weights: Float64[np.ndarray, "features_and_1 classes"], features: Float[np.ndarray, "n features"]
) -> Float64[np.ndarray, "n classes"]:
    """The logits of `fit_probe`'s regression for features."""
    return features @ weights[:-1] + weights[-1]
