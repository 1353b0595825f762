"""DenseNet-121 (Huang et al., 2016, arXiv:1608.06993), with bottlenecks and compression by a half."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.models.layers import batch_norm, conv, dense
from experiments.models.resnet import Stem

DENSENET121 = (6, 12, 24, 16)  # layers of each block
GROWTH = 32  # channels that a layer adds


class Layer(nn.Module):
    """BatchNorm, ReLU and a convolution, of 1×1 and then of 3×3 pixels; the result is appended to the input."""

    growth: int
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples height width more_channels"]:
        """The input's channels, and `growth` new ones after them."""
        y = x
        for i, (side, width) in enumerate(((1, 4 * self.growth), (3, self.growth))):
            y = nn.relu(batch_norm(train, name=f"norm_{i}", dtype=self.dtype)(y))
            y = conv(width, side, name=f"conv_{i}", dtype=self.dtype)(y)
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nn.Module):
    """Blocks of layers that see all layers before them; between blocks, half as many channels and 2×2 mean-pooling."""

    blocks: tuple[int, ...]
    growth: int
    classes: int
    stem: str
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples classes"]:
        """Logits of images that the stem and the poolings leave a pixel or more of."""
        x = Stem(self.stem, 2 * self.growth, self.stem == "imagenet", self.dtype, name="stem")(x, train)
        for block, count in enumerate(self.blocks):
            for i in range(count):
                x = Layer(self.growth, self.dtype, name=f"block_{block}_layer_{i}")(x, train)
            if block + 1 < len(self.blocks):
                x = nn.relu(batch_norm(train, name=f"norm_{block}", dtype=self.dtype)(x))
                x = conv(x.shape[-1] // 2, 1, name=f"conv_{block}", dtype=self.dtype)(x)
                if min(x.shape[1:3]) < 2:
                    raise ValueError(f"the images are too small: {x.shape[1]}×{x.shape[2]} pixels are left to pool")
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(batch_norm(train, name="norm", dtype=self.dtype)(x))
        return dense(self.classes, name="head", dtype="float32", axes=("embed", None))(x.mean((1, 2)))
