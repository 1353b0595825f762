"""A decoder-only transformer in Linen, with rotary positions, logical axes on every kernel, and optional `nn.scan`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.attention import attend
from experiments.remat import remat


class Projection(nn.Module):
    """A dense layer without a bias, in the dtype of x, whose kernel has two dimensions.

    TPUs store arrays in tiles of 8 × 128: a kernel with three dimensions, the last of them that of a head, takes up to
    twice its size.

    Attributes:
      features: size of the result's last dimension.
      axes: the kernel's logical axes.
      gain: ratio of the result's variance to that of x for a fresh kernel.
    """

    features: int
    axes: tuple[str, str]
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "examples length width"]) -> Float[Array, "examples length features"]:
        """Projects each position by itself."""
        kernel_init = nn.initializers.variance_scaling(self.gain, "fan_in", "truncated_normal")
        shape = (x.shape[-1], self.features)
        kernel: Any = self.param("kernel", nn.with_logical_partitioning(kernel_init, self.axes), shape)
        return x @ kernel.astype(x.dtype)


class TokenPositions(NamedTuple):
    """The positions and documents of the tokens of a batch.

    Attributes:
      positions: int32, in the token's document: [length], or [examples, length] if there are segments.
      segments: int32 [examples, length], the number of the token's document in its row; None if a row is one document.
    """

    positions: Array
    segments: Array | None


def token_positions(length: int, segments: Int[Array, "examples length"] | None = None) -> TokenPositions:
    """The positions of `length` tokens, counted from 0 in each row, or in each run of equal segments of a row."""
    positions = jnp.arange(length)
    if segments is None:
        return TokenPositions(positions, None)
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return TokenPositions(positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1), segments)


class Attention(nn.Module):
    """Causal attention with rotary positions, within documents; several query heads may share a key and a value head.

    With a cache, a call continues the sequences of the calls before: collection "cache" holds their keys and values,
    and how many positions they had.
    """

    heads: int
    kv_heads: int  # divides `heads`
    gain: float
    attention: str  # a name in `experiments.attention.ATTENTIONS`
    cache: int = 0  # positions that the cache has room for; 0 for no cache

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples length width"], where: TokenPositions
    ) -> Float[Array, "examples length width"]:
        """Each position attends to itself and to the positions before it in its document."""
        width = x.shape[-1]
        head_dim = width // self.heads
        query, key, value = (
            Projection(heads * head_dim, ("embed", "heads"), name=name)(x).reshape(*x.shape[:2], heads, head_dim)
            for name, heads in (("query", self.heads), ("key", self.kv_heads), ("value", self.kv_heads))
        )
        if self.cache:
            mixed = self._continued(query, key, value)
        else:
            query, key = (rotary(x, where.positions) for x in (query, key))
            mixed = attend(self.attention, query, key, value, where.segments)
        return Projection(width, ("heads", "embed"), self.gain, name="out")(mixed.reshape(x.shape))

    def _continued(self, query: Array, key: Array, value: Array) -> Array:
        """Attention to the positions in the cache too, to which the new ones are added."""
        count = self.variable("cache", "length", lambda: jnp.zeros((), jnp.int32))
        start, shape = count.value, (key.shape[0], self.cache, *key.shape[2:])
        positions = start + jnp.arange(query.shape[1])
        kept = [self.variable("cache", name, jnp.zeros, shape, key.dtype) for name in ("keys", "values")]
        for variable, new in zip(kept, (rotary(key, positions), value), strict=True):
            variable.value = jax.lax.dynamic_update_slice_in_dim(variable.value, new, start, axis=1)
        count.value = start + query.shape[1]
        sees = jnp.arange(self.cache) <= positions[:, None]
        keys, values = (variable.value for variable in kept)
        return jax.nn.dot_product_attention(rotary(query, positions), keys, values, mask=sees[None, None])


class MLP(nn.Module):
    """Two dense layers, with GELU between them or gated (SwiGLU)."""

    units: int
    activation: str
    gain: float

    @nn.compact
    def __call__(self, x: Float[Array, "examples length width"]) -> Float[Array, "examples length width"]:
        """Transforms each position by itself."""
        hidden = Projection(self.units, ("embed", "mlp"), name="up")(x)
        if self.activation == "swiglu":
            hidden *= nn.silu(Projection(self.units, ("embed", "mlp"), name="gate")(x))
        else:
            hidden = nn.gelu(hidden)
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        return Projection(x.shape[-1], ("mlp", "embed"), self.gain, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP; each reads the normalised residual stream and adds to the stream."""

    heads: int
    kv_heads: int
    mlp_width: int
    activation: str
    gain: float
    attention: str
    dropout: float
    train: bool
    cache: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples length width"], where: TokenPositions
    ) -> tuple[Float[Array, "examples length width"], None]:
        """The residual stream after the block, as `nn.scan` carries it: (stream, None)."""
        attention = Attention(self.heads, self.kv_heads, self.gain, self.attention, self.cache, name="attention")
        mlp = MLP(self.mlp_width, self.activation, self.gain, name="mlp")
        for name, layer in {"attention": lambda x: attention(x, where), "mlp": mlp}.items():
            y = layer(norm(f"{name}_norm", x.dtype)(x))
            y = nn.Dropout(self.dropout, deterministic=not self.train, name=f"{name}_dropout")(y)
            x = nn.with_logical_constraint(x + y, ("batch", "length", "embed_act"))
        return x, None


class Layer(nn.Module):
    """A block with the paths, and the names in profiles, of the layer around it.

    If `block` is a jitted class, JAX traces the first layer alone and takes its trace for the others. The name of a
    layer is outside of that trace.
    """

    block: type[nn.Module]
    settings: Mapping[str, Any]  # the attributes of the block

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples length width"], where: TokenPositions
    ) -> Float[Array, "examples length width"]:
        """The residual stream after the block."""
        block = self.block(**self.settings, name="block")
        nn.share_scope(self, block)
        return block(x, where)[0]


class Transformer(nn.Module):
    """An embedding, blocks, and an output head that shares the embedding's table (tied weights)."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    activation: str
    attention: str
    dropout: float
    dtype: str
    scan: bool
    remat: str
    train: bool
    cache: int = 0  # see `Attention`

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "examples length"], segments: Int[Array, "examples length"] | None = None
    ) -> Float[Array, "examples length vocab"]:
        """Logits, float32, of the token after each position; `segments` are those of `TokenPositions`."""
        boxed = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), ("vocab", "embed"))
        table = nn.Embed(self.vocab, self.width, embedding_init=boxed, name="embed").embedding.astype(self.dtype)
        x = lookup(table, tokens) * math.sqrt(self.width)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))

        block, where = remat(Block, self.remat, scanned=self.scan), token_positions(tokens.shape[1], segments)
        settings: dict[str, Any] = {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "mlp_width": self.mlp_width,
            "activation": self.activation,
            # Each layer adds two results to the stream; with this gain its variance does not grow with the depth.
            "gain": 1 / (2 * self.layers),
            "attention": self.attention,
            "dropout": self.dropout,
            "train": self.train,
            "cache": self.cache,
        }
        if self.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "cache": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = scanned(**settings, name="layers")(x, where)
        else:
            # Under `nn.jit` Flax draws other random numbers.
            draws = self.is_initializing() or (self.train and self.dropout > 0)
            block = block if draws else nn.jit(block)
            for i in range(self.layers):
                x = Layer(block, settings, name=f"layer_{i}")(x, where)
        x = norm("norm", x.dtype)(x)
        logits = jnp.einsum("rlw,vw->rlv", x, table, preferred_element_type=jnp.float32)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))


@jax.custom_vjp
def lookup(
    table: Float[Array, "vocab width"], tokens: Int[Array, "examples length"]
) -> Float[Array, "examples length width"]:
    """The embedding of each token.

    The gradient is a product with a one-hot matrix instead of a scatter. The product is summed in float32, a scatter
    would be summed in the table's dtype, and XLA shards the product's reduction over devices as that of any kernel.
    """
    return table[tokens]


def _looked_up(table: Array, tokens: Array) -> tuple[Array, tuple[Array, int]]:
    return table[tokens], (tokens, table.shape[0])


def _table_gradient(saved: tuple[Array, int], gradient: Array) -> tuple[Array, None]:
    tokens, vocab = saved
    chosen = jax.nn.one_hot(tokens, vocab, dtype=gradient.dtype)
    # Keeps examples sharded: XLA would gather the examples of all devices, since a one-hot matrix is cheap everywhere.
    chosen = nn.with_logical_constraint(chosen, ("batch", "length", "vocab"))
    return jnp.einsum("rlv,rlw->vw", chosen, gradient), None


lookup.defvjp(_looked_up, _table_gradient)


def norm(name: str, dtype: Any) -> nn.RMSNorm:
    """RMSNorm, computed in float32, with a scale whose logical axis is "embed"."""
    return nn.RMSNorm(dtype=dtype, scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), name=name)


def rotary(
    x: Float[Array, "examples length heads head_dim"], positions: Int[Array, "*examples length"]
) -> Float[Array, "examples length heads head_dim"]:
    """Rotary embedding: at position t, rotates the pair (i, i + head_dim/2) by t · 10000 ** (−2i/head_dim) radians.

    The dot product of two rotated vectors depends on the distance of their positions and not on the positions.
    """
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
