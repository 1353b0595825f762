"""Regression: an MLP on scikit-learn's diabetes table. The shortest experiment."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from trainer.config import setting
from trainer.data import ArraySource
from trainer.experiment import Batch, Collections, Variables
from trainer.metrics import Mean, Metrics


class MLP(nn.Module):
    """One hidden layer; each result is a number."""

    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "examples features"], train: bool) -> Float[Array, " examples"]:
        """One number for each example."""
        fresh = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "mlp"))
        x = nn.gelu(nn.Dense(self.hidden, kernel_init=fresh, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        fresh = nn.with_logical_partitioning(nn.initializers.zeros, ("mlp", None))
        return nn.Dense(1, kernel_init=fresh, name="head")(x)[:, 0]


@dataclasses.dataclass
class Regression:
    """Squared error of the progression of diabetes a year after the ten measurements of a patient."""

    hidden: int = setting(64, minimum=1)
    """Units of the hidden layer."""
    dropout: float = setting(0.0, minimum=0, maximum=1)
    """Dropout rate while training, the share of hidden units that are set to 0."""

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Fresh parameters."""
        return MLP(self.hidden, self.dropout).init(key, batch["x"], train=False)

    def loss(
        self, variables: Variables, batch: Batch, *, key: Key[Array, ""], train: bool
    ) -> tuple[Metrics, Collections]:
        """Metrics "loss", the mean squared error of standardised y, and "r2", the share of y's variance explained.

        The variance is about the mean of the training split, which is 0.
        """
        found = MLP(self.hidden, self.dropout).apply(variables, batch["x"], train=train, rngs={"dropout": key})
        errors, variance = (Mean.of(jnp.square(x), batch["mask"]) for x in (batch["y"] - found, batch["y"]))
        return {"loss": errors, "r2": Mean(variance.total - errors.total, variance.total)}, {}

    def predict(self, variables: Variables, batch: Batch) -> dict[str, Array]:
        """ "y", the standardised progression of each patient."""
        return {"y": jnp.asarray(MLP(self.hidden, self.dropout).apply(variables, batch["x"], train=False))}

    def source(self, split: str) -> ArraySource:
        """Every fifth of the 442 patients is for testing; "x" [10] and "y" are standardised by the other patients."""
        from sklearn.datasets import load_diabetes  # slow to import, and only needed here

        table = np.column_stack(load_diabetes(return_X_y=True, scaled=False))
        tests = np.arange(len(table)) % 5 == 4
        known = table[~tests]
        chosen = (table[{"train": ~tests, "test": tests}[split]] - known.mean(0)) / known.std(0)
        return ArraySource({"x": chosen[:, :-1].astype(np.float32), "y": chosen[:, -1].astype(np.float32)})
