"""A small strided CNN."""

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import batch_norm, conv, dense


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
        kernel_init, bias = nn.initializers.lecun_normal(), not self.batch_norm
        for i, width in enumerate(self.widths):
            stride = 1 if i == 0 and x.shape[1] < 16 else 2
            settings = {"stride": stride, "padding": "SAME", "kernel_init": kernel_init, "bias": bias}
            x = conv(width, 3, name=f"conv_{i}", dtype=self.dtype, input_is_image=i == 0, **settings)(x)
            if self.batch_norm:
                x = batch_norm(train, name=f"norm_{i}", dtype=self.dtype)(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(self.hidden, name="hidden", dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return dense(self.classes, name="head", dtype=self.dtype, axes=("embed", None))(x)
