"""Random changes of training images on the device, each drawn from the example's own key."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from trainer.config import setting
from trainer.errors import UserError

Images = Float[Array, "examples height width channels"]
Targets = Float[Array, "examples classes"]
Keys = Key[Array, " examples"]


@dataclasses.dataclass
class Augmentation:
    """The random changes of a training image, made in the order of the fields; 0 leaves one out.

    An example's result depends on its own key, so it is the same on any number of devices. Only `mixup` looks at
    another example, its neighbour in the microbatch.
    """

    random_resized_crop: float = setting(0.0, minimum=0, maximum=1)
    """The smallest share of the image's area in a random crop, which is resized to the image's own shape."""
    crop: int = setting(0, minimum=0)
    """Largest shift in pixels along both axes; zeros come in."""
    flip: float = setting(0.0, minimum=0, maximum=1)
    """Probability of a flip from left to right."""
    cutout: int = setting(0, minimum=0)
    """Side in pixels of a square that is set to the data's mean, with its centre anywhere in the image."""
    mixup: float = setting(0.0, minimum=0)
    """An image and its target become weighted means with those of its neighbour; its own weight is drawn from
    Beta(mixup, mixup)."""
    label_smoothing: float = setting(0.0, minimum=0, below=1)
    """The share of a target that is spread over all classes evenly."""

    @property
    def softens(self) -> bool:
        """Whether targets are no longer one class each."""
        return bool(self.mixup or self.label_smoothing)

    def images(self, images: Images, keys: Keys, fill: Float[Array, " one_or_channels"] | float = 0.0) -> Images:
        """The images, changed one by one; `fill` is the value of pixels that are cut out."""
        if self.random_resized_crop:
            images = random_resized_crop(images, _fold(keys, 1), self.random_resized_crop)
        if self.crop:
            images = crop(images, keys, self.crop)
        if self.flip:
            images = flip(images, _fold(keys, 2), self.flip)
        if self.cutout:
            images = cutout(images, _fold(keys, 3), self.cutout, fill)
        return images

    def mixed(self, images: Images, targets: Targets, keys: Keys) -> tuple[Images, Targets]:
        """Images and targets, mixed with their neighbours; a target's entries add up to 1."""
        return mixup(images, targets, _fold(keys, 4), self.mixup) if self.mixup else (images, targets)


def _fold(keys: Keys, number: int) -> Keys:
    """Other keys, independent of those and of those of other numbers."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def crop(images: Images, keys: Keys, most: int) -> Images:
    """Each image shifted by −most … most pixels along both axes and padded with zeros."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))

    def one(image: Float[Array, "h w channels"], key: Key[Array, ""]) -> Float[Array, "height width channels"]:
        offset = jax.random.randint(key, (2,), 0, 2 * most + 1)
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, image.shape[-1]))

    return jax.vmap(one)(padded, keys)


def flip(images: Images, keys: Keys, probability: float) -> Images:
    """Each image flipped from left to right with a probability."""
    flipped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def cutout(images: Images, keys: Keys, side: int, fill: Float[Array, " one_or_channels"] | float = 0.0) -> Images:
    """A square of each image set to `fill` (DeVries and Taylor, 2017, arXiv:1708.04552).

    Its centre is any pixel, so it may lie partly outside.
    """

    def one(key: Key[Array, ""]) -> Array:
        inside = []
        for size, own in zip(images.shape[1:3], jax.random.split(key), strict=True):
            start = jax.random.randint(own, (), 0, size) - side // 2
            places = jnp.arange(size)
            inside.append((places >= start) & (places < start + side))
        return inside[0][:, None] & inside[1]

    return jnp.where(jax.vmap(one)(keys)[..., None], jnp.asarray(fill, images.dtype), images)


def random_resized_crop(images: Images, keys: Keys, smallest: float) -> Images:
    """A rectangle of each image, resized to the shape of the image (Szegedy et al., 2014, arXiv:1409.4842).

    Its area is uniform between `smallest` and the largest share that fits; the logarithm of its aspect ratio is uniform
    between those of 3/4 and 4/3, where it fits; its place is uniform. Resizing is linear with antialiasing.
    """
    height, width = images.shape[1:3]

    def one(image: Float[Array, "height width channels"], key: Key[Array, ""]) -> Float[Array, "height width channels"]:
        top, left, lines, columns = box(jax.random.uniform(key, (4,)), height, width, smallest)
        scale = jnp.stack([height / lines, width / columns])
        moved = -jnp.stack([top, left]) * scale
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, moved, "linear")

    return jax.vmap(one)(images, keys)


def box(
    draws: Float[Array, "4"], height: int, width: int, smallest: float
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Top, left, height and width in pixels of a random crop, from four numbers that are uniform in [0, 1)."""
    largest = min(1.0, 4 / 3 * height / width, 4 / 3 * width / height)
    area = jnp.minimum(smallest, largest) + draws[0] * (largest - min(smallest, largest))
    low = jnp.maximum(math.log(3 / 4), jnp.log(area * width / height))  # a crop as high as the image
    high = jnp.minimum(math.log(4 / 3), -jnp.log(area * height / width))  # a crop as wide as the image
    ratio = jnp.exp(low + draws[1] * jnp.maximum(high - low, 0))
    lines = jnp.minimum(jnp.sqrt(area * height * width / ratio), height)
    columns = jnp.minimum(jnp.sqrt(area * height * width * ratio), width)
    return draws[2] * (height - lines), draws[3] * (width - columns), lines, columns


def mixup(images: Images, targets: Targets, keys: Keys, alpha: float) -> tuple[Images, Targets]:
    """The weighted mean of each example and its neighbour (Zhang et al., 2017, arXiv:1710.09412).

    Each example draws its own weight from Beta(alpha, alpha); its neighbour in the mean gets the rest.

    Examples 0 and 1 are neighbours, and 2 and 3, and so on: on any number of devices a device holds whole pairs, as
    long as its microbatches are of an even number of examples. `UserError` if the number here is odd.
    """
    if len(keys) % 2:
        raise UserError(f"mixup pairs the examples of a microbatch; {len(keys)} is an odd number of them")
    share = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)

    def mix(x: Array) -> Array:
        own = share.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        neighbours = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
        return own * x + (1 - own) * neighbours

    return mix(images), mix(targets)


def smooth(targets: Targets, share: float) -> Targets:
    """The share `share` of each target spread over all classes (Szegedy et al., 2015, arXiv:1512.00567)."""
    return targets * (1 - share) + share / targets.shape[-1]
