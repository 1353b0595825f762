"""Language modelling: a decoder-only transformer that predicts each byte of a text from the bytes before it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from experiments.remat import POLICIES
from experiments.transformer import Transformer
from trainer.config import setting
from trainer.data import ArraySource, tfds
from trainer.errors import UserError
from trainer.experiment import Batch, Collections, Variables
from trainer.metrics import Mean, Metrics
from trainer.report import ReportWriter


@jax.checkpoint  # the backward pass then keeps the logits and no other array of their size, whatever XLA fuses
def score(
    logits: Float[Array, "examples length vocab"], targets: Int[Array, "examples length"]
) -> tuple[Float[Array, "examples length"], Bool[Array, "examples length"]]:
    """The cross-entropy in nats of each target, and whether no other token has a higher logit."""
    # A sum instead of a lookup: its gradient has no scatter, and logits sharded over the vocabulary are not gathered.
    chosen = jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen, chosen >= logits.max(-1)


def windows(texts: Sequence[bytes], length: int) -> dict[str, np.ndarray]:
    """Cuts texts into windows of `length` + 1 bytes, so that every byte but a text's first is one window's target.

    Consecutive windows of a text overlap by one byte. The last window of a text is padded with zeros.

    Returns:
      "tokens", uint8 [windows, length + 1], and "targets", int32 [windows], the number of targets in each window,
      1 … length. The targets of a window are the bytes after its first.
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


@functools.partial(jax.jit, static_argnums=(0, 1))  # compiled once for each model
def _continued(model: Transformer, temperature: float, variables: Variables, prompt: Array, keys: Array) -> Array:
    """The tokens after each prompt, one for each key; `model` has a cache for all of them."""

    def draw(logits: Array, key: Array) -> Array:
        last = logits[:, -1]
        return jnp.argmax(last, -1) if temperature == 0 else jax.random.categorical(key, last / temperature)

    def step(carry: tuple[Any, Array], key: Array) -> tuple[tuple[Any, Array], Array]:
        cache, token = carry
        logits, cache = model.apply({**variables, **cache}, token[:, None], mutable=["cache"])
        token = draw(logits, key)
        return (cache, token), token

    logits, cache = model.apply(variables, prompt, mutable=["cache"])
    first = draw(logits, keys[0])
    _, rest = jax.lax.scan(step, (cache, first), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


@dataclasses.dataclass
class LanguageModel:
    """Cross-entropy of the next byte, on the texts of a TFDS data set."""

    dataset: str = setting("shakespeare")
    """Name of a TFDS data set with a feature "text"; a split is read into memory."""
    data_dir: str | None = setting(None, may_change=True)
    """The folder of TFDS data sets; None for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    length: int = setting(64, minimum=1)
    """Sequence length: the number of bytes to predict in a window."""
    vocab: int = setting(256, minimum=256)
    """Vocabulary size of the embedding. Bytes need 256; a larger one gives `plan` the sizes of published models."""
    width: int = setting(128, minimum=2)
    """Units of the residual stream."""
    layers: int = setting(2, minimum=1)
    """Number of blocks."""
    heads: int = setting(4, minimum=1)
    """Number of attention heads; each has width / heads units, an even number."""
    mlp_width: int = setting(512, minimum=1)
    """Hidden units of the MLP."""
    activation: str = setting("gelu", choices=("gelu", "swiglu"))
    """Activation of the MLP: `gelu`, or `swiglu`, in which a third kernel gates the hidden units through SiLU."""
    dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate while training, on the result of each attention and MLP."""
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Dtype of the activations. Parameters, norms, softmax, logits and loss are always float32."""
    scan: bool = setting(False)
    """Whether `nn.scan` runs the blocks, with stacked parameters. It compiles faster, and with `remat` takes far less
    memory."""
    remat: str = setting("none", choices=tuple(POLICIES))
    """The activations of each block that the backward pass keeps; see `experiments.remat`."""
    sample: int = setting(0, minimum=0, may_change=True)
    """Bytes that are generated after each evaluation and reported as a text; 0 for none."""

    def _model(self, train: bool, cache: int = 0) -> Transformer:
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
            "none" if cache else self.remat,
            train,
            cache,
        )

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh parameters, each in a box with its logical axes."""
        return self._model(train=False).init(key, batch["tokens"][:, :-1].astype(jnp.int32))

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss", the cross-entropy in nats per byte, "bits_per_byte", the same in bits, and "accuracy".

        Each target byte has weight 1; padding of a window or of a batch has weight 0.
        """
        tokens = batch["tokens"].astype(jnp.int32)
        logits = self._model(train).apply(variables, tokens[:, :-1], rngs={"dropout": key})
        losses, hits = score(logits, tokens[:, 1:])
        weights = batch["mask"][:, None] * (jnp.arange(self.length) < batch["targets"][:, None])
        loss = Mean.of(losses, weights)
        bits = Mean(loss.total / math.log(2), loss.weight)
        return {"loss": loss, "bits_per_byte": bits, "accuracy": Mean.of(hits, weights)}, {}

    def predict(self, variables: Variables, batch: Batch) -> dict[str, Array]:
        """ "log_likelihood", that of each window's target bytes in nats, and "targets", how many they are."""
        tokens = batch["tokens"].astype(jnp.int32)
        losses, _ = score(self._model(train=False).apply(variables, tokens[:, :-1]), tokens[:, 1:])
        is_target = jnp.arange(self.length) < batch["targets"][:, None]
        return {"log_likelihood": -jnp.sum(losses * is_target, axis=-1), "targets": batch["targets"]}

    def generate(
        self,
        variables: Variables,
        prompt: Int[Array, "examples prompt"],
        count: int,
        key: Key[Array, ""],
        temperature: float = 0.8,
    ) -> Int[Array, "examples count"]:
        """`count` bytes after each prompt, drawn one after the other; with temperature 0 the likeliest.

        Keys and values of earlier positions are kept in a cache, so each byte costs one position.
        """
        model = self._model(train=False, cache=prompt.shape[1] + count)
        return _continued(model, temperature, variables, prompt, jax.random.split(key, count))

    def report(self, step: int, variables: Variables, writer: ReportWriter) -> None:
        """A text that the model continues, if `sample` is not 0."""
        if self.sample:
            start = b"The "
            prompt = jnp.asarray([list(start)], jnp.int32)
            found = self.generate(variables, prompt, self.sample, jax.random.key(step))
            writer.text("sample", (start + bytes(np.asarray(found[0], np.uint8))).decode(errors="replace"))

    def source(self, split: str) -> ArraySource:
        """The windows of all texts of a split, in the order of the texts in the data set."""
        texts = tfds.TfdsSource(self.dataset, split, ("text",), self.data_dir)
        examples = texts.__getitems__(range(len(texts)))
        return ArraySource(windows([example["text"] for example in examples], self.length))

    def prepare(self) -> None:
        """Writes the data set as ArrayRecord."""
        tfds.prepare(self.dataset, self.data_dir)
