"""VGG-11 with BatchNorm (Simonyan and Zisserman, 2014, arXiv:1409.1556, configuration A)."""

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import batch_norm, conv, dense

VGG11 = (1, 1, 2, 2, 2)  # convolutions of each stage
WIDTHS = (64, 128, 256, 512, 512)  # channels of each stage
HIDDEN = {"cifar": 512, "imagenet": 4096}  # units of the two hidden layers, by the kind of images


class VGG(nn.Module):
    """3×3 convolutions with a bias, BatchNorm and ReLU; 2×2 max-pooling after each stage; two hidden layers."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    hidden: int
    classes: int
    dropout: float
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples classes"]:
        """Logits. Each stage halves the image, so five stages need images of 32 pixels or more a side."""
        if min(x.shape[1:3]) < (least := 2 ** len(self.blocks)):
            raise ValueError(f"images of {x.shape[1]}×{x.shape[2]} pixels are too small; a side has {least} or more")
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for i in range(count):
                name, is_first = f"{stage}_{i}", stage == i == 0
                x = conv(width, 3, name=f"conv_{name}", dtype=self.dtype, bias=True, input_is_image=is_first)(x)
                x = nn.relu(batch_norm(train, name=f"norm_{name}", dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i in range(2):
            x = nn.relu(dense(self.hidden, name=f"hidden_{i}", dtype=self.dtype)(x))
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout_{i}")(x)
        return dense(self.classes, name="head", dtype="float32", axes=("embed", None))(x)
