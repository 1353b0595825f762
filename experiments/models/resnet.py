"""ResNets (He et al., 2015, arXiv:1512.03385); those with bottlenecks stride in their 3×3 convolution."""

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import batch_norm, conv, dense

# Blocks of each stage, and whether they are bottlenecks.
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
WIDTHS = (64, 128, 256, 512)  # channels of the 3×3 convolutions of each stage


class Stem(nn.Module):
    """The layers before the first stage.

    `cifar` is one 3×3 convolution. `imagenet` is a 7×7 convolution with stride 2, and 3×3 max-pooling with stride 2.
    """

    kind: str
    width: int
    norm: bool
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples lines columns features"]:
        """Features of images."""
        large = self.kind == "imagenet"
        side, stride = (7, 2) if large else (3, 1)
        x = conv(self.width, side, name="conv", dtype=self.dtype, stride=stride, input_is_image=True)(x)
        if self.norm:
            x = nn.relu(batch_norm(train, name="norm", dtype=self.dtype)(x))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if large else x


class Block(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3 and 1×1 (a bottleneck), whose result is added to the input."""

    width: int
    stride: int
    bottleneck: bool
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples lines columns features"]:
        """The block's features; a 1×1 convolution projects the input if its shape differs."""
        features = 4 * self.width if self.bottleneck else self.width
        sides = ((1, self.width), (3, self.width), (1, features)) if self.bottleneck else ((3, features), (3, features))
        strided = 1 if self.bottleneck else 0
        y = x
        for i, (side, width) in enumerate(sides):
            stride = self.stride if i == strided else 1
            y = conv(width, side, name=f"conv_{i}", dtype=self.dtype, stride=stride)(y)
            y = batch_norm(train, name=f"norm_{i}", dtype=self.dtype)(y)
            y = nn.relu(y) if i + 1 < len(sides) else y
        if x.shape != y.shape:
            x = conv(features, 1, name="conv_shortcut", dtype=self.dtype, stride=self.stride)(x)
            x = batch_norm(train, name="norm_shortcut", dtype=self.dtype)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, each but the first with stride 2, and a linear head on the features' mean."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool
    classes: int
    stem: str
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples classes"]:
        """Logits."""
        x = Stem(self.stem, self.widths[0], True, self.dtype, name="stem")(x, train)
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                x = Block(width, stride, self.bottleneck, self.dtype, name=f"stage_{stage}_block_{i}")(x, train)
        return dense(self.classes, name="head", dtype="float32", axes=("embed", None))(x.mean((1, 2)))
