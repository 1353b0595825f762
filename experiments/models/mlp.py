"""Dense layers on the pixels of an image."""

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import dense


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
            axes = (None if i == 0 else "embed", "mlp")  # the number of pixels need not divide over devices
            x = nn.relu(dense(width, name=f"dense_{i}", dtype=self.dtype, axes=axes)(x))
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout_{i}")(x)
        return dense(self.classes, name="head", dtype=self.dtype, axes=("embed", None))(x)
