"""Metrics of how values are distributed: mean and standard deviation, and quantiles from a histogram."""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from trainer.metrics.mean import check_shapes

_Numbers = Num[Array, "..."] | Bool[Array, "..."]
_PERCENTILES = (5, 25, 50, 75, 95)


@flax.struct.dataclass
class Moments:
    """Mean and standard deviation of values.

    Attributes:
      sums: float32 [3], Σ w·(x − c)ᵏ for k = 0, 1, 2.
      center: c. Rounding errors of the standard deviation s grow with ((mean − c) / s)².
    """

    sums: Float[Array, "3"]
    center: float = flax.struct.field(pytree_node=False, default=0.0)

    @classmethod
    def of(cls, values: _Numbers, weights: _Numbers, *, center: float = 0.0) -> "Moments":
        """Of `values` under `weights` of the same shape; `center` is a number near their mean."""
        check_shapes("Moments", values, weights)
        weights = weights.astype(jnp.float32)
        away = jnp.where(weights == 0, 0, values.astype(jnp.float32) - center)
        sums = [jnp.sum(weights), jnp.sum(weights * away), jnp.sum(weights * away**2)]
        return cls(jnp.stack(sums), center)

    def compute(self) -> dict[str, float]:
        """ "mean" and "std", that of the whole population; NaN where nothing was counted."""
        weight, first, second = map(float, np.asarray(self.sums))
        if not weight:
            return {"mean": float("nan"), "std": float("nan")}
        away = first / weight
        return {"mean": self.center + away, "std": float(np.sqrt(np.maximum(second / weight - away**2, 0)))}


@flax.struct.dataclass
class Histogram:
    """Counts of values in bins of equal width, and quantiles from them.

    Attributes:
      counts: float32 [bins], sums of weights.
      low: the lower end of the first bin, which also has all values below.
      high: the upper end of the last bin, which also has all values above.
    """

    counts: Float[Array, " bins"]
    low: float = flax.struct.field(pytree_node=False)
    high: float = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, values: _Numbers, weights: _Numbers, *, low: float, high: float, bins: int = 64) -> "Histogram":
        """Of `values` under `weights` of the same shape. A NaN is counted in the last bin."""
        check_shapes("Histogram", values, weights)
        place = (values.astype(jnp.float32) - low) * (bins / (high - low))
        place = jnp.where(jnp.isnan(place), bins - 1, jnp.clip(place, 0, bins - 1)).astype(jnp.int32)
        counts = jnp.zeros(bins, jnp.float32).at[place.reshape(-1)].add(weights.astype(jnp.float32).reshape(-1))
        return cls(counts, low, high)

    def compute(self) -> dict[str, float]:
        """The 5th, 25th, 50th, 75th and 95th percentile as "p5" … "p95".

        They are right to the width of a bin, if no value is NaN or outside of [low, high]. Values count as spread
        evenly over their bin. NaN where nothing was counted.
        """
        counts = np.asarray(self.counts, np.float64)
        if not counts.sum():
            return {f"p{percent}": float("nan") for percent in _PERCENTILES}
        edges, share = np.linspace(self.low, self.high, len(counts) + 1), np.cumsum(counts) / counts.sum()
        found = np.interp(np.array(_PERCENTILES) / 100, [0, *share], edges)
        return {f"p{percent}": float(value) for percent, value in zip(_PERCENTILES, found, strict=True)}
