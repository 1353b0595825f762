"""Language modelling with an LSTM, as in the AdaBelief paper: the state is carried from one piece of text to the next.

For training, the text of a split is cut into streams, and each stream into pieces. A batch holds the next piece of each
stream. The state after a piece is kept in the collection "carry", so that it is saved with the parameters, and the next
piece of the stream begins with it. The gradient ends at the beginning of a piece (truncated backpropagation). An
evaluation reads whole streams, each from a state of zeros.

The model is the AWD-LSTM of Merity et al., Regularizing and Optimizing LSTM Language Models (2017, arXiv:1708.02182),
with its dropout and its two penalties. The AdaBelief paper trains this model too. Here all pieces have the same length.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

import experiments.datasets  # noqa: F401 - registers this repository's data sets
from experiments.language_model import cross_entropy_and_hits, text_metrics, text_of, texts_of, windows
from experiments.sampling import extend
from experiments.transformer import lookup
from experiments.words import Vocabulary, read_text
from trainer.config import setting
from trainer.data import ArraySource, tfds
from trainer.data.streams import Streams
from trainer.errors import UserError
from trainer.experiment import Batch, Collections, Variables, replica_axis
from trainer.metrics import Mean, Metrics, Perplexity


class LSTMState(NamedTuple):
    """The state of a layer after a token: hidden units and cells, float32 [examples, units]."""

    hidden: Array
    cell: Array


class Outputs(NamedTuple):
    """The results of the model for a piece.

    Attributes:
      logits: float32 [examples, length, vocab].
      states: of each layer, after the piece.
      raw: the last layer's hidden units, [examples, length, width].
      dropped: the same after dropout.
    """

    logits: Array
    states: dict[str, LSTMState]
    raw: Array
    dropped: Array


class LSTMLayer(nn.Module):
    """A layer of LSTM units (Hochreiter and Schmidhuber, 1997, with forget gates)."""

    units: int
    weight_dropout: float
    train: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "examples length width"], state: LSTMState
    ) -> tuple[Float[Array, "examples length units"], LSTMState]:
        """The hidden units after each token, and the state after the last.

        The columns of both kernels belong to the input gates, the forget gates, the new cells and the output gates.
        """
        bound = self.units**-0.5

        def initializer(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        def parameter(name: str, axes: tuple[str, ...], *shape: int) -> Any:
            return self.param(name, nn.with_logical_partitioning(initializer, axes), shape)

        drop = nn.Dropout(self.weight_dropout, deterministic=not self.train, name="weight_dropout")
        hidden_kernel = drop(parameter("hidden_kernel", ("embed", "mlp"), self.units, 4 * self.units))
        input_kernel = parameter("input_kernel", ("embed", "mlp"), x.shape[-1], 4 * self.units)
        projected = x @ input_kernel + parameter("bias", ("mlp",), 4 * self.units)  # of all tokens at once

        def step(state: LSTMState, projected: Array) -> tuple[LSTMState, Array]:
            gates = jnp.split(projected + state.hidden @ hidden_kernel, 4, axis=-1)
            input_gate, forget_gate, output_gate = (jax.nn.sigmoid(gates[i]) for i in (0, 1, 3))
            cell = forget_gate * state.cell + input_gate * jnp.tanh(gates[2])
            hidden = output_gate * jnp.tanh(cell)
            return LSTMState(hidden, cell), hidden

        state, hidden = jax.lax.scan(step, state, jnp.swapaxes(projected, 0, 1))
        return jnp.swapaxes(hidden, 0, 1), state


class LSTM(nn.Module):
    """An embedding, LSTM layers, and a head that shares the embedding's table. The last layer has `width` units.

    Dropout masks of inputs, hidden units and outputs are drawn once for a piece and hold for all of its tokens.
    """

    vocab: int
    width: int
    hidden: int
    layers: int
    word_dropout: float
    input_dropout: float
    weight_dropout: float
    hidden_dropout: float
    output_dropout: float
    train: bool

    def zeros(self, examples: int) -> dict[str, LSTMState]:
        """The states at the beginning of a text."""
        sizes = [self.hidden] * (self.layers - 1) + [self.width]
        zeros = [jnp.zeros((examples, size)) for size in sizes]
        return {f"lstm_{i}": LSTMState(x, x) for i, x in enumerate(zeros)}

    @nn.compact
    def __call__(self, tokens: Int[Array, "examples length"], states: dict[str, LSTMState]) -> Outputs:
        """Reads a piece of text, of which `states` are those before it."""

        def drop(name: str, rate: float, shared: int) -> nn.Dropout:
            return nn.Dropout(rate, broadcast_dims=(shared,), deterministic=not self.train, name=f"{name}_dropout")

        def embedding_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, minval=-0.1, maxval=0.1)

        boxed = nn.with_logical_partitioning(embedding_init, ("vocab", "embed"))
        table = nn.Embed(self.vocab, self.width, embedding_init=boxed, name="embed").embedding
        x = lookup(drop("word", self.word_dropout, 1)(table), tokens)
        x = drop("input", self.input_dropout, 1)(x)
        after, raw = {}, x
        for i in range(self.layers):
            last = i == self.layers - 1
            layer = LSTMLayer(self.width if last else self.hidden, self.weight_dropout, self.train, name=f"lstm_{i}")
            x, after[f"lstm_{i}"] = layer(x, states[f"lstm_{i}"])
            raw = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
            x = drop("output", self.output_dropout, 1)(x) if last else drop(f"hidden_{i}", self.hidden_dropout, 1)(x)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        bias: Any = self.param("head_bias", zeros, (self.vocab,))
        logits = nn.with_logical_constraint(x @ table.T + bias, ("batch", "length", "vocab"))
        return Outputs(logits, after, raw, x)


# Compiled once for each model, temperature and top_k, and each length of prompt and of text.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _continued(model: LSTM, temperature: float, top_k: int | None, params: Any, prompt: Array, keys: Array) -> Array:
    """The tokens after each prompt, one for each key."""

    def forward(states: Any, tokens: Array) -> tuple[Array, Any]:
        outputs: Any = model.apply({"params": params}, tokens, states)
        return outputs.logits, outputs.states

    return extend(forward, model.zeros(len(prompt)), prompt, keys, temperature, top_k)


@dataclasses.dataclass
class LSTMLanguageModel:
    """Cross-entropy of the next byte of the texts of a TFDS data set, or of the next word of text files."""

    dataset: str = setting("shakespeare")
    """Name of a TFDS data set with a feature "text", whose bytes are the tokens."""
    data_dir: str | None = setting(None, may_change=True)
    """The folder of TFDS data sets; None for TFDS's default, TFDS_DATA_DIR or ~/tensorflow_datasets."""
    files: str | None = setting(None, may_change=True)
    """In place of the data set: the path of text files, with {split} in it; their words are the tokens. The vocabulary
    is that of the split "train"."""
    vocab: int = setting(256, minimum=2)
    """Vocabulary size of the embedding, at least that of the data."""
    length: int = setting(70, minimum=1)
    """The number of tokens to predict in a piece, through which gradients flow back."""
    streams: int = setting(20, minimum=1)
    """The number of streams into which training cuts a split: the run's batch_size, or a multiple of it."""
    eval_streams: int = setting(10, minimum=1)
    """The number of streams into which an evaluation cuts a split; each begins with a state of zeros."""
    width: int = setting(400, minimum=1)
    """Size of the embedding, and units of the last layer."""
    hidden: int = setting(1150, minimum=1)
    """Units of the layers before the last."""
    layers: int = setting(1, minimum=1)
    """Number of layers."""
    input_dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate on the embedded tokens."""
    hidden_dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate between layers."""
    output_dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate on the units of the last layer."""
    word_dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate on whole tokens of the vocabulary: all of their places in a piece are embedded as zeros."""
    weight_dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate on the kernels between a layer's hidden units."""
    activation_penalty: float = setting(0.0, minimum=0)
    """Added to the training loss: this number times the mean square of the outputs after dropout."""
    slowness_penalty: float = setting(0.0, minimum=0)
    """Added to the training loss: this number times the mean square of the outputs' change from token to token, the
    temporal activation regularization of the paper ("slowness" in its program)."""

    def _model(self, train: bool) -> LSTM:
        return LSTM(
            vocab=self.vocab,
            width=self.width,
            hidden=self.hidden,
            layers=self.layers,
            word_dropout=self.word_dropout,
            input_dropout=self.input_dropout,
            weight_dropout=self.weight_dropout,
            hidden_dropout=self.hidden_dropout,
            output_dropout=self.output_dropout,
            train=train,
        )

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh parameters, each in a box with its logical axes, and the collection "carry", zeros for each stream."""
        examples = len(batch["tokens"])
        if self.streams % examples:
            raise UserError(f"batch_size {examples} does not divide experiment.streams {self.streams}: set both alike")
        model = self._model(train=False)
        carry = {name: state._asdict() for name, state in model.zeros(self.streams).items()}
        return {**model.init(key, batch["tokens"][:, :1].astype(jnp.int32), model.zeros(examples)), "carry": carry}

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss" in nats per token, while training with the penalties, "perplexity" and "bits_per_byte".

        An evaluation reads each row from its first token to its last. Training reads one piece and carries the state.
        """
        if not train:
            losses, hits = self._read_through(variables["params"], batch["tokens"].astype(jnp.int32))
            return self._metrics(losses, hits, batch), {}
        tokens, streams = batch["tokens"].astype(jnp.int32), batch["stream"]
        is_first = (batch["piece"] == 0)[:, None]
        carry = {name: LSTMState(**state) for name, state in variables["carry"].items()}
        states = jax.tree.map(lambda x: jnp.where(is_first, 0, x[streams]), carry)
        outputs: Any = self._model(train=True).apply(
            {"params": variables["params"]}, tokens[:, :-1], states, rngs={"dropout": key}
        )
        losses, hits = cross_entropy_and_hits(outputs.logits, tokens[:, 1:])
        metrics = self._metrics(losses, hits, batch)
        loss = metrics["loss"]
        metrics["loss"] = Mean(loss.total + self._penalties(outputs, batch), loss.weight)
        kept = _put(carry, streams, jax.lax.stop_gradient(outputs.states))
        return metrics, {"carry": {name: state._asdict() for name, state in kept.items()}}

    def _metrics(self, losses: Array, hits: Array, batch: Batch) -> dict[str, Mean]:
        metrics = text_metrics(losses, hits, batch)
        return {**metrics, "perplexity": Perplexity(*metrics["loss"])}

    def _penalties(self, outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        """The sum over the tokens that count, so that division by their number gives a mean."""
        length = outputs.raw.shape[1]
        weights = batch["mask"][:, None] * (jnp.arange(length) < batch["targets"][:, None])
        activation = jnp.mean(outputs.dropped**2, axis=-1)
        change = jnp.mean(jnp.diff(outputs.raw, axis=1) ** 2, axis=-1) * (length / max(length - 1, 1))
        activation, change = (jnp.sum(x * weights[:, length - x.shape[1] :]) for x in (activation, change))
        return self.activation_penalty * activation + self.slowness_penalty * change

    def _read_through(self, params: Any, tokens: Int[Array, "examples places"]) -> tuple[Array, Array]:
        """The cross-entropy of each token but the first of each row, and whether it is the likeliest; in pieces."""
        model, (examples, places) = self._model(train=False), tokens.shape
        pieces = -(-(places - 1) // self.length)
        padded = jnp.pad(tokens, ((0, 0), (0, pieces * self.length + 1 - places)))

        def cut(tokens: Array) -> Array:
            return jnp.swapaxes(tokens.reshape(examples, pieces, self.length), 0, 1)

        def one(states: Any, piece: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array]]:
            outputs: Any = model.apply({"params": params}, piece[0], states)
            return outputs.states, cross_entropy_and_hits(outputs.logits, piece[1])

        _, found = jax.lax.scan(one, model.zeros(examples), (cut(padded[:, :-1]), cut(padded[:, 1:])))
        losses, hits = (jnp.swapaxes(x, 0, 1).reshape(examples, -1)[:, : places - 1] for x in found)
        return losses, hits

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
        """The prompt and the `length` tokens after it, as a text, drawn one after the other."""
        words = self._words()
        tokens = list(prompt.encode()) if words is None else words.encode(prompt).tolist()
        if not tokens:
            raise UserError("the prompt is empty; the model needs a token to begin with")
        rows, keys = jnp.asarray([tokens], jnp.int32), jax.random.split(key, length)
        found = _continued(self._model(train=False), temperature, top_k, variables["params"], rows, keys)
        tokens += np.asarray(found[0]).tolist()
        if words is not None:
            return words.decode(tokens)
        return text_of(tokens)

    def source(self, split: str) -> Streams:
        """The text of a split, in which each token but the first is a target once.

        Training reads the pieces of all streams; evaluations read `eval_streams` whole streams, one an example.
        """
        tokens, byte_counts = self._tokens(split)
        rows = _rows(tokens, self.length, byte_counts)
        missing = -len(rows["tokens"]) % self.streams  # pieces without a target fill up the last streams
        filled = {name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for name, x in rows.items()}
        pieces = {name: x.reshape(self.streams, -1, *x.shape[1:]) for name, x in filled.items()}
        whole = _rows(tokens, -(-(len(tokens) - 1) // self.eval_streams), byte_counts)
        return Streams(pieces, in_evaluations=ArraySource(whole))

    def _tokens(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a split in one row, and the bytes of text that each of the vocabulary stands for."""
        if (words := self._words()) is not None:
            tokens, byte_counts = words.encode(read_text(self.files or "", split)), words.byte_counts
        else:
            text = b"".join(texts_of(self.dataset, split, self.data_dir))
            tokens, byte_counts = np.frombuffer(text, np.uint8), np.ones(256, np.int32)
        if len(byte_counts) > self.vocab:
            raise UserError(f"the text has {len(byte_counts):,} kinds of tokens; experiment.vocab is {self.vocab:,}")
        if len(tokens) < 2:
            raise UserError(f"the split {split!r} has {len(tokens)} tokens; 2 or more are needed")
        return tokens, byte_counts

    def _words(self) -> Vocabulary | None:
        return None if self.files is None else Vocabulary(read_text(self.files, "train"))

    def prepare(self) -> None:
        """Writes the data set as ArrayRecord; text files are read as they are."""
        if self.files is None:
            tfds.prepare(self.dataset, self.data_dir)
        else:
            self._words()


def _rows(tokens: np.ndarray, length: int, byte_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Windows of a text, with "bytes", those that the targets of each stand for."""
    rows = windows([tokens], length)
    is_target = np.arange(length) < rows["targets"][:, None]
    return {**rows, "bytes": (byte_counts[rows["tokens"][:, 1:]] * is_target).sum(axis=1).astype(np.int32)}


def _put(carry: Any, streams: Int[Array, " examples"], states: Any) -> Any:
    """The carried states of all streams, with those of `streams` replaced.

    Under `jax.pmap` the replicas have different streams, and each gets the states of all.
    """
    axis = replica_axis()

    def everywhere(x: Array) -> Array:
        return x if axis is None else jax.lax.psum(x, axis)

    def put(old: Array, new: Array) -> Array:
        is_new = everywhere(jnp.zeros(len(old)).at[streams].set(1))
        return jnp.where(is_new[:, None] > 0, everywhere(jnp.zeros_like(old).at[streams].set(new)), old)

    return jax.tree.map(put, carry, states)
