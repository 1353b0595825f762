"""`Sum` and `Perplexity`, and functions that add metrics on the host and compute their numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.metrics.mean import Mean, Metrics


class Sum(Mean):
    """A weighted sum, such as the number of tokens: `Sum.of(values, weights)`."""

    def compute(self) -> float:
        """The sum. Waits for the device."""
        return float(np.asarray(self.total))


class Perplexity(Mean):
    """The exponential of a mean of cross-entropies in nats: `Perplexity.of(losses, weights)`."""

    def compute(self) -> float:
        """exp of the mean, at most the largest float; NaN when nothing was counted. Waits for the device."""
        return float(np.exp(np.minimum(super().compute(), _LARGEST)))


_LARGEST = np.log(np.finfo(np.float64).max)


def add(sums: Metrics | None, metrics: Metrics) -> Metrics:
    """Metrics added on the host, in float64 or int64; `sums` is what an earlier call returned, None for nothing yet."""
    wide = jax.tree.map(_widened, jax.device_get(metrics))
    return wide if sums is None else jax.tree.map(np.add, sums, wide)


def _widened(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else np.int64)


def numbers(metrics: Metrics, prefix: str) -> dict[str, float]:
    """The numbers of metrics, sorted by name: "prefix/name", or "prefix/name/number" if a metric has several."""
    found: dict[str, float] = {}
    for name in sorted(metrics):
        value = metrics[name].compute()
        several = value if isinstance(value, Mapping) else {"": value}
        found |= {f"{prefix}/{name}/{part}".removesuffix("/"): float(number) for part, number in several.items()}
    return found
