"""`Sum` and `Perplexity`, and functions that add metrics on the host and compute their numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.errors import UserError
from trainer.metrics.mean import Mean, Metric, Metrics


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


def numbers(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of metrics, sorted by name: "prefix/name", or "prefix/name/number" if a metric has several.

    A metric may also be a number. Raises `UserError`, with the name, for what is neither, for a metric that computes no
    numbers, and for a name that two metrics give.
    """
    found: dict[str, float] = {}
    for name in sorted(metrics):
        metric = metrics[name]
        value = metric.compute() if isinstance(metric, Metric) else metric
        several = value if isinstance(value, Mapping) else {"": value}
        for part, number in several.items():
            key = f"{prefix}/{name}/{part}".removesuffix("/")
            if key in found:
                raise UserError(f"two metrics give a number with the name {key}; rename one of them")
            found[key] = _as_number(number, key)
    return found


def _as_number(value: Any, name: str) -> float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OUSMmc":
        shown = " ".join(repr(value).split())[:60]
        raise UserError(f"{name} is {shown}, a {type(value).__name__}; one number or a metric is expected")
    return float(array.item())
