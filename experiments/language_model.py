"""Language modelling: a decoder-only transformer that predicts each byte of a text from those before it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from trainer.config import setting
from trainer.data import tfds
from trainer.data.source import ArraySource
from trainer.errors import UserError
from trainer.experiment import Batch, Collections, Mean, Metrics, Variables
from trainer.remat import POLICIES, remat


class Projection(nn.Module):
    """The product of the last `contracted` dimensions of x with a kernel, in the dtype of x, without a bias.

    Attributes:
      shape: that of the kernel, [*contracted, *new].
      axes: its logical axes.
      contracted: how many dimensions of x it takes.
      gain: variance of the result over that of x when the kernel is fresh.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    contracted: int = 1
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """[*kept, *contracted] → [*kept, *new]."""
        dims = range(len(self.shape))
        fresh = nn.initializers.variance_scaling(
            self.gain, "fan_in", "truncated_normal", dims[: self.contracted], dims[self.contracted :]
        )
        kernel: Any = self.param("kernel", nn.with_logical_partitioning(fresh, self.axes), self.shape)
        return jnp.tensordot(x, kernel.astype(x.dtype), self.contracted)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    heads: int
    gain: float

    @nn.compact
    def __call__(self, x: Float[Array, "rows length width"]) -> Float[Array, "rows length width"]:
        """What each position takes from itself and those before it."""
        width = x.shape[-1]
        shape, axes = (width, self.heads, width // self.heads), ("embed", "heads", "head_dim")
        query, key, value = (
            nn.with_logical_constraint(Projection(shape, axes, name=name)(x), ("batch", "length", "heads", "head_dim"))
            for name in ("query", "key", "value")
        )
        # Its products are summed, and its softmax taken, in float32.
        mixed = jax.nn.dot_product_attention(rotary(query), rotary(key), value, is_causal=True)
        return Projection((*shape[1:], width), (*axes[1:], "embed"), contracted=2, gain=self.gain, name="out")(mixed)


class MLP(nn.Module):
    """A hidden layer, plain or gated."""

    units: int
    activation: str
    gain: float

    @nn.compact
    def __call__(self, x: Float[Array, "rows length width"]) -> Float[Array, "rows length width"]:
        """Each position by itself."""
        width = x.shape[-1]
        hidden = Projection((width, self.units), ("embed", "mlp"), name="up")(x)
        if self.activation == "swiglu":
            hidden *= nn.silu(Projection((width, self.units), ("embed", "mlp"), name="gate")(x))
        else:
            hidden = nn.gelu(hidden)
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        return Projection((self.units, width), ("mlp", "embed"), gain=self.gain, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    heads: int
    mlp_width: int
    activation: str
    gain: float
    dropout: float
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "rows length width"], _: None) -> tuple[Float[Array, "rows length width"], None]:
        """The stream as `nn.scan` carries it: x and nothing in, x and nothing out."""
        layers = {
            "attention": Attention(self.heads, self.gain, name="attention"),
            "mlp": MLP(self.mlp_width, self.activation, self.gain, name="mlp"),
        }
        for name, layer in layers.items():
            y = layer(norm(f"{name}_norm", x.dtype)(x))
            y = nn.Dropout(self.dropout, deterministic=not self.train, name=f"{name}_dropout")(y)
            x = nn.with_logical_constraint(x + y, ("batch", "length", "embed_act"))
        return x, None


class Transformer(nn.Module):
    """Blocks between an embedding and its transpose, which is the output head: the two are tied."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    dropout: float
    dtype: str
    scan: bool
    remat: str
    train: bool

    @nn.compact
    def __call__(self, tokens: Int[Array, "rows length"]) -> Float[Array, "rows length vocab"]:
        """Logits, float32, of the token after each."""
        fresh = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), ("vocab", "embed"))
        embed = nn.Embed(self.vocab, self.width, embedding_init=fresh, name="embed")
        # Looked up in float32, as the gradient of a frequent token is a sum of thousands of terms.
        x = (embed(tokens) * math.sqrt(self.width)).astype(self.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))

        block = remat(Block, self.remat, scanned=self.scan)
        # The stream is a sum over two results a layer; with this gain it does not grow with the depth.
        settings = (self.heads, self.mlp_width, self.activation, 1 / (2 * self.layers), self.dropout, self.train)
        if self.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = scanned(*settings, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = block(*settings, name=f"layer_{i}")(x, None)
        x = norm("norm", x.dtype)(x)
        head = embed.embedding.astype(x.dtype)
        logits = jnp.einsum("rlw,vw->rlv", x, head, preferred_element_type=jnp.float32)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))


def norm(name: str, dtype: Any) -> nn.RMSNorm:
    """x over the root of its mean square, computed in float32, times a scale."""
    return nn.RMSNorm(dtype=dtype, scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), name=name)


def rotary(x: Float[Array, "rows length heads head_dim"]) -> Float[Array, "rows length heads head_dim"]:
    """Each pair (i, i + head_dim/2) of the entry at position t turned by t · 10000 ** (−2i/head_dim) radians.

    The product of two turned vectors depends on their distance and not on where they stand.
    """
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.checkpoint  # so that the backward pass keeps the logits and nothing else of their size, whatever XLA fuses
def score(
    logits: Float[Array, "rows length vocab"], targets: Int[Array, "rows length"]
) -> tuple[Float[Array, "rows length"], Bool[Array, "rows length"]]:
    """The cross-entropy in nats of each target, and whether no other token has a higher logit."""
    # A sum instead of a lookup: its gradient is no scatter, and a vocabulary split over devices stays where it is.
    chosen = jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen, chosen >= logits.max(-1)


def windows(texts: Sequence[bytes], length: int) -> dict[str, np.ndarray]:
    """Every byte of each text but its first as the target of one window of `length` + 1 bytes.

    Windows of a text overlap by one byte. Its last one is filled up with zeros.

    Returns:
      "tokens", uint8 [windows, length + 1], and "targets", int32 [windows], how many of the last `length` are bytes of
      the text, 1 … length.
    """
    tokens, targets = [], []
    for text in texts:
        count = -(-max(len(text) - 1, 0) // length)
        padded = np.zeros(count * length + 1, np.uint8)
        padded[: len(text)] = np.frombuffer(text, np.uint8)
        starts = length * np.arange(count)
        tokens.append(padded[starts[:, None] + np.arange(length + 1)])
        targets.append(np.minimum(len(text) - 1 - starts, length))
    return {"tokens": np.concatenate(tokens), "targets": np.concatenate(targets).astype(np.int32)}


@dataclasses.dataclass
class LanguageModel:
    """Cross-entropy of the next byte, on the texts of a TFDS data set."""

    dataset: str = setting("shakespeare")
    """Name of a TFDS data set with a feature "text"; a split is read into memory as a whole."""
    data_dir: str = setting("", may_change=True)
    """Where TFDS data lies; "" for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    length: int = setting(64, minimum=1)
    """Bytes that are predicted in each sequence, each from all before it in the sequence."""
    vocab: int = setting(256, minimum=256)
    """Rows of the embedding. Bytes need 256; more of them are for planning, to have the sizes of published models."""
    width: int = setting(128, minimum=2)
    """Units of the stream that blocks read and add to."""
    layers: int = setting(2, minimum=1)
    """Number of blocks."""
    heads: int = setting(4, minimum=1)
    """Attention heads, each of width / heads units, an even number."""
    mlp_width: int = setting(512, minimum=1)
    """Hidden units of the MLP."""
    activation: str = setting("gelu", choices=("gelu", "swiglu"))
    """`gelu`, or `swiglu`: a third kernel gates the hidden units through SiLU."""
    dropout: float = setting(0.0, minimum=0, maximum=1)
    """Share of the units of each attention's and MLP's result that is left out while training."""
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """What activations are computed in. Parameters, norms, softmax, logits and loss are float32 in any case."""
    scan: bool = setting(False)
    """Whether one loop goes over all blocks, whose parameters are then stacked: quicker to compile, and with `remat`
    far less memory."""
    remat: str = setting("none", choices=tuple(POLICIES))
    """What the backward pass keeps of each block; see `trainer.remat`."""

    def _model(self, train: bool) -> Transformer:
        if self.width % (2 * self.heads):
            raise UserError(f"width {self.width} does not divide into {self.heads} heads of an even number of units")
        return Transformer(
            self.vocab,
            self.width,
            self.layers,
            self.heads,
            self.mlp_width,
            self.activation,
            self.dropout,
            self.dtype,
            self.scan,
            self.remat,
            train,
        )

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh parameters, each boxed with its logical axes."""
        return self._model(train=False).init(key, batch["tokens"][:, :-1].astype(jnp.int32))

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool, axis_name: str | None
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss", the cross-entropy in nats per byte, the same as "bits_per_byte", and "accuracy".

        Each target byte weighs 1; what fills up a window, or a batch, weighs 0.
        """
        del axis_name  # nothing here is normalised over the batch
        tokens = batch["tokens"].astype(jnp.int32)
        logits = self._model(train).apply(variables, tokens[:, :-1], rngs={"dropout": key})
        losses, hits = score(logits, tokens[:, 1:])
        weights = batch["mask"][:, None] * (jnp.arange(self.length) < batch["targets"][:, None])
        loss = Mean.of(losses, weights)
        bits = Mean(loss.total / math.log(2), loss.weight)
        return {"loss": loss, "bits_per_byte": bits, "accuracy": Mean.of(hits, weights)}, {}

    def source(self, split: str) -> ArraySource:
        """The windows of all texts of a split, in the order in which the data set holds the texts."""
        texts = tfds.TfdsSource(self.dataset, split, ("text",), self.data_dir)
        examples = texts.__getitems__(range(len(texts)))
        return ArraySource(windows([example["text"] for example in examples], self.length))

    def prepare(self) -> None:
        """Writes the data set as ArrayRecord."""
        tfds.prepare(self.dataset, self.data_dir)
