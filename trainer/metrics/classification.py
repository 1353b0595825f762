"""Metrics of classifiers: accuracy, what follows from a confusion matrix, and the area under a ROC curve."""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from trainer.metrics.mean import Mean, check_shapes

_Numbers = Num[Array, "..."] | Bool[Array, "..."]


class Accuracy(Mean):
    """The share of examples whose label is among the `top_k` classes with the largest logits."""

    @classmethod
    def of(  # pyrefly: ignore[bad-override] - made of other arrays than a mean
        cls, logits: Float[Array, "*shape classes"], labels: Int[Array, "*shape"], weights: _Numbers, top_k: int = 1
    ) -> "Accuracy":
        """Of logits […, classes] and labels from 0 to classes − 1.

        Ties go to the lower class, as in `argmax`. A NaN logit ranks above the label's logit. A label beyond the
        classes, such as −1, is never hit.
        """
        if not 1 <= top_k <= logits.shape[-1]:
            raise ValueError(f"top_k is {top_k}; 1 to {logits.shape[-1]} is expected, the number of classes")
        labels = labels.astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        is_before = (logits == chosen) & (jnp.arange(logits.shape[-1]) < labels[..., None])
        rank = jnp.sum(~(logits <= chosen) | is_before, axis=-1)
        is_class = (labels >= 0) & (labels < logits.shape[-1])
        return cls(*Mean.of((rank < top_k) & is_class, weights))


@flax.struct.dataclass
class ConfusionMatrix:
    """How often examples of each class were taken for each class; precision, recall and F1 from that.

    Attributes:
      counts: float32 [labels, predictions], sums of weights.
    """

    counts: Float[Array, "classes classes"]

    @classmethod
    def of(
        cls, predictions: Int[Array, "*shape"], labels: Int[Array, "*shape"], weights: _Numbers, classes: int
    ) -> "ConfusionMatrix":
        """Of predicted and true classes from 0 to `classes` − 1; a class beyond them makes every number NaN.

        To ignore examples, such as those with label −1, give them the weight 0.
        """
        for classes_of in (predictions, labels):
            check_shapes("ConfusionMatrix", classes_of, weights)
        predictions, labels = predictions.astype(jnp.int32), labels.astype(jnp.int32)  # of uint8, cells would overflow
        inside = (predictions >= 0) & (predictions < classes) & (labels >= 0) & (labels < classes)
        weights = weights.astype(jnp.float32)
        weights = jnp.where(inside | (weights == 0), weights, jnp.nan)
        cells = jnp.where(inside, labels * classes + predictions, 0)
        counts = jnp.zeros(classes**2, jnp.float32).at[cells.reshape(-1)].add(weights.reshape(-1))
        return cls(counts.reshape(classes, classes))

    def compute(self) -> dict[str, float]:
        """Accuracy, and precision, recall and F1 averaged over classes ("macro") or examples ("micro").

        A class without predictions has precision 0, one without examples recall 0, and one without both is left out.
        With one label and one prediction for each example, "micro" precision, recall and F1 equal the accuracy.
        """
        counts = np.asarray(self.counts, np.float64)
        if np.isnan(counts).any():
            return dict.fromkeys(_NAMES, float("nan"))
        hits, predicted, actual = np.diag(counts), counts.sum(0), counts.sum(1)
        seen = predicted + actual > 0
        if not seen.any():
            return dict.fromkeys(_NAMES, float("nan"))
        hits, predicted, actual = hits[seen], predicted[seen], actual[seen]
        precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
        recall = np.divide(hits, actual, out=np.zeros_like(hits), where=actual > 0)
        f1, accuracy = 2 * hits / (predicted + actual), hits.sum() / counts.sum()
        values = (accuracy, precision.mean(), recall.mean(), f1.mean(), accuracy, accuracy, accuracy)
        return dict(zip(_NAMES, map(float, values), strict=True))


_NAMES = (
    *("accuracy", "precision_macro", "recall_macro", "f1_macro"),
    *("precision_micro", "recall_micro", "f1_micro"),
)


@flax.struct.dataclass
class AUC:
    """The area under a ROC curve, from counts of scores in bins.

    It is the share of pairs of a positive and a negative example in which the positive one has the larger score, where
    two scores in the same bin count half. So it is exact for scores that are rounded to bins.

    Attributes:
      negatives: float32 [bins], sums of weights.
      positives: float32 [bins].
    """

    negatives: Float[Array, " bins"]
    positives: Float[Array, " bins"]

    @classmethod
    def of(
        cls,
        scores: Float[Array, "*shape"],
        labels: _Numbers,
        weights: _Numbers,
        *,
        bins: int = 1024,
        low: float = 0.0,
        high: float = 1.0,
    ) -> "AUC":
        """Of scores from `low` to `high`, such as probabilities, and labels 0 or 1; other scores go to the outer bins.

        A NaN makes the whole AUC NaN.
        """
        for array in (scores, labels):
            check_shapes("AUC", array, weights)
        place, weights = (scores.astype(jnp.float32) - low) * (bins / (high - low)), weights.astype(jnp.float32)
        weights = jnp.where(jnp.isnan(place) & (weights != 0), jnp.nan, weights).reshape(-1)
        place = jnp.where(jnp.isnan(place), 0, jnp.clip(place, 0, bins - 1)).astype(jnp.int32).reshape(-1)
        counts = jnp.zeros((2, bins), jnp.float32).at[(labels != 0).astype(jnp.int32).reshape(-1), place].add(weights)
        return cls(counts[0], counts[1])

    def compute(self) -> float:
        """The area, from 0 to 1; NaN without examples of both labels."""
        negatives, positives = (np.asarray(x, np.float64) for x in (self.negatives, self.positives))
        below = np.cumsum(negatives) - negatives / 2
        pairs = negatives.sum() * positives.sum()
        return float(np.sum(positives * below) / pairs) if pairs else float("nan")
