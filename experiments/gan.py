"""Generative adversarial networks on small images: WGAN-GP and SN-GAN.

Generator and discriminator are two labels of one tree of parameters, which an ordinary step of the harness trains. The
loss is the sum of the generator loss and the discriminator loss. `jax.lax.stop_gradient` blocks the generator loss from
the discriminator's parameters, and the other way round. So the gradient of the sum is, for each label, the gradient of
that label's own loss. `every_steps` of the generator's label is the number of updates of the discriminator for one of
the generator.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, UInt8

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from experiments.frechet import frechet_distance, load_features
from experiments.image_keys import image_keys
from trainer.config import setting
from trainer.data import tfds
from trainer.errors import UserError
from trainer.experiment import Batch, Collections, RandomAccessSource, Variables, replica_axis
from trainer.metrics import Mean, Metrics
from trainer.report import ReportWriter


class Linear(nn.Module):
    """A dense layer, with spectral normalization if that is asked for.

    Spectral normalization divides the kernel by its largest singular value (Miyato et al., 2018, arXiv:1802.05957).
    Power iteration estimates that from the vector "u" of collection "spectral", which moves by one iteration where the
    collection is mutable. It reads the kernel and the vector alone, so all devices and replicas agree.
    """

    features: int
    axes: tuple[str | None, str | None]  # the kernel's logical axes
    spectral: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... features"]:
        """The layer applied to the last axis."""
        # Small, as of DCGAN (Radford et al., 2015, arXiv:1511.06434), so that updates of 2e-4 change it soon.
        kernel_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
        kernel: Any = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        if self.spectral:
            kernel = kernel / self._largest_singular_value(kernel)
        return x @ kernel + (self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else 0)

    def _largest_singular_value(self, kernel: Float[Array, "inputs features"]) -> Float[Array, ""]:
        def initial_vector() -> Array:
            return _unit(jax.random.normal(self.make_rng("params"), (self.features,)))

        start = self.variable("spectral", "u", initial_vector)
        right, fixed = start.value, jax.lax.stop_gradient(kernel)
        left = _unit(fixed @ right)
        if self.is_mutable_collection("spectral") and not self.is_initializing():
            right = start.value = _unit(left @ fixed)
        return left @ kernel @ right


def _unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


def patches(x: Float[Array, "examples height width channels"]) -> Float[Array, "examples rows columns inputs"]:
    """The 4×4 patches at every second pixel of images padded by 1: half the height and width, 16 times the channels.

    Their product with a kernel is a convolution. XLA:CPU takes twenty times as long for the gradient of the gradient of
    `nn.Conv` with stride 2, which the gradient penalty needs.
    """
    examples, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = x.reshape(examples, height // 2 + 1, 2, width // 2 + 1, 2, channels).swapaxes(2, 3)
    x = x.reshape(examples, height // 2 + 1, width // 2 + 1, 4 * channels)
    return jnp.concatenate([x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]], axis=-1)


class Generator(nn.Module):
    """Images from latents: a dense layer, then transposed 4×4 convolutions with stride 2, with BatchNorm between."""

    shape: tuple[int, int, int]
    widths: tuple[int, ...]

    @nn.compact
    def __call__(
        self, latents: Float[Array, "examples latent"], train: bool
    ) -> Float[Array, "examples height width channels"]:
        """Images with values from −1 to 1."""
        times = 2 ** len(self.widths)
        height, width, channels = self.shape[0] // times, self.shape[1] // times, self.widths[0]
        x = Linear(height * width * channels, ("embed", "mlp"), use_bias=False, name="dense")(latents)
        x = x.reshape(-1, height, width, channels)
        for i, channels in enumerate((*self.widths[1:], self.shape[2]), 1):
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, axis_name=replica_axis(), name=f"norm_{i}")(x))
            # BatchNorm would cancel a bias.
            x = Linear(16 * channels, ("embed", "mlp"), use_bias=i == len(self.widths), name=f"up_{i}")(x)
            larger = jax.ShapeDtypeStruct((len(x), 2 * x.shape[1], 2 * x.shape[2], channels), x.dtype)
            (x,) = jax.linear_transpose(patches, larger)(x)
        return jnp.tanh(x)


class Discriminator(nn.Module):
    """Scores of images: 4×4 convolutions with stride 2, then a dense layer. No example sees another."""

    widths: tuple[int, ...]
    spectral: bool

    @nn.compact
    def __call__(self, x: Float[Array, "examples height width channels"]) -> Float[Array, " examples"]:
        """Scores of images with values from −1 to 1; larger for an image that looks real."""
        for i, channels in enumerate(self.widths):
            axes = (None if i == 0 else "embed", "mlp")
            x = nn.leaky_relu(Linear(channels, axes, self.spectral, name=f"down_{i}")(patches(x)), 0.2)
        # The Wasserstein loss is a difference of scores, which a bias does not change.
        head = Linear(1, ("embed", None), self.spectral, use_bias=self.spectral, name="head")
        return head(x.reshape(len(x), -1))[:, 0]


class Networks(nn.Module):
    """Generator and discriminator, which share no parameter."""

    shape: tuple[int, int, int]
    widths: tuple[int, ...]
    spectral: bool

    def setup(self) -> None:
        """The two networks; the first layers of the one have as many channels as the last of the other."""
        self.generator = Generator(self.shape, self.widths[::-1])
        self.discriminator = Discriminator(self.widths, self.spectral)

    def __call__(self, latents: Float[Array, "examples latent"]) -> Float[Array, " examples"]:
        """The scores of generated images; for `init`."""
        return self.score(self.generate(latents, train=False))

    def generate(
        self, latents: Float[Array, "examples latent"], train: bool
    ) -> Float[Array, "examples height width channels"]:
        """Images with values from −1 to 1."""
        return self.generator(latents, train)

    def score(self, images: Float[Array, "examples height width channels"]) -> Float[Array, " examples"]:
        """The discriminator's scores."""
        return self.discriminator(images)


@dataclasses.dataclass
class GAN:
    """A generator of images, from a TFDS data set with "image", uint8 with values from 0 to 255."""

    dataset: str = setting("fashion_mnist_local")
    """Name of a TFDS data set, such as "fashion_mnist_local" or "mnist"."""
    data_dir: str | None = setting(None, may_change=True)
    """The folder of TFDS data sets; None for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    kind: str = setting("wgan_gp", choices=("wgan_gp", "sn_gan"))
    """`wgan_gp`: the Wasserstein loss with gradient penalty (Gulrajani et al., 2017, arXiv:1704.00028); `sn_gan`: the
    hinge loss with spectral normalization of the discriminator (Miyato et al., 2018, arXiv:1802.05957)."""
    shape: tuple[int, int, int] = setting((28, 28, 1))
    """Height, width and channels of an image; height and width are multiples of 2 to the number of `widths`."""
    widths: tuple[int, ...] = setting((32, 64))
    """Channels of the discriminator's convolutions; the generator has the same in reverse order."""
    latent: int = setting(64, minimum=1)
    """Size of a latent, standard normal numbers from which the generator makes an image."""
    penalty: float = setting(10.0, minimum=0)
    """Factor of the gradient penalty of `wgan_gp`."""
    samples: int = setting(64, minimum=0, may_change=True)
    """Images that are generated after each main evaluation and reported as a grid; 0 for none."""
    classifier: str | None = setting(None, may_change=True)
    """The workdir of a run of configs/fashion_mnist.py, or WORKDIR@STEP, in whose features the evaluation "samples"
    measures the Fréchet distance; None for no such metric. Any image classifier does whose last layer is "head"."""

    def _networks(self) -> Networks:
        times = 2 ** len(self.widths)
        if self.shape[0] % times or self.shape[1] % times:
            raise UserError(f"shape {self.shape}: height and width must be multiples of {times}, for {self.widths=}")
        return Networks(self.shape, self.widths, self.kind == "sn_gan")

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh variables of both networks."""
        networks, found = self._networks(), batch["image"].shape[1:]
        if found != self.shape:
            raise UserError(f"the images have shape {found}; the setting shape is {self.shape}")
        return networks.init(key, jnp.zeros((1, self.latent)))

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metric "loss" is the sum of "generator_loss" and "discriminator_loss"; only its gradient has a meaning.

        "gap" is the difference between the scores of real and generated images; with `wgan_gp` it estimates the
        Wasserstein distance, and "slope" is the mean norm of the gradient that is penalised.
        """
        del key
        networks, real = self._networks(), batch["image"] / 127.5 - 1.0
        latents, shares = _draw(batch["example_key"] if train else image_keys(batch["image"]), self.latent)
        fake, statistics = networks.apply(
            variables, latents, train, method="generate", mutable=["batch_stats"] if train else []
        )
        mutable = ["spectral"] if train and "spectral" in variables else []
        real_scores, spectral = networks.apply(variables, real, method="score", mutable=mutable)
        score: Callable[..., Any] = functools.partial(networks.apply, method="score")
        updated, fixed_fake = {**variables, **spectral}, jax.lax.stop_gradient(fake)
        gap = real_scores - (fake_scores := score(updated, fixed_fake))
        generator_losses = -score(jax.lax.stop_gradient(updated), fake)
        metrics = {"gap": gap, "generator_loss": generator_losses}
        if self.kind == "sn_gan":
            discriminator_losses = jax.nn.relu(1 - real_scores) + jax.nn.relu(1 + fake_scores)
        else:
            between = shares * real + (1 - shares) * fixed_fake
            metrics["slope"] = _slopes(functools.partial(score, updated), between)
            discriminator_losses = self.penalty * jnp.square(metrics["slope"] - 1) - gap
        metrics |= {"discriminator_loss": discriminator_losses, "loss": generator_losses + discriminator_losses}
        return {name: Mean.of(values, batch["mask"]) for name, values in metrics.items()}, {**statistics, **spectral}

    def generate(
        self, variables: Variables, count: int, key: Key[Array, ""], first: int = 0
    ) -> UInt8[Array, "count h w channels"]:
        """The images number `first` to `first` + `count` − 1 of a key, with values from 0 to 255."""
        return _generated(self._networks(), count, self.latent, variables, key, first)

    def evaluate(self, name: str, variables: Variables, batches: Iterator[Batch]) -> dict[str, float] | None:
        """The metric of an evaluation named "samples": "frechet_fashion_cnn", which is no FID; see `classifier`.

        It compares the images of the split with as many generated ones.
        """
        if name != "samples":
            return None
        if self.classifier is None:
            return {}
        features = load_features(self.classifier, _replicated_sharding(variables))
        real, fake = list[np.ndarray](), list[np.ndarray]()
        for batch in batches:
            images = self.generate(variables, len(batch["mask"]), jax.random.key(0), sum(map(len, real)))
            found = process_allgather((features(batch["image"]), features(images), batch["mask"]), tiled=True)
            real.append(found[0][found[2] > 0])
            fake.append(found[1][found[2] > 0])
        first, second = (np.concatenate(parts).astype(np.float64) for parts in (real, fake))
        return {"frechet_fashion_cnn": frechet_distance(first, second)}

    def report(self, step: int, variables: Variables, writer: ReportWriter) -> None:
        """A grid of generated images, of the same latents at every step."""
        del step
        if self.samples:
            writer.image("samples", self.generate(variables, self.samples, jax.random.key(0)))

    def source(self, split: str) -> RandomAccessSource:
        """The images of a split."""
        return tfds.TfdsSource(self.dataset, split, ("image",), self.data_dir)

    def prepare(self) -> None:
        """Writes the data set as ArrayRecord."""
        tfds.prepare(self.dataset, self.data_dir)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # compiled once for each number of images
def _generated(networks: Networks, count: int, latent: int, variables: Variables, key: Array, first: Array) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))
    latents, _ = _draw(keys, latent)
    images: Any = networks.apply(variables, latents, False, method="generate")
    return jnp.round((images + 1) * 127.5).astype(jnp.uint8)


def _draw(
    keys: Key[Array, " examples"], latent: int
) -> tuple[Float[Array, "examples latent"], Float[Array, "examples 1 1 1"]]:
    """A latent, standard normal, and a share from 0 to 1 for each key."""
    pairs = jax.vmap(jax.random.split)(keys)
    latents = jax.vmap(lambda key: jax.random.normal(key, (latent,)))(pairs[:, 0])
    return latents, jax.vmap(lambda key: jax.random.uniform(key, (1, 1, 1)))(pairs[:, 1])


def _slopes(score: Callable[[Array], Any], images: Float[Array, "examples h w c"]) -> Float[Array, " examples"]:
    """The norm of the gradient of each image's score."""
    gradients = jax.grad(lambda x: jnp.sum(score(x)))(images)
    return jnp.sqrt(jnp.sum(jnp.square(gradients), axis=(1, 2, 3)) + 1e-12)


def _replicated_sharding(variables: Variables) -> jax.sharding.Sharding:
    """The sharding of an array that is whole on every device of the variables."""
    sharding = jax.tree.leaves(variables)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
