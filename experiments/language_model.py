"""Language modelling: a decoder-only transformer that predicts each token of a text from the tokens before it.

A batch has "tokens", [B, T + 1] of whole numbers. One of two further entries says which of the T targets of a row
count; without either, all do. "targets", int [B], is their number, starting with the first. "segments", [B, T + 1] of
whole numbers, is 1, 2, … for the documents packed into a row, and 0 for padding: no document sees another, and the
first token of a document is no target. An entry "bytes" [B] gives the bytes of text in the targets that count, by which
bits per byte are computed; without it each target is a byte.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from experiments.attention import ATTENTIONS
from experiments.remat import POLICIES
from experiments.sampling import extend
from experiments.transformer import Transformer
from trainer.config import setting
from trainer.data import ArraySource, tfds
from trainer.errors import UserError
from trainer.experiment import Batch, Collections, Variables
from trainer.metrics import Mean, Metrics
from trainer.report import ReportWriter, on_host


@jax.checkpoint  # the backward pass then keeps the logits and no other array of their size, whatever XLA fuses
def cross_entropy_and_hits(
    logits: Float[Array, "examples length vocab"], targets: Int[Array, "examples length"]
) -> tuple[Float[Array, "examples length"], Bool[Array, "examples length"]]:
    """The cross-entropy in nats of each target, and whether no other token has a higher logit."""
    # A sum instead of a lookup: its gradient has no scatter, and logits sharded over the vocabulary are not gathered.
    chosen = jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen, chosen >= logits.max(-1)


def windows(texts: Sequence[bytes | np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Cuts texts into windows of `length` + 1 tokens, so that every token but a text's first is one window's target.

    Consecutive windows of a text overlap by one token. The last window of a text is padded with zeros.

    Args:
      texts: bytes, or tokens of one dtype.
      length: the number of targets in a window.

    Returns:
      "tokens", uint8 for bytes, [windows, length + 1], and "targets", int32 [windows], the number of targets in each
      window, 1 … length. The targets of a window are the tokens after its first.
    """
    tokens, targets = [], []
    for text in texts:
        text = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text
        count = -(-max(len(text) - 1, 0) // length)
        padded = np.zeros(count * length + 1, text.dtype)
        padded[: len(text)] = text
        starts = length * np.arange(count)
        tokens.append(padded[starts[:, None] + np.arange(length + 1)])
        targets.append(np.minimum(len(text) - 1 - starts, length))
    return {"tokens": np.concatenate(tokens), "targets": np.concatenate(targets).astype(np.int32)}


def target_mask(batch: Batch) -> Bool[Array, "examples length"]:
    """Whether each target of a batch counts: those of windows up to "targets", those of packed rows by "segments"."""
    if "segments" in batch:
        segments = batch["segments"]
        return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    rows, length = batch["tokens"].shape
    places = jnp.arange(length - 1)
    return places < batch["targets"][:, None] if "targets" in batch else jnp.ones((rows, length - 1), bool)


def text_metrics(
    losses: Float[Array, "examples length"], hits: Bool[Array, "examples length"], batch: Batch
) -> dict[str, Mean]:
    """Metrics "loss" in nats per target, "bits_per_byte" and "accuracy", over the targets that count."""
    weights = batch["mask"][:, None] * target_mask(batch)
    loss = Mean.of(losses, weights)
    size = jnp.sum(batch["mask"] * batch["bytes"]) if "bytes" in batch else loss.weight
    bits = Mean(loss.total / math.log(2), size)
    return {"loss": loss, "bits_per_byte": bits, "accuracy": Mean.of(hits, weights)}


# Compiled once for each model, temperature and top_k, and each length of prompt and of text.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _continued(
    model: Transformer, temperature: float, top_k: int | None, variables: Variables, prompt: Array, keys: Array
) -> Array:
    """The tokens after each prompt, one for each key; `model` has a cache for all of them."""

    def forward(cache: Any, tokens: Array) -> tuple[Array, Any]:
        return model.apply({**variables, **cache}, tokens, mutable=["cache"])

    return extend(forward, {}, prompt, keys, temperature, top_k)


def texts_of(dataset: str, split: str, data_dir: str | None) -> list[bytes]:
    """All texts of a split of a TFDS data set."""
    texts = tfds.TfdsSource(dataset, split, ("text",), data_dir)
    return [example["text"] for example in texts.__getitems__(range(len(texts)))]


def text_of(tokens: Iterable[int]) -> str:
    """The text of tokens: those below 256 are its bytes; what is not UTF-8 is shown as replacement characters."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


@dataclasses.dataclass
class LanguageModel:
    """Cross-entropy of the next token; here tokens are the bytes of the texts of a TFDS data set.

    A subclass with another vocabulary replaces `encode`, `decode`, `source` and `prepare`.
    """

    dataset: str = setting("shakespeare")
    """Name of a TFDS data set with a feature "text"; a split is read into memory."""
    data_dir: str | None = setting(None, may_change=True)
    """The folder of TFDS data sets; None for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    length: int = setting(64, minimum=1)
    """Sequence length: the number of tokens to predict in a row."""
    vocab: int = setting(256, minimum=256)
    """Vocabulary size of the embedding. Bytes need 256; a larger one gives `plan` the sizes of published models."""
    width: int = setting(128, minimum=2)
    """Units of the residual stream."""
    layers: int = setting(2, minimum=1)
    """Number of blocks."""
    heads: int = setting(4, minimum=1)
    """Number of attention heads; each has width / heads units, an even number."""
    kv_heads: int | None = setting(None, minimum=1)
    """Number of heads of keys and values, each shared by heads / kv_heads heads of queries; None for `heads`."""
    attention: str = setting("plain", choices=ATTENTIONS, may_change=True)
    """Implementation of attention: `plain`, or `splash`, a kernel for TPUs; see `experiments.attention`."""
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
    """Tokens that are generated after each evaluation and reported as a text; 0 for none."""

    def _model(self, train: bool, cache: int = 0) -> Transformer:
        kv_heads = self.kv_heads or self.heads
        if self.width % (2 * self.heads):
            raise UserError(f"width {self.width} does not divide into {self.heads} heads of an even number of units")
        if self.heads % kv_heads:
            raise UserError(f"{self.heads} heads do not divide into {kv_heads} groups, one for each of the kv_heads")
        return Transformer(
            vocab=self.vocab,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=kv_heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            attention=self.attention,
            dropout=self.dropout,
            dtype=self.dtype,
            scan=self.scan,
            remat="none" if cache else self.remat,
            train=train,
            cache=cache,
        )

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh parameters, each in a box with its logical axes."""
        return self._model(train=False).init(key, batch["tokens"][:, :-1].astype(jnp.int32))

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss", the cross-entropy in nats per target, "bits_per_byte" and "accuracy".

        Each target has weight 1; padding of a row or of a batch, and the first tokens of documents, have weight 0.
        """
        losses, hits = self._scores(variables, batch, train=train, rngs={"dropout": key})
        return text_metrics(losses, hits, batch), {}

    def _scores(self, variables: Variables, batch: Batch, *, train: bool, **options: Any) -> tuple[Array, Array]:
        """The cross-entropy of each target, and whether it is the likeliest token."""
        tokens = batch["tokens"].astype(jnp.int32)
        segments = batch["segments"][:, :-1].astype(jnp.int32) if "segments" in batch else None
        logits = self._model(train).apply(variables, tokens[:, :-1], segments, **options)
        return cross_entropy_and_hits(logits, tokens[:, 1:])

    def predict(self, variables: Variables, batch: Batch) -> dict[str, Array]:
        """ "log_likelihood" [B], the sum over the targets of each row, in nats, and "targets" [B], how many count."""
        losses, _ = self._scores(variables, batch, train=False)
        is_target = target_mask(batch)
        return {"log_likelihood": -jnp.sum(losses * is_target, axis=-1), "targets": is_target.sum(axis=-1)}

    def generate(
        self,
        variables: Variables,
        prompt: str,
        length: int,
        *,
        key: Key[Array, ""],
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> str:
        """The prompt and the `length` tokens after it, as a text; see `continuations`."""
        if not (tokens := self.encode(prompt)):
            raise UserError("the prompt is empty; the model needs a token to begin with")
        rows = jnp.asarray([tokens], jnp.int32)
        found = self.continuations(variables, rows, length, key, temperature, top_k)
        return self.decode([*tokens, *on_host(found)[0].tolist()])

    def continuations(
        self,
        variables: Variables,
        prompt: Int[Array, "examples prompt"],
        count: int,
        key: Key[Array, ""],
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> Int[Array, "examples count"]:
        """`count` tokens after each prompt, drawn one after the other; arguments are those of `sampling.extend`.

        Keys and values of earlier positions are kept in a cache, so each token costs one position.
        """
        model = self._model(train=False, cache=prompt.shape[1] + count)
        return _continued(model, temperature, top_k, variables, prompt, jax.random.split(key, count))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text: its bytes in UTF-8."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, see `text_of`."""
        return text_of(tokens)

    def report(self, step: int, variables: Variables, writer: ReportWriter) -> None:
        """A text that the model continues, if `sample` is not 0."""
        if self.sample:
            writer.text("sample", self.generate(variables, "The ", self.sample, key=jax.random.key(step)))

    def source(self, split: str) -> ArraySource:
        """The windows of all texts of a split, in the order of the texts in the data set."""
        return ArraySource(windows(texts_of(self.dataset, split, self.data_dir), self.length))

    def prepare(self) -> None:
        """Writes the data set as ArrayRecord."""
        tfds.prepare(self.dataset, self.data_dir)
