"""Vision transformers (Dosovitskiy et al., 2020, arXiv:2010.11929) in the sizes Ti, S (Touvron et al., 2020) and B."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.models.layers import conv, dense

# Width and heads; 12 blocks each.
VITS = {"vit_ti16": (192, 3), "vit_s16": (384, 6), "vit_b16": (768, 12)}
DEPTH, PATCH = 12, 16

_STREAM = ("batch", "length", "embed_act")


def _norm(name: str, dtype: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


class Attention(nn.Module):
    """Every position attends to all positions."""

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "examples length width"]) -> Float[Array, "examples length width"]:
        """The weighted values of all heads, projected."""
        width, kernel_init = x.shape[-1], nn.initializers.xavier_uniform()
        query, key, value = (
            nn.with_logical_constraint(
                dense(width, name=name, dtype=self.dtype, axes=("embed", "heads"), kernel_init=kernel_init)(x).reshape(
                    *x.shape[:2], self.heads, -1
                ),
                ("batch", "length", "heads", "head_dim"),
            )
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        return dense(width, name="out", dtype=self.dtype, axes=("heads", "embed"), kernel_init=kernel_init)(mixed)


class MLP(nn.Module):
    """Two dense layers with GELU between them; the hidden one is four times as wide."""

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "examples length width"]) -> Float[Array, "examples length width"]:
        """Transforms each position by itself."""
        width, kernel_init = x.shape[-1], nn.initializers.xavier_uniform()
        x = nn.gelu(dense(4 * width, name="up", dtype=self.dtype, kernel_init=kernel_init)(x), approximate=False)
        x = nn.with_logical_constraint(x, ("batch", "length", "mlp"))
        return dense(width, name="down", dtype=self.dtype, axes=("mlp", "embed"), kernel_init=kernel_init)(x)


class Block(nn.Module):
    """Attention and MLP; each reads the normalised residual stream and adds to the stream."""

    heads: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "examples length width"], train: bool) -> Float[Array, "examples length width"]:
        """The residual stream after the block."""
        layers = (
            ("attention", Attention(self.heads, self.dtype, name="attention")),
            ("mlp", MLP(self.dtype, name="mlp")),
        )
        for name, layer in layers:
            y = layer(_norm(f"{name}_norm", self.dtype)(x))
            y = nn.Dropout(self.dropout, deterministic=not train, name=f"{name}_dropout")(y)
            x = nn.with_logical_constraint(x + y, _STREAM)
        return x


class ViT(nn.Module):
    """Patches as tokens, a class token before them, learned positions, and a linear head on the class token."""

    depth: int
    width: int
    heads: int
    patch: int
    classes: int
    dropout: float
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples height width channels"], train: bool
    ) -> Float[Array, "examples classes"]:
        """Logits of images whose sides are multiples of the patch."""
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"images of {x.shape[1]}×{x.shape[2]} pixels do not divide into patches of {self.patch}")
        kernel_init = nn.initializers.lecun_normal()
        patches = conv(
            self.width,
            self.patch,
            name="patches",
            dtype=self.dtype,
            stride=self.patch,
            bias=True,
            input_is_image=True,
            padding=0,
            kernel_init=kernel_init,
        )(x)
        x = patches.reshape(x.shape[0], -1, self.width)
        token = self._param("class_token", nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        positions = self._param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = nn.with_logical_constraint(x + positions.astype(x.dtype), _STREAM)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        for i in range(self.depth):
            x = Block(self.heads, self.dropout, self.dtype, name=f"block_{i}")(x, train)
        x = _norm("norm", self.dtype)(x[:, 0])
        zeros = nn.initializers.zeros
        return dense(self.classes, name="head", dtype="float32", axes=("embed", None), kernel_init=zeros)(x)

    def _param(self, name: str, init: Any, shape: tuple[int, ...]) -> Array:
        value: Any = self.param(name, nn.with_logical_partitioning(init, (None, None, "embed")), shape)
        return value
